"""A stranger's files are data: no code in them runs, nothing larger than the files is built, and
one line says what is wrong with them."""
import collections
import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch
from conftest import PRINT_PEAK, ROOT, TINY, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model import GPT, GPTConfig
from runtime import checkpoint, huggingface, meta, optimizers, restore, tokenizer

FUZZ = settings(max_examples=150, deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck))


class Hostile:
    """A pickle of this makes a folder when it is read: the canary."""

    def __reduce__(self):
        return os.system, ('mkdir "$CANARY"',)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """No code in a file has run if this folder isn't there at the end."""
    path = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(path))
    yield path
    assert not path.exists()


@contextlib.contextmanager
def one_line():
    """The code inside fails in one line, or not at all."""
    stream = io.StringIO()
    try:
        with contextlib.redirect_stderr(stream):
            yield
    except SystemExit as end:
        err = stream.getvalue()
        assert end.code == 1 and err.splitlines()[-1].startswith('error: ')
        assert len(err) < 2000
        assert err.count('\n') == err.count('error: ') + err.count('warning: ')


def make_optimizer(model, optim):
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    return optimizers.specialize(optimizer, optim, 'float32', 0.95, model)


def good_state(optim='adamw', **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 5, 1, 2, 16, **options))
    optimizer = make_optimizer(model, optim)
    x = torch.zeros(1, 4, dtype=torch.long)
    model(x, x)[1].backward()
    optimizer.step()
    args = {key: value for key, value in vars(model.config).items() if key != 'gelu'}
    meta = {'vocab_size': 5, 'stoi': dict(zip('abcde', range(5))), 'itos': dict(enumerate('abcde'))}
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args,
                iter_num=3, best_val_loss=1.5, config={'dataset': 'x'}, meta=meta)


def use(out_dir, optim='adamw'):
    """Does with the checkpoint in out_dir all that train.py and sample.py do with it."""
    with one_line():
        state, path = checkpoint.load_newest(str(out_dir))
        model = restore.build_model(GPT, GPTConfig, state, path)
        file_size = os.path.getsize(path)
        assert 4 * model.get_num_params(False) <= 4 * file_size + 2 ** 20
        scaler = torch.amp.GradScaler('cpu')
        restore.load_optimizer(make_optimizer(model, optim), scaler, state, path)
        tokenizer.get_tokenizer(state.get('meta')).decode([0])
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
        f'{state.get("best_val_loss", 0):.4f} {state["iter_num"]}'
        bool(state.get('finished'))
        return True


def test_the_good_one_is_used(tmp_path):
    torch.save(good_state(), tmp_path / 'ckpt.pt')
    assert use(tmp_path)


OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=30, embd_conv=2)


@pytest.mark.parametrize('change, good', [
    ({}, True), ({'rope_base': 100}, True), ({'rope_base': 'x'}, False),
    ({'rope_base': -1.0}, False), ({'bigrams': 10 ** 9}, False), ({'bigrams': -30}, False),
    ({'embd_conv': 10 ** 9}, False), ({'tied': True}, False), ({'qk_norm': 'x' * 10 ** 6}, False),
    ({'relu2': None}, False)])
def test_options_of_a_checkpoint(tmp_path, change, good):
    state = good_state('muon', **OPTIONS)
    state['model_args'].update(change)
    torch.save(state, tmp_path / 'ckpt.pt')
    assert bool(use(tmp_path, 'muon')) == good


@pytest.mark.parametrize('buffers', [
    [], {2: {}}, {2: {'momentum_buffer': torch.zeros(3)}}, {2: {'exp_avg': torch.zeros(48, 16)}}])
def test_muons_state_of_another_shape(tmp_path, buffers):
    state = good_state('muon', **OPTIONS)
    if buffers:
        state['optimizer']['state'] = {**state['optimizer']['state'], **buffers}
    else:
        state['optimizer'].update(state=[], param_groups=[])
    torch.save(state, tmp_path / 'ckpt.pt')
    assert not use(tmp_path, 'muon')


def lying_tensor(*size):
    return torch.zeros(1).expand(*size)  # with strides of 0, 4 bytes make a tensor of any size


def shared():
    """Some lists, each twice in the next one: to walk through them or to print them takes twice as
    long with each."""
    value = ['x']
    for _ in range(40):
        value = [value, value]
    return value


