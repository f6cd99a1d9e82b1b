"""A small model's training step, played from a recording, computes what the model computes."""
import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from replays import check, compare, make_batch, make_fast_model, make_model, measure

from runtime import cross_entropy, kernels, optimizers, replay, replay_checks
from runtime.replay_recorder import NotRecorded, Recorder

pytestmark = pytest.mark.usefixtures('two_threads')

OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2,
               bias=False)
CONFIGS = {'bias': {}, 'no bias': dict(bias=False), 'tanh': dict(gelu='tanh'), 'options': OPTIONS,
           'several parts of attention': dict(block_size=256)}


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
    player = model.loss_head.player
    assert [kind[3] for kind in player.recordings] == [parts] if parts else player is None
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
    rows = replay_checks.MAX_ELEMENTS // (16 * 32)
    assert measure(model, make_batch(model, rows))[1]
    assert not measure(model, make_batch(model, 2 * rows))[1]
    large_model = make_fast_model(vocab_size=cross_entropy.MAX_PLAIN_LOGITS // 64 + 1)
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
# weights, and what is not played
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


def test_other_strides_of_the_weights():
    """Their memory may be in another order, with the same shape."""
    model, plain_model = make_fast_model('bfloat16'), make_fast_model('bfloat16')
    batch = make_batch(model)
    assert measure(model, batch, 'bfloat16')[1]
    for m in (model, plain_model):
        for p in (m.transformer.h[0].attn.c_proj.weight, m.transformer.h[0].mlp.c_fc.weight):
            p.data = p.data.t().contiguous().t()
    expected, _ = measure(plain_model, batch, 'bfloat16')
    for _ in range(2):
        results, was_played = measure(model, batch, 'bfloat16')
        assert was_played
        compare(results, expected)


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


def test_compiled_parts():
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
    with pytest.raises(NotRecorded, match='view.dtype'), Recorder([x]):
        x.view(torch.int32)
    with pytest.raises(NotRecorded, match='_foreach_add_'), Recorder([x]):
        torch._foreach_add_([x], 1.0)
    model, plain_model = make_fast_model(), make_model()
    for m in (model, plain_model):
        m.transformer.h[0].ln_1.eps = torch.tensor(0.1)
    for _ in range(2):
        check(model, is_played=False, plain_model=plain_model)
    assert capsys.readouterr().err.count('the training step runs as it is written') == 1


def test_views_of_results_and_of_inputs():
    """A view may be changed in place, or begin elsewhere in the next step."""
    def compute(x):
        y = (x * 3).view(2, 6).t()
        y[1:3] += x[4]
        return [y.t().t(), x[1:3].clone(), y.flatten()[3:], y[2:].exp(), y[0, 1] * 2]

    first, second = torch.arange(24.).split(12)
    with Recorder([first]) as recorder:
        results = compute(first)
    play = torch.jit.CompilationUnit(recorder.write_function(results)).play
    for result, expected in zip(play(second), compute(second)):
        assert torch.equal(result, expected)


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
