"""data/text/prepare.py: every form in which text comes, and every way in which it may be wrong."""
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import shlex
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT, expect_error, metrics, run, run_here

sys.path.insert(0, os.path.join(ROOT, 'data'))
import encode
import plan
import readers
from documents import Documents

from runtime import tokenizer_json
from runtime.tokenizer import FileTokenizer

TEXTS = [f'{i}: où, "là"?\nline two\n' * (1 + i % 3) for i in range(40)]
EMPTY_ROWS = {3, 17}  # without text


def prepare(folder, *args, tokenizer='bytes', ok=True):
    return run_here('data/text/prepare.py', f'--out_dir={folder}', f'--tokenizer={tokenizer}',
                    *args, ok=ok)


def read_documents(folder, end=256):
    """The texts in the bins of bytes, {split: [text, ...]}."""
    texts = {}
    for split in ('train', 'val'):
        ids = np.fromfile(os.path.join(folder, f'{split}.bin'), dtype='<u2')
        parts = np.split(ids, np.flatnonzero(ids == end) + 1)
        texts[split] = [bytes(part[part != end].tolist()).decode() for part in parts if len(part)]
    return texts


def list_rows():
    return [None if i in EMPTY_ROWS else text for i, text in enumerate(TEXTS)]


def make_jsonl():
    return ''.join(json.dumps({'id': i, 'text': text}) + '\n' for i, text in enumerate(list_rows()))


def make_csv(delimiter=','):
    f = io.StringIO()
    writer = csv.writer(f, delimiter=delimiter)
    writer.writerow(['id', 'text'])
    writer.writerows(enumerate(list_rows()))
    return f.getvalue()


def compress_zstandard(content):
    import pyarrow
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, 'zstd') as f:
        f.write(content)
    return sink.getvalue().to_pybytes()


def make_parquet():
    import pyarrow
    from pyarrow import parquet
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({'n': list(range(40)), 'text': list_rows()}), sink,
                        row_group_size=7)
    return sink.getvalue().to_pybytes()


ROWS = {
    'a.jsonl': lambda: make_jsonl().encode(), 'a.csv': lambda: make_csv().encode(),
    'a.tsv': lambda: make_csv('\t').encode(), 'semicolons.csv': lambda: make_csv(';').encode(),
    'array.json': lambda: json.dumps([{'text': text} for text in list_rows()], indent=2).encode(),
    'strings.json': lambda: json.dumps(list_rows()).encode(),
    'one_line.json': lambda: make_jsonl().replace('\n', ' ').encode(),
    'looks_like_json': lambda: make_jsonl().encode(), 'looks.txt': lambda: make_csv().encode(),
    'marked.csv': lambda: make_csv().encode('utf-8-sig'), 'a.parquet': make_parquet,
    'u16.jsonl': lambda: make_jsonl().encode('utf-16'),
    'a.jsonl.gz': lambda: gzip.compress(make_jsonl().encode()),
    'two.csv.gz': lambda: gzip.compress(make_csv()[:99].encode()) + gzip.compress(
        make_csv()[99:].encode()),  # two members, as `cat a.gz b.gz` makes them
    'a.csv.bz2': lambda: bz2.compress(make_csv().encode()),
    'a.json.xz': lambda: lzma.compress(make_jsonl().encode()),
    'a.jsonl.zst': lambda: compress_zstandard(make_jsonl().encode()),
    'wrong_name.txt': lambda: gzip.compress(make_jsonl().encode()),
}


@pytest.mark.parametrize('name', ROWS)
def test_rows_are_documents(tmp_path, name):
    (tmp_path / name).write_bytes(ROWS[name]())
    out = prepare(tmp_path / 'data', f'--input={tmp_path / name}').stdout
    texts = read_documents(tmp_path / 'data')
    expected = [text for text in list_rows() if text]
    assert sorted(texts['train'] + texts['val']) == sorted(expected)
    assert texts['train'] == [text for text in expected if text not in texts['val']]
    assert 0.05 < len(''.join(texts['val'])) / len(''.join(expected)) < 0.2
    assert 'skipped rows without text: 2\n' in out and 'in 38 documents' in out


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_a_mark_says_how_a_text_is_encoded(tmp_path, encoding):
    text = ''.join(TEXTS)
    (tmp_path / 'a.txt').write_bytes(text.encode(encoding))
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.txt"}')
    texts = read_documents(tmp_path / 'data')
    assert texts['train'] + texts['val'] == [text[:int(0.9 * len(text))],
                                             text[int(0.9 * len(text)):]]


