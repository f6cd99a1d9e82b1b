"""
How torch's threads wait for each other on a CPU, and what other processes take from them.

Import it before torch: OpenMP, which runs torch's threads, reads its settings when it is loaded.
"""
import contextlib
import glob
import os
import subprocess
import sys
import time

from runtime.console import note

# At the end of each operation the threads wait for the last one. GNU's OpenMP lets them spin for
# some 10 ms before they sleep. If another process has the CPU of the last thread, they burn the
# time that it needs. 20,000 turns, about a millisecond, are as fast on a quiet machine.
# Other OpenMPs don't read this
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '20000')

CHECK_SECONDS = 5  # between two looks at the waiting times
MAX_WAITING = 0.25  # the share of their time that threads may wait for a CPU without a message


def read_times():
    """Seconds that the threads of this process ran, and that they waited for a CPU, in all.

    Both are 0 where the system doesn't tell: only Linux does.
    """
    ran = waited = 0
    for path in glob.glob('/proc/self/task/*/schedstat'):
        with contextlib.suppress(OSError), open(path) as f:  # the thread may have ended
            nanoseconds = f.read().split()
            ran += int(nanoseconds[0])
            waited += int(nanoseconds[1])
    return ran / 1e9, waited / 1e9


class BusyNote:
    """Says once if this process gets much less CPU time than it asks for."""

    def __init__(self):
        self.next_check = time.monotonic() + CHECK_SECONDS
        self.times = read_times()
        self.was_noted = False

    def check(self):
        """Looks at the time since the last look. Most calls cost nothing."""
        if self.was_noted or time.monotonic() < self.next_check:
            return
        self.next_check = time.monotonic() + CHECK_SECONDS
        times = read_times()
        ran, waited = (now - before for now, before in zip(times, self.times))
        self.times = times
        if waited > MAX_WAITING * (ran + waited):
            share = waited / (ran + waited)
            note(f'this machine is busy: the threads waited for a CPU {100 * share:.0f}% of their '
                 'time, so this is slower than it could be')
            self.was_noted = True


@contextlib.contextmanager
def keep_cores_busy(num_cores, niceness):
    """In this context each core also runs a process of this niceness that never waits."""
    code = f'import os\nhasattr(os, "nice") and os.nice({niceness})\nwhile True: pass'
    processes = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(num_cores)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
