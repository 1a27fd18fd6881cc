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

The loop runs over tokens, on (N,I) per sequence: the channels innermost, as they are many, and time
outermost, so that a token's states are one piece of memory. On a CPU this beats the parallel scans, which
move more memory. On a GPU it is right and slow, at a launch for each token.
"""
import torch
from torch import Tensor

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
    # an op keeps the autocast of its caller, which would round the products to bf16
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
