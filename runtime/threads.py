"""
How torch's threads wait for each other on a CPU, and what other processes take from them.

Import it before torch: OpenMP, which runs torch's threads, reads its settings when it is loaded.
"""
import contextlib
import glob
import os
import platform
import subprocess
import sys
import time

from runtime.console import note

OUTER_ENV = dict(os.environ)  # for commands that don't belong to this project

# At the end of each operation the threads wait for the last one. GNU's OpenMP lets them spin in a
# long loop before they sleep. They waste the CPU's time if the last thread waits for a CPU that
# another process uses. On a quiet Intel Xeon a sequence was generated as fast with 20,000 turns of
# that loop, and 1.6% slower with 10,000. A turn has another length on CPUs that are not x86. Other
# OpenMPs ignore this variable
if platform.machine() in ('x86_64', 'AMD64') and 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '20000')

CHECK_SECONDS = 2  # between two looks at the waiting times
MAX_WAITING = 0.25  # if threads wait a larger share of their time for a CPU, they are moved


def read_times():
    """{thread: (nanoseconds that it ran, nanoseconds that it waited for a CPU)} of this process.

    It is empty where the system doesn't tell: only Linux does.
    """
    times = {}
    for path in glob.glob('/proc/self/task/*/schedstat'):
        with contextlib.suppress(OSError), open(path) as f:  # the thread may have ended
            run_time, wait_time, _ = f.read().split()
            times[int(path.split('/')[-2])] = int(run_time), int(wait_time)
    return times


def subtract(times, times_before):
    """What the threads ran and waited since times_before, in the form of read_times()."""
    new_times = {}
    for thread, (run_time, wait_time) in times.items():
        run_time_before, wait_time_before = times_before.get(thread, (0, 0))
        new_times[thread] = run_time - run_time_before, wait_time - wait_time_before
    return new_times


def spread(threads):
    """Moves threads that share a CPU to CPUs without one of these threads, on Linux.

    While one of them spins, the other one can't run. Linux doesn't move them apart if two other
    processes share another CPU: generating ten sequences then took 9 times as long as on a quiet
    machine, and 2.2 times with the threads apart. Each thread may still use the same CPUs.
    """
    threads_by_cpu = {}
    for thread in threads:
        with contextlib.suppress(OSError), open(f'/proc/self/task/{thread}/stat') as f:
            cpu = int(f.read().rsplit(')', 1)[1].split()[36])
            threads_by_cpu.setdefault(cpu, []).append(thread)
    for _, *others in list(threads_by_cpu.values()):
        for thread in others:
            with contextlib.suppress(OSError):
                allowed_cpus = os.sched_getaffinity(thread)
                free_cpus = sorted(allowed_cpus - threads_by_cpu.keys())
                if free_cpus:
                    cpu = free_cpus[thread % len(free_cpus)]  # other ranks choose others
                    threads_by_cpu[cpu] = [thread]
                    try:
                        os.sched_setaffinity(thread, {cpu})
                    finally:
                        os.sched_setaffinity(thread, allowed_cpus)


class BusyNote:
    """Says once if this process gets much less CPU time than it asks for, and spreads its threads.

    Only threads that ran or waited much are moved.
    """

    def __init__(self):
        self.next_check = time.monotonic() + CHECK_SECONDS
        self.times = read_times()
        self.was_noted = False

    def check(self):
        """Looks at the time since the last look, if that was some seconds ago."""
        if time.monotonic() < self.next_check:
            return
        self.next_check = time.monotonic() + CHECK_SECONDS
        times = read_times()
        new_times = subtract(times, self.times)
        self.times = times
        total_time = sum(map(sum, new_times.values()))
        wait_time = sum(pair[1] for pair in new_times.values())
        if wait_time <= MAX_WAITING * total_time:
            return
        max_time = max(map(sum, new_times.values()))
        spread(thread for thread, pair in new_times.items() if sum(pair) > max_time / 4)
        if not self.was_noted:
            note(f'the threads waited for a CPU {100 * wait_time / total_time:.0f}% of their time, '
                 'so this is slower than it could be: other programs use this machine, there are '
                 'more threads than CPUs, or a container limits the CPU time '
                 '(docs/troubleshooting.md has more)')
            self.was_noted = True

    def watch(self, steps):
        """Yields what steps yields, and checks after each."""
        for step in steps:
            yield step
            self.check()


# a process that keeps a core busy until its parent has ended, which closes its stdin
HOG = """
import os, sys, threading

def wait_for_the_end():
    sys.stdin.read()
    os._exit(0)

if hasattr(os, 'nice'):
    os.nice(int(sys.argv[1]))
threading.Thread(target=wait_for_the_end, daemon=True).start()
print('ready', flush=True)
while True:
    pass
"""


@contextlib.contextmanager
def keep_cores_busy(niceness):
    """In this context each core also runs a process that never waits, nicer by so much."""
    num_cores = os.cpu_count()
    if hasattr(os, 'sched_getaffinity'):
        num_cores = len(os.sched_getaffinity(0))
    processes = []
    try:
        for _ in range(num_cores):
            processes.append(subprocess.Popen(
                [sys.executable, '-c', HOG, str(niceness)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        for process in processes:
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
