"""Edits of train.py take effect: of the loop, the batch, the schedule and the evaluation."""
import copy
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, metrics
from edits import (
    ACCELERATE,
    IMPORT,
    LOOP,
    LOSS,
    MICRO_STEPS,
    OPTIMIZER,
    SEED,
    SHAPE,
    UPDATE,
    PlainRun,
    Sources,
    get_lr,
    load_unedited_model,
)
from test_edits_optimizers import have_equal_values, load
from torch.nn import functional as F

# places in train.py
WRAP = 'model = distributed.wrap(model, device, parallel)\n'
SPECIALIZE = 'optimizer = optimizers.specialize('
STATE = "iter_num = state.get('iter_num', 0)\n"
GET_BATCH = 'def get_batch(split, starts):\n'
ROWS = '    rows = windows[split][starts]  # (B, T + 1), in one read\n'
RETURN_BATCH = "    return rows[:, :-1], rows[:, 1:].clone()  # X and Y don't share memory\n"
TRAIN_BATCH = ("    return get_batch('train', order.get_starts(iter_num, micro_step * "
               'ddp_world_size + ddp_rank))\n')
EVAL_LOSS = '                _, loss = model(X, Y)\n            loss_sum += loss * weight\n'
SCHEDULE = '    if it < warmup_iters:\n'
SAVE = '    if scaler.is_enabled():\n'
LAST_STEP = '    last_step = iter_num >= max_iters\n'
METRICS = "'mfu': mfu and 100 * mfu}\n"
SAY_EVAL = '        say(report.format_eval(metrics, exact_eval))\n'
LOG_EVAL = '        # only if something is new: iterations, the end, or a best loss\n'
STEP = '    grad_norm = optimizers.clip_and_step(optimizer, scaler, grad_clip)'
ZERO_GRAD = '    optimizer.zero_grad(set_to_none=True)\n'
PROGRESS = '        bad_steps.read(iter_num)  # sets streak and total\n'
END = '# the end: save the last state; if that fails, exit with an error\n'


class LoopRun(PlainRun):
    """PlainRun with the things that an edit of the loop changes."""

    def __init__(self, data_dir):
        super().__init__(load_unedited_model(), data_dir)
        self.get_lr = get_lr
        self.micro_steps = lambda it: MICRO_STEPS
        self.change_batch = lambda X, Y, it: (X, Y)
        self.compute_loss = lambda model, X, Y: model(X, Y)[1]
        self.change_gradients = lambda model, it: None
        self.finish_update = lambda model: None

    def train(self, iterations):
        for it in range(len(self.losses), len(self.losses) + iterations):
            for group in self.optimizer.param_groups:
                group['lr'] = self.get_lr(it)
            losses = []
            steps = self.micro_steps(it)
            for micro_step in range(steps):
                seed_micro_step(it, micro_step, 1)
                X, Y = self.get_train_batch(it, micro_step)
                seed_micro_step(it, micro_step)
                loss = self.compute_loss(self.model, X, Y)
                seed_micro_step(*divmod(it * steps + micro_step + 1, steps), 1)  # the next batch
                (loss / steps).backward()
                losses.append(loss.item())
            self.change_gradients(self.model, it)
            params = [p for group in self.optimizer.param_groups for p in group['params']]
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            self.optimizer.step()
            self.finish_update(self.model)
            self.model.zero_grad()
            self.losses.append(sum(losses) / steps)
        return self

    def get_train_batch(self, it, micro_step):
        X, Y = self.get_batch('train', self.order.get_starts(it, micro_step))
        return self.change_batch(X, Y, it)


def seed_micro_step(it, micro_step, part=0):
    sequence = np.random.SeedSequence((SEED, it, micro_step, part))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def edit_train(folder, *edits):
    return Sources(folder, *(('train.py', old, new) for old, new in edits))


def before(place, text):
    return place, text.lstrip('\n') + place


def after(place, text):
    return place, place + text.lstrip('\n')


