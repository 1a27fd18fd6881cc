"""
The families of published checkpoints: what their config.json and their tensors are in our words.

FAMILIES has an entry for each model_type, and pretrained.py knows nothing else of it. Of an entry's fields,
`keys` says which key of config.json is which flag of GPTConfig, `rules` which of their tensors is which of
ours, `flags` what is so in every model of the family, `defaults` what a key means where it is absent; `read`
and `write` are for what is no renaming. All of it works in both directions.

Adding a family: an entry, as this one, which would add Arcee's AFM, a Llama whose ffn has no gate:

    FAMILIES['arcee'] = Family(
        'ArceeForCausalLM', LLAMA_KEYS | BIAS_KEYS | {'hidden_act': words('ffn', {'relu2': 'relu2'})},
        ENDS + NORMS + ATTENTION + plain('mlp', 'up_proj', 'down_proj'), flags=LLAMA,
        defaults={'rms_norm_eps': 1e-5, 'hidden_act': 'relu2'}, read=read_rope, write=write_rope)

The facts are those of published checkpoints and of `transformers`, whose logits each family's equal.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

# ----------------------------------------------------------------------------------------------------------
# Layouts: functions (our tensor, config) -> a Piece for each of their tensors. The parts of a piece are
# views, so that the same lines load and save.


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


def conv(p, c):
    """(I,W) as (I,1,W)"""
    return [whole(p, (p.shape[0], 1, p.shape[1]))]


def each_expert(p, c):
    """(E,out,in) as E tensors"""
    return [whole(expert) for expert in p]


def each_expert_halves(p, c):
    """(E,2I,C) as gate and up of each expert"""
    return [whole(half) for expert in p for half in expert.chunk(2)]


def in_out(p, c):
    """(E,out,in) as (E,in,out)"""
    return [whole(p.transpose(1, 2))]


def heads(c):
    """Rows of query, key and value."""
    return c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim


def qkv(p, c):
    """Query, key and value, each a tensor."""
    return [whole(part) for part in p.split(heads(c))]


def in_turns(p, views, widths):
    """One tensor of some rows of the first view, some of the second, ..., and again: `widths` of each."""
    def part(theirs, n):
        return theirs.unflatten(0, (-1, sum(widths))).split(widths, dim=1)[n]
    return [Piece(tuple(p.shape), [(view, partial(part, n=n)) for n, view in enumerate(views)])]


def qkv_by_group(p, c):
    """The queries that share a key, this key and its value, then those of the next key."""
    group = c.n_head // c.n_kv_head * c.head_dim
    views = [part.unflatten(0, (c.n_kv_head, -1)) for part in p.split(heads(c))]
    return in_turns(p, views, (group, c.head_dim, c.head_dim))


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
    """A weight per head and coordinate, (H,D)."""
    return [whole(pairs(p, 1), p.shape)]


def turned_last(p, widths):
    """Rows of which widths[0] do not turn and widths[1] do, interleaved, and again."""
    lead, turned = p.unflatten(0, (-1, sum(widths))).split(widths, dim=1)
    return in_turns(p, (lead, pairs(turned, 1)), widths)


def mla_query(p, c):
    return turned_last(p, (c.head_dim, c.rope_head_dim))


def mla_latent(p, c):
    return turned_last(p, (c.kv_rank, c.rope_head_dim))


def gate_up_in_turns(p, c):
    """Columns of gate and up in turns: (E,C,2I) of our (E,2I,C), or biases (E,2I)."""
    view = pairs(p, 1)
    if p.dim() == 2:
        return [whole(view, p.shape)]
    return [whole(view.movedim(-1, 1), (p.shape[0], p.shape[2], p.shape[1]))]


# ----------------------------------------------------------------------------------------------------------
# Keys


class Key(NamedTuple):
    """A key of config.json that says a flag in other words."""
    flag: str
    read: Callable          # (value, hf) -> the flag's; ValueError that says what the value must
    write: Callable         # config -> the key's


def words(flag, table):
    """A key whose values are other words for those of the flag; the first of several is written."""
    def read(word, hf):
        if word not in table:
            raise ValueError(f'be one of {", ".join(map(str, table))}')
        return table[word]

    def write(c):
        return next((word for word, value in table.items() if value == getattr(c, flag)), None)
    return Key(flag, read, write)


def whole_number(flag):
    def read(value, hf):
        if value != int(value):
            raise ValueError('be a whole number')
        return int(value)
    return Key(flag, read, lambda c: getattr(c, flag))


def width_of_head(hf):
    return hf.get('head_dim') or hf['hidden_size'] // hf['num_attention_heads']


def score_scale(read, write):
    """A key that says attn_scale; the usual one is None in ours."""
    def flag(value, hf):
        return None if math.isclose(read(value), width_of_head(hf) ** -0.5) else float(read(value))

    def key(c):
        return write(c.head_dim ** -0.5 if c.attn_scale is None else c.attn_scale)
    return Key('attn_scale', flag, key)


GATED = words('ffn', {
    'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu',
    'gelu_fast': 'geglu', 'gelu': 'geglu_erf', 'relu': 'reglu'})
PLAIN = words('ffn', {
    'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'relu': 'relu'})
RANK = Key('ssm_dt_rank', lambda rank, hf: None if rank == 'auto' else rank, lambda c: c.ssm_dt_rank)


def without(table, *keys):
    return {key: value for key, value in table.items() if key not in keys}


def refuse(hf, key, rule):
    raise ValueError(f'{key}={hf.get(key)} in config.json must {rule}')


# ----------------------------------------------------------------------------------------------------------
# Layers of several kinds


def period(letters):
    """The shortest pattern that repeats to these letters."""
    letters = ''.join(letters)
    return next(letters[:n] for n in range(1, len(letters) + 1)
                if all(letters[i] == letters[i % n] for i in range(len(letters))))


def by_layer(hf, letter):
    """A pattern from a function of the layer's number."""
    return period(letter(i) for i in range(hf['num_hidden_layers']))


KINDS = {'full_attention': 'a', 'attention': 'a', 'sliding_attention': 'w', 'chunked_attention': 'c'}
TYPES = {'a': 'full_attention', 'n': 'full_attention', 'w': 'sliding_attention', 'v': 'sliding_attention',
         'c': 'chunked_attention'}


def mixers(hf, otherwise):
    """The mixer of each layer as a letter: from layer_types, otherwise from a function of its number."""
    kinds, n = hf.get('layer_types'), hf['num_hidden_layers']
    if kinds is None:
        return ''.join(otherwise(i) for i in range(n))
    if len(kinds) != n or not set(kinds) <= KINDS.keys():
        refuse(hf, 'layer_types', f'say one of {", ".join(KINDS)} for each of {n} layers')
    return ''.join(KINDS[kind] for kind in kinds)


def write_types(c):
    return {'layer_types': [TYPES[mixer] for mixer, _ in c.plan()]}


def windowed(hf):
    """A window in every layer, where there is one."""
    return {'layer_pattern': 'w' if hf.get('sliding_window') else 'a'}


def sparse_layers(c):
    return [i for i, (_, ffn) in enumerate(c.plan()) if ffn == 'e']


