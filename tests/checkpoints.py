"""
Small random checkpoints, made by `transformers` itself, and what it computes with them.

In every row of CASES norm weights are not one, biases are not zero, sizes are odd, and the text is longer
than any window, chunk and original context. Each checkpoint has the config.json that transformers 5 writes
and, in a second folder, one in the style that was published before.
"""
import copy
import functools
import json
import math
import os
from dataclasses import fields
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from model import GPT
from nanoblocks.pretrained.convert import NOT_WEIGHTS

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
    words = {'f': 'full_attention', 's': 'sliding_attention', 'r': 'linear_attention', 'c': 'conv',
             'd': 'mlp', 'm': 'moe', 'h': 'hybrid'}
    return [words[letter] for letter in letters]


def without_theta(rope):
    return {key: value for key, value in rope['rope_parameters'].items() if key != 'rope_theta'}


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
# the pairs that keep their speed end where those that slow down begin
YARN_STEP = rope('yarn', 20.0, factor=4.0, mscale=1.0, mscale_all_dim=1.0, beta_fast=0.4, beta_slow=0.4,
                 **BEFORE)
MINICPM = dict(**MHA, kv_lora_rank=14, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9, scale_emb=3,
               scale_depth=1.1, dim_model_base=24)
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
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=7, linear_value_head_dim=5,
             linear_conv_kernel_dim=3)
LARA = dict(**FIVE, **DELTA, **EXPERTS, **WINDOW, shared_expert_intermediate_size=23)
NEXT = dict(**FOUR, **DELTA, **EXPERTS, shared_expert_intermediate_size=23)
NO_ROPE = {'rope_parameters': {'rope_type': 'default', 'rope_theta': None}}
THREE = dict(num_attention_heads=3, num_key_value_heads=1)
HEADS = dict(mamba_n_heads=9, mamba_d_state=7, mamba_d_conv=3, mamba_chunk_size=8)
NEMOTRON = dict(layers_block_type=layers('rmfdrm'), mamba_num_heads=5,
                mamba_head_dim=8, n_groups=1, ssm_state_size=7, chunk_size=8, n_routed_experts=5,
                moe_intermediate_size=19, moe_shared_expert_intermediate_size=23, routed_scaling_factor=1.7)
GRANITE = dict(embedding_multiplier=3.0, residual_multiplier=0.6, logits_scaling=0.7,
               attention_multiplier=0.3)
GRANITE4 = dict(**HEADS, **GRANITE, layer_types=layers('rfr'), num_local_experts=5,
                shared_intermediate_size=23)
# more than one multiplier could be left out where two were equal
FALCON = dict(**HEADS, mamba_d_ssm=45, mamba_norm_before_gate=False, attention_in_multiplier=0.8,
              attention_out_multiplier=1.3, key_multiplier=0.6, ssm_in_multiplier=1.2, ssm_out_multiplier=0.7,
              ssm_multipliers=[0.9, 1.4, 0.5, 1.1, 1.5], mlp_multipliers=[0.6, 1.25],
              embedding_multiplier=2.5, lm_head_multiplier=0.75)
# a block in the second layer and the last, and another in the fourth
ZAMBA = dict(**FIVE, layers_block_type=layers('rhrhh'), n_mamba_heads=9, mamba_d_state=7, chunk_size=8,
             num_mem_blocks=2, adapter_rank=6, mamba_d_conv=3, num_key_value_heads=6)
LFM2 = dict(layer_types=layers('cfc'), norm_eps=EPS, block_multiple_of=10)
LFM2_MOE = dict(**EXPERTS, layer_types=layers('cfc'), norm_eps=EPS, num_dense_layers=1)
KIMI = dict(**MHA, **FIVE, kv_lora_rank=14, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9,
            num_experts=5, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=19,
            routed_scaling_factor=1.7, linear_num_heads=4, linear_head_dim=7, linear_conv_kernel_dim=3)
MINIMAX = dict(num_local_experts=5, num_experts_per_tok=2, block_size=8)
BAILING = dict(**FOUR, kv_lora_rank=14, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=9, head_dim=10,
               num_key_value_heads=6, num_experts=6, n_shared_experts=2, num_experts_per_tok=2,
               moe_intermediate_size=19, routed_scaling_factor=1.7, n_group=3, topk_group=2,
               short_conv_kernel_size=3, layer_group_size=3, first_k_dense_replace=1, num_mtp_layers=0)
# transformers' cache has room for widths in multiples of 64 only
XLSTM = dict(hidden_size=64, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0, norm_eps=EPS)
NEO = dict(max_position_embeddings=48, window_size=7)
OPT = dict(max_position_embeddings=48, ffn_dim=51, word_embed_proj_dim=None)
# transformers makes a table of the angles of so many positions
GPTJ = dict(n_positions=48, n_head=3, rotary_dim=8)
CODEGEN = dict(n_positions=48, n_embd=40, n_head=4, rotary_dim=6)
# as many positions as the texts have tokens, and a few
LEARNED = dict(max_position_embeddings=48)
# a bias of the keys moves nothing without rope, and tokens of the second type do not occur
INERT = r'key\.bias|k_lin\.bias|token_type'
MODERN = dict(**FOUR, local_attention=10, norm_eps=EPS, cls_token_id=None, sep_token_id=None)
NOMIC = dict(pad_token_id=0)

BART = dict(d_model=36, encoder_layers=2, decoder_layers=3, encoder_attention_heads=6,
            decoder_attention_heads=6, encoder_ffn_dim=51, decoder_ffn_dim=51, forced_eos_token_id=None,
            decoder_start_token_id=2, **LEARNED)
T5 = dict(d_model=36, num_heads=6, d_kv=10, d_ff=51, num_layers=3, num_decoder_layers=2,
          relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0)
