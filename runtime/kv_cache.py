"""
A model with a KV cache, and when it gives the same logits as without one.

For the time of a step, some parts of the model are exchanged for parts that know the cache:
attention sees the earlier keys and values, and positions and embeddings continue where it ends.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime import originals
from runtime.console import note

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
    idx_next = tokens[:, :max(1, T - 8)]
    for n in range(idx_next.size(1), T + 1):
        logits = cached_model(idx_next)[:, -1].double()
        idx_next = tokens[:, n:n + 1]
        if n in (T - 6, T - 4, T - 2, T):
            expected_logits = model(tokens[:, :n])[0][:, -1]
            tolerance = 1e-4 if expected_logits.dtype.itemsize >= 4 else 3e-2
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


# -----------------------------------------------------------------------------
# the cache
class KVCache:
    """What all parts of a cached model know: how many tokens it has seen, and the last of them.

    The prompt comes first (prefill), then one token per step (decode). In a static cache all
    shapes and addresses stay the same from step to step, so a step can be replayed as a CUDA graph.
    """

    def __init__(self, size, static=False):
        self.size = size  # tokens that the buffers hold
        self.static = static
        self.length = 0  # tokens seen
        self.position = None  # the length as a tensor (1,) on the device
        self.mask = None  # of a static cache: which places the next token sees, (1, size)
        self.recent_idx = None  # the last token ids (B, num_recent), as embeddings look at them

    def begin(self, idx, num_recent):
        """Prepares the step for token ids idx (B, T)."""
        assert self.length == 0 or idx.size(1) == 1, 'after the prompt, one token per step'
        if self.position is None:
            self.position = torch.zeros(1, dtype=torch.long, device=idx.device)
            self.recent_idx = idx.new_zeros(len(idx), num_recent)
        elif self.length == 0:  # again: a CUDA graph knows the place of this tensor
            self.position.zero_()
        elif self.static:
            self.mask = torch.arange(self.size, device=idx.device)[None] <= self.position

    def start(self):
        """The position of the step's first token: a number, or a tensor (1,)."""
        return self.position if self.static and self.length else self.length

    def end(self, T):
        """Counts the step's T tokens."""
        self.length += T
        self.position += T


class CachedAttention(nn.Module):
    """Causal attention of new tokens to themselves and to all earlier ones."""

    def __init__(self, cache):
        super().__init__()
        self.cache = cache
        self.buffer = None  # keys and values, (2, B, nh, size, hs)

    def forward(self, q, k, v, dropout, flash):
        cache, T = self.cache, k.size(2)
        dropout_p = 0.0
        if isinstance(dropout, nn.Dropout) and dropout.training:
            dropout_p = dropout.p
        if self.buffer is None:  # what is masked counts 0 times, so it must not be NaN
            B, nh, _, hs = k.size()
            self.buffer = k.new_zeros(2, B, nh, cache.size, hs)
        elif cache.length == 0:  # it is from another prompt
            self.buffer.zero_()
        # with rotary positions a full cache continues: a token replaces the one `size` before it
        if cache.static and cache.length:
            place = cache.position % cache.size
            k, v = self.buffer.index_copy_(3, place, torch.stack((k, v)))
            return F.scaled_dot_product_attention(q, k, v, cache.mask, dropout_p)
        place = cache.length % cache.size
        self.buffer[0, :, :, place:place + T] = k
        self.buffer[1, :, :, place:place + T] = v
        k, v = self.buffer[:, :, :, :cache.length + T]
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)


class ContinuedPositions(nn.Module):
    """A table of positions that begins where the cache ends."""

    def __init__(self, cache, table):
        super().__init__()
        self.cache = cache
        self.table = table

    def forward(self, pos):
        return self.table(self.cache.start() + pos)


class ContinuedRotary(nn.Module):
    """Rotary positions that begin where the cache ends."""

    def __init__(self, cache, rotary):
        super().__init__()
        self.cache = cache
        self.rotary = rotary

    def forward(self, q, k, base):
        return self.rotary(q, k, base, self.cache.start())


class CachedModel:
    """A model with a KV cache of its own. Call it with the prompt, then with one token a time."""

    def __init__(self, model, size, static=False):
        self.model = model
        self.cache = KVCache(size, static)
        self.parts = []  # (the parent's dict of modules, name, the part that knows the cache)
        for module in model.modules():
            modules = module._modules
            if 'attention' in modules:
                self.parts.append((modules, 'attention', CachedAttention(self.cache)))
            if 'rotary' in modules:
                self.parts.append((modules, 'rotary', ContinuedRotary(self.cache, module.rotary)))
            if 'wpe' in modules:
                self.parts.append((modules, 'wpe', ContinuedPositions(self.cache, module.wpe)))
        self.num_recent = getattr(model, 'embd_conv', 0) + (getattr(model, 'bigrams', 0) > 0)

    def __call__(self, idx):
        """The logits (B, 1, V) after token ids idx (B, T)."""
        self.cache.begin(idx, self.num_recent)
        plain_parts = [modules[name] for modules, name, _ in self.parts]
        patched_embed = vars(self.model).get('embed')  # if somebody has patched it
        try:
            for modules, name, part in self.parts:
                modules[name] = part
            if self.num_recent:
                embed = self.model.embed
                vars(self.model)['embed'] = lambda idx: self.embed(idx, embed)
            logits, _ = self.model(idx)
        finally:
            vars(self.model).pop('embed', None)
            if patched_embed:
                vars(self.model)['embed'] = patched_embed
            for (modules, name, _), part in zip(self.parts, plain_parts):
                modules[name] = part
        self.cache.end(idx.size(1))
        return logits

    def embed(self, idx, embed):
        """The embeddings of idx (B, T), which also depend on the tokens before it."""
        n = self.num_recent
        T = idx.size(1)
        recent_idx = self.cache.recent_idx
        num_known = min(n, self.cache.length)
        if num_known:
            idx = torch.cat((recent_idx[:, n - num_known:], idx), dim=1)
        num_kept = min(n, idx.size(1))
        recent_idx[:, n - num_kept:] = idx[:, -num_kept:]  # in place, for CUDA graphs
        return embed(idx)[:, -T:]

    def is_steady(self):
        """Whether each step from here on has the same shapes: a CUDA graph can be made."""
        return self.cache.static and self.cache.length >= max(1, self.num_recent)

    def is_full(self, T):
        """Whether T more tokens don't fit, so that all must be computed again.

        When the context is full, every token moves to another position with each new one. With
        learned positions all keys and values change then. Rotary positions don't need that.
        """
        has_table = any(isinstance(part, ContinuedPositions) for _, _, part in self.parts)
        slides = getattr(self.model, 'rope_base', 0) and not has_table
        return not slides and self.cache.length + T > self.model.config.block_size
