# trains the small character model on Shakespeare that nanoGPT's README recommends for CPUs:
# val loss 1.88 in half a minute on 2 cores
out_dir = 'out-shakespeare-char-cpu'
eval_interval = 250
eval_iters = 20  # x 12 x 64 = 15,360 tokens of each split
log_interval = 100
always_save_checkpoint = False

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # 12 x 64 = 768 tokens/iter; the run sees 1.5 epochs: no dropout

# 0.80M parameters
n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000  # = max_iters
min_lr = 1e-4  # learning_rate / 10
beta2 = 0.99  # an iteration has few tokens, so average over more iterations
warmup_iters = 100
