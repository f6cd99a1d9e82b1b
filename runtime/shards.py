"""
A dataset's .bin files as arrays of token ids: one file of a split, or many shards.

A file is raw ids, as nanoGPT writes it, or has the header of llm.c and modded-nanogpt in front.
Nothing is copied: the files are memory-mapped.
"""
import bisect
import contextlib
import itertools
import mmap
import os
import re

import numpy as np

from runtime.console import fail, warn
from runtime.files import is_file

# the header is 256 int32: a magic number, the version, the number of tokens, and zeros
HEADER_BYTES = 1024
FORMATS = {20240520: (1, 'uint16'), 20240801: (7, 'uint32')}  # magic number: (version, dtype)
MAX_COPY = 2 ** 22  # tokens; a longer slice of several shards is not copied


def list_bins(folder, split):
    """The path of a split's .bin file in a list, or those of its shards, sorted; [] without any.

    A shard has the split's name in its own, as in fineweb_train_000001.bin. Fails if the shards
    belong to several datasets.
    """
    path = os.path.join(folder, f'{split}.bin')
    if is_file(path):
        return [path]
    if not os.path.isdir(folder):
        return []
    pattern = rf'(?!\.)(.*[^a-z])?{split}.*\.bin'  # eval is not val
    names = sorted(name for name in os.listdir(folder) if re.fullmatch(pattern, name, re.I))
    first_names = {}
    for name in names:
        start, word, number = name.rpartition(split)
        first_names.setdefault((start, word, re.sub(r'\d+', '', number)), name)
    if len(first_names) > 1:
        fail(f'{folder} has {split} shards of several datasets: {", ".join(first_names.values())}',
             'put each dataset into a folder of its own', who='node')
    paths = [os.path.join(folder, name) for name in names]
    return [path for path in paths if is_file(path)]


