"""
The recurrence of recurrence.py with a decay for each key, in chunks; in its letters,

    (x|y)_ij = sum over keys of x_i y_j exp(G_i - G_j)

exp(G_i - G_j) is a factor of x times one of y. So that neither overflows, both are relative to a token from j
to i: the last one of the first half of every 16, 32 and 64 tokens for pairs across their halves, and one
in the middle of every 8 for those within. The gradients of G are those of the factors: x dx, and -y dy.
"""
from itertools import product

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# tokens of the smallest squares
PART = 8
# The least log decay of a token: exp of it is too small for the digits of a state, and the largest
# factor, exp(-PART / 2 of it), does not overflow
WEAKEST = {torch.float32: -20.0, torch.float64: -150.0}


def in_turn(step, state, chunks):
    """(results of step(n, state) -> (result, state) of chunks n, the states in front of them, the last)"""
    found, before = [], []
    for n in chunks:
        before.append(state)
        result, state = step(n, state)
        found.append(result)
    return found, before, state


class _Squares:
    """
    Squares that a lower triangle (L,L) is made of: blocks of PART on its diagonal, or rows of the second half
    of every 2 size tokens beside columns of the first.
    """

    def __init__(self, size, on_diagonal):
        self.size, self.on_diagonal = size, on_diagonal

    def rows(self, x):
        """x (...,L,K) -> a view (...,n,size,K)"""
        return self._part(x, 1)

    def columns(self, y):
        return self._part(y, 0)

    def _part(self, x, half):
        if self.on_diagonal:
            return x.unflatten(-2, (-1, self.size))
        return x.unflatten(-2, (-1, 2, self.size)).select(-3, half)

    def factors(self, Gx, G):
        """exp(Gx_i - at) and exp(at - G_j), at a token between rows and columns."""
        columns = self.columns(G)
        last = PART // 2 if self.on_diagonal else self.size
        at = columns[..., last - 1:last, :]
        return (self.rows(Gx) - at).exp(), (at - columns).exp()

    def of(self, d):
        """d (...,L,L) -> (...,n,size,size)"""
        whole = self.size if self.on_diagonal else 2 * self.size
        blocks = d.unflatten(-1, (-1, whole)).unflatten(-3, (-1, whole))
        blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return blocks.tril() if self.on_diagonal else blocks[..., self.size:, :self.size]

    def put(self, d, inside):
        """The squares, with the triangles (...,2n,size,size) around them -> triangles (...,n,2size,2size)"""
        if self.on_diagonal:
            return d.tril_()
        first, second = inside.unflatten(-3, (-1, 2)).unbind(-3)
        return torch.cat((F.pad(first, (0, self.size)), torch.cat((d, second), -1)), -2)


def _squares(L):
    """Those of all sizes, for L tokens, from the smallest on."""
    yield _Squares(PART, on_diagonal=True)
    size = PART
    while size < L:
        yield _Squares(size, on_diagonal=False)
        size *= 2


