"""
Python's own standard library by characters: about 10 MB of source code, nothing to download, seconds to prepare.
"""
import hashlib
import os
import string
import sys
import sysconfig
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import corpus

# text
max_bytes = 10_000_000  # stop after the file that passes this size
out_dir = ''  # where train.bin and val.bin go; '': this folder
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'configurator.py'), encoding='utf-8').read())

LEFT_OUT = {'test', 'tests', 'idle_test', 'idlelib', 'site-packages', 'dist-packages', 'lib2to3', '__pycache__'}
PRINTABLE = set(string.printable) - set('\r\x0b\x0c')

started = time.time()
corpus.check_ranges(config)
splits, size, files = {'train': [], 'val': []}, 0, 0
root = sysconfig.get_paths()['stdlib']
for place, dirs, names in os.walk(root):
    dirs[:] = sorted(d for d in dirs if d not in LEFT_OUT and not d.startswith('config-'))  # the walk goes on in this order, on every machine
    for name in sorted(names):
        if not name.endswith('.py') or name.startswith('_sysconfigdata') or size > max_bytes:  # that one is the machine's own
            continue
        path = os.path.join(place, name)
        try:
            with open(path, encoding='ascii') as f:  # line ends become \n
                text = f.read()
        except UnicodeDecodeError:
            continue
        if not text or set(text) - PRINTABLE:
            continue
        # whole files go to either split, by the hash of their name: one in ten is for validation
        where = os.path.relpath(path, root).replace(os.sep, '/')
        split = 'val' if int(hashlib.sha256(where.encode()).hexdigest(), 16) % 10 == 0 else 'train'
        splits[split].append(text if text.endswith('\n') else text + '\n')
        size, files = size + len(text), files + 1
train, val = ''.join(splits['train']), ''.join(splits['val'])
print(f'text: {files} files, {len(train) + len(val):,} characters of Python {sys.version.split()[0]}')
meta = corpus.char_table(train + val)
corpus.write_splits(out_dir or os.path.dirname(os.path.abspath(__file__)), corpus.encode_chars(train, meta), corpus.encode_chars(val, meta), meta, started,
                    'config/train_python_char.py' + (f' --dataset={out_dir}' if out_dir else ''))
