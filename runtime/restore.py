"""
Builds a model and an optimizer from what a file has.
"""
import math
from dataclasses import MISSING, fields

import torch
from torch.overrides import TorchFunctionMode

from runtime.checkpoint import is_finite
from runtime.console import fail, get_first_line, shorten, warn
from runtime.distributed import get_local_optimizer, shard_like
from runtime.optimizers import LowMemoryAdamW, Muon

# options of an optimizer that say how it computes on a device, not what
HOW = 'foreach', 'fused', 'capturable', 'differentiable'
# the settings for model options that nanoGPT's model doesn't have, and their defaults
OPTIONS = dict(rope_base=0.0, qk_norm=False, relu2=False, tied=True, bigrams=0, embd_conv=0)


def build_model(model_class, config_class, state, path, dropout=0.0, dtype=torch.float32):
    """The model of a checkpoint that load() has read from path; fails if its parts don't fit.

    The weights are copied out of the file, which may change or disappear.
    """
    weights = {}
    for name, tensor in state['model'].items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.to(kind, copy=True)
    try:
        args = {**state['model_args'], 'dropout': dropout}
        if state.get('gelu', 'none') != 'none':
            args['gelu'] = state['gelu']
        check_types(args, config_class)
        if args.get('rope_base', 0) < 0:
            raise ValueError('its rope_base is negative')
        model = assemble(model_class, config_class(**args), weights)
    except (AssertionError, TypeError, ValueError, RuntimeError) as e:
        # load_state_dict names the weights in later lines
        reason = shorten(' '.join(str(e).split()), 300)
        fail(f'{path} is not a readable checkpoint: {reason}',
             'use the model.py that made it, or another checkpoint')
    check_finite(model, path)
    return model


def check_types(args, config_class):
    """ValueError if an argument isn't a field of the config, or has another type."""
    kinds = {field.name: type(field.default) for field in fields(config_class)}
    for key, value in args.items():
        kind = kinds.get(key)
        allowed_types = (float, int) if kind is float else (kind,)
        if kind in (type(MISSING), type(None)):  # the field has no default that tells its type
            allowed_types = (bool, int, float, str, type(None))
        if type(value) not in allowed_types and not (key == 'bias' and kind):
            raise ValueError(f'this model has no option {key} of type {type(value).__name__}')
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'its {key} is {value}')


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
        model = model_class.from_pretrained(init_from, dict(dropout=dropout))
    except AssertionError as e:  # nanoGPT's own model.py knows only four names
        fail(f'this model.py cannot load {init_from!r} ({get_first_line(e)})',
             'use gpt2, gpt2-medium, gpt2-large or gpt2-xl')
    finally:
        torch.set_default_dtype(torch.float32)
    check_finite(model, init_from)
    return model


def assemble(model_class, config, weights):
    """model_class(config) with these tensors as its weights, without a copy.

    Nothing is initialized to be overwritten. RuntimeError if names or shapes don't fit. What the
    model computes when it is built, like a table of sines, is computed.
    """
    with SkipInit():
        model = model_class(config)
    names_by_id = {}  # one tensor may have several names
    for name, p in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(p), []).append(name)
    model.load_state_dict(weights, assign=True)
    for first_name, *other_names in names_by_id.values():
        for name in other_names:
            # NaN isn't equal to itself, and check_finite() reports it
            if not torch.equal(weights[first_name], weights[name]) and is_finite(weights[name]):
                raise RuntimeError(f'{name} is {first_name} in this model, but not in the file')
            module, _, attribute = name.rpartition('.')
            setattr(model.get_submodule(module), attribute, model.get_parameter(first_name))
    return model


