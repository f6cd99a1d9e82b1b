"""What makes a run: other settings, code or data are noticed, between ranks and on resume."""
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_here, start_ranks

from runtime import provenance
from runtime.dataset import identify_data
from runtime.files import describe_changes, fingerprint


@pytest.fixture
def data(char_data, tmp_path):
    """A copy of the dataset, to be changed."""
    return shutil.copytree(char_data, tmp_path / 'data')


def write_ids(data, split, change):
    path = os.path.join(data, f'{split}.bin')
    change(np.fromfile(path, dtype='<u2')).tofile(path)


# -----------------------------------------------------------------------------
# the data
def halve(ids):
    return ids[:len(ids) // 2]


def reverse(ids):
    return ids[::-1]


def change_middle(ids):
    ids[len(ids) // 3:2 * len(ids) // 3] = ids[0]
    return ids


@pytest.mark.parametrize('change, words', [
    (halve, 'bytes and has'), (reverse, 'has other tokens'), (change_middle, 'has other tokens')])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_other_data_is_noticed_when_a_run_continues(data, tmp_path, split, change, words):
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--eval_interval=2']
    run_here('train.py', *args, '--max_iters=2')
    assert not run_here('train.py', *args, '--max_iters=4', '--init_from=resume').stderr
    state = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    torch.save({**state, 'best_val_loss': 0.5}, tmp_path / 'out' / 'ckpt.pt')
    write_ids(data, split, change)
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    err = run_here('train.py', *args, '--max_iters=6', '--init_from=resume').stderr
    warning, = [line for line in err.splitlines() if 'checkpoint' in line]
    assert f'{split}.bin' in warning and words in warning
    # a best loss counts only for the data that it was measured on
    assert ('best val loss starts again' in warning) == (split == 'val')
    best_val_loss = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['best_val_loss']
    assert (best_val_loss == 0.5) == (split == 'train')
    copy = tmp_path / 'out' / 'previous-1' / 'ckpt.pt'
    assert copy.exists() == (split == 'val')
    assert split == 'train' or copy.read_bytes() == before


def test_another_dataset_after_a_checkpoint_of_nanogpt(data, char_data, trained, tmp_path):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    del state['data']  # nanoGPT doesn't write it
    torch.save({**state, 'best_val_loss': 0.5}, tmp_path / 'ckpt.pt')
    args = [*TINY, f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=62',
            '--always_save_checkpoint=False']
    err = run_here('train.py', *args, f'--dataset={data}').stderr
    assert f'it was {char_data}; the best val loss starts again' in err
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['best_val_loss'] > 0.5


@pytest.mark.parametrize('size', [0, 1, 4095, 4096, 4097, 300_000])
def test_a_fingerprint_sees_each_end_and_the_size(tmp_path, size):
    path = tmp_path / 'train.bin'
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    before = fingerprint(path)
    assert before == fingerprint(path) and before['bytes'] == size
    for place in {0, size - 1} & set(range(size)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        assert fingerprint(path) != before
    path.write_bytes(content + b'x')
    assert fingerprint(path) != before


@pytest.mark.parametrize('change', [halve, reverse])
def test_bins_that_meta_was_not_written_with_are_named(data, tmp_path, change):
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1']
    assert not run_here('train.py', *args).stderr
    write_ids(data, 'train', change)
    err = run_here('train.py', *args, '--init_from=scratch').stderr
    assert 'was written with other .bin files: train.bin' in err and 'prepare' in err


def test_a_change_is_described_only_where_both_are_known(char_data):
    data_id = identify_data(char_data)
    assert describe_changes(data_id, data_id) == describe_changes({}, data_id) == []
    other_id = {**data_id, 'val': {'bytes': 10, 'hash': ''}}
    text, = describe_changes(other_id, data_id)
    assert text.startswith('val.bin had 10 bytes')


# -----------------------------------------------------------------------------
# the settings
def test_settings_that_differ_from_the_checkpoints_are_one_line(trained, char_data, tmp_path):
    shutil.copy(os.path.join(trained, 'ckpt.pt'), tmp_path)
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--init_from=resume']
    out = run_here('train.py', *args, '--max_iters=60', '--eval_only').stdout
    assert 'settings have changed' not in out
    out = run_here('train.py', *args, '--max_iters=61', '--learning_rate=0.002', '--batch_size=2',
                   '--seed=3', '--dropout=0.1', '--weight_decay=0.3', '--n_layer=3',
                   '--eval_iters=2', '--log_interval=2', '--eval_interval=50').stdout
    line, = [line for line in out.splitlines() if 'settings have changed' in line]
    new, _, old = line.partition(': the new values count')
    for change in ('learning_rate=0.002 (it was 0.003)', 'batch_size=2 (it was 4)',
                   'seed=3 (it was 1337)', 'dropout=0.1 (it was 0.0)', 'eval_iters=2 (it was 4)'):
        assert change in new
    assert 'weight_decay=0.1 come from the checkpoint' in old and 'weight_decay' not in new
    assert not re.search('n_layer|_interval', line)  # they change nothing that counts
    assert 'ignored, because the weights have other values: n_layer=3' in out


# -----------------------------------------------------------------------------
# the ranks
@pytest.mark.parametrize('args, words', [
    (['--learning_rate=0.1'], '--learning_rate is 0.1 there and 0.003 here'),
    (['--seed=3', '--parallel=fsdp'], '--seed is 3 there and 1337 here'),
    (['--eval_interval=7'], '--eval_interval is 7 there'),
    (['--init_from=auto'], '--init_from is auto there and scratch here')])
def test_ranks_with_other_settings_are_refused(char_data, tmp_path, args, words):
    out_dir = tmp_path / 'out'
    ranks = start_ranks(2, 'train.py', *TINY, f'--dataset={char_data}', f'--out_dir={out_dir}',
                        '--max_iters=2', last_args=args)
    (_, err), _ = [rank.communicate() for rank in ranks]
    assert f'error: rank 1 does not run what rank 0 runs: {words}' in err.replace(
        '--parallel is fsdp there and ddp here; ', '')
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert not out_dir.exists()


def test_ranks_with_other_data_are_refused(data, char_data, tmp_path):
    write_ids(data, 'train', reverse)
    ranks = start_ranks(2, 'train.py', *TINY, f'--dataset={char_data}', '--max_iters=2',
                        f'--out_dir={tmp_path / "out"}', last_args=[f'--dataset={data}'])
    (_, err), _ = [rank.communicate() for rank in ranks]
    assert 'rank 1 does not run what rank 0 runs: train.bin is' in err


def test_a_module_that_only_one_rank_imports_is_no_difference(char_data, tmp_path):
    (tmp_path / 'own.py').write_text('x = 1')
    (tmp_path / 'config.py').write_text(f"""
import os, sys
if os.environ['RANK'] == '0':
    sys.path.insert(0, {str(tmp_path)!r})
    import own
    own.__file__ = {os.path.join(ROOT, 'convert.py')!r}  # as if it were in the repository
""")
    ranks = start_ranks(2, 'train.py', str(tmp_path / 'config.py'), *TINY, '--max_iters=1',
                        f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}')
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs


def test_paths_and_devices_of_ranks_may_differ(data, char_data, tmp_path):
    ranks = start_ranks(2, 'train.py', *TINY, f'--dataset={char_data}', '--max_iters=1',
                        f'--out_dir={tmp_path / "out"}',
                        last_args=[f'--dataset={data}', f'--out_dir={tmp_path / "other"}'])
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs


def test_ranks_with_checkpoints_of_other_iterations_are_refused(char_data, trained, tmp_path):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    for name, iter_num in (('a', 60), ('b', 61)):
        (tmp_path / name).mkdir()
        torch.save({**state, 'iter_num': iter_num}, tmp_path / name / 'ckpt.pt')
    ranks = start_ranks(2, 'train.py', *TINY, f'--dataset={char_data}', '--init_from=resume',
                        f'--out_dir={tmp_path / "a"}', last_args=[f'--out_dir={tmp_path / "b"}'])
    outputs = [rank.communicate()[1] for rank in ranks]
    assert f'the ranks found different checkpoints in {tmp_path / "a"}' in outputs[0]
    assert all(rank.returncode for rank in ranks)


def test_the_sources_are_those_of_this_repository(tmp_path):
    hashes = provenance.hash_sources()
    assert {'runtime/provenance.py', 'runtime/console.py'} <= hashes.keys()
    assert not [name for name in hashes if 'site-packages' in name or os.path.isabs(name)]
    with open(os.path.join(ROOT, 'runtime', 'provenance.py'), encoding='utf-8') as f:
        source = f.read()
    module = tmp_path / 'edited.py'
    module.write_bytes(source.replace('\n', '\r\n').encode())  # git may write other line ends
    assert provenance.hash_source(module) == hashes['runtime/provenance.py']
    module.write_text(source + '# edited\n')
    assert provenance.hash_source(module) != hashes['runtime/provenance.py']
