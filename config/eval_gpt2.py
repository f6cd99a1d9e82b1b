# the loss of OpenAI's GPT-2 (124M) on a dataset as it stands: nothing is trained
batch_size = 8
eval_iters = 500  # more than in training: this number is to be quoted
eval_only = True
wandb_log = False
init_from = 'gpt2'
