"""What convert.py writes opens in other programs, which continue a prompt with the same tokens."""
import json
import os

import pytest
import torch
from conftest import ROOT, run_here
from test_huggingface import load, save_ours

from runtime import tokenizer_json
from runtime.export import write_folder
from runtime.tokenizer import get_tokenizer

TEXT = 'ab ab ba. Abba!\n\té東🙂'
CHARACTERS = sorted(set(TEXT))
# all that requirements-dev.txt installs
CLIENTS = ('transformers', 'pipeline', 'trainer', 'peft', 'safetensors', 'ctranslate2',
           'onnxruntime')


def make_meta(kind):
    """The meta dict of a tokenizer; None for GPT-2's."""
    if kind in ('characters', 'short'):
        return dict(vocab_size=len(CHARACTERS), itos=dict(enumerate(CHARACTERS)),
                    stoi={c: i for i, c in enumerate(CHARACTERS)})
    if kind == 'bpe':
        text = tokenizer_json.train_bpe([TEXT * 9], 300)
    elif kind == 'bytes':
        text = tokenizer_json.make_bytes()
    else:
        return None
    return dict(vocab_size=get_tokenizer(dict(tokenizer=text)).vocab_size, tokenizer=text)


class Export:
    """A random model of ours, its checkpoint in out/, and its folder hf/."""

    def __init__(self, path, kind):
        self.kind = kind
        self.meta = make_meta(kind)
        self.tokenizer = get_tokenizer(self.meta)
        self.block_size = 8 if kind == 'short' else 32
        vocab_size = self.tokenizer.vocab_size
        self.out_dir, self.folder = path / 'out', str(path / 'hf')
        self.model = save_ours(self.out_dir, meta=self.meta, vocab_size=vocab_size + 3,
                               block_size=self.block_size)
        write_folder(self.model, self.folder, self.meta)

    def continue_text(self, text, max_new_tokens):
        """Our greedy ids after the text, without those of the text, up to the end of a text."""
        prompt = torch.tensor([self.tokenizer.encode(text)])
        ids = self.model.generate(prompt, max_new_tokens, temperature=0,
                                  vocab_size=self.tokenizer.vocab_size)[0].tolist()
        ids = ids[prompt.size(1):]
        if self.tokenizer.end_id in ids:
            ids = ids[:ids.index(self.tokenizer.end_id)]
        return ids


@pytest.fixture(scope='module', params=['characters', 'bpe', 'bytes', 'gpt2', 'short'])
def export(request, tmp_path_factory):
    if request.param == 'gpt2':
        request.getfixturevalue('bpe')
    return Export(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope='module')
def hf_tokenizer(export):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(export.folder)


@pytest.fixture(scope='module')
def results(export):
    """{client: what recipes/clients.py says of it}."""
    out = run_here('recipes/clients.py', f'--out_dir={export.out_dir}',
                   f'--hf_dir={export.folder}', '--start=ab ', f'--clients={",".join(CLIENTS)}',
                   ok=None).stdout
    return {name: result for name, _, result in json.loads(out.splitlines()[-1])['rows']}


@pytest.mark.filterwarnings('ignore')  # the programs' own
@pytest.mark.parametrize('client', CLIENTS)
def test_same_tokens(results, client):
    if results[client] == 'not installed':
        pytest.skip(f'{client} is not installed')
    assert results[client] == 'equal'


# -----------------------------------------------------------------------------
# tokenizers
def test_all_characters_and_bytes_come_back(export, hf_tokenizer):
    text = ''.join(CHARACTERS)
    if export.kind not in ('characters', 'short'):  # every byte that UTF-8 has
        points = [*range(128), *range(128, 0xd800, 61), *range(0xe000, 0x110000, 61)]
        text = ''.join(map(chr, points))
        assert len(set(text.encode('utf-8'))) == 256 - 13
    ids = hf_tokenizer.encode(text)
    assert ids == export.tokenizer.encode(text) and hf_tokenizer.decode(ids) == text
    assert len(hf_tokenizer) == export.tokenizer.vocab_size


def test_texts_are_cut_at_the_context(export, hf_tokenizer):
    inputs = hf_tokenizer('ab ' * 100, truncation=True)
    assert list(inputs) == ['input_ids', 'attention_mask']  # GPT-2 has no token_type_ids
    assert hf_tokenizer.model_max_length == export.block_size
    assert inputs['input_ids'] == export.tokenizer.encode('ab ' * 100)[:export.block_size]


def test_an_unknown_character_is_the_rarest_one(export, hf_tokenizer):
    ids = hf_tokenizer.encode('aЖ')
    if export.kind in ('characters', 'short'):
        assert ids == [export.meta['stoi']['a'], hf_tokenizer.unk_token_id]
        assert hf_tokenizer.decode(ids, skip_special_tokens=True) == 'a'
        assert hf_tokenizer.unk_token in CHARACTERS
    else:
        assert hf_tokenizer.decode(ids) == 'aЖ'


# -----------------------------------------------------------------------------
# generating
def test_generate_stops_at_the_context(export, hf_tokenizer):
    inputs = hf_tokenizer('ab ', return_tensors='pt')
    ids = load(export.folder).generate(**inputs)[0, inputs['input_ids'].size(1):].tolist()
    n = export.block_size - inputs['input_ids'].size(1)
    expected = export.continue_text('ab ', n)
    assert ids[:len(expected)] == expected
    if len(expected) == n:
        assert len(ids) == n
    else:
        assert ids[len(expected):] == [export.tokenizer.end_id]


@pytest.mark.filterwarnings('ignore')
def test_a_pipeline_in_batches(export):
    from transformers import pipeline
    generator = pipeline('text-generation', export.folder)
    generator.tokenizer.padding_side = 'left'  # version 4 needs it, for OpenAI's GPT-2, too
    prompts = ['ab ', 'a', 'b. a']
    outputs = generator(prompts, batch_size=3, max_new_tokens=4, do_sample=False)
    for prompt, output in zip(prompts, outputs):
        ids = export.continue_text(prompt, 4)
        ids = [i for i in ids if i != generator.tokenizer.eos_token_id]
        text = export.tokenizer.decode(export.tokenizer.encode(prompt) + ids)
        assert output[0]['generated_text'] == text


def test_the_table_in_the_docs_is_the_one_that_was_measured():
    with open(os.path.join(ROOT, 'assets', 'bench', 'clients.json'), encoding='utf-8') as f:
        table = json.load(f)
    with open(os.path.join(ROOT, 'docs', 'huggingface.md'), encoding='utf-8') as f:
        page = f.read()
    rows = [line.strip('| \n').split(' | ') for line in page.splitlines() if line.startswith('| ')]
    assert rows == [table['columns'], *table['rows']] and table['date'] in page
