"""That the host never waits for a GPU: a step and a token on a device that only has shapes.

The device is 'meta' in FakeTensorMode, which raises if a value is read. What copies between host
and device, or takes a tensor of the host into a computation, is found by NoTransfers. What the code
chooses by the type of a device is passed in as for CUDA.
"""
import ast
import contextlib
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, functions_of
from edits import continue_greedily
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from model import GPT, GPTConfig
from runtime import distributed, inference, kernels, optimizers, signals, threads
from runtime.dataset import DataOrder, list_eval_batches
from runtime.shards import check_ids, forget_pages

FAST = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2)
# a large vocabulary never has all its logits at once
MODELS = [dict(bias=True, vocab_size=50304), dict(dropout=0.1), FAST]
KINDS = [('adamw', 'float32'), ('adamw', 'bfloat16'), ('muon', 'float32')]


class Transfer(Exception):
    """Something went between host and device that hasn't been named."""


class NoTransfers(TorchDispatchMode):
    """Raises Transfer if an operation reads or writes both host and device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result))
                   if isinstance(leaf, torch.Tensor)]
        # aten::to: in inference mode
        is_copy = function._schema.name in ('aten::_to_copy', 'aten::copy_', 'aten::to')
        # a kernel gets a single number of the host as an argument
        devices = {tensor.device.type for tensor in tensors
                   if tensor.dim() or tensor.device.type != 'cpu' or is_copy}
        waits = function._schema.name in ('aten::multinomial', 'aten::masked_select')
        if len(devices) > 1 or waits:
            raise Transfer(str(function))
        return result


class NoNewTensors(TorchFunctionMode):
    """Raises Transfer if numbers of the host become a tensor on the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_on_host = torch.device(kwargs.get('device') or 'cpu').type == 'cpu'
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and not is_on_host:
            raise Transfer(function.__name__)
        return function(*args, **kwargs)


@contextlib.contextmanager
def watch_transfers():
    with FakeTensorMode(), NoTransfers(), NoNewTensors():
        yield


@pytest.mark.parametrize('transfer', [
    lambda x: x + torch.ones(3), lambda x: torch.ones(3).to('meta'), lambda x: x.cpu(),
    lambda x: torch.tensor([1, 2], device='meta'), lambda x: x[torch.tensor([0, 1])],
    lambda x: x.copy_(torch.ones(3)), lambda x: x.sum().item(), lambda x: x.tolist(),
    lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: torch.multinomial(x, 1),
    lambda x: torch.tensor(2.0).to('meta'), lambda x: x.to('cpu', non_blocking=True)])
@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_transfer_is_found(transfer, mode):
    with pytest.raises((Transfer, RuntimeError)), watch_transfers(), mode():
        transfer(torch.ones(3, device='meta'))


def test_what_is_not_a_transfer():
    with watch_transfers():
        x = torch.ones(3, device='meta')
        x[0] = 5.0
        x = 10.0 ** x + torch.full((3,), 2, device='meta')
        x = x * torch.tensor(2.0)  # a single number is an argument of the kernel
        assert x.to(torch.bfloat16).device.type == 'meta'


# -----------------------------------------------------------------------------
# training
def make_model(dtype=torch.float32, **options):
    shape = dict(block_size=64, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    torch.set_default_dtype(dtype)
    try:
        with torch.device('meta'):
            model = GPT(GPTConfig(**{**shape, **options}))
    finally:
        torch.set_default_dtype(torch.float32)
    kernels.accelerate(model, 'cuda', 'float32')
    return model


def read_update():
    """The lines of train.py's loop that make an update, as code."""
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    loop = next(node for node in tree.body if isinstance(node, ast.While)).body
    first = next(i for i, node in enumerate(loop) if isinstance(node, ast.For)
                 and ast.unparse(node.iter) == 'optimizer.param_groups')
    last = next(i for i, node in enumerate(loop[first:], first) if isinstance(node, ast.If)
                and 'log_interval' in ast.unparse(node.test))
    return compile(ast.Module(loop[first:last], []), 'train.py', 'exec')


def make_space(tmp_path, optim, moments_dtype, transfers, **options):
    """The globals of train.py for a run on the device, with the functions of its source."""
    model = make_model(**options)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cuda')
    optimizer = optimizers.specialize(optimizer, optim, moments_dtype, 0.95, model)
    tokens = {split: np.memmap(tmp_path / split, np.uint16, 'w+', shape=(1000,))
              for split in ('train', 'val')}
    windows = {split: np.lib.stride_tricks.sliding_window_view(tokens[split], 65)
               for split in tokens}

    def move_to_device(rows, device):
        transfers.append('a batch')
        return torch.zeros(rows.shape, dtype=torch.long, device=device)

    def list_batches(*args):
        batches, total_weight = list_eval_batches(*args)
        transfers.extend('a mask' for _, mask, _ in batches if mask is not None)
        return [(starts, mask if mask is None else torch.ones(mask.shape, dtype=torch.bool,
                                                              device='meta'), weight)
                for starts, mask, weight in batches], total_weight

    def all_reduce_sum(loss_sum):
        assert loss_sum.device.type == 'meta'
        transfers.append('a loss')
        return types.SimpleNamespace(item=lambda: 1.0)

    names = 'get_batch', 'get_train_batch', 'seed_micro_step', 'estimate_loss'
    space = dict(
        torch=torch, np=np, os=os, tqdm=tqdm, kernels=kernels, optimizers=optimizers,
        signals=signals, check_ids=check_ids, forget_pages=forget_pages, data_dir='',
        check_mapped_file=lambda tokens: None,  # these are not in a file
        move_to_device=move_to_device, list_eval_batches=list_batches,
        distributed=types.SimpleNamespace(sync_gradients=distributed.sync_gradients,
                                          agree=distributed.agree, all_reduce_sum=all_reduce_sum),
        model=model, raw_model=model, optimizer=optimizer, device='meta', device_type='cuda',
        tokens=tokens, windows=windows, ctx=contextlib.nullcontext(), block_size=64, batch_size=2,
        eval_iters=0, ddp_rank=0, ddp_world_size=1, master_process=False, seed=1, micro_steps=2,
        grad_clip=1.0, scaler=torch.amp.GradScaler('cuda', enabled=False), lr=1e-3, iter_num=0,
        bad_steps=optimizers.BadSteps('meta'), busy_note=threads.BusyNote(),
        order=DataOrder('random', 1, 1000, 64, 2, 2))
    functions = functions_of('train.py', *names, **space)
    space = functions[0].__globals__
    return space


@pytest.fixture
def as_cuda(monkeypatch):
    """Lets AdamW's fused kernel and autocast take tensors of the device, as they take CUDA's."""
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device_type: True)
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device_type: torch.bfloat16)
    monkeypatch.setattr(sys.modules['torch.optim.optimizer'],
                        '_get_fused_kernels_supported_devices', lambda: ['meta', 'cuda', 'cpu'])


