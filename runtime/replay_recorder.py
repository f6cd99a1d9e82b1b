"""
Writes down the operations of a training step in TorchScript, which runs them without Python.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

TENSOR_TYPES = torch.Tensor, type(None)  # some operations give None in the place of a tensor


class NotRecorded(Exception):
    """An operation whose result would be another one in the next step."""


class Recorder(TorchDispatchMode):
    """In this context torch's operations on the inputs are written down in TorchScript.

    A view of a result is only written where an operation needs it, in one call, however many calls
    have made it. That leaves out a fifth of all calls.
    """

    def __init__(self, inputs):
        super().__init__()
        self.names = {}  # by the id of a tensor
        self.tensors = []  # they must live, so that no other tensor gets the same id
        # by storage: the first result in it, or None if an input is in it
        self.owners = dict.fromkeys(map(get_storage, inputs))
        self.views = {}  # their names, by the call
        arguments = ', '.join(f'{self.name(tensor)}: Tensor' for tensor in inputs)
        self.lines = [f'def play({arguments}):']

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # otherwise torch imports its compiler, which takes a second

    def name(self, tensor):
        """The name of a tensor. A tensor without one gets the next."""
        if id(tensor) not in self.names:
            self.names[id(tensor)] = f't{len(self.names)}'
            self.tensors.append(tensor)
        return self.names[id(tensor)]

    def write(self, value):
        """An argument of an operation in TorchScript."""
        if isinstance(value, torch.Tensor):
            return self.names.get(id(value)) or self.write_view(value)
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self.write, value))}]"
        if isinstance(value, float):
            return f"float('{value}')"  # also of inf
        return f"'{value}'" if isinstance(value, torch.device) else repr(value)

    def write_view(self, tensor):
        """The name of a view of a result, which may be the result itself."""
        owner = self.owners.get(get_storage(tensor))
        if owner is None:
            raise NotRecorded('a tensor comes from outside')
        size, stride, offset = layout = get_layout(tensor)
        if layout == get_layout(owner):
            return self.names[id(owner)]
        call = f'torch.as_strided({self.names[id(owner)]}, {size}, {stride}, {offset})'
        if call not in self.views:
            self.views[call] = self.name(tensor)
            self.lines.append(f'    {self.views[call]} = {call}')
        return self.views[call]

    def is_view(self, tensor):
        """Whether write_view() can write this tensor.

        Views of the inputs are written as operations, because an input may be elsewhere in memory
        in the next step. TorchScript takes no empty list for a size.
        """
        return self.owners.get(get_storage(tensor)) is not None and tensor.dim() > 0

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        if operation is torch.ops.aten.view.dtype:
            raise NotRecorded(f'TorchScript has no {operation}')
        options = options or {}
        result = operation(*args, **options)
        results = result if isinstance(result, (tuple, list)) else [result]
        is_mutable = operation._schema.is_mutable
        if result is None or any(not isinstance(value, TENSOR_TYPES) for value in results):
            if is_mutable or any(isinstance(value, torch.Tensor) for value in args):
                raise NotRecorded(f'{operation} gives no tensors')
        elif is_mutable or not all(map(self.is_view, results)):
            arguments = [self.write(value) for value in args]
            arguments += [f'{name}={self.write(value)}' for name, value in options.items()]
            names = ', '.join(map(self.name, results))
            function = operation.overloadpacket  # such as aten.mm
            self.lines.append(f"    {names} = torch.ops.{function}({', '.join(arguments)})")
            for tensor in results:
                self.owners.setdefault(get_storage(tensor), tensor)
        return result

    def write_function(self, outputs):
        """The TorchScript function of the inputs that computes these tensors, as text."""
        names = self.write(outputs)  # which may need more lines
        return '\n'.join([*self.lines, f'    return {names}', ''])


def get_storage(tensor):
    """The identity of the memory that a tensor shares with its views. None without a tensor."""
    return None if tensor is None else tensor.untyped_storage()._cdata


def get_layout(tensor):
    """Which numbers of its memory a tensor consists of."""
    return list(tensor.size()), list(tensor.stride()), tensor.storage_offset()


def compile_function(text):
    """The function of this text. It keeps what the variables here refer to: no tensors."""
    return torch.jit.CompilationUnit(text).play


def record(model, weights, idx, targets, num_parts):
    """Records the forward pass for idx and targets, one of num_parts of a batch.

    While gradients are enabled it records the backward pass, too. Returns a function of all
    weights, idx and targets, and the weights that have gradients. The function gives this part's
    share of the loss and its gradients.
    """
    is_enabled, dtype = torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu')
    with Recorder([*weights, idx, targets]) as recorder:
        # without the cache, which may have weights that were cast before
        with torch.autocast('cpu', dtype, is_enabled, cache_enabled=False):
            _, loss = type(model).forward(model, idx, targets)
        share = loss / num_parts
        pairs = []
        if share.requires_grad:
            trainable_weights = [p for p in weights if p.requires_grad]
            with torch.autocast('cpu', enabled=False):
                grads = torch.autograd.grad(share, trainable_weights, allow_unused=True)
            pairs = [(p, grad) for p, grad in zip(trainable_weights, grads) if grad is not None]
    text = recorder.write_function([share, *(grad for _, grad in pairs)])
    return compile_function(text), [p for p, _ in pairs]
