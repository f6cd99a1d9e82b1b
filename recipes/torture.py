"""
Tries to make a run lose something, and a file do harm: kills, damaged files, mistakes. Linux only.

    python recipes/torture.py
    python recipes/torture.py --kills=100 --files=400 --minutes=15

A killed run must end with the bits of one that was not killed. A damaged file must be used or
refused in one line. No mistake may delete what was saved. When the minutes are over it stops, and
the table says how much it did. The exit status is 0 if nothing went wrong. The last line is JSON.
"""
import atexit
import glob
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from hostile_files import GOOD_OUTCOMES, make_good_files, run_script, try_files

from runtime import checkpoint
from runtime.console import ROOT
from runtime.dataset import DataOrder

kills = 100  # kill -9, of runs with 1 or 2 ranks, by AdamW or Muon
files = 400  # damaged files of each kind, and at least those that hostile_files.py lists
minutes = 20.0  # it begins nothing new after them
seed = 1337  # of all that it draws
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

PHASES = 'elsewhere', 'within a save', 'during start-up'
ARGS = ['--device=cpu', '--dtype=float32', '--n_layer=1', '--n_head=2', '--n_embd=256',
        '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=1',
        '--dropout=0.1', '--decay_lr=False', '--eval_interval=25', '--save_interval=4']


