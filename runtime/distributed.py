"""
torch.distributed: starting it, spreading one model over the ranks, and agreeing over the ranks.

With one process the functions here do nothing. With more, a model is trained in one of three ways:

- ddp: each rank has the whole model, and gradients are averaged.
- zero1: like ddp, but each rank has the optimizer's state for a part of the weights. It updates
  that part and sends it to the others. Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054
- fsdp: each rank has a part of weights, gradients and optimizer state, and a layer is gathered
  where it is computed (ZeRO-3).
"""
import os
import sys
import time
import uuid
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime import compiler
from runtime.console import exit_by, fail, get_first_line

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others until it ends


def read_ranks():
    """(ddp_rank, ddp_local_rank, ddp_world_size) as torchrun sets them; (0, 0, 1) without it."""
    names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    set_names = [name for name in names[:3] if name in os.environ]
    missing_names = [name for name in names if name not in os.environ]
    if set_names and missing_names and os.environ.get('WORLD_SIZE') != '1':
        fail(f'the environment has {" and ".join(set_names)}, but not {", ".join(missing_names)}',
             'start several processes with torchrun, which sets them all', who='rank')
    rank, local_rank, world_size = (os.environ.get(name) for name in names[:3])
    return int(rank or 0), int(local_rank or 0), int(world_size or 1)


def init(backend, device):
    """Joins the process group and returns its backend; None with one process."""
    global _group, _vote, _store
    device = torch.device(device)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    rank, _, world_size = read_ranks()
    if world_size == 1:
        return None
    # configs say nccl by habit, but it doesn't work on CPUs
    if backend == 'auto' or backend == 'nccl' and device.type == 'cpu':
        backend = {'cuda': 'nccl', 'xpu': 'xccl'}.get(device.type, 'gloo')
    try:
        _store = make_store(rank, world_size)
    except dist.DistNetworkError as e:
        fail(f'the ranks cannot meet at {os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]} '
             f'({get_first_line(e)})', 'use another --master_port', who='rank')
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size,
                            timeout=TIMEOUT)
    _group, _vote = dist.new_group(backend='gloo', timeout=TIMEOUT), None
    exit_by(exit_at_once)
    return backend


def make_store(rank, world_size):
    """An empty key-value store that all ranks share.

    After a restart by torchrun the store still has the addresses of dead processes
    (https://github.com/pytorch/pytorch/issues/135712; in one of three restarts a rank connected
    to one). So rank 0 gives all living ranks a new prefix. Each asks for it by a new name.
    """
    has_agent_store = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), world_size,
                          is_master=rank == 0 and not has_agent_store, timeout=TIMEOUT)
    name = prefix = uuid.uuid4().hex
    if rank > 0:
        store.set(f'name of {rank}', name)
        prefix = store.get(f'prefix for {name}').decode()  # waits for it
        store.add(f'have {prefix}', 1)
    end = time.monotonic() + TIMEOUT.total_seconds()
    while rank == 0 and store.add(f'have {prefix}', 0) < world_size - 1:
        for other_rank in range(1, world_size):
            if store.check([f'name of {other_rank}']):
                other_name = store.get(f'name of {other_rank}').decode()
                store.set(f'prefix for {other_name}', prefix)
        if time.monotonic() > end:
            raise TimeoutError(f'not all of the {world_size} ranks started within {TIMEOUT}')
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


# -----------------------------------------------------------------------------
# the model and the optimizer
def shard_model(model, device, parallel, dtype='float32', compile=False):
    """Moves the model to the device; with fsdp only this rank's part of each weight."""
    if parallel == 'fsdp' and dtype == 'float16':
        fail('parallel=fsdp does not scale the loss as float16 needs it',
             'try --dtype=bfloat16 or --parallel=zero1')
    if parallel == 'fsdp' and dist.is_initialized():
        # imported here: it takes a second that only fsdp should wait for
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        # a layer's matrices are gathered in the format they are multiplied in: autocast would
        # keep a whole copy of each until the backward pass. Norms and embeddings stay float32
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype),
                                      reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            if compile:
                compiler.compile_in_place(block.attn)
                compiler.compile_in_place(block.mlp)
            fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
    return model.to(device)


def shard_optimizer(optimizer, parallel):
    """The optimizer; with zero1 one that has the state for this rank's part of the weights."""
    if parallel != 'zero1' or not dist.is_initialized():
        return optimizer
    is_amsgrad = any(group.get('amsgrad') for group in optimizer.param_groups)
    if type(optimizer).__name__ not in ('AdamW', 'LowMemoryAdamW') or is_amsgrad:
        fail(f'parallel=zero1 shards only AdamW, not {type(optimizer).__name__}', 'use ddp or fsdp')
    from torch.distributed.optim import ZeroRedundancyOptimizer
    options = {key: optimizer.defaults[key] for key in ('lr', 'betas', 'eps', 'fused')}
    groups = [dict(group) for group in optimizer.param_groups]
    return ZeroRedundancyOptimizer(groups, optimizer_class=type(optimizer), **options)


def is_sharded(model):
    """Whether each rank has only a part of the model's weights."""
    return hasattr(next(model.parameters()), 'full_tensor')