# ----------------------------------------------------------------------------------------------------------
# Rotary positions, in the words of transformers 5 and of what was published before

SCALED_KEYS = {'factor': 'rope_factor', 'original_max_position_embeddings': 'rope_context'}
# {rope_type: {its parameter: flag}}
SCALING = {
    'linear': {'factor': 'rope_factor'},
    'dynamic': {'factor': 'rope_factor'},
    'yarn': SCALED_KEYS | {'beta_fast': 'rope_beta_fast', 'beta_slow': 'rope_beta_slow',
                           'truncate': 'rope_truncate', 'attention_factor': 'rope_attention_factor'},
    'llama3': SCALED_KEYS | {'low_freq_factor': 'rope_low_freq', 'high_freq_factor': 'rope_high_freq'},
    'longrope': SCALED_KEYS | {'short_factor': 'rope_short', 'long_factor': 'rope_long',
                               'attention_factor': 'rope_attention_factor'},
}
MUST = ('low_freq_factor', 'high_freq_factor', 'short_factor', 'long_factor')


def rope_parameters(hf):
    return hf.get('rope_scaling') or hf.get('rope_parameters') or {}


def read_rope(hf, parameters=None, partial=False):
    """
    Flags of rotary positions. parameters: those to read, where config.json has several. partial: whether the
    family may turn a part of each head.
    """
    p = parameters or rope_parameters(hf)
    flags = {'rope_theta': float(p.get('rope_theta') or hf['rope_theta'])}
    share = p.get('partial_rotary_factor') or hf.get('partial_rotary_factor') or 1
    if partial and share != 1:
        width = int(width_of_head(hf) * share)
        if width % 2:
            raise ValueError(f'partial_rotary_factor={share} in config.json must turn an even number of the '
                             f'{width_of_head(hf)} coordinates of a head, and not {width}')
        flags['rope_fraction'] = width / width_of_head(hf)
    kind = p.get('rope_type') or p.get('type') or 'default'
    if kind == 'default':
        return flags
    if kind not in SCALING:
        raise ValueError(f'rope_type={kind} in config.json must be one of default, {", ".join(SCALING)}')
    return flags | read_scaling(hf, p, kind)


def read_scaling(hf, p, kind):
    before, longest = 'original_max_position_embeddings', 'max_position_embeddings'
    trained = hf.get(before) or p.get(before) or hf[longest]
    p = p | {'factor': p.get('factor') or hf[longest] / trained, before: trained}
    if kind == 'longrope':
        p['factor'] = max(p['factor'], 1.0)
    elif p['factor'] < 1:
        raise ValueError(f'factor={p["factor"]} of rope_type={kind} in config.json must be at least 1')
    elif p['factor'] == 1 and kind != 'dynamic':
        if (p.get('attention_factor') or 1) != 1:
            raise ValueError(f'attention_factor={p["attention_factor"]} in config.json must be 1 when factor '
                             'is 1, which scales nothing')
        return {}
    flags = {'rope_scaling': kind} | {flag: p[key] for key, flag in SCALING[kind].items()
                                      if key in MUST or p.get(key) is not None}
    if kind == 'dynamic':
        flags['rope_context'] = hf[longest]
    m, m_all = p.get('mscale'), p.get('mscale_all_dim')
    if kind == 'yarn' and p.get('attention_factor') is None and m and m_all:
        flags['rope_attention_factor'] = mscale(p['factor'], m) / mscale(p['factor'], m_all)
    return flags


def mscale(factor, m=1.0):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rope_of(c):
    """rope_parameters as transformers 5 has them."""
    p = {'rope_theta': c.rope_theta, 'rope_type': 'default' if c.rope_scaling == 'none' else c.rope_scaling}
    if c.rope_fraction != 1:
        p['partial_rotary_factor'] = c.rope_fraction
    scaling = SCALING.get(c.rope_scaling, {})
    return p | {key: getattr(c, flag) for key, flag in scaling.items() if getattr(c, flag) is not None}


def write_rope(c):
    return {'rope_parameters': rope_of(c)}


# ----------------------------------------------------------------------------------------------------------
# An entry


class Family(NamedTuple):
    architecture: str       # its class in transformers
    keys: dict              # {key of config.json: flag, flags, or Key}
    rules: list | Callable  # [(our name, their names, layout)], the embedding first; or (config, hf) -> that
    flags: dict = {}        # those that all its models have
    defaults: dict = {}     # what a key means that is absent, beside DEFAULTS
    read: Callable = lambda hf: {}      # -> further flags, from config.json with defaults and without nulls
    write: Callable = lambda c: {}      # -> further keys
    mixers: str = 'a'       # the letters of layer_pattern that it may have
    synonyms: dict = {}     # {another name of a key: the key}
    needs: dict = {}        # {key: the only value of it that we do}
    finish: Callable = lambda model, hf: None   # what is left to do to a loaded model


# what a key means that is absent, unless the family says otherwise
DEFAULTS = {
    'tie_word_embeddings': False, 'rope_theta': 10000.0, 'hidden_act': 'silu', 'attention_bias': False,
    'mlp_bias': False, 'rms_norm_eps': 1e-6, 'layer_norm_eps': 1e-5, 'layer_norm_epsilon': 1e-5}
TIED = {'tie_word_embeddings': True}
LAYERNORM = {'norm': 'layernorm', 'norm_bias': True}
ALL_BIASES = {'qkv_bias': True, 'proj_bias': True, 'ffn_bias': True}

# {model_type: Family}; in export the first whose flags fit is the one that is written
FAMILIES = {}

# In rules {i} is any layer, {a} one that attends, {m} a state space, {f} a dense ffn, {e} experts; {n} is an
# expert. Weights and biases go together, where neither is named.

# ----------------------------------------------------------------------------------------------------------
# Llama, Mistral

LLAMA_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head', 'num_key_value_heads': 'n_kv_head', 'head_dim': 'head_dim',
    'intermediate_size': 'ffn_width', 'max_position_embeddings': 'block_size', 'rms_norm_eps': 'norm_eps',
    'hidden_act': GATED, 'tie_word_embeddings': 'tie'}
ATTENTION_BIAS = {'attention_bias': ('qkv_bias', 'proj_bias')}
BIAS_KEYS = ATTENTION_BIAS | {'mlp_bias': 'ffn_bias'}
WINDOW_KEYS = LLAMA_KEYS | {'sliding_window': 'window'}
LLAMA = {'pos': 'rope', 'norm': 'rmsnorm', 'bias': False}

L = 'model.layers.{i}.'
ENDS = [('wte', ['model.embed_tokens'], same), ('ln_f', ['model.norm'], same), ('lm_head', ['lm_head'], same)]
NORMS = [('h.{i}.ln_1', [L + 'input_layernorm'], same),
         ('h.{i}.ln_2', [L + 'post_attention_layernorm'], same)]
