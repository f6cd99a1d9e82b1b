"""
A model with a KV cache, as sampling uses it.

For the time of a step, some parts of the model are exchanged for parts that know the cache:
attention sees the earlier keys and values, and positions and embeddings continue where it ends.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime.attention import attend
from runtime.originals import is_unchanged


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
        if self.buffer is None:
            self.buffer = self.allocate(k)
        elif cache.length == 0:  # it is from another prompt
            self.buffer.zero_()
        # with rotary positions a full cache continues: a token replaces the one `size` before it
        if cache.static and cache.length:
            place = cache.position % cache.size
            k, v = self.buffer.index_copy_(3, place, torch.stack((k, v)))
            return F.scaled_dot_product_attention(q, k, v, cache.mask, dropout_p)
        if T == 1:
            return self.extend(q, torch.stack((k, v)), dropout_p)
        self.buffer[0, :, :, :T] = k
        self.buffer[1, :, :, :T] = v
        if dropout_p:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return attend(q, k, v)

    def extend(self, q, kv, dropout_p=0.0):
        """Attention of one token, q (B, nh, 1, hs), to itself and to those before it.

        kv: its key and value, (2, B, nh, 1, hs).
        """
        length, size = self.cache.length, self.cache.size
        self.buffer.narrow(3, length % size, 1).copy_(kv)
        k, v = self.buffer.narrow(3, 0, min(length + 1, size)).unbind()
        return F.scaled_dot_product_attention(q.type_as(k), k, v, dropout_p=dropout_p).type_as(q)

    def allocate(self, k):
        """Room for the keys and values of all tokens of the cache."""
        B, nh, _, hs = k.size()
        shape = 2, B, nh, self.cache.size, hs
        if self.cache.static:  # what is masked counts 0 times, so it must not be NaN
            return k.new_zeros(shape)
        # torch's attention of one token to 266 takes 0.14 ms in bfloat16 on a CPU, and 0.03 ms in
        # float32. With ten sequences it is 1.4 and 0.7 ms
        dtype = k.dtype
        if k.device.type == 'cpu' and not torch.is_autocast_enabled('cpu'):  # it would cast back
            dtype = torch.promote_types(k.dtype, torch.float32)
        return k.new_empty(shape, dtype=dtype)


class CachedBlock(nn.Module):
    """A Block of model.py that computes one token of each row with as few calls as possible.

    With one sequence at 124M on a CPU it saves 0.4 of 7 ms.
    """

    def __init__(self, block):
        super().__init__()
        self.block = block

    @staticmethod
    def fits(block):
        """Whether forward() does all that this block does: no options and no dropout."""
        kinds = {'attn': 'CausalSelfAttention', 'mlp': 'MLP'}
        if not is_unchanged(block, 'Block') or not all(
                is_unchanged(getattr(block, name, None), kind) for name, kind in kinds.items()):
            return False
        attn = block.attn
        dropouts = attn.resid_dropout, block.mlp.dropout  # the parts that forward() leaves out
        return (all(isinstance(part, nn.Dropout) for part in dropouts)
                and not (attn.rope_base or attn.qk_norm)
                and not any(module.training for module in block.modules()))

    def forward(self, x):
        block, attn, mlp = self.block, self.block.attn, self.block.mlp
        if not attn.attention.cache.length:  # the prompt
            return block(x)
        B, _, C = x.size()
        nh = attn.n_head
        x = x.view(B, C)
        qkv = attn.c_attn.forward(block.ln_1.forward(x)).view(B, 3, nh, 1, C // nh)
        y = attn.attention.extend(qkv[:, 0], qkv[:, 1:].transpose(0, 1))  # (B, nh, 1, hs)
        x = x + attn.c_proj.forward(y.view(B, C))
        x = x + mlp.c_proj.forward(mlp.gelu.forward(mlp.c_fc.forward(block.ln_2.forward(x))))
        return x.view(B, 1, C)


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
                if type(part) is not CachedBlock or part.block is modules[name]:
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
