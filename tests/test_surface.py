"""What people use of nanoGPT's model.py works with ours: names, configs, dtypes, scripts."""
import argparse
import collections
import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, TINY, check_result, run
from edits import Sources, continue_greedily
from torch.nn import functional as F

from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm
from runtime import kernels
from runtime.meta import read_meta
from runtime.tokenizer import get_tokenizer

SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, dropout=0.0, bias=True)
IDX = torch.arange(4 * 17).view(4, 17) % 11  # it learns to count
X, Y = IDX[:, :-1], IDX[:, 1:]


def make_model(config=None, is_fast=False, **options):
    torch.manual_seed(0)
    model = GPT(config or GPTConfig(**{**SHAPE, **options}))
    if is_fast:
        kernels.accelerate(model, 'cpu', 'float32')
    return model


def train(model, iterations=20):
    """The losses of some updates."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    losses = []
    for _ in range(iterations):
        _, loss = model(X, Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def attend(attn, x):
    """The causal attention of x (B, T, C), one head after another, by the layer's weights."""
    B, T, C = x.size()
    size = C // attn.n_head
    q, k, v = F.linear(x, attn.c_attn.weight, attn.c_attn.bias).split(C, dim=2)
    future = torch.full((T, T), -math.inf, dtype=x.dtype).triu(1)
    heads = []
    for begin in range(0, C, size):
        channels = slice(begin, begin + size)
        scores = torch.einsum('bic,bjc->bij', q[:, :, channels], k[:, :, channels])
        weights = (scores / math.sqrt(size) + future).softmax(dim=-1)
        heads.append(torch.einsum('bij,bjc->bic', weights, v[:, :, channels]))
    return F.linear(torch.cat(heads, dim=2), attn.c_proj.weight, attn.c_proj.bias)


def feed_forward(mlp, x):
    x = F.gelu(F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias))
    return F.linear(x, mlp.c_proj.weight, mlp.c_proj.bias)


def normalize(norm, x):
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    return x if norm.bias is None else x + norm.bias


def compute_logits(model, idx):
    """The logits (B, T, V) by the names that nanoGPT's modules have."""
    parts = model.transformer
    x = parts.wte.weight[idx] + parts.wpe.weight[:idx.size(1)]
    for block in parts.h:
        x = x + attend(block.attn, normalize(block.ln_1, x))
        x = x + feed_forward(block.mlp, normalize(block.ln_2, x))
    return normalize(parts.ln_f, x) @ model.lm_head.weight.t()


# -----------------------------------------------------------------------------
# modules and their attributes
@pytest.mark.parametrize('bias', [True, False])
def test_modules_by_themselves(bias):
    torch.manual_seed(0)
    config, x = GPTConfig(**{**SHAPE, 'bias': bias}), torch.randn(3, 7, 32)
    norm, attn = LayerNorm(32, bias), CausalSelfAttention(config)
    mlp, block = MLP(config), Block(config)
    for module in (norm, attn, mlp, block):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.3)
    torch.testing.assert_close(norm(x), normalize(norm, x))
    torch.testing.assert_close(attn(x), attend(attn, x))
    torch.testing.assert_close(mlp(x), feed_forward(mlp, x))
    x_mid = x + attend(block.attn, normalize(block.ln_1, x))
    expected = x_mid + feed_forward(block.mlp, normalize(block.ln_2, x_mid))
    torch.testing.assert_close(block(x), expected)
    assert (LayerNorm(8, bias=bias).bias is not None) == bias
    assert LayerNorm(ndim=8, bias=False)(torch.ones(2, 8)).shape == (2, 8)


