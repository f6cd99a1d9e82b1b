"""What the tests of edits share: an edited copy of the sources, and plain torch to compare with."""
import importlib.util
import math
import os
import shutil
import sys

import numpy as np
import torch
from conftest import ROOT, TINY, metrics, run

from runtime import checkpoint, export, kernels
from runtime.dataset import DataOrder, list_eval_batches
from runtime.meta import read_meta
from runtime.shards import open_tokens
from runtime.tokenizer import get_tokenizer

SEED = 1337
SHAPE = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, bias=False)  # as in TINY
BATCH_SIZE, MICRO_STEPS = 4, 2

# places in model.py and train.py that several files of tests change
LAYER = '''\
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
'''
ACCELERATE = 'kernels.accelerate(model, device_type, dtype)  # faster'
IMPORT = 'import gc\n'
OPTIMIZER = 'optimizer = raw_model.configure_optimizers('
LOOP = 'while True:\n'
UPDATE = '    # one update\n'
LOSS = '''\
            with ctx, kernels.loss_only(raw_model):  # logits would take much memory
                _, loss = model(X, Y)
'''
LM_HEAD = '        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)\n'
RUN_LAYERS = '        for block in self.transformer.h:\n            x = block(x)\n'
LAST_NORM = '        x = self.transformer.ln_f(x)\n'


class Sources:
    """A copy of the repository in `folder`, with edits (file, old text, new text)."""

    def __init__(self, folder, *edits):
        self.folder = str(folder)
        for name in ('train.py', 'sample.py', 'convert.py', 'bench.py', 'model.py', 'plot.py',
                     'configurator.py'):
            shutil.copy(os.path.join(ROOT, name), folder)
        os.symlink(os.path.join(ROOT, 'runtime'), os.path.join(folder, 'runtime'))
        for name, old, new in edits:
            path = os.path.join(folder, name)
            with open(path, encoding='utf-8') as f:
                source = f.read()
            assert source.count(old) == 1, (source.count(old), old)
            with open(path, 'w', encoding='utf-8') as f:
                f.write(source.replace(old, new))

    def run(self, script, *args, **options):
        # of a model this small a second thread makes nothing faster
        return run(os.path.join(self.folder, script), *args, OMP_NUM_THREADS='1', **options)

    def train(self, data_dir, out_dir, *args, **options):
        """Runs train.py on a tiny model; returns (stdout, stderr, loss of each iteration)."""
        out_dir = os.path.join(self.folder, out_dir)
        result = self.run('train.py', *TINY, f'--dataset={data_dir}', f'--out_dir={out_dir}', *args,
                          **options)
        losses = {e['iter']: e['loss'] for e in metrics(out_dir, 'iter')}
        return result.stdout, result.stderr, [losses[i] for i in sorted(losses)]

    def load_model(self):
        """model.py as a module."""
        return load_module(f'{self.folder}/model.py')


def load_module(path):
    """An edited model.py as the module edited_model, where inspect finds its source."""
    spec = importlib.util.spec_from_file_location('edited_model', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['edited_model'] = module
    spec.loader.exec_module(module)
    return module


def get_lr(it):
    """The learning rate of train.py with the settings TINY."""
    return 6e-5 + 0.5 * (1 + math.cos(math.pi * it / 100)) * (3e-3 - 6e-5)


@torch.no_grad()
def continue_greedily(model, idx, max_new_tokens):
    """The most likely tokens after idx (B, T), each by a forward pass over all before it."""
    block_size = model.config.block_size
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -block_size:])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


class PlainRun:
    """A run of train.py with the settings TINY, in plain torch: no part is replaced."""

    def __init__(self, module, data_dir, **options):
        self.meta = read_meta(data_dir)
        vocab_size = self.meta['vocab_size'] if self.meta else 50304
        torch.manual_seed(SEED)
        self.model = module.GPT(module.GPTConfig(vocab_size=vocab_size, **SHAPE, **options))
        self.optimizer = self.model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
        T = SHAPE['block_size']
        self.tokens = {split: open_tokens(data_dir, split, T, vocab_size, self.meta)
                       for split in ('train', 'val')}
        self.order = DataOrder('random', SEED, len(self.tokens['train']), T, BATCH_SIZE,
                               MICRO_STEPS)
        self.losses = []

    def get_batch(self, split, starts):
        T = SHAPE['block_size']
        rows = np.stack([self.tokens[split][i:i + T + 1] for i in starts]).astype(np.int64)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])

    def train(self, iterations, compute_loss=None):
        """Adds the loss of each iteration to losses; returns the run."""
        for it in range(len(self.losses), len(self.losses) + iterations):
            for group in self.optimizer.param_groups:
                group['lr'] = get_lr(it)
            losses = []
            for micro_step in range(MICRO_STEPS):
                sequence = np.random.SeedSequence((SEED, it, micro_step))
                torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
                X, Y = self.get_batch('train', self.order.get_starts(it, micro_step))
                loss = compute_loss(self.model, X, Y) if compute_loss else self.model(X, Y)[1]
                (loss / MICRO_STEPS).backward()
                losses.append(loss.item())
            params = [p for group in self.optimizer.param_groups for p in group['params']]
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(sum(losses) / MICRO_STEPS)
        return self

    @torch.no_grad()
    def evaluate(self, split='val'):
        """The loss of a split, as train.py with eval_iters=4 estimates it."""
        self.model.eval()
        batches, _ = list_eval_batches(self.tokens, split, SHAPE['block_size'], BATCH_SIZE, 4)
        losses = [self.model(*self.get_batch(split, starts))[1].item() for starts, _, _ in batches]
        self.model.train()
        return sum(losses) / len(losses)

    def continue_greedily(self, idx, max_new_tokens):
        """continue_greedily() by the model in eval mode."""
        self.model.eval()
        idx = continue_greedily(self.model, idx, max_new_tokens)
        self.model.train()
        return idx