def test_an_encoding_by_name(tmp_path):
    text = 'où est-il? là!\n' * 50
    path = tmp_path / 'a.txt'
    path.write_bytes(b'a' * 9000 + text.encode('latin-1'))
    err = prepare(tmp_path / 'data', f'--input={path}', ok=False).stderr
    assert f'{path} is not UTF-8: byte 9,001 is wrong' in err and '--encoding=cp1252' in err
    prepare(tmp_path / 'data', f'--input={path}', '--encoding=latin-1')
    assert ''.join(sum(read_documents(tmp_path / 'data').values(), [])).endswith(text)
    err = prepare(tmp_path / 'x', f'--input={path}', '--encoding=latin-99', ok=False).stderr
    assert "encoding='latin-99' is not known" in err and not (tmp_path / 'x').exists()


def test_a_mark_is_not_text_with_an_encoding_by_name_either(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'a word \xc3\xa9 ' .join([codecs.BOM_UTF8] + [b''] * 20))
    for name in ('utf-8', 'UTF8'):
        prepare(tmp_path / 'data', f'--input={tmp_path / "a.txt"}', f'--encoding={name}')
        text = ''.join(sum(read_documents(tmp_path / 'data').values(), []))
        assert text.startswith('a word é a word') and '\ufeff' not in text


def test_several_inputs_and_folders(tmp_path):
    for name in ('books/b.txt', 'books/a.txt', 'books/deep/c.md', 'books/.git/x', 'd.txt', 'e.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'this is {name}. ' * 20)
    (tmp_path / 'books' / 'picture.png').write_bytes(b'\x89PNG\r\n\0\0')
    out = run_here('data/text/prepare.py', '--input=books,?.txt,d.txt', '--out_dir=data',
                   '--tokenizer=bytes', cwd=tmp_path).stdout
    texts = read_documents(tmp_path / 'data')
    names = ['books/a.txt', 'books/b.txt', 'books/deep/c.md', 'd.txt', 'e.txt']  # each once
    joined = ''.join(texts['train'] + texts['val'])
    assert joined == ''.join(f'this is {name}. ' * 20 for name in names)
    assert 'in 5 documents' in out and 'skipped files that have no text in UTF-8: 1,' in out
    (tmp_path / 'a,b.txt').write_text('a comma in the name ' * 20)
    prepare(tmp_path / 'data', f'--input={tmp_path / "a,b.txt"}')


def test_files_without_text_in_a_folder(tmp_path):
    """They are left out and counted. A file that somebody has named is a mistake."""
    folder = tmp_path / 'books'
    folder.mkdir()
    (folder / 'a.txt').write_text('some words ' * 50)
    (folder / 'latin.txt').write_bytes('où '.encode('latin-1') * 50)
    (folder / 'package.json').write_text('{"name": "x", "version": "1"}')
    out = prepare(tmp_path / 'data', f'--input={folder}').stdout
    assert ''.join(sum(read_documents(tmp_path / 'data').values(), [])) == 'some words ' * 50
    assert 'skipped files that have no text in UTF-8: 2, such as ' in out
    (folder / 'a.txt').unlink()
    err = prepare(tmp_path / 'x', f'--input={folder}/*.json', ok=False).stderr
    assert "has no field 'text' or column 'text', but name, version" in err and '--field=' in err
    assert err.count('\n') == 1 and not (tmp_path / 'x').exists()


def test_line_ends_of_old_macs(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one line\ranother, longer line\r' * 20)
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.txt"}')
    text = ''.join(sum(read_documents(tmp_path / 'data').values(), []))
    assert text == 'one line\nanother, longer line\n' * 20


def test_folders_that_are_links(tmp_path):
    for name in ('books/a.txt', 'elsewhere/b.txt'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f'this is {name}. ' * 20)
    (tmp_path / 'books' / 'more').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'circle').symlink_to(tmp_path / 'books')
    pieces = list(Documents(str(tmp_path / 'books')))
    assert ''.join(text for text, _ in pieces) == (
        'this is books/a.txt. ' * 20 + 'this is elsewhere/b.txt. ' * 20)
    assert sum(is_last for _, is_last in pieces) == 2


def test_standard_input_and_a_pipe(tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'data', 'text', 'prepare.py'), '--input=-',
               f'--out_dir={tmp_path / "data"}', '--tokenizer=bytes']
    subprocess.run(command, input=gzip.compress(make_jsonl().encode()), check=True,
                   capture_output=True)
    texts = read_documents(tmp_path / 'data')
    assert sorted(texts['train'] + texts['val']) == sorted(t for t in list_rows() if t)
    if os.name == 'posix':
        out = subprocess.run(['bash', '-c', 'exec "$@" --input=<(echo some words; echo and more)',
                              'bash', *command[:2], *command[3:]], capture_output=True, text=True)
        assert 'text: 20 bytes in 1 document' in out.stdout, out


