"""
Measures the time of some work, or of two works in turns, and the device's own rates.

Work is a function without arguments that does the work once. If it runs a process, it returns what
the process printed.
"""
import json
import os
import shlex
import statistics
import subprocess
import sys
import time

import torch

from runtime.console import fail, make_folder
from runtime.machine import synchronize

MAX_SECONDS = 20  # for the repetitions of one work; 60 for two in turns


def run_process(command):
    """Work that runs a command from start to end. It prints the output only if it fails."""
    def work():
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as e:
            fail(f'{command[0]!r} cannot be run ({e.strerror})',
                 'compare with hf, slices or a command')
        if result.returncode:
            output = (result.stderr or result.stdout).strip()[-500:]
            fail(f'{shlex.join(command)} ended with status {result.returncode}: {output}')
        return result.stdout
    return work


def measure(work, device, repeats=1, tokens=None):
    """The seconds of the work, as the mean of some repetitions in a row.

    If it ran a command, and `tokens` are known, the command's own tokens_per_s count.
    """
    synchronize(device)
    t0 = time.perf_counter()
    for _ in range(repeats):
        output = work()
    synchronize(device)
    if isinstance(output, str) and tokens:
        try:
            return tokens / json.loads(output.splitlines()[-1])['tokens_per_s']
        except (ValueError, KeyError, IndexError):
            fail("the command's last line is not JSON with tokens_per_s")
    return (time.perf_counter() - t0) / repeats


def measure_row(work, device, tokens):
    """measure(), with short work repeated for a third of a second, as in training.

    Then the device need not be waited for in between.
    """
    seconds = measure(work, device, tokens=tokens)
    repeats = min(100, int(0.3 / seconds))
    return measure(work, device, repeats, tokens) if repeats > 1 else seconds


def measure_in_turns(works, device, repeats, tokens, short_works):
    """The seconds of each of the works, measured in turns: a list for each.

    There are at least 3 measurements and at most `repeats`. measure_row() measures the works in
    short_works.
    """
    results = [[] for _ in works]
    start = time.perf_counter()
    limit = MAX_SECONDS if len(works) == 1 else 3 * MAX_SECONDS
    while len(results[0]) < 3 or (len(results[0]) < repeats
                                  and time.perf_counter() - start < limit):
        for work, seconds in zip(works, results):
            if work in short_works and tokens:
                seconds.append(measure_row(work, device, tokens))
            else:
                seconds.append(measure(work, device, tokens=tokens))
    return results


def warm_up(works, device):
    """Does each work once, and again if that was short."""
    print('warming up', flush=True)
    start = time.perf_counter()
    for work in works:
        if measure(work, device) < MAX_SECONDS:
            measure(work, device)
    print(f'warmed up in {time.perf_counter() - start:.1f} s', flush=True)


def start_profiler(out_dir):
    """Starts torch's profiler, after making the folder for its trace."""
    make_folder(out_dir)
    profiler = torch.profiler.profile()
    profiler.start()
    return profiler


def print_profile(profiler, device_type, out_dir):
    """Prints the top operators, and writes the trace to out_dir/trace.json."""
    profiler.stop()
    trace = os.path.join(out_dir, 'trace.json')
    profiler.export_chrome_trace(trace)
    if device_type not in ('cpu', 'cuda', 'xpu'):
        device_type = 'cpu'
    order = f'self_{device_type}_time_total'
    print(profiler.key_averages().table(order, row_limit=15, max_name_column_width=50))
    print(f'trace: {trace}; open it in chrome://tracing or ui.perfetto.dev')


# -----------------------------------------------------------------------------
# the device's own rates
def measure_best(work, device):
    measure(work, device)
    return min(measure(work, device) for _ in range(3))


def measure_matmul_rates(device, dtype):
    """{size: FLOP/s} of square matmuls, each the best of three."""
    rates = {}
    for n in (1024, 2048, 4096):
        a = torch.randn(n, n, device=device, dtype=dtype)
        b = torch.randn(n, n, device=device, dtype=dtype)
        rates[n] = 2 * n ** 3 / measure_best(lambda: a @ b, device)
    return rates


def measure_read_rate(device):
    """Bytes per second at which a GiB is read, the best of three."""
    x = torch.ones(2 ** 28, device=device)
    return x.nbytes / measure_best(x.sum, device)


def read_peak_memory(device):
    """The largest number of bytes that this process had on the device; None if it isn't known.

    On a CPU it is the process's resident memory.
    """
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows doesn't have it
    except ImportError:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_prefill_flops(config, num_params, rows, length):
    """The FLOPs of a forward pass of `rows` prompts of this length.

    The output layer computes only the last token. A token attends to half of the prompt on average.
    """
    head = config.vocab_size * config.n_embd
    attention = 2 * config.n_layer * config.n_embd * length * rows * length
    return 2 * (num_params - head) * rows * length + 2 * head * rows + attention


# -----------------------------------------------------------------------------
# the report; each function prints rows of the table and returns what goes into the JSON
def print_row(name, values, digits=3):
    """A row with the smallest, the median and the largest value."""
    columns = (min(values), statistics.median(values), max(values))
    print(f'{name:26}' + ''.join(f' {value:12,.{digits}f}' for value in columns))


def print_times(times, their_times, tokens):
    """Our seconds; theirs, and the ratios in pairs, if their_times aren't None; tokens/s."""
    result = {}
    print(f'\n{"":26} {"min":>12} {"median":>12} {"max":>12}   of {len(times)}')
    print_row('ms, ours', [1000 * t for t in times])
    if their_times:
        ratios = [theirs / ours for ours, theirs in zip(times, their_times)]
        result['their_ms_per_iter'] = 1000 * statistics.median(their_times)
        result['ratio'] = statistics.median(ratios)
        print_row('ms, theirs', [1000 * t for t in their_times])
        print_row('times as fast, in pairs', ratios, 2)
    if tokens:
        result['tokens_per_s'] = tokens / statistics.median(times)
        print_row('tokens/s', [tokens / t for t in times], 0)
    return result


def print_matmul_share(times, flops, device, dtype):
    """The FLOP/s, and their share of the device's matmul rate."""
    rates = measure_matmul_rates(device, dtype)
    rate = max(rates.values())
    share = flops / statistics.median(times) / rate
    print_row('TFLOP/s', [flops / t / 1e12 for t in times])
    sizes = ', '.join(f'{n}: {value / 1e12:.3f}' for n, value in rates.items())
    print(f'{"matmul rate, TFLOP/s":26} {rate / 1e12:12.3f}   best of {sizes} square, {dtype}')
    print(f'{"share of the matmul rate":26} {100 * share:11.1f}%')
    return dict(matmul_flops_per_s=rate, share_of_matmul_rate=share)


def print_read_share(times, tokens, num_bytes, device):
    """The time per token, and its share of the time in which num_bytes are read."""
    rate = measure_read_rate(device)
    seconds = num_bytes / rate
    share = seconds * tokens / statistics.median(times)
    print_row('ms per token', [1000 * t / tokens for t in times])
    print(f'{"reading the weights, ms":26} {1000 * seconds:12.3f}   at {rate / 1e9:.1f} GB/s')
    print(f'{"share of the read rate":26} {100 * share:11.1f}%')
    return dict(read_bytes_per_s=rate, share_of_read_rate=share)
