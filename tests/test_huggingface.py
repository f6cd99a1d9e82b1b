"""GPT-2 as transformers has it, against ours: same logits, same text, and no memory wasted."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FAST, ROOT, TINY, expect_error, run
from safetensors.torch import load_file, save_file
from test_originals import load_edited

import model as model_py
from model import GPT
from runtime import checkpoint, huggingface
from runtime.export import write_folder


def save_gpt2(folder, dtype=torch.float32, shard='1GB', **options):
    """Saves a small random GPT-2 as transformers does; returns its model."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    hf = GPT2LMHeadModel(GPT2Config(**{**sizes, **options})).eval()
    for p in hf.parameters():  # biases too; the predictions are then far from uniform
        p.data.normal_(std=0.2)
    hf.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return hf.float()


def make_ours(module=model_py, vocab_size=50304, **options):
    """A small random model of model.py, or of an edited copy of it."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=48)
    model = module.GPT(module.GPTConfig(**{**sizes, **options})).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    return model


def save_ours(out_dir, meta=None, **options):
    """Saves a checkpoint of a small random model; returns the model."""
    model = make_ours(**options)
    out_dir.mkdir()
    state = dict(checkpoint.describe(model.config, meta), model=model.state_dict(), iter_num=7,
                 best_val_loss=1.0, config={})
    checkpoint.save(state, str(out_dir))
    return model


def export(tmp_path):
    """Exports the checkpoint in tmp_path/out to tmp_path/hf; returns what is printed."""
    return run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}').stdout


def generate_greedily(hf, idx, max_new_tokens):
    """The tokens that transformers generates."""
    return hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=max_new_tokens,
                       do_sample=False, pad_token_id=0, eos_token_id=None)


def equal_to(hf, model, vocab_size):
    """Whether a model of transformers has our logits and our greedy text."""
    x = torch.randint(vocab_size, (2, model.config.block_size))
    with torch.no_grad():
        logits = model(x, x)[0][..., :vocab_size]
        torch.testing.assert_close(hf(x).logits, logits, rtol=1e-5, atol=2e-5)
    n = model.config.block_size - 5  # transformers can't continue beyond the context
    ours = model.generate(x[:, :5], n, temperature=0, vocab_size=vocab_size)
    return torch.equal(ours, generate_greedily(hf, x[:, :5], n))


# -----------------------------------------------------------------------------
# reading
@pytest.mark.parametrize('options', [
    {}, {'dtype': torch.bfloat16}, {'shard': '50KB'}, {'activation_function': 'gelu'}])
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, options):
    hf = save_gpt2(tmp_path, **options)
    files = [name for name in os.listdir(tmp_path) if name.endswith('.safetensors')]
    assert len(files) > 1 or 'shard' not in options
    model = GPT.from_pretrained(str(tmp_path)).eval()
    x = torch.randint(100, (2, 32))
    with torch.no_grad():  # the wrong GELU would be off by 1e-4
        torch.testing.assert_close(model(x, x)[0], hf(x).logits, rtol=1e-5, atol=2e-5)
    ours = model.generate(x[:, :5], 20, temperature=0)
    assert torch.equal(ours, generate_greedily(hf, x[:, :5], 20))
    for p in model.parameters():
        assert p.dtype == torch.float32 and p.requires_grad and p.is_contiguous()


def test_the_wrong_gelu_would_be_noticed(tmp_path):
    # nanoGPT does this: the exact GELU with weights that were trained with the tanh one
    hf = save_gpt2(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    for block in model.transformer.h:
        block.mlp.gelu.approximate = 'none'
    x = torch.randint(100, (2, 32))
    assert (model(x, x)[0] - hf(x).logits).abs().max() > 1e-4


def test_only_dropout_can_be_overridden(tmp_path):
    save_gpt2(tmp_path)
    assert GPT.from_pretrained(str(tmp_path), dict(dropout=0.3)).transformer.drop.p == 0.3
    with pytest.raises((AssertionError, ValueError), match='only dropout can be overridden'):
        GPT.from_pretrained(str(tmp_path), dict(n_layer=2))


@pytest.mark.parametrize('change', [
    {'model_type': 'llama'}, {'activation_function': 'relu'}, {'n_inner': 7},
    {'scale_attn_by_inverse_layer_idx': True}, {'tie_word_embeddings': False}, {'n_embd': None}])
def test_what_is_not_a_gpt2_is_refused(tmp_path, change, capsys):
    save_gpt2(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config.update(change)
    if config['n_embd'] is None:
        del config['n_embd']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        GPT.from_pretrained(str(tmp_path))
    assert next(iter(change)) in capsys.readouterr().err


def test_weights_have_the_default_dtype(tmp_path):
    save_gpt2(tmp_path)
    kinds = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            kinds.append({w.dtype for w in huggingface.read_weights(str(tmp_path))[1].values()})
        finally:
            torch.set_default_dtype(torch.float32)
    assert kinds == [{torch.bfloat16}, {torch.float32}]


def test_damaged_weights_are_refused(tmp_path, capsys):
    save_gpt2(tmp_path)
    path = tmp_path / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        GPT.from_pretrained(str(tmp_path))
    assert 'does not have the weights of the GPT-2' in capsys.readouterr().err
    path.unlink()
    with pytest.raises(SystemExit):
        GPT.from_pretrained(str(tmp_path))
    assert 'has no model.safetensors' in capsys.readouterr().err


def test_without_the_hub_one_line_says_so(tmp_path):
    out = run('sample.py', '--init_from=gpt2', ok=False, HF_HUB_CACHE=str(tmp_path),
              HF_HUB_OFFLINE='1')
    assert 'could not be fetched' in out.stderr and '--init_from=FOLDER' in out.stderr


MEMORY = '''
import sys, threading, torch, safetensors, runtime.huggingface
from model import GPT
def status(key):
    for line in open('/proc/self/status'):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
GPT.from_pretrained(sys.argv[1] + '/small')  # what only the first call loads is not the weights
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # resets the peak
model = GPT.from_pretrained(sys.argv[1] + '/large')
print((status('VmHWM') - before) / (4 * model.get_num_params(False)))
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'),
                    reason='needs /proc/self/clear_refs to measure peak memory')
def test_reading_takes_the_memory_of_the_weights_once(tmp_path):
    save_gpt2(tmp_path / 'small')
    # 326 MB, half of it the embedding
    save_gpt2(tmp_path / 'large', n_embd=768, n_layer=6, n_head=12, vocab_size=50257)
    out = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.3, out.stdout


def test_biases_that_others_trained_are_used(tmp_path, bpe):
    from transformers import AutoModelForCausalLM
    save_ours(tmp_path / 'out', bias=False)
    export(tmp_path)
    assert not GPT.from_pretrained(str(tmp_path / 'hf')).config.bias
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    hf.transformer.h[1].mlp.c_fc.bias.data.normal_()
    hf.save_pretrained(tmp_path / 'tuned')
    config = json.loads((tmp_path / 'tuned' / 'config.json').read_text())
    assert config['bias'] is False  # as we wrote it
    model = GPT.from_pretrained(str(tmp_path / 'tuned')).eval()
    assert model.config.bias and equal_to(hf, model, 50257)


# -----------------------------------------------------------------------------
# tokenizers
def test_gpt2s_tokenizer_is_exported(tmp_path, bpe):
    import tiktoken
    from transformers import AutoTokenizer
    save_ours(tmp_path / 'out')
    export(tmp_path)
    hf, ours = AutoTokenizer.from_pretrained(tmp_path / 'hf'), tiktoken.get_encoding('gpt2')
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        readme = f.read()
    for text in (readme, ' a\n\n\tb  \r\n', "it's NAÏVE 東京 🙂 \u0301",
                 'zażółć <|endoftext|> gęślą'):
        ids = hf.encode(text)
        assert ids == ours.encode(text, allowed_special='all') and hf.decode(ids) == text
    assert hf.eos_token == '<|endoftext|>' and hf.eos_token_id == 50256 and len(hf) == 50257


def test_characters_are_exported(tmp_path):
    from transformers import AutoTokenizer, pipeline
    chars = sorted('\n abcAB!.,é東')
    stoi = {c: i for i, c in enumerate(chars)}
    meta = dict(vocab_size=len(chars), stoi=stoi, itos=dict(enumerate(chars)))
    model = save_ours(tmp_path / 'out', meta=meta, vocab_size=16)  # padded
    export(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in ('a b\n\nAB!!', ' é 東 ,.', 'a , b . c !'):
        assert hf.encode(text) == [stoi[c] for c in text] and hf.decode(hf.encode(text)) == text
    generator = pipeline('text-generation', str(tmp_path / 'hf'))
    written = generator('ab ', max_new_tokens=25, do_sample=False)[0]['generated_text']
    prompt = torch.tensor([[stoi[c] for c in 'ab ']])
    ours = model.generate(prompt, 25, temperature=0, vocab_size=len(chars))[0]
    assert written == ''.join(chars[i] for i in ours.tolist())
    assert huggingface.read_tokenizer(str(tmp_path / 'hf')) == meta
    for source in (f'--out_dir={tmp_path / "out"}', f'--init_from={tmp_path / "hf"}'):
        out = run('sample.py', source, '--start=ab ', '--temperature=0', '--num_samples=1',
                  '--max_new_tokens=25', '--dtype=float32')
        assert out.stdout == written + '\n---------------\n'


def test_the_command_that_convert_prints_generates_text(tmp_path):
    meta = dict(vocab_size=2, stoi={'A': 0, 'b': 1}, itos={0: 'A', 1: 'b'})
    save_ours(tmp_path / 'out', meta=meta, vocab_size=2)  # a pipeline asks for 256 tokens
    command = export(tmp_path).partition('try it: ')[2].replace('python', sys.executable, 1)
    out = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert re.search(r"'generated_text': 'A[Ab]+'", out), out  # without the one that pads


@pytest.mark.parametrize('ids', [(1, 2, 3), (0, 4, 9)])
def test_ids_that_are_not_numbered_from_0(tmp_path, ids):
    from transformers import AutoTokenizer
    stoi = dict(zip('Abc', ids))
    meta = dict(vocab_size=max(ids) + 1, stoi=stoi, itos=dict(zip(ids, 'Abc')))
    model, folder = make_ours(vocab_size=16), str(tmp_path / 'hf')
    write_folder(model, folder, meta)
    hf = load(folder)
    assert hf.config.vocab_size == max(ids) + 1 and equal_to(hf, model, max(ids) + 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode('cAb') == [stoi[c] for c in 'cAb']
    assert tokenizer.decode(list(ids)) == 'Abc'


@pytest.mark.parametrize('ids', [(0, 1, 2), (1, 2, 3), (0, 4, 9)])
def test_our_own_tables_of_characters_are_read_back(tmp_path, ids):
    meta = dict(vocab_size=max(ids) + 1, stoi=dict(zip('Abc', ids)), itos=dict(zip(ids, 'Abc')))
    write_folder(make_ours(vocab_size=16), str(tmp_path / 'hf'), meta)
    assert huggingface.read_tokenizer(str(tmp_path / 'hf')) == meta


@pytest.mark.parametrize('damage', [
    b'{', b'[]', b'{"model": {"type": "WordLevel", "vocab": {"ab": 0}}}',
    b'{"model": {"type": "WordLevel", "vocab": {"a": 70000}}}',
    b'{"model": {"type": "WordLevel", "vocab": {"a": -1, "b": 0}}}', b'[' * 100000])
def test_a_damaged_table_of_characters(tmp_path, damage, capsys):
    (tmp_path / 'tokenizer.json').write_bytes(damage)
    with pytest.raises(SystemExit):
        huggingface.read_tokenizer(str(tmp_path))
    assert 'is not a usable tokenizer.json' in capsys.readouterr().err


def test_another_tokenizer_is_refused(tmp_path, bpe):
    save_ours(tmp_path / 'out')
    export(tmp_path)
    path = tmp_path / 'hf' / 'tokenizer.json'
    assert huggingface.read_tokenizer(str(tmp_path / 'hf')) is None
    table = json.loads(path.read_text(encoding='utf-8'))
    words = list(table['model']['vocab'])
    table['model']['vocab'] = dict(zip(words, range(1, len(words) + 1)))
    path.write_text(json.dumps(table))
    err = run('sample.py', f'--init_from={tmp_path / "hf"}', ok=False).stderr
    assert 'BPE of 50,258 tokens' in err and 'its own tokenizer' in err


# -----------------------------------------------------------------------------
# what the format doesn't have
@pytest.mark.parametrize('meta, words', [
    (dict(vocab_size=3, stoi={'a': 0, 'bc': 1, 'd': 2}, itos={0: 'a', 1: 'bc', 2: 'd'}),
     'one character for each id'),
    (dict(vocab_size=3, stoi={'a': 0, 'b': 1, 'c': 2}, itos={0: 'a', 1: 'b', 2: 'c'}),
     'its tokenizer has 3'),
    (dict(vocab_size=3, stoi={'a': 0, 'b': 2}, itos={0: 'a', 2: 'b'}), 'its tokenizer has 3'),
    (dict(vocab_size=2, stoi={'a': 0, 'A': 0, 'b': 1}, itos={0: 'a', 1: 'b'}),
     'one character for each id'),
    (dict(vocab_size=2, stoi={'a': 0, 'b': 1}, itos={0: 'a', 1: '?'}), 'one character for each'),
    (dict(vocab_size=2, stoi={'a': 0}, itos={0: 'a', 1: '?'}), 'one character for each')])
def test_a_vocabulary_that_the_format_cannot_express_is_refused(tmp_path, capsys, meta, words):
    model = make_ours(vocab_size=2)
    line = expect_error(capsys, write_folder, model, str(tmp_path / 'hf'), meta)
    assert words in line and not os.listdir(tmp_path)


def test_a_long_token_is_refused_in_one_line(tmp_path):
    meta = dict(vocab_size=2, stoi={'a': 0, 'bc': 1}, itos={0: 'a', 1: 'bc'})
    save_ours(tmp_path / 'out', meta=meta, vocab_size=2)
    out = run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}',
              ok=False)
    assert 'one character for each id' in out.stderr and os.listdir(tmp_path) == ['out']


def test_options_that_gpt2_does_not_have_are_refused(tmp_path, char_data):
    run('train.py', *TINY, *FAST, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}',
        '--max_iters=1')
    out = run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}',
              ok=False)
    options = 'rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2'
    assert options in out.stderr and len(out.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ['out']


# -----------------------------------------------------------------------------
# model.py with other lines
META = dict(vocab_size=16, stoi={chr(97 + i): i for i in range(16)},
            itos={i: chr(97 + i) for i in range(16)})
BLOCK_END = '        self.mlp = MLP(config)\n'
MODEL_END = '        self.loss_head = LossHead()\n'
EMBEDDINGS = 'x = self.transformer.drop(x)'
POSITIONS = '            x = x + self.transformer.wpe(torch.arange(T, device=idx.device))\n'
ACTIVATION = 'x = self.gelu(self.c_fc(x))'
ATTENTION = 'is_causal=True)'
WINDOW = 'attn_mask=torch.ones(q.size(2), q.size(2)).tril().triu(-20).bool())'
POST_NORM = [('x = x + self.attn(self.ln_1(x))', 'x = self.ln_1(x + self.attn(x))'),
             ('return x + self.mlp(self.ln_2(x))', 'return self.ln_2(x + self.mlp(x))')]
OTHERS = {
    'RMSNorm': [(BLOCK_END, BLOCK_END + '        self.ln_1 = nn.RMSNorm(config.n_embd)\n')],
    'SiLU': [(BLOCK_END, BLOCK_END + '        self.mlp.gelu = nn.SiLU()\n')],
    'the other GELU': [(BLOCK_END, BLOCK_END + "        self.mlp.gelu = nn.GELU('tanh')\n")],
    'squared ReLU': [(ACTIVATION, 'x = F.relu(self.c_fc(x)).square()')],
    'scale': [(ATTENTION, 'is_causal=True, scale=0.5)')],
    'window': [(ATTENTION, WINDOW)],
    'no mask': [(ATTENTION, 'is_causal=False)')],
    'post-norm': POST_NORM,
    'scaled embeddings': [(EMBEDDINGS, 'x = self.transformer.drop(2 * x)')],
    'no positions': [(POSITIONS, '            pass\n')],
    'another start': [(EMBEDDINGS, 'x = torch.cat((2 * x[:, :1], x[:, 1:]), dim=1)')],
    'another epsilon': [(MODEL_END, MODEL_END + '        self.transformer.ln_f.eps = 1e-3\n')],
}
NORM = '(x - x.mean(-1, True)) * (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()'
ATTEND = '''def attend(q, k, v, *args):
    att = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(q.size(2), q.size(2)).triu(1).bool()
    return att.masked_fill(future, -math.inf).softmax(dim=-1) @ v


class Block(nn.Module):'''
SAME = {
    'another name': [(EMBEDDINGS, 'hidden = self.transformer.drop(x)\n        x = hidden')],
    'attention': [('class Block(nn.Module):', ATTEND),
                  (BLOCK_END, BLOCK_END + '        self.attn.attention.forward = attend\n')],
    'GELU': [(ACTIVATION, 'x = self.c_fc(x)\n        x = x * (1 + (x / 2 ** 0.5).erf()) / 2')],
    'norm': [('return x + self.mlp(self.ln_2(x))',
              f'z = {NORM} * self.ln_2.weight\n        return x + self.mlp(z)')],
    'shared layers': [('nn.ModuleList(Block(config) for _ in range(config.n_layer))',
                       'nn.ModuleList([Block(config)] * config.n_layer)')],
    'some biases': [(BLOCK_END, BLOCK_END + '        self.ln_1 = nn.LayerNorm(config.n_embd)\n')],
}


def make_edited(tmp_path, monkeypatch, edits, **options):
    """A small random model of model.py with other lines, whose vocabulary is padded."""
    module = load_edited(tmp_path / 'edited_model.py', monkeypatch, *edits)
    os.remove(tmp_path / 'edited_model.py')
    return make_ours(module, vocab_size=20, **options)


def load(folder):
    """The model that transformers loads from the folder."""
    from transformers import GPT2LMHeadModel
    return GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize('edit', OTHERS)
def test_a_model_that_computes_something_else_is_refused(tmp_path, monkeypatch, capsys, edit):
    model = make_edited(tmp_path, monkeypatch, OTHERS[edit], bias=False).train()
    folder = tmp_path / 'new' / 'hf'
    line = expect_error(capsys, write_folder, model, str(folder), META)
    assert 'in transformers the logits differ by ' in line and 'share the checkpoint' in line
    assert not os.listdir(tmp_path)


def test_an_end_of_text_that_is_a_border_is_noticed(tmp_path, monkeypatch, capsys):
    # the last id of this vocabulary is rarely among a few random ones
    stoi = {chr(1000 + i): i for i in range(3000)}
    meta = dict(vocab_size=3000, stoi=stoi, itos={i: c for c, i in stoi.items()})
    edits = [(EMBEDDINGS, 'x = x * (idx != 2999).float()[..., None]')]
    module = load_edited(tmp_path / 'edited_model.py', monkeypatch, *edits)
    model = make_ours(module, vocab_size=3000)
    line = expect_error(capsys, write_folder, model, str(tmp_path / 'hf'), meta)
    assert 'in transformers the logits differ by ' in line


@pytest.mark.parametrize('edit', SAME)
def test_an_edit_that_computes_the_same_is_exported(tmp_path, monkeypatch, edit):
    model = make_edited(tmp_path, monkeypatch, SAME[edit], bias=False, dropout=0.5).train()
    write_folder(model, str(tmp_path / 'hf'), META)
    hf = load(tmp_path / 'hf')
    assert os.listdir(tmp_path) == ['hf'] and hf.config.vocab_size == 16
    x = torch.randint(16, (2, 32))
    with torch.no_grad():
        logits = model(x, x)[0][..., :16]
        torch.testing.assert_close(hf(x).logits, logits, rtol=1e-5, atol=2e-5)
    args, _ = huggingface.read_weights(str(tmp_path / 'hf'))
    assert args['bias'] == (edit == 'some biases')


WEIGHTS = {
    'transformer.h.0.ln_1.bias (missing)': OTHERS['RMSNorm'],
    'transformer.h.2.scale ()': [
        (BLOCK_END, BLOCK_END + '        self.scale = nn.Parameter(torch.ones(()))\n')],
    'mask (32, 32)': [
        (MODEL_END, MODEL_END + "        self.register_buffer('mask', torch.ones(32, 32))\n")],
    'transformer.h.1.mlp.c_fc.weight (96, 48)': [
        (BLOCK_END, BLOCK_END + '        self.mlp.c_fc = nn.Linear(config.n_embd, 96)\n'
                                '        self.mlp.c_proj = nn.Linear(96, config.n_embd)\n')],
    'transformer.wpe.weight (missing)': [
        (MODEL_END, MODEL_END + '        del self.transformer.wpe\n')],
    'lm_head.bias (20,)': [
        (MODEL_END, '        self.lm_head.bias = nn.Parameter(torch.ones(20))\n' + MODEL_END)],
}


@pytest.mark.parametrize('words', WEIGHTS)
def test_weights_that_gpt2_does_not_have_are_refused(tmp_path, monkeypatch, capsys, words):
    model = make_edited(tmp_path, monkeypatch, WEIGHTS[words], bias=True)
    line = expect_error(capsys, write_folder, model, str(tmp_path / 'hf'), META)
    assert line.startswith("error: GPT-2's format cannot express ") and words in line
    assert not os.listdir(tmp_path)


def test_another_activation_in_the_config_is_refused(tmp_path, capsys):
    model = make_ours(vocab_size=20)
    model.config.gelu = 'relu'
    line = expect_error(capsys, write_folder, model, str(tmp_path / 'hf'), META)
    assert "GPT-2's format cannot express gelu=relu" in line


def test_an_output_layer_with_its_own_weights_is_refused(tmp_path, capsys):
    model = make_ours(vocab_size=20)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(20, 48))
    line = expect_error(capsys, write_folder, model, str(tmp_path / 'hf'), META)
    assert 'in transformers the logits differ by ' in line


def test_logits_that_are_not_numbers_are_refused(tmp_path, capsys):
    model = make_ours(vocab_size=20)
    model.transformer.ln_f.weight.data.fill_(float('nan'))
    line = expect_error(capsys, write_folder, model, str(tmp_path / 'hf'), META)
    assert 'in transformers the logits differ by nan' in line and not os.listdir(tmp_path)


def test_an_error_in_the_model_leaves_nothing_behind(tmp_path, monkeypatch):
    edits = [(EMBEDDINGS, "raise RuntimeError('my mistake')")]
    model = make_edited(tmp_path, monkeypatch, edits)
    (tmp_path / 'hf').mkdir()
    with pytest.raises(RuntimeError, match='my mistake'):
        write_folder(model, str(tmp_path / 'hf'), META)
    assert os.listdir(tmp_path) == ['hf'] and not os.listdir(tmp_path / 'hf')


def test_a_config_with_only_nanogpts_fields(tmp_path):
    model = make_ours(vocab_size=20)
    fields = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    values = {name: getattr(model.config, name) for name in fields}
    model.config = type('Config', (), values)()  # vars() of it is empty
    write_folder(model, str(tmp_path / 'hf'), META)
    assert equal_to(load(tmp_path / 'hf'), model, 16)


CHEAP = '''
import sys
import torch
from model import GPT, GPTConfig
from runtime.export import write_folder
model = GPT(GPTConfig(8, 4, 1, 1, 8))
model.scale = torch.nn.Parameter(torch.ones(()))
try:
    write_folder(model, sys.argv[1], dict(vocab_size=1, stoi={'a': 0}, itos={0: 'a'}))
finally:
    print('transformers' in sys.modules)
'''


def test_weights_are_refused_before_transformers_is_imported(tmp_path):
    out = subprocess.run([sys.executable, '-c', CHEAP, str(tmp_path / 'hf')], cwd=ROOT,
                         capture_output=True, text=True)
    assert out.stdout == 'False\n' and 'cannot express scale ()' in out.stderr


WRITING_MEMORY = '''
import sys, torch
from transformers import GPT2LMHeadModel
from model import GPT, GPTConfig
from runtime.export import write_folder
def status(key):
    for line in open('/proc/self/status'):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
stoi = {chr(1000 + i): i for i in range(30000)}
meta = dict(vocab_size=30000, stoi=stoi, itos={i: c for c, i in stoi.items()})
write_folder(GPT(GPTConfig(8, 30000, 1, 1, 8)), sys.argv[1] + '/small', meta)
model = GPT(GPTConfig(16, 30000, 8, 16, 1024))
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # resets the peak
write_folder(model, sys.argv[1] + '/large', meta)
print((status('VmHWM') - before) / (4 * model.get_num_params(False)))
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'),
                    reason='needs /proc/self/clear_refs to measure peak memory')
def test_writing_takes_the_memory_of_a_second_copy(tmp_path):
    out = subprocess.run([sys.executable, '-c', WRITING_MEMORY, str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.3, out.stdout


# -----------------------------------------------------------------------------
# which files are read
def rename_weights(folder, name, scale=1.0):
    """Writes the folder's weights, times this scale, to another file in it."""
    weights = load_file(os.path.join(folder, 'model.safetensors'))
    save_file({key: scale * w for key, w in weights.items()},
                                os.path.join(folder, name), metadata={'format': 'pt'})


