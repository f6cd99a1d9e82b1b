"""Generating with a KV cache: the same tokens as without one, in every way that a model is used."""
import functools
import gc
import math
import weakref

import pytest
import torch
import torch.nn as nn
from edits import continue_greedily
from test_originals import load_edited
from torch.nn import functional as F

import model as model_py
from model import GPT, Attention, GPTConfig
from runtime import inference, kernels
from runtime.kv_cache import CachedAttention, CachedBlock, CachedModel

OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2)
SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


def make_model(module=model_py, **options):
    """A model of GPT-2's kind."""
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**{**SHAPE, **options})).eval()
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= 4
    return model


def make_fast_model(**options):
    """A model with all that GPT-2 doesn't have."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**SHAPE, **dict(bias=False), **OPTIONS, **options}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def list_parts(model):
    """What could be left in the model: its modules and what is set on them."""
    return {name: (module, type(module), tuple(vars(module)), dict(module._modules))
            for name, module in model.named_modules()}


@pytest.fixture
def cached_steps(monkeypatch):
    """A list that grows by one with each step that has a cache."""
    steps, call = [], CachedModel.__call__
    monkeypatch.setattr(CachedModel, '__call__',
                        lambda self, idx: steps.append(idx.size(1)) or call(self, idx))
    return steps


# -----------------------------------------------------------------------------
# the cache
@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_compiled_it_is_not_compiled_again_for_each_token(make, monkeypatch):
    model, prompt, graphs = make(), torch.randint(50, (2, 3)), []
    expected = continue_greedily(model, prompt, 12)
    torch._dynamo.reset()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=count))
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False):
        inference.compile_forward(model)
        assert torch.equal(model.generate(prompt, 12, temperature=0), expected)
    assert 2 <= len(graphs) <= 3  # the prompt, a token, and a token of any position


@pytest.mark.parametrize('bias', [True, False])
def test_cache_gives_the_same_tokens_as_no_cache(bias, cached_steps):
    model, prompt = make_model(bias=bias), torch.randint(50, (3, 5))
    expected = continue_greedily(model, prompt, 30)  # past block_size: 16
    assert torch.equal(model.generate(prompt, 30, temperature=0), expected)
    assert cached_steps == [5] + [1] * 11  # then the context is full


def test_cached_logits_in_bfloat16():
    # each step rounds to 8 bits of mantissa, in another order than all of the context at once
    model, idx = make_model().bfloat16(), torch.randint(50, (2, 16))
    cached_model = CachedModel(model, 16)
    cached_model(idx[:, :4])
    for t in range(4, 16):
        cached = cached_model(idx[:, t:t + 1])
        plain, _ = model(idx[:, :t + 1])
        assert (cached - plain).abs().max() < 0.05 * plain.abs().max()


def test_static_cache_gives_the_same_logits():
    model, idx = make_model(), torch.randint(50, (2, 16))
    growing, static = CachedModel(model, 16), CachedModel(model, 16, static=True)
    for T in [slice(4), *(slice(t, t + 1) for t in range(4, 16))]:
        torch.testing.assert_close(static(idx[:, T]), growing(idx[:, T]))
    assert static.cache.position.item() == static.cache.length == 16
    parts = [part for _, _, part in static.parts if isinstance(part, CachedAttention)]
    assert [attention.buffer.size(3) for attention in parts] == [16, 16]


def test_cache_takes_one_token_per_step():
    cached_model = CachedModel(make_model(), 16)
    cached_model(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(AssertionError):
        cached_model(torch.zeros(1, 2, dtype=torch.long))


# -----------------------------------------------------------------------------
# sampling a token
def draw_many(n=40_000, **options):
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]])
    tokens = inference.sample(logits.expand(n, -1), vocab_size=4, **options)
    return tokens.flatten().bincount(minlength=5) / n


@pytest.mark.parametrize('use_cache', [True, False])
@pytest.mark.parametrize('length', [1, 5, 30])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 3e38])
def test_no_token_is_drawn_from_logits_that_are_not_finite(value, length, use_cache):
    model = make_model()
    idx = torch.zeros(2, length, dtype=torch.long)
    for temperature in (0, 1):
        model.generate(idx, 3, temperature, use_cache=use_cache)
    model.transformer.ln_f.weight.data.fill_(value)
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError):
            model.generate(idx, 3, temperature, use_cache=use_cache)


def test_sampling_frequencies():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    best_two = torch.tensor([-math.inf, -math.inf, 2.0, 3.0])
    for options, expected in (
            (dict(), logits),
            (dict(temperature=0.5), logits / 0.5),
            (dict(top_k=2), best_two),
            (dict(top_p=0.65), best_two),  # the most likely one has only 0.64
            (dict(top_k=3, top_p=0.7), best_two),  # 0.67 and 0.24 of the three
            (dict(top_k=100, top_p=1.0), logits)):
        counts = draw_many(**options)
        probs = F.pad(expected.softmax(0), (0, 1))
        sigma = (probs * (1 - probs) / 40_000).sqrt()
        assert ((counts - probs).abs() <= 4.5 * sigma).all(), (options, counts, probs)
    assert draw_many(top_p=0.63).tolist() == [0, 0, 0, 1, 0]
    assert draw_many(temperature=0).tolist() == [0, 0, 0, 1, 0]


# -----------------------------------------------------------------------------
# what GPT-2 doesn't have
@pytest.mark.parametrize('off', [None, *OPTIONS])
def test_options_with_the_cache_below_and_at_the_full_context(off):
    model = make_fast_model(**({off: getattr(GPTConfig, off)} if off else {}))
    prompt = torch.randint(50, (2, 5))
    out = model.generate(prompt, 11, temperature=0)
    for T in range(5, 16):  # as without a cache
        assert torch.equal(model(out[:, :T])[0][:, -1].argmax(dim=-1), out[:, T])


def test_beyond_the_full_context_rotary_positions_slide(cached_steps):
    """Each token sees the keys and values of the 16 tokens up to it, from when they were new."""
    model, prompt = make_fast_model(), torch.randint(50, (2, 5))
    out = model.generate(prompt, 45, temperature=0)
    assert cached_steps == [5] + [1] * 44  # the context is never read again
    longer = make_fast_model(block_size=64)
    longer.load_state_dict(model.state_dict())
    band = torch.ones(64, 64).tril().triu(-15).bool()

    class BandAttention(nn.Module):
        def forward(self, q, k, v, dropout, flash):
            T = q.size(2)
            return F.scaled_dot_product_attention(q, k, v, band[:T, :T])

    for block in longer.transformer.h:
        block.attn.attention = BandAttention()
    expected = longer(out, out)[0][:, 4:-1]  # all of the sequence at once
    assert torch.equal(expected.argmax(dim=-1), out[:, 5:])


def test_a_static_cache_slides_too():
    model, idx = make_fast_model(), torch.randint(50, (2, 40))
    growing, static = CachedModel(model, 16), CachedModel(model, 16, static=True)
    for T in [slice(5), *(slice(i, i + 1) for i in range(5, 40))]:
        torch.testing.assert_close(growing(idx[:, T]), static(idx[:, T]), rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------
# the model is as it was before
@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_two_streams_in_turns(make):
    model = make()
    prompts = torch.randint(50, (1, 3)), torch.randint(50, (2, 6))
    expected = [model.generate(prompt, 20, temperature=0) for prompt in prompts]
    outputs, streams = list(prompts), [
        inference.stream(model, prompt, 20, temperature=0) for prompt in prompts]
    for _ in range(20):
        for i in (0, 1):
            outputs[i] = torch.cat((outputs[i], next(streams[i])), dim=1)
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_between_and_after_the_steps_the_model_has_its_own_parts(make):
    model, prompt = make(), torch.randint(50, (2, 5))
    parts, keys = list_parts(model), list(model.state_dict())
    stream = inference.stream(model, prompt, 20)
    for _ in range(3):
        next(stream)
        assert list_parts(model) == parts
    model.generate(prompt, 20)
    assert list_parts(model) == parts and list(model.state_dict()) == keys


@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_after_an_exception_in_a_step_the_model_has_its_own_parts(make):
    model, prompt = make(), torch.randint(50, (2, 5))
    parts, expected = list_parts(model), model.generate(prompt, 20, temperature=0)
    calls = []

    def fail_in_the_third_step(module, args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.transformer.h[1].mlp.register_forward_pre_hook(fail_in_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, 20)
    hook.remove()
    assert len(calls) == 3 and list_parts(model) == parts
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)


@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_a_patched_embed_stays(make):
    model, prompt = make(), torch.randint(50, (2, 5))
    embed = model.embed
    model.embed = lambda idx: 2 * embed(idx)
    expected = continue_greedily(model, prompt, 11)
    assert torch.equal(model.generate(prompt, 11, temperature=0), expected)
    assert torch.equal(continue_greedily(model, prompt, 11), expected)


@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_a_training_step_right_after_generating(make):
    steps = []
    for generates in (False, True):
        model = make(dropout=0.2).train()
        idx = torch.randint(50, (2, 16))
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
        if generates:
            model.generate(idx[:, :5], 20)
        torch.manual_seed(0)
        _, loss = model(idx, idx)
        loss.backward()
        optimizer.step()
        steps.append([loss, *model.parameters()])
    assert all(map(torch.equal, *steps))


@pytest.mark.parametrize('make', [make_model, make_fast_model])
def test_accelerated_and_recomputing_models_generate_the_same(make, cached_steps):
    model, prompt = make(), torch.randint(50, (2, 5))
    expected = model.generate(prompt, 20, temperature=0)
    kernels.accelerate(model, 'cpu', 'float32')
    kernels.recompute_blocks(model)
    cached_steps.clear()
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    look, steps = cached_steps[:9], cached_steps[9:]
    assert look == [8] + 8 * [1] and steps[:2] == [5, 1]


# -----------------------------------------------------------------------------
# models without a cache
class Window(nn.Module):
    """Attention to the two tokens before, and to itself."""

    def forward(self, q, k, v, dropout, flash):
        T = q.size(2)
        window = torch.ones(T, T, dtype=torch.bool).tril().triu(-2)
        return F.scaled_dot_product_attention(q, k, v, window)


class Louder(Attention):
    def forward(self, q, k, v, dropout, flash):
        return 2 * super().forward(q, k, v, dropout, flash)


def share_attention(model, monkeypatch):
    first, *others = model.transformer.h
    for block in others:
        block.attn = first.attn


def share_blocks(model, monkeypatch):
    model.transformer.h = nn.ModuleList([model.transformer.h[0]] * 2)


def replace_attention(model, monkeypatch):
    model.transformer.h[1].attn.attention = Window()


def replace_by_the_same_name(model, monkeypatch):
    model.transformer.h[1].attn.attention = type('Attention', (Window,), {})()


def subclass_attention(model, monkeypatch):
    model.transformer.h[1].attn.attention = Louder()


def patch_the_instance(model, monkeypatch):
    attention = model.transformer.h[1].attn.attention
    attention.forward = Window().forward


def patch_the_class(model, monkeypatch):
    monkeypatch.setattr(Attention, 'forward', Window.forward)


def add_a_hook(model, monkeypatch):
    attention = model.transformer.h[1].attn.attention
    attention.register_forward_hook(lambda module, args, output: 2 * output)


def patch_the_function(model, monkeypatch):
    attend = F.scaled_dot_product_attention

    def attend_to_louder_values(q, k, v, *args, **options):
        return attend(q, k, 2 * v, *args, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attend_to_louder_values)


CHANGES = [share_attention, share_blocks, replace_attention, replace_by_the_same_name,
           subclass_attention, patch_the_instance, patch_the_class, add_a_hook, patch_the_function]


LATE_CHANGES = [share_attention, share_blocks, replace_attention, patch_the_instance, add_a_hook]


@pytest.mark.parametrize('change, accelerated', [
    *((change, accelerated) for change in CHANGES for accelerated in ('no', 'afterwards')),
    *((change, 'before') for change in LATE_CHANGES)])
def test_models_with_another_attention_generate_by_it(change, accelerated, monkeypatch):
    model, prompt = make_model(), torch.randint(50, (3, 5))
    unchanged = continue_greedily(model, prompt, 30)
    if accelerated == 'before':
        kernels.accelerate(model, 'cpu', 'float32')
    change(model, monkeypatch)
    if accelerated == 'afterwards':
        kernels.accelerate(model, 'cpu', 'float32')
    expected = continue_greedily(model, prompt, 30)
    assert not torch.equal(expected, unchanged)
    assert torch.equal(model.generate(prompt, 30, temperature=0), expected)


# edits of model.py after which a token's keys and values aren't all that it leaves to later ones
MIXING_EDITS = [
    ('y = self.attention(q, k, v, self.attn_dropout, self.flash)',
     'y = F.scaled_dot_product_attention(2 * q, k, v, is_causal=True)'),
    ('x = x + self.attn(self.ln_1(x))',
     'x = x + self.attn(self.ln_1(x + F.pad(x, (0, 0, 1, -1))))'),
    ('x = self.gelu(self.c_fc(x))', 'x = self.gelu(self.c_fc(x + F.pad(x, (0, 0, 1, -1))))'),
    ('        x = self.transformer.wte(idx)\n',
     '        x = self.transformer.wte(idx)\n        x = x + F.pad(x, (0, 0, 1, -1))\n'),
    ('self.transformer.wpe(torch.arange(T, device=idx.device))',
     'self.transformer.wpe(torch.arange(T, device=idx.device)).sin() * torch.arange(T)[:, None]'),
]


@pytest.mark.parametrize('edit', MIXING_EDITS)
def test_edits_by_which_tokens_mix_generate_by_them(edit, tmp_path, monkeypatch):
    edited = load_edited(tmp_path / 'edited_model.py', monkeypatch, edit)
    model, prompt = make_model(edited), torch.randint(50, (3, 5))
    expected = continue_greedily(model, prompt, 11)
    assert not torch.equal(expected, continue_greedily(make_model(), prompt, 11))
    assert torch.equal(model.generate(prompt, 11, temperature=0), expected)


@pytest.mark.parametrize('edit', [
    ('y = self.attention(q, k,', 'y = self.attention(2 * q, k,'),
    ('x = self.gelu(self.c_fc(x))', 'x = F.silu(self.c_fc(x))'),
    ('return self.lm_head(x[:, -1:]), None', 'return self.lm_head(x[:, -1:]).tanh(), None')])
def test_edits_of_one_token_take_effect_with_a_cache(edit, tmp_path, monkeypatch, cached_steps):
    edited = load_edited(tmp_path / 'edited_model.py', monkeypatch, edit)
    model, prompt = make_model(edited), torch.randint(50, (3, 5))
    logits = model(prompt)[0]
    assert (logits - make_model()(prompt)[0]).norm() > 1e-3 * logits.norm()
    expected = continue_greedily(model, prompt, 30)
    assert torch.equal(model.generate(prompt, 30, temperature=0), expected)
    assert cached_steps[-1] == 1


@pytest.mark.parametrize('change', [share_attention, replace_attention])
def test_without_a_cache_one_line_says_so(change, monkeypatch, cached_steps, capsys):
    inference.note_once.cache_clear()
    model, prompt = make_model(), torch.zeros(1, 3, dtype=torch.long)
    model.generate(prompt, 5)
    assert cached_steps and capsys.readouterr().err == ''
    cached_steps.clear()
    change(model, monkeypatch)
    for _ in range(3):
        model.generate(prompt, 5)
    assert cached_steps in ([], [13])  # one look at the prompt's logits is enough
    line = capsys.readouterr().err
    assert 'generates without a KV cache' in line and line.count('\n') == 1


# -----------------------------------------------------------------------------
# memory
@pytest.mark.parametrize('end', ['all tokens', 'deleted', 'exception'])
def test_the_cache_is_freed_with_the_stream(end, monkeypatch):
    caches = []

    class Observed(CachedModel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(inference, 'CachedModel', Observed)
    model = make_fast_model()
    gc.collect()
    gc.disable()  # only reference counts may free it
    try:
        stream = inference.stream(model, torch.randint(50, (2, 5)), 20)
        next(stream)
        next(stream)
        buffer = weakref.ref(next(part for _, name, part in caches[0]().parts
                                  if name == 'attention').buffer)
        assert buffer() is not None
        if end == 'all tokens':
            assert len(list(stream)) == 18
        elif end == 'exception':
            with pytest.raises(RuntimeError):
                stream.throw(RuntimeError)
        del stream
        assert caches[0]() is None and buffer() is None
    finally:
        gc.enable()
    assert len(caches) == 1


def test_a_full_context_frees_the_cache(monkeypatch):
    caches, init = [], CachedModel.__init__
    monkeypatch.setattr(CachedModel, '__init__', lambda self, *args, **options: caches.append(
        weakref.ref(self)) or init(self, *args, **options))
    stream = inference.stream(make_model(), torch.randint(50, (2, 5)), 20)
    for n in range(20):
        next(stream)
        assert (caches[0]() is None) == (n > 11)


def test_a_line_when_the_context_is_full(capsys):
    inference.note_once.cache_clear()
    model, prompt = make_model(), torch.randint(50, (1, 5))
    model.generate(prompt, 11)
    assert capsys.readouterr().err == ''
    for _ in range(2):
        model.generate(prompt, 12)  # the last token is computed from 16 others
        model.generate(prompt, 20)
    assert capsys.readouterr().err.count('the context of 16 tokens is full') == 1
    make_fast_model().generate(prompt, 20)  # rotary positions can stay
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
def test_a_step_of_all_of_a_block(dtype, bias):
    model = make_model(bias=bias).to(dtype)
    kernels.accelerate(model, 'cpu', str(dtype).removeprefix('torch.'))
    plain, fast = CachedModel(model, 16), inference.Decoder(model, 16, False, ())
    fast.speed_up(3, 8)
    assert sum(type(part) is CachedBlock for _, _, part in fast.cached_model.parts) == 2
    idx = torch.randint(50, (3, 12))
    with torch.inference_mode():
        for T in (slice(4), *(slice(t, t + 1) for t in range(4, 12))):
            logits, expected = fast.cached_model(idx[:, T]), plain(idx[:, T])
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
