"""
From a folder in Hugging Face format to a GPT; export.py goes back.

config.json becomes flags and flags become config.json; then each tensor of the model is matched with tensors
of the file. What differs from family to family is in families/.
"""
import math
import os
import re
from dataclasses import fields
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from configurator import nearest
from model import GPT, GPTConfig, ssm_inner, with_fixed_norm
from nanoblocks.pretrained.families import FAMILIES, REFUSED, state_space
from nanoblocks.pretrained.families.family import DEFAULTS
from nanoblocks.pretrained.files import TensorFiles, refuse_adapter
from nanoblocks.pretrained.keys import shortest_pattern, without
from nanoblocks.pretrained.layouts import by_expert, gate_up_by_expert, same
from nanoblocks.pretrained.quantised import dequantised
from nanoblocks.pretrained.values import check_values
from nanoblocks.pretrained.wrapped import text_part, text_tensors
from nanoblocks.tokenizer import read_json

FIELDS = {f.name for f in fields(GPTConfig)}


def load_folder(folder, dtype=torch.float32):
    """The model of a folder, which remembers its family, with weights of this dtype."""
    hf = read_config(folder)
    family, files = FAMILIES[hf['model_type']], text_tensors(dequantised(TensorFiles(folder), hf), hf)
    check_layers(hf, family, files)
    config = config_of(hf, family)
    check_size(config, files)
    rules = under_names_of(files.where, rules_of(family, config, hf))
    rules = {ours: with_layout(rule) for ours, rule in family.as_stored(rules, files, config).items()}
    embedding, head = (rules[ours][0] + '.weight' for ours in ('wte', 'lm_head'))
    theirs = names_in_file(files.where, embedding, head, config, hf)
    if config.tie and embedding in theirs and head in theirs:
        # a head in the file is used, even where config.json ties it
        config.tie = torch.equal(files.get(theirs[head]), files.get(theirs[embedding]))
        if config.tie:
            del theirs[head]
    model = undrawn(config, dtype).eval()
    copy_tensors(model, rules, hf, files, theirs)
    family.finish(model, hf)
    model.family = hf['model_type']
    return model


def undrawn(config, dtype):
    """A model to be filled, with weights of this dtype."""
    model = GPT(config, seed=None)  # in fp32, but memory that nothing was written to is none
    for p in model.parameters():
        p.data = torch.empty_like(p, dtype=dtype)
    return model.to(dtype)  # buffers


# ----------------------------------------------------------------------------------------------------------
# config.json -> flags

UNSUPPORTED = ('is_encoder_decoder', 'vision_config', 'text_config')
# keys whose null means none, such as no window; the null of any other key stands for its default
NULL_MEANS_NONE = ('sliding_window', 'q_lora_rank', 'attn_logit_softcapping', 'final_logit_softcapping',
                   'rope_theta', 'rotary_dim', 'scale_depth', 'dim_model_base', 'partial_rotary_factor')
# flags whose key a file must have
SIZES = ('vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_expert_used', 'n_shared')


def read_config(folder):
    """config.json of a folder, with the defaults of its family and without nulls."""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        refuse_adapter(folder)
        raise FileNotFoundError(f'{folder} must hold config.json')
    hf = read_json(path)
    check_values(hf, path)
    hf = text_part(state_space.with_model_type(hf, path), path)
    kind = hf.get('model_type')
    if kind in REFUSED:
        raise ValueError(f'model_type={kind} in {path} must be another family: {REFUSED[kind]}')
    for key in UNSUPPORTED:
        if hf.get(key) and not (kind in FAMILIES and FAMILIES[kind].only.get(key)):
            raise ValueError(f'{key} in {path} must be absent: it is not supported for {kind}')
    if hf.get('is_causal') is False and kind in FAMILIES and FAMILIES[kind].flags.get('causal', True):
        raise ValueError(f'is_causal=False in {path} must be true or absent: a {kind} whose tokens see those '
                         'behind them is not supported')
    if kind not in FAMILIES:
        known = nearest(str(kind), FAMILIES, remedy='docs/checkpoints.md lists them')
        raise ValueError(f'model_type={kind} in {path} must be a family that is read here: {known}')
    for key, value in FAMILIES[kind].only.items():
        if hf.get(key, value) not in (value, None):
            raise ValueError(f'{key}={hf[key]} in {path} must be {value}: no other {kind} is supported')
    return complete(hf, FAMILIES[kind])


