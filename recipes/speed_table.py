"""
Writes what recipes/bench.sh has measured into README.md, docs/speed.md and assets/speed.png.

    python recipes/speed_table.py --folder=out-bench --cpu="2 cores of an AMD EPYC (Zen 5)"
    python recipes/speed_table.py      # again, from the rows in assets/bench/cpu.json

It runs on any system.
"""
import json
import os
import re
import sys

from matplotlib.figure import Figure

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from runtime import settings
from runtime.console import ROOT, fail

folder = ''  # where bench.sh has written NAME.json for each row; empty: assets/bench/cpu.json
cpu = ''  # what the tables call the CPU
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

# name in bench.sh: (the work, what it is compared with). README.md has the rows until the None
ROWS = {
    'train_cpu_recipe': ('training step, CPU recipe', 'plain PyTorch'),
    'train_char': ('training step, train_shakespeare_char.py', 'plain PyTorch'),
    'train_gpt2': ('training step, GPT-2 124M, 4 x 1,024 tokens', 'plain PyTorch'),
    'run_cpu_recipe': ('the whole CPU recipe, from start to end of the process', 'plain PyTorch'),
    'prefill': ('prefill of 1,000 tokens, GPT-2 124M', 'transformers, all logits'),
    'decode_1': ('generation, GPT-2 124M, one sequence', 'transformers'),
    'decode_1_int8': ('generation, one sequence, `--weights=int8`', 'CTranslate2, int8'),
    'decode_1_int4': ('generation, one sequence, `--weights=int4`', 'llama.cpp, q4_0'),
    'decode_10': ('generation, ten sequences at once', 'CTranslate2, int8'),
    'sample_defaults': ('10 samples of 500 tokens, the defaults of sample.py', 'transformers'),
    None: (),
    'train_cpu_recipe_compiled': ('training step, CPU recipe, `--compile=True`', 'plain PyTorch'),
    'train_char_without_dropout': ('training step, train_shakespeare_char.py, no dropout', ''),
    'decode_1_int8_llama': ('generation, one sequence, `--weights=int8`', 'llama.cpp, q8_0'),
    'decode_10_llama': ('generation, ten sequences at once', 'llama.cpp, q8_0'),
    'decode_10_hf': ('generation, ten sequences at once', 'transformers'),
    'get_batch': ('get_batch, 64 x 256 tokens', 'slices'),
    'start': ('`python sample.py` on a character model, until its first token', ''),
}
README_HEAD = '| work, on CPU | compared with | this project | the other | times as fast |'
DOCS_HEAD = README_HEAD.replace(', on CPU', '') + ' share of the ceiling |'


def read_rows():
    """{name: what bench.py printed as JSON}, and what the CPU is called."""
    path = os.path.join(ROOT, 'assets', 'bench', 'cpu.json')
    if not folder:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
        return content['rows'], content['cpu']
    rows = {}
    for name in filter(None, ROWS):
        row_path = os.path.join(folder, f'{name}.json')
        if os.path.exists(row_path):  # else it failed
            with open(row_path, encoding='utf-8') as f:
                rows[name] = json.load(f)
            # without the folder of the Python that ran the other engine
            rows[name]['compare'] = re.sub(r'\S*/python', 'python', rows[name]['compare'])
    lines = ',\n'.join(f'{json.dumps(name)}: {json.dumps(row)}' for name, row in rows.items())
    with open(path, 'w', encoding='utf-8') as f:
        f.write(f'{{"cpu": {json.dumps(cpu)}, "rows": {{\n{lines}\n}}}}\n')
    return rows, cpu


def format_speed(row, ms):
    """The time; of generation tokens/s."""
    if row['what'] == 'decode':
        return f'{row["tokens_per_s"] * row["ms_per_iter"] / ms:,.0f} tokens/s'
    if ms < 1000:
        return f'{ms:.3g} ms'
    return f'{ms / 1000:.2f} s' if ms < 10_000 else f'{ms / 1000:.1f} s'


def format_share(row):
    """How close this project is to the rate of large matmuls, or to that of reading memory."""
    for rate in ('matmul', 'read'):
        if f'share_of_{rate}_rate' in row:
            return f'{100 * row[f"share_of_{rate}_rate"]:.0f}% of the {rate} rate'
    return ''


def format_row(name, row):
    """The cells of a row of the table in docs/speed.md. README.md leaves out the last one."""
    theirs, ratio = '', ''
    if 'ratio' in row:
        theirs = format_speed(row, row['their_ms_per_iter'])
        ratio = f'{row["ratio"]:.2f}'
    ours = format_speed(row, row['ms_per_iter'])
    return [*ROWS[name], ours, theirs, ratio, format_share(row)]


def replace_table(path, head, new_head, lines):
    """Replaces the rows below the table's head, which begins with the first cell of `head`."""
    path = os.path.join(ROOT, path)
    with open(path, encoding='utf-8') as f:
        text = f.read().split('\n')
    cells = head.split(' | ')
    start = next((i for i, line in enumerate(text)
                  if line.startswith('| work') and line.endswith(' | '.join(cells[1:]))), None)
    if start is None:
        fail(f'{path} has no table with the head {head}')
    stop = start
    while text[stop].startswith('|'):
        stop += 1
    text[start:stop] = [new_head, '|' + ' --- |' * len(cells), *lines]
    with open(path, 'w', encoding='utf-8') as f:
        f.write('\n'.join(text))


def draw(rows, cpu_name):
    """Writes assets/speed.png."""
    compared = sorted((row['ratio'], ' vs. '.join(ROWS[name]).replace('`', ''))
                      for name, row in rows.items() if 'ratio' in row)
    figure = Figure(figsize=(10, 5.5), layout='constrained')
    axes = figure.subplots()
    bars = axes.barh([text for _, text in compared], [ratio for ratio, _ in compared], color='C0')
    axes.bar_label(bars, [f' {ratio:.2f}' for ratio, _ in compared])
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set(xscale='log', xlim=(0.5, 200), xlabel='times as fast (median of interleaved pairs)')
    axes.xaxis.set_major_formatter('{x:g}')
    versions = {row['torch'] for row in rows.values()}
    figure.suptitle(f'{cpu_name}, torch {", ".join(versions)}', fontsize='medium')
    figure.savefig(os.path.join(ROOT, 'assets', 'speed.png'), dpi=100)


settings.check(config)
rows, cpu_name = read_rows()
cells = {name: format_row(name, rows[name]) for name in rows}
short_names = [name for name in list(ROWS)[:list(ROWS).index(None)] if name in rows]
replace_table('README.md', README_HEAD, README_HEAD.replace('CPU', cpu_name),
              [f'| {" | ".join(cells[name][:-1])} |' for name in short_names])
replace_table('docs/speed.md', DOCS_HEAD, DOCS_HEAD,
              [f'| {" | ".join(row_cells)} |' for row_cells in cells.values()])
draw(rows, cpu_name)
