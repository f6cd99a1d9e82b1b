"""
Generating text: the prompt, one token after another, drawing a token, packed weights, CUDA graphs.
"""
import threading

import torch
import torch.nn as nn

from runtime.console import get_first_line, note
from runtime.kv_cache import CachedModel, can_cache, check_heads, note_once
from runtime.originals import is_original, is_original_model, is_unchanged

lock = threading.RLock()  # several threads may generate with one model


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None,
             use_cache=None):
    """Continues each row of the prompt idx (B, T): (B, T + max_new_tokens).

    temperature=0 takes the most likely token. top_k draws from that many tokens, top_p from the
    smallest set that has this much probability (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751). None, 0, or 1 for top_p, draws from all. Ids from vocab_size
    on, rows that pad the embedding, are never drawn. The model sees the last block_size tokens.
    use_cache: True | False | None (if it gives the same logits: see can_cache()).
    """
    new_tokens = draw_tokens(model, idx, max_new_tokens, temperature, top_k, top_p, vocab_size,
                             use_cache)
    return torch.cat((idx, *new_tokens), dim=1)


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """Yields max_new_tokens times the next token of every row of the prompt idx (B, T): (B, 1).

    For the options see generate(). If somebody has changed the model's own generate(), the tokens
    come from that.
    """
    own_generate = getattr(model, 'generate', None)
    if own_generate and not can_replace(getattr(own_generate, '__func__', None)):
        note_once('the tokens come from your own generate(): it gets temperature and top_k, and '
                  'the other options have no effect')
        ids = own_generate(idx, max_new_tokens, temperature=temperature, top_k=top_k or None)
        yield from ids[:, idx.size(1):].split(1, dim=1)
    else:
        yield from draw_tokens(model, idx, max_new_tokens, temperature, top_k, top_p, vocab_size)


def can_replace(function):
    """Whether generate() here may stand in for this function: the generate() that model.py had."""
    decorator_code = torch.no_grad()(sample).__code__
    return (getattr(function, '__code__', None) is decorator_code
            and is_original(function.__wrapped__, 'GPT.generate'))


def draw_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                vocab_size=None, use_cache=None):
    """Yields max_new_tokens times the next token of every row of the prompt idx (B, T): (B, 1)."""
    block_size = model.config.block_size
    idx = idx[:, -block_size:]
    cached_model = None
    with lock:
        check_heads(model, idx)
        if can_cache(model, idx, use_cache, max_new_tokens):
            size = min(block_size, idx.size(1) + max_new_tokens)
            cached_model = CachedModel(model, size, static=idx.is_cuda)

    def draw(logits):
        return sample(logits[:, -1], temperature, top_k, top_p, vocab_size)

    def decode(idx_next):
        return draw(cached_model(idx_next))

    idx_next = idx
    for n in range(max_new_tokens):
        with torch.no_grad(), lock:
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
    """Draws a token id (B, 1) from each row of logits (B, V), with the options of generate()."""
    logits = logits[:, :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
    return 2 * c.n_layer * c.n_embd * tokens * next(model.parameters()).itemsize


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
# faster steps
class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight in the blocks that oneDNN multiplies."""

    def __init__(self, linear, rows):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    @property
    def weight(self):  # for a model that somebody has changed so that it reads this
        return self.blocks.to_dense()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, 'none', [], '')


def convert(model, device, dtype):
    """Moves the model to the device for sampling; returns its dtype, the name of which is given.

    It is float32 if the model was changed and can't compute in dtype.
    """
    model.eval().to(device, getattr(torch, dtype))
    if dtype == 'float32' or is_original_model(model):
        return dtype
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    except RuntimeError as e:
        note(f'this model was changed and does not run in {dtype} ({get_first_line(e)}), '
             'so it runs in float32')
        model.float()
        return 'float32'
    return dtype


def pack_linears(model, rows):
    """Makes a model on a CPU generate `rows` sequences at once faster.

    Afterwards it can't be trained or saved. A token takes 16 ms instead of 22 at 124M in bfloat16,
    and 37 instead of 69 in float32; ten rows take 33 instead of 43.
    """
    if not torch.backends.mkldnn.is_available():
        return
    is_bfloat16 = next(model.parameters()).dtype == torch.bfloat16
    if is_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    # a list of all linear layers would keep every weight twice
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in parent.named_children():
            if is_unchanged(child, 'Linear'):
                setattr(parent, name, PackedLinear(child, rows))


def compile_forward(model):
    """torch.compile() of the forward pass, for generation.

    By default torch compiles again for each value of a number in a module. Here that is the length
    of the KV cache, which changes with each token.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    model.compile()


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
