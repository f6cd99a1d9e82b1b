"""Another optimizer in configure_optimizers, in model.py, takes effect: also in a resumed run."""
import copy
import functools
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, run_ranks, start_ranks
from edits import MICRO_STEPS, PlainRun, Sources, load_unedited_model

from runtime import checkpoint
from runtime.optimizers import LowMemoryAdamW, Muon, clip_and_step

# places in model.py and train.py
RETURN = '        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)\n'
GROUPS = '''\
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
'''
GPT_CLASS = 'class GPT(nn.Module):\n'
LOSS_SUM = '            loss_sum += loss.detach()\n'
SET_LR = "        group['lr'] = lr\n"

# in iteration 3 the loss is NaN, so that there must be no update
BAD_UPDATE = ('train.py', LOSS_SUM, LOSS_SUM + '''\
            if iter_num == 3:
                loss = loss * math.nan
''')


def choose(call):
    """The edit after which configure_optimizers returns this."""
    return ('model.py', RETURN, f'        return {call}\n')


def define(source):
    """The edit that puts a class above GPT."""
    return ('model.py', GPT_CLASS, source.lstrip() + '\n\n' + GPT_CLASS)


LION = define('''
class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                average = self.state[p].setdefault('average', torch.zeros_like(p))
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(0.1 * group['lr'] * average.lerp(p.grad, 0.1).sign())
                average.lerp_(p.grad, 0.01)
''')
# the state is in another dtype than the weights
LION_IN_BFLOAT16 = define('''
class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                zeros = torch.zeros_like(p, dtype=torch.bfloat16)
                average = self.state[p].setdefault('average', zeros)
                p.sub_(0.1 * group['lr'] * average.float().lerp(p.grad, 0.1).sign())
                average.copy_(average.float().lerp(p.grad, 0.01))
''')

# each matrix has two others, of its rows and of its columns
SHAMPOO = define('''
class Shampoo(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for p in sum((group['params'] for group in self.param_groups), []):
            grad = p.grad.view(len(p), -1)
            rows = self.state[p].setdefault('rows', torch.eye(len(p)))
            columns = self.state[p].setdefault('columns', torch.eye(grad.size(1)))
            rows.add_(50 * grad @ grad.T)
            columns.add_(50 * grad.T @ grad)
            update = torch.linalg.solve(rows, grad) @ torch.linalg.inv(columns)
            p.sub_(100 * self.param_groups[0]['lr'] * update.view_as(p))
''')

STRANGER = define('''
class Stranger:
    def __init__(self, groups, lr):
        self.param_groups = [{**group, 'lr': lr} for group in groups]
        self.params = sum((group['params'] for group in groups), [])
        self.averages = [torch.zeros_like(p) for p in self.params]
    def step(self):
        for p, average in zip(self.params, self.averages):
            average.mul_(0.9).add_(p.grad)
            p.data.sub_(self.param_groups[0]['lr'] * average)
    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None
    def state_dict(self):
        return {'state': {i: {'average': a} for i, a in enumerate(self.averages)},
                'param_groups': [{'lr': group['lr']} for group in self.param_groups]}
    def load_state_dict(self, state):
        self.averages = [state['state'][i]['average'] for i in range(len(self.params))]
''')

# its state_dict has another form than torch's
SLOW_WEIGHTS = define('''
class SlowWeights:
    def __init__(self, fast):
        self.fast, self.param_groups = fast, fast.param_groups
        self.step_count, self.zero_grad = 0, fast.zero_grad
        self.params = sum((group['params'] for group in fast.param_groups), [])
        self.slow = [p.detach().clone() for p in self.params]
    @torch.no_grad()
    def step(self):
        self.fast.step()
        self.step_count += 1
        for p, slow in zip(self.params, self.slow):
            if self.step_count % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))
    def state_dict(self):
        return {'fast': self.fast.state_dict(), 'slow': self.slow, 'count': self.step_count}
    def load_state_dict(self, state):
        self.fast.load_state_dict(state['fast'])
        self.slow, self.step_count = state['slow'], state['count']
        self.param_groups = self.fast.param_groups
''')

