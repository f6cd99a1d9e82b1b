"""The training loop: its helpers one by one, and runs of the script as people start them."""
import itertools
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    functions_of,
    list_files,
    metrics,
    run,
    run_here,
    run_ranks,
    start_ranks,
)

import model
import plot
from runtime import checkpoint, distributed, machine, optimizers, ranges, restore
from runtime.dataset import DataOrder, move_to_device
from runtime.run_dir import RunDir
from runtime.shards import check_ids


def test_learning_rates_are_nanogpts(golden):
    for schedule in golden['lr_schedules']:
        rates = schedule.pop('lr')
        get_lr, = functions_of('train.py', 'get_lr', math=math, lr_schedule='cosine', **schedule)
        for it, lr in rates.items():
            assert get_lr(int(it)) == pytest.approx(lr, rel=1e-12), it
        schedule['lr'] = rates


@pytest.mark.parametrize('warmup, decay', [(100, 100), (100, 5)])
def test_a_trial_shorter_than_its_warmup(warmup, decay):
    get_lr, = functions_of('train.py', 'get_lr', math=math, lr_schedule='cosine', min_lr=0.1,
                           learning_rate=1.0, warmup_iters=warmup, lr_decay_iters=decay)
    assert get_lr(0) == 1 / 101 and get_lr(99) == 100 / 101 and get_lr(100) == 0.1


def test_wsd_warms_up_stays_and_decays():
    get_lr, = functions_of('train.py', 'get_lr', math=math, lr_schedule='wsd', min_lr=0.2,
                           learning_rate=1.0, warmup_iters=9, lr_decay_iters=100, decay_share=0.4)
    assert [get_lr(it) for it in (0, 4)] == pytest.approx([0.1, 0.5])
    assert {get_lr(it) for it in range(9, 61)} == {1.0}
    assert [get_lr(it) for it in (70, 80, 99, 100, 200)] == pytest.approx(
        [0.8, 0.6, 0.22, 0.2, 0.2])


