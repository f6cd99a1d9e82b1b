"""
Generating text with a KV cache: prefill, decoding, sampling a token, and CUDA graphs.

For the time of a step, some parts of the model are exchanged for parts that know the cache:
attention sees the earlier keys and values, and positions and embeddings continue where it ends.
"""
import functools

import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime import kernels
from runtime.console import note
from runtime.originals import has_digest, is_patched, is_unchanged

note_once = functools.lru_cache(None)(note)


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """Continues each row of the prompt idx (B, T): (B, T + max_new_tokens). See stream()."""
    new_tokens = stream(model, idx, max_new_tokens, temperature, top_k, top_p, vocab_size)
    return torch.cat((idx, *new_tokens), dim=1)


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """Yields max_new_tokens times the next token of every row of the prompt idx (B, T): (B, 1).

    temperature=0 takes the most likely token. top_k draws from that many tokens, top_p from the
    smallest set that has this much probability (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751). None, 0, or 1 for top_p, draws from all. Ids from vocab_size
    on, rows that pad the embedding, are never drawn. The model sees the last block_size tokens.
    """
    block_size = model.config.block_size
    idx = idx[:, -block_size:]
    cached_model = None
    if can_cache(model):
        size = min(block_size, idx.size(1) + max_new_tokens)
        cached_model = CachedModel(model, size, static=idx.is_cuda)

    def draw(logits):
        return sample(logits[:, -1], temperature, top_k, top_p, vocab_size)

    def decode(idx_next):
        return draw(cached_model(idx_next))

    idx_next = idx
    for n in range(max_new_tokens):
        with torch.no_grad():
            if cached_model and cached_model.is_full(idx_next.size(1)):
                cached_model = None
            if not cached_model:
                idx_next = draw(model(idx)[0])
            else:
                # making a graph takes time, and needs a cache whose shapes don't change any more
                if idx.is_cuda and max_new_tokens > 16 and n == cached_model.num_recent + 1:
                    decode = make_cuda_graph(decode, idx_next, cached_model.cache)
                idx_next = decode(idx_next)
        idx = torch.cat((idx, idx_next), dim=1)[:, -block_size:]
        yield idx_next


def sample(logits, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """Draws a token id (B, 1) from each row of logits (B, V), with the options of stream()."""
    logits = logits[:, :vocab_size].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k or top_p and top_p < 1:  # the candidates, the most likely first
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probs = (logits / temperature).softmax(dim=-1)
    if top_p and top_p < 1:
        is_outside = probs.cumsum(dim=-1) - probs >= top_p  # those before it already have top_p
        probs = probs.masked_fill(is_outside, 0.0)
    # of independent exponential clocks with rates p, the first one rings with probability p.
    # torch.multinomial would make a GPU wait for the host
    choice = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)
    return choice if ids is None else ids.gather(-1, choice)


# -----------------------------------------------------------------------------
# memory
def count_cache_bytes(model, prompt_length, max_new_tokens):
    """The bytes of one row's KV cache."""
    c = model.config
    tokens = min(c.block_size, prompt_length + max_new_tokens)
    return 2 * c.n_layer * c.n_embd * tokens * model.lm_head.weight.itemsize


