"""Whatever is read from a cache equals the full forward pass, and takes the memory that was announced."""
import random
from dataclasses import replace

import conftest
import pytest
import torch
from conftest import assert_close, build, every_decoder, random_flags, scaled, tokens, toy

from model import ROPE_BY_LENGTH, GPTConfig, TokenCache, kv_cache_bytes

BOUND = 1e-4    # of the largest logit
RANDOM = 200    # random combinations of flags
T = 20          # tokens of a text; every toy's block_size is more


def has_cache(flags):
    return flags.get('causal', True)


def announced(config, *sizes):
    """Bytes of a cache, as announced, without what a source adds once it is read."""
    return kv_cache_bytes(replace(config, n_encoder=0), *sizes)


def model_and_text(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 3, T)
    with torch.no_grad():
        return model, idx, model(idx)[0]


@torch.no_grad()
def assert_cached(model, idx, logits, sizes, S=T):
    """idx (B,T) fed in pieces of these sizes gives logits (B,T,V), those of the full forward."""
    cache, start = model.new_cache(len(idx), S), 0
    for size in sizes:
        got = model(idx[:, start:start + size], cache=cache, pos=torch.arange(start, start + size))[0]
        assert_close(got, logits[:, start:start + size], BOUND, f'logits of {size} tokens from {start} on')
        start += size
    assert start == idx.shape[1]


@torch.no_grad()
def assert_padded(model, idx, logits, lengths, sizes):
    """
    Rows of unequal lengths, padded on the left, in one batch: prefilled in two pieces, then all continued by
    pieces of `sizes`. Every logit of every token that is no padding must be as if its row were alone.
    """
    longest, new = max(lengths), sum(sizes)
    pos = torch.stack([torch.arange(longest + new) - (longest - n) for n in lengths])      # (B,T)
    padded = torch.stack([row[p.clamp(min=0)] for row, p in zip(idx, pos)])
    without = model(padded, pos=pos)[0]
    assert without.isfinite().all(), 'padding must stay finite, or it poisons what it is added to'
    cache, got, start = model.new_cache(len(idx), longest + new), [], 0
    for size in (longest - 2, 2, *sizes):
        piece = slice(start, start + size)
        got.append(model(padded[:, piece], cache=cache, pos=pos[:, piece])[0])
        start += size
    for row, n in enumerate(lengths):
        for what, all_logits in (('no cache', without), ('a cache', torch.cat(got, 1))):
            assert_close(all_logits[row, longest - n:], logits[row, :n + new], BOUND,
                         f'row {row} with {longest - n} tokens of padding and {what}')


WAYS = {
    'whole': lambda *m: assert_cached(*m, [T]),
    'uneven chunks': lambda *m: assert_cached(*m, [6, 1, 3, 1, 1, 8]),
    'one token first': lambda *m: assert_cached(*m, [1, 5, 14]),
    'single steps': lambda *m: assert_cached(*m, [1] * T),
    'more slots than tokens': lambda *m: assert_cached(*m, [9, 1, 10], 2 * T),
    'left padding, steps': lambda *m: assert_padded(*m, [3, 8, 5], [1] * 4),
    'left padding, chunks': lambda *m: assert_padded(*m, [9, 1, 4], [3, 1, 4]),
}


@every_decoder
@pytest.mark.parametrize('way', WAYS)
def test_cached_logits_equal_the_full_forward(flags, way):
    WAYS[way](*model_and_text(flags))


@random_flags(RANDOM, seed=2, of=has_cache)
def test_cached_logits_equal_the_full_forward_for_random_flags(flags):
    model, idx, logits = model_and_text(flags)
    if 'r' in model.config.mixers():
        # states of weights as large as these may lose more digits of fp32 than BOUND has
        with torch.no_grad():
            model_text_logits = model.double(), idx, model(idx)[0]
    else:
        model_text_logits = model, idx, logits
    for name, way in WAYS.items():
        # its angles depend on how long the text may become, which is T for the logits to compare with
        of_this_length = name in ('whole', 'uneven chunks', 'single steps')
        if flags.get('rope_scaling') not in ROPE_BY_LENGTH or of_this_length:
            way(*model_text_logits)


