"""
What generating with CTranslate2 costs: a GPT-2 with random weights, converted from transformers.

    pip install ctranslate2==4.8.5 transformers==5.24.0
    python recipes/peers/ct2.py --compute_type=int8 --num_samples=10

It uses all CPU cores. The last line is JSON. With --turns=True it measures once for each line on
stdin, as bench.py --compare="..." wants it.
"""
import json
import os
import sys
import tempfile
import time

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from runtime import memory, settings
from runtime.console import ROOT

compute_type = 'int8'  # float32 | int8
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
num_samples = 1  # sequences at once
max_new_tokens = 100  # tokens per sequence
turns = False  # measure once for each line on stdin
exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())

settings.check(config)


def build():
    """The generator of CTranslate2, whose tokens are named t0, t1, ..."""
    torch.manual_seed(1337)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer,
        n_head=n_head, bos_token_id=0, eos_token_id=0))
    words = WordLevel({f't{i}': i for i in range(vocab_size)}, unk_token='t0')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token='t0',
                                        eos_token='t0', unk_token='t0')
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f'{folder}/hf')
        tokenizer.save_pretrained(f'{folder}/hf')
        converter = ctranslate2.converters.TransformersConverter(f'{folder}/hf')
        converter.convert(f'{folder}/ct2', quantization=compute_type)
        return ctranslate2.Generator(f'{folder}/ct2', 'cpu', compute_type=compute_type,
                                     intra_threads=os.cpu_count())


generator = build()
rng = np.random.default_rng(1337)
prompts = [[f't{i}' for i in rng.integers(vocab_size, size=16)] for _ in range(num_samples)]


def generate():
    """Draws all the tokens."""
    return generator.generate_batch(
        prompts, max_length=max_new_tokens, min_length=max_new_tokens,
        sampling_topk=min(200, vocab_size), sampling_temperature=0.8, beam_size=1,
        include_prompt_in_result=False)


if not turns:
    generate()  # allocates
for _ in sys.stdin if turns else [None]:
    t0 = time.perf_counter()
    results = generate()
    seconds = time.perf_counter() - t0
    tokens = sum(len(result.sequences_ids[0]) for result in results)
    assert tokens == num_samples * max_new_tokens, tokens
    print(json.dumps(dict(what='decode', compute_type=compute_type, num_samples=num_samples,
                          tokens_per_s=tokens / seconds,
                          process_memory_bytes=memory.read_process_bytes())), flush=True)
