"""
Token files of other repositories, read as they are: what meta.json would say of them.

    nanoGPT     train.bin, val.bin              uint16, GPT-2's tokens; the characters of meta.pkl beside it
    llm.c       NAME_train.bin, NAME_val.bin    behind a header of 1,024 bytes, uint16 for GPT-2's tokens or
                NAME_train_000001.bin, ...      uint32 for Llama 3's; those of modded-nanogpt are the same

A tokenizer.json in the folder names another vocabulary than the files mean.
"""
import functools
import os
import pickle
import re
from typing import NamedTuple

import numpy as np

from .tokenizer import CharTokenizer, TiktokenTokenizer, from_folder
from .writer import DTYPES, temporary

FILE = re.compile(r'(?:(.+)_)?(train|val)(?:_\d+)?\.bin')
HEADER = 1024       # bytes: 256 int32, first a magic number, a version and the number of tokens


class Kind(NamedTuple):
    """A way to write token files."""
    name: str
    dtype: str = 'uint16'
    header: int = 0


NANOGPT = Kind('nanoGPT')
LLMC = {(20240520, 1): Kind('llm.c', header=HEADER), (20240801, 7): Kind('llm.c', 'uint32', HEADER)}


def read_foreign(folder):
    """What meta.json in `folder` would hold if these were our token files; None where there are none."""
    # what a preparation of ours has left that was killed while it renamed its files is no dataset
    if not folder.is_dir() or temporary(folder / 'meta.json').exists() or (folder / 'prepare.lock').exists():
        return None
    with os.scandir(folder) as entries:
        stamp = tuple((entry.name, *entry.stat()[6:9:2]) for entry in entries if entry.is_file())
    return described(folder, stamp)


@functools.lru_cache
def described(folder, stamp):
    """The same; a run asks several times. stamp: of the files, which says whether they have changed."""
    kind, files = files_of(folder)
    if kind is None:
        return None
    tokenizer, named = tokenizer_of(folder, kind)
    if not kind.header and tokenizer.vocab_size > 2**16:
        kind = kind._replace(dtype='uint32')
    counts = {split: {path.name: n_tokens(path, kind) for path in paths} for split, paths in files.items()}
    train, val = (sum(counts[split].values()) for split in ('train', 'val'))
    lengths = bytes_of_tokens(tokenizer)
    n_bytes = sum(text_bytes(path, kind, lengths) for path in files['val'])
    # where no token begins a document, a line end does
    begins = tokenizer.eot is not None or '\n' not in getattr(tokenizer, 'chars', '\n')
    return {'source': f'token files of {kind.name}, read as {named}, {kind.dtype}',
            'prompt': '' if begins else '\n', 'tokenizer': tokenizer.meta(),
            'vocab_size': tokenizer.vocab_size, 'dtype': kind.dtype, 'header': kind.header,
            'train_tokens': train, 'val_tokens': val, 'val_bytes': n_bytes,
            'val_bytes_per_token': n_bytes / val, 'files': counts}


def files_of(folder):
    """(Kind, {'train': paths, 'val': paths}) of the token files in a folder; (None, {}) unless both are."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = FILE.fullmatch(path.name)
        kind = kind_of(path) if match and path.is_file() else None
        if kind:
            found.setdefault((match[1] or '', kind), {'train': [], 'val': []})[match[2]].append(path)
    whole = {key: files for key, files in found.items() if all(files.values())}
    if len(whole) > 1:
        names = ' and '.join(files['train'][0].name for files in whole.values())
        raise ValueError(f'{folder} must hold the token files of one dataset, and {names} are of several: '
                         'move each to a folder of its own')
    return next(((kind, files) for (_, kind), files in whole.items()), (None, {}))


def kind_of(path):
    """The Kind of a file, by its header; None for a file that neither repository writes."""
    with open(path, 'rb') as file:
        head = np.frombuffer(file.read(8), '<i4')
    if len(head) == 2 and tuple(head.tolist()) in LLMC:
        return LLMC[tuple(head.tolist())]
    return NANOGPT if path.name in ('train.bin', 'val.bin') else None


def n_tokens(path, kind):
    """The tokens in a file. ValueError where it was cut off."""
    size = path.stat().st_size - kind.header
    count, rest = divmod(size, DTYPES[kind.dtype].itemsize)
    told = int(np.fromfile(path, '<i4', 3)[2]) if kind.header and size >= 0 else count
    if rest or count != told or count < 1:
        raise ValueError(f'{path} is damaged ({size:,} bytes of tokens, not {told:,} of '
                         f'{DTYPES[kind.dtype].itemsize} bytes): fetch or prepare it again')
    return count


def tokenizer_of(folder, kind):
    """The tokenizer of token files, and what to call it."""
    if (folder / 'tokenizer.json').exists():
        return from_folder(folder), 'the tokens of its tokenizer.json'
    if kind.dtype == 'uint32':
        raise ValueError(f'{folder} holds tokens of Llama 3 and must hold its vocabulary as well: put the '
                         'tokenizer.json there that is published with its weights')
    if (folder / 'meta.pkl').exists():
        return characters(folder / 'meta.pkl'), 'the characters of its meta.pkl'
    return TiktokenTokenizer('gpt2'), 'tokens of gpt2'


class PlainPickle(pickle.Unpickler):
    """Reads texts, numbers and what holds them. A pickle may call any function of Python: this calls none."""

    def find_class(self, module, name):
        raise ValueError(f'it calls {module}.{name}')


def characters(path):
    """The tokenizer of nanoGPT's meta.pkl: {'itos': {0: character, ...}, ...}."""
    try:
        with open(path, 'rb') as file:
            chars = PlainPickle(file).load()['itos']
        tokenizer = CharTokenizer(''.join(chars.values()))
        if chars != dict(enumerate(tokenizer.chars)):
            raise ValueError('they are not in order')
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f'{path} must hold the characters of the tokens beside it, as nanoGPT pickles them '
                         f'({reason}): prepare the text anew with data/text/prepare.py') from None
    return tokenizer


def text_bytes(path, kind, lengths):
    """The bytes of the text in a file, of tokens of these lengths."""
    tokens, total = np.memmap(path, DTYPES[kind.dtype], 'r', kind.header), 0
    for i in range(0, len(tokens), 2**22):
        counts = np.bincount(tokens[i:i + 2**22], minlength=len(lengths))
        if len(counts) > len(lengths):
            raise ValueError(f'{path} holds token {len(counts) - 1}, and its vocabulary has {len(lengths)}: '
                             'put the tokenizer.json of its tokens beside it')
        total += int(counts @ lengths)
    return total


def bytes_of_tokens(tokenizer):
    """How many bytes of text each token stands for, none where it is a mark in it: (vocab_size,)."""
    marks = {*tokenizer.ends, tokenizer.bos, *tokenizer.special}
    return np.array([0 if i in marks else len(tokenizer.decode_bytes([i]))
                     for i in range(tokenizer.vocab_size)], np.int64)