def test_the_syntax_itself(tmp_path):
    for name, content, flag in (('a.jsonl', make_jsonl(), '--field='),
                                ('a.csv', make_csv(), '--column=')):
        (tmp_path / name).write_text(content, encoding='utf-8')
        prepare(tmp_path / 'data', f'--input={tmp_path / name}', flag)
        texts = read_documents(tmp_path / 'data')
        assert ''.join(texts['train'] + texts['val']) == content.replace('\r\n', '\n')


def test_a_dataset_of_the_hub_by_name(capsys):
    err = run('data/text/prepare.py', '--input=owner/name:part', '--name=x', ok=False).stderr
    assert 'owner/name:part is not a file here' in err and 'Hugging Face hub' in err
    for name in ('owner/Name-2.5', 'owner/name_v1.0:part'):  # a version, and not a file's suffix
        assert Documents(name).paths == [name]
    for name in ('owner/name.txt', 'owner/name.jsonl.gz'):
        assert f'{name} cannot be read' in expect_error(capsys, Documents, name)


def test_other_names_of_the_text(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"body": "some words here", "n": 1}\n' * 30)
    (tmp_path / 'a.csv').write_text('n,body\n' + '1,"some words, here"\n' * 30)
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.jsonl"}', '--field=body')
    assert set(read_documents(tmp_path / 'data')['train']) == {'some words here'}
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.csv"}', '--column=body')
    assert set(read_documents(tmp_path / 'data')['train']) == {'some words, here'}


def test_some_rows_are_without_the_field(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"id": 1}\n' + '{"text": "some words", "id": 1}\n{}\n' * 30)
    out = prepare(tmp_path / 'data', f'--input={tmp_path / "a.jsonl"}').stdout
    assert set(read_documents(tmp_path / 'data')['train']) == {'some words'}
    assert 'in 30 documents' in out and 'skipped rows without text: 31\n' in out


def test_half_a_character_in_json(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a \\ud83d b \\ud83d\\ude00 c"}\n' * 30)
    for tokenizer in ('bytes', 'char', 'bpe'):
        prepare(tmp_path / 'data', f'--input={tmp_path / "a.jsonl"}', tokenizer=tokenizer)
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.jsonl"}')
    assert set(read_documents(tmp_path / 'data')['train']) == {'a \ufffd b \U0001f600 c'}


def make_damaged_parquet():
    """A column of texts, one of which isn't in UTF-8."""
    import pyarrow
    from pyarrow import parquet
    buffers = [None, pyarrow.py_buffer(np.array([0, 3, 8], '<i4').tobytes()),
               pyarrow.py_buffer(b'abccaf\xe9!')]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({'text': texts}), sink)
    return sink.getvalue().to_pybytes()


def make_zip():
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as archive:
        archive.writestr('a.txt', 'some words')
    return f.getvalue()


