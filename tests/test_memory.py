"""The memory that sampling, scoring, training in parts and reading data take."""
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import save_file

from convert import TRANSPOSED
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux, where a process can ask for its peak')

# what a process takes at most beyond what it does with all imported
PEAK = """if True:
    import json, runpy, sys
    import safetensors, torch, checkpoint, convert, tokenizer
    from model import GPT
    def memory(key):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
    empty = memory('VmRSS')
    if sys.argv[1:] == ['score']:
        model = GPT.from_pretrained('gpt', dtype=torch.bfloat16).eval()
        idx = torch.randint(50257, (1, 1025))
        with torch.no_grad():
            assert model(idx[:, :-1], idx[:, 1:], return_logits=False)[1] > 0
    else:
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name='__main__')
    print(json.dumps(memory('VmHWM') - empty))
"""


@pytest.fixture(scope='module', params=[(12, 12, 768), pytest.param((48, 25, 1600), marks=pytest.mark.slow)], ids=['gpt2', 'gpt2-xl'])
def shape(request, tmp_path_factory):
    """A folder with a GPT of this shape, as transformers saves it, and its configuration."""
    folder, (n_layer, n_head, n_embd) = tmp_path_factory.mktemp('shape'), request.param
    config = GPTConfig(1024, 50257, n_layer, n_head, n_embd)
    (folder / 'gpt').mkdir()
    save_file({name: torch.zeros(w.shape[::-1] if name.endswith(TRANSPOSED) else w.shape, dtype=torch.bfloat16)
               for name, w in GPT.on_meta(config).state_dict().items() if name != 'lm_head.weight'}, folder / 'gpt' / 'model.safetensors')
    (folder / 'gpt' / 'config.json').write_text(json.dumps(dict(model_type='gpt2', n_positions=1024, vocab_size=50257, n_layer=n_layer, n_head=n_head,
                                                                n_embd=n_embd)))
    return folder, config


def peak(folder, *args):
    done = subprocess.run([sys.executable, '-c', PEAK, *args], cwd=folder, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ROOT})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def weights(config):
    return 2 * GPT.on_meta(config).get_num_params(non_embedding=False)


@pytest.mark.slow
def test_scoring_takes_little_beside_the_weights(shape):
    folder, config = shape
    assert peak(folder, 'score') < weights(config) + 300e6  # a third of the logits at a time, and the activations


def test_sampling_takes_little_beside_the_weights(bpe, shape):
    folder, config = shape
    tokens = 500 if config.n_layer == 48 else 50
    command = [os.path.join(ROOT, 'sample.py'), '--init_from=gpt', '--dtype=bfloat16', f'--max_new_tokens={tokens}']
    cache = 2 * 2 * config.n_layer * config.n_embd * (tokens + 1)
    packed = 2 * config.vocab_size * config.n_embd  # the output layer has a copy of its own
    one, three = (peak(folder, *command, f'--num_samples={rows}') for rows in (1, 3))
    assert one < weights(config) + packed + cache + 100e6
    assert three - one < 2 * cache + 20e6
    if config.n_layer == 48:
        assert one < 1.15 * weights(config)


@pytest.mark.slow
def test_fsdp_holds_its_part():
    peaks = {}
    for dtype in ('float32', 'bfloat16'):
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', os.path.join(ROOT, 'recipes', 'memory.py'),
                   '--parallel=fsdp', '--n_layer=24', '--n_head=8', '--n_embd=512', '--vocab_size=512', f'--dtype={dtype}']
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr
        lines = done.stdout.strip().splitlines()
        assert len(lines) == 2
        for m in map(json.loads, lines):
            part = m['parameters'] * 4 / 2 ** 20 / 2
            assert (m['weights'], m['gradients'], m['moments']) == pytest.approx((part, part, 2 * part), rel=0.01)
            peaks[dtype] = max(m['training_peak'], peaks.get(dtype, 0))
    assert peaks['bfloat16'] < 1.05 * peaks['float32']  # a copy of each layer that autocast kept would add 144 MiB, 0.2 of it


def test_data_larger_than_what_is_kept(tmp_path):
    with open(tmp_path / 'train.bin', 'wb') as f:
        f.truncate(2 ** 30)  # zeros without room on the disk
    np.zeros(2 ** 16, np.uint16).tofile(tmp_path / 'val.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 64}))
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *TINY, f'--dataset={tmp_path}', f'--out_dir={tmp_path / "out"}', '--n_embd=8', '--n_layer=1',
               '--batch_size=480', '--eval_interval=80']
    taken = []  # at most, by a run of nothing, and by one that reads 480 windows, and some more around each, an iteration: they would be 300 MB
    for flags in (['--max_iters=0', '--eval_iters=1'], ['--max_iters=80', '--eval_iters=80']):
        with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        taken.append(used.ru_maxrss / 1024)
    assert taken[1] - taken[0] < 200
