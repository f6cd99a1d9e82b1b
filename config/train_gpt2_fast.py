# trains 12 layers of width 768, as in GPT-2, on one pass of OpenWebText with newer options (Muon,
# RoPE, QK-norm, ReLU^2, WSD, embeddings of token pairs). NOBODY HAS RUN IT YET, and none of its
# numbers was measured: see "Does it hold at size?" in docs/recipes.md for the smaller models
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
out_dir = 'out-gpt2-fast'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-fast'

data_order = 'epochs'
# 12 sequences x 1,024 tokens x 40 micro-batches = 491,520 tokens/iter, as in train_gpt2.py
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

eval_interval = 1000
eval_iters = 200
log_interval = 10

# 263M parameters: GPT-2's 124M without positions, 101M in the table of pairs, and 39M in an output
# layer of its own
bigrams = 131072  # for pairs of 50,304 tokens, hashed; they are looked up, not multiplied
embd_conv = 2
rope_base = 10000.0  # as in the RoPE paper: wavelengths beyond block_size
qk_norm = True
relu2 = True
tied = False

optim = 'muon'
learning_rate = 2e-3  # a guess: half of the smaller models', because this one is wider
# momentum and beta1 stay at their defaults of 0.95 and 0.9, a guess: the smaller models have less
weight_decay = 0.1  # a guess: a fifth of the smaller models', because no token comes twice
lr_schedule = 'wsd'
decay_share = 0.8
max_iters = 18000  # x 491,520 tokens = 8.8B; OpenWebText has 9.0B
lr_decay_iters = 18000  # = max_iters
min_lr = 0.0
warmup_iters = 250
