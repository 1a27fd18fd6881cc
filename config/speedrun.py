"""
The blocks of the GPT-2 speed-run (Jordan et al. 2024, https://github.com/KellerJordan/modded-nanogpt) at the
size of config/study.py: Muon, ReLU^2, QK-norm, and small changes around the residual stream. To take each out
alone: `python bench.py tricks`
"""
out_dir = 'out/speedrun'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

pos = 'rope'
norm = 'rmsnorm'
bias = False
qk_norm = 'unit'        # without a learned weight
ffn = 'relu2'
zero_init = True
value_embed = True
embed_skip = True
tie = False
logit_softcap = 15.0
layer_pattern = 'wwwa'
window = 32

dataset = 'pysource'
batch_size = 8
gradient_accumulation_steps = 1  # 8 x 128 = 1024 tokens a step
max_iters = 480
warmup_iters = 20
optimizer = 'muon'
muon_lr = 0.01          # after 160 steps, 0.005 is behind by 0.005
learning_rate = 2.4e-2  # of embeddings and head: 0.008 is behind 0.016 by 0.06, and that 0.032 by 0.02
beta2 = 0.95
weight_decay = 0.0
schedule = 'wsd'
wsd_decay = 0.6
min_lr = 0.0

log_interval = 20
eval_interval = 240
eval_tokens = 65536
wandb_log = False
