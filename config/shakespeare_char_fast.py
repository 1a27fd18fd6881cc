"""
nanoGPT's CPU quick start in a seventh of its steps: the same data, sizes (4 layers, 128 wide, 64 tokens,
batches of 12) and final loss, with Muon and newer blocks. Needs
`python data/shakespeare_char/prepare.py` first.
"""
out_dir = 'out/shakespeare_char_fast'
dataset = 'shakespeare_char'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
ffn = 'swiglu'
zero_init = True
tie = False

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 280
optimizer = 'muon'
muon_lr = 0.007  # 0.008 and 0.009 end within 0.01 of it, 0.012 is behind by 0.02
learning_rate = 3e-3
beta2 = 0.95
weight_decay = 0.0
warmup_iters = 10
schedule = 'wsd'
min_lr = 0.0

log_interval = 50
eval_interval = 280
eval_iters = 20
device = 'cpu'
compile = False  # compiling would take longer than the run
