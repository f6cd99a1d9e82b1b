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
    """(configuration, iterations, evaluations) of out_dir/metrics.jsonl; the last two are lists of events in order, each iteration once.

    A resumed run overwrites what was logged of the same iterations before. A line that a crash cut off is passed over.
    """
    config, events = {}, {'iter': {}, 'eval': {}}
    with open(os.path.join(out_dir, 'metrics.jsonl'), encoding='utf-8') as f:
        for line in f:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event['event'] == 'run':
                config = event['config']
            else:
                events[event['event']][event['iter']] = event
    return config, *([events[kind][i] for i in sorted(events[kind])] for kind in ('iter', 'eval'))


def positions(events, iterations, x, tokens_per_iter):
    """Where events go along x, by what was done before them: iterations, tokens or seconds of training."""
    done = np.array([e['iter'] for e in events])
    if x == 'seconds':  # a line's ms are the mean of the iterations since the line before
        ends = np.array([0] + [e['iter'] + 1 for e in iterations])
        return np.interp(done, ends, np.cumsum([0] + [e['ms'] / 1000 * n for e, n in zip(iterations, np.diff(ends))]))
    return done * (tokens_per_iter if x == 'tokens' else 1)


def draw(runs, png, x='iter'):
    """Draws the metrics of the runs, a list of folders, to the file png, in one colour each."""
    from matplotlib.figure import Figure  # here, for those who only import this file
    figure = Figure(figsize=(11, 7), layout='constrained')
    loss, rate, norm, speed = panels = figure.subplots(2, 2).flatten()
    for number, out_dir in enumerate(runs):
        config, iterations, evaluations = read_metrics(out_dir)
        tokens_per_iter = config['gradient_accumulation_steps'] * config['batch_size'] * config['block_size']
        colour, name = f'C{number}', os.path.basename(os.path.normpath(out_dir))
        at, at_evaluations = (positions(events, iterations, x, tokens_per_iter) for events in (iterations, evaluations))
        loss.plot(at, [e['loss'] for e in iterations], color=colour, alpha=0.25, linewidth=0.8)
        loss.plot(at_evaluations, [e['train/loss'] for e in evaluations], '--', color=colour, label=f'{name}, train')
        loss.plot(at_evaluations, [e['val/loss'] for e in evaluations], '.-', color=colour, label=f'{name}, val')
        for panel, values in ((rate, [e['lr'] for e in iterations]), (norm, [e['grad_norm'] for e in iterations]),
                              (speed, [tokens_per_iter / e['ms'] * 1000 for e in iterations])):
            panel.plot(at, [float('nan') if value is None else value for value in values], color=colour, linewidth=0.8)
    for panel, title in zip(panels, ('loss, nats a token', 'learning rate', 'norm of the gradient', 'tokens/s')):
        panel.set(title=title, xlabel={'iter': 'iterations', 'tokens': 'tokens', 'seconds': 'seconds of training'}[x])
        panel.grid(alpha=0.3)
    loss.legend()
    figure.savefig(png, dpi=100)
    return png


# -----------------------------------------------------------------------------
if __name__ == '__main__':
    folders = [folder for folder in runs.split(',') if folder]
    if x not in ('iter', 'tokens', 'seconds'):
        fail(f'x={x!r} is not known', 'use iter, tokens or seconds')
    for folder in folders:
        if not os.path.isfile(os.path.join(folder, 'metrics.jsonl')):
            fail(f'{folder!r} has no metrics.jsonl', "name the out_dir of a run with --runs")
    try:
        say(f'drawn: {draw(folders, png or os.path.join(folders[0], "loss.png"), x)}')
    except OSError as e:
        fail(f'the picture cannot be written ({e.strerror})', 'name another file with --png')
