"""Datasets: found by path and by name, mapped and not read, refused if they can't be trained on."""
import os

import numpy as np
import pytest
from conftest import expect_error

from runtime import dataset, shards


@pytest.mark.parametrize('content, words', [
    (b'', '0 tokens'), (b'123', 'not a multiple of 2'), (b'12' * 8, '8 tokens'),
    (b'\xff\xff' * 100, 'token id 65535')])
def test_bins_that_cannot_be_trained_on(tmp_path, capsys, content, words):
    (tmp_path / 'train.bin').write_bytes(content)
    said = expect_error(capsys, shards.open_tokens, str(tmp_path), 'train', 8, 1000)
    assert words in said and 'train.bin' in said


def test_a_bin_is_mapped_and_little_endian(tmp_path):
    (tmp_path / 'train.bin').write_bytes(bytes([1, 0, 0, 1] * 10))
    tokens = shards.open_tokens(str(tmp_path), 'train', 8, 1000)
    assert isinstance(tokens, np.memmap) and tokens[:4].tolist() == [1, 256, 1, 256]
    assert not tokens.flags.writeable


def test_datasets_are_found_by_path_and_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ('data/mine', 'here'):
        os.makedirs(folder)
        for split in ('train', 'val'):
            open(os.path.join(folder, f'{split}.bin'), 'wb').close()
    for name in ('mine', 'here', str(tmp_path / 'here'), './here'):
        folder = tmp_path / ('data/mine' if name == 'mine' else 'here')
        assert os.path.samefile(dataset.find_data(name), folder)
    assert 'data/text/prepare.py' in expect_error(capsys, dataset.find_data, 'nothing')


@pytest.mark.skipif(not os.path.exists('/proc/self/status'),
                    reason='needs Linux, where a process can ask for its pages')
def test_a_bin_that_changes_while_it_is_mapped(tmp_path, capsys):
    path = tmp_path / 'train.bin'
    np.arange(5000, dtype='<u2').tofile(path)
    tokens = shards.open_tokens(str(tmp_path), 'train', 8, 5000)
    shards.check_mapped_file(tokens)
    os.utime(path, ns=(0, 5))
    for _ in range(2):  # it is said once
        shards.check_mapped_file(tokens)
    assert capsys.readouterr().err == f'warning: {path} was changed while the run reads it\n'
    other = tmp_path / 'other.bin'
    np.arange(10, dtype='<u2').tofile(other)
    os.replace(path, tmp_path / 'kept.bin')
    os.replace(other, path)  # the mapped file is now kept.bin
    shards.check_mapped_file(tokens)
    os.replace(tmp_path / 'kept.bin', path)
    os.truncate(path, 9998)
    said = expect_error(capsys, shards.check_mapped_file, tokens)
    assert 'was cut short: it had 10,000 bytes and has 9,998' in said


def test_what_was_read_of_a_bin_does_not_stay_in_the_process(tmp_path):
    def mapped():
        with open('/proc/self/status') as f:
            line = next(line for line in f if line.startswith('RssFile'))
        return int(line.split()[1]) * 1024

    path = tmp_path / 'train.bin'
    np.arange(2 ** 25, dtype='<u2').tofile(path)  # 64 MiB
    tokens = shards.open_tokens(str(tmp_path), 'train', 8, 2 ** 16)
    before = mapped()
    total = int(tokens.sum())
    assert mapped() > before + 2 ** 25
    shards.forget_pages(tokens)
    assert mapped() < before + 2 ** 24 and int(tokens.sum()) == total
