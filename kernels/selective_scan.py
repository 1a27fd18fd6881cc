"""
The selective scan of Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752, section 3): each of I channels
drives a state of N numbers, and the token decides how far time moves (dt), what is written (B) and read (C).

    s_t = exp(dt_t A) s_{t-1} + dt_t x_t B_t        y_t = <C_t, s_t> + D x_t

Backward, from the last token to the first, with g_t = dL/ds_t and q_t = dL/d(dt_t A):

    g_t = dy_t C_t + exp(dt_{t+1} A) g_{t+1}        q_t = g_t exp(dt_t A) s_{t-1}
    dx = dt <g, B> + D dy        d_dt = x <g, B> + <q, A>        dA = sum over tokens of dt q
    dB = sum over channels of dt x g        dC = sum over channels of dy s        dD = sum over tokens of dy x

Saved for the backward pass: the inputs, and the state in front of every CHUNK tokens. The states between are
computed again, chunk by chunk: all of them at once are N times as large as x, those kept are N / CHUNK times.

The loop runs over tokens, on (N,I) per sequence: channels innermost, because they are many, and time
outermost, so that a token's states are contiguous in memory. On a CPU this beats the parallel scans, which
move more memory. On a GPU it is right and slow, at a launch for each token.

The Triton kernels give each program some channels of one sequence, whose states stay in registers from the
first token to the last. A chunk of tokens is one tile (tokens, channels, N), and a scan along its tokens; the
backward pass has the state in front of every chunk, scans forward again, and then backward. dB and dC are
sums over channels, made by parts that are added up in an order that never changes. Not timed on a GPU yet.
"""
import torch
from torch import Tensor

from .common import cdiv, check, clamp, fits, jit, kernel, leaf, pow2, randn, tl

CHUNK = 16


def selective_scan_reference(x, dt, A, B, C, D, state=None):
    """The definition, one token after the other. Same arguments and result as selective_scan."""
    wide, (batch, _, I) = torch.promote_types(x.dtype, torch.float32), x.shape
    s = x.new_zeros(batch, I, A.shape[1], dtype=wide) if state is None else state.to(wide)
    y = []
    for x_t, dt_t, B_t, C_t in zip(*(v.to(wide).unbind(1) for v in (x, dt, B, C))):
        s = torch.exp(dt_t.unsqueeze(-1) * A) * s
        s = torch.addcmul(s, (dt_t * x_t).unsqueeze(-1), B_t.unsqueeze(1))
        y.append((s @ C_t.unsqueeze(-1)).squeeze(-1) + D * x_t)
    return torch.stack(y, dim=1).to(x.dtype), s


