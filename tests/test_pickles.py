"""Pickles that would make torch.load take memory or time without an end, or overflow the stack."""
import collections
import contextlib
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import zipfile

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
    + b'h\x02h\x01R' * MANY + b'e.',
    b'\x80\x02' + NESTED + b'.', b'\x80\x02' + NESTED + b')R.',  # as a value and as a function
    b'\x80\x02ccollections\nOrderedDict\n)R]' + NESTED + b'K\x01\x86ab.',
    b'\x80\x02' + b']' * MANY + b'a' * (MANY - 1) + b'.',
    b'\x80\x02](' + b'}NNs' * 10 ** 6 + b'e.', b'\x80\x02](' + b'(' * 5 * 10 ** 6 + b'.',
    b'\x80\x02ccollections\nOrderedDict\nq\x01](' + b'h\x01)R' * 10 ** 6 + b'e.']


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


def nest(kind, depth):
    """Containers of this kind inside one another."""
    value = kind()
    for _ in range(depth - 1):
        value = {1: value} if kind is dict else kind([value])
    return value


@pytest.mark.parametrize('is_meta', [False, True])
@pytest.mark.parametrize('kind', [list, tuple, dict, collections.OrderedDict])
def test_the_depth_of_containers_has_a_bound(kind, is_meta):
    if kind is collections.OrderedDict:  # it holds itself by attributes
        value = kind()
        for _ in range(60):
            inner, value = value, kind()
            value.inner = inner
        with contextlib.suppress(ValueError) if is_meta else pytest.raises(ValueError):
            pickles.read(pickle.dumps(value, 2), is_meta)
        return
    assert pickles.read(pickle.dumps(nest(kind, 100), 2), is_meta) == nest(kind, 100)
    with pytest.raises(ValueError, match='more than 100 containers inside one another'):
        pickles.read(pickle.dumps(nest(kind, 101), 2), is_meta)


def make_circles():
    """Containers that contain themselves, in one another's order of every kind."""
    one, two, three, four = [], {}, [], []
    one.append(one)
    two['two'] = two
    three.append({'three': [three]})
    four += [[1], (four,)]
    return one, two, three, four


@pytest.mark.parametrize('is_meta', [False, True])
@pytest.mark.parametrize('value', make_circles(), ids=range(4))
def test_containers_that_contain_themselves(value, is_meta):
    for protocol in (2, 4)[:1 + is_meta]:
        with pytest.raises(ValueError, match='inside one another'):
            pickles.read(pickle.dumps(value, protocol), is_meta)


def test_a_long_list_of_losses_and_a_large_table_are_read():
    losses = [i / 7 for i in range(10 ** 6)]
    assert pickles.read(pickle.dumps(losses, 2)) == losses
    with pytest.raises(ValueError, match='more memory'):
        pickles.read(pickle.dumps(5 * losses, 2))
    pickles.read(pickle.dumps(5 * losses, 2), file_size=2 ** 27)  # there are weights, too
    characters = [chr(i) for i in range(0x10000, 0x10000 + 10 ** 5)]
    table = {'stoi': {c: i for i, c in enumerate(characters)}, 'itos': dict(enumerate(characters))}
    for protocol in range(6):
        assert pickles.read(pickle.dumps(table, protocol), is_meta=True) == table


def test_tensors_with_hooks_are_refused():
    """Each could be a hook of the next one."""
    tensor = (b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x04\x85K\x01\x85\x89'
              b'ccollections\nOrderedDict\n)R%stR.')
    pickles.read(tensor % b'')
    pickles.read(tensor % b'}X\x04\x00\x00\x00conj\x88s')
    for hook in (tensor[2:-1] % b'', b'N', b']'):
        with pytest.raises(ValueError, match='a tensor with hooks'):
            pickles.read(tensor % (b'}K\x01' + hook + b's'))


@pytest.mark.parametrize('make_key', [lambda i: i * (2 ** 61 - 1), lambda i: (i, 'x'),
                                      lambda i: ((i,), 1)])
def test_keys_whose_hashes_may_collide_take_no_time(make_key):
    def write(count):
        return pickle.dumps({make_key(i): 1 for i in range(100, 100 + count)}, 2)
    assert not pickles.read(write(10), is_meta=True)
    assert len(pickles.read(write(1000))) == 1000
    with pytest.raises(ValueError, match='more memory'):
        pickles.read(write(12_000))
    keys = [make_key(i) for i in range(12_000)]
    set_of_keys = b'\x80\x02c__builtin__\nset\n' + pickle.dumps(keys, 2)[2:-1] + b'\x85R.'
    with pytest.raises(ValueError, match='takes long'):
        pickles.read(set_of_keys)


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
del PLAIN[('e', 1), 2]


@pytest.mark.parametrize('protocol', range(6))
def test_plain_values_in_every_protocol(protocol):
    assert pickles.read(pickle.dumps(VALUE, protocol), is_meta=True) == PLAIN
    odd = {**VALUE, (1, (2, (3,))): 3, tuple(range(21)): 4, frozenset([5]): 6, 2 ** 80: 7}
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


