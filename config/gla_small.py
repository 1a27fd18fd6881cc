"""
Gated linear attention (Yang et al. 2023, https://arxiv.org/abs/2312.06635): the token decides what is
forgotten, for each key by itself.
"""
out_dir = 'out/gla_small'
pos = 'none'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
layer_pattern = 'r'
rnn_decay = 'slow'
rnn_decay_rank = 16
rnn_erase = 'none'
rnn_feature = 'none'
rnn_unit = False
rnn_conv = 0
