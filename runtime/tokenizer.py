"""
Tokenizers: from text to token ids and back, by a dataset's table of characters or GPT-2's BPE.
"""
import ast
import codecs
import collections
import os
import pickletools
import struct

import numpy as np

from runtime.console import fail, get_first_line

END_OF_TEXT = '<|endoftext|>'


class CharTokenizer:
    """One id per character, by the tables stoi and itos of a meta.pkl."""
    name = 'characters'

    def __init__(self, meta):
        self.stoi = meta['stoi']
        self.itos = meta['itos']
        self.vocab_size = max(self.itos, default=-1) + 1  # the model's may be larger, padded

    def encode(self, text):
        """Token ids (list of int) of the text; fails on a character without an id."""
        unknown_characters = ''.join(sorted(set(text) - self.stoi.keys()))
        if unknown_characters:
            fail(f'characters {unknown_characters!r} are not in the vocabulary of this model',
                 f'it has {"".join(sorted(self.stoi))!r}')
        return [self.stoi[c] for c in text]

    def decode_bytes(self, ids):
        """The text of the ids in UTF-8, as bytes."""
        return self.decode(ids).encode('utf-8')

    def decode(self, ids):
        """The text of token ids (list of int); an id without a character becomes U+FFFD."""
        return ''.join([self.itos.get(i, '\ufffd') for i in ids])


class GPT2Tokenizer:
    """GPT-2's byte pair encoding (Radford et al. 2019), 50,257 ids, by tiktoken."""
    name = 'GPT-2 BPE'

    def __init__(self):
        import tiktoken  # here: a character model needs neither the package nor its download
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:  # tiktoken raises whatever its download raised
            fail(f"GPT-2's BPE could not be fetched ({type(e).__name__})",
                 'without a network, set TIKTOKEN_CACHE_DIR to the tiktoken cache of a machine '
                 'that has one')
        self.vocab_size = self.bpe.n_vocab

    def encode(self, text):
        """Token ids (list of int) of the text; <|endoftext|> in it is the special token."""
        return self.bpe.encode(text, allowed_special={END_OF_TEXT})

    def encode_ordinary(self, text):
        """Token ids of a training text; <|endoftext|> in it is ordinary text."""
        return self.bpe.encode_ordinary(text)

    def decode_bytes(self, ids):
        """The text of the ids in UTF-8, as bytes; ids that pad the vocabulary have none."""
        return self.bpe.decode_bytes([i for i in ids if i < self.vocab_size])

    def decode(self, ids):
        """The text of token ids (list of int); bytes that aren't a character become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


def get_tokenizer(meta, vocab_size=None):
    """The tokenizer for a dataset's or checkpoint's meta dict; None means GPT-2's BPE.

    Fails if it has more tokens than a model of this vocab_size.
    """
    if meta and not {'stoi', 'itos'} <= meta.keys():
        fail('meta.pkl has only vocab_size: it is enough for training, but not for making text',
             'add stoi and itos to it')
    tokenizer = CharTokenizer(meta) if meta else GPT2Tokenizer()
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        fail(f'the model has a vocabulary of {vocab_size}, but {tokenizer.name} has '
             f'{tokenizer.vocab_size}', 'the model needs its own tokenizer: for a checkpoint, put '
             'the meta.pkl of its dataset next to it')
    return tokenizer


class TextStream:
    """A sample's text, made from its tokens one by one, until it ends before a stop text."""

    def __init__(self, tokenizer, stops):
        self.tokenizer = tokenizer
        self.stops = stops
        self.text = ''
        self.is_complete = False
        self.num_taken = 0  # characters that take() has returned
        self.max_stop_length = max((len(stop) for stop in stops), default=1)
        # a token may end within a character
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def add(self, token):
        """Adds a token's text, and cuts it off at the first stop text."""
        if self.is_complete:
            return
        search_from = max(0, len(self.text) - self.max_stop_length)
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        places = [self.text.find(stop, search_from) for stop in self.stops]
        places = [place for place in places if place >= 0]
        if places:
            self.text, self.is_complete = self.text[:min(places)], True

    def take(self, all=False):
        """The text since the last call, without what may be the beginning of a stop text."""
        end = len(self.text)
        if not self.is_complete and not all:
            end = max(self.num_taken, end - self.max_stop_length + 1)
        new_text = self.text[self.num_taken:end]
        self.num_taken = end
        return new_text


