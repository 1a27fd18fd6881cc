"""Qwen 3 (2025, https://arxiv.org/abs/2505.09388): Llama's blocks with an RMS norm on every query and key."""
out_dir = 'out/qwen3_small'
pos = 'rope'
rope_theta = 1e6
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
qk_norm = True
head_dim = 128
