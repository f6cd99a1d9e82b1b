"""Checkpoints that nanoGPT's forks write: some values are missing or of other types, and they are
read as nanoGPT reads them."""
import collections
import math
import os

import pytest
import torch
from conftest import TINY, metrics, run

from model import GPT, GPTConfig
from runtime import checkpoint, checkpoint_format, restore

# what a GradScaler that was on has in its state
SCALER = dict(scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000,
              _growth_tracker=3)


@pytest.fixture(scope='module')
def fork():
    """The state of a small model, with the keys of nanoGPT's checkpoints."""
    model = GPT(GPTConfig(8, 20, 1, 2, 16))
    args = {key: getattr(model.config, key) for key in checkpoint.NANOGPT_ARGS}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args,
                iter_num=2000, best_val_loss=torch.tensor(1.5), config={'dataset': 'x'})


def load(state, folder, capsys):
    """What load() returns, and prints on stderr, for the state in a file that nanoGPT can load."""
    torch.save(state, folder / 'ckpt.pt')
    torch.load(folder / 'ckpt.pt', weights_only=True)
    return checkpoint.load(str(folder / 'ckpt.pt')), capsys.readouterr().err


PLAIN_VALUES = [
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.quint4x2, torch.bool,
    torch.complex64, torch.device('cuda', 1), torch.device('cpu'), torch.strided, {1, 'a'}, set(),
    {(1, 2)}, {None}, {torch.int8}, b'\x00\xff', bytearray(b'ab'), bytearray(), 3 + 4j,
    collections.Counter('aab'), collections.OrderedDict(a=1), torch.Size([2, 3]), 2 ** 100,
    float('inf'), None, (), ((1, (2, (3,))),), {(1, 'a'): [()]}, torch.ones(2, dtype=torch.uint16),
    torch.ones(1, dtype=torch.float8_e5m2), torch.tensor([1j]), torch.nn.Parameter(torch.ones(2)),
    torch.get_rng_state(), torch.tensor([1j]).conj()]


@pytest.mark.parametrize('value', PLAIN_VALUES, ids=range(len(PLAIN_VALUES)))
def test_plain_values_in_the_config_or_under_other_keys(fork, tmp_path, capsys, value):
    config = {'dataset': 'x', 'ptdtype': value, 'lists': [value, {'inner': value}]}
    state, err = load({**fork, 'config': config, 'rng': value}, tmp_path, capsys)
    assert str(state['config']) == str(config) and not err
    # a run that has it in its own configuration can be saved and read again
    checkpoint.save({**state, 'rng': value}, str(tmp_path))
    assert str(checkpoint.load_newest(str(tmp_path))[0]['config']) == str(config)


@pytest.mark.parametrize('change, expected', [
    ({'iter_num': torch.tensor(7)}, {'iter_num': 7}),
    ({'iter_num': torch.tensor([7])}, {'iter_num': 7}),
    ({'iter_num': torch.tensor(7.0)}, {'iter_num': 7}), ({'iter_num': 7.0}, {'iter_num': 7}),
    ({'iter_num': 2 ** 62 + 1}, {'iter_num': 2 ** 62 + 1}),
    ({'best_val_loss': 1.5}, {'best_val_loss': 1.5}),
    ({'best_val_loss': torch.tensor([1.5])}, {'best_val_loss': 1.5}),
    ({'best_val_loss': torch.nn.Parameter(torch.tensor(1.5))}, {'best_val_loss': 1.5}),
    ({'best_val_loss': 2}, {'best_val_loss': 2}),
    ({'config': collections.OrderedDict(dataset='x')}, {'config': {'dataset': 'x'}}),
    ({'config': {}}, {'config': {}}), ({'scaler': {}}, {'scaler': {}}),
    ({'scaler': {**SCALER, 'scale': 65536}}, {'scaler': SCALER}),
    ({'scaler': None}, {'scaler': None}), ({'optimizer': None}, {'optimizer': None}),
    ({'wandb_id': None}, {'wandb_id': None}), ({'wandb_id': 5}, {'wandb_id': None}),
    ({'finished': None}, {'finished': None}), ({'finished': 1}, {'finished': None}),
    ({'finished': torch.ones(2)}, {'finished': None}),
    ({'gelu': None}, {'gelu': None}), ({'meta': None}, {'meta': None}),
    ({'optimizer_name': ['adamw']}, {'optimizer_name': None})])
def test_values_of_other_types(fork, tmp_path, capsys, change, expected):
    state, err = load({**fork, **change}, tmp_path, capsys)
    assert {key: state.get(key) for key in expected} == expected and not err
    assert type(state['iter_num']) is int and type(state['best_val_loss']) in (int, float)
    assert type(state['config']) is dict and type(state['model']) is dict


NAN_LOSS = {'best_val_loss': math.nan}


