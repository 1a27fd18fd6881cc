"""
What the tests share: every file of config/ at toy size, and one row for each flag of the model.

A new config file is tested without further work. A new field of GPTConfig needs a row in FIELDS.
"""
import functools
import os
import random
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

# toy models are too small for several threads, which would wait for each other longer than they compute
os.environ['OMP_NUM_THREADS'] = '1'
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from configurator import configure, settings_of  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU')


class Field(NamedTuple):
    """How the tests meet one field of GPTConfig."""
    # legal at toy size: flags are flipped to them, random combinations draw them
    values: tuple
    # refused, whatever the other flags say
    bad: tuple = ()
    # (value in a config file, all flags of that file) -> the value at toy size
    toy: Callable = lambda value, flags: value


def same_for_all(size):
    return lambda value, flags: size


FIELDS = {
    'block_size': Field((24, 40), (0, -5), same_for_all(24)),
    'vocab_size': Field((61, 97), (0,), same_for_all(61)),
    'n_layer': Field((2, 1, 3), (0,), lambda value, flags: shortest(flags)),
    'n_head': Field((4, 2, 8), (0, -1), same_for_all(4)),
    'n_embd': Field((32, 48), (0,), same_for_all(32)),
    # multi-head, grouped and multi-query attention remain so
    'n_kv_head': Field((None, 1, 2), (0, -2), lambda value, flags: (
        {None: None, 1: 1, flags.get('n_head', 12): 4}.get(value, 2))),
    'head_dim': Field((None, 6, 20), (0,), lambda value, flags: None if value is None else 12),
    'pos': Field(('learned', 'sinusoidal', 'rope', 'alibi', 'alibi_bf16', 'none', 'relative'),
                 ('absolute', '')),
    'rope_theta': Field((10000.0, 100.0), (1.0, 0.0, -10.0)),
    'rope_local_theta': Field((None, 50.0), (1.0, -10.0)),
    'norm': Field(('layernorm', 'rmsnorm'), ('batchnorm',)),
    'norm_at': Field(('pre', 'post', 'output', 'sandwich'), ('before',)),
    'rnn_norm_at': Field((None, 'pre', 'output', 'sandwich'), ('before',)),
    'norm_eps': Field((1e-5, 1e-2), (0.0, -1e-5)),
    'qk_norm': Field((False, True, 'full', 'heads', 'layer', 'unit', 'after'), ('all',)),
    'ffn': Field(('gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu', 'geglu', 'geglu_erf', 'reglu',
                  'glu', 'bilinear', 'swiglu_clip'), ('GELU', 'silu')),
    'ffn_limit': Field((7.0, 0.02), (0.0,)),
    'ffn_alpha': Field((1.702, 1.0), (0.0, -1.0)),
    'ffn_width': Field((None, 40, 7), (0, -1), lambda value, flags: None if value is None else 40),
    'bias': Field((True, False)),
    'qkv_bias': Field((None, True, False)),
    'proj_bias': Field((None, True, False)),
    'ffn_bias': Field((None, True, False)),
    'norm_bias': Field((None, True, False)),
    'ssm_bias': Field((None, True, False)),
    'conv_bias': Field((True, False)),
    'tie': Field((True, False)),
    # families are compared with themselves: dropout has tests of its own
    'dropout': Field((0.0, 0.3), (1.0, -0.1, 1.5), same_for_all(0.0)),
    'logit_scale': Field((1.0, 0.3), (0.0, -1.0)),
    'logit_softcap': Field((None, 3.0), (0.0, -30.0)),
    'zero_init': Field((False, True)),
    'layer_pattern': Field(('a', 'w', 'aw', 'an', 'c', 'ac', 'av', 'm', 'ma', 'r', 'ra', 'rk', 'h',
                            's', 'sa', 'a-', 'z'),
                           ('', 'x', 'A')),
    'rnn_decay': Field(('head', 'none', 'retnet', 'lightning', 'key', 'sigmoid', 'slow'), ('fixed', '')),
    'rnn_erase': Field(('delta', 'none', 'gated'), ('beta',)),
    'rnn_beta': Field((1.0, 2.0), (0.0, 2.5)),
    'rnn_feature': Field(('silu', 'none', 'elu1'), ('relu',)),
    'rnn_unit': Field((True, False)),
    'rnn_rope': Field((False, True)),
    'rnn_scale': Field((None, 0.5), (0.0, -1.0)),
    'rnn_conv': Field((4, 0, 2), (-1,)),
    'rnn_input': Field(('none', 'exp', 'sum'), ('gate',)),
    'rnn_gate': Field(('silu', 'sigmoid', 'none'), ('relu',)),
    'rnn_norm': Field(('head', 'all', 'layer', 'none'), ('rms',)),
    'rnn_eps': Field((None, 1e-2), (0.0, -1e-5)),
    'rnn_floor': Field((None, -5.0), (0.0, 1.0)),
    'rnn_gate_cap': Field((None, 15.0), (0.0,)),
    'rnn_gate_rank': Field((None, 6), (0,), lambda value, flags: None if value is None else 6),
    'rnn_decay_rank': Field((None, 6), (0,), lambda value, flags: None if value is None else 6),
    'rnn_heads': Field((None, 2), (0,), same_for_all(None)),
    'rnn_key_heads': Field((None, 2), (0,)),
    'rnn_key_dim': Field((None, 6), (0,), same_for_all(None)),
    'rnn_value_dim': Field((None, 10), (0,), same_for_all(None)),
    'rnn_bias': Field((None, True, False)),
    'ffn_pattern': Field(('f', 'e', 'fe', '-'), ('', 'x')),
    'rope_fraction': Field((1.0, 0.5), (0.0, 1.5)),
    'rope_scaling': Field(('none', 'linear', 'ntk', 'dynamic', 'yarn', 'llama3', 'longrope'), ('', 'YaRN')),
    'rope_factor': Field((4.0, 2.0), (0.5, 0.0)),
    'rope_context': Field((None, 8), (0, -1), same_for_all(8)),
    'rope_beta_fast': Field((32.0, 2.0), (0.9, 0.5)),
    'rope_beta_slow': Field((1.0, 0.25), (0.0,)),
    'rope_attention_factor': Field((None, 1.5), (-1.0,)),
    'rope_truncate': Field((True, False)),
    'rope_short': Field(((1.0, 1.25, 1.5, 2.0), (1.0, 1.5, 2.0, 3.0)), ('1.5',)),
    'rope_long': Field(((1.5, 2.0, 4.0, 8.0), (2.0, 3.0, 5.0, 9.0)), ('1.5',)),
    'rope_low_freq': Field((1.0, 0.25), (0.0,)),
    'rope_high_freq': Field((4.0, 2.0), (0.5,)),
    'residual': Field(('serial', 'parallel', 'shared', 'normed', 'attnres', 'hyper', 'mhc'), ('both',)),
    'attnres_size': Field((1, 3), (0,)),
    'n_stream': Field((4, 2), (0,)),
    'hyper_dynamic': Field((True, False)),
    'sinkhorn_steps': Field((20, 3), (0,)),
    'normed_attn': Field(((1.0, 1.0), (0.5, 1.5)), ('0.5',)),
    'normed_rnn': Field(((1.0, 1.0), (0.6, 1.4)), ('0.5',)),
    'normed_ffn': Field(((1.0, 1.0), (1.2, 0.7)), ('0.5',)),
    'residual_scale': Field((1.0, 0.3), (0.0, -1.0)),
    'embed_scale': Field((False, True, 3.0), (-1.0,)),
    'embed_norm': Field((False, True)),
    'embed_skip': Field((False, True)),
    'attn': Field(('standard', 'mla', 'diff', 'gau'), ('gqa',)),
    'gau_width': Field((None, 40), (0,)),
    'diff_gain': Field((True, False)),
    'window': Field((None, 5, 3), (0, -1), same_for_all(5)),
    'window_dilation': Field((1, 2, 3), (0, -1), lambda value, flags: min(value, 2)),
    'window_stride': Field((None, 4, 3), (0, 1), lambda value, flags: None if value is None else 4),
    'global_tokens': Field((0, 2, 1), (-1,), lambda value, flags: min(value, 2)),
    'attn_scale': Field((None, 0.1), (0.0, -1.0)),
    'qkv_clip': Field((None, 0.15), (0.0, -1.0)),
    'temp_scale': Field((None, 0.5), (0.0, -1.0)),
    'temp_floor': Field((3, 7), (0,), same_for_all(3)),
    'softcap': Field((None, 2.0), (0.0, -1.0), same_for_all(2.0)),
    'sinks': Field((False, True)),
    'value_embed': Field((False, True)),
    'attn_gate': Field(('none', 'head', 'channel'), ('token',)),
    'kv_rank': Field((None, 12), (0,), same_for_all(None)),
    'q_rank': Field((None, 12), (0,)),
    'rope_head_dim': Field((None, 6), (0,), same_for_all(None)),
    'v_head_dim': Field((None, 6), (0,), same_for_all(None)),
    'latent_eps': Field((None, 1e-2), (0.0, -1e-5)),
    'n_expert': Field((None, 4, 8), (0,), same_for_all(4)),
    'n_expert_used': Field((2, 1), (0,), lambda value, flags: min(value, 2)),
    'expert_width': Field((None, 12, 0.4), (0, 0.0), lambda value, flags: value if value == 1.0 else 12),
    'n_shared': Field((0, 1), (-1,)),
    'shared_width': Field((None, 12), (0,)),
    'shared_gate': Field((False, True)),
    'router_bias': Field((False, True)),
    'router_input': Field((False, True)),
    'router': Field(('softmax', 'sigmoid'), ('relu',)),
    'router_norm': Field((True, False, 'fixed'), ('sum',)),
    'router_scale': Field((1.0, 2.5), (0.0,)),
    'n_group': Field((1, 2, 4), (0,), lambda value, flags: min(value, 2)),
    'n_group_used': Field((1, 2), (0,), same_for_all(1)),
    'group_top': Field((2, 1), (0,)),
    'balance': Field(('aux', 'none', 'bias', 'both'), ('loss',)),
    'aux_weight': Field((0.01, 0.5), (-0.1,)),
    'bias_rate': Field((0.001, 0.1), (-0.1,)),
    'z_weight': Field((0.0, 0.5), (-0.1,)),
    'ssm': Field(('mamba2', 'mamba1'), ('mamba',)),
    'ssm_state': Field((None, 8), (0,), same_for_all(8)),
    'ssm_width': Field((None, 48), (0,), lambda value, flags: None if value is None else 64),
    'ssm_expand': Field((2, 1), (0,), same_for_all(2)),
    'ssm_conv': Field((4, 2), (0,)),
    'ssm_head_dim': Field((8, 16), (0,)),
    'ssm_groups': Field((1, 2), (0,)),
    'ssm_dt_rank': Field((None, 5), (0,)),
    'ssm_dt_min': Field((0.0, 0.003), (-0.1,)),
    'ssm_dt_max': Field((None, 0.05), (0.0,)),
    'ssm_norm': Field((False, True, 'plain'), ('rms',)),
    'ssm_gate_norm': Field((True, False)),
    'ssm_eps': Field((None, 1e-2), (0.0, -1e-5)),
    'tied_blocks': Field((1, 2), (0,), same_for_all(1)),
    'tied_width': Field((None, 40), (0,), lambda value, flags: None if value is None else 40),
    'tied_rank': Field((None, 6), (0,), lambda value, flags: None if value is None else 6),
    'short_conv': Field((3, 2), (0,)),
    'short_bias': Field((None, True, False)),
    'rnn': Field(('linear', 'rwkv7', 'rwkv6', 'rwkv4', 's4d'), ('lstm',)),
    'rnn_state': Field((64, 6), (0, 3)),
    'rnn_shift': Field((False, True)),
    'rnn_mix_width': Field((None, 40), (0,)),
    'rnn_mix_gate': Field((False, True)),
    'causal': Field((True, False)),
    'n_encoder': Field((0, 2), (-1,), lambda value, flags: min(value, 2)),
    'rel_buckets': Field((32, 8), (0, 6)),
    'rel_distance': Field((128, 20), (0,)),
    'rel_shared': Field((True, False)),
    'first_norm': Field((True, False)),
    'head_mlp': Field((False, True)),
    'head_mlp_bias': Field((None, True, False)),
    'head_act': Field(('gelu', 'silu'), ('relu',)),
    'embed_bias': Field((False, True)),
    'head_bias': Field((False, True)),
    'embed_width': Field((None, 20), (0,), same_for_all(None)),
    'n_predict': Field((1, 3), (0,)),
    'predict_weight': Field((0.3, 1.0), (-0.1,)),
}
# flags that every toy model sets, with and without a config file
TOY = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')


