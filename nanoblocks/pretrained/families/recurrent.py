"""
Models of which most layers are recurrences: Lara mini, Qwen3-Next and 3.5, OLMo Hybrid, MiniMax, xLSTM.
Those of Kimi's kind are in kimi.py.
"""
import math
from functools import partial

from nanoblocks.pretrained.families.experts import EXPERT_KEYS, MIXTRAL_TENSORS
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    LLAMA_FLAGS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
    WINDOW_KEYS,
)
from nanoblocks.pretrained.families.qwen import QWEN_MOE_KEYS, QWEN_MOE_TENSORS, read_expert_layers
from nanoblocks.pretrained.keys import (
    RECURRENT,
    expert_layers,
    mixer_letters,
    refuse,
    renamed,
    shortest_pattern,
    width_of_head,
    without,
    write_layer_types,
)
from nanoblocks.pretrained.layouts import (
    below_each_other,
    beta_by_key_head,
    conv,
    decay_by_key_head,
    gate_by_key_head,
    gate_of_qkv,
    gate_up,
    plus_one,
    qkv_by_key_head,
    qkv_gated,
    rnn_conv,
    rnn_conv_in_thirds,
    rnn_qkv,
    rnn_qkv_by_head,
    rnn_rows,
)
from nanoblocks.pretrained.rope import read_rope, rope_parameters, write_rope

FAMILIES = {}

# the pattern and whether attention rotates are read from the layers; the defaults of GPTConfig's recurrence
# are those of a gated DeltaNet
HYBRID_FLAGS = without(LLAMA_FLAGS, 'pos')


def read_hybrid(hf, letters, **rope):
    """Flags of positions and mixers. Only attention rotates; n attends and does not."""
    if 'r' in letters and hf['hidden_act'] not in ('silu', 'swish'):
        refuse(hf, 'hidden_act', 'be silu, the activation of our recurrences')
    if not set(letters) & set('aw'):    # then pos says so, and `n` would mean nothing
        return {'pos': 'none', 'layer_pattern': shortest_pattern(letters.replace('n', 'a'))}
    return read_rope(hf, **rope) | {'pos': 'rope', 'layer_pattern': shortest_pattern(letters)}


def write_hybrid(c):
    return write_rope(c) | write_layer_types(c)


# ----------------------------------------------------------------------------------------------------------
# Gated DeltaNet beside attention and experts

DELTA_KEYS = {
    'linear_num_key_heads': 'rnn_key_heads', 'linear_num_value_heads': 'rnn_heads',
    'linear_key_head_dim': 'rnn_key_dim', 'linear_value_head_dim': 'rnn_value_dim',
    'linear_conv_kernel_dim': 'rnn_conv'}
DELTA_DEFAULTS = {'linear_conv_kernel_dim': 4, 'linear_key_head_dim': 128, 'linear_value_head_dim': 128}
DELTA = 'model.layers.{i}.linear_attn.'


def stored(files, ending):
    """Whether files have a tensor whose name ends so."""
    return any(name.endswith(ending) for name in files.where)


def joined(place):
    """Queries, keys and values in one convolution, as transformers has them in memory."""
    return {'h.{r}.mixer.conv1d': (place + 'conv1d', conv)}


def apart(place):
    """Queries, keys and values in tensors of their own, under this name for the mixer."""
    return {'h.{r}.mixer.c_attn': (place + '{q,k,v}_proj', rnn_qkv),
            'h.{r}.mixer.conv1d': (place + '{q,k,v}_conv1d', rnn_conv)}


DELTA_TENSORS = {
    'h.{r}.mixer.conv1d': (DELTA + 'conv1d', conv),
    'h.{r}.mixer.decay.A_log': DELTA + 'A_log',
    'h.{r}.mixer.decay.dt_bias': DELTA + 'dt_bias',
    'h.{r}.mixer.norm': DELTA + 'norm',
    'h.{r}.mixer.c_proj': DELTA + 'out_proj'}
SHARED_TENSORS = {
    'h.{e}.ffn.shared.c_fc': ('model.layers.{i}.mlp.shared_expert.{gate,up}_proj', gate_up),
    'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.mlp.shared_expert.down_proj',
    'h.{e}.ffn.shared_gate': 'model.layers.{i}.mlp.shared_expert_gate'}

# ----------------------------------------------------------------------------------------------------------
# Lara mini: windows rotate, full attention does not


