"""
Your own text, by characters, bytes or BPE: writes data/<name>, for --dataset=<name>.

    python data/text/prepare.py --input=book.txt --name=mybook
    python train.py config/train_text.py --dataset=mybook --out_dir=out-mybook
    python data/text/prepare.py --input=books,more/*.jsonl.gz --name=mybooks --tokenizer=bpe

The last line that it prints trains with settings that suit the text and the machine.

The tokenizers: char (the characters of the text), bytes (all 256), bpe (pairs of bytes that are
frequent in this text, for any language), gpt2 (to finetune GPT-2), a tokenizer.json, or the name of
a tokenizer of tiktoken. To use the tokenizer of a run or of another dataset, name its folder:
--vocabulary=out-mybook.
"""
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus
import encode
import plan
from documents import Documents

from runtime import checkpoint, settings, tokenizer_json
from runtime.console import ROOT, fail, shorten
from runtime.dataset import locate_data
from runtime.huggingface import is_huggingface
from runtime.meta import make_character_meta, make_tokenizer_meta, read_meta
from runtime.tokenizer import get_tokenizer, read_tokenizer_file

# input and output
input = ''  # files, folders, globs, - or names on the Hugging Face hub, between commas
field = 'text'  # the field of JSON that has the text; '': train on the syntax
column = 'text'  # the column of CSV, Parquet or a hub dataset that has the text
encoding = ''  # of text files, such as latin-1; '': UTF-8, or UTF-16 by its mark
name = ''  # the name of the dataset
val_share = 0.1  # share of the text that is for validation
tokenizer = 'char'  # char | bytes | bpe | gpt2 | a tokenizer.json | a name of tiktoken
vocab_size = 8192  # tokens of tokenizer=bpe
vocabulary = ''  # a dataset or a run's folder whose tokenizer to use
num_threads = 0  # threads that encode; 0: one per core
out_dir = ''  # where the dataset is written; '': data/<name>
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())


def read_vocabulary(source):
    """The meta dict of a dataset, or of a run's folder; None for GPT-2's BPE."""
    data_dir = locate_data(source)
    if data_dir:
        return read_meta(data_dir)
    if is_huggingface(source):
        fail(f'{source} is a folder for transformers', f'use its tokenizer: --tokenizer={source}')
    if not os.path.exists(source):
        fail(f'vocabulary={source!r} is neither a dataset nor the folder of a run',
             'name one of them, such as --vocabulary=out-mybook')
    return checkpoint.find_meta(*checkpoint.load_best(source))


