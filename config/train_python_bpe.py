# trains a small model on Python's standard library in a BPE of its own, with newer options (Muon,
# RoPE, QK-norm, ReLU^2, WSD, embeddings of token pairs): for a laptop, no download, 40 to 80
# seconds on 2 CPU cores
out_dir = 'out-python-bpe'
eval_interval = 575
eval_iters = 50  # x 8 x 256 = 102,400 tokens of each split
log_interval = 100

dataset = 'python_bpe'
data_order = 'epochs'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256  # 8 x 256 = 2,048 tokens/iter: 1,150 iterations see 0.9 epochs

# 2.75M parameters, 2.1M of them in the table of pairs. In the same time 3 layers see fewer tokens,
# and their loss is higher
n_layer = 2
n_head = 2
n_embd = 128
bigrams = 16384  # for about a million possible pairs, hashed
embd_conv = 2
rope_base = 100.0  # wavelengths for some hundred tokens, not for thousands
qk_norm = True
relu2 = True
tied = False

optim = 'muon'
momentum = 0.9
learning_rate = 4e-3
weight_decay = 0.5
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'wsd'
decay_share = 0.8
max_iters = 1150
lr_decay_iters = 1150  # = max_iters; for a run of another length change both
min_lr = 0.0
warmup_iters = 20
