"""Tokenizers of one's own: trained on a text, of bytes, from a file; through all the programs."""
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, expect_error, run, run_here
from test_huggingface import save_ours

from runtime import tokenizer_json
from runtime.export import write_folder
from runtime.huggingface import read_tokenizer
from runtime.meta import check_meta, make_tokenizer_meta, read_meta
from runtime.prompts import open_decoder
from runtime.tokenizer import FileTokenizer, GPT2Tokenizer, get_tokenizer, have_same_tokens

# some words of several languages and scripts
LANGUAGES = {
    'ru': 'В начале было слово, и слово было у людей. Они читали, писали и снова читали книги. ',
    'zh': '天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。学而时习之，不亦说乎？有朋自远方来，不亦乐乎？',
    'hi': 'यह एक छोटी सी कहानी है। लड़का नदी के किनारे बैठा था और किताब पढ़ रहा था। नदी शांत थी। ',
    'ja': 'これは短い物語です。少年は川のそばに座って本を読んでいました。川は静かでした。',
    'de': 'Der Junge saß am Fluss und las ein Buch. Das Mädchen hörte zu und schwieg über Größe. ',
    'ar': 'جلس الولد قرب النهر وقرأ كتابا. كان النهر هادئا والكتاب طويلا. ',
}


def make_text(language, seed=0):
    """Sentences in random order, so that a BPE can't learn all of it as one token."""
    words = LANGUAGES[language].split() if ' ' in LANGUAGES[language] else LANGUAGES[language]
    rng = random.Random(seed)
    space = ' ' if ' ' in LANGUAGES[language] else ''
    return '\n'.join(space.join(rng.choices(words, k=12)) for _ in range(300)) + '\n'


def make_strange_texts():
    """Texts that no tokenizer has been trained on."""
    rng = random.Random(1)
    kinds = [range(32, 127), range(0xa0, 0x250), range(0x400, 0xd7ff), range(0x1f300, 0x1f700),
             [10, 13, 9, 32, 0]]
    return [''.join(chr(rng.choice(rng.choice(kinds))) for _ in range(300)) for _ in range(20)] + [
        '', '<|endoftext|>', 'a <|endoftext|> b', ' \n\n x', "it's\r\n\r\n"]


def train_bpe(text, vocab_size=400):
    return tokenizer_json.train_bpe([text[i:i + 500] for i in range(0, len(text), 500)], vocab_size)


@pytest.mark.parametrize('language', LANGUAGES)
def test_bpe_of_a_language(bpe, language):
    text = make_text(language)
    t = FileTokenizer(train_bpe(text))
    assert 300 < t.vocab_size <= 400 and t.end_id == t.vocab_size - 1 == len(t.ids) - 1
    other_text = make_text(language, seed=1)
    ids, = t.encode_batch([other_text])
    gpt2_ids, = GPT2Tokenizer().encode_batch([other_text])
    assert len(ids) < len(gpt2_ids) and t.decode(ids.tolist()) == other_text
    for strange_text in make_strange_texts():
        ids, = t.encode_batch([strange_text])
        assert t.end_id not in ids and t.decode_bytes(ids.tolist()) == strange_text.encode()
        decode = open_decoder(t)
        assert ''.join(decode(i) for i in ids.tolist()) == strange_text


def test_training_is_repeatable():
    text = make_text('ru') + make_text('zh')
    assert train_bpe(text) == train_bpe(text)


def test_a_short_text_gives_fewer_tokens():
    t = FileTokenizer(train_bpe('ab ab ab', 5000))
    assert 257 < t.vocab_size < 262 and t.end_id == t.vocab_size - 1


def test_bytes_are_their_own_ids():
    t = FileTokenizer(tokenizer_json.make_bytes())
    for text in make_strange_texts():
        ids, = t.encode_batch([text])
        assert bytes(ids.tolist()) == text.encode()
    assert t.encode('a<|endoftext|>') == [97, 256] and t.vocab_size == 257


@pytest.mark.parametrize('make', [tokenizer_json.make_gpt2,
                                  lambda: tokenizer_json.convert_tiktoken('gpt2')])
def test_gpt2s_tokenizer_json_gives_the_ids_of_tiktoken(bpe, tmp_path, make):
    ours, gpt2 = FileTokenizer(make()), GPT2Tokenizer()
    for text in [*make_strange_texts(), *map(make_text, LANGUAGES)]:
        assert ours.encode_batch([text])[0].tolist() == gpt2.encode_batch([text])[0].tolist()
        assert ours.encode(text) == gpt2.encode(text)
    assert make_tokenizer_meta(ours.text, 'x') is None  # it is GPT-2's, which has no meta
    (tmp_path / 'tokenizer.json').write_text(ours.text, encoding='utf-8')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 50257}))
    assert read_meta(str(tmp_path)) is None


