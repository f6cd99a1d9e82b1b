r"""
Trains a GPT from scratch, resumes a run, or finetunes GPT-2.

One GPU, CPU or Mac:      python train.py config/train_python_bpe.py
8 GPUs of one machine:    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
2 machines of 8 GPUs:     run this on both, with --node_rank=1 on the second one
    torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=10.0.0.1 \
        --master_port=1234 train.py config/train_gpt2.py --gradient_accumulation_steps=48

Every setting below can be set in a config file or as --key=value. --help lists them.
"""
import gc
import math
import os
import time
from contextlib import nullcontext

from runtime import threads  # before torch: it sets how torch's threads wait for each other

import numpy as np
import torch
from tqdm import tqdm

import plot
from model import GPT, GPTConfig
from runtime import checkpoint, distributed, huggingface, kernels, machine, memory, optimizers
from runtime import provenance, ranges, report, restore, settings, signals
from runtime.console import ROOT, act_before_errors, say, try_or_warn, warn
from runtime.dataset import DataOrder, check_vocabulary, find_data, identify_data
from runtime.dataset import list_eval_batches, move_to_device
from runtime.meta import count_mean_bytes, read_meta
from runtime.run_dir import RunDir
from runtime.shards import check_ids, check_mapped_file, forget_pages, open_tokens, view_windows

# I/O
out_dir = 'out'  # folder for checkpoints, metrics.jsonl and loss.png
eval_interval = 2000  # iterations between evaluations; each one also saves the run's state
log_interval = 1  # iterations between progress lines
eval_iters = 200  # batches per evaluation of a split; 0: all of val, the same amount of train
eval_only = False  # evaluate, print the losses and exit
always_save_checkpoint = True  # ckpt.pt at every evaluation; False: only at the best val loss
save_interval = 0  # iterations between additional saves, to ckpt_last.pt; 0: none
init_from = 'scratch'  # scratch | resume | auto (resume if possible) | gpt2* | Hugging Face folder
seed = 1337  # random seed for weights, data order and dropout
# wandb
wandb_log = False  # also log to Weights & Biases
wandb_project = 'owt'  # the project there
wandb_run_name = 'gpt2'  # the run's name there
# data
dataset = 'openwebtext'  # data/<dataset>, or a path, with train.bin and val.bin, or shards
data_order = 'random'  # random (any sequences) | epochs (each token once per epoch, shuffled)
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, of all ranks together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# model
n_layer = 12  # number of blocks
n_head = 12  # attention heads in each block
n_embd = 768  # width of the model: numbers per token
dropout = 0.0  # 0 is good for pretraining; for finetuning or little data try 0.1 or more
bias = False  # use biases in linear layers and LayerNorms
rope_base = 0.0  # base of rotary positions; 0: learned positions, as in GPT-2
qk_norm = False  # normalize queries and keys
relu2 = False  # squared ReLU instead of GELU
tied = True  # share weights between the token embedding and the output layer
bigrams = 0  # rows of an embedding table for pairs of neighboring tokens; 0: none
embd_conv = 0  # number of previous tokens mixed into each token's embedding; 0: none
# optimizer
optim = 'adamw'  # adamw | muon (for the matrices of the blocks, and AdamW for the rest)
learning_rate = 6e-4  # peak learning rate
max_iters = 600000  # total number of updates
weight_decay = 1e-1  # for matrices and embeddings
beta1 = 0.9  # decay of AdamW's first moment
beta2 = 0.95  # decay of AdamW's second moment
momentum = 0.95  # Muon's momentum
moments_dtype = 'float32'  # AdamW's moments: float32 | bfloat16 (12 bytes per parameter, not 16)
grad_clip = 1.0  # clip gradients at this norm; 0: no clipping
max_bad_steps = 10  # stop after this many updates in a row with NaN or infinite gradients
# learning rate schedule
decay_lr = True  # use the schedule; False: learning_rate all the time
lr_schedule = 'cosine'  # cosine | wsd (warm up, stay, decay linearly)
decay_share = 0.5  # wsd decays in this last share of lr_decay_iters
warmup_iters = 2000  # the learning rate rises linearly until here
lr_decay_iters = 600000  # min_lr from here on; about max_iters, as in Chinchilla
min_lr = 6e-5  # final learning rate, about learning_rate / 10, as in Chinchilla
# several processes, and memory
parallel = 'ddp'  # ddp (copies) | zero1 (shards optimizer state) | fsdp (shards the weights, too)
activation_checkpointing = False  # compute activations twice instead of storing them: less memory
# system
backend = 'auto'  # nccl | gloo | auto: nccl on GPUs
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu | auto: the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16 | auto: the fastest that is safe
compile = 'auto'  # torch.compile the model: True | False | auto: True on CUDA
# reads config files and flags, and defines config, a dict of all settings
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

