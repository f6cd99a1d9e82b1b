"""
Measures what each option of the fast recipe is worth: trains without it, with three seeds.

    python recipes/ablation.py                      at the recipe's own length
    python recipes/ablation.py --max_iters=1600 --lr_decay_iters=1600 --learning_rate=3e-3

The arguments are train.py's, except --dataset: it needs data/shakespeare_char. Its losses serve to
choose settings, so the val split is not used: the runs train on the first 90% of the train split,
and are evaluated on the rest of it. It runs wherever train.py does. It prints a table. The last
line is JSON.
"""
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from plot import read_metrics
from runtime.console import ROOT
from runtime.dataset import find_data
from runtime.meta import read_meta

RECIPE = os.path.join(ROOT, 'config', 'train_shakespeare_char_fast.py')
SEEDS = (1337, 1338, 1339)
VARIANTS = {
    'the recipe': [],
    'AdamW instead of Muon': ['--optim=adamw'],
    'learned positions instead of RoPE': ['--rope_base=0'],
    'no QK-norm': ['--qk_norm=False'],
    'GELU instead of squared ReLU': ['--relu2=False'],
    'tied output layer': ['--tied=True'],
    'no bigram embeddings': ['--bigrams=0'],
    'no convolution of embeddings': ['--embd_conv=0'],
    'cosine instead of WSD': ['--lr_schedule=cosine'],
    'random sampling instead of epochs': ['--data_order=random'],
}


def split_train(source, folder):
    """Makes a dataset of the train split: 90% of it for training, the rest for evaluation."""
    ids = np.fromfile(os.path.join(source, 'train.bin'), dtype=np.uint16)
    border = int(0.9 * len(ids))
    ids[:border].tofile(os.path.join(folder, 'train.bin'))
    ids[border:].tofile(os.path.join(folder, 'val.bin'))
    meta = read_meta(source)
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
        pickle.dump({key: meta[key] for key in ('vocab_size', 'itos', 'stoi')}, f)


def train(data_dir, *flags):
    """Trains the recipe with these flags; returns the loss at the end."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, os.path.join(ROOT, 'train.py'), RECIPE, *sys.argv[1:], *flags,
                   f'--dataset={data_dir}', '--eval_interval=1000000', f'--out_dir={out_dir}']
        run = subprocess.run(command, stdout=subprocess.DEVNULL)
        if run.returncode:
            sys.exit(run.returncode)  # train.py has printed what is wrong
        _, evaluations = read_metrics(out_dir)
    return round(evaluations[-1]['val/loss'], 4)


if {'-h', '--help'} & set(sys.argv):
    print(__doc__)
    sys.exit()
source = find_data('shakespeare_char')
print('| recipe | loss, mean | lowest to highest | worse by |')
print('| --- | --- | --- | --- |')
all_losses = {}
with tempfile.TemporaryDirectory() as data_dir:
    split_train(source, data_dir)
    for name, flags in VARIANTS.items():
        losses = [train(data_dir, f'--seed={seed}', *flags) for seed in SEEDS]
        all_losses[name] = losses
        mean = statistics.mean(losses)
        worse = mean - statistics.mean(all_losses['the recipe'])
        print(f'| {name} | {mean:.4f} | {min(losses):.4f} to {max(losses):.4f} | {worse:.4f} |',
              flush=True)
print(json.dumps(dict(seeds=SEEDS, args=sys.argv[1:], losses=all_losses)))
