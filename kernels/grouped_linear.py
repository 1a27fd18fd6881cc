"""
One linear layer per expert, over rows that are sorted by expert: rows of expert e become x W_e^T + b_e.

    dx = dy W_e        dW_e = dy_e^T x_e        db_e = sum of dy_e

No row is padded or dropped: every expert takes as many as there are.
Saved for the backward pass: x, W and the counts.
"""
import torch


def grouped_linear_reference(x, weight, bias, counts):
    """The definition. Same arguments and result as grouped_linear."""
    expert = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    y = torch.einsum('mi,moi->mo', x, weight[expert])
    return y if bias is None else y + bias[expert]


@torch.library.custom_op('nanoblocks::grouped_linear', mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
             counts: torch.Tensor) -> torch.Tensor:
    rows = x.split(counts.tolist())
    parts = [torch.nn.functional.linear(r, w, None if bias is None else bias[e])
             for e, (r, w) in enumerate(zip(rows, weight))]
    return torch.cat(parts)


@torch.library.custom_op('nanoblocks::grouped_linear_backward', mutates_args=())
def _backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor,
              with_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = counts.tolist()
    dys, xs = dy.split(sizes), x.split(sizes)
    dx = torch.cat([d @ w for d, w in zip(dys, weight)])
    dw = torch.stack([d.T @ r for d, r in zip(dys, xs)])
    db = torch.stack([d.sum(0) for d in dys]) if with_bias else dy.new_empty(0)
    return dx, dw, db


@_forward.register_fake
def _(x, weight, bias, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@_backward.register_fake
def _(dy, x, weight, counts, with_bias):
    return torch.empty_like(x), torch.empty_like(weight), dy.new_empty(weight.shape[:2] if with_bias else 0)


def _setup(ctx, inputs, output):
    x, weight, bias, counts = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, counts)


def _autograd(ctx, dy):
    dx, dw, db = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.with_bias)
    return dx, dw, db if ctx.with_bias else None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def grouped_linear(x, weight, bias, counts):
    """
    x (M,in) sorted by expert, weight (E,out,in), bias (E,out) or None, counts (E,) int64:
    how many rows are of each expert, M together -> (M,out). Under autocast the products
    are made in its dtype, as those of F.linear.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _forward(x, weight, bias, counts)
