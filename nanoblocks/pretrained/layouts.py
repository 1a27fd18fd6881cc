"""
Layouts: how a tensor of ours is stored in a published checkpoint.

A layout is a function (our tensor, config) -> a list with one Piece for each of their tensors. The parts of a
piece are views of our tensor, so the same few lines load and save.
"""
from functools import partial
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """One of their tensors: its shape, and which slice of it is which view of our tensor."""
    shape: tuple
    parts: list             # [(view of our tensor, function from their tensor to the slice)]
    plus: float = 0.0       # our values are theirs plus this

    def load(self, theirs):
        """Copy their tensor into the views of ours."""
        for ours, part in self.parts:
            ours.copy_(part(theirs).view(ours.shape))
            if self.plus:
                ours.add_(self.plus)

    def save(self):
        """Their tensor, in fp32, made from the views of ours."""
        theirs = torch.empty(self.shape)
        for ours, part in self.parts:
            part(theirs).view(ours.shape).copy_(ours - self.plus)
        return theirs


def piece(view, shape=None, plus=0.0):
    """A tensor of theirs that is one view of ours. shape: theirs, where it is not the view's."""
    return Piece(tuple(shape or view.shape), [(view, lambda theirs: theirs)], plus)


# ----------------------------------------------------------------------------------------------------------
# Any weight


def same(p, c):
    return [piece(p)]


def plus_one(p, c):
    """Gemma's norms multiply by 1 + weight."""
    return [piece(p, plus=1.0)]


def transposed(p, c):
    """GPT-2's Conv1D, whose weights are (in, out)."""
    return [piece(p.t() if p.dim() == 2 else p)]


def conv(p, c):
    """A depthwise convolution: (I,W) is stored as (I,1,W)."""
    return [piece(p, (p.shape[0], 1, p.shape[1]))]


def interleave(p, views, widths):
    """One tensor in which widths[0] rows of the first view, widths[1] of the second, ... repeat."""
    def rows(theirs, n):
        return theirs.unflatten(0, (-1, sum(widths))).split(widths, dim=1)[n]
    return [Piece(tuple(p.shape), [(view, partial(rows, n=n)) for n, view in enumerate(views)])]


# ----------------------------------------------------------------------------------------------------------
# Queries, keys and values: c_attn has the rows of all three below each other


def qkv_rows(c):
    """How many rows of c_attn are queries, keys and values."""
    return c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim


def qkv(p, c):
    """Three tensors."""
    return [piece(part) for part in p.split(qkv_rows(c))]


def qkv_by_group(p, c):
    """One tensor: the queries that share a key, this key and its value, then the next group."""
    group = c.n_head // c.n_kv_head * c.head_dim
    views = [part.unflatten(0, (c.n_kv_head, -1)) for part in p.split(qkv_rows(c))]
    return interleave(p, views, (group, c.head_dim, c.head_dim))


# Rotary pairs. In our layout (Llama's) the two coordinates that rotate together are half the rotated width
# apart; in the interleaved layout they are neighbours. Queries and keys are permuted in the same way, so
# their scores do not change.


def interleaved_pairs(p, dim=0):
    """A view of p in which the two halves of dimension `dim` alternate."""
    return p.unflatten(dim, (2, -1)).transpose(dim, dim + 1)


def qkv_interleaved(p, c):
    """Three tensors, queries and keys with interleaved pairs."""
    query, key, value = p.split(qkv_rows(c))
    heads = [(x, x.unflatten(0, (-1, c.head_dim))) for x in (query, key)]
    return [*(piece(interleaved_pairs(by_head, 1), x.shape) for x, by_head in heads), piece(value)]


def norm_interleaved(p, c):
    """A norm's weight per head and coordinate, (H,D), with interleaved pairs."""
    return [piece(interleaved_pairs(p, 1), p.shape)]


def last_rows_interleaved(p, widths):
    """Heads of widths[0] rows that do not rotate and widths[1] that do, the latter with interleaved pairs."""
    fixed, rotated = p.unflatten(0, (-1, sum(widths))).split(widths, dim=1)
    return interleave(p, (fixed, interleaved_pairs(rotated, 1)), widths)


def mla_query(p, c):
    return last_rows_interleaved(p, (c.head_dim, c.rope_head_dim))


def mla_latent(p, c):
    return last_rows_interleaved(p, (c.kv_rank, c.rope_head_dim))


# ----------------------------------------------------------------------------------------------------------
# Feed-forwards and experts: in c_fc, the rows of the gate come before the rows of the up projection


def gate_up(p, c):
    """Two tensors."""
    return [piece(half) for half in p.chunk(2)]


def by_expert(p, c):
    """(E,out,in) is stored as E tensors."""
    return [piece(expert) for expert in p]


def gate_up_by_expert(p, c):
    """(E,2I,C) is stored as 2E tensors: gate and up of each expert."""
    return [piece(half) for expert in p for half in expert.chunk(2)]


def experts_transposed(p, c):
    """(E,out,in) is stored as (E,in,out)."""
    return [piece(p.transpose(1, 2))]


def gate_up_interleaved(p, c):
    """Gate and up alternate: (E,2I,C) is stored as (E,C,2I), and the bias (E,2I) keeps its shape."""
    view = interleaved_pairs(p, 1)
    if p.dim() == 2:
        return [piece(view, p.shape)]
    return [piece(view.movedim(-1, 1), (p.shape[0], p.shape[2], p.shape[1]))]
