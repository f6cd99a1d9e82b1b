"""
What each option of the fast recipe is worth: the recipe without it, over three seeds, as a table. Some minutes on 2 cores.

    python recipes/ablation.py                      at the recipe's own length
    python recipes/ablation.py --max_iters=1600 --lr_decay_iters=1600 --learning_rate=3e-3

The arguments are train.py's. The last line is JSON.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
from plot import read_metrics  # noqa: E402

RECIPE, SEEDS = os.path.join(ROOT, 'config', 'train_shakespeare_char_fast.py'), (1337, 1338, 1339)
WITHOUT = (
    ('the recipe', ()), ('AdamW instead of Muon', ('--optim=adamw',)), ('learned positions instead of RoPE', ('--rope_base=0',)),
    ('no QK-norm', ('--qk_norm=False',)), ('GELU instead of squared ReLU', ('--relu2=False',)), ('tied head', ('--tied=True',)),
    ('no bigram embeddings', ('--bigrams=0',)), ('no convolution of embeddings', ('--embd_conv=0',)), ('cosine instead of WSD', ('--lr_schedule=cosine',)),
    ('sequences from anywhere instead of epochs', ('--data_order=random',)),
)


def val_loss(*args):
    """Of the whole val split, at the end of the run."""
    with tempfile.TemporaryDirectory() as out_dir:
        run = subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), RECIPE, *sys.argv[1:], *args, '--eval_interval=1000000',
                              '--loss_png=False', f'--out_dir={out_dir}'], stdout=subprocess.DEVNULL)
        if run.returncode:
            sys.exit(run.returncode)  # it has said why
        return read_metrics(out_dir)[1][-1]['val/loss']


if {'-h', '--help'} & set(sys.argv):
    sys.exit(print(__doc__))
rows = {}
print('| recipe | val loss, mean | lowest to highest | worse by |\n| --- | --- | --- | --- |')
for name, flags in WITHOUT:
    losses = rows[name] = [round(val_loss(f'--seed={seed}', *flags), 4) for seed in SEEDS]
    worse = statistics.mean(losses) - statistics.mean(rows['the recipe'])
    print(f'| {name} | {statistics.mean(losses):.4f} | {min(losses):.4f} to {max(losses):.4f} | {worse:.4f} |', flush=True)
print(json.dumps(dict(seeds=SEEDS, args=sys.argv[1:], val_losses=rows)))
