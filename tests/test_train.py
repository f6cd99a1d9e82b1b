"""The training loop: its helpers on their own, and runs of the script as people start them."""
import functools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, files, functions_of, metrics, run, run_here, run_ranks, start_ranks

import checkpoint
import model
import optimizers
from checkpoint import build_model, load_best
from tokenizer import get_tokenizer, mean_bytes


def test_learning_rates_are_nanogpts(golden):
    for schedule in golden['lr_schedules']:
        rates = schedule.pop('lr')
        get_lr, = functions_of('train.py', 'get_lr', math=math, lr_schedule='cosine', **schedule)
        for it, lr in rates.items():
            assert get_lr(int(it)) == pytest.approx(lr, rel=1e-12), it
        schedule['lr'] = rates


@pytest.mark.parametrize('warmup, decay', [(100, 100), (100, 5)])
def test_a_trial_shorter_than_its_warmup(warmup, decay):
    get_lr, = functions_of('train.py', 'get_lr', math=math, lr_schedule='cosine', learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, lr_decay_iters=decay)
    assert get_lr(0) == 1 / 101 and get_lr(99) == 100 / 101 and get_lr(100) == 0.1


def test_wsd_warms_up_stays_and_decays():
    get_lr, = functions_of('train.py', 'get_lr', math=math, learning_rate=1.0, min_lr=0.2, warmup_iters=9, lr_decay_iters=100, lr_schedule='wsd',
                           decay_share=0.4)
    assert [get_lr(it) for it in (0, 4)] == pytest.approx([0.1, 0.5]) and {get_lr(it) for it in range(9, 61)} == {1.0}
    assert [get_lr(it) for it in (70, 80, 99, 100, 200)] == pytest.approx([0.8, 0.6, 0.22, 0.2, 0.2])



