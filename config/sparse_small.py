"""
Sparse Transformer (Child et al. 2019, https://arxiv.org/abs/1904.10509): GPT-2 whose layers see the newest
tokens and every 32nd one of all before them, about one key in ten.
"""
out_dir = 'out/sparse_small'
layer_pattern = 'w'
window = 32
window_stride = 32
