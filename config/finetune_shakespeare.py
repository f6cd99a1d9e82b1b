# finetunes GPT-2 XL on Shakespeare: a smaller one fits smaller machines, --init_from=gpt2
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # it overfits within an epoch or three

# 1 sequence x 32 micro-batches x 1,024 tokens = 32,768 tokens/iter; the 301,966 tokens are an epoch of 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# GPT-2 ended its training on a low rate: stay there
learning_rate = 3e-5
decay_lr = False
