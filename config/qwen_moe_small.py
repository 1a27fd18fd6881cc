"""
Qwen 1.5 MoE (2024): many small experts, four of sixteen for each token, beside a wider one that every
token passes through, which has a gate of its own.
"""
out_dir = 'out/qwen_moe_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
ffn_pattern = 'e'
n_expert = 16
n_expert_used = 4
n_shared = 2
router_norm = False
shared_gate = True
qkv_bias = True
