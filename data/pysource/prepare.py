"""The source text of the running Python's standard library: a real corpus on every machine, without network.

    python data/pysource/prepare.py
    python data/pysource/prepare.py --tokenizer=bytes --out=data/pysource_bytes

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

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages
from data.common import make_tokenizer, preparation, print_summary, split_of
from data.writer import write_dataset

# tables of characters (encodings) and a manual in one string (pydoc_data) are not source text
SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', 'encodings',
        'pydoc_data'}

tokenizer = 'bpe'                   # bpe, trained on the text, bytes, gpt2, or the folder of a checkpoint
vocab_size = 2048                   # bpe: tokens in the vocabulary
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the dataset that is there


def documents(root):
    """Yields (split, text) of the modules below `root`, sorted by path."""
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
            continue  # a module in an older encoding


def main():
    if tokenizer == 'chars':
        raise ValueError('tokenizer=chars must be bytes or bpe: the text has thousands of characters')
    with preparation(out or Path(__file__).parent, overwrite) as folder:
        texts = list(documents(sysconfig.get_paths()['stdlib']))
        train_texts = (text for split, text in texts if split == 'train')
        source = f'the standard library of Python {platform.python_version()}'
        # the files of a small model begin with page-long imports; a class shows more of what it has learned
        meta = write_dataset(folder, texts, make_tokenizer(tokenizer, train_texts, vocab_size), source,
                             prompt='class Reader:\n')
    print_summary(folder, meta)


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        main()