def batches(data, world_size=1, rank=0, accumulation=4, batch_size=3, block_size=8, seed=1337,
            data_order='random', iterations=range(200)):
    """The micro-batches of train.py as {(iter_num, micro_step): (X, Y)} over data."""
    class raw_model:
        class config:
            vocab_size = 2 ** 16

    windows = {'train': np.lib.stride_tricks.sliding_window_view(data, block_size + 1)}
    order = DataOrder(data_order, seed, len(data), block_size, batch_size, accumulation)
    _, get_train_batch, _ = functions_of(
        'train.py', 'get_batch', 'get_train_batch', 'seed_micro_step', np=np, torch=torch,
        seed=seed, os=os, check_ids=check_ids, check_mapped_file=lambda tokens: None, order=order,
        tokens={'train': data},
        move_to_device=move_to_device, windows=windows, data_dir='', raw_model=raw_model,
        device='cpu', device_type='cpu', ddp_world_size=world_size, ddp_rank=rank)
    return {(it, m): get_train_batch(it, m)
            for it in iterations for m in range(accumulation // world_size)}


@pytest.mark.parametrize('data_order', ['random', 'epochs'])
def test_batches_are_a_function_of_seed_and_iteration(data_order):
    data = np.arange(100, dtype=np.uint16)
    one = batches(data, data_order=data_order)
    if data_order == 'random':
        # the draw of the counter-based generator that checkpoints of any age count on
        raw = np.random.Philox(key=1337, counter=[0, 0, 0, 7]).random_raw(12)
        assert torch.cat([one[7, m][0][:, 0] for m in range(4)]).tolist() == (raw % 92).tolist()
    for (it, m), (x, y) in one.items():
        assert x.shape == y.shape == (3, 8) and x.dtype == torch.int64
        # targets are the next tokens
        assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(8))
    # the same on two ranks, which take turns with the micro-batches, and with the iteration
    # divided in another way
    for rank in (0, 1):
        two = batches(data, world_size=2, rank=rank, data_order=data_order,
                      iterations=(199, 3, 7, 0))
        for (it, m), (x, y) in two.items():
            assert torch.equal(x, one[it, 2 * m + rank][0])
    larger = batches(data, accumulation=2, batch_size=6, data_order=data_order)
    for it, m in [(0, 0), (7, 1)]:
        x, _ = larger[it, m]
        assert torch.equal(x, torch.cat((one[it, 2 * m][0], one[it, 2 * m + 1][0])))
    other_seed = batches(data, seed=1, data_order=data_order)
    assert not torch.equal(other_seed[0, 0][0], one[0, 0][0])
    assert not torch.equal(one[1, 0][0], one[0, 0][0])
    if data_order == 'epochs':
        # 11 sequences next to one another, each time in another order, from another first one
        epochs = torch.cat([x[:, 0] for x, _ in one.values()])[:2398].view(218, 11)
        firsts = epochs.min(dim=1).values
        assert ((epochs.sort(dim=1).values - firsts[:, None]) == 8 * torch.arange(11)).all()
        assert firsts.unique().tolist() == list(range(12))
        return
    # every start that leaves room for a target, and about equally often: 2,400 draws of 92
    counts = torch.cat([x[:, 0] for x, _ in one.values()]).bincount(minlength=92)
    assert len(counts) == 92 and (counts - 26.1).abs().max() < 5 * 26.1 ** 0.5


@pytest.mark.parametrize('batch_size', [1, 3])
def test_inputs_and_targets_do_not_share_memory(batch_size):
    # people mask or corrupt one of them in place
    data = np.arange(100, dtype=np.uint16)
    for changed, other in ((0, 1), (1, 0)):
        batch = batches(data, batch_size=batch_size, iterations=[0])[0, 0]
        before = batch[other].clone()
        batch[changed].fill_(99)
        assert torch.equal(batch[other], before)


def test_accumulation_suggests_values_for_the_same_batch(capsys):
    ranges.check_accumulation(40, 12, 8)
    for steps, batch_size, words in (
            (10, 12, 'for the same tokens/iter use --gradient_accumulation_steps=12 '
                     '--batch_size=10\n'),
            (1, 12, '--gradient_accumulation_steps=4 --batch_size=3\n'),
            (5, 1, '5, cannot stay the same: --gradient_accumulation_steps=8 makes it 8\n')):
        with pytest.raises(SystemExit):
            ranges.check_accumulation(steps, batch_size, 4)
        err = capsys.readouterr().err
        assert words in err and f'gradient_accumulation_steps={steps} is not divisible' in err


def test_loss_falls(trained):
    evals = metrics(trained, 'eval')
    assert [e['iter'] for e in evals] == [0, 30, 60]
    # 19 characters: uniform guesses cost 2.9 nats
    assert evals[0]['val/loss'] > 2.4 and evals[-1]['val/loss'] < evals[0]['val/loss'] - 1.0
    # exactly max_iters updates
    assert [e['iter'] for e in metrics(trained, 'iter')] == list(range(60))
    head, = metrics(trained, 'run')
    assert head['config']['n_embd'] == 32 and head['argv'] and head['torch'] == torch.__version__
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    assert state['iter_num'] == 60
    assert state['best_val_loss'] == min(e['val/loss'] for e in evals)


def test_metrics_are_json_lines(trained):
    with open(os.path.join(trained, 'metrics.jsonl'), encoding='utf-8') as f:
        assert [json.loads(line)['event'] for line in f][:2] == ['run', 'eval']


def test_lines_people_parse(char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
              '--max_iters=2', '--eval_interval=2').stdout
    lines = out.splitlines()
    progress = [line for line in lines if line.startswith(('step ', 'iter '))]
    assert [line.split(':')[0] for line in progress] == ['step 0', 'iter 0', 'iter 1', 'step 2']
    assert re.fullmatch(r'step 0: train loss \d\.\d{4}, val loss \d\.\d{4}', progress[0])
    assert re.match(r'iter 0: loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a', progress[1])
    assert ('tokens per iteration will be: 256 = 2 micro-batches x 1 rank x 4 sequences x '
            '32 tokens') in out
    assert 'sample.py --out_dir' in lines[-1]


def test_max_iters_0_evaluates_saves_and_exits(char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
              '--max_iters=0').stdout
    assert 'step 0: train loss' in out and 'iter 0' not in out
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['iter_num'] == 0


def test_eval_only_evaluates_and_writes_nothing(trained, char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--eval_only']
    out = run('train.py', *args, f'--out_dir={tmp_path / "none"}').stdout
    assert 'step 0: train loss' in out and not (tmp_path / 'none').exists()
    before = list_files(trained)
    out = run('train.py', *args, f'--out_dir={trained}', '--init_from=resume',
              '--max_iters=60').stdout
    val = metrics(trained, 'eval')[-1]['val/loss']
    # the fixed batches give the same loss
    assert f'val loss {val:.4f}' in out and list_files(trained) == before


def test_evaluating_a_new_model_by_mistake(trained, char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--eval_only']
    words = f'not the one in {trained}: to evaluate that one use --init_from=resume'
    assert words in run_here('train.py', *args, f'--out_dir={trained}').stderr
    for flags in ([f'--out_dir={tmp_path}'], [f'--out_dir={trained}', '--init_from=resume']):
        assert not run_here('train.py', *args, *flags).stderr


@pytest.mark.parametrize('max_iters, is_over', [(59, True), (60, True), (61, False)])
def test_a_run_that_has_nothing_to_train_says_so(trained, char_data, tmp_path, max_iters, is_over):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    torch.save({**state, 'finished': False}, tmp_path / 'ckpt.pt')  # it was stopped
    out = run_here('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
                   '--init_from=resume', f'--max_iters={max_iters}').stdout
    text = f'is at iteration 60, so with max_iters={max_iters} it only evaluates and saves'
    assert (text in out) == is_over


def test_a_finished_run_says_so(trained, char_data):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={trained}',
              '--init_from=auto', '--max_iters=60').stdout
    assert 'is finished' in out and 'step' not in out


def test_only_the_best_goes_to_ckpt(char_data, tmp_path):
    # a learning rate that ruins the weights: what was best stays in ckpt.pt, and the newest state
    # goes to another file
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
            '--always_save_checkpoint=False', '--eval_interval=10']
    run('train.py', *args, '--max_iters=20')
    out = run('train.py', *args, '--max_iters=30', '--init_from=resume', '--learning_rate=100',
              '--decay_lr=False').stdout
    assert 'ckpt_last.pt after 30 iterations' in out
    best, last = (torch.load(tmp_path / name, weights_only=True)
                  for name in ('ckpt.pt', 'ckpt_last.pt'))
    assert best['iter_num'] == 20 and last['iter_num'] == 30
    assert last['best_val_loss'] == best['best_val_loss']
    out = run('train.py', *args, '--max_iters=31', '--init_from=auto').stdout
    assert 'at iteration 30' in out


def test_saves_between_evaluations(char_data, tmp_path):
    # the data is sound except for its middle, which this seed comes to in iteration 9
    for name in ('val.bin', 'meta.pkl'):
        shutil.copy(os.path.join(char_data, name), tmp_path)
    ids = np.fromfile(os.path.join(char_data, 'train.bin'), dtype=np.uint16)
    ids[10000:10100] = 999
    ids.tofile(tmp_path / 'train.bin')
    run('train.py', *TINY, f'--dataset={tmp_path}', f'--out_dir={tmp_path}', '--max_iters=500',
        '--eval_iters=1', '--eval_interval=1000', '--save_interval=2', '--seed=3', ok=None)
    # its batch is made while 8 is computed
    assert [e['iter'] for e in metrics(tmp_path, 'iter')] == list(range(8))
    assert torch.load(tmp_path / 'ckpt_last.pt', weights_only=True)['iter_num'] == 8
    assert not (tmp_path / 'ckpt.pt').exists()


def test_the_best_is_saved_even_right_after_a_resume(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
            '--always_save_checkpoint=False', '--eval_interval=10']
    run('train.py', *args, '--max_iters=10')
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    (tmp_path / 'ckpt.pt').unlink()
    torch.save({**state, 'best_val_loss': 9.0}, tmp_path / 'ckpt_last.pt')
    run('train.py', *args, '--max_iters=20', '--init_from=resume', '--learning_rate=100',
        '--decay_lr=False')
    best = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert best['iter_num'] == 10
    assert best['best_val_loss'] == pytest.approx(state['best_val_loss'])


def test_another_run_from_scratch_keeps_the_earlier_one(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}']
    kept = tmp_path / 'previous-1' / 'ckpt.pt'
    run('train.py', *args, '--max_iters=2')
    out = run('train.py', *args, '--max_iters=1').stdout
    assert 'already had a run' in out
    assert list_files(tmp_path) == ['ckpt.pt', 'metrics.jsonl', 'previous-1']
    assert list_files(tmp_path / 'previous-1') == ['ckpt.pt', 'metrics.jsonl']
    assert torch.load(kept, weights_only=True)['iter_num'] == 2
    assert len(metrics(tmp_path, 'run')) == 1
    # a run that ended before its first save doesn't take the place of one that was saved
    (tmp_path / 'ckpt.pt').unlink()
    run('train.py', *args, '--max_iters=1', '--init_from=auto')
    assert torch.load(kept, weights_only=True)['iter_num'] == 2
    assert len(metrics(tmp_path, 'run')) == 2


def test_bfloat16_on_a_cpu_is_honoured(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=5']
    out = run('train.py', *args, '--dtype=bfloat16', f'--out_dir={tmp_path / "b"}').stdout
    assert 'bfloat16 (set by you)' in out
    out = run('train.py', *args, '--dtype=float16', f'--out_dir={tmp_path / "f"}').stdout
    assert 'float32 (float16 needs CUDA' in out
    bf16, f32 = ([e['loss'] for e in metrics(tmp_path / d, 'iter')] for d in 'bf')
    assert bf16 != f32 and bf16 == pytest.approx(f32, abs=0.02)  # rounded, and close


def test_a_configuration_as_nanogpts_users_have_it(char_data, tmp_path):
    # what people have in their own files: cuda's backend, helper variables, a run name made of the
    # time
    (tmp_path / 'mine.py').write_text(
        'import time\nhead_size = 16\nn_head = 2\nn_embd = n_head * head_size\n'
        'backend = "nccl"\nwandb_run_name = "ft-" + str(time.time())\ncompile = False\n')
    out = run('train.py', 'mine.py', *[a for a in TINY if 'n_' not in a], '--n_layer=1',
              f'--dataset={char_data}', '--out_dir=out', '--max_iters=1', cwd=tmp_path)
    assert 'iter 0: loss' in out.stdout and (tmp_path / 'out' / 'ckpt.pt').exists()


def test_wandb_offline(char_data, tmp_path):
    # no key, no network and no mode set: it logs offline and says so
    out = run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out', '--max_iters=2',
              '--wandb_log=True', cwd=tmp_path, WANDB_MODE='', WANDB_API_KEY='',
              NETRC=str(tmp_path / 'netrc'), HOME=str(tmp_path))
    assert 'logs offline' in out.stderr and 'iter 1: loss' in out.stdout
    wandb = tmp_path / 'wandb'
    run_dir, = [name for name in os.listdir(wandb) if name.startswith('offline-run')]
    name, = [name for name in os.listdir(wandb / run_dir) if name.endswith('.wandb')]
    content = (wandb / run_dir / name).read_bytes()
    assert all(key in content for key in (b'train/loss', b'val/loss', b'iter', b'lr', b'mfu'))


def test_wandb_is_imported_only_when_asked_for():
    code = ''
    for path in ('train.py', os.path.join('runtime', 'report.py')):
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            code += f.read()
    lines = [line for line in code.splitlines() if 'import wandb' in line]
    assert len(lines) == 1 and lines[0].startswith('    import wandb')  # within a function


def test_resume_takes_its_shape_from_the_checkpoint(trained, char_data):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={trained}', '--init_from=resume',
            '--eval_only']
    out = run_here('train.py', *args, '--n_layer=5').stdout
    assert '(ignored, because the weights have other values: n_layer=5)' in out
    err = run_here('train.py', *args, '--block_size=64', ok=False).stderr
    assert 'block_size=64 is larger than the 32' in err


