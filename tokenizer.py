"""
From text to token ids and back: a character table (a dataset's meta.pkl) or GPT-2's BPE.
"""
import os
import pickle

from checks import fail

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
        return self.bpe.decode(ids)


def get_tokenizer(meta):
    """The tokenizer of a dataset or checkpoint by its meta dict; None means GPT-2's BPE."""
    if meta and not {'stoi', 'itos'} <= meta.keys():
        fail('meta.pkl has only vocab_size: it can be trained on, but not turned into text', 'add stoi and itos to it')
    return CharTokenizer(meta) if meta else GPT2Tokenizer()


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers. Whatever asks for a class or a function, as code must, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, and data needs no code')


def read_meta(data_dir):
    """meta.pkl of a dataset as {'vocab_size', 'itos', 'stoi'}; None if there is none, which means GPT-2's BPE.

    Training needs only vocab_size of it. Nothing in the file is executed; a file that is no such table fails.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return None
    try:
        with open(path, 'rb') as f:
            meta = _PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle raises almost anything
        fail(f'{path} is not a readable table ({e})', 'prepare the dataset again')
    if not isinstance(meta, dict) or type(meta.get('vocab_size')) is not int or meta['vocab_size'] < 1:
        fail(f'{path} has no vocab_size', 'prepare the dataset again')
    return meta
