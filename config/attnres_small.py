"""
Attention residuals (Kimi Team 2026, https://arxiv.org/abs/2603.15031): Llama's blocks, each branch of which
reads a weighted mean of the embedding and of the outputs of all branches before it.
"""
out_dir = 'out/attnres_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
residual = 'attnres'
