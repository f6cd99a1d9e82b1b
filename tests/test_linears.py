"""Weights packed for generation, of 16, 8 and 4 bits: what they compute, and what they refuse."""
import copy
import io
import re

import pytest
import torch
import torch.nn as nn
from conftest import TINY, run
from edits import continue_greedily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig
from runtime import inference, linears
from runtime.linears import GROUP, Int4Linear, Int8Linear, PackedLinear

DTYPES = torch.float32, torch.bfloat16


def make_model(**options):
    torch.manual_seed(0)
    args = dict(block_size=64, vocab_size=48, n_layer=2, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**{**args, **options})).eval()
    for p in model.parameters():
        p.data *= 4
    return model


def make_linear(dtype, bias, inputs=96, outputs=48):
    torch.manual_seed(1)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data[3] = 0.0  # a scale of nothing
    linear.weight.data[5] *= 100
    return linear.to(dtype)


# -----------------------------------------------------------------------------
# what they compute
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(1,), (3,), (2, 5)])
def test_8_bits(dtype, bias, shape):
    linear = make_linear(dtype, bias)
    x = torch.randn(*shape, 96).to(dtype)
    packed = Int8Linear(linear)
    steps = linear.weight.float().abs().amax(dim=1, keepdim=True) / 127
    weight = packed.blocks.unpack()[0].dequantize()
    assert ((weight - linear.weight.float()).abs() <= 0.51 * steps).all()
    assert packed.weight.dtype == dtype
    y = packed(x)
    assert y.dtype == dtype and y.shape == (*shape, 48)
    expected = linear(x).float()
    # the inputs have 8 bits, too, so an output is off by a share of the largest one
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    without_bias = y.float() - (linear.bias.float() if bias else 0.0)
    assert without_bias[..., 3].abs().max() < 0.01


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(1,), (3,), (2, 5)])
def test_4_bits(dtype, bias, shape):
    linear = make_linear(dtype, bias)
    packed = Int4Linear(linear)
    groups = linear.weight.float().unflatten(1, (-1, GROUP))
    steps = (groups.amax(dim=2) - groups.amin(dim=2)) / 15  # (outputs, groups)
    identity = torch.eye(96, dtype=dtype)
    offset = linear.bias if bias else torch.zeros(48, dtype=dtype)
    weights = (packed(identity) - offset).float().T.unflatten(1, (-1, GROUP))
    errors = (weights - groups) / steps.clamp(min=1e-6)[..., None]
    assert errors.abs().max() < 1.5  # at the ends of a group; the others are rounded
    # without least squares it is nearly 1/12 for 30 of 32 weights: the two ends have no error
    assert errors[[0, 1, 2, 4, 6, 7]].square().mean() < (0.87 if dtype == torch.float32 else 1) / 12
    x = torch.randn(*shape, 96).to(dtype)
    y = packed(x)
    assert y.dtype == dtype and y.shape == (*shape, 48)
    expected = F.linear(x.float(), weights.flatten(1), offset.float())
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02 * expected.std().item())


@pytest.mark.parametrize('weights, tolerance', [('int8', 0.05), ('int4', 0.3)])
@pytest.mark.parametrize('dtype', DTYPES)
def test_a_model_has_nearly_the_same_logits(weights, tolerance, dtype):
    model, idx = make_model().to(dtype), torch.randint(48, (3, 20))
    expected, _ = model(idx)
    inference.pack_linears(model, 3, weights)
    logits, _ = model(idx)
    assert 0 < (logits - expected).norm() < tolerance * (expected - expected.mean()).norm()
    assert model.generate(idx, 5, temperature=0).shape == (3, 25)


def list_kinds(model):
    return [type(module).__name__ for module in model.modules()
            if isinstance(module, (nn.Linear, linears.FrozenLinear))]


def test_what_does_not_fit_into_4_bits_has_8():
    model = make_model(vocab_size=65)
    inference.pack_linears(model, 1, 'int4')
    assert list_kinds(model) == 8 * ['Int4Linear'] + ['Int8Linear']
    model = make_model(n_embd=48)  # a group has 32 inputs, and the last layer of an MLP has 192
    inference.pack_linears(model, 1, 'int4')
    assert list_kinds(model).count('Int4Linear') == 2
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 5).shape == (1, 6)


