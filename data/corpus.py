"""
What the prepare scripts share: getting a text, and writing its token ids as a dataset's files.
"""
import contextlib
import hashlib
import http.client
import os
import pickle
import re
import time
import urllib.request

import numpy as np
from tqdm import tqdm

from runtime.console import ROOT, fail, format_script, make_folder, shorten, shorten_path
from runtime.files import fingerprint, flush, replace
from runtime.tokenizer import read_text

SHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def read_shakespeare(input_file, folder):
    """The text of tiny Shakespeare, from input_file, or from the folder's input.txt if it is ''.

    input.txt is downloaded if it isn't there.
    """
    path = os.path.join(folder, 'input.txt')
    if not input_file and not os.path.exists(path):
        download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, path)
    return read_text(input_file or path)


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
                     'use the dataset that needs no download: python data/python_char/prepare.py')
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


def make_meta(text):
    """meta.pkl for a text: one id for each character in it, in the order of their code points."""
    chars = sorted(set(text))
    meta = {
        'vocab_size': len(chars),
        'itos': dict(enumerate(chars)),
        'stoi': {c: i for i, c in enumerate(chars)},
    }
    if len(chars) > 2 ** 16:
        meta['dtype'] = 'uint32'  # of the ids in the bins; they are uint16 without this key
    return meta


def encode_chars(text, meta):
    """The ids of the text's characters, an integer array."""
    codes = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)  # one code point each
    ids = {ord(token): i for token, i in meta['stoi'].items() if len(token) == 1}
    table = np.zeros(max(ids) + 1, dtype=np.int64)
    table[list(ids)] = list(ids.values())
    return table[codes]


@contextlib.contextmanager
def replace_dataset(folder, meta):
    """Opens {'train': file, 'val': file} for the ids of a dataset, which take their place together.

    If anything fails the folder keeps the dataset that it has. meta.pkl gets the fingerprints of
    the .bin files, so that training can tell whether they belong together.
    """
    meta_path = os.path.join(folder, 'meta.pkl')
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(replace(os.path.join(folder, f'{split}.bin')))
                 for split in ('train', 'val')}
        if meta:
            meta_file = stack.enter_context(replace(meta_path))  # it takes its place first
        yield files
        for f in files.values():
            flush(f)
        if meta:
            bins = {split: fingerprint(f.name) for split, f in files.items()}
            pickle.dump({**meta, 'bins': bins}, meta_file)
            flush(meta_file)
    if not meta:
        with contextlib.suppress(FileNotFoundError):
            os.remove(meta_path)  # of an earlier dataset of characters


def write_splits(folder, train_ids, val_ids, meta, start_time, config_file, **flags):
    """Writes train.bin, val.bin and meta.pkl to the folder, and prints a summary.

    meta is None for GPT-2's BPE, which has no meta.pkl. With config_file and flags train.py trains
    on this dataset.
    """
    max_block_size = min(len(train_ids), len(val_ids)) - 1
    if max_block_size < 1:
        fail(f'the text gives {len(train_ids)} training and {len(val_ids)} validation tokens',
             'use a longer text')
    make_folder(folder)
    dtype = '<u4' if meta and meta.get('dtype') == 'uint32' else '<u2'
    contents = {'train': np.asarray(train_ids, dtype), 'val': np.asarray(val_ids, dtype)}
    with replace_dataset(folder, meta) as files:
        for split, ids in contents.items():
            files[split].write(ids)
    for split, ids in contents.items():
        print(f'{split}.bin: {len(ids):,} tokens, {ids.nbytes:,} bytes')
    if meta:
        characters = shorten(''.join(meta['stoi']), 200)
        print(f'vocabulary: {meta["vocab_size"]} characters: {characters!r}')
    else:
        print('vocabulary: GPT-2 BPE, 50,257 tokens')
    print(f'written to {shorten_path(folder)} in {time.time() - start_time:.1f} s')
    if max_block_size < read_block_size(config_file):
        flags['block_size'] = max_block_size
    print_next_step(config_file, **flags)


def read_block_size(config_file):
    """The block_size that a config file sets, or train.py's. 0 if the file isn't there."""
    path = os.path.join(ROOT, config_file)
    if not os.path.isfile(path):  # somebody has copied only this folder
        return 0
    with open(path, encoding='utf-8') as f:
        match = re.search(r'^block_size = (\d+)', f.read(), re.MULTILINE)
    return int(match[1]) if match else 1024


def print_next_step(config_file, **flags):
    """Prints the command that trains on the dataset. Flags without a value are left out."""
    words = [f'--{name}={value}' for name, value in flags.items() if value]
    print(f'train on it: {format_script("train.py", config_file, *words)}')