def parse_stops(stop):
    """The texts in the setting stop: one text, or a list of texts in Python's notation."""
    try:
        stops = ast.literal_eval(stop) if stop.startswith('[') else [stop]
    except (SyntaxError, ValueError):
        stops = [stop]  # a text that begins with a bracket
    if not all(isinstance(text, str) for text in stops):
        fail(f'stop={stop!r} is not a list of texts', """use --stop="['one', 'two']" for several""")
    return [text for text in stops if text]


def count_mean_bytes(tokens, meta):
    """The mean length of a token's text in UTF-8 bytes, over token ids (N,); None if unknown.

    A loss in nats / ln 2 / this is in bits per byte, which compares models of different
    tokenizers. The end of a text counts as 0 bytes.
    """
    if meta and 'itos' not in meta:
        return None
    if meta:
        ids = range(CharTokenizer(meta).vocab_size)
        lengths = [len(meta['itos'].get(i, '').encode('utf-8')) for i in ids]
    else:
        try:
            import tiktoken
            bpe = tiktoken.get_encoding('gpt2')
        except Exception:  # not installed, or its download failed
            return None
        lengths = [len(bpe.decode_single_token_bytes(i)) for i in range(bpe.n_vocab - 1)]
    lengths = np.pad(lengths, (0, 2 ** 16))  # rows that pad the vocabulary have no text
    pieces = range(0, len(tokens), 2 ** 22)
    return sum(int(lengths[tokens[i:i + 2 ** 22]].sum()) for i in pieces) / len(tokens)


# the pickle operations that a meta.pkl may have: those that make a value, and a list
VALUES = set("""
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING
    BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8""".split())
LISTS = 'EMPTY_LIST EMPTY_TUPLE EMPTY_SET LIST TUPLE FROZENSET TUPLE1 TUPLE2 TUPLE3'.split()
# those that take all items since the last mark from the stack, and those that take so many
MARKED = 'LIST TUPLE FROZENSET DICT APPENDS ADDITEMS SETITEMS'.split()
COUNTS = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'SETITEM': 2, 'STACK_GLOBAL': 2,
          'REDUCE': 2, 'BUILD': 1}
NUMBERS = dict(zip('b1 i1 i2 i4 i8 u1 u2 u4 u8 f4 f8'.split(), '?bhiqBHIQfd'))  # numpy's, struct's


def unpack_scalar(name, data):
    """numpy's number or text in these bytes, of a dtype named 'i8', or 'U7' for 7 characters."""
    if name in NUMBERS:
        return struct.unpack('<' + NUMBERS[name], data)[0]  # raises at another length
    if not name.startswith('U') or not len(data) == 4 * int(name[1:]) <= 256:
        raise ValueError(f'it has {name[:20]} of numpy with {len(data)} bytes')
    return data.decode('utf-32-le')


# all names that a pickle may call, and what is called instead. Nothing long is copied, as many
# copies would fill the memory: text that stands for bytes is cut, a set's items stay their list
FUNCTIONS = {
    'numpy.core.multiarray scalar': unpack_scalar, 'numpy._core.multiarray scalar': unpack_scalar,
    '_codecs encode': lambda text, _: text[:256].encode('latin1'),
    **dict.fromkeys(['numpy dtype', 'builtins set', 'builtins frozenset', '__builtin__ set',
                     '__builtin__ frozenset'], lambda first=(), *flags: first)}


