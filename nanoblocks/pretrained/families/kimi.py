"""Kimi delta attention (KDA) beside latent attention, and experts: Kimi Linear, Ling 3."""
import re

from nanoblocks.pretrained.families.deepseek import (
    DEEPSEEK_FLAGS,
    DEEPSEEK_KEYS,
    deepseek_tensors,
    read_deepseek,
    read_groups,
    write_deepseek,
)
from nanoblocks.pretrained.families.family import Family
from nanoblocks.pretrained.families.recurrent import apart, joined, read_hybrid, stored
from nanoblocks.pretrained.keys import (
    RECURRENT,
    ROUTER_NORM,
    expert_layers,
    mixer_letters,
    pattern_of,
    refuse,
    without,
    write_layer_types,
)
from nanoblocks.pretrained.layouts import by_expert, four_dimensions, gate_up, gate_up_by_expert, same

FAMILIES = {}

# ----------------------------------------------------------------------------------------------------------
# Kimi Linear: latent attention without positions

KDA_FLAGS = without(DEEPSEEK_FLAGS, 'pos') | {'router': 'sigmoid', 'rnn_decay': 'key', 'rnn_gate': 'sigmoid'}
KIMI_DELTA = {'num_heads': ('rnn_heads', 'rnn_key_heads'), 'short_conv_kernel_size': ('rnn_conv',),
              'head_dim': ('rnn_key_dim', 'rnn_value_dim', 'rnn_gate_rank', 'rnn_decay_rank')}
KIMI_KEYS = without(DEEPSEEK_KEYS, 'n_routed_experts', 'num_experts_per_tok', 'n_shared_experts',
                    'max_position_embeddings') | {
    'num_experts': 'n_expert', 'num_experts_per_token': 'n_expert_used', 'num_shared_experts': 'n_shared',
    'model_max_length': 'block_size', 'moe_renormalize': ROUTER_NORM}
KIMI_ALIASES = {
    'num_local_experts': 'num_experts', 'num_experts_per_tok': 'num_experts_per_token',
    'n_shared_experts': 'num_shared_experts', 'max_position_embeddings': 'model_max_length',
    'norm_topk_prob': 'moe_renormalize', 'n_group': 'num_expert_group'}


def read_kimi(hf):
    own = hf.get('linear_attn_config') or {}
    # its layers are counted from one
    full = [i - 1 for i in own['full_attn_layers']] if own else range(4, hf['num_hidden_layers'], 4)
    letters = mixer_letters(hf, lambda i: 'a' if i in full else 'r', RECURRENT)
    flags = read_hybrid(hf, letters.replace('a', 'n')) | read_dense_first(hf)
    for key, names in KIMI_DELTA.items():
        flags |= dict.fromkeys(names, own[key]) if key in own else {}
    return flags


def read_dense_first(hf):
    """Flags of experts in the layers after the first, or where mlp_layer_types says so."""
    types, first, n = hf.get('mlp_layer_types'), hf['first_k_dense_replace'], hf['num_hidden_layers']
    if types and (len(types) != n or not set(types) <= {'dense', 'sparse'}):
        refuse(hf, 'mlp_layer_types', f'be a list of {n}, one a layer, of dense, sparse')
    groups = read_groups(hf | {'n_group': hf['num_expert_group']}, top=2)
    return groups | {'balance': 'bias', 'ffn_pattern': pattern_of(
        hf, lambda i: 'e' if (types[i] == 'sparse' if types else i >= first) else 'f')}


def write_dense_first(c):
    experts = expert_layers(c)
    return {'mlp_layer_types': ['sparse' if i in experts else 'dense' for i in range(c.n_layer)],
            'num_expert_group': c.n_group, 'topk_group': c.n_group_used,
            'num_shared_experts': c.n_shared or 1, 'num_key_value_heads': c.n_head, **write_layer_types(c)}


def kimi_tensors(c, hf):
    place = 'model.layers.{i}.self_attn.'
    moe = 'model.layers.{i}.block_sparse_moe.'
    return deepseek_tensors(c, {'rope_interleave': False}) | apart(place) | {
        'h.{r}.mixer.erase.beta': place + 'b_proj',
        'h.{r}.mixer.decay.f.0': place + 'f_a_proj',
        'h.{r}.mixer.decay.f.1': place + 'f_b_proj',
        'h.{r}.mixer.decay.A_log': (place + 'A_log', four_dimensions),
        'h.{r}.mixer.decay.dt_bias': place + 'dt_bias',
        'h.{r}.mixer.gate.0': place + 'g_a_proj',
        'h.{r}.mixer.gate.1': place + 'g_b_proj',
        'h.{r}.mixer.norm': place + 'o_norm',
        'h.{r}.mixer.c_proj': place + 'o_proj',
        'h.{e}.ffn.router': moe + 'gate',
        'h.{e}.ffn.choice_bias': moe + 'gate.e_score_correction_bias',
        'h.{e}.ffn.c_fc': (moe + 'experts.{n}.{w1,w3}', gate_up_by_expert),
        'h.{e}.ffn.c_proj': (moe + 'experts.{n}.w2', by_expert),
        'h.{e}.ffn.shared.c_fc': (moe + 'shared_experts.{gate,up}_proj', gate_up),
        'h.{e}.ffn.shared.c_proj': moe + 'shared_experts.down_proj'}


