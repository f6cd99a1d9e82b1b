"""Text to ids and back, and tables that are read without trusting them."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import PRINT_PEAK, ROOT, expect_error

from runtime.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    check_meta,
    count_mean_bytes,
    get_tokenizer,
    read_meta,
)

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
    ordinary = t.encode_ordinary(text)
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


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ['CANARY'],)


@pytest.mark.parametrize('content', [
    b'', b'garbage', pickle.dumps([1]), pickle.dumps({'vocab_size': '4'}),
    pickle.dumps({'vocab_size': 0}), Hostile()])
def test_bad_meta_is_refused_and_not_run(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    if not isinstance(content, bytes):
        content = pickle.dumps({'vocab_size': 4, 'x': content})
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
@pytest.mark.parametrize('value, words', [
    (Call(os.system, ('mkdir "$CANARY"',)), ' system, and data needs no code)'),
    (Call(np.load, ('meta.pkl',)), 'asks for numpy load, and'), (Call(eval, ('1',)), ' eval, and'),
    (np.array([5]), 'multiarray _reconstruct, and'), (np.sum, 'it asks for '),
    (np.datetime64('2020'), 'it has M8 of numpy'), (np.complex64(1), 'it has c8 of numpy'),
    (np.bytes_(b'abc'), 'it has S3 of numpy'),
    (scalar_of('O', b'12345678'), 'it has O8 of numpy'),
    (scalar_of('i8', b'1234567'), 'requires a buffer of 8 bytes'),
    (scalar_of('i8', b'123456789'), 'requires a buffer of 8 bytes'),
    (scalar_of('U2', b'a\0\0\0'), 'it has U2 of numpy with 4 bytes'),
    (scalar_of('U99', b'a\0\0\0' * 99), 'of numpy with'),
    (scalar_of('>i8', b'12345678'), 'it sets attributes'),
    (scalar_of('i8', 'text'), ''), (scalar_of('i8', [1] * 8), ''), (scalar_of('i8', None), ''),
    (Call(set, ([],), {'x': 1}), 'it sets attributes'),
    (Call(frozenset, ((),), {1: '<'}), 'it sets attributes')])
def test_nothing_else_is_called(tmp_path, monkeypatch, capsys, protocol, value, words):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    for i, name in ((0, 'vocab_size'), (1, 'extra')):
        content = pickle.dumps({'vocab_size': 4, name: value}, protocol)
        (tmp_path / 'meta.pkl').write_bytes(content)
        assert words in expect_error(capsys, read_meta, str(tmp_path))
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
    ({'stoi': {'a': 0, 'b': 3.0}}, 'whole numbers'), ({'stoi': {'a': True}}, 'whole numbers'),
    ({'itos': {-1: 'a', 0: 'b'}}, 'whole numbers'), ({'itos': {4: 'x'}}, 'from 0 to 3'),
    ({'itos': {0: 'a', 1: 'b', 2: 'é', 3: 5}}, 'not of text'), ({'stoi': {5: 0}}, 'not of text'),
    ({'itos': [b'a', b'b', b'c', b'd']}, 'not of text'),
    ({'itos': 'abé\n'}, 'not tables'), ({'stoi': ['a']}, 'not tables'), ({'itos': None}, 'tables'),
    ({'itos': ['b', 'a', 'é', '\n']}, 'not the same table'), ({'vocab_size': 3}, 'from 0 to 2'),
    ({'vocab_size': 4.0}, 'no vocab_size'), ({'vocab_size': True}, 'no vocab_size'),
    ({'itos': ['a', 'b', 'é', '\ud800']}, 'surrogates')])
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
