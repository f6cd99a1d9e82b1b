"""
What the scripts say: a training run's plan, progress and end, and the memory that sampling needs.
"""
import math
import os
import signal
from datetime import timedelta

import torch

from runtime import checkpoint, inference, kernels, linears, memory, previous_runs
from runtime.console import (
    format_bytes,
    format_command,
    format_script,
    note,
    report_error,
    say,
    warn,
)

MAX_PASSES = 10  # over the train tokens; more are too many for most models


def print_plan(origin, model, config, data_dir, meta, tokens, device, dtype, compile, backend,
               ranks, optimizer_bytes, iter_num):
    """Prints what will happen. device, dtype and compile are (choice, reason) each."""
    print_model(origin, model, config)
    print_data(data_dir, meta, tokens, config, ranks)
    if config['eval_only'] and origin == 'from scratch' and previous_runs.exists(config['out_dir']):
        warn(f'this model is new, and not the one in {config["out_dir"]}: '
             'to evaluate that one use --init_from=resume')
    print_machine(device, dtype, compile, backend, config['parallel'], ranks)
    print_memory(model, optimizer_bytes, config, device[0], dtype[0], compile[0], ranks,
                 is_resumed=iter_num > 0)
    if iter_num >= config['max_iters'] and iter_num and not config['eval_only']:
        say(f'the run is at iteration {iter_num}, so with max_iters={config["max_iters"]} it only '
            'evaluates and saves')


def print_model(origin, model, config):
    """Prints where the model comes from, its size, and which settings it doesn't follow."""
    text = (f'model: {origin}, number of parameters: {model.get_num_params() / 1e6:.2f}M, '
            f'vocabulary {model.config.vocab_size}')
    ignored_settings = [f'{name}={config[name]}' for name, value in vars(model.config).items()
                        if name in config and name not in ('block_size', 'dropout')
                        and config[name] != value]
    if ignored_settings:
        text += f' (ignored, because the weights have other values: {", ".join(ignored_settings)})'
    say(text)


def count_tokens(config):
    """The tokens of an iteration, on all ranks together."""
    sequences = config['gradient_accumulation_steps'] * config['batch_size']
    return sequences * config['block_size']