MISTAKES = [
    ('empty.txt', b'', 'is empty'), ('mark.txt', codecs.BOM_UTF8, 'is empty'),
    ('zeros.txt', b'a\0b', 'is not text'), ('picture.png', b'\x89PNG\0', 'is not text'),
    ('bad.jsonl', b'{"text": "a"}\n{"text": \n{"text": "b"}\n{"text": "a long enough text"}\n',
     'line 4: '),
    ('cut.jsonl', b'{"text": "a"}\n{"text": "b', 'line 2: '),
    ('deep.json', b'[' * 10 ** 6 + b'{"a":' * 10 ** 6, 'cannot be read'),
    ('big_number.json', b'{"text": ' + b'1' * 5000 + b'}', 'cannot be read'),
    ('numbers.jsonl', b'{"text": 1}\n' * 3, 'has no text, only 3 rows without one'),
    ('other.jsonl', b'{"body": "a", "n": 1}\n', "has no field 'text', but body, n"),
    ('other.csv', b'body,n\nx,1\n', "has no column 'text', but body, n"),
    ('cut.txt.gz', gzip.compress(os.urandom(10 ** 5))[:1000], 'cannot be read'),
    ('bad.gz', b'\x1f\x8b\x08\0\0\0\0\0\0\xff' + b'x' * 100, 'cannot be read'),
    ('cut.xz', lzma.compress(b'a' * 10 ** 6)[:50], 'cannot be read'),
    ('cut.bz2', bz2.compress(b'a' * 10 ** 6)[:40], 'cannot be read'),
    ('cut.parquet', b'PAR1' + b'x' * 100, 'cannot be read'),
    ('latin.parquet', make_damaged_parquet(), 'has a text that is not UTF-8'),
    ('quote.csv', b'id,text\n1,"a text\n2,b\n', 'unexpected end of data'),
    ('books.zip', make_zip(), 'unpack an archive first'),
    ('other.parquet', make_parquet().replace(b'text', b'body'), "no column 'text', but n, body"),
    ('latin.csv.gz', gzip.compress(b'id,text\n1,caf\xe9\n'), 'byte 13 is wrong'),
    ('u16.txt', codecs.BOM_UTF16_LE + b'a\0b', 'UTF-16: byte 4 is wrong'),
]


@pytest.mark.parametrize('name, content, words', MISTAKES)
def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    err = prepare(tmp_path / 'data', f'--input={tmp_path / name}', ok=False).stderr
    assert words in err and name in err
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize('args, words', [
    (['--input=none/'], 'none'), (['--input=*.none'], 'no file matches *.none'),
    (['--input=/dev/zero'], 'it is a device'), (['--val_share=0', '--input=a.txt'], 'val_share=0.'),
    (['--val_share=1.5', '--input=a.txt'], 'val_share=1.5 must be above 0 and below 1'),
    (['--input=a.txt', '--tokenizer=bpe', '--vocab_size=200'], 'vocab_size=200 is less than 257'),
    (['--input=a.txt', '--tokenizer=none.json'], "tokenizer='none.json' is not known"),
    (['--input=a.txt', '--tokenizer=bad.json'], 'bad.json is not a usable tokenizer.json'),
    (['--input=a.txt', '--num_threads=-1'], 'num_threads=-1 must be at least 0'),
    (['--input=a.txt', '--encoding=undefined'], "encoding='undefined' is not known"),
    (['--input=a.parquet', '--encoding=latin-1'], 'a.parquet has a text that is not UTF-8'),
    (['--input=zeros.txt', '--encoding=latin-1'], 'zeros.txt is not text'),
    (['--input=a.txt', '--vocabulary=none'], "vocabulary='none' is neither a dataset nor"),
    (['--input=a.txt', '--vocabulary=x', '--vocab_size=300'], 'no effect with --vocabulary'),
    (['--input=a.txt', '--encoding=hex'], "encoding='hex' is not known"),
    (['a.txt'], 'did you mean --input=a.txt?'), (['.'], 'did you mean --input=.?'),
])
def test_mistakes_in_settings(tmp_path, args, words):
    (tmp_path / 'a.txt').write_text('some words ' * 50)
    (tmp_path / 'a.parquet').write_bytes(make_damaged_parquet())
    (tmp_path / 'zeros.txt').write_bytes(b'a\0b')
    (tmp_path / 'bad.json').write_text('{"model": {}}')
    err = run_here('data/text/prepare.py', '--out_dir=data', *args, cwd=tmp_path, ok=False).stderr
    assert words in err and not (tmp_path / 'data').exists()


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads all files')
def test_a_file_without_access(tmp_path):
    (tmp_path / 'a.txt').write_text('words')
    (tmp_path / 'a.txt').chmod(0)
    err = prepare(tmp_path / 'data', f'--input={tmp_path / "a.txt"}', ok=False).stderr
    assert 'Permission denied' in err