def read_header(path):
    """(dtype, number of tokens) by a .bin file's header; None if it has none.

    Fails if the header is cut short, has an unknown version, or disagrees with the file's size.
    """
    remedy = 'download or write it again'
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        data = f.read(HEADER_BYTES)
    numbers = np.frombuffer(data[:len(data) // 4 * 4], '<i4').tolist()
    if not numbers or numbers[0] not in FORMATS or any(numbers[3:]):
        return None  # two tokens may look like the magic number: the zeros must be there, too
    if len(data) < HEADER_BYTES:
        fail(f'{path} has {size} bytes, so its header of {HEADER_BYTES} is cut short', remedy,
             who='node')
    magic, version, count = numbers[:3]
    known_version, dtype = FORMATS[magic]
    if version != known_version:
        fail(f'{path} has the magic number {magic} and version {version}, but only version '
             f'{known_version} is known', remedy, who='node')
    if size != HEADER_BYTES + count * np.dtype(dtype).itemsize:
        fail(f'{path} has {size:,} bytes, but by its header it has {count:,} tokens of {dtype}: it '
             'is damaged or was cut short', remedy, who='node')
    return np.dtype(dtype), count


def open_bin(path, meta=None):
    """The token ids of a .bin file as a read-only memmap, (tokens,).

    The dtype is that of its header, or meta's, or uint16. Fails if there are no ids.
    """
    remedy = f'prepare the dataset in {os.path.dirname(path)} again'
    header = read_header(path)
    offset = 0
    if header:
        dtype, count = header
        offset = HEADER_BYTES
    else:
        dtype = np.dtype((meta or {}).get('dtype', 'uint16'))
        size = os.path.getsize(path)
        if size % dtype.itemsize:
            fail(f'{path} has {size} bytes, not a multiple of {dtype.itemsize}: it is not a '
                 f'{dtype} file or was cut short', remedy)
        count = size // dtype.itemsize
    if not count:
        fail(f'{path} has 0 tokens', remedy, who='node')
    tokens = np.memmap(path, dtype=dtype.newbyteorder('<'), mode='r', offset=offset)
    if hasattr(tokens._mmap, 'madvise'):
        # sequences are a few kB anywhere in the file: reading ahead would fetch 128 kB for each
        tokens._mmap.madvise(mmap.MADV_RANDOM)
    tokens.status = os.stat(path)  # see check_mapped_file()
    tokens.has_header = bool(header)
    return tokens


def open_tokens(data_dir, split, block_size, vocab_size, meta=None):
    """The token ids of a split, (tokens,), as a read-only memmap, or as Shards of several files.

    Fails if they can't be trained on. It reads only the first and last ids of each file; get_batch
    checks the ids of each batch.
    """
    paths = list_bins(data_dir, split)
    if not paths:
        fail(f'{data_dir} has no {split}.bin, and no shards with {split} in their names',
             'prepare the dataset again', who='node')
    if len(paths) > 1:
        raise_file_limit(len(paths))
    parts = [open_bin(path, meta) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts):
        if (part.dtype, part.has_header) != (first.dtype, first.has_header):
            fail(f'{paths[0]} has {describe(first)}, but {path} has {describe(part)}',
                 'all shards of a split must have the same format', who='node')
    tokens = Shards(parts) if len(parts) > 1 else first
    if len(tokens) < block_size + 1:
        name = paths[0] if len(paths) == 1 else f'{data_dir} ({len(paths)} {split} shards)'
        fail(f'{name} has {len(tokens)} tokens, fewer than block_size + 1 = {block_size + 1}',
             'set a smaller --block_size')
    if first.has_header and first.dtype.itemsize > 2 and not meta:
        fail(f'{paths[0]} has {describe(first)}, so not GPT-2\'s, and there is no meta.pkl',
             "put a meta.pkl there: pickle.dump({'vocab_size': 128256, 'dtype': 'uint32'}, file) "
             'is enough for Llama 3', who='node')
    for path, part in zip(paths, parts):
        check_ends(path, part, vocab_size)
    return tokens


def describe(part):
    header = 'a header' if part.has_header else 'no header'
    return f'{header} and ids of {8 * part.dtype.itemsize} bits'


def raise_file_limit(count):
    """Lets this process have so many more files open, if the system permits: a map needs one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # here: Windows doesn't have it
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = soft + count
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def check_ends(path, tokens, vocab_size):
    """Fails if the first or last ids of a file are outside the vocabulary, or of another dtype."""
    ids = np.concatenate((tokens[:4096], tokens[-4096 - len(tokens) % 2:]))
    if not ids[1::2].any() and len(set(ids[::2].tolist())) > 2:
        fail(f'in {path} every second id is 0: its numbers have more bytes than {tokens.dtype}',
             f'write it with ids.astype(np.{tokens.dtype}).tofile(...)')
    check_ids(ids, vocab_size, path, who='node')


def check_ids(ids, vocab_size, path, who='rank'):
    """Fails if a token id is outside the vocabulary; a GPU's own error would not say which."""
    if ids.max() >= vocab_size:
        fail(f'{path} has token id {ids.max()}, but the vocabulary has {vocab_size}',
             'the data was made with another tokenizer: prepare it again, '
             'or name the right --dataset', who)


# -----------------------------------------------------------------------------
# several files as one array
class Shards:
    """The tokens of several open_bin(), one after another, as one array (tokens,).

    tokens[i] and tokens[i:j] are as with numpy. A slice within a file is a view, and one of up to
    MAX_COPY tokens from several files is a copy. A longer one is Shards again.
    """

    def __init__(self, parts):
        self.parts = parts
        self.ends = list(itertools.accumulate(len(part) for part in parts))
        self.dtype = parts[0].dtype
        self.shape = (self.ends[-1],)

    def __len__(self):
        return self.ends[-1]

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return view_windows(self, 1)[index][..., 0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            return self[np.arange(start, stop, step)]
        pieces = self.cut(start, stop)
        if len(pieces) == 1:
            return pieces[0]
        if stop - start > MAX_COPY:
            return Shards(pieces)
        return np.concatenate(pieces or [self.parts[0][:0]])

    def cut(self, start, stop):
        """The views of the files that have the tokens start to stop, in a list."""
        pieces = []
        number = bisect.bisect_right(self.ends, start)
        while start < stop:
            part = self.parts[number]
            end = self.ends[number]
            first = end - len(part)
            check_mapped_file(part)
            pieces.append(part[start - first:stop - first])
            start = end
            number += 1
        return pieces


class Windows:
    """What sliding_window_view(tokens, width) is for an array, for Shards; read when indexed.

    windows[i] are the tokens i to i + width. The index may be a number, a slice, or an array of
    numbers.
    """

    def __init__(self, tokens, width):
        self.tokens = tokens
        self.shape = (len(tokens) - width + 1, width)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        length, width = self.shape
        if isinstance(index, slice):
            index = np.arange(*index.indices(length))
        index = np.asarray(index)
        if index.size and index.dtype.kind not in 'iu':
            raise IndexError(f'the index has {index.dtype}, but it must be a number, '
                             'a slice or an array of numbers')
        rows = np.empty((index.size, width), self.tokens.dtype)
        starts = range(length)
        for row, start in zip(rows, index.ravel().tolist()):
            start = starts[start]  # a negative one counts from the end
            np.concatenate(self.tokens.cut(start, start + width), out=row)
        return rows.reshape(*index.shape, width)


def view_windows(tokens, width):
    """All sequences of so many tokens, (tokens - width + 1, width), read when they are indexed."""
    if isinstance(tokens, Shards):
        return Windows(tokens, width)
    return np.lib.stride_tricks.sliding_window_view(tokens, width)


# -----------------------------------------------------------------------------
# while they are mapped
def forget_pages(tokens):
    """Unmaps the pages that were read of open_tokens().

    Otherwise they all count as this process's memory in time, although they are the system's
    cache. The pages are read again when needed, which takes 40 to 200 us: call it once in a while.
    """
    for part in getattr(tokens, 'parts', [tokens]):
        if hasattr(part._mmap, 'madvise'):
            part._mmap.madvise(mmap.MADV_DONTNEED)


def check_mapped_file(tokens):
    """Fails if the file of an open_bin() has been cut short, and warns if it was written to.

    The system kills a process that reads behind the end of a mapped file, without a word. Shards
    check those of their files that are read, when they are read: there may be a thousand.
    """
    if not hasattr(tokens, 'status'):
        return  # Shards, or a slice
    try:
        status = os.stat(tokens.filename)
    except OSError:
        return  # it was removed, and can still be read
    if not os.path.samestat(status, tokens.status):
        return  # another file has its name
    if status.st_size < len(tokens._mmap):
        fail(f'{tokens.filename} was cut short: it had {len(tokens._mmap):,} bytes and has '
             f'{status.st_size:,}', 'prepare the dataset again', who='node')
    if status.st_mtime_ns != tokens.status.st_mtime_ns:
        tokens.status = status
        warn(f'{tokens.filename} was changed while the run reads it')
