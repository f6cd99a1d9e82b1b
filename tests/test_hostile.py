"""A stranger's files are data: whatever is in them, nothing of theirs runs, nothing is built that is larger than they are, and one line says what is wrong."""
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

import pytest
import torch
from conftest import ROOT, TINY, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import checkpoint
import convert
import tokenizer
from model import GPT, GPTConfig

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Hostile:
    """Unpickled as pickle does it, this makes a folder: the canary."""

    def __reduce__(self):
        return os.system, ('mkdir "$CANARY"',)


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """Nothing of a file's ran if this folder isn't there in the end."""
    path = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(path))
    yield path
    assert not path.exists()


@contextlib.contextmanager
def one_line():
    """What is done within fails in one line, or not at all."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            yield
    except SystemExit as end:
        assert end.code == 1 and err.getvalue().splitlines()[-1].startswith('error: ')
        assert len(err.getvalue()) < 2000 and err.getvalue().count('\n') == err.getvalue().count('error: ') + err.getvalue().count('warning: ')


def good_state(optim='adamw', **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 5, 1, 2, 16, **options))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', optim=optim)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    args = {k: v for k, v in vars(model.config).items() if k != 'gelu'}
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=args, iter_num=3, best_val_loss=1.5, config={'dataset': 'x'},
                meta={'vocab_size': 5, 'stoi': dict(zip('abcde', range(5))), 'itos': dict(enumerate('abcde'))})


def use(out_dir, optim='adamw'):
    """Does with the checkpoint in out_dir all that train.py and sample.py do with it, as far as it goes."""
    with one_line():
        state, path = checkpoint.load_newest(str(out_dir))
        model = checkpoint.build_model(state)
        checkpoint.load_optimizer(model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', optim=optim), state['optimizer'], path)
        tokenizer.get_tokenizer(state.get('meta')).decode([0])
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
        f'{state.get("best_val_loss", 0):.4f} {state["iter_num"]}'
        return True


def test_the_good_one_is_used(tmp_path):
    torch.save(good_state(), tmp_path / 'ckpt.pt')
    assert use(tmp_path)


OPTIONS = dict(rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=30, embd_conv=2)


@pytest.mark.parametrize('change, good', [
    ({}, True), ({'rope_base': 100}, True), ({'rope_base': 'x'}, False), ({'rope_base': -1.0}, False), ({'bigrams': 10 ** 9}, False), ({'bigrams': -30}, False),
    ({'embd_conv': 10 ** 9}, False), ({'tied': True}, False), ({'qk_norm': 'x' * 10 ** 6}, False), ({'relu2': None}, False)])
def test_options_of_a_checkpoint(tmp_path, change, good):
    state = good_state('muon', **OPTIONS)
    state['model_args'].update(change)
    torch.save(state, tmp_path / 'ckpt.pt')
    assert bool(use(tmp_path, 'muon')) == good


@pytest.mark.parametrize('buffers', [[], {2: {}}, {2: {'momentum_buffer': torch.zeros(3)}}, {2: {'exp_avg': torch.zeros(48, 16)}}])
def test_muons_state_of_another_shape(tmp_path, buffers):
    state = good_state('muon', **OPTIONS)
    state['optimizer']['state'] = {**state['optimizer']['state'], **buffers} if buffers else buffers
    state['optimizer']['param_groups'] = state['optimizer']['param_groups'] if buffers else []
    torch.save(state, tmp_path / 'ckpt.pt')
    assert not use(tmp_path, 'muon')


def lying_tensor(*size):
    return torch.zeros(1).expand(*size)  # strides of 0: as large as one likes, from 4 bytes


def shared():
    """A few lists, each twice in the next: what walks through them, or prints them, doubles its work with each."""
    value = ['x']
    for _ in range(40):
        value = [value, value]
    return value


def many_layers():
    """The same few tensors under the names of 3,000 layers."""
    model = good_state()['model']
    return {**model, **{name.replace('.h.0.', f'.h.{i}.'): v for name, v in model.items() for i in range(3000) if '.h.0.' in name}}


@pytest.mark.parametrize('change', [
    {'config': Hostile()}, {'model': Hostile()}, {'meta': Hostile()}, {'iter_num': Hostile()}, {'model': {}}, {'model': []}, {'model': {3: torch.ones(1)}},
    {'model_args': {}}, {'model_args': dict(n_layer=10 ** 9, n_head=1, n_embd=16, block_size=8, vocab_size=5)},
    {'model_args': dict(n_layer=1, n_head=1, n_embd=10 ** 9, block_size=8, vocab_size=5)},
    {'model_args': dict(n_layer=1, n_head=0, n_embd=16, block_size=8, vocab_size=5)},
    {'model_args': dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=5, remote_code='x')},
    {'model': {**good_state()['model'], 'transformer.wte.weight': lying_tensor(10 ** 12, 16)}},
    {'model': {**good_state()['model'], 'transformer.wte.weight': torch.zeros(5, 16).to_sparse()}},
    {'model': {**good_state()['model'], 'transformer.wte.weight': torch.empty(5, 16, device='meta')}},
    {'optimizer': {'state': {0: dict(step=torch.tensor(1.0), exp_avg=lying_tensor(10 ** 12), exp_avg_sq=torch.ones(1))}, 'param_groups': []}},
    {'optimizer': {**good_state()['optimizer'], 'param_groups': [{}] * 2}}, {'optimizer': {}},
    {'iter_num': -1}, {'iter_num': 2 ** 70}, {'iter_num': 'x'}, {'scaler': {}}, {'optimizer': None}, {'optimizer': shared()}, {'gelu': shared()},
    {'model_args': dict(n_layer=shared(), n_head=1, n_embd=16, block_size=8, vocab_size=5)}, {'model': many_layers()}, {'best_val_loss': 'x'},
    {'meta': {'vocab_size': 10 ** 9}}, {'meta': {'vocab_size': 5, 'stoi': {'a': 9}, 'itos': {9: 'a'}}},
    {'meta': {'vocab_size': 5, 'stoi': {'\ud800': 0}, 'itos': {0: '\ud800'}}}, {'gelu': 'x'}, {'config': 5}, {'wandb_id': 5},
], ids=lambda change: next(iter(change)))
def test_checkpoints(tmp_path, change):
    torch.save({**good_state(), **change}, tmp_path / 'ckpt.pt')
    assert not use(tmp_path)


def test_sample_and_train_say_it_in_one_line(tmp_path, char_data):
    torch.save({**good_state(), 'config': Hostile()}, tmp_path / 'ckpt.pt')
    for script, args in (('sample.py', []), ('train.py', [*TINY, f'--dataset={char_data}', '--init_from=resume'])):
        out = run(script, f'--out_dir={tmp_path}', *args, ok=None)
        assert out.returncode == 1 and 'Traceback' not in out.stderr and out.stderr.splitlines()[-1].startswith('error: no checkpoint that can be read')
    assert os.listdir(tmp_path) == ['ckpt.pt']


def rezipped(path, **records):
    """The archive again with other records in it, and the right CRCs: what is in it reaches the reader."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in contents.items():
            archive.writestr(name, records.get(name.rpartition('/')[2].removesuffix('.pkl'), content))


