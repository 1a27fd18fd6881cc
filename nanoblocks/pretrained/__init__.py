"""
Published checkpoints, in and out: GPT.from_pretrained, model.save_pretrained, and their tokenizers.

    files.py     finds or downloads a folder and reads its tensors
    convert.py   a folder in Hugging Face format to a model, and the family of a model
    export.py    a model to a folder in Hugging Face format
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
from nanoblocks.pretrained import convert, export, nanogpt, texts
from nanoblocks.pretrained.files import folder_of
from nanoblocks.pretrained.surgery import operate
from nanoblocks.tokenizer import from_folder, from_meta


@torch.no_grad()
def from_pretrained(name: str | os.PathLike, dtype: str | torch.dtype = 'float32', **overrides) -> GPT:
    """
    The model of a folder or hub repository in Hugging Face format, or of a checkpoint of nanoGPT or of ours.
    dtype: of its weights, float32, bfloat16 or float16. A folder is read tensor by tensor, so that memory
    holds the model in this dtype and one tensor more. overrides: flags of GPTConfig to change. Weights that
    still fit are copied, the others are converted or newly initialised; a line is printed for each of the
    three. FileNotFoundError where a file is missing, ValueError where one cannot be read or stands for
    another kind of model.
    """
    name, dtype = os.fspath(name), export.as_dtype(dtype)
    path = nanogpt.checkpoint_file(name)
    folder = None if path else folder_of(name)
    model = nanogpt.load(path).to(dtype) if path else convert.load_folder(folder, dtype)
    known = model.texts if path else texts.of_folder(folder)
    changed = {flag: value for flag, value in overrides.items()
               if flag not in convert.FIELDS or getattr(model.config, flag) != value}
    if changed:
        model, family = operate(model, changed).to(dtype), model.family
        model.family = family
    model.texts = known
    return model


@torch.no_grad()
def save_pretrained(model: GPT, folder: str | os.PathLike, dtype: str | torch.dtype | None = None,
                    max_shard_size: int | str = '50GB') -> None:
    """
    Write config.json and weights for `transformers` to load, and the tokenizer of a model that
    from_pretrained loaded. A loaded model is written as the family that it came from while its flags are
    that family's, any other as the first published family that its flags belong to. Where there is none,
    ValueError names the flags in the way.

    dtype: of the weights in the files, float32, bfloat16 or float16; None: as in the model
    max_shard_size: bytes, or a text such as '5GB', above which there are several files and their index. A
        tensor that is larger has a file of its own.
    """
    export.save_folder(model, folder, dtype, max_shard_size)


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
