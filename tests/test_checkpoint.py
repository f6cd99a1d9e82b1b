"""Checkpoints: nanoGPT's are read, ours can be read by nanoGPT, damage is noticed, nothing in them is run."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import FAST, GOLDEN, TINY, run

import checkpoint
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

NANOGPT = os.path.join(GOLDEN, 'nanogpt_ckpt_char')


@pytest.fixture(scope='module')
def facts():
    with open(os.path.join(NANOGPT, 'facts.json'), encoding='utf-8') as f:
        return json.load(f)


@pytest.fixture(scope='module')
def shakespeare_data(shakespeare, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('shakespeare_char'))
    run('data/shakespeare_char/prepare.py', f'--input={shakespeare}', f'--out_dir={folder}')
    return folder


def test_nanogpt_checkpoint_predicts_what_it_did_there(facts, golden_data, shakespeare_data):
    state, path = checkpoint.load_best(NANOGPT)
    assert {k: state['model_args'][k] for k in facts['model_args']} == facts['model_args'] and sorted(state) == facts['keys']
    model = checkpoint.build_model(state).eval()
    alphabet = golden_data['shakespeare_char']['meta']['alphabet']
    tokenizer = CharTokenizer({'vocab_size': 65, 'stoi': {c: i for i, c in enumerate(alphabet)}, 'itos': dict(enumerate(alphabet))})
    val = torch.from_numpy(np.fromfile(os.path.join(shakespeare_data, 'val.bin'), dtype=np.uint16).astype(np.int64))
    x, y = val[:64 * 32].view(64, 32), val[1:64 * 32 + 1].view(64, 32)
    with torch.no_grad():
        logits, loss = model(x, y)
    torch.testing.assert_close(loss.item(), facts['val_loss_first_64_windows'], rtol=1e-5, atol=0)
    assert tokenizer.decode(logits[:8].argmax(-1).flatten().tolist()) == facts['predictions_first_8_windows']
    torch.testing.assert_close(logits[5, -1].tolist(), facts['logits_window_5_last'], rtol=1e-4, atol=2e-5)  # recorded to 5 digits


def test_nanogpt_checkpoint_resumes_and_samples(facts, shakespeare_data, tmp_path):
    shutil.copy(os.path.join(NANOGPT, 'ckpt.pt'), tmp_path)
    os.chmod(tmp_path / 'ckpt.pt', 0o644)
    common = [f'--out_dir={tmp_path}', '--device=cpu', '--dtype=float32']
    text = facts['greedy_from_ROMEO']
    # nanoGPT's checkpoint has no character table: it is in the data folder that its configuration names, tried from here
    os.makedirs(tmp_path / 'data')
    shutil.copytree(shakespeare_data, tmp_path / 'data' / 'shakespeare_char')
    out = run('sample.py', *common, '--start=ROMEO:', '--temperature=0', '--num_samples=1', f'--max_new_tokens={len(text) - 6}', cwd=tmp_path)
    assert out.stdout == text + '\n' + '-' * 15 + '\n'
    # a compiled model saved it: the prefix of its keys is read and not written again
    assert all(k.startswith('_orig_mod.') for k in torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model'])
    out = run('train.py', *common, '--init_from=resume', f'--dataset={shakespeare_data}', '--block_size=32', '--batch_size=12',
              '--gradient_accumulation_steps=1', '--max_iters=4003', '--eval_iters=5').stdout
    assert 'iter 4000: loss' in out and 'iter 4002: loss' in out and 'iter 4003' not in out
    assert 'betas=(0.9, 0.99) come from the checkpoint' in out
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert state['iter_num'] == 4003 and state['meta']['vocab_size'] == 65
    assert state['optimizer']['state'][0]['step'] == 4003


def test_our_checkpoints_have_what_nanogpt_reads(trained):
    ours = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    theirs = torch.load(os.path.join(NANOGPT, 'ckpt.pt'), weights_only=True)
    assert set(ours) - {'meta', 'finished'} == set(theirs) and set(ours['model_args']) == set(theirs['model_args'])
    model = GPT(GPTConfig(**ours['model_args']))
    assert {k: v.shape for k, v in ours['model'].items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert set(ours['config']) >= set(theirs['config'])
    assert type(ours['iter_num']) is int and type(ours['best_val_loss']) is float
    # the optimizer's: same groups, same order, so nanoGPT's load_state_dict takes it
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    optimizer.load_state_dict(ours['optimizer'])
    for group, count in zip(ours['optimizer']['param_groups'], (10, 5)):
        assert len(group['params']) == count
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() >= 2]
    assert [tuple(ours['optimizer']['state'][i]['exp_avg'].shape) for i in range(10)] == shapes


def test_options_are_in_model_args_only_where_they_are_used(tmp_path, char_data, trained):
    run('train.py', *TINY, *FAST, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--max_iters=2')
    state, plain = checkpoint.load(str(tmp_path / 'ckpt.pt')), checkpoint.load(os.path.join(trained, 'ckpt.pt'))
    assert {k: state['model_args'][k] for k in set(state['model_args']) - set(plain['model_args'])} == dict(
        rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2)
    model = checkpoint.build_model(state)
    assert model.lm_head.weight is not model.transformer.wte.weight and not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    for k, w in model.state_dict().items():
        assert torch.equal(w, state['model'][k])


def test_prefixes_and_old_masks_are_left_out(tmp_path):
    model = GPT(GPTConfig(8, 20, 1, 2, 16))
    weights = {'module._orig_mod.' + k: v for k, v in model.state_dict().items()}
    weights['module._orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 8, 8)  # as nanoGPT had it before torch 2
    checkpoint.save(dict(model=weights, model_args=vars(model.config) | {}, iter_num=1), str(tmp_path))
    state, _ = checkpoint.load_best(str(tmp_path))
    state['model_args'].pop('gelu')
    again = checkpoint.build_model(state)
    x = torch.randint(20, (1, 8))
    assert torch.equal(model(x)[0], again(x)[0])
    assert again.lm_head.weight is again.transformer.wte.weight and all(p.requires_grad for p in again.parameters())


def tiny_state(iter_num):
    model = GPT(GPTConfig(8, 20, 1, 2, 16))
    args = {k: getattr(model.config, k) for k in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    return dict(model=model.state_dict(), model_args=args, iter_num=iter_num)


def test_newest_to_resume_best_to_sample(tmp_path, capsys):
    out_dir = str(tmp_path)
    assert not checkpoint.exists(out_dir)
    checkpoint.save(tiny_state(5), out_dir, best=True)
    checkpoint.save(tiny_state(9), out_dir, best=False)
    assert checkpoint.load_newest(out_dir)[0]['iter_num'] == 9 and checkpoint.load_best(out_dir)[0]['iter_num'] == 5
    (tmp_path / 'ckpt.pt').unlink()
    assert checkpoint.load_best(out_dir)[1].endswith('ckpt_last.pt')
    checkpoint.save(tiny_state(10), out_dir, best=True)
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'ckpt_last.pt'] and checkpoint.load_newest(out_dir)[0]['iter_num'] == 10
    # a damaged file is named and the other one taken
    checkpoint.save(tiny_state(12), out_dir, best=False)
    content = bytearray((tmp_path / 'ckpt_last.pt').read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / 'ckpt_last.pt').write_bytes(content)
    assert checkpoint.load_newest(out_dir)[0]['iter_num'] == 10
    assert 'ckpt_last.pt is no readable checkpoint' in capsys.readouterr().err
    (tmp_path / 'ckpt.pt').write_bytes(b'')
    with pytest.raises(SystemExit):
        checkpoint.load_newest(out_dir)
    assert 'error: no checkpoint that can be read' in capsys.readouterr().err


def test_every_damage_is_noticed(tmp_path):
    checkpoint.save(tiny_state(5), str(tmp_path))
    path, whole = str(tmp_path / 'ckpt.pt'), checkpoint.load(str(tmp_path / 'ckpt.pt'))['model']
    whole = {k: v.clone() for k, v in whole.items()}
    content = (tmp_path / 'ckpt.pt').read_bytes()
    for length in range(0, len(content), 997):
        (tmp_path / 'ckpt.pt').write_bytes(content[:length])
        with pytest.raises(ValueError, match='ckpt.pt is no readable checkpoint'):
            checkpoint.load(path)
    noticed = 0
    for at in range(0, len(content), 97):
        (tmp_path / 'ckpt.pt').write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1:])
        try:  # what lies between the records, and says nothing, may change
            assert all(torch.equal(whole[k], v) for k, v in checkpoint.load(path)['model'].items())
        except ValueError:
            noticed += 1
    assert noticed > 0.7 * len(content) / 97


def test_a_failed_save_keeps_the_earlier_checkpoint(tmp_path):
    checkpoint.save(tiny_state(5), str(tmp_path))
    with pytest.raises(AttributeError):  # a state that can't be written whole
        checkpoint.save({**tiny_state(6), 'bad': lambda: 0}, str(tmp_path))
    assert checkpoint.load_newest(str(tmp_path))[0]['iter_num'] == 5


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ['CANARY'],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv('CANARY', str(tmp_path / 'canary'))
    torch.save({**tiny_state(1), 'config': Hostile()}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='no readable checkpoint'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))
    with pytest.raises(AssertionError, match='no checkpoint that can be read'):
        run('sample.py', f'--out_dir={tmp_path}')
    assert not (tmp_path / 'canary').exists()
    torch.load(tmp_path / 'ckpt.pt', weights_only=False)  # it would have worked
    assert (tmp_path / 'canary').exists()


def test_optimizer_state_of_another_device_keeps_our_implementation(trained):
    state = checkpoint.load(os.path.join(trained, 'ckpt.pt'))
    model = checkpoint.build_model(state)
    saved = state['optimizer']
    for group in saved['param_groups']:
        group.update(fused=None, foreach=True)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    checkpoint.load_optimizer(optimizer, saved, 'ckpt.pt')
    assert all(group['fused'] is True and not group['foreach'] for group in optimizer.param_groups)


@pytest.mark.gpu
def test_a_state_from_a_cpu_goes_on_on_a_gpu(trained):
    state = checkpoint.load(os.path.join(trained, 'ckpt.pt'))
    for group in state['optimizer']['param_groups']:
        group.update(fused=None)
    model = checkpoint.build_model(state).to('cuda')
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cuda')
    checkpoint.load_optimizer(optimizer, state['optimizer'], 'ckpt.pt')
    x = torch.zeros(1, 8, dtype=torch.long, device='cuda')
    model(x, x)[1].backward()
    optimizer.step()
