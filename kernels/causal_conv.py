"""
Depthwise causal convolution with few taps, the local mixing in front of a state-space layer (Gu and Dao
2023, https://arxiv.org/abs/2312.00752, figure 3). Each of I channels has W weights of its own, the last for
the token itself:

    y_t = bias + sum over k of weight_k x_{t-W+1+k}
    dx_s = sum over k of weight_k g_{s+W-1-k}    dweight_k = sum over t of g_t x_{t-W+1+k}    dbias = sum of g

The W-1 inputs before the first come from `tail`, so that a sequence may be given in pieces. Saved for the
backward pass: x behind its tail, and the weight. On a CPU, W products of shifted views take a third of the
time of F.conv1d with a group per channel, which wants time innermost, and less than half of what autograd
makes of the same products.

The Triton kernels read x in place, without putting the tail in front of it. The sums over tokens are
made per tile and then added up, in an order that never changes.
"""
import torch
from torch import Tensor

from .common import cdiv, check, clamp, fits, jit, kernel, leaf, pow2, randn, tl


def causal_conv_reference(x, weight, bias=None, tail=None):
    """The definition, one token after the other. Same arguments and result as causal_conv."""
    W = weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    tail = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    y = []
    for x_t in x.split(1, dim=1):
        window = torch.cat((tail, x_t), dim=1)  # (B,W,I)
        tail = window[:, 1:]
        y.append((window.to(wide) * weight.T).sum(1))
    y = torch.stack(y, dim=1)
    return (y if bias is None else y + bias).to(x.dtype), tail


