"""The settings of our scripts: their values, mistakes in them, suggestions, and --help."""
import ast
import os

import pytest
import torch
from conftest import FAST, ROOT, TINY, run, run_here

from runtime import ranges, settings

SCRIPTS = ['train.py', 'sample.py', 'bench.py', 'convert.py', 'plot.py', *(
    f'data/{name}/prepare.py'
    for name in ('shakespeare_char', 'shakespeare', 'python_char', 'python_bpe', 'openwebtext',
                 'text'))]


# -----------------------------------------------------------------------------
# mistakes
def test_without_arguments_it_says_what_to_do(tmp_path):
    if os.path.exists(os.path.join(ROOT, 'data', 'openwebtext', 'train.bin')):
        pytest.skip('openwebtext is prepared here: python train.py would train on it')
    err = run('train.py', ok=False, cwd=tmp_path).stderr
    assert 'openwebtext is not prepared' in err and '54 GB' in err
    assert 'data/openwebtext/prepare.py' in err and 'config/train_python_bpe.py' in err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('args, words', [
    (['--n_embd=30', '--n_head=4'], 'n_embd=30 is not divisible by n_head=4'),
    (['--n_layer=0'], 'n_layer=0'), (['--batch_size=0'], 'batch_size=0'),
    (['--n_head=0'], 'n_head=0'), (['--n_embd=0'], 'n_embd=0'),
    (['--block_size=0'], 'block_size=0'), (['--max_bad_steps=0'], 'max_bad_steps=0'),
    (['--gradient_accumulation_steps=0'], 'gradient_accumulation_steps=0'),
    (['--max_iters=-1'], 'max_iters=-1'), (['--beta1=-0.1'], 'beta1=-0.1'),
    (['--learningrate=1'], 'unknown setting --learningrate (did you mean --learning_rate?)'),
    (['--batch_size=many'], "--batch_size needs a whole number, not 'many'"),
    (['config/nowhere.py'], 'config file config/nowhere.py was not found'),
    (['batch_size=8'], 'batch_size=8 was not found (did you mean --batch_size=8?)'),
    (['out-nowhere'], 'out-nowhere was not found (did you mean --out_dir=out-nowhere?)'),
    (['--dropout=1.5'], 'dropout=1.5'), (['--beta2=1'], 'beta2=1'),
    (['--eval_interval=0'], 'eval_interval=0'), (['--log_interval=0'], 'log_interval=0'),
    (['--device=tpu9'], "'tpu9'"), (['--device=cuda:7'], 'cuda:7'), (['--dtype=int8'], "'int8'"),
    (['--compile=fast'], "'fast'"), (['--parallel=all'], "parallel='all'"),
    (['--init_from=gpt3'], "'gpt3'"), (['--init_from=resume'], 'does not exist'),
    (['--dataset=nowhere'], "dataset 'nowhere' was not found"),
    (['--block_size=100000'], 'fewer than block_size + 1'),
    (['--learning_rate=-1'], 'learning_rate=-1'), (['--seed=-1'], 'seed=-1'),
    (['--out_dir=/dev/null/x'], '/dev/null/x'), (['--out_dir='], 'out_dir is empty'),
    (['--out_dir=a\0b'], "out_dir='a\\x00b' has a zero character"),
    (['--dataset=D:\0runs'], 'has a zero character'), (['--init_from=\0'], 'has a zero character'),
    (['--out_dir=a\udcff'], "out_dir='a\\udcff' is not UTF-8"),
    (['--embd_conv=100000', '--block_size=16'], 'embd_conv=100000 must be below block_size=16'),
    (['--embd_conv=16', '--block_size=16'], 'embd_conv=16 must be below block_size=16'),
])
def test_mistakes_end_in_one_line_and_write_nothing(char_data, tmp_path, args, words):
    if args == ['--device=cuda:7'] and torch.cuda.device_count() > 7:
        pytest.skip('there is such a device')
    out = run_here('train.py', f'--dataset={char_data}', '--device=cpu', '--out_dir=out', *args,
                   ok=False, cwd=tmp_path)
    assert words in out.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize('env, words', [
    (dict(RANK='0', WORLD_SIZE='2'),
     'RANK and WORLD_SIZE, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
    (dict(LOCAL_RANK='0'), 'LOCAL_RANK'),
    (dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='4'), 'MASTER_ADDR')])
