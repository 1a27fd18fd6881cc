"""
Build random legal models of every size that flags allow, and compare each with itself: no logit depends on a
later token, gradients are the slope of the loss, routers learn from the text, and what caches give equals the
full pass, beyond windows and past max_tokens. Flags that do not fit together must be refused in a sentence.

    python tests/fuzz_flags.py --minutes=60 --seed=0

It stops at the first fault, and prints the flags and the command that show it again.
"""
import math
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from conftest import FIELDS, TOY, assert_close, build, fit, flipped, legal, scaled, tokens  # noqa: E402

from configurator import configure  # noqa: E402
from model import ROPE_BY_LENGTH, GPTConfig, kv_cache_bytes  # noqa: E402

minutes = 60.0      # how long to go on
seed = 0            # seed of the flags
first = 0           # the number of the first model

# in float64, where nothing near a tie is decided by rounding; angles and soft-capped logits are fp32
BOUND = 1e-5
ONE_TO = {name: range(1, most + 1) for name, most in dict(
    n_kv_head=9, head_dim=13, window=12, ffn_width=50, kv_rank=20, q_rank=20, v_head_dim=11, n_expert=9,
    n_expert_used=9, expert_width=20, n_shared=3, shared_width=20, n_group=4, n_group_used=3, group_top=4,
    ssm_state=9, ssm_expand=3, ssm_conv=5, ssm_head_dim=24, ssm_groups=4, ssm_dt_rank=7, rope_context=30,
    ssm_width=48, short_conv=5, tied_width=30, tied_blocks=2, tied_rank=7,
    temp_floor=9, n_predict=3).items()}
ONE_TO['rope_head_dim'] = range(2, 14, 2)
TABLES = {'layer_pattern': 'aawcnvvvvmhsz-', 'ffn_pattern': 'ffe-'}


# ----------------------------------------------------------------------------------------------------------
# Flags


def sizes(rng):
    """The sizes that every model has. Heads of odd number and width, vocabularies of a few tokens."""
    n_head = rng.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    # a norm of one or two numbers leaves nothing to learn from
    return {'n_head': n_head, 'n_embd': n_head * rng.randrange(3 if n_head < 3 else 1, 9),
            'n_layer': rng.choice([1, 2, 2, 3, 4]),
            'vocab_size': rng.randrange(2, 70), 'block_size': rng.randrange(8, 41)}


def rotation(rng):
    """Rotary positions in every second model, which odd heads would keep away; often scaled, or MLA."""
    if rng.random() < 0.5:
        return {}
    flags = {'pos': 'rope', 'head_dim': rng.choice([2, 4, 6, 8, 14])}
    if rng.random() < 0.4:
        flags |= {'attn': 'mla', 'rope_head_dim': rng.choice([2, 4, 6, 10])}
    if rng.random() < 0.4:
        scaling = rng.choice(FIELDS['rope_scaling'].values)
        flags |= {'rope_scaling': scaling, 'rope_factor': 4.0, 'rope_context': 8}
    return fit(flags)


def value_of(name, rng):
    """Any value that a flag may have beside the right others."""
    if name in TABLES:
        return ''.join(rng.choices(TABLES[name], k=rng.choice([1, 1, 2, 3])))
    if name == 'n_expert_used' and rng.random() < 0.4:
        return 1
    if name in ONE_TO and rng.random() < 0.7:
        return rng.choice(ONE_TO[name])
    return rng.choice(FIELDS[name].values)


def random_legal(rng):
    """Sizes, then most flags in any order, each where the flags so far allow it."""
    flags, first = sizes(rng) | rotation(rng), ['layer_pattern', 'ffn_pattern', 'attn']
    flags = flags if legal(fit(flags)) else sizes(rng)
    # the patterns first: most other flags mean something beside a letter alone
    rest = rng.sample(sorted(FIELDS.keys() - set(TOY) - {'dropout'}), len(FIELDS) - len(TOY) - 1)
    for name in [*rng.sample(first, 3), *rest]:
        if rng.random() < 0.6:
            flags = flipped(flags, name, value_of(name, rng)) or flags
    return flags if legal(flags) else fit(flags)


