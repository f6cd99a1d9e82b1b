"""
Compares the recipes for tiny Shakespeare: a table, and race.png.

    python recipes/race.py [FOLDER]

It needs data/shakespeare_char. The runs are one after the other; run nothing else at the same time.
FOLDER is where the runs and race.png are written (out-race).

The baseline for the seconds is nanoGPT's recipe in plain PyTorch, recipes/peers/plain.py.

A val loss is the mean over the whole val split, in windows of the recipe's block_size. Seconds
count only the training. The last line is JSON. It runs wherever train.py does.
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

CONFIGS = ('train_shakespeare_char_cpu', 'train_shakespeare_char_quick',
           'train_shakespeare_char_fast')
PUBLISHED_LOSS = 1.4697  # nanoGPT's README: its best after about 3 minutes on an A100


def train(name):
    """Runs train.py with the config file of this name; returns the val losses over time."""
    print(f'training {name}', file=sys.stderr)
    out_dir = os.path.join(folder, name)
    shutil.rmtree(out_dir, ignore_errors=True)
    command = [sys.executable, 'train.py', f'config/{name}.py', '--eval_iters=0',
               '--log_interval=10', f'--out_dir={out_dir}']
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if run.returncode:
        sys.exit(run.returncode)  # train.py has printed what is wrong
    iterations, evaluations = read_metrics(out_dir)
    seconds = locate(evaluations, iterations, 'seconds')
    return [(e['iter'], round(float(t), 2), round(e['val/loss'], 4))
            for e, t in zip(evaluations, seconds)]


def run_plain():
    """Runs nanoGPT's recipe in plain PyTorch; returns the val losses over time."""
    print('training recipes/peers/plain.py', file=sys.stderr)
    script = os.path.join(ROOT, 'recipes', 'peers', 'plain.py')
    data_dir = os.path.join(ROOT, 'data', 'shakespeare_char')
    command = [sys.executable, script, 'learn', f'--data={data_dir}']
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])['curve']


def draw(curves):
    """Draws the val losses against the seconds of training, as race.png."""
    figure = Figure(figsize=(9, 5), layout='constrained')
    panel = figure.subplots()
    for name, curve in curves.items():
        _, seconds, losses = zip(*curve[1:])  # the first one is before the training
        panel.plot(seconds, losses, '.-', label=name)
    panel.axhline(PUBLISHED_LOSS, color='gray', linestyle='--',
                  label=f'{PUBLISHED_LOSS}: nanoGPT, 10.65M parameters, 3 minutes on an A100')
    panel.set(title='val loss (nats per character)', xlabel='seconds of training', xscale='log')
    panel.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2)
    figure.savefig(os.path.join(folder, 'race.png'), dpi=100)


if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    sys.exit()
folder = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else 'out-race')
curves = {'plain PyTorch': run_plain()}
for name in CONFIGS:
    curves[name] = train(name)
_, baseline_seconds, _ = curves['plain PyTorch'][-1]
print('| recipe | iterations | seconds | time relative to baseline | val loss |')
print('| --- | --- | --- | --- | --- |')
for name, curve in curves.items():
    iters, seconds, loss = curve[-1]
    print(f'| {name} | {iters} | {seconds} | {seconds / baseline_seconds:.1%} | {loss} |')
draw(curves)
print(json.dumps(curves))
