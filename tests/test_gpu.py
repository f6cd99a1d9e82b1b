"""What only a device can show, from losses to a signal while it trains: `pytest -m gpu`.

The device is an option. With `-m gpu --device=cpu` the same tests run on a CPU, except for those
that say what a CPU doesn't have. Without the option and without a GPU they are skipped.
"""
import contextlib
import copy
import json
import math
import signal

import pytest
import torch
import torch.distributed as dist
from conftest import FAST, TINY, Process, list_files, metrics, run, run_here
from edits import continue_greedily
from test_inference import make_fast_model
from test_inference import make_model as make_sampling_model
from test_optimizers import KINDS, make_optimizer
from test_signals import has_iterations, wait_until

from model import GPT, GPTConfig
from runtime import checkpoint, distributed, inference, kernels, machine, restore
from runtime.optimizers import clip_and_step

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(request):
    return request.config.getoption('--device')


@pytest.fixture
def needs_cuda(device):
    if torch.device(device).type != 'cuda':
        pytest.skip('CPUs have no CUDA graphs, no cuDNN and no streams')


@pytest.fixture(autouse=True)
def exact_matmuls():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def args(device, char_data, tmp_path):
    """The arguments of a small run on the device, without its folder."""
    args = [arg for arg in TINY if not arg.startswith('--device')]
    return [*args, f'--device={device}', f'--dataset={char_data}', '--compile=False']


def make_model(**options):
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=200, n_layer=2, n_head=2, n_embd=64)
    return GPT(GPTConfig(**{**shape, **options}))


OPTIONS = [dict(bias=True), dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False,
                                 bigrams=60, embd_conv=2)]


def compute_gradients(model, device, dtype, compiles=False):
    """The loss of fixed tokens, and the gradients, on the CPU; in dtype on the device."""
    model.to(device)
    idx, targets = torch.randint(200, (2, 4, 64), generator=torch.Generator().manual_seed(1))
    called_model = kernels.compile_model(model) if compiles else model
    device_type = torch.device(device).type
    with torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32'):
        with kernels.loss_only(model):
            _, loss = called_model(idx.to(device), targets.to(device))
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}


# -----------------------------------------------------------------------------
# training
@pytest.mark.parametrize('options, dtype, compiles, tolerance', [
    (OPTIONS[0], 'float32', False, 1e-4), (OPTIONS[1], 'float32', False, 1e-4),
    (OPTIONS[0], 'float32', True, 1e-4), (OPTIONS[0], 'bfloat16', False, 3e-2),
    (OPTIONS[1], 'bfloat16', False, 3e-2), (OPTIONS[1], 'bfloat16', True, 3e-2)])
def test_losses_and_gradients_are_those_of_a_cpu(device, options, dtype, compiles, tolerance):
    expected_loss, expected = compute_gradients(make_model(**options), 'cpu', 'float32')
    model = make_model(**options)
    kernels.accelerate(model, torch.device(device).type, dtype)
    loss, gradients = compute_gradients(model, device, dtype, compiles)
    assert loss == pytest.approx(expected_loss, rel=min(tolerance, 3e-3))
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def continue_run(args, out_dir, *more, **options):
    """A run of 20 iterations, and one that is resumed after 10: the losses of each."""
    for name, lengths in (('whole', (20,)), ('parts', (10, 20))):
        for length in lengths:
            run('train.py', *args, *more, f'--out_dir={out_dir / name}', '--init_from=auto',
                f'--max_iters={length}', '--eval_interval=10', **options)
    return [[event['loss'] for event in metrics(out_dir / name, 'iter')]
            for name in ('whole', 'parts')]


@pytest.mark.parametrize('more', [
    ['--compile=False', '--dropout=0.2'], ['--compile=True', '--dropout=0.2'],
    ['--dtype=bfloat16', *FAST]])
def test_a_resumed_run_has_the_same_losses(args, tmp_path, more):
    whole, parts = continue_run(args, tmp_path, *more)
    # a GPU adds some gradients in an order that varies
    assert len(whole) == 20 and parts == pytest.approx(whole, rel=1e-3)
    assert whole[-1] < whole[0] - 0.1