ATTENTION = [
    ('h.{a}.mixer.c_attn', [L + f'self_attn.{x}_proj' for x in 'qkv'], qkv),
    ('h.{a}.mixer.c_proj', [L + 'self_attn.o_proj'], same),
    ('h.{a}.mixer.q_norm', [L + 'self_attn.q_norm'], same),
    ('h.{a}.mixer.k_norm', [L + 'self_attn.k_norm'], same)]


def gated(place, ours='h.{f}.ffn'):
    return [(f'{ours}.c_fc', [L + f'{place}.{x}_proj' for x in ('gate', 'up')], halves),
            (f'{ours}.c_proj', [L + f'{place}.down_proj'], same)]


def plain(place, up, down, layer=L):
    return [('h.{f}.ffn.c_fc', [f'{layer}{place}.{up}'], same),
            ('h.{f}.ffn.c_proj', [f'{layer}{place}.{down}'], same)]


LLAMA_RULES = ENDS + NORMS + ATTENTION + gated('mlp')


FAMILIES['llama'] = Family(
    'LlamaForCausalLM', LLAMA_KEYS | BIAS_KEYS, LLAMA_RULES, LLAMA, read=read_rope, write=write_rope)


def read_mistral(hf):
    return read_rope(hf) | windowed(hf)


FAMILIES['mistral'] = Family(
    'MistralForCausalLM', WINDOW_KEYS, LLAMA_RULES, LLAMA, {'sliding_window': 4096}, read_mistral, write_rope,
    'aw')


# ----------------------------------------------------------------------------------------------------------
# Mixtral

EXPERT_KEYS = {'num_local_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used'}


def experts(place, names=('gate_proj', 'up_proj', 'down_proj'), router='gate'):
    gate, up, down = (L + f'{place}.experts.{{n}}.{name}' for name in names)
    return [('h.{e}.ffn.router', [L + f'{place}.{router}'], same),
            ('h.{e}.ffn.c_fc', [gate, up], each_expert_halves), ('h.{e}.ffn.c_proj', [down], each_expert)]


def shared(place):
    return gated(place, 'h.{e}.ffn.shared')


FAMILIES['mixtral'] = Family(
    'MixtralForCausalLM', WINDOW_KEYS | EXPERT_KEYS | {'intermediate_size': 'expert_width'},
    ENDS + NORMS + ATTENTION + experts('block_sparse_moe', ('w1', 'w3', 'w2')), LLAMA | {'ffn_pattern': 'e'},
    {'rope_theta': 1e6, 'rms_norm_eps': 1e-5, 'num_experts_per_tok': 2}, read_mistral, write_rope, 'aw',
    {'num_experts': 'num_local_experts'})

# ----------------------------------------------------------------------------------------------------------
# Qwen 2 and 3, with experts and without

QWEN = {'use_sliding_window': False, 'max_window_layers': 28, 'sliding_window': 4096}


def read_qwen(hf):
    use = hf['use_sliding_window'] and hf.get('sliding_window')
    return read_rope(hf) | {'layer_pattern': period(mixers(
        hf, lambda i: 'w' if use and i >= hf['max_window_layers'] else 'a'))}


def write_qwen(c):
    return write_rope(c) | write_types(c) | {'use_sliding_window': c.window is not None}


FAMILIES['qwen2'] = Family(
    'Qwen2ForCausalLM', WINDOW_KEYS, LLAMA_RULES, LLAMA | {'qkv_bias': True},
    QWEN, read_qwen, write_qwen, 'aw')
FAMILIES['qwen3'] = Family(
    'Qwen3ForCausalLM', WINDOW_KEYS | ATTENTION_BIAS, LLAMA_RULES, LLAMA | {'qk_norm': True},
    QWEN | {'head_dim': 128}, read_qwen, write_qwen, 'aw')

SPARSE_KEYS = WINDOW_KEYS | {
    'num_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used',
    'moe_intermediate_size': 'expert_width', 'norm_topk_prob': 'router_norm'}
SPARSE = QWEN | {'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': False}


def read_sparse(hf):
    """Experts in every decoder_sparse_step-th layer but those of mlp_only_layers."""
    step, dense = hf['decoder_sparse_step'], hf.get('mlp_only_layers', ())
    return {'ffn_pattern': by_layer(hf, lambda i: 'f' if i in dense or (i + 1) % step else 'e')}


def write_sparse(c):
    dense = [i for i in range(c.n_layer) if i not in sparse_layers(c)]
    return write_qwen(c) | {'decoder_sparse_step': 1, 'mlp_only_layers': dense}


def read_qwen2_moe(hf):
    # the rule for windows is another than Qwen 2's
    use, first = hf['use_sliding_window'], hf['max_window_layers']
    letters = mixers(hf, lambda i: 'w' if use and i % 2 == 0 and i < first else 'a')
    return read_rope(hf) | read_sparse(hf) | {'layer_pattern': period(letters)}


def read_qwen3_moe(hf):
    window = hf if hf['use_sliding_window'] else {}
    return read_rope(hf) | read_sparse(hf) | windowed(window)


FAMILIES['qwen2_moe'] = Family(
    'Qwen2MoeForCausalLM',
    SPARSE_KEYS | {'qkv_bias': 'qkv_bias', 'shared_expert_intermediate_size': 'shared_width'},
    LLAMA_RULES + experts('mlp') + shared('mlp.shared_expert') + [
        ('h.{e}.ffn.shared_gate', [L + 'mlp.shared_expert_gate'], same)],
    LLAMA | {'n_shared': 1, 'shared_gate': True}, SPARSE | {'qkv_bias': True, 'num_experts_per_tok': 4},
    read_qwen2_moe, write_sparse, 'aw', {'num_local_experts': 'num_experts'})
FAMILIES['qwen3_moe'] = Family(
    'Qwen3MoeForCausalLM', SPARSE_KEYS | ATTENTION_BIAS, LLAMA_RULES + experts('mlp'),
    LLAMA | {'qk_norm': True}, SPARSE | {'num_experts_per_tok': 8}, read_qwen3_moe, write_sparse, 'aw',
    {'num_local_experts': 'num_experts'})

# ----------------------------------------------------------------------------------------------------------
# Gemma: norms before and after each branch, whose weights are offset by one

GEMMA = LLAMA | {'norm_at': 'sandwich', 'embed_scale': True}
GEMMA_DEFAULTS = TIED | {'head_dim': 256, 'query_pre_attn_scalar': 256, 'sliding_window': 4096,
                         'hidden_activation': 'gelu_pytorch_tanh'}


def to_integer(x):
    return round(x) if math.isclose(x, round(x), rel_tol=1e-6) else x


GEMMA_KEYS = without(WINDOW_KEYS, 'hidden_act') | ATTENTION_BIAS | {
    'hidden_activation': GATED, 'final_logit_softcapping': 'logit_softcap',
    'query_pre_attn_scalar': score_scale(lambda x: x ** -0.5, lambda scale: to_integer(scale ** -2))}
GEMMA_RULES = [
    (ours, theirs, offset if 'ln_' in ours or '_norm' in ours else layout)
    for ours, theirs, layout in ENDS + ATTENTION + gated('mlp') + [
        ('h.{i}.ln_1', [L + 'input_layernorm'], same),
        ('h.{i}.ln_1_out', [L + 'post_attention_layernorm'], same),
        ('h.{i}.ln_2', [L + 'pre_feedforward_layernorm'], same),
        ('h.{i}.ln_2_out', [L + 'post_feedforward_layernorm'], same)]]


