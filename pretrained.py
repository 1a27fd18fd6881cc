"""
Checkpoints in Hugging Face format, in and out: GPT.from_pretrained, model.save_pretrained.

A family is one entry of FAMILIES. It says how the keys of config.json become flags of GPTConfig and back, and
how its tensors lie in ours: a rule is (our name, their names, layout), and a layout is a function from our
tensor to the views of it that theirs are copied to, so that the same lines load and save.

The facts are those of the published checkpoints and of `transformers`: each family's logits equal its own.
"""
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import NamedTuple

import torch

from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------
# Layouts. p is our tensor, c the config; one Piece for each of their names, in the order of the names.


class Piece(NamedTuple):
    """One of their tensors: its shape, and which parts of it are which views of ours."""
    shape: tuple
    parts: list             # (view of ours, function from their tensor to its part)
    plus: float = 0.0       # ours is theirs plus this

    def load(self, theirs):
        for ours, part in self.parts:
            ours.copy_(part(theirs).view(ours.shape))
            if self.plus:
                ours.add_(self.plus)

    def save(self):
        theirs = torch.empty(self.shape)
        for ours, part in self.parts:
            part(theirs).view(ours.shape).copy_(ours - self.plus)
        return theirs


def whole(view, shape=None, plus=0.0):
    """A piece that is one view of ours, maybe of another shape than theirs."""
    return Piece(tuple(shape or view.shape), [(view, lambda theirs: theirs)], plus)


def same(p, c):
    return [whole(p)]


def offset(p, c):
    """Gemma's norms multiply by one plus their weight."""
    return [whole(p, plus=1.0)]


def transposed(p, c):
    """GPT-2's Conv1D, whose weights are (in, out)."""
    return [whole(p.t() if p.dim() == 2 else p)]


def halves(p, c):
    """Gate and up."""
    return [whole(half) for half in p.chunk(2)]


def heads(c):
    return c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim


def qkv(p, c):
    """Query, key and value, each a tensor."""
    return [whole(part) for part in p.split(heads(c))]


def qkv_by_group(p, c):
    """One tensor: the queries of a group of heads, their key and their value, then those of the next group."""
    query, key, value = (part.unflatten(0, (c.n_kv_head, -1, c.head_dim)) for part in p.split(heads(c)))
    group = c.n_head // c.n_kv_head
    split = [slice(0, group), slice(group, group + 1), slice(group + 1, group + 2)]

    def part(theirs, rows):
        return theirs.unflatten(0, (c.n_kv_head, group + 2, c.head_dim))[:, rows]
    return [Piece(tuple(p.shape), [(view, partial(part, rows=rows)) for view, rows in zip((query, key, value), split)])]


def pairs(p, dim=0):
    """
    A view of p in which the coordinates of dimension `dim` that turn together lie next to each other, as they
    do in theirs; in ours they are half the width apart. Scores do not change, as queries and keys move alike.
    """
    return p.unflatten(dim, (2, -1)).transpose(dim, dim + 1)


def qkv_interleaved(p, c):
    query, key, value = p.split(heads(c))
    return [*(whole(pairs(x.unflatten(0, (-1, c.head_dim)), 1), x.shape) for x in (query, key)), whole(value)]


def norm_interleaved(p, c):
    """One weight per head and coordinate."""
    return [whole(pairs(p, 1), p.shape)]


def turned_last(p, widths):
    """Rows (..., widths[0] that do not turn, widths[1] that do), the latter interleaved."""
    lead, turn = p.unflatten(0, (-1, sum(widths))).split(widths, dim=1)

    def part(theirs, rows):
        return theirs.unflatten(0, (-1, sum(widths)))[:, rows]
    return [Piece(tuple(p.shape), [(lead, partial(part, rows=slice(0, widths[0]))),
                                   (pairs(turn, 1), partial(part, rows=slice(widths[0], None)))])]


def mla_query(p, c):
    return turned_last(p, (c.head_dim, c.rope_head_dim))


def mla_latent(p, c):
    return turned_last(p, (c.kv_rank, c.rope_head_dim))


def conv(p, c):
    return [whole(p, (p.shape[0], 1, p.shape[1]))]


def each_expert(p, c):
    return [whole(expert) for expert in p]


def each_expert_halves(p, c):
    return [whole(half) for expert in p for half in expert.chunk(2)]


def in_out(p, c):
    """All experts in one tensor (E, in, out)."""
    return [whole(p.transpose(1, 2))]


def columns_in_turns(p, c):
    """As in_out, gate and up in turns: (E, in, 2I) of our (E, 2I, in), or biases (E, 2I)."""
    view = pairs(p, 1)
    return [whole(view.movedim(-1, 1), (p.shape[0], p.shape[2], p.shape[1])) if p.dim() == 3
            else whole(view, p.shape)]


# ----------------------------------------------------------------------------------------------------------
# Keys of config.json that several families share, both ways. hf is the config, has(name) says whether the
# checkpoint holds a tensor, in any layer where the name has {i}.


def reading(table, hf, key, default=None):
    word = hf.get(key) or default
    if word not in table:
        raise ValueError(f'{key}={word} in config.json must be one of {", ".join(map(str, table))}')
    return table[word]


GATED = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu',
         'gelu_fast': 'geglu', 'gelu': 'geglu_erf', 'relu': 'reglu'}
PLAIN = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
         'relu': 'relu'}


def word_for(table, flag):
    """The other way, None where there is no word."""
    return next((word for word, value in table.items() if value == flag), None)


def period(letters):
    """The shortest pattern that repeats to these letters."""
    return next(letters[:n] for n in range(1, len(letters) + 1)
                if all(letters[i] == letters[i % n] for i in range(len(letters))))


def mscale(factor, m=1.0):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def read_rope(hf, theta=10000.0, parameters=None, partial=False):
    """Flags of rotary positions. theta: what the family means where none is given."""
    p = parameters or hf.get('rope_parameters')
    if p is None:  # as published before transformers 5
        p = {'rope_theta': hf.get('rope_theta') or theta} | (hf.get('rope_scaling') or {})
    head = hf.get('head_dim') or hf['hidden_size'] // hf.get('num_attention_heads', 1)
    share = p.get('partial_rotary_factor') or hf.get('partial_rotary_factor') or 1.0
    kind, longest = p.get('rope_type') or p.get('type') or 'default', hf.get('max_position_embeddings', 2048)
    flags = {'pos': 'rope', 'rope_theta': float(p.get('rope_theta') or hf.get('rope_theta') or theta)}
    if partial and share != 1:
        flags['rope_fraction'] = int(head * share) / head
    if kind == 'default':
        return flags
    if kind not in READ_SCALING:
        raise ValueError(f'rope_type={kind} in config.json must be one of default, {", ".join(READ_SCALING)}')
    trained = hf.get('original_max_position_embeddings') or p.get('original_max_position_embeddings') or longest
    factor = float(p.get('factor') or longest / trained)
    return flags | READ_SCALING[kind](p, factor, trained, longest)


def read_linear(p, factor, trained, longest):
    return {'rope_scaling': 'linear', 'rope_factor': factor} if factor != 1 else {}


def read_dynamic(p, factor, trained, longest):
    return {'rope_scaling': 'dynamic', 'rope_factor': factor, 'rope_context': longest}


def read_yarn(p, factor, trained, longest):
    sharpness = p.get('attention_factor')
    if sharpness is None and p.get('mscale') and p.get('mscale_all_dim'):
        sharpness = mscale(factor, p['mscale']) / mscale(factor, p['mscale_all_dim'])
    return {'rope_scaling': 'yarn', 'rope_factor': factor, 'rope_context': trained,
            'rope_beta_fast': float(p.get('beta_fast') or 32), 'rope_beta_slow': float(p.get('beta_slow') or 1),
            'rope_truncate': p.get('truncate', True), 'rope_attention_factor': sharpness}


def read_llama3(p, factor, trained, longest):
    return {'rope_scaling': 'llama3', 'rope_factor': factor, 'rope_context': trained,
            'rope_low_freq': float(p['low_freq_factor']), 'rope_high_freq': float(p['high_freq_factor'])}


def read_longrope(p, factor, trained, longest):
    return {'rope_scaling': 'longrope', 'rope_factor': factor, 'rope_context': trained,
            'rope_short': tuple(map(float, p['short_factor'])), 'rope_long': tuple(map(float, p['long_factor'])),
            'rope_attention_factor': p.get('attention_factor')}


READ_SCALING = {'linear': read_linear, 'dynamic': read_dynamic, 'yarn': read_yarn, 'llama3': read_llama3,
                'longrope': read_longrope, 'su': read_longrope}


def write_rope(c):
    """rope_parameters as transformers 5 has them."""
    p = {'rope_theta': c.rope_theta, 'rope_type': 'default' if c.rope_scaling == 'none' else c.rope_scaling}
    if c.rope_fraction != 1:
        p['partial_rotary_factor'] = c.rope_fraction
    if c.rope_scaling != 'none':
        p['factor'] = c.rope_factor
    if c.rope_scaling in ('yarn', 'llama3', 'longrope'):
        p['original_max_position_embeddings'] = c.rope_context
    more = {'yarn': {'beta_fast': 'rope_beta_fast', 'beta_slow': 'rope_beta_slow', 'truncate': 'rope_truncate',
                     'attention_factor': 'rope_attention_factor'},
            'llama3': {'low_freq_factor': 'rope_low_freq', 'high_freq_factor': 'rope_high_freq'},
            'longrope': {'short_factor': 'rope_short', 'long_factor': 'rope_long',
                         'attention_factor': 'rope_attention_factor'}}.get(c.rope_scaling, {})
    return p | {key: getattr(c, flag) for key, flag in more.items() if getattr(c, flag) is not None}


KINDS = {'full_attention': 'a', 'attention': 'a', 'sliding_attention': 'w', 'chunked_attention': 'c'}


