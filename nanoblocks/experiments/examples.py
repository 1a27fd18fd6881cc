"""
Example arguments of every operation, for measurements: `n` tokens at the sizes of GPT-2 small and of a model
4096 wide.
"""
from typing import NamedTuple

import torch

import kernels


def _randn(*shape, device, dtype=torch.bfloat16, grad=True):
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype).requires_grad_(grad)


def _norm(n, device, C):
    return _randn(n, C, device=device), _randn(C, device=device, dtype=torch.float32), 1e-5


def _rope_qk(n, device, norm=False):
    # 32 heads of 128 and 8 for keys and values, in the buffer of their projection
    qkv = _randn(1, n, 48, 128, device=device)
    angle = torch.rand(n, 64, device=device)
    weights = [_randn(128, device=device, dtype=torch.float32) for _ in range(2)] if norm else []
    return qkv[:, :, :32], qkv[:, :, 32:40], angle.cos(), angle.sin(), *weights


def _head(n, device, C, V, softcap=None):
    return (_randn(n, C, device=device), (_randn(V, C, device=device, grad=False) / C**0.5).requires_grad_(),
            torch.randint(V, (n,), device=device), softcap)


def _conv(n, device, I):
    x = _randn(8, n // 8, I, device=device)
    return x, *(_randn(I, *w, device=device, dtype=torch.float32) for w in ((4,), ()))


def _scan(n, device, I, N):
    wide = dict(device=device, dtype=torch.float32)
    x, dt = _randn(8, n // 8, I, device=device), torch.rand(8, n // 8, I, **wide).mul_(0.1).requires_grad_()
    A = (-torch.arange(1.0, N + 1, **wide).expand(I, N)).contiguous().requires_grad_()
    return x, dt, A, *(_randn(8, n // 8, N, device=device) for _ in range(2)), _randn(I, **wide)


def _attention(n, device, H, K, D, T, window=None, softcap=None, alibi=False):
    T = min(n, T)
    q, k, v = (_randn(n // T, T, heads, D, device=device) for heads in (H, K, K))
    pos = torch.arange(T, device=device)
    slopes = 2.0 ** -torch.arange(1, H + 1, device=device) if alibi else None
    return q, k, v, pos, pos, D ** -0.5, window, softcap, slopes, None, True


def _chunk(n, device, H, K, D):
    """n queries after n tokens of a cache, whose slots are in random order."""
    q, k, v = (_randn(1, size, heads, D, device=device) for size, heads in ((n, H), (2 * n, K), (2 * n, K)))
    pos, key_pos = torch.arange(n, 2 * n, device=device), torch.randperm(2 * n, device=device)
    return q, k, v, pos, key_pos, D ** -0.5


def _decode(n, device, B, H, K, D, DV=None):
    """
    One query for each of B sequences, whose full caches hold n tokens together. DV: the values are the first
    DV coordinates of the keys, as in MLA.
    """
    made = dict(device=device, grad=False)
    q, k = _randn(B, 1, H, D, **made), _randn(B, n // B, K, D, **made)
    v = k[..., :DV] if DV else _randn(B, n // B, K, D, **made)
    pos = torch.arange(n // B, device=device, dtype=torch.int32)
    return q, k, v, pos[-1:], pos, D ** -0.5


def _experts(n, device, E, n_in, n_out):
    """The same number of rows for each expert."""
    return (_randn(n, n_in, device=device), (_randn(E, n_out, n_in, device=device, grad=False) / n_in ** 0.5)
            .requires_grad_(), None, torch.full((E,), n // E, device=device))


def _ssd(n, device, batch, H, P, G, N):
    T, wide = n // batch, dict(device=device, dtype=torch.float32)
    x, dt = _randn(batch, T, H, P, device=device), torch.rand(batch, T, H, **wide).mul_(0.1).requires_grad_()
    A, D = (-1 - 15 * torch.rand(H, **wide)).requires_grad_(), _randn(H, **wide)
    return x, dt, A, *(_randn(batch, T, G, N, device=device) for _ in range(2)), D


def _recurrence(n, device, batch, H, K, V, erase=True):
    q, v = (_randn(batch, n // batch, H, width, device=device) for width in (K, V))
    k = torch.nn.functional.normalize(_randn(*q.shape, device=device, grad=False), dim=-1)
    beta = torch.rand(*q.shape[:3], 1, device=device)
    e = (beta * k).to(k.dtype).requires_grad_() if erase else None
    return q, k.requires_grad_(), v, beta.log().mul_(0.1).requires_grad_(), e


# ----------------------------------------------------------------------------------------------------------
# FLOPs of the matrix products: (forward, backward)


def _head_flops(x, weight, targets, softcap):
    # the forward pass computes the gradients too
    return 6 * x.numel() * weight.shape[0], 0


def _attention_flops(q, k, v, pos, key_pos, scale, window=None, *flags):
    (B, T, H, D), S = q.shape, k.shape[1]
    pairs = T * (T + 1) // 2 if S == T else S * T
    if window is not None:
        pairs = sum(min(t + 1, window) for t in range(T))
    return 4 * B * H * D * pairs, 10 * B * H * D * pairs


def _experts_flops(x, weight, bias, counts):
    return 2 * x.numel() * weight.shape[1], 4 * x.numel() * weight.shape[1]


def _ssd_flops(x, dt, A, B, C, D):
    # of the recurrence as defined: the writes to the state and the reads from it
    return 4 * x.numel() * B.shape[-1], 8 * x.numel() * B.shape[-1]


def _recurrence_flops(q, k, v, g, erase):
    # of the recurrence as defined: the write to the state, the read from it, and the read of what is erased
    products = (4 if erase is None else 6) * v.numel() * k.shape[-1]
    return products, 2 * products


class Example(NamedTuple):
    """One set of arguments for one operation."""
    op: str
    what: str
    make: object                # (n, device) -> arguments, in bf16 and differentiable
    n: int                      # tokens of a measurement
    flops: object = None        # (*arguments) -> (forward, backward) FLOPs of the matrix products
    hard: bool = False          # takes the most registers of all examples of its operation


EXAMPLES = [
    Example('rms_norm', '768 wide', lambda n, d: _norm(n, d, 768), 65536),
    Example('rms_norm', '4096 wide', lambda n, d: _norm(n, d, 4096), 16384, hard=True),
    Example('rope_qk', '32 and 8 heads of 128', lambda n, d: _rope_qk(n, d), 16384),
    Example('rope_qk', 'the same with QK-norm', lambda n, d: _rope_qk(n, d, norm=True), 16384, hard=True),
    Example('swiglu', '2048 wide', lambda n, d: (_randn(n, 4096, device=d),), 65536),
    Example('swiglu', '8192 wide', lambda n, d: (_randn(n, 16384, device=d),), 8192, hard=True),
    Example('geglu', '2048 wide', lambda n, d: (_randn(n, 4096, device=d),), 65536, hard=True),
    Example('linear_cross_entropy', 'GPT-2 small', lambda n, d: _head(n, d, 768, 50257), 16384, _head_flops),
    Example('linear_cross_entropy', '4096 wide, 128K tokens', lambda n, d: _head(n, d, 4096, 128256), 4096,
            _head_flops),
    Example('linear_cross_entropy', 'soft-capped', lambda n, d: _head(n, d, 768, 50257, 30.0), 16384,
            _head_flops, hard=True),
    Example('causal_conv', '1536 wide, 4 taps', lambda n, d: _conv(n, d, 1536), 65536, hard=True),
    Example('selective_scan', '1536 channels, N = 16', lambda n, d: _scan(n, d, 1536, 16), 16384, hard=True),
    Example('ssd', '24 heads of 64, N = 128', lambda n, d: _ssd(n, d, 8, 24, 64, 1, 128), 16384, _ssd_flops,
            hard=True),
    Example('ssd', 'one sequence', lambda n, d: _ssd(n, d, 1, 24, 64, 1, 128), 16384, _ssd_flops),
    Example('recurrence', 'delta rule, 16 heads of 128', lambda n, d: _recurrence(n, d, 8, 16, 128, 128),
            16384, _recurrence_flops, hard=True),
    Example('recurrence', 'decay alone, 16 heads of 128',
            lambda n, d: _recurrence(n, d, 8, 16, 128, 128, erase=False), 16384, _recurrence_flops),
    Example('attention', '32 heads of 128, 4096 tokens', lambda n, d: _attention(n, d, 32, 8, 128, 4096),
            16384, _attention_flops),
    Example('attention', 'window of 1024', lambda n, d: _attention(n, d, 32, 8, 128, 4096, 1024), 16384,
            _attention_flops, hard=True),
    Example('attention', 'soft-capped', lambda n, d: _attention(n, d, 32, 8, 128, 4096, softcap=50.0), 16384,
            _attention_flops),
    Example('attention', 'by position, after a cache', lambda n, d: _chunk(n, d, 32, 8, 128), 4096,
            _attention_flops),
    Example('attention', 'ALiBi, 12 heads of 64', lambda n, d: _attention(n, d, 12, 12, 64, 1024, alibi=True),
            16384, _attention_flops),
    Example('attention', 'window of 512, heads of 256', lambda n, d: _attention(n, d, 8, 4, 256, 4096, 512),
            16384, _attention_flops),
    Example('decode_attention', '1 x 32K tokens', lambda n, d: _decode(n, d, 1, 32, 8, 128), 32768),
    Example('decode_attention', '64 x 4K tokens', lambda n, d: _decode(n, d, 64, 32, 8, 128), 262144),
    Example('decode_attention', 'MLA, 16 x 8K tokens', lambda n, d: _decode(n, d, 16, 16, 1, 576, 512),
            131072, hard=True),
    Example('grouped_linear', '8 experts, 768 to 4096', lambda n, d: _experts(n, d, 8, 768, 4096), 32768,
            _experts_flops, hard=True),
    Example('grouped_linear', '64 experts, 2048 to 1024', lambda n, d: _experts(n, d, 64, 2048, 1024), 65536,
            _experts_flops),
]


def outputs(function, args):
    """The result of an operation, as a tuple of tensors."""
    out = function(*args)
    return out if isinstance(out, tuple) else (out,)


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def forward_and_backward(op, args):
    """Run the kernels of an operation, once in each direction."""
    row = kernels.OPS[op]
    assert row.ok(*args), f'the kernels of {op} refuse their example'
    out = [y for y in outputs(row.fused, args) if y.requires_grad]
    if row.backward:
        torch.autograd.grad(out, leaves(args), [torch.ones_like(y) for y in out], allow_unused=True)
