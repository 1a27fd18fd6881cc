"""
Llama 4 (2025): three layers of four rotate and attend within a chunk of the text, and the fourth attends to
all of it without positions (NoPE). Every other ffn has sixteen experts, one for each token and weighted on
its input by a sigmoid, and a shared expert.
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
