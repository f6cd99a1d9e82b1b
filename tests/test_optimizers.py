"""The optimizers against torch's, Muon on several ranks, and updates that must be skipped."""
import copy
import functools
import math
import os

import pytest
import torch
from conftest import FAST, ROOT, TINY, metrics, run, run_here, run_ranks
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters

from model import GPT, GPTConfig
from runtime import checkpoint, optimizers
from runtime.optimizers import (
    BadSteps,
    clip_and_step,
    compute_grad_norm,
    orthogonalize,
    specialize,
)

KINDS = [{}, dict(moments_dtype='bfloat16'), dict(optim='muon')]


def make_model(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 32, 2, 2, 32, bias=False, **options))


def make_optimizer(model, weight_decay=0.1, betas=(0.8, 0.95), optim='adamw',
                   moments_dtype='float32', momentum=0.95, dtype='float32'):
    optimizer = model.configure_optimizers(weight_decay, 1e-2, betas, 'cpu')
    return specialize(optimizer, optim, moments_dtype, momentum, model, dtype)


def list_params(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def update(model, optimizer, steps=3):
    """Makes updates by random gradients, always the same; returns a copy of the weights."""
    torch.manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# -----------------------------------------------------------------------------
# AdamW
def test_adamw_and_grad_norm_are_torchs():
    ours, theirs = make_model(), make_model()
    optimizer = make_optimizer(ours)
    assert type(optimizer) is torch.optim.AdamW
    groups = [dict(params=[p for p in theirs.parameters() if (p.dim() == 2) == decays],
                   weight_decay=0.1 * decays) for decays in (True, False)]
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), fused=True)
    for p, expected in zip(update(ours, optimizer), update(theirs, torchs)):
        assert torch.equal(p, expected)
    torch.testing.assert_close(optimizer.state_dict()['state'], torchs.state_dict()['state'],
                               rtol=0, atol=0)
    expected_norm = get_total_norm([p.grad for p in theirs.parameters()]).item()
    assert compute_grad_norm(optimizer).item() == pytest.approx(expected_norm, rel=1e-6)
    for p in ours.transformer.h.parameters():  # as if the loss didn't depend on them
        p.grad = None
    before = [p.detach().clone() for p in ours.transformer.h.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, ours.transformer.h.parameters()))
    assert compute_grad_norm(optimizer) > 0


def test_moments_in_bfloat16():
    full, low = (make_optimizer(make_model(), betas=(0.9, 0.95), moments_dtype=moments_dtype)
                 for moments_dtype in ('float32', 'bfloat16'))
    full_params, low_params = list_params(full), list_params(low)
    vector_to_parameters(parameters_to_vector(full_params), low_params)
    start = parameters_to_vector(full_params).detach()
    for step in range(30):
        for p, q in zip(full_params, low_params):
            p.grad = q.grad = torch.randn_like(p) * 1e-3 + 1e-3
        full.step()
        low.step()
        if step == 0:  # rounded after the update: the first one is exact
            assert all(map(torch.equal, full_params, low_params))
    for q in low_params:
        assert low.state[q]['exp_avg'].dtype == torch.bfloat16
        assert low.state[q]['exp_avg_sq'].dtype == torch.bfloat16
        assert low.state[q]['step'] == 30
    moved, low_moved = (parameters_to_vector(params).detach() - start
                        for params in (full_params, low_params))
    assert 0 < (moved - low_moved).norm() / moved.norm() < 0.01
    before = [q.clone() for q in low_params]
    state = {q: {key: value.clone() for key, value in low.state[q].items()} for q in low_params}
    low.found_inf = torch.ones(())  # a gradient that isn't finite changes nothing
    low_params[0].grad[0] = math.inf
    low.step()
    assert all(map(torch.equal, before, low_params))
    assert all(torch.equal(low.state[q][key], value)
               for q in state for key, value in state[q].items())


# -----------------------------------------------------------------------------
# all of them
@pytest.mark.parametrize('options', KINDS)
def test_gradients_are_clipped_on_the_way_into_the_update(options):
    models = make_model(), make_model()
    for model, scaled in zip(models, (True, False)):
        optimizer = make_optimizer(model, **options)
        torch.manual_seed(1)
        for size in (0.001, 30.0, 1.0):  # all of one size would make the same updates unclipped
            for p in model.parameters():
                p.grad = size * torch.randn_like(p)
            if scaled:
                norm = get_total_norm([p.grad for p in model.parameters()])
                optimizer.grad_scale = norm.clamp(min=1)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for ours, theirs in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [*KINDS, dict(optim='sgd')])
