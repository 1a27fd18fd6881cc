"""
Patterns of attention: dilated windows, strides and global tokens, against loops over their definition; their
caches, which keep what a pattern can still see and no more; and that they make fewer scores.
"""
import itertools
import random
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, build, scaled, tokens, toy

import kernels
from kernels import patterns
from kernels.attention import attention, attention_reference, visible
from kernels.patterns import Pattern
from model import GPT, GPTConfig, in_pattern, kv_cache_bytes
from nanoblocks.decoding.decode import Decoder, Sampling

choice = import_module('kernels.attention')     # kernels.attention is its function

# ----------------------------------------------------------------------------------------------------------
# The definition


def sees(i, j, causal, window=None, dilation=1, stride=None, n_global=0):
    """Whether a query at i sees a key at j, in the words of the flags."""
    distance = abs(i - j)
    if j < 0 or causal and j > i:
        return False
    if j < n_global or not causal and i < n_global:
        return True
    in_window = distance in [m * dilation for m in range(window)]
    return in_window or stride is not None and distance % stride == 0


def arguments(window, dilation=1, stride=None, n_global=0):
    """The arguments of ops.attention that the flags stand for, as the model gives them."""
    return in_pattern(GPTConfig(**toy(layer_pattern='w', window=window, window_dilation=dilation,
                                      window_stride=stride, global_tokens=n_global)))


def drawn(rng):
    return dict(window=rng.choice([1, 2, 5, 20, 100]), dilation=rng.choice([1, 1, 2, 3, 7]),
                stride=rng.choice([None, 2, 3, 5, 16]), n_global=rng.choice([0, 0, 1, 3, 30]))


def by_loops(q, k, v, scale, seen):
    """q (B,T,H,D), k and v (B,S,K,D), seen[i][j] -> (B,T,H,D): one query and head at a time, in float64."""
    y = []
    for b, i, h in itertools.product(range(len(q)), range(q.shape[1]), range(q.shape[2])):
        keys = [j for j in range(k.shape[1]) if seen[i][j]]
        kh = h * k.shape[2] // q.shape[2]
        weights = (k[b, keys, kh] @ q[b, i, h] * scale).softmax(0)
        y.append(weights @ v[b, keys, kh])
    return torch.stack(y).view(*q.shape[:3], -1)


# shorter and longer than the pattern, multiples of d and s and not
CASES = [(T, dict(window=w, dilation=d, stride=s, n_global=g)) for T, w, d, s, g in (
    (1, 2, 3, None, 0), (7, 4, 2, None, 0), (12, 2, 3, None, 0), (13, 3, 4, None, 0), (40, 2, 3, None, 0),
    (5, 2, 1, None, 7), (13, 3, 1, None, 2), (31, 3, 2, None, 1), (80, 4, 1, None, 3), (12, 1, 1, 4, 0),
    (13, 3, 1, 4, 0), (30, 5, 1, 3, 2), (31, 2, 3, 5, 0), (33, 3, 2, 2, 1), (9, 4, 2, 20, 0))]


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('T, flags', CASES, ids=str)
def test_a_pattern_is_the_sum_over_the_keys_of_its_definition(T, flags, causal):
    q, k, v = (torch.randn(2, T, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    pos, more = torch.arange(T), arguments(**flags) | {'causal': causal}
    seen = [[sees(i, j, causal, **flags) for j in range(T)] for i in range(T)]
    want = by_loops(q, k, v, 0.7, seen)
    wanted = torch.autograd.grad(want.sin().sum(), (q, k, v))
    for in_order in (True, False):
        got = attention(q, k, v, pos, pos, 0.7, in_order=in_order, **more)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.sin().sum(), (q, k, v)), wanted):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('seed', range(60))
