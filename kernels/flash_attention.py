"""
Attention for what the kernels behind F.scaled_dot_product_attention lack: sliding windows, ALiBi, soft-capped
scores, sinks, and tokens at any position. Scores are made one tile at a time and never written to memory
(Dao et al. 2022, https://arxiv.org/abs/2205.14135; Dao 2023, https://arxiv.org/abs/2307.08691):

    s_ij = cap tanh(scale <q_i, k_j> / cap) - slope (pos_i - pos_j)    where i may see j
    z_i = log(sum over j of exp s_ij + exp sink)    p_ij = exp(s_ij - z_i)    y_i = sum over j of p_ij v_j

    delta_i = <dy_i, y_i>    ds_ij = p_ij (<dy_i, v_j> - delta_i), soft-capped: times 1 - tanh^2
    dq_i = scale sum of ds_ij k_j    dk_j = scale sum of ds_ij q_i    dv_j = sum of p_ij dy_i
    d_sink = -sum over i of exp(sink - z_i) delta_i

The definition is in attention.py. Saved for the backward pass: q, k, v, y and z. Query heads that share a key
read it in place, and one program sums their gradients, always in the same order. Tiles outside the window are
skipped. On an H200 a compiled FlexAttention is 1.1 to 1.4 times as fast for windows, soft-caps and ALiBi
(docs/kernels.md); it knows no positions of a cache.
"""
import math

import torch
from torch import Tensor

from .common import INTERPRETED, capability, cdiv, check, clamp, fits, jit, kernel, leaf, pow2, randn, tl

MAX_HEAD_DIM = 256
LOG2_E = math.log2(math.e)


# ----------------------------------------------------------------------------------------------------------
# Triton. Scores are in units of log 2, because exp2 is one instruction of a GPU and exp is two.


@jit
def score(products, query, key, scale, cap, slope, CAP: tl.constexpr, ALIBI: tl.constexpr):
    """Products of queries and keys to scores, and the slope of the soft-cap."""
    bend = 1.0
    if CAP:
        t = 1 - 2 / (1 + tl.exp(products * (2 * scale / cap)))
        s, bend = t * (cap * 1.4426950408889634), 1 - t * t
    else:
        s = products * (scale * 1.4426950408889634)
    if ALIBI:
        s += (slope * 1.4426950408889634) * (key - query).to(tl.float32)
    return s, bend


@jit
def positions(ptr, index, size, IN_ORDER: tl.constexpr):
    """The positions of tokens; -1 for padding and beyond the last."""
    if IN_ORDER:
        pos = tl.where(index < size, index, -1)
    else:
        pos = tl.load(ptr + index, mask=index < size, other=-1).to(tl.int32)
    return pos


@jit
def visible(query, key, window, WINDOW: tl.constexpr):
    """Whether a query at one position may see a key at another."""
    mask = (key <= query) & (key >= 0)
    if WINDOW:
        mask = mask & (key > query - window)
    return mask


