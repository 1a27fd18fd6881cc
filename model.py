"""
GPT-2, Llama and the blocks of newer language models, each switched on by a flag of GPTConfig.

    Part I    A decoder, from GPT-2 to Llama    parameters, norms, positions, cache, attention, feed-forward,
                                                and the block that joins them
    Part II   Other blocks, read when wanted    positions, rope scaling, additions to attention, differential,
                                                latent and gated attention, state spaces, recurrences,
                                                experts, activations, residual streams, encoders, documents
    Part III  The model                         tables, GPTConfig, GPT

Read Part I and Part III: that is a complete decoder, GPT-2 or Llama. A chapter of Part II holds all about one
block, its flags and its classes. A word such as ffn='swiglu' is looked up in a table once, when a layer is
built; no forward compares words.

Every block has two branches, x + mixer(norm(x)) and x + ffn(norm(x)), both (B,T,C) -> (B,T,C): mixer(x, ctx,
cache) mixes tokens (attention, a state space), ffn(x, ctx) works on each token alone.

Shapes, in comments like (B,T,C):
    B batch             T tokens of this call       S keys, or slots of a cache     C n_embd
    H query heads       K key/value heads           D head_dim                      V vocabulary
    I inner width of a feed-forward or state space  E experts                       G groups
    R width of a latent     Dn, Dr, Dv coordinates of an MLA head that do not rotate, that do, of a value
    P channels of a head, N state size, W taps (state spaces); N tokens of all sequences (experts)

In the letters of Vaswani et al., C is d_model, H h, D d_k = d_v, and ffn_width d_ff.
"""
import hashlib
import math
import numbers
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import SET, Flags, flag, flags, own_module

ops = own_module('kernels')     # import kernels as ops, even where PyPI's package of that name comes first

# ==========================================================================================================
# Part I: a decoder, from GPT-2 to Llama
# ==========================================================================================================

# ----------------------------------------------------------------------------------------------------------
# Parameters. Each is declared with the function that draws its initial value, and drawn by GPT.init_weights
# from a generator of its own, seeded by its name: a flag that adds a tensor leaves all others as they are.

def param(*shape, init):
    """A parameter that GPT.init_weights sets to init(shape, generator)."""
    p = nn.Parameter(torch.empty(shape))
    p.init = init
    return p

def constant(shape, generator, values):
    return torch.tensor(values).expand(shape)

zeros, ones = partial(constant, values=0.0), partial(constant, values=1.0)

def normal(shape, generator, std=0.02):
    return torch.randn(shape, generator=generator) * std

def uniform(shape, generator, bound):
    return bound * (2 * torch.rand(shape, generator=generator) - 1)

class Linear(nn.Linear):
    """nn.Linear, drawn by name: its weight from a normal distribution."""
    group = 'matrix'    # kind of the weight, for optimizers: GPT.param_kinds

    def __init__(self, n_in, n_out, bias, std=0.02):
        super().__init__(n_in, n_out, bias)
        self.weight.init = partial(normal, std=std)
        if bias:
            self.bias.init = zeros

    def reset_parameters(self):
        pass  # nn.Linear's own draw would cost time and move the global generator

def out_std(c):
    """GPT-2 scales by 1 / sqrt(2 n_layer), so that the sum of 2 n_layer branches does not grow with depth."""
    return 0.0 if c.zero_init else 0.02 / math.sqrt(2 * c.n_layer)

def out_proj(c, n_in, bias):
    """A projection back to the residual stream."""
    return Linear(n_in, c.n_embd, bias, std=out_std(c))

class Embedding(nn.Embedding):
    """nn.Embedding, drawn by name."""
    group = 'embedding'

    def __init__(self, n, width):
        super().__init__(n, width)
        self.weight.init = normal

    def reset_parameters(self):
        pass


# ----------------------------------------------------------------------------------------------------------
# Norms

@flags()
class NormFlags:
    """Norms"""
    norm_eps: float = 1e-5          # added to the variance (or mean square) in every norm
    norm_bias: bool | None = flag(None, like='bias', norm='layernorm')  # bias of layer norms; None: as bias

class LayerNorm(nn.Module):
    """Subtracts the mean, divides by the standard deviation (Ba et al. 2016)."""

    def __init__(self, width, c):
        super().__init__()
        self.weight = param(width, init=ones)
        self.bias = param(width, init=zeros) if c.norm_bias else None
        self.eps = c.norm_eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

class RMSNorm(nn.Module):
    """Divides by the root of the mean square: no mean, no bias (Zhang and Sennrich 2019)."""

    def __init__(self, width, c, eps=None):
        super().__init__()
        self.weight = param(width, init=ones)
        self.eps = eps or c.norm_eps

    def forward(self, x):
        return ops.rms_norm(x, self.weight, self.eps)


# ----------------------------------------------------------------------------------------------------------
# Positions. No layer counts tokens: masks, rotations and biases are functions of the tensor `pos`, so one
# code path serves training, prefill and decoding.

class Context(NamedTuple):
    """What all layers of one forward pass share."""
    pos: torch.Tensor   # (T,) or (B,T) int64: positions of the tokens; negative: padding, never attended to
    in_order: bool      # they are 0..T-1, and nothing is cached: no padding, the mask is a triangle
    rope: tuple | None  # two (cos, sin) pairs of angles, each (T,D/2) or (B,T,D/2) fp32: for all layers, and
                        # for windowed ones, which may rotate at another base
    reach: int | None = None        # tokens that a query sees where a chunk ends beyond max_tokens
    given: 'Given | None' = None    # what single blocks of Part II read
    documents: 'Documents | None' = None    # where rows hold several; pos sets these apart (Part II)

class Positions(nn.Module):
    """No positional information (NoPE). Subclasses add to the embedding, rotate, or bias the scores."""
    max_tokens = None       # longest text, None: no limit
    longest = math.inf      # longest text that rotates at the same frequencies as a shorter one

    def __init__(self, c):
        super().__init__()

    def forward(self, x, pos):
        """The embedding x (B,T,C), with positions added to it."""
        return x

    def rope(self, pos, length=0):
        """The two (cos, sin) pairs of Context.rope, for a text of `length` tokens in all."""
        return None

    slopes = staticmethod(lambda n_head: None)  # ALiBi's slope of each head, (n_head,)

class LearnedPositions(Positions):
    """A learned vector for each of block_size positions, added to the embedding (GPT-2)."""
    group = 'embedding'

    def __init__(self, c):
        super().__init__(c)
        self.max_tokens = c.block_size
        self.weight = param(c.block_size, c.embed_width, init=normal)

    def forward(self, x, pos):
        if pos.is_cpu and not torch.compiler.is_compiling() and pos.max() >= self.max_tokens:
            raise ValueError(f'pos={pos.max()} must be below block_size={self.max_tokens}, where learned '
                             'positions end')
        return x + F.embedding(pos.clamp(min=0), self.weight)

@flags(pos='rope', layer_pattern='awchz')
class RopeFlags:
    """Rotary positions"""
    rope_theta: float = flag(10000.0, above=1)  # base: pair j of D/2 rotates by theta^(-2j/D) per token
    rope_local_theta: float | None = flag(None, above=1, layer_pattern='w')     # theta of w layers (Gemma 3)
    rope_fraction: float = flag(1.0, above=0, most=1)   # fraction of head_dim that rotates

    def rules(c):
        width = rope_width(c)
        name = 'rope_head_dim' if c.attn == 'mla' else 'rope_fraction' if c.rope_fraction < 1 else 'head_dim'
        yield (name, width and width % 2 == 0,
               f'leave an even number of coordinates to rotate when pos=rope, not {width}')

class Frequencies(nn.Module):
    """One frequency per pair of coordinates; stays fp32 when the model is cast."""

    def __init__(self, freq):
        super().__init__()
        # stored as integers with the same bits, because model.to(bfloat16) would round a buffer of floats
        self.register_buffer('bits', freq.float().view(torch.int32), persistent=False)

    def angles(self, pos):
        """pos (...,T) -> (...,T,width/2) fp32"""
        return pos.unsqueeze(-1) * self.bits.view(torch.float32)

class RotaryPositions(Positions):
    """
    RoPE (Su et al. 2021): the angles by which ops.rope rotates pairs of coordinates of queries and keys,
    proportional to the position, so that q.k depends on the distance alone.
    """

    def __init__(self, c):
        super().__init__(c)
        self.frequencies, self.magnitude = partial(ROPE_SCALING[c.rope_scaling], c), rope_magnitude(c)
        self.freq = Frequencies(self.frequencies(0))
        self.local = Frequencies(rope_plain(c, 0, c.rope_local_theta)) if c.rope_local_theta else None
        if c.rope_scaling in ROPE_BY_LENGTH:
            self.longest = c.rope_context

    def rope(self, pos, length=0):
        freq = self.freq
        if length > self.longest:
            freq = Frequencies(self.frequencies(length)).to(pos.device)
        angle = freq.angles(pos)                                                # (...,T,D/2)
        scaled = angle.cos() * self.magnitude, angle.sin() * self.magnitude
        if self.local is None:
            return scaled, scaled
        angle = self.local.angles(pos)
        return scaled, (angle.cos(), angle.sin())

def rope_width(c):
    """Coordinates of a head that rotate."""
    return c.rope_head_dim or round(c.head_dim * c.rope_fraction)

def rope_plain(c, length, theta=None, width=None):
    """theta^(-2j/D) for pair j of D/2 -> (D/2,) fp64"""
    width = width or rope_width(c)
    return (theta or c.rope_theta) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


# ----------------------------------------------------------------------------------------------------------
# Cache

class TokenCache:
    """
    What one attention layer remembers of past tokens: S slots, each with a position (-1: empty) and a row of
    each tensor, (B,S,*width). The mask is computed from those positions, so a token may lie in any slot; it
    lies in pos % S, which makes a ring buffer of a window.

    The caller gives the positions, consecutive ones in each call. To roll back up to `spare` tokens of a
    ring (any number otherwise), write their positions again: the mask hides the stale ones.
    """

    def __init__(self, batch_size, slots, widths, dtype, device, max_tokens=math.inf, spare=0):
        self.max_tokens, self.ring = max_tokens, slots  # longest sequence; one more pushes out the oldest
        # longest chunk that can be written before attending, and overwrites no key that it still needs
        self.max_chunk = max_tokens if slots >= max_tokens else 1 + spare
        self.pos = torch.full((batch_size, slots), -1, dtype=torch.int32, device=device)
        self.rows = [torch.zeros(batch_size, slots, *w, dtype=dtype, device=device) for w in widths]
        self.empty = True

    def update(self, pos, *new, beyond=False):
        """
        Store `new`, tensors (B,T,...) at pos (T,) or (B,T) -> (positions, tensors) of all they may see.
        beyond: a chunk ends beyond max_tokens, so that its first token still sees what its last pushes out.
        """
        if new[0].shape[1] > self.max_tokens:
            raise ValueError(f'{new[0].shape[1]} tokens must be at most the {self.max_tokens} that this '
                             'cache was made for: make a larger one')
        new = [n.to(r.dtype) for n, r in zip(new, self.rows)]
        pos_BT = pos.to(torch.int32).expand(new[0].shape[:2])
        if self.empty and pos_BT.shape[1] > 1:  # prefill takes the path of training
            seen = (pos_BT, *new)
        elif pos_BT.shape[1] <= (1 if beyond else self.max_chunk):
            # no slot after that of the last position is seen; a GPU would wait to read which one that is
            end = pos.max() + 1 if pos.is_cpu and not torch.compiler.is_compiling() else None
            seen = [held[:, :end] for held in (self.pos, *self.rows)]
        else:
            # copy the old slots before they are overwritten; a replaced position must not be seen twice
            old = torch.where(self.pos >= pos_BT[:, :1], -1, self.pos)
            seen = (torch.cat((old, pos_BT), 1), *(torch.cat((r, n), 1) for r, n in zip(self.rows, new)))
        slot = self.slot(pos_BT[:, -self.ring:].long())
        row = torch.arange(slot.shape[0], device=slot.device).unsqueeze(1)
        for held, n in zip((self.pos, *self.rows), (pos_BT, *new)):
            held[row, slot] = n[:, -self.ring:]
        self.empty = False
        return seen[0], seen[1:]

    def slot(self, pos):
        return pos % self.ring

    def reset(self):
        """Forget everything, keep the memory."""
        self.pos.fill_(-1)
        self.empty = True

    def expand(self, n):
        """Repeat every sequence n times, next to each other: one prompt, n continuations."""
        self.pos = self.pos.repeat_interleave(n, 0)
        self.rows = [r.repeat_interleave(n, 0) for r in self.rows]

    def snapshot(self):
        """What `restore` needs to roll back: nothing, as tokens roll back by being written again."""

    def restore(self, snapshot):
        pass

    def nbytes(self):
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.pos, *self.rows))


# ----------------------------------------------------------------------------------------------------------
# Attention

