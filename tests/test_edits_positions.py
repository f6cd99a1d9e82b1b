"""Edits of positions, embeddings and generate() take effect everywhere."""
import json
import types

import pytest
import torch
from conftest import TINY
from edits import LAST_NORM, LM_HEAD, Sources, check_model_edit

from runtime import checkpoint, inference
from runtime.meta import read_meta
from runtime.tokenizer import get_tokenizer

SHAPE = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=False)

# places in model.py
TABLE = """        if not self.rope_base:
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
"""
ADD_POSITIONS = """        if not self.rope_base:
            x = x + self.transformer.wpe(torch.arange(T, device=idx.device))
"""
WTE = "        modules = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}\n"
LOOK_UP = '        x = self.transformer.wte(idx)\n'
MIX = '    x = torch.addcmul(x, padded_x[:, start:-k], self.transformer.conv[k - 1])\n'
DROP = '        x = self.transformer.drop(x)\n'
TIE = '        if self.tied:  # Press & Wolf 2016, https://arxiv.org/abs/1608.05859\n'
ROTATE = """        if self.rope_base:
            q, k = self.rotary(q, k, self.rope_base)
"""
NORMS = '        self.ln_1 = LayerNorm(config.n_embd, config.bias)\n'
ATTEND = '        x = x + self.attn(self.ln_1(x))\n'
QKV = 'q, k, v = self.c_attn(x)'

NO_TABLE = (TABLE, '')
NO_POSITIONS = (ADD_POSITIONS, '')

SINUSOIDS = (ADD_POSITIONS, '''
        pos = torch.arange(T, device=idx.device)[:, None]
        angles = pos * 10000.0 ** -torch.linspace(0, 1, x.size(2) // 2, device=idx.device)
        x = x + torch.cat((angles.sin(), angles.cos()), dim=1)
''')

FIXED_TABLE = [
    ('class LossHead', '''class Table(nn.Module):
    def __init__(self, block_size, n_embd):
        super().__init__()
        pos = torch.arange(block_size)[:, None]
        self.register_buffer('weight', (pos * 0.5 ** torch.arange(n_embd)).sin())

    def forward(self, pos):
        return self.weight[pos]


class LossHead'''),
    (TABLE, "        modules['wpe'] = Table(config.block_size, config.n_embd)\n")]

MODULE_WITHOUT_WEIGHTS = [
    ('class LossHead', '''class Sinusoids(nn.Module):
    def forward(self, pos):
        return (pos[:, None] * 0.5 ** torch.arange(32, device=pos.device)).sin()


class LossHead'''),
    (TABLE, "        modules['wpe'] = Sinusoids()\n")]

ROPE_BY_HAND = [
    NO_TABLE, NO_POSITIONS,
    (ROTATE, '''
        angles = torch.arange(T, device=x.device)[:, None] * 0.5 ** torch.arange(hs // 2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, hs / 2)
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        q = torch.cat((q1 * cos - q2 * sin, q2 * cos + q1 * sin), dim=-1)
        k = torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin), dim=-1)
''')]

IN_EACH_LAYER = [
    (NORMS, NORMS + '        self.pos = nn.Embedding(config.block_size, config.n_embd)\n'),
    (ATTEND, '        x = x + self.pos(torch.arange(x.size(1), device=x.device))\n' + ATTEND)]

# by this name the cache knows what it is
IN_EACH_LAYER_AS_WPE = [(old, new.replace('self.pos', 'self.wpe')) for old, new in IN_EACH_LAYER]

# the last token has position 0
FROM_THE_END = (ADD_POSITIONS, ADD_POSITIONS.replace('torch.arange(T, device=idx.device)',
                                                     'T - 1 - torch.arange(T, device=idx.device)'))

SCALED = (LOOK_UP, '        x = self.transformer.wte(idx) * math.sqrt(self.config.n_embd)\n')

