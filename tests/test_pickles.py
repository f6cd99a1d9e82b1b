"""Pickles that would make torch.load take memory or time without an end, or overflow the stack."""
import collections
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PRINT_PEAK, ROOT
from test_hostile import good_state, rezip

from runtime import checkpoint, pickles

TEXT = b'X\x40\x42\x0f\x00' + b'a' * 10 ** 6
NESTED = b')' + b'\x85' * 300_000  # (((...)))
LIST = b'](' + b'N' * 10 ** 5 + b'eq\x00'
MANY = 10 ** 5
# each would take memory or time without an end, or overflow the stack
BOMBS = [
    b'\x80\x02}' + NESTED + b'K\x01s.',  # as a key
    b'\x80\x02}(' + NESTED + b'K\x01u.', b'\x80\x02c__builtin__\nset\n]' + NESTED + b'a\x85R.',
    b'\x80\x02ccollections\nCounter\n]' + NESTED + b'a\x85R.',
    b'\x80\x02ccollections\nOrderedDict\n]]' + NESTED + b'aK\x01aa\x85R.',
    b'\x80\x02ctorch.serialization\n_get_layout\n' + NESTED + b'\x85R.',
    b'\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n' + NESTED
    + b'X\x03\x00\x00\x00cpuK\x01tQ.',
    b'\x80\x02c__builtin__\nbytearray\n\x8a\x05' + bytes(3) + b'\x80\x00\x85R.',  # of 2**31 zeros
    b'\x80\x02c__builtin__\nbytearray\n]K\x01a\x85R.',
    b'\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06' + bytes(5) + b'\x01\x85R.',
    b'\x80\x02' + LIST + b'\x85q\x010c__builtin__\nset\n.',  # an operation that torch lacks
    b'\x80\x02](' + LIST + b'\x85q\x01c__builtin__\nset\nq\x02' + b'h\x02h\x01R' * MANY + b'e.',
    b'\x80\x02](' + LIST + b'\x85q\x01ctorch\nSize\nq\x02' + b'h\x02h\x01R' * MANY + b'e.',
    b'\x80\x02](' + TEXT + b'X\x06\x00\x00\x00latin1\x86q\x01c_codecs\nencode\nq\x02'
    + b'h\x02h\x01R' * MANY + b'e.']


@pytest.mark.skipif(sys.platform != 'linux', reason='measures memory as Linux counts it')
def test_no_pickle_in_an_archive_takes_memory_or_time_or_overflows_the_stack(tmp_path):
    for i, payload in enumerate(BOMBS):
        torch.save(good_state(), tmp_path / f'{i}.pt')
        rezip(tmp_path / f'{i}.pt', data=payload)
    code = ('from runtime import checkpoint\n'
            f'for i in range({len(BOMBS)}):\n'
            '    try: checkpoint.load(f"{i}.pt")\n'
            '    except ValueError as e: print(e)\n'
            + PRINT_PEAK)
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': ROOT}, timeout=300, check=True).stdout
    *lines, memory = out.splitlines()
    assert len(lines) == len(BOMBS) and all('is not a readable checkpoint' in s for s in lines)
    assert int(memory) < 1_000_000, out  # KiB: torch itself takes a third of that


@pytest.mark.parametrize('value', [
    {(1, (2, (3,))): 4}, {(((),),)}, collections.Counter([(((),),)]), {frozenset([1]): 2},
    range(3), np.int64(1), torch.add, torch.nn.Linear, torch.FloatTensor, torch.Tensor, torch.load,
    torch.dtype, torch.per_tensor_affine, print, os.system, object(), Ellipsis,
    NotImplemented, eval],
    ids=range(19))
def test_values_that_are_not_plain(value):
    content = pickle.dumps(value, 2)
    with pytest.raises(ValueError, match='it '):
        pickles.read(content)


@pytest.mark.parametrize('encoding', ['punycode', 'idna', 'utf-32', 'zip', 'rot13', 'latin-1'])
def test_bytes_in_other_encodings(encoding):
    good = b'\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00abX\x06\x00\x00\x00latin1\x86R.'
    pickles.read(good)
    name = len(encoding).to_bytes(4, 'little') + encoding.encode()
    with pytest.raises(ValueError, match='bytes in an unusual encoding'):
        pickles.read(good.replace(b'\x06\x00\x00\x00latin1', name))


TORCHS_VALUE = {'a': [1, 2.5, None, True, (1, 2, 3, 4)], 'b': {1, 2}, (('e', 1), 2): 'é', 3: b'a',
                4: (), 5: collections.OrderedDict(x=[]), 'f': torch.float16}
VALUE = {'a': [1, 2.5, None, True, (1, 2, 3, 4)], 'b': {1, 2}, 'c': b'abc', 'd': 2 ** 100,
         (('e', 1), 2): 'é', 3: {}, 4: (), 5: collections.OrderedDict(x=[]), 'f': torch.float16,
         6: collections.defaultdict(int, y=1), 'g': 3 * [b'a'], 'h': np.int64, 'i': np.float32(0.5)}
PLAIN = {**VALUE, 'b': [1, 2], 'f': 'torch float16', 'h': 'numpy int64', 'i': 0.5}


@pytest.mark.parametrize('protocol', range(6))
def test_plain_values_in_every_protocol(protocol):
    assert pickles.read(pickle.dumps(VALUE, protocol), is_meta=True) == PLAIN
    odd = {**VALUE, (1, (2, (3,))): 3, tuple(range(21)): 4, frozenset([5]): 6}
    assert pickles.read(pickle.dumps(odd, protocol), is_meta=True) == PLAIN


def test_values_of_a_checkpoint():
    value = pickles.read(pickle.dumps(TORCHS_VALUE, 2))
    assert value == {**TORCHS_VALUE, 'b': [1, 2], 'f': 'torch float16'}
    for key in ((1, (2, (3,))), tuple(range(21))):
        with pytest.raises(ValueError, match='a key that is not'):
            pickles.read(pickle.dumps({key: 4}, 2))
    for protocol in (0, 1, 3, 4, 5):
        with pytest.raises(ValueError, match='torch has no such operation'):
            pickles.read(pickle.dumps(TORCHS_VALUE, protocol))


@pytest.mark.parametrize('protocol', [0, 1, 3, 4, 5])
def test_torch_has_the_last_word(protocol, tmp_path):
    """It knows few operations of other protocols than its own, and that is one line, too."""
    torch.save(good_state(), tmp_path / 'ckpt.pt', pickle_protocol=protocol)
    try:
        torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    except Exception:
        with pytest.raises(ValueError, match='not a readable checkpoint'):
            checkpoint.load(tmp_path / 'ckpt.pt')
    else:
        checkpoint.load(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('value', [frozenset([1]), np.int64(3), int, range(3), {'a': eval}],
                         ids=str)
def test_what_could_not_be_read_again_is_not_saved(value, tmp_path):
    checkpoint.save(good_state(), str(tmp_path))
    content = (tmp_path / 'ckpt.pt').read_bytes()
    with pytest.raises(Exception, match='frozenset|scalar|long|range|eval'):
        checkpoint.save({**good_state(), 'config': {'a': value}}, str(tmp_path))
    assert (tmp_path / 'ckpt.pt').read_bytes() == content
    sparse = {**good_state()['model'], 'x': torch.eye(3).to_sparse()}
    with pytest.raises(ValueError, match='_rebuild_sparse_tensor'):
        checkpoint.save({**good_state(), 'model': sparse}, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