def read_lara(hf):
    letters = mixer_letters(hf, lambda i: 'rwraw'[i % 5], RECURRENT | {'sliding_attention': 'w'})
    return read_hybrid(hf, letters.replace('a', 'n'))


def lara_as_stored(rules, files, c):
    """In memory, transformers has the names of Qwen 3.5."""
    if not stored(files, 'linear_attn.in_proj_qkv.weight'):
        return rules
    return rules | QWEN35_PROJECTIONS | {'h.{r}.mixer.norm': DELTA + 'norm'}


def write_lara(c):
    # transformers needs a window even where no layer has one
    return write_hybrid(c) | ({} if c.window else {'sliding_window': 512})


FAMILIES['lara_mini'] = Family(
    architecture='LaraMiniForCausalLM',
    flags=HYBRID_FLAGS | {'ffn_pattern': 'e', 'n_shared': 1, 'qk_norm': True},
    keys=without(QWEN_MOE_KEYS, 'intermediate_size') | ATTENTION_BIAS | DELTA_KEYS | {
        'shared_expert_intermediate_size': 'shared_width'},
    aliases={'num_local_experts': 'num_experts'},
    defaults=TIED | DELTA_DEFAULTS | {
        'head_dim': 128, 'linear_num_key_heads': 8, 'linear_num_value_heads': 16, 'num_experts_per_tok': 4,
        'norm_topk_prob': True, 'sliding_window': 512},
    tensors=LLAMA_TENSORS | DELTA_TENSORS | SHARED_TENSORS | {
        'h.{r}.mixer.c_attn': (DELTA + 'in_proj', partial(below_each_other, part=0)),
        'h.{r}.mixer.gate': (DELTA + 'in_proj', partial(below_each_other, part=1)),
        'h.{r}.mixer.erase.beta': (DELTA + 'in_proj', partial(below_each_other, part=2)),
        'h.{r}.mixer.decay.f': (DELTA + 'in_proj', partial(below_each_other, part=3)),
        'h.{r}.mixer.norm': DELTA + 'out_norm',
        'h.{e}.ffn.router': 'model.layers.{i}.mlp.gate',
        'h.{e}.ffn.c_fc.weight': 'model.layers.{i}.mlp.experts.gate_up_proj',
        'h.{e}.ffn.c_proj.weight': 'model.layers.{i}.mlp.experts.down_proj'},
    as_stored=lara_as_stored,
    mixers='arwn', read=read_lara, write=write_lara)

# ----------------------------------------------------------------------------------------------------------
# Qwen3-Next: attention with a gate on its output, norms stored minus one


def read_qwen_hybrid(hf):
    every = hf['full_attention_interval']
    letters = mixer_letters(hf, lambda i: 'r' if (i + 1) % every else 'a', RECURRENT)
    return read_hybrid(hf, letters, partial=True)


def write_qwen_hybrid(c):
    # absent, it would be a quarter
    rope = write_hybrid(c)
    rope['rope_parameters']['partial_rotary_factor'] = c.rope_fraction
    return rope


def read_qwen3_next(hf):
    return read_qwen_hybrid(hf) | read_expert_layers(hf)


def write_qwen3_next(c):
    dense = [i for i in range(c.n_layer) if i not in expert_layers(c)]
    return write_qwen_hybrid(c) | {'decoder_sparse_step': 1, 'mlp_only_layers': dense}


QWEN_HYBRID_FLAGS = HYBRID_FLAGS | {'qk_norm': True, 'attn_gate': 'channel'}
QWEN_HYBRID_KEYS = LLAMA_KEYS | ATTENTION_BIAS | DELTA_KEYS
QWEN_HYBRID_DEFAULTS = DELTA_DEFAULTS | {
    'head_dim': 256, 'linear_num_key_heads': 16, 'linear_num_value_heads': 32, 'partial_rotary_factor': 0.25,
    'full_attention_interval': 4}
QWEN_HYBRID_TENSORS = LLAMA_TENSORS | DELTA_TENSORS | {
    'ln_f': ('model.norm', plus_one),
    'h.{i}.ln_1': ('model.layers.{i}.input_layernorm', plus_one),
    'h.{i}.ln_2': ('model.layers.{i}.post_attention_layernorm', plus_one),
    'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_gated),
    'h.{a}.mixer.gate': ('model.layers.{i}.self_attn.q_proj', gate_of_qkv),
    'h.{a}.mixer.q_norm': ('model.layers.{i}.self_attn.q_norm', plus_one),
    'h.{a}.mixer.k_norm': ('model.layers.{i}.self_attn.k_norm', plus_one)}

