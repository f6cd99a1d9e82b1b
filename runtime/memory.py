"""
Memory: what training needs, what is free, and what is said when it runs out.
"""
import contextlib
import ctypes
import os
import re

import torch

from runtime import cross_entropy
from runtime.attention import count_keys, is_faster
from runtime.console import explain_errors, format_bytes, say, warn

try:
    import resource
except ImportError:  # Windows
    resource = None

# on Linux: what tells the control groups of this process, and their folder
GROUPS = '/proc/self/cgroup', '/sys/fs/cgroup'
HUGE_PAGE = 2 ** 21  # bytes, on x86 and on most other CPUs


def estimate_training_bytes(config, num_params, optimizer_bytes, batch_size, dtype,
                            device_type='cuda', stores_logits=True, compile=False,
                            recomputes_layers=False, parallel='ddp', ranks=1):
    """Estimates the bytes that training needs on one rank: (model state, peak of activations).

    The model state is weights and gradients, 4 bytes each per parameter, and the optimizer's own
    state. With zero1 and fsdp each rank has a part of it; fsdp also needs room for the whole
    embedding and its gradient. The activations are what the backward pass keeps: the logits with
    their gradient, and about 34 x C bytes per token and layer in 16-bit numbers (Korthikanti et
    al. 2022, https://arxiv.org/abs/2205.05198). On a CPU the weights of attention come on top,
    where runtime/attention.py computes it.
    """
    width = 2 if dtype == 'float32' else 1  # in units of 16 bits
    tokens = batch_size * config.block_size
    layer_bytes = 34 * config.n_embd * width
    if device_type == 'cpu' and config.dropout:
        layer_bytes += 8 * width * config.n_embd
    ptdtype = getattr(torch, dtype)
    if device_type == 'cpu' and is_faster(ptdtype, config.block_size, config.dropout):
        num_tensors = 2 if config.dropout else 1  # attention's weights and their random numbers
        keys = count_keys(config.block_size, ptdtype)
        layer_bytes += 2 * width * num_tensors * config.n_head * keys
    if recomputes_layers:  # only one layer's activations, and the inputs of the others
        layers_bytes = layer_bytes + 4 * config.n_layer * config.n_embd
    else:
        layers_bytes = config.n_layer * layer_bytes
    logits = tokens * config.vocab_size
    logits_bytes = logits * (8 + 4 * width)  # with the gradient, and both in float32
    if compile:  # without a copy in float32; on CPUs it took 8 bytes in float32 and bfloat16
        logits_bytes = logits * (8 if device_type == 'cpu' else 4 * width)
    elif not stores_logits:  # some rows in the dtype, and fewer in float32, with their gradient
        wide_logits = min(logits, cross_entropy.count_wide_logits(device_type))
        logits_bytes = min(2 * width * logits, cross_entropy.MAX_BYTES) + 8 * wide_logits
    state_bytes = 8 * num_params + optimizer_bytes
    if parallel == 'zero1':
        state_bytes = 8 * num_params + optimizer_bytes // ranks
    if parallel == 'fsdp' and ranks > 1:
        state_bytes = state_bytes // ranks + 8 * config.vocab_size * config.n_embd
    return state_bytes, tokens * layers_bytes + logits_bytes


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
    free_bytes = [read_available_bytes(), *list_group_bytes(), *list_limit_bytes()]
    return min((n for n in free_bytes if n is not None), default=None)


def read_available_bytes():
    """Bytes that the system has left; None without Linux."""
    return read_linux_size('/proc/meminfo', 'MemAvailable')


