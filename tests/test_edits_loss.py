"""Edits of the loss take effect: in model.py and train.py, with small and with large logits."""
import functools
import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY, metrics
from edits import (
    ACCELERATE,
    IMPORT,
    LM_HEAD,
    LOOP,
    LOSS,
    OPTIMIZER,
    RUN_LAYERS,
    PlainRun,
    Sources,
    check_export,
    check_model_edit,
    check_sampling,
    load_unedited_model,
)
from torch.nn import functional as F

from runtime import kernels

# places in model.py
LOGITS = ('        logits = lm_head(x)  # (B, T, V). '
          'If you change the logits, change them in GPT.forward, too\n')
IGNORE = 'ignore_index=-1)\n'
RETURN = '        return logits, loss\n'
LAST_LOGITS = ('            return self.lm_head(x[:, -1:]), None  '
               '# for sampling; LossHead computes its own logits\n')
RETURN_LOSS = '        return self.loss_head(self.lm_head, x, targets)\n'
CLASS = 'class LossHead'

# places in train.py

LABEL_SMOOTHING = (IGNORE, 'ignore_index=-1,\n' + ' ' * 31 + 'label_smoothing=0.3)\n')

Z_LOSS = (RETURN, '''
        loss = loss + 1e-2 * wide_logits.logsumexp(dim=-1).square().mean()
        return logits, loss
''')

FOCAL_LOSS = [
    (IGNORE, 'ignore_index=-1,\n' + ' ' * 31 + "reduction='none')\n"),
    (RETURN, '''
        loss = ((1 - (-loss).exp()) ** 10 * loss).sum() / (targets != -1).sum()
        return logits, loss
''')]

ENTROPY_BONUS = (RETURN, '''
        log_probs = wide_logits.log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1).mean()
        return logits, loss - 0.1 * entropy
''')

TOKEN_WEIGHTS = (IGNORE, '''ignore_index=-1,
                               weight=torch.arange(logits.size(-1)) % 5 + 0.1)
''')

MASKED_PROMPTS = (LOGITS, LOGITS + '''
        targets = targets.clone()
        targets[:, :targets.size(1) // 2] = -1
''')

MASKED_IN_GPT = (RETURN_LOSS, '''
        first_half = torch.arange(T, device=idx.device) < T // 2
        return self.loss_head(self.lm_head, x, targets.masked_fill(first_half, -1))
''')

WRITTEN_IN_GPT = (RETURN_LOSS, '''
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2)
        return logits, loss
''')

ACTIVATION_PENALTY = (RETURN_LOSS, '''
        logits, loss = self.loss_head(self.lm_head, x, targets)
        return logits, loss + 0.1 * x.square().mean()
''')

SUBCLASS = [
    ('class GPT(nn.Module)', '''class SmoothLossHead(LossHead):
    def forward(self, lm_head, x, targets):
        logits, loss = super().forward(lm_head, x, targets)
        return logits, loss - 0.1 * logits.log_softmax(dim=-1).mean()


class GPT(nn.Module)'''),
    ('self.loss_head = LossHead()', 'self.loss_head = SmoothLossHead()')]

SOFT_CAP = [
    (CLASS, '''class CappedLinear(nn.Linear):
    def forward(self, x):
        return 0.3 * torch.tanh(super().forward(x) / 0.3)


class LossHead'''),
    (LM_HEAD, LM_HEAD.replace('nn.Linear', 'CappedLinear'))]

SOFT_CAP_TWICE = [
    (LOGITS, '        logits = 0.3 * torch.tanh(lm_head(x) / 0.3)\n'),
    (LAST_LOGITS, '            return 0.3 * torch.tanh(self.lm_head(x[:, -1:]) / 0.3), None\n')]

TEMPERATURE = [
    (LOGITS, '        logits = lm_head(x) * 4\n'),
    (LAST_LOGITS, '            return self.lm_head(x[:, -1:]) * 4, None\n')]

LEARNED_TEMPERATURE = [
    (LM_HEAD, LM_HEAD + '        self.temperature = nn.Parameter(torch.tensor(0.3))\n'),
    (LAST_LOGITS, '            return self.lm_head(x[:, -1:]) / self.temperature, None\n'),
    (RETURN_LOSS, '''
        return self.loss_head(self.lm_head, x / self.temperature, targets)
''')]

TOKEN_AFTER_NEXT = (RETURN, '''
        later = F.cross_entropy(wide_logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        return logits, loss + 0.5 * later
''')

# Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737
SECOND_HEAD = [
    (LM_HEAD, LM_HEAD + '        self.second = nn.Linear(config.n_embd, config.n_embd)\n'),
    (RETURN_LOSS, '''
        logits, loss = self.loss_head(self.lm_head, x, targets)
        _, later = self.loss_head(self.lm_head, self.second(x[:, :-1]), targets[:, 1:])
        return logits, loss + later
''')]

# Lee et al. 2014, https://arxiv.org/abs/1409.5185
LOSS_OF_EACH_LAYER = [
    (RUN_LAYERS, '        losses = []\n' + RUN_LAYERS + '''
            if targets is not None:
                early_x = self.transformer.ln_f(x)
                losses.append(self.loss_head(self.lm_head, early_x, targets)[1])
'''),
    (RETURN_LOSS, '''
        logits, loss = self.loss_head(self.lm_head, x, targets)
        return logits, loss + 0.2 * sum(losses)
''')]

BIAS = (LM_HEAD, LM_HEAD.replace('bias=False', 'bias=True'))

# {name: (edits, whether GPT-2's format can express the logits, the part that the line names)}
CASES = {
    'label smoothing': ([LABEL_SMOOTHING], True, 'LossHead'),
    'z-loss': ([Z_LOSS], True, 'LossHead'),
    'focal loss': (FOCAL_LOSS, True, 'LossHead'),
    'entropy bonus': ([ENTROPY_BONUS], True, 'LossHead'),
    'token weights': ([TOKEN_WEIGHTS], True, 'LossHead'),
    'masked prompts': ([MASKED_PROMPTS], True, 'LossHead'),
    'masked prompts, in GPT': ([MASKED_IN_GPT], True, 'GPT'),
    'written in GPT': ([WRITTEN_IN_GPT], True, 'GPT'),
    'penalty for activations': ([ACTIVATION_PENALTY], True, 'GPT'),
    'subclass': (SUBCLASS, True, 'SmoothLossHead'),
    'soft cap, as a module': (SOFT_CAP, False, 'lm_head'),
    'soft cap, in both places': (SOFT_CAP_TWICE, False, 'GPT, LossHead'),
    'temperature': (TEMPERATURE, False, 'GPT, LossHead'),
    'learned temperature': (LEARNED_TEMPERATURE, False, 'GPT'),
    'token after next': ([TOKEN_AFTER_NEXT], True, 'LossHead'),
    'second head': (SECOND_HEAD, False, 'GPT'),
    'loss of each layer': (LOSS_OF_EACH_LAYER, True, 'GPT'),
    'bias of the output layer': ([BIAS], False, 'lm_head'),
}


@pytest.fixture(scope='module')
def gpt2_data(tmp_path_factory):
    """Data of GPT-2's vocabulary: a micro-batch has so many logits that they are not stored."""
    folder = tmp_path_factory.mktemp('gpt2_data')
    tokens = np.random.default_rng(0).integers(40, 90, 2000).astype(np.uint16)
    for split in ('train', 'val'):
        tokens.tofile(folder / f'{split}.bin')
    return str(folder)


@pytest.fixture(params=['char_data', 'gpt2_data'])
def data_dir(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope='module')
def unedited_losses(gpt2_data):
    return PlainRun(load_unedited_model(), gpt2_data).train(3).losses


def read_changed_parts(stderr):
    """The parts that the line about changed parts names; None if there is no such line."""
    lines = re.findall('changed parts of the model .*: (.*)\n', stderr)
    assert len(lines) <= 1, stderr
    return lines[0] if lines else None


@pytest.mark.parametrize('name', CASES)
def test_edits_of_the_loss(name, char_data, tmp_path):
    edits, exports, _ = CASES[name]
    check_model_edit(tmp_path, char_data, *edits, exports=exports, caches=True)


@pytest.mark.parametrize('name', CASES)
def test_edits_of_the_loss_of_a_large_vocabulary(name, gpt2_data, unedited_losses, tmp_path):
    edits, _, part = CASES[name]
    sources = Sources(tmp_path, *(('model.py', old, new) for old, new in edits))
    plain = PlainRun(sources.load_model(), gpt2_data).train(3)
    check_training(sources, plain, gpt2_data, unedited_losses, part)
    check_sampling(sources, plain, caches=True)


