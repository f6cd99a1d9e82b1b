# trains a small character model on Shakespeare with newer options (Muon, RoPE, QK-norm, ReLU^2,
# WSD, embeddings of character pairs). It reaches the val loss of nanoGPT's GPU recipe
out_dir = 'out-shakespeare-char-fast'
eval_interval = 500
eval_iters = 0  # the whole val split
log_interval = 50
always_save_checkpoint = False

dataset = 'shakespeare_char'
data_order = 'epochs'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256  # 8 x 256 = 2,048 tokens/iter: the run sees 3.8 epochs

# 0.96M parameters, more than half of them in the table of pairs. For the same amount of
# computing 3 or 4 layers see fewer tokens, and their loss is higher
n_layer = 2
n_head = 2
n_embd = 128
bigrams = 4290  # 65 x 66 pairs of characters, one row each
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
max_iters = 1850
lr_decay_iters = 1850  # = max_iters; for a run of another length change both
min_lr = 0.0
warmup_iters = 20
