"""
Python's standard library by characters: about 10 MB of code, no download, seconds to prepare.
"""
import hashlib
import os
import string
import sys
import sysconfig
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime import settings
from runtime.console import ROOT
from runtime.meta import make_character_meta
from runtime.tokenizer import CharTokenizer

# input and output
max_bytes = 10_000_000  # stop after the file that passes this size
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

SKIPPED_FOLDERS = {'test', 'tests', 'idle_test', 'idlelib', 'site-packages', 'dist-packages',
                   'lib2to3', '__pycache__'}
PRINTABLE = set(string.printable) - set('\r\x0b\x0c')

start_time = time.time()
settings.check(config)
texts = {'train': [], 'val': []}
num_files = 0
size = 0
library = sysconfig.get_paths()['stdlib']
for folder, dirs, names in os.walk(library):
    dirs[:] = [d for d in dirs if d not in SKIPPED_FOLDERS and not d.startswith('config-')]
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
        num_files += 1
        size += len(text)
        if not text.endswith('\n'):
            text += '\n'
        # the hash of its path puts a whole file into one split: one file in ten is for validation
        relative_path = os.path.relpath(path, library).replace(os.sep, '/')
        digest = hashlib.sha256(relative_path.encode()).hexdigest()
        split = 'val' if int(digest, 16) % 10 == 0 else 'train'
        texts[split].append(text)
train_text = ''.join(texts['train'])
val_text = ''.join(texts['val'])
num_chars = len(train_text) + len(val_text)
version = sys.version.split()[0]
print(f'text: {num_files} files, {num_chars:,} characters of Python {version}')
meta = make_character_meta(train_text + val_text)
train_ids, val_ids = CharTokenizer(meta).encode_batch([train_text, val_text])
corpus.write_splits(out_dir or os.path.dirname(os.path.abspath(__file__)), train_ids, val_ids,
                    meta, start_time, 'config/train_python_char.py', dataset=out_dir)
