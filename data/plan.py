"""
The run that suits a text: the model's size, dropout and iterations, by the text and the machine.
"""
import time

import torch

from model import GPT, GPTConfig
from runtime import kernels, machine

BATCH_SIZE = 12  # of config/train_text.py
BLOCK_SIZE = 64
MAX_SECONDS = 300  # of a run, without its evaluations
# up to so many train tokens: the width of 4 layers, dropout, and how often the tokens are read
PLANS = ((150_000, 96, 0.1, 31), (1_500_000, 128, 0.0, 6), (float('inf'), 128, 0.0, 5))


def choose_run(num_tokens, vocab_size):
    """Flags of train.py for a text of so many train tokens. It prints why."""
    n_embd, dropout, passes = next(plan[1:] for plan in PLANS if num_tokens <= plan[0])
    seconds = time_step(GPTConfig(block_size=BLOCK_SIZE, vocab_size=vocab_size, n_layer=4,
                                  n_head=4, n_embd=n_embd, dropout=dropout, bias=False))
    by_text = passes * num_tokens / (BATCH_SIZE * BLOCK_SIZE)
    by_time = MAX_SECONDS / seconds
    max_iters = max(100, 50 * round(min(by_text, by_time) / 50))
    reason = f'they are {passes} passes over the text'
    if by_time < by_text:
        reason = f'an iteration takes {1000 * seconds:.0f} ms on this machine now'
    elif max_iters == 100:
        reason = 'so short a text is learned by heart'
    print(f'plan: a width of {n_embd} and a dropout of {dropout} for {num_tokens:,} train tokens, '
          'by the runs in data/text/readme.md')
    print(f'plan: {max_iters:,} iterations take about {max_iters * seconds / 60:.1f} minutes '
          f'without evaluations; {reason}')
    return dict(n_embd=n_embd, dropout=dropout, max_iters=max_iters, lr_decay_iters=max_iters)


def time_step(config, repeats=30):
    """The seconds that a training step of this model takes here, without compiling.

    On a CPU one thread computes it. Several threads wait for each other, so a busy machine would
    look much slower than it is.
    """
    device, _ = machine.choose_device('auto')
    device_type = torch.device(device).type
    dtype, _ = machine.choose_dtype('auto', device_type)
    model = GPT(config).to(device)
    kernels.accelerate(model, device_type, dtype)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device_type)
    idx = torch.randint(config.vocab_size, (BATCH_SIZE, config.block_size), device=device)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    while len(times) < repeats and sum(times) < 2:
        start = time.perf_counter()
        with torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32'):
            with kernels.loss_only(model):
                _, loss = model(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        machine.synchronize(device)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(num_threads)
    return min(times)
