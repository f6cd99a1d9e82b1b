"""
From text to token ids and back: a character table (a dataset's meta.pkl) or GPT-2's BPE.
"""
import os
import pickle
import pickletools

import numpy as np

from checks import fail, first_line

END_OF_TEXT = '<|endoftext|>'


class CharTokenizer:
    """One id per character, by the tables stoi and itos of a meta.pkl."""
    name = 'characters'

    def __init__(self, meta):
        self.stoi, self.itos = meta['stoi'], meta['itos']
        self.vocab_size = len(self.itos)  # a model's may be larger, padded

    def encode(self, text):
        """Ids (list of int) of the text; fails on a character that the model has never seen."""
        unknown = ''.join(sorted(set(text) - self.stoi.keys()))
        if unknown:
            fail(f'characters {unknown!r} are not in the vocabulary of this model', f'it has {"".join(sorted(self.stoi))!r}')
        return [self.stoi[c] for c in text]

    def decode_bytes(self, ids):
        """The ids' text in UTF-8: its length is what bits per byte divide by."""
        return ''.join([self.itos[i] for i in ids]).encode('utf-8')

    def decode(self, ids):
        """The text of ids (list of int)."""
        return ''.join([self.itos[i] for i in ids])


class GPT2Tokenizer:
    """GPT-2's byte pair encoding (Radford et al. 2019), 50,257 ids, by tiktoken."""
    name = 'GPT-2 BPE'

    def __init__(self):
        import tiktoken  # here, so that a character model needs neither the package nor its download
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:  # tiktoken lets through whatever its download raised
            fail(f"GPT-2's BPE could not be fetched ({type(e).__name__})",
                 'without a network, set TIKTOKEN_CACHE_DIR to the tiktoken cache of a machine that has had one')
        self.vocab_size = self.bpe.n_vocab

    def encode(self, text):
        """Ids (list of int) of the text; <|endoftext|> in it is the special token."""
        return self.bpe.encode(text, allowed_special={END_OF_TEXT})

    def encode_ordinary(self, text):
        """Ids of a text to train on: <|endoftext|> in it is text like any other."""
        return self.bpe.encode_ordinary(text)

    def decode_bytes(self, ids):
        """The ids' text in UTF-8; single ids may end within a character."""
        return self.bpe.decode_bytes(ids)

    def decode(self, ids):
        """The text of ids (list of int); bytes that are no character are shown as one that says so."""
        return self.bpe.decode(ids)


def get_tokenizer(meta):
    """The tokenizer of a dataset or checkpoint by its meta dict; None means GPT-2's BPE."""
    if meta and not {'stoi', 'itos'} <= meta.keys():
        fail('meta.pkl has only vocab_size: it can be trained on, but not turned into text', 'add stoi and itos to it')
    return CharTokenizer(meta) if meta else GPT2Tokenizer()


def mean_bytes(tokens, meta):
    """UTF-8 bytes of a token's text, the mean over token ids (N,); None where their text isn't known.

    A loss in nats / ln 2 / this is in bits per byte, which can be compared between tokenizers. The end of a text has none.
    """
    if meta and 'itos' not in meta:
        return None
    if meta:
        length = [len(meta['itos'][i].encode('utf-8')) for i in range(len(meta['itos']))]
    else:
        try:
            import tiktoken
            bpe = tiktoken.get_encoding('gpt2')
        except Exception:  # not there, or its download failed
            return None
        length = [len(bpe.decode_single_token_bytes(i)) for i in range(bpe.n_vocab - 1)]
    length = np.pad(length, (0, 2 ** 16))  # what is beyond has no text
    return sum(int(length[tokens[i:i + 2 ** 22]].sum()) for i in range(0, len(tokens), 2 ** 22)) / len(tokens)


# the operations of a pickle that make numbers, texts, lists and dicts. Those that name a class or call a function, as
# code must, are not among them; nor are tuples: hashing one of a million in one another overflows the stack
PLAIN = set("""PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING
    SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM
    SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET""".split())


def check_meta(meta):
    """ValueError unless this is a dict with vocab_size and, if any, tables stoi and itos that fit it and each other."""
    most = {'uint16': 2 ** 16, 'uint32': 2 ** 24}.get(meta.get('dtype', 'uint16') if isinstance(meta, dict) else None, 0)
    if not most or type(meta.get('vocab_size')) is not int or not 1 <= meta['vocab_size'] <= most:
        raise ValueError('it has no vocab_size from 1 to 65,536, or with a dtype of uint32 to 16,777,216')
    if 'stoi' in meta or 'itos' in meta:
        stoi, itos = meta.get('stoi'), meta.get('itos')
        itos = dict(enumerate(itos)) if isinstance(itos, list) else itos
        if not isinstance(stoi, dict) or not isinstance(itos, dict) or stoi != {c: i for i, c in itos.items()}:
            raise ValueError('its stoi and itos are not the same table')
        if set(itos) != set(range(len(itos))) or len(itos) > meta['vocab_size'] or any(type(i) is not int for i in stoi.values()):
            raise ValueError(f'its table does not number the ids from 0 to at most {meta["vocab_size"] - 1}')
        ''.join(stoi).encode('utf-8')  # texts, without halves of characters


def read_meta(data_dir):
    """meta.pkl of a dataset as {'vocab_size', 'itos', 'stoi'}, with 'dtype' if its bins aren't uint16; None, if there is none, means GPT-2's BPE.

    Training needs only vocab_size of it. Nothing in the file is executed; a file that is no such table fails.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return None
    try:
        with open(path, 'rb') as f:
            data = f.read(2 ** 28)  # one of 65,536 characters has less than 2 MB
        for op, arg, _ in pickletools.genops(data):
            if op.name not in PLAIN:
                raise ValueError(f'it asks for {op.name} {arg or ""}, and data needs no code'.replace(' ,', ','))
            if 'PUT' in op.name and int(arg) > len(data):
                raise ValueError('it asks for more memory than it can need')
        meta = pickle.loads(data)
        check_meta(meta)
    except Exception as e:  # a damaged pickle raises almost anything
        fail(f'{path} is not a readable table ({first_line(e)})', 'prepare the dataset again')
    return meta
