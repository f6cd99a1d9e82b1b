"""
Plays the training step of a small model on a CPU from a recording.

A small model spends much of a step between torch's operations: in Python, in autograd, and where
threads wait for each other. So its first step is recorded, as a list of operations that TorchScript
runs without Python. Each thread plays the list for its own part of the batch. Then threads wait for
each other once in a step, and not in each operation.

Only a model that nobody has changed is recorded. If something is changed later, the model runs as
it is written. tests/test_replay.py compares the two.
"""
import contextlib
import functools
import operator
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.cross_entropy import LossHead
from runtime.originals import (
    BACKWARD_HOOKS,
    FORWARD_HOOKS,
    GLOBALS,
    has_global_hook,
    is_original_model,
    is_torchs,
    is_watched,
)

# the largest B * T * C. With 393,000 elements a step of 6 layers took 0.81 of the time, and with
# 1.6 million 0.92, but more memory
MAX_ELEMENTS = 2 ** 19
MAX_LOGITS = 2 ** 22  # B * T * V. For more of them LossHead doesn't store all
ALIASES = torch.ops.aten.detach.default, torch.ops.aten.alias.default
FUNCTIONS = ('embedding', 'linear', 'layer_norm', 'gelu', 'relu', 'dropout', 'pad',
             'scaled_dot_product_attention', 'cross_entropy')


# -----------------------------------------------------------------------------
# recording
class Recorder(TorchDispatchMode):
    """In this context torch's operations on the inputs are written down in TorchScript."""

    def __init__(self, inputs):
        super().__init__()
        self.names = {}  # by the id of a tensor
        self.tensors = []  # they must live, so that no other tensor gets the same id
        arguments = ', '.join(f'{self.name(tensor)}: Tensor' for tensor in inputs)
        self.lines = [f'def play({arguments}):']

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # otherwise torch imports its compiler, which takes a second

    def name(self, tensor):
        """The name of a tensor; a new one if an operation has made it, and not changed it."""
        if id(tensor) not in self.names:
            self.names[id(tensor)] = f't{len(self.tensors)}'
            self.tensors.append(tensor)
        return self.names[id(tensor)]

    def write(self, value):
        """An argument of an operation in TorchScript. KeyError if it is an unknown tensor."""
        if isinstance(value, torch.Tensor):
            return self.names[id(value)]
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self.write, value))}]"
        if isinstance(value, float):
            return f"float('{value}')"  # also of inf
        return f"'{value}'" if isinstance(value, torch.device) else repr(value)

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        options = options or {}
        result = operation(*args, **options)
        if operation in ALIASES:
            self.names[id(result)] = self.write(args[0])
            self.tensors.append(result)
        elif isinstance(result, (torch.Tensor, tuple, list)):
            arguments = [self.write(value) for value in args]
            arguments += [f'{name}={self.write(value)}' for name, value in options.items()]
            results = [result] if isinstance(result, torch.Tensor) else result
            names = ', '.join(map(self.name, results))
            function = operation.overloadpacket  # such as aten.mm
            self.lines.append(f"    {names} = torch.ops.{function}({', '.join(arguments)})")
        else:  # a number from tensors would be another one in the next step
            assert not any(isinstance(value, torch.Tensor) for value in args), operation
        return result

    def compile(self, outputs):
        """The TorchScript function of the inputs that computes these tensors."""
        lines = [*self.lines, f'    return {self.write(outputs)}', '']
        return torch.jit.CompilationUnit('\n'.join(lines)).play


def record(model, weights, idx, targets, num_parts):
    """Records the forward pass for idx and targets, one of num_parts of a batch.

    While gradients are enabled it records the backward pass, too. Returns a function of all
    weights, idx and targets, and the weights that have gradients. The function gives this part's
    share of the loss and its gradients.
    """
    trained_weights = [p for p in weights if p.requires_grad and torch.is_grad_enabled()]
    with Recorder([*weights, idx, targets]) as recorder:
        _, loss = type(model).forward(model, idx, targets)
        share = loss / num_parts
        grads = []
        if trained_weights:
            with torch.autocast('cpu', enabled=False):
                grads = torch.autograd.grad(share, trained_weights, allow_unused=True)
    used = [(p, grad) for p, grad in zip(trained_weights, grads) if grad is not None]
    return recorder.compile([share, *(grad for _, grad in used)]), [p for p, _ in used]


# -----------------------------------------------------------------------------
# playing
@functools.cache
def start_threads(count):
    """Threads that play parts next to the main thread."""
    return ThreadPoolExecutor(max(1, count), 'player')


@contextlib.contextmanager
def prepare_thread(num_threads, num_threads_after):
    """In this context this thread uses so many of torch's threads, and only computes."""
    torch.set_num_threads(num_threads)
    try:
        # with optimization TorchScript computes the second time in another order
        with torch.no_grad(), torch.autocast('cpu', enabled=False), \
                torch.jit.optimized_execution(False):
            yield
    finally:
        torch.set_num_threads(num_threads_after)


def play(script, arguments, num_threads):
    """script(*arguments) in a thread that start_threads() started."""
    with prepare_thread(*num_threads):
        return script(*arguments)