def test_attributes():
    model = make_model(dropout=0.25)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(model.transformer) == ['wte', 'wpe', 'drop', 'h', 'ln_f']
    assert model.transformer.drop.p == 0.25
    for block in model.transformer.h:
        assert list(dict(block.named_children())) == ['ln_1', 'attn', 'ln_2', 'mlp']
        assert isinstance(block, Block) and isinstance(block.ln_1, LayerNorm)
        attn, mlp = block.attn, block.mlp
        assert (attn.n_head, attn.n_embd, attn.dropout, attn.flash) == (2, 32, 0.25, True)
        rates = [part.p for part in (attn.attn_dropout, attn.resid_dropout, mlp.dropout)]
        assert rates == [0.25] * 3
        assert attn.c_attn.weight.shape == (96, 32) and attn.c_proj.weight.shape == (32, 32)
        assert mlp.c_fc.weight.shape == (128, 32) and mlp.c_proj.weight.shape == (32, 128)
        assert isinstance(mlp.gelu, torch.nn.GELU)


@pytest.mark.parametrize('is_fast', [False, True])
@pytest.mark.parametrize('flash', [False, True])
@pytest.mark.parametrize('name', ['dropout', 'attn_dropout.p'])
def test_a_rate_that_was_set_takes_effect(is_fast, flash, name):
    attn, n, p = make_model(is_fast=is_fast, bias=False).transformer.h[0].attn, 20_000, 0.3
    attn.flash = flash
    if name == 'dropout':
        attn.dropout = p
    else:
        attn.attn_dropout.p = p
    assert attn.dropout == p
    # a single token attends to itself with a weight of 1, which dropout makes 0 or 1 / (1 - p)
    with torch.no_grad():
        attn.c_attn.weight.fill_(1 / 32)
        attn.c_proj.weight.copy_(torch.eye(32))
    y = attn(torch.ones(n, 1, 32))
    heads = y.view(n, 2, 16)
    assert torch.equal(heads.amin(dim=2), heads.amax(dim=2))  # a whole head at once
    dropped = (heads[:, :, 0] == 0).float()
    torch.testing.assert_close(heads[:, :, 0], (1 - dropped) / (1 - p))
    assert abs(dropped.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / (2 * n))
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    attn.eval()
    torch.testing.assert_close(attn(torch.ones(5, 1, 32)), torch.ones(5, 1, 32))


def test_a_subclass_with_a_module_named_dropout():
    class Gated(CausalSelfAttention):
        def __init__(self, config):
            super().__init__(config)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(super().forward(x))

    model = make_model()
    for block in model.transformer.h:
        block.attn = Gated(model.config)
    assert (model.transformer.h[0].attn(torch.randn(4, 8, 32)) == 0).float().mean() > 0.4
    losses = train(model)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize('is_fast', [False, True])
def test_without_flash_the_numbers_are_the_same(is_fast):
    results = []
    for flash in (True, False):
        model = make_model(is_fast=is_fast)
        for block in model.transformer.h:
            block.attn.flash = flash
        logits, loss = model(X, Y)
        loss.backward()
        results.append([logits, loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[0][0], compute_logits(make_model(), X))


# -----------------------------------------------------------------------------
# configs
FIELDS = [(name, type(value), value) for name, value in SHAPE.items()]
CONFIGS = {
    'dataclass': dataclasses.make_dataclass('OwnConfig', FIELDS),
    'frozen': dataclasses.make_dataclass('FrozenConfig', FIELDS, frozen=True),
    'namespace': lambda: types.SimpleNamespace(**SHAPE),
    'argparse': lambda: argparse.Namespace(**SHAPE),
    'class': lambda: type('Config', (), dict(SHAPE)),
    'object': type('Config', (), dict(SHAPE)),
    'namedtuple': lambda: collections.namedtuple('Config', SHAPE)(**SHAPE),
}


def read_fields(config):
    return {name: value for name in dir(config) if not name.startswith('__')
            for value in [getattr(config, name)] if not callable(value)}


@pytest.mark.parametrize('kind', CONFIGS)
def test_any_object_with_the_seven_fields_is_a_config(kind):
    config = CONFIGS[kind]()
    fields = read_fields(config)
    model, expected = make_model(config), make_model()
    assert model.config is config
    assert torch.equal(model(X, Y)[0], expected(X, Y)[0])
    assert model.get_num_params() == expected.get_num_params()
    assert model.estimate_mfu(4, 0.5) == expected.estimate_mfu(4, 0.5)
    kernels.accelerate(model, 'cpu', 'float32')
    assert train(model, 5) == train(expected, 5)
    model.eval()
    tokens = model.generate(X[:, :5], 20, temperature=0)
    assert torch.equal(tokens, continue_greedily(expected.eval(), X[:, :5], 20))
    assert torch.equal(model.generate(X[:, :5], 20, temperature=0, use_cache=False), tokens)
    assert read_fields(config) == fields


@pytest.mark.parametrize('kind', ['dataclass', 'namespace', 'argparse', 'object'])
def test_crop_block_size_of_another_config(kind):
    model = make_model(CONFIGS[kind]()).eval()
    expected, _ = model(X[:, :8])
    model.crop_block_size(8)
    assert model.config.block_size == 8
    torch.testing.assert_close(model(X[:, :8])[0], expected)
    assert model.generate(X[:, :5], 12).shape == (4, 17)


def test_the_arguments_have_their_names():
    model = make_model().eval()
    config = GPTConfig(16, 50, 2, 2, 32, 0.0, True)
    assert config == model.config
    _, loss = model(idx=X, targets=Y)
    assert torch.equal(loss, model(X, Y)[1])
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95),
                                           device_type='cpu')
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.1, 0.0]
    model.crop_block_size(block_size=8)
    tokens = model.generate(idx=X[:, :3], max_new_tokens=4, temperature=0.5, top_k=1)
    assert torch.equal(tokens, model.generate(X[:, :3], 4, 1.0, 1))


