"""
Datasets: finding and opening them, and which tokens a training iteration reads in which order.

A dataset is a folder with train.bin and val.bin, or shards of them, and with meta.pkl if its tokens
aren't GPT-2's. runtime/shards.py opens the files.
"""
import ast
import functools
import math
import os
import shlex

import numpy as np
import torch

from runtime.console import ROOT, fail, format_script, warn
from runtime.files import describe_changes, fingerprint
from runtime.shards import list_bins
from runtime.tokenizer import have_same_tokens, is_gpt2_vocabulary

SPLITS = 'train', 'val'


def list_places(name):
    """Where a dataset of this name may be: the name as a path and data/<name>.

    Each is tried first in the current folder, then in the repository.
    """
    places = [name, os.path.join('data', name)]
    return places + [os.path.join(ROOT, place) for place in places]


def locate_data(name):
    """The folder with the dataset's train.bin and val.bin, or shards; None if there is none."""
    for place in list_places(name):
        if all(list_bins(place, split) for split in SPLITS):
            return place


def find_data(name):
    """locate_data(), or fails with the command that prepares the dataset."""
    folder = locate_data(name)
    if folder:
        return folder
    prepare = os.path.join(ROOT, 'data', name, 'prepare.py')
    if not os.path.isfile(prepare):
        places = f'neither {name} nor data/{name} is'
        if os.path.isabs(name):
            places = 'it is not'
        check_splits(name)
        fail(f'dataset {name!r} was not found: {places} a folder with train.bin and val.bin',
             'to prepare your own text: '
             'python data/text/prepare.py --input=FILE --name=NAME')
    with open(prepare, encoding='utf-8') as f:
        description = ast.get_docstring(ast.parse(f.read())) or 'no description'
    fail(f'dataset {name} is not prepared ({description.splitlines()[0]})',
         f'prepare it: {format_script(prepare)}  or start small, without a download: '
         f'{format_script("data/python_bpe/prepare.py")} && '
         f'{format_script("train.py", "config/train_python_bpe.py")}')


def check_splits(name):
    """Fails if one of the places for a dataset has only one of its splits."""
    for place in list_places(name):
        paths_by_split = {split: list_bins(place, split) for split in SPLITS}
        for split, other_split in (SPLITS, SPLITS[::-1]):
            paths = paths_by_split[split]
            if paths and not paths_by_split[other_split]:
                fail(f'{place} has {os.path.basename(paths[0])}, but no {other_split}.bin, and no '
                     f'shards with {other_split} in their names', 'a dataset needs both')


def identify_data(data_dir, meta=None):
    """{split: fingerprint} of a dataset; warns if its meta.pkl was written with others."""
    data_id = {split: fingerprint(*list_bins(data_dir, split)) for split in SPLITS}
    changes = describe_changes((meta or {}).get('bins', {}), data_id)
    if changes:
        warn(f'meta.pkl in {data_dir} was written with other .bin files: {"; ".join(changes)}. '
             'If you have not changed them, prepare the dataset again')
    return data_id


def check_vocabulary(meta, state, data_dir, path, remedy='name the right one with --dataset'):
    """Fails if a dataset has other tokens than the checkpoint `state`, read from path.

    meta is the dataset's meta.pkl, or None for GPT-2's BPE.
    """
    trained_meta = state.get('meta') or {}
    vocab_size = state['model_args']['vocab_size']
    tokenizer_is_known = trained_meta.keys() & {'stoi', 'tokenizer'}
    if meta is None:
        if is_gpt2_vocabulary(vocab_size) and not tokenizer_is_known:
            return
        problem = f'{data_dir} has no meta.pkl, so it is GPT-2 BPE'
    elif tokenizer_is_known:
        if have_same_tokens(trained_meta, meta):
            return
        problem = f'{data_dir} has other tokens'
        if path.endswith('.pt'):
            folder = shlex.quote(os.path.dirname(path))
            remedy += f', or prepare the text with --vocabulary={folder}'
    elif 'tokenizer' in meta and is_gpt2_vocabulary(vocab_size):
        problem = f'{data_dir} has a tokenizer of its own'
    else:  # nanoGPT's checkpoints have no table of characters, and its forks pad the vocabulary
        padding = vocab_size - meta['vocab_size']
        if padding == 0 or 0 < padding < 128 and vocab_size % 64 == 0:
            return
        problem = f'{data_dir} has a vocabulary of {meta["vocab_size"]}'
    fail(f'{problem}, but {path} was trained on another dataset, '
         f'with a vocabulary of {vocab_size}', remedy)


