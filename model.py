"""
GPT-2 and the blocks of newer decoders, each behind one flag of GPTConfig.

Reads top to bottom: configuration, positions, norms, the cache, attention, feed-forward, block, GPT,
sampling. A config string is looked up once in a table (POSITIONS, NORMS, NORM_AT, FFN) while the layer is
built, so no forward asks which model this is. Every layer is `mixer(x, ctx, cache)`, then `ffn(x, ctx)`.

Shapes: B batch, T tokens of this call, S slots or keys, C n_embd, H query heads, K key/value heads,
D head_dim, I ffn width, V vocabulary.
"""
import hashlib
import math
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels as ops

# ----------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class GPTConfig:
    """Every flag of the model, stated here and nowhere else. The defaults are GPT-2 124M."""
    block_size: int = 1024          # tokens of context in training; the limit of learned positions
    vocab_size: int = 50257         # tokens the model knows; training takes it from the dataset
    n_layer: int = 12               # blocks
    n_head: int = 12                # query heads
    n_embd: int = 768               # width of the residual stream
    n_kv_head: int | None = None    # key/value heads: None as many as n_head (MHA), fewer GQA, 1 MQA
    head_dim: int | None = None     # width of one head: None n_embd / n_head
    pos: str = 'learned'            # positions: learned, sinusoidal, rope, none
    rope_theta: float = 10000.0     # rope: the base of its wavelengths
    norm: str = 'layernorm'         # layernorm, rmsnorm
    norm_at: str = 'pre'            # pre (GPT-2), post (2017), output (OLMo 2), sandwich (Gemma 2)
    norm_eps: float = 1e-5          # added to the variance, or to the mean square, of every norm
    qk_norm: bool = False           # RMS norm on each head's query and key, before rope
    ffn: str = 'gelu'               # relu, gelu, relu2; gated: swiglu, geglu
    ffn_width: int | None = None    # hidden width: None 4 n_embd, gated 8/3 n_embd (the same parameters)
    bias: bool = True               # biases in linear layers and layer norms
    tie: bool = True                # the output head shares its weight with the token embedding
    dropout: float = 0.0            # on the embedding, the attention weights and every branch
    logit_softcap: float | None = None  # cap the logits smoothly: cap * tanh(logits / cap)
    zero_init: bool = False         # projections that write to the residual stream start at zero

    def __post_init__(self):
        for f in fields(self):
            kinds, value = get_args(f.type) or (f.type,), getattr(self, f.name)
            self._must(f.name, type(value) in kinds or type(value) is int and float in kinds,
                       f'be of type {f.type if get_args(f.type) else f.type.__name__}')
        for name, table in (('pos', POSITIONS), ('norm', NORMS), ('norm_at', NORM_AT), ('ffn', FFN)):
            self._must(name, getattr(self, name) in table, f"be one of {', '.join(table)}")
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            self._must(name, getattr(self, name) >= 1, 'be at least 1')
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            self._must('n_embd', self.n_embd % self.n_head == 0,
                       f'be a multiple of n_head={self.n_head}, or head_dim must be set')
            self.head_dim = self.n_embd // self.n_head
        if self.ffn_width is None:
            self.ffn_width = FFN[self.ffn].func.default_width(self.n_embd)
        self._must('n_kv_head', self.n_kv_head >= 1 and self.n_head % self.n_kv_head == 0,
                   f'divide n_head={self.n_head}')
        self._must('head_dim', self.head_dim >= 1, 'be at least 1')
        self._must('head_dim', self.pos != 'rope' or self.head_dim % 2 == 0, 'be even when pos=rope')
        self._must('n_embd', self.pos != 'sinusoidal' or self.n_embd % 2 == 0, 'be even when pos=sinusoidal')
        self._must('rope_theta', self.rope_theta > 1, 'be above 1')
        self._must('rope_theta', self.pos == 'rope' or self.rope_theta == GPTConfig.rope_theta,
                   'be left out unless pos=rope')
        self._must('ffn_width', self.ffn_width >= 1, 'be at least 1')
        self._must('norm_eps', self.norm_eps > 0, 'be above 0')
        self._must('dropout', 0 <= self.dropout < 1, 'be at least 0 and below 1')
        self._must('logit_softcap', self.logit_softcap is None or self.logit_softcap > 0,
                   'be above 0, or None for no cap')

    def _must(self, name, ok, rule):
        if not ok:
            raise ValueError(f'{name}={getattr(self, name)} must {rule}')


class Linear(nn.Linear):
    """nn.Linear, drawn later and by name (GPT.init_weights). std is that of its weight."""

    def __init__(self, n_in, n_out, bias, std=0.02):
        self.std = std
        super().__init__(n_in, n_out, bias)

    def reset_parameters(self):
        pass  # nn.Linear's own draw would cost time and move the global generator

    def draw(self, leaf, generator):
        p = getattr(self, leaf)
        return (torch.zeros(p.shape) if leaf == 'bias' else
                torch.randn(p.shape, generator=generator) * self.std)


