"""Folders in Hugging Face format: found or downloaded, and their tensors read one by one."""
import os
import re

import torch

from nanoblocks.formats import first_line
from nanoblocks.tokenizer import read_json
from nanoblocks.training.checkpoint import out_of_memory

# the files that say where the tensors are, in the order in which they are looked for
LAYOUTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin',
           'pytorch_model.bin.index.json')


def folder_of(name):
    """A folder as it is; any other name is a repository of the Hugging Face hub, which is downloaded."""
    if os.path.isdir(name):
        return name
    if re.fullmatch('gpt2(-medium|-large|-xl)?', name):
        name = f'openai-community/{name}'  # nanoGPT's names
    if name.count('/') != 1 or name[0] in './~' or os.path.exists(name):
        raise FileNotFoundError(f'{name} must be a folder with config.json and model.safetensors, or a '
                                'repository of the Hugging Face hub such as openai-community/gpt2')
    from huggingface_hub import snapshot_download
    texts = ['*.json', '*.model', '*.txt', '*.bpe', '*.jinja']
    try:
        folder = snapshot_download(name, allow_patterns=[*texts, 'model*.safetensors'])
        if not any(os.path.isfile(os.path.join(folder, file)) for file in LAYOUTS[:2]):
            # weights of before safetensors
            folder = snapshot_download(name, allow_patterns=[*texts, 'pytorch_model*.bin'])
        return folder
    except Exception as error:  # no network, no such repository, no permission: many classes
        raise FileNotFoundError(f'{name} is not a folder here, and downloading it from the hub failed '
                                f'({first_line(error)}): name a folder, or go online once') from None


class TensorFiles:
    """The tensors of a folder, read one by one from memory-mapped files: no second copy is in memory."""
    REOPEN = 2 ** 24  # bytes: pages that were read count as memory until their file is closed

    def __init__(self, folder):
        self.folder, self.name, self.file, self.read = folder, None, None, 0
        found = next((name for name in LAYOUTS if os.path.exists(os.path.join(folder, name))), None)
        if found is None:
            refuse_adapter(folder)
            raise FileNotFoundError(f'{folder} must hold model.safetensors, or model.safetensors.index.json '
                                    'and its shards')
        # {tensor: its file}
        self.where = (self.read_index(os.path.join(folder, found)) if found.endswith('.json')
                      else dict.fromkeys(self.open(found).keys(), found))

    def read_index(self, path):
        """{tensor: its file} from an index, checked against what the files hold."""
        where = read_json(path).get('weight_map')
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise ValueError(f'{path} must have a weight_map, the file of every tensor: download it again')
        for file in sorted(set(where.values())):
            if re.search(r'[/\\\0]', file) or not file.endswith(('.safetensors', '.bin')):
                raise ValueError(f'{file[:80]!r} in {path} must be the name of a .safetensors or .bin file '
                                 'beside it: download it again')
            held = set(self.open(file).keys())
            for name in where:
                if where[name] == file and name not in held:
                    raise ValueError(f'{file} in {self.folder} must hold {name}, as the index says: download '
                                     'it again')
        return where

    def most_weights(self):
        """As many weights as the files can hold: one in a byte."""
        return sum(os.path.getsize(os.path.join(self.folder, file)) for file in set(self.where.values()))

    def open(self, name):
        """Open a file of the folder, and close the one before."""
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f'{name} is missing in {self.folder}, though the index names it: '
                                    'download it again')
        if not os.path.isfile(path):
            raise ValueError(f'{path} must be a file, not a folder: download it again')
        self.name, self.file, self.read = None, None, 0
        self.name, self.file = name, open_pickled(path) if name.endswith('.bin') else open_safetensors(path)
        return self.file

    def get(self, name):
        """The tensor, to be copied and dropped."""
        file = self.where[name]
        if file != self.name or self.read > self.REOPEN:
            self.open(file)
        tensor = self.file[name] if file.endswith('.bin') else self.file.get_tensor(name)
        self.read += tensor.nbytes
        return tensor


def open_safetensors(path):
    from safetensors import safe_open
    try:
        return safe_open(path, framework='pt')
    except Exception as error:  # safetensors has its own class
        refuse_want_of_memory(error, path)
        raise ValueError(f'{path} is damaged ({error}): download it again') from None


def open_pickled(path):
    """{name: tensor} of a .bin file, memory-mapped where its format allows; files with code are refused."""
    tensors = None
    for mmap in (True, False):  # False: the format before torch 1.6
        try:
            tensors = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
            break
        except Exception as error:  # damaged, or with code: many classes
            refuse_want_of_memory(error, path)
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f'{path} must hold tensors and nothing else: download it again, or download its '
                         'safetensors instead')
    return tensors


def refuse_want_of_memory(error, path):
    """ValueError if this is why a file cannot be read, which is then no reason to download it again."""
    if out_of_memory(error):
        raise ValueError(f'{path} needs more memory than is free: end other programs, or use a machine with '
                         'more memory') from None
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def refuse_adapter(folder):
    """ValueError for a folder that holds only what fine-tuning added to another model."""
    path = os.path.join(folder, 'adapter_config.json')
    if os.path.isfile(path):
        base = read_json(path).get('base_model_name_or_path')
        raise ValueError(f'{folder} holds an adapter (LoRA), not a model: merge it into {base} with '
                         'merge_and_unload() of the package peft, and load what save_pretrained then writes')