@pytest.mark.parametrize('payload', [
    pickle.dumps(bytearray(10), 2),
    pickle.dumps(Hostile()), b'cos\nsystem\n(S"mkdir $CANARY"\ntR.', b'\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.', b'\x80\x04' + b'(' * 10 ** 6 + b'.',
    b'\x80\x02r\xff\xff\xff\x7f.', b'\x80\x02]' + b']a' * 10 ** 5 + b'.', b'', b'\x80\x02ctorch.storage\nUntypedStorage\n)R.'])
def test_pickles_within_archives(tmp_path, payload):
    torch.save(good_state(), tmp_path / 'ckpt.pt')
    rezipped(tmp_path / 'ckpt.pt', data=payload)
    with pytest.raises(ValueError, match='no readable checkpoint'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


def test_an_archive_that_unfolds_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10 ** 8))
    with pytest.raises(ValueError, match='compressed'):
        checkpoint.load(str(tmp_path / 'ckpt.pt'))


@FUZZ
@given(st.data())
def test_fuzzed_checkpoints(tmp_path_factory, data):
    """Damage, at any place of the file, then of the pickle in it, and values of any kind instead of the right ones."""
    folder = tmp_path_factory.mktemp('fuzz')
    state, kind = good_state(), data.draw(st.sampled_from(['file', 'pickle', 'value']))
    if kind == 'value':
        replace(state, data)
    torch.save(state, folder / 'ckpt.pt')
    if kind == 'file':
        (folder / 'ckpt.pt').write_bytes(damaged((folder / 'ckpt.pt').read_bytes(), data))
    if kind == 'pickle':
        with zipfile.ZipFile(folder / 'ckpt.pt') as archive:
            content = archive.read('ckpt/data.pkl')
        rezipped(folder / 'ckpt.pt', data=damaged(content, data))
    use(folder)
    shutil.rmtree(folder)


