"""
torch.distributed: which rank this is, one model over all ranks, numbers reduced over ranks, and signals that all obey.

With one process the functions here do nothing, but for the signals.
"""
import os
import signal
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


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
    return tensor


def same(number):
    """Whether all ranks have the same number."""
    if not dist.is_initialized():
        return True
    numbers = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


_asked = {'stop': 0, 'save': 0, 'since': None}  # of this rank: the signal to stop by, whether to save, and when the first came
_handlers, _group, _vote = {}, None, None


def catch_signals():
    """From here on SIGTERM and SIGINT ask the run to stop, SIGUSR1 asks it to save: see wishes().

    Who asks to stop again, 3 seconds or more after the first time, ends the process at once: launchers send the same
    signal twice within milliseconds.
    """
    global _group

    def ask(number, frame):
        if number in (signal.SIGTERM, signal.SIGINT):
            if _asked['since'] and time.monotonic() - _asked['since'] > 3:
                os._exit(128 + number)
            _asked.update(stop=int(number), since=_asked['since'] or time.monotonic())
        else:
            _asked['save'] = 1

    for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            _handlers[name] = signal.signal(getattr(signal, name), ask)
    _asked.update(stop=0, save=0, since=None)
    _group = dist.new_group(backend='gloo') if dist.is_initialized() else None


def wishes():
    """(the signal to stop by or 0, whether to save), the same on every rank, as it was when this was last called.

    The ranks agree over the CPU while the device works on an iteration, so nothing waits.
    """
    global _vote
    mine = torch.tensor([_asked['stop'], _asked['save']])
    _asked['save'] = 0
    if not dist.is_initialized():
        return tuple(mine.tolist())
    earlier, _vote = _vote, (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=_group, async_op=True))
    return _result(earlier) if earlier else (0, 0)


def _result(vote):
    asked, work = vote
    work.wait()
    return tuple(asked.tolist())


def shutdown(status=0):
    """Ends the process with this status, together with the other ranks."""
    if dist.is_initialized():
        if _vote:
            _result(_vote)
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # DDP keeps gloo's threads alive beyond its end; one of them that frees a tensor while Python shuts down aborts
        # the process (seen in one of some 50 short runs)
        os._exit(status)
    for name in list(_handlers):  # signals belong again to whom they did
        signal.signal(getattr(signal, name), _handlers.pop(name))
    sys.exit(status)
