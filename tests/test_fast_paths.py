"""A faster form steps aside for what somebody has changed, also late and in unusual ways."""
import copy
import functools
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from edits import PlainRun, Sources, continue_greedily, load_unedited_model
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import model as model_py
from model import GPT, Block, GPTConfig
from runtime import cache_checks, kernels, optimizers, originals
from runtime.inference import note_once

LARGE = 50304  # with this vocabulary the faster loss is used


def make_model(vocab_size=96, cls=GPT, **options):
    torch.manual_seed(0)
    shape = dict(block_size=64, n_layer=2, n_head=2, n_embd=32, bias=False)
    model = cls(GPTConfig(vocab_size=vocab_size, **{**shape, **options})).eval()
    for p in model.parameters():
        p.data *= 6  # a new model repeats its last token
    note_once.cache_clear()
    return model


def make_prompt(rows=2, length=5, vocab_size=96):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, vocab_size - 1, (rows, length), generator=generator)


def check_generate(model, prompt, new_tokens=40):
    expected = continue_greedily(model, prompt, new_tokens)
    assert torch.equal(model.generate(prompt, new_tokens, temperature=0), expected)
    return expected


# -----------------------------------------------------------------------------
# the cache
class MixingBlock(Block):
    """With a gate of 0 it computes what Block does, and with another number it mixes positions."""
    flag = False

    def __init__(self, block, config):
        nn.Module.__init__(self)
        self._modules.update(block._modules)
        self.gate = nn.Parameter(torch.zeros(()))
        self.config = config
        self.window = None
        self.mixer = torch.zeros_like

    def mix(self, x):
        return 0 * x

    def forward(self, x):
        x = super().forward(x)
        if self.config.dropout or self.flag or self.window:
            x = x + x.cumsum(1)
        return x + self.gate * x.cumsum(1) + self.mixer(x) + self.mix(x)


CHANGES = {
    'data of a weight': lambda block: block.gate.data.fill_(0.5),
    'another data of a weight': lambda block: setattr(block.gate, 'data', torch.tensor(0.5)),
    'the config': lambda block: setattr(block.config, 'dropout', 0.5),
    'a class attribute': lambda block: setattr(type(block), 'flag', True),
    'a tuple': lambda block: setattr(block, 'window', (1, 2)),
    'a function': lambda block: setattr(block, 'mixer', lambda x: x.cumsum(1)),
    'a method of the class': lambda block: setattr(type(block), 'mix', lambda self, x: x.cumsum(1)),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_changes_between_two_samples(change, capsys):
    model, prompt = make_model(), make_prompt()
    cls = type('MixingBlock', (MixingBlock,), {})
    model.transformer.h = nn.ModuleList(cls(block, model.config) for block in model.transformer.h)
    before = check_generate(model, prompt)
    assert 'without a KV cache' not in capsys.readouterr().err
    change(model.transformer.h[1])
    assert not torch.equal(check_generate(model, prompt), before), 'no effect'
    assert 'without a KV cache' in capsys.readouterr().err


@pytest.mark.parametrize('border, prompt', [
    (50256, [[5, 6, 7, 8]]), (50303, [[5, 6, 7, 8]]), (40000, [[5, 6, 7, 8], [5, 40000, 7, 8]]),
    (40000, [[40000, *range(1, 56)]]), (40000, [[*range(30), 40000, *range(30, 62)]])],
    ids=['end of a text', 'last id', 'second row', 'start of a long prompt', 'full context'])
def test_tokens_that_mean_something_to_a_changed_model(border, prompt):
    class Counting(GPT):
        def embed(self, idx):
            return super().embed(idx) * (1 + (idx == border).cumsum(1).clamp(max=1)[..., None])

    model = make_model(LARGE, Counting)
    prompt = torch.tensor(prompt)
    model.generate(make_prompt(), 2)  # without such a token
    assert not cache_checks.can_cache(model, prompt)
    check_generate(model, prompt, 6)


class Merging(nn.Linear):
    """As LoRA is often written: in eval mode the weight has the sum, and the update is at rest."""
    merged = False

    def train(self, mode=True):
        super().train(mode)
        self.merged = not mode
        return self


def test_a_look_leaves_the_model_as_it_was():
    model = make_model(dropout=0.1)
    layer = Merging(32, 128)
    model.transformer.h[0].mlp.c_fc = layer

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('steps', torch.zeros(()))

        def forward(self, x):
            self.steps += x.size(1)
            return F.gelu(x)

    model.transformer.h[0].mlp.gelu = counter = Counter()
    model.train()
    model.transformer.h[1].eval()
    modes = {module: module.training for module in model.modules()}
    cache_checks.can_cache(model, make_prompt())
    assert {module: module.training for module in model.modules()} == modes
    assert not layer.merged and counter.steps == 0


def test_several_threads_with_one_model():
    model, prompts = make_model(), [make_prompt(length=n) for n in range(3, 9)]
    expected = [continue_greedily(model, prompt, 30) for prompt in prompts]
    results = {}

    def generate(i):
        for _ in range(3):
            results.setdefault(i, []).append(model.generate(prompts[i], 30, temperature=0))

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ids, expected[i]) for i in range(len(prompts)) for ids in results[i])
    assert sum(map(len, results.values())) == 18
    assert type(model.transformer.h[0].attn.attention) is model_py.Attention


