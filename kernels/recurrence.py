"""
One recurrence for linear attention, RetNet, GLA, DeltaNet, gated DeltaNet, Kimi delta attention, mLSTM,
RWKV-6 and RWKV-7. Each head has a state S of K keys by V values. With log decay g_t <= 0, one per head or one
per key,

    S <- exp(g_t) S                  forget
    S <- S - f_t (e_t^T S)           erase what is stored under the key e_t; f_t = k_t unless it is given
    S <- S + k_t v_t^T               write
    y_t = q_t^T S                    read; `before`: what S was before the first line

Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236) neither forgets nor erases;
RetNet (Sun et al. 2023, https://arxiv.org/abs/2307.08621) forgets at a fixed rate; e = beta k is the delta
rule (Yang et al. 2024, https://arxiv.org/abs/2406.06484), gated where it forgets as well
(https://arxiv.org/abs/2412.06464).

Chunks of L tokens turn it into matrix products. With G the running sum of g in a chunk, S its state at the
start, and (x|y)_ij = sum over keys of x_i y_j exp(G_i - G_j), for j < i, or j <= i where y is read:

    (I + (e|k)) n = v - (e exp G) S            what each token really writes, in the place of v
    y = (q exp G) S + (q|k) n                  S <- exp(G_L) S + (k exp(G_L - G))^T n

The inverse T of the unit triangular I + (e|k) does not depend on S. So U = T v and W = T (e exp G) are made
for all chunks at once, and only n = U - W S, and S itself, go from chunk to chunk. Backward, of a decay per
head, with Z the gradient of the state behind a chunk:

    dn = (q|k)^T dy + (k exp(G_L - G)) Z       Z <- exp(G_L) Z + (q exp G)^T dy - W^T dn
    dv = T^T dn     d(e exp G) = -dv S^T     d(e|k) = -dv n^T

and g_t gets all that crosses from j < t to i >= t. With f given (RWKV-7), r = T ((e exp G) S + (e|k) v) is
what was stored, v is written as it is, y loses (q|f) r, and S loses (f exp(G_L - G))^T r.

exp(G_i - G_j) is a matrix for a decay per head. For a decay per key, see decay_by_key.py.

The Triton kernels take a decay per head, without `along` and `before`; the rest is left to plain PyTorch, and
so are products of fp32. What goes from chunk to chunk is one kernel in each direction, with S or Z in
registers, that leaves S in front of each chunk and Z behind it; all else runs for all chunks at once. They
save the inputs, T, n and S, in v's dtype. Products are of numbers in v's dtype, those for T of TF32; sums are
fp32. A decay below e^-30 counts as e^-30, so that running sums keep their digits.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import capability, cdiv, check, fits, jit, kernel, leaf, pow2, randn, tl
from .decay_by_key import PART, by_key, in_turn
from .ssd import chunked, segment_decay
from .tiles import decays, load, scaled, square, state_at, store

CHUNK = 64


def recurrence_reference(q, k, v, g, erase=None, along=None, state=None, before=False):
    """The definition, one token after the other. Same arguments and result as recurrence."""
    wide = torch.promote_types(v.dtype, torch.float32)
    s = v.new_zeros(*v.shape[::2], k.shape[-1], v.shape[-1], dtype=wide) if state is None else state.to(wide)
    steps = [[None] * v.shape[1] if x is None else x.to(wide).unbind(1) for x in (q, k, v, g, erase, along)]
    y = []
    for q_t, k_t, v_t, g_t, e_t, f_t in zip(*steps):
        old, s = s, g_t.exp().unsqueeze(-1) * s
        if e_t is not None:
            stored = (e_t.unsqueeze(-1) * s).sum(-2, keepdim=True)              # (B,H,1,V)
            s = s - (k_t if f_t is None else f_t).unsqueeze(-1) * stored
        s = s + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        y.append((q_t.unsqueeze(-1) * (old if before else s)).sum(-2))
    return torch.stack(y, dim=1).to(v.dtype), s


class _Delta(torch.autograd.Function):
    """
    The recurrence of N chunks of L tokens with a decay per head: q, k and e (N,B,H,L,K), v (N,B,H,L,V),
    g (N,B,H,L), state (B,H,K,V).
    """

    @staticmethod
    def forward(ctx, q, k, v, g, e, state):
        decay, from_start = segment_decay(g), g.cumsum(-1).exp_().unsqueeze(-1)
        to_end, keep = decay[..., -1, :].unsqueeze(-1), from_start[..., -1:, :]
        reads = (q @ k.mT).mul_(decay)
        erases = (e @ k.mT).mul_(decay).tril_(-1)
        started = e * from_start
        U, W = torch.linalg.solve_triangular(
            erases, torch.cat((v, started), -1), upper=False, unitriangular=True,
        ).split((v.shape[-1], k.shape[-1]), -1)
        written, read = (k * to_end).mT, q * from_start

        def step(n, s):
            new = torch.baddbmm(U[n].flatten(0, 1), W[n].flatten(0, 1), s, alpha=-1)
            return new, torch.baddbmm(keep[n].flatten(0, 1) * s, written[n].flatten(0, 1), new)
        news, starts, state = in_turn(step, state.flatten(0, 1), range(len(q)))
        new, starts = torch.stack(news).view_as(v), torch.stack(starts).unflatten(1, q.shape[1:3])
        ctx.save_for_backward(q, k, g, e, decay, from_start, reads, erases, W, new, starts)
        return read @ starts + reads @ new, state.unflatten(0, q.shape[1:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_state):
        q, k, g, e, decay, from_start, reads, erases, W, new, starts = ctx.saved_tensors
        to_end, keep = decay[..., -1, :].unsqueeze(-1), from_start[..., -1:, :]
        k_end, d_direct = k * to_end, reads.mT @ dy
        found = (q * from_start).mT @ dy

        def step(n, z):
            dn = torch.baddbmm(d_direct[n].flatten(0, 1), k_end[n].flatten(0, 1), z)
            passed = torch.baddbmm(found[n].flatten(0, 1), W[n].flatten(0, 1).mT, dn, alpha=-1)
            return dn, passed.addcmul_(keep[n].flatten(0, 1), z)
        order = range(len(q) - 1, -1, -1)
        dns, ends, d_start = in_turn(step, d_state.flatten(0, 1), order)
        dn, ends = torch.stack(dns[::-1]).view_as(new), torch.stack(ends[::-1]).view_as(starts)
        dv = torch.linalg.solve_triangular(erases.mT, dn, upper=True, unitriangular=True)
        d_started = (dv @ starts.mT).neg_()
        d_reads = (dy @ new.mT).mul_(decay)
        d_erases = (dv @ new.mT).mul_(decay).tril_(-1).neg_()
        d_read, d_written = dy @ starts.mT, new @ ends.mT
        dq = torch.addcmul(d_reads @ k, d_read, from_start)
        de = torch.addcmul(d_erases @ k, d_started, from_start)
        dk = torch.addcmul(d_reads.mT @ q + d_erases.mT @ e, d_written, to_end)
        # what crosses each token on its way: within the chunk, from its start, to its end, through the state
        pairs = d_reads.mul_(q @ k.mT).tril_(-1).add_(d_erases.mul_(e @ k.mT))
        into = (d_written * k_end).sum(-1)
        crossing = pairs.sum(-1) - pairs.sum(-2) + ((d_read * q + d_started * e) * from_start).sum(-1)
        kept = (keep * ends * starts).sum((-2, -1)).unsqueeze(-1)
        dg = crossing.flip(-1).cumsum(-1).flip(-1) + into.cumsum(-1) - into + kept
        # where a token forgets everything, only the rounding of large sums is left
        dg = torch.where(g > -30, dg, 0)
        return dq, dk, dv, dg, de, d_start.unflatten(0, q.shape[1:3])


def recurrence(q, k, v, g, erase=None, along=None, state=None, before=False, chunk=CHUNK):
    """
    q and k (B,T,H,K), v (B,T,H,V), g (B,T,H,1) for a decay per head or (B,T,H,K) for one per key, <= 0; erase
    (e) and along (f) (B,T,H,K) or None, along only beside erase; state (B,H,K,V) in front of the first token,
    None for zeros -> y (B,T,H,V) in v's dtype and the state (B,H,K,V) behind the last. The state and all sums
    are fp32, or fp64 when v is. A token with g, k and along of 0 leaves the state as it is. A decay per key
    below WEAKEST, e^-20 in fp32, counts as that.
    """
    (batch, T, H, V), K = v.shape, k.shape[-1]
    wide = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        if T == 1:  # generating: nothing to gain from chunks
            return recurrence_reference(q, k, v, g, erase, along, state, before)
        state = v.new_zeros(batch, H, K, V, dtype=wide) if state is None else state.to(wide)
        per_head = g.shape[-1] == 1 and along is None and not before
        if per_head and erase is None:
            y, state = chunked(*(x.to(wide) for x in (v, g.squeeze(-1), k, q)), state.mT, chunk)
            return y.to(v.dtype), state.mT

        size = min(chunk, T) if per_head else max(PART, pow2(min(chunk, T)))

        def cut(x):
            """(B,T,H,.) -> (N,B,H,L,.); tokens of zeros fill the last chunk"""
            if x is None:
                return None
            x = F.pad(x.to(wide), (0, 0, 0, 0, 0, -T % size)).unflatten(1, (-1, size))
            return x.permute(1, 0, 3, 2, 4).contiguous()
        dtype, (q, k, v, g, e, f) = v.dtype, map(cut, (q, k, v, g, erase, along))
        if per_head:
            y, state = _Delta.apply(q, k, v, g.squeeze(-1), e, state)
        else:
            y, state = by_key(q, k, v, g.expand(q.shape), e, f, state, before)
        return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(dtype), state


# ----------------------------------------------------------------------------------------------------------
# Triton, for a decay per head. A program has L tokens of one head: (L,K) and (L,V) tiles, and (K,V) states.

MAX_WIDTH = 256


@jit
def _sums(g_ptr, b, h, t, T, H):
    """Running sum of the log decays (L,), and its last (a scalar)."""
    g = tl.load(g_ptr + (b * T + t) * H + h, mask=t < T, other=0.0)
    g = tl.maximum(g.to(tl.float32), -30.0)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@jit
def _inverse(lower, step):
    """
    The inverse of I + lower, (L,L) of at most 64, strictly lower triangular: of its 16 x 16 blocks on the
    diagonal D by substitution, all at once, and with X = D^-1 (the other blocks), whose fourth power is 0,
    (I + X)^-1 D^-1 = (I - X) (I + X^2) D^-1.
    """
    row, col = step[:, None], step[None, :]
    same = row // 16 == col // 16
    block = tl.where(same, lower, 0.0)
    inverse = tl.where(row == col, 1.0, 0.0)
    for j in range(15):
        # row j of each block is done: the rows below lose their part of it
        column = tl.sum(tl.where(col % 16 == j, block, 0.0), 1)
        done = tl.sum(tl.where(row % 16 == j, inverse, 0.0), 0)
        inverse -= tl.where(same, column[:, None] * done[None, :], 0.0)
    X = tl.dot(inverse, lower - block)
    inverse += tl.dot(tl.dot(X, X), inverse)
    return inverse - tl.dot(X, inverse)


@kernel
def _inverse_kernel(k_ptr, v_ptr, g_ptr, e_ptr, inverse_ptr, U_ptr, W_ptr, T, H, chunks, K: tl.constexpr,
                    V: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """The inverse (B,chunks,H,L,L), U and W of every chunk."""
    b, h, chunk = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0)
    c, step = tl.arange(0, BLOCK_K), tl.arange(0, L)
    t = chunk * L + step
    total, _ = _sums(g_ptr, b, h, t, T, H)
    k, e = load(k_ptr, b, t, h, T, H, K, c), load(e_ptr, b, t, h, T, H, K, c)
    erases = tl.dot(e, tl.trans(k)) * decays(total, step)
    inverse = _inverse(tl.where(step[:, None] > step[None, :], erases, 0.0), step).to(k.dtype)
    tl.store(square(inverse_ptr, (b * chunks + chunk) * H + h, step, L), inverse)
    store(W_ptr, tl.dot(inverse, scaled(e, tl.exp(total))), b, t, h, T, H, K, c)
    for first in range(0, V, BLOCK_V):
        d = first + tl.arange(0, BLOCK_V)
        store(U_ptr, tl.dot(inverse, load(v_ptr, b, t, h, T, H, V, d)), b, t, h, T, H, V, d)


@kernel
def _states_kernel(k_ptr, g_ptr, U_ptr, W_ptr, state_ptr, new_ptr, starts_ptr, end_ptr, T, H, chunks,
                   HAS_STATE: tl.constexpr, ERASE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                   L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """The state in front of every chunk (B,chunks,H,K,V) and behind the last (B,H,K,V), and n (B,T,H,V)."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    c, d = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_STATE:
        given, inside = state_at(state_ptr, b * H + h, c, d, K, V)
        state += tl.load(given, mask=inside, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        t = chunk * L + tl.arange(0, L)
        at, inside = state_at(starts_ptr, (b * chunks + chunk) * H + h, c, d, K, V)
        tl.store(at, state.to(starts_ptr.dtype.element_ty), mask=inside)
        total, last = _sums(g_ptr, b, h, t, T, H)
        k, new = load(k_ptr, b, t, h, T, H, K, c), load(U_ptr, b, t, h, T, H, V, d)
        if ERASE:
            found = tl.dot(load(W_ptr, b, t, h, T, H, K, c), state.to(k.dtype))
            new = (new.to(tl.float32) - found).to(k.dtype)
            store(new_ptr, new, b, t, h, T, H, V, d)
        state = tl.exp(last) * state + tl.dot(tl.trans(scaled(k, tl.exp(last - total))), new)
    to_end, inside = state_at(end_ptr, b * H + h, c, d, K, V)
    tl.store(to_end, state, mask=inside)


@kernel
def _output_kernel(q_ptr, k_ptr, g_ptr, new_ptr, starts_ptr, y_ptr, T, H, chunks, K: tl.constexpr,
                   V: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    b, h, chunk = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0)
    c, d, step = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, L)
    t = chunk * L + step
    total, _ = _sums(g_ptr, b, h, t, T, H)
    q, k = load(q_ptr, b, t, h, T, H, K, c), load(k_ptr, b, t, h, T, H, K, c)
    reads = tl.dot(q, tl.trans(k)) * decays(total, step)
    at, inside = state_at(starts_ptr, (b * chunks + chunk) * H + h, c, d, K, V)
    y = tl.dot(q, tl.load(at, mask=inside, other=0.0)) * tl.exp(total)[:, None]
    y += tl.dot(reads.to(q.dtype), load(new_ptr, b, t, h, T, H, V, d))
    store(y_ptr, y, b, t, h, T, H, V, d)


