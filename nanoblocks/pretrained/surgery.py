"""Surgery: a model with other flags that keeps what it can of the weights."""
from dataclasses import asdict

import torch

from model import GPT, GPTConfig
from nanoblocks.pretrained.convert import FIELDS, tensors_of
from nanoblocks.pretrained.layouts import qkv_rows

# flags that shape all of attention: with another value nothing of it could be kept
FIXED = ('attn', 'n_embd', 'n_head', 'head_dim')


def operate(model, overrides):
    """A model with these flags, the others as in `model`, from its weights. Prints what became of them."""
    old = model.config
    for name, value in overrides.items():
        if name not in FIELDS:
            raise ValueError(f'{name} is not a flag of GPTConfig')
        if name in FIXED:
            raise ValueError(f'{name}={value} must be {getattr(old, name)} as in the checkpoint: any '
                             'other value would discard its attention')
    new = GPT(GPTConfig(**new_flags(old, overrides))).eval()
    ours, theirs = tensors_of(new), tensors_of(model)
    done = {'copied': [], 'converted': [], 'newly initialised': [],
            'left out': [name for name in theirs if name not in ours]}
    for name, p in ours.items():
        done[transplant(name, p, theirs.get(name), old, new.config)].append(name)
    changes = ', '.join(f'{k}={v}' for k, v in overrides.items())
    for what, names in done.items():
        if names:
            some = f' ({", ".join(names[:3])}{", ..." if names[3:] else ""})' if what != 'copied' else ''
            print(f'{changes}: {len(names)} tensors {what}{some}')
    return new


def new_flags(old, overrides):
    """All flags. The widths of experts follow from the others again, unless they are overridden too."""
    flags = asdict(old) | overrides
    for name in ('expert_width', 'shared_width') if 'n_expert' in overrides else ():
        if name not in overrides:
            flags[name] = None
    if 'e' in flags['ffn_pattern'] and 'e' not in old.ffns() and 'expert_width' not in overrides:
        flags['expert_width'] = old.ffn_width
    return flags


def transplant(name, p, source, old, new):
    """
    Fill p as far as possible from `source`, the tensor of the same name under the old flags or None. Returns
    what became of p.
    """
    if source is None:
        return 'newly initialised'
    if source.shape == p.shape:
        p.copy_(source)
        return 'copied'
    if '.mixer.c_attn.' in name and source.shape[1:] == p.shape[1:]:
        regrouped = regroup(source, old, new)
        if regrouped is not None:
            p.copy_(regrouped)
            return 'converted'
    elif '.ffn.' in name and p.shape[1:] == source.shape:
        # every expert begins as the dense feed-forward (sparse upcycling, Komatsuzaki et al. 2023)
        p.copy_(source.expand_as(p))
        return 'converted'
    elif name in ('wte.weight', 'lm_head.weight', 'wpe.weight') and p.shape[1:] == source.shape[1:]:
        rows = min(len(p), len(source))
        p[:rows] = source[:rows]
        return 'converted'
    return 'newly initialised'


def regroup(c_attn, old, new):
    """c_attn with another number of key heads; None where neither number divides the other."""
    query, key, value = c_attn.split(qkv_rows(old))
    if old.n_kv_head % new.n_kv_head == 0:
        # query heads that come to share a key take the mean of their keys (Ainslie et al. 2023, section 2.1)
        key, value = (x.unflatten(0, (new.n_kv_head, -1, new.head_dim)).mean(1).flatten(0, 1)
                      for x in (key, value))
    elif new.n_kv_head % old.n_kv_head == 0:
        times = new.n_kv_head // old.n_kv_head
        key, value = (x.unflatten(0, (-1, new.head_dim)).repeat_interleave(times, 0).flatten(0, 1)
                      for x in (key, value))
    else:
        return None
    return torch.cat((query, key, value))
