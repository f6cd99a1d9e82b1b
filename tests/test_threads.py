"""How torch's threads wait, and what is said on a machine that is busy with something else."""
import ast
import contextlib
import itertools
import json
import os
import platform
import re
import select
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY, Process, run
from test_bench import SMALL

from runtime import checkpoint, threads, timing

needs_schedstat = pytest.mark.skipif(not os.path.exists('/proc/self/schedstat'),
                                     reason='only Linux tells how long threads waited')


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py'])
def test_the_setting_comes_before_torch(script):
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        code = f.read()
    kinds = (ast.Import, ast.ImportFrom)
    names = [ast.unparse(node) for node in ast.parse(code).body if isinstance(node, kinds)]
    position = names.index('from runtime import threads')
    program = '\n'.join([*names[:position + 1], 'import sys', 'print("torch" in sys.modules)'])
    out = subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True)
    assert out == 'False\n'


IS_X86 = platform.machine() in ('x86_64', 'AMD64')
INHERITED = {name: value for name, value in os.environ.items()
             if name not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}


@pytest.mark.parametrize('env, spins', [
    ({}, '20000' if IS_X86 else 'None'), ({'GOMP_SPINCOUNT': '77'}, '77'),
    ({'OMP_WAIT_POLICY': 'passive'}, 'None'),
    ({'OMP_WAIT_POLICY': 'active', 'GOMP_SPINCOUNT': '5'}, '5')])
def test_what_the_user_has_set_stays(env, spins):
    program = 'import os; import runtime.threads; print(os.environ.get("GOMP_SPINCOUNT"))'
    out = subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True,
                                  env={**INHERITED, **env})
    assert out.strip() == spins


@pytest.mark.skipif(not IS_X86 or sys.platform != 'linux', reason='set for OpenMP on x86 Linux')
def test_openmp_reads_it():
    program = 'import runtime.threads, torch; torch.randn(9, 9)'
    result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, text=True, check=True,
                            capture_output=True, env={**INHERITED, 'OMP_DISPLAY_ENV': 'verbose'})
    assert "GOMP_SPINCOUNT = '20000'" in result.stderr


def test_results_do_not_depend_on_it(char_data, tmp_path):
    weights = []
    for spins in ('0', '20000'):
        # wide enough that two threads share an operation
        command = [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, '--n_embd=256',
                   '--max_iters=3', f'--dataset={char_data}', f'--out_dir=out-{spins}']
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True,
                       env={**INHERITED, 'GOMP_SPINCOUNT': spins, 'OMP_NUM_THREADS': '2'})
        weights.append(checkpoint.load(str(tmp_path / f'out-{spins}' / 'ckpt.pt'))['model'])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def compute(seconds):
    """Keeps this thread busy for this long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.randn(1000).sum()


@needs_schedstat
def test_a_busy_machine_is_noted_once_and_threads_are_spread(capfd, monkeypatch):
    spread_threads = []
    monkeypatch.setattr(threads, 'spread', lambda ids: spread_threads.append(list(ids)))
    monkeypatch.setattr(threads, 'CHECK_SECONDS', 0.5)
    cpus = os.sched_getaffinity(0)
    event = threading.Event()
    thread = threading.Thread(target=event.wait)  # it sleeps, so it is not moved
    thread.start()
    try:
        os.sched_setaffinity(0, {min(cpus)})  # all on one CPU
        note = threads.BusyNote()
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(threads.keep_cores_busy(0))
            for _ in range(4):
                compute(0.6)
                note.check()
    finally:
        os.sched_setaffinity(0, cpus)
        event.set()
    error = capfd.readouterr().err
    assert re.fullmatch(r'the threads waited for a CPU \d+% of their time, so this is slower .*\n',
                        error)
    assert spread_threads == 4 * [[threading.get_native_id()]]


@needs_schedstat
def test_a_thread_that_ended_is_not_subtracted(capfd, monkeypatch):
    monkeypatch.setattr(threads, 'CHECK_SECONDS', 0.0)
    monkeypatch.setattr(threads, 'MAX_WAITING', -1.0)  # so that check() says what it measured
    thread = threading.Thread(target=compute, args=(1.0,))
    thread.start()
    compute(0.5)
    note = threads.BusyNote()
    thread.join()
    compute(0.2)
    note.check()
    share = int(re.search(r'(-?\d+)%', capfd.readouterr().err).group(1))
    assert 0 <= share <= 100


@needs_schedstat
def test_waiting_for_something_else_is_not_waiting_for_a_cpu():
    before = threads.read_times()[os.getpid()]
    select.select([], [], [], 0.3)
    after = threads.read_times()[os.getpid()]
    assert after[1] - before[1] < 0.2e9


TOGETHER = """
import os, sys, threading, time
from runtime import threads
import torch

torch.set_num_threads(1)
cpus = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, set(cpus))
a, ids = torch.zeros(5000, 5000), []

def work():  # for some seconds, without Python's lock
    ids.append(threading.get_native_id())
    a @ a

def count_cpus():
    stats = [open(f'/proc/self/task/{thread}/stat').read() for thread in ids]
    return len({stat.rsplit(')', 1)[1].split()[36] for stat in stats})

