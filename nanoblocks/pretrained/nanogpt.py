"""Checkpoints of one file, ckpt.pt: nanoGPT's, and ours; nanochat's are in nanochat.py."""
import os

import torch

from model import GPT, GPTConfig
from nanoblocks.files import ROOT
from nanoblocks.pretrained import nanochat
from nanoblocks.pretrained.convert import NOT_WEIGHTS, tensors_of
from nanoblocks.pretrained.texts import Texts
from nanoblocks.tokenizer import from_meta, read_json
from nanoblocks.training import checkpoint

# the model_args of nanoGPT
SETTINGS = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}


def checkpoint_file(name):
    """The path of a checkpoint, where `name` is one or a folder that holds one; otherwise None."""
    if name.endswith('.pt'):
        return name
    inside, weights = os.path.join(name, 'ckpt.pt'), os.path.join(name, 'model.safetensors')
    if os.path.exists(weights):
        return None
    return inside if os.path.exists(inside) else nanochat.last_of(name)


def load(path):
    """The model of a checkpoint."""
    if nanochat.meta_of(path):
        model = nanochat.load(path)
        model.family, model.texts = 'nanochat', Texts()
        return model
    state = checkpoint.load(path, needed=('model',))
    if 'model_args' not in state:
        model = checkpoint.build(checkpoint.load(path), path).eval()
    else:
        model = load_nanogpt(state, path)
        model.family = 'gpt2'
    meta = meta_of(state)
    model.texts = Texts(meta=meta) if meta else Texts()
    return model


def load_nanogpt(state, path):
    """The model of a checkpoint of nanoGPT."""
    args, weights = state['model_args'], state['model']
    if not isinstance(args, dict) or not isinstance(weights, dict) or not all(
            isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f'{path} must hold model_args and tensors, as nanoGPT writes them: use another '
                         'checkpoint')
    unknown = sorted(map(str, args.keys() - SETTINGS))
    if unknown:
        raise ValueError(f'{unknown[0]} in {path} is not a setting of nanoGPT')
    if type(args.get('n_layer')) is int and args['n_layer'] > len(weights):
        raise ValueError(f'n_layer={args["n_layer"]} in {path} must be at most {len(weights)}, the number of '
                         'its tensors: use another checkpoint')
    model = GPT(GPTConfig(**args), seed=None).eval()
    # torch.compile puts a prefix before the names
    theirs = {name.removeprefix('_orig_mod.'): tensor for name, tensor in weights.items()}
    for name, p in tensors_of(model).items():
        name = 'transformer.' + name.replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.')
        tensor = theirs.pop(name, None)
        if tensor is None or tensor.shape != p.shape:
            raise ValueError(f'{path} must hold {name} of the shape {tuple(p.shape)}')
        p.copy_(tensor)
    unused = sorted(name for name in theirs if name != 'lm_head.weight' and not NOT_WEIGHTS.search(name))
    if unused:
        raise ValueError(f'{unused[0]} in {path} is not a tensor of GPT-2')
    return model


def tokenizer_of(path):
    """The tokenizer of a checkpoint; None where nothing says which it is, as nanochat's is pickled code."""
    if nanochat.meta_of(path):
        return None
    meta = meta_of(checkpoint.load(path, needed=('model',)))
    return from_meta(meta) if meta else None


def meta_of(state):
    """What `from_meta` takes for the tokenizer of a checkpoint; None where nothing says which it is."""
    if 'meta' in state:
        return state['meta'].get('tokenizer') if isinstance(state['meta'], dict) else None
    args, config = (state.get(key) if isinstance(state.get(key), dict) else {}
                    for key in ('model_args', 'config'))
    if args.get('vocab_size') in (50257, 50304):
        return {'kind': 'tiktoken', 'name': 'gpt2'}
    # nanoGPT pickles characters beside its data: the same dataset, prepared here, has the same characters
    dataset = os.path.basename(str(config.get('dataset')))
    meta = read_json(os.path.join(ROOT, 'data', dataset, 'meta.json'))
    return meta.get('tokenizer') if meta.get('vocab_size') == args.get('vocab_size') else None
