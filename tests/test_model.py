"""The model against nanoGPT's recorded numbers, and against itself where it takes another path to the same ones."""
import copy
import math

import pytest
import torch
from torch.nn import functional as F

from checks import peak_flops
from model import GPT, Dropout, GPTConfig, KVCache, SquaredReLU, attention, kept, rotary, rotate, sample

CASES = range(3)


def by_formula(case, variant):
    """A model with the weights of golden/nanogpt.json's `fill`."""
    model = GPT(GPTConfig(**case['config']))
    for name, p in model.named_parameters():
        w = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + sum(map(ord, name)) % 97 + 13 * variant)
        w = 1 + 0.1 * w if '.ln_' in name and name.endswith('weight') else 0.2 * w
        p.data.copy_(w.view_as(p))
    return model, torch.tensor(case['batch']['x']), torch.tensor(case['batch']['y'])


def small(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32), **options})).eval()
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= 4
    return model


@pytest.mark.parametrize('n', CASES)
def test_logits_and_loss(golden, n):
    case = golden['cases'][n]
    model, x, y = by_formula(case, golden['variant'])
    logits, loss = model(x, y)
    assert list(logits.shape) == case['logits_shape']
    torch.testing.assert_close(loss.item(), case['loss'], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits[0, 0, :8].tolist(), case['logits_first_row'], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits[-1, -1, :8].tolist(), case['logits_last_row'], rtol=1e-5, atol=2e-6)
    last, none = model(x)
    assert list(last.shape) == case['inference_logits_shape'] and none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])


@pytest.mark.parametrize('n', CASES)
def test_keys_sizes_and_flops(golden, n):
    case = golden['cases'][n]
    model, _, _ = by_formula(case, golden['variant'])
    assert sorted(model.state_dict()) == case['state_dict_keys']
    assert model.get_num_params() == case['num_params'] and model.get_num_params(non_embedding=False) == case['num_params_all']
    assert model.flops_per_token() * model.config.block_size == case['flops_per_fwdbwd']


@pytest.mark.parametrize('n', CASES)
def test_adamw_trajectory(golden, n):
    case, facts = golden['cases'][n], golden['cases'][n]['adamw']
    model, x, y = by_formula(case, golden['variant'])
    optimizer = model.configure_optimizers(facts['weight_decay'], facts['lr'], facts['betas'], 'cpu')
    assert [len(g['params']) for g in optimizer.param_groups] == [case['decayed'], case['undecayed']]
    for loss_then, norm_then in zip(facts['losses'], facts['grad_norms']):
        _, loss = model(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), facts['grad_clip'])
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close((loss.item(), norm.item()), (loss_then, norm_then), rtol=1e-4, atol=0)


@pytest.mark.parametrize('n', CASES)
def test_greedy_tokens_beyond_the_block(golden, n):
    case = golden['cases'][n]
    model, _, _ = by_formula(case, golden['variant'])
    prompt = torch.tensor([case['greedy_prompt']])
    for how in (dict(top_k=1), dict(temperature=0)):
        assert model.generate(prompt, 40, **how)[0].tolist() == case['greedy_40']


def test_gpt2_sizes(golden):
    for size in golden['gpt2_sizes'].values():
        model = GPT.on_meta(GPTConfig(1024, 50257, size['n_layer'], size['n_head'], size['n_embd'], 0.0, True))
        assert model.get_num_params(False) == size['parameters'] and model.get_num_params() == size['non_embedding']


@pytest.mark.parametrize('bias', [True, False])
def test_cache_gives_the_same_tokens_as_no_cache(bias):
    model = small(bias=bias)
    idx = prompt = torch.randint(50, (3, 5))
    for _ in range(30):  # past block_size: 16
        logits, _ = model(idx[:, -16:])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompt, 30, temperature=0), idx)


def test_cached_logits_in_bfloat16():
    # each step rounds to 8 bits of mantissa, in another order than the whole context at once
    model = small().bfloat16()
    idx, cache = torch.randint(50, (2, 16)), KVCache(2, 16)
    model(idx[:, :4], kv_cache=cache)
    for t in range(4, 16):
        cached, _ = model(idx[:, t:t + 1], kv_cache=cache)
        whole, _ = model(idx[:, :t + 1])
        assert (cached - whole).abs().max() < 0.05 * whole.abs().max()


