"""How torch's threads wait, and what is said on a machine that is busy with something else."""
import ast
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, run
from test_bench import SMALL

from runtime import threads

needs_schedstat = pytest.mark.skipif(not os.path.exists('/proc/self/schedstat'),
                                     reason='only Linux tells how long threads waited')


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py'])
def test_the_setting_comes_before_torch(script):
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        code = f.read()
    kinds = (ast.Import, ast.ImportFrom)
    names = [ast.unparse(node) for node in ast.parse(code).body if isinstance(node, kinds)]
    position = next(i for i, name in enumerate(names) if re.search(r'runtime.*threads', name))
    program = '\n'.join([*names[:position], 'import sys', 'print("torch" in sys.modules)'])
    out = subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True)
    assert out == 'False\n'


@pytest.mark.parametrize('env, spins', [
    ({}, '20000'), ({'GOMP_SPINCOUNT': '77'}, '77'), ({'OMP_WAIT_POLICY': 'passive'}, 'None'),
    ({'OMP_WAIT_POLICY': 'active', 'GOMP_SPINCOUNT': '5'}, '5')])
def test_what_the_user_has_set_stays(env, spins):
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    program = 'import os; import runtime.threads; print(os.environ.get("GOMP_SPINCOUNT"))'
    out = subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True,
                                  env={**inherited, **env})
    assert out.strip() == spins


def compute(seconds):
    """Keeps this thread busy for this long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.randn(1000).sum()


@needs_schedstat
def test_a_busy_machine_is_noted_once(capfd, monkeypatch):
    monkeypatch.setattr(threads, 'CHECK_SECONDS', 0.5)
    note = threads.BusyNote()
    with threads.keep_cores_busy(4 * os.cpu_count(), 0):
        for _ in range(4):
            compute(0.6)
            note.check()
    error = capfd.readouterr().err
    assert re.fullmatch(r'this machine is busy: the threads waited for a CPU \d\d% of their time, '
                        r'so this is slower than it could be\n', error)


@needs_schedstat
def test_a_sleeping_process_does_not_wait_for_a_cpu():
    program = ('from runtime import threads\nimport select\nselect.select([], [], [], 0.3)\n'
               'print(*threads.read_times())')
    out = subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True)
    ran, waited = map(float, out.split())
    assert ran > 0 and waited < 0.3


@needs_schedstat
def test_train_and_sample_tell(char_data, tmp_path):
    limit = 'runtime.threads.CHECK_SECONDS = 0.0\nruntime.threads.MAX_WAITING = -1.0\n'
    for script in ('train.py', 'sample.py'):  # with limits that every machine exceeds
        with open(os.path.join(ROOT, script), encoding='utf-8') as f:
            code = f.read()
        assert code.count('from runtime import threads') == 1
        code = code.replace('import torch\n', 'import torch, runtime.threads\n' + limit, 1)
        (tmp_path / script).write_text(code, encoding='utf-8')
    error = run(str(tmp_path / 'train.py'), *TINY, f'--dataset={char_data}', '--out_dir=out',
                '--max_iters=3', cwd=tmp_path).stderr
    assert error.count('this machine is busy') == 1
    error = run(str(tmp_path / 'sample.py'), '--out_dir=out', '--num_samples=2', '--device=cpu',
                '--max_new_tokens=5', cwd=tmp_path).stderr
    assert error.count('this machine is busy') == 1


def test_bench_makes_the_load(tmp_path):
    out = run('bench.py', *SMALL, '--repeats=3', '--real_data=False', '--busy=True',
              cwd=tmp_path).stdout
    result = json.loads(out.splitlines()[-1])
    for niceness in (10, 0):
        assert f'ms, next to nice {niceness}' in out
        assert result[f'slowdown_next_to_nice_{niceness}'] > 0


def test_the_load_ends_with_its_context():
    with pytest.raises(KeyboardInterrupt), threads.keep_cores_busy(2, 10) as processes:
        assert [process.poll() for process in processes] == [None, None]
        raise KeyboardInterrupt
    assert None not in [process.poll() for process in processes]
