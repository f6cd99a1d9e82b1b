# finetunes GPT-2 XL on Shakespeare; on a smaller machine use a smaller model: --init_from=gpt2
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # the model overfits within one to three epochs

# 1 sequence x 32 micro-batches x 1,024 tokens = 32,768 tokens/iter;
# the dataset has 301,966 tokens, so an epoch is 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# GPT-2's own training ended at a low learning rate: keep it low
learning_rate = 3e-5
decay_lr = False