@pytest.mark.parametrize('weights', ['auto', 'int8', 'int4'])
def test_a_changed_layer_stays_as_it_is(weights):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, idx = make_model(), torch.randint(48, (1, 20))
    model.transformer.h[0].mlp.c_fc.__class__ = Doubled
    expected, _ = model(idx)
    inference.pack_linears(model, 1, weights)
    assert type(model.transformer.h[0].mlp.c_fc) is Doubled
    assert list_kinds(model).count('Doubled') == 1 and 'Linear' not in list_kinds(model)
    assert (model(idx)[0] - expected).norm() < 0.3 * expected.norm()


# -----------------------------------------------------------------------------
# what they refuse
@pytest.mark.parametrize('weights', ['auto', 'int8', 'int4'])
def test_packed_weights_cannot_be_lost_in_a_file(weights):
    model, idx = make_model(), torch.randint(48, (2, 20))
    inference.pack_linears(model, 2, weights)
    for action, verb in ((model.state_dict, 'saved'), (model.train, 'trained'),
                         (lambda: copy.deepcopy(model), 'copied'),
                         (lambda: torch.save(model, io.BytesIO()), 'saved'),
                         (lambda: model.load_state_dict(make_model().state_dict()), 'loaded')):
        with pytest.raises(RuntimeError, match=f'packed for generation, so it cannot be .*{verb}'):
            action()
    with pytest.raises(RuntimeError, match='does not require grad'):
        model(idx, idx)[1].backward()
    model.eval()


# -----------------------------------------------------------------------------
# generate() of a model that will be trained on
@pytest.fixture
def packed_layers(monkeypatch):
    """The layers that are packed from now on."""
    layers = []
    monkeypatch.setattr(inference, 'pack', lambda *args: layers.append(linears.pack(*args))
                        or layers[-1])
    return layers


@pytest.mark.parametrize('options', [{}, dict(bias=False, rope_base=100.0, qk_norm=True)])
def test_generate_packs_the_layers_for_itself(options, packed_layers):
    model, idx = make_model(**options), torch.randint(48, (2, 5))
    modules, weights = list(model.modules()), copy.deepcopy(model.state_dict())
    expected = continue_greedily(model, idx, 40)
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)
    assert [type(layer) for layer in packed_layers] == 9 * [PackedLinear]
    assert list(model.modules()) == modules and all(p.requires_grad for p in model.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


@pytest.mark.parametrize('change', ['step', 'data', 'swap'])
def test_what_changes_the_weights_between_two_calls(change, packed_layers):
    model, idx = make_model(), torch.randint(48, (2, 5))
    before = model.generate(idx, 40, temperature=0)
    if change == 'step':
        model.train()
        model(idx, idx)[1].backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.eval()
    elif change == 'data':
        weight = model.transformer.h[0].mlp.c_fc.weight
        weight.data = weight.data.roll(7, dims=0)  # the sum is the same
    else:
        model.transformer.h[1].mlp.c_fc = nn.Linear(64, 256)
    expected = continue_greedily(model, idx, 40)
    assert not torch.equal(expected, before)
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)
    assert len(packed_layers) == 18


def test_few_tokens_are_not_worth_packing(packed_layers):
    make_model().generate(torch.randint(48, (2, 5)), 10)
    assert not packed_layers


@pytest.mark.parametrize('change', ['autocast', 'float64', 'subclass', 'no room'])
def test_where_generate_packs_nothing(change, packed_layers, monkeypatch):
    class Weight(nn.Parameter):
        pass

    model, idx = make_model(), torch.randint(48, (1, 5))
    if change == 'float64':
        model.double()
    if change == 'subclass':
        linear = model.transformer.h[0].mlp.c_fc
        linear.weight = Weight(linear.weight.data)
        assert type(linear.weight) is Weight
    if change == 'no room':
        monkeypatch.setattr(inference, 'has_room', lambda num_bytes, device: False)
    with torch.autocast('cpu', torch.bfloat16, enabled=change == 'autocast'):
        tokens = model.generate(idx, 40, temperature=0)
    assert all(isinstance(layer, nn.Linear) for layer in packed_layers)
    if change != 'autocast':
        assert torch.equal(tokens, continue_greedily(model, idx, 40))


@pytest.mark.parametrize('name', ['attn.attn_dropout', 'attn.resid_dropout', 'mlp.dropout'])
def test_dropout_while_generating_counts(name):
    model, idx = make_model(dropout=0.5), torch.randint(48, (1, 5))
    model.transformer.h[0].get_submodule(name).train()
    texts = []
    for seed in (1, 2):
        torch.manual_seed(0)
        steps = inference.stream(model, idx, 40, temperature=0)
        prompt_token = next(steps)  # the same in both texts
        torch.manual_seed(seed)
        texts.append(torch.cat((prompt_token, *steps), dim=1))
    assert not torch.equal(*texts)


