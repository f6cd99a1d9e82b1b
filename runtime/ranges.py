"""
What the values of the settings may be: types, ranges, choices and combinations.
"""
import ast
import io
import math
import numbers
import os
import re
import tokenize

from runtime.console import fail, shorten

KINDS = (bool, int, float, str, type(None), list, tuple, dict)  # the types of a setting
DESCRIPTIONS = {
    'auto': "'auto' or its own type", bool: 'True or False', str: 'a string', int: 'a whole number',
    float: 'a number', list: 'a list', tuple: 'a tuple', dict: 'a dict',
    type(None): 'a number, a text, a list, a tuple or a dict',
}
# what None means for a number: the value that switches the setting off
NONE_MEANS = dict(top_k=0, grad_clip=0, save_interval=0, dropout=0, top_p=1, rope_base=0, bigrams=0,
                  embd_conv=0)
# what float('inf') means for a number: no limit, or never
INFINITY_MEANS = dict(top_k=0, grad_clip=0, save_interval=0, max_iters=10 ** 18,
                      lr_decay_iters=10 ** 18, eval_interval=10 ** 18, log_interval=10 ** 18,
                      max_bad_steps=10 ** 18)
PATHS = ('dataset', 'init_from', 'input', 'png', 'runs', 'vocabulary')  # and all *_dir and *_path

# (what a value must be, the test of it, the settings)
RANGES = (
    ('at least 1', lambda v: v >= 1, (
        'n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps',
        'eval_interval', 'log_interval', 'max_bad_steps', 'num_samples', 'max_bytes', 'repeats',
        'part', 'vocab_size')),
    ('at least 0', lambda v: v >= 0, (
        'max_iters', 'warmup_iters', 'lr_decay_iters', 'save_interval', 'eval_iters', 'bigrams',
        'weight_decay', 'grad_clip', 'learning_rate', 'min_lr', 'rope_base', 'embd_conv',
        'max_new_tokens', 'top_k', 'temperature', 'num_proc', 'num_threads')),
    ('at least 0 and below 2**64', lambda v: 0 <= v < 2 ** 64, ('seed',)),
    ('at least 0 and below 1', lambda v: 0 <= v < 1, ('dropout', 'beta1', 'beta2', 'momentum')),
    ('above 0 and below 1', lambda v: 0 < v < 1, ('val_share',)),
    ('above 0 and at most 1', lambda v: 0 < v <= 1, ('top_p', 'decay_share')),
    # sizes beyond these are slips. They would fill the memory before a message could come
    ('at most 2**17', lambda v: v <= 2 ** 17, ('n_layer',)),
    ('at most 2**20', lambda v: v <= 2 ** 20, (
        'n_embd', 'eval_iters', 'embd_conv', 'num_threads')),
    ('at most 2**24', lambda v: v <= 2 ** 24, (
        'block_size', 'num_samples', 'repeats', 'vocab_size')),
    ('at most 2**32', lambda v: v <= 2 ** 32, (
        'batch_size', 'gradient_accumulation_steps', 'max_new_tokens', 'bigrams')),
    ('below 2**63', lambda v: v < 2 ** 63, (
        'max_iters', 'warmup_iters', 'lr_decay_iters', 'save_interval', 'eval_interval',
        'log_interval', 'max_bad_steps', 'max_bytes', 'top_k', 'num_proc')),
)
MAX_PARAMETERS = 2 ** 43
MAX_TOKENS = 2 ** 32  # in an iteration
CHOICES = {
    'parallel': ('ddp', 'zero1', 'fsdp'), 'moments_dtype': ('float32', 'bfloat16'),
    'optim': ('adamw', 'muon'), 'lr_schedule': ('cosine', 'wsd'),
    'data_order': ('random', 'epochs'), 'format': ('text', 'jsonl'),
    'what': ('train', 'data', 'prefill', 'decode', 'run', 'start'),
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'), 'compile': ('auto', True, False),
    'weights': ('auto', 'bfloat16', 'int8', 'int4'),
}


def convert(name, default, value):
    """A setting's value in the type of its default; ValueError if it has another type."""
    kind = find_kind(default)
    plain_value = simplify(name, kind, value)
    if kind == 'auto' and is_number(plain_value) and plain_value in (0, 1):
        return bool(plain_value)
    if kind == 'auto' and isinstance(plain_value, (bool, str)):
        return plain_value
    if kind is type(None) and isinstance(plain_value, KINDS):
        return plain_value
    if kind in (int, float, bool) and is_number(plain_value):
        return convert_number(kind, plain_value)
    if kind not in ('auto', int, float) and isinstance(plain_value, kind):
        return plain_value
    raise ValueError(f'needs {DESCRIPTIONS[kind]}, not {describe(value)}')


