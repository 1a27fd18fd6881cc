"""
The state-space mixers, Mamba1 and Mamba2, and the cache they share.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels as ops
from kernels.causal_conv import causal_conv
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from model import Linear, RMSNorm, out_proj

ops.causal_conv, ops.selective_scan, ops.ssd = causal_conv, selective_scan, ssd

# ----------------------------------------------------------------------------------------------------------
# State spaces


class StateCache:
    """
    What one recurrent layer keeps of past tokens, as much for one as for a million: the last inputs of its
    convolution, and its state. The state is fp32 (fp64 in an fp64 model): it is a sum over all tokens, and in
    bf16 late ones would be rounded away.
    """

    def __init__(self, batch_size, tail, state, dtype, device):
        wide = torch.promote_types(dtype, torch.float32)
        self.tail = torch.zeros(batch_size, *tail, dtype=dtype, device=device)      # (B,W-1,I)
        self.state = torch.zeros(batch_size, *state, dtype=wide, device=device)     # (B,I,N) or (B,H,P,N)
        self.empty = True

    def read(self):
        """(tail, state), both None before the first token, so that a prefill is the training path."""
        return (None, None) if self.empty else (self.tail, self.state)

    def write(self, tail, state):
        self.tail.copy_(tail.detach())
        self.state.copy_(state.detach())
        self.empty = False

    def reset(self):
        """Forget everything, keep the memory."""
        self.tail.zero_()
        self.state.zero_()
        self.empty = True

    def expand(self, n):
        """Every sequence n times, next to each other: one prompt, n continuations."""
        self.tail, self.state = self.tail.repeat_interleave(n, 0), self.state.repeat_interleave(n, 0)

    def nbytes(self):
        """Bytes allocated."""
        return self.tail.nbytes + self.state.nbytes


def wide(x):
    """x in fp32, or fp64 if it is: for step sizes and decays, whose rounding would add up over all tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def close_gap(tail, x, pos):
    """
    tail (B,W-1,I) and the inputs x (B,T,I) behind it, where x may begin with padding: the same two, with the
    tail moved up to the first token. What stands before it then is read by padding only.
    """
    both, sizes = torch.cat((tail, x), dim=1), (tail.shape[1], x.shape[1])
    if x.shape[1] == 1:  # generating: the same in a third of the operations
        moved = torch.where((pos < 0).unsqueeze(-1), torch.cat((both[:, :1], tail), dim=1), both)
        return moved.split(sizes, dim=1)
    pad, slot = (pos < 0).sum(-1).view(-1, 1), torch.arange(sum(sizes), device=x.device)
    source = torch.where(slot < pad + sizes[0], slot - pad, slot).clamp(min=0)     # (1 or B,W-1+T)
    return both.gather(1, source.unsqueeze(-1).expand_as(both)).split(sizes, dim=1)


def step_size(dt, ctx):
    """dt (B,T,...) through softplus, in fp32. Padding takes steps of size 0, which leave the state alone."""
    dt = F.softplus(wide(dt))
    return dt if ctx.causal else dt.masked_fill((ctx.pos < 0).unsqueeze(-1), 0)


def draw_step_bias(shape, generator):
    """The bias whose softplus is spread evenly in log from 0.001 to 0.1 (Gu and Dao 2023, section 3.6)."""
    dt = 1e-3 * 100 ** torch.rand(shape, generator=generator)
    return dt + torch.log(-torch.expm1(-dt))


