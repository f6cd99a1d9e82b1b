"""
The machine: which device, number format and compiling to use and why, and how fast it can be.
"""
import importlib.util
import os
import re

import torch

from runtime.console import fail
from runtime.memory import keep_freed_memory


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


def fit_dtype(weights, dtype, device_type, compile):
    """The setting dtype for this setting `weights` of sampling; fails if that can't be had."""
    if weights in ('int8', 'int4') and device_type != 'cpu':
        fail(f'weights={weights} works only on a CPU, and this is {device_type}',
             'leave it out, or add --device=cpu')
    if weights in ('int8', 'int4') and torch.backends.quantized.engine == 'none':
        fail(f'weights={weights} does not work with this build of torch', 'leave it out')
    if weights in ('int8', 'int4') and compile is True:
        fail(f'weights={weights} does not work with compile=True', 'leave one of them out')
    if weights != 'bfloat16':
        return dtype
    if dtype not in ('auto', 'bfloat16'):
        fail(f'weights=bfloat16 does not work with dtype={dtype}', 'leave one of them out')
    return 'bfloat16'


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
    # denormal numbers become zero, because arithmetic with them is slow: where softmax made many of
    # them, a step of 11M parameters took 1.5 times as long. Threads inherit it when they start
    torch.set_flush_denormal(True)
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
