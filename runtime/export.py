"""
Writes a model in Hugging Face's GPT-2 format, if that format can express it.
"""
import json
import os
import shutil

import torch

from runtime import tokenizer_json
from runtime.console import fail, make_folder, shorten
from runtime.huggingface import GELUS, MASKS, SIZES, list_tensors
from runtime.tokenizer import FileTokenizer, get_tokenizer

# how much the logits of transformers may differ from ours, relative to the largest. Rounding makes
# 1.3e-6 of it at most, in 12 to 48 layers, and the other form of GELU 2e-4 in a trained model
TOLERANCE = 3e-5


def write_folder(model, hf_dir, meta=None):
    """Writes a GPT in float32 to an empty or new folder that opens wherever OpenAI's GPT-2 does.

    The tokenizer is that of meta, or GPT-2's. Rows that pad the vocabulary are left out. Returns
    {'pad_token_id': id, ...}, as write_tokenizer() does. Fails if GPT-2's format can't express the
    model, which someone may have edited.
    """
    args = {name: getattr(model.config, name) for name in SIZES}
    check_weights(model, args)
    vocab_size = get_tokenizer(meta).vocab_size
    if meta and 'tokenizer' not in meta:
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
        end_ids = write_tokenizer(temp_dir, model, args, meta)
        write_weights(temp_dir, model, args)
        write_config(temp_dir, model.config, args, end_ids)
        check_logits(model, args, temp_dir)
        make_folder(hf_dir, '--hf_dir')  # may be a mounted disk: move files, config.json last
        for name in sorted(os.listdir(temp_dir), key=lambda name: name == 'config.json'):
            shutil.move(os.path.join(temp_dir, name), os.path.join(hf_dir, name))
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)
    return end_ids


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


def write_tokenizer(folder, model, args, meta):
    """Writes the tokenizer in all forms that programs look for.

    Returns {'eos_token_id': id, ...} for the two config files. Programs want a token for the end of
    a text, for padding and for what is unknown. A table of characters has none, so its rarest
    character is that token, and texts don't end with it.
    """
    if meta and 'stoi' in meta:
        end = find_rarest(model, meta['stoi'])
        tokenizer = FileTokenizer(tokenizer_json.make_characters(meta['stoi'], end))
        end_ids = dict(pad_token_id=meta['stoi'][end])
    else:
        tokenizer = FileTokenizer(meta['tokenizer'] if meta else tokenizer_json.make_gpt2())
        roles = ('bos_token_id', 'eos_token_id', 'pad_token_id')
        end_ids = dict.fromkeys(roles if tokenizer.end_id is not None else [], tokenizer.end_id)
    with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8') as f:
        f.write(tokenizer.text)
    config = dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=args['block_size'],
                  model_input_names=['input_ids', 'attention_mask'],
                  clean_up_tokenization_spaces=False)
    if end_ids:
        roles = ('bos_token', 'eos_token', 'unk_token', 'pad_token')
        end = tokenizer.tokenizer.id_to_token(end_ids['pad_token_id'])
        config.update(dict.fromkeys(roles, end))
    if tokenizer_json.splits_as_gpt2(tokenizer.text):
        config.update(tokenizer_class='GPT2Tokenizer', add_prefix_space=False)
        tokenizer.tokenizer.model.save(folder)  # vocab.json and merges.txt
    write_json(folder, 'tokenizer_config.json', config)
    return end_ids


@torch.no_grad()
def find_rarest(model, stoi):
    """The character that the model predicts least, after random ones."""
    ids = torch.tensor(sorted(stoi.values()))
    generator = torch.Generator().manual_seed(1337)
    idx = ids[torch.randint(len(ids), (64, 1), generator=generator)]
    logits = model.eval()(idx)[0][:, -1, ids]  # (64, characters)
    rarest = ids[logits.softmax(-1).mean(0).argmin()].item()
    return next(c for c, i in stoi.items() if i == rarest)


def write_weights(folder, model, args):
    """Writes the weights by OpenAI's names, which are ours without transformer."""
    from safetensors.torch import save_file
    weights, tensors = model.state_dict(), {}
    for name, (shape, transposed) in list_tensors(args).items():
        tensor = weights[name][:shape[0]] if name in weights else torch.zeros(shape)  # no biases
        if transposed:
            tensor = tensor.t()
        # a copy of each: save_file refuses weights that several layers share
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensors[name.removeprefix('transformer.')] = tensor
    path = os.path.join(folder, 'model.safetensors')
    save_file(tensors, path, metadata={'format': 'pt'})
    os.chmod(path, 0o644)  # save_file makes it readable only for its owner


def write_config(folder, config, args, end_ids):
    """Writes config.json and generation_config.json, with what OpenAI's have."""
    sizes = {their_name: args[our_name] for our_name, their_name in SIZES.items()}
    dropout = dict.fromkeys(['resid_pdrop', 'embd_pdrop', 'attn_pdrop'],
                            getattr(config, 'dropout', 0.0))
    activation = {'none': 'gelu', 'tanh': 'gelu_new'}[getattr(config, 'gelu', 'none')]
    ends = {role: end_ids.get(role) for role in ('bos_token_id', 'eos_token_id')}
    write_json(folder, 'config.json', dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', **sizes, n_ctx=args['block_size'],
        n_inner=None, activation_function=activation, layer_norm_epsilon=1e-5,
        initializer_range=0.02, **dropout, **ends, tie_word_embeddings=True, use_cache=True,
        torch_dtype='float32', bias=config.bias))
    if 'eos_token_id' not in end_ids:  # generate() would mask a character of the prompt
        end_ids = {}
    write_json(folder, 'generation_config.json', dict(end_ids, max_length=args['block_size']))


def write_json(folder, name, content):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=2)
        f.write('\n')


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
