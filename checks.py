"""
What is checked before a run starts: the knobs' ranges, the device and its number format, the data files, the memory.

Every check ends in fail(): one line that says what is wrong, with the values, and what to do next.
"""
import ast
import contextlib
import ctypes
import importlib.util
import io
import mmap
import os
import re
import sys
import time

import numpy as np

REPO = os.path.dirname(os.path.abspath(__file__))


def say(text, error=False):
    """One line on stdout, or stderr, from rank 0. A closed terminal, or a full disk under it, doesn't end a run."""
    if os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr if error else sys.stdout, flush=True)


def warn(text):
    """One line on stderr, from rank 0, about what the run goes on without."""
    say(f'warning: {text}', error=True)


def complain(what, remedy=''):
    """One line on stderr, from rank 0, about what went wrong."""
    say(f'error: {what}' + (f'; {remedy}' if remedy else ''), error=True)


def never_fatal(what, call, *args):
    """The call's result; None and a warning if it raises. For wandb and the picture: no trouble of theirs is a reason not to train."""
    try:
        return call(*args)
    except Exception as e:
        warn(f'{what}: {type(e).__name__}: {e}')


def fail(what, remedy='', who='rank 0'):
    """Ends the program with one line on stderr and status 1. For the user's mistakes; a bug keeps its traceback.

    Under torchrun every rank makes the same mistake, so rank 0 says it. who='node': another machine may have made it
    alone; who='rank': this rank may have.
    """
    rank, local_rank = os.environ.get('RANK', '0'), os.environ.get('LOCAL_RANK', '0')
    if rank != '0' and (who == 'rank' or who == 'node' and local_rank == '0'):
        print(f'error: rank {rank}: {what}; {remedy}', file=sys.stderr, flush=True)
    elif rank != '0':
        time.sleep(10)  # torchrun ends all ranks with the first that exits: that must be one that has spoken
    complain(what, remedy)
    sys.exit(1)


def first_line(e):
    """An exception's text, as far as one line and 200 characters go; its type's name if it has none."""
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def shown(path):
    """The path from where the user stands, if it is shorter so."""
    try:
        return min(os.path.relpath(path), os.path.abspath(path), key=len)
    except ValueError:  # on another drive
        return path


# (what a knob must be, the test of it, the knobs)
RANGES = (
    ('at least 1', lambda v: v >= 1, ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'eval_interval',
                                      'log_interval', 'num_samples', 'max_bytes', 'repeats', 'max_bad_steps')),
    ('at least 0', lambda v: v >= 0, ('max_iters', 'warmup_iters', 'lr_decay_iters', 'save_interval', 'eval_iters', 'weight_decay', 'grad_clip',
                                      'learning_rate', 'min_lr', 'max_new_tokens', 'top_k', 'temperature', 'num_proc', 'rope_base', 'bigrams', 'embd_conv')),
    ('at least 0 and below 2**64', lambda v: 0 <= v < 2 ** 64, ('seed',)),
    ('at least 0 and below 1', lambda v: 0 <= v < 1, ('dropout', 'beta1', 'beta2', 'momentum')),
    ('above 0 and at most 1', lambda v: 0 < v <= 1, ('top_p', 'decay_share')),
)
CHOICES = {
    'parallel': ('ddp', 'zero1', 'fsdp'), 'moments_dtype': ('float32', 'bfloat16'), 'optim': ('adamw', 'muon'), 'lr_schedule': ('cosine', 'wsd'),
    'data_order': ('random', 'epochs'),
    'what': ('train', 'data', 'prefill', 'decode', 'run', 'start'), 'format': ('text', 'jsonl'),
}


