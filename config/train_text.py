# trains a small model on your own text, on a laptop: data/text/prepare.py prints the size, dropout
# and iterations that suit the text
out_dir = 'out-text'
eval_interval = 250
eval_iters = 50  # x 12 x 64 = 38,400 tokens of each split
log_interval = 100
always_save_checkpoint = False  # a small text is learned by heart: keep the best weights

dataset = 'text'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # 12 x 64 = 768 tokens/iter

# 0.45M parameters
n_layer = 4
n_head = 4
n_embd = 96
dropout = 0.1

optim = 'muon'  # on 50 kB of text it is better after 1,200 iterations than AdamW after 2,000
learning_rate = 2e-2  # of Muon
max_iters = 1500
lr_decay_iters = 1500  # = max_iters
min_lr = 1e-3
beta2 = 0.99  # an iteration has few tokens, so average over more iterations
warmup_iters = 100
