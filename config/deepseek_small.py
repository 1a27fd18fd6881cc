"""
DeepSeek V3 (2024, https://arxiv.org/abs/2412.19437): latent attention; many small experts, chosen within
groups by sigmoid scores and balanced by a bias instead of a loss; one shared expert; a dense first layer.
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
