"""plot.py: what it reads of metrics.jsonl, and that a run leaves its picture."""
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, run, run_here, run_ranks

import plot


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b'\x89PNG\r\n\x1a\n'
    return int.from_bytes(head[16:20], 'big'), int.from_bytes(head[20:24], 'big')


def test_a_run_leaves_its_picture(tmp_path, char_data):
    args = [*TINY, f'--dataset={char_data}', '--eval_interval=5', f'--out_dir={tmp_path}']
    picture = tmp_path / 'loss.png'
    run('train.py', *args, '--max_iters=10')
    assert png_size(picture) == (1100, 700)
    picture.unlink()
    run_ranks(2, 'train.py', *args, '--max_iters=11', '--init_from=resume')
    assert png_size(picture) == (1100, 700)
    picture.unlink()
    picture.mkdir()  # if it can't be written, there is only a warning
    err = run('train.py', *args, '--max_iters=12', '--init_from=resume').stderr
    assert 'warning: loss.png: OSError' in err and 'it is a folder' in err


@pytest.fixture
def two_runs(tmp_path):
    config = dict(gradient_accumulation_steps=2, batch_size=3, block_size=5)
    for name, ms in (('a', 1000), ('b', 2000)):
        events = [dict(event='run', config=config)]
        for i in (0, 10, 20):  # an evaluation, then a line of the iterations since the last line
            grad_norm = None if i == 10 else 1.0
            events += [
                {'event': 'eval', 'iter': i, 'train/loss': 3 - i / 20, 'val/loss': 3 - i / 30},
                dict(event='iter', iter=i, loss=3 - i / 20, ms=ms, lr=0.1, grad_norm=grad_norm)]
        lines = [*map(json.dumps, events), '{"event": "it']
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(lines))
    return tmp_path


def test_events_and_their_places(two_runs):
    # resumed from iteration 10 with twice the batch, and stopped before 20
    config = dict(gradient_accumulation_steps=2, batch_size=6, block_size=5)
    events = [dict(event='run', config=config)]
    events += [dict(event='iter', iter=i, loss=9.0, ms=3000, lr=0.1, grad_norm=1.0)
               for i in (10, 15)]
    events += [{'event': 'eval', 'iter': 18, 'train/loss': 2, 'val/loss': 2}]
    with open(two_runs / 'a' / 'metrics.jsonl', 'a') as f:
        f.write('\n' + '\n'.join(map(json.dumps, events)) + '\n')
    iterations, evaluations = plot.read_metrics(two_runs / 'a')
    assert [(e['iter'], e['loss'], e['ms'], e['tokens_per_iter']) for e in iterations] == [
        (0, 3, 1000, 30), (10, 9, 3000, 60), (15, 9, 3000, 60)]
    assert [e['iter'] for e in evaluations] == [0, 18]
    places = {x: plot.locate(evaluations, iterations, x).tolist()
              for x in ('iter', 'tokens', 'seconds')}
    # 1 iteration of a second and 30 tokens, then all of 3 seconds and 60
    assert places == {'iter': [0, 18], 'tokens': [0, 30 + 17 * 60], 'seconds': [0, 1 + 17 * 3]}


def test_what_is_drawn(two_runs):
    figure = plot.draw([two_runs / 'a', two_runs / 'b'], two_runs / 'both.png', 'seconds')
    assert png_size(two_runs / 'both.png') == (1100, 700)
    loss, rate, norm, speed = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines['a, val'] == [[0, 3], [10, 3 - 1 / 3], [20, 3 - 2 / 3]]
    assert lines['b, train'] == [[0, 3], [20, 2.5], [40, 2]]
    assert lines['b, train, per batch'] == [[0, 3], [20, 2.5], [40, 2]]
    assert [panel.get_title() for panel in figure.axes] == [
        'loss (nats per token)', 'learning rate', 'gradient norm', 'tokens/s']
    assert rate.lines[1].get_xydata().tolist() == [[0, 0.1], [20, 0.1], [40, 0.1]]
    np.testing.assert_equal(norm.lines[0].get_ydata(), [1, np.nan, 1])
    # 30 tokens in 1 and in 2 seconds
    assert [line.get_ydata().tolist() for line in speed.lines] == [[30] * 3, [15] * 3]