FACTORISED = [
    (WTE, """        modules = {'wte': nn.Embedding(config.vocab_size, 8)}
        modules['up'] = nn.Linear(8, config.n_embd, bias=False)
"""),
    (LOOK_UP, '        x = self.transformer.up(self.transformer.wte(idx))\n')]

FACTORISED_AND_TIED = [
    *FACTORISED,
    (LM_HEAD, '        self.lm_head = nn.Linear(8, config.vocab_size, bias=False)\n'),
    (LAST_NORM, LAST_NORM + '        x = x @ self.transformer.up.weight  # (B, T, 8)\n')]

FACTORISED_TWICE = [
    *FACTORISED,
    (LM_HEAD, '''
        self.lm_head = nn.Sequential(nn.Linear(config.n_embd, 8, bias=False),
                                     nn.Linear(8, config.vocab_size, bias=False))
'''),
    (TIE, '        if False:\n')]

UNTIED = (TIE, '        if False:\n')

EMBEDDING_NORM = [
    ("        modules['drop']", "        modules['ln_0'] = nn.LayerNorm(config.n_embd)\n"
     "        modules['drop']"),
    (DROP, DROP.replace('(x)', '(self.transformer.ln_0(x))'))]

# half of the channels come from the token before
TOKEN_SHIFT = (QKV, '''old, new = x.chunk(2, dim=-1)
        x = torch.cat((F.pad(old, (0, 0, 1, -1)), new), dim=-1)
        q, k, v = self.c_attn(x)''')

TOKEN_BEFORE = (LOOK_UP, LOOK_UP + '''
        x = x + 2 * self.transformer.wte(F.pad(idx, (1, 0))[:, :-1])
''')

ADD_TRIGRAMS = """
        padded_idx = F.pad(idx, (2, 0))
        trigrams = idx + 31 * padded_idx[:, 1:-1] + 71 * padded_idx[:, :-2]
        x = x + self.transformer.trigrams(trigrams % 97)
"""
TRIGRAM_TABLE = (WTE, WTE + "        modules['trigrams'] = nn.Embedding(97, config.n_embd)\n")
TRIGRAMS = [TRIGRAM_TABLE, (LOOK_UP, LOOK_UP + ADD_TRIGRAMS)]

CASES = {
    'sinusoids': ([NO_TABLE, SINUSOIDS], False),
    'sinusoids, and an unused table': ([SINUSOIDS], False),
    'module without weights': (MODULE_WITHOUT_WEIGHTS, True),
    'no positions': ([NO_TABLE, NO_POSITIONS], True),
    'no positions, and an unused table': ([NO_POSITIONS], True),
    'RoPE by hand': (ROPE_BY_HAND, False),
    'in each layer': (IN_EACH_LAYER, False),
    'in each layer, as wpe': (IN_EACH_LAYER_AS_WPE, True),
    'from the end': ([FROM_THE_END], False),
    'scaled': ([SCALED], True),
    'factorised and tied': (FACTORISED_AND_TIED, True),
    'factorised twice': (FACTORISED_TWICE, True),
    'untied': ([UNTIED], True),
    'embedding norm': (EMBEDDING_NORM, True),
    'token shift': ([TOKEN_SHIFT], False),
    'token before': ([TOKEN_BEFORE], False),
    'trigrams': (TRIGRAMS, False),
}


@pytest.mark.parametrize('name', CASES)
def test_edits_of_positions_and_embeddings(name, char_data, tmp_path):
    edits, caches = CASES[name]
    check_model_edit(tmp_path, char_data, *edits, caches=caches)


def test_a_fixed_table_is_exported(char_data, tmp_path):
    check_model_edit(tmp_path, char_data, *FIXED_TABLE, exports=True, caches=True)


@pytest.mark.parametrize('edits, flags', [
    ([NO_TABLE, NO_POSITIONS], []), ([], ['--rope_base=100'])],
    ids=['no positions', 'rotary positions'])
