"""
Weights in 8 bits, for faster sampling. A step of one row does little but read every weight once, so a quarter
of the bytes makes it up to four times as fast. Norms, embeddings and the cache keep their type. Activations
do too, except on a CPU, whose kernel for up to 16 rows reads and writes bfloat16 (errors up to 0.2 %).

Each output row of a matrix has its own scale, the largest absolute weight / 127 (symmetric, rounded to
nearest). sample.py prints the cost in bits per byte, measured in the steps that sampling takes.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ExpertLinear, Linear

# kv_up is read outside of its own forward; a rounded router would choose other experts
NOT_QUANTIZED = ('kv_up', 'router')
# up to this many rows, the CPU's int8 kernel is faster than converting the matrix
MAX_KERNEL_ROWS = 16


def rounded(weight):
    """weight (...,N,I) -> int8 of the same shape, and the scale (...,N) fp32 of each row"""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1).clamp(min=1e-12) / 127
    return (weight / scale.unsqueeze(-1)).round().to(torch.int8), scale


# a custom op, because Inductor cannot lower the kernel
@torch.library.custom_op('nanoblocks::int8_rows', mutates_args=())
def int8_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M,I) bf16, weight (N,I) int8 -> x @ weight.T (M,N) bf16"""
    # int8_linear applies the scales afterwards: the kernel would round them to bf16
    return torch._weight_int8pack_mm(x, weight, x.new_ones(len(weight)))


@int8_rows.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


def fits_kernel(weight):
    """Whether int8_rows takes this weight: the CPU's kernel reads vectors of 64."""
    return weight.device.type == 'cpu' and weight.shape[-1] % 64 == 0


def int8_linear(x, weight, scale, bias):
    """x (M,I), weight (N,I) int8, scale (N,), bias (N,) or None -> (M,N) in x's dtype"""
    if fits_kernel(weight) and len(x) <= MAX_KERNEL_ROWS:
        y = int8_rows(x.bfloat16(), weight)
    else:
        y = F.linear(x, weight.to(x.dtype))
    y = (y.float() * scale).to(x.dtype)
    return y if bias is None else y + bias


class Int8Linear(nn.Module):
    """Replaces a Linear."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight)
        self.register_buffer('weight', weight)
        # the bits of fp32 stored as int32, because model.to(bfloat16) would round a float buffer
        self.register_buffer('scale', scale.view(torch.int32))
        self.bias = linear.bias

    def forward(self, x):
        y = int8_linear(x.flatten(0, -2), self.weight, self.scale.view(torch.float32), self.bias)
        return y.unflatten(0, x.shape[:-1])


class Int8Experts(nn.Module):
    """Replaces an ExpertLinear. Weights of experts without a row are not read."""

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
    Replace, in place, every matrix that a decoding step reads by its int8 form; return the model. A head tied
    to the embedding gets int8 weights of its own, and the embedding keeps its type.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name not in NOT_QUANTIZED and type(child) in (Linear, ExpertLinear):
                setattr(module, name, Int8Linear(child) if type(child) is Linear else Int8Experts(child))
    return model


def rounds_activations(model):
    """Whether a step of few rows rounds activations of this quantised model to bfloat16."""
    return any(fits_kernel(m.weight) for m in model.modules() if isinstance(m, (Int8Linear, Int8Experts)))
