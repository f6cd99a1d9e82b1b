"""
Opens an exported folder in other programs, and compares their greedy text with the checkpoint's.

    python recipes/clients.py --out_dir=out-python-char --hf_dir=my-gpt2
    python recipes/clients.py --out_dir=out-python-char --hf_dir=my-gpt2 --clients=mlx,lm-eval

It prints a row for each client that --clients names: its version, and `equal`, what differs, or
`not installed`. The last line is JSON. All compute in float32 on the CPU, without a network.
recipes/clients.sh installs the clients. llama.cpp also needs a copy of its sources: --llama_cpp.
"""
import contextlib
import importlib.metadata
import json
import math
import os
import runpy
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from model import GPT, GPTConfig
from runtime import checkpoint, restore, settings
from runtime.console import ROOT, fail, get_first_line
from runtime.tokenizer import get_tokenizer

# input
out_dir = 'out'  # folder with the checkpoint
hf_dir = 'my-gpt2'  # the folder that convert.py made of it
clients = 'all'  # all, or names between commas
start = 'The '  # the prompt
max_new_tokens = 40
llama_cpp = ''  # folder with the sources of llama.cpp, which have its converter
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())


# -----------------------------------------------------------------------------
# each continues the prompt in one program, and returns the ids of all tokens; or it compares by
# itself, and returns what differs
def run_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(hf_dir)
    model = AutoModelForCausalLM.from_pretrained(hf_dir).eval()
    inputs = tok(start, return_tensors='pt')
    return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()


def run_pipeline():
    from transformers import pipeline
    generator = pipeline('text-generation', hf_dir)
    text = generator(start)[0]['generated_text']  # the program's defaults; they may draw at random
    if not text.startswith(start):
        return f'wrote {text!r}'
    # with the default, version 4 takes out spaces before punctuation
    options = dict(do_sample=False, clean_up_tokenization_spaces=False)
    text = generator(start, max_new_tokens=max_new_tokens, **options)[0]['generated_text']
    # it leaves out special tokens, one of which is the rarest of a table of characters
    ids = [i for i in cut_end(expected) if i != generator.tokenizer.eos_token_id]
    if text != tokenizer.decode(ids):
        return f'wrote {text!r}'
    return 'equal'


def run_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    inputs = AutoTokenizer.from_pretrained(hf_dir)(start, return_tensors='pt')
    config = LoraConfig(task_type='CAUSAL_LM', target_modules=['c_attn'], fan_in_fan_out=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hf_dir), config)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=inputs['input_ids']).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[1] < losses[0]:
        return f'a step of training changed the loss from {losses[0]:.4f} to {losses[1]:.4f}'
    return ids


def run_trainer():
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )
    tok = AutoTokenizer.from_pretrained(hf_dir)
    model = AutoModelForCausalLM.from_pretrained(hf_dir)
    texts = [start * n for n in range(1, 5)]  # of several lengths, so it must pad them
    rows = [tok(text, truncation=True) for text in texts]
    args = TrainingArguments(output_dir=temp_dir, max_steps=2, report_to=[], use_cpu=True,
                             per_device_train_batch_size=2, disable_tqdm=True, save_strategy='no')
    trainer = Trainer(model, args, DataCollatorForLanguageModeling(tok, mlm=False), rows)
    loss = trainer.train().training_loss
    if not 0 < loss < math.inf:
        return f'the loss is {loss}'
    return 'equal'


