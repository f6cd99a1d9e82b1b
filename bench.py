"""
Measures how fast the work is done, how close that is to what the device can do, and compares.

    python bench.py                                                 a training step of GPT-2 124M
    python bench.py config/train_shakespeare_char.py                of any config file's model
    python bench.py --what=decode --num_samples=10 --compare=hf     generation, and transformers'
    python bench.py --profile=True                                  a table of where the time goes
    python bench.py --compare="python ../other/bench.py"            another checkout

Two things that are compared take turns in one run, and the median ratio of the pairs counts. A
command must print JSON with tokens_per_s as its last line, as this script and recipes/peers do.
"""
import dataclasses
import datetime
import gc
import itertools
import json
import os
import re
import shlex
import statistics
import sys
import tempfile
from contextlib import nullcontext

from runtime import threads  # before torch: it sets how torch's threads wait for each other

import numpy as np
import torch

from model import GPT, GPTConfig
from runtime import checkpoint, inference, kernels, machine, memory, optimizers, report, restore
from runtime import linears, settings, shards, timing
from runtime.compiler import has_failed
from runtime.console import ROOT, fail, format_bytes
from runtime.dataset import DataOrder, find_data, locate_data, move_to_device
from runtime.meta import read_meta

# what to measure
what = 'train'  # train (a step) | data (a batch) | prefill | decode | run | start (of sample.py)
compare = ''  # hf (transformers; train, prefill, decode) | slices (data) | a command
num_samples = 1  # prefill and decode: sequences at once
max_new_tokens = 100  # decode: tokens per sequence
busy = False  # measure again next to a process on each core, of nice 10 and then of nice 0
repeats = 20  # measurements: at least 3, at most this many, no new one after 20 s (60 s of pairs)
# data
dataset = 'openwebtext'  # used if it is prepared, otherwise random tokens
real_data = True  # False: always random tokens
batch_size = 12  # sequences per step
block_size = 1024  # tokens per sequence
# model, as in train.py
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
rope_base = 0.0
qk_norm = False
relu2 = False
tied = True
bigrams = 0
embd_conv = 0
optim = 'adamw'
moments_dtype = 'float32'
activation_checkpointing = False
# system
seed = 1337
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu | auto: the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16 | auto: the fastest that is safe
weights = 'auto'  # prefill and decode on a CPU: int8 | int4 | bfloat16 | auto: dtype
compile = 'auto'  # torch.compile the model: True | False | auto: True for training on CUDA
profile = False  # print the top operators, and write out_dir/trace.json
out_dir = 'out-bench'  # folder for the trace
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

# -----------------------------------------------------------------------------
# the machine
settings.check(config)
choices = {'hf': ('train', 'prefill', 'decode'), 'slices': ('data',)}.get(compare, (what,))
if what not in choices:
    fail(f'compare={compare} does not work with what={what}', f'use it with {", ".join(choices)}')
is_sampling = what in ('prefill', 'decode')
if weights != 'auto' and not is_sampling:
    fail(f'weights={weights} does not work with what={what}', 'use it with prefill or decode')
device, device_reason = machine.choose_device(device)
device_type = torch.device(device).type
dtype = machine.fit_dtype(weights, dtype, device_type, compile)
dtype, dtype_reason = machine.choose_dtype(dtype, device_type, is_sampling)
ptdtype = getattr(torch, dtype)
if compile == 'auto' and is_sampling:
    compile, compile_reason = False, 'auto compiles only training'
elif is_sampling or what == 'train':
    compile, compile_reason = machine.choose_compile(compile, device_type)
else:
    compile, compile_reason = None, 'there is no model to compile'  # train.py chooses itself
if what == 'train':
    machine.prepare_training(device_type, compile, 'ddp')
machine.prepare_sampling(device, seed)
ctx = nullcontext() if dtype == 'float32' or is_sampling else torch.autocast(
    device_type, dtype=ptdtype, cache_enabled=False)

# -----------------------------------------------------------------------------
# the data and the model
data_dir = locate_data(dataset)
if not data_dir and real_data and dataset not in ('openwebtext', 'fineweb_edu', 'shakespeare'):
    find_data(dataset)  # fails: only of these three, which have GPT-2's, the vocabulary is known
meta = read_meta(data_dir) if data_dir else None
vocab_size = meta['vocab_size'] if meta else 50304
if data_dir and real_data:
    print(f'data: {data_dir}')
    tokens = shards.open_tokens(data_dir, 'train', block_size, vocab_size, meta)
