"""
Makes tokenizers in the format of Hugging Face's package tokenizers, which does the work.

BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) begins with bytes, as GPT-2's does. So
it has no unknown characters, and any program that reads GPT-2's tokenizer reads these.
"""
import json
import re

from runtime.console import fail
from runtime.tokenizer import (
    END_OF_TEXT,
    FileTokenizer,
    GPT2Tokenizer,
    fetch_encoding,
    list_byte_characters,
)

# {1,3}+ takes what it can and gives nothing back in tiktoken, but repeats {1,3} in tokenizers
POSSESSIVE = re.compile(r'((?:\\p\{\w+\}|\[[^\]]*\])\{\d+,\d*\})\+')
PROBE = "It's 12345678 ЁЛКИ, 東京 \u0928\u0926\u0940!\r\n\n  x\t'LL I\u0301 ...\n "
GPT2_FILES = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'


def make_byte_level(model):
    """A tokenizer that splits a text as GPT-2's does, into parts that the model encodes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def format_json(tokenizer):
    """The text of the tokenizer's tokenizer.json, in a form that older versions read, too."""
    parts = json.loads(tokenizer.to_str())
    parts['model']['merges'] = [' '.join(pair) for pair in parts['model']['merges']]
    return json.dumps(parts, ensure_ascii=False)


def make_bytes():
    """The text of a tokenizer.json for the 256 bytes, each its own id, and the end of a text."""
    from tokenizers import models
    ids = {character: byte for byte, character in enumerate(list_byte_characters())}
    tokenizer = make_byte_level(models.BPE(ids, []))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return format_json(tokenizer)


def check_bpe_size(vocab_size):
    """Fails if these are too few tokens for train_bpe()."""
    if vocab_size < 257:
        fail(f'vocab_size={vocab_size} is less than 257',
             'BPE needs 256 bytes and the end of a text')


def train_bpe(texts, vocab_size, show_progress=False):
    """The text of a tokenizer.json whose BPE was trained on texts.

    It has vocab_size tokens, or fewer if the texts have no more pairs that come twice. The last one
    is the end of a text.
    """
    from tokenizers import models, trainers
    tokenizer = make_byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=2,
                                  initial_alphabet=list_byte_characters(),
                                  show_progress=show_progress)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return format_json(tokenizer)


def make_gpt2():
    """The text of a tokenizer.json for GPT-2's BPE, from the two files that OpenAI published."""
    from tiktoken.load import read_file_cached
    from tokenizers import models
    GPT2Tokenizer()  # it fetches them, or fails with a line
    ids = json.loads(read_file_cached(f'{GPT2_FILES}encoder.json'))
    lines = read_file_cached(f'{GPT2_FILES}vocab.bpe').decode('utf-8').splitlines()
    tokenizer = make_byte_level(models.BPE(ids, [tuple(line.split()) for line in lines[1:]]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return format_json(tokenizer)


def make_characters(stoi, unknown):
    """The text of a tokenizer.json for a table of characters, {character: id}.

    One of them stands for all characters that aren't in it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel(stoi, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def splits_as_gpt2(text):
    """Whether the text of a tokenizer.json is a byte-level BPE that splits as GPT-2's does.

    Then vocab.json and merges.txt are all that GPT-2's own tokenizer needs to give the same ids.
    """
    from tokenizers import models
    parts = json.loads(text)
    expected = json.loads(make_byte_level(models.BPE()).to_str())
    keys = ('normalizer', 'pre_tokenizer', 'decoder')
    return (parts['model'].get('type') == 'BPE' and not parts['model'].get('ignore_merges')
            and all(parts.get(key) == expected[key] for key in keys))


def convert_tiktoken(name):
    """The text of a tokenizer.json for an encoding of tiktoken, such as cl100k_base."""
    from tokenizers import Regex, models, pre_tokenizers
    bpe = fetch_encoding(name, f'the tokenizer {name} of tiktoken')
    characters = list_byte_characters()
    ranks = {''.join(characters[byte] for byte in token): rank
             for token, rank in bpe._mergeable_ranks.items()}
    merges = []  # tiktoken joins any two tokens that make a third one, the lowest ids first
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    names = {i: token for token, i in bpe._special_tokens.items()}
    # ids that tiktoken leaves out get a name, too, so that the others keep theirs
    added_ids = {names.get(i, f'<|unused_{i}|>'): i
                 for i in sorted({*range(bpe.n_vocab)} - {*ranks.values()})}
    tokenizer = make_byte_level(models.BPE({**ranks, **added_ids}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(POSSESSIVE.sub(r'(?>\1)', bpe._pat_str)), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.add_special_tokens(list(added_ids))
    text = format_json(tokenizer)
    ids, = FileTokenizer(text).encode_batch([PROBE])
    if ids.tolist() != bpe.encode_ordinary(PROBE):
        fail(f'the tokenizer {name} of tiktoken cannot be written as a tokenizer.json',
             'use a tokenizer.json of the same model')
    return text
