"""
Runs that were in a folder before: a new one moves them to previous-1, previous-2, ... in it.
"""
import contextlib
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
    """Whether out_dir has a checkpoint, or a file that should be one, or is itself a file."""
    paths = [os.path.join(out_dir, name) for name in (BEST, LAST)]
    return os.path.isfile(out_dir) or any(map(os.path.lexists, paths))


def read_values(path):
    """The dict in a checkpoint, with None for each tensor; empty if it can't be read."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            return dict(read_pickle(archive))
    except Exception:  # it may have anything in it
        return {}


def read_iter_num(path):
    """The iter_num in a checkpoint; -1 if it can't be read, 0 if it has none or has a tensor."""
    values = read_values(path)
    try:
        return int(values.get('iter_num', 0)) if values else -1
    except (OverflowError, TypeError, ValueError):  # it may be anything
        return 0


def read_newest_iter_num(folder):
    """The iterations of the run in the folder; -1 if it has no checkpoint that can be read."""
    return max(read_iter_num(os.path.join(folder, name)) for name in (BEST, LAST))


def format_continuation(folder):
    """The command that continues the run in the folder, with the flags that it was started with."""
    argv, ranks = sys.argv, 1
    try:
        with open(os.path.join(folder, METRICS), encoding='utf-8') as f:
            for line in f:
                if '"event": "run"' in line:
                    event = json.loads(line)
                    argv = [sys.argv[0], *map(str, event['argv'][1:])]
                    ranks = event['world_size']
    except (LookupError, OSError, TypeError, ValueError):  # it may have anything in it
        pass
    command = format_command(argv, out_dir=folder, init_from='resume')
    return command if ranks == 1 else f'{command} (with torchrun, it had {ranks} ranks)'


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


def make_next_folder(out_dir):
    """Makes out_dir/previous-1, or the next number that is free, and returns its path."""
    for number in itertools.count(1):
        folder = os.path.join(out_dir, f'{PREVIOUS}-{number}')
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
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
    folder = make_next_folder(out_dir)
    for name in names:
        move(os.path.join(out_dir, name), os.path.join(folder, name))
    if iter_num < 0:
        return say(f'{out_dir} had a checkpoint that cannot be read: it is now in {folder}')
    say(f'{out_dir} already had a run of {iter_num} iterations: it is now in {folder}; '
        f'to continue it: {format_continuation(folder)}')


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
    folder = make_next_folder(out_dir)
    path, copy = os.path.join(out_dir, BEST), os.path.join(folder, BEST)
    try:
        os.link(path, copy)
    except OSError:  # a file system without links
        shutil.copyfile(path, copy)
    with contextlib.suppress(OSError):  # there may be none, or no room for it
        shutil.copyfile(os.path.join(out_dir, METRICS), os.path.join(folder, METRICS))
    say(f'{path} is of other data or of another model: it is kept as {copy}')