def repeat_layer(count):
    """The weights of a good state, with the tensors of its only layer under the names of more."""
    model = good_state()['model']
    copies = {name.replace('.h.0.', f'.h.{i}.'): tensor for name, tensor in model.items()
              for i in range(count) if '.h.0.' in name}
    return {**model, **copies}


def sizes(**change):
    """model_args of nanoGPT's sizes, with this change."""
    return {**dict(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=5), **change}


WEIGHTS = good_state()['model']
MOMENTS = dict(step=torch.tensor(1.0), exp_avg=lying_tensor(10 ** 12), exp_avg_sq=torch.ones(1))


@pytest.mark.parametrize('change', [
    {'config': Hostile()}, {'model': Hostile()}, {'meta': Hostile()}, {'iter_num': Hostile()},
    {'model': {}}, {'model': []}, {'model': {3: torch.ones(1)}}, {'model_args': {}},
    {'model_args': sizes(n_layer=10 ** 9)}, {'model_args': sizes(n_embd=10 ** 9)},
    {'model_args': sizes(n_head=0)}, {'model_args': sizes(n_layer=shared())},
    {'model': {**WEIGHTS, 'transformer.wte.weight': lying_tensor(10 ** 12, 16)}},
    {'model': {**WEIGHTS, 'transformer.wte.weight': torch.zeros(5, 16).to_sparse()}},
    {'model': {**WEIGHTS, 'transformer.wte.weight': torch.empty(5, 16, device='meta')}},
    {'model': repeat_layer(3000)}, {'optimizer': {'state': {0: MOMENTS}, 'param_groups': []}},
    {'iter_num': -1}, {'iter_num': 2 ** 70}, {'iter_num': 'x'}, {'iter_num': shared()},
    {'iter_num': lying_tensor(10 ** 12)}, {'gelu': shared()}, {'gelu': 'x'},
    {'model_args': shared()},
    {'config': range(5)}, {'config': frozenset('a')}, {'config': collections.deque([1])},
    {'config': slice(1)}, {'config': numpy.float64(1)}, {'config': torch.nn.Module},
    {'config': {'dtype': torch.add}}, {'config': torch.empty(1, device='meta')},
    {'config': collections.defaultdict(int)},
], ids=lambda change: next(iter(change)))
def test_checkpoints_that_load_refuses(tmp_path, change):
    torch.save({**good_state(), **change}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='ckpt.pt is not a readable checkpoint: '):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert not use(tmp_path)


@pytest.mark.parametrize('change', [
    {'model_args': sizes(n_head=2, remote_code='x')}, {'model_args': sizes(qk_norm=shared())},
    {'model_args': sizes(n_head=3)}, {'model': repeat_layer(2)},
    {'model': {**WEIGHTS, 'transformer.ln_f.weight': torch.ones(8)}},
    {'model': {**WEIGHTS, 'transformer.ln_g.weight': torch.ones(16)}},
    {'model': {name: w for name, w in WEIGHTS.items() if name != 'transformer.ln_f.weight'}},
    {'optimizer': {**good_state()['optimizer'], 'param_groups': [{}] * 2}},
    {'optimizer': shared()}, {'optimizer': [good_state()['optimizer']] * 2},
    {'optimizer': {'state': {}, 'param_groups': [dict(weight_decay=0.1, betas=[0.9])] * 2}},
], ids=lambda change: next(iter(change)))
def test_checkpoints_whose_parts_do_not_fit(tmp_path, change):
    torch.save({**good_state(), **change}, tmp_path / 'ckpt.pt')
    checkpoint.load(str(tmp_path / 'ckpt.pt'))  # it compares no shapes: this is left to the model
    assert not use(tmp_path)


SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'bigrams', 'embd_conv')
# the largest side of all weights is 64
FITTING_SIZES = (0, 1, 2, 3, 4, 5, 8, 16, 30, 48, 64)
NO_SIZES = (65, 10 ** 9, 2 ** 63, 10 ** 30, -1, True, 1.0, '1', None, [1])


