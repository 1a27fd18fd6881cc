"""Models whose rotary pairs are neighbours, with RMS norms: GLM 4 of two kinds, ERNIE 4.5, Helium."""
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import LLAMA_FLAGS, LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.layouts import qkv_interleaved
from nanoblocks.pretrained.rope import read_partial, read_rope, write_partial, write_rope

FAMILIES = {}
TENSORS = LLAMA_TENSORS | {
    'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_interleaved)}


# ----------------------------------------------------------------------------------------------------------
# GLM: half of each head rotates, and gate and up projection are one tensor

GLM = dict(
    keys=LLAMA_KEYS | {'attention_bias': 'qkv_bias'},
    defaults={'rms_norm_eps': 1.5625e-7, 'attention_bias': True, 'head_dim': 128,
              'partial_rotary_factor': 0.5},
    read=read_partial, write=write_partial)
GLM_TENSORS = TENSORS | {'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.gate_up_proj'}

FAMILIES['glm'] = Family(
    architecture='GlmForCausalLM', flags=LLAMA_FLAGS, tensors=GLM_TENSORS, **GLM)

# norms on what the branches return too
FAMILIES['glm4'] = Family(
    architecture='Glm4ForCausalLM',
    flags=LLAMA_FLAGS | {'norm_at': 'sandwich'},
    tensors=GLM_TENSORS | {
        'h.{i}.ln_1_out': 'model.layers.{i}.post_self_attn_layernorm',
        'h.{i}.ln_2_out': 'model.layers.{i}.post_mlp_layernorm'}, **GLM)


# ----------------------------------------------------------------------------------------------------------
# ERNIE 4.5 and Helium, a Llama but for their rotary pairs

FAMILIES['ernie4_5'] = Family(
    architecture='Ernie4_5ForCausalLM',
    flags=LLAMA_FLAGS,
    keys=LLAMA_KEYS | {'use_bias': ('qkv_bias', 'proj_bias', 'ffn_bias')},
    defaults=TIED | {'rope_theta': 5e5, 'rms_norm_eps': 1e-5, 'use_bias': False, 'head_dim': 128},
    tensors=TENSORS,
    read=read_rope, write=write_rope)

FAMILIES['helium'] = Family(
    architecture='HeliumForCausalLM',
    flags=LLAMA_FLAGS,
    keys=LLAMA_KEYS | {'attention_bias': 'qkv_bias', 'mlp_bias': 'ffn_bias'},
    defaults={'rope_theta': 1e5, 'rms_norm_eps': 1e-8, 'head_dim': 128},
    tensors=TENSORS,
    read=read_rope, write=write_rope)
