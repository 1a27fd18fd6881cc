"""Cohere's Command R and A: LayerNorm without bias, both branches from one norm, interleaved rotary pairs."""
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.families.no_rope import read_rotating
from nanoblocks.pretrained.keys import mixer_letters, renamed, without
from nanoblocks.pretrained.layouts import norm_interleaved, qkv_interleaved
from nanoblocks.pretrained.rope import read_rope, write_rope, write_rope_and_windows

FAMILIES = {}

COHERE_FLAGS = {'norm': 'layernorm', 'norm_bias': False, 'bias': False, 'residual': 'shared'}
COHERE_KEYS = without(LLAMA_KEYS, 'rms_norm_eps', 'head_dim') | ATTENTION_BIAS | {
    'layer_norm_eps': 'norm_eps', 'logit_scale': 'logit_scale'}

FAMILIES['cohere'] = Family(
    architecture='CohereForCausalLM',
    flags=COHERE_FLAGS | {'pos': 'rope'},
    keys=COHERE_KEYS | {'use_qk_norm': renamed('qk_norm', {True: 'heads', False: False})},
    defaults=TIED | {'rope_theta': 5e5, 'logit_scale': 0.0625, 'use_qk_norm': False},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_interleaved),
        'h.{a}.mixer.q_norm': ('model.layers.{i}.self_attn.q_norm', norm_interleaved),
        'h.{a}.mixer.k_norm': ('model.layers.{i}.self_attn.k_norm', norm_interleaved)},
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# Cohere 2: every fourth layer sees all tokens and does not rotate, the others have windows


def read_cohere2(hf):
    every = hf['sliding_window_pattern']
    letters = mixer_letters(hf, lambda i: 'w' if (i + 1) % every else 'a')
    return read_rotating(hf, letters, [letter == 'w' for letter in letters])


FAMILIES['cohere2'] = Family(
    architecture='Cohere2ForCausalLM',
    flags=COHERE_FLAGS,
    keys=COHERE_KEYS | {'sliding_window': 'window'},
    aliases={'_sliding_window_pattern': 'sliding_window_pattern'},
    defaults=TIED | {'logit_scale': 0.0625, 'sliding_window': 4096, 'sliding_window_pattern': 4},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_interleaved)},
    mixers='awn', read=read_cohere2, write=write_rope_and_windows)
