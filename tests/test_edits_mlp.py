"""Edits of the MLP, of the block and of dropout take effect everywhere."""
import numpy as np
import pytest
import torch
from conftest import metrics
from edits import (
    ACCELERATE,
    IMPORT,
    LAST_NORM,
    LAYER,
    LM_HEAD,
    LOOP,
    RUN_LAYERS,
    UPDATE,
    PlainRun,
    Sources,
    check_export,
    check_model_edit,
    check_sampling,
    load_unedited_model,
)
from torch.nn import functional as F

# places in model.py
HIDDEN = '        x = self.gelu(self.c_fc(x))  # (B, T, 4C)\n'
FC = '        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)\n'
PROJECTION = '        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)\n'
GELU = "        gelu = nn.GELU(approximate=get_option(config, 'gelu'))\n"
GELU_FIELD = "    gelu: str = 'none'"
MLP = '        self.mlp = MLP(config)\n'
LAYERS = "nn.ModuleList(Block(config) for _ in range(config.n_layer))"

SWIGLU = [
    (FC, FC + FC.replace('c_fc', 'c_gate')),
    (HIDDEN, '        x = F.silu(self.c_gate(x)) * self.c_fc(x)\n')]

SILU = (GELU, '        gelu = nn.SiLU()\n')

SINE = (HIDDEN, '        x = torch.sin(8 * self.c_fc(x))\n')

EXPERTS = [
    ('class Block', '''class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.n_embd, 2, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(2))

    def forward(self, x):
        weights = (50 * self.router(x)).softmax(dim=-1)
        return weights[..., :1] * self.experts[0](x) + weights[..., 1:] * self.experts[1](x)


class Block'''),
    (MLP, '        self.mlp = Experts(config)\n')]

# to train, each token goes to one expert, which the batch's other tokens don't change
HARD_EXPERTS = [(EXPERTS[0][0], EXPERTS[0][1].replace(
    '        return weights', '''\
        chosen = weights.argmax(dim=-1, keepdim=True)
        weights = weights * F.one_hot(chosen[..., 0], 2)
        return weights''')), EXPERTS[1]]

WIDER = [(old, old.replace('4 * config', '8 * config')) for old in (FC, PROJECTION)]

PARALLEL = (LAYER, '        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))\n')

MLP_FIRST = (LAYER, '''
        x = x + self.mlp(self.ln_2(x))
        return x + self.attn(self.ln_1(x))
''')

RESIDUAL_SCALING = (LAYER, LAYER.replace('x + self.', '0.5 * x + 2 * self.'))

LAYER_SCALE = [
    (MLP, MLP + '        self.scale = nn.Parameter(torch.full((config.n_embd,), 0.1))\n'),
    (LAYER, LAYER.replace('self.mlp(', 'self.scale * self.mlp('))]

LAYER_DROP = (LAYER, '''
        if self.training and torch.rand(()) < 0.4:
            return x
''' + LAYER)

SHARED = (LAYERS, 'nn.ModuleList([Block(config)] * config.n_layer)')

TWICE = (RUN_LAYERS, '''
        for block in self.transformer.h:
            x = block(block(x))
''')

SKIP_TO_THE_END = (RUN_LAYERS, '        embedding = x\n' + RUN_LAYERS + '''
        x = x + embedding
''')

NOISE = (HIDDEN, HIDDEN + '''
        if self.training:
            x = x + 0.3 * torch.randn_like(x)
''')

MULTIPLIER = [
    (LM_HEAD, LM_HEAD + '        self.multiplier = nn.Parameter(torch.tensor(3.0))\n'),
    (LAST_NORM, '        x = self.transformer.ln_f(x) * self.multiplier\n')]

PROMPT_TUNING = [
    (LM_HEAD, LM_HEAD + '        self.prompt = nn.Parameter(torch.randn(3, config.n_embd))\n'),
    (RUN_LAYERS, '''
        x = torch.cat((self.prompt.expand(len(x), -1, -1), x), dim=1)
''' + RUN_LAYERS + '        x = x[:, 3:]\n')]

SHARED_MLP = ('            x = block(x)\n', '''
            x = x + block.attn(block.ln_1(x))
            x = x + self.transformer.h[0].mlp(block.ln_2(x))
''')

