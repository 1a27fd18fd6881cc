"""
Dense models that change a detail of Llama, later than those in llama.py: Seed-OSS, Arcee, Ministral, CWM,
Hunyuan; and with LayerNorm StableLM and Nemotron.
"""
from nanoblocks.pretrained.families.family import LAYERNORM, Family
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    BIAS_KEYS,
    LLAMA_FLAGS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
    WINDOW_KEYS,
)
from nanoblocks.pretrained.families.mixtures import NORMS_AFTER, read_alpha
from nanoblocks.pretrained.keys import mixer_letters, renamed, shortest_pattern, without
from nanoblocks.pretrained.layouts import plus_one, rows
from nanoblocks.pretrained.rope import (
    read_partial,
    read_rope,
    rope_parameters,
    write_partial,
    write_rope,
    write_rope_and_windows,
)

FAMILIES = {}
REFUSED = {'ministral3': 'its queries grow with their position in layers that rotate',
           'apertus': 'its activation, xIELU, is none that --ffn knows'}

# three keys for biases
FAMILIES['seed_oss'] = Family(
    architecture='SeedOssForCausalLM',
    flags=LLAMA_FLAGS,
    keys=LLAMA_KEYS | {
        'attention_bias': 'qkv_bias', 'attention_out_bias': 'proj_bias', 'mlp_bias': 'ffn_bias'},
    defaults={'attention_bias': True, 'attention_out_bias': False, 'head_dim': 128},
    tensors=LLAMA_TENSORS,
    read=read_rope, write=write_rope)

# no gate in the feed-forward
RELU2 = renamed('ffn', {'relu2': 'relu2'})
UNGATED_TENSORS = LLAMA_TENSORS | {'h.{f}.ffn.c_fc': 'model.layers.{i}.mlp.up_proj'}

FAMILIES['arcee'] = Family(
    architecture='ArceeForCausalLM',
    flags=LLAMA_FLAGS,
    keys=LLAMA_KEYS | BIAS_KEYS | {'hidden_act': RELU2},
    defaults={'rms_norm_eps': 1e-5, 'hidden_act': 'relu2'},
    tensors=UNGATED_TENSORS,
    read=read_rope, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# Ministral and CWM: windows in some layers


def read_ministral(hf):
    letters = mixer_letters(hf, lambda i: 'a' if hf.get('sliding_window') is None else 'w')
    return read_rope(hf) | {'layer_pattern': shortest_pattern(letters)}


FAMILIES['ministral'] = Family(
    architecture='MinistralForCausalLM',
    flags=LLAMA_FLAGS,
    keys=WINDOW_KEYS,
    defaults={'sliding_window': 4096},
    tensors=LLAMA_TENSORS,
    mixers='aw', read=read_ministral, write=write_rope_and_windows)

# what a file without rope_parameters means
CWM_ROPE = {'rope_type': 'llama3', 'rope_theta': 1e6, 'factor': 16.0, 'low_freq_factor': 1.0,
            'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}


def read_cwm(hf):
    letters = mixer_letters(hf, lambda i: 'w' if i % 4 else 'a')
    return read_rope(hf, rope_parameters(hf) or CWM_ROPE) | {'layer_pattern': shortest_pattern(letters)}


def write_cwm(c):
    # transformers needs a number, which the tokenizer's replaces
    return write_rope_and_windows(c) | {'bos_token_id': 128000}


FAMILIES['cwm'] = Family(
    architecture='CwmForCausalLM',
    flags=LLAMA_FLAGS,
    keys=WINDOW_KEYS | {'mlp_bias': 'ffn_bias'},
    defaults={'rms_norm_eps': 1e-5, 'rope_theta': 1e6, 'sliding_window': 8192, 'head_dim': 128},
    tensors=LLAMA_TENSORS,
    mixers='aw', read=read_cwm, write=write_cwm)


# ----------------------------------------------------------------------------------------------------------
# Hunyuan: queries and keys are normed after they rotate

FAMILIES['hunyuan_v1_dense'] = Family(
    architecture='HunYuanDenseV1ForCausalLM',
    flags=LLAMA_FLAGS | {'qk_norm': 'after'},
    keys=LLAMA_KEYS | ATTENTION_BIAS,
    defaults={'rms_norm_eps': 1e-5},
    tensors=LLAMA_TENSORS | NORMS_AFTER,
    read=read_alpha, write=write_rope)


# ----------------------------------------------------------------------------------------------------------
# StableLM: a quarter of each head rotates; the larger ones have both branches behind one norm and norm each
# head of queries and keys with weights of its own, a tensor a head


def stablelm_tensors(c, hf):
    def norms(letter, n):
        heads = f'{{{",".join(map(str, range(n)))}}}' if n > 1 else '0'
        return f'model.layers.{{i}}.self_attn.{letter}_layernorm.norms.{heads}', rows
    return LLAMA_TENSORS | {
        'h.{a}.mixer.q_norm': norms('q', c.n_head), 'h.{a}.mixer.k_norm': norms('k', c.n_kv_head)}


FAMILIES['stablelm'] = Family(
    architecture='StableLmForCausalLM',
    flags=LAYERNORM | {'pos': 'rope', 'bias': False},
    keys=without(LLAMA_KEYS, 'rms_norm_eps', 'head_dim') | {
        'layer_norm_eps': 'norm_eps', 'use_qkv_bias': 'qkv_bias',
        'qk_layernorm': renamed('qk_norm', {False: False, True: 'heads'}),
        'use_parallel_residual': renamed('residual', {False: 'serial', True: 'shared'})},
    defaults={'use_qkv_bias': False, 'qk_layernorm': False, 'use_parallel_residual': False,
              'partial_rotary_factor': 0.25},
    tensors=stablelm_tensors,
    read=read_partial, write=write_partial)


# ----------------------------------------------------------------------------------------------------------
# Nemotron: LayerNorm whose weights are stored minus one, no gate, half of each head rotates

FAMILIES['nemotron'] = Family(
    architecture='NemotronForCausalLM',
    flags=LAYERNORM | {'pos': 'rope', 'bias': False},
    keys=without(LLAMA_KEYS, 'rms_norm_eps') | BIAS_KEYS | {'norm_eps': 'norm_eps', 'hidden_act': RELU2},
    defaults={'norm_eps': 1e-5, 'hidden_act': 'relu2', 'partial_rotary_factor': 0.5},
    tensors=UNGATED_TENSORS | {
        'ln_f.weight': ('model.norm.weight', plus_one),
        'h.{i}.ln_1.weight': ('model.layers.{i}.input_layernorm.weight', plus_one),
        'h.{i}.ln_2.weight': ('model.layers.{i}.post_attention_layernorm.weight', plus_one)},
    read=read_partial, write=write_partial)
