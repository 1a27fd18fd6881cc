"""
Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), the half-split layout of
GPT-NeoX and Llama: coordinate j turns together with coordinate j + D/2, by the angle pos * theta^(-2j/D).

Every pair is rotated as (a, b) -> (a cos - b sin, b cos + a sin). The backward pass is the opposite rotation.
"""
import torch


def rope(x, cos, sin):
    """
    x (B,T,H,D); cos, sin (T,R/2) or (B,T,R/2) of each token's angles, fp32 -> (B,T,H,D) in x's dtype: the
    first R coordinates turn, the others stay (partial rotary).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (...,T,1,D/2), one angle for all heads
    wide = x if x.dtype == torch.float64 else x.float()
    half = cos.shape[-1]
    a, b, rest = wide.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)
