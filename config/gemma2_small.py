"""
Gemma 2 (2024, https://arxiv.org/abs/2408.00118): alternating windowed and full attention, norms before
and after every branch, soft-capped scores and logits, GELU gates, an embedding scaled by sqrt(n_embd).
"""
out_dir = 'out/gemma2_small'
pos = 'rope'
norm = 'rmsnorm'
norm_at = 'sandwich'
ffn = 'geglu'
bias = False
n_kv_head = 2
layer_pattern = 'wa'
window = 128
softcap = 50.0
logit_softcap = 30.0
embed_scale = True
