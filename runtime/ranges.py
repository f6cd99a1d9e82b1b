"""
What the values of the settings may be: ranges, choices and combinations.
"""
# (what a value must be, the test of it, the settings)
RANGES = (
    ('at least 1', lambda v: v >= 1, (
        'n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps',
        'eval_interval', 'log_interval', 'max_bad_steps', 'num_samples', 'max_bytes', 'repeats')),
    ('at least 0', lambda v: v >= 0, (
        'max_iters', 'warmup_iters', 'lr_decay_iters', 'save_interval', 'eval_iters', 'bigrams',
        'weight_decay', 'grad_clip', 'learning_rate', 'min_lr', 'rope_base', 'embd_conv',
        'max_new_tokens', 'top_k', 'temperature', 'num_proc')),
    ('at least 0 and below 2**64', lambda v: 0 <= v < 2 ** 64, ('seed',)),
    ('at least 0 and below 1', lambda v: 0 <= v < 1, ('dropout', 'beta1', 'beta2', 'momentum')),
    ('above 0 and at most 1', lambda v: 0 < v <= 1, ('top_p', 'decay_share')),
)
CHOICES = {
    'parallel': ('ddp', 'zero1', 'fsdp'), 'moments_dtype': ('float32', 'bfloat16'),
    'optim': ('adamw', 'muon'), 'lr_schedule': ('cosine', 'wsd'),
    'data_order': ('random', 'epochs'), 'format': ('text', 'jsonl'),
    'what': ('train', 'data', 'prefill', 'decode', 'run', 'start'),
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'), 'compile': ('auto', True, False),
}


def find_mistakes(config):
    """What is wrong with the values, as a list of texts."""
    mistakes = []
    wrong_names = set()
    for name, choices in CHOICES.items():
        if name in config and config[name] not in choices:
            mistakes.append(f'{name}={config[name]!r} is not known '
                            f'(use {", ".join(map(str, choices[:-1]))} or {choices[-1]})')
    for requirement, is_allowed, names in RANGES:
        for name in names:
            if name in config and not is_allowed(config[name]):
                wrong_names.add(name)
                mistakes.append(f'{name}={config[name]} must be {requirement}')
    if {'n_embd', 'n_head'} <= config.keys() - wrong_names:
        n_embd, n_head = config['n_embd'], config['n_head']
        if n_embd % n_head:
            suggestion = max(1, round(n_embd / n_head)) * n_head
            mistakes.append(f'n_embd={n_embd} is not divisible by n_head={n_head} '
                            f'(try --n_embd={suggestion})')
        elif config.get('rope_base') and n_embd // n_head % 2:
            mistakes.append('rotary positions need heads of an even size, '
                            f'not n_embd={n_embd} / n_head={n_head} (try another --n_head)')
    if config.get('optim') == 'muon' and config.get('parallel') == 'zero1':
        mistakes.append('optim=muon does not work with parallel=zero1 '
                        '(use --parallel=ddp or fsdp)')
    if config.get('moments_dtype') == 'bfloat16':
        if config.get('optim') == 'muon':
            mistakes.append('optim=muon does not work with moments_dtype=bfloat16')
        # a resumed run has the checkpoint's beta2, which restore.py checks
        if config.get('beta2', 0) > 0.99 and config.get('init_from') != 'resume':
            mistakes.append(f'moments in bfloat16 stand still with beta2={config["beta2"]} '
                            '(use 0.99 or less, or --moments_dtype=float32)')
    return mistakes