FAMILIES['qwen3_next'] = Family(
    architecture='Qwen3NextForCausalLM',
    flags=QWEN_HYBRID_FLAGS | {'n_shared': 1, 'shared_gate': True},
    keys=without(QWEN_MOE_KEYS, 'sliding_window') | QWEN_HYBRID_KEYS | {
        'shared_expert_intermediate_size': 'shared_width'},
    aliases={'num_local_experts': 'num_experts'},
    defaults=QWEN_HYBRID_DEFAULTS | {
        'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': True, 'num_experts_per_tok': 10},
    tensors=QWEN_MOE_TENSORS | QWEN_HYBRID_TENSORS | SHARED_TENSORS | {
        'h.{r}.mixer.c_attn': (DELTA + 'in_proj_qkvz', qkv_by_key_head),
        'h.{r}.mixer.gate': (DELTA + 'in_proj_qkvz', gate_by_key_head),
        'h.{r}.mixer.erase.beta': (DELTA + 'in_proj_ba', beta_by_key_head),
        'h.{r}.mixer.decay.f': (DELTA + 'in_proj_ba', decay_by_key_head)},
    mixers='ar', read=read_qwen3_next, write=write_qwen3_next)

# ----------------------------------------------------------------------------------------------------------
# Qwen 3.5: the same with the projections of its recurrences apart; dense, or experts in every layer

QWEN35_PROJECTIONS = {
    'h.{r}.mixer.c_attn': DELTA + 'in_proj_qkv',
    'h.{r}.mixer.gate': DELTA + 'in_proj_z',
    'h.{r}.mixer.erase.beta': DELTA + 'in_proj_b',
    'h.{r}.mixer.decay.f': DELTA + 'in_proj_a'}
QWEN35_TENSORS = QWEN_HYBRID_TENSORS | QWEN35_PROJECTIONS

FAMILIES['qwen3_5_text'] = Family(
    architecture='Qwen3_5ForCausalLM',
    flags=QWEN_HYBRID_FLAGS,
    keys=QWEN_HYBRID_KEYS,
    defaults=QWEN_HYBRID_DEFAULTS,
    tensors=QWEN35_TENSORS,
    mixers='ar', read=read_qwen_hybrid, write=write_qwen_hybrid)

FAMILIES['qwen3_5_moe_text'] = Family(
    architecture='Qwen3_5MoeForCausalLM',
    flags=QWEN_HYBRID_FLAGS | {'n_shared': 1, 'shared_gate': True, 'ffn_pattern': 'e', 'router_norm': True},
    keys=without(QWEN_MOE_KEYS, 'sliding_window', 'norm_topk_prob', 'intermediate_size')
    | without(QWEN_HYBRID_KEYS, 'intermediate_size') | {'shared_expert_intermediate_size': 'shared_width'},
    aliases={'num_local_experts': 'num_experts'},
    defaults=QWEN_HYBRID_DEFAULTS | {'num_experts_per_tok': 8},
    tensors=QWEN_MOE_TENSORS | QWEN35_TENSORS | SHARED_TENSORS,
    mixers='ar', read=read_qwen_hybrid, write=write_qwen_hybrid)

# ----------------------------------------------------------------------------------------------------------
# OLMo Hybrid: norms before a recurrence and after attention, which may have no positions


def read_olmo_hybrid(hf):
    n = hf['num_hidden_layers']
    # some layer attends in every model
    letters = mixer_letters(hf, lambda i: 'a' if i % 4 == 3 or i == n - 1 < 3 else 'r', RECURRENT)
    if rope_parameters(hf).get('rope_theta', hf.get('rope_theta')) is None:
        letters = letters.replace('a', 'n')
    heads = hf.get('linear_num_key_heads') or hf['num_attention_heads']
    keys = hf.get('linear_key_head_dim') or int(0.75 * hf['hidden_size'] / heads)
    values = hf.get('linear_value_head_dim') or 2 * keys
    return read_hybrid(hf, letters) | {'rnn_key_heads': heads, 'rnn_key_dim': keys, 'rnn_value_dim': values}


def write_olmo_hybrid(c):
    none = {} if c.pos == 'rope' else {'rope_parameters': {'rope_type': 'default', 'rope_theta': None}}
    return write_hybrid(c) | none