def test_random_patterns_with_every_option_equal_the_reference(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    T, causal, flags = rng.choice([1, 3, 20, 33, 150, 300]), rng.random() < 0.6, drawn(rng)
    H, K = 4, rng.choice([1, 2, 4])
    q, k, v = (torch.randn(2, T, n, 4, dtype=torch.float64, requires_grad=True) for n in (H, K, K))
    pos, leaves, more = torch.arange(T), [q, k, v], arguments(**flags) | {'causal': causal}
    options = {'slopes': torch.rand(H), 'softcap': 1.0, 'sinks': torch.randn(H, dtype=torch.float64),
               'relative': (torch.randn(8, H, dtype=torch.float64), 20)}
    more |= {name: options[name] for name in options if rng.random() < 0.2}
    if 'slopes' in more and causal:
        more['alibi_bf16'] = rng.random() < 0.5
    leaves += [more[name].requires_grad_() for name in ('sinks',) if name in more]
    if 'relative' in more:
        leaves.append(more['relative'][0].requires_grad_())
    seen = visible(pos, pos, more.get('window'), causal=causal, pattern=more.get('pattern'))[0, 0]
    assert seen.tolist() == [[sees(i, j, causal, **flags) for j in range(T)] for i in range(T)]
    got, want = (f(q, k, v, pos, pos, 0.5, in_order=True, **more) for f in (attention, attention_reference))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 if 'alibi_bf16' in more else 1e-9)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_patterns_in_fewer_bits(dtype):
    torch.manual_seed(0)
    pos, rng = torch.arange(300), random.Random(0)
    q, k, v = (torch.randn(1, 300, 2, 16) for _ in range(3))
    for _ in range(20):
        more = arguments(**drawn(rng))
        got = attention(*(x.to(dtype) for x in (q, k, v)), pos, pos, 0.25, in_order=True, **more)
        assert got.dtype == dtype
        want = attention_reference(q, k, v, pos, pos, 0.25, **more)
        assert_close(got, want, 0.03 if dtype == torch.bfloat16 else 1e-5, str(more))