@pytest.mark.parametrize('grad_clip', [1.0, 0.0])
@pytest.mark.parametrize('options', MODELS)
@pytest.mark.parametrize('optim, moments_dtype', KINDS)
def test_an_update_waits_for_nothing(tmp_path, as_cuda, optim, moments_dtype, options, grad_clip):
    update, transfers = read_update(), []
    with watch_transfers():
        space = make_space(tmp_path, optim, moments_dtype, transfers, **options)
        space['grad_clip'] = grad_clip
        space['X'], space['Y'] = space['get_train_batch'](0, 0)
        for space['iter_num'] in range(3):
            exec(update, space)
        assert all(p.grad is None for p in space['raw_model'].parameters())
        state = space['optimizer'].state
        assert len(state) == len(list(space['raw_model'].parameters()))
        assert all(value.device.type == 'meta' for entry in state.values()
                   for value in entry.values())
        # and the run counts a skipped update without knowing that it was one
        assert space['bad_steps'].device_counts.device.type == 'meta'
    assert transfers == ['a batch'] * 7  # two micro-steps, and the first


@pytest.mark.parametrize('options', MODELS)
def test_an_evaluation_waits_once_for_each_split(tmp_path, as_cuda, options):
    transfers = []
    with watch_transfers():
        space = make_space(tmp_path, *KINDS[0], transfers, **options)
        losses = space['estimate_loss']()
    assert losses.keys() == {'train', 'val'}
    # 8 batches of 2 x 64 tokens; the last one of val has targets that were counted before
    assert transfers == ['a batch'] * 8 + ['a loss', 'a mask'] + ['a batch'] * 8 + ['a loss']


# -----------------------------------------------------------------------------
# sampling
@pytest.mark.parametrize('sampling', [dict(temperature=0), dict(top_k=5), dict(top_p=0.9),
                                      dict(top_k=5, top_p=0.9, vocab_size=40), {}])
@pytest.mark.parametrize('options', [*MODELS, dict(FAST, block_size=16), dict(block_size=16)])
def test_a_token_waits_for_nothing(monkeypatch, options, sampling):
    monkeypatch.setattr(inference, 'check_logits', lambda logits: None)  # waits once, for a prompt
    with watch_transfers():
        model = make_model(torch.bfloat16, **options).eval()
        prompt = torch.zeros(2, 1, dtype=torch.long, device='meta')
        tokens = list(inference.draw_tokens(model, prompt, 40, static=True, **sampling))
        assert len(tokens) == 40
        assert all(idx.shape == (2, 1) and idx.device.type == 'meta' for idx in tokens)


def make_real_model(**options):
    """The same kind of model in the host's memory, with weights."""
    torch.manual_seed(0)
    model = make_model(**options).to_empty(device='cpu').eval()
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize('options', [*MODELS, dict(FAST, block_size=16)])
def test_each_step_has_the_same_tensors(options):
    # a CUDA graph reads and writes what it read and wrote when it was made
    model, places = make_real_model(**options), []
    decoder = inference.Decoder(model, 16, True, (0, None, None, None))
    for T in (3, 1, 5):
        decoder.cache.length = 0
        prompt = idx = torch.randint(50, (2, T))
        tokens = [prompt]
        for _ in range(20 if options.get('rope_base') else 9):
            idx = decoder.draw(idx, False)
            tokens.append(idx)
            if decoder.cached_model.is_steady():
                cache = decoder.cache
                buffers = [part.buffer for _, name, part in decoder.cached_model.parts
                           if name == 'attention']
                places.append([tensor.data_ptr() for tensor in
                               (cache.position, cache.recent_idx, *buffers)])
        # as without what the earlier prompt has left in the cache, until it slides
        expected = continue_greedily(model, prompt, 9)
        assert torch.equal(torch.cat(tokens, dim=1)[:, :T + 9], expected)
    assert len(places) > 20 and all(place == places[0] for place in places)


