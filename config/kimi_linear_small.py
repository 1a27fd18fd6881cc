"""
Kimi Linear (Kimi Team 2025, https://arxiv.org/abs/2510.26692): Kimi delta attention (a gated DeltaNet that
forgets each key at a rate of its own) in three of four layers, latent attention without positions in the
fourth.
"""
out_dir = 'out/kimi_linear_small'
pos = 'none'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
layer_pattern = 'rrra'
attn = 'mla'
rnn_decay = 'key'
rnn_decay_rank = 64
rnn_gate = 'sigmoid'
rnn_gate_rank = 64
