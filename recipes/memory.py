r"""
Measures the memory that training and saving take on each rank, in MiB. It runs on Linux only.

    export MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1
    torchrun --nproc_per_node=4 recipes/memory.py --parallel=fsdp \
        --n_layer=24 --n_head=16 --n_embd=1024
    python recipes/memory.py --tokens=1024 --micro_steps=1 \
        --moments_dtype=bfloat16 --activation_checkpointing=True

The last command measures finetuning in one process. The first variable makes the C library return
freed memory to the system. Otherwise the peaks would include freed memory, too. It computes on the
CPU, so the memory of the process is the memory of the device.

Each rank prints a line of JSON, with these figures:

- weights, gradients, moments: this rank's part of each; state is their sum
- training_peak: the peak of the process's memory during two updates, without the memory that it
  had before the model was built
- after: the same after the two updates
- peak_total: the peak of the whole process's memory during the two updates
- saving_adds: how much memory saving a checkpoint adds, at its peak
"""
import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from model import GPT, GPTConfig
from runtime import distributed, kernels, optimizers, settings
from runtime.console import ROOT, fail

# the model, and how it is trained
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
batch_size = 1  # sequences in a micro-batch, on each rank
tokens = 64  # tokens in a sequence
micro_steps = 2  # micro-batches in an update
dtype = 'float32'  # float32 | bfloat16
moments_dtype = 'float32'  # float32 | bfloat16: AdamW's moments
parallel = 'ddp'  # ddp | zero1 | fsdp
activation_checkpointing = False  # recompute each layer in the backward pass
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())


def read_memory(key):
    """The process's memory in MiB: VmRSS is the present amount, VmHWM the peak since a reset."""
    with open('/proc/self/status') as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1]) / 1024


def reset_peak():
    """Sets VmHWM to the present amount."""
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')


def count_mib(tensors):
    """MiB of this rank's part of the tensors. A tensor that comes twice counts once."""
    parts = {id(t): distributed.local_tensor(t) for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in parts.values()) / 2 ** 20


settings.check(config)
if dtype not in ('float32', 'bfloat16'):
    fail(f'dtype={dtype!r} is not known', 'use float32 or bfloat16')
rank, _, world_size = distributed.read_ranks()
distributed.init('auto', 'cpu')
empty = read_memory('VmRSS')

# the model, as train.py builds it
model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False))
kernels.accelerate(model, 'cpu', dtype)
if activation_checkpointing:
    kernels.recompute_blocks(model)
model = distributed.shard_model(model, 'cpu', parallel, dtype)
raw_model = model
optimizer = raw_model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
optimizer = optimizers.specialize(optimizer, 'adamw', moments_dtype, 0.95, model)
optimizer = distributed.shard_optimizer(optimizer, parallel)
model = distributed.wrap(model, 'cpu', parallel)

# two updates
reset_peak()
ctx = torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32')
for step in range(2):
    for micro_step in range(micro_steps):
        last_micro_step = micro_step == micro_steps - 1
        x = torch.randint(vocab_size, (batch_size, tokens + 1))
        with distributed.sync_gradients(model, now=last_micro_step):
            with ctx, kernels.loss_only(raw_model):
                _, loss = model(x[:, :-1], x[:, 1:])
            loss.backward()
    gradients = count_mib(p.grad for p in raw_model.parameters())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
weights = count_mib(raw_model.parameters())
states = distributed.get_local_optimizer(optimizer).state.values()
moments = count_mib(t for state in states for t in state.values() if t.dim())
peak = read_memory('VmHWM')
after = read_memory('VmRSS')

# what saving takes: rank 0 gathers a copy
reset_peak()
copies = [distributed.gather(raw_model.state_dict(keep_vars=True), rank == 0),
          distributed.gather_optimizer(optimizer, rank == 0)]
saving_peak = read_memory('VmHWM')

figures = dict(weights=weights, gradients=gradients, moments=moments,
               state=weights + gradients + moments, training_peak=peak - empty, after=after - empty,
               peak_total=peak, saving_adds=saving_peak - after)
result = dict(parallel=parallel, ranks=world_size, rank=rank, dtype=dtype,
              parameters=sum(p.numel() for p in raw_model.parameters()),
              **{name: round(value, 1) for name, value in figures.items()})
sys.stdout.write(json.dumps(result) + '\n')  # in one call, so that the ranks' lines don't mix
distributed.shutdown()
