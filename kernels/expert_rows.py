"""
From tokens to the rows of their experts, and back. Each of N tokens has a row for each of its K experts: row
m is of token[m], and the K rows of token n are place[n].

    spread    rows_m = x_token[m]                         dx_n = sum over k of drows_place[n,k]
    collect   y_n = sum over k of rows_place[n,k]         drows_m = dy_token[m]

Each is the backward pass of the other. Both only read by index: nothing is added into memory that others add
to as well, so sums over k go in order, and a GPU needs no atomics and gives the same bits each time.
F.embedding_bag sums in fp32 and writes no rows in between, which takes a third of the time of a gather and a
sum on a CPU. Saved for the backward pass: token and place.
"""
import torch
import torch.nn.functional as F


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, place):
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        place, = ctx.saved_tensors
        return F.embedding_bag(place, grad.contiguous(), mode='sum'), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, token, place):
        ctx.save_for_backward(token)
        return F.embedding_bag(place, rows.contiguous(), mode='sum')

    @staticmethod
    def backward(ctx, grad):
        token, = ctx.saved_tensors
        return grad.index_select(0, token), None, None


def spread(x, token, place):
    """x (N,C), token (M,) int64, place (N,K) int64, a permutation of the M = N K rows -> (M,C)"""
    return _Spread.apply(x, token, place)


def collect(rows, token, place):
    """rows (M,C), token (M,) int64, place (N,K) int64, as for spread -> (N,C)"""
    return _Collect.apply(rows, token, place)
