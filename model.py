"""
The GPT-2 model (Radford et al. 2019), in plain PyTorch.

For speed, accelerate() in runtime/kernels.py replaces some of the modules below with faster
ones that compute the same. A module that you change here is never replaced.

Shapes in the comments: B batch, T time, C = n_embd, nh heads, hs = C / nh head size, V vocabulary.
"""
import math
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of a GPT."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for faster matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as in GPT-2; False is better and faster
    gelu: str = 'none'  # F.gelu's approximate=: 'none' is exact, OpenAI trained GPT-2 with 'tanh'
    # newer options, off by default. For a new one add a setting to train.py and bench.py, too
    rope_base: float = 0.0  # base of rotary positions; 0: learned positions
    qk_norm: bool = False  # normalize queries and keys
    relu2: bool = False  # squared ReLU instead of GELU
    tied: bool = True  # the output layer shares its weights with the token embedding
    bigrams: int = 0  # rows of an embedding table for pairs of neighboring tokens; 0: none
    embd_conv: int = 0  # number of previous tokens mixed into each token's embedding; 0: none


def get_option(config, name):
    """A newer option of the config, which may be any object that has nanoGPT's seven fields."""
    return getattr(config, name, getattr(GPTConfig, name))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with nanoGPT's arguments. Ba et al. 2016, https://arxiv.org/abs/1607.06450"""

    def __init__(self, ndim, bias):
        super().__init__(ndim, bias=bias)


