"""
GPT-2 (Radford et al. 2019), whole: configuration, blocks, loss, generation, optimizer, and the import of its weights.

Shapes in the comments at line ends: B batch, T time, C = n_embd, nh heads, hs = C / nh head size, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a GPT; ValueError where that is none."""
    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64: matmuls like it
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as GPT-2 has them; False is a little better and faster
    gelu: str = 'none'  # F.gelu's approximate=: 'none' is exact, OpenAI trained GPT-2 with 'tanh'
    # what the field has learned since; by default all of it is off
    rope_base: float = 0.0  # rotary positions with this base; 0 is learned ones
    qk_norm: bool = False  # normalise queries and keys
    relu2: bool = False  # squared ReLU instead of GELU
    tied: bool = True  # the output layer is the token embedding once more
    bigrams: int = 0  # rows of a table of embeddings for pairs of neighbouring tokens
    embd_conv: int = 0  # how many tokens before it add to a token's embedding

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        if self.rope_base < 0 or self.rope_base and self.n_embd // self.n_head % 2:
            raise ValueError(f'rope_base={self.rope_base} needs to be positive, and heads of an even size')


def kept(x, p):
    """Which elements of x, on a CPU, dropout keeps: 1, or at probability p, to 2**-16, 0, in the type of x."""
    # F.dropout draws its numbers one by one there, at 9 ns an element; one draw of 64 bits serves four, at 1 ns
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)[:x.numel()]
    return (bits.view(x.size()) >= round(p * 2 ** 16) - 2 ** 15).to(x.dtype)


