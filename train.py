"""
Trains a GPT from scratch, resumes a run, or finetunes GPT-2.

One GPU, CPU or Mac:       python train.py config/train_python_char.py
8 GPUs of one machine:     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
2 machines of 8 GPUs, on each, with its own node_rank and the first one's address, 3 micro-batches a rank:
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 \
        train.py config/train_gpt2.py --gradient_accumulation_steps=48

Every knob below can be set in a config file or as --key=value; --help lists them.
"""
import functools
import gc
import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import checks
import convert
import distributed
import plot
from checks import say
from model import GPT, GPTConfig
from optimizers import total_norm
from tokenizer import mean_bytes, read_meta

# I/O
out_dir = 'out'  # where the checkpoints and metrics.jsonl go, from where you stand
eval_interval = 2000  # iterations between evaluations; each one saves the state
log_interval = 1  # iterations between lines of progress
loss_png = True  # draw out_dir/loss.png when the run ends
eval_iters = 200  # batches that an evaluation averages over, on each split; 0: the whole val split once, and as much of train
eval_only = False  # evaluate, print, exit
always_save_checkpoint = True  # write ckpt.pt at every evaluation; False: only when the val loss is the best so far
save_interval = 0  # iterations between further saves, to ckpt_last.pt; 0 is none
init_from = 'scratch'  # scratch | resume | auto (resume if there is something, else scratch) | gpt2{,-medium,-large,-xl} | folder saved by transformers
seed = 1337  # of the weights, the order of the data and dropout
# wandb
wandb_log = False  # log to Weights & Biases too
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # data/<dataset>, or a path, with train.bin and val.bin
data_order = 'random'  # random (sequences from anywhere) | epochs (side by side, in random order, so that no token comes twice in an epoch)
gradient_accumulation_steps = 5 * 8  # micro-batches an iteration, over all ranks together
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; for finetuning or small data try 0.1 and more
bias = False  # biases in Linear and LayerNorm
rope_base = 0.0  # rotary positions with this base; 0 is GPT-2's learned ones
qk_norm = False  # normalise queries and keys
relu2 = False  # squared ReLU instead of GELU
tied = True  # the output layer is the token embedding once more
bigrams = 0  # rows of a table of embeddings for pairs of neighbouring tokens; 0 is none
embd_conv = 0  # how many tokens before it add to a token's embedding
# optimizer
optim = 'adamw'  # adamw | muon (for the blocks' matrices, AdamW for the rest)
learning_rate = 6e-4  # the highest
max_iters = 600000  # updates in all
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
momentum = 0.95  # of Muon
moments_dtype = 'float32'  # of AdamW's moments: float32 | bfloat16, which takes 12 bytes a parameter instead of 16
grad_clip = 1.0  # largest norm of the gradient; 0 is no clipping
max_bad_steps = 10  # updates in a row skipped, as the gradient's norm wasn't finite, after which the run stops
# learning rate schedule
decay_lr = True  # warm up, then decay; False: learning_rate throughout
lr_schedule = 'cosine'  # cosine | wsd (warm up, stay, and decay in a straight line)
decay_share = 0.5  # of lr_decay_iters, in which wsd decays
warmup_iters = 2000
lr_decay_iters = 600000  # about max_iters, by Chinchilla
min_lr = 6e-5  # the lowest, about learning_rate / 10, by Chinchilla
# several processes, and memory
parallel = 'ddp'  # ddp (each has the whole model) | zero1 (a part of AdamW's state) | fsdp (a part of everything)
activation_checkpointing = False  # compute each layer again in the backward pass instead of keeping what is in it: slower, smaller
# system
backend = 'auto'  # of torch.distributed: nccl | gloo; auto is nccl on GPUs
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu; auto is the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16; auto is the fastest that is safe
compile = 'auto'  # torch.compile the model: True | False; auto is True on CUDA
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

# -----------------------------------------------------------------------------
# what is wrong with the knobs, the data or the machine ends the run here, before anything is written
checks.check_ranges(config)
data_dir = checks.find_data(dataset)
meta = read_meta(data_dir)  # None: GPT-2's BPE
ddp_rank, ddp_local_rank, ddp_world_size = distributed.ranks()
master_process = ddp_rank == 0
checks.check_accumulation(gradient_accumulation_steps, ddp_world_size)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
device, device_why = checks.choose_device(device, ddp_local_rank)
device_type = torch.device(device).type
dtype, dtype_why = checks.choose_dtype(dtype, device_type)
compile, compile_why = checks.choose_compile(compile, device_type)
if optim == 'muon' and parallel == 'zero1':
    checks.fail('muon does not go with parallel=zero1', 'use --parallel=ddp or fsdp')