def get_local_optimizer(optimizer):
    """The one that makes this rank's updates: zero1 wraps it in one over all weights."""
    return optimizer.optim if type(optimizer).__name__ == 'ZeroRedundancyOptimizer' else optimizer


def wrap(model, device, parallel):
    """The model with its gradients averaged over the ranks in the backward pass."""
    if not dist.is_initialized() or parallel == 'fsdp':
        return model
    device_ids = None if torch.device(device).type == 'cpu' else [torch.device(device).index]
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def sync_gradients(model, now):
    """The context of a micro-step: ddp sends the summed gradients in the last one."""
    # fsdp sends them in each one; otherwise each rank would have to store all of them
    return nullcontext() if now or not hasattr(model, 'no_sync') else model.no_sync()


# -----------------------------------------------------------------------------
# tensors and numbers over all ranks; every rank must call these functions
def full_tensor(tensor):
    """The whole tensor, from the parts of all ranks."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def local_tensor(tensor):
    """This rank's part of the tensor. It is not a copy."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def shard_like(tensor, parameter):
    """This rank's part of a whole tensor, divided as the parameter of the same shape is."""
    if not hasattr(parameter, 'full_tensor') or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # every rank has the whole tensor, so nothing is sent
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


def gather(value, keep=True, copy=True, copies=None):
    """The tensors in nested dicts and lists, whole and in the CPU's memory.

    With keep=False every tensor becomes None, for ranks that only take part. With copy=False
    tensors that are whole and on the CPU are not copied. Tied weights stay one tensor.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            tensor = full_tensor(value.detach())
            copies[id(value)] = tensor.to('cpu', copy=copy) if keep else None
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: gather(item, keep, copy, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gather(item, keep, copy, copies) for item in value)
    return value


def gather_optimizer(optimizer, keep=True, copy=True):
    """gather() of the optimizer's state_dict."""
    local_optim = get_local_optimizer(optimizer)
    if local_optim is optimizer:
        return gather(optimizer.state_dict(), keep, copy)
    # zero1's own consolidate_state_dict pickles a rank's part as one piece: it took 5.2 GB more
    # for the 0.5 GB of a 124M model
    params = [p for group in optimizer.param_groups for p in group['params']]
    moments_dtype = getattr(local_optim, 'moments_dtype', torch.float32)
    numbers = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, [i for i, p in enumerate(params) if p in local_optim.state])
    owners = {i: rank for rank in range(len(numbers)) for i in numbers[rank]}
    state = {}
    for i in sorted(owners):
        p = params[i]
        state[i] = {}
        for key in ('step', 'exp_avg', 'exp_avg_sq'):
            tensor = torch.empty_like(p, dtype=moments_dtype)
            if key == 'step':
                tensor = p.new_empty(())
            if p in local_optim.state:
                tensor = local_optim.state[p][key]
            dist.broadcast(tensor, owners[i])
            state[i][key] = gather(tensor, keep, copy)
    return {**torch.optim.Optimizer.state_dict(optimizer), 'state': state}


def all_reduce_sum(tensor):
    """The tensor's sum over the ranks."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor):
    """The tensor's mean over the ranks."""
    return all_reduce_sum(tensor) / dist.get_world_size() if dist.is_initialized() else tensor


def can_gather(model, optimizer, seconds=5):
    """Whether all that a checkpoint needs can still be had after an error.

    With ddp rank 0 has all of it. Otherwise every rank must come here within some seconds.
    """
    if not dist.is_initialized():
        return True
    end = time.monotonic() + seconds
    has_parts = is_sharded(model) or get_local_optimizer(optimizer) is not optimizer
    count = _store.add('ranks with an error', 1)
    while count < dist.get_world_size() and has_parts and time.monotonic() < end:
        time.sleep(0.1)
        count = _store.add('ranks with an error', 0)
    return not has_parts or count == dist.get_world_size()


def gather_objects(value):
    """The values of all ranks, as a list. They travel over the CPU."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group)
    return values


_group, _vote = None, None  # for agree(): a process group on CPUs, and the last vote
_store = None  # what all ranks share


def agree(numbers):
    """The largest of each of these whole numbers over the ranks, as of the previous call.

    The first call returns zeros. The ranks vote over the CPU, so the device never waits.
    """
    global _vote
    if not _group:
        return tuple(numbers)
    earlier_vote = _vote
    ballot = torch.tensor(numbers)
    _vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=_group, async_op=True)
    if not earlier_vote:
        return (0,) * len(numbers)
    ballot, work = earlier_vote
    work.wait()
    return tuple(ballot.tolist())


def exit_at_once(status):
    """Ends the process without tidying up.

    DDP leaves gloo's threads running. One of them that frees a tensor while Python shuts down
    aborts the process (seen in one of some 50 short runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shutdown(status=0, release_signals=None):
    """Ends the process with this exit status. Until all ranks are here, signals stay caught."""
    if dist.is_initialized():
        if _vote:
            _vote[1].wait()
        dist.barrier()
        dist.destroy_process_group()
        exit_at_once(status)
    if release_signals:
        release_signals()
    sys.exit(status)