def test_static_cache_gives_the_same_logits():
    model, caches = small(), (KVCache(2, 16), KVCache(2, 16, static=True))
    idx = torch.randint(50, (2, 16))
    for t0, t1 in ((0, 4), *((t, t + 1) for t in range(4, 16))):
        moving, static = (model(idx[:, t0:t1], kv_cache=cache)[0] for cache in caches)
        torch.testing.assert_close(static, moving)
    assert caches[1].buffers[0].size(3) == 16 and caches[1].position.item() == caches[1].length == 16


@pytest.mark.gpu
def test_generation_as_a_cuda_graph():
    model = small().cuda()
    for T in (5, 14, 15, 16):
        idx = prompt = torch.randint(50, (3, T), device='cuda')
        for _ in range(30):  # past block_size: 16
            idx = torch.cat((idx, model(idx[:, -16:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(model.generate(prompt, 30, temperature=0), idx)
    torch.manual_seed(0)
    drawn = model.generate(prompt[:1, :1].expand(64, -1), 17, temperature=100.0)  # a graph must not repeat its random numbers
    assert all(drawn[:, t].unique().numel() > 20 for t in range(1, 18)) and not torch.equal(drawn[:, 7], drawn[:, 8])


@pytest.mark.parametrize('dtype, rtol', [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('bias', [True, False])
def test_packed_weights_give_the_same_logits(dtype, rtol, bias):
    model = small(bias=bias)
    torch.nn.init.normal_(model.lm_head.weight)
    if bias:
        torch.nn.init.normal_(model.transformer.h[0].mlp.c_fc.bias)
    model.to(dtype)
    for rows in (1, 3):
        idx, packed = torch.randint(50, (rows, 16)), copy.deepcopy(model)
        packed.pack_weights(3)
        assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
        for T in (16, 1):
            logits = model(idx[:, :T])[0]
            assert (packed(idx[:, :T])[0] - logits).abs().max() <= rtol * logits.abs().max()


def test_cache_takes_one_token_a_step():
    model, cache = small(), KVCache(2, 16)
    model(torch.zeros(1, 3, dtype=torch.long), kv_cache=cache)
    with pytest.raises(AssertionError):
        model(torch.zeros(1, 2, dtype=torch.long), kv_cache=cache)


def test_long_prompts_and_no_tokens():
    model = small()
    prompt = torch.randint(50, (1, 40))
    out = model.generate(prompt, 3, temperature=0)
    assert out.shape == (1, 43) and torch.equal(out[:, :40], prompt)
    assert torch.equal(out[:, 40:], model.generate(prompt[:, -16:], 3, temperature=0)[:, 16:])
    assert torch.equal(model.generate(prompt, 0), prompt)
    with pytest.raises(ValueError, match='17 tokens'):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_targets_of_minus_one_are_ignored():
    model = small()
    x, y = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    logits, _ = model(x, y)
    masked = y.clone()
    masked[:, :5] = -1
    expected = F.cross_entropy(logits[:, 5:].reshape(-1, 50), y[:, 5:].reshape(-1))
    torch.testing.assert_close(model(x, masked)[1], expected)


@pytest.mark.parametrize('dtype, rtol', [('float32', 1e-5), ('bfloat16', 0.03)])  # 8 bits of mantissa, summed up in another order; in the residual stream, too
def test_the_loss_alone_is_the_same_loss(dtype, rtol):
    model = GPT(GPTConfig(block_size=128, vocab_size=50304, n_layer=1, n_head=2, n_embd=32))
    x, y = torch.randint(50304, (2, 8, 128))  # 1,024 rows of logits: more than one piece of 2**25 / 50304
    y[0, :9] = -1
    results = []
    for return_logits in (True, False):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            logits, loss = model(x, y, return_logits=return_logits)
        (loss / 3).backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
        model.zero_grad()
    assert logits is None and loss.dtype == torch.float32
    with pytest.raises((IndexError, RuntimeError)):  # -1 alone is ignored
        model(x, y - 100, return_logits=False)
    for whole, pieces in zip(*results):
        assert (whole - pieces).norm() <= rtol * whole.norm()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        # in bfloat16 attention takes another path where there are no gradients
        assert abs(model(x, y, return_logits=False)[1] - loss) < (1e-6 if dtype == 'float32' else 1e-4) * loss


def test_compiled_it_gives_no_logits_and_compiles_once():
    model, graphs = small(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    x, y = torch.randint(50, (2, 2, 16))
    for _ in range(3):
        logits, loss = compiled(x, y, return_logits=False)
        loss.backward()
    assert logits is None and len(graphs) == 1
    torch.testing.assert_close(loss, model(x, y)[1])


def test_dropout_zeroes_and_scales():
    x = torch.ones(1000, 1001, requires_grad=True)  # not a multiple of 4
    for p in (0.2, 0.5):
        torch.manual_seed(1)
        y = Dropout(p)(x)
        values, counts = y.unique(return_counts=True)
        torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)]))
        sigma = math.sqrt(p * (1 - p) / x.numel())
        assert abs(counts[0].item() / x.numel() - p) < 4.5 * sigma
        # neighbours, which share a draw, and rows are independent: both zero at p * p
        for a, b in ((y[:, :-1], y[:, 1:]), (y[:-1], y[1:]), (y[:, :-4], y[:, 4:])):
            assert abs(((a == 0) & (b == 0)).float().mean().item() - p * p) < 4.5 * sigma
        grad, = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, y)
        torch.manual_seed(1)
        assert torch.equal(Dropout(p)(x.bfloat16()) == 0, y == 0)  # the same elements in every format
    assert torch.equal(Dropout(0.0)(x), x)
    layer = Dropout(0.5)
    assert (layer(x) == 0).any() and torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize('T', [1, 7, 64])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_attention_is_the_formula(dtype, tolerance, T):
    q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    grad = torch.randn(2, 3, T, 8)
    for p in (0.0, 0.3):
        att = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(future, -math.inf).softmax(-1)
        torch.manual_seed(2)
        expected = (att * kept(att, p) / (1 - p)) @ v
        torch.manual_seed(2)
        y = attention(q.to(dtype), k.to(dtype), v.to(dtype), p)
        for got, want in zip((y, *torch.autograd.grad(y, (q, k, v), grad.to(dtype))), (expected, *torch.autograd.grad(expected, (q, k, v), grad))):
            assert (got.float() - want).abs().max() <= tolerance * want.abs().max() + 1e-6


def draws(n=40_000, **how):
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]])
    counts = sample(logits.expand(n, -1), vocab_size=4, **how).flatten().bincount(minlength=5) / n
    return counts, torch.tensor([0.0, 1.0, 2.0, 3.0])


