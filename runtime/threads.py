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
            ran, waited, _ = f.read().split()
            times[int(path.split('/')[-2])] = int(ran), int(waited)
    return times


def spread(threads):
    """Moves threads that share a CPU to CPUs without one of these threads, on Linux.

    While one of them spins, the other one can't run. The system leaves them together if as many
    other processes share another CPU: generating ten sequences then took 9 times as long as on a
    quiet machine, and 2.2 times with the threads apart. Each thread may still use the same CPUs.
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
        new_times = {}
        for thread, (ran, waited) in times.items():
            ran_before, waited_before = self.times.get(thread, (0, 0))
            new_times[thread] = ran - ran_before, waited - waited_before  # since the last look
        self.times = times
        ran = sum(ran for ran, _ in new_times.values())
        waited = sum(waited for _, waited in new_times.values())
        if waited <= MAX_WAITING * (ran + waited):
            return
        most = max(map(sum, new_times.values()))
        spread(thread for thread, pair in new_times.items() if sum(pair) > most / 4)
        if not self.was_noted:
            note(f'the threads waited for a CPU {100 * waited / (ran + waited):.0f}% of their '
                 'time, so this is slower than it could be: other programs use this machine, or '
                 'there are more threads than CPUs')
            self.was_noted = True

    def watch(self, steps):
        """Yields what steps yields, and checks after each."""
        for step in steps:
            yield step
            self.check()


# a process that keeps a core busy until its parent has ended
HOG = """
import os, sys
parent = os.getppid()
if hasattr(os, 'nice'):
    os.nice(int(sys.argv[1]))
print('ready', flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
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
                [sys.executable, '-c', HOG, str(niceness)], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        for process in processes:
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
