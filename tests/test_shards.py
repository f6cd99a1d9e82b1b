"""Shards: the same as one train.bin of the same tokens, or one clear line."""
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, equal_states, expect_error, metrics, run, run_here, run_ranks

from runtime import checkpoint, shards
from runtime.dataset import find_data
from runtime.files import fingerprint
from runtime.meta import count_mean_bytes

CUTS = [1, 40, 71, 5000, 5001, 5033]  # where shards begin: some are shorter than a sequence


def write_shard(path, ids, magic=20240520, version=1, count=None, extra=0):
    """A file of ids with a header; count is what the header says, if it isn't the truth."""
    header = np.zeros(256, '<i4')
    header[:4] = magic, version, len(ids) if count is None else count, extra
    with open(path, 'wb') as f:
        f.write(header.tobytes() + ids.tobytes())


def write_shards(folder, split, ids, cuts=()):
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.split(ids, cuts)):
        write_shard(folder / f'tiny_{split}_{number:06}.bin', part)


def read_ids(data_dir, split):
    return np.fromfile(os.path.join(data_dir, f'{split}.bin'), '<u2')


@pytest.fixture
def shards_dir(char_data, tmp_path):
    """char_data in shards, with its meta.pkl, which doesn't know their fingerprints."""
    folder = tmp_path / 'shards'
    write_shards(folder, 'train', read_ids(char_data, 'train'), CUTS)
    write_shards(folder, 'val', read_ids(char_data, 'val'), [60])
    copy_meta(char_data, folder)
    return folder


def copy_meta(char_data, folder):
    shutil.copy(os.path.join(char_data, 'meta.pkl'), folder)


def train(data_dir, out_dir, *args, ok=True):
    return run_here('train.py', *TINY, f'--dataset={data_dir}', f'--out_dir={out_dir}',
                    '--eval_interval=6', *args, ok=ok)


def list_losses(out_dir):
    losses = {e['iter']: e['loss'] for e in metrics(out_dir, 'iter')}
    evals = [(e['iter'], e['train/loss'], e['val/loss'], e.get('val/bits_per_byte'))
             for e in metrics(out_dir, 'eval')]
    return losses, sorted(set(evals))


# -----------------------------------------------------------------------------
# training
@pytest.mark.parametrize('options', [[], ['--data_order=epochs', '--eval_iters=0']])
def test_training_on_shards_is_training_on_one_file(char_data, shards_dir, tmp_path, options):
    options = [*options, '--lr_decay_iters=12']
    train(char_data, tmp_path / 'one', '--max_iters=12', *options)
    out = train(shards_dir, tmp_path / 'many', '--max_iters=6', *options)
    counts = [len(read_ids(char_data, split)) for split in ('train', 'val')]
    assert f', {counts[0]:,} train tokens and {counts[1]:,} val tokens' in out.stdout
    moved = shards_dir.rename(tmp_path / 'moved')  # the fingerprint is not of the place
    out = train(moved, tmp_path / 'many', '--max_iters=12', '--init_from=resume', *options)
    assert 'at iteration 6' in out.stdout and 'not that of the checkpoint' not in out.stderr
    assert equal_states(tmp_path / 'one' / 'ckpt.pt', tmp_path / 'many' / 'ckpt.pt')
    assert list_losses(tmp_path / 'one') == list_losses(tmp_path / 'many')
    losses, evals = list_losses(tmp_path / 'many')
    assert len(losses) == 12 and (evals[0][3] is not None) == ('--eval_iters=0' in options)


def test_several_ranks(char_data, shards_dir, tmp_path):
    for data_dir, name in ((char_data, 'one'), (shards_dir, 'many')):
        run_ranks(2, 'train.py', *TINY, f'--dataset={data_dir}', f'--out_dir={tmp_path / name}',
                  '--max_iters=3')
    assert equal_states(tmp_path / 'one' / 'ckpt.pt', tmp_path / 'many' / 'ckpt.pt')


def test_bench_reads_shards(shards_dir):
    for args in (['--what=data', '--compare=slices'], ['--what=train', '--compile=False']):
        out = run('bench.py', *TINY[:7], *args, f'--dataset={shards_dir}', '--repeats=3').stdout
        assert f'data: {shards_dir}' in out


def test_other_shards_are_noticed_on_resume(shards_dir, tmp_path):
    train(shards_dir, tmp_path / 'out', '--max_iters=1')
    ids = np.fromfile(shards_dir / 'tiny_train_000002.bin', '<u2')[512:]
    write_shard(shards_dir / 'tiny_train_000002.bin', ids[::-1])
    err = train(shards_dir, tmp_path / 'out', '--max_iters=2', '--init_from=resume').stderr
    assert 'the data is not that of the checkpoint: train.bin has other tokens' in err