class SkipInit(TorchFunctionMode):
    """Skips the functions of nn.init. The memory of a tensor that nothing writes to isn't taken."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return (kwargs or {}).get('tensor', args[0] if args else None)
        return func(*args, **(kwargs or {}))


def fit_block_size(model, block_size, init_from, eval_only=False):
    """Shortens the model's longest context to block_size; fails if it is shorter than that.

    A run that continues keeps its own: what is cut from its table of positions would be lost.
    """
    max_block_size = model.config.block_size
    name = 'this run' if init_from == 'resume' else init_from
    if block_size > max_block_size:
        fail(f'block_size={block_size} is larger than the {max_block_size} of {name}',
             f'use --block_size={max_block_size}')
    if block_size < max_block_size and init_from == 'resume' and not eval_only:
        fail(f'block_size={block_size} would cut the context of this run, which is '
             f'{max_block_size}, for good', f'use --block_size={max_block_size}')
    if block_size < max_block_size:
        model.crop_block_size(block_size)


def check_finite(model, path):
    """Fails if the model, read from path, has weights that are NaN or infinite."""
    for name, p in model.named_parameters():
        if not is_finite(p):
            fail(f'the weights in {path} are not finite ({name})', 'use an earlier checkpoint')


def load_optimizer(optimizer, scaler, checkpoint, path):
    """Puts the optimizer's and the GradScaler's state of a checkpoint where they belong.

    path is the checkpoint's file. Returns the options for which its values count, not the settings.
    """
    if checkpoint.get('scaler'):  # it is empty if the scaler was off
        scaler.load_state_dict(checkpoint['scaler'])
    state = checkpoint.get('optimizer')
    if not state:
        check_moments(optimizer)
        warn(f'{path} has no optimizer state, so the optimizer begins with none')
        return {}
    name = get_optimizer_name(optimizer)
    saved_name = checkpoint.get('optimizer_name', name)
    if saved_name.lower() != name.lower():  # a fork may write 'adamw'
        fail(f'{path} has the state of {saved_name}, but the optimizer is {name}',
             'use the optimizer of that run, or another checkpoint')
    groups = [dict(group) for group in optimizer.param_groups]
    is_known = type(get_local_optimizer(optimizer)) in (torch.optim.AdamW, LowMemoryAdamW, Muon)
    if is_known and not any(group.get('amsgrad') for group in groups):
        load_adamw(optimizer, state, path)
        check_moments(optimizer)
    else:
        load_other_optimizer(optimizer, state, path)
    return list_overruled(optimizer, groups)


def load_adamw(optimizer, state, path):
    """load_optimizer() for AdamW and Muon, and for parts of their state on several ranks.

    Of the optimizer's settings only weight_decay, betas and momentum are used. The rest says how an
    update is computed on a device, not what it is.
    """
    local_optim = get_local_optimizer(optimizer)
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
        for i, p in enumerate(params):
            if i not in state['state']:  # the weight had no gradient until now
                continue
            moments = state['state'][i]
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


def check_moments(optimizer):
    """Fails if AdamW's moments are in bfloat16, and beta2 is too close to 1 for that."""
    dtype = getattr(get_local_optimizer(optimizer), 'moments_dtype', torch.float32)
    beta2 = optimizer.param_groups[0].get('betas', (0, 0))[1]
    if dtype == torch.bfloat16 and beta2 > 0.99:
        fail(f'moments in bfloat16 stand still with beta2={beta2}, which this run has',
             'use --moments_dtype=float32')


def get_optimizer_name(optimizer):
    """The name for a checkpoint. AdamW may continue with moments of another dtype."""
    name = type(get_local_optimizer(optimizer)).__name__.removeprefix('LowMemory')
    if any(group.get('amsgrad') for group in optimizer.param_groups):
        name += ' with amsgrad'
    return name


def load_other_optimizer(optimizer, state, path):
    """load_optimizer() for an optimizer that somebody has put into configure_optimizers.

    It goes by the optimizer's own load_state_dict(), which takes the settings of its groups, too.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    params = [p for group in groups for p in group['params']]
    try:
        if 'state' not in state:  # it has a form of its own
            return optimizer.load_state_dict(state)
        states = {}
        for i, values in state['state'].items():
            states[i] = {key: copy_value(value, params[i]) for key, value in values.items()}
        optimizer.load_state_dict({**state, 'state': states})
        for i, values in states.items():  # torch casts all to the dtype of the weight
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and hasattr(optimizer, 'state'):
                    values_by_key = optimizer.state[params[i]]
                    values_by_key[key] = values_by_key[key].to(value.dtype)
        for old_group, group in zip(groups, optimizer.param_groups):
            missing_keys = set(old_group) - set(group)
            if missing_keys:
                raise ValueError(f'it has no {", ".join(sorted(missing_keys))}')
            for key in HOW:
                if key in old_group:
                    group[key] = old_group[key]
    except Exception as e:  # it may have anything in it
        fail(f'the optimizer state in {path} does not fit {type(optimizer).__name__} '
             f'({get_first_line(e)})', 'use the optimizer of that run, or another checkpoint')


def copy_value(value, parameter):
    """A copy of a value in the optimizer's state, sharded as its parameter is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.clone()  # the file may change or disappear
    return shard_like(value, parameter) if value.shape == parameter.shape else value


def list_overruled(optimizer, groups):
    """{option: value} of the optimizer's groups that had another value before it was loaded."""
    values = {}
    for old_group, group in zip(groups, optimizer.param_groups):
        for key in group:
            if key not in ('params', 'lr', 'initial_lr', *HOW) and group[key] != old_group.get(key):
                values[key] = group[key]
    return values