GATED = dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)
# what a head of its own is told to be: the config class always ties it
UNTIED = ('t5-gated-untied', 't5-scaled-untied', 'mt5', 'umt5-untied')
# 6 of 12 coordinates rotate
GLM = dict(head_dim=12, **rope(partial_rotary_factor=0.5))
# a quarter of 12 coordinates are 3, of 18 are 4
STABLE = dict(num_attention_heads=2, num_key_value_heads=2, **rope(partial_rotary_factor=0.25))
OLMOE = dict(num_experts=5, num_experts_per_tok=2, intermediate_size=19)
V3 = dict(n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2, moe_intermediate_size=19,
          first_k_dense_replace=1, routed_scaling_factor=1.7)
GROUPS = dict(n_group=3, topk_group=2)
M2 = dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=19)
HUNYUAN = dict(num_experts=5, moe_topk=2, intermediate_size=19, eod_token_id=None, sep_token_id=None)
ERNIE = dict(**FIVE, moe_num_experts=5, moe_k=2, moe_intermediate_size=19)
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
    'mixtral-one-expert': Case('mixtral', {'num_local_experts': 4, 'num_experts_per_tok': 1}),
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
    'qwen3_moe-one-expert': Case('qwen3_moe', {**EXPERTS, 'num_experts_per_tok': 1, 'norm_topk_prob': True}),
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
    'gemma3-all-windows': Case('gemma3_text', {**GEMMA, 'sliding_window_pattern': 9}),
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
    'diffllama': Case('diffllama', {'num_attention_heads': 8}),
    'diffllama-mha-tied': Case('diffllama', {**MHA, **rope(theta=5e5), 'tie_word_embeddings': True}),
    'diffllama-yarn-biased': Case('diffllama', {**YARN, 'attention_bias': True, 'num_key_value_heads': 2}),
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
    'granite': Case('granite', GRANITE),
    'granite-biased': Case('granite', dict(embedding_multiplier=4, residual_multiplier=0.7, logits_scaling=2,
                                           attention_multiplier=0.5, attention_bias=True, mlp_bias=True,
                                           tie_word_embeddings=True)),
    'cohere': Case('cohere', {'logit_scale': 0.7}),
    'cohere-qk-norm': Case('cohere', {'use_qk_norm': True, 'logit_scale': 0.7, 'attention_bias': True,
                                      **rope(theta=500000.0)}, old={'rope_theta': ABSENT}),
    'cohere-untied': Case('cohere', {'tie_word_embeddings': False, 'logit_scale': 1.0, **LLAMA3}),
    # transformers' own step is wrong for several rows
    'rwkv': Case('rwkv', {'layer_norm_epsilon': 1e-5}, cache=False),
    'rwkv-halved-tied': Case('rwkv', {'layer_norm_epsilon': 1e-5, 'rescale_every': 2,
                                      'tie_word_embeddings': True}, cache=False),
    'gpt2': Case('gpt2', {'n_positions': 48}, old={'n_ctx': 48}),
    'gpt2-inner-relu': Case('gpt2', {'n_positions': 48, 'n_inner': 50, 'activation_function': 'relu',
                                     'layer_norm_epsilon': 1e-3}),
    'gpt2-gelu-untied': Case('gpt2', {'n_positions': 48, 'activation_function': 'gelu',
                                      'tie_word_embeddings': False}),

    'lara_mini': Case('lara_mini', LARA),
    'lara_mini-layer-types': Case('lara_mini', {
        **LARA, **YARN, 'tie_word_embeddings': False, 'norm_topk_prob': False, 'attention_bias': True,
        'layer_types': layers('srsrf')}, old=None),
    'lara_mini-no-windows': Case('lara_mini', {**LARA, 'layer_types': layers('rffrf')}, old=None),
    'lara_mini-all-windows': Case('lara_mini', {**LARA, 'layer_types': layers('sssss')}, old=None),
    'qwen3_next': Case('qwen3_next', NEXT),
    'qwen3_next-dense-layers': Case('qwen3_next', {
        **NEXT, **FIVE, **YARN, 'attention_bias': True, 'tie_word_embeddings': True, 'norm_topk_prob': False,
        'decoder_sparse_step': 2, 'full_attention_interval': 3},
                                    old={'full_attention_interval': 3}),
    'qwen3_5': Case('qwen3_5_text', {**FOUR, **DELTA}),
    'qwen3_5-layer-types': Case('qwen3_5_text', {
        **FOUR, **DELTA, 'attention_bias': True, 'layer_types': layers('rffr'),
        **rope(theta=1e6, partial_rotary_factor=0.6)}, old={'layer_types': layers('rffr')}),
    'qwen3_5-tied-yarn': Case('qwen3_5_text', {
        **FOUR, **DELTA, **YARN, 'tie_word_embeddings': True, 'linear_num_key_heads': 4, 'head_dim': 16,
        'linear_conv_kernel_dim': 1, 'full_attention_interval': 2}, old={'full_attention_interval': 2}),
    'qwen3_5_moe': Case('qwen3_5_moe_text', NEXT),
    'olmo_hybrid': Case('olmo_hybrid', {**FOUR, **DELTA, **NO_ROPE}),
    'olmo_hybrid-rope': Case('olmo_hybrid', {
        **FOUR, **DELTA, **rope(), 'linear_allow_neg_eigval': False, 'linear_key_head_dim': 10,
        'attention_bias': True, 'tie_word_embeddings': True, 'layer_types': layers('frfr')},
        old={'layer_types': layers('frfr')}),
    'kimi_linear': Case('kimi_linear', KIMI),
    'kimi_linear-groups': Case('kimi_linear', {
        **KIMI, 'num_experts': 6, 'n_group': 3, 'topk_group': 2, 'q_lora_rank': 11, 'attention_bias': True,
        'norm_topk_prob': False, 'layer_types': layers('frrfr'), 'first_k_dense_replace': 2},
        old={'mlp_layer_types': ABSENT, 'first_k_dense_replace': 2, 'linear_head_dim': ABSENT,
             'linear_num_heads': ABSENT, 'linear_conv_kernel_dim': ABSENT, 'linear_attn_config': {
                 'head_dim': 7, 'num_heads': 4, 'short_conv_kernel_size': 3, 'full_attn_layers': [1, 4],
                 'kda_layers': [2, 3, 5]}}),
    'minimax': Case('minimax', {**FOUR, **MINIMAX}),
    'minimax-plain-head': Case('minimax', {**FOUR, **MINIMAX, **MHA, 'head_dim': None}),
    'minimax-factors': Case('minimax', {
        **FOUR, **MINIMAX, 'full_attn_alpha_factor': 1.3, 'full_attn_beta_factor': 0.8,
        'linear_attn_alpha_factor': 1.2, 'linear_attn_beta_factor': 0.7, 'mlp_alpha_factor': 0.9,
        'mlp_beta_factor': 1.1, 'layer_types': layers('frrf'), 'tie_word_embeddings': True, **WINDOW},
        old={'layer_types': layers('frrf')}),
    'bailing_hybrid': Case('bailing_hybrid', BAILING),
    'bailing_hybrid-softplus': Case('bailing_hybrid', {
        **BAILING, 'kda_safe_gate': False, 'q_lora_rank': 11, 'n_group': 1, 'topk_group': 1}),
    'bailing_hybrid-yarn': Case('bailing_hybrid', {
        **BAILING, **YARN, 'norm_topk_prob': False, 'layer_types': layers('rfrf'),
        'mlp_layer_types': ['sparse', 'dense', 'sparse', 'sparse'], 'kda_lower_bound': -2.5},
        old={'layer_types': layers('rfrf')}),
    'xlstm': Case('xlstm', XLSTM),
    'xlstm-other-widths': Case('xlstm', {
        **XLSTM, 'hidden_size': 128, 'num_heads': 2, 'qk_dim_factor': 0.5, 'v_dim_factor': 1.5,
        'ffn_proj_factor': 0.8, 'ffn_round_up_to_multiple_of': 5, 'gate_soft_cap': 2.0,
        'output_logit_soft_cap': 3.0, 'tie_word_embeddings': True}),

    'nemotron_h': Case('nemotron_h', NEMOTRON, old={
        'layers_block_type': ABSENT, 'hybrid_override_pattern': 'ME*-ME', 'num_hidden_layers': 6}),
    'nemotron_h-dense-groups': Case('nemotron_h', {
        **NEMOTRON, 'layers_block_type': layers('drfddrfd'),
        'mamba_num_heads': 9, 'n_groups': 3, 'tie_word_embeddings': True, 'use_bias': True,
        'time_step_min': 0.01}, cache=False),
    'nemotron_h-expert-groups': Case('nemotron_h', {
        **NEMOTRON, 'layers_block_type': layers('fmfm'), 'n_routed_experts': 6, 'n_group': 3,
        'topk_group': 2, 'norm_topk_prob': False, 'num_experts_per_tok': 3}),
    'bamba': Case('bamba', {**HEADS, **FOUR, **THREE, 'attn_layer_indices': [1], 'mamba_n_groups': 3}),
    'bamba-biased': Case('bamba', {
        **HEADS, **LINEAR, **THREE, 'attn_layer_indices': [0, 2], 'attention_bias': True, 'mlp_bias': True,
        'mamba_proj_bias': True, 'tie_word_embeddings': True, 'mamba_expand': 3, 'mamba_n_heads': 12}),
    'falcon_h1': Case('falcon_h1', FALCON),
    'falcon_h1-biased-norm': Case('falcon_h1', {
        **FALCON, **rope(theta=1e6), 'mamba_rms_norm': True, 'attention_bias': True, 'mlp_bias': True,
        'mamba_proj_bias': True, 'projectors_bias': True, 'tie_word_embeddings': True, 'mamba_d_ssm': 72,
        'mamba_n_groups': 3}),
    'granitemoehybrid': Case('granitemoehybrid', GRANITE4, old={'layer_types': layers('rfr')}),
    'granitemoehybrid-dense-rope': Case('granitemoehybrid', {
        **GRANITE4, **rope(), 'num_local_experts': 0, 'position_embedding_type': 'rope',
        'attention_bias': True, 'mamba_n_groups': 3, 'tie_word_embeddings': True},
        old={'layer_types': layers('rfr')}),
    'zamba2': Case('zamba2', ZAMBA),
    'zamba2-one-block-rope': Case('zamba2', {
        **ZAMBA, **rope(), 'layers_block_type': layers('rhhrh'), 'num_mem_blocks': 1, 'use_mem_rope': True,
        'num_key_value_heads': 2, 'mamba_ngroups': 3, 'time_step_min': 0.003}),
    'falcon_mamba': Case('falcon_mamba', {**MAMBA, 'mixer_rms_eps': 0.03}),
    'falcon_mamba-untied': Case('falcon_mamba', {
        **MAMBA, 'tie_word_embeddings': False, 'conv_kernel': 3, 'expand': 1, 'time_step_rank': 5}),
    'lfm2': Case('lfm2', {**LFM2, **FIVE, 'layer_types': layers('cfccf')}, old={
        'full_attn_idxs': [1, 4], 'intermediate_size': ABSENT, 'block_ff_dim': 51}),
    'lfm2-biased-plain-width': Case('lfm2', {
        **LFM2, **FOUR, **LINEAR, 'layer_types': layers('cfcf'), 'conv_bias': True, 'conv_L_cache': 4,
        'block_auto_adjust_ff_dim': False, 'tie_word_embeddings': False}, old={'full_attn_idxs': [1, 3]}),
    'lfm2_moe': Case('lfm2_moe', {**LFM2_MOE, **FOUR, 'layer_types': layers('ccfc')},
                     old={'layer_types': layers('ccfc')}),
    'lfm2_moe-unbiased': Case('lfm2_moe', {
        **LFM2_MOE, 'num_dense_layers': 0, 'use_expert_bias': False, 'norm_topk_prob': False,
        'routed_scaling_factor': 1.3}, old={'layer_types': layers('cfc')}),

    'eurobert': Case('eurobert', dict(mask_token_id=3, rope_theta=500.0)),
    'eurobert-biased-tied': Case('eurobert', {
        **YARN, 'mask_token_id': 3, 'attention_bias': True, 'mlp_bias': True, 'tie_word_embeddings': True,
        'head_dim': None, 'num_key_value_heads': None}, old={'head_dim': ABSENT}),
    'bert': Case('bert', LEARNED, old={'position_embedding_type': 'absolute'}, inert=INERT),
    'bert-untied': Case('bert', {**LEARNED, 'tie_word_embeddings': False, 'type_vocab_size': 3},
                        inert=INERT + r'|predictions\.bias'),
    'roberta': Case('roberta', {'max_position_embeddings': 50, 'pad_token_id': 1, 'type_vocab_size': 1},
                    inert=INERT),
    'roberta-relu-untied': Case('roberta', {
        'max_position_embeddings': 50, 'pad_token_id': 1, 'hidden_act': 'relu',
        'tie_word_embeddings': False}, inert=INERT + r'|lm_head\.bias'),
    'electra': Case('electra', {**LEARNED, 'embedding_size': 30}, inert=INERT),
    'electra-tanh-untied': Case('electra', {
        **LEARNED, 'embedding_size': 36, 'hidden_act': 'gelu_new', 'tie_word_embeddings': False},
        inert=INERT),
    'distilbert': Case('distilbert', {**LEARNED, 'hidden_dim': 51}, inert=INERT),
    'distilbert-untied': Case('distilbert', {
        **LEARNED, 'hidden_dim': 50, 'sinusoidal_pos_embds': True, 'tie_word_embeddings': False},
        inert=INERT),
    'modernbert': Case('modernbert', MODERN),
    'modernbert-biased-untied': Case('modernbert', {
        **MODERN, 'local_attention': 7, 'norm_bias': True, 'attention_bias': True, 'mlp_bias': True,
        'classifier_bias': True, 'classifier_activation': 'silu', 'hidden_activation': 'silu',
        'tie_word_embeddings': False, 'layer_types': layers('sfsf'), 'rope_parameters': {
            'full_attention': {'rope_type': 'linear', 'rope_theta': 5000.0, 'factor': 4.0},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 500.0}}}, old=None),
    'modernbert-no-biases': Case('modernbert', {
        **MODERN, 'decoder_bias': False, 'layer_types': layers('fsfs')},
        old={'global_attn_every_n_layers': 2}),
    'modernbert-all-windows': Case('modernbert', {**MODERN, 'layer_types': layers('ssss')}, old=None),
    'modernbert-no-windows': Case('modernbert', {**MODERN, 'layer_types': layers('ffff')},
                                  old={'global_attn_every_n_layers': 1}),
    'nomic_bert': Case('nomic_bert', {**NOMIC, 'head_dim': None}),
    'nomic_bert-gelu-untied': Case('nomic_bert', {
        **NOMIC, **rope(theta=500.0), 'hidden_act': 'gelu', 'tie_word_embeddings': False,
        'type_vocab_size': 1}, inert=r'predictions\.bias'),

    't5': Case('t5', T5, old={'tie_word_embeddings': ABSENT, 'scale_decoder_outputs': ABSENT}),
    't5-gated-untied': Case('t5', {**T5, **GATED}, old={
        'tie_word_embeddings': False, 'scale_decoder_outputs': ABSENT}),
    't5-scaled-untied': Case('t5', {**T5, 'feed_forward_proj': 'gelu_new', 'num_heads': 4}, old={
        'scale_decoder_outputs': ABSENT}),
    't5-unscaled-tied': Case('t5', {**T5, **GATED, 'feed_forward_proj': 'gated-silu'}, old=None),
    # transformers' cache has as many layers as the encoder
    't5-deep-decoder': Case('t5', {**T5, 'num_decoder_layers': 4, 'num_layers': 1}, cache=False, old={
        'scale_decoder_outputs': ABSENT, 'relative_attention_max_distance': 20}),
    't5-as-deep': Case('t5', {**T5, 'num_decoder_layers': None, 'relative_attention_num_buckets': 12},
                       old={'scale_decoder_outputs': ABSENT, 'num_decoder_layers': ABSENT}),
    'mt5': Case('mt5', T5, old={'tie_word_embeddings': False}),
    'mt5-tied': Case('mt5', T5),
    'umt5': Case('umt5', T5, old={'scale_decoder_outputs': ABSENT}),
    'umt5-untied': Case('umt5', {**T5, 'tie_word_embeddings': False, 'num_decoder_layers': 3}, old={
        'tie_word_embeddings': False, 'scale_decoder_outputs': ABSENT}),
    'bart': Case('bart', BART, old={'normalize_before': False, 'add_final_layer_norm': False},
                 inert='k_proj.bias'),
    'bart-scaled-relu': Case('bart', {**BART, 'scale_embedding': True, 'activation_function': 'relu',
                                      'encoder_layers': 3, 'decoder_layers': 1}, inert='k_proj.bias'),

    # GPT-2's and GPT-J's relatives
    'gpt_neo': Case('gpt_neo', {**FOUR, **NEO, 'attention_types': [[['global', 'local'], 2]]},
                    old={'attention_layers': ['global', 'local'] * 2}),
    'gpt_neo-narrow-untied': Case('gpt_neo', {
        **NEO, 'attention_types': [[['local'], 1], [['global'], 2]], 'intermediate_size': 51,
        'activation_function': 'gelu', 'tie_word_embeddings': False}),
    'gpt_neo-no-windows': Case('gpt_neo', {**NEO, 'attention_types': [[['global'], 3]]}),
    'opt': Case('opt', OPT, inert='k_proj.bias'),
    'opt-unbiased-untied': Case('opt', {**OPT, 'enable_bias': False, 'activation_function': 'gelu',
                                        'tie_word_embeddings': False}),
    'opt-post-norm': Case('opt', {**OPT, 'do_layer_norm_before': False, 'word_embed_proj_dim': 36},
                          inert='k_proj.bias'),
    'gpt_bigcode': Case('gpt_bigcode', {'n_positions': 48}, inert='c_attn.bias'),
    'gpt_bigcode-all-heads-untied': Case('gpt_bigcode', {
        'n_positions': 48, 'multi_query': False, 'n_inner': 50, 'activation_function': 'gelu',
        'tie_word_embeddings': False, 'scale_attn_weights': False}),
    'gptj': Case('gptj', GPTJ),
    'gptj-all-rotates-tied': Case('gptj', {
        **GPTJ, 'rotary_dim': 12, 'n_inner': 51, 'activation_function': 'gelu', 'tie_word_embeddings': True}),
    'codegen': Case('codegen', CODEGEN),
    'codegen-two-heads-a-part': Case('codegen', {**CODEGEN, 'n_embd': 48, 'n_head': 8, 'rotary_dim': 4,
                                                 'n_inner': 50}),
    'deepseek_v3-yarn-step': Case('deepseek_v3', {**DEEPSEEK3, **YARN_STEP}),
    'minicpm3': Case('minicpm3', {**MINICPM, 'q_lora_rank': 11}),
    'minicpm3-plain-query-yarn': Case('minicpm3', {
        **MINICPM, **YARN_MSCALE, 'q_lora_rank': None, 'attention_bias': True, 'mlp_bias': True,
        'tie_word_embeddings': False, 'v_head_dim': None}),
    'minicpm3-long-unscaled': Case('minicpm3', {
        **MINICPM, **rope('longrope', short_factor=[1.0, 1.3, 2.5], long_factor=[1.2, 3.0, 7.5],
                          original_max_position_embeddings=16, factor=4.0),
        'max_position_embeddings': 64, 'scale_depth': None, 'dim_model_base': None, 'scale_emb': 1,
        'q_lora_rank': 11}, cache=False),
    'nanochat': Case('nanochat'),
    'nanochat-biased-uncapped': Case('nanochat', {
        **MHA, **LINEAR, 'attention_bias': True, 'final_logit_softcapping': None,
        'tie_word_embeddings': True}),
    'persimmon': Case('persimmon', {**NEOX, **HALF}),
    'persimmon-plain-tied': Case('persimmon', {
        **rope('linear', factor=2.0, partial_rotary_factor=1.0), 'qk_layernorm': False,
        'tie_word_embeddings': True}),
    'phi': Case('phi', {**THREE, **HALF}),
    'phi-qk-norm': Case('phi', {**THREE, **HALF, 'qk_layernorm': True}),
    'phi-all-rotates-tied': Case('phi', {**MHA, **rope('linear', factor=2.0, partial_rotary_factor=1.0),
                                         'hidden_act': 'gelu', 'tie_word_embeddings': True}),
    # dense models
    'gemma': Case('gemma', old={'hidden_act': 'gelu', 'hidden_activation': None}),
    'gemma-biased-untied': Case('gemma', {'attention_bias': True, 'tie_word_embeddings': False, **LLAMA3}),
    'vaultgemma': Case('vaultgemma', {**GEMMA, **FOUR, 'attn_logit_softcapping': 1.5,
                                      'final_logit_softcapping': 4.0}),
    'vaultgemma-no-caps': Case('vaultgemma', {**GEMMA, 'attn_logit_softcapping': None,
                                              'final_logit_softcapping': None, 'attention_bias': True}),
    'glm': Case('glm', GLM),
    'glm-unbiased-tied': Case('glm', {**GLM, 'attention_bias': False, 'tie_word_embeddings': True,
                                      **rope(partial_rotary_factor=1.0)}),
    'glm-linear': Case('glm', {**GLM, **rope('linear', factor=2.5, partial_rotary_factor=0.2)}),
    'glm4': Case('glm4', GLM),
    'glm4-unbiased-tied': Case('glm4', {**GLM, 'attention_bias': False, 'tie_word_embeddings': True,
                                        **rope(partial_rotary_factor=1.0)}),
    'cohere2': Case('cohere2', {**WINDOW, **FIVE, 'logit_scale': 0.7}),
    'cohere2-pattern-untied': Case('cohere2', {
        **WINDOW, **FOUR, **LLAMA3, 'attention_bias': True, 'tie_word_embeddings': False, 'logit_scale': 0.7,
        'layer_types': layers('sfsf')}, old={'sliding_window_pattern': 2},
        inert=r'layers\.[13]\..*k_proj.bias'),
    'cohere2-all-windows': Case('cohere2', {**WINDOW, 'logit_scale': 1.3, 'layer_types': layers('sss')}),
    'cohere2-no-windows': Case('cohere2', {'layer_types': layers('fff'), 'logit_scale': 1.3},
                               old={'sliding_window_pattern': 1}),
    'olmo': Case('olmo'),
    'olmo-clipped': Case('olmo', {**YARN, 'clip_qkv': 0.6, 'num_key_value_heads': 6}),
    'olmo-biased-tied': Case('olmo', {'attention_bias': True, 'tie_word_embeddings': True}),
    'olmo3': Case('olmo3', {**WINDOW, **FIVE}),
    'olmo3-yarn-biased': Case('olmo3', {
        **WINDOW, **FOUR, 'attention_bias': True, 'layer_types': layers('fsfs'), 'rope_parameters': {
            'full_attention': YARN['rope_parameters'] | {'rope_theta': 5e5},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 5e5}}}, old={
                'layer_types': layers('fsfs'), 'rope_local_base_freq': ABSENT,
                'rope_scaling': without_theta(YARN)}),
    'olmo3-two-bases': Case('olmo3', {
        **WINDOW, **FOUR, 'tie_word_embeddings': True, 'rope_parameters': {
            'full_attention': {'rope_type': 'default', 'rope_theta': 5000.0},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 500.0}}}, old=None),
    'olmo3-no-windows': Case('olmo3', {'layer_types': layers('fff')}, old={'layer_types': layers('fff')}),
    'olmo3-all-windows': Case('olmo3', WINDOW),
    'exaone4': Case('exaone4', {**WINDOW, **FIVE}),
    'exaone4-llama3-listed': Case('exaone4', {
        **WINDOW, **FIVE, **LLAMA3, 'layer_types': layers('sfssf'), 'tie_word_embeddings': True},
        old={'layer_types': layers('sfssf'), 'sliding_window_pattern': 'LGL'}),
    'exaone4-no-windows': Case('exaone4', {'sliding_window': None, 'layer_types': layers('fff')},
                               old={'layer_types': layers('fff'), 'sliding_window_pattern': None}),
    'stablelm': Case('stablelm', STABLE),
    'stablelm-parallel-norms': Case('stablelm', {
        **STABLE, **rope(partial_rotary_factor=0.35), 'use_parallel_residual': True, 'qk_layernorm': True,
        'num_key_value_heads': 1}),
    'stablelm-biased-norms': Case('stablelm', {
        **STABLE, **rope(partial_rotary_factor=1.0), 'use_qkv_bias': True, 'qk_layernorm': True,
        'num_attention_heads': 6, 'num_key_value_heads': 2, 'tie_word_embeddings': True}),
    'arcee': Case('arcee'),
    'arcee-biased-tied-yarn': Case('arcee', {**YARN, 'attention_bias': True, 'mlp_bias': True,
                                             'tie_word_embeddings': True}),
    'seed_oss': Case('seed_oss'),
    'seed_oss-other-biases': Case('seed_oss', {
        'attention_bias': False, 'attention_out_bias': True, 'mlp_bias': True, 'tie_word_embeddings': True}),
    'ernie4_5': Case('ernie4_5'),
    'ernie4_5-biased-untied': Case('ernie4_5', {'use_bias': True, 'tie_word_embeddings': False, **LLAMA3}),
    'helium': Case('helium', {'head_dim': 6}),
    'helium-biased-tied': Case('helium', {'head_dim': 6, 'attention_bias': True, 'mlp_bias': True,
                                          'tie_word_embeddings': True}),
    'cwm': Case('cwm', {**WINDOW, **FIVE, **LLAMA3, 'bos_token_id': 1}),
    'cwm-biased-listed': Case('cwm', {
        **WINDOW, **LLAMA3, 'mlp_bias': True, 'layer_types': layers('sfs'), 'bos_token_id': 1,
        'tie_word_embeddings': True}, old={'layer_types': layers('sfs')}),
    'ministral': Case('ministral', {**WINDOW, **FOUR, 'layer_types': layers('sffs')},
                      old={'layer_types': layers('sffs')}),
    'ministral-all-windows': Case('ministral', {**WINDOW, **YARN}),
    'hunyuan_v1_dense': Case('hunyuan_v1_dense', {'eod_token_id': None}),
    'hunyuan_v1_dense-alpha-biased': Case('hunyuan_v1_dense', {
        **rope('dynamic', alpha=30.0, factor=1.0), 'attention_bias': True, 'tie_word_embeddings': True}),
    'nemotron': Case('nemotron', GLM),
    'nemotron-biased-tied': Case('nemotron', {
        **rope(partial_rotary_factor=0.2), 'attention_bias': True, 'mlp_bias': True,
        'tie_word_embeddings': True}),
    # more decoders with experts
    'olmoe': Case('olmoe', OLMOE),
    'olmoe-mha-normed': Case('olmoe', {
        **OLMOE, **YARN, 'num_key_value_heads': 6, 'norm_topk_prob': True, 'attention_bias': True,
        'tie_word_embeddings': True}, old={'clip_qkv': None}),
    'olmoe-one-expert': Case('olmoe', {**OLMOE, 'num_experts_per_tok': 1, 'norm_topk_prob': True}),
    'granitemoe': Case('granitemoe', {**GRANITE, 'num_local_experts': 5}),
    'granitemoe-biased-tied': Case('granitemoe', {
        **GRANITE, **YARN, 'num_local_experts': 4, 'num_experts_per_tok': 3, 'attention_bias': True,
        'tie_word_embeddings': True, 'num_key_value_heads': 6}),
    'dots1': Case('dots1', {**FOUR, **V3, **WINDOW, 'max_window_layers': 2, 'norm_topk_prob': True,
                            'num_experts_per_tok': 3}),
    'dots1-null-window-groups': Case('dots1', {
        **V3, **GROUPS, **YARN, 'sliding_window': None, 'n_shared_experts': 1, 'attention_bias': True,
        'tie_word_embeddings': True, 'first_k_dense_replace': 0}),
    'dots1-layer-types': Case('dots1', {**V3, **WINDOW, 'layer_types': layers('sfs')}, old=None),
    'glm4_moe': Case('glm4_moe', {**V3, 'head_dim': 12},
                     old={'num_mtp_layers': ABSENT, 'num_nextn_predict_layers': 1}),
    'glm4_moe-qk-norm': Case('glm4_moe', {**V3, 'head_dim': 20, 'use_qk_norm': True}),
    'glm4_moe-biased-groups': Case('glm4_moe', {
        **V3, **GROUPS, **rope(partial_rotary_factor=1.0), 'attention_bias': True, 'norm_topk_prob': False,
        'tie_word_embeddings': True, 'first_k_dense_replace': 0, 'n_shared_experts': 1}),
    'glm4_moe-yarn': Case('glm4_moe', {
        **V3, 'head_dim': 20, **rope('yarn', 20.0, factor=4.0, partial_rotary_factor=0.5, **BENT)}),
    'minimax_m2': Case('minimax_m2', {**M2, **rope(partial_rotary_factor=0.6)},
                       old={'partial_rotary_factor': ABSENT, 'rotary_dim': 6}),
    'minimax_m2-tied-yarn': Case('minimax_m2', {
        **M2, **YARN, 'num_key_value_heads': 6, 'num_experts_per_tok': 3, 'tie_word_embeddings': True}),
    'minimax_m2-one-expert': Case('minimax_m2', {**M2, 'num_experts_per_tok': 1}),
    'hunyuan_v1_moe': Case('hunyuan_v1_moe', {**HUNYUAN, 'head_dim': 10},
                           old={'num_experts': 5, 'num_experts_per_tok': 2, 'moe_topk': [2, 2, 2]}),
    'hunyuan_v1_moe-alpha': Case('hunyuan_v1_moe', {
        **HUNYUAN, **rope('dynamic', alpha=7.0, factor=1.0), 'num_key_value_heads': 6, 'attention_bias': True,
        'tie_word_embeddings': True}),
    'hunyuan_v1_moe-one-expert-linear': Case('hunyuan_v1_moe', {**HUNYUAN, **LINEAR, 'moe_topk': 1}),
    'ernie4_5_moe': Case('ernie4_5_moe', {**ERNIE, 'moe_k': 3}, old={'moe_layer_end_index': ABSENT}),
    'ernie4_5_moe-every-other': Case('ernie4_5_moe', {
        **ERNIE, **YARN, 'moe_layer_interval': 2, 'moe_layer_start_index': 1, 'moe_layer_end_index': 3,
        'moe_num_shared_experts': 0, 'tie_word_embeddings': False, 'num_key_value_heads': 6}),

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
# one of each family that has recurrences, or state spaces or short convolutions beside other layers
HYBRIDS = ('nemotron_h', 'bamba', 'falcon_h1', 'granitemoehybrid', 'falcon_mamba', 'lfm2', 'lfm2_moe',
           'zamba2')
