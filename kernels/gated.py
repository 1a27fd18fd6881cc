"""
Gated activations (Shazeer 2020, https://arxiv.org/abs/2002.05202) on one buffer that holds gate and up side
by side, as one matrix product leaves them:

    y = act(gate) * up        d_gate = g * up * act'(gate)        d_up = g * act(gate)

Saved for the backward pass: the buffer. The Triton kernels read gate and up in place, without a copy of
either half, and write both gradients into one buffer.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cdiv, clamp, fits, jit, kernel, pow2, randn, rows, tanh, tl


def swiglu(gate_up):
    """gate_up (..., 2I), the gate first -> silu(gate) * up, (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up):
    """gate_up (..., 2I), the gate first -> gelu(gate) * up, (..., I), with GELU's tanh form as in Gemma."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate='tanh') * up


# ----------------------------------------------------------------------------------------------------------
# Triton


@jit
def _act(x, GELU: tl.constexpr):
    """The activation and its slope."""
    if GELU:
        square = x * x
        t = tanh(0.7978845608028654 * x * (1 + 0.044715 * square))  # sqrt(2 / pi)
        act = 0.5 * x * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * square)
    else:
        s = 1 / (1 + tl.exp(-x))
        act = x * s
        slope = s * (1 + x * (1 - s))
    return act, slope


@kernel
def _forward_kernel(x_ptr, y_ptr, M, I, x_stride, GELU: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < M) & (col[None, :] < I)
    at = row[:, None] * x_stride + col[None, :]
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + I, mask=inside, other=0.0).to(tl.float32)
    act, _ = _act(gate, GELU)
    tl.store(y_ptr + row[:, None] * I + col[None, :], (act * up).to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, M, I, dy_stride, x_stride, GELU: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < M) & (col[None, :] < I)
    at = row[:, None] * x_stride + col[None, :]
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + I, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    act, slope = _act(gate, GELU)
    to = dx_ptr + row[:, None] * (2 * I) + col[None, :]
    tl.store(to, (dy * up * slope).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(to + I, (dy * act).to(dx_ptr.dtype.element_ty), mask=inside)


def _grid(M, I):
    block = clamp(pow2(I), 16, 1024)
    n_row = clamp(2048 // block, 1, 16)
    return (cdiv(M, n_row), cdiv(I, block)), n_row, block


@torch.library.custom_op('nanoblocks::gated', mutates_args=())
def _forward(x: Tensor, gelu: bool) -> Tensor:
    x_MC, I = rows(x), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], I)
    grid, *tile = _grid(len(x_MC), I)
    if y.numel():
        _forward_kernel[grid](x_MC, y, len(x_MC), I, x_MC.stride(0), gelu, *tile, num_warps=4)
    return y


@torch.library.custom_op('nanoblocks::gated_backward', mutates_args=())
def _backward(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    dy_MI, x_MC, I, dx = rows(dy), rows(x), x.shape[-1] // 2, x.new_empty(x.shape)
    grid, *tile = _grid(len(x_MC), I)
    if dy.numel():
        _backward_kernel[grid](dy_MI, x_MC, dx, len(x_MC), I, dy_MI.stride(0), x_MC.stride(0), gelu, *tile,
                               num_warps=4)
    return dx


@_forward.register_fake
def _(x, gelu):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_backward.register_fake
def _(dy, x, gelu):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, ctx.gelu = inputs
    ctx.save_for_backward(x)


def _autograd(ctx, dy):
    return _backward(dy, *ctx.saved_tensors, ctx.gelu), None


_forward.register_autograd(_autograd, setup_context=_save)


def ok(gate_up):
    return fits(gate_up) and gate_up.shape[-1] % 2 == 0


def fused_swiglu(gate_up):
    return _forward(gate_up, False)


def fused_geglu(gate_up):
    return _forward(gate_up, True)


def cases():
    return {
        'odd width': (3 * randn(2, 3, 14),),
        'width of one': (3 * randn(4, 2),),
        'wider than a block, large numbers': (30 * randn(3, 2 * 1100),),
        'one dimension': (randn(10),),
        'a slice': (3 * randn(3, 5, 18)[..., 3:13],),
        'not contiguous': (3 * randn(10, 7).mT[:, :6],),
    }
