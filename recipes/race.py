"""
Compares nanoGPT's CPU recipe with the fast recipe, at three lengths: a table, and race.png.

    python recipes/race.py [FOLDER]

It needs data/shakespeare_char, and takes five minutes on 2 CPU cores. The runs are one after the
other; run nothing else at the same time. FOLDER is where the runs and race.png are written
(out-race).

The baseline for the seconds is nanoGPT's recipe in plain PyTorch, recipes/peers/plain.py.

A val loss is the mean over the whole val split, in windows of 64 tokens. Seconds count only the
training. The last line is JSON. It runs wherever train.py does.
"""
import json
import os
import shutil
import subprocess
import sys

from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from plot import locate, read_metrics
from runtime.console import ROOT

LENGTHS = (80, 140, 1100)  # iterations; 1,100 take a little less time than nanoGPT's 2,000


def train(name, config, *flags):
    """Runs train.py in the folder of this name; returns a row of the table."""
    print(f'training {name}', file=sys.stderr)
    out_dir = os.path.join(folder, name)
    shutil.rmtree(out_dir, ignore_errors=True)
    command = [sys.executable, 'train.py', f'config/{config}.py', *flags, '--eval_iters=0',
               '--log_interval=10', f'--out_dir={out_dir}']
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if run.returncode:
        sys.exit(run.returncode)  # train.py has printed what is wrong
    iterations, evaluations = read_metrics(out_dir)
    last = evaluations[-1]
    seconds = locate(evaluations, iterations, 'seconds')[-1]
    return name, last['iter'], round(seconds, 2), round(last['val/loss'], 4)


def run_plain():
    """Runs nanoGPT's recipe in plain PyTorch; returns a row of the table."""
    script = os.path.join(ROOT, 'recipes', 'peers', 'plain.py')
    data_dir = os.path.join(ROOT, 'data', 'shakespeare_char')
    command = [sys.executable, script, 'learn', f'--data={data_dir}']
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(run.stdout.splitlines()[-1])
    return 'plain', result['iters'], round(result['seconds'], 2), result['val_loss']


def draw(names):
    """Draws the val losses of the runs against seconds and against tokens, as race.png."""
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    for panel, x in zip(figure.subplots(1, 2, sharey=True), ('seconds', 'tokens')):
        for name in names:
            iterations, evaluations = read_metrics(os.path.join(folder, name))
            losses = [e['val/loss'] for e in evaluations]
            panel.plot(locate(evaluations, iterations, x), losses, '.-', label=name)
        panel.set(title='val loss (nats per token)', xlabel=f'{x} of training', ylim=(1.4, 2.6))
        panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(os.path.join(folder, 'race.png'), dpi=100)


if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    sys.exit()
folder = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else 'out-race')
rows = [run_plain()]
runs = [train('nanogpt-recipe', 'train_shakespeare_char_cpu')]
for n in LENGTHS:
    runs.append(train(f'fast-{n}', 'train_shakespeare_char_fast', f'--max_iters={n}',
                      f'--lr_decay_iters={n}'))
rows += runs
baseline_seconds = rows[0][2]
print('| recipe | iterations | seconds | time relative to baseline | val loss |')
print('| --- | --- | --- | --- | --- |')
for name, iters, seconds, loss in rows:
    print(f'| {name} | {iters} | {seconds} | {seconds / baseline_seconds:.1%} | {loss} |')
draw([run[0] for run in runs])
print(json.dumps(dict(rows=rows)))