def complete(hf, family):
    """config.json with a value for every key: aliases resolved, defaults filled in, nulls dropped."""
    default = DEFAULTS | family.defaults
    stated = {key: value for key, value in hf.items() if value is not None or key in NULL_MEANS_NONE}
    off = {key: False for key, value in hf.items() if value is None and isinstance(default.get(key), bool)}
    aliased = {key: stated[alias] for alias, key in family.aliases.items() if alias in stated}
    return {key: value for key, value in (default | off | aliased | stated).items() if value is not None}


def check_layers(hf, family, files):
    """ValueError for more layers than there are tensors, before a pattern is made of their number."""
    for name, key in family.keys.items():
        if key.flags[0] in ('n_layer', 'n_encoder') and not 1 <= hf.get(name, 1) <= len(files.where):
            raise ValueError(f'{name}={hf[name]} in config.json must be from 1 to {len(files.where)}, the '
                             f'number of tensors in {files.folder}: correct it or fetch the file again')


def check_size(config, files):
    """ValueError for a model that is larger than its files, before memory is allocated for it."""
    most = files.most_weights()
    try:
        if max(config.n_head, config.rnn_heads or 0) > most:    # lists of slopes and decays are not imagined
            raise OverflowError
        with Imagined(most):
            weights = sum(p.numel() for p in GPT(config, seed=None).parameters())
    except (RuntimeError, TypeError, OverflowError):  # sizes whose product is no 64-bit number
        weights = math.inf
    if weights > most:
        raise ValueError(f'config.json in {files.folder} must describe a model of at most {most} weights, '
                         f'as many as its files can hold, not {weights}: correct its sizes or '
                         'fetch the files again')


class Imagined(TorchFunctionMode):
    """
    Where it is active, weights and buffers of zeros take no memory, and OverflowError says that a width is
    above `most`. On the device meta, arange would import sympy: 4 s.
    """

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.arange and max(args) > self.most:
            raise OverflowError
        unreal = {'device': 'meta'} if func in (torch.empty, torch.zeros) else {}
        return func(*args, **(kwargs or {}) | unreal)


def config_of(hf, family):
    """GPTConfig of a complete config.json."""
    flags = flags_of(hf, family)
    try:
        return GPTConfig(**flags)
    except ValueError as error:
        flag = str(error).partition('=')[0]
        key = next((name for name, key in family.keys.items() if flag in key.flags), None)
        raise ValueError(f'{error} ({flag} is {key} in config.json)' if key else
                         f'config.json stands for flags that do not fit together: {error}') from None


def flags_of(hf, family):
    """The flags of GPTConfig that a complete config.json stands for."""
    flags = dict(family.flags)
    try:
        for name, key in family.keys.items():
            if name in hf or key.flags[0] in SIZES:
                flags |= dict.fromkeys(key.flags, read_key(name, key, hf))
        flags |= family.read(hf)
    except KeyError as error:
        raise ValueError(f'config.json must have the key {error.args[0]}') from None
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f'config.json has a value that no {hf["model_type"]} can have ({error})') from None
    return meaningful(flags)


def read_key(name, key, hf):
    """The value that a key of config.json gives to its flags."""
    try:
        return key.read(hf[name], hf)
    except ValueError as error:
        raise ValueError(f'{name}={hf[name]} in config.json must {error}') from None


# what the rotation of w layers at rope_local_theta needs
LOCAL_ROPE = ('rope_local_theta', 'rope_fraction', 'rope_head_dim')


