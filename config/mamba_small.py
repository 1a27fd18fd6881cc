"""
Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752): no attention and no ffn, but a selective scan in
every layer. Its state has the same size after any number of tokens.
"""
out_dir = 'out/mamba_small'
pos = 'none'
norm = 'rmsnorm'
bias = False
n_layer = 24
layer_pattern = 'm'
ffn_pattern = '-'
ssm = 'mamba1'
