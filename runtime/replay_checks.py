"""
Whether a training step can be recorded and played: the model, the batch, and who looks on.
"""
import sys
import weakref

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime import originals
from runtime.cross_entropy import DTYPES, MAX_PLAIN_LOGITS, LossHead

# B * T * C. A step of 6 layers of 256 took 0.92 of the time with 393,000 elements
MAX_ELEMENTS = 2 ** 19
MAX_WEIGHTS = 2 ** 24  # the number of weights times that of the parts, which have gradients for all
changed_models = weakref.WeakSet()  # those that is_changed() has found


def can_record(model, num_rows):
    """Whether parts of a batch can be computed by themselves, if nobody has changed the model.

    Dropout is left out, because the parts would draw other random numbers.
    """
    num_weights = sum(p.numel() for p in model.parameters())
    if count_parts(num_rows, MAX_WEIGHTS // max(num_weights, 1)) == 0:
        return False
    if any(p.device.type != 'cpu' or p.dtype not in DTYPES for p in model.parameters()):
        return False
    for module in model.modules():
        if module._compiled_call_impl or (isinstance(module, nn.Dropout) and module.p):
            return False
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
            return False
        if any(getattr(module, name) for name in originals.BACKWARD_HOOKS):
            return False
        if getattr(vars(module).get('forward'), 'func', None) is checkpoint:  # recompute_blocks()
            return False
    return not originals.is_watched(model)


def is_changed(model):
    """Whether somebody has changed what the model computes. The first time one line says what."""
    if not originals.is_original_model(model):
        if model not in changed_models:
            changed_models.add(model)
            originals.note_changes(model, originals.find_changes(model))
        return True
    loss_head = model.loss_head
    return (not originals.is_torchs(F.dropout) or type(loss_head) is not LossHead
            or 'compute' in vars(loss_head) or not loss_head.can_join(model.lm_head))


def can_play(model, idx, targets):
    """Whether a recording can take this batch."""
    if torch.compiler.is_compiling() or targets is None or idx.device.type != 'cpu':
        return False  # a compiled model doesn't look further
    if type(idx) is not torch.Tensor or type(targets) is not torch.Tensor or idx.numel() == 0:
        return False
    config = model.config
    if idx.dim() != 2 or idx.shape != targets.shape or idx.size(1) != config.block_size:
        return False
    if (count_parts(len(idx)) == 0 or idx.numel() * config.n_embd > MAX_ELEMENTS
            or idx.numel() * config.vocab_size > MAX_PLAIN_LOGITS
            or (torch.is_grad_enabled() and not model.training) or is_observed()):
        return False
    if torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') not in DTYPES:
        return False
    # with ignored targets the parts would have different numbers of targets; for ids outside of the
    # vocabulary the model has its own error
    bounds = [bound.item() for ids in (idx, targets) for bound in torch.aminmax(ids)]
    return min(bounds) >= 0 and max(bounds) < config.vocab_size


def count_parts(num_rows, max_parts=sys.maxsize):
    """The number of equal parts of a batch, or 0 if too many threads would have nothing to do."""
    num_threads = torch.get_num_threads()
    for num_parts in range(min(num_threads, max_parts), num_threads // 2, -1):
        if num_rows % num_parts == 0:
            return num_parts
    return 0


def is_observed():
    """Whether a debugger, a profiler, a mode of torch or a hook looks at each operation."""
    debugger = sys.gettrace()
    if hasattr(sys, 'monitoring'):
        debugger = debugger or sys.monitoring.get_tool(sys.monitoring.DEBUGGER_ID)
    return (debugger or originals.has_global_hook() or torch.is_anomaly_enabled()
            or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state()
            or torch._C._autograd._top_saved_tensors_default_hooks(False)
            or torch._C._autograd._profiler_enabled())
