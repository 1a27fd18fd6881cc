"""
Longformer (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150): BERT whose layers see a window to both
sides, with a first token that sees all others and is seen by all.
"""
out_dir = 'out/longformer_small'
causal = False
objective = 'mask'
norm_at = 'post'
embed_norm = True
norm_eps = 1e-12
head_mlp = True
head_bias = True
layer_pattern = 'w'
window = 128
global_tokens = 1
