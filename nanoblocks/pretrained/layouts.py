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
    times: float | torch.Tensor | None = None   # or theirs times this, a number or one for each row

    def load(self, theirs):
        """Copy their tensor into the views of ours. What is computed is fp32, and rounded once."""
        for ours, part in self.parts:
            value = part(theirs).view(ours.shape)
            if self.times is not None:
                value = value.float() * self.times
            if self.plus:
                value = value.float() + self.plus
            ours.copy_(value)

    def save(self, theirs=None):
        """Their tensor, in fp32, made from the views of ours, or what other pieces made with these added."""
        theirs = torch.empty(self.shape) if theirs is None else theirs
        for ours, part in self.parts:
            value = ours
            if self.plus:
                value = value.float() - self.plus
            if self.times is not None:
                value = value.float().cpu() / self.times
            part(theirs).view(ours.shape).copy_(value)
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


def rows(p, c):
    """A tensor for each row."""
    return [piece(row) for row in p]


def one_row(p, c):
    """A vector is stored as (1,n)."""
    return [piece(p, (1, len(p)))]


def halves(p, c):
    """Two tensors: the rows of both lie below each other."""
    return [piece(half) for half in p.chunk(2)]


def conv(p, c):
    """A depthwise convolution: (I,W) is stored as (I,1,W)."""
    return [piece(p, (p.shape[0], 1, p.shape[1]))]


def interleave(p, views, widths, first=0):
    """
    One tensor in which widths[0] rows of the first view, widths[1] of the second, ... repeat. first: how many
    of these are views of other tensors of ours, before those given here; there may be others after them.
    """
    def rows(theirs, n):
        return theirs.unflatten(0, (-1, sum(widths))).split(widths, dim=1)[n]
    shape = (len(views[0]) * sum(widths), *p.shape[1:])
    return [Piece(shape, [(view, partial(rows, n=n)) for n, view in enumerate(views, first)])]


# ----------------------------------------------------------------------------------------------------------
# Queries, keys and values: c_attn has the rows of all three below each other


def qkv_rows(c):
    """How many rows of c_attn are queries, keys and values."""
    return c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim


def qkv(p, c):
    """Three tensors."""
    return [piece(part) for part in p.split(qkv_rows(c))]


def qkv_in_pairs(p, c):
    """Three tensors: the first heads of all pairs, then the second ones, which alternate here (DiffLlama)."""
    pairs = [(part, part.unflatten(0, (-1, 2, c.head_dim))) for part in p.split(qkv_rows(c))]
    return [piece(heads.transpose(0, 1), part.shape) for part, heads in pairs]


def qkv_by_group(p, c):
    """One tensor: the queries that share a key, this key and its value, then the next group."""
    group = c.n_head // c.n_kv_head * c.head_dim
    views = [part.unflatten(0, (c.n_kv_head, -1)) for part in p.split(qkv_rows(c))]
    return interleave(p, views, (group, c.head_dim, c.head_dim))


def qkv_gated(p, c):
    """Three tensors; a head's gate is below its queries (Qwen3-Next)."""
    query, key, value = p.split(qkv_rows(c))
    heads = query.unflatten(0, (c.n_head, -1))
    return [*interleave(query, [heads], (c.head_dim, c.head_dim)), piece(key), piece(value)]


def gate_of_qkv(p, c):
    """The gate of the output, within the tensor of the queries."""
    return interleave(p, [p.unflatten(0, (c.n_head, -1))], (c.head_dim, c.head_dim), first=1)


# Rotary pairs. In our layout (Llama's) the two coordinates that rotate together are half the rotated width
# apart; in the interleaved layout they are neighbours. Queries and keys are permuted in the same way, so
# their scores do not change.


def interleaved_pairs(p, dim=0):
    """A view of p in which the two halves of dimension `dim` alternate."""
    return p.unflatten(dim, (2, -1)).transpose(dim, dim + 1)


def rotating_rows(heads, c, dim, of_heads):
    """
    The parts of a piece of queries or keys, whose coordinates D are dimension `dim` of `heads`: those that
    rotate, with interleaved pairs, and those that do not. of_heads: their tensor -> what is like `heads`.
    """
    width = round(c.head_dim * c.rope_fraction)

    def rotates(x):
        return x.narrow(dim, 0, width)

    def fixed(x):
        return x.narrow(dim, width, c.head_dim - width)
    return [(interleaved_pairs(rotates(heads), dim), lambda theirs: rotates(of_heads(theirs))),
            (fixed(heads), lambda theirs: fixed(of_heads(theirs)))]


