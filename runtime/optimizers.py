"""
Optimizers that torch doesn't have in this form, and the step that clips and skips.

An optimizer of this file does what torch's fused AdamW does: if its attribute `found_inf` is 1, an
update changes nothing, and if it has a `grad_scale`, gradients are divided by that.
"""
import math

import torch

from runtime.compiler import run_step
from runtime.console import fail, warn
from runtime.distributed import full_tensor, get_local_optimizer, local_tensor, shard_like
from runtime.originals import has_original_step


def specialize(optimizer, optim, moments_dtype, momentum, model, dtype='float32'):
    """The optimizer that the settings ask for, with the parameter groups of this AdamW.

    muon takes the matrices of the model's blocks out of their groups, into a group with a
    momentum. dtype is the run's. Returns the optimizer itself for adamw with moments in float32.
    """
    if optim == 'adamw' and moments_dtype == 'float32':
        return optimizer
    if type(optimizer) is not torch.optim.AdamW:
        fail(f'optim={optim} and moments_dtype={moments_dtype} take the place of AdamW, but '
             f'configure_optimizers returns {type(optimizer).__name__}',
             'use --optim=adamw --moments_dtype=float32')
    groups = [{key: value for key, value in group.items() if key not in ('foreach', 'fused')}
              for group in optimizer.param_groups]
    options = {key: optimizer.defaults[key] for key in ('lr', 'betas', 'eps')}
    if optim == 'muon':
        if not hasattr(getattr(model, 'transformer', None), 'h'):
            fail('optim=muon needs the matrices in transformer.h, and this model has no such part',
                 'use --optim=adamw')
        matrices = {p for p in model.transformer.h.parameters() if p.dim() == 2}
        muon_groups = []
        for group in groups:
            group_matrices = [p for p in group['params'] if p in matrices]
            if group_matrices:
                muon_groups.append({**group, 'params': group_matrices, 'momentum': momentum})
                group['params'] = [p for p in group['params'] if p not in matrices]
        groups += muon_groups
        options['dtype'] = dtype
    cls = Muon if optim == 'muon' else LowMemoryAdamW
    try:
        return cls(groups, **options)
    except ValueError as e:
        fail(str(e), 'change configure_optimizers in model.py')


def count_state_bytes(optimizer):
    """The bytes of the optimizer's state once it has made an update, on all ranks together."""
    itemsize = getattr(optimizer, 'moments_dtype', torch.float32).itemsize
    total = 0
    for group in optimizer.param_groups:
        moments = 1 if 'momentum' in group else 2
        total += sum(p.numel() for p in group['params']) * moments * itemsize
    return total


def compute_loss(closure):
    """Calls a closure given to step() and returns its loss; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def refuse_options(group, *names):
    """ValueError if a parameter group asks for something that its optimizer doesn't do."""
    options = [f'{name}={group[name]}' for name in names if group.get(name)]
    if options:
        raise ValueError(f'this optimizer has no {", ".join(options)}')


class LowMemoryAdamW(torch.optim.AdamW):
    """AdamW with its moments in bfloat16: 12 bytes per parameter in all instead of 16.

    Each update is computed in float32, one tensor at a time. bfloat16 has steps of 0.4 to 0.8%, so
    the second moment stands still if beta2 is above 0.99.
    """
    moments_dtype = torch.bfloat16

    def __init__(self, params, **options):
        super().__init__(params, **options, fused=True)

    def add_param_group(self, group):
        super().add_param_group(group)
        refuse_options(self.param_groups[-1], 'amsgrad', 'differentiable')

    @torch.no_grad()
    def step(self, closure=None):
        loss = compute_loss(closure)
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p, group):
        """Updates one parameter, which has a gradient."""
        state = self.state[p]
        if not state:
            state['step'] = torch.zeros((), device=p.device)
            state['exp_avg'] = torch.zeros_like(p, dtype=self.moments_dtype)
            state['exp_avg_sq'] = torch.zeros_like(p, dtype=self.moments_dtype)
        exp_avg, exp_avg_sq = state['exp_avg'].float(), state['exp_avg_sq'].float()
        found_inf = getattr(self, 'found_inf', None)
        state['step'] += 1 if found_inf is None else 1 - found_inf
        beta1, beta2 = group['betas']
        torch._fused_adamw_(
            [p], [p.grad], [exp_avg], [exp_avg_sq], [], [state['step']], lr=group['lr'],
            beta1=beta1, beta2=beta2, weight_decay=group['weight_decay'], eps=group['eps'],
            amsgrad=False, maximize=group['maximize'], grad_scale=getattr(self, 'grad_scale', None),
            found_inf=found_inf)
        state['exp_avg'].copy_(exp_avg)
        state['exp_avg_sq'].copy_(exp_avg_sq)