def test_without_torchruns_variables(char_data, tmp_path, env, words):
    err = run('train.py', *TINY, f'--dataset={char_data}', '--out_dir=out', ok=False,
              cwd=tmp_path, **env).stderr
    assert words in err and 'torchrun' in err and not os.listdir(tmp_path)


RANGES = {'--n_layer=0': 'n_layer=0 must be at least 1',
          '--dropout=1.5': 'dropout=1.5 must be at least 0 and below 1',
          '--parallel=all': "parallel='all' is not known (use ddp, zero1 or fsdp)",
          '--n_embd=30': 'n_embd=30 is not divisible by n_head=12 (try --n_embd=24)',
          '--decay_share=0': 'decay_share=0.0 must be above 0 and at most 1'}


def list_mistakes(err):
    """The mistakes in an error line, in alphabetical order."""
    return sorted(err.removeprefix('error: ').strip().split('; '))


def test_all_mistakes_in_values_are_in_one_line(char_data):
    args = [f'--dataset={char_data}', *RANGES]
    err = run_here('train.py', *args, ok=False).stderr
    assert list_mistakes(err) == sorted(RANGES.values())
    # combinations
    args = ['--optim=muon', '--moments_dtype=bfloat16', '--beta2=0.999', '--parallel=zero1']
    mistakes = list_mistakes(run_here('train.py', *args, ok=False).stderr)
    auto = [*args[1:3], '--init_from=auto']
    assert len(list_mistakes(run_here('train.py', *auto, ok=False).stderr)) == 1
    assert len(mistakes) == 3 and [' '.join(text.split()[:4]) for text in mistakes] == [
        'moments in bfloat16 stand', 'optim=muon does not work', 'optim=muon does not work']


def test_mistakes_of_all_kinds_are_in_one_line(tmp_path):
    # unknown settings, values of a wrong type, and values out of range, in a file and in flags
    (tmp_path / 'c.py').write_text('batchsize = 8\nmax_iters = "many"\ngrad_clip = -1\n')
    others = ['unknown setting batchsize in c.py (did you mean batch_size?)',
              "max_iters in c.py needs a whole number, not 'many'",
              'grad_clip=-1.0 must be at least 0',
              'unknown setting --learningrate (did you mean --learning_rate?)',
              "--block_size needs a whole number, not 'x'",
              f'python {os.path.join(ROOT, "train.py")} --help lists the settings']
    err = run_here('train.py', 'c.py', '--learningrate=1', '--block_size=x', *RANGES, ok=False,
                   cwd=tmp_path).stderr
    err = err.replace(os.path.relpath(os.path.join(ROOT, 'train.py'), tmp_path),
                      os.path.join(ROOT, 'train.py'))
    assert list_mistakes(err) == sorted([*RANGES.values(), *others])


@pytest.mark.parametrize('script, flags, words', [
    ('train.py', ['--batch_size=1e12'], 'batch_size=1000000000000 must be at most 2**32'),
    ('train.py', ['--n_layer=1e9'], 'n_layer=1000000000 must be at most 2**17'),
    ('train.py', ['--block_size=1e12'], 'block_size=1000000000000 must be at most 2**24'),
    ('train.py', ['--eval_iters=1e12'], 'eval_iters=1000000000000 must be at most 2**20'),
    ('train.py', ['--bigrams=1e15'], 'bigrams=1000000000000000 must be at most 2**32'),
    ('train.py', ['--bigrams=1e9', '--n_embd=12000'], 'parameters, more than 8,796,093,022,208'),
    ('train.py', ['--n_layer=100000', '--n_embd=100008'], 'parameters, more than'),
    ('train.py', ['--batch_size=1e6', '--block_size=1e4'], 'tokens in an iteration, more than 4'),
    ('train.py', ['--max_iters=1e19'], 'max_iters=10000000000000000000 must be below 2**63'),
    ('train.py', ['--device=True'], 'device=True must be a text'),
    ('bench.py', ['--batch_size=1e8', '--block_size=1e3'], 'tokens in an iteration, more than 4'),
    ('sample.py', ['--num_samples=1e12'], 'num_samples=1000000000000 must be at most 2**24'),
    ('sample.py', ['--max_new_tokens=1e12'], 'max_new_tokens=1000000000000 must be at most')])
