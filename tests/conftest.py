"""What the tests share: running the scripts as a user does, and small data."""
import ast
import contextlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, 'tests', 'golden')
sys.path.insert(0, ROOT)
from runtime import checkpoint, console

os.environ.update(HF_HUB_OFFLINE='1', WANDB_MODE='offline', WANDB_SILENT='true', PYTHONPATH=ROOT,
                  PYTHONIOENCODING='utf-8')

# a model that trains in a moment
TINY = ['--device=cpu', '--dtype=float32', '--n_layer=2', '--n_head=2', '--n_embd=32',
        '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=4',
        '--warmup_iters=0', '--lr_decay_iters=100', '--learning_rate=3e-3']

# all that config/train_shakespeare_char_fast.py turns on; 60 rows are too few for all pairs
FAST = ['--rope_base=100', '--qk_norm=True', '--relu2=True', '--tied=False', '--bigrams=60',
        '--embd_conv=2', '--optim=muon', '--lr_schedule=wsd', '--data_order=epochs']


# prints the peak of this process's memory in KiB, on Linux. ru_maxrss would be at least that of the
# process that started this one
PRINT_PEAK = """
with open('/proc/self/status') as f:
    print(next(line.split()[1] for line in f if line.startswith('VmHWM')))
"""

# starts scripts. Most of a short run is the import of torch, so a server imports it once, and each
# run is a fork of the server. The server must never compute anything: the threads that computing
# starts don't survive a fork
SERVER = """
import json, os, runpy, sys
import matplotlib.figure, numpy, torch, torch._dynamo, torch.distributed, torch.nn.parallel
import matplotlib.backends.backend_agg
for job in map(json.loads, sys.stdin):
    if 'wait' in job:
        pid, status = os.waitpid(job['wait'], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else 'null', flush=True)
        continue
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
else:
    os._exit(0)
os.chdir(job['cwd'])
os.environ.clear()
os.environ.update(job['env'])
for number, path in enumerate(('/dev/null', job['out'], job['err'])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
sys.argv = job['argv']
if 'OMP_NUM_THREADS' in os.environ:  # too late for OpenMP to read
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""


class Process:
    """A script of the repository as its own process, with the interface of subprocess.Popen."""
    server = None

    def __init__(self, *command, cwd=ROOT, **env):
        if not Process.server:
            Process.server = subprocess.Popen([sys.executable, '-c', SERVER], text=True,
                                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.returncode = None
        self.folder = tempfile.TemporaryDirectory()
        self.pid = self.ask(argv=[os.path.join(ROOT, command[0]), *map(str, command[1:])],
                            cwd=str(cwd), env={**os.environ, **env},
                            out=os.path.join(self.folder.name, 'out'),
                            err=os.path.join(self.folder.name, 'err'))

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + '\n')
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def poll(self):
        if self.returncode is None:
            self.returncode = self.ask(wait=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout, *self.read_output())
            time.sleep(0.01)
        return self.returncode

    def read_output(self):
        """stdout and stderr so far."""
        texts = []
        for name in ('out', 'err'):
            path = os.path.join(self.folder.name, name)
            with open(path, encoding='utf-8', newline='') as f:
                texts.append(f.read())
        return texts

    def communicate(self, timeout=300):
        """Waits for the end. stdout and stderr, without the note that the machine is busy."""
        self.wait(timeout)
        out, err = self.read_output()
        return out, re.sub(r'^the threads waited for a CPU .*\n', '', err, flags=re.MULTILINE)

    def send_signal(self, number):
        os.kill(self.pid, number)


def run(*command, ok=True, cwd=ROOT, **env):
    """Runs a script of the repository as its own process; returns its stdout and stderr as text."""
    process = Process(*command, cwd=cwd, **env)
    out, err = process.communicate()
    return check_result(subprocess.CompletedProcess(command, process.returncode, out, err), ok)


def start_ranks(processes, *command, cwd=ROOT, threads=1, last_args=()):
    """Starts a script in that many processes, with the variables that torchrun sets for them.

    last_args are arguments that only the last rank gets.
    """
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])
    commands = [command] * (processes - 1) + [(*command, *last_args)]
    return [Process(*commands[rank], cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(processes), MASTER_ADDR='localhost', MASTER_PORT=port,
                    OMP_NUM_THREADS=str(threads)) for rank in range(processes)]


def run_ranks(processes, *command, cwd=ROOT, threads=1):
    """Runs a script in that many processes; returns the stdout of each."""
    ranks = start_ranks(processes, *command, cwd=cwd, threads=threads)
    outputs = [rank.communicate() for rank in ranks]
    assert not any(rank.returncode for rank in ranks), outputs
    return [out for out, _ in outputs]


def check_result(result, ok):
    """The result, after a check: ok=True: status 0; ok=False: a mistake in one line; None: any."""
    if ok:
        assert not result.returncode, result.stdout + result.stderr
    elif ok is not None:  # a user's mistake: one line, status 1, no traceback
        one_line = result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
        assert result.returncode == 1 and one_line, result.stderr
    return result


def expect_error(capsys, function, *args):
    """Calls a function that must end in one line with status 1; returns that line."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.startswith('error: ') and line.count('\n') == 1
    return line


