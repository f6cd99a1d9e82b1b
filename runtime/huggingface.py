"""
Hugging Face's GPT-2 format: reading it and writing it.

Only a folder's config.json, tokenizer.json and safetensors files are read. They are data, not code.
"""
import json
import math
import os

import torch

from runtime.checkpoint import check_sizes
from runtime.console import fail, get_first_line, make_folder
from runtime.tokenizer import END_OF_TEXT, check_meta, get_tokenizer

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


def list_tensors(args):
    """{name: (shape, transposed)} of the tensors of a GPT-2 with these arguments, by our names.

    Hugging Face has the same names, and keeps the matrices of linear layers transposed.
    """
    C = args['n_embd']
    tensors = {'transformer.wte.weight': ((args['vocab_size'], C), False),
               'transformer.wpe.weight': ((args['block_size'], C), False)}
    layers = {'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C),
              'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}
    norms = ['transformer.ln_f']
    for i in range(args['n_layer']):
        block = f'transformer.h.{i}'
        norms += [f'{block}.ln_1', f'{block}.ln_2']
        for name, shape in layers.items():
            tensors[f'{block}.{name}.weight'] = (shape, True)
            tensors[f'{block}.{name}.bias'] = (shape[:1], False)
    for norm in norms:
        tensors[f'{norm}.weight'] = ((C,), False)
        tensors[f'{norm}.bias'] = ((C,), False)
    return tensors


# -----------------------------------------------------------------------------
# reading
def is_huggingface(init_from):
    """Whether init_from names weights in this format: a GPT-2 size, or a folder of that kind."""
    return init_from in GPT2_SIZES or os.path.isfile(os.path.join(init_from, 'config.json'))


def read_weights(model_type, dtype=torch.float32):
    """(arguments of GPTConfig except dropout, weights in dtype) of a GPT-2 size or a folder.

    Tensors are copied one by one out of the memory-mapped files, so there is never a second copy
    of the model. Fails if the weights can't be fetched or aren't those of a GPT-2.
    """
    folder = fetch(model_type) if model_type in GPT2_SIZES else model_type
    try:
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf_config = json.loads(f.read(2 ** 20))
        args = {our_name: hf_config[their_name] for our_name, their_name in SIZES.items()}
        for name, value in args.items():
            if type(value) is not int:
                raise TypeError(f'{name} is not a whole number')
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
    weights = read_tensors(folder, args, dtype)
    args.update(bias=True, gelu=GELUS[activation])
    biases = [name for name in weights if name.endswith('.bias')]
    if hf_config.get('bias') is False and not any(weights[name].any() for name in biases):
        args['bias'] = False  # write_folder() wrote zeros for them
        weights = {name: w for name, w in weights.items() if name not in biases}
    return args, weights


def fetch(model_type):
    """The local folder of a GPT-2 size; huggingface_hub downloads it if it isn't in its cache."""
    from huggingface_hub import snapshot_download
    files = ['config.json', 'model*.safetensors']
    reason = ''
    # the present name on the hub, and the name that older caches have
    for repo in (f'openai-community/{model_type}', model_type):
        try:
            return snapshot_download(repo, allow_patterns=files)
        except Exception as e:  # network, cache and hub errors have no common base class
            reason = reason or type(e).__name__
    fail(f'{model_type} could not be fetched from the Hugging Face hub ({reason})',
         'without a network, use a folder that transformers has saved: --init_from=FOLDER')


def read_tensors(folder, args, dtype):
    """The weights in the folder's safetensors files, by our names, shaped as args ask for."""
    from safetensors import safe_open
    names = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors'))
    if not names:
        fail(f'{folder} has no .safetensors file',
             'save it again with a recent transformers: model.save_pretrained(folder)')
    locations, shapes, weights = {}, {}, {}  # locations: {our name: (path, their name)}
    try:
        for path in (os.path.join(folder, name) for name in names):
            with safe_open(path, framework='pt') as f:
                for key in f.keys():
                    name = 'transformer.' + key.removeprefix('transformer.')
                    if key == 'lm_head.weight' or name.endswith(('.attn.bias', '.masked_bias')):
                        continue  # the embedding again, and masks that aren't weights
                    header = f.get_slice(key)
                    if header.get_dtype() not in ('F64', 'F32', 'F16', 'BF16'):
                        raise ValueError(f'{key} is in {header.get_dtype()}')
                    locations[name] = path, key
                    shapes[name] = tuple(header.get_shape())
        check_sizes(args, shapes)
        if args['n_embd'] % args['n_head']:
            raise ValueError(f'n_embd={args["n_embd"]} is not divisible by n_head={args["n_head"]}')
        tensors = list_tensors(args)
        for name in sorted({*shapes, *tensors}):
            shape, transposed = tensors.get(name, (None, False))
            if transposed:
                shape = shape[::-1]
            if shapes.get(name) != shape:
                raise ValueError(f'{name} has shape {shapes.get(name)}, '
                                 f'its config.json asks for {shape}')
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


def read_characters(init_from):
    """The meta dict of a folder that write_folder() made of a character model.

    None means GPT-2's BPE. Fails if the folder has another tokenizer.
    """
    path = os.path.join(init_from, 'tokenizer.json')
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding='utf-8') as f:
            model = json.loads(f.read(2 ** 23))['model']
        stoi = model['vocab']
        if model['type'] != 'WordLevel':
            some_words = [stoi.get(word) for word in ('!', 'the', '\u0120the', '\u0120gazed')]
            if some_words != [0, 1169, 262, 50255]:
                raise ValueError("it is not GPT-2's BPE either")
            return None
        meta = dict(vocab_size=len(stoi), stoi=stoi, itos={i: c for c, i in stoi.items()})
        check_meta(meta)
        if any(len(c) != 1 for c in stoi):
            raise ValueError('its tokens are longer than a character')
    except Exception as e:  # it may have anything in it
        fail(f'{path} is not a table of characters ({get_first_line(e)})',
             "this project has only characters and GPT-2's BPE")
    return meta


