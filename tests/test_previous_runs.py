"""Earlier runs in a folder: moved, kept, listed and continued, and never lost."""
import os
import signal
import sys

import pytest
import torch
from conftest import TINY, Process, has_iterations, list_files, run, wait_until
from test_run_dir import make_state, read_iter_num, start_run

from runtime import checkpoint
from runtime.previous_runs import list_previous_runs, move_run
from runtime.run_dir import RunDir


def make_id(text):
    return dict(bytes=10, hash=text)


@pytest.mark.parametrize('moves', range(3))
def test_moving_an_earlier_run_survives_a_crash(tmp_path, monkeypatch, moves):
    run_dir = start_run(tmp_path)
    for iter_num, is_best in ((1, True), (2, False)):
        run_dir.save(make_state(iter_num), is_best)
    run_dir.close()
    move, moved = os.replace, []

    def crash(a, b):
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(a)
        move(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, 'replace', crash)
        move_run(str(tmp_path))
    assert read_iter_num(tmp_path / 'ckpt_last.pt') == 2  # an older one must not be the newest
    move_run(str(tmp_path))
    assert not checkpoint.exists(str(tmp_path))
    found = sorted(map(read_iter_num, tmp_path.glob('previous-*/ckpt*.pt')))
    assert found == [1, 2] and list_previous_runs(str(tmp_path))[0][0] == 2


def test_two_runs_never_share_a_folder(tmp_path):
    (tmp_path / 'previous-1').mkdir()
    checkpoint.save(make_state(7), str(tmp_path / 'previous-1'), is_best=False)
    checkpoint.save(make_state(3), str(tmp_path))  # somebody has put it there
    move_run(str(tmp_path))
    assert list_files(tmp_path / 'previous-1') == ['ckpt_last.pt']
    assert list_files(tmp_path / 'previous-2') == ['ckpt.pt']


@pytest.mark.parametrize('value, iter_num', [(torch.tensor(30), 0), (30.0, 30), ('x', 0),
                                             (float('nan'), 0), (None, 0)])
def test_earlier_runs_of_other_programs_are_listed(tmp_path, value, iter_num):
    torch.save({**make_state(0), 'iter_num': value}, tmp_path / 'ckpt.pt')
    move_run(str(tmp_path))
    assert list_previous_runs(str(tmp_path)) == [(iter_num, str(tmp_path / 'previous-1'))]


def test_no_earlier_run_is_ever_removed(tmp_path, capsys):
    (tmp_path / 'previous').mkdir()  # as older versions of this project named it
    checkpoint.save(make_state(50), str(tmp_path / 'previous'))
    for iter_num in (300, 3, 20):
        run_dir = RunDir(str(tmp_path))
        run_dir.begin(is_new=True)
        run_dir.save(make_state(iter_num), is_best=iter_num != 3)
        run_dir.close()
    out = capsys.readouterr().out
    assert 'a run of 300 iterations: it is now in' in out and 'a run of 3 iterations' in out
    runs = list_previous_runs(str(tmp_path))
    assert runs == [(300, str(tmp_path / 'previous-1')), (50, str(tmp_path / 'previous')),
                    (3, str(tmp_path / 'previous-2'))]
    assert read_iter_num(tmp_path / 'ckpt.pt') == 20


def test_a_file_in_the_way_of_an_earlier_run(tmp_path):
    (tmp_path / 'previous-1').write_text('somebody has named it so')
    checkpoint.save(make_state(5), str(tmp_path))
    move_run(str(tmp_path))
    assert read_iter_num(tmp_path / 'previous-2' / 'ckpt.pt') == 5


@pytest.mark.parametrize('old_data, is_kept', [
    (dict(val=make_id('a'), train=make_id('c')), False), (dict(val=make_id('b')), True),
    (dict(val=7), True), (7, True), (None, False)])  # None: nanoGPT's, of a dataset of this name
@pytest.mark.parametrize('first_is_best', [True, False])
def test_the_best_of_other_data_is_kept(tmp_path, old_data, is_kept, first_is_best):
    facts = dict(config=dict(dataset='x'), model_args={},
                 data=dict(val=make_id('a'), train=make_id('d')))
    checkpoint.save({**make_state(5), **facts, 'data': old_data}, str(tmp_path))
    before = (tmp_path / 'ckpt.pt').read_bytes()
    run_dir = start_run(tmp_path)
    for iter_num, is_best in ((6, first_is_best), (7, True), (8, True)):
        run_dir.save({**make_state(iter_num), **facts}, is_best)
    assert run_dir.close(8) and read_iter_num(tmp_path / 'ckpt.pt') == 8
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == is_kept
    if is_kept:
        assert (tmp_path / 'previous-1' / 'ckpt.pt').read_bytes() == before
        move_run(str(tmp_path))
        assert read_iter_num(tmp_path / 'previous-2' / 'ckpt.pt') == 8