def shortest(flags):
    """The smallest number of layers, at least two, in which every letter of every pattern occurs."""
    patterns = [value for name, value in flags.items() if name.endswith('_pattern') and value]
    return max([2] + [1 + max(map(pattern.index, pattern)) for pattern in patterns])


def unknown_fields():
    """Fields of GPTConfig that the tests have no values for."""
    return [field.name for field in fields(GPTConfig) if field.name not in FIELDS]


def defaults():
    return {field.name: field.default for field in fields(GPTConfig) if field.default is not MISSING}


def toy(**flags):
    """The sizes of a toy, and these flags as they are given."""
    return {name: FIELDS[name].values[0] for name in TOY} | flags


def shrink(flags):
    """The same family at toy size: block_size 24, vocab_size 61, two layers, 4 heads, n_embd 32."""
    known = {name: value for name, value in flags.items() if name in FIELDS}
    return flags | {name: FIELDS[name].toy(flags.get(name), flags) for name in (*TOY, *known)}


@functools.cache
def train_settings():
    """The settings of train.py with their defaults, read and not run."""
    return {name: setting.default for name, setting in settings_of(ROOT / 'train.py').items()}


def config_files():
    return sorted((ROOT / 'config').glob('*.py'))


def flags_of(path):
    """The model flags of a config file, read as train.py reads it."""
    return configure(dict(train_settings()), GPTConfig, [str(path)])