def replace_dropout(model):
    model.transformer.h[0].mlp.dropout = nn.LayerNorm(64)


def replace_mlp(model):
    torch.manual_seed(2)
    model.transformer.h[1].mlp = nn.Linear(64, 64)


def replace_attention(model):
    torch.manual_seed(2)
    model.transformer.h[1].attn = copy.deepcopy(model.transformer.h[0].mlp)


def replace_block(model):
    model.transformer.h[1] = copy.deepcopy(model.transformer.h[0].mlp)


@pytest.mark.parametrize('change', [replace_dropout, replace_mlp, replace_attention,
                                    replace_block], ids=lambda change: change.__name__)
def test_known_parts_in_other_places(change):
    model, idx = make_model(), torch.randint(48, (2, 5))
    before = model.generate(idx, 40, temperature=0)
    change(model)
    expected = continue_greedily(model, idx, 40)
    assert not torch.equal(expected, before)
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)


def double(module, args, output):
    return 2 * output if isinstance(module, nn.Linear) else output


class Halving(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return 0.5 * output if func is F.linear else output


def test_hooks_and_modes_see_each_layer():
    model, idx = make_model(), torch.randint(48, (2, 5))
    before = model.generate(idx, 40, temperature=0)
    handle = nn.modules.module.register_module_forward_hook(double)
    expected = continue_greedily(model, idx, 40)
    assert torch.equal(model.generate(idx, 40, temperature=0, use_cache=True), expected)
    handle.remove()
    assert not torch.equal(expected, before)
    with Halving():
        expected = continue_greedily(model, idx, 40)
        assert torch.equal(model.generate(idx, 40, temperature=0), expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize('change', ['weight', 'block'])
def test_changes_between_two_tokens_of_a_stream(change):
    model, idx = make_model(), torch.randint(48, (1, 5))
    before = model.generate(idx, 40, temperature=0)[:, 5:]
    steps = inference.stream(model, idx, 40, temperature=0)
    tokens = [next(steps) for _ in range(4)]
    if change == 'weight':
        model.transformer.h[0].mlp.c_fc.weight.data.mul_(-3.0)
    else:
        model.transformer.h[0] = Silent()
    tokens += list(steps)
    assert torch.equal(torch.cat(tokens[:4], dim=1), before[:, :4])
    assert not torch.equal(torch.cat(tokens, dim=1), before)


class Silent(nn.Module):
    def forward(self, x):
        return x


def test_a_changed_model_with_8_bits_keeps_its_cache(capsys):
    model, idx = make_model(), torch.randint(48, (1, 5))
    for block in model.transformer.h:
        block.mlp.gelu = nn.SiLU()
    inference.pack_linears(model, 1, 'int8')
    model.generate(idx, 58, temperature=0)
    assert 'without a KV cache' not in capsys.readouterr().err


# -----------------------------------------------------------------------------
# the setting
@pytest.fixture(scope='module')
def trained(tmp_path_factory, char_data):
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=2',
        '--eval_interval=2', '--n_embd=256')
    return out_dir


def test_sample_with_weights(trained, tmp_path):
    sizes = []
    for weights in ('bfloat16', 'int8', 'int4'):
        result = run('sample.py', f'--out_dir={trained}', f'--weights={weights}', '--num_samples=2',
                     '--max_new_tokens=40', '--device=cpu', cwd=tmp_path)
        assert result.stdout.count('-' * 15) == 2 and 'Warning' not in result.stderr
        assert (weights == 'bfloat16') <= ('bfloat16 (set by you)' in result.stderr)
        sizes.append(float(re.search(r'memory: (.*) MiB of weights', result.stderr)[1]))
    assert sizes[0] > 1.7 * sizes[1] > 1.7 * 1.4 * sizes[2]


@pytest.mark.parametrize('flags, words', [
    (['--weights=int3'], "weights='int3'"),
    (['--weights=bfloat16', '--dtype=float32'], 'bfloat16 does not work with dtype=float32'),
    (['--weights=int8', '--compile=True'], 'weights=int8 does not work with compile=True')])
@pytest.mark.parametrize('script', ['sample.py', 'bench.py'])
def test_mistakes(script, flags, words, trained, tmp_path):
    args = [f'--out_dir={trained}'] if script == 'sample.py' else ['--what=decode']
    err = run(script, *args, *flags, '--device=cpu', cwd=tmp_path, ok=False).stderr
    assert words in err and err.count('\n') == 1
