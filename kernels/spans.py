"""
What a block of queries attends to under a window: its own block of keys, and the blocks before it that the
window reaches. Each block is copied once for every block that looks at it, so that attention over blocks is
one batched call.

Forward:   y[b, i] = (x[b, i - back], ..., x[b, i]), blocks before the first being zeros.
Backward:  dx[b, i] = the sum of y's gradients wherever block i was copied to.

Autograd over slices would fill a tensor of x's whole size with zeros for every one of the copies: this is a
tenth of the time of windowed attention, forward and backward, on a CPU.
"""
import torch


def spans_reference(x, size, back):
    """x (B,T,K,D), T a multiple of size -> (B n, (back+1) size, K, D), n = T / size the blocks of a row."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, back * size, 0))
    return x.unfold(1, (back + 1) * size, size).movedim(-1, 2).flatten(0, 1)


class Spans(torch.autograd.Function):

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
    """As spans_reference."""
    return Spans.apply(x, size, back)