def meaningful(flags):
    """The flags that mean something beside the others: not a dense model's expert_width, for example."""
    config = GPTConfig.unchecked(**flags)
    kept = {name: value for name, value in flags.items() if not config.missing(name)}
    kept = kept if 'f' in config.ffns() else without(kept, 'ffn_width')
    if kept.get('qk_norm') == 'unit' and config.pos != 'rope':      # it norms only what rotates
        kept = without(kept, 'qk_norm')
    if config.rope_local_theta and not config.mixers() & set('achz'):     # nothing rotates at the other base
        kept = without(kept, *(name for name in kept if name.startswith('rope_') and name not in LOCAL_ROPE))
    return with_fixed_norm(kept)


# ----------------------------------------------------------------------------------------------------------
# Which tensor is which

# what checkpoints hold besides weights: masks, tables of angles and decays, and Qwen's multi-token prediction
NOT_WEIGHTS = re.compile(r'(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.bias|'
                         r'\.attention\.masked_bias|self_attention\.masked_bias|\.slope_rate|'
                         r'\.(query|key|diagonal)_decay)$|^mtp\.')


def tensors_of(model):
    """{name: tensor} of everything that a checkpoint holds, a tied head once."""
    buffers = {name: b for name, b in model.named_buffers() if name.endswith('choice_bias')}
    return dict(model.named_parameters()) | buffers


def rules_of(family, c, hf):
    """{our tensor: (theirs, layout)}, with the letters and alternatives of Family.tensors."""
    rules = family.tensors(c, hf) if callable(family.tensors) else family.tensors
    return {ours: with_layout(rule) for ours, rule in rules.items()}


def with_layout(rule):
    return (rule, same) if isinstance(rule, str) else rule


def under_names_of(where, rules):
    """
    The rules for files with the names that transformers 5 has in memory and writes with
    save_original_format=False. The experts of a layer are then one tensor, (E,2I,C) or (E,C,I) as ours.
    """
    head = rules['lm_head'][0] + '.weight'
    if head not in where and 'lm_head.weight' in where:
        rules = rules | {'lm_head': ('lm_head', same)}
    if not any(name.endswith('.experts.down_proj') for name in where):
        return rules
    renamed = {}
    for ours, (theirs, layout) in rules.items():
        theirs = theirs.replace('.block_sparse_moe.', '.mlp.')
        if layout in (gate_up_by_expert, by_expert):
            word = ('gate_up_proj' if layout is gate_up_by_expert else
                    'up_proj' if theirs.endswith('.up_proj') else 'down_proj')
            ours, theirs, layout = f'{ours}.weight', theirs.partition('{n}')[0] + word, same
        renamed[ours] = theirs, layout
    return renamed


def matches(rules, c, ours):
    """
    (our name, their names, layout) of every tensor of ours for which there is a rule. One for a weight or a
    bias alone goes before one for both.
    """
    plan = list(enumerate(c.plan()))
    layers = {'i': range(c.n_layer), 's': range(c.n_encoder),
              'a': [i for i, (mixer, _) in plan if mixer in 'awcnv'],
              'c': [i for i, (mixer, _) in plan if mixer == 's'],
              **{letter: [i for i, (mixer, _) in plan if mixer == letter] for letter in 'mrhz'},
              **{letter: [i for i, (_, ffn) in plan if ffn == letter] for letter in 'ef'}}
    for rule, (theirs, layout) in rules.items():
        letter = re.search(r'\{(\w)\}', rule)
        for i in layers[letter[1]] if letter else [None]:
            name = rule.replace(letter[0], str(i)) if letter else rule
            for leaf in ('', '.weight', '.bias'):
                if name + leaf in ours and not (leaf and rule + leaf in rules):
                    yield name + leaf, [t + leaf for t in expanded(theirs, i, c.n_expert)], layout


def expanded(theirs, layer, n_expert):
    """The names that one of their names stands for, with layer, experts and alternatives filled in."""
    names = [theirs.replace('{i}', str(layer))]
    if '{n}' in theirs:
        names = [name.replace('{n}', str(n)) for n in range(n_expert) for name in names]
    if alternatives := re.search(r'\{([\w.]+(?:,[\w.]+)+)\}', theirs):
        names = [name.replace(alternatives[0], word) for name in names for word in alternatives[1].split(',')]
    return names


# ----------------------------------------------------------------------------------------------------------
# Reading tensors


