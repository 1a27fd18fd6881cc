"""TinyLlama (Zhang et al. 2024, https://arxiv.org/abs/2401.02385): Llama's blocks at 1.17B parameters."""
out_dir = 'out/llama_1b'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
tie = False
n_layer = 22
n_head = 32
n_kv_head = 4
n_embd = 2048
ffn_width = 5632
block_size = 2048

batch_size = 8
gradient_accumulation_steps = 32  # 8 x 2048 x 32 = 524,288 tokens a step
learning_rate = 4e-4
