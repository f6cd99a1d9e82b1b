"""
FineWeb-Edu in GPT-2's BPE: educational web pages, the sample of 10 billion tokens (20 GB of bins).

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --input='shards/*.parquet'

The second line reads local Parquet files with a column text, such as those of the dataset itself or
of nanochat.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus
import encode
from documents import Documents

from runtime import settings
from runtime.console import ROOT
from runtime.tokenizer import GPT2Tokenizer

# input and output
input = 'HuggingFaceFW/fineweb-edu:sample-10BT'  # on the hub; or local files, as a folder or a glob
val_share = 0.0005  # share of the documents that is for validation
num_threads = 0  # threads that encode; 0: one per core
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

start_time = time.time()
settings.check(config)
folder = out_dir or os.path.dirname(os.path.abspath(__file__))
documents = Documents(input)
pieces = encode.split_by_document(documents, val_share)
num_tokens = encode.write_dataset(folder, documents, pieces, GPT2Tokenizer(), None, num_threads,
                                  start_time)
corpus.print_next_step('config/train_gpt2.py', num_tokens, dataset=out_dir or 'fineweb_edu')
