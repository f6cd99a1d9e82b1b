"""recipes/torture.py runs, counts what it did, and notices harm."""
import json
import os
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'recipes'))
import hostile_files

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the recipe is for Linux')


@pytest.mark.slow
def test_a_small_run_loses_nothing():
    script = os.path.join(ROOT, 'recipes', 'torture.py')
    command = [sys.executable, script, '--kills=4', '--files=12', '--minutes=20']
    run = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result['bad'] == run.returncode == 0, run.stdout + run.stderr
    for counts in result['kills'].values():
        assert counts['elsewhere'] + counts['within a save'] + counts['during start-up'] == 1
    assert result['files'].keys() == hostile_files.KINDS.keys()
    for counts in result['files'].values():
        assert counts['refused'] + counts['read'] >= 12 and counts['read'] and counts['refused']
    assert len(result['acts']) == 9


HARM = {
    'read': 'pass',
    'refused': 'import sys; sys.exit(print("error: no") or 1)',
    'not one line': 'import sys; print("error: no\\nerror: no"); sys.exit(1)',
    'traceback': 'raise KeyError("x")',
    'not finite': 'print("step 0: train loss nan, val loss 1.0")',
    'killed by a signal': 'import os; os.kill(os.getpid(), 9)',
    'timed out': 'while True: pass',
    'too much memory': 'b"x" * 2 ** 31',
    'code ran': 'import pickle; pickle.load(open("calls", "rb"))',
}


@pytest.mark.parametrize('outcome', HARM)
def test_harm_is_noticed(tmp_path, monkeypatch, outcome):
    monkeypatch.chdir(tmp_path)
    if outcome == 'timed out':
        monkeypatch.setattr(hostile_files, 'SECONDS', 2)
    (tmp_path / 'script.py').write_text(HARM[outcome])
    for call in hostile_files.CALLS[:5]:
        (tmp_path / 'calls').write_bytes(pickle.dumps(call))
        assert hostile_files.run_script(str(tmp_path / 'script.py'))[0] == outcome
        if outcome != 'code ran':
            break
