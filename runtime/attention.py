"""
Causal attention on a CPU, and the random numbers of dropout there.
"""
import math

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime.originals import was_unchanged

MAX_DROPOUT = 0.99  # with a higher rate the bits of draw_numbers() would be too few
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their number of bytes


def draw_numbers(x):
    """For dropout on a CPU: random integers from -2**15 to 2**15 - 1, one for each element of x.

    F.dropout draws one number per element, in 9 ns. Here 64 random bits serve four elements, in
    0.4 ns each. numpy draws them, from a seed that torch draws: torch would take 0.7 ns.
    """
    if type(x) is not torch.Tensor:  # such as a FakeTensor, which has no numbers
        return torch.randint_like(x, -2 ** 15, 2 ** 15, dtype=INTEGERS[x.element_size()])
    numbers = draw_words(math.ceil(x.numel() / 4)).view(torch.int16)
    return numbers[:x.numel()].view(x.size()).to(INTEGERS[x.element_size()])


def draw_words(count):
    """Random integers of 64 bits. runtime/compiler.py excludes this from compiling."""
    seed = torch.randint(2 ** 63 - 1, ()).item()
    generator = np.random.Generator(np.random.SFC64(seed))
    return torch.from_numpy(generator.integers(-2 ** 63, 2 ** 63 - 1, count, endpoint=True))


def drop(x, numbers, p):
    """x with zeros where the number is one of the smallest, which has probability p (to 2**-16).

    threshold_backward(x, numbers, t) is x where a number is above t, and else 0, in one pass. It
    takes x and numbers of one type, so the bits of x are read as integers. A dropped NaN becomes 0.
    """
    num_dropped = round(p * 2 ** 16)
    if num_dropped == 0:
        return x.clone()
    max_dropped = num_dropped - 1 - 2 ** 15
    x_bits = x.view(numbers.dtype)
    return torch.ops.aten.threshold_backward(x_bits, numbers, max_dropped).view(x.dtype)


class DropoutFunction(torch.autograd.Function):
    """x (any shape) after dropout with rate p, by these random numbers."""

    @staticmethod
    def forward(ctx, x, numbers, p):
        ctx.save_for_backward(numbers)
        ctx.p = p
        return drop(x, numbers, p).mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx, grad):
        numbers, = ctx.saved_tensors
        return DropoutFunction.apply(grad, numbers, ctx.p), None, None


