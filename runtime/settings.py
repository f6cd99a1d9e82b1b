"""
Settings: reads those of a script with their help, sets them from config files and flags, and
checks their types and, by ranges.py, their values. All mistakes are reported together, in one line.
"""
import ast
import difflib
import glob
import io
import math
import numbers
import os
import re
import sys
import time
import tokenize
import traceback
import types
from typing import NamedTuple

import numpy as np

from runtime.console import ROOT, fail, prepare_terminal, shorten_path, warn
from runtime.ranges import find_mistakes


class Setting(NamedTuple):
    """A setting as its script defines it."""
    default: object  # a bool, int, float or str
    heading: str  # the comment above its group
    help: str  # the comment after its assignment


# names that people type for a setting and that are spelled too differently to be found by closeness
ALIASES = {
    'lr': 'learning_rate', 'wd': 'weight_decay', 'bs': 'batch_size', 'steps': 'max_iters',
    'iters': 'max_iters', 'epochs': 'max_iters', 'layers': 'n_layer', 'heads': 'n_head',
    'context': 'block_size', 'seq_len': 'block_size', 'optimizer': 'optim', 'data': 'dataset',
    'prompt': 'start', 'text': 'start', 'tokens': 'max_new_tokens', 'max_tokens': 'max_new_tokens',
    'n': 'num_samples', 'temp': 'temperature', 'model': 'init_from', 'checkpoint': 'out_dir',
    'ckpt': 'out_dir', 'output': 'out_dir',
}


def configure(space):
    """Sets the settings in a script's globals from sys.argv, and leaves them in space['config'].

    It is for configurator.py. Mistakes end the program; --help prints the settings and ends it.
    """
    prepare_terminal()
    script = os.path.abspath(space['__file__'])
    own_settings = read_settings(script, space)
    other_settings = read_shared_settings(own_settings)
    # a config file may use what train.py has: `min_lr = learning_rate / 10`, str(time.time())
    loans = {name: setting.default for name, (setting, _) in other_settings.items()}
    loans.update(os=os, time=time, math=math)
    loans.update(np=np, torch=sys.modules.get('torch'))
    loans = {name: value for name, value in loans.items() if name not in space}
    space.update(loans)
    mistakes = []
    for arg in sys.argv[1:]:
        if not arg.startswith('-'):
            mistakes += run_config_file(arg, space, own_settings, other_settings)
    for arg in sys.argv[1:]:
        if arg.startswith('-') and arg not in ('-h', '--help'):
            mistakes += read_flag(arg, space, own_settings, other_settings)
    for name in loans:
        space.pop(name, None)
    config = {name: space[name] for name in own_settings}
    if mistakes:
        # ranges are for our own scripts, and values of a wrong type can't be compared
        if script.startswith(ROOT + os.sep):
            mistakes += find_mistakes({name: value for name, value in config.items()
                                       if type(value) is type(own_settings[name].default)})
        fail('; '.join(mistakes), f'python {shorten_path(script)} --help lists the settings')
    space['config'] = config
    if {'-h', '--help'} & set(sys.argv[1:]):
        print_help(script, own_settings, config)
        sys.exit(0)


def check(config):
    """Fails if a setting is out of its range, isn't one of its choices or contradicts another."""
    mistakes = find_mistakes(config)
    if mistakes:
        fail('; '.join(mistakes))
    if not config.get('decay_lr'):
        return
    # nanoGPT accepts these, and people use them for a trial of a few iterations
    decay_iters = config['lr_decay_iters']
    if decay_iters <= config['warmup_iters']:
        warn(f'lr_decay_iters={decay_iters} is not above warmup_iters={config["warmup_iters"]}: '
             'the learning rate never decays, it falls from the warmup to min_lr')
    if config['min_lr'] > config['learning_rate']:
        warn(f'min_lr={config["min_lr"]} is above learning_rate={config["learning_rate"]}: '
             'the learning rate rises at the end')
    if config['min_lr'] == 0 and config['max_iters'] > decay_iters:
        warn(f'the learning rate is 0 from iteration {decay_iters} on; '
             f'set --lr_decay_iters={config["max_iters"]}, too')


