"""The prepare scripts: nanoGPT's bins to the byte, and every way their input may be wrong."""
import glob
import gzip
import hashlib
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, run, run_here


def sums(folder):
    """{split: (tokens, SHA-256)} of the bins in a folder, which holds nothing written aside."""
    assert not [name for name in os.listdir(folder) if name.endswith('.tmp')]
    out = {}
    for split in ('train', 'val'):
        with open(os.path.join(folder, f'{split}.bin'), 'rb') as f:
            content = f.read()
        out[split] = len(content) // 2, hashlib.sha256(content).hexdigest()
    return out


def expected(facts):
    return {split: (facts[split]['tokens'], facts[split]['sha256']) for split in ('train', 'val')}


def test_shakespeare_by_characters(tmp_path, shakespeare, golden_data):
    out = run('data/shakespeare_char/prepare.py', f'--input={shakespeare}', f'--out_dir={tmp_path}').stdout
    assert sums(tmp_path) == expected(golden_data['shakespeare_char'])
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    facts = golden_data['shakespeare_char']['meta']
    assert sorted(meta) == facts['keys'] and meta['vocab_size'] == 65 and ''.join(meta['stoi']) == facts['alphabet']
    assert meta['itos'] == dict(enumerate(facts['alphabet']))
    for part in ('1,115,394 characters', '1,003,854 tokens', '111,540 tokens', 'vocabulary: 65', ' s\n'):
        assert part in out


def test_shakespeare_in_bpe(tmp_path, shakespeare, bpe, golden_data):
    (tmp_path / 'meta.pkl').write_bytes(b'left by a dataset of characters')
    run('data/shakespeare/prepare.py', f'--input={shakespeare}', f'--out_dir={tmp_path}')
    assert sums(tmp_path) == expected(golden_data['shakespeare']) and not (tmp_path / 'meta.pkl').exists()


def test_readmes_agree_with_the_golden_sums(golden_data):
    for name in ('shakespeare_char', 'shakespeare'):
        with open(os.path.join(ROOT, 'data', name, 'readme.md'), encoding='utf-8') as f:
            text = f.read()
        for split in ('train', 'val'):
            assert golden_data[name][split]['sha256'] in text and f'{golden_data[name][split]["tokens"]:,}' in text


def paragraphs(shakespeare):
    with open(shakespeare, encoding='utf-8') as f:
        return f.read().split('\n\n')


def openwebtext(tmp_path, *args, **kw):
    return run('data/openwebtext/prepare.py', f'--out_dir={tmp_path / "out"}', '--num_proc=2', *args, HF_DATASETS_CACHE=str(tmp_path / 'cache'), **kw)


@pytest.mark.parametrize('kind', [pytest.param('parquet', marks=pytest.mark.slow), 'jsonl', pytest.param('txt.gz', marks=pytest.mark.slow)])
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
    assert f'{facts["train"]["documents"]:,} documents' in out and '4 documents, 189 tokens' in out
    if kind == 'jsonl':  # run again it takes what is cached, even where the bins are gone
        (tmp_path / 'out' / 'train.bin').unlink()
        openwebtext(tmp_path, f'--input={tmp_path}/*.{kind}')
        assert sums(tmp_path / 'out') == expected(facts)


def test_openwebtext_goes_on_where_it_was_stopped(tmp_path, bpe):
    with open(tmp_path / 'a.jsonl', 'w', encoding='utf-8') as f:
        for i in range(3000):
            f.write(json.dumps({'text': f'{i} ' + 'and so on ' * 400}) + '\n')
    args = [f'--input={tmp_path}/a.jsonl', f'--out_dir={tmp_path / "out"}', '--num_proc=2', '--part=500']

    def finished():
        return {path: os.stat(path).st_ino for path in glob.glob(f'{tmp_path}/cache/**/cache-*_of_*.arrow', recursive=True)}

    command = [sys.executable, os.path.join(ROOT, 'data', 'openwebtext', 'prepare.py'), *args]
    stopped = subprocess.Popen(command, env={**os.environ, 'HF_DATASETS_CACHE': str(tmp_path / 'cache')}, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(finished()) < 4:
        assert stopped.poll() is None
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGKILL)
    stopped.wait()
    kept = finished()
    assert len(kept) < 12 and not (tmp_path / 'out' / 'train.bin').exists()
    run('data/openwebtext/prepare.py', *args, HF_DATASETS_CACHE=str(tmp_path / 'cache'))
    assert kept.items() <= finished().items() and len(finished()) == 2 * 6 + 2  # two processes' shares of 6 parts, and of val
    run('data/openwebtext/prepare.py', *args[:1], f'--out_dir={tmp_path / "whole"}', '--num_proc=1', HF_DATASETS_CACHE=str(tmp_path / 'another'))
    assert sums(tmp_path / 'out') == sums(tmp_path / 'whole')