def test_with_deterministic_kernels_a_resumed_run_is_the_same_to_the_bit(args, tmp_path):
    config = tmp_path / 'deterministic.py'
    config.write_text('import torch\ntorch.use_deterministic_algorithms(True)\n', encoding='utf-8')
    whole, parts = continue_run([str(config), *args], tmp_path, '--dropout=0.2',
                                CUBLAS_WORKSPACE_CONFIG=':4096:8')
    assert whole == parts
    states = [checkpoint.load(str(tmp_path / name / 'ckpt.pt')) for name in ('whole', 'parts')]
    assert all(map(torch.equal, *(state['model'].values() for state in states)))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_a_run_and_its_samples(args, tmp_path, device, dtype):
    args = [*args, f'--out_dir={tmp_path}', f'--dtype={dtype}']
    if dtype == 'bfloat16':
        args.append('--compile=auto')
    out = run('train.py', *args, '--max_iters=60', '--eval_interval=30')
    is_compiled = dtype == 'bfloat16' and torch.device(device).type == 'cuda'  # auto
    assert f'machine: {device}' in out.stdout and (', compiled' in out.stdout) == is_compiled
    evals = metrics(tmp_path, 'eval')
    assert evals[-1]['val/loss'] < evals[0]['val/loss'] - 0.5
    run('train.py', *args, '--max_iters=62', '--init_from=resume')
    out = run('sample.py', f'--out_dir={tmp_path}', f'--device={device}', '--num_samples=2',
              '--max_new_tokens=50')
    assert out.stdout.count('-' * 15) == 2


@pytest.mark.parametrize('options', KINDS)
def test_a_skipped_update_changes_nothing(device, options):
    model = make_model().to(device)
    optimizer = make_optimizer(model, **options)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=False)
    torch.manual_seed(1)
    for value in (1.0, float('nan'), float('inf')):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()['state']))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            p.grad.view(-1)[0] *= value
        norm = clip_and_step(optimizer, scaler, 1.0)
        after = model.state_dict(), optimizer.state_dict()['state']
        if value == 1.0:
            assert norm.isfinite() and not torch.equal(after[0]['lm_head.weight'],
                                                       before[0]['lm_head.weight'])
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_float16_recovers_from_an_overflow(device):
    model = make_model().to(device)
    device_type = torch.device(device).type
    kernels.accelerate(model, device_type, 'float16')
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device_type)
    scaler = torch.amp.GradScaler(device_type, init_scale=2.0 ** 40)
    idx = torch.randint(200, (4, 64), generator=torch.Generator().manual_seed(1)).to(device)
    start = copy.deepcopy(model.state_dict())
    losses, norms = [], []
    for _ in range(60):
        with torch.autocast(device_type, torch.float16), kernels.loss_only(model):
            _, loss = model(idx, idx)
        scaler.scale(loss).backward()
        norms.append(clip_and_step(optimizer, scaler, 1.0).item())
        if len(norms) == 1:  # 2**40 is too much for float16
            torch.testing.assert_close(model.state_dict(), start, rtol=0, atol=0)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    assert max(norm for norm in norms if math.isfinite(norm)) < 100  # it is not scaled
    assert 1000 < scaler.get_scale() < 2.0 ** 40
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize('options', KINDS)
def test_the_host_does_not_wait_for_the_device(device, needs_cuda, options):
    model = make_model().to(device)
    optimizer = make_optimizer(model, **options)
    scaler = torch.amp.GradScaler('cuda', enabled=False)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        torch.cuda.set_sync_debug_mode('error' if step else 'default')  # the first may prepare
        try:
            clip_and_step(optimizer, scaler, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_attention_drops_as_much_as_it_should(device, dtype):
    model = GPT(GPTConfig(256, 65, 1, 6, 384, dropout=0.2))
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        kernels.keep_dropout_rate(model, torch.device(device).type, str(dtype)[6:])
        rate = kernels.measure_dropout_rate(0.2, model.config, device, dtype)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)
    assert rate == pytest.approx(0.2, abs=0.003)


