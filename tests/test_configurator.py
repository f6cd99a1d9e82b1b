"""Config files and flags of scripts that run configurator.py. Each case runs its own script."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run

SCRIPT = '''"""A script to configure."""
import json
import os
import time

# first
batch_size = 12  # sequences # in a batch
learning_rate = 6e-4
eval_only = False  # a switch
# second
start = "#"  # the prompt
compile = 'auto'
total = 5 * 8
_private = 1
exec(open({configurator!r}, encoding='utf-8').read())
assert config == {{k: globals()[k] for k in config}}
print(json.dumps(config))
'''


def call(tmp_path, *args, **files):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.format(configurator=os.path.join(ROOT, 'configurator.py')))
    for name, text in files.items():
        (tmp_path / f'{name}.py').write_text(text)
    return subprocess.run([sys.executable, str(script), *args], cwd=tmp_path, capture_output=True,
                          text=True)


def config(tmp_path, *args, **files):
    result = call(tmp_path, *args, **files)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def mistake(tmp_path, *args, **files):
    return check_mistake(call(tmp_path, *args, **files))


def check_mistake(result):
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize('flag, expected', [
    ('--batch_size=8', 8), ('--batch_size=1e3', 1000), ('--batch_size=0x10', 16),
    ('--batch_size=1_000', 1000), ('--batch_size=-1', -1),
    ('--learning_rate=1', 1.0), ('--learning_rate=1e-3', 1e-3), ('--learning_rate=0', 0.0),
    ('--total=4', 4),
    ('--eval_only', True), ('--eval_only=true', True), ('--eval_only=False', False),
    ('--eval_only=1', True), ('--eval_only=0', False),
    ('--start=123', '123'), ('--start=a=b', 'a=b'), ('--start=', ''), ('--start=True', 'True'),
    (r'--start=\n', r'\n'), (r'--start="a\nb"', 'a\nb'), ("--start='x'", 'x'),
    ("--start='a' and 'b'", "'a' and 'b'"), ("--start='a' 'b'", "'a' 'b'"), ('--start="', '"'),
    ('--start=don\'t', "don't"), ('--start=#x', '#x'), ('--start=', ''),
    ('--compile=False', False), ('--compile=true', True), ('--compile=auto', 'auto'),
])
def test_flags_are_read_by_the_type_of_the_default(tmp_path, flag, expected):
    value = config(tmp_path, flag)[flag[2:].split('=')[0]]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize('flag, words', [
    ('--batch_size=1.5', 'a whole number'), ('--batch_size=x', "'x'"),
    ('--batch_size=inf', 'a whole number'), ('--batch_size', 'needs a value'),
    ('--learning_rate=fast', 'a number'), ('--learning_rate=nan', 'a number'),
    ('--eval_only=maybe', 'True or False'), ('--eval_only=2', 'True or False'),
    ('--batchsize=8', 'did you mean --batch_size?'),
    ('--max_new_tokens=3', 'belongs to sample.py'), ('-batch_size=8', 'unknown setting'),
    ('--_private=2', 'unknown setting'), ('nowhere.py', 'config file nowhere.py was not found'),
    ('script.txt', 'config file script.txt was not found'),
    (os.path.join(ROOT, 'README.md'), 'is not a config file: their names end in .py'),
    ('train_gpt2.py', 'did you mean config/train_gpt2.py?'),
])
def test_mistakes_on_the_command_line(tmp_path, flag, words):
    assert words in mistake(tmp_path, flag)


def test_files_run_in_order_and_flags_come_last(tmp_path):
    values = config(tmp_path, '--total=3', 'a.py', 'b.py',
                    a='batch_size = 1\nstart = "a"\ntotal = 1', b='batch_size = batch_size + 1')
    assert (values['batch_size'], values['start'], values['total']) == (2, 'a', 3)


def test_files_may_compute_with_all_that_the_script_has(tmp_path):
    text = '''
import math
head_size = 32
_unused = 0
def double(x):
    twice = 2 * x
    return twice
batch_size = double(head_size) if os.path.exists('.') and time.time() else 0
learning_rate = 1  # an int is enough
total = 1e2  # and so is a float without a fraction
n_embd = head_size  # train.py's: this script leaves it out
min_lr = max_iters / 10  # of train.py's default
compile = False
eval_only = 1
start = 'a' + str(np.int64(1))
'''
    values = config(tmp_path, 'c.py', c=text)
    assert values == {'batch_size': 64, 'learning_rate': 1.0, 'eval_only': True, 'start': 'a1',
                      'compile': False, 'total': 100}
    assert isinstance(values['learning_rate'], float) and isinstance(values['total'], int)


@pytest.mark.parametrize('text, words', [
    ('batchsize = 8', 'unknown setting batchsize in c.py (did you mean batch_size?)'),
    ('batch_size = "many"', 'a whole number'), ('batch_size = 1.5', 'a whole number'),
    ('eval_only = 2', 'True or False'), ('start = 1', 'a string'),
    ('batch_size = True', 'a whole number'), ('compile = 3', "'auto' or its own type"),
    ('batch_size = 4\nif batch_size == 4\n    start = ""', 'c.py, line 2'),
    ('batch_size = 3\nstart = undefined', "c.py, line 2: NameError: name 'undefined'"),
    ('if True:\n    lerning_rate: float = 1', 'learning_rate'),
])
def test_mistakes_in_files(tmp_path, text, words):
    assert words in mistake(tmp_path, 'c.py', c=text)


def test_files_that_are_not_text(tmp_path):
    for content in (b'x = "\xff\xfe"', b'x = 1\x00', b'# coding: no-such\n', b'return'):
        (tmp_path / 'c.py').write_bytes(content)
        assert 'c.py' in mistake(tmp_path, 'c.py')


@pytest.mark.parametrize('text, line', [
    ('exit()', 1), ('import sys\nsys.exit(0)', 2), ('\n\nraise SystemExit', 3), ('quit()', 1),
    ('def stop():\n    raise SystemExit("x")\nstop()', 2), ('import ends', 1)])
def test_a_file_that_ends_the_program_is_a_mistake(tmp_path, text, line):
    said = mistake(tmp_path, 'c.py', c=text, ends='exit()')
    assert f'c.py, line {line}: a config file must not end the program' in said


def test_an_exception_of_several_lines_is_told_in_one(tmp_path):
    said = mistake(tmp_path, 'c.py', c='raise ValueError("a\\nb")')
    assert 'c.py, line 1: ValueError: a; ' in said
    assert 'GeneratorExit' in mistake(tmp_path, 'c.py', c='raise GeneratorExit')


def test_ctrl_c_passes_through_a_file(tmp_path):
    result = call(tmp_path, 'c.py', c='raise KeyboardInterrupt')
    assert result.returncode not in (0, 1) and result.stdout == result.stderr == ''


@pytest.mark.parametrize('load', [
    'exec(open("other.py").read())', 'from other import *', 'globals().update(vars(other))',
    'for name, value in vars(other).items():\n    locals()[name] = value',
    'import runpy\nglobals().update(runpy.run_path("other.py"))'])
def test_what_another_file_brings_is_checked(tmp_path, load):
    load = f'import other\n{load}'
    said = mistake(tmp_path, 'c.py', c=load, other='batchsize = 3\ntotal = "many"\nend = 2')
    assert "total in c.py needs a whole number, not 'many'" in said
    assert 'unknown setting batchsize in c.py (did you mean batch_size?)' in said
    assert said.count('; ') == 2
    values = config(tmp_path, 'c.py', c=load, other='batch_size = 3\nlearning_rate = "1e-3"')
    assert (values['batch_size'], values['learning_rate']) == (3, 1e-3)


@pytest.mark.parametrize('text, name', [
    ('def total():\n    pass', 'total'), ('class start:\n    pass', 'start'),
    ('import json as total', 'total'), ('from os import path as compile', 'compile'),
    ('for total in "ab":\n    pass', 'total'), ('(total := "many")', 'total'),
    ('with open("c.py") as start:\n    pass', 'start'), ('total = np.zeros((9, 9))', 'total'),
    ('def f():\n    global total\n    total = ()\nf()', 'total'), ('total = 10 ** 5000', 'total')])
def test_a_setting_of_a_wrong_type_is_found_however_it_was_set(tmp_path, text, name):
    assert f'{name} in c.py needs ' in mistake(tmp_path, 'c.py', c=text)


@pytest.mark.parametrize('text, names', [
    ('del total', 'total'), ('globals().pop("start")', 'start'),
    ('for name in ("batch_size", "total"):\n    del globals()[name]', 'batch_size, total')])
def test_a_deleted_setting_is_a_mistake(tmp_path, text, names):
    assert f'c.py deletes the setting {names}; ' in mistake(tmp_path, 'c.py', c=text)


@pytest.mark.parametrize('text', ['del json', 'from math import pi as json', 'json = start',
                                  'def json():\n    pass', 'globals().pop("json")'])
def test_a_module_of_the_script_stays(tmp_path, text):
    # the script prints its settings by json
    assert config(tmp_path, 'c.py', c=f'import json\ntotal = 2\n{text}')['total'] == 2


@pytest.mark.parametrize('text', [
    'vocab_size = 50304', 'for batchsize in range(3):\n    pass',
    'with open("c.py") as batchsize:\n    pass', 'batchsize = 4\nbatch_size = batchsize',
    'BATCH_SIZE = 4\nbatch_size = BATCH_SIZE', 'png = "a.png"', 'tokens_per_iter = 3',
    'from math import *', 'for n in range(3):\n    pass', 'lr = 1e-3\nlearning_rate = lr'])
def test_helpers_are_accepted_without_a_word(tmp_path, text):
    result = call(tmp_path, 'c.py', c=text)
    assert result.returncode == 0 and result.stderr == ''


@pytest.mark.parametrize('text', ['max_iter = 3', 'batchSize = 4', 'BATCH_SIZE = 4',
                                  'learning_rates = 1', 'for i in range(3):\n    batchsize = i'])
def test_a_misspelled_setting_is_refused(tmp_path, text):
    assert 'in c.py (did you mean ' in mistake(tmp_path, 'c.py', c=text)


@pytest.mark.parametrize('text', ['batchsize = 3\ntotal = 10 * batchsize',
                                  'TOTAL = 5\nbatch_size = TOTAL'])
def test_a_misspelled_setting_that_the_file_reads_is_a_warning(tmp_path, text):
    result = call(tmp_path, 'c.py', c=text)
    assert result.returncode == 0
    assert re.fullmatch(r'warning: \w+ in c.py is not a setting \(did you mean \w+\?\)\n',
                        result.stderr)


def test_a_function_of_the_script_stays(trained, tmp_path):
    (tmp_path / 'c.py').write_text('note = "baseline"\nGPT = 5\nnum_samples = 1\n')
    args = [str(tmp_path / 'c.py'), f'--out_dir={trained}', '--max_new_tokens=2', '--device=cpu']
    assert run('sample.py', *args).stdout


def test_another_name_for_a_setting_has_no_effect_and_says_so(tmp_path):
    result = call(tmp_path, 'c.py', c='lr = 1e-3\nepochs = 5')
    assert result.returncode == 0 and json.loads(result.stdout)['learning_rate'] == 6e-4
    assert result.stderr == ('warning: lr in c.py has no effect (did you mean learning_rate?); '
                             'epochs in c.py has no effect (did you mean max_iters?)\n')


def test_files_of_other_editors(tmp_path):
    (tmp_path / 'c.py').write_text('\ufeffbatch_size = 3\r\nstart = "é"\r\n', encoding='utf-8')
    values = config(tmp_path, 'c.py')
    assert (values['batch_size'], values['start']) == (3, 'é')
    (tmp_path / 'c.py').write_text('# coding: latin-1\nstart = "é"', encoding='latin-1')
    assert config(tmp_path, 'c.py')['start'] == 'é'


def test_what_is_not_a_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe.py')
    os.mkdir(tmp_path / 'folder.py')
    os.symlink('nowhere', tmp_path / 'link.py')
    said = mistake(tmp_path, 'pipe.py', 'folder.py', 'link.py', '/dev/zero')
    for words in ('pipe.py is a device or a pipe, not a config file; ', '/dev/zero is a device or',
                  'folder.py is a folder, not a config file; ',
                  'config file link.py is a link to nowhere, which is not there; '):
        assert words in said


def test_all_mistakes_are_told_at_once(tmp_path):
    said = mistake(tmp_path, 'c.py', '--total=x', '--nothing=1', c='batchsize = 8')
    assert 'batchsize' in said and '--total' in said and '--nothing' in said


def test_help_shows_default_value_and_comment_by_group(tmp_path):
    result = call(tmp_path, 'c.py', '--help', c='batch_size = 3')
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0] == 'A script to configure.'
    assert lines.index('first') < lines.index('second')
    line = next(line for line in lines if '--batch_size' in line)
    assert 'batch_size=12' in line and 'now 3' in line
    assert line.endswith('sequences # in a batch')
    assert any('--start=\'#\'' in line and line.endswith('the prompt') for line in lines)
    assert '_private' not in result.stdout


def test_helpers_of_one_script_do_not_leak_into_another(tmp_path):
    # train.py's settings that a file sets must not appear in a script that doesn't have them
    result = call(tmp_path, 'c.py', c='max_iters = 5')
    assert result.returncode == 0 and 'max_iters' not in json.loads(result.stdout)


# -----------------------------------------------------------------------------
# values of config files and flags; scripts of people's own
OWN = """{settings}
_names = [name for name in globals() if name[0] != '_']
_path = {path!r}
{exec_line}
print({{name: globals()[name] for name in _names}})
"""
EXEC = 'exec(open(_path).read())'


def run_own(tmp_path, settings, *args, exec_line=EXEC, script='own.py', **files):
    """Runs a script with these settings, which prints them: own.py, - (from stdin) or -c."""
    source = OWN.format(settings=settings, exec_line=exec_line,
                        path=os.path.join(ROOT, 'configurator.py'))
    (tmp_path / 'own.py').write_text(source)
    for name, text in files.items():
        (tmp_path / f'{name}.py').write_text(text)
    command = ['-c', source] if script == '-c' else [script]
    return subprocess.run([sys.executable, *command, *args], cwd=tmp_path, capture_output=True,
                          text=True, input=source)


def read_own(*args, **options):
    result = run_own(*args, **options)
    assert result.returncode == 0 and result.stderr == '', result.stderr
    return eval(result.stdout)


NUMBERS = """
top_k = 200
grad_clip = 1.0
save_interval = 5
dropout = 0.1
max_iters = 100
warmup_iters = 10
learning_rate = 1e-3
eval_only = False
compile = 'auto'
wandb_run_name = 'x'
out_dir = 'out'
"""


@pytest.mark.parametrize('text, name, expected', [
    ('0.07 * max_iters', 'warmup_iters', 7), ('None', 'top_k', 0), ('None', 'grad_clip', 0.0),
    ('None', 'save_interval', 0), ('None', 'dropout', 0.0), ('None', 'wandb_run_name', ''),
    ('float("inf")', 'grad_clip', 0.0), ('float("inf")', 'max_iters', 10 ** 18),
    ('math.inf', 'save_interval', 0), ('0', 'compile', False), ('1', 'compile', True),
    ('None', 'compile', 'auto'), ('np.bool_(True)', 'eval_only', True),
    ('np.float32(0.5) > 0', 'compile', True), ('np.float64(0.5)', 'learning_rate', 0.5),
    ('np.array(3)', 'top_k', 3), ('np.str_("a")', 'out_dir', 'a'),
    ('__import__("pathlib").Path("a", "b")', 'out_dir', 'a/b'), ('"1e-3"', 'learning_rate', 1e-3),
    ('"1e3"', 'max_iters', 1000), ('__import__("fractions").Fraction(6, 2)', 'top_k', 3)])
def test_what_peoples_files_have(tmp_path, text, name, expected):
    value = read_own(tmp_path, NUMBERS, 'c.py', c=f'{name} = {text}')[name]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize('text, name', [
    ('7.001', 'warmup_iters'), ('None', 'max_iters'), ('None', 'eval_only'),
    ('-float("inf")', 'grad_clip'), ('float("inf")', 'learning_rate'), ('"fast"', 'learning_rate'),
    ('float("nan")', 'dropout'), ('"nan"', 'top_k'), ('np.nan', 'grad_clip'), ('b"a"', 'out_dir')])
def test_what_files_must_not_have(tmp_path, text, name):
    said = check_mistake(run_own(tmp_path, NUMBERS, 'c.py', c=f'{name} = {text}'))
    assert f'{name} in c.py needs ' in said


@pytest.mark.parametrize('flag, expected', [
    ('--top_k=None', 0), ('--grad_clip=inf', 0.0), ('--max_iters=inf', 10 ** 18),
    ('--max_iters=1e18', 10 ** 18), ('--wandb_run_name=None', ''),
    ('--wandb_run_name="None"', 'None')])
def test_none_and_infinity_in_flags(tmp_path, flag, expected):
    name = flag[2:].partition('=')[0]
    value = read_own(tmp_path, NUMBERS, flag)[name]
    assert value == expected and type(value) is type(expected)


CONTAINERS = """
path_or_none = None  # a text
betas = (0.9, 0.95)
labels = ['a']
table = {'a': 1}
width: int = 3  # of the model
a = b = 1
c, d = 1, 2
if width > 2:
    inside = 1
