"""HellaSwag, how everyday scenes and instructions go on (Zellers et al. 2019): 10,042 questions of 4 choices.

    python data/hellaswag/prepare.py
    python data/hellaswag/prepare.py --input=hellaswag_val.jsonl    # a copy of the rows, without network
    python train.py config/llama_small.py --eval_tasks=data/hellaswag/hellaswag.jsonl

In the words of lm-evaluation-harness, so that its accuracies are comparable.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages, plain_settings
from data.tasks import prepare

repo = 'Rowan/hellaswag'            # dataset on the Hub
config = ''                         # part of the dataset; empty: the only one
revision = ''                       # branch or commit of the dataset; empty: the newest
split = 'validation'                # split of the dataset; that for tests has no answers
input = ''                          # local .jsonl .json .csv .parquet, also packed, or a folder of one kind
out = ''                            # folder to write to; empty: the folder of this script
overwrite = False                   # replace the file that is there


def question_of(row):
    scene = f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}'
    answer = int(row['label']) if str(row['label']) else None
    return without_marks(scene), [without_marks(ending) for ending in row['endings']], answer


def without_marks(text):
    """A text without the marks that the pages of WikiHow have left in it, such as [title] and [step]."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        prepare(Path(__file__).parent, 'hellaswag', question_of, **plain_settings(globals()))
