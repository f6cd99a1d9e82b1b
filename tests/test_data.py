"""The prepare scripts: the same bytes as nanoGPT's, and every way their input may be wrong."""
import argparse
import glob
import gzip
import hashlib
import http.server
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, run, run_here

from runtime.dataset import locate_data
from runtime.meta import read_meta
from runtime.tokenizer import get_tokenizer

sys.path.insert(0, os.path.join(ROOT, 'data'))
import corpus


def sums(folder):
    """{split: (tokens, SHA-256)} of the bins in a folder, in which nothing is unfinished."""
    assert not [name for name in os.listdir(folder) if name.endswith('.tmp')]
    out = {}
    for split in ('train', 'val'):
        with open(os.path.join(folder, f'{split}.bin'), 'rb') as f:
            content = f.read()
        out[split] = len(content) // 2, hashlib.sha256(content).hexdigest()
    return out


def expected(facts):
    return {split: (facts[split]['tokens'], facts[split]['sha256']) for split in ('train', 'val')}


def read_ids(folder):
    """The token ids of both splits, train first."""
    return [np.fromfile(folder / f'{split}.bin', dtype=np.uint16) for split in ('train', 'val')]


def decode(meta, ids):
    return ''.join(meta['itos'][i] for i in ids.tolist())


def test_shakespeare_by_characters(tmp_path, shakespeare, golden_data):
    out = run('data/shakespeare_char/prepare.py', f'--input={shakespeare}',
              f'--out_dir={tmp_path}').stdout
    assert sums(tmp_path) == expected(golden_data['shakespeare_char'])
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    facts = golden_data['shakespeare_char']['meta']
    assert sorted(set(meta) - {'bins'}) == facts['keys']
    assert meta['vocab_size'] == 65
    assert ''.join(meta['stoi']) == facts['alphabet']
    assert meta['itos'] == dict(enumerate(facts['alphabet']))
    for part in ('1,115,394 characters', '1,003,854 tokens', '111,540 tokens', 'vocabulary: 65',
                 ' s\n'):
        assert part in out


def test_shakespeare_in_bpe(tmp_path, shakespeare, bpe, golden_data):
    (tmp_path / 'meta.pkl').write_bytes(b'of an earlier dataset of characters')
    run('data/shakespeare/prepare.py', f'--input={shakespeare}', f'--out_dir={tmp_path}')
    assert sums(tmp_path) == expected(golden_data['shakespeare'])
    assert not (tmp_path / 'meta.pkl').exists()


def test_readmes_agree_with_the_golden_sums(golden_data):
    for name in ('shakespeare_char', 'shakespeare'):
        with open(os.path.join(ROOT, 'data', name, 'readme.md'), encoding='utf-8') as f:
            text = f.read()
        for split in ('train', 'val'):
            assert golden_data[name][split]['sha256'] in text
            assert f'{golden_data[name][split]["tokens"]:,}' in text


# -----------------------------------------------------------------------------
# OpenWebText
def paragraphs(shakespeare):
    with open(shakespeare, encoding='utf-8') as f:
        return f.read().split('\n\n')


def openwebtext(tmp_path, *args, **kw):
    return run('data/openwebtext/prepare.py', f'--out_dir={tmp_path / "out"}', '--num_proc=2',
               *args, HF_DATASETS_CACHE=str(tmp_path / 'cache'), **kw)


@pytest.mark.parametrize('kind', [pytest.param('parquet', marks=pytest.mark.slow), 'jsonl',
                                  pytest.param('txt.gz', marks=pytest.mark.slow)])