def check_refusal(rng):
    """Flags at random are refused by a ValueError of one sentence, or make a model."""
    names = rng.sample(sorted(FIELDS), rng.randrange(1, 30))
    flags = sizes(rng) | {name: rng.choice([value_of(name, rng), *FIELDS[name].bad]) for name in names}
    try:
        build(flags)
    except ValueError as error:
        assert '\n' not in str(error) and ' must ' in str(error), f'{error} must be one sentence; {flags}'
    except Exception as error:
        raise AssertionError(f'{type(error).__name__}: {error} must be a sentence; {flags}') from error


# ----------------------------------------------------------------------------------------------------------
# What must hold for each


@torch.no_grad()
def check_causality(model, idx, logits):
    """Each token in turn becomes another: the logits before it stay."""
    T, V = idx.shape[1], model.config.vocab_size
    rows = idx[:1].repeat(T, 1)
    changed = model(torch.where(torch.eye(T, dtype=torch.bool), (rows + 1) % V, rows))[0]
    for t in range(1, T):
        assert_close(changed[t, :t], logits[0, :t], BOUND, f'logits before {t}, where another token is')


def check_gradients(model, idx):
    """Finite for every parameter, and together the slope of the loss; a router learns from the text."""
    def loss():
        return model(idx[:, :-1], idx[:, 1:], parts=True)[1]
    model.train()
    parts, named = loss(), dict(model.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(parts['loss'], named.values(), retain_graph=True,
                                                allow_unused=True)))
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all(), f'{name} must get a finite gradient'
    check_routers(model, parts)
    steepness = sum(grad.square().sum() for grad in grads.values()).sqrt().item()
    slopes = []
    for step in (1e-4, 1e-5, 1e-6, 1e-3):     # a choice of experts or a kink may lie within one of them
        heights = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for name, p in named.items():
                    p.add_(grads[name], alpha=sign * step / max(steepness, 1e-9))
                heights.append(loss()['loss'].item())
        slopes.append((heights[0] - heights[1]) / (2 * step))
        if abs(slopes[-1] - steepness) < 0.02 * steepness + 1e-4:
            break
    else:
        raise AssertionError(f'the gradient {steepness:.5g} must be the slope of the loss, {slopes}')
    model.eval()


def check_routers(model, parts):
    """The cross entropy alone moves each router that has a choice, unless its experts return nothing."""
    for moe in (block.ffn for block in model.h if block.ffn in model.moes):
        if moe.c.n_expert == 1 or moe.c.router_norm == 'fixed':
            continue
        router, experts = torch.autograd.grad(parts['cross_entropy'], (moe.router.weight, moe.c_proj.weight),
                                              retain_graph=True)
        least = 1e-8 * experts.norm() * moe.c_proj.weight.norm()
        assert router.norm() >= least, f'the router must learn: {router.norm():.1e} of {experts.norm():.1e}'


def pieces(total, most, rng):
    """Sizes of at most `most` that sum to `total`, every second one a single step."""
    found = []
    while sum(found) < total:
        size = 1 if rng.random() < 0.4 else rng.randint(1, most)
        found.append(min(size, total - sum(found)))
    return found


@torch.no_grad()
def cached(model, idx, sizes, S, spare=0):
    """Logits of idx, read through a cache for S tokens in pieces of these sizes."""
    cache, start, found = model.new_cache(len(idx), S, spare=spare), 0, []
    for size in sizes:
        pos = torch.arange(start, start + size)
        found.append(model(idx[:, start:start + size], cache=cache, pos=pos)[0])
        start += size
    return torch.cat(found, 1)


