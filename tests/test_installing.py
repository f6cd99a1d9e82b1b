"""Where the project is installed and started: packages, threads, notebooks, folders."""
import ast
import glob
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading

import nbclient
import nbformat
import pytest
from conftest import ROOT, TINY, metrics

from runtime import run_dir


def read_requirements(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        lines = [line.strip() for line in f]
    return [line for line in lines if line and not line.startswith(('#', '-r'))]


def read_project():
    tomllib = pytest.importorskip('tomllib', reason='Python 3.11 has it')
    with open(os.path.join(ROOT, 'pyproject.toml'), 'rb') as f:
        return tomllib.load(f)


def test_pip_and_uv_install_the_same_packages():
    project = read_project()
    assert project['project']['dependencies'] == read_requirements('requirements.txt')
    assert project['dependency-groups']['dev'] == read_requirements('requirements-dev.txt')
    assert project['tool']['uv']['package'] is False  # there is nothing to build


def list_imports(path):
    """The packages that a file imports."""
    with open(path, encoding='utf-8') as f:
        nodes = list(ast.walk(ast.parse(f.read())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split('.')[0] for name in names}


def test_what_the_code_imports_is_installed():
    """Every package that a script or a module imports is named, or comes with one that is."""
    named = {re.split(r'[=<>]', line)[0] for line in read_requirements('requirements.txt')}
    assert {'transformers', 'datasets'} <= named
    brought = {'safetensors', 'tokenizers', 'huggingface_hub', 'pyarrow'}  # by these two
    patterns = ('*.py', 'runtime/*.py', 'data/*.py', 'data/*/*.py')
    paths = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern))]
    ours = {os.path.basename(path).removesuffix('.py') for path in paths} | {'runtime'}
    imported = set().union(*map(list_imports, paths))
    assert imported - ours - sys.stdlib_module_names <= named | brought


# -----------------------------------------------------------------------------
@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # exit status 0
def test_training_in_a_thread(char_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', *TINY, f'--dataset={char_data}', '--max_iters=2',
                                      f'--out_dir={tmp_path / "out"}'])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=runpy.run_path, args=(os.path.join(ROOT, 'train.py'),))
    thread.start()
    thread.join()
    assert metrics(tmp_path / 'out', 'eval')[-1]['iter'] == 2
    assert os.path.exists(tmp_path / 'out' / 'ckpt.pt')
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_thread_that_has_ended_leaves_its_folder_to_the_next_one(tmp_path):
    runs = []
    for _ in range(2):
        # the run is still open when the thread ends, as after an error
        thread = threading.Thread(target=lambda: runs.append(run_dir.RunDir(str(tmp_path))))
        thread.start()
        thread.join()
    assert len(runs) == 2
    run_dir.RunDir(str(tmp_path)).close()


def test_two_runs_in_one_notebook(char_data, tmp_path):
    command = f'%run {ROOT}/train.py {" ".join(TINY)} --dataset={char_data} --out_dir=out'
    cells = [f'{command} --max_iters=2', f'{command} --max_iters=4 --init_from=resume',
             f'%run {ROOT}/sample.py --out_dir=out --num_samples=1 --max_new_tokens=5 --start=1']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name='python3',
                                     resources={'metadata': {'path': str(tmp_path)}})
    client.execute()  # an error in a cell raises
    texts = [''.join(out.get('text', '') for out in cell.outputs) for cell in notebook.cells]
    assert 'after 2 iterations' in texts[0] and 'resumed from out/ckpt.pt' in texts[1]
    assert 'after 4 iterations' in texts[1] and '-' * 15 in texts[2]


def test_the_commit_is_this_repositorys_or_none(tmp_path, monkeypatch):
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=x', '-c', 'user.email=x@x']
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'x'], check=True)
    head = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout
    monkeypatch.setattr(run_dir, 'ROOT', str(tmp_path))
    assert run_dir.read_commit() == head.strip() and len(head) > 39
    (tmp_path / 'copy').mkdir()  # of the project, in somebody else's repository
    monkeypatch.setattr(run_dir, 'ROOT', str(tmp_path / 'copy'))
    assert run_dir.read_commit() == ''


def can_mount():
    command = ['unshare', '--map-root-user', '--mount', 'true']
    return shutil.which('unshare') and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not can_mount(), reason='needs unshare to make a folder read-only')
@pytest.mark.parametrize('script, args', [
    ('text', '--input=README.md --name=x'), ('python_char', '--max_bytes=300000'),
    ('python_bpe', '--max_bytes=300000'),
    ('shakespeare_char', ''), ('shakespeare_char', '--input=README.md'),
    ('fineweb_edu', '--input=README.md')])
def test_a_checkout_that_is_only_for_reading(tmp_path, script, args):
    prepare = f'{sys.executable} data/{script}/prepare.py {args}'
    mount = f'mount --bind {ROOT} {ROOT} && mount -o remount,bind,ro {ROOT}'
    shell = f'{mount} && cd {ROOT} && {prepare}'
    out = subprocess.run(['unshare', '--map-root-user', '--mount', 'sh', '-c', shell],
                         capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.count('\n') == 1, out.stderr
    assert 'Read-only file system' in out.stderr and '--out_dir' in out.stderr
