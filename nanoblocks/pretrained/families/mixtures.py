"""More with experts: OLMoE, Granite MoE, dots.llm1, GLM 4.5, MiniMax M2, ERNIE 4.5 MoE, Hunyuan."""
from nanoblocks.pretrained.families import hybrid, llama
from nanoblocks.pretrained.families.deepseek import read_groups
from nanoblocks.pretrained.families.experts import EXPERT_KEYS, MIXTRAL_TENSORS
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_FLAGS, LLAMA_KEYS, WINDOW_KEYS
from nanoblocks.pretrained.families.qwen import QWEN_MOE_TENSORS
from nanoblocks.pretrained.keys import (
    ROUTER_NORM,
    Key,
    expert_layers,
    mixer_letters,
    pattern_of,
    refuse,
    renamed,
    shortest_pattern,
    width_of_head,
    without,
    write_layer_types,
)
from nanoblocks.pretrained.layouts import gate_up, one_row, qkv_interleaved
from nanoblocks.pretrained.rope import (
    read_partial,
    read_rope,
    rope_parameters,
    rope_type,
    write_partial,
    write_rope,
)
from nanoblocks.pretrained.values import is_count

FAMILIES = {}
REFUSED = {'mimo_v2_flash': 'its layers with windows have twice the key/value heads of its other layers, and '
                            'its values a width of their own'}

# ----------------------------------------------------------------------------------------------------------
# OLMoE: queries and keys are normed over all heads at once


def read_olmoe(hf):
    if hf.get('clip_qkv') is not None:
        refuse(hf, 'clip_qkv', 'be null: here queries and keys are clipped before their norm, not after it')
    return read_rope(hf)


FAMILIES['olmoe'] = Family(
    architecture='OlmoeForCausalLM',
    flags=LLAMA_FLAGS | {'ffn_pattern': 'e', 'qk_norm': 'full'},
    keys=without(LLAMA_KEYS, 'head_dim', 'intermediate_size') | ATTENTION_BIAS | {
        'num_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
        'intermediate_size': 'expert_width', 'norm_topk_prob': ROUTER_NORM},
    aliases={'num_local_experts': 'num_experts'},
    defaults={'rms_norm_eps': 1e-5, 'num_experts_per_tok': 8, 'norm_topk_prob': False},
    tensors=QWEN_MOE_TENSORS,
    read=read_olmoe, write=write_rope)

# ----------------------------------------------------------------------------------------------------------
# Granite MoE: Granite's multipliers; the experts of a layer are one tensor

FAMILIES['granitemoe'] = Family(
    architecture='GraniteMoeForCausalLM',
    flags=LLAMA_FLAGS | {'ffn_pattern': 'e'},
    keys=without(llama.FAMILIES['granite'].keys, 'mlp_bias') | EXPERT_KEYS,
    defaults=llama.FAMILIES['granite'].defaults | {'num_local_experts': 8, 'num_experts_per_tok': 2},
    tensors=llama.LLAMA_TENSORS | hybrid.GRANITE_EXPERTS,
    as_stored=hybrid.granite_as_stored,
    read=read_rope, write=write_rope)

# ----------------------------------------------------------------------------------------------------------
# DeepSeek V3's router behind plain attention, and experts after the first dense layers: dots.llm1, GLM 4.5

V3_KEYS = ATTENTION_BIAS | {
    'n_routed_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
    'moe_intermediate_size': 'expert_width', 'n_shared_experts': 'n_shared',
    'routed_scaling_factor': 'router_scale', 'norm_topk_prob': ROUTER_NORM}
V3_DEFAULTS = {'n_group': 1, 'topk_group': 1, 'routed_scaling_factor': 1.0}
V3_TENSORS = QWEN_MOE_TENSORS | {
    'h.{e}.ffn.choice_bias': 'model.layers.{i}.mlp.gate.e_score_correction_bias',
    'h.{e}.ffn.shared.c_fc': ('model.layers.{i}.mlp.shared_experts.{gate,up}_proj', gate_up),
    'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.mlp.shared_experts.down_proj'}


def read_v3_router(hf):
    first = hf['first_k_dense_replace']
    return read_groups(hf, top=2) | {
        'balance': 'bias', 'ffn_pattern': pattern_of(hf, lambda i: 'f' if i < first else 'e')}


def write_v3_router(c):
    return {'first_k_dense_replace': min(expert_layers(c), default=c.n_layer), 'n_group': c.n_group,
            'topk_group': c.n_group_used, 'n_shared_experts': c.n_shared or 1}


