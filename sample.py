"""
Generates text from a checkpoint of train.py or nanoGPT, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --start=FILE:prompt.txt --temperature=0 --num_samples=1
    python sample.py --init_from=gpt2 --interactive

The text goes to stdout, everything else to stderr. Every knob below can be set in a config file or as --key=value.
"""
import ast
import codecs
import contextlib
import functools
import json
import math
import os
import sys

import torch
from tqdm import tqdm

import checkpoint
import checks
import convert
from model import GPT
from tokenizer import get_tokenizer

# what
init_from = 'resume'  # resume (the checkpoint in out_dir) | gpt2{,-medium,-large,-xl} | folder saved by transformers
out_dir = 'out'  # the checkpoint's folder
start = '\n'  # the prompt, or FILE:prompt.txt
num_samples = 10  # continuations of it
max_new_tokens = 500  # in each
# how
temperature = 0.8  # below 1 less random, above 1 more; 0 always takes the likeliest token
top_k = 200  # draw from the k likeliest tokens alone; 0 is off
top_p = 1.0  # draw from the likeliest tokens that hold this much probability; 1.0 is off
stop = ''  # end a sample before this text; several: "['\n\n', '<|endoftext|>']"
stream = False  # print tokens as they come, one sample at a time
interactive = False  # ask for prompts, and print what follows as it comes
format = 'text'  # text | jsonl (a line of JSON for each sample)
seed = 1337
# system
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu; auto is the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16; auto is the fastest that is safe
compile = 'auto'  # torch.compile the model: True | False; auto is False
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

note = functools.partial(checks.say, error=True)


def read_stops(stop):
    """The texts of the knob stop, which is one, or a list of them in Python's way."""
    try:
        stops = ast.literal_eval(stop) if stop.startswith('[') else [stop]
    except (SyntaxError, ValueError):
        stops = [stop]  # text that begins with a bracket
    if not all(isinstance(s, str) for s in stops):
        checks.fail(f'stop={stop!r} is no list of texts', """write several as --stop="['one', 'two']" """.strip())
    return [s for s in stops if s]


# -----------------------------------------------------------------------------
# the knobs, the prompt, the machine
checks.check_ranges(config)
if start.startswith('FILE:'):
    start = checks.read_text(start.removeprefix('FILE:'), 'name the file of a prompt with --start=FILE:prompt.txt')
if not start:
    checks.fail('the prompt is empty', 'a model continues something: without --start it begins with a new line')
stops = read_stops(stop)
device, device_why = checks.choose_device(device)
device_type = torch.device(device).type
dtype, dtype_why = checks.choose_dtype(dtype, device_type, sampling=True)
compile = compile != 'auto' and checks.choose_compile(compile, device_type)[0]
torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')  # TF32 where the hardware has it
if device_type == 'cuda':
    torch.cuda.set_device(device)

# -----------------------------------------------------------------------------
# the model and its tokenizer
if init_from == 'resume':
    state, path = checkpoint.load_best(out_dir)
    model, meta = checkpoint.build_model(state, dtype=getattr(torch, dtype)), checkpoint.find_meta(state, out_dir, path)
    origin = f'{path}, iteration {state["iter_num"]}, best val loss {state.get("best_val_loss", math.inf):.4f}'
    state = None
elif convert.is_hf(init_from):
    model, meta, origin = GPT.from_pretrained(init_from, dict(dropout=0.0), getattr(torch, dtype)), convert.read_characters(init_from), init_from
else:
    checks.fail(f'init_from={init_from!r} is not known', f'it is a run of train.py: use --out_dir={init_from}' if checkpoint.exists(init_from) else
                'use resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder saved by transformers')
tokenizer = get_tokenizer(meta)
if tokenizer.vocab_size > model.config.vocab_size:
    checks.fail(f'{origin} has a vocabulary of {model.config.vocab_size}, but {tokenizer.name} has {tokenizer.vocab_size}', 'it needs a tokenizer of its own')
prompt = tokenizer.encode(start)
block_size = model.config.block_size
model.eval().to(device, getattr(torch, dtype))
note(f'model: {origin}, {model.get_num_params() / 1e6:.2f}M parameters, {tokenizer.name}')
note(f'machine: {device} ({device_why}), {dtype} ({dtype_why})')
if len(prompt) > block_size:
    note(f'the prompt has {len(prompt)} tokens; the model sees its last {block_size}')


