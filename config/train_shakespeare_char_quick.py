# trains a model of train_shakespeare_char_cpu.py's size on the same data, with newer options
# (RoPE, QK-norm, ReLU^2, Muon, WSD): it reaches the same val loss in a fraction of the time
out_dir = 'out-shakespeare-char-quick'
eval_interval = 40
eval_iters = 0  # the whole val split
log_interval = 10
always_save_checkpoint = False

dataset = 'shakespeare_char'
data_order = 'epochs'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64  # 32 x 64 = 2,048 tokens/iter: the run sees a sixth of an epoch

# 0.76M parameters: more of them are in lookup tables and fewer in matrix multiplications
n_layer = 3
n_head = 2
n_embd = 96
bigrams = 4290  # 65 x 66 pairs of characters, one row each
embd_conv = 2
rope_base = 100.0  # wavelengths for 64 tokens, not for thousands
qk_norm = True
relu2 = True
tied = False

optim = 'muon'
momentum = 0.9
learning_rate = 5.5e-3
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'wsd'
decay_share = 0.8
max_iters = 80
lr_decay_iters = 80  # = max_iters; for a run of another length change both
min_lr = 0.0
warmup_iters = 5
