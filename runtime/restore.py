"""
Builds a model and an optimizer from what a file has.
"""
from dataclasses import MISSING, fields

import torch
from torch.overrides import TorchFunctionMode

from runtime.console import fail, get_first_line, say
from runtime.distributed import get_local_optimizer, shard_like
from runtime.optimizers import LowMemoryAdamW, Muon

# the settings for model options that nanoGPT's model doesn't have, and their defaults
OPTIONS = dict(rope_base=0.0, qk_norm=False, relu2=False, tied=True, bigrams=0, embd_conv=0)


def build_model(model_class, config_class, state, path, dropout=0.0, dtype=torch.float32):
    """The model of a checkpoint that load() has read from path; fails if its parts don't fit.

    The weights are copied out of the file, which may change or disappear.
    """
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in state['model'].items()}
    try:
        args = {**state['model_args'], 'dropout': dropout}
        if state.get('gelu', 'none') != 'none':
            args['gelu'] = state['gelu']
        check_types(args, config_class)
        if args.get('rope_base', 0) < 0:
            raise ValueError('its rope_base is negative')
        return assemble(model_class, config_class(**args), weights)
    except (AssertionError, TypeError, ValueError, RuntimeError) as e:
        reason = ' '.join(str(e).split())[:300]  # load_state_dict names the weights in later lines
        fail(f'{path} is not a readable checkpoint: {reason}', 'use another one')


def check_types(args, config_class):
    """ValueError if an argument isn't a field of the config, or has another type."""
    kinds = {field.name: type(field.default) for field in fields(config_class)
             if field.default is not MISSING}
    for key, value in args.items():
        kind = kinds.get(key)
        allowed_types = (float, int) if kind is float else (kind,)
        if type(value) not in allowed_types and not (key == 'bias' and kind):
            raise ValueError(f'this model has no option {key} of type {type(value).__name__}')


def choose_args(config_class, config):
    """The arguments of the model's config: all settings in config that are fields of it.

    Fails if a setting asks for an option that the model doesn't have.
    """
    names = {field.name for field in fields(config_class)}
    options = [f'{name}={config[name]}' for name, default in OPTIONS.items()
               if name not in names and config[name] != default]
    if options:
        fail(f'the GPTConfig of this model.py has no {", ".join(options)}', 'leave that out')
    return {name: config[name] for name in names if name in config}


def load_pretrained(model_class, init_from, dropout=0.0, dtype=torch.float32):
    """model_class.from_pretrained() with weights in dtype, without a wider copy of them."""
    torch.set_default_dtype(dtype)
    try:
        return model_class.from_pretrained(init_from, dict(dropout=dropout))
    except AssertionError as e:  # nanoGPT's own model.py knows only four names
        fail(f'this model.py cannot load {init_from!r} ({get_first_line(e)})',
             'use gpt2, gpt2-medium, gpt2-large or gpt2-xl')
    finally:
        torch.set_default_dtype(torch.float32)


def assemble(model_class, config, weights):
    """model_class(config) with these tensors as its weights, without a copy.

    Nothing is initialized to be overwritten. RuntimeError if names or shapes don't fit.
    """
    with torch.device('meta'), SkipInit():
        model = model_class(config)
    names_by_id = {}  # one tensor may have several names
    for name, p in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(p), []).append(name)
    model.load_state_dict(weights, assign=True)
    for first_name, *other_names in names_by_id.values():
        for name in other_names:
            module, _, attribute = name.rpartition('.')
            setattr(model.get_submodule(module), attribute, model.get_parameter(first_name))
    return model


class SkipInit(TorchFunctionMode):
    """Skips the functions of nn.init, which on meta tensors only import torch._dynamo, for 1 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return (kwargs or {}).get('tensor', args[0] if args else None)
        return func(*args, **(kwargs or {}))


def fit_block_size(model, block_size, init_from):
    """Shortens the model's longest context to block_size; fails if it is shorter than that."""
    max_block_size = model.config.block_size
    if block_size > max_block_size:
        fail(f'block_size={block_size} is larger than the {max_block_size} of {init_from}',
             f'use --block_size={max_block_size} or less')
    if block_size < max_block_size:
        model.crop_block_size(block_size)