# -----------------------------------------------------------------------------
# mistakes
@pytest.mark.parametrize('mistake', [
    lambda: GPT(GPTConfig(**{**SHAPE, 'n_head': 3})),
    lambda: CausalSelfAttention(GPTConfig(**{**SHAPE, 'n_head': 5})),
    lambda: make_model()(torch.zeros(1, 17, dtype=torch.long)),
    lambda: make_model()(torch.zeros(1, 17, dtype=torch.long), torch.zeros(1, 17)),
    lambda: make_model(is_fast=True)(torch.zeros(1, 17, dtype=torch.long)),
    lambda: make_model().crop_block_size(17),
    lambda: GPT.from_pretrained('gpt3'),
    lambda: GPT.from_pretrained('gpt2-small', dict(dropout=0.1)),
    lambda: GPT.from_pretrained('gpt2', dict(n_layer=6)),
    lambda: GPT.from_pretrained('gpt2', override_args=dict(dropout=0.1, bias=False)),
])
def test_mistakes_that_nanogpt_asserts(mistake):
    with pytest.raises(AssertionError, match='.'):  # it says what is wrong
        mistake()


# -----------------------------------------------------------------------------
# dtypes
@pytest.mark.parametrize('is_fast', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_float64_stays_float64(is_fast, bias):
    model = make_model(is_fast=is_fast, bias=bias).to(torch.float64)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    logits, loss = model(X, Y)
    with kernels.loss_only(model):
        _, same_loss = model(X, Y)
    expected = compute_logits(model, X)
    expected_loss = -expected.log_softmax(dim=-1).gather(2, Y[:, :, None]).mean()
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for value in (loss, same_loss):
        torch.testing.assert_close(value, expected_loss, rtol=1e-12, atol=0)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params)
    torch.testing.assert_close(grads, torch.autograd.grad(expected_loss, params), rtol=1e-10,
                               atol=1e-12)


@pytest.mark.parametrize('is_fast', [False, True])
@pytest.mark.parametrize('dtype, loss_dtype', [(torch.float64, torch.float64),
                                               (torch.bfloat16, torch.float32),
                                               (torch.float16, torch.float32)])
