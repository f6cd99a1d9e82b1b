"""Checkpoint files: nanoGPT can read ours, damage is noticed, and no code in them is run."""
import os
import shutil

import pytest
import torch
from conftest import FAST, GOLDEN, TINY, expect_error, run, run_here

from model import GPT, GPTConfig
from runtime import checkpoint, restore

NANOGPT = os.path.join(GOLDEN, 'nanogpt_ckpt_char')


def test_our_checkpoints_have_what_nanogpt_reads(trained):
    ours = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    theirs = torch.load(os.path.join(NANOGPT, 'ckpt.pt'), weights_only=True)
    assert set(ours) - {'meta', 'finished', 'optimizer_name', 'data', 'val_loss'} == set(theirs)
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
        checkpoint.save({**tiny_state(6), 'config': {'bad': lambda: 0}}, str(tmp_path))
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


# -----------------------------------------------------------------------------
# which file is read
@pytest.fixture
def stopped(trained, tmp_path):
    """A run that was stopped: its newest state is in ckpt_last.pt."""
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    torch.save(state, tmp_path / 'ckpt.pt')
    torch.save({**state, 'iter_num': 75}, tmp_path / 'ckpt_last.pt')
    return tmp_path


@pytest.mark.parametrize('command', [
    ['sample.py', '--num_samples=1', '--max_new_tokens=1'], ['convert.py', '--hf_dir=HF'],
    ['train.py', *TINY, '--init_from=resume', '--eval_only']])
def test_the_file_that_is_read_is_named_and_can_be_chosen(stopped, char_data, command):
    args = [arg.replace('HF', str(stopped / 'hf')) for arg in command]
    if command[0] == 'train.py':
        args.append(f'--dataset={char_data}')
    result = run_here(*args, f'--out_dir={stopped}')
    said = result.stdout + result.stderr
    best, last = stopped / 'ckpt.pt', stopped / 'ckpt_last.pt'
    assert f'{best} is from iteration 60; {last} is newer, from iteration 75' in said
    assert f'--out_dir={last}' in said
    args = [arg.replace(str(stopped / 'hf'), str(stopped / 'hf2')) for arg in args]
    result = run_here(*args, f'--out_dir={last}')
    said = result.stdout + result.stderr
    assert str(last) in said and str(best) not in said and 'newer' not in said


def test_a_run_needs_a_folder_and_not_a_file(stopped, char_data):
    for init_from in ('scratch', 'resume', 'auto'):
        err = run('train.py', *TINY, f'--dataset={char_data}', f'--init_from={init_from}',
                  f'--out_dir={stopped / "ckpt.pt"}', ok=False).stderr
        assert 'is not a folder' in err


# -----------------------------------------------------------------------------
# weights that are not finite
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('name', ['transformer.wte.weight', 'transformer.h.1.ln_2.weight',
                                  'transformer.h.0.mlp.c_proj.weight'])
def test_weights_that_are_not_finite_are_not_used(trained, tmp_path, capsys, value, name):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    state['model'][name].view(-1)[-1] = value
    torch.save(state, tmp_path / 'ckpt.pt')
    state, path = checkpoint.load_best(str(tmp_path))
    line = expect_error(capsys, restore.build_model, GPT, GPTConfig, state, path)
    assert 'are not finite' in line and path in line


def test_sampling_from_weights_that_are_not_finite_is_an_error(trained, tmp_path):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    state['model']['transformer.wpe.weight'][3, 3] = float('nan')
    torch.save(state, tmp_path / 'ckpt.pt')
    assert 'not finite' in run('sample.py', f'--out_dir={tmp_path}', ok=False).stderr
    model = GPT(GPTConfig(**state['model_args']))
    model.load_state_dict(state['model'])
    assert not checkpoint.has_finite_weights(model)
    model.transformer.wpe.weight.data[3, 3] = 3e38  # large, but a number
    assert checkpoint.has_finite_weights(model)
    model.register_buffer('mask', torch.full((4, 4), float('-inf')).triu(1))  # not a weight
    assert checkpoint.has_finite_weights(model)