RECURRENT = ('lara_mini', 'qwen3_next', 'qwen3_5', 'qwen3_5_moe', 'olmo_hybrid', 'kimi_linear', 'minimax',
             'bailing_hybrid', 'xlstm', *HYBRIDS)
# dense models, those last that an earlier family exports
DENSE = ('gemma', 'vaultgemma', 'glm', 'glm4', 'cohere2', 'olmo', 'olmo3', 'exaone4', 'stablelm', 'arcee',
         'nemotron', 'hunyuan_v1_dense', 'seed_oss', 'ernie4_5', 'helium', 'cwm', 'ministral')
# one of each other family with experts and attention alone
MIXTURES = ('olmoe', 'granitemoe', 'dots1', 'glm4_moe', 'minimax_m2', 'hunyuan_v1_moe', 'ernie4_5_moe')
# model types that fill in masked tokens
ENCODERS = ('eurobert', 'bert', 'roberta', 'electra', 'distilbert', 'modernbert', 'nomic_bert')
# model types with an encoder and a decoder
BOTH = ('t5', 'mt5', 'umt5', 'bart')
# decoders that another family may export, as an OPT is a GPT-2 with ReLU
CLASSIC = ('gpt_neo', 'opt', 'gpt_bigcode', 'gptj', 'codegen', 'phi', 'minicpm3', 'nanochat',
           'persimmon')
