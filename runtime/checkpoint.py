"""
Checkpoints: written so that a crash can't damage the earlier one, and read as data, never as code.

A run's newest or best state is in ckpt.pt, by nanoGPT's rule. If the newest state isn't in ckpt.pt,
it is in ckpt_last.pt.
"""
import contextlib
import errno
import os
import pickle
import shlex
import zipfile
from dataclasses import fields, is_dataclass

import numpy as np
import torch

from runtime.checkpoint_format import (
    TYPES,
    check_archive,
    check_sizes,
    count_bytes,
    make_plain,
    read_pickle,
    rename_weights,
)
from runtime.console import fail, format_command, get_first_line, note, warn
from runtime.dataset import check_vocabulary, locate_data
from runtime.distributed import all_reduce_sum, is_sharded, local_tensor
from runtime.files import is_file, replace
from runtime.meta import read_meta
from runtime.previous_runs import BEST, LAST, describe_previous_runs, exists, read_iter_num
from runtime.tokenizer import is_gpt2_vocabulary

KEYS = {*TYPES, 'iter_num', 'best_val_loss', 'val_loss', 'meta', 'gelu'}  # of a checkpoint

# the fields of nanoGPT's model_args
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


# -----------------------------------------------------------------------------
# writing
def save(state, out_dir, is_best=True):
    """Writes the state to ckpt.pt (is_best) or ckpt_last.pt in out_dir; returns the path.

    The file is complete or isn't there: it gets its name only when all of it is on the disk. What
    somebody has added and can't be saved is left out, with a line.
    """
    path = os.path.join(out_dir, BEST if is_best else LAST)
    try:
        write(state, path)
    except (AttributeError, TypeError, ValueError, pickle.PicklingError) as e:
        additions = sorted(state.keys() - KEYS)
        if not additions:
            raise
        warn(f'{", ".join(additions)} cannot be saved in a checkpoint ({get_first_line(e)}), so '
             'only the rest is saved')
        write({key: value for key, value in state.items() if key in KEYS}, path)
    return path


def write(state, path):
    """Writes the file; an exception if something in it can't be saved, or not be read again."""
    with replace(path) as f:
        torch.save(state, f)
        f.flush()
        check_readable(f.name)


def check_readable(path):
    """Raises an exception if the file has something that somebody put in and nobody can read."""
    with zipfile.ZipFile(path) as archive:
        read_pickle(archive)
    try:
        torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except RuntimeError as e:
        if 'Cannot allocate memory' not in str(e):  # a process may have a limit on addresses
            raise


def copy_extras(state):
    """The state, with copies of what somebody has added to it, in a form that can be read again.

    Training would change tensors while they are written. Numbers of numpy become plain ones.
    """
    extras = {key: copy_value(value) for key, value in state.items()
              if key not in ('model', 'optimizer')}
    # of a part of the model that somebody has compiled
    weights = {name.replace('_orig_mod.', ''): w for name, w in state['model'].items()}
    return {**state, **extras, 'model': weights}


def copy_value(value):
    """A copy of nested values, with tensors on the CPU, and without types of numpy."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biufc':
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {copy_value(key): copy_value(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(copy_value(item) for item in value)
    return value


@torch.no_grad()
def is_finite(tensor):
    """Whether all its numbers are finite. It takes no memory of the tensor's size."""
    if not tensor.numel():
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return all(bound.isfinite() for bound in tensor.aminmax())


def has_finite_weights(model):
    """Whether all weights are finite, on all ranks. With fsdp every rank must call it.

    Weights that aren't must not take the place of earlier ones.
    """
    has_infinite = not all(is_finite(local_tensor(p)) for p in model.parameters())
    if is_sharded(model):
        device = next(model.parameters()).device
        has_infinite = all_reduce_sum(torch.tensor(float(has_infinite), device=device)).item() > 0
    return not has_infinite