def test_no_triton_kernel_is_asked_for_a_pattern(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError('its mask knows no patterns')
    for module in (choice.decode_attention, choice.flash_attention):
        monkeypatch.setattr(module, 'fused', refuse)
        monkeypatch.setattr(module, 'ok', lambda *args: True)
    monkeypatch.setattr(choice, 'runs_triton', lambda q: True)
    q, pos = torch.randn(1, 30, 2, 8), torch.arange(30)
    for flags in (dict(window=3, n_global=2), dict(window=3, stride=4),
                  dict(window=3, dilation=2, n_global=1)):
        for in_order in (True, False):
            kernels.attention(q, q, q, pos, pos, 0.5, in_order=in_order, **arguments(**flags))
    with pytest.raises(AssertionError, match='knows no patterns'):  # its interleaved sequences are windows
        kernels.attention(q, q, q, pos, pos, 0.5, in_order=True, **arguments(3, 2))


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('flags', [dict(window=64, dilation=4), dict(window=252, n_global=4),
                                   dict(window=64, dilation=4, n_global=4), dict(window=128, stride=16),
                                   dict(window=96, stride=32, n_global=4)], ids=str)
def test_a_pattern_makes_fewer_scores_than_full_attention(flags, causal, monkeypatch):
    T, made = 2048, []

    def count(q, k, is_causal):     # (N,H,T,D)
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        made.append(batch * queries * (min(keys, keys / 2 + 32) if is_causal else keys))

    def sdpa(q, k, v, attn_mask=None, is_causal=False, **options):
        count(q, k, is_causal)
        return q

    def flash(q, k, v, dropout, is_causal, attn_mask, scale):
        count(q, k, is_causal)
        return q, q[..., 0]
    monkeypatch.setattr(F, 'scaled_dot_product_attention', sdpa)
    monkeypatch.setattr(patterns, 'CPU_FLASH', flash)
    x, pos = torch.zeros(1, T, 1, 4), torch.arange(T)
    attention(x, x, x, pos, pos, 1.0, in_order=True, causal=causal)
    full = made.pop()
    attention(x, x, x, pos, pos, 1.0, in_order=True, causal=causal, **arguments(**flags))
    more = arguments(**flags)
    seen = visible(pos, pos, more.get('window'), causal=causal, pattern=more['pattern']).sum()
    assert sum(made) < full / 2 and sum(made) < 2.6 * seen, f'{sum(made) / seen:.2f} {sum(made) / full:.2f}'


@torch.no_grad()
def test_a_piece_behind_a_cache_reads_global_tokens_and_its_window_alone(monkeypatch):
    made, compute = [], F.scaled_dot_product_attention

    def counted(q, k, *args, **options):
        made.append(k.shape[2])
        return compute(q, k, *args, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', counted)
    q, k = torch.randn(1, 600, 2, 8), torch.randn(1, 4000, 2, 8)
    pos, key_pos = torch.arange(3400, 4000), torch.arange(4000)
    more = arguments(100, n_global=4)
    got = attention(q, k, k, pos, key_pos, 0.5, **more)
    torch.testing.assert_close(got, attention_reference(q, k, k, pos, key_pos, 0.5, **more))
    assert max(made) <= 4 + 100 + 256


# ----------------------------------------------------------------------------------------------------------
# In the model


@pytest.mark.parametrize('flags', [
    dict(layer_pattern='aw', window=3, window_dilation=2),
    dict(layer_pattern='vw', window=2, window_stride=3),
    dict(layer_pattern='wa', window=2, global_tokens=2, sinks=True), dict(
        causal=False, layer_pattern='aw', window=2, window_dilation=2, global_tokens=1)], ids=str)
@torch.no_grad()
def test_a_layer_sees_the_keys_of_its_flags_and_no_others(flags):
    flags = toy(pos='rope', n_layer=len(flags['layer_pattern']), **flags)
    model, T = scaled(build(flags), 3).double(), 14
    c = model.config
    for layer, letter in enumerate(c.layer_pattern):
        mixer, x = model.h[layer].mixer, torch.randn(1, T, c.n_embd, dtype=torch.float64)
        ctx = model.context(torch.zeros(1, T, dtype=torch.int64), None, None)
        y = mixer(x, ctx)
        for j in range(T):
            other = x.clone()
            other[0, j] = torch.randn(c.n_embd, dtype=torch.float64)
            moved = ((mixer(other, ctx) - y).abs().amax(-1)[0] > 1e-12).tolist()
            pattern = c.causal, c.window, c.window_dilation, c.window_stride, c.global_tokens
            want = [i >= j or not c.causal if letter == 'a' else sees(i, j, *pattern) for i in range(T)]
            assert moved == want, f'layer {letter}, token {j}'


def test_flops_count_the_keys_of_the_pattern():
    def keys(T, **flags):
        c = toy(n_layer=1, layer_pattern='w', **flags)
        with torch.device('meta'):  # as where budgets of runs are compared
            model = GPT(GPTConfig(**c), seed=None)
            one, two = (model.flops_per_token(T) for T in (1, T))
        return 1 + (two - one) // (12 * c['n_embd'])
    assert keys(100, window=5) == keys(100, window=5, window_dilation=3) == 5
    assert keys(8, window=5, window_dilation=3) == 3
    assert keys(100, window=5, global_tokens=2) == 7 and keys(4, window=5, global_tokens=2) == 4
    assert keys(100, window=5, window_stride=10) == 5 + 9


@pytest.mark.parametrize('flags, name', [
    (dict(layer_pattern='a', window_dilation=2), 'window_dilation'),
    (dict(layer_pattern='c', window=4, global_tokens=2), 'global_tokens'),
    (dict(layer_pattern='w', window=4, window_stride=1), 'window_stride')])
def test_a_pattern_that_would_be_ignored_is_refused(flags, name):
    with pytest.raises(ValueError, match=f'^{name}={flags[name]} must'):
        GPTConfig(**toy(**flags))


# ----------------------------------------------------------------------------------------------------------
# The cache

BASES = [dict(pos='rope'), dict(pos='alibi'), dict(pos='none', sinks=True), dict(pos='rope', attn='mla'),
         dict(pos='rope', attn='diff'), dict(pos='rope', n_kv_head=1, softcap=2.0), dict(pos='relative'),
         dict(pos='learned', block_size=60)]


def random_patterns(count):
    rng = random.Random(5)
    return [toy(**(rng.choice(BASES) | dict(
        layer_pattern=rng.choice(['w', 'w', 'aw']), window=rng.choice([1, 3, 5]),
        window_dilation=rng.choice([1, 2, 3]), window_stride=rng.choice([None, None, 4]),
        global_tokens=rng.choice([0, 1, 3, 9])))) for _ in range(count)]


def named(flags):
    return str({name: value for name, value in flags.items() if name not in toy()})


def pieces(total, most, rng):
    found = []
    while sum(found) < total:
        found.append(min(rng.choice([1, 1, rng.randint(1, most)]), total - sum(found)))
    return found


def read_through(model, idx, cache, sizes):
    found, start = [], 0
    for size in sizes:
        pos = torch.arange(start, start + size)
        found.append(model(idx[:, start:start + size], cache=cache, pos=pos)[0])
        start += size
    return torch.cat(found, 1)


@pytest.mark.parametrize('flags', random_patterns(16), ids=named)
@torch.no_grad()
def test_pieces_of_any_size_equal_the_full_pass_and_roll_back(flags):
    rng, model, T = random.Random(str(flags)), scaled(build(flags), 3).double(), 40
    idx = tokens(flags, 2, T)
    logits = model(idx)[0]
    for sizes in ([T], [1] * T, [30, *[1] * 10], pieces(T, T, rng), pieces(T, 6, rng)):
        assert_close(read_through(model, idx, model.new_cache(2, T), sizes), logits, 1e-5, f'pieces {sizes}')
    for spare in (1, 3):
        cache = model.new_cache(2, T, spare=spare)
        told = sum(entry.nbytes() for entry in cache)
        start = rng.randint(1, 20)
        model(idx[:, :start], cache=cache)
        for at in range(start, T - spare):
            wrong = (idx[:, at:at + 1 + spare] + 1) % flags['vocab_size']
            wrong[:, 0] = idx[:, at]
            got = model(wrong, cache=cache, pos=torch.arange(at, at + 1 + spare))[0][:, 0]
            assert_close(got, logits[:, at], 1e-5, f'logits at {at}, with {spare} rolled back')
        assert sum(entry.nbytes() for entry in cache) == told
    assert kv_cache_bytes(model.config, T, 2, 8) == sum(entry.nbytes() for entry in model.new_cache(2, T))


@pytest.mark.parametrize('flags', random_patterns(10), ids=named)
@torch.no_grad()
def test_rows_with_padding_and_repeated_rows_are_as_if_alone(flags):
    model, T = scaled(build(flags), 3).double(), 30
    idx, lengths = tokens(flags, 3, T), [20, 2, 11]
    logits = model(idx)[0]
    pos = torch.stack([torch.arange(T) - (20 - n) for n in lengths])
    rows = torch.stack([row[p.clamp(min=0)] for row, p in zip(idx, pos)])
    for first in ((20,), (3, 17), (19, 1)):
        cache, start = model.new_cache(3, T), 0
        for size in (*first, 1, 3, 1):
            got = model(rows[:, start:start + size], cache=cache, pos=pos[:, start:start + size])[0]
            start += size
        for row, n in enumerate(lengths):
            assert_close(got[row, -1], logits[row, n + 4], 1e-5, f'row {row} after {first}')
        for entry in cache:
            entry.expand(2)
        got = model(rows[:, 25:27].repeat_interleave(2, 0), cache=cache,
                    pos=pos[:, 25:27].repeat_interleave(2, 0))[0]
        for row, n in enumerate(lengths):
            assert_close(got[2 * row + 1, -1], logits[row, n + 6], 1e-5, f'copy of row {row}')


@pytest.mark.parametrize('flags', [flags for flags in random_patterns(20) if flags['pos'] != 'learned'],
                         ids=named)
@torch.no_grad()
def test_beyond_max_tokens_the_newest_and_the_global_tokens_are_seen(flags):
    flags = flags | {'n_layer': 1, 'layer_pattern': 'w'}
    model, idx, S = scaled(build(flags), 3).double(), tokens(flags, 2, 40), 10

    def nearer_than_S(pos, key_pos, scoring):
        seen = plain(pos, key_pos, scoring)
        distance = pos.unsqueeze(-1) - key_pos.unsqueeze(-2)
        near = (distance < S) | (key_pos.unsqueeze(-2) < scoring.pattern.n_global)
        return seen & near.view(-1, 1, *distance.shape[-2:])
    plain = choice.visible_in
    steps = read_through(model, idx, model.new_cache(2, S), [1] * 40)
    if model.config.window_dilation > 1 or model.config.window_stride or model.config.global_tokens:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, 'visible_in', nearer_than_S)
            want = model(idx, pos=torch.arange(40))[0]
        assert_close(steps, want, 1e-5, 'single steps')
    for spare in (0, 2):
        sizes = pieces(40, S, random.Random(3))
        got = read_through(model, idx, model.new_cache(2, S, spare=spare), sizes)
        assert_close(got, steps, 1e-5, f'pieces {sizes}, spare={spare}')


def test_a_cache_holds_what_the_pattern_can_still_see_and_no_more():
    def slots(S=100, spare=0, **flags):
        cache = build(toy(n_layer=1, layer_pattern='w', window=5, pos='rope', **flags)).new_cache(1, S, spare)
        return cache[0].pos.shape[1]
    assert slots() == 5 and slots(window_dilation=3) == 3 * 4 + 1
    assert slots(global_tokens=2) == 2 + 5
    assert slots(global_tokens=2, window_dilation=3, spare=4) == 2 + 13 + 4
    assert slots(window_stride=4) == 100 and slots(S=3, window_dilation=3) == 3


@torch.no_grad()
def test_global_tokens_stay_in_constant_memory_however_long_the_text():
    flags = toy(layer_pattern='w', window=4, pos='rope', global_tokens=3, window_dilation=2)
    model, idx = scaled(build(flags), 5), tokens(flags, 1, 5)
    short, long = (Decoder(model, idx, n, Sampling(), seed=0, logprobs=True) for n in (30, 150))
    assert sum(e.nbytes() for e in short.cache) == sum(e.nbytes() for e in long.cache)
    steps = [(token, long.logprob.clone()) for token in long.stream()]     # six times block_size
    new, logprobs = (torch.cat(parts, 1) for parts in zip(*steps))
    text = torch.cat((idx, new), 1)
    want = model(text)[0][:, :-1].float().log_softmax(-1).gather(-1, text[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert_close(logprobs[:, -20:], want[:, -20:], 1e-3, 'late log-probabilities')