def check_ranges(config):
    """Fails where a knob is outside the range it can have, or where knobs contradict each other."""
    for name, choices in CHOICES.items():
        if name in config and config[name] not in choices:
            fail(f'{name}={config[name]!r} is not known', f'use {", ".join(choices[:-1])} or {choices[-1]}')
    for must_be, holds, names in RANGES:
        for name in names:
            if name in config and not holds(config[name]):
                fail(f'{name}={config[name]} is out of range', f'it must be {must_be}')
    if 'n_embd' in config and config['n_embd'] % config['n_head']:
        fail(f'n_embd={config["n_embd"]} is not divisible by n_head={config["n_head"]}',
             f'try --n_embd={max(1, round(config["n_embd"] / config["n_head"])) * config["n_head"]}')
    if config.get('rope_base') and config['n_embd'] // config['n_head'] % 2:
        fail(f'rotary positions need heads of an even size, not n_embd={config["n_embd"]} / n_head={config["n_head"]}', 'try another --n_head')
    # accepted, as nanoGPT does and people rely on it, for a trial of a few iterations say
    if config.get('decay_lr') and config['lr_decay_iters'] <= config['warmup_iters']:
        warn(f'lr_decay_iters={config["lr_decay_iters"]} is not above warmup_iters={config["warmup_iters"]}: the learning rate never decays, '
             'it falls from the warmup to min_lr')
    if config.get('decay_lr') and config['min_lr'] > config['learning_rate']:
        warn(f'min_lr={config["min_lr"]} is above learning_rate={config["learning_rate"]}: the learning rate rises in the end')
    if config.get('decay_lr') and config['min_lr'] == 0 and config['max_iters'] > config['lr_decay_iters']:
        warn(f'the learning rate is 0 from iteration {config["lr_decay_iters"]} on; set --lr_decay_iters={config["max_iters"]}, too')


def make_folder(path, knob='--out_dir'):
    """Makes the folder, if it isn't there; fails if it can't be."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        fail(f'{path!r} cannot be made a folder to write to ({e.strerror})', f'name another with {knob}')


def read_text(path, remedy='name a text file with --input=FILE'):
    """The file's text; fails if it isn't there, is empty or isn't UTF-8."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except OSError as e:
        fail(f'{path} cannot be read ({e.strerror})', remedy)
    except UnicodeDecodeError as e:
        fail(f'{path} is not UTF-8 (byte {e.start})', 'convert it first')
    if not text:
        fail(f'{path} is empty', remedy)
    return text


def choose_device(device, local_rank=0):
    """The torch device string to use for the knob `device`, and why: 'auto' is the best device there is.

    Under torchrun each rank has a GPU of its own, so both 'cuda' and 'cuda:k' mean the local rank's.
    """
    import torch
    why = 'as asked'
    if device == 'auto':
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device, why = (found.type, 'the accelerator found') if found else ('cpu', 'no accelerator found')
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        fail(f'device={device!r} is no device', 'try cpu, cuda, cuda:0, mps, xpu or auto')
    if kind == 'cpu':
        return 'cpu', why
    if not getattr(torch, kind, None) or not getattr(torch, kind).is_available():
        fail(f'device={device!r} is not available on this machine', 'try --device=cpu')
    if kind == 'mps':
        return 'mps', why
    count = getattr(torch, kind).device_count()
    index = local_rank if 'LOCAL_RANK' in os.environ else torch.device(device).index or 0
    if index >= count:
        fail(f'{kind}:{index} is asked for, but there are {count} here', f'use at most {count} processes on this machine', who='rank')
    return f'{kind}:{index}', why


