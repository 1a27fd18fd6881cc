"""
ModernBERT (Warner et al. 2024, https://arxiv.org/abs/2412.13663): an encoder with rotary positions, gated
feed-forwards, and two of three layers within a window to both sides.
"""
out_dir = 'out/modernbert_small'
causal = False
objective = 'mask'
mask_rate = 0.3
pos = 'rope'
rope_theta = 160000.0
rope_local_theta = 10000.0
layer_pattern = 'aww'
window = 65
ffn = 'geglu_erf'
bias = False
embed_norm = True
first_norm = False
head_mlp = True
head_bias = True
