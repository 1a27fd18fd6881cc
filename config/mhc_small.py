"""
mHC (DeepSeek 2025, https://arxiv.org/abs/2512.24880): hyper-connections whose mixing matrices have rows and
columns that sum to one, so that the streams do not grow with depth.
"""
out_dir = 'out/mhc_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
residual = 'mhc'