def print_data(data_dir, meta, tokens, config, ranks):
    """Prints what is read: the dataset's size, and the tokens of an iteration and of the run."""
    vocabulary = 'its own vocabulary' if meta else 'no meta.pkl: GPT-2 BPE'
    say(f'data: {data_dir} ({vocabulary}), {len(tokens["train"]):,} train tokens and '
        f'{len(tokens["val"]):,} val tokens')
    steps, batch_size = config['gradient_accumulation_steps'], config['batch_size']
    tokens_per_iter = count_tokens(config)
    passes = config['max_iters'] * tokens_per_iter / len(tokens['train'])
    factors = ((steps // ranks, 'micro-batch', 'es'), (ranks, 'rank', 's'),
               (batch_size, 'sequence', 's'), (config['block_size'], 'token', 's'))
    product = ' x '.join(f'{n} {noun}' if n == 1 else f'{n} {noun}{plural}'
                         for n, noun, plural in factors)
    say(f'tokens per iteration will be: {tokens_per_iter:,} = {product}; '
        f'{config["max_iters"]} iterations read the train tokens {passes:.2f} times')
    if passes > MAX_PASSES and not config['eval_only']:
        advice = 'ckpt.pt keeps the weights with the best val loss'
        if config['always_save_checkpoint']:
            advice = f'With --always_save_checkpoint=False {advice}'
        say(f'warning: after about {MAX_PASSES} passes a model learns the train tokens by heart, '
            f'and the val loss may rise again. {advice}. --dropout helps')


def describe_checkpoint(state, path):
    """What a checkpoint says of its weights: their iteration, and their val loss if it knows it."""
    text = f'{path}, iteration {state["iter_num"]}'
    if 'val_loss' in state:
        return f'{text}, val loss {state["val_loss"]:.4f}'
    if math.isfinite(state['best_val_loss']):
        return f'{text}, best val loss of its run {state["best_val_loss"]:.4f}'
    return f'{text}, val loss not known'


def print_machine(device, dtype, compile, backend=None, parallel='ddp', ranks=1):
    """Prints what computes, and why. device, dtype and compile are (choice, reason) each."""
    text = f'machine: {device[0]} ({device[1]})'
    if device[0] == 'cpu':
        threads = torch.get_num_threads()
        text += ', 1 thread' if threads == 1 else f', {threads} threads'
    text += f', {dtype[0]} ({dtype[1]})'
    if compile[0] is not None:
        text += ', compiled' if compile[0] else ', not compiled'
        text += f' ({compile[1]})'
    if backend:
        text += f', {ranks} ranks over {backend}, {parallel}'
    elif parallel != 'ddp':
        text += f'; parallel={parallel} needs several processes, so it has no effect'
    say(text)


def print_memory(model, optimizer_bytes, config, device, dtype, compile, ranks, is_resumed):
    """Prints an estimate of the memory that training needs on each rank."""
    parallel = config['parallel'] if ranks > 1 else 'ddp'
    num_params = model.get_num_params(False)
    state_bytes, activation_bytes = memory.estimate_training_bytes(
        model.config, num_params, optimizer_bytes, config['batch_size'], dtype,
        torch.device(device).type, kernels.stores_logits(model), compile and parallel != 'fsdp',
        config['activation_checkpointing'], parallel, ranks)
    allocated_bytes = 4 * num_params
    if is_resumed:
        allocated_bytes += optimizer_bytes
    allocated_bytes = state_bytes * allocated_bytes // (8 * num_params + optimizer_bytes)
    memory.plan_memory(state_bytes, activation_bytes, allocated_bytes, device, ranks)


def start_wandb(project, name, config, run_id):
    """Starts or continues the wandb run; without a key or a network it logs offline."""
    import wandb  # here: most runs don't use it
    options = dict(project=project, name=name, config=config, id=run_id, resume='allow')
    try:
        return wandb.init(**options)
    except Exception as e:
        warn(f'wandb could not start ({e}), so it logs offline. '
             'Run `wandb login` and `wandb sync` to upload the run later')
        return wandb.init(**options, mode='offline')


# -----------------------------------------------------------------------------
# while it trains
def format_eval(metrics, with_perplexity):
    """The line for an evaluation."""
    splits = [key.removesuffix('/loss') for key in metrics if key.endswith('/loss')]
    losses = [f'{split} loss {metrics[split + "/loss"]:.4f}' for split in splits]
    text = f'step {metrics["iter"]}: ' + ', '.join(losses)
    val_loss = metrics['val/loss']
    if with_perplexity:
        text += f', perplexity {math.exp(min(val_loss, 700)):.2f}'
    if 'val/bits_per_byte' in metrics:
        text += f', {metrics["val/bits_per_byte"]:.4f} bits/byte'
    return text


def format_iter(iter_num, loss, dt, mfu, config, seconds_left):
    """The progress line: dt is the seconds of an iteration; mfu and seconds_left may be None."""
    text = f'iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu '
    text += 'n/a' if mfu is None else f'{mfu * 100:.2f}%'
    text += f', {count_tokens(config) / dt:,.0f} tokens/s'
    if seconds_left is not None and seconds_left < 1e10:  # a timedelta has a limit
        text += f', {timedelta(seconds=round(seconds_left))} left'
    return text


# -----------------------------------------------------------------------------
# the end
def print_end(out_dir, path, iter_num, finished, eval_only, stop_signal, has_failed, bad_steps,
              ranks):
    """Prints how the run ended and what to do next, and returns the exit status.

    path is the newest checkpoint, or None if it could not be saved. has_failed: the last bad_steps
    updates in a row were skipped.
    """
    finished = finished and not has_failed
    status = 1
    if finished:
        status = 0
    elif stop_signal:
        status = 128 + stop_signal
    if eval_only:
        return status
    if path is None:
        remedy = 'nothing has been saved'
        if checkpoint.exists(out_dir):
            remedy = 'what was saved before is still there'
        report_error(f'the state after {iter_num} iterations could not be saved in {out_dir}',
                     remedy)
        return status or 1
    if finished:
        folder = os.path.dirname(path)  # somebody may have renamed out_dir
        best_path = os.path.join(folder, checkpoint.BEST)
        target = 'it'
        if path != best_path and os.path.exists(best_path):  # sample.py prefers that one
            target = f'the best, {best_path}'
        say(f'saved {path} after {iter_num} iterations; sample from {target}: '
            f'{format_script("sample.py", f"--out_dir={folder}")}')
    elif stop_signal:
        say(f'stopped by {signal.Signals(stop_signal).name} after {iter_num} iterations; '
            f'saved {path}; to continue: {format_resume(path, out_dir, ranks)}')
    elif not has_failed:  # somebody has left the loop by a way of their own
        say(f'stopped after {iter_num} iterations; saved {path}')
        status = 0
    else:
        report_error(f'{bad_steps} updates in a row had a gradient that is not finite; '
                     f'the weights from before them are in {path}',
                     'try a lower --learning_rate, a smaller --grad_clip, a longer '
                     '--warmup_iters, or --dtype=bfloat16 instead of float16')
    return status


def format_resume(path, out_dir, ranks):
    """The command that continues the run of the checkpoint at path."""
    flags = {'init_from': 'resume'}
    folder = os.path.dirname(path)
    if folder != out_dir:  # somebody has renamed it
        flags['out_dir'] = folder
    if ranks > 1:  # torchrun's own options aren't known here
        return f'the same command with {" ".join(f"--{key}={flags[key]}" for key in flags)}'
    return format_command(**flags)


def print_rescue(run_dir, out_dir, iter_num, ranks):
    """Waits until the state is saved after an error, and prints where it is."""
    path = run_dir.close(iter_num) if run_dir else None
    if path:
        note(f'the state after {iter_num} iterations is in {path}; '
             f'to continue: {format_resume(path, out_dir, ranks)}')


# -----------------------------------------------------------------------------
# sampling
def describe_memory(model, prompt_length, max_new_tokens, rows):
    """One line about the memory of the weights and the KV cache."""
    weight_bytes = sum(p.nbytes for p in model.parameters()) + linears.count_bytes(model)
    row_bytes = inference.count_cache_bytes(model, prompt_length, max_new_tokens)
    return (f'{format_bytes(weight_bytes)} of weights; batch of {rows}, '
            f'KV cache of {format_bytes(row_bytes)} per sample')