def alternating(hf):
    """Windows in every other layer, from the first."""
    return {'layer_pattern': period(mixers(hf, lambda i: 'a' if i % 2 else 'w'))}


def write_alternating(c):
    # transformers wants a window where no layer has one
    return write_rope(c) | write_types(c) | ({} if c.window else {'sliding_window': 4096})


def read_gemma2(hf):
    return read_rope(hf) | alternating(hf)


FAMILIES['gemma2'] = Family(
    'Gemma2ForCausalLM', GEMMA_KEYS | {'attn_logit_softcapping': 'softcap'}, GEMMA_RULES, GEMMA,
    GEMMA_DEFAULTS | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}, read_gemma2,
    write_alternating, 'aw', {'hidden_act': 'hidden_activation'})


def read_gemma3(hf):
    both, every = hf.get('rope_parameters', {}), hf['sliding_window_pattern']
    letters = mixers(hf, lambda i: 'w' if (i + 1) % every else 'a')
    local = both.get('sliding_attention') or {'rope_theta': hf['rope_local_base_freq']}
    if (local.get('rope_type') or 'default') != 'default' and 'w' in letters:
        raise ValueError(f'rope_type={local["rope_type"]} of sliding_attention in config.json must be '
                         'default, as windowed layers are not scaled here')
    theta = {'rope_local_theta': float(local.get('rope_theta') or hf['rope_local_base_freq'])}
    return read_rope(hf, both.get('full_attention')) | theta | {'layer_pattern': period(letters)}


def write_gemma3(c):
    local = {'rope_theta': c.rope_local_theta or c.rope_theta, 'rope_type': 'default'}
    return write_alternating(c) | {
        'rope_parameters': {'full_attention': rope_of(c), 'sliding_attention': local}}


FAMILIES['gemma3_text'] = Family(
    'Gemma3ForCausalLM', GEMMA_KEYS, GEMMA_RULES, GEMMA | {'qk_norm': True},
    GEMMA_DEFAULTS | {'rope_theta': 1e6, 'rope_local_base_freq': 1e4, 'sliding_window_pattern': 6},
    read_gemma3, write_gemma3, 'aw',
    {'hidden_act': 'hidden_activation', '_sliding_window_pattern': 'sliding_window_pattern'},
    {'use_bidirectional_attention': False})

# ----------------------------------------------------------------------------------------------------------
# Phi 3, OLMo 2, StarCoder 2, Granite, Cohere

PHI3_RULES = ENDS + NORMS + ATTENTION[1:2] + plain('mlp', 'gate_up_proj', 'down_proj') + [
    ('h.{a}.mixer.c_attn', [L + 'self_attn.qkv_proj'], same)]


def read_phi3(hf):
    p = rope_parameters(hf)
    kind = p.get('rope_type') or p.get('type') or 'default'
    if kind not in ('default', 'longrope', 'su', 'yarn'):
        raise ValueError(f'rope_type={kind} in config.json must be default or longrope in a Phi 3')
    # which the first of them call otherwise
    kind = kind if kind == 'default' else 'longrope'
    return read_rope(hf, p | {'rope_type': kind}, partial=True) | windowed(hf)


def write_phi3(c):
    # transformers takes the trained context from the top level
    trained = {'original_max_position_embeddings': c.rope_context} if c.rope_context else {}
    return write_rope(c) | trained | {'partial_rotary_factor': c.rope_fraction}


FAMILIES['phi3'] = Family(
    'Phi3ForCausalLM', WINDOW_KEYS, PHI3_RULES, LLAMA, {'rms_norm_eps': 1e-5}, read_phi3, write_phi3, 'aw')


OLMO2_RULES = ENDS + ATTENTION + gated('mlp') + [
    ('h.{i}.ln_1_out', [L + 'post_attention_layernorm'], same),
    ('h.{i}.ln_2_out', [L + 'post_feedforward_layernorm'], same)]
FAMILIES['olmo2'] = Family(
    'Olmo2ForCausalLM', LLAMA_KEYS | ATTENTION_BIAS, OLMO2_RULES,
    LLAMA | {'norm_at': 'output', 'qk_norm': 'full'}, {'rms_norm_eps': 1e-5}, read_rope, write_rope)

STARCODER2_KEYS = without(WINDOW_KEYS, 'rms_norm_eps') | {
    'norm_epsilon': 'norm_eps', 'hidden_act': PLAIN, 'use_bias': ('qkv_bias', 'proj_bias', 'ffn_bias')}
FAMILIES['starcoder2'] = Family(
    'Starcoder2ForCausalLM', STARCODER2_KEYS, ENDS + NORMS + ATTENTION[:2] + plain('mlp', 'c_fc', 'c_proj'),
    LAYERNORM | {'pos': 'rope', 'bias': False},
    TIED | {'norm_epsilon': 1e-5, 'use_bias': True, 'hidden_act': 'gelu_pytorch_tanh'}, read_mistral,
    write_rope, 'aw')

GRANITE_KEYS = LLAMA_KEYS | BIAS_KEYS | {
    'residual_multiplier': 'residual_scale', 'attention_multiplier': score_scale(float, float),
    'embedding_multiplier': Key('embed_scale', lambda x, hf: float(x), lambda c: (
        math.sqrt(c.n_embd) if c.embed_scale is True else c.embed_scale or 1.0)),
    'logits_scaling': Key('logit_scale', lambda x, hf: 1 / x, lambda c: 1 / c.logit_scale)}
FAMILIES['granite'] = Family(
    'GraniteForCausalLM', GRANITE_KEYS, LLAMA_RULES, LLAMA,
    {'embedding_multiplier': 1.0, 'residual_multiplier': 1.0, 'attention_multiplier': 1.0,
     'logits_scaling': 1.0},
    read_rope, write_rope)

COHERE_KEYS = without(LLAMA_KEYS, 'rms_norm_eps', 'head_dim') | ATTENTION_BIAS | {
    'layer_norm_eps': 'norm_eps', 'logit_scale': 'logit_scale',
    'use_qk_norm': words('qk_norm', {True: 'heads', False: False})}
COHERE_RULES = ENDS + NORMS[:1] + gated('mlp') + ATTENTION[1:2] + [
    ('h.{a}.mixer.c_attn', ATTENTION[0][1], qkv_interleaved),
    ('h.{a}.mixer.q_norm', [L + 'self_attn.q_norm'], norm_interleaved),
    ('h.{a}.mixer.k_norm', [L + 'self_attn.k_norm'], norm_interleaved)]
FAMILIES['cohere'] = Family(
    'CohereForCausalLM', COHERE_KEYS, COHERE_RULES,
    {'pos': 'rope', 'norm': 'layernorm', 'norm_bias': False, 'bias': False, 'residual': 'shared'},
    TIED | {'rope_theta': 5e5, 'logit_scale': 0.0625, 'use_qk_norm': False}, read_rope, write_rope)

