"""
The machine: which device, number format and compiling to use and why, and its memory.
"""
import contextlib
import ctypes
import importlib.util
import os
import re
import sys

import torch

from runtime.console import fail, format_bytes, say, warn


def choose_device(device, local_rank=0):
    """Returns the torch device string for the setting `device`, and the reason.

    'auto' is the accelerator if there is one. Under torchrun each rank has its own GPU, so 'cuda'
    and 'cuda:k' both mean the local rank's.
    """
    reason = 'set by you'
    if device == 'auto':
        device, reason = 'cpu', 'no accelerator found'
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator().type
            reason = 'the accelerator found'
    try:
        device_type = torch.device(device).type
    except (RuntimeError, TypeError):
        fail(f'device={device!r} is not a valid device', 'try cpu, cuda, cuda:0, mps, xpu or auto')
    if device_type == 'cpu':
        return 'cpu', reason
    backend = getattr(torch, device_type, None)
    if not backend or not backend.is_available():
        fail(f'device={device!r} is not available on this machine', 'try --device=cpu')
    if device_type == 'mps':
        return 'mps', reason
    count = backend.device_count()
    index = torch.device(device).index or 0
    if 'LOCAL_RANK' in os.environ:
        index = local_rank
    if index >= count:
        fail(f'{device_type}:{index} does not exist: this machine has {count} of this type',
             f'use at most {count} processes on this machine', who='rank')
    return f'{device_type}:{index}', reason


def choose_dtype(dtype, device_type, sampling=False):
    """Returns the number format for the setting `dtype`, and the reason.

    The format is 'float32', 'bfloat16' or 'float16'. 'auto' is the fastest for training, or for
    sampling, that is safe on the device.
    """
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        fail(f'dtype={dtype!r} is not known', 'try float32, bfloat16, float16 or auto')
    if dtype == 'float16' and device_type != 'cuda':
        return 'float32', f'float16 needs CUDA, this is {device_type}'
    if dtype != 'auto':
        try:
            torch.zeros(1, device=device_type, dtype=getattr(torch, dtype))
        except NotImplementedError:  # this device isn't here: choose_device reports that
            pass
        except (RuntimeError, TypeError):
            fail(f'dtype={dtype!r} is not supported by this {device_type} device',
                 'try --dtype=float32')
        return dtype, 'set by you'
    if device_type == 'cuda':
        # without emulation: cards before Ampere emulate bfloat16, slowly
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return 'bfloat16', 'this GPU supports it'
        return 'float16', 'this GPU has no bfloat16'
    if device_type == 'cpu':
        return choose_cpu_dtype(sampling)
    if device_type == 'xpu':
        return 'bfloat16', 'XPUs support it'
    return 'float32', f'the default on {device_type}'


def choose_cpu_dtype(sampling):
    """choose_dtype() for 'auto' on a CPU: bfloat16 only where it is the faster format."""
    def supports(instructions):
        return getattr(torch.cpu, f'_is_{instructions}_supported', lambda: False)()

    if supports('amx_tile'):
        return 'bfloat16', 'this CPU has AMX'
    if not supports('avx512_bf16'):
        return 'float32', 'this CPU has no bfloat16 instructions'
    if not sampling and read_cpu_vendor() == 'GenuineIntel':
        # a virtual machine that hides AMX: 2048-cubed matmuls ran at 150 GFLOP/s in bfloat16 and
        # at 300 in float32. Sampling is bound by the bytes read: 1.6 times faster in bfloat16
        return 'float32', "faster than bfloat16 on Intel's AVX512 without AMX"
    return 'bfloat16', 'this CPU has AVX512-BF16'


