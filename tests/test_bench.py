"""bench.py runs anywhere and ends in JSON. What it measures is never asserted."""
import json
import os
import sys

import pytest
from conftest import TINY, run

SMALL = [a for a in TINY if a.split('=')[0] not in ('--gradient_accumulation_steps', '--eval_iters', '--warmup_iters', '--lr_decay_iters', '--learning_rate',
                                                    '--loss_png')]


def bench(*args, cwd):
    out = run('bench.py', *SMALL, '--repeats=3', *args, cwd=cwd).stdout
    return out, json.loads(out.splitlines()[-1])


def test_a_table_and_json(tmp_path, char_data):
    out, result = bench('--device=auto', '--dataset=nothing', cwd=tmp_path)
    assert result['times'] == 3 and result['ms_per_iter'] > 0 and result['share_of_matmul_rate'] > 0 and result['peak_memory_bytes'] > 1e7
    assert abs(result['tokens_per_s'] * result['ms_per_iter'] / 1000 - 4 * 32) < 1e-6
    line = out.splitlines()[-2]
    assert line.startswith('time per iteration: ') and ' ms, MFU: ' in line and 'best of 1024: ' in out
    assert 'data: random tokens, as nothing is not prepared\n' in out
    out, _ = bench(f'--dataset={char_data}', cwd=tmp_path)
    assert f'data: {char_data}' in out and not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_profile(tmp_path):
    out = run('bench.py', *SMALL, '--profile', '--repeats=3', '--real_data=False', cwd=tmp_path).stdout
    assert 'Self CPU' in out and 'aten::' in out
    with open(tmp_path / 'out-bench' / 'trace.json', encoding='utf-8') as f:
        assert len(json.load(f)['traceEvents']) > 100


@pytest.mark.parametrize('what, compare, tokens, extra', [
    pytest.param('train', 'hf', 4 * 32, {'share_of_matmul_rate', 'mfu', 'loss'}, marks=pytest.mark.slow),
    pytest.param('data', 'slices', 4 * 32, set(), marks=pytest.mark.slow),
    pytest.param('prefill', 'hf', 2 * 31, {'share_of_matmul_rate'}, marks=pytest.mark.slow), ('decode', 'hf', 2 * 5, {'share_of_read_rate'})])
def test_beside_what_others_do(tmp_path, char_data, what, compare, tokens, extra):
    out, result = bench(f'--what={what}', f'--compare={compare}', f'--dataset={char_data}', '--num_samples=2', '--max_new_tokens=5', cwd=tmp_path)
    assert extra <= set(result) and result['what'] == what and abs(result['tokens_per_s'] * result['ms_per_iter'] / 1000 - tokens) < 1e-6
    assert f'{result["ratio"]:.2f}' in next(line for line in out.splitlines() if line.startswith('times as fast'))


@pytest.mark.slow
def test_beside_a_command(tmp_path):
    command = f"""{sys.executable} -c 'print("noise"); print(chr(123) + chr(34) + "tokens_per_s" + chr(34) + ": 64" + chr(125))'"""
    _, result = bench('--real_data=False', f'--compare={command}', cwd=tmp_path)
    assert result['their_ms_per_iter'] == 2000 and abs(result['ratio'] * result['ms_per_iter'] - 2000) < 0.3 * 2000  # the median of ratios
    assert 'no JSON with tokens_per_s' in run('bench.py', *SMALL, '--real_data=False', f'--compare={sys.executable} -c pass', cwd=tmp_path, ok=False).stderr
    assert 'status 3: broken' in run('bench.py', *SMALL, '--real_data=False', f"""--compare={sys.executable} -c 'import sys; print("broken"); sys.exit(3)'""",
                                     cwd=tmp_path, ok=False).stderr


@pytest.mark.slow
def test_processes_from_start_to_end(tmp_path, char_data):
    config = tmp_path / 'short.py'
    config.write_text(f'dataset = {str(char_data)!r}\nmax_iters = 2\neval_iters = 1\ngradient_accumulation_steps = 1\nlr_decay_iters = 2\n')
    _, result = bench('--what=start', f'--dataset={char_data}', cwd=tmp_path)
    assert result['ms_per_iter'] > 0 and 'tokens_per_s' not in result
    _, result = bench('--what=run', config, cwd=tmp_path)
    assert result['ms_per_iter'] > 0 and os.listdir(tmp_path) == ['short.py']


@pytest.mark.parametrize('args, words', [
    (['--what=nothing'], 'train, data, prefill, decode, run or start'), (['--what=data', '--compare=hf'], 'train, prefill or decode'),
    (['--compare=slices'], 'use it with data')])
def test_mistakes(tmp_path, args, words):
    assert words in run('bench.py', *SMALL, *args, cwd=tmp_path, ok=False).stderr
