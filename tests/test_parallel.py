"""ddp, zero1 and fsdp: the same run as with one process, and one kind of checkpoint for all."""
import pytest
import torch
from conftest import TINY, equal_states, metrics, run, run_ranks

from runtime import checkpoint


def start(ranks, *args):
    if ranks == 1:
        return run('train.py', *args).stdout
    return ''.join(run_ranks(ranks, 'train.py', *args))


def read_losses(out_dir):
    kinds = (('iter', ('loss', 'grad_norm')), ('eval', ('train/loss', 'val/loss')))
    return {(e['iter'], key): e[key]
            for event, keys in kinds for e in metrics(out_dir, event) for key in keys}


@pytest.fixture(scope='module')
def args(char_data):
    return [*TINY, f'--dataset={char_data}', '--gradient_accumulation_steps=4', '--grad_clip=0.5',
            '--eval_interval=10', '--eval_iters=5', '--max_iters=20']


@pytest.fixture(scope='module', params=['0.2', pytest.param('0.0', marks=pytest.mark.slow)])
def single(request, args, tmp_path_factory):
    """The out_dir of a run of one process, and its dropout."""
    out_dir = tmp_path_factory.mktemp('single')
    run('train.py', *args, f'--dropout={request.param}', f'--out_dir={out_dir}')
    return out_dir, request.param


SLOW_CASES = (('fsdp', 4), ('ddp', 4), ('zero1', 4), ('zero1', 1), ('fsdp', 1))


