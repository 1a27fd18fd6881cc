"""
OLMo 2 (2024, https://arxiv.org/abs/2501.00656): Llama's blocks, normed on the branches' outputs and not on
their inputs, and queries and keys normed over all heads at once.
"""
out_dir = 'out/olmo2_small'
pos = 'rope'
rope_theta = 500000.0
norm = 'rmsnorm'
norm_at = 'output'
ffn = 'swiglu'
bias = False
qk_norm = 'full'
