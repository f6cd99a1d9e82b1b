"""Errors in the middle of a run: what was trained is saved, and continues to the same bits."""
import os
import shlex
import shutil
import subprocess
import sys

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
    run,
    start_ranks,
    wait_until,
)

from runtime import checkpoint

# runs train.py with a part of it that fails in the sixth iteration, on the ranks in FAILING_RANKS
BROKEN = f"""
import os, runpy, sys
import torch
from runtime import optimizers, report
place, ranks = os.environ['PLACE'], os.environ.get('FAILING_RANKS', '0 1').split()
calls = 0
def fail_late(call, before=True, error=RuntimeError('broken')):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if before and calls == 6 and os.environ.get('RANK', '0') in ranks:
            raise error
        result = call(*args, **kwargs)
        if calls == 6 and os.environ.get('RANK', '0') in ranks:
            raise error
        return result
    return wrapper
if place == 'before the update':
    optimizers.clip_and_step = fail_late(optimizers.clip_and_step)
elif place == 'memory':
    optimizers.clip_and_step = fail_late(optimizers.clip_and_step, error=MemoryError())
elif place == 'exit':
    optimizers.clip_and_step = fail_late(optimizers.clip_and_step, error=SystemExit(3))
elif place == 'interrupt':  # as from a debugger; the run itself handles Ctrl-C
    optimizers.clip_and_step = fail_late(optimizers.clip_and_step, error=KeyboardInterrupt())
elif place == 'after the update':
    optimizers.BadSteps.count = fail_late(optimizers.BadSteps.count, before=False)
elif place == 'progress':
    report.format_iter = fail_late(report.format_iter)
elif place == 'in the update':
    adam = sys.modules['torch.optim.adam']
    adam.adam = fail_late(adam.adam)  # step() calls it for each group
sys.argv[0] = {os.path.join(ROOT, 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# in the sixth iteration, 5 updates have been made
SAVED = {'before the update': 5, 'memory': 5, 'after the update': 6, 'progress': 6}


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / 'broken.py'
    path.write_text(BROKEN)
    return str(path)


@pytest.fixture(scope='module')
def args(char_data):
    return [*TINY, f'--dataset={char_data}', '--eval_interval=100', '--max_iters=9']


@pytest.fixture(scope='module')
def whole(args, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('whole')
    run('train.py', *args, f'--out_dir={out_dir}')
    return out_dir


@pytest.mark.parametrize('place', SAVED)
def test_an_error_saves_what_it_would_lose(broken, args, whole, tmp_path, place):
    out_dir = tmp_path / 'out dir'
    process = Process(broken, *args, f'--out_dir={out_dir}', PLACE=place)
    _, err = process.communicate()
    assert process.returncode == 1
    lines = err.splitlines()
    if place == 'memory':  # this has its own line, and a bug its traceback
        assert lines[0].startswith('error: out of memory on cpu') and 'Traceback' not in err
    else:
        assert lines[0].startswith('Traceback') and 'RuntimeError: broken' in lines
    iter_num = SAVED[place]
    assert lines[-1].startswith(f'the state after {iter_num} iterations is in {out_dir}/ckpt_last')
    assert f"'--out_dir={out_dir}' --init_from=resume" in lines[-1]  # to paste into a shell
    assert torch.load(out_dir / 'ckpt_last.pt', weights_only=True)['iter_num'] == iter_num
    run('train.py', *args, f'--out_dir={out_dir}', '--init_from=resume')
    assert equal_states(out_dir / 'ckpt.pt', whole / 'ckpt.pt')


@pytest.mark.parametrize('place, status', [('exit', 3), ('interrupt', -2)])
def test_somebodys_own_exit_saves_too(broken, args, tmp_path, place, status):
    process = Process(broken, *args, f'--out_dir={tmp_path}', PLACE=place)
    _, err = process.communicate()
    assert process.returncode == status and 'Traceback' not in err
    assert err.startswith('the state after 5 iterations is in')
    assert torch.load(tmp_path / 'ckpt_last.pt', weights_only=True)['iter_num'] == 5


def test_half_an_update_is_not_saved(broken, args, tmp_path):
    process = Process(broken, *args, f'--out_dir={tmp_path / "out"}', PLACE='in the update')
    _, err = process.communicate()
    assert process.returncode == 1 and 'RuntimeError: broken' in err
    assert list_files(tmp_path / 'out') == ['metrics.jsonl']


NOTEBOOK = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in sys.argv[1:]:
    shell.run_cell(cell)
"""


