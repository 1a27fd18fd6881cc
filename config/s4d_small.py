"""
S4D (Gu et al. 2022, https://arxiv.org/abs/2206.11893): a state space that is the same for every token, and so
a convolution with a kernel as long as the text, by FFT in training.
"""
out_dir = 'out/s4d_small'
pos = 'none'
layer_pattern = 'r'
rnn = 's4d'
