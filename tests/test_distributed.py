"""Several processes on this machine compared with one: the same batch gives the same losses."""
import re

import pytest
import torch
from conftest import TINY, metrics, run, run_ranks, torchrun

from model import GPT, GPTConfig
from runtime import checkpoint, distributed, ranges


@pytest.mark.parametrize('dropout', ['0.0', '0.2'])
def test_two_ranks_equal_one(char_data, tmp_path, dropout):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=8', '--eval_interval=4',
            '--eval_iters=5', f'--dropout={dropout}', '--gradient_accumulation_steps=4']
    run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    out = ''.join(run_ranks(2, 'train.py', *args, f'--out_dir={tmp_path / "two"}'))
    assert ('tokens per iteration will be: 512 = 2 micro-batches x 2 ranks x 4 sequences x '
            '32 tokens') in out
    assert '2 ranks over gloo' in out
    assert out.count('iter 0: loss') == 1  # only rank 0 prints
    for event, keys in (('iter', ['loss']), ('eval', ['train/loss', 'val/loss'])):
        one, two = (metrics(tmp_path / folder, event) for folder in ('one', 'two'))
        assert len(one) == len(two) > 2
        for key in keys:
            assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-4)
    one, two = (torch.load(tmp_path / folder / 'ckpt.pt', weights_only=True)['model']
                for folder in ('one', 'two'))
    assert list(one) == list(two)
    # AdamW turns a rounding difference of a tiny gradient into a part of a step of 3e-3
    assert all((two[name] - w).abs().max() < 1e-3 for name, w in one.items())


# -----------------------------------------------------------------------------
# micro-batches that cannot be divided evenly among the ranks
CHANGE = re.compile(r'--gradient_accumulation_steps=(\d+) makes it (\d+)\n')
HINT = re.compile(r'use --gradient_accumulation_steps=(\d+)(?: --batch_size=(\d+))?')
FIRST_OF_MANY = dict(RANK='0', LOCAL_RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1')


@pytest.mark.parametrize('steps, batch_size, ranks', [(1, 12, 2), (5, 4, 2), (40, 12, 16)])
def test_the_hint_for_accumulation_works_and_keeps_tokens_per_iter(char_data, tmp_path, steps,
                                                                   batch_size, ranks):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1',
            f'--gradient_accumulation_steps={steps}', f'--batch_size={batch_size}']
    # rank 0 sees the mistake before it waits for the others
    err = run('train.py', *args, ok=False, **FIRST_OF_MANY, WORLD_SIZE=str(ranks)).stderr
    assert err.startswith(f'error: gradient_accumulation_steps={steps} is not divisible by the '
                          f'{ranks} ranks; ')
    assert not (tmp_path / 'out').exists()
    new_steps, new_batch_size = HINT.search(err).groups(default=batch_size)
    sequences = steps * batch_size
    assert int(new_steps) * int(new_batch_size) == sequences
    assert int(new_steps) % ranks == 0
    outputs = run_ranks(ranks, 'train.py', *args, f'--gradient_accumulation_steps={new_steps}',
                        f'--batch_size={new_batch_size}')
    assert f'tokens per iteration will be: {sequences * 32:,} = ' in outputs[0]
    assert 'iter 0: loss' in outputs[0]


def test_one_sequence_cannot_be_divided_among_two_ranks(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1',
            '--gradient_accumulation_steps=1', '--batch_size=1']
    err = run('train.py', *args, ok=False, **FIRST_OF_MANY, WORLD_SIZE='2').stderr
    assert CHANGE.search(err) and not HINT.search(err)
    assert not (tmp_path / 'out').exists()


def test_the_hint_for_accumulation_is_right_for_all_small_numbers(capsys):
    cases = [(steps, batch_size, ranks) for steps in range(1, 13) for batch_size in range(1, 7)
             for ranks in range(1, 9)] + [(40, 12, 16)]
    for steps, batch_size, ranks in cases:
        if steps % ranks == 0:
            ranges.check_accumulation(steps, batch_size, ranks)
            assert capsys.readouterr().err == ''
            continue
        with pytest.raises(SystemExit):
            ranges.check_accumulation(steps, batch_size, ranks)
        err = capsys.readouterr().err
        if steps * batch_size % ranks:
            assert not HINT.search(err), err
            new_steps, sequences = map(int, CHANGE.search(err).groups())
            assert new_steps % ranks == 0 and sequences == new_steps * batch_size, err
            continue
        new_steps, new_batch_size = map(int, HINT.search(err).groups())
        assert new_steps * new_batch_size == steps * batch_size, err
        assert new_steps % ranks == 0 and new_batch_size <= batch_size, err  # no more memory


# -----------------------------------------------------------------------------
# mistakes and faults of a run by torchrun
def test_accumulation_that_cannot_be_divided_is_reported_once(char_data, tmp_path):
    with pytest.raises(AssertionError) as error:
        torchrun(2, 'train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}',
                 '--gradient_accumulation_steps=5')
    message = ('error: gradient_accumulation_steps=5 is not divisible by the 2 ranks; for the same '
               'tokens/iter use --gradient_accumulation_steps=10 --batch_size=2')
    assert str(error.value).count(message) == 1
    assert not (tmp_path / 'out').exists()


def test_too_many_bad_gradients_end_all_ranks_with_finite_weights(char_data, tmp_path):
    with pytest.raises(AssertionError) as error:
        torchrun(2, 'train.py', *TINY, f'--dataset={char_data}', '--max_iters=20',
                 '--learning_rate=1e30', '--decay_lr=False', '--max_bad_steps=3',
                 f'--out_dir={tmp_path}')
    text = str(error.value)
    assert text.count('error: 3 updates in a row had a gradient that is not finite') == 1
    assert 'train.py", line' not in text
    weights = checkpoint.load(str(tmp_path / 'ckpt_last.pt'))['model']
    assert all(w.isfinite().all() for w in weights.values())


def test_restarts_that_would_begin_again_are_refused(char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out', ok=False,
              cwd=tmp_path, TORCHELASTIC_MAX_RESTARTS='3')
    assert '--init_from=auto' in out.stderr


def test_what_every_rank_finds_is_reported_once(char_data, tmp_path):
    with pytest.raises(AssertionError) as error:
        torchrun(2, 'train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}',
                 '--init_from=resume')
    assert str(error.value).count('does not exist; train first') == 1


def test_gradients_are_sent_in_buckets_during_the_backward_pass():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        # 76 MB of gradients
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=6, n_head=4, n_embd=512))
        wrapped = distributed.wrap(model, 'cpu', 'ddp')
        events = []  # 'bucket' for one that is sent, and a block's number for the end of its pass

        def send(_, bucket):
            events.append('bucket')
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, send)
        for number, block in enumerate(model.transformer.h):
            block.register_full_backward_hook(lambda *_, number=number: events.append(number))
        x = torch.randint(64, (2, 17))
        # after the first iteration ddp makes the buckets again, in the order of the backward pass
        for iteration in range(2):
            events.clear()
            for now in (False, True):
                with distributed.sync_gradients(wrapped, now):
                    wrapped(x[:, :-1], x[:, 1:])[1].backward()
                assert now or 'bucket' not in events
        sent = {number: events[:len(events) - events[::-1].index(number)].count('bucket')
                for number in (5, 2, 0)}  # buckets before the end of a block's backward pass
        assert events.count('bucket') >= 4 and sent[2] >= 1 and sent[0] >= 2, events
    finally:
        torch.distributed.destroy_process_group()
