"""
DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2406.06484): before a value is written under a key, what is
stored there is taken out.
"""
out_dir = 'out/deltanet_small'
pos = 'none'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
layer_pattern = 'r'
rnn_decay = 'none'
rnn_erase = 'delta'
rnn_gate = 'none'
