"""
gpt-oss (2025, https://arxiv.org/abs/2508.10925): windowed and full layers in turns, a learned sink in every
head, biases, and four of sixteen experts with a clamped SwiGLU.
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