def names_in_file(where, embedding, head, config, hf):
    """{their name: its name in the file} of all weights. Files of base models leave the prefix out."""
    prefix = embedding.partition('.')[0] + '.'
    bare = '.' in embedding.removesuffix('.weight') and not any(name.startswith(prefix) for name in where)
    theirs = {(prefix + name if bare and name != head else name): name for name in where}
    # the first files of BERT
    theirs = {name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias'):
              stored for name, stored in theirs.items()}
    # DeepSeek V3's multi-token prediction is stored as layers after the last
    extra = min(hf.get('num_nextn_predict_layers', 0), len(where))
    after = tuple(f'model.layers.{config.n_layer + k}.' for k in range(extra))
    return {name: stored for name, stored in theirs.items()
            if not NOT_WEIGHTS.search(name) and not name.startswith(after)}


def copy_tensors(model, rules, hf, files, theirs):
    """Fill the model from the files. Refused where a tensor is missing, misshapen or left over."""
    ours, unused = tensors_of(model), set(theirs)
    folder, kind, unfilled = files.folder, hf['model_type'], set(ours)
    for mine, names, layout in matches(rules, model.config, ours):
        for name, piece in zip(names, layout(ours[mine], model.config), strict=True):
            if name not in theirs and re.search(FAMILIES[kind].zeros, name):
                ours[mine].zero_()
                continue
            if re.search(FAMILIES[kind].ones, name):
                ours[mine].fill_(1.0)
                continue
            if name not in theirs:
                raise ValueError(f'{folder} must hold the tensor {name}, which {kind} needs: fetch '
                                 'config.json and the weights again, from one place')
            tensor = files.get(theirs[name])
            if not tensor.is_floating_point():
                raise ValueError(f'{name} in {folder} must be of floating point, not {tensor.dtype}: '
                                 'quantised weights need their quantization_config in config.json')
            if tuple(tensor.shape) != piece.shape:
                raise ValueError(f'{name} in {folder} must have the shape {piece.shape} that follows from '
                                 f'config.json, not {tuple(tensor.shape)}')
            piece.load(tensor)
            unused.discard(name)
        unfilled.discard(mine)
    if unfilled:
        raise ValueError(f'{kind} has no tensor for {min(unfilled)}')
    unused = {name for name in unused if not re.search(FAMILIES[kind].unread, name)}
    if unused:
        more = f', and neither are {len(unused) - 1} more' if len(unused) > 1 else ''
        raise ValueError(f'{min(unused)} in {folder} is not a tensor of this {kind}{more}: fetch config.json '
                         'and the weights again, from one place')


# ----------------------------------------------------------------------------------------------------------
# flags -> config.json

# flags that no config.json holds: flags of training, and `bias`, which other flags spell out
NOT_STORED = ('dropout', 'aux_weight', 'bias_rate', 'z_weight', 'n_predict', 'predict_weight', 'zero_init',
              'bias')


def family_for(model):
    """
    (model_type, config.json) of the family that the model came from, if it still fits, or else of the first
    that fits: the flags read again as they are, and there is a rule for every tensor. ValueError names the
    flags in the way.
    """
    came_from, ours, misfits = getattr(model, 'family', None), tensors_of(model), []
    for kind in sorted(FAMILIES, key=lambda kind: kind != came_from):
        hf, misfit = fit(model.config, ours, kind)
        if hf is not None:
            if came_from in FAMILIES and kind != came_from:
                why = rules_in_words(misfits[0].differing) or 'it cannot say all flags'
                print(f'exported as {kind} and no longer as {came_from}, which was loaded: {why}')
            return kind, hf
        misfits.append(misfit)
    # the nearest has an encoder or not, as this, and its mixers; then the same kinds of blocks, and the
    # fewest other flags
    closest = min((misfit for misfit in misfits if misfit.differing is not None), key=lambda misfit: (
        'n_encoder' in misfit.differing, 'layer_pattern' in misfit.differing, misfit.of_blocks,
        len(misfit.differing)))
    raise ValueError(f'{rules_in_words(closest.differing)} to export as {closest.kind}, the nearest '
                     'published family')