def check_training(sources, plain, data_dir, unedited_losses, part):
    """Training and --eval_only have the losses of the plain run, and one line names the part."""
    _, err, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
    assert read_changed_parts(err) == part
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    assert max(abs(a - b) for a, b in zip(losses, unedited_losses)) > 1e-3, 'no effect'
    val_loss = metrics(f'{sources.folder}/out', 'eval')[-1]['val/loss']
    np.testing.assert_allclose(val_loss, plain.evaluate(), rtol=1e-4)
    out, err, _ = sources.train(data_dir, 'out', '--init_from=resume', '--eval_only=True')
    assert read_changed_parts(err) == part
    printed_loss = float(re.findall(r'val loss (\d+\.\d+)', out)[-1])
    np.testing.assert_allclose(printed_loss, plain.evaluate(), atol=1e-4)


def test_without_edits_no_part_is_named(data_dir, tmp_path):
    _, err, _ = Sources(tmp_path).train(data_dir, 'out', '--max_iters=1')
    assert read_changed_parts(err) is None


def test_large_logits_are_left_out_only_without_edits(gpt2_data):
    """So the tests above would fail if the loss of an edited model were computed in pieces."""
    plain = PlainRun(load_unedited_model(), gpt2_data)
    kernels.accelerate(plain.model, 'cpu', 'float32')
    X, Y = plain.get_batch('train', plain.order.get_starts(0, 0))
    with kernels.loss_only(plain.model):
        logits, loss = plain.model(X, Y)
    assert logits is None and Y.numel() * plain.model.config.vocab_size > 2 ** 22
    torch.testing.assert_close(loss, plain.model(X, Y)[1])


def test_an_edited_loss_in_bfloat16(gpt2_data, unedited_losses, tmp_path):
    """The faster loss rounds the logits; plain torch, under autocast, is as close as that."""
    def compute_loss(model, X, Y):
        with torch.autocast('cpu', torch.bfloat16):
            return model(X, Y)[1]

    sources = Sources(tmp_path, ('model.py', *Z_LOSS))
    plain = PlainRun(sources.load_model(), gpt2_data).train(3, compute_loss)
    _, err, losses = sources.train(gpt2_data, 'out', '--max_iters=3', '--dtype=bfloat16')
    assert read_changed_parts(err) == 'LossHead'
    np.testing.assert_allclose(losses, plain.losses, rtol=2e-3)
    assert losses[0] - unedited_losses[0] > 1, 'no effect'


def test_an_edited_loss_in_bench_py(gpt2_data, unedited_losses, tmp_path):
    shape = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4']
    sources = Sources(tmp_path, ('model.py', *Z_LOSS))
    result = sources.run('bench.py', *shape, '--device=cpu', '--dtype=float32', '--repeats=3',
                         f'--dataset={gpt2_data}')
    assert read_changed_parts(result.stderr) == 'LossHead'
    # the training of a benchmark is short
    assert json.loads(result.stdout.splitlines()[-1])['loss'] - unedited_losses[0] > 0.5


def test_cross_entropy_patched_in_model_py(data_dir, tmp_path, monkeypatch):
    unedited_losses = PlainRun(load_unedited_model(), data_dir).train(3).losses
    functional = 'from torch.nn import functional as F\n'
    sources = Sources(tmp_path, ('model.py', functional, f'''import functools

{functional}
F.cross_entropy = functools.partial(F.cross_entropy, label_smoothing=0.3)
'''))
    monkeypatch.setattr(F, 'cross_entropy', F.cross_entropy)  # undoes the patch afterwards
    plain = PlainRun(sources.load_model(), data_dir).train(3)
    check_training(sources, plain, data_dir, unedited_losses, 'LossHead')


def test_another_functional_in_model_py(gpt2_data, unedited_losses, tmp_path):
    """All parts of the model that call it run as they are written."""
    functional = 'from torch.nn import functional as F\n'
    sources = Sources(tmp_path, ('model.py', functional, f'''import functools
import types

{functional}
F = types.SimpleNamespace(**vars(F))
F.cross_entropy = functools.partial(F.cross_entropy, label_smoothing=0.3)
'''))
    plain = PlainRun(sources.load_model(), gpt2_data).train(3)
    check_training(sources, plain, gpt2_data, unedited_losses, 'Attention, GPT, LossHead')


# -----------------------------------------------------------------------------
# in train.py
ADD_Z_LOSS = '''\
                logits, loss = model(X, Y)
                loss = loss + 1e-2 * logits.float().logsumexp(dim=-1).square().mean()
'''


def compute_z_loss(model, X, Y):
    logits, loss = model(X, Y)
    return loss + 1e-2 * logits.float().logsumexp(dim=-1).square().mean()