else:
    inside = 2
try:
    tried = 2.0
finally:
    with open('own.py'):
        opened = 3
"""


def test_settings_of_all_kinds_and_in_all_places(tmp_path):
    assert read_own(tmp_path, CONTAINERS) == dict(
        path_or_none=None, betas=(0.9, 0.95), labels=['a'], table={'a': 1}, width=3, a=1, b=1, c=1,
        d=2, inside=1, tried=2.0, opened=3)
    flags = {'path_or_none': 'a b', 'betas': (1, 2), 'labels': [], 'table': {}, 'width': 4, 'a': 5,
             'b': 6, 'c': 7, 'd': 8, 'inside': 9, 'tried': 10.0, 'opened': 11}
    args = [f'--{name}={value}' for name, value in flags.items()]
    for script in ('own.py', '-', '-c'):
        assert read_own(tmp_path, CONTAINERS, *args, script=script) == flags
    assert read_own(tmp_path, CONTAINERS, 'c.py', c='\n'.join(
        f'{name} = {value!r}' for name, value in flags.items())) == flags
    help = run_own(tmp_path, CONTAINERS, '--help').stdout
    assert [line for line in help.splitlines() if line.startswith('  --width=3 ')
            and line.endswith('of the model')]
    for flag in ('--betas=[1]', '--labels=(1,)', '--table=x', '--a=None'):
        assert 'needs a' in check_mistake(run_own(tmp_path, CONTAINERS, flag))
    assert 'betas in c.py needs a tuple' in check_mistake(
        run_own(tmp_path, CONTAINERS, 'c.py', c='betas = [1]'))
    assert read_own(tmp_path, CONTAINERS, '--path_or_none=3')['path_or_none'] == 3


def test_an_imported_constant_is_no_setting(tmp_path):
    settings = 'import os\nfrom math import pi\nwidth = 2'
    assert 'unknown setting --pi' in check_mistake(run_own(tmp_path, settings, '--pi=3'))


@pytest.mark.parametrize('exec_line', [
    'import builtins\nexec(compile(open(_path).read(), _path, "exec"))',
    'def run():\n    exec(open(_path).read(), globals())\nrun()',
    'if True:\n    _text = open(_path).read()\n    exec(_text)'])
def test_configurator_is_run_in_any_way(tmp_path, exec_line):
    assert read_own(tmp_path, 'width = 2', '--width=3', exec_line=exec_line) == {'width': 3}


def test_a_config_of_the_script_stays(tmp_path):
    assert read_own(tmp_path, 'config = "mine"\nwidth = 2', '--width=3') == {
        'config': 'mine', 'width': 3}
    exec_line = f'{EXEC}\n_names.append("config")'
    assert read_own(tmp_path, 'width = 2', '--width=3', exec_line=exec_line) == {
        'width': 3, 'config': {'width': 3}}


def test_a_tilde_means_home(tmp_path):
    settings = ('runs = "a"\nout_dir = "b"\nmy_path = "c"\ntext = "d"\ndataset = "e"\n'
                'cache_dir = "~/f"')
    home = os.path.expanduser('~')
    values = read_own(tmp_path, settings, 'c.py', '--runs=~/a,~/b', '--text=~/t', '--dataset=a~b',
                      '--my_path=~', c='out_dir = "~/out"')
    assert values == dict(runs=f'{home}/a,{home}/b', out_dir=f'{home}/out', my_path=home,
                          text='~/t', dataset='a~b', cache_dir=f'{home}/f')


# -----------------------------------------------------------------------------
# copies of configurator.py in people's own projects
OWN_SCRIPT = '''batch_size = 12  # sequences
name = 'x'
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open('configurator.py').read())  # overrides from the command line or a config file
config = {k: globals()[k] for k in config_keys}
print(config)
'''


def run_copy(folder, *args):
    """Runs own.py in the folder as people do, without this repository on Python's path."""
    (folder / 'own.py').write_text(OWN_SCRIPT)
    shutil.copy(os.path.join(ROOT, 'configurator.py'), folder)
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run([sys.executable, 'own.py', *args], cwd=folder, env=env,
                          capture_output=True, text=True)


