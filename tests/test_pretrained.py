"""
Checkpoints in Hugging Face format: logits equal to `transformers`, in and out.

Every row of CASES is a tiny random checkpoint made by `transformers` itself: norm weights are not one, biases
are not zero, sizes are odd, and the text is longer than any window, chunk and original context. Each is read
with the config.json that transformers 5 writes and with one in the style of what was published before it.
"""
import copy
import functools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, build, flags_of, shrink, toy

from model import GPT, GPTConfig
from nanoblocks import pretrained
from nanoblocks.pretrained import families
from nanoblocks.pretrained.families import DEFAULTS, FAMILIES

transformers = pytest.importorskip('transformers', reason='transformers is what the logits are compared with')
safetensors_torch = pytest.importorskip('safetensors.torch', reason='checkpoints are safetensors files')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, T, PROMPT, NEW = 61, 45, 13, 32
TOLERANCE = 2e-4
# what transformers' greedy choice must win by, so that a rounding cannot turn it
MARGIN = 2e-3


class Case(NamedTuple):
    model_type: str
    # what the config class is given beside SIZES
    flags: dict = {}
    # what `published` cannot know of the older config.json; None: that style cannot say this
    old: dict | None = {}
    # falcon's eager attention adds alibi twice: there sdpa is the reference
    attention: str = 'eager'
    # False: transformers chooses otherwise with its cache (frequencies that depend on the length; a finite
    # time_step_limit, which its step does not apply)
    cache: bool = True
    # no checkpoint that people use asks for this: it may be refused, if the sentence names this key
    rare: str = ''
    # tensors that cannot matter: without rope, softmax does not see a bias of the keys
    inert: str = 'none'


# so large that another one shows
EPS = 2e-3
# each family takes those that its config class knows
SIZES = dict(vocab_size=V, hidden_size=36, intermediate_size=51, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, max_position_embeddings=32, bos_token_id=None,
             eos_token_id=None, pad_token_id=None, rms_norm_eps=EPS, layer_norm_eps=EPS,
             layer_norm_epsilon=EPS, norm_epsilon=EPS)
MHA = dict(num_key_value_heads=6, head_dim=6)
FOUR, FIVE = dict(num_hidden_layers=4), dict(num_hidden_layers=5)
WINDOW = dict(sliding_window=7)
ABSENT = object()


def rope(kind='default', theta=1000.0, **more):
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': theta, **more}}


def layers(letters):
    return [{'f': 'full_attention', 's': 'sliding_attention'}[letter] for letter in letters]


LINEAR = rope('linear', factor=2.5)
DYNAMIC = {**rope('dynamic', factor=3.0), 'max_position_embeddings': 16}
BEFORE = dict(original_max_position_embeddings=11)
# few pairs turn in a small head: this bends the ramp in their midst
BENT = dict(beta_fast=0.6, beta_slow=0.14, **BEFORE)
YARN = rope('yarn', 20.0, factor=4.0, **BENT)
YARN_PLAIN = rope('yarn', 200.0, factor=3.0)
YARN_FACTOR = rope('yarn', 90.0, factor=4.0, attention_factor=1.3, **BEFORE)
YARN_MSCALE = rope('yarn', 20.0, factor=6.0, mscale=1.0, mscale_all_dim=0.6, **BENT)
YARN_SAME = rope('yarn', 90.0, factor=6.0, mscale=0.8, mscale_all_dim=0.8, **BEFORE)
YARN_HALF = rope('yarn', 20.0, factor=6.0, mscale_all_dim=0.8, **BENT)
YARN_ONES = rope('yarn', 20.0, factor=6.0, mscale=1.0, mscale_all_dim=1.0, **BENT)
LLAMA3 = rope('llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=3.0, **BEFORE)
LONG = dict(short_factor=[1.0, 1.3, 2.5], long_factor=[1.2, 3.0, 7.5])
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=19)
GEMMA = dict(**WINDOW, query_pre_attn_scalar=23)
GEMMA3 = dict(**GEMMA, sliding_window_pattern=3)
DEEPSEEK = dict(**MHA, **FOUR, kv_lora_rank=14, q_lora_rank=None, qk_nope_head_dim=7, qk_rope_head_dim=6,
                v_head_dim=9, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2,
                moe_intermediate_size=19, first_k_dense_replace=1, routed_scaling_factor=1.7)
# transformers' v2 views pairs as complex numbers, which needs even strides
DEEPSEEK2 = {**DEEPSEEK, 'qk_nope_head_dim': 8}
DEEPSEEK3 = dict(**DEEPSEEK, **rope(), n_group=3, topk_group=2)
JAMBA = dict(**FIVE, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
             num_experts=4, mamba_d_state=7, mamba_d_conv=3, mamba_dt_rank=9)
MAMBA = dict(state_size=5)
MAMBA2 = dict(num_heads=9, head_dim=8, state_size=7, n_groups=1, chunk_size=8)
NEOX = dict(num_attention_heads=3)
HALF = rope(partial_rotary_factor=0.5)
MPT = dict(d_model=35, n_heads=5)
LLAMA4 = dict(**FIVE, num_local_experts=5, num_experts_per_tok=1, intermediate_size=19,
              intermediate_size_mlp=51, interleave_moe_layer_step=2, attention_chunk_size=8, floor_scale=5,
              attn_scale=0.4)
OSS = dict(**WINDOW, num_local_experts=5, num_experts_per_tok=2, intermediate_size=19, swiglu_limit=1.5)
OSS_YARN = {'rope_parameters': {**YARN['rope_parameters'], 'truncate': False}}