def kimi_as_stored(rules, files, c):
    """transformers writes dense layers under the name of those with experts."""
    if stored(files, '.forget_gate.A_log'):
        return in_memory(rules) | joined('model.layers.{i}.self_attn.')
    if not stored(files, '.block_sparse_moe.gate_proj.weight'):
        return rules
    return rules | {'h.{f}.ffn.c_fc': ('model.layers.{i}.block_sparse_moe.{gate,up}_proj', gate_up),
                    'h.{f}.ffn.c_proj': 'model.layers.{i}.block_sparse_moe.down_proj'}


def in_memory(rules):
    """The names that transformers has in memory."""
    return {ours: (re.sub(r'\.(f_proj|f_a_proj|f_b_proj|A_log|dt_bias)$', r'.forget_gate.\1', theirs), layout)
            for ours, (theirs, layout) in rules.items()}


FAMILIES['kimi_linear'] = Family(
    architecture='KimiLinearForCausalLM',
    flags=KDA_FLAGS,
    keys=KIMI_KEYS | {
        'linear_num_heads': KIMI_DELTA['num_heads'], 'linear_head_dim': KIMI_DELTA['head_dim'],
        'linear_conv_kernel_dim': 'rnn_conv'},
    aliases=KIMI_ALIASES,
    defaults={'rms_norm_eps': 1e-5, 'first_k_dense_replace': 1, 'num_expert_group': 1, 'topk_group': 1,
              'num_shared_experts': 1, 'num_experts_per_token': 8, 'moe_renormalize': True,
              'routed_scaling_factor': 2.446, 'linear_num_heads': 32, 'linear_head_dim': 128,
              'linear_conv_kernel_dim': 4},
    tensors=kimi_tensors,
    as_stored=kimi_as_stored,
    mixers='ar', read=read_kimi, write=write_dense_first)


# ----------------------------------------------------------------------------------------------------------
# Ling 3: a floor under its decays, and rotating latent attention with a gate for each head


def read_ling(hf):
    every = hf['layer_group_size']
    letters = mixer_letters(hf, lambda i: 'r' if (i + 1) % every else 'a', RECURRENT)
    # transformers 5 writes the width that rotates as head_dim
    width, heads = hf.get('linear_head_dim') or hf['head_dim'], hf['num_attention_heads']
    return read_hybrid(hf, letters) | read_deepseek(hf) | read_dense_first(hf) | {
        'rnn_heads': heads, 'rnn_key_heads': heads, 'rnn_key_dim': width, 'rnn_value_dim': width,
        'rnn_floor': hf['kda_lower_bound'] if hf['kda_safe_gate'] else None}


def write_ling(c):
    return write_deepseek(c) | write_dense_first(c) | {
        'head_dim': c.rnn_key_dim, 'linear_head_dim': c.rnn_key_dim, 'kda_safe_gate': c.rnn_floor is not None,
        'kda_lower_bound': c.rnn_floor or -5.0, 'num_nextn_predict_layers': 0}


def ling_tensors(c, hf):
    place = 'model.layers.{i}.attention.'
    attention = {ours: (theirs.replace('.self_attn.', '.attention.'), layout) for ours, (theirs, layout) in (
        (ours, rule if isinstance(rule, tuple) else (rule, same))
        for ours, rule in deepseek_tensors(c, {}).items())}
    return attention | apart(place) | {
        'wte': 'model.word_embeddings',
        'h.{a}.mixer.c_proj': place + 'dense',
        'h.{a}.mixer.gate': place + 'g_proj',
        'h.{r}.mixer.erase.beta': place + 'b_proj',
        'h.{r}.mixer.decay.f': place + 'f_proj',
        'h.{r}.mixer.decay.A_log': place + 'A_log',
        'h.{r}.mixer.decay.dt_bias': place + 'dt_bias',
        'h.{r}.mixer.gate': place + 'g_proj',
        'h.{r}.mixer.norm': place + 'o_norm',
        'h.{r}.mixer.c_proj': place + 'dense',
        'h.{e}.ffn.choice_bias': 'model.layers.{i}.mlp.gate.expert_bias'}


LING_IN_MEMORY = {'.attention.': '.self_attn.', '.dense': '.o_proj', 'word_embeddings': 'embed_tokens',
                  '.expert_bias': '.e_score_correction_bias'}


def ling_as_stored(rules, files, c):
    if not stored(files, '.forget_gate.A_log'):
        return rules
    rules = in_memory(rules | joined('model.layers.{i}.attention.'))
    for old, new in LING_IN_MEMORY.items():
        rules = {ours: (theirs.replace(old, new), layout) for ours, (theirs, layout) in rules.items()}
    return rules


FAMILIES['bailing_hybrid'] = Family(
    architecture='BailingHybridForCausalLM',
    flags=KDA_FLAGS | {'attn_gate': 'head'},
    keys=without(KIMI_KEYS, 'attention_bias') | {'short_conv_kernel_size': 'rnn_conv'},
    aliases=KIMI_ALIASES | {'num_mtp_layers': 'num_nextn_predict_layers'},
    defaults={'rope_theta': 6e6, 'head_dim': 128, 'first_k_dense_replace': 2, 'num_expert_group': 8,
              'topk_group': 4, 'num_shared_experts': 1, 'num_experts_per_token': 8, 'moe_renormalize': True,
              'routed_scaling_factor': 2.5, 'short_conv_kernel_size': 4, 'layer_group_size': 6,
              'kda_safe_gate': True, 'kda_lower_bound': -5.0, 'num_nextn_predict_layers': 1},
    only={'attention_bias': False},
    tensors=ling_tensors,
    as_stored=ling_as_stored,
    mixers='ar', read=read_ling, write=write_ling)
