"""docs/hacking.md: its examples are applied to a copy of the sources, and take effect there."""
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, metrics, run_ranks
from edits import SEED, PlainRun, Sources, check_sampling, load_unedited_model
from test_configs import settings_of
from torch.nn import functional as F

from runtime import checkpoint, kernels, optimizers, originals
from runtime.inference import note_once

# what makes a run of the page tiny, and like PlainRun
SMALL = [*TINY, '--beta2=0.95', '--min_lr=6e-5', '--max_iters=4', '--eval_interval=2',
         '--log_interval=1', '--max_new_tokens=40', '--repeats=3']


def read_page():
    with open(os.path.join(ROOT, 'docs', 'hacking.md'), encoding='utf-8') as f:
        return f.read()


def join_words(text):
    return ' '.join(text.split())


class Example:
    """A section of the page, applied to a copy of the sources in `folder`."""

    def __init__(self, heading, folder, data_dir):
        sections = dict(re.findall(r'^## ([^\n]*)\n(.*?)(?=^## |\Z)', read_page(), re.M | re.S))
        self.text = sections[heading]
        self.folder = str(folder)
        self.data_dir = data_dir
        self.sources = Sources(folder)
        os.unlink(folder / 'runtime')  # a link to the real one
        ignored = shutil.ignore_patterns('__pycache__', '*.bin', 'meta.pkl', 'input.txt')
        for name in ('runtime', 'config', 'data'):
            shutil.copytree(os.path.join(ROOT, name), folder / name, ignore=ignored)
        shutil.copytree(data_dir, folder / 'data' / 'python_char', dirs_exist_ok=True)
        shutil.copy(os.path.join(ROOT, 'README.md'), folder)
        for path, block in re.findall(r'[Ii]n `([^`]*)`:\n\n```diff\n(.*?)```', self.text, re.S):
            self.apply(path, block)
        values = re.findall(r'are in `([^`]*)`:\n\n```diff\n(.*?)```', self.text, re.S)
        for path, block in values:
            self.apply(path, block)
        for path, text in re.findall(r'file, `([^`]*)`:\n\n```py\n(.*?)```', self.text, re.S):
            (folder / path).parent.mkdir()
            (folder / path).write_text(text, encoding='utf-8')

    def apply(self, path, block):
        """Applies a block of changes; its old lines must occur exactly once in the file."""
        path = os.path.join(self.folder, path)
        with open(path, encoding='utf-8') as f:
            source = '\n' + f.read()
        for place, hunk in re.findall(r'(?:^@@ (.*) @@\n)?((?:^[-+ ].*\n|^\n)+)', block, re.M):
            lines = [line or ' ' for line in hunk.splitlines()]
            old = '\n' + ''.join(line[1:] + '\n' for line in lines if line[0] != '+')
            new = '\n' + ''.join(line[1:] + '\n' for line in lines if line[0] != '-')
            assert source.count(old) == 1, (source.count(old), old)
            # the line that @@ names is the last one of its kind above the change
            if place and place != 'CHOICES':
                kind = place.partition(' ')[0]
                above = re.findall(rf'^ *({kind} \w+)', source[:source.index(old)], re.M)
                assert above[-1] == place, (above[-1], place)
            source = source.replace(old, new)
        with open(path, 'w', encoding='utf-8') as f:
            f.write(source[1:])

    def run(self, words, *flags, **options):
        """Runs a command of the page in the copy, made tiny; returns stdout and stderr."""
        assert words[0] == 'python'
        path = os.path.join(self.folder, words[1])
        settings = settings_of(path)
        small = [flag for flag in SMALL if flag[2:].partition('=')[0] in settings]
        result = self.sources.run(*words[1:], *small, *flags, cwd=self.folder, **options)
        return result.stdout, result.stderr

    def list_commands(self):
        blocks = ''.join(re.findall(r'```sh\n(.*?)```', self.text, re.S))
        return [shlex.split(line) for line in blocks.splitlines()]

    def run_commands(self):
        """Runs all commands and checks that the page's output appears; returns (out, err) each."""
        results = [self.run(words) for words in self.list_commands()]
        everything = join_words(''.join(out + err for out, err in results))
        for block in re.findall(r'(?<!ends with:)\n\n```\n(.*?)```', self.text, re.S):
            assert is_quoted(block, everything), (block, everything)
        return results

    def check_errors(self):
        """Commands and flags that the page says end the run do so, with the line of the page."""
        found = re.findall(r'`([^`]*)`[^`]*ends with:\n\n```\n(.*?)```', self.text, re.S)
        for command, block in found:
            words = shlex.split(command)
            if words[0] != 'python':
                words = [*self.list_commands()[0], *words]
            _, err = self.run(words, ok=False)
            assert is_quoted(block, join_words(err)), err
        assert len(found) == self.text.count('ends with:') == 1

    def find_out_dir(self):
        """The folder of the first run, which check_sampling() knows as `out`."""
        words = self.find_training()
        name = next(word for word in words if word.startswith('--out_dir=')).partition('=')[2]
        if not os.path.exists(os.path.join(self.folder, 'out')):
            os.symlink(name, os.path.join(self.folder, 'out'))
        return os.path.join(self.folder, name)

    def check_losses(self, options=None, effect=1e-3):
        """The losses are those of plain torch, also after a resume, and not those of before."""
        out_dir = self.find_out_dir()
        plain = PlainRun(self.sources.load_model(), self.data_dir, **(options or {})).train(4)
        val_loss = plain.evaluate()
        assert_close(self.read_losses(), plain.losses)
        assert_close(metrics(out_dir, 'eval')[-1]['val/loss'], val_loss)
        unedited = PlainRun(load_unedited_model(), self.data_dir).train(4)
        differences = np.abs(np.subtract(plain.losses, unedited.losses))
        assert (differences.max() > effect) == (effect > 0), differences
        self.run(self.find_training(), '--init_from=resume', '--max_iters=6')
        plain.train(2)
        assert_close(self.read_losses(), plain.losses)
        return plain

    def find_training(self):
        return next(words for words in self.list_commands() if words[1] == 'train.py')

    def read_losses(self):
        events = metrics(self.find_out_dir(), 'iter')
        return [event['loss'] for event in sorted(events, key=lambda event: event['iter'])]

    def load_state(self):
        return checkpoint.load_best(self.find_out_dir())[0]['model']


