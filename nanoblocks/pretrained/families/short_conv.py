"""LFM2: gated short convolutions in most layers, attention in the others; dense or with experts."""
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import LLAMA_FLAGS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.keys import (
    ROUTER_NORM,
    expert_layers,
    mixer_letters,
    pattern_of,
    shortest_pattern,
    without,
)
from nanoblocks.pretrained.layouts import by_expert, conv, gate_up, gate_up_by_expert, qkv
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

LETTERS = {'conv': 's', 'full_attention': 'a', 'attention': 'a'}
TYPES = {'s': 'conv', 'a': 'full_attention', 'n': 'full_attention'}


def read_layers(hf, otherwise):
    """Flags of mixers and positions: without attention there are none."""
    letters = mixer_letters(hf, otherwise, LETTERS)
    rope = {'pos': 'rope'} | read_rope(hf) if 'a' in letters else {'pos': 'none'}
    return rope | {'layer_pattern': shortest_pattern(letters)}


def write_layers(c):
    return write_rope(c) | {'layer_types': [TYPES[mixer] for mixer, _ in c.plan()]}


FLAGS = without(LLAMA_FLAGS, 'pos') | {'ffn': 'swiglu', 'qk_norm': True}
KEYS = without(LLAMA_KEYS, 'rms_norm_eps', 'hidden_act', 'head_dim') | {
    'norm_eps': 'norm_eps', 'conv_L_cache': 'short_conv', 'conv_bias': 'short_bias'}
ALIASES = {'tie_embedding': 'tie_word_embeddings', 'block_ff_dim': 'intermediate_size'}
DEFAULTS = TIED | {'norm_eps': 1e-5, 'conv_L_cache': 3, 'conv_bias': False, 'rope_theta': 1e6}
FFN = 'model.layers.{i}.feed_forward.'
TENSORS = LLAMA_TENSORS | {
    'ln_f': 'model.embedding_norm',
    'h.{i}.ln_1': 'model.layers.{i}.operator_norm',
    'h.{i}.ln_2': 'model.layers.{i}.ffn_norm',
    'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv),
    'h.{a}.mixer.c_proj': 'model.layers.{i}.self_attn.out_proj',
    'h.{a}.mixer.q_norm': 'model.layers.{i}.self_attn.q_layernorm',
    'h.{a}.mixer.k_norm': 'model.layers.{i}.self_attn.k_layernorm',
    'h.{c}.mixer.in_proj': 'model.layers.{i}.conv.in_proj',
    'h.{c}.mixer.conv1d.weight': ('model.layers.{i}.conv.conv.weight', conv),
    'h.{c}.mixer.conv1d.bias': 'model.layers.{i}.conv.conv.bias',
    'h.{c}.mixer.c_proj': 'model.layers.{i}.conv.out_proj',
    'h.{f}.ffn.c_fc': (FFN + '{w1,w3}', gate_up),
    'h.{f}.ffn.c_proj': FFN + 'w2'}

# ----------------------------------------------------------------------------------------------------------
# Dense: the width of feed-forwards is worked out from the one in config.json


def read_lfm2(hf):
    width = hf['intermediate_size']
    if hf['block_auto_adjust_ff_dim']:
        multiple = hf['block_multiple_of']
        width = int(hf['block_ffn_dim_multiplier'] * int(2 * width / 3))
        width = -(-width // multiple) * multiple
    attends = hf.get('full_attn_idxs')
    return read_layers(hf, lambda i: 'a' if attends is None or i in attends else 's') | {'ffn_width': width}


def write_lfm2(c):
    return write_layers(c) | {'intermediate_size': c.ffn_width, 'block_auto_adjust_ff_dim': False}


FAMILIES['lfm2'] = Family(
    architecture='Lfm2ForCausalLM',
    flags=FLAGS,
    keys=without(KEYS, 'intermediate_size'),
    aliases=ALIASES,
    defaults=DEFAULTS | {'block_auto_adjust_ff_dim': True, 'block_ffn_dim_multiplier': 1.0,
                         'block_multiple_of': 256},
    tensors=TENSORS,
    mixers='as', read=read_lfm2, write=write_lfm2)

# ----------------------------------------------------------------------------------------------------------
# Experts in the layers after the first


def read_lfm2_moe(hf):
    first = hf['num_dense_layers']
    biased = {'balance': 'bias'} if hf['use_expert_bias'] else {}
    return read_layers(hf, lambda i: 'a') | biased | {
        'ffn_pattern': pattern_of(hf, lambda i: 'f' if i < first else 'e')}


def write_lfm2_moe(c):
    return write_layers(c) | {'num_dense_layers': min(expert_layers(c), default=c.n_layer),
                              'use_expert_bias': c.balance in ('bias', 'both')}


FAMILIES['lfm2_moe'] = Family(
    architecture='Lfm2MoeForCausalLM',
    flags=FLAGS | {'router': 'sigmoid'},
    keys=KEYS | {
        'num_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
        'moe_intermediate_size': 'expert_width', 'norm_topk_prob': ROUTER_NORM,
        'routed_scaling_factor': 'router_scale'},
    aliases=without(ALIASES, 'block_ff_dim') | {'num_local_experts': 'num_experts'},
    defaults=DEFAULTS | {'num_dense_layers': 2, 'num_experts_per_tok': 4, 'norm_topk_prob': True,
                         'routed_scaling_factor': 1.0, 'use_expert_bias': True},
    tensors=TENSORS | {
        'h.{e}.ffn.router': FFN + 'gate',
        'h.{e}.ffn.choice_bias': FFN + 'expert_bias',
        'h.{e}.ffn.c_fc': (FFN + 'experts.{n}.{w1,w3}', gate_up_by_expert),
        'h.{e}.ffn.c_proj': (FFN + 'experts.{n}.w2', by_expert)},
    mixers='as', read=read_lfm2_moe, write=write_lfm2_moe)