def read_settings(path, space=None):
    """{name: Setting} of the script at path, in order; {} if it doesn't run configurator.py.

    space has the script's globals if the script is running: it has the values of computed defaults.
    """
    with open(path, encoding='utf-8') as f:
        source = f.read()
    if 'configurator.py' not in source:
        return {}
    lines = source.splitlines()
    settings = {}
    heading, last_line = '', 0
    for node in ast.parse(source).body:
        # the line may be within `if __name__ == '__main__':`
        if re.search(r'\bexec\(.*configurator\.py', ast.unparse(node)):
            kinds = (bool, int, float, str)
            return {name: setting for name, setting in settings.items()
                    if isinstance(setting.default, kinds)}
        for line in lines[last_line:node.lineno - 1]:
            if line.startswith('#') and line.strip('#- '):
                heading = line.strip('#- ')
        last_line = node.end_lineno
        targets = getattr(node, 'targets', [])
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            continue
        name = targets[0].id
        values = {key: setting.default for key, setting in settings.items()}
        try:
            default = eval(ast.unparse(node.value), {'__builtins__': {}}, values)
        except Exception:  # the default is the result of a call
            default = (space or {}).get(name)
        rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
        if not name.startswith('_'):
            settings[name] = Setting(default, heading, rest.partition('#')[2].strip())
    return {}


def read_shared_settings(own_settings):
    """{name: (Setting, script)} of the scripts that share config files, without own_settings."""
    other_settings = {}
    for script in ('bench.py', 'sample.py', 'train.py'):
        try:
            settings = read_settings(os.path.join(ROOT, script))
        except (OSError, SyntaxError, UnicodeDecodeError):  # somebody is editing it
            continue
        other_settings.update((name, (setting, script)) for name, setting in settings.items()
                              if name not in own_settings)
    return other_settings


def run_config_file(arg, space, own_settings, other_settings):
    """Runs a config file in the script's globals; returns what is wrong, as a list of texts."""
    path = next((p for p in (arg, os.path.join(ROOT, arg)) if os.path.isfile(p)), None)
    if path is None:
        return [explain_argument(arg, own_settings)]
    if not path.endswith('.py'):
        return [f'{arg} is not a config file: their names end in .py; set a setting as --key=value']
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read(), path)
    except SyntaxError as e:
        return [f'{arg}, line {e.lineno}: {e.msg}']
    except ValueError as e:  # it isn't UTF-8, or has zero bytes
        return [f'{arg} is not Python source: {e}']
    try:
        exec(compile(tree, path, 'exec'), space)
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == path][-1]
        return [f'{arg}, line {line}: {type(e).__name__}: {e}']
    mistakes = []
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    loaded_names = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    stored_names = dict.fromkeys(node.id for node in names if isinstance(node.ctx, ast.Store))
    for name in stored_names:
        if name not in space:  # a local variable of a function in the file
            continue
        value = space[name]
        is_helper = (name in other_settings or name.startswith('_') or name in loaded_names
                     or isinstance(value, types.ModuleType) or callable(value))
        if name in own_settings:
            try:
                space[name] = convert(own_settings[name].default, value)
            except ValueError as e:
                mistakes.append(f'{name} in {arg} {e}')
        elif not is_helper:
            hint = suggest(name, [*own_settings, *other_settings])
            mistakes.append(f'unknown setting {name} in {arg}{hint}')
    return mistakes