def is_quoted(block, text):
    """Whether the text has what the block of output has, with anything in place of each `...`."""
    pattern = re.escape(join_words(block)).replace(re.escape('...'), '.*?')
    return re.search(pattern, text) is not None


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4)


# -----------------------------------------------------------------------------
# the examples
def test_an_activation(char_data, trained, tmp_path):
    example = Example('A new activation', tmp_path, char_data)
    (_, train_err), (_, sample_err) = example.run_commands()
    assert train_err.count('changed parts') == 1 and 'changed parts' not in sample_err
    shapes = {name: tuple(w.shape) for name, w in example.load_state().items()}
    assert shapes['transformer.h.0.mlp.c_fc.weight'] == (2 * 85, 32)  # 8 * 32 // 3 is 85
    assert shapes['transformer.h.0.mlp.c_proj.weight'] == (32, 85)
    plain = example.check_losses()
    check_sampling(example.sources, plain, caches=True)
    mlp = plain.model.transformer.h[0].mlp
    x = torch.randn(2, 3, 32)
    gate, value = (x @ mlp.c_fc.weight.T).split(85, dim=-1)
    expected = (gate * torch.sigmoid(gate) * value) @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
    shutil.copytree(trained, tmp_path / 'out-python-char')
    example.check_errors()


def test_a_norm(char_data, tmp_path):
    example = Example('A new norm, as an option', tmp_path, char_data)
    example.check_errors()
    _, _, (bench_out, _) = example.run_commands()
    assert json.loads(bench_out.splitlines()[-1])['norm'] == 'rms'
    assert 'norm' in example.load_state()
    plain = example.check_losses({'norm': 'rms'})
    check_sampling(example.sources, plain, caches=True)
    norm = plain.model.transformer.ln_f
    x = torch.randn(2, 3, 32)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    err = example.sources.run('convert.py', f'--out_dir={tmp_path}/out', ok=False,
                              *[f'--hf_dir={tmp_path}/hf']).stderr
    assert 'norm=rms' in err
    # the default changes nothing
    module = example.sources.load_model()
    default = PlainRun(module, char_data).train(1)
    unedited = PlainRun(load_unedited_model(), char_data).train(1)
    assert default.losses == unedited.losses
    assert default.model.state_dict().keys() == unedited.model.state_dict().keys()


