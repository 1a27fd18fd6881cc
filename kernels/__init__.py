"""
The operations of the model that are worth a kernel of their own. `model.py` says `import kernels as ops` and
calls `ops.rms_norm(x, weight, eps)`; it never asks about hardware. Each file holds one operation: first the
plain PyTorch function that defines it, then Triton kernels for its forward and backward passes.

The Triton kernels run when the first argument is on a GPU, Triton is installed and the kernels take these
arguments (`ok`); otherwise plain PyTorch does. Operations that torch.compile fuses with their neighbours are
left to it in a compiled model. `use_kernels` overrules this, for ablations: --kernels=torch is plain PyTorch
everywhere, --kernels=triton is Triton wherever it can run, compiled or not, and --kernels=mamba_ssm gives
state spaces to the packages of their authors (packages.py).

Attention has more ways than two to run, and makes its choice in attention.py.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import (
    attention,
    causal_conv,
    common,
    decode_attention,
    flash_attention,
    gated,
    grouped_linear,
    linear_cross_entropy,
    packages,
    recurrence,
    rms_norm,
    rope,
    selective_scan,
    ssd,
)
from .attention import visible  # noqa: F401
from .causal_conv import conv_within  # noqa: F401
from .common import HAS_TRITON, INTERPRETED, as_products, at_least_fp32, runs_triton  # noqa: F401
from .exact_linear import exact_linear  # noqa: F401
from .expert_rows import collect, spread  # noqa: F401
from .patterns import Pattern  # noqa: F401
from .ring import Ring  # noqa: F401
from .spans import spans  # noqa: F401


class Op(NamedTuple):
    """One operation in its two forms."""
    plain: Callable         # plain PyTorch
    fused: Callable         # Triton: same arguments, same results
    ok: Callable            # (same arguments) -> whether `fused` takes them
    cases: Callable         # () -> {name: arguments}, small and odd ones, for tests
    compiles: bool = False  # what torch.compile makes of `plain` is at least as fast
    backward: bool = True   # has gradients


OPS = {
    'rms_norm': Op(rms_norm.rms_norm, rms_norm.fused, rms_norm.ok, rms_norm.cases, compiles=True),
    'rope': Op(rope.rope, rope.fused, rope.ok, rope.cases, compiles=True),
    'rope_qk': Op(rope.rope_qk, rope.fused_qk, rope.ok_qk, rope.cases_qk, compiles=True),
    # beside the products around them there is nothing to fuse, and backward torch.compile needs more time
    'swiglu': Op(gated.swiglu, gated.fused_swiglu, gated.ok, gated.cases),
    'geglu': Op(gated.geglu, gated.fused_geglu, gated.ok, gated.cases),
    'linear_cross_entropy': Op(linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.fused,
                               linear_cross_entropy.ok, linear_cross_entropy.cases),
    'causal_conv': Op(causal_conv.causal_conv, causal_conv.fused, causal_conv.ok, causal_conv.cases,
                      compiles=True),
    'selective_scan': Op(selective_scan.selective_scan, selective_scan.fused, selective_scan.ok,
                         selective_scan.cases),
    'ssd': Op(ssd.ssd, ssd.fused, ssd.ok, ssd.cases),
    'recurrence': Op(recurrence.recurrence, recurrence.fused, recurrence.ok, recurrence.cases),
    'attention': Op(attention.attention_reference, flash_attention.fused, flash_attention.ok,
                    flash_attention.cases),
    'decode_attention': Op(attention.attention_reference, decode_attention.fused, decode_attention.ok,
                           decode_attention.cases, backward=False),
    'grouped_linear': Op(grouped_linear.grouped_linear, grouped_linear.fused, grouped_linear.ok,
                         grouped_linear.cases),
}
CHOICES = ('auto', 'torch', 'triton', 'mamba_ssm')


def use_kernels(choice, device='cuda'):
    """Choose for all operations; refuses a choice that cannot run on `device`."""
    if choice not in CHOICES:
        raise ValueError(f'kernels={choice} must be one of {", ".join(CHOICES)}')
    if choice == 'triton' and not HAS_TRITON:
        raise ValueError('kernels=triton needs Triton, which comes with PyTorch for CUDA on Linux: '
                         'choose kernels=auto')
    if choice == 'triton' and not (str(device).startswith('cuda') or INTERPRETED):
        raise ValueError(f'kernels=triton must run on a GPU and device={device}: choose kernels=auto, or, to '
                         'test kernels at a thousandth of the speed, set TRITON_INTERPRET=1')
    if choice == 'mamba_ssm':
        if not str(device).startswith('cuda'):
            raise ValueError(f'kernels=mamba_ssm must run on a GPU and device={device}: choose kernels=auto')
        if missing := packages.missing():
            raise ValueError(f'kernels=mamba_ssm needs packages that do not load: {", ".join(missing)}: run '
                             'pip install mamba-ssm causal-conv1d --no-build-isolation, or choose '
                             'kernels=auto')
    common.backend = choice


# what PyTorch's attention (plain causal, without options) calls on a GPU, and the package that it needs
ATTENTION = {'auto': None, 'fa3': 'flash_attn_interface (FlashAttention 3, for Hopper)',
             'fa4': 'flash_attn.cute (FlashAttention 4, for Hopper and Blackwell)'}


def use_attention(choice, device='cuda'):
    """
    Choose what plain causal attention runs: cuDNN or FlashAttention 2 as PyTorch sees fit (auto), or a newer
    FlashAttention, which must be installed. Refuses what cannot run on `device`.
    """
    if choice not in ATTENTION:
        raise ValueError(f'attention={choice} must be one of {", ".join(ATTENTION)}')
    if choice == 'auto':
        return
    if not str(device).startswith('cuda'):
        raise ValueError(f'attention={choice} must run on a GPU and device={device}: choose attention=auto')
    activate = getattr(torch.nn.attention, 'activate_flash_attention_impl', None)
    if activate is None:
        raise ValueError(f'attention={choice} needs PyTorch 2.11 or newer and this is {torch.__version__}: '
                         'choose attention=auto')
    try:
        activate(choice.upper())
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f'attention={choice} needs the package {ATTENTION[choice]}, which does not load '
                         f'({error}): install it, or choose attention=auto') from None
    # PyTorch would prefer cuDNN
    torch.backends.cuda.enable_cudnn_sdp(False)


HEAD_DTYPES = ('auto', 'float8')


def use_head_dtype(choice):
    """Choose the numbers that the output head multiplies in training: those of other products, or 8 bits."""
    if choice not in HEAD_DTYPES:
        raise ValueError(f'head_dtype={choice} must be one of {", ".join(HEAD_DTYPES)}')
    common.head_dtype = choice


def _dispatch(name):
    """The operation: Triton where it runs for these arguments, otherwise plain PyTorch."""
    op = OPS[name]
    package, package_ok = packages.OPS.get(name, (None, None))

    @functools.wraps(op.plain)
    def run(*args, **options):
        if package and common.backend == 'mamba_ssm' and package_ok(*args, **options):
            return package(*args, **options)
        fused = runs_triton(args[0], op.compiles) and op.ok(*args, **options)
        return (op.fused if fused else op.plain)(*args, **options)
    return run


globals().update({name: _dispatch(name) for name in OPS} | {'attention': attention.attention})
__all__ = sorted([*OPS, 'Pattern', 'collect', 'conv_within', 'exact_linear', 'spans', 'spread', 'visible'])