OPTIMIZERS = {
    'sgd': [choose('torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)')],
    'sgd without momentum': [choose('torch.optim.SGD(groups, lr=learning_rate)')],
    'sgd nesterov fused': [choose('torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, '
                                  'nesterov=True, fused=True)')],
    'rmsprop': [choose('torch.optim.RMSprop(groups, lr=learning_rate, momentum=0.5)')],
    'adafactor': [choose('torch.optim.Adafactor(groups, lr=learning_rate)')],
    'adam': [choose('torch.optim.Adam(groups, lr=learning_rate, betas=betas, fused=fused)')],
    'nadam': [choose('torch.optim.NAdam(groups, lr=learning_rate, betas=betas)')],
    'adagrad': [choose('torch.optim.Adagrad(groups, lr=learning_rate)')],
    'adagrad fused': [choose('torch.optim.Adagrad(groups, lr=learning_rate, fused=True)')],
    'amsgrad': [choose('torch.optim.AdamW(groups, lr=learning_rate, betas=betas, amsgrad=True)')],
    'amsgrad fused': [choose('torch.optim.AdamW(groups, lr=learning_rate, betas=(0.5, 0.6), '
                             'amsgrad=True, fused=True)')],
    'maximize': [choose('torch.optim.AdamW(groups, lr=learning_rate, maximize=True)')],
    'foreach': [choose('torch.optim.AdamW(groups, lr=learning_rate, eps=1e-3, foreach=True)')],
    'lion': [LION, choose('Lion(groups, dict(lr=learning_rate))')],
    'lion in bfloat16': [LION_IN_BFLOAT16, choose('Lion(groups, dict(lr=learning_rate))')],
    'shampoo': [SHAMPOO, choose('Shampoo(groups, dict(lr=learning_rate))')],
    'stranger': [STRANGER, choose('Stranger(groups, lr=learning_rate)')],
    'slow weights': [SLOW_WEIGHTS, choose('SlowWeights(torch.optim.AdamW(groups))')],
    'no weight decay': [('model.py', GROUPS, "        groups = [{'params': params}]\n"),
                        choose('torch.optim.AdamW(groups, weight_decay=0)')],
    'three groups': [('model.py', GROUPS, GROUPS + '''
        table = [groups[0]['params'].pop(0)]
        groups.append({'params': table, 'weight_decay': 90 * weight_decay, 'eps': 1e-2})
''')],
    'amsgrad in one group': [('model.py', GROUPS, GROUPS + "        groups[1]['amsgrad'] = True\n"),
                             choose('torch.optim.AdamW(groups, betas=(0.5, 0.6))')],
}

# an update by the sign doesn't depend on the gradient's size
MOVED_BY_TINY_GRADIENTS = 'lion', 'lion in bfloat16'

NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)


def have_equal_values(a, b):
    """Whether two nested values have the same keys and the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(have_equal_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(have_equal_values, a, b))
    return a == b


def load(folder, out_dir):
    return checkpoint.load(os.path.join(folder, out_dir, 'ckpt.pt'))


def skip_update(plain):
    """An iteration whose gradient isn't finite: only its loss is new."""
    it = len(plain.losses)
    with torch.no_grad():
        losses = [plain.model(*plain.get_batch('train', plain.order.get_starts(it, i)))[1].item()
                  for i in range(MICRO_STEPS)]
    plain.losses.append(sum(losses) / MICRO_STEPS)


