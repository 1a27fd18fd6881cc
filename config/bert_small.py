"""
BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): an encoder, which sees the tokens before and
after each, and names those that are masked.
"""
out_dir = 'out/bert_small'
causal = False
objective = 'mask'
norm_at = 'post'
embed_norm = True
norm_eps = 1e-12
head_mlp = True
head_bias = True
