"""Muon against torch's, against itself in parts, and where an update must not be made."""
import copy
import os

import pytest
import torch
from conftest import FAST, ROOT, TINY, metrics, run, run_ranks

import checkpoint
from model import GPT, GPTConfig
from optimizers import orthogonalize, total_norm


def small(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 32, 2, 2, 32, bias=False, **options))


def updated(model, optimizer, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    ours, theirs = small(), small()
    made = updated(ours, ours.configure_optimizers(10.0, 1e-2, (0.8, 0.95), 'cpu', optim='muon', momentum=0.9))
    matrices = [p for p in theirs.transformer.h.parameters() if p.dim() == 2]
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=10.0, momentum=0.9, adjust_lr_fn='match_rms_adamw')
    adamw = torch.optim.AdamW([dict(params=[p for p in rest if p.dim() == 2], weight_decay=10.0),
                               dict(params=[p for p in rest if p.dim() == 1], weight_decay=0.0)], lr=1e-2, betas=(0.8, 0.95))

    class Both:
        def step(self):
            muon.step()
            adamw.step()

    before = small()
    for (name, p), made_of_it, theirs_of_it in zip(before.named_parameters(), made, updated(theirs, Both())):
        # torch's is computed in bfloat16, of which Newton-Schulz makes some percent
        assert (made_of_it - theirs_of_it).norm() < (0.03 if '.h.' in name and p.dim() == 2 else 1e-6) * (theirs_of_it - p).norm()
        assert (made_of_it - p).norm() > 0


def test_orthogonalize():
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(3, 20, 50), full_matrices=False)
    x = left @ torch.logspace(0, -2.5, 20).diag() @ right  # values of 1 to 0.003
    y = orthogonalize(x)
    assert y.shape == x.shape and torch.allclose(y, orthogonalize(x * 1e3), atol=1e-4)
    values = left.mT @ y @ right.mT  # diagonal: the same singular vectors
    assert ((0.6 < values.diagonal(dim1=1, dim2=2)) & (values.diagonal(dim1=1, dim2=2) < 1.3)).all()
    assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


@pytest.mark.parametrize('options', [{}, dict(moments_dtype='bfloat16'), dict(optim='muon')])
def test_gradients_are_clipped_on_the_way_into_the_update(options):
    models = small(), small()
    for model, scaled in zip(models, (True, False)):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu', **options)
        torch.manual_seed(1)
        for size in (0.001, 30.0, 1.0):  # all of one size would make the same updates unclipped
            for p in model.parameters():
                p.grad = size * torch.randn_like(p)
            if scaled:
                optimizer.grad_scale = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).clamp(min=1)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for ours, theirs in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_run_clips_its_gradients(char_data, tmp_path):
    logged = {}
    for clip in ('0', '1e9', '0.1'):
        run('train.py', *TINY, f'--dataset={char_data}', '--max_iters=6', '--dtype=float32', f'--grad_clip={clip}', f'--out_dir={tmp_path / clip}')
        logged[clip] = [event['loss'] for event in metrics(tmp_path / clip, 'iter')]
    assert logged['0'] == logged['1e9'] != pytest.approx(logged['0.1'], rel=1e-5)
    assert logged['0'][:2] == pytest.approx(logged['0.1'][:2], rel=1e-5)  # AdamW's first update is the same whatever the gradient's size


def test_adamw_and_total_norm_are_torchs():
    ours, theirs = small(), small()
    optimizer = ours.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu')
    torchs = torch.optim.AdamW([dict(params=[p for p in theirs.parameters() if (p.dim() == 2) == decays], weight_decay=0.1 * decays)
                                for decays in (True, False)], lr=1e-2, betas=(0.8, 0.95), fused=True)
    for made, expected in zip(updated(ours, optimizer), updated(theirs, torchs)):
        assert torch.equal(made, expected)
    torch.testing.assert_close(optimizer.state_dict()['state'], torchs.state_dict()['state'], rtol=0, atol=0)
    assert total_norm(optimizer).item() == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters()]).item(), rel=1e-6)
    for p in ours.transformer.h.parameters():  # as if they took no part
        p.grad = None
    before = [p.detach().clone() for p in ours.transformer.h.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, ours.transformer.h.parameters())) and total_norm(optimizer) > 0


