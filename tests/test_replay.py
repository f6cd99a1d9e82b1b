"""A small model's training step, played from a recording, computes what the model computes."""
import copy
import gc
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, GPTConfig
from runtime import kernels, optimizers, replay
from runtime.replay_recorder import NotRecorded, Recorder

OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2,
               bias=False)
CONFIGS = {'bias': {}, 'no bias': dict(bias=False), 'tanh': dict(gelu='tanh'), 'options': OPTIONS,
           'several parts of attention': dict(block_size=256)}


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads, so that a batch has two parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def make_model(scale=4, **options):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**shape, **options}))
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= scale
    return model


def make_fast_model(dtype='float32', **options):
    model = make_model(**options)
    kernels.accelerate(model, 'cpu', dtype)
    return model


def make_batch(model, rows=4):
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (rows, model.config.block_size + 1))
    return ids[:, :-1], ids[:, 1:]  # views, as in train.py


def measure(model, batch, dtype='float32', factor=1.0):
    """The loss and the gradients by their names, and how the loss was computed."""
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        with kernels.loss_only(model):
            logits, loss = model(*batch)
    (loss * factor).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    was_played = 'ReplayFunction' in str(loss.grad_fn)
    return {'loss': loss.detach(), **grads}, was_played


def compare(results, expected, tolerance=1e-5):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        difference = (results[name] - value).norm() / value.norm().clamp(min=1e-9)
        assert difference <= tolerance, (name, difference)


def check(model, batch=None, is_played=True, plain_model=None, tolerance=1e-5):
    """Checks that the model computes what a plain one with the same weights does."""
    batch = batch or make_batch(model)
    plain_model = plain_model or make_model()
    expected, _ = measure(plain_model, batch)
    results, was_played = measure(model, batch)
    assert was_played == is_played
    compare(results, expected, tolerance)


