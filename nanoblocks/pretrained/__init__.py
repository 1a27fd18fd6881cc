"""
Published checkpoints, in and out: GPT.from_pretrained, model.save_pretrained.

In: a folder in Hugging Face format or a repository of the hub, a checkpoint of nanoGPT, one of ours. The
files are read tensor by tensor into the model, so that no second copy of the weights is in memory. Out: the
names of the published family that the model's flags are. What the families are, families.py says.
"""
import json
import math
import os
import re
from dataclasses import asdict, fields

import torch

from data.tokenizer import TiktokenTokenizer, from_meta, read_json
from data.tokenizer import from_folder as tokenizer_in
from model import GPT, GPTConfig
from nanoblocks.files import ROOT
from nanoblocks.pretrained.families import DEFAULTS, FAMILIES, heads, period, without

FIELDS = {f.name for f in fields(GPTConfig)}


@torch.no_grad()
def from_pretrained(name, **overrides):
    """
    GPT of a folder or hub repository in Hugging Face format, or of a nanoGPT checkpoint, in fp32. overrides:
    flags of GPTConfig that shall be otherwise: what fits is copied, what can be is converted, the rest is
    drawn anew, and a line is printed for each kind. ValueError or FileNotFoundError, one sentence, where that
    cannot be; nothing is half-loaded.
    """
    name = os.fspath(name)
    path = checkpoint_file(name)
    model = from_checkpoint(path) if path else from_folder(folder_of(name))
    changed = {k: v for k, v in overrides.items() if getattr(model.config, k, None) != v or k not in FIELDS}
    return operate(model, changed) if changed else model


@torch.no_grad()
def save_pretrained(model, folder):
    """
    Write config.json and model.safetensors, in the names of the published family that the model's flags are,
    for `transformers` to load. ValueError, one sentence that names the flags in the way, where there is none.
    """
    from safetensors.torch import save_file
    kind, hf = family_for(model)
    ours, tensors = tensors_of(model), {}
    for mine, names, layout in matches(FAMILIES[kind], model.config, hf, ours):
        pieces = layout(ours[mine].detach().float().cpu(), model.config)
        tensors |= {name: piece.save() for name, piece in zip(names, pieces, strict=True)}
    if model.config.n_predict > 1:
        print(f'n_predict={model.config.n_predict}: the blocks of further predictions are left out, as they '
              'are for training only')
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(hf | {'dtype': 'float32'}, f, indent=1)


def tokenizer_of(name):
    """The tokenizer of what from_pretrained(name) loads, from data/tokenizer.py; None where there is none."""
    path = checkpoint_file(os.fspath(name))
    if path is None:
        folder = folder_of(os.fspath(name))
        gpt2 = read_json(os.path.join(folder, 'config.json')).get('vocab_size') == 50257
        return tokenizer_in(folder) or (TiktokenTokenizer('gpt2') if gpt2 else None)
    from nanoblocks.training import checkpoint
    state = checkpoint.load(path, needed=('model',))
    if 'meta' in state:
        return from_meta(state['meta']['tokenizer'])
    vocab_size = state.get('model_args', {}).get('vocab_size')
    if vocab_size in (50257, 50304):
        return TiktokenTokenizer('gpt2')
    # nanoGPT keeps characters beside its data, pickled: the same dataset prepared here has the same
    data = os.path.join(ROOT, 'data')
    dataset = os.path.basename(str(state.get('config', {}).get('dataset')))
    meta = read_json(os.path.join(data, dataset, 'meta.json'))
    return from_meta(meta['tokenizer']) if meta and meta['vocab_size'] == vocab_size else None


def same_tokenizer(name, meta):
    """Whether the tokenizer that `meta` describes makes of a text what that of from_pretrained(name) does."""
    text = "def main(): return {'naïve': 3.14159}  # the Quick brown fox, 漢字 🙂\n\n\tand so on"
    ours, theirs = from_meta(meta), tokenizer_of(name)
    try:
        return theirs is None or ours.encode(text) == theirs.encode(text)
    except ValueError:  # a vocabulary of characters, not of these
        return ours.meta() == theirs.meta()


# ----------------------------------------------------------------------------------------------------------
# What a name stands for


def checkpoint_file(name):
    """The path of a checkpoint of nanoGPT or of ours, where `name` is one or a folder that holds one."""
    if name.endswith('.pt'):
        return name
    inside, weights = os.path.join(name, 'ckpt.pt'), os.path.join(name, 'model.safetensors')
    return inside if os.path.exists(inside) and not os.path.exists(weights) else None