def run_safetensors():
    from safetensors import safe_open
    sizes = ours.config
    V, T, C = tokenizer.vocab_size, sizes.block_size, sizes.n_embd
    shapes = {'wte.weight': [V, C], 'wpe.weight': [T, C], 'ln_f.weight': [C], 'ln_f.bias': [C]}
    for i in range(sizes.n_layer):  # OpenAI's names, and its order of the dimensions
        for name, shape in (('ln_1', [C]), ('attn.c_attn', [C, 3 * C]), ('attn.c_proj', [C, C]),
                            ('ln_2', [C]), ('mlp.c_fc', [C, 4 * C]), ('mlp.c_proj', [4 * C, C])):
            shapes[f'h.{i}.{name}.weight'] = shape
            shapes[f'h.{i}.{name}.bias'] = shape[-1:]
    with safe_open(os.path.join(hf_dir, 'model.safetensors'), 'pt') as f:
        found_shapes = {name: f.get_slice(name).get_shape() for name in f.keys()}
    names = sorted(name for name in {*shapes, *found_shapes}
                   if shapes.get(name) != found_shapes.get(name))
    if names:
        return f'other tensors: {", ".join(names)}'
    return 'equal'


def run_ctranslate2():
    import ctranslate2
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(hf_dir)
    folder = os.path.join(temp_dir, 'ctranslate2')
    ctranslate2.converters.TransformersConverter(hf_dir).convert(folder)
    generator = ctranslate2.Generator(folder, compute_type='float32')
    tokens = tok.convert_ids_to_tokens(tok.encode(start))
    max_length = len(expected) - 1  # without the first token
    results = generator.generate_batch([tokens], max_length=max_length, sampling_topk=1,
                                       include_prompt_in_result=True)
    return results[0].sequences_ids[0]


