"""
GAU (Hua et al. 2022, https://arxiv.org/abs/2202.10447): one gated layer of attention in place of attention
and feed-forward, twice as many of them.
"""
out_dir = 'out/gau_small'
pos = 'rope'
attn = 'gau'
head_dim = 128
ffn_pattern = '-'
n_layer = 24
