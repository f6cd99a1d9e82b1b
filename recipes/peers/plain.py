"""
A GPT-2 in plain PyTorch, as a yardstick: what training and generating cost without any effort.

    python recipes/peers/plain.py train --preset=cpu_recipe --iters=60   time of a training step
    python recipes/peers/plain.py train --preset=gpt2_gpu --batch_size=32
    python recipes/peers/plain.py generate --preset=gpt2 --tokens=64     tokens/s, one sequence
    python recipes/peers/plain.py learn --data=data/shakespeare_char     nanoGPT's CPU recipe

On a CPU it is eager, in float32, with AdamW's default. The presets for a GPU train as one does
there without further thought: compiled, in bfloat16, with a fused AdamW. A batch is a slice for
each row, and for each new token the model reads all of the context again. So it costs about as much
as nanoGPT, and it uses nothing of this repository. It runs on any system.

The last line is JSON. With --turns=True it measures once for each line on stdin, and prints a line
for each: bench.py --compare="..." takes turns with it that way, without starting it anew.
"""
import inspect
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

PRESETS = {  # batch_size, block_size, n_layer, n_head, n_embd, vocab_size, dropout, bias
    'cpu_recipe': (12, 64, 4, 4, 128, 65, 0.0, False),
    'char': (64, 256, 6, 6, 384, 65, 0.2, False),
    'gpt2': (4, 1024, 12, 12, 768, 50304, 0.0, True),
    'gpt2_gpu': (12, 1024, 12, 12, 768, 50304, 0.0, False),
}


class Layer(nn.Module):
    """Attention and an MLP, with the norms before them."""

    def __init__(self, n_layer, n_head, n_embd, dropout, bias):
        super().__init__()
        self.n_head = n_head
        self.attn_norm = nn.LayerNorm(n_embd, bias=bias)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.attn_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.mlp_norm = nn.LayerNorm(n_embd, bias=bias)
        self.mlp_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.mlp_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.attn_proj, self.mlp_fc, self.mlp_proj):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.attn_proj, self.mlp_proj):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * n_layer))

    def forward(self, x):
        B, T, C = x.shape
        shape = B, T, self.n_head, C // self.n_head
        parts = self.qkv(self.attn_norm(x)).split(C, dim=2)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)  # (B, nh, T, hs) each
        dropout_p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.dropout(self.attn_proj(y))
        return x + self.dropout(self.mlp_proj(F.gelu(self.mlp_fc(self.mlp_norm(x)))))


