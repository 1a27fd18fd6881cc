"""
Transformer decoder (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762): sines for positions, norms on the
sum, ReLU.
"""
out_dir = 'out/original_small'
pos = 'sinusoidal'
embed_scale = True  # the embedding is scaled up to be heard beside sines of amplitude one
norm_at = 'post'
ffn = 'relu'
