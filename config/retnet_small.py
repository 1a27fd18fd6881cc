"""
RetNet (Sun et al. 2023, https://arxiv.org/abs/2307.08621): linear attention that forgets at a fixed rate,
one for each head, and rotates queries and keys.
"""
out_dir = 'out/retnet_small'
pos = 'none'
layer_pattern = 'r'
rnn_decay = 'retnet'
rnn_erase = 'none'
rnn_feature = 'none'
rnn_unit = False
rnn_conv = 0
rnn_rope = True