def letters_of(hf):
    """Mixer letters from layer_types, or None where the config has none."""
    if not hf.get('layer_types'):
        return None
    return ''.join(reading(KINDS, {'layer_types': kind}, 'layer_types') for kind in hf['layer_types'])


def windowed(hf, letters):
    """layer_pattern and window of these mixer letters."""
    seen = set(letters) & set('wvc')
    return {'layer_pattern': period(letters)} | ({'window': hf['sliding_window']} if seen else {})


def write_types(c):
    kinds = {'a': 'full_attention', 'w': 'sliding_attention', 'c': 'chunked_attention', 'n': 'full_attention',
             'v': 'sliding_attention'}
    return [kinds.get(mixer, 'mamba') for mixer, _ in c.plan()]


def everywhere(hf, flags):
    """A window in every layer, where there is one."""
    return flags | (windowed(hf, 'w' * hf['num_hidden_layers']) if hf.get('sliding_window') else {})


# ----------------------------------------------------------------------------------------------------------
# Llama and what descends from it

LLAMA_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head', 'num_key_value_heads': 'n_kv_head', 'head_dim': 'head_dim',
    'intermediate_size': 'ffn_width', 'max_position_embeddings': 'block_size', 'rms_norm_eps': 'norm_eps',
}
MOE_KEYS = {key: flag for key, flag in LLAMA_KEYS.items() if key != 'intermediate_size'} | {
    'num_experts_per_tok': 'n_expert_used'}
LAYER = 'model.layers.{i}.'
ATTENTION = [
    ('h.{a}.mixer.c_attn', [LAYER + f'self_attn.{x}_proj' for x in 'qkv'], qkv),
    ('h.{a}.mixer.c_proj', [LAYER + 'self_attn.o_proj'], same),
    ('h.{a}.mixer.q_norm', [LAYER + 'self_attn.q_norm'], same),
    ('h.{a}.mixer.k_norm', [LAYER + 'self_attn.k_norm'], same),
]
ENDS = [('wte', ['model.embed_tokens'], same), ('ln_f', ['model.norm'], same), ('lm_head', ['lm_head'], same)]
NORMS = [('h.{i}.ln_1', [LAYER + 'input_layernorm'], same),
         ('h.{i}.ln_2', [LAYER + 'post_attention_layernorm'], same)]


def gated(place, letter='f'):
    return [(f'h.{{{letter}}}.ffn.c_fc', [LAYER + f'{place}.{x}_proj' for x in ('gate', 'up')], halves),
            (f'h.{{{letter}}}.ffn.c_proj', [LAYER + f'{place}.down_proj'], same)]


def experts(place, names=('gate_proj', 'up_proj', 'down_proj'), router='gate'):
    gate, up, down = (LAYER + f'{place}.experts.{{n}}.{name}' for name in names)
    return [('h.{e}.ffn.router', [LAYER + f'{place}.{router}'], same),
            ('h.{e}.ffn.c_fc', [gate, up], each_expert_halves), ('h.{e}.ffn.c_proj', [down], each_expert)]


def shared(place, name):
    return [('h.{e}.ffn.shared.c_fc', [LAYER + f'{place}.{name}.{x}_proj' for x in ('gate', 'up')], halves),
            ('h.{e}.ffn.shared.c_proj', [LAYER + f'{place}.{name}.down_proj'], same)]


LLAMA_TENSORS = ENDS + NORMS + ATTENTION + gated('mlp')


def read_llama(hf, has, theta=10000.0, rope=None, partial=False):
    return {'norm': 'rmsnorm', 'ffn': reading(GATED, hf, 'hidden_act', 'silu'), 'bias': False,
            'qkv_bias': has(LAYER + 'self_attn.q_proj.bias'), 'proj_bias': has(LAYER + 'self_attn.o_proj.bias'),
            'ffn_bias': has(LAYER + 'mlp.down_proj.bias')} | read_rope(hf, theta, rope, partial)


def write_llama(c):
    return {'hidden_act': word_for(GATED, c.ffn), 'rope_parameters': write_rope(c),
            'attention_bias': c.qkv_bias, 'mlp_bias': bool(c.ffn_bias)}


def read_mistral(hf, has):
    return everywhere(hf, read_llama(hf, has))


def write_window(c):
    return write_llama(c) | {'sliding_window': c.window}


def read_mixtral(hf, has):
    return everywhere(hf, read_llama(hf, has, 1e6)) | {
        'ffn_pattern': 'e', 'n_expert': hf.get('num_local_experts', 8), 'expert_width': hf['intermediate_size'],
        'ffn_bias': False}


def write_mixtral(c):
    return write_window(c) | {'num_local_experts': c.n_expert, 'intermediate_size': c.expert_width}


def read_qwen2(hf, has):
    letters = letters_of(hf)
    if letters is None:
        first = hf.get('max_window_layers', 28) if hf.get('use_sliding_window') else math.inf
        letters = ''.join('w' if i >= first else 'a' for i in range(hf['num_hidden_layers']))
    return read_llama(hf, has) | windowed(hf, letters)


def write_qwen2(c):
    return write_window(c) | {'use_sliding_window': c.window is not None, 'layer_types': write_types(c)}


def read_qwen3(hf, has):
    return read_qwen2(hf, has) | {'qk_norm': True}


def read_sparse(hf, experts):
    """Experts in every decoder_sparse_step-th layer but those of mlp_only_layers."""
    step, only = hf.get('decoder_sparse_step') or 1, hf.get('mlp_only_layers') or []
    letters = ''.join('f' if i in only or (i + 1) % step else 'e' for i in range(hf['num_hidden_layers']))
    moe = {'n_expert': experts, 'expert_width': hf['moe_intermediate_size'],
           'router_norm': hf.get('norm_topk_prob', False), 'n_expert_used': hf['num_experts_per_tok']}
    flags = {'ffn_pattern': period(letters)} | (moe if 'e' in letters else {})
    return flags | ({'ffn_width': hf['intermediate_size']} if 'f' in letters else {})


def write_sparse(c):
    dense = [i for i, (_, ffn) in enumerate(c.plan()) if ffn == 'f']
    return write_qwen2(c) | {'decoder_sparse_step': 1, 'mlp_only_layers': dense, 'norm_topk_prob': c.router_norm,
                             'moe_intermediate_size': c.expert_width, 'num_experts_per_tok': c.n_expert_used} | (
        {'intermediate_size': c.ffn_width} if dense else {})


def read_qwen2_moe(hf, has):
    flags = read_qwen2(hf, has) | read_sparse(hf, hf['num_experts'])
    if 'e' not in flags['ffn_pattern']:
        return flags
    return flags | {'n_shared': 1, 'shared_gate': True, 'shared_width': hf['shared_expert_intermediate_size']}


def write_qwen2_moe(c):
    return write_sparse(c) | {'num_experts': c.n_expert, 'shared_expert_intermediate_size': c.shared_width,
                              'qkv_bias': c.qkv_bias}


def read_qwen3_moe(hf, has):
    # here a window is one of all layers
    window = {'sliding_window': hf.get('sliding_window') if hf.get('use_sliding_window') else None}
    return everywhere(hf | window, read_llama(hf, has)) | {'qk_norm': True} | read_sparse(
        hf, hf.get('num_experts') or hf['num_local_experts'])


def write_qwen3_moe(c):
    return write_sparse(c) | {'num_experts': c.n_expert, 'num_local_experts': c.n_expert}


# Gemma: norms whose weights are offset by one
GEMMA_TENSORS = [(ours, theirs, offset if 'ln_' in ours or '_norm' in ours else layout)
                 for ours, theirs, layout in ENDS + ATTENTION + gated('mlp') + [
    ('h.{i}.ln_1', [LAYER + 'input_layernorm'], same),
    ('h.{i}.ln_1_out', [LAYER + 'post_attention_layernorm'], same),
    ('h.{i}.ln_2', [LAYER + 'pre_feedforward_layernorm'], same),
    ('h.{i}.ln_2_out', [LAYER + 'post_feedforward_layernorm'], same)]]


def read_gemma(hf, has, letters, **rope):
    head = hf.get('head_dim') or 256
    scale = hf.get('query_pre_attn_scalar') or 256
    act = hf.get('hidden_activation') or hf.get('hidden_act') or 'gelu_pytorch_tanh'
    return read_llama(hf | {'hidden_act': act}, has, **rope) | windowed(hf, letters) | {
        'norm_at': 'sandwich', 'embed_scale': True, 'head_dim': head,
        'attn_scale': None if scale == head else scale ** -0.5,
        'logit_softcap': hf.get('final_logit_softcapping')}


def read_gemma2(hf, has):
    letters = letters_of(hf) or ('wa' * hf['num_hidden_layers'])[:hf['num_hidden_layers']]
    return read_gemma(hf, has, letters) | {'softcap': hf.get('attn_logit_softcapping')}


def write_gemma2(c):
    scalar = c.head_dim if c.attn_scale is None else c.attn_scale ** -2
    scalar = round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-6) else scalar
    return write_window(c) | {'hidden_activation': word_for(GATED, c.ffn), 'layer_types': write_types(c),
                              'query_pre_attn_scalar': scalar, 'attn_logit_softcapping': c.softcap,
                              'final_logit_softcapping': c.logit_softcap}


def read_gemma3(hf, has):
    every = hf.get('sliding_window_pattern') or hf.get('_sliding_window_pattern') or 6
    n = hf['num_hidden_layers']
    letters = letters_of(hf) or ''.join('w' if (i + 1) % every else 'a' for i in range(n))
    both = hf.get('rope_parameters') or {}
    local = both.get('sliding_attention', {}).get('rope_theta') or hf.get('rope_local_base_freq') or 10000.0
    flags = read_gemma(hf, has, letters, theta=1e6, rope=both.get('full_attention'))
    return flags | {'qk_norm': True} | ({'rope_local_theta': float(local)} if 'w' in letters else {})


