"""
The keys that blocks of queries read under a window. Neighbouring blocks share most of them; each gets a copy,
so that attention over blocks is one batched call.

Forward:   y[i] = (x[i step], ..., x[i step + length - 1]) for block i.
Backward:  dx[t] = the sum of y's gradients over all copies of token t.

Autograd through slices would fill a tensor of x's full size with zeros for each block, and its backward pass
of Tensor.unfold takes three to five times as long as this one.
"""
import torch


def spans_reference(x, length, step):
    """x (B,T,K,D), T = (n - 1) step + length -> (B n,length,K,D): block i begins at token i step."""
    return x.unfold(1, length, step).movedim(-1, 2).flatten(0, 1)


class Spans(torch.autograd.Function):
    """spans_reference with its own backward pass, which adds up the copies of each token."""

    @staticmethod
    def forward(ctx, x, length, step):
        ctx.shape, ctx.step = x.shape, step
        return spans_reference(x, length, step).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        total, length = grad.new_zeros(ctx.shape), grad.shape[1]
        for i, block in enumerate(grad.unflatten(0, (len(total), -1)).unbind(1)):
            total[:, i * ctx.step:i * ctx.step + length] += block
        return total, None, None


def spans(x, length, step):
    """The same as spans_reference."""
    # of one block there is nothing to copy
    return x if x.shape[1] == length else Spans.apply(x, length, step)