def test_openwebtext_of_two_documents(tmp_path, bpe):
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n{"text": "two <|endoftext|>"}\n')
    openwebtext(tmp_path, f'--input={tmp_path}/a.jsonl')
    train, val = (np.fromfile(tmp_path / 'out' / f'{s}.bin', dtype=np.uint16) for s in ('train', 'val'))
    assert train[-1] == val[-1] == 50256 and (np.concatenate((train, val)) == 50256).sum() == 2  # in a text it is no special token
    (tmp_path / 'b.jsonl').write_text('{"text": "one"}\n')
    assert '1 documents' in openwebtext(tmp_path, f'--input={tmp_path}/b.jsonl', ok=False).stderr
    (tmp_path / 'c.jsonl').write_text('{"words": "one"}\n')
    assert 'no column text' in openwebtext(tmp_path, f'--input={tmp_path}/c.jsonl', ok=False).stderr
    assert '0 files' in openwebtext(tmp_path, f'--input={tmp_path}/none*', ok=False).stderr
    assert 'one kind' in openwebtext(tmp_path, f'--input={tmp_path}/*', ok=False).stderr


def test_openwebtext_without_a_network(tmp_path, bpe):
    said = openwebtext(tmp_path, ok=False).stderr
    assert '--input=GLOB' in said and 'python_char' in said


def test_python_char(tmp_path):
    out = run('data/python_char/prepare.py', f'--out_dir={tmp_path / "a"}').stdout
    run('data/python_char/prepare.py', f'--out_dir={tmp_path / "b"}', cwd=tmp_path)
    assert sums(tmp_path / 'a') == sums(tmp_path / 'b') and 'characters of Python' in out
    meta = pickle.loads((tmp_path / 'a' / 'meta.pkl').read_bytes())
    assert set(meta['stoi']) <= set(map(chr, range(32, 127))) | set('\n\t')
    sizes = {split: tokens for split, (tokens, _) in sums(tmp_path / 'a').items()}
    assert 8e6 < sum(sizes.values()) < 10.2e6 and 0.03 < sizes['val'] / sum(sizes.values()) < 0.2
    # whole files: a module of the standard library stands in one split from its first to its last character
    text = {split: ''.join(meta['itos'][i] for i in np.fromfile(tmp_path / 'a' / f'{split}.bin', dtype=np.uint16).tolist()) for split in sizes}
    import argparse
    import textwrap
    for module in (argparse, textwrap):
        with open(module.__file__, encoding='ascii') as f:
            source = f.read()
        assert sum(source in t for t in text.values()) == 1


def test_python_char_of_no_bytes(tmp_path):
    assert 'max_bytes=0' in run_here('data/python_char/prepare.py', '--max_bytes=0', f'--out_dir={tmp_path}', ok=False).stderr


def test_your_own_text(tmp_path):
    text = 'Où est-il?\nÀ côté.\n' * 50
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8')
    run('data/text/prepare.py', '--input=book.txt', '--out_dir=mine', cwd=tmp_path)
    meta = pickle.loads((tmp_path / 'mine' / 'meta.pkl').read_bytes())
    train, val = (np.fromfile(tmp_path / 'mine' / f'{s}.bin', dtype=np.uint16) for s in ('train', 'val'))
    assert ''.join(meta['itos'][i] for i in np.concatenate((train, val)).tolist()) == text and len(train) == int(0.9 * len(text))


