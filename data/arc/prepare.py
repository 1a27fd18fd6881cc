"""ARC, questions of science exams at school (Clark et al. 2018): 2,376 easy ones and 1,172 of the challenge.

    python data/arc/prepare.py
    python data/arc/prepare.py --config=ARC-Challenge
    python data/arc/prepare.py --input=rows.jsonl           # a copy of the rows, without network
    python train.py config/llama_small.py --eval_tasks=data/arc/arc_easy.jsonl

In the words of lm-evaluation-harness, so that its accuracies are comparable.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages, plain_settings
from data.tasks import prepare

repo = 'allenai/ai2_arc'            # dataset on the Hub
config = 'ARC-Easy'                 # part of the dataset: ARC-Easy or ARC-Challenge
revision = ''                       # branch or commit of the dataset; empty: the newest
split = 'test'                      # split of the dataset, all of which have answers
input = ''                          # local .jsonl .json .parquet, also packed, or a folder of one kind
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the file that is there


def question_of(row):
    choices = row['choices']
    return (f'Question: {row["question"]}\nAnswer:', list(choices['text']),
            list(choices['label']).index(row['answerKey']))


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(Path(__file__).parent, config.lower().replace('-', '_'), question_of,
                **plain_settings(globals()))