SAME_MLP = (LM_HEAD, LM_HEAD + '''
        for block in self.transformer.h:
            block.mlp = self.transformer.h[0].mlp
''')

LARGE_WEIGHTS = ('            nn.init.normal_(module.weight, mean=0.0, std=0.02)\n',
                 '            nn.init.orthogonal_(module.weight)\n')

SHALLOW_EVALUATION = (RUN_LAYERS, RUN_LAYERS.replace('.h:', '.h[:1 + self.training]:'))

# each expert chooses half of the tokens: Zhou et al. 2022, https://arxiv.org/abs/2202.09368
EXPERT_CHOICE = [(EXPERTS[0][0], EXPERTS[0][1].replace(
    '        return weights', '''\
        limits = weights.median(dim=1, keepdim=True).values
        weights = weights.masked_fill(weights < limits, 0.0)
        return weights''')), EXPERTS[1]]

# Shazeer et al. 2017, https://arxiv.org/abs/1701.06538
BALANCED_EXPERTS = [
    (EXPERTS[0][0], EXPERTS[0][1].replace('        return weights', '''\
        self.balance_loss = weights.mean(dim=(0, 1)).square().sum()
        return weights''')),
    EXPERTS[1],
    ('        return self.loss_head(self.lm_head, x, targets)\n', '''
        logits, loss = self.loss_head(self.lm_head, x, targets)
        return logits, loss + 2 * sum(block.mlp.balance_loss for block in self.transformer.h)
''')]

# Peng et al. 2023, https://arxiv.org/abs/2305.13048
TOKEN_SHIFT = (HIDDEN, '        x = (x + F.pad(x, (0, 0, 1, -1))) / 2\n' + HIDDEN)

WARM_UP = [
    (FC, FC + "        self.register_buffer('steps', torch.zeros(()))\n"),
    (HIDDEN, HIDDEN + '''
        self.steps += self.training
        x = x * self.steps / 3
''')]

OWN_DROPOUT = [
    ('class SquaredReLU', '''class Dropout(nn.Dropout):
    def forward(self, x):
        keeps = torch.rand_like(x) < 0.7
        return x * keeps if self.training else 0.7 * x


class SquaredReLU'''),
    (PROJECTION, PROJECTION + '        self.dropout2 = Dropout()\n'),
    (HIDDEN, '        x = self.dropout2(self.gelu(self.c_fc(x)))\n')]

# Hu et al. 2021, https://arxiv.org/abs/2106.09685
LOW_RANK = [
    ('        self.rotary = ', '''\
        self.c_attn.requires_grad_(False)
        self.lora_a = nn.Linear(config.n_embd, 4, bias=False)
        self.lora_b = nn.Linear(4, 3 * config.n_embd, bias=False)
        self.rotary = '''),
    ('self.c_attn(x).view(', '(self.c_attn(x) + 100 * self.lora_b(self.lora_a(x))).view(')]

FROZEN_EMBEDDING = (LM_HEAD, LM_HEAD + '        self.transformer.wte.requires_grad_(False)\n')

# {name: (edits, whether GPT-2's format can express the model, whether a cache fits)}
CASES = {
    'SwiGLU': (SWIGLU, False, True),
    'SiLU': ([SILU], False, True),
    'sine': ([SINE], False, True),
    'two experts': (EXPERTS, False, True),
    'one of two experts': (HARD_EXPERTS, False, True),
    'wider': (WIDER, False, True),
    'parallel block': ([PARALLEL], False, True),
    'MLP first': ([MLP_FIRST], False, True),
    'residual scaling': ([RESIDUAL_SCALING], False, True),
    'layer scale': (LAYER_SCALE, False, True),
    'layer drop': ([LAYER_DROP], True, True),
    'one block for all layers': ([SHARED], True, False),
    'each block twice': ([TWICE], False, False),
    'skip to the end': ([SKIP_TO_THE_END], False, True),
    'noise': ([NOISE], True, True),
    'output multiplier': (MULTIPLIER, False, True),
    'prompt tuning': (PROMPT_TUNING, False, False),
    'one MLP for all layers, in GPT': ([SHARED_MLP], False, True),
    'one MLP for all layers': ([SAME_MLP], True, True),
    'other initial weights': ([LARGE_WEIGHTS], True, True),
    'experts that choose tokens': (EXPERT_CHOICE, False, False),
    'two experts with a balance loss': (BALANCED_EXPERTS, False, True),
    'token shift': ([TOKEN_SHIFT], False, False),
    'a buffer that counts steps': (WARM_UP, False, True),
    'another dropout': (OWN_DROPOUT, False, True),
    'low-rank weights': (LOW_RANK, False, True),
    'frozen embedding': ([FROZEN_EMBEDDING], True, True),
}