@functools.cache
def families():
    """{name: flags} of every config file at toy size; files that differ in size alone share one entry."""
    same = {}
    for path in config_files():
        flags = shrink(flags_of(path))
        same.setdefault(repr(defaults() | flags), (flags, []))[1].append(path.stem)
    return {'+'.join(names): flags for flags, names in same.values()}


def every_family(test):
    """The test once for each config file at toy size, as `flags`."""
    return pytest.mark.parametrize('flags', list(families().values()), ids=list(families()))(test)


def every_decoder(test):
    """The same without encoders, which have no cache."""
    found = {name: flags for name, flags in families().items() if flags.get('causal', True)}
    return pytest.mark.parametrize('flags', list(found.values()), ids=list(found))(test)


def every_decoder_alone(test):
    """The same without models that have an encoder beside the decoder."""
    found = {name: flags for name, flags in families().items()
             if flags.get('causal', True) and not flags.get('n_encoder')}
    return pytest.mark.parametrize('flags', list(found.values()), ids=list(found))(test)


def fit(flags):
    """The flags without those that mean nothing beside the others, and with those that the others need."""
    flags = dict(flags)
    for _ in range(3):  # without one flag another may mean nothing
        now = GPTConfig.unchecked(**flags)
        flags = {name: value for name, value in flags.items() if name not in FIELDS or not now.missing(name)}
    now = GPTConfig.unchecked(**flags)
    if now.mixers() & set('wvc') and now.window is None:
        flags['window'] = 5
    if now.rope_scaling == 'longrope':
        # one factor per pair of channels, the first ones from FIELDS
        for name in ('rope_short', 'rope_long'):
            width = now.rope_head_dim or 4 if now.attn == 'mla' else now.head_dim or now.n_embd // now.n_head
            given = flags.get(name) or FIELDS[name].values[0]
            flags[name] = (given * 9)[:round(width * now.rope_fraction) // 2]
    if now.n_expert_used == 1 and now.n_expert != 1 and now.router_norm is True and 'e' in now.ffns():
        flags['router_norm'] = False
    if 'e' in now.ffns() and now.n_expert is None:
        flags['n_expert'] = 4
    if now.rope_scaling != 'none' and now.rope_factor == 1:
        flags['rope_factor'] = 4.0
    if now.mixers() & set('mhz') and now.ssm == 'mamba2' and now.ssm_head_dim == 64:
        flags['ssm_head_dim'] = 8
    return flags


def flipped(flags, name, value):
    """`flags` with another value for `name` and the flags that it needs; None where that is not legal."""
    other = fit(flags | {name: value})
    kept = other.get(name, defaults().get(name)) == value and type(other.get(name, value)) is type(value)
    return other if kept and legal(other) else None


def legal(flags):
    try:
        GPTConfig(**flags)
    except ValueError:
        return False
    return True


@functools.cache
def combinations(count, seed):
    """Different legal flags: a family with half of its fields redrawn, in any order, where that is legal."""
    rng, found = random.Random(seed), []
    missing = {(name, value) for name, field in FIELDS.items() for value in field.values}
    # no family scales its rope or has four groups of experts, and random steps seldom lead there
    scaled = [fit(toy(pos='rope', rope_scaling=name, rope_factor=4.0))
              for name in ('yarn', 'llama3', 'longrope')] + [toy(ffn_pattern='e', n_expert=8, n_group=4)]
    while len(found) < count:
        flags = dict(rng.choice([*families().values(), *scaled]))
        for name in rng.sample(sorted(FIELDS), len(FIELDS)):
            redrawn = flipped(flags, name, rng.choice(FIELDS[name].values))
            if rng.random() < 0.5 and redrawn:
                flags = redrawn
        # then one value that no combination has had yet
        for name, value in sorted(missing, key=str):
            if redrawn := flipped(flags, name, value):
                flags = redrawn
                break
        if flags not in found:
            found.append(flags)
            missing -= {(name, flags.get(name, defaults().get(name))) for name in FIELDS}
    return found


def random_flags(count, seed, of=lambda flags: True):
    """
    The test once for each of `count` combinations, as `flags`, named by what differs from the defaults; of
    those for which `of` is true.
    """
    found, base = list(filter(of, combinations(count, seed))), defaults() | toy()
    ids = [','.join(f'{k}={v}' for k, v in flags.items() if v != base.get(k)) for flags in found]
    return pytest.mark.parametrize('flags', found, ids=[name or 'defaults' for name in ids])


def build(flags, seed=1337, **more):
    """GPT of these flags, in eval mode."""
    return reading(GPT(GPTConfig(**(flags | more)), seed=seed).eval())


def reading(model):
    """The model, which reads SOURCE by its encoder, if it has one, where no other source is given."""
    if model.encoder is not None:
        model.register_forward_pre_hook(with_source, with_kwargs=True)
    return model


SOURCE = [5, 3, 8, 13, 1, 2, -1]


def with_source(model, args, kwargs):
    cache = kwargs.get('cache')
    if kwargs.get('source') is None and (cache is None or cache[0].empty):
        source = torch.tensor([t % model.config.vocab_size if t >= 0 else -1 for t in SOURCE],
                              device=args[0].device).expand(len(args[0]), -1)
        return args, kwargs | {'source': source}


@torch.no_grad()
def scaled(model, factor):
    """
    The model with all weights of two or more dimensions multiplied, so that faults stand out from rounding.
    What starts as zeros or ones (biases, norms, zero_init) gets noise, or its faults would not show at all.
    """
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = 0.2 * torch.randn(p.shape, generator=generator)
        if p.dim() < 2:
            p.add_(noise)
        else:
            # one value everywhere: zero_init, or the weight of a norm
            p.copy_(p * factor if p.unique().numel() > 1 else p + noise)
    return model


def tokens(flags, B, T, seed=0):
    """(B,T) int64, drawn from the vocabulary."""
    return torch.randint(flags['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(got, want, bound, what):
    """Largest error at most bound times the largest value wanted."""
    assert got.shape == want.shape, f'{what}: shape {tuple(got.shape)} must be {tuple(want.shape)}'
    got, want = got.detach().double(), want.detach().double()
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= bound * size, f'{what}: error {error:.2e} must be at most {bound:.0e} x {size:.2e}'
