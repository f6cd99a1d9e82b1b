"""
Converts an exported folder to a GGUF file, the format of llama.cpp.

    git clone https://github.com/ggml-org/llama.cpp
    python recipes/make_gguf.py --hf_dir=my-gpt2 --gguf=my-gpt2.gguf --llama_cpp=llama.cpp

It runs llama.cpp's own convert_hf_to_gguf.py. That script has a list of known tokenizers, and
refuses one that you trained. So this script tells it that ours split a text as GPT-2's does.

A table of characters is written as a BPE in whose merges the bytes of each character are joined.
"""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from runtime import settings, tokenizer_json
from runtime.console import ROOT, fail
from runtime.huggingface import read_tokenizer
from runtime.tokenizer import list_byte_characters

# input and output
hf_dir = ''  # the folder that convert.py made
gguf = ''  # the file to write
llama_cpp = 'llama.cpp'  # folder with the sources of llama.cpp
outtype = 'f32'  # f32 | f16 | bf16 | q8_0
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())


# llama.cpp needs a list of merges that isn't empty. No text has these two parts
NO_MERGES = ['[PAD [PAD']


def write_bpe(model):
    """Writes the tokenizer into a GGUF as it is."""
    model._set_vocab_gpt2()
    if not json.loads(text)['model']['merges']:  # a tokenizer of bytes
        model.gguf_writer.add_token_merges(NO_MERGES)


def write_characters(model):
    """Writes a table of characters into a GGUF."""
    from gguf import TokenType
    tokens = [f'[PAD{i}]' for i in range(model.hparams['vocab_size'])]  # ids without a character
    types = [TokenType.UNUSED] * len(tokens)
    merges = set()
    byte_characters = list_byte_characters()
    for character, i in stoi.items():
        tokens[i] = ''.join(byte_characters[byte] for byte in character.encode('utf-8'))
        types[i] = TokenType.NORMAL
        merges.update(f'{tokens[i][:n]} {tokens[i][n]}' for n in range(1, len(tokens[i])))
    writer = model.gguf_writer
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(sorted(merges, key=len) or NO_MERGES)
    end = json.loads(read('tokenizer_config.json')).get('eos_token')
    if end in stoi:
        writer.add_bos_token_id(stoi[end])
        writer.add_eos_token_id(stoi[end])
        writer.add_pad_token_id(stoi[end])
    writer.add_add_bos_token(False)


def read(name):
    with open(os.path.join(hf_dir, name), encoding='utf-8') as f:
        return f.read()


settings.check(config)
if not hf_dir or not gguf:
    fail('--hf_dir and --gguf are needed', 'see the top of this script for an example')
for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
    if not os.path.isfile(os.path.join(hf_dir, name)):
        fail(f'{hf_dir} has no {name}', 'name a folder that convert.py has made with --hf_dir')
if not os.path.isfile(os.path.join(llama_cpp, 'convert_hf_to_gguf.py')):
    fail(f'{llama_cpp} has no convert_hf_to_gguf.py', "name llama.cpp's folder with --llama_cpp")
sys.path[:0] = [llama_cpp, os.path.join(llama_cpp, 'gguf-py')]
import convert_hf_to_gguf
from conversion.gpt2 import GPT2Model

text = read('tokenizer.json')
if tokenizer_json.splits_as_gpt2(text):
    GPT2Model.get_vocab_base_pre = lambda model, tokenizer: 'gpt-2'
    GPT2Model.set_vocab = write_bpe
else:
    stoi = (read_tokenizer(hf_dir) or {}).get('stoi')
    if not stoi:
        fail(f'{hf_dir} has a tokenizer that splits in another way than GPT-2',
             'add it to get_vocab_base_pre() of llama.cpp')
    GPT2Model.set_vocab = write_characters
sys.argv = ['convert_hf_to_gguf.py', hf_dir, f'--outfile={gguf}', f'--outtype={outtype}']
convert_hf_to_gguf.main()
