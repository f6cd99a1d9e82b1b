"""
Tiny Shakespeare in GPT-2's BPE: 1.1 MB of text, 0.3M training tokens, seconds to prepare.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime.console import ROOT
from runtime.tokenizer import GPT2Tokenizer

# input and output
input = ''  # the text file; '': input.txt in this folder, which is downloaded if missing
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

start_time = time.time()
folder = os.path.dirname(os.path.abspath(__file__))
text = corpus.read_shakespeare(input, folder)
print(f'text: {len(text):,} characters')
split = int(0.9 * len(text))  # the text is split, not its tokens, so no token spans both splits
train_ids, val_ids = GPT2Tokenizer().encode_batch([text[:split], text[split:]])
corpus.write_splits(out_dir or folder, train_ids, val_ids, None, start_time,
                    'config/finetune_shakespeare_gpt2.py', dataset=out_dir)
