"""
The operations of the model that are worth a kernel of their own. `model.py` says `import kernels as ops`
and calls `ops.rms_norm(x, weight, eps)`; it never asks what the hardware is. Each file holds one operation
and, first, the plain PyTorch function that defines it.
"""
from kernels.causal_conv import causal_conv
from kernels.gated import geglu, swiglu
from kernels.grouped_linear import grouped_linear
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.selective_scan import selective_scan
from kernels.spans import spans
from kernels.ssd import ssd

__all__ = ['causal_conv', 'geglu', 'grouped_linear', 'linear_cross_entropy', 'rms_norm', 'rope',
           'selective_scan', 'spans', 'ssd', 'swiglu']
