"""
Plays the training step of a small model on a CPU from a recording.

A small model spends much of a step between torch's operations: in Python, in autograd, and where
threads wait for each other. So its first step is recorded, as a list of operations that TorchScript
runs without Python. Each thread plays the list for its own part of the batch. Then threads wait for
each other once in a step, and not in each operation.

Only a model whose code nobody has changed is recorded. Each call looks for changes. After a change
the step is recorded again, or the model runs as it is written. tests/test_replay.py compares both.
"""
import contextlib
import functools
import operator
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch.nn import functional as F

from runtime import originals
from runtime.console import get_first_line, note
from runtime.replay_checks import MAX_WEIGHTS, can_play, can_record, count_parts, is_changed
from runtime.replay_recorder import NotRecorded, record

MAX_RECORDINGS = 16  # kinds of batches
METHODS = 'forward', '__call__', 'embed', 'compute'  # which compute something
# attributes that decide what a module computes, next to those that its methods name
ATTRIBUTES = {'forward', 'embed', 'compute', '_compiled_call_impl', '_parameters', '_modules',
              *originals.FORWARD_HOOKS, *originals.BACKWARD_HOOKS}
TORCH_FUNCTIONS = *originals.PLAIN_FUNCTIONS, *originals.FUNCTIONS.values()


@functools.cache
def start_threads(count):
    """Threads that each play a part of a batch, while the main thread plays another one."""
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, 'player', prepare_thread)
    barrier = threading.Barrier(count)
    list(pool.map(lambda _: barrier.wait(), range(count)))  # now all of them are prepared
    torch.set_num_threads(num_threads)  # new threads of others start with the last number
    return pool


def prepare_thread():
    """Sets what torch keeps for each thread."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # otherwise the thread's first operation would set the number again
    torch.set_grad_enabled(False)
    # with optimization TorchScript computes the second time in another order
    torch._C._set_graph_executor_optimize(False)


@contextlib.contextmanager
def use_one_thread():
    """In this context the main thread computes as those of start_threads() do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast('cpu', enabled=False), \
                torch.jit.optimized_execution(False):
            yield
    finally:
        torch.set_num_threads(num_threads)


def play_parts(script, weights, parts):
    """The sums of the script's results for the parts of a batch, which are played together."""
    first_part, *other_parts = parts
    futures = []
    if other_parts:
        pool = start_threads(torch.get_num_threads() - 1)
        futures = [pool.submit(script, *weights, *part) for part in other_parts]
    try:
        with use_one_thread():
            sums = script(*weights, *first_part)
            for future in futures:
                torch._foreach_add_(sums, future.result())
    finally:
        wait(futures)  # also after an error they must not read the weights any longer
    return sums


class ReplayFunction(torch.autograd.Function):
    """The loss of a batch by a script of record(), which also computes the gradients."""

    @staticmethod
    def forward(ctx, script, weights, parts, *weights_with_gradients):
        loss, *grads = play_parts(script, weights, parts)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster training step has no second derivative: '
                               'call the model outside of kernels.loss_only() for this')
        grads = ctx.saved_tensors
        if torch._C._are_functorch_transforms_active() or grad != 1:
            grads = [grad * weight_grad for weight_grad in grads]
        return None, None, None, *grads


def compute_loss(model, idx, targets=None):
    """GPT.forward() of a model in kernels.loss_only(), from a recording if that is the same."""
    if can_play(model, idx, targets):
        forward = vars(model).pop('forward', None)  # loss_only() has set it: it is no change
        try:
            player = find_player(model, len(idx))
        finally:
            if forward:
                vars(model)['forward'] = forward
        recording, parts = player.find_recording(model, idx, targets) if player else (None, [])
        if recording:
            script, weights = recording
            return None, ReplayFunction.apply(script, player.weights, parts, *weights)
    return type(model).forward(model, idx, targets)