def test_a_context_that_is_longer_than_each_weight(edits, flags, char_data, tmp_path):
    """Without a table of positions no weight tells the length of the context."""
    sources = Sources(tmp_path, *(('model.py', old, new) for old, new in edits))
    flags = ['--eval_interval=1', '--block_size=300', '--batch_size=1', *flags]
    sources.train(char_data, 'out', '--max_iters=1', *flags)
    _, _, losses = sources.train(char_data, 'out', '--max_iters=2', '--init_from=resume', *flags)
    assert len(losses) == 2
    result = sources.run('sample.py', f'--out_dir={tmp_path}/out', '--num_samples=1',
                         '--max_new_tokens=10', '--device=cpu')
    assert result.stdout.count('-' * 15) == 1


def test_trigrams_where_the_cache_keeps_two_tokens(char_data, tmp_path):
    after_conv = (MIX, MIX + ADD_TRIGRAMS)
    check_model_edit(tmp_path, char_data, TRIGRAM_TABLE, after_conv, caches=True, embd_conv=2)


def test_factorised_embedding_untied_by_the_option(char_data, tmp_path):
    check_model_edit(tmp_path, char_data, *FACTORISED, caches=True, tied=False)


# -----------------------------------------------------------------------------
# in the model itself
def make_model(folder, *edits, **options):
    """An edited model whose predictions are away from the uniform ones of a new model."""
    module = Sources(folder, *(('model.py', old, new) for old, new in edits)).load_model()
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**{**SHAPE, **options})).eval()
    for p in model.parameters():
        p.data *= 4
    return model


def make_prompt(length=5):
    return torch.randint(50, (3, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def continue_greedily(model, idx, max_new_tokens):
    """The most likely tokens, each by a forward pass over all before it."""
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -32:])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize('edits', [
    [(TABLE, TABLE.replace('if not self.rope_base', 'if True')),
     (ADD_POSITIONS, ADD_POSITIONS.replace('if not self.rope_base', 'if True'))],
    IN_EACH_LAYER_AS_WPE], ids=['before the layers', 'in each layer'])
def test_rotary_and_learned_positions_together(edits, tmp_path):
    """A full context must be computed again, because each token has another learned position."""
    model = make_model(tmp_path, *edits, rope_base=100.0)
    expected = continue_greedily(model, make_prompt(), 40)
    assert torch.equal(model.generate(make_prompt(), 40, temperature=0), expected)


# positions that count from the last token of this kind, as for documents that are packed
BORDER = 7
RESTART = (ADD_POSITIONS, f'''
        pos = torch.arange(T, device=idx.device).expand(idx.shape)
        starts = pos.masked_fill(idx != {BORDER}, 0).cummax(dim=1).values
        x = x + self.transformer.wpe(pos - starts)
''')


@pytest.mark.parametrize('vocab_size', [50, 500])
def test_positions_that_restart_at_a_token(vocab_size, tmp_path):
    model, prompt = make_model(tmp_path, RESTART, vocab_size=vocab_size), make_prompt()
    prompt[:, 3] = BORDER
    expected = continue_greedily(model, prompt, 20)
    assert not torch.equal(expected, continue_greedily(make_unedited(model), prompt, 20))
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    assert torch.equal(model.generate(prompt, 20, temperature=0, use_cache=False), expected)


def make_unedited(model):
    """A model without edits, with the weights of this one."""
    import model as model_py
    unedited = model_py.GPT(model_py.GPTConfig(**vars(model.config))).eval()
    unedited.load_state_dict(model.state_dict())
    return unedited


