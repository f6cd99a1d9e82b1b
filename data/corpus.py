"""
What the prepare scripts share: getting a text, and writing its token ids as a dataset's files.
"""
import contextlib
import errno
import hashlib
import http.client
import os
import pickle
import re
import string
import sys
import sysconfig
import tempfile
import time
import urllib.request

import numpy as np
from tqdm import tqdm

from runtime.console import ROOT, fail, format_script, make_folder, shorten, shorten_path
from runtime.files import fingerprint, flush, read_text, replace

SHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
# what read_python() leaves out
SKIPPED_FOLDERS = {'test', 'tests', 'idle_test', 'idlelib', 'site-packages', 'dist-packages',
                   'lib2to3', '__pycache__'}
PRINTABLE = set(string.printable) - set('\r\x0b\x0c')


def read_shakespeare(input_file, folder):
    """The text of tiny Shakespeare, from input_file, or from the folder's input.txt if it is ''.

    input.txt is downloaded if it isn't there.
    """
    path = os.path.join(folder, 'input.txt')
    if not input_file and not os.path.exists(path):
        check_writable(folder)
        download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, path)
    return read_text(input_file or path)


def read_python(max_bytes, skipped_folders=()):
    """The files of Python's standard library, as texts of ASCII: {'train': list, 'val': list}.

    It stops after the file that passes max_bytes. It skips SKIPPED_FOLDERS and skipped_folders.
    """
    texts = {'train': [], 'val': []}
    size = 0
    library = sysconfig.get_paths()['stdlib']
    for folder, dirs, names in os.walk(library):
        dirs[:] = [d for d in dirs if d not in {*SKIPPED_FOLDERS, *skipped_folders}
                   and not d.startswith('config-')]
        dirs.sort()  # os.walk follows this order, so it is the same on every machine
        for name in sorted(names):
            if size > max_bytes or not name.endswith('.py'):
                continue
            if name.startswith('_sysconfigdata'):  # it describes this machine
                continue
            path = os.path.join(folder, name)
            try:
                with open(path, encoding='ascii') as f:  # every line end becomes \n
                    text = f.read()
            except UnicodeDecodeError:
                continue
            if not text or set(text) - PRINTABLE:
                continue
            size += len(text)
            if not text.endswith('\n'):
                text += '\n'
            # the hash of its path puts a whole file into one split: one file in ten is for
            # validation
            relative_path = os.path.relpath(path, library).replace(os.sep, '/')
            digest = hashlib.sha256(relative_path.encode()).hexdigest()
            split = 'val' if int(digest, 16) % 10 == 0 else 'train'
            texts[split].append(text)
    num_files = sum(map(len, texts.values()))
    num_chars = sum(map(len, texts['train'] + texts['val']))
    version = sys.version.split()[0]
    print(f'text: {num_files} files, {num_chars:,} characters of Python {version}')
    return texts


def download(url, sha256, path, tries=3, timeout=30):
    """Downloads a file to path. Nothing is written if the download or the SHA-256 check fails."""
    for attempt in range(tries):
        try:
            content = fetch(url, os.path.basename(path), timeout)
            break
        except (OSError, http.client.HTTPException) as e:  # also URLError, timeouts and resets
            if attempt == tries - 1:
                fail(f'{url} could not be downloaded ({e})',
                     f'without a network, save the file as {path}, name it with --input=FILE, or '
                     'use the dataset that needs no download: python data/python_bpe/prepare.py')
            time.sleep(2 ** attempt)
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        fail(f'the file from {url} has the SHA-256 {digest}, not {sha256}',
             'try again later; the file was not saved')
    with replace(path) as f:
        f.write(content)


def fetch(url, name, timeout):
    """The bytes at url, read with a progress bar that shows the name."""
    content = b''
    with urllib.request.urlopen(url, timeout=timeout) as response:
        with tqdm(total=response.length, unit='B', unit_scale=True, desc=name, leave=False,
                  disable=None) as bar:
            while piece := response.read(2 ** 16):
                content += piece
                bar.update(len(piece))
    return content


