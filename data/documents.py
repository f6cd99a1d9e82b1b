"""
The texts in files of any common kind, one document after another, in little memory.

Text, JSON, JSON Lines, CSV, TSV and Parquet are read, also compressed (.gz, .bz2, .xz, .zst), and
datasets of the Hugging Face hub by name. A text file is one document. So is each row of the others.
"""
import codecs
import csv
import glob
import io
import os
import re
import shutil
import stat
import sys
import tempfile

import readers

from runtime.console import fail, get_first_line, shorten
from runtime.files import check_file

TITLE = 'the input'  # of what comes through a pipe
HUB_NAME = re.compile(r'[\w-]+/[\w.-]*[\w-](:[\w.-]+)?')  # owner/name:configuration
HALVES = re.compile('[\ud800-\udfff]')  # of a character in UTF-16, which JSON may have by mistake
JSON_START = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
WIDE_ENCODINGS = 'utf-16', 'utf_16', 'utf16', 'utf-32', 'utf_32', 'utf32'  # they have zero bytes
MAX_ROWS_WITHOUT = 1000  # rows without the field or column; then the file has none
KINDS = {'.json': 'json', '.jsonl': 'json', '.ndjson': 'json', '.csv': 'csv', '.tsv': 'csv'}


class Documents:
    """The documents of an input: files, folders, globs, - or names on the hub, between commas.

    Iterating gives (text, is_last): a piece of a document, and whether it is the last one. field
    and column name the text in JSON and in tables; '' means that the syntax itself is the text.
    num_skipped counts rows without text, and skipped_files has the files in folders that aren't
    text. num_read_bytes of num_bytes are read.
    """

    def __init__(self, input, field='text', column='text', encoding=''):
        self.field, self.column, self.encoding = field, column, encoding
        try:
            ''.encode(encoding or 'utf-8')
        except (LookupError, UnicodeError):
            fail(f'encoding={encoding!r} is not known', 'for example: --encoding=latin-1')
        if encoding and codecs.lookup(encoding).name == 'utf-8':
            self.encoding = 'utf-8-sig'  # also without a mark
        self.spooled_files = {}  # {path: file}: copies of pipes, which can't be read twice
        self.named_paths = [TITLE]
        self.paths = list(dict.fromkeys(self.list_paths(input)))
        self.num_bytes = sum(os.path.getsize(path) for path in self.paths if os.path.exists(path))
        self.start()

    def start(self):
        self.num_read_bytes = self.num_skipped = 0
        self.skipped_files = []
        self.other_names = []  # of fields or columns in a skipped file

    def list_paths(self, input):
        """The paths of all files, and the names on the hub."""
        names = [input] if os.path.exists(input) else input.split(',')
        for name in (os.path.expanduser(name.strip()) for name in names if name.strip()):
            if name == '-' or is_pipe(name):
                yield self.spool(name)
            elif os.path.isdir(name):
                yield from list_folder(name)
            elif glob.has_magic(name) and not os.path.exists(name):
                paths = sorted(glob.glob(name, recursive=True))
                files = [path for path in paths if os.path.isfile(path)]
                if not files:
                    fail(f'no file matches {name}', 'put quotes around it if the shell changes it')
                yield from files
            elif os.path.exists(name) or not HUB_NAME.fullmatch(name) or has_suffix(name):
                try:
                    check_file(name)
                except OSError as e:
                    fail(f'{name} cannot be read ({e.strerror})',
                         'name a text file with --input=FILE')
                self.named_paths.append(name)
                yield name
            else:
                yield name

    def spool(self, name):
        """The path of a copy of what comes through a pipe or stdin."""
        source = sys.stdin.buffer if name == '-' else open(name, 'rb')
        copy = tempfile.NamedTemporaryFile()
        shutil.copyfileobj(source, copy)
        copy.flush()
        self.spooled_files[copy.name] = copy
        return copy.name

    def __iter__(self):
        self.start()
        for path in self.paths:
            if not os.path.exists(path):
                yield from self.take_texts(readers.read_hub(path), path, 'column', self.column)
                continue
            num_earlier_bytes = self.num_read_bytes
            with open(path, 'rb') as f:
                title = TITLE if path in self.spooled_files else path
                for item in self.read_file(f, title):
                    self.num_read_bytes = num_earlier_bytes + f.tell()
                    yield item
            self.num_read_bytes = num_earlier_bytes + os.path.getsize(path)

    def read_file(self, f, path):
        """The pieces of the documents in an open file."""
        encoding = ''
        try:
            if f.peek(4).startswith(b'PAR1'):
                rows = readers.read_parquet(f, self.column)
                return (yield from self.take_texts(rows, path, 'column', self.column))
            stream = readers.decompress(f)
            encoding = readers.detect_encoding(stream.peek())
            if self.encoding and (encoding or self.encoding.lower().startswith(WIDE_ENCODINGS)):
                encoding = self.encoding
            is_text = encoding and starts_with_text(stream.peek(), encoding)
            if not is_text and path not in self.named_paths:
                self.skipped_files.append(path)
                return
            if not encoding:
                fail(f'{path} is not text: it has characters of code 0, as archives and pictures '
                     'have', 'unpack an archive first; for UTF-16 without a mark use '
                     '--encoding=utf-16-le')
            head = stream.peek().decode(encoding, errors='ignore')
            kind = self.choose_kind(path, head)
            with io.TextIOWrapper(stream, encoding, newline='' if kind == 'csv' else None) as text:
                if kind == 'csv':
                    rows = readers.read_csv(text, head)
                    yield from self.take_texts(rows, path, 'column', self.column)
                elif kind == 'json':
                    rows = readers.read_json(text)
                    yield from self.take_texts(rows, path, 'field', self.field)
                else:
                    yield from readers.read_pieces(text)
        except UnicodeDecodeError:
            if not encoding:
                fail(f'{path} has a text that is not UTF-8', 'repair it, or leave it out')
            place = readers.find_bad_byte(f.name, encoding)
            fail(f'{path} is not {encoding.upper().removesuffix("-SIG")}: byte {place:,} is wrong',
                 'name the encoding of the file, such as --encoding=cp1252, cp1251 or gb18030, or '
                 'leave the file out')
        except (*readers.ERRORS, csv.Error, ValueError, RecursionError) as e:
            fail(f'{path} cannot be read ({get_first_line(e)})', 'repair it, or leave it out')

    def choose_kind(self, path, head):
        """json, csv or text, by the file's name, or else by its first characters."""
        stem, suffix = os.path.splitext(path.lower())
        if suffix in ('.gz', '.bz2', '.xz', '.zst'):
            suffix = os.path.splitext(stem)[1]
        kind = KINDS.get(suffix)
        if not kind and JSON_START.match(head):
            kind = 'json'
        if not kind:
            columns = readers.split_first_line(head)
            kind = 'csv' if len(columns) > 1 and self.column in columns else 'text'
        name = self.field if kind == 'json' else self.column
        return kind if name else 'text'  # without a name somebody wants the syntax

    def print_omissions(self):
        """Prints what wasn't taken."""
        if self.num_skipped:
            print(f'skipped rows without text: {self.num_skipped:,}')
        if self.skipped_files:
            encoding = (self.encoding or 'utf-8').upper().removesuffix('-SIG')
            print(f'skipped files that have no text in {encoding}: {len(self.skipped_files)}, such '
                  f'as {self.skipped_files[0]}')

    def take_texts(self, rows, path, setting, name):
        """The texts of rows. They are texts, or dicts that have a text by this name.

        setting is the one that names it, for a message.
        """
        names = []  # of the first row
        is_found = False
        for i, row in enumerate(rows):
            text = row.get(name) if isinstance(row, dict) else row
            is_found = is_found or not isinstance(row, dict) or name in row
            if not names and isinstance(row, dict):
                names = [shorten(' '.join(str(key).split()), 30) for key in row]
            if not is_found and i == MAX_ROWS_WITHOUT:
                break
            if not isinstance(text, str) or not text:
                self.num_skipped += 1
                continue
            if not text.isascii() and HALVES.search(text):
                text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            if len(text) > readers.PIECE_LENGTH:
                yield from readers.read_pieces(io.StringIO(text, newline=''))
            else:
                yield text, True
        if names and not is_found and path not in self.named_paths and os.path.exists(path):
            self.skipped_files.append(path)
            self.other_names = names
        elif names and not is_found:
            fail(f'{path} has no {setting} {name!r}, but {shorten(", ".join(names), 200)}',
                 f'name the one with the text: --{setting}=NAME; to train on the syntax of a text '
                 f'file, name nothing: --{setting}=')


def has_suffix(name):
    """Whether a name ends as those of files do, and not in a version such as 2.5."""
    return os.path.splitext(name.split(':')[0])[1][1:2].isalpha()


def is_pipe(path):
    return os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def starts_with_text(head, encoding):
    """Whether the first bytes of a file are a text in this encoding; the last one may be cut."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def list_folder(folder):
    """All files in a folder and the folders in it, but not the hidden ones."""
    known_folders = set()  # links may make a circle
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in known_folders:
            folders.clear()
            continue
        known_folders.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths = [os.path.join(parent, name) for name in sorted(names) if not name.startswith('.')]
        yield from [path for path in paths if os.path.isfile(path)]