def measure_difference(weights, plain, start):
    """How far these weights are from plain torch's, as a share of the way that it went."""
    expected = plain.model.state_dict()
    distance = sum((weights[name] - w).square().sum() for name, w in expected.items()).sqrt()
    way = sum((start[name] - w).square().sum() for name, w in expected.items()).sqrt()
    return distance / way


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimizer(char_data, tmp_path, name):
    sources = Sources(tmp_path, BAD_UPDATE, *OPTIMIZERS[name])
    plain = PlainRun(sources.load_model(), char_data)
    start = copy.deepcopy(plain.model.state_dict())
    plain.train(3)
    skip_update(plain)
    plain.train(2)
    _, err, losses = sources.train(char_data, 'whole', '--max_iters=6')
    assert 'iter 3: skipped updates' in err and err.count('\n') == 1, err
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    whole = load(tmp_path, 'whole')
    # gradients of nearly 0 have another sign with another rounding
    tolerance = 0.02 if 'lion' in name else 1e-3
    assert measure_difference(whole['model'], plain, start) < tolerance
    unedited = PlainRun(load_unedited_model(), char_data).train(6)
    assert measure_difference(whole['model'], unedited, start) > 0.01, 'no effect'

    sources.train(char_data, 'parts', '--max_iters=3')
    _, _, losses = sources.train(char_data, 'parts', '--max_iters=6', '--init_from=resume')
    parts = load(tmp_path, 'parts')
    assert losses == [event['loss'] for event in metrics(tmp_path / 'whole', 'iter')]
    assert have_equal_values(parts['model'], whole['model'])
    assert have_equal_values(parts['optimizer'], whole['optimizer'])


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_bad_gradient_changes_nothing_and_a_tiny_one_little(char_data, tmp_path, name):
    module = Sources(tmp_path, *OPTIMIZERS[name]).load_model()
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(16, 32, 2, 2, 32, bias=False))
    # first of all a bad update, when there is no state yet
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), 'cpu')
    twin_model = copy.deepcopy(model)
    twin = twin_model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), 'cpu')
    update(model, optimizer, math.nan)
    for m, optim in ((model, optimizer), (twin_model, twin)):
        update(m, optim, 1.0)
        update(m, optim, 1.0)
    assert have_equal_values(model.state_dict(), twin_model.state_dict())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for value, clip in ((math.nan, 1.0), (math.inf, 1.0), (-math.inf, 0.0)):
        assert not update(model, optimizer, value, clip).isfinite()
        assert have_equal_values((model.state_dict(), optimizer.state_dict()), before)

    model = copy.deepcopy(twin_model)
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), 'cpu')
    for _ in range(3):
        update(model, optimizer, 1.0, 1e-12)
    if name not in MOVED_BY_TINY_GRADIENTS:
        for p, q in zip(model.parameters(), twin_model.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    update(model, optimizer, 1.0)
    assert not have_equal_values(model.state_dict(), twin_model.state_dict())


def update(model, optimizer, value, clip=1.0):
    """Makes an update by random gradients, one of whose numbers is this; returns their norm."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    p.grad.view(-1)[0] = value
    norm = clip_and_step(optimizer, NO_SCALER, clip)
    optimizer.zero_grad()
    return norm


@pytest.mark.parametrize('name', ['sgd', 'rmsprop'])
def test_a_run_with_a_tiny_grad_clip_stands_still(char_data, tmp_path, name):
    sources = Sources(tmp_path, *OPTIMIZERS[name])
    _, _, losses = sources.train(char_data, 'out', '--max_iters=3', '--grad_clip=1e-12',
                                 '--weight_decay=0')
    start = PlainRun(sources.load_model(), char_data).model.state_dict()
    for key, weight in load(tmp_path, 'out')['model'].items():
        torch.testing.assert_close(weight, start[key], rtol=1e-5, atol=1e-6)
    assert len(losses) == 3


# -----------------------------------------------------------------------------
# a checkpoint of another optimizer
@pytest.fixture(scope='module')
def out_dirs(char_data, tmp_path_factory):
    """Calling it with the name of an optimizer returns the folder of a run with that, trained once.

    '' is the optimizer of model.py as it is.
    """
    @functools.lru_cache(None)
    def find_out_dir(name):
        folder = tmp_path_factory.mktemp('run')
        Sources(folder, *OPTIMIZERS.get(name, ())).train(char_data, 'out', '--max_iters=2')
        return folder / 'out'

    return find_out_dir


@pytest.mark.parametrize('saved_name, name', [
    ('sgd', ''), ('adam', ''), ('nadam', ''), ('amsgrad', ''), ('lion', ''), ('three groups', ''),
    ('', 'sgd'), ('rmsprop', 'sgd'), ('', 'rmsprop'), ('', 'adam'), ('', 'amsgrad'), ('', 'lion'),
    ('sgd', 'lion'), ('sgd', 'adagrad'), ('adagrad', 'shampoo'), ('', 'stranger'),
    ('lion', 'stranger'), ('', 'slow weights'), ('slow weights', ''), ('', 'adafactor')])
def test_the_state_of_another_optimizer_is_refused(char_data, tmp_path, out_dirs, saved_name, name):
    sources = Sources(tmp_path, *OPTIMIZERS.get(name, ()))
    shutil.copytree(out_dirs(saved_name), tmp_path / 'out')
    err = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                      '--max_iters=4', '--init_from=resume', ok=False).stderr
    assert 'out/ckpt.pt' in err


@pytest.mark.parametrize('name', ['sgd', 'lion', 'stranger'])
@pytest.mark.parametrize('flag', ['--optim=muon', '--moments_dtype=bfloat16'])
def test_our_optimizers_take_the_place_of_adamw_only(char_data, tmp_path, name, flag):
    sources = Sources(tmp_path, *OPTIMIZERS[name])
    err = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                      flag, ok=False).stderr
    assert 'AdamW' in err and 'configure_optimizers' in err


@pytest.mark.parametrize('old, new, word', [
    (OPTIMIZERS['sgd'], [choose('torch.optim.SGD(groups, lr=learning_rate, momentum=0.1)')],
     'momentum'),
    ([choose('torch.optim.AdamW(groups, lr=learning_rate)')],
     [choose('torch.optim.AdamW(groups, lr=learning_rate, maximize=True)')], 'maximize'),
    ([choose('torch.optim.AdamW(groups, lr=learning_rate, eps=1e-8)')],
     [choose('torch.optim.AdamW(groups, lr=learning_rate, eps=0.1)')], 'eps'),
    ([], [choose('torch.optim.AdamW(groups, lr=learning_rate, betas=(0.1, 0.2), fused=True)')],
     'betas'),
    ([], [('model.py', "2], 'weight_decay': weight_decay}", "2], 'weight_decay': 99.0}")],
     'weight_decay'),
    ([], [('model.py', "2], 'weight_decay': 0.0}", "2], 'weight_decay': 99.0}")], 'weight_decay'),
], ids=['momentum', 'maximize', 'eps', 'betas', 'weight decay', "the vectors' weight decay"])
def test_an_edited_option_takes_effect_in_a_resumed_run(char_data, tmp_path, old, new, word):
    # or a line says that the checkpoint's is used
    for name in ('old', 'new'):
        (tmp_path / name).mkdir()
    old_sources, new_sources = Sources(tmp_path / 'old', *old), Sources(tmp_path / 'new', *new)
    old_sources.train(char_data, 'out', '--max_iters=2')
    shutil.copytree(tmp_path / 'old' / 'out', tmp_path / 'new' / 'out')
    flags = '--max_iters=5', '--init_from=resume'
    old_sources.train(char_data, 'out', *flags)
    out, err, _ = new_sources.train(char_data, 'out', *flags)
    weights = [load(tmp_path / name, 'out')['model'] for name in ('old', 'new')]
    lines = [line for line in (out + err).splitlines() if word in line]
    assert lines or not have_equal_values(*weights)


# -----------------------------------------------------------------------------
# groups, and AdamW in other forms
MUP_GROUPS = ('model.py', GROUPS, '''
        groups = [{'params': [p], 'lr_scale': 32 / p.size(-1), 'weight_decay': 0.1 * p.dim() - 0.1}
                  for p in params]
''')


def test_a_learning_rate_for_each_group(char_data, tmp_path):
    # after Yang et al. 2022, https://arxiv.org/abs/2203.03466
    sources = Sources(tmp_path, MUP_GROUPS,
                      ('train.py', SET_LR, "        group['lr'] = lr * group['lr_scale']\n"))
    plain = PlainRun(sources.load_model(), char_data)
    start = copy.deepcopy(plain.model.state_dict())
    unscaled = copy.deepcopy(plain).train(4)
    plain.optimizer.register_step_pre_hook(scale_learning_rates)
    plain.train(4)
    sources.train(char_data, 'whole', '--max_iters=4')
    sources.train(char_data, 'parts', '--max_iters=2')
    _, _, losses = sources.train(char_data, 'parts', '--max_iters=4', '--init_from=resume')
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    whole, parts = load(tmp_path, 'whole'), load(tmp_path, 'parts')
    assert measure_difference(whole['model'], plain, start) < 1e-3
    assert measure_difference(whole['model'], unscaled, start) > 0.1
    assert have_equal_values(parts['model'], whole['model'])
    assert have_equal_values(parts['optimizer'], whole['optimizer'])
    # Muon takes the matrices into groups of its own, each with its scale
    out, _, losses = sources.train(char_data, 'muon', '--max_iters=3', '--optim=muon')
    groups = load(tmp_path, 'muon')['optimizer']['param_groups']
    scales = [group['lr_scale'] for group in groups if 'momentum' in group]
    assert scales == [1.0, 1.0, 1.0, 0.25] * 2 and losses[2] < losses[0]


def scale_learning_rates(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        group['lr'] *= group['lr_scale']


@pytest.mark.parametrize('call', [
    'torch.optim.AdamW(groups, lr=learning_rate, betas=betas)',
    'torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)'])
@pytest.mark.parametrize('flag', ['--optim=muon', '--moments_dtype=bfloat16'])
def test_adamw_in_another_form_gives_way_to_our_optimizers(char_data, tmp_path, call, flag):
    unedited, edited = tmp_path / 'unedited', tmp_path / 'edited'
    unedited.mkdir()
    edited.mkdir()
    _, _, expected = Sources(unedited).train(char_data, 'out', '--max_iters=3', flag)
    sources = Sources(edited, choose(call))
    sources.train(char_data, 'out', '--max_iters=2', flag)
    _, _, losses = sources.train(char_data, 'out', '--max_iters=3', '--init_from=resume', flag)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize('flag, option', [
    ('--optim=muon', 'amsgrad'), ('--optim=muon', 'maximize'),
    ('--moments_dtype=bfloat16', 'amsgrad')])
def test_our_optimizers_refuse_what_they_do_not_do(char_data, tmp_path, flag, option):
    sources = Sources(tmp_path, choose(f'torch.optim.AdamW(groups, {option}=True)'))
    err = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                      flag, ok=False).stderr
    assert f'{option}=True' in err and 'configure_optimizers' in err


# -----------------------------------------------------------------------------
# several ranks
@pytest.mark.parametrize('parallel, name', [
    # torch's Adafactor can't update weights that are sharded
    *((parallel, name) for parallel in ('ddp', 'fsdp') for name in ('sgd', 'foreach', 'lion')),
    ('ddp', 'adafactor')])
def test_two_ranks(char_data, tmp_path, parallel, name):
    sources = Sources(tmp_path, *OPTIMIZERS[name])
    args = [f'{tmp_path}/train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
            f'--parallel={parallel}', '--init_from=auto']
    for max_iters in (2, 5):
        run_ranks(2, *args, f'--max_iters={max_iters}')
    plain = PlainRun(sources.load_model(), char_data)
    start = copy.deepcopy(plain.model.state_dict())
    plain.train(5)
    losses = [event['loss'] for event in metrics(tmp_path / 'out', 'iter')]
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    # two ranks add in another order, so that gradients of nearly 0 have another sign
    tolerance = 0.05 if name == 'lion' else 2e-3
    assert measure_difference(load(tmp_path, 'out')['model'], plain, start) < tolerance


def run_and_fail(processes, *command):
    """Runs a script that must end in one line in that many processes; returns the line."""
    ranks = start_ranks(processes, *command)
    assert ranks[0].wait() == 1
    line = ranks[0].read_output()[1]
    for rank in ranks[1:]:  # torchrun ends them, too; by themselves they wait for that
        if rank.poll() is None:
            rank.send_signal(9)
            rank.wait()
    errors = [rank.read_output()[1] for rank in ranks[1:]]
    assert line.startswith('error: ') and line.count('\n') == 1 and not any(errors), (line, errors)
    return line


# AdamW with one more average for each weight, after https://arxiv.org/abs/2409.03137
SUBCLASS = define('''
class ThreeAverages(torch.optim.AdamW):
    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group['params']:
                slow = self.state[p].setdefault('slow', torch.zeros_like(p))
                slow.lerp_(self.state[p]['exp_avg'], 0.1)
                p.sub_(100 * group['lr'] * slow)
''')


@pytest.mark.parametrize('name', ['sgd', 'lion', 'stranger'])
def test_zero1_refuses_all_but_adamw(char_data, tmp_path, name):
    Sources(tmp_path, *OPTIMIZERS[name])
    line = run_and_fail(2, f'{tmp_path}/train.py', *TINY, f'--dataset={char_data}',
                        f'--out_dir={tmp_path}/out', '--parallel=zero1')
    assert 'parallel=zero1 shards only AdamW' in line


@pytest.mark.parametrize('edits', [
    OPTIMIZERS['amsgrad fused'], OPTIMIZERS['maximize'], OPTIMIZERS['three groups'],
    [SUBCLASS, choose('ThreeAverages(groups, lr=learning_rate)')],
], ids=['amsgrad', 'maximize', 'three groups', 'subclass'])
def test_zero1_with_an_adamw_takes_its_options_or_refuses_it(char_data, tmp_path, edits):
    sources = Sources(tmp_path, *edits)
    args = [f'{tmp_path}/train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
            '--parallel=zero1', '--init_from=auto']
    ranks = start_ranks(2, *args, '--max_iters=2')
    if ranks[0].wait() == 1:
        assert run_and_fail(2, *args, '--max_iters=2').startswith('error: parallel=zero1')
        return
    assert ranks[1].wait() == 0, ranks[1].read_output()
    run_ranks(2, *args, '--max_iters=4')
    plain = PlainRun(sources.load_model(), char_data)
    start = copy.deepcopy(plain.model.state_dict())
    plain.train(4)
    losses = [event['loss'] for event in metrics(tmp_path / 'out', 'iter')]
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    assert measure_difference(load(tmp_path, 'out')['model'], plain, start) < 2e-3


# -----------------------------------------------------------------------------
# our own optimizers, used as torch's are
def make(cls, groups):
    """The optimizer; Muon with a momentum for groups of matrices."""
    if cls is Muon:
        groups = [{'momentum': 0.9, **group} if group['params'][0].dim() == 2 else group
                  for group in groups]
    return cls(groups, lr=0.1)


def make_params(sizes=((4, 6), (6, 4))):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size)) for size in sizes]


@pytest.mark.parametrize('cls', [LowMemoryAdamW, Muon])
def test_a_step_with_a_closure_trains(cls):
    params, twins = make_params(), make_params()
    optimizer, twin = (make(cls, [{'params': ps}]) for ps in (params, twins))

    def compute_loss():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(compute_loss).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[4] < losses[0]
    for _ in range(5):
        for p in twins:
            p.grad = 2 * p.detach()
        assert twin.step() is None
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize('cls', [LowMemoryAdamW, Muon])
@pytest.mark.parametrize('options', [
    dict(lr=0.0), dict(lr=0.5), dict(lr=torch.tensor(0.5)), dict(betas=(0.1, 0.2)), dict(eps=1.0),
    dict(weight_decay=5.0), dict(maximize=True), dict(amsgrad=True), dict(momentum=0.1)], ids=str)
def test_a_group_has_its_own_options(cls, options):
    sizes = (4, 6), (6, 4)
    if cls is Muon and not {'momentum', 'lr', 'weight_decay', 'maximize', 'amsgrad'} & set(options):
        sizes = (4,), (6,)  # only AdamW's part of it has these options
    params, twins = make_params(sizes), make_params(sizes)
    try:
        optimizer = make(cls, [{'params': params[:1]}, {'params': params[1:], **options}])
    except ValueError as e:
        refused = dict(maximize=[Muon], amsgrad=[LowMemoryAdamW, Muon])
        assert cls in refused.get(next(iter(options)), []) and str(e).count('\n') == 0
        return
    first = make(cls, [{'params': twins[:1]}])
    second = make(cls, [{'params': twins[1:], **options}])
    default_params = make_params(sizes)
    default = make(cls, [{'params': default_params}])
    for step in range(3):
        torch.manual_seed(step)
        for p, q, r in zip(params, twins, default_params):
            p.grad = torch.randn_like(p)
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
        for optim in (optimizer, first, second, default):
            optim.step()
    assert all(map(torch.equal, params, twins))
    assert torch.equal(params[0], default_params[0])
    is_for_muon_only = 'momentum' in options and cls is LowMemoryAdamW
    assert torch.equal(params[1], default_params[1]) == is_for_muon_only


@pytest.mark.parametrize('options', [dict(maximize=True), dict(lr=torch.tensor(0.05)),
                                     dict(betas=(0.1, 0.2), eps=0.1, weight_decay=3.0)], ids=str)
def test_low_memory_adamw_has_the_first_update_of_torchs(options):
    params, twins = make_params(), make_params()
    ours = LowMemoryAdamW([{'params': params, **options}])
    theirs = torch.optim.AdamW([{'params': twins, **options}])
    for p, q in zip(params, twins):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)
