"""
Tokenizers: from text to token ids and back, by a dataset's table of characters or GPT-2's BPE.
"""
import ast
import codecs
import contextlib
import os

import numpy as np

from runtime import pickles
from runtime.console import fail, get_first_line, note, shorten, warn
from runtime.files import is_file, read_data_id

END_OF_TEXT = '<|endoftext|>'


class CharTokenizer:
    """One id per character, by the tables stoi and itos of a meta.pkl."""
    name = 'characters'

    def __init__(self, meta):
        self.stoi = meta['stoi']
        self.itos = meta['itos']
        ids = (*self.itos, *self.stoi.values())
        self.vocab_size = max(ids, default=-1) + 1  # the model's may be larger, padded

    def encode(self, text):
        """Token ids (list of int) of the text; fails on a character without an id."""
        unknown_characters = ''.join(sorted(set(text) - self.stoi.keys()))
        if unknown_characters:
            fail(f'characters {shorten(unknown_characters, 50)!r} are not in the vocabulary of '
                 'this model', f'it has {shorten("".join(sorted(self.stoi)), 100)!r}')
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


def fit_prompt(start, tokenizer, block_size):
    """(prompt, its number of tokens). A line says if the model can't see all of it.

    The default prompt is a new line. If a table of characters has none, its first one is taken.
    """
    if start == '\n' and isinstance(tokenizer, CharTokenizer) and start not in tokenizer.stoi:
        start = min(tokenizer.stoi)
        note(f'the vocabulary has no new line, so the prompt is {start!r}')
    prompt_length = len(tokenizer.encode(start))
    if prompt_length > block_size:
        note(f'the prompt has {prompt_length} tokens; the model sees only the last {block_size}')
    return start, prompt_length


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


# the bins' dtypes by the names that a meta.pkl may have for them, and how many ids each has
DTYPES = {'uint16': 'uint16', 'u2': 'uint16', 'uint32': 'uint32', 'u4': 'uint32'}
MAX_SIZES = {'uint16': 2 ** 16, 'uint32': 2 ** 24}
MAX_TABLE_ITEMS = 2 ** 20  # in a checkpoint they take 3 of the 4 million operations of pickles.read


def check_meta(meta):
    """What we know of a dict from a stranger, with plain tables: itos {int: str}, stoi {str: int}.

    ValueError if it has no usable vocab_size, or its tables make no text. Without a vocab_size the
    tables say it. The dict has no tables if there were none.
    """
    if not isinstance(meta, dict):
        raise ValueError('it is not a dict')
    tables, num_ids = {}, None
    if 'stoi' in meta or 'itos' in meta:
        tables = check_tables(meta.get('stoi'), meta.get('itos'))
        num_ids = CharTokenizer(tables).vocab_size
    vocab_size = read_whole(meta.get('vocab_size'))
    if vocab_size is None:
        vocab_size = num_ids
    dtype = 'uint16'
    if isinstance(meta.get('dtype'), str):  # the text of another value may have no end
        dtype = DTYPES.get(meta['dtype'].removeprefix('numpy '))
    if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_SIZES.get(dtype, 0):
        raise ValueError('it has no vocab_size from 1 to 65,536, '
                         'or to 16,777,216 with a dtype of uint32')
    if tables and num_ids > vocab_size:
        raise ValueError(f'its tables have other ids than from 0 to {vocab_size - 1}')
    known = {'vocab_size': vocab_size, **tables}
    if 'dtype' in meta:
        known['dtype'] = dtype
    if 'bins' in meta:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            known['bins'] = read_data_id(meta['bins'])
    return known


def check_tables(stoi, itos):
    """The two tables of a meta.pkl as dicts; ValueError if they make no text.

    Ids may be without a token, tokens may have the same id, and may be longer than a character.
    """
    if isinstance(itos, (list, tuple, str)):
        itos = dict(enumerate(itos))
    if not (isinstance(stoi, dict) and isinstance(itos, dict)):
        raise ValueError('its stoi and itos are not tables')
    if not stoi or not itos:
        raise ValueError('its stoi or itos is empty')
    if len(stoi) + len(itos) > MAX_TABLE_ITEMS:
        raise ValueError(f'its tables have more than {MAX_TABLE_ITEMS:,} items')
    stoi = {token: read_whole(i) for token, i in stoi.items()}
    itos = {read_whole(i): token for i, token in itos.items() if token is not None}
    ids, tokens = (*itos, *stoi.values()), (*stoi, *itos.values())
    is_plain = {*map(type, ids)} <= {int} and {*map(type, tokens)} <= {str}
    if not is_plain or min(ids, default=0) < 0:
        raise ValueError('its tables are not of text and whole numbers')
    ''.join(tokens).encode('utf-8')  # raises unless all characters are whole
    for token, i in stoi.items():
        if stoi.get(itos.get(i, token), i) != i:
            raise ValueError(f'its stoi and itos are not the same table: id {i} is {token!r} in '
                             f'one and {itos[i]!r} in the other')
    return {'stoi': stoi, 'itos': itos}


def read_whole(number):
    """The number as an int, if it is a float of that value; else the value itself."""
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number


def read_meta(data_dir):
    """The dict in a dataset's meta.pkl: vocab_size, and itos and stoi to make text.

    None, if there is no meta.pkl, means GPT-2's BPE. The dict has a 'dtype' if the bins aren't
    uint16. Nothing in the file is executed. Training needs only vocab_size: tables that make no
    text are left out, with one line. It fails if the file has neither.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not is_file(path):
        return None
    try:
        with open(path, 'rb') as f:
            data = f.read(2 ** 28)  # a table of 65,536 characters takes less than 2 MB
        meta = pickles.read(data, is_meta=True)
        sizes = {key: meta[key] for key in ('vocab_size', 'dtype', 'bins') if key in meta}
        if 'vocab_size' not in meta:
            return check_meta(meta)
        sizes = check_meta(sizes)
    except OSError as e:
        fail(f'{path} cannot be read ({e.strerror})', 'fix the access to it first')
    except Exception as e:  # a damaged pickle raises almost anything
        fail(f'{path} is not a readable table ({get_first_line(e)})', 'prepare the dataset again')
    try:
        return check_meta(meta)
    except ValueError as e:
        warn(f'{path} makes no text, so it is good only for training: {get_first_line(e)}')
        return sizes


def read_text(path, remedy='name a text file with --input=FILE'):
    """The text in the file; fails if the file is missing, empty or not UTF-8."""
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig') as f:  # Notepad writes a mark
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
