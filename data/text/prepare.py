"""
Your own text, by characters or in GPT-2's BPE: writes data/<name> for --dataset=<name>.

    python data/text/prepare.py --input=book.txt --name=mybook
    python train.py config/train_python_char.py --dataset=mybook --out_dir=out-mybook
"""
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import corpus

from tokenizer import GPT2Tokenizer

# text
input = ''  # a UTF-8 text file
name = ''  # of the dataset
tokenizer = 'char'  # char (a vocabulary of its characters, to train from scratch) | gpt2 (GPT-2's BPE, to finetune GPT-2)
out_dir = ''  # where the dataset goes; '': data/<name>
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'configurator.py'), encoding='utf-8').read())

started = time.time()
data = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not input or not (name or out_dir):
    corpus.fail('your text and a name for it are needed', 'python data/text/prepare.py --input=book.txt --name=mybook')
if tokenizer not in ('char', 'gpt2'):
    corpus.fail(f'tokenizer={tokenizer!r} is not known', 'use char or gpt2')
if not out_dir and (os.path.basename(name) != name or name in (os.curdir, os.pardir) or os.path.exists(os.path.join(data, name, 'prepare.py'))):
    corpus.fail(f'name={name!r} is taken by a dataset of this repository, or is no name of a folder', 'choose another one')
text = corpus.read_text(input)
print(f'text: {len(text):,} characters')
split = int(0.9 * len(text))
if tokenizer == 'char':
    meta = corpus.char_table(text)
    train_ids, val_ids = corpus.encode_chars(text[:split], meta), corpus.encode_chars(text[split:], meta)
else:
    meta, encode = None, GPT2Tokenizer().encode_ordinary
    train_ids, val_ids = encode(text[:split]), encode(text[split:])
config_file = 'train_python_char' if tokenizer == 'char' else 'finetune_shakespeare_gpt2'
corpus.write_splits(out_dir or os.path.join(data, name), train_ids, val_ids, meta, started,
                    f'config/{config_file}.py --dataset={out_dir or name} --out_dir=out-{name or os.path.basename(os.path.normpath(out_dir))}')
