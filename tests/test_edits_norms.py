"""Edits of the norms in model.py take effect everywhere."""
import numpy as np
import pytest
from conftest import metrics
from edits import PlainRun, Sources, check_export, check_model_edit, load_unedited_model
from torch.nn import functional as F

# places in model.py
NORM = '        super().__init__(ndim, bias=bias)\n'
LN_1 = '        self.ln_1 = LayerNorm(config.n_embd, config.bias)\n'
LN_2 = '        self.ln_2 = LayerNorm(config.n_embd, config.bias)\n'
LN_F = "        modules['ln_f'] = LayerNorm(config.n_embd, config.bias)\n"
LAYER = '''\
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
'''

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

# {name: (edits, whether a cache fits)}; GPT-2's format can express none of them
CASES = {
    'RMS norm': ([(NORM, RMS_NORM)], True),
    "torch's RMS norm": (TORCHS_RMS_NORM, True),
    'no norm, and unused weights': ([NO_NORM], True),
    'identities': (IDENTITIES, True),
    'no norm in the layers': ([NO_NORM_IN_LAYERS], True),
    'sandwich': (SANDWICH, True),
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