def test_a_run_cannot_continue_with_a_shorter_context(trained, char_data, tmp_path):
    shutil.copy(os.path.join(trained, 'ckpt.pt'), tmp_path)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--init_from=resume',
            '--block_size=16', '--max_iters=62']
    assert 'use --block_size=32' in run('train.py', *args, ok=False).stderr
    assert 'val loss' in run('train.py', *args, '--eval_only').stdout  # which saves nothing
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


def test_data_of_another_vocabulary_is_refused(trained, char_data, tmp_path):
    other, bare = tmp_path / 'other', tmp_path / 'bare'
    (tmp_path / 'other.txt').write_text('abcdefghij' * 100)
    run_here('data/text/prepare.py', f'--input={tmp_path / "other.txt"}', f'--out_dir={other}')
    args = [*TINY, f'--out_dir={trained}', '--init_from=resume', '--max_iters=70']
    err = run('train.py', *args, f'--dataset={other}', ok=False).stderr
    assert 'another dataset' in err
    # no table next to the data: then they would be GPT-2's BPE
    shutil.copytree(char_data, bare)
    (bare / 'meta.pkl').unlink()
    err = run('train.py', *args, f'--dataset={bare}', ok=False).stderr
    assert f'{bare} has no meta.pkl' in err and os.path.join(trained, 'ckpt.pt') in err
    assert '--dataset' in err
    (bare / 'meta.pkl').write_bytes(b'unreadable')
    err = run('train.py', *args, f'--dataset={bare}', ok=False).stderr
    assert f'{bare / "meta.pkl"} is not a readable table' in err
    assert 'prepare the dataset again' in err
    # ids that the vocabulary doesn't have: at an end of the file they are found before the first
    # step, in its middle with their batch
    for place in (0, 5000):
        folder = tmp_path / str(place)
        folder.mkdir()
        for name in ('val.bin', 'meta.pkl'):
            shutil.copy(os.path.join(char_data, name), folder)
        ids = np.fromfile(os.path.join(char_data, 'train.bin'), dtype=np.uint16)
        ids[place:place + 5000] = 999
        ids.tofile(folder / 'train.bin')
        out = run_here('train.py', *TINY, f'--dataset={folder}', f'--out_dir={folder / "out"}',
                       '--max_iters=3', ok=None)
        warning, error = out.stderr.splitlines()
        assert 'was written with other .bin files: train.bin' in warning and out.returncode == 1
        name = f'the train split of {folder}' if place else folder / 'train.bin'
        assert error.startswith(f'error: {name} has token id 999')