# -----------------------------------------------------------------------------
# the machine; mistakes in settings, data or machine end the run here, before it writes a file
settings.check(config)
data_dir = find_data(dataset)
meta = read_meta(data_dir)  # None: GPT-2's BPE
data_id = identify_data(data_dir, meta)  # tells it from other data
ddp_rank, ddp_local_rank, ddp_world_size = distributed.read_ranks()
master_process = ddp_rank == 0
ranges.check_accumulation(gradient_accumulation_steps, batch_size, ddp_world_size)
device, device_reason = machine.choose_device(device, ddp_local_rank)
device_type = torch.device(device).type
dtype, dtype_reason = machine.choose_dtype(dtype, device_type)
compile, compile_reason = machine.choose_compile(compile, device_type)
memory.explain_out_of_memory(device, batch_size, block_size, gradient_accumulation_steps)
machine.prepare_training(device_type, compile, parallel)
run_dir = RunDir(out_dir) if master_process and not eval_only else None  # locks the folder
backend = distributed.init(backend, device)
provenance.check_ranks(config, data_id)
torch.manual_seed(seed)  # the same on all ranks: they start with the same weights
ctx = nullcontext() if dtype == 'float32' else torch.autocast(
    device_type, dtype=getattr(torch, dtype), cache_enabled=False)  # the cache takes memory

# -----------------------------------------------------------------------------
# the model
state = {}  # the checkpoint to resume from
ranges.check_restarts(init_from, eval_only)
if init_from == 'auto':
    init_from = checkpoint.choose_init_from(out_dir)
if init_from == 'scratch':
    model_args = restore.choose_args(GPTConfig, config)  # the settings that are fields of it
    model_args['vocab_size'] = meta['vocab_size'] if meta else 50304
    model = GPT(GPTConfig(**model_args))
    origin = 'from scratch'
elif init_from == 'resume':
    load_state = checkpoint.load_best if eval_only else checkpoint.load_newest
    state, path = load_state(out_dir)
    check_vocabulary(meta, state, data_dir, path)
    model = restore.build_model(GPT, GPTConfig, state, path, dropout)
    origin = f'resumed from {path} at iteration {state["iter_num"]}'
elif huggingface.is_huggingface(init_from):
    model = restore.load_pretrained(GPT, init_from, dropout)
    vocabulary = checkpoint.describe(model.config, huggingface.read_tokenizer(init_from))
    check_vocabulary(meta, vocabulary, data_dir, init_from)
    origin = f'from {init_from}'
else:
    huggingface.fail_unknown(init_from, 'scratch, resume, auto')
provenance.check_iterations(state.get('iter_num', 0), out_dir)
restore.fit_block_size(model, block_size, init_from, eval_only)
kernels.accelerate(model, device_type, dtype)  # faster parts, except those that you changed
if activation_checkpointing:
    kernels.recompute_blocks(model)
# raw_model is the GPT itself. model is its compiled or DDP form, which the loop calls
raw_model = distributed.shard_model(model, device, parallel, dtype, compile)
model = raw_model
if compile and not distributed.is_sharded(model):
    model = kernels.compile_model(model)
model = distributed.wrap(model, device, parallel)

# -----------------------------------------------------------------------------
# the optimizer, and where the run continues
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
optimizer = optimizers.specialize(optimizer, optim, moments_dtype, momentum, raw_model, dtype)
state_bytes = optimizers.count_state_bytes(optimizer)
optimizer = distributed.shard_optimizer(optimizer, parallel)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')  # for tiny gradients
iter_num = state.get('iter_num', 0)
best_val_loss = state.get('best_val_loss', math.inf)
if state and not eval_only:
    overruled_options = restore.load_optimizer(optimizer, scaler, state, path)
    if not provenance.print_changes(state, config, data_id, overruled_options):
        best_val_loss = math.inf  # it was on other data
