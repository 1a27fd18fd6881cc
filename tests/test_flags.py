"""No flag is silently ignored, none touches weights that are not its own, and what cannot be is refused."""
import itertools
import random
import re
import time
from dataclasses import dataclass, fields

import conftest
import fuzz_flags
import pytest
import torch
import torch.nn.functional as F
from conftest import FIELDS, assert_close, build, every_family, legal, random_flags, scaled, tokens, toy
from test_model import (
    assert_causal,
    assert_checkpoint_is_exact,
    assert_compiled_equals_eager,
    assert_gradients,
)

from configurator import configure
from model import GPT, GPTConfig, kv_cache_bytes

LEGAL = 320     # random combinations of flags
CAPTURED = 200  # those of them that are compiled and saved as well
# Flags that change how some tensors are drawn, with the name of those: a projection onto the residual stream
# is scaled by the number of layers, or zero; the bias of gau by block_size. Direction and sign are kept.
RESCALE = {'n_layer': 'c_proj.weight', 'zero_init': 'c_proj.weight', 'ssm_conv': 'conv1d.bias',
           'short_conv': 'conv1d.bias', 'block_size': 'mixer.distance'}
# constants, of streams and of the embedding that later blocks read
CONSTANT = ('.read', '.mix', 'read_bias', 'mix_bias', '.skip')
# drawn by the number of a channel or state alone, as Mamba-1's decays are 1, 2, 3, ...
BY_PLACE = ('A_log', 'A_imag', 'shift.mu', 'mixer.decay', 'decay.bias', 'mixer.bonus', *CONSTANT)


def test_the_tests_have_values_for_every_field():
    new = conftest.unknown_fields()
    assert not new, (f'GPTConfig has {", ".join(new)}, which the tests have no values for: '
                     'add a row for each to FIELDS in tests/conftest.py')
    gone = sorted(FIELDS.keys() - {field.name for field in fields(GPTConfig)})
    assert not gone, f'GPTConfig has no {", ".join(gone)} any more: remove its row in tests/conftest.py'
    for name, field in FIELDS.items():
        assert len(field.values) > 1, f'{name} needs a value to be flipped to: add it in tests/conftest.py'
        refuses = field.bad or set(field.values) <= {True, False, None}
        assert refuses, f'{name} needs values that are refused: add them in tests/conftest.py'


@pytest.mark.parametrize('size', ['tiny', 'study'])
def test_every_architecture_fits_the_small_sizes(size):
    for path in conftest.config_files():
        flags = configure(dict(conftest.train_settings()), GPTConfig, [str(path), f'config/{size}.py'])
        GPTConfig(**flags)


def bases():
    """Every family, and the defaults at toy size first."""
    rope = toy(pos='rope', rope_factor=4.0)
    scaled_ropes = [rope | {'rope_scaling': name, 'rope_context': 8}
                    for name in ('dynamic', 'yarn', 'llama3')]
    moe = toy(ffn_pattern='e', n_expert=4, balance='both', n_group=2)
    groups = toy(ffn_pattern='e', n_expert=8, n_group=4, n_group_used=2)
    long = rope | {'rope_scaling': 'longrope', 'rope_context': 8} | {
        name: FIELDS[name].values[0] for name in ('rope_short', 'rope_long')}
    yarn = rope | {'rope_scaling': 'yarn', 'rope_context': 4096}  # long enough for a ramp
    return [toy(), *conftest.families().values(), *scaled_ropes, yarn, rope | {'rope_scaling': 'ntk'}, moe,
            groups, long, long | {'rope_context': 40},
            toy(n_predict=3), toy(layer_pattern='m', ffn_pattern='-', ssm_head_dim=8),
            toy(layer_pattern='ra'), toy(layer_pattern='ra', norm_at='output'),
            toy(layer_pattern='ra', residual='normed'),
            toy(layer_pattern='rk', ffn_pattern='-', rnn='rwkv7'), toy(layer_pattern='r', rnn='s4d'),
            toy(layer_pattern='r', rnn_conv=0), toy(pos='relative', rel_buckets=8),
            toy(layer_pattern='sz', ssm_head_dim=8),
            toy(layer_pattern='z', ssm_head_dim=8)]


def flips(name):
    """(flags, the same with another value for `name`) wherever both are legal."""
    for flags in bases():
        now = flags.get(name, conftest.defaults().get(name))
        for value in FIELDS[name].values:
            other = conftest.flipped(flags, name, value)
            if value != now and other:
                yield flags, other