def folder_of(name):
    """A folder as it is; anything else is a repository of the Hugging Face hub, which is downloaded."""
    if os.path.isdir(name):
        return name
    if re.fullmatch('gpt2(-medium|-large|-xl)?', name):
        name = f'openai-community/{name}'  # as nanoGPT calls them
    if name.count('/') != 1 or name[0] in './~' or os.path.exists(name):
        raise FileNotFoundError(f'{name} must be a folder with config.json and model.safetensors, or a '
                                'repository of the Hugging Face hub such as openai-community/gpt2')
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=['*.json', 'model*.safetensors', '*.model', '*.txt'])
    except Exception as error:  # no network, no such repository, no right to it: many classes
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f'{name} is no folder here, and the hub does not give it ({reason})'
                                ) from None


class Files:
    """The tensors of a folder in Hugging Face format, read one by one from memory-mapped files."""
    PAGES = 2 ** 24  # bytes: pages that were read count as memory until their file is closed

    def __init__(self, folder):
        self.folder, self.name, self.file = folder, None, None
        single, index, pickled = (os.path.join(folder, name) for name in (
            'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'))
        if os.path.exists(single):
            self.where = dict.fromkeys(self.open('model.safetensors').keys(), 'model.safetensors')
        elif os.path.exists(index):
            self.where = read_json(index).get('weight_map')
            if not isinstance(self.where, dict):
                raise ValueError(f'{index} must hold weight_map, the file of every tensor: fetch it again')
            for file in sorted(set(self.where.values())):
                held = set(self.open(file).keys())
                for name in (name for name, f in self.where.items() if f == file and name not in held):
                    raise ValueError(f'{file} in {folder} must hold {name}, as its index says: fetch it '
                                     'again')
        elif os.path.exists(pickled):
            self.where = dict.fromkeys(self.unpickle(pickled))
        else:
            raise FileNotFoundError(f'{folder} must hold model.safetensors, or model.safetensors.index.json '
                                    'and its shards')

    def unpickle(self, path):
        try:
            self.pickled = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except Exception:  # damaged, or more than plain tensors: many classes
            raise ValueError(f'{path} must hold tensors and nothing else: fetch it again, or its safetensors '
                             'instead') from None
        return self.pickled

    def open(self, name):
        from safetensors import safe_open
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f'{name} is missing in {self.folder}, though its index names it: fetch '
                                    'it again')
        self.name, self.file, self.read = None, None, 0
        try:
            self.name, self.file = name, safe_open(path, framework='pt')
        except Exception as error:  # safetensors has a class of its own
            raise ValueError(f'{path} is damaged ({error}): fetch it again') from None
        return self.file

    def get(self, name):
        """The tensor of that name, to be copied and let go."""
        file = self.where[name]
        if file is None:
            return self.pickled[name]
        if file != self.name or self.read > self.PAGES:
            self.open(file)
        tensor = self.file.get_tensor(name)
        self.read += tensor.nbytes
        return tensor


# ----------------------------------------------------------------------------------------------------------
# config.json

# what no family of ours does, whatever else its config says
REFUSED = ('quantization_config', 'is_encoder_decoder', 'vision_config', 'text_config')
# what may be null and then means something: nothing of the kind
NULLABLE = ('sliding_window', 'q_lora_rank', 'attn_logit_softcapping', 'final_logit_softcapping')


def read_config(folder):
    """config.json of a folder: with the defaults of its family, and without nulls."""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        raise FileNotFoundError(f'{folder} must hold config.json')
    hf = read_json(path)
    kind = hf.get('model_type')
    for key in REFUSED:
        if hf.get(key):
            raise ValueError(f'{key} in {path} asks for what {kind} here does not do')
    if kind not in FAMILIES:
        raise ValueError(f'model_type={kind} in {path} must be one of {", ".join(FAMILIES)}')
    for key, value in FAMILIES[kind].needs.items():
        if hf.get(key, value) not in (value, None):
            raise ValueError(f'{key}={hf[key]} in {path} must be {value}: {kind} here does nothing else')
    return complete(hf, FAMILIES[kind])


def complete(hf, entry):
    """With the defaults of a family where a key is absent or null, unless null means something of its own."""
    default = DEFAULTS | entry.defaults
    said = {key: value for key, value in hf.items() if value is not None or key in NULLABLE}
    no = {key: False for key, value in hf.items() if value is None and isinstance(default.get(key), bool)}
    named = {key: said[other] for other, key in entry.synonyms.items() if other in said}
    return {key: value for key, value in (default | no | named | said).items() if value is not None}