def test_a_z_loss_in_train_py(data_dir, tmp_path):
    """In training only: the evaluation has a call of its own."""
    sources = Sources(tmp_path, ('train.py', LOSS, '            with ctx:\n' + ADD_Z_LOSS))
    _, err, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
    assert read_changed_parts(err) is None
    plain = PlainRun(load_unedited_model(), data_dir).train(3, compute_z_loss)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    unedited = PlainRun(load_unedited_model(), data_dir).train(3)
    assert losses[0] - unedited.losses[0] > 1e-2
    val_loss = metrics(tmp_path / 'out', 'eval')[-1]['val/loss']
    np.testing.assert_allclose(val_loss, plain.evaluate(), rtol=1e-4)


def test_a_z_loss_in_train_py_without_logits_is_an_error(data_dir, tmp_path):
    with_loss_only = LOSS.splitlines(keepends=True)[0] + ADD_Z_LOSS
    sources = Sources(tmp_path, ('train.py', LOSS, with_loss_only))
    result = sources.run('train.py', *TINY, f'--dataset={data_dir}', f'--out_dir={tmp_path}/out',
                         '--max_iters=1', ok=None)
    assert result.returncode
    assert 'logits' in result.stderr and 'NoneType' in result.stderr
    assert not metrics(tmp_path / 'out', 'iter')


PATCH = (IMPORT, '''import functools
import gc

import torch.nn.functional
torch.nn.functional.cross_entropy = functools.partial(
    torch.nn.functional.cross_entropy, label_smoothing=0.5)
''')


def compute_smooth_loss(model, X, Y):
    logits, _ = model(X, Y)
    return F.cross_entropy(logits.flatten(0, 1), Y.flatten(), label_smoothing=0.5)


def test_cross_entropy_patched_in_train_py(data_dir, tmp_path, monkeypatch):
    unedited_losses = PlainRun(load_unedited_model(), data_dir).train(3).losses
    sources = Sources(tmp_path, ('train.py', *PATCH))
    with monkeypatch.context() as patch:
        patch.setattr(F, 'cross_entropy', functools.partial(F.cross_entropy, label_smoothing=0.5))
        plain = PlainRun(load_unedited_model(), data_dir).train(3)
        check_training(sources, plain, data_dir, unedited_losses, 'LossHead')
    smooth = PlainRun(load_unedited_model(), data_dir).train(3, compute_smooth_loss)
    np.testing.assert_allclose(plain.losses, smooth.losses, rtol=1e-5)


def test_cross_entropy_patched_after_the_model_was_made(data_dir, tmp_path):
    """Just before the loop, where accelerate() has been called already."""
    patch = PATCH[1].replace('import gc\n', '')
    sources = Sources(tmp_path, ('train.py', LOOP, patch + LOOP))
    _, _, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
    plain = PlainRun(load_unedited_model(), data_dir).train(3, compute_smooth_loss)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    unedited = PlainRun(load_unedited_model(), data_dir).train(3)
    assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > 1e-3, 'no effect'


def test_a_loss_head_set_in_train_py(data_dir, tmp_path):
    """Another module in the model's place for the loss, before accelerate() and after it."""
    setting = '''class Half(torch.nn.Module):
    def forward(self, lm_head, x, targets):
        logits = lm_head(x)
        targets = targets[:, ::2].flatten()
        return logits, torch.nn.functional.cross_entropy(logits[:, ::2].flatten(0, 1), targets)


model.loss_head = Half()
'''

    def compute_half_loss(model, X, Y):
        logits, _ = model(X, Y)
        return F.cross_entropy(logits[:, ::2].flatten(0, 1), Y[:, ::2].flatten())

    plain = PlainRun(load_unedited_model(), data_dir).train(3, compute_half_loss)
    unedited = PlainRun(load_unedited_model(), data_dir).train(3)
    for number, place in enumerate((ACCELERATE, OPTIMIZER)):
        folder = tmp_path / str(number)
        folder.mkdir()
        sources = Sources(folder, ('train.py', place, setting + place))
        _, _, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
        np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
        assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > 1e-3, 'no effect'


def test_a_hook_on_the_output_layer(data_dir, tmp_path):
    """It changes the logits, so these must be computed."""
    hook = 'raw_model.lm_head.register_forward_hook(lambda module, args, logits: 3 * logits)\n'
    sources = Sources(tmp_path, ('train.py', OPTIMIZER, hook + OPTIMIZER))
    _, _, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
    plain = PlainRun(load_unedited_model(), data_dir)
    plain.model.lm_head.register_forward_hook(lambda module, args, logits: 3 * logits)
    plain.train(3)
    unedited = PlainRun(load_unedited_model(), data_dir).train(3)
    assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > 1e-3, 'no effect'
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    val_loss = metrics(tmp_path / 'out', 'eval')[-1]['val/loss']
    np.testing.assert_allclose(val_loss, plain.evaluate(), rtol=1e-4)


