"""The tables that prepare.py of nanoGPT's forks write: each is trained on and sampled from."""
import collections
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, run

from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.meta import count_mean_bytes, read_meta
from runtime.tokenizer import get_tokenizer

TEXT = 'ab é\n' * 60
CHARS = sorted(set(TEXT))
STOI = {c: i for i, c in enumerate(CHARS)}
PLAIN = {'vocab_size': 5, 'stoi': STOI, 'itos': dict(enumerate(CHARS))}
NUMPY_2, NUMPY_1 = b'numpy._core.multiarray', b'numpy.core.multiarray'


def dump(meta, protocol=4, numpy=2):
    """A pickle of meta, as a Python with this version of numpy writes it."""
    content = pickle.dumps(meta, protocol)
    if numpy == 1:
        if protocol >= 4:  # the name has its length before it, and frames have theirs
            old, new = (bytes([len(name)]) + name for name in (NUMPY_2, NUMPY_1))
            if content[2] == 0x95:
                content = content[:2] + content[11:]
        else:
            old, new = NUMPY_2, NUMPY_1
        content = content.replace(old, new)
        pickle.loads(content)  # numpy 2 still reads it
    return content


def numpy_ids(kind, text=str):
    return {'vocab_size': kind(5), 'stoi': {text(c): kind(i) for c, i in STOI.items()},
            'itos': {kind(i): text(c) for c, i in STOI.items()}}


def shift(distance, vocab_size):
    stoi = {c: distance * i + 1 for c, i in STOI.items()}
    return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': {i: c for c, i in stoi.items()}}


UNKNOWN = {'vocab_size': 6, 'stoi': {**STOI, 'x': 5, 'y': 5, '?': 5},
           'itos': {**PLAIN['itos'], 5: '?'}}
WITHOUT_CHARACTER = {'vocab_size': 6, 'stoi': {**STOI, 'x': 5, 'y': 5},
                     'itos': {**PLAIN['itos'], 5: '<unk>'}}
ONE_UNKNOWN = {'vocab_size': 6, 'stoi': {**STOI, 'x': 5}, 'itos': {**PLAIN['itos'], 5: '<unk>'}}
NO_TEXT = {'vocab_size': 7, 'stoi': STOI, 'itos': [*CHARS, None, None]}
SAME_TEXT = {'vocab_size': 7, 'stoi': {**STOI, '?': 6}, 'itos': [*CHARS, '?', '?']}
UINT16 = {**PLAIN, 'dtype': 'uint16'}
COUNTED = {**PLAIN, 'stoi': collections.defaultdict(int, STOI), 'n': collections.Counter(TEXT)}
MANY_KEYS = {**PLAIN, 'chars': set(CHARS), 'frozen': frozenset(CHARS), 'sizes': np.float32(0.5),
             'nothing': None, 'name': b'a b', 'empty': (set(), frozenset(), ()), 'words': ('a', 1),
             'merges': {('a', 'b'): 7, frozenset('ab'): 8}, 'nested': [{(1, (2,))}], 2: 3.5}


@pytest.mark.parametrize('content, table', [
    (dump({**PLAIN, 'vocab_size': np.int64(5)}), PLAIN),
    (dump({**PLAIN, 'vocab_size': np.int64(5)}, numpy=1), PLAIN),
    (dump(numpy_ids(np.uint16), protocol=2, numpy=1), PLAIN),
    (dump(numpy_ids(np.int32, np.str_), protocol=5), PLAIN),
    (dump({**PLAIN, 'itos': CHARS}), PLAIN), (dump({**PLAIN, 'itos': tuple(CHARS)}), PLAIN),
    (dump(MANY_KEYS), PLAIN), (dump(MANY_KEYS, protocol=2), PLAIN),
    (dump(shift(1, 6)), shift(1, 6)), (dump(shift(1, 64)), shift(1, 64)),
    (dump(shift(3, 14)), shift(3, 14)), (dump(UNKNOWN), UNKNOWN),
    (dump(WITHOUT_CHARACTER), WITHOUT_CHARACTER), (dump(ONE_UNKNOWN), ONE_UNKNOWN),
    (dump(NO_TEXT), {**NO_TEXT, 'itos': PLAIN['itos']}),
    (dump(SAME_TEXT), {**SAME_TEXT, 'itos': dict(enumerate(SAME_TEXT['itos']))}),
    (dump({**PLAIN, 'dtype': np.uint16}), UINT16), (dump({**PLAIN, 'dtype': 'u2'}), UINT16),
    (dump({**PLAIN, 'dtype': np.dtype('uint16')}, numpy=1), UINT16), (dump(COUNTED), PLAIN),
    (dump({'stoi': STOI, 'itos': PLAIN['itos']}), PLAIN)
], ids=['size', 'size-numpy1', 'ids-numpy1', 'ids-and-text', 'list', 'tuple', 'many-keys',
        'many-keys-protocol2', 'from-1', 'from-1-padded', 'gaps', 'unknown', 'unknown-word',
        'one-unknown', 'no-text', 'same-text', 'dtype', 'dtype-name', 'dtype-numpy1', 'defaultdict',
        'no-size'])
def test_a_fork_is_trained_on_and_sampled_from(tmp_path, content, table):
    data, out_dir = tmp_path / 'data', tmp_path / 'out'
    data.mkdir()
    (data / 'meta.pkl').write_bytes(content)
    ids = np.array([table['stoi'][c] for c in TEXT], dtype=np.uint16)
    for name in ('train.bin', 'val.bin'):
        ids.tofile(data / name)
    run('train.py', *TINY, f'--dataset={data}', f'--out_dir={out_dir}', '--max_iters=2',
        '--eval_interval=2', cwd=tmp_path)
    assert metrics(out_dir, 'eval')
    state = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    assert state['meta'] == table and state['model_args']['vocab_size'] == table['vocab_size']
    # the table is in the checkpoint, so that the dataset isn't needed
    (data / 'meta.pkl').unlink()
    out = run('sample.py', f'--out_dir={out_dir}', '--device=cpu', '--start=é b', '--num_samples=2',
              '--max_new_tokens=40', cwd=tmp_path).stdout
    assert out.count('é b') >= 2


