"""
Nemotron-H (NVIDIA 2025, https://arxiv.org/abs/2504.03624): one branch a layer, which is Mamba-2, a
feed-forward with squared ReLUs or, in one layer of twelve, attention without positions.
"""
out_dir = 'out/nemotron_h_small'
pos = 'none'
norm = 'rmsnorm'
ffn = 'relu2'
bias = False
n_layer = 24
n_kv_head = 4
layer_pattern = 'm-a-m-m-m-m-'
ffn_pattern = '-f'
