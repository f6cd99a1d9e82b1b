"""
Whether a model gives the same logits with a KV cache: it may have been changed in any way.
"""
import contextlib
import functools
import math

import torch

from runtime import originals
from runtime.console import note
from runtime.kv_cache import CachedModel
from runtime.linears import Int8Linear

note_once = functools.lru_cache(None)(note)


# -----------------------------------------------------------------------------
# may it be used
def can_cache(model, idx, use_cache=None, max_new_tokens=math.inf):
    """Whether to generate from token ids idx with a KV cache; if not, one line says why.

    use_cache=None: if the model is as it was in model.py, or gives the same logits with a cache.
    For a few tokens that comparison would take longer than to generate them without a cache.
    use_cache=True: without a comparison. ValueError if there is no attention to exchange.
    """
    if use_cache is False:
        return False
    attentions = [part for path, part in model.named_modules(remove_duplicate=False)
                  if path.endswith('.attention')]
    problem = None
    if not attentions:
        problem = 'its attention is not a module named attention'
    elif len(attentions) > len(set(attentions)):
        problem = 'some of its layers are one and the same'
    if use_cache and problem:
        raise ValueError(f'this model cannot use a KV cache: {problem}')
    if use_cache:
        return True
    has_global_hook = originals.has_global_hook(originals.FORWARD_HOOKS)
    if any(map(originals.has_forward_hook, model.modules())) or has_global_hook:
        problem = 'it has a hook, which would see one token at a time'
    elif not problem and not all(map(is_original_attention, attentions)):
        problem = 'its attention was changed'
    elif not problem and not originals.is_original_model(model):
        num_inputs = max_new_tokens * (idx.size(1) + max_new_tokens / 2)  # without a cache
        if num_inputs < 5 * model.config.block_size:
            return False
        if not has_same_logits(model, idx):
            problem = 'it was changed, and the cache would change its logits'
    if problem:
        note_once(f'this model generates without a KV cache: {problem}')
    return not problem


def is_original_attention(part):
    """Whether nobody has changed this Attention, for which CachedAttention stands in."""
    is_fast = originals.is_fast(part) and not originals.is_patched(part)
    return originals.is_unchanged(part.plain if is_fast else part, 'Attention')


@contextlib.contextmanager
def keep_state(model):
    """A context in which the model is in eval mode. It puts back mode and buffers at its end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module._buffers, name, buffer, buffer.clone()) for module in model.modules()
               for name, buffer in module._buffers.items() if buffer is not None]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:  # a parent comes before its parts
            module.train(is_training)
        for owner, name, buffer, value in buffers:
            owner[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@torch.no_grad()
def has_same_logits(model, idx):
    """Whether the model gives the same logits with and without a cache, after prompts idx (B, T).

    It is asked anew by each generate(), as somebody's change may depend on anything.
    """
    try:
        with keep_state(model):
            return compare_logits(model, idx.unique(dim=0))
    except Exception:  # a change that can't work with a cache may raise anything
        return False


def compare_logits(model, prompts):
    """has_same_logits(), by a full context: the prompts and random tokens, the last eight decoded.

    Less would not show an attention that sees only the last 512 tokens. Among the last eight are
    ids that may mean something to a changed model: the first and the last one, and GPT-2's end of a
    text. The tolerance is above what rounding does.
    """
    T, V = model.config.block_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(V, generator=generator).repeat(T // V + 1)[:T]
    if T > 8:  # the token after each of them is looked at
        ids[[-8, -6, -4]] = torch.tensor([0, min(50256, V - 1), V - 1])
    prompts = prompts[:, :max(1, T - 8)]
    ids = ids[prompts.size(1):].to(prompts.device)
    tokens = torch.cat((prompts, ids.expand(len(prompts), -1)), dim=1)  # (B, T)
    cached_model = CachedModel(model, T, static=prompts.is_cuda)
    # it rounds all tokens of a call to the same 8 bits, so the logits depend on the others
    rounds_inputs = any(isinstance(module, Int8Linear) for module in model.modules())
    idx_next = tokens[:, :max(1, T - 8)]
    for n in range(idx_next.size(1), T + 1):
        logits = cached_model(idx_next)[:, -1].double()
        idx_next = tokens[:, n:n + 1]
        if n in (T - 6, T - 4, T - 2, T):
            expected_logits = model(tokens[:, :n])[0][:, -1]
            tolerance = 1e-4 if expected_logits.dtype.itemsize >= 4 else 3e-2
            if rounds_inputs:
                tolerance = 0.1
            expected_logits = expected_logits.double()
            scale = (expected_logits - expected_logits.mean()).norm()
            if not (logits - expected_logits).norm() <= tolerance * scale:
                return False
    return True


@torch.no_grad()
def check_heads(model, idx):
    """One line if sampling has other logits than training, because somebody changed one of them."""
    loss_head = getattr(model, 'loss_head', None)
    loss_head = getattr(loss_head, 'plain', loss_head)
    if originals.is_unchanged(loss_head, 'LossHead') and originals.is_unchanged(model, 'GPT'):
        return
    idx = idx[:1, -64:]
    with contextlib.suppress(Exception), keep_state(model):  # a change may raise anything
        logits, same_logits = model(idx)[0], model(idx)[0]
        logits_of_training = model(idx, idx)[0].reshape(-1, logits.size(-1))[-1:]
        is_other = not torch.allclose(logits[0].double(), logits_of_training.double(), 1e-2, 1e-2)
        if is_other and torch.equal(logits, same_logits):  # without noise
            note_once('this model has other logits in training than in sampling: what changes them '
                      'must be both in LossHead and in GPT.forward of model.py')