def run_here(script, *args, ok=True, cwd=ROOT):
    """run() within this process: all of the script, without torch's import each time."""
    out, err = io.StringIO(), io.StringIO()
    argv, folder = sys.argv, os.getcwd()
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
        os.chdir(folder)
        torch.set_flush_denormal(False)  # train.py sets it; hypothesis refuses to work with it
    result = subprocess.CompletedProcess([script, *args], code, out.getvalue(), err.getvalue())
    return check_result(result, ok)


def torchrun(processes, *command, cwd=ROOT, **env):
    """Runs a script of the repository by torchrun, in that many processes of one machine."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={processes}']
    result = subprocess.run([*launcher, os.path.join(ROOT, command[0]), *map(str, command[1:])],
                            cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True,
                            encoding='utf-8', timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def list_files(folder):
    """The names in a run's folder, except for its lock and its picture."""
    return sorted(name for name in os.listdir(folder) if name not in ('.lock', 'loss.png'))


def equal_states(a, b):
    """Whether two checkpoint files have the same weights, optimizer state and iteration."""
    a, b = (checkpoint.load(str(path)) for path in (a, b))
    tensors = []
    for state in (a, b):
        moments = {(i, key): value for i, entry in state['optimizer']['state'].items()
                   for key, value in entry.items()}
        tensors.append({**state['model'], **moments})
    kinds = [tuple(entry) for entry in b['optimizer']['state'].values()]
    # AdamW's three values, or Muon's one
    assert kinds and all(len(kind) == 3 or kind == ('momentum_buffer',) for kind in kinds)
    return (a['iter_num'] == b['iter_num'] and tensors[0].keys() == tensors[1].keys()
            and all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items()))


def functions_of(script, *names, **space):
    """Functions from a script's source with `space` as globals: a script can't be imported."""
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    exec(compile(ast.Module(body, []), script, 'exec'), space)
    return [space[name] for name in names]


def metrics(out_dir, event):
    """The events of one kind in a run's metrics.jsonl, without a line that a kill cut off."""
    events = []
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        for line in f:
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return [e for e in events if e['event'] == event]


def wait_until(condition, process):
    """Waits until condition() is true; fails if the process ends before."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.read_output()
        time.sleep(0.005)


def has_iterations(out_dir, n):
    """A condition: the run in out_dir has logged so many iterations."""
    def condition():
        try:
            return len(metrics(out_dir, 'iter')) >= n
        except OSError:  # the file isn't there yet
            return False
    return condition


def pytest_addoption(parser):
    parser.addoption('--device', default='cuda', help='where the tests marked gpu run')


def pytest_runtest_setup(item):
    device_type = torch.device(item.config.getoption('--device')).type
    needs_cuda = item.get_closest_marker('gpu') and device_type == 'cuda'
    if needs_cuda and not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')


@pytest.fixture(autouse=True)
def forget_the_last_act():
    """A script that an error has ended in this process must not save its state in another test."""
    yield
    console.act_before_errors(None)


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
    """A dataset of characters that is learned quickly: counting, over and over."""
    folder = tmp_path_factory.mktemp('data')
    text = folder / 'numbers.txt'
    lines = (f'{n} and {n + 1} make {2 * n + 1}.\n' for n in range(1000))
    text.write_text(''.join(lines), encoding='utf-8')
    run('data/text/prepare.py', f'--input={text}', f'--out_dir={folder / "numbers"}')
    return str(folder / 'numbers')


@pytest.fixture(scope='session')
def trained(char_data, tmp_path_factory):
    """The out_dir of a short run on char_data."""
    out_dir = str(tmp_path_factory.mktemp('trained'))
    run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={out_dir}', '--max_iters=60',
        '--eval_interval=30')
    return out_dir


@pytest.fixture
def two_threads():
    """Two threads, so that a batch has two parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
