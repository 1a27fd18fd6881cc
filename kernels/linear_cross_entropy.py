"""
The output head and its loss in one operation, so that the logits of all tokens never exist at once.

    z = x W^T    (soft-capped: z = cap * tanh(z / cap))
    loss = mean over targets of logsumexp(z) - z[target]

The gradients are made chunk by chunk during the forward pass, when the logits are at hand anyway:

    dz = (softmax(z) - onehot(target)) / count    (soft-capped: times 1 - (z/cap)^2)
    dx = dz W    dW = dz^T x

With a z-loss (PaLM, https://arxiv.org/abs/2204.02311) the mean of z_weight * logsumexp(z)^2 is added, which
keeps logits from drifting, and softmax(z) above becomes softmax(z) * (1 + 2 z_weight logsumexp(z)).

Saved for the backward pass: dx (N,C) and dW (V,C), which backward only has to scale by the incoming gradient.
With N = 12288 tokens and V = 50257, fp32 logits take 2.5 GB and autograd as much again for their softmax;
eight chunks keep an eighth of one.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Below this many logits a chunk is not worth a loop; above it, eight chunks are enough to forget the memory
# and few enough for a compiler to unroll.
CHUNK_NUMEL, MAX_CHUNKS = 2**24, 8


def capped_logits(x, weight, softcap):
    """x W^T in fp32 (fp64 stays), soft-capped: (n,V)."""
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy_reference(x, weight, targets, softcap=None, z_weight=0.0):
    """The definition, with all logits at once. Same arguments and result as linear_cross_entropy."""
    logits = capped_logits(x, weight, softcap)
    total = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction='sum')
    if z_weight:
        total = total + z_weight * (logits.logsumexp(-1).square() * (targets >= 0)).sum()
    return total / (targets >= 0).sum().clamp(min=1)


def _chunk(x, weight, targets, softcap, z_weight, grads):
    """Over one chunk of rows: the sum of the losses, and its gradients (dx, dW) or (None, None)."""
    z = capped_logits(x, weight, softcap)
    counts, index = (targets >= 0).unsqueeze(-1), targets.clamp(min=0).unsqueeze(-1)
    slope = 1 - (z / softcap).square() if grads and softcap is not None else None
    # one buffer from here on: the logits, below their largest, become exponentials and then their gradient
    largest = z.amax(dim=-1, keepdim=True)
    z = z.sub_(largest)
    z_target = z.gather(-1, index)
    total = z.exp_().sum(dim=-1, keepdim=True)
    loss = ((total.log() - z_target) * counts).sum()
    if z_weight:
        norm = total.log() + largest
        loss = loss + z_weight * (norm.square() * counts).sum()
    if not grads:
        return loss, None, None
    dz = z.div_(total)
    if z_weight:
        dz = dz.mul_(1 + 2 * z_weight * norm)
    dz = dz.scatter_add_(-1, index, torch.full_like(total, -1.0)).mul_(counts)
    if slope is not None:
        dz = dz.mul_(slope)
    dz = dz.to(x.dtype)
    return loss, dz @ weight, dz.T @ x


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, z_weight, grads):
        n_chunk = min(MAX_CHUNKS, -(-x.shape[0] * weight.shape[0] // CHUNK_NUMEL))
        loss, dx, dw = 0.0, [], 0.0
        for xs, ts in zip(x.chunk(n_chunk), targets.chunk(n_chunk)):
            part, dxs, dws = _chunk(xs, weight, ts, softcap, z_weight, grads)
            loss = loss + part
            if grads:
                dx.append(dxs)
                # summed in fp32 whatever the products' dtype, or late chunks would be rounded away
                dw = dw + dws.to(part.dtype)
        # the count divides here and not within dz, where fp16 would lose what is small
        mean = 1 / (targets >= 0).sum().clamp(min=1).to(loss.dtype)
        if grads:
            ctx.save_for_backward((torch.cat(dx) * mean).to(x.dtype), (dw * mean).to(weight.dtype))
        return loss * mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None, None


def linear_cross_entropy(x, weight, targets, softcap=None, z_weight=0.0):
    """
    x (N,C), weight (V,C), targets (N,) int64, negative for rows that do not count, softcap float or None
    -> scalar fp32: the mean cross entropy, in nats, over the rows that count (0 when none does), and z_weight
    times the mean square of the logits' logsumexp.
    """
    grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, z_weight, grads)
