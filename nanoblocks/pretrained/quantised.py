"""
Quantised checkpoints: the weights that their small numbers stand for.

Quantised lies between the files and the families, which ask for `model.layers.0.mlp.up_proj.weight` and do
not see that the files hold, say, its qweight, qzeros and scales. A weight is worked out when it is asked for,
in fp32 or, where that loses nothing, bfloat16, and takes the dtype of the model where it is copied: one is in
memory at a time. `quantization_config` of config.json names the method, a row of METHODS.
"""
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanoblocks.formats import first_line
from nanoblocks.pretrained.files import refuse_want_of_memory


class Method(NamedTuple):
    """How one kind of file holds a weight."""
    # what a weight is called beside its parts: X.weight for X.qweight
    weight: str
    # the last words of the names of its parts, in the order in which `read` takes them. The second is what
    # quantised weights are known by. Parts in `optional` may be absent, and are then None.
    parts: tuple
    # (settings, *parts) -> the weight, (..., out, in)
    read: Callable
    optional: tuple = ()
    # last words of tensors that say nothing about weights
    ignored: tuple = ()
    # {key of quantization_config: its value where it is absent, then the other values that are read}
    only: dict = {}


class Quantised:
    """The tensors of quantised files, under the names that a model which is not quantised would have."""

    def __init__(self, files, method, settings):
        self.files, self.folder, self.method, self.settings = files, files.folder, method, settings
        # {weight: the names of its parts}
        self.parts, stored = {}, set()
        sign = method.parts[1]
        for name in files.where:
            if name.endswith(sign):
                base = name.removesuffix(sign)
                parts = self.parts[base + method.weight] = [base + part for part in method.parts]
                stored |= set(parts)
            elif method.ignored and name.endswith(method.ignored):
                stored.add(name)
        self.where = {name: file for name, file in files.where.items() if name not in stored}
        for name, parts in self.parts.items():
            for part, word in zip(parts, method.parts, strict=True):
                if part not in files.where and word not in method.optional:
                    raise ValueError(f'{files.folder} must hold the tensor {part}, which {name} needs: '
                                     'download it again')
            self.where[name] = files.where[parts[1]]

    def most_weights(self):
        """As many weights as the files can hold: two in a byte."""
        return 2 * self.files.most_weights()

    def get(self, name):
        """The tensor, to be copied and dropped."""
        if name not in self.parts:
            tensor = self.files.get(name)
            if tensor.element_size() == 1:
                beside = name.removesuffix(self.method.weight) + self.method.parts[1]
                raise ValueError(f'{name} in {self.folder} must have {beside} beside it: download it again')
            return tensor
        parts = [self.files.get(part) if part in self.files.where else None for part in self.parts[name]]
        try:
            return self.method.read(self.settings, *parts)
        except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            refuse_want_of_memory(error, self.folder)
            raise ValueError(f'{name} in {self.folder} must have parts that fit together and the '
                             f'quantization_config of config.json ({first_line(error)}): download it '
                             'again') from None


def dequantised(files, hf):
    """The files as they are, or behind Quantised where config.json says that they are quantised."""
    settings = hf.get('quantization_config')
    if not settings:
        return files
    if not isinstance(settings, dict):
        raise ValueError('quantization_config in config.json must hold names and values: fetch it again')
    name = settings.get('quant_method')
    if name is None and (settings.get('load_in_4bit') or settings.get('load_in_8bit')):
        name = 'bitsandbytes'
    if name == 'bitsandbytes':
        name = 'bitsandbytes in 4 bits' if settings.get('load_in_4bit') else 'bitsandbytes in 8 bits'
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(f'quant_method={name} of quantization_config in config.json must be one of mxfp4, '
                         'fp8, bitsandbytes, gptq, awq: convert the model to one of them, or to bfloat16')
    if hf['model_type'] in TURNED:
        raise ValueError(f'quantization_config in config.json must be absent in a {hf["model_type"]}, whose '
                         'matrices are stored the other way round: convert the model to bfloat16')
    for key, values in method.only.items():
        if settings.get(key, values[0]) not in values:
            raise ValueError(f'{key}={settings[key]!r} of quantization_config in config.json must be one of '
                             f'{", ".join(map(repr, values))}: nothing else is read of {name}')
    return Quantised(files, method, settings)


# families whose matrices are (in, out), while all methods have (out, in)
TURNED = ('gpt2',)


# ----------------------------------------------------------------------------------------------------------
# mxfp4 (OCP Microscaling, 2023): 32 numbers of 4 bits share a power of two

