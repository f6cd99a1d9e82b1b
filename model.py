"""
GPT-2 (Radford et al. 2019), whole: configuration, blocks, loss, generation, optimizer, and the import of its weights.

Shapes in the comments at line ends: B batch, T time, C = n_embd, nh heads, hs = C / nh head size, V vocabulary.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64: matmuls like it
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as GPT-2 has them; False is a little better and faster
    gelu: str = 'none'  # F.gelu's approximate=: 'none' is exact, OpenAI trained GPT-2 with 'tanh'

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention over the past, (B, T, C) -> (B, T, C). Vaswani et al. 2017, https://arxiv.org/abs/1706.03762"""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, kv_cache=None, layer=0):
        B, T, C = x.size()
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for z in self.c_attn(x).split(C, dim=2))
        if kv_cache is not None:
            k, v = kv_cache.extend(layer, k, v)  # (B, nh, past + T, hs)
        # a single new token may look at everything in the cache: it needs no mask
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two Linears with a GELU between, (B, T, C) -> (B, T, C). GELU: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, 4C) inside


class Block(nn.Module):
    """One layer, with its norms before attention and MLP, as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, kv_cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), kv_cache, layer)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """The keys and values of the `length` tokens seen so far, in buffers that hold `size` tokens, a pair a layer.

    The prompt goes in at once (prefill), then one token a step (decode).
    """

    def __init__(self, n_layer, size):
        self.size, self.length = size, 0
        self.buffers = [None] * n_layer  # (2, B, nh, size, hs) each

    def extend(self, layer, k, v):
        """Appends k and v (B, nh, T, hs) of one layer; returns all it holds of that layer, (B, nh, length + T, hs) each."""
        assert self.length == 0 or k.size(2) == 1, 'after the prompt, the cache takes one token a step'
        if self.buffers[layer] is None:  # made here, where batch, type and device are known
            B, nh, _, hs = k.size()
            self.buffers[layer] = k.new_empty(2, B, nh, self.size, hs)
        end = self.length + k.size(2)
        self.buffers[layer][0, :, :, self.length:end] = k
        self.buffers[layer][1, :, :, self.length:end] = v
        return self.buffers[layer][:, :, :, :end]


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # what feeds the residual stream: smaller the deeper, GPT-2 paper, 2.3
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def tie_weights(self):
        """Makes the output layer the embedding's transpose, one tensor: Press & Wolf 2016, https://arxiv.org/abs/1608.05859"""
        self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, kv_cache=None):
        """Logits and loss of token ids idx (B, T).

        With targets (B, T): logits (B, T, V) and the mean cross-entropy in nats, a target of -1 ignored. Without:
        logits of the last position alone, (B, 1, V), and None. With a kv_cache, idx continues what the cache holds.
        """
        B, T = idx.size()
        past = kv_cache.length if kv_cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} tokens are more than block_size={self.config.block_size}')
        pos = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, kv_cache, layer)
        if kv_cache is not None:
            kv_cache.length += T
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, [-1]])), None  # (B, 1, V): a list index keeps the dimension
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Yields max_new_tokens times the next token of every row of the prompt idx (B, T), as ids (B, 1).

        temperature 0 takes the likeliest token; top_k keeps that many candidates, top_p the smallest set that holds
        that much probability (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751), None or 0 keeps all; ids from
        vocab_size on are never drawn (the rows that pad the embedding). The model sees the last block_size tokens.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        kv_cache = KVCache(self.config.n_layer, min(block_size, idx.size(1) + max_new_tokens))
        new = idx
        for _ in range(max_new_tokens):
            with torch.no_grad():
                # once the context is full every token moves to another position, and all keys and values change:
                # learned positions leave nothing to reuse
                if kv_cache is not None and kv_cache.length + new.size(1) > block_size:
                    kv_cache = None
                logits, _ = self(new if kv_cache is not None else idx, kv_cache=kv_cache)
                new = sample(logits[:, -1], temperature, top_k, top_p, vocab_size)
            idx = torch.cat((idx, new), dim=1)[:, -block_size:]
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Continues every row of the prompt idx (B, T): (B, T + max_new_tokens). Arguments as in stream()."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, top_p, vocab_size)), dim=1)

    def crop_block_size(self, block_size):
        """Shortens the longest context; the positions beyond it are forgotten."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is larger than the model\'s {self.config.block_size}')
        self.config.block_size = block_size
        # a copy: a view would keep, and torch.save would write, the whole table
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101) that decays matrices and embeddings only.

        The order of groups and parameters is nanoGPT's, so that optimizer states can be exchanged with it.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]  # biases and norms
        # one kernel for all parameters where there is one
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps', 'xpu'))

    def get_num_params(self, non_embedding=True):
        """Number of parameters; position embeddings are left out, token embeddings stay as they are the output layer too."""
        return sum(p.numel() for p in self.parameters()) - non_embedding * self.transformer.wpe.weight.numel()

    def flops_per_token(self):
        """FLOPs of one token's forward and backward pass: PaLM's 6N + 12LHQT, https://arxiv.org/abs/2204.02311, appendix B."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilization: the FLOPs of fwdbwd_per_iter sequences in dt seconds as a share of the device's peak.

        None where the peak of the device isn't known.
        """
        device = self.lm_head.weight.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == 'cuda' else None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak if peak else None

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT with the weights of a Hugging Face GPT-2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a local folder.

        override_args may set {'dropout': p}. Fails with one line if the weights can't be had or are no GPT-2.
        """
        if set(override_args or ()) - {'dropout'}:
            raise ValueError(f'only dropout can be overridden, not {sorted(set(override_args) - {"dropout"})}')
        from convert import read_hf  # here: convert.py imports this file
        config_args, state_dict = read_hf(model_type)
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
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # what is likelier already holds top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    # the first of independent exponential clocks of rate p rings with probability p; torch.multinomial would make a
    # GPU wait for the host
    probs = logits.softmax(dim=-1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1, keepdim=True)


# dense matmul rate with 16-bit inputs and float32 accumulation, FLOP/s, from the makers' datasheets; the first whose
# words are all among those of the device's name counts
PEAK_FLOPS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 NVL': 835e12, 'H100 PCIe': 756e12, 'H100': 989e12,
    'A100': 312e12, 'A30': 165e12, 'A40': 150e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12, 'L40': 181e12,
    'L4': 121e12, 'V100': 125e12, 'T4': 65e12, 'RTX A6000': 155e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
}


def peak_flops(name):
    """FLOP/s that a GPU of this name can do in 16-bit numbers, or None if it isn't in the table."""
    words = re.findall(r'\w+', name)
    if 'Laptop' in words or 'MIG' in words:  # slower under the same name
        return None
    return next((flops for key, flops in PEAK_FLOPS.items() if set(key.split()) <= set(words)), None)
