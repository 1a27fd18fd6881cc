"""
The keys that blocks of queries read under a window: block i of the queries reads block i of the keys and the
`back` blocks before it. Every block of keys is copied once for each block of queries that reads it, so that
attention over blocks is one batched call.

Forward:   y[b, i] = (x[b, i - back], ..., x[b, i]), with zeros for blocks before the first.
Backward:  dx[b, i] = the sum of y's gradients over all copies of block i.

Autograd through slices would fill a tensor of x's full size with zeros for each copy. With the backward pass
written out, windowed attention on a CPU takes a tenth of the time, forward and backward.
"""
import torch


def spans_reference(x, size, back):
    """x (B,T,K,D), T a multiple of size -> (B n, (back+1) size, K, D), n = T / size the blocks of a row."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, back * size, 0))
    return x.unfold(1, (back + 1) * size, size).movedim(-1, 2).flatten(0, 1)


class Spans(torch.autograd.Function):
    """spans_reference with its own backward pass, which adds up the copies of each block."""

    @staticmethod
    def forward(ctx, x, size, back):
        ctx.shape, ctx.back = x.shape, back
        x = x.unflatten(1, (-1, size))                                          # (B,n,size,K,D)
        B, n = x.shape[:2]
        y = x.new_empty(B, n, back + 1, *x.shape[2:])
        for ago in range(back + 1):
            y[:, :ago, back - ago] = 0
            y[:, ago:, back - ago] = x[:, :max(0, n - ago)]
        return y.view(B * n, (back + 1) * size, *x.shape[3:])

    @staticmethod
    def backward(ctx, grad):
        B, T, K, D = ctx.shape
        size = grad.shape[1] // (ctx.back + 1)
        n = T // size
        grad = grad.reshape(B, n, ctx.back + 1, size, K, D)
        total = grad[:, :, ctx.back].clone()
        for ago in range(1, ctx.back + 1):
            total[:, :max(0, n - ago)] += grad[:, ago:, ctx.back - ago]
        return total.reshape(ctx.shape), None, None


def spans(x, size, back):
    """The same as spans_reference."""
    return Spans.apply(x, size, back)
