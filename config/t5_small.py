"""
T5 (Raffel et al. 2019, https://arxiv.org/abs/1910.10683): an encoder reads a text with spans cut out, and a
decoder that attends to what it made writes them.
"""
out_dir = 'out/t5_small'
n_encoder = 12
objective = 'span'
pos = 'relative'
attn_scale = 1.0
norm = 'rmsnorm'
norm_eps = 1e-6
ffn = 'relu'
bias = False
