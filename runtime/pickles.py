"""
Pickles as data: what a stranger's checkpoint may make torch.load do.

With weights_only=True torch.load calls only functions that it knows. Some of them take any amount
of memory or time, or overflow the stack. So this reads the pickle first, in the same way, and
calls nothing that it names.
"""
import pickletools
import re

# operations by what they put on the stack: their argument, or a value
ARGUMENTS = set('BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING'.split())
VALUES = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
CONTAINERS = {'EMPTY_LIST': list, 'EMPTY_DICT': dict, 'EMPTY_SET': set}
# those that take all items since the last mark from the stack, and those that take so many
MARKED = {'TUPLE', 'APPENDS', 'SETITEMS'}
COUNTS = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'REDUCE': 2,
          'BUILD': 1, 'BINPERSID': 1}
# the names of types, which are values
TYPE_NAME = re.compile(r'torch ((b?float|q?u?int|complex)\d\w*|bool|\w+Storage)|'
                       r'torch\.storage UntypedStorage')


def check(pickled):
    """Raises an exception unless the pickle has only plain values and tensors.

    A tensor is None here: its data are in other files, and its size is checked when it is loaded.
    """
    stack, outer_stacks, memo = [], [], {}
    num_copies = 0  # of items, by functions
    for opcode, arg, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in MARKED:
            items, stack = stack, outer_stacks.pop()
        elif name in COUNTS:
            items = [stack.pop() for _ in range(COUNTS[name])][::-1]
        if name in ARGUMENTS:
            stack.append(arg)
        elif name in VALUES:
            stack.append(VALUES[name])
        elif name in CONTAINERS:
            stack.append(CONTAINERS[name]())
        elif name == 'MARK':
            outer_stacks.append(stack)
            stack = []
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[arg] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[arg])
        elif name.startswith('TUPLE'):
            stack.append(tuple(items))
        elif name.startswith('APPEND'):
            list.extend(stack[-1], items)
        elif name.startswith('SETITEM'):
            check_keys(items[::2])
            dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
        elif name == 'GLOBAL':
            stack.append(check_name(arg))
        elif name == 'REDUCE':
            num_copies += sum(len(value) for value in items[1] if hasattr(value, '__len__'))
            if num_copies > len(pickled):  # it copies one value again and again
                raise ValueError('it asks for more memory than it can need')
            stack.append(FUNCTIONS[check_name(items[0])](*items[1]))
        elif name == 'BUILD':  # an OrderedDict may have attributes
            if not isinstance(stack[-1], dict):
                raise ValueError('it sets attributes, and data needs none')
        elif name == 'BINPERSID':  # the numbers of a tensor
            check_keys(items)
            stack.append(None)
        elif name not in ('PROTO', 'STOP'):
            raise ValueError(f'it asks for {name}, and data needs no code')


def check_name(name):
    """The name of a function or type, as Python 3 has it; ValueError if it isn't of plain data."""
    if type(name) is not str:
        raise ValueError('it calls something without a name')
    name = name.replace('__builtin__ ', 'builtins ')
    if name not in FUNCTIONS and not TYPE_NAME.fullmatch(name):
        raise ValueError(f'it asks for {name[:100]}, and data needs no code')
    return name


def check_keys(keys):
    """ValueError if one of the keys is a tuple with tuples in it.

    To hash a million tuples inside one another overflows the stack.
    """
    for key in keys:
        if type(key) is tuple and any(type(item) is tuple for item in key):
            raise ValueError('it has a key with tuples inside one another')


# -----------------------------------------------------------------------------
# each takes the place of a function that a pickle may name
def skip_tensor(*args):
    """None, for a tensor."""


def skip_text(*parts):
    """None, for a device or a layout, which is made of texts and numbers."""
    if any(type(part) not in (str, int) for part in parts):
        raise ValueError('it has a device or a layout without a name')


def copy_dict(items=None):
    """A dict for an OrderedDict or a Counter, which begins with these items."""
    if items is not None and type(items) is not dict:
        raise ValueError('it makes a dict of something else')
    return dict(items or ())


def make_set(items=()):
    """A set of the items."""
    check_keys(items)
    return set(items)


def copy_bytes(content=b''):
    """Bytes for a bytearray. torch would also make one of a number, of so many zeros."""
    if type(content) is not bytes:
        raise ValueError('it makes bytes of something else')
    return content


def encode(text, encoding):
    """The bytes for which a text stands. torch would also use any other encoding of Python."""
    if encoding != 'latin1':
        raise ValueError('it has bytes in an unusual encoding')
    return text.encode('latin1')


FUNCTIONS = {
    'torch._utils _rebuild_tensor_v2': skip_tensor, 'torch._utils _rebuild_tensor_v3': skip_tensor,
    'torch._utils _rebuild_parameter': skip_tensor, 'torch Size': tuple,
    'torch device': skip_text, 'torch.serialization _get_layout': skip_text,
    'collections OrderedDict': copy_dict, 'collections Counter': copy_dict,
    'builtins set': make_set, 'builtins complex': complex, 'builtins bytearray': copy_bytes,
    '_codecs encode': encode}