def assert_frequencies(counts, probs):
    sigma = (probs * (1 - probs) / 40_000).sqrt()
    assert ((counts - F.pad(probs, (0, 1))).abs() <= F.pad(4.5 * sigma, (0, 1))).all(), (counts, probs)


def test_sampling_frequencies():
    counts, logits = draws()
    assert_frequencies(counts, logits.softmax(0))
    counts, logits = draws(temperature=0.5)
    assert_frequencies(counts, (logits / 0.5).softmax(0))
    counts, logits = draws(top_k=2)
    assert_frequencies(counts, torch.tensor([-math.inf, -math.inf, 2, 3]).softmax(0))
    counts, logits = draws(top_p=0.65)  # the likeliest alone has 0.64
    assert_frequencies(counts, torch.tensor([-math.inf, -math.inf, 2, 3]).softmax(0))
    counts, logits = draws(top_p=0.63)
    assert counts.tolist() == [0, 0, 0, 1, 0]
    counts, logits = draws(top_k=3, top_p=0.7)  # 0.67 and 0.24 of the three
    assert_frequencies(counts, torch.tensor([-math.inf, -math.inf, 2, 3]).softmax(0))
    counts, logits = draws(top_k=100, top_p=1.0)
    assert_frequencies(counts, logits.softmax(0))


def test_initialisation():
    model = GPT(GPTConfig(vocab_size=500, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02 and abs(p.mean().item()) < 0.03 * expected, name


def test_crop_block_size():
    model = small()
    x = torch.randint(50, (1, 8))
    before, _ = model(x)
    model.crop_block_size(8)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.untyped_storage().nbytes() == 8 * 32 * 4
    torch.testing.assert_close(model(x)[0], before)
    with pytest.raises(ValueError):
        model.crop_block_size(9)


def test_mfu_is_unknown_on_a_cpu():
    assert small().estimate_mfu(1, 1.0) is None


@pytest.mark.parametrize('name, tera', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835), ('NVIDIA H200', 989),
    ('NVIDIA GH200 480GB', 989), ('Tesla V100-SXM2-16GB', 125), ('Tesla T4', 65), ('NVIDIA L4', 121), ('NVIDIA L40S', 362), ('NVIDIA A10', 125),
    ('NVIDIA A10G', 70), ('NVIDIA RTX A6000', 155), ('NVIDIA GeForce RTX 4090', 165), ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    ('NVIDIA RTX A1000', None), ('NVIDIA RTX A4000', None), ('NVIDIA T400', None), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('', None),
])
def test_peaks_go_by_whole_names(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match='n_embd=30'):
        GPTConfig(n_embd=30, n_head=4)