def test_your_own_text_by_name_in_bpe(tmp_path, bpe):
    (tmp_path / 'book.txt').write_text('Some words. ' * 200)
    name = f'test-{os.getpid()}'
    folder = os.path.join(ROOT, 'data', name)
    try:
        out = run('data/text/prepare.py', '--input=book.txt', f'--name={name}', '--tokenizer=gpt2', cwd=tmp_path).stdout
        assert f'--dataset={name}' in out and sorted(os.listdir(folder)) == ['train.bin', 'val.bin']
        assert np.fromfile(os.path.join(folder, 'train.bin'), dtype=np.uint16).max() < 50257
        import checks
        assert checks.locate_data(name) == os.path.join('data', name) or checks.locate_data(name) == folder
    finally:
        import shutil
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize('args, words', [
    (['--input=book.txt', '--name=..'], "'..'"),
    ([], 'your text and a name'), (['--input=book.txt'], 'your text and a name'), (['--input=none.txt', '--name=x'], 'none.txt cannot be read'),
    (['--input=empty.txt', '--name=x'], 'empty'), (['--input=latin.txt', '--name=x'], 'not UTF-8 (byte 1)'), (['--input=book.txt', '--name=a/b'], "'a/b'"),
    (['--input=book.txt', '--name=openwebtext'], "'openwebtext'"), (['--input=book.txt', '--name=x', '--tokenizer=bpe'], "'bpe'"),
    (['--input=short.txt', '--name=x'], '0 training'),
])
def test_mistakes(tmp_path, args, words):
    for name, content in (('book', b'words'), ('empty', b''), ('latin', b'a\xe9b'), ('short', b'a')):
        (tmp_path / f'{name}.txt').write_bytes(content)
    assert words in run_here('data/text/prepare.py', *args, cwd=tmp_path, ok=False).stderr
    assert not os.path.exists(os.path.join(ROOT, 'data', 'x'))


def test_more_characters_than_uint16_holds(tmp_path):
    chars = [chr(c) for c in range(32, 0x11000) if not 0xd800 <= c < 0xe000]
    (tmp_path / 'all.txt').write_text(''.join(chars * 2), encoding='utf-8')
    out = run_here('data/text/prepare.py', f'--input={tmp_path / "all.txt"}', f'--out_dir={tmp_path / "all"}').stdout
    meta = pickle.loads((tmp_path / 'all' / 'meta.pkl').read_bytes())
    assert meta['dtype'] == 'uint32' and meta['vocab_size'] > 2 ** 16 and '486,372 bytes' in out
    ids = np.fromfile(tmp_path / 'all' / 'train.bin', dtype='<u4')
    assert ids.max() == meta['vocab_size'] - 1 and ''.join(meta['itos'][i] for i in ids[:1000]) == ''.join(c for c in chars if c in meta['stoi'])[:1000]
    args = [*TINY, f'--dataset={tmp_path / "all"}', f'--out_dir={tmp_path / "out"}', '--max_iters=1']
    assert 'iter 0: loss 11.' in run_here('train.py', *args).stdout  # ln of the vocabulary
    assert len(run_here('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1', '--max_new_tokens=5', '--start=a').stdout) > 20


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


def test_downloads_are_retried_checked_and_whole(tmp_path, capsys):
    import sys
    sys.path.insert(0, os.path.join(ROOT, 'data'))
    import corpus
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f'http://127.0.0.1:{server.server_port}/input.txt', str(tmp_path / 'input.txt')
    Server.content, Server.failures = b'some text', 1
    try:
        corpus.download(url, hashlib.sha256(b'some text').hexdigest(), path)
        assert Server.requests == 2 and open(path, 'rb').read() == b'some text' and os.listdir(tmp_path) == ['input.txt']
        os.remove(path)
        with pytest.raises(SystemExit):
            corpus.download(url, '0' * 64, path)
    finally:
        server.shutdown()
        server.server_close()
    assert 'SHA-256' in capsys.readouterr().err and not os.listdir(tmp_path)
    with pytest.raises(SystemExit):
        corpus.download(url, '0' * 64, path, tries=1)  # nobody answers now
    said = capsys.readouterr().err
    assert 'could not be downloaded' in said and 'input.txt' in said and 'python_char' in said and not os.listdir(tmp_path)


def test_an_input_txt_in_the_folder_is_taken(tmp_path):
    # the script with nothing around it but what it reads: a copy of the house without its data
    import shutil
    for name in ('configurator.py', 'checks.py', 'tokenizer.py', 'data/corpus.py', 'data/shakespeare_char/prepare.py'):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    folder = tmp_path / 'data' / 'shakespeare_char'
    (folder / 'input.txt').write_text('to be or not to be')
    import subprocess
    import sys
    subprocess.run([sys.executable, str(folder / 'prepare.py')], check=True, env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    assert sorted(os.listdir(folder)) == ['input.txt', 'meta.pkl', 'prepare.py', 'train.bin', 'val.bin']