wandb_id = state.get('wandb_id')
was_finished = state.get('finished', False)
state = None  # frees the memory

# -----------------------------------------------------------------------------
# the data: windows[split][i] are the tokens i to i + block_size, read from the file when used
tokens, windows = {}, {}
for split in ('train', 'val'):  # a split that you add here is evaluated, too
    tokens[split] = open_tokens(data_dir, split, block_size, raw_model.config.vocab_size, meta)
    windows[split] = view_windows(tokens[split], block_size + 1)
order = DataOrder(data_order, seed, len(tokens['train']), block_size, batch_size,
                  gradient_accumulation_steps)


def get_batch(split, starts):
    """Inputs X and targets Y, (B, T) each, of the sequences that begin at these tokens."""
    check_mapped_file(tokens[split])
    rows = windows[split][starts]  # (B, T + 1), in one read
    check_ids(rows, raw_model.config.vocab_size, f'the {split} split of {data_dir}')
    rows = move_to_device(rows, device)
    return rows[:, :-1], rows[:, 1:].clone()  # X and Y don't share memory


def get_train_batch(iter_num, micro_step):
    """The batch of this rank in a micro-step. It depends only on the seed and these numbers."""
    seed_micro_step(iter_num, micro_step, 1)  # for a get_batch that draws
    return get_batch('train', order.get_starts(iter_num, micro_step * ddp_world_size + ddp_rank))


def seed_micro_step(iter_num, micro_step, part=0):
    """Makes dropout, and all else that draws, depend only on the seed and these numbers.

    part is 0 for the model and 1 for the data.
    """
    index = micro_step * ddp_world_size + ddp_rank
    sequence = np.random.SeedSequence((seed, iter_num, index, part))
    # torch.manual_seed also looks for GPUs, which takes 0.4 ms
    set_seed = torch.default_generator.manual_seed if device_type == 'cpu' else torch.manual_seed
    set_seed(int(sequence.generate_state(1, np.uint64)[0]))


@torch.no_grad()
def estimate_loss():
    """The mean loss of each split, always on the same batches; None if the run must stop."""
    losses = {}
    model.eval()
    for split in tokens:
        batches, total_weight = list_eval_batches(tokens, split, block_size, batch_size, eval_iters,
                                                  ddp_rank, ddp_world_size)
        loss_sum = torch.zeros((), device=device)
        disable = None if master_process and eval_iters == 0 else True  # None: only on terminals
        for starts, mask, weight in tqdm(batches, split, leave=False, disable=disable):
            X, Y = get_batch(split, starts)
            if mask is not None:  # these targets are also in an earlier sequence
                Y = Y.masked_fill(mask.to(device), -1)
            with ctx, kernels.loss_only(raw_model):
                _, loss = model(X, Y)
            loss_sum += loss * weight
            forget_pages(tokens[split])
            busy_note.check()
            if distributed.agree(signals.read_requests())[0]:
                model.train()
                return None
        losses[split] = distributed.all_reduce_sum(loss_sum).item() / total_weight
    model.train()
    return losses


def get_lr(it):
    """The learning rate of iteration it: linear warmup, then decay from learning_rate to min_lr.

    cosine decays from the warmup's end on. wsd stays at learning_rate first, then decays linearly
    (Hu et al. 2024, https://arxiv.org/abs/2404.06395).
    """
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    if lr_schedule == 'wsd':
        coeff = min(1, (lr_decay_iters - it) / (decay_share * lr_decay_iters))
    else:
        decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 to 1
        coeff = 0.5 * (1 + math.cos(math.pi * decay_ratio))  # 1 to 0
    return min_lr + coeff * (learning_rate - min_lr)


