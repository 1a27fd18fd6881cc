"""
Published checkpoints, in and out: GPT.from_pretrained, model.save_pretrained, and their tokenizers.

    files.py     finds or downloads a folder and reads its tensors
    convert.py   a folder in Hugging Face format to a model, and back
    quantised.py the weights that quantised tensors stand for
    wrapped.py   the text part of models of images and text
    nanogpt.py   checkpoints of one file: nanoGPT's, and ours
    nanochat.py  nanochat's, a file of tensors beside one of settings
    surgery.py   changes flags of a loaded model
    families/    what each published family is, one entry each, and how to add one
    keys.py, rope.py, layouts.py    what entries are made of: keys of config.json, layouts of tensors
    texts.py     the tokenizer of a model, and the tokens that begin and end a text, for an export
"""
import os

import torch

from model import GPT
from nanoblocks.pretrained import convert, nanogpt, texts
from nanoblocks.pretrained.files import folder_of
from nanoblocks.pretrained.surgery import operate
from nanoblocks.tokenizer import from_folder, from_meta


@torch.no_grad()
def from_pretrained(name: str | os.PathLike, **overrides) -> GPT:
    """
    The model, in fp32, of a folder or hub repository in Hugging Face format, or of a checkpoint of nanoGPT or
    of ours. overrides: flags of GPTConfig to change. Weights that still fit are copied, the others are
    converted or newly initialised; a line is printed for each of the three. FileNotFoundError where a file is
    missing, ValueError where one cannot be read or stands for another kind of model.
    """
    name = os.fspath(name)
    path = nanogpt.checkpoint_file(name)
    folder = None if path else folder_of(name)
    model = nanogpt.load(path) if path else convert.load_folder(folder)
    known = model.texts if path else texts.of_folder(folder)
    changed = {flag: value for flag, value in overrides.items()
               if flag not in convert.FIELDS or getattr(model.config, flag) != value}
    model = operate(model, changed) if changed else model
    model.texts = known
    return model


@torch.no_grad()
def save_pretrained(model: GPT, folder: str | os.PathLike) -> None:
    """
    Write config.json and model.safetensors for `transformers` to load, as the published family that the
    model's flags belong to, and the tokenizer of a model that from_pretrained loaded. Where there is no such
    family, ValueError names the flags in the way.
    """
    convert.save_folder(model, folder)


def tokenizer_of(name):
    """The tokenizer of what from_pretrained(name) loads; None where it has none."""
    name = os.fspath(name)
    path = nanogpt.checkpoint_file(name)
    if path:
        return nanogpt.tokenizer_of(path)
    return from_folder(folder_of(name))


def same_tokenizer(name, meta):
    """
    Whether the tokenizer that `meta` describes encodes as the one of from_pretrained(name) does, or that one
    is not known (see tokenizer_of).
    """
    text = "def main(): return {'naïve': 3.14159}  # the Quick brown fox, 漢字 🙂\n\n\tand so on"
    ours, theirs = from_meta(meta), tokenizer_of(name)
    try:
        return theirs is None or ours.encode(text) == theirs.encode(text)
    except ValueError:  # a vocabulary of characters that lacks some of these
        return ours.meta() == theirs.meta()
