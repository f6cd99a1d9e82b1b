"""The memory that sampling, scoring, sharded training and reading data take, and what a user is
told about it."""
import json
import math
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import save_file

from model import GPTConfig
from runtime import huggingface, memory

linux = pytest.mark.skipif(not os.path.exists('/proc/self/status'),
                           reason='needs Linux, where a process can ask for its peak')

# prints the peak of a process's memory, without what it has when everything is imported
PEAK = """if True:
    import json, runpy, sys
    import safetensors, torch, tqdm
    from model import GPT
    from runtime import checkpoint, huggingface, inference, kernels, machine, restore, settings
    from runtime import tokenizer
    def memory(key):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
    empty = memory('VmRSS')
    if sys.argv[1:] == ['score']:
        model = restore.load_pretrained(GPT, 'gpt', dtype=torch.bfloat16).eval()
        kernels.accelerate(model, 'cpu', 'bfloat16')
        idx = torch.randint(50257, (1, 1025))
        with torch.no_grad():
            with kernels.loss_only(model):
                assert model(idx[:, :-1], idx[:, 1:])[1] > 0
    else:
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name='__main__')
    print(json.dumps(memory('VmHWM') - empty))
"""


@pytest.fixture(scope='module', ids=['gpt2', 'gpt2-xl'], params=[
    (12, 12, 768), pytest.param((48, 25, 1600), marks=pytest.mark.slow)])
def shape(request, tmp_path_factory):
    """A folder with a GPT of this shape, as transformers saves it, and its configuration."""
    folder = tmp_path_factory.mktemp('shape')
    config = GPTConfig(1024, 50257, *request.param)
    (folder / 'gpt').mkdir()
    tensors = {}
    for name, (size, transposed) in huggingface.list_tensors(vars(config)).items():
        size = size[::-1] if transposed else size
        tensors[name] = torch.zeros(size, dtype=torch.bfloat16)
    save_file(tensors, folder / 'gpt' / 'model.safetensors')
    hf_config = dict(model_type='gpt2', n_positions=1024, vocab_size=50257, n_layer=config.n_layer,
                     n_head=config.n_head, n_embd=config.n_embd)
    (folder / 'gpt' / 'config.json').write_text(json.dumps(hf_config))
    return folder, config


def measure_peak(folder, *args):
    done = subprocess.run([sys.executable, '-c', PEAK, *args], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': ROOT})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def weight_bytes(config):
    """The bytes of the weights in bfloat16."""
    tensors = huggingface.list_tensors(vars(config))
    return 2 * sum(math.prod(size) for size, _ in tensors.values())


@linux
@pytest.mark.slow
def test_scoring_takes_little_more_than_the_weights(shape):
    folder, config = shape
    # a third of the logits at a time, and the activations
    assert measure_peak(folder, 'score') < weight_bytes(config) + 300e6


@linux
def test_sampling_takes_little_more_than_the_weights(bpe, shape):
    folder, config = shape
    weights = weight_bytes(config)
    tokens = 500 if config.n_layer == 48 else 50
    command = [os.path.join(ROOT, 'sample.py'), '--init_from=gpt', '--dtype=bfloat16',
               f'--max_new_tokens={tokens}']
    cache = 2 * 4 * config.n_layer * config.n_embd * (tokens + 1)  # in float32
    packed = 2 * config.vocab_size * config.n_embd  # the output layer has its own copy
    one, three = (measure_peak(folder, *command, f'--num_samples={rows}') for rows in (1, 3))
    assert one < weights + packed + cache + 100e6
    assert three - one < 2 * cache + 20e6
    if config.n_layer == 48:
        assert one < 1.2 * weights


def measure_sizes(folder, *flags):
    """(bytes, peak of bytes) of sample.py's process when it asks for a prompt."""
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), '--init_from=gpt', '--interactive',
               '--device=cpu', '--dtype=bfloat16', *flags]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.read(2) == '> '
        with open(f'/proc/{process.pid}/status') as f:
            status = dict(line.split(':', 1) for line in f)
        process.stdin.close()
    return [1024 * int(status[key].split()[0]) for key in ('VmRSS', 'VmHWM')]