def check_model_edit(folder, data_dir, *edits, exports=False, caches=None, effect=1e-3, **options):
    """Checks that edits (old text, new text) of model.py take effect in all that people do.

    Training, stopped and resumed, and evaluation have the losses of plain torch, and differ from
    those of the model without the edits by at least `effect`. sample.py writes the text of plain
    torch, across the end of the context. generate() does too, with and without a cache. caches
    says whether it should use one (None: either way). exports says whether Hugging Face's format
    can express the model; if not, write_folder() must refuse it. Returns the PlainRun.
    """
    sources = Sources(folder, *(('model.py', old, new) for old, new in edits))
    module = sources.load_model()
    plain = PlainRun(module, data_dir, **options).train(4)
    flags = [f'--{key}={value}' for key, value in options.items()]
    sources.train(data_dir, 'out', '--max_iters=2', '--eval_interval=2', *flags)
    out, _, losses = sources.train(data_dir, 'out', '--max_iters=4', '--eval_interval=2',
                                   '--init_from=resume', *flags)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    val_loss = metrics(os.path.join(folder, 'out'), 'eval')[-1]['val/loss']
    np.testing.assert_allclose(val_loss, plain.evaluate(), rtol=1e-4)
    unedited = PlainRun(load_unedited_model(), data_dir, **keep_fields(options)).train(4)
    assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > effect, 'no effect'

    check_sampling(sources, plain, caches)
    check_export(folder, plain, exports)
    return plain


def load_unedited_model():
    import model
    return model


def keep_fields(options):
    """The options that the unedited GPTConfig has, too."""
    fields = load_unedited_model().GPTConfig.__dataclass_fields__
    return {key: value for key, value in options.items() if key in fields}


def check_sampling(sources, plain, caches=None):
    """sample.py and generate() continue the text as plain torch does, after 3 and 40 tokens."""
    model = plain.model
    state, _ = checkpoint.load_best(os.path.join(sources.folder, 'out'))
    model.load_state_dict(state['model'])
    if plain.meta:
        tokenizer = get_tokenizer(plain.meta)
        prompt = torch.tensor([tokenizer.encode('1 and')])
        ids = plain.continue_greedily(prompt, 40)
        result = sources.run('sample.py', f'--out_dir={sources.folder}/out', '--temperature=0',
                             '--num_samples=1', '--max_new_tokens=40', '--start=1 and',
                             '--device=cpu', '--dtype=float32')
        assert result.stdout == tokenizer.decode(ids[0].tolist()) + '\n' + '-' * 15 + '\n'
        if caches is not None:
            assert ('without a KV cache' in result.stderr) == (not caches), result.stderr
    prompt = torch.randint(0, model.config.vocab_size, (3, 5))
    expected = plain.continue_greedily(prompt, 40)
    model.eval()
    assert torch.equal(model.generate(prompt, 40, temperature=0, use_cache=False), expected)
    assert torch.equal(model.generate(prompt, 40, temperature=0), expected)
    if caches:
        assert torch.equal(model.generate(prompt, 40, temperature=0, use_cache=True), expected)
    kernels.accelerate(model, 'cpu', 'float32')
    assert torch.equal(model.generate(prompt, 40, temperature=0), expected)


def check_export(folder, plain, exports):
    """write_folder() makes a folder with the same logits, or refuses in one line."""
    from transformers import GPT2LMHeadModel
    hf_dir = os.path.join(folder, 'hf')
    model = plain.model.eval()
    try:
        export.write_folder(model, hf_dir, plain.meta)
    except SystemExit:
        assert not exports and not os.path.exists(hf_dir)
        return
    assert exports, 'exported'
    hf = GPT2LMHeadModel.from_pretrained(hf_dir).eval()
    idx = torch.randint(0, hf.config.vocab_size, (2, SHAPE['block_size']))
    with torch.no_grad():
        torch.testing.assert_close(hf(idx).logits[:, -1],
                                   model(idx)[0][:, -1, :hf.config.vocab_size],
                                   rtol=1e-4, atol=1e-4)