def test_clip_and_step_clips_and_skips(options):
    models, scaler = (make_model(), make_model()), torch.amp.GradScaler('cpu', enabled=False)
    if options == dict(optim='sgd'):  # somebody's own choice, which can't skip by itself
        optimizer, other = (torch.optim.SGD(model.parameters(), lr=1e-2) for model in models)
    else:
        optimizer, other = (make_optimizer(model, **options) for model in models)
    torch.manual_seed(1)
    for size in (0.001, 30.0, 1.0):
        for p, q in zip(*(model.parameters() for model in models)):
            p.grad = size * torch.randn_like(p)
            q.grad = p.grad.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        other.step()
        norm = clip_and_step(optimizer, scaler, 1.0)
        torch.testing.assert_close(norm, expected_norm)
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    before = [p.detach().clone() for p in models[0].parameters()]
    for value in (math.nan, math.inf):
        for p in models[0].parameters():
            p.grad = torch.ones_like(p)
        p.grad.view(-1)[0] = value
        assert not clip_and_step(optimizer, scaler, 0.0).isfinite()
        assert all(map(torch.equal, before, models[0].parameters()))


def test_skipped_updates_are_counted(capsys):
    bad_steps = BadSteps('cpu')
    for norm in (1.0, math.nan, 2.0, math.inf, math.nan):
        bad_steps.count(torch.tensor(norm))
    assert (bad_steps.streak, bad_steps.total) == (0, 0)  # not before it is read
    bad_steps.read(5)
    assert (bad_steps.streak, bad_steps.total) == (2, 3)
    warning = capsys.readouterr().err
    assert warning.startswith('warning: iter 5: skipped updates') and warning.count('\n') == 1
    bad_steps.count(torch.tensor(1.0))
    bad_steps.read(6)
    assert (bad_steps.streak, bad_steps.total) == (0, 3) and capsys.readouterr().err == ''


def test_a_run_clips_its_gradients(char_data, tmp_path):
    losses = {}
    for clip in ('0', '1e9', '0.1'):
        run('train.py', *TINY, f'--dataset={char_data}', '--max_iters=6', f'--grad_clip={clip}',
            f'--out_dir={tmp_path / clip}')
        losses[clip] = [event['loss'] for event in metrics(tmp_path / clip, 'iter')]
    assert len(losses['0']) == 6
    assert losses['0'] == losses['1e9'] != pytest.approx(losses['0.1'], rel=1e-5)
    # AdamW's first update doesn't depend on the gradient's size
    assert losses['0'][:2] == pytest.approx(losses['0.1'][:2], rel=1e-5)