# -----------------------------------------------------------------------------
# what is no patch at first sight
def test_code_that_a_notebook_reloads(monkeypatch):
    model, prompt = make_model(), make_prompt()
    before = check_generate(model, prompt)

    def forward(self, q, k, v, dropout, flash):
        mask = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril().triu(-3)
        return (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~mask, -1e9).softmax(-1) @ v

    monkeypatch.setattr(model_py.Attention.forward, '__code__', forward.__code__)
    assert not torch.equal(check_generate(model, prompt), before), 'no effect'
    monkeypatch.undo()
    assert torch.equal(check_generate(model, prompt), before)
    assert cache_checks.can_cache(model, prompt)


@torch.library.custom_op('tests::doubled_loss', mutates_args=())
def doubled_loss(x: torch.Tensor, y: torch.Tensor, ignore_index: int = -1) -> torch.Tensor:
    return 2 * (x.logsumexp(-1) - x.gather(1, y[:, None])[:, 0]).mean()


@torch.jit.script
def scripted_loss(x: torch.Tensor, y: torch.Tensor, ignore_index: int = -1) -> torch.Tensor:
    return 2 * (x.logsumexp(-1) - x.gather(1, y[:, None])[:, 0]).mean()


def compute_losses(model, x, y):
    """The loss of a plain model, and that of a copy with the faster forms."""
    fast_model = copy.deepcopy(model)
    kernels.accelerate(fast_model, 'cpu', 'float32')
    with kernels.loss_only(fast_model):
        fast_loss = fast_model(x, y)[1].item()
    return model(x, y)[1].item(), fast_loss


def make_batch(vocab_size=LARGE):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (4, 64), generator=generator) for _ in range(2)]


@pytest.mark.parametrize('function', [doubled_loss, scripted_loss], ids=['custom_op', 'script'])
def test_objects_that_say_they_are_of_torch(function, monkeypatch):
    model = make_model(LARGE).train()
    unpatched, _ = compute_losses(model, *make_batch())
    monkeypatch.setattr(F, 'cross_entropy', function)
    plain, fast = compute_losses(model, *make_batch())
    assert fast == pytest.approx(plain, rel=1e-5)
    assert plain == pytest.approx(2 * unpatched, rel=1e-4)


def test_another_call_of_all_modules(monkeypatch, capsys):
    model = make_model(LARGE).train()
    call = nn.Module.__call__

    def halve(self, *args, **options):
        y = call(self, *args, **options)
        return y / 2 if isinstance(self, nn.Linear) and self.out_features == LARGE else y

    unpatched, _ = compute_losses(model, *make_batch())
    monkeypatch.setattr(nn.Module, '__call__', halve)
    plain, fast = compute_losses(model, *make_batch())
    assert fast == pytest.approx(plain, rel=1e-5) != pytest.approx(unpatched, rel=1e-2)
    assert not originals.is_original_model(model)


def test_a_backward_hook_of_all_modules():
    model = make_model(LARGE).train()
    kernels.accelerate(model, 'cpu', 'float32')
    seen = []
    handle = nn.modules.module.register_module_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(module))
    try:
        with kernels.loss_only(model):
            model(*make_batch())[1].backward()
    finally:
        handle.remove()
    assert model.lm_head in seen


# -----------------------------------------------------------------------------
# parts
def test_a_hook_on_the_loss_after_accelerate():
    model = make_model(LARGE).train()
    kernels.accelerate(model, 'cpu', 'float32')
    model.loss_head.register_forward_hook(lambda part, args, y: (y[0], y[0].square().mean()))
    with kernels.loss_only(model):
        logits, loss = model(*make_batch())
    assert loss.item() == pytest.approx(logits.square().mean().item())


def test_one_context_in_another():
    model = make_model(LARGE).train()
    kernels.accelerate(model, 'cpu', 'float32')
    with kernels.loss_only(model):
        with kernels.loss_only(model):
            assert model(*make_batch())[0] is None
        assert model(*make_batch())[0] is None
    assert model(*make_batch())[0] is not None


