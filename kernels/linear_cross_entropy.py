"""
The output head and its loss in one operation, so that the logits of all tokens never exist at once.

    z = x W^T + b    (soft-capped: z = cap * tanh(z / cap))
    loss = weighted mean over targets of logsumexp(z) - z[target]

The gradients are made chunk by chunk during the forward pass, when the logits are at hand anyway:

    dz = (softmax(z) - onehot(target)) * weight / sum of weights    (soft-capped: times 1 - (z/cap)^2)
    dx = dz W    dW = dz^T x    db = sum of dz

With a z-loss (PaLM, https://arxiv.org/abs/2204.02311) the mean of z_weight * logsumexp(z)^2 is added, which
keeps logits from drifting, and softmax(z) above becomes softmax(z) * (1 + 2 z_weight logsumexp(z)).

Saved for the backward pass: dx (N,C) and dW (V,C), which backward only has to scale by the incoming gradient,
and by the sum of weights in fp16, where dz would lose small numbers. With N = 12288 tokens and V = 50257,
fp32 logits take 2.5 GB and autograd as much again for their softmax; eight chunks keep an eighth of one.

On a CPU the products are most of the time. Memory that is fresh costs more to get than to compute in, so one
buffer holds the logits of each chunk, in the products' dtype; between the products, some rows at a time are
widened, turned into their gradient, and written back, all in the cache; and dW is added up by blocks of rows.

On a GPU the three products of a chunk are PyTorch's, and one Triton kernel between them reads a row of logits
twice and writes its gradient over it. The logits stay in the products' dtype, and dW is summed in fp32. A
vocabulary that is no multiple of 16 is padded with rows of zeros: an H200 takes six times as long for
products with 50257 columns as with 50304. A bias and weights are left to plain PyTorch.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import common, float8
from .common import at_least_fp32, cdiv, check, clamp, fits, kernel, pow2, randint, randn, tanh, tl

# Chunks of logits take about CHUNK_BYTES, which makes their products worth a loop. More than MAX_CHUNKS would
# save little memory, and be too many for a compiler to unroll.
CHUNK_BYTES, MAX_CHUNKS = 2**26, 8
# What stays in a CPU's cache between passes: logits of a softmax, rows of dW
BLOCK_NUMEL, BLOCK_ROWS = 2**19, 4096


def capped_logits(x, weight, softcap, bias=None):
    """x W^T + bias in fp32 (fp64 stays), soft-capped: (n,V)."""
    logits = F.linear(x, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy_reference(x, weight, targets, softcap=None, z_weight=0.0, bias=None,
                                   token_weights=None):
    """The definition, with all logits at once. Same arguments and result as linear_cross_entropy."""
    logits, counts = capped_logits(x, weight, softcap, bias), _counts(targets, token_weights)
    each = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction='none')
    if z_weight:
        each = each + z_weight * logits.logsumexp(-1).square()
    return (each * counts).sum() / _total(counts)


def _counts(targets, token_weights):
    """What each row counts: its weight, or 1, and 0 without a target (N,)."""
    counts = targets >= 0
    return counts if token_weights is None else counts * token_weights


def _total(counts):
    """The sum of what rows count, 1 where none does, as then there is nothing to divide."""
    total = counts.sum()
    return torch.where(total > 0, total, 1)


def _buffer(x, weight, n_chunk):
    """
    Memory for the logits of one chunk after the other, or None where a compiler plans the memory. Rows begin
    on multiples of 64 bytes: MKL takes up to half longer for products of fp32 in rows that do not.
    """
    if torch.compiler.is_compiling():
        return None
    return x.new_empty(cdiv(x.shape[0], n_chunk), cdiv(weight.shape[0], 32) * 32)[:, :weight.shape[0]]


def _loss(z, targets, counts, softcap, z_weight, scale):
    """
    The sum of the losses of rows of products z (n,V), which become `scale` times their gradient; they are
    lost if scale is None.
    """
    counts, index = counts.unsqueeze(-1), targets.clamp(min=0).unsqueeze(-1)
    wide, slope = at_least_fp32(z), None
    if softcap is not None:
        wide = torch.tanh(wide / softcap)
        slope = 1 - wide.square() if scale is not None else None
        wide = wide.mul_(softcap)
    # one buffer from here on: the logits, below their largest, become exponentials and then their gradient
    largest = wide.amax(dim=-1, keepdim=True)
    wide = wide.sub_(largest)
    z_target = wide.gather(-1, index)
    total = wide.exp_().sum(dim=-1, keepdim=True)
    loss = ((total.log() - z_target) * counts).sum()
    if z_weight:
        norm = total.log() + largest
        loss = loss + z_weight * (norm.square() * counts).sum()
        wide = wide.mul_(1 + 2 * z_weight * norm) if scale is not None else wide
    if scale is not None:
        wide = wide.scatter_add_(-1, index, -total)
        if slope is not None:
            wide = wide.mul_(slope)
        z.copy_(wide.mul_(counts * scale / total))
    return loss


class _Weight:
    """W (V,C) for products with both of its sides. float8.Weight makes them of 8 bits."""

    def __init__(self, weight):
        self.weight = weight

    def logits(self, x, out):
        return torch.mm(x, self.weight.T, out=out)

    def gradient(self, dz, out=None):
        return torch.mm(dz, self.weight, out=out)


def _chunk(x, weight, bias, targets, counts, softcap, z_weight, scale, buffer):
    """Over one chunk of rows: the sum of the losses, and dz, `scale` times their gradient, or None."""
    n = x.shape[0]
    z = weight.logits(x, None if buffer is None else buffer[:n])
    z = z if bias is None else z.add_(bias)
    if buffer is not None and x.is_cpu:
        n = max(1, BLOCK_NUMEL // z.shape[1])
    loss = sum(_loss(*rows, softcap, z_weight, scale)
               for rows in zip(z.split(n), targets.split(n), counts.split(n)))
    return loss, z if scale is not None else None


def _add_product(total, a, b):
    """total += a b, where the product has the dtype of a and b, total at least fp32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif torch.compiler.is_compiling():
        total.add_(a @ b)
    else:
        # by rows, as the product in between would be another W to write and read
        for rows, a_rows in zip(total.split(BLOCK_ROWS), a.split(BLOCK_ROWS)):
            rows.add_(a_rows @ b)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, z_weight, bias, token_weights, grads):
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        device, wide = x.device.type, torch.promote_types(x.dtype, torch.float32)
        counts = _counts(targets, token_weights).to(wide)
        # cast once and not for each chunk; autocast leaves fp64 alone
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
        mean = 1 / _total(counts)
        # divided by the count in the backward pass, where a scaled loss has made small numbers large: fp16
        # would lose them in dz
        ctx.divide_later = x.dtype == torch.float16
        scale = (1.0 if ctx.divide_later else mean) if grads else None
        n_chunk = clamp(cdiv(x.shape[0] * weight.shape[0] * x.itemsize, CHUNK_BYTES), 1, MAX_CHUNKS)
        buffer, loss, dx = _buffer(x, weight, n_chunk), 0.0, []
        dw = torch.zeros_like(weight, dtype=wide) if grads else None
        db = torch.zeros_like(bias, dtype=wide) if grads and bias is not None else None
        factor = (float8.Weight if common.head_dtype == 'float8' and grads else _Weight)(weight)
        with torch.autocast(device, enabled=False):
            for xs, *rows in zip(x.chunk(n_chunk), targets.chunk(n_chunk), counts.chunk(n_chunk)):
                part, dz = _chunk(xs, factor, bias, *rows, softcap, z_weight, scale, buffer)
                loss = loss + part
                if grads:
                    dx.append(factor.gradient(dz))
                    # summed in fp32 whatever the products' dtype, or late chunks would be rounded away
                    _add_product(dw, dz.T, xs)
                    if db is not None:
                        db.add_(dz.sum(0, dtype=db.dtype))
        if grads:
            ctx.save_for_backward(torch.cat(dx), dw, db, mean)
        return loss * mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, db, mean = ctx.saved_tensors
        factor = grad * mean if ctx.divide_later else grad
        if not (dw.is_cpu and not torch.compiler.is_compiling() and factor == 1):
            dx, dw, db = at_least_fp32(dx) * factor, dw * factor, None if db is None else db * factor
        dx, dw, db = (None if d is None else d.to(dtype) for d, dtype in zip((dx, dw, db), ctx.dtypes))
        return dx, dw, None, None, None, db, None, None