@pytest.mark.parametrize('name', CASES)
def test_edits_of_mlp_and_block(name, char_data, tmp_path):
    edits, exports, caches = CASES[name]
    check_model_edit(tmp_path, char_data, *edits, exports=exports, caches=caches)


def test_layer_drop_of_all_micro_steps(char_data, tmp_path):
    """In an update without a gradient for some weights, AdamW leaves these weights alone."""
    always = (LAYER, LAYER_DROP[1].replace('torch.rand(()) < 0.4', 'True'))
    plain = check_model_edit(tmp_path, char_data, always, exports=True, caches=True)
    assert plain.model.transformer.h[0].mlp.c_fc.weight not in plain.optimizer.state


def test_fewer_layers_in_evaluation(char_data, tmp_path):
    """In training it is the unedited model."""
    plain = check_model_edit(tmp_path, char_data, SHALLOW_EVALUATION, caches=True, effect=-1)
    unedited = PlainRun(load_unedited_model(), char_data)
    unedited.model.load_state_dict(plain.model.state_dict())
    assert abs(plain.evaluate() - unedited.evaluate()) > 1e-3, 'no effect'


def test_a_third_power_in_place_of_the_squared_relu(char_data, tmp_path):
    edit = ('F.relu(x).square()', '30 * F.relu(x) ** 3')
    check_model_edit(tmp_path, char_data, edit, caches=True, relu2=True)


@pytest.mark.parametrize('edit', [
    (GELU, "        gelu = nn.GELU(approximate='tanh')\n"),
    (HIDDEN, "        x = F.gelu(self.c_fc(x), approximate='tanh')\n"),
    (GELU_FIELD, "    gelu: str = 'tanh'")], ids=['module', 'function', 'default'])
def test_tanh_gelu(edit, char_data, tmp_path):
    """The two forms of GELU differ so little that the losses may be the same."""
    is_option = edit[0] == GELU_FIELD
    plain = check_model_edit(tmp_path, char_data, edit, exports=True, caches=True, effect=-1)
    mlp = plain.model.transformer.h[0].mlp
    x = 10 * torch.randn(1, 5, 32)
    tanh_output = mlp.c_proj(F.gelu(mlp.c_fc(x), approximate='tanh'))
    torch.testing.assert_close(mlp(x), tanh_output, rtol=1e-6, atol=1e-7)
    assert (mlp(x) - mlp.c_proj(F.gelu(mlp.c_fc(x)))).abs().max() > 1e-5
    for block in plain.model.transformer.h:  # away from 0 the two differ in the logits, too
        block.mlp.c_fc.weight.data *= 10
    folder = tmp_path / 'large'
    folder.mkdir()
    check_export(str(folder), plain, exports=is_option)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['layer drop', 'noise'])
def test_random_edits_with_recomputed_activations(name, dtype, char_data, tmp_path):
    """The backward pass computes each block again, and must draw the same numbers."""
    sources = Sources(tmp_path, *(('model.py', old, new) for old, new in CASES[name][0]))
    flags = ['--max_iters=3', f'--dtype={dtype}']
    _, _, losses = sources.train(char_data, 'out', *flags)
    _, _, recomputed_losses = sources.train(char_data, 'recomputed', *flags,
                                            '--activation_checkpointing=True')
    np.testing.assert_allclose(recomputed_losses, losses, rtol=1e-5)