@pytest.mark.parametrize('key', SIZES)
def test_no_size_of_a_checkpoint_makes_a_model_larger_than_the_file(tmp_path, key, capsys):
    path = str(tmp_path / 'ckpt.pt')
    state = good_state(**OPTIONS)
    good = state['model_args'][key]
    assert max(n for w in state['model'].values() for n in w.shape) == 64
    for value in NO_SIZES:
        if (key, value) == ('block_size', 65):
            continue  # rotary positions have no weights that limit it
        state['model_args'][key] = value
        torch.save(state, path)
        with pytest.raises(ValueError, match=f'{key}=.* does not fit its weights'):
            checkpoint.load(path)
    for value in FITTING_SIZES:
        state['model_args'][key] = value
        torch.save(state, path)
        with contextlib.suppress(ValueError, SystemExit):
            model = restore.build_model(GPT, GPTConfig, checkpoint.load(path), path)
            shapes = {name: w.shape for name, w in model.state_dict().items()}
            assert shapes == {name: w.shape for name, w in state['model'].items()}
            # another number of heads has the same weights, and rotary positions have none
            assert value == good or key in ('n_head', 'block_size')
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize('count', [2, 1000])
def test_a_tensor_under_many_names_does_not_make_a_large_model(tmp_path, count, capsys):
    state = good_state()
    state['model'] = repeat_layer(count)
    state['model_args']['n_layer'] = count
    path = str(tmp_path / 'ckpt.pt')
    torch.save(state, path)
    if count == 2:  # that is small enough, and each layer gets its own copy
        model = restore.build_model(GPT, GPTConfig, checkpoint.load(path), path)
        first, second = model.transformer.h
        assert first.ln_1.weight.data_ptr() != second.ln_1.weight.data_ptr()
        return
    with pytest.raises(ValueError, match='its tensors are larger than the file'):
        checkpoint.load(path)


def test_sample_and_train_report_it_in_one_line(tmp_path, char_data):
    torch.save({**good_state(), 'config': Hostile()}, tmp_path / 'ckpt.pt')
    resume = [*TINY, f'--dataset={char_data}', '--init_from=resume']
    for script, args in (('sample.py', []), ('train.py', resume)):
        out = run(script, f'--out_dir={tmp_path}', *args, ok=None)
        assert out.returncode == 1 and 'Traceback' not in out.stderr
        last = out.stderr.splitlines()[-1]
        assert last.startswith(f'error: {tmp_path} has no checkpoint that can be read')
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_scripts_report_a_shape_that_does_not_fit_in_one_line(tmp_path, char_data):
    state = good_state()
    state['model']['transformer.ln_f.weight'] = torch.ones(8)
    torch.save(state, tmp_path / 'ckpt.pt')
    resume = [*TINY, f'--dataset={char_data}', '--init_from=resume']
    export = [f'--hf_dir={tmp_path / "hf"}']
    for script, args in (('sample.py', []), ('train.py', resume), ('convert.py', export)):
        err = run(script, f'--out_dir={tmp_path}', *args, ok=False).stderr
        if script != 'train.py':  # there another vocabulary is noticed first
            assert err.startswith(f'error: {tmp_path / "ckpt.pt"} is not a readable checkpoint')
    assert os.listdir(tmp_path) == ['ckpt.pt']


