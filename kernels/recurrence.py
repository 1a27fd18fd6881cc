"""
One recurrence for linear attention, RetNet, GLA, DeltaNet, gated DeltaNet, Kimi delta attention, mLSTM, RWKV-6
and RWKV-7. Each head has a state S of K keys by V values. With log decay g_t <= 0, one per head or one per key,

    S <- exp(g_t) S                  forget
    S <- S - f_t (e_t^T S)           erase what is stored under the key e_t; f_t = k_t unless it is given
    S <- S + k_t v_t^T               write
    y_t = q_t^T S                    read; `before`: what S was before the first line

Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236) neither forgets nor erases;
RetNet (Sun et al. 2023, https://arxiv.org/abs/2307.08621) forgets at a fixed rate; e = beta k is the delta rule
(Yang et al. 2024, https://arxiv.org/abs/2406.06484), gated where it forgets as well
(https://arxiv.org/abs/2412.06464).

Chunks of L tokens turn it into matrix products. With G the running sum of g in a chunk, S its state at the
start, and (x|y)_ij = sum over keys of x_i y_j exp(G_i - G_j), for j < i, or j <= i where y is read:

    (I + (e|k)) n = v - (e exp G) S            what each token really writes, in the place of v
    y = (q exp G) S + (q|k) n                  S <- exp(G_L) S + (k exp(G_L - G))^T n

The inverse T of the unit triangular I + (e|k) does not depend on S. So U = T v and W = T (e exp G) are made for
all chunks at once, and only n = U - W S, and S itself, go from chunk to chunk. Backward, of a decay per head:

    dn = (q|k)^T dy + (k exp(G_L - G)) Z       Z <- exp(G_L) Z + (q exp G)^T dy - W^T dn,  Z = dL/d(state behind)
    dv = T^T dn     d(e exp G) = -T^T dn S^T   d(e|k) = -(dv U^T + d(e exp G) W^T)

and g_t gets all that crosses from j < t to i >= t. With f given (RWKV-7), r = T ((e exp G) S + (e|k) v) is what
was stored, v is written as it is, y loses (q|f) r, and S loses (f exp(G_L - G))^T r.

exp(G_i - G_j) is a matrix for a decay per head. For a decay per key it is a factor of x and one of y, relative
to the first token of each 16, so that neither overflows; only within those 16 it is made for each key and pair.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common import randn
from .ssd import chunked, segment_decay

CHUNK, PART = 64, 16


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


def _in_turn(step, state, chunks):
    """(results of step(n, state) -> (result, state) for all chunks n, the states in front of them, the last)"""
    found, before = [], []
    for n in chunks:
        before.append(state)
        result, state = step(n, state)
        found.append(result)
    return found, before, state


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
        both = torch.linalg.solve_triangular(erases, torch.cat((v, started), -1), upper=False, unitriangular=True)
        U, W = both.split((v.shape[-1], k.shape[-1]), -1)
        written, read = (k * to_end).mT, q * from_start

        def step(n, s):
            new = torch.baddbmm(U[n].flatten(0, 1), W[n].flatten(0, 1), s, alpha=-1)
            return new, torch.baddbmm(keep[n].flatten(0, 1) * s, written[n].flatten(0, 1), new)
        news, starts, state = _in_turn(step, state.flatten(0, 1), range(len(q)))
        new, starts = torch.stack(news).view_as(v), torch.stack(starts).unflatten(1, q.shape[1:3])
        ctx.save_for_backward(q, k, g, e, decay, from_start, reads, erases, U, W, new, starts)
        return read @ starts + reads @ new, state.unflatten(0, q.shape[1:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_state):
        q, k, g, e, decay, from_start, reads, erases, U, W, new, starts = ctx.saved_tensors
        to_end, keep = decay[..., -1, :].unsqueeze(-1), from_start[..., -1:, :]
        k_end, d_direct = k * to_end, reads.mT @ dy
        found = (q * from_start).mT @ dy

        def step(n, z):
            dn = torch.baddbmm(d_direct[n].flatten(0, 1), k_end[n].flatten(0, 1), z)
            passed = torch.baddbmm(found[n].flatten(0, 1), W[n].flatten(0, 1).mT, dn, alpha=-1)
            return dn, passed.addcmul_(keep[n].flatten(0, 1), z)
        order = range(len(q) - 1, -1, -1)
        dns, ends, d_start = _in_turn(step, d_state.flatten(0, 1), order)
        dn, ends = torch.stack(dns[::-1]).view_as(new), torch.stack(ends[::-1]).view_as(starts)
        back = torch.linalg.solve_triangular(erases.mT, torch.cat((dn, -dn @ starts.mT), -1), upper=True,
                                             unitriangular=True)
        dv, d_started = back.split((new.shape[-1], k.shape[-1]), -1)
        d_reads = (dy @ new.mT).mul_(decay)
        d_erases = (dv @ U.mT).add_(d_started @ W.mT).mul_(decay).tril_(-1).neg_()
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


def _pairs(x, y, Gx, G, keep):
    """sum over keys of x_i y_j exp(Gx_i - G_j) where keep (L,L) allows it: x, y, Gx and G (...,L,K)."""
    rows, L = [], x.shape[-2]
    for start in range(0, L, PART):
        part = slice(start, min(start + PART, L))
        apart = Gx[..., part, None, :] - G[..., None, part, :]
        apart = apart.masked_fill(~keep[part, part].unsqueeze(-1), -torch.inf).exp()
        row = [(x[..., part, None, :] * y[..., None, part, :] * apart).sum(-1)]
        if start:
            at = G[..., start - 1:start, :]
            row.insert(0, (x[..., part, :] * (Gx[..., part, :] - at).exp())
                       @ (y[..., :start, :] * (at - G[..., :start, :]).exp()).mT)
        rows.append(F.pad(torch.cat(row, -1), (0, L - part.stop)))
    return torch.cat(rows, -2)


def _by_key(q, k, v, g, e, f, state, before):
    """The recurrence of N chunks with a decay per key: as _Delta, g (N,B,H,L,K), f or e and f may be None."""
    G = g.cumsum(-2)
    lower = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    strict = lower.tril(-1)
    seen, Gq = (strict, G - g) if before else (lower, G)
    reads, read = _pairs(q, k, Gq, G, seen), q * Gq.exp()
    to_end, keep = (G[..., -1:, :] - G).exp(), G[..., -1:, :].exp().mT
    k_end = (k * to_end).mT
    if e is None:
        def step(n, s):
            return read[n] @ s + reads[n] @ v[n], keep[n] * s + k_end[n] @ v[n]
    else:
        erases, started = _pairs(e, k if f is None else f, G, G, strict), e * G.exp()
        right = v if f is None else _pairs(e, k, G, G, strict) @ v
        U, W = torch.linalg.solve_triangular(
            erases, torch.cat((right, started), -1), upper=False, unitriangular=True,
        ).split((v.shape[-1], k.shape[-1]), -1)
    if e is not None and f is None:
        def step(n, s):
            new = U[n] - W[n] @ s
            return read[n] @ s + reads[n] @ new, keep[n] * s + k_end[n] @ new
    elif e is not None:
        lost, f_end = _pairs(q, f, Gq, G, seen), (f * to_end).mT

        def step(n, s):
            stored = U[n] + W[n] @ s
            return (read[n] @ s + reads[n] @ v[n] - lost[n] @ stored,
                    keep[n] * s + k_end[n] @ v[n] - f_end[n] @ stored)
    y, _, state = _in_turn(step, state, range(len(q)))
    return torch.stack(y), state


def recurrence(q, k, v, g, erase=None, along=None, state=None, before=False, chunk=CHUNK):
    """
    q and k (B,T,H,K), v (B,T,H,V), g (B,T,H,1) for a decay per head or (B,T,H,K) for one per key, <= 0; erase
    (e) and along (f) (B,T,H,K) or None, along only beside erase; state (B,H,K,V) in front of the first token,
    None for zeros -> y (B,T,H,V) in v's dtype and the state (B,H,K,V) behind the last. The state and all sums
    are fp32, or fp64 when v is. A token with g, k and erase of 0 leaves the state as it is.
    """
    (batch, T, H, V), K = v.shape, k.shape[-1]
    wide = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        if T == 1:  # generating: nothing to gain from chunks
            return recurrence_reference(q, k, v, g, erase, along, state, before)
        state = v.new_zeros(batch, H, K, V, dtype=wide) if state is None else state.to(wide)
        per_head = g.shape[-1] == 1 and along is None and not before
        if per_head and erase is None:
            y, state = chunked(v, g.squeeze(-1), k, q, state.mT, chunk)
            return y, state.mT

        def cut(x):
            """(B,T,H,.) -> (N,B,H,L,.); tokens of zeros fill the last chunk"""
            if x is None:
                return None
            x = F.pad(x.to(wide), (0, 0, 0, 0, 0, -T % size)).unflatten(1, (-1, size))
            return x.permute(1, 0, 3, 2, 4).contiguous()
        size = min(chunk, T)
        q, k, y, g, e, f = map(cut, (q, k, v, g, erase, along))
        if per_head:
            y, state = _Delta.apply(q, k, y, g.squeeze(-1), e, state)
        else:
            y, state = _by_key(q, k, y, g.expand(q.shape), e, f, state, before)
        return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(v.dtype), state


def cases():
    return {}


_ = randn
