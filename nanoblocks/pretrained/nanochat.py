"""
nanochat's own checkpoints, model_XXXXXX.pt beside meta_XXXXXX.json (https://github.com/karpathy/nanochat).

These are the models of its first months, such as d20 and d32. From January 2026 on, its blocks also mix the
embedding back in, with learned factors; such files are refused by the first tensor that is not read here.
"""
import os
import re

import torch

from model import GPT, GPTConfig
from nanoblocks.pretrained.convert import matches, tensors_of, with_layout
from nanoblocks.pretrained.families.nanochat import NANOCHAT_FLAGS, OWN_TENSORS
from nanoblocks.pretrained.files import open_pickled
from nanoblocks.tokenizer import read_json

# {its setting: our flag}
SETTINGS = {'sequence_len': 'block_size', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
            'n_head': 'n_head', 'n_kv_head': 'n_kv_head', 'n_embd': 'n_embd'}
# what its code says and no file does
FIXED = NANOCHAT_FLAGS | {'tie': False, 'logit_softcap': 15.0, 'norm_eps': torch.finfo(torch.float32).eps}


def meta_of(path):
    """The path of the settings that belong to a checkpoint of nanochat; None for other files."""
    folder, file = os.path.split(path)
    step = re.fullmatch(r'model_(\d+)\.pt', file)
    return step and os.path.join(folder, f'meta_{step[1]}.json')


def last_of(folder):
    """The checkpoint with the most steps in a folder; None where there is none of nanochat's."""
    files = os.listdir(folder) if os.path.isdir(folder) else ()
    steps = {int(file[6:-3]): file for file in files if meta_of(file) and meta_of(file) in files}
    return os.path.join(folder, steps[max(steps)]) if steps else None


def load(path):
    """The model of a checkpoint of nanochat, in fp32."""
    weights = {name.removeprefix('_orig_mod.'): tensor for name, tensor in open_pickled(path).items()}
    model = GPT(config_of(path, len(weights)), seed=None).eval()
    ours = tensors_of(model)
    rules = {mine: with_layout(rule) for mine, rule in OWN_TENSORS.items()}
    for name, p in ours.items():
        if name.partition('.')[0].startswith('ln') or '.ln_' in name:
            p.fill_(1.0)
    for mine, names, layout in matches(rules, model.config, ours):
        for name, piece in zip(names, layout(ours[mine], model.config), strict=True):
            tensor = weights.pop(name, None)
            if tensor is not None and mine in ('wte.weight', 'lm_head.weight'):
                # rows that make their number a multiple of 64
                tensor = tensor[:model.config.vocab_size]
            if tensor is None or tuple(tensor.shape) != piece.shape:
                raise ValueError(f'{path} must hold {name} of the shape {piece.shape}: fetch it again')
            piece.load(tensor)
    if weights:
        raise ValueError(f'{min(weights)} in {path} must be absent: only the first version of nanochat is '
                         'read, before its blocks mixed the embedding back in')
    return model


def config_of(path, tensors):
    """The flags of a checkpoint. tensors: their number, above that of the layers."""
    meta = meta_of(path)
    if not os.path.exists(meta):
        raise FileNotFoundError(f'{meta} must lie beside {path}: it holds the settings of the model')
    settings = read_json(meta).get('model_config')
    settings = settings if isinstance(settings, dict) else {}
    for name in SETTINGS:
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise ValueError(f'{name}={settings.get(name)} in model_config of {meta} must be a whole number '
                             'of at least 1')
    if settings['n_layer'] > tensors:
        raise ValueError(f'n_layer={settings["n_layer"]} in {meta} must be at most {tensors}, the number of '
                         'its tensors')
    flags = {flag: settings[name] for name, flag in SETTINGS.items()}
    return GPTConfig(**FIXED, **flags, ffn_width=4 * settings['n_embd'])
