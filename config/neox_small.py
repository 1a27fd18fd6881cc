"""
GPT-NeoX (Black et al. 2022, https://arxiv.org/abs/2204.06745): a quarter of every head is rotated, and
attention and ffn read the same x in parallel.
"""
out_dir = 'out/neox_small'
pos = 'rope'
rope_fraction = 0.25
residual = 'parallel'
