"""
Makes damaged and hostile files in the current folder, and scripts read them in forks. Linux only.
"""
import collections
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends import backend_agg  # noqa: F401  (so that no fork has to import it again)
from safetensors.torch import load_file

from runtime import compiler, export, inference, report  # noqa: F401
from runtime.checkpoint import is_finite
from runtime.console import ROOT

SECONDS = 60  # for a script with one file
MEMORY = 2 ** 30  # bytes that it may take, and this process with torch in it doesn't
GOOD_OUTCOMES = ('read', 'refused')
SMALL = ['--device=cpu', '--dtype=float32', '--n_layer=1', '--n_head=2', '--n_embd=16',
         '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_iters=1',
         '--decay_lr=False', '--max_iters=0']
SAMPLE = ['sample.py', *SMALL[:2], '--init_from=FOLDER', '--num_samples=1', '--max_new_tokens=2']
# a kind of file: (the folder that it is in, the script that reads it there)
KINDS = {
    'ckpt.pt': ('run', ['train.py', *SMALL, '--dataset=data', '--init_from=resume',
                        '--out_dir=FOLDER']),
    'meta.pkl': ('data', ['train.py', *SMALL, '--dataset=FOLDER', '--eval_only']),
    'train.bin': ('data', ['train.py', *SMALL, '--dataset=FOLDER', '--eval_only']),
    **dict.fromkeys(('config.json', 'model.safetensors', 'tokenizer.json'), ('hf', SAMPLE)),
    'model.safetensors.index.json': ('parts', SAMPLE),
    'metrics.jsonl': ('run', ['plot.py', '--runs=FOLDER']),
    'config.py': ('data', ['train.py', 'FOLDER/config.py', '--help']),
}
SPECIAL_FILES = [os.mkfifo, os.mkdir, lambda path: os.symlink('/dev/zero', path),
                 lambda path: os.symlink('nowhere', path),
                 lambda path: os.symlink(os.path.basename(path), path)]


class Call(tuple):
    """A function and its arguments. To read a pickle of it without care is to call the function."""

    def __reduce__(self):
        return self[0], self[1:]


MKDIR = "__import__('os').mkdir('canary')"
CALLS = [Call((os.system, 'mkdir canary')), Call((os.mkdir, 'canary')), Call((eval, MKDIR)),
         Call((exec, MKDIR)), Call((subprocess.call, ['mkdir', 'canary'])),
         Call((bytearray, 2 ** 33))]
PICKLES = [
    *(pickle.dumps({'vocab_size': call}, protocol) for call in CALLS for protocol in range(5)),
    b'(S"mkdir canary"\nios\nsystem\n.', b'(cos\nsystem\nS"mkdir canary"\no.', b'', b'.',
    pickle.dumps({'vocab_size': 1 << 3000}), pickle.dumps({'vocab_size': True}), pickle.dumps([5]),
    b'\x80\x02}' + b')' + b'\x85' * 10 ** 6 + b'K\x01s.',  # {(((...))): 1}
    b'\x80\x02]' + b']a' * 10 ** 5 + b'.', b'\x80\x04' + b'(' * 10 ** 6 + b'.',
    b'\x80\x02]q\x00' + b'(h\x00h\x00lq\x00' * 60 + b'.',  # each list has the one before it twice
    b'\x80\x02]q\x00h\x00a.', b'\x80\x02}r\x00\x00\x00\x10.', b'\x8b\xff\xff\xff\x7f.',
    b'\x80\x04\x8e' + struct.pack('<q', 2 ** 40) + b'.', b'\x80\x02X\xff\xff\xff\xff.',
    b'\x80\x04\x95' + b'\xff' * 8 + b'}.', b'\x80\x02ctorch.storage\nUntypedStorage\n)R.',
    b'\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06' + bytes(5) + b'\x01\x85R.']
TEXTS = [b'', b'[]', b'5', b'null', b'{}', b'\x00', b'\xff\xfe', b'{"a": 1e999}', b'[' * 10 ** 5,
         b'{"a":' * 10 ** 5, b'9' * 10 ** 6, b'"' + b'x' * 10 ** 6]
CONFIGS = [b'max_iters = ', b'exit()', b'raise SystemExit(0)', b'max_iter = 5', b'1 / 0',
           b'import no_such_module', b'max_iters = "many"', b'del max_iters', b'return',
           b'# coding: no such coding', b'x = ' + b'(' * 1000, b'\x00', b'\xff\xfe',
           b'f = lambda: f()\nf()']
