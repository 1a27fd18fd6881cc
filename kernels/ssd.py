"""
State-space duality, the scan of Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060, section 6). Each
head has a state of P x N numbers, and a token scales all of it by one. So the recurrence is a sum over
earlier tokens,

    s_t = exp(dt_t A) s_{t-1} + dt_t x_t B_t^T        y_t = s_t C_t + D x_t
    y_t = sum over j <= t of <C_t, B_j> exp(A (dt_{j+1} + ... + dt_t)) dt_j x_j + D x_t

that is, causal attention without a softmax. It is computed in chunks of L tokens, with matrix products only:

    1. within a chunk     y = (C B^T * decay) (dt x), decay (L,L) from token j to token i
    2. a chunk's state    S = sum over j of decay from j to the chunk's end, dt_j x_j B_j^T
    3. between chunks     s <- exp(sum of dt A) s + S, one step per chunk
    4. from the past      y += C s, decayed from the chunk's start

Backward, with c the running sum of dt A in a chunk, S the state in front of it and Z = dL/d(state behind it):

    dM = dy x^T * dt_j * decay       du = (C B^T * decay)^T dy + exp(c_L - c) B Z^T       dx = dt du + D dy
    dC = sum over heads of dM B + exp(c) dy S         dB = sum over heads of dM^T C + exp(c_L - c) dt x Z
    Z of the chunk before = exp(c_L) Z + sum over i of exp(c_i) dy_i C_i^T
    d(dt_t A) = sum over j < t <= i of (dM * C B^T)_ij, and what crosses t on its way through S or Z

Plain PyTorch saves the decays, an (L,L) matrix per head and chunk, the states, and what they give to y. Of
bf16 it makes products in bf16, unless a state depends on them.

The Triton kernels never write an (L,L) matrix. One goes through the chunks in order, with the state in
registers, and leaves the state in front of each; one makes the outputs of all chunks at once. Where sequences
and heads are too few to fill a GPU, segments of chunks run at once, and twice: first each finds the state
that it leaves behind from nothing, and then it begins with what those before it left. They save the inputs
and the states, in x's dtype. Products are of numbers in x's dtype, sums are fp32. A decay below e^-30
counts as e^-30, so that running sums keep their digits.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import capability, cdiv, check, clamp, fits, jit, kernel, leaf, pow2, programs, randn, tl
from .tiles import decays, state_at

CHUNK = 64


def ssd_reference(x, dt, A, B, C, D, state=None):
    """The definition, one token after the other. Same arguments and result as ssd, without chunks."""
    wide, (batch, _, H, P) = torch.promote_types(x.dtype, torch.float32), x.shape
    s = x.new_zeros(batch, H, P, B.shape[-1], dtype=wide) if state is None else state.to(wide)
    # the heads of a group are neighbours
    B, C = (v.repeat_interleave(H // v.shape[2], dim=2) for v in (B, C))  # (B,T,H,N)
    y = []
    for x_t, dt_t, B_t, C_t in zip(*(v.to(wide).unbind(1) for v in (x, dt, B, C))):
        s = torch.exp(dt_t * A)[..., None, None] * s
        s = torch.addcmul(s, (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1), B_t.unsqueeze(2))
        y.append((s @ C_t.unsqueeze(-1)).squeeze(-1) + D.unsqueeze(-1) * x_t)
    return torch.stack(y, dim=1).to(x.dtype), s


def segment_decay(log_decay):
    """
    log_decay (...,L) <= 0 -> (...,L,L): exp of its sum over j < t <= i in row i and column j, 0 where j > i.

    Each is summed by itself. Differences of one running sum would be cheaper, but a token that forgets much
    makes that sum large, and all that follow inherit its rounding.
    """
    L = log_decay.shape[-1]
    step = log_decay.unsqueeze(-1) * log_decay.new_ones(L, L).tril(-1)
    return step.cumsum(-2).exp_().tril_()


def _side_by_side(v, G):
    """(B,K,L,H,P) -> (B,K,G,L,H/G P): the heads of a group share B and C, so they are one product."""
    return v.unflatten(3, (G, -1)).flatten(4).transpose(2, 3)


def _heads(v, P):
    """The reverse."""
    return v.transpose(2, 3).unflatten(-1, (-1, P)).flatten(3, 4)


def _product(a, b, dtype):
    """a @ b from numbers rounded to dtype."""
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _between_chunks(start, keep, added, order):
    """s <- keep s + added, over chunks k in order -> s before each (B,K,H,P,N), after the last (B,H,P,N)."""
    before = torch.empty_like(added)
    for k in order:
        before[:, k] = start
        start = torch.addcmul(added[:, k], keep[:, k, :, None, None], start)
    return before, start


class _Chunked(torch.autograd.Function):
    """
    What K chunks of L tokens read from their past: u = dt x (B,K,L,H,P), log_decay = dt A (B,K,L,H), B and C
    (B,K,L,G,N), all as wide as the state. Products that no state depends on are of numbers in `dtype`. The
    backward pass is the one above, in half the passes over (L,L) matrices that autograd makes.
    """

    @staticmethod
    def forward(ctx, u, log_decay, B, C, state, dtype):
        G, (P, N) = B.shape[3], state.shape[2:]
        B, C = B.transpose(2, 3), C.transpose(2, 3)                     # (B,K,G,L,N)
        log_decay = log_decay.transpose(2, 3)                           # (B,K,H,L)
        decay, from_start = segment_decay(log_decay), log_decay.cumsum(-1).exp_()
        scores = decay.unflatten(2, (G, -1)) * (C @ B.mT).unsqueeze(3)
        y = _product(scores.flatten(2, 3), u.transpose(2, 3), dtype).transpose(2, 3)    # (B,K,L,H,P)
        to_end = decay[..., -1, :].transpose(2, 3).unsqueeze(-1)        # (B,K,L,H,1)
        written = (_side_by_side(u * to_end, G).mT @ B).view(*decay.shape[:3], P, N)
        starts, state = _between_chunks(state, from_start[..., -1], written, range(u.shape[1]))
        past = _heads(_product(C, starts.view(*B.shape[:3], -1, N).mT, dtype), P)
        past = past * from_start.transpose(2, 3).unsqueeze(-1)
        ctx.dtype = dtype
        ctx.save_for_backward(u, log_decay, B, C, decay, from_start, starts, past)
        return past + y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_state):
        u, log_decay, B, C, decay, from_start, starts, past = ctx.saved_tensors
        G, P, product = B.shape[2], u.shape[4], partial(_product, dtype=ctx.dtype)
        starts = starts.view(*B.shape[:3], -1, B.shape[4])              # (B,K,G,H/G P,N)
        to_end = decay[..., -1, :].transpose(2, 3).unsqueeze(-1)        # (B,K,L,H,1)
        # 1. within the chunk: a token's own part does not decay
        products, (dy_heads, u_heads) = C @ B.mT, (v.transpose(2, 3) for v in (dy, u))
        scores = (decay.unflatten(2, (G, -1)) * products.unsqueeze(3)).flatten(2, 3)
        du = product(scores.mT, dy_heads).transpose(2, 3)
        d_scores = product(dy_heads, u_heads.mT).mul_(decay).unflatten(2, (G, -1))
        d_products = d_scores.sum(3)                                    # (B,K,G,L,L)
        q = d_scores.mul_(products.tril(-1).unsqueeze(3)).flatten(2, 3)
        crossing = q.sum(-1) - q.sum(-2) + (dy * past).sum(-1).transpose(2, 3)      # (B,K,H,L)
        # 2. through the states between the chunks, from the last to the first
        read = _side_by_side(dy * from_start.transpose(2, 3).unsqueeze(-1), G)
        keep, found = from_start[..., -1], (read.mT @ C).view(*decay.shape[:3], P, -1)
        ends, d_start = _between_chunks(d_state, keep, found, reversed(range(u.shape[1])))
        ends = ends.view_as(starts)
        kept = keep * (ends * starts).view(*keep.shape, -1).sum(-1)
        dC = product(read, starts) + d_products @ B
        dB = product(_side_by_side(u * to_end, G), ends) + d_products.mT @ C
        written = _heads(product(B, ends.mT), P) * to_end
        into = (u * written).sum(-1).transpose(2, 3)
        du = du.add_(written)
        # 3. where a token forgets everything, only the rounding of large sums is left: drop it
        d_decay = crossing.flip(-1).cumsum(-1).flip(-1) + into.cumsum(-1) - into + kept.unsqueeze(-1)
        d_decay = torch.where(log_decay > -30, d_decay, 0).transpose(2, 3)      # (B,K,L,H)
        return du, d_decay, dB.transpose(2, 3), dC.transpose(2, 3), d_start, None


def chunked(u, log_decay, B, C, state, chunk=CHUNK, dtype=None):
    """
    y_t = s_t C_t of s_t = exp(log_decay_t) s_{t-1} + u_t B_t^T: u (B,T,H,P), log_decay (B,T,H), B and C
    (B,T,G,N), state (B,H,P,N), all of one dtype, which y (B,T,H,P) and the state behind the last token have;
    dtype: of products that no state depends on, None for the same.
    """
    T = u.shape[1]
    chunk, tokens = min(chunk, T), (u, log_decay, B, C)
    if T % chunk:  # tokens of zeros fill the last one, which leaves the state as it is
        tokens = [F.pad(v, [0, 0] * (v.dim() - 2) + [0, -T % chunk]) for v in tokens]
    tokens = [v.unflatten(1, (-1, chunk)) for v in tokens]
    y, state = _Chunked.apply(*tokens, state, u.dtype if dtype is None else dtype)
    return y.flatten(1, 2)[:, :T], state


def ssd(x, dt, A, B, C, D, state=None, chunk=CHUNK):
    """
    x (B,T,H,P), dt (B,T,H) after softplus, A (H,) negative, B and C (B,T,G,N) with G dividing H, D (H,),
    state (B,H,P,N) in front of the first token, None for zeros; chunk changes the speed and nothing else ->
    y (B,T,H,P) in x's dtype and the state (B,H,P,N) behind the last. The state and all sums are fp32, or
    fp64 when x is. A token with dt = 0 leaves the state as it is.
    """
    wide, (batch, T, H, P) = torch.promote_types(x.dtype, torch.float32), x.shape
    # autocast would round the products to bf16
    with torch.autocast(x.device.type, enabled=False):
        if T == 1:  # generating: nothing to gain from chunks
            return ssd_reference(x, dt, A, B, C, D, state)
        state = x.new_zeros(batch, H, P, B.shape[-1], dtype=wide) if state is None else state.to(wide)
        wide_x, dt, B, C = (v.to(wide) for v in (x, dt, B, C))
        y, state = chunked(wide_x * dt.unsqueeze(-1), dt * A, B, C, state, chunk,
                           torch.bfloat16 if x.dtype == torch.bfloat16 else wide)
        return torch.addcmul(y, D.to(wide).unsqueeze(-1), wide_x).to(x.dtype), state


# ----------------------------------------------------------------------------------------------------------
# Triton. L tokens a chunk; (L,P) and (L,N) tiles of one head and its group.

MAX_HEAD_DIM, MAX_STATE = 128, 256


@jit
def _steps(dt_ptr, A_ptr, b, h, t, T, H):
    """Step sizes, and the running sum of their log decays: (L,) each, and its last (a scalar)."""
    dt = tl.load(dt_ptr + (b * T + t) * H + h, mask=t < T, other=0.0).to(tl.float32)
    decay = tl.maximum(dt * tl.load(A_ptr + h).to(tl.float32), -30.0)
    return dt, tl.cumsum(decay, 0), tl.sum(decay, 0)


@jit
def _tokens(ptr, b, t, part, stride_b, stride_t, T, WIDTH: tl.constexpr, cols):
    """Tokens t of sequence b of (B,T,parts,WIDTH), some columns of one part."""
    return tl.load(ptr + b * stride_b + t[:, None] * stride_t + part * WIDTH + cols[None, :],
                   mask=(t[:, None] < T) & (cols[None, :] < WIDTH), other=0.0)


@jit
def _leave(state, decay, left_ptr, decay_ptr, index, p, n, P: tl.constexpr, N: tl.constexpr):
    """Store what segment `index` leaves of nothing, and the exp of its decay."""
    at, inside = state_at(left_ptr, index, p, n, P, N)
    tl.store(at, state, mask=inside)
    tl.store(decay_ptr + index, tl.exp(decay))


@jit
def _pass_on(state, left_ptr, decay_ptr, index, p, n, P: tl.constexpr, N: tl.constexpr):
    """The state behind segment `index`, from the state in front of it."""
    at, inside = state_at(left_ptr, index, p, n, P, N)
    return tl.load(decay_ptr + index) * state + tl.load(at, mask=inside, other=0.0)


@kernel
def _states_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, state_ptr, left_ptr, decay_ptr, starts_ptr, end_ptr, T, H, G,
                   chunks, length, x_stride_b, x_stride_t, B_stride_b, B_stride_t, HAS_STATE: tl.constexpr,
                   ALONE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """
    For segments of `length` chunks: the state in front of every chunk (B,chunks,H,P,N), and the one behind
    the last (B,H,P,N). ALONE: what each segment leaves by itself (B,segments,H,P,N), and its decay.
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    step, segment, segments = tl.arange(0, L), tl.program_id(2), tl.num_programs(2)
    state, decay = tl.zeros([BLOCK_P, BLOCK_N], tl.float32), 0.0
    if HAS_STATE:
        given, inside = state_at(state_ptr, b * H + h, p, n, P, N)
        state += tl.load(given, mask=inside & (segment == 0), other=0.0).to(tl.float32)
    if not ALONE:
        for earlier in range(segment):
            state = _pass_on(state, left_ptr, decay_ptr, (b * segments + earlier) * H + h, p, n, P, N)
    for chunk in range(segment * length, tl.minimum(chunks, (segment + 1) * length)):
        if not ALONE:
            at, inside = state_at(starts_ptr, (b * chunks + chunk) * H + h, p, n, P, N)
            tl.store(at, state.to(starts_ptr.dtype.element_ty), mask=inside)
        t = chunk * L + step
        dt, total, last = _steps(dt_ptr, A_ptr, b, h, t, T, H)
        x = _tokens(x_ptr, b, t, h, x_stride_b, x_stride_t, T, P, p)
        B = _tokens(B_ptr, b, t, h // (H // G), B_stride_b, B_stride_t, T, N, n)
        u = x.to(tl.float32) * (tl.exp(last - total) * dt)[:, None]
        state = tl.exp(last) * state + tl.dot(tl.trans(u.to(x.dtype)), B)
        decay += last
    if ALONE:
        _leave(state, decay, left_ptr, decay_ptr, (b * segments + segment) * H + h, p, n, P, N)
    else:
        to_end, inside = state_at(end_ptr, b * H + h, p, n, P, N)
        tl.store(to_end, state, mask=inside & (segment == segments - 1))


@kernel
def _output_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, y_ptr, T, H, G, chunks, x_stride_b,
                   x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, P: tl.constexpr,
                   N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    b, h, chunk = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0)
    p, n, step = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, L)
    t, group = chunk * L + step, h // (H // G)
    dt, total, _ = _steps(dt_ptr, A_ptr, b, h, t, T, H)
    x = _tokens(x_ptr, b, t, h, x_stride_b, x_stride_t, T, P, p)
    B = _tokens(B_ptr, b, t, group, B_stride_b, B_stride_t, T, N, n)
    C = _tokens(C_ptr, b, t, group, C_stride_b, C_stride_t, T, N, n)
    scores = tl.dot(C, tl.trans(B)) * decays(total, step) * dt[None, :]
    at, inside = state_at(starts_ptr, (b * chunks + chunk) * H + h, p, n, P, N)
    state = tl.load(at, mask=inside, other=0.0)
    y = tl.dot(scores.to(x.dtype), x) + tl.dot(C, tl.trans(state)) * tl.exp(total)[:, None]
    y += tl.load(D_ptr + h).to(tl.float32) * x.to(tl.float32)
    tl.store(y_ptr + ((b * T + t[:, None]) * H + h) * P + p[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(t[:, None] < T) & (p[None, :] < P))


@kernel
def _state_grads_kernel(dy_ptr, dt_ptr, A_ptr, C_ptr, starts_ptr, d_end_ptr, left_ptr, decay_ptr, ends_ptr,
                        kept_ptr, d_state_ptr, T, H, G, chunks, length, C_stride_b, C_stride_t,
                        ALONE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
                        BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """
    The same from the last segment to the first: Z, the gradient of the state behind every chunk
    (B,chunks,H,P,N); the gradient of the first state (B,H,P,N); and this program's part of <Z, exp(c_L) S>
    (B,chunks,H,blocks of P).
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    step, segment, segments, decay = tl.arange(0, L), tl.program_id(2), tl.num_programs(2), 0.0
    from_end, inside = state_at(d_end_ptr, b * H + h, p, n, P, N)
    d_state = tl.load(from_end, mask=inside & (segment == segments - 1), other=0.0).to(tl.float32)
    if not ALONE:
        for index in range(1, segments - segment):
            d_state = _pass_on(d_state, left_ptr, decay_ptr, (b * segments + segments - index) * H + h, p, n,
                               P, N)
    first, behind = segment * length, tl.minimum(chunks, (segment + 1) * length)
    for index in range(first, behind):
        chunk = first + behind - 1 - index
        t, number = chunk * L + step, (b * chunks + chunk) * H + h
        dt, total, last = _steps(dt_ptr, A_ptr, b, h, t, T, H)
        if not ALONE:
            to, inside = state_at(ends_ptr, number, p, n, P, N)
            tl.store(to, d_state.to(ends_ptr.dtype.element_ty), mask=inside)
            start, inside = state_at(starts_ptr, number, p, n, P, N)
            state = tl.load(start, mask=inside, other=0.0).to(tl.float32)
            kept = tl.sum(tl.sum(d_state * state, 1), 0) * tl.exp(last)
            tl.store(kept_ptr + number * tl.num_programs(1) + tl.program_id(1), kept)
        dy = _tokens(dy_ptr, b, t, h, T * H * P, H * P, T, P, p)
        C = _tokens(C_ptr, b, t, h // (H // G), C_stride_b, C_stride_t, T, N, n)
        read = dy.to(tl.float32) * tl.exp(total)[:, None]
        d_state = tl.exp(last) * d_state + tl.dot(tl.trans(read.to(dy.dtype)), C)
        decay += last
    if ALONE:
        _leave(d_state, decay, left_ptr, decay_ptr, (b * segments + segment) * H + h, p, n, P, N)
    else:
        to_start, inside = state_at(d_state_ptr, b * H + h, p, n, P, N)
        tl.store(to_start, d_state, mask=inside & (segment == 0))


@kernel
def _head_grads_kernel(dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, ends_ptr, kept_ptr,
                       dx_ptr, d_dt_ptr, dA_ptr, dD_ptr, T, H, G, chunks, parts, x_stride_b, x_stride_t,
                       B_stride_b, B_stride_t, C_stride_b, C_stride_t, P: tl.constexpr, N: tl.constexpr,
                       L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """dx, d_dt, and the parts of dA (B,T,H) and dD (B,chunks,H)."""
    b, h, chunk = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0)
    p, n, step = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, L)
    t, group, number = chunk * L + step, h // (H // G), (b * chunks + chunk) * H + h
    dt, total, last = _steps(dt_ptr, A_ptr, b, h, t, T, H)
    x = _tokens(x_ptr, b, t, h, x_stride_b, x_stride_t, T, P, p)
    dy = _tokens(dy_ptr, b, t, h, T * H * P, H * P, T, P, p)
    B = _tokens(B_ptr, b, t, group, B_stride_b, B_stride_t, T, N, n)
    C = _tokens(C_ptr, b, t, group, C_stride_b, C_stride_t, T, N, n)
    scores = tl.dot(C, tl.trans(B)) * decays(total, step)
    # 1. within the chunk: a token's own part does not decay
    q = tl.dot(dy, tl.trans(x)) * scores * dt[None, :]
    q = tl.where(step[:, None] > step[None, :], q, 0.0)
    crossing = tl.sum(q, 1) - tl.sum(q, 0)
    du = tl.dot(tl.trans(scores.to(x.dtype)), dy)
    # 2. through the state that the chunk leaves
    at, inside = state_at(ends_ptr, number, p, n, P, N)
    written = tl.dot(B, tl.trans(tl.load(at, mask=inside, other=0.0))) * tl.exp(last - total)[:, None]
    x = x.to(tl.float32)
    into = dt * tl.sum(x * written, 1)
    du += written
    # 3. through the state in front of the chunk
    at, inside = state_at(starts_ptr, number, p, n, P, N)
    found = tl.dot(C, tl.trans(tl.load(at, mask=inside, other=0.0)))
    dy = dy.to(tl.float32)
    crossing += tl.exp(total) * tl.sum(dy * found, 1)
    part = tl.arange(0, 16)
    kept = tl.sum(tl.load(kept_ptr + number * parts + part, mask=part < parts, other=0.0), 0)
    d_decay = tl.cumsum(crossing, 0, reverse=True) + tl.cumsum(into, 0) - into + kept
    A = tl.load(A_ptr + h).to(tl.float32)
    D = tl.load(D_ptr + h).to(tl.float32)
    # where a token forgets everything, only the rounding of large sums is left: drop it
    d_decay = tl.where(dt * A > -30.0, d_decay, 0.0)
    tl.store(d_dt_ptr + (b * T + t) * H + h, (A * d_decay + tl.sum(x * du, 1)).to(d_dt_ptr.dtype.element_ty),
             mask=t < T)
    dx = dt[:, None] * du + D * dy
    tl.store(dx_ptr + ((b * T + t[:, None]) * H + h) * P + p[None, :], dx.to(dx_ptr.dtype.element_ty),
             mask=(t[:, None] < T) & (p[None, :] < P))
    tl.store(dA_ptr + (b * T + t) * H + h, dt * d_decay, mask=t < T)
    tl.store(dD_ptr + number, tl.sum(tl.sum(dy * x, 1), 0))


@kernel
def _group_grads_kernel(dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, starts_ptr, ends_ptr, dB_ptr, dC_ptr, T,
                        H, G, chunks, heads, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b,
                        C_stride_t, P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
                        BLOCK_N: tl.constexpr):
    """dB and dC from `heads` heads of a group: parts (H / G / heads,B,T,G,N), fp32."""
    b, group, chunk = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, tl.program_id(0)
    p, n, step = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, L)
    t, size = chunk * L + step, H // G
    B = _tokens(B_ptr, b, t, group, B_stride_b, B_stride_t, T, N, n)
    C = _tokens(C_ptr, b, t, group, C_stride_b, C_stride_t, T, N, n)
    d_scores = tl.zeros([L, L], tl.float32)
    dB, dC = tl.zeros([L, BLOCK_N], tl.float32), tl.zeros([L, BLOCK_N], tl.float32)
    first = tl.program_id(2) * heads
    for k in range(first, tl.minimum(size, first + heads)):
        h = group * size + k
        number = (b * chunks + chunk) * H + h
        dt, total, last = _steps(dt_ptr, A_ptr, b, h, t, T, H)
        x = _tokens(x_ptr, b, t, h, x_stride_b, x_stride_t, T, P, p)
        dy = _tokens(dy_ptr, b, t, h, T * H * P, H * P, T, P, p)
        d_scores += tl.dot(dy, tl.trans(x)) * decays(total, step) * dt[None, :]
        start, inside = state_at(starts_ptr, number, p, n, P, N)
        read = (dy.to(tl.float32) * tl.exp(total)[:, None]).to(dy.dtype)
        dC += tl.dot(read, tl.load(start, mask=inside, other=0.0))
        end, inside = state_at(ends_ptr, number, p, n, P, N)
        u = (x.to(tl.float32) * (tl.exp(last - total) * dt)[:, None]).to(x.dtype)
        dB += tl.dot(u, tl.load(end, mask=inside, other=0.0))
    d_scores = d_scores.to(B.dtype)
    dC += tl.dot(d_scores, B)
    dB += tl.dot(tl.trans(d_scores), C)
    batches = tl.num_programs(1) // G
    at = (((tl.program_id(2) * batches + b) * T + t[:, None]) * G + group) * N + n[None, :]
    in_TN = (t[:, None] < T) & (n[None, :] < N)
    tl.store(dB_ptr + at, dB, mask=in_TN)
    tl.store(dC_ptr + at, dC, mask=in_TN)


def _length(x):
    """Tokens of a chunk: half as many where products take both sides from registers."""
    return CHUNK if capability(x) >= 90 else CHUNK // 2


def _packed(x):
    """x (B,T,parts,width) as it is when each token's parts are one piece of memory, else copied."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _blocks(P, N):
    """Heads' and states' widths as tiles, and a head's as it is split where the chunks go in order."""
    block_p, block_n = max(16, pow2(P)), max(16, pow2(N))
    # Hopper's products want 64 rows
    return block_p, block_n, min(block_p, 64 if block_n <= 128 else 32)


def _segments(starts, parts):
    """
    For the kernels that go through the chunks in order: segments that fill the GPU, the chunks of each, the
    passes (whether segments are by themselves), and memory for what they leave there, and its decay.
    """
    batch, chunks, H, P, N = starts.shape
    length = cdiv(chunks, clamp(programs(starts) // (batch * H * parts), 1, chunks))
    segments = cdiv(chunks, length)
    left = starts.new_empty(batch, segments, H, P, N, dtype=torch.float32)
    return segments, length, [True, False][segments == 1:], left, left.new_empty(left.shape[:3])


@torch.library.custom_op('nanoblocks::ssd', mutates_args=())
def _fused(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
           state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, state, the states in front of the chunks (B,T/CHUNK,H,P,N))"""
    check('ssd', x=(x, 'B T H P'), dt=(dt, 'B T H'), A=(A, 'H'), B=(B, 'B T G N'), C=(C, 'B T G N'),
          D=(D, 'H'), state=(state, 'B H P N'))
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    if H % G:
        raise ValueError(f'ssd: {H} heads of x must be a multiple of the {G} groups of B')
    L, (block_p, block_n, split) = _length(x), _blocks(P, N)
    chunks = cdiv(T, L)
    x, B, C, dt, A, D = *map(_packed, (x, B, C)), dt.contiguous(), A.contiguous(), D.contiguous()
    y, end = x.new_empty(batch, T, H, P), x.new_empty(batch, H, P, N, dtype=torch.float32)
    starts = x.new_empty(batch, chunks, H, P, N)
    segments, length, passes, left, decay = _segments(starts, cdiv(P, split))
    for alone in passes:
        _states_kernel[(batch * H, cdiv(P, split), segments)](
            x, dt, A, B, end if state is None else state.contiguous(), left, decay, starts, end, T, H, G,
            chunks, length, *x.stride()[:2], *B.stride()[:2], state is not None, alone, P, N, L, split,
            block_n, num_warps=4, num_stages=3 if block_n <= 128 else 2)
    _output_kernel[(chunks, batch * H)](
        x, dt, A, B, C, D, starts, y, T, H, G, chunks, *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], P,
        N, L, block_p, block_n, num_warps=4)
    return y, end, starts


@torch.library.custom_op('nanoblocks::ssd_backward', mutates_args=())
def _fused_backward(dy: Tensor, d_end: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                                        Tensor]:
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    L, chunks, (block_p, block_n, split) = _length(x), starts.shape[1], _blocks(P, N)
    x, B, C, dt, A, D, dy = *map(_packed, (x, B, C)), *(v.contiguous() for v in (dt, A, D, dy))
    wide = dict(dtype=torch.float32, device=x.device)
    d_end = torch.zeros(batch, H, P, N, **wide) if d_end is None else d_end.contiguous()
    parts, ends = cdiv(P, split), torch.empty_like(starts)
    kept, d_state = torch.empty(batch, chunks, H, parts, **wide), torch.empty(batch, H, P, N, **wide)
    segments, length, passes, left, decay = _segments(starts, parts)
    for alone in passes:
        _state_grads_kernel[(batch * H, parts, segments)](
            dy, dt, A, C, starts, d_end, left, decay, ends, kept, d_state, T, H, G, chunks, length,
            *C.stride()[:2], alone, P, N, L, split, block_n, num_warps=4,
            num_stages=3 if block_n <= 128 else 2)
    dx, d_dt = x.new_empty(batch, T, H, P), torch.empty_like(dt)
    dA, dD = torch.empty(batch * T, H, **wide), torch.empty(batch * chunks, H, **wide)
    strides = [*x.stride()[:2], *B.stride()[:2], *C.stride()[:2]]
    _head_grads_kernel[(chunks, batch * H)](
        dy, x, dt, A, B, C, D, starts, ends, kept, dx, d_dt, dA, dD, T, H, G, chunks, parts, *strides, P, N,
        L, block_p, block_n, num_warps=8)
    heads = min(8, H // G)
    dB, dC = torch.empty(2, cdiv(H // G, heads), batch, T, G, N, **wide)
    _group_grads_kernel[(chunks, batch * G, len(dB))](
        dy, x, dt, A, B, C, starts, ends, dB, dC, T, H, G, chunks, heads, *strides, P, N, L, block_p,
        block_n, num_warps=8, num_stages=clamp(2**15 // (block_p * block_n), 1, 3))
    dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    return dx, d_dt, dA.sum(0).to(A.dtype), dB, dC, dD.sum(0).to(D.dtype), d_state


@_fused.register_fake
def _(x, dt, A, B, C, D, state):
    (batch, T, H, P), N = x.shape, B.shape[3]
    end = x.new_empty(batch, H, P, N, dtype=torch.float32)
    return x.new_empty(x.shape), end, x.new_empty(batch, cdiv(T, _length(x)), H, P, N)


@_fused_backward.register_fake
def _(dy, d_end, x, dt, A, B, C, D, starts):
    grads = [v.new_empty(v.shape) for v in (x, dt, A, B, C, D)]
    return *grads, x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, state = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(*tensors, output[2])


def _autograd(ctx, dy, d_end, _):
    x, *rest = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *grads, d_state = _fused_backward(dy, d_end, x, *rest)
    return *grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)


_fused.register_autograd(_autograd, setup_context=_save)


def ok(x, dt, A, B, C, D, state=None):
    # products of fp32 are left to PyTorch, and so is the one step of generation
    return (x.dtype != torch.float32 and fits(x, dt, A, B, C, D, state) and x.dtype == B.dtype == C.dtype
            and x.shape[1] > 1 and x.shape[-1] <= MAX_HEAD_DIM and B.shape[-1] <= MAX_STATE)


def fused(x, dt, A, B, C, D, state=None):
    return _fused(x, dt, A, B, C, D, state)[:2]


def cases():
    def scan(B, T, H, P, G, N, state=True, speed=0.5):
        return (randn(B, T, H, P), (speed * randn(B, T, H, seed=1).exp()).float().requires_grad_(),
                (-randn(H).exp()).float().requires_grad_(), randn(B, T, G, N, seed=3),
                randn(B, T, G, N, seed=4), leaf(H, seed=5), leaf(B, H, P, N, seed=6) if state else None)
    x, dt, A, B, C, D, state = scan(2, 20, 4, 6, 2, 5)
    both = torch.cat((x.flatten(2), B.flatten(2)), -1)
    forgets = scan(1, 70, 1, 4, 1, 4)
    forgets[1].data[0, 5] = 2000.0
    return {
        'a state, two groups, odd sizes': scan(2, 75, 4, 6, 2, 5),
        'no state, one group': scan(1, 130, 3, 20, 1, 18, state=False, speed=0.05),
        'two tokens': scan(2, 2, 2, 6, 1, 5),
        'many heads': scan(1, 20, 10, 4, 1, 4),
        'one head, segments of chunks': scan(1, 300, 1, 4, 1, 4, speed=0.05),
        'a token that forgets all': forgets,
        'slices of one buffer': (both[..., :24].unflatten(-1, (4, 6)), dt, A,
                                 both[..., 24:].unflatten(-1, (2, 5)), C, D, state),
        'not contiguous': (x.mT.contiguous().mT, dt, A, B, C, D, state),
    }