def save_checkpoint(is_best, finished=False, val_loss=None):
    """Saves all that a resumed run needs, in nanoGPT's format. All ranks must call it."""
    if not checkpoint.has_finite_weights(raw_model):  # they must not replace finite ones
        return warn(f'the weights after {iter_num} iterations are not finite: they are not saved')
    if run_dir:
        run_dir.wait()  # until the save before is written: memory has room for one copy
    # training continues while a thread writes the copy; without room for a copy it waits
    copy = memory.has_room(4 * raw_model.get_num_params(False) + state_bytes, device)
    weights = raw_model.state_dict(keep_vars=True)
    state = dict(model=distributed.gather(weights, master_process, copy),
                 optimizer=distributed.gather_optimizer(optimizer, master_process, copy),
                 optimizer_name=restore.get_optimizer_name(optimizer),
                 iter_num=iter_num, best_val_loss=best_val_loss, config=config, finished=finished,
                 data=data_id, val_loss=val_loss, **checkpoint.describe(raw_model.config, meta))
    if scaler.is_enabled():
        state['scaler'] = scaler.state_dict()
    if wandb_run:
        state['wandb_id'] = wandb_run.id
    if run_dir:
        run_dir.save(state, is_best, copy)


def save_after_error(frames):
    """Saves what an error would lose, unless it came in the middle of an update."""
    global iter_num
    iter_num = max(iter_num, first_iter + bad_steps.num_steps)  # an update may have been the last
    is_new = iter_num > first_iter and not optimizers.is_updating(frames)
    if is_new and distributed.can_gather(raw_model, optimizer):
        save_checkpoint(is_best=False)
        report.print_rescue(run_dir, out_dir, iter_num, ddp_world_size)


# -----------------------------------------------------------------------------
# the run plan
if was_finished and iter_num >= max_iters > 0 and not eval_only:
    say(f'the run in {out_dir} is finished: {iter_num} of {max_iters} iterations. '
        'To train longer, set a larger --max_iters')
    distributed.shutdown()  # ends the process
report.print_plan(origin, raw_model, config, data_dir, meta, tokens, (device, device_reason),
                  (dtype, dtype_reason), (compile, compile_reason), backend, ddp_world_size,
                  state_bytes, iter_num)
wandb_run = None
if wandb_log and master_process:
    wandb_run = try_or_warn('wandb', report.start_wandb, wandb_project, wandb_run_name, config,
                            wandb_id)
if run_dir:
    run_dir.begin(is_new=init_from != 'resume', config=config, device=device, dtype=dtype,
                  world_size=ddp_world_size)

# -----------------------------------------------------------------------------
# the loop
if not eval_only:
    signals.catch()
