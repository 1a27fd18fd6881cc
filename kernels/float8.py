"""
Products of numbers in 8 bits, for the output head in training: --head_dtype=float8. An H100 and newer cards
have units for them. Elsewhere numbers are rounded in the same way and multiplied in their own dtype: the
error is the same, so that it can be measured on any machine, and the speed is not.

x and W become e4m3, gradients e5m2, which has more range and fewer digits (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433). A tensor is divided by a power of 2 first, so that its largest number is
within reach of the largest of the format; that division rounds nothing. On an H200 this is slower than bf16
at 768 channels: rounding the logits costs more than the products save.
"""
import torch
import torch.nn.functional as F

from .common import capability

NUMBERS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(v, kind):
    """v in bf16 or wider -> (v / scale in 8 bits, scale), a scalar fp32."""
    largest = v.abs().amax().float().clamp(min=2.0**-100)
    scale = torch.exp2((largest / torch.finfo(kind).max).log2().ceil())
    return (v / scale.to(v.dtype)).to(kind), scale


def emulated(v, kind):
    """v with the digits that 8 bits leave, in its own dtype."""
    small, scale = rounded(v, kind)
    return small.to(v.dtype) * scale.to(v.dtype)


class Weight:
    """W (V,C) for products with both of its sides: rows @ W^T and rows @ W."""

    def __init__(self, weight):
        self.dtype, self.V = weight.dtype, weight.shape[0]
        self.fast = weight.is_cuda and capability(weight) >= 89
        if not self.fast:
            self.wide = emulated(weight, NUMBERS)
            return
        # the library wants multiples of 16, and the second factor with its columns in one piece
        self.rows, self.scale = rounded(F.pad(weight, (0, 0, 0, -self.V % 16)), NUMBERS)
        self.columns = self.rows.T.contiguous()

    def logits(self, x, out):
        """x (n,C) -> x W^T (n,V)."""
        if not self.fast:
            return torch.mm(emulated(x, NUMBERS), self.wide.T, out=out)
        z = self._product(x, NUMBERS, self.rows.T)[:, :self.V]
        return z if out is None else out.copy_(z)

    def gradient(self, dz, out=None):
        """dz (n,V) -> dz W (n,C)."""
        if not self.fast:
            return torch.mm(emulated(dz, GRADIENTS), self.wide, out=out)
        dx = self._product(dz, GRADIENTS, self.columns.T)
        return dx if out is None else out.copy_(dx)

    def _product(self, a, kind, b):
        small, scale = rounded(a, kind)
        if small.shape[1] < b.shape[0]:
            small = F.pad(small.view(torch.uint8), (0, b.shape[0] - small.shape[1])).view(kind)
        return torch._scaled_mm(small, b, scale, self.scale, out_dtype=self.dtype)
