"""The source text of the running Python's standard library: a real corpus on every machine, without network.

About 12 MB in 700 files, without the test suites. Each file is a document; one in twenty, chosen by the hash
of its path, is for validation. The text differs between versions of Python, so compare losses on one version
only.
"""

import os
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import Flags, make_tokenizer, run, split_of, summary
from data.writer import write_dataset

# tables of characters and a manual in one string are no source text that anyone wrote
SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', 'encodings',
        'pydoc_data'}


def documents(root):
    """Yields (split, text) of the modules under `root`, sorted by path."""
    paths = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - SKIP
        for file in files:
            path = Path(folder, file)
            if path.suffix == '.py':
                paths[path.relative_to(root).as_posix()] = path
    for name in sorted(paths):
        try:
            yield split_of(name, 0.05), paths[name].read_bytes().decode()
        except UnicodeDecodeError:
            # A module in an older encoding.
            continue


def main():
    flags = Flags(__doc__, out=Path(__file__).parent)
    flags.add_argument('--tokenizer', choices=['bytes', 'bpe'], default='bpe', help='bytes needs no training')
    flags.add_argument('--vocab_size', type=int, default=2048, help='of the bpe vocabulary')
    args = flags.parse_args()
    texts = list(documents(sysconfig.get_paths()['stdlib']))
    train_texts = (text for split, text in texts if split == 'train')
    tokenizer = make_tokenizer(args.tokenizer, train_texts, args.vocab_size)
    source = f'the standard library of Python {platform.python_version()}'
    # a small model's files begin with page-long imports: a class shows more of what it has learned
    summary(args.out, write_dataset(args.out, texts, tokenizer, source, prompt='class Reader:\n'))


if __name__ == '__main__':
    run(main)
