"""Stopping and saving by signals: real processes, real signals, and the same bits at the end."""
import ast
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import (
    ROOT,
    TINY,
    Process,
    equal_states,
    has_iterations,
    list_files,
    metrics,
    run,
    run_ranks,
    start_ranks,
    wait_until,
)

from runtime import checkpoint

fcntl, termios = pytest.importorskip('fcntl'), pytest.importorskip('termios')
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='signals as POSIX has them')


@pytest.fixture(scope='module')
def args(char_data):
    return [*TINY, f'--dataset={char_data}', '--max_iters=600', '--eval_interval=200',
            '--dropout=0.1', '--log_interval=1']


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
    process.send_signal(number)  # as launchers do: it changes nothing
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not err, err
    stopped = re.fullmatch(rf'stopped by {name} after (\d+) iterations; '
                           r'saved run/ckpt_last.pt; to continue: python (.*)',
                           out.splitlines()[-1])
    assert 5 <= int(stopped[1]) < 600
    assert len(metrics(tmp_path / 'run', 'iter')) == int(stopped[1])
    command = stopped[2].replace(ROOT + os.sep, '').split()
    run(*command, cwd=tmp_path)
    assert equal_states(tmp_path / 'run' / 'ckpt.pt', whole)


def test_an_evaluation_is_cut_off(args, tmp_path):
    process = Process('train.py', *args, '--max_iters=5', '--out_dir=run', cwd=tmp_path)
    assert process.wait() == 0
    args = [*args, '--max_iters=10', '--init_from=auto', '--out_dir=run']
    process = Process('train.py', *args, '--eval_iters=1000000', cwd=tmp_path)
    # after the last iteration comes an evaluation that would take very long
    wait_until(has_iterations(tmp_path / 'run', 10), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert checkpoint.load_newest(str(tmp_path / 'run'))[0]['iter_num'] == 10
    out = run('train.py', *args, cwd=tmp_path).stdout  # now it is evaluated
    assert 'step 10: train loss' in out
    assert list_files(tmp_path / 'run') == ['ckpt.pt', 'metrics.jsonl']
    assert 'is finished' in run('train.py', *args, cwd=tmp_path).stdout


def test_a_second_signal_ends_at_once_a_rank_that_waits_for_another_one(args, tmp_path):
    waiting, hanging = start_ranks(2, 'train.py', *args, '--max_iters=1000000', '--out_dir=run',
                                   cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 5), waiting)
    hanging.send_signal(signal.SIGSTOP)
    waiting.send_signal(signal.SIGTERM)
    time.sleep(3.5)  # after 3 seconds, a second signal counts
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=10) == 143
    hanging.send_signal(signal.SIGKILL)
    hanging.wait()


def test_sigusr1_saves_and_the_run_continues(args, tmp_path):
    process = Process('train.py', *args, '--out_dir=run', cwd=tmp_path)
    wait_until(has_iterations(tmp_path / 'run', 5), process)
    process.send_signal(signal.SIGUSR1)
    wait_until((tmp_path / 'run' / 'ckpt_last.pt').exists, process)
    saved = checkpoint.load(str(tmp_path / 'run' / 'ckpt_last.pt'))['iter_num']
    wait_until(has_iterations(tmp_path / 'run', saved + 5), process)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_closed_terminal_ends_a_run_like_a_signal(args, tmp_path):
    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would ignore it

    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'train.py'), *args, '--out_dir=run'], cwd=tmp_path,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=take_terminal)
    os.close(theirs)
    seen = b''
    while b'iter 5:' not in seen:
        seen += os.read(ours, 10000)
    os.close(ours)  # now the process gets SIGHUP, and an error for every line that it prints
    assert process.wait(timeout=60) == 129
    iter_num = checkpoint.load(str(tmp_path / 'run' / 'ckpt_last.pt'))['iter_num']
    assert iter_num == len(metrics(tmp_path / 'run', 'iter')) < 600