class Player:
    """The recordings of a model's step, as the model is now. LossHead.player keeps it."""

    def __init__(self, model):
        self.config = model.config
        self.attributes = vars(model)
        self.modules = list(model.modules())
        self.weights = list(model.parameters())
        self.num_weights = sum(p.numel() for p in self.weights)
        self.classes = set(map(type, self.modules))
        places = list_places(self.modules, type(model).forward.__globals__)
        present_places = [(attributes, name) for attributes, name in places if name in attributes]
        self.places = list(zip(*present_places))
        self.absences = list_absences(places)
        self.children = [module._modules for module in self.modules]
        self.hooks = [getattr(module, name) for module in self.modules
                      for name in originals.FORWARD_HOOKS + originals.BACKWARD_HOOKS]
        self.state = self.read_state()
        self.recordings = {}  # what record() returned, by the kind of the batch

    def __reduce__(self):
        return type(None), ()  # a copy of the model gets its own

    def read_state(self):
        """All that decides what an unchanged model computes, except the numbers in its weights.

        It consists of objects that must be the same ones, and of values that must be equal.
        """
        methods = [getattr(cls, name, None) for cls in self.classes for name in METHODS]
        codes = [method and getattr(method, '__code__', None) for method in methods]
        objects = [*map(type, self.modules), *methods, *codes, *map(dict.get, *self.places)]
        values = [self.config.vocab_size, *map(len, self.children),
                  *(names.isdisjoint(absent_names) for names, absent_names in self.absences),
                  *((p.shape, p.stride(), p.dtype, p.requires_grad) for p in self.weights)]
        return objects, values

    def is_current(self, model):
        """Whether the model is this one, and is as it was."""
        objects, values = self.read_state()
        is_same = vars(model) is self.attributes and values == self.state[1]
        return is_same and are_same(objects, self.state[0])

    def find_recording(self, model, idx, targets):
        """The recording for batches like this one, or None; and the parts of the batch."""
        if any(self.hooks) or any(p._backward_hooks for p in self.weights):
            return None, []
        num_parts = count_parts(len(idx), MAX_WEIGHTS // self.num_weights)
        if num_parts == 0:
            return None, []
        parts = list(zip(idx.contiguous().chunk(num_parts), targets.contiguous().chunk(num_parts)))
        kind = (idx.shape, idx.dtype, targets.dtype, num_parts, torch.is_grad_enabled(),
                torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu'))
        if kind not in self.recordings:
            if len(self.recordings) == MAX_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]  # the oldest
            try:
                self.recordings[kind] = record(model, self.weights, *parts[0], num_parts)
            except (NotRecorded, RuntimeError) as e:  # if it is a mistake, it comes up again
                note(f'the training step runs as it is written, because {get_first_line(e)}')
                self.recordings[kind] = None
        return self.recordings[kind], parts


# -----------------------------------------------------------------------------
# whether a recording computes the same as the model
def find_player(model, num_rows):
    """The player of this model, as it is now. None if its step can't be recorded."""
    player = model.loss_head.player
    if player is None or not player.is_current(model):
        player = None
        if can_record(model, num_rows) and not is_changed(model):
            player = Player(model)
        model.loss_head.player = player
    return player


def list_places(modules, code_globals):
    """Where a change would change what the modules compute: (a dict, a key in it), ...

    code_globals are those of the model's code.
    """
    places = [(code_globals, name) for name in originals.GLOBALS]
    places += [(vars(F), name) for name in TORCH_FUNCTIONS]
    for module in modules:
        methods = [getattr(type(module), name, None) for name in METHODS]
        codes = [getattr(method, '__code__', None) for method in methods]
        names = {name for code in codes if code for name in code.co_names}
        places += [(vars(module), name) for name in (names | ATTRIBUTES) - {'training'}]
        places += [(module._parameters, name) for name in module._parameters]
        places += [(module._modules, name) for name in module._modules]
    return places


def list_absences(places):
    """The places without a value: (the names in a dict, the names that are not in it), ..."""
    absences = {}
    for attributes, name in places:
        if name not in attributes:
            absences.setdefault(id(attributes), (attributes.keys(), set()))[1].add(name)
    return list(absences.values())


def are_same(values, others):
    """Whether the values are the same objects, or equal numbers."""
    if all(map(operator.is_, values, others)):
        return True
    return all(a is b or (type(a) in (int, float, str) and a == b) for a, b in zip(values, others))