@pytest.mark.parametrize('log_interval', [1, 4])
def test_progress_lines_count_training_and_nothing_else(char_data, tmp_path, monkeypatch,
                                                        log_interval):
    # a clock that moves only in these places. Iteration i takes 2 * 2**i seconds, so that a sum
    # tells which iterations are in it. As on a GPU, they pass when the host waits for the device
    seconds = {'training': 0, 'evaluations': 0, 'saves': 0}
    queue, calls = [], itertools.count()
    forward, save = model.GPT.forward, RunDir.save
    gather, all_reduce_mean = distributed.gather, distributed.all_reduce_mean
    read = optimizers.BadSteps.read

    def wait(*args):
        seconds['training'] += sum(queue)
        queue.clear()

    def slow_forward(self, *args, **kwargs):
        if self.training:
            queue.append(2 ** (next(calls) // 2))  # of two micro-steps
        else:
            wait()
            seconds['evaluations'] += 2 ** 30
        return forward(self, *args, **kwargs)

    def slow_save(self, *args):
        seconds['saves'] += 2 ** 40
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(model.GPT, 'forward', slow_forward)
        patch.setattr(RunDir, 'save', slow_save)
        patch.setattr(machine, 'synchronize', wait)
        patch.setattr(optimizers.BadSteps, 'read', lambda *args: wait() or read(*args))
        patch.setattr(distributed, 'gather', lambda *args: wait() or gather(*args))
        patch.setattr(distributed, 'all_reduce_mean', lambda x: wait() or all_reduce_mean(x))
        patch.setattr(time, 'perf_counter', lambda: float(sum(seconds.values())))
        out = run_here('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
                       '--max_iters=13', '--eval_interval=3', '--save_interval=5',
                       f'--log_interval={log_interval}').stdout
    assert seconds == {'training': 2 ** 14 - 2, 'evaluations': 6 * 2 * 4 * 2 ** 30,
                       'saves': 7 * 2 ** 40}
    lines = metrics(tmp_path, 'iter')
    assert [e['iter'] for e in lines] == list(range(0, 13, log_interval))
    first = 0
    for e in lines:
        covered = range(first, e['iter'] + 1)
        assert e['ms'] * len(covered) == 1000 * sum(2 * 2 ** i for i in covered)
        assert f'iter {e["iter"]}: loss {e["loss"]:.4f}, time {e["ms"]:.2f}ms, ' in out
        first = e['iter'] + 1
    # plot.py's axis of seconds: training before each evaluation, as far as the lines tell
    iterations, evaluations = plot.read_metrics(tmp_path)
    places = dict(zip((e['iter'] for e in evaluations),
                      plot.locate(evaluations, iterations, 'seconds')))
    assert list(places) == [0, 3, 6, 9, 12, 13]
    for i in (0, 9, 13):
        assert places[i] == 2 * 2 ** i - 2


@pytest.mark.parametrize('poison', ['loss and gradient', 'loss'])
def test_what_is_not_finite_never_reaches_the_weights(char_data, tmp_path, monkeypatch, poison):
    # the same run twice: once with a bad loss in iteration 3, once without the update of iteration
    # 3
    args = [*TINY, f'--dataset={char_data}', '--max_iters=6', '--dropout=0.1', '--log_interval=1',
            '--eval_interval=100']
    forward, update = model.GPT.forward, optimizers.clip_and_step
    calls = {'forward': 0, 'step': 0}

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        calls['forward'] += self.training
        if calls['forward'] == 2 * 3 + 1 and self.training:  # of two micro-steps
            loss = loss * math.inf if poison == 'loss and gradient' else loss + math.inf
        return logits, loss

    def left_out(optimizer, *args):
        calls['step'] += 1
        return torch.zeros(()) if calls['step'] == 4 else update(optimizer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(model.GPT, 'forward', poisoned)
        err = run_here('train.py', *args, f'--out_dir={tmp_path / "poisoned"}').stderr
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, 'clip_and_step', left_out)
        run_here('train.py', *args, f'--out_dir={tmp_path / "left_out"}')
    assert calls == {'forward': 12, 'step': 6}
    assert ('iter 3: skipped updates, because their gradient was not finite: '
            '1 new, 1 in a row, 1 in all') in err
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)
            for name in ('poisoned', 'left_out'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(state[k], b['optimizer']['state'][i][k]) for k in state)
        assert state['step'] == 5
    lines = metrics(tmp_path / 'poisoned', 'iter')
    assert [e['bad_steps'] for e in lines] == [0, 0, 0, 1, 0, 0]
    assert lines[3]['grad_norm'] is None and lines[4]['grad_norm'] > 0


def run_with_bad_updates(monkeypatch, out_dir, iterations, *args):
    """A run whose loss isn't finite in these iterations, with a line every 10 iterations."""
    forward, calls = model.GPT.forward, itertools.count()

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if self.training and next(calls) // 2 in iterations:  # of two micro-steps
            loss = loss * math.inf
        return logits, loss

    with monkeypatch.context() as patch:
        patch.setattr(model.GPT, 'forward', poisoned)
        return run_here('train.py', *TINY, '--max_iters=30', '--log_interval=10',
                        '--eval_interval=100', f'--out_dir={out_dir}', *args, ok=None)


@pytest.mark.parametrize('max_bad_steps', [3, 4])
def test_a_streak_of_bad_updates_that_has_ended_stops_nothing(char_data, tmp_path, monkeypatch,
                                                              max_bad_steps):
    out = run_with_bad_updates(monkeypatch, tmp_path, (3, 4, 5), f'--dataset={char_data}',
                               f'--max_bad_steps={max_bad_steps}')
    assert out.returncode == 0 and 'error' not in out.stderr
    assert ('iter 10: skipped updates, because their gradient was not finite: '
            '3 new, 0 in a row, 3 in all') in out.stderr
    lines = metrics(tmp_path, 'iter')
    assert [(e['iter'], e['bad_steps'], e['skipped']) for e in lines] == [
        (0, 0, 0), (10, 0, 3), (20, 0, 3)]


@pytest.mark.parametrize('max_bad_steps, stops', [(3, True), (4, False)])
def test_a_streak_of_bad_updates_at_a_progress_line_stops_the_run(
        char_data, tmp_path, monkeypatch, max_bad_steps, stops):
    # 2 in a row count towards the 5 in all, but not towards the streak of 3
    out = run_with_bad_updates(monkeypatch, tmp_path, (4, 5, 8, 9, 10), f'--dataset={char_data}',
                               f'--max_bad_steps={max_bad_steps}')
    assert ('iter 10: skipped updates, because their gradient was not finite: '
            '5 new, 3 in a row, 5 in all') in out.stderr
    lines = [(e['iter'], e['bad_steps'], e['skipped']) for e in metrics(tmp_path, 'iter')]
    assert out.returncode == stops
    if not stops:
        assert lines == [(0, 0, 0), (10, 3, 5), (20, 0, 5)]
        return
    assert lines == [(0, 0, 0), (10, 3, 5)]
    assert out.stderr.splitlines()[-1].startswith('error: 3 updates in a row')
    assert checkpoint.load(str(tmp_path / 'ckpt_last.pt'))['iter_num'] == 11


@pytest.mark.parametrize('eval_interval, iterations', [(4, 5), (1000, 20)])
def test_bad_updates_are_reported_without_a_progress_line(char_data, tmp_path, eval_interval,
                                                          iterations):
    out = run_here('train.py', *TINY, f'--dataset={char_data}', '--max_iters=20',
                   '--learning_rate=1e30', '--decay_lr=False', '--max_bad_steps=3',
                   f'--out_dir={tmp_path}', '--log_interval=1000',
                   f'--eval_interval={eval_interval}', ok=None)
    assert out.returncode == 1 and 'sample from' not in out.stdout
    assert 'skipped updates' in out.stderr and '\nerror: ' in out.stderr
    assert checkpoint.load_newest(str(tmp_path))[0]['iter_num'] == iterations


@pytest.mark.parametrize('parallel', [
    '', *(pytest.param(mode, marks=pytest.mark.slow) for mode in ('ddp', 'zero1', 'fsdp'))])
def test_too_many_bad_gradients_end_the_run(char_data, tmp_path, parallel):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=20', '--learning_rate=1e30',
            '--decay_lr=False', '--max_bad_steps=3', f'--out_dir={tmp_path}', '--log_interval=2']
    if parallel:
        ranks = start_ranks(2, 'train.py', *args, f'--parallel={parallel}')
        err = [process.communicate()[1] for process in ranks][0]
    else:
        out = run('train.py', *args, ok=None)
        err = out.stderr
        assert out.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith('error: 4 updates in a row had a gradient that is not finite')
    assert '--learning_rate' in last and str(tmp_path / 'ckpt_last.pt') in last
    state = checkpoint.load(str(tmp_path / 'ckpt_last.pt'))
    assert state['iter_num'] == 5 and all(w.isfinite().all() for w in state['model'].values())


