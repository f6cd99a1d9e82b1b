# evaluates OpenAI's GPT-2 (124M) on a dataset, without training it
batch_size = 8
eval_iters = 500  # more than during training, for a precise loss
eval_only = True
wandb_log = False
init_from = 'gpt2'