class PlainGPT(nn.Module):
    """GPT-2: the output layer shares its weights with the token embedding."""

    def __init__(self, block_size, n_layer, n_head, n_embd, vocab_size, dropout, bias):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(n_layer, n_head, n_embd, dropout, bias) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=bias)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, idx, targets=None):
        """The mean loss of token ids idx and targets (B, T); the last logits without targets."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if targets is None:
            return x[:, -1] @ self.tokens.weight.t()
        logits = x @ self.tokens.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build(preset, batch_size=None):
    """Batch size, block size and vocabulary of a preset, and its model."""
    torch.manual_seed(1337)
    default_batch_size, block_size, n_layer, n_head, n_embd, vocab_size, dropout, bias = (
        PRESETS[preset])
    model = PlainGPT(block_size, n_layer, n_head, n_embd, vocab_size, dropout, bias)
    return batch_size or default_batch_size, block_size, vocab_size, model


def read_batch(data, batch_size, block_size):
    """Random inputs and targets (B, T) from token ids."""
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = [torch.from_numpy(data[i:i + block_size].astype(np.int64)) for i in starts]
    y = [torch.from_numpy(data[i + 1:i + 1 + block_size].astype(np.int64)) for i in starts]
    return torch.stack(x), torch.stack(y)


class PlainTraining:
    """A model, its optimizer and its data."""

    def __init__(self, model, data, batch_size, block_size, is_gpu=False):
        self.model = model
        self.data, self.batch_size, self.block_size = data, batch_size, block_size
        self.device = 'cuda' if is_gpu else 'cpu'
        model.to(self.device)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99),
                                           fused=is_gpu or None)
        self.called_model = model
        if is_gpu:
            torch.set_float32_matmul_precision('high')
            self.called_model = torch.compile(model)

    def step(self):
        """One training step."""
        x, y = read_batch(self.data, self.batch_size, self.block_size)
        if self.device == 'cuda':
            x = x.pin_memory().to('cuda', non_blocking=True)
            y = y.pin_memory().to('cuda', non_blocking=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == 'cuda'):
            loss = self.called_model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train(preset='cpu_recipe', iters=60, batch_size=None):
    """Measures the mean time of a training step on random tokens."""
    batch_size, block_size, vocab_size, model = build(preset, batch_size)
    data = np.random.default_rng(0).integers(0, vocab_size, 500_000).astype(np.uint16)
    training = PlainTraining(model, data, batch_size, block_size, is_gpu=preset.endswith('_gpu'))
    for _ in range(3):  # compiles, and chooses kernels
        training.step().item()

    def work():
        start = time.perf_counter()
        for _ in range(iters):
            loss = training.step()
        loss.item()  # waits for the device
        seconds = (time.perf_counter() - start) / iters
        return dict(what='train', preset=preset, batch_size=batch_size, ms_per_iter=1000 * seconds,
                    tokens_per_s=batch_size * block_size / seconds)
    return work


def generate(preset='gpt2', tokens=64):
    """Measures the generation of one sequence after a prompt of 16 random tokens."""
    _, block_size, vocab_size, model = build(preset)
    model.eval()

    @torch.no_grad()
    def work():
        idx = torch.randint(vocab_size, (1, 16))
        start = time.perf_counter()
        for _ in range(tokens):
            logits = model(idx[:, -block_size:]) / 0.8
            smallest = logits.topk(min(200, vocab_size)).values[:, -1:]
            probs = logits.masked_fill(logits < smallest, -math.inf).softmax(dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, 1)), dim=1)
        seconds = time.perf_counter() - start
        return dict(what='generate', preset=preset, tokens=tokens, tokens_per_s=tokens / seconds)
    return work


def learn(data='data/shakespeare_char', iters=2000, eval_interval=250):
    """Trains nanoGPT's CPU recipe to its end: the loss on all of val against seconds."""
    batch_size, block_size, _, model = build('cpu_recipe')
    train_data, val_data = (np.fromfile(os.path.join(data, f'{split}.bin'), dtype=np.uint16)
                            for split in ('train', 'val'))
    training = PlainTraining(model, train_data, batch_size, block_size)
    num_rows = (len(val_data) - 1) // block_size
    val_ids = torch.from_numpy(val_data[:num_rows * block_size + 1].astype(np.int64))
    inputs, targets = val_ids[:-1].view(num_rows, -1), val_ids[1:].view(num_rows, -1)

    @torch.no_grad()
    def evaluate():
        batches = zip(inputs.split(128), targets.split(128))
        return sum(model(x, y).item() * len(x) for x, y in batches) / num_rows

    def work():
        seconds = 0.0
        curve = []
        for it in range(iters + 1):
            if it % eval_interval == 0 or it == iters:
                curve.append((it, round(seconds, 2), round(evaluate(), 4)))
                print(f'iter {it}: val loss {curve[-1][2]:.4f} after {seconds:.1f} s of training',
                      flush=True)
            if it == iters:
                break
            start = time.perf_counter()
            lr = 1e-3 * (it + 1) / 101  # warmup, then a cosine
            if it >= 100:
                share = (it - 100) / (iters - 100)
                lr = 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4
            for group in training.optimizer.param_groups:
                group['lr'] = lr
            training.step()
            seconds += time.perf_counter() - start
        return dict(what='learn', iters=iters, seconds=seconds, val_loss=curve[-1][2], curve=curve)
    return work


def read_options(function, flags):
    """The --name=value flags as arguments of the function; exits if one is wrong."""
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    options = {}
    for flag in flags:
        name, _, value = flag.removeprefix('--').partition('=')
        is_number = name in defaults and not isinstance(defaults[name], str)
        if name not in defaults or not value or is_number and not value.isdigit():
            names = ', '.join(f'--{name}=' for name in defaults)
            sys.exit(f'error: {flag} is not known or has no proper value; the options are {names}')
        options[name] = int(value) if is_number else value
    preset = options.get('preset', 'gpt2')
    if preset not in PRESETS:
        sys.exit(f'error: preset={preset} is not known; use {", ".join(PRESETS)}')
    if preset.endswith('_gpu') and not torch.cuda.is_available():
        sys.exit(f'error: preset={preset} needs a CUDA GPU')
    data = options.get('data', defaults.get('data'))
    if data and not os.path.isfile(os.path.join(data, 'train.bin')):
        sys.exit(f'error: {data} has no train.bin; prepare it first')
    return options


if __name__ == '__main__':
    commands = {'train': train, 'generate': generate, 'learn': learn}
    command, *flags = sys.argv[1:] or ['--help']
    if command not in commands or '--help' in flags:
        print(__doc__)
        sys.exit()
    takes_turns = '--turns=True' in flags
    flags = [flag for flag in flags if flag != '--turns=True']
    work = commands[command](**read_options(commands[command], flags))
    for _ in sys.stdin if takes_turns else [None]:
        print(json.dumps(work()), flush=True)