# ----------------------------------------------------------------------------------------------------------
# SmolLM 3 and Llama 4: some layers have no rotary positions


def rotary_layers(hf):
    """One number a layer, 1 where it turns."""
    every = hf['no_rope_layer_interval']
    return hf.get('no_rope_layers') or [int((i + 1) % every != 0) for i in range(hf['num_hidden_layers'])]


def read_rotary(hf, letters):
    """Flags of letters whose case says whether the layer turns: lower."""
    unturned = {'A': 'n', 'W': 'v'}
    if letters.isupper():  # then `n` and `v` would mean nothing
        return {'pos': 'none', 'layer_pattern': period(letters.lower())}
    return read_rope(hf) | {'pos': 'rope', 'layer_pattern': period(unturned.get(x, x) for x in letters)}


def write_rotary(c):
    return write_rope(c) | write_types(c) | {
        'no_rope_layers': [int(c.pos == 'rope' and mixer not in 'nv') for mixer, _ in c.plan()]}


def read_smollm3(hf):
    turns = rotary_layers(hf)
    use = hf['use_sliding_window'] and hf.get('sliding_window')
    letters = mixers(hf, lambda i: 'w' if use and not turns[i] else 'a')
    return read_rotary(hf, ''.join(x if turn else x.upper() for x, turn in zip(letters, turns)))


def write_smollm3(c):
    return write_rotary(c) | {'use_sliding_window': c.window is not None}


FAMILIES['smollm3'] = Family(
    'SmolLM3ForCausalLM', WINDOW_KEYS | BIAS_KEYS, LLAMA_RULES, without(LLAMA, 'pos'),
    TIED | {'rope_theta': 2e6, 'no_rope_layer_interval': 4, 'use_sliding_window': False}, read_smollm3,
    write_smollm3, 'awnv')

LLAMA4_KEYS = without(LLAMA_KEYS, 'intermediate_size') | EXPERT_KEYS | ATTENTION_BIAS | {
    'intermediate_size': 'expert_width', 'intermediate_size_mlp': 'ffn_width',
    'attention_chunk_size': 'window', 'attn_scale': 'temp_scale', 'floor_scale': whole_number('temp_floor'),
    'use_qk_norm': words('qk_norm', {True: 'unit', False: False})}
FED = 'feed_forward'
LLAMA4_RULES = ENDS + NORMS + ATTENTION[1:2] + gated(FED) + shared(f'{FED}.shared_expert') + [
    ('h.{a}.mixer.c_attn', ATTENTION[0][1], qkv_interleaved),
    ('h.{e}.ffn.router', [L + f'{FED}.router'], same),
    ('h.{e}.ffn.c_fc.weight', [L + f'{FED}.experts.gate_up_proj'], in_out),
    ('h.{e}.ffn.c_proj.weight', [L + f'{FED}.experts.down_proj'], in_out)]
LLAMA4 = without(LLAMA, 'pos') | {
    'n_shared': 1, 'router': 'sigmoid', 'router_norm': False, 'router_input': True}
LLAMA4_DEFAULTS = {
    'rope_theta': 5e5, 'rms_norm_eps': 1e-5, 'head_dim': 128, 'num_experts_per_tok': 1,
    'interleave_moe_layer_step': 1, 'use_qk_norm': True, 'no_rope_layer_interval': 4,
    'attention_chunk_size': 8192, 'attn_temperature_tuning': True, 'floor_scale': 8192, 'attn_scale': 0.1}


def read_llama4(hf):
    turns, step = rotary_layers(hf), hf['interleave_moe_layer_step']
    moe = hf.get('moe_layers')
    moe = range(step - 1, hf['num_hidden_layers'], step) if moe is None else moe
    letters = mixers(hf, lambda i: 'c' if turns[i] else 'a')
    if 'w' in letters or any(x == 'c' and not turn for x, turn in zip(letters, turns)):
        refuse(hf, 'layer_types', 'be chunked_attention at most where no_rope_layers is 1, and otherwise '
                                  'full_attention')
    if 'c' in letters and not hf.get('attention_chunk_size'):
        refuse(hf, 'attention_chunk_size', 'be set for layers of chunked_attention')
    flags = read_rotary(hf, ''.join(x if turn else x.upper() for x, turn in zip(letters, turns)))
    flags['ffn_pattern'] = by_layer(hf, lambda i: 'e' if i in moe else 'f')
    if not hf['attn_temperature_tuning']:
        return flags | {'temp_scale': None}
    if flags['pos'] == 'none':
        refuse(hf, 'no_rope_layers', 'leave a layer that turns where attn_temperature_tuning is true')
    return flags


def write_llama4(c):
    # transformers wants a chunk where no layer has one
    chunk = {} if c.window else {'attention_chunk_size': 8192}
    return write_rotary(c) | chunk | {
        'attn_temperature_tuning': c.temp_scale is not None, 'moe_layers': sparse_layers(c)}


FAMILIES['llama4_text'] = Family(
    'Llama4ForCausalLM', LLAMA4_KEYS, LLAMA4_RULES, LLAMA4, LLAMA4_DEFAULTS, read_llama4, write_llama4, 'acn',
    {'num_experts': 'num_local_experts'})


# ----------------------------------------------------------------------------------------------------------
# gpt-oss

GPT_OSS_KEYS = without(WINDOW_KEYS, 'hidden_act', 'intermediate_size') | EXPERT_KEYS | ATTENTION_BIAS | {
    'intermediate_size': 'expert_width', 'swiglu_limit': 'ffn_limit', 'swiglu_alpha': 'ffn_alpha'}
GPT_OSS = LLAMA | {
    'ffn': 'swiglu_clip', 'ffn_pattern': 'e', 'ffn_bias': True, 'router_bias': True, 'sinks': True}
GPT_OSS_RULES = ENDS + NORMS + ATTENTION[:2] + [
    ('h.{a}.mixer.scores.sinks', [L + 'self_attn.sinks'], same),
    ('h.{e}.ffn.router', [L + 'mlp.router'], same),
    ('h.{e}.ffn.c_fc.weight', [L + 'mlp.experts.gate_up_proj'], gate_up_in_turns),
    ('h.{e}.ffn.c_fc.bias', [L + 'mlp.experts.gate_up_proj_bias'], gate_up_in_turns),
    ('h.{e}.ffn.c_proj.weight', [L + 'mlp.experts.down_proj'], in_out),
    ('h.{e}.ffn.c_proj.bias', [L + 'mlp.experts.down_proj_bias'], same)]
GPT_OSS_DEFAULTS = {
    'rope_theta': 150000.0, 'rms_norm_eps': 1e-5, 'head_dim': 64, 'attention_bias': True, 'swiglu_limit': 7.0,
    'swiglu_alpha': 1.702, 'num_experts_per_tok': 4, 'sliding_window': 128, 'rope_parameters': {
        'rope_type': 'yarn', 'factor': 32.0, 'truncate': False, 'original_max_position_embeddings': 4096}}
