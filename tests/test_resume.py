"""A run that is cut into pieces, by whatever, ends with the same bits as one that is not."""
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FAST, ROOT, TINY, Process, equal_states, metrics, run, run_ranks

from runtime import checkpoint

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def read_losses(out_dir):
    """The numbers in a run's metrics.jsonl by iteration; those of a second time must be equal."""
    losses = {}
    for event, keys in (('iter', ['loss', 'grad_norm', 'lr']),
                        ('eval', ['train/loss', 'val/loss'])):
        for e in metrics(out_dir, event):
            for key in keys:
                assert losses.setdefault((e['iter'], key), e[key]) == e[key], (e['iter'], key)
    return losses


def start(ranks, *args, **options):
    if ranks == 1:
        return run('train.py', *args, **options)
    # two threads per rank: with one, the order of a sum could not change
    return run_ranks(ranks, 'train.py', *args, threads=2, **options)


SLOW_CASES = (
    ('float32', 1, True, []), ('float32', 2, False, []), ('bfloat16', 1, False, []),
    ('bfloat16', 1, True, []), ('float32', 2, True, []), ('bfloat16', 2, True, []),
    ('bfloat16', 2, False, FAST), ('float32', 1, True, FAST), ('bfloat16', 1, True, FAST))


@pytest.mark.parametrize('dtype, ranks, compiled, options', [
    ('float32', 1, False, []), ('bfloat16', 2, False, []), ('float32', 1, False, FAST),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_pieces_equal_the_whole(char_data, tmp_path, dtype, ranks, compiled, options):
    # with dropout, two micro-steps per rank, evaluations every five iterations, and cuts at and
    # between evaluations
    args = [*TINY, *options, f'--dataset={char_data}', f'--dtype={dtype}', f'--compile={compiled}',
            '--eval_interval=5', '--dropout=0.2', f'--gradient_accumulation_steps={2 * ranks}']
    start(ranks, *args, f'--out_dir={tmp_path / "whole"}', '--max_iters=12')
    for max_iters in (5, 12) if compiled else (3, 5, 12):
        start(ranks, *args, f'--out_dir={tmp_path / "parts"}', f'--max_iters={max_iters}',
              '--init_from=auto')
    assert equal_states(tmp_path / 'whole' / 'ckpt.pt', tmp_path / 'parts' / 'ckpt.pt')
    whole, parts = read_losses(tmp_path / 'whole'), read_losses(tmp_path / 'parts')
    assert len(whole) == 3 * 12 + 2 * 4
    assert whole.items() <= parts.items()  # the parts also have evaluations at their ends
    best = checkpoint.load(str(tmp_path / 'parts' / 'ckpt.pt'))['best_val_loss']
    assert best == min(loss for (_, key), loss in parts.items() if key == 'val/loss')


@pytest.mark.slow
def test_a_process_is_exact_from_its_first_number_on(char_data, tmp_path):
    # MKL starts its exp and log with a race: without the warm-up of machine.prepare_training one
    # process in 30 had another first loss
    seen = set()
    for _ in range(100):
        run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=1')
        seen.add(tuple(read_losses(tmp_path).values()))
    assert len(seen) == 1


@pytest.mark.slow
def test_compiling_changes_only_the_rounding_and_leaves_no_trace(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=5', '--dropout=0.2']  # the same masks
    for compiled in (True, False):
        run('train.py', *args, f'--out_dir={tmp_path / str(compiled)}', f'--compile={compiled}')
    plain, compiled = read_losses(tmp_path / 'False'), read_losses(tmp_path / 'True')
    assert plain.keys() == compiled.keys()
    assert all(compiled[key] == pytest.approx(value, rel=1e-3) for key, value in plain.items())
    weights = torch.load(tmp_path / 'True' / 'ckpt.pt', weights_only=True)['model']
    assert not any('_orig_mod' in name for name in weights)


def test_another_number_of_ranks_continues_with_the_same_data_and_dropout(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--eval_interval=5', '--dropout=0.2',
            '--gradient_accumulation_steps=4']
    start(1, *args, f'--out_dir={tmp_path / "whole"}', '--max_iters=12')
    for ranks, max_iters in ((2, 4), (1, 8), (2, 12)):
        start(ranks, *args, f'--out_dir={tmp_path / "parts"}', f'--max_iters={max_iters}',
              '--init_from=auto')
    whole, parts = read_losses(tmp_path / 'whole'), read_losses(tmp_path / 'parts')
    # two ranks add the gradients in another order, so the rounding differs. With other dropout
    # masks the losses would differ by 1e-2
    assert all(parts[key] == pytest.approx(loss, rel=1e-4) for key, loss in whole.items()
               if 'loss' in key[1])


def test_wandb_continues_the_same_run(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=out', '--wandb_log=True',
            '--init_from=auto']
    for max_iters in (2, 4):
        run('train.py', *args, f'--max_iters={max_iters}', cwd=tmp_path)
    runs = [name for name in os.listdir(tmp_path / 'wandb') if name.startswith('offline-run')]
    ids = {re.fullmatch(r'offline-run-\d+_\d+-(\w+)', name)[1] for name in runs}
    assert len(runs) == 2
    assert ids == {checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))['wandb_id']}


# -----------------------------------------------------------------------------
# kills
def count_iterations(out_dir):
    """How many progress lines a run has logged; 0 before it has a log."""
    if not os.path.exists(os.path.join(out_dir, 'metrics.jsonl')):
        return 0
    return len(metrics(out_dir, 'iter'))


def kill_at_random(args, out_dir, kills, draw):
    """Kills the run that many times, about half of them within a save, and then lets it end.

    Returns how many kills were within a save.
    """
    within = 0
    for kill in range(kills + 1):
        process = Process('train.py', *args, f'--out_dir={out_dir}', '--init_from=auto')
        if kill < kills:
            wanted = count_iterations(out_dir) + draw.randint(1, 30)
            while process.poll() is None and count_iterations(out_dir) < wanted:
                time.sleep(draw.uniform(0, 0.02))  # anywhere in an iteration
            if draw.random() < 0.5:
                while process.poll() is None and not (out_dir / 'ckpt_last.pt.tmp').exists():
                    pass
                time.sleep(draw.uniform(0, 0.005))
            assert process.poll() is None, ('it ended too early', process.read_output())
            process.send_signal(signal.SIGKILL)
            process.wait()
            unfinished = [out_dir / f'{name}.tmp' for name in ('ckpt_last.pt', 'ckpt.pt')]
            within += any(path.exists() for path in unfinished)
        else:
            out, err = process.communicate()
            assert process.returncode == 0 and not err, err
            assert kill == 0 or 'resumed from' in out
    assert not [name for name in os.listdir(out_dir) if name.endswith('.tmp')]
    return within


# 12 MB per checkpoint, and one in every iteration: most of the time a file is being written
KILLED = ['--n_embd=256', '--n_head=2', '--n_layer=1', '--dropout=0.1', '--save_interval=1',
          '--eval_interval=50', '--decay_lr=False']


@pytest.mark.parametrize('kills', [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_continues_from_a_good_checkpoint(char_data, tmp_path, kills):
    args = [*TINY, *KILLED, f'--dataset={char_data}', f'--max_iters={35 * (kills + 1)}']
    within = kill_at_random(args, tmp_path / 'killed', kills, random.Random(1337))
    run('train.py', *args, '--save_interval=0', f'--out_dir={tmp_path / "whole"}')
    print(f'{kills} kills, {within} of them within a save')
    assert within >= kills // 5
    assert equal_states(tmp_path / 'killed' / 'ckpt.pt', tmp_path / 'whole' / 'ckpt.pt')
    whole, killed = read_losses(tmp_path / 'whole'), read_losses(tmp_path / 'killed')
    assert whole == killed


def test_metrics_survive_half_a_line(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--init_from=auto']
    run('train.py', *args, '--max_iters=3')
    path = tmp_path / 'metrics.jsonl'
    os.truncate(path, path.stat().st_size - 20)  # as if a kill cut off the last evaluation
    run('train.py', *args, '--max_iters=5')
    assert [e['iter'] for e in metrics(tmp_path, 'iter')] == [0, 1, 2, 3, 4]
    assert [e['iter'] for e in metrics(tmp_path, 'eval')] == [0, 5]
    assert len(metrics(tmp_path, 'run')) == 2


def list_children(process):
    with open(f'/proc/{process.pid}/task/{process.pid}/children') as f:
        return [int(pid) for pid in f.read().split()]


def read_state(pid):
    """The system's letter for a process's state, Z for one that has ended; None if it is gone."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0]
    except OSError:
        return None


@pytest.mark.skipif(sys.platform != 'linux', reason='finds the ranks in /proc')
def test_a_killed_worker_is_restarted_and_the_end_is_the_same(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--dropout=0.1', '--save_interval=5',
            '--eval_interval=100', '--max_iters=200', '--log_interval=1']
    process = subprocess.Popen(
        [*TORCHRUN, '--max-restarts=3', os.path.join(ROOT, 'train.py'), *args,
         '--out_dir=killed', '--init_from=auto'],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not (tmp_path / 'killed' / 'ckpt_last.pt').exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.kill(list_children(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and 'resumed from killed/ckpt' in out, out
    run_ranks(2, 'train.py', *args, '--out_dir=whole', cwd=tmp_path)
    assert equal_states(tmp_path / 'killed' / 'ckpt.pt', tmp_path / 'whole' / 'ckpt.pt')


# train.py with a shorter limit than ten minutes
IMPATIENT = '''
import datetime, os, runpy, sys
sys.path.insert(0, {root!r})
from runtime import distributed
distributed.TIMEOUT = datetime.timedelta(seconds=5)
sys.argv[0] = os.path.join({root!r}, 'train.py')
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='finds the ranks in /proc')
def test_a_rank_that_hangs_does_not_block_the_others_forever(char_data, tmp_path):
    (tmp_path / 'impatient.py').write_text(IMPATIENT.format(root=ROOT))
    args = [*TINY, f'--dataset={char_data}', '--eval_interval=100000', '--max_iters=100000',
            '--out_dir=run']
    process = subprocess.Popen(
        [*TORCHRUN, str(tmp_path / 'impatient.py'), *args], cwd=tmp_path,
        env={**os.environ, 'TORCH_ELASTIC_SHUTDOWN_TIMEOUT': '2'},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not count_iterations(tmp_path / 'run'):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    waiting, hanging = list_children(process)
    os.kill(hanging, signal.SIGSTOP)
    try:
        while process.poll() is None and read_state(waiting) not in ('Z', None):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        os.kill(hanging, signal.SIGKILL)  # torchrun would wait 30 s for it
        out, _ = process.communicate(timeout=60)
    assert process.returncode and 'imed out' in out


@pytest.mark.slow
def test_memory_stays_constant_over_20000_iterations(char_data, tmp_path):
    process = Process('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "run"}',
                      '--max_iters=20000', '--eval_interval=200', '--save_interval=50',
                      '--lr_decay_iters=20000', '--dropout=0.1')
    resident = {}  # MiB, by iterations / 2000
    while process.poll() is None:
        done = 0
        if count_iterations(tmp_path / 'run'):
            done = metrics(tmp_path / 'run', 'iter')[-1]['iter'] // 2000
        if done and done not in resident:
            with open(f'/proc/{process.pid}/status') as f:
                line = next(line for line in f if line.startswith('VmRSS'))
            resident[done] = int(line.split()[1]) / 1024
        time.sleep(0.5)
    sizes = [round(size) for _, size in sorted(resident.items())]
    print('MiB after 2,000, 4,000, ... iterations:', sizes)
    assert process.returncode == 0 and len(resident) >= 8
    assert max(resident.values()) - resident[min(resident)] < 20
    assert torch.load(tmp_path / 'run' / 'ckpt.pt', weights_only=True)['iter_num'] == 20000