def measure(flags):
    """All that a flag can change: parameters, logits, the loss in training, and cost."""
    model = build(flags)
    torch.manual_seed(0)
    idx = tokens({'vocab_size': 61}, 2, 17)
    with torch.no_grad():
        logits = model(idx)[0]
        loss = model.train()(idx[:, :-1], idx[:, 1:])[1]
        model.balance_experts()  # moves the routers' biases
    cost = model.flops_per_token(24), model.num_params(active=True), kv_cache_bytes(model.config, 24, 1, 2)
    # a limit on the positions is the size of a parameter already
    return model.state_dict(), logits, loss, cost


def same(one, other):
    weights, logits, loss, cost = one
    return (weights.keys() == other[0].keys() and cost == other[3] and loss.equal(other[2])
            and logits.shape == other[1].shape and logits.equal(other[1])
            and all(torch.equal(w, other[0][name]) for name, w in weights.items()))


@pytest.mark.parametrize('name', FIELDS)
def test_every_value_of_a_flag_changes_something(name):
    values = FIELDS[name].values
    # no window and no experts go with other letters of the patterns
    alone = name in ('window', 'n_expert')
    alike = {pair for pair in itertools.combinations(values, 2) if not (alone and None in pair)}
    if name == 'layer_pattern':  # no positions go with both
        alike -= {(a, b) for a in ('an', 'av') for b in ('m', 'r', 'rk', 's')}
    if name == 'sinkhorn_steps':  # mixing streams that are alike, as all are at the start, changes nothing
        alike.clear()
    if name == 'router_norm':  # no number of experts goes with both
        alike.remove((True, 'fixed'))
    for flags in bases():
        others = {value: conftest.flipped(flags, name, value) for value in values}
        measured = {value: measure(other) for value, other in others.items() if other}
        for value in list(measured)[:1]:
            again = measure(others[value])
            assert same(measured[value], again), 'the same flags must measure the same twice'
        alike = {pair for pair in alike if not measured.keys() >= set(pair) or same(*map(measured.get, pair))}
        if not alike:
            return
    raise AssertionError(f'{name}: {sorted(alike, key=str)} make no difference in any family')


@pytest.mark.parametrize('name', FIELDS)
def test_flag_leaves_other_weights_bit_identical(name):
    compared = 0
    for flags, flipped in flips(name):
        ours, theirs = (dict(build(f).named_parameters()) for f in (flags, flipped))
        for tensor in ours.keys() & theirs.keys():
            a, b = ours[tensor].detach(), theirs[tensor].detach()
            # kinds of mixers are classes of their own, whose tensors share names by chance
            if a.shape != b.shape or name in ('rnn', 'layer_pattern') and '.mixer.' in tensor:
                continue
            compared += a.dim() >= 2
            if name in RESCALE and tensor.endswith(RESCALE[name]) and not torch.equal(a, b):
                assert_close(b * a.norm(), a * b.norm(), 1e-5, f'{tensor} must differ by a factor alone')
            else:
                assert torch.equal(a, b), (f'{tensor} differs between {flags} and {flipped}; if {name} is '
                                           'meant to rescale it, add it to RESCALE')
    # the width is in the shape of every matrix
    assert compared or name == 'n_embd', f'nothing was compared for {name}'


def test_another_seed_draws_every_random_tensor_anew():
    for flags in bases():
        first, again, other = build(flags, seed=1), build(flags, seed=1), build(flags, seed=2)
        drawn = 0
        for (name, p), q, r in zip(first.named_parameters(), again.parameters(), other.parameters()):
            assert torch.equal(p, q), f'{name} must be the same with the same seed'
            if p.unique().numel() > 1 and not name.endswith(BY_PLACE):
                drawn += 1
                assert (p != r).float().mean() > 0.99, f'{name} must be another with another seed'
        assert drawn > 4


def test_no_two_tensors_are_drawn_alike():
    for flags in bases():
        seen = {}
        for name, p in build(flags).named_parameters():
            if p.unique().numel() > 1 and not name.endswith(CONSTANT):
                # without the scale, which differs by kind
                start = tuple((p.flatten()[:8] / p.flatten()[0]).tolist())
                assert start not in seen, f'{name} is drawn like {seen[start]}'
                seen[start] = name


@every_family
def test_building_leaves_the_global_generator_alone(flags):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(flags)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_do_not_depend_on_what_was_built_before():
    torch.manual_seed(1)
    first = build(toy()).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    build(toy(n_layer=3))
    assert all(torch.equal(w, first[name]) for name, w in build(toy()).state_dict().items())


# ----------------------------------------------------------------------------------------------------------
# Refusals

# so large that memory would run out long before a model stands
HUGE = {'n_embd': 2**40, 'n_head': 2**10, 'n_layer': 2**30, 'vocab_size': 2**50, 'block_size': 2**50}