@pytest.mark.parametrize('options', KINDS)
def test_an_update_that_found_inf_changes_nothing(options):
    model, twin = make_model(), make_model()
    optimizer, twin_optimizer = (make_optimizer(m, **options) for m in (model, twin))
    update(model, optimizer)
    update(twin, twin_optimizer)
    before = (copy.deepcopy(optimizer.state_dict()['state']),
              [p.detach().clone() for p in model.parameters()])
    for p in model.parameters():
        p.grad = torch.full_like(p, float('nan'))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = optimizer.state_dict()['state'], [p.detach() for p in model.parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    optimizer.found_inf = torch.zeros(())
    for p, expected in zip(update(model, optimizer), update(twin, twin_optimizer)):
        assert torch.equal(p, expected)


# -----------------------------------------------------------------------------
# Muon
def test_muon_takes_the_matrices_of_the_blocks():
    model = make_model(bigrams=60, rope_base=100.0, embd_conv=2, tied=False)
    frozen = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    others, vectors, matrices = make_optimizer(model, optim='muon').param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others['params']} == {
        'transformer.wte.weight', 'transformer.bigrams.weight', 'transformer.conv',
        'lm_head.weight'}
    assert len(vectors['params']) == 5 and all(p.dim() == 1 for p in vectors['params'])
    assert len(matrices['params']) == 7 and all(p.dim() == 2 for p in matrices['params'])
    assert all('.h.' in names[id(p)] and p is not frozen for p in matrices['params'])
    assert [group['weight_decay'] for group in (others, vectors, matrices)] == [0.1, 0.0, 0.1]
    assert ['momentum' in group for group in (others, vectors, matrices)] == [False, False, True]


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    ours, theirs = make_model(), make_model()
    weights = update(ours, make_optimizer(ours, weight_decay=10.0, optim='muon', momentum=0.9))
    matrices = [p for p in theirs.transformer.h.parameters() if p.dim() == 2]
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=10.0, momentum=0.9,
                            adjust_lr_fn='match_rms_adamw')
    groups = [dict(params=[p for p in rest if p.dim() == 2], weight_decay=10.0),
              dict(params=[p for p in rest if p.dim() == 1], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))

    class Both:
        def step(self):
            muon.step()
            adamw.step()

    expected_weights = update(theirs, Both())
    before = make_model().named_parameters()
    for (name, p), weight, expected in zip(before, weights, expected_weights):
        # torch computes Newton-Schulz in bfloat16, which makes some percent of difference
        tolerance = 0.03 if '.h.' in name and p.dim() == 2 else 1e-6
        assert (weight - expected).norm() < tolerance * (expected - p).norm()
        assert (weight - p).norm() > 0


def test_orthogonalize():
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(3, 20, 50), full_matrices=False)
    x = left @ torch.logspace(0, -2.5, 20).diag() @ right  # singular values of 1 to 0.003
    y = orthogonalize(x)
    assert y.shape == x.shape and torch.allclose(y, orthogonalize(x * 1e3), atol=1e-4)
    values = left.mT @ y @ right.mT  # diagonal, because the singular vectors are the same
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert ((0.6 < diagonal) & (diagonal < 1.3)).all()
    # the smallest ones are squared to 1e-5, of which float32 keeps two digits
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


def test_orthogonalize_in_float32_is_that_in_double():
    """On a CPU only x @ x.T is multiplied, where a singular value of 1e-3 is 1e-6."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(2, 30, 40), full_matrices=False)
    x = left @ torch.logspace(0, -5, 30).diag() @ right
    y = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
    assert (orthogonalize(x) - y).abs().max() < 1e-3 * y.abs().max()


def test_muon_multiplies_in_bfloat16_if_the_run_does():
    weights = {}
    for dtype in ('float32', 'bfloat16', 'float16'):
        model = make_model()
        optimizer = make_optimizer(model, optim='muon', dtype=dtype)
        weights[dtype] = update(*copy.deepcopy((model, optimizer)))  # a copy keeps the dtype
    for (name, p), wide, narrow, half in zip(make_model().named_parameters(), *weights.values()):
        assert torch.equal(half, wide)  # float16 has too few exponents
        change = (wide - narrow).norm() / (wide - p).norm()
        if '.h.' in name and p.dim() == 2:
            assert 0 < change < 0.05  # five steps of rounding to 8 bits; 0.037, also with AVX2
        else:
            assert change == 0


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_train_tells_muon_the_dtype(char_data, tmp_path, monkeypatch, dtype):
    dtypes = []

    def record(x, dtype):
        dtypes.append(dtype)
        return orthogonalize(x, dtype)

    monkeypatch.setattr(optimizers, 'orthogonalize', record)
    run_here('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--optim=muon',
             '--max_iters=1', f'--dtype={dtype}')
    assert set(dtypes) == {dtype}


def test_muon_can_be_copied():
    model = make_model()
    optimizer = make_optimizer(model, optim='muon')
    update(model, optimizer)
    state = optimizer.state_dict()['state']
    torch.testing.assert_close(copy.deepcopy(optimizer).state_dict()['state'], state,
                               rtol=0, atol=0)


SHARDED = f"""
import sys
sys.path.insert(0, {ROOT!r})
import torch
from model import GPT, GPTConfig
from runtime import distributed
from runtime.optimizers import specialize
rank = distributed.read_ranks()[0]
distributed.init('gloo', 'cpu')
torch.manual_seed(0)
model = distributed.shard_model(GPT(GPTConfig(16, 32, 2, 2, 32, bias=False)), 'cpu', 'fsdp')
optimizer = model.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu')
optimizer = specialize(optimizer, 'muon', 'float32', 0.9, model)
torch.manual_seed(1)
for _ in range(3):
    for p in model.parameters():
        p.grad = distributed.shard_like(torch.randn(p.shape), p)
    optimizer.step()
