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

The backward pass is autograd's. Saved are two (L,L) matrices per head and chunk: as much as 2 L / P times x.
"""
import torch
import torch.nn.functional as F

CHUNK = 64


def ssd_reference(x, dt, A, B, C, D, state=None):
    """The definition, one token after the other. Same arguments and result as ssd, without chunks."""
    wide, (batch, T, H, P) = torch.promote_types(x.dtype, torch.float32), x.shape
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
    causal = torch.ones(L, L, dtype=torch.bool, device=log_decay.device).tril()
    step = log_decay.unsqueeze(-1).expand(*log_decay.shape, L).masked_fill(~causal.tril(-1), 0)
    return step.cumsum(-2).masked_fill(~causal, -torch.inf).exp()


def _chunked(x, dt, A, B, C, state, chunk):
    """ssd without D, for T a multiple of the chunk and everything as wide as the state."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    # K chunks, each (H|G,L,...)
    u, log_decay, B, C = (v.unflatten(1, (-1, chunk)).transpose(2, 3)
                          for v in (x * dt.unsqueeze(-1), dt * A, B, C))
    decay = segment_decay(log_decay)                                    # (B,K,H,L,L)
    scores = (C @ B.mT).unsqueeze(3) * decay.unflatten(2, (G, -1))      # (B,K,G,H/G,L,L)
    y = scores.flatten(2, 3) @ u                                        # (B,K,H,L,P)

    # the heads of a group share B and C: side by side, they are one product
    u_end = (u * decay[..., -1, :].unsqueeze(-1)).mT.unflatten(2, (G, -1)).flatten(3, 4)
    written = (u_end @ B).view(batch, -1, H, P, N)                      # from (B,K,G,H/G P,N)
    total = log_decay.cumsum(-1)                                        # (B,K,H,L)
    before = []
    for write, keep in zip(written.unbind(1), total[..., -1].exp().unbind(1)):
        before.append(state)
        state = keep[..., None, None] * state + write
    past = torch.stack(before, dim=1).view(batch, -1, G, H // G * P, N)
    from_past = (past @ C.mT).view(batch, -1, H, P, chunk).mT           # (B,K,H,L,P)
    y = y + total.exp().unsqueeze(-1) * from_past
    return y.transpose(2, 3).flatten(1, 2), state


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
        chunk = min(chunk, T)
        wide_x, dt, B, C = (v.to(wide) for v in (x, dt, B, C))
        if T % chunk:  # tokens with dt = 0 fill the last one
            wide_x, dt, B, C = (F.pad(v, [0, 0] * (v.dim() - 2) + [0, -T % chunk])
                                for v in (wide_x, dt, B, C))
        y, state = _chunked(wide_x, dt, A.to(wide), B, C, state, chunk)
        return (y[:, :T] + D.to(wide).unsqueeze(-1) * x).to(x.dtype), state