def read_linux_size(path, name):
    """The size with this name in a file of /proc, in bytes; None if there is none."""
    try:
        with open(path) as f:
            line = next(line for line in f if line.startswith(f'{name}:'))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def list_group_bytes():
    """Bytes that each control group of this process has left: of a container or a batch job."""
    try:
        with open(GROUPS[0]) as f:
            lines = [line.strip().split(':', 2) for line in f]
    except OSError:
        return
    for _, controllers, path in lines:
        folder, limit_name, usage_name = GROUPS[1], 'memory.max', 'memory.current'
        if controllers:  # version 1 has a folder for each controller
            folder, limit_name, usage_name = (
                f'{GROUPS[1]}/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes')
        if controllers and 'memory' not in controllers.split(','):
            continue
        parts = [part for part in path.split('/') if part]
        for depth in range(len(parts) + 1):  # the groups around it have limits, too
            group = os.path.join(folder, *parts[:depth])
            with contextlib.suppress(OSError, ValueError):  # ValueError: 'max' means no limit
                with open(os.path.join(group, limit_name)) as f:
                    limit_bytes = int(f.read())
                with open(os.path.join(group, usage_name)) as f:
                    used_bytes = int(f.read())
                with open(os.path.join(group, 'memory.stat')) as f:
                    sizes = dict(map(str.split, f))
                # the cache of files counts as used, and is given up when memory is needed
                used_bytes -= int(sizes.get('total_inactive_file', sizes.get('inactive_file', 0)))
                yield max(0, limit_bytes - used_bytes)


def list_limit_bytes():
    """Bytes that the limits of this process leave: ulimit -v and -d."""
    try:
        with open('/proc/self/status') as f:  # only Linux has it
            sizes = dict(line.split(':', 1) for line in f)
    except OSError:
        return
    for limit, name in ((resource.RLIMIT_AS, 'VmSize'), (resource.RLIMIT_DATA, 'VmData')):
        limit_bytes = resource.getrlimit(limit)[0]
        if limit_bytes != resource.RLIM_INFINITY:
            yield max(0, limit_bytes - int(sizes[name].split()[0]) * 1024)


def has_room(num_bytes, device):
    """Whether a copy of this size fits in the free memory of the CPU, with something to spare."""
    if torch.device(device).type != 'cpu':
        return True  # the copy is in the CPU's memory, and the model isn't
    free_bytes = read_free_memory(device)
    return free_bytes is None or free_bytes > 1.2 * num_bytes


def may_reserve():
    """Whether memory that is reserved and not used costs nothing: no limit counts it."""
    with contextlib.suppress(OSError), open('/proc/sys/vm/overcommit_memory') as f:
        if f.read().strip() == '2':  # strict: the system promises no more than it has
            return False
    return not list(list_limit_bytes())


def keep_freed_memory():
    """Makes glibc keep the memory that CPU tensors free, for the next ones.

    By default glibc returns large blocks to the system, so every step maps and zeroes each page
    again: 11.1 s a step of config/train_shakespeare_char.py instead of 7.3. The peak stays equal.

    The first GiB consists of huge pages. Where Linux gives them only on request, a step of a small
    model takes 2 to 4% less time, and the peak is 2 to 6 MiB higher. The GiB is reserved: its pages
    take memory when they are used.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)  # M_MMAP_MAX: every block comes from the heap
    except (OSError, AttributeError):  # another C library
        return
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap doesn't shrink
    # M_MXFAST: no lists of small free blocks that glibc merges whenever a large block is freed. A
    # matmul of oneDNN frees more than a hundred small ones: 1 to 2% of a small model's step
    libc.mallopt(1, 0)
    libc.malloc.restype = ctypes.c_void_p
    size = 2 ** 30
    block = libc.malloc(ctypes.c_size_t(size)) if may_reserve() else None
    if block:
        first_page = ctypes.c_void_p(-(-block // HUGE_PAGE) * HUGE_PAGE)
        libc.madvise(first_page, ctypes.c_size_t(size - HUGE_PAGE), 14)  # MADV_HUGEPAGE
        libc.free(ctypes.c_void_p(block))


def return_freed_memory():
    """Makes glibc give memory that was freed back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL('libc.so.6').malloc_trim(0)


def read_process_bytes():
    """Bytes of memory that this process has, without what it has freed; None without Linux."""
    return_freed_memory()
    return read_linux_size('/proc/self/status', 'VmRSS')


def explain_out_of_memory(device, batch_size, block_size, gradient_accumulation_steps):
    """From here on, running out of memory ends the program with one line that names ways out."""
    def explain(e):
        text = str(e)  # torch has no class of its own for this error on a CPU
        phrases = ('out of memory', "can't allocate memory", 'Cannot allocate memory')
        if not isinstance(e, MemoryError) and not any(phrase in text for phrase in phrases):
            return None
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
        return f'out of memory on {device}: {request} asked for, {free_text} free', remedy

    explain_errors(explain)