def choose_dtype(dtype, device_type, sampling=False):
    """The number format for the knob `dtype`, and why: 'float32', 'bfloat16' or 'float16', the fastest for training or sampling."""
    import torch
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        fail(f'dtype={dtype!r} is not known', 'try float32, bfloat16, float16 or auto')
    if dtype == 'float16' and device_type != 'cuda':
        return 'float32', f'float16 needs CUDA, this is {device_type}'
    if dtype != 'auto':
        try:
            torch.zeros(1, device=device_type, dtype=getattr(torch, dtype))
        except NotImplementedError:  # no such device, which is another's to say
            pass
        except (RuntimeError, TypeError):
            fail(f'dtype={dtype!r} cannot be computed with on this {device_type} device', 'try --dtype=float32')
        return dtype, 'as asked'
    if device_type == 'cuda':
        # without emulation: cards before Ampere can pretend to have bfloat16, slowly
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ('bfloat16', 'this GPU supports it') if bf16 else ('float16', 'this GPU has no bfloat16')
    if device_type == 'cpu':
        # torch computes bfloat16 on every CPU; these are the ones on which it is the faster of the two
        has = {name: getattr(torch.cpu, f'_is_{name}_supported', lambda: False)() for name in ('amx_tile', 'avx512_bf16')}
        if has['amx_tile']:
            return 'bfloat16', 'this CPU has AMX'
        if has['avx512_bf16'] and not sampling and _cpu_vendor() == 'GenuineIntel':
            # AMX hidden by a virtual machine: 2048-cubed matmuls ran at 150 GFLOP/s in bfloat16, at 300 in float32;
            # sampling is a matter of bytes read, and was 1.6 times faster in bfloat16
            return 'float32', "faster than bfloat16 on Intel's AVX512 without AMX"
        return ('bfloat16', 'this CPU has AVX512-BF16') if has['avx512_bf16'] else ('float32', 'this CPU has no bfloat16 instructions')
    return ('bfloat16', 'XPUs support it') if device_type == 'xpu' else ('float32', f'the default on {device_type}')


def _cpu_vendor():
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('vendor_id'))
    except (OSError, StopIteration):
        return 'unknown'


def choose_compile(compile, device_type):
    """Whether to torch.compile for the knob `compile`, and why."""
    if compile not in ('auto', True, False):
        fail(f'compile={compile!r} is not known', 'use True, False or auto')
    if compile != 'auto':
        return compile, 'as asked'
    if device_type == 'cuda' and importlib.util.find_spec('triton'):
        return True, 'it pays on CUDA'
    return False, 'on CPUs it gains a seventh at most, after half a minute' if device_type == 'cpu' else 'auto compiles only on CUDA'


# dense matmul rate with 16-bit inputs and float32 accumulation, FLOP/s, from the makers' datasheets; the first whose
# words are all among those of the device's name counts
PEAK_FLOPS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 NVL': 835e12, 'H100 PCIe': 756e12, 'H100': 989e12,
    'A100': 312e12, 'A30': 165e12, 'A40': 150e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12, 'L40': 181e12,
    'L4': 121e12, 'V100': 125e12, 'T4': 65e12, 'RTX A6000': 155e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
}


def peak_flops(name):
    """FLOP/s that a GPU of this name can do in 16-bit numbers, or None if it isn't in the table."""
    words = re.findall(r'\w+', name)
    if 'Laptop' in words or 'MIG' in words:  # slower under the same name
        return None
    return next((flops for key, flops in PEAK_FLOPS.items() if set(key.split()) <= set(words)), None)


def locate_data(dataset):
    """The folder with a dataset's train.bin and val.bin, None if there is none.

    Tried in turn: the name as a path and data/<dataset>, first from where the user stands, then in this repository.
    """
    places = [dataset, os.path.join('data', dataset), os.path.join(REPO, dataset), os.path.join(REPO, 'data', dataset)]
    return next((p for p in places if all(os.path.isfile(os.path.join(p, f'{s}.bin')) for s in ('train', 'val'))), None)


def find_data(dataset):
    """locate_data, failing with the command that prepares the dataset if it isn't there."""
    if place := locate_data(dataset):
        return place
    prepare = os.path.join(REPO, 'data', dataset, 'prepare.py')
    if not os.path.isfile(prepare):
        fail(f'there is no dataset {dataset!r}: no folder of that name, nor data/{dataset}, with train.bin and val.bin',
             'python data/text/prepare.py --input=FILE --name=NAME prepares your own text')
    with open(prepare, encoding='utf-8') as f:
        what = (ast.get_docstring(ast.parse(f.read())) or 'no description').splitlines()[0]
    fail(f'dataset {dataset} is not prepared ({what})',
         f'prepare it: python {shown(prepare)}  or start small, without a download: '
         f'python {shown(os.path.join(REPO, "data", "python_char", "prepare.py"))} && '
         f'python {shown(os.path.join(REPO, "train.py"))} config/train_python_char.py')


