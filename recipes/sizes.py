"""
Compares nanoGPT's recipe with the fast one, at three sizes: a table, and sizes.png.

    LIB=$(python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
    python data/text/prepare.py --input="$LIB/*.py,$LIB/*/*.py" --name=python_library \
        --tokenizer=bpe --vocab_size=2048
    python recipes/sizes.py [FOLDER]

All runs see 0.8M tokens of Python's library, a tenth of an epoch: it is the beginning of a
training. nanoGPT's recipe draws sequences at random. For small models its learning rate is 1e-3; a
second run has 3e-3. The fast recipe sees no token twice. The runs are one after the other; run
nothing else at the same time. FOLDER is where they and sizes.png are written (out-sizes). Seconds
count only the training. The last line is JSON. It takes half an hour or an hour on 2 CPU cores.
"""
import json
import os
import shutil
import subprocess
import sys

from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from plot import locate, read_metrics
from runtime.console import ROOT, fail
from runtime.dataset import locate_data

SIZES = {  # by the parameters of the model that AdamW trains
    '1M': ['--n_layer=4', '--n_head=2', '--n_embd=128'],
    '11M': ['--n_layer=6', '--n_head=6', '--n_embd=384'],
    '33M': ['--n_layer=10', '--n_head=8', '--n_embd=512'],
}
# 16 x 256 = 4,096 tokens/iter
SETTINGS = ['--dataset=python_library', '--batch_size=16', '--block_size=256', '--max_iters=200',
            '--lr_decay_iters=200', '--warmup_iters=20', '--gradient_accumulation_steps=1',
            '--eval_interval=50', '--eval_iters=8', '--log_interval=5']
RECIPES = {
    'nanoGPT, 1e-3': ['--learning_rate=1e-3', '--min_lr=1e-4', '--beta2=0.99'],
    'nanoGPT, 3e-3': ['--learning_rate=3e-3', '--min_lr=3e-4', '--beta2=0.99'],
    'fast': ['config/train_python_bpe.py'],
}


def train(size, recipe):
    """Trains one model; returns its val losses over time: (tokens, seconds, loss) each."""
    print(f'training {size}, {recipe}', file=sys.stderr)
    out_dir = os.path.join(folder, f'{size}-{recipe}'.replace(', ', '-').lower())
    shutil.rmtree(out_dir, ignore_errors=True)
    command = [sys.executable, 'train.py', *RECIPES[recipe], *SIZES[size], *SETTINGS,
               f'--out_dir={out_dir}']
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if run.returncode:
        sys.exit(run.returncode)  # train.py has printed what is wrong
    iterations, evaluations = read_metrics(out_dir)
    tokens = locate(evaluations, iterations, 'tokens')
    seconds = locate(evaluations, iterations, 'seconds')
    return [(int(n), round(float(t), 1), round(e['val/loss'], 4))
            for n, t, e in zip(tokens, seconds, evaluations)]


def draw(curves):
    """Draws the val losses against tokens and against seconds, as sizes.png."""
    figure = Figure(figsize=(11, 5), layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for color, size in enumerate(SIZES):
        for style, recipe in zip((':', '--', '-'), RECIPES):
            tokens, seconds, losses = zip(*curves[size][recipe][1:])  # without the untrained model
            for panel, x in zip(panels, (tokens, seconds)):
                panel.plot(x, losses, style, marker='.', color=f'C{color}',
                           label=f'{size}: {recipe}')
    panels[0].set(title='val loss (nats per token)', xlabel='tokens')
    panels[1].set(title='the same losses', xlabel='seconds of training', xscale='log')
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    figure.savefig(os.path.join(folder, 'sizes.png'), dpi=100)


if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    sys.exit()
folder = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else 'out-sizes')
if not locate_data('python_library'):
    fail('data/python_library is missing', 'python recipes/sizes.py --help has the command')
curves = {}
for size in SIZES:
    curves[size] = {recipe: train(size, recipe) for recipe in RECIPES}
print('| size | recipe | seconds | val loss |')
print('| --- | --- | --- | --- |')
for size in SIZES:
    for recipe, curve in curves[size].items():
        _, seconds, loss = curve[-1]
        print(f'| {size} | {recipe} | {seconds} | {loss} |')
draw(curves)
print(json.dumps(curves))