with threads.keep_cores_busy(0) as processes:
    for process in processes:
        os.sched_setaffinity(process.pid, {cpus[1]})
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    while len(ids) < 2 or min(threads.read_times()[thread][0] for thread in ids) < 5e7:
        time.sleep(0.01)  # until both have begun
    for allowed_cpus in ({cpus[0]}, set(cpus)):
        for thread in ids:
            os.sched_setaffinity(thread, allowed_cpus)
        threads.spread(ids)
        print(count_cpus(), all(os.sched_getaffinity(thread) == allowed_cpus for thread in ids))
"""


@pytest.mark.skipif(sys.platform != 'linux' or len(os.sched_getaffinity(0)) < 2,
                    reason='needs Linux and two CPUs')
def test_threads_on_one_cpu_are_spread_if_they_may():
    out = subprocess.check_output([sys.executable, '-c', TOGETHER], cwd=ROOT, text=True)
    assert out == '1 True\n2 True\n'


@needs_schedstat
def test_the_scripts_tell(char_data, tmp_path):
    limit = 'threads.CHECK_SECONDS = 0.0\nthreads.MAX_WAITING = -1.0\n'
    for script in ('train.py', 'sample.py', 'bench.py'):  # with limits that every machine exceeds
        with open(os.path.join(ROOT, script), encoding='utf-8') as f:
            code = f.read()
        assert code.count('import torch\n') == 1
        code = code.replace('import torch\n', 'import torch\n' + limit)
        (tmp_path / script).write_text(code, encoding='utf-8')

    def count(script, *args):
        process = Process(str(tmp_path / script), '--device=cpu', *args, cwd=tmp_path)
        assert process.wait() == 0, process.read_output()
        return process.read_output()[1].count('the threads waited for a CPU')

    data = f'--dataset={char_data}'
    assert count('train.py', *TINY, data, '--out_dir=out', '--max_iters=3') == 1
    assert count('train.py', *TINY, data, '--out_dir=out', '--init_from=resume', '--eval_only') == 1
    assert count('sample.py', '--out_dir=out', '--num_samples=2', '--max_new_tokens=5') == 1
    assert count('sample.py', '--out_dir=out', '--num_samples=1', '--max_new_tokens=5',
                 '--stream') == 1
    assert count('bench.py', *SMALL, '--repeats=3', '--real_data=False') == 1


def test_bench_makes_the_load(tmp_path):
    out = run('bench.py', *SMALL, '--repeats=3', '--real_data=False', '--busy=True',
              cwd=tmp_path).stdout
    result = json.loads(out.splitlines()[-1])
    for niceness in (10, 0):
        assert f'ms, next to nice {niceness}' in out
        assert result[f'slowdown_next_to_nice_{niceness}'] > 0


def test_the_work_is_measured_next_to_the_load(monkeypatch):
    loads, loads_at_work = [None], []

    @contextlib.contextmanager
    def keep_cores_busy(niceness):
        loads.append(niceness)
        yield
        loads.append(None)

    monkeypatch.setattr(timing, 'keep_cores_busy', keep_cores_busy)
    timing.print_slowdowns(lambda: loads_at_work.append(loads[-1]), torch.device('cpu'), 3, 1, ())
    assert [load for load, _ in itertools.groupby(loads_at_work)] == [None, 10, 0]


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='only Linux tells the CPUs')
def test_the_load_runs_and_ends_with_its_context():
    with pytest.raises(KeyboardInterrupt), threads.keep_cores_busy(10) as processes:
        own_niceness = os.getpriority(os.PRIO_PROCESS, 0)
        assert len(processes) == len(os.sched_getaffinity(0))
        for process in processes:
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, own_niceness + 10)
            assert process.poll() is None
        raise KeyboardInterrupt
    assert None not in [process.poll() for process in processes]


def is_running(pid):
    """Whether the process has not ended; one that waits to be removed (a zombie) has."""
    with contextlib.suppress(FileNotFoundError), open(f'/proc/{pid}/stat') as f:
        return f.read().rsplit(')', 1)[1].split()[0] != 'Z'
    return False


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_load_ends_when_its_parent_is_killed():
    program = ('from runtime import threads\nimport os\n'
               'with threads.keep_cores_busy(10) as processes:\n'
               '    print(*[process.pid for process in processes], flush=True)\n'
               '    os.kill(os.getpid(), 9)')
    result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == -9
    pids = [int(pid) for pid in result.stdout.split()]
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline


def test_what_bench_compares_with_does_not_inherit_it(tmp_path):
    other = tmp_path / 'other.py'
    other.write_text('import json, os, sys\nprint(json.dumps(dict(tokens_per_s=1.0)))\n'
                     'open("seen", "w").write(str(os.environ.get("GOMP_SPINCOUNT")))\n')
    command = [sys.executable, os.path.join(ROOT, 'bench.py'), *SMALL, '--repeats=3',
               '--real_data=False', f'--compare={sys.executable} {other}']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=INHERITED)
    assert (tmp_path / 'seen').read_text() == 'None'