def check_loop(sources, data_dir, plain, *flags, resumes=True, effect=1e-3):
    """The losses are plain torch's; a run in pieces has the same bits. Returns stdout, and state.

    They differ by `effect` from those of the loop without the edits; 0: they are the same.
    """
    plain.train(4 - len(plain.losses))
    out, err, losses = sources.train(data_dir, 'whole', '--max_iters=4', '--eval_interval=2',
                                     *flags)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    unedited = PlainRun(load_unedited_model(), data_dir).train(4)
    differences = np.abs(np.subtract(losses, unedited.losses))
    assert (differences.max() > (effect or 1e-5)) == (effect > 0), differences
    state = load(sources.folder, 'whole')
    if resumes:
        sources.train(data_dir, 'parts', '--max_iters=2', '--eval_interval=2', *flags)
        sources.train(data_dir, 'parts', '--max_iters=4', '--eval_interval=2',
                      '--init_from=resume', *flags)
        parts = load(sources.folder, 'parts')
        for name in state.keys() - {'config'}:
            assert have_equal_values(state[name], parts[name]), name
    return out, state


@pytest.fixture(scope='module')
def gpt2_data(tmp_path_factory):
    """A dataset with GPT-2's vocabulary, so that the loss is computed without storing logits."""
    folder = tmp_path_factory.mktemp('gpt2')
    ids = np.arange(20000) ** 2 % 1009 * 49
    for name in ('train.bin', 'val.bin'):
        ids.astype('<u2').tofile(folder / name)
    return str(folder)


def copy_data(data_dir, folder, name):
    """A copy of the dataset, with one more split that has its numbers in reverse."""
    new_dir = os.path.join(folder, 'data')
    shutil.copytree(data_dir, new_dir)
    ids = np.fromfile(os.path.join(data_dir, 'val.bin'), dtype='<u2')
    np.tile(ids[::-1], 20).tofile(os.path.join(new_dir, name))
    return new_dir


# -----------------------------------------------------------------------------
# the update
def test_sharpness_aware_minimization(char_data, tmp_path):
    sources = edit_train(tmp_path, before(STEP, '''
    params = list(raw_model.parameters())
    ascent = [0.5 * p.grad / optimizers.compute_grad_norm(optimizer) for p in params]
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_add_(params, ascent)
    for i in range(micro_steps):
        (model(*get_train_batch(iter_num, i))[1] / micro_steps).backward()
    with torch.no_grad():
        torch._foreach_sub_(params, ascent)
'''))
    plain = LoopRun(char_data)

    def climb(model, it):
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters()):
                q.add_(0.5 * p.grad / norm)
        twin.zero_grad()
        sum(twin(*plain.get_train_batch(it, i))[1] / 2 for i in range(2)).backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            p.grad = q.grad

    plain.change_gradients = climb
    check_loop(sources, char_data, plain)


def test_an_average_of_the_weights(char_data, tmp_path):
    sources = edit_train(tmp_path, after(IMPORT, 'import copy\n'), after(WRAP, '''
ema = copy.deepcopy(raw_model)
if 'ema' in state:
    ema.load_state_dict(state['ema'])
'''), before(ZERO_GRAD, '''
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(raw_model.parameters()), 0.1)
'''), (EVAL_LOSS, EVAL_LOSS.replace('model(', 'ema(')),
                         before(SAVE, "    state['ema'] = ema.state_dict()\n"))
    plain = LoopRun(char_data)
    ema = copy.deepcopy(plain.model)

    def average(model):
        with torch.no_grad():
            for p, q in zip(ema.parameters(), model.parameters()):
                p.lerp_(q, 0.1)

    plain.finish_update = average
    _, state = check_loop(sources, char_data, plain, effect=0)
    for name, weight in ema.state_dict().items():
        torch.testing.assert_close(state['ema'][name], weight, rtol=1e-4, atol=1e-6)
    val_loss = metrics(tmp_path / 'whole', 'eval')[-1]['val/loss']
    assert val_loss != pytest.approx(plain.evaluate(), rel=1e-3)
    plain.model = ema
    assert val_loss == pytest.approx(plain.evaluate(), rel=1e-5)