def read_tokenizer(name):
    """The text of a tokenizer.json, by its path or by tiktoken's name; '' for char, bpe and gpt2.

    It is known before the text is read.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        path = os.path.join(path, 'tokenizer.json')
    if name in ('char', 'bpe', 'gpt2'):
        return ''
    if name == 'bytes':
        return tokenizer_json.make_bytes()
    if os.path.exists(path):
        return read_tokenizer_file(path)
    import tiktoken
    names = tiktoken.list_encoding_names()
    if name not in names:
        fail(f'tokenizer={name!r} is not known', 'use char, bytes, bpe, a file such as '
             f'tokenizer.json, or a name of tiktoken: {", ".join(names)}')
    return tokenizer_json.convert_tiktoken(name)


# -----------------------------------------------------------------------------
# mistakes end the script here, before it reads the text
start_time = time.time()
settings.check(config)
missing = []
if not input:
    missing.append('--input (your text file)')
if not name and not out_dir:
    missing.append('--name (a name for the dataset)')
if missing:
    fail(f'missing {" and ".join(missing)}',
         'for example: python data/text/prepare.py --input=book.txt --name=mybook')
if vocabulary and tokenizer != 'char':
    fail(f'--vocabulary has no effect with tokenizer={tokenizer!r}', 'leave out one of them')
if vocabulary and vocab_size != 8192:
    fail('--vocab_size has no effect with --vocabulary', 'leave out one of them')
if tokenizer != 'bpe' and vocab_size != 8192:
    fail(f'--vocab_size has no effect with tokenizer={tokenizer!r}', 'use --tokenizer=bpe')
if tokenizer == 'bpe':
    tokenizer_json.check_bpe_size(vocab_size)
if not out_dir:
    if os.path.basename(name) != name or name in (os.curdir, os.pardir):
        fail(f'name={name!r} cannot be the name of a folder', 'use a name such as mybook')
    if os.path.exists(os.path.join(ROOT, 'data', name, 'prepare.py')):
        fail(f'name={name!r} belongs to a dataset of this repository', 'use another name')
folder = out_dir or os.path.join(ROOT, 'data', name)
corpus.check_folder(folder)
run_name = name or os.path.basename(os.path.normpath(out_dir))
if num_threads:
    os.environ['RAYON_NUM_THREADS'] = str(num_threads)  # of the package tokenizers
meta = None  # GPT-2's BPE
tokenizer_text = read_tokenizer(tokenizer)
if vocabulary:
    meta = read_vocabulary(vocabulary)
elif tokenizer_text:
    meta = make_tokenizer_meta(tokenizer_text, tokenizer)

# -----------------------------------------------------------------------------
# the first pass: how many documents there are, and what a new vocabulary depends on
documents = Documents(input, field, column, encoding)
enough_documents = math.ceil(min(1 / val_share, 1e18))  # for one of them to be the validation split
is_table = tokenizer == 'char' and (not vocabulary or meta and 'stoi' in meta)
max_documents = None if is_table or tokenizer == 'bpe' else enough_documents
survey = encode.survey(documents, max_documents)
if not survey.num_documents:
    if documents.other_names:
        fail(f'{input} has no field {field!r} or column {column!r}, but '
             f'{shorten(", ".join(documents.other_names), 200)}',
             'name the one with the text: --field=NAME or --column=NAME')
    problem = 'has no text files' if documents.skipped_files else 'is empty'
    if documents.num_skipped:
        problem = f'has no text, only {documents.num_skipped:,} rows without one'
    fail(f'{input} {problem}', 'name a text file with --input=FILE')
if meta and 'stoi' in meta:
    unknown_characters = ''.join(sorted(set(survey.characters) - meta['stoi'].keys()))
    if unknown_characters:
        fail(f'the vocabulary of {vocabulary} lacks {len(unknown_characters)} characters of the '
             f'text: {shorten(unknown_characters, 50)!r}', 'remove or replace them in the text')
elif tokenizer == 'char' and not vocabulary:
    meta = make_character_meta(survey.characters)
elif tokenizer == 'bpe':
    tokenizer_text = tokenizer_json.train_bpe(survey.sample, vocab_size, sys.stderr.isatty())
    meta = make_tokenizer_meta(tokenizer_text, 'the new tokenizer')
    if meta['vocab_size'] < vocab_size:
        print(f'the text is too short for {vocab_size:,} tokens: all pairs that come twice are in')

# -----------------------------------------------------------------------------
# the second pass: encode
if survey.num_documents < enough_documents:
    pieces = encode.split_at(documents, int((1 - val_share) * survey.num_characters))
else:
    pieces = encode.split_by_document(documents, val_share)
encoder = get_tokenizer(meta)
num_tokens = encode.write_dataset(folder, documents, pieces, encoder, meta, num_threads, start_time)
if meta and 'tokenizer' in meta:
    encode.compare_with_gpt2(encoder, survey.sample)
run = dict(dataset=out_dir or name, out_dir=f'out-{run_name}')
if meta:
    run.update(plan.choose_run(num_tokens['train'], meta['vocab_size']))
    corpus.print_next_step('config/train_text.py', num_tokens, **run)
else:
    corpus.print_next_step('config/finetune_shakespeare_gpt2.py', num_tokens, **run)
