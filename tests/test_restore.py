"""From a checkpoint to a model and an optimizer: nanoGPT's checkpoints and ours."""
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, run

from model import GPT, GPTConfig
from runtime import checkpoint, restore
from runtime.tokenizer import CharTokenizer

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


def test_the_options_have_the_defaults_of_the_model():
    newer_fields = {field.name: field.default for field in dataclasses.fields(GPTConfig)
                    if field.name not in (*checkpoint.NANOGPT_ARGS, 'gelu')}
    assert restore.OPTIONS == newer_fields


def test_nanogpt_checkpoint_predicts_what_it_did_there(facts, golden_data, shakespeare_data):
    state, path = checkpoint.load_best(NANOGPT)
    assert {key: state['model_args'][key] for key in facts['model_args']} == facts['model_args']
    assert sorted(state) == facts['keys']
    model = restore.build_model(GPT, GPTConfig, state, path).eval()
    alphabet = golden_data['shakespeare_char']['meta']['alphabet']
    tokenizer = CharTokenizer({'vocab_size': 65, 'itos': dict(enumerate(alphabet)),
                               'stoi': {c: i for i, c in enumerate(alphabet)}})
    val = np.fromfile(os.path.join(shakespeare_data, 'val.bin'), dtype=np.uint16)
    val = torch.from_numpy(val.astype(np.int64))
    x, y = val[:64 * 32].view(64, 32), val[1:64 * 32 + 1].view(64, 32)
    with torch.no_grad():
        logits, loss = model(x, y)
    expected = facts['val_loss_first_64_windows']
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=0)
    predictions = tokenizer.decode(logits[:8].argmax(-1).flatten().tolist())
    assert predictions == facts['predictions_first_8_windows']
    expected = facts['logits_window_5_last']  # recorded to 5 digits
    torch.testing.assert_close(logits[5, -1].tolist(), expected, rtol=1e-4, atol=2e-5)


def test_nanogpt_checkpoint_resumes_and_samples(facts, shakespeare_data, tmp_path):
    shutil.copy(os.path.join(NANOGPT, 'ckpt.pt'), tmp_path)
    os.chmod(tmp_path / 'ckpt.pt', 0o644)
    common = [f'--out_dir={tmp_path}', '--device=cpu', '--dtype=float32']
    text = facts['greedy_from_ROMEO']
    # nanoGPT's checkpoint has no table of characters. It is in the data folder that its
    # configuration names, which is looked for in the current folder
    os.makedirs(tmp_path / 'data')
    shutil.copytree(shakespeare_data, tmp_path / 'data' / 'shakespeare_char')
    out = run('sample.py', *common, '--start=ROMEO:', '--temperature=0', '--num_samples=1',
              f'--max_new_tokens={len(text) - 6}', cwd=tmp_path)
    assert out.stdout == text + '\n' + '-' * 15 + '\n'
    # a compiled model saved it: the prefix of its names is read and not written again
    names = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    assert all(name.startswith('_orig_mod.') for name in names)
    out = run('train.py', *common, '--init_from=resume', f'--dataset={shakespeare_data}',
              '--block_size=32', '--batch_size=12', '--gradient_accumulation_steps=1',
              '--max_iters=4003', '--eval_iters=5').stdout
    assert 'iter 4000: loss' in out and 'iter 4002: loss' in out and 'iter 4003' not in out
    assert 'betas=(0.9, 0.99) come from the checkpoint' in out
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert state['iter_num'] == 4003 and state['meta']['vocab_size'] == 65
    assert state['optimizer']['state'][0]['step'] == 4003
    names = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    assert not any(name.startswith('_orig_mod.') for name in names)


def load_optimizer(state, path, device):
    """The model and the optimizer of a checkpoint on this device."""
    model = restore.build_model(GPT, GPTConfig, state, path).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    scaler = torch.amp.GradScaler(device, enabled=False)
    restore.load_optimizer(optimizer, scaler, state, path)
    return model, optimizer


def test_optimizer_state_of_another_device_keeps_our_implementation(trained):
    path = os.path.join(trained, 'ckpt.pt')
    state = checkpoint.load(path)
    for group in state['optimizer']['param_groups']:
        group.update(fused=None, foreach=True)
    _, optimizer = load_optimizer(state, path, 'cpu')
    for group in optimizer.param_groups:
        assert group['fused'] is True and not group['foreach']