BYTES = {'vocab_size': 5, 'stoi': {c.encode(): i for c, i in STOI.items()},
         'itos': {i: c.encode() for c, i in STOI.items()}}


@pytest.mark.parametrize('meta', [
    BYTES, {'vocab_size': 5, 'itos': {i: i for i in range(5)}, 'stoi': {i: i for i in range(5)}},
    {'vocab_size': 5, 'stoi': STOI}, {'vocab_size': 5, 'itos': CHARS},
    {**PLAIN, 'itos': CHARS[::-1]}, {**PLAIN, 'stoi': {**STOI, 'x': 5}}, {**PLAIN, 'itos': None},
    {**PLAIN, 'stoi': '\ud800'}
], ids=['bytes', 'numbers', 'only-stoi', 'only-itos', 'reversed', 'large-id', 'none', 'text'])
def test_a_table_without_text_is_trained_on(tmp_path, meta):
    """It has a vocab_size, so nanoGPT trains. Only sampling needs its tables."""
    data, out_dir = tmp_path / 'data', tmp_path / 'out'
    data.mkdir()
    (data / 'meta.pkl').write_bytes(pickle.dumps(meta))
    for name in ('train.bin', 'val.bin'):
        (np.arange(300, dtype=np.uint16) % 5).tofile(data / name)
    flags = [*TINY, f'--dataset={data}', f'--out_dir={out_dir}', '--eval_interval=2']
    err = run('train.py', *flags, '--max_iters=2', cwd=tmp_path).stderr
    assert err.count('warning') == 1 and 'makes no text, so it is good only for training' in err
    run('train.py', *flags, '--max_iters=4', '--init_from=resume', cwd=tmp_path)
    assert max(e['iter'] for e in metrics(out_dir, 'eval')) == 4
    err = run('sample.py', f'--out_dir={out_dir}', '--device=cpu', cwd=tmp_path, ok=False).stderr
    assert 'enough for training, but not for making text' in err


@pytest.mark.parametrize('vocab_size, fits', [(5, True), (64, True), (128, True), (192, False),
                                              (63, False), (6, False)])
def test_a_checkpoint_of_nanogpt_with_a_padded_vocabulary(tmp_path, vocab_size, fits):
    """It has no table of characters, so another dataset could be meant."""
    data, out_dir = tmp_path / 'data', tmp_path / 'out'
    data.mkdir()
    out_dir.mkdir()
    (data / 'meta.pkl').write_bytes(dump(PLAIN))
    for name in ('train.bin', 'val.bin'):
        (np.arange(300, dtype=np.uint16) % 5).tofile(data / name)
    config = GPTConfig(32, vocab_size, 2, 2, 32, bias=False)
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    checkpoint.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                     'iter_num': 2, 'best_val_loss': 5.0, 'config': {'dataset': str(data)},
                     'model_args': checkpoint.describe(config, None)['model_args']},
                    str(out_dir))
    result = run('sample.py', f'--out_dir={out_dir}', '--device=cpu', '--start=a',
                 '--max_new_tokens=5', ok=fits, cwd=tmp_path)
    assert fits or 'was trained on another dataset' in result.stderr
    result = run('train.py', *TINY, f'--dataset={data}', f'--out_dir={out_dir}', '--max_iters=4',
                 '--init_from=resume', ok=fits, cwd=tmp_path)
    assert fits or 'was trained on another dataset' in result.stderr


def is_plain(meta):
    kinds = {type(meta['vocab_size']), *map(type, meta['stoi'].values()), *map(type, meta['itos'])}
    texts = {*map(type, meta['stoi']), *map(type, meta['itos'].values())}
    return kinds == {int} and texts == {str}


@pytest.mark.parametrize('numpy', [1, 2])
@pytest.mark.parametrize('protocol', range(6))
def test_every_protocol_and_numpy(tmp_path, protocol, numpy):
    for kind in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64):
        content = dump(numpy_ids(kind, np.str_), protocol, numpy)
        assert (NUMPY_1 if numpy == 1 else NUMPY_2) in content
        (tmp_path / 'meta.pkl').write_bytes(content)
        meta = read_meta(str(tmp_path))
        assert meta == PLAIN and is_plain(meta)
    (tmp_path / 'meta.pkl').write_bytes(dump({**MANY_KEYS, 'vocab_size': np.int64(5)}, protocol,
                                             numpy))
    meta = read_meta(str(tmp_path))
    assert meta == PLAIN and is_plain(meta)


def test_ids_with_gaps():
    t = get_tokenizer(shift(3, 20), 14)
    assert t.vocab_size == 14 and t.encode('é') == [13]
    assert t.decode([1, 2, 13]) == '\n\ufffdé'
    assert t.decode_bytes([0]) == '\ufffd'.encode()
    # a newline, a letter of two bytes, an id without a character and one beyond the table
    assert count_mean_bytes(np.array([1, 13, 2, 19]), shift(3, 20)) == 3 / 4
    with pytest.raises(SystemExit):
        get_tokenizer(shift(3, 20), 13)


def test_characters_with_one_id():
    t = get_tokenizer(UNKNOWN, 6)
    assert t.vocab_size == 6 and t.decode(t.encode('axyb?')) == 'a??b?'
    assert get_tokenizer(WITHOUT_CHARACTER).decode([0, 5]) == '\n<unk>'