@pytest.mark.parametrize('code, function', [
    ('learning_rate * (1 - it / lr_decay_iters)', lambda it: 3e-3 * (1 - it / 100)),
    ('learning_rate / math.sqrt(it + 1)', lambda it: 3e-3 / (it + 1) ** 0.5),
    ('learning_rate * min(it + 1, 6 - it) / 2', lambda it: 3e-3 * min(it + 1, 6 - it) / 2),
], ids=['linear', 'inverse square root', 'one cycle'])
def test_a_schedule(char_data, tmp_path, code, function):
    sources = edit_train(tmp_path, before(SCHEDULE, f'    return {code}\n'))
    plain = LoopRun(char_data)
    plain.get_lr = function
    check_loop(sources, char_data, plain, effect=1e-5)
    rates = [event['lr'] for event in metrics(tmp_path / 'whole', 'iter')]
    assert rates == pytest.approx([function(it) for it in range(4)])


@pytest.mark.parametrize('code, function', [
    ('p.grad.add_(torch.randn_like(p), alpha=0.1 / (1 + iter_num))',
     lambda p, it: p.grad.add_(torch.randn_like(p), alpha=0.1 / (1 + it))),
    ('p.grad.sub_(p.grad.mean(dim=-1, keepdim=True))',
     lambda p, it: p.grad.sub_(p.grad.mean(dim=-1, keepdim=True))),
    ('p.grad.clamp_(-1e-3, 1e-3)', lambda p, it: p.grad.clamp_(-1e-3, 1e-3)),
], ids=['noise', 'centralization', 'clipping by value'])
def test_other_gradients(char_data, tmp_path, code, function):
    sources = edit_train(tmp_path, before(STEP, f'''
    for p in raw_model.parameters():
        {code}
'''))
    plain = LoopRun(char_data)

    def change_gradients(model, it):
        for p in model.parameters():
            function(p, it)

    plain.change_gradients = change_gradients
    check_loop(sources, char_data, plain)


def test_a_second_optimizer(char_data, tmp_path):
    sources = edit_train(tmp_path, before(SPECIALIZE, '''
table = raw_model.lm_head.weight
optimizer.param_groups[0]['params'] = optimizer.param_groups[0]['params'][1:]
table_optimizer = torch.optim.SGD([table], lr=0.1, momentum=0.9)
if 'table_optimizer' in state:
    table_optimizer.load_state_dict(state['table_optimizer'])
'''), before(ZERO_GRAD, '    table_optimizer.step()\n    table_optimizer.zero_grad()\n'),
                         before(SAVE, '    state[\'table_optimizer\'] = distributed.gather('
                                      'table_optimizer.state_dict())\n'))
    plain = LoopRun(char_data)
    group = plain.optimizer.param_groups[0]
    table_optimizer = torch.optim.SGD([group['params'].pop(0)], lr=0.1, momentum=0.9)
    plain.finish_update = lambda model: table_optimizer.step()
    check_loop(sources, char_data, plain)


def test_more_micro_steps_later(char_data, tmp_path):
    sources = edit_train(tmp_path, after(UPDATE, '    micro_steps = 1 if iter_num < 2 else 2\n'))
    plain = LoopRun(char_data)
    plain.micro_steps = lambda it: 1 if it < 2 else 2
    check_loop(sources, char_data, plain)


def test_more_micro_steps_than_the_setting(char_data, tmp_path):
    sources = edit_train(tmp_path, after(UPDATE, '    micro_steps = 2 if iter_num < 2 else 4\n'))
    plain = LoopRun(char_data)
    plain.order.micro_batches = 4
    plain.micro_steps = lambda it: 2 if it < 2 else 4
    check_loop(sources, char_data, plain)


# -----------------------------------------------------------------------------
# the batch
def test_data_of_two_datasets(char_data, tmp_path):
    data_dir = copy_data(char_data, tmp_path, 'other.bin')
    sources = edit_train(tmp_path, before(GET_BATCH, '''
other_tokens = np.fromfile(os.path.join(data_dir, 'other.bin'), dtype='<u2')
other_windows = np.lib.stride_tricks.sliding_window_view(other_tokens, block_size + 1)


'''), after(ROWS, '''
    if split == 'train':
        rows[::2] = other_windows[starts[::2] % len(other_windows)]
'''))
    plain = LoopRun(data_dir)
    ids = np.fromfile(os.path.join(data_dir, 'other.bin'), dtype='<u2').astype(np.int64)
    get_batch = plain.get_batch

    def mix(split, starts):
        X, Y = get_batch(split, starts)
        for row in range(0, 4, 2):
            start = starts[row] % np.uint64(len(ids) - SHAPE['block_size'])
            sequence = torch.from_numpy(ids[int(start):][:SHAPE['block_size'] + 1])
            X[row], Y[row] = sequence[:-1], sequence[1:]
        return X, Y

    plain.get_batch = mix
    check_loop(sources, data_dir, plain)


