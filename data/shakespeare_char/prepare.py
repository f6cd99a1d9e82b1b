"""
Tiny Shakespeare by characters: 1.1 MB of text, 1.0M training tokens, seconds to prepare.
"""
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import corpus

# text
input = ''  # the text; '': input.txt in this folder, else it is downloaded
out_dir = ''  # where train.bin and val.bin go; '': this folder
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'configurator.py'), encoding='utf-8').read())

started = time.time()
folder = os.path.dirname(os.path.abspath(__file__))
text = corpus.read_shakespeare(input, folder)
print(f'text: {len(text):,} characters')
meta = corpus.char_table(text)
ids = corpus.encode_chars(text, meta)
split = int(0.9 * len(ids))
corpus.write_splits(out_dir or folder, ids[:split], ids[split:], meta, started,
                    'config/train_shakespeare_char_cpu.py' + (f' --dataset={out_dir}' if out_dir else '') + ', with a GPU config/train_shakespeare_char.py')
