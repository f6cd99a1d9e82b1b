"""Edits of the norms in model.py take effect everywhere."""
import numpy as np
import pytest
import torch
from conftest import metrics
from edits import (
    LAYER,
    PlainRun,
    Sources,
    check_export,
    check_model_edit,
    check_sampling,
    load_unedited_model,
)
from torch.nn import functional as F

from runtime.cache_checks import note_once

# places in model.py
NORM = '        super().__init__(ndim, bias=bias)\n'
LN_1 = '        self.ln_1 = LayerNorm(config.n_embd, config.bias)\n'
LN_2 = '        self.ln_2 = LayerNorm(config.n_embd, config.bias)\n'
LN_F = "        modules['ln_f'] = LayerNorm(config.n_embd, config.bias)\n"

RMS_NORM = NORM + '''
    def forward(self, x):
        return x * x.square().mean(dim=-1, keepdim=True).add(1e-5).rsqrt() * self.weight
'''

NO_NORM = (NORM, NORM + '''
    def forward(self, x):
        return x
''')

IDENTITIES = [(old, old.replace('LayerNorm(config.n_embd, config.bias)', 'nn.Identity()'))
              for old in (LN_1, LN_2, LN_F)]

NO_NORM_IN_LAYERS = (LAYER, LAYER.replace('self.ln_1(x)', 'x').replace('self.ln_2(x)', 'x'))

SANDWICH = [
    (LN_2, LN_2 + LN_1.replace('ln_1', 'ln_3') + LN_2.replace('ln_2', 'ln_4')),
    (LAYER, '''
        x = x + self.ln_3(self.attn(self.ln_1(x)))
        return x + self.ln_4(self.mlp(self.ln_2(x)))
''')]

TORCHS_RMS_NORM = [(old, old.replace('LayerNorm(config.n_embd, config.bias)',
                                     'nn.RMSNorm(config.n_embd)')) for old in (LN_1, LN_2, LN_F)]

# Zhu et al. 2025, https://arxiv.org/abs/2503.10622
DYNAMIC_TANH = (NORM, NORM + '''
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.tanh(self.alpha * x) * self.weight
''')

# its statistics are buffers, which training changes
BATCH_NORM = [
    ('class LayerNorm(nn.LayerNorm)', 'class LayerNorm(nn.BatchNorm1d)'),
    (NORM, '''
        super().__init__(ndim)

    def forward(self, x):
        return super().forward(x.mT).mT
''')]

MEAN_OF_THE_PAST = (NORM, NORM + '''
    def forward(self, x):
        count = torch.arange(1, x.size(1) + 1, device=x.device)
        return super().forward(x - x.cumsum(dim=1) / count[:, None])
''')

NORM_OF_EMBEDDINGS = [
    ("        modules['drop']", LN_F.replace('ln_f', 'ln_e') + "        modules['drop']"),
    ('        x = self.transformer.drop(x)\n', '        x = self.transformer.drop(x)\n'
     '        x = self.transformer.ln_e(x)\n')]

NORM_IN_THE_MLP = [
    ('        self.dropout = nn.Dropout(config.dropout)\n\n    def forward',
     '        self.dropout = nn.Dropout(config.dropout)\n'
     '        self.norm = LayerNorm(4 * config.n_embd, config.bias)\n\n    def forward'),
    ('self.dropout(self.c_proj(x))', 'self.dropout(self.c_proj(self.norm(x)))')]

# {name: (edits, whether a cache fits)}; GPT-2's format can express none of them
CASES = {
    'RMS norm': ([(NORM, RMS_NORM)], True),
    "torch's RMS norm": (TORCHS_RMS_NORM, True),
    'no norm, and unused weights': ([NO_NORM], True),
    'identities': (IDENTITIES, True),
    'no norm in the layers': ([NO_NORM_IN_LAYERS], True),
    'sandwich': (SANDWICH, True),
    'dynamic tanh': ([DYNAMIC_TANH], True),
    'batch norm': (BATCH_NORM, True),
    'mean of the past': ([MEAN_OF_THE_PAST], False),
    'norm of embeddings': (NORM_OF_EMBEDDINGS, True),
    'norm in the MLP': (NORM_IN_THE_MLP, True),
}


@pytest.mark.parametrize('name', CASES)
def test_edits_of_norms(name, char_data, tmp_path):
    edits, caches = CASES[name]
    check_model_edit(tmp_path, char_data, *edits, caches=caches)


def test_post_norm(char_data, tmp_path):
    check_model_edit(tmp_path, char_data, (LAYER, '''
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))
'''), caches=True)


def test_another_eps(char_data, tmp_path):
    check_model_edit(tmp_path, char_data, (NORM, NORM.replace('bias=bias', 'bias=bias, eps=1e-2')),
                     caches=True)