def out_proj(c, n_in):
    """A projection to the residual stream: GPT-2 shrinks it, so 2 n_layer branches sum to variance one."""
    return Linear(n_in, c.n_embd, c.bias, std=0.0 if c.zero_init else 0.02 / math.sqrt(2 * c.n_layer))


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
    rope: tuple | None  # cos and sin of every token's angles, each (T,D/2) or (B,T,D/2) fp32


class Frequencies(nn.Module):
    """base^(-2j/width) for each pair j of coordinates, in fp32 whatever the model is cast to."""

    def __init__(self, base, width):
        super().__init__()
        freq = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        # kept as the integers of the same bits, because model.to(bfloat16) would round a buffer of floats
        self.register_buffer('bits', freq.float().view(torch.int32), persistent=False)

    def angles(self, pos):
        """pos (...,T) -> (...,T,width/2) fp32"""
        return pos.unsqueeze(-1) * self.bits.view(torch.float32)


class NoPositions(nn.Module):
    """Positions have two ways into the model, the embedding and the attention layers. This takes neither."""
    max_tokens = None   # no limit on how far positions reach

    def __init__(self, c):
        super().__init__()

    def forward(self, x, pos):
        return x

    def rope(self, pos):
        return None


class LearnedPositions(NoPositions):
    """One vector per position, added to the embedding (GPT-2). There are block_size of them and no more."""

    def __init__(self, c):
        super().__init__(c)
        self.max_tokens = c.block_size
        self.weight = nn.Parameter(torch.empty(c.block_size, c.n_embd))

    def forward(self, x, pos):
        return x + F.embedding(pos.clamp(min=0), self.weight)

    draw = Embedding.draw


class SinusoidalPositions(NoPositions):
    """Fixed sines and cosines, added to the embedding (Vaswani et al. 2017, sections 3.4 and 3.5)."""

    def __init__(self, c):
        super().__init__(c)
        self.freq = Frequencies(10000.0, c.n_embd)

    def forward(self, x, pos):
        angle = self.freq.angles(pos)                                           # (...,T,C/2)
        wave = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)      # (...,T,C)
        # the sines have amplitude one: the paper scales the embedding up to be heard beside them
        return x * math.sqrt(x.shape[-1]) + wave.to(x.dtype)


class RotaryPositions(NoPositions):
    """Rotates queries and keys by angles that grow with position (kernels/rope.py)."""

    def __init__(self, c):
        super().__init__(c)
        self.freq = Frequencies(c.rope_theta, c.head_dim)

    def rope(self, pos):
        angle = self.freq.angles(pos)  # (...,T,D/2)
        return angle.cos(), angle.sin()


POSITIONS = {
    'learned': LearnedPositions,
    'sinusoidal': SinusoidalPositions,
    'rope': RotaryPositions,
    'none': NoPositions,
}

# ----------------------------------------------------------------------------------------------------------
# Norms


