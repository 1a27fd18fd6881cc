"""
Qwen 1.5 MoE (2024): sixteen small experts, four for each token, beside a wider one with a gate of its own
that every token uses.
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
