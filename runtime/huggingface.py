"""
Hugging Face's GPT-2 format: reading it and writing it.

Only a folder's config.json, tokenizer.json and safetensors files are read. They are data, not code.
"""
import json
import math
import os
import shutil

import torch

from runtime.checkpoint import check_sizes
from runtime.console import fail, get_first_line, make_folder, shorten
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
MASKS = ('.attn.bias', '.masked_bias')  # older files have them; they aren't weights
# how much the logits of transformers may differ from ours, relative to the largest. Rounding makes
# 1.3e-6 of it at most, in 12 to 48 layers, and the other form of GELU 2e-4 in a trained model
TOLERANCE = 3e-5


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
    return init_from in GPT2_SIZES or os.path.isfile(os.path.join(init_from, 'config.json'))


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
            return snapshot_download(repo, allow_patterns=['config.json', 'model*.safetensors'])
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
                    if key == 'lm_head.weight' or name.endswith(MASKS):
                        continue  # lm_head.weight is the embedding again
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
        meta = check_meta(dict(stoi=stoi, itos={i: c for c, i in stoi.items()}))
        if any(len(c) != 1 for c in stoi):
            raise ValueError('its tokens are longer than a character')
    except Exception as e:  # it may have anything in it
        fail(f'{path} is not a table of characters ({get_first_line(e)})',
             "this project has only characters and GPT-2's BPE")
    return meta


# -----------------------------------------------------------------------------
# writing
def write_folder(model, hf_dir, meta=None):
    """Writes a GPT in float32 to an empty or new folder that transformers loads.

    The tokenizer is that of meta, a dataset's characters, or GPT-2's. Rows that pad the vocabulary
    are left out. Fails if GPT-2's format can't express the model, which someone may have edited.
    """
    args = {name: getattr(model.config, name) for name in SIZES}
    check_weights(model, args)
    vocab_size = get_tokenizer(meta).vocab_size
    if meta:
        stoi, itos = meta['stoi'], meta['itos']
        if any(len(c) != 1 or itos.get(i) != c for c, i in stoi.items()) or len(stoi) < len(itos):
            fail('its vocabulary does not have one character for each id', 'share the checkpoint')
    if vocab_size > args['vocab_size']:
        fail(f'the model has a vocabulary of {args["vocab_size"]}, but its tokenizer has '
             f'{vocab_size}', 'put the meta.pkl of its dataset next to the checkpoint')
    args['vocab_size'] = vocab_size
    parent, name = os.path.split(os.path.abspath(hf_dir))
    while not os.path.exists(parent):  # an export that fails must not leave new parents
        parent = os.path.dirname(parent)
    temp_dir = os.path.join(parent, f'{name}.{os.getpid()}.tmp')
    make_folder(temp_dir, '--hf_dir')
    try:
        write_files(model, args, temp_dir, meta)
        check_logits(model, args, temp_dir)
        make_folder(hf_dir, '--hf_dir')  # may be a mounted disk: move files, config.json last
        for name in sorted(os.listdir(temp_dir), key=lambda name: name == 'config.json'):
            shutil.move(os.path.join(temp_dir, name), os.path.join(hf_dir, name))
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def check_weights(model, args):
    """Fails unless the model has GPT-2's options and weights: no others, and none is missing."""
    config = model.config  # any object that has the sizes
    known_fields = {*SIZES, 'bias', 'gelu', 'dropout'}
    fields = getattr(config, '__dataclass_fields__', {}).values()
    options = [f'{field.name}={getattr(config, field.name)}' for field in fields
               if field.name not in known_fields and getattr(config, field.name) != field.default]
    if getattr(config, 'gelu', 'none') not in GELUS.values():
        options.append(f'gelu={config.gelu}')
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
              if not name.endswith(MASKS)}
    expected = {name: shape for name, (shape, _) in list_tensors(args).items()
                if name in shapes or config.bias or not name.endswith('.bias')}
    expected['lm_head.weight'] = expected['transformer.wte.weight']
    differences = options or [f'{name} {shapes.get(name, "(missing)")}'
                              for name in sorted({*shapes, *expected})
                              if shapes.get(name) != expected.get(name)]
    if differences:
        fail(f"GPT-2's format cannot express {shorten(', '.join(differences), 200)}",
             'share the checkpoint instead')


def write_files(model, args, folder, meta):
    """Writes the weights by their names in transformers, the tokenizer, and config.json."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config
    config, weights, tensors = model.config, model.state_dict(), {}
    for name, (shape, transposed) in list_tensors(args).items():
        tensor = weights[name][:shape[0]] if name in weights else torch.zeros(shape)  # no biases
        if transposed:
            tensor = tensor.t()
        # a copy of each: save_file refuses weights that several layers share
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    path = os.path.join(folder, 'model.safetensors')
    save_file(tensors, path, metadata={'format': 'pt'})
    os.chmod(path, 0o644)  # save_file makes it readable only for its owner
    tokenizer = make_tokenizer(meta)
    end_ids = dict.fromkeys(['bos_token_id', 'eos_token_id'], tokenizer.eos_token_id)
    dropout = dict.fromkeys(['resid_pdrop', 'embd_pdrop', 'attn_pdrop'], config.dropout)
    sizes = {their_name: args[our_name] for our_name, their_name in SIZES.items()}
    hf_config = GPT2Config(
        **sizes, **dropout, **end_ids, architectures=['GPT2LMHeadModel'], dtype='float32',
        activation_function={'none': 'gelu', 'tanh': 'gelu_new'}[getattr(config, 'gelu', 'none')],
        bias=config.bias)
    for part in (tokenizer, GenerationConfig(**end_ids), hf_config):
        part.save_pretrained(folder)


def check_logits(model, args, folder):
    """Fails unless transformers computes the model's logits from the folder, at any length."""
    from transformers import GPT2LMHeadModel, logging
    T, V = args['block_size'], args['vocab_size']
    idx = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1337))
    idx[0, T // 4] = V - 1  # GPT-2's end of a text, which an edit may treat as a border
    inputs = [idx[:, :length] for length in (1, max(1, T // 2), T)]
    model.eval()
    logging.disable_progress_bar()
    with torch.no_grad():
        hf = GPT2LMHeadModel.from_pretrained(folder)
        ours = [model(x)[0][:, -1, :V] for x in inputs]
        theirs = [hf(x, logits_to_keep=1, use_cache=False).logits[:, -1] for x in inputs]
        logits = model(idx[:, :64], idx[:, :64])[0]  # somebody may have edited only these
        if logits is not None:
            ours.append(logits.reshape(-1, logits.size(-1))[:, :V])
            theirs.append(hf(idx[:, :64]).logits[0])
    difference = (torch.cat(ours) - torch.cat(theirs)).abs().max()
    if not difference <= TOLERANCE * torch.cat(ours).abs().max():  # it may also be nan
        fail(f'in transformers the logits differ by {difference:.1e}: model.py computes something '
             "that GPT-2's format cannot express", 'share the checkpoint instead')


def make_tokenizer(meta):
    """The characters of a meta dict, or GPT-2's BPE for None, as a tokenizer of transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, convert_slow_tokenizer
    if meta:
        tokenizer = Tokenizer(models.WordLevel(meta['stoi']))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()
    else:
        bpe = get_tokenizer(None).bpe
        converter = convert_slow_tokenizer.TikTokenConverter(
            pattern=bpe._pat_str, extra_special_tokens=bpe._special_tokens)
        converter.load_tiktoken_bpe = lambda path: bpe._mergeable_ranks
        tokenizer = converter.converted()
    special_tokens = {} if meta else dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   **special_tokens)
