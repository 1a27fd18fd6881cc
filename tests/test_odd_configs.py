"""
Odd values in config.json, as files of all ages have them: nulls, absent keys, numbers as text, fractions,
lists, huge and negative numbers, switches turned. Each is read as `transformers` reads it, or refused in a
sentence.
"""
import json
import os
import re
from zlib import crc32

import pytest
import torch
from checkpoints import (  # noqa: F401 (made is a fixture)
    CASES,
    NOT_WEIGHTS,
    TOLERANCE,
    load_reference,
    logits_of,
    made,
    one_of_each,
    one_sentence,
)

from model import GPT
from nanoblocks.pretrained.values import NUMBERS

ABSENT = object()
# what no answer of a model depends on
SETTINGS = re.compile('architectures|dtype|version|model_type|use_cache|init|dropout|router_aux|jitter|'
                      'output_router|_token_id|^rescale_prenorm_residual|^pretraining_tp')
# one in so many of all changes, another part of them for each family
SHARE = 10
# {family: changes that transformers 5.24 gets wrong, or does not take though their meaning is plain}
THEIRS = {
    'gemma2': 'query_pre_attn_scalar=23.5', 'gemma3_text': 'query_pre_attn_scalar=23.5',
    'gpt_oss': 'experts_per_token|num_experts_per_tok=absent|original_max_position_embeddings=1000000000|'
               'rope_scaling.factor=absent',
    'falcon': 'alibi=True',     # its eager attention adds alibi twice
    'zamba2': 'time_step_min=-',    # no lower limit, as in nemotron_h
}


def odd_values(value):
    """What may stand in place of a value of config.json."""
    if isinstance(value, bool):
        return [ABSENT, None, not value, 'true', int(value), [value]]
    if isinstance(value, int):
        return [ABSENT, None, str(value), [value], float(value), value + 0.5, -value, 10 ** 9, 0, value + 1]
    if isinstance(value, float):
        return [ABSENT, None, str(value), [value], -value, 0.0, value + 1]
    if isinstance(value, str):
        return [ABSENT, None, 'x', [value], 3]
    if isinstance(value, list):
        words = [str(x) for x in value]
        return [ABSENT, None, [], value[:-1], value + value, 'x', 3, [None] * len(value), words]
    if isinstance(value, dict):
        return [ABSENT, None, {}, [], 'x']
    return [1, 7, 0.5, 'x', True, [1], {}]


def variants(config):
    """Every (config.json, what was changed in it), in which one key has another value; tables are entered."""
    for key, value in config.items():
        for other in () if SETTINGS.search(key) else odd_values(value):
            changed = {k: v for k, v in (config | {key: other}).items() if v is not ABSENT}
            yield changed, f'{key}={"absent" if other is ABSENT else repr(other)}'
        if isinstance(value, dict):
            for inner, what in variants(value):
                yield config | {key: inner}, f'{key}.{what}'


def repaired(config, original, null):
    """The file without what transformers is strict about: a null is no key, or false, and 7 is 7.0 too."""
    found = {}
    for key, value in config.items():
        before = original.get(key) if isinstance(original, dict) else None
        if isinstance(value, dict):
            value = repaired(value, before, null)
        elif value is None and before is not None:
            value = null
        elif type(value) is int and value != before and key in NUMBERS:
            value = float(value)
        found[key] = value
    return {key: value for key, value in found.items() if value is not ABSENT}


@torch.no_grad()
def reading(folder, config, made):
    """The logits of transformers, or None where it refuses the file or does not find its tensors in it."""
    (folder / 'config.json').write_text(json.dumps(config))
    try:
        model, info = load_reference(folder, made.case, output_loading_info=True)
        missing = [name for name in info.pop('missing_keys') if not NOT_WEIGHTS.search(name)]
        return None if missing or any(info.values()) else logits_of(model.eval(), made)
    except Exception:   # of any kind: the classes of a config check little
        return None


def fault(folder, made, config, changed):
    """None where a changed file is refused in a sentence or read as transformers reads it; else the error."""
    (folder / 'config.json').write_text(json.dumps(changed))
    try:
        got = logits_of(GPT.from_pretrained(folder).eval(), made)
    except (ValueError, FileNotFoundError) as error:
        one_sentence(error)
        return None
    want = reading(folder, changed, made)
    others = [] if want is not None else [reading(folder, repaired(changed, config, null), made)
                                          for null in (ABSENT, False)]
    wanted = [logits for logits in (want, *others) if logits is not None]
    # a file that transformers refuses may load here only if nothing depends on what was changed
    error = min((got - logits).abs().max().item() for logits in wanted or [made.logits])
    return None if error <= TOLERANCE else f'{error:.1e}{"" if wanted else ", and they refuse it"}'


@one_of_each
@torch.no_grad()
def test_odd_values_are_read_as_transformers_reads_them_or_refused(made, name, tmp_path):  # noqa: F811
    made, kind = made(name), CASES[name].model_type
    config = json.loads(((made.old_folder or made.folder) / 'config.json').read_text())
    os.symlink(made.folder / 'model.safetensors', tmp_path / 'model.safetensors')
    for changed, what in list(variants(config))[crc32(name.encode()) % SHARE::SHARE]:
        if not re.search(THEIRS.get(kind, '$^'), what):
            error = fault(tmp_path, made, config, changed)
            assert not error, f'{name}: {what} is off by {error}'
