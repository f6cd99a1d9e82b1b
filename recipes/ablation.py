"""
Measures what each option of the fast recipe is worth: trains without it, with three seeds.

    python recipes/ablation.py                      at the recipe's own length
    python recipes/ablation.py --max_iters=1600 --lr_decay_iters=1600 --learning_rate=3e-3

The arguments are train.py's. It needs data/shakespeare_char, and takes some minutes on 2 CPU cores.
It runs wherever train.py does. It prints a table. The last line is JSON.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from plot import read_metrics
from runtime.console import ROOT

RECIPE = os.path.join(ROOT, 'config', 'train_shakespeare_char_fast.py')
SEEDS = (1337, 1338, 1339)
VARIANTS = {
    'the recipe': [],
    'AdamW instead of Muon': ['--optim=adamw'],
    'learned positions instead of RoPE': ['--rope_base=0'],
    'no QK-norm': ['--qk_norm=False'],
    'GELU instead of squared ReLU': ['--relu2=False'],
    'tied head': ['--tied=True'],
    'no bigram embeddings': ['--bigrams=0'],
    'no convolution of embeddings': ['--embd_conv=0'],
    'cosine instead of WSD': ['--lr_schedule=cosine'],
    'random sequences instead of epochs': ['--data_order=random'],
}


def train(*flags):
    """Trains the recipe with these flags; returns the loss on the whole val split at the end."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, os.path.join(ROOT, 'train.py'), RECIPE, *sys.argv[1:], *flags,
                   '--eval_interval=1000000', f'--out_dir={out_dir}']
        run = subprocess.run(command, stdout=subprocess.DEVNULL)
        if run.returncode:
            sys.exit(run.returncode)  # train.py has printed what is wrong
        iterations, evaluations = read_metrics(out_dir)
    return round(evaluations[-1]['val/loss'], 4)


if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    sys.exit()
print('| recipe | val loss, mean | lowest to highest | worse by |')
print('| --- | --- | --- | --- |')
val_losses = {}
for name, flags in VARIANTS.items():
    losses = [train(f'--seed={seed}', *flags) for seed in SEEDS]
    val_losses[name] = losses
    mean = statistics.mean(losses)
    worse = mean - statistics.mean(val_losses['the recipe'])
    print(f'| {name} | {mean:.4f} | {min(losses):.4f} to {max(losses):.4f} | {worse:.4f} |',
          flush=True)
print(json.dumps(dict(seeds=SEEDS, args=sys.argv[1:], val_losses=val_losses)))
