"""
Knows the original parts of model.py and torch: whether somebody has changed one of them.
"""
import ast
import functools
import hashlib
import inspect
import math
import textwrap
import types
import weakref

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from runtime.console import note

# digests of the methods in model.py that the faster forms and the KV cache were written for. After
# a change tests/test_kernels.py prints the new one; first make those fit the new source
DIGESTS = {
    'Attention.forward': '27a13382daa66f30',
    'SquaredReLU.forward': '42eabf36ac86bf8c',
    'LossHead.forward': '6f8f94cda0206749',
    'CausalSelfAttention.forward': '5704f20bd05297ac',
    'Block.forward': '99be7f9a66cb6549',
    'MLP.forward': '6cb2a2276366942d',
    'RotaryPositions.forward': '0fc9a0a3e2f6a2cd',
    'GPT.embed': 'bf22ec44f589115d',
    'GPT.forward': '1c2aff2962665e49',
    'GPT.generate': '7552f785032c80ad',
}
# the functions of torch that the methods call
FUNCTIONS = {'Attention': 'scaled_dot_product_attention', 'SquaredReLU': 'relu',
             'LossHead': 'cross_entropy', 'Dropout': 'dropout', 'Linear': 'linear'}
TORCH_CLASSES = 'Dropout', 'Linear'
# the parts that compute logits: model.py's, those of torch, and the functions that these call
CLASSES = ('GPT', 'Block', 'CausalSelfAttention', 'Attention', 'RotaryPositions', 'MLP',
           'SquaredReLU')
PLAIN_CLASSES = 'Linear', 'Embedding', 'LayerNorm', 'Dropout', 'GELU', 'ModuleList', 'ModuleDict'
PLAIN_FUNCTIONS = 'embedding', 'pad', 'linear', 'layer_norm', 'gelu', 'relu'
# the modules that model.py imports
GLOBALS = {'torch': torch, 'nn': nn, 'F': F, 'math': math}
FORWARD_HOOKS = '_forward_hooks', '_forward_pre_hooks'
BACKWARD_HOOKS = '_backward_hooks', '_backward_pre_hooks'
noted_names = weakref.WeakKeyDictionary()  # by the model: what note_changes() has said


def is_original_model(model):
    """Whether nothing in the model was changed that computes logits."""
    return next(find_changes(model), None) is None


def find_changes(model):
    """What was changed that computes logits: classes of parts, and functions of torch."""
    for name in PLAIN_FUNCTIONS:
        if not is_torchs(getattr(F, name)):
            yield f'F.{name}'
    if not has_method(model, 'GPT.embed'):
        yield type(model).__name__
    for path, module in model.named_modules():
        if path.partition('.')[0] != 'loss_head' and not is_known(module):
            yield type(module).__name__


def note_changes(model, names):
    """Says which parts of the model run as they are written, each of them once."""
    new_names = set(names) - noted_names.setdefault(model, set())
    if new_names:
        noted_names[model] |= new_names
        note('changed parts of the model run as they are written, so they may be slower and take '
             'more memory: ' + ', '.join(sorted(new_names)))


def is_known(module):
    """Whether the module is a part of model.py or of torch that nobody has changed."""
    cls = type(module)
    if is_fast(module):
        return not is_patched(module) and cls.forward.__module__.startswith('runtime.')
    if cls.__name__ in PLAIN_CLASSES:
        return not is_patched(module) and is_torchs(cls.forward)
    return any(is_unchanged(module, kind) for kind in CLASSES)


def is_fast(module):
    """Whether the module is a faster form of a part of the model."""
    return type(module).__module__.startswith('runtime.')


def is_unchanged(module, kind):
    """Whether this module computes what the class `kind` of model.py or torch.nn did."""
    if not isinstance(module, nn.Module) or is_patched(module):
        return False
    if kind in FUNCTIONS and not is_torchs(getattr(F, FUNCTIONS[kind])):
        return False
    if kind in TORCH_CLASSES:
        return type(module) is getattr(nn, kind) and is_torchs(type(module).forward)
    return has_method(module, f'{kind}.forward')


