"""Text to ids and back, and tables that are read without trusting them."""
import argparse
import collections
import datetime
import decimal
import enum
import fractions
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import uuid

import numpy as np
import pytest
import torch
from conftest import PRINT_PEAK, ROOT, expect_error
from test_hostile import good_state

from runtime import checkpoint, pickles
from runtime.meta import check_meta, count_mean_bytes, read_meta
from runtime.tokenizer import CharTokenizer, GPT2Tokenizer, get_tokenizer

META = {'vocab_size': 4, 'stoi': {'a': 0, 'b': 1, 'é': 2, '\n': 3},
        'itos': {0: 'a', 1: 'b', 2: 'é', 3: '\n'}}


def test_characters_round_trip(capsys):
    t = get_tokenizer(META)
    assert isinstance(t, CharTokenizer)
    assert t.encode('abé\n') == [0, 1, 2, 3] and t.decode([2, 0]) == 'éa'
    assert len(t.decode_bytes([0, 2])) == 3  # é takes two
    with pytest.raises(SystemExit):
        t.encode('abcx')
    assert "characters 'cx' are not in the vocabulary" in capsys.readouterr().err


def test_bpe_round_trip(bpe):
    t = get_tokenizer(None)
    assert isinstance(t, GPT2Tokenizer) and t.vocab_size == 50257
    text = 'Hello, wörld 日本<|endoftext|>'
    ids = t.encode(text)
    assert ids[-1] == 50256 and t.decode(ids) == text and t.decode_bytes(ids) == text.encode()
    ordinary = t.encode_batch([text])[0].tolist()
    assert 50256 not in ordinary and t.decode(ordinary) == text


def test_bytes_of_a_token(bpe):
    text = 'naïve 東京 🙂, it is.'
    characters = sorted(set(text))
    meta = {'vocab_size': 99, 'itos': dict(enumerate(characters)),
            'stoi': {c: i for i, c in enumerate(characters)}}
    num_bytes = len(text.encode())
    for table in (meta, None):
        ids = get_tokenizer(table).encode(text)
        thrice = np.array(ids * 3, dtype=np.uint16)
        assert count_mean_bytes(thrice, table) == pytest.approx(num_bytes / len(ids))
    mean = count_mean_bytes(np.array(ids + [50256]), None)
    assert mean == pytest.approx(num_bytes / (len(ids) + 1))
    assert count_mean_bytes(np.array(ids), {'vocab_size': 99}) is None
    # ' the', and a row that pads the embedding
    assert count_mean_bytes(np.array([50300, 262]), None) == 2


def test_meta_is_read(tmp_path):
    assert read_meta(str(tmp_path)) is None
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(META))
    assert read_meta(str(tmp_path)) == META


@pytest.mark.parametrize('tables', [{'stoi': {}, 'itos': {}}, {'stoi': {}, 'itos': {0: 'a'}},
                                    {'stoi': {'a': 0}, 'itos': []}])
def test_empty_tables_are_good_only_for_training(tmp_path, capsys, tables):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 4, **tables}))
    assert read_meta(str(tmp_path)) == {'vocab_size': 4}
    assert 'makes no text, so it is good only for training' in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ['CANARY'],)


@pytest.mark.parametrize('content', [
    b'', b'garbage', pickle.dumps([1]), pickle.dumps({'vocab_size': '4'}), pickle.dumps(5),
    pickle.dumps({'vocab_size': 0}), pickle.dumps({'vocab_size': 4.5}),
    pickle.dumps({'vocab_size': float('inf')}), pickle.dumps({'vocab_size': [4] * 4}), Hostile()])
