"""
Converts to and from Hugging Face's GPT-2 format.

    python convert.py --out_dir=out-shakespeare-char --hf_dir=my-gpt2
    python convert.py --to=native --hf_dir=my-gpt2 --out_dir=out-my-gpt2

The first line makes a folder that transformers loads from a checkpoint. The second one makes a
checkpoint from such a folder, without optimizer state. train.py and sample.py also take the folder
as it is: --init_from=my-gpt2.
"""
import json
import math
import os
import pickle
import shlex

from model import GPT, GPTConfig
from runtime import checkpoint, export, huggingface, restore
from runtime.console import ROOT, fail, format_script, make_folder, say
from runtime.files import replace
from runtime.run_dir import RunDir

# input and output
to = 'hf'  # hf (checkpoint in out_dir -> hf_dir) | native (hf_dir -> checkpoint in out_dir)
out_dir = 'out'  # folder with the checkpoint
hf_dir = ''  # folder in Hugging Face's format; with --to=native also gpt2, gpt2-medium, ...
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

if to not in ('hf', 'native'):
    fail(f'to={to!r} is not known', 'use --to=hf or --to=native')
if not hf_dir:
    fail('--hf_dir is missing', 'name a folder: python convert.py --out_dir=out --hf_dir=my-gpt2')
if to == 'hf':
    if os.path.isfile(hf_dir) or os.path.isdir(hf_dir) and os.listdir(hf_dir):
        fail(f'{hf_dir} is not an empty folder', 'name a new one with --hf_dir')
    state, path = checkpoint.load_best(out_dir)
    meta = checkpoint.find_meta(state, path)
    dropout = state['model_args'].get('dropout', 0.0)
    model = restore.build_model(GPT, GPTConfig, state, path, dropout)
    del state  # the export needs a second copy of the weights, and this would be a third one
    end_ids = export.write_folder(model, hf_dir, meta)
    if meta and 'itos' in meta:
        rarest = meta['itos'][end_ids['pad_token_id']]
        say(f'{rarest!r} also stands for padding and for unknown characters there, as the model '
            'predicts it least')
    prompt = 'A'
    if meta and 'A' not in meta.get('stoi', 'A'):
        prompt = min(meta['stoi'])
    arguments = json.dumps(prompt, ensure_ascii=False)
    if model.config.block_size > 100:  # the folder limits the text to block_size, which takes long
        arguments += ', max_new_tokens=99'
    folder = json.dumps(hf_dir, ensure_ascii=False)
    code = ('from transformers import pipeline; '
            f'print(pipeline("text-generation", {folder})({arguments}))')
    say(f'exported {path} to {hf_dir}; try it: {shlex.join(["python", "-c", code])}')
else:
    if checkpoint.exists(out_dir):
        fail(f'{out_dir} already has a checkpoint', 'name a new folder with --out_dir')
    if not huggingface.is_huggingface(hf_dir):
        fail(f'{hf_dir} has no config.json of a GPT-2',
             f'name one of {", ".join(huggingface.GPT2_SIZES)}, or a folder saved by transformers')
    model = GPT.from_pretrained(hf_dir)
    meta = huggingface.read_tokenizer(hf_dir)
    make_folder(out_dir)
    run_dir = RunDir(out_dir)  # no run may be writing there
    run_config = {}
    if meta and 'stoi' in meta:  # nanoGPT's sample.py looks for the table in the dataset's folder
        run_config = dict(dataset=os.path.abspath(out_dir))
        with replace(os.path.join(out_dir, 'meta.pkl')) as f:
            pickle.dump(meta, f)
    state = dict(model=model.state_dict(), iter_num=0, best_val_loss=math.inf, config=run_config,
                 **checkpoint.describe(model.config, meta))
    path = checkpoint.save(state, out_dir)
    run_dir.close()
    say(f'converted {hf_dir} to {path}; sample from it: '
        f'{format_script("sample.py", f"--out_dir={out_dir}")}')
