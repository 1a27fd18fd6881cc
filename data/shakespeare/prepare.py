"""Tiny Shakespeare in GPT-2's vocabulary, for finetuning a released model. Split as in nanoGPT.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=input.txt    # a copy of the text, without network
    python train.py --init_from=gpt2 --dataset=shakespeare
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages
from data.shakespeare_char.prepare import prepare
from data.tokenizer import TiktokenTokenizer

input = ''                          # a copy of the text, in place of the download
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the dataset that is there

if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(out or Path(__file__).parent, overwrite, input, lambda text: TiktokenTokenizer('gpt2'),
                'train.py --init_from=gpt2')
