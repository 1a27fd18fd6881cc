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
from data.common import make_tokenizer
from data.shakespeare_char.prepare import prepare

input = ''                          # a copy of the text, in place of the download
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the dataset that is there
tokenizer = 'gpt2'                  # gpt2, bytes, cl100k_base, ..., or the folder of a checkpoint or a run

if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(out or Path(__file__).parent, overwrite, input,
                lambda text: make_tokenizer(tokenizer, [text], 2048),
                'train.py --init_from=gpt2' if tokenizer == 'gpt2' else 'train.py')
