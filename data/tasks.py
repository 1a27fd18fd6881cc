"""Multiple choice from the Hugging Face Hub, as the JSON lines that nanoblocks/decoding/tasks.py reads."""
import json
import os
from pathlib import Path

from .common import preparation
from .files import replace_file
from .hub import open_files, open_repo
from .progress import say
from .reading import count


def prepare(folder, name, question_of, *, repo, config, revision, split, input, out, overwrite):
    """
    Write NAME.jsonl to `out`, or to `folder` if `out` is empty: a line for each row of a dataset of the Hub,
    or of the files that `input` names. question_of: a row -> (context, choices, answer); answer None: the row
    has none, as in splits for competitions, and is passed over. The rest are the settings.
    """
    with preparation(out or folder, overwrite=True) as out:
        path = out / f'{name}.jsonl'
        if path.exists() and not overwrite:
            raise ValueError(f'overwrite={overwrite} must be True to replace {path}: add --overwrite=True, '
                             'or write to another folder with --out=FOLDER')
        rows = open_files(Path(input)) if input else open_repo(repo, config, revision, split)
        lines, without = [], 0
        for number, row in enumerate(rows, 1):
            context, choices, answer = asked(row, number, question_of)
            if answer is None:
                without += 1
                continue
            line = {'context': context, 'choices': choices, 'answer': answer}
            lines.append(json.dumps(line, ensure_ascii=False) + '\n')
        if not lines:
            raise ValueError(f'{input or f"split={split}"} has no row with an answer and must have one: take '
                             'another split or file')
        replace_file(path, ''.join(lines).encode(errors='replace'))
    if without:
        say(f'passed over: {count(without, "row")} without an answer')
    say(f'{count(len(lines), "question")} in {path}')
    say(f'next: python sample.py --tasks={os.path.relpath(path)}, or train.py --eval_tasks=')


def asked(row, number, question_of):
    """question_of(row), or a ValueError that says what the row has instead."""
    try:
        return question_of(row)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f'row {number} is not as this dataset has it ({type(error).__name__}: {error}), and '
                         f'has the columns {", ".join(row)}: pass files of this dataset as the Hub has them '
                         'with --input=PATH') from None
