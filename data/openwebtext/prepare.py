"""
OpenWebText in GPT-2's BPE: 54 GB of text, 9.0B training tokens (17 GB), about 100 GB of free disk.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --input='crawl/*.parquet'

Blank lines separate the documents of a .txt file. The others have a column text.
"""
import glob
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # data/
sys.path.insert(0, os.path.dirname(sys.path[0]))  # the repository's root
import corpus

from runtime import settings
from runtime.console import ROOT, fail, get_first_line, shorten_path
from runtime.tokenizer import END_OF_TEXT, GPT2Tokenizer

# input and output
input = ''  # your own files instead, as a glob: .parquet, .jsonl or .txt, also with .gz
num_proc = 0  # processes that tokenize; 0: one per core
part = 125_000  # documents in a part; a stopped run resumes after the last finished part
out_dir = ''  # where train.bin and val.bin are written; '': this folder
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

BUILDERS = {'.parquet': 'parquet', '.jsonl': 'json', '.txt': 'text'}  # of the package datasets

bpe = GPT2Tokenizer().bpe
end_of_text = bpe.encode_single_token(END_OF_TEXT)


def tokenize(batch):
    """The token ids of each document, with <|endoftext|> at its end."""
    return {'ids': [bpe.encode_ordinary(text) + [end_of_text] for text in batch['text']]}


def load_documents():
    """A dataset of all documents with one column, text. It is on disk, mapped into memory."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not input:
        try:
            return datasets.load_dataset('Skylion007/openwebtext', split='train',
                                         num_proc=processes)
        except Exception as e:  # network, hub and disk errors have no common base class
            fail(f'OpenWebText could not be fetched from the Hugging Face hub '
                 f'({type(e).__name__})',
                 'without a network, name files of your own with --input=GLOB, or use the '
                 'dataset that needs no download: python data/python_bpe/prepare.py')
    files = sorted(glob.glob(input, recursive=True))
    kinds = sorted({os.path.splitext(f.removesuffix('.gz'))[1] for f in files})
    if len(kinds) != 1 or kinds[0] not in BUILDERS:
        fail(f'--input={input} matches {len(files)} files of kind {" ".join(kinds) or "none"}',
             'name files of one kind: .parquet, .jsonl or .txt, which may end in .gz')
    builder = BUILDERS[kinds[0]]
    options = {'sample_by': 'paragraph'} if builder == 'text' else {}
    try:
        documents = datasets.load_dataset(builder, data_files=files, split='train', **options)
    except Exception as e:  # the package's errors have no common base class
        reason = e.__cause__ or e  # it says more
        fail(f'{input} cannot be read ({type(reason).__name__}: {get_first_line(reason)})',
             'name files in UTF-8; data/text/prepare.py reads other encodings')
    if 'text' not in documents.column_names:
        columns = ', '.join(documents.column_names)
        fail(f'{files[0]} has no column text, only {columns}', 'rename the column')
    if documents.features['text'].dtype not in ('string', 'large_string', 'null'):
        fail(f"the column text of {files[0]} has values of type {documents.features['text'].dtype}",
             'name files with texts in it')
    num_skipped = documents.data.column('text').null_count
    if num_skipped:
        documents = documents.filter(lambda text: text is not None, input_columns='text')
        print(f'skipped rows without text: {num_skipped:,}')
    return documents


def tokenize_parts(documents, name):
    """Tokenizes the documents part by part; datasets caches each part that is finished."""
    num_parts = math.ceil(len(documents) / part)
    parts = []
    for i in range(num_parts):
        shard = documents.shard(num_parts, i, contiguous=True)
        parts.append(shard.map(
            tokenize, batched=True, remove_columns=documents.column_names, num_proc=processes,
            features=datasets.Features({'ids': datasets.List(datasets.Value('uint16'))}),
            desc=f'tokenizing, part {i + 1} of {num_parts} of {name}'))
    return datasets.concatenate_datasets(parts)


def write_ids(f, tokenized):
    """Writes all token ids to the file, and returns how many."""
    num_tokens = 0
    tables = tokenized.with_format('arrow').iter(1000)
    description = f'writing {os.path.basename(f.name.removesuffix(".tmp"))}'
    for table in tqdm(tables, desc=description, unit='kdoc', disable=None):
        ids = table['ids'].combine_chunks().flatten().to_numpy()
        f.write(ids.astype('<u2'))
        num_tokens += len(ids)
    return num_tokens


if __name__ == '__main__':  # worker processes may import this file again
    import datasets  # here, as it takes long: --help and mistakes in flags shouldn't wait for it
    from tqdm import tqdm
    start_time = time.time()
    settings.check(config)
    processes = num_proc or os.cpu_count()
    folder = out_dir or os.path.dirname(os.path.abspath(__file__))
    documents = load_documents()
    if len(documents) < 2:
        fail(f'{input} has {len(documents)} documents',
             'at least two are needed, one for each split')
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    num_tokens = {}
    with corpus.replace_dataset(folder, None) as files:
        for split, name in (('train', 'train'), ('test', 'val')):
            num_tokens[name] = write_ids(files[name], tokenize_parts(splits[split], name))
            print(f'{name}.bin: {len(splits[split]):,} documents, {num_tokens[name]:,} tokens, '
                  f'{2 * num_tokens[name]:,} bytes')
    print('vocabulary: GPT-2 BPE, 50,257 tokens')
    seconds = time.time() - start_time
    print(f'written to {shorten_path(folder)} in {seconds:.1f} s by {processes} processes')
    corpus.print_next_step('config/train_gpt2.py', num_tokens, dataset=out_dir)
