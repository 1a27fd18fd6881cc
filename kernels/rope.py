"""
Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), the half-split layout of
GPT-NeoX and Llama: coordinate j turns together with coordinate j + R/2, by the angle pos * theta^(-2j/R).

Every pair is rotated as (a, b) -> (a cos - b sin, b cos + a sin). The backward pass is the opposite rotation.

The Triton kernel takes queries and keys together, in place in the buffer of the projection, and norms each
head first when it is given weights (QK-norm: kernels/rms_norm.py has the formulas). Saved for the
backward pass: the angles, and with a norm the inputs.
"""
import torch
from torch import Tensor

from .common import cdiv, check, clamp, fits, jit, kernel, leaf, pow2, randn, tl
from .rms_norm import rms_norm


def rope(x, cos, sin):
    """
    x (B,T,H,D); cos, sin (T,R/2) or (B,T,R/2) of each token's angles, fp32 -> (B,T,H,D) in x's dtype: the
    first R coordinates turn, the others stay (partial rotary).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (...,T,1,D/2), one angle for all heads
    wide = x if x.dtype == torch.float64 else x.float()
    half = cos.shape[-1]
    a, b, rest = wide.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def rope_qk(q, k, cos, sin, q_weight=None, k_weight=None, eps=1e-5):
    """
    q (B,T,H,D), k (B,T,K,D), cos and sin as in `rope`, q_weight and k_weight (D,) of an RMS norm over each
    head that comes first, or None -> (B,T,H,D), (B,T,K,D)
    """
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return rope(q, cos, sin), rope(k, cos, sin)


# ----------------------------------------------------------------------------------------------------------
# Triton


@jit
def _parts(ptr, at, row_in, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
           BLOCK_REST: tl.constexpr):
    """What turns, in two halves, and what stays, of rows that begin at `at`: fp32."""
    j, i = tl.arange(0, BLOCK), tl.arange(0, BLOCK_REST)
    turns = row_in[:, None] & (j[None, :] < HALF)
    a = tl.load(ptr + at[:, None] + j[None, :], mask=turns, other=0.0).to(tl.float32)
    b = tl.load(ptr + at[:, None] + HALF + j[None, :], mask=turns, other=0.0).to(tl.float32)
    stays = row_in[:, None] & (i[None, :] < REST)
    rest = tl.load(ptr + at[:, None] + 2 * HALF + i[None, :], mask=stays, other=0.0).to(tl.float32)
    return a, b, rest


@jit
def _write(ptr, at, row_in, a, b, rest, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
           BLOCK_REST: tl.constexpr):
    j, i = tl.arange(0, BLOCK), tl.arange(0, BLOCK_REST)
    turns = row_in[:, None] & (j[None, :] < HALF)
    kind = ptr.dtype.element_ty
    tl.store(ptr + at[:, None] + j[None, :], a.to(kind), mask=turns)
    tl.store(ptr + at[:, None] + HALF + j[None, :], b.to(kind), mask=turns)
    tl.store(ptr + at[:, None] + 2 * HALF + i[None, :], rest.to(kind),
             mask=row_in[:, None] & (i[None, :] < REST))


@kernel
def _rope_kernel(x_ptr, g_ptr, w_ptr, cos_ptr, sin_ptr, y_ptr, dw_ptr, M, T, H, x_stride_b, x_stride_t,
                 x_stride_h, g_stride_b, g_stride_t, g_stride_h, angle_stride_b, angle_stride_t, eps,
                 BACKWARD: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr):
    """
    ROWS tokens of one head. Forward: x -> y. Backward: g, the output's gradient -> y, the input's gradient.
    M = B * T tokens, D = 2 HALF + REST.
    """
    D: tl.constexpr = 2 * HALF + REST
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    row_in = m < M
    batch, t = m // T, m % T
    j, i = tl.arange(0, BLOCK), tl.arange(0, BLOCK_REST)
    angle = batch[:, None] * angle_stride_b + t[:, None] * angle_stride_t + j[None, :]
    turns = row_in[:, None] & (j[None, :] < HALF)
    cos = tl.load(cos_ptr + angle, mask=turns, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    y_at = (m * H + h) * D
    x_at = batch * x_stride_b + t * x_stride_t + h * x_stride_h
    if NORM:
        w_a = tl.load(w_ptr + j, mask=j < HALF, other=0.0).to(tl.float32)
        w_b = tl.load(w_ptr + HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
        w_rest = tl.load(w_ptr + 2 * HALF + i, mask=i < REST, other=0.0).to(tl.float32)
    if NORM or not BACKWARD:
        a, b, rest = _parts(x_ptr, x_at, row_in, HALF, REST, BLOCK, BLOCK_REST)
    if NORM:
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        r = tl.rsqrt(square / D + eps)[:, None]
        a, b, rest = a * r, b * r, rest * r
    if not BACKWARD:
        if NORM:
            a, b, rest = a * w_a[None, :], b * w_b[None, :], rest * w_rest[None, :]
        _write(y_ptr, y_at, row_in, a * cos - b * sin, b * cos + a * sin, rest, HALF, REST, BLOCK, BLOCK_REST)
    else:
        g_at = batch * g_stride_b + t * g_stride_t + h * g_stride_h
        g_a, g_b, g_rest = _parts(g_ptr, g_at, row_in, HALF, REST, BLOCK, BLOCK_REST)
        d_a, d_b = g_a * cos + g_b * sin, g_b * cos - g_a * sin
        if NORM:
            part = dw_ptr + (tl.program_id(0) * H + h) * D
            tl.store(part + j, tl.sum(d_a * a, 0), mask=j < HALF)
            tl.store(part + HALF + j, tl.sum(d_b * b, 0), mask=j < HALF)
            tl.store(part + 2 * HALF + i, tl.sum(g_rest * rest, 0), mask=i < REST)
            d_a, d_b, g_rest = d_a * w_a[None, :], d_b * w_b[None, :], g_rest * w_rest[None, :]
            mean = ((tl.sum(d_a * a, 1) + tl.sum(d_b * b, 1) + tl.sum(g_rest * rest, 1)) / D)[:, None]
            d_a, d_b, g_rest = (d_a - a * mean) * r, (d_b - b * mean) * r, (g_rest - rest * mean) * r
        _write(y_ptr, y_at, row_in, d_a, d_b, g_rest, HALF, REST, BLOCK, BLOCK_REST)


def _launch(x, g, weight, cos, sin, eps):
    """
    The kernel on one tensor: x alone forward, g backward, with x when there is a weight -> (B,T,H,D), and
    the gradient of the weight, by parts.
    """
    backward, like = g is not None, x if g is None else g
    (B, T, H, D), half = like.shape, cos.shape[-1]
    like = like if like.stride(-1) == 1 else like.contiguous()
    if backward and weight is not None:
        x, g = x if x.stride(-1) == 1 else x.contiguous(), like
    else:
        x, g = like, like
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    y = like.new_empty(B, T, H, D)
    block, block_rest = pow2(half), pow2(max(1, D - 2 * half))
    n_row = clamp(2048 // pow2(2 * block + block_rest - 1), 1, 32)
    grid = cdiv(B * T, n_row), H
    dw = like.new_empty(grid[0] * H if backward and weight is not None else 0, D, dtype=torch.float32)
    if y.numel():
        _rope_kernel[grid](
            x, g, None if weight is None else weight.contiguous(), cos, sin, y, dw, B * T, T, H,
            *x.stride()[:3], *g.stride()[:3], T * half if cos.dim() == 3 else 0, half, eps,
            backward, weight is not None, half, D - 2 * half, block, block_rest, n_row, num_warps=4)
    return y, dw


@torch.library.custom_op('nanoblocks::rope', mutates_args=())
def _forward(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
             k_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(q, k or nothing)"""
    angles = 'B T R' if cos.dim() == 3 else 'T R'
    check('rope', q=(q, 'B T H D'), k=(k, 'B T K D'), cos=(cos, angles), sin=(sin, angles),
          q_weight=(q_weight, 'D'), k_weight=(k_weight, 'D'))
    y = _launch(q, None, q_weight, cos, sin, eps)[0]
    return y, q.new_empty(0) if k is None else _launch(k, None, k_weight, cos, sin, eps)[0]


