"""Edits and patches of the attention, and of the layers around it, take effect everywhere."""
import types

import pytest
import torch
from edits import PlainRun, Sources, check_model_edit, check_sampling, load_unedited_model

from runtime import inference, kernels

# in a new model the attention is nearly uniform, so some edits also make it sharper: else they
# would have no effect
SHAPE = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, bias=False)

# places in model.py
ATTEND = '            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)\n'
CALL = '        y = self.attention(q, k, v, self.attn_dropout, self.flash)\n'
C_ATTN = 'nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v'
SPLIT = 'self.c_attn(x).view(B, T, 3 * nh, hs).split(nh, dim=2)  # (B, T, nh, hs)\n'
OUTPUT = '        y = y.transpose(1, 2).reshape(B, T, C)\n'
PARTS = '        self.attention = Attention()\n'
BLOCK = 'class Block(nn.Module):\n'
LAYER = '        self.attn = CausalSelfAttention(config)\n'
LAYERS = "        modules['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))\n"
DROPOUT = '        self.attn_dropout = nn.Dropout(config.dropout)\n'

ALIBI = (ATTEND, '''
            pos = torch.arange(q.size(2), device=q.device)
            slopes = 2.0 ** -torch.arange(q.size(1), device=q.device)
            bias = slopes[:, None, None] * (pos - pos[:, None])
            mask = bias.masked_fill(pos > pos[:, None], -math.inf)
            return F.scaled_dot_product_attention(q, k, v, mask, p)
''')

WINDOW = (ATTEND, '''
            band = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril().triu(-7)
            return F.scaled_dot_product_attention(q, k, v, band, p)
''')

# 24 tokens: more than the prompts of the tests have
LARGE_WINDOW = (ATTEND, WINDOW[1].replace('-7', '-23'))

# the same around the attention instead of in it
LARGE_WINDOW_IN_FORWARD = (CALL, '''
        band = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(-23)
        y = F.scaled_dot_product_attention(q, k, v, band)
''')

# the first half of a full context is one window, the second half another one
TWO_WINDOWS = (CALL, '''
        halves = [z.split(16, dim=2) for z in (q, k, v)]
        y = torch.cat([self.attention(*half, self.attn_dropout, self.flash)
                       for half in zip(*halves)], dim=2)
''')

SOFT_CAP = (ATTEND, '''
            att = 5 * torch.tanh(2 * q @ k.mT)
            future = torch.ones_like(att[0, 0], dtype=torch.bool).triu(1)
            return dropout(att.masked_fill(future, -math.inf).softmax(dim=-1)) @ v
''')

SCALE = (ATTEND, ATTEND.replace('is_causal=True', 'is_causal=True, scale=20.0'))

SCALE_IN_FORWARD = (CALL, CALL.replace('(q', '(40 * q'))

ONE_KEY_VALUE_HEAD = [
    (C_ATTN, 'nn.Linear(config.n_embd, config.n_embd + 2 * config.n_embd // config.n_head)'),
    (SPLIT, '''self.c_attn(x).view(B, T, nh + 2, hs).split([nh, 1, 1], dim=2)
        k, v = (z.repeat_interleave(nh, dim=2) for z in (k, v))
''')]

ENABLE_GQA = [
    ONE_KEY_VALUE_HEAD[0],
    (SPLIT, 'self.c_attn(x).view(B, T, nh + 2, hs).split([nh, 1, 1], dim=2)\n'),
    (ATTEND, ATTEND.replace('is_causal=True', 'is_causal=True, enable_gqa=True'))]

DIFFERENTIAL = [
    (PARTS, PARTS + '        self.share = nn.Parameter(torch.tensor(0.8))\n'),
    (CALL, '''
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # (B, nh, T, hs / 2)
        y = self.attention(q1, k1, v, self.attn_dropout, self.flash)
        y = y - self.share * self.attention(q2, k2, v, self.attn_dropout, self.flash)
''')]

SINK_LOGIT = [
    (PARTS, PARTS + '        self.sink = nn.Parameter(torch.ones(config.n_head, 1, 1) * 3)\n'),
    (CALL, '''
        att = q @ k.mT / math.sqrt(hs)
        att = att.masked_fill(torch.ones_like(att[0, 0], dtype=torch.bool).triu(1), -math.inf)
        att = torch.cat((self.sink.expand(B, nh, T, 1), att), dim=-1).softmax(dim=-1)
        y = self.attn_dropout(att[..., 1:]) @ v
''')]

