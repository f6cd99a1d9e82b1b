"""
Measures a training step: time, tokens/s, memory, and how close it comes to what the device's matmuls can do.

    python bench.py                                          GPT-2 124M
    python bench.py config/train_shakespeare_char.py         another model
    python bench.py --profile=True                           where the time goes: a table, and a trace for a browser

It stops after 20 steps or 20 seconds, with 3 steps at least; the last line is JSON. Every knob below can be set in a
config file or as --key=value.
"""
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch

import checks
from model import GPT, GPTConfig
from tokenizer import read_meta

# data
dataset = 'openwebtext'  # where it is prepared; random tokens else
real_data = True  # False: random tokens in any case
batch_size = 12  # sequences a step
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
# system
seed = 1337
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu; auto is the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16; auto is the fastest that is safe
compile = 'auto'  # torch.compile the model: True | False; auto is True on CUDA
profile = False  # profile the steps: the top operators as a table, and out_dir/trace.json
out_dir = 'out-bench'  # where the trace goes
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

MAX_STEPS, MAX_SECONDS, MIN_STEPS, WARMUP_STEPS = 20, 20, 3, 2


def synchronize():
    if device_type != 'cpu':
        torch.accelerator.synchronize(device)


def peak_memory():
    """Bytes that this process has had at most, on the device (a CPU: resident); None where the system doesn't say."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def matmul_rates():
    """{size: FLOP/s} of square matmuls in the dtype used, each the best of three."""
    rates = {}
    for n in (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        times = []
        for _ in range(4):
            synchronize()
            t0 = time.perf_counter()
            a @ b
            synchronize()
            times.append(time.perf_counter() - t0)
        rates[n] = 2 * n ** 3 / min(times[1:])
    return rates


checks.check_ranges(config)
device, device_why = checks.choose_device(device)
device_type = torch.device(device).type
dtype, dtype_why = checks.choose_dtype(dtype, device_type)
compile, compile_why = checks.choose_compile(compile, device_type)
torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')  # TF32 where the hardware has it
ctx = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))

data_dir = checks.locate_data(dataset)
meta = read_meta(data_dir) if data_dir else None
vocab_size = meta['vocab_size'] if meta else 50304
if data_dir and real_data:
    tokens = checks.open_bin(os.path.join(data_dir, 'train.bin'), block_size, vocab_size)
else:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, 2 ** 20).astype(np.uint16)
print('data: ' + ('random tokens' if not real_data else data_dir or f'random tokens, as {dataset} is not prepared'))
print(f'machine: {device} ({device_why}), {dtype} ({dtype_why}), {"compiled" if compile else "not compiled"} ({compile_why}), '
      f'{torch.get_num_threads()} CPU threads, torch {torch.__version__}')

model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias)).to(device)
free, asked = checks.free_memory(device), batch_size
while free and batch_size > 1 and sum(checks.training_bytes(model.get_num_params(False), model.config, batch_size, dtype)) > free:
    batch_size //= 2
if batch_size < asked:
    print(f'memory: batch_size={asked} would not fit into the {free / 2 ** 30:.1f} GiB that are free, so it is {batch_size}')
optimizer = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
step_model = torch.compile(model) if compile else model
print(f'model: {model.get_num_params() / 1e6:.2f}M parameters, {n_layer} layers, {n_embd} wide, vocabulary {vocab_size}; '
      f'batch {batch_size} x {block_size} tokens')
rng = np.random.default_rng(seed)


def train_step():
    """One iteration as train.py's: a batch, forward, backward, clipping, AdamW; returns its loss."""
    starts = rng.integers(0, len(tokens) - block_size, batch_size)
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    rows = (rows.pin_memory() if device_type == 'cuda' else rows).to(device, non_blocking=True)
    with ctx:
        _, loss = step_model(rows[:, :-1], rows[:, 1:])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


print('warming up', flush=True)
t0 = time.perf_counter()
for _ in range(WARMUP_STEPS):
    loss = train_step()
    synchronize()
    if time.perf_counter() - t0 > MAX_SECONDS:
        break  # a step of this length has nothing to warm up
print(f'warmed up in {time.perf_counter() - t0:.1f} s')
times, profiler = [], None
if profile:
    checks.make_folder(out_dir)
    profiler = torch.profiler.profile()
    profiler.start()
while len(times) < MIN_STEPS or len(times) < MAX_STEPS and sum(times) < MAX_SECONDS:
    t0 = time.perf_counter()
    loss = train_step()
    synchronize()
    times.append(time.perf_counter() - t0)
memory = peak_memory()
if profiler:
    profiler.stop()
    trace = os.path.join(out_dir, 'trace.json')
    profiler.export_chrome_trace(trace)
    order = f'self_{device_type}_time_total' if device_type in ('cpu', 'cuda', 'xpu') else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
    print(f'trace: {trace}; open it in chrome://tracing or ui.perfetto.dev')

rates = matmul_rates()
rate = max(rates.values())
dt = statistics.median(times)
flops = model.flops_per_token() * batch_size * block_size
mfu = model.estimate_mfu(batch_size, dt)
result = dict(what='train', device=torch.cuda.get_device_name(device) if device_type == 'cuda' else device, dtype=dtype, compile=compile,
              torch=torch.__version__, n_layer=n_layer, n_embd=n_embd, batch_size=batch_size, block_size=block_size, steps=len(times),
              loss=loss.item(), ms_per_iter=1000 * dt, tokens_per_s=batch_size * block_size / dt, peak_memory_bytes=memory,
              matmul_flops_per_s=rate, share_of_matmul_rate=flops / dt / rate, mfu=mfu)
print(f'''
                          {'min':>12} {'median':>12} {'max':>12}   of {len(times)} steps
time per step, ms         {1000 * min(times):12.2f} {1000 * dt:12.2f} {1000 * max(times):12.2f}
tokens/s                  {result['tokens_per_s'] * dt / max(times):12,.0f} {result['tokens_per_s']:12,.0f} {result['tokens_per_s'] * dt / min(times):12,.0f}
TFLOP/s of the model      {flops / max(times) / 1e12:12.3f} {flops / dt / 1e12:12.3f} {flops / min(times) / 1e12:12.3f}
matmul rate, TFLOP/s      {rate / 1e12:12.3f}   best of {', '.join(f'{n}: {r / 1e12:.3f}' for n, r in rates.items())} square, {dtype}
share of the matmul rate  {100 * result['share_of_matmul_rate']:11.1f}%
peak memory               {f'{memory / 2 ** 30:8.2f} GiB' if memory else 'n/a':>12}
last loss                 {result['loss']:12.4f}
''')
print(f'time per iteration: {1000 * dt:.4f} ms, MFU: {f"{100 * mfu:.2f}%" if mfu else f"n/a (no peak known for this {device_type})"}')
print(json.dumps(result))
