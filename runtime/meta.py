"""
A dataset's meta.pkl and tokenizer.json: the size of its vocabulary, and what its token ids mean.

A checkpoint has the same dict under the key meta. Both may be from a stranger, and are only data.
"""
import contextlib
import os

import numpy as np

from runtime import pickles
from runtime.console import fail, get_first_line, warn
from runtime.files import is_file, read_data_id
from runtime.tokenizer import (
    CharTokenizer,
    FileTokenizer,
    find_gpt2,
    is_gpt2,
    is_gpt2_vocabulary,
    read_tokenizer_file,
)

# the bins' dtypes by the names that a meta.pkl may have for them, and how many ids each has
DTYPES = {'uint16': 'uint16', 'u2': 'uint16', 'uint32': 'uint32', 'u4': 'uint32'}
MAX_SIZES = {'uint16': 2 ** 16, 'uint32': 2 ** 24}
MAX_TABLE_ITEMS = 2 ** 20  # in a checkpoint they take 3 of the 4 million operations of pickles.read


def check_meta(meta):
    """What we know of a dict from a stranger, with plain tables: itos {int: str}, stoi {str: int}.

    In place of tables it may have a tokenizer, the text of a tokenizer.json. ValueError if it has
    no usable vocab_size, or its tables make no text. Without a vocab_size the tables say it. The
    dict has no tables if there were none.
    """
    if not isinstance(meta, dict):
        raise ValueError('it is not a dict')
    tables, num_ids = {}, None
    if isinstance(meta.get('tokenizer'), str):
        tables = {'tokenizer': meta['tokenizer']}
    elif 'stoi' in meta or 'itos' in meta:
        tables = check_tables(meta.get('stoi'), meta.get('itos'))
        num_ids = 1 + max((*tables['itos'], *tables['stoi'].values()), default=-1)
    vocab_size = read_whole(meta.get('vocab_size'))
    if vocab_size is None:
        vocab_size = num_ids
    dtype = 'uint16'
    if isinstance(meta.get('dtype'), str):  # the text of another value may have no end
        dtype = DTYPES.get(meta['dtype'].removeprefix('numpy '))
    if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_SIZES.get(dtype, 0):
        raise ValueError('it has no vocab_size from 1 to 65,536, '
                         'or to 16,777,216 with a dtype of uint32')
    if num_ids is not None and num_ids > vocab_size:
        raise ValueError(f'its tables have other ids than from 0 to {vocab_size - 1}')
    known = {'vocab_size': vocab_size, **tables}
    if type(meta.get('val_bytes')) is int and meta['val_bytes'] > 0:
        known['val_bytes'] = meta['val_bytes']
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
    """What a dataset's folder says of its tokens: a dict, or None for GPT-2's BPE.

    It has vocab_size, a 'dtype' if the bins aren't uint16, and what makes text: the tables stoi and
    itos of meta.pkl, or 'tokenizer', the text of tokenizer.json.
    """
    meta = read_meta_file(os.path.join(data_dir, 'meta.pkl'))
    path = os.path.join(data_dir, 'tokenizer.json')
    if meta and 'stoi' in meta or not is_file(path):
        return meta
    text = read_tokenizer_file(path)
    if meta and not is_gpt2_vocabulary(meta['vocab_size']):
        return {**meta, 'tokenizer': text}  # nothing is built: training needs only vocab_size
    tokenizer_meta = make_tokenizer_meta(text, path)
    if meta and tokenizer_meta:
        return {**tokenizer_meta, **meta}
    return tokenizer_meta


def make_meta(vocab_size, **tokens):
    """The meta dict of a new dataset. tokens are stoi and itos, or tokenizer."""
    meta = {'vocab_size': vocab_size, **tokens}
    if vocab_size > MAX_SIZES['uint16']:
        meta['dtype'] = 'uint32'  # of the ids in the bins; they are uint16 without this key
    return meta


def make_character_meta(characters):
    """The meta dict for these characters: one id for each, in the order of their code points."""
    chars = sorted(set(characters))
    return make_meta(len(chars), itos=dict(enumerate(chars)),
                     stoi={c: i for i, c in enumerate(chars)})


def make_tokenizer_meta(text, path):
    """The meta dict for the text of a tokenizer.json, read from path; None if it is GPT-2's BPE."""
    tokenizer = FileTokenizer(text, path)
    if is_gpt2(tokenizer.ids):
        return None
    if not 1 <= tokenizer.vocab_size <= MAX_SIZES['uint32']:
        fail(f'{path} has ids up to {tokenizer.vocab_size - 1:,}, more than a vocabulary can have',
             'name another tokenizer.json')
    return make_meta(tokenizer.vocab_size, tokenizer=tokenizer.text)


def read_meta_file(path):
    """The dict in a meta.pkl, or None if there is none. Nothing in the file is executed.

    Training needs only vocab_size: tables that make no text are left out, with one line. It fails
    if the file has neither.
    """
    if not is_file(path):
        return None
    try:
        with open(path, 'rb') as f:
            data = f.read(2 ** 28)  # a table of 65,536 characters takes less than 2 MB
        meta = pickles.read(data, is_meta=True)
        keys = ('vocab_size', 'dtype', 'bins', 'val_bytes')
        sizes = {key: meta[key] for key in keys if key in meta}
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


def count_mean_bytes(tokens, meta):
    """The mean length of a token's text in UTF-8 bytes, over token ids (N,); None if unknown.

    A loss in nats / ln 2 / this is in bits per byte, which compares models of different
    tokenizers. The end of a text counts as 0 bytes.
    """
    if meta and 'itos' not in meta:
        num_bytes = meta.get('val_bytes')  # of the whole split, which has one token more
        return num_bytes and num_bytes / (len(tokens) + 1)
    if meta:
        ids = range(CharTokenizer(meta).vocab_size)
        lengths = [len(meta['itos'].get(i, '').encode('utf-8')) for i in ids]
    else:
        bpe = find_gpt2()
        if not bpe:
            return None
        lengths = [len(bpe.decode_single_token_bytes(i)) for i in range(bpe.n_vocab - 1)]
    lengths = np.pad(lengths, (0, 2 ** 16))  # rows that pad the vocabulary have no text
    pieces = range(0, len(tokens), 2 ** 22)
    return sum(int(lengths[tokens[i:i + 2 ** 22]].sum()) for i in pieces) / len(tokens)
