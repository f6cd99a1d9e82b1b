"""model.py against nanoGPT's recorded numbers, and by itself: how it is built, trained, sampled."""
import math
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from model import GPT, GPTConfig
from runtime import inference, restore

CASES = range(3)


def make_golden_model(case, variant):
    """A model with the weights of golden/nanogpt.json's `fill`, and its batch."""
    model = GPT(GPTConfig(**case['config']))
    for name, p in model.named_parameters():
        phase = sum(map(ord, name)) % 97 + 13 * variant
        w = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + phase)
        w = 1 + 0.1 * w if '.ln_' in name and name.endswith('weight') else 0.2 * w
        p.data.copy_(w.view_as(p))
    return model, torch.tensor(case['batch']['x']), torch.tensor(case['batch']['y'])


def make_model(**options):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**shape, **options})).eval()
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= 4
    return model


@pytest.fixture
def without_runtime(monkeypatch):
    """As where model.py was copied to: there is no module runtime."""
    monkeypatch.setitem(sys.modules, 'runtime', None)
    monkeypatch.setitem(sys.modules, 'runtime.inference', None)


# -----------------------------------------------------------------------------
# nanoGPT's numbers
@pytest.mark.parametrize('n', CASES)
def test_logits_and_loss(golden, n):
    case = golden['cases'][n]
    model, x, y = make_golden_model(case, golden['variant'])
    logits, loss = model(x, y)
    assert list(logits.shape) == case['logits_shape']
    torch.testing.assert_close(loss.item(), case['loss'], rtol=1e-5, atol=0)
    first_row, last_row = logits[0, 0, :8].tolist(), logits[-1, -1, :8].tolist()
    torch.testing.assert_close(first_row, case['logits_first_row'], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(last_row, case['logits_last_row'], rtol=1e-5, atol=2e-6)
    last, none = model(x)
    assert list(last.shape) == case['inference_logits_shape'] and none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])


@pytest.mark.parametrize('n', CASES)
def test_keys_sizes_and_flops(golden, n):
    case = golden['cases'][n]
    model, _, _ = make_golden_model(case, golden['variant'])
    assert sorted(model.state_dict()) == case['state_dict_keys']
    assert model.get_num_params() == case['num_params']
    assert model.get_num_params(non_embedding=False) == case['num_params_all']
    assert model.flops_per_token() * model.config.block_size == case['flops_per_fwdbwd']


@pytest.mark.parametrize('n', CASES)
def test_adamw_trajectory(golden, n):
    case, facts = golden['cases'][n], golden['cases'][n]['adamw']
    model, x, y = make_golden_model(case, golden['variant'])
    optimizer = model.configure_optimizers(facts['weight_decay'], facts['lr'], facts['betas'],
                                           'cpu')
    sizes = [len(group['params']) for group in optimizer.param_groups]
    assert sizes == [case['decayed'], case['undecayed']]
    for expected_loss, expected_norm in zip(facts['losses'], facts['grad_norms']):
        _, loss = model(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), facts['grad_clip'])
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close((loss.item(), norm.item()), (expected_loss, expected_norm),
                                   rtol=1e-4, atol=0)


@pytest.mark.parametrize('n', CASES)
@pytest.mark.parametrize('options', [dict(top_k=1), dict(temperature=0)])
def test_greedy_tokens_beyond_the_block(golden, n, options):
    case = golden['cases'][n]
    model, _, _ = make_golden_model(case, golden['variant'])
    prompt = torch.tensor([case['greedy_prompt']])
    assert model.generate(prompt, 40, **options)[0].tolist() == case['greedy_40']


@pytest.mark.parametrize('n', CASES)
@pytest.mark.parametrize('options', [dict(top_k=1), dict(temperature=0)])
def test_greedy_tokens_of_the_plain_loop(golden, n, options, without_runtime):
    test_greedy_tokens_beyond_the_block(golden, n, options)


def test_gpt2_sizes(golden):
    for size in golden['gpt2_sizes'].values():
        config = GPTConfig(1024, 50257, size['n_layer'], size['n_head'], size['n_embd'], 0.0, True)
        with torch.device('meta'), restore.SkipInit():
            model = GPT(config)
        assert model.get_num_params(False) == size['parameters']
        assert model.get_num_params() == size['non_embedding']