def test_out_of_memory_is_one_line(args, tmp_path, device):
    limit = 'import torch\ntorch.cuda.set_per_process_memory_fraction(0.002)\n'
    if torch.device(device).type == 'cpu':
        limit = ('import resource\nwith open("/proc/self/statm") as f:\n'
                 '    size = 4096 * int(f.read().split()[0])\n'
                 'resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 30, size + 2 ** 30))\n'
                 'del resource, f, size\n')
    config = tmp_path / 'limit.py'
    config.write_text(limit, encoding='utf-8')
    result = run('train.py', str(config), *args, f'--out_dir={tmp_path / "run"}',
                 '--batch_size=16384', '--eval_iters=1', ok=None)
    last_line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and 'Traceback' not in result.stderr, result.stderr
    assert last_line.startswith(f'error: out of memory on {device}')
    assert '--batch_size=8192 --gradient_accumulation_steps=4' in last_line


def test_a_signal_saves_and_ends_the_run(args, tmp_path):
    process = Process('train.py', *args, f'--out_dir={tmp_path}', '--max_iters=100000',
                      '--eval_interval=50000')
    wait_until(has_iterations(tmp_path, 5), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert 'stopped by SIGTERM' in out
    state = checkpoint.load(str(tmp_path / 'ckpt_last.pt'))
    assert state['iter_num'] >= 5
    run('train.py', *args, f'--out_dir={tmp_path}', '--init_from=resume',
        f'--max_iters={state["iter_num"] + 2}')


# -----------------------------------------------------------------------------
# several processes
@contextlib.contextmanager
def one_rank(device, tmp_path):
    """A process group of one process, which torchrun would not make."""
    backend = 'nccl' if torch.device(device).type == 'cuda' else 'gloo'
    dist.init_process_group(backend, init_method=f'file://{tmp_path / "store"}', rank=0,
                            world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_a_little(device, parallel, optim):
    """Four updates of a model that is spread over the ranks: the losses, and the weights."""
    device_type = torch.device(device).type
    model = make_model()
    kernels.accelerate(model, device_type, 'float32')
    raw_model = distributed.shard_model(model, device, parallel)
    model = distributed.wrap(raw_model, device, parallel)
    optimizer = make_optimizer(raw_model, optim=optim)
    optimizer = distributed.shard_optimizer(optimizer, parallel)
    scaler = torch.amp.GradScaler(device_type, enabled=False)
    idx = torch.randint(200, (2, 4, 64), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for _ in range(4):
        for micro_step in range(2):
            with distributed.sync_gradients(model, now=micro_step == 1):
                with kernels.loss_only(raw_model):
                    _, loss = model(idx[micro_step], idx[micro_step])
                (loss / 2).backward()
        clip_and_step(optimizer, scaler, 1.0)
        optimizer.zero_grad(set_to_none=True)
        losses.append(distributed.all_reduce_mean(loss.detach()).item())
    state = distributed.gather_optimizer(optimizer)
    return losses, distributed.gather(raw_model.state_dict()), state


@pytest.mark.parametrize('parallel, optim', [
    ('ddp', 'adamw'), ('ddp', 'muon'), ('zero1', 'adamw'), ('fsdp', 'adamw'), ('fsdp', 'muon')])
def test_one_rank_trains_as_one_process(device, tmp_path, parallel, optim):
    expected = train_a_little(device, 'ddp', optim)
    with one_rank(device, tmp_path):
        losses, weights, state = train_a_little(device, parallel, optim)
    assert losses == pytest.approx(expected[0], rel=1e-4) and losses[-1] < losses[0]
    torch.testing.assert_close(weights, expected[1], rtol=1e-3, atol=1e-4)
    assert state['state'].keys() == expected[2]['state'].keys()


def test_cuda_means_the_local_rank(device, needs_cuda, monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '0')
    for name in ('auto', 'cuda', 'cuda:5'):
        assert machine.choose_device(name, 0)[0] == 'cuda:0'
    with pytest.raises(SystemExit):
        machine.choose_device('cuda', torch.cuda.device_count())
    assert 'at most' in capsys.readouterr().err


# -----------------------------------------------------------------------------
# checkpoints
def test_a_checkpoint_of_the_device_continues_on_a_cpu_and_back(args, tmp_path, device):
    on_cpu = [*args, '--device=cpu', '--dtype=float32']
    for n, run_args in ((10, args), (20, on_cpu), (30, args)):
        run('train.py', *run_args, f'--out_dir={tmp_path / "mixed"}', f'--max_iters={n}',
            '--init_from=auto')
        state = torch.load(tmp_path / 'mixed' / 'ckpt.pt', weights_only=True)
        tensors = [*state['model'].values()]
        for entry in state['optimizer']['state'].values():
            tensors += entry.values()
        assert all(tensor.device.type == 'cpu' for tensor in tensors)
    run('train.py', *on_cpu, f'--out_dir={tmp_path / "cpu"}', '--max_iters=30')
    mixed, cpu = ([event['loss'] for event in metrics(tmp_path / name, 'iter')]
                  for name in ('mixed', 'cpu'))
    # train.py lets a GPU multiply float32 in TF32, which has 10 bits
    assert len(mixed) == 30 and mixed == pytest.approx(cpu, rel=1e-2)
    path = str(tmp_path / 'mixed' / 'ckpt.pt')
    model = restore.build_model(GPT, GPTConfig, checkpoint.load(path), path).eval()
    idx = torch.arange(32)[None] % model.config.vocab_size
    expected, _ = model(idx, idx)
    logits, _ = model.to(device)(idx.to(device), idx.to(device))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_an_unfused_state_continues_on_the_device(trained, device):
    path = f'{trained}/ckpt.pt'
    state = checkpoint.load(path)
    for group in state['optimizer']['param_groups']:
        group.update(fused=None, foreach=True)
    model = restore.build_model(GPT, GPTConfig, state, path).to(device)
    device_type = torch.device(device).type
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device_type)
    scaler = torch.amp.GradScaler(device_type, enabled=False)
    restore.load_optimizer(optimizer, scaler, state, path)
    assert all(group['fused'] and not group['foreach'] for group in optimizer.param_groups)
    x = torch.zeros(1, 8, dtype=torch.long, device=device)
    model(x, x)[1].backward()
    optimizer.step()


# -----------------------------------------------------------------------------
# sampling
@pytest.mark.parametrize('rows', [1, 10])
@pytest.mark.parametrize('static', [True, False])  # on a GPU a static cache becomes a CUDA graph
@pytest.mark.parametrize('make', [make_sampling_model, make_fast_model])
def test_generation_equals_the_uncached_path(device, make, static, rows):
    model = make().to(device)
    graphs = {}
    for T in (5, 1, 14, 16):
        prompt = torch.randint(50, (rows, T), generator=torch.Generator().manual_seed(T))
        prompt = prompt.to(device)
        # beyond the block a cache of rotary positions slides, which changes the logits
        count = 16 - T if make is make_fast_model else 30
        expected = continue_greedily(model, prompt, count)
        steps = inference.draw_tokens(model, prompt, 30, temperature=0, graphs=graphs,
                                      static=static)
        assert torch.equal(torch.cat((prompt, *steps), dim=1)[:, :T + count], expected)
    assert len(graphs) == (static and torch.device(device).type == 'cuda')


def test_a_graph_serves_the_next_prompt_but_no_changed_model(device, needs_cuda, monkeypatch):
    model, graphs = make_sampling_model(block_size=64).to(device), {}
    captures, capture = [], inference.Decoder.capture
    monkeypatch.setattr(inference.Decoder, 'capture',
                        lambda self, idx: captures.append(self) or capture(self, idx))
    before = set(vars(model))
    for T in (3, 9, 1):
        prompt = torch.randint(50, (2, T), device=device)
        expected = continue_greedily(model, prompt, 30)
        assert torch.equal(model.generate(prompt, 30, temperature=0, graphs=graphs), expected)
    steps = inference.stream(model, prompt, 30, temperature=0, graphs=graphs)
    assert torch.equal(torch.cat([next(steps) for _ in range(5)], dim=1), expected[:, 1:6])
    steps.close()  # as Ctrl-C does
    assert torch.equal(model.generate(prompt, 30, temperature=0, graphs=graphs), expected)
    assert len(captures) == 1 and set(vars(model)) == before
    copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.randn(50, 32))  # in place: the graph reads it
    expected = continue_greedily(model, prompt, 30)
    assert torch.equal(model.generate(prompt, 30, temperature=0, graphs=graphs), expected)
    assert len(captures) == 1
    model.lm_head.weight = torch.nn.Parameter(torch.randn(50, 32, device=device))
    expected = continue_greedily(model, prompt, 30)
    assert torch.equal(model.generate(prompt, 30, temperature=0, graphs=graphs), expected)
    assert len(captures) == 2


def test_a_graph_does_not_repeat_its_random_numbers(device):
    model = make_sampling_model(block_size=32).to(device)
    prompt = torch.zeros(64, 1, dtype=torch.long, device=device)
    drawn, graphs = [], {}
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        steps = inference.draw_tokens(model, prompt, 25, temperature=100.0, static=True,
                                      graphs=graphs)
        drawn.append(torch.cat(list(steps), dim=1))
    assert all(column.unique().numel() > 20 for column in drawn[0].t())
    assert not torch.equal(drawn[0][:, 7], drawn[0][:, 8])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])  # the first time it also makes the graph