# -----------------------------------------------------------------------------
def generate(start, rows=1, stream=False):
    """`rows` continuations of the text start, made as one batch: (text, whether it ended at a stop text) each.

    With stream the one row is printed as it comes, but for what may turn out to be the beginning of a stop text.
    """
    texts, done, printed, new_tokens = [''] * rows, [False] * rows, 0, []
    decoders = [codecs.getincrementaldecoder('utf-8')(errors='replace') for _ in texts]  # a token may end within a character
    longest = max((len(s) for s in stops), default=0)
    made = model.stream(torch.tensor([tokenizer.encode(start)] * rows, device=device), max_new_tokens, temperature, top_k,
                        top_p if top_p < 1 else None, tokenizer.vocab_size)
    for new in made if stream else tqdm(made, 'sampling', max_new_tokens, leave=False, disable=None):
        new_tokens.append(new)
        if not (stops or stream):
            continue  # looked at in the end, so that a GPU needn't wait for the host
        for row, token in enumerate(new[:, 0].tolist()):
            if not done[row]:
                seen = max(0, len(texts[row]) - longest)
                texts[row] += decoders[row].decode(tokenizer.decode_bytes([token]))
                ends = [texts[row].find(s, seen) for s in stops]
                if max(ends, default=-1) >= 0:
                    texts[row], done[row] = texts[row][:min(end for end in ends if end >= 0)], True
        if stream:
            upto = max(printed, len(texts[0]) - (0 if done[0] or not stops else longest - 1))
            print(texts[0][printed:upto], end='', flush=True)
            printed = upto
        if all(done):
            break
    if stream:
        print(texts[0][printed:], flush=True)
    elif new_tokens and not stops:
        texts = [tokenizer.decode(ids) for ids in torch.cat(new_tokens, dim=1).tolist()]
    return list(zip(texts, done))


HELP = """A line is continued; \\n in it is a new line. Ctrl-C stops the answer, Ctrl-D ends.
/temperature 0.5 sets it, /temperature shows it; so do /top_k, /top_p, /max_new_tokens, /seed and /stop (/stop [] for none)."""


def interact():
    """A prompt, its continuation as it comes, and so on; lines that begin with / set the knobs that say how."""
    global stops
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has history and editing; not on Windows)
    note(HELP)
    while True:
        try:
            line = input('> ').replace('\\n', '\n')
            name, _, value = line.removeprefix('/').partition(' ')
            if not line.startswith('/'):
                generate(line or '\n', stream=True)
            elif name not in ('temperature', 'top_k', 'top_p', 'max_new_tokens', 'seed', 'stop'):
                note(f'/{name} is not known. {HELP}')
            elif value:
                new = type(config[name])(value)
                checks.check_ranges({name: new})
                stops = read_stops(new) if name == 'stop' else stops
                globals()[name] = new
                torch.manual_seed(seed)
            else:
                note(f'{name}={globals()[name]!r}')
        except EOFError:
            return print()
        except KeyboardInterrupt:  # enough of this answer
            print()
        except ValueError:
            note(f'error: {name} cannot be {value!r}')
        except SystemExit:  # what was wrong is said
            pass


# as many rows at once as half of the free memory holds: each needs its keys and values, its prompt's activations and logits
c = model.config
cache_bytes = 2 * c.n_layer * c.n_embd * min(block_size, len(prompt) + max_new_tokens) * getattr(torch, dtype).itemsize
row_bytes = 2 * cache_bytes + 4 * (16 * c.n_embd * min(block_size, len(prompt)) + 4 * c.vocab_size)
free = checks.free_memory(device)
rows = 1 if stream or interactive else num_samples if free is None else max(1, min(num_samples, free // 2 // row_bytes))
note(f'memory: {sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20:,.0f} MiB of weights, '
     f'{rows} rows at once with {cache_bytes / 2**20:,.1f} MiB of keys and values each')
if compile:
    model.forward = torch.compile(model.forward)
elif device_type == 'cpu':
    model.pack_weights(rows)
if interactive:
    sys.exit(interact())
for first in range(0, num_samples, rows):
    if stream and format == 'text':
        print(start, end='', flush=True)
    for text, ended in generate(start, min(rows, num_samples - first), stream and format == 'text'):
        if format == 'jsonl':
            print(json.dumps(dict(prompt=start, text=text, stopped=ended)), flush=True)
        else:
            print(*([] if stream else [start + text]), '-' * 15, sep='\n', flush=True)
