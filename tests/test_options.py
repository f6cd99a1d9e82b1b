"""The model's newer options against implementations by others, and what they leave unchanged."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig, RotaryPositions

OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2)


def make_model(**options):
    torch.manual_seed(3)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=False)
    model = GPT(GPTConfig(**{**shape, **OPTIONS, **options}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def test_attention_with_rotary_positions_and_norms_is_stablelms():
    from transformers import DynamicCache, StableLmConfig
    from transformers.models.stablelm import modeling_stablelm
    config = StableLmConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, qk_layernorm=True,
        use_qkv_bias=False, max_position_embeddings=64,
        rope_parameters=dict(rope_type='default', rope_theta=100.0, partial_rotary_factor=1.0))
    config._attn_implementation = 'eager'
    theirs = modeling_stablelm.StableLmAttention(config, layer_idx=0).eval()
    ours = make_model().transformer.h[0].attn
    with torch.no_grad():
        for name, w in zip(('q_proj', 'k_proj', 'v_proj'), ours.c_attn.weight.split(32)):
            getattr(theirs, name).weight.copy_(w)
        theirs.o_proj.weight.copy_(ours.c_proj.weight)
    x, pos = torch.randn(2, 12, 32), torch.arange(12)[None]
    angles = modeling_stablelm.StableLmRotaryEmbedding(config)(x, pos)
    future = torch.full((1, 1, 12, 12), -math.inf).triu(1)
    expected = theirs(x, attention_mask=future, position_embeddings=angles,
                      past_key_values=DynamicCache())[0]
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('start', [0, 5, torch.tensor([5])])
def test_rotary_positions_are_llamas(start):
    from transformers.models.llama import modeling_llama
    config = modeling_llama.LlamaConfig(
        hidden_size=24, num_attention_heads=3, head_dim=8,
        rope_parameters=dict(rope_type='default', rope_theta=500.0))
    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    pos = torch.arange(9)[None] + start
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, pos)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    ours = RotaryPositions()(q.transpose(1, 2), k.transpose(1, 2), 500.0, start)
    for z, theirs in zip(ours, expected):
        torch.testing.assert_close(z.transpose(1, 2), theirs, rtol=1e-5, atol=1e-5)


def test_squared_relu_is_that_of_transformers():
    from transformers.activations import ACT2FN
    mlp, x = make_model().transformer.h[0].mlp, torch.randn(3, 32)
    torch.testing.assert_close(mlp(x), mlp.c_proj(ACT2FN['relu2'](mlp.c_fc(x))))


@pytest.mark.parametrize('gelu', ['none', 'tanh'])
def test_gelu_is_the_formula(gelu):
    mlp = make_model(relu2=False, gelu=gelu).transformer.h[0].mlp
    x = torch.linspace(-4, 4, 101)
    y = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if gelu == 'tanh':
        y = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    torch.testing.assert_close(mlp.gelu(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('bigrams, conv', [(60, 2), (2550, 0), (0, 3), (60, 1)])
def test_embeddings_one_token_at_a_time(bigrams, conv):
    model, idx = make_model(bigrams=bigrams, embd_conv=conv), torch.randint(50, (2, 7))
    transformer, result = model.transformer, model.embed(idx)
    for row in range(2):
        unmixed = []
        for i, token in enumerate(idx[row].tolist()):
            x = transformer.wte.weight[token]
            if bigrams:
                previous = idx[row, i - 1].item() if i else -1
                pair = (token * 51 + previous + 1) % bigrams
                x = x + transformer.bigrams.weight[pair]
            unmixed.append(x)
            for k in range(1, min(conv, i) + 1):
                x = x + transformer.conv[k - 1] * unmixed[i - k]
            torch.testing.assert_close(result[row, i], x)


def test_an_untied_output_layer_has_its_own_weights():
    for tied in (True, False):
        model = make_model(tied=tied)
        idx = torch.randint(50, (2, 16))
        before = model.embed(idx), model(idx)[0]
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert torch.equal(model.embed(idx), before[0]) != tied
        assert (model(idx)[0] == 0).all() and (before[1] != 0).any()


def test_options_change_no_default():
    blocks = ('ln_1.weight', 'ln_1.bias', 'attn.c_attn.weight', 'attn.c_attn.bias',
              'attn.c_proj.weight', 'attn.c_proj.bias', 'ln_2.weight', 'ln_2.bias',
              'mlp.c_fc.weight', 'mlp.c_fc.bias', 'mlp.c_proj.weight', 'mlp.c_proj.bias')
    assert list(GPT(GPTConfig(16, 50, 1, 2, 32)).state_dict()) == [
        'transformer.wte.weight', 'transformer.wpe.weight',
        *(f'transformer.h.0.{name}' for name in blocks),
        'transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight']


def test_options_in_bfloat16_and_compiled():
    model = make_model()
    idx, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    logits, loss = model(idx, targets)
    with torch.autocast('cpu', torch.bfloat16):
        low, low_loss = model(idx, targets)
    assert (low - logits).norm() < 0.05 * logits.norm()
    assert abs(low_loss - loss) < 0.05 * loss
    compiled = torch.compile(model)(idx, targets)
    torch.testing.assert_close(compiled, (logits, loss), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = make_model()
    idx, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)


def test_cropping_and_counting_without_learned_positions():
    model = make_model()
    model.crop_block_size(8)
    assert model.config.block_size == 8
    assert model(torch.randint(50, (1, 8)))[0].shape == (1, 1, 50)
    total = sum(p.numel() for p in model.parameters())
    assert model.get_num_params() == model.get_num_params(False) == total
    # rows of bigrams and of the untied embedding are looked up, not multiplied
    flops = 6 * (total - (60 + 50) * 32) + 12 * 2 * 32 * 8
    assert model.flops_per_token() == flops


def test_heads_that_cannot_be_rotated():
    with pytest.raises(AssertionError, match='n_embd=30'):
        make_model(n_embd=30, n_head=2)