CASES = {
    'llama': Case('llama'),
    'llama-mha-tied': Case('llama', {**MHA, **rope(theta=10000.0), 'tie_word_embeddings': True},
                           old={'rope_theta': ABSENT, 'num_key_value_heads': ABSENT}),
    'llama-mqa-biased': Case('llama', {'num_key_value_heads': 1, 'attention_bias': True, 'mlp_bias': True}),
    'llama-attention-bias': Case('llama', {'attention_bias': True, 'tie_word_embeddings': True}),
    'llama-mha-biased': Case('llama', {**MHA, 'attention_bias': True, 'mlp_bias': True}),
    'llama-linear': Case('llama', LINEAR),
    'llama-dynamic': Case('llama', DYNAMIC, cache=False),
    'llama-yarn': Case('llama', YARN),
    'llama-yarn-plain': Case('llama', YARN_PLAIN),
    'llama-yarn-factor': Case('llama', YARN_FACTOR),
    'llama-yarn-mscale': Case('llama', YARN_MSCALE),
    'llama-llama3': Case('llama', LLAMA3),
    'mistral': Case('mistral', WINDOW),
    'mistral-full': Case('mistral', {'sliding_window': None, **rope(theta=1e6)}),
    'mistral-null-head': Case('mistral', {**WINDOW, 'head_dim': None}, old={'head_dim': None}),
    'mixtral': Case('mixtral', {'num_local_experts': 5, **rope(theta=1e6)}, old={'rope_theta': ABSENT}),
    'mixtral-plain-head': Case('mixtral', {'num_local_experts': 3, 'head_dim': 6}),
    'mixtral-window': Case('mixtral', {**WINDOW, 'num_local_experts': 4, 'num_experts_per_tok': 3}),
    'qwen2': Case('qwen2', old={'sliding_window': 7, 'max_window_layers': 0}),
    'qwen2-window': Case('qwen2', {**WINDOW, **FOUR, 'use_sliding_window': True, 'max_window_layers': 2}),
    'qwen2-tied-yarn': Case('qwen2', {**YARN, 'tie_word_embeddings': True}),
    'qwen2-layer-types': Case('qwen2', {**WINDOW, 'use_sliding_window': True, 'layer_types': layers('sfs')},
                              old=None),
    'qwen3': Case('qwen3', rope(theta=1e6)),
    'qwen3-biased-tied': Case('qwen3', {'attention_bias': True, 'tie_word_embeddings': True}),
    'qwen3-window-yarn': Case('qwen3', {**WINDOW, **YARN, 'use_sliding_window': True,
                                        'max_window_layers': 1}),
    'qwen2_moe': Case('qwen2_moe', {**EXPERTS, 'shared_expert_intermediate_size': 23}),
    'qwen2_moe-dense-layers': Case('qwen2_moe', {**EXPERTS, **FIVE, 'shared_expert_intermediate_size': 23,
                                                 'decoder_sparse_step': 2, 'mlp_only_layers': [1],
                                                 'norm_topk_prob': True}),
    'qwen2_moe-no-bias': Case('qwen2_moe', {**EXPERTS, 'shared_expert_intermediate_size': 19,
                                            'qkv_bias': False, 'num_experts_per_tok': 3}),
    'qwen3_moe': Case('qwen3_moe', {**EXPERTS, 'norm_topk_prob': True}),
    'qwen3_moe-not-normed': Case('qwen3_moe', {**EXPERTS, 'tie_word_embeddings': True,
                                               'attention_bias': True}, old={'norm_topk_prob': ABSENT}),
    'qwen3_moe-dense-layers': Case('qwen3_moe', {**EXPERTS, **FOUR, 'norm_topk_prob': True, **YARN,
                                                 'decoder_sparse_step': 2, 'mlp_only_layers': [3]}),
    'gemma2': Case('gemma2', {**GEMMA, 'attn_logit_softcapping': 1.5, 'final_logit_softcapping': 4.0}),
    'gemma2-no-caps': Case('gemma2', {**GEMMA, 'attn_logit_softcapping': None, 'num_key_value_heads': 3,
                                      'final_logit_softcapping': None}),
    'gemma2-one-cap': Case('gemma2', {**GEMMA, **FOUR, 'attn_logit_softcapping': None,
                                      'final_logit_softcapping': 4.0}),
    'gemma3': Case('gemma3_text', {**GEMMA3, **FOUR}),
    'gemma3-default-pattern': Case('gemma3_text', {**GEMMA, 'num_hidden_layers': 7},
                                   old={'sliding_window_pattern': ABSENT}),
    'gemma3-scaled': Case('gemma3_text', {
        **GEMMA3, **FIVE, 'final_logit_softcapping': 4.0, 'rope_parameters': {
            'full_attention': {'rope_type': 'linear', 'rope_theta': 5000.0, 'factor': 4.0},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 500.0}}}),
    'gemma3-all-global': Case('gemma3_text', {**GEMMA, 'sliding_window_pattern': 1}),
    'deepseek_v2': Case('deepseek_v2', {**DEEPSEEK2, 'topk_method': 'greedy'}),
    'deepseek_v2-groups': Case('deepseek_v2', {**DEEPSEEK2, 'q_lora_rank': 11, 'n_group': 3, 'topk_group': 2,
                                               'topk_method': 'group_limited_greedy',
                                               'attention_bias': True}),
    'deepseek_v2-yarn': Case('deepseek_v2', {**DEEPSEEK2, **YARN_MSCALE, 'q_lora_rank': 11,
                                             'first_k_dense_replace': 0}),
    'deepseek_v2-yarn-same': Case('deepseek_v2', {**DEEPSEEK2, **YARN_SAME, 'n_shared_experts': 1}),
    'deepseek_v2-yarn-plain': Case('deepseek_v2', {**DEEPSEEK2, **YARN}),
    'deepseek_v3': Case('deepseek_v3', {**DEEPSEEK3, 'q_lora_rank': 11}),
    'deepseek_v3-no-norm': Case('deepseek_v3', {**DEEPSEEK3, 'norm_topk_prob': False, 'n_group': 1,
                                                'topk_group': 1, 'n_shared_experts': 1}),
    'deepseek_v3-yarn': Case('deepseek_v3', {**DEEPSEEK3, **YARN_MSCALE, 'q_lora_rank': 11}),
    'deepseek_v3-yarn-same': Case('deepseek_v3', {**DEEPSEEK3, **YARN_SAME, 'first_k_dense_replace': 2}),
    'deepseek_v3-yarn-ones': Case('deepseek_v3', {**DEEPSEEK3, **YARN_ONES}),
    'deepseek_v3-half-split': Case('deepseek_v3', {**DEEPSEEK3, 'rope_interleave': False,
                                                   'attention_bias': True, 'q_lora_rank': 11}),
    'jamba': Case('jamba', JAMBA),
    'jamba-dense': Case('jamba', {**JAMBA, 'num_experts': 1, 'num_experts_per_tok': 1,
                                  'attn_layer_offset': 2, 'mamba_dt_rank': 'auto'}),
    'jamba-tied': Case('jamba', {**JAMBA, **FOUR, 'attn_layer_period': 4, 'attn_layer_offset': 3,
                                 'expert_layer_offset': 0, 'tie_word_embeddings': True}),
    'mamba': Case('mamba', MAMBA),
    'mamba-untied': Case('mamba', {**MAMBA, 'tie_word_embeddings': False, 'conv_kernel': 3, 'expand': 1,
                                   'time_step_rank': 5}),
    'mamba2': Case('mamba2', MAMBA2),
    'mamba2-groups': Case('mamba2', {**MAMBA2, 'n_groups': 3, 'tie_word_embeddings': True, 'conv_kernel': 3}),
    'mamba2-limit': Case('mamba2', {**MAMBA2, 'time_step_limit': (0.01, 0.2)}, cache=False),
    'falcon-multi-query': Case('falcon'),
    'falcon-new': Case('falcon', {'new_decoder_architecture': True, 'num_kv_heads': 2}),
    'falcon-new-one-norm': Case('falcon', {'new_decoder_architecture': True, 'num_kv_heads': 3,
                                           'num_ln_in_parallel_attn': 1, 'ffn_hidden_size': 50}),
    'falcon-alibi': Case('falcon', {'alibi': True, 'multi_query': False, 'parallel_attn': False,
                                    'bias': True}, attention='sdpa'),
    'falcon-alibi-parallel': Case('falcon', {'alibi': True}, attention='sdpa'),
    'falcon-sequential': Case('falcon', {'multi_query': False, 'parallel_attn': False}),
    'falcon-per-head-biased': Case('falcon', {'multi_query': False, 'bias': True,
                                              'tie_word_embeddings': False}),
    'bloom': Case('bloom'),
    'bloom-post-norm-residual': Case('bloom', {'num_attention_heads': 4,
                                               'apply_residual_connection_post_layernorm': True}),
    'mpt': Case('mpt', {**MPT, 'layer_norm_epsilon': 1e-5}, old={'layer_norm_epsilon': ABSENT}),
    'mpt-clipped': Case('mpt', {**MPT, 'attn_config': {'clip_qkv': 0.8}}),
    'mpt-scaled': Case('mpt', {'n_heads': 4, 'attn_config': {'softmax_scale': 0.8, 'clip_qkv': 1.2}}),
    # a quarter of 18 coordinates are 4
    'gpt_neox': Case('gpt_neox', {'num_attention_heads': 2, **rope(partial_rotary_factor=0.25)}),
    'gpt_neox-half': Case('gpt_neox', {**NEOX, **HALF}),
    'gpt_neox-sequential': Case('gpt_neox', {**NEOX, **HALF, 'use_parallel_residual': False}),
    'gpt_neox-tied': Case('gpt_neox', {**NEOX, **rope(partial_rotary_factor=1.0), 'tie_word_embeddings': True,
                                       'hidden_act': 'gelu_new'}),
    'gpt_neox-linear': Case('gpt_neox', {**NEOX, **rope('linear', factor=2.0, partial_rotary_factor=0.5),
                                         'attention_bias': False}),
    'phi3': Case('phi3'),
    'phi3-window': Case('phi3', {**WINDOW, 'num_key_value_heads': 6}),
    'phi3-partial': Case('phi3', {'num_attention_heads': 3, 'num_key_value_heads': 1, **HALF}),
    'phi3-short': Case('phi3', {**rope('longrope', **LONG), 'original_max_position_embeddings': 64,
                                'max_position_embeddings': 256}),
    'phi3-long': Case('phi3', {**rope('longrope', **LONG), 'original_max_position_embeddings': 16,
                               'max_position_embeddings': 64, **WINDOW},
                      old={'rope_scaling': {'type': 'longrope', **LONG}}, cache=False),
    'phi3-long-partial': Case('phi3', {**rope('longrope', **LONG, partial_rotary_factor=0.5),
                                       'original_max_position_embeddings': 8, 'num_attention_heads': 3,
                                       'num_key_value_heads': 1, 'tie_word_embeddings': True}),
    'olmo2': Case('olmo2'),
    'olmo2-mha-biased': Case('olmo2', {'num_key_value_heads': 6, 'attention_bias': True, **rope(theta=5e5)}),
    'llama4': Case('llama4_text', LLAMA4, old={'moe_layers': ABSENT, 'no_rope_layers': []}),
    'llama4-all-experts': Case('llama4_text', {**LLAMA4, **LLAMA3, 'interleave_moe_layer_step': 1,
                                               'no_rope_layer_interval': 2, 'num_experts_per_tok': 2},
                               old={'moe_layers': ABSENT, 'no_rope_layers': ABSENT}),
    'llama4-plain-attention': Case('llama4_text', {**LLAMA4, 'use_qk_norm': False,
                                                   'attn_temperature_tuning': False, 'attention_bias': True},
                                   inert=r'layers\.3\..*k_proj.bias'),
    'llama4-listed-layers': Case('llama4_text', {**LLAMA4, 'moe_layers': [0, 3],
                                                 'no_rope_layers': [0, 1, 1, 0, 1]}),
    'llama4-dense': Case('llama4_text', {**LLAMA4, 'moe_layers': [], 'tie_word_embeddings': True}),
    'gpt_oss': Case('gpt_oss', {**OSS, **OSS_YARN}, old={'experts_per_token': 2, 'swiglu_alpha': ABSENT}),
    'gpt_oss-plain-rope': Case('gpt_oss', {**OSS, **FIVE, **rope(), 'swiglu_limit': 0.7,
                                           'num_experts_per_tok': 3}, old=None),
    'smollm3': Case('smollm3', {**FIVE, **rope(theta=2e6)}, old={'rope_theta': ABSENT,
                                                                'no_rope_layers': ABSENT}),
    'smollm3-listed-layers': Case('smollm3', {**FIVE, 'no_rope_layers': [1, 0, 1, 1, 0], 'mlp_bias': True,
                                              'tie_word_embeddings': False, 'attention_bias': True},
                                  inert=r'layers\.[14]\..*k_proj.bias'),
    'smollm3-window': Case('smollm3', {**FIVE, **WINDOW, **YARN, 'no_rope_layer_interval': 2,
                                       'use_sliding_window': True}, old={'no_rope_layers': ABSENT}),
    'starcoder2': Case('starcoder2'),
    'starcoder2-window': Case('starcoder2', {**WINDOW, 'use_bias': False, 'tie_word_embeddings': False}),
    'granite': Case('granite', dict(embedding_multiplier=3.0, residual_multiplier=0.6, logits_scaling=0.7,
                                    attention_multiplier=0.3)),
    'granite-biased': Case('granite', dict(embedding_multiplier=4, residual_multiplier=0.7, logits_scaling=2,
                                           attention_multiplier=0.5, attention_bias=True, mlp_bias=True,
                                           tie_word_embeddings=True)),
    'cohere': Case('cohere', {'logit_scale': 0.7}),
    'cohere-qk-norm': Case('cohere', {'use_qk_norm': True, 'logit_scale': 0.7, 'attention_bias': True,
                                      **rope(theta=500000.0)}, old={'rope_theta': ABSENT}),
    'cohere-untied': Case('cohere', {'tie_word_embeddings': False, 'logit_scale': 1.0, **LLAMA3}),
    'gpt2': Case('gpt2', {'n_positions': 48}, old={'n_ctx': 48}),
    'gpt2-inner-relu': Case('gpt2', {'n_positions': 48, 'n_inner': 50, 'activation_function': 'relu',
                                     'layer_norm_epsilon': 1e-3}),
    'gpt2-gelu-untied': Case('gpt2', {'n_positions': 48, 'activation_function': 'gelu',
                                      'tie_word_embeddings': False}),

    # combinations at the edge of what a key can say
    'llama-linear-by-one': Case('llama', rope('linear', factor=1.0)),
    'mistral-yarn-by-one': Case('mistral', {**WINDOW, **rope('yarn', factor=1.0, mscale=0.7)}),
    'smollm3-no-rope': Case('smollm3', {'no_rope_layers': [0, 0, 0]}, inert='k_proj.bias'),
    'llama4-no-chunks': Case('llama4_text', {**LLAMA4, 'layer_types': layers('fffff')}, old=None),
    'jamba-attention-alone': Case('jamba', {**JAMBA, 'attn_layer_period': 1, 'attn_layer_offset': 0}),
    'deepseek_v2-dense': Case('deepseek_v2', {**DEEPSEEK2, **YARN_HALF, 'first_k_dense_replace': 4}),
    'deepseek_v3-yarn-half': Case('deepseek_v3', {**DEEPSEEK3, **YARN_HALF, 'v_head_dim': 5}),
    'qwen2_moe-no-experts': Case('qwen2_moe', {**EXPERTS, 'shared_expert_intermediate_size': 23,
                                               'mlp_only_layers': [0, 1, 2]}),
    'qwen2_moe-window-default': Case('qwen2_moe', {**EXPERTS, **WINDOW, 'use_sliding_window': True,
                                                   'shared_expert_intermediate_size': 23}),

    # rarely or never published
    'llama-gelu': Case('llama', {'hidden_act': 'gelu'}, rare='hidden_act'),
    'gemma2-erf': Case('gemma2', {**GEMMA, 'hidden_activation': 'gelu'}, rare='hidden_activation'),
    'gemma2-biased': Case('gemma2', {**GEMMA, 'attention_bias': True}, rare='attention_bias'),
    'qwen2_moe-window': Case('qwen2_moe', {**EXPERTS, **WINDOW, **FOUR, 'shared_expert_intermediate_size': 23,
                                           'use_sliding_window': True, 'layer_types': layers('sfff')},
                             old=None, rare='sliding_window'),
    'qwen3_moe-window': Case('qwen3_moe', {**EXPERTS, **WINDOW, 'use_sliding_window': True},
                             rare='sliding_window'),
    'jamba-biased': Case('jamba', {**JAMBA, 'mamba_proj_bias': True}, rare='mamba_proj_bias'),
    'jamba-no-conv-bias': Case('jamba', {**JAMBA, 'mamba_conv_bias': False}, rare='mamba_conv_bias'),
    'mamba-biased': Case('mamba', {**MAMBA, 'use_bias': True}, rare='use_bias'),
    'mamba-no-conv-bias': Case('mamba', {**MAMBA, 'use_conv_bias': False}, rare='use_conv_bias'),
    'mamba2-biased': Case('mamba2', {**MAMBA2, 'use_bias': True}, rare='use_bias'),
    'mamba2-no-conv-bias': Case('mamba2', {**MAMBA2, 'use_conv_bias': False}, rare='use_conv_bias'),
    'gpt2-unscaled': Case('gpt2', {'n_positions': 48, 'scale_attn_weights': False},
                          rare='scale_attn_weights'),
    'gpt2-scaled-by-layer': Case('gpt2', {'n_positions': 48, 'scale_attn_by_inverse_layer_idx': True},
                                 rare='scale_attn_by_inverse_layer_idx'),
    'gpt_oss-alpha': Case('gpt_oss', {**OSS, **OSS_YARN, 'swiglu_alpha': 1.2}, rare='swiglu_alpha'),
    'falcon-relu': Case('falcon', {'activation': 'relu'}, rare='activation'),
    'starcoder2-erf': Case('starcoder2', {'hidden_act': 'gelu'}, rare='hidden_act'),
    'gpt_neox-tanh': Case('gpt_neox', {**NEOX, **HALF, 'hidden_act': 'gelu_fast'}),
}
every_case = pytest.mark.parametrize('name', CASES)
one_of_each = pytest.mark.parametrize('name', {case.model_type: name for name, case in reversed(CASES.items())
                                               if not case.rare}.values())


