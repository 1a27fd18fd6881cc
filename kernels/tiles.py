"""What the Triton kernels of recurrences in chunks share (ssd.py, recurrence.py): where their tiles lie."""
from .common import jit, tl


@jit
def state_at(ptr, index, p, n, P: tl.constexpr, N: tl.constexpr):
    """Where state number `index` of (...,P,N) lies, and which of its numbers are within it."""
    at = ptr + index.to(tl.int64) * (P * N) + p[:, None] * N + n[None, :]
    return at, (p[:, None] < P) & (n[None, :] < N)


@jit
def decays(total, step):
    """exp of the sum over j < t <= i in row i and column j, 0 where j > i: (L,L)."""
    past = step[:, None] >= step[None, :]
    return tl.exp(tl.where(past, total[:, None] - total[None, :], -1e30))


@jit
def tokens_at(b, t, h, T, H, WIDTH: tl.constexpr, cols):
    """Where tokens t of head h of (B,T,H,WIDTH) lie, and which numbers are within it; b has 64 bits."""
    return ((b * T + t[:, None]) * H + h) * WIDTH + cols[None, :], (t[:, None] < T) & (cols[None, :] < WIDTH)


@jit
def load(ptr, b, t, h, T, H, WIDTH: tl.constexpr, cols):
    at, inside = tokens_at(b, t, h, T, H, WIDTH, cols)
    return tl.load(ptr + at, mask=inside, other=0.0)


@jit
def store(ptr, x, b, t, h, T, H, WIDTH: tl.constexpr, cols):
    at, inside = tokens_at(b, t, h, T, H, WIDTH, cols)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@jit
def scaled(x, factor):
    """Rows times their factors, in x's dtype."""
    return (x.to(tl.float32) * factor[:, None]).to(x.dtype)


@jit
def square(ptr, number, step, L: tl.constexpr):
    """Where (L,L) matrix `number` lies."""
    return ptr + number.to(tl.int64) * (L * L) + step[:, None] * L + step[None, :]
