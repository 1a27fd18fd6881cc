"""
MiniMax-01 (MiniMax 2025, https://arxiv.org/abs/2501.08313): Lightning attention, linear attention that
forgets at fixed rates, with softmax attention in every fourth layer here, every eighth there. Without experts.
"""
out_dir = 'out/minimax_small'
pos = 'rope'
rope_fraction = 0.5
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'rrra'
rnn_decay = 'lightning'
rnn_erase = 'none'
rnn_unit = False
rnn_scale = 1.0
rnn_conv = 0
rnn_gate = 'sigmoid'
rnn_norm = 'all'
