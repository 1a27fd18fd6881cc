"""
Llama 4 (2025): three layers with rotary positions, which see the chunk that they are in, to one that sees
everything and has none (NoPE); every other ffn is one of sixteen experts, whose input is weighted by a
sigmoid, beside a shared one.
"""
out_dir = 'out/llama4_small'
pos = 'rope'
rope_theta = 500000.0
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'cccn'
window = 128
qk_norm = 'unit'
temp_scale = 0.1
temp_floor = 8192
ffn_pattern = 'fe'
n_expert = 16
n_expert_used = 1
n_shared = 1
router = 'sigmoid'
router_norm = False
router_input = True
