"""
Python's standard library in a BPE of its own: about 8 MB of code, no download.
"""
import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime import settings, tokenizer_json
from runtime.console import ROOT
from runtime.meta import make_tokenizer_meta
from runtime.tokenizer import get_tokenizer

# input and output
max_bytes = 10_000_000  # stop after the file that passes this size
vocab_size = 1024  # tokens of the BPE
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

start_time = time.time()
settings.check(config)
tokenizer_json.check_bpe_size(vocab_size)
texts = corpus.read_python(max_bytes, ['encodings'])  # tables of characters, not code
tokenizer_text = tokenizer_json.train_bpe(texts['train'], vocab_size, sys.stderr.isatty())
meta = make_tokenizer_meta(tokenizer_text, 'the new tokenizer')
meta['val_bytes'] = sum(map(len, texts['val']))  # it is ASCII
tokenizer = get_tokenizer(meta)
end_id = meta['vocab_size'] - 1  # of <|endoftext|>, after each file
ids = {}
for split in texts:
    rows = [[*file_ids, end_id] for file_ids in tokenizer.encode_batch(texts[split])]
    ids[split] = np.concatenate(rows) if rows else []
corpus.write_splits(out_dir or os.path.dirname(os.path.abspath(__file__)), ids['train'], ids['val'],
                    meta, start_time, 'config/train_python_bpe.py', dataset=out_dir)