@jit
def tile(ptr, row, stride, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of (rows,DIM) with neighbouring columns, zeros outside."""
    d = tl.arange(0, BLOCK_D)
    inside = row[:, None] < rows
    if DIM != BLOCK_D:
        inside = inside & (d[None, :] < DIM)
    return tl.load(ptr + row[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)


@jit
def _attend(acc, top, total, q, query, k_ptr, v_ptr, key_pos_ptr, k_stride_s, v_stride_s, first, last, gap,
            skipped, S, scale, cap, slope, window, IN_ORDER: tl.constexpr, MASKED: tl.constexpr,
            WINDOW: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds keys first..last without `skipped` ones from `gap` on to the running softmax, tile by tile."""
    for start in range(first, last - skipped, BLOCK_N):
        n = tl.where(start < gap, start, start + skipped) + tl.arange(0, BLOCK_N)
        k = tile(k_ptr, n, k_stride_s, S, D, BLOCK_D)
        key = positions(key_pos_ptr, n, S, IN_ORDER)
        s, _ = score(tl.dot(q, tl.trans(k)), query[:, None], key[None, :], scale, cap, slope, CAP, ALIBI)
        if MASKED:
            s = tl.where(visible(query[:, None], key[None, :], window, WINDOW), s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        # of a row that has seen nothing yet, exp2 of the difference would be one
        p = tl.exp2(s - tl.maximum(higher, -1e29)[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = tile(v_ptr, n, v_stride_s, S, DV, BLOCK_DV)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = higher
    return acc, top, total


@kernel
def _forward_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, key_pos_ptr, slopes_ptr, sinks_ptr, y_ptr, z_ptr, T, S, H,
                    GROUP, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b,
                    v_stride_s, v_stride_h, pos_stride_b, key_pos_stride_b, scale, cap, window,
                    IN_ORDER: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr,
                    SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M queries of one head; the last ones first, because they see most."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    k_ptr += b * k_stride_b + (h // GROUP) * k_stride_h
    v_ptr += b * v_stride_b + (h // GROUP) * v_stride_h
    key_pos_ptr += b * key_pos_stride_b
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = tile(q_ptr + b * q_stride_b + h * q_stride_h, m, q_stride_t, T, D, BLOCK_D)
    query = positions(pos_ptr + b * pos_stride_b, m, T, IN_ORDER)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)
    top, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first, inner, edge, end = 0, 0, 0, S
    if IN_ORDER:
        # tiles at either edge of the window are masked; those between, from inner to edge, need no mask
        end, edge = tl.minimum(S, (block + 1) * BLOCK_M), (block * BLOCK_M + 1) // BLOCK_N * BLOCK_N
        if WINDOW:
            first = tl.maximum(0, block * BLOCK_M - window + 1) // BLOCK_N * BLOCK_N
            inner = tl.maximum(0, (block + 1) * BLOCK_M - window + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            inner = tl.minimum(inner, (end + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
            edge = tl.maximum(inner, edge)
        acc, top, total = _attend(
            acc, top, total, q, query, k_ptr, v_ptr, key_pos_ptr, k_stride_s, v_stride_s, inner, edge, edge,
            0, S, scale, cap, slope, window, True, False, WINDOW, CAP, ALIBI, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_N)
    acc, top, total = _attend(
        acc, top, total, q, query, k_ptr, v_ptr, key_pos_ptr, k_stride_s, v_stride_s, first, end, inner,
        edge - inner, S, scale, cap, slope, window, IN_ORDER, True, WINDOW, CAP, ALIBI, D, DV, BLOCK_D,
        BLOCK_DV, BLOCK_N)
    if SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, sink)
        shrink = tl.exp2(top - higher)
        acc, total = acc * shrink[:, None], total * shrink + tl.exp2(sink - higher)
        top = higher
    seen = total > 0
    y = acc / tl.where(seen, total, 1.0)[:, None]
    d = tl.arange(0, BLOCK_DV)
    tl.store(y_ptr + ((b * T + m[:, None]) * H + h) * DV + d[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(m[:, None] < T) & (d[None, :] < DV))
    tl.store(z_ptr + (b * H + h) * T + m, tl.where(seen, top + tl.log2(total), 0.0), mask=m < T)


@kernel
def _delta_kernel(y_ptr, dy_ptr, delta_ptr, T, H, dy_stride_b, dy_stride_t, dy_stride_h, DV: tl.constexpr,
                  BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr):
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    y = tile(y_ptr + (b * T * H + h) * DV, m, H * DV, T, DV, BLOCK_DV).to(tl.float32)
    dy = tile(dy_ptr + b * dy_stride_b + h * dy_stride_h, m, dy_stride_t, T, DV, BLOCK_DV)
    tl.store(delta_ptr + (b * H + h) * T + m, tl.sum(y * dy.to(tl.float32), 1), mask=m < T)


@kernel
def _key_kernel(q_ptr, k_ptr, v_ptr, dy_ptr, pos_ptr, key_pos_ptr, slopes_ptr, z_ptr, delta_ptr, dk_ptr,
                dv_ptr, T, S, H, K, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
                v_stride_b, v_stride_s, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, pos_stride_b,
                key_pos_stride_b, scale, cap, window, IN_ORDER: tl.constexpr, WINDOW: tl.constexpr,
                CAP: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of BLOCK_N keys of one head, summed over the queries that see them."""
    start_n, group = tl.program_id(0) * BLOCK_N, H // K
    b, head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    n = start_n + tl.arange(0, BLOCK_N)
    k = tile(k_ptr + b * k_stride_b + head * k_stride_h, n, k_stride_s, S, D, BLOCK_D)
    v = tile(v_ptr + b * v_stride_b + head * v_stride_h, n, v_stride_s, S, DV, BLOCK_DV)
    key = positions(key_pos_ptr + b * key_pos_stride_b, n, S, IN_ORDER)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first, end = 0, T
    if IN_ORDER:
        first = start_n // BLOCK_M * BLOCK_M
        if WINDOW:
            end = tl.minimum(T, start_n + BLOCK_N - 1 + window)
    for g in range(group):
        h = head * group + g
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + h)
        for start in range(first, end, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            q = tile(q_ptr + b * q_stride_b + h * q_stride_h, m, q_stride_t, T, D, BLOCK_D)
            dy = tile(dy_ptr + b * dy_stride_b + h * dy_stride_h, m, dy_stride_t, T, DV, BLOCK_DV)
            query = positions(pos_ptr + b * pos_stride_b, m, T, IN_ORDER)
            z = tl.load(z_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
            delta = tl.load(delta_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
            s, bend = score(tl.dot(k, tl.trans(q)), query[None, :], key[:, None], scale, cap, slope, CAP,
                            ALIBI)
            seen = visible(query[None, :], key[:, None], window, WINDOW)
            p = tl.exp2(tl.where(seen, s - z[None, :], -1e30))
            dv += tl.dot(p.to(dy.dtype), dy)
            ds = p * (tl.dot(v, tl.trans(dy)) - delta[None, :]) * bend
            dk += tl.dot(ds.to(q.dtype), q)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = (b * S + n[:, None]) * K + head
    tl.store(dk_ptr + at * D + d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty),
             mask=(n[:, None] < S) & (d[None, :] < D))
    tl.store(dv_ptr + at * DV + e[None, :], dv.to(dv_ptr.dtype.element_ty),
             mask=(n[:, None] < S) & (e[None, :] < DV))


@kernel
def _query_kernel(q_ptr, k_ptr, v_ptr, dy_ptr, pos_ptr, key_pos_ptr, slopes_ptr, z_ptr, delta_ptr, dq_ptr, T,
                  S, H, GROUP, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
                  v_stride_b, v_stride_s, v_stride_h, dy_stride_b, dy_stride_t, dy_stride_h, pos_stride_b,
                  key_pos_stride_b, scale, cap, window, IN_ORDER: tl.constexpr, WINDOW: tl.constexpr,
                  CAP: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    """dq of BLOCK_M queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    k_ptr += b * k_stride_b + (h // GROUP) * k_stride_h
    v_ptr += b * v_stride_b + (h // GROUP) * v_stride_h
    key_pos_ptr += b * key_pos_stride_b
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = tile(q_ptr + b * q_stride_b + h * q_stride_h, m, q_stride_t, T, D, BLOCK_D)
    dy = tile(dy_ptr + b * dy_stride_b + h * dy_stride_h, m, dy_stride_t, T, DV, BLOCK_DV)
    query = positions(pos_ptr + b * pos_stride_b, m, T, IN_ORDER)
    z = tl.load(z_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
    delta = tl.load(delta_ptr + (b * H + h) * T + m, mask=m < T, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, end = 0, S
    if IN_ORDER:
        end = tl.minimum(S, (block + 1) * BLOCK_M)
        if WINDOW:
            first = tl.maximum(0, block * BLOCK_M - window + 1) // BLOCK_N * BLOCK_N
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tile(k_ptr, n, k_stride_s, S, D, BLOCK_D)
        v = tile(v_ptr, n, v_stride_s, S, DV, BLOCK_DV)
        key = positions(key_pos_ptr, n, S, IN_ORDER)
        s, bend = score(tl.dot(q, tl.trans(k)), query[:, None], key[None, :], scale, cap, slope, CAP, ALIBI)
        seen = visible(query[:, None], key[None, :], window, WINDOW)
        p = tl.exp2(tl.where(seen, s - z[:, None], -1e30))
        ds = p * (tl.dot(dy, tl.trans(v)) - delta[:, None]) * bend
        dq += tl.dot(ds.to(k.dtype), k)
    d = tl.arange(0, BLOCK_D)
    tl.store(dq_ptr + ((b * T + m[:, None]) * H + h) * D + d[None, :],
             (dq * scale).to(dq_ptr.dtype.element_ty), mask=(m[:, None] < T) & (d[None, :] < D))


def near(x):
    """x, copied where its last dimension is not the fastest."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_row(pos):
    """Positions for the kernels, and their stride from one sequence to the next: 0 where all share them."""
    pos = pos.contiguous()
    return pos, pos.shape[-1] if pos.dim() == 2 else 0


def _shapes(q, k, v):
    (B, T, H, D), (S, K), DV = q.shape, k.shape[1:3], v.shape[-1]
    return B, T, H, D, S, K, DV, max(16, pow2(D)), max(16, pow2(DV))


def check_shapes(op, q, k, v, pos, key_pos, slopes, sinks):
    """ValueError where the shapes or dtypes of the arguments do not fit together."""
    check(op, q=(q, 'B T H D'), k=(k, 'B S K D'), v=(v, 'B S K E'), slopes=(slopes, 'H'), sinks=(sinks, 'H'),
          pos=(pos, 'int B T' if pos.dim() == 2 else 'int T'),
          key_pos=(key_pos, 'int B S' if key_pos.dim() == 2 else 'int S'))
    if q.shape[2] % k.shape[2]:
        raise ValueError(f'{op}: {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key heads')


@torch.library.custom_op('nanoblocks::attention', mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, key_pos: Tensor, in_order: bool, scale: float,
             window: int | None, softcap: float | None, slopes: Tensor | None,
             sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y (B,T,H,Dv), z (B,H,T))"""
    check_shapes('attention', q, k, v, pos, key_pos, slopes, sinks)
    B, T, H, D, S, K, DV, block_d, block_dv = _shapes(q, k, v)
    q, k, v = near(q), near(k), near(v)
    y, z = q.new_empty(B, T, H, DV), q.new_empty(B, H, T, dtype=torch.float32)
    (pos, pos_stride), (key_pos, key_stride) = by_row(pos), by_row(key_pos)
    wide = max(block_d, block_dv)
    # two or three programs for each multiprocessor, so that the softmax of one runs under products of another
    block_m = clamp(pow2(T), 16, 64)
    block_n = 32 if wide > 128 or (wide > 64 and capability(q) < 90) else 64
    if y.numel():
        _forward_kernel[(cdiv(T, block_m), B * H)](
            q, k, v, pos, key_pos, slopes, sinks, y, z, T, S, H, H // K, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], pos_stride, key_stride, scale, softcap or 1.0, window or 0, in_order,
            window is not None, softcap is not None, slopes is not None, sinks is not None, D, DV, block_d,
            block_dv, block_m, block_n, num_warps=4 if wide <= 128 else 8, num_stages=2)
    return y, z


@torch.library.custom_op('nanoblocks::attention_backward', mutates_args=())
def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, z: Tensor, pos: Tensor, key_pos: Tensor,
              in_order: bool, scale: float, window: int | None, softcap: float | None, slopes: Tensor | None,
              sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks, the last empty without them."""
    B, T, H, D, S, K, DV, block_d, block_dv = _shapes(q, k, v)
    q, k, v, dy = near(q), near(k), near(v), near(dy)
    (pos, pos_stride), (key_pos, key_stride) = by_row(pos), by_row(key_pos)
    delta = q.new_empty(B, H, T, dtype=torch.float32)
    _delta_kernel[(cdiv(T, 32), B * H)](y, dy, delta, T, H, *dy.stride()[:3], DV, block_dv, 32, num_warps=4)
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, S, K, D), v.new_empty(B, S, K, DV)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3], pos_stride, key_stride]
    flags = [scale, softcap or 1.0, window or 0, in_order, window is not None, softcap is not None,
             slopes is not None, D, DV, block_d, block_dv]
    # tiles that fit in registers: Hopper's products take one side from shared memory, and want 64 rows
    wide, hopper = max(block_d, block_dv), capability(q) == 90
    block = 64 if wide <= 128 else 32
    block_m = 64 if hopper and wide <= 128 and (wide <= 64 or (in_order and softcap is None)) else 32
    _key_kernel[(cdiv(S, block), B * K)](
        q, k, v, dy, pos, key_pos, slopes, z, delta, dk, dv, T, S, H, K, *strides, *flags, block_m, block,
        num_warps=4 if hopper and wide <= 64 else 8, num_stages=2)
    block = 64 if hopper else block
    _query_kernel[(cdiv(T, block), B * H)](
        q, k, v, dy, pos, key_pos, slopes, z, delta, dq, T, S, H, H // K, *strides, *flags, block, block,
        num_warps=4 if hopper and wide <= 128 else 8, num_stages=2)
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    share = torch.exp2(sinks.float().view(1, -1, 1) * LOG2_E - z)
    return dq, dk, dv, -(share * delta).sum((0, 2)).to(sinks.dtype)


@_forward.register_fake
def _(q, k, v, pos, key_pos, in_order, scale, window, softcap, slopes, sinks):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@_backward.register_fake
def _(dy, q, k, v, y, z, pos, key_pos, in_order, scale, window, softcap, slopes, sinks):
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), d_sinks


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, pos, key_pos, *ctx.numbers, slopes, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, pos, key_pos, slopes, sinks)


def _autograd(ctx, dy, _):
    *tensors, slopes, sinks = ctx.saved_tensors
    dq, dk, dv, d_sinks = _backward(dy, *tensors, *ctx.numbers, slopes, sinks)
    return dq, dk, dv, *[None] * 7, None if sinks is None else d_sinks


_forward.register_autograd(_autograd, setup_context=_save)


def ok(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, sinks=None, in_order=False):
    # products in fp32 would be no faster than PyTorch's, or less exact, in TF32
    exact = q.dtype != torch.float32 or INTERPRETED
    return (exact and fits(q, k, v, slopes, sinks) and q.dtype == k.dtype == v.dtype
            and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM)


def fused(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, sinks=None, in_order=False):
    return _forward(q, k, v, pos, key_pos, in_order, scale, window, softcap, slopes, sinks)[0]


def cases():
    def heads(B, T, H, K, D, DV=None, S=None):
        S, DV = S or T, DV or D
        return randn(B, T, H, D), randn(B, S, K, D, seed=1), randn(B, S, K, DV, seed=2)

    def triangle(T, scale, window=None, softcap=None, slopes=None, sinks=None):
        return torch.arange(T), torch.arange(T), scale, window, softcap, slopes, sinks, True

    def ring(S, newest):  # the position in each slot of a ring buffer; two are empty
        held = newest - (newest - torch.arange(S)) % S
        held[[1, S - 2]] = -1
        return held
    qkv = randn(2, 75, 8, 20)
    slopes = 2.0 ** -torch.arange(1, 5)
    return {
        'soft-cap, values of another width': (*heads(2, 33, 4, 2, 12, 24), *triangle(33, 0.5, None, 2.0)),
        'plain, heads in one buffer': (qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], *triangle(75, 0.2)),
        'window': (*heads(1, 150, 2, 1, 16), *triangle(150, 0.25, 37)),
        'window of two': (*heads(1, 20, 2, 2, 8), *triangle(20, 0.3, 2)),
        'window wider than a tile': (*heads(1, 200, 1, 1, 16), *triangle(200, 0.25, 130)),
        'ALiBi, window': (*heads(1, 70, 4, 1, 8), *triangle(70, 0.3, 40, None, slopes)),
        'sinks, window, soft-cap': (*heads(2, 70, 4, 2, 8), *triangle(70, 0.3, 5, 3.0, None, leaf(4))),
        'all of it by position': (*heads(2, 9, 4, 2, 8, S=21), torch.arange(30, 39).expand(2, 9),
                                  torch.stack((ring(21, 38), ring(21, 33))), 0.3, 15, 3.0, slopes, leaf(4)),
    }