if optim == 'muon' and moments_dtype != 'float32':
    checks.fail(f'muon does not go with moments_dtype={moments_dtype}', 'leave it at float32')
if parallel == 'fsdp' and dtype == 'float16':
    checks.fail('fsdp does not scale the loss as float16 needs it', 'try --dtype=bfloat16 or --parallel=zero1')
if device_type == 'cpu' and parallel != 'fsdp':  # which gathers to free again: kept, that would be more than it saves
    checks.keep_freed_memory()
checks.explain_crashes(device, config)
run_dir = checkpoint.RunDir(out_dir) if master_process and not eval_only else None  # before it is read: nobody else may write

backend = distributed.init(backend, device)
torch.manual_seed(seed)  # the same on every rank: the same weights
torch.set_float32_matmul_precision('high')  # TF32 where the hardware has it; no effect elsewhere
if compile and device_type == 'cpu':
    torch.use_deterministic_algorithms(True)  # a compiled embedding's backward adds atomically: runs would differ
if device_type == 'cpu':
    torch.ones(1).log()  # by one thread: were two to make a process's first exp or log together, one would be 1e-5 off (MKL; 3 runs of 100)
ptdtype = getattr(torch, dtype)
# no cache: a pass casts each weight once in any case, and would keep all of them to its end
ctx = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=ptdtype, cache_enabled=False)

# -----------------------------------------------------------------------------
# the model
iter_num, best_val_loss, state, was_finished = 0, math.inf, None, False
if int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) and init_from not in ('auto', 'resume') and not eval_only:
    checks.fail(f'with --init_from={init_from}, every restart by torchrun --max-restarts would begin again', 'use --init_from=auto')
if init_from == 'auto':
    init_from = 'resume' if checkpoint.exists(out_dir) else 'scratch'
if init_from == 'scratch':
    vocab_size = meta['vocab_size'] if meta else 50304
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, rope_base=rope_base, qk_norm=qk_norm, relu2=relu2, tied=tied,
                          bigrams=bigrams, embd_conv=embd_conv))
    origin = 'from scratch'
elif init_from == 'resume':
    state, path = checkpoint.load_best(out_dir) if eval_only else checkpoint.load_newest(out_dir)
    checks.check_vocabulary(meta, state, data_dir, path)
    model = checkpoint.build_model(state, dropout)
    iter_num, best_val_loss, was_finished = state['iter_num'], state.get('best_val_loss', math.inf), state.get('finished', False)
    origin = f'resumed from {path} at iteration {iter_num}'
elif convert.is_hf(init_from):
    model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    checks.check_vocabulary(meta, checkpoint.describe(model.config, convert.read_characters(init_from)), data_dir, init_from)
    origin = f'from {init_from}'
else:
    checks.fail(f'init_from={init_from!r} is not known',
                'use scratch, resume, auto, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder saved by transformers')
if block_size > model.config.block_size:
    checks.fail(f'block_size={block_size} is larger than the {model.config.block_size} of {init_from}',
                f'use --block_size={model.config.block_size} or less')
if block_size < model.config.block_size:
    model.crop_block_size(block_size)
if not distributed.same(iter_num):
    checks.fail(f'the ranks found different checkpoints in {out_dir}: rank {ddp_rank} is at iteration {iter_num}',
                'out_dir must be a folder that all machines share, or the same on each', who='rank')
overruled = [f'{k}={config[k]}' for k in vars(model.config) if k in config and k not in ('block_size', 'dropout') and config[k] != getattr(model.config, k)]
for block in model.transformer.h:
    block.recompute = activation_checkpointing
model = distributed.shard(model, device, parallel, dtype, compile)
raw_model = model  # the one that is saved: without the prefixes that compiling and wrapping put before its names

optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, moments_dtype, optim, momentum)
optimizer = distributed.shard_optimizer(optimizer, parallel)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')  # float16 alone has too narrow a range
if state and not eval_only:
    checkpoint.load_optimizer(optimizer, state.get('optimizer'), path)
    given, its_momentum = optimizer.param_groups[0], optimizer.param_groups[-1].get('momentum', momentum)
    if (given['weight_decay'], *given['betas'], its_momentum) != (weight_decay, beta1, beta2, momentum):
        say(f'weight_decay={given["weight_decay"]}, betas={given["betas"]}{f", momentum={its_momentum}" * (optim == "muon")} '
            'come from the checkpoint, not from the knobs')
    if 'scaler' in state:
        scaler.load_state_dict(state['scaler'])