def open_bin(path, block_size, vocab_size, meta=None):
    """The token ids of a .bin file as a read-only memmap, shape (tokens,), of uint16 or what the dataset's meta dict says.

    Fails if it can't be trained on.

    Only its head and tail are read here; train.py looks at the ids of every batch it takes.
    """
    remedy = f'prepare the dataset in {os.path.dirname(path)} again'
    dtype = (meta or {}).get('dtype', 'uint16')
    size, width = os.path.getsize(path), np.dtype(dtype).itemsize
    if size % width:
        fail(f'{path} has {size} bytes, not a multiple of {width}: it is no {dtype} file or was cut short', remedy)
    if size // width < block_size + 1:
        fail(f'{path} has {size // width} tokens, fewer than block_size + 1 = {block_size + 1}', 'set a smaller --block_size')
    tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder('<'), mode='r')
    if hasattr(tokens._mmap, 'madvise'):
        tokens._mmap.madvise(mmap.MADV_RANDOM)  # a row is a few kB anywhere: reading ahead would fetch 128 for each
    check_ids(np.concatenate((tokens[:4096], tokens[-4096:])), vocab_size, path, who='node')
    return tokens


def forget_pages(tokens):
    """Unmaps what was read of an open_bin: else all of it counts as this process's memory in time, though it is the system's cache.

    For 40 to 200 us after one iteration, so once in a while.
    """
    if hasattr(tokens._mmap, 'madvise'):
        tokens._mmap.madvise(mmap.MADV_DONTNEED)


def check_ids(ids, vocab_size, path, who='rank'):
    """Fails if a token id is beyond the vocabulary: on a GPU it would end in an assertion that names nothing."""
    if ids.max() >= vocab_size:
        fail(f'{path} holds token id {ids.max()}, but the vocabulary has {vocab_size}',
             'the data was made with another tokenizer: prepare it again, or name the right --dataset', who)


def is_gpt2(vocab_size):
    """Whether this may be the size of GPT-2's vocabulary: its 50,257 tokens, or padded to a multiple of up to 1,024."""
    return 50257 <= vocab_size <= 51200


def check_vocabulary(meta, state, data_dir, path, remedy='name the right one with --dataset'):
    """Fails if a dataset (its meta dict, None for GPT-2's BPE) has other tokens than the checkpoint read from path."""
    trained, vocab_size = state.get('meta') or {}, state['model_args']['vocab_size']
    if meta is None and not is_gpt2(vocab_size):
        what = f'{data_dir} has no meta.pkl, so it is GPT-2 BPE'
    elif meta and 'stoi' in trained and trained['stoi'] != meta.get('stoi'):
        what = f'{data_dir} has other characters'
    elif meta and 'stoi' not in trained and meta['vocab_size'] != vocab_size:  # nanoGPT's have no table
        what = f'{data_dir} has a vocabulary of {meta["vocab_size"]}'
    else:
        return
    fail(f'{what}, but {path} was trained on another dataset, with a vocabulary of {vocab_size}', remedy)


def check_accumulation(gradient_accumulation_steps, world_size):
    """Fails if the micro-batches of an iteration can't be shared out evenly over the ranks."""
    if gradient_accumulation_steps % world_size:
        below = gradient_accumulation_steps // world_size * world_size
        near = ' or '.join(str(n) for n in (below, below + world_size) if n)
        fail(f'gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the {world_size} ranks',
             f'use --gradient_accumulation_steps={near}')


