"""
Mixtral 8x7B (Jiang et al. 2024, https://arxiv.org/abs/2401.04088): Llama's blocks with eight experts in
every layer, two for each token. An expert is half as wide as Llama's ffn, so the work per token is the same.
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