def rezip(path, **records):
    """Writes the archive again with other records in it and their right checksums, so that a reader
    gets to the records."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in contents.items():
            key = name.rpartition('/')[2].removesuffix('.pkl')
            archive.writestr(name, records.get(key, content))


HOOKED = collections.OrderedDict(dataset='x')
HOOKED.get = 5  # an attribute in the place of a method


@pytest.mark.parametrize('change', [
    {'scaler': {}}, {'optimizer': None}, {'best_val_loss': 'x'}, {'best_val_loss': shared()},
    {'best_val_loss': lying_tensor(10 ** 12)}, {'config': 5}, {'config': [[('x', 'y'), 1]]},
    {'config': shared()}, {'scaler': shared()}, {'scaler': {'scale': shared()}}, {'wandb_id': 5},
    {'finished': torch.ones(2)}, {'optimizer_name': shared()}, {'meta': shared()},
    {'meta': {'vocab_size': 10 ** 9}}, {'meta': {'vocab_size': 5, 'stoi': shared()}},
    {'meta': {'vocab_size': 5, 'stoi': {'a': 9}, 'itos': {9: 'a'}}},
    {'meta': {'vocab_size': 5, 'stoi': {'\ud800': 0}, 'itos': {0: '\ud800'}}},
    {'config': HOOKED}, {'meta': HOOKED}, {'scaler': HOOKED},
], ids=lambda change: next(iter(change)))
def test_checkpoints_that_are_used_without_these_values(tmp_path, change):
    torch.save({**good_state(), **change}, tmp_path / 'ckpt.pt')
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert state['config'].keys() <= {'dataset'}
    if 'meta' in change:  # without it the vocabulary would be GPT-2's
        assert 'meta' not in state
    else:
        assert use(tmp_path)


@pytest.mark.parametrize('payload', [
    pickle.dumps(bytearray(10), 2), pickle.dumps(Hostile()), b'cos\nsystem\n(S"mkdir $CANARY"\ntR.',
    b'\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.', b'\x80\x04' + b'(' * 10 ** 6 + b'.',
    b'\x80\x02r\xff\xff\xff\x7f.', b'\x80\x02]' + b']a' * 10 ** 5 + b'.', b'',
    b'\x80\x02ctorch.storage\nUntypedStorage\n)R.'])
def test_pickles_within_archives(tmp_path, payload):
    torch.save(good_state(), tmp_path / 'ckpt.pt')
    rezip(tmp_path / 'ckpt.pt', data=payload)
    with pytest.raises(ValueError, match='is not a readable checkpoint'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('key', ['0', '1'])
@pytest.mark.parametrize('size', [0, 4, 8192])
def test_a_tensor_with_more_or_fewer_numbers_than_it_says_is_refused(tmp_path, key, size):
    path = tmp_path / 'ckpt.pt'
    torch.save(good_state(), path)
    rezip(path)  # without a change
    assert checkpoint.load(str(path))
    rezip(path, **{key: bytes(size)})  # torch would take what comes after it in the file
    with pytest.raises(ValueError, match=f'data/{key} in it has another size than its tensor'):
        checkpoint.load(str(path))


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10 ** 8))
    with pytest.raises(ValueError, match='compressed'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@FUZZ
@given(st.data())
def test_fuzzed_checkpoints(tmp_path_factory, data):
    """Damage at any place of the file, or of the pickle in it, or values of any kind in it."""
    folder = tmp_path_factory.mktemp('fuzz')
    path = folder / 'ckpt.pt'
    state, kind = good_state(), data.draw(st.sampled_from(['file', 'pickle', 'value']))
    if kind == 'value':
        replace(state, data)
    torch.save(state, path)
    if kind == 'file':
        path.write_bytes(damage(path.read_bytes(), data))
    if kind == 'pickle':
        with zipfile.ZipFile(path) as archive:
            content = archive.read('ckpt/data.pkl')
        rezip(path, data=damage(content, data))
    use(folder)
    shutil.rmtree(folder)


def damage(content, data):
    """The bytes with some of them changed, cut off, or inserted."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        how = data.draw(st.sampled_from(['change', 'cut', 'insert']))
        if how == 'change' and content:
            content[at] = data.draw(st.integers(0, 255))
        elif how == 'cut':
            del content[at:at + data.draw(st.integers(1, 50))]
        else:
            content[at:at] = data.draw(st.binary(max_size=8))
    return bytes(content)


LEAVES = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
          | st.builds(lambda n: torch.zeros(n), st.integers(0, 4))
          | st.builds(lying_tensor, st.sampled_from([1, 10 ** 12])))
KEYS = st.text(max_size=5) | st.integers(0, 3)
VALUES = st.recursive(LEAVES, lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)), max_leaves=5)


def replace(container, data):
    """Puts any value in some place of nested dicts and lists."""
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = data.draw(st.sampled_from(keys))
        value = container[key]
        if isinstance(value, (dict, list)) and value and data.draw(st.booleans()):
            container = value
        else:
            container[key] = data.draw(VALUES)
            return


# -----------------------------------------------------------------------------
# meta.pkl
GOOD_META = {'vocab_size': 3, 'stoi': {'a': 0, 'b': 1, 'é': 2}, 'itos': {0: 'a', 1: 'b', 2: 'é'}}


def read_meta(folder, content):
    (folder / 'meta.pkl').write_bytes(content)
    with one_line():
        table = meta.read_meta(str(folder))
        if 'stoi' in table:
            t = tokenizer.CharTokenizer(table)
            t.decode(t.encode(''.join(table['stoi'])))
        return table


@pytest.mark.parametrize('protocol', range(6))
def test_tables_of_every_protocol_are_read(tmp_path, protocol):
    assert read_meta(tmp_path, pickle.dumps(GOOD_META, protocol)) == GOOD_META


def deep_tuple():
    # {((((...)))): 1}, whose hash overflows the stack
    return b'\x80\x02}' + b')' + b'\x85' * 10 ** 6 + b'K\x01s.'


