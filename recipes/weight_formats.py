"""
What the formats of sample.py's --weights cost in quality: bits per byte of a checkpoint in each.

    python recipes/weight_formats.py --out_dir=out-python-bpe

Some parts of the val split are read as sampling reads them: half of the context as a prompt, the
other half token by token. The tokens of the second half count. It is for CPUs. The last line is
JSON.
"""
import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import GPT, GPTConfig
from runtime import checkpoint, inference, linears, restore, settings, shards
from runtime.console import ROOT, fail
from runtime.dataset import locate_data
from runtime.kv_cache import CachedModel
from runtime.meta import count_mean_bytes, read_meta

out_dir = 'out'  # folder with the checkpoint
dataset = 'auto'  # its val split is read; auto: the one that the checkpoint was trained on
parts = 200  # parts of the val split, spread over all of it
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

settings.check(config)
state, path = checkpoint.load_best(out_dir)
if dataset == 'auto':
    dataset = state['config']['dataset']
data_dir = locate_data(dataset) or fail(f'the dataset {dataset} is not prepared')
meta = read_meta(data_dir)


@torch.inference_mode()
def measure(weights):
    """(bits per byte, MiB of the linear layers) of the model with this setting of --weights."""
    dtype = torch.float32 if weights == 'float32' else torch.bfloat16
    model = restore.build_model(GPT, GPTConfig, state, path, dtype=dtype).eval()
    T, V = model.config.block_size, model.config.vocab_size
    tokens = shards.open_tokens(data_dir, 'val', T, V, meta)
    inference.pack_linears(model, 1, weights)
    losses = []
    for start in tqdm(np.linspace(0, len(tokens) - T - 1, parts, dtype=int), weights, leave=False):
        ids = torch.from_numpy(tokens[start:start + T + 1].astype(np.int64))[None]
        cached_model = CachedModel(model, T)
        logits = cached_model(ids[:, :T // 2])
        for n in range(T // 2, T):
            losses.append(F.cross_entropy(logits[:, -1].float(), ids[:, n]).item())
            logits = cached_model(ids[:, n:n + 1])
    bits = sum(losses) / len(losses) / math.log(2)
    return bits / count_mean_bytes(tokens[1:], meta), linears.count_bytes(model) / 2 ** 20


rows = {}
for weights in ('float32', 'bfloat16', 'int8', 'int4'):
    bits, size = measure(weights)
    rows[weights] = dict(bits_per_byte=bits, linear_layers_mib=size)
    change = bits - rows['float32']['bits_per_byte']
    print(f'{weights:10} {bits:.4f} bits per byte ({change:+.4f}), linear layers {size:.2f} MiB')
print(json.dumps(dict(out_dir=out_dir, dataset=dataset, parts=parts, formats=rows)))
