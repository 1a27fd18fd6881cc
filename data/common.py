"""What the prepare.py scripts share: flags, tokenizers by name, splits, reading, fetching, a summary."""

import argparse
import hashlib
import os
import sys
import urllib.request
from pathlib import Path

from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, TiktokenTokenizer, from_folder
from data.writer import temporary


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the script's docstring as it is."""


class Flags(argparse.ArgumentParser):
    """Flags of the form --key=value; a bad one is answered with one sentence."""

    def __init__(self, description, out):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Help)
        self.add_argument('--out', type=Path, default=out, metavar='FOLDER', help='where to write')

    def error(self, message):
        self.exit(2, f'{message} (--help lists the flags)\n')


def fraction(text):
    """The type of a flag that must be between 0 and 1."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be between 0 and 1')
    return float(text)


def run(main):
    """Call `main`; what the user can put right is answered with its sentence, not with a traceback."""
    try:
        main()
    except ImportError as error:
        sys.exit(f'{error}: run pip install -r requirements.txt')
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def make_tokenizer(name, texts, vocab_size):
    """
    The tokenizer called `name`: bytes, chars or bpe (made from the texts), one of tiktoken's, or that of a
    folder with a checkpoint in Hugging Face format.
    """
    if os.path.isdir(name):
        found = from_folder(name)
        if found is None:
            raise ValueError(f'--tokenizer={name} is a folder and must hold tokenizer.json')
        return found
    if name == 'bytes':
        return ByteTokenizer()
    if name == 'chars':
        return CharTokenizer({char for text in texts for char in text})
    if name == 'bpe':
        return BPETokenizer.train(texts, vocab_size)
    return TiktokenTokenizer(name)


def split_of(key, val_fraction):
    """'val' for about that fraction of keys, else 'train'; no key's answer depends on the others."""
    hashed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big')
    return 'val' if hashed < val_fraction * 2**64 else 'train'


def read_text(path):
    """The text of a file, line ends untouched. Raises ValueError where it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 (byte {error.start:,}): convert it or leave it out') from None


def fetch(url, path):
    """The text behind `url`, kept in the file `path` for the next time. Raises OSError without a network."""
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise OSError(f'{url} cannot be downloaded ({error}): get it some other way, and pass '
                          '--input=FILE') from None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary(path).write_bytes(content)
        temporary(path).replace(path)
    return read_text(path)


def summary(folder, meta):
    """Print what was made."""
    for split in ('train', 'val'):
        print(f'{split:5}  {meta[split + "_documents"]:>11,} documents  {meta[split + "_bytes"]:>15,} bytes  '
              f'{meta[split + "_tokens"]:>14,} tokens')
    print(f'{meta["tokenizer"]["kind"]} vocabulary of {meta["vocab_size"]:,}, '
          f'{meta["val_bytes_per_token"]:.3f} bytes per token, in {folder}')
