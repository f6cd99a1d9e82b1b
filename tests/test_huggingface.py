"""GPT-2 as transformers has it, against ours: same logits, same text, and no memory wasted."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import FAST, ROOT, TINY, run

from model import GPT, GPTConfig
from runtime import checkpoint, huggingface


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


def save_ours(out_dir, meta=None, vocab_size=50304, **options):
    """Saves a checkpoint of a small random model; returns the model."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=48)
    model = GPT(GPTConfig(**{**sizes, **options})).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
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
    with pytest.raises(ValueError, match='n_layer'):
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
    assert 'has no .safetensors file' in capsys.readouterr().err


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
    assert huggingface.read_characters(str(tmp_path / 'hf')) == meta
    for source in (f'--out_dir={tmp_path / "out"}', f'--init_from={tmp_path / "hf"}'):
        out = run('sample.py', source, '--start=ab ', '--temperature=0', '--num_samples=1',
                  '--max_new_tokens=25', '--dtype=float32')
        assert out.stdout == written + '\n---------------\n'


def test_the_command_that_convert_prints_generates_text(tmp_path):
    meta = dict(vocab_size=2, stoi={'A': 0, 'b': 1}, itos={0: 'A', 1: 'b'})
    save_ours(tmp_path / 'out', meta=meta, vocab_size=2)  # a pipeline asks for 256 tokens
    command = export(tmp_path).partition('try it: ')[2].replace('python', sys.executable, 1)
    out = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert re.search(r"'generated_text': 'A[Ab]{31}'", out), out


@pytest.mark.parametrize('damage', [
    b'{', b'[]', b'{"model": {"type": "WordLevel", "vocab": {"ab": 0}}}',
    b'{"model": {"type": "WordLevel", "vocab": {"a": 1}}}',
    b'{"model": {"type": "WordLevel", "vocab": {"a": -1, "b": 0}}}', b'[' * 100000])
def test_a_damaged_table_of_characters(tmp_path, damage, capsys):
    (tmp_path / 'tokenizer.json').write_bytes(damage)
    with pytest.raises(SystemExit):
        huggingface.read_characters(str(tmp_path))
    assert 'is not a table of characters' in capsys.readouterr().err


def test_another_tokenizer_is_refused(tmp_path, bpe):
    save_ours(tmp_path / 'out')
    export(tmp_path)
    path = tmp_path / 'hf' / 'tokenizer.json'
    assert huggingface.read_characters(str(tmp_path / 'hf')) is None
    table = json.loads(path.read_text(encoding='utf-8'))
    words = list(table['model']['vocab'])
    table['model']['vocab'] = dict(zip(words, range(1, len(words) + 1)))
    path.write_text(json.dumps(table))
    err = run('sample.py', f'--init_from={tmp_path / "hf"}', ok=False).stderr
    assert "it is not GPT-2's BPE either" in err


# -----------------------------------------------------------------------------
# what the format doesn't have
@pytest.mark.parametrize('meta, words', [
    (dict(vocab_size=3, stoi={'a': 0, 'bc': 1, 'd': 2}, itos={0: 'a', 1: 'bc', 2: 'd'}),
     'longer than a character'),
    (dict(vocab_size=3, stoi={'a': 0, 'b': 1, 'c': 2}, itos={0: 'a', 1: 'b', 2: 'c'}),
     'its tokenizer has 3')])
def test_a_vocabulary_that_the_format_cannot_express_is_refused(tmp_path, meta, words):
    save_ours(tmp_path / 'out', meta=meta, vocab_size=2)
    out = run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}',
              ok=False)
    assert words in out.stderr
    assert not (tmp_path / 'hf').exists()


def test_options_that_gpt2_does_not_have_are_refused(tmp_path, char_data):
    run('train.py', *TINY, *FAST, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}',
        '--max_iters=1')
    out = run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}',
              ok=False)
    options = 'rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2'
    assert options in out.stderr and len(out.stderr.splitlines()) == 1
    assert not (tmp_path / 'hf').exists()
