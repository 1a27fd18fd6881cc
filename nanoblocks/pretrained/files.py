"""Folders in Hugging Face format: found or downloaded, and their tensors read one by one."""
import os
import re

import torch

from nanoblocks.tokenizer import read_json


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
    try:
        return snapshot_download(name, allow_patterns=['*.json', 'model*.safetensors', '*.model', '*.txt'])
    except Exception as error:  # no network, no such repository, no permission: many classes
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f'{name} is not a folder here, and downloading it from the hub failed '
                                f'({reason})') from None


class TensorFiles:
    """The tensors of a folder, read one by one from memory-mapped files: no second copy is in memory."""
    REOPEN = 2 ** 24  # bytes: pages that were read count as memory until their file is closed

    def __init__(self, folder):
        self.folder, self.name, self.file = folder, None, None
        single, index, pickled = (os.path.join(folder, name) for name in (
            'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'))
        # {tensor: its file}; None is the pickled file
        if os.path.exists(single):
            self.where = dict.fromkeys(self.open('model.safetensors').keys(), 'model.safetensors')
        elif os.path.exists(index):
            self.where = self.read_index(index)
        elif os.path.exists(pickled):
            self.where = dict.fromkeys(self.unpickle(pickled))
        else:
            raise FileNotFoundError(f'{folder} must hold model.safetensors, or model.safetensors.index.json '
                                    'and its shards')

    def read_index(self, path):
        """{tensor: its file} from an index, checked against what the files hold."""
        where = read_json(path).get('weight_map')
        if not isinstance(where, dict):
            raise ValueError(f'{path} must have a weight_map, the file of every tensor: download it again')
        for file in sorted(set(where.values())):
            held = set(self.open(file).keys())
            for name in where:
                if where[name] == file and name not in held:
                    raise ValueError(f'{file} in {self.folder} must hold {name}, as the index says: download '
                                     'it again')
        return where

    def unpickle(self, path):
        """The tensors of pytorch_model.bin, memory-mapped; files with code are refused."""
        try:
            self.pickled = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except Exception:  # damaged, or with code: many classes
            raise ValueError(f'{path} must hold tensors and nothing else: download it again, or download its '
                             'safetensors instead') from None
        return self.pickled

    def open(self, name):
        """Open a safetensors file of the folder, and close the one before."""
        from safetensors import safe_open
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f'{name} is missing in {self.folder}, though the index names it: '
                                    'download it again')
        self.name, self.file, self.read = None, None, 0
        try:
            self.name, self.file = name, safe_open(path, framework='pt')
        except Exception as error:  # safetensors has its own class
            raise ValueError(f'{path} is damaged ({error}): download it again') from None
        return self.file

    def get(self, name):
        """The tensor, to be copied and dropped."""
        file = self.where[name]
        if file is None:
            return self.pickled[name]
        if file != self.name or self.read > self.REOPEN:
            self.open(file)
        tensor = self.file.get_tensor(name)
        self.read += tensor.nbytes
        return tensor
