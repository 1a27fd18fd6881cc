"""
Latent attention: DeepSeek V2 and V3 and Kimi K2, with experts in groups after the first dense layers, and
MiniCPM 3.
"""
import math
from dataclasses import replace

from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_FLAGS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.keys import EMBED_SCALE, ROUTER_NORM, expert_layers, pattern_of, refuse, without
from nanoblocks.pretrained.layouts import by_expert, gate_up, gate_up_by_expert, mla_latent, mla_query, same
from nanoblocks.pretrained.rope import mscale, read_rope, rope_parameters, rope_parameters_of

FAMILIES = {}

DEEPSEEK_FLAGS = LLAMA_FLAGS | {'attn': 'mla', 'latent_eps': 1e-6}
LATENT_KEYS = without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim') | ATTENTION_BIAS | {
    'kv_lora_rank': 'kv_rank', 'q_lora_rank': 'q_rank', 'qk_nope_head_dim': 'head_dim',
    'qk_rope_head_dim': 'rope_head_dim', 'v_head_dim': 'v_head_dim'}
DEEPSEEK_KEYS = LATENT_KEYS | {
    'n_routed_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
    'moe_intermediate_size': 'expert_width', 'n_shared_experts': 'n_shared',
    'routed_scaling_factor': 'router_scale'}


def deepseek_tensors(c, hf):
    query, latent = (mla_query, mla_latent) if hf.get('rope_interleave', True) else (same, same)
    query_up = 'q_b_proj' if c.q_rank else 'q_proj'
    return without(LLAMA_TENSORS, 'h.{a}.mixer.c_attn', 'h.{a}.mixer.k_norm') | {
        'h.{a}.mixer.q_down': 'model.layers.{i}.self_attn.q_a_proj',
        'h.{a}.mixer.q_norm': 'model.layers.{i}.self_attn.q_a_layernorm',
        'h.{a}.mixer.q_up': ('model.layers.{i}.self_attn.' + query_up, query),
        'h.{a}.mixer.kv_down': ('model.layers.{i}.self_attn.kv_a_proj_with_mqa', latent),
        'h.{a}.mixer.kv_norm': 'model.layers.{i}.self_attn.kv_a_layernorm',
        'h.{a}.mixer.kv_up': 'model.layers.{i}.self_attn.kv_b_proj',
        'h.{e}.ffn.router': 'model.layers.{i}.mlp.gate',
        'h.{e}.ffn.choice_bias': 'model.layers.{i}.mlp.gate.e_score_correction_bias',
        'h.{e}.ffn.c_fc': ('model.layers.{i}.mlp.experts.{n}.{gate,up}_proj', gate_up_by_expert),
        'h.{e}.ffn.c_proj': ('model.layers.{i}.mlp.experts.{n}.down_proj', by_expert),
        'h.{e}.ffn.shared.c_fc': ('model.layers.{i}.mlp.shared_experts.{gate,up}_proj', gate_up),
        'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.mlp.shared_experts.down_proj'}


def read_deepseek(hf):
    pattern = pattern_of(hf, lambda i: 'f' if i < hf['first_k_dense_replace'] else 'e')
    return read_latent_positions(hf) | {'ffn_pattern': pattern}


def read_latent_positions(hf):
    """The flags of rotary positions, with the scale of the scores that YaRN may change."""
    width = hf['qk_nope_head_dim'] + hf['qk_rope_head_dim']
    flags = read_rope(hf | {'head_dim': width})
    m_all = rope_parameters(hf).get('mscale_all_dim') or 0
    scaling = flags.get('rope_scaling')
    if scaling == 'yarn' and flags.get('rope_attention_factor') is None:
        # in their attention an absent factor is YaRN's, in our latent attention it is 1
        flags['rope_attention_factor'] = mscale(flags['rope_factor'])
    if scaling == 'yarn' and m_all == 1 and math.isclose(flags['rope_attention_factor'], 1):
        # the published models: then our latent attention scales its scores by default as theirs does
        flags['rope_attention_factor'] = None
    elif scaling and m_all:
        flags['attn_scale'] = width ** -0.5 * mscale(flags['rope_factor'], m_all) ** 2
    return flags


def read_groups(hf, top):
    """Routing that is limited to the best groups, where the limit is below their number."""
    n, used = hf['n_group'], hf['topk_group']
    if not 1 <= used <= n:
        refuse(hf, 'topk_group', f'be from 1 to n_group={n}')
    return {'n_group': n, 'n_group_used': used, 'group_top': top} if used < n else {}


def write_deepseek(c):
    return write_latent_positions(c) | {
        'first_k_dense_replace': min(expert_layers(c), default=c.n_layer), 'n_group': c.n_group,
        'topk_group': c.n_group_used, 'n_shared_experts': c.n_shared or 1}