# -----------------------------------------------------------------------------
# writing
def write_folder(config, weights, hf_dir, meta=None):
    """Writes a GPT's config and weights to an empty folder that transformers loads.

    The tokenizer is that of meta, a dataset's characters, or GPT-2's. Rows that pad the vocabulary
    are left out. Fails if the model has an option that GPT-2's format can't express, or if meta's
    tokens aren't single characters or are more than the model has.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config
    if meta and any(len(c) != 1 for c in meta.get('stoi', ())):
        fail('some tokens of its vocabulary are longer than a character',
             'transformers has no tokenizer for these: share the checkpoint instead')
    known_fields = {*SIZES, 'bias', 'gelu', 'dropout'}
    options = [f'{field.name}={getattr(config, field.name)}'
               for field in config.__dataclass_fields__.values()
               if field.name not in known_fields and getattr(config, field.name) != field.default]
    if options:
        fail(f"GPT-2's format cannot express {', '.join(options)}", 'share the checkpoint instead')
    unknown_names = set(weights) - set(list_tensors(vars(config))) - {'lm_head.weight'}
    if unknown_names:
        fail(f"GPT-2's format cannot express {', '.join(sorted(unknown_names))[:200]}",
             'share the checkpoint instead')
    tokenizer = make_tokenizer(meta)
    vocab_size = len(tokenizer)
    if vocab_size > config.vocab_size:
        fail(f'the model has a vocabulary of {config.vocab_size}, but its tokenizer has '
             f'{vocab_size}', 'put the meta.pkl of its dataset next to the checkpoint')
    tensors = {}
    for name, (shape, transposed) in list_tensors(vars(config)).items():
        if name.endswith('.bias') and not config.bias:
            tensors[name] = torch.zeros(shape)
            continue
        tensor = weights[name]
        if name == 'transformer.wte.weight':
            tensor = tensor[:vocab_size]
        if transposed:
            tensor = tensor.t()
        tensors[name] = tensor.contiguous()
    activation = next(name for name, gelu in GELUS.items() if gelu == config.gelu)
    end_id = tokenizer.eos_token_id
    hf_config = GPT2Config(
        architectures=['GPT2LMHeadModel'], vocab_size=vocab_size, n_positions=config.block_size,
        n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head,
        activation_function=activation, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
        attn_pdrop=config.dropout, bos_token_id=end_id, eos_token_id=end_id, dtype='float32',
        bias=config.bias)
    make_folder(hf_dir, '--hf_dir')
    weights_path = os.path.join(hf_dir, 'model.safetensors')
    save_file(tensors, weights_path, metadata={'format': 'pt'})
    os.chmod(weights_path, 0o644)  # save_file makes it readable only for its owner
    tokenizer.save_pretrained(hf_dir)
    GenerationConfig(bos_token_id=end_id, eos_token_id=end_id).save_pretrained(hf_dir)
    hf_config.save_pretrained(hf_dir)  # last: with it the folder is complete


def make_tokenizer(meta):
    """The characters of a meta dict, or GPT-2's BPE for None, as a tokenizer of transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    our_tokenizer = get_tokenizer(meta)
    if meta:
        special_tokens = {}
        tokenizer = Tokenizer(models.WordLevel(our_tokenizer.stoi))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()
    else:
        special_tokens = dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        converter = TikTokenConverter(pattern=our_tokenizer.bpe._pat_str,
                                      extra_special_tokens=our_tokenizer.bpe._special_tokens)
        converter.load_tiktoken_bpe = lambda path: our_tokenizer.bpe._mergeable_ranks
        tokenizer = converter.converted()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   **special_tokens)
