"""
State-space operations by the packages of their authors, mamba_ssm and causal_conv1d, where they are
installed: --kernels=mamba_ssm. Each function here has the arguments and results of the operation of its name,
and its `ok` says which arguments the package takes; others run as with --kernels=auto. Not run on a GPU yet.

What they want is written in their sources: channels before time, W from 2 to 4, widths that are multiples of
8, numbers of one dtype, an fp32 A and D. The selective scan takes no state in front of the first token, and
has no gradient of the state behind the last.
"""
import torch

from .common import fits


def missing():
    """The packages that do not load, with the reason: 'mamba_ssm (No module named ...)'."""
    found = []
    for name in ('mamba_ssm', 'causal_conv1d'):
        try:
            __import__(name)
        except (ImportError, OSError, RuntimeError) as error:
            found.append(f'{name} ({error})')
    return found


def causal_conv(x, weight, bias=None, tail=None):
    from causal_conv1d import causal_conv1d_fn
    W = weight.shape[1]
    tail = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    behind = torch.cat((tail, x[:, -(W - 1):]), dim=1)[:, -(W - 1):]
    y = causal_conv1d_fn(x.mT, weight, None if bias is None else bias.to(weight.dtype),
                         initial_states=tail.contiguous().mT)
    return y.mT, behind


def causal_conv_ok(x, weight, bias=None, tail=None):
    # channels innermost, and strides of 16 bytes
    return (fits(x, weight, bias, tail) and 2 <= weight.shape[1] <= 4 and x.stride(2) == 1
            and all(n % 8 == 0 for n in (x.shape[2], x.stride(0), x.stride(1))))


def ssd(x, dt, A, B, C, D, state=None):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    with torch.autocast(x.device.type, enabled=False):
        return mamba_chunk_scan_combined(x, dt.float(), A.float(), B, C, 256, D=D.float(),
                                         initial_states=None if state is None else state.float(),
                                         return_final_states=True)


def ssd_ok(x, dt, A, B, C, D, state=None):
    return fits(x, dt, A, B, C, D, state) and x.dtype == B.dtype == C.dtype and x.shape[1] > 1


class _NoGradient(torch.autograd.Function):
    """The state behind the last token, whose gradient the package drops without a word."""

    @staticmethod
    def forward(ctx, state, y):
        return state.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError('kernels=mamba_ssm has no gradient of the state that a selective scan leaves: '
                           'choose kernels=auto')


def selective_scan(x, dt, A, B, C, D, state=None):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    # one dtype: steps in bf16 would lose digits of their decay
    wide = torch.promote_types(x.dtype, dt.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y, state = selective_scan_fn(*(v.to(wide).mT.contiguous() for v in (x, dt)), A.float(),
                                     *(v.to(wide).mT.contiguous() for v in (B, C)), D.float(),
                                     return_last_state=True)
    return y.mT.to(x.dtype), _NoGradient.apply(state.float(), y)


def selective_scan_ok(x, dt, A, B, C, D, state=None):
    return fits(x, dt, A, B, C, D) and state is None and A.shape[1] <= 256


OPS = {'causal_conv': (causal_conv, causal_conv_ok), 'ssd': (ssd, ssd_ok),
       'selective_scan': (selective_scan, selective_scan_ok)}
