"""
Measures the time of some work, or of two works in turns, and the device's own rates.

Work is a function that does the work once. If it runs a process, it returns what that printed.
"""
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time

import torch

from runtime.console import fail, make_folder
from runtime.machine import synchronize
from runtime.memory import read_free_memory
from runtime.threads import OUTER_ENV, keep_cores_busy

MAX_SECONDS = 20  # for the repetitions of one work; 60 for two in turns


def run_process(command):
    """Work that runs a command from start to end. It prints the output only if it fails.

    With --turns=True the command is started once. It must do the work for each line that it reads,
    and then print a line.
    """
    if '--turns=True' in command:
        return take_turns(command)

    def work():
        try:
            result = subprocess.run(command, capture_output=True, text=True, env=OUTER_ENV)
        except OSError as e:
            fail(f'{command[0]!r} cannot be run ({e.strerror})',
                 'compare with hf, slices or a command')
        if result.returncode:
            output = (result.stderr or result.stdout).strip()[-500:]
            fail(f'{shlex.join(command)} ended with status {result.returncode}: {output}')
        return result.stdout
    return work


def take_turns(command):
    """run_process() of a command that stays and does the work again and again."""
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=OUTER_ENV)
    except OSError as e:
        fail(f'{command[0]!r} cannot be run ({e.strerror})')

    def work():
        with contextlib.suppress(OSError):  # it has ended: there is no line to read
            print(file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            fail(f'{shlex.join(command)} ended with status {process.wait()}')
        return line

    work()  # otherwise it would load while the first work is measured
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
    """measure(), with short work repeated for a second, as in training.

    Then the device need not be waited for in between.
    """
    seconds = measure(work, device, tokens=tokens)
    repeats = min(100, int(1 / seconds))
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
    """Prints the top operators and the shares of the time, which it returns; writes a trace."""
    profiler.stop()
    trace = os.path.join(out_dir, 'trace.json')
    profiler.export_chrome_trace(trace)
    if device_type not in ('cpu', 'cuda', 'xpu'):
        device_type = 'cpu'
    order = f'self_{device_type}_time_total'
    print(profiler.key_averages().table(order, row_limit=15, max_name_column_width=50))
    events = [(event.name, event.time_range.start, event.time_range.end)
              for event in profiler.events() if event.device_type.name.lower() == device_type
              and not getattr(event, 'is_user_annotation', False)]
    shares = compute_shares(events)
    print(', '.join(f'{kind}: {100 * share:.1f}% of the time' for kind, share in shares.items()))
    print(f'trace: {trace}; open it in chrome://tracing or ui.perfetto.dev')
    return shares


# a fused kernel of torch.compile has the names of all it computes, but is not one of these
FUSED = '^(?!triton_(?!tem_)|cpp_fused)'
ATTENTION = re.compile(FUSED + '.*(flash|fmha|attention)')
MATMUL = re.compile(FUSED + '.*(gemm|nvjet|xmma|cutlass|(:|_)(add|b|badd)?mm($|_)|linear)')


def compute_shares(events):
    """The shares of the time in which a device computes attention, matmuls or something else.

    events are (name, start, end) each: kernels of a GPU, or operators of a CPU, which may contain
    each other. In the gaps the device does nothing: it waits for the host.
    """
    if not events:
        return {}
    first_start, last_end = min(start for _, start, _ in events), max(end for *_, end in events)
    attention = [event for event in events if ATTENTION.search(event[0])]
    attention_time = unite(attention)
    matmul_time = unite(attention + [event for event in events if MATMUL.search(event[0])])
    busy_time = unite(events)
    times = {'attention': attention_time, 'matmul': matmul_time - attention_time,
             'other': busy_time - matmul_time, 'gaps': last_end - first_start - busy_time}
    return {kind: time / (last_end - first_start) for kind, time in times.items()}


def unite(events):
    """The time in which at least one of the events runs."""
    total = latest_end = 0
    for _, start, end in sorted(events, key=lambda event: event[1]):
        start = max(start, latest_end)
        total += max(0, end - start)
        latest_end = max(latest_end, end)
    return total


# -----------------------------------------------------------------------------
# the device's own rates
def measure_best(work, device):
    """The seconds of the work, the best of three timings; short work is repeated within each."""
    measure(work, device)
    repeats = max(1, min(200, int(0.1 / measure(work, device))))
    return min(measure(work, device, repeats) for _ in range(3))


def measure_matmul_rates(device, dtype):
    """{size: FLOP/s} of square matmuls, each the best of three."""
    rates = {}
    is_cpu = torch.device(device).type == 'cpu'
    for n in (1024, 2048, 4096) if is_cpu else (2048, 4096, 8192):
        a = torch.randn(n, n, device=device, dtype=dtype)
        b = torch.randn(n, n, device=device, dtype=dtype)
        rates[n] = 2 * n ** 3 / measure_best(lambda: a @ b, device)
    return rates


def measure_read_rate(device):
    """Bytes per second at which memory is read, 1 GiB on a CPU, up to 4 GiB elsewhere."""
    num_bytes = 2 ** 30
    if torch.device(device).type != 'cpu':  # a GPU reads 1 GiB in 0.3 ms
        num_bytes = min(2 ** 32, (read_free_memory(device) or 2 ** 32) // 4)
    x = torch.ones(num_bytes // 4, device=device)
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


def print_slowdowns(work, device, repeats, tokens, short_works):
    """Measures the work alone, and next to processes that keep the cores busy."""
    result = {}
    times_alone, = measure_in_turns([work], device, repeats, tokens, short_works)
    print_row('ms, alone', [1000 * t for t in times_alone])
    for niceness in (10, 0) if hasattr(os, 'nice') else (0,):
        with keep_cores_busy(niceness):
            times, = measure_in_turns([work], device, repeats, tokens, short_works)
        slowdown = statistics.median(times) / statistics.median(times_alone)
        print_row(f'ms, next to nice {niceness}', [1000 * t for t in times])
        print(f'{"times as long as alone":26} {slowdown:25.2f}')
        result[f'slowdown_next_to_nice_{niceness}'] = slowdown
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