def explain_argument(arg, own_settings):
    """What is wrong with an argument that is neither a flag nor a file."""
    if os.path.isdir(arg):
        content = os.listdir(arg)
        markers = (('dataset', 'train.bin'), ('dataset', 'prepare.py'),
                   ('init_from', 'config.json'), ('runs', 'metrics.jsonl'))
        names = [name for name, marker in markers if marker in content]
        names += ['out_dir', 'runs', 'hf_dir']
        name = next((name for name in names if name in own_settings), None)
        if name:
            return f'{arg} is a folder, not a config file (did you mean --{name}={arg}?)'
    config_paths = glob.glob(os.path.join(ROOT, 'config', '*.py'))
    hint = suggest(arg, sorted(os.path.relpath(path, ROOT) for path in config_paths))
    if arg.partition('=')[0] in own_settings and '=' in arg:
        hint = f' (did you mean --{arg}?)'
    elif arg.startswith('out') and not arg.endswith('.py') and 'out_dir' in own_settings:
        hint = f' (did you mean --out_dir={arg}?)'
    return f'config file {arg} was not found{hint}; set a setting as --key=value'


def read_flag(arg, space, own_settings, other_settings):
    """Sets the setting of a --key=value flag; returns what is wrong, as a list of texts."""
    name, equals, text = arg.removeprefix('--').partition('=')
    if not arg.startswith('--') or name not in own_settings:
        if name in other_settings:
            hint = f' ({name} belongs to {other_settings[name][1]})'
        else:
            hint = suggest(name.lstrip('-'), own_settings, '--')
        return [f'unknown setting {arg.partition("=")[0]}{hint}']
    default = own_settings[name].default
    if not equals and not isinstance(default, bool):
        return [f'{arg} needs a value: {arg}=...']
    try:
        space[name] = parse(default, text if equals else 'true')
    except ValueError as e:
        return [f'--{name} {e}']
    return []


def suggest(name, names, prefix=''):
    """' (did you mean ...?)' with the known name closest to this one; '' if none is close."""
    alias = ALIASES.get(name.replace('-', '_'))
    matches = difflib.get_close_matches(name.replace('-', '_'), names, n=1)
    if alias in names:
        matches = [alias]
    if not matches:
        return ''
    return f' (did you mean {prefix}{matches[0]}?)'


def convert(default, value):
    """A config file's value in the type of the setting's default; ValueError if it has another."""
    kind = 'auto' if default == 'auto' else type(default)
    is_number = (isinstance(value, numbers.Real) and not isinstance(value, bool)
                 and math.isfinite(value))
    exact_types = {'auto': (bool, str), bool: bool, str: str}.get(kind, ())
    if isinstance(value, exact_types):
        return value
    if kind is bool and is_number and value in (0, 1):
        return bool(value)
    if kind is float and is_number or kind is int and is_number and value == int(value):
        return kind(value)
    descriptions = {'auto': "'auto' or its own type", bool: 'True or False', str: 'a string',
                    int: 'a whole number', float: 'a number'}
    raise ValueError(f'needs {descriptions[kind]}, not {value!r}')


def parse(default, text):
    """A flag's text in the type of the setting's default; ValueError if it can't be read so."""
    if isinstance(default, bool) or default == 'auto':
        values = {'true': True, 'false': False}
        if isinstance(default, bool):
            values.update({'1': True, '0': False})
        return convert(default, values.get(text.lower(), text))
    if isinstance(default, str):
        return unquote(text)
    for read_number in (lambda: int(text, 0), lambda: float(text)):
        try:
            return convert(default, read_number())
        except ValueError:
            continue
    return convert(default, text)


def unquote(text):
    """The text without its quotes and with its escapes read, if all of it is one quoted string."""
    try:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kinds = [token.type for token in tokens if token.string]
        value = ast.literal_eval(text) if kinds == [tokenize.STRING] else text
    except (SyntaxError, ValueError, tokenize.TokenError):
        return text
    return value if isinstance(value, str) else text


def print_help(script, own_settings, config):
    """Prints the script's docstring, and its settings by group with default, value and help."""
    with open(script, encoding='utf-8') as f:
        print(ast.get_docstring(ast.parse(f.read())) or os.path.basename(script))
    heading = None
    for name, setting in own_settings.items():
        if setting.heading != heading:
            heading = setting.heading
            print(f'\n{heading}')
        value_note = '' if config[name] == setting.default else f'  (now {config[name]!r})'
        assignment = f'{name}={setting.default!r}'
        print(f'  --{assignment:<39}{value_note}  {setting.help}'.rstrip())