every_case = pytest.mark.parametrize('name', CASES)
every_encoder = pytest.mark.parametrize('name', [name for name, case in CASES.items()
                                                 if case.model_type in ENCODERS])
every_decoder = pytest.mark.parametrize('name', [name for name, case in CASES.items()
                                                 if case.model_type not in ENCODERS])
every_pair = pytest.mark.parametrize('name', [name for name, case in CASES.items()
                                              if case.model_type in BOTH])
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
    scaled = getattr(model.config, 'scale_decoder_outputs', False)      # the logits, down
    small = 0.4 if scaled else 0.2 if model.config.model_type == 'bart' else 0.1
    for name, p in model.state_dict().items():
        noise = torch.randn(p.shape, generator=generator)
        if NOT_WEIGHTS.search(name):
            continue
        if name.endswith('A_log') and 'attn' in name:
            # slow: what is forgotten at once leaves norms next to nothing, of which rounding is a large part
            p.copy_(0.5 * noise - 2)
        elif p.dim() == 1 or name.endswith(('A_log', 'e_score_correction_bias')):
            p.add_((0.1 if 'bias' in name else 0.25) * noise)
        elif p.shape[0] == V:
            p.copy_((small if tied else 0.6 if 'embed' in name else 0.2) * noise)
        else:
            gain = 0.1 if 'mamba.out_proj' in name else 0.4 if 'mixer.out_proj' in name else 1.2
            p.copy_(gain / math.sqrt(p.shape[-1]) * noise)
    return model