def read_cpu_vendor():
    """The CPU maker's name as the CPU reports it, such as GenuineIntel; 'unknown' without Linux."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('vendor_id'))
    except (OSError, StopIteration):
        return 'unknown'


def choose_compile(compile, device_type):
    """Returns whether to torch.compile for the setting `compile`, and the reason."""
    if compile not in ('auto', True, False):
        fail(f'compile={compile!r} is not known', 'use True, False or auto')
    if compile != 'auto':
        return compile, 'set by you'
    if device_type == 'cuda' and importlib.util.find_spec('triton'):
        return True, 'faster on CUDA'
    if device_type == 'cpu':
        # at most one seventh of a step, and compiling takes half a minute
        return False, 'little gain on a CPU; --compile=True to try'
    return False, 'auto compiles only on CUDA'


# dense matmul rate in FLOP/s with 16-bit inputs and float32 sums, from the makers' datasheets.
# The first entry whose words are all in the device's name counts
PEAK_FLOPS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 NVL': 835e12,
    'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'A30': 165e12, 'A40': 150e12,
    'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'V100': 125e12,
    'T4': 65e12, 'RTX A6000': 155e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
}
A100_FLOPS = PEAK_FLOPS['A100']  # the model's estimate_mfu() is a share of this, as in nanoGPT


def peak_flops(name):
    """The 16-bit matmul rate of the GPU of this name in FLOP/s; None if the table lacks it."""
    words = set(re.findall(r'\w+', name))
    if words & {'Laptop', 'MIG'}:  # slower than the card of the same name
        return None
    return next((rate for key, rate in PEAK_FLOPS.items() if set(key.split()) <= words), None)


def find_peak_flops(device):
    """peak_flops() of this device; None if it isn't a known GPU."""
    if torch.device(device).type != 'cuda':
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def estimate_training_bytes(config, num_params, optimizer_bytes, batch_size, dtype,
                            device_type='cuda', stores_logits=True, compile=False,
                            recomputes_layers=False, parallel='ddp', ranks=1):
    """Estimates the bytes that training needs on one rank: (model state, peak of activations).

    The model state is weights and gradients, 4 bytes each per parameter, and the optimizer's own
    state. With zero1 and fsdp each rank has a part of it; fsdp also needs room for the whole
    embedding and its gradient. The activations are what the backward pass keeps: the logits with
    their gradient, and about 34 x C bytes per token and layer in 16-bit numbers (Korthikanti et
    al. 2022, https://arxiv.org/abs/2205.05198). On a CPU the attention matrix comes on top with
    dropout and in bfloat16.
    """
    width = 2 if dtype == 'float32' else 1  # in units of 16 bits
    tokens = batch_size * config.block_size
    layer_bytes = 34 * config.n_embd * width
    if device_type == 'cpu' and config.dropout:
        layer_bytes += 4 * (config.n_head * config.block_size + config.n_embd) * 2 * width
    elif device_type == 'cpu' and dtype == 'bfloat16' and config.block_size <= 1024:
        layer_bytes += 2 * config.n_head * config.block_size  # see kernels.Attention
    if recomputes_layers:  # only one layer's activations, and the inputs of the others
        layers_bytes = layer_bytes + 4 * config.n_layer * config.n_embd
    else:
        layers_bytes = config.n_layer * layer_bytes
    logits = tokens * config.vocab_size
    logit_bytes = 8 + 4 * width  # with the gradient, and both in float32
    if compile:  # without a copy in float32; on CPUs it took 8 bytes in float32 and bfloat16
        logit_bytes = 8 if device_type == 'cpu' else 4 * width
    elif not stores_logits:
        logits = min(logits, 2 ** 25)  # see cross_entropy.LinearCrossEntropy
    state_bytes = 8 * num_params + optimizer_bytes
    if parallel == 'zero1':
        state_bytes = 8 * num_params + optimizer_bytes // ranks
    if parallel == 'fsdp' and ranks > 1:
        state_bytes = state_bytes // ranks + 8 * config.vocab_size * config.n_embd
    return state_bytes, tokens * layers_bytes + logits * logit_bytes


def plan_memory(state_bytes, activation_bytes, allocated_bytes, device, ranks):
    """Prints the estimate, and warns if the part of it that isn't allocated yet may not fit.

    A system that runs out of memory kills the process without a message.
    """
    text = (f'memory: {format_bytes(state_bytes)} for weights, gradients and optimizer state, '
            f'about {format_bytes(activation_bytes)} for activations')
    if ranks > 1:
        text += ', on each rank'
    say(text)
    free_bytes = read_free_memory(device)
    if free_bytes is not None and state_bytes - allocated_bytes + activation_bytes > free_bytes:
        warn(f'that may not fit: {format_bytes(free_bytes)} are free on {device}')