@random_flags(24, seed=3, of=has_cache)
@torch.no_grad()
def test_cached_logits_are_exact_in_float64(flags):
    # where nothing is rounded to fp32 on the way: faults far smaller than BOUND show
    model, idx = scaled(build(flags), 5).double(), tokens(flags, 3, T)
    logits, cache, start = model(idx)[0], model.new_cache(3, T), 0
    for size in (6, 1, 3, 1, 9):
        got = model(idx[:, start:start + size], cache=cache, pos=torch.arange(start, start + size))[0]
        bound = 1e-5 if uses_fp32(flags) else 1e-9
        assert_close(got, logits[:, start:start + size], bound, f'from {start} on')
        start += size


def uses_fp32(flags):
    """Angles are fp32 in every model, and so are soft-capped logits."""
    return flags.get('pos') in ('rope', 'sinusoidal', 'alibi_bf16') or flags.get('logit_softcap')


@every_decoder
@torch.no_grad()
def test_prefill_without_positions_is_the_full_forward(flags):
    model, idx, logits = model_and_text(flags)
    for n in (1, 12):
        cache = model.new_cache(3, T)
        assert_close(model(idx[:, :n], cache=cache)[0], logits[:, :n], BOUND, f'logits of {n} tokens')
        got = model(idx[:, n:], cache=cache, pos=torch.arange(n, T), last_only=True)[0]
        assert_close(got, logits[:, -1:], BOUND, 'last logits')


@every_decoder
@torch.no_grad()
def test_rewritten_positions_give_the_logits_of_the_new_text(flags):
    # as speculative decoding does: a draft, then another text from a position within it
    model, idx, logits = model_and_text(flags)
    if any(not isinstance(entry, TokenCache) for entry in model.new_cache(1, T)):
        pytest.skip('a state has no positions to go back to')
    if model.config.window is not None:
        pytest.skip('a ring has overwritten what lies a window before the position to go back to')
    draft = idx.clone()
    draft[:, 9:] = (draft[:, 9:] + 1) % flags['vocab_size']
    for back in ([11], [1, 10], [1] * 11, [4, 1, 6]):
        cache = model.new_cache(3, T)
        model(draft[:, :8], cache=cache)
        model(draft[:, 8:15], cache=cache, pos=torch.arange(8, 15))
        model(draft[:, 15:16], cache=cache, pos=torch.arange(15, 16))
        start = 9
        for size in back:
            got = model(idx[:, start:start + size], cache=cache, pos=torch.arange(start, start + size))[0]
            assert_close(got, logits[:, start:start + size], BOUND, f'rewritten by {back}, from {start} on')
            start += size


@every_decoder
@torch.no_grad()
def test_rows_of_a_batch_may_stand_at_different_positions(flags):
    # rows that were cut at different lengths, one token a row and step
    model, idx, logits = model_and_text(flags)
    cache, lengths = model.new_cache(3, T), torch.tensor([4, 9, 6])
    pos = torch.arange(9) - (9 - lengths[:, None])
    model(idx.gather(1, pos.clamp(min=0)), cache=cache, pos=pos)
    for step in range(6):
        pos = lengths[:, None] + step
        got = model(idx.gather(1, pos), cache=cache, pos=pos)[0]
        for row in range(3):
            assert_close(got[row, 0], logits[row, pos[row, 0]], BOUND, f'row {row}, step {step}')


@every_decoder
@torch.no_grad()
def test_reset_forgets_everything(flags):
    model, idx, logits = model_and_text(flags)
    cache = model.new_cache(3, T)
    other = (idx + 1) % flags['vocab_size']
    for n in (1, 3, T):
        model(other, cache=cache)
        for entry in cache:
            entry.reset()
        # pos=None is legal again, and a first single token meets nothing of what was there
        assert_close(model(idx[:, :n], cache=cache)[0], logits[:, :n], BOUND, f'{n} tokens after reset')
        for entry in cache:
            entry.reset()
    # a text that begins later would see what the other one left at the positions before it
    fresh, pos = model.new_cache(3, T), torch.tensor([9])
    assert torch.equal(model(idx[:, :1], cache=cache, pos=pos)[0], model(idx[:, :1], cache=fresh, pos=pos)[0])


