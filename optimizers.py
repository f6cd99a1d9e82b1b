"""
Optimizers that torch doesn't have in this form. Each does what fused AdamW does when train.py asks for it: where found_inf
is 1 an update changes nothing, without the host having to know, and gradients are divided by grad_scale.
"""
import math

import torch

from distributed import like, local, whole


def total_norm(optimizer):
    """The norm of all gradients as one vector, of which there must be one; torch.nn.utils.get_total_norm takes 0.2 ms longer on a CPU."""
    # from its groups: model.parameters() walks through all modules, for 0.1 ms
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for group in optimizer.param_groups for p in group['params']
                                                                     if p.grad is not None])))


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, always fused and without a closure; torch's takes 0.1 ms longer around its kernel, of 12 for a step of the CPU recipe."""
    moments_dtype = torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p, dtype=self.moments_dtype),
                                         exp_avg_sq=torch.zeros_like(p, dtype=self.moments_dtype))
            if params:
                self.update(group, params)

    def update(self, group, params):
        """Updates these parameters of a group, which have gradients."""
        steps, exp_avgs, exp_avg_sqs = ([self.state[p][key] for p in params] for key in ('step', 'exp_avg', 'exp_avg_sq'))
        bad, (beta1, beta2) = getattr(self, 'found_inf', None), group['betas']
        torch._foreach_add_(steps, 1 if bad is None else 1 - bad)
        torch._fused_adamw_(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps, lr=group['lr'], beta1=beta1, beta2=beta2, eps=group['eps'],
                            weight_decay=group['weight_decay'], amsgrad=False, maximize=False, grad_scale=getattr(self, 'grad_scale', None), found_inf=bad)


class LowMemoryAdamW(AdamW):
    """AdamW with its moments in bfloat16: weight, gradient and moments are 12 bytes a parameter instead of 16.

    An update is computed in float32, a tensor at a time. bfloat16 moves in steps of 0.4 to 0.8 %, so the second moment
    stands still where beta2 is above 0.99.
    """
    moments_dtype = torch.bfloat16

    def update(self, group, params):
        for p in params:
            state = self.state[p]
            moments = {key: state[key] for key in ('exp_avg', 'exp_avg_sq')}
            state.update({key: moment.float() for key, moment in moments.items()})
            super().update(group, [p])
            for key, moment in moments.items():
                state[key] = moment.copy_(state[key])


class Muon(AdamW):
    """Muon for the groups that have a momentum, AdamW for the others. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    A matrix moves by its gradient's momentum with all singular values made 1, nearly, times 0.2 sqrt(the longer side):
    then an update is about as large as one of AdamW, and takes the same learning rate and weight decay (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982). That is torch.optim.Muon with adjust_lr_fn='match_rms_adamw'. But here matrices of
    one shape go through in one batch, in float32 on CPUs (6.8 ms a step of the fast recipe, torch's 14.7), and
    weights may be sharded: each rank then puts an update together and applies its part of it.
    """
    __setstate__ = torch.optim.Optimizer.__setstate__  # AdamW's looks for its own moments in all groups

    @torch.no_grad()
    def step(self, closure=None):
        for group in [group for group in self.param_groups if 'momentum' in group]:
            lr, momentum, batches = group['lr'], group['momentum'], {}
            bad, scale = getattr(self, 'found_inf', None), getattr(self, 'grad_scale', None)
            bad = torch.zeros((), dtype=torch.bool, device=group['params'][0].device) if bad is None else bad > 0
            keep = 1 - lr * group['weight_decay'] * ~bad
            for p in [p for p in group['params'] if p.grad is not None]:
                batches.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, params in batches.items():
                updates = torch.empty(len(params), *shape, device=bad.device)
                for p, row in zip(params, updates):
                    if not self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                    buffer = self.state[p]['momentum_buffer']
                    if scale is not None:
                        local(p.grad).div_(scale)
                    local(buffer).lerp_(torch.where(bad, local(buffer), local(p.grad)), 1 - momentum)
                    update = whole(p.grad.lerp(buffer, momentum))  # Nesterov's
                    row.copy_(update if update.shape == shape else update.t())
                    local(p).mul_(keep)
                    p.grad = None  # AdamW passes it over
                for p, o in zip(params, orthogonalize(updates.masked_fill_(bad, 0.0))):
                    p.add_(like(o if p.shape == shape else o.t(), p), alpha=-lr * 0.2 * math.sqrt(shape[1]))
        super().step()


def orthogonalize(x):
    """Matrices (n, R, C), R <= C, with their singular values brought near 1 (0.7 to 1.2), by five Newton-Schulz steps."""
    # in bfloat16 where that is fast: it makes up for its own rounding
    y = x.float() if x.device.type == 'cpu' else x.bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.to(x.dtype)
