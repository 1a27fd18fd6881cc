"""The source text of the running Python's standard library: a real corpus on every machine, without a network.

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

SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}


def documents(root):
    """Yields (split, text) of the library's modules, sorted by path."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - SKIP
        paths += [Path(folder, file) for file in files if file.endswith('.py')]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            yield split_of(path.relative_to(root).as_posix(), 0.05), path.read_bytes().decode()
        except UnicodeDecodeError:
            continue


def main():
    flags = Flags(__doc__, out=Path(__file__).parent)
    flags.add_argument('--tokenizer', choices=['bytes', 'bpe'], default='bpe', help='default %(default)s')
    flags.add_argument('--vocab_size', type=int, default=2048, help='size of the bpe vocabulary (default %(default)s)')
    args = flags.parse_args()
    texts = list(documents(sysconfig.get_paths()['stdlib']))
    tokenizer = make_tokenizer(args.tokenizer, (text for split, text in texts if split == 'train'), args.vocab_size)
    source = f'the standard library of Python {platform.python_version()}'
    summary(args.out, write_dataset(args.out, texts, tokenizer, source))


if __name__ == '__main__':
    run(main)
