"""
Hugging Face's GPT-2 format: its names, and reading it. export.py writes it.

Only a folder's config.json, tokenizer.json and safetensors files are read. They are data, not code.
"""
import json
import math
import os

import torch

from runtime.checkpoint_format import check_sizes
from runtime.console import fail, format_command, get_first_line
from runtime.files import is_file
from runtime.meta import check_meta, make_tokenizer_meta
from runtime.previous_runs import exists
from runtime.tokenizer import is_gpt2, read_tokenizer_file

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# activation_function in config.json -> F.gelu's approximate=
GELUS = {'gelu': 'none', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu_fast': 'tanh'}
# the name in GPTConfig -> the name in config.json
SIZES = {'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
         'n_head': 'n_head', 'n_embd': 'n_embd'}
# what GPT-2's format allows and this model doesn't have -> the only value that it can read
REQUIRED = {'model_type': 'gpt2', 'scale_attn_weights': True, 'add_cross_attention': False,
            'scale_attn_by_inverse_layer_idx': False, 'tie_word_embeddings': True,
            'layer_norm_epsilon': 1e-5}
MASKS = ('.attn.bias', '.masked_bias')  # older files have them; they aren't weights


def list_tensors(args):
    """{name: (shape, transposed)} of the tensors of a GPT-2 with these arguments, by our names.

    Hugging Face has the same names, and keeps the matrices of linear layers transposed.
    """
    C = args['n_embd']
    tensors = {'transformer.wte.weight': ((args['vocab_size'], C), False),
               'transformer.wpe.weight': ((args['block_size'], C), False)}
    layers = {'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C),
              'ln_2': (C,), 'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}
    shapes = {f'transformer.h.{i}.{name}': shape
              for i in range(args['n_layer']) for name, shape in layers.items()}
    for name, shape in {**shapes, 'transformer.ln_f': (C,)}.items():
        tensors[f'{name}.weight'] = (shape, len(shape) == 2)
        tensors[f'{name}.bias'] = (shape[:1], False)
    return tensors


# -----------------------------------------------------------------------------
# reading
def is_huggingface(init_from):
    """Whether init_from names weights in this format: a GPT-2 size, or a folder of that kind."""
    return init_from in GPT2_SIZES or is_file(os.path.join(init_from, 'config.json'))


def fail_unknown(init_from, choices):
    """Fails because init_from is not the name of a model. choices are other names."""
    remedy = f'use {choices}, {", ".join(GPT2_SIZES)} or a folder saved by transformers'
    folder = os.path.dirname(init_from) if os.path.isfile(init_from) else init_from
    if exists(folder):
        command = format_command(out_dir=folder, init_from='resume')
        remedy = f'it is the folder of a run: {command}'
    fail(f'init_from={init_from!r} is not known', remedy)


def read_weights(model_type, dtype=None):
    """(arguments of GPTConfig except dropout, weights in dtype) of a GPT-2 size or a folder.

    Tensors are copied one by one out of the memory-mapped files, so there is never a second copy
    of the model. dtype=None means torch's default. Fails if these aren't the weights of a GPT-2.
    """
    folder = fetch(model_type) if model_type in GPT2_SIZES else model_type
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf_config = json.loads(f.read(2 ** 20))
        args = {our_name: hf_config[their_name] for our_name, their_name in SIZES.items()}
        if any(type(value) is not int for value in args.values()):
            raise TypeError(f'{args} are not whole numbers')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        reason = f'{type(e).__name__}: {get_first_line(e)}'
        fail(f'{model_type!r} has no config.json of a GPT-2 ({reason})',
             f'name one of {", ".join(GPT2_SIZES)}, or a folder saved by transformers')
    unknown_options = [f'{key}={hf_config[key]!r}' for key, value in REQUIRED.items()
                       if hf_config.get(key, value) != value]
    activation = hf_config.get('activation_function', 'gelu_new')
    if not isinstance(activation, str) or activation not in GELUS:
        unknown_options.append(f'activation_function={activation!r}')
    if hf_config.get('n_inner') not in (None, 4 * args['n_embd']):
        unknown_options.append(f'n_inner={hf_config["n_inner"]!r}')
    if unknown_options:
        fail(f'{model_type} is not a plain GPT-2: {", ".join(unknown_options)[:200]}',
             'this model has no such option')
    weights = read_tensors(folder, args, dtype or torch.get_default_dtype())
    args.update(bias=True, gelu=GELUS[activation])
    biases = [name for name in weights if name.endswith('.bias')]
    if hf_config.get('bias') is False and not any(weights[name].any() for name in biases):
        args['bias'] = False  # write_folder() wrote zeros for them
        weights = {name: w for name, w in weights.items() if name not in biases}
    return args, weights


def fetch(model_type):
    """The local folder of a GPT-2 size; huggingface_hub downloads it if it isn't in its cache."""
    from huggingface_hub import snapshot_download
    reason = ''
    # the present name on the hub, and the name that older caches have
    for repo in (f'openai-community/{model_type}', model_type):
        try:
            return snapshot_download(repo, allow_patterns=['config.json', 'model*.safetensors*'])
        except Exception as e:  # network, cache and hub errors have no common base class
            reason = reason or type(e).__name__
    fail(f'{model_type} could not be fetched from the Hugging Face hub ({reason})',
         'without a network, use a folder that transformers has saved: --init_from=FOLDER')


def list_files(folder):
    """{path: names of its tensors, or None for all} of the files that transformers would read."""
    path = os.path.join(folder, 'model.safetensors')
    index_path = path + '.index.json'
    if is_file(path):
        return {path: None}
    if not is_file(index_path):
        fail(f'{folder} has no model.safetensors',
             'save it again with a recent transformers: model.save_pretrained(folder)')
    files = {}
    try:
        with open(index_path, encoding='utf-8') as f:
            locations = json.loads(f.read(2 ** 23))['weight_map']
        for key, name in locations.items():
            path = os.path.join(folder, os.path.basename(name))  # never outside of the folder
            files.setdefault(path, []).append(key)
        missing_files = [path for path in files if not is_file(path)]
        if missing_files:
            raise ValueError(f'{missing_files[0]} is not there')
        if not files:
            raise ValueError('it names none')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        fail(f'{index_path} does not name the files of the weights ({get_first_line(e)})',
             'download or save it again')
    return files


def read_tensors(folder, args, dtype):
    """The weights in the folder's safetensors files, by our names, shaped as args ask for."""
    from safetensors import safe_open
    files = list_files(folder)
    locations, shapes, weights = {}, {}, {}  # locations: {our name: (path, their name)}
    try:
        for path, keys in files.items():
            with safe_open(path, framework='pt') as f:
                for key in keys or f.keys():
                    name = 'transformer.' + key.removeprefix('transformer.')
                    if key == 'lm_head.weight' or name.endswith(MASKS):
                        continue  # lm_head.weight is the embedding again
                    if name in locations:
                        raise ValueError(f'it has {name} twice')
                    header = f.get_slice(key)
                    if header.get_dtype() not in ('F64', 'F32', 'F16', 'BF16'):
                        raise ValueError(f'{key} is in {header.get_dtype()}')
                    locations[name] = path, key
                    shapes[name] = tuple(header.get_shape())
        check_sizes(args, shapes)
        if args['n_embd'] % args['n_head']:
            raise ValueError(f'n_embd={args["n_embd"]} is not divisible by n_head={args["n_head"]}')
        tensors = list_tensors(args)
        expected = {name: shape[::-1] if transposed else shape
                    for name, (shape, transposed) in tensors.items()}
        for name in sorted({*shapes, *expected}):
            if shapes.get(name) != expected.get(name):
                raise ValueError(f'{name} has shape {shapes.get(name)}, not {expected.get(name)}')
        # the largest first: the mapped pages of the tensor being copied count as memory, too
        for name in sorted(locations, key=lambda name: -math.prod(shapes[name])):
            path, key = locations[name]
            with safe_open(path, framework='pt') as f:  # closing it unmaps the pages
                tensor = f.get_tensor(key)
                if tensors[name][1]:
                    tensor = tensor.t()
                weights[name] = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
                del tensor
    except Exception as e:  # a header may say anything
        fail(f'{path} does not have the weights of the GPT-2 in its config.json '
             f'({get_first_line(e)})', 'download or save it again')
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return weights


def read_tokenizer(init_from):
    """The meta dict of a folder's tokenizer: a table of characters, or a tokenizer of its own.

    None means GPT-2's BPE.
    """
    path = os.path.join(init_from, 'tokenizer.json')
    if not is_file(path):
        return check_vocab_json(init_from)
    text = read_tokenizer_file(path)
    return read_characters(text) or make_tokenizer_meta(text, path)


def read_characters(text):
    """The meta dict for a tokenizer.json that export.py has made of characters, or None."""
    try:
        model = json.loads(text)['model']
        stoi = model['vocab']
        if model['type'] != 'WordLevel' or any(len(c) != 1 for c in stoi):
            return None
        return check_meta(dict(stoi=stoi, itos={i: c for c, i in stoi.items()}))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # FileTokenizer says what is wrong with it


def check_vocab_json(folder):
    """Fails if the folder has a vocab.json, the older form of a tokenizer, that isn't GPT-2's."""
    path = os.path.join(folder, 'vocab.json')
    if is_file(path):
        try:
            is_known = is_gpt2(json.loads(read_tokenizer_file(path)))
        except (ValueError, RecursionError):
            is_known = False
        if not is_known:
            fail(f"{path} is not GPT-2's, and there is no tokenizer.json",
                 'save the tokenizer again with a recent version of transformers')
