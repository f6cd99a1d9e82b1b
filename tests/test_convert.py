"""convert.py in both directions, and finetuning and sampling from a folder for transformers."""
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TINY, Process, has_iterations, metrics, run, wait_until
from edits import Sources
from test_huggingface import (
    EMBEDDINGS,
    META,
    OTHERS,
    SAME,
    equal_to,
    export,
    load,
    save_gpt2,
    save_ours,
)

from model import GPT, GPTConfig
from runtime import checkpoint, restore

TRAIN = [flag for flag in TINY if not flag.startswith('--n_')]  # the model's sizes are the folder's


@pytest.mark.parametrize('options', [
    {'bias': False}, {'bias': True, 'gelu': 'tanh', 'block_size': 17},
    pytest.param({'bias': True}, marks=pytest.mark.slow),
    pytest.param({'gelu': 'tanh'}, marks=pytest.mark.slow),
    pytest.param({'block_size': 17}, marks=pytest.mark.slow)])
def test_export_and_back(tmp_path, bpe, options):
    from transformers import AutoModelForCausalLM
    model = save_ours(tmp_path / 'out', **options)  # its vocabulary is padded to 50,304
    export(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert hf.config.vocab_size == 50257 and hf.config.n_positions == model.config.block_size
    assert equal_to(hf, model, 50257)
    run('convert.py', '--to=native', f'--out_dir={tmp_path / "back"}',
        f'--hf_dir={tmp_path / "hf"}')
    back = checkpoint.load_best(str(tmp_path / 'back'))[0]
    ours = checkpoint.load_best(str(tmp_path / 'out'))[0]
    assert back['model_args'] == {**ours['model_args'], 'vocab_size': 50257}
    assert back.get('gelu') == ours.get('gelu')
    assert back['model'].keys() == ours['model'].keys()
    for name, w in ours['model'].items():
        if 'wte' in name or 'lm_head' in name:
            w = w[:50257]
        assert torch.equal(back['model'][name], w)


def test_finetuning_and_sampling_from_a_folder(tmp_path, bpe):
    save_gpt2(tmp_path / 'hf', vocab_size=50257)
    text = tmp_path / 'text.txt'
    text.write_text('To be, or not to be, that is the question.\n' * 60)
    run('data/text/prepare.py', f'--input={text}', '--tokenizer=gpt2',
        f'--out_dir={tmp_path / "data"}')
    out = run('train.py', *TRAIN, f'--init_from={tmp_path / "hf"}',
              f'--dataset={tmp_path / "data"}', f'--out_dir={tmp_path / "out"}',
              '--max_iters=3').stdout
    assert f'from {tmp_path / "hf"}' in out and 'iter 2: loss' in out
    path = tmp_path / 'out' / 'ckpt.pt'
    assert torch.load(path, weights_only=True)['gelu'] == 'tanh'
    state, path = checkpoint.load_best(str(tmp_path / 'out'))
    model = restore.build_model(GPT, GPTConfig, state, path)
    assert model.transformer.h[0].mlp.gelu.approximate == 'tanh'
    for source in (['--init_from=resume', f'--out_dir={tmp_path / "out"}'],
                   [f'--init_from={tmp_path / "hf"}']):
        out = run('sample.py', *source, '--start=To be', '--num_samples=2', '--max_new_tokens=8',
                  '--device=cpu')
        assert out.stdout.count('-' * 15 + '\n') == 2 and out.stdout.startswith('To be')
        assert 'GPT-2 BPE' in out.stderr


def test_gpt2_weights_do_not_fit_a_char_dataset(tmp_path, char_data):
    save_gpt2(tmp_path)
    out = run('train.py', f'--init_from={tmp_path}', f'--dataset={char_data}', '--device=cpu',
              ok=False)
    assert 'vocabulary' in out.stderr


def test_a_folder_of_characters_fits_only_its_own_data(tmp_path, char_data, trained):
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}')
    init_from = f'--init_from={tmp_path / "hf"}'
    out = run('train.py', *TRAIN, init_from, f'--dataset={char_data}',
              f'--out_dir={tmp_path / "out"}', '--max_iters=2').stdout
    last = metrics(trained, 'eval')[-1]
    losses = f'train loss {last["train/loss"]:.4f}, val loss {last["val/loss"]:.4f}'
    assert f'step 0: {losses}' in out
    meta = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['meta']
    assert meta == checkpoint.load_best(trained)[0]['meta']
    (tmp_path / 'abc.txt').write_text('abc' * 1000)
    run('data/text/prepare.py', f'--input={tmp_path / "abc.txt"}', f'--out_dir={tmp_path / "abc"}')
    out = run('train.py', *TRAIN, init_from, f'--dataset={tmp_path / "abc"}', ok=False)
    assert 'other tokens' in out.stderr


def test_nothing_is_overwritten(tmp_path, trained):
    (tmp_path / 'notes.txt').write_text('mine')
    out = run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path}', ok=False)
    assert 'is not an empty folder' in out.stderr
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}')
    out = run('convert.py', '--to=native', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}',
              ok=False)
    assert 'already has a checkpoint' in out.stderr
    out = run('convert.py', f'--out_dir={trained}', ok=False)
    assert 'convert.py --out_dir=out --hf_dir=my-gpt2' in out.stderr


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path):
    out = run('convert.py', '--to=native', f'--out_dir={tmp_path / "out"}',
              f'--hf_dir={tmp_path / "hf"}', ok=False)
    assert 'has no config.json of a GPT-2' in out.stderr and not os.listdir(tmp_path)


