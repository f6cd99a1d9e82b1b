"""originals.py: accelerate() replaces only what nobody changed, so what you write is what runs."""
import copy
import functools
import os
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from edits import load_module
from test_kernels import FAST, assert_near, list_kinds, make_batch, make_model, measure
from torch.nn import functional as F

import model as model_py
from runtime import inference, kernels, linears

PATHS = {'Attention': ('attn.attention',), 'LossHead': ('loss_head',), 'SquaredReLU': ('mlp.gelu',),
         'Dropout': ('transformer.drop', 'attn.resid_dropout', 'mlp.dropout')}


def make_all_kinds(kind, module=model_py):
    """A model with all kinds of parts. To test its LossHead it has GPT-2's vocabulary."""
    vocab_size, block_size = (50304, 64) if kind == 'LossHead' else (50, 16)
    return make_model(module, vocab_size=vocab_size, block_size=block_size, relu2=True,
                      dropout=0.1).eval()


def list_parts(model, kind):
    return [part for path, part in model.named_modules() if path.endswith(PATHS[kind])]


def double(out):
    """Another output: it is twice as large, or the loss is."""
    return (out[0], 2 * out[1]) if isinstance(out, tuple) else 2 * out


def double_inputs(module, args):
    return tuple(2 * arg if torch.is_tensor(arg) and arg.is_floating_point() else arg
                 for arg in args)


def double_grads(module, grad_inputs, grad_outputs):
    return tuple(grad if grad is None else 2 * grad for grad in grad_inputs)


def subclass(model, kind, monkeypatch):
    for part in list_parts(model, kind):
        cls = type(part)
        methods = {'forward': lambda self, *args: double(cls.forward(self, *args))}
        part.__class__ = type(f'My{kind}', (cls,), methods)


def subclass_with_the_same_forward(model, kind, monkeypatch):
    for part in list_parts(model, kind):
        cls = type(part)
        methods = {'__call__': lambda self, *args: double(cls.__call__(self, *args))}
        part.__class__ = type(f'My{kind}', (cls,), methods)


def replace_by_the_same_name(model, kind, monkeypatch):
    subclass(model, kind, monkeypatch)
    for part in list_parts(model, kind):
        type(part).__name__ = kind


def patch_class(model, kind, monkeypatch):
    cls = type(list_parts(model, kind)[0])
    forward = cls.forward
    monkeypatch.setattr(cls, 'forward', lambda self, *args: double(forward(self, *args)))


def patch_class_by_a_statement(model, kind, monkeypatch):
    cls = type(list_parts(model, kind)[0])
    forward = cls.forward
    monkeypatch.setattr(cls, 'forward', forward)  # is put back at the end
    cls.forward = lambda self, *args: double(forward(self, *args))


def wrap_class(model, kind, monkeypatch):
    cls = type(list_parts(model, kind)[0])
    forward = cls.forward

    @functools.wraps(forward)
    def wrapper(self, *args):
        return double(forward(self, *args))

    monkeypatch.setattr(cls, 'forward', wrapper)


def patch_instances(model, kind, monkeypatch):
    for part in list_parts(model, kind):
        part.forward = lambda *args, forward=part.forward: double(forward(*args))


def hook(model, kind, monkeypatch):
    for part in list_parts(model, kind):
        part.register_forward_hook(lambda module, args, out: double(out))


def pre_hook(model, kind, monkeypatch):
    for part in list_parts(model, kind):
        part.register_forward_pre_hook(double_inputs)


def backward_hook(model, kind, monkeypatch):
    for part in list_parts(model, kind):
        part.register_full_backward_hook(double_grads)


WAYS = [subclass, subclass_with_the_same_forward, replace_by_the_same_name, patch_class,
        patch_class_by_a_statement, wrap_class, patch_instances, hook, pre_hook, backward_hook]


def check_line_and_kinds(model, kind, name, capsys):
    """One line names the part that stays as it is, and all others are replaced."""
    line, kinds = ''.join(capsys.readouterr()), list_kinds(model)
    if name is None:
        assert line == '' and kinds == FAST
        return
    if kind:
        assert kinds.pop(kind) is not FAST[kind]
    assert kinds == {other: FAST[other] for other in kinds}
    assert len(kinds) == len(FAST) - bool(kind)
    assert line.startswith('changed parts of the model run as') and line.count('\n') == 1
    assert line.endswith(f': {name}\n')


