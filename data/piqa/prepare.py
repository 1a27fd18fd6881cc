"""PIQA, how to do a thing in the physical world (Bisk et al. 2020): 1,838 goals with two ways to reach each.

    python data/piqa/prepare.py
    python data/piqa/prepare.py --input=rows.jsonl          # a copy of the rows, without network
    python train.py config/llama_small.py --eval_tasks=data/piqa/piqa.jsonl

In the words of lm-evaluation-harness, so that its accuracies are comparable.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages, plain_settings
from data.tasks import prepare

repo = 'baber/piqa'                 # dataset on the Hub
config = ''                         # part of the dataset; empty: the only one
revision = ''                       # branch or commit of the dataset; empty: the newest
split = 'validation'                # split of the dataset; that for tests has no answers
input = ''                          # local .jsonl .json .csv .parquet, also packed, or a folder of one kind
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the file that is there


def question_of(row):
    answer = int(row['label'])
    return (f'Question: {row["goal"]}\nAnswer:', [row['sol1'], row['sol2']],
            None if answer < 0 else answer)


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(Path(__file__).parent, 'piqa', question_of, **plain_settings(globals()))
