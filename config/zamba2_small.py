"""
Zamba 2 (Glorioso et al. 2024, https://arxiv.org/abs/2411.15242): Mamba-2 in every layer; two of six read what
a block of attention and feed-forward makes of the stream beside the embedding, and share its weights.
"""
out_dir = 'out/zamba2_small'
pos = 'none'
norm = 'rmsnorm'
bias = False
n_layer = 18
head_dim = 128
attn_scale = 0.125
layer_pattern = 'mzmzmm'
ffn_pattern = '-'
tied_blocks = 2
tied_rank = 32