def was_unchanged(part, kind):
    """is_unchanged() for a part that was replaced: somebody may have changed its class since.

    It is False in torch.func, which can't see into the faster forms.
    """
    if torch.compiler.is_compiling():
        return True
    return is_unchanged(part, kind) and not torch._C._are_functorch_transforms_active()


def has_method(module, name):
    """Whether this module has the method of model.py that `name` says: 'GPT.embed', for example."""
    method = name.partition('.')[2]
    return method not in vars(module) and is_original(getattr(type(module), method, None), name)


def is_original(function, name):
    """Whether this is the method of model.py that `name` says, and it calls the real torch."""
    if compute_digest(function) != DIGESTS[name]:
        return False
    return all(function.__globals__.get(key, value) is value for key, value in GLOBALS.items())


def is_patched(module):
    """Whether this module has hooks, or another forward() or __call__() than its class."""
    if 'forward' in vars(module) or not is_torchs(type(module).__call__):
        return True
    return has_forward_hook(module) or any(has_hook(module, name) for name in BACKWARD_HOOKS)


def has_hook(module, name):
    """Whether somebody has registered a hook. The hooks of FSDP gather weights, and don't count."""
    owners = [getattr(hook, '__module__', None) or '' for hook in getattr(module, name).values()]
    return any(not owner.startswith('torch.distributed.') for owner in owners)


def has_forward_hook(module):
    """Whether somebody has registered a hook that sees or changes what the module computes."""
    return any(has_hook(module, name) for name in FORWARD_HOOKS)


def has_global_hook(names=FORWARD_HOOKS + BACKWARD_HOOKS):
    """Whether somebody has registered a hook for all modules."""
    return any(getattr(nn.modules.module, f'_global{name}') for name in names)


def is_watched(model):
    """Whether something else than the model's parts may act when they are called.

    That is a hook, also one of torch.distributed, a mode of torch, a weight of another class than
    torch's, or torch.compile.
    """
    has_mode = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    if has_mode or has_global_hook() or model._compiled_call_impl:
        return True
    has_hook = any(getattr(module, name) for module in model.modules() for name in FORWARD_HOOKS)
    return has_hook or any(type(p) is not nn.Parameter for p in model.parameters())


def has_original_step(optimizer):
    """Whether nobody's code runs before, in or after the optimizer's step()."""
    hooks = [getattr(optimizer, f'_optimizer_step_{when}_hooks', None) for when in ('pre', 'post')]
    has_hook = any([*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks])
    steps = [getattr(cls, 'step', None) for cls in type(optimizer).__mro__ if 'step' in vars(cls)]
    return (bool(steps) and all(is_step_of_torch_or_ours(step) for step in steps)
            and not has_hook and 'step' not in vars(optimizer))


def is_step_of_torch_or_ours(step):
    """Whether this method, and all that it wraps, comes from torch or from runtime/."""
    while step:
        owner = getattr(step, '__globals__', {}).get('__name__', '')
        if not owner.startswith(('torch.', 'runtime.')):
            return False
        step = getattr(step, '__wrapped__', None)
    return True


def is_torchs(function):
    """Whether torch defines this function, so it isn't a patch."""
    if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
        return False
    module = function.__module__ or ''
    return module.startswith('torch.') and not hasattr(function, '__wrapped__')


def compute_digest(function):
    """A digest of a function's code without comments and docstring; '' if it can't be found."""
    if not isinstance(function, types.FunctionType) or hasattr(function, '__wrapped__'):
        return ''
    return compute_code_digest(function.__code__)


@functools.lru_cache(None)
def compute_code_digest(code):
    """compute_digest() of a function's code, which a notebook's %autoreload may exchange."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        if ast.get_docstring(tree.body[0]) is not None:
            del tree.body[0].body[0]
    except (OSError, SyntaxError, TypeError):  # TypeError: it is a lambda within a statement
        return ''
    return hashlib.sha256(repr(list_nodes(tree)).encode()).hexdigest()[:16]


def list_nodes(node):
    """A syntax tree as nested lists, the same in each version of Python."""
    if isinstance(node, ast.AST):
        names = [name for name in node._fields if name not in ('type_params', 'type_comment')]
        return [type(node).__name__, *(list_nodes(getattr(node, name, None)) for name in names)]
    return [list_nodes(item) for item in node] if isinstance(node, list) else node
