"""Mamba-2 beside attention: Nemotron-H, Bamba, Falcon-H1, Granite 4."""
import math
from functools import partial

import torch

from model import ssm_inner
from nanoblocks.pretrained.families.deepseek import read_groups
from nanoblocks.pretrained.families.family import Family
from nanoblocks.pretrained.families.llama import (
    BIAS_KEYS,
    LLAMA_FLAGS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
)
from nanoblocks.pretrained.families.llama import FAMILIES as LLAMAS
from nanoblocks.pretrained.families.recurrent import stored
from nanoblocks.pretrained.families.state_space import (
    mixer_tensors,
    read_least,
    read_limits,
    write_least,
    write_limits,
)
from nanoblocks.pretrained.keys import (
    ROUTER_NORM,
    Key,
    mixer_letters,
    pattern_of,
    refuse,
    renamed,
    shortest_pattern,
    whole_number,
    without,
)
from nanoblocks.pretrained.layouts import by_expert, gate_up, qkv, same
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

LINEAR = {'linear_attention': 'm', 'mamba': 'm', 'full_attention': 'a', 'attention': 'a'}


def widths_of(hf, heads, width, inner):
    """Flags of the heads and of the inner width, which is `inner` by the other keys."""
    heads, width = hf[heads], hf[width]
    width = inner // heads if width == 'auto' else width
    own = {} if heads * width == hf['expand'] * hf['hidden_size'] else {'ssm_width': heads * width}
    return {'ssm_head_dim': width} | own


# ----------------------------------------------------------------------------------------------------------
# Nemotron-H: one branch a layer, which is a state space, attention, a feed-forward or experts

NEMOTRON = {'M': 'm-', '*': 'a-', '-': '-f', 'E': '-e'}
NEMOTRON_TYPES = {'linear_attention': 'M', 'mamba': 'M', 'full_attention': '*', 'attention': '*',
                  'mlp': '-', 'moe': 'E'}
RELU2 = renamed('ffn', {'relu2': 'relu2', 'silu': 'silu'})


def read_nemotron(hf):
    types = hf.get('layers_block_type') or hf.get('layer_types')
    if types is not None and not (types and set(types) <= NEMOTRON_TYPES.keys()):
        refuse(hf, 'layers_block_type', f'be a list of {", ".join(NEMOTRON_TYPES)}')
    letters = [NEMOTRON_TYPES[name] for name in types] if types else hf['hybrid_override_pattern']
    if not set(letters) <= NEMOTRON.keys():
        refuse(hf, 'hybrid_override_pattern', f'consist of the letters {" ".join(NEMOTRON)}')
    mixers, ffns = zip(*(NEMOTRON[letter] for letter in letters))
    return read_groups(hf, top=2) | widths_of(hf, 'mamba_num_heads', 'mamba_head_dim', 0) | {
        'n_layer': len(letters), 'layer_pattern': shortest_pattern(mixers),
        'ffn_pattern': shortest_pattern(ffns)} | read_least(hf)


