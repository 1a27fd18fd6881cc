"""Models with experts in every layer: Mixtral, gpt-oss."""
from nanoblocks.pretrained.families.family import Family
from nanoblocks.pretrained.families.gemma import read_alternating
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    LLAMA_FLAGS,
    LLAMA_TENSORS,
    WINDOW_KEYS,
    read_mistral,
)
from nanoblocks.pretrained.keys import without
from nanoblocks.pretrained.layouts import (
    by_expert,
    experts_transposed,
    gate_up_by_expert,
    gate_up_interleaved,
)
from nanoblocks.pretrained.rope import write_rope, write_rope_and_windows

FAMILIES = {}

# intermediate_size is the width of one expert here
EXPERT_KEYS = {'num_local_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
               'intermediate_size': 'expert_width'}

# ----------------------------------------------------------------------------------------------------------
# Mixtral: a Mistral with experts in every layer

MIXTRAL_TENSORS = LLAMA_TENSORS | {
    'h.{e}.ffn.router': 'model.layers.{i}.block_sparse_moe.gate',
    'h.{e}.ffn.c_fc': ('model.layers.{i}.block_sparse_moe.experts.{n}.{w1,w3}', gate_up_by_expert),
    'h.{e}.ffn.c_proj': ('model.layers.{i}.block_sparse_moe.experts.{n}.w2', by_expert)}

FAMILIES['mixtral'] = Family(
    architecture='MixtralForCausalLM',
    flags=LLAMA_FLAGS | {'ffn_pattern': 'e'},
    keys=WINDOW_KEYS | EXPERT_KEYS,
    aliases={'num_experts': 'num_local_experts'},
    defaults={'rope_theta': 1e6, 'rms_norm_eps': 1e-5, 'num_experts_per_tok': 2},
    tensors=MIXTRAL_TENSORS,
    mixers='aw', read=read_mistral, write=write_rope)

# ----------------------------------------------------------------------------------------------------------
# gpt-oss: windows in every other layer, sinks, biased experts with a clipped gate

FAMILIES['gpt_oss'] = Family(
    architecture='GptOssForCausalLM',
    flags=LLAMA_FLAGS | {
        'ffn': 'swiglu_clip', 'ffn_pattern': 'e', 'ffn_bias': True, 'router_bias': True, 'sinks': True},
    keys=without(WINDOW_KEYS, 'hidden_act') | EXPERT_KEYS | ATTENTION_BIAS | {
        'swiglu_limit': 'ffn_limit', 'swiglu_alpha': 'ffn_alpha'},
    aliases={'experts_per_token': 'num_experts_per_tok', 'num_experts': 'num_local_experts'},
    defaults={'rope_theta': 150000.0, 'rms_norm_eps': 1e-5, 'head_dim': 64, 'attention_bias': True,
              'swiglu_limit': 7.0, 'swiglu_alpha': 1.702, 'num_experts_per_tok': 4, 'sliding_window': 128,
              'rope_parameters': {'rope_type': 'yarn', 'factor': 32.0, 'truncate': False,
                                  'original_max_position_embeddings': 4096}},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.scores.sinks': 'model.layers.{i}.self_attn.sinks',
        'h.{e}.ffn.router': 'model.layers.{i}.mlp.router',
        'h.{e}.ffn.c_fc.weight': ('model.layers.{i}.mlp.experts.gate_up_proj', gate_up_interleaved),
        'h.{e}.ffn.c_fc.bias': ('model.layers.{i}.mlp.experts.gate_up_proj_bias', gate_up_interleaved),
        'h.{e}.ffn.c_proj.weight': ('model.layers.{i}.mlp.experts.down_proj', experts_transposed),
        'h.{e}.ffn.c_proj.bias': 'model.layers.{i}.mlp.experts.down_proj_bias'},
    mixers='aw', read=read_alternating, write=write_rope_and_windows)
