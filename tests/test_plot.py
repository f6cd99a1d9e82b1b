"""plot.py: what it reads of metrics.jsonl, and that a run leaves its picture."""
import json

import numpy as np
import pytest
from conftest import TINY, run

import plot


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b'\x89PNG\r\n\x1a\n'
    return int.from_bytes(head[16:20], 'big'), int.from_bytes(head[20:24], 'big')


def test_a_run_leaves_its_picture(tmp_path, char_data):
    args = [*[a for a in TINY if 'png' not in a], f'--dataset={char_data}', '--eval_interval=5', f'--out_dir={tmp_path}']
    run('train.py', *args, '--max_iters=10')
    assert png_size(tmp_path / 'loss.png') == (1100, 700)
    (tmp_path / 'loss.png').unlink()
    (tmp_path / 'loss.png').mkdir()  # where it can't be written it's only said
    assert 'warning: the picture: IsADirectoryError' in run('train.py', *args, '--max_iters=11', '--init_from=resume').stderr


@pytest.fixture
def two_runs(tmp_path):
    for name, ms in (('a', 1000), ('b', 2000)):
        events = [dict(event='run', config=dict(gradient_accumulation_steps=2, batch_size=3, block_size=5))]
        for i in (0, 10, 20):  # an evaluation before, then a line of the iterations since the last
            events += [{'event': 'eval', 'iter': i, 'train/loss': 3 - i / 20, 'val/loss': 3 - i / 30},
                       dict(event='iter', iter=i, loss=3 - i / 20, ms=ms, lr=0.1, grad_norm=None if i == 10 else 1.0)]
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, events)) + '\n{"event": "it')
    return tmp_path


def test_events_and_their_places(two_runs):
    with open(two_runs / 'a' / 'metrics.jsonl', 'a') as f:  # resumed from iteration 10
        f.write('\n' + '\n'.join(json.dumps(dict(event='iter', iter=i, loss=9.0, ms=3000, lr=0.1, grad_norm=1.0)) for i in (20, 10)) + '\n')
    config, iterations, evaluations = plot.read_metrics(two_runs / 'a')
    assert config['batch_size'] == 3 and [(e['iter'], e['loss'], e['ms']) for e in iterations] == [(0, 3, 1000), (10, 9, 3000), (20, 9, 3000)]
    assert [e['iter'] for e in evaluations] == [0, 10, 20]
    places = {x: plot.positions(evaluations, iterations, x, 30).tolist() for x in ('iter', 'tokens', 'seconds')}
    # 1 iteration of a second, then 10 of 3: before iteration 10 are the first and nine of these
    assert places == {'iter': [0, 10, 20], 'tokens': [0, 300, 600], 'seconds': [0, 1 + 9 * 3, 1 + 19 * 3]}


def test_two_runs_in_one_picture(two_runs):
    out = run('plot.py', f'--runs={two_runs / "a"},{two_runs / "b"}', '--x=seconds', f'--png={two_runs / "both.png"}')
    assert out.stdout == f'drawn: {two_runs / "both.png"}\n' and png_size(two_runs / 'both.png') == (1100, 700)
    plot.draw([two_runs / 'a'], two_runs / 'one.png', 'seconds')
    from matplotlib.image import imread
    assert np.any(imread(two_runs / 'one.png') != imread(two_runs / 'both.png'))
    assert 'has no metrics.jsonl' in run('plot.py', f'--runs={two_runs}', ok=False).stderr
    assert 'use iter, tokens or seconds' in run('plot.py', f'--runs={two_runs / "a"}', '--x=time', ok=False).stderr