class Muon(torch.optim.AdamW):
    """Muon for the groups that have a momentum, AdamW for the others.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. A matrix moves by its
    gradient's momentum with all singular values made nearly 1, times 0.2 sqrt(the longer side).
    Then an update is about as large as one of AdamW, and takes the same learning rate and weight
    decay (Liu et al. 2025, https://arxiv.org/abs/2502.16982).

    torch.optim.Muon computes the same with adjust_lr_fn='match_rms_adamw'. Here matrices of one
    shape are one batch, and weights may be sharded: each rank applies its part of the update.
    """
    __setstate__ = torch.optim.Optimizer.__setstate__  # AdamW's expects its moments in all groups

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 dtype='float32'):
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self.defaults['dtype'] = dtype  # a copy of an optimizer loses other attributes

    def add_param_group(self, group):
        super().add_param_group(group)
        if 'momentum' in group:
            refuse_options(self.param_groups[-1], 'amsgrad', 'maximize', 'differentiable',
                           'ns_steps', 'ns_coefficients', 'adjust_lr_fn')

    @torch.no_grad()
    def step(self, closure=None):
        loss = compute_loss(closure)
        for group in self.param_groups:
            if 'momentum' not in group:
                continue
            batches = {}  # by shape, the longer side last
            for p in group['params']:
                if p.grad is not None:
                    batches.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, params in batches.items():
                self.update(shape, params, group)
        if has_original_step(self):
            run_step(self, torch.optim.AdamW)
        else:
            super().step()
        return loss

    def update(self, shape, params, group):
        """Updates matrices of this shape, or of its transpose, and takes their gradients away."""
        device = params[0].device
        lr, momentum = group['lr'], group['momentum']
        grad_scale = getattr(self, 'grad_scale', None)
        is_bad = getattr(self, 'found_inf', torch.zeros((), device=device)) > 0
        decay = 1 - lr * group['weight_decay'] * ~is_bad
        updates = torch.empty(len(params), *shape, device=device)
        for p, row in zip(params, updates):
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            buffer = self.state[p]['momentum_buffer']
            grad = local_tensor(p.grad)
            if grad_scale is not None:
                grad.div_(grad_scale)
            average = local_tensor(buffer)
            average.lerp_(torch.where(is_bad, average, grad), 1 - momentum)
            update = full_tensor(p.grad.lerp(buffer, momentum))  # Nesterov's
            row.copy_(update if update.shape == shape else update.t())
            local_tensor(p).mul_(decay)
            p.grad = None  # so that AdamW's step leaves this parameter out
        updates.masked_fill_(is_bad, 0.0)
        for p, update in zip(params, orthogonalize(updates, self.defaults['dtype'])):
            update = update if p.shape == shape else update.t()
            p.add_(shard_like(update, p), alpha=-lr * 0.2 * math.sqrt(shape[1]))


