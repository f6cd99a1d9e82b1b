"""
Config files: runs them in the script's globals, and checks what they leave there. Finds the setting
that a misspelled name means.
"""
import ast
import difflib
import glob
import os
import shlex
import tokenize
import traceback
import types

from runtime.console import ROOT, get_first_line
from runtime.ranges import convert

# names that people type for a setting and that are spelled too differently to be found by closeness
ALIASES = {
    'lr': 'learning_rate', 'wd': 'weight_decay', 'bs': 'batch_size', 'steps': 'max_iters',
    'iters': 'max_iters', 'epochs': 'max_iters', 'layers': 'n_layer', 'heads': 'n_head',
    'context': 'block_size', 'seq_len': 'block_size', 'optimizer': 'optim', 'data': 'dataset',
    'prompt': 'start', 'text': 'start', 'tokens': 'max_new_tokens', 'max_tokens': 'max_new_tokens',
    'n': 'num_samples', 'temp': 'temperature', 'model': 'init_from', 'checkpoint': 'out_dir',
    'ckpt': 'out_dir', 'output': 'out_dir',
}
CLOSENESS = 0.8  # max_iter is this close to max_iters, and vocab_size is not to block_size


def run_config_file(arg, space, own_settings, other_settings):
    """Runs a config file in the script's globals; returns mistakes and warnings, lists of texts.

    What it did is found by comparing the globals, because a file may set a name in many ways:
    exec, import *, a loop, globals(). Names that it deleted are there again, and so are modules.
    """
    earlier = dict(space)
    try:
        path = find_config_file(arg, own_settings)
        tree, code = read_config_file(arg, path)
    except ValueError as e:
        return [str(e)], []
    mistakes = []
    try:
        exec(code, space)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # exit() must not end the program without a word
        mistakes.append(explain_exception(arg, path, e))
    mistakes += check_settings(arg, space, earlier, own_settings)
    # del, `from time import time` and `note = 'x'` must not take what the script has imported
    space.update({name: value for name, value in earlier.items()
                  if name not in space or is_module(value) and not is_module(space[name])
                  or callable(value) and not callable(space[name])})
    helpers, loop_names = list_reads(tree), list_loop_names(tree)
    new_names = [name for name in space if name not in earlier and name not in loop_names]
    known_names = [*own_settings, *other_settings]
    warnings = []
    for name in new_names:
        if is_module(space[name]) or callable(space[name]) or name[0] == '_':
            continue
        hint = suggest(name.lower(), known_names)
        matches = find_matches(name, known_names)
        if matches and name not in helpers:
            mistakes.append(f'unknown setting {name} in {arg}{hint}')
        elif matches and space[matches[0]] is earlier.get(matches[0]):  # the file only reads it
            warnings.append(f'{name} in {arg} is not a setting{hint}')
        elif ALIASES.get(name.lower()) in known_names and name not in helpers:
            warnings.append(f'{name} in {arg} has no effect{hint}')
    return mistakes, warnings


def find_config_file(arg, own_settings):
    """The path of a config file, which may be in the repository; ValueError if it is not a file."""
    # isfile() opens nothing, and is False for a FIFO, a device and a broken link
    path = next((p for p in (arg, os.path.join(ROOT, arg)) if os.path.isfile(p)), None)
    if path is None:
        raise ValueError(explain_argument(arg, own_settings))
    if not path.endswith('.py'):
        hint = f' (did you mean --input={shlex.quote(arg)}?)' if 'input' in own_settings else ''
        raise ValueError(f'{arg} is not a config file: their names end in .py{hint}; '
                         'set a setting as --key=value')
    return path


def read_config_file(arg, path):
    """The syntax tree and the code of a config file; ValueError if it can't be read."""
    try:
        with tokenize.open(path) as f:  # it knows the byte order mark that Notepad writes
            source = f.read()
        tree = ast.parse(source, path)
        return tree, compile(source, path, 'exec')
    except OSError as e:
        raise ValueError(f'{arg} cannot be read: {e.strerror}') from e
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = getattr(e, 'lineno', None)
        place = f'{arg}, line {line}' if line else arg
        raise ValueError(f'{place} is not Python: {getattr(e, "msg", e)}') from e