def choose_rows(model, prompt_length, max_new_tokens, num_samples, free_bytes):
    """How many of the samples to generate at once, so that they need half of the free memory.

    Each row has a KV cache, which exists twice at times, and at first the prompt's activations
    and logits. free_bytes is None if it isn't known.
    """
    if free_bytes is None:
        return num_samples
    c = model.config
    prompt_bytes = 4 * (16 * c.n_embd * min(c.block_size, prompt_length) + 4 * c.vocab_size)
    row_bytes = 2 * count_cache_bytes(model, prompt_length, max_new_tokens) + prompt_bytes
    return max(1, min(num_samples, free_bytes // 2 // row_bytes))


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
        self.recent_idx = None  # the last token ids (B, n), if embeddings look at them

    def begin(self, idx):
        """Prepares the step for token ids idx (B, T)."""
        assert self.length == 0 or idx.size(1) == 1, 'after the prompt, one token per step'
        if self.length == 0:
            self.position = torch.zeros(1, dtype=torch.long, device=idx.device)
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

    def forward(self, q, k, v, dropout_p):
        cache, T = self.cache, k.size(2)
        if self.buffer is None:  # what is masked counts 0 times, so it must not be NaN
            B, nh, _, hs = k.size()
            self.buffer = k.new_zeros(2, B, nh, cache.size, hs)
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
        config = model.config
        self.parts = []  # (the parent's dict of modules, name, the part that knows the cache)
        for block in model.transformer.h:
            modules = block.attn._modules
            self.parts.append((modules, 'attention', CachedAttention(self.cache)))
            if config.rope_base:
                rotary = ContinuedRotary(self.cache, block.attn.rotary)
                self.parts.append((modules, 'rotary', rotary))
        if not config.rope_base:
            positions = ContinuedPositions(self.cache, model.transformer.wpe)
            self.parts.append((model.transformer._modules, 'wpe', positions))
        self.num_recent = config.embd_conv + (config.bigrams > 0)

    def __call__(self, idx):
        """The logits (B, 1, V) after token ids idx (B, T)."""
        self.cache.begin(idx)
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
        cache = self.cache
        T = idx.size(1)
        if cache.recent_idx is not None:
            idx = torch.cat((cache.recent_idx, idx), dim=1)
        recent_idx = idx[:, -self.num_recent:]
        if cache.recent_idx is not None and recent_idx.shape == cache.recent_idx.shape:
            cache.recent_idx.copy_(recent_idx)  # in place, for CUDA graphs
        else:
            cache.recent_idx = recent_idx.clone()
        return embed(idx)[:, -T:]

    def is_full(self, T):
        """Whether T more tokens don't fit, so that all must be computed again.

        When the context is full, every token moves to another position with each new one. With
        learned positions all keys and values change then. Rotary positions don't need that.
        """
        is_too_long = self.cache.length + T > self.model.config.block_size
        return is_too_long and not self.model.config.rope_base


def can_cache(model):
    """Whether CachedModel was written for this model; if not, one line says so."""
    blocks = getattr(getattr(model, 'transformer', None), 'h', ())
    attns = [getattr(block, 'attn', None) for block in blocks]
    methods_fit = has_digest(model, 'GPT.forward') and has_digest(model, 'GPT.embed')
    is_known = methods_fit and 0 < len(attns) == len(set(attns))  # shared ones would mix up keys
    for block, attn in zip(blocks, attns):
        is_known = is_known and (has_digest(block, 'Block.forward')
                                 and has_digest(block.mlp, 'MLP.forward')
                                 and is_unchanged(attn, 'CausalSelfAttention')
                                 and is_unchanged(attn.rotary, 'RotaryPositions')
                                 and (is_unchanged(attn.attention, 'Attention')
                                      or type(attn.attention) is kernels.Attention
                                      and not is_patched(attn.attention)))
    if not is_known:
        note_once('the attention or the forward pass of this model was changed or has a hook, '
                  'so it generates without a KV cache')
    return is_known


def make_cuda_graph(decode, idx_next, cache):
    """decode, which computes the next token (B, 1) from this one, as a CUDA graph.

    The step's hundreds of small kernels are then launched as one.
    """
    length, token = cache.length, idx_next.clone()
    recent_idx = None if cache.recent_idx is None else cache.recent_idx.clone()
    with torch.cuda.device(idx_next.device):
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            decode(token)  # chooses the kernels and allocates their workspaces
        torch.cuda.current_stream().wait_stream(side_stream)
        cache.length = length
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            next_token = decode(token)
    cache.length = length  # neither of the two steps counts
    cache.position.fill_(length)
    if recent_idx is not None:
        cache.recent_idx.copy_(recent_idx)

    def replay(idx_next):
        with torch.cuda.device(idx_next.device):
            token.copy_(idx_next)
            graph.replay()
        cache.length += 1
        return next_token.clone()

    return replay
