"""The machine: which device and number format are chosen, and the memory that training needs."""
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, expect_error, run_here

from model import GPT, GPTConfig
from runtime import checkpoint, machine, memory, optimizers
from runtime.console import format_bytes


def test_dtype_by_device():
    assert machine.choose_dtype('auto', 'mps')[0] == 'float32'
    assert machine.choose_dtype('bfloat16', 'mps')[0] == 'bfloat16'
    assert machine.choose_dtype('float16', 'mps')[0] == 'float32'


@pytest.mark.parametrize('amx, avx512, vendor, training, sampling', [
    (True, True, 'GenuineIntel', 'bfloat16', 'bfloat16'),
    (False, True, 'AuthenticAMD', 'bfloat16', 'bfloat16'),
    (False, True, 'GenuineIntel', 'float32', 'bfloat16'),
    (False, False, 'x', 'float32', 'float32')])
def test_dtype_by_cpu(monkeypatch, amx, avx512, vendor, training, sampling):
    # the machine's answers are replaced, as one machine has only one of them; this tests the rule
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    monkeypatch.setattr(machine, 'read_cpu_vendor', lambda: vendor)
    assert machine.choose_dtype('auto', 'cpu')[0] == training
    assert machine.choose_dtype('auto', 'cpu', sampling=True)[0] == sampling


def test_training_replaces_denormal_numbers_by_zero():
    # the tensor is so large that two threads work on it, and each of them needs the setting
    prepare = 'machine.prepare_training("cpu", False, "ddp")'
    for call, is_zero in (('', False), (prepare, True)):
        program = ('import torch\nfrom runtime import machine\n'
                   f'{call}\nhalves = 0.5 * torch.full((2 ** 20,), 1e-39)\n'
                   'print((halves == 0).float().mean().item())')
        env = {**os.environ, 'OMP_NUM_THREADS': '2'}
        out = subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True, env=env)
        assert float(out) == is_zero


def test_devices(capsys):
    assert machine.choose_device('cpu', 3)[0] == 'cpu'
    assert 'True' in expect_error(capsys, machine.choose_device, True)
    if not torch.cuda.is_available():
        assert machine.choose_device('auto')[0] in ('cpu', 'mps', 'xpu:0')
        assert 'not available' in expect_error(capsys, machine.choose_device, 'cuda')


def test_memory_estimate_has_16_bytes_per_parameter():
    config = GPTConfig()

    def estimate(batch_size=1, dtype='bfloat16', **options):
        return memory.estimate_training_bytes(config, 1000, 8000, batch_size, dtype, **options)

    state, small = estimate()
    assert state == 16000
    assert estimate(2)[1] == 2 * small < estimate(2, 'float32')[1]
    assert estimate(2, stores_logits=False)[1] < 2 * small  # never all logits at once
    assert estimate(recomputes_layers=True)[1] < small
    # torch.compile keeps the logits and their gradient in 16 bits, and nothing of them in 32
    logits = config.block_size * config.vocab_size
    assert small - estimate(compile=True)[1] == 8 * logits
    assert small - estimate(compile=True, device_type='cpu')[1] < 8 * logits
    for batch_size in (32, 64):  # they fit into 80 GB
        assert sum(memory.estimate_training_bytes(config, 124e6, 992e6, batch_size, 'bfloat16',
                                                   compile=True)) < 40 * 2 ** 30
    parts = [[memory.estimate_training_bytes(config, 2 ** 30, 2 ** 33, 1, 'bfloat16',
                                              parallel=parallel, ranks=ranks)[0]
              for ranks in (1, 2, 4)]
             for parallel in ('ddp', 'zero1', 'fsdp')]
    table = 8 * config.vocab_size * config.n_embd  # fsdp gathers it and its gradient
    assert parts == [[16 * 2 ** 30] * 3, [2 ** 34, 12 * 2 ** 30, 10 * 2 ** 30],
                     [2 ** 34, 2 ** 33 + table, 2 ** 32 + table]]


KINDS = [('adamw', 'float32'), ('adamw', 'bfloat16'), ('muon', 'float32')]


@pytest.mark.parametrize('optim, moments_dtype', KINDS)
def test_state_bytes_are_those_after_a_step(optim, moments_dtype):
    config = GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16, tied=False,
                       bigrams=7, embd_conv=2)
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    optimizer = optimizers.specialize(optimizer, optim, moments_dtype, 0.95, model)
    count = optimizers.count_state_bytes(optimizer)
    ids = torch.arange(16).view(2, 8)
    model(ids, ids)[1].backward()
    optimizer.step()
    # without AdamW's count of its steps, which is one number per tensor
    moments = [value for entry in optimizer.state.values() for value in entry.values()
               if value.dim()]
    assert count == sum(value.nbytes for value in moments)


@pytest.mark.parametrize('optim, moments_dtype', KINDS)
def test_the_memory_plan_is_what_a_checkpoint_has(char_data, tmp_path, optim, moments_dtype):
    args = [*TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--n_embd=128',
            '--max_iters=1', f'--optim={optim}', f'--moments_dtype={moments_dtype}']
    plan = run_here('train.py', *args).stdout
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    weights = {w.data_ptr(): w.nbytes for w in state['model'].values()}  # tied ones only once
    moments = [value.nbytes for entry in state['optimizer']['state'].values()
               for value in entry.values() if value.dim()]
    total = format_bytes(2 * sum(weights.values()) + sum(moments))
    assert f'memory: {total} for weights, gradients and optimizer state' in plan


