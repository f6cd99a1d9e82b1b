"""
Settings: reads those of a script with their help, and sets them from config files and flags. All
mistakes are reported together, in one line.
"""
import ast
import inspect
import math
import os
import re
import sys
import time
import tokenize
from typing import NamedTuple

import numpy as np

from runtime.config_files import run_config_file, suggest
from runtime.console import ROOT, fail, format_script, prepare_terminal, warn
from runtime.ranges import KINDS, expand_home, find_mistakes, find_wrong_paths, parse


class Setting(NamedTuple):
    """A setting as its script defines it."""
    default: object  # of one of KINDS
    heading: str  # the comment above its group
    help: str  # the comment after its assignment


class Assignment(NamedTuple):
    """An assignment of a name in a script, outside of functions."""
    name: str
    value: object  # the syntax tree of the value; None if several names share it
    line: int
    heading: str
    help: str


def configure(space):
    """Sets the settings in a script's globals from sys.argv, and leaves them in space['config'].

    It is for configurator.py. Mistakes end the program; --help prints the settings and ends it. A
    config that the script has already defined stays as it is.
    """
    prepare_terminal()
    args = sys.argv[1:]
    has_own_config = 'config' in space
    own_settings = read_own_settings(space)
    other_settings = read_shared_settings(own_settings)
    # a config file may use what train.py has: `min_lr = learning_rate / 10`, str(time.time())
    loans = {name: setting.default for name, (setting, _) in other_settings.items()}
    loans.update(os=os, time=time, math=math)
    loans.update(np=np, torch=sys.modules.get('torch'))
    loans = {name: value for name, value in loans.items() if name not in space}
    space.update(loans)
    mistakes, warnings = [], []
    for arg in args:
        if not arg.startswith('-'):
            new_mistakes, new_warnings = run_config_file(arg, space, own_settings, other_settings)
            mistakes += new_mistakes
            warnings += new_warnings
    for arg in args:
        if arg.startswith('-') and arg not in ('-h', '--help'):
            mistakes += read_flag(arg, space, own_settings, other_settings)
    for name in loans:
        space.pop(name, None)
    config = {name: expand_home(name, space[name]) for name in own_settings}
    space.update(config)
    mistakes += find_wrong_paths(config)
    if mistakes:
        report_mistakes(space, own_settings, config, mistakes)
    if warnings:
        warn('; '.join(warnings))
    if not has_own_config:
        space['config'] = config
    if {'-h', '--help'} & set(args):
        print_help(space, own_settings, config)
        sys.exit(0)


def report_mistakes(space, own_settings, config, mistakes):
    """Ends the program with one line of all mistakes."""
    script = space.get('__file__', '')
    # it may come from stdin or be given by -c
    command = format_script(script, '--help') if os.path.isfile(script) else '--help'
    # ranges are for our own scripts, and values of a wrong type can't be compared
    if os.path.realpath(script).startswith(os.path.realpath(ROOT) + os.sep):
        mistakes = mistakes + find_mistakes({
            name: value for name, value in config.items()
            if type(value) is type(own_settings[name].default)})
    fail('; '.join(mistakes), f'{command} lists the settings')


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


def read_own_settings(space):
    """{name: Setting} of the running script that has these globals, in order.

    They are the globals of a setting's type that the script assigns itself, so an imported
    constant is not one of them. If there is no source to read, as in `python -c`, all of them are
    settings.
    """
    try:
        assignments = list_assignments(read_source(space['__file__']))
    except (KeyError, OSError, SyntaxError, ValueError):
        assignments = [Assignment(name, None, 0, '', '') for name in space]
    settings = {}
    for name, _, _, heading, help in assignments:
        is_private = name.startswith('_') or name == 'config_keys'  # nanoGPT's list of the names
        if name in space and name not in settings and not is_private:
            settings[name] = Setting(space[name], heading, help)
    return {name: setting for name, setting in settings.items()
            if isinstance(setting.default, KINDS)}


def read_shared_settings(own_settings):
    """{name: (Setting, script)} of the scripts that share config files, without own_settings."""
    other_settings = {}
    for script in ('bench.py', 'sample.py', 'train.py'):
        try:
            settings = read_settings(read_source(os.path.join(ROOT, script)))
        except (OSError, SyntaxError, ValueError):  # somebody is editing it
            continue
        other_settings.update((name, (setting, script)) for name, setting in settings.items()
                              if name not in own_settings)
    return other_settings


def read_settings(source):
    """{name: Setting} of a script that isn't running, in order; {} without configurator.py."""
    statements = ast.parse(source).body
    # the line may be within `if __name__ == '__main__':`
    end = next((node.lineno for node in statements
                if re.search(r'\bexec\(.*configurator\.py', ast.unparse(node))), 0)
    values, settings = {}, {}
    for name, value, line, heading, help in list_assignments(source):
        if line >= end or value is None:
            continue
        try:
            values[name] = eval(ast.unparse(value), {'__builtins__': {}}, values)
        except Exception:  # the default is the result of a call
            continue
        if not name.startswith('_') and isinstance(values[name], KINDS):
            settings[name] = Setting(values[name], heading, help)
    return settings


def read_source(path):
    """The text of a Python file, in the encoding that it names."""
    with tokenize.open(path) as f:
        return f.read()


def list_assignments(source):
    """The list of Assignments of a source outside of functions and classes, in order."""
    lines = source.split('\n')
    assignments = []
    heading, last_line = '', 0
    for statement in ast.parse(source).body:
        for line in lines[last_line:statement.lineno - 1]:
            if line.startswith('#') and line.strip('#- '):
                heading = line.strip('#- ')
        last_line = statement.end_lineno
        for node in walk_statements(statement):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target)
                     if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
            help = rest.partition('#')[2].strip()
            value = node.value if len(names) == 1 else None
            assignments += [Assignment(name, value, node.lineno, heading, help) for name in names]
    return assignments


def walk_statements(statement):
    """Yields the assignments in a statement: in its blocks, not in its functions and classes."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        yield statement
    elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
                yield from walk_statements(child)


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
        space[name] = parse(name, default, text if equals else 'true')
    except ValueError as e:
        return [f'--{name} {e}']
    return []


def print_help(space, own_settings, config):
    """Prints the script's docstring, and its settings by group with default, value and help."""
    script = space.get('__file__', sys.argv[0])
    print(inspect.cleandoc(space.get('__doc__') or os.path.basename(script)))
    heading = None
    for name, setting in own_settings.items():
        if setting.heading != heading:
            heading = setting.heading
            print(f'\n{heading}' if heading else '')
        value_note = '' if config[name] == setting.default else f'  (now {config[name]!r})'
        assignment = f'{name}={setting.default!r}'
        print(f'  --{assignment:<39}{value_note}  {setting.help}'.rstrip())
