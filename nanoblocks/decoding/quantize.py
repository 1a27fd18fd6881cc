"""
Weights in 8 bit, for sampling: a step of one row reads every weight once and does little else, so a quarter
of the bytes is up to four times the speed. Activations, norms, embeddings and the cache stay as they are.

Each output row of a matrix has its own scale, the largest of its weights / 127 (symmetric, rounded to the
nearest). What that costs is printed by sample.py, in bits per byte.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ExpertLinear, Linear

# whose weights are read elsewhere than in their own forward, or choose who works
KEPT = ('kv_up', 'router')
# rows up to which the CPU's kernel is faster than unpacking the matrix
FEW = 16


def rounded(weight):
    """weight (...,N,I) -> the same in int8, and the scale (...,N) fp32 of each row"""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1).clamp(min=1e-12) / 127
    return (weight / scale.unsqueeze(-1)).round().to(torch.int8), scale


@torch.library.custom_op('nanoblocks::int8_rows', mutates_args=())
def int8_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M,I) bf16, weight (N,I) int8 -> their product (M,N) bf16; Inductor cannot lower the kernel."""
    # scales are applied afterwards: the kernel would round them to its own 16 bit
    return torch._weight_int8pack_mm(x, weight, x.new_ones(len(weight)))


@int8_rows.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


def int8_linear(x, weight, scale, bias):
    """x (M,I), weight (N,I) int8, scale (N,), bias (N,) or None -> (M,N) in x's dtype"""
    if x.device.type == 'cpu' and len(x) <= FEW and x.shape[1] % 64 == 0:  # it reads whole vectors
        y = int8_rows(x.bfloat16(), weight)
    else:
        y = F.linear(x, weight.to(x.dtype))
    y = (y.float() * scale).to(x.dtype)
    return y if bias is None else y + bias


class Int8Linear(nn.Module):
    """As the Linear it replaces."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight)
        self.register_buffer('weight', weight)
        # as integers of the same bits, because model.to(bfloat16) would round them
        self.register_buffer('scale', scale.view(torch.int32))
        self.bias = linear.bias

    def forward(self, x):
        y = int8_linear(x.flatten(0, -2), self.weight, self.scale.view(torch.float32), self.bias)
        return y.unflatten(0, x.shape[:-1])


class Int8Experts(nn.Module):
    """As the ExpertLinear it replaces; experts without a row are not read."""

    def __init__(self, experts):
        super().__init__()
        weight, scale = rounded(experts.weight)
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale.view(torch.int32))
        self.bias = experts.bias

    def forward(self, x, counts):
        scale = self.scale.view(torch.float32)
        parts = [int8_linear(rows, self.weight[e], scale[e], None if self.bias is None else self.bias[e])
                 for e, rows in enumerate(x.split(counts.tolist())) if len(rows)]
        return torch.cat(parts)


def quantize(model):
    """
    The model with int8 in place of every matrix that a step reads, changed where it stands; a tied head gets
    weights of its own, and the embedding stays.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name not in KEPT and type(child) in (Linear, ExpertLinear):
                setattr(module, name, Int8Linear(child) if type(child) is Linear else Int8Experts(child))
    return model