else:
    print('data: random tokens' + (f', as {dataset} is not prepared' if real_data else ''))
    tokens = np.random.default_rng(seed).integers(0, vocab_size, 2 ** 20).astype(np.uint16)
windows = shards.view_windows(tokens, block_size + 1)
options = {field.name for field in dataclasses.fields(GPTConfig)} - {'vocab_size', 'gelu'}
if options - set(config):
    fail(f'GPTConfig has {", ".join(options - set(config))}, but bench.py does not',
         'add it to the settings of bench.py')
model = GPT(GPTConfig(vocab_size=vocab_size, **restore.choose_args(GPTConfig, config)))
num_params = model.get_num_params()
flops_per_token = model.estimate_mfu(1, 1.0) * machine.A100_FLOPS / block_size
kernels.accelerate(model, device_type, dtype)
if activation_checkpointing:
    kernels.recompute_blocks(model)
model.to(device, ptdtype if is_sampling else torch.float32)


def make_optimizer():
    """As in train.py."""
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type)
    return optimizers.specialize(optimizer, optim, moments_dtype, 0.95, model, dtype)


free_bytes = memory.read_free_memory(device)
if what == 'train' and free_bytes:
    optimizer_bytes = optimizers.count_state_bytes(make_optimizer())
    while batch_size > 1 and free_bytes < sum(memory.estimate_training_bytes(
            model.config, model.get_num_params(False), optimizer_bytes, batch_size, dtype,
            device_type, kernels.stores_logits(model), compile, activation_checkpointing)):
        batch_size //= 2
if batch_size < config['batch_size']:
    print(f'memory: batch_size={config["batch_size"]} would not fit into the '
          f'{format_bytes(free_bytes)} that are free, so it is {batch_size}')
prompt_length = min(1000 if what == 'prefill' else 16, block_size - 1)
prompt = torch.randint(vocab_size, (num_samples, prompt_length), device=device)
tokens_each = {'train': batch_size * block_size, 'data': batch_size * block_size,
               'prefill': prompt.numel(), 'decode': num_samples * max_new_tokens}.get(what)
report.print_machine((device, device_reason), (dtype, dtype_reason), (compile, compile_reason))
print(f'model: {num_params / 1e6:.2f}M parameters, {n_layer} layers, {n_embd} wide, '
      f'vocabulary {vocab_size}')


# -----------------------------------------------------------------------------
# the work: each function prepares it and returns a function that does it once
def get_batch(starts):
    """As in train.py."""
    rows = windows[starts]
    shards.check_ids(rows, vocab_size, 'the data')
    rows = move_to_device(rows, device)
    return rows[:, :-1], rows[:, 1:].clone()


def prepare_data():
    """A batch, drawn and read as train.py does."""
    order = DataOrder('random', seed, len(tokens), block_size, batch_size, 1)
    iterations = itertools.count()
    return lambda: get_batch(order.get_starts(next(iterations), 0))


def prepare_slices():
    """A batch by a Python slice for each row of inputs and of targets, as nanoGPT does."""
    def work():
        starts = torch.randint(len(tokens) - block_size, (batch_size,))
        for shift in (0, 1):
            rows = [tokens[i + shift:i + shift + block_size] for i in starts]
            torch.stack([torch.from_numpy(row.astype(np.int64)) for row in rows]).to(device)
    return work


def prepare_training():
    """An iteration as in train.py: a batch, forward and backward pass, clipping, an update."""
    optimizer = make_optimizer()
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    called_model = kernels.compile_model(model) if compile else model
    next_batch = prepare_data()

    def work():
        with ctx, kernels.loss_only(model):
            _, loss = called_model(*next_batch())
        scaler.scale(optimizers.nan_unless_finite(loss)).backward()
        optimizers.clip_and_step(optimizer, scaler, 1.0)
        optimizer.zero_grad(set_to_none=True)
        busy_note.check()
        return loss.detach()
    return work


def prepare_sampling():
    """The prompt and one token (prefill), or the prompt and all tokens, as in sample.py."""
    model.eval()
    if compile:
        inference.compile_forward(model)
    elif device_type == 'cpu':
        inference.pack_linears(model, num_samples, weights)
    length = max_new_tokens if what == 'decode' else 1
    options = dict(temperature=0.8, top_k=200, graphs={})
    return lambda: list(busy_note.watch(inference.stream(model, prompt, length, **options)))