def test_all_ranks_stop_in_the_same_iteration(args, tmp_path):
    args = [*args, '--max_iters=300', '--out_dir=run']
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         os.path.join(ROOT, 'train.py'), *args],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not has_iterations(tmp_path / 'run', 5)():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as f:
        ranks = f.read().split()
    os.kill(int(ranks[-1]), signal.SIGTERM)  # only this rank gets it
    out, _ = process.communicate(timeout=120)
    stopped = re.search(r'stopped by SIGTERM after (\d+) iterations; saved run/ckpt_last.pt', out)
    assert process.returncode
    assert len(metrics(tmp_path / 'run', 'iter')) == int(stopped[1]) < 300
    run_ranks(2, 'train.py', *args, '--init_from=auto', cwd=tmp_path)
    run_ranks(2, 'train.py', *args[:-1], '--out_dir=whole', cwd=tmp_path)
    assert equal_states(tmp_path / 'run' / 'ckpt.pt', tmp_path / 'whole' / 'ckpt.pt')


# -----------------------------------------------------------------------------
# runtime/signals.py without the rest
def test_signals_import_neither_torch_nor_distributed():
    with open(os.path.join(ROOT, 'runtime', 'signals.py'), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add('.' * node.level + (node.module or ''))
            imported.update(f'{node.module}.{alias.name}' for alias in node.names)
    assert 'signal' in imported
    assert not [name for name in imported if re.match(r'\.|runtime|torch|distributed', name)]


# a process that can't import torch. `earlier` counts what the handlers from before catch() get
WITHOUT_TORCH = '''
import os, signal, sys, time
sys.modules['torch'] = sys.modules['torch.distributed'] = None
from runtime import signals

earlier = []
STOPS = (signal.SIGTERM, signal.SIGINT)
for number in (*STOPS, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: earlier.append(number))
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does


def wait_for(wanted):
    end = time.monotonic() + 30
    seen = signals.read_requests()
    while seen != wanted and time.monotonic() < end:
        time.sleep(0.001)
        seen = signals.read_requests()
    assert seen == wanted, (seen, wanted)


assert signals.read_requests() == (0, False)
for stop in STOPS:  # a second catch() begins anew
    signals.catch()
    assert signals.read_requests() == (0, False)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_for((0, True))
    assert signals.read_requests() == (0, False)  # a request to save is reported once
    os.kill(os.getpid(), stop)
    wait_for((stop, False))
    assert signals.read_requests() == (stop, False)  # a request to stop stays
    os.kill(os.getpid(), stop)  # the same one again, at once
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_for((stop, True))
    assert not earlier, earlier
    signals.release()
    assert signal.set_wakeup_fd(-1) == -1
    for number in (*STOPS, signal.SIGUSR1):
        os.kill(os.getpid(), number)
        assert earlier.pop() == number
    assert signals.read_requests() == (stop, False)
    signals.release()  # the second time it does nothing
assert 'torch' not in [name for name, module in sys.modules.items() if module]
print('all of it works')
'''


def test_signals_work_in_a_process_without_torch_distributed():
    result = subprocess.run([sys.executable, '-c', WITHOUT_TORCH], cwd=ROOT, capture_output=True,
                            text=True, timeout=120)
    assert result.stdout == 'all of it works\n' and not result.stderr, result.stderr


FIRST = """
import os, signal
from runtime import signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
signals.catch()
def send(name):
    os.kill(os.getpid(), getattr(signal, name))
send(NAMES[0])
while not signals.read_requests()[0]:
    pass
for name in (*NAMES[1:], 'SIGUSR1'):
    send(name)
while not signals.read_requests()[1]:  # it comes last
    pass
assert signals.read_requests()[0] == getattr(signal, NAMES[0])
"""


@pytest.mark.parametrize('names', [('SIGTERM', 'SIGINT'), ('SIGHUP', 'SIGTERM'),
                                   ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGTERM')])
def test_the_first_of_several_signals_counts(names):
    subprocess.run([sys.executable, '-c', f'NAMES = {names}\n{FIRST}'], check=True, cwd=ROOT,
                   timeout=60)