FAMILIES['gpt_oss'] = Family(
    'GptOssForCausalLM', GPT_OSS_KEYS, GPT_OSS_RULES, GPT_OSS, GPT_OSS_DEFAULTS, read_gemma2,
    write_alternating, 'aw', {'experts_per_token': 'num_experts_per_tok', 'num_experts': 'num_local_experts'})

# ----------------------------------------------------------------------------------------------------------
# DeepSeek: latent attention

DEEPSEEK_KEYS = without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim') | ATTENTION_BIAS | {
    'kv_lora_rank': 'kv_rank', 'q_lora_rank': 'q_rank', 'qk_nope_head_dim': 'head_dim',
    'qk_rope_head_dim': 'rope_head_dim', 'v_head_dim': 'v_head_dim', 'n_routed_experts': 'n_expert',
    'num_experts_per_tok': 'n_expert_used', 'moe_intermediate_size': 'expert_width',
    'n_shared_experts': 'n_shared', 'routed_scaling_factor': 'router_scale'}
DEEPSEEK = LLAMA | {'attn': 'mla', 'latent_eps': 1e-6}
DEEPSEEK3_DEFAULTS = {
    'q_lora_rank': 1536, 'first_k_dense_replace': 3, 'n_group': 8, 'topk_group': 4, 'n_shared_experts': 1,
    'num_experts_per_tok': 8, 'norm_topk_prob': True, 'routed_scaling_factor': 2.5, 'rope_interleave': True}
DEEPSEEK2_DEFAULTS = {
    'q_lora_rank': 1536, 'first_k_dense_replace': 0, 'n_group': 1, 'topk_group': 1, 'n_shared_experts': 2,
    'topk_method': 'greedy', 'routed_scaling_factor': 1.0}


def deepseek_rules(c, hf):
    query, latent = (mla_query, mla_latent) if hf.get('rope_interleave', True) else (same, same)
    attn = L + 'self_attn.'
    return ENDS + NORMS + gated('mlp') + experts('mlp') + shared('mlp.shared_experts') + ATTENTION[1:2] + [
        ('h.{a}.mixer.q_down', [attn + 'q_a_proj'], same),
        ('h.{a}.mixer.q_norm', [attn + 'q_a_layernorm'], same),
        ('h.{a}.mixer.q_up', [attn + ('q_b_proj' if c.q_rank else 'q_proj')], query),
        ('h.{a}.mixer.kv_down', [attn + 'kv_a_proj_with_mqa'], latent),
        ('h.{a}.mixer.kv_norm', [attn + 'kv_a_layernorm'], same),
        ('h.{a}.mixer.kv_up', [attn + 'kv_b_proj'], same),
        ('h.{e}.ffn.choice_bias', [L + 'mlp.gate.e_score_correction_bias'], same)]


def read_deepseek(hf):
    width = hf['qk_nope_head_dim'] + hf['qk_rope_head_dim']
    flags, sharp = read_rope(hf | {'head_dim': width}), rope_parameters(hf).get('mscale_all_dim') or 0
    flags['ffn_pattern'] = by_layer(hf, lambda i: 'f' if i < hf['first_k_dense_replace'] else 'e')
    yarn, scaled = flags.get('rope_scaling') == 'yarn', 'rope_scaling' in flags
    if yarn and flags.get('rope_attention_factor') is None:
        # which without the key is 1 in our latent attention, and YaRN's own in theirs
        flags['rope_attention_factor'] = mscale(flags['rope_factor'])
    if yarn and sharp == 1 and math.isclose(flags['rope_attention_factor'], 1):
        flags['rope_attention_factor'] = None  # as published: it goes with scores scaled as here by default
    elif scaled and sharp:
        flags['attn_scale'] = width ** -0.5 * mscale(flags['rope_factor'], sharp) ** 2
    return flags


def groups(hf, top):
    """Group-limited routing, where it limits anything."""
    n, used = hf['n_group'], hf['topk_group']
    return {'n_group': n, 'n_group_used': used, 'group_top': top} if used < n else {}


def read_deepseek_v2(hf):
    if hf['topk_method'] not in ('greedy', 'group_limited_greedy'):
        refuse(hf, 'topk_method', 'be one of greedy, group_limited_greedy')
    return read_deepseek(hf) | (groups(hf, 1) if hf['topk_method'] != 'greedy' else {})


def read_deepseek_v3(hf):
    return read_deepseek(hf) | groups(hf, 2) | {'balance': 'bias'}


def write_deepseek(c):
    rope = rope_of(c)
    if c.rope_scaling == 'yarn' and c.attn_scale is None and c.rope_attention_factor is None:
        rope |= {'mscale': 1.0, 'mscale_all_dim': 1.0}
    elif c.rope_scaling == 'yarn':
        rope['attention_factor'] = c.rope_attention_factor or 1.0
    if c.rope_scaling != 'none' and c.attn_scale is not None and c.rope_factor > 1:
        # the other way from what read_deepseek makes of it
        sharp = math.sqrt(c.attn_scale * math.sqrt(c.head_dim + c.rope_head_dim))
        rope['mscale_all_dim'] = (sharp - 1) / (0.1 * math.log(c.rope_factor))
    return {'rope_parameters': rope, 'num_key_value_heads': c.n_head, 'head_dim': c.rope_head_dim,
            'first_k_dense_replace': min(sparse_layers(c), default=c.n_layer), 'n_group': c.n_group,
            'topk_group': c.n_group_used, 'n_shared_experts': c.n_shared or 1}


def write_deepseek_v2(c):
    return write_deepseek(c) | {'topk_method': 'group_limited_greedy' if c.n_group > 1 else 'greedy'}


# where both fit, in models without experts, transformers' V2 cannot take all widths
FAMILIES['deepseek_v3'] = Family(
    'DeepseekV3ForCausalLM', DEEPSEEK_KEYS | {'norm_topk_prob': 'router_norm'}, deepseek_rules,
    DEEPSEEK | {'router': 'sigmoid'}, DEEPSEEK3_DEFAULTS, read_deepseek_v3, write_deepseek)
FAMILIES['deepseek_v2'] = Family(
    'DeepseekV2ForCausalLM', DEEPSEEK_KEYS, deepseek_rules, DEEPSEEK | {'router_norm': False},
    DEEPSEEK2_DEFAULTS, read_deepseek_v2, write_deepseek_v2)

# ----------------------------------------------------------------------------------------------------------
# GPT-2, GPT-NeoX

GPT2_KEYS = {
    'vocab_size': 'vocab_size', 'n_embd': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head',
    'n_positions': 'block_size', 'n_inner': 'ffn_width', 'layer_norm_epsilon': 'norm_eps',
    'activation_function': PLAIN, 'tie_word_embeddings': 'tie',
    'scale_attn_weights': words('attn_scale', {True: None, False: 1.0})}
H = 'transformer.h.{i}.'
GPT2_RULES = [
    ('wte', ['transformer.wte'], same), ('wpe', ['transformer.wpe'], same), ('lm_head', ['lm_head'], same),
    ('ln_f', ['transformer.ln_f'], same),
    ('h.{i}.ln_1', [H + 'ln_1'], same), ('h.{i}.ln_2', [H + 'ln_2'], same),
    ('h.{i}.mixer.c_attn', [H + 'attn.c_attn'], transposed),
    ('h.{i}.mixer.c_proj', [H + 'attn.c_proj'], transposed),
    ('h.{i}.ffn.c_fc', [H + 'mlp.c_fc'], transposed), ('h.{i}.ffn.c_proj', [H + 'mlp.c_proj'], transposed)]


