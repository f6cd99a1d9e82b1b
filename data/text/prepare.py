"""
Your own text, by characters or in GPT-2's BPE: writes data/<name>, for --dataset=<name>.

    python data/text/prepare.py --input=book.txt --name=mybook
    python train.py config/train_python_char.py --dataset=mybook --out_dir=out-mybook

tokenizer=char makes a vocabulary of the text's characters, to train a model from scratch.
tokenizer=gpt2 uses GPT-2's BPE, to finetune GPT-2. To continue a run of characters on another text,
or to evaluate it there, name its folder: --vocabulary=out-mybook.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime import checkpoint
from runtime.console import ROOT, fail, shorten
from runtime.dataset import locate_data
from runtime.tokenizer import GPT2Tokenizer, read_meta, read_text

# input and output
input = ''  # a UTF-8 text file
name = ''  # the name of the dataset
tokenizer = 'char'  # char (the text's characters) | gpt2 (GPT-2's BPE)
vocabulary = ''  # a dataset or a run's folder whose characters to use; '': the text's own
out_dir = ''  # where the dataset is written; '': data/<name>
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())


def read_vocabulary(source, text):
    """The table of characters of a dataset, or of a run's folder; fails if the text has others."""
    data_dir = locate_data(source)
    if data_dir:
        meta = read_meta(data_dir)
    else:
        meta = checkpoint.find_meta(*checkpoint.load_best(source))
    if not meta or 'stoi' not in meta:
        fail(f'{source} has no table of characters', 'use --tokenizer=gpt2 for its data')
    unknown_characters = ''.join(sorted(set(text) - meta['stoi'].keys()))
    if unknown_characters:
        fail(f'the vocabulary of {source} lacks {len(unknown_characters)} characters of the text: '
             f'{shorten(unknown_characters, 50)!r}', 'remove or replace them in the text')
    return meta


start_time = time.time()
missing = []
if not input:
    missing.append('--input (your text file)')
if not name and not out_dir:
    missing.append('--name (a name for the dataset)')
if missing:
    fail(f'missing {" and ".join(missing)}',
         'for example: python data/text/prepare.py --input=book.txt --name=mybook')
if tokenizer not in ('char', 'gpt2'):
    fail(f'tokenizer={tokenizer!r} is not known', 'use char or gpt2')
if vocabulary and tokenizer != 'char':
    fail(f'--vocabulary has no effect with tokenizer={tokenizer!r}', 'use --tokenizer=char')
if not out_dir:
    if os.path.basename(name) != name or name in (os.curdir, os.pardir):
        fail(f'name={name!r} cannot be the name of a folder', 'use a name such as mybook')
    if os.path.exists(os.path.join(ROOT, 'data', name, 'prepare.py')):
        fail(f'name={name!r} belongs to a dataset of this repository', 'use another name')

text = read_text(input)
print(f'text: {len(text):,} characters')
split = int(0.9 * len(text))
if tokenizer == 'char':
    meta = read_vocabulary(vocabulary, text) if vocabulary else corpus.make_meta(text)
    train_ids = corpus.encode_chars(text[:split], meta)
    val_ids = corpus.encode_chars(text[split:], meta)
    config_file = 'config/train_python_char.py'
else:
    meta = None
    encode = GPT2Tokenizer().encode_ordinary
    train_ids = encode(text[:split])
    val_ids = encode(text[split:])
    config_file = 'config/finetune_shakespeare_gpt2.py'
run_name = name or os.path.basename(os.path.normpath(out_dir))
corpus.write_splits(out_dir or os.path.join(ROOT, 'data', name), train_ids, val_ids, meta,
                    start_time, config_file, dataset=out_dir or name, out_dir=f'out-{run_name}')