@contextlib.contextmanager
def replace_dataset(folder, meta):
    """Opens {'train': file, 'val': file} for the ids of a dataset, which take their place together.

    If anything fails the folder keeps the dataset that it has. meta.pkl gets the fingerprints of
    the .bin files, so that training can tell whether they belong together. meta['tokenizer'], if
    there is one, becomes tokenizer.json.
    """
    names = ['train.bin', 'val.bin']
    if meta and 'tokenizer' in meta:
        names.append('tokenizer.json')
    if meta:
        names.append('meta.pkl')  # it takes its place first
    stale_names = {'meta.pkl', 'tokenizer.json'}.difference(names)
    is_new = not os.path.exists(folder)
    make_folder(folder)
    check_folder(folder)
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(remove_empty, folder)
        files = {name: stack.enter_context(replace(os.path.join(folder, name))) for name in names}
        bins = {split: files[f'{split}.bin'] for split in ('train', 'val')}
        yield bins
        for f in bins.values():
            flush(f)
        if 'tokenizer.json' in files:
            files['tokenizer.json'].write(meta['tokenizer'].encode('utf-8'))
        if meta:
            description = {key: value for key, value in meta.items() if key != 'tokenizer'}
            description['bins'] = {split: fingerprint(f.name) for split, f in bins.items()}
            pickle.dump(description, files['meta.pkl'])
            flush(files['meta.pkl'])
    for name in stale_names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def check_folder(folder):
    """Fails if a folder that is there cannot take a dataset."""
    if os.path.isdir(folder):
        check_tokenizer_file(folder)
        check_writable(folder)


def check_writable(folder):
    """Fails if no file can be written there, as in a checkout that is for reading only."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fail(f'{shorten_path(folder)} cannot be written to ({e.strerror})',
             'name another folder with --out_dir=FOLDER, and train with --dataset=FOLDER')


def check_tokenizer_file(folder):
    """Fails if the folder has a tokenizer.json that isn't of an earlier dataset."""
    path = os.path.join(folder, 'tokenizer.json')
    is_ours = False
    with contextlib.suppress(FileNotFoundError):
        with open(os.path.join(folder, 'meta.pkl'), 'rb') as f:
            is_ours = b'stoi' not in f.read()  # replace_dataset() wrote both, and no table
    if os.path.exists(path) and not is_ours:
        fail(f'{path} is there, and it is not of an earlier dataset',
             'move it away, or name another folder with --out_dir')


def remove_empty(folder):
    """Removes the folder if nothing is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def write_splits(folder, train_ids, val_ids, meta, start_time, config_file, **flags):
    """Writes train.bin, val.bin and meta.pkl to the folder, and prints a summary.

    meta is None for GPT-2's BPE, which has no meta.pkl. With config_file and flags train.py trains
    on this dataset.
    """
    num_tokens = {'train': len(train_ids), 'val': len(val_ids)}
    check_lengths(num_tokens)
    dtype = get_dtype(meta)
    with replace_dataset(folder, meta) as files:
        files['train'].write(np.asarray(train_ids, dtype))
        files['val'].write(np.asarray(val_ids, dtype))
    print_summary(folder, num_tokens, meta, start_time)
    print_next_step(config_file, num_tokens, **flags)


def check_lengths(num_tokens):
    """Fails if a split is too short for any training."""
    if min(num_tokens.values()) < 2:
        fail(f'the text gives {num_tokens["train"]} training and {num_tokens["val"]} validation '
             'tokens', 'use a longer text')


def get_dtype(meta):
    """The dtype of the ids in the bins."""
    return '<u4' if meta and meta.get('dtype') == 'uint32' else '<u2'


def print_summary(folder, num_tokens, meta, start_time):
    """Prints what was written, {split: tokens}, and how long it took."""
    item_size = np.dtype(get_dtype(meta)).itemsize
    for split, count in num_tokens.items():
        print(f'{split}.bin: {count:,} tokens, {item_size * count:,} bytes')
    vocabulary = 'GPT-2 BPE, 50,257 tokens'
    if meta and 'stoi' in meta:
        characters = shorten(''.join(meta['stoi']), 200)
        vocabulary = f'{meta["vocab_size"]} characters: {characters!r}'
    elif meta:
        vocabulary = f'{meta["vocab_size"]:,} tokens, in tokenizer.json'
    print(f'vocabulary: {vocabulary}')
    print(f'written to {shorten_path(folder)} in {time.time() - start_time:.1f} s')


def read_block_size(config_file):
    """The block_size that a config file sets, or train.py's. 0 if the file isn't there."""
    path = os.path.join(ROOT, config_file)
    if not os.path.isfile(path):  # somebody has copied only this folder
        return 0
    with open(path, encoding='utf-8') as f:
        match = re.search(r'^block_size = (\d+)', f.read(), re.MULTILINE)
    return int(match[1]) if match else 1024


def print_next_step(config_file, num_tokens, **flags):
    """Prints the command that trains on the dataset. Flags whose value is '' are left out."""
    max_block_size = min(num_tokens.values()) - 1
    if max_block_size < read_block_size(config_file):
        flags['block_size'] = max_block_size
    words = [f'--{name}={value}' for name, value in flags.items() if value != '']
    print(f'train on it: {format_script("train.py", config_file, *words)}')