def find_kind(default):
    """The type of a setting, one of KINDS; 'auto' if the default is this text."""
    if isinstance(default, str) and default == 'auto':
        return 'auto'
    return next(kind for kind in KINDS if isinstance(default, kind))


def simplify(name, kind, value):
    """The value in Python's own types, with what None, infinity and a number's text mean here."""
    if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:  # numpy's or torch's scalar
        value = value.item()
    if isinstance(value, os.PathLike) and kind in ('auto', str):
        value = os.fspath(value)
    if value is None and kind in ('auto', str):
        return 'auto' if kind == 'auto' else ''
    if kind in (int, float):
        if value is None:
            value = NONE_MEANS.get(name)
        if isinstance(value, str):
            value = read_number(value)
        if isinstance(value, numbers.Real) and value == math.inf:
            value = INFINITY_MEANS.get(name, value)
    return value


def is_number(value):
    """Whether the value is a finite number. True and False are not."""
    try:
        return (isinstance(value, numbers.Real) and not isinstance(value, bool)
                and math.isfinite(value))
    except OverflowError:  # a whole number beyond the largest float
        return False


def convert_number(kind, value):
    """A finite number as a bool, an int or a float; ValueError if it isn't 0 or 1, or whole."""
    if kind is bool and value in (0, 1) or kind is float:
        return kind(value)
    # 0.07 * 100 is 7.000000000000001
    if kind is int and math.isclose(value, round(value), rel_tol=1e-12, abs_tol=1e-12):
        return round(value)
    raise ValueError(f'needs {DESCRIPTIONS[kind]}, not {describe(value)}')


def parse(name, default, text):
    """A flag's text in the type of the setting's default; ValueError if it can't be read so."""
    kind = find_kind(default)
    if kind in (type(None), list, tuple, dict):
        return convert(name, default, read_literal(text))
    if text == 'None':
        return convert(name, default, None)
    if kind in (bool, 'auto'):
        values = {'true': True, 'false': False}
        if kind is bool:
            values.update({'1': True, '0': False})
        return convert(name, default, values.get(text.lower(), text))
    if kind is str:
        return unquote(text)
    return convert(name, default, text)


def read_number(text):
    """The number that the text has; the text itself if it has none."""
    for read in (lambda: int(text, 0), lambda: float(text)):
        try:
            return read()
        except ValueError:
            continue
    return text


def read_literal(text):
    """The value of a literal of Python; the text itself if it isn't one of a setting's types."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, KINDS) else text


def unquote(text):
    """The text without its quotes and with its escapes read, if all of it is one quoted string."""
    try:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kinds = [token.type for token in tokens if token.string]
        value = ast.literal_eval(text) if kinds == [tokenize.STRING] else text
    except (SyntaxError, ValueError, tokenize.TokenError):
        return text
    return value if isinstance(value, str) else text


def is_path(name, value):
    """Whether a setting has a path as its value."""
    return isinstance(value, str) and (name in PATHS or name.endswith(('_dir', '_path')))


def expand_home(name, value):
    """The value of a setting; in a path, ~ at the beginning becomes the home folder."""
    if not is_path(name, value) or '~' not in value:
        return value
    if name == 'runs':  # several, with commas between them
        return ','.join(map(os.path.expanduser, value.split(',')))
    return os.path.expanduser(value)


def describe(value):
    """The value as a short text of one line."""
    try:
        text = repr(value)
    except Exception:  # a number of more than 4,300 digits, for example
        text = f'a very large {type(value).__name__}'
    return shorten(' '.join(text.split()), 100)


def find_wrong_paths(config):
    """Which paths can't be used, as a list of texts."""
    paths = {name: value for name, value in config.items() if is_path(name, value)}
    mistakes = [f'{name}={value!r} has a zero character (write each backslash in it twice)'
                for name, value in paths.items() if '\0' in value]
    # torch can't save there
    mistakes += [f'{name}={value!r} is not UTF-8 (rename it)' for name, value in paths.items()
                 if name == 'out_dir' and re.search('[\ud800-\udfff]', value)]
    return mistakes