@torch.no_grad()
def finish_gpt2(model, hf):
    """Scores divided by the number of their layer, which the query may as well be."""
    if hf.get('scale_attn_by_inverse_layer_idx'):
        for layer, block in enumerate(model.h, start=1):
            for p in block.mixer.c_attn.parameters():
                p[:model.config.n_embd] /= layer


FAMILIES['gpt2'] = Family(
    'GPT2LMHeadModel', GPT2_KEYS, GPT2_RULES, LAYERNORM | ALL_BIASES | {'pos': 'learned'},
    TIED | {'activation_function': 'gelu_new', 'scale_attn_weights': True}, synonyms={'n_ctx': 'n_positions'},
    needs={'add_cross_attention': False}, finish=finish_gpt2)


NEOX_KEYS = without(LLAMA_KEYS, 'num_key_value_heads', 'head_dim', 'rms_norm_eps') | ATTENTION_BIAS | {
    'layer_norm_eps': 'norm_eps', 'hidden_act': PLAIN,
    'use_parallel_residual': words('residual', {True: 'parallel', False: 'serial'})}
N = 'gpt_neox.layers.{i}.'
NEOX_RULES = [
    ('wte', ['gpt_neox.embed_in'], same), ('ln_f', ['gpt_neox.final_layer_norm'], same),
    ('lm_head', ['embed_out'], same), ('h.{i}.ln_1', [N + 'input_layernorm'], same),
    ('h.{i}.ln_2', [N + 'post_attention_layernorm'], same),
    ('h.{i}.mixer.c_attn', [N + 'attention.query_key_value'], qkv_by_group),
    ('h.{i}.mixer.c_proj', [N + 'attention.dense'], same)] + plain('mlp', 'dense_h_to_4h', 'dense_4h_to_h', N)


def read_neox(hf):
    return read_rope(hf, partial=True)


def write_neox(c):
    share = {'partial_rotary_factor': c.rope_fraction}
    return {'rope_parameters': rope_of(c) | share, 'rotary_pct': c.rope_fraction}


FAMILIES['gpt_neox'] = Family(
    'GPTNeoXForCausalLM', NEOX_KEYS, NEOX_RULES, LAYERNORM | {'pos': 'rope', 'bias': False, 'ffn_bias': True},
    {'hidden_act': 'gelu', 'use_parallel_residual': True, 'attention_bias': True,
     'partial_rotary_factor': 0.25},
    read_neox, write_neox, synonyms={'rotary_pct': 'partial_rotary_factor', 'rotary_emb_base': 'rope_theta'})

# ----------------------------------------------------------------------------------------------------------
# The models with ALiBi: Falcon (or with rope), BLOOM, MPT

HEADED = [('lm_head', ['lm_head'], same)]
BLOOM_LAYERS = HEADED + plain('mlp', 'dense_h_to_4h', 'dense_4h_to_h', H) + [
    ('h.{i}.mixer.c_attn', [H + 'self_attention.query_key_value'], qkv_by_group),
    ('h.{i}.mixer.c_proj', [H + 'self_attention.dense'], same), ('ln_f', ['transformer.ln_f'], same)]
WORD_EMBEDDINGS = [('wte', ['transformer.word_embeddings'], same)]

FALCON_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head', 'layer_norm_epsilon': 'norm_eps', 'ffn_hidden_size': 'ffn_width',
    'max_position_embeddings': 'block_size', 'activation': PLAIN, 'tie_word_embeddings': 'tie',
    'bias': ('qkv_bias', 'proj_bias', 'ffn_bias'), 'alibi': words('pos', {True: 'alibi_bf16', False: 'rope'})}
FALCON_DEFAULTS = TIED | {
    'activation': 'gelu', 'bias': False, 'alibi': False, 'new_decoder_architecture': False,
    'multi_query': True, 'parallel_attn': True, 'max_position_embeddings': 2048}


def falcon_rules(c, hf):
    first, second = {'parallel': ('ln_attn', 'ln_mlp')}.get(
        c.residual, ('input_layernorm', 'post_attention_layernorm'))
    return WORD_EMBEDDINGS + BLOOM_LAYERS + [
        ('h.{i}.ln_1', [H + first], same), ('h.{i}.ln_2', [H + second], same)]


def read_falcon(hf):
    new = hf['new_decoder_architecture']
    if new:
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
    'FalconForCausalLM', FALCON_KEYS, falcon_rules, LAYERNORM | {'bias': False}, FALCON_DEFAULTS, read_falcon,
    write_falcon)

BLOOM_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'n_layer': 'n_layer', 'n_head': 'n_head',
    'layer_norm_epsilon': 'norm_eps', 'tie_word_embeddings': 'tie',
    'apply_residual_connection_post_layernorm': words('residual', {True: 'normed', False: 'serial'})}
BLOOM_RULES = WORD_EMBEDDINGS + BLOOM_LAYERS + [
    ('ln_e', ['transformer.word_embeddings_layernorm'], same), ('h.{i}.ln_1', [H + 'input_layernorm'], same),
    ('h.{i}.ln_2', [H + 'post_attention_layernorm'], same)]
FAMILIES['bloom'] = Family(
    'BloomForCausalLM', BLOOM_KEYS, BLOOM_RULES,
    LAYERNORM | ALL_BIASES | {'pos': 'alibi', 'embed_norm': True, 'ffn': 'gelu_tanh'},
    TIED | {'apply_residual_connection_post_layernorm': False},
    synonyms={'n_embed': 'hidden_size', 'num_attention_heads': 'n_head', 'num_hidden_layers': 'n_layer'},
    needs={'slow_but_exact': False})

MPT_KEYS = {
    'vocab_size': 'vocab_size', 'd_model': 'n_embd', 'n_layers': 'n_layer', 'n_heads': 'n_head',
    'max_seq_len': 'block_size', 'layer_norm_epsilon': 'norm_eps', 'tie_word_embeddings': 'tie'}
M = 'transformer.blocks.{i}.'
MPT_RULES = [('wte', ['transformer.wte'], same), ('ln_f', ['transformer.norm_f'], same)] + HEADED + [
    ('h.{i}.ln_1', [M + 'norm_1'], same), ('h.{i}.ln_2', [M + 'norm_2'], same),
    ('h.{i}.mixer.c_attn', [M + 'attn.Wqkv'], same), ('h.{i}.mixer.c_proj', [M + 'attn.out_proj'], same),
    *plain('ffn', 'up_proj', 'down_proj', M)]


def read_mpt(hf):
    attn = hf.get('attn_config', {})
    return {'qkv_clip': attn.get('clip_qkv') or None, 'attn_scale': attn.get('softmax_scale') or None}


