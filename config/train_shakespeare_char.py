# a small character model of Shakespeare: what to try first on a GPU, or as the README says on a CPU
out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, as it will overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # as it overfits, only the best val loss is worth ckpt.pt

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # 64 x 256 = 16,384 tokens/iter: an epoch is 61 iterations, the run 82 epochs

# 10.65M parameters for 1.0M tokens: hence the dropout
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models bear more
max_iters = 5000
lr_decay_iters = 5000  # = max_iters
min_lr = 1e-4  # learning_rate / 10
beta2 = 0.99  # an iteration has few tokens, so average over more of them
warmup_iters = 100