def flags_of(hf, entry):
    """The flags of GPTConfig that a complete config.json stands for."""
    flags, needed = dict(entry.flags), {'vocab_size', 'n_embd', 'n_layer'}
    try:
        for key, flag in entry.keys.items():
            if key in hf or flag in needed:
                flags |= read_key(key, flag, hf)
        flags |= entry.read(hf)
    except KeyError as error:
        raise ValueError(f'config.json must say {error.args[0]}') from None
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f'config.json holds what no {hf["model_type"]} has ({error})') from None
    return meaningful(flags)


def read_key(key, flag, hf):
    if isinstance(flag, str):
        return {flag: hf[key]}
    if not hasattr(flag, 'read'):
        return dict.fromkeys(flag, hf[key])
    try:
        return {flag.flag: flag.read(hf[key], hf)}
    except ValueError as error:
        raise ValueError(f'{key}={hf[key]} in config.json must {error}') from None


def meaningful(flags):
    """Without the flags that mean nothing beside the others, as the width of experts where there are none."""
    probe = GPTConfig.unchecked(**flags)
    idle = {flag for flag in flags if flag in FIELDS and probe.missing(flag)}
    if 'f' not in probe.ffns():
        idle.add('ffn_width')
    return {flag: value for flag, value in flags.items() if flag not in idle}


def config_of(hf, entry):
    """GPTConfig of a complete config.json."""
    flags = flags_of(hf, entry)
    try:
        return GPTConfig(**flags)
    except ValueError as error:
        keys = {getattr(flag, 'flag', flag): key for key, flag in entry.keys.items()}
        key = keys.get(str(error).partition('=')[0])
        raise ValueError(f'{error}, which is {key} in config.json' if key else
                         f'config.json asks for what cannot be: {error}') from None


# ----------------------------------------------------------------------------------------------------------
# Tensors

# what checkpoints hold besides weights: masks, tables of angles
STRAY = re.compile(r'(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.bias|'
                   r'\.attention\.masked_bias|self_attention\.masked_bias)$')


def tensors_of(model):
    """{name: tensor} of all that a checkpoint holds, a tied head once."""
    buffers = {name: b for name, b in model.named_buffers() if name.endswith('choice_bias')}
    return dict(model.named_parameters()) | buffers


def rules_of(entry, c, hf):
    return entry.rules(c, hf) if callable(entry.rules) else entry.rules


def matches(entry, c, hf, ours):
    """(our name, their names, layout) of every tensor in `ours` that a rule of the family is for."""
    plan = list(enumerate(c.plan()))
    layers = {'i': range(c.n_layer),
              'a': [i for i, (mixer, _) in plan if mixer != 'm'],
              'm': [i for i, (mixer, _) in plan if mixer == 'm'],
              'e': [i for i, (_, ffn) in plan if ffn == 'e'],
              'f': [i for i, (_, ffn) in plan if ffn == 'f']}
    for name, theirs, layout in rules_of(entry, c, hf):
        letter = re.search(r'\{(\w)\}', name)
        for i in layers[letter[1]] if letter else [None]:
            mine = name.replace(letter[0], str(i)) if letter else name
            names = [t.replace('{i}', str(i)) for t in theirs]
            if '{n}' in names[0]:
                names = [t.replace('{n}', str(n)) for n in range(c.n_expert) for t in names]
            for leaf in ('', '.weight', '.bias'):
                if mine + leaf in ours:
                    yield mine + leaf, [t + leaf for t in names], layout


def from_folder(folder):
    """The model of a folder in Hugging Face format."""
    hf = read_config(folder)
    entry, files = FAMILIES[hf['model_type']], Files(folder)
    config = config_of(hf, entry)
    rules = {ours: names[0] for ours, names, _ in rules_of(entry, config, hf)}
    head, embedding = rules['lm_head'] + '.weight', rules['wte'] + '.weight'
    # a base model's names have no prefix
    prefix = embedding.partition('.')[0] + '.'
    bare = not any(name.startswith(prefix) for name in files.where)
    theirs = {(prefix + name if bare and name != head else name): name for name in files.where}
    ignored = {name for name in theirs if STRAY.search(name)}
    # DeepSeek V3's further predictions are layers behind the last
    further = [f'model.layers.{config.n_layer + k}.' for k in range(hf.get('num_nextn_predict_layers', 0))]
    ignored |= {name for name in theirs if name.startswith(tuple(further))}
    if config.tie and head in theirs and embedding in theirs:
        # a head of its own is used, whatever the config says
        config.tie = torch.equal(files.get(theirs[head]), files.get(theirs[embedding]))
        ignored |= {head} if config.tie else set()
    model = GPT(config, seed=None).eval()
    fill(model, entry, hf, files, theirs, ignored)
    entry.finish(model, hf)
    return model


