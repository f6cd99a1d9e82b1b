"""Checks that no script's test reaches on its own."""
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

import checks


def refused(capsys, function, *args):
    with pytest.raises(SystemExit) as end:
        function(*args)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith('error: ') and said.count('\n') == 1
    return said


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(checks.time, 'sleep', lambda seconds: None)  # it leaves rank 0 the time to speak
    with pytest.raises(SystemExit):
        checks.fail('no')
    assert capsys.readouterr().err == ''
    with pytest.raises(SystemExit):  # unless the mistake may be this rank's alone
        checks.fail('no', 'do', who='rank')
    assert capsys.readouterr().err == 'error: rank 1: no; do\n'


@pytest.mark.parametrize('content, words', [(b'', '0 tokens'), (b'123', 'not a multiple of 2'), (b'12' * 8, '8 tokens'), (b'\xff\xff' * 100, 'token id 65535')])
def test_bins_that_cannot_be_trained_on(tmp_path, capsys, content, words):
    (tmp_path / 'train.bin').write_bytes(content)
    said = refused(capsys, checks.open_bin, str(tmp_path / 'train.bin'), 8, 1000)
    assert words in said and 'train.bin' in said


def test_a_bin_is_mapped_and_little_endian(tmp_path):
    (tmp_path / 'train.bin').write_bytes(bytes([1, 0, 0, 1] * 10))
    tokens = checks.open_bin(str(tmp_path / 'train.bin'), 8, 1000)
    assert isinstance(tokens, np.memmap) and tokens[:4].tolist() == [1, 256, 1, 256] and not tokens.flags.writeable


def test_dtype_by_device():
    assert checks.choose_dtype('auto', 'mps')[0] == 'float32'
    assert checks.choose_dtype('bfloat16', 'mps')[0] == 'bfloat16'
    assert checks.choose_dtype('float16', 'mps')[0] == 'float32'


@pytest.mark.parametrize('amx, avx512, vendor, training, sampling', [
    (True, True, 'GenuineIntel', 'bfloat16', 'bfloat16'), (False, True, 'AuthenticAMD', 'bfloat16', 'bfloat16'),
    (False, True, 'GenuineIntel', 'float32', 'bfloat16'), (False, False, 'x', 'float32', 'float32')])
def test_dtype_by_cpu(monkeypatch, amx, avx512, vendor, training, sampling):
    # the machine's answers are replaced, as one machine has only one of them; the rule is what is tested
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    monkeypatch.setattr(checks, '_cpu_vendor', lambda: vendor)
    assert checks.choose_dtype('auto', 'cpu')[0] == training
    assert checks.choose_dtype('auto', 'cpu', sampling=True)[0] == sampling


def test_devices(capsys):
    assert checks.choose_device('cpu', 3)[0] == 'cpu'
    assert 'True' in refused(capsys, checks.choose_device, True)
    if not torch.cuda.is_available():
        assert checks.choose_device('auto')[0] in ('cpu', 'mps', 'xpu:0')
        assert 'not available' in refused(capsys, checks.choose_device, 'cuda')


@pytest.mark.gpu
def test_cuda_means_the_local_rank(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '0')
    for device in ('auto', 'cuda', 'cuda:5'):
        assert checks.choose_device(device, 0)[0] == 'cuda:0'
    assert 'at most' in refused(capsys, checks.choose_device, 'cuda', torch.cuda.device_count())


def test_accumulation_names_the_nearest(capsys):
    checks.check_accumulation(40, 8)
    assert 'use --gradient_accumulation_steps=8 or 12' in refused(capsys, checks.check_accumulation, 10, 4)
    assert refused(capsys, checks.check_accumulation, 1, 4).endswith('=4\n')


def test_datasets_are_found_by_path_and_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ('data/mine', 'here'):
        os.makedirs(folder)
        for split in ('train', 'val'):
            open(os.path.join(folder, f'{split}.bin'), 'wb').close()
    for name in ('mine', 'here', str(tmp_path / 'here'), './here'):
        assert os.path.samefile(checks.find_data(name), tmp_path / ('data/mine' if name == 'mine' else 'here'))
    assert 'data/text/prepare.py' in refused(capsys, checks.find_data, 'nothing')


def test_memory_estimate_holds_16_bytes_a_parameter():
    from model import GPTConfig
    config = GPTConfig()
    held, small = checks.training_bytes(1000, config, 1, 'bfloat16')
    assert held == 16000 and checks.training_bytes(1000, config, 2, 'bfloat16')[1] == 2 * small < checks.training_bytes(1000, config, 2, 'float32')[1]
    assert checks.training_bytes(1000, config, 2, 'bfloat16', compiled=False)[1] < 2 * small  # never all logits at once
    assert checks.training_bytes(1000, config, 1, 'bfloat16', recompute=True)[1] < small
    parts = [[checks.training_bytes(2 ** 30, config, 1, 'bfloat16', parallel=parallel, ranks=ranks)[0] for ranks in (1, 2, 4)]
             for parallel in ('ddp', 'zero1', 'fsdp')]
    table = 8 * config.vocab_size * config.n_embd  # fsdp gathers it and its gradient
    assert parts == [[16 * 2 ** 30] * 3, [2 ** 34, 12 * 2 ** 30, 10 * 2 ** 30], [2 ** 34, 2 ** 33 + table, 2 ** 32 + table]]


def maps_huge_pages():
    try:
        with open('/sys/kernel/mm/transparent_hugepage/enabled') as f:
            return '[always]' in f.read()
    except OSError:
        return False


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc alone has these settings')
@pytest.mark.skipif(maps_huge_pages(), reason='too few page faults to tell')
def test_freed_memory_is_kept():
    # in a process of its own, as the setting stays
    code = """if True:
        import resource, torch, checks
        def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def steps():
            before = faults()
            for _ in range(20):
                torch.ones(2 ** 24)  # 64 MiB
            return faults() - before
        first = steps()
        checks.keep_freed_memory()
        steps()  # the heap finds its size
        print(first, steps())"""
    first, kept = map(int, subprocess.run([sys.executable, '-c', code], cwd=checks.REPO, capture_output=True, text=True, check=True).stdout.split())
    assert kept < first / 10 and first > 19 * 2 ** 26 / os.sysconf('SC_PAGESIZE')


def test_free_memory_is_known_on_linux():
    free = checks.free_memory('cpu')
    assert free is None or 2 ** 20 < free < 2 ** 50


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux, where a process can ask for its pages')
def test_what_was_read_of_a_bin_does_not_stay_in_the_process(tmp_path):
    def mapped():
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('RssFile'))
    path = tmp_path / 'train.bin'
    np.arange(2 ** 25, dtype='<u2').tofile(path)  # 64 MiB
    tokens = checks.open_bin(str(path), 8, 2 ** 16)
    before = mapped()
    total = int(tokens.sum())
    assert mapped() > before + 2 ** 25
    checks.forget_pages(tokens)
    assert mapped() < before + 2 ** 24 and int(tokens.sum()) == total