def test_batches_with_random_tokens(char_data, tmp_path):
    """A batch is drawn ahead of time, and a resumed run draws the same."""
    sources = edit_train(tmp_path, (TRAIN_BATCH, TRAIN_BATCH.replace('return', 'X, Y =') + '''\
    return X.masked_fill(torch.rand(X.shape) < 0.15, 0), Y
'''))
    plain = LoopRun(char_data)
    plain.change_batch = lambda X, Y, it: (X.masked_fill(torch.rand(X.shape) < 0.15, 0), Y)
    check_loop(sources, char_data, plain)


def test_short_sequences_first(char_data, tmp_path):
    sources = edit_train(tmp_path, (TRAIN_BATCH, TRAIN_BATCH.replace('return', 'X, Y =') + '''\
    length = 8 if iter_num < 2 else block_size
    return X[:, :length], Y[:, :length]
'''))
    plain = LoopRun(char_data)
    plain.change_batch = lambda X, Y, it: (X[:, :8], Y[:, :8]) if it < 2 else (X, Y)
    check_loop(sources, char_data, plain)


@pytest.mark.parametrize('data', ['char_data', 'gpt2_data'])
def test_targets_without_a_loss(tmp_path, request, data):
    data_dir = request.getfixturevalue(data)
    sources = edit_train(tmp_path, (RETURN_BATCH, '''\
    X, Y = rows[:, :-1], rows[:, 1:].clone()
    return X, Y.masked_fill(X % 3 > 0, -1)
'''))
    plain = LoopRun(data_dir)
    get_batch = plain.get_batch

    def mask(split, starts):
        X, Y = get_batch(split, starts)
        return X, torch.where(X % 3 > 0, -1, Y)

    plain.get_batch = mask
    check_loop(sources, data_dir, plain, resumes=False)
    val_loss = metrics(tmp_path / 'whole', 'eval')[-1]['val/loss']
    assert val_loss == pytest.approx(plain.evaluate(), rel=1e-4)


def make_bytes(folder, kind, **meta):
    """A dataset of bytes without a table of their text; returns (path, bytes)."""
    folder.mkdir()
    text = b'\xff\x00 counting: 1, 2, 3, 4, 5. ' * 200
    for name in ('train.bin', 'val.bin'):
        np.frombuffer(text, dtype=np.uint8).astype(kind).tofile(folder / name)
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 256, **meta}))
    return str(folder), text


def test_bytes(tmp_path):
    data_dir, text = make_bytes(tmp_path / 'bytes', '<u2')
    sources = edit_train(tmp_path)
    plain = LoopRun(data_dir)
    plain.train(4)
    out, _, losses = sources.train(data_dir, 'out', '--max_iters=4')
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    assert 'vocabulary 256' in out
    assert load(tmp_path, 'out')['model']['lm_head.weight'].shape == (256, 32)
    X, Y = plain.get_batch('train', [0, 1])
    assert X[0].tolist() == list(text[:32]) and Y[1].tolist() == list(text[2:34])
    # nothing says what text the tokens are
    err = sources.run('sample.py', f'--out_dir={tmp_path}/out', ok=False).stderr
    assert 'meta.pkl' in err or 'stoi' in err


@pytest.mark.parametrize('meta', [{}, {'dtype': 'uint8'}], ids=str)
def test_bytes_of_8_bits_are_refused(tmp_path, meta):
    data_dir, _ = make_bytes(tmp_path / 'bytes', np.uint8, **meta)
    sources = edit_train(tmp_path)
    err = sources.run('train.py', *TINY, f'--dataset={data_dir}', f'--out_dir={tmp_path}/out',
                      ok=False).stderr
    assert data_dir in err


