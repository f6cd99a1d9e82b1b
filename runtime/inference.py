"""
Generating text: the prompt, one token after another, drawing a token, packed weights, CUDA graphs.
"""
import itertools
import math
import threading

import torch

from runtime import compiler
from runtime.cache_checks import can_cache, check_heads, note_once
from runtime.console import fail, get_first_line, note
from runtime.kv_cache import CachedBlock, CachedModel
from runtime.linears import list_linears, pack
from runtime.memory import has_room, return_freed_memory
from runtime.originals import is_original, is_original_model, is_watched

MIN_PACKED_TOKENS = 32  # packing 124M takes as long as it saves with 12 tokens
lock = threading.RLock()  # several threads may generate with one model


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None,
             use_cache=None, graphs=None):
    """Continues each row of the prompt idx (B, T): (B, T + max_new_tokens).

    temperature=0 takes the most likely token. top_k draws from that many tokens, top_p from the
    smallest set that has this much probability (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751). None, 0, or 1 for top_p, draws from all. Ids from vocab_size
    on, rows that pad the embedding, are never drawn. The model sees the last block_size tokens.
    FloatingPointError if the prompt's logits are NaN or infinite.
    use_cache: True | False | None (if it gives the same logits: see can_cache()).
    graphs: a dict, in which the CUDA graph of a step is kept for the next call.
    """
    new_tokens = draw_tokens(model, idx, max_new_tokens, temperature, top_k, top_p, vocab_size,
                             use_cache, graphs, packs=True)
    return torch.cat((idx, *new_tokens), dim=1)


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None,
           graphs=None):
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
        return
    try:
        yield from draw_tokens(model, idx, max_new_tokens, temperature, top_k, top_p, vocab_size,
                               graphs=graphs)
    except FloatingPointError as e:  # check_logits()
        fail(str(e), 'try --dtype=float32, or an earlier checkpoint')


def can_replace(function):
    """Whether generate() here may stand in for this function: the generate() that model.py had."""
    decorator_code = torch.no_grad()(sample).__code__
    return (getattr(function, '__code__', None) is decorator_code
            and is_original(function.__wrapped__, 'GPT.generate'))


def draw_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                vocab_size=None, use_cache=None, graphs=None, static=None, packs=False):
    """Yields max_new_tokens times the next token of every row of the prompt idx (B, T): (B, 1).

    static: whether the KV cache is static; None: on a GPU. packs: whether to pack copies of the
    weights, which nobody can change between two tokens then. For the rest see generate().
    """
    block_size = model.config.block_size
    idx = idx[:, -block_size:]
    static = idx.is_cuda if static is None else static
    options = temperature, top_k, top_p, vocab_size
    is_unchanged_model = is_original_model(model)
    decoder = key = None
    with lock:
        check_heads(model, idx)
        if can_cache(model, idx, use_cache, max_new_tokens):
            size = choose_cache_size(block_size, idx.size(1) + max_new_tokens, static)
            is_kept = graphs is not None and is_unchanged_model
            # autocast forgets its copies of the weights, which a graph would read
            if is_kept and not torch.is_autocast_enabled(idx.device.type):
                key = len(idx), size, options, describe_state(model)
            if key:
                decoder = graphs.pop(key, None)
                graphs.clear()  # one takes enough memory
            if not decoder:
                decoder = Decoder(model, size, static, options)
                if is_unchanged_model and idx.device.type == 'cpu' and not is_watched(model):
                    num_steps = size - idx.size(1)
                    decoder.speed_up(len(idx), packs and num_steps >= MIN_PACKED_TOKENS)
            decoder.cache.length = 0
    # inference mode and CUDA graphs may break a changed model. A graph costs as much as some steps
    mode = torch.inference_mode if is_unchanged_model else torch.no_grad
    makes_graph = is_unchanged_model and idx.is_cuda and max_new_tokens > 16
    idx_next = idx
    try:
        for _ in range(max_new_tokens):
            with mode(), lock:
                if decoder and decoder.is_full(idx_next):
                    keep_graph(decoder, graphs, key)
                    decoder = None  # frees the cache
                    note_once(f'the context of {block_size} tokens is full, so from here on each '
                              'new token computes all of it again, which takes longer')
                if decoder:
                    idx_next = decoder.draw(idx_next, makes_graph)
                else:
                    logits = model(idx)[0][:, -1]
                    if idx_next is idx:  # the prompt
                        check_logits(logits)
                    idx_next = sample(logits, *options)
            idx = torch.cat((idx, idx_next), dim=1)[:, -block_size:]
            yield idx[:, -1:]
    finally:
        keep_graph(decoder, graphs, key)