@kernel
def _direct_kernel(dy_ptr, q_ptr, k_ptr, g_ptr, e_ptr, inverse_ptr, direct_ptr, W_ptr, T, H, chunks,
                   ERASE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """What of dn does not depend on Z, (q|k)^T dy, and W again."""
    b, h, chunk = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0)
    c, step = tl.arange(0, BLOCK_K), tl.arange(0, L)
    t = chunk * L + step
    total, _ = _sums(g_ptr, b, h, t, T, H)
    q, k = load(q_ptr, b, t, h, T, H, K, c), load(k_ptr, b, t, h, T, H, K, c)
    reads = (tl.dot(q, tl.trans(k)) * decays(total, step)).to(q.dtype)
    for first in range(0, V, BLOCK_V):
        d = first + tl.arange(0, BLOCK_V)
        store(direct_ptr, tl.dot(tl.trans(reads), load(dy_ptr, b, t, h, T, H, V, d)), b, t, h, T, H, V, d)
    if ERASE:
        inverse = tl.load(square(inverse_ptr, (b * chunks + chunk) * H + h, step, L))
        started = scaled(load(e_ptr, b, t, h, T, H, K, c), tl.exp(total))
        store(W_ptr, tl.dot(inverse, started), b, t, h, T, H, K, c)


