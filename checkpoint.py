"""
Checkpoints: written so that a crash can't cost the earlier one, read without running anything that is in them.

A run keeps its state in out_dir: ckpt.pt by nanoGPT's rule (at every evaluation, or only at the best one), and in
ckpt_last.pt whenever the newest state isn't in ckpt.pt.
"""
import copy
import os
import shutil
import zipfile

import torch

from checks import fail, warn
from model import GPT, GPTConfig

BEST, LAST, PREVIOUS = 'ckpt.pt', 'ckpt_last.pt', 'previous'


def save(state, out_dir, best=True):
    """Writes the state to ckpt.pt (best) or ckpt_last.pt of out_dir, whole or not at all; returns the path."""
    path = os.path.join(out_dir, BEST if best else LAST)
    aside = path + '.tmp'
    with open(aside, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())  # the bytes before the name: a crash must not leave the name of an unwritten file
    os.replace(aside, path)
    if best and os.path.exists(os.path.join(out_dir, LAST)):
        os.remove(os.path.join(out_dir, LAST))  # older than what was just written
    if os.name == 'posix':
        folder = os.open(out_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return path


def load(path):
    """The dict of a checkpoint file, its tensors mapped from the file; ValueError names the file if it is damaged.

    weights_only: tensors and plain values alone, no code. The CRCs are those every torch archive carries; torch.load
    doesn't look at them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f'{damaged} in it is damaged')
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        missing = {'model', 'model_args', 'iter_num'} - set(state)
        if missing:
            raise ValueError(f'it has no {" or ".join(sorted(missing))}')
    except Exception as e:  # a damaged archive raises almost anything
        raise ValueError(f'{path} is no readable checkpoint: {str(e).splitlines()[0] if str(e) else type(e).__name__}') from e
    return state


def exists(out_dir):
    """Whether out_dir holds a checkpoint to resume from."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in (BEST, LAST))


def put_aside(out_dir):
    """Moves an earlier run's files to out_dir/previous, in place of what is there; whether there were any."""
    names = [name for name in (BEST, LAST, 'metrics.jsonl') if os.path.exists(os.path.join(out_dir, name))]
    if names:
        shutil.rmtree(os.path.join(out_dir, PREVIOUS), ignore_errors=True)
        os.makedirs(os.path.join(out_dir, PREVIOUS))
    for name in names:
        os.replace(os.path.join(out_dir, name), os.path.join(out_dir, PREVIOUS, name))
    return bool(names)


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
        fail(f'no checkpoint that can be read in {out_dir}', 'train first, or name the run\'s folder with --out_dir', this_rank=True)
    return max(found, key=lambda pair: pair[0]['iter_num'])


def build_model(state, dropout=0.0):
    """The GPT of a checkpoint's dict, ours or nanoGPT's; the weights are copied out of the file."""
    weights = {}
    for name, tensor in state['model'].items():
        while name.startswith(('_orig_mod.', 'module.')):  # left by torch.compile and DDP
            name = name.partition('.')[2]
        if name != 'lm_head.weight' and not name.endswith('.attn.bias'):  # the causal mask that old versions kept among the weights
            weights[name] = tensor.clone()  # the file may change or go
    weights['lm_head.weight'] = weights['transformer.wte.weight']  # one tensor under two names
    config = GPTConfig(**{**state['model_args'], 'dropout': dropout, 'gelu': state.get('gelu', 'none')})
    return GPT.from_state_dict(config, weights)


def load_optimizer(optimizer, state):
    """Puts a checkpoint's optimizer state, ours or nanoGPT's, into an optimizer over the same parameters.

    What says how rather than what is computed (fused, foreach, ...) stays as it is here: it depends on the device. The
    moments of a table that was cropped since, by a shorter block_size, are cropped alike.
    """
    state = copy.deepcopy(state)  # the file may change or go
    for theirs, ours in zip(state['param_groups'], optimizer.param_groups):  # before loading: fused decides where `step` goes
        theirs.update({k: ours[k] for k in ('fused', 'foreach', 'capturable')})
    optimizer.load_state_dict(state)
    for p, moments in optimizer.state.items():
        moments.update({k: m[:len(p)].clone() for k, m in moments.items() if m.dim() and m.shape != p.shape})