# -----------------------------------------------------------------------------
# pieces and splits
def test_pieces_of_a_text_have_the_tokens_of_the_whole(bpe, monkeypatch):
    import tiktoken
    gpt2 = tiktoken.get_encoding('gpt2')
    monkeypatch.setattr(readers, 'PIECE_LENGTH', 50)
    text = 'One two.\n\n\n  three\n four\n"five"\n\n six 7\n\t8\nnine\n' * 40 + 'a long line ' * 300
    pieces = list(readers.read_pieces(io.StringIO(text)))
    assert ''.join(piece for piece, _ in pieces) == text and len(pieces) > 30
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [i for piece, _ in pieces for i in gpt2.encode_ordinary(piece)]
    assert ids == gpt2.encode_ordinary(text)


def test_a_line_without_an_end_is_cut(monkeypatch):
    monkeypatch.setattr(readers, 'PIECE_LENGTH', 10)
    text = 'x' * 1000
    pieces = [piece for piece, _ in readers.read_pieces(io.StringIO(text))]
    assert ''.join(pieces) == text and max(map(len, pieces)) <= 180


def test_a_line_of_a_table_without_an_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, 'MAX_ROW_LENGTH', 1000)
    for name, row, words in (('a.csv', 'x' * 1000, 'a line has 1,000 characters or more'),
                             ('b.csv', '"' + 'x\n' * 999 + '"', 'larger than field limit')):
        (tmp_path / name).write_text('text\na b\n' + row + '\n')
        documents = Documents(str(tmp_path / name))
        assert words in expect_error(capsys, list, documents)


