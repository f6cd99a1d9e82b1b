"""
Measures how fast the work is done, how close that comes to what the device can do, and beside what else is at hand.

    python bench.py                                                a training step of GPT-2 124M
    python bench.py config/train_shakespeare_char.py               of another model: every config file of train.py is a preset
    python bench.py --what=decode --num_samples=10 --compare=hf    generation, beside transformers
    python bench.py --what=data --compare=slices                   get_batch, beside a slice for each row
    python bench.py --profile=True                                 where the time goes: a table, and a trace for a browser
    python bench.py --compare="python ../other/bench.py --what=train"    beside any command whose last line is such JSON

Two things compared take turns in one run, and the median ratio of the pairs counts. The last line is JSON. Every knob
below can be set in a config file or as --key=value.
"""
import datetime
import gc
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext

import numpy as np
import torch

import checkpoint
import checks
from model import GPT, GPTConfig
from optimizers import total_norm
from tokenizer import read_meta

# what
what = 'train'  # train (a step) | data (a batch) | prefill | decode | run (train.py as a process, to its end) | start (sample.py to a first token)
compare = ''  # hf (transformers; train, prefill, decode) | slices (data) | a command, which takes turns with us
num_samples = 1  # prefill and decode: sequences at once
max_new_tokens = 100  # decode: tokens in each
repeats = 20  # times that it is measured, at most: 3 at least, and no new one after 20 seconds, or after 60 of a comparison
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
rope_base = 0.0  # as in train.py, with the next ones
qk_norm = False
relu2 = False
tied = True
bigrams = 0
embd_conv = 0
optim = 'adamw'
activation_checkpointing = False  # compute each layer again in the backward pass instead of keeping what is in it
# system
seed = 1337
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu; auto is the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16; auto is the fastest that is safe
compile = 'auto'  # torch.compile the model: True | False; auto is True for training on CUDA
profile = False  # profile the work: the top operators as a table, and out_dir/trace.json
out_dir = 'out-bench'  # where the trace goes
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

MAX_SECONDS = 20
PROMPT = {'prefill': 1000, 'decode': 16}

# -----------------------------------------------------------------------------
# the knobs, the machine, the data, the model
checks.check_ranges(config)
if compare in ('hf', 'slices') and what not in dict(hf=('train', 'prefill', 'decode'), slices=('data',))[compare]:
    checks.fail(f'compare={compare} does not go with what={what}', 'use it with ' + dict(hf='train, prefill or decode', slices='data')[compare])
sampling = what in PROMPT
device, device_why = checks.choose_device(device)
device_type = torch.device(device).type
dtype, dtype_why = checks.choose_dtype(dtype, device_type, sampling)
compile, compile_why = checks.choose_compile(compile, device_type) if what == 'train' or compile != 'auto' else (False, 'only training is')
if device_type == 'cuda':
    torch.cuda.set_device(device)
if device_type == 'cpu' and what == 'train':
    checks.keep_freed_memory()
torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')  # TF32 where the hardware has it
if compile and device_type == 'cpu' and what == 'train':
    torch.use_deterministic_algorithms(True)  # as train.py does
ptdtype = getattr(torch, dtype)
ctx = nullcontext() if dtype == 'float32' or sampling else torch.autocast(device_type, dtype=ptdtype, cache_enabled=False)

data_dir = checks.locate_data(dataset)
meta = read_meta(data_dir) if data_dir else None
vocab_size = meta['vocab_size'] if meta else 50304
if data_dir and real_data:
    tokens = checks.open_bin(os.path.join(data_dir, 'train.bin'), block_size, vocab_size, meta)
else:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, 2 ** 20).astype(np.uint16)
windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)

model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, rope_base=rope_base, qk_norm=qk_norm, relu2=relu2, tied=tied,
                      bigrams=bigrams, embd_conv=embd_conv))
for block in model.transformer.h:
    block.recompute = activation_checkpointing