def test_openwebtext_from_local_files(tmp_path, shakespeare, bpe, golden_data, kind):
    texts = paragraphs(shakespeare)
    facts = golden_data['openwebtext_from_paragraphs']
    assert len(texts) == facts['documents']
    half = len(texts) // 2
    for i, part in enumerate((texts[:half], texts[half:])):  # two files, read in order
        path = tmp_path / f'{i}.{kind}'
        if kind == 'parquet':
            import pyarrow
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.table({'text': part}), path)
        elif kind == 'jsonl':
            path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in part))
        else:
            with gzip.open(path, 'wt', encoding='utf-8') as f:
                f.write('\n\n'.join(part))
    out = openwebtext(tmp_path, f'--input={tmp_path}/*.{kind}').stdout
    assert sums(tmp_path / 'out') == expected(facts)
    assert f'{facts["train"]["documents"]:,} documents' in out
    assert '4 documents, 189 tokens' in out
    if kind == 'jsonl':  # the next time it uses its cache, even if a bin is gone
        (tmp_path / 'out' / 'train.bin').unlink()
        openwebtext(tmp_path, f'--input={tmp_path}/*.{kind}')
        assert sums(tmp_path / 'out') == expected(facts)


def test_openwebtext_continues_where_it_was_stopped(tmp_path, bpe):
    with open(tmp_path / 'a.jsonl', 'w', encoding='utf-8') as f:
        for i in range(3000):
            f.write(json.dumps({'text': f'{i} ' + 'and so on ' * 400}) + '\n')
    args = [f'--input={tmp_path}/a.jsonl', f'--out_dir={tmp_path / "out"}', '--num_proc=2',
            '--part=500']
    cache = str(tmp_path / 'cache')

    def finished():
        paths = glob.glob(f'{cache}/**/cache-*_of_*.arrow', recursive=True)
        return {path: os.stat(path).st_ino for path in paths}

    command = [sys.executable, os.path.join(ROOT, 'data', 'openwebtext', 'prepare.py'), *args]
    stopped = subprocess.Popen(command, env={**os.environ, 'HF_DATASETS_CACHE': cache},
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while len(finished()) < 4:
        assert stopped.poll() is None
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGKILL)
    stopped.wait()
    early = finished()
    assert len(early) < 12 and not (tmp_path / 'out' / 'train.bin').exists()
    run('data/openwebtext/prepare.py', *args, HF_DATASETS_CACHE=cache)
    # the shares of two processes in the 6 parts of train, and in val
    assert early.items() <= finished().items() and len(finished()) == 2 * 6 + 2
    run('data/openwebtext/prepare.py', *args[:1], f'--out_dir={tmp_path / "whole"}',
        '--num_proc=1', HF_DATASETS_CACHE=str(tmp_path / 'another'))
    assert sums(tmp_path / 'out') == sums(tmp_path / 'whole')


def test_openwebtext_of_two_documents(tmp_path, bpe):
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n{"text": "two <|endoftext|>"}\n')
    openwebtext(tmp_path, f'--input={tmp_path}/a.jsonl')
    train, val = read_ids(tmp_path / 'out')
    assert train[-1] == val[-1] == 50256
    # within a text it is not a special token
    assert (np.concatenate((train, val)) == 50256).sum() == 2
    (tmp_path / 'b.jsonl').write_text('{"text": "one"}\n')
    (tmp_path / 'c.jsonl').write_text('{"words": "one"}\n')
    for files, words in (('b.jsonl', '1 documents'), ('c.jsonl', 'no column text'),
                         ('none*', '0 files'), ('*', 'one kind')):
        assert words in openwebtext(tmp_path, f'--input={tmp_path}/{files}', ok=False).stderr


def test_openwebtext_without_a_network(tmp_path, bpe):
    err = openwebtext(tmp_path, ok=False).stderr
    assert '--input=GLOB' in err and 'python_bpe' in err