@pytest.mark.parametrize('change', ['attribute', 'buffer', 'parameter', 'submodule'])
def test_a_switch_that_is_turned_after_generating(change, tmp_path):
    """The look whether the cache fits must be repeated."""
    model = make_model(tmp_path, (NORMS, NORMS + """
        self.share = 0.0
        self.register_buffer('share_buffer', torch.zeros(()))
        self.share_parameter = nn.Parameter(torch.zeros(()))
        self.mixer = nn.Identity()
"""), (ATTEND, """
        share = self.share + self.share_buffer + self.share_parameter
        x = self.mixer(x + share * F.pad(x, (0, 0, 1, -1)))
        x = x + self.attn(self.ln_1(x))
"""))
    before = model.generate(make_prompt(), 20, temperature=0)
    assert torch.equal(before, continue_greedily(model, make_prompt(), 20))
    for block in model.transformer.h:
        if change == 'attribute':
            block.share = 1.0
        elif change == 'buffer':
            block.share_buffer.fill_(1.0)
        elif change == 'parameter':
            block.share_parameter = torch.nn.Parameter(torch.ones(()))
        else:
            block.mixer = Shift()
    expected = continue_greedily(model, make_prompt(), 20)
    assert not torch.equal(expected, before)
    assert torch.equal(model.generate(make_prompt(), 20, temperature=0), expected)


class Shift(torch.nn.Module):
    def forward(self, x):
        return x + torch.nn.functional.pad(x, (0, 0, 1, -1))


# -----------------------------------------------------------------------------
# sampling in 16 bits
@pytest.mark.parametrize('name', ['sinusoids', 'RoPE by hand', 'scaled', 'embedding norm'])
def test_an_edited_model_samples_in_bfloat16(name, char_data, tmp_path):
    edits, _ = CASES[name]
    sources = Sources(tmp_path, *(('model.py', old, new) for old, new in edits))
    sources.train(char_data, 'out', '--max_iters=2', '--eval_interval=2', '--dtype=bfloat16')
    result = sources.run('sample.py', f'--out_dir={tmp_path}/out', '--num_samples=2',
                         '--max_new_tokens=40', '--device=cpu', '--dtype=bfloat16')
    assert result.stdout.count('-' * 15) == 2


# -----------------------------------------------------------------------------
# generate()
DRAW = ('            idx = torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)\n'
        '        return idx\n')
SECOND = ('model.py', DRAW, '''
            idx = torch.cat((idx, logits.topk(2).indices[:, 1:]), dim=1)
        return idx
''')

DIVIDE = '            logits = logits[:, -1] / temperature  # (B, V)\n'
NO_REPETITION = ('model.py', DIVIDE, DIVIDE + '''
            logits = logits.scatter(1, idx[:, -4:], -math.inf)
''')

SUBCLASS = ('sample.py', 'from model import GPT, GPTConfig\n', '''
import model as original
from model import GPTConfig

class GPT(original.GPT):
    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -32:])
            idx = torch.cat((idx, logits[:, -1].topk(2).indices[:, 1:]), dim=1)
        return idx

''')


def choose_second(logits, idx):
    return logits.topk(2).indices[:, 1:]


def choose_new(logits, idx):
    return logits.scatter(1, idx[:, -4:], -torch.inf).argmax(dim=-1, keepdim=True)


@pytest.mark.parametrize('output', [[], ['--stream=True'], ['--format=jsonl']], ids=str)
@pytest.mark.parametrize('edit, choose, temperature', [
    (SECOND, choose_second, 1.0), (NO_REPETITION, choose_new, 0.0), (SUBCLASS, choose_second, 1.0)],
    ids=['second', 'no repetition', 'subclass'])
def test_sample_py_uses_another_generate(edit, choose, temperature, output, char_data, trained,
                                         tmp_path):
    tokenizer = get_tokenizer(read_meta(char_data))
    prompt = torch.tensor([tokenizer.encode('1 and')])
    text = tokenizer.decode(continue_trained(trained, prompt, choose)[0].tolist())
    sources = Sources(tmp_path, edit)
    result = sources.run('sample.py', f'--out_dir={trained}', '--num_samples=2', '--device=cpu',
                         '--max_new_tokens=40', '--start=1 and', '--dtype=float32', '--top_k=0',
                         f'--temperature={temperature}', *output)
    if output == ['--format=jsonl']:
        texts = ['1 and' + json.loads(line)['text'] for line in result.stdout.splitlines()]
        assert texts == [text, text]
    else:
        assert result.stdout == f'{text}\n{"-" * 15}\n' * 2
    lines = [line for line in result.stderr.splitlines() if 'generate()' in line]
    assert len(lines) == 1 and 'from your own generate()' in lines[0]