def check_caches(model, idx, logits, rng):
    """Pieces of any size equal the full pass, and past max_tokens they equal single steps."""
    c, T = model.config, idx.shape[1]
    sizes = pieces(T, T, rng)
    assert_close(cached(model, idx, sizes, T), logits, BOUND, f'cached logits of pieces {sizes}')
    told = sum(entry.nbytes() for entry in model.new_cache(2, T))
    # beside an encoder, what a source adds is announced as well
    assert told == kv_cache_bytes(replace(c, n_encoder=0), T, 2, 8), 'the cache must take what is announced'
    S, spare = rng.randint(1, T), rng.choice([0, 0, 1, 3])
    steps = cached(model, idx, [1] * T, S)
    reach = c.window_dilation * (c.window - 1) + 1 if c.window else math.inf
    near = reach <= S and c.window_stride is None and not c.mixers() & set('anhz')
    if near and c.rope_scaling not in ROPE_BY_LENGTH:
        assert_close(steps, logits, BOUND, f'single steps past max_tokens={S}')
    # a chunk of more than max_tokens has no window of its own to shorten
    if 'c' not in c.mixers() or c.window <= S:
        sizes = pieces(T, S, rng)
        assert_close(cached(model, idx, sizes, S, spare), steps, BOUND,
                     f'pieces {sizes} past max_tokens={S}, spare={spare}')


@torch.no_grad()
def check_padding(model, idx, logits, rng):
    """Rows of unequal lengths, padded on the left, as if alone; greedy samples are those of the full pass."""
    c, T = model.config, idx.shape[1]
    if c.rope_scaling in ROPE_BY_LENGTH:
        return
    lengths = torch.tensor([rng.randint(1, T), T])
    pos = torch.arange(T) - (T - lengths[:, None])
    padded = torch.stack([row[p.clamp(min=0)] for row, p in zip(idx, pos)])
    for row, got in enumerate(model(padded, pos=pos)[0]):
        n = lengths[row]
        alone = logits[row, :n] if c.causal else model(idx[row:row + 1, :n])[0][0]
        assert_close(got[T - n:], alone, BOUND, f'row with {T - n} tokens of padding')
    if not c.causal:
        return
    half = T // 2
    new = model.generate(idx[:, :half], T - half, temperature=0.0, chunk=rng.randint(1, half))
    best = model(new)[0].argmax(-1)
    assert torch.equal(best[:, half - 1:-1], new[:, half:]), 'greedy samples must be the likeliest tokens'


def check(flags, rng):
    assert GPTConfig(**asdict(GPTConfig(**flags))) == GPTConfig(**flags), 'a config must survive asdict'
    model = scaled(build(flags), rng.choice([2, 5])).double()
    idx = tokens(flags, 2, flags['block_size'])
    with torch.no_grad():
        logits = model(idx)[0]
    assert logits.isfinite().all() and logits.shape == (*idx.shape, flags['vocab_size'])
    with torch.no_grad():
        # a pass of its own: a rotation may depend on the length of the text
        loss = F.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
        assert_close(model(idx[:, :-1], idx[:, 1:])[1], loss, BOUND, 'loss')
    if model.config.causal:
        check_causality(model, idx, logits)
        check_caches(model, idx, logits, rng)
    check_padding(model, idx, logits, rng)
    check_gradients(model, idx)


def fuzz(seconds=None, seed=0, first=0, count=None):
    """Models until the time is over or there are `count` -> how many. AssertionError at the first fault."""
    began, number = time.monotonic(), first
    while number - first < count if count else time.monotonic() - began < seconds:
        rng = random.Random(f'{seed} {number}')
        again = f'python tests/fuzz_flags.py --seed={seed} --first={number}'
        flags = random_legal(rng)
        try:
            check_refusal(rng)
            check(flags, rng)
        except Exception as error:
            raise AssertionError(f'{error}\n{flags}\n{again}') from error
        number += 1
    return number - first


if __name__ == '__main__':
    torch.set_num_threads(1)
    configure(globals())
    print(f'{fuzz(60 * minutes, seed, first)} random models hold')