def check_change(model, change, kind, capsys, name=None):
    """After change() an accelerated model has the changed loss, and the other parts are fast."""
    batch = make_batch(model)
    unchanged = measure(model, batch)
    change()
    changed = measure(model, batch)
    assert any((changed[key] - unchanged[key]).norm() > 1e-3 * unchanged[key].norm()
               for key in changed)
    kernels.accelerate(model, 'cpu', 'float32')
    model.eval()
    assert_near(measure(model, batch), changed, 1e-5)
    check_line_and_kinds(model, kind, name or kind, capsys)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', FAST)
def test_a_part_that_was_changed_runs_as_it_was_written(kind, way, monkeypatch, capsys):
    model = make_all_kinds(kind)
    name = f'My{kind}' if way in (subclass, subclass_with_the_same_forward) else kind
    check_change(model, lambda: way(model, kind, monkeypatch), kind, capsys, name)


def patch_function(name, wraps, monkeypatch):
    function = getattr(F, name)

    def patched(*args, **options):
        return double(function(*args, **options))

    if wraps:
        patched = functools.wraps(function)(patched)
    monkeypatch.setattr(F, name, patched)


@pytest.mark.parametrize('wraps', [False, True])
@pytest.mark.parametrize('name, kind', [
    ('scaled_dot_product_attention', 'Attention'), ('cross_entropy', 'LossHead'),
    ('relu', 'SquaredReLU'), ('dropout', 'Dropout')])
def test_functions_of_torch_that_were_patched(name, kind, wraps, monkeypatch, capsys):
    check_change(make_all_kinds(kind), lambda: patch_function(name, wraps, monkeypatch), kind,
                 capsys)


def test_a_function_of_torch_with_another_default(monkeypatch, capsys):
    smoothed = functools.partial(F.cross_entropy, label_smoothing=0.5)
    check_change(make_all_kinds('LossHead'),
                 lambda: monkeypatch.setattr(F, 'cross_entropy', smoothed), 'LossHead', capsys)


EDITS = [  # the part that stays as written, a line of model.py, and what somebody writes instead
    ('Attention', 'v, dropout_p=p, is_causal=True)',
     'v, torch.ones(q.size(2), q.size(2)).tril().triu(-2).bool(), p)'),
    ('Attention', 'is_causal=True)', 'is_causal=True, scale=0.5)'),
    ('SquaredReLU', 'return F.relu(x).square()', 'return F.silu(x)'),
    ('LossHead', 'ignore_index=-1)', 'ignore_index=-1, label_smoothing=0.5)'),
    ('LossHead', 'logits = lm_head(x)', 'logits = 3 * lm_head(x).tanh()'),
    (None, 'y = self.attention(q, k, v,', 'y = self.attention(q, 2 * k, v,'),
    (None, 'return x + self.mlp(self.ln_2(x))', 'return x + 2 * self.mlp(self.ln_2(x))'),
    (None, 'x = self.transformer.ln_f(x)', 'x = 2 * self.transformer.ln_f(x)'),
]


def load_edited(path, monkeypatch, *edits):
    """model.py with other lines, as a module."""
    with open(os.path.join(ROOT, 'model.py'), encoding='utf-8') as f:
        source = f.read()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source, encoding='utf-8')
    monkeypatch.setitem(sys.modules, 'edited_model', None)  # is taken away at the end
    return load_module(path)


@pytest.mark.parametrize('kind, old, new', EDITS)
def test_an_edited_file(kind, old, new, tmp_path, monkeypatch, capsys):
    edited = load_edited(tmp_path / 'edited_model.py', monkeypatch, (old, new))
    plain, model = make_all_kinds(kind), make_all_kinds(kind, edited)
    batch = make_batch(model)
    unchanged, changed = measure(plain, batch), measure(model, batch)
    assert (changed['loss'] - unchanged['loss']).abs() > 1e-4 * unchanged['loss']
    kernels.accelerate(model, 'cpu', 'float32')
    model.eval()
    assert_near(measure(model, batch), changed, 1e-5)
    check_line_and_kinds(model, kind, 'GPT' if 'ln_f' in old else kind, capsys)