def write_gemma3(c):
    local = {'rope_theta': c.rope_local_theta or c.rope_theta, 'rope_type': 'default'}
    return write_gemma2(c) | {'rope_parameters': {'full_attention': write_rope(c), 'sliding_attention': local}}


PHI3_TENSORS = ENDS + NORMS + [
    ('h.{a}.mixer.c_attn', [LAYER + 'self_attn.qkv_proj'], same),
    ('h.{a}.mixer.c_proj', [LAYER + 'self_attn.o_proj'], same),
    ('h.{f}.ffn.c_fc', [LAYER + 'mlp.gate_up_proj'], same), ('h.{f}.ffn.c_proj', [LAYER + 'mlp.down_proj'], same)]


def read_phi3(hf, has):
    return everywhere(hf, read_llama(hf, has, partial=True))


def write_phi3(c):
    # transformers takes the trained context from the top level
    return write_window(c) | {'partial_rotary_factor': c.rope_fraction} | (
        {'original_max_position_embeddings': c.rope_context} if c.rope_context else {})


OLMO2_TENSORS = ENDS + ATTENTION + gated('mlp') + [
    ('h.{i}.ln_1_out', [LAYER + 'post_attention_layernorm'], same),
    ('h.{i}.ln_2_out', [LAYER + 'post_feedforward_layernorm'], same)]


def read_olmo2(hf, has):
    return read_llama(hf, has) | {'norm_at': 'output', 'qk_norm': 'full'}


def turning(hf):
    """Which layers have rotary positions: SmolLM3's and Llama 4's no_rope_layers says 1 where they do."""
    every = hf.get('no_rope_layer_interval') or 4
    return hf.get('no_rope_layers') or [int((i + 1) % every != 0) for i in range(hf['num_hidden_layers'])]


def read_smollm3(hf, has):
    turn = turning(hf)
    windows = letters_of(hf)
    if windows is None:
        use = hf.get('use_sliding_window') and hf.get('sliding_window')
        windows = ['w' if use and not t else 'a' for t in turn]
    letters = ''.join(w if t else {'a': 'n', 'w': 'v'}[w] for w, t in zip(windows, turn))
    return read_llama(hf, has, 2e6) | windowed(hf, letters)


def write_smollm3(c):
    return write_qwen2(c) | {'no_rope_layers': [int(mixer not in 'nv') for mixer, _ in c.plan()]}


STARCODER2_KEYS = {key: flag for key, flag in LLAMA_KEYS.items() if key != 'rms_norm_eps'} | {
    'norm_epsilon': 'norm_eps'}
STARCODER2_TENSORS = ENDS + NORMS + ATTENTION + [
    ('h.{f}.ffn.c_fc', [LAYER + 'mlp.c_fc'], same), ('h.{f}.ffn.c_proj', [LAYER + 'mlp.c_proj'], same)]


def read_starcoder2(hf, has):
    return everywhere(hf, read_llama(hf | {'hidden_act': 'silu'}, has)) | {
        'norm': 'layernorm', 'norm_bias': True, 'ffn': reading(PLAIN, hf, 'hidden_act', 'gelu_pytorch_tanh'),
        'ffn_bias': has(LAYER + 'mlp.c_fc.bias')}


def write_starcoder2(c):
    return write_window(c) | {'hidden_act': word_for(PLAIN, c.ffn), 'use_bias': c.qkv_bias}


def read_granite(hf, has):
    scale, head = hf.get('attention_multiplier', 1.0), hf['hidden_size'] // hf['num_attention_heads']
    head = hf.get('head_dim') or head
    return read_llama(hf, has) | {
        'embed_scale': float(hf.get('embedding_multiplier', 1.0)),
        'residual_scale': float(hf.get('residual_multiplier', 1.0)),
        'attn_scale': None if scale == head ** -0.5 else float(scale),
        'logit_scale': 1 / hf.get('logits_scaling', 1.0)}


def write_granite(c):
    scale = c.head_dim ** -0.5 if c.attn_scale is None else c.attn_scale
    embed = math.sqrt(c.n_embd) if c.embed_scale is True else c.embed_scale or 1.0
    return write_llama(c) | {'embedding_multiplier': embed, 'residual_multiplier': c.residual_scale,
                             'attention_multiplier': scale, 'logits_scaling': 1 / c.logit_scale}


COHERE_KEYS = {key: flag for key, flag in LLAMA_KEYS.items() if key not in ('rms_norm_eps', 'head_dim')} | {
    'layer_norm_eps': 'norm_eps', 'logit_scale': 'logit_scale'}
COHERE_TENSORS = ENDS + gated('mlp') + [
    ('h.{i}.ln_1', [LAYER + 'input_layernorm'], same),
    ('h.{a}.mixer.c_attn', [LAYER + f'self_attn.{x}_proj' for x in 'qkv'], qkv_interleaved),
    ('h.{a}.mixer.c_proj', [LAYER + 'self_attn.o_proj'], same),
    ('h.{a}.mixer.q_norm', [LAYER + 'self_attn.q_norm'], norm_interleaved),
    ('h.{a}.mixer.k_norm', [LAYER + 'self_attn.k_norm'], norm_interleaved)]


def read_cohere(hf, has):
    return read_llama(hf, has, 5e5) | {
        'norm': 'layernorm', 'norm_bias': False, 'residual': 'shared',
        'qk_norm': 'heads' if hf.get('use_qk_norm') else False}


def write_cohere(c):
    return write_llama(c) | {'use_qk_norm': c.qk_norm == 'heads'}


LLAMA4_TENSORS = ENDS + NORMS + gated('feed_forward') + shared('feed_forward', 'shared_expert') + [
    ('h.{a}.mixer.c_attn', [LAYER + f'self_attn.{x}_proj' for x in 'qkv'], qkv_interleaved),
    ('h.{i}.mixer.c_proj', [LAYER + 'self_attn.o_proj'], same),
    ('h.{e}.ffn.router', [LAYER + 'feed_forward.router'], same),
    ('h.{e}.ffn.c_fc.weight', [LAYER + 'feed_forward.experts.gate_up_proj'], in_out),
    ('h.{e}.ffn.c_proj.weight', [LAYER + 'feed_forward.experts.down_proj'], in_out)]


def read_llama4(hf, has):
    n, turn = hf['num_hidden_layers'], turning(hf)
    step, moe = hf.get('interleave_moe_layer_step', 1), hf.get('moe_layers')
    moe = moe if moe is not None else range(step - 1, n, step)
    local = 'c' if hf.get('attention_chunk_size') else 'a'
    letters = ''.join(local if t else 'n' for t in turn)
    ffns = ''.join('e' if i in moe else 'f' for i in range(n))
    flags = read_llama(hf, has, 5e5) | {
        'layer_pattern': period(letters), 'ffn_pattern': period(ffns),
        'qk_norm': 'unit' if hf.get('use_qk_norm', True) else False}
    if 'c' in letters:
        flags['window'] = hf['attention_chunk_size']
    if 'n' in letters and hf.get('attn_temperature_tuning', True):
        flags |= {'temp_scale': float(hf.get('attn_scale', 0.1)), 'temp_floor': int(hf.get('floor_scale', 8192))}
    if 'f' in ffns:
        flags['ffn_width'] = hf['intermediate_size_mlp']
    if 'e' in ffns:
        flags |= {'n_expert': hf['num_local_experts'], 'n_expert_used': hf.get('num_experts_per_tok', 1),
                  'expert_width': hf['intermediate_size'], 'n_shared': 1, 'router': 'sigmoid',
                  'router_norm': False, 'router_input': True}
    return flags


def write_llama4(c):
    plan = c.plan()
    return write_llama(c) | {
        'no_rope_layers': [int(mixer != 'n') for mixer, _ in plan],
        'moe_layers': [i for i, (_, ffn) in enumerate(plan) if ffn == 'e'], 'attention_chunk_size': c.window,
        'use_qk_norm': c.qk_norm == 'unit', 'attn_temperature_tuning': c.temp_scale is not None,
        'intermediate_size': c.expert_width or c.ffn_width, 'intermediate_size_mlp': c.ffn_width,
        'num_experts_per_tok': c.n_expert_used, 'num_local_experts': c.n_expert or 1} | (
        {'attn_scale': c.temp_scale, 'floor_scale': c.temp_floor} if c.temp_scale else {})


GPT_OSS_TENSORS = ENDS + NORMS + ATTENTION[:2] + [
    ('h.{a}.mixer.scores.sinks', [LAYER + 'self_attn.sinks'], same),
    ('h.{e}.ffn.router', [LAYER + 'mlp.router'], same),
    ('h.{e}.ffn.c_fc.weight', [LAYER + 'mlp.experts.gate_up_proj'], columns_in_turns),
    ('h.{e}.ffn.c_fc.bias', [LAYER + 'mlp.experts.gate_up_proj_bias'], columns_in_turns),
    ('h.{e}.ffn.c_proj.weight', [LAYER + 'mlp.experts.down_proj'], in_out),
    ('h.{e}.ffn.c_proj.bias', [LAYER + 'mlp.experts.down_proj_bias'], same)]


def read_gpt_oss(hf, has):
    letters = letters_of(hf) or ('wa' * hf['num_hidden_layers'])[:hf['num_hidden_layers']]
    return read_llama(hf | {'hidden_act': 'silu'}, has, 150000.0) | windowed(hf, letters) | {
        'ffn': 'swiglu_clip', 'ffn_limit': float(hf.get('swiglu_limit') or 7),
        'ffn_alpha': float(hf.get('swiglu_alpha') or 1.702), 'ffn_pattern': 'e', 'ffn_bias': True, 'sinks': True,
        'n_expert': hf.get('num_local_experts') or hf['num_experts'], 'expert_width': hf['intermediate_size'],
        'n_expert_used': hf.get('num_experts_per_tok') or hf['experts_per_token'], 'router_bias': True}


