"""
Between Hugging Face's GPT-2 format and ours.

    python convert.py --out_dir=out-shakespeare-char --hf_dir=my-gpt2      a checkpoint, as a folder that transformers loads
    python convert.py --to=native --hf_dir=my-gpt2 --out_dir=out-my-gpt2   and back, without the optimizer's state

train.py and sample.py take such a folder as it is, too: --init_from=my-gpt2. Only its config.json, tokenizer.json and
safetensors files are read: data, no code.
"""
import json
import math
import os

import torch

import checkpoint
from checks import REPO, fail, first_line, make_folder, say, shown
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, check_meta, get_tokenizer

# what
to = 'hf'  # hf (out_dir's checkpoint -> hf_dir) | native (hf_dir -> out_dir/ckpt.pt)
out_dir = 'out'  # the checkpoint's folder
hf_dir = ''  # the folder for transformers; for --to=native also gpt2, gpt2-medium, gpt2-large or gpt2-xl
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# Hugging Face keeps these as Conv1D, (in, out): the transpose of a Linear's weight
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# the names of activations there -> F.gelu's approximate=
GELUS = {'gelu': 'none', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu_fast': 'tanh'}
# what GPT-2's format allows and this model doesn't have: (key of config.json, the only value that will do)
REQUIRED = (('model_type', 'gpt2'), ('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
            ('add_cross_attention', False), ('tie_word_embeddings', True), ('layer_norm_epsilon', 1e-5))

OPTIONS = ('rope_base', 'qk_norm', 'relu2', 'tied', 'bigrams', 'embd_conv')  # of ours, which GPT-2's format doesn't have


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
    tensors = _read_tensors(folder, args, dtype)
    if hf.get('bias') is False and not any(tensors[name].any() for name in tensors if name.endswith('.bias')):  # as write_hf left them
        args, tensors = {**args, 'bias': False}, {name: w for name, w in tensors.items() if not name.endswith('.bias')}
    return args, tensors


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
        checkpoint.check_shapes(args, shapes)
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


def read_characters(init_from):
    """The meta dict of a folder that write_hf() has made of a character model; None means GPT-2's BPE. Fails if it is another tokenizer's."""
    path = os.path.join(init_from, 'tokenizer.json')
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding='utf-8') as f:
            table = json.loads(f.read(2 ** 23))['model']
        if table['type'] != 'WordLevel':
            if [table['vocab'].get(word) for word in ('!', 'the', '\u0120the', '\u0120gazed')] != [0, 1169, 262, 50255]:
                raise ValueError("it isn't GPT-2's BPE either")
            return None
        meta = dict(vocab_size=len(table['vocab']), stoi=table['vocab'], itos={i: c for c, i in table['vocab'].items()})
        check_meta(meta)
        if any(len(c) != 1 for c in meta['stoi']):
            raise ValueError('its tokens are no characters')
    except Exception as e:  # it may hold anything
        fail(f'{path} is no table of characters ({first_line(e)})', "the model needs a tokenizer of its own: here are only characters and GPT-2's BPE")
    return meta


def write_hf(model, hf_dir, meta=None):
    """Writes a GPT as an empty folder's model.safetensors, config.json, generation_config.json and tokenizer, in GPT-2's format.

    The tokenizer is that of meta, a dataset's characters, or GPT-2's; rows that pad the vocabulary beyond it are left out.
    transformers needs nothing of ours to load it. Fails if meta's tokens aren't single characters, or more than the model has.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config
    if meta and any(len(c) != 1 for c in meta.get('stoi', ())):
        fail('some tokens of its vocabulary are longer than a character', 'transformers has no tokenizer for these: share its checkpoint instead')
    if ours := [f'{key}={value}' for key, value in vars(model.config).items() if key in OPTIONS and value != getattr(GPTConfig, key)]:
        fail(f'{", ".join(ours)} have no place in GPT-2\'s format', 'share its checkpoint instead')
    c, tokenizer = model.config, hf_tokenizer(meta)
    vocab_size = len(tokenizer)
    if vocab_size > c.vocab_size:
        fail(f'the model has a vocabulary of {c.vocab_size}, but its tokenizer has {vocab_size}', 'put the meta.pkl of its dataset beside the checkpoint')
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != 'lm_head.weight':  # the embedding once more
            tensor = tensor[:vocab_size] if name == 'transformer.wte.weight' else tensor.t() if name.endswith(TRANSPOSED) else tensor
            tensors[name] = tensor.contiguous()
            if not c.bias and name.endswith(('.weight')) and 'wte' not in name and 'wpe' not in name:
                tensors[name.replace('.weight', '.bias')] = tensor.new_zeros(tensor.size(-1))
    end = tokenizer.eos_token_id
    config = GPT2Config(architectures=['GPT2LMHeadModel'], vocab_size=vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                        n_head=c.n_head, activation_function={gelu: name for name, gelu in reversed(GELUS.items())}[c.gelu], resid_pdrop=c.dropout,
                        embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=end, eos_token_id=end, dtype='float32', bias=c.bias)
    make_folder(hf_dir, '--hf_dir')
    save_file(tensors, os.path.join(hf_dir, 'model.safetensors'), metadata={'format': 'pt'})
    os.chmod(os.path.join(hf_dir, 'model.safetensors'), 0o644)  # it comes readable for its owner alone
    tokenizer.save_pretrained(hf_dir)
    GenerationConfig(bos_token_id=end, eos_token_id=end).save_pretrained(hf_dir)
    config.save_pretrained(hf_dir)  # last: with it the folder is whole


def hf_tokenizer(meta):
    """The characters of a meta dict, or None's GPT-2 BPE, as a tokenizer of transformers' that gives the same ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    ours = get_tokenizer(meta)
    if meta:
        made, special = Tokenizer(models.WordLevel(ours.stoi)), {}
        made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated'), decoders.Fuse()
    else:
        converter = TikTokenConverter(pattern=ours.bpe._pat_str, extra_special_tokens=ours.bpe._special_tokens)
        converter.load_tiktoken_bpe = lambda path: ours.bpe._mergeable_ranks
        made, special = converter.converted(), dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)


