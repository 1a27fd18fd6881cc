"""
Attention of a few new tokens to a long cache. Its time is the time to read the cache, so the cache is read
once, by all of the GPU: keys are split among programs (Dao et al. 2023, Flash-Decoding), each keeps a softmax
of its own part, and a second kernel merges the parts:

    y = sum over parts of exp(z_part - z) y_part        z = log(sum over parts of exp z_part + exp sink)

The query heads that share a key are rows of one tile, so that the key is read once for all of them. Masks
are made of positions: slots may be in any order, as in a ring buffer, and tiles in front of the first key or
behind the last that a query sees are not read. In MLA (DeepSeek V2, https://arxiv.org/abs/2405.04434) the
latent is key and value at once, and is read once, beside the rotated part of the key. The definition is in
attention.py. No gradients.
"""
import torch
from torch import Tensor

from .common import INTERPRETED, capability, cdiv, clamp, fits, kernel, leaf, pow2, programs, randn, tl
from .flash_attention import by_row, check_shapes, near, positions, score, tile, visible

MAX_TOKENS = 16     # queries of one sequence
MAX_HEAD_DIM = 512  # width of a value
MAX_KEY = 256       # width of a key, or of what a key has beyond the value that it begins with


# ----------------------------------------------------------------------------------------------------------
# Triton


