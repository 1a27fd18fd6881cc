"""
xLSTM (Beck et al. 2024, https://arxiv.org/abs/2405.04517): mLSTM, whose input gate is an exponential, so
that a later token can outweigh all before it.
"""
out_dir = 'out/xlstm_small'
pos = 'none'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
logit_softcap = 30.0
layer_pattern = 'r'
rnn_decay = 'sigmoid'
rnn_erase = 'none'
rnn_feature = 'none'
rnn_unit = False
rnn_conv = 0
rnn_input = 'exp'
rnn_gate_cap = 15.0
rnn_gate = 'sigmoid'
rnn_norm = 'layer'
