"""
DIFF Transformer (Ye et al. 2024, https://arxiv.org/abs/2410.05258):
Llama's blocks, heads subtracted in pairs.
"""
out_dir = 'out/diff_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
attn = 'diff'
