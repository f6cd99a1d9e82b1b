"""What the programs tell their user, and from which rank."""
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from runtime import console


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    # it leaves rank 0 the time to speak
    monkeypatch.setattr(console.time, 'sleep', lambda seconds: None)
    with pytest.raises(SystemExit):
        console.fail('no')
    assert capsys.readouterr().err == ''
    with pytest.raises(SystemExit):  # unless only this rank may have the mistake
        console.fail('no', 'do', who='rank')
    assert capsys.readouterr().err == 'error: rank 1: no; do\n'
    console.say('a')
    console.note('b')
    console.warn('c')
    assert capsys.readouterr() == ('', '')
    monkeypatch.delenv('RANK')
    console.say('a')
    console.note('b')
    console.warn('c')
    assert capsys.readouterr() == ('a\n', 'b\nwarning: c\n')


# -----------------------------------------------------------------------------
# errors that nothing catches
def run_code(body, redirect=''):
    """Runs code as a script does, by a shell; returns the process."""
    code = f'from runtime import console\nconsole.prepare_terminal()\n{body}'
    command = f'{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirect}'
    return subprocess.run(['bash', '-c', f'{command}; exit ${{PIPESTATUS[0]}}'], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ROOT})


@pytest.mark.parametrize('error, line', [
    ("OSError(28, 'No space left on device')", 'error: No space left on device; make room'),
    ("PermissionError(13, 'Permission denied', 'a/b')", 'error: a/b: Permission denied; change'),
    ("OSError(30, 'Read-only file system', 'a/b')", 'error: a/b: Read-only file system; change'),
    ("OSError(24, 'Too many open files', 'a/b')", 'error: a/b: Too many open files'),
    ("RuntimeError('I/O error: No space left on device (os error 28)')",
     'error: No space left on device; make room')])
def test_what_the_system_refuses_is_one_line(error, line):
    out = run_code(f'raise {error}')
    assert out.returncode == 1 and out.stderr.startswith(line) and out.stderr.count('\n') == 1


@pytest.mark.parametrize('error', ["ValueError('x')", "FileNotFoundError(2, 'x', 'y')",
                                   "OSError('x')", 'ZeroDivisionError()'])
def test_a_bug_keeps_its_traceback(error):
    out = run_code(f'raise {error}')
    assert out.returncode == 1 and out.stderr.startswith('Traceback')


def test_torchs_writer_hides_the_systems_error():
    out = run_code("""try:
    raise OSError(28, 'No space left on device', 'x.pt')
except OSError:
    raise RuntimeError('PytorchStreamWriter failed writing file')""")
    assert out.stderr.startswith('error: x.pt: No space left on device; make room')
    assert out.stderr.count('\n') == 1


def test_a_reader_that_has_gone_is_not_an_error():
    out = run_code("for i in range(10 ** 6):\n    print('x' * 100)", '| head -1')
    assert out.returncode == 141 and out.stderr == '' and out.stdout == 'x' * 100 + '\n'
    out = run_code("for i in range(10 ** 5):\n    console.say(i)\nconsole.note('end')", '| head -1')
    assert out.returncode == 0 and out.stderr == 'end\n'  # a run continues


def test_a_broken_pipe_of_somebodys_own_keeps_its_traceback():
    out = run_code("import os\nr, w = os.pipe()\nos.close(r)\nos.write(w, b'x')")
    assert out.returncode == 1 and out.stderr.startswith('Traceback')
    assert 'BrokenPipeError' in out.stderr


def test_output_that_cannot_be_written_is_one_line():
    for code in ("print('x', flush=True)", "print('x')", "print('x' * 10 ** 6)"):
        out = run_code(code, '> /dev/full')
        assert out.returncode == 1 and out.stderr.startswith('error: ')
        assert 'No space left on device' in out.stderr and out.stderr.count('\n') == 1


@pytest.mark.parametrize('redirect', ['<&-', '2>&-', '>&-', '<&- >&- 2>&-'])
def test_closed_streams_are_never_a_files(tmp_path, redirect):
    path = tmp_path / 'x'
    out = run_code(f"""
import os, sys
with open({str(path)!r}, 'wb') as f:
    assert f.fileno() > 2
    print('out')
    console.note('err')
    os.write(1, b'raw')
    os.write(2, b'raw')
try:
    input()
except EOFError:
    pass
""", redirect if '<' in redirect else redirect + ' < /dev/null')
    assert out.returncode == 0, out.stderr
    assert path.read_bytes() == b''
    is_closed = '>&-' in redirect.split()
    assert ('raw' in out.stdout, 'out\n' in out.stdout) == (not is_closed, not is_closed)


def test_errors_of_other_ranks_are_not_silent(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    out = run_code("raise PermissionError(13, 'Permission denied', 'a')")
    assert out.stderr.startswith('error: rank 1: a: Permission denied; ')


def test_the_last_act_comes_once_and_with_the_frames():
    body = """
def act(frames):
    names = [frame.f_code.co_name for frame in frames]
    print('act', 'inner' in names)
    {end}
console.act_before_errors(act)
def inner():
    {error}
inner()
"""
    for error in ("raise ValueError('bug')", "console.fail('mistake')"):
        out = run_code(body.format(error=error, end='pass'))
        assert out.returncode == 1 and out.stdout == 'act True\n'
        out = run_code(body.format(error=error, end="raise KeyError('worse')"))
        assert out.stdout == 'act True\n' and 'nothing could be saved' in out.stderr
        assert out.returncode == 1
    out = run_code(body.format(error='console.act_before_errors(None)', end='pass'))
    assert out.stdout == '' and out.returncode == 0


def test_commands_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--out_dir=a b', '--start=$HOME', '--n=1'])
    words = shlex.split(console.format_command(out_dir='c;d', init_from='resume'))
    assert words == ['python', 'train.py', '--start=$HOME', '--n=1', '--out_dir=c;d',
                     '--init_from=resume']
    words = shlex.split(console.format_script('sample.py', "--out_dir=it's"))
    assert words[2:] == ["--out_dir=it's"] and os.path.samefile(words[1], f'{ROOT}/sample.py')
