"""
Samba (Ren et al. 2024, https://arxiv.org/abs/2406.07522): alternating Mamba layers, for distant tokens, and
windowed attention, for near ones.
"""
out_dir = 'out/samba_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'mw'
window = 128
ssm = 'mamba1'
