"""Every config file: nanoGPT's values if it is nanoGPT's, real settings, only differences."""
import ast
import dataclasses
import glob
import os

import pytest
from conftest import ROOT, run_here

import model

# nanoGPT's seven; finetune_shakespeare's run name has the time in it
CHAR = dict(
    out_dir='out-shakespeare-char', eval_interval=250, eval_iters=200, log_interval=10,
    always_save_checkpoint=False, wandb_log=False, wandb_project='shakespeare-char',
    wandb_run_name='mini-gpt', dataset='shakespeare_char', gradient_accumulation_steps=1,
    batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
    learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99,
    warmup_iters=100)
GPT2 = dict(
    wandb_log=True, wandb_project='owt', wandb_run_name='gpt2-124M', batch_size=12,
    block_size=1024, gradient_accumulation_steps=40, max_iters=600000, lr_decay_iters=600000,
    eval_interval=1000, eval_iters=200, log_interval=10, weight_decay=0.1)
FINETUNE = dict(
    out_dir='out-shakespeare', eval_interval=5, eval_iters=40, wandb_log=False,
    wandb_project='shakespeare', dataset='shakespeare', init_from='gpt2-xl',
    always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=32, max_iters=20,
    learning_rate=3e-5, decay_lr=False)
EVAL = dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)
SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
NANOGPT = {'train_shakespeare_char': CHAR, 'train_gpt2': GPT2, 'finetune_shakespeare': FINETUNE,
           **{'eval_' + size.replace('-', '_'): dict(EVAL, init_from=size) for size in SIZES}}

# nanoGPT's settings and their defaults; device, dtype, compile and backend are 'auto' here
DEFAULTS = {
    'train.py': dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
        wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40,
        batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
        bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95,
        grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
        backend='auto', device='auto', dtype='auto', compile='auto'),
    'sample.py': dict(
        init_from='resume', out_dir='out', start='\n', num_samples=10, max_new_tokens=500,
        temperature=0.8, top_k=200, seed=1337, device='auto', dtype='auto', compile='auto'),
    'bench.py': dict(
        batch_size=12, block_size=1024, bias=False, real_data=True, seed=1337, device='auto',
        dtype='auto', compile='auto', profile=False),
}


def settings_of(script):
    """{name: default} of the assignments above a script's configurator line; {} without one."""
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        source = f.read()
    if 'configurator.py' not in source:
        return {}
    out = {}
    for node in ast.parse(source).body:
        if 'exec(' in ast.unparse(node) and 'configurator' in ast.unparse(node):
            return out
        if isinstance(node, ast.Assign):
            out[node.targets[0].id] = eval(ast.unparse(node.value))


def assignments(path):
    space = {}
    with open(path, encoding='utf-8') as f:
        exec(f.read(), space)
    return {k: v for k, v in space.items()
            if isinstance(v, (bool, int, float, str)) and not k.startswith('_')}


FILES = sorted(glob.glob(os.path.join(ROOT, 'config', '*.py')))


@pytest.mark.parametrize('script', DEFAULTS)
def test_defaults_are_nanogpts(script):
    ours = settings_of(script)
    assert {k: ours[k] for k in DEFAULTS[script]} == DEFAULTS[script]
    assert all(type(ours[k]) is type(v) for k, v in DEFAULTS[script].items())


@pytest.mark.parametrize('name', NANOGPT)
def test_nanogpts_configs_have_its_values(name):
    ours = assignments(os.path.join(ROOT, 'config', name + '.py'))
    if name.startswith('finetune'):
        ours.pop('wandb_run_name', None)
    assert ours == NANOGPT[name]


@pytest.mark.parametrize('path', FILES, ids=os.path.basename)
def test_every_config_runs_in_every_script(path):
    values = assignments(path)
    assert set(values) <= set(settings_of('train.py'))
    for script in ('train.py', 'sample.py', 'bench.py'):
        defaults = settings_of(script)
        lines = run_here(script, path, '--help').stdout.splitlines()
        for name, value in values.items():
            if name in defaults and value != defaults[name] and name != 'wandb_run_name':
                line = next(line for line in lines if line.startswith(f'  --{name}='))
                assert f'now {value!r}' in line


# a value for each model option of GPTConfig that isn't its default in any script. vocab_size is the
# dataset's, and gelu belongs to imported weights
OPTIONS = dict(block_size=16, n_layer=3, n_head=2, n_embd=20, dropout=0.25, bias=True,
               rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=7, embd_conv=2)
NO_SETTINGS = {'vocab_size', 'gelu'}


def test_every_setting_has_a_use():
    # a setting that nothing reads is a promise that isn't kept
    for script in DEFAULTS:
        with open(os.path.join(ROOT, script), encoding='utf-8') as f:
            tree = ast.parse(f.read())
        read = [n.id for n in ast.walk(tree)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        if script in ('train.py', 'bench.py'):  # they take them from config: see the next test
            read += OPTIONS
        assert not [name for name in settings_of(script) if name not in read]


@pytest.mark.parametrize('script', ['train.py', 'bench.py'])
def test_every_model_option_is_a_setting(script, char_data, tmp_path, monkeypatch):
    names = {field.name for field in dataclasses.fields(model.GPTConfig)} - NO_SETTINGS
    assert names == set(OPTIONS) and names <= set(settings_of(script))
    (tmp_path / 'options.py').write_text('\n'.join(f'{k} = {v!r}' for k, v in OPTIONS.items()))
    lines = run_here(script, 'options.py', '--help', cwd=tmp_path).stdout.splitlines()
    for name, value in OPTIONS.items():
        line = next(line for line in lines if line.startswith(f'  --{name}='))
        assert f'(now {value!r})' in line
    configs = []

    def record(self, config):
        configs.append(dataclasses.asdict(config))
        raise SystemExit(0)

    monkeypatch.setattr(model.GPT, '__init__', record)
    run_here(script, 'options.py', '--device=cpu', f'--dataset={char_data}', cwd=tmp_path)
    built, = configs
    assert {name: built[name] for name in OPTIONS} == OPTIONS
    assert built['vocab_size'] == 19 and built['gelu'] == 'none'


def test_bench_does_not_ignore_a_new_model_option(char_data, monkeypatch):
    @dataclasses.dataclass
    class Config(model.GPTConfig):
        new_option: int = 0

    monkeypatch.setattr(model, 'GPTConfig', Config)
    err = run_here('bench.py', '--device=cpu', f'--dataset={char_data}', ok=False).stderr
    assert 'GPTConfig has new_option, but bench.py does not' in err
