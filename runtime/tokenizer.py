"""
Tokenizers: from text to token ids and back, by a table of characters, GPT-2's BPE or a file.
"""
import copy
import functools
import json

import numpy as np

from runtime.console import fail, get_first_line, shorten

END_OF_TEXT = '<|endoftext|>'
# what well-known tokenizers call the end of a document
END_TOKENS = (END_OF_TEXT, '<|end_of_text|>', '<|bos|>', '</s>', '<eos>', '[EOS]', '[SEP]')
# of a tokenizer.json: they change the ids of a text, and a training text needs none of them
ADDITIONS = ('truncation', 'padding', 'post_processor')
MAX_TOKENIZER_LENGTH = 2 ** 26  # characters; the largest that people use have half of that


def get_code_points(text):
    """The text's characters as an array of numbers, (characters,)."""
    return np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)


def fetch_encoding(name, title):
    """An encoding of tiktoken, which downloads it once; fails if it can't be had."""
    import tiktoken  # here: a character model needs neither the package nor its download
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken raises whatever its download raised
        fail(f'{title} could not be fetched ({type(e).__name__})',
             'without a network, set TIKTOKEN_CACHE_DIR to the tiktoken cache of a machine that '
             'has one')


def find_gpt2():
    """GPT-2's encoding by tiktoken, or None if it can't be had, for what is only nice to know."""
    try:
        import tiktoken
        return tiktoken.get_encoding('gpt2')
    except Exception:  # not installed, or its download failed
        return None


