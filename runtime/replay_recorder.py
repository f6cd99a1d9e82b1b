"""
Writes down the operations of a training step in TorchScript, which runs them without Python.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALIASES = torch.ops.aten.detach.default, torch.ops.aten.alias.default


class NotRecorded(Exception):
    """An operation whose result would be another one in the next step."""


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
        """The name of a tensor. A tensor without one gets the next."""
        if id(tensor) not in self.names:
            self.names[id(tensor)] = f't{len(self.tensors)}'
            self.tensors.append(tensor)
        return self.names[id(tensor)]

    def write(self, value):
        """An argument of an operation in TorchScript."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self.names:
                raise NotRecorded('a tensor comes from outside')
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
        elif any(isinstance(value, torch.Tensor) for value in args):
            raise NotRecorded(f'{operation} gives a number')
        return result

    def write_function(self, outputs):
        """The TorchScript function of the inputs that computes these tensors, as text."""
        return '\n'.join([*self.lines, f'    return {self.write(outputs)}', ''])


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