def test_norms_patched_in_train_py(char_data, tmp_path, monkeypatch):
    """An RMS norm for torch's function, at the top of train.py, with and without qk_norm."""
    patch = '''import gc

import torch.nn.functional
torch.nn.functional.layer_norm = lambda x, shape, weight=None, bias=None, eps=1e-5: (
    torch.nn.functional.rms_norm(x, shape, weight, eps))
'''
    sources = Sources(tmp_path, ('train.py', 'import gc\n', patch))
    for qk_norm in (False, True):
        out_dir = f'out{qk_norm}'
        unedited = PlainRun(load_unedited_model(), char_data, qk_norm=qk_norm).train(4)
        with monkeypatch.context() as context:
            context.setattr(F, 'layer_norm', compute_rms_norm)
            plain = PlainRun(load_unedited_model(), char_data, qk_norm=qk_norm).train(4)
            expected_val_loss = plain.evaluate()
        _, _, losses = sources.train(char_data, out_dir, '--max_iters=4', '--eval_interval=4',
                                     f'--qk_norm={qk_norm}')
        np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
        assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > 1e-3, 'no effect'
        val_loss = metrics(tmp_path / out_dir, 'eval')[-1]['val/loss']
        np.testing.assert_allclose(val_loss, expected_val_loss, rtol=1e-4)


def compute_rms_norm(x, shape, weight=None, bias=None, eps=1e-5):
    return F.rms_norm(x, shape, weight, eps)


def test_an_export_does_not_lose_the_eps(char_data, tmp_path):
    for number, eps in enumerate((1e-5, 1e-2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        edit = (NORM, NORM.replace('bias=bias', f'bias=bias, eps={eps}'))
        module = Sources(folder, ('model.py', *edit)).load_model()
        check_export(str(folder), PlainRun(module, char_data), exports=eps == 1e-5)


# as CONTRIBUTING.md says: a field of GPTConfig, and a setting in train.py and bench.py
OPTION = [
    ('model.py', '    embd_conv: int = 0', "    norm: str = 'layer'\n    embd_conv: int = 0"),
    ('model.py', 'class RotaryPositions', '''def make_norm(config):
    if get_option(config, 'norm') == 'rms':
        return nn.RMSNorm(config.n_embd)
    return LayerNorm(config.n_embd, config.bias)


class RotaryPositions'''),
    *[('model.py', old, old.replace('LayerNorm(config.n_embd, config.bias)', 'make_norm(config)'))
      for old in (LN_1, LN_2, LN_F)],
    ('train.py', 'embd_conv = 0', "norm = 'layer'\nembd_conv = 0")]


def test_a_norm_as_an_option(char_data, tmp_path):
    """train.py takes the setting, a resumed run the checkpoint's, and the default changes nothing.
    """
    sources = Sources(tmp_path, *OPTION)
    plain = PlainRun(sources.load_model(), char_data, norm='rms').train(4)
    sources.train(char_data, 'out', '--max_iters=2', '--eval_interval=2', '--norm=rms')
    out, _, losses = sources.train(char_data, 'out', '--max_iters=4', '--eval_interval=2',
                                   '--init_from=resume')
    assert "(ignored, because the weights have other values: norm=layer)" in out
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    val_loss = metrics(tmp_path / 'out', 'eval')[-1]['val/loss']
    np.testing.assert_allclose(val_loss, plain.evaluate(), rtol=1e-4)
    _, _, default_losses = sources.train(char_data, 'default', '--max_iters=4')
    unedited = PlainRun(load_unedited_model(), char_data).train(4)
    np.testing.assert_allclose(default_losses, unedited.losses, rtol=1e-4)
    assert max(abs(a - b) for a, b in zip(losses, default_losses)) > 1e-3, 'no effect'
    check_sampling(sources, plain, caches=True)
    check_export(str(tmp_path), plain, exports=False)


def test_an_option_that_bench_py_does_not_have(char_data, tmp_path):
    flags = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
             '--device=cpu', '--repeats=3', f'--dataset={char_data}']
    sources = Sources(tmp_path, *OPTION)
    for option in ('--n_layer=2', '--norm=rms'):
        err = sources.run('bench.py', *flags, option, ok=False).stderr
        assert 'norm' in err and 'bench.py' in err, err


@pytest.mark.parametrize('name', ['layer_norm', 'linear', 'gelu', 'embedding'])
@pytest.mark.parametrize('mixes', [False, True], ids=['in each token', 'across tokens'])
def test_functions_of_torch_patched_while_sampling(mixes, name, monkeypatch, capsys):
    """A cache fits only if a token's numbers don't depend on how many tokens come with it."""
    module = load_unedited_model()
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(32, 50, 2, 2, 32, bias=False)).eval()
    for p in model.parameters():
        p.data *= 4  # a new model repeats its last token
    prompt = torch.randint(50, (3, 5))
    unpatched = model.generate(prompt, 40, temperature=0)
    plain = getattr(F, name)

    def compute(*args, **options):
        y = plain(*args, **options)
        return y - 0.5 * y.cumsum(dim=-2 if mixes else -1)

    monkeypatch.setattr(F, name, compute)
    note_once.cache_clear()
    expected = model.generate(prompt, 40, temperature=0, use_cache=False)
    assert not torch.equal(expected, unpatched), 'no effect'
    assert torch.equal(model.generate(prompt, 40, temperature=0), expected)
    assert ('without a KV cache' in capsys.readouterr().err) == mixes
