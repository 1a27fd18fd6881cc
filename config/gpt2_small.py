"""GPT-2 124M (Radford et al. 2019): the defaults of GPTConfig. Every other family says how it differs."""
out_dir = 'out/gpt2_small'