@kernel
def _state_grads_kernel(dy_ptr, q_ptr, k_ptr, g_ptr, direct_ptr, W_ptr, d_end_ptr, dn_ptr, ends_ptr,
                        d_state_ptr, T, H, chunks, ERASE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                        L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """
    From the last chunk to the first: Z behind each (B,chunks,H,K,V), dn (B,T,H,V), and the gradient of the
    first state (B,H,K,V).
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    c, d = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    from_end, inside = state_at(d_end_ptr, b * H + h, c, d, K, V)
    Z = tl.load(from_end, mask=inside, other=0.0).to(tl.float32)
    for index in range(chunks):
        chunk = chunks - 1 - index
        t = chunk * L + tl.arange(0, L)
        at, inside = state_at(ends_ptr, (b * chunks + chunk) * H + h, c, d, K, V)
        tl.store(at, Z.to(ends_ptr.dtype.element_ty), mask=inside)
        total, last = _sums(g_ptr, b, h, t, T, H)
        k_end = scaled(load(k_ptr, b, t, h, T, H, K, c), tl.exp(last - total))
        dn = tl.dot(k_end, Z.to(k_end.dtype)) + load(direct_ptr, b, t, h, T, H, V, d).to(tl.float32)
        store(dn_ptr, dn, b, t, h, T, H, V, d)
        read = scaled(load(q_ptr, b, t, h, T, H, K, c), tl.exp(total))
        Z = tl.exp(last) * Z + tl.dot(tl.trans(read), load(dy_ptr, b, t, h, T, H, V, d))
        if ERASE:
            Z -= tl.dot(tl.trans(load(W_ptr, b, t, h, T, H, K, c)), dn.to(k_end.dtype))
    to_start, inside = state_at(d_state_ptr, b * H + h, c, d, K, V)
    tl.store(to_start, Z, mask=inside)


@kernel
def _grads_kernel(dy_ptr, q_ptr, k_ptr, g_ptr, e_ptr, new_ptr, dn_ptr, inverse_ptr, starts_ptr, ends_ptr,
                  dq_ptr, dk_ptr, dv_ptr, dg_ptr, de_ptr, T, H, chunks, ERASE: tl.constexpr, K: tl.constexpr,
                  V: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    b, h, chunk = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, tl.program_id(0)
    c, step = tl.arange(0, BLOCK_K), tl.arange(0, L)
    t, number = chunk * L + step, (b * chunks + chunk) * H + h
    # 1. products with values and states, some columns after the others
    d_reads, d_erases = tl.zeros([L, L], tl.float32), tl.zeros([L, L], tl.float32)
    d_read, d_written = tl.zeros([L, BLOCK_K], tl.float32), tl.zeros([L, BLOCK_K], tl.float32)
    d_started, kept = tl.zeros([L, BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, V, BLOCK_V):
        d = first + tl.arange(0, BLOCK_V)
        dy, new = load(dy_ptr, b, t, h, T, H, V, d), load(new_ptr, b, t, h, T, H, V, d)
        start, inside = state_at(starts_ptr, number, c, d, K, V)
        end, _ = state_at(ends_ptr, number, c, d, K, V)
        S, Z = tl.load(start, mask=inside, other=0.0), tl.load(end, mask=inside, other=0.0)
        d_reads += tl.dot(dy, tl.trans(new))
        d_read += tl.dot(dy, tl.trans(S))
        d_written += tl.dot(new, tl.trans(Z))
        kept += tl.sum(S.to(tl.float32) * Z.to(tl.float32), 1)
        if ERASE:
            inverse = tl.load(square(inverse_ptr, number, step, L))
            dv = tl.dot(tl.trans(inverse), load(dn_ptr, b, t, h, T, H, V, d)).to(dy.dtype)
            store(dv_ptr, dv, b, t, h, T, H, V, d)
            d_erases += tl.dot(dv, tl.trans(new))
            d_started += tl.dot(dv, tl.trans(S))
    # 2. what crosses each token on its way: within the chunk, from its start, to its end, through the state
    total, last = _sums(g_ptr, b, h, t, T, H)
    decay, past = decays(total, step), step[:, None] > step[None, :]
    q, k = load(q_ptr, b, t, h, T, H, K, c), load(k_ptr, b, t, h, T, H, K, c)
    d_reads *= decay
    pairs = tl.where(past, d_reads * tl.dot(q, tl.trans(k)), 0.0)
    crossing, d_reads = tl.sum(pairs, 1) - tl.sum(pairs, 0), d_reads.to(q.dtype)
    d_read *= tl.exp(total)[:, None]
    crossing += tl.sum(d_read * q.to(tl.float32), 1)
    store(dq_ptr, d_read + tl.dot(d_reads, k), b, t, h, T, H, K, c)
    d_written *= tl.exp(last - total)[:, None]
    into = tl.sum(d_written * k.to(tl.float32), 1)
    dk = d_written + tl.dot(tl.trans(d_reads), q)
    if ERASE:
        e = load(e_ptr, b, t, h, T, H, K, c)
        d_erases = tl.where(past, -d_erases * decay, 0.0)
        pairs = d_erases * tl.dot(e, tl.trans(k))
        crossing += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        d_started *= -tl.exp(total)[:, None]
        crossing += tl.sum(d_started * e.to(tl.float32), 1)
        d_erases = d_erases.to(q.dtype)
        store(de_ptr, d_started + tl.dot(d_erases, k), b, t, h, T, H, K, c)
        dk += tl.dot(tl.trans(d_erases), e)
    store(dk_ptr, dk, b, t, h, T, H, K, c)
    dg = tl.cumsum(crossing, 0, reverse=True) + tl.cumsum(into, 0) - into + tl.exp(last) * tl.sum(kept, 0)
    # where a token forgets everything, only the rounding of large sums is left: drop it
    g = tl.load(g_ptr + (b * T + t) * H + h, mask=t < T, other=0.0).to(tl.float32)
    dg = tl.where(g > -30.0, dg, 0.0)
    tl.store(dg_ptr + (b * T + t) * H + h, dg.to(dg_ptr.dtype.element_ty), mask=t < T)


def _sizes(k, V):
    """
    (chunks, tokens of one, warps of a program, then two times (K, V, tokens, keys as a tile, values as one)):
    for chunks in parallel, and for kernels that hold states or their gradients, which take fewer values.
    """
    K, small = k.shape[-1], k.shape[-1] <= 128
    # half as many tokens where products take both sides from registers, and where keys take too many
    L = CHUNK if capability(k) >= 90 and small else CHUNK // 2
    # at least 32 wide: Triton 3.6 multiplies (L,L) by (L,16) wrongly on an H200
    block_k, block_v = max(32, pow2(K)), max(32, pow2(V))
    sizes = [(K, V, L, block_k, min(block_v, limit)) for limit in ((128, 32) if small else (64, 16))]
    return cdiv(k.shape[1], L), L, 4 if small else 8, *sizes


@torch.library.custom_op('nanoblocks::recurrence', mutates_args=())
def _fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor | None,
           state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    (y, state, the states in front of the chunks (B,chunks,H,K,V), T of the chunks (B,chunks,H,L,L) and
    n (B,T,H,V), both empty without erase)
    """
    check('recurrence', q=(q, 'B T H K'), k=(k, 'B T H K'), v=(v, 'B T H V'), g=(g, 'B T H 1'),
          erase=(erase, 'B T H K'), state=(state, 'B H K V'))
    (batch, T, H, V), K, erases = v.shape, k.shape[-1], erase is not None
    chunks, L, warps, sizes, narrow = _sizes(k, V)
    q, k, v, g, erase, state = (x if x is None else x.contiguous() for x in (q, k, v, g, erase, state))
    y, end = v.new_empty(v.shape), v.new_empty(batch, H, K, V, dtype=torch.float32)
    starts, U, W = v.new_empty(batch, chunks, H, K, V), v, k
    inverse, new = (v.new_empty(s if erases else 0) for s in ((batch, chunks, H, L, L), v.shape))
    if erases:
        U, W = torch.empty_like(v), torch.empty_like(k)
        _inverse_kernel[(chunks, batch * H)](k, v, g, erase, inverse, U, W, T, H, chunks, *sizes,
                                             num_warps=warps)
    _states_kernel[(batch * H, cdiv(V, narrow[-1]))](
        k, g, U, W, end if state is None else state, new, starts, end, T, H, chunks, state is not None,
        erases, *narrow, num_warps=warps, num_stages=3)
    _output_kernel[(chunks, batch * H, cdiv(V, sizes[-1]))](
        q, k, g, new if erases else v, starts, y, T, H, chunks, *sizes, num_warps=warps)
    return y, end, starts, inverse, new


@torch.library.custom_op('nanoblocks::recurrence_backward', mutates_args=())
def _fused_backward(dy: Tensor, d_end: Tensor | None, q: Tensor, k: Tensor, g: Tensor, erase: Tensor | None,
                    starts: Tensor, inverse: Tensor,
                    new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, erase and state; new: v without erase"""
    (batch, T, H, V), K, erases = new.shape, k.shape[-1], erase is not None
    chunks, _, warps, sizes, narrow = _sizes(k, V)
    dy, q, k, g, new = (x.contiguous() for x in (dy, q, k, g, new))
    e = erase.contiguous() if erases else k
    d_state = k.new_empty(batch, H, K, V, dtype=torch.float32)
    d_end = torch.zeros_like(d_state) if d_end is None else d_end.contiguous()
    direct, dn, W, ends = (torch.empty_like(x) for x in (new, new, k, starts))
    _direct_kernel[(chunks, batch * H)](dy, q, k, g, e, inverse, direct, W, T, H, chunks, erases, *sizes,
                                        num_warps=warps)
    _state_grads_kernel[(batch * H, cdiv(V, narrow[-1]))](
        dy, q, k, g, direct, W, d_end, dn, ends, d_state, T, H, chunks, erases, *narrow, num_warps=warps,
        num_stages=2)
    dq, dk, dg, de = *(torch.empty_like(x) for x in (q, k, g)), k.new_empty(k.shape if erases else 0)
    dv = torch.empty_like(new) if erases else dn
    _grads_kernel[(chunks, batch * H)](
        dy, q, k, g, e, new, dn, inverse, starts, ends, dq, dk, dv, dg, de, T, H, chunks, erases, *narrow,
        num_warps=8)
    return dq, dk, dv, dg, de, d_state


@_fused.register_fake
def _(q, k, v, g, erase, state):
    (batch, H, V), K, erases = v.shape[::2] + v.shape[3:], k.shape[-1], erase is not None
    chunks, L, *_ = _sizes(k, V)
    end, starts = v.new_empty(batch, H, K, V, dtype=torch.float32), v.new_empty(batch, chunks, H, K, V)
    inverse, new = (v.new_empty(s if erases else 0) for s in ((batch, chunks, H, L, L), v.shape))
    return v.new_empty(v.shape), end, starts, inverse, new


@_fused_backward.register_fake
def _(dy, d_end, q, k, g, erase, starts, inverse, new):
    de = k.new_empty(0 if erase is None else k.shape)
    state = k.new_empty(k.shape[0], *starts.shape[2:], dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, new, g)), de, state


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, g, erase, state = inputs
    _, _, starts, inverse, new = output
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(q, k, g, erase, starts, inverse, v if erase is None else new)


def _autograd(ctx, dy, d_end, *_):
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[-1]) if dy is None else dy
    *grads, de, d_state = _fused_backward(dy, d_end, *saved)
    return (*grads, None if saved[3] is None else de,
            None if ctx.state_dtype is None else d_state.to(ctx.state_dtype))


_fused.register_autograd(_autograd, setup_context=_save)


def ok(q, k, v, g, erase=None, along=None, state=None, before=False):
    # products of fp32 are left to PyTorch, and so is the one step of generation
    narrow = v.dtype != torch.float32 and fits(q, k, v, g, erase, state)
    return (narrow and g.shape[-1] == 1 and along is None and not before and v.shape[1] > 1
            and max(k.shape[-1], v.shape[-1]) <= MAX_WIDTH)


def fused(q, k, v, g, erase=None, along=None, state=None, before=False):
    # a model makes keys of length 1 in fp32, and the kernels multiply numbers of one type
    q, k, erase = (x if x is None else x.to(v.dtype) for x in (q, k, erase))
    return _fused(q, k, v, g, erase, state)[:2]


def cases():
    def drawn(B, T, H, K, V, beta=None, state=True, speed=0.1):
        """q, k, v, g, erase, along, state; beta: the largest by which something is erased."""
        q, k, v = randn(B, T, H, K), F.normalize(randn(B, T, H, K, seed=1), dim=-1), randn(B, T, H, V, seed=2)
        g = (-speed * randn(B, T, H, 1, seed=3).exp()).float().requires_grad_()
        erase = beta and beta * randn(B, T, H, 1, seed=4).sigmoid() * k
        return q, k, v, g, erase, None, leaf(B, H, K, V, seed=5) if state else None
    q, k, v, g, erase, _, state = drawn(2, 20, 2, 6, 5, 1)
    forgets = drawn(1, 70, 1, 4, 4, 1)
    forgets[3].data[0, 5] = -2000.0
    return {
        'erased, a state, odd sizes': drawn(2, 75, 3, 6, 5, 1),
        'erased twice over, no state': drawn(1, 130, 2, 20, 18, 2, state=False, speed=0.02),
        'not erased, a state': drawn(2, 75, 3, 6, 5),
        'not erased, no state': drawn(1, 130, 2, 20, 18, state=False),
        'two tokens': drawn(2, 2, 2, 6, 5, 1),
        'keys and values of several tiles': drawn(1, 40, 1, 140, 70, 1),
        'strong decay': drawn(1, 70, 2, 8, 8, 1, speed=3),
        'a token that forgets all': forgets,
        'not contiguous': (*torch.cat((q, k), -1).split(6, -1), v.mT.contiguous().mT, g, erase, None, state),
    }