def write_gpt_oss(c):
    return write_window(c) | {
        'hidden_act': 'silu', 'layer_types': write_types(c), 'swiglu_limit': c.ffn_limit,
        'swiglu_alpha': c.ffn_alpha, 'num_local_experts': c.n_expert, 'num_experts_per_tok': c.n_expert_used,
        'intermediate_size': c.expert_width}


# ----------------------------------------------------------------------------------------------------------
# DeepSeek: latent attention

DEEPSEEK_KEYS = {key: flag for key, flag in LLAMA_KEYS.items()
                 if key not in ('num_key_value_heads', 'head_dim')} | {
    'kv_lora_rank': 'kv_rank', 'q_lora_rank': 'q_rank', 'qk_nope_head_dim': 'head_dim',
    'qk_rope_head_dim': 'rope_head_dim', 'v_head_dim': 'v_head_dim'}


def deepseek_tensors(c, hf):
    query, latent = (mla_query, mla_latent) if hf.get('rope_interleave', True) else (same, same)
    attn = LAYER + 'self_attn.'
    return ENDS + NORMS + gated('mlp') + experts('mlp') + shared('mlp', 'shared_experts') + [
        ('h.{a}.mixer.q_down', [attn + 'q_a_proj'], same), ('h.{a}.mixer.q_norm', [attn + 'q_a_layernorm'], same),
        ('h.{a}.mixer.q_up', [attn + ('q_b_proj' if c.q_rank else 'q_proj')], query),
        ('h.{a}.mixer.kv_down', [attn + 'kv_a_proj_with_mqa'], latent),
        ('h.{a}.mixer.kv_norm', [attn + 'kv_a_layernorm'], same),
        ('h.{a}.mixer.kv_up', [attn + 'kv_b_proj'], same), ('h.{a}.mixer.c_proj', [attn + 'o_proj'], same),
        ('h.{e}.ffn.choice_bias', [LAYER + 'mlp.gate.e_score_correction_bias'], same)]


def read_deepseek(hf, has):
    n, dense = hf['num_hidden_layers'], hf.get('first_k_dense_replace', 0)
    letters = 'f' * min(n, dense) + 'e' * max(0, n - dense)
    width = hf['qk_nope_head_dim'] + hf['qk_rope_head_dim']
    flags = read_llama(hf | {'head_dim': width}, has) | {
        'attn': 'mla', 'latent_eps': 1e-6, 'qkv_bias': has(LAYER + 'self_attn.kv_a_proj_with_mqa.bias'),
        'ffn_pattern': period(letters)}
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
    sharp = rope.get('mscale_all_dim') or 0
    if flags.get('rope_scaling') and sharp:
        if flags.get('rope_attention_factor') == 1 and sharp == 1 and flags['rope_scaling'] == 'yarn':
            flags['rope_attention_factor'] = None  # what None stands for
        else:
            flags['attn_scale'] = width ** -0.5 * mscale(flags['rope_factor'], sharp) ** 2
    elif flags.get('rope_scaling') == 'yarn':
        factor = flags.get('rope_attention_factor')
        flags['rope_attention_factor'] = mscale(flags['rope_factor']) if factor is None else factor
    if 'e' in letters:
        flags |= {'n_expert': hf['n_routed_experts'], 'n_expert_used': hf['num_experts_per_tok'],
                  'expert_width': hf['moe_intermediate_size'], 'n_shared': hf.get('n_shared_experts') or 0,
                  'router_scale': float(hf.get('routed_scaling_factor', 1.0))}
    return flags


def read_groups(hf, top):
    """Group-limited routing, where it limits anything."""
    n, used = hf.get('n_group') or 1, hf.get('topk_group') or 1
    return {'n_group': n, 'n_group_used': used, 'group_top': top} if used < n else {}


def read_deepseek_v2(hf, has):
    flags = read_deepseek(hf, has)
    if 'e' not in flags['ffn_pattern']:
        return flags
    groups = reading({'greedy': {}, 'group_limited_greedy': read_groups(hf, 1)}, hf, 'topk_method', 'greedy')
    return flags | {'router_norm': False} | groups


def read_deepseek_v3(hf, has):
    flags = read_deepseek(hf, has)
    if 'e' not in flags['ffn_pattern']:
        return flags
    return flags | {'router': 'sigmoid', 'balance': 'bias',
                    'router_norm': hf.get('norm_topk_prob', True)} | read_groups(hf, 2)


def write_deepseek(c):
    dense = next((i for i, (_, ffn) in enumerate(c.plan()) if ffn == 'e'), c.n_layer)
    rope = write_rope(c)
    if c.rope_scaling == 'yarn' and c.attn_scale is None and c.rope_attention_factor is None:
        rope |= {'mscale': 1.0, 'mscale_all_dim': 1.0}
    elif c.rope_scaling != 'none' and c.attn_scale is not None:
        # the other way from what read_deepseek makes of the two
        sharp, unit = math.sqrt(c.attn_scale * math.sqrt(c.head_dim + c.rope_head_dim)), 0.1 * math.log(c.rope_factor)
        rope |= {'mscale': ((c.rope_attention_factor or 1.0) * sharp - 1) / unit, 'mscale_all_dim': (sharp - 1) / unit}
        rope.pop('attention_factor', None)
    keys = write_llama(c) | {
        'rope_parameters': rope, 'num_key_value_heads': c.n_head, 'q_lora_rank': c.q_rank, 'head_dim': c.rope_head_dim,
        'first_k_dense_replace': dense, 'n_group': c.n_group, 'topk_group': c.n_group_used}
    return keys | ({'n_routed_experts': c.n_expert, 'num_experts_per_tok': c.n_expert_used,
                    'moe_intermediate_size': c.expert_width, 'n_shared_experts': c.n_shared or None,
                    'routed_scaling_factor': c.router_scale} if 'e' in c.ffns() else {})


def write_deepseek_v2(c):
    return write_deepseek(c) | {'topk_method': 'group_limited_greedy' if c.n_group > 1 else 'greedy',
                                'norm_topk_prob': False}


def write_deepseek_v3(c):
    return write_deepseek(c) | {'norm_topk_prob': c.router_norm, 'rope_interleave': True}


# ----------------------------------------------------------------------------------------------------------
# GPT-2, GPT-NeoX and the models with ALiBi

GPT2_KEYS = {'vocab_size': 'vocab_size', 'n_embd': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head',
             'n_positions': 'block_size', 'n_inner': 'ffn_width', 'layer_norm_epsilon': 'norm_eps'}
H = 'transformer.h.{i}.'
GPT2_TENSORS = [
    ('wte', ['transformer.wte'], same), ('wpe', ['transformer.wpe'], same), ('ln_f', ['transformer.ln_f'], same),
    ('lm_head', ['lm_head'], same), ('h.{i}.ln_1', [H + 'ln_1'], same), ('h.{i}.ln_2', [H + 'ln_2'], same),
    ('h.{i}.mixer.c_attn', [H + 'attn.c_attn'], transposed), ('h.{i}.mixer.c_proj', [H + 'attn.c_proj'], transposed),
    ('h.{i}.ffn.c_fc', [H + 'mlp.c_fc'], transposed), ('h.{i}.ffn.c_proj', [H + 'mlp.c_proj'], transposed)]


def read_gpt2(hf, has):
    return {'ffn': reading(PLAIN, hf, 'activation_function', 'gelu_new'),
            'block_size': hf.get('n_positions') or hf.get('n_ctx'),
            'attn_scale': None if hf.get('scale_attn_weights', True) else 1.0}


def write_gpt2(c):
    return {'activation_function': word_for(PLAIN, c.ffn), 'scale_attn_weights': c.attn_scale is None}


@torch.no_grad()
def finish_gpt2(model, hf):
    """Scores divided by the number of their layer, which the query may as well be."""
    if hf.get('scale_attn_by_inverse_layer_idx'):
        for layer, block in enumerate(model.h, start=1):
            for p in block.mixer.c_attn.parameters():
                p[:model.config.n_embd] /= layer


NEOX_KEYS = {key: flag for key, flag in LLAMA_KEYS.items()
             if key not in ('num_key_value_heads', 'head_dim', 'rms_norm_eps')} | {'layer_norm_eps': 'norm_eps'}
NEOX = 'gpt_neox.layers.{i}.'
NEOX_TENSORS = [
    ('wte', ['gpt_neox.embed_in'], same), ('ln_f', ['gpt_neox.final_layer_norm'], same),
    ('lm_head', ['embed_out'], same), ('h.{i}.ln_1', [NEOX + 'input_layernorm'], same),
    ('h.{i}.ln_2', [NEOX + 'post_attention_layernorm'], same),
    ('h.{i}.mixer.c_attn', [NEOX + 'attention.query_key_value'], qkv_by_group),
    ('h.{i}.mixer.c_proj', [NEOX + 'attention.dense'], same),
    ('h.{i}.ffn.c_fc', [NEOX + 'mlp.dense_h_to_4h'], same), ('h.{i}.ffn.c_proj', [NEOX + 'mlp.dense_4h_to_h'], same)]


def read_neox(hf, has):
    rope = hf.get('rope_parameters')
    if rope is None:
        rope = {'rope_theta': hf.get('rotary_emb_base', 10000)} | (hf.get('rope_scaling') or {})
    rope = {'partial_rotary_factor': hf.get('rotary_pct', 0.25)} | rope
    return read_rope(hf, 10000.0, rope, partial=True) | {
        'ffn': reading(PLAIN, hf, 'hidden_act', 'gelu'), 'qkv_bias': has(NEOX + 'attention.query_key_value.bias'),
        'proj_bias': has(NEOX + 'attention.dense.bias'),
        'residual': 'parallel' if hf.get('use_parallel_residual', True) else 'serial'}


def write_neox(c):
    return {'hidden_act': word_for(PLAIN, c.ffn), 'use_parallel_residual': c.residual == 'parallel',
            'attention_bias': c.qkv_bias, 'rotary_pct': c.rope_fraction,
            'rope_parameters': write_rope(c) | {'partial_rotary_factor': c.rope_fraction}}


