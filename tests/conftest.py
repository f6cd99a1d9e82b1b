"""What the tests share: running the scripts as a user does, small data, and the inputs that the environment may provide."""
import ast
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, 'tests', 'golden')
sys.path.insert(0, ROOT)
os.environ.update(HF_HUB_OFFLINE='1', WANDB_MODE='offline', WANDB_SILENT='true', PYTHONPATH=ROOT, PYTHONIOENCODING='utf-8')

# a model that trains in a moment
TINY = ['--device=cpu', '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--gradient_accumulation_steps=2', '--eval_iters=4', '--warmup_iters=0', '--lr_decay_iters=100', '--learning_rate=3e-3']


def run(*command, ok=True, cwd=ROOT, **env):
    """Runs a script of the repository as a process of its own; its stdout and stderr come back as text."""
    command = [os.path.join(ROOT, command[0]), *command[1:]]
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **env}, capture_output=True,
                            text=True, encoding='utf-8', timeout=300)
    return judged(result, ok)


def judged(result, ok):
    if ok:
        assert not result.returncode, result.stdout + result.stderr
    elif ok is not None:  # a user's mistake: one line, status 1, no traceback
        assert result.returncode == 1 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result.stderr
    return result


def run_here(script, *args, ok=True, cwd=ROOT):
    """run(), within this process: the same script from its first line to its last, without torch's import each time."""
    out, err = io.StringIO(), io.StringIO()
    argv, here = sys.argv, os.getcwd()
    sys.argv = [os.path.join(ROOT, script), *map(str, args)]
    os.chdir(cwd)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        os.chdir(here)
    return judged(subprocess.CompletedProcess([script, *args], code, out.getvalue(), err.getvalue()), ok)


def torchrun(processes, *command, cwd=ROOT, **env):
    """Runs a script of the repository in that many processes of one machine."""
    result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                             os.path.join(ROOT, command[0]), *map(str, command[1:])],
                            cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, encoding='utf-8', timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def functions_of(script, *names, **space):
    """Functions out of a script's source, with `space` for its globals: a script can't be imported."""
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        body = [node for node in ast.parse(f.read()).body if isinstance(node, ast.FunctionDef) and node.name in names]
    exec(compile(ast.Module(body, []), script, 'exec'), space)
    return [space[name] for name in names]


def metrics(out_dir, event):
    """The events of one kind in a run's metrics.jsonl."""
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        return [e for e in map(json.loads, f) if e['event'] == event]


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')


@pytest.fixture(scope='session')
def golden():
    with open(os.path.join(GOLDEN, 'nanogpt.json'), encoding='utf-8') as f:
        return json.load(f)


@pytest.fixture(scope='session')
def golden_data():
    with open(os.path.join(GOLDEN, 'data.json'), encoding='utf-8') as f:
        return json.load(f)


@pytest.fixture(scope='session')
def shakespeare():
    path = os.environ.get('TINYSHAKESPEARE', '')
    if not os.path.isfile(path):
        pytest.skip('set TINYSHAKESPEARE to a copy of tiny Shakespeare, input.txt')
    return path


@pytest.fixture(scope='session')
def bpe():
    if not os.path.isdir(os.environ.get('TIKTOKEN_CACHE_DIR', '')):
        pytest.skip("set TIKTOKEN_CACHE_DIR to a tiktoken cache with GPT-2's BPE")


@pytest.fixture(scope='session')
def char_data(tmp_path_factory):
    """A dataset by characters that is quickly learned: counting, over and over."""
    folder = tmp_path_factory.mktemp('data')
    text = folder / 'numbers.txt'
    text.write_text(''.join(f'{n} and {n + 1} make {2 * n + 1}.\n' for n in range(1000)), encoding='utf-8')
    run('data/text/prepare.py', f'--input={text}', f'--out_dir={folder / "numbers"}')
    return str(folder / 'numbers')


@pytest.fixture(scope='session')
def trained(char_data, tmp_path_factory):
    """The out_dir of a short run on char_data."""
    out_dir = str(tmp_path_factory.mktemp('trained'))
    run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=60', '--eval_interval=30')
    return out_dir