def write_latent_positions(c):
    rope = rope_parameters_of(c)
    if c.rope_scaling == 'yarn' and c.attn_scale is None and c.rope_attention_factor is None:
        rope |= {'mscale': 1.0, 'mscale_all_dim': 1.0}
    elif c.rope_scaling == 'yarn':
        rope['attention_factor'] = c.rope_attention_factor or 1.0
    if c.rope_scaling != 'none' and c.attn_scale is not None and c.rope_factor > 1:
        # the inverse of attn_scale in read_latent_positions
        m = math.sqrt(c.attn_scale * math.sqrt(c.head_dim + c.rope_head_dim))
        rope['mscale_all_dim'] = (m - 1) / (0.1 * math.log(c.rope_factor))
    return {'rope_parameters': rope, 'num_key_value_heads': c.n_head, 'head_dim': c.rope_head_dim}


# ----------------------------------------------------------------------------------------------------------
# V3: sigmoid scores, and a bias that balances them. It comes before V2, because a model without experts fits
# both, and transformers' V2 does not take all widths.


def read_deepseek_v3(hf):
    return read_deepseek(hf) | read_groups(hf, top=2) | {'balance': 'bias'}


FAMILIES['deepseek_v3'] = Family(
    architecture='DeepseekV3ForCausalLM',
    flags=DEEPSEEK_FLAGS | {'router': 'sigmoid'},
    keys=DEEPSEEK_KEYS | {'norm_topk_prob': ROUTER_NORM},
    defaults={'q_lora_rank': 1536, 'first_k_dense_replace': 3, 'n_group': 8, 'topk_group': 4,
              'n_shared_experts': 1, 'num_experts_per_tok': 8, 'norm_topk_prob': True,
              'routed_scaling_factor': 2.5, 'rope_interleave': True},
    tensors=deepseek_tensors,
    read=read_deepseek_v3, write=write_deepseek)


# Kimi K2 is a V3 under another name, which transformers does not know; its YaRN has no ramp
FAMILIES['kimi_k2'] = replace(
    FAMILIES['deepseek_v3'], write=lambda c: write_deepseek(c) | {'model_type': 'deepseek_v3'})


# ----------------------------------------------------------------------------------------------------------
# V2: softmax scores that are not normalised


def read_deepseek_v2(hf):
    if hf['topk_method'] not in ('greedy', 'group_limited_greedy'):
        refuse(hf, 'topk_method', 'be one of greedy, group_limited_greedy')
    return read_deepseek(hf) | (read_groups(hf, top=1) if hf['topk_method'] != 'greedy' else {})


def write_deepseek_v2(c):
    return write_deepseek(c) | {'topk_method': 'group_limited_greedy' if c.n_group > 1 else 'greedy'}


FAMILIES['deepseek_v2'] = Family(
    architecture='DeepseekV2ForCausalLM',
    flags=DEEPSEEK_FLAGS | {'router_norm': False},
    keys=DEEPSEEK_KEYS,
    defaults={'q_lora_rank': 1536, 'first_k_dense_replace': 0, 'n_group': 1, 'topk_group': 1,
              'n_shared_experts': 2, 'topk_method': 'greedy', 'routed_scaling_factor': 1.0},
    tensors=deepseek_tensors,
    read=read_deepseek_v2, write=write_deepseek_v2)


# ----------------------------------------------------------------------------------------------------------
# MiniCPM 3: no experts, and three multipliers


def read_minicpm3(hf):
    h, n = hf['hidden_size'], hf['num_hidden_layers']
    depth = hf.get('scale_depth')
    return read_latent_positions(hf) | {
        'v_head_dim': hf.get('v_head_dim', h // hf['num_attention_heads']),
        'residual_scale': 1.0 if depth is None else depth / math.sqrt(n),
        'logit_scale': hf.get('dim_model_base', h) / h}


def write_minicpm3(c):
    # twelve digits, without the rounding of the root
    depth = None if c.residual_scale == 1 else round(c.residual_scale * math.sqrt(c.n_layer), 12)
    return write_latent_positions(c) | {
        'scale_depth': depth, 'dim_model_base': max(1, round(c.logit_scale * c.n_embd))}


def tensors_of_minicpm3(c, hf):
    return deepseek_tensors(c, hf | {'rope_interleave': False})


FAMILIES['minicpm3'] = Family(
    architecture='MiniCPM3ForCausalLM',
    flags=DEEPSEEK_FLAGS,
    keys=LATENT_KEYS | {
        'mlp_bias': 'ffn_bias', 'scale_emb': EMBED_SCALE},
    defaults=TIED | {'rms_norm_eps': 1e-5, 'kv_lora_rank': 256, 'q_lora_rank': 768, 'qk_nope_head_dim': 64,
                     'qk_rope_head_dim': 32, 'scale_emb': 12, 'scale_depth': 1.4, 'dim_model_base': 256},
    tensors=tensors_of_minicpm3,
    read=read_minicpm3, write=write_minicpm3)