@every_decoder
@torch.no_grad()
def test_expand_repeats_every_row_next_to_itself(flags):
    model, idx, _ = model_and_text(flags)
    cache = model.new_cache(2, T)
    model(idx[:2, :8], cache=cache)
    before = sum(entry.nbytes() for entry in cache)
    for entry in cache:
        entry.expand(3)
    assert sum(entry.nbytes() for entry in cache) == 3 * before
    assert model.encoder is not None or 3 * before == announced(model.config, T, 6, 4)
    # one prompt, three continuations
    texts = torch.cat([idx[:2, :8].repeat_interleave(3, 0), tokens(flags, 6, 12, seed=5)], 1)
    want = model(texts)[0]
    got = model(texts[:, 8:13], cache=cache, pos=torch.arange(8, 13))[0]
    assert_close(got, want[:, 8:13], BOUND, 'logits of a chunk')
    got = model(texts[:, 13:14], cache=cache, pos=torch.arange(13, 14))[0]
    assert_close(got, want[:, 13:14], BOUND, 'logits of a step')


def tensors(entry):
    """Every tensor that an entry holds, in whatever attribute."""
    if isinstance(entry, torch.Tensor):
        yield entry
        return
    held = vars(entry) if hasattr(entry, '__dict__') else entry
    if isinstance(held, (dict, list, tuple)):
        for thing in held.values() if isinstance(held, dict) else held:
            yield from tensors(thing)


def assert_bytes(flags):
    for size, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        model = build(flags).to(dtype)
        for B, S in ((1, 1), (2, 7), (3, 24)):
            cache = model.new_cache(B, S)
            said, told = announced(model.config, S, B, size), sum(entry.nbytes() for entry in cache)
            # what several views share is allocated once
            storages = [t.untyped_storage() for entry in cache for t in tensors(entry)]
            held = {storage.data_ptr(): storage.nbytes() for storage in storages}
            assert said == told == sum(held.values()), f'{B} sequences of {S} in {dtype}'


@every_decoder
def test_cache_takes_the_bytes_that_were_announced(flags):
    assert_bytes(flags)


def test_random_caches_take_the_bytes_that_were_announced():
    for flags in filter(has_cache, conftest.combinations(RANDOM, 2)):
        assert_bytes(flags)


def test_cache_bytes_of_known_models():
    # k and v of every head in 16 bit, and 4 bytes for the position of each slot and layer
    assert kv_cache_bytes(GPTConfig(), 1024, 1, 2) == 12 * 1024 * (2 * 768 * 2 + 4)
    llama = GPTConfig(n_layer=2, n_head=8, n_kv_head=2, n_embd=64, pos='rope')
    assert kv_cache_bytes(llama, 100, 3, 4) == 2 * 100 * 3 * (2 * 2 * 8 * 4 + 4)
    # nothing is allocated: this one would take petabytes
    assert kv_cache_bytes(GPTConfig(), 2**36, 2**10, 8) > 2**60
    with pytest.raises(ValueError, match='^dtype_bytes=3 must be'):
        kv_cache_bytes(GPTConfig(), 8, 1, 3)


@pytest.mark.parametrize('sizes, sentence', [
    ((0, 8), 'batch_size=0 must be at least 1'), ((1, -3), 'max_tokens=-3 must be at least 1'),
    ((1, 8, -1), 'spare=-1 must be at least 0'),
    ((1, 8.5), 'max_tokens=8.5 must be a whole number')], ids=str)
def test_a_cache_of_no_size_is_refused(sizes, sentence):
    with pytest.raises(ValueError, match=f'^{sentence}$'):
        build(toy()).new_cache(*sizes)
    if len(sizes) == 2:
        with pytest.raises(ValueError, match='must be'):
            kv_cache_bytes(GPTConfig(), sizes[1], sizes[0], 4)


