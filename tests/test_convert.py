"""Hugging Face's GPT-2 against ours, both ways: same logits, same text, and no memory wasted on the way."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import FAST, ROOT, TINY, metrics, run

import checkpoint
import convert
from model import GPT, GPTConfig


def save_gpt2(folder, dtype=torch.float32, shard='1GB', **options):
    """A small random GPT-2 as transformers saves it; returns its model."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(**{**dict(vocab_size=100, n_positions=32, n_embd=48, n_layer=3, n_head=4), **options})).eval()
    for p in hf.parameters():  # biases too, and predictions far from uniform
        p.data.normal_(std=0.2)
    hf.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return hf.float()


@pytest.mark.parametrize('options', [{}, {'dtype': torch.bfloat16}, {'shard': '50KB'}, {'activation_function': 'gelu'}])
def test_logits_and_greedy_text_are_transformers(tmp_path, options):
    hf = save_gpt2(tmp_path, **options)
    assert len([f for f in os.listdir(tmp_path) if f.endswith('.safetensors')]) > 1 or 'shard' not in options
    model = GPT.from_pretrained(str(tmp_path)).eval()
    x = torch.randint(100, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(x, x)[0], hf(x).logits, rtol=1e-5, atol=2e-5)  # the wrong GELU would be off by 1e-4
    assert torch.equal(model.generate(x[:, :5], 20, temperature=0),
                       hf.generate(x[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None))
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_contiguous() for p in model.parameters())


def test_the_wrong_gelu_would_be_noticed(tmp_path):
    # what nanoGPT does: the exact GELU under weights that were trained with the tanh one
    hf = save_gpt2(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    for block in model.transformer.h:
        block.mlp.gelu.approximate = 'none'
    x = torch.randint(100, (2, 32))
    assert (model(x, x)[0] - hf(x).logits).abs().max() > 1e-4


def test_dropout_alone_can_be_overridden(tmp_path):
    save_gpt2(tmp_path)
    assert GPT.from_pretrained(str(tmp_path), dict(dropout=0.3)).transformer.drop.p == 0.3
    with pytest.raises(ValueError, match='n_layer'):
        GPT.from_pretrained(str(tmp_path), dict(n_layer=2))


@pytest.mark.parametrize('change', [{'model_type': 'llama'}, {'activation_function': 'relu'}, {'n_inner': 7}, {'scale_attn_by_inverse_layer_idx': True},
                                    {'tie_word_embeddings': False}, {'n_embd': None}])
def test_what_is_no_gpt2_is_refused(tmp_path, change, capsys):
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
    path.unlink()
    with pytest.raises(SystemExit):
        GPT.from_pretrained(str(tmp_path))
    said = capsys.readouterr().err
    assert 'does not hold the weights' in said and 'has no .safetensors file' in said


def test_the_hub_out_of_reach_is_said_in_one_line(tmp_path):
    out = run('sample.py', '--init_from=gpt2', ok=False, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE='1')
    assert 'could not be fetched' in out.stderr and '--init_from=FOLDER' in out.stderr


MEMORY = '''
import sys, threading, torch, safetensors, convert
from model import GPT
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
GPT.from_pretrained(sys.argv[1] + '/small')  # whatever the first call loads is not the weights
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')  # resets the peak
model = GPT.from_pretrained(sys.argv[1] + '/large')
print((status('VmHWM') - before) / (4 * model.get_num_params(False)))
'''


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='needs /proc/self/clear_refs to measure peak memory')
def test_import_holds_the_weights_once(tmp_path):
    save_gpt2(tmp_path / 'small')
    save_gpt2(tmp_path / 'large', n_embd=768, n_layer=6, n_head=12, vocab_size=50257)  # 326 MB, half of it the embedding
    out = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(out.stdout) < 1.3, out.stdout


def test_finetuning_and_sampling_from_a_folder(tmp_path, bpe):
    save_gpt2(tmp_path / 'hf', vocab_size=50257)
    text = tmp_path / 'text.txt'
    text.write_text('To be, or not to be, that is the question.\n' * 60)
    run('data/text/prepare.py', f'--input={text}', '--tokenizer=gpt2', f'--out_dir={tmp_path / "data"}')
    args = [a for a in TINY if not a.startswith('--n_')]
    out = run('train.py', *args, f'--init_from={tmp_path / "hf"}', f'--dataset={tmp_path / "data"}', f'--out_dir={tmp_path / "out"}', '--max_iters=3').stdout
    assert f'from {tmp_path / "hf"}' in out and 'iter 2: loss' in out
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['gelu'] == 'tanh'
    from checkpoint import build_model, load_best
    assert build_model(load_best(str(tmp_path / 'out'))[0]).transformer.h[0].mlp.gelu.approximate == 'tanh'
    for source in (['--init_from=resume', f'--out_dir={tmp_path / "out"}'], [f'--init_from={tmp_path / "hf"}']):
        out = run('sample.py', *source, '--start=To be', '--num_samples=2', '--max_new_tokens=8', '--device=cpu')
        assert out.stdout.count('-' * 15 + '\n') == 2 and out.stdout.startswith('To be') and 'GPT-2 BPE' in out.stderr


