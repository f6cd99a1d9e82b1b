"""
Causal attention for training on a CPU, and the random numbers of dropout there.
"""
import math

import torch
import torch.nn as nn

from runtime.originals import was_unchanged

MAX_DROPOUT = 0.99  # with a higher rate the bits of draw_mask() would be too few


def draw_mask(x, p):
    """For dropout on a CPU: 0 with probability p (to 2**-16), else 1, in the shape and type of x.

    F.dropout draws one number per element, in 9 ns. Here 64 random bits serve four elements, in
    1 ns each.
    """
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None)
    numbers = bits.view(torch.int16)[:x.numel()].view(x.size())  # -2**15 to 2**15 - 1
    return (numbers >= round(p * 2 ** 16) - 2 ** 15).to(x.dtype)


class AttentionFunction(torch.autograd.Function):
    """Causal attention of q, k and v, (n, T, hs) each, with dropout of the weights.

    It takes some queries at a time. They need no keys after the last one of them, so little more
    than half of the weights (T, T) is computed and stored.
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout_p):
        B, nh, T, hs = q.size()
        ctx.num_queries = max(64, T // 8)  # fewer are slower: 32 take 1.1 to 1.2 times as long
        ctx.dropout_p = dropout_p
        q, k, v = (z.flatten(0, 1) for z in (q, k, v))  # (B * nh, T, hs)
        q = q * hs ** -0.5
        if dropout_p:
            v = v * (1 / (1 - dropout_p))
        y = q.new_empty(B, T, nh, hs).transpose(1, 2)
        future = q.new_full((ctx.num_queries, ctx.num_queries), -math.inf).triu(1)
        weights = []  # for each part of the queries, and with dropout the mask after them
        for start in range(0, T, ctx.num_queries):
            stop = min(start + ctx.num_queries, T)
            att = torch.bmm(q[:, start:stop], k[:, :stop].mT)  # (B * nh, num_queries, stop)
            att[:, :, start:] += future[:stop - start, :stop - start]
            att = att.softmax(dim=-1)
            weights.append(att)
            if dropout_p:
                weights.append(draw_mask(att, dropout_p))
                att = att * weights[-1]
            y[:, :, start:stop] = torch.bmm(att, v[:, :stop]).view(B, nh, -1, hs)
        ctx.save_for_backward(q, k, v, *weights)
        return y

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster attention has no second derivative: '
                               'do not call kernels.accelerate() for this')
        q, k, v, *weights = ctx.saved_tensors
        shape, grad = grad.size(), grad.flatten(0, 1)
        T, hs = q.size()[1:]
        d_q, d_k, d_v = torch.empty_like(q), None, None
        for start in reversed(range(0, T, ctx.num_queries)):
            stop = min(start + ctx.num_queries, T)
            mask = weights.pop() if ctx.dropout_p else None
            att, y_grad = weights.pop(), grad[:, start:stop]
            d_att = torch.bmm(y_grad, v[:, :stop].mT)
            if mask is None:
                d_v_part = torch.bmm(att.mT, y_grad)
            else:
                d_v_part = torch.bmm((att * mask).mT, y_grad)
                d_att *= mask
            d_scores = torch._softmax_backward_data(d_att, att, -1, att.dtype)
            d_q[:, start:stop] = torch.bmm(d_scores, k[:, :stop])
            d_k_part = torch.bmm(d_scores.mT, q[:, start:stop])
            if d_k is None:  # the last queries see all keys
                d_k, d_v = d_k_part, d_v_part
            else:
                d_k[:, :stop] += d_k_part
                d_v[:, :stop] += d_v_part
        d_q *= hs ** -0.5
        if ctx.dropout_p:
            d_v *= 1 / (1 - ctx.dropout_p)
        return d_q.view(shape), d_k.view(shape), d_v.view(shape), None


class Attention(nn.Module):
    """Causal attention by AttentionFunction, where that is faster on a CPU than torch's.

    F.scaled_dot_product_attention has no fast path there with dropout, and its backward pass is
    slow in bfloat16. In float32 it is faster only with many tokens, where it stores less, too.
    """

    def __init__(self, attention):
        super().__init__()
        self.plain = attention

    def forward(self, q, k, v, dropout, flash):
        B, nh, T, hs = q.size()
        is_known = flash and type(dropout) is nn.Dropout and q.shape == k.shape == v.shape
        dropout_p = dropout.p if is_known and dropout.training else 0.0
        is_known = is_known and dropout_p <= MAX_DROPOUT
        is_slow = dropout_p or q.requires_grad and (
            q.dtype == torch.bfloat16 and T <= 1024 or q.dtype == torch.float32 and 128 <= T <= 256)
        if (q.device.type != 'cpu' or not is_slow or not is_known
                or not was_unchanged(self.plain, 'Attention')):
            return self.plain(q, k, v, dropout, flash)
        return AttentionFunction.apply(q, k, v, dropout_p)
