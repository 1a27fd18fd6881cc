"""
nanoGPT's Shakespeare characters, for which it takes a GPU and 5,000 steps to a loss of 1.4697, with a model
half as large for a CPU: 6 layers, 256 wide, 256 characters of context, and the recipe of
`config/shakespeare_char_fast.py`. Needs `python data/shakespeare_char/prepare.py` first.
"""
out_dir = 'out/shakespeare_char_laptop'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 4
n_embd = 256
block_size = 256
bias = False
dropout = 0.15  # the text is read six times

pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
ffn = 'swiglu'
zero_init = True
tie = False

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1500  # 16 x 256 = 4096 tokens a step
optimizer = 'muon'
muon_lr = 0.008
learning_rate = 3e-3
beta2 = 0.95
weight_decay = 0.0
warmup_iters = 20
schedule = 'wsd'
min_lr = 0.0

log_interval = 50
eval_interval = 750
eval_tokens = 110_592  # all of the validation text
device = 'cpu'
compile = False  # a CPU gains nothing by it where there is dropout
