"""
How much faster several processes train than one, each pinned to a CPU core of its own: tokens/s of both in turns, Linux.

    python recipes/scaling.py config/train_shakespeare_char.py --parallel=ddp

The arguments are train.py's; one process has one micro-batch an iteration, n have n. The last line is JSON.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PROCESSES, PAIRS, ITERS = 2, 3, 6
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'train.py')


def ms_per_iter(processes, port):
    """The median of all iterations but the first, which warms up."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, TRAIN, *sys.argv[1:], '--device=cpu', '--eval_interval=1000000', '--eval_iters=1', '--log_interval=1',
                   f'--gradient_accumulation_steps={processes}', f'--max_iters={ITERS}', f'--out_dir={out_dir}']
        env = dict(os.environ, OMP_NUM_THREADS='1', WORLD_SIZE=str(processes), MASTER_ADDR='localhost', MASTER_PORT=str(port))
        ranks = [subprocess.Popen(command, env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), stdout=subprocess.DEVNULL,
                                  preexec_fn=lambda core=rank: os.sched_setaffinity(0, {cores[core]})) for rank in range(processes)]
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):  # the others would wait for it
                [rank.kill() for rank in ranks]
            time.sleep(0.1)
        if any(rank.wait() for rank in ranks):
            sys.exit('error: train.py has failed; its own line says why')
        with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
            return statistics.median([e['ms'] for e in map(json.loads, f) if e['event'] == 'iter'][1:])


if {'-h', '--help'} & set(sys.argv):
    sys.exit(print(__doc__))
cores = sorted(os.sched_getaffinity(0))
if len(cores) < PROCESSES:
    sys.exit(f'error: {len(cores)} cores are not enough for {PROCESSES} processes')
ratios = []
for pair in range(PAIRS):
    one, many = ms_per_iter(1, 29600 + 2 * pair), ms_per_iter(PROCESSES, 29601 + 2 * pair)
    ratios.append(round(PROCESSES * one / many, 3))
    print(f'one process: {one:.0f} ms an iteration, {PROCESSES}: {many:.0f} ms of {PROCESSES} times the tokens, {ratios[-1]:.2f} times as fast', flush=True)
print(json.dumps(dict(processes=PROCESSES, ratios=ratios, ratio=statistics.median(ratios))))
