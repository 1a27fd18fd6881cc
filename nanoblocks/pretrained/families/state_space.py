"""
State spaces: Mamba, Falcon Mamba, Mamba-2, and Jamba, which mixes Mamba with attention and experts. Files of
Mamba's authors, without model_type, are read as a mamba or mamba2.
"""
import math

from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.keys import Key, pattern_of, refuse, whole_number
from nanoblocks.pretrained.layouts import by_expert, conv, gate_up, gate_up_by_expert
from nanoblocks.pretrained.values import check_values

FAMILIES = {}

MAMBA_FLAGS = {'pos': 'none', 'norm': 'rmsnorm', 'layer_pattern': 'm', 'ffn_pattern': '-', 'bias': False}
MAMBA_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'state_size': 'ssm_state', 'conv_kernel': 'ssm_conv', 'layer_norm_epsilon': 'norm_eps',
    'expand': whole_number('ssm_expand'), 'use_bias': 'ssm_bias', 'use_conv_bias': 'conv_bias',
    'tie_word_embeddings': 'tie'}
DT_RANK = Key(('ssm_dt_rank',), lambda rank, hf: None if rank == 'auto' else rank, lambda c: c.ssm_dt_rank)
MAMBA_DEFAULTS = {'expand': 2, 'state_size': 16, 'conv_kernel': 4, 'use_bias': False, 'use_conv_bias': True,
                  'time_step_rank': 'auto'}
SILU = {'hidden_act': 'silu'}


def mixer_tensors(place, ours='h.{m}.mixer.'):
    """The tensors of a Mamba or Mamba-2 mixer, under their names for it."""
    same_name = ('in_proj', 'x_proj', 'dt_proj', 'conv1d.bias', 'dt_bias', 'A_log', 'D', 'norm')
    return {ours + name: place + name for name in same_name} | {
        ours + 'conv1d.weight': (place + 'conv1d.weight', conv), ours + 'c_proj': place + 'out_proj'}


MAMBA_TENSORS = mixer_tensors('backbone.layers.{i}.mixer.') | {
    'wte': 'backbone.embeddings', 'ln_f': 'backbone.norm_f', 'lm_head': 'lm_head',
    'h.{i}.ln_1': 'backbone.layers.{i}.norm'}


def embedding_as_stored(rules, files, c):
    """The authors of Mamba call the embedding so."""
    return rules | ({'wte': 'backbone.embedding'} if 'backbone.embedding.weight' in files.where else {})


# ----------------------------------------------------------------------------------------------------------
# Mamba

FAMILIES['mamba'] = Family(
    architecture='MambaForCausalLM',
    flags=MAMBA_FLAGS | {'ssm': 'mamba1'},
    keys=MAMBA_KEYS | {'time_step_rank': DT_RANK},
    aliases={'d_model': 'hidden_size', 'n_layer': 'num_hidden_layers'},
    defaults=TIED | MAMBA_DEFAULTS,
    only=SILU,
    tensors=MAMBA_TENSORS,
    as_stored=embedding_as_stored,
    mixers='m', write=lambda c: SILU)

# Falcon Mamba: norms without weights on the step size, B and C
FAMILIES['falcon_mamba'] = Family(
    architecture='FalconMambaForCausalLM',
    flags=MAMBA_FLAGS | {'ssm': 'mamba1', 'ssm_norm': 'plain'},
    keys=MAMBA_KEYS | {'time_step_rank': DT_RANK, 'mixer_rms_eps': 'ssm_eps'},
    defaults=TIED | MAMBA_DEFAULTS | {'mixer_rms_eps': 1e-6},
    only=SILU,
    tensors=MAMBA_TENSORS,
    mixers='m', write=lambda c: SILU)


# ----------------------------------------------------------------------------------------------------------
# Mamba-2


def read_limits(hf):
    """The limits of the step size, where transformers writes infinity as {"__float__": "Infinity"}."""
    limits = hf['time_step_limit']
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        refuse(hf, 'time_step_limit', 'hold two numbers')
    low, high = (float(x['__float__'] if isinstance(x, dict) else x) for x in limits)
    return {'ssm_dt_min': low, 'ssm_dt_max': None if math.isinf(high) else high}


def write_limits(c):
    high = {'__float__': 'Infinity'} if c.ssm_dt_max is None else c.ssm_dt_max
    return {'time_step_limit': [c.ssm_dt_min, high]}


