"""
Draws the speed table of docs/speed.md: reads assets/bench/cpu.json, writes assets/speed.png.

    python recipes/speed_chart.py

It runs on any system.
"""
import json
import os

from matplotlib.figure import Figure

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'assets')
MODELS = {(4, 128): 'CPU recipe', (6, 384): 'character model', (12, 768): 'GPT-2 124M'}
WORK = {'train': 'training step', 'run': 'whole run', 'data': 'get_batch',
        'prefill': 'prefill, 1,000 tokens'}
BASELINES = {'hf': 'transformers', 'slices': 'slices'}  # everything else is a plain script


def describe(row):
    """What was measured, and what it is compared with."""
    model = MODELS[row['n_layer'], row['n_embd']]
    work = WORK.get(row['what'], f'generation, batch of {row["batch_size"]}')
    if row['compile']:
        work += ', compiled'
    baseline = BASELINES.get(row['compare'], 'plain')
    return f'{model}, {work} (vs. {baseline})'


with open(os.path.join(ASSETS, 'bench', 'cpu.json'), encoding='utf-8') as f:
    rows = [row for row in json.load(f) if 'ratio' in row]
rows.sort(key=lambda row: row['ratio'])
figure = Figure(figsize=(9, 4.5), layout='constrained')
axes = figure.subplots()
bars = axes.barh([describe(row) for row in rows], [row['ratio'] for row in rows], color='C0')
axes.bar_label(bars, [f' {row["ratio"]:.3g}' for row in rows])
axes.axvline(1, color='black', linewidth=0.8)
axes.set(xscale='log', xlim=(0.8, 200), xlabel='times as fast (median of interleaved pairs)')
axes.xaxis.set_major_formatter('{x:g}')
figure.suptitle(f'{rows[0]["cpu"]}, torch {rows[0]["torch"]}', fontsize='medium')
figure.savefig(os.path.join(ASSETS, 'speed.png'), dpi=100)
