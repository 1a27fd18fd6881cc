"""
Gemma: norms whose weights are stored minus one. Gemma 2 and 3 have norms before and after each branch and
many windowed layers; the first Gemma and VaultGemma have them before alone.
"""
import math

from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    LLAMA_FLAGS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
    WINDOW_KEYS,
)
from nanoblocks.pretrained.keys import (
    GATED_FFN,
    mixer_letters,
    renamed,
    score_scale,
    shortest_pattern,
    without,
)
from nanoblocks.pretrained.layouts import plus_one
from nanoblocks.pretrained.rope import read_rope, rope_parameters_of, write_rope, write_rope_and_windows

FAMILIES = {}


def to_integer(x):
    """x as an int where only rounding keeps it from being one."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-6) else x


GEMMA_FLAGS = LLAMA_FLAGS | {'norm_at': 'sandwich', 'embed_scale': True}
GEMMA_KEYS = without(WINDOW_KEYS, 'hidden_act') | ATTENTION_BIAS | {
    'hidden_activation': GATED_FFN, 'final_logit_softcapping': 'logit_softcap',
    'query_pre_attn_scalar': score_scale(lambda x: x ** -0.5, lambda scale: to_integer(scale ** -2))}
GEMMA_DEFAULTS = TIED | {
    'head_dim': 256, 'query_pre_attn_scalar': 256, 'sliding_window': 4096,
    'hidden_activation': 'gelu_pytorch_tanh'}
GEMMA_TENSORS = LLAMA_TENSORS | {
    'ln_f': ('model.norm', plus_one),
    'h.{i}.ln_1': ('model.layers.{i}.input_layernorm', plus_one),
    'h.{i}.ln_1_out': ('model.layers.{i}.post_attention_layernorm', plus_one),
    'h.{i}.ln_2': ('model.layers.{i}.pre_feedforward_layernorm', plus_one),
    'h.{i}.ln_2_out': ('model.layers.{i}.post_feedforward_layernorm', plus_one),
    'h.{a}.mixer.q_norm': ('model.layers.{i}.self_attn.q_norm', plus_one),
    'h.{a}.mixer.k_norm': ('model.layers.{i}.self_attn.k_norm', plus_one)}


# ----------------------------------------------------------------------------------------------------------
# Gemma 2: windows in every other layer, capped scores


def read_alternating(hf):
    """Windows in every other layer, from the first."""
    letters = mixer_letters(hf, lambda i: 'a' if i % 2 else 'w')
    return read_rope(hf) | {'layer_pattern': shortest_pattern(letters)}


FAMILIES['gemma2'] = Family(
    architecture='Gemma2ForCausalLM',
    flags=GEMMA_FLAGS,
    keys=GEMMA_KEYS | {'attn_logit_softcapping': 'softcap'},
    aliases={'hidden_act': 'hidden_activation'},
    defaults=GEMMA_DEFAULTS | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
    tensors=GEMMA_TENSORS,
    mixers='aw', read=read_alternating, write=write_rope_and_windows)


# ----------------------------------------------------------------------------------------------------------
# Gemma: full attention, no caps. The first files say gelu, and mean the tanh approximation

FAMILIES['gemma'] = Family(
    architecture='GemmaForCausalLM',
    flags=LLAMA_FLAGS | {'embed_scale': True},
    keys=LLAMA_KEYS | ATTENTION_BIAS | {
        'hidden_act': renamed('ffn', {'gelu_pytorch_tanh': 'geglu', 'gelu': 'geglu', 'silu': 'swiglu'})},
    defaults=TIED | {'head_dim': 256, 'hidden_act': 'gelu_pytorch_tanh'},
    only={'use_bidirectional_attention': False},
    tensors=GEMMA_TENSORS | {'h.{i}.ln_2': ('model.layers.{i}.post_attention_layernorm', plus_one)},
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# VaultGemma: Gemma 2 without norms after the branches

FAMILIES['vaultgemma'] = Family(
    architecture='VaultGemmaForCausalLM',
    flags=LLAMA_FLAGS | {'embed_scale': True},
    keys=FAMILIES['gemma2'].keys,
    aliases=FAMILIES['gemma2'].aliases,
    defaults=FAMILIES['gemma2'].defaults,
    tensors=GEMMA_TENSORS,
    mixers='aw', read=read_alternating, write=write_rope_and_windows)


# ----------------------------------------------------------------------------------------------------------
# Gemma 3: all but every sixth layer have windows, and these a rotary base of their own


def read_gemma3(hf):
    every = hf['sliding_window_pattern']
    return read_two_bases(hf, mixer_letters(hf, lambda i: 'w' if (i + 1) % every else 'a'))


def read_two_bases(hf, letters):
    """Flags of positions and mixers where layers with windows, letter w, rotate at a base of their own."""
    both = hf.get('rope_parameters', {})
    local = both.get('sliding_attention') or {'rope_theta': hf['rope_local_base_freq']}
    if (local.get('rope_type') or 'default') != 'default' and 'w' in letters:
        raise ValueError(f'rope_type={local["rope_type"]} of sliding_attention in config.json must be '
                         'default: the rotary positions of layers with windows are never scaled')
    theta = {'rope_local_theta': float(local.get('rope_theta') or hf['rope_local_base_freq'])}
    return read_rope(hf, both.get('full_attention')) | theta | {'layer_pattern': shortest_pattern(letters)}


def write_two_bases(c):
    local = {'rope_theta': c.rope_local_theta or c.rope_theta, 'rope_type': 'default'}
    return {'rope_parameters': {'full_attention': rope_parameters_of(c), 'sliding_attention': local}}


def write_gemma3(c):
    return write_rope_and_windows(c) | write_two_bases(c)


FAMILIES['gemma3_text'] = Family(
    architecture='Gemma3ForCausalLM',
    flags=GEMMA_FLAGS | {'qk_norm': True},
    keys=GEMMA_KEYS,
    aliases={'hidden_act': 'hidden_activation', '_sliding_window_pattern': 'sliding_window_pattern'},
    defaults=GEMMA_DEFAULTS | {'rope_theta': 1e6, 'rope_local_base_freq': 1e4, 'sliding_window_pattern': 6},
    only={'use_bidirectional_attention': False},
    tensors=GEMMA_TENSORS,
    mixers='aw', read=read_gemma3, write=write_gemma3)
