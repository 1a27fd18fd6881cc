"""
GPT-2 and its relatives with LayerNorm and a plain feed-forward: GPT-NeoX, Falcon, BLOOM, MPT, GPT-Neo, OPT,
BigCode.
"""
import torch

from nanoblocks.pretrained.families.encdec import positions
from nanoblocks.pretrained.families.family import ALL_BIASES, LAYERNORM, TIED, Family
from nanoblocks.pretrained.families.llama import ATTENTION_BIAS, LLAMA_KEYS
from nanoblocks.pretrained.keys import UNGATED_FFN, Key, refuse, renamed, shortest_pattern, without
from nanoblocks.pretrained.layouts import qkv, qkv_by_group, transposed
from nanoblocks.pretrained.rope import read_partial, read_rope, write_partial, write_rope

FAMILIES = {}

# ----------------------------------------------------------------------------------------------------------
# GPT-2


@torch.no_grad()
def scale_by_layer(model, hf):
    """Where a file divides the scores by the number of their layer, the queries are divided."""
    if hf.get('scale_attn_by_inverse_layer_idx'):
        for layer, block in enumerate(model.h, start=1):
            for p in block.mixer.c_attn.parameters():
                p[:model.config.n_embd] /= layer


GPT2_KEYS = {
    'vocab_size': 'vocab_size', 'n_embd': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head',
    'n_positions': 'block_size', 'n_inner': 'ffn_width', 'layer_norm_epsilon': 'norm_eps',
    'activation_function': UNGATED_FFN, 'tie_word_embeddings': 'tie'}
UNSCALED = {'scale_attn_weights': renamed('attn_scale', {True: None, False: 1.0})}
GPT2_TENSORS = {
    'wte': 'transformer.wte', 'wpe': 'transformer.wpe', 'ln_f': 'transformer.ln_f', 'lm_head': 'lm_head',
    'h.{i}.ln_1': 'transformer.h.{i}.ln_1', 'h.{i}.ln_2': 'transformer.h.{i}.ln_2'}

FAMILIES['gpt2'] = Family(
    architecture='GPT2LMHeadModel',
    flags=LAYERNORM | ALL_BIASES | {'pos': 'learned'},
    keys=GPT2_KEYS | UNSCALED,
    aliases={'n_ctx': 'n_positions'},
    defaults=TIED | {'activation_function': 'gelu_new', 'scale_attn_weights': True},
    only={'add_cross_attention': False},
    tensors=GPT2_TENSORS | {
        'h.{i}.mixer.c_attn': ('transformer.h.{i}.attn.c_attn', transposed),
        'h.{i}.mixer.c_proj': ('transformer.h.{i}.attn.c_proj', transposed),
        'h.{i}.ffn.c_fc': ('transformer.h.{i}.mlp.c_fc', transposed),
        'h.{i}.ffn.c_proj': ('transformer.h.{i}.mlp.c_proj', transposed)},
    finish=scale_by_layer)


# ----------------------------------------------------------------------------------------------------------
# GPT-NeoX: a part of each head rotates, both branches read the stream


def write_neox(c):
    return write_partial(c) | {'rotary_pct': c.rope_fraction}


FAMILIES['gpt_neox'] = Family(
    architecture='GPTNeoXForCausalLM',
    flags=LAYERNORM | {'pos': 'rope', 'bias': False, 'ffn_bias': True},
    keys=without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim', 'rms_norm_eps') | ATTENTION_BIAS | {
        'layer_norm_eps': 'norm_eps', 'hidden_act': UNGATED_FFN,
        'use_parallel_residual': renamed('residual', {True: 'parallel', False: 'serial'})},
    aliases={'rotary_pct': 'partial_rotary_factor', 'rotary_emb_base': 'rope_theta'},
    defaults={'hidden_act': 'gelu', 'use_parallel_residual': True, 'attention_bias': True,
              'partial_rotary_factor': 0.25},
    tensors={
        'wte': 'gpt_neox.embed_in', 'ln_f': 'gpt_neox.final_layer_norm', 'lm_head': 'embed_out',
        'h.{i}.ln_1': 'gpt_neox.layers.{i}.input_layernorm',
        'h.{i}.ln_2': 'gpt_neox.layers.{i}.post_attention_layernorm',
        'h.{i}.mixer.c_attn': ('gpt_neox.layers.{i}.attention.query_key_value', qkv_by_group),
        'h.{i}.mixer.c_proj': 'gpt_neox.layers.{i}.attention.dense',
        'h.{i}.ffn.c_fc': 'gpt_neox.layers.{i}.mlp.dense_h_to_4h',
        'h.{i}.ffn.c_proj': 'gpt_neox.layers.{i}.mlp.dense_4h_to_h'},
    read=read_partial, write=write_neox)


