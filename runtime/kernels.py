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
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime import compiler, originals, replay
from runtime.attention import MAX_DROPOUT, Attention, DropoutFunction, draw_numbers
from runtime.console import note
from runtime.cross_entropy import LossHead
from runtime.originals import is_fast, is_original_model, is_torchs, is_unchanged, was_unchanged

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
    attn_dropouts = {part for _, name, part in places if name == 'attn_dropout'}
    for parent, name, part in places:
        base_names = [base.__name__ for base in type(part).__mro__]
        kind = next((base for base in base_names if base in fast_forms), PLACES.get(name))
        if name == 'attn' and not hasattr(part, 'attention') and 'Attention' in fast_forms:
            edited_names.add(type(part).__name__)
        if name == 'lm_head' and (not is_unchanged(part, 'Linear') or part.bias is not None):
            edited_names.add(name)
        if kind not in fast_forms or part in attn_dropouts or is_fast(part):
            continue  # of attn_dropout only the rate is used
        if kind == 'Dropout' and is_unchanged(part, kind):
            part.__class__ = Dropout  # somebody may have put it into a list, to change its rate
        elif is_unchanged(part, kind) and parts.count(part) == 1 and is_stateless(part):
            setattr(parent, name, fast_forms[kind](part).train(part.training))
        else:
            edited_names.add(type(part).__name__)
    if device_type == 'cpu' and dtype == 'bfloat16' and is_original_model(model):
        drop = model.transformer.drop
        if type(drop) is Dropout and parts.count(drop) == 1:
            drop.__class__ = EmbeddingDropout
    if device_type == 'cuda' and dtype != 'float32':
        keep_dropout_rate(model, device_type, dtype)
    if edited_names:
        originals.note_changes(model, edited_names)


def is_stateless(part):
    """Whether nobody has given this part weights or other attributes."""
    return not part.state_dict() and vars(part).keys() == vars(nn.Module()).keys()


@contextlib.contextmanager
def loss_only(model):
    """In this context model(idx, targets) gives None for the logits, which take much memory.

    If the loss or the forward pass of the model was changed, there are logits nevertheless. A small
    model on a CPU is played from a recording.
    """
    if stores_logits(model):
        yield
        return
    loss_head = model.loss_head
    gave_logits = loss_head.gives_logits
    loss_head.gives_logits = False
    forward = model.forward = functools.partial(replay.compute_loss, model)
    try:
        yield
    finally:
        loss_head.gives_logits = gave_logits
        if vars(model).get('forward') is forward:
            del model.forward


def stores_logits(model):
    """Whether the model computes its loss from all logits, because somebody has changed it."""
    loss_head = getattr(model, 'loss_head', None)
    return (not isinstance(loss_head, LossHead) or not is_unchanged(model, 'GPT')
            or not loss_head.can_join(model.lm_head))


def keep_dropout_rate(model, device_type, dtype):
    """Makes torch choose another attention than cuDNN's if that rounds the model's dropout rate.

    Some kernels of cuDNN draw only four bits for each number, so their rates are sixteenths.
    """
    rates = [part.p for name, part in model.named_modules()
             if name.endswith('attn_dropout') and part.training and 0 < part.p < 1]
    for p in set(rates):
        rate = measure_dropout_rate(p, model.config, device_type, getattr(torch, dtype))
        if abs(rate - p) > 0.003:
            note(f"torch's attention drops {100 * rate:.2f}% instead of {100 * p:.2f}% on this "
                 'device, so the model does without that of cuDNN')
            torch.backends.cuda.enable_cudnn_sdp(False)


def measure_dropout_rate(p, config, device_type, dtype):
    """The share of attention's weights that F.scaled_dot_product_attention drops for the rate p.

    It is measured on a million of them, so it may be 0.0005 off.
    """
    nh, T, hs = config.n_head, config.block_size, config.n_embd // config.n_head
    was_seen = torch.ones(T, hs, device=device_type, dtype=torch.bool).tril()
    B = math.ceil(2 ** 20 / (nh * was_seen.sum().item()))
    qkv = torch.zeros(B, T, 3 * nh, hs, device=device_type, dtype=dtype)
    qkv[:, :, 2 * nh:] = torch.eye(T, hs, device=device_type, dtype=dtype)[:, None]
    # with the strides that the model has: the choice of a kernel depends on them
    q, k, v = (z.transpose(1, 2) for z in qkv.requires_grad_().split(nh, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    return (y[:, :, was_seen] == 0).float().mean().item()  # y is what is left of the weights


# -----------------------------------------------------------------------------
# parts of the model
class Dropout(nn.Dropout):
    """nn.Dropout, with fewer random bits on a CPU. Srivastava et al. 2014"""

    def forward(self, x):
        draws = x.device.type == 'cpu' and self.training and 0 < self.p <= MAX_DROPOUT
        if not draws or self.inplace or not self.is_known():
            return super().forward(x)
        return DropoutFunction.apply(x, draw_numbers(x), self.p)

    def is_known(self):
        """Whether nobody has changed dropout in torch. It is False in torch.func."""
        if torch.compiler.is_compiling():
            return True
        return (is_torchs(nn.Dropout.forward) and is_torchs(F.dropout)
                and not torch._C._are_functorch_transforms_active())


class EmbeddingDropout(Dropout):
    """The last part before the blocks: under autocast it makes the residual stream 16 bits wide.

    Then less must be cast and moved: 2 to 9% of a step on a CPU.
    """

    def forward(self, x):
        x = super().forward(x)
        if x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            x = x.to(torch.get_autocast_dtype('cpu'))
        return x


class SquaredReLUFunction(torch.autograd.Function):
    """F.relu(x).square(), whose backward pass reads the tensor once instead of four times."""

    @staticmethod
    def forward(ctx, x):
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError('the faster squared ReLU has no second derivative: '
                               'do not call kernels.accelerate() for this')
        relu, = ctx.saved_tensors
        return torch.addcmul(relu.new_zeros(()), grad, relu, value=2)  # 2 grad relu in one pass


class SquaredReLU(nn.Module):
    """F.relu(x).square() by SquaredReLUFunction."""

    def __init__(self, activation):
        super().__init__()
        self.plain = activation

    def forward(self, x):
        if not was_unchanged(self.plain, 'SquaredReLU'):
            return self.plain(x)
        return SquaredReLUFunction.apply(x)


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
        LossHead.run_eagerly = torch.compiler.disable(LossHead.compute)
    return compiler.compile_copy(model)


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
