"""
How time and memory grow with the size of the model: assets/bench/growth.json, assets/growth.png.

    python recipes/growth.py --peers=../peers/bin/python
    python recipes/growth.py --draw=True     # only the picture, again

It measures generation and training on a CPU, here and by the engines in recipes/peers. `peers` is
the Python that has their packages. It needs Linux, 18 GB of memory and 10 GB for temporary files.
"""
import json
import math
import os
import shlex
import subprocess
import sys

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from runtime import settings
from runtime.console import ROOT, say

peers = 'python'  # the Python that runs the other engines
cpu = ''  # what the picture calls the CPU
rounds = 2  # measure everything so often, and keep the fastest: the speed of memory changes
draw = False  # only draw what is in growth.json
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

SHAPES = [(6, 6, 384), (12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)]
BENCH = 'python bench.py --real_data=False --repeats=3'
PEER = '{peers} recipes/peers'
# the name in the picture, its color, and the command, without the shape
DECODE = {
    'this project, bfloat16': ('C0', f'{BENCH} --what=decode --max_new_tokens=40'),
    'this project, int8': ('C1', f'{BENCH} --what=decode --max_new_tokens=40 --weights=int8'),
    'this project, int4': ('C2', f'{BENCH} --what=decode --max_new_tokens=40 --weights=int4'),
    'transformers, bfloat16': ('C3', f'{PEER}/hf.py --max_new_tokens=40'),
    'CTranslate2, int8': ('C4', f'{PEER}/ct2.py --max_new_tokens=40'),
    'llama.cpp, q8_0': ('C5', f'{PEER}/llamacpp.py --max_new_tokens=40'),
    'llama.cpp, q4_0': ('C6', f'{PEER}/llamacpp.py --max_new_tokens=40 --outtype=q4_0'),
}
TRAIN = {
    'this project, bfloat16': ('C0', f'{BENCH} --batch_size=1 --bias=True'),
    'transformers, bfloat16': ('C3', f'{PEER}/hf.py --what=train --batch_size=1'),
}
PATH = os.path.join(ROOT, 'assets', 'bench', 'growth.json')


def measure(command, shape):
    """{ms per token, GB of the process, rates of the device}; None if it fails.

    Of training the memory is the peak. Of generation it is what is needed after loading.
    """
    flags = [f'--{name}={value}' for name, value in zip(('n_layer', 'n_head', 'n_embd'), shape)]
    args = [*shlex.split(command.format(peers=peers)), *flags]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        return None
    row = json.loads(lines[-1])
    rates = {key: row[key] for key in ('read_bytes_per_s', 'matmul_flops_per_s') if key in row}
    num_bytes = row['process_memory_bytes'] if row['what'] == 'decode' else usage.ru_maxrss * 1024
    return dict(ms=1000 / row['tokens_per_s'], gb=num_bytes / 1e9, **rates)


def measure_all():
    """[{'what', 'name', 'shape', 'parameters', 'ms', 'gb', ...}], and prints a line for each."""
    work = [('decode', shape, *item) for shape in SHAPES for item in DECODE.items()]
    work += [('train', shape, *item) for shape in SHAPES[:4] for item in TRAIN.items()]
    rows = {}
    for what, shape, name, (_, command) in work * rounds:
        result = measure(command, shape)
        say(f'{what} {shape} {name}: {result}')
        row = rows.setdefault((what, shape, name), {'ms': math.inf})
        if result and result['ms'] < row['ms']:
            row.update(result)
    return [dict(what=what, name=name, shape=shape, parameters=count_parameters(shape), **row)
            for (what, shape, name), row in rows.items() if 'gb' in row]


def count_parameters(shape, vocab_size=50304, block_size=1024):
    """The weights of the matrices, without biases and norms."""
    n_layer, _, n_embd = shape
    return 12 * n_layer * n_embd ** 2 + (vocab_size + block_size) * n_embd


def draw_panel(axes, rows, what, key):
    """One quantity of all engines against the number of parameters."""
    for name, (color, _) in (DECODE if what == 'decode' else TRAIN).items():
        points = [(row['parameters'], row[key]) for row in rows
                  if row['what'] == what and row['name'] == name]
        if not points:  # this engine failed
            continue
        label = name if key == 'gb' else None  # the other panel's legend is about the ceilings
        axes.plot(*zip(*points), 'o-', color=color, label=label)
    sizes = sorted({row['parameters'] for row in rows if row['what'] == what})
    axes.set(xscale='log', yscale='log', xlabel='parameters')
    axes.set_xticks(sizes, [f'{n / 1e6:.0f}M' for n in sizes], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.grid(alpha=0.3)


def draw_ceilings(axes, rows, what):
    """The time in which the CPU reads the weights, or multiplies with them, for a token."""
    ours = [row for row in rows if row['what'] == what and row['name'].startswith('this project')]
    sizes = sorted({row['parameters'] for row in ours})
    if what == 'decode':
        rate = max(row['read_bytes_per_s'] for row in ours)
        formats = ((2, 'bfloat16', '--'), (1, '8 bits', '-.'), (5 / 8, '4 bits', ':'))
        for bytes_per_weight, text, style in formats:
            axes.plot(sizes, [1000 * bytes_per_weight * n / rate for n in sizes], style,
                      color='gray', label=f'weights of {text} read at {rate / 1e9:.0f} GB/s')
    else:
        rate = max(row['matmul_flops_per_s'] for row in ours)
        axes.plot(sizes, [1000 * 6 * n / rate for n in sizes], ':', color='gray',
                  label=f'matmuls at {rate / 1e12:.2f} TFLOP/s')


settings.check(config)
if not draw:
    content = dict(cpu=cpu, rows=measure_all())
    lines = ',\n'.join(json.dumps(row) for row in content['rows'])
    with open(PATH, 'w', encoding='utf-8') as f:
        f.write(f'{{"cpu": {json.dumps(cpu)}, "rows": [\n{lines}\n]}}\n')
with open(PATH, encoding='utf-8') as f:
    content = json.load(f)
figure = Figure(figsize=(11, 8), layout='constrained')
for row_axes, what in zip(figure.subplots(2, 2), ('decode', 'train')):
    draw_panel(row_axes[0], content['rows'], what, 'ms')
    draw_ceilings(row_axes[0], content['rows'], what)
    draw_panel(row_axes[1], content['rows'], what, 'gb')
    work = 'generation, one sequence' if what == 'decode' else 'training, 1,024 tokens a step'
    row_axes[0].set(title=work, ylabel='ms per token')
    row_axes[1].set(title=f'{work}: memory', ylabel='GB of the process')
    row_axes[0].legend(fontsize='x-small', loc='lower right')
    row_axes[1].legend(fontsize='x-small', loc='upper left')
figure.suptitle(content['cpu'], fontsize='medium')
figure.savefig(os.path.join(ROOT, 'assets', 'growth.png'), dpi=90)
