"""
What is in a checkpoint: what nanoGPT and its forks write, checked, and with plain values.
"""
import math
import struct
import zipfile

import torch

from runtime import pickles
from runtime.console import warn
from runtime.files import read_data_id
from runtime.meta import check_meta

# the state of a GradScaler
SCALER = {'scale': float, 'growth_factor': float, 'backoff_factor': float, 'growth_interval': int,
          '_growth_tracker': int}
# the bytes of a number, by the name that torch gives to the memory of a tensor
ITEM_SIZES = {'torch.storage UntypedStorage': 1, 'torch BoolStorage': 1, 'torch ByteStorage': 1,
              'torch CharStorage': 1, 'torch ShortStorage': 2, 'torch HalfStorage': 2,
              'torch BFloat16Storage': 2, 'torch IntStorage': 4, 'torch FloatStorage': 4,
              'torch LongStorage': 8, 'torch DoubleStorage': 8, 'torch ComplexFloatStorage': 8,
              'torch ComplexDoubleStorage': 16}
# another program may have other things by these names, which are left out
TYPES = {'model': dict, 'model_args': dict, 'config': dict, 'optimizer': (dict, list),
         'optimizer_name': str, 'scaler': dict, 'wandb_id': str, 'finished': bool,
         'data': dict}


def check_archive(path):
    """ValueError if the file is damaged, is compressed or has more than tensors and values."""
    with open(path, 'rb') as f:  # is_zipfile() would hide that it can't be opened
        if not zipfile.is_zipfile(f):
            raise ValueError('it was cut short, or is in the format of torch before 1.6')
    with zipfile.ZipFile(path) as archive:
        read_pickle(archive)  # first: entries that overlap would take testzip() very long
        damaged_entry = archive.testzip()  # torch.load doesn't look at the checksums
    if damaged_entry:
        raise ValueError(f'{damaged_entry} in it is damaged')


def read_pickle(archive):
    """The values in the pickle that torch finds in the archive, with None for a tensor.

    Raises an exception if it has anything but tensors and plain values.
    """
    name = find_pickle(archive)
    content = archive.read(name)
    if torch._C.PyTorchFileReader(archive.filename).get_record('data.pkl') != content:
        raise ValueError('it has two pickles')
    storages = []
    values = pickles.read(content, file_size=archive.start_dir, storages=storages)
    for _, kind, key, _, count in storages:
        # torch maps the numbers of a tensor from the file, and doesn't look where they end
        if archive.getinfo(f'{name[:-4]}/{key}').file_size != count * ITEM_SIZES[kind]:
            raise ValueError(f'{name[:-4]}/{key} in it has another size than its tensor')
    return values


def find_pickle(archive):
    """The name of the pickle in a checkpoint's archive, which zipfile has opened.

    ValueError if another reader of archives, such as torch's, may find another one.
    """
    entries = archive.infolist()
    names = [entry.orig_filename for entry in entries]
    folder = ''.join(names[:1]).partition('/')[0] + '/'
    if not all(name.startswith(folder) and '\0' not in name for name in names):
        raise ValueError('it has several folders')
    if len({name.lower() for name in names}) < len(names):  # torch's reader ignores the case
        raise ValueError('it has two entries of one name')
    if [name for name in names if name.lower().endswith('.pkl')] != [folder + 'data.pkl']:
        raise ValueError('it has other pickles than data.pkl')
    if any(entry.compress_type for entry in entries):
        raise ValueError('it is compressed, which torch never does')
    with open(archive.filename, 'rb') as f:
        signature = f.read(4)
        f.seek(archive.start_dir)
        directory = f.read()
    count, size, start = len(entries), len(directory) - 22, archive.start_dir
    if directory[-42:-38] == b'PK\6\7':  # the directory's end in 64 bits
        size -= 76
        end = struct.pack('<4Q4sLQL', count, count, size, start, b'PK\6\7', 0, start + size, 1)
        end = b'PK\6\6' + directory[-94:-74] + end + directory[-22:-2] + bytes(2)
    else:
        end = struct.pack('<2H2LH', count, count, size, start, 0)
    if signature + directory[-22:-18] != b'PK\3\4PK\5\6' or not directory.endswith(end):
        raise ValueError('it has other things before or after its entries')
    if sum(entry.file_size for entry in entries) > start:
        raise ValueError('its entries overlap')
    return folder + 'data.pkl'