class Misfit(NamedTuple):
    """Why a model is none of a family."""
    kind: str
    of_blocks: bool         # whether the flags are some that all models of the family share
    differing: dict | None  # {flag: (its value, the family's)}; None where no config.json has these flags


def fit(c, ours, kind):
    """(config.json of a model as one of this family, None), or (None, the Misfit)"""
    family = FAMILIES[kind]
    differing = unlike(c, family)
    if differing:
        return None, Misfit(kind, True, differing)
    hf = write_config(c, kind, family)
    try:
        differing = differences(c, config_of(complete(hf, family), family))
    except ValueError:  # flags that this family cannot express
        return None, Misfit(kind, True, None)
    rules = list(matches(rules_of(family, c, hf), c, ours))
    trained = [name for name, names, _ in rules
               if re.search(family.ones, names[0]) and not (ours[name] == 1).all()]
    differing |= dict.fromkeys(trained[:1], ('trained', 'all ones'))
    # the blocks of multi-token prediction, further.*, stay here
    covered = {name for name, _, _ in rules}
    if not differing and all(name in covered or name.startswith('further.') for name in ours):
        return hf, None
    return None, Misfit(kind, False, differing)


def rules_in_words(differing):
    return ', '.join(f'{flag}={mine} must be {theirs}'
                     for flag, (mine, theirs) in sorted((differing or {}).items()))


def write_config(c, kind, family):
    """config.json of a family, from flags."""
    hf = {'model_type': kind, 'architectures': [family.architecture],
          **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))}
    for name, key in family.keys.items():
        value = key.write(c)
        if value is not None or name in NULL_MEANS_NONE:
            hf[name] = value
    return hf | family.write(c)


def unlike(c, family):
    """{flag: (its value, the family's)} where a flag that all models of a family share is another here."""
    found = {}
    for flag, theirs in family.flags.items():
        value = getattr(c, flag)
        if flag.endswith('_pattern'):
            value = shortest_pattern(pair[flag == 'ffn_pattern'] for pair in c.plan())
        if not equal(value, theirs) and flag not in NOT_STORED and not c.missing(flag):
            found[flag] = value, theirs
    if not c.mixers() <= set(family.mixers):
        found['layer_pattern'] = c.layer_pattern, f'letters of {family.mixers}'
    pair = any('n_encoder' in key.flags for key in family.keys.values())
    if pair != bool(c.n_encoder):
        found['n_encoder'] = c.n_encoder, 'at least 1' if pair else 0
    return found


def equal(x, y):
    """Of values of a flag. True is not 1.0: an embed_scale of True is the square root of n_embd."""
    if isinstance(x, bool) or isinstance(y, bool):
        return x is y
    numbers = isinstance(x, float) and isinstance(y, (float, int))
    return x == y or numbers and math.isclose(x, y, rel_tol=1e-6)


def differences(c, d):
    """{flag: (its value in c, in d)} where two configs differ in what a checkpoint must say."""
    pairs = {f: (getattr(c, f), getattr(d, f)) for f in FIELDS - set(NOT_STORED)}
    found = {f: pair for f, pair in pairs.items() if not equal(*pair)}
    if c.plan() == d.plan():
        found = {f: pair for f, pair in found.items() if not f.endswith('_pattern')}
    if 'f' not in c.ffns():
        found.pop('ffn_width', None)
    # all that a checkpoint shows of balancing is whether the router has a bias
    if {c.balance, d.balance} <= {'none', 'aux'} or {c.balance, d.balance} <= {'bias', 'both'}:
        found.pop('balance', None)
    if all(equal(config.embed_scale or 1.0, 1.0) for config in (c, d)):
        found.pop('embed_scale', None)  # a factor of one is none
    if not c.missing('ssm') and not d.missing('ssm') and ssm_inner(c) == ssm_inner(d):
        found = without(found, 'ssm_width', 'ssm_expand')   # two ways to say the same
    if c.pos != 'learned':
        found.pop('block_size', None)  # a hint only
    if not c.attends():
        found.pop('n_head', None)
    return found