micro_steps = gradient_accumulation_steps // ddp_world_size
exact_eval = eval_only or eval_iters == 0  # it also prints perplexity and bits per byte
token_bytes = count_mean_bytes(tokens['val'][1:], meta) if exact_eval else None
peak_flops = machine.find_peak_flops(device)
first_iter = iter_num
mfu = None  # a running mean
bad_steps = optimizers.BadSteps(device)  # counts skipped updates on the device
busy_note = threads.BusyNote()  # says if other programs take CPU time, and spreads threads
gc.freeze()  # the garbage collector need not look at all these objects again and again
X, Y = get_train_batch(iter_num, 0)
eval_seconds = 0.0  # of the last evaluation
losses = None
t0, t0_iter = time.perf_counter(), iter_num  # the next progress line counts from here
act_before_errors(save_after_error)  # until the end of the loop
while True:
    last_step = iter_num >= max_iters
    lr = get_lr(iter_num) if decay_lr else learning_rate
    is_save_due = save_interval and iter_num % save_interval == 0
    stop_signal, save_requested = distributed.agree(signals.read_requests())
    if (stop_signal or bad_steps.streak >= max_bad_steps) and not last_step:
        break

    # once in a while: evaluate, and save a checkpoint
    if iter_num % eval_interval == 0 or last_step or eval_only:
        bad_steps.read(iter_num)  # waits for the device
        eval_start = time.perf_counter()
        losses = estimate_loss()
        if losses is None:
            stop_signal, _ = distributed.agree(signals.read_requests())
            break
        is_best = losses['val'] < best_val_loss
        best_val_loss = min(best_val_loss, losses['val'])
        metrics = {'iter': iter_num, **{f'{split}/loss': losses[split] for split in losses},
                   'lr': lr, 'mfu': mfu and 100 * mfu}
        if token_bytes:
            metrics['val/bits_per_byte'] = losses['val'] / math.log(2) / token_bytes
        say(report.format_eval(metrics, exact_eval))
        if run_dir:
            run_dir.log(event='eval', **metrics)
        if wandb_run:
            try_or_warn('wandb', wandb_run.log, metrics)
        # only if something is new: iterations, the end, or a best loss
        if iter_num > first_iter or last_step or (is_best and iter_num > 0):
            keeps_all = always_save_checkpoint and math.isfinite(losses['val'])
            save_checkpoint(is_best or keeps_all, last_step, losses['val'])
        eval_seconds = time.perf_counter() - eval_start
        t0 += eval_seconds  # progress lines count only training
    elif save_requested or (is_save_due and iter_num > first_iter):
        machine.synchronize(device)
        save_start = time.perf_counter()
        save_checkpoint(is_best=False)
        t0 += time.perf_counter() - save_start
    if last_step or eval_only:
        break

    # one update
    for group in optimizer.param_groups:
        group['lr'] = lr
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        last_micro_step = micro_step == micro_steps - 1
        seed_micro_step(iter_num, micro_step)
        with distributed.sync_gradients(model, now=last_micro_step):
            with ctx, kernels.loss_only(raw_model):  # logits would take much memory
                _, loss = model(X, Y)
            # get the next batch while the device is busy
            next_micro_step = iter_num * micro_steps + micro_step + 1
            X, Y = get_train_batch(*divmod(next_micro_step, micro_steps))
            loss_sum += loss.detach()
            loss = optimizers.nan_unless_finite(loss) / micro_steps  # NaN: this update is skipped
            scaler.scale(loss).backward()
    grad_norm = optimizers.clip_and_step(optimizer, scaler, grad_clip)  # no update if it is NaN
    optimizer.zero_grad(set_to_none=True)
    bad_steps.count(grad_norm)
    busy_note.check()

    # once in a while: a progress line
    if iter_num % log_interval == 0:
        forget_pages(tokens['train'])
        loss = distributed.all_reduce_mean(loss_sum / micro_steps).item()  # waits for the device
        dt = (time.perf_counter() - t0) / (iter_num + 1 - t0_iter)
        t0, t0_iter = time.perf_counter(), iter_num + 1
        if peak_flops and iter_num - first_iter >= 5:  # the first iterations warm up
            new_mfu = raw_model.estimate_mfu(batch_size * micro_steps, dt)  # of an A100
            new_mfu *= machine.A100_FLOPS / peak_flops
            mfu = new_mfu if mfu is None else 0.9 * mfu + 0.1 * new_mfu
        evals_left = max_iters // eval_interval - iter_num // eval_interval
        seconds_left = dt * (max_iters - iter_num - 1) + eval_seconds * evals_left
        say(report.format_iter(iter_num, loss, dt, mfu, config,
                               seconds_left if iter_num > first_iter else None))
        bad_steps.read(iter_num)  # sets streak and total
        if run_dir:
            run_dir.log(event='iter', iter=iter_num, loss=loss if math.isfinite(loss) else None,
                        ms=1000 * dt, lr=lr, mfu=mfu and 100 * mfu,
                        grad_norm=grad_norm.item() if grad_norm.isfinite() else None,
                        bad_steps=bad_steps.streak, skipped=bad_steps.total)
    iter_num += 1

# -----------------------------------------------------------------------------
# the end: save the last state; if that fails, exit with an error
finished = (last_step or eval_only) and losses is not None
act_before_errors(None)
if not finished and not eval_only:
    save_checkpoint(is_best=False)
path = run_dir.close(iter_num) if run_dir else ''
if run_dir and iter_num > first_iter and not stop_signal:  # after a signal it must end quickly
    try_or_warn('loss.png', plot.draw, [run_dir.path], os.path.join(run_dir.path, 'loss.png'))
status = report.print_end(out_dir, path, iter_num, finished, eval_only, stop_signal,
                          bad_steps.streak >= max_bad_steps, bad_steps.streak, ddp_world_size)
if wandb_run:
    try_or_warn('wandb', wandb_run.finish)
distributed.shutdown(status, signals.release)