class LayerNorm(nn.Module):
    """Mean and variance normalised (Ba et al. 2016). Has a bias where the linear layers have one."""

    def __init__(self, width, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if c.bias else None
        self.eps = c.norm_eps

    def draw(self, leaf, generator):
        p = getattr(self, leaf)
        return torch.zeros(p.shape) if leaf == 'bias' else torch.ones(p.shape)

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Only the scale normalised, no mean and no bias (kernels/rms_norm.py)."""

    def __init__(self, width, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = c.norm_eps

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
# The cache


class TokenCache:
    """
    What one layer keeps of past tokens: `slots` slots, each with the position it holds (-1: none) and one row
    of every tensor in `widths`. The mask is computed from those positions, so a slot may hold any token: the
    slot of a position is pos % slots.

    The caller owns the clock: it says where tokens belong, and positions within one call must be consecutive.
    """

    def __init__(self, batch_size, slots, widths, dtype, device):
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
        new = [n.to(r.dtype) for n, r in zip(new, self.rows)]
        pos_BT = pos.to(torch.int32).expand(new[0].shape[:2])
        if pos_BT.shape[1] == 1:
            seen = (self.pos, *self.rows)
        elif self.empty:
            seen = (pos_BT, *new)
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

    def nbytes(self):
        """Bytes allocated."""
        return sum(t.nbytes for t in (self.pos, *self.rows))


def kv_cache_bytes(config, seq_len, batch_size, dtype_bytes):
    """Bytes that new_cache(batch_size, seq_len) takes in numbers of dtype_bytes each, allocating nothing."""
    dtypes = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    if dtype_bytes not in dtypes:
        raise ValueError(f'dtype_bytes={dtype_bytes} must be 1, 2, 4 or 8')
    dtype = dtypes[dtype_bytes]
    return sum(Attention.make_cache(config, batch_size, seq_len, dtype, 'meta').nbytes()
               for _ in range(config.n_layer))


# ----------------------------------------------------------------------------------------------------------
# Attention


def visible(pos, key_pos):
    """True where a query at pos (T,) or (B,T) may see the key at key_pos (S,) or (B,S) -> (1 or B,1,T,S)."""
    query, key = pos.unsqueeze(-1), key_pos.unsqueeze(-2)  # (...,T,1), (...,1,S)
    mask = (key <= query) & (key >= 0)
    return mask.view(-1, 1, *mask.shape[-2:])


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """
    Scaled dot-product attention. q (B,T,H,D), k and v (B,S,K,D), mask broadcast to (B,H,T,S) bool with True
    where attention may look, or causal=True for the plain triangle -> (B,T,H,D). Query head h reads key head
    h * K // H. A query that may look nowhere gets zeros.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention: multi-head, grouped-query (Ainslie et al. 2023), multi-query (Shazeer 2019)."""

    def __init__(self, c):
        super().__init__()
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)
        self.head_dim, self.dropout = c.head_dim, c.dropout
        # query, key and value, side by side
        self.c_attn = Linear(c.n_embd, sum(self.heads) * c.head_dim, c.bias)
        self.c_proj = out_proj(c, c.n_head * c.head_dim)
        self.q_norm = RMSNorm(c.head_dim, c) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c) if c.qk_norm else nn.Identity()

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        q, k, v = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # (B,T,H|K|K,D)
        q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rope is not None:
            q, k = ops.rope(q, *ctx.rope), ops.rope(k, *ctx.rope)
        key_pos = ctx.pos
        if cache is not None:
            key_pos, (k, v) = cache.update(ctx.pos, k, v)
        mask = None if ctx.causal else visible(ctx.pos, key_pos)
        y = attend(q, k, v, mask, ctx.causal, self.dropout if self.training else 0.0)
        return self.c_proj(y.flatten(2))

    @staticmethod
    def make_cache(c, batch_size, slots, dtype, device):
        return TokenCache(batch_size, slots, [(c.n_kv_head, c.head_dim)] * 2, dtype, device)

    def flops(self, T):
        """Floating-point operations per token, forward and backward, of the scores and the weighted sum."""
        return 12 * self.heads[0] * self.head_dim * T


# ----------------------------------------------------------------------------------------------------------
# Feed-forward


class MLP(nn.Module):
    """Two linear layers and an activation."""

    parts = 1  # widths of hidden layer that c_fc makes

    def __init__(self, c, act):
        super().__init__()
        self.c_fc = Linear(c.n_embd, self.parts * c.ffn_width, c.bias)
        self.c_proj = out_proj(c, c.ffn_width)
        self.act = act

    def forward(self, x, ctx):
        """x (B,T,C) -> (B,T,C)"""
        return self.c_proj(self.act(self.c_fc(x)))

    @staticmethod
    def default_width(n_embd):
        return 4 * n_embd


class GatedMLP(MLP):
    """
    One half of the hidden layer gates the other (Shazeer 2020):
    three matrices, so 8/3 as wide for the same size.
    """

    parts = 2  # gate and up, side by side

    @staticmethod
    def default_width(n_embd):
        # to a multiple that hardware likes and that stays within 1 % of 8/3
        multiple = 2 ** min(6, max(0, int(math.log2(n_embd / 16))))
        return max(1, round(8 * n_embd / 3 / multiple)) * multiple


def relu2(x):
    """So et al. 2021, https://arxiv.org/abs/2109.08668"""
    return F.relu(x).square()


FFN = {
    'relu': partial(MLP, act=F.relu),
    'gelu': partial(MLP, act=F.gelu),
    'relu2': partial(MLP, act=relu2),
    'swiglu': partial(GatedMLP, act=ops.swiglu),
    'geglu': partial(GatedMLP, act=ops.geglu),
}

