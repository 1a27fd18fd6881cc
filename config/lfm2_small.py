"""
LFM2 (Liquid AI 2025, https://arxiv.org/abs/2511.23404): gated convolutions of three taps in most layers,
attention in the others.
"""
out_dir = 'out/lfm2_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 4
qk_norm = True
layer_pattern = 'ssassassasas'