def test_gpt2_weights_do_not_fit_a_char_dataset(tmp_path, char_data):
    save_gpt2(tmp_path)
    out = run('train.py', f'--init_from={tmp_path}', f'--dataset={char_data}', '--device=cpu', ok=False)
    assert 'vocabulary' in out.stderr


def test_a_folder_of_characters_fits_its_own_data_alone(tmp_path, char_data, trained):
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}')
    args = [a for a in TINY if not a.startswith('--n_')]
    out = run('train.py', *args, f'--init_from={tmp_path / "hf"}', f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=2').stdout
    at_end = checkpoint.load_best(trained)[0]
    assert f'step 0: train loss {last_losses(trained)[0]:.4f}, val loss {last_losses(trained)[1]:.4f}' in out
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['meta'] == at_end['meta']
    (tmp_path / 'abc.txt').write_text('abc' * 1000)
    run('data/text/prepare.py', f'--input={tmp_path / "abc.txt"}', f'--out_dir={tmp_path / "abc"}')
    assert 'other characters' in run('train.py', *args, f'--init_from={tmp_path / "hf"}', f'--dataset={tmp_path / "abc"}', ok=False).stderr


def last_losses(out_dir):
    last = metrics(out_dir, 'eval')[-1]
    return last['train/loss'], last['val/loss']


def save_ours(out_dir, meta=None, vocab_size=50304, **options):
    """A checkpoint of a small random model; returns the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=32, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=48), **options})).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    out_dir.mkdir()
    checkpoint.save(dict(checkpoint.describe(model.config, meta), model=model.state_dict(), iter_num=7, best_val_loss=1.0, config={}), str(out_dir))
    return model


def equal_to(hf, model, vocab_size):
    """Whether a model of transformers' has our logits and our greedy text."""
    x = torch.randint(vocab_size, (2, model.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, model(x, x)[0][..., :vocab_size], rtol=1e-5, atol=2e-5)
    n = model.config.block_size - 5  # the longest that transformers can: it doesn't crop
    ours = model.generate(x[:, :5], n, temperature=0, vocab_size=vocab_size)
    return torch.equal(ours, hf.generate(x[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None))


@pytest.mark.parametrize('options', [{'bias': False}, {'bias': True, 'gelu': 'tanh', 'block_size': 17},
                                     *(pytest.param(each, marks=pytest.mark.slow) for each in ({'bias': True}, {'gelu': 'tanh'}, {'block_size': 17}))])
def test_export_and_back(tmp_path, bpe, options):
    from transformers import AutoModelForCausalLM
    model = save_ours(tmp_path / 'out', **options)  # its vocabulary padded to 50,304
    run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert hf.config.vocab_size == 50257 and hf.config.n_positions == model.config.block_size
    assert equal_to(hf, model, 50257)
    run('convert.py', '--to=native', f'--out_dir={tmp_path / "back"}', f'--hf_dir={tmp_path / "hf"}')
    back = checkpoint.load_best(str(tmp_path / 'back'))[0]
    ours = checkpoint.load_best(str(tmp_path / 'out'))[0]
    assert back['model_args'] == {**ours['model_args'], 'vocab_size': 50257} and back.get('gelu') == ours.get('gelu')
    assert back['model'].keys() == ours['model'].keys()
    assert all(torch.equal(back['model'][name], w[:50257] if 'wte' in name or 'lm_head' in name else w) for name, w in ours['model'].items())


def test_gpt2s_tokenizer_is_exported(tmp_path, bpe):
    import tiktoken
    from transformers import AutoTokenizer
    save_ours(tmp_path / 'out')
    run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    hf, ours = AutoTokenizer.from_pretrained(tmp_path / 'hf'), tiktoken.get_encoding('gpt2')
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        texts = [f.read(), ' a\n\n\tb  \r\n', "it's NAÏVE 東京 🙂 \u0301", 'zażółć <|endoftext|> gęślą']
    for text in texts:
        assert hf.encode(text) == ours.encode(text, allowed_special='all') and hf.decode(hf.encode(text)) == text
    assert hf.eos_token == '<|endoftext|>' and hf.eos_token_id == 50256 and len(hf) == 50257


def test_characters_are_exported(tmp_path):
    from transformers import AutoTokenizer, pipeline
    chars = sorted('\n abcAB!.,é東')
    meta = dict(vocab_size=len(chars), stoi={c: i for i, c in enumerate(chars)}, itos=dict(enumerate(chars)))
    model = save_ours(tmp_path / 'out', meta=meta, vocab_size=16)  # padded
    run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    hf = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in ('a b\n\nAB!!', ' é 東 ,.', 'a , b . c !'):
        assert hf.encode(text) == [meta['stoi'][c] for c in text] and hf.decode(hf.encode(text)) == text
    written = pipeline('text-generation', str(tmp_path / 'hf'))('ab ', max_new_tokens=25, do_sample=False)[0]['generated_text']
    ours = model.generate(torch.tensor([[meta['stoi'][c] for c in 'ab ']]), 25, temperature=0, vocab_size=len(chars))[0]
    assert written == ''.join(meta['itos'][i] for i in ours.tolist())
    assert convert.read_characters(str(tmp_path / 'hf')) == meta
    texts = [run('sample.py', *source, '--start=ab ', '--temperature=0', '--num_samples=1', '--max_new_tokens=25', '--dtype=float32').stdout
             for source in ([f'--out_dir={tmp_path / "out"}'], [f'--init_from={tmp_path / "hf"}'])]
    assert texts == [written + '\n---------------\n'] * 2


def test_nothing_is_written_over(tmp_path, trained):
    (tmp_path / 'notes.txt').write_text('mine')
    assert 'is not an empty folder' in run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path}', ok=False).stderr
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}')
    assert 'already has a checkpoint' in run('convert.py', '--to=native', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}', ok=False).stderr
    assert 'convert.py --out_dir=out --hf_dir=my-gpt2' in run('convert.py', f'--out_dir={trained}', ok=False).stderr


@pytest.mark.parametrize('damage', [b'{', b'[]', b'{"model": {"type": "WordLevel", "vocab": {"ab": 0}}}',
                                    b'{"model": {"type": "WordLevel", "vocab": {"a": 1}}}',
                                    b'{"model": {"type": "WordLevel", "vocab": {"a": -1, "b": 0}}}', b'[' * 100000])
def test_a_damaged_table_of_characters(tmp_path, damage, capsys):
    (tmp_path / 'tokenizer.json').write_bytes(damage)
    with pytest.raises(SystemExit):
        convert.read_characters(str(tmp_path))
    assert 'is no table of characters' in capsys.readouterr().err


def test_finetuning_in_little_memory_still_learns(tmp_path, char_data, trained):
    # as config/finetune_shakespeare_gpt2.py does, on a model that has learned something
    run('convert.py', f'--out_dir={trained}', f'--hf_dir={tmp_path / "hf"}')
    args = [*TINY, f'--init_from={tmp_path / "hf"}', f'--dataset={char_data}', '--learning_rate=3e-5', '--decay_lr=False', '--max_iters=20',
            '--gradient_accumulation_steps=8', '--eval_interval=20', '--eval_iters=0']
    curves = {}
    for name, flags in (('full', []), ('low', ['--moments_dtype=bfloat16', '--activation_checkpointing=True'])):
        run('train.py', *args, *flags, f'--out_dir={tmp_path / name}')
        curves[name] = [e['loss'] for e in metrics(tmp_path / name, 'iter')]
        first, last = (e['val/loss'] for e in metrics(tmp_path / name, 'eval'))
        assert last < first - 0.01
    assert curves['low'] != curves['full'] and max(abs(a - b) for a, b in zip(*curves.values())) < 0.002


def test_biases_that_were_trained_elsewhere_count(tmp_path, bpe):
    from transformers import AutoModelForCausalLM
    save_ours(tmp_path / 'out', bias=False)
    run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    assert not GPT.from_pretrained(str(tmp_path / 'hf')).config.bias
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    hf.transformer.h[1].mlp.c_fc.bias.data.normal_()
    hf.save_pretrained(tmp_path / 'tuned')
    assert json.loads((tmp_path / 'tuned' / 'config.json').read_text())['bias'] is False  # as we wrote it
    model = GPT.from_pretrained(str(tmp_path / 'tuned')).eval()
    assert model.config.bias and equal_to(hf, model, 50257)


def test_anothers_tokenizer_is_refused(tmp_path, bpe):
    save_ours(tmp_path / 'out')
    run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    path = tmp_path / 'hf' / 'tokenizer.json'
    assert convert.read_characters(str(tmp_path / 'hf')) is None
    table = json.loads(path.read_text(encoding='utf-8'))
    words = list(table['model']['vocab'])
    table['model']['vocab'] = dict(zip(words, range(1, len(words) + 1)))
    path.write_text(json.dumps(table))
    said = run('sample.py', f'--init_from={tmp_path / "hf"}', ok=False).stderr
    assert "it isn't GPT-2's BPE either" in said


@pytest.mark.parametrize('meta, words', [
    (dict(vocab_size=3, stoi={'a': 0, 'bc': 1, 'd': 2}, itos={0: 'a', 1: 'bc', 2: 'd'}), 'longer than a character'),
    (dict(vocab_size=3, stoi={'a': 0, 'b': 1, 'c': 2}, itos={0: 'a', 1: 'b', 2: 'c'}), 'its tokenizer has 3')])
def test_what_the_format_cannot_hold_is_refused(tmp_path, meta, words):
    save_ours(tmp_path / 'out', meta=meta, vocab_size=2)
    assert words in run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}', ok=False).stderr
    assert not (tmp_path / 'hf').exists()


def test_options_that_gpt2_does_not_have_are_refused(tmp_path, char_data):
    run('train.py', *TINY, *FAST, f'--dataset={char_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1')
    out = run('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}', ok=False)
    assert 'rope_base=100.0, qk_norm=True, relu2=True, tied=False, bigrams=60, embd_conv=2' in out.stderr and len(out.stderr.splitlines()) == 1
    assert not (tmp_path / 'hf').exists()