# ----------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """Two branches on the residual stream. NORM_AT says where the norms stand; the others are identities."""

    def __init__(self, c):
        super().__init__()
        before, on_output, on_sum = NORM_AT[c.norm_at]
        self.ln_1, self.ln_2 = norm_if(before, c.n_embd, c), norm_if(before, c.n_embd, c)
        self.mixer, self.ffn = Attention(c), FFN[c.ffn](c)
        self.ln_1_out, self.ln_2_out = norm_if(on_output, c.n_embd, c), norm_if(on_output, c.n_embd, c)
        self.ln_1_sum, self.ln_2_sum = norm_if(on_sum, c.n_embd, c), norm_if(on_sum, c.n_embd, c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, ctx, cache=None):
        """x (B,T,C) -> (B,T,C)"""
        x = self.ln_1_sum(x + self.drop(self.ln_1_out(self.mixer(self.ln_1(x), ctx, cache))))
        x = self.ln_2_sum(x + self.drop(self.ln_2_out(self.ffn(self.ln_2(x), ctx))))
        return x


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
        self.drop = nn.Dropout(c.dropout)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        # with the norm on the sum, the last block has normalised already
        self.ln_f = norm_if(c.norm_at != 'post', c.n_embd, c)
        self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie:
            self.lm_head.weight = self.wte.weight
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

    def forward(self, idx, targets=None, cache=None, pos=None, last_only=False):
        """
        idx (B,T) int64. pos (T,) or (B,T) int64 says where the tokens belong: consecutive, negative for
        padding on the left, below block_size where positions are learned, None for 0..T-1. cache: from
        new_cache; then pos may only be None on its first call.

        Without targets -> (logits (B,T,V), None), or (B,1,V) with last_only. With targets (B,T), -1 where
        there is none -> (None, mean cross entropy in nats): the logits are not kept
        (kernels/linear_cross_entropy.py).
        """
        ctx = self.context(idx, pos, cache)
        x = self.drop(self.wpe(self.wte(idx), ctx.pos))  # (B,T,C)
        for block, entry in zip(self.h, cache or [None] * len(self.h), strict=True):
            x = block(x, ctx, entry)
        x = self.ln_f(x)
        cap = self.config.logit_softcap
        if targets is not None:
            return None, ops.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                                  cap)
        logits = self.lm_head(x[:, -1:] if last_only else x)
        return logits if cap is None else cap * torch.tanh(logits.float() / cap), None

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
        return Context(pos, causal, self.wpe.rope(pos))

    def new_cache(self, batch_size, max_tokens):
        """An empty cache per layer, for batch_size sequences of max_tokens, in the activations' dtype."""
        weight = self.wte.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return [block.mixer.make_cache(self.config, batch_size, max_tokens, dtype, weight.device)
                for block in self.h]

    # -- counting

    def num_params(self, active=False):
        """Parameters, a tied head counted once. active=True: those that one token passes through."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations per token, forward and backward, in sequences of T (PaLM, appendix B)."""
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return 6 * matmul + sum(block.mixer.flops(T) for block in self.h)

    def param_kinds(self):
        """{parameter name: 'matrix', 'embedding' or 'vector'} by the module that owns it, for optimizers."""
        kinds = {}
        for name, p in self.named_parameters():
            owner = self.get_submodule(name.rpartition('.')[0])
            hidden = isinstance(owner, Linear) and owner is not self.lm_head
            kinds[name] = 'vector' if p.dim() < 2 else 'matrix' if hidden else 'embedding'
        return kinds

    # -- sampling

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None):
        """idx (B,T) int64 and what `stream` yields after it -> (B,T+new) int64."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, seed)
        return torch.cat([idx, *new], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None):
        """
        Continue idx (B,T) int64 by max_new_tokens, yielding (B,1) int64 as each is drawn.
        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest
        that hold a share p; stop: a token or several that end a row (which repeats it while
        others go on; when all have, the stream ends). seed: the same draw every time. Dropout
        is off. ValueError when there is nothing to continue or learned positions would run out.
        """
        B, T = idx.shape
        total, limit = T + max_new_tokens, self.wpe.max_tokens
        if T == 0:
            raise ValueError('idx must hold at least one token to continue: give a prompt')
        if limit is not None and total > limit:
            raise ValueError(f'prompt ({T} tokens) and max_new_tokens={max_new_tokens} must stay within '
                             f'block_size={limit}, where learned positions end; a model with pos=rope has no '
                             'such end')
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        stop = None if stop is None else torch.as_tensor(stop, device=idx.device).view(-1)
        done = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        cache, token, pos, next_pos = (self.new_cache(B, total), idx, None,
                                       torch.full((1,), T, device=idx.device))
        training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits, _ = self(token, cache=cache, pos=pos, last_only=True)
                drawn = sample(logits[:, -1], temperature, top_k, top_p, generator)
                token = torch.where(done, token[:, -1:], drawn)
                pos, next_pos = next_pos, next_pos + 1
                yield token
                if stop is not None:
                    done |= torch.isin(token, stop)
                    if done.all():
                        return
        finally:
            self.train(training)


def check_sampling(temperature, top_k, top_p):
    """ValueError, one sentence, for values that `sample` cannot take."""
    if temperature < 0:
        raise ValueError(f'temperature={temperature} must be 0 (the likeliest token) or above')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k={top_k} must be at least 1, or None for all tokens')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p} must be above 0 and at most 1, or None for all tokens')


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token a row. logits (B,V) -> (B,1) int64. top_p: Holtzman et al. 2019 (nucleus sampling)."""
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        # a token goes when those before it already hold the share: the first always stays
        drop = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
