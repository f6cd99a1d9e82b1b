"""
Tiny Shakespeare in GPT-2's BPE: 1.1 MB of text, 0.3M training tokens, seconds to prepare.
"""
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import corpus

from tokenizer import GPT2Tokenizer

# text
input = ''  # the text; '': input.txt in this folder, else it is downloaded
out_dir = ''  # where train.bin and val.bin go; '': this folder
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'configurator.py'), encoding='utf-8').read())

started = time.time()
folder = os.path.dirname(os.path.abspath(__file__))
text = corpus.read_shakespeare(input, folder)
print(f'text: {len(text):,} characters')
split = int(0.9 * len(text))  # of the text, so that no token spans both splits
encode = GPT2Tokenizer().encode_ordinary
corpus.write_splits(out_dir or folder, encode(text[:split]), encode(text[split:]), None, started,
                    'config/finetune_shakespeare_gpt2.py' + (f' --dataset={out_dir}' if out_dir else ''))