def test_the_best_of_other_data_is_kept_once(tmp_path):
    facts = dict(config=dict(dataset='x'), model_args={})
    checkpoint.save({**make_state(5), **facts, 'data': dict(val=make_id('a'))}, str(tmp_path))
    run_dir = start_run(tmp_path)
    (tmp_path / 'metrics.jsonl').unlink()
    (tmp_path / 'ckpt.pt.tmp').mkdir()  # saves fail
    for iter_num in (6, 7):
        run_dir.save({**make_state(iter_num), **facts, 'data': dict(val=make_id('b'))}, True)
        run_dir.wait()
    (tmp_path / 'ckpt.pt.tmp').rmdir()
    run_dir.save({**make_state(8), **facts, 'data': dict(val=make_id('b'))}, True)
    assert run_dir.close(8) and list_previous_runs(str(tmp_path)) == [
        (5, str(tmp_path / 'previous-1'))]


@pytest.mark.parametrize('args, other_args, is_kept', [
    (dict(n_layer=1), dict(n_layer=2), True), (dict(dropout=0.1), dict(dropout=0.2), False),
    (dict(n_layer=1, mine=1), dict(n_layer=1), False), (5, dict(n_layer=1), True)])
def test_the_checkpoint_of_another_model_is_kept(tmp_path, args, other_args, is_kept):
    facts = dict(config=dict(dataset='x'), data=dict(val=make_id('a')))
    checkpoint.save({**make_state(5), **facts, 'model_args': args}, str(tmp_path))
    run_dir = start_run(tmp_path)
    run_dir.save({**make_state(6), **facts, 'model_args': other_args}, True)
    run_dir.close()
    assert (tmp_path / 'previous-1' / 'ckpt.pt').exists() == is_kept


@pytest.mark.parametrize('is_relative', [True, False])
def test_a_link_to_a_checkpoint_still_leads_to_it_when_it_is_moved(tmp_path, is_relative):
    (tmp_path / 'run').mkdir()
    checkpoint.save(make_state(5), str(tmp_path))
    target = '../ckpt.pt' if is_relative else tmp_path / 'ckpt.pt'
    (tmp_path / 'run' / 'ckpt.pt').symlink_to(target)
    move_run(str(tmp_path / 'run'))
    assert read_iter_num(tmp_path / 'run' / 'previous-1' / 'ckpt.pt') == 5
    assert not os.path.lexists(tmp_path / 'run' / 'ckpt.pt')


def test_a_checkpoint_that_cannot_be_read_is_moved(tmp_path, capsys):
    (tmp_path / 'ckpt.pt').write_bytes(b'PK')
    move_run(str(tmp_path))
    assert (tmp_path / 'previous-1' / 'ckpt.pt').read_bytes() == b'PK'
    assert 'had a checkpoint that cannot be read' in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'', b'{"event": "run"}\n', b'{"event": "run", "argv": 5}\n',
                                     b'{"event": "run", "argv": []}\n', b'\xff "event": "run"\n'])
def test_an_earlier_run_whose_command_is_not_known(tmp_path, capsys, monkeypatch, content):
    checkpoint.save(make_state(5), str(tmp_path))
    (tmp_path / 'metrics.jsonl').write_bytes(content)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--max_iters=9'])
    move_run(str(tmp_path))
    assert 'to continue it: python train.py' in capsys.readouterr().out
    assert read_iter_num(tmp_path / 'previous-1' / 'ckpt.pt') == 5


def test_the_command_for_a_run_of_several_ranks_says_so(tmp_path, capsys):
    checkpoint.save(make_state(5), str(tmp_path))
    (tmp_path / 'metrics.jsonl').write_text('{"event": "run", "argv": ["x", "a"], "world_size": 2}')
    move_run(str(tmp_path))
    assert ' --init_from=resume (with torchrun, it had 2 ranks)' in capsys.readouterr().out


def test_a_forgotten_flag_loses_nothing(char_data, tmp_path):
    folder = tmp_path / 'my run'
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={folder}', '--eval_interval=1000000']
    run('train.py', *args, '--max_iters=30')
    before = (folder / 'ckpt.pt').read_bytes()
    for number in (1, 2):
        process = Process('train.py', *args, '--max_iters=1000000')
        wait_until((folder / f'previous-{number}' / 'metrics.jsonl').exists, process)
        wait_until(has_iterations(folder, 1), process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
        assert f'it is now in {folder}/previous-{number}; to continue it: ' in out
        # the command of that run, not of the one that moved it
        command, = [line for line in out.splitlines() if 'to continue it' in line]
        assert ('--max_iters=30 ' in command) == (number == 1)
        assert ('--max_iters=1000000 ' in command) == (number == 2)
    assert (folder / 'previous-1' / 'ckpt.pt').read_bytes() == before
    assert f"'--out_dir={folder}/previous-2' --init_from=resume\n" in out  # for a shell
    (folder / 'ckpt_last.pt').unlink()
    for script, *flags in (('sample.py',), ('train.py', *TINY, '--init_from=resume',
                                            f'--dataset={char_data}')):
        err = run(script, *flags, f'--out_dir={folder}', ok=False).stderr
        assert f'{folder}/previous-1 (30 iterations)' in err
    out = run('train.py', *args, '--init_from=auto', '--max_iters=1')
    assert f'{folder}/previous-1 (30 iterations)' in out.stderr and 'from scratch' in out.stdout
