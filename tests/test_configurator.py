"""Config files and flags of scripts that run configurator.py. Each case runs its own script."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

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
    ('batch_size = "8"', 'a whole number'), ('batch_size = 1.5', 'a whole number'),
    ('eval_only = 2', 'True or False'), ('start = 1', 'a string'),
    ('batch_size = True', 'a whole number'), ('compile = 3', "'auto' or its own type"),
    ('batch_size = 4\nif batch_size == 4\n    start = ""', 'c.py, line 2'),
    ('batch_size = 3\nstart = undefined', "c.py, line 2: NameError: name 'undefined'"),
    ('if True:\n    lerning_rate: float = 1', 'learning_rate'),
])
def test_mistakes_in_files(tmp_path, text, words):
    assert words in mistake(tmp_path, 'c.py', c=text)


def test_files_that_are_not_text(tmp_path):
    for content in (b'x = "\xff\xfe"', b'x = 1\x00'):
        (tmp_path / 'c.py').write_bytes(content)
        assert 'c.py' in mistake(tmp_path, 'c.py')


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