def test_a_model_of_another_dtype_trains_and_generates(dtype, loss_dtype, is_fast):
    model = make_model(is_fast=is_fast).to(dtype)
    logits, loss = model(X, Y)
    assert logits.dtype == dtype and loss.dtype == loss_dtype
    assert torch.equal(loss, F.cross_entropy(logits.to(loss_dtype).flatten(0, 1), Y.flatten()))
    torch.testing.assert_close(loss.float(), make_model()(X, Y)[1], rtol=0, atol=0.02)
    # float16 has no eps of 1e-8, so its Adam may divide by 0; one update is enough
    losses = train(model, 2 if dtype == torch.float16 else 30)
    assert losses[-1] < losses[0] - 0.2
    assert all(p.dtype == dtype for p in model.parameters())
    model.eval()
    tokens = model.generate(X[:, :5], 20, temperature=0)
    assert tokens.shape == (4, 25) and tokens.dtype == torch.long
    if dtype == torch.float64:
        assert torch.equal(tokens, continue_greedily(model, X[:, :5], 20))
    assert model.generate(X[:, :5], 20, temperature=0.8, top_k=3).max() < 50


def test_half_and_double_of_a_copy():
    model = make_model().eval()
    expected, _ = model(X)
    for other, tolerance in ((copy.deepcopy(model).half(), 1e-2),
                             (copy.deepcopy(model).bfloat16(), 5e-2),
                             (copy.deepcopy(model).double(), 1e-5)):
        assert other.lm_head.weight is other.transformer.wte.weight
        torch.testing.assert_close(other(X)[0].float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('is_fast', [False, True])
def test_gradcheck(is_fast):
    model = make_model(is_fast=is_fast, n_layer=1, n_embd=4, vocab_size=11, block_size=4).double()
    names = list(dict(model.named_parameters()))
    weights = tuple(0.5 * torch.randn_like(p).requires_grad_() for p in model.parameters())

    def compute_loss(*weights):
        options = dict(zip(names, weights))
        return torch.func.functional_call(model, options, (X[:2, :4], Y[:2, :4]))[1]

    assert torch.autograd.gradcheck(compute_loss, weights, fast_mode=True)


@pytest.mark.parametrize('is_fast', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_autocast(dropout, is_fast):
    model, expected = make_model(is_fast=is_fast, dropout=dropout), make_model()
    with torch.autocast('cpu', torch.bfloat16):
        logits, loss = model(X, Y)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    _, expected_loss = expected(X, Y)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0.1 if dropout else 0.01)
    expected_loss.backward()
    for p, expected_p in zip(model.parameters(), expected.parameters()):
        cosine = F.cosine_similarity(p.grad.flatten(), expected_p.grad.flatten(), dim=0)
        assert cosine > (0.8 if dropout else 0.99)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.eval().generate(X[:, :5], 20, top_k=3).shape == (4, 25)


# -----------------------------------------------------------------------------
# utilization
def test_a_running_mfu():
    model, running_mfu = make_model(), None
    for dt in (0.5, 0.25):
        mfu = model.estimate_mfu(4 * 2, dt)
        assert type(mfu) is float
        running_mfu = mfu if running_mfu is None else 0.9 * running_mfu + 0.1 * mfu
    # 6 FLOPs per parameter, and 12 per layer, channel and position
    flops = 6 * model.get_num_params() + 12 * 2 * 32 * 16
    expected = flops * 16 * 8 * (0.9 / 0.5 + 0.1 / 0.25) / 312e12
    assert math.isclose(running_mfu, expected, rel_tol=1e-9)
    assert f'mfu {running_mfu*1e6*100:.2f}%' == f'mfu {expected*1e8:.2f}%'


# -----------------------------------------------------------------------------
# other modules of the same names
USE_MODEL = """
import json
import sys

import torch

from model import GPT, GPTConfig

idx = torch.arange(4 * 17).view(4, 17) % 11
torch.manual_seed(0)
model = GPT(GPTConfig(16, 11, n_layer=2, n_head=2, n_embd=32))
optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
for _ in range(60):
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
tokens = model.generate(idx[:, :5], 12, temperature=0)
try:
    model.generate(idx[:, :5], 1, use_cache=False)
    loop = 'ours'
except TypeError:
    loop = 'plain'
print(json.dumps([tokens.tolist(), loop, sys.modules['runtime'].__file__]))
"""
NAMES = ('optimizers', 'checkpoint', 'kernels', 'tokenizer', 'machine', 'distributed', 'settings',
         'dataset', 'inference')


def start(folder, *command):
    """Runs Python in a folder that is also the first on its path; returns stdout."""
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join((str(folder), ROOT)),
                   'OMP_NUM_THREADS': '1'}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment, text=True,
                            capture_output=True, timeout=300)
    return check_result(result, ok=True).stdout