class _CausalConv(torch.autograd.Function):
    """x (B,W-1+T,I), its tail in front, weight (I,W), bias (I,) or None -> (B,T,I)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        taps = weight.to(wide.dtype).T.contiguous()  # (W,I)
        T = x.shape[1] - len(taps) + 1
        first = wide[:, :T]
        y = first * taps[0] if bias is None else torch.addcmul(bias.to(wide.dtype), first, taps[0])
        for k in range(1, len(taps) - 1):
            y.addcmul_(wide[:, k:k + T], taps[k])
        # the last one is not in place, and not handed through, as in rms_norm.py
        y = torch.addcmul(y, wide[:, -T:], taps[-1]) if len(taps) > 1 else y
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grad, taps = grad.to(wide.dtype), weight.to(wide.dtype).T.contiguous()
        T, dx, d_taps = grad.shape[1], torch.zeros_like(wide), []
        product = torch.empty_like(grad)
        for k, tap in enumerate(taps.unbind()):
            dx[:, k:k + T].addcmul_(grad, tap)
            d_taps.append(torch.mul(grad, wide[:, k:k + T], out=product).flatten(0, 1).sum(0))
        d_bias = None if ctx.bias_dtype is None else grad.flatten(0, 1).sum(0).to(ctx.bias_dtype)
        return dx.to(x.dtype), torch.stack(d_taps, dim=1).to(weight.dtype), d_bias


def causal_conv(x, weight, bias=None, tail=None):
    """
    x (B,T,I), weight (I,W), bias (I,) or None, tail (B,W-1,I): the inputs before x, None for zeros
    -> y (B,T,I) in x's dtype, summed in fp32, and the tail (B,W-1,I) for what comes next. No activation: a
    compiler fuses the caller's, and eager it costs a fraction of the rest.
    """
    B, T, I = x.shape
    if T == 1:  # generating: shifted views gain nothing
        return causal_conv_reference(x, weight, bias, tail)
    tail = x.new_zeros(B, weight.shape[1] - 1, I) if tail is None else tail.to(x.dtype)
    x = torch.cat((tail, x), dim=1)
    return _CausalConv.apply(x, weight, bias), x[:, T:]


class _ConvWithin(torch.autograd.Function):
    """x (B,T,I), weight (I,W), bias (I,) or None, place (B,T) -> (B,T,I)."""

    @staticmethod
    def forward(ctx, x, weight, bias, place):
        ctx.save_for_backward(x, weight, place)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        taps = weight.to(wide.dtype).T.contiguous()     # (W,I)
        y = torch.zeros_like(wide) if bias is None else bias.to(wide.dtype).expand_as(wide).clone()
        for back in range(1, min(len(taps), x.shape[1])):
            y[:, back:].addcmul_(wide[:, :-back] * taps[-1 - back], inside(place, back, wide))
        y = torch.addcmul(y, wide, taps[-1])
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, place = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grad, taps = grad.to(wide.dtype), weight.to(wide.dtype).T.contiguous()
        dx, d_taps = grad * taps[-1], torch.zeros_like(taps)
        d_taps[-1] = (grad * wide).flatten(0, 1).sum(0)
        for back in range(1, min(len(taps), x.shape[1])):
            g = grad[:, back:] * inside(place, back, grad)
            dx[:, :-back].addcmul_(g, taps[-1 - back])
            d_taps[-1 - back] = g.mul_(wide[:, :-back]).flatten(0, 1).sum(0)
        d_bias = None if ctx.bias_dtype is None else grad.flatten(0, 1).sum(0).to(ctx.bias_dtype)
        return dx.to(x.dtype), d_taps.T.to(weight.dtype), d_bias, None


def inside(place, back, like):
    """1 for each token whose document began at least `back` tokens before it, else 0: (B,T-back,1)"""
    return (place[:, back:] >= back).to(like.dtype).unsqueeze(-1)


def conv_within(x, weight, bias, place):
    """
    causal_conv without a tail, whose taps read zeros from before a document: place (B,T), how many tokens
    after the first of its document each token stands. Plain PyTorch on every device.
    """
    return _ConvWithin.apply(x, weight, bias, place)


# ----------------------------------------------------------------------------------------------------------
# Triton


@jit
def _inputs(x_ptr, tail_ptr, s, i, T, I, x_stride_t, TAPS: tl.constexpr, HAS_TAIL: tl.constexpr):
    """The inputs of channels i at positions s, from the tail where s is negative: fp32."""
    channel = i[None, :] < I
    x = tl.load(x_ptr + s[:, None] * x_stride_t + i[None, :],
                mask=(s[:, None] >= 0) & (s[:, None] < T) & channel, other=0.0).to(tl.float32)
    if HAS_TAIL:
        x += tl.load(tail_ptr + (s[:, None] + TAPS - 1) * I + i[None, :],
                     mask=(s[:, None] < 0) & (s[:, None] > -TAPS) & channel, other=0.0).to(tl.float32)
    return x


@kernel
def _forward_kernel(x_ptr, w_ptr, bias_ptr, tail_ptr, y_ptr, T, I, tiles, x_stride_b, x_stride_t,
                    TAPS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr,
                    BLOCK_I: tl.constexpr):
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    x_ptr += batch * x_stride_b
    tail_ptr += batch * (TAPS - 1) * I
    y = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    for k in tl.static_range(TAPS):
        w = tl.load(w_ptr + i * TAPS + k, mask=i < I, other=0.0).to(tl.float32)
        y += w[None, :] * _inputs(x_ptr, tail_ptr, t - (TAPS - 1 - k), i, T, I, x_stride_t, TAPS, HAS_TAIL)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + (batch * T + t[:, None]) * I + i[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(t[:, None] < T) & (i[None, :] < I))


@kernel
def _backward_kernel(dy_ptr, x_ptr, w_ptr, tail_ptr, dx_ptr, d_tail_ptr, dw_ptr, T, I, tiles, dy_stride_b,
                     dy_stride_t, x_stride_b, x_stride_t, TAPS: tl.constexpr, HAS_TAIL: tl.constexpr,
                     BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """
    Positions s of the input from 1 - TAPS on, so that the tail gets its gradient; dw (tiles,TAPS+1,I). w is
    (TAPS,I) here, because stores between the taps keep the compiler from joining the loads of a channel's.
    """
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    s = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T) - (TAPS - 1)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    channel = i[None, :] < I
    tail_at = batch * (TAPS - 1) * I
    x = _inputs(x_ptr + batch * x_stride_b, tail_ptr + tail_at, s, i, T, I, x_stride_t, TAPS, HAS_TAIL)
    dx = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    dw_ptr += tl.program_id(0).to(tl.int64) * (TAPS + 1) * I
    for k in tl.static_range(TAPS):
        t = s + TAPS - 1 - k
        dy = tl.load(dy_ptr + batch * dy_stride_b + t[:, None] * dy_stride_t + i[None, :],
                     mask=(t[:, None] >= 0) & (t[:, None] < T) & channel, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + k * I + i, mask=i < I, other=0.0).to(tl.float32)
        dx += w[None, :] * dy
        tl.store(dw_ptr + k * I + i, tl.sum(dy * x, 0), mask=i < I)
        if k == TAPS - 1:
            tl.store(dw_ptr + TAPS * I + i, tl.sum(dy, 0), mask=i < I)
    tl.store(dx_ptr + (batch * T + s[:, None]) * I + i[None, :], dx.to(dx_ptr.dtype.element_ty),
             mask=(s[:, None] >= 0) & (s[:, None] < T) & channel)
    if HAS_TAIL:
        tl.store(d_tail_ptr + tail_at + (s[:, None] + TAPS - 1) * I + i[None, :],
                 dx.to(d_tail_ptr.dtype.element_ty), mask=(s[:, None] < 0) & channel)


def _near(x):
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op('nanoblocks::causal_conv', mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    B, T, I = x.shape
    check('causal_conv', x=(x, 'B T I'), weight=(weight, 'I W'), bias=(bias, 'I'),
          tail=(tail, f'B {weight.shape[1] - 1} I'))
    x, y = _near(x), x.new_empty(B, T, I)
    block_t, block_i = 16, clamp(pow2(I), 16, 128)
    tiles = cdiv(T, block_t)
    if y.numel():
        _forward_kernel[(B * tiles, cdiv(I, block_i))](
            x, weight.contiguous(), bias if bias is None else bias.contiguous(),
            x if tail is None else tail.contiguous(), y, T, I, tiles, *x.stride()[:2], weight.shape[1],
            tail is not None, bias is not None, block_t, block_i, num_warps=4)
    return y


@torch.library.custom_op('nanoblocks::causal_conv_backward', mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor,
              tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and tail, the last empty without one."""
    (B, T, I), W = x.shape, weight.shape[1]
    x, dy, dx = _near(x), _near(dy), x.new_empty(B, T, I)
    d_tail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    # more tokens in a tile, as each tile has a part of dw
    block_t, block_i = 64, clamp(pow2(I), 16, 32)
    tiles = cdiv(T + W - 1, block_t)
    dw = x.new_empty(B * tiles, W + 1, I, dtype=torch.float32)
    _backward_kernel[(B * tiles, cdiv(I, block_i))](
        dy, x, weight.T.contiguous(), x if tail is None else tail.contiguous(), dx, d_tail, dw, T, I, tiles,
        *dy.stride()[:2], *x.stride()[:2], W, tail is not None, block_t, block_i, num_warps=4)
    dw = dw.sum(0)
    return dx, dw[:W].T.to(weight.dtype).contiguous(), dw[W].clone(), d_tail