def linear_cross_entropy(x, weight, targets, softcap=None, z_weight=0.0, bias=None, token_weights=None):
    """
    x (N,C), weight (V,C), targets (N,) int64, negative for rows that do not count, softcap float or None,
    bias (V,), token_weights (N,) -> scalar fp32: the mean cross entropy, in nats, over the rows that count,
    weighted by token_weights (0 when none counts), and z_weight times the mean square of the logits'
    logsumexp.
    """
    grads = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, bias))
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, z_weight, bias, token_weights, grads)


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
             z_weight: float, grads: bool, eight_bits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    (loss, dx, dW, count of rows that count): gradients of the sum of losses, empty unless they are asked for.
    """
    check('linear_cross_entropy', x=(x, 'N C'), weight=(weight, 'V C'), targets=(targets, 'int N'))
    N, V = x.shape[0], weight.shape[0]
    width, dtype = V if V % 16 == 0 else cdiv(V, 64) * 64, _kept(weight)
    weight = weight if width == V else F.pad(weight, (0, 0, 0, width - V))
    chunks = cdiv(N, max(1, FUSED_NUMEL // width // FUSED_ROWS) * FUSED_ROWS)
    n = cdiv(N, max(1, chunks) * FUSED_ROWS) * FUSED_ROWS
    buffer, losses = x.new_empty(min(n, N), width), x.new_empty(N, dtype=torch.float32)
    dx = x.new_empty(x.shape if grads else 0)
    dw = x.new_zeros(weight.shape if grads else 0, dtype=torch.float32)
    targets = targets.contiguous()
    count = (targets >= 0).sum().clamp(min=1)
    block = clamp(pow2(V), 64, 2048)
    factor = (float8.Weight if eight_bits else _Weight)(weight)
    # products in the dtype of their inputs, under any autocast of the caller
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, N, max(1, n)):
            part = slice(start, min(start + n, N))
            z = buffer[:part.stop - start]
            factor.logits(x[part], z)
            _loss_kernel[(len(z),)](z, targets[part], losses[part], V, width, softcap or 1.0, z_weight,
                                    softcap is not None, grads, block, num_warps=4)
            if grads:
                factor.gradient(z, dx[part])
                _accumulate(dw, z.T, x[part])
    return losses.sum() / count, dx, dw[:V].to(dtype, copy=width > V), count


def _kept(weight):
    """The dtype of dW until the backward pass divides it by the count: the sum may be beyond fp16's range."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


@_forward.register_fake
def _(x, weight, targets, softcap, z_weight, grads, eight_bits):
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
    return (dx * scale).to(dx.dtype), (dw * scale).to(ctx.dtype), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save)


def ok(x, weight, targets, softcap=None, z_weight=0.0, bias=None, token_weights=None):
    return fits(x, weight) and x.dim() == 2 and bias is None and token_weights is None


def fused(x, weight, targets, softcap=None, z_weight=0.0, bias=None, token_weights=None):
    grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = x.to(torch.get_autocast_dtype(kind)), weight.to(torch.get_autocast_dtype(kind))
    eight_bits = grads and common.head_dtype == 'float8'
    return _forward(x, weight.to(x.dtype), targets, softcap, z_weight, grads, eight_bits)[0]


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