def test_the_whole_split_is_evaluated_once(char_data, trained):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={trained}', '--init_from=resume',
            '--eval_only', '--eval_iters=0']
    out = run('train.py', *args, '--batch_size=7').stdout
    gpt = restore.build_model(model.GPT, model.GPTConfig, *checkpoint.load_best(trained)).eval()
    val = np.fromfile(os.path.join(char_data, 'val.bin'), dtype=np.uint16)
    val = torch.from_numpy(val.astype(np.int64))
    nats = 0.0
    for i in range(0, len(val) - 1, 32):
        at = min(i, len(val) - 33)  # the last window begins before the end of the one before
        logits = gpt(val[None, at:at + 32], val[None, at + 1:at + 33])[0][0, i - at:]
        nats += torch.nn.functional.cross_entropy(logits.double(), val[i + 1:i + 33],
                                                  reduction='sum').item()
    loss = nats / (len(val) - 1)
    found = re.search(r'val loss (\S+), perplexity (\S+), (\S+) bits/byte', out)
    # a byte per character
    for said, meant in zip(found.groups(), (loss, math.exp(loss), loss / math.log(2))):
        digits = len(said) - 2
        assert said in (f'{meant - 1e-6:.{digits}f}', f'{meant + 1e-6:.{digits}f}')
    assert (len(val) - 1) % 32 and len(val) // 32 % 7
    split = ''.join(run_ranks(2, 'train.py', *args))
    assert re.search('val loss .*', split)[0] == re.search('val loss .*', out)[0]
