"""
OpenWebText in GPT-2's BPE: 54 GB of text, 9.0B training tokens (17 GB), and as much again twice over for the cache.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --input='crawl/*.parquet'
"""
import glob
import math
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
import corpus

from tokenizer import END_OF_TEXT, GPT2Tokenizer

# text
input = ''  # files in its place, as a glob: .parquet, .jsonl (column text) or .txt (documents between blank lines), also .gz
num_proc = 0  # processes to tokenize with; 0: one per core
part = 125_000  # documents tokenized at a time: what a stopped run keeps is whole parts
out_dir = ''  # where train.bin and val.bin go; '': this folder
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'configurator.py'), encoding='utf-8').read())

bpe = GPT2Tokenizer().bpe
end_of_text = bpe.encode_single_token(END_OF_TEXT)


def tokenize(batch):
    """Ids of each document, ended by <|endoftext|>."""
    return {'ids': [bpe.encode_ordinary(text) + [end_of_text] for text in batch['text']]}


def load_documents():
    """The dataset of all documents, one column of text; datasets keeps it on disk and maps it into memory."""
    import datasets
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not input:
        try:
            return datasets.load_dataset('Skylion007/openwebtext', split='train', num_proc=processes)
        except Exception as e:  # network, hub and disk errors have no common base
            corpus.fail(f'OpenWebText could not be fetched from the Hugging Face hub ({type(e).__name__})',
                        'without a network, name files of yours with --input=GLOB, '
                        'or take the dataset that needs none: python data/python_char/prepare.py')
    files = sorted(glob.glob(input, recursive=True))
    kinds = {os.path.splitext(f.removesuffix('.gz'))[1] for f in files}
    builder = {'.parquet': 'parquet', '.jsonl': 'json', '.txt': 'text'}.get(*kinds or {''}) if len(kinds) < 2 else None
    if not builder:
        corpus.fail(f'--input={input} matches {len(files)} files of kind {" ".join(sorted(kinds)) or "none"}',
                    'name files of one kind: .parquet, .jsonl or .txt, which may end in .gz')
    documents = datasets.load_dataset(builder, data_files=files, split='train', **({'sample_by': 'paragraph'} if builder == 'text' else {}))
    if 'text' not in documents.column_names:
        corpus.fail(f'{files[0]} has no column text, only {", ".join(documents.column_names)}', 'rename the column')
    return documents


if __name__ == '__main__':  # worker processes may import this file again
    import datasets
    from tqdm import tqdm
    started = time.time()
    corpus.check_ranges(config)
    processes = num_proc or os.cpu_count()
    folder = out_dir or os.path.dirname(os.path.abspath(__file__))
    corpus.make_folder(folder)
    documents = load_documents()
    if len(documents) < 2:
        corpus.fail(f'{input} has {len(documents)} documents', 'at least two are needed, one for either split')
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, name in (('train', 'train'), ('test', 'val')):
        # datasets caches each part: run again, this goes on where it was stopped
        parts = math.ceil(len(splits[split]) / part)
        tokenized = datasets.concatenate_datasets([
            splits[split].shard(parts, i, contiguous=True).map(
                tokenize, batched=True, remove_columns=documents.column_names, num_proc=processes, desc=f'tokenizing, part {i + 1} of {parts} of {name}',
                features=datasets.Features({'ids': datasets.List(datasets.Value('uint16'))})) for i in range(parts)])
        path, tokens = os.path.join(folder, f'{name}.bin'), 0
        with open(path + '.tmp', 'wb') as f:
            for table in tqdm(tokenized.with_format('arrow').iter(1000), desc=f'writing {name}.bin', unit='kdoc', disable=None):
                ids = table['ids'].combine_chunks().flatten().to_numpy()
                ids.astype('<u2').tofile(f)
                tokens += len(ids)
        os.replace(path + '.tmp', path)
        print(f'{name}.bin: {len(splits[split]):,} documents, {tokens:,} tokens, {2 * tokens:,} bytes')
    print('vocabulary: GPT-2 BPE, 50,257 tokens')
    print(f'written to {corpus.shown(folder)} in {time.time() - started:.1f} s by {processes} processes')
    corpus.print_next('config/train_gpt2.py' + (f' --dataset={out_dir}' if out_dir else ''))
