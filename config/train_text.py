# trains a small GPT-2 on your own text, on a laptop. These values are for 50 kB of text.
# data/text/prepare.py prints the width, dropout and iterations that suit another text
out_dir = 'out-text'
eval_interval = 150
eval_iters = 50  # x 12 x 64 = 38,400 tokens of each split
log_interval = 50
always_save_checkpoint = False  # a small text is learned by heart: keep the best weights

dataset = 'text'
data_order = 'epochs'  # every token once in each pass over the text
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # 12 x 64 = 768 tokens/iter: 1,800 iterations are 31 passes over 45,000 tokens

# 0.45M parameters
n_layer = 4
n_head = 4
n_embd = 96
dropout = 0.1  # without it 3 layers learned 50 kB by heart in 13 passes; 500 kB needs none

optim = 'muon'  # its val loss was lower than AdamW's after as many iterations
learning_rate = 2e-2
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'wsd'
decay_share = 0.8
max_iters = 1800
lr_decay_iters = 1800  # = max_iters
min_lr = 0.0
warmup_iters = 10
