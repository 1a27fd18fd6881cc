"""
The operations of the model that are worth a kernel of their own. `model.py` says `import kernels as ops`
and calls `ops.rms_norm(x, weight, eps)`; it never asks what the hardware is. Each file holds one operation
and, first, the plain PyTorch function that defines it.
"""
from kernels.gated import geglu, swiglu
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rope import rope

__all__ = ['geglu', 'linear_cross_entropy', 'rms_norm', 'rope', 'swiglu']