def test_the_fingerprint_of_one_file_is_that_of_earlier_checkpoints(tmp_path):
    np.arange(2 ** 19, dtype='<u2').tofile(tmp_path / 'train.bin')
    assert fingerprint(tmp_path / 'train.bin') == {'bytes': 2 ** 20, 'hash': '15ea38b4929e74b0'}


def test_ids_of_32_bits_need_a_meta(tmp_path, capsys):
    data_dir = tmp_path / 'llama'
    data_dir.mkdir()
    ids = np.arange(128000, 128256, dtype='<u4')
    for split in ('train', 'val'):
        write_shard(data_dir / f'{split}.bin', ids, 20240801, 7)
    said = expect_error(capsys, shards.open_tokens, str(data_dir), 'train', 32, 50304)
    assert 'ids of 32 bits' in said
    code = re.search(r'pickle\.dump\(.*?\)', said).group()
    with open(data_dir / 'meta.pkl', 'wb') as file:
        exec(f'import pickle; {code}', {'file': file})
    out = train(data_dir, tmp_path / 'out', '--n_layer=1', '--n_embd=8', '--max_iters=1')
    assert 'vocabulary 128256' in out.stdout


# -----------------------------------------------------------------------------
# the array
@pytest.fixture
def many(tmp_path):
    """(Shards, the same tokens as one array)."""
    ids = np.arange(6000, dtype='<u2')
    write_shards(tmp_path, 'train', ids, CUTS)
    return shards.open_tokens(str(tmp_path), 'train', 32, 6000), ids


def test_slices(many):
    tokens, ids = many
    assert len(tokens) == 6000 and tokens.shape == (6000,) and tokens.dtype == np.uint16
    assert tokens[0] == 0 and tokens[70] == 70 and tokens[-1] == 5999
    places = [None, 0, 1, 39, 40, 41, 71, 100, 4999, 5000, 5001, 5033, 5999, 6000, 9000, -1, -970]
    for start in places:
        for stop in places:
            piece = tokens[start:stop]
            assert isinstance(piece, np.ndarray) and np.array_equal(piece, ids[start:stop])
    assert np.array_equal(tokens[30:90:7], ids[30:90:7]) and tokens[5:2:-1].tolist() == [5, 4, 3]
    places = np.array([[5999, 0], [-1, 40]])
    assert np.array_equal(tokens[places], ids[places]) and np.array_equal(tokens, ids)
    with pytest.raises(IndexError):
        tokens[6000]


def test_a_slice_within_a_file_is_a_view_and_a_long_one_is_not_copied(many, monkeypatch):
    tokens, ids = many
    assert np.shares_memory(tokens[71:5000], tokens.parts[3])
    monkeypatch.setattr(shards, 'MAX_COPY', 100)
    tail = tokens[1:]
    assert isinstance(tail, shards.Shards) and np.shares_memory(tail[2000:2100], tokens.parts[3])
    assert len(tail) == 5999 and np.array_equal(tail[:100], ids[1:101])
    assert np.array_equal(tail[3000:][1980:2050], ids[4981:5051])


def test_mean_bytes(many):
    tokens, ids = many
    meta = {'stoi': {'x': 0}, 'itos': {i: 'xy'[i % 2] * (i % 9) for i in range(6000)}}
    assert count_mean_bytes(tokens[1:], meta) == count_mean_bytes(ids[1:], meta)


def test_windows(many):
    tokens, ids = many
    for width in (1, 33, 100):
        windows = shards.view_windows(tokens, width)
        expected = np.lib.stride_tricks.sliding_window_view(ids, width)
        assert len(windows) == len(expected) and windows.shape == expected.shape
        starts = np.arange(len(windows), dtype=np.uint64)  # as DataOrder draws them
        assert np.array_equal(windows[starts], expected)
        for index in (-1, 40, slice(30, 50, 3), [3, -4], starts[:6].reshape(2, 3), starts[:0],
                      torch.tensor([70, 7])):
            rows = windows[index]
            assert rows.dtype == np.uint16 and np.array_equal(rows, expected[index])
        for index in (len(windows), [-len(windows) - 1], [0.5], starts == 3):
            with pytest.raises(IndexError):
                windows[index]


def test_one_file_stays_an_array_of_numpys(tmp_path):
    ids = np.arange(100, dtype='<u2')
    write_shard(tmp_path / 'a_train_1.bin', ids)
    ids.tofile(tmp_path / 'val.bin')
    for split in ('train', 'val'):
        tokens = shards.open_tokens(str(tmp_path), split, 8, 100)
        windows = shards.view_windows(tokens, 9)
        assert type(tokens) is np.memmap and np.array_equal(tokens, ids)
        assert type(windows) is np.ndarray and np.shares_memory(windows, tokens)
        shards.forget_pages(tokens)


