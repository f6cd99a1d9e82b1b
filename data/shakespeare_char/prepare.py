"""
Tiny Shakespeare by characters: 1.1 MB of text, 1.0M training tokens, seconds to prepare.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime.console import ROOT
from runtime.meta import make_character_meta
from runtime.tokenizer import CharTokenizer

# input and output
input = ''  # the text file; '': input.txt in this folder, which is downloaded if missing
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

start_time = time.time()
folder = os.path.dirname(os.path.abspath(__file__))
text = corpus.read_shakespeare(input, folder)
print(f'text: {len(text):,} characters')
meta = make_character_meta(text)
ids, = CharTokenizer(meta).encode_batch([text])
split = int(0.9 * len(ids))
corpus.write_splits(out_dir or folder, ids[:split], ids[split:], meta, start_time,
                    'config/train_shakespeare_char_cpu.py', dataset=out_dir)
print('with a GPU use config/train_shakespeare_char.py')
