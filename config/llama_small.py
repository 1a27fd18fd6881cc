"""
Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) in the shape of GPT-2 124M: rotary positions,
RMS norm, a gated ffn, no biases, and grouped-query attention as in Llama 3. The head stays tied, as in the
small models of the family (Llama 3.2 1B).
"""
out_dir = 'out/llama_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
