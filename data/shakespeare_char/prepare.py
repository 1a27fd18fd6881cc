"""Tiny Shakespeare, character by character: 1 MB, for a first model in minutes. The tokens and the split are nanoGPT's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import Flags, download, read_text, run, summary
from data.tokenizer import CharTokenizer
from data.writer import write_dataset

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def prepare(description, folder, make):
    """Write the text to `folder`; `make(text)` gives the tokenizer."""
    flags = Flags(description, out=folder)
    flags.add_argument('--input', metavar='FILE', help='use this copy of the text instead of downloading it')
    args = flags.parse_args()
    text = read_text(args.input) if args.input else download(URL, args.out / 'input.txt')
    # As in nanoGPT, so that losses compare: nine tenths train, the last validates, and no token ends them.
    cut = int(len(text) * 0.9)
    documents = [('train', text[:cut]), ('val', text[cut:])]
    summary(args.out, write_dataset(args.out, documents, make(text), source='tiny Shakespeare', append_eot=False))


if __name__ == '__main__':
    run(lambda: prepare(__doc__, Path(__file__).parent, CharTokenizer))
