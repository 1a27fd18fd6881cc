"""
GPT-J and models with its block, both branches from one LayerNorm and a bias of the logits: CodeGen, Phi.
Persimmon, which shares Phi's LayerNorm of queries and keys.
"""
from nanoblocks.pretrained.families.family import ALL_BIASES, LAYERNORM, Family
from nanoblocks.pretrained.families.gpt import GPT2_KEYS, GPT2_TENSORS
from nanoblocks.pretrained.families.llama import LLAMA_KEYS, LLAMA_TENSORS
from nanoblocks.pretrained.keys import UNGATED_FFN, refuse, renamed, without
from nanoblocks.pretrained.layouts import qkv_by_group, qkv_interleaved, qvk_in_quarters
from nanoblocks.pretrained.rope import read_partial, write_partial

FAMILIES = {}

# ----------------------------------------------------------------------------------------------------------
# GPT-J: a part of each head rotates, with interleaved pairs


def read_gptj(hf):
    width, head = hf['rotary_dim'], hf['n_embd'] // hf['n_head']
    if not 0 < width <= head or width % 2:
        refuse(hf, 'rotary_dim', f'be an even number up to {head}, the width of a head')
    return {'rope_fraction': width / head}


def write_gptj(c):
    return {'rotary_dim': round(c.head_dim * c.rope_fraction)}


GPTJ = dict(
    flags=LAYERNORM | {'pos': 'rope', 'rope_theta': 10000.0, 'residual': 'shared', 'bias': False,
                       'qkv_bias': False, 'proj_bias': False, 'ffn_bias': True, 'head_bias': True},
    keys=GPT2_KEYS,
    defaults={'activation_function': 'gelu_new', 'rotary_dim': 64},
    read=read_gptj, write=write_gptj)
GPTJ_TENSORS = GPT2_TENSORS | {
    'h.{i}.mixer.c_proj': 'transformer.h.{i}.attn.out_proj',
    'h.{i}.ffn.c_fc': 'transformer.h.{i}.mlp.fc_in', 'h.{i}.ffn.c_proj': 'transformer.h.{i}.mlp.fc_out'}

FAMILIES['gptj'] = Family(
    architecture='GPTJForCausalLM',
    tensors=GPTJ_TENSORS | {
        'h.{i}.mixer.c_attn': ('transformer.h.{i}.attn.{q,k,v}_proj', qkv_interleaved)},
    **GPTJ)


# ----------------------------------------------------------------------------------------------------------
# CodeGen: a projection in four parts, one for each of the processes that it was trained on


def read_codegen(hf):
    if hf['n_head'] % 4:
        refuse(hf, 'n_head', 'be a multiple of 4, the parts of the projection of a CodeGen')
    return read_gptj(hf)


FAMILIES['codegen'] = Family(
    architecture='CodeGenForCausalLM',
    tensors=GPTJ_TENSORS | {'h.{i}.mixer.c_attn': ('transformer.h.{i}.attn.qkv_proj', qvk_in_quarters)},
    **GPTJ | {'read': read_codegen})


# ----------------------------------------------------------------------------------------------------------
# Phi 1 to 2: biases everywhere

QK_LAYERNORM = renamed('qk_norm', {True: 'layer', False: False})
QK_TENSORS = {'h.{a}.mixer.q_norm': 'model.layers.{i}.self_attn.q_layernorm',
              'h.{a}.mixer.k_norm': 'model.layers.{i}.self_attn.k_layernorm'}

FAMILIES['phi'] = Family(
    architecture='PhiForCausalLM',
    flags=LAYERNORM | ALL_BIASES | {'pos': 'rope', 'residual': 'shared', 'head_bias': True},
    keys=without(LLAMA_KEYS, 'head_dim', 'rms_norm_eps') | {
        'layer_norm_eps': 'norm_eps', 'hidden_act': UNGATED_FFN, 'qk_layernorm': QK_LAYERNORM},
    defaults={'hidden_act': 'gelu_new', 'partial_rotary_factor': 0.5, 'qk_layernorm': False},
    tensors=LLAMA_TENSORS | QK_TENSORS | {
        'ln_f': 'model.final_layernorm', 'h.{a}.mixer.c_proj': 'model.layers.{i}.self_attn.dense',
        'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.fc1', 'h.{f}.ffn.c_proj': 'model.layers.{i}.mlp.fc2'},
    read=read_partial, write=write_partial)


# ----------------------------------------------------------------------------------------------------------
# Persimmon: one branch after the other, a squared ReLU, and a norm of queries and keys

FAMILIES['persimmon'] = Family(
    architecture='PersimmonForCausalLM',
    flags=LAYERNORM | ALL_BIASES | {'pos': 'rope', 'bias': False},
    keys=without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim', 'rms_norm_eps') | {
        'layer_norm_eps': 'norm_eps', 'hidden_act': renamed('ffn', {'relu2': 'relu2'}),
        'qk_layernorm': QK_LAYERNORM},
    defaults={'hidden_act': 'relu2', 'partial_rotary_factor': 0.5, 'qk_layernorm': True},
    tensors=LLAMA_TENSORS | QK_TENSORS | {
        'ln_f': 'model.final_layernorm',
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.query_key_value', qkv_by_group),
        'h.{a}.mixer.c_proj': 'model.layers.{i}.self_attn.dense',
        'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.dense_h_to_4h',
        'h.{f}.ffn.c_proj': 'model.layers.{i}.mlp.dense_4h_to_h'},
    read=read_partial, write=write_partial)