def test_an_optimizer(char_data, tmp_path):
    example = Example('Another optimizer', tmp_path, char_data)
    example.check_errors()
    example.run_commands()
    state, _ = checkpoint.load_best(example.find_out_dir())
    assert all(set(values) == {'average'} for values in state['optimizer']['state'].values())
    plain = example.check_losses()
    model, optimizer = plain.model, plain.optimizer
    weight = model.lm_head.weight
    no_scaler = torch.amp.GradScaler('cpu', enabled=False)
    X, Y = plain.get_batch('train', plain.order.get_starts(0, 0))
    for factor in (1000.0, float('nan')):
        (factor * model(X, Y)[1]).backward()
        before, average = weight.clone(), optimizer.state[weight]['average'].clone()
        norm = optimizers.clip_and_step(optimizer, no_scaler, 1.0)
        if factor == 1000.0:  # clipped to the norm 1
            grads = torch.stack([p.grad.norm() for p in model.parameters()])
            assert norm > 10
            torch.testing.assert_close(grads.norm(), torch.ones(()))
            assert not torch.equal(weight, before)
        else:
            assert norm.isnan() and torch.equal(weight, before)
            assert torch.equal(optimizer.state[weight]['average'], average)
        optimizer.zero_grad()
    check_lion(example.sources.load_model().Lion)


def check_lion(cls):
    """Two updates are those of algorithm 2 in the paper."""
    p, average = torch.randn(3, 4), torch.zeros(3, 4)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = cls([{'params': [parameter], 'weight_decay': 0.1}], lr=0.01, betas=(0.9, 0.99))
    for _ in range(2):
        grad = torch.randn(3, 4)
        parameter.grad = grad
        optimizer.step()
        p = p - 0.01 * ((0.9 * average + 0.1 * grad).sign() + 0.1 * p)
        average = 0.99 * average + 0.01 * grad
        torch.testing.assert_close(parameter.detach(), p)


def test_a_loss(char_data, tmp_path):
    example = Example('Another loss', tmp_path, char_data)
    example.run_commands()
    plain = example.check_losses()
    first_eval = min(metrics(example.find_out_dir(), 'eval'), key=lambda event: event['iter'])
    unedited = PlainRun(load_unedited_model(), char_data)
    assert_close(first_eval['val/loss'], unedited.evaluate())  # without smoothing
    X, Y = plain.get_batch('train', plain.order.get_starts(0, 0))
    logits, loss = plain.model(X, Y)
    log_probs = F.log_softmax(logits, dim=-1)
    nll = -log_probs.gather(-1, Y[..., None])
    expected = 0.9 * nll.mean() - 0.1 * log_probs.mean()
    torch.testing.assert_close(loss, expected)


def test_a_dataset(char_data, tmp_path):
    example = Example('Another dataset', tmp_path, char_data)
    _, _, (sample, _) = example.run_commands()
    content = (tmp_path / 'README.md').read_bytes()
    ids = [np.fromfile(tmp_path / 'data' / 'bytes' / name, dtype='<u2')
           for name in ('train.bin', 'val.bin')]
    assert np.concatenate(ids).astype(np.uint8).tobytes() == content
    assert len(ids[1]) == len(content) - int(0.9 * len(content))
    assert example.load_state()['transformer.wte.weight'].shape == (256, 32)
    text = sample.removesuffix('\n' + '-' * 15 + '\n')
    assert len(text) == 41 and max(map(ord, text)) < 256  # the prompt and 40 tokens


