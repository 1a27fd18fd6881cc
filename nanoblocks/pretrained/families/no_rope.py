"""Models of which some layers have no rotary positions (NoPE): SmolLM 3, EXAONE 4, Llama 4."""
from nanoblocks.pretrained.families.experts import EXPERT_KEYS
from nanoblocks.pretrained.families.family import TIED, Family
from nanoblocks.pretrained.families.llama import (
    ATTENTION_BIAS,
    BIAS_KEYS,
    LLAMA_FLAGS,
    LLAMA_KEYS,
    LLAMA_TENSORS,
    OUTPUT_NORMS,
    WINDOW_KEYS,
)
from nanoblocks.pretrained.keys import (
    expert_layers,
    mixer_letters,
    pattern_of,
    refuse,
    renamed,
    shortest_pattern,
    whole_number,
    without,
    write_layer_types,
)
from nanoblocks.pretrained.layouts import experts_transposed, gate_up, qkv_interleaved
from nanoblocks.pretrained.rope import read_rope, write_rope

FAMILIES = {}


def rotating_layers(hf):
    """One number a layer: 1 where it rotates, 0 where not."""
    every = hf['no_rope_layer_interval']
    return hf.get('no_rope_layers') or [int((i + 1) % every != 0) for i in range(hf['num_hidden_layers'])]


def read_rotating(hf, letters, rotates):
    """Flags of positions and mixers, from the mixer of every layer and whether it rotates."""
    if not any(rotates):  # then pos says so, and `n` and `v` would mean nothing
        return {'pos': 'none', 'layer_pattern': shortest_pattern(letters)}
    fixed = {'a': 'n', 'w': 'v'}
    letters = (x if rotate else fixed.get(x, x) for x, rotate in zip(letters, rotates))
    return read_rope(hf) | {'pos': 'rope', 'layer_pattern': shortest_pattern(letters)}


def write_rotating(c):
    return write_rope(c) | write_layer_types(c) | {
        'no_rope_layers': [int(c.pos == 'rope' and mixer not in 'nv') for mixer, _ in c.plan()]}


# ----------------------------------------------------------------------------------------------------------
# SmolLM 3: every fourth layer has none


def read_smollm3(hf):
    rotates = rotating_layers(hf)
    use = hf['use_sliding_window'] and hf.get('sliding_window') is not None
    letters = mixer_letters(hf, lambda i: 'w' if use and not rotates[i] else 'a')
    return read_rotating(hf, letters, rotates)


def write_smollm3(c):
    return write_rotating(c) | {'use_sliding_window': c.window is not None}


FAMILIES['smollm3'] = Family(
    architecture='SmolLM3ForCausalLM',
    flags=without(LLAMA_FLAGS, 'pos'),
    keys=WINDOW_KEYS | BIAS_KEYS,
    defaults=TIED | {'rope_theta': 2e6, 'no_rope_layer_interval': 4, 'use_sliding_window': False},
    tensors=LLAMA_TENSORS,
    mixers='awnv', read=read_smollm3, write=write_smollm3)


# ----------------------------------------------------------------------------------------------------------
# EXAONE 4: beside layers with windows, those without do not rotate; norms after the branches, as in OLMo 2


def read_exaone4(hf):
    window, every = hf.get('sliding_window'), hf['sliding_window_pattern']
    if window is None:
        return read_rotating(hf, 'a', [True])

    if not every or isinstance(every, str) and set(every) - set('LG'):
        refuse(hf, 'sliding_window_pattern', 'be a number of layers, or letters L and G')

    def letter(i):
        if isinstance(every, int):
            return 'w' if (i + 1) % every else 'a'
        # whatever its letter, the last layer sees all
        return 'w' if every[i % len(every)] == 'L' and i + 1 < hf['num_hidden_layers'] else 'a'
    letters = mixer_letters(hf, letter)
    return read_rotating(hf, letters, [letter == 'w' for letter in letters])


def write_exaone4(c):
    # beside a window, layers without one do not rotate
    window = 4096 if c.pos == 'none' else c.window
    return write_rope(c) | write_layer_types(c) | {'sliding_window': window}