def maps_huge_pages():
    try:
        with open('/sys/kernel/mm/transparent_hugepage/enabled') as f:
            return '[always]' in f.read()
    except OSError:
        return False


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these settings')
@pytest.mark.skipif(maps_huge_pages(), reason='too few page faults to tell')
def test_freed_memory_is_kept():
    # in its own process, as the setting stays
    code = """if True:
        import resource, torch
        from runtime import memory
        def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def steps():
            before = faults()
            for _ in range(20):
                torch.ones(2 ** 24)  # 64 MiB
            return faults() - before
        first = steps()
        memory.keep_freed_memory()
        steps()  # the heap finds its size
        print(first, steps())"""
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                         check=True).stdout
    first, kept = map(int, out.split())
    assert kept < first / 10 and first > 19 * 2 ** 26 / os.sysconf('SC_PAGESIZE')


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these settings')
@pytest.mark.skipif(not os.path.exists('/sys/kernel/mm/transparent_hugepage')
                    or not memory.may_reserve(), reason='no huge pages, or a limit')
@pytest.mark.parametrize('limit', [None, 2 ** 36])
def test_the_heap_has_huge_pages(limit):
    code = f"""if True:
        import resource, torch
        from runtime import memory
        if {limit}:  # limits count what is only reserved
            resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
        memory.keep_freed_memory()
        address = torch.ones(2 ** 24).data_ptr() + 2 ** 25  # the middle of 64 MiB
        with open('/proc/self/smaps') as f:
            for line in f:
                if '-' in line.split()[0]:
                    start, end = (int(bound, 16) for bound in line.split()[0].split('-'))
                if line.startswith('VmFlags:') and start <= address < end:
                    print(end - start, 'hg' in line.split())"""
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                         check=True).stdout
    size, is_huge = out.split()
    assert (is_huge == 'True') == (int(size) > 0.99 * 2 ** 30) == (limit is None)


def test_free_memory_is_known_on_linux():
    free = memory.read_free_memory('cpu')
    assert free is None or 2 ** 20 < free < 2 ** 50


@pytest.mark.parametrize('limit, name', [('RLIMIT_AS', 'VmSize'), ('RLIMIT_DATA', 'VmData')])
def test_limits_of_the_process_count_as_free_memory_does(limit, name):
    code = f"""if True:
        import resource
        import torch
        from runtime import memory
        with open('/proc/self/status') as f:
            size = next(1024 * int(line.split()[1]) for line in f if line.startswith('{name}'))
        resource.setrlimit(resource.{limit}, (size + 2 ** 28, size + 2 ** 28))
        free_bytes = memory.read_free_memory('cpu')
        rooms = [memory.has_room(n, 'cpu') for n in (2 ** 27, 2 ** 28)]
        print(free_bytes, rooms == [True, False])"""
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                         check=True).stdout
    free_bytes, is_right = out.split()
    assert 0.9 * 2 ** 28 < int(free_bytes) <= 2 ** 28 and is_right == 'True'


@pytest.mark.parametrize('files, free', [
    ({'memory.max': '1000', 'memory.current': '900', 'memory.stat': 'anon 1\ninactive_file 300'},
     400),
    ({'memory.max': 'max', 'memory.current': '900', 'memory.stat': ''}, None),
    ({'memory.max': '1000', 'memory.current': '2000', 'memory.stat': ''}, 0)])
def test_limits_of_a_container(tmp_path, monkeypatch, files, free):
    # this machine's own groups have no limits, so files in another folder stand for them
    (tmp_path / 'job').mkdir()
    for name, text in files.items():
        (tmp_path / 'job' / name).write_text(text)
    (tmp_path / 'cgroup').write_text('0::/job\n')
    monkeypatch.setattr(memory, 'GROUPS', (str(tmp_path / 'cgroup'), str(tmp_path)))
    assert list(memory.list_group_bytes()) == ([] if free is None else [free])


@pytest.mark.parametrize('name, tera', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H100 NVL', 835), ('NVIDIA H200', 989), ('NVIDIA GH200 480GB', 989),
    ('Tesla V100-SXM2-16GB', 125), ('Tesla T4', 65), ('NVIDIA L4', 121), ('NVIDIA L40S', 362),
    ('NVIDIA A10', 125), ('NVIDIA A10G', 70), ('NVIDIA RTX A6000', 155),
    ('NVIDIA GeForce RTX 4090', 165), ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    ('NVIDIA RTX A1000', None), ('NVIDIA RTX A4000', None), ('NVIDIA T400', None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('', None)])
def test_the_peak_goes_by_whole_words_of_the_name(name, tera):
    assert machine.peak_flops(name) == (tera and tera * 1e12)


def test_the_peak_of_a_cpu_is_unknown():
    assert machine.find_peak_flops('cpu') is None
