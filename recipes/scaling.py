"""
Measures how much faster several processes train than one, each on a CPU core of its own.

    python recipes/scaling.py config/train_shakespeare_char.py --parallel=ddp

It runs on Linux only, as it pins each process to a core. The arguments are train.py's. One process
has one micro-batch per iteration, n processes have n. Runs with one and with several processes
alternate, and the median of the pairs' ratios counts. The last line is JSON.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PROCESSES = 2
PAIRS = 3
ITERS = 6  # of each run
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'train.py')


def start_rank(command, rank, world_size, port):
    """Starts train.py as one of world_size processes, on a core of its own."""
    env = dict(os.environ, OMP_NUM_THREADS='1', MASTER_ADDR='localhost', MASTER_PORT=str(port),
               WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL,
                            preexec_fn=lambda: os.sched_setaffinity(0, {cores[rank]}))


def wait_for(ranks):
    """Waits until all processes have ended. If one fails, it ends the others and this script."""
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):  # the others would wait for it
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    if any(rank.wait() for rank in ranks):
        sys.exit('error: train.py has failed; its own line says why')


def measure(processes, port):
    """Milliseconds per iteration: the median of all but the first, which warms up."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, TRAIN, *sys.argv[1:], '--device=cpu', '--eval_interval=1000000',
                   '--eval_iters=1', '--log_interval=1',
                   f'--gradient_accumulation_steps={processes}', f'--max_iters={ITERS}',
                   f'--out_dir={out_dir}']
        wait_for([start_rank(command, rank, processes, port) for rank in range(processes)])
        with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
            events = [json.loads(line) for line in f]
    return statistics.median([e['ms'] for e in events if e['event'] == 'iter'][1:])


if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    sys.exit()
cores = sorted(os.sched_getaffinity(0))
if len(cores) < PROCESSES:
    sys.exit(f'error: {len(cores)} cores are not enough for {PROCESSES} processes')
ratios = []
for pair in range(PAIRS):
    one = measure(1, 29600 + 2 * pair)
    several = measure(PROCESSES, 29601 + 2 * pair)
    ratio = round(PROCESSES * one / several, 3)
    ratios.append(ratio)
    print(f'one process: {one:.0f} ms per iteration, {PROCESSES} processes: {several:.0f} ms for '
          f'{PROCESSES} times the tokens, {ratio:.2f} times as fast', flush=True)
print(json.dumps(dict(processes=PROCESSES, ratios=ratios, ratio=statistics.median(ratios))))
