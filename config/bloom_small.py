"""
BLOOM (Le Scao et al. 2022, https://arxiv.org/abs/2211.05100): GPT-2 with ALiBi in place of
learned positions, so that the context has no fixed end, and a norm on the embedding.
"""
out_dir = 'out/bloom_small'
pos = 'alibi'
embed_norm = True
ffn = 'gelu_tanh'
