"""
Knows the original parts of model.py: whether a part is still one of them, or somebody changed it.
"""
import ast
import functools
import hashlib
import inspect
import textwrap
import types

import torch.nn as nn
from torch.nn import functional as F

# digests of the methods in model.py that kernels.py and inference.py were written for. After a
# change tests/test_kernels.py prints the new one; first make those two modules fit the new source
DIGESTS = {
    'Attention.forward': '12cff363d97eb394',
    'SquaredReLU.forward': '42eabf36ac86bf8c',
    'LossHead.forward': '6c88a7a747384b55',
    'CausalSelfAttention.forward': '86ff55f6637a2dd9',
    'Block.forward': '99be7f9a66cb6549',
    'MLP.forward': '6cb2a2276366942d',
    'RotaryPositions.forward': 'c41c45d5692b83da',
    'GPT.embed': '6b84ca2cf75e9ae6',
    'GPT.forward': 'bec3732d642aaa1b',
}
# the functions of torch that the methods call
FUNCTIONS = {'Attention': 'scaled_dot_product_attention', 'SquaredReLU': 'relu',
             'LossHead': 'cross_entropy', 'Dropout': 'dropout', 'Linear': 'linear'}


def is_unchanged(module, kind):
    """Whether this is the class `kind` of model.py or torch.nn, and computes what it did."""
    cls = type(module)
    if not isinstance(module, nn.Module) or is_patched(module):
        return False
    if kind in FUNCTIONS and not is_torchs(getattr(F, FUNCTIONS[kind])):
        return False
    if kind in ('Dropout', 'Linear'):
        return cls is getattr(nn, kind) and is_torchs(cls.forward)
    return cls.__name__ == kind and has_digest(module, f'{kind}.forward')


def has_digest(module, method):
    """Whether this module's class, whatever its name, has the original method, 'GPT.embed' say."""
    function = getattr(type(module), method.partition('.')[2], None)
    return compute_digest(function) == DIGESTS[method]


def is_patched(module):
    """Whether this module has hooks or a forward() of its own."""
    hooks = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return 'forward' in vars(module) or any(getattr(module, name) for name in hooks)


def is_torchs(function):
    """Whether torch defines this function, so it isn't a patch."""
    module = getattr(function, '__module__', None) or ''
    return module.startswith('torch.') and not hasattr(function, '__wrapped__')


@functools.lru_cache(None)
def compute_digest(function):
    """A digest of a function's code without comments and docstring; '' if it can't be found."""
    if not isinstance(function, types.FunctionType) or hasattr(function, '__wrapped__'):
        return ''
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
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
