"""What is changed in a model, before or after its step was recorded, takes effect."""
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from replays import check, make_batch, make_fast_model, make_model, measure
from torch.nn import functional as F

from model import GPT
from runtime import kernels, replay, replay_checks

pytestmark = pytest.mark.usefixtures('two_threads')


# each of these takes a model and changes it
def set_flash(model):
    model.transformer.h[0].attn.flash = False


def set_eps(model):
    for block in model.transformer.h:
        block.ln_1.eps = 0.1


def set_gelu(model):
    model.transformer.h[1].mlp.gelu.approximate = 'tanh'


def replace_weight(model):
    torch.manual_seed(2)
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.randn(128, 32) / 5)


def replace_part(model):
    model.transformer.h[1].mlp.gelu = nn.ReLU()


def swap_blocks(model):
    model.transformer.h = nn.ModuleList(reversed(model.transformer.h))


def add_block(model):
    model.transformer.h.append(model.transformer.h[0])


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def patch_forward(model):
    mlp = model.transformer.h[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def patch_activation(model):
    model.transformer.h[0].mlp.gelu.forward = lambda x: x


def hook_forward(model):
    model.transformer.h[1].register_forward_hook(lambda module, args, x: 2 * x)


def hook_inputs(model):
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def hook_backward(model):
    model.transformer.h[1].register_full_backward_hook(lambda module, grads, _: (3 * grads[0],))


def hook_gradient(model):
    model.transformer.wte.weight.register_hook(lambda grad: 2 * grad)


def freeze(model):
    model.transformer.wte.weight.requires_grad_(False)


class DoubledGPT(GPT):
    def embed(self, idx):
        return 2 * super().embed(idx)


class DoubledMLP(type(make_model().transformer.h[0].mlp)):
    def forward(self, x):
        return 2 * super().forward(x)


def set_class(model):
    model.transformer.h[0].mlp.__class__ = DoubledMLP


def set_class_of_model(model):
    model.__class__ = DoubledGPT


def set_embed(model):
    embed = model.embed
    model.embed = lambda idx: 2 * embed(idx)


def set_loss(model):
    """Of the faster form that is installed."""
    loss_head = model.loss_head
    if not isinstance(loss_head, kernels.LossHead):
        forward = loss_head.forward
        loss_head.forward = lambda *args: (None, 2 * forward(*args)[1])
        return
    compute = loss_head.compute
    loss_head.compute = lambda *args: (None, 2 * compute(*args)[1])


def set_embedding_options(model):
    model.transformer.wte.scale_grad_by_freq = True  # it depends on the whole batch


def set_max_norm(model):
    model.transformer.wpe.max_norm = 0.1


def replace_hooks(model):
    mlp = model.transformer.h[0].mlp
    mlp._forward_hooks = OrderedDict()  # an idiom that removes all hooks
    mlp.register_forward_hook(lambda module, args, x: 2 * x)


def prune(model):
    """Removes half of a hidden layer, in place."""
    mlp = model.transformer.h[0].mlp
    mlp.c_fc.weight.data = mlp.c_fc.weight.data[:64]
    mlp.c_fc.bias.data = mlp.c_fc.bias.data[:64]
    mlp.c_proj.weight.data = mlp.c_proj.weight.data[:, :64]


# these leave all code as it is in model.py, so the step is recorded again
CHANGES_OF_NUMBERS = [set_flash, set_eps, set_gelu, replace_weight, swap_blocks, untie, freeze,
                      prune, add_block]
CHANGES = [*CHANGES_OF_NUMBERS, replace_part, patch_forward, hook_forward, hook_inputs,
           hook_backward, hook_gradient, set_class, set_class_of_model, set_embed, replace_hooks,
           set_loss, set_embedding_options, set_max_norm]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize('is_first', [True, False])
def test_changes(change, is_first):
    """Changes before and after the first step."""
    model, plain_model = make_fast_model(), make_model()
    if not is_first:
        check(model)
    change(model)
    change(plain_model)
    for _ in range(2):
        check(model, is_played=change in CHANGES_OF_NUMBERS, plain_model=plain_model)


def test_a_subclass_with_an_attribute_of_that_name():
    """What isn't a function computes nothing."""
    model = make_fast_model()
    model.__class__ = type('NamedGPT', (GPT,), {'compute': 'cluster'})
    check(model)


def test_changes_between_two_calls():
    """Also within kernels.loss_only()."""
    model = make_fast_model()
    batch = make_batch(model)
    with kernels.loss_only(model):
        _, first = model(*batch)
        hook = model.transformer.h[0].register_forward_hook(lambda module, args, x: 2 * x)
        _, second = model(*batch)
        hook.remove()
        _, third = model(*batch)
        weights = {name: 2 * p for name, p in model.named_parameters()}
        _, fourth = torch.func.functional_call(model, weights, batch)
    assert first == third and first != second and first != fourth
    fourth.backward()
    plain_model = make_model(scale=8)
    expected, _ = measure(plain_model, batch)
    assert torch.allclose(fourth, expected['loss'])
    torch.testing.assert_close(model.transformer.wpe.weight.grad,
                               2 * expected['transformer.wpe.weight'])


def test_a_change_and_back():
    """Then the step is played again, as in a run that is resumed after it."""
    model, new_model = make_fast_model(), make_fast_model()
    check(model)
    model.transformer.wte.weight.requires_grad_(False)
    measure(model, make_batch(model))
    model.transformer.wte.weight.requires_grad_(True)
    results, was_played = measure(model, make_batch(model))
    assert was_played
    for name, value in measure(new_model, make_batch(model))[0].items():
        assert torch.equal(results[name], value)


def test_many_changes_and_kinds_of_batches():
    """Only the last kinds are kept."""
    model = make_fast_model()
    played = [measure(model, make_batch(model, 2 * rows))[1] for rows in range(1, 20)]
    assert played == [True] * 19
    assert len(model.loss_head.player.recordings) == replay.MAX_RECORDINGS
    model, plain_model = make_fast_model(), make_model()
    for step in range(20):
        for m in (model, plain_model):
            m.transformer.h[0].ln_1.eps = 1e-5 * (step + 2)
        check(model, plain_model=plain_model)


def double(function):
    return lambda *args, **options: 2 * function(*args, **options)


PATCHES = [(GPT, 'embed'), (nn.Linear, 'forward'), (nn.LayerNorm, 'forward'), (F, 'linear'),
           (F, 'gelu'), (F, 'cross_entropy'), (F, 'scaled_dot_product_attention'),
           (F, 'dropout'), (type(make_model().transformer.h[0].attn.attention), 'forward'),
           (type(make_model().loss_head), 'forward'), (nn.Embedding, '__call__')]


@pytest.mark.parametrize('owner, name', PATCHES, ids=[f'{o.__name__}.{n}' for o, n in PATCHES])
def test_patches_of_classes_and_functions(monkeypatch, owner, name):
    model, plain_model = make_fast_model(), make_model()
    check(model)
    patch = double(getattr(owner, name))
    if name == 'forward' and 'Loss' in owner.__name__:
        forward = owner.forward

        def patch(*args):
            logits, loss = forward(*args)
            return logits, 2 * loss
    monkeypatch.setattr(owner, name, patch)
    check(model, is_played=False, plain_model=plain_model)


# changes, and the names in the line about them. An early change of SquaredReLU is named before
LINES = [(replace_part, 'ReLU'), (patch_forward, 'MLP'), (set_class, 'DoubledMLP'),
         (set_embed, 'GPT'), (patch_activation, 'SquaredReLU')]


@pytest.mark.parametrize('is_late', [False, True])
@pytest.mark.parametrize('change, name', LINES, ids=[change.__name__ for change, _ in LINES])
def test_one_line_names_what_keeps_a_step_from_being_played(change, name, is_late, capsys):
    model = make_model(relu2=name == 'SquaredReLU')
    if is_late:
        kernels.accelerate(model, 'cpu', 'float32')
        assert measure(model, make_batch(model))[1]
        assert ''.join(capsys.readouterr()) == ''
    change(model)
    kernels.accelerate(model, 'cpu', 'float32')
    for _ in range(3):
        assert not measure(model, make_batch(model))[1]
    line = ''.join(capsys.readouterr())
    assert line.endswith(f'take more memory: {name}\n') and line.count('\n') == 1


def test_each_part_is_named_once(capsys):
    model = make_model(relu2=True)
    patch_activation(model)
    kernels.accelerate(model, 'cpu', 'float32')
    assert ''.join(capsys.readouterr()).endswith('more memory: SquaredReLU\n')
    patch_forward(model)
    for _ in range(2):
        measure(model, make_batch(model))
    assert ''.join(capsys.readouterr()).endswith('more memory: MLP\n')


@pytest.mark.parametrize('limit, options, rows, change', [
    ('MAX_ELEMENTS', {}, 4, replace_part), ('MAX_WEIGHTS', {}, 4, replace_part),
    ('MAX_PLAIN_LOGITS', {}, 4, replace_part), ('', {'dropout': 0.1}, 4, replace_part),
    ('', {}, 3, replace_part), ('', {}, 4, hook_forward), ('', {}, 4, hook_backward),
    ('', {}, 4, kernels.recompute_blocks)])
def test_no_line_where_nothing_is_lost_or_changed(limit, options, rows, change, capsys,
                                                  monkeypatch):
    """With few weights and small batches, without dropout, there would be one."""
    if limit:
        monkeypatch.setattr(replay_checks, limit, 1000)
    model = make_fast_model(**options)
    change(model)
    assert not measure(model, make_batch(model, rows))[1]
    assert ''.join(capsys.readouterr()) == ''
