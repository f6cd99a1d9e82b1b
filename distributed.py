"""
torch.distributed: which rank this is, one model over all ranks, numbers reduced over ranks, and signals that all obey.

With one process the functions here do nothing, but for the signals. With more, a model is trained in one of three ways:

- ddp: every rank has all of it, and gradients are averaged.
- zero1: the same, but each rank keeps AdamW's moments, and makes the updates, of a part of the weights, which all then
  receive. Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054
- fsdp: each rank keeps a part of weights, gradients and moments, and a layer is gathered where it is computed (ZeRO-3).
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
    rank, _, size = ranks()
    if size == 1:
        return None
    if backend == 'auto' or backend == 'nccl' and device.type == 'cpu':  # configs say nccl by habit; it has no CPU side
        backend = {'cuda': 'nccl', 'xpu': 'xccl'}.get(device.type, 'gloo')
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


def shard(model, device, parallel, dtype='float32', compile=False):
    """Moves the model to the device; with fsdp, of each weight this rank's part alone."""
    if parallel == 'fsdp' and dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, as are others: a second that only those who use it wait for
        mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        # a layer's matrices are gathered in the format that they are multiplied in: autocast would keep a copy of each,
        # whole, until the backward pass. The norms and embeddings stay in float32, as under autocast
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            if compile:
                block.attn.compile()
                block.mlp.compile()
            fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    return model.to(device)


def shard_optimizer(optimizer, parallel):
    """The AdamW, or with zero1 one that keeps the moments of this rank's part of the weights alone."""
    if parallel != 'zero1' or not dist.is_initialized():
        return optimizer
    from torch.distributed.optim import ZeroRedundancyOptimizer
    settings = {k: optimizer.defaults[k] for k in ('lr', 'betas', 'eps', 'fused')}
    return ZeroRedundancyOptimizer([dict(group) for group in optimizer.param_groups], optimizer_class=type(optimizer), **settings)


def is_sharded(model):
    """Whether each rank has only a part of the model's weights."""
    return hasattr(next(model.parameters()), 'full_tensor')


def inner(optimizer):
    """The AdamW itself; zero1's is one over this rank's part of the weights, within another over all."""
    return getattr(optimizer, 'optim', optimizer)


def wrap(model, device, parallel):
    """The model with its gradients averaged over the ranks in the backward pass; the model itself if alone."""
    if not dist.is_initialized() or parallel == 'fsdp':
        return model
    device = torch.device(device)
    return DistributedDataParallel(model, device_ids=None if device.type == 'cpu' else [device.index], gradient_as_bucket_view=True)


def sync_gradients(model, now):
    """Context of one micro-step: gradients travel in the last one only, their sum once instead of every part.

    With fsdp they do in each: until then a rank would hold them whole.
    """
    return model.no_sync() if hasattr(model, 'no_sync') and not now else nullcontext()


def whole(tensor):
    """The tensor with the parts of all ranks; every rank must call."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def local(tensor):
    """This rank's part of the tensor, not a copy."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def gather(value, keep=True, copy=True, copies=None):
    """A copy in the CPU's memory of the tensors in containers; what is one tensor (tied weights) stays one.

    copy=False leaves what is in the CPU's memory already where it is.
    What is spread over the ranks is put together, a tensor at a time, so all ranks must call; those that don't keep it
    get None for each.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            tensor = whole(value.detach())
            copies[id(value)] = tensor.to('cpu', copy=copy) if keep else None
        return copies[id(value)]
    if isinstance(value, dict):
        return {k: gather(v, keep, copy, copies) for k, v in value.items()}
    return [gather(v, keep, copy, copies) for v in value] if isinstance(value, list) else value


def gather_optimizer(optimizer, keep=True, copy=True):
    """gather() of the optimizer's state_dict, of what all ranks have of it together."""
    if inner(optimizer) is optimizer:
        return gather(optimizer.state_dict(), keep, copy)
    # zero1's own way, consolidate_state_dict, pickles a rank's part as a whole: 5.2 GB beside the 0.5 of a 124M model's
    params, own = [p for group in optimizer.param_groups for p in group['params']], inner(optimizer).state
    dtype = getattr(inner(optimizer), 'moments_dtype', torch.float32)
    owners = [None] * dist.get_world_size()
    dist.all_gather_object(owners, [i for i, p in enumerate(params) if p in own])
    state = {}
    for i, owner in sorted((i, owner) for owner, theirs in enumerate(owners) for i in theirs):
        p, state[i] = params[i], {}
        for key in ('step', 'exp_avg', 'exp_avg_sq'):
            tensor = own[p][key] if p in own else p.new_empty(()) if key == 'step' else torch.empty_like(p, dtype=dtype)
            dist.broadcast(tensor, owner)
            state[i][key] = gather(tensor, keep, copy)
    return {**torch.optim.Optimizer.state_dict(optimizer), 'state': state}


def like(tensor, parameter):
    """Of a whole tensor the part that this rank has of the parameter of the same shape."""
    if not hasattr(parameter, 'full_tensor') or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # every rank has read it, so that none need send its part
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


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
            elif signal.Signals(number).name in _handlers:
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
