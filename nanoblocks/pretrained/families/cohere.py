"""Cohere's Command R: LayerNorm without bias, both branches from one norm, interleaved rotary pairs."""
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.keys import renamed, without
from nanoblocks.pretrained.layouts import norm_interleaved, qkv_interleaved
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

FAMILIES['cohere'] = Family(
    architecture='CohereForCausalLM',
    flags={'pos': 'rope', 'norm': 'layernorm', 'norm_bias': False, 'bias': False, 'residual': 'shared'},
    keys=without(LLAMA_KEYS, 'rms_norm_eps', 'head_dim') | ATTENTION_BIAS | {
        'layer_norm_eps': 'norm_eps', 'logit_scale': 'logit_scale',
        'use_qk_norm': renamed('qk_norm', {True: 'heads', False: False})},
    defaults=TIED | {'rope_theta': 5e5, 'logit_scale': 0.0625, 'use_qk_norm': False},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_interleaved),
        'h.{a}.mixer.q_norm': ('model.layers.{i}.self_attn.q_norm', norm_interleaved),
        'h.{a}.mixer.k_norm': ('model.layers.{i}.self_attn.k_norm', norm_interleaved)},
    read=read_rope, write=write_rope)
