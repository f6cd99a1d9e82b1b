"""
Pickles as data: what is in a checkpoint or a meta.pkl that a stranger has made.

Python's pickle.load would run any code that the file names. torch.load with weights_only=True calls
only functions that it knows, but some of them take any amount of memory or time, or overflow the
stack. So read() goes through a pickle first, and calls nothing that the file names.
"""
import contextlib
import pickletools
import re
import struct

# operations by what they put on the stack: their argument, a value, a list, a tuple or a dict
ARGUMENTS = set("""
    INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    BYTEARRAY8""".split())
VALUES = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
CONTAINERS = {
    'EMPTY_LIST': list, 'LIST': list, 'EMPTY_SET': list, 'FROZENSET': list, 'EMPTY_DICT': dict,
    'DICT': dict, **dict.fromkeys('EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3'.split(), tuple)}
ADDITIONS = {'APPEND': list, 'APPENDS': list, 'ADDITEMS': list, 'SETITEM': dict, 'SETITEMS': dict}
# all operations that torch.load knows and torch.save may write, but for the values above
TORCH_OPERATIONS = set("""
    BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING BINUNICODE NONE NEWTRUE NEWFALSE
    EMPTY_LIST EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS
    MARK BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BUILD BINPERSID PROTO STOP""".split())
# the names of types, which are values
TYPE_NAME = re.compile(r'torch ((b?float|q?u?int|complex)\d\w*|bool|\w+Storage)|'
                       r'torch\.storage UntypedStorage')
META_TYPE_NAME = re.compile(r'numpy (u?int|float)\d+|'
                            r'builtins (int|long|float|str|unicode|list|dict)')
NUMBERS = dict(zip('b1 i1 i2 i4 i8 u1 u2 u4 u8 f4 f8'.split(), '?bhiqBHIQfd'))  # numpy's, struct's

# torch's unpickler and this one take up to 140 bytes for an operation, 200 for a container, 600 for
# a call and 4 for a byte of text: so 0.6 GB at most, and 7 bytes more for each byte of the file
FREE_OPERATIONS = 2 ** 22
CONTAINER_COST, CALL_COST = 4, 8  # operations
COLLISION_COST = 400  # of a key that may have the same hash as many others, which takes time
MAX_DEPTH = 100  # of containers inside one another