FALCON_KEYS = {'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
               'num_attention_heads': 'n_head', 'layer_norm_epsilon': 'norm_eps', 'ffn_hidden_size': 'ffn_width',
               'max_position_embeddings': 'block_size'}


def falcon_tensors(c, hf):
    two = c.residual == 'parallel'
    return [
        ('wte', ['transformer.word_embeddings'], same), ('ln_f', ['transformer.ln_f'], same),
        ('lm_head', ['lm_head'], same), ('h.{i}.ln_1', [H + ('ln_attn' if two else 'input_layernorm')], same),
        ('h.{i}.ln_2', [H + ('ln_mlp' if two else 'post_attention_layernorm')], same),
        ('h.{i}.mixer.c_attn', [H + 'self_attention.query_key_value'], qkv_by_group),
        ('h.{i}.mixer.c_proj', [H + 'self_attention.dense'], same),
        ('h.{i}.ffn.c_fc', [H + 'mlp.dense_h_to_4h'], same), ('h.{i}.ffn.c_proj', [H + 'mlp.dense_4h_to_h'], same)]


def read_falcon(hf, has):
    new = hf.get('new_decoder_architecture', False)
    keys = hf.get('num_kv_heads') if new else 1 if hf.get('multi_query', True) else None
    residual = 'serial' if not (hf.get('parallel_attn', True) or new) else (
        'parallel' if has(H + 'ln_mlp.weight') else 'shared')
    position = {'pos': 'alibi_bf16'} if hf.get('alibi') else read_rope(hf)
    return position | {
        'n_kv_head': keys or hf['num_attention_heads'], 'residual': residual, 'bias': False, 'norm_bias': True,
        'ffn': reading(PLAIN, hf, 'activation', 'gelu'),
        'qkv_bias': has(H + 'self_attention.query_key_value.bias'),
        'proj_bias': has(H + 'self_attention.dense.bias'), 'ffn_bias': has(H + 'mlp.dense_h_to_4h.bias')}


def write_falcon(c):
    new = c.n_kv_head not in (1, c.n_head) or c.residual == 'parallel'
    rope = {'rope_parameters': write_rope(c)} if c.pos == 'rope' else {}
    return rope | {
        'new_decoder_architecture': new, 'multi_query': c.n_kv_head == 1, 'num_kv_heads': c.n_kv_head,
        'parallel_attn': c.residual != 'serial', 'alibi': c.pos == 'alibi_bf16', 'bias': bool(c.qkv_bias),
        'num_ln_in_parallel_attn': 2 if c.residual == 'parallel' else 1, 'activation': word_for(PLAIN, c.ffn)}


BLOOM_KEYS = {'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head',
              'layer_norm_epsilon': 'norm_eps'}
BLOOM_TENSORS = [
    ('wte', ['transformer.word_embeddings'], same), ('ln_e', ['transformer.word_embeddings_layernorm'], same),
    ('ln_f', ['transformer.ln_f'], same), ('lm_head', ['lm_head'], same),
    ('h.{i}.ln_1', [H + 'input_layernorm'], same), ('h.{i}.ln_2', [H + 'post_attention_layernorm'], same),
    ('h.{i}.mixer.c_attn', [H + 'self_attention.query_key_value'], qkv_by_group),
    ('h.{i}.mixer.c_proj', [H + 'self_attention.dense'], same),
    ('h.{i}.ffn.c_fc', [H + 'mlp.dense_h_to_4h'], same), ('h.{i}.ffn.c_proj', [H + 'mlp.dense_4h_to_h'], same)]


def read_bloom(hf, has):
    return {'pos': 'alibi', 'embed_norm': True, 'ffn': 'gelu_tanh',
            'n_embd': hf.get('hidden_size') or hf['n_embed'],
            'n_head': hf.get('n_head') or hf['num_attention_heads'],
            'n_layer': hf.get('n_layer') or hf['num_hidden_layers'],
            'residual': 'normed' if hf.get('apply_residual_connection_post_layernorm') else 'serial'}


def write_bloom(c):
    return {'apply_residual_connection_post_layernorm': c.residual == 'normed'}


MPT_KEYS = {'vocab_size': 'vocab_size', 'd_model': 'n_embd', 'n_layers': 'n_layer', 'n_heads': 'n_head',
            'max_seq_len': 'block_size', 'layer_norm_epsilon': 'norm_eps'}
MPT = 'transformer.blocks.{i}.'
MPT_TENSORS = [
    ('wte', ['transformer.wte'], same), ('ln_f', ['transformer.norm_f'], same), ('lm_head', ['lm_head'], same),
    ('h.{i}.ln_1', [MPT + 'norm_1'], same), ('h.{i}.ln_2', [MPT + 'norm_2'], same),
    ('h.{i}.mixer.c_attn', [MPT + 'attn.Wqkv'], same), ('h.{i}.mixer.c_proj', [MPT + 'attn.out_proj'], same),
    ('h.{i}.ffn.c_fc', [MPT + 'ffn.up_proj'], same), ('h.{i}.ffn.c_proj', [MPT + 'ffn.down_proj'], same)]


def read_mpt(hf, has):
    attn = hf.get('attn_config') or {}
    return {'pos': 'alibi', 'ffn': 'gelu', 'bias': False, 'qkv_clip': attn.get('clip_qkv') or None,
            'attn_scale': attn.get('softmax_scale') or None}


def write_mpt(c):
    return {'attn_config': {'clip_qkv': c.qkv_clip, 'softmax_scale': c.attn_scale, 'model_type': ''},
            'no_bias': True}


# ----------------------------------------------------------------------------------------------------------
# State spaces

MAMBA_KEYS = {'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
              'state_size': 'ssm_state', 'conv_kernel': 'ssm_conv', 'layer_norm_epsilon': 'norm_eps'}
B = 'backbone.layers.{i}.'
MAMBA_ENDS = [('wte', ['backbone.embeddings'], same), ('ln_f', ['backbone.norm_f'], same),
              ('lm_head', ['lm_head'], same), ('h.{i}.ln_1', [B + 'norm'], same)]


def scan_tensors(place, letter):
    """Mamba-1's mixer."""
    h = f'h.{{{letter}}}.mixer.'
    return [(h + 'in_proj', [place + 'in_proj'], same), (h + 'conv1d.weight', [place + 'conv1d.weight'], conv),
            (h + 'conv1d.bias', [place + 'conv1d.bias'], same), (h + 'x_proj', [place + 'x_proj'], same),
            (h + 'dt_proj', [place + 'dt_proj'], same), (h + 'A_log', [place + 'A_log'], same),
            (h + 'D', [place + 'D'], same), (h + 'c_proj', [place + 'out_proj'], same),
            *((h + f'{ours}_norm', [place + f'{theirs}_layernorm'], same)
              for ours, theirs in (('dt', 'dt'), ('b', 'b'), ('c', 'c')))]


MAMBA2_TENSORS = MAMBA_ENDS + [
    (f'h.{{i}}.mixer.{ours}', [f'{B}mixer.{theirs}'], layout) for ours, theirs, layout in (
        ('in_proj', 'in_proj', same), ('conv1d.weight', 'conv1d.weight', conv), ('conv1d.bias', 'conv1d.bias', same),
        ('dt_bias', 'dt_bias', same), ('A_log', 'A_log', same), ('D', 'D', same), ('norm', 'norm', same),
        ('c_proj', 'out_proj', same))]


def whole_number(hf, key, default):
    value = hf.get(key, default)
    if value != int(value):
        raise ValueError(f'{key}={value} in config.json must be a whole number')
    return int(value)


def read_state_space(hf, has):
    reading({'silu': True, 'swish': True}, hf, 'hidden_act', 'silu')
    return {'pos': 'none', 'norm': 'rmsnorm', 'layer_pattern': 'm', 'ffn_pattern': '-', 'bias': False,
            'ssm_expand': whole_number(hf, 'expand', 2), 'ssm_bias': has(B + 'mixer.in_proj.bias'),
            'conv_bias': has(B + 'mixer.conv1d.bias')}


def read_mamba(hf, has):
    rank = hf.get('time_step_rank', 'auto')
    return read_state_space(hf, has) | {'ssm': 'mamba1', 'ssm_dt_rank': None if rank == 'auto' else rank}


def write_state_space(c):
    return {'expand': c.ssm_expand, 'use_bias': c.ssm_bias, 'use_conv_bias': c.conv_bias, 'hidden_act': 'silu'}


def write_mamba(c):
    return write_state_space(c) | {'time_step_rank': c.ssm_dt_rank}


def number(value):
    """transformers writes infinity as a dictionary."""
    return float(value['__float__']) if isinstance(value, dict) else float(value)


def read_mamba2(hf, has):
    low, high = map(number, hf.get('time_step_limit') or (0.0, math.inf))
    expand, head = whole_number(hf, 'expand', 2), hf['head_dim']
    if hf['num_heads'] * head != expand * hf['hidden_size']:
        raise ValueError(f'num_heads={hf["num_heads"]} in config.json must be expand x hidden_size / head_dim')
    return read_state_space(hf, has) | {
        'ssm': 'mamba2', 'ssm_head_dim': head, 'ssm_groups': hf.get('n_groups', 8), 'ssm_dt_min': low,
        'ssm_dt_max': None if math.isinf(high) else high}


def write_mamba2(c):
    high = {'__float__': 'Infinity'} if c.ssm_dt_max is None else c.ssm_dt_max
    return write_state_space(c) | {
        'head_dim': c.ssm_head_dim, 'num_heads': c.ssm_expand * c.n_embd // c.ssm_head_dim,
        'n_groups': c.ssm_groups, 'time_step_limit': [c.ssm_dt_min, high]}


