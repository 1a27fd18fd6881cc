"""Checkpoints of one file, ckpt.pt: nanoGPT's, and ours."""
import os

from model import GPT, GPTConfig
from nanoblocks.files import ROOT
from nanoblocks.pretrained.convert import NOT_WEIGHTS, tensors_of
from nanoblocks.pretrained.texts import Texts
from nanoblocks.tokenizer import TiktokenTokenizer, from_meta, read_json
from nanoblocks.training import checkpoint

# the model_args of nanoGPT
SETTINGS = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}


def checkpoint_file(name):
    """The path of a checkpoint, where `name` is one or a folder that holds one; otherwise None."""
    if name.endswith('.pt'):
        return name
    inside, weights = os.path.join(name, 'ckpt.pt'), os.path.join(name, 'model.safetensors')
    return inside if os.path.exists(inside) and not os.path.exists(weights) else None


def load(path):
    """The model of a checkpoint."""
    state = checkpoint.load(path, needed=('model',))
    if 'model_args' not in state:
        return checkpoint.build(checkpoint.load(path), path).eval()
    unknown = sorted(state['model_args'].keys() - SETTINGS)
    if unknown:
        raise ValueError(f'{unknown[0]} in {path} is not a setting of nanoGPT')
    model = GPT(GPTConfig(**state['model_args']), seed=None).eval()
    # torch.compile puts a prefix before the names
    theirs = {name.removeprefix('_orig_mod.'): tensor for name, tensor in state['model'].items()}
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


def texts_of(path):
    """The tokenizer of a checkpoint, for an export."""
    tokenizer = tokenizer_of(path)
    return Texts(meta=tokenizer.meta()) if tokenizer else Texts()


def tokenizer_of(path):
    """The tokenizer of a checkpoint; None where nothing says which it is."""
    state = checkpoint.load(path, needed=('model',))
    if 'meta' in state:
        return from_meta(state['meta']['tokenizer'])
    vocab_size = state.get('model_args', {}).get('vocab_size')
    if vocab_size in (50257, 50304):
        return TiktokenTokenizer('gpt2')
    # nanoGPT pickles characters beside its data: the same dataset, prepared here, has the same characters
    dataset = os.path.basename(str(state.get('config', {}).get('dataset')))
    meta = read_json(os.path.join(ROOT, 'data', dataset, 'meta.json'))
    return from_meta(meta['tokenizer']) if meta and meta['vocab_size'] == vocab_size else None