def test_sizes_that_nobody_means(tmp_path, script, flags, words):
    err = run_here(script, *flags, ok=False, cwd=tmp_path).stderr
    assert words in err and err.count('; ') == 0 and err.count('\n') == 1


@pytest.mark.parametrize('flags', [
    ['--max_iters=1e18'], ['--block_size=16777216', '--gradient_accumulation_steps=1'],
    ['--n_layer=96', '--n_embd=12288', '--n_head=96'], ['--batch_size=512']])
def test_large_sizes_that_somebody_may_mean(tmp_path, flags):
    err = run_here('train.py', *flags, '--dataset=nowhere', ok=False, cwd=tmp_path).stderr
    assert "dataset 'nowhere' was not found" in err


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_a_link_to_a_script_works_as_the_script(script, tmp_path):
    os.symlink(os.path.join(ROOT, script), tmp_path / 'link.py')
    assert run(tmp_path / 'link.py', '--help', cwd=tmp_path).stdout == run_here(
        script, '--help').stdout
    err = run(tmp_path / 'link.py', 'config/train_gpt2.py', '--nothing=1', '--seed=-1', ok=False,
              cwd=tmp_path, PYTHONPATH='').stderr
    assert 'unknown setting --nothing; seed=-1 must be' in err


@pytest.mark.parametrize('text', [
    'batch_size = "eight"', 'n_head = None', 'seed = "x"\nundefined', 'parallel = ["ddp"]',
    'n_embd = 0.5\nn_head = ()', 'learning_rate = "fast"\noptim = 3'])
def test_values_of_a_wrong_type_are_not_compared(tmp_path, text):
    (tmp_path / 'c.py').write_text(text)
    err = run_here('train.py', 'c.py', '--dropout=2', ok=False, cwd=tmp_path).stderr
    assert 'c.py' in err and 'dropout=2.0 must be at least 0 and below 1' in err


@pytest.mark.parametrize('flags, words', [
    (['--warmup_iters=100', '--lr_decay_iters=5'],
     'lr_decay_iters=5 is not above warmup_iters=100'),
    (['--warmup_iters=5', '--lr_decay_iters=5'], 'never decays'),
    (['--min_lr=0.1'], 'min_lr=0.1 is above learning_rate=0.003'),
    (['--min_lr=0', '--lr_decay_iters=1', '--max_iters=2'],
     'the learning rate is 0 from iteration 1 on; set --lr_decay_iters=2'),
    (['--min_lr=0.1', '--decay_lr=False'], ''), ([], '')])
def test_what_may_surprise_is_said_and_accepted(char_data, tmp_path, flags, words):
    err = run_here('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
                   '--max_iters=1', *flags).stderr
    assert words in err and err.count('warning: ') == bool(words) == err.count('\n')


# -----------------------------------------------------------------------------
# suggestions
@pytest.mark.parametrize('script, flag, meant', [
    ('train.py', '--lr=1e-3', '--learning_rate'), ('train.py', '--batchsize=8', '--batch_size'),
    ('train.py', '--n-layer=2', '--n_layer'), ('train.py', '--batch-size=8', '--batch_size'),
    ('train.py', '--optimizer=muon', '--optim'), ('train.py', '--epochs=3', '--max_iters'),
    ('sample.py', '--prompt=x', '--start'), ('sample.py', '--temp=1', '--temperature'),
    ('sample.py', '--max_tokens=9', '--max_new_tokens'), ('sample.py', '--n=3', '--num_samples'),
    ('sample.py', '--checkpoint=x', '--out_dir')])
def test_a_flag_by_another_name(script, flag, meant):
    err = run_here(script, flag, ok=False).stderr
    assert err.startswith(
        f'error: unknown setting {flag.split("=")[0]} (did you mean {meant}?); ')