@pytest.mark.parametrize('content', [
    b'', pickle.dumps(Hostile()), b'cos\nsystem\n(S"mkdir $CANARY"\ntR.', deep_tuple(),
    b'\x80\x02}r\x00\x00\x00\x10.', b'\x80\x04\x8e' + struct.pack('<q', 2 ** 40) + b'.',
    b'\x8b\xff\xff\xff\x7f.', b'\x80\x02]' + b']a' * 10 ** 5 + b'.',
    pickle.dumps({'vocab_size': 10 ** 15}), pickle.dumps({'vocab_size': True}),
    pickle.dumps({'stoi': {'a': 7}, 'itos': {7: b'a'}}), pickle.dumps([[]] * 5)
], ids=range(12))
def test_hostile_tables(tmp_path, content):
    assert read_meta(tmp_path, content) is None


@FUZZ
@given(st.data())
def test_fuzzed_tables(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('fuzz')
    meta = pickle.loads(pickle.dumps(GOOD_META))
    if data.draw(st.booleans()):
        replace(meta, data)
    try:
        content = pickle.dumps(meta, data.draw(st.integers(0, 5)))
    except Exception:  # a tensor of 10**12
        content = b''
    if data.draw(st.booleans()):
        content = damage(content, data)
    read_meta(folder, content)
    read_meta(folder, data.draw(st.binary(max_size=60)))
    shutil.rmtree(folder)


# -----------------------------------------------------------------------------
# Hugging Face folders
GOOD_CONFIG = dict(model_type='gpt2', n_positions=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16,
                   activation_function='gelu_new')


def write_good_folder(folder, **change):
    folder.mkdir(exist_ok=True)
    model = GPT(GPTConfig(8, 5, 1, 2, 16, bias=True))
    weights, tensors = model.state_dict(), {}
    for name, (_, transposed) in huggingface.list_tensors(vars(model.config)).items():
        tensors[name] = weights[name].t().contiguous() if transposed else weights[name].clone()
    save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps({**GOOD_CONFIG, **change}))
    return folder / 'model.safetensors'


def use_folder(folder):
    with one_line():
        model = GPT.from_pretrained(str(folder))
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
        return True


@pytest.mark.parametrize('change', [
    dict(n_layer=10 ** 9), dict(n_embd=10 ** 12), dict(vocab_size=-5), dict(n_head=0),
    dict(n_head=3), dict(n_positions='8'), dict(n_layer=1.5), dict(n_layer=True), dict(n_layer=[1]),
    dict(activation_function=['gelu_new']), dict(activation_function='os.system'),
    dict(model_type='x' * 10 ** 5)])
def test_configurations(tmp_path, change):
    write_good_folder(tmp_path / 'hf', **change)
    assert not use_folder(tmp_path / 'hf')


@pytest.mark.parametrize('key', ['n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size'])
def test_no_size_in_config_json_makes_a_model_larger_than_the_file(tmp_path, key, capsys):
    write_good_folder(tmp_path)
    for value in (*NO_SIZES, *FITTING_SIZES):
        (tmp_path / 'config.json').write_text(json.dumps({**GOOD_CONFIG, key: value}))
        try:
            args, weights = huggingface.read_weights(str(tmp_path))
        except SystemExit:
            continue
        # another number of heads has the same weights
        assert value == GOOD_CONFIG[key] or key == 'n_head' and 16 % value == 0
        shapes = {name: w.shape for name, w in weights.items()}
        shapes.pop('lm_head.weight')
        expected = huggingface.list_tensors(args)
        assert shapes == {name: shape for name, (shape, _) in expected.items()}
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= len(NO_SIZES) and all(line.startswith('error: ') for line in said)