JAMBA_KEYS = LLAMA_KEYS | {'mamba_d_state': 'ssm_state', 'mamba_d_conv': 'ssm_conv'}
JAMBA_TENSORS = ENDS[:1] + ENDS[2:] + ATTENTION + scan_tensors(LAYER + 'mamba.', 'm') + gated('feed_forward') + \
    experts('feed_forward', router='router') + [
        ('ln_f', ['model.final_layernorm'], same), ('h.{i}.ln_1', [LAYER + 'input_layernorm'], same),
        ('h.{i}.ln_2', [LAYER + 'pre_ff_layernorm'], same)]


def read_jamba(hf, has):
    def every(what, letter, other, default):
        step, first = (hf.get(f'{what}_layer_{key}', value) for key, value in zip(('period', 'offset'), default))
        return ''.join(letter if i % step == first else other for i in range(hf['num_hidden_layers']))
    mixers = every('attn', 'a', 'm', (8, 4))
    ffns = every('expert', 'e', 'f', (2, 1)) if hf.get('num_experts', 16) > 1 else 'f'
    rank = hf.get('mamba_dt_rank', 'auto')
    flags = {'pos': 'none', 'norm': 'rmsnorm', 'ffn': reading(GATED, hf, 'hidden_act', 'silu'), 'bias': False,
             'layer_pattern': period(mixers), 'ffn_pattern': period(ffns)}
    if 'm' in mixers:
        flags |= {'ssm': 'mamba1', 'ssm_norm': True, 'ssm_expand': whole_number(hf, 'mamba_expand', 2),
                  'ssm_bias': has(LAYER + 'mamba.in_proj.bias'), 'conv_bias': has(LAYER + 'mamba.conv1d.bias'),
                  'ssm_dt_rank': None if rank == 'auto' else rank}
    if 'e' in ffns:
        flags |= {'n_expert': hf.get('num_experts', 16), 'n_expert_used': hf.get('num_experts_per_tok', 2),
                  'expert_width': hf['intermediate_size'], 'router_norm': False}
    return flags


def write_jamba(c):
    def every(letter, letters):
        """(period, offset) of a letter, where it has one."""
        n = c.n_layer
        return next(((step, first) for step in range(1, n + 2) for first in range(step)
                     if all((x == letter) == (i % step == first) for i, x in enumerate(letters))), (1, 0))
    attn, expert = (every(letter, letters) for letter, letters in zip('ae', map(''.join, zip(*c.plan()))))
    return {'hidden_act': word_for(GATED, c.ffn), 'attn_layer_period': attn[0], 'attn_layer_offset': attn[1],
            'expert_layer_period': expert[0], 'expert_layer_offset': expert[1], 'num_experts': c.n_expert or 1,
            'num_experts_per_tok': c.n_expert_used, 'mamba_expand': c.ssm_expand, 'mamba_dt_rank': c.ssm_dt_rank,
            'mamba_proj_bias': bool(c.ssm_bias), 'mamba_conv_bias': c.conv_bias,
            'intermediate_size': c.expert_width or c.ffn_width}


# ----------------------------------------------------------------------------------------------------------
# The families


class Family(NamedTuple):
    architecture: str       # its class in transformers
    keys: dict              # {key of config.json: flag}, where one is the other
    tensors: Callable       # (config, hf) -> rules
    read: Callable          # (hf, has) -> the other flags
    write: Callable         # config -> the other keys
    needs: dict = {}        # {key: the only value of it that we do}
    finish: Callable = lambda model, hf: None
    tied: bool = False      # the head, where the config does not say
    eps: float = 1e-6       # of norms, likewise
    # biases of query, key and value, of attention's output, of ffns: never 0, always 1, by one key a, another m
    biases: str = '000'
    partial: bool = False   # rotary positions may turn a part of each head


def family(architecture, keys, tensors, read, write, **more):
    return Family(architecture, keys, tensors if callable(tensors) else lambda c, hf: tensors, read, write, **more)


MIXTRAL_TENSORS = ENDS + NORMS + ATTENTION + experts('block_sparse_moe', ('w1', 'w3', 'w2'))
SPARSE_TENSORS = LLAMA_TENSORS + experts('mlp')
QWEN2_MOE_TENSORS = SPARSE_TENSORS + shared('mlp', 'shared_expert') + [
    ('h.{e}.ffn.shared_gate', [LAYER + 'mlp.shared_expert_gate'], same)]
SPARSE_KEYS = {key: flag for key, flag in MOE_KEYS.items() if key != 'num_experts_per_tok'}

# the first whose flags fit is the one that is written
FAMILIES = {
    'gpt2': family('GPT2LMHeadModel', GPT2_KEYS, GPT2_TENSORS, read_gpt2, write_gpt2, finish=finish_gpt2,
                   needs={'add_cross_attention': False}, tied=True, eps=1e-5, biases='111'),
    'llama': family('LlamaForCausalLM', LLAMA_KEYS, LLAMA_TENSORS, read_llama, write_llama, biases='aam'),
    'mistral': family('MistralForCausalLM', LLAMA_KEYS, LLAMA_TENSORS, read_mistral, write_window),
    'mixtral': family('MixtralForCausalLM', MOE_KEYS, MIXTRAL_TENSORS, read_mixtral, write_mixtral, eps=1e-5),
    'qwen2': family('Qwen2ForCausalLM', LLAMA_KEYS, LLAMA_TENSORS, read_qwen2, write_qwen2, biases='100'),
    'qwen3': family('Qwen3ForCausalLM', LLAMA_KEYS, LLAMA_TENSORS, read_qwen3, write_qwen2, biases='aa0'),
    'qwen2_moe': family('Qwen2MoeForCausalLM', SPARSE_KEYS, QWEN2_MOE_TENSORS, read_qwen2_moe, write_qwen2_moe,
                        biases='a00'),
    'qwen3_moe': family('Qwen3MoeForCausalLM', SPARSE_KEYS, SPARSE_TENSORS, read_qwen3_moe, write_qwen3_moe,
                        biases='aa0'),
    'gemma2': family('Gemma2ForCausalLM', LLAMA_KEYS, GEMMA_TENSORS, read_gemma2, write_gemma2, tied=True,
                     biases='aa0'),
    'gemma3_text': family('Gemma3ForCausalLM', LLAMA_KEYS, GEMMA_TENSORS, read_gemma3, write_gemma3, tied=True,
                          needs={'use_bidirectional_attention': False}, biases='aa0'),
    'phi3': family('Phi3ForCausalLM', LLAMA_KEYS, PHI3_TENSORS, read_phi3, write_phi3, eps=1e-5, partial=True),
    'olmo2': family('Olmo2ForCausalLM', LLAMA_KEYS, OLMO2_TENSORS, read_olmo2, write_llama, eps=1e-5,
                    biases='aa0'),
    'smollm3': family('SmolLM3ForCausalLM', LLAMA_KEYS, LLAMA_TENSORS, read_smollm3, write_smollm3, tied=True,
                      biases='aam'),
    'starcoder2': family('Starcoder2ForCausalLM', STARCODER2_KEYS, STARCODER2_TENSORS, read_starcoder2,
                         write_starcoder2, tied=True, eps=1e-5, biases='aaa'),
    'granite': family('GraniteForCausalLM', LLAMA_KEYS, LLAMA_TENSORS, read_granite, write_granite, biases='aam'),
    'cohere': family('CohereForCausalLM', COHERE_KEYS, COHERE_TENSORS, read_cohere, write_cohere, tied=True,
                     eps=1e-5, biases='aa0'),
    'llama4_text': family('Llama4ForCausalLM', SPARSE_KEYS, LLAMA4_TENSORS, read_llama4, write_llama4, eps=1e-5,
                          biases='aa0'),
    'gpt_oss': family('GptOssForCausalLM', SPARSE_KEYS, GPT_OSS_TENSORS, read_gpt_oss, write_gpt_oss, eps=1e-5,
                      biases='aa1'),
    'deepseek_v2': family('DeepseekV2ForCausalLM', DEEPSEEK_KEYS, deepseek_tensors, read_deepseek_v2,
                          write_deepseek_v2, biases='aa0'),
    'deepseek_v3': family('DeepseekV3ForCausalLM', DEEPSEEK_KEYS, deepseek_tensors, read_deepseek_v3,
                          write_deepseek_v3, biases='aa0'),
    'gpt_neox': family('GPTNeoXForCausalLM', NEOX_KEYS, NEOX_TENSORS, read_neox, write_neox, eps=1e-5,
                       biases='aa1', partial=True),
    'falcon': family('FalconForCausalLM', FALCON_KEYS, falcon_tensors, read_falcon, write_falcon, tied=True,
                     eps=1e-5, biases='aaa'),
    'bloom': family('BloomForCausalLM', BLOOM_KEYS, BLOOM_TENSORS, read_bloom, write_bloom, tied=True, eps=1e-5,
                    biases='111'),
    'mpt': family('MptForCausalLM', MPT_KEYS, MPT_TENSORS, read_mpt, write_mpt, tied=True, eps=1e-5),
    'mamba': family('MambaForCausalLM', MAMBA_KEYS, MAMBA_ENDS + scan_tensors(B + 'mixer.', 'i'), read_mamba,
                    write_mamba, tied=True, eps=1e-5),
    'mamba2': family('Mamba2ForCausalLM', MAMBA_KEYS, MAMBA2_TENSORS, read_mamba2, write_mamba2, eps=1e-5),
    'jamba': family('JambaForCausalLM', JAMBA_KEYS, JAMBA_TENSORS, read_jamba, write_jamba),
}

# what checkpoints hold besides weights: masks, tables of angles
STRAY = re.compile(r'(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.bias|'
                   r'\.attention\.masked_bias|self_attention\.masked_bias)$')
# what no family of ours does, whatever else its config says
NEEDS = {'quantization_config': None, 'is_encoder_decoder': False, 'vision_config': None, 'text_config': None}
# flags of training, which no checkpoint of theirs holds, and those that others have spelt out already
FREE = ('dropout', 'aux_weight', 'bias_rate', 'z_weight', 'n_predict', 'predict_weight', 'zero_init', 'bias')


