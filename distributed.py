"""
torch.distributed: which rank this is, one model over all ranks, numbers reduced over ranks, and signals that all obey.

With one process the functions here do nothing, but for the signals.
"""
import os
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checks import fail

TIMEOUT = timedelta(minutes=10)  # for which a rank waits for the others, before it takes them for dead and ends


def ranks():
    """(ddp_rank, ddp_local_rank, ddp_world_size) as torchrun has set them; (0, 0, 1) without it."""
    names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    given = [name for name in names[:3] if name in os.environ]
    missing = [name for name in names if name not in os.environ]
    if given and missing and os.environ.get('WORLD_SIZE') != '1':
        fail(f'{" and ".join(given)} in the environment, but not {", ".join(missing)}',
             'start several processes with torchrun, which sets them all', who='rank')
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
    rank, _, size = ranks()
    dist.init_process_group(backend, store=fresh_store(rank, size), rank=rank, world_size=size, timeout=TIMEOUT)
    return backend


def fresh_store(rank, size):
    """A key-value store that all ranks share and that holds nothing yet.

    When torchrun restarts its workers they find the store of those before them, and connect to addresses of the dead
    that are still in it (https://github.com/pytorch/pytorch/issues/135712: in one of three restarts here). So rank 0
    hands every rank that lives a new prefix, in answer to a name that no process had before.
    """
    torchruns = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), size, is_master=rank == 0 and not torchruns, timeout=TIMEOUT)
    name = prefix = uuid.uuid4().hex
    if rank > 0:
        store.set(f'name of {rank}', name)
        prefix = store.get(f'prefix for {name}').decode()  # once it is there
        store.add(f'have {prefix}', 1)
    end = time.monotonic() + TIMEOUT.total_seconds()
    while rank == 0 and store.add(f'have {prefix}', 0) < size - 1:
        for other in range(1, size):
            if store.check([f'name of {other}']):
                store.set(f'prefix for {store.get(f"name of {other}").decode()}', prefix)
        if time.monotonic() > end:
            raise TimeoutError(f'not all of the {size} ranks have started within {TIMEOUT}')
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


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


_asked = {'stop': 0, 'saves': 0, 'since': None}  # of this rank: the signal to stop by, how often to save, and when the first came
_handlers, _pipe, _group, _vote, _saves = {}, None, None, None, 0


def catch_signals():
    """From here on SIGTERM, SIGINT and SIGHUP ask the run to stop, SIGUSR1 asks it to save: see wishes().

    Who asks to stop again, 3 seconds or more after the first time, ends the process at once: launchers send the same
    signal twice within milliseconds. A thread listens, as Python's own handlers wait while the main thread waits for a
    device or another rank.
    """
    global _pipe, _group, _saves
    _asked.update(stop=0, saves=0, since=None)
    _pipe, _saves = socket.socketpair(), 0
    _pipe[1].setblocking(False)
    signal.set_wakeup_fd(_pipe[1].fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(_pipe[0],), daemon=True).start()
    for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
        # Windows has not all of them; and nohup asks to ignore the terminal's end
        if hasattr(signal, name) and not (name == 'SIGHUP' and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN):
            _handlers[name] = signal.signal(getattr(signal, name), lambda number, frame: None)
    _group = dist.new_group(backend='gloo', timeout=TIMEOUT) if dist.is_initialized() else None


def _listen(pipe):
    while numbers := pipe.recv(64):  # one byte a signal; none once the other end is closed
        for number in numbers:
            if number == getattr(signal, 'SIGUSR1', None):
                _asked['saves'] += 1
            elif getattr(signal.Signals(number), 'name') in _handlers:
                if _asked['since'] and time.monotonic() - _asked['since'] > 3:
                    os._exit(128 + number)
                _asked.update(stop=number, since=_asked['since'] or time.monotonic())


def wishes():
    """(the signal to stop by or 0, whether to save), the same on every rank, as it was when this was last called.

    The ranks agree over the CPU while the device works on an iteration, so nothing waits.
    """
    global _vote, _saves
    saves = _asked['saves']  # counted, not cleared: a signal may come between the two
    mine = torch.tensor([_asked['stop'], saves > _saves])
    _saves = saves
    if not _group:
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
    if _pipe:
        signal.set_wakeup_fd(-1)
        _pipe[1].close()
    sys.exit(status)
