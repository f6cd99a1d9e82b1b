"""What bench.py compares with: a plain GPT-2 has the loss of model.py, and takes turns."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from model import GPT, GPTConfig

SCRIPT = os.path.join(ROOT, 'recipes', 'peers', 'plain.py')
sys.path.insert(0, os.path.dirname(SCRIPT))
import plain

NAMES = {'tokens': 'transformer.wte', 'positions': 'transformer.wpe', 'norm': 'transformer.ln_f',
         'attn_norm': 'ln_1', 'qkv': 'attn.c_attn', 'attn_proj': 'attn.c_proj',
         'mlp_norm': 'ln_2', 'mlp_fc': 'mlp.c_fc', 'mlp_proj': 'mlp.c_proj'}


def copy_weights(theirs, ours):
    """Gives a GPT of model.py the weights of the plain one."""
    state = {}
    for name, weight in theirs.state_dict().items():
        parts = name.split('.')
        prefix = f'transformer.h.{parts[1]}.' if parts[0] == 'layers' else ''
        state[f'{prefix}{NAMES[parts[-2]]}.{parts[-1]}'] = weight
    state['lm_head.weight'] = state['transformer.wte.weight']
    ours.load_state_dict(state)


@pytest.mark.parametrize('bias', [True, False])
def test_the_plain_model_is_the_same(bias):
    torch.manual_seed(0)
    theirs = plain.PlainGPT(16, 2, 2, 32, 50, 0.0, bias)
    for name, p in theirs.named_parameters():
        assert p.std() > 0 or name.endswith('norm.weight') or 'bias' in name
        p.data += 0.1 * torch.randn_like(p)
    ours = GPT(GPTConfig(16, 50, 2, 2, 32, bias=bias))
    copy_weights(theirs, ours)
    x, y = torch.randint(50, (2, 3, 16))
    logits, loss = ours(x, y)
    torch.testing.assert_close(theirs(x, y), loss)
    torch.testing.assert_close(theirs(x), logits[:, -1])


def test_the_plain_model_learns():
    torch.manual_seed(0)
    model = plain.PlainGPT(16, 1, 2, 32, 10, 0.0, False)
    training = plain.PlainTraining(model, np.arange(1000).astype(np.uint16) % 10, 8, 16)
    losses = [training.step().item() for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def run_plain(*args, **options):
    result = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True,
                            check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **options)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{')]


def test_commands(tmp_path):
    turns = run_plain('train', '--iters=2', '--turns=True', input='\n\n')
    assert len(turns) == 2 and all(turn['tokens_per_s'] > 0 for turn in turns)
    one, = run_plain('train', '--iters=1', '--batch_size=2')
    assert one['batch_size'] == 2
    assert abs(one['tokens_per_s'] * one['ms_per_iter'] - 1000 * 2 * 64) < 1e-3
    for split in ('train', 'val'):
        (np.arange(1000) % 65).astype(np.uint16).tofile(tmp_path / f'{split}.bin')
    end, = run_plain('learn', f'--data={tmp_path}', '--iters=102', '--eval_interval=50')
    assert [it for it, _, _ in end['curve']] == [0, 50, 100, 102]
    assert end['val_loss'] < end['curve'][0][2] - 1 and end['seconds'] > 0


@pytest.mark.parametrize('args, words', [
    (['train', '--preset=nope'], 'preset=nope'), (['train', '--bogus=3'], '--bogus=3'),
    (['train', '--batch_size=abc'], '--batch_size=abc'), (['train', '--iters'], '--iters'),
    (['train', '--data=x'], '--data=x'), (['learn', '--data=nodata'], 'nodata has no train.bin'),
    (['generate', '--tokens='], '--tokens=')])
def test_mistakes(args, words):
    result = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    assert words in result.stderr


def test_the_recipes_find_what_they_import():
    for name in ('race', 'ablation', 'sizes', 'memory', 'scaling', 'growth', 'peers/hf'):
        path = os.path.join(ROOT, 'recipes', f'{name}.py')
        subprocess.run([sys.executable, path, '--help'], check=True, capture_output=True)


def test_the_speed_tables_are_those_of_the_measurements(tmp_path):
    for path in ('README.md', 'docs/speed.md', 'configurator.py', 'recipes/speed_table.py',
                 'assets/bench/cpu.json'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, path), tmp_path / path)
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    run(str(tmp_path / 'recipes' / 'speed_table.py'), cwd=tmp_path)
    for path in ('README.md', 'docs/speed.md'):
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            assert (tmp_path / path).read_text(encoding='utf-8') == f.read()
    assert (tmp_path / 'assets' / 'speed.png').stat().st_size > 10_000
