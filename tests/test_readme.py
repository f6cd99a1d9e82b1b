"""What the README tells people to type exists, with these flags; and nothing is promised that isn't there."""
import glob
import os
import re
import shlex

import pytest
from conftest import ROOT
from test_configs import knobs


def read(name='README.md'):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()


def commands():
    """Every shell command of the README and the data sets' readmes, as (page, words)."""
    pages = ['README.md', *sorted(os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, 'data', '*', 'readme.md')))]
    for page in pages:
        text = re.sub(r'\\\n *', '', read(page))
        lines = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.S)).splitlines() + re.findall(r'^    (\S.*)', text, re.M)
        lines += re.findall(r'`((?:python|torchrun) [^`]*)`', text.replace('\n', ' '))
        for line in lines:
            for command in line.split(' && '):
                if re.match(r'(\S*python3?|torchrun) ', command):
                    yield page, shlex.split(re.split(r'\s{3,}', command)[0])


@pytest.mark.parametrize('page, words', list(commands()), ids=lambda v: v if isinstance(v, str) else ' '.join(v)[:80])
def test_a_command(page, words):
    if words[1] == '-m':
        assert words[2] in ('venv', 'pytest')
        return
    script = next(w for w in words if w.endswith('.py'))
    assert os.path.isfile(os.path.join(ROOT, script)), script
    for word in words[words.index(script) + 1:]:
        if word.startswith('--'):
            name = word[2:].partition('=')[0]
            assert name in knobs(script), f'{script} has no knob {name}'
            assert '=' in word or isinstance(knobs(script)[name], bool), word
        else:
            assert os.path.isfile(os.path.join(ROOT, word)), word


def test_there_are_commands():
    found = [words for _, words in commands()]
    assert len(found) > 25 and {'train.py', 'sample.py', 'bench.py'} <= {w for words in found for w in words}


def test_the_two_lines_that_set_everything_up():
    lines = [line for line in read().splitlines() if line.startswith('python3 -m venv')]
    assert len(lines) == 2
    assert 'requirements.txt' in lines[0] and 'config/train_python_char.py' in lines[0] and 'sample.py --out_dir=out-python-char' in lines[0]
    assert 'requirements-dev.txt' in lines[1] and lines[1].endswith('-m pytest')
    assert "grep -E '^python3 -m venv .*pytest' README.md" in read('.ci/run')


def test_files_and_knobs_named_exist():
    text = read()
    for path in re.findall(r'\]\(([^)#:]+)\)', text):
        assert os.path.exists(os.path.join(ROOT, path)), path
    for line in re.search(r'## What is where\s+```\n(.*?)```', text, re.S).group(1).splitlines():
        assert os.path.exists(os.path.join(ROOT, line.split()[0])), line
    every = {name for script in ('train.py', 'sample.py', 'bench.py') for name in knobs(script)}
    for name in re.findall(r'`--(\w+)[=`]', text):
        assert name in every or name in ('help', 'key'), name


def test_nothing_is_left_to_fill_in():
    for page in ('README.md', *glob.glob(os.path.join(ROOT, 'data', '*', 'readme.md'))):
        assert not re.search(r'@\w+@|TODO|XXX', read(page)), page