def test_a_weight_that_multiplies_in_its_own_way():
    class Halved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            y = super().__torch_function__(func, types, args, kwargs or {})
            return y / 2 if func is F.linear else y

    model = make_model(LARGE, tied=False).train()
    unpatched, _ = compute_losses(model, *make_batch())
    kernels.accelerate(model, 'cpu', 'float32')
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Halved))
    plain = model(*make_batch())[1].item()
    with kernels.loss_only(model):
        assert model(*make_batch())[1].item() == pytest.approx(plain, rel=1e-5)
    assert abs(float(plain) - unpatched) > 0.1


def test_attributes_on_a_part(capsys):
    """A part that has some is not replaced, as its owner would not find them."""
    model = make_model(dropout=0.1)
    model.transformer.h[0].attn.attention.temperature = nn.Parameter(torch.ones(()))
    model.transformer.h[1].attn.attention.name = 'second'
    names = set(model.state_dict())
    kernels.accelerate(model, 'cpu', 'float32')
    assert model.transformer.h[0].attn.attention.temperature == 1
    assert model.transformer.h[1].attn.attention.name == 'second'
    assert set(model.state_dict()) == names
    assert 'Attention' in capsys.readouterr().err


def test_an_attribute_of_a_packed_layer(char_data, tmp_path):
    """sample.py packs the linear layers of a model on a CPU."""
    edit = ('        x = self.gelu(self.c_fc(x))', '        x = x * (self.c_fc.out_features / '
            'self.c_fc.in_features)\n        x = self.gelu(self.c_fc(x))')
    sources = Sources(tmp_path, ('model.py', *edit))
    sources.train(char_data, 'out', '--max_iters=1')
    sources.run('sample.py', f'--out_dir={tmp_path}/out', '--device=cpu', '--max_new_tokens=5')


def see_dtypes(model):
    kernels.accelerate(model.train(), 'cpu', 'bfloat16')
    dtypes = []
    first_norm = model.transformer.h[0].ln_1
    first_norm.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(*make_batch(96))
    return dtypes


def test_the_residual_stream_of_a_changed_model_is_as_in_torch():
    class Lerp(Block):
        def forward(self, x):
            return torch.lerp(x, super().forward(x).float(), torch.ones(()))

    assert see_dtypes(make_model()) == [torch.bfloat16]
    model = make_model()
    model.transformer.h[1].__class__ = Lerp
    assert see_dtypes(model) == [torch.float32]
    model = make_model()
    model.transformer.h[0].register_forward_hook(lambda module, args, y: print(y.detach().numpy()))
    assert see_dtypes(model) == [torch.float32]


def test_a_block_that_is_patched_before_it_is_recomputed():
    x, y = make_batch(96)
    grads = []
    for recomputes in (False, True):
        model = make_model().train()
        block = model.transformer.h[0]
        block.forward = types.MethodType(lambda self, x: x + 3 * self.mlp(self.ln_2(x)), block)
        if recomputes:
            kernels.recompute_blocks(model)
        model(x, y)[1].backward()
        grads.append(block.mlp.c_fc.weight.grad)
        assert block.attn.c_attn.weight.grad is None
    assert torch.equal(*grads)


# -----------------------------------------------------------------------------
# the logits of training and those of sampling
HEADS = {'training': ('lm_head(x)  #', '3 * torch.tanh(lm_head(x) / 3)  #'),
         'sampling': ('self.lm_head(x[:, -1:]), None',
                      '3 * torch.tanh(self.lm_head(x[:, -1:]) / 3), None')}


@pytest.mark.parametrize('places', [['training'], ['sampling'], ['training', 'sampling']])
def test_logits_that_are_changed_in_one_place(places, char_data, tmp_path):
    sources = Sources(tmp_path, *(('model.py', *HEADS[place]) for place in places))
    sources.train(char_data, 'out', '--max_iters=30', '--learning_rate=2e-2')
    err = sources.run('sample.py', f'--out_dir={tmp_path}/out', '--device=cpu', '--start=1 and',
                      '--max_new_tokens=5').stderr
    assert ('must be both in LossHead and in GPT.forward' in err) == (len(places) == 1), err


def test_no_line_about_the_logits_for_an_edited_loss(char_data, tmp_path):
    edit = ('ignore_index=-1)', 'ignore_index=-1, label_smoothing=0.5)')
    sources = Sources(tmp_path, ('model.py', *edit))
    sources.train(char_data, 'out', '--max_iters=2')
    err = sources.run('sample.py', f'--out_dir={tmp_path}/out', '--device=cpu', '--start=1 and',
                      '--max_new_tokens=5').stderr
    assert 'must be both' not in err