def damaged(content, data):
    """The bytes with some of them changed, cut off, or put in."""
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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.builds(lambda n: torch.zeros(n), st.integers(0, 4))
    | st.builds(lying_tensor, st.sampled_from([1, 10 ** 12])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=3), max_leaves=5)


def replace(container, data):
    """Puts any value in some place of nested dicts and lists."""
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(container[key], (dict, list)) and container[key] and data.draw(st.booleans()):
            container = container[key]
        else:
            container[key] = data.draw(VALUES)
            return


# ---------------------------------------------------------------------------- meta.pkl

GOOD_META = {'vocab_size': 3, 'stoi': {'a': 0, 'b': 1, 'é': 2}, 'itos': {0: 'a', 1: 'b', 2: 'é'}}


def read_meta(folder, content):
    (folder / 'meta.pkl').write_bytes(content)
    with one_line():
        meta = tokenizer.read_meta(str(folder))
        if 'stoi' in meta:
            t = tokenizer.CharTokenizer(meta)
            t.decode(t.encode(''.join(meta['stoi'])))
        return meta


@pytest.mark.parametrize('protocol', range(6))
def test_tables_of_every_protocol_are_read(tmp_path, protocol):
    assert read_meta(tmp_path, pickle.dumps(GOOD_META, protocol)) == GOOD_META


def deep_tuple():
    return b'\x80\x02}' + b')' + b'\x85' * 10 ** 6 + b'K\x01s.'  # {((((...)))): 1}, whose hash overflows the stack


@pytest.mark.parametrize('content', [
    b'', pickle.dumps(Hostile()), b'cos\nsystem\n(S"mkdir $CANARY"\ntR.', deep_tuple(), b'\x80\x02}r\x00\x00\x00\x10.',
    b'\x80\x04\x8e' + struct.pack('<q', 2 ** 40) + b'.',
    b'\x8b\xff\xff\xff\x7f.', b'\x80\x02]' + b']a' * 10 ** 5 + b'.', pickle.dumps({'vocab_size': 10 ** 15}), pickle.dumps({'vocab_size': True}),
    pickle.dumps({'vocab_size': 3, 'stoi': {'a': 0}, 'itos': {0: 'b'}}), pickle.dumps({'vocab_size': 3, 'stoi': {'a': 7}, 'itos': {7: 'a'}}),
    pickle.dumps({'vocab_size': 3, 'stoi': {1: 0}, 'itos': {0: 1}}), pickle.dumps([[]] * 5)], ids=range(14))
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
    read_meta(folder, damaged(content, data) if data.draw(st.booleans()) else content)
    read_meta(folder, data.draw(st.binary(max_size=60)))
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------- Hugging Face folders

GOOD_CONFIG = dict(model_type='gpt2', n_positions=8, vocab_size=5, n_layer=1, n_head=2, n_embd=16, activation_function='gelu_new')


def good_folder(folder, **change):
    folder.mkdir(exist_ok=True)
    model = GPT(GPTConfig(8, 5, 1, 2, 16, bias=True))
    tensors = {k: v.t().contiguous() if k.endswith(convert.TRANSPOSED) else v.clone() for k, v in model.state_dict().items() if k != 'lm_head.weight'}
    save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps({**GOOD_CONFIG, **change}))
    return folder / 'model.safetensors'


def read_hf(folder):
    with one_line():
        model = GPT.from_pretrained(str(folder))
        model.generate(torch.zeros(1, 1, dtype=torch.long), 2)
        return True


@pytest.mark.parametrize('change', [
    dict(n_layer=10 ** 9), dict(n_embd=10 ** 12), dict(vocab_size=-5), dict(n_head=0), dict(n_head=3), dict(n_positions='8'),
    dict(n_layer=1.5), dict(n_layer=True), dict(n_layer=[1]), dict(activation_function=['gelu_new']), dict(activation_function='os.system'),
    dict(model_type='x' * 10 ** 5)])
