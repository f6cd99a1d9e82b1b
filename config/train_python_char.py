# a very small character model of Python's standard library, for a laptop: minutes on 2 CPU cores, and nothing to download
out_dir = 'out-python-char'
eval_interval = 500
eval_iters = 50  # x 12 x 64 = 38,400 tokens of either split
log_interval = 100

dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # 12 x 64 = 768 tokens/iter; the run sees 3.5M tokens, 0.4 epochs: no dropout

# 0.45M parameters: in the same two minutes 0.80M see fewer tokens, and ended at a val loss of 1.35 against 1.33
n_layer = 4
n_head = 4
n_embd = 96

learning_rate = 5e-3  # tiny models bear high rates
max_iters = 4500
lr_decay_iters = 4500  # = max_iters
min_lr = 2e-4
beta2 = 0.99  # an iteration has few tokens, so average over more of them
warmup_iters = 100
