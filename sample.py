"""
Generates text from a checkpoint of train.py or nanoGPT, or from GPT-2.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
    python sample.py --start=FILE:prompt.txt --temperature=0 --num_samples=1
    python sample.py --init_from=gpt2 --interactive

The text goes to stdout, everything else to stderr. --help lists the settings.
"""
import contextlib
import json
import os
import sys

from runtime import threads  # before torch: it sets how torch's threads wait for each other

import torch
from tqdm import tqdm

from model import GPT, GPTConfig
from runtime import checkpoint, huggingface, inference, kernels, machine, memory, report, restore
from runtime import settings
from runtime.console import ROOT, note
from runtime.prompts import TextStream, fit_prompt, parse_stops, read_prompt
from runtime.tokenizer import get_tokenizer

# model and prompt
init_from = 'resume'  # resume (the checkpoint in out_dir) | gpt2* | Hugging Face folder
out_dir = 'out'  # folder with the checkpoint
start = '\n'  # the prompt, or FILE:prompt.txt
num_samples = 10  # number of continuations
max_new_tokens = 500  # tokens per continuation
# sampling
temperature = 0.8  # below 1: less random, above 1: more; 0: always the most likely token
top_k = 200  # draw only from the k most likely tokens; 0: from all
top_p = 1.0  # draw only from the most likely tokens with this much probability; 1.0: from all
stop = ''  # end a sample before this text; several texts: "['\n\n', '<|endoftext|>']"
seed = 1337
# output
stream = False  # print tokens as they are generated, one sample at a time
interactive = False  # ask for prompts and stream their continuations
format = 'text'  # text | jsonl (one line of JSON per sample)
# system
device = 'auto'  # cpu | cuda | cuda:1 | mps | xpu | auto: the accelerator if there is one
dtype = 'auto'  # float32 | bfloat16 | float16 | auto: the fastest that is safe
weights = 'auto'  # int8 | int4: one sample on a CPU is faster, less exact | bfloat16 | auto: dtype
compile = 'auto'  # torch.compile the model: True | False | auto: False
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

# -----------------------------------------------------------------------------
# the prompt and the machine
settings.check(config)
start = read_prompt(start)
stops = parse_stops(stop)
device, device_reason = machine.choose_device(device)
device_type = torch.device(device).type
dtype = machine.fit_dtype(weights, dtype, device_type, compile)
dtype, dtype_reason = machine.choose_dtype(dtype, device_type, sampling=True)
compile = compile != 'auto' and machine.choose_compile(compile, device_type)[0]
machine.prepare_sampling(device, seed)

# -----------------------------------------------------------------------------
# the model and its tokenizer
if init_from == 'resume':
    state, path = checkpoint.load_best(out_dir)
    model = restore.build_model(GPT, GPTConfig, state, path, dtype=getattr(torch, dtype))
    meta = checkpoint.find_meta(state, path)
    origin = report.describe_checkpoint(state, path)
    state = None  # frees the memory
elif huggingface.is_huggingface(init_from):
    model = restore.load_pretrained(GPT, init_from, dtype=getattr(torch, dtype))
    meta = huggingface.read_tokenizer(init_from)
    origin = init_from
else:
    huggingface.fail_unknown(init_from, 'resume')
tokenizer = get_tokenizer(meta, model.config.vocab_size)
start, prompt_length = fit_prompt(start, tokenizer, model.config.block_size)
dtype = inference.convert(model, device, dtype)
kernels.accelerate(model, device_type, dtype)
note(f'model: {origin}, {model.get_num_params() / 1e6:.2f}M parameters, {tokenizer.name}')
note(f'machine: {device} ({device_reason}), {dtype} ({dtype_reason})')


# -----------------------------------------------------------------------------
def generate(start, rows=1, stream=False):
    """Continues the text start `rows` times, in one batch: (text, whether a stop ended it) each.

    With stream=True the text of the only row is printed as it is generated.
    """
    idx = torch.tensor([tokenizer.encode(start)] * rows, device=device)
    steps = busy_note.watch(inference.stream(model, idx, max_new_tokens, temperature, top_k, top_p,
                                             tokenizer.vocab_size, graphs))
    if not stream:
        steps = tqdm(steps, 'sampling', max_new_tokens, leave=False, disable=None)
    if not stream and not stops:  # text is made at the end, so a GPU never waits for the host
        new_tokens = list(steps)
        ids = torch.cat(new_tokens, dim=1).tolist() if new_tokens else [[]] * rows
        return [(tokenizer.decode(row), False) for row in ids]
    texts = [TextStream(tokenizer, stops) for _ in range(rows)]
    for idx_next in steps:
        for text, token in zip(texts, idx_next[:, 0].tolist()):
            text.add(token)
        if stream:
            print(texts[0].take(), end='', flush=True)
        if all(text.is_complete for text in texts):
            break
    if stream:
        print(texts[0].take(all=True), flush=True)
    return [(text.text, text.is_complete) for text in texts]


COMMANDS = ('temperature', 'top_k', 'top_p', 'max_new_tokens', 'seed', 'stop')
HELP = r"""Type text and the model continues it; \n means a new line. Ctrl-C stops an answer,
Ctrl-D ends. /temperature 0.5 sets the temperature, /temperature shows it. The same works for
/top_k, /top_p, /max_new_tokens, /seed and /stop (/stop [] for none)."""


def run_command(name, value):
    """Shows the setting, or sets it if there is a value."""
    global stops
    if name not in COMMANDS:
        note(f'/{name} is not known. {HELP}')
    elif not value:
        note(f'{name}={globals()[name]!r}')
    else:
        new_value = type(config[name])(value)
        settings.check({name: new_value})
        if name == 'stop':
            stops = parse_stops(new_value)
        globals()[name] = new_value
        torch.manual_seed(seed)


def interact():
    """Asks for prompts and streams their continuations; lines that begin with / are commands."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and editing; not on Windows)
    note(HELP)
    while True:
        try:
            line = input('> ').replace('\\n', '\n')
            name, _, value = line.removeprefix('/').partition(' ')
            if line.startswith('/'):
                run_command(name, value)
            else:
                generate(line or start, stream=True)
        except EOFError:
            return print()
        except KeyboardInterrupt:  # stops this answer
            print()
        except ValueError:
            note(f'error: {name} cannot be {value!r}')
        except SystemExit:  # a mistake, which has been reported
            pass


graphs = {}  # keeps the CUDA graph of a step for the next prompt
busy_note = threads.BusyNote()  # says if other programs take CPU time, and spreads threads
rows = 1
if not stream and not interactive:
    rows = inference.choose_rows(model, prompt_length, max_new_tokens, num_samples,
                                 memory.read_free_memory(device))
if compile:
    inference.compile_forward(model)
elif device_type == 'cpu':
    inference.pack_linears(model, rows, weights)
note(f'memory: {report.describe_memory(model, prompt_length, max_new_tokens, rows)}')
if interactive:
    sys.exit(interact())
for first_sample in range(0, num_samples, rows):
    is_streamed = stream and format == 'text'
    if is_streamed:
        print(start, end='', flush=True)
    for text, was_stopped in generate(start, min(rows, num_samples - first_sample), is_streamed):
        if format == 'jsonl':
            print(json.dumps(dict(prompt=start, text=text, stopped=was_stopped)), flush=True)
            continue
        print('' if is_streamed else start + text + '\n', '-' * 15, sep='', flush=True)
