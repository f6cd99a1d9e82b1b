"""
The folder that a run writes to: its lock, metrics.jsonl, and checkpoints saved in the background.
"""
import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
import threading

import torch

from runtime import checkpoint, previous_runs, provenance
from runtime.console import ROOT, fail, get_first_line, say, warn
from runtime.files import check_file, is_file
from runtime.previous_runs import BEST, LAST, METRICS

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder there
    fcntl = None

_runs = {}  # {thread: its last run}


class RunDir:
    """A run's folder, locked against other runs until it is closed or the process ends.

    The run stays in the folder that it locked, also if somebody renames that. A thread writes the
    checkpoints while training continues. A write that fails doesn't end the run: a warning is
    printed, the earlier files stay as they are, and the checkpoint is written again at the next
    save.
    """

    def __init__(self, path):
        """Locks the folder, if it exists; fails if another run has locked it."""
        self.path = path
        self.start_folder = os.getcwd()  # it may be removed, too
        self.folder = None  # a descriptor of the folder, which has the lock, or
        self.lock = None  # of a file in it
        self.newest_name = None  # the name of the file that has, or will have, the newest state
        self.pending_states = {}  # {file name: state} not yet written
        self.saved_iters = {}  # {file name: iter_num}
        self.has_kept_best = False  # ckpt.pt, if it was another run's
        self.thread = None
        self.move_lock = threading.Lock()  # this thread and that one look where the folder is
        self.can_log = True
        if not path:
            fail('out_dir is empty', 'name a folder with --out_dir')
        if os.path.lexists(path) and not os.path.isdir(path):
            fail(f'{path} is not a folder, and a run saves in a folder', 'name one with --out_dir')
        for thread in list(_runs):
            # an error ended a run in a notebook or in a thread, and its script runs again
            if thread is threading.current_thread() or not thread.is_alive():
                _runs.pop(thread).close()
        _runs[threading.current_thread()] = self
        try:
            if os.path.isdir(path):
                self.acquire_lock()
        except OSError as e:
            fail(f'{path} cannot be used: {e.strerror}', 'name another folder with --out_dir')

    def begin(self, is_new, **origin):
        """Makes the folder and logs what makes this run.

        Removes what a crash left unfinished. With is_new=True, moves an earlier run out of the way.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            self.acquire_lock()
            is_file(os.path.join(self.path, METRICS))  # fails if it is something else
            for name in (BEST, LAST):
                temp_path = os.path.join(self.path, name + '.tmp')
                if os.path.lexists(temp_path):
                    os.remove(temp_path)
            if is_new:
                previous_runs.move_run(self.path)
            open(os.path.join(self.path, METRICS), 'a').close()
        except OSError as e:
            fail(f'{self.path!r} cannot be written to ({e.strerror})',
                 'name another folder with --out_dir')
        self.log(event='run', argv=sys.argv, python=platform.python_version(),
                 torch=torch.__version__, commit=read_commit(), **origin)

    def acquire_lock(self):
        """Locks the folder; OSError if another run has locked it."""
        if self.folder is not None or not fcntl:
            return
        self.folder = os.open(self.path, os.O_RDONLY)
        try:
            reason = try_to_lock(self.folder)
            if reason:  # NFS locks only files that are open for writing
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                self.lock = os.open(os.path.join(self.path, '.lock'), flags)
                reason = try_to_lock(self.lock)
        except OSError as e:
            reason = e.strerror
            if e.errno == errno.EBUSY:
                self.release_lock()
                raise
        if reason:
            warn(f'{self.path} cannot be locked ({reason}), so nothing keeps a second run out of '
                 'it')

    def release_lock(self):
        """Unlocks the folder."""
        for descriptor in (self.lock, self.folder):
            if descriptor is not None:
                os.close(descriptor)
        self.folder, self.lock = None, None

    def follow(self):
        """Sets path to where the folder is now. If it was removed, makes and locks it again.

        OSError if that is impossible: another run may have a folder of that name.
        """
        with self.move_lock:
            if not fcntl:
                os.makedirs(self.path, exist_ok=True)
                return
            if self.folder is not None and is_same_folder(self.folder, self.path):
                return
            new_path = find_path(self.folder)
            if new_path and is_same_folder(self.folder, new_path):
                warn(f'{self.path} is now {new_path}, and the run continues there')
                self.path = new_path
                return
            self.release_lock()
            self.path = os.path.join(self.start_folder, self.path)
            if previous_runs.exists(self.path):
                raise OSError(errno.EEXIST, 'another run has a checkpoint there', self.path)
            os.makedirs(self.path, exist_ok=True)
            self.acquire_lock()
            warn(f'{self.path} was removed, so it was made again')

    def log(self, **event):
        """Appends the event to metrics.jsonl, as one line of JSON."""
        line = json.dumps(event, default=float).encode() + b'\n'  # of tensors and numpy's numbers
        try:
            self.follow()
            path = os.path.join(self.path, METRICS)
            if os.path.lexists(path):
                check_file(path)  # a pipe would block
            with open(path, 'ab+') as f:
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
        say(f'saving checkpoint to {self.path}')
        state = checkpoint.copy_extras(state)
        self.newest_name = BEST if is_best else LAST
        if is_best:
            self.pending_states.pop(LAST, None)  # it is older
        self.pending_states[self.newest_name] = state
        self.thread = threading.Thread(target=self.write)
        try:
            self.thread.start()
        except RuntimeError:  # the program ends, and there are no new threads
            self.thread = None
            self.write()
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
                self.follow()
                if name == BEST and not self.has_kept_best:
                    self.keep_best_of_another_run(state)
                    self.has_kept_best = True
                checkpoint.save(state, self.path, is_best=name == BEST)
                self.saved_iters[name] = state['iter_num']
                if name == BEST and self.saved_iters.get(LAST, 0) <= state['iter_num']:
                    self.follow()  # only the run's own file may be removed
                    checkpoint.remove_last(self.path)
                del self.pending_states[name]
            except Exception as e:  # somebody may have put anything into it
                while e.__context__:  # torch's writer hides the system's error behind its own
                    e = e.__context__
                warn(f'{name} could not be saved in {self.path} ({get_first_line(e)}); '
                     'training continues, and the next save tries again')

    def keep_best_of_another_run(self, state):
        """Keeps the folder's ckpt.pt, too, if it is of another val split or of another model."""
        values = previous_runs.read_values(os.path.join(self.path, BEST))
        if values and 'data' in state:
            try:
                is_same = provenance.compare_data(values, state['config'], state['data'])[1]
                is_same &= is_same_model(values['model_args'], state['model_args'])
            except Exception:  # the file may have anything in it
                is_same = False
            if not is_same:
                previous_runs.keep_best(self.path)

    def wait(self):
        """Waits until the thread has written everything, or could not."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def close(self, iter_num=None):
        """Waits for the last save and unlocks the folder.

        Returns the path of the newest checkpoint, or None if it could not be saved or isn't that
        of iter_num.
        """
        self.wait()
        self.release_lock()
        is_older = iter_num is not None and self.saved_iters.get(self.newest_name) != iter_num
        if is_older or self.newest_name in (None, *self.pending_states):
            return None
        return os.path.join(self.path, self.newest_name)


def is_same_model(args, other_args):
    """Whether the model_args of two checkpoints are of models with the same weights."""
    names = args.keys() & other_args.keys() - {'dropout'}
    return all(args[name] == other_args[name] for name in names)


def try_to_lock(descriptor):
    """Locks what is open there; returns why it can't be locked. OSError if another run has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        pid = find_lock_owner(descriptor)
        owner = f' (process {pid})' if pid else ''
        raise OSError(errno.EBUSY, f'another run{owner} is writing to it') from e
    except OSError as e:
        return e.strerror


def find_lock_owner(descriptor):
    """The number of the process that has locked what is open there; None where that isn't known.

    The processes of torchrun continue if it is killed.
    """
    status = os.fstat(descriptor)
    place = f'{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}'
    with contextlib.suppress(OSError):  # only Linux has it
        with open('/proc/locks') as f:
            for words in map(str.split, f):
                if place in words and 'FLOCK' in words:
                    return words[words.index(place) - 1]


def is_same_folder(descriptor, path):
    """Whether path is the folder that is open there."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def find_path(descriptor):
    """The present path of the folder that is open there; None if the system doesn't tell it."""
    if descriptor is None:
        return None
    if hasattr(fcntl, 'F_GETPATH'):  # a Mac
        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b'\0').decode()
    try:
        return os.readlink(f'/proc/self/fd/{descriptor}')
    except OSError:
        return None


def read_commit():
    """The git commit of this repository; '' if git or the repository isn't there."""
    command = ['git', '-C', ROOT, 'rev-parse', '--show-toplevel', 'HEAD']
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return ''
    is_ours = len(lines) == 2 and os.path.realpath(lines[0]) == os.path.realpath(ROOT)
    return lines[1] if is_ours else ''  # a copy of this folder may lie in another repository