# -----------------------------------------------------------------------------
# archives in which two readers find two pickles
HARMLESS = pickle.dumps({}, 2)


def write_entries(path, entries):
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in entries:
            archive.writestr(name, content)


def list_entries(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def change_directory(content, old, new):
    """The archive with another name in its directory, but not before the entry itself."""
    start = content.rindex(old)
    return content[:start] + new + content[start + len(old):]


ENTRIES = {
    'second-before': lambda entries: [('ckpt/data.pkl', HARMLESS), *entries],
    'second-after': lambda entries: [*entries, ('ckpt/data.pkl', HARMLESS)],
    'capitals': lambda entries: [('ckpt/DATA.pkl', HARMLESS), *entries],
    'capitals-number': lambda entries: [*entries, ('ckpt/DATA/0', b'')],
    'capitals-folder': lambda entries: [*entries, ('CKPT/data.pkl', HARMLESS)],
    'other-folder': lambda entries: [('x/data.pkl', HARMLESS), *entries],
    'deeper': lambda entries: [('ckpt/x/data.pkl', HARMLESS), *entries],
    'torchscript': lambda entries: [*entries, ('ckpt/constants.pkl', HARMLESS)],
    'no-folder': lambda entries: [('data.pkl', HARMLESS), *entries],
    'no-pickle': lambda entries: entries[1:], 'empty': lambda entries: [],
    'two-of-data': lambda entries: [*entries, entries[-1]]}
BYTES = {
    'before': lambda content: HARMLESS + content, 'after': lambda content: content + HARMLESS,
    'archive-before': lambda content: content + content,
    'comment': lambda content: content[:-2] + struct.pack('<H', 22) + content[-22:],
    'directory-name': lambda content: change_directory(content, b'ckpt/data.pkl', b'ckpt/data.pkk'),
    'null': lambda content: content.replace(b'ckpt/data.pkl', b'ckpt/data.pk\0'),
    'fewer-entries': lambda content: content[:-14] + b'\1\0\1\0' + content[-10:],
    'zip64': lambda content: (content[:-22] + struct.pack('<4sLQL', b'PK\6\7', 0, 9, 1)
                              + content[-22:])}


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('kind', [*ENTRIES, *BYTES])
def test_archives_with_two_meanings_are_refused(tmp_path, kind):
    path = tmp_path / 'ckpt.pt'
    torch.save(good_state(), path)
    entries = list_entries(path)
    write_entries(path, entries)
    checkpoint.load(path)  # zipfile's archives are fine
    if kind in ENTRIES:
        write_entries(path, ENTRIES[kind](entries))
    else:
        path.write_bytes(BYTES[kind](path.read_bytes()))
    with pytest.raises(ValueError, match='is not a readable checkpoint: '):
        checkpoint.load(path)


def test_entries_that_overlap_are_not_read_again_and_again(tmp_path):
    path = tmp_path / 'ckpt.pt'
    write_entries(path, [('a/data.pkl', HARMLESS), *((f'a/data/{i}', b'12345') for i in range(9))])
    content = bytearray(path.read_bytes())
    for at in [m.start() for m in re.finditer(b'PK\1\2', content)][1:]:
        content[at + 20:at + 28] = struct.pack('<2L', 400, 400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match='its entries overlap'):
        checkpoint.load(path)


@pytest.mark.parametrize('protocol, value', [
    (2, torch.nn.Linear(1, 1)), (2, torch.eye(2).to_sparse()), (2, np.float64(1)), (4, 'a'),
    (2, slice(1)), (2, pathlib.PurePosixPath('a'))], ids=range(6))
def test_no_reason_repeats_torchs_advice(tmp_path, capsys, protocol, value):
    path = tmp_path / 'ckpt.pt'
    torch.save({**good_state(), 'config': value}, path, pickle_protocol=protocol)
    assert checkpoint.try_to_load(str(tmp_path / 'ckpt.pt')) is None
    err = capsys.readouterr().err
    assert err.startswith('warning: ') and err.count('\n') == 1
    assert not re.search('weights_only|trust|re-running|allowlist', err, re.IGNORECASE)


@pytest.mark.parametrize('data', [b'\x80\x02}}b.', b'\x80\x02NQ.', b'\x80\x02X\x01\0\0\0aQ.',
                                  b'\x80\x02X\x11\0\0\0collections Counter)R.'])
def test_what_only_torch_refuses_has_a_reason_of_ours(tmp_path, data):
    torch.save(good_state(), tmp_path / 'ckpt.pt')
    rezip(tmp_path / 'ckpt.pt', data=data)
    with pytest.raises(ValueError) as e:
        checkpoint.load(tmp_path / 'ckpt.pt')
    assert not re.search('weights_only|trust|re-running', str(e.value), re.IGNORECASE)