CLASS_PATCH = '''from model import LossHead


def forward(self, lm_head, x, targets):
    logits = lm_head(x)
    return logits, torch.nn.functional.multi_margin_loss(logits.flatten(0, 1), targets.flatten())


LossHead.forward = forward
'''


@pytest.mark.parametrize('place', [ACCELERATE, LOOP], ids=['before', 'at the loop'])
def test_a_forward_of_the_class_set_in_train_py(place, data_dir, tmp_path):
    def compute_margin_loss(model, X, Y):
        logits, _ = model(X, Y)
        return F.multi_margin_loss(logits.flatten(0, 1), Y.flatten())

    sources = Sources(tmp_path, ('train.py', place, CLASS_PATCH + place))
    _, err, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
    plain = PlainRun(load_unedited_model(), data_dir).train(3, compute_margin_loss)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    assert plain.losses[0] < 1.1 < PlainRun(load_unedited_model(), data_dir).train(1).losses[0]
    if place == ACCELERATE:
        assert read_changed_parts(err) == 'LossHead'


WEIGHTS_AS_AN_ARGUMENT = [
    ('model.py', 'def forward(self, lm_head, x, targets):',
     'def forward(self, lm_head, x, targets, weights=None):'),
    ('model.py', IGNORE, IGNORE.replace(')', ",\n" + ' ' * 31 + "reduction='none')")),
    ('model.py', RETURN, '''
        if weights is not None:
            loss = loss * weights.flatten()
        return logits, loss.mean()
'''),
    ('model.py', 'def forward(self, idx, targets=None):',
     'def forward(self, idx, targets=None, weights=None):'),
    ('model.py', RETURN_LOSS, RETURN_LOSS.replace('targets)', 'targets, weights)')),
    ('train.py', LOSS, LOSS.replace('(X, Y)', '(X, Y, 0.5 + X % 3)'))]


def test_weights_of_the_tokens_as_an_argument(data_dir, tmp_path):
    sources = Sources(tmp_path, *WEIGHTS_AS_AN_ARGUMENT)
    plain = PlainRun(sources.load_model(), data_dir)
    plain.train(3, lambda model, X, Y: model(X, Y, 0.5 + X % 3)[1])
    unedited = PlainRun(load_unedited_model(), data_dir).train(3)
    check_training(sources, plain, data_dir, unedited.losses, 'GPT, LossHead')


# Drucker & Le Cun 1992: the loss must not change much with what comes in, here the last norm
GRADIENT_PENALTY = '''\
            norm_weight = raw_model.transformer.ln_f.weight
            gradient, = torch.autograd.grad(loss, norm_weight, create_graph=True)
            loss = loss + 1e3 * gradient.square().sum()
'''


def test_a_gradient_penalty_in_train_py(data_dir, tmp_path):
    """It needs the loss of model.py: the loss in pieces has no second derivative."""
    def compute_loss(model, X, Y):
        _, loss = model(X, Y)
        gradient, = torch.autograd.grad(loss, model.transformer.ln_f.weight, create_graph=True)
        return loss + 1e3 * gradient.square().sum()

    plain_loss = LOSS.replace(', kernels.loss_only(raw_model)', '')
    sources = Sources(tmp_path, ('train.py', LOSS, plain_loss + GRADIENT_PENALTY))
    _, _, losses = sources.train(data_dir, 'out', '--max_iters=3', '--eval_interval=3')
    plain = PlainRun(load_unedited_model(), data_dir).train(3, compute_loss)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-3)
    unedited = PlainRun(load_unedited_model(), data_dir).train(3)
    assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > 1e-2, 'no effect'


def test_a_gradient_penalty_of_a_loss_in_pieces_is_an_error(gpt2_data, tmp_path):
    sources = Sources(tmp_path, ('train.py', LOSS, LOSS + GRADIENT_PENALTY))
    result = sources.run('train.py', *TINY, f'--dataset={gpt2_data}', f'--out_dir={tmp_path}/out',
                         '--max_iters=1', ok=None)
    assert result.returncode and 'loss_only' in result.stderr
    assert not metrics(tmp_path / 'out', 'iter')


@pytest.mark.parametrize('edit', TEMPERATURE, ids=['in training', 'in sampling'])
def test_logits_that_are_edited_in_one_place_are_not_exported(edit, data_dir, tmp_path):
    module = Sources(tmp_path, ('model.py', *edit)).load_model()
    check_export(str(tmp_path), PlainRun(module, data_dir), exports=False)