def test_a_tokenizer_of_tiktoken_keeps_its_ids(bpe, monkeypatch):
    import tiktoken
    gpt2 = tiktoken.get_encoding('gpt2')
    ranks = {token: i for token, i in gpt2._mergeable_ranks.items() if i < 900}
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding('mine', pat_str=pattern, mergeable_ranks=ranks,
                               special_tokens={'<|endoftext|>': 902, '<|x|>': 910})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, 'mine', theirs)
    ours = FileTokenizer(tokenizer_json.convert_tiktoken('mine'))
    assert ours.vocab_size == theirs.n_vocab == 911 and ours.end_id == 902
    for text in [*make_strange_texts(), 'one 1234567 TWO\n\n\n', make_text('de')]:
        assert ours.encode_batch([text])[0].tolist() == theirs.encode_ordinary(text)
        assert ours.encode(text + '<|x|>') == theirs.encode(text + '<|x|>', allowed_special='all')


@pytest.fixture
def openai_encodings(monkeypatch):
    """The functions in which tiktoken has OpenAI's patterns; their vocabularies aren't here."""
    import tiktoken
    from tiktoken_ext import openai_public
    ranks = dict(tiktoken.get_encoding('gpt2')._mergeable_ranks)
    for length in range(2, 100):  # spaces, as p50k_base has them after the end of a text
        if len(ranks) == 50280:
            break
        ranks.setdefault(b' ' * length, len(ranks) + 1)
    monkeypatch.setattr(openai_public, 'load_tiktoken_bpe', lambda *args, **kwargs: ranks)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    return openai_public


@pytest.mark.parametrize('name', ['cl100k_base', 'o200k_base'])
def test_the_patterns_of_newer_tokenizers(bpe, openai_encodings, monkeypatch, name):
    import tiktoken
    options = getattr(openai_encodings, name)()
    ranks = {token: i for token, i in options['mergeable_ranks'].items() if i < 50256}
    theirs = tiktoken.Encoding('mine', pat_str=options['pat_str'], mergeable_ranks=ranks,
                               special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, 'mine', theirs)
    ours = FileTokenizer(tokenizer_json.convert_tiktoken('mine'))
    for text in [*make_strange_texts(), '1000000 20072008', *map(make_text, LANGUAGES)]:
        assert ours.encode_batch([text])[0].tolist() == theirs.encode_ordinary(text)


def test_a_special_token_between_the_others(bpe, openai_encodings):
    import tiktoken
    ours = FileTokenizer(tokenizer_json.convert_tiktoken('p50k_base'))
    theirs = tiktoken.get_encoding('p50k_base')
    assert ours.end_id == 50256 and ours.vocab_size == theirs.n_vocab == 50281
    for text in [*make_strange_texts(), ' ' * 40 + 'x', make_text('de')]:
        assert ours.encode_batch([text])[0].tolist() == theirs.encode_ordinary(text)
    assert make_tokenizer_meta(ours.text, 'x')['vocab_size'] == 50281


def test_gpt2_with_a_token_more_is_not_gpt2(bpe, tmp_path):
    from tokenizers import Tokenizer
    t = Tokenizer.from_str(tokenizer_json.make_gpt2())
    t.add_special_tokens(['<|user|>'])
    meta = make_tokenizer_meta(t.to_str(), 'x')
    assert meta['vocab_size'] == 50258
    assert get_tokenizer(meta).encode('a<|user|>') == [64, 50257]
    t.save(str(tmp_path / 'tokenizer.json'))
    assert have_same_tokens(read_tokenizer(str(tmp_path)), meta)


def test_only_the_ids_of_a_text_count(tmp_path):
    """A tokenizer.json may say that a text gets more tokens, or that it is cut."""
    from tokenizers import Tokenizer, processors
    plain = FileTokenizer(train_bpe(make_text('ru')))
    t = Tokenizer.from_str(plain.text)
    t.enable_truncation(8)
    t.enable_padding(length=300)
    end = ('<|endoftext|>', plain.end_id)
    t.post_processor = processors.TemplateProcessing('<|endoftext|> $A', special_tokens=[end])
    meta = make_tokenizer_meta(t.to_str(), 'x')
    text = make_text('ru', seed=1)
    assert get_tokenizer(meta).encode(text) == plain.encode(text)
    assert get_tokenizer(meta).encode_batch([text])[0].tolist() == plain.encode(text)
    assert have_same_tokens(meta, {'tokenizer': plain.text})
    model = save_ours(tmp_path / 'out', meta=meta, vocab_size=meta['vocab_size'])
    write_folder(model, str(tmp_path / 'hf'), meta)
    from transformers import AutoTokenizer
    hf = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert hf(text)['input_ids'] == plain.encode(text)


