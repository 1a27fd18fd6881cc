"""
Keys of config.json and the flags of GPTConfig that they set, in both directions.

A family's `keys` map a key to the name of a flag, to the names of several flags that all get its value, or to
a Key that converts the value. The second half is about layers that differ: lists and periods in config.json
become the letters of layer_pattern and ffn_pattern.
"""
import math
from collections.abc import Callable
from typing import NamedTuple


class Key(NamedTuple):
    """A key of config.json."""
    flags: tuple            # names of the flags that it sets, all to one value
    read: Callable          # (value, config.json) -> the flags' value; ValueError says what the key must be
    write: Callable         # config -> the key's value


def as_key(flags):
    """A Key as it is; of one or several names of flags, the Key that copies its value to them."""
    if isinstance(flags, Key):
        return flags
    names = (flags,) if isinstance(flags, str) else flags
    return Key(names, lambda value, hf: value, lambda c: getattr(c, names[0]))


def renamed(flag, names):
    """
    A key whose values have other names in the flag. names: {theirs: ours}; where several of theirs mean the
    same, the first is written.
    """
    def read(name, hf):
        if name not in names:
            raise ValueError(f'be one of {", ".join(map(str, names))}')
        return names[name]

    def write(c):
        return next((name for name, value in names.items() if value == getattr(c, flag)), None)
    return Key((flag,), read, write)


def whole_number(flag):
    """A key that files may hold as a float, though the flag is an int."""
    def read(value, hf):
        if value != int(value):
            raise ValueError('be a whole number')
        return int(value)
    return Key((flag,), read, lambda c: getattr(c, flag))


# router_norm='fixed' is a True beside one expert per token
ROUTER_NORM = Key(('router_norm',), lambda value, hf: value, lambda c: bool(c.router_norm))

# a factor on the token embedding; one is none
EMBED_SCALE = Key(('embed_scale',), lambda value, hf: value != 1 and float(value), lambda c: (
    math.sqrt(c.n_embd) if c.embed_scale is True else c.embed_scale or 1.0))


def width_of_head(hf):
    return hf.get('head_dim') or hf['hidden_size'] // hf['num_attention_heads']


def score_scale(read, write):
    """A key that stands for attn_scale; 1 / sqrt(head_dim) is the flag's None."""
    def flag(value, hf):
        return None if math.isclose(read(value), width_of_head(hf) ** -0.5) else float(read(value))

    def key(c):
        return write(c.head_dim ** -0.5 if c.attn_scale is None else c.attn_scale)
    return Key(('attn_scale',), flag, key)


GATED_FFN = renamed('ffn', {
    'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu',
    'gelu_fast': 'geglu', 'gelu': 'geglu_erf', 'relu': 'reglu'})
UNGATED_FFN = renamed('ffn', {
    'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'relu': 'relu'})


def without(table, *keys):
    return {key: value for key, value in table.items() if key not in keys}


def refuse(hf, key, rule):
    raise ValueError(f'{key}={hf.get(key)} in config.json must {rule}')


# ----------------------------------------------------------------------------------------------------------
# Layers that differ

LETTER_OF_TYPE = {
    'full_attention': 'a', 'attention': 'a', 'sliding_attention': 'w', 'chunked_attention': 'c'}
TYPE_OF_LETTER = {
    'a': 'full_attention', 'n': 'full_attention', 'w': 'sliding_attention', 'v': 'sliding_attention',
    'c': 'chunked_attention', 'r': 'linear_attention'}
# those of models that have recurrences
RECURRENT = {'full_attention': 'a', 'attention': 'a', 'linear_attention': 'r'}


def shortest_pattern(letters):
    """The shortest pattern that repeats to these letters, one a layer."""
    letters = ''.join(letters)
    return next(letters[:n] for n in range(1, len(letters) + 1)
                if all(letters[i] == letters[i % n] for i in range(len(letters))))


def pattern_of(hf, letter):
    """The pattern in which layer i has letter(i)."""
    return shortest_pattern(letter(i) for i in range(hf['num_hidden_layers']))


def mixer_letters(hf, otherwise, letters=LETTER_OF_TYPE):
    """One letter a layer, as layer_types says; where it is absent, layer i has otherwise(i)."""
    types, n = hf.get('layer_types'), hf['num_hidden_layers']
    if types is None:
        return ''.join(otherwise(i) for i in range(n))
    if len(types) != n or not set(types) <= letters.keys():
        refuse(hf, 'layer_types', f'be a list of {n}, one a layer, of {", ".join(letters)}')
    return ''.join(letters[name] for name in types)


def write_layer_types(c):
    return {'layer_types': [TYPE_OF_LETTER[mixer] for mixer, _ in c.plan()]}


def write_window_types(c):
    """layer_types beside a window, which transformers needs even where no layer has one."""
    return write_layer_types(c) | ({} if c.window else {'sliding_window': 4096})


def read_window(hf):
    """Where sliding_window is set, every layer has the window."""
    return {'layer_pattern': 'w' if hf.get('sliding_window') is not None else 'a'}


def expert_layers(c):
    """The numbers of the layers with experts."""
    return [i for i, (_, ffn) in enumerate(c.plan()) if ffn == 'e']