def test_an_edited_forward_keeps_its_residual_stream(tmp_path, monkeypatch, capsys):
    line = 'x = self.transformer.drop(x)'
    edited = load_edited(tmp_path / 'edited_model.py', monkeypatch, (line, f'{line} * 1.0'))
    for module, expected in ((model_py, kernels.EmbeddingDropout), (edited, kernels.Dropout)):
        assert ''.join(capsys.readouterr()) == ''
        model = make_model(module)
        kernels.accelerate(model, 'cpu', 'bfloat16')
        assert type(model.transformer.drop) is expected
    line = ''.join(capsys.readouterr())
    assert line.startswith('changed parts of the model run as') and line.count('\n') == 1
    assert line.endswith(': GPT\n')


def replace_output_layer(model, monkeypatch):
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


def add_bias(model, monkeypatch):
    model.lm_head.bias = nn.Parameter(torch.randn(50304))


def subclass_output_layer(model, monkeypatch):
    class MyLinear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head.__class__ = MyLinear


def patch_linear_class(model, monkeypatch):
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, 'forward', lambda self, x: 2 * forward(self, x))


def patch_linear_function(model, monkeypatch):
    patch_function('linear', False, monkeypatch)


def patch_output_layer(model, monkeypatch):
    model.lm_head.forward = lambda x, forward=model.lm_head.forward: 2 * forward(x)


def hook_output_layer(model, monkeypatch):
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook_output_layer(model, monkeypatch):
    model.lm_head.register_forward_pre_hook(double_inputs)


def backward_hook_output_layer(model, monkeypatch):
    model.lm_head.register_full_backward_hook(double_grads)


@pytest.mark.parametrize('is_late', [False, True])
@pytest.mark.parametrize('change', [
    replace_output_layer, add_bias, subclass_output_layer, patch_linear_class,
    patch_linear_function, patch_output_layer, hook_output_layer, pre_hook_output_layer,
    backward_hook_output_layer])
def test_another_output_layer(change, is_late, monkeypatch):
    model = make_all_kinds('LossHead')
    fast, batch = copy.deepcopy(model), make_batch(model)
    unchanged = measure(model, batch)
    if is_late:
        kernels.accelerate(fast, 'cpu', 'float32')
    change(model, monkeypatch)
    changed = measure(model, batch)
    assert any((value - unchanged.get(key, 0)).norm() > 1e-3 * value.norm()
               for key, value in changed.items())
    if change not in (patch_linear_class, patch_linear_function):  # these change both models
        torch.manual_seed(0)
        change(fast, monkeypatch)
        for p, q in zip(model.parameters(), fast.parameters()):
            q.data.copy_(p.data)
    if not is_late:
        kernels.accelerate(fast, 'cpu', 'float32')
    fast.eval()
    assert_near(measure(fast, batch), changed, 1e-5)


@pytest.mark.parametrize('change', [subclass_output_layer, patch_output_layer, hook_output_layer,
                                    pre_hook_output_layer])
def test_a_changed_linear_layer_is_not_packed(change, monkeypatch):
    model = make_model().eval()
    idx, _ = make_batch(model)
    unchanged = model(idx)[0]
    change(model, monkeypatch)
    changed = model(idx)[0]
    lm_head = model.lm_head
    inference.pack_linears(model, 2)
    assert model.lm_head is lm_head
    assert type(model.transformer.h[0].mlp.c_fc) is linears.PackedLinear
    torch.testing.assert_close(model(idx)[0], changed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(changed, 2 * unchanged)


def test_a_model_without_dropout_on_its_embeddings(tmp_path, monkeypatch):
    edited = load_edited(tmp_path / 'edited_model.py', monkeypatch,
                         ("        modules['drop'] = nn.Dropout(config.dropout)\n", ''),
                         ('        x = self.transformer.drop(x)\n', ''))
    model = make_model(edited)
    batch = make_batch(model)
    expected = measure(model, batch)
    kernels.accelerate(model, 'cpu', 'bfloat16')
    assert type(model.transformer.h[0].mlp.dropout) is kernels.Dropout
    assert_near(measure(model, batch), expected, 1e-5)
