"""
The faithful CPU recipe against the fast one: a tenth of its seconds, and all of them, one run after the other. Three minutes.

    python recipes/race.py [FOLDER [PLAIN]]

FOLDER (out-race) takes the runs and the pictures. PLAIN is a script whose `learn --data=DIR` trains the plain way and prints
JSON with seconds and val_loss: then its seconds count. A loss is that of the whole val split, in windows of 64 tokens,
seconds are those of training alone. The last line is JSON. Run nothing beside it.
"""
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
from plot import draw, positions, read_metrics  # noqa: E402

LONG = ['--max_iters=1100', '--lr_decay_iters=1100']  # a little less than the faithful one's 2,000 take


def train(name, config, *args):
    """(name, iterations, seconds, val loss) of a run of train.py."""
    out_dir = os.path.join(folder, name)
    shutil.rmtree(out_dir, ignore_errors=True)
    subprocess.run([sys.executable, 'train.py', f'config/{config}.py', *args, '--eval_iters=0', '--log_interval=10', f'--out_dir={out_dir}'],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
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
rows.append(train('fast', 'train_shakespeare_char_fast'))
rows.append(train('fast-long', 'train_shakespeare_char_fast', *LONG, '--eval_interval=100'))
whole = rows[0][2]
print('| recipe | iterations | seconds | of the first one\'s | val loss |\n| --- | --- | --- | --- | --- |')
for name, iters, seconds, loss in rows:
    print(f'| {name} | {iters} | {seconds} | {seconds / whole:.1%} | {loss} |')
for x in ('seconds', 'tokens'):
    draw([os.path.join(folder, name) for name in ('faithful', 'fast', 'fast-long')], os.path.join(folder, f'{x}.png'), x)
print(json.dumps(dict(rows=rows)))