# ----------------------------------------------------------------------------------------------------------
# Checkpoints, made by transformers


def config_of(case):
    config_class = type(transformers.AutoConfig.for_model(case.model_type))
    mapped = config_class.attribute_map
    known = {field.name for field in fields(config_class)} | set(mapped)
    sizes = {key: value for key, value in SIZES.items() if key in known and mapped.get(key) not in case.flags}
    # transformers writes into the rope parameters it is given
    return config_class(**copy.deepcopy(sizes | case.flags))


@torch.no_grad()
def redraw(model, seed=0):
    """
    Every tensor away from its start, and none so large that rounding grows from layer to layer.
    A tied embedding is small, or every token would be followed by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, p in model.state_dict().items():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1 or name.endswith('A_log'):
            p.add_((0.1 if 'bias' in name else 0.25) * noise)
        elif p.shape[0] == V:
            p.copy_((0.1 if tied else 0.6 if 'embed' in name else 0.2) * noise)
        else:
            gain = 0.1 if 'mamba.out_proj' in name else 0.4 if 'mixer.out_proj' in name else 1.2
            p.copy_(gain / math.sqrt(p.shape[-1]) * noise)
    return model


def load_reference(folder, case, **more):
    # the fused experts want strides of 16 bytes, which odd sizes do not have
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=case.attention,
        experts_implementation='eager', **more)


# keys that transformers 5 renamed
RENAMED = {
    'bloom': {'hidden_size': 'n_embed', 'n_head': 'num_attention_heads'},
    'gemma3_text': {'_sliding_window_pattern': 'sliding_window_pattern'},
    'gpt_neox': {'rope_theta': 'rotary_emb_base', 'partial_rotary_factor': 'rotary_pct'},
    'qwen3_moe': {'num_local_experts': 'num_experts'},
}


def published(config, case):
    """config.json (a dict) as it was written before transformers 5."""
    config = {**config, 'torch_dtype': config['dtype'], 'transformers_version': '4.41.2'}
    for key in ('dtype', 'layer_types'):
        config.pop(key, None)
    parameters = config.pop('rope_parameters', None) or {}
    if 'full_attention' in parameters:
        config['rope_local_base_freq'] = parameters['sliding_attention']['rope_theta']
        parameters = parameters['full_attention']
    for key in ('rope_theta', 'partial_rotary_factor'):
        if key in parameters:
            config[key] = parameters[key]
    scaling = {key: value for key, value in parameters.items() if key not in config and key != 'rope_type'}
    if scaling:
        # the key was `type` until 2024
        word = 'type' if parameters['rope_type'] in ('dynamic', 'yarn') else 'rope_type'
        config['rope_scaling'] = {word: parameters['rope_type'], **scaling}
    elif parameters:
        config['rope_scaling'] = None
    # older files leave out what is the default, and the width of a head where it follows from the others
    default = {key: getattr(type(config_of(case))(), key, None) for key in
               ('attention_bias', 'mlp_bias', 'tie_word_embeddings', 'qkv_bias', 'num_experts_per_tok')}
    if case.model_type in ('llama', 'qwen3_moe', 'olmo2'):
        default['head_dim'] = config['hidden_size'] // config['num_attention_heads']
    config = {key: value for key, value in config.items() if key not in default or default[key] != value}
    renamed = RENAMED.get(case.model_type, {})
    config = {renamed.get(key, key): value for key, value in config.items()} | case.old
    return {key: value for key, value in config.items() if value is not ABSENT}


def make(folder, name):
    """Saves the checkpoint of a case, in both styles of config.json, and what transformers makes of it."""
    case = CASES[name]
    redraw(transformers.AutoModelForCausalLM.from_config(config_of(case))).save_pretrained(folder)
    made = SimpleNamespace(case=case, folder=folder, old_folder=None)
    if case.old is not None:
        made.old_folder = folder / 'published'
        made.old_folder.mkdir()
        (made.old_folder / 'model.safetensors').symlink_to(folder / 'model.safetensors')
        # transformers 5 writes {"__float__": "Infinity"}, older files a bare Infinity
        config = json.loads((folder / 'config.json').read_text(),
                            object_hook=lambda d: float(d['__float__']) if '__float__' in d else d)
        (made.old_folder / 'config.json').write_text(json.dumps(published(config, case)))
    made.model = load_reference(folder, case).eval()
    for seed in range(40):
        made.idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))
        if greedy(made):
            return made
    raise AssertionError(f'{name}: no prompt leads to a clear choice of all {NEW} tokens')


@torch.no_grad()
def greedy(made):
    """Adds logits and greedy tokens to `made`; False where two are about as likely, or all the same."""
    made.prompt = made.idx[:, :PROMPT]
    out = made.model.generate(made.prompt, max_new_tokens=NEW, do_sample=False, use_cache=made.case.cache,
                              return_dict_in_generate=True, output_logits=True)
    made.tokens, new = out.sequences, out.sequences[:, PROMPT:]
    made.logits = made.model(made.idx).logits
    best = torch.stack(out.logits, 1).topk(2).values
    if (best[..., 0] - best[..., 1]).min() < MARGIN or len(new.unique()) < 5:
        return False
    if made.case.cache:
        whole = made.model(made.tokens).logits[:, PROMPT - 1:-1].argmax(-1)
        assert torch.equal(whole, new), 'transformers chooses otherwise with its cache: cache must be False'
    return True


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """made(name): the checkpoint of a case, made when it is first asked for."""
    return functools.cache(lambda name: make(tmp_path_factory.mktemp(name), name))


# ----------------------------------------------------------------------------------------------------------
# The reference itself


def pieces(name, p):
    """Views of a tensor that a fault could hit on its own: each expert, and of that the gate and the rest."""
    if not re.search(r'experts\.[a-z_]+$', name):
        return [p]
    dim = 0 if p[0].shape[0] > p[0].shape[-1] else -1
    return [half for expert in p for half in (expert.chunk(2, dim) if 'gate_up' in name else [expert])]


@one_of_each
@torch.no_grad()
def test_every_tensor_of_the_reference_matters(made, name):
    made = made(name)
    generator, live = torch.Generator().manual_seed(0), made.idx[0, 0].item()
    parts = [(f'{key} {number}', part) for key, p in made.model.state_dict().items()
             for number, part in enumerate(pieces(key, p)) if not re.search(made.case.inert, key)]
    for key, part in parts:
        moved = []
        while len(moved) < 8 and max(moved, default=0) < 5 * TOLERANCE:
            # a few single elements matter to nobody, as the bias of a key that softmax does not see
            at = [torch.randint(size, (), generator=generator).item() for size in part.shape]
            at[0] = live if part.shape[0] == V else at[0]
            kept = part[*at].item()
            part[*at] += 0.5
            moved.append((made.model(made.idx[:1]).logits - made.logits[:1]).abs().max().item())
            part[*at] = kept
        assert max(moved) > 5 * TOLERANCE, f'{name}: {key} moves the logits by {max(moved):.1e} only'


@every_case
@torch.no_grad()
def test_the_published_config_means_the_same(made, name):
    made = made(name)
    if made.old_folder:
        logits = load_reference(made.old_folder, made.case)(made.idx).logits
        assert torch.equal(logits, made.logits)


# ----------------------------------------------------------------------------------------------------------
# Ours against the reference

# the exact families that export whatever their size
EXPORTED = ('gpt2', 'llama', 'mistral', 'mixtral', 'qwen3', 'gemma2', 'deepseek_v3', 'mamba2', 'jamba')
FLAGS = [field.name for field in fields(GPTConfig)]


@pytest.fixture(scope='module')
def ours(made):
    """ours(name): the checkpoint of a case in our model; skips where a rare one is refused by its key."""
    return functools.cache(lambda name: load(made(name).folder, made(name).case))


def load(folder, case=None, **overrides):
    try:
        return GPT.from_pretrained(folder, **overrides).eval()
    except ValueError as error:
        if case and case.rare and case.rare in one_sentence(error):
            pytest.skip(f'refused: {error}')
        raise


def one_sentence(error):
    message = str(error)
    assert message and '\n' not in message and len(message) < 400, message
    return message


@torch.no_grad()
def assert_logits(got, want, what, bound=TOLERANCE):
    got = got(want.idx)[0] if isinstance(got, GPT) else got(want.idx).logits
    assert got.shape == want.logits.shape and got.dtype == torch.float32, f'{what}: {got.dtype} {got.shape}'
    error = (got - want.logits).abs()
    assert error.max() <= bound, (f'{what}: error {error.max():.1e} must be at most {bound:.0e}; it is '
                                  f'{error.amax((0, 2)).tolist()} by position')


@every_case
def test_logits_equal_transformers(made, ours, name):
    assert_logits(ours(name), made(name), name)


@every_case
def test_the_published_config_reads_the_same(made, ours, name):
    made, model = made(name), ours(name)
    if made.old_folder is None:
        pytest.skip('the published style cannot say this')
    old = load(made.old_folder)
    assert_logits(old, made, f'{name}, published style')
    assert old.config == model.config


@every_case
@torch.no_grad()
def test_greedy_tokens_equal_transformers(made, ours, name):
    made, model = made(name), ours(name)
    tokens = model.generate(made.prompt, NEW, temperature=0)
    assert tokens.tolist() == made.tokens.tolist()


@every_case
@torch.no_grad()
def test_round_trip(made, ours, name, tmp_path):
    made, model = made(name), ours(name)
    try:
        model.save_pretrained(tmp_path)
    except ValueError as error:
        message = one_sentence(error)
        assert made.case.rare or made.case.model_type not in EXPORTED, message
        assert any(re.search(rf'\b{flag}\b', message) for flag in FLAGS), f'no flag is named: {message}'
        assert not list(tmp_path.iterdir()), f'refused and wrote {list(tmp_path.iterdir())}'
        return
    # transformers only warns of tensors that it misses or does not know
    theirs, info = load_reference(tmp_path, made.case, output_loading_info=True)
    assert not any(info.values()), f'{name}: {info}'
    assert_logits(theirs, made, f'{name}, exported')
    again = load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(made.idx)[0], model(made.idx)[0]), f'{name}: what is read again is not the same'


@one_of_each
def test_twenty_steps_of_fine_tuning_lower_the_loss(made, name):
    made = made(name)
    model = load(made.folder)
    inputs, targets = made.idx[:, :-1], made.idx[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    @torch.no_grad()
    def loss():
        return model.eval()(inputs, targets)[1].item()

    before = loss()
    for _ in range(20):
        optimizer.zero_grad()
        model.train()(inputs, targets)[1].backward()
        optimizer.step()
    assert loss() < before - 0.5, f'{name}: {before:.2f} became {loss():.2f}'


# keys that files leave out where they have the value that transformers means then
OPTIONAL = """
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon hidden_act hidden_activation
    activation_function activation rope_parameters attention_bias mlp_bias qkv_bias use_bias bias
    tie_word_embeddings use_sliding_window max_window_layers layer_types _sliding_window_pattern
    max_position_embeddings original_max_position_embeddings max_seq_len norm_topk_prob topk_method
    routed_scaling_factor rope_interleave decoder_sparse_step mlp_only_layers query_pre_attn_scalar
    attn_logit_softcapping final_logit_softcapping expert_layer_period mamba_expand mamba_conv_bias
    mamba_proj_bias expand conv_kernel use_conv_bias time_step_limit time_step_rank
    new_decoder_architecture multi_query parallel_attn alibi num_kv_heads num_ln_in_parallel_attn
    ffn_hidden_size apply_residual_connection_post_layernorm attn_config use_parallel_residual
    no_rope_layers no_rope_layer_interval moe_layers use_qk_norm attn_temperature_tuning floor_scale
    attn_scale attention_chunk_size swiglu_limit swiglu_alpha embedding_multiplier residual_multiplier
    logits_scaling attention_multiplier logit_scale scale_attn_weights scale_attn_by_inverse_layer_idx
    n_inner