# -----------------------------------------------------------------------------
# the loss
@pytest.mark.parametrize('data', ['char_data', 'gpt2_data'])
def test_distillation(tmp_path, request, data):
    data_dir = request.getfixturevalue(data)
    sources = edit_train(tmp_path, after(WRAP, '''
torch.manual_seed(7)
teacher = GPT(raw_model.config)
teacher.lm_head.weight.data.mul_(30)
'''), (LOSS, '''\
            with ctx:
                logits, loss = model(X, Y)
                with torch.no_grad():
                    targets = teacher(X, Y)[0].softmax(dim=-1).flatten(0, 1)
                loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
'''))
    plain = LoopRun(data_dir)
    torch.manual_seed(7)
    teacher = load_unedited_model().GPT(plain.model.config)
    teacher.lm_head.weight.data.mul_(30)

    def compute_loss(model, X, Y):
        logits = model(X, Y)[0]
        with torch.no_grad():
            probs = teacher(X, Y)[0].softmax(dim=-1)
        own_loss = F.cross_entropy(logits.flatten(0, 1), Y.flatten())
        return own_loss - (probs * logits.log_softmax(dim=-1)).sum(dim=-1).mean()

    plain.compute_loss = compute_loss
    check_loop(sources, data_dir, plain, resumes=False)


@pytest.mark.parametrize('data', ['char_data', 'gpt2_data'])
@pytest.mark.parametrize('place', [ACCELERATE, LOOP], ids=['before accelerate', 'at the loop'])
def test_hooks_see_the_activations(tmp_path, request, data, place):
    data_dir = request.getfixturevalue(data)
    sources = edit_train(tmp_path, after(IMPORT, 'import json\n'), before(place, '''
activations = {}
for part_name, part in model.named_modules():
    def log_activation(part, args, y, name=part_name):
        y = y[-1] if isinstance(y, (tuple, list)) else y
        activations.setdefault(name, []).append(y.abs().mean().item())
    part.register_forward_hook(log_activation)
'''), before(END, "say('activations: ' + json.dumps(activations))\n"))
    out, _, losses = sources.train(data_dir, 'out', '--max_iters=2', '--eval_interval=2')
    activations = json.loads(re.search(r'activations: (.*)', out)[1])
    plain = LoopRun(data_dir)
    expected = {}
    for part_name, part in plain.model.named_modules():
        def log_activation(part, args, y, name=part_name):
            y = y[-1] if isinstance(y, (tuple, list)) else y
            expected.setdefault(name, []).append(y.abs().mean().item())
        part.register_forward_hook(log_activation)
    plain.evaluate('train')
    plain.evaluate('val')
    plain.train(2)
    plain.evaluate('train')
    plain.evaluate('val')
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    assert set(expected) <= set(activations)
    assert {'', 'loss_head', 'lm_head', 'transformer.h.1.attn.attention'} <= set(expected)
    for name, numbers in expected.items():
        np.testing.assert_allclose(activations[name], numbers, rtol=1e-3, err_msg=name)


# -----------------------------------------------------------------------------
# the weights
def freeze_all_but_the_last_layer(model):
    for name, p in model.named_parameters():
        p.requires_grad = '.h.1.' in name


@pytest.mark.parametrize('place', [OPTIMIZER, LOOP], ids=['before the optimizer', 'at the loop'])
@pytest.mark.parametrize('data', ['char_data', 'gpt2_data'])
def test_frozen_weights(tmp_path, request, data, place):
    data_dir = request.getfixturevalue(data)
    sources = edit_train(tmp_path, before(place, '''
for name, p in raw_model.named_parameters():
    p.requires_grad = '.h.1.' in name
'''))
    plain = LoopRun(data_dir)
    start = copy.deepcopy(plain.model.state_dict())
    freeze_all_but_the_last_layer(plain.model)
    _, state = check_loop(sources, data_dir, plain)
    for name, weight in state['model'].items():
        assert torch.equal(weight, start[name]) == ('.h.1.' not in name), name


def test_weights_that_are_frozen_at_first(char_data, tmp_path):
    sources = edit_train(tmp_path, after(UPDATE, '''
    for name, p in raw_model.named_parameters():
        p.requires_grad = iter_num >= 3 or '.h.1.' in name
'''))
    plain = LoopRun(char_data)
    freeze_all_but_the_last_layer(plain.model)
    plain.train(3)
    plain.model.requires_grad_(True)
    check_loop(sources, char_data, plain)