def read_pickle(data):
    """The dicts, lists, texts and numbers in a pickle; tuples and sets become lists.

    Python doesn't read it, so nothing in it can run. Items whose key is no text or whole number are
    left out: hashing a million tuples inside one another overflows the stack.
    """
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        start = marks.pop() if name in MARKED else len(stack) - COUNTS.get(name, 0)
        items = stack[start:]
        del stack[start:]
        arg = ' '.join(items) if name == 'STACK_GLOBAL' else arg
        if name in VALUES:
            stack.append(name == 'NEWTRUE' if name.startswith('NEW') else arg)
        elif name in LISTS:
            stack.append(items)
        elif name in ('APPEND', 'APPENDS', 'ADDITEMS'):
            stack[-1].extend(items)
        elif name in ('EMPTY_DICT', 'DICT', 'SETITEM', 'SETITEMS'):
            if name.endswith('DICT'):
                stack.append({})
            pairs = zip(items[::2], items[1::2])
            stack[-1].update((key, value) for key, value in pairs if isinstance(key, (str, int)))
        elif name == 'MARK':
            marks.append(len(stack))
        elif name.endswith('PUT') or name == 'MEMOIZE':
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name.endswith('GET') and arg in memo:
            stack.append(memo[arg])
        elif name.endswith('GLOBAL') and arg in FUNCTIONS:
            stack.append(arg)
        elif name == 'REDUCE' and items[0] in FUNCTIONS:
            stack.append(FUNCTIONS[items[0]](*items[1]))
        elif name == 'BUILD' and isinstance(stack[-1], str) and items[0][1] in ('<', '|'):
            pass  # the rest of a dtype, which is its name here: only the byte order matters
        elif name not in ('PROTO', 'FRAME', 'STOP'):
            raise ValueError(f'it is no data, but asks for {name} {str(arg or "")[:70]}'.strip())
    return stack.pop()


def check_meta(meta):
    """What we know of a dict from a stranger, with plain tables: itos {int: str}, stoi {str: int}.

    ValueError unless these fit its vocab_size and each other. Ids may be without a character, and
    several characters may have one id, that of an unknown one.
    """
    dtype = meta.get('dtype', 'uint16') if isinstance(meta, dict) else None
    max_vocab_size = {'uint16': 2 ** 16, 'uint32': 2 ** 24}.get(dtype, 0)
    vocab_size = meta.get('vocab_size') if max_vocab_size else None
    if type(vocab_size) is not int or not 1 <= vocab_size <= max_vocab_size:
        raise ValueError('it has no vocab_size from 1 to 65,536, '
                         'or to 16,777,216 with a dtype of uint32')
    known = {key: meta[key] for key in ('vocab_size', 'dtype', 'stoi', 'itos') if key in meta}
    if 'stoi' not in meta and 'itos' not in meta:
        return known
    stoi, itos = meta.get('stoi'), meta.get('itos')
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not (isinstance(stoi, dict) and isinstance(itos, dict)):
        raise ValueError('its stoi and itos are not tables')
    ids, tokens = (*itos, *stoi.values()), (*stoi, *itos.values())
    is_plain = {*map(type, ids)} <= {int} and {*map(type, tokens)} <= {str}
    if not is_plain or not all(0 <= i < vocab_size for i in ids):
        raise ValueError(f'its tables are not of text and whole numbers from 0 to {vocab_size - 1}')
    ''.join(tokens).encode('utf-8')  # raises unless all characters are whole
    counts = collections.Counter(stoi.values())
    if not all(i in itos and (itos[i] == c or counts[i] > 1) for c, i in stoi.items()):
        raise ValueError('its stoi and itos are not the same table')
    return {**known, 'itos': itos}


def read_meta(data_dir):
    """The dict in a dataset's meta.pkl: vocab_size, and itos and stoi to make text.

    None, if there is no meta.pkl, means GPT-2's BPE. The dict has a 'dtype' if the bins aren't
    uint16. Nothing in the file is executed; it fails if the file isn't such a table.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return None
    try:
        with open(path, 'rb') as f:
            data = f.read(2 ** 28)  # a table of 65,536 characters takes less than 2 MB
        return check_meta(read_pickle(data))
    except Exception as e:  # a damaged pickle raises almost anything
        fail(f'{path} is not a readable table ({get_first_line(e)})', 'prepare the dataset again')


def read_text(path, remedy='name a text file with --input=FILE'):
    """The text in the file; fails if the file is missing, empty or not UTF-8."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except OSError as e:
        fail(f'{path} cannot be read ({e.strerror})', remedy)
    except UnicodeDecodeError as e:
        fail(f'{path} is not UTF-8 (byte {e.start})', 'convert it first')
    if not text:
        fail(f'{path} is empty', remedy)
    return text


def read_prompt(start):
    """The prompt in the setting start: its text, or that of the file in FILE:prompt.txt."""
    if start.startswith('FILE:'):
        return read_text(start.removeprefix('FILE:'), 'name a file with --start=FILE:prompt.txt')
    if not start:
        fail('the prompt must not be empty', 'without --start it is a new line')
    return start
