"""
gpt-oss (2025, https://arxiv.org/abs/2508.10925): alternating windowed and full attention, a learned sink
in every head, biases, and sixteen experts with a clamped SwiGLU, four for each token.
"""
out_dir = 'out/gpt_oss_small'
pos = 'rope'
rope_theta = 150000.0
norm = 'rmsnorm'
ffn = 'swiglu_clip'
n_kv_head = 2
layer_pattern = 'wa'
window = 128
sinks = True
ffn_pattern = 'e'
n_expert = 16
n_expert_used = 4
router_bias = True
