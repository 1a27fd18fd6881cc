"""
Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060): Mamba with one decay per head, which turns
the scan into a few matrix products and allows a state eight times as large.
"""
out_dir = 'out/mamba2_small'
pos = 'none'
norm = 'rmsnorm'
bias = False
n_layer = 24
layer_pattern = 'm'
ffn_pattern = '-'
ssm = 'mamba2'
