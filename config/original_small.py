"""
Transformer decoder (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762): sinusoidal positions, norms after
each residual sum, ReLU.
"""
out_dir = 'out/original_small'
pos = 'sinusoidal'
embed_scale = True  # or sines of amplitude one would drown the embedding
norm_at = 'post'
ffn = 'relu'
