"""
RWKV-7 (Peng et al. 2025, https://arxiv.org/abs/2503.14456): a delta rule that erases under another key than
it writes under, behind token shifts, and a feed-forward that reads the token before as well.
"""
out_dir = 'out/rwkv7_small'
pos = 'none'
bias = False
n_layer = 24    # a mixer and a feed-forward are layers of their own
layer_pattern = 'rk'
ffn_pattern = '-'
rnn = 'rwkv7'
