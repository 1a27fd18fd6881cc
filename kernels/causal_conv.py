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
"""
import torch


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
        y = wide[:, :T] * taps[0]
        for k in range(1, len(taps)):
            y.addcmul_(wide[:, k:k + T], taps[k])
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grad, taps = grad.to(wide.dtype), weight.to(wide.dtype).T.contiguous()
        T, dx, d_taps = grad.shape[1], torch.zeros_like(wide), []
        for k, tap in enumerate(taps.unbind()):
            dx[:, k:k + T].addcmul_(grad, tap)
            d_taps.append((grad * wide[:, k:k + T]).flatten(0, 1).sum(0))
        d_bias = None if ctx.bias_dtype is None else grad.flatten(0, 1).sum(0).to(ctx.bias_dtype)
        return dx.to(x.dtype), torch.stack(d_taps, dim=1).to(weight.dtype), d_bias


def causal_conv(x, weight, bias=None, tail=None):
    """
    x (B,T,I), weight (I,W), bias (I,) or None, tail (B,W-1,I): the inputs before x, None for zeros
    -> y (B,T,I) in x's dtype, summed in fp32, and the tail (B,W-1,I) for what comes next. No activation: a
    compiler fuses the caller's, and eager it costs a fraction of the rest.
    """
    B, T, I = x.shape
    if T == 1:  # generating: nothing to gain from whole views
        return causal_conv_reference(x, weight, bias, tail)
    tail = x.new_zeros(B, weight.shape[1] - 1, I) if tail is None else tail.to(x.dtype)
    x = torch.cat((tail, x), dim=1)
    return _CausalConv.apply(x, weight, bias), x[:, T:]