def class_of(case):
    return (transformers.AutoModelForMaskedLM if case.model_type in ENCODERS else
            transformers.AutoModelForSeq2SeqLM if case.model_type in BOTH else
            transformers.AutoModelForCausalLM)


def load_reference(folder, case, **more):
    # the fused experts want strides of 16 bytes, which odd sizes do not have
    return class_of(case).from_pretrained(
        folder, dtype=torch.float32, attn_implementation=case.attention,
        experts_implementation='eager', **more)


# keys that transformers 5 renamed
RENAMED = {
    'bloom': {'hidden_size': 'n_embed', 'n_head': 'num_attention_heads'},
    'gemma3_text': {'_sliding_window_pattern': 'sliding_window_pattern'},
    'modernbert': {'rope_theta': 'global_rope_theta', 'rope_local_base_freq': 'local_rope_theta'},
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
    torch.manual_seed(0)    # where a class draws decays, redraw adds to them
    model = class_of(case).from_config(config_of(case))
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    redraw(model).save_pretrained(folder)
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
    if case.model_type in ENCODERS:
        return fill_in(made)
    made.source = sources() if case.model_type in BOTH else None
    for seed in range(40):
        made.idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))
        if made.source is not None:
            # or its generate puts it there
            made.idx[:, 0] = case.flags['decoder_start_token_id']
        if greedy(made):
            return made
    raise AssertionError(f'{name}: no prompt leads to a clear choice of all {NEW} tokens')