num_params, flops_per_token = model.get_num_params(), model.flops_per_token()
model.to(device, ptdtype if sampling else torch.float32)
if what == 'train':
    free, asked = checks.free_memory(device), batch_size
    while free and batch_size > 1 and sum(checks.training_bytes(model.get_num_params(False), model.config, batch_size, dtype, device_type, compile,
                                                                      activation_checkpointing)) > free:
        batch_size //= 2
    if batch_size < asked:
        print(f'memory: batch_size={asked} would not fit into the {free / 2 ** 30:.1f} GiB that are free, so it is {batch_size}')
prompt = torch.randint(vocab_size, (num_samples, min(PROMPT.get(what, 1), block_size - 1)), device=device)
tokens_each = dict(train=batch_size * block_size, data=batch_size * block_size, prefill=prompt.numel(), decode=num_samples * max_new_tokens).get(what)
print('data: ' + ('random tokens' if not real_data else data_dir or f'random tokens, as {dataset} is not prepared'))
print(f'machine: {device} ({device_why}), {dtype} ({dtype_why}), {"compiled" if compile else "not compiled"} ({compile_why}), '
      f'{torch.get_num_threads()} CPU threads, torch {torch.__version__}')
print(f'model: {num_params / 1e6:.2f}M parameters, {n_layer} layers, {n_embd} wide, vocabulary {vocab_size}')


# -----------------------------------------------------------------------------
# the work: each function readies it and returns a function that does it once
def synchronize():
    if device_type != 'cpu':
        torch.accelerator.synchronize(device)


def get_batch(starts):
    """As train.py's, but for the stream of its own that the copy has there."""
    rows = windows[starts]
    checks.check_ids(rows, vocab_size, 'the data')
    rows = torch.from_numpy(rows.astype(np.int64))
    if device_type == 'cuda':
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def data_work():
    """One batch, drawn and gathered as train.py does."""
    philox, iterations = np.random.Philox(key=seed), itertools.count()
    state = philox.state

    def work():
        state['state']['counter'][3] = next(iterations)
        philox.state = state
        return get_batch(philox.random_raw(batch_size) % len(windows))
    return work


def slices_work():
    """One batch with a Python slice for each row, of inputs and of targets: nanoGPT's way."""
    def work():
        starts = torch.randint(len(tokens) - block_size, (batch_size,))
        return [torch.stack([torch.from_numpy(tokens[i + d:i + d + block_size].astype(np.int64)) for i in starts]).to(device) for d in (0, 1)]
    return work