@pytest.mark.parametrize('name', ['model_old.safetensors', 'a.safetensors', 'z.safetensors',
                                  'model-00001-of-00001.safetensors', 'adapter_model.safetensors'])
def test_a_backup_next_to_the_weights_is_not_read(tmp_path, name):
    folder = str(tmp_path / 'hf')
    model = make_ours(vocab_size=16)
    write_folder(model, folder, META)
    rename_weights(folder, name, scale=0.5)
    ours = GPT.from_pretrained(folder)
    x = torch.randint(16, (2, 8))
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x)[0], load(folder)(x).logits[:, -1:], atol=1e-4)
    os.remove(os.path.join(folder, 'model.safetensors'))  # now there is nothing that it would read
    with pytest.raises(SystemExit):
        GPT.from_pretrained(folder)


def test_the_files_that_an_index_names_are_read(tmp_path, capsys):
    folder = tmp_path / 'hf'
    model = make_ours(vocab_size=16)
    write_folder(model, str(folder), META)
    load(str(folder)).save_pretrained(folder, max_shard_size='30KB')
    (folder / 'model.safetensors').unlink(missing_ok=True)
    parts = sorted(path.name for path in folder.glob('model-*.safetensors'))
    assert len(parts) > 2
    shutil.copy(folder / parts[0], folder / 'model-00000-of-00009.safetensors')
    x = torch.randint(16, (2, 8))
    with torch.no_grad():
        ours = GPT.from_pretrained(str(folder)).eval()(x)[0]
        assert torch.allclose(ours, load(str(folder))(x).logits[:, -1:], atol=1e-4)
    path = folder / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    other_part = next(p for p in parts if p != index['weight_map']['transformer.wte.weight'])
    for weight_map in ({}, [], {'transformer.wte.weight': '../hf/nothing'},
                       {key: 3 for key in index['weight_map']},
                       {**index['weight_map'], 'transformer.wte.weight': other_part}):
        path.write_text(json.dumps({'weight_map': weight_map}))
        line = expect_error(capsys, GPT.from_pretrained, str(folder))
        assert str(folder) in line
    (folder / parts[1]).unlink()
    path.write_text(json.dumps(index))
    assert parts[1] in expect_error(capsys, GPT.from_pretrained, str(folder))


def test_a_folder_with_another_bpe_in_the_older_form_is_refused(tmp_path, bpe, capsys):
    folder = tmp_path / 'hf'
    write_folder(make_ours(), str(folder))
    table = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
    (folder / 'tokenizer.json').unlink()
    assert huggingface.read_tokenizer(str(folder)) is None  # OpenAI's first upload has no table
    vocab = table['model']['vocab']
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    assert huggingface.read_tokenizer(str(folder)) is None
    for content in (json.dumps({word: i + 1 for word, i in vocab.items()}), '[]', '{', '[' * 9999):
        (folder / 'vocab.json').write_text(content)
        line = expect_error(capsys, huggingface.read_tokenizer, str(folder))
        assert "vocab.json is not GPT-2's" in line
