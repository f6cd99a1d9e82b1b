"""Edits of train.py that change what is in a checkpoint, and runs that continue from it."""
import copy

import pytest
import torch
from conftest import TINY
from edits import SEED
from test_edits_loop import (
    ACCELERATE,
    LOOP,
    SAVE,
    SCHEDULE,
    STATE,
    UPDATE,
    WRAP,
    LoopRun,
    after,
    before,
    check_loop,
    edit_train,
)
from test_edits_optimizers import have_equal_values, load


def test_low_rank_weights(char_data, tmp_path):
    # Hu et al. 2021, https://arxiv.org/abs/2106.09685
    source = '''
class LoRA(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.a = torch.nn.Linear(linear.in_features, 4, bias=False)
        self.b = torch.nn.Linear(4, linear.out_features, bias=False)
    def forward(self, x):
        return self.linear(x) + self.b(self.a(x))
for block in model.requires_grad_(False).transformer.h:
    block.attn.c_attn = LoRA(block.attn.c_attn)
'''.replace('self.linear = linear\n', 'self.linear = linear.requires_grad_(False)\n')
    sources = edit_train(tmp_path, before(ACCELERATE, source))
    torch.manual_seed(SEED)
    plain = LoopRun(char_data)
    start = copy.deepcopy(plain.model.state_dict())
    exec(source, {'torch': torch, 'model': plain.model})
    plain.optimizer = plain.model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    _, state = check_loop(sources, char_data, plain, resumes=False)
    weights = {name.replace('.linear', ''): weight for name, weight in state['model'].items()}
    assert all(torch.equal(weights[name], weight) for name, weight in start.items())
    assert sum(name.endswith(('.a.weight', '.b.weight')) for name in weights) == 4
    # the model of model.py has no such weights: sample.py and a resumed run say so
    for script, flags in (('sample.py', []),
                          ('train.py', [*TINY, f'--dataset={char_data}', '--init_from=resume'])):
        err = sources.run(script, f'--out_dir={tmp_path}/whole', *flags, ok=False).stderr
        assert 'c_attn.a.weight' in err


@pytest.mark.parametrize('line', [
    'block.mlp = torch.compile(block.mlp, backend="eager")', 'block.mlp.compile(backend="eager")'])
def test_a_part_that_is_compiled(char_data, tmp_path, line):
    sources = edit_train(tmp_path, before(WRAP, f'''
for block in raw_model.transformer.h:
    {line}
'''))
    _, state = check_loop(sources, char_data, LoopRun(char_data), effect=0)
    assert state['model'].keys() == LoopRun(char_data).model.state_dict().keys()
    sources.run('sample.py', f'--out_dir={tmp_path}/whole', '--max_new_tokens=5')


# -----------------------------------------------------------------------------
# more in a checkpoint
def test_more_in_a_checkpoint(char_data, tmp_path):
    sources = edit_train(tmp_path, after(STATE, '''
extra = state.get('extra', {'tokens': 0, 'names': ['a', ('b', None)], 'sum': torch.zeros(3)})
'''), after(UPDATE, '''
    extra['tokens'] += 256
    extra['sum'] = extra['sum'] + iter_num
'''), before(SAVE, "    state['extra'] = dict(extra)\n"))
    _, state = check_loop(sources, char_data, LoopRun(char_data), effect=0)
    expected = {'tokens': 1024, 'names': ['a', ('b', None)], 'sum': torch.full((3,), 6.0)}
    assert have_equal_values(state['extra'], expected)
    sources.run('sample.py', f'--out_dir={tmp_path}/whole', '--max_new_tokens=5')


@pytest.mark.parametrize('value', ['np.mean([1.0, 3.0])', 'np.array([2.0])'])
def test_numpy_in_a_checkpoint(char_data, tmp_path, value):
    # as data it can be read again; if it can't, no run may begin that can't be resumed
    sources = edit_train(tmp_path, before(SAVE, f"    state['extra'] = {value}\n"))
    result = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                         '--max_iters=2', ok=None)
    if result.returncode == 0 and not result.stderr:
        assert load(tmp_path, 'out')['extra'] == 2.0
    else:
        assert 'extra' in result.stderr and 'Traceback' not in result.stderr, result.stderr


def test_a_tensor_in_a_checkpoint_is_of_its_iteration(char_data, tmp_path):
    # the checkpoint of the best val loss is written while the tensor changes
    sources = edit_train(
        tmp_path, before(LOOP, 'counts = torch.zeros(10 ** 7)\n'),
        after(UPDATE, '    counts += 1\n'), before(SAVE, "    state['counts'] = counts\n"),
        before(SCHEDULE, '    return 3e-3 if it < 2 else -3e-3\n'))
    sources.train(char_data, 'out', '--max_iters=4', '--eval_interval=2',
                  '--always_save_checkpoint=False')
    state = load(tmp_path, 'out')
    assert state['iter_num'] == 2
    assert state['counts'].unique().tolist() == [2.0]