def fill(model, entry, hf, files, theirs, ignored):
    """Copy every tensor of the files to its place in the model: each once, and all of them."""
    ours, used, folder, kind = tensors_of(model), set(ignored), files.folder, hf['model_type']
    missing = set(ours)
    for mine, names, layout in matches(entry, model.config, hf, ours):
        for name, piece in zip(names, layout(ours[mine], model.config), strict=True):
            if name not in theirs:
                raise ValueError(f'{folder} must hold the tensor {name}, which {kind} needs')
            tensor = files.get(theirs[name])
            if tuple(tensor.shape) != piece.shape:
                raise ValueError(f'{name} in {folder} has the shape {tuple(tensor.shape)} and must have '
                                 f'{piece.shape}, as config.json says')
            piece.load(tensor)
            used.add(name)
        missing.discard(mine)
    if missing:
        raise ValueError(f'{kind} has no tensor for {min(missing)}')
    unused = sorted(theirs.keys() - used)
    if unused:
        more = f', nor have {len(unused) - 1} more tensors' if unused[1:] else ''
        raise ValueError(f'{unused[0]} in {folder} has no place in {kind}{more}')


NANOGPT = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}


def from_checkpoint(path):
    """One of ours, or of nanoGPT: its names with or without what torch.compile puts before them."""
    from nanoblocks.training import checkpoint
    state = checkpoint.load(path, needed=('model',))
    if 'model_args' not in state:
        return checkpoint.build(checkpoint.load(path), path).eval()
    odd = sorted(state['model_args'].keys() - NANOGPT)
    if odd:
        raise ValueError(f'{odd[0]} in {path} is no setting of nanoGPT')
    model = GPT(GPTConfig(**state['model_args']), seed=None).eval()
    theirs = {name.removeprefix('_orig_mod.'): t for name, t in state['model'].items()}
    for name, p in tensors_of(model).items():
        name = 'transformer.' + name.replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.')
        tensor = theirs.pop(name, None)
        if tensor is None or tensor.shape != p.shape:
            raise ValueError(f'{path} must hold {name} of the shape {tuple(p.shape)}')
        p.copy_(tensor)
    unused = sorted(name for name in theirs if name != 'lm_head.weight' and not STRAY.search(name))
    if unused:
        raise ValueError(f'{unused[0]} in {path} has no place in GPT-2')
    return model


# ----------------------------------------------------------------------------------------------------------
# Surgery: another model with what fits of the weights

# with another of these there is nothing of a checkpoint's attention to keep
KEPT = ('attn', 'n_embd', 'n_head', 'head_dim')


def operate(model, overrides):
    """A model whose flags are these, otherwise the same, from the weights of `model`."""
    old = model.config
    for name, value in overrides.items():
        if name not in FIELDS:
            raise ValueError(f'{name} is no flag of GPTConfig')
        if name in KEPT:
            raise ValueError(f'{name}={value} must be {getattr(old, name)} as in the checkpoint: with '
                             'another there is nothing of its attention to keep')
    new = GPT(GPTConfig(**new_flags(old, overrides))).eval()
    ours, theirs = tensors_of(new), tensors_of(model)
    done = {'copied': [], 'converted': [], 'newly initialised': [],
            'left out': [name for name in theirs if name not in ours]}
    for name, p in ours.items():
        done[transplant(name, p, theirs.get(name), old, new.config)].append(name)
    said = ', '.join(f'{k}={v}' for k, v in overrides.items())
    for what, names in done.items():
        if names:
            some = f' ({", ".join(names[:3])}{", ..." if names[3:] else ""})' if what != 'copied' else ''
            print(f'{said}: {len(names)} tensors {what}{some}')
    return new


def new_flags(old, overrides):
    """Flags of which the widths of experts follow from the others, unless they were asked for."""
    flags = asdict(old) | overrides
    for name in ('expert_width', 'shared_width') if 'n_expert' in overrides else ():
        if name not in overrides:
            flags[name] = None
    if 'e' in flags['ffn_pattern'] and 'e' not in old.ffns() and 'expert_width' not in overrides:
        flags['expert_width'] = old.ffn_width
    return flags