SINK_KEY = [
    (PARTS, PARTS + '        self.sink = nn.Parameter(torch.ones(2, config.n_head, 1, hs))\n'),
    ('        self.flash = True', '        hs = config.n_embd // config.n_head\n'
     '        self.flash = True'),
    (CALL, '''
        k, v = (torch.cat((s.expand(B, -1, -1, -1), z), 2) for s, z in zip(self.sink, (k, v)))
        mask = torch.ones(T, T + 1, dtype=torch.bool, device=x.device).tril(1)
        y = F.scaled_dot_product_attention(q, k, v, mask)
''')]

# a learned token before all others
SINK_TOKEN = [
    ("        modules['drop']", "        self.sink = nn.Parameter(torch.arange(8.0).repeat(4))\n"
     "        modules['drop']"),
    ('        x = self.transformer.drop(x)\n', '''
        x = torch.cat((self.sink.expand(len(x), 1, -1), x), dim=1)
        x = self.transformer.drop(x)
'''),
    ('x = self.transformer.ln_f(x)\n', 'x = self.transformer.ln_f(x)[:, 1:]\n')]

GATE = [
    (PARTS, PARTS + '        self.gate = nn.Linear(config.n_embd, config.n_embd)\n'),
    (OUTPUT, OUTPUT + '        y = y * self.gate(x).sigmoid()\n')]

CONVOLUTION = [
    (BLOCK, '''class Convolution(nn.Conv1d):
    def __init__(self, config):
        super().__init__(config.n_embd, config.n_embd, 4, groups=config.n_embd)

    def forward(self, x):
        return super().forward(F.pad(x.mT, (3, 0))).mT


''' + BLOCK),
    (LAYER, LAYER.replace('CausalSelfAttention', 'Convolution'))]

CONVOLUTION_AND_ATTENTION = [
    CONVOLUTION[0],
    (LAYERS, LAYERS + "        modules['h'][0].attn = Convolution(config)\n")]

AVERAGE = [
    (BLOCK, '''class Average(nn.Linear):
    def forward(self, x):
        count = torch.arange(1, x.size(1) + 1, device=x.device)
        return super().forward(x.cumsum(dim=1) / count[:, None])


''' + BLOCK),
    (LAYER, '        self.attn = Average(config.n_embd, config.n_embd)\n')]

TALKING_HEADS = [
    (PARTS, PARTS + '        self.talk = nn.Parameter(40 * torch.eye(config.n_head).flip(0))\n'),
    (CALL, '''
        att = torch.einsum('bhij, hg -> bgij', q @ k.mT / math.sqrt(hs), self.talk)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        att = self.attn_dropout(att.masked_fill(future, -math.inf).softmax(dim=-1))
        y = att @ v
''')]

BY_HAND = (CALL, '''
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        att = F.softmax(att.masked_fill(future, float('-inf')), dim=-1)
        y = self.attn_dropout(att) @ v
''')

SPARSE = [
    (BLOCK, '''class Sparse(nn.Module):
    p = 0.0

    def forward(self, att):
        return att.masked_fill(att < 0.1, 0.0)


''' + BLOCK),
    (DROPOUT, '        self.attn_dropout = Sparse()\n')]

SAME_LAYER = (LAYERS, "        modules['h'] = nn.ModuleList([Block(config)] * config.n_layer)\n")

SAME_ATTENTION = (LAYERS, LAYERS + "        modules['h'][1].attn = modules['h'][0].attn\n")

ONE_LAYER_MORE = [
    (LAYERS, LAYERS + "        modules['h'].append(copy.deepcopy(modules['h'][-1]))\n"),
    ('import math\n', 'import copy\nimport math\n')]

# what __init__ computes from the config, and no checkpoint has
MASK_BUFFER = [
    (PARTS, PARTS + '''
        band = torch.ones(config.block_size, config.block_size).tril().triu(-7)
        self.register_buffer('band', band.bool(), persistent=False)
'''),
    (CALL, '        y = F.scaled_dot_product_attention(q, k, v, self.band[:T, :T])\n')]

MASK_ATTRIBUTE = [
    (PARTS, PARTS + '''
        self.band = torch.ones(config.block_size, config.block_size).tril().triu(-7).bool()
'''),
    MASK_BUFFER[1]]

SCALE_OF_EACH_LAYER = [
    (LAYERS, LAYERS + '''
        for block, scale in zip(modules['h'], torch.linspace(20.0, 40.0, config.n_layer)):
            block.attn.scale = scale.item()
'''),
    (CALL, CALL.replace('(q', '(self.scale * q'))]