def assert_refuses(flags, name, value):
    began = time.perf_counter()
    with pytest.raises(ValueError) as error:
        GPT(GPTConfig(**flags))
    sentence = str(error.value)
    assert time.perf_counter() - began < 5, 'a refusal must come before the work'
    told = re.match(rf'{name}={re.escape(str(value))} must \w.+', sentence)
    assert told, f'{sentence!r} must begin {name}={value} must'
    assert '\n' not in sentence and not sentence.endswith('.'), f'{sentence!r} must be one sentence'


@pytest.mark.parametrize('name, value', [(name, bad) for name, field in FIELDS.items() for bad in field.bad])
def test_bad_value_is_refused_in_a_sentence(name, value):
    for flags in bases():
        assert_refuses(flags | {name: value}, name, value)
        assert_refuses(flags | HUGE | {name: value}, name, value)


@pytest.mark.parametrize('name', FIELDS)
def test_value_of_another_type_is_refused_in_a_sentence(name):
    values = FIELDS[name].values
    for value in ({}, {1} if isinstance(values[0], tuple) else [1],
                  '1' if not isinstance(values[-1], str) else 1):
        assert_refuses(toy() | {name: value}, name, value)


# rope_theta turns no layer here
W_ALONE = {'pos': 'rope', 'layer_pattern': 'w', 'window': 5, 'rope_local_theta': 50.0}
ONE_EXPERT = {'ffn_pattern': 'e', 'n_expert': 4, 'n_expert_used': 1}


# flags, the field that the sentence is about, and the remedy that it names
@pytest.mark.parametrize('flags, name, remedy', [
    ({'n_embd': 100, 'n_head': 3}, 'n_embd', 'n_head=3|head_dim'),
    ({'n_head': 4, 'n_kv_head': 3}, 'n_kv_head', 'n_head=4'),
    ({'n_head': 4, 'n_kv_head': 8}, 'n_kv_head', 'n_head=4'),
    ({'head_dim': 7, 'pos': 'rope'}, 'head_dim', 'pos=rope'),
    ({'n_embd': 36, 'n_head': 4, 'pos': 'rope'}, 'head_dim', 'pos=rope'),
    ({'n_embd': 33, 'n_head': 3, 'pos': 'sinusoidal'}, 'n_embd', 'pos=sinusoidal'),
    ({'attn': 'mla', 'pos': 'rope', 'rope_head_dim': 3}, 'rope_head_dim', 'pos=rope'),
    ({'pos': 'learned', 'rope_theta': 100.0}, 'rope_theta', 'pos=rope'),
    ({'qk_norm': 'unit'}, 'qk_norm', 'pos=learned'),
    ({'qk_norm': 'unit', 'pos': 'none'}, 'qk_norm', 'pos=none'),
    ({'qk_norm': 'after', 'pos': 'none'}, 'qk_norm', 'after norms what has rotated'),
    (W_ALONE | {'rope_theta': 500.0}, 'rope_theta', 'be 10000.0 .* rope_local_theta'),
    (W_ALONE | {'rope_scaling': 'linear', 'rope_factor': 2.0}, 'rope_scaling', 'be none .* rope_local_theta'),
    ({'layer_pattern': 'ra', 'norm_at': 'post', 'rnn_norm_at': 'pre'}, 'rnn_norm_at', 'be post'),
    ({'layer_pattern': 'ra', 'residual': 'parallel', 'rnn_norm_at': 'output'}, 'rnn_norm_at', 'be pre'),
    ({'residual': 'normed', 'normed_ffn': (1.0,)}, 'normed_ffn', 'two numbers'),
    ({'layer_pattern': 'r', 'n_embd': 32, 'n_head': 3}, 'n_embd', r'rnn_heads=3 \(by default n_head\)'),
    ({'layer_pattern': 'r', 'rnn': 'rwkv7', 'n_embd': 32, 'rnn_heads': 3}, 'rnn_heads',
     r'divide n_embd=32 \(default'),
    ({'layer_pattern': 'r', 'rnn_norm': 'none', 'rnn_eps': 0.1}, 'rnn_eps', 'unless rnn_norm is head'),
    (ONE_EXPERT | {'router_norm': True}, 'router_norm', 'be False'),
    (ONE_EXPERT | {'n_expert_used': 2, 'router_norm': 'fixed'}, 'router_norm', 'be True or False'),
    ], ids=str)
def test_bad_combination_is_refused_in_a_sentence(flags, name, remedy):
    value = flags.get(name, 9)
    for sizes in ({}, {key: size for key, size in HUGE.items() if key not in ('n_embd', 'n_head')}):
        assert_refuses(toy() | sizes | flags, name, value)
    with pytest.raises(ValueError, match=remedy):
        GPTConfig(**toy() | flags)


WORDS = [name for name, field in FIELDS.items() if isinstance(field.values[0], str) and 'pattern' not in name]