class Dropout(nn.Module):
    """Zeroes elements at probability p and scales the rest by 1 / (1 - p), while training. Srivastava et al. 2014."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if x.device.type != 'cpu' or not self.training or not self.p:
            return F.dropout(x, self.p, self.training)
        return x * kept(x, self.p) * (1 / (1 - self.p))


def rotary(pos, hs, base):
    """Cosines and signed sines of the angles by which positions pos (T,) turn a head's hs channels, (T, 1, hs) each."""
    angles = pos[:, None, None].float() * base ** (-torch.arange(0, hs, 2, device=pos.device) / hs)  # (T, 1, hs / 2)
    return angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x, cos, sin):
    """RoPE of x (B, T, heads, hs), channel i turned together with channel i + hs / 2. Su et al. 2021, https://arxiv.org/abs/2104.09864"""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def attention(q, k, v, dropout_p=0.0, mask=None):
    """Causal attention, (B, nh, T, hs) each -> (B, nh, T, hs); a single query sees all of k and v, or what mask marks."""
    shape, T, hs = q.size(), q.size(2), q.size(3)
    # on CPUs F.scaled_dot_product_attention has no fast path with dropout (T=256, forward and backward: 436 ms against
    # 228), and is slow in bfloat16 (T=64: 2.9 ms against 0.4, T=1024: 135 against 84), but for the memory of (T, T)
    slow = mask is None and (dropout_p or T <= 1024 and q.dtype == torch.bfloat16 and q.requires_grad)
    if q.device.type != 'cpu' or not slow:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=T > 1)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    q, k, v = (z.flatten(0, 1) for z in (q, k, v))
    att = torch.baddbmm(future, q, k.transpose(1, 2), alpha=hs ** -0.5).softmax(dim=-1)  # (B * nh, T, T)
    if dropout_p:
        att, v = att * kept(att, dropout_p), v * (1 / (1 - dropout_p))
    return torch.bmm(att, v).view(shape)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention over the past, (B, T, C) -> (B, T, C). Vaswani et al. 2017, https://arxiv.org/abs/1706.03762"""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head, self.qk_norm = config.n_head, config.qk_norm

    def forward(self, x, turn=None, kv_cache=None, layer=0):
        B, T, C = x.size()
        nh, hs = self.n_head, C // self.n_head
        qk, v = self.c_attn(x).view(B, T, 3 * nh, hs).split((2 * nh, nh), dim=2)
        if self.qk_norm:  # Dehghani et al. 2023, https://arxiv.org/abs/2302.05442
            qk = F.layer_norm(qk, (hs,))
        if turn is not None:
            qk = rotate(qk, *turn)
        q, k, v = *qk.type_as(v).transpose(1, 2).chunk(2, dim=1), v.transpose(1, 2)  # (B, nh, T, hs)
        mask = None
        if kv_cache is not None:
            k, v, mask = kv_cache.extend(layer, k, v)  # (B, nh, past + T, hs)
        y = attention(q, k, v, self.resid_dropout.p if self.training else 0.0, mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class SquaredReLU(torch.autograd.Function):
    """F.relu(x).square(), and in the backward pass two passes over the tensor instead of four. So et al. 2021, https://arxiv.org/abs/2109.08668"""

    @staticmethod
    def forward(ctx, x):
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


class MLP(nn.Module):
    """Two Linears with a GELU between, (B, T, C) -> (B, T, C). GELU: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu, self.relu2 = nn.GELU(approximate=config.gelu), config.relu2
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = SquaredReLU.apply(x) if self.relu2 else self.gelu(x)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One layer, with its norms before attention and MLP, as in GPT-2."""
    recompute = False  # in the backward pass, instead of keeping what is in the layer: Chen et al. 2016, https://arxiv.org/abs/1604.06174

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, turn=None, kv_cache=None, layer=0):
        if self.recompute and self.training:
            return checkpoint(self.layer, x, turn, use_reentrant=False)
        return self.layer(x, turn, kv_cache, layer)

    def layer(self, x, turn=None, kv_cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), turn, kv_cache, layer)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """The keys and values of the `length` tokens seen so far, in buffers that hold `size` tokens, a pair a layer.

    The prompt goes in at once (prefill), then one token a step (decode). A static cache keeps all shapes the same from
    step to step and its place in a tensor, so that a step can be replayed as a CUDA graph.
    """

    def __init__(self, n_layer, size, static=False):
        self.size, self.length, self.static = size, 0, static
        self.buffers = [None] * n_layer  # (2, B, nh, size, hs) each
        self.position = self.mask = None  # of a static cache: (1,), the next token's, and (1, size), what it sees
        self.recent = None  # the last token ids, (B, n), where the embedding looks at them

    def positions(self, T, device):
        """The positions of the next T tokens, (T,)."""
        assert self.length == 0 or T == 1, 'after the prompt, the cache takes one token a step'
        if self.static and self.length:
            self.mask = torch.arange(self.size, device=device)[None] <= self.position
            return self.position
        if self.length == 0:
            self.position = torch.zeros(1, dtype=torch.long, device=device)
        return torch.arange(self.length, self.length + T, device=device)

    def extend(self, layer, k, v):
        """Appends k and v (B, nh, T, hs) of one layer; returns all that these tokens see, (B, nh, length + T, hs) each, and a mask."""
        if self.buffers[layer] is None:  # made here, where batch, type and device are known
            B, nh, _, hs = k.size()
            self.buffers[layer] = k.new_zeros(2, B, nh, self.size, hs)  # what is masked counts 0 times, but not if it is nan
        # once it is full, which rotary positions alone allow, a token takes the place of the one `size` before it
        if self.static and self.length:
            return *self.buffers[layer].index_copy_(3, self.position % self.size, torch.stack((k, v))), self.mask
        start, end = self.length % self.size, self.length + k.size(2)
        self.buffers[layer][0, :, :, start:start + k.size(2)] = k
        self.buffers[layer][1, :, :, start:start + k.size(2)] = v
        return *self.buffers[layer][:, :, :, :end], None

    def with_recent(self, idx, n):
        """Token ids idx (B, T) and the n before them, -1 where there is none: (B, n + T)."""
        if self.recent is None:
            self.recent = idx.new_full((len(idx), n), -1)
        ids = torch.cat((self.recent, idx), dim=1)
        self.recent.copy_(ids[:, -n:])
        return ids

    def advance(self, T):
        """Once all layers are extended."""
        self.length += T
        self.position += T


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1) of x (N, C), weight (V, C), targets (N), in float32.

    The gradients are made on the way, some rows at a time, so that the logits (N, V) never exist as a whole: they
    would be the largest tensor of all, and several passes over it. After Hsu et al. 2024,
    https://arxiv.org/abs/2410.10989. F.linear_cross_entropy (torch 2.13) does the same in twice the time, with a loss
    rounded to bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, training):
        count, loss = (targets != -1).sum(), x.new_zeros((), dtype=torch.float32)
        w, (dx, dw) = weight.to(dtype), (torch.zeros_like(z) if training else None for z in (x, weight))
        rows = max(1, 2 ** 25 // len(weight))
        for i in range(0, len(x), rows):
            x_i, t = x[i:i + rows].to(dtype), targets[i:i + rows, None]
            counts, t = t != -1, t.masked_fill(t == -1, 0)
            logits = (x_i @ w.t()).float()  # (rows, V)
            probs = logits.softmax(dim=-1)
            # logsumexp by the likeliest, whose probability doesn't underflow: spares a second exp of all
            lse = logits.amax(dim=-1, keepdim=True) - probs.amax(dim=-1, keepdim=True).log()
            loss += (lse - logits.gather(1, t)).masked_fill(~counts, 0.0).sum()
            if training:  # the logits' gradient: their softmax, less 1 at the target
                d = probs.scatter_add_(1, t, -torch.ones_like(t, dtype=torch.float32))
                d = d.mul_(counts).to(dtype)
                dx[i:i + rows] = d @ w
                dw += d.t() @ x_i
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        return dx * (grad / count), dw * (grad / count), None, None, None


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU, (rows, K) -> (rows, N), with its weight in the blocks that oneDNN multiplies fastest."""

    def __init__(self, linear, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class GPT(nn.Module):
    """Embeddings of tokens and positions, blocks, a last norm, and an output layer: the token embedding once more, if it is tied."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if not config.rope_base:
            modules.update(wpe=nn.Embedding(config.block_size, config.n_embd))
        if config.bigrams:
            modules.update(bigrams=nn.Embedding(config.bigrams, config.n_embd))
        modules.update(drop=Dropout(config.dropout), h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                       ln_f=nn.LayerNorm(config.n_embd, bias=config.bias))
        self.transformer = nn.ModuleDict(modules)
        if config.embd_conv:
            self.transformer.conv = nn.Parameter(torch.empty(config.embd_conv, config.n_embd))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # what feeds the residual stream: smaller the deeper, GPT-2 paper, 2.3
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name == 'transformer.conv':
                nn.init.normal_(p, mean=0.0, std=0.5)

    def tie_weights(self):
        """Makes the output layer the embedding's transpose, one tensor: Press & Wolf 2016, https://arxiv.org/abs/1608.05859"""
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, idx, kv_cache=None):
        """Embeddings (B, T, C) of token ids idx (B, T), with what the few tokens before each add.

        A pair of tokens has an embedding of its own, hashed if there are more pairs than rows: Huang et al. 2025,
        https://arxiv.org/abs/2501.16975. A convolution over time, one for each channel, follows: So et al. 2021.
        """
        n, T, rows = self.config.embd_conv, idx.size(1), self.config.bigrams
        before = n + (rows > 0)
        if not before:
            return self.transformer.wte(idx)
        ids = F.pad(idx, (before, 0), value=-1) if kv_cache is None else kv_cache.with_recent(idx, before)
        x = self.transformer.wte(ids.clamp(min=0))
        if rows:
            pairs = ids[:, 1:] * (self.config.vocab_size + 1) + ids[:, :-1] + 1
            x, ids = x[:, 1:] + self.transformer.bigrams(pairs % rows), ids[:, 1:]
        x = x.masked_fill((ids < 0)[:, :, None], 0.0)  # nothing comes before the first token
        y = x[:, n:]
        for k in range(1, n + 1):
            y = torch.addcmul(y, x[:, n - k:n - k + T], self.transformer.conv[k - 1])
        return y

    def forward(self, idx, targets=None, kv_cache=None, return_logits=True):
        """Logits and loss of token ids idx (B, T).

        With targets (B, T): logits (B, T, V) and the mean cross-entropy in nats, a target of -1 ignored. Without:
        logits of the last position alone, (B, 1, V), and None. With a kv_cache, idx continues what the cache holds.
        return_logits=False gives None and the loss, which takes less time and memory.
        """
        B, T = idx.size()
        past = kv_cache.length if kv_cache is not None else 0
        c = self.config
        if past + T > c.block_size and not (c.rope_base and T == 1):  # the cache's last block_size tokens are what it sees then
            raise ValueError(f'{past + T} tokens are more than block_size={c.block_size}')
        pos = torch.arange(T, device=idx.device) if kv_cache is None else kv_cache.positions(T, idx.device)
        x, turn = self.embed(idx, kv_cache), None  # (B, T, C)
        if c.rope_base:
            turn = rotary(pos, c.n_embd // c.n_head, c.rope_base)
        else:
            x = x + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        if x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            x = x.to(torch.get_autocast_dtype('cpu'))  # the residual stream: less to cast and to move, 2 to 9% of a step
        for layer, block in enumerate(self.transformer.h):
            x = block(x, turn, kv_cache, layer)
        if kv_cache is not None:
            kv_cache.advance(T)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, [-1]])), None  # (B, 1, V): a list index keeps the dimension
        x = self.transformer.ln_f(x)
        if not return_logits and not torch.compiler.is_compiling():  # the compiler fuses the loss by itself
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            # small logits cost less as a whole; in float16 gradients made before the loss is scaled would vanish
            if targets.numel() * c.vocab_size > 2 ** 22 and dtype != torch.float16:
                return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype, torch.is_grad_enabled())
        logits = self.lm_head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits if return_logits else None, loss

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Yields max_new_tokens times the next token of every row of the prompt idx (B, T), as ids (B, 1).

        temperature 0 takes the likeliest token; top_k keeps that many candidates, top_p the smallest set that holds
        that much probability (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751), None or 0 keeps all; ids from
        vocab_size on are never drawn (the rows that pad the embedding). The model sees the last block_size tokens.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        kv_cache = KVCache(self.config.n_layer, min(block_size, idx.size(1) + max_new_tokens), static=idx.is_cuda)

        def step(new):
            return sample(self(new, kv_cache=kv_cache)[0][:, -1], temperature, top_k, top_p, vocab_size)

        new, decode = idx, step
        for n in range(max_new_tokens):
            with torch.no_grad():
                if kv_cache is not None and kv_cache.length + new.size(1) > block_size and not self.config.rope_base:
                    # once the context is full every token moves to another position, and all keys and values change:
                    # learned positions leave nothing to reuse, rotary ones go on
                    kv_cache, decode = None, step
                elif n == 1 and idx.is_cuda and max_new_tokens > 16:  # fewer don't pay for making the graph
                    decode = cuda_graph(step, new, kv_cache)
                new = decode(new if kv_cache is not None else idx)
            idx = torch.cat((idx, new), dim=1)[:, -block_size:]
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Continues every row of the prompt idx (B, T): (B, T + max_new_tokens). Arguments as in stream()."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p, vocab_size)), dim=1)

    def pack_weights(self, rows):
        """Readies a model on a CPU for generating `rows` sequences at once; it can't be trained or saved any more.

        A token takes 16 ms instead of 22 at 124M in bfloat16, ten rows 33 instead of 43, in float32 37 instead of 69.
        """
        if not torch.backends.mkldnn.is_available():
            return
        if self.lm_head.weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return
        for module in [m for m in self.modules() if not isinstance(m, nn.Linear)]:  # a list of all would hold every weight twice
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child, rows))

    def crop_block_size(self, block_size):
        """Shortens the longest context; the positions beyond it are forgotten."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is larger than the model\'s {self.config.block_size}')
        self.config.block_size = block_size
        if self.config.rope_base:
            return
        # a copy: a view would keep, and torch.save would write, the whole table
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, moments_dtype='float32', optim='adamw', momentum=0.95):
        """AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101) that decays matrices and embeddings only.

        The order of groups and parameters is nanoGPT's, so that optimizer states can be exchanged with it. With
        optim='muon' the blocks' matrices have a third group, with that momentum.
        """
        from optimizers import AdamW, LowMemoryAdamW, Muon  # here: optimizers.py needs torch.distributed, which sampling doesn't
        params = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in self.transformer.h.parameters() if p.dim() >= 2] if optim == 'muon' else []
        others = set(params) - set(matrices)
        groups = [{'params': [p for p in params if p.dim() >= 2 and p in others], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]  # biases and norms
        if matrices:
            groups.append({'params': matrices, 'weight_decay': weight_decay, 'momentum': momentum})
        kind = Muon if matrices else LowMemoryAdamW if moments_dtype == 'bfloat16' else AdamW
        # one kernel for all parameters where there is one
        return kind(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps', 'xpu'))

    def get_num_params(self, non_embedding=True):
        """Number of parameters; position embeddings are left out, token embeddings stay, as GPT-2 has them for the output layer too."""
        positions = 0 if self.config.rope_base else self.transformer.wpe.weight.numel()
        return sum(p.numel() for p in self.parameters()) - non_embedding * positions

    def flops_per_token(self):
        """FLOPs of one token's forward and backward pass: PaLM's 6N + 12LHQT, https://arxiv.org/abs/2204.02311, appendix B."""
        c = self.config
        matmuls = self.get_num_params() - (c.bigrams + (not c.tied) * c.vocab_size) * c.n_embd  # but for tables of which rows are read
        return 6 * matmuls + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilization: the FLOPs of fwdbwd_per_iter sequences in dt seconds as a share of the device's peak.

        None where the peak of the device isn't known.
        """
        from checks import peak_flops
        device = self.lm_head.weight.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == 'cuda' else None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak if peak else None

    @classmethod
    def from_pretrained(cls, model_type, override_args=None, dtype=torch.float32):
        """A GPT with the weights of a Hugging Face GPT-2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a local folder.

        override_args may set {'dropout': p}. Fails with one line if the weights can't be had or are no GPT-2.
        """
        if set(override_args or ()) - {'dropout'}:
            raise ValueError(f'only dropout can be overridden, not {sorted(set(override_args) - {"dropout"})}')
        from convert import read_hf  # here: convert.py imports this file
        config_args, state_dict = read_hf(model_type, dtype)
        return cls.from_state_dict(GPTConfig(**config_args, **(override_args or {})), state_dict)

    @classmethod
    def from_state_dict(cls, config, state_dict):
        """A GPT around the given tensors, which become its weights without a copy."""
        model = cls.on_meta(config)
        model.load_state_dict(state_dict, assign=True)
        model.tie_weights()
        return model

    @classmethod
    def on_meta(cls, config):
        """A GPT of shapes alone: nothing is allocated, or initialised only to be overwritten."""
        with torch.device('meta'), _NoInit():
            return cls(config)


class _NoInit(TorchFunctionMode):
    """Passes over nn.init: on tensors without data it does nothing but import torch._dynamo, for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return (kwargs or {}).get('tensor', args[0] if args else None)
        return func(*args, **(kwargs or {}))