def sources():
    """What encoders read: two rows of which the second is shorter."""
    source = torch.randint(V, (2, 33), generator=torch.Generator().manual_seed(1))
    source[1, 21:] = -1
    return source


def read_by(model, made):
    """The source of a checkpoint as arguments of its model, ours or transformers'; {} where it has none."""
    source = getattr(made, 'source', None)
    if source is None:
        return {}
    if isinstance(model, GPT):
        return {'source': source}
    return {'input_ids': source.clamp(min=0), 'attention_mask': (source >= 0).long()}


def logits_of(model, made, idx=None):
    """The logits of a model, ours or transformers'. idx: None for the text of the checkpoint."""
    idx, more = made.idx if idx is None else idx, read_by(model, made)
    if isinstance(model, GPT):
        return model(idx, **more)[0]
    return model(**more, **{'decoder_input_ids' if more else 'input_ids': idx}).logits


@torch.no_grad()
def answer_of(model, made):
    """What assert_logits takes: the text of a checkpoint, and what another reference makes of it."""
    return SimpleNamespace(idx=made.idx, source=getattr(made, 'source', None), logits=logits_of(model, made))


def first_row(made):
    source = getattr(made, 'source', None)
    return SimpleNamespace(idx=made.idx[:1], source=None if source is None else source[:1])


