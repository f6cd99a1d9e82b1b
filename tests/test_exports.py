"""The model in torch's own tools: exporting, compiling, copying, torch.func, sharding, pruning."""
import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from edits import continue_greedily
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from model import GPT, GPTConfig
from runtime import inference, kernels, originals

SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, dropout=0.0, bias=True)
IDX = torch.arange(3 * 17).view(3, 17) * 7 % 50
X, Y = IDX[:, :-1], IDX[:, 1:]
KINDS = ['plain', 'fast']  # with the parts of model.py, or with the faster ones of kernels.py


def make_model(kind='plain', seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **options}))
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= 3
    if kind == 'fast':
        kernels.accelerate(model, 'cpu', 'float32')
    return model


def update(model):
    """One update; returns the loss before it."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    with kernels.loss_only(model):
        _, loss = model(X, Y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


class LastLogits(nn.Module):
    """The logits of the last position, without the None in the place of a loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx):
        return self.model(idx)[0]


def list_shapes():
    """Token ids of several shapes, the first of which a model is exported with."""
    return [X[:2, :8], X, X[:1, :3], X[:3, :9]]


# -----------------------------------------------------------------------------
# exporting and compiling
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('flash', [True, False])
def test_jit_trace(kind, flash):
    model = make_model(kind).eval()
    for block in model.transformer.h:
        block.attn.flash = flash
    shapes = list_shapes()
    traced = torch.jit.trace(LastLogits(model), (shapes[0],))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for idx in shapes:
        torch.testing.assert_close(loaded(idx), model(idx)[0])
    traced = torch.jit.trace(model, (shapes[0], Y[:2, :8]))
    torch.testing.assert_close(traced(X, Y), model(X, Y))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('flash', [True, False])
def test_export(kind, flash):
    model = make_model(kind).eval()
    for block in model.transformer.h:
        block.attn.flash = flash
    idx, targets = list_shapes()[0], Y[:2, :8]
    static = torch.export.export(model, (idx, targets)).module()
    torch.testing.assert_close(static(idx, targets), model(idx, targets))
    batch, time = torch.export.Dim('batch', max=64), torch.export.Dim('time', max=16)
    axes = {0: batch, 1: time}
    exported = torch.export.export(LastLogits(model), (idx,), dynamic_shapes=(axes,)).module()
    for other in list_shapes():
        torch.testing.assert_close(exported(other), model(other)[0])
    exported = torch.export.export(model, (idx, targets), dynamic_shapes=(axes, axes)).module()
    torch.testing.assert_close(exported(X, Y), model(X, Y))


def run_onnx(path, idx):
    """The only output of an ONNX file."""
    try:
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        outputs = session.run(None, {'idx': idx.numpy()})
    except ImportError:
        from onnx.reference import ReferenceEvaluator
        outputs = ReferenceEvaluator(path).run(None, {'idx': idx.numpy()})
    return torch.from_numpy(outputs[0])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('is_dynamic', [False, True])
@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx(dynamo, is_dynamic, kind, tmp_path):
    pytest.importorskip('onnx', reason='exporting to ONNX needs the package onnx')
    if dynamo:
        pytest.importorskip('onnxscript', reason='this exporter needs the package onnxscript')
    model, path = make_model(kind).eval(), str(tmp_path / 'model.onnx')
    axes, shapes = {0: 'batch', 1: 'time'}, list_shapes()
    options = {}
    if is_dynamic:
        options = dict(dynamic_shapes=(axes,)) if dynamo else dict(dynamic_axes=dict(idx=axes))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(LastLogits(model), (shapes[0],), path, input_names=['idx'],
                          output_names=['logits'], dynamo=dynamo, **options)
    for idx in shapes if is_dynamic else shapes[:1]:
        torch.testing.assert_close(run_onnx(path, idx), model(idx)[0], rtol=1e-3, atol=1e-4)


@pytest.fixture
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('kind', KINDS)
def test_compile_as_one_graph(kind, backend, clean_dynamo):
    model, expected = make_model(kind, n_layer=1), make_model(n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits, loss = compiled(X, Y)
    expected_logits, expected_loss = expected(X, Y)
    torch.testing.assert_close((logits, loss), (expected_logits, expected_loss))
    loss.backward()
    expected_loss.backward()
    for p, expected_p in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, expected_p.grad, rtol=1e-4, atol=1e-6)
    for idx in list_shapes()[:3]:
        torch.testing.assert_close(compiled(idx)[0], expected(idx)[0])


