"""
A linear layer without TF32, whatever torch.set_float32_matmul_precision says, and without autocast: for what
decides. TF32 keeps 10 bits of each factor, and the scores of two experts are often closer than that.

    y = x W^T + b        dx = dy W        dW = dy^T x

The setting is global, and a compiler guards what it reads of it. So it is changed within operators, which a
compiler does not look into, for one product at a time. Saved for the backward pass: x and W.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def _exactly(x):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.library.custom_op('nanoblocks::exact_linear', mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    with _exactly(x):
        return F.linear(x, weight)


@torch.library.custom_op('nanoblocks::exact_linear_backward', mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with _exactly(x):
        return dy @ weight, dy.T @ x


@_forward.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


@_backward.register_fake
def _(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_forward.register_autograd(lambda ctx, dy: _backward(dy, *ctx.saved_tensors),
                           setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def exact_linear(x, weight, bias=None):
    """x (N,in), weight (out,in), bias (out,) or None, of one dtype -> (N,out) in that dtype"""
    y = _forward(x, weight)
    return y if bias is None else y + bias
