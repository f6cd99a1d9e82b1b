"""
What a GPT-2 of transformers costs, with random weights: training, reading a prompt, generating.

    python recipes/peers/hf.py --what=train --batch_size=4      a training step
    python recipes/peers/hf.py --what=decode --num_samples=10   tokens/s of ten sequences

bench.py --compare=hf starts it. It trains as bench.py does: under autocast, with a fused AdamW. It
generates in bfloat16, with sdpa and its own KV cache. The last line is JSON. With --turns=True it
measures once for each line on stdin. Last run with transformers 5.24.0.
"""
import contextlib
import json
import os
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from runtime import memory, settings
from runtime.console import ROOT, fail
from runtime.machine import synchronize

what = 'decode'  # train | prefill | decode
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
dropout = 0.0
batch_size = 12  # train: sequences per step
num_samples = 1  # prefill and decode: sequences at once
max_new_tokens = 100  # decode: tokens per sequence
all_logits = True  # prefill: the logits of all tokens, as by default, or of the last one
device = 'cpu'
dtype = 'bfloat16'  # of autocast in training
turns = False  # measure once for each line on stdin
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

settings.check(config)
if what not in ('train', 'prefill', 'decode'):
    fail(f'what={what} is not measured here', 'use train, prefill or decode')

torch.manual_seed(1337)
model = GPT2LMHeadModel(GPT2Config(
    vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
    resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, attn_implementation='sdpa',
    bos_token_id=0, eos_token_id=0)).to(device)
prompt_length = min(1000 if what == 'prefill' else 16, block_size - 1)
prompt = torch.randint(vocab_size, (num_samples, prompt_length), device=device)
tokens = {'train': batch_size * block_size, 'prefill': prompt.numel(),
          'decode': num_samples * max_new_tokens}[what]


def prepare_training():
    """A function that does one training step on random tokens."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    ctx = contextlib.nullcontext()
    if dtype != 'float32':
        ctx = torch.autocast(torch.device(device).type, getattr(torch, dtype))

    def step():
        idx = torch.randint(vocab_size, (batch_size, block_size), device=device)
        with ctx:
            loss = model(idx, labels=idx, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


@torch.inference_mode()
def read_prompt():
    """Computes the logits after the prompt, and the KV cache."""
    model(prompt, use_cache=True, logits_to_keep=0 if all_logits else 1)


@torch.inference_mode()
def generate():
    """Draws all the tokens."""
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens,
                   min_new_tokens=max_new_tokens, do_sample=True, temperature=0.8, top_k=200,
                   pad_token_id=0)


if what == 'train':
    model.train()
    work = prepare_training()
else:
    model.eval().to(torch.bfloat16)
    work = read_prompt if what == 'prefill' else generate
if not turns:
    work()  # allocates, and chooses kernels
for _ in sys.stdin if turns else [None]:
    synchronize(device)
    t0 = time.perf_counter()
    work()
    synchronize(device)
    seconds = time.perf_counter() - t0
    print(json.dumps(dict(what=what, ms=1000 * seconds, tokens_per_s=tokens / seconds,
                          process_memory_bytes=memory.read_process_bytes())), flush=True)
