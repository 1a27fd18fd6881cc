"""
Root mean square layer normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467):

    r = rsqrt(mean(x^2) + eps)        y = x * r * w
    dx = r * (g*w - x * r^2 * mean(g*w*x))        dw = sum over rows of g * x * r

Saved for the backward pass: x, w and r (one number a row).
"""
import torch
from torch.autograd.function import once_differentiable


def rms_norm_reference(x, weight, eps):
    """The definition. x (..., C), weight (C,), eps float -> (..., C) in x's dtype; the mean is in fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same in half the passes over memory that autograd would make, which an eager CPU step feels."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x if x.dtype == torch.float64 else x.float()
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        wide, grad = x.to(r.dtype), grad.to(r.dtype)
        normed = wide * r
        d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gw = grad * weight
        mean = (gw * normed).mean(-1, keepdim=True)  # (..., 1)
        return gw.addcmul_(normed, mean, value=-1).mul_(r).to(x.dtype), d_weight, None


def rms_norm(x, weight, eps):
    """x (..., C), weight (C,), eps float -> x / rms(x) * weight, (..., C) in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)