@kernel
def _part_kernel(q_ptr, k_ptr, more_ptr, v_ptr, pos_ptr, key_pos_ptr, slopes_ptr, part_ptr, top_ptr,
                 total_ptr, T, S, H, K, span, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s,
                 k_stride_h, more_stride_b, more_stride_s, more_stride_h, v_stride_b, v_stride_s, v_stride_h,
                 pos_stride_b, key_pos_stride_b, scale, cap, window, WINDOW: tl.constexpr, CAP: tl.constexpr,
                 ALIBI: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, MORE: tl.constexpr,
                 DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_MORE: tl.constexpr, BLOCK_DV: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_POS: tl.constexpr):
    """BLOCK_M rows (query heads of one key head, times tokens) against `span` keys."""
    b, head = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    rows = H // K * T
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    h, t = head * (H // K) + m // T, m % T
    d, i, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_MORE), tl.arange(0, BLOCK_DV)
    q_ptr += b * q_stride_b
    at = (t.to(tl.int64) * q_stride_t + h * q_stride_h)[:, None]
    q = tl.load(q_ptr + at + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
    if MORE:
        q_more = tl.load(q_ptr + at + D + i[None, :], mask=inside[:, None] & (i[None, :] < MORE), other=0.0)
    query = tl.load(pos_ptr + b * pos_stride_b + t, mask=inside, other=-1).to(tl.int32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + h, mask=inside, other=0.0)
    top, total = tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_ptr += b * k_stride_b + head * k_stride_h
    more_ptr += b * more_stride_b + head * more_stride_h
    v_ptr += b * v_stride_b + head * v_stride_h
    key_pos_ptr += b * key_pos_stride_b
    split = tl.program_id(2)
    begin, end = split * span, tl.minimum(S, (split + 1) * span)
    # the keys from the first to the last that a query may see. A branch in the loop over tiles would keep it
    # from reading one tile while it computes with another
    first, last = end, begin
    oldest, newest = tl.min(tl.where(inside, query, 2147483647), 0), tl.max(query, 0)
    for start in range(begin, end, BLOCK_POS):
        n = start + tl.arange(0, BLOCK_POS)
        key = positions(key_pos_ptr, n, end, False)
        seen = visible(newest, key, window + newest - oldest, WINDOW)
        first = tl.minimum(first, tl.min(tl.where(seen, n, end), 0))
        last = tl.maximum(last, tl.max(tl.where(seen, n + 1, begin), 0))
    for start in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = positions(key_pos_ptr, n, S, False)
        k = tile(k_ptr, n, k_stride_s, S, D, BLOCK_D)
        products = tl.dot(q, tl.trans(k))
        if MORE:
            more = tile(more_ptr, n, more_stride_s, S, MORE, BLOCK_MORE)
            products += tl.dot(q_more, tl.trans(more))
        if SHARED:
            v = k
        else:
            v = tile(v_ptr, n, v_stride_s, S, DV, BLOCK_DV)
        s, _ = score(products, query[:, None], key[None, :], scale, cap, slope[:, None], CAP, ALIBI)
        s = tl.where(visible(query[:, None], key[None, :], window, WINDOW), s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - tl.maximum(higher, -1e29)[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = higher
    part = (tl.num_programs(2) * tl.program_id(0) + split) * rows + m
    tl.store(part_ptr + part[:, None] * DV + e[None, :], acc, mask=inside[:, None] & (e[None, :] < DV))
    tl.store(top_ptr + part, top, mask=inside)
    tl.store(total_ptr + part, total, mask=inside)


@kernel
def _merge_kernel(part_ptr, top_ptr, total_ptr, sinks_ptr, y_ptr, T, H, K, splits, SINKS: tl.constexpr,
                  DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One row: a token and a head."""
    group = H // K
    rows = group * T
    bk, m = tl.program_id(0) // rows, tl.program_id(0) % rows
    b, h, t = (bk // K).to(tl.int64), bk % K * group + m // T, m % T
    e = tl.arange(0, BLOCK_DV)
    top, total = -1e30, 0.0
    if SINKS:
        top, total = tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634, 1.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(splits):
        part = (splits * bk + split) * rows + m
        other = tl.load(top_ptr + part)
        higher = tl.maximum(top, other)
        shrink, grow = tl.exp2(top - higher), tl.exp2(other - higher)
        total = total * shrink + tl.load(total_ptr + part) * grow
        acc = acc * shrink + tl.load(part_ptr + part.to(tl.int64) * DV + e, mask=e < DV, other=0.0) * grow
        top = higher
    y = acc / tl.where(total > 0, total, 1.0)
    tl.store(y_ptr + ((b * T + t) * H + h) * DV + e, y.to(y_ptr.dtype.element_ty), mask=e < DV)


@torch.library.custom_op('nanoblocks::decode_attention', mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, key_pos: Tensor, scale: float, window: int | None,
            softcap: float | None, slopes: Tensor | None, sinks: Tensor | None) -> Tensor:
    check_shapes('decode_attention', q, k, v, pos, key_pos, slopes, sinks)
    (B, T, H, _), (S, K, D), DV = q.shape, k.shape[1:], v.shape[-1]
    q, k, v = near(q), near(k), near(v)
    shared = k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and DV <= D
    # the first coordinates of the key are the value as well, the others are not
    D, more = (DV, D - DV) if shared else (D, 0)
    k_more = k[..., D:] if more else k
    block_d, block_more, block_dv = (max(16, pow2(width)) for width in (D, max(1, more), DV))
    rows = H // K * T
    block_m, block_n = clamp(pow2(rows), 16, 32 if block_d > 256 else 64), 32 if block_d > 256 else 64
    blocks = cdiv(rows, block_m)
    # four parts for each multiprocessor, which runs as many at once, but none too short to be worth its merge
    splits = clamp(cdiv(2 * programs(q), B * K * blocks), 1, cdiv(S, 4 * block_n))
    span = cdiv(cdiv(S, splits), block_n) * block_n
    splits = cdiv(S, span)
    wide = dict(dtype=torch.float32, device=q.device)
    part = torch.empty(B * K * splits * rows, DV, **wide)
    top, total = torch.empty(2, B * K * splits * rows, **wide)
    (pos, pos_stride), (key_pos, key_stride) = by_row(pos), by_row(key_pos)
    y = q.new_empty(B, T, H, DV)
    _part_kernel[(B * K, blocks, splits)](
        q, k, k_more, v, pos, key_pos, slopes, part, top, total, T, S, H, K, span, *q.stride()[:3],
        *k.stride()[:3], *k_more.stride()[:3], *v.stride()[:3], pos_stride, key_stride, scale, softcap or 1.0,
        window or 0, window is not None, softcap is not None, slopes is not None, shared, D, more, DV,
        block_d, block_more, block_dv, block_m, block_n, 1024,
        num_warps=8 if block_d > 128 and capability(q) >= 90 else 4, num_stages=2)
    _merge_kernel[(B * H * T,)](part, top, total, sinks, y, T, H, K, splits, sinks is not None, DV, block_dv,
                                num_warps=1 if block_dv <= 128 else 4)
    return y


@_decode.register_fake
def _(q, k, v, pos, key_pos, scale, window, softcap, slopes, sinks):
    return q.new_empty(*q.shape[:3], v.shape[-1])


def ok(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, sinks=None):
    tensors = (q, k, v, slopes, sinks)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    exact = q.dtype != torch.float32 or INTERPRETED
    return (exact and not grad and fits(*tensors) and q.dtype == k.dtype == v.dtype
            and q.shape[1] <= MAX_TOKENS and v.shape[-1] <= MAX_HEAD_DIM
            and (k.shape[-1] <= MAX_KEY or k.shape[-1] - v.shape[-1] <= MAX_KEY))


def fused(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, sinks=None):
    """v may be a view of the first coordinates of k; each is then read once."""
    return _decode(q, k, v, pos, key_pos, scale, window, softcap, slopes, sinks)


def cases():
    def heads(B, T, H, K, D, S, DV=None):
        made = randn(B, T, H, D), randn(B, S, K, D, seed=1), randn(B, S, K, DV or D, seed=2)
        return [x.detach() for x in made]

    def ring(S, newest):
        held = newest - (newest - torch.arange(S)) % S
        held[[1, S - 2]] = -1
        return held.to(torch.int32)
    latent, now = randn(1, 300, 1, 32, seed=1), torch.tensor([299])
    slopes = 2.0 ** -torch.arange(1, 5)
    return {
        'one token, a long cache': (*heads(2, 1, 4, 2, 20, 1100), torch.tensor([1050]), torch.arange(1100),
                                    0.2),
        'a cache that is nearly empty': (*heads(1, 1, 2, 1, 16, 900), torch.tensor([2]), torch.arange(900),
                                         0.25),
        'rings of two sequences, all flags': (*heads(2, 3, 4, 2, 8, 300), torch.arange(400, 403).repeat(2, 1),
                                              torch.stack((ring(300, 402), ring(300, 340))), 0.3, 211, 3.0,
                                              slopes, leaf(4).detach()),
        'latents': (randn(1, 1, 5, 32), latent, latent[..., :24], now, torch.arange(300), 0.2),
        'latents, a copy of them, two blocks of heads': (
            randn(1, 2, 40, 32), latent, latent[..., :24].clone(), torch.tensor([297, 298]),
            torch.arange(300), 0.2),
    }