OPEN_MANY = '''
import resource
import sys
import numpy as np
from runtime import shards
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
tokens = shards.open_tokens(sys.argv[1], 'train', 8, 1000)
assert np.array_equal(tokens, np.arange(1000)) and len(tokens.parts) == 500
'''


def test_more_shards_than_files_that_may_be_open(tmp_path):
    pytest.importorskip('resource')
    write_shards(tmp_path, 'train', np.arange(1000, dtype='<u2'), range(2, 1000, 2))
    # a process of its own: this one may have more than 200 files open by now
    out = subprocess.run([sys.executable, '-c', OPEN_MANY, str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True)
    assert not out.returncode, out.stderr


# -----------------------------------------------------------------------------
# while they are mapped
def test_a_shard_that_is_cut_short_while_it_is_mapped(many, tmp_path, capsys):
    tokens, ids = many
    windows = shards.view_windows(tokens, 33)
    path = tmp_path / 'tiny_train_000003.bin'
    os.utime(path, ns=(0, 5))
    assert np.array_equal(windows[4990], ids[4990:5023])
    assert capsys.readouterr().err == f'warning: {path} was changed while the run reads it\n'
    os.truncate(path, 10000)
    shards.check_mapped_file(tokens)  # only what is read counts
    assert np.array_equal(windows[5100], ids[5100:5133])
    for read in (windows.__getitem__, lambda start: tokens[start:start + 33]):
        said = expect_error(capsys, read, np.int64(4970))
        assert f'{path} was cut short: it had 10,882 bytes and has 10,000' in said


def test_the_pages_of_shards_are_forgotten(tmp_path):
    if not os.path.exists('/proc/self/status'):
        pytest.skip('needs Linux, where a process can ask for its pages')

    def count_mapped_bytes():
        with open('/proc/self/status') as f:
            line = next(line for line in f if line.startswith('RssFile'))
        return int(line.split()[1]) * 1024

    write_shards(tmp_path, 'train', np.zeros(2 ** 24, '<u2'), [2 ** 23])  # 2 x 16 MiB
    tokens = shards.open_tokens(str(tmp_path), 'train', 8, 2 ** 16)
    for part in tokens.parts:  # what it took to open them
        shards.forget_pages(part)
    before = count_mapped_bytes()
    assert not any(part.any() for part in tokens.parts)
    assert count_mapped_bytes() > before + 2 ** 24
    shards.forget_pages(tokens)
    assert count_mapped_bytes() < before + 2 ** 23


# -----------------------------------------------------------------------------
# finding them
@pytest.mark.parametrize('names', [
    ('fineweb_train_000001.bin', 'fineweb_val_000000.bin'), ('train.bin', 'fineweb_val_000000.bin'),
    ('TinyStories_train.bin', 'TinyStories_val.bin'), ('train_1.bin', 'val_1.bin'),
    ('fineweb.Train.1.bin', 'fineweb.Val.1.bin'), ('a-train.bin', 'a-validation.bin')])
def test_names_of_shards(tmp_path, names):
    for name in (*names, '._train_1.bin', 'a_eval.bin', 'train_1.npy', 'train_1.bin.part'):
        (tmp_path / name).touch()
    assert find_data(str(tmp_path)) == str(tmp_path)
    for split, name in zip(('train', 'val'), names):
        assert shards.list_bins(tmp_path, split) == [str(tmp_path / name)]


def test_a_dataset_of_nanogpt_comes_first_and_shards_are_sorted(tmp_path):
    names = [f'edu_train_{number:06}.bin' for number in (12, 3, 100000, 2)]
    for name in names:
        (tmp_path / name).touch()
    found = shards.list_bins(tmp_path, 'train')
    assert found == [str(tmp_path / name) for name in sorted(names)]
    (tmp_path / 'train.bin').touch()
    assert shards.list_bins(tmp_path, 'train') == [str(tmp_path / 'train.bin')]


def test_one_split_is_not_enough(tmp_path, monkeypatch, capsys):
    (tmp_path / 'fineweb_train_000001.bin').touch()
    said = expect_error(capsys, find_data, str(tmp_path))
    assert f'{tmp_path} has fineweb_train_000001.bin, but no val.bin, and no shards' in said
    (tmp_path / 'fineweb_train_000001.bin').rename(tmp_path / 'fineweb_val_000001.bin')
    assert 'has fineweb_val_000001.bin, but no train.bin' in expect_error(
        capsys, find_data, str(tmp_path))
    said = expect_error(capsys, shards.open_tokens, str(tmp_path), 'test', 8, 100)
    assert f'{tmp_path} has no test.bin, and no shards with test in their names' in said


def test_shards_of_two_datasets(tmp_path, capsys):
    for name in ('a_train_1.bin', 'a_train_2.bin', 'b_train_1.bin'):
        (tmp_path / name).touch()
    said = expect_error(capsys, shards.list_bins, str(tmp_path), 'train')
    assert 'train shards of several datasets: a_train_1.bin, b_train_1.bin' in said


# -----------------------------------------------------------------------------
# files that are not what they should be
IDS = np.arange(100, dtype='<u2')


def cut_file(path, size):
    os.truncate(path, size)


def damage(ids=IDS, **header):
    return lambda path: write_shard(path, ids, **header)


@pytest.mark.parametrize('change, words', [
    (lambda path: cut_file(path, 1000), 'its header of 1024 is cut short'),
    (lambda path: cut_file(path, 4), 'its header of 1024 is cut short'),
    (lambda path: cut_file(path, 1024), 'has 1,024 bytes, but by its header it has 100 tokens'),
    (lambda path: cut_file(path, 1223), 'has 1,223 bytes, but by its header it has 100 tokens'),
    (damage(count=99), 'has 1,224 bytes, but by its header it has 99 tokens of uint16'),
    (damage(count=-100), 'by its header it has -100 tokens'),
    (damage(count=2 ** 31 - 1), 'by its header it has 2,147,483,647 tokens'),
    (damage(version=2), 'version 2, but only version 1 is known'),
    (damage(magic=20240801, version=1), 'version 1, but only version 7 is known'),
    (damage(ids=IDS[:0]), 'has 0 tokens'),
    (lambda path: cut_file(path, 0), 'has 0 tokens'),
    (damage(ids=IDS.astype('<u4'), magic=20240801, version=7), 'a header and ids of 32 bits'),
    (lambda path: IDS.tofile(path), 'no header and ids of 16 bits'),
    (damage(extra=1), 'no header and ids of 16 bits'),
    (damage(ids=IDS + 1), 'has token id 100, but the vocabulary has 100'),
    (lambda path: (path.unlink(), os.mkfifo(path)), 'it is a pipe'),
    (lambda path: (path.unlink(), os.symlink('nowhere', path)), 'a link that leads nowhere')])
@pytest.mark.parametrize('number', [0, 1, 2])
def test_a_shard_that_cannot_be_read(tmp_path, capsys, change, words, number):
    write_shards(tmp_path, 'train', np.tile(IDS, 3), [100, 200])
    path = tmp_path / f'tiny_train_{number:06}.bin'
    change(path)
    said = expect_error(capsys, shards.open_tokens, str(tmp_path), 'train', 8, 100)
    assert words in said and str(path) in said


def test_too_few_tokens_together(tmp_path, capsys):
    write_shards(tmp_path, 'train', IDS, [10])
    said = expect_error(capsys, shards.open_tokens, str(tmp_path), 'train', 100, 100)
    assert '(2 train shards) has 100 tokens, fewer than block_size + 1 = 101' in said
    assert len(shards.open_tokens(str(tmp_path), 'train', 99, 100)) == 100


@pytest.mark.parametrize('ids', [
    np.tile(np.array([0xd878, 0x0134, 1, 0], '<u2'), 300),
    np.concatenate((np.array([0xd878, 0x0134, 1, 0, 588, 0, 5], '<u2'), np.zeros(1093, '<u2'))),
    np.concatenate((np.array([0xd879, 0x0134, 1, 0, 588, 0], '<u2'), np.zeros(1094, '<u2')))])
def test_a_file_of_nanogpt_that_begins_like_a_header(tmp_path, ids):
    ids.tofile(tmp_path / 'train.bin')
    tokens = shards.open_tokens(str(tmp_path), 'train', 8, 2 ** 16)
    assert np.array_equal(tokens, ids)


def test_a_header_in_front_of_a_train_bin(char_data, tmp_path):
    for split in ('train', 'val'):
        write_shard(tmp_path / f'{split}.bin', read_ids(char_data, split))
    copy_meta(char_data, tmp_path)
    for data_dir, name in ((char_data, 'one'), (tmp_path, 'other')):
        train(data_dir, tmp_path / name, '--max_iters=2')
    one, other = (checkpoint.load(str(tmp_path / name / 'ckpt.pt')) for name in ('one', 'other'))
    assert one['data'] != other['data']
    assert equal_states(tmp_path / 'one' / 'ckpt.pt', tmp_path / 'other' / 'ckpt.pt')


def test_a_stranger_s_shards_end_in_one_line(shards_dir, tmp_path):
    cut_file(shards_dir / 'tiny_val_000001.bin', 2000)
    err = train(shards_dir, tmp_path / 'out', '--max_iters=1', ok=None).stderr
    warning, error = err.splitlines()
    assert 'warning: meta.pkl' in warning
    assert error.startswith(f'error: {shards_dir}/tiny_val_000001.bin has 2,000 bytes, but by its')
    assert not (tmp_path / 'out').exists()
