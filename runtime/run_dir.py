"""
The folder that a run writes to: its lock, metrics.jsonl, and checkpoints saved in the background.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import threading

import numpy as np
import torch

from runtime import checkpoint
from runtime.checkpoint import BEST, LAST
from runtime.console import ROOT, fail, get_first_line, say, warn

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder there
    fcntl = None

METRICS = 'metrics.jsonl'
PREVIOUS = 'previous'


class RunDir:
    """A run's folder, locked against other runs until it is closed or the process ends.

    A thread writes the checkpoints while training continues. A write that fails doesn't end the
    run: a warning is printed, the earlier files stay as they are, and the checkpoint is written
    again at the next save.
    """

    def __init__(self, path):
        """Locks the folder, if it exists; fails if another run has locked it."""
        self.path = path
        self.lock = None
        self.newest_name = None  # the name of the file that has, or will have, the newest state
        self.pending_states = {}  # {file name: state} not yet written
        self.saved_iters = {}  # {file name: iter_num}
        self.thread = None
        self.can_log = True
        if os.path.isdir(path):
            self.acquire_lock()

    def begin(self, is_new, **origin):
        """Makes the folder and logs what makes this run.

        Removes what a crash left unfinished. With is_new=True, moves an earlier run to previous/.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            self.acquire_lock()
            for name in (BEST, LAST):
                temp_path = os.path.join(self.path, name + '.tmp')
                if os.path.exists(temp_path):
                    os.remove(temp_path)
            if is_new and move_earlier_run(self.path):
                say(f'{self.path} already had a run: its checkpoints and metrics are now in '
                    f'{os.path.join(self.path, PREVIOUS)}')
            open(os.path.join(self.path, METRICS), 'a').close()
        except OSError as e:
            fail(f'{self.path!r} cannot be written to ({e.strerror})',
                 'name another folder with --out_dir')
        self.log(event='run', argv=sys.argv, python=platform.python_version(),
                 torch=torch.__version__, commit=read_commit(), **origin)

    def acquire_lock(self):
        if self.lock is not None or not fcntl:
            return
        # NFS locks only files that are open for writing, so a folder that can't be locked itself
        # gets a file for it
        for name, flags in (('.', os.O_RDONLY), ('.lock', os.O_RDWR | os.O_CREAT)):
            try:
                self.lock = os.open(os.path.join(self.path, name), flags)
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                fail(f'another run is writing to {self.path}',
                     'stop it first, or name another folder with --out_dir')
            except OSError as e:
                reason = e.strerror
        warn(f'{self.path} cannot be locked ({reason}), so nothing keeps a second run out of it')

    def log(self, **event):
        """Appends the event to metrics.jsonl, as one line of JSON."""
        line = json.dumps(event, default=float).encode() + b'\n'  # of tensors and numpy's numbers
        try:
            with open(os.path.join(self.path, METRICS), 'ab+') as f:
                if f.tell():
                    f.seek(-1, os.SEEK_END)
                    if f.read() != b'\n':  # a crash cut off the last line
                        f.write(b'\n')
                f.write(line)
            self.can_log = True
        except OSError as e:
            if self.can_log:  # one warning is enough
                warn(f'{METRICS} in {self.path} could not be written ({e.strerror}); '
                     'training continues')
            self.can_log = False

    def save(self, state, is_best, is_copy=True):
        """Has the thread write the state to ckpt.pt (is_best) or ckpt_last.pt.

        It waits for the previous save first. The state must not change any more. A state that
        isn't a copy will change, so save() then waits, and doesn't keep it for another try.
        """
        self.wait()
        state = copy_extras(state)
        self.newest_name = BEST if is_best else LAST
        if is_best:
            self.pending_states.pop(LAST, None)  # it is older
        self.pending_states[self.newest_name] = state
        self.thread = threading.Thread(target=self.write)
        self.thread.start()
        if not is_copy:
            self.wait()
            if self.newest_name in self.pending_states:
                self.pending_states[self.newest_name] = None

    def write(self):
        """Writes the states that are not yet written, the newest first. The thread runs it."""
        for name in sorted(self.pending_states, key=lambda name: name != self.newest_name):
            state = self.pending_states[name]
            if state is None:
                continue
            try:
                if not os.path.isdir(self.path):
                    warn(f'{self.path} has disappeared; creating it again')
                    os.makedirs(self.path)
                    self.lock = None
                    self.acquire_lock()
                checkpoint.save(state, self.path, is_best=name == BEST)
                self.saved_iters[name] = state['iter_num']
                if name == BEST and self.saved_iters.get(LAST, 0) <= state['iter_num']:
                    checkpoint.remove_last(self.path)
                del self.pending_states[name]
            except (OSError, RuntimeError, ValueError) as e:
                while e.__context__:  # torch's writer hides the system's error behind its own
                    e = e.__context__
                warn(f'{name} could not be saved in {self.path} ({get_first_line(e)}); '
                     'training continues, and the next save tries again')

    def wait(self):
        """Waits until the thread has written everything, or could not."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def close(self):
        """Waits for the last save and unlocks the folder.

        Returns the path of the newest checkpoint, or None if it could not be saved.
        """
        self.wait()
        if self.lock is not None:
            os.close(self.lock)
        if self.newest_name in self.pending_states:
            return None
        return os.path.join(self.path, self.newest_name)


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
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {copy_value(key): copy_value(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(copy_value(item) for item in value)
    return value


def move_earlier_run(out_dir):
    """Moves an earlier run's files to out_dir/previous; returns whether there were any.

    They replace what is in previous/. A run without a checkpoint is not worth that: its metrics
    stay, and the new ones are added to them. What a crash interrupts is completed at the next
    start.
    """
    previous_dir = os.path.join(out_dir, PREVIOUS)
    temp_dir = previous_dir + '.new'
    if not checkpoint.exists(out_dir) and not os.path.exists(temp_dir):
        return False
    os.makedirs(temp_dir, exist_ok=True)
    for name in (BEST, LAST, METRICS):
        if os.path.exists(os.path.join(out_dir, name)):
            os.replace(os.path.join(out_dir, name), os.path.join(temp_dir, name))
    shutil.rmtree(previous_dir, ignore_errors=True)
    os.replace(temp_dir, previous_dir)
    return True


def read_commit():
    """The git commit of this repository; '' if git or the repository isn't there."""
    command = ['git', '-C', ROOT, 'rev-parse', 'HEAD']
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ''
