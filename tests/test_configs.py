"""Every shipped config: nanoGPT's values where it is nanoGPT's, real knobs and nothing but differences in all."""
import ast
import glob
import os

import pytest
from conftest import ROOT, run_here

# nanoGPT's seven; finetune_shakespeare's run name carries the time
CHAR = dict(out_dir='out-shakespeare-char', eval_interval=250, eval_iters=200, log_interval=10, always_save_checkpoint=False, wandb_log=False,
            wandb_project='shakespeare-char', wandb_run_name='mini-gpt', dataset='shakespeare_char', gradient_accumulation_steps=1, batch_size=64,
            block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4,
            beta2=0.99, warmup_iters=100)
GPT2 = dict(wandb_log=True, wandb_project='owt', wandb_run_name='gpt2-124M', batch_size=12, block_size=1024, gradient_accumulation_steps=40,
            max_iters=600000, lr_decay_iters=600000, eval_interval=1000, eval_iters=200, log_interval=10, weight_decay=0.1)
FINETUNE = dict(out_dir='out-shakespeare', eval_interval=5, eval_iters=40, wandb_log=False, wandb_project='shakespeare', dataset='shakespeare',
                init_from='gpt2-xl', always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5,
                decay_lr=False)
EVAL = dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)
NANOGPT = {'train_shakespeare_char': CHAR, 'train_gpt2': GPT2, 'finetune_shakespeare': FINETUNE,
           **{'eval_' + size.replace('-', '_'): dict(EVAL, init_from=size) for size in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')}}

# nanoGPT's knobs and their defaults; device, dtype, compile and backend are 'auto' here
DEFAULTS = {
    'train.py': dict(out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True, init_from='scratch',
                     wandb_log=False, wandb_project='owt', wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
                     block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=0.1,
                     beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='auto',
                     device='auto', dtype='auto', compile='auto'),
    'sample.py': dict(init_from='resume', out_dir='out', start='\n', num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200, seed=1337,
                      device='auto', dtype='auto', compile='auto'),
    'bench.py': dict(batch_size=12, block_size=1024, bias=False, real_data=True, seed=1337, device='auto', dtype='auto', compile='auto', profile=False),
}


def knobs(script):
    """{name: default} of the assignments above a script's configurator line."""
    out = {}
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        for node in ast.parse(f.read()).body:
            if 'exec(' in ast.unparse(node) and 'configurator' in ast.unparse(node):
                return out
            if isinstance(node, ast.Assign):
                out[node.targets[0].id] = eval(ast.unparse(node.value))


def assignments(path):
    space = {}
    with open(path, encoding='utf-8') as f:
        exec(f.read(), space)
    return {k: v for k, v in space.items() if isinstance(v, (bool, int, float, str)) and not k.startswith('_')}


FILES = sorted(glob.glob(os.path.join(ROOT, 'config', '*.py')))


@pytest.mark.parametrize('script', DEFAULTS)
def test_defaults_are_nanogpts(script):
    ours = knobs(script)
    assert {k: ours[k] for k in DEFAULTS[script]} == DEFAULTS[script]
    assert all(type(ours[k]) is type(v) for k, v in DEFAULTS[script].items())


@pytest.mark.parametrize('name', NANOGPT)
def test_nanogpts_configs_have_its_values(name):
    ours = assignments(os.path.join(ROOT, 'config', name + '.py'))
    ours.pop('wandb_run_name', None) if name.startswith('finetune') else None
    assert ours == NANOGPT[name]


@pytest.mark.parametrize('path', FILES, ids=os.path.basename)
def test_every_config_runs_in_every_script(path):
    assert set(assignments(path)) <= set(knobs('train.py'))
    for script in ('train.py', 'sample.py', 'bench.py'):
        out = run_here(script, path, '--help').stdout
        for name, value in assignments(path).items():
            if name in knobs(script) and value != knobs(script)[name] and name != 'wandb_run_name':
                line = next(line for line in out.splitlines() if line.startswith(f'  --{name}='))
                assert f'now {value!r}' in line


def test_every_knob_has_a_use():
    # a knob that nothing reads is a promise that isn't kept
    for script in DEFAULTS:
        with open(os.path.join(ROOT, script), encoding='utf-8') as f:
            tree = ast.parse(f.read())
        read = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        assert not [name for name in knobs(script) if name not in read]
