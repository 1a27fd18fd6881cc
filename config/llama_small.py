"""
Llama's blocks (Touvron et al. 2023) at the size of GPT-2 124M: rotary positions, RMS norm, gated ffn, no biases, an
untied head, and grouped-query attention as in Llama 2 70B and all of Llama 3.
"""
out_dir = 'out/llama_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
tie = False
n_kv_head = 4
