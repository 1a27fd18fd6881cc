"""GPT-2 355M (Radford et al. 2019), with the learning rate of GPT-3's model of that size."""
out_dir = 'out/gpt2_medium'
n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 8
gradient_accumulation_steps = 64  # 8 x 1024 x 64 = 524,288 tokens a step
learning_rate = 3e-4