@flags(layer_pattern='awcnvhz')
class AttentionFlags:
    """Attention"""
    n_kv_head: int | None = flag(None, like='n_head')   # key/value heads: n_head (None) MHA, fewer GQA, 1 MQA
    head_dim: int | None = None     # width of a head (mla: of the part without rope); None: n_embd / n_head
    attn_scale: float | None = None                     # factor on the scores; None: 1 / sqrt(width of a key)
    window: int | None = flag(None, layer_pattern='wvc')    # window of w and v layers, chunk of c layers
    qkv_bias: bool | None = flag(None, like='bias')     # bias of the q, k, v projections; None: as bias
    proj_bias: bool | None = flag(None, like='bias')    # bias of the output projection; None: as bias

    def fill(c):
        c._must('n_embd', c.head_dim or c.n_embd % c.n_head == 0,
                f'be a multiple of n_head={c.n_head}, or head_dim must be set')
        return {'head_dim': c.n_embd // c.n_head}

    def rules(c):
        yield 'n_kv_head', c.n_head % c.n_kv_head == 0, f'divide n_head={c.n_head}'
        yield 'window', c.window or c.missing('window'), "be set when layer_pattern has a 'w', 'v' or 'c'"

class LayerSpan(NamedTuple):
    """What a letter of layer_pattern decides about attention: how far it sees, and whether it rotates."""
    window: int | None = None   # tokens seen, the newest included; None: all
    chunked: bool = False       # see only the own chunk of `window` tokens
    rotary: bool = True         # rotate queries and keys, when pos=rope
    local: bool = False         # rotate at rope_local_theta
    pattern: 'ops.Pattern | None' = None    # which keys of the window are seen, and which besides it

class SoftmaxAttention(nn.Module):
    """softmax(scale q k^T) v over the keys that each query may see: a layer's arguments of ops.attention."""

    def __init__(self, c, n_head, scale, span):
        super().__init__()
        self.options = dict(scale=scale, softcap=c.softcap, alibi_bf16=c.pos == 'alibi_bf16', causal=c.causal)
        self.span = span
        slopes = POSITIONS[c.pos].slopes(n_head)
        # as integers, like the bits of Frequencies
        self.register_buffer('slopes', None if slopes is None else slopes.view(torch.int32), persistent=False)
        self.sinks = param(n_head, init=normal) if c.sinks else None
        self.relative = RelativeBias(c) if c.pos == 'relative' else None
        self.dropout = c.dropout

    def forward(self, q, k, v, ctx, key_pos):
        """
        q (B,T,H,D), k (B,S,K,D), v (B,S,K,Dv), key_pos (S,) or (B,S) -> (B,T,H,Dv). Query head h reads
        key/value head h // (H / K); nothing is repeated in memory.
        """
        slopes = None if self.slopes is None else self.slopes.view(torch.float32)
        return ops.attention(q, k, v, ctx.pos, key_pos, **self.options, **limits(self.span, ctx),
                             slopes=slopes, sinks=self.sinks, in_order=ctx.in_order,
                             dropout=self.dropout if self.training else 0.0,
                             relative=self.relative and self.relative(ctx))

class CachedAttention(nn.Module):
    """What Attention and MLA share. They set `cached`, the widths of what one token leaves in the cache."""

    def __init__(self, c, span):
        super().__init__()
        self.span, self.rotary, self.local = span, span.rotary and c.pos == 'rope', int(span.local)

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        slots = min(max_tokens, self.span.window + spare if self.span.window else max_tokens)
        return cache_of(self.span)(batch_size, slots, self.cached, dtype, device, max_tokens, spare)

    def flops(self, T):
        """Floating-point operations per token, forward and backward, of the scores and the weighted sum."""
        return 6 * self.products * keys_seen(T, self.span)

# n_kv_head = n_head: MHA      fewer: GQA        1: MQA
#   v  v  v  v                   v     v             v         The cache holds k and v,
#   k  k  k  k                   k     k             k         so it shrinks to n_kv_head / n_head.
#   |  |  |  |                  / \   / \         / / \ \
#   q  q  q  q                 q   q q   q       q  q  q  q

class Attention(CachedAttention):
    """Causal self-attention: MHA (Vaswani et al. 2017), GQA (Ainslie et al. 2023), MQA (Shazeer 2019)."""
    n_maps = 1  # attention maps of one output head; DiffAttention has two

    def __init__(self, c, layer, span):
        super().__init__(c, span)
        self.heads, self.head_dim = (c.n_head, c.n_kv_head, c.n_kv_head), c.head_dim    # of q, k, v
        self.cached = [(c.n_kv_head, c.head_dim)] * 2
        self.products = c.n_head * (1 + self.n_maps) * c.head_dim   # per key: the scores, the weighted sum
        self.c_attn = Linear(c.n_embd, sum(self.heads) * c.head_dim, c.qkv_bias)
        self.c_proj = out_proj(c, c.n_head * c.head_dim, c.proj_bias)
        self.q_norm, self.k_norm = (QK_NORM[c.qk_norm](c, n) for n in (c.n_head, c.n_kv_head))
        self.norm_in_rope = self.rotary and c.qk_norm is True
        self.extras = tuple(attention_extras(self, c))
        self.gate = ATTN_GATE[c.attn_gate](c, c.n_head // self.n_maps, self.n_maps * c.head_dim)
        self.scores = SoftmaxAttention(c, c.n_head // self.n_maps, c.attn_scale or c.head_dim ** -0.5, span)
        self.clip = c.qkv_clip

    def forward(self, x, ctx, cache=None):
        # 1. queries, keys and values in one product
        qkv = self.c_attn(x)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)    # (B,T,H|K|K,D)
        # 2. QK norm, then the rotation by position
        q, k = self.rotate(q, k, ctx)
        # 3. additions of single families (Part II); usually none
        for extra in self.extras:
            q, k, v = extra(self, q, k, v, ctx)
        # 4. past tokens
        key_pos = ctx.pos
        if cache is not None:
            key_pos, (k, v) = cache.update(ctx.pos, k, v, beyond=ctx.reach is not None)     # (B,S,K,D)
        # 5. attend, and project back to the residual stream
        return self.c_proj(self.gate(self.attend(q, k, v, ctx, key_pos), x).flatten(2))

    def rotate(self, q, k, ctx):
        if self.norm_in_rope:  # fused
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            return ops.rope_qk(q, k, *ctx.rope[self.local], *norms)
        q, k = self.q_norm(q), self.k_norm(k)
        return ops.rope_qk(q, k, *ctx.rope[self.local]) if self.rotary else (q, k)

    def attend(self, q, k, v, ctx, key_pos):
        return self.scores(q, k, v, ctx, key_pos)


# ----------------------------------------------------------------------------------------------------------
# Feed-forward

@flags(ffn_pattern='fe')
class FFNFlags:
    """Feed-forward"""
    ffn_width: int | None = None    # hidden width; None: 4 n_embd, or gated 8/3 n_embd (equal parameters)
    ffn_bias: bool | None = flag(None, like='bias')     # bias of feed-forwards and experts; None: as bias

    def fill(c):
        if not issubclass(FFN[c.ffn][0], GatedMLP):
            return {'ffn_width': 4 * c.n_embd}
        # three matrices instead of two: 8/3 n_embd, to within 1 %, in a multiple of up to 64
        multiple = 2 ** min(6, max(0, int(math.log2(c.n_embd / 16))))
        return {'ffn_width': max(1, round(8 * c.n_embd / 3 / multiple)) * multiple}

class MLP(nn.Module):
    """Two linear layers with an activation between them."""
    n_inner = 1     # what c_fc computes: the hidden layer

    def __init__(self, c, act, width):
        super().__init__()
        self.c_fc = Linear(c.n_embd, self.n_inner * width, c.ffn_bias)
        self.c_proj = out_proj(c, width, c.ffn_bias)
        self.act = act

    def forward(self, x, ctx):
        return self.c_proj(self.act(self.c_fc(x)))

class GatedMLP(MLP):
    """A gate multiplies the hidden layer (Shazeer 2020): SwiGLU, GEGLU."""
    n_inner = 2     # what c_fc computes: gate and hidden layer, side by side

def dense(c, width):
    """The feed-forward that c.ffn names, `width` wide."""
    cls, act = FFN[c.ffn]
    return cls(c, act(c), width)


# ----------------------------------------------------------------------------------------------------------
# Block

@flags()
class BlockFlags:
    """Residual stream"""
    residual_scale: float = 1.0     # factor on the output of every branch (Granite)
    embed_scale: bool | float = False   # factor on the token embedding: a number, or True for sqrt(n_embd)
    embed_norm: bool = False        # a norm on the embedding (BLOOM)
    embed_skip: bool = False        # later blocks read a x + b embedding, with learned a and b

    def rules(c):
        yield 'embed_skip', not c.embed_skip or c.n_layer > 1, 'be False when n_layer=1'

#           norms: before a branch, on its output, on the sum
NORM_AT = {
    'pre':      (True, False, False),
    'post':     (False, False, True),
    'output':   (False, True, False),
    'sandwich': (True, True, False),
}

def norm_if(wanted, c, width=None):
    return NORMS[c.norm](width or c.n_embd, c) if wanted else nn.Identity()

class Block(nn.Module):
    """Mixer and feed-forward, or one of them, with the norms that NORM_AT lists; others are nn.Identity."""

    def __init__(self, c, mixer, ffn, layer):
        super().__init__()
        at = NORM_AT[c.rnn_norm_at if mixer == 'r' else c.norm_at]
        self.mixer, self.ffn = MIXERS[mixer].build(c, layer), FFNS[ffn].build(c)
        if self.mixer is not None:
            self.ln_1, self.ln_1_out, self.ln_1_sum = (norm_if(wanted, c) for wanted in at)
        if mixer == 'z' or layer == 0 and not c.first_norm:
            self.ln_1 = nn.Identity()
        if self.ffn is not None:
            self.ln_2, self.ln_2_out, self.ln_2_sum = (norm_if(wanted, c) for wanted in at)
        self.drop, self.scale = nn.Dropout(c.dropout), c.residual_scale
        # in the first block, x is the embedding
        skips = c.embed_skip and layer > 0
        self.skip = param(2, init=partial(constant, values=(1.0, 0.0))) if skips else None

    def forward(self, x, ctx, cache=None):
        if self.skip is not None:
            x = self.skip[0] * x + self.skip[1] * ctx.given.embedding
        return self.branches(x, ctx, cache)

    def branches(self, x, ctx, cache):
        x = x if self.mixer is None else self.ln_1_sum(x + self.mix(self.ln_1(x), ctx, cache))
        return x if self.ffn is None else self.ln_2_sum(x + self.feed(self.ln_2(x), ctx))

    def mix(self, x, ctx, cache):
        return self.scaled(self.ln_1_out(self.mixer(x, ctx, cache)))

    def feed(self, x, ctx):
        return self.scaled(self.ln_2_out(self.ffn(x, ctx)))

    def scaled(self, y):
        return self.drop(y) if self.scale == 1 else self.drop(y) * self.scale

    def flops(self, T):
        return 0 if self.mixer is None else self.mixer.flops(T)

    def new_cache(self, *sizes):
        return JointCache() if self.mixer is None else self.mixer.new_cache(*sizes)


# ==========================================================================================================
# Part II: other blocks, read when wanted
# ==========================================================================================================
#
# The papers' letters, and ours:
#   DeepSeek (MLA)   d_c kv_rank (R), d_c' q_rank, d_h head_dim (Dn), d_h^R rope_head_dim (Dr); W^DQ q_down,
#                    W^UQ and W^QR q_up, W^DKV and W^KR kv_down, W^UK and W^UV kv_up
#   Mamba            D I (ssm_expand * n_embd), N ssm_state, R ssm_dt_rank, Delta dt; Mamba-2: P ssm_head_dim
#   experts          N or E n_expert, k n_expert_used
#   recurrences      alpha exp(decay), beta rnn_beta at most; RWKV-7: w decay, a rate, kappa kk

# ----------------------------------------------------------------------------------------------------------
# What many blocks share: what they are given, what their caches take, and a check of counts

class Given(NamedTuple):
    """What single blocks read of a forward pass, beside the Context of all."""
    embedding: torch.Tensor | None = None   # embed_skip: the embedding (B,T,C), which blocks mix back in
    values: torch.Tensor | None = None      # value_embed: (B,T,K,D), which attention adds to its values
    losses: 'RouterLosses | None' = None    # what routers add to the training loss
    first: 'Shelf | None' = None            # RWKV-7: its first layer's values (B,T,C), which later ones read
    relative: torch.Tensor | None = None    # pos=relative: the table of biases (rel_buckets,H)
    memory: torch.Tensor | None = None      # n_encoder: the encoder's output (B,S,C)
    memory_pos: torch.Tensor | None = None  # and its positions (B,S), negative for padding
    tied: nn.ModuleList | tuple = ()        # z layers: the blocks that several of them use

class JointCache:
    """Several caches of one layer, as one."""

    def __init__(self, *parts):
        self.parts = parts      # none where a layer has no mixer
        self.max_tokens = min((part.max_tokens for part in parts), default=math.inf)

    @property
    def empty(self):
        return all(part.empty for part in self.parts)

    def reset(self):
        for part in self.parts:
            part.reset()

    def expand(self, n):
        for part in self.parts:
            part.expand(n)

    def snapshot(self):
        return [part.snapshot() for part in self.parts]

    def restore(self, snapshots):
        for part, snapshot in zip(self.parts, snapshots):
            part.restore(snapshot)

    def nbytes(self):
        return sum(part.nbytes() for part in self.parts)

def kv_cache_bytes(config: 'GPTConfig', seq_len: int, batch_size: int, dtype_bytes: int) -> int:
    """
    Bytes that new_cache(batch_size, seq_len) takes in numbers of dtype_bytes each, allocating nothing; beside
    an encoder with the keys and values of a source of as many tokens. An encoder alone has no cache.
    """
    dtypes = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    if dtype_bytes not in dtypes:
        raise ValueError(f'dtype_bytes={dtype_bytes} must be 1, 2, 4 or 8')
    check_counts(1, seq_len=seq_len, batch_size=batch_size)
    with torch.device('meta'):
        mixers = {letter: MIXERS[letter].build(config, 0) for letter in config.mixers() - {'-'}}
        size = {letter: mixer.new_cache(batch_size, seq_len, dtypes[dtype_bytes], 'meta').nbytes()
                for letter, mixer in mixers.items()}
    total = sum(size.get(letter, 0) for letter, _ in config.plan())
    if config.n_encoder:    # keys and values of the source, and its positions, which are int64
        a_token = 2 * config.n_kv_head * config.head_dim * dtype_bytes + 8
        total += config.n_layer * batch_size * seq_len * a_token
    return total if config.causal else 0

def check_counts(least, **given):
    """ValueError unless each is a whole number of at least `least`."""
    for name, value in given.items():
        if not isinstance(value, numbers.Integral):
            raise ValueError(f'{name}={value} must be a whole number')
        if value < least:
            raise ValueError(f'{name}={value} must be at least {least}')


# ----------------------------------------------------------------------------------------------------------
# Other positions: sinusoidal, ALiBi, relative

class SinusoidalPositions(Positions):
    """Fixed sines and cosines, added to the embedding (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    def __init__(self, c):
        super().__init__(c)
        width = c.embed_width
        self.freq = Frequencies(10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))

    def forward(self, x, pos):
        angle = self.freq.angles(pos)                                           # (...,T,C/2)
        wave = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)      # (...,T,C)
        return x + wave.to(x.dtype)

class AlibiPositions(Positions):
    """A bias on the scores that falls linearly with distance (Press et al. 2022), in ops.attention."""

    @staticmethod
    def slopes(n_head):
        """2^(-8i/n), i = 1..n, for the power of two n <= n_head; then every other slope of 2n heads."""
        n = 2 ** int(math.log2(n_head))
        slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
        return torch.tensor(slopes + [2 ** (-4 * (2 * i + 1) / n) for i in range(n_head - n)])

@flags(pos='relative')
class RelativeFlags:
    """Relative positions"""
    rel_buckets: int = flag(32, least=4)    # distances that have a bias of their own, or share one
    rel_distance: int = 128                 # the distance from which on all share one
    rel_shared: bool = True                 # one table for all layers (T5), or each its own (umT5)

    def rules(c):
        yield 'rel_buckets', c.rel_buckets % 4 == 0, 'be a multiple of 4'
        yield ('rel_distance', c.rel_distance > c.rel_buckets // 2,
               f'be above half of rel_buckets={c.rel_buckets}')
        yield 'attn', c.attn == 'standard', 'be standard when pos=relative'

def relative_table(c):
    return param(c.rel_buckets, c.n_head, init=normal)

class RelativePositions(Positions):
    """
    A learned bias on the scores of each head, by the distance between query and key (Raffel et al. 2019,
    https://arxiv.org/abs/1910.10683), in ops.attention.
    """

    def __init__(self, c):
        super().__init__(c)
        self.table = relative_table(c) if c.rel_shared else None

class RelativeBias(nn.Module):
    """What a layer gives to ops.attention: the table of biases (rel_buckets,H), and rel_distance."""

    def __init__(self, c):
        super().__init__()
        self.table, self.distance = None if c.rel_shared else relative_table(c), c.rel_distance

    def forward(self, ctx):
        return ctx.given.relative if self.table is None else self.table, self.distance


# ----------------------------------------------------------------------------------------------------------
# RoPE for longer texts than a model was trained on: frequencies for a text of `length` tokens, (D/2,) fp64

def rope_linear(c, length):
    """Position interpolation (Chen et al. 2023): every frequency divided by rope_factor."""
    return rope_plain(c, length) / c.rope_factor

def rope_ntk(c, length, factor=None):
    """NTK-aware (bloc97 2023): a larger base, which interpolates the slow pairs and keeps the fast ones."""
    width = rope_width(c)
    stretch = (factor or c.rope_factor) ** (width / max(1, width - 2))
    return rope_plain(c, length, c.rope_theta * stretch)

def rope_dynamic(c, length):
    """
    NTK-aware with the factor that this length needs, 1 up to rope_context. All keys must rotate at the same
    frequencies, so with a cache `length` is the one that the cache was made for.
    """
    over = max(1.0, length / c.rope_context)
    return rope_ntk(c, length, c.rope_factor * over - (c.rope_factor - 1))

def rope_yarn(c, length):
    """
    YaRN (Peng et al. 2023): interpolates the slow pairs, keeps the fast ones, and has a ramp between them,
    linear in the pair's index as in the released code (in the paper: linear in its turns).
    """
    freq, width = rope_plain(c, length), rope_width(c)

    def pair(turns):  # the pair that makes this number of turns within the trained context
        return width * math.log(c.rope_context / (2 * math.pi * turns)) / (2 * math.log(c.rope_theta))
    low, high = pair(c.rope_beta_fast), pair(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq * (1 - ramp) + freq / c.rope_factor * ramp

def rope_llama3(c, length):
    """Llama 3.1: as YaRN, with a ramp that is linear in the turns a pair makes within the trained context."""
    freq = rope_plain(c, length)
    turns = c.rope_context * freq / (2 * math.pi)
    keep = ((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq)).clamp(0, 1)
    return freq * keep + freq / c.rope_factor * (1 - keep)

def rope_longrope(c, length):
    """LongRoPE (Ding et al. 2024): one tuned divisor per pair, and a second set beyond rope_context."""
    divisors = c.rope_long if length > c.rope_context else c.rope_short
    return rope_plain(c, length) / torch.tensor(divisors, dtype=torch.float64)

def rope_magnitude(c):
    """The factor on cos and sin, which sharpens the scores of longer texts: an attention temperature."""
    if c.rope_attention_factor is not None:
        return c.rope_attention_factor
    if c.rope_scaling == 'longrope':
        return math.sqrt(1 + math.log(c.rope_factor) / math.log(max(2, c.rope_context)))
    # MLA rotates only a part of each key, so there the whole score is scaled instead (DeepSeek V2)
    return yarn_sharpness(c) if c.attn != 'mla' else 1.0

def yarn_sharpness(c):
    """YaRN's factor on queries and on keys."""
    return 0.1 * math.log(c.rope_factor) + 1 if c.rope_scaling == 'yarn' else 1.0

ROPE_SCALING = {
    'none': rope_plain, 'linear': rope_linear, 'ntk': rope_ntk, 'dynamic': rope_dynamic, 'yarn': rope_yarn,
    'llama3': rope_llama3, 'longrope': rope_longrope,
}
# the scalings that need to know the trained context, and those that depend on the length of the text
ROPE_CONTEXT = ('dynamic', 'yarn', 'llama3', 'longrope')
ROPE_BY_LENGTH = ('dynamic', 'longrope')

@flags(pos='rope', layer_pattern='awchz')
class RopeScalingFlags:
    """Rotary positions beyond the trained context"""
    rope_scaling: str = flag('none', ROPE_SCALING)              # change of frequencies for longer texts
    rope_factor: float = flag(1.0, least=1, rope_scaling=SET)   # extended context / trained context
    # trained context; None: block_size
    rope_context: int | None = flag(None, like='block_size', rope_scaling=ROPE_CONTEXT)
    rope_beta_fast: float = flag(32.0, rope_scaling='yarn')     # pairs with more turns than this are kept
    rope_beta_slow: float = flag(1.0, rope_scaling='yarn')      # pairs with fewer turns are interpolated
    rope_truncate: bool = flag(True, rope_scaling='yarn')       # round the ends of the ramp to whole pairs
    # factor on cos and sin; None: as in the paper
    rope_attention_factor: float | None = flag(None, rope_scaling=('yarn', 'longrope'))
    rope_low_freq: float = flag(1.0, rope_scaling='llama3')     # pairs with fewer turns are interpolated
    rope_high_freq: float = flag(4.0, rope_scaling='llama3')    # pairs with more turns than this are kept
    rope_short: tuple | None = flag(None, rope_scaling='longrope')  # divisor of each pair up to rope_context
    rope_long: tuple | None = flag(None, rope_scaling='longrope')   # divisor of each pair beyond rope_context

    def rules(c):
        yield ('rope_factor', c.rope_scaling in ('none', *ROPE_BY_LENGTH) or c.rope_factor > 1,
               'be above 1 when rope_scaling is set')
        yield 'rope_beta_fast', c.rope_beta_fast >= c.rope_beta_slow, f'be at least {c.rope_beta_slow}'
        yield 'rope_high_freq', c.rope_high_freq > c.rope_low_freq, f'be above {c.rope_low_freq}'
        for name in ('rope_short', 'rope_long') if c.rope_scaling == 'longrope' else ():
            pairs = rope_width(c) // 2
            yield (name, len(getattr(c, name) or ()) == pairs,
                   f'hold {pairs} numbers, one for each pair, when rope_scaling=longrope')
        if c.rope_local_theta is not None and not c.mixers() & set('achz'):
            alone = "when every layer that rotates is a 'w', at rope_local_theta"
            yield 'rope_theta', c.rope_theta == RopeFlags.rope_theta, f'be {RopeFlags.rope_theta} {alone}'
            yield 'rope_scaling', c.rope_scaling == 'none', f'be none {alone}'


# ----------------------------------------------------------------------------------------------------------
# What single families add to attention

class OutputGate(Linear):
    """The output of attention times sigmoid(gate(x)) (Qiu et al. 2025, https://arxiv.org/abs/2505.06708)."""

    def __init__(self, c, heads, width):
        super().__init__(c.n_embd, heads * width, c.qkv_bias)

    def forward(self, y, x):
        """y (B,T,H,D), and x (B,T,C) that attention read -> (B,T,H,D)"""
        return y * torch.sigmoid(super().forward(x)).unflatten(-1, (y.shape[2], -1))

def ungated(y, x):
    return y

# the gate on the output of so many heads of this width
ATTN_GATE = {
    'none': lambda c, heads, width: ungated,
    'head': lambda c, heads, width: OutputGate(c, heads, 1),
    'channel': OutputGate,
}

@flags(layer_pattern='awcnvhz')
class AttentionExtraFlags:
    """Additions to attention"""
    softcap: float | None = None        # caps the scores smoothly: cap * tanh(score / cap) (Gemma 2)
    sinks: bool = False                 # attention sink: a learned score per head (gpt-oss)
    qkv_clip: float | None = None       # clamps q, k and v to at most this size (MPT)
    temp_scale: float | None = flag(None, layer_pattern='nv')   # queries grow with log position (Llama 4)
    temp_floor: int = flag(8192, temp_scale=SET)    # tokens per step of the growth by temp_scale
    value_embed: bool = False           # adds a second token embedding, times a learned scalar, to the values
    attn_gate: str = flag('none', ATTN_GATE)    # sigmoid gate on the output: none, head, channel (Qwen3-Next)
    diff_gain: bool = flag(True, attn='diff')   # weights of the norm on a pair's output (DiffLlama: none)

    def rules(c):
        for name, default in (('value_embed', False), ('qkv_clip', None), ('temp_scale', None)):
            yield name, c.attn != 'mla' or getattr(c, name) == default, f'be {default} when attn=mla'
        yield 'value_embed', c.attn != 'diff' or not c.value_embed, 'be False when attn=diff'
        for name in ('n_head', 'n_kv_head') if c.attn == 'diff' else ():
            yield name, getattr(c, name) % 2 == 0, 'be even when attn=diff, which takes heads in pairs'
        yield ('qk_norm', c.qk_norm not in ('unit', 'after') or c.pos == 'rope',
               f'be True, full, heads, layer or False if pos={c.pos}, as {c.qk_norm} norms what has rotated')

class WidthNorm(RMSNorm):
    """RMS norm over all heads together (OLMo 2). x (B,T,H,D)"""

    def forward(self, x):
        return super().forward(x.flatten(-2)).view(x.shape)

class HeadsNorm(nn.Module):
    """Layer norm of each head, with weights of its own and no bias (Cohere). x (B,T,H,D)"""

    def __init__(self, n_head, c):
        super().__init__()
        self.weight = param(n_head, c.head_dim, init=ones)
        self.eps = c.norm_eps

    def forward(self, x):
        return (F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)

# the norm of the queries or keys of n heads before they rotate
QK_NORM = {
    False: lambda c, n: nn.Identity(),
    True: lambda c, n: RMSNorm(c.head_dim, c),
    'full': lambda c, n: WidthNorm(n * c.head_dim, c),
    'heads': lambda c, n: HeadsNorm(n, c),
    'layer': lambda c, n: LayerNorm(c.head_dim, c),     # with the bias that norm_bias gives it
    'unit': lambda c, n: nn.Identity(),  # after they rotate: unit_norm
    'after': lambda c, n: nn.Identity(),  # after they rotate: norm_after
}

def unit_norm(attention, q, k, v, ctx, eps):
    """RMS norm without a weight, after the rotation (Llama 4)."""
    q, k = (F.rms_norm(x, x.shape[-1:], eps=eps) for x in (q, k))
    return q, k, v

def norm_after(attention, q, k, v, ctx):
    """RMS norm of each head with weights, after the rotation (Hunyuan)."""
    return attention.q_norm_after(q), attention.k_norm_after(k), v

def temperature(attention, q, k, v, ctx, scale, floor):
    """Queries grow by the log of their position, in steps of temp_floor tokens (Llama 4)."""
    steps = ((place_of(ctx).clamp(min=0) + 1) / floor).floor()                      # (T,) or (B,T)
    return q * (1 + scale * torch.log1p(steps)).to(q.dtype).unsqueeze(-1).unsqueeze(-1), k, v

def value_embedding(attention, q, k, v, ctx):
    """The values plus a token embedding of their own, times a learned number (modded-nanogpt)."""
    return q, k, v + (attention.value_scale * ctx.given.values).to(v.dtype)

def attention_extras(attention, c):
    """The functions above that a layer applies, (attention, q, k, v, ctx) -> (q, k, v)."""
    if c.qk_norm == 'unit' and attention.rotary:
        yield partial(unit_norm, eps=c.norm_eps)
    if c.qk_norm == 'after':
        attention.q_norm_after, attention.k_norm_after = (RMSNorm(c.head_dim, c) for _ in 'qk')
        yield norm_after
    if c.temp_scale is not None and not attention.rotary:
        yield partial(temperature, scale=c.temp_scale, floor=c.temp_floor)
    if c.value_embed:
        attention.value_scale = param(1, init=partial(constant, values=0.5))
        yield value_embedding


# ----------------------------------------------------------------------------------------------------------
# Patterns of attention: windows with gaps, strides, global tokens

@flags(layer_pattern='wv')
class PatternFlags:
    """Patterns of attention"""
    window_dilation: int = 1    # a window of every d-th token, d times as long (Longformer)
    # besides the window, every s-th of all other tokens, counted from the query (Sparse Transformer)
    window_stride: int | None = flag(None, least=2)
    # besides the window, the first tokens; not causal, they see all (Longformer; causal: StreamingLLM)
    global_tokens: int = flag(0, least=0)

def no_window(c):
    return {}

def in_window(c):
    return {'window': c.window}

def in_pattern(c):
    """What `window` and its pattern decide about w and v layers: arguments of LayerSpan."""
    d, stride, n_global = c.window_dilation, c.window_stride, c.global_tokens
    reach = d * (c.window - 1) + 1
    if (d, stride, n_global) == (1, None, 0):
        return in_window(c)
    if stride is None:
        return {'window': reach, 'pattern': ops.Pattern(dilation=d, n_global=n_global)}
    return {'pattern': ops.Pattern(reach, d, stride, n_global)}     # a stride reaches all before

def limits(span, ctx):
    """What a layer's span is in this call: arguments of ops.attention and ops.visible."""
    window, chunked, pattern = span.window, span.chunked, span.pattern
    if ctx.reach is not None and ctx.reach < (window or math.inf) and not chunked:
        window = ctx.reach
    if ctx.documents is not None and pattern is not None:
        pattern = pattern._replace(every=ctx.documents.gap)
    return {'window': window, 'chunked': chunked, 'pattern': pattern}

def keys_seen(T, span):
    """How many keys the last of T tokens sees, of those before it where others follow."""
    if span.pattern is None:
        return min(T, span.window or T)
    pos = torch.arange(T, device='cpu')     # a model without weights is counted too
    return int(ops.visible(pos[-1:], pos, span.window, pattern=span.pattern).sum())

def cache_of(span):
    """The class of a cache that holds what a later token may still see."""
    n_global = span.pattern.n_global if span.pattern else 0
    return partial(GlobalCache, n_global) if n_global else TokenCache

class GlobalCache(TokenCache):
    """
    A ring of slots behind those of the first n_global tokens, which nothing pushes out: beyond max_tokens, a
    token sees them and the newest max_tokens.
    """

    def __init__(self, n_global, batch_size, ring, widths, dtype, device, max_tokens=math.inf, spare=0):
        super().__init__(batch_size, n_global + ring, widths, dtype, device, max_tokens, spare)
        self.n_global, self.ring = n_global, ring
        self.max_chunk = max_tokens if ring >= max_tokens else 1 + spare

    def slot(self, pos):
        """Padding takes the slots of the ring in front of the first token after the global ones."""
        turns = torch.where(pos < 0, pos, pos - self.n_global) % self.ring
        return torch.where((pos >= 0) & (pos < self.n_global), pos, self.n_global + turns)

    def update(self, pos, *new, beyond=False):
        seen = super().update(pos, *new, beyond=beyond)
        if new[0].shape[1] > self.ring:  # the ring took the newest alone
            self.hold(pos.expand(new[0].shape[:2]), new)
        return seen

    def hold(self, pos_BT, new):
        """Store the global tokens that are among `new`."""
        first = torch.arange(self.n_global, device=pos_BT.device)
        at = first - pos_BT[:, :1]      # (B,n_global): where they stand in new
        here, row = (at >= 0) & (at < pos_BT.shape[1]), torch.arange(len(at), device=at.device).unsqueeze(1)
        for held, n in zip((self.pos, *self.rows), (pos_BT, *new)):
            found = n[row, at.clamp(0, pos_BT.shape[1] - 1)].to(held.dtype)
            mask = here.view(*here.shape, *[1] * (held.dim() - 2))
            held[:, :self.n_global] = torch.where(mask, found, held[:, :self.n_global])


# ----------------------------------------------------------------------------------------------------------
# Differential attention

class DiffAttention(Attention):
    """
    Differential attention (Ye et al. 2024, https://arxiv.org/abs/2410.05258): heads come in pairs that share
    a value of twice the width. The second one's attention map, times lambda, is subtracted from the first's,
    to cancel the noise that both see.
    """
    n_maps = 2

    def __init__(self, c, layer, span):
        super().__init__(c, layer, span)
        # the paper's schedule over depth, from layer 0
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambdas = param(4, c.head_dim, init=partial(normal, std=0.1))  # q1, k1, q2, k2
        without = partial(F.rms_norm, normalized_shape=(2 * c.head_dim,), eps=c.norm_eps)
        self.head_norm = RMSNorm(2 * c.head_dim, c) if c.diff_gain else without

    def attend(self, q, k, v, ctx, key_pos):
        """q (B,T,H,D), k and v (B,S,K,D) -> (B,T,H/2,2D)"""
        v = v.unflatten(2, (-1, 2)).flatten(-2)                                     # (B,S,K/2,2D)
        first, second = (self.scores(q[:, :, i::2], k[:, :, i::2], v, ctx, key_pos) for i in (0, 1))
        return self.head_norm(first - self.lambda_().to(first.dtype) * second) * (1 - self.lambda_init)

    def lambda_(self):
        q1, k1, q2, k2 = ops.at_least_fp32(self.lambdas)
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.lambda_init


# ----------------------------------------------------------------------------------------------------------
# Latent attention

@flags(attn='mla')
class LatentFlags:
    """Latent attention"""
    kv_rank: int | None = None          # width of the cached latent; None: n_embd / 4
    q_rank: int | None = None           # width of the queries' latent; None: queries are not compressed
    rope_head_dim: int | None = None    # width of the rotated key that all heads share; None: head_dim / 2
    v_head_dim: int | None = flag(None, like='head_dim')    # width of a value head; None: head_dim
    latent_eps: float | None = flag(None, like='norm_eps')  # epsilon of the latents' norms; None: norm_eps

    def fill(c):
        return {'kv_rank': max(1, c.n_embd // 4), 'rope_head_dim': max(1, c.head_dim // 2)}

    def rules(c):
        yield 'pos', c.pos in ('rope', 'none'), 'be rope or none when attn=mla'
        yield 'qk_norm', not c.qk_norm, 'be False when attn=mla'
        yield 'rope_fraction', c.rope_fraction == 1, 'be 1.0 when attn=mla'
        yield 'n_kv_head', c.n_kv_head == c.n_head, 'be left out when attn=mla, which caches no heads'

# x ---kv_down---> latent (R) ---kv_up---> keys (H,Dn) and values (H,Dv) of all heads
#  \------------> rotated key (Dr), one for all heads           The cache holds latent and rotated key.
#  \---q_down, q_up------------------------> queries (H,Dn+Dr)

class MLA(CachedAttention):
    """
    Multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434): the keys and values of all
    heads are expanded from one latent per token, which the cache holds beside one rotated key.

    Training and the first prefill expand the latent. Calls that read the cache absorb the expansion into
    query and output instead, q . (W_k latent) = (W_k^T q) . latent, so that all heads read one key of R + Dr
    coordinates, as in MQA; its first R are the value as well.
    """

    def __init__(self, c, layer, span):
        super().__init__(c, span)
        self.n_head, width = c.n_head, c.head_dim + c.rope_head_dim
        self.q_widths = c.head_dim, c.rope_head_dim         # Dn coordinates that do not rotate, Dr that do
        self.shared_widths = c.kv_rank, c.rope_head_dim     # R of the latent, Dr of the rotated key
        self.kv_widths = c.head_dim, c.v_head_dim           # Dn and Dv of a head, expanded from the latent
        self.cached = [(sum(self.shared_widths),)]
        self.products = c.n_head * (width + c.v_head_dim)   # per key: the scores, the weighted sum
        self.q_down = Linear(c.n_embd, c.q_rank, c.qkv_bias) if c.q_rank else nn.Identity()
        self.q_norm = RMSNorm(c.q_rank, c, c.latent_eps) if c.q_rank else nn.Identity()
        self.q_up = Linear(c.q_rank or c.n_embd, c.n_head * width, bias=False)
        self.kv_down = Linear(c.n_embd, c.kv_rank + c.rope_head_dim, c.qkv_bias)  # latent and rotated key
        self.kv_norm = RMSNorm(c.kv_rank, c, c.latent_eps)
        self.kv_up = Linear(c.kv_rank, c.n_head * (c.head_dim + c.v_head_dim), bias=False)
        self.c_proj = out_proj(c, c.n_head * c.v_head_dim, c.proj_bias)
        self.gate = ATTN_GATE[c.attn_gate](c, c.n_head, c.v_head_dim)
        scale = c.attn_scale or width ** -0.5
        if c.rope_attention_factor is None and c.attn_scale is None:
            scale *= yarn_sharpness(c) ** 2     # elsewhere a factor on q and on k: rope_magnitude
        self.scores = SoftmaxAttention(c, c.n_head, scale, span)

    def forward(self, x, ctx, cache=None):
        # 1. queries, through a latent of their own where q_rank is set
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.n_head, -1))
        q, q_rot = q.split(self.q_widths, dim=-1)                                   # (B,T,H,Dn|Dr)
        # 2. one latent and one rotated key, from which the keys and values of all heads are made
        latent, k_rot = self.kv_down(x).split(self.shared_widths, dim=-1)           # (B,T,R|Dr)
        if self.rotary:
            q_rot, k_rot = (ops.rope(t, *ctx.rope[self.local]) for t in (q_rot, k_rot.unsqueeze(2)))
        shared = torch.cat((self.kv_norm(latent), k_rot.flatten(2)), dim=-1)        # (B,T,R+Dr)
        # 3. past tokens
        key_pos = ctx.pos
        if cache is not None:
            key_pos, (shared,) = cache.update(ctx.pos, shared, beyond=ctx.reach is not None)    # (B,S,R+Dr)
        # 4. attend, and project back; on a first call, update returned the new rows themselves
        attend = self.expanded if cache is None or ctx.in_order else self.absorbed
        return self.c_proj(self.gate(attend(q, q_rot, shared, ctx, key_pos), x).flatten(2))

    def expanded(self, q, q_rot, shared, ctx, key_pos):
        """q (B,T,H,Dn), q_rot (B,T,H,Dr), shared (B,S,R+Dr) -> (B,T,H,Dv)"""
        latent, k_rot = shared.split(self.shared_widths, dim=-1)
        kv = self.kv_up(latent).unflatten(-1, (self.n_head, -1))
        k, v = kv.split(self.kv_widths, dim=-1)                                     # (B,S,H,Dn|Dv)
        k = torch.cat((k, k_rot.unsqueeze(2).expand(-1, -1, self.n_head, -1)), dim=-1)
        return self.scores(torch.cat((q, q_rot), dim=-1), k, v, ctx, key_pos)

    def absorbed(self, q, q_rot, shared, ctx, key_pos):
        """The same from the cached latents alone: one key for all heads, whose first part is the value."""
        rank = self.shared_widths[0]
        up_k, up_v = self.kv_up.weight.view(self.n_head, -1, rank).split(self.kv_widths, dim=1)  # (H,Dn|Dv,R)
        q = torch.cat((torch.einsum('bthd,hdr->bthr', q, up_k), q_rot), dim=-1)     # (B,T,H,R+Dr)
        key = shared.unsqueeze(2)                                                   # (B,S,1,R+Dr)
        y = self.scores(q, key, key[..., :rank], ctx, key_pos)                      # (B,T,H,R)
        return torch.einsum('bthr,hdr->bthd', y, up_v)


# ----------------------------------------------------------------------------------------------------------
# Gated attention unit

@flags(attn='gau')
class GAUFlags:
    """Gated attention unit"""
    gau_width: int | None = None    # width of the values and of their gate; None: 2 n_embd

    def fill(c):
        return {'gau_width': 2 * c.n_embd}

    def rules(c):
        yield ('pos', c.pos == 'rope' and not c.mixers() & set('nv'),
               "be rope, in every layer, when attn=gau, whose bias is a product of rotated vectors")
        others = dict(n_kv_head=c.n_head, qk_norm=False, softcap=None, sinks=False, qkv_clip=None,
                      temp_scale=None, value_embed=False, attn_gate='none')
        for name, value in others.items():
            yield name, getattr(c, name) == value, f'be {value} when attn=gau: one head, no softmax'

# x --in_proj, silu--> gate (I) ------------------------------------> * ---c_proj--->
#                 \--> values (I) --weights (T,S) = relu(q k^T + b)^2--/
#                  \-> z (D) --two gains and offsets--> q, k           The cache holds values, k, b's half.

class GatedUnit(CachedAttention):
    """
    Gated attention unit (Hua et al. 2022, https://arxiv.org/abs/2202.10447): one head of head_dim coordinates
    with the squares of positive scores in place of a softmax, whose values are as wide as the hidden layer of
    a feed-forward, and gated like one. It is both branches of a block: ffn_pattern='-'.

    The paper divides scores by the length of the text. Here that is block_size whatever the length, unless
    attn_scale is set, so that the tokens before one decide all about it.
    """

    def __init__(self, c, layer, span):
        super().__init__(c, span)
        D, width = c.head_dim, c.gau_width
        self.widths, self.causal = (width, width, D), c.causal
        self.cached, self.products = [(2 * D,), (width,)], 2 * D + width
        self.in_proj = Linear(c.n_embd, sum(self.widths), c.qkv_bias)       # gate, values, z
        # Of queries and of keys: what multiplies z, what is added, and the vectors of which b is the product.
        # The paper draws the first and the last from N(0, 0.02^2), which leaves half of all distances, and
        # some layers altogether, without weight or gradient. Here b begins as about the mean of the tokens
        # seen, the nearest of them first, and the scores have its size.
        level = (D * c.block_size ** 0.5) ** -0.5
        self.gain, self.offset, self.distance = (
            param(2, D, init=init) for init in (ones, zeros, partial(constant, values=level)))
        self.c_proj = out_proj(c, width, c.proj_bias)
        self.scale, self.dropout = c.attn_scale or 1 / c.block_size, c.dropout

    def forward(self, x, ctx, cache=None):
        # 1. gate, values, and one projection for queries and keys
        gate, v, z = F.silu(self.in_proj(x)).split(self.widths, dim=-1)             # (B,T,I|I|D)
        q, k = (z.unsqueeze(-2) * self.gain + self.offset).unbind(-2)               # (B,T,D)
        # 2. scores and bias are one product of twice the width, whose halves rotate as two heads
        q_bias, k_bias = (half.expand_as(q).to(q.dtype) for half in self.distance)
        q, k = torch.stack((q * self.scale, q_bias), dim=2), torch.stack((k, k_bias), dim=2)    # (B,T,2,D)
        q, k = (t.flatten(2) for t in ops.rope_qk(q, k, *ctx.rope[self.local]))
        # 3. past tokens
        key_pos = ctx.pos
        if cache is not None:
            key_pos, (k, v) = cache.update(ctx.pos, k, v, beyond=ctx.reach is not None)     # (B,S,2D|I)
        # 4. weights, the weighted sum, and only then the gate
        weights = relu2(q.to(k.dtype) @ k.mT).masked_fill(~self.seen(ctx, key_pos), 0)      # (B,T,S)
        return self.c_proj(gate * (F.dropout(weights, self.dropout, self.training) @ v))

    def seen(self, ctx, key_pos):
        """(1 or B,T,S)"""
        return ops.visible(ctx.pos, key_pos, causal=self.causal, **limits(self.span, ctx)).squeeze(1)


# ----------------------------------------------------------------------------------------------------------
# State spaces: Mamba and Mamba-2

class StateCache:
    """
    What one recurrent layer remembers of past tokens, of one size however long the text: the last inputs of
    its convolution or token shift, and its state, in fp32 or fp64 as bf16 would lose small late terms of the
    sum. Mamba: (B,I,N), Mamba-2: (B,H,P,N), recurrences: as each says in cache_shapes.
    """
    max_tokens = math.inf   # no limit

    def __init__(self, batch_size, tail, state, dtype, device):
        state_dtype = torch.promote_types(dtype, torch.float32)
        self.tail = torch.zeros(batch_size, *tail, dtype=dtype, device=device)          # (B,W-1,I)
        self.state = torch.zeros(batch_size, *state, dtype=state_dtype, device=device)
        self.empty = True

    def read(self):
        """(tail, state), both None before the first token, so that a prompt takes the path of training."""
        return (None, None) if self.empty else (self.tail, self.state)

    def write(self, tail, state):
        self.tail.copy_(tail.detach())
        self.state.copy_(state.detach())
        self.empty = False

    def reset(self):
        """Forget everything, keep the memory."""
        self.tail.zero_()
        self.state.zero_()
        self.empty = True

    def expand(self, n):
        """Repeat every sequence n times, next to each other: one prompt, n continuations."""
        self.tail, self.state = self.tail.repeat_interleave(n, 0), self.state.repeat_interleave(n, 0)

    def snapshot(self):
        """What `restore` needs to roll back the tokens that follow."""
        return self.tail.clone(), self.state.clone()

    def restore(self, snapshot):
        self.write(*snapshot)

    def nbytes(self):
        """Bytes allocated."""
        return self.tail.nbytes + self.state.nbytes

def close_gap(tail, x, pos):
    """
    Moves the tail (B,W-1,I) of past inputs up to the first token of x (B,T,I), where x begins with padding.
    Padding alone then reads what stands before the tail. Returns both.
    """
    both, sizes = torch.cat((tail, x), dim=1), (tail.shape[1], x.shape[1])
    if x.shape[1] == 1:  # one new token: the same in a third of the operations
        moved = torch.where((pos < 0).unsqueeze(-1), torch.cat((both[:, :1], tail), dim=1), both)
        return moved.split(sizes, dim=1)
    pad, slot = (pos < 0).sum(-1).view(-1, 1), torch.arange(sum(sizes), device=x.device)
    source = torch.where(slot < pad + sizes[0], slot - pad, slot).clamp(min=0)      # (1 or B,W-1+T)
    return both.gather(1, source.unsqueeze(-1).expand_as(both)).split(sizes, dim=1)

def may_be_padded(ctx):
    return not ctx.in_order and ctx.documents is None

def no_padding(ctx, *tensors):
    """The tensors (B,T,...), with zeros where a token is padding, so that a state stays as it is."""
    if not may_be_padded(ctx):
        return tensors
    return [x.masked_fill((ctx.pos < 0).view(-1, x.shape[1], *[1] * (x.dim() - 2)), 0) for x in tensors]

def step_size(dt, ctx, limits=(0.0, None)):
    """softplus of dt (B,T,...), in fp32. Padding gets a step of 0, which leaves the state unchanged."""
    dt = F.softplus(ops.at_least_fp32(dt)).clamp(*limits)
    return dt.masked_fill((ctx.pos < 0).unsqueeze(-1), 0) if may_be_padded(ctx) else dt

def step_bias(shape, generator):
    """softplus(bias) is log-uniform in [0.001, 0.1] (Gu and Dao 2023, section 3.6)."""
    dt = 1e-3 * 100 ** torch.rand(shape, generator=generator)
    return dt + torch.log(-torch.expm1(-dt))

class CausalConv(nn.Module):
    """Mixes each channel over the last W tokens, then an activation."""

    def __init__(self, channels, taps, bias, act=F.silu):
        super().__init__()
        # nn.Conv1d's own: a std of 0.02 would all but silence the channels
        init = partial(uniform, bound=taps ** -0.5)
        self.weight = param(channels, taps, init=init)
        self.bias = param(channels, init=init) if bias else None
        self.act = act

    def forward(self, x, ctx, tail):
        """x (B,T,I), tail (B,W-1,I) or None -> (B,T,I) and the new tail"""
        if ctx.documents is not None:
            return self.act(ops.conv_within(x, self.weight, self.bias, ctx.documents.place)), None
        if not ctx.in_order:
            if tail is None:
                tail = x.new_zeros(x.shape[0], self.weight.shape[1] - 1, x.shape[2])
            tail, x = close_gap(tail, x, ctx.pos)
        y, tail = ops.causal_conv(x, self.weight, self.bias, tail)
        return self.act(y), tail

class StepProjection(Linear):
    """Mamba's projection of ssm_dt_rank numbers per token to a step size dt per channel."""

    def __init__(self, rank, channels):
        super().__init__(rank, channels, bias=True)
        self.weight.init = partial(uniform, bound=rank ** -0.5)
        self.bias.init = step_bias

    def forward(self, x):
        # the bias is as low as -7, where bf16 has steps of 3 %, so it is added in fp32
        return ops.at_least_fp32(F.linear(x, self.weight)) + ops.at_least_fp32(self.bias)

def ssm_inner(c):
    """The inner width of Mamba and Mamba-2."""
    return c.ssm_width or c.ssm_expand * c.n_embd

def s4d_real(shape, generator):
    """The log of the decay rates 1..N of every channel (S4D-Real)."""
    return torch.arange(1.0, shape[1] + 1).log().expand(shape)

class StateSpace(nn.Module):
    """
    What mixers with a state share, from Mamba to RWKV. They set cache_shapes, of the tail of past inputs and
    of the state, `work`, and conv1d, None where there is no convolution.
    """

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        return StateCache(batch_size, *self.cache_shapes, dtype, device)

    def flops(self, T):
        """As for attention: `work` operations per number of the state, and 2 per tap of the convolution."""
        taps = 0 if self.conv1d is None else self.conv1d.weight.numel()
        return 3 * (self.work * math.prod(self.cache_shapes[1]) + 2 * taps)

class PlainRMSNorm(nn.Module):
    """RMS norm without weights."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

class Mamba1(StateSpace):
    """
    Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752): convolution, selective scan, gate. Each channel
    has a state of N numbers that decay at N rates; the step dt, B (input) and C (output) depend on the token.
    """
    default_state = 16
    work = 6    # operations per number of state: dt A, decay, B x, add, C h, add

    def __init__(self, c):
        super().__init__()
        inner, N, rank = ssm_inner(c), c.ssm_state, c.ssm_dt_rank
        self.widths, self.cache_shapes = (rank, N, N), ((c.ssm_conv - 1, inner), (inner, N))
        self.in_proj = Linear(c.n_embd, 2 * inner, c.ssm_bias)      # the input and its gate, side by side
        self.conv1d = CausalConv(inner, c.ssm_conv, c.conv_bias)
        self.x_proj = Linear(inner, sum(self.widths), bias=False)    # dt, B and C
        self.dt_proj = StepProjection(rank, inner)
        self.A_log = param(inner, N, init=s4d_real)
        self.D = param(inner, init=ones)                            # skip connection
        self.c_proj = out_proj(c, inner, c.ssm_bias)
        # Jamba (Lieber et al. 2024, https://arxiv.org/abs/2403.19887) keeps large models stable with these
        self.dt_norm, self.b_norm, self.c_norm = (SSM_NORM[c.ssm_norm](size, c) for size in self.widths)

    def forward(self, x, ctx, cache=None):
        tail, state = (None, None) if cache is None else cache.read()
        x, gate = self.in_proj(x).chunk(2, dim=-1)                  # (B,T,I)
        x, tail = self.conv1d(x, ctx, tail)
        dt, B, C = self.x_proj(x).split(self.widths, dim=-1)         # (B,T,R|N|N)
        dt = step_size(self.dt_proj(self.dt_norm(dt)), ctx)         # (B,T,I)
        A = -torch.exp(ops.at_least_fp32(self.A_log))
        fresh, dt = forget_by_step(ctx, x, dt, -A.amax(-1))
        y, state = ops.selective_scan(fresh, dt, A, self.b_norm(B), self.c_norm(C), self.D, state)
        y = y if fresh is x else (y + self.D * (x - fresh)).to(x.dtype)
        if cache is not None:
            cache.write(tail, state)
        return self.c_proj(y * F.silu(gate))

SSM_NORM = {False: lambda size, c: nn.Identity(), True: lambda size, c: RMSNorm(size, c, c.ssm_eps),
            'plain': lambda size, c: PlainRMSNorm(c.ssm_eps)}

class GatedRMSNorm(RMSNorm):
    """Gate, then RMS-normalise each group separately (so that groups can be sharded)."""

    def __init__(self, width, groups, c):
        super().__init__(width, c, c.ssm_eps)
        self.groups = groups

    def forward(self, x, gate):
        x = (x * F.silu(gate)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight

def mamba2_decay(shape, generator):
    """The log of decay rates drawn from 1 to 16."""
    return torch.log(1 + 15 * torch.rand(shape, generator=generator))

class Mamba2(StateSpace):
    """
    Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060): the P channels of a head share one decay,
    which turns the scan into matrix products (kernels/ssd.py) and affords a larger N. B and C are projected
    beside x, and pass the convolution with it; the heads of a group share them, as queries share keys in GQA.
    """
    default_state = 128
    work = 5    # operations per number of state: decay, B x, add, C h, add

    def __init__(self, c):
        super().__init__()
        inner, N, G, P = ssm_inner(c), c.ssm_state, c.ssm_groups, c.ssm_head_dim
        heads = inner // P
        self.state_shape, self.groups, self.limits = (heads, P, N), G, (c.ssm_dt_min, c.ssm_dt_max)
        self.widths = (inner, G * N, G * N)
        self.cache_shapes = (c.ssm_conv - 1, sum(self.widths)), self.state_shape
        self.in_proj = Linear(c.n_embd, inner + sum(self.widths) + heads, c.ssm_bias)    # gate, (x, B, C), dt
        self.conv1d = CausalConv(sum(self.widths), c.ssm_conv, c.conv_bias)
        self.dt_bias = param(heads, init=step_bias)
        self.A_log = param(heads, init=mamba2_decay)
        self.D = param(heads, init=ones)
        self.norm = GatedRMSNorm(inner, G, c) if c.ssm_gate_norm else None
        self.c_proj = out_proj(c, inner, c.ssm_bias)

    def forward(self, x, ctx, cache=None):
        (H, P, N), G = self.state_shape, self.groups
        tail, state = (None, None) if cache is None else cache.read()
        gate, x, dt = self.in_proj(x).split((H * P, sum(self.widths), H), dim=-1)    # (B,T,I|I+2GN|H)
        x, tail = self.conv1d(x, ctx, tail)
        x, B, C = x.split(self.widths, dim=-1)                                       # (B,T,I|GN|GN)
        dt = step_size(ops.at_least_fp32(dt) + ops.at_least_fp32(self.dt_bias), ctx, self.limits)   # (B,T,H)
        A = -torch.exp(ops.at_least_fp32(self.A_log))
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        fresh, dt = forget_by_step(ctx, x, dt, -A)
        y, state = ops.ssd(fresh, dt, A, B, C, self.D, state)                       # (B,T,H,P)
        y = y if fresh is x else (y + self.D.unsqueeze(-1) * (x - fresh)).to(x.dtype)
        if cache is not None:
            cache.write(tail, state)
        y = y.flatten(2)
        return self.c_proj(y * F.silu(gate) if self.norm is None else self.norm(y, gate))

SSM = {'mamba1': Mamba1, 'mamba2': Mamba2}

@flags(layer_pattern='mhz')
class SSMFlags:
    """State spaces"""
    ssm: str = flag('mamba2', SSM)                          # mamba1 (selective scan), mamba2 (SSD)
    ssm_state: int | None = None                            # state per channel; None: mamba1 16, mamba2 128
    ssm_width: int | None = None                            # inner width; None: ssm_expand * n_embd
    ssm_expand: int = flag(2, ssm_width=None)               # inner width over n_embd
    ssm_conv: int = 4                                       # taps of the causal convolution
    ssm_head_dim: int = flag(64, ssm='mamba2')              # channels of a head, which share one decay
    ssm_groups: int = flag(1, ssm='mamba2')                 # groups of heads that share B and C
    ssm_dt_min: float = flag(0.0, least=0, ssm='mamba2')    # smallest step size
    ssm_dt_max: float | None = flag(None, ssm='mamba2')     # largest step size; None: no limit
    ssm_dt_rank: int | None = flag(None, ssm='mamba1')      # rank of the projection to dt; None: n_embd / 16
    # RMS norms on the step size, B and C: True (Jamba), plain (without weights: Falcon Mamba)
    ssm_norm: bool | str = flag(False, SSM_NORM, ssm='mamba1')
    ssm_gate_norm: bool = flag(True, ssm='mamba2')          # RMS norm of the gated output (Falcon-H1: none)
    ssm_eps: float | None = flag(None, like='norm_eps')     # of these norms; None: norm_eps
    ssm_bias: bool | None = flag(None, like='bias')         # bias of its two projections; None: as bias
    conv_bias: bool = True                                  # bias of the convolution (not governed by bias)

    def fill(c):
        rank = {'ssm_dt_rank': math.ceil(c.n_embd / 16)} if c.ssm == 'mamba1' else {}
        return rank | {'ssm_state': SSM[c.ssm].default_state}

    def rules(c):
        if c.ssm == 'mamba2':
            heads, odd = divmod(ssm_inner(c), c.ssm_head_dim)
            yield 'ssm_head_dim', odd == 0, f'divide the inner width {ssm_inner(c)}'
            yield 'ssm_groups', heads % c.ssm_groups == 0, f'divide the {heads} heads of the state space'
            yield ('ssm_dt_max', c.ssm_dt_max is None or c.ssm_dt_max > c.ssm_dt_min,
                   f'be above ssm_dt_min={c.ssm_dt_min}')


# ----------------------------------------------------------------------------------------------------------
# Short convolutions, and layers of several mixers or of none

@flags(layer_pattern='s')
class ShortConvFlags:
    """Short convolutions"""
    short_conv: int = 3                                 # taps
    short_bias: bool | None = flag(None, like='bias')   # bias of convolution and projections; None: as bias

class ShortConv(StateSpace):
    """C conv(B x), with gates B and C made of the token as x is (LFM2: https://arxiv.org/abs/2511.23404)."""
    work = 0

    def __init__(self, c, layer):
        super().__init__()
        self.cache_shapes = (c.short_conv - 1, c.n_embd), (0,)
        self.in_proj = Linear(c.n_embd, 3 * c.n_embd, c.short_bias)     # B, C and x, side by side
        self.conv1d = CausalConv(c.n_embd, c.short_conv, c.short_bias, nn.Identity())
        self.c_proj = out_proj(c, c.n_embd, c.short_bias)

    def forward(self, x, ctx, cache=None):
        tail = None if cache is None else cache.read()[0]
        B, C, x = self.in_proj(x).chunk(3, dim=-1)                  # (B,T,C) each
        y, tail = self.conv1d(B * x, ctx, tail)
        if cache is not None:
            cache.write(tail, x[:, 0, :0])
        return self.c_proj(C * y)

class ParallelMixers(nn.Module):
    """
    Attention and a state space read the same norm, and their outputs are added (Falcon-H1: Zuo et al. 2025,
    https://arxiv.org/abs/2507.22448).
    """

    def __init__(self, c, layer):
        super().__init__()
        self.attn, self.ssm = MIXERS['a'].build(c, layer), MIXERS['m'].build(c, layer)

    def forward(self, x, ctx, cache=None):
        past, state = (None, None) if cache is None else cache.parts
        return self.attn(x, ctx, past) + self.ssm(x, ctx, state)

    def new_cache(self, *sizes):
        return JointCache(self.attn.new_cache(*sizes), self.ssm.new_cache(*sizes))

    def flops(self, T):
        return self.attn.flops(T) + self.ssm.flops(T)

@flags(layer_pattern='-')
class LayerFlags:
    """Layers without a mixer (Nemotron-H: https://arxiv.org/abs/2504.03624)"""

    def rules(c):
        yield 'layer_pattern', c.mixers() != {'-'}, "have a letter beside '-', or no token would see another"
        yield ('ffn_pattern', ('-', '-') not in c.plan(),
               "have no '-' in a layer whose letter in layer_pattern is '-' too, which would be empty")
        yield ('residual', c.residual == 'serial',
               "be serial when layer_pattern has a '-', as nothing is beside the feed-forward")
        yield ('first_norm', c.first_norm or c.layer_pattern[0] != '-',
               "be True when layer_pattern begins with '-'")

#   t = W block(x, embedding)       the blocks are few, and z layers use them in turn
#   x = x + m(norm(x + t))          W, norm and m are each layer's own

@flags(layer_pattern='z')
class TiedFlags:
    """Blocks that several layers share (Zamba 2)"""
    tied_blocks: int = 1                # blocks that the z layers use in turn
    tied_width: int | None = None       # hidden width of their feed-forward; None: 4 n_embd
    tied_rank: int | None = None        # rank of what each layer adds to that feed-forward; None: nothing

    def fill(c):
        return {'tied_width': 4 * c.n_embd}

    def rules(c):
        yield ('tied_blocks', c.tied_blocks <= sum(mixer == 'z' for mixer, _ in c.plan()),
               "be at most the number of layers whose letter is 'z'")
        yield 'attn', c.attn == 'standard', "be standard when layer_pattern has a 'z'"
        yield 'attn_gate', c.attn_gate == 'none', "be none when layer_pattern has a 'z'"
        yield 'norm_at', c.norm_at == 'pre', "be pre when layer_pattern has a 'z'"
        yield 'residual', c.residual == 'serial', "be serial when layer_pattern has a 'z'"

class TiedBlock(nn.Module):
    """
    Attention, then a feed-forward, on the stream beside the embedding. Nothing is added to what they read
    (Zamba 2: Glorioso et al. 2024, https://arxiv.org/abs/2411.15242).
    """

    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = norm_if(True, c, 2 * c.n_embd), norm_if(True, c)
        self.attn = Attention(c, 0, LayerSpan())
        self.attn.c_attn = Linear(2 * c.n_embd, sum(self.attn.heads) * c.head_dim, c.qkv_bias)
        self.ffn = GatedMLP(c, gated_by(F.gelu), c.tied_width)
        # neither writes to the stream; one behind the other, both would stay at the zeros of zero_init
        self.attn.c_proj = Linear(c.n_head * c.head_dim, c.n_embd, c.proj_bias)
        self.ffn.c_proj = Linear(c.tied_width, c.n_embd, c.ffn_bias)

    def forward(self, x, ctx, cache, more):
        x = self.attn(self.ln_1(torch.cat((x, ctx.given.embedding), dim=-1)), ctx, cache)
        x = self.ln_2(x)
        hidden = self.ffn.c_fc(x)                                               # (B,T,2I)
        return self.ffn.c_proj(self.ffn.act(hidden if more is None else hidden + more(x)))

class TiedMixer(nn.Module):
    """A state space on the norm of the stream and of what a block made of it, which other layers use too."""

    def __init__(self, c, layer):
        super().__init__()
        use = (c.layer_pattern * (layer + 1))[:layer].count('z')
        self.number, self.again = use % c.tied_blocks, use >= c.tied_blocks
        self.cached, C = [(c.n_kv_head, c.head_dim)] * 2, c.n_embd
        self.more = low_rank(c, 2 * c.tied_width, c.tied_rank) if c.tied_rank else None
        self.c_proj, self.norm = Linear(C, C, bias=False), norm_if(True, c)
        self.ssm = MIXERS['m'].build(c, layer)
        self.products = 2 * c.n_head * c.head_dim
        self.weights = C * (3 * c.n_head + 4 * c.n_kv_head) * c.head_dim + 3 * C * c.tied_width

    def forward(self, x, ctx, cache=None):
        past, state = (None, None) if cache is None else cache.parts
        t = self.c_proj(ctx.given.tied[self.number](x, ctx, past, self.more))
        return self.ssm(self.norm(x + t), ctx, state)

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        past = TokenCache(batch_size, max_tokens, self.cached, dtype, device, max_tokens, spare)
        return JointCache(past, self.ssm.new_cache(batch_size, max_tokens, dtype, device, spare))

    def flops(self, T):
        """The block's weights are counted once already, for the first layer that uses it."""
        return 6 * self.products * T + self.ssm.flops(T) + 6 * self.weights * self.again


# ----------------------------------------------------------------------------------------------------------
# Recurrences: linear attention, RetNet, GLA, DeltaNet, gated DeltaNet, KDA, Lightning attention, mLSTM
#
#   S <- decay S                        a head's state, K keys by V values: forget,
#   S <- S - k (e^T S) + k v^T          erase, write,
#   y  = q^T S                          read
#
# Attention keeps every key and value. A recurrence adds their products up in S, of one size however long the
# text. rnn_decay says what is forgotten, rnn_erase what is taken out before a write, rnn_input how much a
# token weighs; rnn_feature and rnn_unit say what queries and keys are.

def elu1(x):
    """A positive feature, so that q.k is a weight (Katharopoulos et al. 2020)."""
    return F.elu(x) + 1

def unit_length(x):
    return x * torch.rsqrt(ops.at_least_fp32(x).square().sum(-1, keepdim=True) + 1e-6)

def low_rank(c, n_out, rank, bias=False):
    """A projection of the stream, through `rank` numbers or, if that is None, direct."""
    if rank is None:
        return Linear(c.n_embd, n_out, bias)
    return nn.Sequential(Linear(c.n_embd, rank, bias=False), Linear(rank, n_out, bias))

class NoDecay(nn.Module):
    """Log decays of 0. Each class here: x (B,T,C) -> log decays (B,T,H,1) or (B,T,H,K), fp32, at most 0."""

    def __init__(self, c, layer):
        super().__init__()
        self.shape = c.rnn_heads, 1

    def forward(self, x):
        return x.new_zeros(*x.shape[:2], *self.shape, dtype=torch.float32)

class FixedDecay(NoDecay):
    """A rate for each head, the same for every token."""

    def __init__(self, c, layer):
        super().__init__(c, layer)
        rates = torch.tensor(self.rates(c, layer), dtype=torch.float64)
        # as integers, like the bits of Frequencies
        self.register_buffer('bits', rates.float().view(torch.int32), persistent=False)

    def forward(self, x):
        return self.bits.view(torch.float32).view(1, 1, *self.shape).expand(*x.shape[:2], *self.shape)

class RetNetDecay(FixedDecay):
    """log(1 - 2^(-5-h)) for head h (Sun et al. 2023, https://arxiv.org/abs/2307.08621)."""

    @staticmethod
    def rates(c, layer):
        return [math.log1p(-2.0 ** (-5 - h)) for h in range(c.rnn_heads)]

class LightningDecay(FixedDecay):
    """ALiBi's slopes, less of them in later layers (Lightning attention: MiniMax-01, arXiv 2501.08313)."""

    @staticmethod
    def rates(c, layer):
        # further predictions: as the last layer
        less = 1 - min(layer, c.n_layer - 1) / (c.n_layer - 1 + 1e-5) + 1e-5
        return [-2.0 ** (-8 * (h + 1) / c.rnn_heads) * less for h in range(c.rnn_heads)]

class TokenDecay(NoDecay):
    """-exp(A) softplus(f(x) + bias), as in Mamba-2; with rnn_floor: floor * sigmoid(exp(A) (f(x) + bias))."""
    per_key = False

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.shape, self.floor = (c.rnn_heads, c.rnn_key_dim if self.per_key else 1), c.rnn_floor
        self.f = low_rank(c, math.prod(self.shape), c.rnn_decay_rank)
        self.A_log = param(c.rnn_heads, init=mamba2_decay)
        self.dt_bias = param(math.prod(self.shape), init=step_bias)

    def forward(self, x):
        f = (ops.at_least_fp32(self.f(x)) + ops.at_least_fp32(self.dt_bias)).unflatten(-1, self.shape)
        rate = torch.exp(ops.at_least_fp32(self.A_log)).unsqueeze(-1)
        if self.floor is None:  # log sigmoid(-f) is -softplus(f), and its gradient can be compiled
            return rate * F.logsigmoid(-f)
        return self.floor * torch.sigmoid(rate * f)

class KeyDecay(TokenDecay):
    """TokenDecay with a rate for each key (KDA: Kimi Linear 2025, https://arxiv.org/abs/2510.26692)."""
    per_key = True

class SigmoidDecay(NoDecay):
    """The log of a forget gate sigmoid(f(x)): mLSTM (Beck et al. 2024, https://arxiv.org/abs/2405.04517)."""

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.f, self.cap = low_rank(c, c.rnn_heads, c.rnn_decay_rank, bias=True), c.rnn_gate_cap

    def forward(self, x):
        return F.logsigmoid(soft_capped(ops.at_least_fp32(self.f(x)), self.cap)).unsqueeze(-1)

class SlowDecay(NoDecay):
    """log sigmoid(f(x)) / 16 for each key: GLA (Yang et al. 2023, https://arxiv.org/abs/2312.06635)."""

    def __init__(self, c, layer):
        super().__init__(c, layer)
        self.shape = c.rnn_heads, c.rnn_key_dim
        self.f = low_rank(c, math.prod(self.shape), c.rnn_decay_rank, bias=True)

    def forward(self, x):
        return F.logsigmoid(ops.at_least_fp32(self.f(x))).unflatten(-1, self.shape) / 16

def soft_capped(x, cap):
    return x if cap is None else cap * torch.tanh(x / cap)

class NoErase(nn.Module):
    """Each class here: x (B,T,C), k (B,T,H,K), v (B,T,H,V) -> the key e that is erased, or None, and v."""

    def __init__(self, c):
        super().__init__()

    def forward(self, x, k, v):
        return None, v

class DeltaRule(NoErase):
    """
    e = beta k and beta v: what is stored under k moves towards v, all the way where beta is 1 (Yang et al.
    2024, https://arxiv.org/abs/2406.06484). With rnn_beta = 2 a key may also be turned into its negative.
    """

    def __init__(self, c):
        super().__init__(c)
        self.beta, self.largest = Linear(c.n_embd, c.rnn_heads, bias=False), c.rnn_beta

    def forward(self, x, k, v):
        beta = self.largest * torch.sigmoid(self.beta(x)).unsqueeze(-1)
        return beta * k, beta * v

class GatedDelta(NoErase):
    """A gate for each key of e, and one for each value of v (lara_mini's gated DeltaNet-2)."""

    def __init__(self, c):
        super().__init__(c)
        self.widths = c.rnn_heads * c.rnn_key_dim, c.rnn_heads * c.rnn_value_dim
        self.gates, self.largest = Linear(c.n_embd, sum(self.widths), bias=False), c.rnn_beta

    def forward(self, x, k, v):
        b, w = torch.sigmoid(self.gates(x)).split(self.widths, -1)
        return self.largest * b.view_as(k) * k, w.view_as(v) * v

class HeadNorm(RMSNorm):
    """RMS norm of each head, with weights that all share. y (B,T,H,V) -> (B,T,HV)"""

    def __init__(self, c):
        super().__init__(c.rnn_value_dim, c, c.rnn_eps)

    def forward(self, y):
        return super().forward(y).flatten(2)

class AllHeadsNorm(RMSNorm):
    """RMS norm over all heads together."""

    def __init__(self, c):
        super().__init__(c.rnn_heads * c.rnn_value_dim, c, c.rnn_eps)

    def forward(self, y):
        return super().forward(y.flatten(2))

class HeadLayerNorm(AllHeadsNorm):
    """Layer norm of each head, with weights of its own and no bias."""

    def forward(self, y):
        return F.layer_norm(y, y.shape[-1:], eps=self.eps).flatten(2) * self.weight

class NoHeadNorm(nn.Flatten):
    def __init__(self, c):
        super().__init__(2)

class Recurrence(StateSpace):
    """Queries, keys and values, as in attention, and a state in the place of the tokens they came from."""

    def __init__(self, c, layer):
        super().__init__()
        self.heads, self.key_heads, self.dims = c.rnn_heads, c.rnn_key_heads, (c.rnn_key_dim, c.rnn_value_dim)
        keys, values = c.rnn_key_heads * c.rnn_key_dim, c.rnn_heads * c.rnn_value_dim
        self.widths, self.scale = (keys, keys, values), c.rnn_scale or c.rnn_key_dim ** -0.5
        self.c_attn = Linear(c.n_embd, sum(self.widths), c.rnn_bias)
        self.on_keys, self.on_values = RNN_FEATURE[c.rnn_feature]
        self.conv1d = CausalConv(sum(self.widths), c.rnn_conv, False, nn.Identity()) if c.rnn_conv else None
        half = partial(constant, values=0.5)
        self.shift = TokenShift(1, c.n_embd, half) if c.rnn_shift else None
        self.decay, self.erase = RNN_DECAY[c.rnn_decay](c, layer), RNN_ERASE[c.rnn_erase](c)
        self.unit, self.turns = c.rnn_unit, None
        if c.rnn_rope:
            self.turns = Frequencies(rope_plain(c, 0, width=c.rnn_key_dim))
        self.input, self.cap = None, c.rnn_gate_cap
        if c.rnn_input == 'exp':
            self.input = Linear(c.n_embd, c.rnn_heads, bias=True)
        self.norm = RNN_NORM[c.rnn_norm](c)
        self.act = RNN_GATE[c.rnn_gate]
        self.gate = None if self.act is None else low_rank(c, values, c.rnn_gate_rank, c.rnn_bias)
        self.c_proj = out_proj(c, values, c.rnn_bias)
        # a value of 1 beside the others counts what was written under each key
        self.least = RNN_INPUT[c.rnn_input]
        state = c.rnn_heads, c.rnn_key_dim, c.rnn_value_dim + (self.least is not None)
        tail = (1, c.n_embd) if c.rnn_shift else (max(0, c.rnn_conv - 1), sum(self.widths))
        self.cache_shapes = tail, state
        # operations per number of the state: decay, k v, add, q S, add; and the two products of an erasure
        self.work = 5 if c.rnn_erase == 'none' else 9

    def forward(self, x, ctx, cache=None):
        tail, state = (None, None) if cache is None else cache.read()
        # 1. queries, keys and values
        if self.shift is not None:
            (x,), tail = self.shift(x, ctx, tail)
        y, tail = self.mixed(self.c_attn(x), ctx, tail)
        q, k, v = y.split(self.widths, dim=-1)
        q, k, v = self.on_keys(q), self.on_keys(k), self.on_values(v)
        q, k = (z.unflatten(-1, (self.key_heads, -1)) for z in (q, k))                  # (B,T,Hk,K)
        v = v.unflatten(-1, (self.heads, -1))                                           # (B,T,H,V)
        if self.unit:
            q, k = unit_length(q), unit_length(k)
        if self.turns is not None:
            angle = self.turns.angles(place_of(ctx))
            q, k = ops.rope_qk(q, k, angle.cos(), angle.sin())
        q, k = (z.repeat_interleave(self.heads // self.key_heads, dim=2) for z in (q * self.scale, k))
        # 2. what is forgotten, what is erased, and how much is written
        g = self.decay(x)                                                               # (B,T,H,1|K)
        e, v = self.erase(x, k, v)
        if self.input is not None:
            k = k * soft_capped(ops.at_least_fp32(self.input(x)), self.cap).exp().unsqueeze(-1)
        if self.least is not None:
            v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        g, k = no_padding(ctx, g, k)        # so nothing is erased either
        g = forget(ctx, g)
        # 3. the state, and the way back
        y, state = ops.recurrence(q, k, v, g, e, state=state)                           # (B,T,H,V)
        if cache is not None:
            cache.write(tail, state)
        if self.least is not None:
            y, count = y.split((self.dims[1], 1), dim=-1)
            y = y / (count.abs().clamp(min=self.least) + 1e-6)
        y = self.norm(y)
        return self.c_proj(y if self.gate is None else y * self.act(self.gate(x)))

    def mixed(self, y, ctx, tail):
        if self.conv1d is not None:
            return self.conv1d(y, ctx, tail)
        return y, y[:, :0] if tail is None else tail

RNN_DECAY = {'none': NoDecay, 'retnet': RetNetDecay, 'lightning': LightningDecay, 'head': TokenDecay,
             'key': KeyDecay, 'sigmoid': SigmoidDecay, 'slow': SlowDecay}
RNN_ERASE = {'none': NoErase, 'delta': DeltaRule, 'gated': GatedDelta}
RNN_FEATURE = {'none': (nn.Identity(), nn.Identity()), 'silu': (F.silu, F.silu),
               'elu1': (elu1, nn.Identity())}
RNN_INPUT = {'none': None, 'sum': 0.0, 'exp': 1.0}      # the least count that a sum is divided by; None: none
RNN_GATE = {'none': None, 'silu': F.silu, 'sigmoid': torch.sigmoid}
RNN_NORM = {'none': NoHeadNorm, 'head': HeadNorm, 'all': AllHeadsNorm, 'layer': HeadLayerNorm}

@flags(layer_pattern='r', rnn='linear')
class RecurrenceFlags:
    """Linear attention"""          # the defaults are those of a gated DeltaNet
    # what the state forgets: none, retnet and lightning (fixed rates), head (Mamba-2's rule, per head), key
    # (the same per key: KDA), sigmoid (mLSTM), slow (GLA)
    rnn_decay: str = flag('head', RNN_DECAY)
    rnn_erase: str = flag('delta', RNN_ERASE)   # before a write: none, delta (beta k), gated (per channel)
    rnn_beta: float = flag(1.0, above=0, most=2, rnn_erase=('delta', 'gated'))  # largest beta
    rnn_feature: str = flag('silu', RNN_FEATURE)    # of q, k, v: none, silu, elu1 (elu + 1, of q and k)
    rnn_unit: bool = True                           # queries and keys of length 1
    rnn_rope: bool = False                          # rotate queries and keys by position (RetNet)
    rnn_scale: float | None = None                  # factor on queries; None: 1 / sqrt(rnn_key_dim)
    rnn_conv: int = flag(4, least=0)                # taps of a causal convolution of q, k and v; 0: none
    rnn_shift: bool = flag(False, rnn_conv=0)       # mix each token with the one before it (RWKV)
    # weight of a token: none (1), sum (1, and a read is a mean: linear attention), exp (a gate: mLSTM)
    rnn_input: str = flag('none', RNN_INPUT)
    rnn_gate: str = flag('silu', RNN_GATE)          # gate on the output: none, silu, sigmoid
    rnn_norm: str = flag('head', RNN_NORM)          # of the output: none, head (RMS), all (RMS), layer
    # of that norm; None: norm_eps
    rnn_eps: float | None = flag(None, like='norm_eps', rnn_norm=('head', 'all', 'layer'))
    rnn_floor: float | None = flag(None, below=0, rnn_decay=('head', 'key'))    # lowest log decay of a token
    rnn_gate_cap: float | None = flag(None, rnn_decay='sigmoid')    # caps mLSTM's gates smoothly
    # rank of the projections to the gate and to the decay; None: full
    rnn_gate_rank: int | None = flag(None, rnn_gate=('silu', 'sigmoid'))
    rnn_decay_rank: int | None = flag(None, rnn_decay=('head', 'key', 'sigmoid', 'slow'))
    rnn_key_heads: int | None = None                # heads of queries and keys, shared as in GQA; None: all
    rnn_key_dim: int | None = None                  # width of a key; None: n_embd / rnn_heads
    rnn_value_dim: int | None = None                # width of a value; None: rnn_key_dim
    rnn_bias: bool | None = flag(None, like='bias')     # bias of the projections; None: as bias

    def fill(c):
        c._must('n_embd', c.rnn_key_dim or c.n_embd % c.rnn_heads == 0,
                f'be a multiple of rnn_heads={c.rnn_heads} (by default n_head), or rnn_key_dim must be set')
        key_dim = c.rnn_key_dim or c.n_embd // c.rnn_heads
        return {'rnn_key_heads': c.rnn_heads, 'rnn_key_dim': key_dim, 'rnn_value_dim': key_dim}

    def rules(c):
        yield 'rnn_key_heads', c.rnn_heads % c.rnn_key_heads == 0, f'divide rnn_heads={c.rnn_heads}'
        yield 'rnn_key_dim', not c.rnn_rope or c.rnn_key_dim % 2 == 0, 'be even when rnn_rope=True'
        yield ('rnn_input', c.rnn_input != 'sum' or c.rnn_feature == 'elu1',
               'be none or exp unless rnn_feature=elu1, which keeps its sums positive')
        if c.rnn_erase != 'none':   # erasing along longer keys would turn into growing
            yield 'rnn_unit', c.rnn_unit, f'be True when rnn_erase={c.rnn_erase}, or states would grow'
            yield 'rnn_input', c.rnn_input == 'none', f'be none when rnn_erase={c.rnn_erase}'


# ----------------------------------------------------------------------------------------------------------
# RWKV: a recurrence whose every input is a mixture of a token with the one before it

def shifted(x, ctx, tail):
    """
    What stands before each token of x (B,T,C): the tail (B,1,C) of past tokens, or zeros, in front of the
    first -> (B,T,C) and the new tail.
    """
    tail = torch.zeros_like(x[:, :1]) if tail is None else tail.to(x.dtype)
    if ctx.documents is not None:
        before = torch.cat((tail, x[:, :-1]), dim=1)
        return before.masked_fill(ctx.documents.starts.unsqueeze(-1), 0), None
    if not ctx.in_order:
        tail, x = close_gap(tail, x, ctx.pos)
    both = torch.cat((tail, x), dim=1)
    return both[:, :-1], both[:, -1:]

class TokenShift(nn.Module):
    """Mixtures x + mu (x' - x) of a token x with the one before it, x', one for each row of `mu` (n,C)."""

    def __init__(self, n, width, init):
        super().__init__()
        self.mu = param(n, width, init=init)

    def forward(self, x, ctx, tail):
        """x (B,T,C), tail (B,1,C) or None -> n tensors (B,T,C), and the new tail"""
        before, tail = shifted(x, ctx, tail)
        return [x + mu * (before - x) for mu in self.mu], tail

class LowRankMLP(nn.Module):
    """up act(down x), through `rank` numbers, and a bias, which is all that there is at first. In fp32."""

    def __init__(self, width, rank, act, bias=None):
        super().__init__()
        self.down, self.up = Linear(width, rank, bias=False), Linear(rank, width, bias=False)
        self.down.weight.init, self.up.weight.init = zeros, partial(orthogonal, scale=0.1)
        self.act, self.bias = act, None if bias is None else param(width, init=bias)

    def forward(self, x):
        y = ops.at_least_fp32(self.up(self.act(self.down(x))))
        return y if self.bias is None else y + ops.at_least_fp32(self.bias)

class HeadGroupNorm(nn.Module):
    """Layer norm of each head, with weights and biases of its own. y (B,T,H,V) -> (B,T,HV)"""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.bias, self.eps = param(width, init=ones), param(width, init=zeros), eps

    def forward(self, y):
        return F.layer_norm(y, y.shape[-1:], eps=self.eps).flatten(2) * self.weight + self.bias

def drawn_by(c, init):
    """A projection of the stream to its own width, without a bias, whose weight `init` draws."""
    linear = Linear(c.n_embd, c.n_embd, bias=False)
    linear.weight.init = init
    return linear

# initial values, from the authors' code: by how deep the layer lies (low from 0 to 1, high from 1 towards 0),
# and by the number of a channel

def depth(c, layer):
    """(low, high) among the layers of the same letter; further predictions: as the last layer."""
    letters = [letter for letter, _ in c.plan()]
    layer = min(layer, c.n_layer - 1)
    at, count = letters[:layer].count(letters[layer]), letters.count(letters[layer])
    return at / max(1, count - 1), 1 - at / count

def orthogonal(shape, generator, scale):
    return nn.init.orthogonal_(torch.empty(shape), scale, generator)

def rise(shape, generator, start, end, power):
    """From start, in channel 0, to end, in the last one."""
    return start + (end - start) * (torch.arange(shape[-1]) / max(1, shape[-1] - 1)) ** power

def zigzag(shape, generator, start, end, size):
    """From start to end, and in turns `size` above, on and below that."""
    return rise(shape, generator, start, end, 1) + size * ((torch.arange(shape[-1]) + 1) % 3 - 1)

def look_back(shape, generator, powers, less=None):
    """Rows of mu: 1 - (channel / channels)^power - less, so that later channels look back less."""
    channel, less = torch.arange(shape[-1]) / shape[-1], less or [0.0] * len(powers)
    return torch.stack([1 - channel ** power - minus for power, minus in zip(powers, less, strict=True)])

# RWKV-7, with kk of length 1, a rate a and a decay for each channel, and a bonus u for the token itself. Both
# terms read the S of before the token:
#
#   S <- exp(decay) S - (a kk) (kk^T S) + k v^T         y = r^T S + (r . k u) v

class Shelf:
    """Where a layer leaves a tensor for later ones. No list: FSDP in 16 bits gives blocks copies of one."""
    values = None

class RWKV7(StateSpace):
    """
    RWKV-7 (Peng et al. 2025, https://arxiv.org/abs/2503.14456): a delta rule that erases under another key,
    kk, than it writes under, at a rate a per channel, with a decay per channel. The values of the first such
    layer are mixed into those of the later ones.
    """
    work, conv1d = 9, None

    def __init__(self, c, layer):
        super().__init__()
        C, H, (low, high) = c.n_embd, c.rnn_heads, depth(c, layer)
        self.heads, self.cache_shapes = (H, C // H), ((1, C), (H, C // H, C // H))
        self.shift = TokenShift(6, C, partial(
            look_back, powers=[high * p for p in (0.2, 0.9, 0.9, 0.4, 0.9, 0.2)],
            less=[0.0, 0.0, 0.4 * low, 0.6 * low, 0.0, 0.0]))
        self.r, self.k, self.v = (
            drawn_by(c, partial(uniform, bound=size * C ** -0.5)) for size in (0.5, 0.05, 0.5))

        def rank(factor, power=0.5):
            return max(32, round(factor * C ** power / 32) * 32)
        slow_to_fast = partial(rise, start=-6.5, end=-1.5, power=0.85 + low ** 0.5)
        self.decay = LowRankMLP(C, rank(1.8), torch.tanh, slow_to_fast)
        self.rate = LowRankMLP(C, rank(1.8), nn.Identity(), zeros)
        self.is_first = c.layer_pattern.index('r') == layer
        self.mix = None if self.is_first else LowRankMLP(C, rank(1.3), nn.Identity(), ones)
        self.gate = LowRankMLP(C, rank(0.6, 0.8), torch.sigmoid)
        self.erased = param(C, init=partial(constant, values=0.85))     # k times this is kk
        self.kept = param(C, init=ones)                                 # by how much a makes k smaller
        self.bonus = param(C, init=zeros)
        self.norm = HeadGroupNorm(C, C // H * c.norm_eps)
        self.c_proj = out_proj(c, C, bias=False)

    def forward(self, x, ctx, cache=None):
        tail, state = (None, None) if cache is None else cache.read()
        # 1. six mixtures with the token before, and their projections
        (xr, xw, xk, xv, xa, xg), tail = self.shift(x, ctx, tail)
        r, k, v = self.r(xr), self.k(xk), self.v(xv)
        decay = -math.exp(-0.5) * torch.sigmoid(self.decay(xw))
        a = torch.sigmoid(self.rate(xa))
        if self.is_first:
            ctx.given.first.values = v
        else:
            v = v + (torch.sigmoid(self.mix(xv)) * (ctx.given.first.values - v)).to(v.dtype)
        # 2. what is erased, and what is written
        kk, k = k * self.erased, k * (1 + (a - 1) * self.kept)
        r, decay, k, v, kk, a, u = (z.unflatten(-1, self.heads) for z in (r, decay, k, v, kk, a, self.bonus))
        kk = F.normalize(ops.at_least_fp32(kk), dim=-1)
        # ops.recurrence erases after it forgets, and the paper before
        erase, along = kk * torch.exp(-decay), kk * a
        decay, k, erase = no_padding(ctx, decay, k, erase)
        # 3. the state, and the way back
        y, state = ops.recurrence(r, k, v, forget(ctx, decay), erase, along, state)     # (B,T,H,V)
        if cache is not None:
            cache.write(tail, state)
        y = self.norm(y) + ((r * k * u).sum(-1, keepdim=True) * v).flatten(2)
        return self.c_proj((y * self.gate(xg)).to(v.dtype))

class DynamicShift(TokenShift):
    """TokenShift, with something added to each mu that `rank` numbers say of the token itself (RWKV-6)."""

    def __init__(self, n, width, init, rank):
        super().__init__(n + 1, width, init)        # the last mu for what `down` reads
        self.down = Linear(width, n * rank, bias=False)
        self.down.weight.init = zeros
        self.up = param(n, rank, width, init=partial(uniform, bound=0.01))

    def forward(self, x, ctx, tail):
        before, tail = shifted(x, ctx, tail)
        back = before - x
        few = torch.tanh(self.down(x + self.mu[-1] * back)).unflatten(-1, (len(self.up), -1))
        more = torch.einsum('btnr,nrc->nbtc', few, self.up)
        return [x + (mu + m) * back for mu, m in zip(self.mu[:-1], more, strict=True)], tail

class RWKV6(StateSpace):
    """
    RWKV-6 (Peng et al. 2024, https://arxiv.org/abs/2404.05892): a decay per channel, from the token, and a
    read before the write, to which the token itself adds (r . k u) v.
    """
    work, conv1d = 5, None

    def __init__(self, c, layer):
        super().__init__()
        C, H, (low, high) = c.n_embd, c.rnn_heads, depth(c, layer)
        self.heads, self.cache_shapes = (H, C // H), ((1, C), (H, C // H, C // H))
        powers, less = [high, high, high, high / 2, high / 2, high], [0.0, 0.0, 0.3 * low, 0.0, 0.0, 0.0]
        self.shift = DynamicShift(5, C, partial(look_back, powers=powers, less=less), 32 if C < 4096 else 64)
        self.r, self.k, self.v, self.g = (
            drawn_by(c, partial(orthogonal, scale=scale)) for scale in (1.0, 0.1, 1.0, 0.1))
        slow_to_fast = partial(rise, start=-6.0, end=-1.0, power=0.7 + 1.3 * low)
        self.decay = LowRankMLP(C, 64 if C < 4096 else 128, torch.tanh, slow_to_fast)
        self.bonus = param(C, init=partial(zigzag, start=low, end=0.0, size=0.1))
        self.norm = HeadGroupNorm(C, C // H * c.norm_eps)
        self.c_proj = out_proj(c, C, bias=False)

    def forward(self, x, ctx, cache=None):
        tail, state = (None, None) if cache is None else cache.read()
        (xw, xk, xv, xr, xg), tail = self.shift(x, ctx, tail)
        r, k, v, decay = self.r(xr), self.k(xk), self.v(xv), -torch.exp(self.decay(xw))
        r, k, v, decay, u = (z.unflatten(-1, self.heads) for z in (r, k, v, decay, self.bonus))
        decay, k = no_padding(ctx, decay, k)
        read = r if ctx.documents is None else r.masked_fill(ctx.documents.starts[..., None, None], 0)
        y, state = ops.recurrence(read, k, v, forget(ctx, decay), state=state, before=True)     # (B,T,H,V)
        if cache is not None:
            cache.write(tail, state)
        y = self.norm(y + (r * k * u).sum(-1, keepdim=True) * v)
        return self.c_proj((y * F.silu(self.g(xg))).to(v.dtype))

def running_sums(x, decay, start):
    """s_t = decay_t s_{t-1} + x_t, in log2(T) rounds: x (B,T,...), decay (B,T,...), start (B,1,...) -> s"""
    x, step = torch.cat((x[:, :1] + decay[:, :1] * start, x[:, 1:]), dim=1), 1
    while step < x.shape[1]:    # x sums up, and decay covers, 2 step tokens after each round
        x = torch.cat((x[:, :step], x[:, step:] + decay[:, step:] * x[:, :-step]), dim=1)
        decay = torch.cat((decay[:, :step], decay[:, step:] * decay[:, :-step]), dim=1)
        step *= 2
    return x

def wkv(k, v, decay, u, real, state, documents=None):
    """
    RWKV-4's mean of the values v (B,T,C), with weights exp(k) that decay by exp(decay) (C,) a token, and
    exp(u + k) for the token itself; real (B,T,1) or (T,1): 0 for padding -> (B,T,C) and the state (B,C,3):
    the sums of weighted values and of weights, over exp(top), and top, the log of the largest weight so far.
    Before a document's first token, that is the log of nothing, and so forgets all.
    """
    if state is None:
        state = torch.cat((k.new_zeros(*k.shape[::2], 2), k.new_full((*k.shape[::2], 1), -1e4)), dim=-1)
    start, top = state[:, None, :, :2], state[:, None, :, 2]                        # (B,1,C,2), (B,1,C)
    with torch.no_grad():   # the result does not depend on it
        if documents is None:
            since = decay * real.cumsum(-2)
            tops = torch.cat((top, torch.where(real > 0, k, -1e4) - since), dim=1).cummax(1).values
            tops = torch.cat((top, tops[:, 1:] + since), dim=1)
            before, after = tops[:, :-1], tops[:, 1:]
        else:
            since = decay * (documents.place + 1).unsqueeze(-1)
            after = largest_within(k - since, documents.place).clamp(min=-1e4) + since
            before = torch.cat((top, after[:, :-1]), 1).masked_fill(documents.starts.unsqueeze(-1), -1e4)
        own = torch.maximum(before, u + k)
    weight = real * torch.exp(torch.where(real > 0, k, after) - after)
    # at most 0 but for rounding; a clamp would lose the gradient where it is above
    forget = torch.exp(real * decay + before - after).unsqueeze(-1)
    pairs = torch.stack((v, torch.ones_like(v)), dim=-1)                            # (B,T,C,2)
    sums = running_sums(weight.unsqueeze(-1) * pairs, forget, start)
    past = torch.cat((start, sums[:, :-1]), dim=1) * torch.exp(before - own).unsqueeze(-1)
    both = past + torch.exp(u + k - own).unsqueeze(-1) * pairs
    return both[..., 0] / both[..., 1], torch.cat((sums[:, -1], after[:, -1].unsqueeze(-1)), dim=-1)

class RWKV4(StateSpace):
    """RWKV-4 (Peng et al. 2023, https://arxiv.org/abs/2305.13048): a gated mean of values in each channel."""
    work, conv1d = 5, None

    def __init__(self, c, layer):
        super().__init__()
        C, (low, high) = c.n_embd, depth(c, layer)
        self.cache_shapes = (1, C), (C, 3)
        powers, less = [high, high, high / 2], [0.0, 0.3 * low, 0.0]
        self.shift = TokenShift(3, C, partial(look_back, powers=powers, less=less))
        self.k, self.v, self.r = (
            drawn_by(c, init) for init in (zeros, partial(orthogonal, scale=1.0), zeros))
        self.decay = param(C, init=partial(rise, start=-5.0, end=3.0, power=0.7 + 1.3 * low))
        self.bonus = param(C, init=partial(zigzag, start=math.log(0.3), end=math.log(0.3), size=0.5))
        self.c_proj = out_proj(c, C, bias=False)

    def forward(self, x, ctx, cache=None):
        tail, state = (None, None) if cache is None else cache.read()
        (xk, xv, xr), tail = self.shift(x, ctx, tail)
        k, v, decay, u = (ops.at_least_fp32(z) for z in (self.k(xk), self.v(xv), self.decay, self.bonus))
        real = (ctx.pos >= 0).to(k.dtype).unsqueeze(-1)
        y, state = wkv(k, v, -torch.exp(decay), u, real, state, ctx.documents)
        if cache is not None:
            cache.write(tail, state)
        return self.c_proj(torch.sigmoid(self.r(xr)) * y.to(x.dtype))

class ChannelMix(StateSpace):
    """
    RWKV's feed-forward: a token shift, then a squared ReLU between two projections and, up to RWKV-6, a gate.
    As it reads the token before, it is a mixer with a state: layer_pattern='rk' and ffn_pattern='-'.
    """
    work, conv1d = 0, None

    def __init__(self, c, layer):
        super().__init__()
        C, width, (_, high) = c.n_embd, c.rnn_mix_width, depth(c, layer)
        self.cache_shapes = (1, C), (0,)
        powers = [high, high] if c.rnn_mix_gate else [high ** 4]
        self.shift = TokenShift(len(powers), C, partial(look_back, powers=powers))
        self.c_fc, self.c_proj = Linear(C, width, bias=False), out_proj(c, width, bias=False)
        self.gate = drawn_by(c, zeros) if c.rnn_mix_gate else None

    def forward(self, x, ctx, cache=None):
        tail = None if cache is None else cache.read()[0]
        (xk, *xr), tail = self.shift(x, ctx, tail)
        if cache is not None:
            cache.write(tail, tail[:, 0, :0])
        y = self.c_proj(relu2(self.c_fc(xk)))
        return y if self.gate is None else torch.sigmoid(self.gate(*xr)) * y


# ----------------------------------------------------------------------------------------------------------
# S4D: a recurrence that is the same for every token, and so a convolution with a kernel as long as the text
#
#   h_t = exp(dt A) h_{t-1} + B u_t     y_t = 2 Re(C h_t)           N/2 complex numbers h for each channel
#   y_t = sum over s <= t of kernel_{t-s} u_s                       kernel_l = 2 Re(sum of C B exp(l dt A))

def s4d_step(u, A, B, C, h, real):
    """One token u (B,1,c). A = dt A, B, C (c,n) complex, h (B,c,n); real (B,1) or (1,): 0 for padding."""
    h = torch.exp(A * real.unsqueeze(-1)) * h + B * u.mT
    return 2 * (C * h).real.sum(-1).unsqueeze(1), h

def s4d_convolve(u, A, B, C, h, pad, keep=True):
    """
    T tokens at once, by FFT. h: None for zeros; pad (B,1) or (1,): how many of the first are padding; keep:
    whether the state behind the last is wanted, which is None otherwise.
    """
    T, slot = u.shape[1], torch.arange(u.shape[1], device=u.device)
    powers = torch.exp(A.unsqueeze(-1) * slot)                                      # (c,n,T)
    kernel = 2 * torch.einsum('cn,cnt->tc', C * B, powers).real
    # of twice the length, or the end of the text would reach its beginning
    y = torch.fft.irfft(torch.fft.rfft(u, 2 * T, 1) * torch.fft.rfft(kernel, 2 * T, 0), 2 * T, 1)[:, :T]
    end = B * torch.einsum('btc,cnt->bcn', u.to(B.dtype), powers.flip(-1)) if keep else None
    if h is not None:
        carried = 2 * torch.einsum('bcn,cnt->btc', C * torch.exp(A) * h, powers).real
        # no time passes while there is padding
        since = (slot - pad).clamp(min=0).unsqueeze(-1).expand_as(y)
        y, end = y + carried.gather(1, since), end + torch.exp(A * (T - pad).unsqueeze(-1)) * h
    return y, end

def log_step(shape, generator):
    """dt is log-uniform in [0.001, 0.1]."""
    return math.log(1e-3) + math.log(100) * torch.rand(shape, generator=generator)

def s4d_lin(shape, generator):
    """Frequencies pi n of every channel (S4D-Lin)."""
    return (math.pi * torch.arange(shape[1])).expand(shape)

class S4D(StateSpace):
    """
    S4D (Gu et al. 2022, https://arxiv.org/abs/2206.11893): a diagonal state space with its own step dt for
    each channel. A text passes as a convolution, a token that is generated as a step of the recurrence.
    """
    work, conv1d = 7, None  # operations per number of state: A h (3), B u, add, C h, add

    def __init__(self, c, layer):
        super().__init__()
        width, pairs = c.n_embd, c.rnn_state // 2
        self.cache_shapes = (0, width), (width, 2 * pairs)      # real and imaginary parts side by side
        self.log_dt = param(width, init=log_step)
        self.A_log = param(width, pairs, init=partial(constant, values=math.log(0.5)))
        self.A_imag = param(width, pairs, init=s4d_lin)         # A = -exp(A_log) + i A_imag
        self.C = param(width, pairs, 2, init=partial(normal, std=0.5 ** 0.5))
        self.D = param(width, init=partial(normal, std=1.0))    # skip connection
        self.c_proj = Linear(width, 2 * width, c.bias, std=out_std(c))     # the output and its gate

    def forward(self, x, ctx, cache=None):
        state = None if cache is None else cache.read()[1]
        u, = no_padding(ctx, x)
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.scan(ops.at_least_fp32(u), ctx, state, keep=cache is not None)
        if cache is not None:
            cache.write(x[:, :0], torch.view_as_real(state).flatten(-2))
        y = F.gelu(y.to(x.dtype) + self.D * u)
        return F.glu(self.c_proj(y), dim=-1)

    def scan(self, u, ctx, state, keep):
        log_dt, A_log, A_imag, C = (
            ops.at_least_fp32(p) for p in (self.log_dt, self.A_log, self.A_imag, self.C))
        h = None if state is None else torch.view_as_complex(state.unflatten(-1, (-1, 2)))
        A, C = torch.complex(-torch.exp(A_log), A_imag), torch.view_as_complex(C)
        step = torch.exp(log_dt).unsqueeze(-1) * A
        B = torch.expm1(step) / A       # the input is held constant for a step
        if ctx.documents is not None:
            return s4d_within(u, step, B, C, ctx.documents.place), None
        if u.shape[1] == 1 and h is not None:
            return s4d_step(u, step, B, C, h, (ctx.pos >= 0).to(u.dtype))
        return s4d_convolve(u, step, B, C, h, (ctx.pos < 0).sum(-1, keepdim=True), keep)


# ----------------------------------------------------------------------------------------------------------
# The classes of recurrences

RNN = {'linear': Recurrence, 'rwkv7': RWKV7, 'rwkv6': RWKV6, 'rwkv4': RWKV4, 's4d': S4D}

@flags()
class RNNFlags:
    """Recurrences"""
    # kind of the r layers: linear (linear attention and its kin: flags below), rwkv7, rwkv6, rwkv4, s4d
    rnn: str = flag('linear', RNN, layer_pattern='r')
    # heads, each with a state
    rnn_heads: int | None = flag(None, like='n_head', layer_pattern='r', rnn=('linear', 'rwkv7', 'rwkv6'))
    rnn_state: int = flag(64, rnn='s4d')    # real numbers of a channel's state, two for each complex one
    # norm_at of r layers (OLMo Hybrid: pre, where attention has output); None: as norm_at
    rnn_norm_at: str | None = flag(None, (None, *NORM_AT), like='norm_at', layer_pattern='r')
    # hidden width of channel mixing; None: 4 n_embd
    rnn_mix_width: int | None = flag(None, layer_pattern='k')
    rnn_mix_gate: bool = flag(False, layer_pattern='k')     # a gate on channel mixing (RWKV-4 and RWKV-6)

    def fill(c):
        return {'rnn_mix_width': 4 * c.n_embd} if 'k' in c.mixers() else {}

    def rules(c):
        if c.rnn in ('rwkv6', 'rwkv7'):
            yield 'rnn_heads', c.n_embd % c.rnn_heads == 0, f'divide n_embd={c.n_embd} (default: n_head)'
        yield 'rnn_state', c.rnn_state % 2 == 0, 'be even'
        alike = c.rnn_norm_at in (None, c.norm_at)
        yield ('rnn_norm_at', alike or c.residual == 'serial' and 'post' not in (c.norm_at, c.rnn_norm_at),
               f'be {c.norm_at}, as norm_at, unless residual=serial and neither is post')


# ----------------------------------------------------------------------------------------------------------
# Experts

class RouterLosses:
    """What routers add to the training loss. No list: FSDP in 16 bits gives each block a copy of a list."""

    def __init__(self):
        self.terms = []

ROUTER = {'softmax': partial(torch.softmax, dim=-1), 'sigmoid': torch.sigmoid}
ROUTER_NORM = (True, False, 'fixed')
BALANCE = ('none', 'aux', 'bias', 'both')

@flags(ffn_pattern='e')
class MoEFlags:
    """Experts"""
    n_expert: int | None = None             # experts in a layer
    n_expert_used: int = 2                  # experts per token (top-k)
    # hidden width of an expert; a float: fraction of ffn_width; None: ffn_width / experts per token
    expert_width: int | float | None = None
    n_shared: int = flag(0, least=0)        # shared experts, used by every token
    # hidden width of the shared experts together; None: n_shared * expert_width
    shared_width: int | None = flag(None, n_shared=SET)
    shared_gate: bool = flag(False, n_shared=SET)   # scale the shared experts by a learned sigmoid (Qwen MoE)
    router: str = flag('softmax', ROUTER)   # scores of the experts: softmax, sigmoid (DeepSeek V3)
    router_bias: bool = False               # a learned bias in the router (gpt-oss)
    # make the chosen experts' weights sum to 1; fixed: the weight of a single one is 1, and its router learns
    # from its own losses alone (published checkpoints)
    router_norm: bool | str = flag(True, ROUTER_NORM)
    router_scale: float = 1.0               # factor on the experts' weights
    router_input: bool = False              # weight an expert's input instead of its output (Llama 4)
    n_group: int = 1                        # groups of experts; a token first picks the best (DeepSeek)
    n_group_used: int = flag(1, n_group=SET)    # groups whose experts a token chooses among
    group_top: int = flag(2, n_group=SET)   # a group's score is the sum of its group_top best experts
    balance: str = flag('aux', BALANCE)     # load balancing: none, aux (a loss), bias (DeepSeek V3), both
    aux_weight: float = flag(0.01, least=0, balance=('aux', 'both'))    # weight of the balancing loss
    bias_rate: float = flag(0.001, least=0, balance=('bias', 'both'))   # change of the balancing bias a step
    z_weight: float = flag(0.0, least=0)    # weight of the router's z-loss: keeps its logits small (ST-MoE)

    def fill(c):
        if isinstance(c.expert_width, float):
            c.expert_width = max(1, round(c.expert_width * c.ffn_width))
        if c.expert_width is None:
            width = c.ffn_width // (c.n_expert_used + c.n_shared)
            c.expert_width = max(1, width // 8 * 8 or width)
        return {'shared_width': c.n_shared * c.expert_width} if c.n_shared else {}

    def rules(c):
        yield 'n_expert', c.n_expert, "be set when ffn_pattern has an 'e'"
        yield 'n_group', c.n_expert % c.n_group == 0, f'divide n_expert={c.n_expert}'
        yield ('n_group_used', c.n_group_used < c.n_group or c.n_group == 1,
               f'be below n_group={c.n_group}, or groups make no difference')
        most = c.n_expert // c.n_group * c.n_group_used
        yield 'n_expert_used', c.n_expert_used <= most, f'be at most the {most} experts to choose from'
        yield ('router_norm', c.router_norm is not True or c.n_expert_used > 1 or c.n_expert == 1,
               'be False when n_expert_used=1: one weight divided by itself is 1, and teaches the router '
               'nothing')
        yield ('router_norm', c.router_norm != 'fixed' or c.n_expert_used == 1 < c.n_expert,
               'be True or False unless one of several experts is used')

def with_fixed_norm(flags):
    """Flags of a saved model. Where the weight of one expert was normalised, that is router_norm='fixed'."""
    several = flags.get('n_expert') not in (None, 1)
    one = several and flags.get('n_expert_used') == 1 and flags.get('router_norm', True) is True
    return flags | {'router_norm': 'fixed'} if one else flags

class MoE(nn.Module):
    """
    Mixture of experts (Shazeer et al. 2017): every token passes through the n_expert_used experts that a
    router scores highest, weighted by their scores. None is dropped. They are kept equally busy by a loss
    (Switch, Fedus et al. 2021), or by a bias on the choice alone (DeepSeek V3, arXiv 2412.19437).
    """

    def __init__(self, c):
        super().__init__()
        E, I, (ffn, act) = c.n_expert, c.expert_width, FFN[c.ffn]
        self.c, self.act, self.score = c, act(c), ROUTER[c.router]
        self.router = Linear(c.n_embd, E, c.router_bias)
        self.c_fc = ExpertLinear(E, c.n_embd, ffn.n_inner * I, c.ffn_bias, 0.02)
        self.c_proj = ExpertLinear(E, I, c.n_embd, c.ffn_bias, out_std(c))
        self.shared = dense(c, c.shared_width) if c.n_shared else None
        self.shared_gate = Linear(c.n_embd, 1, bias=False) if c.shared_gate else None
        self.aux, self.biased = c.balance in ('aux', 'both'), c.balance in ('bias', 'both')
        if self.biased:
            self.register_buffer('choice_bias', torch.zeros(E))
        # tokens that each expert took since the last optimizer step
        self.register_buffer('load', torch.zeros(E), persistent=False)

    def forward(self, x, ctx):
        x_NC = x.flatten(0, 1)
        weight_NK, expert_NK, counts_E = self.route(x_NC, ctx)
        x_NC = ops.as_products(x_NC)
        y_NC = self.experts(x_NC, weight_NK.to(x_NC.dtype), expert_NK, counts_E)
        if self.shared is not None:     # which every token passes through
            shared = self.shared(x_NC, ctx)
            gate = None if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_NC))
            y_NC = y_NC + (shared if gate is None else gate * shared)
        return y_NC.view(x.shape)

    def route(self, x_NC, ctx):
        """-> weights and numbers of every token's experts, (N,K) each, and how many tokens each has, (E,)"""
        # 1. score the experts, in fp32 because near ties decide the choice
        weight, bias = self.router.weight, self.router.bias
        logits_NE = ops.exact_linear(ops.at_least_fp32(x_NC), ops.at_least_fp32(weight),
                                     None if bias is None else ops.at_least_fp32(bias))
        scores_NE = self.score(logits_NE)
        # 2. choose some for each token, and weight them
        expert_NK = self.choose(scores_NE)
        weight_NK = scores_NE.gather(-1, expert_NK)
        if self.c.router_norm:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        # 3. tokens of each expert, counted into a tensor of fixed shape
        flat = expert_NK.flatten()
        counts_E = flat.new_zeros(self.c.n_expert).scatter_add_(0, flat, torch.ones_like(flat))
        if self.training:
            self.account(logits_NE, scores_NE, counts_E, ctx)
        return weight_NK * self.c.router_scale, expert_NK, counts_E

    def experts(self, x_NC, weight_NK, expert_NK, counts_E):
        """Their weighted sum (N,C), computed on the M = N K pairs (token, choice) sorted by expert."""
        order = expert_NK.flatten().argsort(stable=True)                                # the pair of each row
        token, row = order // expert_NK.shape[1], torch.arange(len(order), device=order.device)
        place_NK = torch.empty_like(order).scatter_(0, order, row).view_as(expert_NK)   # the row of each pair
        weight = ops.spread(weight_NK.view(-1, 1), order, place_NK.view(-1, 1))         # (M,1)
        rows = ops.spread(x_NC, token, place_NK)
        rows = rows * weight if self.c.router_input else rows
        rows = self.c_proj(self.act(self.c_fc(rows, counts_E)), counts_E)
        rows = rows if self.c.router_input else rows * weight
        return ops.collect(rows, token, place_NK)

    def choose(self, scores_NE):
        """The experts of every token, (N,K) int64: the best, within the best groups if there are groups."""
        if self.biased:
            scores_NE = scores_NE + self.choice_bias
        if self.c.n_group > 1:
            groups_NGE = scores_NE.unflatten(-1, (self.c.n_group, -1))
            score_NG = groups_NGE.topk(min(self.c.group_top, groups_NGE.shape[-1]), dim=-1).values.sum(-1)
            best_NG = score_NG.topk(self.c.n_group_used, dim=-1).indices
            out_NG = torch.ones_like(score_NG, dtype=torch.bool).scatter(-1, best_NG, False)
            scores_NE = groups_NGE.masked_fill(out_NG.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores_NE.topk(self.c.n_expert_used, dim=-1).indices

    def account(self, logits_NE, scores_NE, counts_E, ctx):
        """Count the tokens of each expert, and add the router's losses to the training loss."""
        self.load += counts_E
        if self.aux:
            wanted_E = (scores_NE / scores_NE.sum(-1, keepdim=True)).mean(0)
            aux_loss = self.c.n_expert * (counts_E / counts_E.sum() * wanted_E).sum()
            ctx.given.losses.terms.append(self.c.aux_weight * aux_loss)
        if self.c.z_weight:
            ctx.given.losses.terms.append(self.c.z_weight * logits_NE.logsumexp(-1).square().mean())

    def idle(self):
        """Parameters that one token does not pass through."""
        used = self.c.n_expert_used / self.c.n_expert
        return round((1 - used) * sum(p.numel() for m in (self.c_fc, self.c_proj) for p in m.parameters()))

    def flops(self):
        """Floating-point operations per token, forward and backward, of the experts it passes through."""
        return (6 * (self.c_fc.weight.numel() + self.c_proj.weight.numel()) * self.c.n_expert_used
                // self.c.n_expert)

@torch.no_grad()
def balance(moes, moves):
    """
    Moves the routers' biases by what all processes counted, times `moves` (0 or 1, or a scalar tensor), and
    starts counting again. Returns tensors: {'expert_entropy': mean over layers, 1 when all are equally busy,
    'expert_max': the largest share of one expert, 'expert_load': (layers,E) the share of each}.
    """
    loads = torch.stack([moe.load for moe in moes])  # (layers,E)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads)
    shares = loads / loads.sum(-1, keepdim=True).clamp(min=1)
    for moe, share_E in zip(moes, shares):
        if moe.biased:
            moe.choice_bias += moves * moe.c.bias_rate * torch.sign(share_E.mean() - share_E)
        moe.load.zero_()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(-1) / math.log(max(2, shares.shape[-1]))
    return {'expert_entropy': entropy.mean(), 'expert_max': shares.max(), 'expert_load': shares}

class ExpertLinear(nn.Module):
    """One linear layer per expert, their weights stacked, for rows that are sorted by expert."""
    group = 'experts'

    def __init__(self, n_expert, n_in, n_out, bias, std):
        super().__init__()
        self.weight = param(n_expert, n_out, n_in, init=partial(normal, std=std))
        self.bias = param(n_expert, n_out, init=zeros) if bias else None

    def forward(self, x, counts):
        """x (M,in) sorted by expert, counts (E,) rows of each -> (M,out)"""
        return ops.grouped_linear(x, self.weight, self.bias, counts)


# ----------------------------------------------------------------------------------------------------------
# Other activations

@flags(ffn='swiglu_clip', ffn_pattern='fe')
class ClippedFlags:
    """Clipped SwiGLU"""
    ffn_limit: float = 7.0      # gate and up are clamped to this size
    ffn_alpha: float = 1.702    # the gate is x * sigmoid(alpha * x)

def swiglu_clip(gate_up, limit, alpha):
    """gpt-oss (2025, https://arxiv.org/abs/2508.10925): both halves clamped, and up shifted by one."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)

def relu2(x):
    """So et al. 2021, https://arxiv.org/abs/2109.08668"""
    return F.relu(x).square()

def gated_by(act):
    def gated(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up
    return gated


# ----------------------------------------------------------------------------------------------------------
# Other forms of the residual stream

@flags()
class ResidualFlags:
    """Forms of the residual stream"""

    def rules(c):
        yield 'residual', c.residual == 'serial' or c.norm_at != 'post', 'be serial when norm_at=post'
        yield ('residual', c.residual not in ('shared', 'normed') or NORM_AT[c.norm_at][0],
               f'be serial when norm_at={c.norm_at}, which has no norm before a branch')
        yield ('residual', c.residual not in ('parallel', 'shared', 'normed') or '-' not in c.ffns(),
               "be serial when ffn_pattern has a '-', as nothing is beside the mixer")

class ParallelBlock(Block):
    """Mixer and feed-forward read the same x, each through its own norm (GPT-NeoX)."""

    def branches(self, x, ctx, cache):
        return x + self.mix(self.ln_1(x), ctx, cache) + self.feed(self.ln_2(x), ctx)

class SharedBlock(Block):
    """Mixer and feed-forward read the same norm of the same x (GPT-J, PaLM, Falcon, Cohere)."""

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        self.ln_2 = nn.Identity()

    def branches(self, x, ctx, cache):
        normed = self.ln_1(x)
        return x + self.mix(normed, ctx, cache) + self.feed(normed, ctx)

@flags(residual='normed')
class NormedFlags:
    """Branches added to their norm"""      # a n + b f(n), with the two factors a, b:
    normed_attn: tuple = flag((1.0, 1.0), layer_pattern='awcnvhz')  # where f is attention (MiniMax)
    normed_rnn: tuple = flag((1.0, 1.0), layer_pattern='mrks')      # where f is a state space or recurrence
    normed_ffn: tuple = (1.0, 1.0)                                  # where f is a feed-forward

    def rules(c):
        for name in ('normed_attn', 'normed_rnn', 'normed_ffn'):
            yield name, len(getattr(c, name)) == 2, 'hold two numbers'

class NormedBlock(Block):
    """Each branch is added to the norm that it reads, not to the stream before it (an option of BLOOM)."""

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        self.factors = c.normed_rnn if mixer in 'mrks' else c.normed_attn, c.normed_ffn

    def branches(self, x, ctx, cache):
        (a, b), (a_ffn, b_ffn) = self.factors
        x = self.ln_1(x)
        x = self.ln_2(a * x + b * self.mix(x, ctx, cache))
        return a_ffn * x + b_ffn * self.feed(x, ctx)


# ----------------------------------------------------------------------------------------------------------
# Wider residual streams: the first block widens the stream, and the last one closes it again, so that GPT
# sees (B,T,C) alone. Blocks of multi-token prediction do both, each for itself. Where a norm stands before
# every branch, all three forms start as the function of residual=serial: whatever factor the stream has, a
# norm takes it out.

@flags(residual=('attnres', 'hyper', 'mhc'))
class WideFlags:
    """Wider residual streams"""
    attnres_size: int = flag(1, residual='attnres')     # branches whose outputs are one source, their sum
    n_stream: int = flag(4, residual=('hyper', 'mhc'))  # streams beside each other
    # mixing weights that depend on the token are added to learned ones
    hyper_dynamic: bool = flag(True, residual='hyper')
    sinkhorn_steps: int = flag(20, residual='mhc')      # divisions of rows and columns by their sums

    def rules(c):
        yield ('embed_skip', not c.embed_skip,
               f'be False when residual={c.residual}, through which later blocks find the embedding already')

class WideBlock(Block):
    """Whether a block is the one that widens the stream, or closes it, or both."""

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        self.opens, self.closes = layer == 0 or layer >= c.n_layer, layer >= c.n_layer - 1

def attend_to_depth(query, sources, eps):
    """
    The mean of n sources (B,T,C), weighted by the softmax of query (C,) times each source's RMS norm. Written
    so that the backward pass needs the sources themselves, and no copy of them for each query.
    """
    scores = [(x * query).sum(-1) * (ops.at_least_fp32(x.square()).mean(-1) + eps).rsqrt() for x in sources]
    weights = ops.at_least_fp32(torch.stack(scores, dim=-1)).softmax(-1)                    # (B,T,n)
    mean = sum(weight.unsqueeze(-1) * x for weight, x in zip(weights.unbind(-1), sources))
    return mean.to(sources[0].dtype)

class AttentionResidualBlock(WideBlock):
    """
    Attention residuals (Kimi Team 2026, https://arxiv.org/abs/2603.15031): in place of a running sum, a
    branch reads the mean of the embedding and of the outputs of all branches before it, weighted for each
    token by a learned query; so does the head. attnres_size: of sums of so many outputs, the newest as far as
    it goes, counted as if every layer had two branches. Queries start at zero, which weights all alike.
    """

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        first = 0 if self.opens else 2 * layer
        self.starts_sum = [branch % c.attnres_size == 0 for branch in (first, first + 1)]
        # where the stream opens there is one source, and nothing to choose
        self.query_1, self.query_2, self.query_out = (
            param(c.n_embd, init=zeros) if wanted else None
            for wanted in (not self.opens, self.ffn is not None, self.closes))
        self.eps = c.norm_eps

    def branches(self, x, ctx, cache):
        """x: the embedding (B,T,C) alone in the first block, else a tuple of all sources."""
        x = (x,) if self.opens else x
        read = x[0] if self.opens else attend_to_depth(self.query_1, x, self.eps)
        x = self.joined(x, self.mix(self.ln_1(read), ctx, cache), 0)
        if self.ffn is not None:
            read = attend_to_depth(self.query_2, x, self.eps)
            x = self.joined(x, self.feed(self.ln_2(read), ctx), 1)
        return attend_to_depth(self.query_out, x, self.eps) if self.closes else x

    def joined(self, sources, y, branch):
        """The sources with the output y of one more branch."""
        return (*sources, y) if self.starts_sum[branch] else (*sources[:-1], sources[-1] + y)

# n streams x_i, and a branch f:        h = sum_i read_i x_i        x_j <- sum_i mix_ij x_i + write_j f(h)

def eye(shape, generator, size=1.0):
    return size * torch.eye(*shape)

def one_of(shape, generator, place, low, high):
    return torch.full(shape, low).index_fill(0, torch.tensor(place), high)

class HyperConnection(nn.Module):
    """
    Hyper-connections (Zhu et al. 2024, https://arxiv.org/abs/2409.19606): learned weights by which a branch
    reads the streams, writes to them and mixes them; dynamic ones add what each stream itself asks for. They
    start with nothing mixed and with branches that read one stream each, in turn, and write to all. The paper
    also scales the branches' last projections by sqrt(n), which is left out here.
    """

    def __init__(self, c, branch):
        super().__init__()
        n = c.n_stream
        self.read = param(n, init=partial(one_of, place=branch % n, low=0.0, high=1.0))
        self.write, self.mix = param(n, init=ones), param(n, n, init=eye)
        self.norm = NORMS[c.norm](c.n_embd, c) if c.hyper_dynamic else None
        if c.hyper_dynamic:
            self.dynamic = Linear(c.n_embd, 2 + n, bias=False, std=0.0)
            self.scale = param(2, init=partial(constant, values=0.01))      # of read and mix, of write

    def weights(self, x):
        """x (B,T,n,C) -> read (...,n), write (...,n), mix (...,n,n)"""
        read, write, mix = (ops.at_least_fp32(p) for p in (self.read, self.write, self.mix))
        if self.norm is None:
            return read, write, mix
        own = torch.tanh(ops.at_least_fp32(self.dynamic(self.norm(x))))             # (B,T,n,2+n)
        scale, write_scale = ops.at_least_fp32(self.scale)
        return read + scale * own[..., 0], write + write_scale * own[..., 1], mix + scale * own[..., 2:]

    def forward(self, x, branch):
        """x (B,T,n,C), branch: a function (B,T,C) -> (B,T,C)"""
        read, write, mix = self.weights(x)
        y = branch((read.unsqueeze(-1) * x).sum(-2).to(x.dtype))
        # not as a product of matrices, which autocast would round to 16 bits
        mixed = sum(row.unsqueeze(-1) * x_i.unsqueeze(-2) for row, x_i in zip(mix.unbind(-2), x.unbind(-2)))
        return (mixed + write.unsqueeze(-1) * y.unsqueeze(-2)).to(x.dtype)

def sinkhorn(logits, steps):
    """
    The exponentials of logits (...,n,n), with rows and columns divided by their sums in turn until both are 1
    (Sinkhorn and Knopp 1967); those of columns exactly.
    """
    for _ in range(steps):
        logits = logits.log_softmax(-1).log_softmax(-2)
    return logits.exp()

class ManifoldConnection(HyperConnection):
    """
    Manifold-constrained hyper-connections, mHC (DeepSeek 2025, https://arxiv.org/abs/2512.24880): mixing
    takes weighted means of streams, and so cannot make them grow with depth. All weights depend on all
    streams.

    While the streams are alike, mixing them changes nothing, and would never be learned. So reads begin
    unequal, which makes the branches write unequally from the second step on; and the mixing matrix begins
    near the identity, yet not where the softmax is flat. The paper leaves these numbers open. The first
    matrix, of streams that are alike, and the last one, before their mean is taken, change nothing.
    """

    def __init__(self, c, branch):
        nn.Module.__init__(self)
        n = c.n_stream
        self.read_bias = param(n, init=partial(one_of, place=branch % n, low=-1.0, high=1.0))
        self.write_bias, self.mix_bias = param(n, init=zeros), param(n, n, init=partial(eye, size=3.0))
        self.dynamic = Linear(n * c.n_embd, 2 * n + n * n, bias=False, std=0.0)
        self.scale = param(3, init=partial(constant, values=0.01))          # of read, write and mix
        self.widths, self.steps, self.eps = (n, n, n * n), c.sinkhorn_steps, c.norm_eps

    def weights(self, x):
        flat = x.flatten(-2)
        own = ops.at_least_fp32(self.dynamic(F.rms_norm(flat, flat.shape[-1:], eps=self.eps)))
        read, write, mix = (scale * part for scale, part in zip(
            ops.at_least_fp32(self.scale), own.split(self.widths, dim=-1)))
        mix = mix.unflatten(-1, self.mix_bias.shape)
        return (torch.sigmoid(read + self.read_bias), 2 * torch.sigmoid(write + self.write_bias),
                sinkhorn(mix + self.mix_bias, self.steps))

class HyperBlock(WideBlock):
    """Both branches with a connection to n_stream streams, of which the head reads the mean."""
    connection = HyperConnection

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        self.n_stream = c.n_stream
        self.hyper_1 = self.connection(c, 2 * layer)
        self.hyper_2 = None if self.ffn is None else self.connection(c, 2 * layer + 1)

    def branches(self, x, ctx, cache):
        if self.opens:
            x = x.unsqueeze(-2).expand(-1, -1, self.n_stream, -1)                   # (B,T,n,C)
        x = self.hyper_1(x, lambda h: self.mix(self.ln_1(h), ctx, cache))
        if self.ffn is not None:
            x = self.hyper_2(x, lambda h: self.feed(self.ln_2(h), ctx))
        return x.mean(-2) if self.closes else x     # a sum in the paper; the norm behind takes the factor out

class ManifoldBlock(HyperBlock):
    connection = ManifoldConnection


# ----------------------------------------------------------------------------------------------------------
# Multi-token prediction (Gloeckle et al. 2024)

@flags()
class PredictFlags:
    """Multi-token prediction"""
    n_predict: int = 1              # tokens predicted at each position; each beyond the first adds a block
    predict_weight: float = flag(0.3, least=0, n_predict=SET)   # weight of the extra predictions' loss

def further_losses(model, x, targets, ctx, z_loss):
    """The weighted loss of the further predictions: block k names the k-th token after the next."""
    total = 0.0
    for k, block in enumerate(model.further, start=1):
        shifted = F.pad(targets, (0, k), value=-1)[:, k:]
        if ctx.documents is not None:   # none lies in the next document
            shifted = shifted.where(F.pad(ctx.documents.place, (0, k))[:, k:] >= k, -1)
        loss = model.cross_entropy(block(x, ctx), shifted, z_loss)
        total = total + model.config.predict_weight / len(model.further) * loss
    return total


# ----------------------------------------------------------------------------------------------------------
# Encoders: every token sees those before and after it (BERT, Devlin et al. 2018,
# https://arxiv.org/abs/1810.04805), and train.py masks the tokens to be named (--objective=mask)

HEAD_ACT = {'gelu': F.gelu, 'silu': F.silu}

@flags()
class EncoderFlags:
    """Encoders, and heads"""
    causal: bool = True             # a token sees none after it; False: an encoder, where each sees all
    first_norm: bool = flag(True, embed_norm=True)  # a norm before the first mixer too (not in ModernBERT)
    head_mlp: bool = False          # a linear layer, an activation and a norm before the head
    head_mlp_bias: bool | None = flag(None, like='bias', head_mlp=True)     # its bias; None: as bias
    head_act: str = flag('gelu', HEAD_ACT, head_mlp=True)   # its activation: gelu, silu (nomic BERT)
    head_bias: bool = False         # bias of the logits
    embed_bias: bool = False        # one learned vector added to every token's embedding (nomic BERT)
    # width of the embedding and of a tied head, with a projection to n_embd behind it (ELECTRA); None: n_embd
    embed_width: int | None = flag(None, like='n_embd')

    def rules(c):
        yield ('embed_width', c.embed_width == c.n_embd or c.head_mlp or not c.tie,
               'be n_embd unless head_mlp=True, which projects back to it, or tie=False')
        yield ('first_norm', c.first_norm or NORM_AT[c.norm_at][0] and c.residual == 'serial',
               'be True unless norm_at is pre or sandwich, and residual=serial')
        if not c.causal:
            yield ('causal', not c.mixers() & set('mrkcshz'),
                   "be True when layer_pattern has one of m, r, k, c, s, h, z, which look back alone")
            yield 'n_predict', c.n_predict == 1, 'be 1 when causal=False'
            yield 'pos', c.pos != 'alibi_bf16', 'not be alibi_bf16 when causal=False: choose alibi'

class HeadMLP(nn.Module):
    """norm(act(W x)), as wide as the embedding. x (B,T,C) -> (B,T,embed_width)"""

    def __init__(self, c):
        super().__init__()
        self.c_fc = Linear(c.n_embd, c.embed_width, c.head_mlp_bias)
        self.act = HEAD_ACT[c.head_act]
        self.norm = norm_if(True, c, c.embed_width)

    def forward(self, x):
        return self.norm(self.act(self.c_fc(x)))

class BiasedEmbedding(Embedding):
    """One vector is added to every token, of which a tied head knows nothing: BERT's type of tokens."""

    def __init__(self, n, width):
        super().__init__(n, width)
        self.bias = param(width, init=zeros)

    def forward(self, idx):
        return super().forward(idx) + self.bias


# ----------------------------------------------------------------------------------------------------------
# Encoder and decoder: a third branch of every block attends to what an encoder makes of a source (Vaswani et
# al. 2017)
#
#   source -> embedding -> n_encoder blocks, not causal -> memory
#   idx    -> embedding -> n_layer blocks: mixer, attention to the memory, feed-forward -> logits

@flags()
class EncoderDecoderFlags:
    """Encoder beside a decoder"""
    n_encoder: int = flag(0, least=0)   # blocks of an encoder of the source; 0: there is none

    def rules(c):
        if c.n_encoder:
            yield 'n_encoder', c.causal, 'be 0 when causal=False, which is an encoder already'
            yield 'residual', c.residual == 'serial', 'be serial when there is an encoder'
            yield 'pos', c.pos != 'alibi_bf16', 'not be alibi_bf16 when there is an encoder: choose alibi'
            yield 'n_predict', c.n_predict == 1, 'be 1 when there is an encoder'
            yield ('layer_pattern', c.mixers() <= set('awnv'),
                   "have no letters but 'a', 'w', 'n' and 'v' when there is an encoder, which has the same "
                   'layers')
            yield 'embed_width', c.embed_width == c.n_embd, f'be n_embd={c.n_embd} when there is an encoder'
            for name in ('layer_pattern', 'ffn_pattern'):
                pattern = getattr(c, name)
                yield (name, set(pattern[:c.n_encoder]) <= set(pattern[:c.n_layer]),
                       f'have no letter in its first n_encoder={c.n_encoder} that is not in its first '
                       f'n_layer={c.n_layer}')
            yield ('value_embed', not (c.value_embed or c.embed_skip),
                   'be False when there is an encoder, and embed_skip too')

class Encoder(nn.Module):
    """n_encoder blocks, in which every token of the source sees all others."""

    def __init__(self, c, embed_scale):
        super().__init__()
        # unchecked, for the first n_encoder layers need not have every letter of a pattern
        c = GPTConfig.unchecked(**vars(c) | dict(causal=False, n_layer=c.n_encoder, n_encoder=0))
        self.embed_scale = embed_scale
        self.wpe, self.ln_e = POSITIONS[c.pos](c), norm_if(c.embed_norm, c, c.embed_width)
        self.drop = nn.Dropout(c.dropout)
        self.h = nn.ModuleList(Block(c, *letters, layer) for layer, letters in enumerate(c.plan()))
        self.ln_f = norm_if(c.norm_at != 'post', c)

    def forward(self, x, pos, losses):
        """x (B,S,C) embedded, pos (B,S) -> the memory (B,S,C). What routers add goes to `losses`."""
        x = self.drop(self.ln_e(self.wpe(x, pos)))
        ctx = Context(pos, False, self.wpe.rope(pos, pos.shape[-1]))
        for block in self.h:
            own = Given(losses=RouterLosses(), relative=getattr(self.wpe, 'table', None))
            x = block(x, ctx._replace(given=own))
            losses.terms.extend(own.losses.terms)
        return self.drop(self.ln_f(x))

def remembered(model, given, source):
    """What is given to the decoder's blocks, with the memory of source (B,S), -1 for padding."""
    if model.encoder is None:
        raise ValueError('source must be left out where n_encoder=0: no encoder reads it')
    pos = torch.where(source >= 0, torch.arange(source.shape[1], device=source.device), -1)
    x = model.wte(source.clamp(min=0)) * model.embed_scale
    return given._replace(memory=model.encoder(x, pos, given.losses), memory_pos=pos)

class MemoryCache:
    """The keys and values that one block makes of the memory, once."""
    max_tokens = math.inf

    def __init__(self):
        self.held = None

    @property
    def empty(self):
        return self.held is None

    def reset(self):
        self.held = None

    def expand(self, n):
        self.held = tuple(x.repeat_interleave(n, 0) for x in self.held)

    def snapshot(self):
        """Nothing: the memory stays when tokens are rolled back."""

    def restore(self, snapshot):
        pass

    def nbytes(self):
        return 0 if self.empty else sum(x.nbytes for x in self.held)

class CrossAttention(nn.Module):
    """Queries of the decoder, keys and values of the memory. Nothing rotates."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.scale = (c.n_head, c.n_kv_head, c.head_dim), c.attn_scale or c.head_dim ** -0.5
        self.c_q = Linear(c.n_embd, c.n_head * c.head_dim, c.qkv_bias)
        self.c_kv = Linear(c.n_embd, 2 * c.n_kv_head * c.head_dim, c.qkv_bias)
        self.c_proj = out_proj(c, c.n_head * c.head_dim, c.proj_bias)
        self.softcap, self.dropout = c.softcap, c.dropout

    def forward(self, x, ctx, cache=None):
        H, K, D = self.heads
        if cache is None or cache.empty:
            if ctx.given.memory is None:
                raise ValueError('source=None must be what the encoder reads: pass source=')
            k, v = self.c_kv(ctx.given.memory).unflatten(-1, (2, K, D)).unbind(2)       # (B,S,K,D)
            held = k, v, ctx.given.memory_pos
            if cache is not None:
                cache.held = held
        else:
            held = cache.held
        k, v, key_pos = held
        q = self.c_q(x).unflatten(-1, (H, D))
        y = ops.attention(q, k, v, ctx.pos, key_pos, self.scale, causal=False, softcap=self.softcap,
                          dropout=self.dropout if self.training else 0.0)
        return self.c_proj(y.flatten(2))

class CrossBlock(Block):
    """Three branches: mixer, attention to the memory, feed-forward."""

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        self.ln_x, self.ln_x_out, self.ln_x_sum = (norm_if(wanted, c) for wanted in NORM_AT[c.norm_at])
        self.cross = CrossAttention(c)

    def branches(self, x, ctx, cache):
        own, memory = (None, None) if cache is None else cache.parts
        x = self.ln_1_sum(x + self.mix(self.ln_1(x), ctx, own))
        x = self.ln_x_sum(x + self.scaled(self.ln_x_out(self.cross(self.ln_x(x), ctx, memory))))
        return x if self.ffn is None else self.ln_2_sum(x + self.feed(self.ln_2(x), ctx))

    def flops(self, T):
        """With a source as long as the text."""
        return super().flops(T) + 12 * math.prod(self.cross.heads[::2]) * T

    def new_cache(self, *sizes):
        return JointCache(super().new_cache(*sizes), MemoryCache())


# ----------------------------------------------------------------------------------------------------------
# Documents in a packed row: no attention, state or convolution reaches from one into the next
#
#   row        a a a b b c c c c        three documents
#   starts     1 0 0 1 0 1 0 0 0        what is given
#   place      0 1 2 0 1 0 1 2 3        what embeddings, rotations and taps read
#   pos        0 1 2 | g g+1 | 2g ...   what masks read: g = gap apart, and no window is longer than g / 2
#
# Masks and biases are functions of distances, so that nothing in attention knows of documents. A recurrence
# forgets all before a document's first token, by decays that it has anyway; taps read zeros from before it.

FORGOTTEN = -150.0      # a log decay that leaves nothing: e^-150 is 0 in fp32

class Documents(NamedTuple):
    """Where the documents of each row begin."""
    starts: torch.Tensor    # (B,T) bool: the first token of each; of a row, always
    place: torch.Tensor     # (B,T) int64: tokens between it and each token
    gap: int                # positions from the start of one document to that of the next

def places(starts):
    """starts (B,T) bool -> the place of each token in its document, (B,T) int64"""
    slot = torch.arange(starts.shape[1], device=starts.device)
    return slot - torch.where(starts, slot, 0).cummax(1).values

def check_starts(model, pos):
    """ValueError if documents cannot be told apart in this call."""
    c = model.config
    for name, fits, remedy in (
            ('pos', pos is None, 'be left out, as they give the positions'),
            ('n_encoder', not c.n_encoder, 'be 0: leave starts out, or choose a decoder alone'),
            ('pos', c.pos != 'alibi_bf16', 'not be alibi_bf16, whose rounding depends on where a row begins: '
             'choose alibi, or leave starts out')):
        if not fits:
            raise ValueError(f'{name} must {remedy} (starts: where documents begin)')

def context_of_documents(model, starts, pos):
    """The Context of rows that hold several documents, which begin where starts (B,T) is True."""
    check_starts(model, pos)
    c, T, place = model.config, starts.shape[1], places(starts)
    window = c.window or 1      # of which chunks are multiples
    documents = Documents(place == 0, place, -(-2 * T // window) * window)
    pos = place + documents.gap * (documents.starts.cumsum(1) - 1)
    return Context(pos, False, model.wpe.rope(place, T), reach=T, documents=documents)

def place_of(ctx):
    """Positions in a document, (T,) or (B,T); negative for padding."""
    return ctx.pos if ctx.documents is None else ctx.documents.place

def read_documents(model, idx, cache, pos, starts, last_only):
    """
    GPT.forward of a first call with a cache, for rows of several documents. What a cache keeps of a row is
    its last document; all before it is padding to that, so it is read once more, for its logits alone.
    """
    check_starts(model, pos)
    if not all(entry.empty for entry in cache):
        raise ValueError('starts must be given on the first call with a cache: reset it, or leave them out')
    slot = torch.arange(idx.shape[1], device=idx.device)
    pos = slot - torch.where(starts, slot, 0).amax(1, keepdim=True)
    logits, _ = model(idx, cache=cache, pos=pos, last_only=True)
    return (logits if last_only else model(idx, starts=starts)[0]), None

def forget(ctx, g):
    """Log decays g (B,T,H,1 or K), of which that of a document's first token leaves nothing of a state."""
    return g if ctx.documents is None else g.masked_fill(ctx.documents.starts[..., None, None], FORGOTTEN)

def forget_by_step(ctx, x, dt, rate):
    """
    The same for a state space: its steps dt (B,T,n) and inputs x (B,T,n,...), for decays of at least
    exp(-dt rate), rate (n,). At the first token of a document, dt grows by a factor until that is FORGOTTEN,
    and x shrinks by it, so that what is written, dt x, is the same; by a power of two, which rounds nothing.
    """
    if ctx.documents is None:
        return x, dt
    dt = dt.clamp(min=1e-12)
    with torch.no_grad():
        factor = torch.exp2(torch.log2(-FORGOTTEN / (rate * dt)).ceil()).clamp(min=1)
        factor = torch.where(ctx.documents.starts.unsqueeze(-1), factor, 1)
    # fp16 has no numbers so small
    x = x.float() if x.dtype == torch.float16 else x
    return x / factor.view(*factor.shape, *[1] * (x.dim() - dt.dim())).to(x.dtype), dt * factor

def largest_within(x, place):
    """The largest x (B,T,C) so far in each document, in log2(T) rounds."""
    step = 1
    while step < x.shape[1]:    # x is the largest of up to 2 step tokens after each round
        both = torch.maximum(x[:, step:], x[:, :-step])
        both = torch.where((place[:, step:] >= step).unsqueeze(-1), both, x[:, step:])
        x, step = torch.cat((x[:, :step], both), dim=1), 2 * step
    return x

def s4d_within(u, A, B, C, place, size=16):
    """
    s4d_convolve from zeros, in documents: in pieces of `size` tokens, by taps within a piece, and from the
    state in front of it for the document that goes on there. u (B,T,c), place (B,T) -> (B,T,c)
    """
    T, slot = u.shape[1], torch.arange(size, device=u.device)
    u, place = F.pad(u, (0, 0, 0, -T % size)), F.pad(place, (0, -T % size))
    powers = torch.exp(A.unsqueeze(-1) * slot)                                      # (c,n,size)
    kernel = 2 * torch.einsum('cn,cnt->ct', C * B, powers).real
    y = ops.conv_within(u, kernel.flip(-1), None, torch.minimum(place, slot.repeat(u.shape[1] // size)))
    u, place = u.unflatten(1, (-1, size)), place.unflatten(1, (-1, size))           # (B,N,size,...)
    ended = place[..., -1:] < size - 1 - slot       # before the last document of a piece
    last = u.masked_fill(ended.unsqueeze(-1), 0).to(B.dtype)
    added = B * torch.einsum('bntc,cmt->bncm', last, powers.flip(-1))
    keep = torch.exp(A * size) * (place[..., -1] >= size)[..., None, None]          # (B,N,c,n)
    states = running_sums(added, keep, torch.zeros_like(added[:, :1]))
    states = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)    # in front of each piece
    past = 2 * torch.einsum('bncm,cmt->bntc', C * torch.exp(A) * states, powers).real
    past = past.masked_fill((place <= slot).unsqueeze(-1), 0)
    return (y + past.flatten(1, 2))[:, :T]


# ==========================================================================================================
# Part III: the model
# ==========================================================================================================

# ----------------------------------------------------------------------------------------------------------
# Tables: what the words and letters of GPTConfig stand for

class Letter(NamedTuple):
    """A letter of layer_pattern or ffn_pattern."""
    meaning: str        # as --help and errors print it
    build: Callable     # (c, layer) -> a mixer, (c) -> a feed-forward

def attention(reach=no_window, **span):
    """A function (c, layer) -> an attention layer with this LayerSpan."""
    return lambda c, layer: ATTN[c.attn](c, layer, LayerSpan(**reach(c), **span))

POSITIONS = {
    'learned': LearnedPositions, 'sinusoidal': SinusoidalPositions, 'rope': RotaryPositions,
    'alibi': AlibiPositions, 'alibi_bf16': AlibiPositions, 'none': Positions,  # bf16: rounded as in Falcon
    'relative': RelativePositions,
}
NORMS = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm}
RESIDUAL = {'serial': Block, 'parallel': ParallelBlock, 'shared': SharedBlock, 'normed': NormedBlock,
            'attnres': AttentionResidualBlock, 'hyper': HyperBlock, 'mhc': ManifoldBlock}
ATTN = {'standard': Attention, 'mla': MLA, 'diff': DiffAttention, 'gau': GatedUnit}
MIXERS = {
    'a': Letter('attention', attention()),
    'w': Letter('attention within a window', attention(in_pattern, local=True)),
    'c': Letter('attention within chunks', attention(in_window, chunked=True)),
    'n': Letter('a without rope', attention(rotary=False)),
    'v': Letter('w without rope', attention(in_pattern, rotary=False)),
    'm': Letter('state space', lambda c, layer: SSM[c.ssm](c)),
    'r': Letter('recurrence', lambda c, layer: RNN[c.rnn](c, layer)), '-': Letter('none', lambda *_: None),
    'k': Letter('channel mixing', ChannelMix), 's': Letter('short convolution', ShortConv),
    'h': Letter('a and m in parallel', ParallelMixers), 'z': Letter('m behind a shared block', TiedMixer),
}
FFNS = {'f': Letter('dense', lambda c: dense(c, c.ffn_width)), 'e': Letter('experts', MoE),
        '-': Letter('none', lambda c: None)}
# the class, and the activation for a config
FFN = {
    'relu': (MLP, lambda c: F.relu),
    'gelu': (MLP, lambda c: F.gelu),
    'gelu_tanh': (MLP, lambda c: partial(F.gelu, approximate='tanh')),
    'relu2': (MLP, lambda c: relu2),
    'swiglu': (GatedMLP, lambda c: ops.swiglu),
    'geglu': (GatedMLP, lambda c: ops.geglu),
    'geglu_erf': (GatedMLP, lambda c: gated_by(F.gelu)),
    'reglu': (GatedMLP, lambda c: gated_by(F.relu)),
    'glu': (GatedMLP, lambda c: gated_by(torch.sigmoid)),
    'bilinear': (GatedMLP, lambda c: gated_by(nn.Identity())),
    'swiglu_clip': (GatedMLP, lambda c: partial(swiglu_clip, limit=c.ffn_limit, alpha=c.ffn_alpha)),
}


# ----------------------------------------------------------------------------------------------------------
# Configuration: sizes and choices. The numbers of a block are flags of its chapter, inherited here.

@flags()
class GPTConfig(NormFlags, RopeFlags, AttentionFlags, FFNFlags, BlockFlags, RelativeFlags, RopeScalingFlags,
                AttentionExtraFlags, PatternFlags, LatentFlags, GAUFlags, SSMFlags, RNNFlags, RecurrenceFlags,
                MoEFlags, ClippedFlags, ResidualFlags, NormedFlags, WideFlags, PredictFlags, EncoderFlags,
                EncoderDecoderFlags, ShortConvFlags, LayerFlags, TiedFlags, Flags):
    """Sizes and choices"""         # the defaults are GPT-2 124M
    block_size: int = 1024          # tokens of context in training; the limit of learned positions
    vocab_size: int = 50257         # tokens the model knows; training takes it from the dataset
    n_layer: int = 12               # blocks
    n_head: int = 12                # query heads
    n_embd: int = 768               # width of the residual stream
    layer_pattern: str = flag('a', MIXERS)      # mixer of each layer, one letter per layer, repeated
    ffn_pattern: str = flag('f', FFNS)          # feed-forward of each layer, one letter per layer, repeated
    # learned, sinusoidal, rope, alibi, alibi_bf16 (Falcon), relative (T5), none
    pos: str = flag('learned', POSITIONS)
    norm: str = flag('layernorm', NORMS)        # layernorm, rmsnorm
    norm_at: str = flag('pre', NORM_AT)     # pre (GPT-2), post (2017), output (OLMo 2), sandwich (Gemma 2)
    # serial, parallel (GPT-NeoX), shared (one norm: Falcon), normed (BLOOM), attnres (Kimi), hyper, mhc
    residual: str = flag('serial', RESIDUAL)
    attn: str = flag('standard', ATTN, layer_pattern='awcnvhz')     # standard, mla (DeepSeek), diff, gau
    # norm of q, k: True (per head), full (OLMo 2), heads (Cohere), layer (Persimmon), unit (Llama 4), after
    qk_norm: bool | str = flag(False, QK_NORM, layer_pattern='awcnvhz')
    ffn: str = flag('gelu', FFN, ffn_pattern='fe')  # activation; words with glu and clip are gated
    bias: bool = True               # biases of linear layers and layer norms; default of the *_bias flags
    tie: bool = True                # the output head shares its weight with the token embedding
    dropout: float = flag(0.0, least=0, below=1)    # rate, on the embedding, attention weights and branches
    zero_init: bool = False         # projections back to the residual stream start at zero
    logit_scale: float = 1.0        # factor on the logits
    logit_softcap: float | None = None  # caps the logits smoothly: cap * tanh(logits / cap)

    def rules(c):
        yield 'n_embd', c.pos != 'sinusoidal' or c.n_embd % 2 == 0, 'be even when pos=sinusoidal'
        yield ('pos', c.attends() or c.pos in ('learned', 'sinusoidal', 'none'),
               'be learned, sinusoidal or none when no layer attends')
        yield ('pos', c.pos != 'rope' or c.mixers() & set('awchz'),
               "be none when every layer that attends is an 'n' or 'v', which do not rotate")
        yield ('layer_pattern', c.pos == 'rope' or not c.mixers() & set('nv'),
               f"have 'a' for 'n' and 'w' for 'v' when pos={c.pos}, as rotation is all that tells them apart")

    def plan(self):
        """One (mixer letter, feed-forward letter) pair per layer."""
        return list(zip(self.layer_pattern * self.n_layer, self.ffn_pattern * self.n_layer))[:self.n_layer]

    def mixers(self):
        """The letters of layer_pattern that have a layer."""
        return set(self.layer_pattern[:self.n_layer])

    def ffns(self):
        return set(self.ffn_pattern[:self.n_layer])

    def attends(self):
        return bool(self.mixers() - set('mrks-'))


# ----------------------------------------------------------------------------------------------------------
# GPT

class GPT(nn.Module):
    """
    A decoder, an encoder or both. Each parameter is drawn from a generator seeded by (seed, its name), so two
    models that differ in one flag share every other weight bit for bit.
    """
    stream_dtype = None     # of the residual stream, under autocast; None: as the embedding

    def __init__(self, config: GPTConfig, seed: int | None = 1337):
        """seed=None leaves the parameters undrawn, for weights that are loaded next."""
        super().__init__()
        self.config = c = config
        self.wte = (BiasedEmbedding if c.embed_bias else Embedding)(c.vocab_size, c.embed_width)
        self.wpe = POSITIONS[c.pos](c)
        self.embed_scale = math.sqrt(c.n_embd) if c.embed_scale is True else c.embed_scale or 1.0
        self.ln_e = norm_if(c.embed_norm, c, c.embed_width)
        narrow = c.embed_width != c.n_embd
        self.embed_proj = Linear(c.embed_width, c.n_embd, bias=True) if narrow else nn.Identity()
        self.drop = nn.Dropout(c.dropout)
        self.encoder = Encoder(c, self.embed_scale) if c.n_encoder else None
        block, plan = CrossBlock if c.n_encoder else RESIDUAL[c.residual], c.plan()
        self.h = nn.ModuleList(block(c, *letters, layer) for layer, letters in enumerate(plan))
        self.further = nn.ModuleList(block(c, *plan[-1], c.n_layer + k) for k in range(c.n_predict - 1))
        self.tied = nn.ModuleList(TiedBlock(c) for _ in range(c.tied_blocks if 'z' in c.mixers() else 0))
        self.vte = Embedding(c.vocab_size, c.n_kv_head * c.head_dim) if c.value_embed else None
        self.ln_f = norm_if(c.norm_at != 'post', c)  # post-norm blocks have normalised already
        self.head_mlp = HeadMLP(c) if c.head_mlp else nn.Identity()
        self.lm_head = Linear(c.embed_width if c.head_mlp else c.n_embd, c.vocab_size, c.head_bias)
        if c.tie:
            self.lm_head.weight = self.wte.weight
        self.moes = tuple(module for module in self.modules() if isinstance(module, MoE))
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Draw every parameter on the CPU in fp32, from hash(seed, name)."""
        for name, p in self.named_parameters():
            digest = hashlib.sha256(f'{seed}:{name}'.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
            p.copy_(p.init(p.shape, generator))

    def forward(self, idx, targets=None, cache=None, pos=None, last_only=False, z_loss=0.0, parts=False,
                weights=None, source=None, starts=None):
        """
        idx (B,T) int64. pos (T,) or (B,T) int64: their positions, consecutive, negative for padding in front
        of a row (of an encoder: anywhere), below block_size where positions are learned; None: 0..T-1.
        cache: from new_cache; then pos may be None on its first call only. source (B,S) int64, -1 for
        padding: what an encoder reads (n_encoder), with a cache on its first call only. starts (B,T) bool:
        the first tokens of documents, which then see nothing of each other; a cache keeps the last one, with
        positions counted from its start.

        Without targets -> (logits (B,T,V), None), or (B,1,V) with last_only. With targets (B,T), -1 where
        there is none -> (None, mean cross entropy in nats); the logits are never stored. In training the loss
        includes what routers and further predictions add, and z_loss times the mean square of the logits'
        log-sum-exp (PaLM). weights (B,T): of the targets in that mean. parts=True: a dict of the loss and
        its parts, see `losses`.
        """
        if starts is not None and cache is not None:
            return read_documents(self, idx, cache, pos, starts, last_only)
        ctx = self.context(idx, pos, cache) if starts is None else context_of_documents(self, starts, pos)
        x = self.embed_proj(self.drop(self.ln_e(self.wpe(self.wte(idx) * self.embed_scale, place_of(ctx)))))
        if self.stream_dtype is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.stream_dtype)
        values = None if self.vte is None else self.vte(idx).unflatten(-1, (-1, self.config.head_dim))
        given = Given(x, values, RouterLosses(), Shelf(), getattr(self.wpe, 'table', None), tied=self.tied)
        if source is not None:
            given = remembered(self, given, source)
        for block, entry in zip(self.h, cache or [None] * len(self.h), strict=True):
            # empty, or each block would be compiled by itself
            own = given._replace(losses=RouterLosses())
            x = block(x, ctx._replace(given=own), entry)
            given.losses.terms.extend(own.losses.terms)
        if targets is not None:
            losses = self.losses(x, targets, ctx._replace(given=given), z_loss, weights)
            return None, losses if parts else losses['loss']
        logits, cap = self.lm_head(self.read_out(x[:, -1:] if last_only else x)), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap), None

    def context(self, idx, pos, cache):
        T = idx.shape[1]
        if pos is None:
            if cache is not None and not all(entry.empty for entry in cache):
                raise ValueError('pos=None must be the positions of these tokens, as the cache holds tokens '
                                 'already')
            if self.wpe.max_tokens is not None and T > self.wpe.max_tokens:
                raise ValueError(f'{T} tokens must be at most block_size={self.wpe.max_tokens}, where '
                                 'learned positions end; cut the text or train with pos=rope')
        # a first call of one token attends to all slots of the cache
        in_order = pos is None and (cache is None or T > 1)
        chunk = cache is not None and pos is not None and T > 1 and not torch.compiler.is_compiling()
        pos = torch.arange(T, device=idx.device) if pos is None else pos
        length = T if cache is None else min(entry.max_tokens for entry in cache)
        beyond = chunk and pos.max() >= length
        return Context(pos, in_order, self.wpe.rope(pos, length), reach=length if beyond else None)

    def read_out(self, x):
        """The last block's output (B,T,C) -> the input of the head"""
        x, scale = self.head_mlp(self.ln_f(x)), self.config.logit_scale
        return x if scale == 1 else x * scale

    def losses(self, x, targets, ctx, z_loss, weights=None):
        """
        The last block's output (B,T,C) and targets (B,T) -> {'loss': the sum, 'cross_entropy': of the next
        token (with its z-loss), 'mtp': of the tokens after it, 'router': of the experts}
        """
        cross_entropy = self.cross_entropy(x, targets, z_loss if self.training else 0.0, weights)
        losses = {'loss': cross_entropy, 'cross_entropy': cross_entropy, 'mtp': 0.0, 'router': 0.0}
        if self.training:
            losses['mtp'] = further_losses(self, x, targets, ctx, z_loss)
            losses['router'] = sum(ctx.given.losses.terms)
            losses['loss'] = cross_entropy + (losses['mtp'] + losses['router'])
        return losses

    def cross_entropy(self, x, targets, z_loss, weights=None):
        x, weights = self.read_out(x).flatten(0, 1), None if weights is None else weights.flatten()
        return ops.linear_cross_entropy(x, self.lm_head.weight, targets.flatten(), self.config.logit_softcap,
                                        z_loss, self.lm_head.bias, weights)

    def new_cache(self, batch_size: int, max_tokens: int, spare: int = 0) -> list:
        """
        An empty cache, one entry per layer, for batch_size sequences of max_tokens, in the activations'
        dtype. Tokens beyond max_tokens push out the oldest. spare: how many tokens may be rolled back.
        """
        check_counts(1, batch_size=batch_size, max_tokens=max_tokens)
        check_counts(0, spare=spare)
        if not self.config.causal:
            raise ValueError('causal=False must do without a cache: an encoder reads its whole text at once')
        weight = self.wte.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return [block.new_cache(batch_size, max_tokens, dtype, weight.device, spare) for block in self.h]

    # -- counting

    def num_params(self, active: bool = False) -> int:
        """Parameters, a tied head counted once. active=True: those that one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        if not active:
            return total
        further = set(self.further.modules())
        idle = sum(moe.idle() for moe in self.moes if moe not in further)
        return total - sum(p.numel() for p in self.further.parameters()) - idle

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per token, forward and backward, in sequences of T (PaLM, appendix B)."""
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        matmul += len(self.further) * self.lm_head.weight.numel()  # the further predictions share the head
        mixers = sum(block.flops(T) for block in self.modules() if isinstance(block, Block))
        return 6 * matmul + mixers + sum(moe.flops() for moe in self.moes)

    # -- for the training loop

    def balance_experts(self, moves=1) -> dict:
        """Call once per optimizer step, on every process; moves=0 where that is skipped. See `balance`."""
        return balance(self.moes, moves) if self.moes else {}

    def param_kinds(self) -> dict[str, str]:
        """
        {parameter name: 'matrix', 'experts', 'embedding' or 'vector'}, for optimizers: `group` of the module
        that owns a weight. All else is a vector: Mamba's A_log, a matrix, must not decay.
        """
        kinds = {}
        for name, _ in self.named_parameters():
            owner, _, leaf = name.rpartition('.')
            owner = self.get_submodule(owner)
            kind = 'embedding' if owner is self.lm_head else getattr(owner, 'group', 'vector')
            kinds[name] = kind if leaf == 'weight' else 'vector'
        return kinds

    # -- in nanoblocks/, imported on use

    @classmethod
    def from_pretrained(cls, name: str, dtype='float32', **overrides) -> 'GPT':
        """
        The model of a folder or hub repository in Hugging Face format, or of a nanoGPT checkpoint.
        overrides: flags to change; weights that still fit are kept.
        """
        from nanoblocks import pretrained
        return pretrained.from_pretrained(name, dtype, **overrides)

    def save_pretrained(self, folder: str, **options):
        """Write a folder for transformers. Options: dtype=, max_shard_size= of nanoblocks.pretrained's."""
        from nanoblocks import pretrained
        pretrained.save_pretrained(self, folder, **options)

    def generate(self, idx, max_new_tokens: int, *args, **options) -> torch.Tensor:
        """Continue idx (B,T) int64 -> (B,T+new) int64. Options: nanoblocks.decoding.decode.stream."""
        from nanoblocks.decoding import decode
        return decode.generate(self, idx, max_new_tokens, *args, **options)

    def stream(self, idx, max_new_tokens: int, *args, **options) -> Iterator[torch.Tensor]:
        """As generate, yielding each new token (B,1) as it is drawn."""
        from nanoblocks.decoding import decode
        return decode.stream(self, idx, max_new_tokens, *args, **options)
