"""
Checkpoints: written so that a crash can't cost the earlier one, read without running anything that is in them.

A run keeps its state in out_dir: ckpt.pt by nanoGPT's rule (at every evaluation, or only at the best one), and in
ckpt_last.pt whenever the newest state isn't in ckpt.pt.
"""
import contextlib
import errno
import json
import os
import pickletools
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile

import torch

from checks import REPO, check_vocabulary, fail, first_line, is_gpt2, locate_data, say, warn
from distributed import inner, like
from model import GPT, GPTConfig
from tokenizer import check_meta, read_meta

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder there
    fcntl = None

BEST, LAST, METRICS, PREVIOUS = 'ckpt.pt', 'ckpt_last.pt', 'metrics.jsonl', 'previous'


class RunDir:
    """The folder that a run writes to, held against other runs until it is closed or its process ends.

    Checkpoints are written by a thread, beside the training. No write that fails ends the run: it is said, the earlier
    files stay as they are, and the checkpoint is tried again with the next one.
    """

    def __init__(self, path):
        """Takes the folder, if there is one; fails if another run has it."""
        self.path, self.unsaved, self.written, self.newest, self.thread, self.logs, self.lock = path, {}, {}, None, None, True, None
        if os.path.isdir(path):
            self._hold()

    def begin(self, fresh, **made_by):
        """Makes the folder, clears away what a crash cut off, with fresh puts aside what an earlier run left, and logs what makes this one."""
        try:
            os.makedirs(self.path, exist_ok=True)
            self._hold()
            for name in (BEST, LAST):
                if os.path.exists(os.path.join(self.path, name + '.tmp')):
                    os.remove(os.path.join(self.path, name + '.tmp'))
            if fresh and put_aside(self.path):
                say(f'{self.path} held another run: its checkpoints and metrics are now in {os.path.join(self.path, PREVIOUS)}')
            open(os.path.join(self.path, METRICS), 'a').close()
        except OSError as e:
            fail(f'{self.path!r} cannot be written to ({e.strerror})', 'name another folder with --out_dir')
        try:
            commit = subprocess.run(['git', '-C', REPO, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git
            commit = ''
        self.log(event='run', argv=sys.argv, python=platform.python_version(), torch=torch.__version__, commit=commit, **made_by)

    def _hold(self):
        if self.lock is not None or not fcntl:
            return
        # the folder itself; NFS locks only files that are open for writing
        for name, flags in (('.', os.O_RDONLY), ('.lock', os.O_RDWR | os.O_CREAT)):
            try:
                self.lock = os.open(os.path.join(self.path, name), flags)
                return fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f'another run is writing to {self.path}', 'stop it first, or name another folder with --out_dir')
            except OSError as e:
                reason = e.strerror
        warn(f'{self.path} cannot be locked ({reason}), so nothing keeps a second run out of it')

    def log(self, **event):
        """Appends the event to metrics.jsonl as a line of JSON."""
        try:
            with open(os.path.join(self.path, METRICS), 'ab+') as f:
                if f.tell():
                    f.seek(-1, os.SEEK_END)
                    if f.read() != b'\n':  # a line that a crash cut off
                        f.write(b'\n')
                f.write(json.dumps(event).encode() + b'\n')
            self.logs = True
        except OSError as e:
            if self.logs:  # once
                warn(f'{METRICS} in {self.path} could not be written ({e.strerror}); the run goes on')
            self.logs = False

    def save(self, state, best, copied=True):
        """Has a thread write the state to ckpt.pt (best) or ckpt_last.pt, once the save before is done; it must not change any more.

        Of a state that isn't copied, and so will, it returns when it is written, or couldn't be: then it isn't kept.
        """
        self.wait()
        self.newest = BEST if best else LAST
        if best:
            self.unsaved.pop(LAST, None)  # older
        self.unsaved[self.newest] = state
        self.thread = threading.Thread(target=self._write)
        self.thread.start()
        if not copied:
            self.wait()
            if self.newest in self.unsaved:
                self.unsaved[self.newest] = None

    def _write(self):
        for name in sorted(self.unsaved, key=lambda name: name != self.newest):  # what failed before comes after the newest
            state = self.unsaved[name]
            if state is None:
                continue
            try:
                if not os.path.isdir(self.path):
                    warn(f'{self.path} is gone; making it again')
                    os.makedirs(self.path)
                    self.lock = None
                    self._hold()
                save(state, self.path, best=name == BEST)
                self.written[name] = state['iter_num']
                if name == BEST and self.written.get(LAST, 0) <= state['iter_num']:
                    remove_last(self.path)
                del self.unsaved[name]
            except (OSError, RuntimeError) as e:
                while e.__context__:  # torch's writer hides what the system said behind errors of its own
                    e = e.__context__
                warn(f'{name} could not be saved in {self.path} ({first_line(e)}); the run goes on, and tries again at the next save')

    def wait(self):
        """Returns once what was saved is written, or could not be."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def close(self):
        """Gives the folder up once all is written; returns the path of the newest checkpoint, None if it couldn't be saved."""
        self.wait()
        if self.lock is not None:
            os.close(self.lock)
        return None if self.newest in self.unsaved else os.path.join(self.path, self.newest)

    def warn_of_slow_saves(self, size):
        """Warns if writing this many bytes may outlast the time that torchrun leaves its processes to end in."""
        grace = int(os.environ.get('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', 30))
        if 'TORCHELASTIC_RUN_ID' not in os.environ or size < 2 ** 30:
            return
        probe = os.path.join(self.path, LAST + '.tmp')
        content = os.urandom(2 ** 25)
        try:
            t0 = time.perf_counter()
            with open(probe, 'wb') as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            seconds = size / len(content) * (time.perf_counter() - t0)
            os.remove(probe)
        except OSError:
            return
        if seconds > grace / 2:
            warn(f'a save writes {size / 2**30:.1f} GiB, in about {seconds:.0f} s here, but torchrun kills {grace} s after SIGTERM: '
                 f'set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={4 * seconds:.0f}, or a --save_interval that you can afford to lose')


def save(state, out_dir, best=True):
    """Writes the state to ckpt.pt (best) or ckpt_last.pt of out_dir, whole or not at all; returns the path."""
    path = os.path.join(out_dir, BEST if best else LAST)
    aside = path + '.tmp'
    try:
        with open(aside, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # the bytes before the name: a crash must not leave the name of an unwritten file
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):  # on a full disk, its part of the file is the room for the next try
            os.remove(aside)
    if os.name == 'posix':
        folder = os.open(out_dir, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems don't know how to
            os.fsync(folder)
        os.close(folder)
    return path


def remove_last(out_dir):
    """Removes ckpt_last.pt, when ckpt.pt is newer."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(out_dir, LAST))


# what the pickle in a checkpoint names, of all that weights_only would let it: tensors, no bytearray of any length
GLOBALS = re.compile(r'collections OrderedDict|torch Size|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|torch\.storage UntypedStorage')


def load(path):
    """The dict of a checkpoint file, its tensors mapped from the file; ValueError names the file if it can't be used.

    A checkpoint is data: weights_only reads tensors and plain values alone, no code, and what they are is checked,
    so that none makes a model larger than the file. The CRCs are those every torch archive carries; torch.load doesn't
    look at them. The names of its weights come without the prefixes that torch.compile and DDP leave.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError('it is compressed, as none of torch is')
            if damaged := archive.testzip():
                raise ValueError(f'{damaged} in it is damaged')
            pickled = archive.read(next(name for name in archive.namelist() if name.endswith('/data.pkl')))
        for op, arg, _ in pickletools.genops(pickled):
            if op.name == 'STACK_GLOBAL' or op.name == 'GLOBAL' and not GLOBALS.fullmatch(arg):
                raise ValueError(f'it asks for {arg}, and data needs no code')
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if missing := {'model', 'model_args', 'iter_num'} - set(state):
            raise ValueError(f'it has no {" or ".join(sorted(missing))}')
        for key, kind in (('model', dict), ('model_args', dict), ('optimizer', dict), ('config', dict), ('iter_num', int), ('scaler', dict),
                          ('wandb_id', str), ('gelu', str)):
            if key in state and not isinstance(state[key], kind):
                raise ValueError(f'its {key} is no {kind.__name__}')
        if not 0 <= state['iter_num'] < 2 ** 63:
            raise ValueError('its iter_num is out of range')
        if state.get('gelu', 'none') not in ('none', 'tanh'):
            raise ValueError(f'its gelu is {state["gelu"]!r}')
        if any(type(state.get('scaler', SCALER).get(key)) is not type(value) for key, value in SCALER.items()):
            raise ValueError('its scaler is none')
        if 'best_val_loss' in state:
            state['best_val_loss'] = float(state['best_val_loss'])  # a tensor in nanoGPT's
        if 'meta' in state:
            check_meta(state['meta'])
        weights = {}
        for name, tensor in state['model'].items():
            while name.startswith(('_orig_mod.', 'module.')):  # left by torch.compile and DDP
                name = name.partition('.')[2]
            if not name.endswith('.attn.bias'):  # the causal mask that old versions kept among the weights
                weights[name] = tensor
        if state['model_args'].get('tied', True):
            weights['lm_head.weight'] = weights.get('transformer.wte.weight')  # one tensor under two names
        if tensor_bytes((list(weights.values()), state.get('optimizer')), set()) > 4 * os.path.getsize(path) + 2 ** 20:
            raise ValueError('its tensors are larger than the file')
        check_shapes(state['model_args'], {name: tensor.shape for name, tensor in weights.items()})
        state['model'] = weights
    except Exception as e:  # a damaged archive raises almost anything
        if isinstance(e, OSError) and e.errno in (errno.EIO, errno.EACCES, errno.ENOMEM, errno.ESTALE):
            fail(f'{path} cannot be read ({e.strerror})', 'it may be whole: see to that first', who='node')
        raise ValueError(f'{path} is no readable checkpoint: {first_line(e)}') from e
    return state


# a GradScaler's state
SCALER = {'scale': 1.0, 'growth_factor': 1.0, 'backoff_factor': 1.0, 'growth_interval': 1, '_growth_tracker': 1}


def tensor_bytes(value, seen):
    """Bytes that the tensors in these containers take in float32 when copied; ValueError if one isn't plain numbers on the CPU."""
    if isinstance(value, torch.Tensor) and id(value) not in seen:
        seen.add(id(value))
        if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized or value.is_complex():
            raise ValueError('it has a tensor that is no plain one')
        return 4 * value.numel()
    if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        return sum(tensor_bytes(item, seen) for item in (value.values() if isinstance(value, dict) else value))
    return 0


def check_shapes(model_args, shapes):
    """ValueError unless {name: shape} are those of a GPT with these arguments, which may be anything.

    None is built that has more layers, or is wider, than there are tensors, or these are large.
    """
    largest = max((n for shape in shapes.values() for n in shape), default=0)
    layers = min(1000, sum(str(name).endswith('.ln_1.weight') for name in shapes))
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'):
        n = model_args.get(key)
        if type(n) is not int or not 1 <= n <= (layers if key == 'n_layer' else largest):
            raise ValueError(f'{key}={n if type(n) is int else type(n).__name__} does not fit its weights')
    for key, value in model_args.items():
        kind = type(getattr(GPTConfig, key, None))
        if key not in ('dropout', 'bias') and type(value) not in (kind, int if kind is float else kind):
            raise ValueError(f'{key} is no option of this model, or no {type(value).__name__}')
    if not 0 <= model_args.get('bigrams', 0) <= largest or not 0 <= model_args.get('embd_conv', 0) <= largest:
        raise ValueError('bigrams or embd_conv do not fit its weights')
    expected = {name: tensor.shape for name, tensor in GPT.on_meta(GPTConfig(**model_args)).state_dict().items()}
    for name in sorted({*expected, *shapes}, key=str):
        if tuple(expected.get(name, ())) != tuple(shapes.get(name, ())):
            raise ValueError(f'{name} has shape {(*shapes.get(name, ()),)}, its arguments ask for {(*expected.get(name, ()),)}')


def exists(out_dir):
    """Whether out_dir holds a checkpoint to resume from."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in (BEST, LAST))


def put_aside(out_dir):
    """Moves an earlier run's files to out_dir/previous, in place of what is there; whether there were any.

    A run that left no checkpoint isn't worth another's place: its metrics stay, and the new ones follow. What a crash
    interrupts is completed at the next start.
    """
    previous, new = os.path.join(out_dir, PREVIOUS), os.path.join(out_dir, PREVIOUS + '.new')
    if not exists(out_dir) and not os.path.exists(new):
        return False
    os.makedirs(new, exist_ok=True)
    for name in (BEST, LAST, METRICS):
        if os.path.exists(os.path.join(out_dir, name)):
            os.replace(os.path.join(out_dir, name), os.path.join(new, name))
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(new, previous)
    return True


def load_newest(out_dir):
    """(state, path) of the checkpoint with the larger iter_num, to resume a run; a damaged file is named and passed over."""
    return _first_readable(out_dir, newest=True)


def load_best(out_dir):
    """(state, path) of ckpt.pt, or of ckpt_last.pt only if there is none, to sample, evaluate or convert."""
    return _first_readable(out_dir, newest=False)


def _first_readable(out_dir, newest):
    found = []
    for name in (BEST, LAST):
        path = os.path.join(out_dir, name)
        if os.path.exists(path) and (newest or not found):
            try:
                found.append((load(path), path))
            except ValueError as e:
                warn(str(e))
    if not found:
        is_hf = os.path.exists(os.path.join(out_dir, 'config.json'))
        fail(f'no checkpoint that can be read in {out_dir}', f'it is a folder for transformers: use --init_from={out_dir}' if is_hf else
             'train first, or name the run\'s folder with --out_dir', who='node')
    return max(found, key=lambda pair: pair[0]['iter_num'])


def describe(config, meta):
    """What a checkpoint says of a model: model_args with nanoGPT's keys, and keys of ours, which nanoGPT ignores.

    meta, the dataset's character table or None, so that the checkpoint can be sampled from without its data.
    """
    nanogpts = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    args = {key: value for key, value in vars(config).items() if key in nanogpts or key != 'gelu' and value != getattr(GPTConfig, key)}
    ours = dict(meta=meta, gelu=config.gelu if config.gelu != 'none' else None)
    return dict(model_args=args, **{key: value for key, value in ours.items() if value})


def find_meta(state, out_dir, path):
    """The meta dict of a checkpoint that load() has read from path in out_dir; None means GPT-2's BPE.

    nanoGPT's have none in them: there it is in the dataset's folder, if that is here, or beside the checkpoint.
    """
    if 'meta' in state or is_gpt2(state['model_args']['vocab_size']):
        return state.get('meta')
    dataset = state.get('config', {}).get('dataset', '')
    data_dir = locate_data(dataset) if isinstance(dataset, str) else None
    meta = read_meta(out_dir) or (read_meta(data_dir) if data_dir else None)
    check_vocabulary(meta, state, f'dataset {dataset!r}, as far as it is here,', path, 'put the meta.pkl of its dataset beside it')
    return meta


def build_model(state, dropout=0.0, dtype=torch.float32):
    """The GPT of a checkpoint that load() has read; the weights are copied out of the file, which may change or go."""
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state['model'].items()}
    return GPT.from_state_dict(GPTConfig(**{**state['model_args'], 'dropout': dropout, 'gelu': state.get('gelu', 'none')}), weights)


def load_optimizer(optimizer, state, path):
    """Puts the optimizer state of the checkpoint at path, ours or nanoGPT's, into an optimizer over the same parameters.

    Of its settings, weight_decay, betas and momentum alone are taken: the others say how rather than what is computed, which
    depends on the device. The moments of a table that was cropped since, by a shorter block_size, are cropped alike.
    """
    if state is None:
        fail(f'{path} has no optimizer state', 'it can be sampled from, but not resumed')
    params = [p for group in optimizer.param_groups for p in group['params']]
    own = {p for group in inner(optimizer).param_groups for p in group['params']}
    try:
        if len(state['param_groups']) != len(optimizer.param_groups):
            raise ValueError('it is of another --optim')
        for theirs, ours in zip(state['param_groups'], optimizer.param_groups):
            ours.update(weight_decay=float(theirs['weight_decay']), betas=tuple(map(float, theirs['betas'])))
            if 'momentum' in ours:
                ours['momentum'] = float(theirs['momentum'])
        muons = {p for group in optimizer.param_groups if 'momentum' in group for p in group['params']}
        for i, p in enumerate(params if state['state'] else []):  # none before the first update
            moments = {k: m[:len(p)] if m.dim() else m for k, m in state['state'][i].items()}
            expected = dict(momentum_buffer=p.shape) if p in muons else dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
            if {k: m.shape for k, m in moments.items()} != expected:
                raise ValueError(f'it has other moments for a weight of shape {(*p.shape,)}')
            if p in own:  # a copy, as the file may change or go
                dtype = getattr(inner(optimizer), 'moments_dtype', torch.float32)
                inner(optimizer).state[p] = {k: like(m.to(p.device, dtype if m.dim() else torch.float32, copy=True), p) for k, m in moments.items()}
    except Exception as e:  # it may hold anything
        fail(f'the optimizer state in {path} does not fit its weights ({first_line(e)})', 'use the --optim of that run, or another checkpoint')
