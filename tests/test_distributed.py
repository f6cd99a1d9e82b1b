"""Two processes on this machine against one: the same batch gives the same losses."""
import pytest
import torch
from conftest import TINY, metrics, run, run_ranks, torchrun

import checkpoint
import distributed
from model import GPT, GPTConfig


@pytest.mark.parametrize('dropout', ['0.0', '0.2'])
def test_two_ranks_equal_one(char_data, tmp_path, dropout):
    args = [*TINY, f'--dataset={char_data}', '--max_iters=8', '--eval_interval=4', '--eval_iters=5', f'--dropout={dropout}', '--gradient_accumulation_steps=4']
    run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    out = ''.join(run_ranks(2, 'train.py', *args, f'--out_dir={tmp_path / "two"}'))
    assert '512 tokens/iter = 2 accumulation x 2 ranks x 4 batch' in out and '2 ranks over gloo' in out
    assert out.count('iter 0: loss') == 1  # rank 0 alone prints
    for event, keys in (('iter', ['loss']), ('eval', ['train/loss', 'val/loss'])):
        one, two = (metrics(tmp_path / d, event) for d in ('one', 'two'))
        assert len(one) == len(two) > 2
        for key in keys:
            assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-4)
    one, two = (torch.load(tmp_path / d / 'ckpt.pt', weights_only=True) for d in ('one', 'two'))
    assert list(one['model']) == list(two['model'])
    for k, v in one['model'].items():  # AdamW turns a rounding difference of a tiny gradient into part of a step of 3e-3
        assert (two['model'][k] - v).abs().max() < 1e-3


def test_accumulation_that_cannot_be_shared_out(char_data, tmp_path):
    with pytest.raises(AssertionError) as error:
        torchrun(2, 'train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--gradient_accumulation_steps=5')
    said = str(error.value)
    assert said.count('error: gradient_accumulation_steps=5 is not divisible by the 2 ranks; use --gradient_accumulation_steps=4 or 6') == 1
    assert not (tmp_path / 'out').exists()


def test_too_many_bad_gradients_end_all_ranks_and_the_state_is_whole(char_data, tmp_path):
    with pytest.raises(AssertionError) as error:
        torchrun(2, 'train.py', *TINY, f'--dataset={char_data}', '--max_iters=20', '--learning_rate=1e30', '--decay_lr=False', '--max_bad_steps=3',
                 f'--out_dir={tmp_path}')
    assert str(error.value).count('error: 3 updates in a row had a gradient that is not finite') == 1 and 'train.py", line' not in str(error.value)
    assert all(w.isfinite().all() for w in checkpoint.load(str(tmp_path / 'ckpt_last.pt'))['model'].values())


def test_restarts_that_would_begin_again_are_refused(char_data, tmp_path):
    out = run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out', ok=False, cwd=tmp_path, TORCHELASTIC_MAX_RESTARTS='3')
    assert '--init_from=auto' in out.stderr


def test_what_every_rank_finds_is_said_once(char_data, tmp_path):
    with pytest.raises(AssertionError) as error:
        torchrun(2, 'train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--init_from=resume')
    assert str(error.value).count('no checkpoint that can be read') == 1


def test_gradients_travel_in_buckets_during_the_backward_pass():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=6, n_head=4, n_embd=512))  # 76 MB of gradients
        wrapped, seen = distributed.wrap(model, 'cpu', 'ddp'), []

        def sent(_, bucket):
            seen.append('bucket')
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, sent)
        for number, block in enumerate(model.transformer.h):
            block.register_full_backward_hook(lambda *_, number=number: seen.append(number))
        x = torch.randint(64, (2, 17))
        for iteration in range(2):  # the buckets are made anew, in the order of the backward pass, after the first
            seen.clear()
            for now in (False, True):
                with distributed.sync_gradients(wrapped, now):
                    wrapped(x[:, :-1], x[:, 1:])[1].backward()
                assert now or 'bucket' not in seen
        after_each = [seen[:len(seen) - seen[::-1].index(number)].count('bucket') for number in (5, 2, 0)]
        assert seen.count('bucket') >= 4 and after_each[1] >= 1 and after_each[2] >= 2, seen
    finally:
        torch.distributed.destroy_process_group()
