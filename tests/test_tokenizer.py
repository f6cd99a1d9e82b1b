"""Text to ids and back, and tables that are read without trusting them."""
import os
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT

from tokenizer import CharTokenizer, GPT2Tokenizer, get_tokenizer, read_meta

META = {'vocab_size': 4, 'stoi': {'a': 0, 'b': 1, 'é': 2, '\n': 3}, 'itos': {0: 'a', 1: 'b', 2: 'é', 3: '\n'}}


def test_characters_round_trip(capsys):
    t = get_tokenizer(META)
    assert isinstance(t, CharTokenizer) and t.encode('abé\n') == [0, 1, 2, 3] and t.decode([2, 0]) == 'éa'
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
    assert 50256 not in t.encode_ordinary(text) and t.decode(t.encode_ordinary(text)) == text


def test_meta_is_read(tmp_path):
    assert read_meta(str(tmp_path)) is None
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(META))
    assert read_meta(str(tmp_path)) == META


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ['CANARY'],)


@pytest.mark.parametrize('content', [b'', b'garbage', pickle.dumps([1]), pickle.dumps({'vocab_size': '4'}), pickle.dumps({'vocab_size': 0}), Hostile()])
def test_bad_meta_is_refused_and_not_run(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    (tmp_path / 'meta.pkl').write_bytes(content if isinstance(content, bytes) else pickle.dumps({'vocab_size': 4, 'x': content}))
    with pytest.raises(SystemExit):
        read_meta(str(tmp_path))
    assert 'meta.pkl' in capsys.readouterr().err and not (tmp_path / 'canary').exists()


def test_a_table_of_sizes_alone_cannot_decode(capsys):
    with pytest.raises(SystemExit):
        get_tokenizer({'vocab_size': 4})
    assert 'stoi and itos' in capsys.readouterr().err


def test_tiktoken_is_imported_only_for_bpe_and_says_what_to_set(tmp_path):
    code = 'import sys, tokenizer; assert "tiktoken" not in sys.modules; tokenizer.get_tokenizer(None)'
    env = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9'}
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 1 and 'TIKTOKEN_CACHE_DIR' in out.stderr and 'Traceback' not in out.stderr