def use_model(folder):
    """Trains model.py and generates; returns which generate() ran, and the file of runtime."""
    tokens, loop, path = json.loads(start(folder, '-c', USE_MODEL))
    assert tokens == [[(6 * row + t) % 11 for t in range(17)] for row in range(4)]
    return loop, path


@pytest.fixture(scope='module')
def foreign_modules(tmp_path_factory):
    """A folder of modules with our names, which must not be imported."""
    folder = tmp_path_factory.mktemp('foreign')
    for name in NAMES:
        assert os.path.exists(os.path.join(ROOT, 'runtime', f'{name}.py'))
        (folder / f'{name}.py').write_text(f'raise RuntimeError("the wrong {name}.py")\n')
    return folder


def test_foreign_modules_are_not_ours(foreign_modules):
    loop, path = use_model(foreign_modules)
    assert (loop, path) == ('ours', os.path.join(ROOT, 'runtime', '__init__.py'))


def test_the_scripts_next_to_foreign_modules(foreign_modules, char_data, tmp_path):
    out = start(foreign_modules, os.path.join(ROOT, 'train.py'), *TINY, f'--dataset={char_data}',
                f'--out_dir={tmp_path}', '--max_iters=1')
    assert 'iter 0: loss' in out
    out = start(foreign_modules, os.path.join(ROOT, 'sample.py'), f'--out_dir={tmp_path}',
                '--device=cpu', '--num_samples=1', '--max_new_tokens=40')
    assert out.endswith('\n' + '-' * 15 + '\n') and len(out) == 1 + 40 + 17


@pytest.mark.parametrize('files', [
    {'__init__.py': ''},
    {'__init__.py': '', 'inference.py': 'def infer(x):\n    return x\n'},
    {'__init__.py': '', 'inference.py': 'def generate(prompt):\n    return prompt\n'},
])
def test_a_runtime_of_another_project(files, tmp_path):
    (tmp_path / 'runtime').mkdir()
    for name, text in files.items():
        (tmp_path / 'runtime' / name).write_text(text)
    loop, path = use_model(tmp_path)
    assert (loop, path) == ('plain', str(tmp_path / 'runtime' / '__init__.py'))


# -----------------------------------------------------------------------------
# lines of train.py that people parse
def test_lines_of_train(char_data, tmp_path):
    out_dir = tmp_path / 'out'
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=2',
              '--eval_interval=2').stdout
    lines = out.splitlines()
    number = re.search(r'number of parameters: (\d+\.\d\d)M', out)[1]
    assert number == '0.03'
    assert re.search(r'tokens per iteration will be: ([\d,]+)', out)[1] == '256'
    evals = [re.match(r'step (\d+): train loss (\d\.\d{4}), val loss (\d\.\d{4})', line)
             for line in lines]
    assert [match[1] for match in evals if match] == ['0', '2']
    steps = [re.match(r'iter (\d+): loss (\d\.\d{4}), time (\d+\.\d\d)ms, mfu (\S+)', line)
             for line in lines]
    assert [match[1] for match in steps if match] == ['0', '1']
    assert lines.count(f'saving checkpoint to {out_dir}') == 1


