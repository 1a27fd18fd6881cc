"""
Root mean square layer normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467):

    r = rsqrt(mean(x^2) + eps)        y = x * r * w
    dx = r * (g*w - x * r^2 * mean(g*w*x))        dw = sum over rows of g * x * r

Saved for the backward pass: x, w and r (one number a row).

The Triton kernels read each row once and write it once, forward and backward; the sum over rows for dw is
made in one part for each program, in an order that never changes.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import cdiv, check, clamp, fits, kernel, leaf, pow2, programs, randn, rows, tl

MAX_WIDTH = 16384  # a row must fit in the registers of a program


def rms_norm_reference(x, weight, eps):
    """The definition. x (..., C), weight (C,), eps float -> (..., C) in x's dtype; the mean is in fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same in half the passes over memory that autograd would make, which an eager CPU step feels."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x if x.dtype == torch.float64 else x.float()
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        y = wide * r * weight
        # torch 2.11 compiles wrong gradients where forward returns what .to() or an in-place operation
        # handed through (pytorch issue 180642)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        wide, grad = x.to(r.dtype), grad.to(r.dtype)
        normed = wide * r
        d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gw = grad * weight
        mean = (gw * normed).mean(-1, keepdim=True)  # (..., 1)
        return gw.addcmul_(normed, mean, value=-1).mul_(r).to(x.dtype), d_weight, None


def rms_norm(x, weight, eps):
    """x (..., C), weight (C,), eps float -> x / rms(x) * weight, (..., C) in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)


# ----------------------------------------------------------------------------------------------------------
# Triton


@kernel
def _forward_kernel(x_ptr, w_ptr, y_ptr, r_ptr, M, C, x_stride, eps, ROWS: tl.constexpr,
                    BLOCK_C: tl.constexpr):
    """ROWS rows of (M,C) in one program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < M) & (col[None, :] < C)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    w = tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    y = x * r[:, None] * w[None, :]
    tl.store(y_ptr + row[:, None] * C + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + row, r, mask=row < M)


@kernel
def _backward_kernel(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, M, C, dy_stride, x_stride, steps,
                     ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """steps x ROWS rows in one program, which keeps its part of dw, (programs,C), in registers."""
    col = tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    for step in tl.range(steps, num_stages=3):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < M) & (col[None, :] < C)
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < M, other=0.0)
        normed = x * r[:, None]
        gw = dy * w[None, :]
        mean = tl.sum(gw * normed, axis=1) / C
        dx = (gw - normed * mean[:, None]) * r[:, None]
        dw += dy * normed
        tl.store(dx_ptr + row[:, None] * C + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + tl.program_id(0) * C + col, tl.sum(dw, axis=0), mask=col < C)


def _tile(C):
    """Rows in a tile, its columns, and warps for it: 16 numbers a thread where a row allows."""
    block = pow2(C)
    n_row = clamp(2048 // block, 1, 16)
    return n_row, block, clamp(n_row * block // 512, 1, 16)


@torch.library.custom_op('nanoblocks::rms_norm', mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, r (M,))"""
    check('rms_norm', x=(x, '... C'), weight=(weight, 'C'))
    x_MC, C = rows(x), x.shape[-1]
    y, r = x.new_empty(x.shape), x.new_empty(len(x_MC), dtype=torch.float32)
    n_row, block, warps = _tile(C)
    if len(x_MC):
        _forward_kernel[(cdiv(len(x_MC), n_row),)](
            x_MC, weight.contiguous(), y, r, len(x_MC), C, x_MC.stride(0), eps, n_row, block, num_warps=warps)
    return y, r


@torch.library.custom_op('nanoblocks::rms_norm_backward', mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    x_MC, dy_MC, C = rows(x), rows(dy), x.shape[-1]
    dx = x.new_empty(x.shape)
    n_row, block, warps = _tile(C)
    # 16 warps for each multiprocessor, which their registers allow
    parts = clamp(cdiv(len(x_MC), n_row), 1, programs(x) * 8 // warps)
    dw = x.new_empty(parts, C, dtype=torch.float32)
    _backward_kernel[(parts,)](
        dy_MC, x_MC, weight.contiguous(), r, dx, dw, len(x_MC), C, dy_MC.stride(0), x_MC.stride(0),
        cdiv(len(x_MC), n_row * parts), n_row, block, num_warps=warps)
    return dx, dw.sum(0).to(weight.dtype)


@_forward.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@_backward.register_fake
def _(dy, x, weight, r):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _autograd(ctx, dy, _):
    return *_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_save)


def ok(x, weight, eps):
    return fits(x, weight) and x.shape[-1] <= MAX_WIDTH


def fused(x, weight, eps):
    return _forward(x, weight, eps)[0]


def cases():
    return {
        'odd width': (randn(2, 3, 7), randn(7, seed=1), 1e-5),
        'one row': (randn(1, 33), randn(33, seed=1), 1e-5),
        'width of one, large eps': (randn(5, 1), randn(1, seed=1), 0.5),
        'many rows, far from zero': (100 + 10 * randn(150, 200), randn(200, seed=1), 1e-5),
        'not contiguous': (randn(3, 6, 5).mT, randn(12, seed=1)[::2], 1e-5),
        'a slice, weights of fp32': (randn(3, 5, 18)[..., 6:12], leaf(6, seed=1), 1e-5),
    }
