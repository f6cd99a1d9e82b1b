"""The memory that sampling and scoring take, beside that of the weights."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
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
