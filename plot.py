"""
Draws what runs have logged: train and val loss, learning rate, gradient norm and tokens/s.

    python plot.py --runs=out-shakespeare-char
    python plot.py --runs=out-a,out-b --x=seconds --png=both.png

When a run finishes, train.py draws this picture of it in out_dir/loss.png.
"""
import json
import os

import numpy as np

from runtime.console import ROOT, fail, get_first_line, say
from runtime.files import check_file, is_file, replace

# input and output
runs = 'out'  # the out_dir of one or more runs, separated by commas
x = 'iter'  # the x axis: iter | tokens | seconds (of training, without evaluations)
png = ''  # the picture to write; '': loss.png in the first run's folder
if __name__ == '__main__':
    exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())


NUMBER = int, float
MAX_NUMBER = 1e30  # larger ones aren't numbers of a run, and can't all be drawn
# the values that an event must have, by kind
KEYS = {'iter': dict(iter=int, ms=NUMBER, lr=NUMBER, loss=(*NUMBER, type(None)),
                     grad_norm=(*NUMBER, type(None))),
        'eval': {'iter': int, 'train/loss': NUMBER, 'val/loss': NUMBER}}


def is_complete(event):
    """Whether an event has what is drawn of it."""
    kinds = KEYS[event['event']]
    return (all(key in event and isinstance(event[key], kinds[key]) for key in kinds)
            and all(abs(event[key] or 0) < MAX_NUMBER for key in kinds) and event.get('ms', 1) > 0)


def read_metrics(out_dir):
    """The events in out_dir/metrics.jsonl: a list of iterations and a list of evaluations.

    Each event has the tokens_per_iter of its run. When a run was resumed, its events replace the
    earlier ones from that iteration on. Lines that a crash cut off are skipped. ValueError if
    nothing can be drawn.
    """
    events = {'iter': {}, 'eval': {}}  # of each kind, by iteration
    run_begins = False
    tokens_per_iter = None
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        for line in f:
            try:
                event = dict(json.loads(line))
            except (RecursionError, TypeError, ValueError):
                continue
            kind = event.get('event')
            if tokens_per_iter is None and kind != 'run':
                raise ValueError('its first line is not that of a run')
            if kind == 'run':
                run_begins = True
                config = event['config']
                sequences = config['gradient_accumulation_steps'] * config['batch_size']
                tokens_per_iter = float(sequences * config['block_size'])
                continue
            if kind not in KEYS or not is_complete(event):  # somebody's own
                continue
            if run_begins:
                run_begins = False
                for name in events:
                    events[name] = {i: e for i, e in events[name].items() if i < event['iter']}
            events[kind][event['iter']] = dict(event, tokens_per_iter=tokens_per_iter)
    if not events['iter'] and not events['eval']:
        raise ValueError('it has no iterations yet')
    return [[events[kind][i] for i in sorted(events[kind])] for kind in ('iter', 'eval')]


def locate(events, iterations, x):
    """Where events are along the x axis: the iterations, tokens or seconds before each of them."""
    iter_nums = np.array([e['iter'] for e in events])
    if x == 'iter':
        return iter_nums
    # a logged line is about all iterations since the line before it
    ends = np.array([0] + [e['iter'] + 1 for e in iterations])
    amounts = [e['ms'] / 1000 if x == 'seconds' else e['tokens_per_iter'] for e in iterations]
    totals = np.concatenate(([0], np.cumsum(amounts * np.diff(ends))))
    # iterations after the last line are counted like those before it
    tail = np.maximum(0, iter_nums - ends[-1]) * (amounts or [0])[-1]
    return np.interp(iter_nums, ends, totals) + tail


def draw(runs, png, x='iter'):
    """Draws the metrics of the runs, a list of folders, to the file png; one color per run.

    Returns matplotlib's figure. OSError if the file can't be written: an earlier one then stays.
    """
    from matplotlib.figure import Figure  # imported here: it takes long, and not everyone draws
    figure = Figure(figsize=(11, 7), layout='constrained')
    panels = figure.subplots(2, 2).flatten()
    loss_panel, lr_panel, norm_panel, speed_panel = panels
    for number, out_dir in enumerate(runs):
        iterations, evaluations = read_metrics(out_dir)
        color = f'C{number}'
        name = os.path.basename(os.path.normpath(out_dir))
        iter_x = locate(iterations, iterations, x)
        eval_x = locate(evaluations, iterations, x)
        loss_panel.plot(iter_x, [e['loss'] for e in iterations], color=color, alpha=0.25,
                        linewidth=0.8, label=f'{name}, train, per batch')
        loss_panel.plot(eval_x, [e['train/loss'] for e in evaluations], '--', color=color,
                        label=f'{name}, train')
        loss_panel.plot(eval_x, [e['val/loss'] for e in evaluations], '.-', color=color,
                        label=f'{name}, val')
        rates = [e['lr'] for e in iterations]
        norms = [e['grad_norm'] for e in iterations]
        norms = [float('nan') if norm is None else norm for norm in norms]
        speeds = [e['tokens_per_iter'] / e['ms'] * 1000 for e in iterations]
        for panel, values in ((lr_panel, rates), (norm_panel, norms), (speed_panel, speeds)):
            panel.plot(iter_x, values, color=color, linewidth=0.8)
    titles = ('loss (nats per token)', 'learning rate', 'gradient norm', 'tokens/s')
    xlabels = {'iter': 'iterations', 'tokens': 'tokens', 'seconds': 'seconds of training'}
    for panel, title in zip(panels, titles):
        panel.set(title=title, xlabel=xlabels[x])
        panel.grid(alpha=0.3)
    loss_panel.legend()
    if os.path.lexists(png):
        check_file(png)  # a device must stay
    with replace(png) as f:
        figure.savefig(f, dpi=100, format='png')
    return figure


# -----------------------------------------------------------------------------
if __name__ == '__main__':
    folders = [folder for folder in runs.split(',') if folder]
    if x not in ('iter', 'tokens', 'seconds'):
        fail(f'x={x!r} is not known', 'use iter, tokens or seconds')
    for folder in folders or ['']:
        if not is_file(os.path.join(folder, 'metrics.jsonl')):
            fail(f'{folder!r} has no metrics.jsonl', 'name the out_dir of a run with --runs')
        try:
            read_metrics(folder)
        except (KeyError, OverflowError, TypeError, ValueError) as e:
            fail(f'metrics.jsonl in {folder} cannot be drawn ({get_first_line(e)})',
                 'name the out_dir of another run with --runs')
    png = png or os.path.join(folders[0], 'loss.png')
    try:
        draw(folders, png, x)
        say(f'drawn: {png}')
    except OSError as e:
        fail(f'the picture cannot be written ({e.strerror})', 'name another file with --png')
