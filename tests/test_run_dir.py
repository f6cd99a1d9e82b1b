"""A run's folder: writes that fail, on really full disks, in read-only and disappeared folders and
under limits on files; two runs in one folder; folders that are renamed."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Process,
    equal_states,
    has_iterations,
    list_files,
    metrics,
    run,
    run_here,
    wait_until,
)

from runtime import checkpoint, distributed, memory
from runtime.run_dir import RunDir, find_lock_owner


def make_state(iter_num, size=10):
    return dict(model={'w': torch.full((size,), float(iter_num))}, iter_num=iter_num)


def make_folder(path):
    path.mkdir()
    return str(path)


def start_run(path):
    run_dir = RunDir(str(path))
    run_dir.begin(is_new=False)
    return run_dir


def read_iter_num(path):
    return torch.load(path, weights_only=True)['iter_num']


def test_what_could_not_be_saved_is_saved_with_the_next(tmp_path, capsys):
    folder = tmp_path / 'run'
    run_dir = start_run(folder)
    run_dir.save(make_state(1), is_best=True)
    run_dir.wait()
    (folder / 'ckpt.pt.tmp').mkdir()  # the file would be here
    run_dir.save(make_state(2), is_best=True)
    run_dir.wait()
    assert 'ckpt.pt could not be saved' in capsys.readouterr().err
    (folder / 'ckpt.pt.tmp').rmdir()
    run_dir.save(make_state(3), is_best=False)
    assert run_dir.close() == str(folder / 'ckpt_last.pt')
    assert read_iter_num(folder / 'ckpt.pt') == 2
    assert read_iter_num(folder / 'ckpt_last.pt') == 3


def test_a_newer_ckpt_removes_ckpt_last(tmp_path):
    run_dir = start_run(tmp_path)
    for iter_num, is_best in ((1, True), (2, False), (3, True)):
        run_dir.save(make_state(iter_num), is_best)
    assert run_dir.close() == str(tmp_path / 'ckpt.pt')
    assert list_files(tmp_path) == ['ckpt.pt', 'metrics.jsonl']
    assert read_iter_num(tmp_path / 'ckpt.pt') == 3


def test_a_second_try_does_not_remove_what_is_newer(tmp_path, monkeypatch):
    failing, save = set(), checkpoint.save

    def try_to_save(state, out_dir, is_best):
        if state['iter_num'] in failing:
            raise OSError(28, 'No space left on device')
        return save(state, out_dir, is_best)

    monkeypatch.setattr(checkpoint, 'save', try_to_save)
    run_dir = start_run(tmp_path)
    for iter_num, is_best, failing in ((500, True, {}), (1000, True, {1000}), (1500, False, {1000}),
                                       (2000, False, {2000})):
        run_dir.save(make_state(iter_num), is_best)
        run_dir.wait()
    assert read_iter_num(tmp_path / 'ckpt.pt') == 1000
    assert read_iter_num(tmp_path / 'ckpt_last.pt') == 1500
    assert run_dir.close() is None


def test_what_was_not_copied_is_not_tried_again(tmp_path, capsys):
    state = dict(model={}, iter_num=1, live=torch.zeros(3))
    run_dir = RunDir(str(tmp_path / 'run'))
    run_dir.begin(is_new=True)
    blocked = tmp_path / 'run' / 'ckpt.pt.tmp'
    blocked.mkdir()  # the file would be here
    run_dir.save(state, is_best=True, is_copy=False)
    assert 'could not be saved' in capsys.readouterr().err
    blocked.rmdir()
    state['live'] += 1  # training continues
    run_dir.save(dict(state, iter_num=2), is_best=False)
    run_dir.wait()
    # ckpt.pt would have later weights than its iter_num says
    assert list_files(tmp_path / 'run') == ['ckpt_last.pt', 'metrics.jsonl']
    assert run_dir.close() == str(tmp_path / 'run' / 'ckpt_last.pt')


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    sync = os.fsync

    def sync_files(number):
        if os.path.isdir(f'/proc/self/fd/{number}'):
            os.close(-1)  # an OSError
        sync(number)

    monkeypatch.setattr(os, 'fsync', sync_files)
    run_dir = start_run(tmp_path)
    run_dir.save(make_state(1), is_best=True)
    assert run_dir.close() == str(tmp_path / 'ckpt.pt')
    assert read_iter_num(tmp_path / 'ckpt.pt') == 1


def test_a_save_is_a_copy_of_the_moment_and_tied_tensors_stay_one(tmp_path):
    run_dir = start_run(tmp_path)
    w = torch.ones(3_000_000)
    optimizer = {'state': {0: {'step': torch.tensor(1.0)}}}
    state = dict(model={'a': w, 'b': w}, optimizer=optimizer, iter_num=1)
    run_dir.save(distributed.gather(state), is_best=True)
    w.zero_()  # training continues while the state is written
    run_dir.close()
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    assert saved['a'].min() == 1 and saved['a'].data_ptr() == saved['b'].data_ptr()
    assert os.path.getsize(tmp_path / 'ckpt.pt') < 4 * 3_000_000 + 10_000


# -----------------------------------------------------------------------------
# training runs that cannot write

# trains in a file system of its own, `run`, with room for two checkpoints of 350 kB
SHELL = '''
mkdir run && {mount} && ("$@" 2> said & echo $! > pid; wait $!; echo $? > status) &
until [ -s run/ckpt.pt ]; do sleep 0.02; [ ! -s status ] || exit 1; done
{break_it} 2>> noise
until grep -q "{said}" said; do sleep 0.02; [ ! -s status ] || exit 1; done
cp run/ckpt.pt before.pt
{mend_it}
kill -TERM $(cat pid); wait
cp -r run kept
'''
TMPFS = 'mount -t tmpfs -o size=900k none run'
FILL = 'cat /dev/zero > run/filler'
NO_SPACE = 'could not be saved in run (.Errno 28. No space left on device)'
READ_ONLY = 'could not be saved in run (.Errno 30. Read-only file system'


def can_mount():
    if not shutil.which('unshare'):
        return False
    command = ['unshare', '--map-root-user', '--mount', 'true']
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(),
                    reason='needs unshare and user namespaces to mount a small file system')
@pytest.mark.parametrize('mount, break_it, mend_it, said', [
    (TMPFS, FILL, 'rm run/filler', NO_SPACE),
    (TMPFS, FILL, '', NO_SPACE),
    (TMPFS, 'mount --bind run run; mount -o remount,bind,ro run',
     'until umount run; do :; done', READ_ONLY),
    ('true', 'while ! rm -r run; do :; done', 'true', 'run was removed, so it was made again'),
], ids=['full and freed', 'full', 'read-only for a while', 'disappeared'])
def test_a_run_continues_when_it_cannot_write(char_data, tmp_path, mount, break_it, mend_it, said):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--eval_interval=50',
            '--max_iters=1000000']
    shell = SHELL.format(mount=mount, break_it=break_it, mend_it=mend_it, said=said)
    subprocess.run(['unshare', '--map-root-user', '--mount', 'sh', '-c', shell, 'sh',
                    sys.executable, os.path.join(ROOT, 'train.py'), *args],
                   cwd=tmp_path, capture_output=True, timeout=120)
    err = (tmp_path / 'said').read_text()
    assert (tmp_path / 'status').read_text() == '143\n' and 'Traceback' not in err, err
    kept = [name for name in os.listdir(tmp_path / 'kept') if name.startswith('ckpt')]
    assert not [name for name in kept if name.endswith('.tmp')]
    states = [checkpoint.load(str(tmp_path / 'kept' / name)) for name in kept]
    newest = max(state['iter_num'] for state in states)
    if mend_it:
        assert newest > metrics(tmp_path / 'kept', 'iter')[-1]['iter'] and 'error' not in err
    else:  # the earlier one is as it was, and the last line doesn't say that all is well
        assert newest == checkpoint.load(str(tmp_path / 'before.pt'))['iter_num']
        assert re.search(r'error: the state after \d+ iterations could not be saved in run',
                         err.splitlines()[-1])


def test_a_limit_on_files_ends_in_status_1(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--max_iters=3']
    # files of at most 205 kB: loss.png is smaller, ckpt.pt is not
    out = subprocess.run(['sh', '-c', 'ulimit -f 400; exec "$@"', 'sh', sys.executable,
                          os.path.join(ROOT, 'train.py'), *args],
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.splitlines() == [
        'warning: ckpt.pt could not be saved in run ([Errno 27] File too large); '
        'training continues, and the next save tries again',
        'error: the state after 3 iterations could not be saved in run; nothing has been saved']
    assert list_files(tmp_path / 'run') == ['metrics.jsonl']
    assert len(metrics(tmp_path / 'run', 'iter')) == 3


def test_half_written_files_are_removed(char_data, tmp_path):
    for name in ('ckpt.pt.tmp', 'ckpt_last.pt.tmp'):
        (tmp_path / name).write_bytes(b'half')
    run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=1')
    assert list_files(tmp_path) == ['ckpt.pt', 'metrics.jsonl']


@contextlib.contextmanager
def running(name, *args, folder):
    """A training run that has written the file of this name; the run is killed at the end."""
    process = Process('train.py', *args)
    try:
        while not (folder / name).exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(os.name != 'posix', reason='flock')
def test_one_folder_takes_one_run(char_data, tmp_path):
    folder = tmp_path / 'run'
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={folder}', '--eval_interval=1000000',
            '--max_iters=1000000']
    with running('metrics.jsonl', *args, folder=folder):
        second = run('train.py', *args, ok=False)
        assert 'cannot be used: another run (process ' in second.stderr
        assert len(metrics(folder, 'run')) == 1 and list_files(folder) == ['metrics.jsonl']
    # the lock ends with the process, however it ends
    assert 'iter 0: loss' in run('train.py', *args, '--max_iters=1').stdout


def test_the_folder_is_locked_before_it_is_read(char_data, tmp_path):
    folder = tmp_path / 'run'
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={folder}', '--max_iters=1000000',
            '--eval_interval=1000000', '--init_from=auto']
    with running('metrics.jsonl', *args, folder=folder):
        (folder / 'ckpt.pt').write_bytes(b'half written')  # a reader would report this
        out = run('train.py', *args, ok=False)
        assert 'cannot be used: another run (process ' in out.stderr


def test_the_owner_of_a_lock_is_named(char_data, tmp_path):
    folder = tmp_path / 'run'
    process = Process('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={folder}',
                      '--max_iters=1000000', '--eval_interval=1000000')
    wait_until((folder / 'metrics.jsonl').exists, process)
    with pytest.raises(SystemExit):
        RunDir(str(folder))
    pid = find_lock_owner(os.open(folder, os.O_RDONLY))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pid == str(process.pid)
    assert find_lock_owner(os.open(folder, os.O_RDONLY)) is None


def test_a_notebook_can_run_the_script_again_after_an_error(tmp_path):
    folder = tmp_path / 'run'
    run_dir = start_run(folder)  # the error leaves it open
    run_dir.save(make_state(1), is_best=True)
    again = start_run(folder)
    again.save(make_state(2), is_best=True)
    assert again.close() == str(folder / 'ckpt.pt') and read_iter_num(folder / 'ckpt.pt') == 2
    errors = []

    def run_elsewhere():
        try:
            start_run(folder)
        except SystemExit as e:
            errors.append(e)

    third = start_run(folder)
    thread = threading.Thread(target=run_elsewhere)  # this one runs at the same time
    thread.start()
    thread.join()
    assert len(errors) == 1
    third.close()


# -----------------------------------------------------------------------------
# the folder that was locked is the folder that is written
def test_a_run_follows_its_folder(tmp_path, capsys):
    folder, aside = tmp_path / 'run', tmp_path / 'aside'
    run_dir = start_run(folder)
    run_dir.save(make_state(1), is_best=True)
    run_dir.wait()
    folder.rename(aside)
    other = start_elsewhere(folder)
    other.save(make_state(100), is_best=True)
    other.wait()
    run_dir.log(event='iter', iter=1)
    run_dir.save(make_state(2), is_best=True)
    assert run_dir.close(2) == str(aside / 'ckpt.pt') and read_iter_num(aside / 'ckpt.pt') == 2
    assert read_iter_num(folder / 'ckpt.pt') == 100
    assert len(metrics(aside, 'iter')) == 1 and not metrics(folder, 'iter')
    assert f'{folder} is now {aside}' in capsys.readouterr().err
    other.close()


def test_a_folder_that_is_renamed_within_a_save(tmp_path, monkeypatch):
    folder, aside = tmp_path / 'run', tmp_path / 'aside'
    run_dir = start_run(folder)
    save = checkpoint.save

    def save_and_rename(*args, **options):
        save(*args, **options)
        folder.rename(aside)
        other = start_elsewhere(folder)
        other.save(make_state(100), is_best=False)
        other.wait()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'save', lambda *args, **options: (
            patch.setattr(checkpoint, 'save', save) or save_and_rename(*args, **options)))
        run_dir.save(make_state(1), is_best=True)
        run_dir.wait()
    assert list_files(aside) == ['ckpt.pt', 'metrics.jsonl']
    assert read_iter_num(folder / 'ckpt_last.pt') == 100  # the other run's
    run_dir.close()


def start_elsewhere(folder):
    """A run of another thread."""
    runs = []
    thread = threading.Thread(target=lambda: runs.append(start_run(folder)))
    thread.start()
    thread.join()
    return runs[0]


def test_a_folder_that_is_renamed_twice_and_back(tmp_path):
    folder = tmp_path / 'run'
    run_dir = start_run(folder)
    for number, name in enumerate(('a', 'b', 'run')):
        os.rename(run_dir.path, tmp_path / name)
        run_dir.save(make_state(number), is_best=True)
        run_dir.wait()
        assert read_iter_num(tmp_path / name / 'ckpt.pt') == number
    assert run_dir.close() == str(folder / 'ckpt.pt')


def test_a_folder_that_is_removed_together_with_the_current_one(tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    run_dir = start_run('run')
    shutil.rmtree(tmp_path / 'here')
    run_dir.save(make_state(3), is_best=True)
    path = tmp_path / 'here' / 'run' / 'ckpt.pt'
    assert run_dir.close(3) == str(path) and read_iter_num(path) == 3
    monkeypatch.chdir(tmp_path)


def test_the_last_message_names_the_folder_that_was_renamed(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--eval_interval=1000000']
    process = Process('train.py', *args, '--max_iters=3000', cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 1), process)
    os.rename(tmp_path / 'run', tmp_path / 'aside')
    checkpoint.save(make_state(5), make_folder(tmp_path / 'run'))
    out, _ = process.communicate()
    line = out.splitlines()[-1]
    assert f'saved {tmp_path}/aside/ckpt.pt after 3000 iterations; sample from it' in line
    assert f'--out_dir={tmp_path}/aside' in line


@pytest.mark.parametrize('is_running', [True, False])
def test_a_removed_folder_that_another_run_has_taken_is_left_alone(tmp_path, capsys, is_running):
    folder = tmp_path / 'run'
    run_dir = start_run(folder)
    shutil.rmtree(folder)
    other = start_elsewhere(folder)
    other.save(make_state(100), is_best=True)
    other.wait()
    if not is_running:
        other.close()
    for iter_num in (2, 3, 4):
        run_dir.save(make_state(iter_num), is_best=True)
        run_dir.log(event='iter', iter=iter_num)
        run_dir.wait()
        assert 'ckpt.pt could not be saved' in capsys.readouterr().err
        assert read_iter_num(folder / 'ckpt.pt') == 100 and not metrics(folder, 'iter')
    other.close()
    shutil.rmtree(folder)  # now it is free
    run_dir.save(make_state(3), is_best=True)
    assert run_dir.close(3) == str(folder / 'ckpt.pt') and read_iter_num(folder / 'ckpt.pt') == 3


# -----------------------------------------------------------------------------
# what is saved, and what is said
@pytest.mark.parametrize('value', [lambda: 1, np.array(['a']), threading.Lock(), 1 << 3000,
                                   {(1, (2, (3, (4,)))): 0}, sys.stdout])
def test_what_cannot_be_saved_is_left_out(tmp_path, capsys, value):
    run_dir = start_run(tmp_path)
    run_dir.save({**make_state(1), 'mine': value, 'other': 5}, is_best=True)
    assert run_dir.close(1) == str(tmp_path / 'ckpt.pt')
    assert read_iter_num(tmp_path / 'ckpt.pt') == 1
    assert 'mine, other cannot be saved in a checkpoint' in capsys.readouterr().err


def test_a_closed_terminal_does_not_end_a_run(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "run"}', '--max_iters=30']
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *args]
    with open('/dev/full', 'w') as full:  # every write fails: no space left on device
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert checkpoint.load(str(tmp_path / 'run' / 'ckpt.pt'))['iter_num'] == 30
    assert 'Traceback' not in process.stderr, process.stderr
    assert process.returncode in (0, 120)  # 120 is Python's own, for output it could not write


def test_without_room_for_a_copy(char_data, tmp_path, monkeypatch):
    args = [*TINY, f'--dataset={char_data}', '--eval_interval=3', '--max_iters=8']
    copy_dir, direct_dir = tmp_path / 'copied', tmp_path / 'direct'
    copies, save = [], RunDir.save
    monkeypatch.setattr(RunDir, 'save', lambda self, state, is_best, is_copy: (
        copies.append(is_copy) or save(self, state, is_best, is_copy)))
    run_here('train.py', *args, f'--out_dir={copy_dir}')
    monkeypatch.setattr(memory, 'read_free_memory', lambda device: 1000)
    assert copies == [True] * 3  # after 3, 6 and 8 iterations
    assert 'may not fit' in run_here('train.py', *args, f'--out_dir={direct_dir}').stderr
    assert copies == [True] * 3 + [False] * 3
    assert equal_states(copy_dir / 'ckpt.pt', direct_dir / 'ckpt.pt')
