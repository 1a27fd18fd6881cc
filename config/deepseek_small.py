"""
DeepSeek V3 (2024, https://arxiv.org/abs/2412.19437): latent attention; small experts chosen within groups by
sigmoid scores and kept busy by a bias in place of a loss; one shared expert; a dense layer in front.
"""
out_dir = 'out/deepseek_small'
pos = 'rope'
norm = 'rmsnorm'
ffn = 'swiglu'
bias = False
attn = 'mla'
ffn_pattern = 'feeeeeeeeeee'
n_expert = 16
n_expert_used = 4
n_shared = 1
n_group = 4
n_group_used = 2
router = 'sigmoid'
router_scale = 2.5
balance = 'bias'
latent_eps = 1e-6