def read_dots(hf):
    window, first = hf.get('sliding_window'), hf['max_window_layers']
    letters = mixer_letters(hf, lambda i: 'w' if window is not None and i >= first else 'a')
    return read_rope(hf) | read_v3_router(hf) | {'layer_pattern': shortest_pattern(letters)}


def write_dots(c):
    return write_rope(c) | write_v3_router(c) | write_layer_types(c)


FAMILIES['dots1'] = Family(
    architecture='Dots1ForCausalLM',
    flags=LLAMA_FLAGS | {'qk_norm': True, 'router': 'sigmoid'},
    keys=WINDOW_KEYS | V3_KEYS,
    aliases={'num_local_experts': 'n_routed_experts'},
    defaults=V3_DEFAULTS | {'sliding_window': 4096, 'max_window_layers': 62, 'first_k_dense_replace': 0,
                            'norm_topk_prob': False},
    tensors=V3_TENSORS,
    mixers='aw', read=read_dots, write=write_dots)


# GLM 4.5: a part of each head rotates; the layers of multi-token prediction are left out


def read_glm(hf):
    return read_partial(hf) | read_v3_router(hf)


def write_glm(c):
    return write_partial(c) | write_v3_router(c)


FAMILIES['glm4_moe'] = Family(
    architecture='Glm4MoeForCausalLM',
    flags=LLAMA_FLAGS | {'router': 'sigmoid'},
    keys=LLAMA_KEYS | V3_KEYS | {
        'attention_bias': 'qkv_bias', 'use_qk_norm': renamed('qk_norm', {True: True, False: False})},
    aliases={'num_local_experts': 'n_routed_experts', 'num_mtp_layers': 'num_nextn_predict_layers'},
    defaults=V3_DEFAULTS | {
        'rms_norm_eps': 1e-5, 'partial_rotary_factor': 0.5, 'first_k_dense_replace': 1,
        'num_experts_per_tok': 8, 'n_shared_experts': 1, 'norm_topk_prob': True, 'use_qk_norm': False,
        'num_nextn_predict_layers': 1},
    tensors=V3_TENSORS,
    read=read_glm, write=write_glm)

# ----------------------------------------------------------------------------------------------------------
# MiniMax M2: a sigmoid router with a bias on the choice, no shared expert; norms over all heads at once


def read_minimax_m2(hf):
    if hf.get('rotary_dim') is not None:
        hf = {'partial_rotary_factor': hf['rotary_dim'] / hf['head_dim']} | hf
    return read_partial(hf)


FAMILIES['minimax_m2'] = Family(
    architecture='MiniMaxM2ForCausalLM',
    flags=LLAMA_FLAGS | {'ffn_pattern': 'e', 'qk_norm': 'full', 'router': 'sigmoid', 'balance': 'bias'},
    keys=LLAMA_KEYS | EXPERT_KEYS,
    aliases={'num_experts': 'num_local_experts'},
    defaults={'rope_theta': 5e6, 'head_dim': 128, 'num_experts_per_tok': 8},
    tensors=MIXTRAL_TENSORS | {
        'h.{e}.ffn.choice_bias': 'model.layers.{i}.block_sparse_moe.e_score_correction_bias'},
    read=read_minimax_m2, write=write_rope)

# ----------------------------------------------------------------------------------------------------------
# Hunyuan: queries and keys are normed after they rotate; a shared expert as wide as one of the others


def same_in_all(flag):
    """A key that holds a number, or a list of one a layer, which must be equal here."""
    def read(value, hf):
        values = value if isinstance(value, list) else [value]
        if len(set(map(str, values))) != 1 or not is_count(values[0]):
            raise ValueError('be a whole number, or a list of the same one for each layer: layers that '
                             'differ in it are not supported')
        return values[0]
    return Key((flag,), read, lambda c: getattr(c, flag))


def read_alpha(hf):
    """Rotary positions; `alpha` beside rope_type=dynamic is a larger base for texts of any length."""
    p = rope_parameters(hf)
    if rope_type(p) != 'dynamic' or not p.get('alpha'):
        return read_rope(hf)
    width, theta = width_of_head(hf), read_rope(hf, p | {'rope_type': 'default'})['rope_theta']
    return {'rope_theta': theta * p['alpha'] ** (width / (width - 2))}


