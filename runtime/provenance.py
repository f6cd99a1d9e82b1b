"""
What makes a run: its settings, source code and data. Says what differs between the ranks, or
between a checkpoint and the run that continues from it.
"""
import hashlib
import os
import sys

import torch
import torch.distributed as dist

from runtime import restore
from runtime.console import ROOT, fail, say, shorten, warn
from runtime.distributed import gather_objects
from runtime.files import describe_changes

# settings that may differ from one machine to another
PLACES = {'out_dir', 'dataset', 'device', 'wandb_log', 'wandb_project', 'wandb_run_name'}
# settings that change neither what a run learns nor its losses
OUTER_SETTINGS = PLACES | {
    'init_from', 'backend', 'dtype', 'compile', 'eval_interval', 'log_interval', 'eval_only',
    'save_interval', 'max_bad_steps', 'parallel', 'activation_checkpointing'}
# settings for which the values of the checkpoint's optimizer count, see restore.load_optimizer()
OPTIMIZER_SETTINGS = {'weight_decay', 'beta1', 'beta2', 'momentum'}


def check_ranks(config, data_id):
    """Fails if the ranks have different settings, source code or data.

    Their copies of the model would drift apart, or be parts of different models, without an error.
    """
    if not dist.is_initialized():
        return
    facts = {f'--{name}': value for name, value in config.items() if name not in PLACES}
    if os.path.isdir(config.get('init_from', '')):
        facts['--init_from'] = 'a folder'
    facts['torch'] = torch.__version__
    facts.update(hash_sources())
    facts.update({f'{split}.bin': value['hash'] for split, value in data_id.items()})
    facts_by_rank = gather_objects(facts)
    first_facts = facts_by_rank[0]
    for rank, facts in enumerate(facts_by_rank):
        # somebody may import a module only on rank 0, which does not matter
        differences = [f'{name} is {facts[name]} there and {value} here'
                       for name, value in first_facts.items() if facts.get(name, value) != value]
        if differences:
            fail(f'rank {rank} does not run what rank 0 runs: '
                 f'{shorten("; ".join(differences), 300)}',
                 'start all ranks with the same settings, code and data')


def check_iterations(iter_num, out_dir):
    """Fails if the ranks found checkpoints of different iterations."""
    if not dist.is_initialized():
        return
    if len(set(gather_objects(iter_num))) > 1:
        fail(f'the ranks found different checkpoints in {out_dir}: '
             f'rank {dist.get_rank()} is at iteration {iter_num}',
             'out_dir must be a folder that all machines share, or the same on each', who='rank')


def hash_sources():
    """{file: hash} of the loaded modules that belong to this repository, and of the script."""
    script = os.path.abspath(getattr(sys.modules['__main__'], '__file__', ''))
    paths = {getattr(module, '__file__', None) or '' for module in list(sys.modules.values())}
    hashes = {}
    for path in sorted({*paths, script}):
        name = os.path.relpath(path or ROOT, ROOT)
        is_ours = not name.startswith(os.pardir) and 'site-packages' not in name
        if not path.endswith('.py') or not os.path.isfile(path) or not (is_ours or path == script):
            continue
        if not is_ours:
            name = os.path.basename(path)
        hashes[name] = hash_source(path)
    return hashes


def hash_source(path):
    """A hash of a source file. It is the same with another system's line ends."""
    with open(path, encoding='utf-8', errors='replace') as f:
        return hashlib.sha256(f.read().encode()).hexdigest()[:16]


def print_changes(state, config, data_id, overruled_options):
    """Prints which settings and data differ from those of the checkpoint `state`.

    overruled_options are those of the optimizer for which the checkpoint's values count. Returns
    whether the best val loss still counts: it doesn't on another val split.
    """
    old_config = state['config']
    names = config.keys() & old_config.keys() - OUTER_SETTINGS - OPTIMIZER_SETTINGS
    names -= {*state['model_args'], *restore.OPTIONS} - {'dropout'}  # those of the weights count
    changes = [f'{name}={value} (it was {old_config[name]})' for name, value in config.items()
               if name in names and value != old_config[name]]
    texts = []
    if changes:
        texts.append(f'{", ".join(changes)}: the new values count')
    if overruled_options:
        options = ', '.join(f'{key}={value}' for key, value in overruled_options.items())
        texts.append(f'{options} come from the checkpoint, not from the settings')
    if texts:
        say(f'since the checkpoint, settings have changed: {"; ".join(texts)}')

    data_changes, is_same_split = compare_data(state, config, data_id)
    if not data_changes:
        return True
    text = f'the data is not that of the checkpoint: {"; ".join(data_changes)}'
    if not is_same_split:
        text += '; the best val loss starts again, and ckpt.pt with it'
    warn(text)
    return is_same_split


def compare_data(state, config, data_id):
    """How the data differs from that of the checkpoint `state`, as a list of texts.

    Also returns whether the val split is the same.
    """
    old_id = state.get('data')
    if old_id:
        return describe_changes(old_id, data_id), old_id.get('val') == data_id['val']
    name = config['dataset']  # nanoGPT's checkpoints know only the name
    old_name = str(state['config'].get('dataset', name))
    if os.path.basename(os.path.normpath(old_name)) == os.path.basename(os.path.normpath(name)):
        return [], True
    return [f'it was {old_name}'], False
