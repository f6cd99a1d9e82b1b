"""Writes that fail: real full disks, read-only and vanished folders, limits on files, and two runs in one folder."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, Process, equal_states, files, metrics, run, run_here

import checkpoint
import checks
import distributed

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


def can_mount():
    return subprocess.run(['unshare', '--map-root-user', '--mount', 'true'], capture_output=True).returncode == 0 if shutil.which('unshare') else False


@pytest.mark.skipif(not can_mount(), reason='needs unshare, and user namespaces, to mount a small file system')
@pytest.mark.parametrize('mount, break_it, mend_it, said', [
    (TMPFS, 'cat /dev/zero > run/filler', 'rm run/filler', 'could not be saved in run (.Errno 28. No space left on device)'),
    (TMPFS, 'cat /dev/zero > run/filler', '', 'could not be saved in run (.Errno 28. No space left on device)'),
    (TMPFS, 'mount --bind run run; mount -o remount,bind,ro run', 'until umount run; do :; done',
     'could not be saved in run (.Errno 30. Read-only file system'),
    ('true', 'mv run gone', 'true', 'run is gone; making it again'),
], ids=['full and freed', 'full', 'read-only for a while', 'vanished'])
def test_a_run_goes_on_when_it_cannot_write(char_data, tmp_path, mount, break_it, mend_it, said):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--eval_interval=50', '--max_iters=1000000']
    shell = SHELL.format(mount=mount, break_it=break_it, mend_it=mend_it, said=said)
    subprocess.run(['unshare', '--map-root-user', '--mount', 'sh', '-c', shell, 'sh', sys.executable, os.path.join(ROOT, 'train.py'), *args],
                   cwd=tmp_path, capture_output=True, timeout=120)
    err = (tmp_path / 'said').read_text()
    assert (tmp_path / 'status').read_text() == '143\n' and 'Traceback' not in err, err
    kept = [name for name in os.listdir(tmp_path / 'kept') if name.startswith('ckpt')]
    assert not [name for name in kept if name.endswith('.tmp')]
    after = max(checkpoint.load(str(tmp_path / 'kept' / name))['iter_num'] for name in kept)
    if mend_it:
        assert after > metrics(tmp_path / 'kept', 'iter')[-1]['iter'] and 'error' not in err
    else:  # the earlier one is as it was, and nobody is told that all is well
        assert after == checkpoint.load(str(tmp_path / 'before.pt'))['iter_num']
        assert re.search(r'error: the state after \d+ iterations could not be saved in run', err.splitlines()[-1])


def test_a_limit_on_files_ends_in_status_1(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--max_iters=3']
    out = subprocess.run(['sh', '-c', 'ulimit -f 100; exec "$@"', 'sh', sys.executable, os.path.join(ROOT, 'train.py'), *args], cwd=tmp_path,
                         capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.splitlines() == [
        'warning: ckpt.pt could not be saved in run ([Errno 27] File too large); the run goes on, and tries again at the next save',
        'error: the state after 3 iterations could not be saved in run; what was saved before is still there']
    assert files(tmp_path / 'run') == ['metrics.jsonl'] and len(metrics(tmp_path / 'run', 'iter')) == 3


def state(iter_num, size=10):
    return dict(model={'w': torch.full((size,), float(iter_num))}, iter_num=iter_num)


def begun(path):
    run_dir = checkpoint.RunDir(str(path))
    run_dir.begin(fresh=False)
    return run_dir


def read(path):
    return torch.load(path, weights_only=True)['iter_num']


def test_what_could_not_be_saved_is_saved_with_the_next(tmp_path, capsys):
    run_dir = begun(tmp_path / 'run')
    run_dir.save(state(1), best=True)
    run_dir.wait()
    shutil.move(tmp_path / 'run', tmp_path / 'aside')
    (tmp_path / 'run').write_text('in the way')
    run_dir.save(state(2), best=True)
    run_dir.wait()
    assert 'ckpt.pt could not be saved' in capsys.readouterr().err
    (tmp_path / 'run').unlink()
    shutil.move(tmp_path / 'aside', tmp_path / 'run')
    run_dir.save(state(3), best=False)
    assert run_dir.close() == str(tmp_path / 'run' / 'ckpt_last.pt')
    assert read(tmp_path / 'run' / 'ckpt.pt') == 2 and read(tmp_path / 'run' / 'ckpt_last.pt') == 3


def test_a_newer_ckpt_removes_ckpt_last(tmp_path):
    run_dir = begun(tmp_path)
    for iter_num, best in ((1, True), (2, False), (3, True)):
        run_dir.save(state(iter_num), best)
    assert run_dir.close() == str(tmp_path / 'ckpt.pt') and files(tmp_path) == ['ckpt.pt', 'metrics.jsonl'] and read(tmp_path / 'ckpt.pt') == 3


def test_what_is_tried_again_does_not_cost_what_is_newer(tmp_path, monkeypatch):
    fails, really = set(), checkpoint.save

    def save(state, out_dir, best):
        if state['iter_num'] in fails:
            raise OSError(28, 'No space left on device')
        return really(state, out_dir, best)

    monkeypatch.setattr(checkpoint, 'save', save)
    run_dir = begun(tmp_path)
    for iter_num, best, failing in ((500, True, {}), (1000, True, {1000}), (1500, False, {1000}), (2000, False, {2000})):
        fails = set(failing)
        run_dir.save(state(iter_num), best)
        run_dir.wait()
    assert read(tmp_path / 'ckpt.pt') == 1000 and read(tmp_path / 'ckpt_last.pt') == 1500
    assert run_dir.close() is None


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    sync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda number: sync(number) if not os.path.isdir(f'/proc/self/fd/{number}') else os.close(-1))
    run_dir = begun(tmp_path)
    run_dir.save(state(1), best=True)
    assert run_dir.close() == str(tmp_path / 'ckpt.pt') and read(tmp_path / 'ckpt.pt') == 1


@pytest.mark.parametrize('moves', range(4))
def test_putting_aside_survives_a_crash(tmp_path, monkeypatch, moves):
    run_dir = begun(tmp_path)
    for iter_num, best in ((1, True), (2, False)):
        run_dir.save(state(iter_num), best)
    run_dir.close()
    move, count = os.replace, []

    def crash(a, b):
        if len(count) == moves:
            raise KeyboardInterrupt
        count.append(a)
        move(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', crash)
        checkpoint.put_aside(str(tmp_path))
    assert checkpoint.put_aside(str(tmp_path)) and files(tmp_path) == ['previous']
    assert read(tmp_path / 'previous' / 'ckpt.pt') == 1 and read(tmp_path / 'previous' / 'ckpt_last.pt') == 2


def test_a_save_is_a_copy_of_the_moment_and_tied_tensors_stay_one(tmp_path):
    run_dir = begun(tmp_path)
    w = torch.ones(3_000_000)
    run_dir.save(distributed.gather(dict(model={'a': w, 'b': w}, optimizer={'state': {0: {'step': torch.tensor(1.0)}}}, iter_num=1)), best=True)
    w.zero_()  # the training goes on while it is written
    run_dir.close()
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    assert saved['a'].min() == 1 and saved['a'].data_ptr() == saved['b'].data_ptr()
    assert os.path.getsize(tmp_path / 'ckpt.pt') < 4 * 3_000_000 + 10_000


def test_half_written_files_are_cleared_away(char_data, tmp_path):
    for name in ('ckpt.pt.tmp', 'ckpt_last.pt.tmp'):
        (tmp_path / name).write_bytes(b'half')
    run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=1')
    assert files(tmp_path) == ['ckpt.pt', 'metrics.jsonl']


@pytest.mark.skipif(os.name != 'posix', reason='flock')
def test_one_folder_takes_one_run(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "run"}', '--eval_interval=1000000', '--max_iters=1000000']
    first = Process('train.py', *args)
    while not (tmp_path / 'run' / 'metrics.jsonl').exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = run('train.py', *args, ok=False)
    assert f'another run is writing to {tmp_path / "run"}' in second.stderr
    assert len(metrics(tmp_path / 'run', 'run')) == 1 and files(tmp_path / 'run') == ['metrics.jsonl']
    first.send_signal(signal.SIGKILL)  # the refusal ends with the process, however it ends
    first.wait()
    assert 'iter 0: loss' in run('train.py', *args, '--max_iters=1').stdout


def test_the_folder_is_held_before_it_is_read(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "run"}', '--max_iters=1000000', '--eval_interval=50', '--init_from=auto']
    first = Process('train.py', *args)
    while not (tmp_path / 'run' / 'ckpt.pt').exists():
        assert first.poll() is None
        time.sleep(0.01)
    (tmp_path / 'run' / 'ckpt.pt').rename(tmp_path / 'aside.pt')  # what a reader would stumble over
    out = run('train.py', *args, ok=False)
    assert 'another run is writing to' in out.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()


def test_a_terminal_that_is_gone_does_not_end_a_run(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "run"}', '--max_iters=30']
    with open('/dev/full', 'w') as full:  # every write fails: no space left on device
        process = subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), *args], stdout=full, stderr=subprocess.PIPE, text=True)
    assert checkpoint.load(str(tmp_path / 'run' / 'ckpt.pt'))['iter_num'] == 30 and 'Traceback' not in process.stderr, process.stderr
    assert process.returncode in (0, 120)  # Python's own word for an output that could not be written


def test_out_of_memory_names_pairs_that_keep_the_batch(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--max_iters=1', '--batch_size=12288', '--block_size=256', '--n_embd=1024']
    out = subprocess.run(['sh', '-c', 'ulimit -v 8000000; exec "$@"', 'sh', sys.executable, os.path.join(ROOT, 'train.py'), *args], cwd=tmp_path,
                         capture_output=True, text=True)
    last = out.stderr.splitlines()[-1]
    assert out.returncode == 1 and 'Traceback' not in out.stderr, out.stderr
    assert re.match(r'error: out of memory on cpu: [\d.]+ GiB asked for, [\d.]+ GiB free; the same 6,291,456 tokens/iter with '
                    r'--batch_size=6144 --gradient_accumulation_steps=4 or --batch_size=4096 --gradient_accumulation_steps=6$', last), last


def test_a_run_that_may_not_fit_is_warned_of(char_data, tmp_path, capsys):
    checks.plan_memory(2 ** 50, 2 ** 50, there=2 ** 50, device='cpu', ranks=1)
    assert 'that may not fit' in capsys.readouterr().err
    checks.plan_memory(2 ** 50, 2 ** 20, there=2 ** 50, device='cpu', ranks=1)
    assert not capsys.readouterr().err


def test_slow_saves_are_warned_of_under_torchrun(tmp_path, monkeypatch, capsys):
    run_dir = begun(tmp_path)
    run_dir.warn_of_slow_saves(2 ** 60)  # nobody waits for us
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    run_dir.warn_of_slow_saves(2 ** 20)
    assert not capsys.readouterr().err
    run_dir.warn_of_slow_saves(2 ** 60)
    assert re.search(r'a save writes 1073741824.0 GiB, in about \d+ s here, but torchrun kills 30 s after SIGTERM', capsys.readouterr().err)
    assert files(tmp_path) == ['metrics.jsonl']


def test_without_room_for_a_copy(char_data, tmp_path, monkeypatch):
    args = [*TINY, f'--dataset={char_data}', '--eval_interval=3', '--max_iters=8']
    run_here('train.py', *args, f'--out_dir={tmp_path / "copied"}')
    monkeypatch.setattr(checks, 'free_memory', lambda device: 1000)
    assert 'may not fit' in run_here('train.py', *args, f'--out_dir={tmp_path / "as it is"}').stderr
    assert equal_states(tmp_path / 'copied' / 'ckpt.pt', tmp_path / 'as it is' / 'ckpt.pt')


def test_what_was_not_copied_is_not_tried_again(tmp_path, capsys):
    state = dict(model={}, iter_num=1, live=torch.zeros(3))
    run_dir = checkpoint.RunDir(str(tmp_path / 'run'))
    run_dir.begin(fresh=True)
    blocked = tmp_path / 'run' / 'ckpt.pt.tmp'
    blocked.mkdir()  # where the file would be
    run_dir.save(state, best=True, copied=False)
    assert 'could not be saved' in capsys.readouterr().err
    blocked.rmdir()
    state['live'] += 1  # the training goes on
    run_dir.save(dict(state, iter_num=2), best=False)
    run_dir.wait()
    assert files(tmp_path / 'run') == ['ckpt_last.pt', 'metrics.jsonl']  # not the later weights as the first iteration's
    assert run_dir.close() == str(tmp_path / 'run' / 'ckpt_last.pt')
