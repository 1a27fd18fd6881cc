"""Models of which most layers are recurrences: Lara mini, Qwen3-Next and 3.5."""
from functools import partial

from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_FLAGS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.families.qwen import QWEN_MOE_KEYS, QWEN_MOE_TENSORS, read_expert_layers
from nanoblocks.pretrained.keys import (
    RECURRENT,
    expert_layers,
    mixer_letters,
    refuse,
    shortest_pattern,
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
)
from nanoblocks.pretrained.rope import read_rope, write_rope

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
DELTA_TENSORS = {
    'h.{r}.mixer.conv1d.weight': (DELTA + 'conv1d.weight', conv),
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
    letters = mixer_letters(hf, lambda i: 'rwraw'[i % 5], RECURRENT)
    return read_hybrid(hf, letters.replace('a', 'n'))


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
    mixers='arwn', read=read_lara, write=write_lara)

# ----------------------------------------------------------------------------------------------------------
# Qwen3-Next: attention with a gate on its output, norms stored minus one


def read_qwen_hybrid(hf):
    every = hf['full_attention_interval']
    letters = mixer_letters(hf, lambda i: 'r' if (i + 1) % every else 'a', RECURRENT)
    if 'w' in letters:
        refuse(hf, 'layer_types', 'be linear_attention or full_attention')
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

QWEN35_TENSORS = QWEN_HYBRID_TENSORS | {
    'h.{r}.mixer.c_attn': DELTA + 'in_proj_qkv',
    'h.{r}.mixer.gate': DELTA + 'in_proj_z',
    'h.{r}.mixer.erase.beta': DELTA + 'in_proj_b',
    'h.{r}.mixer.decay.f': DELTA + 'in_proj_a'}

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
