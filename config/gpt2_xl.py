"""GPT-2 1.5B (Radford et al. 2019)."""
out_dir = 'out/gpt2_xl'
n_layer = 48
n_head = 25
n_embd = 1600
