"""
StreamingLLM (Xiao et al. 2023, https://arxiv.org/abs/2309.17453): Mistral with the first four tokens always
in sight, on which many heads rest their weight; without them, a window that has left them behind fails.
"""
out_dir = 'out/streaming_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'w'
window = 128
global_tokens = 4
