# finetunes GPT-2 (124M) on Shakespeare in 4 GB of memory, for machines too small for finetune_shakespeare.py
out_dir = 'out-shakespeare-gpt2'
eval_interval = 5
eval_iters = 10  # x 1 x 1,024 tokens of either split

dataset = 'shakespeare'
init_from = 'gpt2'
always_save_checkpoint = False  # it overfits within an epoch or three

# 1 sequence x 32 micro-batches x 1,024 tokens = 32,768 tokens/iter; the 301,966 tokens are an epoch of 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# 12 bytes a parameter instead of 16, and one layer's activations at a time
moments_dtype = 'bfloat16'
activation_checkpointing = True

# GPT-2 ended its training on a low rate: stay there
learning_rate = 3e-5
decay_lr = False