def explain_exception(arg, path, e):
    """What went wrong while a config file ran, with its line."""
    frames = traceback.extract_tb(e.__traceback__)
    line = [frame.lineno for frame in frames if frame.filename == path][-1]
    if isinstance(e, SystemExit):
        return f'{arg}, line {line}: a config file must not end the program'
    return f'{arg}, line {line}: {type(e).__name__}: {get_first_line(e)}'


def check_settings(arg, space, earlier, own_settings):
    """Gives the settings that a file has changed their types; returns what is wrong, as texts."""
    deleted_names = [name for name in own_settings if name not in space]
    mistakes = []
    if deleted_names:
        mistakes.append(f'{arg} deletes the setting {", ".join(deleted_names)}')
    for name, setting in own_settings.items():
        if name in space and space[name] is not earlier[name]:
            try:
                space[name] = convert(name, setting.default, space[name])
            except ValueError as e:
                mistakes.append(f'{name} in {arg} {e}')
                space[name] = earlier[name]
    return mistakes


def is_module(value):
    """Whether the value is a module."""
    return isinstance(value, types.ModuleType)


def list_reads(tree):
    """The names that a config file reads."""
    return {node.id for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def list_loop_names(tree):
    """The names that its loops and `with` statements set."""
    targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.For)]
    targets += [node.optional_vars for node in ast.walk(tree)
                if isinstance(node, ast.withitem) and node.optional_vars]
    return {part.id for target in targets for part in ast.walk(target)
            if isinstance(part, ast.Name)}


def explain_argument(arg, own_settings):
    """What is wrong with an argument that is neither a flag nor a file."""
    if os.path.isdir(arg):
        content = os.listdir(arg) if os.access(arg, os.R_OK) else []
        markers = (('dataset', 'train.bin'), ('dataset', 'prepare.py'),
                   ('init_from', 'config.json'), ('runs', 'metrics.jsonl'))
        names = [name for name, marker in markers if marker in content]
        names += ['input', 'out_dir', 'runs', 'hf_dir']
        name = next((name for name in names if name in own_settings), None)
        hint = f' (did you mean --{name}={shlex.quote(arg)}?)' if name else ''
        return f'{arg} is a folder, not a config file{hint}'
    if os.path.exists(arg):
        return f'{arg} is a device or a pipe, not a config file'
    if os.path.islink(arg):
        return f'config file {arg} is a link to {os.readlink(arg)}, which is not there'
    config_paths = glob.glob(os.path.join(ROOT, 'config', '*.py'))
    hint = suggest(arg, sorted(os.path.relpath(path, ROOT) for path in config_paths))
    if arg.partition('=')[0] in own_settings and '=' in arg:
        hint = f' (did you mean {shlex.quote("--" + arg)}?)'
    elif arg.startswith('out') and not arg.endswith('.py') and 'out_dir' in own_settings:
        hint = f' (did you mean --out_dir={shlex.quote(arg)}?)'
    return f'config file {arg} was not found{hint}; set a setting as --key=value'


def suggest(name, names, prefix=''):
    """' (did you mean ...?)' with the known name closest to this one; '' if none is close."""
    alias = ALIASES.get(name.replace('-', '_'))
    matches = difflib.get_close_matches(name.replace('-', '_'), names, n=1)
    if alias in names:
        matches = [alias]
    if not matches:
        return ''
    return f' (did you mean {prefix}{matches[0]}?)'


def find_matches(name, names):
    """The known name of which this is a misspelling, in upper or lower case, in a list."""
    names_by_spelling = {known_name.lower(): known_name for known_name in names}
    matches = difflib.get_close_matches(name.lower(), names_by_spelling, n=1, cutoff=CLOSENESS)
    return [names_by_spelling[match] for match in matches]