def sample(logits, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """Draws a token id (B, 1) from each row of logits (B, V); the arguments are those of GPT.stream()."""
    logits = logits[:, :vocab_size].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None  # of the candidates, likeliest first
    if top_k or top_p:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probs = (logits / temperature).softmax(dim=-1)
    if top_p:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)  # what is likelier already holds top_p
    # the first of independent exponential clocks of rate p rings with probability p; torch.multinomial would make a
    # GPU wait for the host
    choice = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)
    return choice if ids is None else ids.gather(-1, choice)


def cuda_graph(step, new, kv_cache):
    """step, which makes of a token (B, 1) the next one, as a graph: its hundreds of small kernels are launched as one."""
    length, given, recent = kv_cache.length, new.clone(), None if kv_cache.recent is None else kv_cache.recent.clone()
    with torch.cuda.device(new.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(given)  # chooses the kernels, and gets them their workspaces
        torch.cuda.current_stream().wait_stream(side)
        kv_cache.length = length
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step(given)
    kv_cache.length = length
    kv_cache.position.fill_(length)  # neither of the two steps counts
    if recent is not None:
        kv_cache.recent.copy_(recent)

    def replay(new):
        with torch.cuda.device(new.device):
            given.copy_(new)
            graph.replay()
        kv_cache.length += 1
        return made.clone()

    return replay