# -----------------------------------------------------------------------------
# building and training
def test_initialization():
    model = GPT(GPTConfig(vocab_size=500, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02, name
            assert abs(p.mean().item()) < 0.03 * expected, name


def test_heads_must_divide_the_width():
    with pytest.raises(AssertionError, match='n_embd=30'):
        GPT(GPTConfig(n_embd=30, n_head=4))


def test_targets_of_minus_one_are_ignored():
    model = make_model()
    x, y = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    logits, _ = model(x, y)
    masked = y.clone()
    masked[:, :5] = -1
    expected = F.cross_entropy(logits[:, 5:].reshape(-1, 50), y[:, 5:].reshape(-1))
    torch.testing.assert_close(model(x, masked)[1], expected)


def test_more_tokens_than_the_block_are_an_error():
    with pytest.raises(AssertionError, match='17 tokens'):
        make_model()(torch.zeros(1, 17, dtype=torch.long))


def test_crop_block_size():
    model = make_model()
    x = torch.randint(50, (1, 8))
    before, _ = model(x)
    model.crop_block_size(8)
    assert model.config.block_size == 8
    assert model.transformer.wpe.weight.untyped_storage().nbytes() == 8 * 32 * 4
    torch.testing.assert_close(model(x)[0], before)
    with pytest.raises(AssertionError):
        model.crop_block_size(9)


def test_mfu_is_the_share_of_the_peak():
    model = make_model()
    flops = model.flops_per_token() * 16 * 3  # of 3 sequences of 16 tokens
    assert model.estimate_mfu(3, 0.5) == pytest.approx(flops / 0.5 / 312e12)  # of an A100


# -----------------------------------------------------------------------------
# generating
@pytest.mark.parametrize('has_runtime', [True, False])
def test_long_prompts_and_no_tokens(has_runtime, request):
    if not has_runtime:
        request.getfixturevalue('without_runtime')
    model = make_model()
    prompt = torch.randint(50, (1, 40))
    out = model.generate(prompt, 3, temperature=0)
    assert out.shape == (1, 43) and torch.equal(out[:, :40], prompt)
    from_the_end = model.generate(prompt[:, -16:], 3, temperature=0)
    assert torch.equal(out[:, 40:], from_the_end[:, 16:])
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize('bias', [True, False])
def test_the_plain_loop_has_the_tokens_of_the_cache(bias, monkeypatch):
    model, prompt = make_model(bias=bias), torch.randint(50, (3, 5))
    cached, steps, forward = model.generate(prompt, 30, temperature=0), [], model.forward
    monkeypatch.setattr(model, 'forward', lambda idx: steps.append(idx.size(1)) or forward(idx))
    monkeypatch.setitem(sys.modules, 'runtime.inference', None)
    plain = model.generate(prompt, 30, temperature=0)
    assert steps == [min(t, 16) for t in range(5, 35)]  # it was the plain loop
    assert torch.equal(cached, plain)


def test_frequencies_of_the_plain_loop(without_runtime):
    model, n = make_model(vocab_size=5), 40_000
    logits = model(torch.zeros(1, 1, dtype=torch.long))[0][0, 0].detach()
    prompt = torch.zeros(n, 1, dtype=torch.long)
    best = logits.topk(2).indices
    masked = torch.full((5,), -math.inf).index_copy(0, best, logits[best])
    for options, expected in ((dict(), logits), (dict(temperature=0.5), logits / 0.5),
                              (dict(top_k=2), masked), (dict(top_k=100), logits)):
        torch.manual_seed(0)
        counts = model.generate(prompt, 1, **options)[:, 1].bincount(minlength=5) / n
        probs = expected.softmax(0)
        sigma = (probs * (1 - probs) / n).sqrt()
        assert ((counts - probs).abs() <= 4.5 * sigma).all(), (options, counts, probs)


@pytest.mark.parametrize('runtime', [None, types.ModuleType('other')])
def test_without_our_runtime_its_options_are_an_error(runtime, monkeypatch):
    monkeypatch.setitem(sys.modules, 'runtime', runtime)  # none, or that of another project
    monkeypatch.delitem(sys.modules, 'runtime.inference')
    model, prompt = make_model(), torch.zeros(1, 1, dtype=torch.long)
    assert model.generate(prompt, 3, temperature=0.5, top_k=2).shape == (1, 4)
    with pytest.raises(TypeError, match='top_p'):
        model.generate(prompt, 3, top_p=0.5)


# -----------------------------------------------------------------------------
# the file by itself
BY_ITSELF = """
import importlib.util
import sys

import torch

sys.path.insert(0, sys.argv[1])  # python -I leaves it out
assert importlib.util.find_spec('runtime') is None
from model import GPT, GPTConfig

idx = torch.arange(4 * 17).view(4, 17) % 11  # it learns to count
x, y = idx[:, :-1], idx[:, 1:]
results = []
for options in ({}, dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60,
                         embd_conv=2, bias=False)):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 11, n_layer=2, n_head=2, n_embd=32, dropout=0.1, **options))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    losses = []
    for _ in range(50):
        _, loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    greedy = model.generate(idx[:, :5], 30, temperature=0)
    drawn = model.generate(idx[:, :5], 30, temperature=3.0, top_k=2)
    results.append(dict(config=vars(model.config), losses=losses, weights=model.state_dict(),
                        greedy=greedy, drawn=drawn))
try:
    GPT.from_pretrained('gpt2')
except ModuleNotFoundError as e:
    torch.save((results, e.name), sys.argv[1] + '/results.pt')
"""


def test_the_file_works_by_itself(tmp_path):
    shutil.copy(os.path.join(ROOT, 'model.py'), tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    subprocess.run([sys.executable, '-I', '-c', BY_ITSELF, str(tmp_path)], cwd=tmp_path,
                   env=environment, check=True, timeout=120)
    results, missing_module = torch.load(tmp_path / 'results.pt')
    assert missing_module == 'runtime'
    assert len(results) == 2
    for result in results:
        assert result['losses'][0] > 2 and max(result['losses'][-5:]) < 0.5
        model = GPT(GPTConfig(**result['config'])).eval()
        model.load_state_dict(result['weights'])
        greedy, drawn = result['greedy'], result['drawn']
        assert greedy.shape == drawn.shape == (4, 35)
        # beyond the block a cache of rotary positions slides: see test_inference.py
        length = 16 if model.config.rope_base else 35
        cached = inference.generate(model, greedy[:, :5], length - 5, temperature=0)
        assert torch.equal(cached, greedy[:, :length])
        for t in range(5, 35):
            likely = model(drawn[:, max(0, t - 16):t])[0][:, -1].topk(2).indices
            assert (drawn[:, t:t + 1] == likely).any(dim=1).all()
        assert not torch.equal(drawn, greedy)  # it is drawn
