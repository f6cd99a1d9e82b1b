"""
Reads one file of any common kind: how it is compressed and encoded, and the texts or rows in it.
"""
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib

from runtime.console import fail, get_first_line

PIECE_LENGTH = 2 ** 16  # characters of a text file that are read together
MAX_ROW_LENGTH = 2 ** 26  # characters
MARKS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}  # UTF-32 begins as UTF-16
# up to the last place after a line or before a space, between other characters
CUT = re.compile(r'.*\S(\n(?=\S)|(?= \S))', re.DOTALL)
SEPARATORS = re.compile(r'[\s,\[\]]*')  # between the values of a JSON file


def open_zstandard(f):
    import pyarrow
    return pyarrow.CompressedInputStream(f, 'zstd')


ERRORS = OSError, EOFError, lzma.LZMAError, zlib.error  # of damaged files
# by the first bytes of a file
DECOMPRESSORS = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open,
                 b'\x28\xb5\x2f\xfd': open_zstandard}


def decompress(f):
    """The stream of an open file's content, whose first bytes say how it is compressed."""
    head = f.peek(8)
    for mark, decompressor in DECOMPRESSORS.items():
        if head.startswith(mark):
            return io.BufferedReader(decompressor(f))
    return f


def detect_encoding(head):
    """The encoding of a text by its first bytes: UTF-8, unless a mark says more; '' for no text."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    return '' if b'\0' in head else 'utf-8'


def find_bad_byte(path, encoding):
    """The number of the first byte that isn't in this encoding, counted from 0."""
    decoder = codecs.getincrementaldecoder(encoding)()
    num_bytes = 0
    with open(path, 'rb') as f:
        stream = decompress(f)
        while True:
            block = stream.read(PIECE_LENGTH)
            num_kept_bytes = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                return num_bytes - num_kept_bytes + e.start
            if not block:
                return num_bytes
            num_bytes += len(block)


def read_pieces(f):
    """(piece, is_last) of a text file.

    A piece ends between two lines or words. With GPT-2's pattern no token of a byte-level BPE
    crosses such a place, so the pieces have the tokens of the whole text.
    """
    text = ''
    while block := f.read(PIECE_LENGTH):
        text += block
        match = CUT.match(text)
        if match:
            yield match[0], False
            text = text[match.end():]
        elif len(text) > 16 * PIECE_LENGTH:  # a text without lines and words
            yield text[:-1], False
            text = text[-1:]
    if text:
        yield text, True


def read_csv(f, head):
    """The rows of a table as dicts. head are its first characters."""
    csv.field_size_limit(MAX_ROW_LENGTH)
    delimiter = max(',\t;', key=head.partition('\n')[0].count)
    return csv.DictReader(read_lines(f), delimiter=delimiter, strict=True)


def split_first_line(head):
    """The names of the columns in the first characters of a table; [] if they aren't one."""
    try:
        return read_csv(io.StringIO(head.partition('\n')[0]), head).fieldnames or []
    except csv.Error:
        return []


def read_lines(f):
    """The lines of a file; ValueError for one that would take too much memory."""
    while line := f.readline(MAX_ROW_LENGTH):
        if len(line) == MAX_ROW_LENGTH:
            raise ValueError(f'a line has {MAX_ROW_LENGTH:,} characters or more')
        yield line


def read_json(f):
    """The values in a file: one in each line, or after another, or in one array."""
    decoder = json.JSONDecoder()
    text = ''
    num_lines = 0
    while True:
        block = f.read(max(2 ** 20, len(text)))  # more and more for a long value
        text += block
        start = SEPARATORS.match(text).end()
        while start < len(text):
            try:
                value, start = decoder.raw_decode(text, start)
            except json.JSONDecodeError as e:
                is_complete = e.pos < len(text) - 16 and not e.msg.startswith('Unterminated')
                if is_complete or not block or len(text) - start > MAX_ROW_LENGTH:
                    line = num_lines + 1 + text.count('\n', 0, e.pos)
                    raise ValueError(f'line {line:,}: {e.msg}') from e
                break
            yield value
            start = SEPARATORS.match(text, start).end()
        if not block:
            return
        num_lines += text.count('\n', 0, start)
        text = text[start:]


def read_parquet(f, column):
    """The texts in a column, or one dict with the names of all columns if this one isn't there."""
    from pyarrow import parquet
    table = parquet.ParquetFile(f, pre_buffer=False)
    if column not in table.schema_arrow.names:
        yield dict.fromkeys(table.schema_arrow.names)
        return
    for batch in table.iter_batches(batch_size=1000, columns=[column]):
        yield from batch.column(0).to_pylist()


def read_hub(name):
    """The rows of a dataset on the Hugging Face hub: owner/name or owner/name:configuration."""
    import datasets
    path, _, configuration = name.partition(':')
    try:
        yield from datasets.load_dataset(path, configuration or None, split='train',
                                         streaming=True)
    except Exception as e:  # network, hub and disk errors have no common base class
        fail(f'{name} is not a file here, and as a dataset of the Hugging Face hub it could not be '
             f'fetched ({type(e).__name__}: {get_first_line(e)})',
             'check the name; without a network, name files')