# -----------------------------------------------------------------------------
# once in a while
def test_a_third_split(char_data, tmp_path):
    data_dir = copy_data(char_data, tmp_path, 'test.bin')
    sources = edit_train(tmp_path, ("for split in ('train', 'val'):",
                                    "for split in ('train', 'val', 'test'):"))
    plain = LoopRun(data_dir)
    plain.tokens['test'] = np.fromfile(os.path.join(data_dir, 'test.bin'), dtype='<u2')
    out, _ = check_loop(sources, data_dir, plain, effect=0)
    expected = plain.evaluate('test')
    event = metrics(tmp_path / 'whole', 'eval')[-1]
    assert event['test/loss'] == pytest.approx(expected, rel=1e-5) != event['val/loss']
    assert out.count('test loss') == 3 and f'test loss {expected:.4f}' in out


def test_samples_at_each_evaluation(char_data, tmp_path):
    sources = edit_train(tmp_path, after(SAY_EVAL, '''
        model.eval()
        say(f'sample: {model.generate(X[:1, :5], 40, temperature=0).tolist()}')
        model.train()
'''))
    flags = '--max_iters=4', '--eval_interval=2', '--dropout=0.2'
    out, _, losses = sources.train(char_data, 'whole', *flags)
    (tmp_path / 'unedited').mkdir()
    assert losses == Sources(tmp_path / 'unedited').train(char_data, 'out', *flags)[2]
    samples = [json.loads(text) for text in re.findall(r'sample: (.*)', out)]
    plain = LoopRun(char_data)
    X, _ = plain.get_train_batch(4, 0)
    plain.model.load_state_dict(load(tmp_path, 'whole')['model'])
    assert samples[2] == plain.continue_greedily(X[:1, :5], 40).tolist() and len(samples) == 3


# what train.py uses of wandb
WANDB = '''
import json
class Run:
    id = 'abc'
    def log(self, metrics):
        with open('wandb.jsonl', 'a') as f:
            f.write(json.dumps(metrics, default=float) + '\\n')
    def finish(self):
        self.log({'finished': True})
def init(**options):
    return Run()
'''


@pytest.mark.parametrize('code', ['weight.norm().item()', 'weight.norm()',
                                  'np.float32(weight.norm().item())'])
def test_more_metrics(char_data, tmp_path, code):
    sources = edit_train(tmp_path, after(METRICS, f'''
        weight = raw_model.lm_head.weight.detach()
        metrics['weights/norm'] = {code}
'''), after(PROGRESS, "        if wandb_run:\n            wandb_run.log({'iter/loss': loss})\n"))
    (tmp_path / 'wandb.py').write_text(WANDB)
    result = sources.run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out',
                         '--max_iters=2', '--wandb_log=True', cwd=tmp_path)
    lines = (tmp_path / 'wandb.jsonl').read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    assert result.stderr == '' and logs.pop() == {'finished': True}
    norm = load(tmp_path, 'out')['model']['lm_head.weight'].norm().item()
    assert logs[-1]['weights/norm'] == pytest.approx(norm, rel=1e-5)
    event = metrics(tmp_path / 'out', 'eval')[-1]
    assert event['weights/norm'] == pytest.approx(norm, rel=1e-5)
    losses = [event['loss'] for event in metrics(tmp_path / 'out', 'iter')]
    assert [log['iter/loss'] for log in logs if 'iter/loss' in log] == losses


@pytest.mark.parametrize('edit', [
    after(LAST_STEP, "    last_step = last_step or iter_num and losses['val'] < 9.0\n"),
    before(LOG_EVAL, "        if iter_num >= 2 and losses['val'] < 9.0:\n            break\n"),
], ids=['last_step', 'break'])
def test_early_stopping(char_data, tmp_path, edit):
    sources = edit_train(tmp_path, edit)
    result = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                         '--max_iters=6', '--eval_interval=1', ok=None)
    steps = [event['iter'] for event in metrics(tmp_path / 'out', 'eval')]
    iter_num = len(metrics(tmp_path / 'out', 'iter'))
    assert steps == list(range(iter_num + 1)) and iter_num in (1, 2)
    names = [name for name in ('ckpt.pt', 'ckpt_last.pt') if (tmp_path / 'out' / name).exists()]
    states = [torch.load(tmp_path / 'out' / name) for name in names]
    assert iter_num in [state['iter_num'] for state in states]
    assert 'not finite' not in result.stderr and result.returncode == 0, result.stderr
