"""
OLMo 2 (2024, https://arxiv.org/abs/2501.00656): Llama's blocks with norms on the outputs of the branches
instead of their inputs, and a norm of queries and keys over all heads at once.
"""
out_dir = 'out/olmo2_small'
pos = 'rope'
rope_theta = 500000.0
norm = 'rmsnorm'
norm_at = 'output'
ffn = 'swiglu'
bias = False
qk_norm = 'full'