def list_hf_command():
    """The command that does the same by the GPT-2 of transformers."""
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'num_samples',
             'max_new_tokens', 'what')
    flags = [f'--{name}={config[name]}' for name in names]
    return [sys.executable, os.path.join(ROOT, 'recipes', 'peers', 'hf.py'), *flags,
            f'--vocab_size={vocab_size}', f'--batch_size={batch_size}', f'--device={device}',
            f'--dtype={dtype}', '--turns=True']


def prepare_ours():
    """The work of this repository."""
    if what == 'train':
        return prepare_training()
    if what == 'run':  # train.py, with the arguments that aren't only this script's
        own_flags = '--(what|compare|busy|repeats|num_samples|max_new_tokens|real_data|profile)'
        args = [arg for arg in sys.argv[1:] if not re.match(own_flags, arg)]
        return timing.run_process([sys.executable, os.path.join(ROOT, 'train.py'), *args,
                                   f'--out_dir={scratch.name}'])
    if what == 'start':  # sample.py, on a checkpoint of this model
        state = dict(checkpoint.describe(model.config, meta), model=model.state_dict(),
                     iter_num=0, best_val_loss=0.0, config={})
        checkpoint.save(state, scratch.name)
        return timing.run_process([sys.executable, os.path.join(ROOT, 'sample.py'),
                                   f'--out_dir={scratch.name}', '--num_samples=1',
                                   '--max_new_tokens=1'])
    return prepare_data() if what == 'data' else prepare_sampling()


# -----------------------------------------------------------------------------
# the measurement
busy_note = threads.BusyNote()
scratch = tempfile.TemporaryDirectory()
ours = prepare_ours()
works = [ours]
if compare:
    command = list_hf_command() if compare == 'hf' else shlex.split(compare)
    works.append(prepare_slices() if compare == 'slices' else timing.run_process(command))
in_process = works if compare == 'slices' else [ours]
if what in ('run', 'start'):  # a process is measured from its start
    in_process = []
timing.warm_up(in_process, device)
gc.freeze()  # as train.py does
profiler = timing.start_profiler(out_dir) if profile else None
times, *their_times = timing.measure_in_turns(works, device, repeats, tokens_each,
                                              short_works=[] if profile else in_process)
peak_bytes = timing.read_peak_memory(device)

# -----------------------------------------------------------------------------
# the report
dt = statistics.median(times)
name = torch.cuda.get_device_name(device) if device_type == 'cuda' else device
compile = config['compile'] if compile is None else compile and not has_failed()
result = dict(what=what, compare=compare, device=name, dtype=dtype, weights=weights,
              compile=compile, torch=torch.__version__, python=sys.version.split()[0],
              date=datetime.date.today().isoformat(), optim=optim, moments_dtype=moments_dtype,
              activation_checkpointing=activation_checkpointing, **vars(model.config),
              batch_size=num_samples if is_sampling else batch_size, times=len(times),
              ms_per_iter=1000 * dt, peak_memory_bytes=peak_bytes)
if profiler:
    result.update(profile=timing.print_profile(profiler, device_type, out_dir))
result.update(timing.print_times(times, their_times[0] if compare else None, tokens_each))
if busy:
    busy_note.was_noted = True  # this load is ours
    result.update(timing.print_slowdowns(ours, device, repeats, tokens_each, in_process))
if what == 'train':
    flops = flops_per_token * tokens_each
    result.update(timing.print_matmul_share(times, flops, device, ptdtype), loss=ours().item())
if what == 'prefill':
    flops = timing.count_prefill_flops(model.config, num_params, num_samples, prompt_length)
    result.update(timing.print_matmul_share(times, flops, device, ptdtype))
if what == 'decode':  # each token needs all the weights once
    result['process_memory_bytes'] = memory.read_process_bytes()
    num_bytes = linears.count_bytes(model) or num_params * ptdtype.itemsize
    result.update(timing.print_read_share(times, max_new_tokens, num_bytes, device))
if peak_bytes:
    print(f'{"peak memory":26} {format_bytes(peak_bytes):>12}')
mfu = 'n/a'
if what == 'train':
    peak_flops = machine.find_peak_flops(device)
    result['mfu'] = flops / dt / peak_flops if peak_flops else None
    mfu = f'n/a (no peak known for this {device_type})'
    if peak_flops:
        mfu = f'{100 * result["mfu"]:.2f}%'
print(f'\ntime per iteration: {1000 * dt:.4f} ms, MFU: {mfu}')
print(json.dumps(result))
