"""
Hyper-connections (Zhu et al. 2024, https://arxiv.org/abs/2409.19606): Llama's blocks between four residual
streams, which learned weights, different for each token, read, mix and write.
"""
out_dir = 'out/hyper_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
residual = 'hyper'
