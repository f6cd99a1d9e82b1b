"""
What generating with LitGPT costs: Pythia-160m, of the same size as GPT-2 124M without embeddings.

    pip install litgpt==0.5.13
    python recipes/peers/lit.py

The model has random weights in bfloat16, and generates one sequence. The last line is JSON. With
--turns=True it measures once for each line on stdin, as bench.py --compare="..." wants it.
"""
import json
import os
import sys
import time

import torch
from litgpt import GPT, Config
from litgpt.generate.base import generate

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from runtime import memory, settings
from runtime.console import ROOT

name = 'pythia-160m'  # of LitGPT's configurations
dtype = 'bfloat16'
max_new_tokens = 100  # after a prompt of 16
turns = False  # measure once for each line on stdin
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

settings.check(config)
torch.manual_seed(1337)
model = GPT(Config.from_name(name)).to(getattr(torch, dtype)).eval()
prompt = torch.randint(model.config.vocab_size, (16,))
model.max_seq_length = len(prompt) + max_new_tokens  # as LitGPT's own scripts set it
model.set_kv_cache(batch_size=1, dtype=getattr(torch, dtype))


def draw():
    """Draws all the tokens."""
    idx = generate(model, prompt, len(prompt) + max_new_tokens, temperature=0.8, top_k=200)
    assert len(idx) == len(prompt) + max_new_tokens


if not turns:
    draw()  # allocates
for _ in sys.stdin if turns else [None]:
    t0 = time.perf_counter()
    draw()
    seconds = time.perf_counter() - t0
    print(json.dumps(dict(what='decode', name=name, dtype=dtype,
                          tokens_per_s=max_new_tokens / seconds,
                          process_memory_bytes=memory.read_process_bytes())), flush=True)
