"""
Jamba (Lieber et al. 2024, https://arxiv.org/abs/2403.19887): one attention layer to seven Mamba layers,
which carry enough order that attention needs no positions; experts in every other layer.
"""
out_dir = 'out/jamba_small'
pos = 'none'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'mmmammmm'
ffn_pattern = 'fe'
ssm = 'mamba1'
ssm_norm = True
n_expert = 8
n_expert_used = 2
router_norm = False
expert_width = 1.0  # as wide as a dense ffn
