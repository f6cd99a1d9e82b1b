"""bench.py runs anywhere and ends in JSON. What it measures is never asserted."""
import json
import os
import sys

import pytest
from conftest import TINY, run

from runtime import timing

ONLY_TRAIN = ('--gradient_accumulation_steps', '--eval_iters', '--warmup_iters',
              '--lr_decay_iters', '--learning_rate')
SMALL = [arg for arg in TINY if arg.split('=')[0] not in ONLY_TRAIN]


def bench(*args, cwd):
    out = run('bench.py', *SMALL, '--repeats=3', *args, cwd=cwd).stdout
    return out, json.loads(out.splitlines()[-1])


def rates_agree(result, tokens):
    """Whether tokens per second and ms per iteration agree."""
    return abs(result['tokens_per_s'] * result['ms_per_iter'] / 1000 - tokens) < 1e-6


def test_a_table_and_json(tmp_path, char_data):
    out, result = bench('--device=auto', '--dataset=fineweb_edu', cwd=tmp_path)
    assert result['times'] == 3
    assert result['ms_per_iter'] > 0 and result['share_of_matmul_rate'] > 0
    assert result['peak_memory_bytes'] > 1e7
    assert rates_agree(result, 4 * 32)
    line = out.splitlines()[-2]
    assert line.startswith('time per iteration: ') and ' ms, MFU: ' in line
    assert 'best of 1024: ' in out
    assert 'data: random tokens, as fineweb_edu is not prepared\n' in out
    out, _ = bench(f'--dataset={char_data}', cwd=tmp_path)
    assert f'data: {char_data}' in out and not os.listdir(tmp_path)


def test_the_record_names_what_was_measured(tmp_path):
    options = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2,
                   optim='muon', activation_checkpointing=True)
    args = [f'--{name}={value}' for name, value in options.items()]
    _, result = bench('--real_data=False', *args, cwd=tmp_path)
    assert {name: result[name] for name in options} == options
    assert result['moments_dtype'] == 'float32' and result['compile'] is False


def test_a_batch_has_nothing_to_compile(tmp_path, char_data):
    out, _ = bench('--what=data', f'--dataset={char_data}', cwd=tmp_path)
    assert 'machine: cpu' in out and 'compile' not in out.rpartition('\n{')[0]


@pytest.mark.slow
def test_a_profile(tmp_path):
    out = run('bench.py', *SMALL, '--profile', '--repeats=3', '--real_data=False',
              cwd=tmp_path).stdout
    assert 'Self CPU' in out and 'aten::' in out
    with open(tmp_path / 'out-bench' / 'trace.json', encoding='utf-8') as f:
        assert len(json.load(f)['traceEvents']) > 100


@pytest.mark.parametrize('what, compare, tokens, extra', [
    pytest.param('train', 'hf', 4 * 32, {'share_of_matmul_rate', 'mfu', 'loss'},
                 marks=pytest.mark.slow),
    pytest.param('data', 'slices', 4 * 32, set(), marks=pytest.mark.slow),
    pytest.param('prefill', 'hf', 2 * 31, {'share_of_matmul_rate'}, marks=pytest.mark.slow),
    ('decode', 'hf', 2 * 5, {'share_of_read_rate'})])
def test_comparing_with_what_others_do(tmp_path, char_data, what, compare, tokens, extra):
    out, result = bench(f'--what={what}', f'--compare={compare}', f'--dataset={char_data}',
                        '--num_samples=2', '--max_new_tokens=5', cwd=tmp_path)
    assert extra <= set(result) and result['what'] == what
    assert rates_agree(result, tokens)
    row = next(line for line in out.splitlines() if line.startswith('times as fast'))
    assert f'{result["ratio"]:.2f}' in row


# a command that prints JSON last
RATE_OF_64 = 'import json; print("noise"); print(json.dumps(dict(tokens_per_s=64)))'