@pytest.mark.parametrize('place', ['before the update', 'after the update', 'in the update'])
def test_an_error_in_a_notebook_saves_too(broken, args, whole, tmp_path, place):
    notebook = tmp_path / 'notebook.py'
    notebook.write_text(NOTEBOOK)
    out_dir = tmp_path / 'out'
    cell = f'%run {broken} {shlex.join(args)} --out_dir={out_dir}'
    out = run(str(notebook), cell, '1 / 0', PLACE=place)
    assert ': broken\n' in out.stdout and 'ZeroDivisionError' in out.stdout
    if place == 'in the update':
        assert list_files(out_dir) == ['metrics.jsonl'] and 'the state after' not in out.stderr
        return
    iter_num = SAVED[place]
    assert f'the state after {iter_num} iterations is in {out_dir}/ckpt_last' in out.stderr
    assert f'--out_dir={out_dir} --init_from=resume' in out.stderr  # the command of the cell
    run('train.py', *args, f'--out_dir={out_dir}', '--init_from=resume')
    assert equal_states(out_dir / 'ckpt.pt', whole / 'ckpt.pt')


@pytest.mark.parametrize('parallel, ranks, is_saved', [
    ('ddp', '0 1', True), ('zero1', '0 1', True), ('fsdp', '0 1', True),
    ('ddp', '0', True), ('fsdp', '1', False)])
def test_errors_on_several_ranks(broken, args, tmp_path, monkeypatch, parallel, ranks, is_saved):
    monkeypatch.setenv('PLACE', 'before the update')
    monkeypatch.setenv('FAILING_RANKS', ranks)
    out_dir = tmp_path / 'out'
    processes = start_ranks(2, broken, *args, f'--out_dir={out_dir}', f'--parallel={parallel}')
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode for process in processes), outputs
    assert 'RuntimeError: broken' in outputs[int(ranks[-1])][1]
    if not is_saved:  # a part of the weights is on a rank that has no error
        return
    assert torch.load(out_dir / 'ckpt_last.pt', weights_only=True)['iter_num'] == 5
    monkeypatch.setenv('PLACE', '')
    processes = start_ranks(2, broken, *args, f'--out_dir={out_dir}', f'--parallel={parallel}',
                            '--init_from=resume')
    whole = start_ranks(2, broken, *args, f'--out_dir={tmp_path / "whole"}',
                        f'--parallel={parallel}')
    assert [process.wait() for process in (*processes, *whole)] == [0] * 4
    assert equal_states(out_dir / 'ckpt.pt', tmp_path / 'whole' / 'ckpt.pt')


def spoil(path):
    """Writes ids that the vocabulary doesn't have all over a .bin file, without its ends."""
    ids = np.memmap(path, dtype='<u2', mode='r+')
    ids[4200:-4200] = 999


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize('change, words', [
    (spoil, 'token id 999, but the vocabulary has'), (cut, 'was cut short')])
def test_data_that_is_changed_while_a_run_reads_it(char_data, tmp_path, change, words):
    data, out_dir = tmp_path / 'data', tmp_path / 'out'
    data.mkdir()
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        shutil.copy(os.path.join(char_data, name), data)
    process = Process('train.py', *TINY, f'--dataset={data}', f'--out_dir={out_dir}',
                      '--eval_interval=10000000', '--max_iters=10000000', '--block_size=8',
                      '--data_order=epochs')  # it reads from the beginning, so not beyond the cut
    wait_until(has_iterations(out_dir, 10), process)
    change(data / 'train.bin')
    _, err = process.communicate()
    assert process.returncode in (1, -7), err  # -7: it read beyond the end before it looked
    if process.returncode == 1:
        lines = [line for line in err.splitlines() if not line.startswith('warning')]
        assert words in lines[0] and 'the state after' in lines[1] and len(lines) == 2
        state = checkpoint.load(str(out_dir / 'ckpt_last.pt'))
        assert state['iter_num'] > 9


def test_a_save_under_a_limit_on_addresses(args, whole, tmp_path):
    # resource limits as `ulimit -v` sets them: a copy of the state and a map of the file don't fit
    code = f"""if True:
        import resource, runpy, sys
        import torch, plot
        from runtime import checkpoint
        save = checkpoint.save
        def save_in_little_space(*args, **options):
            with open('/proc/self/status') as f:
                size = next(int(line.split()[1]) for line in f if line.startswith('VmSize'))
            limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 2 ** 20, limits[1]))
            try:
                return save(*args, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
        checkpoint.save = save_in_little_space
        sys.argv[0] = {os.path.join(ROOT, 'train.py')!r}
        runpy.run_path(sys.argv[0], run_name='__main__')"""
    # the file has 5 MB, so the map that checks it doesn't fit
    out = subprocess.run([sys.executable, '-c', code, *args, '--n_embd=128', '--max_iters=2',
                          f'--out_dir={tmp_path}'], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and 'could not be saved' not in out.stderr, out.stderr
    assert checkpoint.load(str(tmp_path / 'ckpt.pt'))['iter_num'] == 2