def test_remote_code_is_not_asked_for(tmp_path):
    write_good_folder(tmp_path / 'hf', auto_map={'AutoModelForCausalLM': 'evil.Model'},
                      architectures=['Evil'], trust_remote_code=True)
    (tmp_path / 'hf' / 'evil.py').write_text('import os; os.mkdir(os.environ["CANARY"])')
    (tmp_path / 'hf' / 'pytorch_model.bin').write_bytes(pickle.dumps(Hostile()))
    # an index that leads out of the folder, to weights that a reader of the index would find
    write_good_folder(tmp_path / 'outside')
    index = {'weight_map': {'wte.weight': '../outside/model.safetensors'}}
    (tmp_path / 'hf' / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert use_folder(tmp_path / 'hf')
    (tmp_path / 'hf' / 'model.safetensors').unlink()
    assert not use_folder(tmp_path / 'hf')


@pytest.mark.parametrize('text', ['', '[]', '5', '[' * 10 ** 5, '{' * 10 ** 6, '{"n_layer": 1e999}',
                                  '\x00'])
def test_texts_that_are_not_a_configuration(tmp_path, text):
    write_good_folder(tmp_path)
    (tmp_path / 'config.json').write_text(text)
    assert not use_folder(tmp_path)


def change_header(path, name, change):
    """Makes the header of a safetensors file lie about this tensor."""
    content = path.read_bytes()
    size, = struct.unpack('<Q', content[:8])
    header = json.loads(content[8:8 + size])
    header[name].update(change)
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + content[8 + size:])


@pytest.mark.parametrize('key, value', [
    ('shape', [10 ** 12, 16]), ('shape', [5, 10 ** 9]), ('data_offsets', [0, 10 ** 12]),
    ('data_offsets', [64, 0]), ('dtype', 'I64'), ('dtype', 'X'), ('shape', []), ('shape', [-5, 16]),
    ('shape', [2 ** 62, 0])])
def test_headers_that_lie(tmp_path, key, value):
    path = write_good_folder(tmp_path)
    change_header(path, 'transformer.wte.weight', {key: value})
    assert not use_folder(tmp_path)


def test_a_header_longer_than_the_file(tmp_path):
    path = write_good_folder(tmp_path)
    path.write_bytes(struct.pack('<Q', 2 ** 62) + path.read_bytes()[8:])
    assert not use_folder(tmp_path)


@FUZZ
@given(st.data())
def test_fuzzed_folders(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('fuzz')
    path = write_good_folder(folder)
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(GOOD_CONFIG)))
        value = data.draw(VALUES.filter(lambda v: 'tensor' not in str(v)))
        (folder / 'config.json').write_text(json.dumps({**GOOD_CONFIG, key: value}))
    else:
        content = path.read_bytes()
        header_end = 8 + struct.unpack('<Q', content[:8])[0]
        end = data.draw(st.sampled_from([header_end, len(content)]))  # most damage is in the header
        path.write_bytes(damage(content[:end], data) + content[end:])
    use_folder(folder)
    shutil.rmtree(folder)


CODE = '''
from model import GPT, GPTConfig
from runtime import checkpoint, huggingface, meta, restore
def build(folder):
    restore.build_model(GPT, GPTConfig, *checkpoint.load_newest(folder))
for function, folder in ((build, 'larger'), (build, 'shared'), (huggingface.read_weights, 'hf'),
                         (meta.read_meta, 'meta')):
    try:
        function(folder)
    except SystemExit:
        pass
''' + PRINT_PEAK


@pytest.mark.skipif(sys.platform != 'linux', reason='measures memory as Linux counts it')
def test_nothing_of_this_takes_memory(tmp_path):
    """Files that ask for much memory end in one line, before the process has it."""
    for name in ('larger', 'shared', 'meta'):
        (tmp_path / name).mkdir()
    larger = {**WEIGHTS, 'transformer.wte.weight': lying_tensor(10 ** 9, 16)}
    torch.save({**good_state(), 'model': larger}, tmp_path / 'larger' / 'ckpt.pt')
    # 1,000 layers of 2.8 MB each, in a file with one of them
    model = GPT(GPTConfig(8, 5, 1, 2, 240))
    weights = {name.replace('.h.0.', f'.h.{i}.'): w for name, w in model.state_dict().items()
               for i in range(1000)}
    state = dict(model=weights, model_args=sizes(n_layer=1000, n_embd=240), iter_num=0)
    torch.save(state, tmp_path / 'shared' / 'ckpt.pt')
    write_good_folder(tmp_path / 'hf', n_layer=10 ** 9)
    (tmp_path / 'meta' / 'meta.pkl').write_bytes(b'\x80\x02}r\x00\x00\x00\x10.')
    env = {**os.environ, 'PYTHONPATH': ROOT}
    out = subprocess.run([sys.executable, '-c', CODE], cwd=tmp_path, env=env, capture_output=True,
                         text=True)
    assert out.stderr.count('error: ') == 4, out
    assert int(out.stdout) < 1_000_000, out  # KiB: torch itself takes a third of that
