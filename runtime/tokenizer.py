"""
Tokenizers: from text to token ids and back, by a dataset's table of characters or GPT-2's BPE.
"""
import ast
import codecs
import os
import pickle
import pickletools

import numpy as np

from runtime.console import fail, get_first_line

END_OF_TEXT = '<|endoftext|>'


class CharTokenizer:
    """One id per character, by the tables stoi and itos of a meta.pkl."""
    name = 'characters'

    def __init__(self, meta):
        self.stoi = meta['stoi']
        self.itos = meta['itos']
        self.vocab_size = len(self.itos)  # the model's may be larger, padded

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
        """The text of token ids (list of int)."""
        return ''.join([self.itos[i] for i in ids])


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
        """The text of the ids in UTF-8, as bytes; a single id may end within a character."""
        return self.bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of token ids (list of int); bytes that aren't a character become U+FFFD."""
        return self.bpe.decode(ids)


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
        lengths = [len(meta['itos'][i].encode('utf-8')) for i in range(len(meta['itos']))]
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


# the pickle operations that make numbers, texts, lists and dicts. Operations that name a class or
# call a function are not in this set, so no code can run. Tuples are not in it either: a million
# of them inside one another overflow the stack when they are hashed
PLAIN_OPCODES = set("""
    PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE
    GET BINGET LONG_BINGET""".split())


def check_meta(meta):
    """Raises ValueError unless meta is a dict with a vocab_size and, if it has them, sound tables.

    stoi and itos must fit the vocab_size and each other.
    """
    dtype = meta.get('dtype', 'uint16') if isinstance(meta, dict) else None
    max_vocab_size = {'uint16': 2 ** 16, 'uint32': 2 ** 24}.get(dtype, 0)
    vocab_size = meta.get('vocab_size') if max_vocab_size else None
    if type(vocab_size) is not int or not 1 <= vocab_size <= max_vocab_size:
        raise ValueError('it has no vocab_size from 1 to 65,536, '
                         'or to 16,777,216 with a dtype of uint32')
    if 'stoi' not in meta and 'itos' not in meta:
        return
    stoi, itos = meta.get('stoi'), meta.get('itos')
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise ValueError('its stoi and itos are not tables')
    if stoi != {c: i for i, c in itos.items()}:
        raise ValueError('its stoi and itos are not the same table')
    is_numbered = set(itos) == set(range(len(itos))) and all(type(i) is int for i in stoi.values())
    if not is_numbered or len(itos) > vocab_size:
        raise ValueError(f'its table does not number the ids from 0 to at most {vocab_size - 1}')
    ''.join(stoi).encode('utf-8')  # raises unless every token is text of whole characters


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
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name not in PLAIN_OPCODES:
                request = f'{opcode.name} {arg}' if arg else opcode.name
                raise ValueError(f'it asks for {request}, and data needs no code')
            if 'PUT' in opcode.name and int(arg) > len(data):
                raise ValueError('it asks for more memory than it can need')
        meta = pickle.loads(data)
        check_meta(meta)
    except Exception as e:  # a damaged pickle raises almost anything
        fail(f'{path} is not a readable table ({get_first_line(e)})', 'prepare the dataset again')
    return meta


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