def olmo_hybrid_as_stored(rules, files, c):
    """transformers writes norms after attention as if before a feed-forward, and convolutions in thirds."""
    if stored(files, 'linear_attn.conv1d.weight'):
        return rules | joined(DELTA) | {'h.{i}.ln_1': 'model.layers.{i}.input_layernorm',
                                        'h.{i}.ln_2': 'model.layers.{i}.post_attention_layernorm'}
    if not stored(files, '.post_attention_layernorm.weight'):
        rules = rules | {'h.{i}.ln_1_out': 'model.layers.{i}.feedforward_layer_norm'}
    convolution = next((name for name in files.where if name.endswith('.q_conv1d.weight')), None)
    if convolution and len(files.get(convolution)) != rnn_rows(c)[0]:
        rules = rules | {'h.{r}.mixer.conv1d': (DELTA + '{q,k,v}_conv1d', rnn_conv_in_thirds)}
    return rules


FAMILIES['olmo_hybrid'] = Family(
    architecture='OlmoHybridForCausalLM',
    flags=HYBRID_FLAGS | {'norm_at': 'output', 'rnn_norm_at': 'pre', 'qk_norm': 'full', 'rnn_eps': 1e-5},
    keys=without(LLAMA_KEYS, 'head_dim') | ATTENTION_BIAS | DELTA_KEYS | {
        'linear_allow_neg_eigval': renamed('rnn_beta', {True: 2.0, False: 1.0})},
    defaults={'linear_conv_kernel_dim': 4, 'linear_allow_neg_eigval': True},
    tensors=LLAMA_TENSORS | DELTA_TENSORS | apart(DELTA) | {
        'h.{i}.ln_1': 'model.layers.{i}.attention_layer_norm',
        'h.{i}.ln_2': 'model.layers.{i}.feedforward_layer_norm',
        'h.{i}.ln_1_out': 'model.layers.{i}.post_attention_layernorm',
        'h.{i}.ln_2_out': 'model.layers.{i}.post_feedforward_layernorm',
        'h.{r}.mixer.gate': DELTA + 'g_proj',
        'h.{r}.mixer.erase.beta': DELTA + 'b_proj',
        'h.{r}.mixer.decay.f': DELTA + 'a_proj',
        'h.{r}.mixer.norm': DELTA + 'o_norm',
        'h.{r}.mixer.c_proj': DELTA + 'o_proj'},
    as_stored=olmo_hybrid_as_stored,
    mixers='ar', read=read_olmo_hybrid, write=write_olmo_hybrid)

# ----------------------------------------------------------------------------------------------------------
# MiniMax: Lightning attention in every other layer, experts, factors on a branch and on what it is added to

FACTORS = {'normed_attn': 'full_attn', 'normed_rnn': 'linear_attn', 'normed_ffn': 'mlp'}
PLACES = ('alpha', 'beta')


def read_minimax(hf):
    letters = mixer_letters(hf, lambda i: 'r' if i % 2 else 'a', RECURRENT)
    factors = {flag: tuple(float(hf[f'{key}_{place}_factor']) for place in PLACES)
               for flag, key in FACTORS.items()}
    width = dict.fromkeys(('rnn_key_dim', 'rnn_value_dim'), width_of_head(hf))
    letters = letters.replace('a', 'w') if hf.get('sliding_window') is not None else letters
    return read_hybrid(hf, letters) | factors | width | {
        'rnn_heads': hf['num_attention_heads'], 'rnn_key_heads': hf['num_attention_heads']}


def write_minimax(c):
    return write_hybrid(c) | {f'{key}_{place}_factor': getattr(c, flag)[i]
                              for flag, key in FACTORS.items() for i, place in enumerate(PLACES)} | {
        'layer_types': ['linear_attention' if mixer == 'r' else 'full_attention' for mixer, _ in c.plan()]}