# ----------------------------------------------------------------------------------------------------------
# BLOOM: ALiBi, a norm on the embedding

BLOOM_TENSORS = {
    'wte': 'transformer.word_embeddings', 'ln_f': 'transformer.ln_f', 'lm_head': 'lm_head',
    'ln_e': 'transformer.word_embeddings_layernorm',
    'h.{i}.ln_1': 'transformer.h.{i}.input_layernorm',
    'h.{i}.ln_2': 'transformer.h.{i}.post_attention_layernorm',
    'h.{i}.mixer.c_attn': ('transformer.h.{i}.self_attention.query_key_value', qkv_by_group),
    'h.{i}.mixer.c_proj': 'transformer.h.{i}.self_attention.dense',
    'h.{i}.ffn.c_fc': 'transformer.h.{i}.mlp.dense_h_to_4h',
    'h.{i}.ffn.c_proj': 'transformer.h.{i}.mlp.dense_4h_to_h'}

FAMILIES['bloom'] = Family(
    architecture='BloomForCausalLM',
    flags=LAYERNORM | ALL_BIASES | {'pos': 'alibi', 'embed_norm': True, 'ffn': 'gelu_tanh'},
    keys={'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head',
          'layer_norm_epsilon': 'norm_eps', 'tie_word_embeddings': 'tie',
          'apply_residual_connection_post_layernorm': renamed('residual', {True: 'normed', False: 'serial'})},
    aliases={'n_embed': 'hidden_size', 'num_attention_heads': 'n_head', 'num_hidden_layers': 'n_layer'},
    defaults=TIED | {'apply_residual_connection_post_layernorm': False},
    only={'slow_but_exact': False},
    tensors=BLOOM_TENSORS)


# ----------------------------------------------------------------------------------------------------------
# Falcon: rotary positions or ALiBi, one key head, both branches from one norm or from two


def falcon_tensors(c, hf):
    two = c.residual == 'parallel'
    return BLOOM_TENSORS | ({'h.{i}.ln_1': 'transformer.h.{i}.ln_attn',
                             'h.{i}.ln_2': 'transformer.h.{i}.ln_mlp'} if two else {})


def read_falcon(hf):
    if hf['new_decoder_architecture']:
        n_kv_head = hf.get('num_kv_heads', hf['num_attention_heads'])
        residual = 'parallel' if hf.get('num_ln_in_parallel_attn', 2) == 2 else 'shared'
    else:
        n_kv_head = 1 if hf['multi_query'] else hf['num_attention_heads']
        residual = 'shared' if hf['parallel_attn'] else 'serial'
    return ({} if hf['alibi'] else read_rope(hf)) | {'n_kv_head': n_kv_head, 'residual': residual}


def write_falcon(c):
    two = c.residual == 'parallel'
    new = two or c.n_kv_head not in (1, c.n_head)
    return (write_rope(c) if c.pos == 'rope' else {}) | {
        'new_decoder_architecture': new, 'multi_query': c.n_kv_head == 1, 'num_kv_heads': c.n_kv_head,
        'parallel_attn': c.residual != 'serial', 'num_ln_in_parallel_attn': 2 if two else 1}