def test_documents_are_split_whole_and_evenly():
    documents = [(str(i) * (1 + i % 7), True) for i in range(1000)]
    splits = {'train': [], 'val': []}
    for text, is_last, split in encode.split_by_document(iter(documents), 0.03):
        splits[split].append(text)
    share = len(''.join(splits['val'])) / sum(len(text) for text, _ in documents)
    assert 0.028 < share < 0.032
    book = [('x' * 1000, i == 99) for i in range(100)]  # a long document among short ones
    pieces = [('a' * 2000, True), *book, *[('b', True)] * 30]
    num_val = sum(len(t) for t, _, s in encode.split_by_document(iter(pieces), 0.1) if s == 'val')
    assert 0.05 < num_val / 102_030 < 0.25
    in_two_pieces = [('a', False), ('b', True)] * 50  # of one document each
    for split in ('train', 'val'):
        texts = [t for t, _, s in encode.split_by_document(iter(in_two_pieces), 0.2) if s == split]
        assert texts == ['a', 'b'] * (len(texts) // 2) and texts


@pytest.mark.parametrize('place', [0, 1, 7, 199])
def test_a_very_long_row_among_others(tmp_path, place):
    rows = [{'text': f'{i} some words ' * 20} for i in range(200)]
    rows[place] = {'text': 'a long document. ' * 65_000}
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.jsonl"}')
    sizes = [os.path.getsize(tmp_path / 'data' / f'{split}.bin') for split in ('val', 'train')]
    assert 0.05 < sizes[0] / sum(sizes) < 0.2


def test_a_document_of_two_pieces_ends_once(tmp_path):
    tokenizer = FileTokenizer(tokenizer_json.make_bytes())
    encoder = encode.Encoder(tokenizer, '<u2', {'train': None, 'val': None})
    ids, num_bytes, num_documents = encoder.encode([
        ('é', False, 'train'), ('b', True, 'train'), ('c', True, 'val'), ('d', False, 'train')])
    assert {split: array.tolist() for split, array in ids.items()} == {
        'train': [*'é'.encode(), ord('b'), 256, ord('d')], 'val': [ord('c'), 256]}
    assert num_bytes == {'train': 4, 'val': 1} and num_documents == 2


@pytest.mark.parametrize('num_train', [0, 1, 4, 5, 6, 11])
def test_one_text_is_split_by_its_characters(num_train):
    pieces = list(encode.split_at(iter([('abcde', False), ('fghijk', True)]), num_train))
    text = 'abcdefghijk'
    for split, expected in (('train', text[:num_train]), ('val', text[num_train:])):
        assert ''.join(text for text, _, s in pieces if s == split) == expected
    assert [is_last for _, is_last, _ in pieces] == [False] * (len(pieces) - 1) + [True]


def test_the_bins_do_not_depend_on_the_number_of_threads(tmp_path, shakespeare, bpe):
    with open(shakespeare, encoding='utf-8') as f:
        rows = [json.dumps({'text': text}) for text in f.read().split('\n\n')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(rows * 5))
    contents = []
    for threads in (1, 3):
        prepare(tmp_path / str(threads), f'--input={tmp_path / "a.jsonl"}', tokenizer='gpt2',
                *[f'--num_threads={threads}'])
        contents.append([(tmp_path / str(threads) / f'{split}.bin').read_bytes()
                         for split in ('train', 'val')])
    assert contents[0] == contents[1] and len(contents[0][0]) > 10 ** 6


def test_reading_takes_little_memory(tmp_path):
    """A pass over 200 MB keeps none of it."""
    import tracemalloc
    line = json.dumps({'text': 'some words ' * 900}) + '\n'
    with gzip.open(tmp_path / 'a.jsonl.gz', 'wt', compresslevel=1) as f:
        for _ in range(200):
            f.write(line * 100)
    documents = Documents(str(tmp_path / 'a.jsonl.gz'))
    tracemalloc.start()
    num_documents = sum(is_last for _, is_last in documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_documents == 20000 and peak < 20 * 2 ** 20


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_failure_in_the_middle_keeps_the_earlier_dataset(tmp_path):
    prepare(tmp_path / 'data', f'--input={__file__}')
    before = read_files(tmp_path / 'data')
    lines = [json.dumps({'text': 'some words ' * 1000})] * 300 + ['{']
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    prepare(tmp_path / 'data', f'--input={tmp_path / "a.jsonl"}', ok=False)
    assert read_files(tmp_path / 'data') == before
    assert pickle.loads(before['meta.pkl'])['vocab_size'] == 257


def test_fineweb_edu_from_local_files(tmp_path, bpe):
    import tiktoken
    gpt2 = tiktoken.get_encoding('gpt2')
    (tmp_path / 'a.parquet').write_bytes(make_parquet())
    out = run_here('data/fineweb_edu/prepare.py', f'--input={tmp_path}/*.parquet',
                   '--val_share=0.1', f'--out_dir={tmp_path / "data"}').stdout
    documents = []
    for split in ('train', 'val'):
        ids = np.fromfile(tmp_path / 'data' / f'{split}.bin', dtype='<u2')
        documents += np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]
    expected = [gpt2.encode_ordinary(text) + [50256] for text in list_rows() if text]
    assert sorted(ids.tolist() for ids in documents) == sorted(expected)
    assert 'config/train_gpt2.py' in out and 'skipped rows without text: 2\n' in out


@pytest.mark.parametrize('num_characters', [50_000, 250_000])
def test_the_command_that_is_printed_trains_as_planned(tmp_path, shakespeare, num_characters):
    with open(shakespeare, encoding='utf-8') as f:
        (tmp_path / 'a.txt').write_text(f.read(num_characters))
    out = prepare(tmp_path / 'data', f'--input={tmp_path / "a.txt"}', tokenizer='char').stdout
    words = shlex.split(out.partition('train on it: ')[2])
    run_here(*words[1:], f'--out_dir={tmp_path / "out"}', '--eval_iters=1', '--warmup_iters=0',
             '--max_iters=1', '--device=cpu')
    settings = metrics(tmp_path / 'out', 'run')[0]['config']
    num_tokens = 0.9 * num_characters
    n_embd, dropout, passes = next(row[1:] for row in plan.PLANS if num_tokens <= row[0])
    assert (settings['n_embd'], settings['dropout']) == (n_embd, dropout)
    num_iters = int(dict(word.split('=') for word in words if '=' in word)['--max_iters'])
    assert num_iters == settings['lr_decay_iters']
    tokens_per_iter = settings['batch_size'] * settings['block_size']
    assert 0 < num_iters * tokens_per_iter <= 1.1 * passes * num_tokens
