"""
Runs that were in a folder before: a new one moves them to previous-1, previous-2, ... in it.
"""
import glob
import itertools
import json
import os
import shlex
import shutil
import sys
import zipfile

from runtime.checkpoint_format import read_pickle
from runtime.console import format_command, say
from runtime.files import check_file

BEST = 'ckpt.pt'
LAST = 'ckpt_last.pt'
METRICS = 'metrics.jsonl'
PICTURE = 'loss.png'
PREVIOUS = 'previous'


def exists(out_dir):
    """Whether out_dir has a checkpoint to resume from, or a file that should be one."""
    return any(os.path.lexists(os.path.join(out_dir, name)) for name in (BEST, LAST))


def read_values(path):
    """The dict in a checkpoint, with None for each tensor; empty if it can't be read."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            return dict(read_pickle(archive))
    except Exception:  # it may have anything in it
        return {}


def read_iter_num(path):
    """The iter_num in a checkpoint, without its tensors; -1 if that can't be read."""
    iter_num = read_values(path).get('iter_num')
    return iter_num if type(iter_num) is int else -1


def read_newest_iter_num(folder):
    """The iterations of the run in the folder; -1 if it has no checkpoint that can be read."""
    return max(read_iter_num(os.path.join(folder, name)) for name in (BEST, LAST))


def read_argv(folder):
    """The words of the command that started the run in the folder, if it has them, or else ours."""
    argv = sys.argv
    try:
        with open(os.path.join(folder, METRICS), encoding='utf-8') as f:
            for line in f:
                if '"event": "run"' in line:
                    argv = [sys.argv[0], *map(str, json.loads(line)['argv'][1:])]
    except (LookupError, OSError, TypeError, ValueError):  # it may have anything in it
        pass
    return argv


def list_previous_runs(out_dir):
    """[(iter_num, folder)] of the earlier runs that a new one has moved, the longest first."""
    folders = glob.glob(os.path.join(glob.escape(out_dir), PREVIOUS + '*'))
    runs = [(read_newest_iter_num(folder), folder) for folder in folders]
    return sorted((run for run in runs if run[0] >= 0), reverse=True)


def describe_previous_runs(out_dir):
    """One line about them; '' if there are none."""
    runs = list_previous_runs(out_dir)
    if not runs:
        return ''
    texts = [f'{folder} ({iter_num} iterations)' for iter_num, folder in runs[:5]]
    return f'earlier runs are in {", ".join(texts)}: use --out_dir={shlex.quote(runs[0][1])}'


def choose_folder(out_dir, names):
    """Makes out_dir/previous-1, or the next number that has none of these files, and returns it.

    So a move that a crash has interrupted is completed.
    """
    for number in itertools.count(1):
        folder = os.path.join(out_dir, f'{PREVIOUS}-{number}')
        is_taken = os.path.lexists(folder) and not os.path.isdir(folder)
        if not is_taken and not any(os.path.lexists(os.path.join(folder, name)) for name in names):
            os.makedirs(folder, exist_ok=True)
            return folder


def move_run(out_dir):
    """Moves the files of the run in out_dir to a folder for previous runs.

    So nothing that a run has saved is ever removed. A run without a checkpoint is not worth that:
    its metrics stay, and the new ones are added to them.
    """
    if not exists(out_dir):
        return
    iter_num = read_newest_iter_num(out_dir)
    # the newest state last: a crash in between must not make an older one the newest
    names = [name for name in (METRICS, PICTURE, BEST, LAST)
             if os.path.lexists(os.path.join(out_dir, name))]
    folder = choose_folder(out_dir, names)
    for name in names:
        move(os.path.join(out_dir, name), os.path.join(folder, name))
    command = format_command(read_argv(folder), out_dir=folder, init_from='resume')
    if iter_num < 0:
        return say(f'{out_dir} had a checkpoint that cannot be read: it is now in {folder}')
    say(f'{out_dir} already had a run of {iter_num} iterations: it is now in {folder}; '
        f'to continue it: {command}')


def move(path, new_path):
    """Moves a file. A link still leads to the same place."""
    if os.path.islink(path):
        os.symlink(os.path.realpath(path), new_path)
        os.remove(path)
    else:
        os.replace(path, new_path)


def keep_best(out_dir):
    """Keeps what is now ckpt.pt in a folder for previous runs, too, before another run replaces it.

    Its best loss can't be compared with the new one: it is of other data, or of another model.
    """
    folder = choose_folder(out_dir, (METRICS, BEST))
    shutil.copyfile(os.path.join(out_dir, METRICS), os.path.join(folder, METRICS))
    path, copy = os.path.join(out_dir, BEST), os.path.join(folder, BEST)
    try:
        os.link(path, copy)
    except OSError:  # a file system without links
        shutil.copyfile(path, copy)
    say(f'{path} is of other data or of another model: it is kept as {copy}')