# -----------------------------------------------------------------------------
# our scripts with somebody else's model.py
OTHER_MODEL = """
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(torch.nn.Module):
    # the mean of all embeddings so far, and a few layers

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.places = torch.nn.Parameter(torch.zeros(config.block_size, config.n_embd))
        layers = [torch.nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
                  for _ in range(config.n_layer)]
        self.layers = torch.nn.ModuleList(layers)
        self.output = torch.nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets=None):
        T = idx.size(1)
        assert T <= self.config.block_size
        x = self.tokens(idx)
        x = x + x.cumsum(dim=1) / torch.arange(1, T + 1)[:, None] + self.places[:T]
        for layer in self.layers:
            x = x + F.dropout(layer(x).tanh(), self.config.dropout, self.training)
        logits = self.output(x)
        if targets is None:
            return logits[:, -1:], None
        return logits, F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            idx = torch.cat((idx, logits.argmax(dim=-1)), dim=1)
        return idx

    def crop_block_size(self, block_size):
        self.config.block_size = block_size
        self.places = torch.nn.Parameter(self.places[:block_size].detach().clone())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas,
                                 weight_decay=weight_decay)

    def get_num_params(self, non_embedding=True):
        return sum(p.numel() for p in self.parameters())

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        return 6 * self.get_num_params() * self.config.block_size * fwdbwd_per_iter / dt / 312e12
"""


def make_sources(folder, text=OTHER_MODEL):
    sources = Sources(folder)
    (folder / 'model.py').write_text(text)
    return sources


def test_the_scripts_run_another_model(char_data, tmp_path):
    sources = make_sources(tmp_path)
    _, _, expected = sources.train(char_data, 'straight', '--max_iters=4', '--dropout=0.1')
    sources.train(char_data, 'out', '--max_iters=2', '--dropout=0.1')
    _, _, losses = sources.train(char_data, 'out', '--max_iters=4', '--dropout=0.1',
                                 '--init_from=resume')
    assert losses == expected and losses[3] < losses[0] - 0.1
    out, _, _ = sources.train(char_data, 'out', '--eval_only=True', '--init_from=resume')
    printed = re.search(r'step 4: train loss \S+, val loss ([\d.]+)', out)[1]
    module = sources.load_model()
    state = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert sorted(state['model_args']) == sorted(SHAPE)
    assert abs(state['best_val_loss'] - float(printed)) < 1e-3
    model = module.GPT(module.GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    tokenizer = get_tokenizer(read_meta(char_data))
    prompt = torch.tensor([tokenizer.encode('1 and')])
    text = tokenizer.decode(model.eval().generate(prompt, 40)[0].tolist())
    for options in (('--num_samples=2',), ('--num_samples=2', '--stream=True')):
        result = sources.run('sample.py', f'--out_dir={tmp_path}/out', '--start=1 and',
                             '--max_new_tokens=40', '--device=cpu', '--dtype=float32', *options)
        assert result.stdout == (text + '\n' + '-' * 15 + '\n') * 2


def test_crop_and_checkpoints_of_another_model(char_data, tmp_path):
    sources = make_sources(tmp_path)
    sources.train(char_data, 'out', '--max_iters=2')
    out = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}/out',
                      '--init_from=resume', '--block_size=16', '--eval_only').stdout
    assert 'step 2: train loss' in out


@pytest.mark.parametrize('option', ['rope_base=100', 'tied=False', 'bigrams=60'])
def test_another_model_refuses_our_options(option, char_data, tmp_path):
    sources = make_sources(tmp_path)
    result = sources.run('train.py', *TINY, f'--dataset={char_data}', f'--{option}',
                         f'--out_dir={tmp_path}/out', ok=False)
    assert option.partition('=')[0] in result.stderr
    assert not os.path.exists(tmp_path / 'out')


@pytest.mark.parametrize('option', ['--optim=muon', '--moments_dtype=bfloat16'])
def test_our_optimizers_with_a_plain_adamw(option, char_data, tmp_path):
    sources = Sources(tmp_path, ('model.py', 'betas=betas, fused=fused)', 'betas=betas)'))
    options = ('--max_iters=3', '--beta2=0.95', option)
    _, _, losses = sources.train(char_data, 'out', *options)
    (tmp_path / 'fused').mkdir()
    _, _, expected = Sources(tmp_path / 'fused').train(char_data, 'out', *options)
    assert losses == expected
