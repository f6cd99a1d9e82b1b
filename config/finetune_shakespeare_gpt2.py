# finetunes GPT-2 (124M) on Shakespeare with 3 GiB of memory; finetune_shakespeare.py needs more
out_dir = 'out-shakespeare-gpt2'
eval_interval = 5
eval_iters = 10  # x 1 x 1,024 tokens of each split

dataset = 'shakespeare'
init_from = 'gpt2'
always_save_checkpoint = False  # the model overfits within one to three epochs

# 1 sequence x 32 micro-batches x 1,024 tokens = 32,768 tokens/iter;
# the dataset has 301,966 tokens, so an epoch is 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# 12 bytes per parameter instead of 16, and the activations of one layer at a time
moments_dtype = 'bfloat16'
activation_checkpointing = True

# GPT-2's own training ended at a low learning rate: keep it low
learning_rate = 3e-5
decay_lr = False
