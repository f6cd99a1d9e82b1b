"""
torch.distributed, and nothing else: which rank this is, one model over all ranks, numbers reduced over ranks.

With one process every function here does nothing.
"""
import os
from collections import deque
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# a thread of gloo's may hold on to a tensor for a moment after all_reduce has returned; if its reference is the last one
# and Python is shutting down, the process aborts (seen once in 20 short runs). So the latest ones are kept here
_reduced = deque(maxlen=16)


def ranks():
    """(ddp_rank, ddp_local_rank, ddp_world_size) as torchrun has set them; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


def init(backend, device):
    """Joins the process group. backend 'auto' is nccl on GPUs and gloo on CPUs; returns the one used, None if alone."""
    device = torch.device(device)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    if ranks()[2] == 1:
        return None
    if backend == 'auto' or backend == 'nccl' and device.type == 'cpu':  # configs say nccl by habit; it has no CPU side
        backend = {'cuda': 'nccl', 'xpu': 'xccl'}.get(device.type, 'gloo')
    dist.init_process_group(backend)
    return backend


def wrap(model, device):
    """The model with its gradients averaged over the ranks in the backward pass; the model itself if alone."""
    if not dist.is_initialized():
        return model
    device = torch.device(device)
    return DistributedDataParallel(model, device_ids=None if device.type == 'cpu' else [device.index])


def sync_gradients(model, now):
    """Context of one micro-step: gradients travel in the last one only, their sum once instead of every part."""
    return nullcontext() if now or not dist.is_initialized() else model.no_sync()


def mean(tensor):
    """The tensor's mean over the ranks."""
    return total(tensor) / dist.get_world_size() if dist.is_initialized() else tensor


def total(tensor):
    """The tensor's sum over the ranks."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        _reduced.append(tensor)
    return tensor


def same(number):
    """Whether all ranks have the same number."""
    if not dist.is_initialized():
        return True
    numbers = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


def shutdown():
    """Leaves the process group, together with the other ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