""".split()


@one_of_each
@torch.no_grad()
def test_keys_that_are_left_out_mean_their_defaults(made, name, tmp_path):
    def drop(config, tensors):
        for key in OPTIONAL:
            config.pop(key, None)
    made = made(name)
    theirs, info = load_reference(copy_of(made, tmp_path, drop), made.case, output_loading_info=True)
    assert not any(info.values()), f'{name}: {info}'
    assert_logits(load(tmp_path), SimpleNamespace(idx=made.idx, logits=theirs(made.idx).logits), name)


# ----------------------------------------------------------------------------------------------------------
# Files


def copy_of(made, folder, change=lambda config, tensors: None):
    """The checkpoint once more in `folder`, after change(config, tensors), which may work in place."""
    config = json.loads((made.folder / 'config.json').read_text())
    tensors = safetensors_torch.load_file(made.folder / 'model.safetensors')
    change(config, tensors)
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors_torch.save_file(tensors, folder / 'model.safetensors')
    return folder


@pytest.mark.parametrize('name', ['gpt2', 'mixtral', 'llama4', 'falcon-new', 'mamba2-groups'])
@torch.no_grad()
def test_shards_read_as_one_file(made, ours, name, tmp_path):
    made = made(name)
    made.model.save_pretrained(tmp_path, max_shard_size='60KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 2
    # the vendor's own files lie beside them on the hub
    safetensors_torch.save_file({'other': torch.zeros(1)}, tmp_path / 'consolidated.safetensors')
    assert torch.equal(load(tmp_path)(made.idx)[0], ours(name)(made.idx)[0])


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gpt_oss', 'deepseek_v3', 'mamba2', 'jamba'])
@torch.no_grad()
def test_sixteen_bit_files_become_fp32(made, name, tmp_path):
    made = made(name)
    copy.deepcopy(made.model).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    theirs = load_reference(tmp_path, made.case)
    assert_logits(model, SimpleNamespace(idx=made.idx, logits=theirs(made.idx).logits), name)


@pytest.mark.parametrize('name, prefix', [('gpt2', 'transformer.'), ('bloom', 'transformer.')])
def test_the_prefix_may_be_missing(made, name, prefix, tmp_path):
    def drop(config, tensors):
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key.removeprefix(prefix)] = tensors.pop(key)
    assert_logits(load(copy_of(made(name), tmp_path, drop)), made(name), name)


@pytest.mark.parametrize('name, strays', [
    ('gpt2', {'transformer.h.0.attn.bias': (1, 1, 48, 48), 'transformer.h.0.attn.masked_bias': ()}),
    ('gpt_neox', {'gpt_neox.layers.1.attention.bias': (1, 1, 32, 32),
                  'gpt_neox.layers.1.attention.masked_bias': (),
                  'gpt_neox.layers.1.attention.rotary_emb.inv_freq': (3,)}),
    ('llama', {'model.layers.2.self_attn.rotary_emb.inv_freq': (5,)}),
    # the layer after the last predicts a second token
    ('deepseek_v3', {'model.layers.4.eh_proj.weight': (36, 72), 'model.layers.4.enorm.weight': (36,),
                     'model.layers.4.shared_head.head.weight': (V, 36),
                     'model.layers.4.embed_tokens.weight': (V, 36),
                     'model.layers.4.self_attn.o_proj.weight': (36, 54)}),
])
def test_what_is_not_a_weight_is_ignored(made, name, strays, tmp_path):
    def add(config, tensors):
        tensors |= {key: torch.ones(shape) for key, shape in strays.items()}
    assert_logits(load(copy_of(made(name), tmp_path, add)), made(name), name)


@pytest.mark.parametrize('name', ['falcon-new', 'llama-mha-tied'])
@pytest.mark.parametrize('factor', [1.0, 2.0])
def test_a_head_in_the_file_is_used_though_the_config_ties_it(made, name, factor, tmp_path):
    made = made(name)

    def add(config, tensors):
        embedding = next(p for key, p in tensors.items() if 'embed' in key and p.shape[0] == V)
        tensors['lm_head.weight'] = factor * embedding
    theirs = load_reference(copy_of(made, tmp_path, add), made.case)
    assert_logits(load(tmp_path), SimpleNamespace(idx=made.idx, logits=theirs(made.idx).logits), name)


class Marker:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_checkpoint_loads_and_runs_no_code(made, tmp_path):
    made = made('llama')
    tensors = safetensors_torch.load_file(copy_of(made, tmp_path) / 'model.safetensors')
    (tmp_path / 'model.safetensors').unlink()
    torch.save(tensors, tmp_path / 'pytorch_model.bin')
    assert_logits(load(tmp_path), made, 'pytorch_model.bin')
    torch.save(tensors | {'model.norm.weight': Marker(tmp_path / 'ran')}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pytorch_model.bin') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)
    assert not (tmp_path / 'ran').exists()


# ----------------------------------------------------------------------------------------------------------
# Bad input: one sentence with the name at fault


def setting(**keys):
    return lambda config, tensors: config.update(keys)


def rope_setting(**keys):
    return lambda config, tensors: config['rope_parameters'].update(keys)


def tensor(key, value):
    return lambda config, tensors: tensors.pop(key) if value is None else tensors.update({key: value})


def after(change):
    """A change to the files themselves, after they are written."""
    return SimpleNamespace(files=change)


UP = 'model.layers.1.mlp.up_proj.weight'
BAD = {
    'no config': ('llama', after(lambda folder: (folder / 'config.json').unlink()), 'config.json'),
    'config not json': ('llama', after(lambda folder: (folder / 'config.json').write_text('{"a":')),
                        'config.json'),
    'config a list': ('llama', after(lambda folder: (folder / 'config.json').write_text('[1]')),
                      'config.json'),
    'size of another type': ('llama', setting(hidden_size='36'), 'hidden_size|n_embd'),
    'no weights': ('llama', after(lambda folder: (folder / 'model.safetensors').unlink()), 'safetensors'),
    'truncated': ('llama', after(lambda folder: os.truncate(folder / 'model.safetensors', 50000)),
                  'model.safetensors'),
    'truncated header': ('llama', after(lambda folder: os.truncate(folder / 'model.safetensors', 40)),
                         'model.safetensors'),
    'not safetensors': ('llama', after(lambda folder: (folder / 'model.safetensors').write_text('version')),
                        'model.safetensors'),
    'missing shard': ('llama', after(lambda folder: shard(folder).unlink()), 'model-2.safetensors'),
    'truncated shard': ('llama', after(lambda folder: os.truncate(shard(folder), 5000)),
                        'model-2.safetensors'),
    'index not json': ('llama', after(lambda folder: index(folder, '{"weight_map":')), 'index.json'),
    'index without map': ('llama', after(lambda folder: index(folder, '{"metadata": {}}')), 'index.json'),
    'no model_type': ('llama', lambda config, tensors: config.pop('model_type'), 'model_type'),
    'unknown model_type': ('llama', setting(model_type='bert'), 'bert'),
    'another shape': ('llama', tensor(UP, torch.zeros(51, 35)), UP),
    'more dimensions': ('llama', tensor(UP, torch.zeros(1, 51, 36)), UP),
    'shape of fused heads': ('phi3', tensor('model.layers.0.self_attn.qkv_proj.weight', torch.zeros(59, 36)),
                             'model.layers.0.self_attn.qkv_proj.weight'),
    'other vocabulary': ('llama', setting(vocab_size=62), 'embed_tokens'),
    'missing tensor': ('llama', tensor(UP, None), UP),
    'missing norm': ('llama', tensor('model.norm.weight', None), 'model.norm.weight'),
    'missing head': ('llama', tensor('lm_head.weight', None), 'lm_head.weight'),
    'missing expert': ('mixtral', tensor('model.layers.1.block_sparse_moe.experts.3.w3.weight', None),
                       'model.layers.1.block_sparse_moe.experts.3.w3.weight'),
    'missing bias': ('qwen2', tensor('model.layers.1.self_attn.k_proj.bias', None),
                     'model.layers.1.self_attn.k_proj.bias'),
    'extra tensor': ('llama', tensor('model.layers.0.mlp.extra.weight', torch.zeros(3)),
                     'model.layers.0.mlp.extra.weight'),
    'extra bias': ('llama', tensor('model.layers.0.mlp.up_proj.bias', torch.zeros(51)),
                   'model.layers.0.mlp.up_proj.bias'),
    'extra layer': ('llama', setting(num_hidden_layers=2), r'model.layers.2.'),
    'extra expert': ('mixtral', setting(num_local_experts=4), r'block_sparse_moe'),
    'quantised': ('llama', setting(quantization_config={'quant_method': 'fp8'}), 'quantization_config'),
    'quantised mxfp4': ('gpt_oss', setting(quantization_config={'quant_method': 'mxfp4'}),
                        'quantization_config'),
    'multimodal gemma3': ('gemma3', lambda config, tensors: config.update(
        {'model_type': 'gemma3', 'text_config': dict(config)}), 'gemma3|text_config'),
    'multimodal llama4': ('llama4', lambda config, tensors: config.update(
        {'model_type': 'llama4', 'text_config': dict(config)}), 'llama4|text_config'),
    'unknown activation': ('llama', setting(hidden_act='mish'), 'hidden_act'),
    'unknown activation of gpt2': ('gpt2', setting(activation_function='mish'), 'activation_function'),
    'unknown rope': ('llama', rope_setting(rope_type='spiral'), 'spiral|rope_type'),
    'unknown published rope': ('llama', lambda config, tensors: (
        config.pop('rope_parameters'), config.update(rope_scaling={'type': 'spiral', 'factor': 2.0})),
        'spiral|rope_scaling'),
    'bidirectional': ('gemma3', setting(use_bidirectional_attention=True), 'use_bidirectional_attention'),
    'unknown router': ('deepseek_v2', setting(topk_method='noaux_tc'), 'topk_method'),
    'missing key': ('llama', lambda config, tensors: config.pop('hidden_size'), 'hidden_size'),
    'missing layers': ('mamba', lambda config, tensors: config.pop('num_hidden_layers'), 'num_hidden_layers'),
    'null size': ('llama', setting(hidden_size=None), 'hidden_size'),
    'heads of another type': ('granite', setting(num_attention_heads='six'), 'config.json'),
    'unknown layer type': ('qwen3', setting(layer_types=['full_attention', 'linear_attention',
                                                         'full_attention']), 'layer_types'),
    'too few layer types': ('gemma2', setting(layer_types=['full_attention']), 'layer_types'),
    'no chunk': ('llama4', setting(attention_chunk_size=0), 'attention_chunk_size'),
    'windows in llama4': ('llama4', setting(layer_types=layers('fsfff')), 'layer_types'),
    'temperature without a layer': ('llama4', setting(no_rope_layers=[0] * 5, layer_types=layers('fffff')),
                                    'no_rope_layers'),
    'scaled local rope': ('gemma3', lambda config, tensors: config['rope_parameters'].update(
        sliding_attention={'rope_type': 'linear', 'rope_theta': 100.0, 'factor': 2.0}), 'sliding_attention'),
    'phi3 by yarn': ('phi3', rope_setting(rope_type='yarn', factor=2.0), 'short_factor'),
    'phi3 by llama3': ('phi3', rope_setting(rope_type='llama3', factor=2.0), 'rope_type'),
    'llama3 without its factors': ('llama', rope_setting(rope_type='llama3', factor=2.0), 'low_freq_factor'),
    'shortened context': ('llama', rope_setting(rope_type='yarn', factor=0.5), 'factor'),
    'sharpened unscaled': ('llama', rope_setting(rope_type='yarn', factor=1.0, attention_factor=1.2),
                           'attention_factor'),
    'odd part of a head': ('phi3', lambda config, tensors: (
        config.update(partial_rotary_factor=0.5, num_attention_heads=6),
        config['rope_parameters'].update(partial_rotary_factor=0.5)), 'partial_rotary_factor'),
    'slow but exact': ('bloom', setting(slow_but_exact=True), 'slow_but_exact'),
    'activation of a state space': ('jamba', setting(hidden_act='gelu'), 'hidden_act'),
    'activation of mamba': ('mamba2', setting(hidden_act='gelu'), 'hidden_act'),
    'half an expansion': ('mamba', setting(expand=1.5), 'expand'),
    'other heads of a state space': ('mamba2', setting(num_heads=8), 'num_heads'),
    'heads that cannot be shared': ('llama', setting(num_key_value_heads=4), 'num_key_value_heads'),
    'no norm of experts': ('qwen3_moe', setting(num_experts_per_tok=9, num_local_experts=5),
                           'num_experts_per_tok'),
}


def index(folder, text):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(text)


def shard(folder, count=2):
    """Spread the tensors of a checkpoint over so many files; the last of them."""
    tensors = safetensors_torch.load_file(folder / 'model.safetensors')
    names = {key: f'model-{number % count + 1}.safetensors' for number, key in enumerate(tensors)}
    for file in set(names.values()):
        of_file = {key: p for key, p in tensors.items() if names[key] == file}
        safetensors_torch.save_file(of_file, folder / file)
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    return folder / f'model-{count}.safetensors'


@pytest.mark.parametrize('name, change, word', BAD.values(), ids=BAD)
def test_bad_checkpoints_are_refused_in_a_sentence(made, name, change, word, tmp_path):
    if isinstance(change, SimpleNamespace):
        change.files(copy_of(made(name), tmp_path))
    else:
        copy_of(made(name), tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        GPT.from_pretrained(tmp_path)
    assert re.search(word, one_sentence(error.value)), f'{word} is not in: {error.value}'


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match='nowhere') as error:
        GPT.from_pretrained(tmp_path / 'nowhere')
    one_sentence(error.value)


@one_of_each
@torch.no_grad()
def test_absent_keys_mean_what_they_mean_in_transformers(name):
    """The defaults of an entry are those of the config class, where that has a plain one."""
    config_class = type(transformers.AutoConfig.for_model(CASES[name].model_type))
    plain = {field.name: field.default for field in fields(config_class) if field.default is not MISSING}
    theta = config_class.default_theta
    entry = FAMILIES[CASES[name].model_type]
    ours = DEFAULTS | entry.defaults
    if isinstance(theta, dict):
        assert (ours['rope_theta'], ours['rope_local_base_freq']) == (theta['global'], theta['local'])
    else:
        assert ours['rope_theta'] == theta or 'rope_parameters' not in plain
    # null stands for these
    worked_out = {'mlp_only_layers': None, 'rope_parameters': None, 'n_group': None, 'topk_group': None}
    for key, value in ours.items():
        if key in plain and plain[key] != worked_out.get(key, ...):
            assert plain[key] == value, f'{key}: {value} here and {plain[key]} there'
    # what is not stated at all has no default there either, or is a size, which a file always says
    sizes = re.compile('size|hidden|layers|heads|dim|inner|position|seq_len|num_experts$|num_local_experts|'
                       'n_routed_experts|n_embd|n_layer|n_head|d_model|kv_lora_rank|layer_types')
    unsaid = {key for key in entry.keys if plain.get(key) is not None and key not in ours}
    assert not {key for key in unsaid if not sizes.search(key)}


def test_null_and_other_words_for_a_key_are_understood(made, ours, tmp_path):
    """As in files of all ages: no head_dim, several ends of a text, settings of training, other names."""
    def change(config, tensors):
        config |= dict.fromkeys(('rope_scaling', 'head_dim', 'quantization_config', 'pretraining_tp'))
        config |= {'eos_token_id': [3, 5], 'torch_dtype': 'bfloat16', 'attention_dropout': 0.5}
        config['num_experts'] = config.pop('num_local_experts')
    (tmp_path / 'mixtral').mkdir()
    assert load(copy_of(made('mixtral-plain-head'), tmp_path / 'mixtral', change)).config == \
        ours('mixtral-plain-head').config

    def older(config, tensors):
        config['rope_scaling'] = config.pop('rope_parameters') | {'type': 'su'}
        del config['rope_scaling']['rope_type']
    (tmp_path / 'phi3').mkdir()
    assert load(copy_of(made('phi3-long'), tmp_path / 'phi3', older)).config == ours('phi3-long').config


# what a fresh process needs beside the weights, and what it takes to read them
MEMORY = """
import resource, sys
import safetensors.torch, torch
from model import GPT
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
before = peak()
model = GPT.from_pretrained(sys.argv[1])
print(peak() - before, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.parametrize('shards', [1, 3])
def test_loading_holds_the_weights_once(tmp_path, shards):
    sizes = dict(n_layer=4, n_embd=512, n_head=8, vocab_size=16000, tie=False, block_size=64)
    model = GPT(GPTConfig(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, **sizes), seed=None)
    for p in model.parameters():
        p.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    if shards > 1:
        shard(tmp_path, shards)
    done = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    more, count = map(int, done.stdout.split())
    assert count == sum(p.numel() for p in model.parameters()) > 20e6
    assert more < 1.35 * 4 * count, f'{more / 4 / count:.2f} times the weights'


def test_adding_a_family_is_what_the_docstring_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(families, 'FAMILIES', families.FAMILIES.copy())
    monkeypatch.setattr(pretrained, 'FAMILIES', families.FAMILIES)
    example = ''.join(re.findall(r'^    .*\n', families.__doc__, re.M))
    exec(textwrap.dedent(example), vars(families))
    case = Case('arcee', {**YARN, 'attention_bias': True})
    reference = redraw(transformers.AutoModelForCausalLM.from_config(config_of(case)))
    reference.save_pretrained(tmp_path)
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = SimpleNamespace(idx=idx, logits=load_reference(tmp_path, case)(idx).logits)
        model = load(tmp_path)
        assert_logits(model, want, 'arcee')
        model.save_pretrained(tmp_path / 'again')
        assert_logits(load_reference(tmp_path / 'again', case), want, 'arcee, exported')


# ----------------------------------------------------------------------------------------------------------
# Surgery: overrides that change a block


def averaged(groups, config, tensors):
    """Key and value heads as the mean of each group (Ainslie et al. 2023), worked out on the file."""
    size = config['head_dim']
    for key, p in tensors.items():
        if 'k_proj' in key or 'v_proj' in key:
            heads = p.view(groups, -1, size, *p.shape[1:])
            tensors[key] = heads.mean(1).reshape(-1, *p.shape[1:]).contiguous()
    config['num_key_value_heads'] = groups


@pytest.mark.parametrize('name', ['llama-mha-tied', 'llama-mha-biased'])
@pytest.mark.parametrize('groups', [1, 2, 3])
def test_fewer_kv_heads_are_means_of_groups(made, name, groups, tmp_path, capsys):
    made = made(name)
    theirs = load_reference(copy_of(made, tmp_path, functools.partial(averaged, groups)), made.case)
    idx = made.idx
    model = load(made.folder, n_kv_head=groups)
    assert model.config.n_kv_head == groups
    assert_logits(model, SimpleNamespace(idx=idx, logits=theirs(idx).logits), f'n_kv_head={groups}')
    printed = capsys.readouterr().out.lower()
    assert 'copied' in printed and 'converted' in printed, printed


def test_the_window_can_be_changed(made, tmp_path):
    def window(config, tensors):
        config.update(model_type='mistral', architectures=['MistralForCausalLM'], sliding_window=7)
    made = made('llama')
    theirs = load_reference(copy_of(made, tmp_path, window), made.case)
    model = load(made.folder, layer_pattern='w', window=7)
    logits = theirs(made.idx).logits
    assert (logits - made.logits).abs().max() > 0.1
    assert_logits(model, SimpleNamespace(idx=made.idx, logits=logits), 'window=7')


@torch.no_grad()
def test_upcycled_experts_start_as_the_dense_ffn(made, capsys):
    made = made('llama')
    model = load(made.folder, ffn_pattern='e', n_expert=4, n_expert_used=2, expert_width=51)
    assert model.num_params() > 2 * sum(p.numel() for p in made.model.parameters()) * 0.9
    # the weights of the chosen experts sum to one, so that any choice is the dense ffn
    assert_logits(model, made, 'upcycled')
    printed = capsys.readouterr().out.lower()
    assert 'copied' in printed and re.search('newly initiali[sz]ed', printed) and 'router' in printed, printed


def test_upcycling_some_layers_keeps_the_others(made):
    model = load(made('llama').folder, ffn_pattern='fef', n_expert=4, n_expert_used=3, expert_width=51)
    assert model.config.plan() == [('a', 'f'), ('a', 'e'), ('a', 'f')]
    assert_logits(model, made('llama'), 'upcycled in one layer')


def test_a_plain_load_says_that_nothing_is_new(made, capsys):
    load(made('llama').folder)
    printed = capsys.readouterr().out.lower()
    assert not re.search(r'[1-9]\d* [\w ]*newly', printed), printed


def test_a_setting_of_training_can_be_changed(made):
    model = load(made('llama').folder, dropout=0.1)
    assert model.config.dropout == 0.1
    assert_logits(model, made('llama'), 'dropout=0.1')


@pytest.mark.parametrize('overrides, word', [
    ({'attn': 'mla'}, 'attn'),
    ({'n_head': 3, 'head_dim': 10}, 'n_head|head_dim'),
    ({'n_embd': 48}, 'n_embd'),
    ({'n_kv_head': 4}, 'n_kv_head'),
    ({'no_such_flag': 1}, 'no_such_flag'),
    ({'layer_pattern': 'w'}, 'window'),
])
def test_surgery_that_cannot_be_done_is_refused(made, overrides, word):
    with pytest.raises(ValueError, match=word) as error:
        GPT.from_pretrained(made('llama-mha-tied').folder, **overrides)
    one_sentence(error.value)


# ----------------------------------------------------------------------------------------------------------
# Export of what was made here


def redraw_ours(model):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        if p.is_floating_point():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.1 * noise if p.dim() < 2 or 'A_log' in name else 0.2 * noise)
    return model


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral', 'mixtral', 'qwen3', 'gemma2', 'deepseek',
                                    'mamba2', 'jamba'])
