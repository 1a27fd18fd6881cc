"""
Weights in the forms that a decoding step reads fastest. A step of one row does little but read every weight
once, so half or a quarter of the bytes makes it up to two or four times as fast. Norms, embeddings and the
cache keep their type.

    none    the same weights; on a CPU, in the order in which it reads them fastest
    int8    each output row has its own scale, the largest absolute weight / 127
    int4    64 weights share a scale and an offset; 4.5 bits a weight. On a CPU

Weights are rounded to the nearest. Activations: with int8, a CPU whose instructions multiply bytes (VNNI)
takes each as two bytes, which is exact to 1/60,000 of the largest of its row; other CPUs, and int4, round
them to bfloat16 (errors up to 0.2 %); a GPU takes them as they are. sample.py prints the cost in bits per
byte, measured in the steps that sampling takes.
"""
import itertools
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ExpertLinear, Linear

KINDS = ('none', 'int8', 'int4')
# kv_up is read outside of its own forward; a rounded router would choose other experts
NOT_QUANTIZED = ('kv_up', 'router')
# up to this many rows, the CPU's int8 kernel is faster than converting the matrix
MAX_KERNEL_ROWS = 16
# weights that share a scale in int4
GROUP = 64


# ----------------------------------------------------------------------------------------------------------
# Rounding


def rounded(weight):
    """weight (...,N,I) -> int8 of the same shape, and the scale (...,N) fp32 of each row"""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1).clamp(min=1e-12) / 127
    return (weight / scale.unsqueeze(-1)).round().to(torch.int8), scale


