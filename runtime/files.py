"""
Files: only regular ones are read, one is written whole or not at all, and changes are noticed.
"""
import contextlib
import errno
import hashlib
import os
import stat

from runtime.console import fail

KINDS = {stat.S_IFDIR: 'folder', stat.S_IFIFO: 'pipe', stat.S_IFSOCK: 'socket',
         stat.S_IFCHR: 'device', stat.S_IFBLK: 'device'}
MISSING = errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG
NUM_PIECES = 64  # pieces of a split that its fingerprint looks at
PIECE_BYTES = 4096


def is_file(path):
    """Whether path is a regular file; False if nothing is there.

    Fails if it is something else, a link that leads nowhere, or in a folder without access. To
    read a pipe or a device may never end, and "no file" often means "begin again".
    """
    try:
        check_file(path)
    except FileNotFoundError:
        return False
    except OSError as e:
        fail(f'{path} cannot be used: {e.strerror}', 'repair or remove it first', who='node')
    return True


def check_file(path):
    """OSError unless path is a regular file; FileNotFoundError only if nothing is there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno not in MISSING:
            raise
        if isinstance(e, OSError) and os.path.islink(path):
            raise OSError(errno.ENOLINK, 'it is a link that leads nowhere', path) from e
        # ValueError: no file has a zero character in its name
        raise FileNotFoundError(errno.ENOENT, 'there is no such file', path) from e
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), 'special file')
        raise OSError(errno.EINVAL, f'it is a {kind}, and not a file', path)


def read_text(path, remedy='name a text file with --input=FILE'):
    """The text in the file; fails if the file is missing, empty or not UTF-8."""
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig') as f:  # Notepad writes a mark
            text = f.read()
    except OSError as e:
        fail(f'{path} cannot be read ({e.strerror})', remedy)
    except UnicodeDecodeError as e:
        fail(f'{path} is not UTF-8 (byte {e.start})', 'convert it first')
    if not text:
        fail(f'{path} is empty', remedy)
    return text


@contextlib.contextmanager
def replace(path):
    """Opens a temporary file for writing, which becomes path when the block ends without an error.

    So path is never incomplete. When the block ends the bytes are on the disk. OSError if the
    folder was renamed meanwhile: another one of this name may have its own file there.
    """
    temp_path = f'{path}.tmp'
    with contextlib.suppress(FileNotFoundError):
        os.remove(temp_path)  # of a crash
    with open(temp_path, 'xb') as f:  # x never writes through a link
        status = os.fstat(f.fileno())
        try:
            yield f
            flush(f)
        except BaseException:
            remove(temp_path, status)  # on a full disk this makes room for the next try
            raise
    if not os.path.samestat(status, os.stat(temp_path)):
        raise OSError(errno.ESTALE, 'its folder was renamed', path)
    os.replace(temp_path, path)
    sync_folder(os.path.dirname(path) or os.curdir)


def remove(path, status):
    """Removes the file at path, if it is still the one of this status."""
    with contextlib.suppress(OSError):
        if os.path.samestat(status, os.stat(path)):
            os.remove(path)


def flush(f):
    """Writes what Python and the system hold back of an open file. An error comes here, if any."""
    f.flush()
    os.fsync(f.fileno())


def sync_folder(path):
    """Has the system write the folder's list of names to the disk."""
    if os.name != 'posix':
        return
    folder = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems don't support it
        os.fsync(folder)
    os.close(folder)


# -----------------------------------------------------------------------------
# the .bin files of a dataset, and whether they have changed
def fingerprint(*paths):
    """What tells files from other ones: their size together, and a hash of pieces from all over."""
    size = 0
    digest = hashlib.sha256()
    num_pieces = max(2, NUM_PIECES // len(paths))  # of each file
    for path in paths:
        file_size = os.path.getsize(path)
        size += file_size
        with open(path, 'rb') as f:
            for i in range(num_pieces):
                f.seek(i * max(0, file_size - PIECE_BYTES) // (num_pieces - 1))
                digest.update(f.read(PIECE_BYTES))
    return {'bytes': size, 'hash': digest.hexdigest()[:16]}


def read_data_id(data_id):
    """A dataset.identify_data() from a file; an exception if it is something else."""
    return {str(split): {'bytes': int(value['bytes']), 'hash': str(value['hash'])}
            for split, value in data_id.items()}


def describe_changes(old_id, data_id):
    """How the splits of a dataset differ from an earlier identify_data(), as a list of texts."""
    changes = []
    for split in data_id:
        if split not in old_id or old_id[split] == data_id[split]:
            continue
        old_size, size = old_id[split]['bytes'], data_id[split]['bytes']
        text = f'{split}.bin has other tokens'
        if old_size != size:
            text = f'{split}.bin had {old_size:,} bytes and has {size:,}'
        changes.append(text)
    return changes
