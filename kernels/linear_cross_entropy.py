"""
The output head and its loss in one operation, so that the logits of all tokens never exist at once.

    z = x W^T    (soft-capped: z = cap * tanh(z / cap))    loss = mean over targets of logsumexp(z) - z[target]

The gradients are made chunk by chunk during the forward pass, when the logits are at hand anyway:

    dz = (softmax(z) - onehot(target)) / count    (soft-capped: times 1 - (z/cap)^2)    dx = dz W    dW = dz^T x

Saved for the backward pass: dx (N,C) and dW (V,C), which backward only has to scale by the incoming gradient.
With N = 12288 tokens and V = 50257, fp32 logits take 2.5 GB and their gradient as much; eight chunks take an
eighth of that.
"""
import torch
import torch.nn.functional as F

IGNORE = -1
# Below this many logits a chunk is not worth a loop; above it, eight chunks are enough to forget the memory
# and few enough for a compiler to unroll.
CHUNK_NUMEL, MAX_CHUNKS = 2**24, 8


def linear_cross_entropy_reference(x, weight, targets, softcap=None):
    """The definition, with all logits at once. Same arguments and result as linear_cross_entropy."""
    logits = F.linear(x, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='sum')
    return total / (targets != IGNORE).sum().clamp(min=1)


def _chunk(x, weight, targets, softcap, scale, grads):
    """Loss summed over one chunk of rows, and its (dx, dW) or (None, None). scale (n,1): 1/count, 0 if ignored."""
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    index = targets.clamp(min=0).unsqueeze(-1)
    loss = ((lse - logits.gather(-1, index)) * scale).sum()
    if not grads:
        return loss, None, None
    dz = torch.exp(logits - lse)
    dz.scatter_add_(-1, index, torch.full_like(lse, -1.0))
    dz = dz * scale
    if softcap is not None:
        dz = dz * (1 - (logits / softcap).square())
    dz = dz.to(x.dtype)
    return loss, dz @ weight, dz.T @ x


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, grads):
        scale = (targets != IGNORE).unsqueeze(-1) / (targets != IGNORE).sum().clamp(min=1)
        n_chunk = min(MAX_CHUNKS, -(-x.shape[0] * weight.shape[0] // CHUNK_NUMEL))
        loss, dx, dw = 0.0, [], 0.0
        for xs, ts, ss in zip(x.chunk(n_chunk), targets.chunk(n_chunk), scale.chunk(n_chunk)):
            part, dxs, dws = _chunk(xs, weight, ts, softcap, ss, grads)
            loss = loss + part
            if grads:
                dx.append(dxs)
                # summed in fp32 whatever the products' dtype, or late chunks would be rounded away
                dw = dw + dws.to(part.dtype)
        if grads:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None


def linear_cross_entropy(x, weight, targets, softcap=None):
    """
    x (N,C), weight (V,C), targets (N,) int64, IGNORE = -1 for rows that do not count, softcap float or None
    -> scalar fp32: the mean cross entropy, in nats, over the rows that count (0 when none does).
    """
    grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, grads)
