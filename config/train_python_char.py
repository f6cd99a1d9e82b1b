# trains a very small character model on Python's standard library: for a laptop, no download,
# minutes on 2 CPU cores
out_dir = 'out-python-char'
eval_interval = 500
eval_iters = 50  # x 12 x 64 = 38,400 tokens of each split
log_interval = 100

dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # 12 x 64 = 768 tokens/iter; the run sees 3.5M tokens, 0.4 epochs: no dropout

# 0.45M parameters; in the same time a model with 0.80M sees fewer tokens
# (it ended at a val loss of 1.35, this one at 1.33)
n_layer = 4
n_head = 4
n_embd = 96

learning_rate = 5e-3  # very small models tolerate high learning rates
max_iters = 4500
lr_decay_iters = 4500  # = max_iters
min_lr = 2e-4
beta2 = 0.99  # an iteration has few tokens, so average over more iterations
warmup_iters = 100