def test_configurations(tmp_path, change):
    good_folder(tmp_path / 'hf', **change)
    assert not read_hf(tmp_path / 'hf')


def test_remote_code_is_not_asked_for(tmp_path):
    good_folder(tmp_path / 'hf', auto_map={'AutoModelForCausalLM': 'evil.Model'}, architectures=['Evil'], trust_remote_code=True)
    (tmp_path / 'hf' / 'evil.py').write_text('import os; os.mkdir(os.environ["CANARY"])')
    (tmp_path / 'hf' / 'pytorch_model.bin').write_bytes(pickle.dumps(Hostile()))
    # an index that leads out of the folder, to weights that would be read if anything followed it
    good_folder(tmp_path / 'outside')
    (tmp_path / 'hf' / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'wte.weight': '../outside/model.safetensors'}}))
    assert read_hf(tmp_path / 'hf')
    (tmp_path / 'hf' / 'model.safetensors').unlink()
    assert not read_hf(tmp_path / 'hf')


@pytest.mark.parametrize('text', ['', '[]', '5', '[' * 10 ** 5, '{' * 10 ** 6, '{"n_layer": 1e999}', '\x00'])
def test_texts_that_are_no_configuration(tmp_path, text):
    good_folder(tmp_path)
    (tmp_path / 'config.json').write_text(text)
    assert not read_hf(tmp_path)


def with_header(path, change):
    """A safetensors file whose header lies."""
    content = path.read_bytes()
    size, = struct.unpack('<Q', content[:8])
    header = json.loads(content[8:8 + size])
    change(header)
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + content[8 + size:])


@pytest.mark.parametrize('key, value', [('shape', [10 ** 12, 16]), ('shape', [5, 10 ** 9]), ('data_offsets', [0, 10 ** 12]), ('data_offsets', [64, 0]),
                                        ('dtype', 'I64'), ('dtype', 'X'), ('shape', []), ('shape', [-5, 16]), ('shape', [2 ** 62, 0])])
def test_headers_that_lie(tmp_path, key, value):
    path = good_folder(tmp_path)
    with_header(path, lambda header: header['transformer.wte.weight'].update({key: value}))
    assert not read_hf(tmp_path)


def test_a_header_longer_than_the_file(tmp_path):
    path = good_folder(tmp_path)
    path.write_bytes(struct.pack('<Q', 2 ** 62) + path.read_bytes()[8:])
    assert not read_hf(tmp_path)


@FUZZ
@given(st.data())
def test_fuzzed_folders(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('fuzz')
    path = good_folder(folder)
    if data.draw(st.booleans()):
        config = dict(GOOD_CONFIG)
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(VALUES.filter(lambda v: 'tensor' not in str(v)))
        (folder / 'config.json').write_text(json.dumps(config))
    else:
        content = path.read_bytes()
        cut = data.draw(st.sampled_from([8 + struct.unpack('<Q', content[:8])[0], len(content)]))  # mostly the header
        path.write_bytes(damaged(content[:cut], data) + content[cut:])
    read_hf(folder)
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits of memory as Linux has them')
def test_nothing_of_this_takes_memory(tmp_path):
    """The files that ask for much, in a process that has little: it ends in its one line."""
    torch.save({**good_state(), 'model': {**good_state()['model'], 'transformer.wte.weight': lying_tensor(10 ** 9, 16)}}, tmp_path / 'ckpt.pt')
    good_folder(tmp_path / 'hf', n_layer=10 ** 9)
    (tmp_path / 'meta.pkl').write_bytes(b'\x80\x02}r\x00\x00\x00\x10.')
    code = f'''
import resource, sys
sys.path.insert(0, {ROOT!r})
import checkpoint, convert, tokenizer
for function, path in ((checkpoint.load_newest, {str(tmp_path)!r}), (convert.read_hf, {str(tmp_path / 'hf')!r}), (tokenizer.read_meta, {str(tmp_path)!r})):
    try:
        function(path)
    except SystemExit:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stderr.count('error: ') == 3 and int(out.stdout) < 1_000_000, out  # KiB: torch itself takes a third of that