# what may come in the place of a value anywhere in a file
VALUES = [None, True, -1, 0, 10 ** 9, 2 ** 70, 0.5, float('nan'), float('inf'), '', '../../x',
          'x' * 10 ** 5, [], {}, [[]], {'': None}]
TENSORS = [torch.ones(3), torch.full((3, 16), float('nan')), torch.ones(16).to(torch.int64),
           torch.ones(16).half(), torch.ones(16).to(torch.complex64), torch.eye(16).to_sparse(),
           torch.zeros(1).expand(10 ** 12, 16), torch.empty(16, device='meta')]


def make_good_files():
    """Prepares data, trains on it, and exports the model: the folders data, run, hf and parts."""
    with open('numbers.txt', 'w') as f:
        f.writelines(f'{n} and {n + 1} make {2 * n + 1}.\n' for n in range(1000))
    for command in (('data/text/prepare.py', '--input=numbers.txt', '--out_dir=data'),
                    ('train.py', *SMALL, '--max_iters=3', '--dataset=data', '--out_dir=run'),
                    ('convert.py', '--out_dir=run', '--hf_dir=hf')):
        outcome, text = run_script(*command)
        assert outcome == 'read', text
    shutil.copytree('hf', 'parts')
    os.rename('parts/model.safetensors', 'parts/part.safetensors')
    names = dict.fromkeys(load_file('parts/part.safetensors'), 'part.safetensors')
    Path('parts/model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    config = 'max_iters = 5  # all of it\nlearning_rate = 2 * 1e-3\nbias = not False\n'
    Path('data/config.py').write_text(config)


def decode(kind, content):
    """The nested values in a good file."""
    if kind == 'ckpt.pt':
        return torch.load(io.BytesIO(content))
    if kind == 'meta.pkl':
        return pickle.loads(content)
    if kind == 'metrics.jsonl':
        return [json.loads(line) for line in content.splitlines()]
    if kind == 'model.safetensors':
        content = content[8:8 + struct.unpack('<Q', content[:8])[0]]
    return json.loads(content)


def encode(kind, value, content=b''):
    """A file with these values. A safetensors file gets the tensors of content."""
    if kind == 'ckpt.pt':
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()
    if kind == 'meta.pkl':
        return pickle.dumps(value)
    if kind == 'metrics.jsonl':
        return b'\n'.join(encode('', event) for event in value)
    text = json.dumps(value, default=str).encode()
    if kind == 'model.safetensors':
        end = 8 + struct.unpack('<Q', content[:8])[0]
        text = struct.pack('<Q', len(text)) + text + content[end:]
    return text


def spoil(value, draw):
    """The nested value with something else, or nothing, at one place in it."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        return draw.choice(VALUES + TENSORS + CALLS)
    keys = range(len(value)) if isinstance(value, list) else value
    key = draw.choice(list(keys))
    copy = value.copy()
    copy[key] = spoil(value[key], draw)
    if draw.random() < 0.1:
        del copy[key]
    return copy


def damage(content, draw):
    """The bytes with bits flipped, parts cut out or repeated, or without their end."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        if draw.random() < 0.3:  # the directory of an archive is at its end
            at = max(0, len(content) - draw.randrange(2000))
        part = content[at:at + draw.randint(1, 60)]
        rest = content[at + len(part):]
        flips = bytes(byte ^ (draw.random() < 0.1) << draw.randrange(8) for byte in part)
        content = content[:at] + draw.choice([flips + rest, flips + rest, rest, part + part + rest,
                                              b''])
    return content


def rezip(content, change=list, method=zipfile.ZIP_STORED):
    """The archive with changed records and their right checksums. change gets [(name, bytes)]."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', method) as archive:
        for name, record in change(records):
            archive.writestr(name, record)
    return stream.getvalue()


def damage_record(records, draw):
    """The records with one damaged, or with their contents in another order."""
    names, contents = zip(*records)
    if draw.random() < 0.2:
        return zip(names, draw.sample(contents, len(contents)))
    i = draw.choice([0, draw.randrange(len(records))])  # the first one is the pickle
    return [*records[:i], (names[i], damage(contents[i], draw)), *records[i + 1:]]


def list_cases(kind, content):
    """The good file, and the cases that are listed here: contents, or functions of a path."""
    cases = TEXTS
    if kind == 'ckpt.pt':
        weights = encode(kind, decode(kind, content)['model'])
        cases = [weights, rezip(content), rezip(content, method=zipfile.ZIP_DEFLATED)]
        cases += [rezip(content, lambda records, p=p: [(records[0][0], p), *records[1:]])
                  for p in PICKLES]  # the first record is the pickle
    elif kind == 'meta.pkl':
        cases = PICKLES
    elif kind == 'config.py':
        cases = CONFIGS
    elif kind == 'train.bin':
        ids = np.frombuffer(content, np.uint16)
        cases = [ids.astype(dtype).tobytes() for dtype in ('int32', 'int64', 'float32')]
        cases += [b'', b'1', content[:-1], content[:20], b'\xff' * 10 ** 5]
    elif kind == 'model.safetensors':
        lengths = (0, 10, len(content), 2 ** 31, 2 ** 62, 2 ** 64 - 1)
        cases = TEXTS + [struct.pack('<Q', n) + content[8:] for n in lengths]
    elif kind == 'model.safetensors.index.json':
        cases = TEXTS + [content.replace(b'part.safetensors', path)
                         for path in (b'../hf/model.safetensors', b'/dev/zero', b'.', b'')]
    return [content, *SPECIAL_FILES, *cases]


def draw_case(kind, content, draw):
    """A file of the kind with damage at random places."""
    if kind in ('train.bin', 'config.py') or draw.random() < 0.4:
        return damage(content, draw)
    if kind == 'ckpt.pt' and draw.random() < 0.5:
        return rezip(content, lambda records: damage_record(records, draw))
    try:
        return encode(kind, spoil(decode(kind, content), draw), content)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return damage(content, draw)  # such a value can't be written


def try_files(count, end, seed):
    """Tries so many files of each kind, until the time end; returns {kind: Counter of outcomes}."""
    counts = {kind: collections.Counter() for kind in KINDS}
    cases, draw = {}, random.Random(seed)
    for kind, (folder, _) in KINDS.items():
        content = Path(folder, kind).read_bytes()
        cases[kind] = list_cases(kind, content)
        cases[kind] += [draw_case(kind, content, draw) for _ in range(count - len(cases[kind]))]
    for number, row in enumerate(itertools.zip_longest(*cases.values())):
        for kind, case in zip(KINDS, row):
            if case is None or time.monotonic() > end:
                continue
            outcome, text = try_file(kind, case)
            assert number or outcome == 'read', f'{kind} is good, but {outcome}: {text}'
            counts[kind][outcome] += 1
            if outcome not in GOOD_OUTCOMES:
                print(f'{kind}, case {number}: {outcome}: {text[-400:]!r}', file=sys.stderr)
    return counts


def try_file(kind, case):
    """Puts a case in the place of a good file; returns (outcome, what the script printed)."""
    folder, command = KINDS[kind]
    shutil.rmtree('trial', ignore_errors=True)
    shutil.copytree(folder, 'trial')
    path = os.path.join('trial', kind)
    os.remove(path)
    if callable(case):
        case(path)
    else:
        Path(path).write_bytes(case)
    outcome, text = run_script(*(arg.replace('FOLDER', 'trial') for arg in command))
    if outcome == 'not finite' and all(map(is_finite, decode(kind, case)['model'].values())):
        outcome = 'read'  # numbers that are so large that the loss overflows
    return outcome, text


def run_script(script, *args):
    """Runs a script in a fork of this process, with limits; returns (outcome, what it printed)."""
    numbers = Path('/proc/self/statm').read_text(encoding='utf-8').split()
    addresses, memory = (int(n) * resource.getpagesize() for n in numbers[:2])
    pid = os.fork()
    if not pid:
        status = 1
        try:
            sys.stdout = sys.stderr = open('output', 'w', buffering=1, encoding='utf-8')
            for stream in (1, 2):
                os.dup2(sys.stdout.fileno(), stream)
            resource.setrlimit(resource.RLIMIT_AS, 2 * (addresses + 8 * MEMORY,))
            signal.alarm(SECONDS)
            sys.argv = [os.path.join(ROOT, script), *args]
            runpy.run_path(sys.argv[0], run_name='__main__')
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status, usage = os.wait4(pid, 0)
    text = Path('output').read_text(encoding='utf-8', errors='replace')
    return judge(os.waitstatus_to_exitcode(status), text, 1024 * usage.ru_maxrss - memory), text


def judge(status, text, memory):
    """The outcome of a script that has read a file."""
    if os.path.exists('canary'):
        os.rmdir('canary')
        return 'code ran'
    if status < 0:
        return 'timed out' if status == -signal.SIGALRM else 'killed by a signal'
    if memory > MEMORY or re.search('MemoryError|llocate|out of memory', text):
        return 'too much memory'
    if 'Traceback' in text or status not in (0, 1):
        return 'traceback'
    if status == 0:
        return 'not finite' if re.search('loss (nan|inf)', text) else 'read'
    return 'refused' if len(re.findall('(?m)^error: ', text)) == 1 else 'not one line'