def start(ranks, log, *args):
    """Starts train.py in that many processes, which print to log.0, log.1; RANK is the number."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = str(s.getsockname()[1])
    run = []
    for rank in map(str, range(ranks)):
        env = dict(os.environ, OMP_NUM_THREADS='1', MASTER_ADDR='localhost', MASTER_PORT=port,
                   RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks))
        command = [sys.executable, os.path.join(ROOT, 'train.py'), *ARGS, '--dataset=data',
                   *(arg.replace('RANK', rank) for arg in args)]
        with open(f'{log}.{rank}', 'w') as f:
            run.append(subprocess.Popen(command, env=env, stdout=f, stderr=f))
    processes.extend(run)
    return run


def read_log(log):
    with open(f'{log}.0', encoding='utf-8') as f:
        return f.read()


def count_iterations(log):
    return read_log(log).count('\niter ')


def wait_for(condition, run, log):
    """Waits until the condition holds. AssertionError if the run ends before, or hangs."""
    end = time.monotonic() + 300
    while not condition():
        is_over = any(process.poll() is not None for process in run)
        assert not is_over and time.monotonic() < end, f'ended or hangs: {read_log(log)[-300:]!r}'
        time.sleep(0.0005)


def train(out_dir, *args, iterations=None, ranks=1, status=0):
    """Trains to the end, or until Ctrl-C after so many iterations; returns what it printed."""
    run = start(ranks, out_dir, f'--out_dir={out_dir}', *args)
    if iterations:
        wait_for(lambda: count_iterations(out_dir) >= iterations, run, out_dir)
        run[0].send_signal(signal.SIGINT)
        status = 130
    statuses = {process.wait(600) for process in run}
    assert statuses == {status}, f'exit status {statuses}: {read_log(out_dir)[-300:]!r}'
    return read_log(out_dir)


def kill(run):
    for process in run:
        process.kill()
        process.wait()


def find_newest(out_dir):
    """The iteration of the newest checkpoint in the folder; -1 if there is none."""
    return max(map(checkpoint.read_iter_num, (f'{out_dir}/ckpt.pt', f'{out_dir}/ckpt_last.pt')))


# -----------------------------------------------------------------------------
# kills
def kill_once(ranks, out_dir, args, phase, spans):
    """Starts the run and kills it, in this phase if possible; returns (phase, what it printed)."""
    begin = time.monotonic()
    iterations = draw.randint(1, 20)
    pause = draw.uniform(0, spans[phase])
    order = draw.sample(range(ranks), ranks)
    delay = draw.choice([0, 0.1, 0.3]) * (ranks - 1)  # what does the rank that is left do?
    run = start(ranks, out_dir, *args, f'--out_dir={out_dir}', '--max_iters=1000000')
    if phase != 'during start-up':
        wait_for(lambda: count_iterations(out_dir), run, out_dir)
        spans['during start-up'] = time.monotonic() - begin
        wait_for(lambda: count_iterations(out_dir) >= iterations, run, out_dir)
    elif iterations > 10:  # after the imports
        wait_for(lambda: read_log(out_dir), run, out_dir)
        pause /= 20
    if phase == 'within a save':
        wait_for(lambda: glob.glob(f'{out_dir}/*.tmp'), run, out_dir)
    time.sleep(pause)
    text = read_log(out_dir)
    assert not re.search('error: |warning: |Traceback', text), text[-300:]
    run[order[0]].kill()
    is_saving = bool(glob.glob(f'{out_dir}/*.tmp'))
    time.sleep(delay)
    kill(run)
    actual_phase = 'within a save' if is_saving else 'elsewhere'
    if '\niter ' not in text:
        actual_phase = 'during start-up'
    if phase != 'elsewhere':
        spans[phase] *= 1.1 if phase == actual_phase else 0.7
    return actual_phase, text


def kill_often(ranks, optim, count, end):
    """Kills a run that often; compares its end with a run without kills. Returns counts."""
    out_dir = f'{optim}-{ranks}'
    args = [f'--optim={optim}', '--init_from=auto']
    spans = {'elsewhere': 0.05, 'within a save': 0.02, 'during start-up': 4.0}  # seconds
    counts = Counter({phase: 0 for phase in PHASES})
    newest = -1
    while sum(counts[phase] for phase in PHASES) < count and time.monotonic() < end:
        phase, text = kill_once(ranks, out_dir, args, min(PHASES, key=counts.get), spans)
        counts.update([phase, *re.findall(r'resumed from \S*/(ckpt\w*\.pt) ', text)])
        assert find_newest(out_dir) >= newest, f'iteration {newest} was saved, and is lost'
        newest = find_newest(out_dir)
    states = []
    for folder in (out_dir, f'{out_dir}-whole'):
        train(folder, *args, f'--max_iters={max(newest, 0) + 10}', ranks=ranks)
        state = checkpoint.load(os.path.join(folder, 'ckpt.pt'))
        states.append((state['model'], state['optimizer']['state'], state['iter_num']))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    return dict(counts)


# -----------------------------------------------------------------------------
# acts: each raises AssertionError if it goes wrong
def refuse(reason, *command):
    outcome, text = run_script(*command)
    assert outcome == 'refused' and reason in text, text


def forget_the_flag():
    """300 iterations, then twice without --init_from"""
    newest = []
    for iterations in (300, 5, 5):
        train('forget', iterations=iterations)
        newest.append(find_newest('forget'))
    folders = ('forget/previous-1', 'forget/previous-2', 'forget')
    assert [*map(find_newest, folders)] == newest and newest[0] >= 300, f'not all of {newest}'


def rename_the_folder():
    """a folder is renamed while its run trains, and another run starts in its place"""
    first = start(1, 'first', '--out_dir=rename', '--seed=1')
    wait_for(lambda: count_iterations('first') > 5, first, 'first')
    os.rename('rename', 'renamed')
    train('rename', '--seed=2', iterations=10)
    first[0].send_signal(signal.SIGINT)
    first[0].wait(300)
    for folder, log, number in (('renamed', 'first', 1), ('rename', 'rename', 2)):
        state, _ = checkpoint.load_newest(folder)
        assert state['config']['seed'] == number, f'{folder} has the other run'
        assert state['iter_num'] == count_iterations(log), f'{folder} lacks iterations'


def start_twice():
    """a second run in the folder of a run"""
    first = start(1, 'first', '--out_dir=twice')
    wait_for(lambda: count_iterations('first'), first, 'first')
    refuse('is writing to it', 'train.py', *ARGS, '--dataset=data', '--out_dir=twice')
    kill(first)


def change_the_data():
    """other data, and then half of it, before a resume"""
    shutil.copytree('data', 'changed')
    train('change', '--dataset=changed', iterations=5)
    tokens = np.fromfile('changed/train.bin', np.uint16)[::-1]
    for new_tokens in (tokens, tokens[::2]):
        new_tokens.tofile('changed/train.bin')
        text = train('change', '--dataset=changed', '--init_from=auto', iterations=5)
        assert 'warning: the data is not that of the checkpoint: train.bin' in text, text


def mix_settings():
    """two ranks with different settings"""
    run = start(2, 'mix', '--out_dir=mix', '--seed=RANK')
    status = run[0].wait(300)
    kill(run)
    assert status == 1, f'status {status}'
    assert 'error: rank 1 does not run what rank 0 runs: --seed is 1' in read_log('mix')
    assert find_newest('mix') == -1, 'a checkpoint was written'


def cut_the_mapped_file():
    """train.bin is cut in half while a run reads it"""
    shutil.copytree('data', 'cut-data')
    run = start(1, 'cut', '--out_dir=cut', '--dataset=cut-data')
    wait_for(lambda: count_iterations('cut') > 10, run, 'cut')
    os.truncate('cut-data/train.bin', os.path.getsize('cut-data/train.bin') // 4 * 2)
    status = run[0].wait(300)
    assert status == 1 and 'was cut short' in read_log('cut'), f'status {status}'
    assert find_newest('cut') >= count_iterations('cut') > 10, 'the state is not saved'


def break_an_iteration():
    """an id that the vocabulary lacks is in the middle of train.bin"""
    shutil.copytree('data', 'bad-data')
    tokens = np.memmap('bad-data/train.bin', np.uint16)
    order = DataOrder('random', 1337, len(tokens), 32, 4, 2)  # by train.py's seed and ARGS
    tokens[order.get_starts(20, 0)[0]] = 60000
    text = train('break', '--dataset=bad-data', status=1)
    assert 'has token id 60000' in text and 'Traceback' not in text, text
    newest = find_newest('break')
    assert newest == count_iterations('break') > 0, f'iteration {newest} is saved'
    text = train('break', '--init_from=auto', iterations=5)
    assert f' at iteration {newest}' in text, text


def shrink_the_context():
    """a smaller --block_size at a resume"""
    train('shrink', iterations=5)
    refuse('block_size=16 would cut the context', 'train.py', *ARGS, '--dataset=data',
           '--out_dir=shrink', '--init_from=auto', '--block_size=16')


def sample_from_nan():
    """text from weights that are not finite"""
    train('nan', iterations=5)
    state, _ = checkpoint.load_newest('nan')
    state['model']['transformer.ln_f.weight'] *= float('nan')
    checkpoint.save(state, 'nan')
    refuse('are not finite', 'sample.py', '--out_dir=nan')


ACTS = (forget_the_flag, rename_the_folder, start_twice, change_the_data, mix_settings,
        cut_the_mapped_file, break_an_iteration, shrink_the_context, sample_from_nan)


def attempt(part, case, call, *args):
    """Calls a function and prints a row of the table; returns whether it failed."""
    problem, counts = '', {}
    try:
        counts = call(*args) or {}
    except (AssertionError, OSError, SystemExit, ValueError, subprocess.TimeoutExpired) as e:
        problem = ' '.join(str(e).split()) or 'it went wrong'
    result[part][case] = problem or counts
    outcome = ', '.join(f'{count} {name}' for name, count in counts.items())
    print(f'| {part} | {case} | {problem or outcome or "ok"} |', flush=True)
    return bool(problem)


torch.set_num_threads(1)  # a fork of a process with threads would hang
draw = random.Random(seed)
processes = []
atexit.register(lambda: kill(processes))
begin = time.monotonic()
result = dict(seed=seed, bad=0, kills={}, files={}, acts={})
with tempfile.TemporaryDirectory() as work:
    os.chdir(work)
    make_good_files()
    print('| part | case | outcome |\n| --- | --- | --- |')
    for act in ACTS:
        result['bad'] += attempt('acts', act.__doc__, act)
    for i, (ranks, optim) in enumerate([(1, 'adamw'), (1, 'muon'), (2, 'adamw'), (2, 'muon')]):
        end = begin + minutes * (18 + 8 * i)  # after 70% of the time the files' turn comes
        result['bad'] += attempt('kills', f'{optim}, {ranks} ranks', kill_often, ranks, optim,
                                 (kills + i) // 4, end)
    for kind, counts in try_files(files, begin + 60 * minutes, seed).items():
        result['bad'] += sum(counts[name] for name in counts if name not in GOOD_OUTCOMES)
        attempt('files', kind, counts.copy)
    os.chdir(ROOT)
print(json.dumps({**result, 'seconds': round(time.monotonic() - begin)}))
sys.exit(result['bad'] > 0)