def _chunk(start, *tensors):
    """CHUNK tokens of tensors (B,T,...), from token `start`, time first, as wide as the state: (L,B,...)."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [v[:, start:start + CHUNK].transpose(0, 1).to(wide).contiguous() for v in tensors]


def _states(x, dt, A, B, s, decay, states):
    """Fill decay and states (L,B,N,I) of one chunk that follows state s (B,N,I) -> the state it ends with."""
    torch.mul(dt.unsqueeze(2), A, out=decay).exp_()
    torch.mul((dt * x).unsqueeze(2), B.unsqueeze(3), out=states)
    for decay_t, s_t in zip(decay.unbind(), states.unbind()):
        s = s_t.addcmul_(decay_t, s)
    return s


def _gradients(g, decay, d_s):
    """
    The same loop backward: g (L,B,N,I) holds dy_t C_t, and d_s is the gradient of the state the chunk ends
    with. Adds to each state's gradient what comes from later ones -> the gradient of the state before the
    chunk.
    """
    decays, gs = decay.unbind(), g.unbind()
    gs[-1].add_(d_s)
    for t in range(len(gs) - 1, 0, -1):
        gs[t - 1].addcmul_(decays[t], gs[t])
    return decays[0] * gs[0]


@torch.library.custom_op('nanoblocks::selective_scan', mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
          state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B,T,I), state (B,I,N), the states in front of the chunks (T/CHUNK,B,N,I))"""
    wide = torch.promote_types(x.dtype, torch.float32)
    A, D, s = A.T.to(wide).contiguous(), D.to(wide), state.transpose(1, 2).to(wide)
    y = x.new_empty(x.shape)
    starts = x.new_empty(-(-x.shape[1] // CHUNK), *s.shape, dtype=wide)
    decay, states = x.new_empty(2, min(CHUNK, x.shape[1]), *s.shape, dtype=wide)
    # the caller's autocast reaches into an op, and would round the products to bf16
    with torch.autocast(x.device.type, enabled=False):
        for t, start in zip(range(0, x.shape[1], CHUNK), starts):
            start.copy_(s)
            x_c, dt_c, B_c, C_c = _chunk(t, x, dt, B, C)
            L = len(x_c)
            s = _states(x_c, dt_c, A, B_c, start, decay[:L], states[:L])
            y_c = (C_c.unsqueeze(2) @ states[:L]).squeeze(2)  # (L,B,I)
            y[:, t:t + L] = y_c.addcmul_(D, x_c).transpose(0, 1)
    return y, s.transpose(1, 2).contiguous(), starts


@_scan.register_fake
def _(x, dt, A, B, C, D, state):
    wide, (batch, T, I) = torch.promote_types(x.dtype, torch.float32), x.shape
    starts = x.new_empty(-(-T // CHUNK), batch, A.shape[1], I, dtype=wide)
    return x.new_empty(x.shape), x.new_empty(state.shape, dtype=wide), starts


@torch.library.custom_op('nanoblocks::selective_scan_backward', mutates_args=())
def _scan_backward(
        dy: Tensor, d_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
        starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D and of the state in front of all."""
    wide, T = starts.dtype, x.shape[1]
    A_NI, d_s = A.T.to(wide).contiguous(), d_state.transpose(1, 2).to(wide)
    dx, d_dt, dB, dC = (v.new_empty(v.shape) for v in (x, dt, B, C))
    dA, dD = torch.zeros_like(A_NI), torch.zeros_like(D, dtype=wide)
    all_decay, all_g = x.new_empty(2, min(CHUNK, T), *d_s.shape, dtype=wide)
    all_states = x.new_empty(min(CHUNK, T) + 1, *d_s.shape, dtype=wide)
    with torch.autocast(x.device.type, enabled=False):
        for t, start in reversed(list(zip(range(0, T, CHUNK), starts))):
            x_c, dt_c, B_c, C_c, dy_c = _chunk(t, x, dt, B, C, dy)
            L = len(x_c)
            decay, g, states = all_decay[:L], all_g[:L], all_states[:L + 1]
            states[0] = start
            _states(x_c, dt_c, A_NI, B_c, start, decay, states[1:])
            torch.mul(C_c.unsqueeze(3), dy_c.unsqueeze(2), out=g)
            d_s = _gradients(g, decay, d_s)
            u = dt_c * x_c
            du = (B_c.unsqueeze(2) @ g).squeeze(2)  # (L,B,I)
            dx[:, t:t + L] = torch.addcmul(du * dt_c, D.to(wide), dy_c).transpose(0, 1)
            dB[:, t:t + L] = (u.unsqueeze(2) @ g.transpose(2, 3)).squeeze(2).transpose(0, 1)
            dC[:, t:t + L] = (dy_c.unsqueeze(2) @ states[1:].transpose(2, 3)).squeeze(2).transpose(0, 1)
            dD += (dy_c * x_c).flatten(0, 1).sum(0)
            q = decay.mul_(g).mul_(states[:-1])
            d_dt[:, t:t + L] = torch.mul(q, A_NI, out=g).sum(2).addcmul_(du, x_c).transpose(0, 1)
            dA += q.mul_(dt_c.unsqueeze(2)).flatten(0, 1).sum(0)
    return dx, d_dt, dA.T.to(A.dtype).contiguous(), dB, dC, dD.to(D.dtype), d_s.transpose(1, 2).contiguous()


@_scan_backward.register_fake
def _(dy, d_state, x, dt, A, B, C, D, starts):
    grads = [v.new_empty(v.shape) for v in (x, dt, A, B, C, D)]
    return *grads, d_state.new_empty(d_state.shape, dtype=starts.dtype)


def _save(ctx, inputs, output):
    *tensors, state = inputs
    ctx.state_dtype = state.dtype
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, dy, d_state, _):
    *grads, d_start = _scan_backward(dy, d_state, *ctx.saved_tensors)
    return *grads, d_start.to(ctx.state_dtype)


_scan.register_autograd(_backward, setup_context=_save)


def selective_scan(x, dt, A, B, C, D, state=None):
    """
    x (B,T,I), dt (B,T,I) after softplus, A (I,N) negative, B and C (B,T,N), D (I,), state (B,I,N) in front
    of the first token, None for zeros -> y (B,T,I) in x's dtype and the state (B,I,N) behind the last. The
    state and all sums are fp32, or fp64 when x is. A token with dt = 0 leaves the state as it is.
    """
    if x.shape[1] == 1:  # generating: nothing to gain from chunks
        with torch.autocast(x.device.type, enabled=False):
            return selective_scan_reference(x, dt, A, B, C, D, state)
    if state is None:
        wide, (batch, _, I) = torch.promote_types(x.dtype, torch.float32), x.shape
        state = x.new_zeros(batch, I, A.shape[1], dtype=wide)
    y, state, _ = _scan(x, dt, A, B, C, D, state)
    return y, state


# ----------------------------------------------------------------------------------------------------------
# Triton

MAX_STATE = 64  # numbers of a channel's state that fit in registers


@jit
def _after(decay_1, add_1, decay_2, add_2):
    """s -> decay s + add, first 1 and then 2, as one."""
    return decay_1 * decay_2, decay_2 * add_1 + add_2


@jit
def _tile(ptr, row, t, inside, i, T, WIDTH):
    """Rows t of sequence `row` of (B,T,WIDTH), columns i, zeros outside: fp32."""
    return tl.load(ptr + (row * T + t[:, None]) * WIDTH + i[None, :],
                   mask=inside[:, None] & (i[None, :] < WIDTH), other=0.0).to(tl.float32)


@kernel
def _fused_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, end_ptr, starts_ptr, T, I, N,
                  chunks, HAS_STATE: tl.constexpr, KEEP: tl.constexpr, L: tl.constexpr, BLOCK_I: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i, n = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_N)
    in_IN = (i[:, None] < I) & (n[None, :] < N)
    at_IN = i[:, None] * N + n[None, :]
    A = tl.load(A_ptr + at_IN, mask=in_IN, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + i, mask=i < I, other=0.0).to(tl.float32)
    state = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
    if HAS_STATE:
        state += tl.load(state_ptr + row * I * N + at_IN, mask=in_IN, other=0.0).to(tl.float32)
    step = tl.arange(0, L)
    # chunks are read ahead, which Triton by itself does only in loops with matrix products
    for chunk in tl.range(chunks, num_stages=3):
        if KEEP:
            tl.store(starts_ptr + (row * chunks + chunk) * I * N + at_IN, state, mask=in_IN)
        t = chunk * L + step
        x, dt = _tile(x_ptr, row, t, t < T, i, T, I), _tile(dt_ptr, row, t, t < T, i, T, I)
        B, C = _tile(B_ptr, row, t, t < T, n, T, N), _tile(C_ptr, row, t, t < T, n, T, N)
        decay = tl.exp(dt[:, :, None] * A[None, :, :])
        decay, added = tl.associative_scan((decay, (dt * x)[:, :, None] * B[:, None, :]), 0, _after)
        s = decay * state[None, :, :] + added  # (L,I,N)
        y = tl.sum(s * C[:, None, :], 2) + D[None, :] * x
        tl.store(y_ptr + (row * T + t[:, None]) * I + i[None, :], y.to(y_ptr.dtype.element_ty),
                 mask=(t[:, None] < T) & (i[None, :] < I))
        state = tl.sum(tl.where(step[:, None, None] == L - 1, s, 0.0), 0)
    tl.store(end_ptr + row * I * N + at_IN, state, mask=in_IN)


@kernel
def _fused_backward_kernel(dy_ptr, d_end_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, dx_ptr,
                           d_dt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, d_state_ptr, T, I, N, chunks,
                           L: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr):
    """dA (B,I,N), dD (B,I), dB and dC (channel blocks,B,T,N): parts, fp32."""
    row = tl.program_id(1).to(tl.int64)
    i, n = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_N)
    in_IN = (i[:, None] < I) & (n[None, :] < N)
    at_IN = i[:, None] * N + n[None, :]
    A = tl.load(A_ptr + at_IN, mask=in_IN, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + i, mask=i < I, other=0.0).to(tl.float32)
    d_s = tl.load(d_end_ptr + row * I * N + at_IN, mask=in_IN, other=0.0)
    dA, dD = tl.zeros([BLOCK_I, BLOCK_N], tl.float32), tl.zeros([BLOCK_I], tl.float32)
    step = tl.arange(0, L)
    part = (tl.program_id(0) * tl.num_programs(1) + row) * T
    for index in tl.range(chunks, num_stages=2):
        chunk = chunks - 1 - index
        t = chunk * L + step
        start = tl.load(starts_ptr + (row * chunks + chunk) * I * N + at_IN, mask=in_IN, other=0.0)
        # the states that tokens find: a scan of the tokens before them, within the chunk
        earlier = (step > 0) & (t <= T)
        x, dt = _tile(x_ptr, row, t - 1, earlier, i, T, I), _tile(dt_ptr, row, t - 1, earlier, i, T, I)
        B = _tile(B_ptr, row, t - 1, earlier, n, T, N)
        decay, added = tl.associative_scan(
            (tl.exp(dt[:, :, None] * A[None, :, :]), (dt * x)[:, :, None] * B[:, None, :]), 0, _after)
        found = decay * start[None, :, :] + added

        x, dt = _tile(x_ptr, row, t, t < T, i, T, I), _tile(dt_ptr, row, t, t < T, i, T, I)
        B, dy = _tile(B_ptr, row, t, t < T, n, T, N), _tile(dy_ptr, row, t, t < T, i, T, I)
        u = dt * x
        kept = tl.exp(dt[:, :, None] * A[None, :, :]) * found
        at_TN = (part + t[:, None]) * N + n[None, :]
        in_TN = (t[:, None] < T) & (n[None, :] < N)
        left = kept + u[:, :, None] * B[:, None, :]
        tl.store(dC_ptr + at_TN, tl.sum(dy[:, :, None] * left, 1), mask=in_TN)

        # the gradients of the states they leave: a scan of the tokens behind them, read from the last to the
        # first, because Triton's reversed scans move every number to another thread and back
        back = chunk * L + L - 1 - step
        dt_next = _tile(dt_ptr, row, back + 1, (step > 0) & (back + 1 < T), i, T, I)
        C, dy_back = _tile(C_ptr, row, back, back < T, n, T, N), _tile(dy_ptr, row, back, back < T, i, T, I)
        decay, added = tl.associative_scan(
            (tl.exp(dt_next[:, :, None] * A[None, :, :]), dy_back[:, :, None] * C[:, None, :]), 0, _after)
        g = tl.flip(decay * d_s[None, :, :] + added, 0)
        tl.store(dB_ptr + at_TN, tl.sum(u[:, :, None] * g, 1), mask=in_TN)
        du = tl.sum(g * B[:, None, :], 2)
        first = tl.sum(tl.where(step[:, None] == 0, dt, 0.0), 0)
        d_s = tl.exp(first[:, None] * A) * tl.sum(tl.where(step[:, None, None] == 0, g, 0.0), 0)
        q = g * kept
        at_TI, in_TI = (row * T + t[:, None]) * I + i[None, :], (t[:, None] < T) & (i[None, :] < I)
        tl.store(dx_ptr + at_TI, (dt * du + D[None, :] * dy).to(dx_ptr.dtype.element_ty), mask=in_TI)
        d_dt = x * du + tl.sum(q * A[None, :, :], 2)
        tl.store(d_dt_ptr + at_TI, d_dt.to(d_dt_ptr.dtype.element_ty), mask=in_TI)
        dA += tl.sum(dt[:, :, None] * q, 0)
        dD += tl.sum(dy * x, 0)
    tl.store(dA_ptr + row * I * N + at_IN, dA, mask=in_IN)
    tl.store(dD_ptr + row * I + i, dD, mask=i < I)
    tl.store(d_state_ptr + row * I * N + at_IN, d_s, mask=in_IN)


def _blocks(I, N):
    """
    Channels in a program, so that a tile of CHUNK tokens has about 4096 numbers, and N rounded up. Fewer
    channels would read half a sector of memory, and have more parts of dB and dC.
    """
    block_n = pow2(N)
    return clamp(pow2(I), 1, max(1, 4096 // (CHUNK * block_n))), block_n


@torch.library.custom_op('nanoblocks::selective_scan_fused', mutates_args=())
def _fused(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None,
           keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, state, the states in front of the chunks (B,T/CHUNK,I,N) where they are to be kept)"""
    check('selective_scan', x=(x, 'B T I'), dt=(dt, 'B T I'), A=(A, 'I N'), B=(B, 'B T N'), C=(C, 'B T N'),
          D=(D, 'I'), state=(state, 'B I N'))
    (batch, T, I), N = x.shape, A.shape[1]
    chunks = cdiv(T, CHUNK)
    x, dt, A, B, C, D = (v.contiguous() for v in (x, dt, A, B, C, D))
    y, end = x.new_empty(batch, T, I), x.new_empty(batch, I, N, dtype=torch.float32)
    starts = x.new_empty(batch, chunks if keep else 0, I, N, dtype=torch.float32)
    block_i, block_n = _blocks(I, N)
    _fused_kernel[(cdiv(I, block_i), batch)](
        x, dt, A, B, C, D, end if state is None else state.contiguous(), y, end, starts, T, I, N, chunks,
        state is not None, keep, CHUNK, block_i, block_n, num_warps=4)
    return y, end, starts


@torch.library.custom_op('nanoblocks::selective_scan_fused_backward', mutates_args=())
def _fused_backward(dy: Tensor, d_end: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                                        Tensor]:
    (batch, T, I), N = x.shape, A.shape[1]
    x, dt, A, B, C, D, dy = (v.contiguous() for v in (x, dt, A, B, C, D, dy))
    wide = dict(dtype=torch.float32, device=x.device)
    d_end = torch.zeros(batch, I, N, **wide) if d_end is None else d_end.contiguous()
    block_i, block_n = _blocks(I, N)
    parts = cdiv(I, block_i)
    dx, d_dt, d_state = torch.empty_like(x), torch.empty_like(dt), torch.empty(batch, I, N, **wide)
    dA, dD = torch.empty(batch, I, N, **wide), torch.empty(batch, I, **wide)
    dB, dC = torch.empty(2, parts, batch, T, N, **wide)
    _fused_backward_kernel[(parts, batch)](
        dy, d_end, x, dt, A, B, C, D, starts, dx, d_dt, dA, dB, dC, dD, d_state, T, I, N, cdiv(T, CHUNK),
        CHUNK, block_i, block_n, num_warps=8)
    dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    return dx, d_dt, dA.sum(0).to(A.dtype), dB, dC, dD.sum(0).to(D.dtype), d_state


@_fused.register_fake
def _(x, dt, A, B, C, D, state, keep):
    (batch, T, I), N = x.shape, A.shape[1]
    end = x.new_empty(batch, I, N, dtype=torch.float32)
    return x.new_empty(x.shape), end, end.new_empty(batch, cdiv(T, CHUNK) if keep else 0, I, N)


@_fused_backward.register_fake
def _(dy, d_end, x, dt, A, B, C, D, starts):
    grads = [v.new_empty(v.shape) for v in (x, dt, A, B, C, D)]
    return *grads, starts.new_empty(x.shape[0], *A.shape)


def _fused_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, state, _ = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(*tensors, output[2])


def _fused_autograd(ctx, dy, d_end, _):
    x, *rest = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *grads, d_state = _fused_backward(dy, d_end, x, *rest)
    return *grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None


_fused.register_autograd(_fused_autograd, setup_context=_fused_save)


def ok(x, dt, A, B, C, D, state=None):
    return fits(x, dt, A, B, C, D, state) and A.shape[1] <= MAX_STATE


def fused(x, dt, A, B, C, D, state=None):
    tensors = x, dt, A, B, C, D, state
    keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    return _fused(*tensors, keep)[:2]


def cases():
    def scan(B, T, I, N, state=True):
        return (randn(B, T, I), randn(B, T, I, seed=1).exp().float().requires_grad_(),
                (-randn(I, N).exp()).float().requires_grad_(), randn(B, T, N, seed=3), randn(B, T, N, seed=4),
                leaf(I, seed=5), leaf(B, I, N, seed=6) if state else None)
    x, dt, A, B, C, D, state = scan(2, 7, 10, 4)
    return {
        'a state, odd sizes': scan(2, 37, 11, 5),
        'no state': scan(1, 16, 6, 4, state=False),
        'one token': scan(2, 1, 6, 4),
        'not contiguous': (x.mT.contiguous().mT, dt, A, torch.cat((C, B), -1)[..., 4:], C, D, state),
    }