# -----------------------------------------------------------------------------
@pytest.mark.parametrize('options', CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_played_step(options, dtype):
    model, fast_model = make_fast_model(dtype, **options), make_fast_model(dtype, **options)
    batch = make_batch(model)
    hook = fast_model.register_forward_hook(lambda *args: None)  # so it is not played
    expected, was_played = measure(fast_model, batch, dtype)
    hook.remove()
    assert not was_played
    for _ in range(3):
        results, was_played = measure(model, batch, dtype)
        assert was_played
        # bfloat16 has 8 bits of mantissa, and the sum over the batch has two parts
        compare(results, expected, 1e-5 if dtype == 'float32' else 0.03)
    if dtype == 'float32':
        compare(results, measure(make_model(**options), batch)[0])


def test_steps_are_bit_equal():
    """Also the first call, which TorchScript could compute in another way."""
    batch = make_batch(make_model())
    first, second = (measure(make_fast_model('bfloat16'), batch, 'bfloat16')[0] for _ in range(2))
    model = make_fast_model('bfloat16')
    for _ in range(4):
        third, was_played = measure(model, batch, 'bfloat16')
    assert was_played
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.equal(value, third[name])


@pytest.mark.parametrize('threads, rows, parts', [(1, 3, 1), (2, 1, 0), (2, 3, 0), (2, 4, 2),
                                                  (3, 6, 3), (4, 6, 3), (5, 4, 4), (8, 4, 0)])
def test_parts(threads, rows, parts):
    """Most of the threads must get a part of the rows."""
    torch.set_num_threads(threads)
    model = make_fast_model()
    check(model, make_batch(model, rows), is_played=parts > 0)
    assert [kind[3] for kind in model.loss_head.player.recordings] == [parts] * (parts > 0)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(2)


def test_new_threads_of_others():
    """They get all of torch's threads, as before."""
    replay.start_threads.cache_clear()
    check(make_fast_model())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_players_have_one_thread():
    """Also after an operation, when torch would give them all."""
    replay.start_threads.cache_clear()
    pool = replay.start_threads(2)
    x = torch.ones(64, 64)
    barrier = threading.Barrier(2)

    def work(_):
        barrier.wait()  # so each of the threads works
        x @ x
        return torch.get_num_threads()

    assert list(pool.map(work, range(2))) == [1, 1]


def test_other_batches():
    model = make_fast_model()
    idx, targets = make_batch(model)
    check(model)
    check(model, make_batch(model, 6))
    check(model, (idx.int(), targets))
    check(model, (idx[:, :7], targets[:, :7]), is_played=False)
    ignored = targets.clone()
    ignored[0, :5] = -1
    check(model, (idx, ignored), is_played=False)
    assert len(model.loss_head.player.recordings) == 3


def test_large_batches_are_not_played():
    model = make_fast_model()
    rows = replay.MAX_ELEMENTS // (16 * 32)
    assert measure(model, make_batch(model, rows))[1]
    assert not measure(model, make_batch(model, 2 * rows))[1]
    large_model = make_fast_model(vocab_size=replay.MAX_LOGITS // 64 + 1)
    assert not measure(large_model, make_batch(large_model))[1]


def test_evaluation():
    model = make_fast_model().eval()
    batch = make_batch(model)
    with torch.no_grad(), kernels.loss_only(model):
        _, loss = model(*batch)
    assert not loss.requires_grad
    (kind, (_, trained_weights)), = model.loss_head.player.recordings.items()
    assert kind[4] is False and trained_weights == []
    torch.testing.assert_close(loss, make_model()(*batch)[1].detach())
    model.train()
    check(model)


def test_without_loss_only():
    model = make_fast_model()
    check(model)
    logits, loss = model(*make_batch(model))
    assert logits.shape == (4, 16, 50) and 'ReplayFunction' not in str(loss.grad_fn)
    assert 'forward' not in vars(model)
    with pytest.raises(ZeroDivisionError), kernels.loss_only(model):
        1 / 0
    assert 'forward' not in vars(model) and model.loss_head.gives_logits


# -----------------------------------------------------------------------------
# what comes after the loss
def test_scaled_losses_and_accumulation():
    model = make_fast_model()
    batch = make_batch(model)
    expected, _ = measure(make_model(), batch, factor=0.25)
    compare(measure(model, batch, factor=0.25)[0], expected)
    for _ in range(2):
        with kernels.loss_only(model):
            model(*batch)[1].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    compare(grads, {name: 8 * expected[name] for name in grads})


def test_two_backward_passes_and_a_second_derivative():
    model = make_fast_model()
    expected, _ = measure(make_model(), make_batch(model))
    with kernels.loss_only(model):
        _, loss = model(*make_batch(model))
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    compare(grads, {name: 3 * expected[name] for name in grads})
    with kernels.loss_only(model):
        _, loss = model(*make_batch(model))
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_a_penalty_of_the_weights():
    """A played loss is a part of the graph like another one."""
    results = []
    for model in (make_fast_model(), make_model()):
        with kernels.loss_only(model):
            _, loss = model(*make_batch(model))
        (loss + model.transformer.wte.weight.square().sum()).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    compare(*results)


def test_an_infinite_loss_skips_the_update():
    model = make_fast_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    model.transformer.wte.weight.data[:] = 1e30
    before = copy.deepcopy(model.state_dict())
    with kernels.loss_only(model):
        _, loss = model(*make_batch(model))
    optimizers.nan_unless_finite(loss).backward()
    assert not optimizers.clip_and_step(optimizer, scaler, 1.0).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -----------------------------------------------------------------------------
# changes after the first step. Each takes a model and changes it
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


# with these changes it is still a model of model.py, which is recorded again
CHANGES_OF_SHAPE = [set_flash, set_eps, set_gelu, replace_weight, swap_blocks, untie, freeze, prune,
                    add_block]
CHANGES = [*CHANGES_OF_SHAPE, replace_part, patch_forward, hook_forward, hook_inputs, hook_backward,
           hook_gradient, set_class, set_class_of_model, set_embed, replace_hooks, set_loss,
           set_embedding_options, set_max_norm]


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
        check(model, is_played=change in CHANGES_OF_SHAPE, plain_model=plain_model)


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


def test_numbers_of_the_weights():
    """Weights that an optimizer, load_state_dict() or the user changes in place count at once."""
    model, plain_model = make_fast_model(), make_model()
    check(model)
    for m in (model, plain_model):
        with torch.no_grad():
            m.transformer.h[0].mlp.c_fc.weight.mul_(2)
            m.transformer.wpe.weight.data = m.transformer.wpe.weight.data / 3
        m.load_state_dict({**m.state_dict(), 'transformer.ln_f.bias': torch.ones(32)})
    check(model, plain_model=plain_model)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_another_dtype_after_the_first_step(dtype):
    model, plain_model = make_fast_model(), make_model()
    check(model)
    tolerance = 1e-5 if dtype == torch.float64 else 0.05  # of 8 bits of mantissa
    is_played = dtype == torch.bfloat16  # there are fast forms for it
    check(model.to(dtype), None, is_played, plain_model.to(dtype), tolerance)


def test_frozen_and_unused_weights():
    model, plain_model = make_fast_model(), make_model()
    for m in (model, plain_model):
        m.extra = nn.Parameter(torch.ones(3))
        m.transformer.wte.weight.requires_grad_(False)
    check(model, plain_model=plain_model)
    for p in model.parameters():
        p.requires_grad_(False)
    with kernels.loss_only(model):
        assert not model(*make_batch(model))[1].requires_grad
    frozen_model = make_fast_model().requires_grad_(False)
    with kernels.loss_only(frozen_model):
        assert not frozen_model(*make_batch(model))[1].requires_grad


def test_an_attribute_of_the_user():
    """What the model doesn't read may change at each step."""
    model = make_fast_model()
    recordings = []
    for step in range(3):
        model.step = step
        model.batch = make_batch(model)
        model.transformer.h[0].loss_of_last_step = torch.ones(()) * step
        check(model)
        recordings += model.loss_head.player.recordings.values()
    assert recordings[0] is recordings[1] is recordings[2]


def test_dropout_is_not_played():
    model = make_fast_model(dropout=0.1)
    assert not measure(model, make_batch(model))[1]
    model, plain_model = make_fast_model(), make_model()
    check(model)
    for m in (model, plain_model):
        m.transformer.h[0].mlp.dropout.p = 1.0
    check(model, is_played=False, plain_model=plain_model)


def test_observers():
    """They see the operations of the model's own forward pass."""
    model = make_fast_model()
    check(model)
    with torch.autograd.set_detect_anomaly(True), kernels.loss_only(model):
        assert 'ReplayFunction' not in str(model(*make_batch(model))[1].grad_fn)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        check(model, is_played=False)
    finally:
        handle.remove()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        check(model, is_played=False)
    assert len(packed) > 20
    with torch.overrides.BaseTorchFunctionMode():
        check(model, is_played=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        check(model, is_played=False)
    tracer = sys.gettrace()
    sys.settrace(lambda *args: None)  # as a debugger does
    try:
        check(model, is_played=False)
    finally:
        sys.settrace(tracer)
    check(model)


def test_recordings_keep_no_tensors():
    model = make_fast_model()
    gc.collect()
    before = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    check(model)
    gc.collect()
    assert sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) <= before


def test_copies_and_memory():
    """A copy of a model has its own recording, and a recording doesn't keep a model."""
    model = make_fast_model()
    check(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.h[0].mlp.c_fc.weight.mul_(2)
    plain_model = make_model()
    plain_model.load_state_dict(twin.state_dict())
    check(twin, plain_model=plain_model)
    check(model)
    model.method = model.generate  # it refers to the model
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_compiled_parts(monkeypatch):
    model = make_fast_model()
    check(model)
    model.transformer.h[0].compile(backend='eager')
    check(model, is_played=False)


def test_two_threads_with_one_model():
    """Each is answered, by a recording or by the model itself."""
    model = make_fast_model().eval()
    batch = make_batch(model)
    with torch.no_grad(), kernels.loss_only(model), ThreadPoolExecutor(2) as pool:
        barrier = threading.Barrier(2)

        def work(_):
            barrier.wait()
            return [model(*batch)[1] for _ in range(20)]

        losses = torch.tensor([loss for part in pool.map(work, range(2)) for loss in part])
    assert 'forward' not in vars(model) and losses.std() < 1e-5


def test_what_cannot_be_recorded(capsys):
    """A number that was computed would be the same at each step."""
    x, y = torch.ones(3), torch.ones(3)
    with pytest.raises(NotRecorded, match='_local_scalar_dense'), Recorder([x]):
        (x * 2).sum().item()
    with pytest.raises(NotRecorded), Recorder([x]):
        x + y
    model, plain_model = make_fast_model(), make_model()
    for m in (model, plain_model):
        m.transformer.h[0].ln_1.eps = torch.tensor(0.1)
    for _ in range(2):
        check(model, is_played=False, plain_model=plain_model)
    assert capsys.readouterr().err.count('the training step runs as it is written') == 1


def test_the_cache_of_autocast():
    """It may have weights that were cast outside of a recording."""
    model = make_fast_model('bfloat16')
    idx, targets = make_batch(model)
    expected, _ = measure(make_model(), (idx, targets))
    with torch.autocast('cpu', torch.bfloat16), kernels.loss_only(model):
        model(idx[:, :5], targets[:, :5])
        for rows in (2, 4):
            _, loss = model(idx[:rows], targets[:rows])
            assert 'ReplayFunction' in str(loss.grad_fn)
    torch.testing.assert_close(loss, expected['loss'], atol=0.02, rtol=0)


def test_float16_is_not_played():
    """Its gradients may only be computed after the loss is scaled."""
    model = make_fast_model()
    with torch.autocast('cpu', torch.float16), kernels.loss_only(model):
        assert 'ReplayFunction' not in str(model(*make_batch(model))[1].grad_fn)
    model.half()
    with kernels.loss_only(model):
        assert 'ReplayFunction' not in str(model(*make_batch(model))[1].grad_fn)


def test_ids_outside_of_the_vocabulary():
    """They end in the model's own error."""
    model = make_fast_model()
    idx, targets = make_batch(model)
    check(model)
    for batch in ((idx + 49, targets), (idx, targets + 49)):
        with kernels.loss_only(model), pytest.raises(IndexError):
            model(*batch)
