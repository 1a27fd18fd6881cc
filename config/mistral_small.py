"""
Mistral 7B (Jiang et al. 2023, https://arxiv.org/abs/2310.06825): Llama's blocks with windowed attention in
every layer, over an eighth of the context. Earlier tokens are seen through the layers below.
"""
out_dir = 'out/mistral_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'w'
window = 128