def load_optimizer(optimizer, scaler, checkpoint, path, config):
    """Puts the optimizer's and the GradScaler's state of a checkpoint where they belong.

    path is the checkpoint's file. Of the optimizer's settings only weight_decay, betas and
    momentum are used, and a line says so if config has others. The rest says how an update is
    computed on a device, not what it is. If block_size has cut the table of positions, its moments
    are cut, too.
    """
    if 'scaler' in checkpoint:
        scaler.load_state_dict(checkpoint['scaler'])
    state = checkpoint.get('optimizer')
    if state is None:
        fail(f'{path} has no optimizer state', 'you can sample from it, but not resume it')
    local_optim = get_local_optimizer(optimizer)
    is_known = type(local_optim) in (torch.optim.AdamW, LowMemoryAdamW, Muon)
    if not is_known or optimizer.param_groups[0].get('amsgrad'):
        return load_other_optimizer(optimizer, state, path)
    params = [p for group in optimizer.param_groups for p in group['params']]
    local_params = {p for group in local_optim.param_groups for p in group['params']}
    muon_params = {p for group in optimizer.param_groups if 'momentum' in group
                   for p in group['params']}
    moments_dtype = getattr(local_optim, 'moments_dtype', torch.float32)
    try:
        if len(state['param_groups']) != len(optimizer.param_groups):
            raise ValueError('it is of another --optim')
        for saved_group, group in zip(state['param_groups'], optimizer.param_groups):
            group['weight_decay'] = float(saved_group['weight_decay'])
            beta1, beta2 = map(float, saved_group['betas'])
            group['betas'] = (beta1, beta2)
            if 'momentum' in group:
                group['momentum'] = float(saved_group['momentum'])
        for i, p in enumerate(params if state['state'] else []):  # empty before the first update
            moments = {key: value[:len(p)] if value.dim() else value
                       for key, value in state['state'][i].items()}
            shapes = {'step': (), 'exp_avg': p.shape, 'exp_avg_sq': p.shape}
            if p in muon_params:
                shapes = {'momentum_buffer': p.shape}
            if {key: value.shape for key, value in moments.items()} != shapes:
                raise ValueError(f'it has other moments for a weight of shape {(*p.shape,)}')
            if p not in local_params:
                continue
            local_optim.state[p] = {}
            for key, value in moments.items():
                dtype = moments_dtype if value.dim() else torch.float32
                value = value.to(p.device, dtype, copy=True)  # the file may change or disappear
                local_optim.state[p][key] = shard_like(value, p)
    except Exception as e:  # it may have anything in it
        fail(f'the optimizer state in {path} does not fit its weights ({get_first_line(e)})',
             'use the --optim of that run, or another checkpoint')
    beta2 = optimizer.param_groups[0]['betas'][1]
    if moments_dtype == torch.bfloat16 and beta2 > 0.99:
        fail(f'moments in bfloat16 stand still with beta2={beta2}, which {path} has',
             'use --moments_dtype=float32')
    print_overruled(optimizer, config)


def load_other_optimizer(optimizer, state, path):
    """load_optimizer() for an optimizer that somebody has put into configure_optimizers.

    It goes by the optimizer's own load_state_dict(), which takes the settings of its groups, too.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    params = [p for group in groups for p in group['params']]
    try:
        states = {}
        for i, values in state['state'].items():
            states[i] = {key: fit_value(value, params[i]) for key, value in values.items()}
        optimizer.load_state_dict({**state, 'state': states})
        for old_group, group in zip(groups, optimizer.param_groups):
            missing_keys = set(old_group) - set(group)
            if missing_keys:
                raise ValueError(f'it has no {", ".join(sorted(missing_keys))}')
            for key in ('foreach', 'fused', 'capturable'):  # how it is computed here, not what
                if key in old_group:
                    group[key] = old_group[key]
    except Exception as e:  # it may have anything in it
        fail(f'the optimizer state in {path} does not fit {type(optimizer).__name__} '
             f'({get_first_line(e)})', 'use the optimizer of that run, or another checkpoint')


def fit_value(value, parameter):
    """A copy of a value in the optimizer's state, cut and sharded as its parameter is."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == parameter.dim() > 0 and value.shape[1:] == parameter.shape[1:]:
        value = value[:len(parameter)]  # block_size has cut the table of positions
    value = value.clone()  # the file may change or disappear
    return shard_like(value, parameter) if value.shape == parameter.shape else value


def print_overruled(optimizer, config):
    """Prints which settings of the optimizer come from the checkpoint instead of the config."""
    group = optimizer.param_groups[0]
    momentum = optimizer.param_groups[-1].get('momentum')
    config_values = config['weight_decay'], (config['beta1'], config['beta2'])
    values = group['weight_decay'], group['betas']
    if values == config_values and momentum in (None, config['momentum']):
        return
    text = f'weight_decay={group["weight_decay"]}, betas={group["betas"]}'
    if momentum is not None:
        text += f', momentum={momentum}'
    say(f'{text} come from the checkpoint, not from the settings')