@pytest.mark.parametrize('options', [{}, dict(moments_dtype='bfloat16'), dict(optim='muon')])
def test_an_update_that_found_inf_changes_nothing(options):
    model, twin = small(), small()
    optimizer, other = (m.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu', **options) for m in (model, twin))
    updated(model, optimizer), updated(twin, other)
    before = copy.deepcopy(optimizer.state_dict()['state']), [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float('nan'))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    torch.testing.assert_close((optimizer.state_dict()['state'], [p.detach() for p in model.parameters()]), before, rtol=0, atol=0)
    optimizer.found_inf = torch.zeros(())
    for made, expected in zip(updated(model, optimizer), updated(twin, other)):
        assert torch.equal(made, expected)


def test_muon_can_be_copied():
    model = small()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu', optim='muon')
    updated(model, optimizer)
    state = optimizer.state_dict()['state']
    torch.testing.assert_close(copy.deepcopy(optimizer).state_dict()['state'], state, rtol=0, atol=0)


SHARDED = f"""
import sys
sys.path.insert(0, {ROOT!r})
import torch
import distributed
from model import GPT, GPTConfig
rank = distributed.ranks()[0]
distributed.init('gloo', 'cpu')
torch.manual_seed(0)
model = distributed.shard(GPT(GPTConfig(16, 32, 2, 2, 32, bias=False)), 'cpu', 'fsdp')
optimizer = model.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu', optim='muon', momentum=0.9)
torch.manual_seed(1)
for _ in range(3):
    for p in model.parameters():
        p.grad = distributed.like(torch.randn(p.shape), p)
    optimizer.step()
made = distributed.gather([p.data for p in model.parameters()])
if rank == 0:
    torch.save(made, sys.argv[1])
distributed.shutdown()
"""


@pytest.mark.parametrize('ranks', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_updates_equal_whole_ones(tmp_path, ranks):
    (tmp_path / 'sharded.py').write_text(SHARDED)
    run_ranks(ranks, str(tmp_path / 'sharded.py'), str(tmp_path / 'made.pt'))
    model = small()
    whole = updated(model, model.configure_optimizers(0.1, 1e-2, (0.8, 0.95), 'cpu', optim='muon', momentum=0.9))
    torch.testing.assert_close(torch.load(tmp_path / 'made.pt'), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('parallel, ranks', [('ddp', 2), ('fsdp', 2), pytest.param('fsdp', 4, marks=pytest.mark.slow)])
def test_several_ranks_learn_the_same(char_data, tmp_path, parallel, ranks):
    args = [*TINY, *FAST, f'--dataset={char_data}', '--gradient_accumulation_steps=4', '--max_iters=20', '--eval_interval=10', '--dropout=0.1']
    run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    for upto in (11, 20):  # cut and resumed on the way
        out = ''.join(run_ranks(ranks, 'train.py', *args, f'--out_dir={tmp_path / "many"}', f'--parallel={parallel}', '--init_from=auto',
                                f'--max_iters={upto}'))
    assert 'resumed from' in out
    one, many = ({e['iter']: e['loss'] for e in metrics(tmp_path / name, 'iter')} for name in ('one', 'many'))
    assert len(one) == 20 and all(many[i] == pytest.approx(loss, abs=5e-3) for i, loss in one.items())
    state = checkpoint.load(str(tmp_path / 'many' / 'ckpt.pt'))['optimizer']
    assert ['momentum' in group for group in state['param_groups']] == [False, False, True]
    assert all(tuple(state['state'][i]) == ('momentum_buffer',) for i in state['param_groups'][2]['params'])


@pytest.mark.parametrize('knob', ['--parallel=zero1', '--moments_dtype=bfloat16'])
def test_what_muon_does_not_go_with(char_data, tmp_path, knob):
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--optim=muon', knob, ok=False)
    assert out.stderr.startswith('error: muon does not go with') and len(out.stderr.splitlines()) == 1 and not os.path.exists(tmp_path / 'out')


def test_a_run_goes_on_with_its_own_optimizer_alone(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}']
    run('train.py', *args, '--max_iters=2')
    out = run('train.py', *args, '--max_iters=4', '--init_from=resume', '--optim=muon', ok=False)
    assert 'it is of another --optim' in out.stderr and len(out.stderr.splitlines()) == 1


def test_a_run_goes_on_with_its_own_momentum(char_data, tmp_path):
    args = [*TINY, '--optim=muon', f'--dataset={char_data}', f'--out_dir={tmp_path}']
    run('train.py', *args, '--max_iters=2', '--momentum=0.8')
    out = run('train.py', *args, '--max_iters=4', '--init_from=resume', '--momentum=0.7').stdout
    assert 'momentum=0.8 come from the checkpoint' in out
    assert checkpoint.load(str(tmp_path / 'ckpt.pt'))['optimizer']['param_groups'][2]['momentum'] == 0.8