def read_free_memory(device):
    """Bytes that can still be allocated on the device; None where the system doesn't report it."""
    device_type = torch.device(device).type
    if device_type in ('cuda', 'xpu'):
        return getattr(torch, device_type).mem_get_info(device)[0]
    try:
        with open('/proc/meminfo') as f:
            line = next(line for line in f if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None
    free_bytes = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container may have less; 'max': no limit
        paths = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory.current'
        limit_bytes, used_bytes = (open(path).read() for path in paths)
        free_bytes = min(free_bytes, max(0, int(limit_bytes) - int(used_bytes)))
    return free_bytes


def has_room(num_bytes, device):
    """Whether a copy of this size fits in the free memory of the CPU, with something to spare."""
    if torch.device(device).type != 'cpu':
        return True  # the copy is in the CPU's memory, and the model isn't
    free_bytes = read_free_memory(device)
    return free_bytes is None or free_bytes > 1.2 * num_bytes


def prepare_training(device_type, compile, parallel):
    """Sets torch and the C library for training on this type of device."""
    torch.set_float32_matmul_precision('high')  # TF32 where the hardware has it
    if device_type != 'cpu':
        return
    if parallel != 'fsdp':  # fsdp gathers weights to free them again
        keep_freed_memory()
    if compile:
        # a compiled embedding's backward pass adds atomically, so two runs would differ
        torch.use_deterministic_algorithms(True)
    # MKL's first exp or log must not come from two threads: one result would be 1e-5 off, in 3 of
    # 100 runs
    torch.ones(1).log()


def prepare_sampling(device, seed):
    """Sets torch for sampling on this device."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision('high')  # TF32 where the hardware has it
    if torch.device(device).type == 'cuda':
        torch.cuda.set_device(device)


def synchronize(device):
    """Waits until the device has done all its work."""
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize(device)


def keep_freed_memory():
    """Makes glibc keep the memory that CPU tensors free, for the next ones.

    By default glibc returns large blocks to the system, so every step maps and zeroes each page
    again: 11.1 s a step of config/train_shakespeare_char.py instead of 7.3. The peak stays equal.
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-4, 0)  # M_MMAP_MAX: every block comes from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap doesn't shrink


def explain_out_of_memory(device, batch_size, block_size, gradient_accumulation_steps):
    """From here on, running out of memory ends the program with one line that names ways out."""
    earlier_hook = sys.excepthook

    def hook(kind, e, trace):
        text = str(e)  # torch has no class of its own for this error on a CPU
        phrases = ('out of memory', "can't allocate memory")
        if not issubclass(kind, MemoryError) and not any(phrase in text for phrase in phrases):
            return earlier_hook(kind, e, trace)
        request = 'more memory'
        free_text = 'an unknown amount'
        free_bytes = read_free_memory(device)
        match = re.search(r'[Tt]ried to allocate ([\d.]+) (\w+)', text)
        if match:
            request = f'{match[1]} {match[2]}'
            if match[2] == 'bytes':
                request = f'{int(match[1]) / 2 ** 30:.2f} GiB'
        if free_bytes is not None:
            free_text = f'{free_bytes / 2 ** 30:.2f} GiB'
        sequences = gradient_accumulation_steps * batch_size
        batch_sizes = [b for b in range(batch_size // 2, 0, -1) if batch_size % b == 0][:2]
        pairs = [f'--batch_size={b} --gradient_accumulation_steps={sequences // b}'
                 for b in batch_sizes]
        remedy = 'use a smaller --block_size or model'
        if pairs:
            remedy = f'for the same {sequences * block_size:,} tokens/iter use {" or ".join(pairs)}'
        print(f'error: out of memory on {device}: {request} asked for, {free_text} free; {remedy}',
              file=sys.stderr, flush=True)

    sys.excepthook = hook