# -----------------------------------------------------------------------------
# somebody has edited model.py
def convert_with(tmp_path, edits, ok):
    """Exports tmp_path/out to tmp_path/hf in a copy of the tree whose model.py has other lines."""
    tree = tmp_path / 'tree'
    tree.mkdir()
    sources = Sources(tree, *(('model.py', old, new) for old, new in edits))
    out = sources.run('convert.py', f'--out_dir={tmp_path / "out"}',
                      f'--hf_dir={tmp_path / "hf"}', ok=ok)
    shutil.rmtree(tree)
    return out


@pytest.mark.parametrize('edit', ['RMSNorm', 'SiLU', 'post-norm'])
def test_an_edited_model_is_refused_in_one_line(tmp_path, edit):
    save_ours(tmp_path / 'out', meta=META, vocab_size=20, bias=False)
    err = convert_with(tmp_path, OTHERS[edit], ok=False).stderr
    assert "computes something that GPT-2's format cannot express; share the checkpoint" in err
    assert os.listdir(tmp_path) == ['out']


def test_an_edit_that_computes_the_same_is_exported(tmp_path):
    model = save_ours(tmp_path / 'out', meta=META, vocab_size=20, bias=False)
    (tmp_path / 'hf').mkdir()
    out = convert_with(tmp_path, SAME['attention'], ok=True)
    lines = out.stdout.splitlines()
    assert 'stands for padding' in lines[0] and lines[1].startswith('exported')
    assert len(lines) == 2 and out.stderr == ''
    assert sorted(os.listdir(tmp_path)) == ['hf', 'out']
    assert equal_to(load(tmp_path / 'hf'), model, 16)


def test_a_mistake_in_an_edit_keeps_its_traceback_and_leaves_nothing_behind(tmp_path):
    save_ours(tmp_path / 'out', meta=META, vocab_size=20)
    out = convert_with(tmp_path, [(EMBEDDINGS, 'x = self.transformer.dropp(x)')], ok=None)
    assert out.returncode == 1 and 'Traceback' in out.stderr and 'dropp' in out.stderr
    assert os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize('is_there', [False, True])
def test_a_crash_leaves_no_folder_that_looks_complete(tmp_path, is_there):
    model = save_ours(tmp_path / 'out', meta=META, vocab_size=20)
    if is_there:
        (tmp_path / 'hf').mkdir()
    edits = [(EMBEDDINGS, "__import__('os').kill(__import__('os').getpid(), 9)")]
    assert convert_with(tmp_path, edits, ok=None).returncode == -9
    rest = sorted(set(os.listdir(tmp_path)) - {'out'})
    assert len(rest) == 1 + is_there and rest[-1].endswith('.tmp')
    assert not is_there or not os.listdir(tmp_path / 'hf')
    export(tmp_path)
    assert equal_to(load(tmp_path / 'hf'), model, 16)


def test_the_current_folder_and_a_new_one_in_a_new_one(tmp_path):
    model = save_ours(tmp_path / 'out', meta=META, vocab_size=20)
    (tmp_path / 'here').mkdir()
    for hf_dir in ('.', os.path.join('some', 'where')):
        run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={hf_dir}',
            cwd=tmp_path / 'here')
        assert equal_to(load(tmp_path / 'here' / hf_dir), model, 16)
    assert sorted(os.listdir(tmp_path)) == ['here', 'out']


def test_finetuning_in_little_memory_still_learns(tmp_path, char_data, trained):
    # as config/finetune_shakespeare_gpt2.py does it, with a model that has learned something
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}')
    args = [*TINY, f'--init_from={tmp_path / "hf"}', f'--dataset={char_data}',
            '--learning_rate=3e-5', '--decay_lr=False', '--max_iters=20',
            '--gradient_accumulation_steps=8', '--eval_interval=20', '--eval_iters=0']
    little_memory = ['--moments_dtype=bfloat16', '--activation_checkpointing=True']
    curves = {}
    for name, flags in (('full', []), ('low', little_memory)):
        run('train.py', *args, *flags, f'--out_dir={tmp_path / name}')
        curves[name] = [event['loss'] for event in metrics(tmp_path / name, 'iter')]
        first, last = (event['val/loss'] for event in metrics(tmp_path / name, 'eval'))
        assert last < first - 0.01
    assert curves['low'] != curves['full']
    assert max(abs(a - b) for a, b in zip(*curves.values())) < 0.002


def test_nothing_is_converted_into_the_folder_of_a_run(tmp_path, trained, char_data):
    hf_dir, folder = tmp_path / "it's $HOME", tmp_path / 'run'
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={hf_dir}')
    process = Process('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={folder}',
                      '--max_iters=1000000', '--eval_interval=1000000')
    wait_until(has_iterations(folder, 1), process)
    err = run('convert.py', '--to=native', f'--hf_dir={hf_dir}', f'--out_dir={folder}',
              ok=False).stderr
    assert 'is writing to it' in err and not (folder / 'ckpt.pt').exists()
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_hint_works_for_any_name(tmp_path, trained):
    out = run('convert.py', f'--out_dir={trained}', f"--hf_dir={tmp_path}/it's a $HOME").stdout
    command = out.partition('try it: ')[2].replace('python', sys.executable, 1)
    out = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert 'generated_text' in out
