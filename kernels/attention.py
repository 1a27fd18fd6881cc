"""
Attention: each query gets the mean of the values that it may see, weighted by the softmax of its scores.

    s_ij = cap tanh(scale <q_i, k_j> / cap) + bias(pos_i, pos_j)    where query i may see key j
    p_ij = exp s_ij / (sum over j of exp s_ij + exp sink)           y_i = sum over j of p_ij v_j

Order enters through the positions of queries and keys alone, so the same lines serve training, prefill,
decoding from a ring buffer, and padded batches.

In order of reading: what positions decide (masks, ALiBi); the definition; the ways in which PyTorch computes
it; patterns (patterns.py holds their layouts); the choice among those and two Triton kernels, which are in
flash_attention.py (training, prefill) and decode_attention.py (a few queries, a long cache).

A new pattern of attention is an argument of `attention`, a field of `Scoring` and a line of `visible` or
`score_bias`, which `by_position` then computes on any device. In `attention`, the faster branches must leave
the new pattern out until they support it.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decode_attention, flash_attention
from .common import at_least_fp32, cdiv, runs_triton
from .patterns import Joined, Pattern, apart, in_blocks, padded, together
from .ring import Ring, ring_attention
from .spans import spans

# The score of a key that may not be seen. Finite, because a query that sees no key at all, as padding does,
# would turn -inf into NaN; half of the least number, because scores are added to it.
UNSEEN = torch.finfo(torch.float32).min / 2


class Scoring(NamedTuple):
    """How scores are made and turned into weights: the arguments of `attention`, where they are explained."""
    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    chunked: bool = False
    alibi_bf16: bool = False
    dropout: float = 0.0
    causal: bool = True
    relative: tuple | None = None
    pattern: Pattern | None = None

    @property
    def by_products_alone(self):
        """Whether scores are scaled products of queries and keys, and nothing more."""
        added = self.softcap, self.slopes, self.sinks, self.relative
        return all(argument is None for argument in added)


# ----------------------------------------------------------------------------------------------------------
# What positions decide


def visible(pos, key_pos, window=None, chunked=False, causal=True, pattern=None):
    """
    Which keys at key_pos (S,) or (B,S) each query at pos (T,) or (B,T) may see -> bool (1 or B,1,T,S): none
    after the query and none at a negative position, which is padding. window: only the query's own position
    and the window - 1 before it; chunked: only positions of the query's own chunk of `window` (Llama 4). Not
    causal: also keys after the query, in a window as many as before it. pattern: see `Pattern`.
    """
    query, key = pos.unsqueeze(-1), key_pos.unsqueeze(-2)  # (...,T,1), (...,1,S)
    exists = key >= 0
    exists = exists & (key <= query) if causal else exists.expand_as(key - query)
    mask = exists
    if window is not None:
        reach = query % window + 1 if chunked else window
        mask = mask & (key > query - reach if causal else (key - query).abs() < window)
    if pattern is not None:
        mask = mask & pattern.keeps((key - query).abs()) | exists & pattern.is_global(query, key, causal)
    return mask.view(-1, 1, *mask.shape[-2:])


def visible_in(pos, key_pos, scoring):
    return visible(pos, key_pos, scoring.window, scoring.chunked, scoring.causal, scoring.pattern)


def alibi(slopes, pos, key_pos):
    """
    A bias that falls linearly with distance (Press et al. 2022, https://arxiv.org/abs/2108.12409).
    slopes (H,1,1) -> fp32 (1 or B,H,T,S)
    """
    distance = -(key_pos.unsqueeze(-2) - pos.unsqueeze(-1)).abs()  # (...,T,S)
    return slopes * distance.view(-1, 1, *distance.shape[-2:])


def alibi_as_falcon(slopes, key_pos, scale):
    """
    ALiBi as Falcon was trained: slope and product rounded to bf16, then scaled like the scores. The query's
    position is left out: it would add the same number to all scores of a query, which changes no softmax.
    """
    key = key_pos.view(-1, 1, 1, key_pos.shape[-1])
    return (slopes.bfloat16() * key).bfloat16().float() * scale


def bucket(distance, n, farthest, causal):
    """
    A number below n for each distance, key - query: half of them for one distance each, the others for longer
    and longer ranges up to `farthest` (Raffel et al. 2019, section 2.1). Not causal: half for each side.
    """
    after, distance = 0, -distance
    if causal:
        distance = distance.clamp(min=0)
    else:
        n //= 2
        after, distance = (distance < 0) * n, distance.abs()
    alone = n // 2
    ranges = torch.log(distance.clamp(min=1).float() / alone) / math.log(farthest / alone) * (n - alone)
    far = (alone + ranges.long()).clamp(max=n - 1)
    return after + torch.where(distance < alone, distance, far)


def score_bias(pos, key_pos, scoring):
    """What positions add to the scores -> fp32 (1 or B,1 or H,T,S), UNSEEN where a key may not be seen."""
    seen = visible_in(pos, key_pos, scoring)
    bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, UNSEEN)
    if scoring.slopes is not None:
        slopes = scoring.slopes.view(-1, 1, 1)
        bias = bias + (alibi_as_falcon(slopes, key_pos, scoring.scale) if scoring.alibi_bf16 else
                       alibi(slopes, pos, key_pos))
    if scoring.relative is not None:
        table, farthest = scoring.relative
        distance = key_pos.unsqueeze(-2).long() - pos.unsqueeze(-1)
        learned = table[bucket(distance, len(table), farthest, scoring.causal)]     # (...,T,S,H)
        bias = bias + at_least_fp32(learned.movedim(-1, -3).view(-1, table.shape[1], *distance.shape[-2:]))
    return bias


# ----------------------------------------------------------------------------------------------------------
# The definition


def with_sinks(k, v, bias, sinks):
    """A sink is one more key, of product 0 with any query and value 0, whose bias is learned (H,)."""
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    sink = at_least_fp32(sinks).view(1, -1, 1, 1).expand(bias.shape[0], -1, bias.shape[2], 1)
    return k, v, torch.cat((bias.expand(-1, sink.shape[1], -1, -1), sink), dim=-1)


def all_scores(q, k, v, bias, scoring):
    """
    q (B,H,T,D), k (B,K,S,D), v (B,K,S,Dv), bias as from score_bias -> (B,H,T,Dv). Products in the dtype of
    q, k and v; the softmax in fp32 or fp64.
    """
    weights = scores_of(q, k, bias, scoring).softmax(-1)
    return weighted(F.dropout(weights, scoring.dropout), v)


def scores_of(q, k, bias, scoring):
    """-> (B,H,T,S), in fp32 or fp64"""
    (B, H, T, _), K, S = q.shape, *k.shape[1:3]
    # query heads that share a key are rows of one product, which reads that key once
    products = (q.reshape(B, K, H // K * T, -1) @ k.transpose(-1, -2)).view(B, H, T, S)
    scores = at_least_fp32(products) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores + bias


def weighted(weights, v):
    """weights (B,H,T,S), v (B,K,S,Dv) -> (B,H,T,Dv)"""
    (B, H, T, S), K = weights.shape, v.shape[1]
    return (weights.to(v.dtype).view(B, K, H // K * T, S) @ v).view(B, H, T, -1)


def part_of_softmax(q, k, v, pos, key_pos, scoring):
    """Attention to some of the keys, and the log-sum-exp (B,T,H) of their scores, by which parts join."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = scores_of(q, k, score_bias(pos, key_pos, scoring), scoring)
    sums = scores.logsumexp(-1, keepdim=True)
    y = weighted((scores - sums).exp(), v)
    return at_least_fp32(y).transpose(1, 2), sums.squeeze(-1).transpose(1, 2)


def attention_reference(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, sinks=None,
                        in_order=False, chunked=False, alibi_bf16=False, dropout=0.0, causal=True,
                        relative=None, pattern=None):
    """The definition: what every other way must equal. In fp32 or fp64; arguments as in `attention`."""
    scoring = Scoring(scale, window, softcap, slopes, sinks, chunked, alibi_bf16, dropout, causal, relative,
                      pattern)
    dtype = q.dtype
    q, k, v = (at_least_fp32(x).transpose(1, 2) for x in (q, k, v))
    bias = score_bias(pos, key_pos, scoring)
    if sinks is not None:
        k, v, bias = with_sinks(k, v, bias, sinks)
    return all_scores(q, k, v, bias, scoring).transpose(1, 2).to(dtype)


# ----------------------------------------------------------------------------------------------------------
# The ways in which PyTorch computes it


def sdpa(q, k, v, scoring, mask=None):
    """
    PyTorch's own kernels. q (B,H,T,D), k (B,K,S,D), v (B,K,S,Dv) -> (B,H,T,Dv). mask: True where a key is
    seen, or a bias in q's dtype; None: the triangle of tokens 0..T-1, or all of them.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and scoring.causal, scale=scoring.scale,
        dropout_p=scoring.dropout, enable_gqa=q.shape[1] != k.shape[1])


def by_position(q, k, v, pos, key_pos, scoring):
    """Tokens at any position, every option. Shapes as in `attention`."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # values narrower than their keys are latents, which PyTorch's kernels would copy for every head
    narrow = v.shape[-1] < k.shape[-1]
    if scoring.by_products_alone and not narrow:
        return sdpa(q, k, v, scoring, visible_in(pos, key_pos, scoring)).transpose(1, 2)
    bias = score_bias(pos, key_pos, scoring)
    if scoring.sinks is not None:
        k, v, bias = with_sinks(k, v, bias, scoring.sinks)
    if narrow or scoring.softcap is not None:
        return all_scores(q, k, v, bias, scoring).transpose(1, 2)
    # in fp16, UNSEEN would become -inf
    least = max(torch.finfo(q.dtype).min, torch.finfo(bias.dtype).min)
    return sdpa(q, k, v, scoring, bias.clamp(min=least).to(q.dtype)).transpose(1, 2)


def by_head(x):
    """x (B,T,H,D) with the tokens of each head next to each other in memory: a CPU reads them faster."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def without_unseen(q, k, v, pos, key_pos, scoring, size=256):
    """
    by_position for many queries behind a cache on a CPU: in blocks of `size` queries, each without the keys
    in front and at the end that none of them sees, and without those between where they are most. Reads
    positions, for which a GPU would have to wait.
    """
    k, v, parts = by_head(k), by_head(v), []
    for block, at in zip(q.split(size, dim=1), pos.split(size, dim=-1)):
        seen = visible_in(at, key_pos, scoring).flatten(0, -2).any(0).nonzero()
        # queries of padding alone may see no key
        keys = slice(seen.min(), seen.max() + 1) if len(seen) else slice(None)
        if len(seen) and 2 * len(seen) < keys.stop - keys.start:    # global tokens, far from the others
            keys = seen.flatten()
        parts.append(by_position(by_head(block), k[:, keys], v[:, keys], at, key_pos[..., keys], scoring))
    return torch.cat(parts, dim=1)


def in_pieces(q, k, v, scoring):
    """
    Tokens 0..T-1 under a window shorter than T, at most at the cost of full attention. Shapes as in
    `attention`. Its first tokens see all before them: a triangle. Chunks are triangles all.
    """
    T, window = q.shape[1], scoring.window
    first = T // window * window if scoring.chunked else window
    pieces = [x.split((first, T - first), dim=1) for x in (q, k, v)]
    if scoring.chunked:
        whole = triangle(*(x.unflatten(1, (-1, window)).flatten(0, 1) for x, _ in pieces), scoring)
        whole = whole.unflatten(0, (len(q), -1)).flatten(1, 2)
        rest = [triangle(*(x for _, x in pieces), scoring)] if first < T else []
    else:
        whole = triangle(*(x for x, _ in pieces), scoring)
        rest = [blockwise(pieces[0][1], k, v, scoring)]
    return torch.cat((whole, *rest), dim=1)


def triangle(q, k, v, scoring):
    """Tokens 0..T-1 of which each sees all before it."""
    pos, scoring = torch.arange(q.shape[1], device=q.device), scoring._replace(window=None, chunked=False)
    return attention(q, k, v, pos, pos, **scoring._asdict(), in_order=True)


def blockwise(q, k, v, scoring):
    """
    The queries after the first `window` tokens, in blocks that become a batch: each reads the keys of its own
    block and of the window before it, about 1.25 T scores per token of the window. Smaller blocks would waste
    fewer scores and copy more keys.
    """
    (B, T), window = q.shape[:2], scoring.window
    n = cdiv(T, max(window // 4, min(window, 64)))
    size = cdiv(T, n)
    pad = n * size - T
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
    q = q.unflatten(1, (n, size)).flatten(0, 1)                                     # (B n,size,H,D)
    k, v = spans(k, window + size, size), spans(v, window + size, size)             # (B n,window+size,K,D)
    # distances alone count, so the positions of the first block stand for those of every block
    key_pos = torch.arange(window + size, device=q.device)
    y = by_position(q, k, v, key_pos[window:], key_pos, scoring)
    return y.unflatten(0, (B, n)).flatten(1, 2)[:, :T]


def both_sides(q, k, v, scoring):
    """
    Tokens 0..T-1 under a window to both sides, in blocks that become a batch, as in `blockwise`: each reads
    its own keys and window - 1 before and after them.
    """
    (B, T), reach = q.shape[:2], scoring.window - 1
    n = cdiv(T, max(reach, 64))
    size = cdiv(T, n)
    length, pad = size + 2 * reach, n * size - T
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (n, size)).flatten(0, 1)        # (B n,size,H,D)
    k, v = (spans(F.pad(x, (0, 0, 0, 0, reach, reach + pad)), length, size) for x in (k, v))
    pos = torch.arange(-reach, n * size + reach, device=q.device)
    key_pos = torch.where(pos < T, pos, -1).unfold(0, length, size).repeat(B, 1)    # (B n,length)
    pos = pos[reach:reach + n * size].view(n, size).repeat(B, 1)
    return by_position(q, k, v, pos, key_pos, scoring).unflatten(0, (B, n)).flatten(1, 2)[:, :T]


# ----------------------------------------------------------------------------------------------------------
# Patterns


def in_pattern(q, k, v, pos, scoring):
    """Tokens 0..T-1 in a pattern. Shapes as in `attention`."""
    T, pattern, causal = q.shape[1], scoring.pattern, scoring.causal
    near = min(x for x in (scoring.window, pattern.near, T) if x is not None)
    distances = scoring.relative is None and not scoring.alibi_bf16 and (causal or T % pattern.dilation == 0)
    if pattern.stride is not None:
        if not joins(q, k, v, scoring):
            return by_position(q, k, v, pos, pos, scoring)
        y = strided(q, k, v, scoring)
    elif distances and not pattern.n_global:
        return dilated(q, k, v, scoring, near)
    else:
        blocks = in_blocks(q, k, v, near, pattern.dilation, pattern.n_global, causal)
        pos_N, key_pos = (x.repeat(len(q), 1) for x in (blocks.pos, blocks.key_pos))
        y = blocks.tokens(by_position(blocks.q, blocks.k, blocks.v, pos_N, key_pos, scoring), T)
    n = 0 if causal else pattern.n_global   # these queries see all keys
    return torch.cat((by_position(q[:, :n], k, v, pos[:n], pos, scoring), y[:, n:]), dim=1) if n else y


def dilated(q, k, v, scoring, near):
    """A window of every d-th token is a plain window in each of d interleaved sequences."""
    T, d = q.shape[1], scoring.pattern.dilation
    q, k, v = (apart(padded(x, 0, -T % d), d) for x in (q, k, v))
    pos, slopes = torch.arange(q.shape[1], device=q.device), scoring.slopes
    slopes = None if slopes is None else slopes * d     # a distance of one is one of d
    inner = scoring._replace(window=cdiv(near, d), pattern=None, slopes=slopes)
    return together(attention(q, k, v, pos, pos, **inner._asdict(), in_order=True), d)[:, :T]


def joins(q, k, v, scoring):
    """Whether `Joined` takes these arguments."""
    return (q.is_cpu and scoring.by_products_alone and not scoring.dropout and scoring.window is None
            and q.shape[-1] == k.shape[-1] == v.shape[-1])


def strided(q, k, v, scoring):
    """
    Keys at multiples of s are all keys of each of s interleaved sequences. Joined to them are those of the
    window and the first tokens, in blocks, but for the ones that were among the others.
    """
    (B, T, H, _), (near, dilation, s, n_global) = q.shape, scoring.pattern[:4]
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    far = [apart(padded(x, 0, -T % s), s) for x in (q, k, v)]                       # (B s,T/s,H,D)
    far_mask = None
    if not scoring.causal:  # no query sees the padding
        exists = torch.arange(far[0].shape[1] * s).view(-1, s).T < T                # (s,T/s)
        far_mask = as_bias(exists, q).repeat(B, 1)[:, None, None].expand(-1, 1, exists.shape[1], -1)
    blocks = in_blocks(q, k, v, near or T, dilation, n_global, scoring.causal)
    pattern = Pattern(near, dilation, None, n_global)
    seen = visible_in(blocks.pos, blocks.key_pos, scoring._replace(pattern=pattern))
    twice = (blocks.pos.unsqueeze(-1) - blocks.key_pos.unsqueeze(-2)) % s == 0
    mask = as_bias(seen & ~twice.unsqueeze(1), q).repeat(B, 1, 1, 1)
    layouts = ((lambda y: together(y, s)[:, :T], lambda y: apart(padded(y, 0, -T % s), s)),
               (lambda y: blocks.tokens(y, T), blocks.blocks))
    return Joined.apply(scoring.scale, layouts, (scoring.causal, False), (far_mask, mask), *far, *blocks[:3])


def as_bias(seen, q):
    return torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min / 2)


# ----------------------------------------------------------------------------------------------------------
# The choice


def attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, key_pos: Tensor, scale: float,
              window: int | None = None, softcap: float | None = None, slopes: Tensor | None = None,
              sinks: Tensor | None = None, in_order: bool = False, chunked: bool = False,
              alibi_bf16: bool = False, dropout: float = 0.0, causal: bool = True,
              relative: tuple | None = None, pattern: Pattern | None = None) -> Tensor:
    """
    q (B,T,H,D), k (B,S,K,D), v (B,S,K,Dv), H a multiple of K; integers pos (T,) or (B,T) and key_pos (S,) or
    (B,S) -> (B,T,H,Dv). A query sees the keys at its own position and before, but no padding, which has
    negative positions; a query that sees no key gets finite numbers.

    window      a query sees only its own position and the window - 1 before it; chunked: only positions of
                its own chunk of `window`
    softcap     a tanh keeps scores between -softcap and softcap (Gemma 2)
    slopes      (H,) fp32, ALiBi; alibi_bf16: rounded as Falcon was trained
    sinks       (H,) learned, added to the denominator of the softmax: exp sink (gpt-oss)
    in_order    promises that pos and key_pos are both 0..T-1 in every row, so that they need not be read
    dropout     the share of weights that are dropped
    causal      False: a query sees keys after it too, in a window as many as before it
    relative    (table (n,H) learned, farthest): a bias by distance, see `bucket` (T5)
    pattern     which keys of the window are seen, and which besides it: see `Pattern`
    """
    if in_order and window is not None and q.shape[1] <= window:
        window, chunked = None, False   # a window as long as the text is full attention
    if in_order and pattern is not None and window is None and pattern.keeps_all(q.shape[1]):
        pattern = None
    scoring = Scoring(scale, window, softcap, slopes, sinks, chunked, alibi_bf16, dropout, causal, relative,
                      pattern)
    if isinstance(key_pos, Ring):   # keys on several processes
        return ring_attention(q, k, v, pos, key_pos, scoring, part_of_softmax)
    # PyTorch's fastest path, on any device
    if in_order and scoring.by_products_alone and window is None and pattern is None:
        if q.is_cpu and q.shape[1] >= 1024:
            q, k, v = by_head(q), by_head(k), by_head(v)
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scoring).transpose(1, 2)
    if in_order and pattern is not None and not chunked:
        return in_pattern(q, k, v, pos, scoring)
    unknown = chunked or alibi_bf16 or dropout or pattern is not None
    if runs_triton(q) and causal and relative is None and not unknown:
        arguments = q, k, v, pos, key_pos, scale, window, softcap, slopes, sinks
        if not in_order and decode_attention.ok(*arguments):
            return decode_attention.fused(*arguments)
        if flash_attention.ok(*arguments, in_order):
            return flash_attention.fused(*arguments, in_order)
    # what Falcon rounds depends on where a text begins
    if in_order and window is not None and pattern is None and not alibi_bf16:
        return (in_pieces if causal else both_sides)(q, k, v, scoring)
    reads = q.is_cpu and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if reads and q.shape[1] >= 512:
        return without_unseen(q, k, v, pos, key_pos, scoring)
    if q.is_cpu and q.shape[1] <= 4 and q.dtype in (torch.bfloat16, torch.float16):
        # for a few queries, a CPU's kernel takes half the time in fp32
        return by_position(q.float(), k.float(), v.float(), pos, key_pos, scoring).to(q.dtype)
    return by_position(q, k, v, pos, key_pos, scoring)
