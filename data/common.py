"""What the prepare.py scripts share: flags, tokenizers by name, a document's split, reading, downloading, a summary."""

import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path

from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, TiktokenTokenizer
from data.writer import temporary


class Flags(argparse.ArgumentParser):
    """Command-line flags `--key=value` of which a bad one is answered with one sentence."""

    def __init__(self, description, out):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
        self.add_argument('--out', type=Path, default=out, help='folder to write to (default %(default)s)')

    def error(self, message):
        self.exit(2, f'{message} (--help lists the flags)\n')


def run(main):
    """Call `main`; what a user can put right is answered with its sentence, not with a traceback."""
    try:
        main()
    except ImportError as error:
        sys.exit(f'{error}: run pip install -r requirements.txt')
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def make_tokenizer(name, texts, vocab_size):
    """The tokenizer called `name`: bytes, chars, bpe (trained on `texts`, an iterable), or one of tiktoken's."""
    if name == 'bytes':
        return ByteTokenizer()
    if name == 'chars':
        chars = set()
        for text in texts:
            chars.update(text)
        return CharTokenizer(chars)
    if name == 'bpe':
        return BPETokenizer.train(texts, vocab_size)
    return TiktokenTokenizer(name)


def split_of(key, val_fraction):
    """'val' for about that fraction of all keys, 'train' for the others; a key's answer never depends on other keys."""
    hashed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big')
    return 'val' if hashed < val_fraction * 2**64 else 'train'


def read_text(path):
    """The text of a file, line ends untouched. Raises ValueError where it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 text (byte {error.start:,}): convert it, or leave it out') from None


def download(url, path):
    """The text behind `url`, kept in the file `path` for the next time."""
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise OSError(f'{url} cannot be downloaded ({error}): fetch it in some other way and pass '
                          '--input=FILE') from None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary(path).write_bytes(content)
        temporary(path).replace(path)
    return read_text(path)


def summary(folder, meta):
    """Print what was made, in a few lines."""
    for split in ('train', 'val'):
        print(f'{split:5}  {meta[split + "_documents"]:>11,} documents  {meta[split + "_bytes"]:>15,} bytes  '
              f'{meta[split + "_tokens"]:>14,} tokens')
    print(f'{meta["tokenizer"]["kind"]} vocabulary of {meta["vocab_size"]:,}, '
          f'{meta["val_bytes_per_token"]:.3f} bytes per token, in {folder}')