def orthogonalize(x, dtype='float32'):
    """Matrices (n, R, C), R <= C, with singular values near 1 (0.7 to 1.2), by Newton-Schulz steps.

    In bfloat16 each step corrects the rounding of the one before. A run in float32 on a CPU stays
    in float32 and multiplies the matrices of the steps (R, R) first: faster for C > 1.5 R.
    """
    y = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.device.type != 'cpu' or dtype == 'bfloat16':
        y = y.bfloat16()
        for _ in range(5):
            y = compute_factor(y @ y.mT) @ y
        return y.to(x.dtype)
    a = y @ y.mT
    b = product = compute_factor(a)  # of the first step
    for _ in range(4):
        a = b @ a @ b
        b = compute_factor(a)
        product = b @ product
    return product @ y


def compute_factor(a):
    """What one step multiplies y by, for a = y @ y.T. The numbers are those of the Muon post."""
    b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
    b.diagonal(dim1=1, dim2=2).add_(3.4445)
    return b


# -----------------------------------------------------------------------------
# the end of an iteration
def nan_unless_finite(loss):
    """The loss; NaN with NaN gradients if it isn't finite, so that all ranks skip the update.

    A loss may overflow although its gradients don't, and on one rank only.
    """
    return loss * (1 + 0 * loss.detach())  # times 1, or times NaN


def compute_grad_norm(optimizer):
    """The norm of the gradients of all the optimizer's parameters, as one vector."""
    grads = [p.grad for group in optimizer.param_groups for p in group['params']
             if p.grad is not None]
    if not grads:
        return torch.zeros(())
    return full_tensor(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))


def clip_and_step(optimizer, scaler, grad_clip):
    """Clips the gradients to the norm grad_clip (0: no clipping) and makes the update.

    A gradient that isn't finite leaves weights, moments and step counts as they are. Returns the
    norm before clipping, as a tensor. With a fused optimizer the host doesn't wait for the device.
    """
    scaler.unscale_(optimizer)
    norm = compute_grad_norm(optimizer)
    limit = grad_clip or math.inf
    local_optim = get_local_optimizer(optimizer)
    # torch's fused SGD takes momentum from memory that a skipped first update didn't write to
    can_skip = (norm.device.type != 'mps' and has_original_step(optimizer)
                and has_original_step(local_optim)
                and getattr(local_optim, '_step_supports_amp_scaling', False)
                and type(local_optim) is not torch.optim.SGD)
    if scaler.is_enabled() or not can_skip:
        # a GradScaler skips bad updates itself; for an optimizer that can't, the host waits
        params = [p for group in optimizer.param_groups for p in group['params']]
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
        if scaler.is_enabled() or norm.isfinite():
            scaler.step(optimizer)
    else:
        # the fused kernel divides by grad_scale, which clips without a pass over the gradients
        local_optim.found_inf = (~norm.isfinite()).float()
        local_optim.grad_scale = (norm / limit).clamp(min=1)
        run_step(optimizer, type(optimizer))
        del local_optim.found_inf, local_optim.grad_scale  # the next step() may be somebody's own
    scaler.update()
    return norm


def is_updating(frames):
    """Whether one of these frames is in an optimizer's step(), so that an update is half done."""
    owners = [frame.f_locals.get('self') for frame in frames if frame.f_code.co_name == 'step']
    return any(hasattr(owner, 'param_groups') for owner in owners)


class BadSteps:
    """Counts the updates that were skipped, on the device: the host waits only in read()."""

    def __init__(self, device):
        self.device_counts = torch.zeros(2, device=device)  # in a row until now, and in all
        self.streak, self.total = 0, 0  # as of the last read()
        self.num_steps = 0  # updates, skipped or made

    def count(self, norm):
        """Counts an update that clip_and_step() skipped or made, by its norm."""
        self.num_steps += 1
        is_bad = (~norm.isfinite()).float()
        streak, total = self.device_counts
        self.device_counts = torch.stack(((streak + 1) * is_bad, total + is_bad))

    def read(self, iter_num):
        """Reads the counts, and warns if updates were skipped since the last time."""
        total_before = self.total
        self.streak, self.total = self.device_counts.int().tolist()
        if self.total > total_before:
            warn(f'iter {iter_num}: skipped updates, because their gradient was not finite: '
                 f'{self.total - total_before} new, {self.streak} in a row, {self.total} in all')