@torch.no_grad()
def fill_in(made):
    """
    Adds logits to `made`, and those of the same rows where the second is `padded` at its end. Tokens that
    are padding to RoBERTa, wherever they are, do not occur.
    """
    made.idx = torch.randint(2, V, (2, T), generator=torch.Generator().manual_seed(0))
    made.logits = made.model(made.idx).logits
    made.padding = (torch.arange(2) == 1).unsqueeze(1) & (torch.arange(T) >= T - 9)
    made.padded = made.idx.masked_fill(made.padding, made.model.config.pad_token_id or 0)
    made.padded_logits = made.model(made.padded, attention_mask=(~made.padding).long()).logits
    return made


@torch.no_grad()
def greedy(made):
    """Adds logits and greedy tokens to `made`; False where two are about as likely, or all the same."""
    made.prompt = made.idx[:, :PROMPT]
    more = read_by(made.model, made)
    prompt = {'decoder_input_ids' if more else 'input_ids': made.prompt}
    out = made.model.generate(**more, **prompt, max_new_tokens=NEW, do_sample=False,
                              use_cache=made.case.cache, return_dict_in_generate=True, output_logits=True)
    made.tokens, new = out.sequences, out.sequences[:, PROMPT:]
    made.logits = logits_of(made.model, made)
    best = torch.stack(out.logits, 1).topk(2).values
    if (best[..., 0] - best[..., 1]).min() < MARGIN or len(new.unique()) < 5:
        return False
    if made.case.cache:
        plain = logits_of(made.model, made, made.tokens)[:, PROMPT - 1:-1].argmax(-1)
        assert torch.equal(plain, new), 'transformers chooses otherwise with its cache: cache must be False'
    return True


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """made(name): the checkpoint of a case, made when it is first asked for."""
    return functools.cache(lambda name: make(tmp_path_factory.mktemp(name), name))