def test_cache_takes_the_dtype_of_the_activations():
    model, idx = build(toy()), tokens(toy(), 1, 4)

    def dtypes(cache):
        return {t.dtype for entry in cache for t in tensors(entry) if t.is_floating_point()}
    assert dtypes(model.new_cache(1, 8)) == {torch.float32}
    assert dtypes(model.to(torch.bfloat16).new_cache(1, 8)) == {torch.bfloat16}
    assert model(idx, cache=model.new_cache(1, 8))[0].dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        model = build(toy())
        cache = model.new_cache(1, 8)
        assert dtypes(cache) == {torch.bfloat16}
        want = model(tokens(toy(), 1, 8))[0]
        model(tokens(toy(), 1, 8)[:, :5], cache=cache)
        got = model(tokens(toy(), 1, 8)[:, 5:], cache=cache, pos=torch.arange(5, 8))[0]
    assert_close(got, want[:, 5:], 0.05, 'logits with a cache in bfloat16')


@every_decoder
def test_positions_must_be_told_when_the_cache_is_in_use(flags):
    model, idx = build(flags), tokens(flags, 1, 8)
    for first in (1, 4):
        cache = model.new_cache(1, T)
        model(idx[:, :first], cache=cache)
        for n in (1, 3):
            with pytest.raises(ValueError, match='^pos=None must be') as error:
                model(idx[:, :n], cache=cache)
            assert '\n' not in str(error.value)


BEYOND = [toy(pos=pos, layer_pattern=pattern, window=8) | more for pos, pattern, more in (
    ('rope', 'w', {}), ('none', 'w', {'sinks': True}), ('alibi', 'aw', {}), ('rope', 'c', {}),
    ('rope', 'av', {'n_kv_head': 2}), ('rope', 'w', {'attn': 'mla'}), ('rope', 'aw', {'attn': 'diff'}),
    ('rope', 'wm', {'ssm_head_dim': 8}))]


@pytest.mark.parametrize('flags', BEYOND, ids=str)
@pytest.mark.parametrize('S, spare', [(8, 0), (9, 0), (8, 3), (10, 2)])
@torch.no_grad()
def test_pieces_beyond_max_tokens_see_the_newest_tokens(flags, S, spare):
    # a layer without a window then has one of max_tokens
    windows = {S if letter in 'a' else 8 for letter in flags['layer_pattern'] if letter != 'm'}
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 40)
    if len(windows) == 1:
        want = model
        if 'a' in flags['layer_pattern']:
            want = scaled(build(flags | {'layer_pattern': flags['layer_pattern'].replace('a', 'w')}), 5)
        logits = want(idx)[0]
    else:
        cache = model.new_cache(2, S)
        steps = [model(idx[:, [n]], cache=cache, pos=torch.tensor([n]))[0] for n in range(40)]
        logits = torch.cat(steps, 1)
    for sizes in ([4] * 10, [8, 1, 3, 1, 1, 7, 2, 5, 8, 4], [1] * 40):
        cache, start = model.new_cache(2, S, spare=spare), 0
        for size in sizes if spare == 0 or sizes[0] > 1 else ():
            pos = torch.arange(start, start + size)
            got = model(idx[:, start:start + size], cache=cache, pos=pos)[0]
            assert_close(got, logits[:, start:start + size], BOUND, f'{sizes}: {size} tokens from {start} on')
            start += size


# ----------------------------------------------------------------------------------------------------------
# TokenCache alone, against a dictionary


def one_number(pos, text):
    """(B,T,1): what a token at this position of this text would leave in a cache."""
    return (1000.0 * text + pos).unsqueeze(-1)


def seen_by(query, key_pos, values):
    """{position: value} of the keys that a query at this position may attend to."""
    sees = [(p, v) for p, v in zip(key_pos.tolist(), values.flatten().tolist()) if 0 <= p <= query]
    assert len({p for p, _ in sees}) == len(sees), f'a position is seen twice: {sees}'
    return dict(sees)