@pytest.fixture
def decoders(monkeypatch):
    """A list of all decoders that were made. They seem to have a graph once they can have one."""
    made = []

    class KeptDecoder(inference.Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def draw(self, idx, makes_graph):
            self.graph = None
            idx = super().draw(idx, False)
            self.graph = 'a graph' if self.cached_model.is_steady() else None
            return idx

    monkeypatch.setattr(inference, 'Decoder', KeptDecoder)
    return made


def continue_twice(model, graphs, idx, rows=2, new=20, **options):
    """The tokens after a prompt, which must be those without earlier graphs."""
    prompt = torch.full((rows, idx), 7)
    tokens = [torch.cat(list(inference.draw_tokens(
        model, prompt, new, static=True, graphs=kept, **{'temperature': 0, **options})), dim=1)
        for kept in (graphs, None)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize('options', MODELS[1:])
def test_which_calls_use_an_earlier_graph(decoders, options):
    model, graphs = make_real_model(**options), {}

    def count_new(*args, **options):
        """How many decoders a call makes, without that of the comparison."""
        count = len(decoders)
        continue_twice(model, graphs, *args, **options)
        assert len(graphs) <= 1
        return len(decoders) - count - 1

    assert count_new(3) == 1
    assert [count_new(T) for T in (3, 1, 9)] == [0, 0, 0]
    assert count_new(3, rows=1) == 1 and count_new(3, top_k=1) == 1 and count_new(3) == 1
    changes = [
        lambda: setattr(model.transformer.ln_f, 'eps', 1.0),
        lambda: model.transformer.h[0].train(),
        lambda: setattr(model.transformer.h[0].attn, 'qk_norm', not options.get('qk_norm')),
        lambda: setattr(model.transformer.h[1].mlp, 'gelu', torch.nn.GELU('tanh')),
        lambda: setattr(model.lm_head, 'weight', torch.nn.Parameter(torch.randn(50, 32))),
        lambda: setattr(model.config, 'vocab_size', 60), lambda: model.double()]
    for change in changes:
        change()
        model.transformer.h[0].attn.attn_dropout.p = model.transformer.h[0].mlp.dropout.p = 0.0
        model.transformer.h[0].attn.resid_dropout.p = 0.0
        assert count_new(3) == 1 and count_new(3) == 0
    decoder, = graphs.values()
    for part in (part for _, name, part in decoder.cached_model.parts if name == 'attention'):
        with torch.inference_mode():
            part.buffer.fill_(math.nan)  # as after an overflow
    assert count_new(3) == 0
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(50, 32))  # in place: a graph reads it
    assert count_new(3) == 0
    model.float()
    with torch.autocast('cpu', torch.bfloat16):
        assert count_new(3) == 1 and count_new(3) == 1
    model.transformer.h[0].mlp.forward = lambda x: 2 * x
    assert count_new(3, use_cache=True) == 1 and count_new(3, use_cache=True) == 1


def test_calls_at_the_same_time_have_graphs_of_their_own(decoders):
    model, graphs = make_real_model(), {}
    prompts = [torch.full((2, 3), n) for n in (7, 8)]
    streams = [inference.draw_tokens(model, prompt, 30, 0, graphs=graphs, static=True)
               for prompt in prompts]
    for prompt, tokens in zip(prompts, zip(*zip(*streams))):  # a token of each in turn
        ids = torch.cat(tokens, dim=1)
        assert torch.equal(torch.cat((prompt, ids), dim=1), continue_greedily(model, prompt, 30))
    assert len(decoders) == 2 and len(graphs) == 1
    broken = inference.draw_tokens(model, prompts[0], 30, 0, graphs=graphs, static=True)
    next(broken)
    next(broken)
    assert not graphs  # it is in use
    broken.close()  # as Ctrl-C does
    assert len(graphs) == 1
    continue_twice(model, graphs, 5)
    assert len(decoders) == 3  # one for the comparison


# -----------------------------------------------------------------------------
# torch.compile
@pytest.mark.parametrize('options', MODELS)
@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_step_is_one_graph(options, is_training, dtype):
    model = make_model(**options).to_empty(device='cpu').train(is_training)
    idx = torch.zeros(2, 64, dtype=torch.long)
    torch._dynamo.reset()
    with kernels.loss_only(model), torch.set_grad_enabled(is_training), torch.autocast(
            'cpu', torch.bfloat16, enabled=dtype == 'bfloat16', cache_enabled=False):
        explanation = torch._dynamo.explain(model)(idx, idx)
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0, explanation