def transplant(name, p, source, old, new):
    """Fill p with what `source`, the tensor of that name under the old flags, has to give, and say how."""
    if source is None:
        return 'newly initialised'
    if source.shape == p.shape:
        p.copy_(source)
        return 'copied'
    if '.mixer.c_attn.' in name and source.shape[1:] == p.shape[1:]:
        shared = share_keys(source, old, new)
        if shared is not None:
            p.copy_(shared)
            return 'converted'
    elif '.ffn.' in name and p.shape[1:] == source.shape:
        # every expert begins as the dense ffn (sparse upcycling, Komatsuzaki et al. 2023)
        p.copy_(source.expand_as(p))
        return 'converted'
    elif name in ('wte.weight', 'lm_head.weight', 'wpe.weight') and p.shape[1:] == source.shape[1:]:
        rows = min(len(p), len(source))
        p[:rows] = source[:rows]
        return 'converted'
    return 'newly initialised'


def share_keys(c_attn, old, new):
    """c_attn for another number of key heads; None where neither number divides the other."""
    query, key, value = c_attn.split(heads(old))
    if old.n_kv_head % new.n_kv_head == 0:
        # heads that shall share a key take the mean of theirs (Ainslie et al. 2023, section 2.1)
        key, value = (x.unflatten(0, (new.n_kv_head, -1, new.head_dim)).mean(1).flatten(0, 1)
                      for x in (key, value))
    elif new.n_kv_head % old.n_kv_head == 0:
        times = new.n_kv_head // old.n_kv_head
        key, value = (x.unflatten(0, (-1, new.head_dim)).repeat_interleave(times, 0).flatten(0, 1)
                      for x in (key, value))
    else:
        return None
    return torch.cat((query, key, value))


# ----------------------------------------------------------------------------------------------------------
# Export

# flags of training, which no checkpoint of theirs holds, and `bias`, which other flags spell out
FREE = ('dropout', 'aux_weight', 'bias_rate', 'z_weight', 'n_predict', 'predict_weight', 'zero_init', 'bias')


def family_for(model):
    """(model_type, config.json) of the family that these flags are. ValueError names the flags in the way."""
    c, ours, others = model.config, tensors_of(model), []
    for kind, entry in FAMILIES.items():
        left = unlike(c, entry)
        if left:
            others.append((1, len(left), kind, left))
            continue
        hf = write_config(c, kind, entry)
        try:
            left = differences(c, config_of(complete(hf, entry), entry))
        except ValueError:  # flags that this family cannot say
            continue
        covered = {mine for mine, _, _ in matches(entry, c, hf, ours)}
        if not left and all(name in covered or name.startswith('further.') for name in ours):
            return kind, hf
        others.append((0, len(left), kind, left))
    # the nearest has the same kinds of blocks, and the fewest other flags
    _, _, kind, left = min(others, key=lambda other: other[:2])
    told = ', '.join(f'{name}={mine} ({theirs} there)' for name, (mine, theirs) in sorted(left.items()))
    raise ValueError(f'these flags belong to no published family; {kind}, the nearest, differs in {told}')


def write_config(c, kind, entry):
    """config.json of a family, from flags."""
    hf = {'model_type': kind, 'architectures': [entry.architecture],
          **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))}
    for key, flag in entry.keys.items():
        first = flag if isinstance(flag, str) else flag[0]
        hf[key] = flag.write(c) if hasattr(flag, 'write') else getattr(c, first)
    unsaid = [key for key in entry.keys if hf[key] is None and key not in NULLABLE]
    return without(hf, *unsaid) | entry.write(c)


def unlike(c, entry):
    """{flag: (its value, the family's)} of what is so in every model of a family and not here."""
    found = {}
    for flag, theirs in entry.flags.items():
        value = getattr(c, flag)
        if flag.endswith('_pattern'):
            value = period(pair[flag == 'ffn_pattern'] for pair in c.plan())
        means = not c.missing(flag)
        if means and flag not in FREE and value != theirs:
            found[flag] = value, theirs
    if not c.mixers() <= set(entry.mixers):
        found['layer_pattern'] = c.layer_pattern, entry.mixers
    return found


def differences(c, d):
    """{flag: (its value in c, in d)} where two configs differ in what a checkpoint must say."""
    def same(x, y):
        close = isinstance(x, float) and isinstance(y, (float, int))
        return x == y or close and math.isclose(x, y, rel_tol=1e-6)
    pairs = {f: (getattr(c, f), getattr(d, f)) for f in FIELDS - set(FREE)}
    found = {f: pair for f, pair in pairs.items() if not same(*pair)}
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