CASES = {
    'alibi': ([ALIBI], False),
    'window': ([WINDOW], False),
    'soft cap': ([SOFT_CAP], False),
    'scale': ([SCALE], False),
    'scaled queries': ([SCALE_IN_FORWARD], True),
    'one key/value head': (ONE_KEY_VALUE_HEAD, True),
    'enable_gqa': (ENABLE_GQA, False),
    'differential': (DIFFERENTIAL, False),
    'sink logit': (SINK_LOGIT, False),
    'sink key': (SINK_KEY, False),
    'sink token': (SINK_TOKEN, False),
    'gate': (GATE, True),
    'convolution': (CONVOLUTION, False),
    'convolution and attention': (CONVOLUTION_AND_ATTENTION, False),
    'average': (AVERAGE, False),
    'talking heads': (TALKING_HEADS, False),
    'sparse': (SPARSE, False),
    'one layer more': (ONE_LAYER_MORE, True),
    'mask in a buffer': (MASK_BUFFER, False),
    'mask in an attribute': (MASK_ATTRIBUTE, False),
    'scale of each layer': (SCALE_OF_EACH_LAYER, True),
}


@pytest.mark.parametrize('name', CASES)
def test_edits_of_the_attention(name, char_data, tmp_path):
    edits, caches = CASES[name]
    check_model_edit(tmp_path, char_data, *edits, caches=caches)


@pytest.mark.parametrize('edit', [LARGE_WINDOW, LARGE_WINDOW_IN_FORWARD, TWO_WINDOWS],
                         ids=['in Attention', 'in CausalSelfAttention', 'two windows'])
def test_edits_that_only_a_full_context_shows(edit, char_data, tmp_path):
    check_model_edit(tmp_path, char_data, edit, caches=False, effect=1e-4)


def test_attention_written_out_is_exported(char_data, tmp_path):
    # it has the same losses as before. That the cache is off shows that it takes effect
    check_model_edit(tmp_path, char_data, BY_HAND, exports=True, caches=False, effect=-1.0)


@pytest.mark.parametrize('edit', [SAME_LAYER, SAME_ATTENTION], ids=['layer', 'attention'])
def test_shared_layers_are_exported(edit, char_data, tmp_path):
    check_model_edit(tmp_path, char_data, edit, exports=True, caches=False)


# -----------------------------------------------------------------------------
# the same Attention, called with other shapes
ONE_HEAD_FOR_ALL = (CALL, CALL.replace('k, v', 'k[:, :1], v[:, :1]'))
SHORT_KEYS = (CALL, CALL.replace('q, k', 'q[..., :8], k[..., :8]'))
ZERO_KEY = (CALL, CALL.replace('k, v', 'F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))'))


@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('edit', [ONE_HEAD_FOR_ALL, SHORT_KEYS, ZERO_KEY],
                         ids=['one head of keys', 'short keys', 'one key more'])
def test_other_shapes_in_the_same_attention(edit, dropout, tmp_path):
    module = Sources(tmp_path, ('model.py', *edit)).load_model()
    losses = []
    for is_accelerated in (False, True):
        model = make_model(module, dropout=dropout)
        if is_accelerated:
            kernels.accelerate(model, 'cpu', 'bfloat16')
        losses.append(compute_loss(model, torch.bfloat16))
    # dropout draws other random numbers
    torch.testing.assert_close(*losses, rtol=0.02 + dropout, atol=0)


def make_model(module, sharpness=4, **options):
    """A model whose predictions are away from the uniform ones of a new model."""
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**{**SHAPE, **options}))
    for p in model.parameters():
        p.data *= sharpness
    return model


def compute_loss(model, dtype=torch.float32):
    """The loss of some tokens, after its backward pass."""
    idx = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    model.train()
    torch.manual_seed(3)  # for dropout
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return loss.detach()


def make_prompt():
    return torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def continue_greedily(model, idx, max_new_tokens=40):
    """The most likely tokens, each by a forward pass over all before it."""
    model.eval()
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -32:])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


# -----------------------------------------------------------------------------
# patches, as people write them below the line that makes the model
ATTN_OF_AN_INSTANCE = """
attn = model.transformer.h[0].attn
attn.forward = lambda x: attn.c_proj(x.cumsum(dim=1))
"""

ATTN_OF_THE_CLASS = """
cls = type(model.transformer.h[0].attn)
cls.forward = lambda self, x: self.c_proj(x.cumsum(dim=1))
"""

