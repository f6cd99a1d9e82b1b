"""Files that may be anything: what isn't a regular file is never read, and writing is whole."""
import os
import socket

import pytest
from conftest import TINY, expect_error, run_here

from runtime.files import check_file, is_file, replace

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='special files as POSIX has them')


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(path))  # a path of a socket has at most 107 bytes


# what may be in the place of a file, and how it is called
KINDS = {
    'pipe': os.mkfifo, 'folder': os.mkdir, 'socket': make_socket,
    'device': lambda path: os.symlink('/dev/zero', path),
    'link that leads nowhere': lambda path: os.symlink('nowhere', path),
    'link to a link that leads nowhere': lambda path: (os.symlink('nowhere', path + '2'),
                                                       os.symlink(path + '2', path)),
    'symbolic links': lambda path: os.symlink(os.path.basename(path), path)}


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_not_a_regular_file_is_refused(tmp_path, capsys, kind):
    path = str(tmp_path / 'x')
    assert is_file(path) is False and is_file(os.path.join(path, 'y')) is False
    KINDS[kind](path)
    line = expect_error(capsys, is_file, path)
    assert path in line and kind.removeprefix('link to a ') in line
    with pytest.raises(OSError):
        check_file(path)


def test_a_regular_file_and_a_link_to_it(tmp_path):
    (tmp_path / 'x').write_text('x')
    (tmp_path / 'y').symlink_to(tmp_path / 'x')
    assert is_file(tmp_path / 'x') and is_file(tmp_path / 'y')
    check_file(tmp_path / 'y')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['ckpt.pt', 'ckpt_last.pt', 'meta.pkl', 'train.bin', 'val.bin',
                                  'metrics.jsonl', 'config.json', 'tokenizer.json', 'vocab.json',
                                  'model.safetensors', 'model.safetensors.index.json'])
def test_no_script_reads_it(tmp_path, name, kind):
    (tmp_path / 'train.bin').write_bytes(bytes(200))
    (tmp_path / 'val.bin').write_bytes(bytes(200))
    (tmp_path / 'config.json').write_text('{}')
    path = tmp_path / name
    path.unlink(missing_ok=True)
    KINDS[kind](str(path))
    train = ['train.py', *TINY, '--max_iters=1', f'--dataset={tmp_path}']
    commands = [[*train, f'--out_dir={tmp_path / "out"}']]
    if name.startswith('ckpt'):
        commands = [[*train, f'--out_dir={tmp_path}', '--init_from=auto'],
                    [*train, f'--out_dir={tmp_path}', '--init_from=resume', '--eval_only'],
                    ['sample.py', f'--out_dir={tmp_path}'],
                    ['convert.py', f'--out_dir={tmp_path}', f'--hf_dir={tmp_path / "hf"}']]
    elif name == 'metrics.jsonl':
        commands = [[*train, f'--out_dir={tmp_path}'], ['plot.py', f'--runs={tmp_path}']]
    elif 'json' in name or 'safetensors' in name:
        commands = [['sample.py', f'--init_from={tmp_path}']]
    for command in commands:
        err = run_here(*command, ok=None).stderr
        last_line = err.splitlines()[-1]
        assert last_line.startswith('error: ') and 'Traceback' not in err, err
        if name not in ('tokenizer.json', 'vocab.json', 'model.safetensors.index.json'):
            assert name in last_line or 'config.json' in last_line


# -----------------------------------------------------------------------------
def write(path, content):
    with replace(str(path)) as f:
        f.write(content)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / 'x'
    write(path, b'old')
    with pytest.raises(ZeroDivisionError), replace(str(path)) as f:
        f.write(b'half')
        f.flush()
        assert path.read_bytes() == b'old'
        1 / 0
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['x']
    (tmp_path / 'x.tmp').write_bytes(b'of a crash')
    write(path, b'new')
    assert path.read_bytes() == b'new' and os.listdir(tmp_path) == ['x']


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / 'precious').write_bytes(b'precious')
    (tmp_path / 'x.tmp').symlink_to(tmp_path / 'precious')
    write(tmp_path / 'x', b'new')
    assert (tmp_path / 'precious').read_bytes() == b'precious'
    assert not (tmp_path / 'x').is_symlink() and (tmp_path / 'x').read_bytes() == b'new'


def test_a_folder_that_is_renamed_while_a_file_is_written(tmp_path):
    folder, aside = tmp_path / 'folder', tmp_path / 'aside'
    folder.mkdir()
    with pytest.raises(OSError, match='renamed'), replace(str(folder / 'x')) as f:
        f.write(b'first')
        folder.rename(aside)
        folder.mkdir()
        (folder / 'x.tmp').write_bytes(b'of another run')
    assert (folder / 'x.tmp').read_bytes() == b'of another run'
    assert not (folder / 'x').exists() and not (aside / 'x').exists()
