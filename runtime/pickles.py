"""
Pickles as data: what is in a checkpoint or a meta.pkl that a stranger has made.

Python's pickle.load would run any code that the file names. torch.load with weights_only=True calls
only functions that it knows, but some of them take any amount of memory or time, or overflow the
stack. So read() goes through a pickle first, and calls nothing that the file names.
"""
import pickletools
import re
import struct

# operations by what they put on the stack: their argument, a value, a list or a tuple
ARGUMENTS = set("""
    INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8""".split())
VALUES = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
LISTS = {'EMPTY_LIST', 'LIST', 'EMPTY_SET', 'FROZENSET'}
TUPLES = {'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3'}
# those that take all items since the last mark from the stack, and those that take so many
MARKED = {'LIST', 'TUPLE', 'FROZENSET', 'DICT', 'APPENDS', 'ADDITEMS', 'SETITEMS'}
COUNTS = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'STACK_GLOBAL': 2,
          'REDUCE': 2, 'BUILD': 1, 'BINPERSID': 1}
# those that torch.load doesn't know
META_OPERATIONS = set("""
    INT LONG FLOAT STRING BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 LIST FROZENSET DICT ADDITEMS STACK_GLOBAL MEMOIZE PUT GET FRAME""".split())
# the names of types, which are values
TYPE_NAME = re.compile(r'torch ((b?float|q?u?int|complex)\d\w*|bool|\w+Storage)|'
                       r'torch\.storage UntypedStorage')
META_TYPE_NAME = re.compile(r'numpy (u?int|float)\d+|'
                            r'builtins (int|long|float|str|unicode|list|dict)')
NUMBERS = dict(zip('b1 i1 i2 i4 i8 u1 u2 u4 u8 f4 f8'.split(), '?bhiqBHIQfd'))  # numpy's, struct's


def read(pickled, is_meta=False):
    """The plain values in a pickle. Sets become lists, tensors None, and types their names.

    The size of a tensor is checked when it is loaded. ValueError or another exception if there is
    anything else, or if it would take more memory than it can need. A meta.pkl may also have
    numbers of numpy and such, and dicts with other keys, whose items are left out.
    """
    functions = {**FUNCTIONS, **META_FUNCTIONS} if is_meta else FUNCTIONS
    stack, outer_stacks, memo = [], [], {}
    num_copies = 0  # of items, by functions
    for opcode, arg, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in META_OPERATIONS and not is_meta:
            raise ValueError(f'it asks for {name}, and torch has no such operation')
        items = []
        if name in MARKED:
            items, stack = stack, outer_stacks.pop()
        elif name in COUNTS:
            items = [stack.pop() for _ in range(COUNTS[name])][::-1]
        if name in ARGUMENTS:
            stack.append(arg)
        elif name in VALUES:
            stack.append(VALUES[name])
        elif name in LISTS:
            stack.append(items)
        elif name in TUPLES:
            stack.append(tuple(items))
        elif name in ('APPEND', 'APPENDS', 'ADDITEMS'):
            list.extend(stack[-1], items)
        elif name in ('EMPTY_DICT', 'DICT', 'SETITEM', 'SETITEMS'):
            if name.endswith('DICT'):
                stack.append({})
            for key, value in zip(items[::2], items[1::2], strict=True):
                if is_plain_key(key):
                    dict.update(stack[-1], {key: value})
                elif not is_meta:
                    raise ValueError('it has a key that is not a text or a number')
        elif name == 'MARK':
            outer_stacks.append(stack)
            stack = []
        elif name.endswith('PUT') or name == 'MEMOIZE':
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name.endswith('GET'):
            stack.append(memo[arg])
        elif name.endswith('GLOBAL'):
            stack.append(check_name(arg or ' '.join(items), is_meta))
        elif name == 'REDUCE':
            num_copies += sum(len(value) for value in items[1] if hasattr(value, '__len__'))
            if num_copies > 4 * len(pickled):  # it copies one value again and again
                raise ValueError('it asks for more memory than it can need')
            if items[0] not in functions:
                raise ValueError('it calls something that is not a function')
            stack.append(functions[items[0]](*items[1]))
        elif name == 'BUILD':
            check_attributes(stack[-1], items[0])
        elif name == 'BINPERSID':  # the numbers of a tensor
            if not is_plain_key(items[0]):
                raise ValueError('it has a tensor without a name')
            stack.append(None)
        elif name not in ('PROTO', 'FRAME', 'STOP'):
            raise ValueError(f'it asks for {name}, and data needs no code')
    return stack.pop()


def check_name(name, is_meta):
    """The name of a function or type, as Python 3 has it; ValueError if it isn't of plain data."""
    name = name.replace('__builtin__ ', 'builtins ').replace('numpy.core.', 'numpy._core.')
    is_known = name in FUNCTIONS or TYPE_NAME.fullmatch(name)
    if not is_known and is_meta:
        is_known = name in META_FUNCTIONS or META_TYPE_NAME.fullmatch(name)
    if not is_known:
        raise ValueError(f'it asks for {name[:100]}, and data needs no code')
    return name


def check_attributes(value, attributes):
    """ValueError unless the value may have attributes: an OrderedDict, or a dtype of numpy.

    A dtype is a name here. Only its byte order matters.
    """
    is_dtype = isinstance(value, str) and attributes[1] in ('<', '|')
    if not is_dtype and not isinstance(value, dict):
        raise ValueError('it sets attributes, and data needs none')


def is_plain_key(key, depth=2):
    """Whether a key is a text or a number, or a short tuple of them, or a tuple of such tuples.

    To hash a million tuples inside one another overflows the stack.
    """
    if type(key) is tuple:
        return depth > 0 and len(key) <= 20 and all(is_plain_key(x, depth - 1) for x in key)
    return type(key) in (str, int, float, bool, bytes, type(None))


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


def make_dict(factory=None):
    """A dict for a defaultdict."""
    return {}


def list_items(items=()):
    """The items of a set."""
    if not all(map(is_plain_key, items)):
        raise ValueError('it has a set of other things than texts and numbers')
    return list(items)


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


def name_dtype(name, *flags):
    """The name of a dtype of numpy: 'i8', or 'U7' for a text of 7 characters."""
    return name


def unpack_scalar(dtype, data):
    """numpy's number or text in these bytes."""
    if dtype in NUMBERS:
        return struct.unpack('<' + NUMBERS[dtype], data)[0]  # raises at another length
    if not dtype.startswith('U') or not len(data) == 4 * int(dtype[1:]) <= 256:
        raise ValueError(f'it has {dtype[:20]} of numpy with {len(data)} bytes')
    return data.decode('utf-32-le')


FUNCTIONS = {
    'torch._utils _rebuild_tensor_v2': skip_tensor, 'torch._utils _rebuild_tensor_v3': skip_tensor,
    'torch._utils _rebuild_parameter': skip_tensor, 'torch Size': tuple,
    'torch device': skip_text, 'torch.serialization _get_layout': skip_text,
    'collections OrderedDict': copy_dict, 'collections Counter': copy_dict,
    'builtins set': list_items, 'builtins complex': complex, 'builtins bytearray': copy_bytes,
    '_codecs encode': encode}
# those that torch.load doesn't know
META_FUNCTIONS = {
    'collections defaultdict': make_dict, 'builtins frozenset': list_items,
    'numpy dtype': name_dtype, 'numpy._core.multiarray scalar': unpack_scalar}