def test_moments_in_bfloat16():
    torch.manual_seed(0)
    make = lambda dtype: GPT(GPTConfig(16, 32, 2, 2, 32)).configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', dtype)  # noqa: E731
    full, low = make('float32'), make('bfloat16')
    groups = [[p for group in optimizer.param_groups for p in group['params']] for optimizer in (full, low)]
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(groups[0]), groups[1])
    start = torch.nn.utils.parameters_to_vector(groups[0]).detach()
    for step in range(30):
        for p, q in zip(*groups):
            p.grad = q.grad = torch.randn_like(p) * 1e-3 + 1e-3
        for optimizer in (full, low):
            optimizer.step()
        if step == 0:  # rounded after the update: the first is exact
            assert all(torch.equal(p, q) for p, q in zip(*groups))
    for name in ('exp_avg', 'exp_avg_sq'):
        for p, q in zip(*groups):
            assert low.state[q][name].dtype == torch.bfloat16
    one, two = (torch.nn.utils.parameters_to_vector(g).detach() - start for g in groups)
    assert 0 < (one - two).norm() / one.norm() < 0.01 and all(low.state[q]['step'] == 30 for q in groups[1])
    before = [q.clone() for q in groups[1]]
    state = {q: {k: v.clone() for k, v in low.state[q].items()} for q in groups[1]}
    low.found_inf = torch.ones(())  # a gradient that isn't finite changes nothing
    groups[1][0].grad[0] = math.inf
    low.step()
    assert all(torch.equal(a, b) for a, b in zip(before, groups[1])) and all(torch.equal(low.state[q][k], v) for q in state for k, v in state[q].items())


# -----------------------------------------------------------------------------
# what GPT-2 doesn't have
OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2)


def fast(**config):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=False, **OPTIONS), **config}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def test_attention_with_rotary_positions_and_norms_equals_stablelms():
    from transformers import DynamicCache, StableLmConfig
    from transformers.models.stablelm.modeling_stablelm import StableLmAttention, StableLmRotaryEmbedding
    theirs_config = StableLmConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, qk_layernorm=True, use_qkv_bias=False,
                                   rope_parameters=dict(rope_type='default', rope_theta=100.0, partial_rotary_factor=1.0), max_position_embeddings=64)
    theirs_config._attn_implementation = 'eager'
    theirs, ours = StableLmAttention(theirs_config, layer_idx=0).eval(), fast().transformer.h[0].attn
    with torch.no_grad():
        for name, w in zip(('q_proj', 'k_proj', 'v_proj'), ours.c_attn.weight.split(32)):
            getattr(theirs, name).weight.copy_(w)
        theirs.o_proj.weight.copy_(ours.c_proj.weight)
    x, pos = torch.randn(2, 12, 32), torch.arange(12)[None]
    turn = StableLmRotaryEmbedding(theirs_config)(x, pos)
    future = torch.full((1, 1, 12, 12), -math.inf).triu(1)
    expected = theirs(x, attention_mask=future, position_embeddings=turn, past_key_values=DynamicCache())[0]
    torch.testing.assert_close(ours(x, rotary(pos[0], 16, 100.0)), expected, rtol=1e-4, atol=1e-5)


def test_rotary_positions_equal_llamas():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb
    q, k, pos = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.arange(5, 14)
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=dict(rope_type='default', rope_theta=500.0))
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, pos[None]))
    for made, theirs in zip((rotate(z.transpose(1, 2), *rotary(pos, 8, 500.0)) for z in (q, k)), expected):
        torch.testing.assert_close(made.transpose(1, 2), theirs, rtol=1e-5, atol=1e-5)


