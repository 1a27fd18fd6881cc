"""
Llama, and the dense models that change a detail of it: Mistral, Phi 3, OLMo 2, StarCoder 2, Granite,
DiffLlama. The tables LLAMA_* are what most other files here begin with.
"""
from nanoblocks.pretrained.families.family import LAYERNORM, TIED, Family
from nanoblocks.pretrained.keys import (
    EMBED_SCALE,
    GATED_FFN,
    UNGATED_FFN,
    Key,
    read_window,
    score_scale,
    without,
)
from nanoblocks.pretrained.layouts import gate_up, qkv, qkv_in_pairs, rows
from nanoblocks.pretrained.rope import read_rope, rope_parameters, rope_type, write_rope

FAMILIES = {}

LLAMA_FLAGS = {'pos': 'rope', 'norm': 'rmsnorm', 'bias': False}
LLAMA_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head', 'num_key_value_heads': 'n_kv_head', 'head_dim': 'head_dim',
    'intermediate_size': 'ffn_width', 'max_position_embeddings': 'block_size', 'rms_norm_eps': 'norm_eps',
    'hidden_act': GATED_FFN, 'tie_word_embeddings': 'tie'}
ATTENTION_BIAS = {'attention_bias': ('qkv_bias', 'proj_bias')}
BIAS_KEYS = ATTENTION_BIAS | {'mlp_bias': 'ffn_bias'}
WINDOW_KEYS = LLAMA_KEYS | {'sliding_window': 'window'}
LLAMA_TENSORS = {
    'wte': 'model.embed_tokens', 'ln_f': 'model.norm', 'lm_head': 'lm_head',
    'h.{i}.ln_1': 'model.layers.{i}.input_layernorm',
    'h.{i}.ln_2': 'model.layers.{i}.post_attention_layernorm',
    'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv),
    'h.{a}.mixer.c_proj': 'model.layers.{i}.self_attn.o_proj',
    'h.{a}.mixer.q_norm': 'model.layers.{i}.self_attn.q_norm',
    'h.{a}.mixer.k_norm': 'model.layers.{i}.self_attn.k_norm',
    'h.{f}.ffn.c_fc': ('model.layers.{i}.mlp.{gate,up}_proj', gate_up),
    'h.{f}.ffn.c_proj': 'model.layers.{i}.mlp.down_proj'}

FAMILIES['llama'] = Family(
    architecture='LlamaForCausalLM',
    flags=LLAMA_FLAGS,
    keys=LLAMA_KEYS | BIAS_KEYS,
    tensors=LLAMA_TENSORS,
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# Mistral: a window in every layer


def read_mistral(hf):
    return read_rope(hf) | read_window(hf)


FAMILIES['mistral'] = Family(
    architecture='MistralForCausalLM',
    flags=LLAMA_FLAGS,
    keys=WINDOW_KEYS,
    defaults={'sliding_window': 4096},
    tensors=LLAMA_TENSORS,
    mixers='aw', read=read_mistral, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# Phi 3: projections in one tensor, a part of each head rotates, longrope


def read_phi3(hf):
    p = rope_parameters(hf)
    kind = rope_type(p)
    if kind not in ('default', 'longrope', 'su', 'yarn'):
        raise ValueError(f'rope_type={kind} in config.json must be default or longrope in a Phi 3')
    # the first files call longrope su or yarn
    kind = kind if kind == 'default' else 'longrope'
    return read_rope(hf, p | {'rope_type': kind}, partial=True) | read_window(hf)


def write_phi3(c):
    # transformers takes the trained context from the top level
    trained = {'original_max_position_embeddings': c.rope_context} if c.rope_context else {}
    return write_rope(c) | trained | {'partial_rotary_factor': c.rope_fraction}


FAMILIES['phi3'] = Family(
    architecture='Phi3ForCausalLM',
    flags=LLAMA_FLAGS,
    keys=WINDOW_KEYS,
    defaults={'rms_norm_eps': 1e-5},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.c_attn': 'model.layers.{i}.self_attn.qkv_proj',
        'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.gate_up_proj'},
    mixers='aw', read=read_phi3, write=write_phi3)


# ----------------------------------------------------------------------------------------------------------
# OLMo 2: norms after the branches; queries and keys normed over all heads at once

OUTPUT_NORMS = {
    'h.{i}.ln_1_out': 'model.layers.{i}.post_attention_layernorm',
    'h.{i}.ln_2_out': 'model.layers.{i}.post_feedforward_layernorm'}

FAMILIES['olmo2'] = Family(
    architecture='Olmo2ForCausalLM',
    flags=LLAMA_FLAGS | {'norm_at': 'output', 'qk_norm': 'full'},
    keys=LLAMA_KEYS | ATTENTION_BIAS,
    defaults={'rms_norm_eps': 1e-5},
    tensors=LLAMA_TENSORS | OUTPUT_NORMS,
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# StarCoder 2: LayerNorm, biases, no gate

FAMILIES['starcoder2'] = Family(
    architecture='Starcoder2ForCausalLM',
    flags=LAYERNORM | {'pos': 'rope', 'bias': False},
    keys=without(WINDOW_KEYS, 'rms_norm_eps') | {
        'norm_epsilon': 'norm_eps', 'hidden_act': UNGATED_FFN,
        'use_bias': ('qkv_bias', 'proj_bias', 'ffn_bias')},
    defaults=TIED | {'norm_epsilon': 1e-5, 'use_bias': True, 'hidden_act': 'gelu_pytorch_tanh'},
    tensors=LLAMA_TENSORS | {
        'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.c_fc', 'h.{f}.ffn.c_proj': 'model.layers.{i}.mlp.c_proj'},
    mixers='aw', read=read_mistral, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# Granite: four multipliers

FAMILIES['granite'] = Family(
    architecture='GraniteForCausalLM',
    flags=LLAMA_FLAGS,
    keys=LLAMA_KEYS | BIAS_KEYS | {
        'residual_multiplier': 'residual_scale',
        'attention_multiplier': score_scale(float, float),
        'embedding_multiplier': EMBED_SCALE,
        'logits_scaling': Key(('logit_scale',), lambda value, hf: 1 / value, lambda c: 1 / c.logit_scale)},
    defaults={'embedding_multiplier': 1.0, 'residual_multiplier': 1.0, 'attention_multiplier': 1.0,
              'logits_scaling': 1.0},
    tensors=LLAMA_TENSORS,
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# DiffLlama: differential attention; no weights in the norm of a pair's output

FAMILIES['diffllama'] = Family(
    architecture='DiffLlamaForCausalLM',
    flags=LLAMA_FLAGS | {'attn': 'diff', 'diff_gain': False},
    keys=LLAMA_KEYS | ATTENTION_BIAS,
    defaults={'rms_norm_eps': 1e-5},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_in_pairs),
        'h.{a}.mixer.lambdas': ('model.layers.{i}.self_attn.lambda_{q1,k1,q2,k2}', rows)},
    read=read_rope, write=write_rope)