def test_the_script(two_runs):
    both = two_runs / 'both'
    out = run_here('plot.py', f'--runs={two_runs / "a"},{two_runs / "b"}', '--x=seconds',
                   f'--png={both}')
    assert out.stdout == f'drawn: {both}\n' and png_size(both) == (1100, 700)
    for flags, words in (([f'--runs={two_runs}'], 'has no metrics.jsonl'),
                         (['--runs='], 'has no metrics.jsonl'),
                         (['--x=time'], 'use iter, tokens or seconds'),
                         ([f'--png={two_runs}'], 'cannot be written')):
        args = [f'--runs={two_runs / "a"}', *flags]
        assert words in run_here('plot.py', *args, ok=False).stderr


@pytest.mark.parametrize('script', ['plot.py', 'train.py'])
def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(char_data, tmp_path, script):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--init_from=auto']
    run_here('train.py', *args, '--max_iters=2')
    before = (tmp_path / 'loss.png').read_bytes()
    command = [script, f'--runs={tmp_path}']
    if script == 'train.py':
        command = [script, *args, '--max_iters=3']
    shell = f'ulimit -f {len(before) // 2048}; exec {sys.executable} {shlex.join(command)}'
    out = subprocess.run(['bash', '-c', shell], cwd=ROOT, capture_output=True, text=True)
    assert 'File too large' in out.stderr and 'Traceback' not in out.stderr
    assert (tmp_path / 'loss.png').read_bytes() == before
    assert not (tmp_path / 'loss.png.tmp').exists()


def test_a_picture_does_not_take_the_place_of_a_device(two_runs):
    os.mkfifo(two_runs / 'pipe')
    (two_runs / 'link').symlink_to('/dev/null')
    for name in ('pipe', 'link'):
        args = [f'--runs={two_runs / "a"}', f'--png={two_runs / name}']
        assert 'and not a file' in run_here('plot.py', *args, ok=False).stderr
    assert (two_runs / 'pipe').is_fifo() and (two_runs / 'link').is_char_device()


def test_lines_that_are_not_a_runs_own_are_skipped(two_runs):
    before = plot.read_metrics(two_runs / 'a')
    own_lines = ['{"event": "note", "text": "x"}', '[' * 99999, '5', '{}',
                 '{"event": "eval", "iter": 50, "train/loss": "x", "val/loss": 1}']
    iteration = dict(event='iter', iter=50, ms=1, lr=1, loss=1, grad_norm=1)
    own_lines += [json.dumps({**iteration, key: value})
                  for key, value in (('ms', 0), ('iter', 10 ** 400), ('lr', -10 ** 40),
                                     ('loss', 1e300))]
    own_lines += [json.dumps({name: iteration[name] for name in iteration if name != key})
                  for key in iteration]
    with open(two_runs / 'a' / 'metrics.jsonl', 'a') as f:
        f.write('\n' + '\n'.join(own_lines))
    assert plot.read_metrics(two_runs / 'a') == before


RUN = json.dumps(dict(event='run', config=dict(gradient_accumulation_steps=1, batch_size=1,
                                               block_size=1)))


@pytest.mark.parametrize('content', [
    RUN.replace('"batch_size": 1', f'"batch_size": {10 ** 400}').encode(), b'', b'not JSON\n',
    b'\xff\xfe\x00', b'3\n[]\n"x"\n', b'{"event": "iter", "iter": 3}\n',
    RUN.encode(), b'{"event": "run"}\n', b'{"event": "run", "config": {}}\n',
    RUN.encode() + b'\n{"event": "iter"}\n', RUN.encode() + b'\n{"event": "other", "iter": 1}\n'])
def test_metrics_that_cannot_be_drawn_are_one_line(tmp_path, content):
    (tmp_path / 'metrics.jsonl').write_bytes(content)
    assert str(tmp_path) in run_here('plot.py', f'--runs={tmp_path}', ok=False).stderr
    assert not (tmp_path / 'loss.png').exists()