class DataOrder:
    """Where the sequences begin that each training iteration reads.

    This is a pure function of the seed and the iteration. So no generator's state is saved, and
    a resumed run, or one on another number of ranks, reads the same sequences, as long as the
    sequences per iteration stay the same.

    'random': anywhere in the split, by one draw of a counter-based generator per iteration.
    'epochs': next to one another and shuffled, so that no token comes twice within an epoch.
    """

    def __init__(self, kind, seed, num_tokens, block_size, batch_size, micro_batches):
        self.kind = kind
        self.seed = seed
        self.block_size = block_size
        self.batch_size = batch_size
        self.micro_batches = micro_batches  # of an iteration, on all ranks together
        self.num_starts = num_tokens - block_size  # a target follows the last token
        # as many as fit next to one another, wherever the first one begins
        self.per_epoch = max(1, self.num_starts // block_size)
        self.philox = np.random.Philox(key=seed)
        self.philox_state = self.philox.state
        self.epoch_starts = functools.lru_cache(1)(self.draw_epoch)

    def get_starts(self, iter_num, micro_batch):
        """The first tokens of the sequences of a micro-batch, (batch_size,).

        micro_batch is its number among those of all ranks in this iteration.
        """
        if self.kind == 'epochs':
            first_number = (iter_num * self.micro_batches + micro_batch) * self.batch_size
            numbers = range(first_number, first_number + self.batch_size)
            numbers = (divmod(n, self.per_epoch) for n in numbers)
            return np.array([self.epoch_starts(epoch)[n] for epoch, n in numbers])
        self.philox_state['state']['counter'][3] = iter_num
        self.philox.state = self.philox_state  # a tenth of the time of a new generator
        count = max(self.micro_batches, micro_batch + 1)  # somebody may train on more
        raw = self.philox.random_raw(count * self.batch_size)
        return raw[micro_batch * self.batch_size:][:self.batch_size] % self.num_starts

    def draw_epoch(self, epoch):
        """The first tokens of an epoch's sequences, (per_epoch,), in their order."""
        rng = np.random.default_rng((self.seed, epoch))
        num_unused = self.num_starts - (self.per_epoch - 1) * self.block_size
        first_start = rng.integers(num_unused)  # another one in each epoch
        return first_start + self.block_size * rng.permutation(self.per_epoch)


def list_eval_batches(tokens, split, block_size, batch_size, eval_iters, rank=0, world_size=1):
    """What an evaluation of a split of tokens reads on this rank: (batches, total_weight).

    A batch is (starts, mask, weight): the first tokens of its sequences (batch_size,), a mask
    (batch_size, block_size) of the targets that an earlier sequence has, or None, and the share of
    the other targets. Each rank has the same number of batches, perhaps a last one of weight 0.
    total_weight is that of all ranks.

    eval_iters batches are evenly spaced over the split. With eval_iters=0 the sequences are next to
    one another, so that every token is predicted once; of train it is as many as of val.
    """
    last_start = len(tokens[split]) - block_size - 1  # the last start that leaves room for a target
    exact_split = 'val' if split == 'train' else split
    num_batches = eval_iters or math.ceil((len(tokens[exact_split]) - 1) / block_size / batch_size)
    num_sequences = num_batches * batch_size
    starts = np.linspace(0, last_start, num_sequences).astype(np.int64)
    num_repeated = np.zeros_like(starts)
    if eval_iters == 0 and split != 'train':
        adjacent_starts = np.arange(num_sequences) * block_size
        starts = np.minimum(adjacent_starts, last_start)
        num_repeated = np.minimum(adjacent_starts - starts, block_size)
    starts = starts.reshape(num_batches, batch_size)
    num_repeated = num_repeated.reshape(num_batches, batch_size)
    weights = 1 - num_repeated.mean(axis=1) / block_size
    batches = []
    for first_batch in range(0, num_batches, world_size):
        b = min(first_batch + rank, num_batches - 1)
        weight = weights[b] if first_batch + rank < num_batches else 0.0
        mask = None
        if num_repeated[b].any():
            mask = torch.arange(block_size) < torch.from_numpy(num_repeated[b, :, None])
        batches.append((starts[b], mask, float(weight)))
    return batches, float(weights.sum())


def move_to_device(rows, device):
    """Token ids as an int64 tensor on the device.

    To a GPU they are copied while it computes, which only pinned memory allows.
    """
    rows = torch.from_numpy(rows.astype(np.int64))
    if torch.device(device).type != 'cuda':
        return rows.to(device)
    stream = get_copy_stream(device)
    with torch.cuda.stream(stream):
        rows = rows.pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    rows.record_stream(torch.cuda.current_stream())
    return rows


@functools.lru_cache(None)
def get_copy_stream(device):
    return torch.cuda.Stream(device)