def test_a_script_with_copies_of_configurator_and_runtime(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    (tmp_path / 'mine.py').write_text('name = "y"\nhelper = 3\nbatch_size = 2 * helper\n')
    result = run_copy(tmp_path, 'mine.py', '--name=z')
    assert result.stderr == '' and result.stdout == "{'batch_size': 6, 'name': 'z'}\n"
    assert run_copy(tmp_path).stdout == "{'batch_size': 12, 'name': 'x'}\n"
    help = run_copy(tmp_path, '--help').stdout
    assert help.startswith('own.py\n') and '--batch_size=12' in help and 'sequences' in help
    said = check_mistake(run_copy(tmp_path, '--batchsize=8'))
    assert said == ('error: unknown setting --batchsize (did you mean --batch_size?); '
                    'python own.py --help lists the settings\n')


def test_a_script_in_another_folder_than_configurator_and_runtime(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    shutil.copy(os.path.join(ROOT, 'configurator.py'), tmp_path)
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'own.py').write_text(
        'import sys\nname = "x"\npath = list(sys.path)\n'
        'exec(open("configurator.py").read())\nprint(name, path == sys.path)')
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    result = subprocess.run([sys.executable, 'scripts/own.py', '--name=y'], cwd=tmp_path, env=env,
                            capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ('y True\n', '')


@pytest.mark.parametrize('folder', ['a', 'a/b'])
def test_a_script_in_a_subfolder_that_is_the_current_one(tmp_path, folder):
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    (tmp_path / folder).mkdir(parents=True)
    path = os.path.relpath(ROOT, tmp_path / folder)
    (tmp_path / folder / 'own.py').write_text(
        f'import sys\nname = "x"\npath = list(sys.path)\n'
        f'exec(open({os.path.join(path, "configurator.py")!r}).read())\n'
        'import runtime\nprint(name, path == sys.path, runtime.__file__)')
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    result = subprocess.run([sys.executable, 'own.py', '--name=y'], cwd=tmp_path / folder, env=env,
                            capture_output=True, text=True)
    assert result.stderr == '' and result.stdout.startswith('y True ')
    assert os.path.samefile(result.stdout.split()[-1], tmp_path / 'runtime' / '__init__.py')


def test_a_copy_of_configurator_without_runtime_says_what_to_copy(tmp_path):
    said = check_mistake(run_copy(tmp_path, '--batch_size=8'))
    assert 'configurator.py needs the folder runtime/' in said and 'copy that folder' in said


def test_an_import_that_fails_within_runtime_keeps_its_traceback(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'runtime'), tmp_path / 'runtime')
    with open(tmp_path / 'runtime' / 'console.py', 'a') as f:
        f.write('import no_such_module\n')
    result = run_copy(tmp_path)
    assert result.returncode == 1 and 'Traceback' in result.stderr
    assert "No module named 'no_such_module'" in result.stderr
