"""
The output layer and the loss in one, so that the logits of a large vocabulary are never stored.
"""
import torch
import torch.nn as nn

from runtime.originals import has_global_hook, is_patched, is_unchanged


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
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster loss has no second derivative: '
                               'call the model outside of kernels.loss_only() for this')
        dx, dw, count = ctx.saved_tensors
        return dx * (grad / count), dw * (grad / count), None, None, None


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
                or targets.numel() * lm_head.out_features <= 2 ** 22):
            logits, loss = self.plain(lm_head, x, targets)
            return (logits if self.gives_logits else None), loss
        loss = LinearCrossEntropy.apply(x.flatten(0, 1), lm_head.weight, targets.flatten(), dtype,
                                        torch.is_grad_enabled())
        return None, loss

    run_eagerly = torch.compiler.disable(compute)