class _Pairs(torch.autograd.Function):
    """
    (x|y) = sum over keys of x_i y_j exp(Gx_i - G_j), j <= i, for each x of the first `rows` of xy and each y
    of the others: all (...,L,K), L a power of 2 -> (...,L,L) each, by x, then by y. Gx: None for G.
    """

    @staticmethod
    def forward(ctx, G, Gx, rows, *xy):
        ctx.rows, results = rows, {}
        ctx.save_for_backward(G, Gx, *xy)
        for squares in _squares(G.shape[-2]):
            to_row, to_column = squares.factors(G if Gx is None else Gx, G)
            left = [squares.rows(x) * to_row for x in xy[:rows]]
            right = [(squares.columns(y) * to_column).mT for y in xy[rows:]]
            for i, j in product(range(len(left)), range(len(right))):
                results[i, j] = squares.put(left[i] @ right[j], results.get((i, j)))
        return tuple(x.squeeze(-3) for x in results.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        G, Gx, *xy = ctx.saved_tensors
        dxy = [torch.zeros_like(x) for x in xy]
        xs, ys, dxs, dys = xy[:ctx.rows], xy[ctx.rows:], dxy[:ctx.rows], dxy[ctx.rows:]
        for squares in _squares(G.shape[-2]):
            to_row, to_column = squares.factors(G if Gx is None else Gx, G)
            left = [squares.rows(x) * to_row for x in xs]
            right = [squares.columns(y) * to_column for y in ys]
            for grad, (i, j) in zip(grads, product(range(len(xs)), range(len(ys)))):
                d = squares.of(grad)
                squares.rows(dxs[i]).addcmul_(d @ right[j], to_row)
                squares.columns(dys[j]).addcmul_(d.mT @ left[i], to_column)
        dGx = sum(x * dx for x, dx in zip(xs, dxs))
        dG = sum(y * dy for y, dy in zip(ys, dys)).neg_()
        return (dG + dGx, None, None, *dxy) if Gx is None else (dG, dGx, None, *dxy)


class _Carry(torch.autograd.Function):
    """
    n = U - W S, then S <- keep S + add + M n, through N chunks: state (B,H,K,V), keep (N,B,H,K,1), add
    (N,B,H,K,V), M (N,B,H,K,L), U (N,B,H,L,V), W (N,B,H,L,K) -> n (N,B,H,L,V), S in front of each chunk and
    behind the last. add may be None, and M, U and W all three; n is U then.
    """

    @staticmethod
    def forward(ctx, state, keep, add, M, U, W):
        def step(n, s):
            new, after = None, keep[n] * s if add is None else torch.addcmul(add[n], keep[n], s)
            if M is not None:
                new = U[n] - W[n] @ s
                after = after + M[n] @ new
            return new, after
        news, starts, state = in_turn(step, state, range(len(keep)))
        new, starts = U if M is None else torch.stack(news), torch.stack(starts)
        ctx.adds = add is not None
        ctx.save_for_backward(keep, M, W, new, starts)
        return new, starts, state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_new, d_starts, d_end):
        keep, M, W, new, starts = ctx.saved_tensors

        def step(n, z):
            dn, passed = None, torch.addcmul(d_starts[n], keep[n], z)
            if M is not None:
                dn = d_new[n] + M[n].mT @ z
                passed = passed - W[n].mT @ dn
            return dn, passed
        dns, ends, d_state = in_turn(step, d_end, range(len(keep) - 1, -1, -1))
        ends = torch.stack(ends[::-1])
        d_keep, d_add = (ends * starts).sum(-1, keepdim=True), ends if ctx.adds else None
        if M is None:
            return d_state, d_keep, d_add, None, None, None
        dn = torch.stack(dns[::-1])
        return d_state, d_keep, d_add, ends @ new.mT, dn, (dn @ starts.mT).neg_()


def by_key(q, k, v, g, e, f, state, before):
    """The recurrence of N chunks with a decay per key: as _Delta, g (N,B,H,L,K), f or e and f may be None."""
    g = g.clamp(min=WEAKEST[g.dtype])
    G = g.cumsum(-2)
    Gq, columns = G - g if before else G, (k,) if f is None else (k, f)
    if e is None or before:
        reads = _Pairs.apply(G, Gq if before else None, 1, q, *columns)
        erases = () if e is None else _Pairs.apply(G, None, 1, e, *columns)
    else:
        both = _Pairs.apply(G, None, 2, q, e, *columns)
        reads, erases = both[:len(columns)], both[len(columns):]
    if before:
        reads = [x.tril(-1) for x in reads]
    to_end, keep = (G[..., -1:, :] - G).exp(), G[..., -1:, :].exp().mT
    written = (k * to_end).mT
    if e is None:
        _, starts, state = _Carry.apply(state, keep, written @ v, None, None, None)
        return (q * Gq.exp()) @ starts + reads[0] @ v, state
    right = v if f is None else -erases[0].tril(-1) @ v
    U, W = torch.linalg.solve_triangular(
        erases[-1], torch.cat((right, e * G.exp()), -1), upper=False, unitriangular=True,
    ).split((v.shape[-1], k.shape[-1]), -1)
    if f is None:
        new, starts, state = _Carry.apply(state, keep, None, written, U, W)
        return (q * Gq.exp()) @ starts + reads[0] @ new, state
    new, starts, state = _Carry.apply(state, keep, written @ v, (f * to_end).mT, U, W)
    return (q * Gq.exp()) @ starts + reads[0] @ v + reads[1] @ new, state