@_forward.register_fake
def _(x, weight, bias, tail):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, weight, tail):
    d_tail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            x.new_empty(weight.shape[:1], dtype=torch.float32), d_tail)


def _save(ctx, inputs, output):
    x, weight, bias, tail = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, tail)


def _autograd(ctx, dy):
    x, weight, tail = ctx.saved_tensors
    dx, dw, d_bias, d_tail = _backward(dy, x, weight, tail)
    return (dx, dw, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype),
            None if tail is None else d_tail)


_forward.register_autograd(_autograd, setup_context=_save)


def ok(x, weight, bias=None, tail=None):
    return fits(x, weight, bias, tail) and 1 <= weight.shape[1] <= 16


def fused(x, weight, bias=None, tail=None):
    W = weight.shape[1]
    tail = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    behind = torch.cat((tail, x[:, -(W - 1):]), dim=1)[:, -(W - 1):] if W > 1 else tail
    return _forward(x, weight, bias, tail if W > 1 else None), behind


def cases():
    return {
        'a tail, parameters of fp32': (randn(2, 70, 5), leaf(5, 4), leaf(5, seed=1), randn(2, 3, 5, seed=1)),
        'no tail, no bias': (randn(1, 9, 130), randn(130, 3), None, None),
        'fewer tokens than taps': (randn(2, 2, 6), randn(6, 4), randn(6, seed=1), randn(2, 3, 6, seed=1)),
        'one tap': (randn(2, 7, 6), randn(6, 1), randn(6, seed=1), None),
        'a slice': (randn(2, 33, 20)[..., 3:14], randn(11, 4), randn(11, seed=1), randn(2, 3, 11, seed=1)),
        'not contiguous': (randn(2, 6, 9).mT, randn(4, 6).T, randn(12, seed=1)[::2],
                           randn(2, 6, 3, seed=1).mT),
    }