def rounded_int4(weight):
    """weight (N,I) -> n (N,I) int32 of 0..15, scale and offset (N,I/GROUP) bf16: scale (n - 8) + offset"""
    groups = weight.detach().float().unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
    offset = (low + 8 * scale.float()).bfloat16()
    n = ((groups - offset.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round() + 8
    return n.clamp(0, 15).flatten(-2).int(), scale, offset


def two_bytes(x):
    """
    x (M,I) fp32 -> (2 M,I) uint8, the rows of 128 + high and after them those of 128 + low, and scale (M,1):
    x = scale (high + low / 254)
    """
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    x = x / scale
    high = x.round()
    low = (x - high).mul_(254).round_()
    return torch.cat((high, low)).add_(128).to(torch.uint8), scale


# ----------------------------------------------------------------------------------------------------------
# Weights packed for the CPU's kernels. Each class replaces a Linear, of any number of rows.

LAYERS, NUMBERS = weakref.WeakValueDictionary(), itertools.count()


# a custom op, because Inductor takes no packed tensor
@torch.library.custom_op('nanoblocks::packed_rows', mutates_args=())
def packed_rows(x: torch.Tensor, number: int) -> torch.Tensor:
    """x (M,I) -> the product (M,N) of LAYERS[number]"""
    return LAYERS[number].product(x).contiguous()


@packed_rows.register_fake
def _(x, number):
    return x.new_empty(len(x), LAYERS[number].out_features)


class Packed(nn.Module):
    """A weight (N,I) of which only the packed form is kept."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias, self.number = bias, next(NUMBERS)
        LAYERS[self.number] = self
        # no memory: it stands for the packed weight where its shape, type or bytes are asked for
        dtype, width = self.stored(weight)
        like = torch.zeros(1, dtype=dtype).expand(len(weight), width)
        self.register_buffer('weight', like, persistent=False)

    def stored(self, weight):
        """Type and width of a row of the packed weight."""
        return weight.dtype, weight.shape[1]

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = packed_rows(rows, self.number) if torch.compiler.is_compiling() else self.product(rows)
        return y.unflatten(0, x.shape[:-1])

    def plus_bias(self, y):
        return y if self.bias is None else y + self.bias


class PackedLinear(Packed):
    """
    The weights as they are: fp32 in a block of columns (I,n) for each thread, as a product of one row would
    otherwise run in one thread, and 16-bit ones in the blocks of oneDNN.
    """

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.wide = weight.dtype == torch.float32
        weight = weight.detach()
        # the blocks of oneDNN fit many rows as well as one
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.packed = columns_by_thread(weight) if self.wide else reorder(weight, 512)

    @staticmethod
    def fits(weight):
        ok = {torch.float32: lambda: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
        return on_cpu(weight) and weight.dtype in ok and ok[weight.dtype]()

    def product(self, x):
        if self.wide:
            y = torch.bmm(x.expand(len(self.packed), *x.shape), self.packed)                # (P,M,n)
            return self.plus_bias(y.transpose(0, 1).flatten(1)[:, :self.out_features])
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def columns_by_thread(weight):
    """weight (N,I) -> (P,I,n), n = N / P rounded up, for P threads or fewer blocks of at least 256 columns"""
    blocks = max(1, min(torch.get_num_threads(), len(weight) // 256))
    padded = F.pad(weight, (0, 0, 0, -len(weight) % blocks))
    return padded.unflatten(0, (blocks, -1)).transpose(1, 2).contiguous()


class Int8Packed(Packed):
    """8-bit weights. Both bytes of the activations are rows of one product, which reads every weight once."""

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        weight, scale = rounded(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.zero = scale, torch.zeros(len(scale), dtype=torch.int32)

    @staticmethod
    def fits(weight):
        return on_cpu(weight) and torch.cpu._is_vnni_supported()

    def stored(self, weight):
        return torch.int8, weight.shape[1]

    def product(self, x):
        rows, scale = two_bytes(x.float())
        y = torch.ops.onednn.qlinear_pointwise(rows, 1.0, 128, self.packed, self.scale, self.zero, None,
                                               1.0, 0, torch.float32, 'none', [], '')
        high, low = y.chunk(2)
        return self.plus_bias(torch.add(high, low, alpha=1 / 254).mul_(scale).to(x.dtype))


class Int4Packed(Packed):
    """4-bit weights."""

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        # the kernel wants whole sixteens of output rows
        n, scale, offset = rounded_int4(F.pad(weight.detach(), (0, 0, 0, -len(weight) % 16)))
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(n, 1)
        self.register_buffer('scales', torch.stack((scale, offset), -1).transpose(0, 1).contiguous())

    @staticmethod
    def fits(weight):
        return on_cpu(weight) and weight.shape[1] % GROUP == 0

    def stored(self, weight):
        return torch.uint8, weight.shape[1] // 2

    def product(self, x):
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, GROUP, self.scales)
        return self.plus_bias(y[:, :self.out_features].to(x.dtype))


def on_cpu(weight):
    return weight.device.type == 'cpu' and torch.backends.mkldnn.is_available()


# ----------------------------------------------------------------------------------------------------------
# 8-bit weights on other devices


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
    """Replaces a Linear: 8-bit weights on any device."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight, scale = rounded(weight)
        self.register_buffer('weight', weight)
        # the bits of fp32 stored as int32, because model.to(bfloat16) would round a float buffer
        self.register_buffer('scale', scale.view(torch.int32))
        self.bias = bias

    def forward(self, x):
        y = int8_linear(x.flatten(0, -2), self.weight, self.scale.view(torch.float32), self.bias)
        return y.unflatten(0, x.shape[:-1])


# ----------------------------------------------------------------------------------------------------------
# Models


# of each kind, the first class that fits a weight replaces its Linear
CLASSES = {
    'none': [PackedLinear],
    'int8': [Int8Packed, Int8Linear],
    'int4': [Int4Packed, Int8Packed, Int8Linear],
}


class Experts(nn.Module):
    """Replaces an ExpertLinear. Weights of experts without a row are not read."""

    def __init__(self, experts, kind):
        super().__init__()
        bias = experts.bias if experts.bias is not None else [None] * len(experts.weight)
        self.experts = nn.ModuleList(replaced(w, b, kind) for w, b in zip(experts.weight, bias))

    def forward(self, x, counts):
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, x.split(counts.tolist()))
                          if len(rows)])


def replaced(weight, bias, kind):
    """The layer of this kind, or None where no kernel takes the weight."""
    found = next((cls for cls in CLASSES[kind] if cls is Int8Linear or cls.fits(weight)), None)
    bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return found and found(weight, bias)


def quantize(model, kind='int8'):
    """
    Replace, in place, every matrix that a decoding step reads by its form of this kind; return the model. A
    head tied to the embedding gets weights of its own, and the embedding keeps its type.
    """
    check_kind(kind, model.wte.weight.device.type)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in NOT_QUANTIZED or type(child) not in (Linear, ExpertLinear):
                continue
            if type(child) is Linear:
                setattr(module, name, replaced(child.weight, child.bias, kind) or child)
            elif kind != 'none':
                setattr(module, name, Experts(child, kind))
    return model


def check_kind(kind, device):
    """ValueError for a kind of weights that does not exist, or not on this device."""
    if kind not in KINDS:
        raise ValueError(f'quant={kind} must be one of {", ".join(KINDS)}')
    if kind == 'int4' and str(device) != 'cpu':
        raise ValueError(f'quant=int4 must run on a CPU and device={device}: choose quant=int8 or device=cpu')


def rounds_activations(model):
    """Whether a step of few rows rounds activations of this quantised model to bfloat16."""
    return any(isinstance(m, Int4Packed) or isinstance(m, Int8Linear) and fits_kernel(m.weight)
               for m in model.modules())
