"""Tiny Shakespeare, character by character: 1 MB, for a first model in minutes. Split as in nanoGPT.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=input.txt    # a copy of the text, without network
    python train.py config/train_shakespeare_char.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages
from data.common import fetch, preparation, print_summary
from data.tokenizer import CharTokenizer, read_text
from data.writer import write_dataset

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'

input = ''                          # a copy of the text, in place of the download
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the dataset that is there


def prepare(folder, overwrite, input, tokenizer_for, train='train.py'):
    """Write both splits to `folder`, with the tokenizer that tokenizer_for(text) makes."""
    with preparation(folder, overwrite) as folder:
        text = read_text(input) if input else fetch(URL, folder / 'input.txt')
        # as in nanoGPT, so that losses compare: the last tenth validates, and no token ends the two documents
        cut = int(len(text) * 0.9)
        documents = [('train', text[:cut]), ('val', text[cut:])]
        meta = write_dataset(folder, documents, tokenizer_for(text), 'tiny Shakespeare', append_eot=False)
    print_summary(folder, meta, train)


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(out or Path(__file__).parent, overwrite, input, CharTokenizer,
                'train.py config/train_shakespeare_char.py')
