"""
Checkpoints: written so that a crash can't damage the earlier one, and read as data, never as code.

A run's newest or best state is in ckpt.pt, by nanoGPT's rule. If the newest state isn't in ckpt.pt,
it is in ckpt_last.pt.
"""
import contextlib
import errno
import math
import os
import zipfile
from dataclasses import fields, is_dataclass

import torch

from runtime import pickles
from runtime.console import fail, get_first_line, warn
from runtime.dataset import check_vocabulary, is_gpt2_vocabulary, locate_data
from runtime.tokenizer import check_meta, read_meta

BEST = 'ckpt.pt'
LAST = 'ckpt_last.pt'

# the fields of nanoGPT's model_args
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
# the state of a GradScaler
SCALER = {'scale': float, 'growth_factor': float, 'backoff_factor': float, 'growth_interval': int,
          '_growth_tracker': int}
# another program may have other things by these names, which are left out
TYPES = {'model': dict, 'model_args': dict, 'config': dict, 'optimizer': (dict, list),
         'optimizer_name': str, 'scaler': dict, 'wandb_id': str, 'finished': bool}


# -----------------------------------------------------------------------------
# writing
def save(state, out_dir, is_best=True):
    """Writes the state to ckpt.pt (is_best) or ckpt_last.pt in out_dir; returns the path.

    The file is complete or isn't there: it gets its name only when all of it is on the disk.
    """
    path = os.path.join(out_dir, BEST if is_best else LAST)
    temp_path = path + '.tmp'
    try:
        with open(temp_path, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        with zipfile.ZipFile(temp_path) as archive:
            check_pickle(archive)  # somebody may have put in what could never be read again
        torch.load(temp_path, map_location='cpu', weights_only=True, mmap=True)
        os.replace(temp_path, path)
    finally:
        if os.path.exists(temp_path):  # on a full disk this makes room for the next try
            os.remove(temp_path)
    if os.name == 'posix':
        folder = os.open(out_dir, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems don't support it
            os.fsync(folder)
        os.close(folder)
    return path


def remove_last(out_dir):
    """Removes ckpt_last.pt, when ckpt.pt is newer."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(out_dir, LAST))


def describe(config, meta):
    """What a checkpoint says about its model: model_args, and keys that nanoGPT ignores.

    model_args has nanoGPT's keys, and those of other options that aren't at their default. meta
    is the dataset's table of characters or None: with it a checkpoint can be sampled from without
    its dataset.
    """
    defaults = {}
    if is_dataclass(config):
        defaults = {field.name: field.default for field in fields(config)}
    args = {key: value for key, value in vars(config).items()
            if key in NANOGPT_ARGS or key != 'gelu' and value != defaults.get(key)}
    description = dict(model_args=args)
    if meta:
        description['meta'] = meta
    if getattr(config, 'gelu', 'none') != 'none':
        description['gelu'] = config.gelu
    return description


# -----------------------------------------------------------------------------
# reading
def exists(out_dir):
    """Whether out_dir has a checkpoint to resume from."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in (BEST, LAST))


def load_newest(out_dir):
    """(state, path) of the checkpoint with the larger iter_num, to resume a run.

    A damaged file is named, and the other one is used.
    """
    pairs = [pair for pair in (try_to_load(out_dir, name) for name in (BEST, LAST)) if pair]
    if not pairs:
        fail_without_checkpoint(out_dir)
    return max(pairs, key=lambda pair: pair[0]['iter_num'])


def load_best(out_dir):
    """(state, path) of ckpt.pt, or of ckpt_last.pt if there is none: to sample or to evaluate."""
    return (try_to_load(out_dir, BEST) or try_to_load(out_dir, LAST)
            or fail_without_checkpoint(out_dir))


def try_to_load(out_dir, name):
    """(state, path) of the file; None if it isn't there, or with a warning if it is damaged."""
    path = os.path.join(out_dir, name)
    if not os.path.exists(path):
        return None
    try:
        return load(path), path
    except ValueError as e:
        warn(str(e))


def fail_without_checkpoint(out_dir):
    remedy = "train first, or name the run's folder with --out_dir"
    if os.path.exists(os.path.join(out_dir, 'config.json')):
        remedy = f'it is a folder for transformers: use --init_from={out_dir}'
    fail(f'{out_dir} has no checkpoint that can be read', remedy, who='node')


def load(path):
    """The dict in a checkpoint file, its tensors mapped from the file.

    ValueError names the file if it can't be used. A checkpoint is data: no code in it runs, and
    its model can't be larger than the file. torch.load doesn't look at the archive's checksums, so
    they are checked first. The weights' names lose the prefixes of torch.compile and DDP.
    """
    try:
        check_archive(path)
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        state = make_plain(state, path)
        state['model'] = rename_weights(state['model'], state['model_args'])
        num_bytes = count_bytes(state.get('optimizer'), set())
        for tensor in state['model'].values():  # one that has several names is copied for each
            num_bytes += count_bytes(tensor, set())
        if num_bytes > 4 * os.path.getsize(path) + 2 ** 20:
            raise ValueError('its tensors are larger than the file')
        check_sizes(state['model_args'], {name: w.shape for name, w in state['model'].items()})
    except Exception as e:  # a damaged archive raises almost anything
        access_errors = (errno.EIO, errno.EACCES, errno.ENOMEM, errno.ESTALE)
        if isinstance(e, OSError) and e.errno in access_errors:
            fail(f'{path} cannot be read ({e.strerror})',
                 'the file itself may be fine: fix the access to it first', who='node')
        raise ValueError(f'{path} is not a readable checkpoint: {get_first_line(e)}') from e
    return state


def check_archive(path):
    """ValueError if the file is damaged, is compressed or has more than tensors and values."""
    if not zipfile.is_zipfile(path):
        raise ValueError('it was cut short, or is in the format of torch before 1.6')
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):
            raise ValueError('it is compressed, which torch never does')
        damaged_entry = archive.testzip()
        if damaged_entry:
            raise ValueError(f'{damaged_entry} in it is damaged')
        check_pickle(archive)


def check_pickle(archive):
    """Raises an exception if the archive's pickle has anything but tensors and plain values."""
    pickle_name = next(name for name in archive.namelist() if name.endswith('/data.pkl'))
    pickles.read(archive.read(pickle_name))


def make_plain(state, path):
    """A checkpoint's dict with plain values. nanoGPT's forks leave out some, or write other types.

    What is missing or can't be used gets a default, and one line says so. ValueError if that would
    make another model or another run.
    """
    if not isinstance(state, dict):
        raise ValueError('it is not a dict')
    plain_state = {}
    for key, value in state.items():
        if value is not None and isinstance(value, TYPES.get(key, object)):
            plain_state[key] = dict(value) if isinstance(value, dict) else value
    missing_keys = {'model', 'model_args'} - plain_state.keys()
    if missing_keys:
        raise ValueError(f'it has no {" or ".join(sorted(missing_keys))}')
    defaults = {'iter_num': 0, 'best_val_loss': math.inf, 'config': {}}
    unusable_keys = [key for key in defaults if key not in plain_state]
    readers = {'best_val_loss': read_number, 'meta': check_meta, 'scaler': read_scaler}
    for key in [key for key in readers if key in plain_state]:
        try:
            plain_state[key] = readers[key](plain_state[key])
        except Exception:  # it may be anything
            unusable_keys.append(key)
            del plain_state[key]
    if unusable_keys:
        text = ', '.join(f'{key}={defaults.get(key)}' for key in unusable_keys)
        warn(f'{path} is incomplete: it is read with {text}')
    plain_state = {**defaults, **plain_state}
    iter_num = read_number(plain_state['iter_num'])
    if not 0 <= iter_num < 2 ** 63 or iter_num != int(iter_num):
        raise ValueError('its iter_num is not a whole number from 0 to 2**63 - 1')
    if plain_state.get('gelu', 'none') not in ('none', 'tanh'):
        raise ValueError('its gelu is neither none nor tanh')
    return {**plain_state, 'iter_num': int(iter_num)}


def read_number(value):
    """A number, or that in a tensor; ValueError if it is something else."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if type(value) not in (int, float):
        raise ValueError(f'it has a {type(value).__name__} in place of a number')
    float(value)  # raises if it is too large
    return value


def read_scaler(state):
    """The state of a GradScaler, which is empty if it was off, with values of the right type."""
    return {key: kind(read_number(state[key])) for key, kind in SCALER.items() if state}


def rename_weights(weights, model_args):
    """The weights without the prefixes that torch.compile and DDP put before their names."""
    plain_weights = {}
    for name, tensor in weights.items():
        name = name.replace('_orig_mod.', '')
        while name.startswith('module.'):
            name = name.removeprefix('module.')
        # old versions of nanoGPT saved the causal mask (1, 1, T, T) as a weight
        if not (name.endswith('.attn.bias') and tensor.dim() == 4 and tensor.size(1) == 1):
            plain_weights[name] = tensor
    wte = plain_weights.get('transformer.wte.weight')
    has_head = any(name.startswith('lm_head.') for name in plain_weights)
    is_tied = model_args.get('tied', True) and (not has_head or 'lm_head.weight' in plain_weights)
    if wte is not None and is_tied:
        plain_weights.setdefault('lm_head.weight', wte)
    for option in ('qk_norm', 'relu2'):  # older checkpoints don't have these marks, see model.py
        if model_args.get(option):
            plain_weights.setdefault(option, torch.ones(()))
    return plain_weights


def count_bytes(value, seen_ids):
    """The bytes of the tensors in nested containers, as float32 or larger types.

    ValueError for tensors that are sparse, quantized or not on a CPU.
    """
    if id(value) in seen_ids:
        return 0
    if isinstance(value, torch.Tensor):
        seen_ids.add(id(value))
        is_plain = value.layout == torch.strided and value.device.type == 'cpu'
        if not is_plain or value.is_quantized:
            raise ValueError('it has a tensor that is not plain numbers on a CPU')
        return max(4, value.itemsize) * value.numel()
    if isinstance(value, (dict, list, tuple)):
        seen_ids.add(id(value))
        items = value.values() if isinstance(value, dict) else value
        return sum(count_bytes(item, seen_ids) for item in items)
    return 0


def check_sizes(model_args, shapes):
    """ValueError if the arguments ask for a larger or deeper model than {name: shape} has."""
    max_size = max((n for shape in shapes.values() for n in shape), default=0)
    num_layers = min(1000, len(shapes))  # a layer has at least one weight
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bigrams', 'embd_conv'):
        is_optional = key in ('bigrams', 'embd_conv')
        n = model_args.get(key, 0 if is_optional else None)
        limit = num_layers if key == 'n_layer' else max_size
        if key == 'block_size' and 'transformer.wpe.weight' not in shapes:
            limit = 2 ** 24  # no weight depends on it
        if type(n) is not int or not (0 if is_optional else 1) <= n <= limit:
            value_text = n if type(n) is int else type(n).__name__
            raise ValueError(f'{key}={value_text} does not fit its weights')


def find_meta(state, out_dir, path):
    """The table of characters of a checkpoint that load() has read from path; None: GPT-2's BPE.

    nanoGPT's checkpoints have none in them: theirs is next to the checkpoint or in the dataset's
    folder.
    """
    if 'meta' in state or is_gpt2_vocabulary(state['model_args']['vocab_size']):
        return state.get('meta')
    name = state.get('config', {}).get('dataset', '')
    data_dir = locate_data(name) if isinstance(name, str) else None
    meta = read_meta(out_dir)
    if not meta and data_dir:
        meta = read_meta(data_dir)
    check_vocabulary(meta, state, f'dataset {name!r} on this machine', path,
                     'put the meta.pkl of its dataset next to the checkpoint')
    return meta
