"""
Between Hugging Face's GPT-2 format and ours.

read_hf() takes a folder that transformers has saved, or one of GPT-2's four names on the hub, and gives the arguments and
tensors of a GPT. Only config.json and safetensors files are read: data, no code.
"""
import json
import math
import os

import torch

from checkpoint import check_shapes
from checks import fail, first_line

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# Hugging Face keeps these as Conv1D, (in, out): the transpose of a Linear's weight
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# the names of activations there -> F.gelu's approximate=
GELUS = {'gelu': 'none', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu_fast': 'tanh'}
# what GPT-2's format allows and this model doesn't have: (key of config.json, the only value that will do)
REQUIRED = (('model_type', 'gpt2'), ('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
            ('add_cross_attention', False), ('tie_word_embeddings', True), ('layer_norm_epsilon', 1e-5))


def is_hf(init_from):
    """Whether init_from names weights in Hugging Face's format: GPT-2's names, or a folder with a config.json."""
    return init_from in GPT2_SIZES or os.path.isfile(os.path.join(init_from, 'config.json'))


def read_hf(model_type, dtype=torch.float32):
    """(arguments of GPTConfig but dropout, state dict in dtype) of GPT-2 weights on the hub or in a folder.

    Tensors are copied one by one out of the memory-mapped files, so no second copy of the model exists at any time.
    """
    folder = _fetch(model_type) if model_type in GPT2_SIZES else model_type
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf = json.loads(f.read(2 ** 20))
        sizes = {ours: hf[theirs] for ours, theirs in (('block_size', 'n_positions'), ('vocab_size', 'vocab_size'),
                                                       ('n_layer', 'n_layer'), ('n_head', 'n_head'), ('n_embd', 'n_embd'))}
        if wrong := [key for key, value in sizes.items() if type(value) is not int]:
            raise TypeError(f'{wrong[0]} is no whole number')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        fail(f'{model_type!r} has no config.json of a GPT-2 ({type(e).__name__}: {first_line(e)})',
             f'give one of {", ".join(GPT2_SIZES)}, or a folder saved by transformers')
    unfit = [f'{key}={hf[key]!r}' for key, value in REQUIRED if hf.get(key, value) != value]
    gelu = hf.get('activation_function', 'gelu_new')
    if not isinstance(gelu, str) or gelu not in GELUS:
        unfit.append(f'activation_function={gelu!r}')
    if hf.get('n_inner') not in (None, 4 * sizes['n_embd']):
        unfit.append(f'n_inner={hf["n_inner"]!r}')
    if unfit:
        fail(f'{model_type} is no plain GPT-2: {", ".join(unfit)[:200]}', 'this model has no such option')
    args = dict(sizes, bias=True, gelu=GELUS[gelu])
    return args, _read_tensors(folder, args, dtype)


def _fetch(model_type):
    """The local folder of one of GPT-2's sizes, downloaded by huggingface_hub where it isn't cached."""
    from huggingface_hub import snapshot_download
    reason = ''
    for repo in (f'openai-community/{model_type}', model_type):  # the name on the hub today, and the one older caches have
        try:
            return snapshot_download(repo, allow_patterns=['config.json', 'model*.safetensors'])
        except Exception as e:  # network, cache and hub errors have no common base
            reason = reason or type(e).__name__
    fail(f'the weights of {model_type} could not be fetched from the Hugging Face hub ({reason})',
         'without a network, pass a folder that transformers has saved: --init_from=FOLDER')


def _read_tensors(folder, args, dtype):
    """The state dict of the folder's safetensors, by our names; fails if it isn't that of a GPT with these arguments."""
    from safetensors import safe_open
    files = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors'))
    if not files:
        fail(f'{folder} has no .safetensors file', 'save it again with a recent transformers: model.save_pretrained(folder)')
    places, shapes, tensors = {}, {}, {}  # by our names: (path, key) and shape of each tensor, before any is read
    try:
        for path in (os.path.join(folder, name) for name in files):
            with safe_open(path, framework='pt') as f:
                for key in f.keys():
                    ours = 'transformer.' + key.removeprefix('transformer.')
                    if key == 'lm_head.weight' or ours.endswith(('.attn.bias', '.attn.masked_bias')):
                        continue  # the embedding once more; and masks, not weights
                    piece = f.get_slice(key)
                    if piece.get_dtype() not in ('F64', 'F32', 'F16', 'BF16'):
                        raise ValueError(f'{key} is in {piece.get_dtype()}')
                    shape = piece.get_shape()
                    places[ours], shapes[ours] = (path, key), shape[::-1] if ours.endswith(TRANSPOSED) else shape
        shapes['lm_head.weight'] = shapes.get('transformer.wte.weight', ())
        check_shapes(args, shapes)
        # the largest first: while one is copied its pages count too, and then little else is there yet
        for ours in sorted(places, key=lambda name: -math.prod(shapes[name])):
            path, key = places[ours]
            with safe_open(path, framework='pt') as f:  # opened anew: what a tensor mapped is let go with it
                tensor = f.get_tensor(key)
                tensor = tensor.t() if ours.endswith(TRANSPOSED) else tensor
                # a copy, or it would stay in the file
                tensors[ours] = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
                del tensor
    except Exception as e:  # a header may lie in many ways
        fail(f'{path} does not hold the weights of the GPT-2 in its config.json ({first_line(e)})', 'download or save it again')
    tensors['lm_head.weight'] = tensors['transformer.wte.weight']
    return tensors
