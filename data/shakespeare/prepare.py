"""Tiny Shakespeare in GPT-2's vocabulary, for finetuning a released model. Split as in nanoGPT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import run
from data.shakespeare_char.prepare import prepare
from data.tokenizer import TiktokenTokenizer

if __name__ == '__main__':
    run(lambda: prepare(__doc__, Path(__file__).parent, lambda text: TiktokenTokenizer('gpt2')))