@pytest.fixture(scope='module')
def huggingface_folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf') / 'my-gpt2'
    run_here('convert.py', f'--out_dir={trained}', f'--hf_dir={folder}')
    return str(folder)


def test_a_folder_instead_of_a_flag(trained, char_data, huggingface_folder):
    for script, folder, setting in (
            ('sample.py', trained, 'out_dir'), ('convert.py', trained, 'out_dir'),
            ('train.py', trained, 'out_dir'), ('plot.py', trained, 'runs'),
            ('train.py', char_data, 'dataset'), ('bench.py', char_data, 'dataset'),
            ('sample.py', huggingface_folder, 'init_from'),
            ('train.py', huggingface_folder, 'init_from')):
        err = run_here(script, folder, ok=False).stderr
        assert err.startswith(f'error: {folder} is a folder, not a config file '
                              f'(did you mean --{setting}={folder}?); '), script


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_default_is_a_mistake(script):
    own_settings = settings.read_settings(settings.read_source(os.path.join(ROOT, script)))
    config = {name: setting.default for name, setting in own_settings.items()}
    assert not ranges.find_mistakes(config) + ranges.find_wrong_paths(config)


@pytest.mark.parametrize('name', ['', 'ckpt.pt'])
def test_a_run_instead_of_a_model(trained, char_data, name):
    init_from = f'--init_from={os.path.join(trained, name)}'
    for script, *args in (('sample.py',), ('train.py', *TINY, f'--dataset={char_data}')):
        err = run_here(script, *args, init_from, ok=False).stderr
        assert 'it is the folder of a run: python ' in err and '--init_from=resume' in err
        assert f'--out_dir={os.path.dirname(os.path.join(trained, ""))}' in err


# -----------------------------------------------------------------------------
# config files of several scripts, and --help
SHARED = '''
import math
from os import path
max_iters = 5  # train.py's
num_samples = 3  # sample.py's
repeats = 4  # bench.py's
device = 'cpu'
_unused = 1
head_size, heads = 16, 2
def width(n):
    local = n * head_size
    return local
n_head = heads
n_embd = width(n_head)
for exponent in range(3):
    learning_rate = 10 ** -exponent
with open(path.devnull) as f:
    start = f.read() + str(math.pi)
'''


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py'])
def test_only_an_unknown_setting_is_a_mistake(script, tmp_path):
    (tmp_path / 'c.py').write_text(SHARED)
    run_here(script, 'c.py', '--help', cwd=tmp_path)
    (tmp_path / 'c.py').write_text(SHARED + 'dtypes = "float32"')
    err = run_here(script, 'c.py', '--help', ok=False, cwd=tmp_path).stderr
    path = os.path.relpath(os.path.join(ROOT, script), tmp_path)
    assert err.replace(os.path.join(ROOT, script), path) == (
        'error: unknown setting dtypes in c.py (did you mean dtype?); '
        f'python {path} --help lists the settings\n')


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_script_has_help(script, tmp_path):
    text = run_here(script, '--help', cwd=tmp_path).stdout
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        source = f.read()
    # its docstring, exactly as it stands in the source
    _, docstring, _ = source.split('"""', 2)
    assert text.startswith(docstring.strip('\n') + '\n\n')
    settings = [line for line in text.splitlines() if line.startswith('  --')]
    assert settings and all('=' in line for line in settings)
    tree = ast.parse(source)
    assert source.count('configurator.py') and ast.get_docstring(tree)


def test_help_of_train_has_the_line_for_two_machines():
    lines = run_here('train.py', '--help').stdout.splitlines()
    place = next(i for i, line in enumerate(lines) if line.endswith('\\'))
    assert 'torchrun --nnodes=2' in lines[place] and 'train.py' in lines[place + 1]
    assert not [line for line in lines[place + 1:] if line.endswith('\\')]


def test_help_shows_what_flags_and_files_have_set():
    lines = run_here('train.py', 'config/train_shakespeare_char.py', *FAST, '--help').stdout
    assert "--optim='adamw'" in lines and "(now 'muon')" in lines and '(now 5000)' in lines