@linux
def test_memory_of_weights_of_4_bits(bpe, shape):
    folder, config = shape
    weights, embeddings = weight_bytes(config), 2 * config.vocab_size * config.n_embd
    num_bytes, _ = measure_sizes(folder)
    num_bytes_4, peak_4 = measure_sizes(folder, '--weights=int4')
    # 16 bits become 4 and those of a scale and an offset for 32 weights; the output layer has 8,
    # instead of 16, and the embedding stays
    saved_bytes = (weights - embeddings) * (1 - 5 / 16) + embeddings / 2
    assert num_bytes_4 < num_bytes - 0.9 * saved_bytes
    assert peak_4 < weights + 2 * embeddings + 350e6  # copies of the output layer, and torch itself
    if config.n_layer == 48:
        assert num_bytes_4 < 1.7e9 and peak_4 < 1.2 * weights


@linux
@pytest.mark.slow
def test_each_rank_of_fsdp_has_its_share():
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               os.path.join(ROOT, 'recipes', 'memory.py'), '--parallel=fsdp', '--n_layer=24',
               '--n_head=8', '--n_embd=512', '--vocab_size=512']
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    peaks = {}
    for dtype in ('float32', 'bfloat16'):
        done = subprocess.run([*command, f'--dtype={dtype}'], capture_output=True, text=True,
                              env=env)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.strip().splitlines()
        assert len(lines) == 2
        for m in map(json.loads, lines):
            share = m['parameters'] * 4 / 2 ** 20 / 2
            measured = m['weights'], m['gradients'], m['moments']
            assert measured == pytest.approx((share, share, 2 * share), rel=0.01)
            peaks[dtype] = max(m['training_peak'], peaks.get(dtype, 0))
    # if autocast kept a copy of each layer, that would add 144 MiB, 0.2 of it
    assert peaks['bfloat16'] < 1.05 * peaks['float32']


@linux
def test_data_that_was_read_does_not_stay_in_memory(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as f:
        f.truncate(2 ** 30)  # zeros that take no room on the disk
    np.zeros(2 ** 16, np.uint16).tofile(tmp_path / 'val.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 64}))
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, f'--dataset={tmp_path}',
               f'--out_dir={tmp_path / "out"}', '--n_embd=8', '--n_layer=1', '--batch_size=480',
               '--eval_interval=80']
    # the peaks of a run that reads almost nothing, and of one that reads 480 windows, and some
    # pages around each, per iteration. They would be 300 MB
    peaks = []
    for flags in (['--max_iters=0', '--eval_iters=1'], ['--max_iters=80', '--eval_iters=80']):
        with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(used.ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 200


# -----------------------------------------------------------------------------
# what a user is told
def test_out_of_memory_names_pairs_that_keep_the_batch(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--out_dir=run', '--max_iters=1',
            '--batch_size=12288', '--block_size=256', '--n_embd=1024']
    out = subprocess.run(['sh', '-c', 'ulimit -v 8000000; exec "$@"', 'sh', sys.executable,
                          os.path.join(ROOT, 'train.py'), *args],
                         cwd=tmp_path, capture_output=True, text=True)
    last = out.stderr.splitlines()[-1]
    assert out.returncode == 1 and 'Traceback' not in out.stderr, out.stderr
    assert re.match(r'error: out of memory on cpu: [\d.]+ GiB asked for, [\d.]+ GiB free; '
                    r'for the same 6,291,456 tokens/iter use '
                    r'--batch_size=6144 --gradient_accumulation_steps=4 or '
                    r'--batch_size=4096 --gradient_accumulation_steps=6$', last), last


def test_a_run_that_may_not_fit_gets_a_warning(capsys):
    memory.plan_memory(2 ** 50, 2 ** 50, allocated_bytes=2 ** 50, device='cpu', ranks=1)
    assert 'that may not fit' in capsys.readouterr().err
    memory.plan_memory(2 ** 50, 2 ** 20, allocated_bytes=2 ** 50, device='cpu', ranks=1)
    assert not capsys.readouterr().err