def test_bad_meta_is_refused_and_not_run(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    if not isinstance(content, bytes):
        content = pickle.dumps({'vocab_size': content})
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(SystemExit):
        read_meta(str(tmp_path))
    assert 'meta.pkl' in capsys.readouterr().err and not (tmp_path / 'canary').exists()


class Call:
    """Pickled as a call of the function, and then the setting of a state."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def scalar_of(dtype, content):
    """The pickle of a number in numpy that says of itself what numpy never would."""
    return Call(np._core.multiarray.scalar, (np.dtype(dtype), content))


def make_doubled(count):
    # a tuple of twice the tuple before it, and so on: its hash takes 2**count steps
    doubled = b''.join(b'\x94h%c\x86' % i for i in range(count))
    return b'\x80\x04})' + doubled + b'K\x01s.'


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('value', [
    Call(os.system, ('mkdir "$CANARY"',)), Call(np.load, ('meta.pkl',)), Call(eval, ('1',)),
    np.array([5]), np.sum, np.datetime64('2020'), np.complex64(1), np.bytes_(b'abc'),
    scalar_of('O', b'12345678'), scalar_of('i8', b'1234567'), scalar_of('i8', b'123456789'),
    scalar_of('U2', b'a\0\0\0'), scalar_of('U99', b'a\0\0\0' * 99), scalar_of('>i8', b'12345678'),
    scalar_of('i8', 'text'), scalar_of('i8', [1] * 8), scalar_of('i8', None),
    Call(set, ([],), {'x': 1}), Call(frozenset, ((),), {1: '<'}), Hostile()], ids=range(20))
def test_nothing_else_is_called(tmp_path, monkeypatch, capsys, protocol, value):
    """An unknown object is harmless in other places, and not a size."""
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': value}, protocol))
    assert 'it has no vocab_size' in expect_error(capsys, read_meta, str(tmp_path))
    content = pickle.dumps({'x': value, 'vocab_size': 4, 5: [value]}, protocol)
    (tmp_path / 'meta.pkl').write_bytes(content)
    assert read_meta(str(tmp_path)) == {'vocab_size': 4}
    assert not (tmp_path / 'canary').exists()


@pytest.mark.parametrize('content', [
    b'cnumpy\ndtype\n(S"i8"\nI0\nI1\ntR(I3\nS"<"\ntb.',  # no more than a dtype
    b'\x80\x02}(K\x01K\x02ub.', b'\x80\x02}X\x01\0\0\0a}b.', b'\x80\x02K\x01)R.', b'\x80\x02))R.',
    b'\x80\x02X\x0c\0\0\0posix system)R.', b'iposix\nsystem\n(tR.', b'(iposix\nsystem\n.',
    b'\x80\x02cbuiltins\nset\n)\x81.', b'\x80\x02(cbuiltins\nset\no.', b'\x80\x02\x82\x01.',
    b'P1\n.', b'\x80\x02K\x01Q.', b'(ccopy_reg\n_reconstructor\ntR.', b'\x80\x02h\x05.',
    b'L' + b'9' * 10 ** 6 + b'L\n.', b'\x8b\xff\xff\xff\x7f1.',
    b'\x80\x02}X\x0a\0\0\0vocab_size\x8b\x40\x42\x0f\0' + b'\x11' * 10 ** 6 + b's.',
    b'\x80\x02}' + b')' + b'\x85' * 10 ** 6 + b'K\x01s.',
    b'\x80\x04}' + b'(' * 10 ** 5 + b'N' + b'\x85\x91' * 10 ** 5 + b'K\x01s.',
    b'\x80\x04\x8f(' + b'N' + b'\x85' * 10 ** 6 + b'\x90.', make_doubled(60), b't.', b'a.', b's.',
    b'\x85.', b'\x94.', b'p0\n.', b'.'
], ids=range(29))
def test_hostile_operations_end_in_one_line(tmp_path, capsys, content):
    (tmp_path / 'meta.pkl').write_bytes(content)
    assert 'is not a readable table' in expect_error(capsys, read_meta, str(tmp_path))


def test_names_that_have_no_end_or_are_long():
    """Texts that the name of a global is made of: a list in itself many times, or a megabyte."""
    shared = b'\x80\x04](N' + b''.join(b'\x94h%c\x86' % i for i in range(60)) + b'h\0\x93e.'
    assert pickles.read(shared, is_meta=True)[-1] == {}
    text = b'X\x40\x42\x0f\0' + b'a' * 10 ** 6 + b'\x94'
    with pytest.raises(ValueError, match='more memory'):
        pickles.read(b'\x80\x04](' + text + b'h\0h\0\x93' * 4000 + b'e.', is_meta=True)


@pytest.mark.skipif(sys.platform != 'linux', reason='measures memory as Linux counts it')
def test_copies_of_a_long_text_do_not_fill_the_memory(tmp_path):
    """4,000 times the bytes of a text of a megabyte, or the set of a list of that size."""
    text = b'\x80\x02X\x40\x42\x0f\0' + b'a' * 10 ** 6 + b'q\0X\x06\0\0\0latin1\x86q\1'
    call = b'c_codecs\nencode\nq\2](' + b'h\2h\1R' * 4000 + b'e.'
    items = b'\x80\x02](' + b'N' * 10 ** 5 + b'eq\0\x85q\1cbuiltins\nset\nq\2]('
    (tmp_path / 'text').write_bytes(text + call)
    (tmp_path / 'items').write_bytes(items + b'h\2h\1R' * 4000 + b'e.')
    code = ('from runtime.pickles import read\n'
            'for name in ("text", "items"):\n'
            '    try: read(open(name, "rb").read(), is_meta=True)\n'
            '    except ValueError as e: assert "more memory" in str(e)\n'
            + PRINT_PEAK)
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': ROOT}, check=True).stdout
    assert int(out) < 1_000_000  # KiB


@pytest.mark.parametrize('change, words', [
    ({'stoi': {'a': 0, 'b': 9}}, 'other ids than from 0 to 3'),
    ({'stoi': {'a': 0, 'b': 1.5}}, 'whole numbers'), ({'stoi': {'a': True}}, 'whole numbers'),
    ({'itos': {-1: 'a', 0: 'b'}}, 'whole numbers'), ({'itos': {4: 'x'}}, 'from 0 to 3'),
    ({'itos': {0: 'a', 1: 'b', 2: 'é', 3: 5}}, 'not of text'), ({'stoi': {5: 0}}, 'not of text'),
    ({'itos': [b'a', b'b', b'c', b'd']}, 'not of text'),
    ({'itos': 5}, 'not tables'), ({'stoi': ['a']}, 'not tables'), ({'itos': None}, 'tables'),
    ({'itos': ['b', 'a', 'é', '\n']}, 'not the same table'), ({'vocab_size': 3}, 'from 0 to 2'),
    ({'vocab_size': 4.5}, 'no vocab_size'), ({'vocab_size': True}, 'no vocab_size'),
    ({'itos': ['a', 'b', 'é', '\ud800']}, 'surrogates'),
    ({'itos': {**META['itos'], 1 << 3000: 'a'}}, 'from 0 to 3'),
    ({'vocab_size': 1 << 3000}, 'no vocab_size'),
    ({'itos': dict.fromkeys(range(2 ** 20), 'a')}, 'its tables have more than 1,048,576 items')])
def test_tables_that_make_no_sense(change, words):
    with pytest.raises(ValueError, match=words):
        check_meta({**META, **change})


def test_a_table_with_only_a_size_cannot_decode(capsys):
    with pytest.raises(SystemExit):
        get_tokenizer({'vocab_size': 4})
    assert 'stoi and itos' in capsys.readouterr().err


def test_tiktoken_is_imported_only_for_bpe_and_says_what_to_set(tmp_path):
    code = ('import sys; from runtime import tokenizer; assert "tiktoken" not in sys.modules; '
            'tokenizer.get_tokenizer(None)')
    env = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9',
           'HTTPS_PROXY': 'http://127.0.0.1:9'}
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True,
                         text=True)
    assert out.returncode == 1 and 'TIKTOKEN_CACHE_DIR' in out.stderr
    assert 'Traceback' not in out.stderr


# -----------------------------------------------------------------------------
# what prepare.py of nanoGPT's forks may write, and what nanoGPT does with it
class Thing:
    """An object of a class that only the fork has."""

    def __init__(self, *values):
        self.values = values


class Color(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    ONE = 1


class Slots:
    __slots__ = ['one', 'two']

    def __init__(self):
        self.one = 1


class Arguments:
    def __getnewargs_ex__(self):
        return (), {}


Point = collections.namedtuple('Point', 'x y')
STOI, ITOS = META['stoi'], META['itos']
IDS_FROM_1 = {'vocab_size': 5, 'stoi': {c: i + 1 for c, i in STOI.items()},
              'itos': {i + 1: c for i, c in ITOS.items()}}
GAPS = {'vocab_size': 40, 'stoi': {c: 10 * i for c, i in STOI.items()},
        'itos': {10 * i: c for i, c in ITOS.items()}}
EXTRAS = [
    np.int64(5), np.float32(0.5), (1, 2), {1, 'a'}, frozenset([1]), b'ab', bytearray(b'ab'),
    collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]), collections.Counter('aab'),
    collections.deque([1, 2]), datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3),
    datetime.timedelta(5), pathlib.PurePosixPath('/data'), uuid.UUID(int=5), np.arange(5),
    np.array(['a', 'b']), np.array([{}, None], dtype=object), np.datetime64('2020'), np.dtype('i2'),
    np.float32, decimal.Decimal('1.5'), fractions.Fraction(1, 3), re.compile('a'), range(5),
    slice(1), Ellipsis, 3 + 4j, 1 << 3000, Color.RED, Flags.ONE, Point(1, 2), Thing(1, {2}),
    Thing(Thing(Thing())), [Thing(), Thing()], {Point(1, 2): Color.RED}, {Thing(): 1}, Slots(),
    Arguments(), print, Thing, ValueError('x', 1), argparse.Namespace(a=1), '\ud800', math.nan,
    types.SimpleNamespace(b=2), torch.float16, {None: None, (1, (2, (3,))): 4}]
TABLES = [  # the change to the table, and whether nanoGPT trains and samples with it
    ({}, True, True), ({'vocab_size': np.int64(4)}, True, True),
    ({'vocab_size': 4.0}, False, False),
    ({'vocab_size': np.uint16(4)}, True, True), ({'vocab_size': 64}, True, True),
    ({'itos': list(ITOS.values())}, True, True), ({'itos': tuple(ITOS.values())}, True, True),
    ({'itos': ''.join(ITOS.values())}, True, True), (IDS_FROM_1, True, True), (GAPS, True, True),
    ({'itos': collections.OrderedDict(ITOS)}, True, True),
    ({'stoi': collections.OrderedDict(STOI)}, True, True),
    ({'itos': collections.defaultdict(str, ITOS)}, True, True),
    ({'stoi': collections.defaultdict(int, STOI)}, True, True),
    ({'itos': {np.int64(i): c for i, c in ITOS.items()}}, True, True),
    ({'stoi': {c: np.int32(i) for c, i in STOI.items()}}, True, True),
    ({'stoi': {np.str_(c): i for c, i in STOI.items()}}, True, True),
    ({'itos': {i: np.str_(c) for i, c in ITOS.items()}}, True, True),
    ({'itos': {float(i): c for i, c in ITOS.items()}}, True, True),
    ({'stoi': {c: float(i) for c, i in STOI.items()}}, True, True),
    ({'stoi': {**STOI, 'A': 0, 'B': 1}}, True, True),  # aliases
    ({'vocab_size': 6, 'itos': {**ITOS, 4: 'the', 5: ' of'},
      'stoi': {**STOI, 'the': 4, ' of': 5}}, True, True),
    ({'vocab_size': 6, 'itos': {**ITOS, 4: '', 5: None}}, True, True),
    ({'itos': dict(enumerate(range(4))), 'stoi': {i: i for i in range(4)}}, True, False),
    ({'itos': {i: c.encode() for i, c in ITOS.items()},
      'stoi': {c.encode(): i for c, i in STOI.items()}}, True, False),
    ({'itos': 'abé\n'.encode()}, True, False), ({'itos': None}, True, False),
    ({'stoi': None}, True, False), ({'stoi': 5, 'itos': Thing()}, True, False)]
KINDS = [*TABLES, *(({'x': extra}, True, True) for extra in EXTRAS)]


def use_in_nanogpt(path):
    """Whether nanoGPT trains with the file, and samples a text with it."""
    meta = pickle.loads(path.read_bytes())
    try:
        torch.nn.Embedding(meta['vocab_size'], 2)
    except TypeError:
        return False, False
    try:
        ids = torch.tensor([meta['stoi'][c] for c in 'aé'], dtype=torch.long).tolist()
        return True, ''.join([meta['itos'][i] for i in ids]) == 'aé'
    except (KeyError, TypeError):
        return True, False


@pytest.mark.parametrize('change, trains, samples', KINDS, ids=range(len(KINDS)))
def test_a_meta_pkl_that_nanogpt_uses_is_used_here(tmp_path, capsys, change, trains, samples):
    path = tmp_path / 'meta.pkl'
    state = good_state()
    for protocol in range(6):
        try:
            path.write_bytes(pickle.dumps({**META, **change}, protocol))
        except (TypeError, pickle.PicklingError, UnicodeEncodeError, ValueError):
            assert protocol < 2  # an old protocol doesn't have it
            continue
        assert use_in_nanogpt(path) == (trains, samples)
        meta = read_meta(str(tmp_path))
        assert meta['vocab_size'] == change.get('vocab_size', 4)
        err = capsys.readouterr().err
        if samples or not trains:
            tokenizer = get_tokenizer(meta)
            assert tokenizer.decode(tokenizer.encode('aé')) == 'aé' and not err
        else:
            assert err.count('\n') == 1 and 'makes no text, so it is good only for training' in err
            assert 'meta.pkl' in expect_error(capsys, get_tokenizer, meta)
    # it is found before training if this can't be saved
    checkpoint.save({**state, 'meta': meta}, str(tmp_path))
    again, _ = checkpoint.load_best(str(tmp_path))
    assert again.get('meta', meta) == meta


def test_words_have_their_text():
    words = {'vocab_size': 3, 'stoi': {'the': 0, 'a': 1, ' of': 2}, 'itos': ['the', 'a', ' of']}
    tokenizer = get_tokenizer(check_meta(words))
    assert tokenizer.decode([0, 2]) == 'the of' and tokenizer.encode('a') == [1]


@pytest.mark.parametrize('key', ['dtype', 'vocab_size', 'stoi', 'itos'])
def test_a_value_whose_text_has_no_end(key):
    """Lists, each twice in the next one."""
    value = ['x']
    for _ in range(60):
        value = [value, value]
    if key == 'dtype':
        assert check_meta({**META, key: value}) == {**META, 'dtype': 'uint16'}
        return
    with pytest.raises(ValueError, match='no vocab_size|not tables|whole numbers|not of text'):
        check_meta({**META, key: value})


def test_a_large_table_is_read_and_saved(tmp_path):
    characters = [chr(i) for i in range(0x10000, 0x10000 + 10 ** 5)]
    meta = {'vocab_size': 10 ** 5, 'dtype': 'uint32', 'itos': characters,
            'stoi': {c: i for i, c in enumerate(characters)}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    meta = read_meta(str(tmp_path))
    checkpoint.save({**good_state(), 'meta': meta}, str(tmp_path))
    assert checkpoint.load_best(str(tmp_path))[0]['meta'] == meta