def test_the_parts_that_make_ids_are_compared():
    from tokenizers import Tokenizer, normalizers
    meta = {'tokenizer': train_bpe(make_text('de'))}
    parts = json.loads(meta['tokenizer'])
    resaved = {'tokenizer': Tokenizer.from_str(meta['tokenizer']).to_str(pretty=True)}
    assert resaved != meta and have_same_tokens(meta, resaved)
    lower = Tokenizer.from_str(meta['tokenizer'])
    lower.normalizer = normalizers.Lowercase()
    assert not have_same_tokens(meta, {'tokenizer': lower.to_str()})
    parts['model']['merges'][:2] = parts['model']['merges'][1::-1]
    assert not have_same_tokens(meta, {'tokenizer': json.dumps(parts)})


def test_a_file_that_does_not_name_the_type_of_its_model():
    text = train_bpe(make_text('de'))
    parts = json.loads(text)
    del parts['model']['type']
    old = FileTokenizer(json.dumps(parts))
    assert old.encode(make_text('de')) == FileTokenizer(text).encode(make_text('de'))
    assert tokenizer_json.splits_as_gpt2(text) and not tokenizer_json.splits_as_gpt2(old.text)


def make_unigram(text):
    """A tokenizer like SentencePiece's: words begin with a mark, and it knows no bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=['<unk>', '</s>'],
                                      unk_token='<unk>', show_progress=False)
    t.train_from_iterator(text.splitlines(), trainer)
    return t.to_str()


def test_a_tokenizer_that_is_not_of_bytes():
    text = make_text('de')
    t = FileTokenizer(make_unigram(text))
    line = text.splitlines()[3]
    ids = t.encode(line)
    assert not t.is_byte_level and t.decode(ids) == line and t.end_id == t.ids['</s>']
    assert t.encode_batch([line])[0].tolist() == ids
    decode = open_decoder(t)
    assert ''.join(decode(i) for i in ids) == line
    assert t.decode([*ids, 10 ** 6]) == line  # a row that pads the vocabulary


@pytest.mark.parametrize('text', [
    '', '{', '[]', 'null', '{"model": {}}', '[' * 10 ** 5, '{"model": {"type": "BPE"}}',
    '{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}',
    '{"model": {"type": "Unigram", "vocab": [], "unk_id": 5}}'])
def test_a_damaged_file_ends_in_one_line(text, capsys):
    assert 'x is not a usable tokenizer.json' in expect_error(capsys, FileTokenizer, text, 'x')


def test_ids_beyond_any_vocabulary(capsys):
    parts = json.loads(tokenizer_json.make_bytes())
    parts['model']['vocab']['a'] = 2 ** 31
    t = FileTokenizer(json.dumps(parts))
    assert t.vocab_size == 2 ** 31 + 1
    meta = {'vocab_size': 300, 'tokenizer': t.text}
    assert 'the model has a vocabulary of 300' in expect_error(capsys, get_tokenizer, meta, 300)


def test_only_a_text_is_a_tokenizer():
    assert check_meta({'vocab_size': 5, 'tokenizer': 7, 'val_bytes': -1}) == {'vocab_size': 5}
    meta = {'vocab_size': 5, 'tokenizer': '{}', 'val_bytes': 10}
    assert check_meta({**meta, 'stoi': {}, 'x': 1}) == meta


# -----------------------------------------------------------------------------
# through the programs
def prepare(folder, text, *args):
    path = f'{folder}.txt'
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)
    return run_here('data/text/prepare.py', f'--input={path}', f'--out_dir={folder}', *args)


def train(data_dir, out_dir, *args, ok=True):
    return run_here('train.py', *TINY, f'--dataset={data_dir}', f'--out_dir={out_dir}',
                    '--max_iters=4', '--eval_interval=2', '--eval_iters=0', '--block_size=16',
                    *args, ok=ok)


def sample(*args):
    return run_here('sample.py', '--start=В начале', '--temperature=0', '--num_samples=1',
                    '--max_new_tokens=12', '--dtype=float32', '--device=cpu', *args).stdout


def test_from_a_text_to_transformers_and_back(tmp_path):
    from transformers import AutoTokenizer
    text = make_text('ru')
    out = prepare(tmp_path / 'data', text, '--tokenizer=bpe', '--vocab_size=320').stdout
    assert 'vocabulary: 320 tokens' in out and "with GPT-2's BPE: " in out
    names = ['meta.pkl', 'tokenizer.json', 'train.bin', 'val.bin']
    assert sorted(os.listdir(tmp_path / 'data')) == names
    meta_file = pickle.loads((tmp_path / 'data' / 'meta.pkl').read_bytes())
    assert meta_file['vocab_size'] == 320 and 'tokenizer' not in meta_file
    assert meta_file['val_bytes'] == len(text[int(0.9 * len(text)):].encode())
    t = get_tokenizer(read_meta(str(tmp_path / 'data')))
    ids = [np.fromfile(tmp_path / 'data' / f'{split}.bin', dtype='<u2').tolist()
           for split in ('train', 'val')]
    assert t.decode(ids[0]) + t.decode(ids[1]) == text + '<|endoftext|>'

    out = train(tmp_path / 'data', tmp_path / 'out').stdout
    loss, bits = [float(out.split('step 4:')[1].split(word)[0].split()[-1])
                  for word in (', perplexity', ' bits/byte')]
    num_bytes_per_token = meta_file['val_bytes'] / len(ids[1])
    assert bits == pytest.approx(loss / np.log(2) / num_bytes_per_token, abs=2e-4)
    shutil.rmtree(tmp_path / 'data')  # sampling needs only the checkpoint
    written = sample(f'--out_dir={tmp_path / "out"}')
    assert written.startswith('В начале')
    assert sample(f'--out_dir={tmp_path / "out"}', '--stream').startswith(written.split('\n')[0])

    folder = tmp_path / 'hf'
    run_here('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={folder}')
    hf = AutoTokenizer.from_pretrained(folder)
    for other_text in (text, *make_strange_texts()):
        assert hf(other_text)['input_ids'] == t.encode(other_text)
    assert sample(f'--init_from={folder}') == written
    run_here('convert.py', '--to=native', f'--hf_dir={folder}', f'--out_dir={tmp_path / "back"}')
    assert sample(f'--out_dir={tmp_path / "back"}') == written


def test_only_data_with_the_same_tokens_fits_a_run(tmp_path, bpe):
    prepare(tmp_path / 'ru', make_text('ru'), '--tokenizer=bpe', '--vocab_size=300')
    prepare(tmp_path / 'de', make_text('de'), '--tokenizer=bpe', '--vocab_size=300')
    prepare(tmp_path / 'again', make_text('de'), f'--vocabulary={tmp_path / "ru"}')
    prepare(tmp_path / 'file', make_text('de'), f'--tokenizer={tmp_path / "ru" / "tokenizer.json"}')
    train(tmp_path / 'ru', tmp_path / 'out')
    prepare(tmp_path / 'run', make_text('de'), f'--vocabulary={tmp_path / "out"}')
    bins = [(tmp_path / name / 'train.bin').read_bytes() for name in ('again', 'file', 'run')]
    assert bins[0] == bins[1] == bins[2]
    resume = ('--init_from=resume', '--max_iters=6')
    err = train(tmp_path / 'de', tmp_path / 'out', *resume, ok=False).stderr
    assert f'{tmp_path / "de"} has other tokens' in err
    assert f'--vocabulary={tmp_path / "out"}' in err
    prepare(tmp_path / 'gpt2', make_text('de'), '--tokenizer=gpt2')
    err = train(tmp_path / 'gpt2', tmp_path / 'out', *resume, ok=False).stderr
    assert 'has no meta.pkl, so it is GPT-2 BPE' in err
    train(tmp_path / 'run', tmp_path / 'out', *resume)

    run_here('convert.py', f'--out_dir={tmp_path / "out"}', f'--hf_dir={tmp_path / "hf"}')
    path = tmp_path / 'hf' / 'tokenizer.json'
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')), indent=1))  # resaved
    finetune = (f'--init_from={tmp_path / "hf"}',)
    train(tmp_path / 'ru', tmp_path / 'finetuned', *finetune)
    err = train(tmp_path / 'de', tmp_path / 'x', *finetune, ok=False).stderr
    assert 'has other tokens' in err and not (tmp_path / 'x').exists()


def test_gpt2_does_not_fit_another_tokenizer_of_its_size(tmp_path, bpe, capsys):
    from runtime.dataset import check_vocabulary
    own = {'vocab_size': 50304, 'tokenizer': tokenizer_json.make_bytes()}
    gpt2_state = {'model_args': {'vocab_size': 50304}}
    check_vocabulary(None, gpt2_state, 'data', 'out/ckpt.pt')
    line = expect_error(capsys, check_vocabulary, own, gpt2_state, 'data', 'out/ckpt.pt')
    assert 'data has a tokenizer of its own' in line
    own_state = {**gpt2_state, 'meta': own}
    line = expect_error(capsys, check_vocabulary, None, own_state, 'data', 'out/ckpt.pt')
    assert 'has no meta.pkl' in line


def test_more_tokens_than_uint16_has_ids(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = [f'w{i}' for i in range(70000)]
    t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='w0'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.save(str(tmp_path / 'words.json'))
    prepare(tmp_path / 'data', ' '.join(words[-2000:]), f'--tokenizer={tmp_path / "words.json"}')
    ids = np.fromfile(tmp_path / 'data' / 'train.bin', dtype='<u4')
    assert ids.tolist() == list(range(68000, 69800))
    assert read_meta(str(tmp_path / 'data'))['dtype'] == 'uint32'
    os.remove(tmp_path / 'data' / 'meta.pkl')  # the tokenizer is enough
    assert read_meta(str(tmp_path / 'data'))['vocab_size'] == 70000
    out = train(tmp_path / 'data', tmp_path / 'out', '--n_embd=8').stdout
    assert 'vocabulary 70000' in out


def make_words():
    """A tokenizer of the words a and b, which has no token for others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    t = Tokenizer(models.WordLevel({'a': 0, 'b': 1}, unk_token='[UNK]'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.to_str()


def make_huge_id():
    parts = json.loads(tokenizer_json.make_bytes())
    parts['model']['vocab']['a'] = 4 * 10 ** 9
    return json.dumps(parts)


@pytest.mark.parametrize('make, words', [
    (make_words, 'the tokenizer cannot encode this text'),
    (make_huge_id, 'has ids up to 4,000,000,000, more than a vocabulary can have')])
def test_tokenizers_that_do_not_fit_a_text(tmp_path, make, words):
    (tmp_path / 'a.json').write_text(make())
    (tmp_path / 'a.txt').write_text('a b a b c ' * 50)
    err = run_here('data/text/prepare.py', '--input=a.txt', '--out_dir=data', '--tokenizer=a.json',
                   cwd=tmp_path, ok=False).stderr
    assert words in err and err.count('\n') == 1
    assert sorted(os.listdir(tmp_path)) == ['a.json', 'a.txt']


def test_a_tokenizer_json_of_ones_own_stays(tmp_path):
    """A dataset of characters has none, and an earlier one is removed; this is not one of ours."""
    (tmp_path / 'tokenizer.json').write_text('mine')
    (tmp_path / 'a.txt').write_text('some words ' * 50)
    for tokenizer in ('char', 'bytes'):
        err = run_here('data/text/prepare.py', '--input=a.txt', '--out_dir=.',
                       f'--tokenizer={tokenizer}', cwd=tmp_path, ok=False).stderr
        assert 'tokenizer.json is there, and it is not of an earlier dataset' in err
    assert sorted(os.listdir(tmp_path)) == ['a.txt', 'tokenizer.json']
    assert (tmp_path / 'tokenizer.json').read_text() == 'mine'


def test_characters_after_a_tokenizer_in_the_same_folder(tmp_path):
    prepare(tmp_path / 'data', 'some words ' * 50, '--tokenizer=bytes')
    prepare(tmp_path / 'data', 'some words ' * 50)
    assert sorted(os.listdir(tmp_path / 'data')) == ['meta.pkl', 'train.bin', 'val.bin']
    assert read_meta(str(tmp_path / 'data'))['vocab_size'] == len(set('some words '))


def test_the_checkpoint_has_the_tokenizer_and_its_size(tmp_path):
    prepare(tmp_path / 'data', 'some words ' * 90, '--tokenizer=bytes')
    train(tmp_path / 'data', tmp_path / 'out')
    state = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert state['model_args']['vocab_size'] == 257
    assert state['meta']['tokenizer'] == (tmp_path / 'data' / 'tokenizer.json').read_text()
    err = run('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1',
              '--max_new_tokens=3').stderr
    assert 'BPE of 257 tokens' in err