weights = distributed.gather([p.data for p in model.parameters()])
if rank == 0:
    torch.save(weights, sys.argv[1])
distributed.shutdown()
"""


@pytest.mark.parametrize('ranks', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_updates_are_equal_to_those_of_one_process(tmp_path, ranks):
    (tmp_path / 'sharded.py').write_text(SHARDED)
    run_ranks(ranks, str(tmp_path / 'sharded.py'), str(tmp_path / 'weights.pt'))
    model = make_model()
    expected = update(model, make_optimizer(model, optim='muon', momentum=0.9))
    torch.testing.assert_close(torch.load(tmp_path / 'weights.pt'), expected, rtol=1e-5, atol=1e-6)


# -----------------------------------------------------------------------------
# runs with Muon
@pytest.mark.parametrize('parallel, ranks', [
    ('ddp', 2), ('fsdp', 2), pytest.param('fsdp', 4, marks=pytest.mark.slow)])
def test_several_ranks_learn_the_same(char_data, tmp_path, parallel, ranks):
    args = [*TINY, *FAST, f'--dataset={char_data}', '--gradient_accumulation_steps=4',
            '--max_iters=20', '--eval_interval=10', '--dropout=0.1']
    run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    for max_iters in (11, 20):  # cut and resumed on the way
        outputs = run_ranks(ranks, 'train.py', *args, f'--out_dir={tmp_path / "many"}',
                            f'--parallel={parallel}', '--init_from=auto',
                            f'--max_iters={max_iters}')
    assert 'resumed from' in ''.join(outputs)
    one, many = ({event['iter']: event['loss'] for event in metrics(tmp_path / name, 'iter')}
                 for name in ('one', 'many'))
    assert len(one) == 20
    assert all(many[i] == pytest.approx(loss, abs=5e-3) for i, loss in one.items())
    state = checkpoint.load(str(tmp_path / 'many' / 'ckpt.pt'))['optimizer']
    assert ['momentum' in group for group in state['param_groups']] == [False, False, True]
    assert all(tuple(state['state'][i]) == ('momentum_buffer',)
               for i in state['param_groups'][2]['params'])


@pytest.mark.parametrize('setting', ['--parallel=zero1', '--moments_dtype=bfloat16'])
def test_what_muon_does_not_work_with(char_data, tmp_path, setting):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}',
              '--optim=muon', setting, ok=False)
    other = setting.removeprefix('--')
    assert out.stderr.startswith(f'error: optim=muon does not work with {other}')
    assert len(out.stderr.splitlines()) == 1 and not os.path.exists(tmp_path / 'out')


def test_a_run_cannot_change_its_optimizer(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}']
    run('train.py', *args, '--max_iters=2')
    out = run('train.py', *args, '--max_iters=4', '--init_from=resume', '--optim=muon', ok=False)
    assert 'but the optimizer is' in out.stderr and len(out.stderr.splitlines()) == 1


def test_a_run_continues_with_its_momentum(char_data, tmp_path):
    args = [*TINY, '--optim=muon', f'--dataset={char_data}', f'--out_dir={tmp_path}']
    run('train.py', *args, '--max_iters=2', '--momentum=0.8')
    out = run('train.py', *args, '--max_iters=4', '--init_from=resume', '--momentum=0.7').stdout
    assert 'momentum=0.8 come from the checkpoint' in out
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))['optimizer']
    assert state['param_groups'][2]['momentum'] == 0.8


@pytest.mark.parametrize('optim', ['adamw', 'muon'])
def test_a_function_around_the_step_of_all_optimizers(optim, monkeypatch):
    model, calls = make_model(), []
    step = torch.optim.AdamW.step

    @functools.wraps(step)
    def log(self, *args):
        calls.append(self)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, 'step', log)
    optimizer = make_optimizer(model, optim=optim)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip_and_step(optimizer, torch.amp.GradScaler('cpu', enabled=False), 1.0)
    assert calls == [optimizer]