FAMILIES['falcon'] = Family(
    architecture='FalconForCausalLM',
    flags=LAYERNORM | {'bias': False},
    keys={'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
          'num_attention_heads': 'n_head', 'layer_norm_epsilon': 'norm_eps', 'ffn_hidden_size': 'ffn_width',
          'max_position_embeddings': 'block_size', 'activation': UNGATED_FFN, 'tie_word_embeddings': 'tie',
          'bias': ('qkv_bias', 'proj_bias', 'ffn_bias'),
          'alibi': renamed('pos', {True: 'alibi_bf16', False: 'rope'})},
    defaults=TIED | {'activation': 'gelu', 'bias': False, 'alibi': False, 'new_decoder_architecture': False,
                     'multi_query': True, 'parallel_attn': True, 'max_position_embeddings': 2048},
    tensors=falcon_tensors,
    read=read_falcon, write=write_falcon)


# ----------------------------------------------------------------------------------------------------------
# MPT: ALiBi, no bias anywhere, clamped projections


def read_mpt(hf):
    attn = hf.get('attn_config', {})
    return {'qkv_clip': attn.get('clip_qkv') or None, 'attn_scale': attn.get('softmax_scale') or None}


def write_mpt(c):
    return {'attn_config': {'clip_qkv': c.qkv_clip, 'softmax_scale': c.attn_scale, 'model_type': ''},
            'no_bias': True}


FAMILIES['mpt'] = Family(
    architecture='MptForCausalLM',
    flags={'pos': 'alibi', 'norm': 'layernorm', 'norm_bias': False, 'bias': False, 'ffn': 'gelu'},
    keys={'vocab_size': 'vocab_size', 'd_model': 'n_embd', 'n_layers': 'n_layer', 'n_heads': 'n_head',
          'max_seq_len': 'block_size', 'layer_norm_epsilon': 'norm_eps', 'tie_word_embeddings': 'tie'},
    defaults=TIED,
    tensors={
        'wte': 'transformer.wte', 'ln_f': 'transformer.norm_f', 'lm_head': 'lm_head',
        'h.{i}.ln_1': 'transformer.blocks.{i}.norm_1', 'h.{i}.ln_2': 'transformer.blocks.{i}.norm_2',
        'h.{i}.mixer.c_attn': 'transformer.blocks.{i}.attn.Wqkv',
        'h.{i}.mixer.c_proj': 'transformer.blocks.{i}.attn.out_proj',
        'h.{i}.ffn.c_fc': 'transformer.blocks.{i}.ffn.up_proj',
        'h.{i}.ffn.c_proj': 'transformer.blocks.{i}.ffn.down_proj'},
    read=read_mpt, write=write_mpt)


# ----------------------------------------------------------------------------------------------------------
# GPT-Neo: windows in every other layer, scores that are not scaled, no bias of queries, keys and values


def read_gpt_neo(hf):
    n, words = hf['num_layers'], []
    for group in hf['attention_types']:
        kinds, times = group if [type(part) for part in group] == [list, int] else ((), 0)
        words += list(kinds) * min(times, n)
    if len(words) != n or not set(words) <= {'global', 'local'}:
        refuse(hf, 'attention_types', f'hold the words global and local with their number, for {n} layers')
    return {'layer_pattern': shortest_pattern('aw'[word == 'local'] for word in words)}


def write_gpt_neo(c):
    return {'attention_types': [[[{'a': 'global', 'w': 'local'}[mixer] for mixer, _ in c.plan()], 1]]}


FAMILIES['gpt_neo'] = Family(
    architecture='GPTNeoForCausalLM',
    flags=LAYERNORM | ALL_BIASES | {'pos': 'learned', 'qkv_bias': False, 'attn_scale': 1.0},
    keys={'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_layers': 'n_layer', 'num_heads': 'n_head',
          'max_position_embeddings': 'block_size', 'intermediate_size': 'ffn_width', 'window_size': 'window',
          'layer_norm_epsilon': 'norm_eps', 'activation_function': UNGATED_FFN,
          'tie_word_embeddings': 'tie'},
    aliases={'num_hidden_layers': 'num_layers', 'num_attention_heads': 'num_heads'},
    defaults=TIED | {'activation_function': 'gelu_new', 'window_size': 256,
                     'attention_types': [[['global', 'local'], 12]]},
    tensors=GPT2_TENSORS | {
        'h.{i}.mixer.c_attn': ('transformer.h.{i}.attn.attention.{q,k,v}_proj', qkv),
        'h.{i}.mixer.c_proj': 'transformer.h.{i}.attn.attention.out_proj',
        'h.{i}.ffn.c_fc': 'transformer.h.{i}.mlp.c_fc', 'h.{i}.ffn.c_proj': 'transformer.h.{i}.mlp.c_proj'},
    mixers='aw', read=read_gpt_neo, write=write_gpt_neo)


