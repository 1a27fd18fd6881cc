"""GPT-2 1.56B (Radford et al. 2019), with the learning rate of GPT-3's model of that size."""
out_dir = 'out/gpt2_xl'
n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 4
gradient_accumulation_steps = 128  # 4 x 1024 x 128 = 524,288 tokens a step
learning_rate = 2e-4
