"""OLMo, whose norms have no weights, and OLMo 3, OLMo 2 with windows. OLMo 2 is in llama.py."""
from nanoblocks.pretrained.families.family import Family
from nanoblocks.pretrained.families.gemma import write_two_bases
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
    WINDOW_KEYS,
)
from nanoblocks.pretrained.families.llama import FAMILIES as LLAMAS
from nanoblocks.pretrained.keys import mixer_letters, shortest_pattern, without, write_window_types
from nanoblocks.pretrained.rope import read_rope, rope_type, write_rope

FAMILIES = {}

FAMILIES['olmo'] = Family(
    architecture='OlmoForCausalLM',
    flags={'pos': 'rope', 'norm': 'layernorm', 'norm_bias': False, 'norm_eps': 1e-5, 'bias': False},
    keys=without(LLAMA_KEYS, 'rms_norm_eps') | ATTENTION_BIAS | {'clip_qkv': 'qkv_clip'},
    tensors=LLAMA_TENSORS,
    ones=r'norm\.weight$',
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# OLMo 3: windows in three of four layers. What makes the context longer is for the others


def read_olmo3(hf):
    both = hf.get('rope_parameters', {})
    full = both.get('full_attention') or hf.get('rope_scaling') or {}
    flags = read_rope(hf, full)
    local = both.get('sliding_attention') or {}
    if rope_type(local) != 'default':
        raise ValueError(f'rope_type={rope_type(local)} of sliding_attention in config.json must be default: '
                         'the rotary positions of layers with windows are never scaled')
    theta = float(local.get('rope_theta') or hf['rope_theta'])
    if 'rope_scaling' in flags or theta != flags['rope_theta']:
        flags['rope_local_theta'] = theta
    letters = mixer_letters(hf, lambda i: 'w' if (i + 1) % 4 else 'a')
    return flags | {'layer_pattern': shortest_pattern(letters)}


def write_olmo3(c):
    return write_two_bases(c) | write_window_types(c)


FAMILIES['olmo3'] = Family(
    architecture='Olmo3ForCausalLM',
    flags=LLAMAS['olmo2'].flags,
    keys=WINDOW_KEYS | ATTENTION_BIAS,
    defaults={'rms_norm_eps': 1e-5, 'rope_theta': 5e5, 'sliding_window': 4096},
    tensors=LLAMAS['olmo2'].tensors,
    mixers='aw', read=read_olmo3, write=write_olmo3)