# -----------------------------------------------------------------------------
# datasets of characters
def test_python_char(tmp_path):
    out = run('data/python_char/prepare.py', f'--out_dir={tmp_path / "a"}').stdout
    run('data/python_char/prepare.py', f'--out_dir={tmp_path / "b"}', cwd=tmp_path)
    assert sums(tmp_path / 'a') == sums(tmp_path / 'b')
    assert 'characters of Python' in out
    meta = pickle.loads((tmp_path / 'a' / 'meta.pkl').read_bytes())
    assert set(meta['stoi']) <= set(map(chr, range(32, 127))) | set('\n\t')
    ids = read_ids(tmp_path / 'a')
    total = sum(map(len, ids))
    assert 8e6 < total < 10.2e6
    assert 0.03 < len(ids[1]) / total < 0.2
    # whole files: each module of the standard library is in one split, with all its characters
    texts = [decode(meta, split_ids) for split_ids in ids]
    for module in (argparse, textwrap):
        with open(module.__file__, encoding='ascii') as f:
            source = f.read()
        assert sum(source in text for text in texts) == 1


def test_python_bpe(tmp_path):
    args = f'--out_dir={tmp_path}', '--max_bytes=1000000', '--vocab_size=300'
    run('data/python_bpe/prepare.py', *args)
    tokenizer = get_tokenizer(read_meta(str(tmp_path)))
    assert tokenizer.vocab_size == 300
    files = {}
    for split, ids in zip(('train', 'val'), read_ids(tmp_path)):
        text = tokenizer.decode(ids.tolist())
        files[split] = text.split('<|endoftext|>')
        assert files[split].pop() == ''  # each file has its end
    num_chars = sum(map(len, files['val']))
    assert read_meta(str(tmp_path))['val_bytes'] == num_chars
    with open(argparse.__file__, encoding='ascii') as f:
        assert f.read() in files['train'] + files['val']
    err = run_here('data/python_bpe/prepare.py', *args[:2], '--vocab_size=100', ok=False).stderr
    assert 'vocab_size=100' in err
    err = run_here('data/python_bpe/prepare.py', f'--out_dir={tmp_path}', '--max_bytes=1000',
                   ok=False).stderr
    assert '0 validation tokens' in err  # one file


def test_python_char_of_no_bytes(tmp_path):
    err = run_here('data/python_char/prepare.py', '--max_bytes=0', f'--out_dir={tmp_path}',
                   ok=False).stderr
    assert 'max_bytes=0' in err


def test_your_own_text(tmp_path):
    text = 'Où est-il?\nÀ côté.\n' * 50
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8')
    run('data/text/prepare.py', '--input=book.txt', '--out_dir=mine', cwd=tmp_path)
    meta = pickle.loads((tmp_path / 'mine' / 'meta.pkl').read_bytes())
    train, val = read_ids(tmp_path / 'mine')
    assert decode(meta, np.concatenate((train, val))) == text
    assert len(train) == int(0.9 * len(text))