def write_nemotron(c):
    kinds = {letters: kind for kind, letters in NEMOTRON.items()}
    names = {kind: name for name, kind in reversed(NEMOTRON_TYPES.items())}
    # of other pairs of letters, read_nemotron makes other layers, and the export is refused
    types = [names[kinds.get(mixer + ffn, 'M')] for mixer, ffn in c.plan()]
    mamba = {} if c.missing('ssm') else write_least(c) | {
        'mamba_num_heads': ssm_inner(c) // c.ssm_head_dim}
    return mamba | {'layers_block_type': types, 'num_hidden_layers': c.n_layer, 'n_group': c.n_group,
                    'topk_group': c.n_group_used}


LAYER = 'backbone.layers.{i}.'


def nemotron_as_stored(rules, files, c):
    """In memory, transformers has another name for the body."""
    if 'model.embeddings.weight' not in files.where:
        return rules
    return {ours: (theirs.replace('backbone.', 'model.'), layout) for ours, (theirs, layout) in rules.items()}


FAMILIES['nemotron_h'] = Family(
    architecture='NemotronHForCausalLM',
    flags={'pos': 'none', 'norm': 'rmsnorm', 'bias': False, 'ssm': 'mamba2', 'qkv_bias': False,
           'proj_bias': False, 'ffn_bias': False, 'n_shared': 1, 'router': 'sigmoid', 'balance': 'bias'},
    keys=without(LLAMA_KEYS, 'rms_norm_eps', 'hidden_act', 'num_hidden_layers') | {
        'layer_norm_epsilon': 'norm_eps', 'mlp_hidden_act': RELU2, 'ssm_state_size': 'ssm_state',
        'mamba_head_dim': 'ssm_head_dim', 'n_groups': 'ssm_groups', 'conv_kernel': 'ssm_conv',
        'expand': whole_number('ssm_expand'), 'use_conv_bias': 'conv_bias', 'use_bias': 'ssm_bias',
        'n_routed_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
        'moe_intermediate_size': 'expert_width', 'moe_shared_expert_intermediate_size': 'shared_width',
        'routed_scaling_factor': 'router_scale', 'norm_topk_prob': ROUTER_NORM},
    aliases={'attention_head_dim': 'head_dim', 'num_local_experts': 'n_routed_experts'},
    defaults={'head_dim': 128, 'mlp_hidden_act': 'relu2', 'ssm_state_size': 128, 'mamba_num_heads': 128,
              'mamba_head_dim': 64, 'n_groups': 8, 'conv_kernel': 4, 'expand': 2, 'use_conv_bias': True,
              'use_bias': False, 'time_step_min': 0.001, 'n_group': 1, 'topk_group': 1,
              'num_experts_per_tok': 2, 'routed_scaling_factor': 1.0, 'norm_topk_prob': True},
    only={'mamba_hidden_act': 'silu', 'mlp_bias': False, 'attention_bias': False, 'sliding_window': None,
          'moe_latent_size': None},
    tensors=mixer_tensors(LAYER + 'mixer.') | {
        'wte': 'backbone.embeddings', 'ln_f': 'backbone.norm_f', 'lm_head': 'lm_head',
        'h.{i}.ln_1': LAYER + 'norm', 'h.{i}.ln_2': LAYER + 'norm',
        'h.{a}.mixer.c_attn': (LAYER + 'mixer.{q,k,v}_proj', qkv),
        'h.{a}.mixer.c_proj': LAYER + 'mixer.o_proj',
        'h.{f}.ffn.c_fc': LAYER + 'mixer.up_proj',
        'h.{f}.ffn.c_proj': LAYER + 'mixer.down_proj',
        'h.{e}.ffn.router': LAYER + 'mixer.gate',
        'h.{e}.ffn.choice_bias': LAYER + 'mixer.gate.e_score_correction_bias',
        'h.{e}.ffn.c_fc': (LAYER + 'mixer.experts.{n}.up_proj', by_expert),
        'h.{e}.ffn.c_proj': (LAYER + 'mixer.experts.{n}.down_proj', by_expert),
        'h.{e}.ffn.shared.c_fc': LAYER + 'mixer.shared_experts.up_proj',
        'h.{e}.ffn.shared.c_proj': LAYER + 'mixer.shared_experts.down_proj'},
    as_stored=nemotron_as_stored, head_stored=True,
    mixers='am-', read=read_nemotron, write=write_nemotron)

# ----------------------------------------------------------------------------------------------------------
# Bamba: attention in a few layers, of which half of each head rotates

MAMBA_KEYS = {'mamba_d_state': 'ssm_state', 'mamba_d_conv': 'ssm_conv', 'mamba_n_groups': 'ssm_groups',
              'mamba_expand': whole_number('ssm_expand'), 'mamba_conv_bias': 'conv_bias',
              'mamba_proj_bias': 'ssm_bias'}
MAMBA_DEFAULTS = {
    'mamba_n_heads': 128, 'mamba_d_head': 'auto', 'mamba_n_groups': 1, 'mamba_d_state': 256,
    'mamba_d_conv': 4, 'mamba_expand': 2, 'mamba_conv_bias': True, 'mamba_proj_bias': False,
    'time_step_limit': (0.0, math.inf)}


def read_mamba(hf):
    """Flags of Mamba-2 that no key has alone."""
    expand = hf['mamba_expand']
    if expand != int(expand):
        refuse(hf, 'mamba_expand', 'be a whole number')
    inner = hf.get('mamba_d_ssm') or int(expand) * hf['hidden_size']
    flags = widths_of(hf | {'expand': int(expand)}, 'mamba_n_heads', 'mamba_d_head', inner)
    if hf['mamba_n_heads'] * flags['ssm_head_dim'] != inner:
        refuse(hf, 'mamba_d_head', f'be the inner width {inner} divided by mamba_n_heads')
    return read_limits(hf) | flags


def write_mamba(c):
    if c.missing('ssm'):
        return {}
    return write_limits(c) | {
        'mamba_n_heads': ssm_inner(c) // c.ssm_head_dim, 'mamba_d_head': c.ssm_head_dim}


def read_bamba(hf):
    attends = hf.get('attn_layer_indices') or ()
    letters = pattern_of(hf, lambda i: 'a' if i in attends else 'm')
    # in files of before transformers 5 no key says that half of a head rotates
    hf = hf | {'partial_rotary_factor': 0.5}
    return read_mamba(hf) | {'layer_pattern': letters} | (
        read_rope(hf, partial=True) | {'pos': 'rope'} if 'a' in letters else {'pos': 'none'})


def write_bamba(c):
    return write_mamba(c) | write_rope(c) | {
        'attn_layer_indices': [i for i, (mixer, _) in enumerate(c.plan()) if mixer != 'm']}


FEED_FORWARD = {
    'ln_f': 'model.final_layernorm', 'h.{i}.ln_2': 'model.layers.{i}.pre_ff_layernorm',
    'h.{f}.ffn.c_fc': ('model.layers.{i}.feed_forward.{gate,up}_proj', gate_up),
    'h.{f}.ffn.c_proj': 'model.layers.{i}.feed_forward.down_proj'}

FAMILIES['bamba'] = Family(
    architecture='BambaForCausalLM',
    flags=without(LLAMA_FLAGS, 'pos') | {'ssm': 'mamba2'},
    keys=without(LLAMA_KEYS, 'head_dim') | BIAS_KEYS | MAMBA_KEYS,
    defaults=MAMBA_DEFAULTS | {'rms_norm_eps': 1e-5},
    only={'hidden_act': 'silu'},
    tensors=LLAMA_TENSORS | FEED_FORWARD | mixer_tensors('model.layers.{i}.mamba.'),
    mixers='am', read=read_bamba, write=write_bamba)

# ----------------------------------------------------------------------------------------------------------
# Falcon-H1: attention and a state space in every layer. Its multipliers become part of the weights.


def scaled(p, c, layout=same, weight=1.0, both=(1.0,)):
    """The tensors of a layout, each times its factor of `both`, and weights times `weight` too."""
    pieces, factor = layout(p, c), weight if p.dim() == 2 else 1.0
    return [piece._replace(times=factor * times) for piece, times in zip(pieces, both, strict=True)]


def scaled_rows(p, c, weight, parts):
    """Mamba's in_proj, with a factor for the rows of the gate, of x, B and C, and of the step size."""
    inner, states = ssm_inner(c), c.ssm_groups * c.ssm_state
    rows = torch.tensor([inner, inner, states, states, inner // c.ssm_head_dim])
    times = torch.tensor(parts, dtype=torch.float32).repeat_interleave(rows)
    times = weight * times.unsqueeze(1) if p.dim() == 2 else times
    return [piece._replace(times=times) for piece in same(p, c)]


ONES = [1.0] * 5


def falcon_h1_tensors(c, hf):
    def factor(name):
        return float(hf.get(name + '_multiplier', 1.0))
    gate, down = hf.get('mlp_multipliers', ONES[:2])
    into = partial(scaled, layout=qkv, weight=factor('attention_in'), both=(1.0, factor('key'), 1.0))
    out = factor('attention_out')
    mamba = mixer_tensors('model.layers.{i}.mamba.', 'h.{h}.mixer.ssm.')
    rows = partial(scaled_rows, weight=factor('ssm_in'), parts=hf.get('ssm_multipliers', ONES))
    return LLAMA_TENSORS | FEED_FORWARD | mamba | {
        'h.{h}.mixer.attn.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', into),
        'h.{h}.mixer.attn.c_proj': ('model.layers.{i}.self_attn.o_proj', partial(scaled, both=(out,))),
        'h.{h}.mixer.ssm.in_proj': ('model.layers.{i}.mamba.in_proj', rows),
        'h.{h}.mixer.ssm.c_proj': ('model.layers.{i}.mamba.out_proj',
                                   partial(scaled, both=(factor('ssm_out'),))),
        'h.{f}.ffn.c_fc': ('model.layers.{i}.feed_forward.{gate,up}_proj',
                           partial(scaled, layout=gate_up, both=(gate, 1.0))),
        'h.{f}.ffn.c_proj': ('model.layers.{i}.feed_forward.down_proj', partial(scaled, both=(down,)))}


def read_falcon_h1(hf):
    if hf['mamba_rms_norm'] and hf['mamba_norm_before_gate']:
        refuse(hf, 'mamba_norm_before_gate', 'be false beside mamba_rms_norm, as in the published models: '
               'here the gate comes before the norm')
    if hf['mamba_proj_bias'] != hf['projectors_bias']:
        refuse(hf, 'projectors_bias', 'equal mamba_proj_bias: one flag stands for both')
    for key, n in (('mlp_multipliers', 2), ('ssm_multipliers', 5)):
        if len(hf.get(key, ONES[:n])) != n:
            refuse(hf, key, f'hold {n} numbers')
    return read_mamba(hf) | read_rope(hf)


def write_falcon_h1(c):
    return write_mamba(c) | write_rope(c) | {
        'mamba_d_ssm': ssm_inner(c), 'mamba_norm_before_gate': False, 'projectors_bias': bool(c.ssm_bias)}


FAMILIES['falcon_h1'] = Family(
    architecture='FalconH1ForCausalLM',
    flags=LLAMA_FLAGS | {'layer_pattern': 'h', 'ssm': 'mamba2'},
    keys=without(LLAMA_KEYS, 'head_dim') | BIAS_KEYS | MAMBA_KEYS | {
        'mamba_rms_norm': 'ssm_gate_norm',
        'embedding_multiplier': LLAMAS['granite'].keys['embedding_multiplier'],
        'lm_head_multiplier': Key(('logit_scale',), lambda value, hf: float(value), lambda c: c.logit_scale)},
    defaults=MAMBA_DEFAULTS | {
        'rms_norm_eps': 1e-5, 'mamba_d_ssm': 1024, 'mamba_norm_before_gate': True, 'mamba_rms_norm': False,
        'projectors_bias': False, 'lm_head_multiplier': 1.0, 'embedding_multiplier': 1.0},
    only={'hidden_act': 'silu'},
    tensors=falcon_h1_tensors,
    mixers='h', read=read_falcon_h1, write=write_falcon_h1)

# ----------------------------------------------------------------------------------------------------------
# Granite 4: Granite's multipliers; experts beside a shared one, or that alone


def read_granite_hybrid(hf):
    letters = mixer_letters(hf, lambda i: 'm', LINEAR)
    rope = hf.get('position_embedding_type') == 'rope' and 'a' in letters
    flags = read_mamba(hf) | {'layer_pattern': shortest_pattern(letters)} | (
        {'pos': 'rope'} | read_rope(hf) if rope else {'pos': 'none'})
    if not hf['num_local_experts']:
        return flags | {'ffn_width': hf['shared_intermediate_size'], 'n_expert': None}
    return flags | {'ffn_pattern': 'e', 'n_shared': 1, 'shared_width': hf['shared_intermediate_size'],
                    'expert_width': hf['intermediate_size']}


def write_granite_hybrid(c):
    experts = 'e' in c.ffns()
    names = {'m': 'linear_attention', 'a': 'full_attention'}
    return write_mamba(c) | write_rope(c) | {
        'layer_types': [names.get(mixer, 'full_attention') for mixer, _ in c.plan()],
        'position_embedding_type': 'rope' if c.pos == 'rope' else None,
        'num_local_experts': c.n_expert if experts else 0,
        'intermediate_size': c.expert_width if experts else c.ffn_width,
        'shared_intermediate_size': c.shared_width if experts else c.ffn_width}


MOE = 'model.layers.{i}.block_sparse_moe.'
GRANITE_EXPERTS = {
    'h.{e}.ffn.router': MOE + 'router.layer',
    'h.{e}.ffn.c_fc.weight': MOE + 'input_linear.weight',
    'h.{e}.ffn.c_proj.weight': MOE + 'output_linear.weight'}


def granite_as_stored(rules, files, c):
    """In memory, transformers names experts as in other families."""
    if not stored(files, '.block_sparse_moe.experts.gate_up_proj'):
        return rules
    return rules | {'h.{e}.ffn.router': MOE + 'router',
                    'h.{e}.ffn.c_fc.weight': MOE + 'experts.gate_up_proj',
                    'h.{e}.ffn.c_proj.weight': MOE + 'experts.down_proj'}


FAMILIES['granitemoehybrid'] = Family(
    architecture='GraniteMoeHybridForCausalLM',
    flags=without(LLAMA_FLAGS, 'pos') | {'ssm': 'mamba2', 'ffn_bias': False},
    keys=without(LLAMAS['granite'].keys, 'head_dim', 'intermediate_size', 'mlp_bias') | MAMBA_KEYS | {
        'num_local_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used'},
    defaults=LLAMAS['granite'].defaults | MAMBA_DEFAULTS | {
        'num_local_experts': 8, 'num_experts_per_tok': 2, 'shared_intermediate_size': 1024},
    only={'hidden_act': 'silu'},
    tensors=LLAMA_TENSORS | mixer_tensors('model.layers.{i}.mamba.') | GRANITE_EXPERTS | {
        'h.{e}.ffn.shared.c_fc': 'model.layers.{i}.shared_mlp.input_linear',
        'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.shared_mlp.output_linear',
        'h.{f}.ffn.c_fc': 'model.layers.{i}.shared_mlp.input_linear',
        'h.{f}.ffn.c_proj': 'model.layers.{i}.shared_mlp.output_linear'},
    as_stored=granite_as_stored,
    mixers='am', read=read_granite_hybrid, write=write_granite_hybrid)
