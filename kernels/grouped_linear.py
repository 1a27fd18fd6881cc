"""
One linear layer per expert, over rows that are sorted by expert: rows of expert e become x W_e^T + b_e.

    dx = dy W_e        dW_e = dy_e^T x_e        db_e = sum of dy_e

No row is dropped: every expert takes all rows that are given to it. Saved for the backward pass: x, W and the
counts.

On a CPU each expert has products of its own. In 16 bits their numbers of rows are rounded up, because oneDNN
builds a program for every new number, in more time than such a product takes, and keeps it: the rows of the
next experts fill up, and what they give is dropped. Weights are cast one expert at a time, near its product.

On a GPU the host reads no count: shapes are of all rows together, and each program finds its expert from the
counts. F.grouped_mm computes the products where it can, in bf16 on Hopper; elsewhere Triton kernels do, one
for y and dx and one for dW.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .common import INTERPRETED, as_products, capability, cdiv, check, clamp, fits, kernel, pow2, randn, tl


def grouped_linear_reference(x, weight, bias, counts):
    """The definition. Same arguments and result as grouped_linear."""
    expert = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    y = torch.einsum('mi,moi->mo', x, weight[expert])
    return y if bias is None else y + bias[expert]


STEP = 64   # products in 16 bits have multiples of so many rows, or a power of two below it


def _pieces(counts, dtype):
    """For each expert with rows: (expert, its first row, the one behind its last, rows of its products)"""
    rounds, start = dtype in (torch.bfloat16, torch.float16), 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            whole = pow2(count) if count < STEP else STEP * cdiv(count, STEP)
            yield expert, start, start + count, whole if rounds else count
        start += count


def _window(rows, start, size):
    """`size` rows from `start` on, zeros behind the last one."""
    part = rows[start:start + size]
    return part if len(part) == size else F.pad(part, (0, 0, 0, size - len(part)))


@torch.library.custom_op('nanoblocks::grouped_linear', mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    # every product writes all its rows; the next one writes over those that were not this expert's
    y = x.new_empty(len(x) + STEP, weight.shape[1])
    for e, start, _, size in _pieces(counts, x.dtype):
        rows, w, out = _window(x, start, size), weight[e].T.to(x.dtype), y[start:start + size]
        if bias is None:
            torch.mm(rows, w, out=out)
        else:
            torch.addmm(bias[e].to(x.dtype), rows, w, out=out)
    return y[:len(x)]


@torch.library.custom_op('nanoblocks::grouped_linear_backward', mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor,
              with_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw = x.new_empty(len(x) + STEP, x.shape[1]), weight.new_empty(weight.shape)
    db = weight.new_zeros(weight.shape[:2] if with_bias else 0)
    dw.index_fill_(0, (counts == 0).nonzero().squeeze(1), 0)
    for e, start, end, size in _pieces(counts, x.dtype):
        d = _window(dy, start, size)
        torch.mm(d, weight[e].to(d.dtype), out=dx[start:start + size])
        # a sum over rows, so those of others are zero in one factor
        dw[e] = d.T @ _window(x[:end], start, size)
        if with_bias:
            db[e] = dy[start:end].sum(0, dtype=db.dtype)
    return dx[:len(x)], dw, db


@_forward.register_fake
def _(x, weight, bias, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@_backward.register_fake
def _(dy, x, weight, counts, with_bias):
    db = weight.new_empty(weight.shape[:2] if with_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), db


def _setup(ctx, inputs, output):
    x, weight, bias, counts = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, counts)


def _autograd(ctx, dy):
    dx, dw, db = _backward(dy, *ctx.saved_tensors, ctx.bias_dtype is not None)
    return dx, dw, None if ctx.bias_dtype is None else db.to(ctx.bias_dtype), None


_forward.register_autograd(_autograd, setup_context=_setup)


def grouped_linear(x, weight, bias, counts):
    """
    x (M,in) sorted by expert, weight (E,out,in), bias (E,out) or None, counts (E,) int64:
    the rows of each expert, M together -> (M,out). Under autocast the products are in its
    dtype, as in F.linear.
    """
    return _forward(as_products(x), weight, bias, counts)


# ----------------------------------------------------------------------------------------------------------
# Triton


@kernel
def _rows_kernel(x_ptr, w_ptr, counts_ptr, y_ptr, E, IN, OUT, w_stride_e, w_stride_o, w_stride_i,
                 BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """y_mo = sum over i of x_mi W_eoi. A tile of rows is of one expert: its last one may be short."""
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    index = tl.program_id(1)
    expert = tl.sum((tl.cumsum(tiles, 0) <= index).to(tl.int32), 0)
    if expert < E:
        before = e < expert
        first = tl.sum(tl.where(before, counts, 0), 0)
        end = first + tl.sum(tl.where(e == expert, counts, 0), 0)
        m = first + (index - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
        o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        w_ptr += expert.to(tl.int64) * w_stride_e
        row = m.to(tl.int64)[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
        for start in range(0, IN, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            x = tl.load(x_ptr + row * IN + i[None, :], mask=(m[:, None] < end) & (i[None, :] < IN), other=0.0)
            w = tl.load(w_ptr + o[None, :] * w_stride_o + i[:, None] * w_stride_i,
                        mask=(o[None, :] < OUT) & (i[:, None] < IN), other=0.0)
            acc += tl.dot(x, w)
        tl.store(y_ptr + row * OUT + o[None, :], acc.to(y_ptr.dtype.element_ty),
                 mask=(m[:, None] < end) & (o[None, :] < OUT))


@kernel
def _weight_kernel(dy_ptr, x_ptr, counts_ptr, dw_ptr, E, IN, OUT, BLOCK_E: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """dW_eoi = sum over the expert's rows of dy_mo x_mi, zeros where it has none."""
    e, expert = tl.arange(0, BLOCK_E), tl.program_id(2)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    first = tl.sum(tl.where(e < expert, counts, 0), 0)
    end = first + tl.sum(tl.where(e == expert, counts, 0), 0)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(first, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + row * OUT + o[None, :], mask=(m[:, None] < end) & (o[None, :] < OUT), other=0.0)
        x = tl.load(x_ptr + row * IN + i[None, :], mask=(m[:, None] < end) & (i[None, :] < IN), other=0.0)
        acc += tl.dot(tl.trans(dy), x)
    at = (expert.to(tl.int64) * OUT + o[:, None]) * IN + i[None, :]
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=(o[:, None] < OUT) & (i[None, :] < IN))


