"""
GPT-2 and the blocks of newer decoders, each behind one flag of GPTConfig.

Reads top to bottom: configuration, positions, norms, caches, attention, state space,
feed-forward, block, GPT, sampling. A config string is looked up once in a table
(POSITIONS, NORMS, NORM_AT, ATTN, MIXERS, FFN, ...) while the layer is built, so no forward
asks which model this is. Every layer is `mixer(x, ctx, cache)`, then `ffn(x, ctx)`.

Shapes: B batch, T tokens of this call, S slots or keys, C n_embd, H query heads, K key/value heads,
D head_dim, I ffn or inner width, N tokens of all sequences, E experts, R latent width, V vocabulary.
"""
import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels as ops
from configurator import SET, Flags, flag, flags

# ----------------------------------------------------------------------------------------------------------
# Configuration


class Linear(nn.Linear):
    """nn.Linear, drawn later and by name (GPT.init_weights). std is that of its weight."""

    def __init__(self, n_in, n_out, bias, std=0.02):
        self.std = std
        super().__init__(n_in, n_out, bias)

    def reset_parameters(self):
        pass  # nn.Linear's own draw would cost time and move the global generator

    def draw(self, leaf, generator):
        p = getattr(self, leaf)
        return (torch.zeros(p.shape) if leaf == 'bias'
                else torch.randn(p.shape, generator=generator) * self.std)


def out_std(c):
    """GPT-2 shrinks what writes to the residual stream, so that 2 n_layer branches sum to variance one."""
    return 0.0 if c.zero_init else 0.02 / math.sqrt(2 * c.n_layer)


def out_proj(c, n_in, bias):
    """A projection back to the residual stream."""
    return Linear(n_in, c.n_embd, bias, std=out_std(c))


class Embedding(nn.Embedding):
    """nn.Embedding, drawn later and by name."""

    def reset_parameters(self):
        pass

    def draw(self, leaf, generator):
        return torch.randn(self.weight.shape, generator=generator) * 0.02


# ----------------------------------------------------------------------------------------------------------
# Positions. A layer never counts tokens: what it needs to know of order is computed from `pos`.


class Context(NamedTuple):
    """What all layers of one forward share."""
    pos: torch.Tensor   # (T,) or (B,T) int64; negative marks padding, which nobody attends to
    causal: bool        # tokens 0..T-1 and nothing cached, so the mask is the plain triangle
    rope: tuple | None  # cos and sin of every token's angles, each (T,D/2) or (B,T,D/2) fp32: a pair of
                        # them for most layers, another for windowed ones
    embedding: torch.Tensor | None = None  # embed_skip: what the blocks mix back in, (B,T,C)
    values: torch.Tensor | None = None     # value_embed: what attention adds to its values, (B,T,K,D)
    losses: list | None = None             # what layers add to the training loss


class Frequencies(nn.Module):
    """
    What turns positions into angles: one frequency per pair of coordinates,
    in fp32 whatever the model is cast to.
    """

    def __init__(self, freq):
        super().__init__()
        # kept as the integers of the same bits, because model.to(bfloat16) would round a buffer of floats
        self.register_buffer('bits', freq.float().view(torch.int32), persistent=False)

    def angles(self, pos):
        """pos (...,T) -> (...,T,width/2) fp32"""
        return pos.unsqueeze(-1) * self.bits.view(torch.float32)


class Positions(nn.Module):
    """
    Positions have three ways into the model: the embedding, the rotation and the bias of attention.
    This takes none.
    """
    of_attention = False    # they reach attention, by rotation or bias, and nothing else
    max_tokens = None       # no limit on how far positions reach
    longest = math.inf      # texts beyond this turn otherwise, their first tokens included

    def __init__(self, c):
        super().__init__()

    def forward(self, x, pos):
        return x

    def rope(self, pos, length=0):
        return None


class LearnedPositions(Positions):
    """One vector per position, added to the embedding (GPT-2). There are block_size of them and no more."""

    def __init__(self, c):
        super().__init__(c)
        self.max_tokens = c.block_size
        self.weight = nn.Parameter(torch.empty(c.block_size, c.n_embd))

    def forward(self, x, pos):
        if pos.is_cpu and not torch.compiler.is_compiling() and pos.max() >= self.max_tokens:
            raise ValueError(f'pos={pos.max()} must be below block_size={self.max_tokens}, where learned '
                             'positions end')
        return x + F.embedding(pos.clamp(min=0), self.weight)

    draw = Embedding.draw


class SinusoidalPositions(Positions):
    """Fixed sines and cosines, added to the embedding (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    def __init__(self, c):
        super().__init__(c)
        self.freq = Frequencies(10000.0 ** (-torch.arange(0, c.n_embd, 2, dtype=torch.float64) / c.n_embd))

    def forward(self, x, pos):
        angle = self.freq.angles(pos)                                           # (...,T,C/2)
        wave = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)      # (...,T,C)
        return x + wave.to(x.dtype)


class AlibiPositions(Positions):
    """A bias on the scores that falls linearly with distance (Press et al. 2022); Scores adds it."""
    of_attention = True


def alibi_slopes(n_head):
    """2^(-8/n), 2^(-16/n), ... for n heads; other numbers than powers of two take more from twice as many."""
    n = 2 ** int(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    return torch.tensor(slopes + [2 ** (-4 * (2 * i + 1) / n) for i in range(n_head - n)])


def alibi(slopes, scale, pos, key_pos):
    """slopes (H,1,1), pos (...,T), key_pos (...,S) -> the bias, (1 or B,H,T,S) fp32"""
    distance = key_pos.unsqueeze(-2) - pos.unsqueeze(-1)  # (...,T,S)
    return slopes * distance.view(-1, 1, *distance.shape[-2:])


def alibi_bf16(slopes, scale, pos, key_pos):
    """As Falcon was trained: slope and product rounded to bf16, then scaled as the scores are."""
    key = key_pos.view(-1, 1, 1, key_pos.shape[-1])
    return (slopes.bfloat16() * key).bfloat16().float() * scale


# the bias of attention that positions bring
ALIBI = {'alibi': alibi, 'alibi_bf16': alibi_bf16}


class RotaryPositions(Positions):
    """Rotates queries and keys by angles that grow with position (kernels/rope.py), see ROPE_SCALING."""
    of_attention = True

    def __init__(self, c):
        super().__init__(c)
        self.frequencies, self.magnitude = partial(ROPE_SCALING[c.rope_scaling], c), rope_magnitude(c)
        self.freq = Frequencies(self.frequencies(0))
        self.local = Frequencies(rope_plain(c, 0, c.rope_local_theta)) if c.rope_local_theta else None
        if c.rope_scaling in ROPE_BY_LENGTH:
            self.longest = c.rope_context

    def rope(self, pos, length=0):
        """pos (...,T), of a text of `length` tokens in all -> the two pairs of Context.rope"""
        freq = self.freq
        if length > self.longest:
            freq = Frequencies(self.frequencies(length)).to(pos.device)
        angle = freq.angles(pos)  # (...,T,D/2)
        scaled = angle.cos() * self.magnitude, angle.sin() * self.magnitude
        if self.local is None:
            return scaled, scaled
        angle = self.local.angles(pos)
        return scaled, (angle.cos(), angle.sin())


def rope_width(c):
    """How many coordinates of a head turn."""
    return c.rope_head_dim if c.attn == 'mla' else round(c.head_dim * c.rope_fraction)


def rope_plain(c, length, theta=None):
    """theta^(-2j/D) for pair j of D/2 -> (D/2,) fp64. length: tokens in all."""
    width = rope_width(c)
    return (theta or c.rope_theta) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rope_linear(c, length):
    """Position interpolation (Chen et al. 2023): everything turns rope_factor times more slowly."""
    return rope_plain(c, length) / c.rope_factor


def rope_ntk(c, length, factor=None):
    """NTK-aware (bloc97 2023): a larger base: the slowest pair is stretched, the fastest is kept."""
    width = rope_width(c)
    stretch = (factor or c.rope_factor) ** (width / max(1, width - 2))
    return rope_plain(c, length, c.rope_theta * stretch)


def rope_dynamic(c, length):
    """
    NTK-aware with the factor that this length needs, and none up to rope_context. All keys must turn alike,
    so with a cache the length is that which the cache was made for.
    """
    over = max(1.0, length / c.rope_context)
    return rope_ntk(c, length, c.rope_factor * over - (c.rope_factor - 1))


def rope_yarn(c, length):
    """
    YaRN (Peng et al. 2023): interpolates the slow pairs, keeps the fast ones, with a ramp over the pairs in
    between (the released code's; the paper's formula ramps over turns).
    """
    freq, width = rope_plain(c, length), rope_width(c)

    def pair(turns):  # which pair makes that many turns in the trained context
        return width * math.log(c.rope_context / (2 * math.pi * turns)) / (2 * math.log(c.rope_theta))
    low, high = pair(c.rope_beta_fast), pair(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq * (1 - ramp) + freq / c.rope_factor * ramp


def rope_llama3(c, length):
    """Llama 3.1: as YaRN, but the ramp is over the turns that a pair makes in the trained context."""
    freq = rope_plain(c, length)
    turns = c.rope_context * freq / (2 * math.pi)
    keep = ((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq)).clamp(0, 1)
    return freq * keep + freq / c.rope_factor * (1 - keep)


def rope_longrope(c, length):
    """LongRoPE (Ding et al. 2024): a searched divisor per pair, one set up to rope_context, one beyond."""
    divisors = c.rope_long if length > c.rope_context else c.rope_short
    return rope_plain(c, length) / torch.tensor(divisors, dtype=torch.float64)


def rope_magnitude(c):
    """What cos and sin are multiplied by: scores of longer texts are made sharper."""
    if c.rope_attention_factor is not None:
        return c.rope_attention_factor
    if c.rope_scaling == 'longrope':
        return math.sqrt(1 + math.log(c.rope_factor) / math.log(max(2, c.rope_context)))
    # MLA turns a part of each key only: there the whole score is scaled (DeepSeek V2)
    return yarn_sharpness(c) if c.attn != 'mla' else 1.0


def yarn_sharpness(c):
    return 0.1 * math.log(c.rope_factor) + 1 if c.rope_scaling == 'yarn' else 1.0


ROPE_SCALING = {
    'none': rope_plain, 'linear': rope_linear, 'ntk': rope_ntk, 'dynamic': rope_dynamic, 'yarn': rope_yarn,
    'llama3': rope_llama3, 'longrope': rope_longrope,
}
# the scalings that ask how long the trained context was, and how long this text is
ROPE_CONTEXT = ('dynamic', 'yarn', 'llama3', 'longrope')
ROPE_BY_LENGTH = ('dynamic', 'longrope')
POSITIONS = {
    'learned': LearnedPositions, 'sinusoidal': SinusoidalPositions, 'rope': RotaryPositions,
    'alibi': AlibiPositions, 'alibi_bf16': AlibiPositions, 'none': Positions,
}


def wide(x):
    """x in fp32, or fp64 if it is: for what rounding would spoil, as scores, step sizes and decays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------------------
