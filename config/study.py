"""
A size for sweeps: a run takes a minute on one core. Put it behind an architecture:

    python ablate.py config/llama_small.py config/study.py --base=config/gpt2_small.py
"""
n_layer = 4
n_head = 4
n_embd = 128
head_dim = None   # n_embd / n_head, whatever the architecture sets
ffn_width = None  # the default for this n_embd
block_size = 128

dataset = 'pysource'
batch_size = 8
gradient_accumulation_steps = 1  # 8 x 128 = 1024 tokens a step
max_iters = 480
warmup_iters = 100  # with 20 at this rate, attention would lag behind for hundreds of steps
lr_decay_iters = None
optimizer = 'adamw'  # Muon leaves experts to AdamW, and so would favour a dense ffn
learning_rate = 4e-3
min_lr = 0.0
schedule = 'wsd'
weight_decay = 0.1
beta2 = 0.99

log_interval = 20
eval_tokens = 65536
wandb_log = False
