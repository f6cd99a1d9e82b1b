"""Small models and their steps, for test_replay.py and test_replay_changes.py."""
import torch

from model import GPT, GPTConfig
from runtime import kernels


def make_model(scale=4, **options):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**shape, **options}))
    for p in model.parameters():  # away from the initial, nearly uniform predictions
        p.data *= scale
    return model


def make_fast_model(dtype='float32', **options):
    model = make_model(**options)
    kernels.accelerate(model, 'cpu', dtype)
    return model


def make_batch(model, rows=4):
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (rows, model.config.block_size + 1))
    return ids[:, :-1], ids[:, 1:]  # views, as in train.py


def measure(model, batch, dtype='float32', factor=1.0):
    """The loss and the gradients by their names, and how the loss was computed."""
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        with kernels.loss_only(model):
            logits, loss = model(*batch)
    (loss * factor).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    was_played = 'ReplayFunction' in str(loss.grad_fn)
    return {'loss': loss.detach(), **grads}, was_played


def compare(results, expected, tolerance=1e-5):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        difference = (results[name] - value).norm() / value.norm().clamp(min=1e-9)
        assert difference <= tolerance, (name, difference)


def check(model, batch=None, is_played=True, plain_model=None, tolerance=1e-5):
    """Checks that the model computes what a plain one with the same weights does."""
    batch = batch or make_batch(model)
    plain_model = plain_model or make_model()
    expected, _ = measure(plain_model, batch)
    results, was_played = measure(model, batch)
    assert was_played == is_played
    compare(results, expected, tolerance)