@torch.no_grad()
def test_models_trained_here_export(family, tmp_path):
    model = redraw_ours(build(shrink(flags_of(ROOT / 'config' / f'{family}_small.py'))))
    idx = torch.randint(model.config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    theirs, info = load_reference(tmp_path, Case(family), output_loading_info=True)
    assert not any(info.values()), f'{family}: {info}'
    want = SimpleNamespace(idx=idx, logits=model(idx)[0])
    assert_logits(theirs, want, family)
    assert torch.equal(load(tmp_path)(idx)[0], want.logits)


@pytest.mark.parametrize('flags, word', [
    (dict(pos='rope', attn='diff', n_kv_head=2, norm='rmsnorm', bias=False), 'attn'),
    (dict(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, value_embed=True), 'value_embed'),
    (dict(embed_skip=True), 'embed_skip'),
    (dict(pos='sinusoidal'), 'pos'),
    (dict(norm_at='post'), 'norm_at'),
    (dict(ffn='relu2'), 'ffn'),
    (dict(layer_pattern='am', ssm_head_dim=8), 'layer_pattern|ssm'),
])
def test_flags_of_no_family_do_not_export(flags, word, tmp_path):
    with pytest.raises(ValueError, match=rf'\b({word})\b') as error:
        build(toy(**flags)).save_pretrained(tmp_path)
    one_sentence(error.value)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


def nanogpt(bias, seed=0):
    """A checkpoint as nanoGPT's train.py writes it, with random weights."""
    args = dict(n_layer=3, n_head=3, n_embd=36, block_size=32, bias=bias, vocab_size=V, dropout=0.1)
    generator, C = torch.Generator().manual_seed(seed), 36
    shapes = {'transformer.wte.weight': (V, C), 'transformer.wpe.weight': (32, C),
              'transformer.ln_f.weight': (C,)}
    for i in range(3):
        shapes |= {f'transformer.h.{i}.{key}.weight': shape for key, shape in {
            'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C), 'ln_2': (C,),
            'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}.items()}
    if bias:
        shapes |= {key.replace('weight', 'bias'): shape[:1] for key, shape in shapes.items()
                   if not re.search('wte|wpe', key)}
    weights = {key: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.1)
               + ('ln_' in key and 'weight' in key) for key, shape in shapes.items()}
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return {'model': weights, 'optimizer': {'state': {}, 'param_groups': []}, 'model_args': args,
            'iter_num': 5, 'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'openwebtext'}}


def nanogpt_logits(weights, idx, n_head=3):
    """Logits of every position, by nanoGPT's definition."""
    def linear(x, key):
        return F.linear(x, weights[key + '.weight'], weights.get(key + '.bias'))

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], weights[key + '.weight'], weights.get(key + '.bias'), 1e-5)

    B, T = idx.shape
    x = weights['transformer.wte.weight'][idx] + weights['transformer.wpe.weight'][:T]
    mask = torch.ones(T, T).tril().bool()
    for i in range(3):
        at = f'transformer.h.{i}.'
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2)
                   for part in linear(norm(x, at + 'ln_1'), at + 'attn.c_attn').chunk(3, dim=-1))
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, at + 'attn.c_proj')
        hidden = linear(norm(x, at + 'ln_2'), at + 'mlp.c_fc')
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, at + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ weights['lm_head.weight'].T


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
@torch.no_grad()
def test_nanogpt_checkpoints_load(bias, prefix, tmp_path):
    checkpoint = nanogpt(bias)
    idx = torch.randint(V, (2, 32), generator=torch.Generator().manual_seed(3))
    want = SimpleNamespace(idx=idx, logits=nanogpt_logits(checkpoint['model'], idx))
    if not bias:  # a mask that nanoGPT keeps where torch has no fused attention
        checkpoint['model']['transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32)
    checkpoint['model'] = {prefix + key: p for key, p in checkpoint['model'].items()}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    for path in (tmp_path / 'ckpt.pt', tmp_path, str(tmp_path)):
        model = load(path)
        assert_logits(model, want, f'nanoGPT bias={bias} {prefix}')
    assert model.generate(idx[:, :5], 4, temperature=0).shape == (2, 9)
    assert model.config.block_size == 32 and model.config.tie


def test_a_nanogpt_checkpoint_with_strange_weights_is_refused(tmp_path):
    for key, p in (('transformer.h.1.mlp.c_fc.weight', torch.zeros(144, 35)), ('transformer.h.3.ln_1.weight',
                   torch.ones(36)), ('transformer.h.1.mlp.c_fc.weight', None)):
        checkpoint = nanogpt(True)
        checkpoint['model'][key] = p
        if p is None:
            del checkpoint['model'][key]
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        with pytest.raises(ValueError, match=key) as error:
            GPT.from_pretrained(tmp_path)
        one_sentence(error.value)


@pytest.mark.parametrize('fault', ['truncated', 'not torch', 'code', 'no model'])
def test_a_damaged_nanogpt_checkpoint_is_refused(fault, tmp_path):
    path = tmp_path / 'ckpt.pt'
    checkpoint = nanogpt(True)
    if fault == 'code':
        checkpoint['model']['transformer.ln_f.weight'] = Marker(tmp_path / 'ran')
    if fault == 'no model':
        del checkpoint['model']
    torch.save(checkpoint, path)
    if fault == 'truncated':
        os.truncate(path, 9000)
    if fault == 'not torch':
        path.write_text('version')
    with pytest.raises(ValueError, match='ckpt.pt') as error:
        GPT.from_pretrained(tmp_path)
    one_sentence(error.value)
    assert not (tmp_path / 'ran').exists()
