# trains a small character model on Shakespeare: a good first run on a GPU
out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, because the model overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the model overfits, so save only when the val loss improves

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # 64 x 256 = 16,384 tokens/iter: an epoch is 61 iterations, the run 82 epochs

# 10.65M parameters for 1.0M tokens: this is why there is dropout
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models tolerate higher learning rates
max_iters = 5000
lr_decay_iters = 5000  # = max_iters
min_lr = 1e-4  # learning_rate / 10
beta2 = 0.99  # an iteration has few tokens, so average over more iterations
warmup_iters = 100
