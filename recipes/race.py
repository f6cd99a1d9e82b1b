"""
The faithful CPU recipe against the fast one, at three lengths, one run after the other. Five minutes on 2 cores.

    python recipes/race.py [FOLDER [PLAIN]]

It needs data/shakespeare_char. FOLDER (out-race) takes the runs and race.png. PLAIN is a script whose `learn --data=DIR` trains the plain way and prints
JSON with seconds and val_loss: then its seconds count. A loss is that of the whole val split, in windows of 64 tokens,
seconds are those of training alone. The last line is JSON. Run nothing beside it.
"""
import json
import os
import shutil
import subprocess
import sys

from matplotlib.figure import Figure

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
from plot import positions, read_metrics  # noqa: E402

LENGTHS = (80, 140, 1100)  # iterations; the last are a little less than the faithful one's 2,000 take


def train(name, config, *args):
    """(name, iterations, seconds, val loss) of a run of train.py."""
    print(f'training {name}', file=sys.stderr)
    out_dir = os.path.join(folder, name)
    shutil.rmtree(out_dir, ignore_errors=True)
    run = subprocess.run([sys.executable, 'train.py', f'config/{config}.py', *args, '--eval_iters=0', '--log_interval=10', f'--out_dir={out_dir}'],
                         cwd=ROOT, stdout=subprocess.DEVNULL)
    if run.returncode:
        sys.exit(run.returncode)  # it has said why
    iterations, evaluations = read_metrics(out_dir)
    return name, evaluations[-1]['iter'], round(positions(evaluations, iterations, 'seconds')[-1], 2), round(evaluations[-1]['val/loss'], 4)


if {'-h', '--help'} & set(sys.argv):
    sys.exit(print(__doc__))
folder = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else 'out-race')
rows = []
if len(sys.argv) > 2:
    out = subprocess.run([sys.executable, sys.argv[2], 'learn', f'--data={ROOT}/data/shakespeare_char'], check=True, capture_output=True, text=True)
    plain = json.loads(out.stdout.splitlines()[-1])
    rows.append(('plain', plain['iters'], round(plain['seconds'], 2), plain['val_loss']))
rows.append(train('faithful', 'train_shakespeare_char_cpu'))
rows.extend(train(f'fast-{n}', 'train_shakespeare_char_fast', f'--max_iters={n}', f'--lr_decay_iters={n}') for n in LENGTHS)
whole = rows[0][2]
print('| recipe | iterations | seconds | of the first one\'s | val loss |\n| --- | --- | --- | --- | --- |')
for name, iters, seconds, loss in rows:
    print(f'| {name} | {iters} | {seconds} | {seconds / whole:.1%} | {loss} |')
figure = Figure(figsize=(11, 4.5), layout='constrained')
for panel, x in zip(figure.subplots(1, 2, sharey=True), ('seconds', 'tokens')):
    for name, *_ in rows[len(sys.argv) > 2:]:
        iterations, evaluations = read_metrics(os.path.join(folder, name))
        panel.plot(positions(evaluations, iterations, x), [e['val/loss'] for e in evaluations], '.-', label=name)
    panel.set(title='val loss, nats a token', xlabel=f'{x} of training', ylim=(1.4, 2.6))
    panel.grid(alpha=0.3)
panel.legend()
figure.savefig(os.path.join(folder, 'race.png'), dpi=100)
print(json.dumps(dict(rows=rows)))