def qkv_interleaved(p, c):
    """Three tensors, queries and keys with interleaved pairs in the first rows of a head, which rotate."""
    def by_head(x):
        return x.unflatten(0, (-1, c.head_dim))
    query, key, value = p.split(qkv_rows(c))
    return [*(Piece(tuple(x.shape), rotating_rows(by_head(x), c, 1, by_head)) for x in (query, key)),
            piece(value)]


def qvk_in_quarters(p, c):
    """One tensor: a quarter of the queries, of the values and of the keys, then the next (CodeGen)."""
    def quarters(x, n):
        return x.unflatten(0, (4, n, -1, c.head_dim))
    query, key, value = (quarters(x, 1)[:, 0] for x in p.split(qkv_rows(c)))    # (4,H/4,D)
    theirs = [lambda theirs, n=n: quarters(theirs, 3)[:, n] for n in range(3)]
    return [Piece(tuple(p.shape), [*rotating_rows(query, c, 2, theirs[0]), (value, theirs[1]),
                                   *rotating_rows(key, c, 2, theirs[2])])]


def qkv_turned(p, c):
    """Three tensors; queries and keys rotate the other way: the halves of a head are exchanged (nanochat)."""
    def half(x, n):
        return x.unflatten(0, (-1, 2, c.head_dim // 2))[:, n]
    query, key, value = p.split(qkv_rows(c))
    return [*(Piece(tuple(x.shape), [(half(x, 1 - n), lambda theirs, n=n: half(theirs, n)) for n in (0, 1)])
              for x in (query, key)), piece(value)]


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
# Recurrences: c_attn and the convolution have the rows of queries, keys and values below each other


def rnn_rows(c):
    """How many rows are queries, keys and values."""
    keys = c.rnn_key_heads * c.rnn_key_dim
    return keys, keys, c.rnn_heads * c.rnn_value_dim


def rnn_qkv(p, c):
    """Three tensors."""
    return [piece(part) for part in p.split(rnn_rows(c))]


def rnn_conv(p, c):
    """Three convolutions, each (I,1,W)."""
    return [conv(part, c)[0] for part in p.split(rnn_rows(c))]


def rnn_conv_in_thirds(p, c):
    """The same rows, cut into three equal parts."""
    return [conv(part, c)[0] for part in p.chunk(3)]


def rnn_qkv_by_head(p, c):
    """One tensor: the query, key and value of a head, then those of the next."""
    views = by_key_head(c, *p.split(rnn_rows(c)))
    return interleave(p, views, (c.rnn_key_dim, c.rnn_key_dim, c.rnn_value_dim))


def four_dimensions(p, c):
    """A number for each head, (H,), is stored as (1,1,H,1)."""
    return [piece(p, (1, 1, len(p), 1))]


def below_each_other(p, c, part):
    """One tensor in which c_attn, the gate, beta and the decay (part 0 to 3) lie below each other."""
    rows = sum(rnn_rows(c)), c.rnn_heads * c.rnn_value_dim, c.rnn_heads, c.rnn_heads
    return interleave(p, [p.unsqueeze(0)], rows, first=part)


def by_key_head(c, *parts):
    """Views of tensors by the heads of keys."""
    return [part.unflatten(0, (c.rnn_key_heads, -1)) for part in parts]


def shared_by_key_head(c):
    """How many rows a head of keys has of queries, keys, values and gate in one tensor of all four."""
    values = c.rnn_heads // c.rnn_key_heads * c.rnn_value_dim
    return c.rnn_key_dim, c.rnn_key_dim, values, values


def qkv_by_key_head(p, c):
    """Queries, keys and values of a head of keys, then those of the next."""
    return interleave(p, by_key_head(c, *p.split(rnn_rows(c))), shared_by_key_head(c))


def gate_by_key_head(p, c):
    """The gate, in the same tensor."""
    return interleave(p, by_key_head(c, p), shared_by_key_head(c), first=3)


def beta_by_key_head(p, c):
    """One tensor of beta and decay: of the heads of one head of keys, then those of the next."""
    return interleave(p, by_key_head(c, p), (c.rnn_heads // c.rnn_key_heads,) * 2)


def decay_by_key_head(p, c):
    return interleave(p, by_key_head(c, p), (c.rnn_heads // c.rnn_key_heads,) * 2, first=1)


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