# -----------------------------------------------------------------------------
# optimizers
class OwnStep(torch.optim.AdamW):
    """A fused AdamW by its name, with an update of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                p -= p.grad


class Delegating:
    """A wrapper that gives all attributes of the optimizer inside."""

    def __init__(self, params):
        self.inner = OwnStep(params, fused=True)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def patch_step(params):
    optimizer = torch.optim.AdamW(params, fused=True)
    optimizer.step = types.MethodType(OwnStep.step, optimizer)
    return optimizer


def hook_step(params):
    optimizer = torch.optim.SGD(params, lr=1.0, fused=True)
    optimizer.register_step_pre_hook(lambda *args: [p.grad.add_(0) for p in params] and None)
    return optimizer


@pytest.mark.parametrize('make', [functools.partial(OwnStep, fused=True), OwnStep, Delegating,
                                  patch_step, hook_step],
                         ids=['fused', 'unfused', 'wrapper', 'patched', 'hook'])
def test_an_update_of_somebodys_own_is_clipped_and_skipped(make):
    p = nn.Parameter(torch.zeros(2))
    optimizer = make([p])
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    p.grad = torch.tensor([30.0, 40.0])
    norm = optimizers.clip_and_step(optimizer, scaler, 1.0)
    assert norm == 50
    torch.testing.assert_close(p.data, torch.tensor([-0.6, -0.8]))
    p.grad = torch.tensor([1.0, torch.nan])
    optimizers.clip_and_step(optimizer, scaler, 1.0)
    torch.testing.assert_close(p.data, torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize('is_global', [False, True])
def test_hooks_around_the_update(is_global):
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([p], fused=True)
    norms, weights = [], []
    registers = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
    if is_global:
        registers = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
    handles = [registers[0](lambda *args: norms.append(p.grad.norm().item())),
               registers[1](lambda *args: weights.append(p.detach().clone()))]
    p.grad = torch.full((4,), 100.0)
    optimizers.clip_and_step(optimizer, torch.amp.GradScaler('cpu', enabled=False), 1.0)
    for handle in handles:
        handle.remove()
    assert norms == pytest.approx([1.0])  # the hook sees clipped gradients
    assert len(weights) == 1 and torch.equal(weights[0], p) and p.all()


def test_an_iteration_without_gradients():
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([p], fused=True)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    assert optimizers.clip_and_step(optimizer, scaler, 1.0) == 0 and not p.any()


def test_a_scheduler_of_torch(char_data, tmp_path, monkeypatch):
    """It takes the place of get_lr, and changes step() of the optimizer."""
    make = 'state_bytes = optimizers.count_state_bytes(optimizer)\n'
    set_lr = "    for group in optimizer.param_groups:\n        group['lr'] = lr\n"
    bad_steps = '    bad_steps.count(grad_norm)\n'
    sources = Sources(
        tmp_path, ('train.py', make, make + 'scheduler = torch.optim.lr_scheduler.LambdaLR('
                   'optimizer, lambda it: 1 / (1 + it))\n'),
        ('train.py', set_lr, ''), ('train.py', bad_steps, bad_steps + '    scheduler.step()\n'))
    _, err, losses = sources.train(char_data, 'out', '--max_iters=4')
    plain = PlainRun(load_unedited_model(), char_data)
    monkeypatch.setattr('edits.get_lr', lambda it: 3e-3 / (1 + it))
    plain.train(4)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    assert 'Warning' not in err


def test_muon_leaves_other_weights_to_adamw():
    model = make_model()
    model.transformer.h[0].experts = nn.Parameter(torch.randn(3, 4, 5))
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    optimizer = optimizers.specialize(adamw, 'muon', 'float32', 0.95, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.transformer.h[0].experts.detach().clone()
    optimizers.clip_and_step(optimizer, torch.amp.GradScaler('cpu', enabled=False), 1.0)
    change = model.transformer.h[0].experts.detach() - before
    assert change.abs().max() > 1e-4
    muon_params = {p for group in optimizer.param_groups if 'momentum' in group
                   for p in group['params']}
    assert model.transformer.h[0].experts not in muon_params
    assert model.transformer.h[0].mlp.c_fc.weight in muon_params


def test_muon_without_blocks(capsys):
    model = nn.Linear(3, 4)
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(SystemExit):
        optimizers.specialize(adamw, 'muon', 'float32', 0.95, model)
    assert 'optim=muon needs the matrices in transformer.h' in capsys.readouterr().err


@pytest.mark.parametrize('option', [dict(ns_steps=3), dict(ns_coefficients=(1, 2, 3)),
                                    dict(adjust_lr_fn='original')], ids=str)
def test_options_that_muon_does_not_have(option, capsys):
    model = make_model()
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    adamw.param_groups[0].update(option)
    with pytest.raises(SystemExit):
        optimizers.specialize(adamw, 'muon', 'float32', 0.95, model)
    assert 'this optimizer has no' in capsys.readouterr().err


def test_a_patched_step_of_torchs_class(monkeypatch):
    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([p], fused=True)
    monkeypatch.setattr(torch.optim.AdamW, 'step', OwnStep.step)
    p.grad = torch.tensor([30.0, 40.0])
    optimizers.clip_and_step(optimizer, torch.amp.GradScaler('cpu', enabled=False), 1.0)
    torch.testing.assert_close(p.data, torch.tensor([-0.6, -0.8]))


# -----------------------------------------------------------------------------
# what stays fast, and says nothing
def square_activations(model):
    for block in model.transformer.h:
        block.mlp.gelu = nn.Sequential(nn.ReLU(), nn.Hardtanh(0, 3))
    return model


def test_few_tokens_of_a_changed_model_are_not_worth_a_comparison(capsys):
    """It takes some full contexts."""
    model = square_activations(make_model(block_size=512))
    lengths = []
    model.transformer.wte.forward = lambda idx: (lengths.append(idx.size(1)),
                                                 F.embedding(idx, model.transformer.wte.weight))[1]
    check_generate(model, make_prompt(), 2)
    assert max(lengths) < 10 and capsys.readouterr().err == ''
    check_generate(model, make_prompt(), 120)
    assert max(lengths) == 512


def test_ids_that_are_looked_up_by_the_next_token():
    class Following(GPT):
        def embed(self, idx):
            x = super().embed(idx)
            return x * (1 + (F.pad(idx, (1, 0), value=-1)[:, :-1] == 0)[..., None])

    model = make_model(65, Following)
    assert not cache_checks.can_cache(model, make_prompt(vocab_size=65))


def test_hooks_of_the_backward_pass_leave_the_cache(capsys):
    model = make_model()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *args: None)
    try:
        assert cache_checks.can_cache(model, make_prompt())
    finally:
        handle.remove()
    assert capsys.readouterr().err == ''


def test_dropouts_in_a_module_list():
    """Those of attention stay nn.Dropout, as Attention asks for that."""
    model = make_model(dropout=0.1)
    model.dropouts = nn.ModuleList(x for x in model.modules() if isinstance(x, nn.Dropout))
    kernels.accelerate(model, 'cpu', 'float32')
    assert type(model.transformer.h[0].attn.attn_dropout) is nn.Dropout
    assert type(model.transformer.h[0].mlp.dropout) is kernels.Dropout


def test_dropout_in_place():
    model = make_model(dropout=0.5).train()
    dropout = model.transformer.h[0].mlp.dropout
    dropout.inplace = True
    kernels.accelerate(model, 'cpu', 'float32')
    x = torch.ones(1000)
    dropout(x)
    assert 400 < (x == 0).sum() < 600


@pytest.mark.parametrize('kind', ['inference', 'expanded', 'reassigned'])
def test_buffers_after_a_look(kind):
    class Counting(GPT):
        def embed(self, idx):
            if kind == 'reassigned':
                self.calls = self.calls + 1
            return super().embed(idx)

    with torch.inference_mode(kind == 'inference'):
        model = square_activations(make_model(cls=Counting, qk_norm=True))
    model.register_buffer('calls', torch.ones(1, 1).expand(4, 4))
    calls = model.calls
    assert cache_checks.can_cache(model, make_prompt())
    assert model.calls is calls and (calls == 1).all()


def test_no_line_about_logits_in_another_form(capsys):
    class Flat(model_py.LossHead):
        def forward(self, lm_head, x, targets):
            logits, loss = super().forward(lm_head, x, targets)
            return logits.flatten(0, 1), loss

    class Capped(model_py.LossHead):
        def forward(self, lm_head, x, targets):
            logits, loss = super().forward(lm_head, x, targets)
            return 2 * torch.tanh(logits.float() / 2), loss

    for cls, dtype in ((Flat, torch.float32), (Capped, torch.bfloat16)):
        model = make_model()
        model.loss_head = cls()
        model.to(dtype).generate(torch.tensor([[3]]), 3)
        assert ('must be both' in capsys.readouterr().err) == (cls is Capped)
