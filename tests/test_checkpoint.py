"""Checkpoint files: nanoGPT can read ours, damage is noticed, and no code in them is run."""
import os

import pytest
import torch
from conftest import FAST, GOLDEN, TINY, run

from model import GPT, GPTConfig
from runtime import checkpoint, restore

NANOGPT = os.path.join(GOLDEN, 'nanogpt_ckpt_char')


def test_our_checkpoints_have_what_nanogpt_reads(trained):
    ours = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    theirs = torch.load(os.path.join(NANOGPT, 'ckpt.pt'), weights_only=True)
    assert set(ours) - {'meta', 'finished', 'optimizer_name'} == set(theirs)
    assert set(ours['model_args']) == set(theirs['model_args'])
    model = GPT(GPTConfig(**ours['model_args']))
    shapes = {name: w.shape for name, w in model.state_dict().items()}
    assert {name: w.shape for name, w in ours['model'].items()} == shapes
    assert set(ours['config']) >= set(theirs['config'])
    assert type(ours['iter_num']) is int and type(ours['best_val_loss']) is float
    # the optimizer has the same groups in the same order, so nanoGPT's load_state_dict takes it
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    optimizer.load_state_dict(ours['optimizer'])
    for group, count in zip(ours['optimizer']['param_groups'], (10, 5)):
        assert len(group['params']) == count
    matrix_shapes = [tuple(p.shape) for p in model.parameters() if p.dim() >= 2]
    moments = [ours['optimizer']['state'][i]['exp_avg'] for i in range(10)]
    assert [tuple(moment.shape) for moment in moments] == matrix_shapes


def test_options_are_in_model_args_only_where_they_are_used(tmp_path, char_data, trained):
    run('train.py', *TINY, *FAST, f'--dataset={char_data}', f'--out_dir={tmp_path}',
        '--max_iters=2')
    path = str(tmp_path / 'ckpt.pt')
    state = checkpoint.load(path)
    plain = checkpoint.load(os.path.join(trained, 'ckpt.pt'))
    more = set(state['model_args']) - set(plain['model_args'])
    assert {key: state['model_args'][key] for key in more} == dict(
        rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2)
    model = restore.build_model(GPT, GPTConfig, state, path)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    for name, w in model.state_dict().items():
        assert torch.equal(w, state['model'][name])


def test_prefixes_and_old_masks_are_left_out(tmp_path):
    model = GPT(GPTConfig(8, 20, 1, 2, 16))
    prefix = 'module._orig_mod.'
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    # nanoGPT had this mask before torch 2
    weights[prefix + 'transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8)
    args = vars(model.config) | {}
    checkpoint.save(dict(model=weights, model_args=args, iter_num=1), str(tmp_path))
    state, path = checkpoint.load_best(str(tmp_path))
    state['model_args'].pop('gelu')
    again = restore.build_model(GPT, GPTConfig, state, path)
    x = torch.randint(20, (1, 8))
    assert torch.equal(model(x)[0], again(x)[0])
    assert again.lm_head.weight is again.transformer.wte.weight
    assert all(p.requires_grad for p in again.parameters())


def tiny_state(iter_num):
    model = GPT(GPTConfig(8, 20, 1, 2, 16))
    args = {key: getattr(model.config, key) for key in checkpoint.NANOGPT_ARGS}
    return dict(model=model.state_dict(), model_args=args, iter_num=iter_num)


def test_newest_to_resume_best_to_sample(tmp_path, capsys):
    out_dir = str(tmp_path)
    assert not checkpoint.exists(out_dir)
    checkpoint.save(tiny_state(5), out_dir, is_best=True)
    checkpoint.save(tiny_state(9), out_dir, is_best=False)
    assert checkpoint.load_newest(out_dir)[0]['iter_num'] == 9
    assert checkpoint.load_best(out_dir)[0]['iter_num'] == 5
    (tmp_path / 'ckpt.pt').unlink()
    assert checkpoint.load_best(out_dir)[1].endswith('ckpt_last.pt')
    checkpoint.save(tiny_state(10), out_dir, is_best=True)
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'ckpt_last.pt']
    assert checkpoint.load_newest(out_dir)[0]['iter_num'] == 10
    # a damaged file is named, and the other one is used
    checkpoint.save(tiny_state(12), out_dir, is_best=False)
    content = bytearray((tmp_path / 'ckpt_last.pt').read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / 'ckpt_last.pt').write_bytes(content)
    assert checkpoint.load_newest(out_dir)[0]['iter_num'] == 10
    assert 'ckpt_last.pt is not a readable checkpoint' in capsys.readouterr().err
    (tmp_path / 'ckpt.pt').write_bytes(b'')
    with pytest.raises(SystemExit):
        checkpoint.load_newest(out_dir)
    assert f'error: {out_dir} has no checkpoint that can be read' in capsys.readouterr().err


def test_every_damage_is_noticed(tmp_path):
    checkpoint.save(tiny_state(5), str(tmp_path))
    path = str(tmp_path / 'ckpt.pt')
    weights = {name: w.clone() for name, w in checkpoint.load(path)['model'].items()}
    content = (tmp_path / 'ckpt.pt').read_bytes()
    for length in range(0, len(content), 997):
        (tmp_path / 'ckpt.pt').write_bytes(content[:length])
        with pytest.raises(ValueError, match='ckpt.pt is not a readable checkpoint'):
            checkpoint.load(path)
    noticed = 0
    for at in range(0, len(content), 97):
        changed = content[:at] + bytes([content[at] ^ 16]) + content[at + 1:]
        (tmp_path / 'ckpt.pt').write_bytes(changed)
        try:  # bytes between the records that mean nothing may change
            found = checkpoint.load(path)['model']
            assert all(torch.equal(weights[name], w) for name, w in found.items())
        except ValueError:
            noticed += 1
    assert noticed > 0.7 * len(content) / 97


def test_a_failed_save_keeps_the_earlier_checkpoint(tmp_path):
    checkpoint.save(tiny_state(5), str(tmp_path))
    with pytest.raises(AttributeError):  # this state cannot be written
        checkpoint.save({**tiny_state(6), 'bad': lambda: 0}, str(tmp_path))
    assert checkpoint.load_newest(str(tmp_path))[0]['iter_num'] == 5


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ['CANARY'],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    canary = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(canary))
    torch.save({**tiny_state(1), 'config': Hostile()}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='is not a readable checkpoint'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))
    with pytest.raises(AssertionError, match='has no checkpoint that can be read'):
        run('sample.py', f'--out_dir={tmp_path}')
    assert not canary.exists()
    torch.load(tmp_path / 'ckpt.pt', weights_only=False)  # this shows that the code works
    assert canary.exists()
