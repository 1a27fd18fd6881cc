"""
DIFF Transformer (Ye et al. 2024, https://arxiv.org/abs/2410.05258): Llama's blocks with differential
attention, which subtracts the attention weights of one head from those of another.
"""
out_dir = 'out/diff_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
attn = 'diff'
