"""
Mixtral 8x7B (Jiang et al. 2024, https://arxiv.org/abs/2401.04088): Llama's blocks with eight ffns in every
layer, of which a token passes through two. Each is half as wide as Llama's: a token does the same work.
"""
out_dir = 'out/mixtral_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
ffn_pattern = 'e'
n_expert = 8
n_expert_used = 2
