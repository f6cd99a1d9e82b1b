# train_shakespeare_char_cpu.py's size and data, with what the field has learned since: the same val loss, 1.88, in a tenth of its time
out_dir = 'out-shakespeare-char-fast'
eval_interval = 20
eval_iters = 0  # the whole val split
log_interval = 10
always_save_checkpoint = False

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 48
block_size = 64  # 48 x 64 = 3,072 tokens/iter: the run sees a quarter of an epoch

# 0.76M parameters: more of them are looked up (bigrams: 65 x 66 pairs have a row each), fewer multiplied with
n_layer = 3
n_head = 2
n_embd = 96
bigrams = 4290
embd_conv = 2
rope_base = 100.0  # wavelengths for 64 tokens, not thousands
qk_norm = True
relu2 = True
tied = False

optim = 'muon'
learning_rate = 5e-3
beta1 = 0.8
beta2 = 0.95
lr_schedule = 'wsd'
max_iters = 84
lr_decay_iters = 84  # = max_iters; 840 of both take as long as that recipe, and reach 1.54
min_lr = 0.0
warmup_iters = 5
