"""
Draws what runs have logged: train and val loss, learning rate, gradient norm and tokens/s, as a picture.

    python plot.py --runs=out-shakespeare-char
    python plot.py --runs=out-a,out-b --x=seconds --png=both.png

train.py leaves such a picture of its run in out_dir/loss.png.
"""
import json
import os

import numpy as np

from checks import fail, say

# what
runs = 'out'  # folders of runs, with commas between
x = 'iter'  # along the axis: iter | tokens | seconds (of training, without evaluations)
png = ''  # the picture; '' is loss.png in the first run's folder
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())


def read_metrics(out_dir):
    """(iterations, evaluations) of out_dir/metrics.jsonl: lists of events in order, each with the tokens_per_iter of its run.

    What is logged after a start takes the place of all that was from the same iteration on. A line that a crash cut off
    is passed over.
    """
    events, begins = {'iter': {}, 'eval': {}}, False
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        for line in f:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event['event'] == 'run':
                begins, config = True, event['config']
                tokens_per_iter = config['gradient_accumulation_steps'] * config['batch_size'] * config['block_size']
                continue
            if begins:
                events, begins = {kind: {i: e for i, e in these.items() if i < event['iter']} for kind, these in events.items()}, False
            events[event['event']][event['iter']] = dict(event, tokens_per_iter=tokens_per_iter)
    return [[events[kind][i] for i in sorted(events[kind])] for kind in ('iter', 'eval')]


def positions(events, iterations, x):
    """Where events go along x, by what was done before them: iterations, tokens or seconds of training."""
    done = np.array([e['iter'] for e in events])
    if x == 'iter':
        return done
    ends = np.array([0] + [e['iter'] + 1 for e in iterations])  # a line is of the iterations since the line before
    each = [e['ms'] / 1000 if x == 'seconds' else e['tokens_per_iter'] for e in iterations]
    after = np.maximum(0, done - ends[-1]) * (each or [0])[-1]  # the last lines' interval was cut short
    return np.interp(done, ends, np.concatenate(([0], np.cumsum(each * np.diff(ends))))) + after


def draw(runs, png, x='iter'):
    """Draws the metrics of the runs, a list of folders, to the file png, in one colour each; returns matplotlib's figure."""
    from matplotlib.figure import Figure  # here, for those who only import this file
    figure = Figure(figsize=(11, 7), layout='constrained')
    loss, rate, norm, speed = panels = figure.subplots(2, 2).flatten()
    for number, out_dir in enumerate(runs):
        iterations, evaluations = read_metrics(out_dir)
        colour, name = f'C{number}', os.path.basename(os.path.normpath(out_dir))
        at, at_evaluations = (positions(events, iterations, x) for events in (iterations, evaluations))
        loss.plot(at, [e['loss'] for e in iterations], color=colour, alpha=0.25, linewidth=0.8)
        loss.plot(at_evaluations, [e['train/loss'] for e in evaluations], '--', color=colour, label=f'{name}, train')
        loss.plot(at_evaluations, [e['val/loss'] for e in evaluations], '.-', color=colour, label=f'{name}, val')
        for panel, values in ((rate, [e['lr'] for e in iterations]), (norm, [e['grad_norm'] for e in iterations]),
                              (speed, [e['tokens_per_iter'] / e['ms'] * 1000 for e in iterations])):
            panel.plot(at, [float('nan') if value is None else value for value in values], color=colour, linewidth=0.8)
    for panel, title in zip(panels, ('loss, nats a token', 'learning rate', 'norm of the gradient', 'tokens/s')):
        panel.set(title=title, xlabel={'iter': 'iterations', 'tokens': 'tokens', 'seconds': 'seconds of training'}[x])
        panel.grid(alpha=0.3)
    loss.legend()
    figure.savefig(png, dpi=100, format='png')
    return figure


# -----------------------------------------------------------------------------
if __name__ == '__main__':
    folders = [folder for folder in runs.split(',') if folder]
    if x not in ('iter', 'tokens', 'seconds'):
        fail(f'x={x!r} is not known', 'use iter, tokens or seconds')
    for folder in folders or ['']:
        if not os.path.isfile(os.path.join(folder, 'metrics.jsonl')):
            fail(f'{folder!r} has no metrics.jsonl', "name the out_dir of a run with --runs")
    png = png or os.path.join(folders[0], 'loss.png')
    try:
        draw(folders, png, x)
        say(f'drawn: {png}')
    except OSError as e:
        fail(f'the picture cannot be written ({e.strerror})', 'name another file with --png')
