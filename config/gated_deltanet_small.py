"""
Gated DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2412.06464) in three of four layers, as in
Qwen3-Next: the state forgets and erases. The fourth layer is attention, with a gate on its output.
"""
out_dir = 'out/gated_deltanet_small'
pos = 'rope'
rope_fraction = 0.25
norm = 'rmsnorm'
qk_norm = True
ffn = 'swiglu'
bias = False
n_kv_head = 2
layer_pattern = 'rrra'
attn_gate = 'channel'