def test_samples_during_training(char_data, tmp_path):
    example = Example('Samples during training', tmp_path, char_data)
    command, = example.list_commands()
    out, err = example.run(command)
    block = re.search(r'```\n(step .*?)```', example.text, re.S).group(1)
    assert is_quoted(block.replace('step 300', 'step 4'), join_words(out))
    # the training is as without the samples
    plain = example.check_losses(effect=0)
    assert 'KV cache' not in err
    # the last sample is of the last weights, drawn from the numbers of the next batch
    plain = PlainRun(load_unedited_model(), char_data).train(4)
    itos = plain.meta['itos']
    prompt = torch.tensor([[plain.meta['stoi']['\n']]])
    sequence = np.random.SeedSequence((SEED, 4, 0, 1))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    ids = plain.model.eval().generate(prompt, 100, temperature=0.8)
    assert 'sample:' + ''.join(itos[i] for i in ids[0].tolist()) + '\n' in out
    assert out.count('sample:') == out.count('step ') == 3
    ranks = run_ranks(2, os.path.join(tmp_path, 'train.py'), *command[2:], *SMALL[:-2],
                      '--parallel=fsdp', '--out_dir=out-fsdp', cwd=tmp_path)
    assert [rank.count('sample:') for rank in ranks] == [3, 0]


# -----------------------------------------------------------------------------
# the rest of the page
def test_the_map():
    rows = re.findall(r'^\| (?!---|what you)(.*) \| (.*) \|$', read_page(), re.M)
    assert len(rows) >= 12
    for _, place in rows:
        path, = set(re.findall(r'in (\w+\.py)', place))
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            source = f.read()
        for name in re.findall(r'`(\w+)`', place):
            is_defined = re.search(rf'^ *(class|def) {name}\(', source, re.M)
            assert is_defined or f"modules['{name}']" in source, name


@pytest.mark.parametrize('device_type', ['cpu', 'cuda'])
def test_the_parts_that_have_a_faster_form(device_type):
    module = load_unedited_model()
    model = module.GPT(module.GPTConfig(16, 20, 1, 1, 8, dropout=0.1, relu2=True))
    kernels.accelerate(model, device_type, 'float32')
    names = {type(part).__name__ for part in model.modules() if originals.is_fast(part)}
    expected = {'LossHead'}
    if device_type == 'cpu':
        expected |= {'Attention', 'Dropout', 'SquaredReLU'}
    assert names == expected
    assert 'the loss, and on a CPU also attention, dropout and squared ReLU' in join_words(
        read_page())


def test_the_lines_about_the_cache_and_the_logits(capsys):
    page = join_words(read_page())
    module = load_unedited_model()
    model = module.GPT(module.GPTConfig(16, 20, 1, 1, 8, bias=False)).eval()
    attention = model.transformer.h[0].attn.attention
    plain_forward = attention.forward
    attention.forward = lambda q, k, v, dropout, flash: plain_forward(q, k, v * 2, dropout, flash)
    note_once.cache_clear()
    prompt = torch.zeros(1, 3, dtype=torch.long)
    model.generate(prompt, 2, use_cache=False)
    assert not capsys.readouterr().err
    model.generate(prompt, 2)
    assert 'model generates without a KV cache' in capsys.readouterr().err
    assert 'model generates without a KV cache' in page
    kernels.accelerate(model, 'cpu', 'float32')
    with kernels.loss_only(model):
        assert model(prompt, prompt)[0] is None
    assert model(prompt, prompt)[0].shape == (1, 3, 20)
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as f:
        assert 'kernels.loss_only(raw_model)' in f.read()
    assert '`kernels.loss_only(raw_model)`' in page


def test_every_example_is_tested():
    with open(__file__, encoding='utf-8') as f:
        tested = re.findall(r"Example\('(.*?)'", f.read())
    headings = re.findall(r'^## (.*)', read_page(), re.M)
    assert tested == headings[1:]
