"""
The output layer and the loss in one, so that few logits of a large vocabulary exist at a time.
"""
import math

import torch
import torch.nn as nn

from runtime.originals import has_global_hook, is_patched, is_unchanged

MAX_BYTES = 2 ** 28  # of logits that exist at the same time
MAX_PLAIN_LOGITS = 2 ** 22  # so few are stored, as model.py does


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1) in float32.

    x (N, C), weight (V, C), targets (N). The gradients are computed in the forward pass, for some
    rows at a time, because the logits (N, V) would be the largest tensor of all. After Hsu et al.
    2024, https://arxiv.org/abs/2410.10989. F.linear_cross_entropy of torch 2.13 takes twice the
    time, and rounds the loss to bfloat16.

    The matmuls take as many rows as MAX_BYTES of logits have. The softmax in float32 takes fewer:
    on a CPU so few that they stay in the cache. The gradients of the logits replace them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, needs_grad):
        loss = x.new_zeros((), dtype=torch.float32)
        count = (targets != -1).sum()
        w = weight.to(dtype)
        dx, dw = None, None
        if needs_grad:
            dx = torch.empty_like(x)
        num_parts = math.ceil(len(x) * len(weight) * dtype.itemsize / MAX_BYTES)
        rows = math.ceil(len(x) / num_parts)
        small_rows = max(1, count_wide_logits(x.device.type) // len(weight))
        for start in range(0, len(x), rows):
            part_x = x[start:start + rows].to(dtype)
            part_logits = part_x @ w.t()  # (rows, V)
            for logits, target in zip(part_logits.split(small_rows),
                                      targets[start:start + rows, None].split(small_rows)):
                loss += sum_losses(logits, target, count, needs_grad)
            if needs_grad:
                dx[start:start + rows] = part_logits @ w
                part_dw = part_logits.t() @ part_x
                dw = part_dw.to(weight.dtype) if dw is None else dw.add_(part_dw)
        ctx.save_for_backward(dx, dw)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster loss has no second derivative: '
                               'call the model outside of kernels.loss_only() for this')
        dx, dw = ctx.saved_tensors
        is_known = grad.device.type == 'cpu' and type(grad) is torch.Tensor
        if is_known and grad == 1:  # the usual case: nothing to multiply
            return dx, dw, None, None, None
        return dx * grad, dw * grad, None, None, None


def count_wide_logits(device_type):
    """How many logits there are in float32 at the same time."""
    return 2 ** 21 if device_type == 'cpu' else 2 ** 25


def sum_losses(logits, targets, count, needs_grad):
    """The sum of the losses of logits (N, V) and targets (N, 1), whose -1 are ignored.

    With needs_grad the gradients of the sum, divided by count, replace the logits.
    """
    is_counted = targets != -1
    targets = targets.masked_fill(targets == -1, 0)
    wide_logits = logits.float()
    probs = wide_logits.softmax(dim=-1)
    # logsumexp from the most likely token, whose probability doesn't underflow: this saves a
    # second exp of all logits
    lse = wide_logits.amax(dim=-1, keepdim=True) - probs.amax(dim=-1, keepdim=True).log()
    losses = lse - wide_logits.gather(1, targets)
    if needs_grad:  # the softmax, less 1 at the target
        minus_one = -torch.ones_like(targets, dtype=torch.float32)
        logits.copy_(probs.scatter_add_(1, targets, minus_one).mul_(is_counted / count))
    return losses.masked_fill(~is_counted, 0.0).sum()


# not float16: gradients that are computed before the loss is scaled would vanish in it
DTYPES = torch.float32, torch.bfloat16
TENSORS = torch.Tensor, nn.Parameter  # a subclass may multiply in its own way


class LossHead(nn.Module):
    """The output layer and the loss, together where only the loss is needed and logits are large.

    torch.compile joins the two by itself.
    """

    def __init__(self, loss_head):
        super().__init__()
        self.plain = loss_head
        self.gives_logits = True  # see loss_only()
        self.is_compiled = True  # with the rest of a compiled model
        self.player = None  # of the whole step of a small model, see runtime/replay.py

    def forward(self, lm_head, x, targets):
        if self.training and not self.is_compiled:
            return self.run_eagerly(lm_head, x, targets)
        return self.compute(lm_head, x, targets)

    def can_join(self, lm_head):
        """Whether nobody has changed this output layer or the loss."""
        return (is_unchanged(lm_head, 'Linear') and lm_head.bias is None
                and is_unchanged(self.plain, 'LossHead') and not is_patched(self)
                and not has_global_hook())

    def compute(self, lm_head, x, targets):
        device_type, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        if (self.gives_logits or torch.compiler.is_compiling() or dtype not in DTYPES
                or not self.can_join(lm_head) or type(lm_head.weight) not in TENSORS
                or targets.numel() * lm_head.out_features <= MAX_PLAIN_LOGITS):
            logits, loss = self.plain(lm_head, x, targets)
            return (logits if self.gives_logits else None), loss
        loss = LinearCrossEntropy.apply(x.flatten(0, 1), lm_head.weight, targets.flatten(), dtype,
                                        torch.is_grad_enabled())
        return None, loss

    run_eagerly = compute  # compile_model() replaces it
