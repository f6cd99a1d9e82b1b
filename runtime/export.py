"""
Writes a model in Hugging Face's GPT-2 format, if that format can express it.
"""
import os
import shutil

import torch

from runtime.console import fail, make_folder, shorten
from runtime.huggingface import GELUS, MASKS, SIZES, list_tensors
from runtime.tokenizer import END_OF_TEXT, get_tokenizer

# how much the logits of transformers may differ from ours, relative to the largest. Rounding makes
# 1.3e-6 of it at most, in 12 to 48 layers, and the other form of GELU 2e-4 in a trained model
TOLERANCE = 3e-5


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
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    if meta:
        tokenizer = Tokenizer(models.WordLevel(meta['stoi']))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()
    else:
        bpe = get_tokenizer(None).bpe
        converter = TikTokenConverter(
            pattern=bpe._pat_str, extra_special_tokens=bpe._special_tokens)
        converter.load_tiktoken_bpe = lambda path: bpe._mergeable_ranks
        tokenizer = converter.converted()
    special_tokens = {} if meta else dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   **special_tokens)