if moments_dtype == 'bfloat16' and optimizer.param_groups[0]['betas'][1] > 0.99:
    checks.fail(f'moments in bfloat16 stand still with beta2={optimizer.param_groups[0]["betas"][1]}', 'use beta2 of 0.99 or less, or --moments_dtype=float32')
wandb_id = state.get('wandb_id') if state else None  # of the run that this one continues
state = None  # frees it

if compile and not distributed.is_sharded(model):
    model = torch.compile(model)
eval_model = model  # without what only training needs
model = distributed.wrap(model, device, parallel)

# -----------------------------------------------------------------------------
# the data: every window of block_size + 1 tokens of a split, as a view of the file
tokens = {split: checks.open_bin(os.path.join(data_dir, f'{split}.bin'), block_size, raw_model.config.vocab_size, meta) for split in ('train', 'val')}
windows = {split: np.lib.stride_tricks.sliding_window_view(tokens[split], block_size + 1) for split in tokens}
per_epoch = max(1, len(windows['train']) // block_size)  # sequences that fit side by side, wherever the first begins
copy_stream = torch.cuda.Stream() if device_type == 'cuda' else None
philox = np.random.Philox(key=seed)
philox_state = philox.state  # to set it takes a tenth of the time that a new generator does


def get_batch(split, starts):
    """Inputs and targets, (len(starts), block_size) each, of the windows that begin at these tokens of the split."""
    rows = windows[split][starts]  # one gather, (B, T + 1)
    checks.check_ids(rows, raw_model.config.vocab_size, os.path.join(data_dir, f'{split}.bin'))
    rows = torch.from_numpy(rows.astype(np.int64))
    if device_type == 'cuda':  # the copy runs beside the computation; only from pinned memory is it asynchronous
        with torch.cuda.stream(copy_stream):
            rows = rows.pin_memory().to(device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(copy_stream)
        rows.record_stream(torch.cuda.current_stream())
    rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


def get_micro_batch(iter_num, micro_step):
    """The training batch of this rank in one micro-step.

    What an iteration reads is a pure function of seed and iter_num: one draw of a counter-based generator gives the
    rows of all micro-batches of all ranks. So no generator's state is saved, and a run that is resumed, or cut up
    over other ranks, reads the same data, if an iteration keeps its number of sequences.
    """
    m = micro_step * ddp_world_size + ddp_rank  # the micro-batch's number among all ranks'
    if data_order == 'epochs':
        first = (iter_num * gradient_accumulation_steps + m) * batch_size
        return get_batch('train', np.array([epoch_starts(n // per_epoch)[n % per_epoch] for n in range(first, first + batch_size)]))
    philox_state['state']['counter'][3] = iter_num
    philox.state = philox_state
    raw = philox.random_raw(gradient_accumulation_steps * batch_size)
    return get_batch('train', raw[m * batch_size:(m + 1) * batch_size] % len(windows['train']))


@functools.lru_cache(1)
def epoch_starts(epoch):
    """Where the sequences of an epoch begin, in their order: (per_epoch,), side by side from another first one in each epoch."""
    rng, slack = np.random.default_rng((seed, epoch)), len(windows['train']) - (per_epoch - 1) * block_size
    return rng.integers(slack) + block_size * rng.permutation(per_epoch)


def seed_dropout(iter_num, micro_step):
    """Makes dropout, too, a pure function of seed, iter_num and the micro-batch's number among all ranks'."""
    m = micro_step * ddp_world_size + ddp_rank
    torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, m)).generate_state(1, np.uint64)[0]))


@torch.no_grad()
def estimate_loss():
    """Mean loss of each split over eval_iters batches, the same ones every time: windows evenly spaced over the split.

    With eval_iters=0 each token of the val split is predicted once, in windows side by side. None if the run is asked to
    stop meanwhile.
    """
    losses = {}
    eval_model.eval()
    for split in ('train', 'val'):
        batches = eval_iters or math.ceil((len(tokens['val']) - 1) / block_size / batch_size)
        last = len(windows[split]) - 1
        starts = np.linspace(0, last, batches * batch_size).astype(np.int64)
        done = np.zeros_like(starts)  # targets of a window that an earlier one has: in the last one, and those that fill its batch
        if split == 'val' and not eval_iters:
            side_by_side = np.arange(batches * batch_size) * block_size
            starts = np.minimum(side_by_side, last)
            done = np.minimum(side_by_side - starts, block_size)
        starts, done = starts.reshape(batches, -1), done.reshape(batches, -1)
        weights = 1 - done.mean(axis=1) / block_size
        loss_sum = torch.zeros((), device=device)
        for k in tqdm(range(0, batches, ddp_world_size), split, leave=False, disable=None if master_process and not eval_iters else True):
            b = min(k + ddp_rank, batches - 1)  # a batch for each rank, as far as they go
            X, Y = get_batch(split, starts[b])
            if weights[b] < 1:
                Y = Y.masked_fill(torch.arange(block_size, device=device) < torch.from_numpy(done[b, :, None]).to(device), -1)
            with ctx:
                loss = eval_model(X, Y, return_logits=False)[1]
            loss_sum += loss * float(weights[b] * (k + ddp_rank < batches))
            checks.forget_pages(tokens[split])
            if distributed.wishes()[0]:
                eval_model.train()
                return None
        losses[split] = distributed.total(loss_sum).item() / float(weights.sum())
    eval_model.train()
    return losses


def get_lr(it):
    """The learning rate of iteration it: linear warmup, then a cosine from learning_rate down to min_lr.

    wsd stays at learning_rate before it goes down (Hu et al. 2024, https://arxiv.org/abs/2404.06395).
    """
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    if lr_schedule == 'wsd':
        return min_lr + min(1, (lr_decay_iters - it) / (decay_share * lr_decay_iters)) * (learning_rate - min_lr)
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 to 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def save_state(best, finished=False):
    """Saves all that a resumed run needs, in nanoGPT's format, with keys of ours that nanoGPT ignores."""
    ours = {'finished': finished}  # up to its last evaluation
    if scaler.is_enabled():
        ours['scaler'] = scaler.state_dict()
    if wandb_run:
        ours['wandb_id'] = wandb_run.id
    if run_dir:
        run_dir.wait()  # for the copy before this one, or there would be two
    # a copy, so that the training goes on while it is written; where there is no room for one the training waits
    copy = device_type != 'cpu' or (checks.free_memory(device) or math.inf) > 1.2 * (4 + moments) * num_params
    state = dict(model=distributed.gather(raw_model.state_dict(keep_vars=True), master_process, copy),
                 optimizer=distributed.gather_optimizer(optimizer, master_process, copy), iter_num=iter_num,
                 best_val_loss=best_val_loss, config=config, **ours, **checkpoint.describe(raw_model.config, meta))
    if run_dir:
        run_dir.save(state, best, copy)


def log(event, **metrics):
    """Adds the event to metrics.jsonl, and wandb hears of evaluations."""
    if run_dir:
        run_dir.log(event=event, **metrics)
    if wandb_run and event == 'eval':
        checks.never_fatal('wandb', wandb_run.log, metrics)


def start_wandb():
    """A wandb run, the one that the checkpoint belongs to if there is one; without a key or a network it is offline."""
    import wandb
    start = dict(project=wandb_project, name=wandb_run_name, config=config, id=wandb_id, resume='allow')
    try:
        return wandb.init(**start)
    except Exception as e:
        checks.warn(f'wandb could not start ({e}), so it logs offline; wandb login, then wandb sync, uploads the run')
        return wandb.init(**start, mode='offline')


# -----------------------------------------------------------------------------
# the run plan: what will happen, in numbers
if iter_num >= max_iters > 0 and was_finished and not eval_only:
    say(f'the run in {out_dir} is finished: it has {iter_num} iterations, max_iters is {max_iters}; a larger --max_iters goes on')
    distributed.shutdown()
say(f'model: {origin}, {raw_model.get_num_params() / 1e6:.2f}M parameters, vocabulary {raw_model.config.vocab_size}'
    + (f' (the checkpoint overrules {", ".join(overruled)})' if overruled else ''))
say(f'data: {data_dir} ({"its own vocabulary" if meta else "no meta.pkl: GPT-2 BPE"}), {len(tokens["train"]):,} train and '
    f'{len(tokens["val"]):,} val tokens; {tokens_per_iter:,} tokens/iter = '
    f'{gradient_accumulation_steps // ddp_world_size} accumulation x {ddp_world_size} ranks x {batch_size} batch x {block_size} block; '
    f'{max_iters} iterations are {max_iters * tokens_per_iter / len(tokens["train"]):.2f} epochs')
threads = f', {torch.get_num_threads()} threads' if device_type == 'cpu' else ''
say(f'machine: {device} ({device_why}){threads}, {dtype} ({dtype_why}), {"compiled" if compile else "not compiled"} ({compile_why})'
    + (f', {ddp_world_size} ranks over {backend}, {parallel}' if backend else f'; {parallel} is for several processes' if parallel != 'ddp' else ''))
moments, num_params = 8 if moments_dtype == 'float32' else 4, raw_model.get_num_params(False)
held, activations = checks.training_bytes(num_params, raw_model.config, batch_size, dtype, device_type,
                                          compile and not distributed.is_sharded(raw_model), activation_checkpointing, parallel, ddp_world_size, moments)
checks.plan_memory(held, activations, there=held * (4 + (moments if init_from == 'resume' else 0)) // (8 + moments), device=device, ranks=ddp_world_size)

wandb_run = checks.never_fatal('wandb', start_wandb) if wandb_log and master_process else None
if run_dir:
    run_dir.begin(fresh=init_from != 'resume', config=config, device=device, dtype=dtype, world_size=ddp_world_size)
    run_dir.warn_of_slow_saves((4 + moments) * num_params)  # of all ranks

# -----------------------------------------------------------------------------
# the loop
if not eval_only:
    distributed.catch_signals()
first_iter = iter_num
bad_steps, worst, skipped = torch.zeros(3, device=device)  # updates skipped in a row by now, at most since the last log, and in all
bad_now, losses = 0, None  # the host's copy of worst; of the last evaluation, None if it was cut off
mfu = None  # a running mean, unknown at first
token_bytes = mean_bytes(tokens['val'][1:], meta) if eval_only or not eval_iters else None
gc.freeze()  # the garbage collector would look at all that is there by now again and again
X, Y = get_micro_batch(iter_num, 0)
t0, timed_from = time.perf_counter(), iter_num
eval_seconds = 0.0  # that the last evaluation took
while True:
    last_step = iter_num >= max_iters
    lr = get_lr(iter_num) if decay_lr else learning_rate
    stop, save_now = distributed.wishes()
    if (stop or bad_now >= max_bad_steps) and not last_step:
        break

    # once in a while: evaluate, and save the state
    if iter_num % eval_interval == 0 or last_step or eval_only:
        eval_began = time.perf_counter()
        if (losses := estimate_loss()) is None:
            stop = distributed.wishes()[0]
            break
        is_best = losses['val'] < best_val_loss
        best_val_loss = min(best_val_loss, losses['val'])
        bits = losses['val'] / math.log(2) / token_bytes if token_bytes else None
        say(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}'
            + (f', perplexity {math.exp(min(losses["val"], 700)):.2f}' if eval_only or not eval_iters else '') + (f', {bits:.4f} bits/byte' if bits else ''))
        log('eval', **{'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val'], 'lr': lr, 'mfu': 100 * mfu if mfu else None},
            **{'val/bits_per_byte': bits} if bits else {})
        if iter_num > first_iter or last_step or is_best and iter_num > 0:  # else it is on disk or not worth keeping
            save_state(best=is_best or always_save_checkpoint, finished=last_step)
        eval_seconds = time.perf_counter() - eval_began
        t0, timed_from = time.perf_counter(), iter_num  # the time isn't the next iteration's
    elif save_now or save_interval and iter_num % save_interval == 0 and iter_num > first_iter:
        save_state(best=False)
        t0, timed_from = time.perf_counter(), iter_num
    if last_step or eval_only:
        break

    # one update
    for group in optimizer.param_groups:
        group['lr'] = lr
    loss_sum = torch.zeros((), device=device)
    micro_steps = gradient_accumulation_steps // ddp_world_size
    for micro_step in range(micro_steps):
        last_micro_step = micro_step == micro_steps - 1
        if dropout:
            seed_dropout(iter_num, micro_step)
        with distributed.sync_gradients(model, now=last_micro_step):
            with ctx:
                _, loss = model(X, Y, return_logits=False)
            # the next batch is made while the device is still busy with this one
            X, Y = get_micro_batch(iter_num + last_micro_step, (micro_step + 1) % micro_steps)
            # 1 + 0 * loss is 1, but nan if the loss isn't finite: then no gradient is, on any rank
            scaler.scale(loss / micro_steps * (1 + 0 * loss.detach())).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = distributed.whole(total_norm(optimizer))
    bad = (~grad_norm.isfinite()).float()
    bad_steps = (bad_steps + 1) * bad
    worst, skipped = torch.maximum(worst, bad_steps), skipped + bad
    if scaler.is_enabled() or device_type == 'mps':  # a GradScaler sets found_inf and grad_scale by itself, the kernel of mps looks at neither
        torch.nn.utils.clip_grads_with_norm_(raw_model.parameters(), grad_clip or math.inf, grad_norm)
    else:
        # what isn't finite must not reach the weights: fused AdamW leaves them, its moments and its count of steps as they
        # are where found_inf is 1, without the host having to know; and it divides by grad_scale, which clips without a
        # pass over all gradients
        distributed.inner(optimizer).found_inf = bad
        distributed.inner(optimizer).grad_scale = (grad_norm / (grad_clip or math.inf)).clamp(min=1)
    if device_type != 'mps' or not bad.item():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    # once in a while: a line of progress
    if iter_num % log_interval == 0:
        checks.forget_pages(tokens['train'])
        loss = distributed.mean(loss_sum / micro_steps).item()  # over the whole batch and all ranks; waits for the device
        dt = (time.perf_counter() - t0) / (iter_num + 1 - timed_from)
        t0, timed_from = time.perf_counter(), iter_num + 1
        bad_now, skipped_now = (int(n) for n in torch.stack((worst, skipped)).tolist())
        worst = torch.zeros_like(worst)
        left = dt * (max_iters - iter_num - 1) + eval_seconds * (max_iters // eval_interval - iter_num // eval_interval)
        now = raw_model.estimate_mfu(batch_size * micro_steps, dt) if iter_num - first_iter >= 5 else None  # the first ones warm up
        mfu = now if mfu is None else 0.9 * mfu + 0.1 * now
        say(f'iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {f"{mfu * 100:.2f}%" if mfu else "n/a"}, '
            f'{tokens_per_iter / dt:,.0f} tokens/s' + (f', {timedelta(seconds=round(left))} left' if iter_num > first_iter else ''))  # the first is slow
        if bad_now:
            checks.warn(f'iter {iter_num}: skipped updates, as their gradient was not finite: {bad_now} in a row, {skipped_now} in all')
        log('iter', iter=iter_num, loss=loss if math.isfinite(loss) else None, ms=1000 * dt, lr=lr, mfu=100 * mfu if mfu else None,
            grad_norm=grad_norm.item() if grad_norm.isfinite() else None, bad_steps=bad_now, skipped=skipped_now)
    iter_num += 1

# the end: either the newest state is on disk, or the exit status says that it isn't
finished = losses is not None and (last_step or eval_only)
if not finished and not eval_only:
    save_state(best=False)
saved = run_dir.close() if run_dir else None
status = 0 if finished else 128 + stop if stop else 1
if run_dir and loss_png and iter_num > first_iter and not stop:  # who stops a run wants it to end
    checks.never_fatal('the picture', plot.draw, [out_dir], os.path.join(out_dir, 'loss.png'))
if run_dir and not saved:
    status = status or 1
    checks.complain(f'the state after {iter_num} iterations could not be saved in {out_dir}', 'what was saved before is still there')
elif finished and not eval_only:
    best = os.path.join(out_dir, checkpoint.BEST)  # which sample.py takes if there is one
    which = 'it' if saved == best or not os.path.exists(best) else f'the best, {best}'
    say(f'saved {saved} after {iter_num} iterations; sample from {which}: python {checks.shown(os.path.join(checks.REPO, "sample.py"))} --out_dir={out_dir}')
elif stop:
    words = [word for word in sys.argv if not word.startswith('--init_from')] + ['--init_from=resume']
    again = shlex.join(['python', *words]) if ddp_world_size == 1 else 'the same command with --init_from=resume'
    say(f'stopped by {signal.Signals(stop).name} after {iter_num} iterations; saved {saved}; to go on: {again}')
elif not finished:
    checks.complain(f'{bad_now} updates in a row had a gradient that is not finite; the weights before them are in {saved}',
                    'try a lower --learning_rate, a smaller --grad_clip, a longer --warmup_iters, or --dtype=bfloat16 for float16')
if wandb_run:
    checks.never_fatal('wandb', wandb_run.finish)
distributed.shutdown(status)
