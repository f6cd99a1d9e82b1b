"""
What the prepare scripts share: where a text comes from, and how token ids become train.bin, val.bin and meta.pkl.
"""
import hashlib
import http.client
import os
import pickle
import sys
import time
import urllib.request

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from checks import REPO, check_ranges, fail, make_folder, read_text, shown  # noqa: F401, for the prepare scripts too

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def read_shakespeare(input_file, folder):
    """Tiny Shakespeare: input_file if given, else input.txt in the folder, else downloaded to there."""
    path = os.path.join(folder, 'input.txt')
    if not input_file and not os.path.exists(path):
        download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, path)
    return read_text(input_file or path)


def download(url, sha256, path, tries=3, timeout=30):
    """Fetches url to path, whole and with the right SHA-256, or not at all."""
    for wait in [2 ** n for n in range(tries - 1)] + [None]:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response, \
                    tqdm(total=response.length, unit='B', unit_scale=True, desc=os.path.basename(path), leave=False, disable=None) as bar:
                content = b''
                while piece := response.read(2 ** 16):
                    content += piece
                    bar.update(len(piece))
            break
        except (OSError, http.client.HTTPException) as e:  # URLError, timeouts and resets are OSErrors
            if wait is None:
                fail(f'{url} could not be downloaded ({e})', f'without a network, put the file there yourself as {path}, name it with --input=FILE, '
                     'or take the dataset that needs none: python data/python_char/prepare.py')
            time.sleep(wait)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        fail(f'{url} gave a file with SHA-256 {found}, not {sha256}', 'try again later; nothing was kept')
    write_aside(path, content)


def write_aside(path, content):
    """Writes bytes to path under another name first, so that what is at path is always whole."""
    with open(path + '.tmp', 'wb') as f:
        f.write(content)
    os.replace(path + '.tmp', path)


def char_table(text):
    """meta.pkl's tables for a text: one id per character it has, in the order of their code points."""
    chars = sorted(set(text))
    wide = {'dtype': 'uint32'} if len(chars) > 2 ** 16 else {}  # of the bins; without it they are uint16
    return {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}, **wide}


def encode_chars(text, meta):
    """The text's ids, an array of whole numbers."""
    codes = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)  # a code point each
    table = np.zeros(max(map(ord, meta['stoi'])) + 1, dtype=np.int64)
    table[[ord(c) for c in meta['stoi']]] = list(meta['stoi'].values())
    return table[codes]


def write_splits(folder, train_ids, val_ids, meta, started, then):
    """Writes train.bin, val.bin and, with a meta, meta.pkl to the folder, and prints what they hold and train.py's arguments for them."""
    if min(len(train_ids), len(val_ids)) == 0:
        fail(f'the text gives {len(train_ids)} training and {len(val_ids)} validation tokens', 'use a longer text')
    make_folder(folder)
    meta_path = os.path.join(folder, 'meta.pkl')
    if meta:
        write_aside(meta_path, pickle.dumps(meta))
    elif os.path.exists(meta_path):
        os.remove(meta_path)  # of a character dataset that was here before
    for split, ids in (('train', train_ids), ('val', val_ids)):
        content = np.asarray(ids).astype('<u4' if (meta or {}).get('dtype') == 'uint32' else '<u2').tobytes()
        write_aside(os.path.join(folder, f'{split}.bin'), content)
        print(f'{split}.bin: {len(ids):,} tokens, {len(content):,} bytes')
    if meta:
        print(f'vocabulary: {meta["vocab_size"]} characters: {"".join(meta["stoi"])!r}')
    else:
        print('vocabulary: GPT-2 BPE, 50,257 tokens')
    print(f'written to {shown(folder)} in {time.time() - started:.1f} s')
    print_next(then)


def print_next(then):
    """Says how to train on it: train.py's arguments."""
    print(f'train on it: python {shown(os.path.join(REPO, "train.py"))} {then}')
