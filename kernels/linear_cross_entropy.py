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

On a GPU the three products of a chunk are PyTorch's, and one Triton kernel between them reads a row of logits
twice and writes its gradient over it. The logits stay in the products' dtype, in rows padded to a multiple of
16 bytes, which the products need to be fast; dW is summed in fp32. Not measured on a GPU yet.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import cdiv, check, clamp, fits, kernel, pow2, randint, randn, tanh, tl

# Chunks have about CHUNK_NUMEL logits, which makes them worth a loop. More than MAX_CHUNKS would save little
# memory, and be too many for a compiler to unroll.
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
        # divided by the count here, not in dz, where fp16 would lose small numbers
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


# ----------------------------------------------------------------------------------------------------------
# Triton

# numbers of a chunk of logits: 256 MB in 16 bit, which keeps the products large. Its rows are a multiple of
# the tiles of the products
FUSED_NUMEL, FUSED_ROWS = 2**27, 256


@kernel
def _loss_kernel(z_ptr, target_ptr, loss_ptr, V, z_stride, cap, z_weight, CAP: tl.constexpr,
                 GRADS: tl.constexpr, BLOCK: tl.constexpr):
    """
    The loss of one row of logits, 0 without a target; and its gradient, written over the logits. The first
    pass keeps a largest logit and a sum for each lane, and rescales a lane's sum when its largest grows.
    Loads and stores reach to the row's padded end: a mask that ends at V would make each of one number.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    z_ptr += row * z_stride
    lane = tl.arange(0, BLOCK)
    top, total = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        col = start + lane
        z = tl.load(z_ptr + col, mask=col < z_stride, other=0.0).to(tl.float32)
        if CAP:
            z = cap * tanh(z / cap)
        z = tl.where(col < V, z, -1e30)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    highest = tl.max(top, 0)
    # lanes that saw no logit have summed ones below any logit, which count for nothing here
    norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    counts = target >= 0
    z_target = tl.load(z_ptr + target, mask=counts, other=0.0).to(tl.float32)
    if CAP:
        z_target = cap * tanh(z_target / cap)
    tl.store(loss_ptr + row, tl.where(counts, norm - z_target + z_weight * norm * norm, 0.0))
    if GRADS:
        # every thread has read the target's logit before any of them writes over it
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            col = start + lane
            z = tl.load(z_ptr + col, mask=col < z_stride, other=0.0).to(tl.float32)
            slope = tl.full([BLOCK], 1.0, tl.float32)
            if CAP:
                t = tanh(z / cap)
                z, slope = cap * t, 1 - t * t
            p = tl.exp(z - norm) * (1 + 2 * z_weight * norm)
            dz = (p - tl.where(col == target, 1.0, 0.0)) * slope
            dz = tl.where(counts & (col < V), dz, 0.0)
            tl.store(z_ptr + col, dz.to(z_ptr.dtype.element_ty), mask=col < z_stride)


def _accumulate(total, a, b):
    """total (fp32) += a @ b of a narrower dtype, the product not rounded on the way."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.add_(a.float() @ b.float())


@torch.library.custom_op('nanoblocks::linear_cross_entropy', mutates_args=())
def _forward(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None,
             z_weight: float, grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    (loss, dx, dW, count of rows that count): gradients of the sum of losses, empty unless they are asked for.
    """
    check('linear_cross_entropy', x=(x, 'N C'), weight=(weight, 'V C'), targets=(targets, 'int N'))
    N, V = x.shape[0], weight.shape[0]
    # rows of logits begin on multiples of 16 bytes, which the products need to be fast
    width = cdiv(V, 16) * 16
    chunks = cdiv(N, max(1, FUSED_NUMEL // width // FUSED_ROWS) * FUSED_ROWS)
    n = cdiv(N, max(1, chunks) * FUSED_ROWS) * FUSED_ROWS
    buffer, losses = x.new_empty(min(n, N), width), x.new_empty(N, dtype=torch.float32)
    dx = x.new_empty(x.shape if grads else 0)
    dw = x.new_zeros(weight.shape if grads else 0, dtype=torch.float32)
    targets = targets.contiguous()
    count = (targets >= 0).sum().clamp(min=1)
    block = clamp(pow2(V), 64, 2048)
    # products in the dtype of their inputs, under any autocast of the caller
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, N, max(1, n)):
            part = slice(start, min(start + n, N))
            z = buffer[:part.stop - start, :V]
            torch.mm(x[part], weight.T, out=z)
            _loss_kernel[(len(z),)](z, targets[part], losses[part], V, width, softcap or 1.0, z_weight,
                                    softcap is not None, grads, block, num_warps=4)
            if grads:
                torch.mm(z, weight, out=dx[part])
                _accumulate(dw, z.T, x[part])
    return losses.sum() / count, dx, dw.to(_kept(weight)), count


def _kept(weight):
    """The dtype of dW until the backward pass divides it by the count: the sum may be beyond fp16's range."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


@_forward.register_fake
def _(x, weight, targets, softcap, z_weight, grads):
    shapes = (x.shape, weight.shape) if grads else (0, 0)
    return (x.new_empty((), dtype=torch.float32), x.new_empty(shapes[0]),
            weight.new_empty(shapes[1], dtype=_kept(weight)), targets.new_empty((), dtype=torch.int64))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])


def _autograd(ctx, grad, *_):
    dx, dw, count = ctx.saved_tensors
    # one number in fp32 with one dimension: without, it would be rounded to the gradients' dtype. fp16 would
    # lose small gradients that were divided by the count before a loss scale in `grad` makes them large
    scale = (grad / count).view(1)
    return (dx * scale).to(dx.dtype), (dw * scale).to(ctx.dtype), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save)


def ok(x, weight, targets, softcap=None, z_weight=0.0):
    return fits(x, weight) and x.dim() == 2


def fused(x, weight, targets, softcap=None, z_weight=0.0):
    grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = x.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    return _forward(x, weight.to(x.dtype), targets, softcap, z_weight, grads)[0]


def cases():
    def head(N, C, V, ignored=(), softcap=None):
        targets = randint(V, N, seed=2)
        targets[list(ignored)] = -1
        return randn(N, C), randn(V, C, seed=1), targets, softcap
    return {
        'odd sizes': head(13, 7, 19),
        'a vocabulary of some blocks, soft-capped': head(5, 16, 8200, softcap=3.0),
        'some ignored': head(11, 6, 10, ignored=(0, 4, 5, 10)),
        'all ignored': head(5, 4, 6, ignored=range(5)),
        'one row': head(1, 5, 9),
        'one token': head(4, 3, 1),
        'soft-capped, some ignored': head(9, 6, 10, ignored=(2, 8), softcap=0.5),
        'z-loss, soft-capped': (*head(9, 6, 10, ignored=(2, 8), softcap=2.0), 0.3),
        'large numbers': (20 * randn(5, 4), randn(7, 4, seed=1), randint(7, 5), None),
        'not contiguous': (randn(6, 9).T, randn(8, 12, seed=1)[:, ::2], randint(8, 9, 3)[:, 1], None),
        'rows of a larger head': (randn(9, 6), randn(30, 6, seed=1)[:11], randint(11, 9), None),
        'more rows than a chunk may have': head(300, 3, 7),
    }