def test_your_own_text_by_name_in_bpe(tmp_path, bpe):
    (tmp_path / 'book.txt').write_text('Some words. ' * 200)
    name = f'test-{os.getpid()}'
    folder = os.path.join(ROOT, 'data', name)
    try:
        out = run('data/text/prepare.py', '--input=book.txt', f'--name={name}', '--tokenizer=gpt2',
                  cwd=tmp_path).stdout
        assert f'--dataset={name}' in out
        assert sorted(os.listdir(folder)) == ['train.bin', 'val.bin']
        assert np.fromfile(os.path.join(folder, 'train.bin'), dtype=np.uint16).max() < 50257
        assert locate_data(name) in (os.path.join('data', name), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize('args, words', [
    (['--input=book.txt', '--name=..'], "'..'"),
    ([], 'error: missing --input (your text file) and --name (a name for the dataset); for'),
    (['--input=book.txt'], 'error: missing --name (a name for the dataset); for example'),
    (['--name=x'], 'error: missing --input (your text file); for example'),
    (['--out_dir=x'], 'error: missing --input (your text file); for example'),
    (['--input=none.txt', '--name=x'], 'none.txt cannot be read'),
    (['--input=empty.txt', '--name=x'], 'empty'),
    (['--input=latin.txt', '--name=x'], 'latin.txt is not UTF-8: byte 1 is wrong; name the enc'),
    (['--input=book.txt', '--name=a/b'], "'a/b' cannot be the name of a folder"),
    (['--input=book.txt', '--name=openwebtext'], "'openwebtext' belongs to a dataset"),
    (['--input=book.txt', '--name=x', '--tokenizer=word'], "'word'"),
    (['--input=short.txt', '--name=x'], '0 training'),
])
def test_mistakes(tmp_path, args, words):
    contents = {'book': b'words', 'empty': b'', 'latin': b'a\xe9b', 'short': b'a'}
    for name, content in contents.items():
        (tmp_path / f'{name}.txt').write_bytes(content)
    assert words in run_here('data/text/prepare.py', *args, cwd=tmp_path, ok=False).stderr
    assert not os.path.exists(os.path.join(ROOT, 'data', 'x'))


@pytest.mark.parametrize('length', [3, 15, 160, 800])
@pytest.mark.parametrize('tokenizer', ['char', 'gpt2'])
def test_the_command_for_a_short_text_works(tmp_path, bpe, length, tokenizer):
    (tmp_path / 'short.txt').write_text('a few words; '[:length] * (1 + length // 13))
    folder = tmp_path / 'data'
    args = [f'--input={tmp_path / "short.txt"}', f'--out_dir={folder}', f'--tokenizer={tokenizer}']
    out = run_here('data/text/prepare.py', *args, ok=None)
    if out.returncode:
        assert 'use a longer text' in out.stderr and not folder.exists()
        return
    script, *flags = shlex.split(out.stdout.splitlines()[-1].partition(': python ')[2])
    run_here(script, *flags, '--init_from=scratch', '--max_iters=1', '--eval_iters=1',
             '--n_layer=1', '--n_head=1', '--n_embd=8', '--batch_size=1', '--device=cpu',
             f'--out_dir={tmp_path / "out"}')


def test_more_characters_than_uint16_has_ids(tmp_path):
    chars = [chr(c) for c in range(32, 0x11000) if not 0xd800 <= c < 0xe000]
    (tmp_path / 'all.txt').write_text(''.join(chars * 2), encoding='utf-8')
    folder = tmp_path / 'all'
    out = run_here('data/text/prepare.py', f'--input={tmp_path / "all.txt"}',
                   f'--out_dir={folder}').stdout
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert meta['dtype'] == 'uint32' and meta['vocab_size'] > 2 ** 16
    assert '486,372 bytes' in out
    ids = np.fromfile(folder / 'train.bin', dtype='<u4')
    assert ids.max() == meta['vocab_size'] - 1
    known = ''.join(c for c in chars if c in meta['stoi'])
    assert decode(meta, ids[:1000]) == known[:1000]
    args = [*TINY, f'--dataset={folder}', f'--out_dir={tmp_path / "out"}', '--max_iters=1']
    assert 'iter 0: loss 11.' in run_here('train.py', *args).stdout  # ln of the vocabulary
    out = run_here('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1',
                   '--max_new_tokens=5', '--start=a').stdout
    assert len(out) > 20


# -----------------------------------------------------------------------------
# input.txt of tiny Shakespeare
class Server(http.server.BaseHTTPRequestHandler):
    content, failures, requests = b'', 0, 0

    def do_GET(self):
        Server.requests += 1
        if Server.requests <= Server.failures:
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(Server.content)

    def log_message(self, *args):
        pass


def test_downloads_are_tried_again_checked_and_complete(tmp_path, capsys):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/input.txt'
    path = tmp_path / 'input.txt'
    Server.content, Server.failures = b'some text', 1
    try:
        corpus.download(url, hashlib.sha256(b'some text').hexdigest(), str(path))
        assert Server.requests == 2
        assert path.read_bytes() == b'some text' and os.listdir(tmp_path) == ['input.txt']
        path.unlink()
        with pytest.raises(SystemExit):
            corpus.download(url, '0' * 64, str(path))
    finally:
        server.shutdown()
        server.server_close()
    assert 'SHA-256' in capsys.readouterr().err and not os.listdir(tmp_path)
    with pytest.raises(SystemExit):
        corpus.download(url, '0' * 64, str(path), tries=1)  # the server has ended
    err = capsys.readouterr().err
    for part in ('could not be downloaded', 'input.txt', 'python_bpe'):
        assert part in err
    assert not os.listdir(tmp_path)


# -----------------------------------------------------------------------------
# a dataset takes its place as a whole
def read_folder(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.skipif(os.name != 'posix', reason='ulimit')
@pytest.mark.parametrize('tokenizer', ['char', 'gpt2'])
@pytest.mark.parametrize('limit', [1, 30, 100])  # units of 512 or 1024 bytes
def test_a_full_disk_leaves_the_earlier_dataset(tmp_path, bpe, tokenizer, limit):
    folder = tmp_path / 'data'
    (tmp_path / 'old.txt').write_text('to be or not to be ' * 50)
    (tmp_path / 'new.txt').write_text('abcdefghijklmnopqrstuvwxyz' * 20000)
    args = ['data/text/prepare.py', f'--out_dir={folder}']
    run(*args, f'--input={tmp_path / "old.txt"}')
    before = read_folder(folder)
    out = subprocess.run(['sh', '-c', f'ulimit -f {limit}; exec "$@"', 'sh', sys.executable, *args,
                          f'--input={tmp_path / "new.txt"}', f'--tokenizer={tokenizer}'],
                         cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr == 'error: File too large\n'
    assert read_folder(folder) == before


@pytest.mark.parametrize('renames', range(3))
def test_a_crash_between_two_files_is_noticed(tmp_path, monkeypatch, renames):
    folder = tmp_path / 'data'
    (tmp_path / 'old.txt').write_text('to be or not to be ' * 50)
    (tmp_path / 'new.txt').write_text('be on to or root ' * 60)
    args = ['data/text/prepare.py', f'--out_dir={folder}']
    run_here(*args, f'--input={tmp_path / "old.txt"}')
    if renames == 1:  # nanoGPT's own table doesn't know its bins
        meta = pickle.loads((folder / 'meta.pkl').read_bytes())
        del meta['bins']
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    rename, calls = os.replace, []

    def crash(a, b):
        if len(calls) == renames:
            os.close(-1)  # an OSError; nothing is tidied up after a real crash
        calls.append(a)
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', crash)
        with pytest.raises(OSError):
            run_here(*args, f'--input={tmp_path / "new.txt"}')
    train = [*TINY, f'--dataset={folder}', f'--out_dir={tmp_path / "out"}', '--max_iters=1',
             '--block_size=8']
    err = run_here('train.py', *train).stderr
    assert ('was written with other .bin files' in err) == (renames > 0)
    run_here(*args, f'--input={tmp_path / "new.txt"}')
    assert not run_here('train.py', *train).stderr


def test_another_text_with_the_vocabulary_of_a_run(tmp_path, trained, char_data):
    (tmp_path / 'new.txt').write_text('1 and 1 make 2.\n' * 50)
    args = ['data/text/prepare.py', f'--input={tmp_path / "new.txt"}',
            f'--out_dir={tmp_path / "data"}']
    resume = [*TINY, f'--out_dir={trained}', '--init_from=resume', '--eval_only',
              f'--dataset={tmp_path / "data"}']
    run_here(*args)
    assert 'other tokens' in run('train.py', *resume, ok=False).stderr
    for source in (trained, char_data, os.path.join(trained, 'ckpt.pt')):
        run_here(*args, f'--vocabulary={source}')
        assert 'val loss' in run_here('train.py', *resume).stdout
        meta = pickle.loads((tmp_path / 'data' / 'meta.pkl').read_bytes())
        assert decode(meta, read_ids(tmp_path / 'data')[0]).startswith('1 and 1 make 2.\n')
    (tmp_path / 'new.txt').write_text('1 und 1 = 2 ' * 50)
    err = run(*args, f'--vocabulary={trained}', ok=False).stderr
    assert "lacks 2 characters of the text: '=u'" in err
    for source, words in ((tmp_path, 'no checkpoint'), (tmp_path / 'nothing', 'neither a dataset')):
        assert words in run(*args, f'--vocabulary={source}', ok=False).stderr
    err = run(*args, f'--vocabulary={trained}', '--tokenizer=gpt2', ok=False).stderr
    assert '--vocabulary has no effect' in err


def test_a_vocabulary_with_longer_tokens(tmp_path, char_data, monkeypatch):
    meta = pickle.loads(open(os.path.join(char_data, 'meta.pkl'), 'rb').read())
    meta['stoi']['<pad>'] = meta['vocab_size']
    meta['itos'][meta['vocab_size']] = '<pad>'
    meta['vocab_size'] += 1
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    for split in ('train', 'val'):
        shutil.copy(os.path.join(char_data, f'{split}.bin'), tmp_path)
    (tmp_path / 'new.txt').write_text('1 and 1 make 2.\n' * 50)
    monkeypatch.setenv('HOME', str(tmp_path))
    run_here('data/text/prepare.py', f'--input={tmp_path / "new.txt"}',
             f'--out_dir={tmp_path / "new"}', '--vocabulary=~')
    assert decode(meta, read_ids(tmp_path / 'new')[0]).startswith('1 and 1 make 2.\n')


def test_parts_of_no_documents(tmp_path):
    err = run_here('data/openwebtext/prepare.py', '--part=0', f'--out_dir={tmp_path / "x"}',
                   ok=False).stderr
    assert 'part=0 must be at least 1' in err


@pytest.mark.parametrize('mark', ['\ufeff', ''])
def test_a_byte_order_mark_is_not_text(tmp_path, mark):
    (tmp_path / 'x.txt').write_text(mark + 'to be or not to be ' * 50, encoding='utf-8')
    run_here('data/text/prepare.py', f'--input={tmp_path / "x.txt"}', f'--out_dir={tmp_path}')
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    assert ''.join(meta['stoi']) == ' benort'


def test_a_large_vocabulary_is_not_printed_as_a_whole(tmp_path):
    text = ''.join(map(chr, range(0x4e00, 0x5e00)))
    (tmp_path / 'x.txt').write_text(text * 2, encoding='utf-8')
    out = run_here('data/text/prepare.py', f'--input={tmp_path / "x.txt"}', f'--out_dir={tmp_path}')
    assert 'vocabulary: 4096 characters' in out.stdout and len(out.stdout) < 2000


# what data/shakespeare_char/prepare.py runs: nothing else of the repository is needed
PREPARE_FILES = ('configurator.py', 'runtime/__init__.py', 'runtime/console.py',
                 'runtime/settings.py', 'runtime/config_files.py', 'runtime/ranges.py',
                 'runtime/tokenizer.py', 'runtime/meta.py', 'runtime/pickles.py',
                 'runtime/files.py', 'data/corpus.py',
                 'data/shakespeare_char/prepare.py')


def test_an_input_txt_in_the_folder_is_taken(tmp_path):
    for name in PREPARE_FILES:
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    folder = tmp_path / 'data' / 'shakespeare_char'
    (folder / 'input.txt').write_text('to be or not to be')
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    subprocess.run([sys.executable, str(folder / 'prepare.py')], check=True, env=env)
    assert sorted(os.listdir(folder)) == ['input.txt', 'meta.pkl', 'prepare.py', 'train.bin',
                                          'val.bin']
