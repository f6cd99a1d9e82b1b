"""Stopping and saving by signals: real processes, real signals, and the rest of the run equal to the bit."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, Process, equal_states, files, metrics, run, run_ranks, start_ranks

import checkpoint

fcntl, termios = pytest.importorskip('fcntl'), pytest.importorskip('termios')
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='signals as POSIX has them')


def wait_until(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.written()
        time.sleep(0.005)


def has_iterations(out_dir, n):
    def condition():
        try:
            return len(metrics(out_dir, 'iter')) >= n
        except OSError:  # not there yet
            return False
    return condition


@pytest.fixture(scope='module')
def args(char_data):
    return [*TINY, f'--dataset={char_data}', '--max_iters=600', '--eval_interval=200', '--dropout=0.1', '--log_interval=1']


@pytest.fixture(scope='module')
def whole(args, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('whole')
    run('train.py', *args, f'--out_dir={out_dir}')
    return out_dir / 'ckpt.pt'


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_signal_ends_the_run_and_nothing_is_lost(args, whole, tmp_path, name):
    number = getattr(signal, name)
    process = Process('train.py', *args, '--out_dir=run', cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 5), process)
    process.send_signal(number)
    process.send_signal(number)  # as launchers do: this doesn't count
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not err, err
    stopped = re.fullmatch(rf'stopped by {name} after (\d+) iterations; saved run/ckpt_last.pt; to go on: python (.*)', out.splitlines()[-1])
    assert 5 <= int(stopped[1]) < 600 and len(metrics(tmp_path / 'run', 'iter')) == int(stopped[1])
    run(*stopped[2].replace(ROOT + os.sep, '').split(), cwd=tmp_path)  # the very command it names
    assert equal_states(tmp_path / 'run' / 'ckpt.pt', whole)


def test_an_evaluation_is_cut_off(args, tmp_path):
    process = Process('train.py', *args, '--max_iters=5', '--out_dir=run', cwd=tmp_path)
    assert process.wait() == 0
    process = Process('train.py', *args, '--max_iters=10', '--eval_iters=1000000', '--init_from=auto', '--out_dir=run', cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 10), process)  # the last one: an evaluation without end follows
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert checkpoint.load_newest(str(tmp_path / 'run'))[0]['iter_num'] == 10
    out = run('train.py', *args, '--max_iters=10', '--init_from=auto', f'--out_dir={tmp_path / "run"}').stdout  # which is made up for
    assert 'step 10: train loss' in out and files(tmp_path / 'run') == ['ckpt.pt', 'metrics.jsonl']
    assert 'is finished' in run('train.py', *args, '--max_iters=10', '--init_from=auto', f'--out_dir={tmp_path / "run"}').stdout


def test_a_second_signal_ends_it_at_once_even_while_it_waits_for_another_rank(args, tmp_path):
    waiting, hanging = start_ranks(2, 'train.py', *args, '--max_iters=1000000', '--out_dir=run', cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 5), waiting)
    hanging.send_signal(signal.SIGSTOP)
    waiting.send_signal(signal.SIGTERM)
    time.sleep(3.5)  # the stated 3 seconds
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=10) == 143
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()


def test_sigusr1_saves_and_goes_on(args, tmp_path):
    process = Process('train.py', *args, '--out_dir=run', cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 5), process)
    process.send_signal(signal.SIGUSR1)
    wait_until((tmp_path / 'run' / 'ckpt_last.pt').exists, process)
    saved = checkpoint.load(str(tmp_path / 'run' / 'ckpt_last.pt'))['iter_num']
    wait_until(has_iterations(tmp_path / 'run', saved + 5), process)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_closed_terminal_ends_it_like_a_signal(args, tmp_path):
    def at_a_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests under nohup would ignore

    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *args, '--out_dir=run'], cwd=tmp_path, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True, preexec_fn=at_a_terminal)
    os.close(theirs)
    seen = b''
    while b'iter 5:' not in seen:
        seen += os.read(ours, 10000)
    os.close(ours)  # from here on the process gets SIGHUP, and an error for every line it prints
    assert process.wait(timeout=60) == 129
    assert checkpoint.load(str(tmp_path / 'run' / 'ckpt_last.pt'))['iter_num'] == len(metrics(tmp_path / 'run', 'iter')) < 600


def test_all_ranks_stop_in_the_same_iteration(args, tmp_path):
    args = [*args, '--max_iters=300', '--out_dir=run']
    process = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', os.path.join(ROOT, 'train.py'), *args],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not has_iterations(tmp_path / 'run', 5)():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as f:
        ranks = f.read().split()
    os.kill(int(ranks[-1]), signal.SIGTERM)  # one of the two
    out, _ = process.communicate(timeout=120)
    stopped = re.search(r'stopped by SIGTERM after (\d+) iterations; saved run/ckpt_last.pt', out)
    assert process.returncode and len(metrics(tmp_path / 'run', 'iter')) == int(stopped[1]) < 300
    run_ranks(2, 'train.py', *args, '--init_from=auto', cwd=tmp_path)
    run_ranks(2, 'train.py', *args[:-1], '--out_dir=whole', cwd=tmp_path)
    assert equal_states(tmp_path / 'run' / 'ckpt.pt', tmp_path / 'whole' / 'ckpt.pt')