def make_plain(state, path):
    """A checkpoint's dict with plain values. nanoGPT's forks leave out some, or write other types.

    What is missing or can't be used gets a default, and one line says so. ValueError if that would
    make another model or another run.
    """
    if not isinstance(state, dict):
        raise ValueError('it is not a dict')
    plain_state = {}
    for key, value in state.items():
        if value is not None and isinstance(value, TYPES.get(key, object)):
            plain_state[key] = dict(value) if isinstance(value, dict) else value
    missing_keys = {'model', 'model_args'} - plain_state.keys()
    if missing_keys:
        raise ValueError(f'it has no {" or ".join(sorted(missing_keys))}')
    defaults = {'iter_num': 0, 'best_val_loss': math.inf, 'config': {}}
    unusable_keys = [key for key in defaults if key not in plain_state]
    readers = {'best_val_loss': read_loss, 'val_loss': read_loss, 'meta': check_meta,
               'scaler': read_scaler, 'data': read_data_id}
    for key in [key for key in readers if key in plain_state]:
        try:
            plain_state[key] = readers[key](plain_state[key])
        except Exception:  # it may be anything
            unusable_keys.append(key)
            del plain_state[key]
    if unusable_keys:
        text = ', '.join(f'{key}={defaults.get(key)}' for key in unusable_keys)
        warn(f'{path} is incomplete: it is read with {text}')
    plain_state = {**defaults, **plain_state}
    iter_num = read_number(plain_state['iter_num'])
    if not 0 <= iter_num < 2 ** 63 or iter_num != int(iter_num):
        raise ValueError('its iter_num is not a whole number from 0 to 2**63 - 1')
    if plain_state.get('gelu', 'none') not in ('none', 'tanh'):
        raise ValueError('its gelu is neither none nor tanh')
    return {**plain_state, 'iter_num': int(iter_num)}


def read_number(value):
    """A number, or that in a tensor; ValueError if it is something else."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if type(value) not in (int, float):
        raise ValueError(f'it has a {type(value).__name__} in place of a number')
    float(value)  # raises if it is too large
    return value


def read_loss(value):
    """A loss. NaN becomes infinity: otherwise no later loss would be better."""
    loss = read_number(value)
    return math.inf if math.isnan(loss) else loss


def read_scaler(state):
    """The state of a GradScaler, which is empty if it was off, with values of the right type."""
    return {key: kind(read_number(state[key])) for key, kind in SCALER.items() if state}


def rename_weights(weights, model_args):
    """The weights without the prefixes that torch.compile and DDP put before their names."""
    plain_weights = {}
    for name, tensor in weights.items():
        name = name.replace('_orig_mod.', '')
        while name.startswith('module.'):
            name = name.removeprefix('module.')
        # old versions of nanoGPT saved the causal mask (1, 1, T, T) as a weight
        if not (name.endswith('.attn.bias') and tensor.dim() == 4 and tensor.size(1) == 1):
            plain_weights[name] = tensor
    wte = plain_weights.get('transformer.wte.weight')
    has_head = any(name.startswith('lm_head.') for name in plain_weights)
    is_tied = model_args.get('tied', True) and (not has_head or 'lm_head.weight' in plain_weights)
    if wte is not None and is_tied:
        plain_weights.setdefault('lm_head.weight', wte)
    for option in ('qk_norm', 'relu2'):  # older checkpoints don't have these marks, see model.py
        if model_args.get(option):
            plain_weights.setdefault(option, torch.ones(()))
    return plain_weights


def count_bytes(value, seen_ids):
    """The bytes of the tensors in nested containers, as float32 or larger types.

    ValueError for tensors that are sparse, quantized or not on a CPU.
    """
    if id(value) in seen_ids:
        return 0
    if isinstance(value, torch.Tensor):
        seen_ids.add(id(value))
        is_plain = value.layout == torch.strided and value.device.type == 'cpu'
        if not is_plain or value.is_quantized:
            raise ValueError('it has a tensor that is not plain numbers on a CPU')
        return max(4, value.itemsize) * value.numel()
    if isinstance(value, (dict, list, tuple)):
        seen_ids.add(id(value))
        items = value.values() if isinstance(value, dict) else value
        return sum(count_bytes(item, seen_ids) for item in items)
    return 0


def check_sizes(model_args, shapes):
    """ValueError if the arguments ask for a larger or deeper model than {name: shape} has."""
    max_size = max((n for shape in shapes.values() for n in shape), default=0)
    num_layers = min(1000, len(shapes))  # a layer has at least one weight
    for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bigrams', 'embd_conv'):
        is_optional = key in ('bigrams', 'embd_conv')
        n = model_args.get(key, 0 if is_optional else None)
        limit = num_layers if key == 'n_layer' else max_size
        if key == 'block_size' and 'transformer.wpe.weight' not in shapes:
            limit = 2 ** 24  # no weight depends on it
        if type(n) is not int or not (0 if is_optional else 1) <= n <= limit:
            value_text = n if type(n) is int else type(n).__name__
            raise ValueError(f'{key}={value_text} does not fit its weights')
