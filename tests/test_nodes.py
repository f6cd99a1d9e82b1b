"""Two machines, as two network namespaces of this one: one run, also when a machine dies."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, equal_states, metrics, run_ranks

from runtime import checkpoint

# each node starts again until it has ended well, as a machine's service would
NODES = '''
set -e
mount -t tmpfs none /run
ip netns add a; ip netns add b
ip link add va netns a type veth peer name vb netns b
for n in a b; do ip -n $n link set lo up; ip -n $n link set v$n up; done
ip -n a addr add 10.77.0.1/24 dev va; ip -n b addr add 10.77.0.2/24 dev vb
node() {{  # its namespace and its rank
    export GLOO_SOCKET_IFNAME=v$1
    until nsenter --net=/run/netns/$1 {python} -m torch.distributed.run --nnodes=2 \\
        --nproc_per_node=1 --node_rank=$2 --master_addr=10.77.0.1 --master_port=1234 \\
        {train} >> log.$1 2>&1; do sleep 0.5; echo again >> log.$1; done
}}
node a 0 & first=$!
node b 1 & second=$!
if [ {dies} = 1 ]; then
    until [ -s run/ckpt_last.pt ]; do sleep 0.05; done
    kill -9 $second; ip netns pids b | xargs kill -9
    sleep 1
    node b 1 & second=$!
fi
wait $first; wait $second
for n in a b; do
    cat /run/netns/$n > /dev/null 2>&1 || true
    nsenter --net=/run/netns/$n cat /proc/net/dev > bytes.$n
done
'''
IN_NAMESPACES = ['unshare', '--map-root-user', '--mount', '--net']


def can_make_namespaces():
    if not all(map(shutil.which, ('unshare', 'nsenter', 'ip'))):
        return False
    command = [*IN_NAMESPACES, 'sh', '-c', 'mount -t tmpfs none /run && ip netns add x']
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(
    not can_make_namespaces(),
    reason='needs unshare, nsenter, ip and the right to make network namespaces')


def read_bytes_sent(path, interface):
    """The bytes that an interface has sent, from a copy of /proc/net/dev."""
    return int(re.search(rf'{interface}:((?:\s+\d+)+)', path.read_text())[1].split()[8])


def run_two_nodes(tmp_path, *args, dies=0):
    train = ' '.join([os.path.join(ROOT, 'train.py'), *args, '--out_dir=run'])
    shell = NODES.format(python=sys.executable, train=train, dies=dies)
    out = subprocess.run([*IN_NAMESPACES, 'bash', '-c', shell], cwd=tmp_path, capture_output=True,
                         text=True, timeout=200, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert out.returncode == 0, (out.stderr, (tmp_path / 'log.a').read_text())


@pytest.mark.slow
def test_a_node_dies_and_comes_back(char_data, tmp_path):
    args = [*TINY, f'--dataset={char_data}', '--dropout=0.1', '--save_interval=20',
            '--eval_interval=1000', '--max_iters=500', '--init_from=auto']
    run_two_nodes(tmp_path, *args, dies=1)
    log = (tmp_path / 'log.a').read_text()
    for part in ('from scratch', 'again', 'resumed from run/ckpt_last.pt',
                 '2 ranks over gloo'):
        assert part in log
    run_ranks(2, 'train.py', *args, '--out_dir=whole', cwd=tmp_path)
    assert equal_states(tmp_path / 'run' / 'ckpt.pt', tmp_path / 'whole' / 'ckpt.pt')


# What a rank sends in an iteration, in multiples of the gradients' bytes, with n = 2 ranks.
# ddp sends the sum of the gradients once: 2 (n - 1) / n. zero1 also sends its part of the weights.
# fsdp has two gathers, (n - 1) / n each, in each of 4 micro-steps, in bfloat16 half of that, and
# gloo's reduce-scatter, 2 (n - 1) / n
@pytest.mark.slow
@pytest.mark.parametrize('parallel, dtype, multiple', [
    ('ddp', 'float32', 1), ('zero1', 'float32', 1.5), ('fsdp', 'float32', 4 * (1 / 2 + 1 / 2 + 1)),
    ('fsdp', 'bfloat16', 4 * (1 / 4 + 1 / 4 + 1))])
def test_bytes_sent_in_an_iteration(char_data, tmp_path, parallel, dtype, multiple):
    # 3.2M parameters. The difference of two runs leaves out what else is sent: start and losses
    args = [*TINY, f'--dataset={char_data}', '--n_embd=256', '--n_layer=4', '--batch_size=1',
            '--gradient_accumulation_steps=8', '--eval_interval=1000', f'--parallel={parallel}',
            f'--dtype={dtype}']
    bytes_sent = []
    for iters in (4, 14):
        folder = tmp_path / str(iters)
        folder.mkdir()
        run_two_nodes(folder, *args, f'--max_iters={iters}')
        bytes_sent.append([read_bytes_sent(folder / f'bytes.{n}', f'v{n}') for n in 'ab'])
    weights = checkpoint.load(str(folder / 'run' / 'ckpt.pt'))['model']
    gradient_bytes = 4 * sum(w.numel() for name, w in weights.items() if name != 'lm_head.weight')
    each = [(many - few) / 10 / gradient_bytes for few, many in zip(*bytes_sent)]
    print(parallel, dtype, each)
    assert sum(each) / 2 == pytest.approx(multiple, rel=0.05)
    if parallel != 'zero1':  # its parts differ in size
        assert each[0] == pytest.approx(each[1], rel=0.01)
    assert len(metrics(folder / 'run', 'iter')) == 14