@pytest.mark.parametrize('parallel, ranks', [
    ('ddp', 2), ('zero1', 2), ('fsdp', 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_equals_one_process(args, single, tmp_path, parallel, ranks):
    out_dir, dropout = single
    start(ranks, *args, f'--dropout={dropout}', f'--out_dir={tmp_path}', f'--parallel={parallel}')
    one, many = read_losses(out_dir), read_losses(tmp_path)
    assert len(one) == 2 * 20 + 2 * 3 and one.keys() == many.keys()
    assert all(many[key] == pytest.approx(value, rel=1e-4) for key, value in one.items())
    one, many = (checkpoint.load(str(path / 'ckpt.pt')) for path in (out_dir, tmp_path))
    assert list(one['model']) == list(many['model'])
    assert one['model_args'] == many['model_args']
    assert one['optimizer'].keys() == many['optimizer'].keys()
    assert one['optimizer']['param_groups'] == many['optimizer']['param_groups']
    torch.testing.assert_close(many['model'], one['model'], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(many['optimizer']['state'], one['optimizer']['state'],
                               rtol=1e-2, atol=1e-5)
    texts = [run('sample.py', f'--out_dir={path}', '--temperature=0', '--num_samples=1',
                 '--max_new_tokens=40', '--dtype=float32').stdout for path in (out_dir, tmp_path)]
    assert texts[0] == texts[1]
    sizes = [(path / 'ckpt.pt').stat().st_size for path in (out_dir, tmp_path)]
    assert abs(sizes[0] - sizes[1]) < 5000  # tied weights are written once


@pytest.mark.parametrize('path', [
    [('fsdp', 2), ('zero1', 1), ('ddp', 2)],
    pytest.param([('zero1', 4), ('fsdp', 4), ('ddp', 1), ('zero1', 2)], marks=pytest.mark.slow),
], ids=lambda path: ' '.join(f'{parallel}{ranks}' for parallel, ranks in path))
def test_a_checkpoint_continues_in_any_other_mode(args, single, tmp_path, path):
    out_dir, dropout = single
    for step, (parallel, ranks) in enumerate(path, 1):
        out = start(ranks, *args, f'--dropout={dropout}', f'--out_dir={tmp_path}',
                    f'--parallel={parallel}', '--init_from=auto',
                    f'--max_iters={20 * step // len(path)}')
        assert ('resumed from' in out) == (step > 1)
    one, many = read_losses(out_dir), read_losses(tmp_path)
    assert one.keys() <= many.keys()
    assert all(many[key] == pytest.approx(value, rel=1e-4) for key, value in one.items())


@pytest.mark.parametrize('parallel', [pytest.param('zero1', marks=pytest.mark.slow), 'fsdp'])
def test_pieces_equal_the_whole_to_the_bit(args, tmp_path, parallel):
    for out_dir, cuts in (('whole', [12]), ('parts', [5, 12])):
        for max_iters in cuts:
            out = start(2, *args, '--dropout=0.1', f'--out_dir={tmp_path / out_dir}',
                        f'--parallel={parallel}', f'--max_iters={max_iters}', '--init_from=auto')
    assert 'resumed from' in out
    assert equal_states(tmp_path / 'whole' / 'ckpt.pt', tmp_path / 'parts' / 'ckpt.pt')


def test_recomputing_changes_nothing(args, single, tmp_path):
    out_dir, dropout = single
    run('train.py', *args, f'--dropout={dropout}', f'--out_dir={tmp_path}',
        '--activation_checkpointing=True')
    assert equal_states(out_dir / 'ckpt.pt', tmp_path / 'ckpt.pt')


@pytest.mark.slow
def test_layers_compiled_one_by_one(args, tmp_path):
    for compiled in (True, False):
        start(2, *args, f'--out_dir={tmp_path / str(compiled)}', '--parallel=fsdp',
              f'--compile={compiled}', f'--activation_checkpointing={compiled}')
    plain, compiled = read_losses(tmp_path / 'False'), read_losses(tmp_path / 'True')
    assert plain.keys() == compiled.keys()
    assert all(compiled[key] == pytest.approx(value, rel=1e-3) for key, value in plain.items())
    plain, compiled = (checkpoint.load(str(tmp_path / name / 'ckpt.pt'))['model']
                       for name in ('False', 'True'))
    assert list(compiled) == list(plain)


@pytest.mark.slow
@pytest.mark.parametrize('parallel, ranks', [('zero1', 2), ('fsdp', 2), ('ddp', 1)])
def test_moments_in_bfloat16(args, single, tmp_path, parallel, ranks):
    out_dir, dropout = single
    low = [*args, f'--dropout={dropout}', '--moments_dtype=bfloat16']
    start(1, *low, f'--out_dir={tmp_path / "one"}')
    for max_iters in (11, 20):  # cut and resumed once
        out = start(ranks, *low, f'--out_dir={tmp_path / "many"}', f'--parallel={parallel}',
                    f'--max_iters={max_iters}', '--init_from=auto')
    assert 'resumed from' in out
    one, many = read_losses(tmp_path / 'one'), read_losses(tmp_path / 'many')
    full = read_losses(out_dir)
    assert all(many[key] == pytest.approx(value, rel=2e-3) for key, value in one.items()
               if key in many)
    assert all(abs(full[key] - value) < 0.02 for key, value in one.items() if 'loss' in key[1])
    assert full != one
    state = checkpoint.load(str(tmp_path / 'many' / 'ckpt.pt'))['optimizer']['state']
    assert all(moments[key].dtype == torch.bfloat16
               for moments in state.values() for key in ('exp_avg', 'exp_avg_sq'))
    if ranks == 1:
        assert equal_states(tmp_path / 'one' / 'ckpt.pt', tmp_path / 'many' / 'ckpt.pt')
    # a run with moments of one kind continues with the other kind
    start(1, *args, f'--dropout={dropout}', f'--out_dir={tmp_path / "many"}',
          '--init_from=resume', '--max_iters=22')
    state = checkpoint.load(str(tmp_path / 'many' / 'ckpt.pt'))['optimizer']['state']
    assert state[0]['exp_avg'].dtype == torch.float32


def test_moments_that_would_stand_still(args, tmp_path):
    out = run('train.py', *args, f'--out_dir={tmp_path}', '--moments_dtype=bfloat16',
              '--beta2=0.999', ok=False)
    assert 'stand still with beta2=0.999' in out.stderr