def layers_of(c):
    """The layers that each letter in braces of a rule stands for."""
    plan = list(enumerate(c.plan()))
    return {'i': range(c.n_layer), 'a': [i for i, (mixer, _) in plan if mixer != 'm'],
            'm': [i for i, (mixer, _) in plan if mixer == 'm'], 'e': [i for i, (_, ffn) in plan if ffn == 'e'],
            'f': [i for i, (_, ffn) in plan if ffn == 'f']}


def matches(entry, c, hf, ours):
    """(our name, their names, layout) of every tensor in `ours` that a rule of the family is for."""
    layers = layers_of(c)
    for name, theirs, layout in entry.tensors(c, hf):
        letter = re.search(r'\{(\w)\}', name)
        for i in layers[letter[1]] if letter else [None]:
            mine = name.replace(letter[0], str(i)) if letter else name
            names = [t.replace('{i}', str(i)) for t in theirs]
            if '{n}' in names[0]:
                names = [t.replace('{n}', str(n)) for n in range(c.n_expert) for t in names]
            for leaf in ('', '.weight', '.bias'):
                if mine + leaf in ours:
                    yield mine + leaf, [t + leaf for t in names], layout


def tensors_of(model):
    """{name: tensor} of all that a checkpoint holds, a tied head once."""
    buffers = {name: b for name, b in model.named_buffers() if name.endswith('choice_bias')}
    return dict(model.named_parameters()) | buffers


class Files:
    """The tensors of a folder, read one by one from memory-mapped files."""

    def __init__(self, folder):
        from safetensors import safe_open
        self.folder, self.open = folder, {}
        single, index = (os.path.join(folder, f'model.safetensors{x}') for x in ('', '.index.json'))
        if os.path.exists(single):
            self.where = dict.fromkeys(self.file(safe_open, 'model.safetensors').keys(), 'model.safetensors')
        elif os.path.exists(index):
            with open(index) as f:
                self.where = json.load(f)['weight_map']
            for name in sorted(set(self.where.values())):
                held = set(self.file(safe_open, name).keys())
                for tensor in (t for t, file in self.where.items() if file == name and t not in held):
                    raise ValueError(f'{name} in {folder} must hold {tensor}, as its index says: fetch it again')
        elif os.path.exists(os.path.join(folder, 'pytorch_model.bin')):
            path = os.path.join(folder, 'pytorch_model.bin')
            try:
                self.pickled = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            except Exception:  # damaged, or no plain tensors: many classes
                raise ValueError(f'{path} must hold tensors and nothing else: fetch it again, or its safetensors '
                                 'instead') from None
            self.where = dict.fromkeys(self.pickled, 'pytorch_model.bin')
        else:
            raise FileNotFoundError(f'{folder} must hold model.safetensors, or model.safetensors.index.json and '
                                    'its shards')

    def file(self, safe_open, name):
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f'{name} is missing in {self.folder}, though its index names it: fetch it again')
        try:
            self.open[name] = safe_open(path, framework='pt')
        except Exception as error:  # safetensors has a class of its own
            raise ValueError(f'{path} is damaged ({error}): fetch it again') from None
        return self.open[name]

    def get(self, name):
        file = self.where[name]
        return self.open[file].get_tensor(name) if file in self.open else self.pickled[name]


def tokenizer_of(name):
    """The tokenizer of what from_pretrained(name) loads, from data/tokenizer.py; None where there is none."""
    from data.tokenizer import TiktokenTokenizer, from_folder, from_meta
    path = nanogpt_file(name)
    if path is None:
        folder = folder_of(name)
        with open(os.path.join(folder, 'config.json')) as f:
            gpt2 = json.load(f).get('vocab_size') == 50257
        return from_folder(folder) or (TiktokenTokenizer('gpt2') if gpt2 else None)
    state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    if 'meta' in state:
        return from_meta(state['meta']['tokenizer'])
    if state['model_args']['vocab_size'] in (50257, 50304):
        return TiktokenTokenizer('gpt2')
    # nanoGPT keeps characters beside its data, pickled: the same dataset prepared here has the same
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
    meta = os.path.join(here, os.path.basename(str(state.get('config', {}).get('dataset'))), 'meta.json')
    if os.path.exists(meta):
        with open(meta) as f:
            meta = json.load(f)
        if meta['vocab_size'] == state['model_args']['vocab_size']:
            return from_meta(meta['tokenizer'])
    return None


def same_tokenizer(name, meta):
    """Whether the tokenizer that `meta` describes makes of a text what that of from_pretrained(name) does."""
    from data.tokenizer import from_meta
    text = "def main(): return {'naïve': 3.14159}  # the Quick brown fox, 漢字 🙂\n\n\tand so on"
    ours, theirs = from_meta(meta), tokenizer_of(name)
    try:
        return theirs is None or ours.encode(text) == theirs.encode(text)
    except ValueError:  # a vocabulary of characters, not of these
        return ours.meta() == theirs.meta()


def nanogpt_file(name):
    """The path of a nanoGPT checkpoint, or one of ours, where `name` is one or a folder that holds one."""
    inside = os.path.join(name, 'ckpt.pt')
    if name.endswith('.pt'):
        return name
    return inside if os.path.exists(inside) and not os.path.exists(os.path.join(name, 'model.safetensors')) else None


def folder_of(name):
    """A folder as it is; anything else is a repository of the Hugging Face hub, which is downloaded."""
    if os.path.isdir(name):
        return name
    if re.fullmatch('gpt2(-medium|-large|-xl)?', name):
        name = f'openai-community/{name}'  # as nanoGPT calls them
    if name.count('/') != 1 or name[0] in './~' or os.path.exists(name):
        raise FileNotFoundError(f'{name} must be a folder with config.json and model.safetensors, or a repository '
                                'of the Hugging Face hub such as openai-community/gpt2')
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=['*.json', 'model*.safetensors', '*.model', '*.txt'])
    except Exception as error:  # no network, no such repository, no right to it: many classes
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f'{name} is no folder here, and the hub does not give it ({reason})') from None


def read_config(folder):
    """config.json of a folder, and its entry of FAMILIES."""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        raise FileNotFoundError(f'{folder} must hold config.json')
    with open(path) as f:
        try:
            hf = json.load(f)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path} is no JSON ({error}): fetch it again') from None
    kind = hf.get('model_type')
    for key, value in NEEDS.items():
        if hf.get(key, value) != value and hf[key] is not None:
            raise ValueError(f'{key} in {path} asks for what {kind} here does not do')
    if kind not in FAMILIES:
        raise ValueError(f'model_type={kind} in {path} must be one of {", ".join(FAMILIES)}')
    for key, value in FAMILIES[kind].needs.items():
        if hf.get(key, value) != value:
            raise ValueError(f'{key}={hf[key]} in {path} must be {value}: {kind} here does nothing else')
    return hf, FAMILIES[kind]


def flags_of(hf, entry, names):
    """All flags of GPTConfig that config.json and the names of the tensors stand for."""
    def has(name):
        return re.compile(re.escape(name).replace(r'\{i\}', r'\d+') + '$').search
    found = {}

    def holds(name):
        if name not in found:
            match = has(name)
            found[name] = any(map(match, names))
        return found[name]
    keys = {flag: hf[key] for key, flag in entry.keys.items() if hf.get(key) is not None}
    keys['norm_eps'] = float(keys.get('norm_eps', entry.eps))
    try:
        flags = keys | entry.read(hf, holds)
        for key in (key for key, flag in entry.keys.items() if flag in ('vocab_size', 'n_embd', 'n_layer')):
            if entry.keys[key] not in flags:
                raise KeyError(key)
    except KeyError as error:
        raise ValueError(f'config.json must say {error.args[0]}') from None
    if '-' in flags.get('ffn_pattern', 'f') or 'f' not in flags.get('ffn_pattern', 'f'):
        flags.pop('ffn_width', None)
    return flags


@torch.no_grad()
def from_pretrained(name, **overrides):
    """
    GPT of a folder or hub repository in Hugging Face format, or of a nanoGPT checkpoint, in fp32. overrides:
    flags of GPTConfig that shall be otherwise: what fits is copied, what can be is converted, the rest is drawn
    anew, and a line is printed for each kind. ValueError or FileNotFoundError, one sentence, where that
    cannot be; nothing is half-loaded.
    """
    name = os.fspath(name)
    path = nanogpt_file(name)
    model = from_nanogpt(path) if path else from_folder(folder_of(name))
    changed = {k: v for k, v in overrides.items() if getattr(model.config, k, None) != v or k not in FIELDS}
    return operate(model, changed) if changed else model


FIELDS = {f.name for f in fields(GPTConfig)}


def from_folder(folder):
    hf, entry = read_config(folder)
    files = Files(folder)
    # a base model's names have no prefix
    first = entry.tensors(GPTConfig(), hf)[0][1][0]
    prefix = first.partition('.')[0] + '.'
    bare = not any(name.startswith(prefix) for name in files.where)
    theirs = {(prefix + name if bare and name != 'lm_head.weight' else name): name for name in files.where}
    ignored = {name for name in theirs if STRAY.search(name)}
    flags = flags_of(hf, entry, theirs)
    rules = entry.tensors(GPTConfig(), hf)
    head = next(names[0] for ours, names, _ in rules if ours == 'lm_head') + '.weight'
    wte = next(names[0] for ours, names, _ in rules if ours == 'wte') + '.weight'
    flags['tie'] = hf.get('tie_word_embeddings', entry.tied)
    if head in theirs and flags['tie']:
        flags['tie'] = torch.equal(files.get(theirs[head]), files.get(theirs[wte]))
        ignored |= {head} if flags['tie'] else set()
    config = GPTConfig(**flags)
    model = GPT(config, seed=None).eval()
    # DeepSeek V3's further predictions are layers behind the last
    further = re.compile(rf'model\.layers\.({"|".join(str(config.n_layer + k) for k in range(4))})\.')
    if hf.get('num_nextn_predict_layers'):
        ignored |= {name for name in theirs if further.match(name)}
    fill(model, entry, hf, files, theirs, ignored, folder)
    entry.finish(model, hf)
    return model