def find_mistakes(config):
    """What is wrong with the values, as a list of texts."""
    mistakes = []
    for name, choices in CHOICES.items():
        if name in config and config[name] not in choices:
            mistakes.append(f'{name}={config[name]!r} is not known '
                            f'(use {", ".join(map(str, choices[:-1]))} or {choices[-1]})')
    for name in ('backend', 'device'):
        if isinstance(config.get(name), bool):
            mistakes.append(f'{name}={config[name]} must be a text')
    sizes = {name: value for name, value in config.items() if isinstance(value, (int, float))}
    for requirement, is_allowed, names in RANGES:
        for name in names:
            if name in sizes and not is_allowed(sizes[name]):
                mistakes.append(f'{name}={sizes.pop(name)} must be {requirement}')
    mistakes += find_wrong_shapes(sizes)
    if config.get('optim') == 'muon' and config.get('parallel') == 'zero1':
        mistakes.append('optim=muon does not work with parallel=zero1 '
                        '(use --parallel=ddp or fsdp)')
    if config.get('moments_dtype') == 'bfloat16':
        if config.get('optim') == 'muon':
            mistakes.append('optim=muon does not work with moments_dtype=bfloat16')
        # a resumed run has the checkpoint's beta2, which restore.py checks
        if sizes.get('beta2', 0) > 0.99 and config.get('init_from') != 'resume':
            mistakes.append(f'moments in bfloat16 stand still with beta2={sizes["beta2"]} '
                            '(use 0.99 or less, or --moments_dtype=float32)')
    return mistakes


def find_wrong_shapes(sizes):
    """Which of these sizes don't fit together, or together are beyond what anybody means."""
    mistakes = []
    if {'n_embd', 'n_head'} <= sizes.keys():
        n_embd, n_head = sizes['n_embd'], sizes['n_head']
        if n_embd % n_head:
            suggestion = max(1, round(n_embd / n_head)) * n_head
            mistakes.append(f'n_embd={n_embd} is not divisible by n_head={n_head} '
                            f'(try --n_embd={suggestion})')
        elif sizes.get('rope_base') and n_embd // n_head % 2:
            mistakes.append('rotary positions need heads of an even size, '
                            f'not n_embd={n_embd} / n_head={n_head} (try another --n_head)')
    if sizes.get('embd_conv', 0) >= sizes.get('block_size', math.inf):
        mistakes.append(f'embd_conv={sizes["embd_conv"]} must be below '
                        f'block_size={sizes["block_size"]}')
    if {'n_layer', 'n_embd'} <= sizes.keys():
        names = [name for name in ('n_layer', 'n_embd', 'bigrams') if sizes.get(name)]
        num_params = 12 * sizes['n_layer'] * sizes['n_embd'] ** 2
        num_params += sizes.get('bigrams', 0) * sizes['n_embd']
        if num_params > MAX_PARAMETERS:
            mistakes.append(f'{list_values(names, sizes)} make {num_params:.2g} parameters, '
                            f'more than {MAX_PARAMETERS:,} (2**43)')
    if {'batch_size', 'block_size'} <= sizes.keys():
        names = [name for name in ('gradient_accumulation_steps', 'batch_size', 'block_size')
                 if name in sizes]
        num_tokens = math.prod(sizes[name] for name in names)
        if num_tokens > MAX_TOKENS:
            mistakes.append(f'{list_values(names, sizes)} make {num_tokens:.2g} tokens in an '
                            f'iteration, more than {MAX_TOKENS:,} (2**32)')
    return mistakes


def list_values(names, config):
    """The settings with their values, as a text."""
    return ', '.join(f'{name}={config[name]}' for name in names)


def check_accumulation(gradient_accumulation_steps, batch_size, world_size):
    """Fails, with a hint of the same tokens/iter, if the ranks can't share the micro-batches."""
    if gradient_accumulation_steps % world_size == 0:
        return
    sequences = gradient_accumulation_steps * batch_size
    larger_steps = (gradient_accumulation_steps // world_size + 1) * world_size
    remedy = (f'the number of sequences per iteration, {sequences}, cannot stay the same: '
              f'--gradient_accumulation_steps={larger_steps} makes it {larger_steps * batch_size}')
    for steps in range(gradient_accumulation_steps, sequences + 1):
        if steps % world_size == 0 and sequences % steps == 0:
            remedy = (f'for the same tokens/iter use --gradient_accumulation_steps={steps} '
                      f'--batch_size={sequences // steps}')
            break
    fail(f'gradient_accumulation_steps={gradient_accumulation_steps} is not divisible by the '
         f'{world_size} ranks', remedy)


def check_restarts(init_from, eval_only):
    """Fails if torchrun may restart the processes and init_from would begin again each time."""
    restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
    if restarts and init_from not in ('auto', 'resume') and not eval_only:
        fail(f'with --init_from={init_from}, every restart by torchrun --max-restarts would begin '
             'the run again', 'use --init_from=auto')