def batches(data, world_size=1, rank=0, accumulation=4, batch_size=3, block_size=8, seed=1337, data_order='random', iterations=range(200)):
    """The micro-batches of train.py as {(iter_num, micro_step): (x, y)} over data."""
    windows = {'train': np.lib.stride_tricks.sliding_window_view(data, block_size + 1)}
    import checks

    class raw_model:
        class config:
            vocab_size = 2 ** 16

    philox = np.random.Philox(key=seed)
    get_micro_batch, *_ = functions_of(
        'train.py', 'get_micro_batch', 'get_batch', 'epoch_starts', np=np, torch=torch, os=os, functools=functools, checks=checks, windows=windows,
        data_dir='', raw_model=raw_model, device='cpu', device_type='cpu', seed=seed, data_order=data_order, gradient_accumulation_steps=accumulation,
        philox=philox, philox_state=philox.state,
        batch_size=batch_size, block_size=block_size, per_epoch=max(1, (len(data) - block_size) // block_size), ddp_world_size=world_size, ddp_rank=rank)
    return {(it, m): get_micro_batch(it, m) for it in iterations for m in range(accumulation // world_size)}


@pytest.mark.parametrize('data_order', ['random', 'epochs'])
def test_batches_are_a_function_of_seed_and_iteration(data_order):
    data = np.arange(100, dtype=np.uint16)
    one = batches(data, data_order=data_order)
    if data_order == 'random':  # the draw of the counter-based generator that checkpoints of any age count on
        raw = np.random.Philox(key=1337, counter=[0, 0, 0, 7]).random_raw(12)
        assert torch.cat([one[7, m][0][:, 0] for m in range(4)]).tolist() == (raw % 92).tolist()
    for (it, m), (x, y) in one.items():
        assert x.shape == y.shape == (3, 8) and x.dtype == torch.int64
        assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(8))  # targets are the next tokens
    # the same on two ranks, where each takes every other micro-batch, and with the iteration cut up otherwise
    for rank in (0, 1):
        for (it, m), (x, y) in batches(data, world_size=2, rank=rank, data_order=data_order, iterations=(199, 3, 7, 0)).items():
            assert torch.equal(x, one[it, 2 * m + rank][0])
    for it, m in [(0, 0), (7, 1)]:
        x, _ = batches(data, accumulation=2, batch_size=6, data_order=data_order)[it, m]
        assert torch.equal(x, torch.cat((one[it, 2 * m][0], one[it, 2 * m + 1][0])))
    assert not torch.equal(batches(data, seed=1, data_order=data_order)[0, 0][0], one[0, 0][0]) and not torch.equal(one[1, 0][0], one[0, 0][0])
    if data_order == 'epochs':  # 11 sequences side by side, in another order and from another first one each time
        epochs = torch.cat([x[:, 0] for x, _ in one.values()])[:2398].view(218, 11)
        firsts = epochs.min(dim=1).values
        assert ((epochs.sort(dim=1).values - firsts[:, None]) == 8 * torch.arange(11)).all() and firsts.unique().tolist() == list(range(12))
        return
    # every start that leaves room for a target, and about equally often: 2,400 draws of 92
    counts = torch.cat([x[:, 0] for x, _ in one.values()]).bincount(minlength=92)
    assert len(counts) == 92 and (counts - 26.1).abs().max() < 5 * 26.1 ** 0.5


def test_loss_falls(trained):
    evals = metrics(trained, 'eval')
    assert [e['iter'] for e in evals] == [0, 30, 60]
    # 14 characters: uniform guesses cost 2.6 nats
    assert evals[0]['val/loss'] > 2.4 and evals[-1]['val/loss'] < evals[0]['val/loss'] - 1.0
    assert [e['iter'] for e in metrics(trained, 'iter')] == list(range(60))  # exactly max_iters updates
    head, = metrics(trained, 'run')
    assert head['config']['n_embd'] == 32 and head['argv'] and head['torch'] == torch.__version__
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    assert state['iter_num'] == 60 and state['best_val_loss'] == min(e['val/loss'] for e in evals)


def test_lines_people_parse(char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=2', '--eval_interval=2').stdout
    lines = out.splitlines()
    pattern = [line for line in lines if line.startswith(('step ', 'iter '))]
    assert [line.split(':')[0] for line in pattern] == ['step 0', 'iter 0', 'iter 1', 'step 2']
    assert re.fullmatch(r'step 0: train loss \d\.\d{4}, val loss \d\.\d{4}', pattern[0])
    assert re.match(r'iter 0: loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a', pattern[1])
    assert '256 tokens/iter = 2 accumulation x 1 ranks x 4 batch x 32 block' in out and 'sample.py --out_dir' in lines[-1]


def test_max_iters_0_evaluates_saves_and_exits(char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=0').stdout
    assert 'step 0: train loss' in out and 'iter 0' not in out
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['iter_num'] == 0


def test_eval_only_evaluates_and_writes_nothing(trained, char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "none"}', '--eval_only').stdout
    assert 'step 0: train loss' in out and not (tmp_path / 'none').exists()
    before = files(trained)
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={trained}', '--eval_only', '--init_from=resume', '--max_iters=60').stdout
    val = metrics(trained, 'eval')[-1]['val/loss']
    assert f'val loss {val:.4f}' in out and files(trained) == before  # the fixed batches give the same loss


def test_a_finished_run_says_so(trained, char_data):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={trained}', '--init_from=auto', '--max_iters=60').stdout
    assert 'is finished' in out and 'step' not in out


def test_only_the_best_goes_to_ckpt(char_data, tmp_path):
    # a learning rate that ruins the weights: what was best stays in ckpt.pt, the newest state goes beside it
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--always_save_checkpoint=False', '--eval_interval=10']
    run('train.py', *args, '--max_iters=20')
    out = run('train.py', *args, '--max_iters=30', '--init_from=resume', '--learning_rate=100', '--decay_lr=False').stdout
    assert 'ckpt_last.pt after 30 iterations' in out
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ('ckpt.pt', 'ckpt_last.pt'))
    assert best['iter_num'] == 20 and last['iter_num'] == 30 and last['best_val_loss'] == best['best_val_loss']
    out = run('train.py', *args, '--max_iters=31', '--init_from=auto').stdout
    assert 'at iteration 30' in out


def test_saves_between_evaluations(char_data, tmp_path):
    # the data is sound but for its middle, which this seed comes to in iteration 9
    for name in ('val.bin', 'meta.pkl'):
        shutil.copy(os.path.join(char_data, name), tmp_path)
    ids = np.fromfile(os.path.join(char_data, 'train.bin'), dtype=np.uint16)
    ids[10000:10100] = 999
    ids.tofile(tmp_path / 'train.bin')
    run('train.py', *TINY, f'--dataset={tmp_path}', f'--out_dir={tmp_path}', '--max_iters=500', '--eval_iters=1', '--eval_interval=1000', '--save_interval=2',
        '--seed=3', ok=False)
    assert [e['iter'] for e in metrics(tmp_path, 'iter')] == list(range(8))  # its batch is made while 8 is computed
    assert torch.load(tmp_path / 'ckpt_last.pt', weights_only=True)['iter_num'] == 8 and not (tmp_path / 'ckpt.pt').exists()


def test_the_best_is_saved_even_right_after_a_resume(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--always_save_checkpoint=False', '--eval_interval=10']
    run('train.py', *args, '--max_iters=10')
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    (tmp_path / 'ckpt.pt').unlink()
    torch.save({**state, 'best_val_loss': 9.0}, tmp_path / 'ckpt_last.pt')
    run('train.py', *args, '--max_iters=20', '--init_from=resume', '--learning_rate=100', '--decay_lr=False')
    best = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert best['iter_num'] == 10 and best['best_val_loss'] == pytest.approx(state['best_val_loss'])


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_on_a_gpu(char_data, tmp_path, dtype):
    args = [a for a in TINY if not a.startswith(('--device', '--dtype'))]
    out = run('train.py', *args, f'--dtype={dtype}', '--device=cuda', f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=60', '--eval_interval=30')
    assert 'cuda:0' in out.stdout and ', compiled' in out.stdout
    evals = metrics(tmp_path, 'eval')
    assert evals[-1]['val/loss'] < evals[0]['val/loss'] - 1.0
    run('train.py', *args, f'--dtype={dtype}', '--device=cuda', f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=62', '--init_from=resume')
    assert run('sample.py', f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=50').stdout.count('-' * 15) == 2
    assert json.loads(run('bench.py', '--n_layer=2', '--n_embd=128', '--n_head=2', '--batch_size=4', f'--dtype={dtype}').stdout.splitlines()[-1])['mfu'] != 0


def test_another_run_from_scratch_keeps_the_earlier_one(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}']
    run('train.py', *args, '--max_iters=2')
    out = run('train.py', *args, '--max_iters=1').stdout
    assert 'held another run' in out and files(tmp_path) == ['ckpt.pt', 'metrics.jsonl', 'previous']
    assert files(tmp_path / 'previous') == ['ckpt.pt', 'metrics.jsonl']
    assert torch.load(tmp_path / 'previous' / 'ckpt.pt', weights_only=True)['iter_num'] == 2
    assert len(metrics(tmp_path, 'run')) == 1
    (tmp_path / 'ckpt.pt').unlink()  # a run that ended before its first save doesn't take the place of one that was saved
    run('train.py', *args, '--max_iters=1', '--init_from=auto')
    assert torch.load(tmp_path / 'previous' / 'ckpt.pt', weights_only=True)['iter_num'] == 2 and len(metrics(tmp_path, 'run')) == 2


def test_bfloat16_on_a_cpu_is_honoured(char_data, tmp_path):
    out = run('train.py', *TINY, '--dtype=bfloat16', f'--dataset={char_data}', f'--out_dir={tmp_path / "b"}', '--max_iters=5').stdout
    assert 'bfloat16 (as asked)' in out
    out = run('train.py', *TINY, '--dtype=float16', f'--dataset={char_data}', f'--out_dir={tmp_path / "f"}', '--max_iters=5').stdout
    assert 'float32 (float16 needs CUDA' in out
    bf16, f32 = ([e['loss'] for e in metrics(tmp_path / d, 'iter')] for d in 'bf')
    assert bf16 != f32 and bf16 == pytest.approx(f32, abs=0.02)  # rounded, and close


def test_an_explicit_configuration_of_nanogpts(char_data, tmp_path):
    # what people have in their own files: cuda's backend, helper variables, a run name made of the time
    (tmp_path / 'mine.py').write_text('import time\nhead_size = 16\nn_head = 2\nn_embd = n_head * head_size\nbackend = "nccl"\n'
                                      'wandb_run_name = "ft-" + str(time.time())\ncompile = False\n')
    out = run('train.py', 'mine.py', *[a for a in TINY if 'n_' not in a], '--n_layer=1', f'--dataset={char_data}', '--out_dir=out', '--max_iters=1',
              cwd=tmp_path)
    assert 'iter 0: loss' in out.stdout and (tmp_path / 'out' / 'ckpt.pt').exists()


def test_wandb_offline(char_data, tmp_path):
    # no key, no network and no mode set: it goes on offline and says so
    out = run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out', '--max_iters=2', '--wandb_log=True', cwd=tmp_path,
              WANDB_MODE='', WANDB_API_KEY='', NETRC=str(tmp_path / 'netrc'), HOME=str(tmp_path))
    assert 'logs offline' in out.stderr and 'iter 1: loss' in out.stdout
    run_dir, = [name for name in os.listdir(tmp_path / 'wandb') if name.startswith('offline-run')]
    name, = [name for name in os.listdir(tmp_path / 'wandb' / run_dir) if name.endswith('.wandb')]
    content = (tmp_path / 'wandb' / run_dir / name).read_bytes()
    assert all(key in content for key in (b'train/loss', b'val/loss', b'iter', b'lr', b'mfu'))


def test_wandb_is_imported_only_when_asked_for():
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as f:
        assert [line for line in f.read().splitlines() if 'import wandb' in line] == ['    import wandb']


def test_without_arguments_it_says_what_to_do(tmp_path):
    if os.path.exists(os.path.join(ROOT, 'data', 'openwebtext', 'train.bin')):
        pytest.skip('openwebtext is prepared here: python train.py would train on it')
    out = run('train.py', ok=False, cwd=tmp_path)
    assert 'openwebtext is not prepared' in out.stderr and '54 GB' in out.stderr
    assert 'data/openwebtext/prepare.py' in out.stderr and 'config/train_python_char.py' in out.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize('args, words', [
    (['--n_embd=30', '--n_head=4'], 'n_embd=30 is not divisible by n_head=4'), (['--n_layer=0'], 'n_layer=0'), (['--batch_size=0'], 'batch_size=0'),
    (['--n_head=0'], 'n_head=0'), (['--n_embd=0'], 'n_embd=0'), (['--block_size=0'], 'block_size=0'), (['--max_bad_steps=0'], 'max_bad_steps=0'),
    (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps=0'), (['--max_iters=-1'], 'max_iters=-1'), (['--beta1=-0.1'], 'beta1=-0.1'),
    (['--learningrate=1'], 'unknown knob --learningrate (did you mean --learning_rate?)'),
    (['--batch_size=many'], "--batch_size needs a whole number, not 'many'"),
    (['config/nowhere.py'], 'no config file config/nowhere.py'),
    (['--dropout=1.5'], 'dropout=1.5'), (['--beta2=1'], 'beta2=1'), (['--eval_interval=0'], 'eval_interval=0'), (['--log_interval=0'], 'log_interval=0'),
    (['--device=tpu9'], "'tpu9'"), (['--device=cuda:7'], 'cuda:7'), (['--dtype=int8'], "'int8'"), (['--compile=fast'], "'fast'"),
    (['--parallel=all'], "parallel='all'"),
    (['--init_from=gpt3'], "'gpt3'"), (['--init_from=resume'], 'no checkpoint'), (['--dataset=nowhere'], "no dataset 'nowhere'"),
    (['--block_size=100000'], 'fewer than block_size + 1'), (['--learning_rate=-1'], 'learning_rate=-1'), (['--seed=-1'], 'seed=-1'),
    (['--out_dir=/dev/null/x'], '/dev/null/x'), (['--out_dir='], "''"),
])
def test_mistakes_end_in_one_line_and_write_nothing(char_data, tmp_path, args, words):
    if args == ['--device=cuda:7'] and torch.cuda.device_count() > 7:
        pytest.skip('there is such a device')
    out = run_here('train.py', f'--dataset={char_data}', '--device=cpu', '--out_dir=out', *args, ok=False, cwd=tmp_path)
    assert words in out.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize('env, words', [
    (dict(RANK='0', WORLD_SIZE='2'), 'RANK and WORLD_SIZE in the environment, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
    (dict(LOCAL_RANK='0'), 'LOCAL_RANK'), (dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='4'), 'MASTER_ADDR')])
def test_without_torchruns_variables(char_data, tmp_path, env, words):
    out = run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out', ok=False, cwd=tmp_path, **env)
    assert words in out.stderr and 'torchrun' in out.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize('flags, words', [
    (['--warmup_iters=100', '--lr_decay_iters=5'], 'lr_decay_iters=5 is not above warmup_iters=100'),
    (['--warmup_iters=5', '--lr_decay_iters=5'], 'never decays'), (['--min_lr=0.1'], 'min_lr=0.1 is above learning_rate=0.003'),
    (['--min_lr=0', '--lr_decay_iters=1', '--max_iters=2'], 'the learning rate is 0 from iteration 1 on; set --lr_decay_iters=2'),
    (['--min_lr=0.1', '--decay_lr=False'], ''), ([], '')])
def test_what_may_surprise_is_said_and_accepted(char_data, tmp_path, flags, words):
    err = run_here('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=1', *flags).stderr
    assert words in err and err.count('warning: ') == bool(words) == err.count('\n')


def test_resume_takes_its_shape_from_the_checkpoint(trained, char_data):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={trained}', '--init_from=resume', '--eval_only']
    assert 'overrules n_layer=5' in run_here('train.py', *args, '--n_layer=5').stdout
    assert 'block_size=64 is larger than the 32' in run_here('train.py', *args, '--block_size=64', ok=False).stderr


def test_resume_with_a_shorter_context(trained, char_data, tmp_path):
    shutil.copy(os.path.join(trained, 'ckpt.pt'), tmp_path)
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--init_from=resume', '--block_size=16', '--max_iters=62']
    assert 'iter 61: loss' in run('train.py', *args).stdout
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert state['model_args']['block_size'] == 16 and state['model']['transformer.wpe.weight'].shape == (16, 32)
    assert state['optimizer']['state'][1]['exp_avg'].shape == (16, 32)


def test_data_of_another_vocabulary_is_refused(trained, char_data, tmp_path):
    (tmp_path / 'other.txt').write_text('abcdefghij' * 100)
    run_here('data/text/prepare.py', f'--input={tmp_path / "other.txt"}', f'--out_dir={tmp_path / "other"}')
    out = run('train.py', *TINY, f'--dataset={tmp_path / "other"}', f'--out_dir={trained}', '--init_from=resume', '--max_iters=70', ok=False)
    assert 'another dataset' in out.stderr
    # no table beside the data: then they would be GPT-2's BPE
    shutil.copytree(char_data, tmp_path / 'bare')
    (tmp_path / 'bare' / 'meta.pkl').unlink()
    out = run('train.py', *TINY, f'--dataset={tmp_path / "bare"}', f'--out_dir={trained}', '--init_from=resume', '--max_iters=70', ok=False)
    assert f'{tmp_path / "bare"} has no meta.pkl' in out.stderr and os.path.join(trained, 'ckpt.pt') in out.stderr and '--dataset' in out.stderr
    (tmp_path / 'bare' / 'meta.pkl').write_bytes(b'unreadable')
    out = run('train.py', *TINY, f'--dataset={tmp_path / "bare"}', f'--out_dir={trained}', '--init_from=resume', '--max_iters=70', ok=False)
    assert f'{tmp_path / "bare" / "meta.pkl"} is not a readable table' in out.stderr and 'prepare the dataset again' in out.stderr
    # ids that the vocabulary doesn't have: at an end of the file before the first step, in its middle with the batch
    for where, started in ((0, False), (5000, True)):
        folder = tmp_path / str(where)
        folder.mkdir()
        for name in ('val.bin', 'meta.pkl'):
            (folder / name).write_bytes(open(os.path.join(char_data, name), 'rb').read())
        ids = np.fromfile(os.path.join(char_data, 'train.bin'), dtype=np.uint16)
        ids[where:where + 5000] = 999
        ids.tofile(folder / 'train.bin')
        out = run_here('train.py', *TINY, f'--dataset={folder}', f'--out_dir={folder / "out"}', '--max_iters=3', ok=False)
        assert 'token id 999' in out.stderr and 'train.bin' in out.stderr


def test_metrics_are_json_lines(trained):
    with open(os.path.join(trained, 'metrics.jsonl'), encoding='utf-8') as f:
        assert [json.loads(line)['event'] for line in f][:2] == ['run', 'eval']


@pytest.mark.parametrize('poison', ['loss and gradient', 'loss'])
def test_what_is_not_finite_never_reaches_the_weights(char_data, tmp_path, monkeypatch, poison):
    # the same run twice: one with a poisoned loss in iteration 3, one that leaves out the update of iteration 3
    args = [*TINY, f'--dataset={char_data}', '--max_iters=6', '--dropout=0.1', '--log_interval=1', '--eval_interval=100']
    forward, step, calls = model.GPT.forward, optimizers.AdamW.step, {'forward': 0, 'step': 0}

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        calls['forward'] += self.training
        if calls['forward'] == 2 * 3 + 1 and self.training:  # of two micro-steps
            loss = loss * math.inf if poison == 'loss and gradient' else loss + math.inf
        return logits, loss

    def left_out(self, *args, **kwargs):
        calls['step'] += 1
        return None if calls['step'] == 4 else step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.GPT, 'forward', poisoned)
        err = run_here('train.py', *args, f'--out_dir={tmp_path / "poisoned"}').stderr
    with monkeypatch.context() as patch:
        patch.setattr(optimizers.AdamW, 'step', left_out)
        run_here('train.py', *args, f'--out_dir={tmp_path / "left_out"}')
    assert calls == {'forward': 12, 'step': 6} and 'iter 3: skipped updates, as their gradient was not finite: 1 in a row, 1 in all' in err
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('poisoned', 'left_out'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    for i, state in a['optimizer']['state'].items():
        assert all(torch.equal(state[k], b['optimizer']['state'][i][k]) for k in state) and state['step'] == 5
    lines = metrics(tmp_path / 'poisoned', 'iter')
    assert [e['bad_steps'] for e in lines] == [0, 0, 0, 1, 0, 0] and lines[3]['grad_norm'] is None and lines[4]['grad_norm'] > 0


def test_skipped_updates_between_two_lines_count(char_data, tmp_path, monkeypatch):
    forward, calls = model.GPT.forward, []

    def poisoned(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        calls.append(self.training)
        return logits, loss * math.inf if self.training and 3 * 2 < sum(calls) <= 6 * 2 else loss  # iterations 3, 4 and 5, of two micro-steps

    monkeypatch.setattr(model.GPT, 'forward', poisoned)
    args = [*TINY, f'--dataset={char_data}', '--max_iters=30', '--log_interval=10', '--eval_interval=100']
    err = run_here('train.py', *args, '--max_bad_steps=4', f'--out_dir={tmp_path / "passes"}').stderr
    assert 'iter 10: skipped updates, as their gradient was not finite: 3 in a row, 3 in all' in err
    assert [(e['bad_steps'], e['skipped']) for e in metrics(tmp_path / 'passes', 'iter')] == [(0, 0), (3, 3), (0, 3)]
    calls.clear()
    out = run_here('train.py', *args, '--max_bad_steps=3', f'--out_dir={tmp_path / "stops"}', ok=None)
    assert out.returncode == 1 and out.stderr.splitlines()[-1].startswith('error: 3 updates in a row')


@pytest.mark.parametrize('parallel', ['', *(pytest.param(mode, marks=pytest.mark.slow) for mode in ('ddp', 'zero1', 'fsdp'))])
def test_too_many_bad_gradients_end_the_run(char_data, tmp_path, parallel):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=20', '--learning_rate=1e30', '--decay_lr=False', '--max_bad_steps=3',
            f'--out_dir={tmp_path}', '--log_interval=2']
    ranks = [process.communicate()[1] for process in start_ranks(2, 'train.py', *args, f'--parallel={parallel}')] if parallel else None
    bad = None if parallel else run('train.py', *args, ok=None)
    last = (ranks[0] if parallel else bad.stderr).splitlines()[-1]
    assert (parallel or bad.returncode == 1) and last.startswith('error: 4 updates in a row had a gradient that is not finite') and '--learning_rate' in last
    state = checkpoint.load(str(tmp_path / 'ckpt_last.pt'))
    assert state['iter_num'] == 5 and all(w.isfinite().all() for w in state['model'].values()) and str(tmp_path / 'ckpt_last.pt') in last


def test_the_whole_split_is_evaluated_once(tmp_path, char_data, trained):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={trained}', '--init_from=resume', '--eval_only', '--eval_iters=0']
    out = run('train.py', *args, '--batch_size=7').stdout
    model = build_model(load_best(trained)[0]).eval()
    val = torch.from_numpy(np.fromfile(os.path.join(char_data, 'val.bin'), dtype=np.uint16).astype(np.int64))
    nats = 0.0
    for i in range(0, len(val) - 1, 32):
        at = min(i, len(val) - 33)  # the last window begins before the end of the one before
        logits = model(val[None, at:at + 32], val[None, at + 1:at + 33])[0][0, i - at:]
        nats += torch.nn.functional.cross_entropy(logits.double(), val[i + 1:i + 33], reduction='sum').item()
    loss = nats / (len(val) - 1)
    found = re.search(r'val loss (\S+), perplexity (\S+), (\S+) bits/byte', out)
    for said, meant in zip(found.groups(), (loss, math.exp(loss), loss / math.log(2))):  # a byte a character
        assert said in (f'{meant - 1e-6:.{len(said) - 2}f}', f'{meant + 1e-6:.{len(said) - 2}f}')
    assert (len(val) - 1) % 32 and len(val) // 32 % 7
    split = ''.join(run_ranks(2, 'train.py', *args))
    assert re.search('val loss .*', split)[0] == re.search('val loss .*', out)[0]


def test_bytes_of_a_token(bpe):
    text = 'naïve 東京 🙂, it is.'
    meta = {'vocab_size': 99, 'itos': dict(enumerate(sorted(set(text)))), 'stoi': {c: i for i, c in enumerate(sorted(set(text)))}}
    for table in (meta, None):
        ids = get_tokenizer(table).encode(text)
        assert mean_bytes(np.array(ids * 3, dtype=np.uint16), table) == pytest.approx(len(text.encode()) / len(ids))
    assert mean_bytes(np.array(ids + [50256]), None) == pytest.approx(len(text.encode()) / (len(ids) + 1))
    assert mean_bytes(np.array(ids), {'vocab_size': 99}) is None
    assert mean_bytes(np.array([50300, 262]), None) == 2  # ' the', and a row that pads the embedding