def _products(x, weight, counts):
    """x (M,in) and weight (E,out,in), of any strides -> (M,out)"""
    (M, n_in), (E, n_out) = x.shape, weight.shape[:2]
    y = x.new_empty(M, n_out)
    block_m = clamp(pow2(M // max(1, E)), 16, 128)
    block_o, block_i = clamp(pow2(n_out), 16, 128), clamp(pow2(n_in), 16, 64)
    if y.numel():
        # as many tiles as there can be: each expert may leave one short
        _rows_kernel[(cdiv(n_out, block_o), cdiv(M, block_m) + E)](
            x.contiguous(), weight, counts, y, E, n_in, n_out, *weight.stride(), pow2(E), block_m, block_o,
            block_i, num_warps=8 if block_m * block_o >= 128 * 128 else 4, num_stages=3)
    return y


@torch.library.custom_op('nanoblocks::grouped_linear_fused', mutates_args=())
def _fused(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    check('grouped_linear', x=(x, 'M in'), weight=(weight, 'E out in'), counts=(counts, 'int E'))
    return _products(x, weight, counts)


@torch.library.custom_op('nanoblocks::grouped_linear_fused_backward', mutates_args=())
def _fused_backward(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, (E, n_out, n_in) = dy.contiguous(), x.contiguous(), weight.shape
    dw = weight.new_empty(weight.shape)
    blocks = clamp(pow2(n_out), 16, 128), clamp(pow2(n_in), 16, 128)
    _weight_kernel[(cdiv(n_out, blocks[0]), cdiv(n_in, blocks[1]), E)](
        dy, x, counts, dw, E, n_in, n_out, pow2(E), 64, *blocks, num_warps=8, num_stages=3)
    return _products(dy, weight.mT, counts), dw


@_fused.register_fake
def _(x, weight, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@_fused_backward.register_fake
def _(dy, x, weight, counts):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _fused_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _fused_autograd(ctx, dy):
    return *_fused_backward(dy, *ctx.saved_tensors), None


_fused.register_autograd(_fused_autograd, setup_context=_fused_save)


def _library(x, weight):
    """
    Whether PyTorch has a kernel for these: rows on multiples of 16 bytes, and Hopper. On Blackwell its
    gradient of the weights of experts without tokens is not zero (pytorch issue 172439).
    """
    return (hasattr(F, 'grouped_mm') and x.is_cuda and x.dtype == weight.dtype == torch.bfloat16
            and capability(x) == 90 and all(n % 8 == 0 for n in weight.shape[1:]))


def ok(x, weight, bias, counts):
    return ((x.dtype != torch.float32 or INTERPRETED or torch.is_autocast_enabled(x.device.type))
            and fits(x, weight, bias))


def fused(x, weight, bias, counts):
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    ends = counts.cumsum(0)
    if _library(x, weight):
        y = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends.to(torch.int32))
    else:
        y = _fused(x, weight.to(x.dtype), counts)
    if bias is None:
        return y
    return y + bias[torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)]


def cases():
    return {
        'odd sizes': (randn(50, 37), randn(3, 75, 37, seed=1), randn(3, 75, seed=2),
                      torch.tensor([24, 1, 25])),
        'no bias': (randn(10, 7), randn(3, 5, 7, seed=1), None, torch.tensor([4, 1, 5])),
        'idle experts': (randn(36, 4), randn(4, 3, 4, seed=1), randn(4, 3, seed=2),
                         torch.tensor([0, 36, 0, 0])),
        # what F.grouped_mm takes, where a GPU has it
        'idle experts, aligned widths': (randn(36, 16), randn(4, 24, 16, seed=1), randn(4, 24, seed=2),
                                         torch.tensor([0, 20, 0, 16])),
        'wider than a tile': (randn(40, 140), randn(2, 136, 140, seed=1), None, torch.tensor([22, 18])),
        'not contiguous': (randn(4, 6).mT, randn(2, 4, 3, seed=1).mT, None, torch.tensor([2, 4])),
    }