def train_work(model, loss_of):
    """One iteration as train.py's: a batch, forward, backward, clipping, an update; loss_of(model, X, Y) is the forward pass."""
    optimizer = GPT.configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), device_type,  # asks for parameters alone: also for others' models
                                         optim=optim if isinstance(model, GPT) else 'adamw')
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    run = torch.compile(model) if compile else model
    batch = data_work()

    def work():
        with ctx:
            loss = loss_of(run, *batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = total_norm(optimizer)
        if scaler.is_enabled() or device_type == 'mps':
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, grad_norm)
        else:
            optimizer.found_inf, optimizer.grad_scale = (~grad_norm.isfinite()).float(), grad_norm.clamp(min=1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return work


def sampling_work():
    """The prompt's last logits (prefill), or a prompt and its continuation as sample.py makes it (decode)."""
    model.eval()
    if compile:
        model.forward = torch.compile(model.forward)
    elif device_type == 'cpu':
        model.pack_weights(num_samples)
    generate = torch.inference_mode()(lambda n: model.generate(prompt, n, temperature=0.8, top_k=200, vocab_size=vocab_size))
    return lambda: generate(max_new_tokens if what == 'decode' else 1)


def hf_work():
    """The same with the GPT-2 of transformers; sampling in bfloat16, sdpa, with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head, resid_pdrop=dropout,
                                    embd_pdrop=dropout, attn_pdrop=dropout, attn_implementation='sdpa', bos_token_id=0, eos_token_id=0)).to(device)
    if what == 'train':
        return train_work(hf.train(), lambda hf, X, Y: hf(X, labels=X, use_cache=False).loss)
    hf.eval().to(torch.bfloat16)
    if what == 'prefill':
        return torch.inference_mode()(lambda: hf(prompt, use_cache=True).logits)
    options = dict(max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=True, temperature=0.8, top_k=200, use_cache=True, pad_token_id=0)
    return torch.inference_mode()(lambda: hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options))


def process_work(*command):
    """A whole process, from start to end; its output only if it fails."""
    def work():
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as e:
            checks.fail(f'{command[0]!r} cannot be run ({e.strerror})', 'compare with hf, slices or a command')
        if done.returncode:
            checks.fail(f'{shlex.join(command)} ended with status {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}')
        return done.stdout
    return work


def timed(work, times=1):
    """Seconds that the work takes once, the mean of so many: of a command its own report of tokens_per_s, if there are tokens."""
    synchronize()
    t0 = time.perf_counter()
    for _ in range(times):
        made = work()
    synchronize()
    if isinstance(made, str) and tokens_each:
        try:
            return tokens_each / json.loads(made.splitlines()[-1])['tokens_per_s']
        except (ValueError, KeyError, IndexError):
            checks.fail(f'{compare!r} printed no JSON with tokens_per_s as its last line')
    return (time.perf_counter() - t0) / times


def turn(work):
    """Seconds of the work, once. Short work of ours is done for a third of a second in a row, as in training: no waiting for the device between."""
    dt = timed(work)
    row = min(100, int(0.3 / dt)) if (work is ours or compare in ('hf', 'slices')) and not profile else 0
    return timed(work, row) if row > 1 and tokens_each else dt


scratch = tempfile.TemporaryDirectory()
if what == 'run':
    args = [arg for arg in sys.argv[1:] if not re.match('--(what|compare|repeats|num_samples|max_new_tokens|real_data|profile)', arg)]
    ours = process_work(sys.executable, os.path.join(checks.REPO, 'train.py'), *args, f'--out_dir={scratch.name}')
elif what == 'start':
    checkpoint.save(dict(checkpoint.describe(model.config, meta), model=model.state_dict(), iter_num=0, best_val_loss=0.0, config={}), scratch.name)
    ours = process_work(sys.executable, os.path.join(checks.REPO, 'sample.py'), f'--out_dir={scratch.name}', '--num_samples=1', '--max_new_tokens=1')
elif what == 'train':
    ours = train_work(model, lambda model, X, Y: model(X, Y, return_logits=False)[1])
else:
    ours = data_work() if what == 'data' else sampling_work()
theirs = {'': None, 'hf': hf_work, 'slices': slices_work}.get(compare, lambda: process_work(*shlex.split(compare)))
theirs = theirs() if theirs else None


# -----------------------------------------------------------------------------
# the device's own rates
def best_seconds(work):
    timed(work)
    return min(timed(work) for _ in range(3))


def matmul_rates():
    """{size: FLOP/s} of square matmuls in the dtype used, each the best of three."""
    rates = {}
    for n in (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=device, dtype=ptdtype) for _ in range(2))
        rates[n] = 2 * n ** 3 / best_seconds(lambda: a @ b)
    return rates


def read_rate():
    """Bytes/s at which a GiB is read, the best of three."""
    x = torch.ones(2 ** 28, device=device)
    return x.nbytes / best_seconds(x.sum)


def peak_memory():
    """Bytes that this process has had at most, on the device (a CPU: resident); None where the system doesn't say."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


# -----------------------------------------------------------------------------
# the measurement
if what in ('run', 'start'):
    print('no warm-up: a process is measured from its start', flush=True)
else:
    print('warming up', flush=True)
    t0 = time.perf_counter()
    for work in (ours, theirs) if compare in ('hf', 'slices') else (ours,):
        t1 = time.perf_counter()
        timed(work)
        if time.perf_counter() - t1 < MAX_SECONDS:  # work of such length has nothing more to warm up
            timed(work)
    print(f'warmed up in {time.perf_counter() - t0:.1f} s', flush=True)
gc.freeze()  # as train.py does
profiler = None
if profile:
    checks.make_folder(out_dir)
    profiler = torch.profiler.profile()
    profiler.start()
times, their_times = [], []
started = time.perf_counter()
while len(times) < 3 or len(times) < repeats and time.perf_counter() - started < (3 * MAX_SECONDS if theirs else MAX_SECONDS):
    for work, taken in ((ours, times), (theirs, their_times)):
        if work:
            taken.append(turn(work))
memory = peak_memory()
if profiler:
    profiler.stop()
    trace = os.path.join(out_dir, 'trace.json')
    profiler.export_chrome_trace(trace)
    order = f'self_{device_type}_time_total' if device_type in ('cpu', 'cuda', 'xpu') else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
    print(f'trace: {trace}; open it in chrome://tracing or ui.perfetto.dev')

dt = statistics.median(times)
result = dict(what=what, compare=compare, device=torch.cuda.get_device_name(device) if device_type == 'cuda' else device, dtype=dtype, compile=compile,
              torch=torch.__version__, python=platform.python_version(), date=datetime.date.today().isoformat(), n_layer=n_layer, n_embd=n_embd,
              dropout=dropout, activation_checkpointing=activation_checkpointing,
              batch_size=num_samples if sampling else batch_size, block_size=block_size, times=len(times), ms_per_iter=1000 * dt, peak_memory_bytes=memory)
print(f'\n{"":26}{"min":>12} {"median":>12} {"max":>12}   of {len(times)}')
print(f'{"ms a time, ours":26}{1000 * min(times):12.3f} {1000 * dt:12.3f} {1000 * max(times):12.3f}')
if theirs:
    ratios = [b / a for a, b in zip(times, their_times)]
    result.update(their_ms_per_iter=1000 * statistics.median(their_times), ratio=statistics.median(ratios))
    print(f'{"ms a time, theirs":26}{1000 * min(their_times):12.3f} {result["their_ms_per_iter"]:12.3f} {1000 * max(their_times):12.3f}   {compare}')
    print(f'{"times as fast, in pairs":26}{min(ratios):12.2f} {result["ratio"]:12.2f} {max(ratios):12.2f}')
if tokens_each:
    result['tokens_per_s'] = tokens_each / dt
    print(f'{"tokens/s":26}{tokens_each / max(times):12,.0f} {tokens_each / dt:12,.0f} {tokens_each / min(times):12,.0f}')
if what in ('train', 'prefill'):
    # a prompt has a forward pass alone, the output layer for its last token only, and attends to half of itself on average
    head = vocab_size * n_embd
    flops = flops_per_token * tokens_each if what == 'train' else \
        2 * (num_params - head) * tokens_each + 2 * head * num_samples + 2 * n_layer * n_embd * prompt.size(1) * tokens_each
    rates = matmul_rates()
    rate = max(rates.values())
    result.update(matmul_flops_per_s=rate, share_of_matmul_rate=flops / dt / rate)
    print(f'{"TFLOP/s":26}{flops / max(times) / 1e12:12.3f} {flops / dt / 1e12:12.3f} {flops / min(times) / 1e12:12.3f}')
    print(f'{"matmul rate, TFLOP/s":26}{rate / 1e12:12.3f}   best of {", ".join(f"{n}: {r / 1e12:.3f}" for n, r in rates.items())} square, {dtype}')
    print(f'{"share of the matmul rate":26}{100 * result["share_of_matmul_rate"]:11.1f}%')
if what == 'decode':
    rate = read_rate()
    floor = num_params * ptdtype.itemsize / rate  # every weight is read once a token
    result.update(read_bytes_per_s=rate, share_of_read_rate=floor * max_new_tokens / dt)
    print(f'{"ms a token":26}{1000 * min(times) / max_new_tokens:12.3f} {1000 * dt / max_new_tokens:12.3f} {1000 * max(times) / max_new_tokens:12.3f}')
    print(f'{"reading the weights, ms":26}{1000 * floor:12.3f}   at {rate / 1e9:.1f} GB/s')
    print(f'{"share of the read rate":26}{100 * result["share_of_read_rate"]:11.1f}%')
print(f'{"peak memory":26}{f"{memory / 2 ** 30:8.2f} GiB" if memory else "n/a":>12}\n')
mfu = 'n/a'
if what == 'train':
    result['loss'], result['mfu'] = ours().item(), model.estimate_mfu(batch_size, dt)
    mfu = f'{100 * result["mfu"]:.2f}%' if result['mfu'] else f'n/a (no peak known for this {device_type})'
print(f'time per iteration: {1000 * dt:.4f} ms, MFU: {mfu}')
print(json.dumps(result))