@pytest.mark.parametrize('change, words', [
    ({'iter_num': None}, 'iter_num=0'), ({'best_val_loss': None}, 'best_val_loss=inf'),
    ({'config': None}, 'config={}'), ({'config': '{"dataset": "x"}'}, 'config={}'),
    ({'config': [('dataset', 'x')]}, 'config={}'), ({'best_val_loss': 'low'}, 'best_val_loss=inf'),
    ({'best_val_loss': {'val': 1.5}}, 'best_val_loss=inf'),
    ({'best_val_loss': torch.ones(2)}, 'best_val_loss=inf'),
    ({'best_val_loss': 10 ** 400}, 'best_val_loss=inf'), ({'best_val_loss': 3j}, 'loss=inf'),
    ({'iter_num': None, 'config': None}, 'iter_num=0, config={}'),
    ({'scaler': {'scale': 2.0}}, 'scaler=None'),
    ({'scaler': {**SCALER, 'scale': 'x'}}, 'scaler=None'), ({'meta': {'epoch': 3}}, 'meta=None'),
    ({'meta': 'text'}, 'meta=None'), ({'meta': {'vocab_size': 10 ** 9}}, 'meta=None'),
    ({'meta': {'vocab_size': 5, 'stoi': {'a': 9}, 'itos': {9: 'a'}}}, 'meta=None')])
def test_what_is_missing_or_unusable_is_said_in_one_line(fork, tmp_path, capsys, change, words):
    kept = {key: value for key, value in {**fork, **change}.items() if value is not None}
    for content in ({**fork, **change}, kept):  # None, and absent
        state, err = load(content, tmp_path, capsys)
        line = f'warning: {tmp_path / "ckpt.pt"} is incomplete: it is read with '
        assert err.startswith(line) and words in err and err.count('\n') == 1
        assert 'meta' not in state and 'scaler' not in state
        assert {'iter_num', 'best_val_loss', 'config'} <= set(state)


def test_a_table_in_a_checkpoint_is_made_plain(fork, tmp_path, capsys):
    stoi = {'a': 1, 'b': 2, 'c': 2}
    meta = {'vocab_size': 20, 'stoi': stoi, 'itos': ('?', 'a', 'b'), 'source': {'wiki'}}
    state, err = load({**fork, 'meta': meta}, tmp_path, capsys)
    assert state['meta'] == {'vocab_size': 20, 'stoi': stoi, 'itos': {0: '?', 1: 'a', 2: 'b'}}
    assert not err


@pytest.mark.parametrize('change', [
    {'iter_num': 1.5}, {'iter_num': math.nan}, {'iter_num': math.inf}, {'iter_num': '7'},
    {'iter_num': True}, {'iter_num': torch.ones(2)}, {'iter_num': torch.tensor(-1)},
    {'gelu': 'relu'}, {'gelu': True}, {'model': None}, {'model_args': None}, {'model': [1]}])
def test_what_would_make_another_run_is_refused(fork, tmp_path, change):
    torch.save({**fork, **change}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='ckpt.pt is not a readable checkpoint: '):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('kind', ['parameters', 'float16', 'OrderedDict'])
def test_weights_in_other_forms(fork, tmp_path, capsys, kind):
    model = GPT(GPTConfig(**fork['model_args']))
    weights = dict(model.state_dict())
    if kind == 'parameters':
        weights = dict(model.named_parameters())  # lm_head.weight is left out: it is tied
    elif kind == 'float16':
        weights = {name: w.half() for name, w in weights.items()}
    else:
        weights = collections.OrderedDict(weights)
        weights._metadata = {'': {'version': 1}}
    state, err = load({**fork, 'model': weights}, tmp_path, capsys)
    again = restore.build_model(GPT, GPTConfig, state, 'ckpt.pt')
    x = torch.randint(20, (2, 8))
    tolerance = 1e-2 if kind == 'float16' else 0
    torch.testing.assert_close(again(x)[0], model(x)[0], rtol=tolerance, atol=tolerance)
    assert all(p.is_leaf and p.requires_grad for p in again.parameters()) and not err
    assert again.lm_head.weight is again.transformer.wte.weight


def test_a_complex_buffer(fork, tmp_path, capsys):
    """As rotary positions are often written."""
    angles = torch.polar(torch.ones(8, 4), torch.rand(8, 4))
    state = {**fork, 'model': {**fork['model'], 'angles': angles}}
    checkpoint.save(state, str(tmp_path))
    state, err = load(state, tmp_path, capsys)
    assert torch.equal(state['model']['angles'], angles) and not err


def test_a_name_of_the_optimizer_in_small_letters(trained, char_data, tmp_path):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    for name, ok in (('adamw', True), ('lion', False)):
        torch.save({**state, 'optimizer_name': name, 'finished': None}, tmp_path / 'ckpt.pt')
        out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
                  '--init_from=resume', '--max_iters=61', ok=ok)
        assert ok or 'has the state of lion, but the optimizer is AdamW' in out.stderr


def test_moments_in_bfloat16_without_a_state(trained, char_data, tmp_path):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    torch.save({**state, 'optimizer': None, 'finished': None}, tmp_path / 'ckpt.pt')
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--beta2=0.999',
              '--init_from=resume', '--max_iters=61', '--moments_dtype=bfloat16', ok=False)
    assert 'stand still with beta2=0.999' in out.stderr


