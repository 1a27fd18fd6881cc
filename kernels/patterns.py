"""
Patterns of attention: which keys a query sees besides, or instead of, all those in a window. And the two
rearrangements that make a pattern cheap: blocks of queries with the keys that they may see, and the sum of
two attentions over different keys of the same queries.

A pattern is a function of positions, so the mask of `attention.visible` is its definition, and whatever is
here equals that mask.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .common import cdiv
from .spans import spans

CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Pattern(NamedTuple):
    """
    Of the keys that a window leaves, a query sees those that are nearer than `near` (None: all) and whose
    distance is a multiple of `dilation` (Longformer, Beltagy et al. 2020, https://arxiv.org/abs/2004.05150),
    and those whose distance is a multiple of `stride` (Sparse Transformer, Child et al. 2019,
    https://arxiv.org/abs/1904.10509).

    Whatever the window, it sees the first n_global tokens, which not causal see all (the global tokens of
    Longformer and BigBird, the sinks of StreamingLLM, Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
    """
    near: int | None = None
    dilation: int = 1
    stride: int | None = None
    n_global: int = 0
    every: int | None = None    # a document begins at each multiple of it, with global tokens of its own

    def keeps(self, distance):
        """Which keys at these distances, none below 0, are seen within the window."""
        kept = distance % self.dilation == 0 if self.dilation > 1 else torch.ones_like(distance).bool()
        if self.near is not None:
            kept = kept & (distance < self.near)
        return kept if self.stride is None else kept | (distance % self.stride == 0)

    def keeps_all(self, T):
        """Whether a text of T tokens is too short for the pattern to leave out any key."""
        return self.dilation == 1 and (self.near is None or self.near >= T)

    def is_global(self, query, key, causal):
        same = True
        if self.every is not None:
            same = key // self.every == query // self.every
            query, key = query % self.every, key % self.every
        first = key < self.n_global
        return (first if causal else first | (query < self.n_global)) & same


# ----------------------------------------------------------------------------------------------------------
# Interleaved sequences, and blocks of them


def apart(x, n):
    """x (B,T,...), T a multiple of n -> (B n,T/n,...): the tokens i, i + n, i + 2n, ... become a sequence."""
    return x.unflatten(1, (-1, n)).transpose(1, 2).flatten(0, 1)


def together(x, n):
    """Undoes `apart`."""
    return x.unflatten(0, (-1, n)).transpose(1, 2).flatten(1, 2)


def padded(x, before, after):
    """x (B,T,H,D) with so many tokens of zeros in front and behind."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x


class Blocks(NamedTuple):
    """Queries in blocks that are a batch of N, each with all keys that they may see."""
    q: torch.Tensor         # (B N,size,H,D)
    k: torch.Tensor         # (B N,S,K,D)
    v: torch.Tensor         # (B N,S,K,Dv)
    pos: torch.Tensor       # (N,size)
    key_pos: torch.Tensor   # (N,S), -1 where there is no key
    dilation: int

    def tokens(self, y, T):
        """y (B N,size,...) of the blocks -> (B,T,...)"""
        N = len(self.pos) // self.dilation
        return together(y.unflatten(0, (-1, N)).flatten(1, 2), self.dilation)[:, :T]

    def blocks(self, y):
        """Undoes `tokens`."""
        N, size = len(self.pos), self.pos.shape[1]
        y = apart(padded(y, 0, N * size - y.shape[1]), self.dilation)
        return y.unflatten(1, (-1, size)).flatten(0, 1)


def in_blocks(q, k, v, near, dilation, n_global, causal):
    """
    Tokens 0..T-1 in blocks: each has the keys of its own positions and those nearer than `near` before (not
    causal: and after) them, at distances that are multiples of dilation, behind the first n_global.
    """
    T = q.shape[1]
    n, reach = cdiv(T, dilation), min(cdiv(near, dilation), cdiv(T, dilation)) - 1
    after = 0 if causal else reach
    size = cdiv(n, cdiv(n, max(reach // 4, min(reach + 1, 64)) if causal else max(reach, 64)))
    n = cdiv(n, size) * size
    rest, length = n * dilation - T, reach + size + after
    q = apart(padded(q, 0, rest), dilation).unflatten(1, (-1, size)).flatten(0, 1)
    around = reach * dilation, rest + after * dilation
    k_rows, v_rows = (spans(apart(padded(x, *around), dilation), length, size) for x in (k, v))
    pos = torch.arange(-reach * dilation, (n + after) * dilation, device=q.device).view(-1, dilation).T
    # the first tokens are keys of every block, and of none twice
    key_pos = torch.where((pos >= n_global) & (pos < T), pos, -1).unfold(1, length, size).flatten(0, 1)
    pos = pos[:, reach:reach + n].unflatten(1, (-1, size)).flatten(0, 1)
    if n_global:
        k_rows, v_rows = (torch.cat((first_of(x, n_global, len(pos)), rows), dim=1)
                          for x, rows in ((k, k_rows), (v, v_rows)))
        first = torch.arange(n_global, device=q.device)
        key_pos = torch.cat((torch.where(first < T, first, -1).expand(len(pos), -1), key_pos), dim=1)
    return Blocks(q, k_rows, v_rows, pos, key_pos, dilation)


def first_of(x, n_global, N):
    """The first tokens of x (B,T,K,D), once for each of N blocks -> (B N,n_global,K,D)"""
    x = padded(x[:, :n_global], 0, max(0, n_global - x.shape[1]))
    return x.unsqueeze(1).expand(-1, N, -1, -1, -1).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------
# The sum of two attentions


class Joined(torch.autograd.Function):
    """
    One softmax over keys that two calls of PyTorch's CPU kernel see: each call gives its output y_p and the
    log-sum-exp z_p of its scores; y is the sum of exp(z_p - z) y_p, where exp z is the sum of exp z_p. Given
    y and z of the whole, the kernel's backward pass turns the scores of a part into their weights in the
    whole, as in ring attention.
    """

    @staticmethod
    def forward(ctx, scale, layouts, causal, masks, *tensors):
        """
        tensors: q, k, v (N,t,H,D) of one call, then those of the other. layouts: for each, a function that
        turns (N,t,H,.) to (B,T,H,.), and one that turns it back. masks (N,1,t,S) in the dtype of q, or None.
        """
        parts = [tensors[:3], tensors[3:]]
        found = [call(part, causal[p], masks[p], scale) for p, part in enumerate(parts)]
        (y_0, z_0), (y_1, z_1) = ((tokens(y), tokens(z)) for (tokens, _), (y, z) in zip(layouts, found))
        z = torch.logaddexp(z_0, z_1)
        y = y_0 * (z_0 - z).exp().to(y_0.dtype) + y_1 * (z_1 - z).exp().to(y_1.dtype)
        ctx.save_for_backward(y, z, *masks, *tensors)
        ctx.options = scale, layouts, causal
        return y

    @staticmethod
    def backward(ctx, grad):
        y, z, *saved = ctx.saved_tensors
        (scale, layouts, causal), masks, parts, grads = ctx.options, saved[:2], (saved[2:5], saved[5:]), []
        for p, (_, back) in enumerate(layouts):
            dy, y_p, z_p = (back(x).transpose(1, 2) for x in (grad, y, z))
            found = CPU_FLASH_BACKWARD(dy, *(x.transpose(1, 2) for x in parts[p]), y_p, z_p.squeeze(-1), 0.0,
                                       causal[p], attn_mask=masks[p], scale=scale)
            grads += [x.transpose(1, 2) for x in found]
        return None, None, None, None, *grads


def call(part, causal, mask, scale):
    """The kernel on q, k, v (N,t,H,D) -> y (N,t,H,D) and the log-sum-exp of its scores (N,t,H,1)."""
    q, k, v = (x.transpose(1, 2) for x in part)
    y, z = CPU_FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return y.transpose(1, 2), z.transpose(1, 2).unsqueeze(-1)