def fill(model, entry, hf, files, theirs, ignored, folder):
    """Copy every tensor of the files to its place in the model: each once, and all of them."""
    ours, used = tensors_of(model), set(ignored)
    missing = set(ours)
    for mine, names, layout in matches(entry, model.config, hf, ours):
        for name, piece in zip(names, layout(ours[mine], model.config), strict=True):
            if name not in theirs:
                raise ValueError(f'{folder} must hold the tensor {name}, which {hf["model_type"]} needs')
            tensor = files.get(theirs[name])
            if tuple(tensor.shape) != piece.shape:
                raise ValueError(f'{name} in {folder} has the shape {tuple(tensor.shape)} and must have '
                                 f'{piece.shape}, as config.json says')
            piece.load(tensor)
            used.add(name)
        missing.discard(mine)
    if missing:
        raise ValueError(f'{hf["model_type"]} has no tensor for {min(missing)}')
    unused = sorted(theirs.keys() - used)
    if unused:
        raise ValueError(f'{unused[0]} in {folder} has no place in {hf["model_type"]}'
                         + (f', nor have {len(unused) - 1} more tensors' if unused[1:] else ''))


@torch.no_grad()
def from_nanogpt(path):
    """A checkpoint of nanoGPT: its model_args, its names with or without what torch.compile puts before them."""
    import checkpoint
    state = checkpoint.load(path, needed=('model',))
    if 'model_args' not in state:
        return checkpoint.build(checkpoint.load(path), path).eval()  # one of ours
    known = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    odd = sorted(state['model_args'].keys() - known)
    if odd:
        raise ValueError(f'{odd[0]} in {path} is no setting of nanoGPT')
    model = GPT(GPTConfig(**state['model_args']), seed=None).eval()
    theirs = {name.removeprefix('_orig_mod.'): t for name, t in state['model'].items()}
    renamed = {'wpe.weight': 'wpe.weight'}
    for name, p in tensors_of(model).items():
        mine = renamed.get(name, name).replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.')
        tensor = theirs.pop(f'transformer.{mine}', None)
        if tensor is None or tensor.shape != p.shape:
            raise ValueError(f'{path} must hold transformer.{mine} of the shape {tuple(p.shape)}')
        p.copy_(tensor)
    theirs = sorted(name for name in theirs if name != 'lm_head.weight' and not STRAY.search(name))
    if theirs:
        raise ValueError(f'{theirs[0]} in {path} has no place in GPT-2')
    return model


# ----------------------------------------------------------------------------------------------------------
# Surgery: another model with what fits of the weights


def operate(model, overrides):
    """A model whose flags are these, otherwise the same, from the weights of `model`."""
    old = model.config
    for name, value in overrides.items():
        if name not in FIELDS:
            raise ValueError(f'{name} is no flag of GPTConfig')
        if name in ('attn', 'n_embd', 'n_head', 'head_dim'):
            raise ValueError(f'{name}={value} must be {getattr(old, name)} as in the checkpoint: with another there '
                             'is nothing of its attention to keep')
    flags = asdict(old) | overrides
    # widths that follow from others follow the new ones, unless they were asked for
    for name in ('expert_width', 'shared_width', 'n_kv_head') if 'n_expert' in overrides else ():
        if name not in overrides and name != 'n_kv_head':
            flags[name] = None
    if 'e' in flags['ffn_pattern'] and 'e' not in old.ffns() and 'expert_width' not in overrides:
        flags['expert_width'] = old.ffn_width
    new = GPT(GPTConfig(**flags)).eval()
    ours, theirs = tensors_of(new), tensors_of(model)
    done = {'copied': [], 'converted': [], 'newly initialised': []}
    for name, p in ours.items():
        source = theirs.get(name)
        if source is not None and source.shape == p.shape:
            p.copy_(source)
            done['copied'].append(name)
        elif source is not None and convert(name, p, source, old, new.config):
            done['converted'].append(name)
        else:
            done['newly initialised'].append(name)
    done['left out'] = [name for name in theirs if name not in ours]
    said = ', '.join(f'{k}={v}' for k, v in overrides.items())
    for what, names in done.items():
        if names:
            some = ', '.join(names[:3]) + (', ...' if names[3:] else '')
            print(f'{said}: {len(names)} tensors {what}' + ('' if what == 'copied' else f' ({some})'))
    return new


def convert(name, p, source, old, new):
    """Fill p with what `source`, the tensor of that name under the old flags, has to give; False: nothing."""
    if name.endswith(('mixer.c_attn.weight', 'mixer.c_attn.bias')) and old.head_dim == new.head_dim and \
            old.n_head == new.n_head and p.shape[1:] == source.shape[1:]:
        # heads that shall share a key take the mean of theirs (Ainslie et al. 2023, section 2.1)
        query, key, value = source.split(heads(old))
        if old.n_kv_head % new.n_kv_head == 0:
            key, value = (x.unflatten(0, (new.n_kv_head, -1, new.head_dim)).mean(1).flatten(0, 1)
                          for x in (key, value))
        elif new.n_kv_head % old.n_kv_head == 0:
            times = new.n_kv_head // old.n_kv_head
            key, value = (x.unflatten(0, (-1, new.head_dim)).repeat_interleave(times, 0).flatten(0, 1)
                          for x in (key, value))
        else:
            return False
        p.copy_(torch.cat((query, key, value)))
        return True
    if '.ffn.' in name and p.dim() == source.dim() + 1 and p.shape[1:] == source.shape:
        p.copy_(source.expand_as(p))  # every expert begins as the dense ffn (sparse upcycling, Komatsuzaki 2023)
        return True
    if name in ('wte.weight', 'lm_head.weight', 'wpe.weight') and p.shape[1:] == source.shape[1:]:
        rows = min(len(p), len(source))
        p[:rows] = source[:rows]
        return True
    return False


# ----------------------------------------------------------------------------------------------------------
# Export


def differences(c, d):
    """{flag: (its value in c, in d)} where two configs differ in what a checkpoint must say."""
    def same(x, y):
        return x == y or isinstance(x, float) and isinstance(y, (float, int)) and math.isclose(x, y, rel_tol=1e-6)
    found = {f: (getattr(c, f), getattr(d, f)) for f in FIELDS - set(FREE) if not same(getattr(c, f), getattr(d, f))}
    if c.plan() == d.plan():
        found = {f: pair for f, pair in found.items() if not f.endswith('_pattern')}
    if 'f' not in c.ffns():
        found.pop('ffn_width', None)
    if {c.balance, d.balance} <= {'none', 'aux'} or {c.balance, d.balance} <= {'bias', 'both'}:
        found.pop('balance', None)
    if c.pos != 'learned':
        found.pop('block_size', None)  # no more than a hint
    if not c.attends():
        found.pop('n_head', None)
    return found


def unlike(c, entry):
    """As differences, between c and what the family's class has whatever the config says."""
    found, free = {}, {}
    for flag, code in zip(('qkv_bias', 'proj_bias', 'ffn_bias'), entry.biases):
        value = getattr(c, flag)
        there = {'0': False, '1': True}.get(code, free.setdefault(code, value))
        if value is not None and value != there:
            found[flag] = value, there
    if c.rope_fraction != 1 and not entry.partial:
        found['rope_fraction'] = c.rope_fraction, 1.0
    return found


def family_for(model):
    """(model_type, config.json) of the family that these flags are; ValueError naming the flags in the way."""
    c, nearest = model.config, None
    for kind, entry in FAMILIES.items():
        hf = {key: getattr(c, flag) for key, flag in entry.keys.items() if getattr(c, flag) is not None}
        hf |= {'model_type': kind, 'architectures': [entry.architecture], 'tie_word_embeddings': c.tie,
               **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))}
        try:
            hf |= entry.write(c)
            names = {t for _, theirs, _ in matches(entry, c, hf, tensors_of(model)) for t in theirs}
            back = GPTConfig(**flags_of(hf, entry, names) | {'tie': c.tie})
            left = differences(c, back) | unlike(c, entry)
            uncovered = tensors_of(model).keys() - {mine for mine, _, _ in matches(entry, c, hf, tensors_of(model))}
            uncovered = {name for name in uncovered if not name.startswith('further.') and not (
                c.tie and name == 'lm_head.weight')}
        except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError):
            continue
        if not left and not uncovered:
            return kind, hf
        if left and (nearest is None or len(left) < len(nearest[1])):
            nearest = kind, left
    if nearest is None:
        raise ValueError(f'attn={c.attn} with layer_pattern={c.layer_pattern} belongs to no published family')
    kind, left = nearest
    told = ', '.join(f'{name}={ours} ({theirs} there)' for name, (ours, theirs) in sorted(left.items()))
    raise ValueError(f'these flags belong to no published family; {kind}, the nearest, differs in {told}')


@torch.no_grad()
def save_pretrained(model, folder):
    """
    Write config.json and model.safetensors, in the names of the published family that the model's flags are, for
    `transformers` to load. ValueError where there is none.
    """
    from safetensors.torch import save_file
    kind, hf = family_for(model)
    entry, ours, tensors = FAMILIES[kind], tensors_of(model), {}
    for mine, names, layout in matches(entry, model.config, hf, ours):
        pieces = layout(ours[mine].detach().float().cpu(), model.config)
        tensors |= {name: piece.save() for name, piece in zip(names, pieces, strict=True)}
    if model.config.n_predict > 1:
        print(f'n_predict={model.config.n_predict}: the blocks of further predictions are left out, as they are '
              'for training only')
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(hf | {'dtype': 'float32'}, f, indent=1)
