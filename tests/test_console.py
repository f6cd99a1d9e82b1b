"""What the programs tell their user, and from which rank."""
import pytest

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