FAMILIES['minimax'] = Family(
    architecture='MiniMaxForCausalLM',
    flags=HYBRID_FLAGS | {
        'ffn_pattern': 'e', 'residual': 'normed', 'rnn_decay': 'lightning', 'rnn_erase': 'none',
        'rnn_conv': 0, 'rnn_unit': False, 'rnn_scale': 1.0, 'rnn_gate': 'sigmoid', 'rnn_norm': 'all',
        'rnn_eps': 1e-6},
    keys=WINDOW_KEYS | EXPERT_KEYS,
    aliases={'num_experts': 'num_local_experts'},
    defaults={'rope_theta': 1e6, 'rms_norm_eps': 1e-5, 'num_experts_per_tok': 2} | {
        f'{key}_{place}_factor': 1 for key in FACTORS.values() for place in PLACES},
    tensors=MIXTRAL_TENSORS | {
        'h.{r}.mixer.c_attn': ('model.layers.{i}.self_attn.qkv_proj', rnn_qkv_by_head),
        'h.{r}.mixer.gate': 'model.layers.{i}.self_attn.output_gate',
        'h.{r}.mixer.norm': 'model.layers.{i}.self_attn.norm',
        'h.{r}.mixer.c_proj': 'model.layers.{i}.self_attn.out_proj'},
    mixers='arw', read=read_minimax, write=write_minimax)

# ----------------------------------------------------------------------------------------------------------
# xLSTM: mLSTM in every layer


def read_xlstm(hf):
    heads, width = hf['num_heads'], hf['hidden_size']

    def of_a_head(factor):
        n, odd = divmod(int(width * hf[factor]), heads)
        if odd:
            refuse(hf, factor, f'make hidden_size={width} a multiple of num_heads={heads}')
        return n
    multiple = hf['ffn_round_up_to_multiple_of']
    return {'rnn_key_heads': heads, 'rnn_key_dim': of_a_head('qk_dim_factor'),
            'rnn_value_dim': of_a_head('v_dim_factor'),
            'ffn_width': math.ceil(width * hf['ffn_proj_factor'] / multiple) * multiple}


def write_xlstm(c):
    return {'qk_dim_factor': c.rnn_heads * c.rnn_key_dim / c.n_embd,
            'v_dim_factor': c.rnn_heads * c.rnn_value_dim / c.n_embd,
            'ffn_proj_factor': c.ffn_width / c.n_embd, 'ffn_round_up_to_multiple_of': c.ffn_width}


XLSTM = 'backbone.blocks.{i}.mlstm_layer.'
FAMILIES['xlstm'] = Family(
    architecture='xLSTMForCausalLM',
    flags={'layer_pattern': 'r', 'pos': 'none', 'norm': 'rmsnorm', 'bias': False, 'ffn': 'swiglu',
           'rnn_decay': 'sigmoid', 'rnn_erase': 'none', 'rnn_feature': 'none', 'rnn_unit': False,
           'rnn_conv': 0, 'rnn_input': 'exp', 'rnn_gate': 'sigmoid', 'rnn_norm': 'layer'},
    keys={'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
          'num_heads': 'rnn_heads', 'norm_eps': 'norm_eps', 'tie_word_embeddings': 'tie',
          'gate_soft_cap': 'rnn_gate_cap', 'output_logit_soft_cap': 'logit_softcap'},
    aliases={'embedding_dim': 'hidden_size', 'num_blocks': 'num_hidden_layers'},
    defaults={'norm_eps': 1e-6, 'num_heads': 8, 'qk_dim_factor': 0.5, 'v_dim_factor': 1.0,
              'ffn_proj_factor': 2.667, 'ffn_round_up_to_multiple_of': 64, 'gate_soft_cap': 15.0,
              'output_logit_soft_cap': 30.0},
    only={'use_bias': False, 'add_out_norm': True, 'eps': 1e-6, 'weight_mode': 'single'},
    tensors={
        'wte': 'backbone.embeddings', 'ln_f': 'backbone.out_norm', 'lm_head': 'lm_head',
        'h.{i}.ln_1': 'backbone.blocks.{i}.norm_mlstm',
        'h.{i}.ln_2': 'backbone.blocks.{i}.norm_ffn',
        'h.{r}.mixer.c_attn': (XLSTM + '{q,k,v}', rnn_qkv),
        'h.{r}.mixer.decay.f': XLSTM + 'fgate_preact',
        'h.{r}.mixer.input': XLSTM + 'igate_preact',
        'h.{r}.mixer.gate': XLSTM + 'ogate_preact',
        'h.{r}.mixer.norm': XLSTM + 'multihead_norm',
        'h.{r}.mixer.c_proj': XLSTM + 'out_proj',
        'h.{f}.ffn.c_fc': ('backbone.blocks.{i}.ffn.{proj_up_gate,proj_up}', gate_up),
        'h.{f}.ffn.c_proj': 'backbone.blocks.{i}.ffn.proj_down'},
    mixers='r', read=read_xlstm, write=write_xlstm)