def remove_last(out_dir):
    """Removes ckpt_last.pt, when ckpt.pt is newer."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(out_dir, LAST))


def describe(config, meta):
    """What a checkpoint says about its model: model_args, and keys that nanoGPT ignores.

    model_args has nanoGPT's keys, and those of other options that aren't at their default. meta
    is the dataset's meta dict, or None for GPT-2's BPE: with it a checkpoint can be sampled from
    without its dataset.
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
def choose_init_from(out_dir):
    """What init_from=auto means: resume if there is a checkpoint, else scratch.

    A line says if there are only earlier runs.
    """
    if exists(out_dir):
        return 'resume'
    text = describe_previous_runs(out_dir)
    if text:
        note(f'{out_dir} has no checkpoint, so a new run begins; {text} to continue one of them')
    return 'scratch'


def load_newest(out_dir):
    """(state, path) of the checkpoint with the larger iter_num, to resume a run.

    A damaged file is named, and the other one is used.
    """
    paths = [os.path.join(out_dir, name) for name in (BEST, LAST)]
    pairs = [pair for pair in map(try_to_load, paths) if pair]
    if not pairs:
        fail_without_checkpoint(out_dir)
    return max(pairs, key=lambda pair: pair[0]['iter_num'])


def load_best(out_dir):
    """(state, path) of ckpt.pt, or of ckpt_last.pt if there is none: to sample or to evaluate.

    out_dir may also be a checkpoint's file. A line says if a newer one is next to it.
    """
    paths = [os.path.join(out_dir, name) for name in (BEST, LAST)]
    if os.path.isfile(out_dir):
        paths = [out_dir]
    for path in paths:
        pair = try_to_load(path)
        if not pair:
            continue
        other_paths = [os.path.join(os.path.dirname(path), name) for name in (BEST, LAST)]
        iter_num, newest_path = max((read_iter_num(p), p) for p in other_paths if p != path)
        if iter_num > pair[0]['iter_num']:
            note(f'{path} is from iteration {pair[0]["iter_num"]}; {newest_path} is newer, from '
                 f'iteration {iter_num}; to use that: {format_command(out_dir=newest_path)}')
        return pair
    fail_without_checkpoint(out_dir)


def try_to_load(path):
    """(state, path) of the file; None if it isn't there, or with a warning if it is damaged."""
    if not is_file(path):
        return None
    try:
        return load(path), path
    except ValueError as e:
        warn(str(e))


def fail_without_checkpoint(out_dir):
    """Fails because there is nothing to read, and says what may help."""
    problem = f'{out_dir} has no checkpoint that can be read'
    remedy = "train first, or name the run's folder with --out_dir"
    if not os.path.lexists(out_dir):
        problem = f'the folder {out_dir!r} does not exist'
    elif os.path.exists(os.path.join(out_dir, 'config.json')):
        remedy = f'it is a folder for transformers: use --init_from={shlex.quote(out_dir)}'
    elif exists(out_dir):
        remedy = 'put a copy of it there, or start again: a new run moves it out of the way'
    fail(problem, describe_previous_runs(out_dir) or remedy, who='node')


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
        # torch's text advises to run the code in it
        reason = 'torch cannot read it' if 'weights_only' in str(e) else get_first_line(e)
        raise ValueError(f'{path} is not a readable checkpoint: {reason}') from e
    return state


def find_meta(state, path):
    """The meta dict of a checkpoint that load() has read from path; None: GPT-2's BPE.

    nanoGPT's checkpoints have none in them: theirs is next to the checkpoint or in the dataset's
    folder.
    """
    if 'meta' in state or is_gpt2_vocabulary(state['model_args']['vocab_size']):
        return state.get('meta')
    name = state.get('config', {}).get('dataset', '')
    meta = read_meta(os.path.dirname(path))
    if not meta and isinstance(name, str):
        data_dir = locate_data(name)
        meta = data_dir and read_meta(data_dir)
    check_vocabulary(meta, state, f'dataset {name!r} on this machine', path,
                     'put the meta.pkl of its dataset next to the checkpoint')
    return meta
