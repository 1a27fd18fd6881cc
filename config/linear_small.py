"""
Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236): a positive feature in the
place of the exponential of softmax, so that a state of fixed size holds all that a query reads.
"""
out_dir = 'out/linear_small'
layer_pattern = 'r'
rnn_decay = 'none'
rnn_erase = 'none'
rnn_feature = 'elu1'
rnn_unit = False
rnn_conv = 0
rnn_input = 'sum'
rnn_gate = 'none'
rnn_norm = 'none'
