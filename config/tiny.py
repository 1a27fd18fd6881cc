"""
A size for a laptop: minutes on two cores. Put it behind an architecture:

    config/llama_small.py config/tiny.py
"""
n_layer = 6
n_head = 4
n_embd = 256
head_dim = None   # n_embd / n_head, whatever the architecture sets
ffn_width = None  # the default for this n_embd
block_size = 256

dataset = 'pysource'
batch_size = 8
gradient_accumulation_steps = 1  # 8 x 256 = 2048 tokens a step
max_iters = 550
warmup_iters = 20
lr_decay_iters = None
optimizer = 'muon'
muon_lr = 0.01  # after 250 steps, 0.007 and 0.014 are behind by 0.03 and 0.01
learning_rate = 3e-3
min_lr = 0.0
schedule = 'wsd'
weight_decay = 0.0

log_interval = 20
eval_interval = 275
eval_tokens = 65536
wandb_log = False
