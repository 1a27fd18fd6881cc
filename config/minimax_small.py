"""
MiniMax-01 (MiniMax 2025, https://arxiv.org/abs/2501.08313): Lightning attention, linear attention that
forgets at fixed rates, in seven of eight layers, softmax attention in one. Here without experts.
"""
out_dir = 'out/minimax_small'
pos = 'rope'
rope_fraction = 0.5
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'rrrarrrr'
rnn_decay = 'lightning'
rnn_erase = 'none'
rnn_unit = False
rnn_scale = 1.0
rnn_conv = 0
rnn_gate = 'sigmoid'
rnn_norm = 'all'
