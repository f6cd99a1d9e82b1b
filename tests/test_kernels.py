"""The faster forms of the model's parts compute what the plain ones do."""
import copy
import functools
import inspect
import math

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

import model as model_py
from model import GPT, GPTConfig
from runtime import attention, cross_entropy, inference, kernels, memory, originals

OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2,
               bias=False)
CONFIGS = {'bias': {}, 'no bias': dict(bias=False), 'options': OPTIONS,
           'large vocabulary': dict(vocab_size=50304, block_size=64),
           'large vocabulary, options': dict(OPTIONS, vocab_size=50304, block_size=64)}
# bfloat16 has 8 bits of mantissa, sums are in another order, and so is the residual stream
TOLERANCES = {'float32': 1e-5, 'bfloat16': 0.03}


def make_model(module=model_py, scale=4, **options):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = module.GPT(module.GPTConfig(**{**shape, **options}))
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= scale
    return model


def make_batch(model, rows=2):
    torch.manual_seed(1)
    x, y = torch.randint(model.config.vocab_size, (2, rows, model.config.block_size))
    y[0, :5] = -1
    return x, y


def compute_loss(model, *batch):
    """(Logits or None, loss), as train.py computes them."""
    with kernels.loss_only(model):
        return model(*batch)


def measure(model, batch, dtype='float32'):
    """The loss and the gradients by the names of their parameters, as train.py computes them."""
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        logits, loss = compute_loss(model, *batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    is_whole = (type(model.loss_head) is not kernels.LossHead
                or not originals.is_unchanged(model, 'GPT')
                or not originals.is_unchanged(model.lm_head, 'Linear')
                or model.lm_head.bias is not None)
    assert (logits is not None) == is_whole and loss.dtype == torch.float32
    return {'loss': loss.detach(), **grads}


def assert_near(results, expected, tolerance):
    """Compares tensors by the norm of their difference."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert (results[name] - value).norm() <= tolerance * value.norm(), name


def list_kinds(model):
    """The types of the parts that have faster forms."""
    attn, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    parts = {'Attention': attn.attention, 'LossHead': model.loss_head, 'Dropout': mlp.dropout}
    if model.config.relu2:
        parts['SquaredReLU'] = mlp.gelu
    return {kind: type(part) for kind, part in parts.items()}


FAST = {'Attention': kernels.Attention, 'LossHead': kernels.LossHead, 'Dropout': kernels.Dropout,
        'SquaredReLU': kernels.SquaredReLU}


# -----------------------------------------------------------------------------
# each form
def test_digests_are_of_this_model():
    """A fast form stands for the source of model.py that has this digest."""
    digests = {}
    for name in originals.DIGESTS:
        kind, _, method = name.partition('.')
        function = inspect.unwrap(getattr(getattr(model_py, kind), method))  # without no_grad
        digests[name] = originals.compute_digest(function)
    changed = {name: digest for name, digest in digests.items()
               if digest != originals.DIGESTS[name]}
    assert not changed, (
        f'{", ".join(changed)} of model.py changed. Make what stands in for it in runtime/ '
        f'equal to the new source first. Then the new digests for originals.DIGESTS are {changed}')


def test_digests_see_code_but_not_comments(tmp_path):
    source = 'def add(x):\n    return x + 1\n'
    sources = [source, source.replace('1', '1  # one'), source.replace('x)', 'x, y)'),
               source.replace('1', '2'), source.replace(':', ':\n    """Adds."""'),
               '@staticmethod\n' + source]
    functions = []
    for i, text in enumerate(sources):
        (tmp_path / f'{i}.py').write_text(text)
        space = {'staticmethod': lambda f: f}
        exec(compile(text, str(tmp_path / f'{i}.py'), 'exec'), space)
        functions.append(space['add'])
    digests = [originals.compute_digest(function) for function in functions]
    assert all(len(digest) == 16 for digest in digests)
    assert digests[0] == digests[1] == digests[4]
    assert len(set(digests)) == 4

    @functools.wraps(functions[0])
    def wrapped(x):
        return 2 * functions[0](x)

    space = {}
    exec('def without_source(x):\n    return x', space)
    for function in (wrapped, space['without_source'], len, functools.partial(functions[0], 1)):
        assert originals.compute_digest(function) == ''
    assert originals.compute_digest(lambda x: x + 1) not in digests


def test_dropout_zeroes_and_scales():
    x = torch.ones(1000, 1001, requires_grad=True)  # not a multiple of 4
    for p in (0.2, 0.5):
        dropout = kernels.Dropout(p)
        torch.manual_seed(1)
        y = dropout(x)
        values, counts = y.unique(return_counts=True)
        torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)]))
        sigma = math.sqrt(p * (1 - p) / x.numel())
        assert abs(counts[0].item() / x.numel() - p) < 4.5 * sigma
        # neighbors, which share a draw, and rows are independent: both are zero at p * p
        for a, b in ((y[:, :-1], y[:, 1:]), (y[:-1], y[1:]), (y[:, :-4], y[:, 4:])):
            both = ((a == 0) & (b == 0)).float().mean().item()
            assert abs(both - p * p) < 4.5 * sigma
        grad, = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, y)
        torch.manual_seed(1)
        is_kept = kernels.draw_numbers(x) >= round(p * 2 ** 16) - 2 ** 15
        assert torch.equal(x * is_kept * (1 / (1 - p)), y)
        torch.manual_seed(1)  # the same elements in every format
        assert torch.equal(dropout(x.bfloat16()) == 0, y == 0)
    assert torch.equal(kernels.Dropout(0.0)(x), x)
    assert (kernels.Dropout(1e-6)(x) == 0).float().mean() < 1e-4
    layer = kernels.Dropout(0.5)
    assert (layer(x) == 0).any() and torch.equal(layer.eval()(x), x)


def test_dropout_has_a_second_derivative():
    dropout = kernels.Dropout(0.5)
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    loss = dropout(x).square().sum()
    grad, = torch.autograd.grad(loss, x, create_graph=True)
    second, = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, torch.where(grad == 0, 0.0, 8.0))
    grad = torch.func.grad(lambda x: dropout(x).sum())(x.detach())
    assert set(grad.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize('T', [1, 7, 64, 200, 600])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_attention_is_the_formula_and_the_plain_one(dtype, tolerance, T):
    q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
    plain = model_py.Attention()
    fast = kernels.Attention(plain)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    grad = torch.randn(2, 3, T, 8)
    for p in (0.0, 0.3):
        att = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(future, -math.inf).softmax(-1)
        torch.manual_seed(2)
        mask = torch.zeros_like(att)
        for start, stop in attention.list_parts(T, dtype):
            part = mask[:, :, start:stop, :stop]
            part.copy_(attention.draw_numbers(part) >= round(p * 2 ** 16) - 2 ** 15)
        expected = (att * mask / (1 - p)) @ v
        torch.manual_seed(2)
        y = fast(q.to(dtype), k.to(dtype), v.to(dtype), nn.Dropout(p), flash=True)
        assert y.dtype == dtype
        results = y, *torch.autograd.grad(y, (q, k, v), grad.to(dtype))
        references = [(expected, *torch.autograd.grad(expected, (q, k, v), grad))]
        if not p:  # with dropout the plain one draws other numbers
            y = plain(q.to(dtype), k.to(dtype), v.to(dtype), nn.Dropout(p), flash=True)
            references.append((y, *torch.autograd.grad(y, (q, k, v), grad.to(dtype))))
        for reference in references:
            for result, value in zip(results, reference):
                difference = (result.float() - value.float()).abs().max()
                assert difference <= tolerance * value.abs().max() + 1e-6


def make_qkv(T=128, dtype=torch.float32):
    return [torch.randn(2, 3, T, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def test_where_attention_is_the_plain_one(monkeypatch):
    fast = kernels.Attention(model_py.Attention())
    q, k, v = make_qkv()
    monkeypatch.setattr(attention.AttentionFunction, 'apply', None)
    with pytest.raises(TypeError):
        fast(q, k, v, nn.Dropout(0.0), flash=True)
    y = fast(q, k, v, nn.Dropout(0.2).eval(), flash=True)  # so it can be exported
    for others in ((q.detach(), k, v), (q, k[:, :, :64], v[:, :, :64])):
        assert fast(*others, nn.Dropout(0.0), flash=True).size() == y.size()
    with torch.autocast('cpu', torch.bfloat16):  # an edit may make only q float32
        for dtype in (torch.float32, torch.bfloat16):
            y = fast(q, k.to(dtype), v.to(dtype), nn.Dropout(0.2), flash=True)
            assert y.sum().backward() is None


def test_the_output_of_attention_may_be_changed_in_place():
    y = kernels.Attention(model_py.Attention())(*make_qkv(), nn.Dropout(0.1), flash=True)
    y *= 2
    y.transpose(1, 2).flatten(2).mul_(2).sum().backward()


def test_attention_has_no_second_derivative():
    q, k, v = make_qkv()
    y = kernels.Attention(model_py.Attention())(q, k, v, nn.Dropout(0.0), flash=True)
    with pytest.raises(RuntimeError, match='accelerate'):
        torch.autograd.grad(y.sum(), q, create_graph=True)


@pytest.mark.parametrize('T', [20, 64, 200, 600])
@pytest.mark.parametrize('p', [0.0, 0.2])
def test_the_memory_estimate_has_the_weights_of_attention(T, p):
    """The weights, and with dropout their random numbers, are what it stores besides q, k and v."""
    num_bytes = []
    q, k, v = make_qkv(T, torch.bfloat16)

    def count(x):
        num_bytes.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        kernels.Attention(model_py.Attention())(q, k, v, nn.Dropout(p), flash=True)
    config = GPTConfig(block_size=T, vocab_size=50, n_layer=1, n_head=3, n_embd=24, dropout=p)
    estimates = [memory.estimate_training_bytes(config, 0, 0, 2, 'bfloat16', device)[1]
                 for device in ('cpu', 'cuda')]
    of_dropout = 8 * config.n_embd * 2 * T if p else 0
    weights_bytes = sum(num_bytes) - sum(z.nbytes for z in (q, k, v))
    assert estimates[0] - estimates[1] - of_dropout == pytest.approx(weights_bytes, rel=0.02)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_squared_relu_is_the_plain_one(dtype):
    plain = model_py.SquaredReLU()
    fast = kernels.SquaredReLU(plain)
    x = torch.randn(100, 30, dtype=dtype, requires_grad=True)
    grad = torch.randn(100, 30, dtype=dtype)
    for part in (plain, fast):
        part.y = part(x)
        part.grad, = torch.autograd.grad(part.y, x, grad)
    assert torch.equal(fast.y, plain.y) and torch.equal(fast.grad, plain.grad)
    assert (fast.y > 0).any() and (fast.y == 0).any()
    assert torch.autograd.gradcheck(fast, torch.randn(50, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('max_bytes', [2 ** 25, 2 ** 28])  # several parts of the logits, or one
@pytest.mark.parametrize('divisor', [1, 3])
def test_the_loss_alone_is_the_same_loss(dtype, max_bytes, divisor, monkeypatch):
    monkeypatch.setattr(cross_entropy, 'MAX_BYTES', max_bytes)
    model = GPT(GPTConfig(block_size=128, vocab_size=50304, n_layer=1, n_head=2, n_embd=32))
    kernels.accelerate(model, 'cpu', dtype)
    x, y = torch.randint(50304, (2, 8, 128))
    y[0, :9] = -1
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16')
    results = []
    for compute in (GPT.__call__, compute_loss):
        with autocast:
            logits, loss = compute(model, x, y)
        (loss / divisor).backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
        model.zero_grad()
    assert logits is None and loss.dtype == torch.float32
    with pytest.raises((IndexError, RuntimeError)):  # only -1 is ignored
        compute_loss(model, x, y - 100)
    for whole, pieces in zip(*results):
        assert (whole - pieces).norm() <= TOLERANCES[dtype] * whole.norm()
    with torch.no_grad(), autocast:
        # attention takes another path where there are no gradients
        tolerance = 1e-6 if dtype == 'float32' else 1e-4
        assert abs(compute_loss(model, x, y)[1] - loss) < tolerance * loss


def test_the_loss_alone_has_the_same_gradients_twice():
    model = make_model(**CONFIGS['large vocabulary'])
    kernels.accelerate(model, 'cpu', 'float32')
    loss = compute_loss(model, *make_batch(model))[1]
    params = list(model.parameters())
    first = torch.autograd.grad(loss, params, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for p, grad in zip(params, first):
        torch.testing.assert_close(p.grad, 2 * grad)


# -----------------------------------------------------------------------------
# all of the model
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('config', CONFIGS)
def test_an_accelerated_model_has_the_loss_and_gradients_of_the_plain_one(config, dtype, capsys):
    # away from the initial predictions bfloat16 itself is farther from float32 than the tolerance
    scale = 4 if dtype == 'float32' else 1
    plain = make_model(scale=scale, **CONFIGS[config])
    fast = copy.deepcopy(plain)
    kernels.accelerate(fast, 'cpu', dtype)
    assert ''.join(capsys.readouterr()) == ''  # nothing was changed
    kinds = list_kinds(fast)
    assert kinds == {kind: FAST[kind] for kind in kinds}
    is_wide = type(fast.transformer.drop) is kernels.EmbeddingDropout
    assert is_wide == (dtype == 'bfloat16')
    batch = make_batch(plain)
    expected = measure(plain, batch, dtype)
    assert_near(measure(fast, batch, dtype), expected, TOLERANCES[dtype])
    logits, loss = fast(*batch)
    torch.testing.assert_close(logits, plain(*batch)[0])
    torch.testing.assert_close(fast(batch[0])[0], plain(batch[0])[0])


def test_with_dropout_the_mean_loss_is_that_of_the_plain_model():
    plain = make_model(dropout=0.3, relu2=True)
    fast = copy.deepcopy(plain)
    kernels.accelerate(fast, 'cpu', 'float32')
    batch, losses = make_batch(plain), {}
    for model in (plain, fast):
        with torch.no_grad():
            losses[model] = torch.stack([model(*batch)[1] for _ in range(200)])
    variances = [loss.var() / 200 for loss in losses.values()]
    difference = losses[plain].mean() - losses[fast].mean()
    assert abs(difference) < 4.5 * sum(variances).sqrt() and losses[fast].unique().numel() > 150
    for model in (plain, fast):
        model.eval()
    torch.testing.assert_close(fast(*batch)[1], plain(*batch)[1])


@pytest.mark.parametrize('accelerated', [False, True])
def test_compiled_it_gives_no_logits_and_compiles_once(accelerated):
    model, graphs = make_model(), []
    if accelerated:
        kernels.accelerate(model, 'cpu', 'float32')

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    x, y = torch.randint(50, (2, 2, 16))
    for _ in range(3):
        with kernels.loss_only(model):
            logits, loss = compiled(x, y)
        loss.backward()
    assert (logits is None) == accelerated and len(graphs) == 1
    torch.testing.assert_close(loss, model(x, y)[1])


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_compiled_with_dropout_the_loss_stays_in_pieces(dropout, monkeypatch):
    model = make_model(**CONFIGS['large vocabulary'], dropout=dropout)
    kernels.accelerate(model, 'cpu', 'float32')
    batch, pieces = make_batch(model), []
    torch.manual_seed(0)
    _, expected = compute_loss(model, *batch)

    class Observed(cross_entropy.LinearCrossEntropy):
        @classmethod
        def apply(cls, *args):
            pieces.append(1)
            return cross_entropy.LinearCrossEntropy.__base__.apply.__func__(cls, *args)

    monkeypatch.setattr(cross_entropy, 'LinearCrossEntropy', Observed)
    # without inductor, which would take half a minute
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    compiled = kernels.compile_model(model)
    torch.manual_seed(0)
    with kernels.loss_only(model):
        _, loss = compiled(*batch)
    torch.testing.assert_close(loss, expected)
    assert len(pieces) == (dropout > 0)
    _, expected = model.eval()(*batch)
    with kernels.loss_only(model):
        _, loss = compiled.eval()(*batch)
    torch.testing.assert_close(loss, expected)
    assert len(pieces) == (dropout > 0)


@pytest.mark.parametrize('T', [8, 64, 200])
def test_attention_without_a_backward_pass(T, monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, T, 16).bfloat16()
    y = attention.attend(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert (y - expected).abs().max() < 0.03  # one rounding of each weight and each sum
    dropout = nn.Dropout(0.0).eval()
    fast_form = attention.Attention(model_py.Attention())
    assert torch.equal(fast_form(q, k, v, dropout, True), y)
    monkeypatch.setattr(attention.AttentionFunction, 'apply', None)
    assert fast_form(q.requires_grad_(), k, v, dropout, True).requires_grad  # by torch's attention


@pytest.mark.parametrize('dtype, rtol', [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('bias', [True, False])
def test_packed_weights_give_the_same_logits(dtype, rtol, bias):
    model = make_model(bias=bias).eval()
    nn.init.normal_(model.lm_head.weight)
    if bias:
        nn.init.normal_(model.transformer.h[0].mlp.c_fc.bias)
    model.to(dtype)
    for rows in (1, 3):
        idx, packed = torch.randint(50, (rows, 16)), copy.deepcopy(model)
        inference.pack_linears(packed, 3)
        assert not any(isinstance(m, nn.Linear) for m in packed.modules())
        for T in (16, 1):
            logits = model(idx[:, :T])[0]
            assert (packed(idx[:, :T])[0] - logits).abs().max() <= rtol * logits.abs().max()


# -----------------------------------------------------------------------------
# the model afterwards
def test_accelerating_twice_is_accelerating_once(capsys):
    model = make_model(relu2=True, dropout=0.1)
    kernels.accelerate(model, 'cpu', 'bfloat16')
    parts = dict(model.named_modules())
    kernels.accelerate(model, 'cpu', 'bfloat16')
    assert dict(model.named_modules()) == parts
    assert type(model.transformer.drop) is kernels.EmbeddingDropout
    assert ''.join(capsys.readouterr()) == ''


@pytest.mark.parametrize('training', [True, False])
def test_parts_stay_in_training_or_evaluation_mode(training):
    model = make_model(relu2=True, dropout=0.5).train(training)
    kernels.accelerate(model, 'cpu', 'bfloat16')
    assert {module.training for module in model.modules()} == {training}
    x, y = make_batch(model)
    assert torch.equal(model(x, y)[1], model(x, y)[1]) != training


def test_dropouts_stay_the_same_objects(capsys):
    """Somebody may have them in a list, or under two names, and change their rates in training."""
    model = make_model(dropout=0.1)
    for block in model.transformer.h:
        block.mlp.dropout = block.attn.resid_dropout
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    kernels.accelerate(model, 'cpu', 'bfloat16')
    assert dropouts == [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for dropout in dropouts:
        dropout.p = 1.0
    x, y = make_batch(model)
    model.transformer.drop.p = 0.0
    kept = [block.register_forward_hook(lambda block, args, y: list.append(outputs, (args[0], y)))
            for block in model.transformer.h]
    outputs = []
    model(x, y)
    assert len(kept) == 2 and all(torch.equal(a, b) for a, b in outputs)  # nothing is added
    assert ''.join(capsys.readouterr()) == ''


def test_on_a_gpu_only_the_loss_is_replaced():
    model = make_model(relu2=True)
    kernels.accelerate(model, 'cuda', 'bfloat16')
    expected = {'Attention': model_py.Attention, 'SquaredReLU': model_py.SquaredReLU,
                'Dropout': nn.Dropout, 'LossHead': kernels.LossHead}
    assert list_kinds(model) == expected and type(model.transformer.drop) is nn.Dropout


@pytest.mark.parametrize('p, bits, stays', [
    (0.2, None, True), (0.1, 8, True), (0.25, 4, True), (0.2, 4, False), (0.1, 4, False)])
def test_attention_that_rounds_the_dropout_rate_is_turned_off(monkeypatch, capsys, p, bits, stays):
    attend, calls = F.scaled_dot_product_attention, []

    def attend_roughly(q, k, v, dropout_p, **options):  # draws so many bits for each number
        calls.append(q.shape)
        rate = round(dropout_p * 2 ** bits) / 2 ** bits if bits else dropout_p
        return attend(q, k, v, dropout_p=rate, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attend_roughly)
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, 'enable_cudnn_sdp', chosen.append)
    model = make_model(dropout=p)
    kernels.keep_dropout_rate(model, 'cpu', 'bfloat16')
    assert chosen == ([] if stays else [False])
    note = capsys.readouterr().err
    assert bool(note) != stays and (stays or f'instead of {100 * p:.2f}%' in note)
    config = model.config
    shape = config.n_head, config.block_size, config.n_embd // config.n_head
    assert [tuple(q[1:]) for q in calls] == [shape]  # once for a rate, in the model's own shape
    calls.clear()
    kernels.keep_dropout_rate(model.eval(), 'cpu', 'bfloat16')
    kernels.keep_dropout_rate(make_model(), 'cpu', 'bfloat16')
    assert not calls  # nothing is dropped


def test_where_the_logits_are_needed_the_loss_is_the_plain_one(monkeypatch):
    model = make_model(**CONFIGS['large vocabulary'])
    batch = make_batch(model)
    expected_logits, expected_loss = model(*batch)
    kernels.accelerate(model, 'cpu', 'float32')
    monkeypatch.setattr(cross_entropy, 'LinearCrossEntropy', None)
    logits, loss = model(*batch)
    assert torch.equal(logits, expected_logits) and torch.equal(loss, expected_loss)
    with torch.autocast('cpu', torch.float16):  # its gradients would vanish
        assert compute_loss(model, *batch)[1].isfinite()
    with pytest.raises(AttributeError):
        compute_loss(model, *batch)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('dtype', TOLERANCES)
def test_copies_and_pickles_have_the_same_loss(dtype, recompute, tmp_path):
    model = make_model(**OPTIONS, dropout=0.1)
    kernels.accelerate(model, 'cpu', dtype)
    if recompute:
        kernels.recompute_blocks(model)
    batch = make_batch(model)
    torch.save(model, tmp_path / 'model.pt')
    copies = copy.deepcopy(model), torch.load(tmp_path / 'model.pt', weights_only=False)
    torch.manual_seed(0)
    expected = measure(model, batch, dtype)
    for other in copies:
        torch.manual_seed(0)
        assert_near(measure(other, batch, dtype), expected, 0)
        with torch.no_grad():  # it has weights of its own
            other.transformer.h[0].mlp.c_fc.weight.zero_()
        torch.manual_seed(0)
        assert measure(other, batch, dtype)['loss'] != expected['loss']
    torch.manual_seed(0)
    assert_near(measure(model, batch, dtype), expected, 0)


@pytest.mark.parametrize('options', [{}, OPTIONS])
def test_keys_of_the_state_dict_stay_the_same(options):
    model = make_model(**options)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    kernels.accelerate(model, 'cpu', 'bfloat16')
    kernels.recompute_blocks(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    make_model(**options).load_state_dict(model.state_dict())
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in keys)


@pytest.mark.parametrize('accelerated', [False, True])
@pytest.mark.parametrize('dtype', TOLERANCES)
def test_recomputed_blocks_have_the_same_gradients_to_the_bit(dtype, accelerated):
    model = make_model(**OPTIONS, dropout=0.2)
    if accelerated:
        kernels.accelerate(model, 'cpu', dtype)
    batch, forwards = make_batch(model), []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *args: forwards.append(1))
    results = []
    for recompute in (False, True):
        if recompute:
            kernels.recompute_blocks(model)
        torch.manual_seed(0)
        results.append(measure(model, batch, dtype))
    assert len(forwards) == 3  # one, and one that is computed again
    assert_near(*results, 0)