# -----------------------------------------------------------------------------
# in train.py
RECOMPUTE = 'if activation_checkpointing:\n'
REMOVE_DROPOUT = '''for parent in list(model.modules()):
    for name, child in parent.named_children():
        if isinstance(child, torch.nn.Dropout):
            setattr(parent, name, torch.nn.Identity())
'''


@pytest.mark.parametrize('place', [ACCELERATE, RECOMPUTE, LOOP],
                         ids=['before', 'after', 'at the loop'])
def test_dropout_replaced_in_train_py(place, char_data, tmp_path):
    """Before accelerate() and after it."""
    check_train_edit(tmp_path, char_data, (place, REMOVE_DROPOUT + place))


TURN_OFF = '''for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
'''
EVAL_MODE = '''    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
'''


@pytest.mark.parametrize('place, code', [
    (ACCELERATE, TURN_OFF), (LOOP, TURN_OFF), (UPDATE, EVAL_MODE)],
    ids=['before', 'at the loop', 'in the loop'])
def test_dropout_turned_off_in_train_py(place, code, char_data, tmp_path):
    check_train_edit(tmp_path, char_data, (place, code + place))


def test_dropout_patched_in_train_py(char_data, tmp_path):
    """The dropout within torch's attention isn't F.dropout, so attention is written out here."""
    patch = IMPORT + '''
import torch.nn.functional
torch.nn.functional.dropout = lambda x, p=0.5, training=True, inplace=False: x
'''
    written_out = ('self.flash = True', 'self.flash = False')
    check_train_edit(tmp_path, char_data, (IMPORT, patch), model_edits=[written_out])


def check_train_edit(folder, data_dir, *edits, model_edits=()):
    """Checks that edits of train.py turn off dropout: the losses are those without it."""
    sources = Sources(folder, *(('train.py', old, new) for old, new in edits),
                      *(('model.py', old, new) for old, new in model_edits))
    _, _, losses = sources.train(data_dir, 'out', '--max_iters=4', '--eval_interval=4',
                                 '--dropout=0.4')
    plain = PlainRun(load_unedited_model(), data_dir).train(4)
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    with_dropout = PlainRun(load_unedited_model(), data_dir, dropout=0.4).train(4)
    assert max(abs(a - b) for a, b in zip(losses, with_dropout.losses)) > 1e-3, 'no effect'
    val_loss = metrics(f'{folder}/out', 'eval')[-1]['val/loss']
    np.testing.assert_allclose(val_loss, plain.evaluate(), rtol=1e-4)


FREEZE = {
    'embedding': 'raw_model.transformer.wte.requires_grad_(False)',
    'first layer': 'raw_model.transformer.h[0].requires_grad_(False)',
    'all but the last norm': '''for name, p in raw_model.named_parameters():
    p.requires_grad = name == 'transformer.ln_f.weight'
''',
}


@pytest.mark.parametrize('name', FREEZE)
def test_weights_frozen_in_train_py(name, char_data, tmp_path):
    """A resumed run freezes them again, and its optimizer has the state of the others."""
    place = 'optimizer = raw_model.configure_optimizers('
    sources = Sources(tmp_path, ('train.py', place, f'{FREEZE[name]}\n{place}'))
    plain = PlainRun(load_unedited_model(), char_data)
    start = {key: weight.clone() for key, weight in plain.model.state_dict().items()}
    exec(FREEZE[name], {'raw_model': plain.model})
    plain.optimizer = plain.model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), 'cpu')
    plain.train(4)
    sources.train(char_data, 'out', '--max_iters=2', '--eval_interval=2')
    _, _, losses = sources.train(char_data, 'out', '--max_iters=4', '--eval_interval=2',
                                 '--init_from=resume')
    np.testing.assert_allclose(losses, plain.losses, rtol=1e-4)
    unedited = PlainRun(load_unedited_model(), char_data).train(4)
    assert max(abs(a - b) for a, b in zip(losses, unedited.losses)) > 1e-3, 'no effect'
    check_sampling(sources, plain, caches=True)  # it loads the weights of the run
    params = dict(plain.model.named_parameters())
    for key, p in params.items():
        assert torch.equal(p, start[key]) == (not p.requires_grad), key
    assert {p.requires_grad for p in params.values()} == {False, True}
