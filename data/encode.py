"""
From documents to token ids: splits them, and encodes them in parallel, in little memory.
"""
import collections
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import corpus
import numpy as np
import readers
from tqdm import tqdm

from runtime.console import fail, get_first_line
from runtime.tokenizer import find_gpt2, get_code_points

MAX_SAMPLE_LENGTH = 2 ** 25  # characters
MAX_COMPARED_LENGTH = 2 ** 21  # characters
BATCH_LENGTH = 2 ** 18  # characters that one thread encodes together


@dataclasses.dataclass
class Survey:
    """What one pass over the documents finds."""
    num_documents: int
    num_characters: int
    characters: str  # each character of the texts once
    sample: list  # texts from all over the documents, as many as a BPE needs


def survey(documents, max_documents=None):
    """Reads the documents, or only the first max_documents of them, and returns a Survey."""
    num_documents = num_characters = 0
    is_known = np.zeros(0x110000, dtype=bool)  # by code point
    sample, sample_length, stride = [], 0, 1
    with open_bar(documents, 'reading') as bar:
        for i, (text, is_last) in enumerate(documents):
            bar.update(documents.num_read_bytes - bar.n)
            num_documents += is_last
            num_characters += len(text)
            is_known[get_code_points(text)] = True
            if i % stride == 0:
                sample.append(text)
                sample_length += len(text)
            if sample_length > MAX_SAMPLE_LENGTH and len(sample) > 1:
                sample = sample[::2]  # every other one, from now on, too
                sample_length = sum(map(len, sample))
                stride *= 2
            if num_documents == max_documents:
                break
    characters = ''.join(map(chr, np.flatnonzero(is_known)))
    return Survey(num_documents, num_characters, characters, sample)


def open_bar(documents, description):
    """A progress bar over the bytes of the files, on a terminal."""
    return tqdm(total=documents.num_bytes or None, desc=description, unit='B', unit_scale=True,
                leave=False, disable=None)


def split_at(documents, num_train_characters):
    """(text, is_last, split) of pieces: the first num_train_characters of all are for training."""
    num_left = num_train_characters
    for text, is_last in documents:
        train_text, val_text = text[:num_left], text[num_left:]
        num_left -= len(train_text)
        if train_text:
            yield train_text, is_last and not val_text, 'train'
        if val_text:
            yield val_text, is_last, 'val'


def split_by_document(documents, val_share):
    """(text, is_last, split) of pieces: evenly spaced documents are for validation.

    Of a document that is very long among the others, evenly spaced pieces are.
    """
    num_characters = {'train': 0, 'val': 0}
    split = 'train'
    is_first, is_long = True, False
    for text, is_last in documents:
        num_val = num_characters['val']
        num_due = val_share * sum(num_characters.values())
        is_far_off = num_val > 2 * num_due or num_due > max(readers.PIECE_LENGTH, 2 * num_val)
        # whole documents are better, so only what is far off is cut
        is_long = not is_first and (is_long or is_far_off)
        if is_first or is_long:
            split = 'val' if num_val < num_due else 'train'
        num_characters[split] += len(text)
        yield text, is_last, split
        is_first = is_last


class EncodingError(Exception):
    """A tokenizer can't encode a text."""


class Encoder:
    """Encodes pieces of documents by several threads, and counts what it writes.

    num_tokens and num_bytes are {split: tokens} and {split: bytes of text in UTF-8}.
    """

    def __init__(self, tokenizer, dtype, files, num_threads=0):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.files = files  # {split: open file}
        self.num_threads = num_threads or os.cpu_count()
        self.num_documents = 0
        self.num_tokens = dict.fromkeys(files, 0)
        self.num_bytes = dict.fromkeys(files, 0)

    def write(self, documents, pieces):
        """Writes the ids of pieces, (text, is_last, split) each. They come from the documents."""
        with ThreadPoolExecutor(self.num_threads) as pool, open_bar(documents, 'encoding') as bar:
            for ids, num_bytes, num_documents in map_ahead(
                    pool, self.encode, take_batches(pieces), 2 * self.num_threads):
                for split, array in ids.items():
                    self.files[split].write(array)
                    self.num_tokens[split] += len(array)
                    self.num_bytes[split] += num_bytes[split]
                self.num_documents += num_documents
                bar.update(documents.num_read_bytes - bar.n)

    def encode(self, pieces):
        """({split: ids}, {split: bytes}, the number of documents that end) of some pieces."""
        arrays = {split: [] for split in self.files}
        num_bytes = dict.fromkeys(self.files, 0)
        try:
            ids = self.tokenizer.encode_batch([text for text, _, _ in pieces])
        except Exception as e:  # the package tokenizers has no class of its own for its errors
            raise EncodingError(get_first_line(e)) from e
        for (text, is_last, split), array in zip(pieces, ids):
            arrays[split].append(array)
            num_bytes[split] += len(text) if text.isascii() else len(text.encode('utf-8'))
            if is_last and self.tokenizer.end_id is not None:
                arrays[split].append([self.tokenizer.end_id])
        joined_ids = {split: np.concatenate(parts).astype(self.dtype)
                      for split, parts in arrays.items() if parts}
        return joined_ids, num_bytes, sum(is_last for _, is_last, _ in pieces)


def write_dataset(folder, documents, pieces, tokenizer, meta, num_threads, start_time):
    """Encodes the pieces and writes them as a dataset, with a summary. Returns {split: tokens}."""
    with corpus.replace_dataset(folder, meta) as files:
        encoder = Encoder(tokenizer, corpus.get_dtype(meta), files, num_threads)
        try:
            encoder.write(documents, pieces)
        except EncodingError as e:
            fail(f'the tokenizer cannot encode this text ({e})', 'use another tokenizer')
        corpus.check_lengths(encoder.num_tokens)
        if meta:
            meta['val_bytes'] = encoder.num_bytes['val']
    num_bytes, num_tokens = sum(encoder.num_bytes.values()), sum(encoder.num_tokens.values())
    noun = 'document' if encoder.num_documents == 1 else 'documents'
    print(f'text: {num_bytes:,} bytes in {encoder.num_documents:,} {noun}, '
          f'{num_bytes / num_tokens:.2f} bytes per token')
    documents.print_omissions()
    corpus.print_summary(folder, encoder.num_tokens, meta, start_time)
    return encoder.num_tokens


def take_batches(pieces):
    """Lists of pieces of about BATCH_LENGTH characters together."""
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[0])
        if length >= BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def map_ahead(pool, function, items, max_ahead):
    """The results for all items in their order; at most max_ahead of them wait for their turn."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > max_ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def compare_with_gpt2(tokenizer, texts):
    """Prints the bytes per token of texts, and of GPT-2's BPE, if that can be had here."""
    bpe = find_gpt2()
    if not bpe:
        return
    texts = texts[::1 + sum(map(len, texts)) // MAX_COMPARED_LENGTH]
    num_bytes = sum(len(text.encode('utf-8')) for text in texts)
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    num_gpt2_tokens = sum(len(bpe.encode_ordinary(text)) for text in texts)
    print(f'bytes per token, without the ends of documents: {num_bytes / num_tokens:.2f}; '
          f"with GPT-2's BPE: {num_bytes / num_gpt2_tokens:.2f}")