def read_hunyuan(hf):
    used = hf['moe_topk'][0] if isinstance(hf['moe_topk'], list) else hf['moe_topk']
    if hf.get('num_experts_per_tok', used) != used:
        refuse(hf, 'num_experts_per_tok', f'equal moe_topk={used}, another name of it')
    return read_alpha(hf) | {'shared_width': hf['intermediate_size']}


NORMS_AFTER = {
    'h.{a}.mixer.q_norm_after': 'model.layers.{i}.self_attn.query_layernorm',
    'h.{a}.mixer.k_norm_after': 'model.layers.{i}.self_attn.key_layernorm'}

FAMILIES['hunyuan_v1_moe'] = Family(
    architecture='HunYuanMoEV1ForCausalLM',
    flags=LLAMA_FLAGS | {'ffn_pattern': 'e', 'qk_norm': 'after', 'n_shared': 1},
    keys=LLAMA_KEYS | ATTENTION_BIAS | {
        'num_experts': 'n_expert', 'moe_topk': same_in_all('n_expert_used'),
        'intermediate_size': 'expert_width'},
    aliases={'num_local_experts': 'num_experts', 'num_experts_per_tok': 'moe_topk'},
    defaults={'rms_norm_eps': 1e-5, 'num_experts': 1, 'moe_topk': 1},
    tensors=V3_TENSORS | NORMS_AFTER | {
        'h.{e}.ffn.router': 'model.layers.{i}.mlp.gate.wg',
        'h.{e}.ffn.shared.c_fc': ('model.layers.{i}.mlp.shared_mlp.{gate,up}_proj', gate_up),
        'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.mlp.shared_mlp.down_proj'},
    read=read_hunyuan, write=write_rope)

# ----------------------------------------------------------------------------------------------------------
# ERNIE 4.5 MoE: interleaved rotary pairs; softmax scores, with a bias on the choice


def read_ernie(hf):
    if hf['use_bias']:
        refuse(hf, 'use_bias', 'be false: with it all linear layers but the experts have a bias')
    if hf['moe_norm_min'] > 1e-6:
        refuse(hf, 'moe_norm_min', "be at most 1e-6: the experts' weights are divided by their sum here")
    step, first, last = (hf[f'moe_layer_{key}'] for key in ('interval', 'start_index', 'end_index'))
    last = hf['num_hidden_layers'] - 1 if last == -1 else last
    return read_rope(hf) | {'ffn_pattern': pattern_of(
        hf, lambda i: 'f' if (i + 1) % step or not first <= i <= last else 'e')}


def write_ernie(c):
    layers = expert_layers(c)
    first, last = (layers[0], layers[-1]) if layers else (c.n_layer, c.n_layer - 1)
    # what reads again as another pattern is not exported
    step = layers[1] - first if len(layers) > 1 else 1
    return write_rope(c) | {
        'moe_layer_start_index': first, 'moe_layer_end_index': last, 'moe_layer_interval': step}


def ernie_as_stored(rules, files, c):
    """In memory, transformers has the bias within the router."""
    name = '.mlp.gate.moe_statics.e_score_correction_bias'
    if not any(stored.endswith(name) for stored in files.where):
        return rules
    return rules | {'h.{e}.ffn.choice_bias': ('model.layers.{i}' + name, one_row)}


FAMILIES['ernie4_5_moe'] = Family(
    architecture='Ernie4_5_MoeForCausalLM',
    flags=LLAMA_FLAGS | {'balance': 'bias'},
    keys=LLAMA_KEYS | {
        'moe_num_experts': 'n_expert', 'moe_k': 'n_expert_used', 'moe_intermediate_size': 'expert_width',
        'moe_num_shared_experts': 'n_shared'},
    aliases={'num_experts': 'moe_num_experts', 'num_experts_per_tok': 'moe_k'},
    defaults=TIED | {
        'rms_norm_eps': 1e-5, 'rope_theta': 5e5, 'use_bias': False, 'moe_k': 6, 'moe_num_shared_experts': 2,
        'moe_layer_start_index': 1, 'moe_layer_end_index': -1, 'moe_layer_interval': 1,
        'moe_norm_min': 1e-12},
    tensors=V3_TENSORS | {
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_interleaved),
        'h.{e}.ffn.choice_bias': ('model.layers.{i}.mlp.moe_statics.e_score_correction_bias', one_row)},
    as_stored=ernie_as_stored,
    # multi-token prediction
    unread='mtp',
    read=read_ernie, write=write_ernie)