# Norms


class LayerNorm(nn.Module):
    """Mean and variance normalised (Ba et al. 2016). Has a bias where the linear layers have one."""

    def __init__(self, width, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if c.norm_bias else None
        self.eps = c.norm_eps

    def draw(self, leaf, generator):
        p = getattr(self, leaf)
        return torch.zeros(p.shape) if leaf == 'bias' else torch.ones(p.shape)

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Only the scale normalised, no mean and no bias (kernels/rms_norm.py)."""

    def __init__(self, width, c, eps=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps or c.norm_eps

    draw = LayerNorm.draw

    def forward(self, x):
        return ops.rms_norm(x, self.weight, self.eps)


NORMS = {'layernorm': LayerNorm, 'rmsnorm': RMSNorm}

#                 before the branch, on its output, on the sum: out = sum(x + output(branch(before(x))))
NORM_AT = {
    'pre':      (True, False, False),
    'post':     (False, False, True),
    'output':   (False, True, False),
    'sandwich': (True, True, False),
}


def norm_if(wanted, width, c):
    return NORMS[c.norm](width, c) if wanted else nn.Identity()


# ----------------------------------------------------------------------------------------------------------
# Caches


class TokenCache:
    """
    What one layer keeps of past tokens: `slots` slots, each with the position it holds (-1: none) and one row
    of every tensor in `widths`. The mask is computed from those positions, so a slot may hold any token: the
    slot of a position is pos % slots.

    The caller owns the clock: it says where tokens belong, and positions within one call must be consecutive.
    Going back is writing positions anew: what stands behind them is not seen, and overwritten in its turn.
    """

    def __init__(self, batch_size, slots, widths, dtype, device, max_tokens=math.inf, spare=0):
        """spare: of the slots of a ring, those beyond what one token sees, so that it can go so far back."""
        self.max_tokens = max_tokens  # of a sequence; more would push out what should be seen
        # tokens that can be stored before they are read, and overwrite nothing that any of them sees
        self.at_once = max_tokens if slots >= max_tokens else 1 + spare
        self.pos = torch.full((batch_size, slots), -1, dtype=torch.int32, device=device)  # (B,S)
        self.rows = [torch.zeros(batch_size, slots, *w, dtype=dtype, device=device)       # (B,S,...)
                     for w in widths]
        self.empty = True

    def update(self, pos, *new):
        """
        Store `new`, tensors (B,T,...) that belong at pos (T,) or (B,T). Returns (pos, tensors) of all that
        these tokens may attend to: slots of the cache, or on a first call the new tensors themselves, so that
        a prefill is the training path.
        """
        if new[0].shape[1] > self.max_tokens:
            raise ValueError(f'{new[0].shape[1]} tokens must be at most the {self.max_tokens} that this '
                             'cache was made for: make a larger one')
        new = [n.to(r.dtype) for n, r in zip(new, self.rows)]
        pos_BT = pos.to(torch.int32).expand(new[0].shape[:2])
        if self.empty and pos_BT.shape[1] > 1:
            seen = (pos_BT, *new)
        elif pos_BT.shape[1] <= self.at_once:
            seen = (self.pos, *self.rows)
        else:
            # a copy of the old is made before it is overwritten;
            # what the new tokens replace must not be seen twice
            old = torch.where(self.pos >= pos_BT[:, :1], -1, self.pos)
            seen = (torch.cat((old, pos_BT), 1), *(torch.cat((r, n), 1) for r, n in zip(self.rows, new)))
        self._write(pos_BT, new)
        return seen[0], seen[1:]

    def _write(self, pos_BT, new):
        slots = self.pos.shape[1]
        pos_BT, new = pos_BT[:, -slots:], [n[:, -slots:] for n in new]
        slot = pos_BT.long() % slots
        row = torch.arange(slot.shape[0], device=slot.device).unsqueeze(1)
        self.pos[row, slot] = pos_BT
        for r, n in zip(self.rows, new):
            r[row, slot] = n
        self.empty = False

    def reset(self):
        """Forget everything, keep the memory."""
        self.pos.fill_(-1)
        self.empty = True

    def expand(self, n):
        """Every sequence n times, next to each other: one prompt, n continuations."""
        self.pos = self.pos.repeat_interleave(n, 0)
        self.rows = [r.repeat_interleave(n, 0) for r in self.rows]

    def snapshot(self):
        """What `restore` needs to take back the tokens that follow: nothing, as positions are rewritten."""

    def restore(self, snapshot):
        pass

    def nbytes(self):
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.pos, *self.rows))


class StateCache:
    """
    What one recurrent layer keeps of past tokens, as much for one as for a million: the last inputs of its
    convolution, and its state. The state is fp32 (fp64 in an fp64 model): it is a sum over all tokens, and in
    bf16 late ones would be rounded away.
    """

    def __init__(self, batch_size, tail, state, dtype, device):
        wide = torch.promote_types(dtype, torch.float32)
        self.tail = torch.zeros(batch_size, *tail, dtype=dtype, device=device)      # (B,W-1,I)
        self.state = torch.zeros(batch_size, *state, dtype=wide, device=device)     # (B,I,N) or (B,H,P,N)
        self.empty = True

    def read(self):
        """(tail, state), both None before the first token, so that a prefill is the training path."""
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
        """Every sequence n times, next to each other: one prompt, n continuations."""
        self.tail, self.state = self.tail.repeat_interleave(n, 0), self.state.repeat_interleave(n, 0)

    def snapshot(self):
        """What `restore` needs to take back the tokens that follow."""
        return self.tail.clone(), self.state.clone()

    def restore(self, snapshot):
        self.write(*snapshot)

    def nbytes(self):
        """Bytes allocated."""
        return self.tail.nbytes + self.state.nbytes


# ----------------------------------------------------------------------------------------------------------
# Attention


def visible(pos, key_pos, window=None):
    """
    True where the query at pos (T,) or (B,T) may see the key at key_pos (S,) or (B,S) -> (1 or B,1,T,S): no
    later key, none of padding, and with a window only its own token and the window - 1 before it.
    """
    query, key = pos.unsqueeze(-1), key_pos.unsqueeze(-2)  # (...,T,1), (...,1,S)
    mask = (key <= query) & (key >= 0)
    if window is not None:
        mask = mask & (key > query - window)
    return mask.view(-1, 1, *mask.shape[-2:])


def visible_in_chunk(pos, key_pos, size):
    """As visible, of the keys in the query's own chunk of `size` tokens (Llama 4)."""
    return visible(pos, key_pos, pos.unsqueeze(-1) % size + 1)


class Scores(nn.Module):
    """
    softmax(scale q k^T) v over what each query may see, with what the flags add to it: windows, ALiBi,
    soft-capped scores, sinks. Knows positions only, so the same lines serve training, prefill and decoding.
    """

    def __init__(self, c, n_head, width, kind):
        """kind: how far these layers see and whether they turn, a Kind. width: of a query and a key."""
        super().__init__()
        self.scale = (width ** -0.5 if c.attn_scale is None else c.attn_scale)
        self.window, self.visible = kind.window, kind.visible
        self.softcap, self.dropout, self.alibi = c.softcap, c.dropout, ALIBI.get(c.pos)
        # as Frequencies keeps its numbers, and for the same reason
        slopes = alibi_slopes(n_head).view(-1, 1, 1).view(torch.int32) if self.alibi else None
        self.register_buffer('slopes', slopes, persistent=False)
        self.sinks = nn.Parameter(torch.empty(n_head)) if c.sinks else None
        # what SDPA's own triangle is enough for, its fastest path, as long as the window covers it
        self.triangle = not self.alibi and not c.sinks and c.softcap is None
        # what kernels/attention.py knows
        self.kernels = self.visible is visible and self.alibi in (None, alibi)

    def draw(self, leaf, generator):
        return torch.randn(self.sinks.shape, generator=generator) * 0.02

    def forward(self, q, k, v, pos, key_pos, causal):
        """q (B,T,H,D), k (B,S,K,D), v (B,S,K,Dv), pos (T,) or (B,T), key_pos (S,) or (B,S) -> (B,T,H,Dv)"""
        slopes = None if self.slopes is None else self.slopes.view(torch.float32).view(-1)
        flags = pos, key_pos, self.scale, self.window, self.softcap, slopes, self.sinks
        T, window = q.shape[1], self.window or math.inf
        if self.kernels and not self.drop() and not (causal and self.triangle and window >= T):
            if not causal and ops.is_fused('decode_attention', q, k, v, *flags):
                return ops.decode_attention(q, k, v, *flags)
            if ops.is_fused('attention', q, k, v, *flags, causal):
                return ops.attention(q, k, v, *flags, causal)
        if causal and T >= 2 * window:
            return self.blockwise(q, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if causal and self.triangle and window >= T:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale,
                                               dropout_p=self.drop(), enable_gqa=q.shape[1] != k.shape[1])
        else:
            y = self.masked(q, k, v, pos, key_pos)
        return y.transpose(1, 2)

    def drop(self):
        return self.dropout if self.training else 0.0

    def masked(self, q, k, v, pos, key_pos):
        """
        q (B,H,T,D), k (B,K,S,D), v (B,K,S,Dv) -> (B,H,T,Dv).
        A query that may look nowhere gets finite numbers.
        """
        bias = self.visible(pos, key_pos, self.window)  # (1 or B,1,T,S)
        # values narrower than their keys are latents, of which SDPA would make copies, one for each head
        plain = self.softcap is not None or v.shape[-1] < k.shape[-1]
        if plain or not self.triangle:
            # a large finite number: rows of padding see nothing, and infinities would make them NaN
            bias = torch.zeros(bias.shape, device=q.device).masked_fill_(
                ~bias, torch.finfo(torch.float32).min / 2)
        if self.alibi is not None:
            bias = bias + self.alibi(self.slopes.view(torch.float32), self.scale, pos, key_pos)
        if self.sinks is not None:
            # one more key with score sinks and value zero
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            sink = wide(self.sinks).view(1, -1, 1, 1).expand(bias.shape[0], -1, bias.shape[2], 1)
            bias = torch.cat((bias.expand(-1, sink.shape[1], -1, -1), sink), dim=-1)
        if plain:
            return self.plain(q, k, v, bias)
        if bias.dtype != torch.bool:
            least = max(torch.finfo(q.dtype).min, torch.finfo(bias.dtype).min)
            bias = bias.clamp(min=least).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale,
                                              dropout_p=self.drop(), enable_gqa=q.shape[1] != k.shape[1])

    def plain(self, q, k, v, bias):
        """As masked, by the definition, with soft-capped scores (Gemma 2); bias is added after the cap."""
        (B, H, T, _), K, S = q.shape, *k.shape[1:3]
        # the query heads that share a key are rows of one product, which reads it once
        scores = wide(q.reshape(B, K, H // K * T, -1) @ k.transpose(-1, -2)).view(B, H, T, S) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        probs = F.dropout((scores + bias).softmax(-1), self.drop()).to(v.dtype)
        return (probs.view(B, K, H // K * T, S) @ v).view(B, H, T, -1)

    def blockwise(self, q, k, v):
        """
        Tokens 0..T-1 under a window W in blocks of queries, each with the keys of its own block and as many
        blocks before it as the window reaches: about T * 1.5 W scores in place of T * T. The blocks become a
        batch, and `masked` does the rest. Shapes as in forward.
        """
        B, T = q.shape[:2]
        # of a block: smaller ones waste fewer scores, and have more overhead
        size = self.window if self.window <= 128 or self.visible is visible_in_chunk else self.window // 2
        # blocks that the window reaches back
        back = 0 if self.visible is visible_in_chunk else -(-(self.window - 1) // size)
        pad = -T % size
        if pad:
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        pos = torch.arange(T + pad, device=q.device).view(-1, size)
        # what lies before the first token has negative positions, which nobody sees
        key_pos = torch.cat([pos - i * size for i in range(back, -1, -1)], dim=1)
        q = q.unflatten(1, (-1, size)).flatten(0, 1)                            # (Bn,size,H,D)
        k, v = ops.spans(k, size, back), ops.spans(v, size, back)               # (Bn,(back+1)size,K,D)
        y = self.masked(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                        pos.repeat(B, 1), key_pos.repeat(B, 1))
        return y.transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


class WidthNorm(RMSNorm):
    """RMS norm over all heads together, as in OLMo 2. x (B,T,H,D)"""

    def forward(self, x):
        return super().forward(x.flatten(-2)).view(x.shape)


class HeadsNorm(nn.Module):
    """Layer norm of each head with a weight of its own and no bias, as in Cohere's models. x (B,T,H,D)"""

    def __init__(self, n_head, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_head, c.head_dim))
        self.eps = c.norm_eps

    draw = LayerNorm.draw

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class UnitNorm(nn.Module):
    """RMS norm without a weight, as in Llama 4."""

    def __init__(self, c):
        super().__init__()
        self.eps = c.norm_eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


#          the norm of a query or key of so many heads before it turns, and after
QK_NORM = {
    False: lambda c, n_head: (nn.Identity(), nn.Identity()),
    True: lambda c, n_head: (RMSNorm(c.head_dim, c), nn.Identity()),
    'full': lambda c, n_head: (WidthNorm(n_head * c.head_dim, c), nn.Identity()),
    'heads': lambda c, n_head: (HeadsNorm(n_head, c), nn.Identity()),
    'unit': lambda c, n_head: (nn.Identity(), UnitNorm(c)),
}


class Kind(NamedTuple):
    """What differs between the layers that attend."""
    window: int | None = None       # tokens that are kept
    visible: Callable = visible     # which of them a query sees
    rotary: bool = True             # queries and keys turn
    local: bool = False             # at the frequencies of windowed layers


class Attention(nn.Module):
    """
    Causal self-attention: multi-head, grouped-query (Ainslie et al. 2023) or multi-query (Shazeer 2019).
    """
    n_maps = 1  # query heads that share an output head

    def __init__(self, c, layer, kind):
        super().__init__()
        self.heads, self.head_dim, self.window = (c.n_head, c.n_kv_head, c.n_kv_head), c.head_dim, kind.window
        self.rotary, self.local = kind.rotary and c.pos == 'rope', kind.local
        # query, key and value, side by side
        self.c_attn = Linear(c.n_embd, sum(self.heads) * c.head_dim, c.qkv_bias)
        self.c_proj = out_proj(c, c.n_head * c.head_dim, c.proj_bias)
        self.clip = c.qkv_clip
        (self.q_norm, self.q_unit), (self.k_norm, self.k_unit) = (
            QK_NORM[c.qk_norm](c, n) for n in (c.n_head, c.n_kv_head))
        self.norm_in_rope = self.rotary and c.qk_norm is True  # one operation for both
        self.scores = Scores(c, c.n_head // self.n_maps, c.head_dim, kind)
        self.value_scale = nn.Parameter(torch.empty(1)) if c.value_embed else None
        self.temperature = None if self.rotary or c.temp_scale is None else (c.temp_scale, c.temp_floor)

    def draw(self, leaf, generator):
        return torch.full((1,), 0.5)

    def qkv(self, x, ctx):
        """x (B,T,C) -> query (B,T,H,D), key and value (B,T,K,D), normed and rotated"""
        x = self.c_attn(x)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        q, k, v = x.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.norm_in_rope else ()
        if not norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = ops.rope_qk(q, k, *ctx.rope[self.local], *norms)
            q, k = self.q_unit(q), self.k_unit(k)
        if self.temperature is not None:
            scale, floor = self.temperature
            steps = ((ctx.pos.clamp(min=0) + 1) / floor).floor()                # (T,) or (B,T)
            q = q * (1 + scale * torch.log1p(steps)).to(q.dtype).unsqueeze(-1).unsqueeze(-1)
        if self.value_scale is not None:
            v = v + self.value_scale * ctx.values
        return q, k, v

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        q, k, v = self.qkv(x, ctx)
        key_pos = ctx.pos
        if cache is not None:
            key_pos, (k, v) = cache.update(ctx.pos, k, v)
        return self.c_proj(self.attend(q, k, v, ctx, key_pos).flatten(2))

    def attend(self, q, k, v, ctx, key_pos):
        return self.scores(q, k, v, ctx.pos, key_pos, ctx.causal)

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        widths = [(self.heads[1], self.head_dim)] * 2
        slots = min(max_tokens, self.window + spare if self.window else max_tokens)
        return TokenCache(batch_size, slots, widths, dtype, device, max_tokens, spare)

    def flops(self, T):
        """Floating-point operations per token, forward and backward, of the scores and the weighted sum."""
        return 6 * self.heads[0] * (1 + self.n_maps) * self.head_dim * min(T, self.window or T)


class DiffAttention(Attention):
    """
    Differential attention (Ye et al. 2024, https://arxiv.org/abs/2410.05258): heads come in pairs that share
    a value of twice the width, and the second one's attention is subtracted, lambda times, to cancel what
    both see.
    """
    n_maps = 2

    def __init__(self, c, layer, kind):
        super().__init__(c, layer, kind)
        # the paper's schedule, by depth from 0
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambdas = nn.Parameter(torch.empty(4, c.head_dim))  # q1, k1, q2, k2
        self.head_norm = RMSNorm(2 * c.head_dim, c)

    def draw(self, leaf, generator):
        return torch.randn(self.lambdas.shape, generator=generator) * 0.1

    def attend(self, q, k, v, ctx, key_pos):
        """q (B,T,H,D), k and v (B,S,K,D) -> (B,T,H/2,2D)"""
        v = v.unflatten(2, (-1, 2)).flatten(-2)                                 # (B,S,K/2,2D)
        first, second = (self.scores(q[:, :, i::2], k[:, :, i::2], v, ctx.pos, key_pos, ctx.causal)
                         for i in (0, 1))
        return self.head_norm(first - self.weight().to(first.dtype) * second) * (1 - self.start)

    def weight(self):
        """lambda = exp(q1 . k1) - exp(q2 . k2) + its start"""
        q1, k1, q2, k2 = wide(self.lambdas)
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.start


class MLA(nn.Module):
    """
    Multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434): keys and
    values of all heads are expanded from one latent of kv_rank numbers a token. The cache
    holds that latent, and one rotated key of rope_head_dim numbers that all heads share.

    Tokens that see only themselves (training, prefill) expand the latent. Tokens that read the cache do not:
    the expansion is absorbed into query and output, q . (W_k latent) = (W_k^T q) . latent, so all heads
    attend to one shared key of kv_rank + rope_head_dim, whose first part is the value as well.
    """

    def __init__(self, c, layer, kind):
        super().__init__()
        self.n_head, self.window = c.n_head, kind.window
        self.rotary, self.local = kind.rotary and c.pos == 'rope', kind.local
        self.widths = c.head_dim, c.rope_head_dim  # of a query and key: Dn that do not turn, Dr that do
        self.rank, self.v_head_dim = c.kv_rank, c.v_head_dim
        width = sum(self.widths)
        self.q_down = Linear(c.n_embd, c.q_rank, c.qkv_bias) if c.q_rank else nn.Identity()
        self.q_norm = RMSNorm(c.q_rank, c, c.latent_eps) if c.q_rank else nn.Identity()
        self.q_up = Linear(c.q_rank or c.n_embd, c.n_head * width, bias=False)
        self.kv_down = Linear(c.n_embd, c.kv_rank + c.rope_head_dim, c.qkv_bias)  # latent and rotated key
        self.kv_norm = RMSNorm(c.kv_rank, c, c.latent_eps)
        self.kv_up = Linear(c.kv_rank, c.n_head * (c.head_dim + c.v_head_dim), bias=False)
        self.c_proj = out_proj(c, c.n_head * c.v_head_dim, c.proj_bias)
        self.scores = Scores(c, c.n_head, width, kind)
        if c.rope_attention_factor is None and c.attn_scale is None:
            self.scores.scale *= yarn_sharpness(c) ** 2

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        q, turned = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.n_head, -1)).split(
            self.widths, dim=-1)
        latent, key = self.kv_down(x).split((self.rank, self.widths[1]), dim=-1)    # (B,T,R), (B,T,Dr)
        latent, key = self.kv_norm(latent), key.unsqueeze(2)
        if self.rotary:
            turned, key = (ops.rope(t, *ctx.rope[self.local]) for t in (turned, key))
        shared, key_pos = torch.cat((latent, key.squeeze(2)), dim=-1), ctx.pos     # (B,T,R+Dr)
        attend = self.expanded
        if cache is not None:
            attend = self.expanded if ctx.causal else self.absorbed
            key_pos, (shared,) = cache.update(ctx.pos, shared)
        return self.c_proj(attend(q, turned, shared, ctx, key_pos).flatten(2))

    def expanded(self, q, turned, shared, ctx, key_pos):
        """q (B,T,H,Dn), turned (B,T,H,Dr), shared (B,S,R+Dr) -> (B,T,H,Dv)"""
        latent, key = shared.split((self.rank, self.widths[1]), dim=-1)
        k, v = self.kv_up(latent).unflatten(-1, (self.n_head, -1)).split(
            (self.widths[0], self.v_head_dim), dim=-1)
        k = torch.cat((k, key.unsqueeze(2).expand(-1, -1, self.n_head, -1)), dim=-1)
        return self.scores(torch.cat((q, turned), dim=-1), k, v, ctx.pos, key_pos, ctx.causal)

    def absorbed(self, q, turned, shared, ctx, key_pos):
        """The same from what is cached alone: one key for all heads, whose first part is the value."""
        up_k, up_v = self.kv_up.weight.view(self.n_head, -1, self.rank).split(
            (self.widths[0], self.v_head_dim), dim=1)
        q = torch.cat((torch.einsum('bthd,hdr->bthr', q, up_k), turned), dim=-1)
        key = shared.unsqueeze(2)  # (B,S,1,R+Dr)
        y = self.scores(q, key, key[..., :self.rank], ctx.pos, key_pos, ctx.causal)
        return torch.einsum('bthr,hdr->bthd', y, up_v)

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        slots = min(max_tokens, self.window + spare if self.window else max_tokens)
        widths = [(self.rank + self.widths[1],)]
        return TokenCache(batch_size, slots, widths, dtype, device, max_tokens, spare)

    def flops(self, T):
        """As Attention.flops, for keys of Dn + Dr and values of Dv."""
        return 6 * self.n_head * (sum(self.widths) + self.v_head_dim) * min(T, self.window or T)


ATTN = {'standard': Attention, 'mla': MLA, 'diff': DiffAttention}

# ----------------------------------------------------------------------------------------------------------
# State spaces


def close_gap(tail, x, pos):
    """
    tail (B,W-1,I) and the inputs x (B,T,I) behind it, where x may begin with padding: the same two, with the
    tail moved up to the first token. What stands before it then is read by padding only.
    """
    both, sizes = torch.cat((tail, x), dim=1), (tail.shape[1], x.shape[1])
    if x.shape[1] == 1:  # generating: the same in a third of the operations
        moved = torch.where((pos < 0).unsqueeze(-1), torch.cat((both[:, :1], tail), dim=1), both)
        return moved.split(sizes, dim=1)
    pad, slot = (pos < 0).sum(-1).view(-1, 1), torch.arange(sum(sizes), device=x.device)
    source = torch.where(slot < pad + sizes[0], slot - pad, slot).clamp(min=0)     # (1 or B,W-1+T)
    return both.gather(1, source.unsqueeze(-1).expand_as(both)).split(sizes, dim=1)


def step_size(dt, ctx, limits=(0.0, None)):
    """dt (B,T,...) through softplus, in fp32. Padding takes steps of size 0, which leave the state alone."""
    dt = F.softplus(wide(dt)).clamp(*limits)
    return dt if ctx.causal else dt.masked_fill((ctx.pos < 0).unsqueeze(-1), 0)


def draw_step_bias(shape, generator):
    """The bias whose softplus is spread evenly in log from 0.001 to 0.1 (Gu and Dao 2023, section 3.6)."""
    dt = 1e-3 * 100 ** torch.rand(shape, generator=generator)
    return dt + torch.log(-torch.expm1(-dt))


class CausalConv(nn.Module):
    """Each channel mixed over the last W tokens, then SiLU (kernels/causal_conv.py)."""

    def __init__(self, channels, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, c.ssm_conv))
        self.bias = nn.Parameter(torch.empty(channels)) if c.conv_bias else None

    def draw(self, leaf, generator):
        # as nn.Conv1d does: a std of 0.02 would all but silence the channels
        bound = self.weight.shape[1] ** -0.5
        return bound * (2 * torch.rand(getattr(self, leaf).shape, generator=generator) - 1)

    def forward(self, x, ctx, tail):
        """x (B,T,I), tail (B,W-1,I) or None -> (B,T,I) and the new tail"""
        if not ctx.causal:
            if tail is None:
                tail = x.new_zeros(x.shape[0], self.weight.shape[1] - 1, x.shape[2])
            tail, x = close_gap(tail, x, ctx.pos)
        y, tail = ops.causal_conv(x, self.weight, self.bias, tail)
        return F.silu(y), tail


class StepProjection(Linear):
    """Mamba-1's projection of a few numbers per token to a step size per channel."""

    def __init__(self, rank, channels):
        super().__init__(rank, channels, bias=True)

    def draw(self, leaf, generator):
        if leaf == 'bias':
            return draw_step_bias(self.bias.shape, generator)
        return self.in_features ** -0.5 * (2 * torch.rand(self.weight.shape, generator=generator) - 1)

    def forward(self, x):
        # the bias is as low as -7, where bf16 has steps of 3 %: it is added in fp32
        return wide(F.linear(x, self.weight)) + wide(self.bias)


class Mamba1(nn.Module):
    """
    Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752): convolution, selective scan, gate. Every
    channel has a state of its own, N numbers that decay at N rates; step size, input and read-out come from
    the token.
    """
    default_state = 16

    def __init__(self, c):
        super().__init__()
        inner, N, rank = c.ssm_expand * c.n_embd, c.ssm_state, c.ssm_dt_rank
        self.sizes = (rank, N, N)
        self.in_proj = Linear(c.n_embd, 2 * inner, c.ssm_bias)  # the input and its gate, side by side
        self.conv1d = CausalConv(inner, c)
        self.x_proj = Linear(inner, sum(self.sizes), bias=False)  # step size, B and C
        self.dt_proj = StepProjection(rank, inner)
        self.A_log, self.D = nn.Parameter(torch.empty(inner, N)), nn.Parameter(torch.empty(inner))
        self.c_proj = out_proj(c, inner, c.ssm_bias)
        # Jamba (Lieber et al. 2024, https://arxiv.org/abs/2403.19887) keeps large models stable with these
        self.dt_norm, self.b_norm, self.c_norm = (
            RMSNorm(size, c) if c.ssm_norm else nn.Identity() for size in self.sizes)

    @staticmethod
    def default_dt_rank(n_embd):
        return math.ceil(n_embd / 16)

    def draw(self, leaf, generator):
        # decay rates 1..N in every channel (S4D-Real); D passes the input through
        if leaf == 'A_log':
            return torch.arange(1.0, self.A_log.shape[1] + 1).log().expand(self.A_log.shape)
        return torch.ones(self.D.shape)

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        tail, state = (None, None) if cache is None else cache.read()
        x, gate = self.in_proj(x).chunk(2, dim=-1)                  # (B,T,I)
        x, tail = self.conv1d(x, ctx, tail)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)         # (B,T,R|N|N)
        dt = step_size(self.dt_proj(self.dt_norm(dt)), ctx)         # (B,T,I)
        A = -torch.exp(wide(self.A_log))
        y, state = ops.selective_scan(x, dt, A, self.b_norm(B), self.c_norm(C), self.D, state)
        if cache is not None:
            cache.write(tail, state)
        return self.c_proj(y * F.silu(gate))

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        """max_tokens is of no concern: the state has one size for any number of tokens."""
        (inner, N), W = self.A_log.shape, self.conv1d.weight.shape[1]
        return StateCache(batch_size, (W - 1, inner), (inner, N), dtype, device)

    def flops(self, T):
        """
        Floating-point operations per token, forward and backward, of what is no Linear: 6 for each number of
        the state, as the recurrence is defined (dt A, decay, input, sum, read-out and its sum), and 2 for
        each tap of the convolution. The backward pass counts twice; exp, softplus, SiLU and the gate do not
        count.
        """
        return 3 * (6 * self.A_log.numel() + 2 * self.conv1d.weight.numel())


class GatedRMSNorm(RMSNorm):
    """The gate first, then the scale of each group normalised: groups may live on different GPUs."""

    def __init__(self, width, groups, c):
        super().__init__(width, c)
        self.groups = groups

    def forward(self, x, gate):
        x = (x * F.silu(gate)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """
    Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060): the P channels of a head share one decay,
    which turns the scan into matrix products (kernels/ssd.py) and affords a larger N. B and C are projected
    beside x and pass through the convolution with it; the heads of a group share them, as queries share keys
    in GQA.
    """
    default_state = 128

    def __init__(self, c):
        super().__init__()
        inner, N, G, P = c.ssm_expand * c.n_embd, c.ssm_state, c.ssm_groups, c.ssm_head_dim
        heads = inner // P
        self.state, self.groups, self.limits = (heads, P, N), G, (c.ssm_dt_min, c.ssm_dt_max)
        self.split = (inner, G * N, G * N)
        # gate, (x, B, C), step size
        self.in_proj = Linear(c.n_embd, inner + sum(self.split) + heads, c.ssm_bias)
        self.conv1d = CausalConv(sum(self.split), c)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.norm = GatedRMSNorm(inner, G, c)
        self.c_proj = out_proj(c, inner, c.ssm_bias)

    def draw(self, leaf, generator):
        shape = self.D.shape
        if leaf == 'dt_bias':
            return draw_step_bias(shape, generator)
        if leaf == 'A_log':
            return torch.log(1 + 15 * torch.rand(shape, generator=generator))  # decay rates from 1 to 16
        return torch.ones(shape)

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        (H, P, N), G = self.state, self.groups
        tail, state = (None, None) if cache is None else cache.read()
        gate, x, dt = self.in_proj(x).split((H * P, sum(self.split), H), dim=-1)    # (B,T,I|I+2GN|H)
        x, tail = self.conv1d(x, ctx, tail)
        x, B, C = x.split(self.split, dim=-1)                                       # (B,T,I|GN|GN)
        dt = step_size(wide(dt) + wide(self.dt_bias), ctx, self.limits)             # (B,T,H)
        A = -torch.exp(wide(self.A_log))
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        y, state = ops.ssd(x, dt, A, B, C, self.D, state)                           # (B,T,H,P)
        if cache is not None:
            cache.write(tail, state)
        return self.c_proj(self.norm(y.flatten(2), gate))

    def new_cache(self, batch_size, max_tokens, dtype, device, spare=0):
        """max_tokens is of no concern: the state has one size for any number of tokens."""
        channels, W = self.conv1d.weight.shape
        return StateCache(batch_size, (W - 1, channels), self.state, dtype, device)

    def flops(self, T):
        """
        Floating-point operations per token, forward and backward, of what is no Linear: 5 for each number of
        the state, as the recurrence is defined (decay, input, sum, read-out and its sum; in chunks of 64,
        with N = 128 and P = 64, there are as many), and 2 for each tap of the convolution. The backward pass
        counts twice; exp, softplus, SiLU, the gate and its norm do not count.
        """
        return 3 * (5 * math.prod(self.state) + 2 * self.conv1d.weight.numel())


SSM = {'mamba1': Mamba1, 'mamba2': Mamba2}

# ----------------------------------------------------------------------------------------------------------
# Feed-forward


class MLP(nn.Module):
    """Two linear layers and an activation."""

    def __init__(self, c, act, width):
        super().__init__()
        self.c_fc = Linear(c.n_embd, self.fan_out(width), c.ffn_bias)
        self.c_proj = out_proj(c, width, c.ffn_bias)
        self.act = act

    def forward(self, x, ctx):
        """x (B,T,C) -> (B,T,C)"""
        return self.c_proj(self.act(self.c_fc(x)))

    @staticmethod
    def fan_out(width):
        return width

    @staticmethod
    def default_width(n_embd):
        return 4 * n_embd


class GatedMLP(MLP):
    """
    One half of the hidden layer gates the other (Shazeer 2020):
    three matrices, so 8/3 as wide for the same size.
    """

    @staticmethod
    def fan_out(width):
        return 2 * width  # gate and up, side by side

    @staticmethod
    def default_width(n_embd):
        # to a multiple that hardware likes and that stays within 1 % of 8/3
        multiple = 2 ** min(6, max(0, int(math.log2(n_embd / 16))))
        return max(1, round(8 * n_embd / 3 / multiple)) * multiple


def relu2(x):
    """So et al. 2021, https://arxiv.org/abs/2109.08668"""
    return F.relu(x).square()


def gated_by(act):
    def gated(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up
    return gated


def swiglu_clip(gate_up, limit, alpha):
    """gpt-oss (2025, https://arxiv.org/abs/2508.10925): both halves clamped, and up moved by one."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


# the class, and the activation that a config asks for
FFN = {
    'relu': (MLP, lambda c: F.relu),
    'gelu': (MLP, lambda c: F.gelu),
    'gelu_tanh': (MLP, lambda c: partial(F.gelu, approximate='tanh')),
    'relu2': (MLP, lambda c: relu2),
    'swiglu': (GatedMLP, lambda c: ops.swiglu),
    'geglu': (GatedMLP, lambda c: ops.geglu),
    'geglu_erf': (GatedMLP, lambda c: gated_by(F.gelu)),
    'reglu': (GatedMLP, lambda c: gated_by(F.relu)),
    'swiglu_clip': (GatedMLP, lambda c: partial(swiglu_clip, limit=c.ffn_limit, alpha=c.ffn_alpha)),
}


def dense(c, width):
    """A dense ffn of this hidden width."""
    cls, act = FFN[c.ffn]
    return cls(c, act(c), width)


def softmax_scores(logits):
    return logits.softmax(-1)


ROUTER = {'softmax': softmax_scores, 'sigmoid': torch.sigmoid}
#           a balancing loss, a bias on the choice
BALANCE = {'none': (False, False), 'aux': (True, False), 'bias': (False, True), 'both': (True, True)}


class MoE(nn.Module):
    """
    Mixture of experts (Shazeer et al. 2017): every token passes through the
    n_expert_used experts that a router scores highest, weighted by their scores.
    Tokens are sorted by expert and every expert takes all of its own: none is dropped.

    Balance: 'aux' adds a loss that is least when all experts are equally busy (Switch, Fedus et al. 2021);
    'bias' adds to the scores, for the choice alone, a bias that rises for idle experts (DeepSeek V3,
    arXiv 2412.19437), moved once per optimizer step by GPT.balance_experts.
    """

    def __init__(self, c, layer):
        super().__init__()
        E, I, (ffn, act) = c.n_expert, c.expert_width, FFN[c.ffn]
        self.c, self.act, self.score = c, act(c), ROUTER[c.router]
        self.router = Linear(c.n_embd, E, c.router_bias)
        self.c_fc = ExpertLinear(E, c.n_embd, ffn.fan_out(I), c.ffn_bias, 0.02)
        self.c_proj = ExpertLinear(E, I, c.n_embd, c.ffn_bias, out_std(c))
        self.shared = dense(c, c.shared_width) if c.n_shared else None
        self.shared_gate = Linear(c.n_embd, 1, bias=False) if c.shared_gate else None
        self.aux, self.biased = BALANCE[c.balance]
        if self.biased:
            self.register_buffer('choice_bias', torch.zeros(E))
        # tokens each expert took since the last optimizer step
        self.register_buffer('load', torch.zeros(E), persistent=False)

    def forward(self, x, ctx):
        """x (B,T,C) -> (B,T,C)"""
        x_NC = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # close scores decide who works, so in fp32
            bias = None if self.router.bias is None else wide(self.router.bias)
            logits_NE = F.linear(wide(x_NC), wide(self.router.weight), bias)
        scores_NE = self.score(logits_NE)
        expert_NK = self.choose(scores_NE)
        weight_NK = scores_NE.gather(-1, expert_NK)
        if self.c.router_norm:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        # rows of each expert, in a tensor whose shape does not depend on them
        flat = expert_NK.flatten()
        counts_E = flat.new_zeros(self.c.n_expert).scatter_add_(0, flat, torch.ones_like(flat))
        if self.training:
            self.account(logits_NE, scores_NE, counts_E, ctx)
        y_NC = self.experts(x_NC, expert_NK, (weight_NK * self.c.router_scale).to(x.dtype), counts_E)
        y = y_NC.view(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x, ctx)
        return y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)

    def choose(self, scores_NE):
        """The experts of every token, (N,K) int64: the best, within the best groups if there are groups."""
        if self.biased:
            scores_NE = scores_NE + self.choice_bias
        if self.c.n_group > 1:
            groups_NGE = scores_NE.unflatten(-1, (self.c.n_group, -1))
            worth_NG = groups_NGE.topk(min(self.c.group_top, groups_NGE.shape[-1]), dim=-1).values.sum(-1)
            best_NG = worth_NG.topk(self.c.n_group_used, dim=-1).indices
            out_NG = torch.ones_like(worth_NG, dtype=torch.bool).scatter(-1, best_NG, False)
            scores_NE = groups_NGE.masked_fill(out_NG.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores_NE.topk(self.c.n_expert_used, dim=-1).indices

    def experts(self, x_NC, expert_NK, weight_NK, counts_E):
        """The weighted sum over each token's experts, (N,C)."""
        K = expert_NK.shape[1]
        order = expert_NK.flatten().argsort(stable=True)  # pairs of token and choice, sorted by expert
        x, weight = x_NC[order // K], weight_NK.flatten()[order].unsqueeze(-1)
        if self.c.router_input:
            y = self.c_proj(self.act(self.c_fc(x * weight, counts_E)), counts_E)
        else:
            y = self.c_proj(self.act(self.c_fc(x, counts_E)), counts_E) * weight
        return torch.zeros_like(x_NC, dtype=y.dtype).index_add(0, order // K, y)

    def account(self, logits_NE, scores_NE, counts_E, ctx):
        """Count who works, and add the losses that keep the router in order to the training loss."""
        self.load += counts_E
        if self.aux:
            wish_E = (scores_NE / scores_NE.sum(-1, keepdim=True)).mean(0)
            balance = self.c.n_expert * (counts_E / counts_E.sum() * wish_E).sum()
            ctx.losses.append(self.c.aux_weight * balance)
        if self.c.z_weight:
            ctx.losses.append(self.c.z_weight * logits_NE.logsumexp(-1).square().mean())

    def rebalance(self, share_E, moves=1):
        """The bias moves against the share of the tokens that each expert took, where `moves` is not 0."""
        if self.biased:
            self.choice_bias += moves * self.c.bias_rate * torch.sign(share_E.mean() - share_E)
        self.load.zero_()

    def idle(self):
        """Parameters that one token does not pass through."""
        used = self.c.n_expert_used / self.c.n_expert
        return round((1 - used) * sum(p.numel() for m in (self.c_fc, self.c_proj) for p in m.parameters()))

    def flops(self):
        """Floating-point operations per token, forward and backward, of the experts it passes through."""
        return (6 * (self.c_fc.weight.numel() + self.c_proj.weight.numel()) * self.c.n_expert_used
                // self.c.n_expert)


class ExpertLinear(nn.Module):
    """One linear layer per expert, their weights stacked, for rows that are sorted by expert."""

    def __init__(self, n_expert, n_in, n_out, bias, std):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_expert, n_out)) if bias else None
        self.std = std

    draw = Linear.draw

    def forward(self, x, counts):
        """x (M,in) sorted by expert, counts (E,) rows of each -> (M,out)"""
        return ops.grouped_linear(x, self.weight, self.bias, counts)


FFNS = {'f': lambda c, layer: dense(c, c.ffn_width), 'e': MoE, '-': lambda c, layer: None}

MIXERS = {
    'a': lambda c, layer: ATTN[c.attn](c, layer, Kind()),                                   # attention
    'w': lambda c, layer: ATTN[c.attn](c, layer, Kind(c.window, local=True)),               # within a window
    'c': lambda c, layer: ATTN[c.attn](c, layer, Kind(c.window, visible_in_chunk)),         # within chunks
    'n': lambda c, layer: ATTN[c.attn](c, layer, Kind(rotary=False)),                       # without rope
    'v': lambda c, layer: ATTN[c.attn](c, layer, Kind(c.window, rotary=False)),             # w without rope
    'm': lambda c, layer: SSM[c.ssm](c),                                                    # state space
}


# ----------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """
    Two branches on the residual stream. Where the norms stand is NORM_AT's affair; the others are identities.
    """

    def __init__(self, c, mixer, ffn, layer):
        super().__init__()
        before, on_output, on_sum = NORM_AT[c.norm_at]
        self.ln_1, self.ln_1_out, self.ln_1_sum = (
            norm_if(x, c.n_embd, c) for x in (before, on_output, on_sum))
        self.mixer, self.ffn = MIXERS[mixer](c, layer), FFNS[ffn](c, layer)
        if self.ffn is not None:
            self.ln_2, self.ln_2_out, self.ln_2_sum = (
                norm_if(x, c.n_embd, c) for x in (before, on_output, on_sum))
        self.drop, self.scale = nn.Dropout(c.dropout), c.residual_scale
        # the first block reads the embedding anyway
        self.skip = nn.Parameter(torch.empty(2)) if c.embed_skip and layer > 0 else None

    def draw(self, leaf, generator):
        return torch.tensor([1.0, 0.0])

    def branches(self, x, ctx, cache):
        """The mixer of x, then the ffn of the sum."""
        x = self.ln_1_sum(x + self.write(self.ln_1_out(self.mixer(self.ln_1(x), ctx, cache))))
        if self.ffn is None:
            return x
        return self.ln_2_sum(x + self.write(self.ln_2_out(self.ffn(self.ln_2(x), ctx))))

    def write(self, y):
        """What a branch adds to the stream."""
        return self.drop(y) if self.scale == 1 else self.drop(y) * self.scale

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        if self.skip is not None:
            x = self.skip[0] * x + self.skip[1] * ctx.embedding
        return self.branches(x, ctx, cache)


class ParallelBlock(Block):
    """Mixer and ffn read the same x, each through its own norm, and both are added to it (GPT-NeoX)."""

    def branches(self, x, ctx, cache):
        mixed = self.ln_1_out(self.mixer(self.ln_1(x), ctx, cache))
        return x + self.write(mixed) + self.write(self.ln_2_out(self.ffn(self.ln_2(x), ctx)))


class SharedBlock(Block):
    """Mixer and ffn read the same norm of the same x (GPT-J, PaLM, Falcon, Cohere)."""

    def __init__(self, c, mixer, ffn, layer):
        super().__init__(c, mixer, ffn, layer)
        self.ln_2 = nn.Identity()

    def branches(self, x, ctx, cache):
        read = self.ln_1(x)
        mixed, fed = self.ln_1_out(self.mixer(read, ctx, cache)), self.ln_2_out(self.ffn(read, ctx))
        return x + self.write(mixed) + self.write(fed)


class NormedBlock(Block):
    """The branches are added to the norm that they read (an option of BLOOM)."""

    def branches(self, x, ctx, cache):
        x = self.ln_1(x)
        x = self.ln_2(x + self.write(self.ln_1_out(self.mixer(x, ctx, cache))))
        return x + self.write(self.ln_2_out(self.ffn(x, ctx)))


RESIDUAL = {'serial': Block, 'parallel': ParallelBlock, 'shared': SharedBlock, 'normed': NormedBlock}

@flags()
class SizeFlags:
    block_size: int = 1024          # tokens of context in training; the limit of learned positions
    vocab_size: int = 50257         # tokens the model knows; training takes it from the dataset
    n_layer: int = 12               # blocks
    n_head: int = 12                # query heads
    n_embd: int = 768               # width of the residual stream
    layer_pattern: str = flag('a', MIXERS)
    ffn_pattern: str = flag('f', FFNS)

    def mixers(c):
        return set(c.layer_pattern[:c.n_layer])

    def ffns(c):
        return set(c.ffn_pattern[:c.n_layer])

    def attends(c):
        return bool(c.mixers() - {'m'})

    def rotates(c):
        return c.pos == 'rope' and bool(c.mixers() - set('mnv'))

@flags()
class PositionFlags:
    pos: str = flag('learned', POSITIONS)

    def rules(c):
        yield 'n_embd', c.pos != 'sinusoidal' or c.n_embd % 2 == 0, 'be even when pos=sinusoidal'
        yield ('pos', c.attends() or not POSITIONS[c.pos].of_attention,
               'be learned, sinusoidal or none when no layer attends')
        yield ('pos', c.pos != 'rope' or c.rotates(),
               "be none when every layer that attends is an 'n' or 'v', which do not turn")
        yield ('layer_pattern', c.pos == 'rope' or not c.mixers() & set('nv'),
               f"have 'a' for 'n' and 'w' for 'v' when pos={c.pos}: what does not turn is their difference")

@flags(pos='rope', layer_pattern='awc')
class RopeFlags:
    rope_theta: float = flag(10000.0, above=1)
    rope_local_theta: float | None = flag(None, above=1, layer_pattern='w')
    rope_fraction: float = flag(1.0, above=0, most=1)
    rope_scaling: str = flag('none', ROPE_SCALING)
    rope_factor: float = flag(1.0, least=1, rope_scaling=SET)
    rope_context: int | None = flag(None, rope_scaling=ROPE_CONTEXT)
    rope_beta_fast: float = flag(32.0, rope_scaling='yarn')
    rope_beta_slow: float = flag(1.0, rope_scaling='yarn')
    rope_truncate: bool = flag(True, rope_scaling='yarn')
    rope_attention_factor: float | None = flag(None, rope_scaling=('yarn', 'longrope'))
    rope_low_freq: float = flag(1.0, rope_scaling='llama3')
    rope_high_freq: float = flag(4.0, rope_scaling='llama3')
    rope_short: tuple | None = flag(None, rope_scaling='longrope')
    rope_long: tuple | None = flag(None, rope_scaling='longrope')

    def fill(c):
        return {'rope_context': c.block_size} if c.rope_scaling in ROPE_CONTEXT else {}

    def rules(c):
        yield ('rope_factor', c.rope_scaling in ('none', *ROPE_BY_LENGTH) or c.rope_factor > 1,
               'be above 1 when rope_scaling is set')
        yield 'rope_beta_fast', c.rope_beta_fast > c.rope_beta_slow, f'be above {c.rope_beta_slow}'
        yield 'rope_high_freq', c.rope_high_freq > c.rope_low_freq, f'be above {c.rope_low_freq}'
        if c.rotates():
            width = rope_width(c)
            yield ('rope_head_dim' if c.attn == 'mla' else 'rope_fraction' if c.rope_fraction < 1 else 'head_dim',
                   width > 0 and width % 2 == 0,
                   f'leave an even number of coordinates to turn when pos=rope, and not {width}')
            for name in ('rope_short', 'rope_long'):
                yield (name, c.rope_scaling != 'longrope' or getattr(c, name) is not None
                       and len(getattr(c, name)) == width // 2,
                       f'hold {width // 2} numbers, one for each pair, when rope_scaling=longrope')

@flags()
class NormFlags:
    norm: str = flag('layernorm', NORMS)
    norm_at: str = flag('pre', NORM_AT)
    norm_eps: float = 1e-5
    norm_bias: bool | None = flag(None, norm='layernorm')
    residual: str = flag('serial', RESIDUAL)
    residual_scale: float = 1.0
    embed_scale: bool | float = False
    embed_norm: bool = False
    embed_skip: bool = False

    def fill(c):
        return {'norm_bias': c.bias} if c.norm == 'layernorm' else {}

    def rules(c):
        yield 'embed_skip', not c.embed_skip or c.n_layer > 1, 'be False when n_layer=1'
        yield 'residual', c.residual == 'serial' or c.norm_at != 'post', 'be serial when norm_at=post'
        yield ('residual', c.residual in ('serial', 'parallel') or NORM_AT[c.norm_at][0],
               f'be serial when norm_at={c.norm_at}, which has no norm before a branch')
        yield ('residual', c.residual == 'serial' or '-' not in c.ffns(),
               "be serial when ffn_pattern has a '-', as nothing is beside the mixer")

@flags(layer_pattern='awcnv')
class AttentionFlags:
    attn: str = flag('standard', ATTN)
    n_kv_head: int | None = None
    head_dim: int | None = None
    attn_scale: float | None = None
    qk_norm: bool | str = flag(False, QK_NORM)
    qkv_clip: float | None = None
    window: int | None = flag(None, layer_pattern='wvc')
    softcap: float | None = None
    sinks: bool = False
    temp_scale: float | None = flag(None, layer_pattern='nv')
    temp_floor: int = flag(8192, temp_scale=SET)
    value_embed: bool = False
    qkv_bias: bool | None = None
    proj_bias: bool | None = None

    def fill(c):
        if not c.attends():
            return {}
        c._must('n_embd', c.head_dim or c.n_embd % c.n_head == 0,
                f'be a multiple of n_head={c.n_head}, or head_dim must be set')
        return {'n_kv_head': c.n_head, 'head_dim': c.n_embd // c.n_head, 'qkv_bias': c.bias, 'proj_bias': c.bias}

    def rules(c):
        if not c.attends():
            return
        yield 'n_kv_head', c.n_head % c.n_kv_head == 0, f'divide n_head={c.n_head}'
        yield ('window', c.window or not c.mixers() & set('wvc'), "be set when layer_pattern has a 'w', 'v' or 'c'")
        if c.attn == 'diff':
            yield 'n_head', c.n_head % 2 == 0, 'be even when attn=diff, which takes heads in pairs'
            yield 'n_kv_head', c.n_kv_head % 2 == 0, 'be even when attn=diff, which takes heads in pairs'
            yield 'value_embed', not c.value_embed, 'be False when attn=diff'

@flags(attn='mla')
class LatentFlags:
    kv_rank: int | None = None
    q_rank: int | None = None
    rope_head_dim: int | None = None
    v_head_dim: int | None = None
    latent_eps: float | None = None

    def fill(c):
        if c.attn != 'mla':
            return {}
        return {'kv_rank': max(1, c.n_embd // 4), 'rope_head_dim': c.head_dim // 2, 'v_head_dim': c.head_dim,
                'latent_eps': c.norm_eps}

    def rules(c):
        if c.attn != 'mla':
            return
        yield 'pos', c.pos in ('rope', 'none'), 'be rope or none when attn=mla'
        for name, default in (('qk_norm', False), ('value_embed', False), ('rope_fraction', 1.0),
                              ('qkv_clip', None), ('temp_scale', None)):
            yield name, getattr(c, name) == default, f'be {default} when attn=mla'
        yield 'n_kv_head', c.n_kv_head == c.n_head, 'be left out when attn=mla, which caches no heads'

@flags(ffn_pattern='fe')
class FFNFlags:
    ffn: str = flag('gelu', FFN)
    ffn_width: int | None = None
    ffn_limit: float = flag(7.0, ffn='swiglu_clip')
    ffn_alpha: float = flag(1.702, ffn='swiglu_clip')
    ffn_bias: bool | None = None

    def fill(c):
        return {'ffn_width': FFN[c.ffn][0].default_width(c.n_embd), 'ffn_bias': c.bias} if c.ffns() - {'-'} else {}

@flags(ffn_pattern='e')
class MoEFlags:
    n_expert: int | None = None
    n_expert_used: int = 2
    expert_width: int | float | None = None
    n_shared: int = flag(0, least=0)
    shared_width: int | None = flag(None, n_shared=SET)
    shared_gate: bool = flag(False, n_shared=SET)
    router: str = flag('softmax', ROUTER)
    router_bias: bool = False
    router_norm: bool = True
    router_scale: float = 1.0
    router_input: bool = False
    n_group: int = 1
    n_group_used: int = flag(1, n_group=SET)
    group_top: int = flag(2, n_group=SET)
    balance: str = flag('aux', BALANCE)
    aux_weight: float = flag(0.01, least=0, balance=('aux', 'both'))
    bias_rate: float = flag(0.001, least=0, balance=('bias', 'both'))
    z_weight: float = flag(0.0, least=0)

    def fill(c):
        if 'e' not in c.ffns():
            return {}
        width = c.ffn_width // max(1, c.n_expert_used + c.n_shared)
        if isinstance(c.expert_width, float):
            c._must('expert_width', c.expert_width > 0, 'be above 0')
            c.expert_width = max(1, round(c.expert_width * c.ffn_width))
        if c.expert_width is None:
            c.expert_width = max(1, width // 8 * 8 or width)
        return {'shared_width': c.n_shared * c.expert_width} if c.n_shared else {}

    def rules(c):
        if 'e' not in c.ffns():
            return
        yield 'n_expert', c.n_expert, "be set when ffn_pattern has an 'e'"
        yield 'n_group', c.n_expert % c.n_group == 0, f'divide n_expert={c.n_expert}'
        yield ('n_group_used', c.n_group_used < c.n_group or c.n_group == 1,
               f'be below n_group={c.n_group}, or groups make no difference')
        choice = c.n_expert // c.n_group * c.n_group_used
        yield 'n_expert_used', c.n_expert_used <= choice, f'be at most the {choice} experts to choose from'

@flags(layer_pattern='m')
class SSMFlags:
    ssm: str = flag('mamba2', SSM)
    ssm_state: int | None = None
    ssm_expand: int = 2
    ssm_conv: int = 4
    ssm_head_dim: int = flag(64, ssm='mamba2')
    ssm_groups: int = flag(1, ssm='mamba2')
    ssm_dt_min: float = flag(0.0, least=0, ssm='mamba2')
    ssm_dt_max: float | None = flag(None, ssm='mamba2')
    ssm_dt_rank: int | None = flag(None, ssm='mamba1')
    ssm_norm: bool = flag(False, ssm='mamba1')
    ssm_bias: bool | None = None
    conv_bias: bool = True

    def fill(c):
        if 'm' not in c.mixers():
            return {}
        rank = {'ssm_dt_rank': Mamba1.default_dt_rank(c.n_embd)} if c.ssm == 'mamba1' else {}
        return rank | {'ssm_state': SSM[c.ssm].default_state, 'ssm_bias': c.bias}

    def rules(c):
        if 'm' in c.mixers() and c.ssm == 'mamba2':
            heads, odd = divmod(c.ssm_expand * c.n_embd, c.ssm_head_dim)
            yield 'ssm_head_dim', odd == 0, f'divide the inner width {c.ssm_expand * c.n_embd}'
            yield 'ssm_groups', heads % c.ssm_groups == 0, f'divide the {heads} heads of the state space'
            yield ('ssm_dt_max', c.ssm_dt_max is None or c.ssm_dt_max > c.ssm_dt_min,
                   f'be above ssm_dt_min={c.ssm_dt_min}')

@flags()
class GPTConfig(SizeFlags, PositionFlags, RopeFlags, NormFlags, AttentionFlags, LatentFlags, FFNFlags, MoEFlags,
                SSMFlags, Flags):
    """Every flag of the model. The defaults are GPT-2 124M."""
    bias: bool = True
    tie: bool = True
    dropout: float = flag(0.0, least=0, below=1)
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    zero_init: bool = False
    n_predict: int = 1
    predict_weight: float = flag(0.3, least=0, n_predict=SET)

    def plan(self):
        """One (mixer letter, ffn letter) pair per layer."""
        return [(self.layer_pattern[i % len(self.layer_pattern)], self.ffn_pattern[i % len(self.ffn_pattern)])
                for i in range(self.n_layer)]


# which matrices are which, for optimizers
KINDS = {Linear: 'matrix', ExpertLinear: 'experts', Embedding: 'embedding', LearnedPositions: 'embedding'}


class GPT(nn.Module):
    """
    The decoder. Parameters are drawn one by one, each from a generator seeded by (seed, its name): two models
    that differ in one flag share every other weight bit for bit.
    """

    def __init__(self, config, seed=1337):
        """seed=None leaves the parameters undrawn, for weights that are loaded next."""
        super().__init__()
        self.config = c = config
        self.wte = Embedding(c.vocab_size, c.n_embd)
        self.wpe = POSITIONS[c.pos](c)
        self.embed_scale = (math.sqrt(c.n_embd) if c.embed_scale is True else c.embed_scale or 1.0)
        self.ln_e = norm_if(c.embed_norm, c.n_embd, c)
        self.drop = nn.Dropout(c.dropout)
        block = RESIDUAL[c.residual]
        self.h = nn.ModuleList(block(c, *letters, layer) for layer, letters in enumerate(c.plan()))
        # multi-token prediction (Gloeckle et al. 2024):
        # block k makes what predicts the token k + 1 further on
        self.further = nn.ModuleList(block(c, *c.plan()[-1], c.n_layer + k) for k in range(c.n_predict - 1))
        self.vte = Embedding(c.vocab_size, c.n_kv_head * c.head_dim) if c.value_embed else None
        # with the norm on the sum, the last block has normalised already
        self.ln_f = norm_if(c.norm_at != 'post', c.n_embd, c)
        self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie:
            self.lm_head.weight = self.wte.weight
        self.moes = tuple(module for module in self.modules() if isinstance(module, MoE))
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw every parameter on the CPU in fp32, from hash(seed, name)."""
        for name, p in self.named_parameters():
            owner, _, leaf = name.rpartition('.')
            digest = hashlib.sha256(f'{seed}:{name}'.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
            p.copy_(self.get_submodule(owner).draw(leaf, generator))

    def forward(self, idx, targets=None, cache=None, pos=None, last_only=False, z_loss=0.0, parts=False):
        """
        idx (B,T) int64. pos (T,) or (B,T) int64 says where the tokens belong: consecutive, negative for
        padding before the first token of a row, below block_size where positions are learned, None for
        0..T-1. cache: from new_cache; then pos may only be None on its first call.

        Without targets -> (logits (B,T,V), None), or (B,1,V) with last_only. With targets (B,T), -1 where
        there is none -> (None, mean cross entropy in nats): the logits are not kept
        (kernels/linear_cross_entropy.py). In training the loss holds what the flags add to it as well, and
        z_loss times the mean square of the logits' log-sum-exp (PaLM). parts=True gives the dict of its parts
        in place of the loss: 'loss' is the sum, 'cross_entropy' (with the z-loss), 'mtp' and 'router' are
        what it is made of.
        """
        ctx = self.context(idx, pos, cache)
        x = self.drop(self.ln_e(self.wpe(self.wte(idx) * self.embed_scale, ctx.pos)))  # (B,T,C)
        ctx = ctx._replace(embedding=x, values=self.value_embedding(idx), losses=[])
        for block, entry in zip(self.h, cache or [None] * len(self.h), strict=True):
            x = block(x, ctx, entry)
        if targets is not None:
            losses = self.losses(x, targets, ctx, z_loss)
            return None, losses if parts else losses['loss']
        cap, logits = self.config.logit_softcap, self.lm_head(self.read_out(x[:, -1:] if last_only else x))
        return logits if cap is None else cap * torch.tanh(logits.float() / cap), None

    def read_out(self, x):
        """x (B,T,C) of the last block -> what the head sees"""
        x, scale = self.ln_f(x), self.config.logit_scale
        return x if scale == 1 else x * scale

    def losses(self, x, targets, ctx, z_loss):
        """x (B,T,C) of the last block, targets (B,T) -> the parts of the loss, see forward"""
        cross_entropy = self.cross_entropy(x, targets, z_loss if self.training else 0.0)
        losses = {'loss': cross_entropy, 'cross_entropy': cross_entropy, 'mtp': 0.0, 'router': 0.0}
        if self.training:
            for k, block in enumerate(self.further, start=1):
                shifted = F.pad(targets, (0, k), value=-1)[:, k:]
                loss = self.cross_entropy(block(x, ctx), shifted, z_loss)
                losses['mtp'] = losses['mtp'] + self.config.predict_weight / len(self.further) * loss
            losses['router'] = sum(ctx.losses)
            losses['loss'] = cross_entropy + (losses['mtp'] + losses['router'])
        return losses

    def cross_entropy(self, x, targets, z_loss):
        """x (B,T,C) of a last block, targets (B,T) -> mean over the targets that are not -1"""
        return ops.linear_cross_entropy(self.read_out(x).flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                        self.config.logit_softcap, z_loss)

    def value_embedding(self, idx):
        return None if self.vte is None else self.vte(idx).unflatten(-1, (-1, self.config.head_dim))

    def context(self, idx, pos, cache):
        T = idx.shape[1]
        if pos is None:
            if cache is not None and not cache[0].empty:
                raise ValueError('pos=None must be the positions of these tokens, as the cache holds tokens '
                                 'already')
            if self.wpe.max_tokens is not None and T > self.wpe.max_tokens:
                raise ValueError(f'{T} tokens must be at most block_size={self.wpe.max_tokens}, where '
                                 'learned positions end; cut the text or train with pos=rope')
        # one token may be all there is to attend to, but its slot is one of many
        causal = pos is None and (cache is None or T > 1)
        pos = torch.arange(T, device=idx.device) if pos is None else pos
        length = T if cache is None else max(getattr(entry, 'max_tokens', T) for entry in cache)
        return Context(pos, causal, self.wpe.rope(pos, length))

    def new_cache(self, batch_size, max_tokens, spare=0):
        """
        An empty cache per layer, for batch_size sequences of max_tokens, in the activations' dtype. Tokens
        beyond max_tokens push out the oldest. spare: how many tokens may be taken back, which costs a window
        that many slots.
        """
        weight = self.wte.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return [block.mixer.new_cache(batch_size, max_tokens, dtype, weight.device, spare)
                for block in self.h]

    # -- checkpoints in Hugging Face format, in pretrained.py

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        The model of a folder or hub repository in Hugging Face format, or of a nanoGPT checkpoint, in fp32.
        overrides: flags that shall be otherwise; what fits of the weights is kept.
        """
        from nanoblocks import pretrained
        return pretrained.from_pretrained(name, **overrides)

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers loads them, where a published family fits."""
        from nanoblocks import pretrained
        pretrained.save_pretrained(self, folder)

    # -- counting

    def num_params(self, active=False):
        """Parameters, a tied head counted once. active=True: those that one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        if not active:
            return total
        idle = sum(m.idle() for m in self.h.modules() if isinstance(m, MoE))
        return total - sum(p.numel() for p in self.further.parameters()) - idle

    def flops_per_token(self, T):
        """Floating-point operations per token, forward and backward, in sequences of T (PaLM, appendix B)."""
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        matmul += len(self.further) * self.lm_head.weight.numel()  # which the further predictions share
        mixers = sum(block.mixer.flops(T) for block in (*self.h, *self.further))
        return 6 * matmul + mixers + sum(moe.flops() for moe in self.moes)

    @torch.no_grad()
    def balance_experts(self, moves=1):
        """
        Call once per optimizer step, on every process: moves the routers' biases and begins to count anew.
        moves: 0 where the step is skipped, a number or a scalar tensor.
        Returns {'expert_entropy': mean over layers, 1 when all are equally busy, 'expert_max': the largest
        share that one expert had, 'expert_load': (layers,E) the share of each} as tensors, empty without
        experts.
        """
        if not self.moes:
            return {}
        loads = torch.stack([moe.load for moe in self.moes])  # (layers,E)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loads)
        shares = loads / loads.sum(-1, keepdim=True).clamp(min=1)
        for moe, share in zip(self.moes, shares):
            moe.rebalance(share, moves)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(-1) / math.log(max(2, shares.shape[-1]))
        return {'expert_entropy': entropy.mean(), 'expert_max': shares.max(), 'expert_load': shares}

    def param_kinds(self):
        """
        {parameter name: 'matrix', 'experts', 'embedding' or 'vector'}, for optimizers, by the module that
        owns it. What no rule names is a vector, whatever its shape: Mamba's A_log must not decay.
        """
        kinds = {}
        for name, p in self.named_parameters():
            owner = self.get_submodule(name.rpartition('.')[0])
            kind = next((kind for cls, kind in KINDS.items() if isinstance(owner, cls)), 'vector')
            kind = 'embedding' if owner is self.lm_head else kind
            kinds[name] = kind if name.endswith('weight') else 'vector'
        return kinds

    # -- sampling, in decode.py

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None,
                 **more):
        """idx (B,T) int64 and what `stream` yields after it -> (B,T+new) int64, samples side by side."""
        from nanoblocks.decoding import decode
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, seed, **more))
        idx = idx.repeat_interleave(more.get('num_samples', 1), 0)
        return torch.cat((idx, decode.trimmed(torch.cat(new, dim=1), stop)), dim=1) if new else idx

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None,
               min_p=None, repetition_penalty=1.0, **more):
        """
        Continue idx (B,T) int64 by max_new_tokens, yielding (B,1) int64 as each is drawn.
        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest
        that hold a share p, min_p those at least so likely as that share of the likeliest;
        repetition_penalty above 1 makes what the text holds already less likely. stop: a token
        or several that end a row (which repeats it while others go on; when all have, the stream
        ends). seed: the same text every time, and in every batch. Dropout is off. more: lengths,
        num_samples, chunk, compiled, see decode.Decoder. ValueError when there is nothing to
        continue or learned positions would run out.
        """
        from nanoblocks.decoding import decode
        sampling = decode.Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return decode.Decoder(self, idx, max_new_tokens, sampling, stop, seed, **more).stream()


def kv_cache_bytes(config, seq_len, batch_size, dtype_bytes):
    """Bytes that new_cache(batch_size, seq_len) takes in numbers of dtype_bytes each, allocating nothing."""
    dtypes = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    if dtype_bytes not in dtypes:
        raise ValueError(f'dtype_bytes={dtype_bytes} must be 1, 2, 4 or 8')
    dtype = dtypes[dtype_bytes]
    letters = [mixer for mixer, _ in config.plan()]
    with torch.device('meta'):
        size = {m: MIXERS[m](config, 0).new_cache(batch_size, seq_len, dtype, 'meta').nbytes()
                for m in set(letters)}
    return sum(size[m] for m in letters)