# a sign, two bits of exponent and one of mantissa
FP4 = [sign * x for sign in (1, -1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]


def read_mxfp4(settings, blocks, scales):
    """
    blocks: (E,out,G,16) of two numbers in a byte, the first in its lower half; scales: (E,out,G), exponents
    plus 127 -> (E,in,out) with in = 32 G, as gpt-oss has its experts. bfloat16 holds these numbers exactly.
    """
    pair = torch.tensor([(FP4[byte % 16], FP4[byte // 16]) for byte in range(256)])
    power = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [math.nan])
    experts, rows, groups, half = blocks.shape
    weight = torch.empty(experts, rows, 2 * groups * half, dtype=torch.bfloat16)
    for expert in range(experts):   # one at a time, as fp32 is twice as large
        values = pair[blocks[expert].int()].flatten(-2) * power[scales[expert].int()].unsqueeze(-1)
        weight[expert] = values.flatten(-2)
    return weight.transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------
# fp8 in blocks (DeepSeek V3): a factor for each block of 128 x 128, or one for the whole matrix


def read_fp8(settings, weight, scale):
    """weight: (...,out,in) in e4m3; scale: (...) or, for blocks, (...,out/block,in/block) rounded up."""
    if not (weight.dtype == torch.float8_e4m3fn and scale.is_floating_point()):
        raise ValueError(f'{weight.dtype} with a scale in {scale.dtype} is not read')
    block, weight, scale = settings.get('weight_block_size'), weight.float(), scale.float()
    rows, columns = weight.shape[-2:]
    if block is None:
        # a scalar, or one for each of several experts
        return weight.mul_(scale.reshape(*weight.shape[:-2], 1, 1))
    height, width = block
    if scale.shape[-2:] != (-(-rows // height), -(-columns // width)):
        raise ValueError(f'{tuple(scale.shape)} scales for {tuple(weight.shape)} weights')
    for number, first in enumerate(range(0, rows, height)):
        by_column = scale[..., number, :].repeat_interleave(width, dim=-1)[..., :columns]
        weight[..., first:first + height, :].mul_(by_column.unsqueeze(-2))
    return weight


# ----------------------------------------------------------------------------------------------------------
# bitsandbytes: rows in 8 bits (Dettmers et al. 2022), blocks in 4 (QLoRA, Dettmers et al. 2023)


def read_int8(settings, weight, largest):
    """weight: (out,in) of int8, of which 127 stands for `largest`, (out,)."""
    if weight.dtype != torch.int8:
        raise ValueError(f'{weight.dtype} in place of int8')
    return weight.float().mul_(largest.float().unsqueeze(1) / 127)


def read_4bit(settings, packed, largest, values, nested, nested_values, nf4, fp4):
    """
    packed: two numbers in a byte, the first in its upper half; values: the 16 that they stand for, as parts
    of the largest of a block. That is quantised too where there is `nested`.
    """
    state = json.loads(bytes((fp4 if nf4 is None else nf4).tolist()))
    if nested is not None:
        nested = nested.float().repeat_interleave(state['nested_blocksize'])[:largest.numel()]
        largest = nested_values.float()[largest.int()] * nested + state['nested_offset']
    packed, count = packed.flatten(), math.prod(state['shape'])
    numbers = values.float()[torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()][:count]
    largest = largest.float().repeat_interleave(state['blocksize'])[:count]
    return numbers.mul_(largest).view(state['shape'])


# ----------------------------------------------------------------------------------------------------------
# GPTQ and AWQ: several whole numbers in one of 32 bits, with a scale and a zero for each group of inputs


def unpacked(packed, bits):
    """(...) of int32 -> (...,32/bits): the numbers in each, from its lowest bits up."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def scaled(numbers, zeros, scales, group):
    """numbers: (in,out); zeros, scales: (groups,out); group: (in,) -> (out,in)."""
    numbers = numbers.float().sub_(zeros.float()[group]).mul_(scales.float()[group])
    return numbers.t().contiguous()


def read_gptq(settings, numbers, zeros, scales, group):
    """
    numbers: (in * bits/32, out), packed along the inputs; zeros: (groups, out * bits/32), packed along the
    outputs and, in the first format, stored minus one; group: (in,), which group an input is in.
    """
    bits = settings['bits']
    numbers = unpacked(numbers, bits).transpose(1, 2).flatten(0, 1)
    zeros = unpacked(zeros, bits).flatten(1)
    if settings.get('checkpoint_format', 'gptq') == 'gptq':
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return scaled(numbers, zeros, scales, group_of_input(settings, numbers) if group is None else group)


def group_of_input(settings, numbers):
    inputs, size = len(numbers), settings['group_size']
    return torch.arange(inputs) // (inputs if size == -1 else size)


# which of eight neighbours each 4 bits hold, from the lowest up
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(settings, numbers, zeros, scales):
    """numbers: (in, out/8) and zeros: (groups, out/8), packed along the outputs in AWQ_ORDER."""
    place = torch.tensor(AWQ_ORDER).argsort()
    numbers, zeros = (unpacked(packed, 4)[..., place].flatten(1) for packed in (numbers, zeros))
    return scaled(numbers, zeros, scales, group_of_input(settings, numbers))


METHODS = {
    'mxfp4': Method('', ('_blocks', '_scales'), read_mxfp4),
    'fp8': Method('', ('', '_scale_inv'), read_fp8, ignored=('activation_scale', 'input_scale')),
    'bitsandbytes in 8 bits': Method('.weight', ('.weight', '.SCB'), read_int8, ignored=('.weight_format',)),
    'bitsandbytes in 4 bits': Method(
        '', ('', '.absmax', '.quant_map', '.nested_absmax', '.nested_quant_map',
             '.quant_state.bitsandbytes__nf4', '.quant_state.bitsandbytes__fp4'), read_4bit,
        optional=('.nested_absmax', '.nested_quant_map', '.quant_state.bitsandbytes__nf4',
                  '.quant_state.bitsandbytes__fp4')),
    'gptq': Method('.weight', ('.qweight', '.qzeros', '.scales', '.g_idx'), read_gptq, optional=('.g_idx',),
                   only={'bits': (4, 8), 'checkpoint_format': ('gptq', 'gptq_v2'), 'dynamic': (None, {})}),
    'awq': Method('.weight', ('.qweight', '.qzeros', '.scales'), read_awq,
                  only={'bits': (4,), 'version': ('gemm', 'GEMM'), 'format': ('gemm', 'GEMM'),
                        'zero_point': (True,)})}
