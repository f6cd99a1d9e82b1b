"""bench.py runs anywhere and ends in JSON. What it measures is never asserted."""
import json
import os

from conftest import TINY, run

SMALL = [a for a in TINY if a.split('=')[0] not in ('--gradient_accumulation_steps', '--eval_iters', '--warmup_iters', '--lr_decay_iters', '--learning_rate')]


def test_a_table_and_json(tmp_path, char_data):
    out = run('bench.py', *SMALL, '--device=auto', '--dataset=nothing', cwd=tmp_path).stdout
    result = json.loads(out.splitlines()[-1])
    assert 3 <= result['steps'] <= 20 and result['ms_per_iter'] > 0 and result['share_of_matmul_rate'] > 0 and result['peak_memory_bytes'] > 1e7
    assert abs(result['tokens_per_s'] * result['ms_per_iter'] / 1000 - 4 * 32) < 1e-6
    line = out.splitlines()[-2]
    assert line.startswith('time per iteration: ') and ' ms, MFU: ' in line and 'best of 1024: ' in out
    assert 'data: random tokens, as nothing is not prepared\n' in out
    out = run('bench.py', *SMALL, f'--dataset={char_data}', cwd=tmp_path).stdout
    assert f'data: {char_data}' in out and not os.listdir(tmp_path)


def test_a_profile(tmp_path):
    out = run('bench.py', *SMALL, '--profile', '--real_data=False', cwd=tmp_path).stdout
    assert 'Self CPU' in out and 'aten::' in out
    with open(tmp_path / 'out-bench' / 'trace.json', encoding='utf-8') as f:
        assert len(json.load(f)['traceEvents']) > 100