@torch.library.custom_op('nanoblocks::rope_backward', mutates_args=())
def _backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, weight: Tensor | None,
              eps: float) -> tuple[Tensor, Tensor]:
    dx, dw = _launch(x, dy, weight, cos, sin, eps)
    return dx, dw if weight is None else dw.sum(0).to(weight.dtype)


@_forward.register_fake
def _(q, k, cos, sin, q_weight, k_weight, eps):
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


@_backward.register_fake
def _(dy, x, cos, sin, weight, eps):
    empty = dy.new_empty(0, dy.shape[-1], dtype=torch.float32)
    return dy.new_empty(dy.shape), empty if weight is None else weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, cos, sin, q_weight, k_weight, ctx.eps = inputs
    norm = q_weight is not None
    ctx.save_for_backward(q if norm else None, k if norm else None, cos, sin, q_weight, k_weight)


def _autograd(ctx, dq, dk):
    q, k, cos, sin, *weights = ctx.saved_tensors
    grads = [(None, None) if dy is None else _backward(dy, x, cos, sin, w, ctx.eps)
             for dy, x, w in ((dq, q, weights[0]), (dk, k, weights[1]))]
    (dq, dq_weight), (dk, dk_weight) = grads
    norm = q is not None
    return dq, dk, None, None, dq_weight if norm else None, dk_weight if norm else None, None