FAMILIES['exaone4'] = Family(
    architecture='Exaone4ForCausalLM',
    flags=without(LLAMA_FLAGS, 'pos') | {'norm_at': 'output', 'qk_norm': True},
    keys=WINDOW_KEYS,
    defaults={'rms_norm_eps': 1e-5, 'sliding_window': 4096, 'sliding_window_pattern': 4},
    tensors=LLAMA_TENSORS | OUTPUT_NORMS,
    mixers='awn', read=read_exaone4, write=write_exaone4)


# ----------------------------------------------------------------------------------------------------------
# Llama 4: chunks where a layer rotates, full attention with a temperature where not; one shared expert


def read_llama4(hf):
    rotates, step = rotating_layers(hf), hf['interleave_moe_layer_step']
    moe = hf.get('moe_layers')
    moe = range(step - 1, hf['num_hidden_layers'], step) if moe is None else moe
    letters = mixer_letters(hf, lambda i: 'c' if rotates[i] else 'a')
    if 'w' in letters or any(x == 'c' and not rotate for x, rotate in zip(letters, rotates)):
        refuse(hf, 'layer_types', 'be full_attention, or chunked_attention where no_rope_layers is 1')
    if 'c' in letters and not hf.get('attention_chunk_size'):
        refuse(hf, 'attention_chunk_size', 'be set when layer_types has chunked_attention')
    flags = read_rotating(hf, letters, rotates)
    flags['ffn_pattern'] = pattern_of(hf, lambda i: 'e' if i in moe else 'f')
    if not hf['attn_temperature_tuning']:
        return flags | {'temp_scale': None}
    if flags['pos'] == 'none':
        refuse(hf, 'no_rope_layers', 'have a 1 when attn_temperature_tuning is true')
    return flags


def write_llama4(c):
    # transformers needs a chunk even where no layer has one
    chunk = {} if c.window else {'attention_chunk_size': 8192}
    return write_rotating(c) | chunk | {
        'attn_temperature_tuning': c.temp_scale is not None, 'moe_layers': expert_layers(c)}


FAMILIES['llama4_text'] = Family(
    architecture='Llama4ForCausalLM',
    flags=without(LLAMA_FLAGS, 'pos') | {
        'n_shared': 1, 'router': 'sigmoid', 'router_norm': False, 'router_input': True},
    keys=LLAMA_KEYS | EXPERT_KEYS | ATTENTION_BIAS | {
        'intermediate_size_mlp': 'ffn_width', 'attention_chunk_size': 'window', 'attn_scale': 'temp_scale',
        'floor_scale': whole_number('temp_floor'),
        'use_qk_norm': renamed('qk_norm', {True: 'unit', False: False})},
    aliases={'num_experts': 'num_local_experts'},
    defaults={'rope_theta': 5e5, 'rms_norm_eps': 1e-5, 'head_dim': 128, 'num_experts_per_tok': 1,
              'interleave_moe_layer_step': 1, 'use_qk_norm': True, 'no_rope_layer_interval': 4,
              'attention_chunk_size': 8192, 'attn_temperature_tuning': True, 'floor_scale': 8192,
              'attn_scale': 0.1},
    tensors=LLAMA_TENSORS | {
        'h.{a}.mixer.c_attn': ('model.layers.{i}.self_attn.{q,k,v}_proj', qkv_interleaved),
        'h.{f}.ffn.c_fc': ('model.layers.{i}.feed_forward.{gate,up}_proj', gate_up),
        'h.{f}.ffn.c_proj': 'model.layers.{i}.feed_forward.down_proj',
        'h.{e}.ffn.router': 'model.layers.{i}.feed_forward.router',
        'h.{e}.ffn.c_fc.weight': ('model.layers.{i}.feed_forward.experts.gate_up_proj', experts_transposed),
        'h.{e}.ffn.c_proj.weight': ('model.layers.{i}.feed_forward.experts.down_proj', experts_transposed),
        'h.{e}.ffn.shared.c_fc': ('model.layers.{i}.feed_forward.shared_expert.{gate,up}_proj', gate_up),
        'h.{e}.ffn.shared.c_proj': 'model.layers.{i}.feed_forward.shared_expert.down_proj'},
    mixers='acn', read=read_llama4, write=write_llama4)