def write_mpt(c):
    return {'attn_config': {'clip_qkv': c.qkv_clip, 'softmax_scale': c.attn_scale, 'model_type': ''},
            'no_bias': True}


FAMILIES['mpt'] = Family(
    'MptForCausalLM', MPT_KEYS, MPT_RULES,
    {'pos': 'alibi', 'norm': 'layernorm', 'norm_bias': False, 'bias': False, 'ffn': 'gelu'}, TIED, read_mpt,
    write_mpt)

# ----------------------------------------------------------------------------------------------------------
# State spaces: Mamba, Mamba-2, Jamba

MAMBA_KEYS = {
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'state_size': 'ssm_state', 'conv_kernel': 'ssm_conv', 'layer_norm_epsilon': 'norm_eps',
    'expand': whole_number('ssm_expand'), 'use_bias': 'ssm_bias', 'use_conv_bias': 'conv_bias',
    'tie_word_embeddings': 'tie'}
MAMBA = {'pos': 'none', 'norm': 'rmsnorm', 'layer_pattern': 'm', 'ffn_pattern': '-', 'bias': False}
MAMBA_DEFAULTS = {'expand': 2, 'state_size': 16, 'conv_kernel': 4, 'use_bias': False, 'use_conv_bias': True,
                  'time_step_rank': 'auto'}
B = 'backbone.layers.{i}.'
MAMBA_ENDS = [('wte', ['backbone.embeddings'], same), ('ln_f', ['backbone.norm_f'], same),
              ('h.{i}.ln_1', [B + 'norm'], same)] + HEADED


def state_space(place, *names):
    """Rules of the tensors that both mixers have, and of those of the same name in ours and theirs."""
    return [(f'h.{{m}}.mixer.{ours}', [place + theirs], layout) for ours, theirs, layout in (
        ('conv1d.weight', 'conv1d.weight', conv), ('conv1d.bias', 'conv1d.bias', same),
        ('c_proj', 'out_proj', same), *((name, name, same) for name in ('in_proj', 'A_log', 'D', *names)))]


SILU = {'hidden_act': 'silu'}
FAMILIES['mamba'] = Family(
    'MambaForCausalLM', MAMBA_KEYS | {'time_step_rank': RANK},
    MAMBA_ENDS + state_space(B + 'mixer.', 'x_proj', 'dt_proj'), MAMBA | {'ssm': 'mamba1'},
    TIED | MAMBA_DEFAULTS, write=lambda c: SILU, mixers='m',
    synonyms={'d_model': 'hidden_size', 'n_layer': 'num_hidden_layers'}, needs=SILU)


def read_mamba2(hf):
    heads, inner = hf['num_heads'], hf['expand'] * hf['hidden_size']
    if heads * hf['head_dim'] != inner:
        refuse(hf, 'num_heads', f'be expand x hidden_size / head_dim = {inner}/{hf["head_dim"]}')
    # transformers writes infinity as a dictionary
    low, high = (float(x['__float__'] if isinstance(x, dict) else x) for x in hf['time_step_limit'])
    return {'ssm_dt_min': low, 'ssm_dt_max': None if math.isinf(high) else high}


def write_mamba2(c):
    high = {'__float__': 'Infinity'} if c.ssm_dt_max is None else c.ssm_dt_max
    return SILU | {'num_heads': c.ssm_expand * c.n_embd // c.ssm_head_dim,
                   'time_step_limit': [c.ssm_dt_min, high]}


FAMILIES['mamba2'] = Family(
    'Mamba2ForCausalLM', MAMBA_KEYS | {'head_dim': 'ssm_head_dim', 'n_groups': 'ssm_groups'},
    MAMBA_ENDS + state_space(B + 'mixer.', 'dt_bias', 'norm'), MAMBA | {'ssm': 'mamba2'},
    MAMBA_DEFAULTS | {'state_size': 128, 'n_groups': 8, 'head_dim': 64, 'time_step_limit': (0.0, math.inf)},
    read_mamba2, write_mamba2, 'm', needs=SILU)

JAMBA_KEYS = LLAMA_KEYS | {
    'num_experts': 'n_expert', 'num_experts_per_tok': 'n_expert_used', 'mamba_d_state': 'ssm_state',
    'mamba_d_conv': 'ssm_conv', 'mamba_expand': whole_number('ssm_expand'), 'mamba_dt_rank': RANK,
    'mamba_proj_bias': 'ssm_bias', 'mamba_conv_bias': 'conv_bias'}
JAMBA = {
    'pos': 'none', 'norm': 'rmsnorm', 'bias': False, 'ssm': 'mamba1', 'ssm_norm': True, 'router_norm': False}
JAMBA_RULES = ENDS[::2] + ATTENTION[:2] + gated('feed_forward') + experts('feed_forward', router='router') + \
    state_space(L + 'mamba.', 'x_proj', 'dt_proj') + [
        ('ln_f', ['model.final_layernorm'], same), ('h.{i}.ln_1', [L + 'input_layernorm'], same),
        ('h.{i}.ln_2', [L + 'pre_ff_layernorm'], same)] + [
        (f'h.{{m}}.mixer.{x}_norm', [L + f'mamba.{x}_layernorm'], same) for x in ('dt', 'b', 'c')]
JAMBA_DEFAULTS = {
    'attn_layer_period': 8, 'attn_layer_offset': 4, 'expert_layer_period': 2, 'expert_layer_offset': 1,
    'num_experts': 16, 'num_experts_per_tok': 2, 'mamba_d_state': 16, 'mamba_d_conv': 4, 'mamba_expand': 2,
    'mamba_dt_rank': 'auto', 'mamba_proj_bias': False, 'mamba_conv_bias': True}


def read_jamba(hf):
    def here(what, i):
        return i % hf[f'{what}_layer_period'] == hf[f'{what}_layer_offset']
    mixers = by_layer(hf, lambda i: 'a' if here('attn', i) else 'm')
    if 'm' in mixers and hf['hidden_act'] not in ('silu', 'swish'):
        refuse(hf, 'hidden_act', 'be silu, which is what state spaces here have')
    ffns = by_layer(hf, lambda i: 'e' if here('expert', i) and hf['num_experts'] > 1 else 'f')
    return {'layer_pattern': mixers, 'ffn_pattern': ffns, 'expert_width': hf['intermediate_size']}


def write_jamba(c):
    mixers, ffns = zip(*c.plan())
    return every('attn', mixers, 'a') | every('expert', ffns, 'e') | {
        'num_experts': c.n_expert or 1, 'intermediate_size': c.expert_width if 'e' in ffns else c.ffn_width}


def every(what, letters, letter):
    """Period and offset of a letter; where it has none, the layers that come back differ."""
    n = len(letters)
    period, offset = next(
        ((step, first) for step in range(1, n + 2) for first in range(step)
         if all((x == letter) == (i % step == first) for i, x in enumerate(letters))), (1, 0))
    return {f'{what}_layer_period': period, f'{what}_layer_offset': offset}


FAMILIES['jamba'] = Family(
    'JambaForCausalLM', JAMBA_KEYS, JAMBA_RULES, JAMBA, JAMBA_DEFAULTS, read_jamba, write_jamba, 'am')
