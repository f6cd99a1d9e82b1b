# Sets a script's knobs from config files and the command line. Every script runs it, none imports it:
#
#     exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
#
# A knob is a bool, int, float or str global that the script assigns above that line; the comment behind it is its help.
#
#     python train.py config/train_shakespeare_char.py --batch_size=32 --eval_only
#     python train.py config/train_shakespeare_char.py --help
#
# Config files run first, in the order given, as Python in the script's own globals; flags come after them. The final
# values are left in `config`, a dict. All mistakes are reported together, before anything else has happened.

def _configure():
    # a function, so that the script's globals receive its knobs and nothing of ours; `builtins`, because the script's
    # knobs may shadow names such as compile and input
    import ast
    import builtins
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

    import checks

    checks.prepare_terminal()

    def read_knobs(path):
        """{name: (default, heading, comment)} of the script at path, in order; {} if it doesn't run this file."""
        with open(path, encoding='utf-8') as f:
            source = f.read()
        if 'configurator.py' not in source:
            return {}
        lines, knobs, heading, seen = source.splitlines(), {}, '', 0
        for node in ast.parse(source).body:
            if re.search(r'\bexec\(.*configurator\.py', ast.unparse(node)):  # may be within `if __name__ == '__main__':`
                return {name: knob for name, knob in knobs.items() if isinstance(knob[0], (bool, int, float, str))}
            for line in lines[seen:node.lineno - 1]:
                if line.startswith('#') and line.strip('#- '):
                    heading = line.strip('#- ')
            seen = node.end_lineno
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                try:
                    value = eval(ast.unparse(node.value), {'__builtins__': {}}, {k: v[0] for k, v in knobs.items()})
                except Exception:  # computed by a call: known only where the script itself has run
                    value = globals()[name] if path == script else None
                tail = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
                if not name.startswith('_'):
                    knobs[name] = value, heading, tail.partition('#')[2].strip()
        return {}

    def to_kind(default, value):
        """A config file's value in the type of the knob's default; ValueError says what was wanted."""
        kind = 'auto' if default == 'auto' else type(default)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(value, {'auto': (bool, str), bool: bool, str: str}.get(kind, ())):
            return value
        if kind is bool and number and value in (0, 1):
            return bool(value)
        if kind is float and number or kind is int and number and value == int(value):
            return kind(value)
        wanted = {'auto': "'auto' or its own type", bool: 'True or False', str: 'a string', int: 'a whole number', float: 'a number'}
        raise ValueError(f'needs {wanted[kind]}, not {value!r}')

    def from_text(default, text):
        """A flag's text, read by the type of the knob's default."""
        if isinstance(default, bool) or default == 'auto':
            value = {'true': True, 'false': False}.get(text.lower(), text)
            return to_kind(default, int(text) if isinstance(default, bool) and text in ('0', '1') else value)
        if isinstance(default, str):
            try:  # wholly one quoted literal: without its quotes, escapes read
                tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string]
                value = ast.literal_eval(text) if [t.type for t in tokens] == [tokenize.STRING] else text
                return value if isinstance(value, str) else text
            except (SyntaxError, ValueError, tokenize.TokenError):
                return text
        for number in (lambda: int(text, 0), lambda: float(text)):
            try:
                return to_kind(default, number())
            except ValueError:
                pass
        return to_kind(default, text)

    def closest(name, names, prefix=''):
        match = difflib.get_close_matches(name, names, n=1)
        return f' (did you mean {prefix}{match[0]}?)' if match else ''

    script = os.path.abspath(__file__)  # the script's own: this text runs in its globals
    own = read_knobs(script)
    others = {}  # knobs of the other scripts, so that one config file serves them all
    for path in sorted(glob.glob(os.path.join(checks.REPO, '*.py')) + glob.glob(os.path.join(checks.REPO, 'data', '*', 'prepare.py'))):
        try:
            theirs = read_knobs(path) if path != script else {}
        except (SyntaxError, UnicodeDecodeError):  # somebody's draft: not the mistake of this run
            continue
        others.update({k: (v[0], os.path.relpath(path, checks.REPO)) for k, v in theirs.items() if k not in own})

    space, mistakes = globals(), []
    # what a config file may rely on in train.py, it finds in every script: `min_lr = learning_rate / 10`, str(time.time())
    modules = {'os': os, 'time': time, 'math': math, 'np': sys.modules['numpy'], 'torch': sys.modules.get('torch')}
    lent = [name for name in (*others, *modules) if name not in space]
    space.update({name: modules[name] if name in modules else others[name][0] for name in lent})

    for arg in [a for a in sys.argv[1:] if not a.startswith('-')]:
        path = next((p for p in (arg, os.path.join(checks.REPO, arg)) if os.path.isfile(p)), None)
        if path and not path.endswith('.py'):
            mistakes.append(f'{arg} is no config file, which would end in .py; a knob is set as --key=value')
            continue
        if path is None:
            known = sorted(os.path.relpath(p, checks.REPO) for p in glob.glob(os.path.join(checks.REPO, 'config', '*.py')))
            mistakes.append(f'no config file {arg}{closest(arg, known)}; a knob is set as --key=value')
            continue
        try:
            with open(path, encoding='utf-8') as f:
                tree = ast.parse(f.read(), path)
        except SyntaxError as e:
            mistakes.append(f'{arg}, line {e.lineno}: {e.msg}')
            continue
        except ValueError as e:  # not UTF-8, or bytes of 0
            mistakes.append(f'{arg} is no text of Python: {e}')
            continue
        try:
            exec(builtins.compile(tree, path, 'exec'), space)
        except Exception as e:
            line = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path][-1]
            mistakes.append(f'{arg}, line {line}: {type(e).__name__}: {e}')
            continue
        names = [(n.id, type(n.ctx)) for n in ast.walk(tree) if isinstance(n, ast.Name)]
        for name in dict.fromkeys(name for name, ctx in names if ctx is ast.Store and name in space):
            value = space[name]
            if name in own:
                try:
                    space[name] = to_kind(own[name][0], value)
                except ValueError as e:
                    mistakes.append(f'{name} in {arg} {e}')
            elif not (name in others or name.startswith('_') or (name, ast.Load) in names
                      or isinstance(value, types.ModuleType) or callable(value)):
                mistakes.append(f'unknown knob {name} in {arg}{closest(name, [*own, *others])}')

    for arg in [a for a in sys.argv[1:] if a.startswith('-') and a not in ('-h', '--help')]:
        name, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or name not in own:
            whose = f' ({name} belongs to {others[name][1]})' if name in others else closest(name, own, '--')
            mistakes.append(f'unknown knob {arg.partition("=")[0]}{whose}')
        elif not equals and not isinstance(own[name][0], bool):
            mistakes.append(f'{arg} needs a value: {arg}=...')
        else:
            try:
                space[name] = from_text(own[name][0], text if equals else 'true')
            except ValueError as e:
                mistakes.append(f'--{name} {e}')

    for name in lent:
        space.pop(name, None)
    if mistakes:
        checks.fail('; '.join(mistakes), f'python {checks.shown(script)} --help lists the knobs')
    space['config'] = {name: space[name] for name in own}

    if {'-h', '--help'} & set(sys.argv[1:]):
        with open(script, encoding='utf-8') as f:
            print(ast.get_docstring(ast.parse(f.read())) or os.path.basename(script))
        shown = None
        for name, (default, heading, comment) in own.items():
            if heading != shown:
                print(f'\n{heading}')
            now = '' if config[name] == default else f'  (now {config[name]!r})'
            print(f'  --{name + "=" + repr(default):<38}{now}  {comment}'.rstrip())
            shown = heading
        sys.exit(0)


_configure()
del _configure