def test_a_checkpoint_in_the_old_format_of_torch(fork, tmp_path):
    torch.save(fork, tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match='format of torch before 1.6'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('args, marks', [
    ({}, set()), ({'qk_norm': False, 'relu2': False}, set()), ({'qk_norm': True}, {'qk_norm'}),
    ({'relu2': True}, {'relu2'}), ({'qk_norm': True, 'relu2': True}, {'qk_norm', 'relu2'})])
def test_options_without_weights_have_marks(fork, tmp_path, capsys, args, marks):
    weights = checkpoint_format.rename_weights(fork['model'], {**fork['model_args'], **args})
    assert weights.keys() - fork['model'].keys() == marks
    assert all(torch.equal(weights[name], torch.ones(())) for name in marks)
    model_args = {**fork['model_args'], **args}
    state, _ = load({**fork, 'model_args': model_args}, tmp_path, capsys)
    assert state['model'].keys() - fork['model'].keys() == marks
    # a mark that the file has is kept
    marked = {**fork['model'], **{name: torch.full((), 2.0) for name in marks}}
    weights = checkpoint_format.rename_weights(marked, model_args)
    assert all(weights[name] == 2 for name in marks)


# -----------------------------------------------------------------------------
# as a user runs the scripts
CONFIG = {'dtype': torch.bfloat16, 'device': torch.device('cuda'), 'betas': (0.9, 0.95),
          'tags': {'a', 'b'}, 'counts': collections.Counter('aab')}
WITHOUT_OPTIMIZER = 'ckpt.pt has no optimizer state'


@pytest.mark.parametrize('change, iter_num, lines', [
    ({'iter_num': None}, 0, ['is read with iter_num=0']),
    ({'iter_num': torch.tensor([60]), 'best_val_loss': None}, 60, ['with best_val_loss=inf']),
    ({'iter_num': 60.0, 'config': CONFIG, 'scaler': {}, 'wandb_id': None}, 60, []),
    ({'optimizer': None, 'scaler': None, 'finished': None}, 60, [WITHOUT_OPTIMIZER]),
    ({'optimizer': {}, 'gelu': None, 'epoch': 3, 'args': CONFIG}, 60, [WITHOUT_OPTIMIZER]),
    ({'optimizer': None, 'iter_num': None, 'best_val_loss': None, 'config': None}, 0,
     ['with iter_num=0, best_val_loss=inf, config={}', WITHOUT_OPTIMIZER])],
    ids=['no-iter_num', 'tensor', 'config', 'no-optimizer', 'empty-optimizer', 'weights-only'])
def test_a_fork_is_sampled_from_and_resumed(trained, char_data, tmp_path, change, iter_num, lines):
    state = {**torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True), **change}
    state.pop('finished')
    torch.save({key: value for key, value in state.items() if value is not None},
               tmp_path / 'ckpt.pt')
    out = run('sample.py', f'--out_dir={tmp_path}', '--device=cpu', '--num_samples=1',
              '--max_new_tokens=20', '--start=1 and')
    assert out.stdout.startswith('1 and')
    said = [line for line in out.stderr.splitlines() if line.startswith('warning: ')]
    expected = [line for line in lines if line != WITHOUT_OPTIMIZER]
    assert len(said) == len(expected) and all(a in b for a, b in zip(expected, said))
    out = run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}',
              '--init_from=resume', f'--max_iters={iter_num + 2}', '--eval_interval=100',
              '--always_save_checkpoint=True')
    said = [line for line in out.stderr.splitlines() if line.startswith('warning: ')]
    assert len(said) == len(lines) and all(a in b for a, b in zip(lines, said))
    assert f'iter {iter_num}: loss' in out.stdout and 'checkpoint, not from' not in out.stdout
    ours = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert ours['iter_num'] == iter_num + 2 and ours['best_val_loss'] < 5
    # with a new optimizer the moments have seen two updates, else also those before
    num_updates = 2 if WITHOUT_OPTIMIZER in lines else 62
    assert {int(moments['step']) for moments in ours['optimizer']['state'].values()} == {
        num_updates}
    assert [e['iter'] for e in metrics(tmp_path, 'iter')][0] == iter_num


def test_a_new_optimizer_updates_as_at_the_start_of_a_run(trained, char_data, tmp_path):
    state = torch.load(os.path.join(trained, 'ckpt.pt'), weights_only=True)
    weights = state['model']
    del state['optimizer'], state['finished']
    torch.save(state, tmp_path / 'ckpt.pt')
    run('train.py', *TINY, f'--dataset={char_data}', f'--out_dir={tmp_path}', '--init_from=resume',
        '--max_iters=61', '--decay_lr=False', '--weight_decay=0', '--grad_clip=0')
    # AdamW's first update is the learning rate, in the direction of the gradient's sign
    after = checkpoint.load(str(tmp_path / 'ckpt.pt'))['model']
    for name in ('transformer.h.0.mlp.c_fc.weight', 'transformer.ln_f.weight'):
        change = (after[name] - weights[name]).abs()
        assert change.max() <= 3.01e-3 and change.median() == pytest.approx(3e-3, rel=1e-2)