class CausalConv(nn.Module):
    """Each channel mixed over the last W tokens, then SiLU (kernels/causal_conv.py)."""

    def __init__(self, channels, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def draw(self, leaf, generator):
        # as nn.Conv1d does: a std of 0.02 would all but silence the channels
        bound = self.weight.shape[1] ** -0.5
        return bound * (2 * torch.rand(getattr(self, leaf).shape, generator=generator) - 1)

    def forward(self, x, ctx, tail):
        """x (B,T,I), tail (B,W-1,I) or None -> (B,T,I) and the new tail"""
        if not ctx.causal:
            if tail is None:
                tail = x.new_zeros(x.shape[0], self.weight.shape[1] - 1, x.shape[2])
            tail, x = close_gap(tail, x, ctx.pos)
        y, tail = ops.causal_conv(x, self.weight, self.bias, tail)
        return F.silu(y), tail


class StepProjection(Linear):
    """Mamba-1's projection of a few numbers per token to a step size per channel."""

    def __init__(self, rank, channels):
        super().__init__(rank, channels, bias=True)

    def draw(self, leaf, generator):
        if leaf == 'bias':
            return draw_step_bias(self.bias.shape, generator)
        return self.in_features ** -0.5 * (2 * torch.rand(self.weight.shape, generator=generator) - 1)

    def forward(self, x):
        # the bias is as low as -7, where bf16 has steps of 3 %: it is added in fp32
        return wide(F.linear(x, self.weight)) + wide(self.bias)


class Mamba1(nn.Module):
    """
    Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752): convolution, selective scan, gate. Every
    channel has a state of its own, N numbers that decay at N rates; step size, input and read-out come from
    the token.
    """
    default_state = 16

    def __init__(self, c):
        super().__init__()
        inner, N, rank = c.ssm_expand * c.n_embd, c.ssm_state, c.ssm_dt_rank
        self.sizes = (rank, N, N)
        self.in_proj = Linear(c.n_embd, 2 * inner, c.bias)  # the input and its gate, side by side
        self.conv1d = CausalConv(inner, c.ssm_conv)
        self.x_proj = Linear(inner, sum(self.sizes), bias=False)  # step size, B and C
        self.dt_proj = StepProjection(rank, inner)
        self.A_log, self.D = nn.Parameter(torch.empty(inner, N)), nn.Parameter(torch.empty(inner))
        self.c_proj = out_proj(c, inner)
        # Jamba (Lieber et al. 2024, https://arxiv.org/abs/2403.19887) keeps large models stable with these
        self.dt_norm, self.b_norm, self.c_norm = (
            RMSNorm(size, c) if c.ssm_norm else nn.Identity() for size in self.sizes)

    @staticmethod
    def default_dt_rank(n_embd):
        return math.ceil(n_embd / 16)

    def draw(self, leaf, generator):
        # decay rates 1..N in every channel (S4D-Real); D passes the input through
        if leaf == 'A_log':
            return torch.arange(1.0, self.A_log.shape[1] + 1).log().expand(self.A_log.shape)
        return torch.ones(self.D.shape)

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        tail, state = (None, None) if cache is None else cache.read()
        x, gate = self.in_proj(x).chunk(2, dim=-1)                  # (B,T,I)
        x, tail = self.conv1d(x, ctx, tail)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)         # (B,T,R|N|N)
        dt = step_size(self.dt_proj(self.dt_norm(dt)), ctx)         # (B,T,I)
        A = -torch.exp(wide(self.A_log))
        y, state = ops.selective_scan(x, dt, A, self.b_norm(B), self.c_norm(C), self.D, state)
        if cache is not None:
            cache.write(tail, state)
        return self.c_proj(y * F.silu(gate))

    def new_cache(self, batch_size, slots, dtype, device):
        """slots is of no concern: the state has one size for any number of tokens."""
        (inner, N), W = self.A_log.shape, self.conv1d.weight.shape[1]
        return StateCache(batch_size, (W - 1, inner), (inner, N), dtype, device)

    def flops(self, T):
        """
        Floating-point operations per token, forward and backward, of what is no Linear: 6 for each number of
        the state, as the recurrence is defined (dt A, decay, input, sum, read-out and its sum), and 2 for
        each tap of the convolution. The backward pass counts twice; exp, softplus, SiLU and the gate do not
        count.
        """
        return 3 * (6 * self.A_log.numel() + 2 * self.conv1d.weight.numel())


class GatedRMSNorm(RMSNorm):
    """The gate first, then the scale of each group normalised: groups may live on different GPUs."""

    def __init__(self, width, groups, c):
        super().__init__(width, c)
        self.groups = groups

    def forward(self, x, gate):
        x = (x * F.silu(gate)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """
    Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060): the P channels of a head share one decay,
    which turns the scan into matrix products (kernels/ssd.py) and affords a larger N. B and C are projected
    beside x and pass through the convolution with it; the heads of a group share them, as queries share keys
    in GQA.
    """
    default_state = 128

    def __init__(self, c):
        super().__init__()
        inner, N, G, P = c.ssm_expand * c.n_embd, c.ssm_state, c.ssm_groups, c.ssm_head_dim
        heads = inner // P
        self.state, self.groups = (heads, P, N), G
        self.split = (inner, G * N, G * N)
        self.in_proj = Linear(c.n_embd, inner + sum(self.split) + heads, c.bias)  # gate, (x, B, C), step size
        self.conv1d = CausalConv(sum(self.split), c.ssm_conv)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.norm = GatedRMSNorm(inner, G, c)
        self.c_proj = out_proj(c, inner)

    def draw(self, leaf, generator):
        shape = self.D.shape
        if leaf == 'dt_bias':
            return draw_step_bias(shape, generator)
        if leaf == 'A_log':
            return torch.log(1 + 15 * torch.rand(shape, generator=generator))  # decay rates from 1 to 16
        return torch.ones(shape)

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        (H, P, N), G = self.state, self.groups
        tail, state = (None, None) if cache is None else cache.read()
        gate, x, dt = self.in_proj(x).split((H * P, sum(self.split), H), dim=-1)    # (B,T,I|I+2GN|H)
        x, tail = self.conv1d(x, ctx, tail)
        x, B, C = x.split(self.split, dim=-1)                                       # (B,T,I|GN|GN)
        dt = step_size(wide(dt) + wide(self.dt_bias), ctx)                          # (B,T,H)
        A = -torch.exp(wide(self.A_log))
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        y, state = ops.ssd(x, dt, A, B, C, self.D, state)                           # (B,T,H,P)
        if cache is not None:
            cache.write(tail, state)
        return self.c_proj(self.norm(y.flatten(2), gate))

    def new_cache(self, batch_size, slots, dtype, device):
        """slots is of no concern: the state has one size for any number of tokens."""
        channels, W = self.conv1d.weight.shape
        return StateCache(batch_size, (W - 1, channels), self.state, dtype, device)

    def flops(self, T):
        """
        Floating-point operations per token, forward and backward, of what is no Linear: 5 for each number of
        the state, as the recurrence is defined (decay, input, sum, read-out and its sum; in chunks of 64,
        with N = 128 and P = 64, there are as many), and 2 for each tap of the convolution. The backward pass
        counts twice; exp, softplus, SiLU, the gate and its norm do not count.
        """
        return 3 * (5 * math.prod(self.state) + 2 * self.conv1d.weight.numel())


SSM = {'mamba1': Mamba1, 'mamba2': Mamba2}