def run_onnxruntime():
    import onnxruntime
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(hf_dir).eval()

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    path = os.path.join(temp_dir, 'model.onnx')
    time = torch.export.Dim('time', max=ours.config.block_size)
    torch.onnx.export(Logits(), (torch.tensor([expected]),), path, input_names=['ids'],
                      dynamo=True, dynamic_shapes=({1: time},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    ids = torch.tensor([prompt])
    for _ in range(max_new_tokens):
        logits = torch.from_numpy(session.run(None, {'ids': ids.numpy()})[0])
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[0].tolist()


def run_mlx():
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    mx.set_default_device(mx.cpu)
    model, tok = load(hf_dir)
    ids = tok.encode(start)
    steps = generate_step(mx.array(ids), model, max_tokens=max_new_tokens)
    return ids + [int(token) for token, _ in steps]


def run_llama_cpp():
    from llama_cpp import Llama
    path = os.path.join(temp_dir, 'model.gguf')
    argv = sys.argv
    sys.argv = ['make_gguf.py', f'--hf_dir={hf_dir}', f'--gguf={path}', f'--llama_cpp={llama_cpp}']
    try:
        runpy.run_path(os.path.join(ROOT, 'recipes', 'make_gguf.py'), run_name='__main__')
    finally:
        sys.argv = argv
    llama = Llama(path, n_ctx=ours.config.block_size, verbose=False)
    ids = llama.tokenize(start.encode('utf-8'), add_bos=False)
    for token in llama.generate(ids.copy(), temp=0.0, top_k=1, repeat_penalty=1.0):
        ids.append(token)
        if len(ids) == len(expected):
            break
    if llama.detokenize(ids).decode('utf-8', 'replace') != tokenizer.decode(ids):
        return f'the text is {llama.detokenize(ids)}'
    return ids


def run_lm_eval():
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer
    text_path = os.path.join(temp_dir, 'text.jsonl')
    task = dict(task='text', dataset_path='json', test_split='test', doc_to_text='',
                dataset_kwargs=dict(data_files=dict(test=text_path)), doc_to_target='{{text}}',
                output_type='loglikelihood_rolling', metadata=dict(version=1),
                metric_list=[dict(metric='byte_perplexity')])
    for name, content in (('text.jsonl', dict(text=start)), ('text.yaml', task)):
        with open(os.path.join(temp_dir, name), 'w', encoding='utf-8') as f:
            json.dump(content, f)  # YAML has JSON in it
    tasks = TaskManager(include_path=temp_dir, include_defaults=False)
    options = dict(pretrained=hf_dir, dtype='float32')
    results = simple_evaluate('hf', options, ['text'], task_manager=tasks, device='cpu')
    value = results['results']['text']['byte_perplexity,none']
    # the harness predicts the first token from the token that ends a text
    idx = torch.tensor([[AutoTokenizer.from_pretrained(hf_dir).eos_token_id, *prompt]])
    nats = ours(idx[:, :-1], idx[:, 1:])[1].item() * len(prompt)
    byte_perplexity = math.exp(nats / len(start.encode('utf-8')))
    if abs(value - byte_perplexity) > 1e-4 * byte_perplexity:
        return f'byte_perplexity is {value:.4f} instead of {byte_perplexity:.4f}'
    return 'equal'


# {name: (its package, the function)}
CLIENTS = {'transformers': ('transformers', run_transformers),
           'pipeline': ('transformers', run_pipeline),
           'trainer': ('accelerate', run_trainer),
           'peft': ('peft', run_peft),
           'safetensors': ('safetensors', run_safetensors),
           'ctranslate2': ('ctranslate2', run_ctranslate2),
           'onnxruntime': ('onnxruntime', run_onnxruntime),
           'mlx': ('mlx-lm', run_mlx),
           'llama.cpp': ('llama_cpp_python', run_llama_cpp),
           'lm-eval': ('lm_eval', run_lm_eval)}


def cut_end(ids):
    """The ids up to the end of the text, at which only some of the programs stop."""
    if tokenizer.end_id in ids[len(prompt):]:
        return ids[:ids.index(tokenizer.end_id, len(prompt))]
    return ids


def describe(result):
    """What a row says: a client returns ids, or what it has found itself, as a text."""
    if isinstance(result, str):
        return result
    if cut_end(result) == cut_end(expected):
        return 'equal'
    return f'wrote {result[len(prompt):]} instead of {expected[len(prompt):]}'


def try_client(name):
    """[name, version, result] of one client."""
    package, function = CLIENTS[name]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return [name, '', 'not installed']
    torch.manual_seed(1337)
    try:
        # stdout is for the rows
        with (torch.set_grad_enabled(name in ('peft', 'trainer')),
              contextlib.redirect_stdout(sys.stderr)):
            return [name, version, describe(function())]
    except (Exception, SystemExit) as e:  # a client may raise anything
        return [name, version, f'{type(e).__name__}: {get_first_line(e)}']


settings.check(config)
names = list(CLIENTS) if clients == 'all' else [name.strip() for name in clients.split(',')]
for name in names:
    if name not in CLIENTS:
        fail(f'clients={clients!r} has an unknown name', f'use some of {", ".join(CLIENTS)}')
if not os.path.isfile(os.path.join(hf_dir, 'config.json')):
    fail(f'{hf_dir} has no config.json', 'make it with convert.py')
hf_dir = os.path.abspath(hf_dir)
state, path = checkpoint.load_best(out_dir)
ours = restore.build_model(GPT, GPTConfig, state, path).eval()
tokenizer = get_tokenizer(checkpoint.find_meta(state, path))
prompt = tokenizer.encode(start)
max_new_tokens = min(max_new_tokens, ours.config.block_size - len(prompt))
if max_new_tokens < 1:
    fail(f'the prompt has {len(prompt)} tokens, and the context {ours.config.block_size}',
         'use a shorter --start')
expected = ours.generate(torch.tensor([prompt]), max_new_tokens, temperature=0,
                         vocab_size=tokenizer.vocab_size)[0].tolist()
rows = []
for name in names:
    with tempfile.TemporaryDirectory() as temp_dir:
        rows.append(try_client(name))
    print('  '.join(text.ljust(14) for text in rows[-1]).rstrip(), flush=True)
print(json.dumps(dict(hf_dir=os.path.basename(hf_dir), rows=rows,
                      transformers=importlib.metadata.version('transformers'))))
sys.exit(any(result not in ('equal', 'not installed') for _, _, result in rows))