def describe_state(model):
    """What a CUDA graph of the model has taken over: where its weights are, and plain values."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    weights = tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors)
    values = tuple((id(module), name, value) for module in model.modules()
                   for name, value in vars(module).items() if isinstance(value, (int, float, str)))
    return weights, values, tuple(vars(model.config).items())


def keep_graph(decoder, graphs, key):
    """Puts a decoder with a graph into the dict `graphs`, for the next call with the same key."""
    if key and decoder and decoder.graph:
        graphs.clear()
        graphs[key] = decoder


def check_logits(logits):
    """Raises FloatingPointError if the logits (B, V) aren't finite. It waits for the device."""
    if not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are NaN or infinite")


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
def choose_cache_size(block_size, tokens, static):
    """How many tokens the cache holds. A static one may serve other prompts of a similar length."""
    if static:
        tokens = 256 * math.ceil(tokens / 256)
    return min(block_size, tokens)


def count_cache_bytes(model, prompt_length, max_new_tokens):
    """The bytes of one row's KV cache."""
    c = model.config
    weight = next(model.parameters())
    tokens = choose_cache_size(c.block_size, prompt_length + max_new_tokens, weight.is_cuda)
    itemsize = max(4, weight.itemsize) if weight.device.type == 'cpu' else weight.itemsize
    return 2 * c.n_layer * c.n_embd * tokens * itemsize


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


def pack_linears(model, rows, weights='auto'):
    """Makes a model on a CPU generate `rows` sequences at once faster.

    weights: 'int8', 'int4', or anything else for the format that they have. With int4, the output
    layer and layers that don't fit have 8 bits. Afterwards the model can't be trained or saved.
    """
    model.eval()
    linears = list(list_linears(model))
    while linears:  # a layer that stays in the list would keep its weight
        layers, name, linear = linears.pop()
        layers[name] = pack(linear, name, rows, weights)
    linear = None
    model.requires_grad_(False)  # the weights that are left can't be trained either
    return_freed_memory()


def compile_forward(model):
    """torch.compile() of the forward pass, for generation."""
    # without this torch compiles again for each length of the KV cache
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    compiler.compile_in_place(model)


class Decoder:
    """Draws the next token of every row with a KV cache. On a GPU this step is a CUDA graph.

    The step's hundreds of small kernels are then launched as one. Once the cache's length is 0, the
    graph can be used again, for another batch of the same number of prompts.
    """

    def __init__(self, model, size, static, options):
        self.cached_model = CachedModel(model, size, static)
        self.cache = self.cached_model.cache
        self.options = options  # of sample()
        self.graph = self.token = self.next_token = None

    def speed_up(self, rows, packs):
        """Exchanges parts of an unchanged model on a CPU, and puts them back after each step."""
        model, parts = self.cached_model.model, self.cached_model.parts
        blocks = model.transformer.h._modules
        parts += [(blocks, name, CachedBlock(block)) for name, block in blocks.items()
                  if CachedBlock.fits(block)]
        linears = list(list_linears(model)) if packs else []
        num_bytes = sum(linear.weight.nbytes for _, _, linear in linears)
        if has_room(2 * num_bytes, 'cpu') and not torch.is_autocast_enabled('cpu'):
            parts += [(layers, name, pack(linear, name, rows)) for layers, name, linear in linears]

    def is_full(self, idx_next):
        return self.cached_model.is_full(idx_next.size(1))

    def draw(self, idx_next, makes_graph):
        """The next tokens (B, 1) after the prompt (B, T) or these tokens (B, 1)."""
        if not self.cached_model.is_steady() or not (self.graph or makes_graph):
            logits = self.cached_model(idx_next)[:, -1]
            if self.cache.length == idx_next.size(1):  # the prompt
                check_logits(logits)
            return sample(logits, *self.options)
        with torch.cuda.device(idx_next.device):
            if not self.graph:
                self.capture(idx_next)
            self.token.copy_(idx_next)
            self.graph.replay()
        self.cache.length += 1
        return self.next_token.clone()

    def capture(self, idx_next):
        """Makes the graph of the step from idx_next (B, 1) to the next tokens."""
        cache = self.cache
        length, self.token = cache.length, idx_next.clone()
        recent_idx = cache.recent_idx.clone()
        random_state = torch.cuda.get_rng_state()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            self.draw(self.token, False)  # chooses the kernels and allocates their workspaces
        torch.cuda.current_stream().wait_stream(side_stream)
        torch.cuda.set_rng_state(random_state)  # a seed gives the same text with an earlier graph
        cache.length = length
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.next_token = self.draw(self.token, False)
        self.graph = graph
        cache.length = length  # neither of the two steps counts
        cache.position.fill_(length)
        cache.recent_idx.copy_(recent_idx)