# -----------------------------------------------------------------------------
if __name__ == '__main__':
    if to not in ('hf', 'native') or not hf_dir:
        fail(f'with to={to!r} and hf_dir={hf_dir!r} it is not clear what to convert', 'use --to=hf or native: python convert.py --out_dir=out --hf_dir=my-gpt2')
    if to == 'hf':
        if os.path.isfile(hf_dir) or os.path.isdir(hf_dir) and os.listdir(hf_dir):
            fail(f'{hf_dir} is not an empty folder', 'name a new one with --hf_dir')
        state, path = checkpoint.load_best(out_dir)
        meta = checkpoint.find_meta(state, out_dir, path)
        write_hf(checkpoint.build_model(state, state['model_args'].get('dropout', 0.0)), hf_dir, meta)
        prompt = 'A' if not meta or 'A' in meta['stoi'] else min(meta['stoi'])
        say(f'{path} is in {hf_dir} now; try it: python -c "from transformers import pipeline; '
            f"print(pipeline('text-generation', {hf_dir!r})({prompt!r}))\"")
    else:
        if checkpoint.exists(out_dir):
            fail(f'{out_dir} already has a checkpoint', 'name a new folder with --out_dir')
        model, meta = GPT.from_pretrained(hf_dir), read_characters(hf_dir)
        make_folder(out_dir)
        path = checkpoint.save(dict(checkpoint.describe(model.config, meta), model=model.state_dict(), iter_num=0, best_val_loss=math.inf, config={}), out_dir)
        say(f'{hf_dir} is in {path} now; sample from it: python {shown(os.path.join(REPO, "sample.py"))} --out_dir={out_dir}')