@torch.no_grad()
def continue_trained(out_dir, idx, choose):
    """40 tokens that the model of a run continues idx (B, T) with, in plain torch."""
    import model as model_py
    state, _ = checkpoint.load_best(out_dir)
    model = model_py.GPT(model_py.GPTConfig(**state['model_args'])).eval()
    model.load_state_dict(state['model'])
    for _ in range(40):
        logits, _ = model(idx[:, -32:])
        idx = torch.cat((idx, choose(logits[:, -1], idx)), dim=1)
    return idx


def test_another_generate_draws_an_id_without_text(bpe, tmp_path):
    """The embedding has rows that no token of GPT-2 has."""
    code = DRAW.replace('torch.multinomial(logits.softmax(dim=-1), 1)',
                        'torch.full_like(idx[:, :1], 50300)')
    sources = Sources(tmp_path, ('model.py', DRAW, code))
    tokens = torch.randint(50257, (2000,)).numpy().astype('uint16')
    for split in ('train', 'val'):
        tokens.tofile(tmp_path / f'{split}.bin')
    sources.run('train.py', *TINY, f'--dataset={tmp_path}', f'--out_dir={tmp_path}/out',
                '--max_iters=1')
    result = sources.run('sample.py', f'--out_dir={tmp_path}/out', '--device=cpu',
                         '--max_new_tokens=5', '--num_samples=1', ok=None)
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('kind', ['instance', 'class', 'subclass'])
def test_stream_uses_a_generate_that_was_replaced(kind, tmp_path, capsys):
    inference.note_once.cache_clear()
    model, prompt = make_model(tmp_path), make_prompt()

    def repeat(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        return torch.cat((idx, *[idx[:, :1]] * max_new_tokens), dim=1)

    if kind == 'instance':
        model.generate = types.MethodType(repeat, model)
    elif kind == 'class':
        type(model).generate = repeat
    else:
        model.__class__ = type('Repeating', (type(model),), {'generate': repeat})
    tokens = torch.cat(list(inference.stream(model, prompt, 20)), dim=1)
    assert torch.equal(tokens, prompt[:, :1].expand(-1, 20))
    assert capsys.readouterr().err.count('from your own generate()') == 1


def test_options_of_generate(tmp_path):
    """Of a model with another MLP, which has a cache."""
    edit = ('x = self.gelu(self.c_fc(x))', 'x = F.silu(self.c_fc(x))')
    model, prompt = make_model(tmp_path, edit), make_prompt()
    best = continue_greedily(model, prompt, 40)
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6)):
        assert torch.equal(model.generate(prompt, 40, **options), best)
    for options in (dict(), dict(top_k=5), dict(top_p=0.9, temperature=0.8), dict(vocab_size=30)):
        outputs = []
        for use_cache in (True, False, None):
            torch.manual_seed(0)
            outputs.append(model.generate(prompt, 40, use_cache=use_cache, **options))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], best)
    assert outputs[0][:, 5:].max() < 30


def test_another_generate_refuses_the_options_of_the_faster_one(tmp_path):
    model = make_model(tmp_path, NO_REPETITION[1:])
    with pytest.raises(TypeError, match="'top_p', 'use_cache'.*runtime/inference.py"):
        model.generate(make_prompt(), 5, use_cache=True, top_p=0.5)
    out = model.generate(make_prompt(), 40, temperature=0)
    assert all(len(set(row[t - 4:t + 1].tolist())) == 5 for row in out for t in range(5, 45))
