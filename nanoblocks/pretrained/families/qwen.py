"""Qwen 2 and 3, dense and with experts: windows in some layers, experts in some layers."""
from nanoblocks.pretrained.families.family import Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_FLAGS, LLAMA_TENSORS, WINDOW_KEYS
from nanoblocks.pretrained.keys import (
    ROUTER_NORM,
    expert_layers,
    mixer_letters,
    pattern_of,
    read_window,
    shortest_pattern,
    write_layer_types,
)
from nanoblocks.pretrained.layouts import by_expert, gate_up, gate_up_by_expert
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}

# ----------------------------------------------------------------------------------------------------------
# Dense: windows from layer max_window_layers on

QWEN_DEFAULTS = {'use_sliding_window': False, 'max_window_layers': 28, 'sliding_window': 4096}


def read_qwen(hf):
    use = hf['use_sliding_window'] and hf.get('sliding_window') is not None
    letters = mixer_letters(hf, lambda i: 'w' if use and i >= hf['max_window_layers'] else 'a')
    return read_rope(hf) | {'layer_pattern': shortest_pattern(letters)}


def write_qwen(c):
    return write_rope(c) | write_layer_types(c) | {'use_sliding_window': c.window is not None}


FAMILIES['qwen2'] = Family(
    architecture='Qwen2ForCausalLM',
    flags=LLAMA_FLAGS | {'qkv_bias': True},
    keys=WINDOW_KEYS,
    defaults=QWEN_DEFAULTS,
    tensors=LLAMA_TENSORS,
    mixers='aw', read=read_qwen, write=write_qwen)

FAMILIES['qwen3'] = Family(
    architecture='Qwen3ForCausalLM',
    flags=LLAMA_FLAGS | {'qk_norm': True},
    keys=WINDOW_KEYS | ATTENTION_BIAS,
    defaults=QWEN_DEFAULTS | {'head_dim': 128},
    tensors=LLAMA_TENSORS,
    mixers='aw', read=read_qwen, write=write_qwen)

# ----------------------------------------------------------------------------------------------------------
# With experts in every decoder_sparse_step-th layer, except in mlp_only_layers

QWEN_MOE_KEYS = WINDOW_KEYS | {
    'num_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
    'moe_intermediate_size': 'expert_width', 'norm_topk_prob': ROUTER_NORM}
QWEN_MOE_DEFAULTS = QWEN_DEFAULTS | {'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': False}
QWEN_MOE_TENSORS = LLAMA_TENSORS | {
    'h.{e}.ffn.router': 'model.layers.{i}.mlp.gate',
    'h.{e}.ffn.c_fc': ('model.layers.{i}.mlp.experts.{n}.{gate,up}_proj', gate_up_by_expert),
    'h.{e}.ffn.c_proj': ('model.layers.{i}.mlp.experts.{n}.down_proj', by_expert)}


def read_expert_layers(hf):
    step, dense = hf['decoder_sparse_step'], hf.get('mlp_only_layers', ())
    return {'ffn_pattern': pattern_of(hf, lambda i: 'f' if i in dense or (i + 1) % step else 'e')}


def write_qwen_moe(c):
    dense = [i for i in range(c.n_layer) if i not in expert_layers(c)]
    return write_qwen(c) | {'decoder_sparse_step': 1, 'mlp_only_layers': dense}


def read_qwen2_moe(hf):
    # unlike Qwen 2: windows in every other layer below max_window_layers
    use, first = hf['use_sliding_window'], hf['max_window_layers']
    letters = mixer_letters(hf, lambda i: 'w' if use and i % 2 == 0 and i < first else 'a')
    return read_rope(hf) | read_expert_layers(hf) | {'layer_pattern': shortest_pattern(letters)}


FAMILIES['qwen2_moe'] = Family(
    architecture='Qwen2MoeForCausalLM',
    flags=LLAMA_FLAGS | {'n_shared': 1, 'shared_gate': True},
    keys=QWEN_MOE_KEYS | {'qkv_bias': 'qkv_bias', 'shared_expert_intermediate_size': 'shared_width'},
    aliases={'num_local_experts': 'num_experts'},
    defaults=QWEN_MOE_DEFAULTS | {'qkv_bias': True, 'num_experts_per_tok': 4},
    tensors=QWEN_MOE_TENSORS | {
        'h.{e}.ffn.shared.c_fc': ('model.layers.{i}.mlp.shared_expert.{gate,up}_proj', gate_up),
        'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.mlp.shared_expert.down_proj',
        'h.{e}.ffn.shared_gate': 'model.layers.{i}.mlp.shared_expert_gate'},
    mixers='aw', read=read_qwen2_moe, write=write_qwen_moe)


def read_qwen3_moe(hf):
    window = read_window(hf if hf['use_sliding_window'] else {})
    return read_rope(hf) | read_expert_layers(hf) | window


FAMILIES['qwen3_moe'] = Family(
    architecture='Qwen3MoeForCausalLM',
    flags=LLAMA_FLAGS | {'qk_norm': True},
    keys=QWEN_MOE_KEYS | ATTENTION_BIAS,
    aliases={'num_local_experts': 'num_experts'},
    defaults=QWEN_MOE_DEFAULTS | {'num_experts_per_tok': 8},
    tensors=QWEN_MOE_TENSORS,
    mixers='aw', read=read_qwen3_moe, write=write_qwen_moe)
