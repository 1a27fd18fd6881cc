"""
Falcon-H1 (Zuo et al. 2025, https://arxiv.org/abs/2507.22448): in every layer attention and Mamba-2 read
the same norm, and their outputs are added.
"""
out_dir = 'out/falcon_h1_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 4
layer_pattern = 'h'
ssm_expand = 1
ssm_gate_norm = False
