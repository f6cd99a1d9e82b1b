"""Text to ids and back, and tables that are read without trusting them."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from runtime.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
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