def test_the_model_in_bfloat16_is_near_float32(device):
    model = make_model().eval().to(device)
    idx = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(1)).to(device)
    expected, _ = model(idx)
    logits, _ = model.bfloat16()(idx)
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()


# -----------------------------------------------------------------------------
# the scripts
@pytest.mark.parametrize('flags, count', [
    (['--num_samples=3'], 3), (['--num_samples=2', '--stream', '--top_p=0.9'], 2),
    (['--num_samples=2', '--format=jsonl', '--temperature=0'], 0),
    (['--num_samples=1', "--stop=['and']", '--top_k=5'], 1)])
def test_sampling(trained, device, flags, count):
    out = run_here('sample.py', f'--out_dir={trained}', f'--device={device}', *flags,
                   '--max_new_tokens=60').stdout
    assert out.count('-' * 15 + '\n') == count and len(out) > 60
    assert all(json.loads(line) for line in out.splitlines() if not count)


@pytest.mark.parametrize('what', ['train', 'data', 'prefill', 'decode', 'run', 'start'])
def test_bench(device, char_data, tmp_path, what):
    config = tmp_path / 'short.py'
    config.write_text('max_iters = 3\neval_iters = 1\n', encoding='utf-8')
    flags = [] if what == 'train' else ['--compile=False']  # auto
    out = run_here('bench.py', str(config), f'--what={what}', '--n_layer=2', '--n_embd=128',
                   '--n_head=2', '--batch_size=4', '--block_size=64', f'--dataset={char_data}',
                   '--repeats=3', f'--device={device}', *flags).stdout
    result = json.loads(out.splitlines()[-1])
    assert result['what'] == what and result['ms_per_iter'] > 0
    if torch.device(device).type == 'cuda' and what in ('train', 'prefill', 'decode'):
        assert 0 < result['peak_memory_bytes'] < 2 ** 33


def test_a_profile(device, tmp_path):
    out = run_here('bench.py', '--n_layer=2', '--n_embd=128', '--n_head=2', '--batch_size=4',
                   '--block_size=64', '--repeats=3', f'--device={device}', '--profile=True',
                   f'--out_dir={tmp_path}', '--compile=False', '--real_data=False').stdout
    shares = json.loads(out.splitlines()[-1])['profile']
    assert sum(shares.values()) == pytest.approx(1) and shares['matmul'] > 0.02
    assert list_files(tmp_path) == ['trace.json']


def test_conversion(args, tmp_path, device):
    run('train.py', *args, f'--out_dir={tmp_path / "run"}', '--max_iters=20')
    run('convert.py', f'--out_dir={tmp_path / "run"}', f'--hf_dir={tmp_path / "hf"}')
    texts = [run('sample.py', *source, f'--device={device}', '--temperature=0', '--num_samples=1',
                 '--max_new_tokens=30', '--dtype=float32').stdout
             for source in ([f'--out_dir={tmp_path / "run"}'], [f'--init_from={tmp_path / "hf"}'])]
    assert texts[0] == texts[1]
