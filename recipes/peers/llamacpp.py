"""
What generating with llama.cpp costs: a GPT-2 with random weights, in a GGUF file made here.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0 numpy
    python recipes/peers/llamacpp.py --outtype=q8_0 --num_samples=10

The package is compiled while it is installed, for the CPU that it is installed on. It uses all CPU
cores. The last line is JSON. With --turns=True it measures once for each line on stdin, as
bench.py --compare="..." wants it.
"""
import json
import os
import sys
import tempfile
import time

import llama_cpp as llama
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from runtime import settings
from runtime.console import ROOT

outtype = 'q8_0'  # f32 | bf16 | q8_0 | q4_0: the format of the matrices
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
PROMPT_LENGTH = 16
rng = np.random.default_rng(1337)


def list_shapes():
    """(name, shape) of each matrix. Vectors have the names of their matrix or norm, too."""
    C = n_embd
    yield 'token_embd', (vocab_size, C)
    yield 'position_embd', (block_size, C)
    for i in range(n_layer):
        yield f'blk.{i}.attn_qkv', (3 * C, C)
        yield f'blk.{i}.attn_output', (C, C)
        yield f'blk.{i}.ffn_up', (4 * C, C)
        yield f'blk.{i}.ffn_down', (C, 4 * C)


def write_model(path):
    """Writes a GPT-2 with random weights. The names of its tokens are t0, t1, ..."""
    writer = GGUFWriter(path, 'gpt2')
    writer.add_context_length(block_size)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(4 * n_embd)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list([f't{i}' for i in range(vocab_size)])
    writer.add_token_types([1] * vocab_size)  # normal tokens
    writer.add_token_merges(['t 0'])  # an empty list is refused
    writer.add_eos_token_id(0)
    norms = [f'blk.{i}.{norm}' for i in range(n_layer) for norm in ('attn_norm', 'ffn_norm')]
    for name in [*norms, 'output_norm']:
        writer.add_tensor(f'{name}.weight', np.ones(n_embd, np.float32))
        writer.add_tensor(f'{name}.bias', np.zeros(n_embd, np.float32))
    for name, shape in list_shapes():
        matrix = 0.02 * rng.standard_normal(shape, np.float32)
        kind = 'f32' if name == 'position_embd' else outtype
        kind = GGMLQuantizationType[kind.upper()]
        writer.add_tensor(f'{name}.weight', quants.quantize(matrix, kind), raw_dtype=kind)
        if name.startswith('blk'):
            writer.add_tensor(f'{name}.bias', np.zeros(shape[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path):
    """The model's context, with room for all sequences."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_seq_max = num_samples
    options.n_ctx = num_samples * block_size
    options.n_batch = options.n_ubatch = num_samples * PROMPT_LENGTH
    options.n_threads = options.n_threads_batch = os.cpu_count()
    return llama.llama_init_from_model(model, options)


def read_process_bytes():
    """Bytes of memory that this process has. (That of runtime/memory.py would import torch.)"""
    with open('/proc/self/status') as f:
        line = next(line for line in f if line.startswith('VmRSS'))
    return int(line.split()[1]) * 1024


def decode(tokens, positions):
    """Computes the logits after the last of these tokens (sequences, tokens) of each sequence.

    Returns the indexes of these last tokens.
    """
    rows, columns = tokens.shape
    batch.n_tokens = tokens.size
    for i, token in enumerate(tokens.flat):
        row, column = divmod(i, columns)
        batch.token[i] = token
        batch.pos[i] = positions[column]
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = row
        batch.logits[i] = column == columns - 1
    assert llama.llama_decode(context, batch) == 0
    return range(columns - 1, tokens.size, columns)


def generate():
    """Draws all the tokens."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    indexes = decode(prompts, range(PROMPT_LENGTH))
    for i in range(max_new_tokens):
        tokens = [llama.llama_sampler_sample(sampler, context, index) for index in indexes]
        if i < max_new_tokens - 1:
            indexes = decode(np.array(tokens)[:, None], [PROMPT_LENGTH + i])


silence = llama.llama_log_callback(lambda *_: None)  # it must not be freed
llama.llama_log_set(silence, None)
with tempfile.TemporaryDirectory() as folder:
    write_model(f'{folder}/model.gguf')
    context = load(f'{folder}/model.gguf')
sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
for step in (llama.llama_sampler_init_top_k(200), llama.llama_sampler_init_temp(0.8),
             llama.llama_sampler_init_dist(1337)):
    llama.llama_sampler_chain_add(sampler, step)
batch = llama.llama_batch_init(num_samples * PROMPT_LENGTH, 0, 1)
prompts = rng.integers(vocab_size, size=(num_samples, PROMPT_LENGTH))
if not turns:
    generate()  # reads the file into memory
for _ in sys.stdin if turns else [None]:
    t0 = time.perf_counter()
    generate()
    seconds = time.perf_counter() - t0
    print(json.dumps(dict(what='decode', outtype=outtype, num_samples=num_samples,
                          tokens_per_s=num_samples * max_new_tokens / seconds,
                          process_memory_bytes=read_process_bytes())), flush=True)
