"""OpenWebText, the open copy of GPT-2's training text: 8 million documents, about 9 billion tokens.

    python data/openwebtext/prepare.py
    python train.py config/train_gpt2.py

Streams for some hours and needs 18 GB of disk. After an interruption, the same command resumes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages, plain_settings
from data.hub import prepare

# what to read
repo = 'Skylion007/openwebtext'     # dataset on the Hub
config = ''                         # part of the dataset; empty: the only one
revision = ''                       # branch or commit of the dataset; empty: the newest
column = 'text'                     # column that holds the text
input = ''                          # local .jsonl .json .csv .parquet, also packed, or a folder of one kind
max_documents: int | None = None    # number of documents to read; None: all
val_split = ''                      # split of the dataset for validation; empty: val_fraction
val_input = ''                      # the same where input is set: other local files
# what to write
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the dataset that is there
tokenizer = 'gpt2'                  # bytes, a vocabulary of tiktoken, or the folder of a checkpoint
val_fraction = 0.0005               # share of the documents for validation
shard_tokens = 100_000_000          # tokens per file
save_every = 20_000_000             # tokens between saves of the progress, from which a later run resumes
processes = 1                       # that make tokens

if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(Path(__file__).parent, 'train.py config/train_gpt2.py', **plain_settings(globals()))
