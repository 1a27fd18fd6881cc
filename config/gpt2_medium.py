"""GPT-2 350M (Radford et al. 2019)."""
out_dir = 'out/gpt2_medium'
n_layer = 24
n_head = 16
n_embd = 1024