def play_parts(script, weights, parts):
    """The sums of the script's results for the parts of a batch, which are played together."""
    total_threads = torch.get_num_threads()
    num_threads = max(1, total_threads // len(parts)), total_threads
    first_part, *other_parts = parts
    pool = start_threads(len(other_parts))
    futures = [pool.submit(play, script, (*weights, *part), num_threads) for part in other_parts]
    with prepare_thread(*num_threads):
        sums = script(*weights, *first_part)
        for future in futures:
            torch._foreach_add_(sums, future.result())
    return sums


class PlayedLoss(torch.autograd.Function):
    """The loss of a batch by a script of record(), which also computes the gradients."""

    @staticmethod
    def forward(ctx, script, weights, parts, *trained_weights):
        loss, *grads = play_parts(script, weights, parts)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster training step has no second derivative: '
                               'call the model outside of kernels.loss_only() for this')
        grads = ctx.saved_tensors
        if grad != 1:
            grads = torch._foreach_mul(grads, grad)
        return None, None, None, *grads


class Player:
    """Plays the training step of a model, as long as the model is as it was."""

    def __init__(self, model):
        modules = list(model.modules())
        self.config = model.config
        self.parts = modules[1:]  # not the model: players must not keep it alive
        self.weights = list(model.parameters())
        self.methods = list_methods(model, modules)
        self.places = list_places(modules, type(model).forward.__globals__)
        self.children = [module._modules for module in modules]
        self.hooks = [getattr(module, name) for module in modules
                      for name in FORWARD_HOOKS + BACKWARD_HOOKS]
        self.state = self.read_state()
        self.recordings = {}  # what record() returned, by the kind of the batch

    def read_state(self):
        """All that decides what an unchanged model computes, except the numbers in its weights."""
        methods = [getattr(cls, name) for cls, name in self.methods]
        return [*map(type, self.parts), *methods,
                *(getattr(method, '__code__', None) for method in methods),
                *map(dict.get, *zip(*self.places)), *map(len, self.children),
                self.config.vocab_size, *(p.requires_grad for p in self.weights),
                *(p.dtype for p in self.weights), *(p._backward_hooks for p in self.weights)]

    def is_current(self):
        """Whether the model is as it was."""
        return not any(self.hooks) and are_same(self.read_state(), self.state)

    def forward(self, model, idx, targets=None):
        """GPT.forward() of this model, which may give None for the logits."""
        if not can_play(model.config, idx, targets):
            return type(model).forward(model, idx, targets)
        num_parts = next(n for n in range(torch.get_num_threads(), 0, -1) if len(idx) % n == 0)
        parts = list(zip(idx.contiguous().chunk(num_parts), targets.contiguous().chunk(num_parts)))
        dtype = torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')
        kind = idx.shape, idx.dtype, targets.dtype, num_parts, dtype, torch.is_grad_enabled()
        if kind not in self.recordings:
            self.recordings[kind] = record(model, self.weights, *parts[0], num_parts)
        script, trained_weights = self.recordings[kind]
        return None, PlayedLoss.apply(script, self.weights, parts, *trained_weights)


# -----------------------------------------------------------------------------
# whether a recording computes the same as the model
players = weakref.WeakKeyDictionary()  # of each model, or None; a copy of a model gets its own


def find_player(model):
    """The player of this model. None if it can't be played, or was changed since the first call."""
    if model not in players:
        players[model] = Player(model) if can_record(model) else None
    player = players[model]
    return player if player and player.is_current() else None


def exclude(model):
    """Leaves this model out, which something else makes faster."""
    players[model] = None


def can_record(model):
    """Whether nobody has changed the model, and its training step draws no random numbers."""
    weights = list(model.parameters())
    if any(p.device.type != 'cpu' or p._backward_hooks for p in weights):
        return False
    if any(isinstance(part, nn.Dropout) and part.p for part in model.modules()):
        return False
    return (is_original_model(model) and is_torchs(F.dropout) and not is_watched(model)
            and isinstance(model.loss_head, LossHead) and model.loss_head.can_join(model.lm_head))


def can_play(config, idx, targets):
    """Whether a recording can take this batch, and computes the same."""
    if targets is None or is_observed():
        return False
    if idx.dim() != 2 or idx.shape != targets.shape or idx.size(1) != config.block_size:
        return False
    is_small = (idx.numel() * config.n_embd <= MAX_ELEMENTS
                and idx.numel() * config.vocab_size <= MAX_LOGITS)
    # with ignored targets the parts would have different numbers of targets
    return is_small and idx.device.type == 'cpu' and not (targets < 0).any()


def is_observed():
    """Whether something looks at each operation: a debugger, a profiler, a mode of torch, a hook."""
    return (torch.compiler.is_compiling() or has_global_hook() or torch.is_anomaly_enabled()
            or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch._C._autograd._top_saved_tensors_default_hooks(False)
            or torch._C._autograd._profiler_enabled() or sys.gettrace())


def list_methods(model, modules):
    """The methods that compute something: (class, name), ..."""
    classes = set(map(type, modules))
    return [(type(model), 'embed'),
            *((cls, name) for cls in classes for name in ('forward', '__call__'))]


def list_places(modules, code_globals):
    """Where a change would change what the modules compute: (a dict, a key in it), ...

    code_globals are those of the model's code.
    """
    places = [(code_globals, name) for name in GLOBALS]
    places += [(vars(F), name) for name in FUNCTIONS]
    for module in modules:
        own_names = vars(module).keys() - vars(nn.Module()).keys()
        places += [(vars(module), name) for name in own_names | {'forward', '_compiled_call_impl'}]
        places += [(module._parameters, name) for name in module._parameters]
        places += [(module._modules, name) for name in module._modules]
    return places


def are_same(values, others):
    """Whether the values are the same objects, or equal numbers."""
    if all(map(operator.is_, values, others)):
        return True
    return all(a is b or (isinstance(a, (int, float, str, tuple)) and a == b)
               for a, b in zip(values, others))