# ----------------------------------------------------------------------------------------------------------
# OPT: ReLU, a table of positions that begins with two rows that no token reads; 350M has post-norm


def read_opt(hf):
    """No flag; ValueError for an embedding narrower than the stream, which needs two projections."""
    if hf.get('word_embed_proj_dim', hf['hidden_size']) != hf['hidden_size']:
        refuse(hf, 'word_embed_proj_dim', f'be hidden_size={hf["hidden_size"]}: a tied head behind a '
                                          'projection, as in OPT 350M, is not supported')
    return {}


FAMILIES['opt'] = Family(
    architecture='OPTForCausalLM',
    flags=LAYERNORM | {'pos': 'learned', 'norm_eps': 1e-5},
    keys={'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
          'num_attention_heads': 'n_head', 'max_position_embeddings': 'block_size', 'ffn_dim': 'ffn_width',
          'activation_function': UNGATED_FFN, 'tie_word_embeddings': 'tie',
          'do_layer_norm_before': renamed('norm_at', {True: 'pre', False: 'post'}),
          'enable_bias': ('qkv_bias', 'proj_bias', 'ffn_bias')},
    defaults=TIED | {'activation_function': 'relu', 'do_layer_norm_before': True, 'enable_bias': True},
    only={'layer_norm_elementwise_affine': True, '_remove_final_layer_norm': False},
    tensors={
        'wte': 'model.decoder.embed_tokens', 'wpe': ('model.decoder.embed_positions', positions),
        'ln_f': 'model.decoder.final_layer_norm', 'lm_head': 'lm_head',
        **{f'h.{{i}}.ln_1{at}': 'model.decoder.layers.{i}.self_attn_layer_norm' for at in ('', '_sum')},
        **{f'h.{{i}}.ln_2{at}': 'model.decoder.layers.{i}.final_layer_norm' for at in ('', '_sum')},
        'h.{i}.mixer.c_attn': ('model.decoder.layers.{i}.self_attn.{q,k,v}_proj', qkv),
        'h.{i}.mixer.c_proj': 'model.decoder.layers.{i}.self_attn.out_proj',
        'h.{i}.ffn.c_fc': 'model.decoder.layers.{i}.fc1', 'h.{i}.ffn.c_proj': 'model.decoder.layers.{i}.fc2'},
    read=read_opt)


# ----------------------------------------------------------------------------------------------------------
# BigCode's GPT-2 (SantaCoder, StarCoder): one head of keys and values, or one for each head of queries

MULTI_QUERY = Key(('n_kv_head',), lambda value, hf: 1 if value else hf['n_head'], lambda c: c.n_kv_head == 1)

FAMILIES['gpt_bigcode'] = Family(
    architecture='GPTBigCodeForCausalLM',
    flags=LAYERNORM | ALL_BIASES | {'pos': 'learned'},
    keys=GPT2_KEYS | UNSCALED | {'multi_query': MULTI_QUERY},
    defaults=TIED | {'activation_function': 'gelu_pytorch_tanh', 'scale_attn_weights': True,
                     'multi_query': True},
    only={'add_cross_attention': False},
    tensors=GPT2_TENSORS | {
        'h.{i}.mixer.c_attn': ('transformer.h.{i}.attn.c_attn', qkv_by_group),
        'h.{i}.mixer.c_proj': 'transformer.h.{i}.attn.c_proj',
        'h.{i}.ffn.c_fc': 'transformer.h.{i}.mlp.c_fc', 'h.{i}.ffn.c_proj': 'transformer.h.{i}.mlp.c_proj'})