def training_bytes(num_params, config, batch_size, dtype, device_type='cuda', compiled=True, recompute=False, parallel='ddp', ranks=1, moments=8):
    """Bytes that training takes on a rank, as (held throughout, activations at their peak); the second is an estimate.

    Held: weights and gradients, 4 bytes each a parameter, and `moments` bytes of AdamW's, as far as they aren't shared out
    (fsdp has the embedding and its gradient whole at times). Activations: what the backward pass keeps of each layer,
    about 34 x C bytes a token in 16-bit numbers (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, without the
    attention matrix, which a CPU keeps with dropout, with masks, and in bfloat16), or if it recomputes them of one layer,
    and of the others what goes in; and the logits with their gradient, whole if compiled, else in pieces of 2**25.
    """
    width, tokens = 1 if dtype != 'float32' else 2, batch_size * config.block_size
    layer = 34 * config.n_embd * width
    if config.dropout and device_type == 'cpu':
        layer += 4 * (config.n_head * config.block_size + config.n_embd) * 2 * width
    elif device_type == 'cpu' and dtype == 'bfloat16' and config.block_size <= 1024:  # see model.attention
        layer += 2 * config.n_head * config.block_size
    layers = layer + 4 * config.n_layer * config.n_embd if recompute else config.n_layer * layer
    logits = tokens * config.vocab_size if compiled else min(tokens * config.vocab_size, 2 ** 25)
    held = {'ddp': (8 + moments) * num_params, 'zero1': (8 + moments / ranks) * num_params,
            'fsdp': (8 + moments) * num_params / ranks + 8 * config.vocab_size * config.n_embd}
    return int(held[parallel if ranks > 1 else 'ddp']), tokens * layers + logits * (4 + 4 + 4 * width)


def keep_freed_memory():
    """Makes glibc keep the memory that tensors on the CPU free, for the next ones.

    By default it hands large blocks back to the system, and every step has each page of them mapped and zeroed again:
    11.1 s a step of config/train_shakespeare_char.py against 7.3. The peak stays the same.
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, all from the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap doesn't shrink


def plan_memory(held, activations, there, device, ranks):
    """Says what training_bytes() estimates, and warns if what isn't there yet may not fit: a system out of memory kills without a word."""
    say(f'memory: {held / 2**30:.2f} GiB for weights, gradients and moments, about {activations / 2**30:.2f} GiB for activations'
        + (', on each rank' if ranks > 1 else ''))
    free = free_memory(device)
    if free is not None and held - there + activations > free:
        warn(f'that may not fit: {free / 2**30:.2f} GiB are free on {device}')


def prepare_terminal():
    """From here on Ctrl-C ends the program without a traceback, and characters that the terminal doesn't have are shown as codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
            if os.name == 'nt' and not stream.isatty():  # a file there would get an old code page
                stream.reconfigure(encoding='utf-8')
    before = sys.excepthook
    sys.excepthook = lambda kind, e, trace: None if issubclass(kind, KeyboardInterrupt) else before(kind, e, trace)


def explain_crashes(device, config):
    """From here on running out of memory ends the program with one line that names ways out."""
    before = sys.excepthook

    def hook(kind, e, trace):
        text = str(e)  # of torch's errors; the CPU's has no class of its own
        if not issubclass(kind, MemoryError) and 'out of memory' not in text and "can't allocate memory" not in text:
            return before(kind, e, trace)
        asked, free = re.search(r'[Tt]ried to allocate ([\d.]+) (\w+)', text), free_memory(device)
        asked = f'{int(asked[1]) / 2**30:.2f} GiB' if asked and asked[2] == 'bytes' else asked.expand(r'\1 \2') if asked else 'more memory'
        batch_size, accumulation = config['batch_size'], config['gradient_accumulation_steps']
        pairs = [f'--batch_size={b} --gradient_accumulation_steps={accumulation * batch_size // b}'
                 for b in range(batch_size // 2, 0, -1) if batch_size % b == 0][:2]
        print(f'error: out of memory on {device}: {asked} asked for, {"an unknown amount" if free is None else f"{free / 2**30:.2f} GiB"} free; '
              + (f'the same {accumulation * batch_size * config["block_size"]:,} tokens/iter with {" or ".join(pairs)}'
                 if pairs else 'use a smaller --block_size or model'), file=sys.stderr, flush=True)

    sys.excepthook = hook


def free_memory(device):
    """Bytes that can still be allocated on the device (a CPU: in the machine); None where the system doesn't say."""
    import torch
    kind = torch.device(device).type
    if kind in ('cuda', 'xpu'):
        return getattr(torch, kind).mem_get_info(device)[0]
    try:
        with open('/proc/meminfo') as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container may have less; 'max' is no number
        limit, used = (open(f'/sys/fs/cgroup/memory.{name}').read() for name in ('max', 'current'))
        free = min(free, max(0, int(limit) - int(used)))
    return free