def test_compile_with_dropout_as_one_graph(clean_dynamo):
    model = make_model(dropout=0.5)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.manual_seed(1)
    losses = [compiled(X, Y)[1].item() for _ in range(2)]
    torch.manual_seed(1)
    assert losses == pytest.approx([model(X, Y)[1].item() for _ in range(2)], rel=1e-5)
    assert losses[0] != losses[1]


@pytest.mark.parametrize('kind', KINDS)
def test_a_step_with_dropout_without_numbers(kind):
    """FakeTensorMode is what people plan memory with."""
    model = make_model(kind, dropout=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, loss = model(X, Y)
        loss.backward()
    assert isinstance(loss, FakeTensor) and loss.size() == ()


# -----------------------------------------------------------------------------
# copies
def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('make_copy', [copy.deepcopy, save_and_load,
                                       lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(make_copy, kind):
    model = make_model(kind)
    other = make_copy(model)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert originals.is_fast(other.loss_head) == (kind == 'fast')
    expected = model(X, Y)[0].detach()
    assert torch.equal(other(X, Y)[0], expected)
    update(other)
    assert not torch.equal(other(X, Y)[0], expected)
    assert torch.equal(model(X, Y)[0], expected)
    other.eval()
    tokens = continue_greedily(other, X[:, :5], 20)
    assert torch.equal(other.generate(X[:, :5], 20, temperature=0), tokens)
    assert torch.equal(make_copy(other).generate(X[:, :5], 20, temperature=0), tokens)


@pytest.mark.parametrize('kind', KINDS)
def test_state_dict(kind):
    model, other = make_model(kind), make_model(seed=1)
    assert list(model.state_dict()) == list(other.state_dict())
    keys = other.load_state_dict(model.state_dict())
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(other(X, Y)[0], model(X, Y)[0])
    with torch.device('meta'):
        empty = make_model()
    assert empty.lm_head.weight.is_meta
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(X, Y)[0], model(X, Y)[0])
    with torch.device('meta'):
        empty = make_model(kind)
    empty.to_empty(device='cpu').load_state_dict(model.state_dict())
    assert torch.equal(empty(X, Y)[0], model(X, Y)[0])


# -----------------------------------------------------------------------------
# torch.func
@pytest.mark.parametrize('kind', KINDS)
def test_functional_call(kind):
    model, other = make_model(kind), make_model(seed=1)
    logits, loss = functional_call(model, dict(other.named_parameters()), (X, Y))
    torch.testing.assert_close((logits, loss), other(X, Y))
    assert not torch.equal(logits, model(X, Y)[0])


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('kind', KINDS)
def test_vmap_over_an_ensemble(kind):
    models = [make_model(kind, seed) for seed in range(3)]
    params, buffers = stack_module_state(models)
    template = copy.deepcopy(models[0])

    def compute(params, buffers):
        return functional_call(template, (params, buffers), (X, Y))

    logits, losses = vmap(compute)(params, buffers)
    expected = [model(X, Y) for model in models]
    torch.testing.assert_close(logits, torch.stack([pair[0] for pair in expected]), rtol=1e-4,
                               atol=1e-5)
    torch.testing.assert_close(losses, torch.stack([pair[1] for pair in expected]))


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize('kind, relu2', list(itertools.product(KINDS, [False, True])))
def test_gradients_per_sample(kind, relu2):
    model = make_model(kind, relu2=relu2)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def compute_loss(params, x, y):
        return functional_call(model, params, (x[None], y[None]))[1]

    grads = vmap(grad(compute_loss), in_dims=(None, 0, 0))(params, X, Y)
    for i in range(len(X)):
        _, loss = model(X[i:i + 1], Y[i:i + 1])
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for name, value in zip(params, expected):
            torch.testing.assert_close(grads[name][i], value, rtol=1e-3, atol=1e-5)


# -----------------------------------------------------------------------------
# several processes
@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('kind', KINDS)
def test_ddp(kind, one_process):
    model, expected = make_model(kind), make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for single in (wrapped, expected):
        single(X, Y)[1].backward()
    for p, expected_p in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p.grad, expected_p.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    with wrapped.no_sync():
        wrapped(X, Y)[1].backward()
    assert wrapped.module is model and list(wrapped.state_dict())[0].startswith('module.')
    assert update(model) == pytest.approx(update(expected), rel=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_fsdp(kind, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model, expected = make_model(kind), make_model()
    mesh = init_device_mesh('cpu', (1,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        assert update(model) == pytest.approx(update(expected), rel=1e-5)
    tokens = continue_greedily(expected.eval(), X[:, :5], 20)
    assert torch.equal(model.eval().generate(X[:, :5], 20, temperature=0), tokens)


# -----------------------------------------------------------------------------
# other weights than those that the optimizer sees
class Scale(nn.Module):
    def forward(self, weight):
        return weight * torch.linspace(0.2, 2, weight.size(1))


def scale_weight(linear):
    parametrize.register_parametrization(linear, 'weight', Scale())


def prune_weight(linear):
    prune.l1_unstructured(linear, 'weight', amount=0.6)


def prune_rows(linear):
    prune.ln_structured(linear, 'weight', amount=0.5, n=2, dim=0)


def make_permanent(linear):
    prune_weight(linear)
    prune.remove(linear, 'weight')


CHANGES = [scale_weight, prune_weight, prune_rows, make_permanent, parametrizations.weight_norm,
           parametrizations.spectral_norm, parametrizations.orthogonal]


@torch.no_grad()
def make_dense(model):
    """A plain model with the weights that the modules of this one multiply by."""
    model(X[:, :1])  # pruning computes a weight when its layer is called
    dense = GPT(GPTConfig(**{**vars(model.config), 'tied': False})).eval()
    for path, module in dense.named_modules():
        for name, p in module.named_parameters(recurse=False):
            p.copy_(getattr(model.get_submodule(path), name))
    return dense


def check_like_dense(model):
    """The model's loss and tokens are those of its dense copy, also with packed layers."""
    model.eval()
    dense = make_dense(model)
    torch.testing.assert_close(model(X, Y), dense(X, Y), rtol=1e-4, atol=1e-5)
    with kernels.loss_only(model):
        torch.testing.assert_close(model(X, Y)[1], dense(X, Y)[1])
    tokens = continue_greedily(dense, X[:, :5], 20)
    assert torch.equal(model.generate(X[:, :5], 20, temperature=0), tokens)
    packed = copy.deepcopy(model)
    inference.pack_linears(packed, rows=3)
    assert torch.equal(packed.generate(X[:, :5], 20, temperature=0), tokens)
    model.train()
    return tokens


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize('order', ['plain', 'before', 'after'])
def test_other_weights_are_used_everywhere(change, order):
    model = make_model()
    before = continue_greedily(model.eval(), X[:, :5], 20)
    model.train()
    if order == 'after':
        kernels.accelerate(model, 'cpu', 'float32')
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj):
            change(linear)
    if order == 'before':
        kernels.accelerate(model, 'cpu', 'float32')
    first_tokens = check_like_dense(model)
    if change is not parametrizations.weight_norm:  # it leaves the product as it is at first
        assert not torch.equal(first_tokens, before)
    update(model)
    check_like_dense(model)
    if 'prune' in change.__name__:
        shares = [(block.mlp.c_fc.weight == 0).float().mean() for block in model.transformer.h]
        assert min(shares) > 0.49


@pytest.mark.parametrize('change', [scale_weight, prune_weight])
def test_other_weights_of_the_output_layer(change):
    options = dict(vocab_size=5000, block_size=1024, n_layer=1, tied=False)
    model, idx = make_model('fast', **options), torch.arange(1025)[None] * 7 % 5000
    with kernels.loss_only(model):
        logits, first_loss = model(idx[:, :-1], idx[:, 1:])
    assert logits is None  # the size at which output layer and loss are joined
    change(model.lm_head)
    update(model)
    with kernels.loss_only(model):
        _, loss = model(idx[:, :-1], idx[:, 1:])
    dense = make_dense(model)
    torch.testing.assert_close(loss, dense(idx[:, :-1], idx[:, 1:])[1])
    assert abs(loss - first_loss) > 0.01


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:torch.quantize_per_tensor')
@pytest.mark.parametrize('kind', KINDS)
def test_dynamic_quantization(kind):
    quantization = pytest.importorskip('torch.ao.quantization')
    model = make_model(kind).eval()
    quantized = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.lm_head) is not nn.Linear
    logits, expected = quantized(X, Y)[0], model(X, Y)[0]
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()
    tokens = continue_greedily(quantized, X[:, :5], 20)
    assert torch.equal(quantized.generate(X[:, :5], 20, temperature=0), tokens)
    # what sample.py does with a model
    kernels.accelerate(quantized, 'cpu', 'float32')
    assert inference.choose_rows(quantized, 5, 20, 3, 2 ** 30) == 3
    inference.pack_linears(quantized, rows=3)
    assert torch.equal(quantized.generate(X[:, :5], 20, temperature=0), tokens)


# -----------------------------------------------------------------------------
# hooks and counters
def count_calls(model, names):
    """Registers each kind of hook on these modules; returns the list to which they add names."""
    calls = []
    for name in names:
        module = model.get_submodule(name)
        for kind in ('forward_pre', 'forward', 'full_backward_pre', 'full_backward'):
            register = getattr(module, f'register_{kind}_hook')
            register(lambda *args, call=(kind, name): calls.append(call))
    return calls


NAMES = ['', 'transformer', 'lm_head', 'transformer.wte', 'transformer.wpe', 'transformer.drop',
         'transformer.h.0', 'transformer.h.1.ln_1', 'transformer.h.0.attn', 'transformer.h.1.mlp',
         'transformer.h.0.attn.c_attn', 'transformer.h.0.attn.resid_dropout',
         'transformer.h.0.mlp.gelu', 'transformer.h.1.mlp.dropout', 'transformer.ln_f']


@pytest.mark.filterwarnings('ignore:Full backward hook is firing')
@pytest.mark.parametrize('order', ['plain', 'before', 'after'])
def test_hooks(order):
    options = dict(vocab_size=5000, block_size=1024, n_layer=2, dropout=0.1)
    model, idx = make_model(**options), torch.arange(1025)[None] * 7 % 5000
    if order == 'after':
        kernels.accelerate(model, 'cpu', 'float32')
    # a hook on the model itself makes it store logits in any case
    names = NAMES if order == 'plain' else NAMES[1:]
    calls = count_calls(model, names)
    if order == 'before':
        kernels.accelerate(model, 'cpu', 'float32')
    with kernels.loss_only(model):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    called = set(calls)
    assert len(calls) == len(called)
    for name in names:
        kinds = [kind for kind, other in called if other == name]
        # nobody calls the ModuleDict
        assert len(kinds) == (0 if name == 'transformer' else 4), (name, kinds)


@pytest.mark.parametrize('kind', KINDS)
def test_hooks_of_all_modules(kind):
    options = dict(vocab_size=5000, block_size=1024, n_layer=1)
    model, idx = make_model(kind, **options), torch.arange(1025)[None] * 7 % 5000
    calls = []
    handles = [nn.modules.module.register_module_forward_hook(
                   lambda module, args, output: calls.append(module)),
               nn.modules.module.register_module_forward_pre_hook(
                   lambda module, args: calls.append(module))]
    with kernels.loss_only(model):
        model(idx[:, :-1], idx[:, 1:])
    for handle in handles:
        handle.remove()
    for module in (model, model.lm_head, model.transformer.wte, *model.transformer.h):
        assert calls.count(module) == 2, type(module)


@pytest.mark.parametrize('kind', KINDS)
def test_a_hook_changes_what_is_computed(kind):
    model = make_model(kind).eval()
    before = continue_greedily(model, X[:, :5], 20)
    linear = model.transformer.h[0].mlp.c_proj
    linear.register_forward_hook(lambda module, args, output: 3 * output)
    expected = make_model().eval()
    with torch.no_grad():
        for p in expected.transformer.h[0].mlp.c_proj.parameters():
            p *= 3
    torch.testing.assert_close(model(X, Y), expected(X, Y))
    tokens = continue_greedily(expected, X[:, :5], 20)
    assert not torch.equal(tokens, before)
    assert torch.equal(model.generate(X[:, :5], 20, temperature=0), tokens)
    inference.pack_linears(model, rows=3)
    assert torch.equal(model.generate(X[:, :5], 20, temperature=0), tokens)


@pytest.mark.parametrize('kind', KINDS)
def test_flop_counter(kind):
    from torch.utils.flop_counter import FlopCounterMode
    options = dict(vocab_size=5000, block_size=1024, n_layer=1, bias=False)
    model, idx = make_model(kind, **options), torch.arange(1025)[None] * 7 % 5000
    counter = FlopCounterMode(display=False)
    with counter, kernels.loss_only(model):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    matrices = 12 * 32 ** 2 + 5000 * 32
    counts = counter.get_flop_counts()['Global']
    # attention has a product of another kind
    assert counts[torch.ops.aten.mm] == 6 * 1024 * matrices