_forward.register_autograd(_autograd, setup_context=_save)


def ok(x, cos, sin):
    return fits(x) and not cos.requires_grad and cos.dtype != torch.float64


def fused(x, cos, sin):
    return _forward(x, None, cos, sin, None, None, 0.0)[0]


def ok_qk(q, k, cos, sin, q_weight=None, k_weight=None, eps=1e-5):
    return ok(q, cos, sin) and q.dtype == k.dtype and fits(q_weight, k_weight) and q.shape[-1] <= 1024


def fused_qk(q, k, cos, sin, q_weight=None, k_weight=None, eps=1e-5):
    return _forward(q, k, cos, sin, q_weight, k_weight, eps)


def _angles(*shape):
    angle = 3 * randn(*shape, seed=1)
    return angle.cos().float(), angle.sin().float()


def cases():
    return {
        'shared angles': (randn(2, 5, 3, 6), *_angles(5, 3)),
        'angles of each row': (randn(2, 5, 3, 6), *_angles(2, 5, 3)),
        'one pair': (randn(1, 1, 1, 2), *_angles(1, 1)),
        'partial': (randn(2, 9, 2, 22), *_angles(9, 5)),
        'not contiguous': (randn(2, 3, 6, 5).mT, *_angles(2, 3, 3)),
        'transposed': (randn(2, 3, 5, 6).transpose(1, 2), *_angles(2, 5, 3)),
    }


def cases_qk():
    qkv = randn(2, 37, 8, 20)
    q, k = qkv[:, :, :5], qkv[:, :, 5:7]
    return {
        'grouped queries in one buffer': (q, k, *_angles(37, 10)),
        'partial, angles of each row': (q, k, *_angles(2, 37, 6)),
        'norm': (q, k, *_angles(37, 10), randn(20, seed=2), randn(20, seed=3), 1e-5),
        'norm, partial, weights of fp32': (q, k, *_angles(37, 6), leaf(20, seed=2), leaf(20, seed=3), 0.1),
    }
