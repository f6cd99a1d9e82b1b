"""torch.compile is announced, its time is shown, and a model that it can't compile still runs."""
import io
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch._inductor.graph
from conftest import ROOT, TINY, metrics, run

from model import GPT, GPTConfig
from runtime import compiler, distributed, inference, kernels


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'inductor'))
    stopwatch = compiler.stopwatch
    monkeypatch.setattr(stopwatch, 'has_failed', False)
    monkeypatch.setattr(stopwatch, 'count', 0)
    yield
    torch._dynamo.reset()


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32))


def train(model, called_model):
    """The losses of three updates."""
    idx = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        _, loss = called_model(idx, idx)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        losses.append(loss.item())
    return losses


def break_forward(monkeypatch):
    def run(self, *args):
        raise ValueError('no such kernel\nand more lines')
    monkeypatch.setattr('torch._inductor.graph.GraphLowering.run', run)


def break_backward(monkeypatch):
    run = torch._inductor.graph.GraphLowering.run

    def run_forward(self, *args):
        if self.is_backward:
            raise ValueError('no such kernel')
        return run(self, *args)
    monkeypatch.setattr('torch._inductor.graph.GraphLowering.run', run_forward)


def break_tracing(monkeypatch):
    def call_function(self, *args):
        raise AssertionError('no such kernel')
    name = 'torch._dynamo.variables.torch.TorchInGraphFunctionVariable.call_function'
    monkeypatch.setattr(name, call_function)


def break_torch_compile(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError('no such kernel')
    monkeypatch.setattr(torch, 'compile', refuse)


BREAKS = [break_forward, break_backward, break_tracing, break_torch_compile]


@pytest.mark.parametrize('break_compiler', BREAKS)
def test_a_model_that_cannot_be_compiled_runs_as_it_is(monkeypatch, capsys, break_compiler):
    plain, model = make_model(), make_model()
    expected = train(plain, plain)
    break_compiler(monkeypatch)
    compiled = kernels.compile_model(model)
    assert train(model, compiled) == expected
    model.eval()
    compiled.eval()(torch.zeros(1, 1, dtype=torch.long))
    warnings = [line for line in capsys.readouterr().err.splitlines() if 'warning' in line]
    assert len(warnings) == 1 and re.fullmatch(
        r'warning: torch.compile failed \(\w+Error: no such kernel\), so the model runs without '
        'it, more slowly', warnings[0])


@pytest.mark.parametrize('break_compiler', BREAKS[::3])
def test_sampling_and_sharded_layers_fall_back_too(monkeypatch, capsys, break_compiler):
    model, idx = make_model().eval(), torch.zeros(1, 3, dtype=torch.long)
    expected = model.generate(idx, 10, temperature=0)
    break_compiler(monkeypatch)
    inference.compile_forward(model)
    assert torch.equal(model.generate(idx, 10, temperature=0), expected)
    for block in model.transformer.h:  # as distributed.shard_model does
        distributed.compiler.compile_in_place(block.attn)
    assert torch.equal(model.generate(idx, 10, temperature=0), expected)
    assert capsys.readouterr().err.count('torch.compile failed') == 1


def test_a_mistake_in_the_model_is_not_hidden(capsys):
    model = make_model()
    compiled = torch.compile(model, backend='eager')
    compiled.forward = compiler.fall_back(compiled.forward, model)
    compiler.watch_compiler()
    for _ in range(2):
        with pytest.raises(AssertionError, match='block_size'):
            compiled(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(RuntimeError, match='indices'):
        compiled(torch.zeros(1, 3))
    assert 'warning' not in capsys.readouterr().err and not compiler.stopwatch.has_failed


def test_an_error_of_a_compiled_model_is_not_hidden(capsys):
    def call(x):
        raise KeyError(x)
    with pytest.raises(KeyError):
        compiler.fall_back(call, None)(3)
    assert not capsys.readouterr().err


def test_memory_that_runs_out_is_not_a_failure_of_the_compiler(capsys):
    def call():
        compiler.stopwatch.count += 1
        raise torch.OutOfMemoryError('out of memory')
    with pytest.raises(torch.OutOfMemoryError):
        compiler.fall_back(call, None)()
    assert not capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('stream', [Terminal(), io.StringIO()])
def test_the_time_is_shown_on_a_terminal(monkeypatch, stream):
    monkeypatch.setattr('sys.stderr', stream)
    monkeypatch.setattr(compiler, 'LONG_SECONDS', 0.01)
    shows = []
    monkeypatch.setattr(compiler.tqdm, 'set_description_str',
                        lambda self, text: shows.append((self.disable, text)))

    def backend(graph, inputs):  # it compiles until the time was shown
        end = time.monotonic() + 30
        while not shows and time.monotonic() < end:
            time.sleep(0.01)
        return graph.forward

    model = make_model()
    compiler.watch_compiler()
    torch.compile(model, backend=backend)(torch.zeros(1, 4, dtype=torch.long))
    text = stream.getvalue()
    assert text.startswith('compiling the model, which takes about a minute\n')
    assert re.search(r'compiling took \d+ s\n', text) and text.count('compiling the model') == 1
    assert shows[0][0] != stream.isatty() and re.fullmatch(r'compiling: \d+ s', shows[0][1])


def test_a_run_without_a_compiler(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=5', '--compile=True', '--eval_iters=1']
    env = {**os.environ, 'CXX': 'no-such-compiler', 'OMP_NUM_THREADS': '1'}
    out = subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), *args,
                          f'--out_dir={tmp_path / "run"}'], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    lines = out.stderr.splitlines()
    assert 'compiling the model, which takes about a minute' in lines
    warnings = [line for line in lines if line.startswith('warning')]
    assert len(warnings) == 1 and 'C++ compiler' in warnings[0] and 'Traceback' not in out.stderr
    run('train.py', *args, '--compile=False', f'--out_dir={tmp_path / "plain"}')
    losses = [[event['loss'] for event in metrics(tmp_path / name, 'iter')]
              for name in ('run', 'plain')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5


@pytest.mark.parametrize('flags', [[], ['--optim=muon', '--dropout=0.1'],
                                   ['--moments_dtype=bfloat16', '--parallel=zero1']])
def test_training_without_compiling_does_not_import_the_compiler(flags, char_data, tmp_path):
    """The import takes most of a second."""
    command = [sys.executable, '-X', 'importtime', os.path.join(ROOT, 'train.py'), *TINY, *flags,
               f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=2']
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert 'torch.optim' in modules and 'torch._dynamo' not in modules