def test_squared_relu_equals_transformers():
    from transformers.activations import ACT2FN
    mlp, x = fast().transformer.h[0].mlp, torch.randn(3, 32)
    torch.testing.assert_close(mlp(x), mlp.c_proj(ACT2FN['relu2'](mlp.c_fc(x))))
    assert torch.autograd.gradcheck(SquaredReLU.apply, torch.randn(50, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize('bigrams, conv', [(60, 2), (2550, 0), (0, 3), (60, 1)])
def test_embeddings_one_token_at_a_time(bigrams, conv):
    model, idx = fast(bigrams=bigrams, embd_conv=conv), torch.randint(50, (2, 7))
    t, made = model.transformer, model.embed(idx)
    for row in range(2):
        alone = []
        for i, token in enumerate(idx[row].tolist()):
            x = t.wte.weight[token]
            if bigrams:
                before = idx[row, i - 1].item() if i else -1
                x = x + t.bigrams.weight[(token * 51 + before + 1) % bigrams]
            alone.append(x)
            x = x + sum((t.conv[k - 1] * alone[i - k] for k in range(1, conv + 1) if i >= k), torch.zeros(32))
            torch.testing.assert_close(made[row, i], x)


def test_options_change_no_default():
    assert list(GPT(GPTConfig(16, 50, 1, 2, 32)).state_dict()) == [
        'transformer.wte.weight', 'transformer.wpe.weight', *(f'transformer.h.0.{name}' for name in (
            'ln_1.weight', 'ln_1.bias', 'attn.c_attn.weight', 'attn.c_attn.bias', 'attn.c_proj.weight', 'attn.c_proj.bias', 'ln_2.weight', 'ln_2.bias',
            'mlp.c_fc.weight', 'mlp.c_fc.bias', 'mlp.c_proj.weight', 'mlp.c_proj.bias')), 'transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight']


@pytest.mark.parametrize('off', [None, *OPTIONS])
def test_options_with_the_cache_below_and_at_the_full_context(off):
    model = fast(**({off: getattr(GPTConfig, off)} if off else {}))
    prompt = torch.randint(50, (2, 5))
    out = model.generate(prompt, 11, temperature=0)
    for T in range(5, 16):  # as without a cache
        assert torch.equal(model(out[:, :T])[0][:, -1].argmax(dim=-1), out[:, T])


def test_beyond_the_full_context_rotary_positions_slide(monkeypatch):
    """Each token sees the keys and values of the 16 tokens up to it, made when their turn was."""
    import model as module
    model, prompt = fast(), torch.randint(50, (2, 5))
    seen, step = [], model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **k: seen.append(idx.size(1)) or step(idx, **k))
    out = model.generate(prompt, 45, temperature=0)
    assert seen == [5] + [1] * 44  # the context is never read again
    longer = fast(block_size=64)
    longer.load_state_dict(model.state_dict())
    band = torch.ones(64, 64).tril().triu(-15).bool()
    monkeypatch.setattr(module, 'attention', lambda q, k, v, p, mask: F.scaled_dot_product_attention(q, k, v, band[:q.size(2), :q.size(2)]))
    expected = longer(out, out)[0][:, 4:-1]  # a whole sequence at once
    assert torch.equal(expected.argmax(dim=-1), out[:, 5:])


def test_a_static_cache_slides_too():
    model, idx = fast(), torch.randint(50, (2, 40))
    caches = [KVCache(2, 16, static=static) for static in (False, True)]
    for T in [range(5), *([i] for i in range(5, 40))]:
        one, other = (model(idx[:, T], kv_cache=cache)[0] for cache in caches)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_options_in_bfloat16_and_compiled():
    model, idx, targets = fast(), torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    logits, loss = model(idx, targets)
    with torch.autocast('cpu', torch.bfloat16):
        low, low_loss = model(idx, targets)
    assert (low - logits).norm() < 0.05 * logits.norm() and abs(low_loss - loss) < 0.05 * loss
    torch.testing.assert_close(torch.compile(model)(idx, targets), (logits, loss), rtol=1e-4, atol=1e-4)


def test_cropping_and_counting_without_learned_positions():
    model = fast()
    model.crop_block_size(8)
    assert model.config.block_size == 8 and model(torch.randint(50, (1, 8)))[0].shape == (1, 1, 50)
    assert model.get_num_params() == model.get_num_params(False) == sum(p.numel() for p in model.parameters())
    assert model.flops_per_token() == 6 * (model.get_num_params() - (60 + 50) * 32) + 12 * 2 * 32 * 8


@pytest.mark.parametrize('config', [dict(rope_base=-1.0), dict(n_embd=30, n_head=2)])
def test_heads_that_cannot_be_turned(config):
    with pytest.raises(ValueError, match='even size'):
        fast(**config)