@pytest.mark.slow
def test_comparing_with_a_command(tmp_path):
    _, result = bench('--real_data=False', f"--compare={sys.executable} -c '{RATE_OF_64}'",
                      cwd=tmp_path)
    assert result['their_ms_per_iter'] == 2000
    # the ratio is the median of the pairs' ratios
    assert abs(result['ratio'] * result['ms_per_iter'] - 2000) < 0.3 * 2000
    broken = """'import sys; print("broken"); sys.exit(3)'"""
    for code, words in (('pass', 'not JSON with tokens_per_s'), (broken, 'status 3: broken')):
        err = run('bench.py', *SMALL, '--real_data=False',
                  f'--compare={sys.executable} -c {code}', cwd=tmp_path, ok=False).stderr
        assert words in err


def test_comparing_with_a_command_that_stays(tmp_path):
    code = ('import json, os, sys\nfor n, line in enumerate(sys.stdin):\n'
            '    print(json.dumps(dict(tokens_per_s=64 + n, pid=os.getpid())), flush=True)\n'
            '    if n == 4: sys.exit(5)')
    work = timing.run_process([sys.executable, '-c', code, '--turns=True'])
    lines = [json.loads(work()) for _ in range(3)]
    assert [line['tokens_per_s'] for line in lines] == [65, 66, 67]  # after one that warms up
    assert len({line['pid'] for line in lines}) == 1
    assert timing.measure(work, 'cpu', tokens=136) == 2.0
    with pytest.raises(SystemExit):
        work()


def test_the_shares_of_a_profile():
    events = [('aten::linear', 0, 40), ('aten::addmm', 5, 35), ('flash_fwd_kernel', 40, 50),
              ('triton_poi_fused_gelu', 45, 60), ('sm90_xmma_gemm_bf16', 70, 90),
              ('nvjet_hsh_128x256', 85, 95), ('triton_red_fused__log_softmax_flash_mm_0', 75, 85),
              ('cpp_fused_addmm_gelu_3', 50, 58), ('vectorized_elementwise', 98, 100)]
    shares = timing.compute_shares(events)
    assert shares == pytest.approx(dict(attention=0.1, matmul=0.65, other=0.12, gaps=0.13))
    assert timing.compute_shares([]) == {}


def test_short_work_is_repeated_within_a_timing(monkeypatch):
    calls, rows = [], []
    measure = timing.measure
    monkeypatch.setattr(timing, 'measure', lambda work, device, repeats=1: rows.append(repeats)
                        or measure(work, device, repeats))
    timing.measure_best(lambda: calls.append(1), 'cpu')
    assert rows == [1, 1, 200, 200, 200] and len(calls) == 602
    rows.clear()
    monkeypatch.setattr(timing, 'measure', lambda work, device, repeats=1: rows.append(repeats)
                        or 0.5)
    assert timing.measure_best(None, 'cpu') == 0.5 and rows == [1, 1, 1, 1, 1]


@pytest.mark.slow
def test_processes_from_start_to_end(tmp_path, char_data):
    config = tmp_path / 'short.py'
    config.write_text(f'dataset = {str(char_data)!r}\nmax_iters = 2\neval_iters = 1\n'
                      'gradient_accumulation_steps = 1\nlr_decay_iters = 2\n')
    _, result = bench('--what=start', f'--dataset={char_data}', cwd=tmp_path)
    assert result['ms_per_iter'] > 0 and 'tokens_per_s' not in result
    _, result = bench('--what=run', config, cwd=tmp_path)
    assert result['ms_per_iter'] > 0 and os.listdir(tmp_path) == ['short.py']


@pytest.mark.parametrize('args, words', [
    (['--what=nothing'], 'train, data, prefill, decode, run or start'),
    (['--what=data', '--compare=hf'], 'train, prefill, decode'),
    (['--what=train', '--weights=int8'], 'use it with prefill or decode'),
    (['--dataset=nothing'], "dataset 'nothing' was not found"),
    (['--compare=slices'], 'use it with data')])
def test_mistakes(tmp_path, args, words):
    assert words in run('bench.py', *SMALL, *args, cwd=tmp_path, ok=False).stderr