# -----------------------------------------------------------------------------
# each has vocab_size, encode() for prompts, encode_batch() for training texts, and decode().
# end_id is the id of the end of a document, or None
class CharTokenizer:
    """One id per character, by the tables stoi and itos of a meta.pkl."""
    name = 'characters'
    end_id = None

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

    def encode_batch(self, texts):
        """The ids of each text, an array (tokens,); its characters must have ids."""
        return [self.ids[get_code_points(text)] for text in texts]

    @functools.cached_property
    def ids(self):
        """The ids of all characters by their code points."""
        ids = {ord(token): i for token, i in self.stoi.items() if len(token) == 1}
        table = np.zeros(max(ids) + 1, dtype=np.uint32)
        table[list(ids)] = list(ids.values())
        return table

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
        self.bpe = fetch_encoding('gpt2', "GPT-2's BPE")
        self.vocab_size = self.bpe.n_vocab
        self.end_id = self.bpe.eot_token

    def encode(self, text):
        """Token ids (list of int) of the text; <|endoftext|> in it is the special token."""
        return self.bpe.encode(text, allowed_special={END_OF_TEXT})

    def encode_batch(self, texts):
        """The ids of each text, an array (tokens,); <|endoftext|> in it is ordinary text."""
        return [self.bpe.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def decode_bytes(self, ids):
        """The text of the ids in UTF-8, as bytes; ids that pad the vocabulary have none."""
        return self.bpe.decode_bytes([i for i in ids if i < self.vocab_size])

    def decode(self, ids):
        """The text of token ids (list of int); bytes that aren't a character become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


class FileTokenizer:
    """Any tokenizer in the format of Hugging Face's package tokenizers, from its tokenizer.json."""

    def __init__(self, text, source='the tokenizer'):
        import tokenizers  # here: characters and GPT-2's BPE don't need it
        try:
            description = json.loads(text)
            self.text = text
            if any(description.get(key) for key in ADDITIONS):
                description.update(dict.fromkeys(ADDITIONS))
                self.text = json.dumps(description, ensure_ascii=False)
            self.tokenizer = tokenizers.Tokenizer.from_str(self.text)
            self.ids = self.tokenizer.get_vocab()
            self.special_tokens = {token['content']: self.ids[token['content']]
                                   for token in description['added_tokens']}
        except BaseException as e:  # a panic in the package's code is not an Exception
            if isinstance(e, KeyboardInterrupt):
                raise
            fail(f'{source} is not a usable tokenizer.json ({get_first_line(e)})',
                 'save it again with a recent version of tokenizers')
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        self.name = f'{type(self.tokenizer.model).__name__} of {self.vocab_size:,} tokens'
        end_tokens = [token for token in END_TOKENS if token in self.special_tokens]
        self.end_id = self.ids[end_tokens[0]] if end_tokens else None
        self.is_byte_level = (description.get('decoder') or {}).get('type') == 'ByteLevel'
        if self.is_byte_level:
            bytes_of = {c: bytes([b]) for b, c in enumerate(list_byte_characters())}
            self.bytes = {i: b''.join(bytes_of.get(c, c.encode('utf-8')) for c in token)
                          for token, i in self.ids.items()}
            self.bytes.update((i, token.encode('utf-8'))
                              for token, i in self.special_tokens.items())
        self.has_only_bytes = self.is_byte_level and self.vocab_size == 257 and all(
            self.bytes.get(b) == bytes([b]) for b in range(256))

    def encode(self, text):
        """Token ids (list of int) of the text; special tokens in it are special."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as e:  # it has no common base class
            fail(f'the tokenizer cannot encode {shorten(text, 50)!r} ({get_first_line(e)})',
                 'use another text')

    def encode_batch(self, texts):
        """The ids of each text, an array (tokens,); special tokens in it are ordinary text.

        An exception if it can't encode one of them.
        """
        if self.has_only_bytes:  # much faster
            return [np.frombuffer(text.encode('utf-8'), dtype=np.uint8) for text in texts]
        encodings = self.plain_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    @functools.cached_property
    def plain_tokenizer(self):
        """The tokenizer in a form to which special tokens are ordinary text."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def decode_bytes(self, ids):
        """The text of the ids in UTF-8, as bytes; ids that pad the vocabulary have none."""
        if not self.is_byte_level:
            return self.decode(ids).encode('utf-8')
        return b''.join(self.bytes.get(i, b'') for i in ids)

    def decode(self, ids):
        """The text of token ids (list of int); bytes that aren't a character become U+FFFD."""
        if self.is_byte_level:
            return self.decode_bytes(ids).decode('utf-8', errors='replace')
        ids = [i for i in ids if i < self.vocab_size]
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def is_gpt2(ids):
    """Whether this is the vocabulary of GPT-2's BPE: {token: id}."""
    known = {'!': 0, 'the': 1169, '\u0120the': 262, '\u0120gazed': 50255, END_OF_TEXT: 50256}
    return (isinstance(ids, dict) and len(ids) == 50257
            and {token: ids.get(token) for token in known} == known)


def is_gpt2_vocabulary(vocab_size):
    """Whether this may be GPT-2's vocabulary: its 50,257 tokens, or padded by up to 943 rows."""
    return 50257 <= vocab_size <= 51200


def list_byte_characters():
    """The 256 characters that stand for the bytes in a byte-level tokenizer, as in GPT-2's.

    A byte that is a printable character of Latin-1 is that character. The others have those from
    U+0100 on, in their order.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    characters = sorted(ByteLevel.alphabet())
    others = iter(c for c in characters if ord(c) > 255)
    return [chr(b) if chr(b) in characters else next(others) for b in range(256)]


def read_tokenizer_file(path):
    """The text of a tokenizer.json; fails if it can't be read or is far too large."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read(MAX_TOKENIZER_LENGTH + 1)
    except (OSError, UnicodeDecodeError) as e:
        fail(f'{path} cannot be read ({get_first_line(e)})', 'name another tokenizer.json')
    if len(text) > MAX_TOKENIZER_LENGTH:
        fail(f'{path} is larger than 64 MiB', 'name another tokenizer.json')
    return text


def have_same_tokens(meta, other_meta):
    """Whether two meta dicts give the same ids to the same texts, as far as they say."""
    text, other_text = meta.get('tokenizer'), other_meta.get('tokenizer')
    if text and other_text and text != other_text:  # another program may have saved it anew
        return list_parts(text) == list_parts(other_text)
    return text == other_text and meta.get('stoi') == other_meta.get('stoi')


def list_parts(text):
    """The parts of a tokenizer.json that make ids, in a form that doesn't depend on its version."""
    tokenizer = FileTokenizer(text)
    parts = json.loads(text)
    merges = [' '.join(pair) if isinstance(pair, list) else pair
              for pair in parts['model'].get('merges', [])]
    return tokenizer.ids, merges, parts.get('normalizer'), parts.get('pre_tokenizer')


def get_tokenizer(meta, vocab_size=None):
    """The tokenizer for a dataset's or checkpoint's meta dict; None means GPT-2's BPE.

    Fails if it has more tokens than a model of this vocab_size.
    """
    if not meta:
        tokenizer = GPT2Tokenizer()
    elif 'tokenizer' in meta:
        tokenizer = FileTokenizer(meta['tokenizer'])
    elif {'stoi', 'itos'} <= meta.keys():
        tokenizer = CharTokenizer(meta)
    else:
        fail('meta.pkl has only vocab_size: it is enough for training, but not for making text',
             'add stoi and itos to it, or put the tokenizer.json next to it')
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        fail(f'the model has a vocabulary of {vocab_size}, but {tokenizer.name} has '
             f'{tokenizer.vocab_size}', 'the model needs its own tokenizer: for a checkpoint, put '
             'the meta.pkl of its dataset next to it')
    return tokenizer