def read(pickled, is_meta=False, file_size=0, storages=None):
    """The plain values in a pickle. Sets become lists, tensors None, and types their names.

    ValueError if there is anything else, or if it would take more memory than a file of file_size
    can need. A list `storages` gets what the pickle says of the numbers of each tensor. A meta.pkl
    may also have numbers of numpy. In it any other object becomes a dict, and items of dicts with
    other keys than texts and numbers are left out.
    """
    reader = Reader(is_meta, FREE_OPERATIONS + max(file_size, len(pickled)) // 64, storages)
    try:
        for opcode, arg, _ in pickletools.genops(pickled):
            operands = reader.take(opcode)
            values = reader.execute(opcode, arg, operands)  # first: it may begin a new stack
            reader.stack += values
    except (ArithmeticError, AttributeError, LookupError, TypeError, struct.error) as e:
        raise ValueError('its pickle is damaged') from e
    return operands[0]


class Reader:
    """The machine that a pickle is a program for. It has a stack of values and a memo."""

    def __init__(self, is_meta, budget, storages=None):
        self.is_meta = is_meta
        self.storages = [] if storages is None else storages
        self.functions = {**FUNCTIONS, **META_FUNCTIONS} if is_meta else FUNCTIONS
        self.budget = budget  # operations that are left
        self.stack = []
        self.outer_stacks = []
        self.memo = {}
        self.containers = []  # all of them, so that no id comes twice
        self.depths = {}  # {id: depth} of containers
        self.nested_ids = set()  # of those inside another one

    def take(self, opcode):
        """The operands of an operation, from the stack; those since the last mark come last."""
        self.spend(CONTAINER_COST if opcode.name in CONTAINERS else 1)
        names, items = opcode.stack_before, []
        if pickletools.markobject in names:
            items, self.stack = self.stack, self.outer_stacks.pop()
            names = names[:names.index(pickletools.markobject)]
        elif opcode.name == 'POP' and not self.stack:
            self.stack = self.outer_stacks.pop()  # it takes the mark
            return []
        return [self.stack.pop() for _ in names][::-1] + items

    def spend(self, cost):
        """ValueError if the pickle has, or copies, more than it can need."""
        self.budget -= cost
        if self.budget < 0:
            raise ValueError('it asks for more memory than it can need')

    def execute(self, opcode, arg, operands):
        """The values that the operation puts on the stack, in a list."""
        name = opcode.name
        if name not in TORCH_OPERATIONS and not self.is_meta:
            raise ValueError(f'it asks for {name}, and torch has no such operation')
        if name in ARGUMENTS:
            return [arg]
        if name in VALUES:
            return [VALUES[name]]
        if name in CONTAINERS:
            return [self.add(CONTAINERS[name](), operands)]
        if name in ADDITIONS and isinstance(operands[0], ADDITIONS[name]):
            return [self.add(operands[0], operands[1:])]
        if name == 'MARK':
            self.outer_stacks.append(self.stack)
            self.stack = []
            return []
        if name.endswith('PUT') or name == 'MEMOIZE':
            value = operands[0] if operands else self.stack[-1]
            self.memo[len(self.memo) if arg is None else arg] = value
            return operands
        if name.endswith('GET'):
            return [self.memo[arg]]
        if name.endswith('GLOBAL'):
            return [self.find(arg or ' '.join(x for x in operands if isinstance(x, str)))]
        if name == 'REDUCE':
            return [self.call(*operands)]
        if name == 'BUILD':
            return [self.set_attributes(*operands)]
        if name == 'BINPERSID' and not self.is_meta:  # the numbers of a tensor
            self.spend(CALL_COST)
            self.storages += operands
            return [skip_plain(*operands)]
        if name == 'DUP':
            return 2 * operands
        if name in ADDITIONS and not self.is_meta:
            raise ValueError('it adds items to something else than a list or a dict')
        return [self.add({}, []) for _ in opcode.stack_after]

    def add(self, container, items):
        """The container, which now has these items too; a dict's are keys and values by turns."""
        if isinstance(container, tuple):
            container = tuple(items)
        elif isinstance(container, list):
            container.extend(items)
        else:
            self.update(container, items)
        return self.measure(container, items)

    def update(self, container, items):
        """Sets the dict's items, unless they have keys whose hash may take long."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            is_costly = can_collide(key)
            if is_plain_key(key) and not (is_costly and self.is_meta):
                self.spend(COLLISION_COST if is_costly else 0)
                container[key] = value
            elif not self.is_meta:
                raise ValueError('it has a key that is not a text or a number')

    def measure(self, container, items):
        """The container. ValueError if it is too deep with these items in it, or in itself."""
        self.nested_ids.update(id(item) for item in items if id(item) in self.depths)
        depth = 1 + max((self.depths.get(id(item), 0) for item in items), default=0)
        earlier_depth = self.depths.get(id(container), 0)
        # pickle completes a container before it is put into another one, whose depth is then right
        is_too_late = id(container) in self.nested_ids and depth > earlier_depth
        if depth > MAX_DEPTH or is_too_late:
            raise ValueError(f'it has more than {MAX_DEPTH} containers inside one another')
        self.depths[id(container)] = max(depth, earlier_depth)
        if not earlier_depth:
            self.containers.append(container)
        return container

    def find(self, name):
        """The name of a function or type, as Python 3 has it. ValueError if it isn't plain data."""
        self.spend(len(name) // 64)
        name = name.replace('__builtin__ ', 'builtins ').replace('numpy.core.', 'numpy._core.')
        is_known = name in self.functions or TYPE_NAME.fullmatch(name)
        if not is_known and not self.is_meta:
            raise ValueError(f'it asks for {name[:100]!r}, and data needs no code')
        return name if is_known or META_TYPE_NAME.fullmatch(name) else self.add({}, [])

    def call(self, name, args):
        """What a function returns, or something like it. ValueError if it isn't for plain data."""
        args = args if type(args) is tuple else ()
        lengths = [len(arg) for arg in args if isinstance(arg, (list, dict, tuple))]
        lengths += [len(arg) // 64 for arg in args if isinstance(arg, (str, bytes))]
        self.spend(CALL_COST + sum(lengths))  # it may copy them
        value = {}
        if isinstance(name, str) and name in self.functions:  # it may be anything
            with contextlib.suppress(Exception if self.is_meta else ()):
                value = self.functions[name](*args)
        elif not self.is_meta:
            raise ValueError('it calls something that is not a function')
        return self.measure(value, args) if isinstance(value, (list, dict)) else value

    def set_attributes(self, value, attributes):
        """The value. ValueError unless it may have attributes, as an OrderedDict of torch has."""
        if self.is_meta:
            return value
        if type(value) is not dict or type(attributes) is not dict:
            raise ValueError('it sets attributes, and data needs none')
        return self.measure(value, [attributes])


def is_plain_key(key, depth=2):
    """Whether a key is a text or a number, or a short tuple of them, or a tuple of such tuples."""
    # the hash of tuples, each twice in the next one, has no end
    if type(key) is tuple:
        return depth > 0 and len(key) <= 20 and all(is_plain_key(x, depth - 1) for x in key)
    return type(key) in (str, int, float, bool, bytes, type(None))


def can_collide(key):
    """Whether a file may have many keys like this one with the same hash."""
    return type(key) is tuple or type(key) is int and key.bit_length() > 64


# -----------------------------------------------------------------------------
# each takes the place of a function that a pickle may name
def skip_plain(*args):
    """None, for a device, a size and such, which are made of texts and numbers."""
    if not is_plain_key(args):
        raise ValueError('it has a tensor or a type of other things than texts and numbers')


def skip_tensor(*args):
    """None, for a tensor. It can't have hooks, but marks as of a conjugate, {'conj': True}."""
    if {type(mark) for arg in args if type(arg) is dict for mark in arg.values()} - {bool}:
        raise ValueError('it has a tensor with hooks')
    skip_plain(*(arg for arg in args if type(arg) is not dict))


def copy_dict(items=None):
    """A dict for an OrderedDict or a Counter, which begins with these items."""
    if items is not None and type(items) is not dict:
        raise ValueError('it makes a dict of something else')
    return dict(items or ())


def list_items(items=()):
    """The items of a set."""
    if not all(map(is_plain_key, items)):
        raise ValueError('it has a set of other things than texts and numbers')
    if sum(map(can_collide, items)) > FREE_OPERATIONS // COLLISION_COST:
        raise ValueError('it has a set that takes long to make')
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


def unpack_scalar(dtype, data):
    """numpy's number or text in these bytes; dtype is 'i8', or 'U7' for a text of 7 characters."""
    if dtype.startswith('U'):
        return data.decode('utf-32-le')
    return struct.unpack('<' + NUMBERS[dtype], data)[0]  # raises at another length


FUNCTIONS = {
    'torch._utils _rebuild_tensor_v2': skip_tensor, 'torch._utils _rebuild_tensor_v3': skip_tensor,
    'torch._utils _rebuild_parameter': skip_tensor, 'torch Size': skip_plain,
    'torch device': skip_plain, 'torch.serialization _get_layout': skip_plain,
    'collections OrderedDict': copy_dict, 'collections Counter': copy_dict,
    'builtins set': list_items, 'builtins complex': skip_plain,
    'builtins bytearray': copy_bytes, '_codecs encode': encode}
# those that torch.load doesn't know
META_FUNCTIONS = {
    'collections defaultdict': lambda *args: {}, 'builtins frozenset': list_items,
    'numpy dtype': lambda name, *flags: name, 'numpy._core.multiarray scalar': unpack_scalar}