def list_parts(T, dtype):
    """The queries that AttentionFunction takes at a time, of T: [(start, stop), ...]."""
    # parts of 32 take 1.1 to 1.2 times as long. In bfloat16, on an AMD, a step of the fast recipe
    # takes 25.3 ms with parts of 64, and 23.8 ms with parts of 128
    size = max(128 if dtype == torch.bfloat16 else 64, T // 8)
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def count_keys(T, dtype):
    """The mean number of keys that AttentionFunction multiplies a query with."""
    return sum((stop - start) * stop for start, stop in list_parts(T, dtype)) // T


class AttentionFunction(torch.autograd.Function):
    """Causal attention of q, k and v, (B, nh, T, hs) each, with this rate of dropout.

    Returns (B, T, nh, hs). It takes some queries at a time, and they need no keys after the last
    one of them. So with many tokens little more than half of the weights (T, T) is computed.
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout_p):
        B, nh, T, hs = q.size()
        ctx.dropout_p = dropout_p
        q, k, v = (z.flatten(0, 1) for z in (q, k, v))  # (B * nh, T, hs)
        q = q * hs ** -0.5
        if dropout_p:
            v = v * (1 / (1 - dropout_p))
        y = q.new_empty(B, T, nh, hs)
        weights, all_numbers = [], []  # for the backward pass
        has_backward = any(ctx.needs_input_grad)
        for start, stop in list_parts(T, q.dtype):
            # (B * nh, stop - start, stop). In bfloat16 bmm takes twice as long without contiguous()
            att = torch.bmm(q[:, start:stop], k[:, :stop].contiguous().mT)
            size = stop - start
            att[:, :, start:] += att.new_full((size, size), -math.inf).triu(1)  # the future
            att = att.softmax(dim=-1)
            if has_backward:
                weights.append(att)
            if dropout_p:
                numbers = draw_numbers(att)
                att = drop(att, numbers, dropout_p)
                if has_backward:
                    all_numbers.append(numbers)
            y[:, start:stop] = torch.bmm(att, v[:, :stop]).view(B, nh, -1, hs).transpose(1, 2)
        ctx.save_for_backward(q, k, v, *weights, *all_numbers)
        return y

    @staticmethod
    def backward(ctx, d_y):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster attention has no second derivative: '
                               'do not call kernels.accelerate() for this')
        q, k, v, *weights = ctx.saved_tensors
        B, T, nh, hs = d_y.size()
        d_y = d_y.transpose(1, 2).flatten(0, 1)
        d_q, d_k, d_v = torch.empty_like(q), None, None
        parts = list_parts(T, q.dtype)
        all_numbers = weights[len(parts):]
        for i, (start, stop) in reversed(list(enumerate(parts))):
            att, part_d_y = weights[i], d_y[:, start:stop]
            d_att = torch.bmm(part_d_y, v[:, :stop].contiguous().mT)
            dropped_att = att
            if ctx.dropout_p:
                d_att = drop(d_att, all_numbers[i], ctx.dropout_p)
                dropped_att = drop(att, all_numbers[i], ctx.dropout_p)
            d_scores = torch._softmax_backward_data(d_att, att, -1, att.dtype)
            d_q[:, start:stop] = torch.bmm(d_scores, k[:, :stop])
            if d_k is None:  # the last queries see all keys
                d_k = torch.bmm(d_scores.mT, q[:, start:stop])
                d_v = torch.bmm(dropped_att.mT, part_d_y)
            else:
                d_k[:, :stop] += torch.bmm(d_scores.mT, q[:, start:stop])
                d_v[:, :stop] += torch.bmm(dropped_att.mT, part_d_y)
        d_q *= hs ** -0.5
        if ctx.dropout_p:
            d_v *= 1 / (1 - ctx.dropout_p)
        d_q, d_k, d_v = (z.view(B, nh, T, hs) for z in (d_q, d_k, d_v))
        return d_q, d_k, d_v, None


class Attention(nn.Module):
    """Causal attention by AttentionFunction, where that is faster on a CPU than torch's.

    F.scaled_dot_product_attention has no fast path there with dropout, and its backward pass is
    slow in bfloat16. In float32 it is faster below 128 tokens, and stores less above 256.
    """

    def __init__(self, attention):
        super().__init__()
        self.plain = attention

    def forward(self, q, k, v, dropout, flash):
        if (flash and type(dropout) is nn.Dropout and was_unchanged(self.plain, 'Attention')
                and not (q.requires_grad and not dropout.training) and is_uniform(q, k, v)):
            dropout_p = dropout.p if dropout.training else 0.0
            if is_faster(q.dtype, q.size(2), dropout_p, has_backward=q.requires_grad):
                return AttentionFunction.apply(q, k, v, dropout_p).transpose(1, 2)
        return self.plain(q, k, v, dropout, flash)


def is_faster(dtype, T, dropout_p, has_backward=True):
    """Whether AttentionFunction is faster on a CPU than torch's attention."""
    if dropout_p:
        return dropout_p <= MAX_DROPOUT
    min_T, max_T = 1, 0
    if has_backward:
        min_T, max_T = {torch.float32: (128, 256), torch.bfloat16: (1, 1024)}.get(dtype, (1, 0))
    elif dtype == torch.bfloat16:  # a prompt of 256 tokens takes 0.66 ms instead of 1.26
        min_T, max_T = 64, 1024
    return min_T <= T <= max_T


def attend(q, k, v):
    """Causal attention (B, nh, T, hs) without dropout and without a backward pass."""
    if is_uniform(q, k, v) and is_faster(q.dtype, q.size(2), 0.0, has_backward=False):
        return AttentionFunction.apply(q, k, v, 0.0).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def is_uniform(q, k, v):
    """Whether queries, keys and values are on a CPU in one shape and the dtype of autocast."""
    dtype = q.dtype
    if torch.is_autocast_enabled('cpu'):
        dtype = torch.get_autocast_dtype('cpu')
    return q.device.type == 'cpu' and q.shape == k.shape == v.shape and all(
        z.dtype == dtype for z in (q, k, v))
