"""Edits of the loss take effect: in model.py and train.py, with small and with large logits."""
import functools
import re

import numpy as np
import pytest
import torch
from conftest import TINY, metrics
from edits import PlainRun, Sources, check_model_edit, load_unedited_model
from torch.nn import functional as F

from runtime import kernels

# places in model.py
LOGITS = ('        logits = lm_head(x)  # (B, T, V). '
          'If you change the logits, change them in GPT.forward, too\n')
IGNORE = 'ignore_index=-1)\n'
RETURN = '        return logits, loss\n'
LM_HEAD = '        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)\n'
LAST_LOGITS = ('            return self.lm_head(x[:, -1:]), None  '
               '# for sampling; LossHead computes its own logits\n')
RETURN_LOSS = '        return self.loss_head(self.lm_head, x, targets)\n'
CLASS = 'class LossHead'

# places in train.py
IMPORT = 'import gc\n'
ACCELERATE = 'kernels.accelerate(model, device_type, dtype)  # faster'
OPTIMIZER = 'optimizer = raw_model.configure_optimizers('
LOOP = 'while True:\n'
LOSS = '''\
            with ctx, kernels.loss_only(raw_model):  # logits would take much memory
                _, loss = model(X, Y)
'''

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
    'soft cap, as a module': (SOFT_CAP, False, None),
    'soft cap, in both places': (SOFT_CAP_TWICE, False, 'GPT, LossHead'),
    'temperature': (TEMPERATURE, False, 'GPT, LossHead'),
    'learned temperature': (LEARNED_TEMPERATURE, False, 'GPT'),
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