@pytest.mark.parametrize('slots', [4, 7, 30])
def test_ring_keeps_the_newest(slots):
    rng = random.Random(slots)
    for _ in range(30):
        cache, start = TokenCache(2, slots, [(1,), (1,)], torch.float32, 'cpu'), 0
        while start < 25:
            size = rng.choice([1, 1, 2, 3, 5, 9])
            pos = torch.arange(start, start + size)
            rows = one_number(pos, 1).expand(2, size, 1)
            key_pos, (k, v) = cache.update(pos, rows, -rows)
            assert torch.equal(v, -k) and k.shape[:2] == key_pos.expand(2, -1).shape
            start += size
            for row in range(2):
                for query in pos.tolist():
                    seen = seen_by(query, key_pos.expand(2, -1)[row], k[row])
                    newest = {p: 1000.0 + p for p in range(max(0, query - slots + 1), query + 1)}
                    assert newest.items() <= seen.items(), f'the query at {query} must see {newest}: {seen}'
                    assert all(value == 1000 + p for p, value in seen.items())
            held = seen_by(start, cache.pos[0], cache.rows[0][0])
            assert held == {p: 1000.0 + p for p in range(max(0, start - slots), start)}


def test_rewritten_positions_are_seen_once_and_anew():
    rng = random.Random(0)
    for _ in range(100):
        cache, written = TokenCache(1, 30, [(1,)], torch.float32, 'cpu'), {}
        start = 0
        for text in range(12):
            size = rng.choice([1, 1, 2, 4, 6])
            pos = torch.arange(start, min(30, start + size))
            key_pos, (k,) = cache.update(pos, one_number(pos, text)[None])
            # what stood from here on is another text now
            written = {p: value for p, value in written.items() if p < start}
            written |= {p: 1000.0 * text + p for p in pos.tolist()}
            for query in pos.tolist():
                want = {p: value for p, value in written.items() if p <= query}
                assert seen_by(query, key_pos.flatten(), k) == want, f'query at {query}, chunk from {start}'
            start = rng.randrange(max(written) + 1) if rng.random() < 0.4 else min(29, max(written) + 1)


def test_first_chunk_is_returned_as_it_came():
    # so that a prefill runs on the very tensors of training, and may be longer than the ring
    cache, pos = TokenCache(1, 4, [(2,)], torch.float32, 'cpu'), torch.arange(9)
    new = torch.randn(1, 9, 2)
    key_pos, (k,) = cache.update(pos, new)
    assert k is new and key_pos.flatten().tolist() == list(range(9))


def test_what_was_returned_does_not_change_under_a_later_chunk():
    cache = TokenCache(1, 6, [(1,)], torch.float32, 'cpu')
    cache.update(torch.arange(4), torch.zeros(1, 4, 1))
    _, (k,) = cache.update(torch.arange(4, 6), torch.ones(1, 2, 1))
    before = k.clone()
    cache.update(torch.arange(3), torch.full((1, 3, 1), 7.0))
    assert torch.equal(k, before)


def test_a_step_reads_no_slot_beyond_its_own():
    cache = TokenCache(2, 30, [(1,)], torch.float32, 'cpu', max_tokens=30)
    cache.update(torch.arange(4), torch.zeros(2, 4, 1))
    for pos in (torch.arange(4, 9), torch.tensor([9]), torch.tensor([[10], [7]])):
        key_pos, (k,) = cache.update(pos, one_number(pos, 1).expand(2, -1, 1))
        assert k.shape[1] == key_pos.shape[1] == pos.max() + 1
        assert k.untyped_storage().data_ptr() == cache.rows[0].untyped_storage().data_ptr(), 'copied'


def test_padding_is_never_seen():
    cache = TokenCache(2, 6, [(1,)], torch.float32, 'cpu')
    pos = torch.tensor([[-2, -1, 0], [0, 1, 2]])
    cache.update(pos, one_number(pos, 1))
    key_pos, (k,) = cache.update(pos[:, -1:] + 1, one_number(pos[:, -1:] + 1, 1))
    assert seen_by(1, key_pos[0], k[0]) == {0: 1000.0, 1: 1001.0}
    assert seen_by(3, key_pos[1], k[1]) == {p: 1000.0 + p for p in range(4)}
