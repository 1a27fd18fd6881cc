"""Tiny Shakespeare, character by character: 1 MB, for a first model in minutes. Split as in nanoGPT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import Flags, fetch, read_text, run, summary
from data.tokenizer import CharTokenizer
from data.writer import write_dataset

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def prepare(description, folder, make_tokenizer):
    """Write the text to `folder`; make_tokenizer(text) gives the tokenizer."""
    flags = Flags(description, out=folder)
    flags.add_argument('--input', metavar='FILE', help='a copy of the text, instead of downloading it')
    args = flags.parse_args()
    text = read_text(args.input) if args.input else fetch(URL, args.out / 'input.txt')
    # As in nanoGPT, so that losses compare: nine tenths train, the last validates, and no token ends them.
    cut = int(len(text) * 0.9)
    documents = [('train', text[:cut]), ('val', text[cut:])]
    meta = write_dataset(args.out, documents, make_tokenizer(text), 'tiny Shakespeare', append_eot=False)
    summary(args.out, meta)


if __name__ == '__main__':
    run(lambda: prepare(__doc__, Path(__file__).parent, CharTokenizer))