ANOTHER_ATTN = """
class Sum(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.cumsum(dim=1))

for block in model.transformer.h:
    block.attn = Sum(32, 32, bias=False)
    torch.nn.init.constant_(block.attn.weight, 0.01)
"""

BLOCK_CLASS = """
def forward(self, x):
    return x + self.mlp(self.ln_2(x)) + self.attn(self.ln_1(x))

type(model.transformer.h[0]).forward = forward
"""

BLOCK_INSTANCE = """
block = model.transformer.h[1]
block.forward = lambda x: x - block.attn(block.ln_1(x.roll(1, dims=-1)))
"""

GPT_CLASS = """
forward = type(model).forward
type(model).forward = lambda self, idx, targets=None: forward(self, idx // 2, targets)
"""

ATTENTION_CLASS = """
import sys
cls = sys.modules[type(model).__module__].Attention
cls.forward = lambda self, q, k, v, dropout, flash: v.cumsum(dim=2)
"""

SQUARED_WEIGHTS = """
class Squares(torch.nn.Module):
    def forward(self, att):
        return 50 * att.square()

for block in model.transformer.h:
    block.attn.attn_dropout = Squares()
"""

FLASH_OFF = """
for block in model.transformer.h:
    block.attn.flash = False
    block.attn.dropout = 0.9
"""

PRE_HOOKS = """
def add_the_past(module, args):
    (x,) = args
    return (x + x.cumsum(dim=1),)

for block in model.transformer.h:
    block.register_forward_pre_hook(add_the_past)
    block.attn.register_forward_pre_hook(add_the_past)
"""

SHARED_LAYER = """
model.transformer.h[1] = model.transformer.h[0]
"""

APPENDED_LAYER = """
import copy
model.transformer.h.append(copy.deepcopy(model.transformer.h[1]))
"""

PATCHES = {
    'attn of an instance': ATTN_OF_AN_INSTANCE,
    'attn of the class': ATTN_OF_THE_CLASS,
    'another attn': ANOTHER_ATTN,
    'Block of the class': BLOCK_CLASS,
    'Block of an instance': BLOCK_INSTANCE,
    'GPT of the class': GPT_CLASS,
    'Attention of the class': ATTENTION_CLASS,
    'squared weights': SQUARED_WEIGHTS,
    'flash off': FLASH_OFF,
    'pre-hooks': PRE_HOOKS,
    'shared layer': SHARED_LAYER,
    'appended layer': APPENDED_LAYER,
}
# in train.py
ACCELERATE = ('kernels.accelerate(model, device_type, dtype)'
              '  # faster parts, except those that you changed\n')


@pytest.mark.parametrize('place', ['before', 'after'])
@pytest.mark.parametrize('name', PATCHES)
def test_patches_in_train_py(name, place, char_data, tmp_path):
    patch = PATCHES[name]
    code = patch + ACCELERATE if place == 'before' else ACCELERATE + patch
    sources = Sources(tmp_path, ('train.py', ACCELERATE, code))
    plain = PlainRun(sources.load_model(), char_data)
    torch.manual_seed(0)  # what the patch draws must not matter
    exec(patch, dict(model=plain.model, torch=torch))
    plain.optimizer = plain.model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    plain.train(4)
    unpatched = PlainRun(load_unedited_model(), char_data).train(4)
    assert max(abs(a - b) for a, b in zip(plain.losses, unpatched.losses)) > 1e-3, 'no effect'
    _, _, losses = sources.train(char_data, 'out', '--max_iters=4', '--eval_interval=4')
    assert losses == pytest.approx(plain.losses, rel=1e-4)


def test_attention_weights_read_by_a_hook_in_train_py(char_data, tmp_path):
    patch = """
def print_rows(module, args, output):
    att, = args
    print('rows', *att.shape, round(att.sum(dim=-1).mean().item(), 4))

for block in model.transformer.h:
    block.attn.flash = False
    block.attn.attn_dropout.register_forward_hook(print_rows)
"""
    sources = Sources(tmp_path, ('train.py', ACCELERATE, patch + ACCELERATE))
    out, _, losses = sources.train(char_data, 'out', '--max_iters=2', '--eval_interval=2')
    assert losses == pytest.approx(PlainRun(sources.load_model(), char_data).train(2).losses)
    # two evaluations of 4 batches of two splits, and two iterations of two micro-steps
    assert out.count('rows 4 2 32 32 1.0\n') == out.count('rows') == 2 * (2 * 8 + 2 * 2)