# ----------------------------------------------------------------------------------------------------------
# Ours, and changed files


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
    got = logits_of(got, want)
    assert got.shape == want.logits.shape and got.dtype == torch.float32, f'{what}: {got.dtype} {got.shape}'
    error = (got - want.logits).abs()
    assert error.max() <= bound, (f'{what}: error {error.max():.1e} must be at most {bound:.0e}; it is '
                                  f'{error.amax((0, 2)).tolist()} by position')


def copy_of(made, folder, change=lambda config, tensors: None):
    """The checkpoint once more in `folder`, after change(config, tensors), which may work in place."""
    config = json.loads((made.folder / 'config.json').read_text())
    tensors = safetensors_torch.load_file(made.folder / 'model.safetensors')
    change(config, tensors)
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors_torch.save_file(tensors, folder / 'model.safetensors')
    return folder


def shard(folder, count=2):
    """Spread the tensors of a checkpoint over `count` files; returns the last."""
    tensors = safetensors_torch.load_file(folder / 'model.safetensors')
    names = {key: f'model-{number % count + 1}.safetensors' for number, key in enumerate(tensors)}
    for file in set(names.values()):
        of_file = {key: p for key, p in tensors.items() if names[key] == file}
        safetensors_torch.save_file(of_file, folder / file)
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    return folder / f'model-{count}.safetensors'


class Marker:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
