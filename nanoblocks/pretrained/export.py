"""
From a GPT to a folder in Hugging Face format: config.json, the tokenizer, and weights in shards.

The tensors are made and written one by one, so beside the model there is memory for one of them.
"""
import json
import os
import re
from typing import NamedTuple

import torch

from nanoblocks.pretrained import texts
from nanoblocks.pretrained.convert import family_for, matches, rules_of, tensors_of
from nanoblocks.pretrained.families import FAMILIES

DTYPES = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}   # their names in safetensors
UNITS = {'KB': 10 ** 3, 'MB': 10 ** 6, 'GB': 10 ** 9, 'TB': 10 ** 12}
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'


def save_folder(model, folder, dtype=None, max_shard_size='50GB'):
    """The arguments are those of save_pretrained."""
    dtype = model.wte.weight.dtype if dtype is None else as_dtype(dtype)
    most = bytes_of(max_shard_size)
    kind, hf = family_for(model)
    stored = stored_tensors(model, kind, hf, dtype)
    if model.config.n_predict > 1:
        print(f'n_predict={model.config.n_predict}: the blocks of multi-token prediction are not exported: '
              'they serve training only')
    os.makedirs(folder, exist_ok=True)
    # the text side of a model that was loaded
    hf |= texts.save(model.texts, folder) if hasattr(model, 'texts') else {}
    write_shards(folder, stored, most)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(hf | {'dtype': name_of(dtype)}, f, indent=1)


def as_dtype(dtype):
    """A dtype that weights may have, from its name or itself."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        raise ValueError(f'dtype={dtype} must be one of {", ".join(map(name_of, DTYPES))}')
    return found


def name_of(dtype):
    return str(dtype).removeprefix('torch.')


def bytes_of(size):
    """A number of bytes, from '5GB' or itself."""
    told = re.fullmatch(r'(\d+) *([KMGT]B)', size, re.I) if isinstance(size, str) else None
    count = int(told[1]) * UNITS[told[2].upper()] if told else size
    if type(count) is not int or count < 1:
        raise ValueError(f'max_shard_size={size} must be a number of bytes, or a text with one of the units '
                         f'{", ".join(UNITS)}: write 5GB')
    return count


# ----------------------------------------------------------------------------------------------------------
# What the files hold


class Stored(NamedTuple):
    """A tensor of the files, made when it is written."""
    pieces: list            # Pieces of our tensors that make it
    dtype: torch.dtype

    @property
    def shape(self):
        return tuple(self.pieces[0].shape)

    @property
    def bytes(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def make(self):
        tensor = None
        for piece in self.pieces:
            tensor = piece.save(tensor)
        return tensor.to(self.dtype)


def stored_tensors(model, kind, hf, dtype):
    """{name in the files: Stored}, in the order of our tensors."""
    ours, found = tensors_of(model), {}
    rules = rules_of(FAMILIES[kind], model.config, hf)
    place = {name: n for n, name in enumerate(ours)}
    for name, names, layout in sorted(matches(rules, model.config, ours), key=lambda match: place[match[0]]):
        # the bias of a router's choice, a buffer, is far finer than 16 bits
        kept = dtype if isinstance(ours[name], torch.nn.Parameter) else torch.float32
        for theirs, piece in zip(names, layout(ours[name].detach(), model.config), strict=True):
            if not re.search(FAMILIES[kind].ones, theirs):
                found.setdefault(theirs, Stored([], kept)).pieces.append(piece)
    if model.config.tie and FAMILIES[kind].head_stored:
        embedding, head = (rules[name][0] + '.weight' for name in ('wte', 'lm_head'))
        found[head] = found[embedding]
    return found


# ----------------------------------------------------------------------------------------------------------
# Files


def write_shards(folder, stored, most):
    """Write one file, or several of at most so many bytes and their index. Those of an older export go."""
    shards, size = [{}], 0
    for name, tensor in stored.items():
        if shards[-1] and size + tensor.bytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f'model-{i:05}-of-{n:05}.safetensors' for i in range(1, n + 1)]
    for file, shard in zip(files, shards):
        write_safetensors(os.path.join(folder, file), shard)
    if n > 1:
        sizes = {'total_parameters': sum(torch.Size(tensor.shape).numel() for tensor in stored.values()),
                 'total_size': sum(tensor.bytes for tensor in stored.values())}
        where = {name: file for file, shard in zip(files, shards) for name in shard}
        with open(os.path.join(folder, INDEX), 'w') as f:
            json.dump({'metadata': sizes, 'weight_map': where}, f, indent=2, sort_keys=True)
        files.append(INDEX)
    for file in os.listdir(folder):
        if re.fullmatch(r'model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?', file) and file not in files:
            os.remove(os.path.join(folder, file))


def write_safetensors(path, stored):
    """
    Write {name: Stored} as a .safetensors file: the length of the header, eight bytes; the header, which is
    JSON; the tensors, one behind the other.
    """
    # those with the longer numbers first, so that each lies at a multiple of its own
    stored = dict(sorted(stored.items(), key=lambda item: -item[1].dtype.itemsize))
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in stored.items():
        header[name] = {'dtype': DTYPES[tensor.dtype], 'shape': tensor.shape,
                        'data_offsets': (end, end + tensor.bytes)}
        end += tensor.bytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for tensor in stored.values():
            f.write(tensor.make().reshape(-1).view(torch.uint8).numpy())