@pytest.mark.parametrize('place', ['no', 'before', 'after', 'after, and recomputing'])
@pytest.mark.parametrize('name', PATCHES)
def test_patches_of_a_model(name, place, tmp_path):
    """The losses are in bfloat16: then the faster attention is in use."""
    patch, sources = PATCHES[name], Sources(tmp_path)
    unpatched = make_model(sources.load_model())
    plain = make_model(sources.load_model())
    exec(patch, dict(model=plain, torch=torch))
    model = make_model(sources.load_model())
    if place.startswith('after'):  # float32: the residual stream keeps its width
        kernels.accelerate(model, 'cpu', 'float32')
    if place.endswith('recomputing'):
        kernels.recompute_blocks(model)
    exec(patch, dict(model=model, torch=torch))
    if place == 'before':
        kernels.accelerate(model, 'cpu', 'float32')
    unpatched_loss = compute_loss(unpatched, torch.bfloat16)
    expected_loss = compute_loss(plain, torch.bfloat16)
    assert abs(expected_loss - unpatched_loss) > 0.005 * unpatched_loss, 'no effect'
    loss = compute_loss(model, torch.bfloat16)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    expected = continue_greedily(plain, make_prompt())
    assert torch.equal(model.eval().generate(make_prompt(), 40, temperature=0), expected)


# -----------------------------------------------------------------------------
# a subclass of GPT, in train.py and in sample.py
IMPORT = 'from model import GPT, GPTConfig\n'
SUBCLASS = """
import model as original
from model import GPTConfig

class GPT(original.GPT):
    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        logits = logits + 0.5 * logits.roll(1, dims=-1)
        if targets is not None:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss
"""


def test_forward_of_a_subclass(char_data, tmp_path):
    code = f'{SUBCLASS}\n'
    sources = Sources(tmp_path, ('train.py', IMPORT, code), ('sample.py', IMPORT, code))
    space = dict(torch=torch)
    exec(SUBCLASS, space)
    plain = PlainRun(types.SimpleNamespace(**space), char_data).train(4)
    sources.train(char_data, 'out', '--max_iters=2', '--eval_interval=2')
    _, _, losses = sources.train(char_data, 'out', '--max_iters=4', '--eval_interval=2',
                                 '--init_from=resume')
    assert losses == pytest.approx(plain.losses, rel=1e-4)
    unedited = PlainRun(load_unedited_model(), char_data).train(4)
    assert losses != pytest.approx(unedited.losses, rel=1e-3)
    check_sampling(sources, plain, caches=True)


# -----------------------------------------------------------------------------
# hooks while generating
def push(module, args, x):
    """A steering vector."""
    return x + torch.linspace(-2, 2, x.size(-1))


def push_later(module, args, x):
    """All but the first of the positions that the module sees."""
    return torch.cat((x[:, :1], -x[:, 1:]), dim=1)


def push_outputs(module, args, output):
    logits, loss = output
    return push(module, args, logits), loss


@pytest.mark.parametrize('is_accelerated', [False, True])
@pytest.mark.parametrize('path, hook', [
    ('transformer.h.0', push), ('transformer.h.0', push_later), ('transformer.h.1.mlp', push),
    ('transformer.h.0.attn', push), ('transformer.h.0.attn.c_attn', push_later),
    ('transformer.h.1.mlp.gelu', push), ('transformer.drop', push_later),
    ('transformer.wte', push), ('transformer.ln_f', push), ('lm_head', push), ('', push_outputs)])
def test_hooks_that_change_activations(path, hook, is_accelerated, tmp_path, capsys):
    inference.note_once.cache_clear()
    model, prompt = make_model(Sources(tmp_path).load_model()), make_prompt()
    unhooked = continue_greedily(model, prompt)
    if is_accelerated:
        kernels.accelerate(model, 'cpu', 'float32')
    handle = model.get_submodule(path).register_forward_hook(hook)
    expected = continue_greedily(model, prompt)
    assert not torch.equal(expected, unhooked)
    for _ in range(2):
        assert torch.equal(model.generate(prompt, 40, temperature=0), expected)
    line = capsys.readouterr().err
    assert line.startswith('this model generates without a KV cache: it has a hook')
    assert line.count('\n') == 1
    handle.remove()
    assert torch.equal(model.generate(prompt, 40, temperature=0), unhooked)
    assert 'without a KV cache' not in capsys.readouterr().err