# In the place of 0, of which transformers takes the logarithm where it draws weights. No step is as small.
LEAST_STEP = 1e-30


def read_least(hf):
    least = float(hf['time_step_min'])
    return {'ssm_dt_min': least if least > LEAST_STEP else 0.0}


def write_least(c):
    return {'time_step_min': c.ssm_dt_min or LEAST_STEP}


def read_mamba2(hf):
    heads, inner = hf['num_heads'], hf['expand'] * hf['hidden_size']
    if heads * hf['head_dim'] != inner:
        refuse(hf, 'num_heads', f'be expand x hidden_size / head_dim = {inner}/{hf["head_dim"]}')
    return read_limits(hf)


def write_mamba2(c):
    return SILU | {'num_heads': c.ssm_expand * c.n_embd // c.ssm_head_dim} | write_limits(c)


FAMILIES['mamba2'] = Family(
    architecture='Mamba2ForCausalLM',
    flags=MAMBA_FLAGS | {'ssm': 'mamba2'},
    keys=MAMBA_KEYS | {'head_dim': 'ssm_head_dim', 'n_groups': 'ssm_groups'},
    defaults=MAMBA_DEFAULTS | {'state_size': 128, 'n_groups': 8, 'head_dim': 64,
                               'time_step_limit': (0.0, math.inf)},
    only=SILU,
    tensors=MAMBA_TENSORS,
    as_stored=embedding_as_stored,
    mixers='m', read=read_mamba2, write=write_mamba2)


# ----------------------------------------------------------------------------------------------------------
# Mamba and Mamba-2 in the files of their authors, whose config.json has no model_type

SSM_CFG = {'d_state': 'state_size', 'd_conv': 'conv_kernel', 'expand': 'expand', 'bias': 'use_bias',
           'conv_bias': 'use_conv_bias'}
# {layer of ssm_cfg: (model_type, {key of ssm_cfg: key of that family}, values of keys that are left out)}
AUTHORS = {
    'Mamba1': ('mamba', SSM_CFG | {'dt_rank': 'time_step_rank'}, {}),
    'Mamba2': ('mamba2', SSM_CFG | {'headdim': 'head_dim', 'ngroups': 'n_groups',
                                    'dt_limit': 'time_step_limit'}, {'n_groups': 1})}
# for drawing weights, and for the order of sums
NOT_READ = {'layer', 'dt_min', 'dt_max', 'dt_init', 'dt_scale', 'dt_init_floor', 'A_init_range', 'chunk_size',
            'use_fast_path', 'use_mem_eff_path'}
# neither attention nor feed-forwards
MAMBA_ALONE = {'rms_norm': True, 'd_intermediate': 0, 'attn_layer_idx': []}


def with_model_type(hf, path):
    """config.json of Mamba's authors in the words of a mamba or mamba2; any other as it is."""
    if 'model_type' in hf or 'ssm_cfg' not in hf:
        return hf
    ssm = hf['ssm_cfg'] or {}
    layer = ssm.get('layer', 'Mamba1') if isinstance(ssm, dict) else ssm
    if not isinstance(layer, str) or layer not in AUTHORS:
        raise ValueError(f'ssm_cfg={ssm} in {path} must have Mamba1 or Mamba2 as its layer: fetch it again')
    kind, names, values = AUTHORS[layer]
    for key, value in MAMBA_ALONE.items():
        if hf.get(key) not in (value, None):
            raise ValueError(f'{key}={hf[key]} in {path} must be {value}: nothing else is read where '
                             'there is ssm_cfg')
    for key in ssm.keys() - names.keys() - NOT_READ:
        raise ValueError(f'{key}={ssm[key]} of ssm_cfg in {path} must be absent: it is not supported')
    sizes = {'vocab_size': None, 'pad_vocab_size_multiple': 8, 'd_model': None, 'n_layer': None}
    sizes = {key: hf.get(key, value) for key, value in sizes.items()}
    made = {'model_type': kind, 'hidden_size': sizes['d_model'], 'num_hidden_layers': sizes['n_layer'],
            'tie_word_embeddings': hf.get('tie_embeddings', True), **values,
            **{names[key]: value for key, value in ssm.items() if key in names}}
    check_values(sizes | made, path)
    for key, value in sizes.items():
        if not value:
            raise ValueError(f'{key}={value} in {path} must be at least 1: fetch the file again')
    # the embedding has rows that are no token's
    made['vocab_size'] = -(-sizes['vocab_size'] // sizes['pad_vocab_size_multiple']) * \
        sizes['pad_vocab_size_multiple']
    if kind == 'mamba2':
        made |= {'num_heads': int(made.get('expand', 2) * made['hidden_size'] / (made.get('head_dim') or 64))}
    return made


# ----------------------------------------------------------------------------------------------------------
# Jamba: one layer in eight attends, every other has experts; no positions


def read_jamba(hf):
    def chosen(what, i):
        return i % hf[f'{what}_layer_period'] == hf[f'{what}_layer_offset']
    mixers = pattern_of(hf, lambda i: 'a' if chosen('attn', i) else 'm')
    if 'm' in mixers and hf['hidden_act'] not in ('silu', 'swish'):
        refuse(hf, 'hidden_act', 'be silu, the activation of our state spaces')
    ffns = pattern_of(hf, lambda i: 'e' if chosen('expert', i) and hf['num_experts'] > 1 else 'f')
    return {'layer_pattern': mixers, 'ffn_pattern': ffns, 'expert_width': hf['intermediate_size']}


def write_jamba(c):
    mixers, ffns = zip(*c.plan())
    return period_of('attn', mixers, 'a') | period_of('expert', ffns, 'e') | {
        'num_experts': c.n_expert or 1, 'intermediate_size': c.expert_width if 'e' in ffns else c.ffn_width}


def period_of(what, letters, letter):
    """
    Period and offset of the layers with this letter. Where they have none, 1 and 0: config.json then reads
    back as other layers, and the export is refused.
    """
    n = len(letters)
    period, offset = next(
        ((period, offset) for period in range(1, n + 2) for offset in range(period)
         if all((x == letter) == (i % period == offset) for i, x in enumerate(letters))), (1, 0))
    return {f'{what}_layer_period': period, f'{what}_layer_offset': offset}


FAMILIES['jamba'] = Family(
    architecture='JambaForCausalLM',
    flags={'pos': 'none', 'norm': 'rmsnorm', 'bias': False, 'ssm': 'mamba1', 'ssm_norm': True,
           'router_norm': False},
    keys=LLAMA_KEYS | {
        'num_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used', 'mamba_d_state': 'ssm_state',
        'mamba_d_conv': 'ssm_conv', 'mamba_expand': whole_number('ssm_expand'), 'mamba_dt_rank': DT_RANK,
        'mamba_proj_bias': 'ssm_bias', 'mamba_conv_bias': 'conv_bias'},
    defaults={'attn_layer_period': 8, 'attn_layer_offset': 4, 'expert_layer_period': 2,
              'expert_layer_offset': 1, 'num_experts': 16, 'num_experts_per_tok': 2, 'mamba_d_state': 16,
              'mamba_d_conv': 4, 'mamba_expand': 2, 'mamba_dt_rank': 'auto', 'mamba_proj_bias': False,
              'mamba_conv_bias': True},
    tensors=LLAMA_TENSORS | mixer_tensors('model.layers.{i}.mamba.') | {
        'ln_f': 'model.final_layernorm', 'h.{i}.ln_2': 'model.layers.{i}.pre_ff_layernorm',
        'h.{f}.ffn.c_fc': ('model.layers.{i}.feed_forward.{gate,up}_proj', gate_up),
        'h.{f}.ffn.c_proj': 'model.layers.{i}.feed_forward.down_proj',
        'h.{e}.ffn.router': 'model.layers.{i}.feed_forward.router',
        'h.{e}.ffn.c_fc': ('model.layers.{i}.feed_forward.experts.{n}.{gate,up}_proj', gate_up_by_expert),
        'h.{e}.ffn.c_proj': ('model.layers.{i}.feed_forward.experts.{n}.down_proj', by_expert),
        'h.{m}.mixer.dt_norm': 'model.layers.{i}.mamba.dt_layernorm',
        'h.{m}.mixer.b_norm': 'model.layers.{i}.mamba.b_layernorm',
        'h.{m}.mixer.c_norm': 'model.layers.{i}.mamba.c_layernorm'},
    mixers='am', read=read_jamba, write=write_jamba)