@pytest.mark.parametrize('option', ['--temperature=0', '--stream=True', '--stop=x'])
def test_sampling_from_logits_that_are_not_finite_is_an_error(trained, tmp_path, option):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    state['model']['transformer.ln_f.weight'].fill_(3e38)
    torch.save(state, tmp_path / 'ckpt.pt')
    out = run('sample.py', f'--out_dir={tmp_path}', option, ok=None)
    assert "\nerror: the model's logits are NaN or infinite" in out.stderr
    assert out.returncode == 1 and 'Traceback' not in out.stderr


def test_a_val_loss_of_nan_does_not_replace_the_best(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=2']
    run('train.py', *args)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    config = tmp_path / 'nan.py'
    config.write_text("from runtime import distributed\n"  # it sums up the losses
                      "distributed.all_reduce_sum = lambda x: x * float('nan')\n")
    run('train.py', str(config), *args, '--max_iters=4', '--init_from=resume')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert checkpoint.load(str(tmp_path / 'ckpt_last.pt'))['iter_num'] == 4


@pytest.mark.parametrize('name', ['old.pt', 'ckpt_last.pt', 'ckpt.pt'])
def test_a_newer_checkpoint_next_to_a_file_is_named(trained, tmp_path, name):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    newest = 'ckpt.pt' if name == 'ckpt_last.pt' else 'ckpt_last.pt'
    torch.save({**state, 'iter_num': 10}, tmp_path / name)
    torch.save({**state, 'iter_num': 30}, tmp_path / newest)
    for path, is_old in ((tmp_path / name, True), (tmp_path / newest, False)):
        err = run_here('sample.py', f'--out_dir={path}', '--num_samples=1',
                       '--max_new_tokens=1').stderr
        assert (f'{tmp_path / newest} is newer, from iteration 30' in err) == is_old


def test_a_file_is_evaluated_by_auto_too(trained, char_data):
    args = [*TINY, f'--dataset={char_data}', '--eval_only', '--init_from=auto']
    out = run_here('train.py', *args, f'--out_dir={os.path.join(trained, "ckpt.pt")}').stdout
    assert 'resumed from' in out


@pytest.mark.parametrize('name', ['a\0b', 'x' * 300, '/nowhere/../none', 5])
def test_a_dataset_that_cannot_exist_does_not_hide_the_table_of_characters(trained, char_data,
                                                                          tmp_path, name):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    del state['meta']  # as nanoGPT saves it
    torch.save({**state, 'config': {'dataset': name}}, tmp_path / 'ckpt.pt')
    args = ['sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=3']
    assert 'next to the checkpoint' in run_here(*args, ok=False).stderr
    shutil.copy(os.path.join(char_data, 'meta.pkl'), tmp_path)
    run_here(*args)


@pytest.mark.parametrize('spoil, is_kept', [
    ('p.data[0] = math.nan', False), ('p.data.mul_(math.inf)', False),
    ('p.data.fill_(3e38)', True)])  # finite, with a val loss of nan
def test_finite_weights_are_never_replaced_by_others(char_data, tmp_path, spoil, is_kept):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--eval_interval=5',
            '--max_bad_steps=3']
    run('train.py', *args, '--max_iters=5')
    before = (tmp_path / 'ckpt.pt').read_bytes()
    config = tmp_path / 'spoil.py'  # an update that spoils the weights
    config.write_text(f"""
import math
from runtime import optimizers
clip_and_step = optimizers.clip_and_step
def step(optimizer, *args):
    norm = clip_and_step(optimizer, *args)
    for group in optimizer.param_groups:
        for p in group['params']:
            {spoil}
    return norm
optimizers.clip_and_step = step
""")
    out = run('train.py', str(config), *args, '--max_iters=20', '--init_from=resume', ok=None)
    assert out.returncode == 1, out.stderr
    assert (tmp_path / 'ckpt.pt').read_bytes() == before
    assert (tmp_path / 'ckpt_last.pt').exists() == is_kept
    assert ('are not finite: they are not saved' in out.stderr) != is_kept