@pytest.mark.parametrize('name', WORDS)
def test_unknown_word_is_answered_by_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        GPTConfig(**{name: 'nothing'})
    words = str(error.value).partition(' must be one of ')[2].split(', ')
    assert set(words) == set(FIELDS[name].values), f'{name} must have these in FIELDS of conftest.py'


def test_field_without_a_meaning_is_refused():
    with pytest.raises(TypeError, match='n_heads'):
        GPTConfig(n_heads=4)


@pytest.mark.parametrize('name', ['n_layer', 'norm_eps', 'rope_long', 'embed_scale'])
def test_number_beyond_all_floats_is_refused_or_an_int(name):
    flags = toy(pos='rope', rope_scaling='longrope', rope_long=(1.0,) * 4, rope_short=(1.0,) * 4)
    if name == 'n_layer':
        assert GPTConfig(**flags | {name: 10**400}).n_layer == 10**400
        return
    value = (10**400,) * 4 if name == 'rope_long' else 10**400
    with pytest.raises(ValueError, match=f'{name}=.*inf.* must be a finite number'):
        GPTConfig(**flags | {name: value})


def test_subclass_may_add_plain_fields():
    @dataclass
    class Mine(GPTConfig):
        extra: int = 3
    c = Mine(**toy(), extra=-4)
    assert (c.extra, c.missing('extra'), c.n_kv_head, Mine.unchecked().extra) == (-4, '', 4, 3)
    with pytest.raises(ValueError, match='n_layer=0 must be at least 1'):
        Mine(n_layer=0)


def test_none_is_filled_in():
    c = GPTConfig(**toy())
    assert (c.n_kv_head, c.head_dim, c.ffn_width) == (4, 8, 128)
    assert GPTConfig(**toy(n_kv_head=4, head_dim=8, ffn_width=128)) == c


# ----------------------------------------------------------------------------------------------------------
# All together


@random_flags(LEGAL, seed=1)
def test_random_combination_works(flags):
    model, T = scaled(build(flags), 5), flags['block_size']
    idx, source = tokens(flags, 2, T + 1), None
    if model.encoder is not None:
        source = idx[:, 1:].flip(-1)
    logits, targets = model(idx[:, :-1], source=source)[0], idx[:, 1:]
    assert logits.isfinite().all() and logits.shape == (2, T, flags['vocab_size'])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(model(idx[:, :-1], targets, source=source)[1], want, 1e-5, 'loss')
    assert_gradients(build(flags))
    if not model.config.causal:
        return
    assert_causal(model, idx[:1, :-1])
    cache, start = model.new_cache(2, T), 0
    for size in (7, 1, 1, 5, T - 14):
        pos = torch.arange(start, start + size)
        chunk = model(idx[:, start:start + size], cache=cache, pos=pos, source=None if start else source)[0]
        assert_close(chunk, logits[:, start:start + size], 1e-4, f'cached logits of {size} from {start} on')
        start += size
    assert sum(entry.nbytes() for entry in cache) == kv_cache_bytes(model.config, T, 2, 4)


@random_flags(CAPTURED, seed=1)
def test_random_combination_is_one_graph_and_survives_a_checkpoint(flags, tmp_path):
    torch._dynamo.reset()
    assert_compiled_equals_eager(flags, 'eager')
    assert_checkpoint_is_exact(flags, tmp_path / 'ckpt.pt')


def test_random_combinations_reach_every_value():
    found = conftest.combinations(LEGAL, 1)
    assert len(found) == LEGAL
    for name, field in FIELDS.items():
        seen = {flags.get(name, conftest.defaults().get(name)) for flags in found}
        # numbers for each pair are cut to the width of a head
        missing = set(field.values) - seen if not isinstance(field.values[0], tuple) else {()} - seen - {
            () for value in seen if value}
        assert not missing, f'no combination has {name} = {missing}'


def test_random_models_of_any_size_hold():
    """A short run of tests/fuzz_flags.py, which maintainers run for an hour."""
    assert fuzz_flags.fuzz(seed=1, count=40) == 40


def test_the_fuzz_draws_one_expert_windows_and_heads_of_every_number():
    drawn = [GPTConfig(**fuzz_flags.random_legal(random.Random(n))) for n in range(160)]
    assert {c.n_head for c in drawn} == set(range(1, 10)) and any(c.n_embd % 2 for c in drawn)
    assert any('e' in c.ffns() and c.n_expert_used == 1 < c.n_expert for c in drawn)
    assert set().union(*(c.mixers() for c in drawn)) == set('awcnvmhsz-')
    assert {c.attn for c in drawn} == {'standard', 'mla', 'diff', 'gau'}
    assert {c.pos for c in drawn} == set(FIELDS['pos'].values) and len({c.rope_scaling for c in drawn}) > 3
