"""
Python's standard library by characters: about 10 MB of code, no download, seconds to prepare.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime import settings
from runtime.console import ROOT
from runtime.meta import make_character_meta
from runtime.tokenizer import CharTokenizer

# input and output
max_bytes = 10_000_000  # stop after the file that passes this size
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

start_time = time.time()
settings.check(config)
texts = corpus.read_python(max_bytes)
train_text = ''.join(texts['train'])
val_text = ''.join(texts['val'])
meta = make_character_meta(train_text + val_text)
train_ids, val_ids = CharTokenizer(meta).encode_batch([train_text, val_text])
corpus.write_splits(out_dir or os.path.dirname(os.path.abspath(__file__)), train_ids, val_ids,
                    meta, start_time, 'config/train_python_char.py', dataset=out_dir)
