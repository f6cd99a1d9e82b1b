"""
Faster forms of parts of the model, with the same meaning, and accelerate(), which installs them.

A part is replaced only if it is exactly the one that its fast form was written for. A part that was
edited, patched, subclassed or hooked runs as it is written.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime.console import note
from runtime.originals import has_global_hook, is_torchs, is_unchanged

# where model.py has a part with a faster form, by the name of the attribute
PLACES = {'loss_head': 'LossHead', 'attention': 'Attention'}


def accelerate(model, device_type, dtype):
    """Installs the faster forms of the model's parts for training or sampling on this device.

    It prints one line that names the parts that were changed and therefore stay as they are. On
    CUDA torch.compile does most of this work.
    """
    fast_forms = {'LossHead': LossHead}
    if device_type == 'cpu':
        fast_forms.update(Dropout=Dropout, Attention=Attention, SquaredReLU=SquaredReLU)
    edited_names = set()
    if not is_unchanged(model, 'GPT'):
        edited_names.add(type(model).__name__)
    places = [(parent, name, part) for parent in model.modules() if not is_fast(parent)
              for name, part in parent.named_children() if not is_fast(part)]
    parts = [part for _, _, part in places]
    for parent, name, part in places:
        base_names = [base.__name__ for base in type(part).__mro__]
        kind = next((base for base in base_names if base in fast_forms), PLACES.get(name))
        if name == 'attn' and not hasattr(part, 'attention') and 'Attention' in fast_forms:
            edited_names.add(type(part).__name__)
        if kind not in fast_forms or name == 'attn_dropout':  # only its rate is used
            continue
        if is_unchanged(part, kind) and parts.count(part) == 1:
            setattr(parent, name, fast_forms[kind](part).train(part.training))
        else:
            edited_names.add(type(part).__name__)
    if device_type == 'cpu' and dtype == 'bfloat16' and is_unchanged(model, 'GPT'):
        drop = model.transformer.drop
        if type(drop) is Dropout:
            model.transformer.drop = EmbeddingDropout(drop).train(drop.training)
    if edited_names:
        note('changed parts of the model run as they are written, so they may be slower and take '
             'more memory: ' + ', '.join(sorted(edited_names)))


def was_unchanged(part, kind):
    """is_unchanged() for a part that was replaced: somebody may have changed its class since."""
    return torch.compiler.is_compiling() or is_unchanged(part, kind)


def is_fast(module):
    """Whether the module is a faster form of a part of the model, here or in inference.py."""
    return type(module).__module__ in (__name__, 'runtime.inference')


@contextlib.contextmanager
def loss_only(model):
    """In this context model(idx, targets) gives None for the logits, which take much memory.

    If the loss or the forward pass of the model was changed, there are logits nevertheless.
    """
    can_skip = not stores_logits(model)
    if can_skip:
        model.loss_head.gives_logits = False
    try:
        yield
    finally:
        if can_skip:
            model.loss_head.gives_logits = True


def stores_logits(model):
    """Whether the model computes its loss from all logits, because somebody has changed it."""
    loss_head = getattr(model, 'loss_head', None)
    return not isinstance(loss_head, LossHead) or not is_unchanged(model, 'GPT')


# -----------------------------------------------------------------------------
# parts of the model
def draw_mask(x, p):
    """For dropout on a CPU: 0 with probability p (to 2**-16), else 1, in the shape and type of x.

    F.dropout draws one number per element, in 9 ns. Here 64 random bits serve four elements, in
    1 ns each.
    """
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-2 ** 63, None)
    numbers = bits.view(torch.int16)[:x.numel()].view(x.size())  # -2**15 to 2**15 - 1
    return (numbers >= round(p * 2 ** 16) - 2 ** 15).to(x.dtype)


class Dropout(nn.Dropout):
    """nn.Dropout, with fewer random bits on a CPU. Srivastava et al. 2014"""

    def __init__(self, dropout):
        super().__init__(dropout.p)

    def forward(self, x):
        draws = x.device.type == 'cpu' and self.training and self.p
        if not draws or not (torch.compiler.is_compiling()
                             or is_torchs(nn.Dropout.forward) and is_torchs(F.dropout)):
            return super().forward(x)
        return x * draw_mask(x, self.p) * (1 / (1 - self.p))


class EmbeddingDropout(Dropout):
    """The last part before the blocks: under autocast it makes the residual stream 16 bits wide.

    Then less must be cast and moved: 2 to 9% of a step on a CPU.
    """

    def forward(self, x):
        x = super().forward(x)
        if x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            x = x.to(torch.get_autocast_dtype('cpu'))
        return x


class Attention(nn.Module):
    """Causal attention that materializes the (T, T) matrix where that is faster on a CPU.

    F.scaled_dot_product_attention has no fast path there with dropout (T=256, forward and
    backward: 436 ms, here 228), and its backward pass is slow in bfloat16 (T=64: 2.9 ms, here 0.4;
    T=1024: 135 ms, here 84).
    """

    def __init__(self, attention):
        super().__init__()
        self.plain = attention

    def forward(self, q, k, v, dropout, flash):
        B, nh, T, hs = q.size()
        is_known = flash and type(dropout) is nn.Dropout and q.shape == k.shape == v.shape
        dropout_p = dropout.p if is_known and dropout.training else 0.0
        is_slow = dropout_p or T <= 1024 and q.dtype == torch.bfloat16 and q.requires_grad
        if (q.device.type != 'cpu' or not is_slow or not is_known
                or not was_unchanged(self.plain, 'Attention')):
            return self.plain(q, k, v, dropout, flash)
        mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        q, k, v = (z.flatten(0, 1) for z in (q, k, v))  # (B * nh, T, hs)
        att = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=hs ** -0.5)
        att = att.softmax(dim=-1)  # (B * nh, T, T)
        if dropout_p:
            att = att * draw_mask(att, dropout_p)
            v = v * (1 / (1 - dropout_p))
        return torch.bmm(att, v).view(B, nh, T, hs)


class SquaredReLUFunction(torch.autograd.Function):
    """F.relu(x).square(), whose backward pass reads the tensor twice instead of four times."""

    @staticmethod
    def forward(ctx, x):
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


class SquaredReLU(nn.Module):
    """F.relu(x).square() by SquaredReLUFunction."""

    def __init__(self, activation):
        super().__init__()
        self.plain = activation

    def forward(self, x):
        if not was_unchanged(self.plain, 'SquaredReLU'):
            return self.plain(x)
        return SquaredReLUFunction.apply(x)


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1) in float32.

    x (N, C), weight (V, C), targets (N). The gradients are computed in the forward pass, for some
    rows at a time, so the logits (N, V) never exist as a whole. They would be the largest tensor
    of all. After Hsu et al. 2024, https://arxiv.org/abs/2410.10989. F.linear_cross_entropy of
    torch 2.13 takes twice the time, and rounds the loss to bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, needs_grad):
        loss = x.new_zeros((), dtype=torch.float32)
        count = (targets != -1).sum()
        w = weight.to(dtype)
        dx = torch.zeros_like(x) if needs_grad else None
        dw = torch.zeros_like(weight) if needs_grad else None
        rows = max(1, 2 ** 25 // len(weight))
        for i in range(0, len(x), rows):
            x_i = x[i:i + rows].to(dtype)
            target = targets[i:i + rows, None]
            is_counted = target != -1
            target = target.masked_fill(target == -1, 0)
            logits = (x_i @ w.t()).float()  # (rows, V)
            probs = logits.softmax(dim=-1)
            # logsumexp from the most likely token, whose probability doesn't underflow: this
            # saves a second exp of all logits
            lse = logits.amax(dim=-1, keepdim=True) - probs.amax(dim=-1, keepdim=True).log()
            loss += (lse - logits.gather(1, target)).masked_fill(~is_counted, 0.0).sum()
            if needs_grad:  # the softmax, less 1 at the target
                minus_one = -torch.ones_like(target, dtype=torch.float32)
                d_logits = probs.scatter_add_(1, target, minus_one).mul_(is_counted).to(dtype)
                dx[i:i + rows] = d_logits @ w
                dw += d_logits.t() @ x_i
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        return dx * (grad / count), dw * (grad / count), None, None, None


# not float16: gradients that are computed before the loss is scaled would vanish in it
DTYPES = torch.float32, torch.bfloat16


class LossHead(nn.Module):
    """The output layer and the loss, together where only the loss is needed and logits are large.

    torch.compile joins the two by itself.
    """

    def __init__(self, loss_head):
        super().__init__()
        self.plain = loss_head
        self.gives_logits = True  # see loss_only()
        self.is_compiled = True  # with the rest of a compiled model

    def forward(self, lm_head, x, targets):
        if self.training and not self.is_compiled:
            return self.run_eagerly(lm_head, x, targets)
        return self.compute(lm_head, x, targets)

    def compute(self, lm_head, x, targets):
        device_type, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        if (self.gives_logits or torch.compiler.is_compiling() or dtype not in DTYPES
                or not is_unchanged(lm_head, 'Linear') or lm_head.bias is not None
                or targets.numel() * lm_head.out_features <= 2 ** 22
                or not is_unchanged(self.plain, 'LossHead') or has_global_hook()):
            logits, loss = self.plain(lm_head, x, targets)
            return (logits if self.gives_logits else None), loss
        loss = LinearCrossEntropy.apply(x.flatten(0, 1), lm_head.weight, targets.flatten(), dtype,
                                        torch.is_grad_enabled())
        return None, loss

    run_eagerly = torch.compiler.disable(compute)


# -----------------------------------------------------------------------------
# other ways to run all of the model
def compile_model(model):
    """torch.compile() of the model, but not of the loss while dropout cuts up the graph on a CPU.

    Otherwise the loss would be compiled by itself, and would store all logits.
    """
    has_dropout = any(isinstance(part, Dropout) and part.p for part in model.modules())
    loss_head = getattr(model, 'loss_head', None)
    if has_dropout and isinstance(loss_head, LossHead):
        loss_head.is_compiled = False
    return torch.compile(model)


def recompute_blocks(model):
    """Activation checkpointing: the backward pass computes each block again.

    Otherwise the forward pass stores what is in all of them. Chen et al. 2016,
    https://arxiv.org/abs/1604.06174
    """
    for block in model.transformer.h:
        forward = vars(block).get('forward', functools.partial(run_forward, block))
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)


def run_forward(module, *args, **options):
    """The forward() that the module's class has at this time, so that it can still be changed."""
    return type(module).forward(module, *args, **options)