class RotaryPositions(nn.Module):
    """Rotates q and k, (B, T, nh, hs), by their positions: https://arxiv.org/abs/2104.09864"""

    def forward(self, q, k, base, start=0):
        T, hs = q.size(1), q.size(3)
        pos = start + torch.arange(T, device=q.device)
        frequencies = base ** (-torch.arange(0, hs, 2, device=q.device) / hs)
        angles = pos[:, None, None].float() * frequencies  # (T, 1, hs / 2)
        cos = angles.cos().repeat(1, 1, 2).type_as(q)  # (T, 1, hs)
        sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).type_as(q)  # faster than float32
        return [torch.addcmul(z * cos, z.roll(hs // 2, dims=-1), sin) for z in (q, k)]


class Attention(nn.Module):
    """Causal attention of queries, keys and values, (B, nh, T, hs) each -> (B, nh, T, hs)."""

    def forward(self, q, k, v, dropout, flash):
        if flash and type(dropout) is nn.Dropout:  # one kernel, which stores no (T, T) matrix
            p = dropout.p if dropout.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        att = q @ k.mT / math.sqrt(k.size(-1))  # (B, nh, T, T)
        future = torch.ones_like(att[0, 0], dtype=torch.bool).triu(1)  # (T, T)
        return dropout(att.masked_fill(future, -math.inf).softmax(dim=-1)) @ v


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention (B, T, C). Vaswani et al. 2017, https://arxiv.org/abs/1706.03762"""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.rope_base = get_option(config, 'rope_base')
        self.qk_norm = get_option(config, 'qk_norm')
        divisor = config.n_head * (2 if self.rope_base else 1)  # rotated numbers come in pairs
        assert config.n_embd % divisor == 0, f'n_embd={config.n_embd} is not divisible by {divisor}'
        self.flash = True  # False: attention written out, which stores a (T, T) matrix
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.rotary = RotaryPositions()
        self.attention = Attention()
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    @property
    def dropout(self):
        return self._modules.get('dropout', self.attn_dropout.p)  # a subclass may have a module

    @dropout.setter
    def dropout(self, p):
        self.attn_dropout.p = p

    def forward(self, x):
        B, T, C = x.size()
        nh, hs = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).view(B, T, 3 * nh, hs).split(nh, dim=2)  # (B, T, nh, hs)
        if self.qk_norm:  # Dehghani et al. 2023, https://arxiv.org/abs/2302.05442
            q, k = F.layer_norm(q, (hs,)), F.layer_norm(k, (hs,))
        if self.rope_base:
            q, k = self.rotary(q, k, self.rope_base)
        # (B, nh, T, hs); the norm may have made q and k float32
        q, k, v = (z.type_as(v).transpose(1, 2) for z in (q, k, v))
        y = self.attention(q, k, v, self.attn_dropout, self.flash)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class SquaredReLU(nn.Module):
    """So et al. 2021, https://arxiv.org/abs/2109.08668"""

    def forward(self, x):
        return F.relu(x).square()


class MLP(nn.Module):
    """Two linear layers and an activation, (B, T, C). GELU: https://arxiv.org/abs/1606.08415"""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        gelu = nn.GELU(approximate=get_option(config, 'gelu'))
        self.gelu = SquaredReLU() if get_option(config, 'relu2') else gelu
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One layer. As in GPT-2 the norms come before attention and MLP."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LossHead(nn.Module):
    """The output layer and the loss: the mean cross-entropy in nats. A target of -1 is ignored."""

    def forward(self, lm_head, x, targets):
        logits = lm_head(x)  # (B, T, V). If you change the logits, change them in GPT.forward, too
        wide_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide_logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


class GPT(nn.Module):
    """Embeddings of tokens and positions, blocks, a last norm, and the output layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name in ('rope_base', 'tied', 'bigrams', 'embd_conv'):
            setattr(self, name, get_option(config, name))
        modules = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
        if not self.rope_base:
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        if self.bigrams:
            modules['bigrams'] = nn.Embedding(self.bigrams, config.n_embd)
        modules['drop'] = nn.Dropout(config.dropout)
        modules['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        modules['ln_f'] = LayerNorm(config.n_embd, config.bias)
        self.transformer = nn.ModuleDict(modules)
        if self.embd_conv:
            self.transformer.conv = nn.Parameter(torch.empty(self.embd_conv, config.n_embd))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_head = LossHead()
        if self.tied:  # Press & Wolf 2016, https://arxiv.org/abs/1608.05859
            self.lm_head.weight = self.transformer.wte.weight
        for name in ('qk_norm', 'relu2'):  # they have no weights, so nanoGPT would ignore them:
            if get_option(config, name):  # it refuses a name in the state dict that it doesn't know
                self.register_buffer(name, torch.ones(()))
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):  # adds to the residual stream: GPT-2 paper, 2.3
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
            elif name == 'transformer.conv':
                nn.init.normal_(p, mean=0.0, std=0.5)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, idx):
        """The embeddings (B, T, C) of token ids idx (B, T), with what the options add to them."""
        x = self.transformer.wte(idx)
        if self.bigrams:  # hashed pairs of tokens, https://arxiv.org/abs/2501.16975
            previous_idx = F.pad(idx, (1, 0), value=-1)[:, :-1]  # -1: no token before the first
            pairs = idx * (self.config.vocab_size + 1) + previous_idx + 1
            x = x + self.transformer.bigrams(pairs % self.bigrams)
        if self.embd_conv:  # a causal convolution for each channel, So et al. 2021
            padded_x = F.pad(x, (0, 0, self.embd_conv, 0))  # (B, embd_conv + T, C)
            for k in range(1, self.embd_conv + 1):  # k tokens ago
                start = self.embd_conv - k
                x = torch.addcmul(x, padded_x[:, start:-k], self.transformer.conv[k - 1])
        return x

    def forward(self, idx, targets=None):
        """Of token ids idx and targets (B, T): the logits (B, T, V) and the loss.

        Without targets: the logits of the last position, (B, 1, V), and None.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f'{T} tokens > block_size={self.config.block_size}'
        x = self.embed(idx)  # (B, T, C)
        if not self.rope_base:
            x = x + self.transformer.wpe(torch.arange(T, device=idx.device))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None  # for sampling; LossHead computes its own logits
        return self.loss_head(self.lm_head, x, targets)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Appends max_new_tokens to each row of idx (B, T); temperature=0 takes the most likely.

        runtime/inference.py does the same faster, with more options, if you don't change this.
        """
        generate = None
        with suppress(ImportError):  # this file works without runtime/, too
            from runtime.inference import can_replace, generate
        if generate and can_replace(GPT.generate):
            return generate(self, idx, max_new_tokens, temperature, top_k, **options)
        if options:
            raise TypeError(f'{sorted(options)} need the generate() of runtime/inference.py')
        if temperature == 0:
            temperature, top_k = 1.0, 1
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            logits = logits[:, -1] / temperature  # (B, V)
            if top_k:
                threshold = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < threshold, -math.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)
        return idx

    def crop_block_size(self, block_size):
        """Shortens the longest context. The positions beyond it are lost."""
        assert block_size <= self.config.block_size, f'{block_size} is not shorter'
        self.config.block_size = block_size
        if 'wpe' in self.transformer:  # a clone: else torch.save writes the whole old table
            table = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe.weight = nn.Parameter(table)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW (https://arxiv.org/abs/1711.05101) that decays only matrices and embeddings."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        fused = device_type in ('cpu', 'cuda', 'mps', 'xpu')  # one kernel for all parameters
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def get_num_params(self, non_embedding=True):
        """The number of parameters. non_embedding leaves out wpe, but not wte."""
        total = sum(p.numel() for p in self.parameters())
        if non_embedding and 'wpe' in self.transformer:
            total -= sum(p.numel() for p in self.transformer.wpe.parameters())
        return total

    def flops_per_token(self):
        """Training FLOPs of a token: PaLM, https://arxiv.org/abs/2204.02311, appendix B."""
        c = self.config
        rows = self.bigrams + (not self.tied) * c.vocab_size  # looked up, not multiplied
        matmuls = 6 * (self.get_num_params() - rows * c.n_embd)
        return matmuls + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilization of fwdbwd_per_iter sequences in dt seconds, of an A100's peak."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / 312e12

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A GPT with the weights of gpt2, gpt2-medium, gpt2-large, gpt2-xl or a saved folder."""
        from runtime import huggingface, restore  # here: all else in this file works without it
        assert huggingface.is_huggingface(model_type), f'{model_type!r} has no weights of a GPT-2'
        assert set(override_args or {}) <= {'dropout'}, 'only dropout can be overridden'
        config_args, weights = huggingface.read_weights(model_type)
        return restore.assemble(cls, GPTConfig(**{**config_args, **(override_args or {})}), weights)
