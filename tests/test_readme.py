"""The pages: the commands, files, links and settings that they name exist; their form."""
import ast
import glob
import os
import re
import shlex

import pytest
from conftest import ROOT
from test_configs import settings_of

PAGES = ['README.md', 'CONTRIBUTING.md', *sorted(
    os.path.relpath(path, ROOT) for pattern in (('docs', '*.md'), ('data', '*', 'readme.md'))
    for path in glob.glob(os.path.join(ROOT, *pattern)))]

# people and machines run these two lines exactly as they are
SET_UP = [
    'python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && '
    'python data/python_bpe/prepare.py && python train.py config/train_python_bpe.py && '
    'python sample.py --out_dir=out-python-bpe --start="def close(self):" '
    '--num_samples=1 --temperature=0.6',
    'python3 -m venv .venv && .venv/bin/pip install -q -r requirements-dev.txt && '
    '.venv/bin/python -m pytest']


def read(name='README.md'):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()


def commands():
    """Every shell command of the pages that starts Python, as (page, words)."""
    for page in PAGES:
        text = re.sub(r'\\\n *', '', read(page))
        lines = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.S)).splitlines()
        lines += re.findall(r'^    (\S.*)', text, re.M)
        lines += re.findall(r'`((?:python|torchrun) [^`]*)`', text.replace('\n', ' '))
        for line in lines:
            for command in re.split(r' && |; ', line):
                # `until` begins a loop; variables may be set in front of the command
                command = re.sub(r'^(until )?(\w+=\S* )*', '', command)
                if re.match(r'(\S*python3?|torchrun) ', command):
                    yield page, shlex.split(re.split(r'\s{3,}', command)[0])


def list_additions(page):
    """The settings and files that the page's own examples add: {name: default}, {path}."""
    blocks = ''.join(re.findall(r'```diff\n(.*?)```', read(page), re.S))
    settings = {name: ast.literal_eval(value)
                for name, value in re.findall(r"^\+(\w+) = ('\w*'|[\w.-]+)", blocks, re.M)}
    return settings, set(re.findall(r'A new file, `([^`]+)`', read(page)))


def name_of(value):
    return value if isinstance(value, str) else ' '.join(value)[:80]


@pytest.mark.parametrize('page, words', list(commands()), ids=name_of)
def test_a_command(page, words):
    if words[1] == '-m':
        assert words[2] in ('venv', 'pytest')
        if words[2] == 'pytest':
            check_pytest(words[3:])
        return
    script = next(w for w in words if w.endswith('.py'))
    new_settings, new_files = list_additions(page)
    if script in new_files:
        return
    assert os.path.isfile(os.path.join(ROOT, script)), script
    # the flags of a script without settings are train.py's
    settings = {**(settings_of(script) or settings_of('train.py')), **new_settings}
    for word in words[words.index(script) + 1:]:
        if word.startswith('--'):
            name = word[2:].partition('=')[0]
            assert name in settings, f'{script} has no setting {name}'
            assert '=' in word or isinstance(settings[name], bool), word
        else:
            assert os.path.isfile(os.path.join(ROOT, word)), word


def check_pytest(words):
    """The arguments are a marker of ours or a test file."""
    if words[:1] == ['-m']:
        assert f'"{words[1]}: ' in read('pyproject.toml')
        words = words[2:]
    for word in words:
        assert os.path.isfile(os.path.join(ROOT, word)), word


def test_there_are_commands():
    found = list(commands())
    scripts = {word for _, words in found for word in words}
    assert len(found) > 60 and {'train.py', 'sample.py', 'bench.py', 'plot.py'} <= scripts
    with_commands = {page for page, _ in found}
    assert {page for page in PAGES if '```sh' in read(page)} <= with_commands


def test_the_other_commands():
    for page in PAGES:
        for path in re.findall(r'`(?:bash|sbatch) ([\w/.]+)', read(page)):
            assert os.path.isfile(os.path.join(ROOT, path)), (page, path)


def test_the_two_lines_that_set_everything_up():
    lines = [line for line in read().splitlines() if line.startswith('python3 -m venv')]
    assert lines == SET_UP
    assert "grep -E '^python3 -m venv .*pytest' README.md" in read('.ci/run')


@pytest.mark.parametrize('page', PAGES)
def test_the_form_of_a_page(page):
    lines = read(page).splitlines()
    for line in lines:
        if line not in SET_UP and not line.startswith('|'):
            assert len(re.sub(r'\]\([^)]*\)', ']', line)) <= 100, line
    if page == 'README.md':
        assert len(lines) <= 220
        pictures = re.findall(r'!\[[^]]+\]\(([^)]+)\)', '\n'.join(lines[:25]))
        assert pictures and os.path.getsize(os.path.join(ROOT, pictures[0]))


def anchors(page):
    """What `#...` may follow the page's name in a link: its headings, as GitHub writes them."""
    headings = re.findall(r'^#+ (.*)', re.sub(r'```.*?```', '', read(page), flags=re.S), re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)]+)\)', read(page)):
        if target.startswith('https://'):
            continue
        path, _, anchor = target.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, path)), target
        assert not anchor or anchor in anchors(path), target


def test_what_is_where():
    block = re.search(r'## What is where\s+```\n(.*?)```', read(), re.S).group(1)
    named = []
    for pattern in (line.split()[0] for line in block.splitlines()):
        paths = glob.glob(os.path.join(ROOT, pattern))
        assert paths, pattern
        named += [os.path.relpath(path, ROOT) for path in paths]
    patterns = (('*.py',), ('*.ipynb',), ('runtime', '[!_]*.py'), ('docs', '*.md'))
    there = {os.path.relpath(path, ROOT) for pattern in patterns
             for path in glob.glob(os.path.join(ROOT, *pattern))}
    unnamed = there - set(named)
    assert not unnamed


@pytest.mark.parametrize('page', PAGES)
def test_settings_and_files_named_exist(page):
    text = read(page)
    every = {name for script in ('train.py', 'sample.py', 'bench.py', 'convert.py', 'plot.py',
                                 'data/text/prepare.py', 'data/openwebtext/prepare.py')
             for name in settings_of(script)} | list_additions(page)[0].keys()
    for name in re.findall(r'`--(\w+)[=`]', text):
        assert name in every or name in ('help', 'key'), name
    for path in re.findall(r'\b(?:config|runtime|recipes|tests|docs)/\w+\.\w+', text):
        assert os.path.isfile(os.path.join(ROOT, path)), path


@pytest.mark.parametrize('page', PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r'@\w+@|TODO|XXX', read(page))
