"""
What each rank holds while a model is trained, measured, in MiB: its part of the weights, gradients and AdamW's moments,
together "held"; its process beyond the empty one, at most in two updates (training_peak) and after them (after); and what
saving adds to that.

    export MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1
    torchrun --nproc_per_node=4 recipes/memory.py --parallel=fsdp --n_layer=24 --n_head=16 --n_embd=1024

Prints a line of JSON for each rank. On Linux; on a CPU the process's memory is the device's (the first variable has what
is freed leave the process, or its peak would show what the C library keeps).
"""
import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import distributed
from checks import fail
from model import GPT, GPTConfig

# the model, and how it is trained
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
batch_size = 1  # sequences a rank
tokens = 64  # of a sequence
micro_steps = 2  # an update
dtype = 'float32'  # float32 | bfloat16
parallel = 'ddp'  # ddp | zero1 | fsdp
activation_checkpointing = False
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'configurator.py'), encoding='utf-8').read())


def memory(key):
    """VmRSS, the process's memory, or VmHWM, its peak since it was last forgotten, in MiB."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(key))


def mib(tensors):
    """MiB of this rank's part of the tensors, each counted once."""
    local = {id(t): t.to_local() if hasattr(t, 'to_local') else t for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in local.values()) / 2 ** 20


def forget_peak():
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')


if parallel not in ('ddp', 'zero1', 'fsdp'):
    fail(f'parallel={parallel!r} is not known', 'try ddp, zero1 or fsdp')
if dtype not in ('float32', 'bfloat16'):
    fail(f'dtype={dtype!r} is not known', 'try float32 or bfloat16')
rank, _, size = distributed.ranks()
distributed.init('auto', 'cpu')
empty = memory('VmRSS')
model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False))
for block in model.transformer.h:
    block.recompute = activation_checkpointing
raw_model = model = distributed.shard(model, 'cpu', parallel, dtype)
optimizer = distributed.shard_optimizer(model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu'), parallel)
model = distributed.wrap(model, 'cpu', parallel)
forget_peak()
for step in range(2):
    for micro_step in range(micro_steps):
        x = torch.randint(vocab_size, (batch_size, tokens + 1))
        with distributed.sync_gradients(model, now=micro_step == micro_steps - 1):
            with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                loss = model(x[:, :-1], x[:, 1:], return_logits=False)[1]
            loss.backward()
    gradients = mib(p.grad for p in raw_model.parameters())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
weights, moments = mib(raw_model.parameters()), mib(t for state in distributed.inner(optimizer).state.values() for t in state.values() if t.dim())
result = dict(parallel=parallel, ranks=size, rank=rank, dtype=dtype, parameters=sum(p.numel() for p in raw_model.parameters()), weights=weights,
              gradients=gradients, moments=moments, held=weights + gradients + moments,
              training_peak=memory('VmHWM') - empty, after=memory('VmRSS') - empty)
forget_peak()
state = distributed.gather(raw_model.state_dict(keep_vars=True), rank == 0), distributed.gather_optimizer(optimizer, rank == 0)
result['saving_adds'] = memory('VmHWM') - empty - result['after']
line = json.dumps({key: round(value, 1) if isinstance(value, float) else value for key, value in result.items()})
sys.stdout.write(line + '\n')  # at once, or the ranks' lines would mix
distributed.shutdown()
