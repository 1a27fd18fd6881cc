"""Your own text, a file or a folder: .txt .md .py (each a document), .jsonl .parquet (each row a document).

    python data/text/prepare.py --input=notes --name=notes
    python train.py --dataset=notes
    python data/text/prepare.py --input=rows.jsonl --column=body --name=rows --tokenizer=gpt2

About a tenth is for validation. Where there are many documents, the hash of a document's name or number
decides; where there are few, the end of every document is.
"""
import json
import re
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import configure, errors_as_messages
from data.common import check_val_fraction, make_tokenizer, print_summary, split_of
from data.tokenizer import need, read_text
from data.writer import write_dataset

DATA = Path(__file__).resolve().parents[1]
TEXTS, TABLES = ('.txt', '.md', '.py'), ('.jsonl', '.parquet')

input = ''                          # file or folder to read; it must be given
name = 'text'                       # write to data/NAME, for train.py --dataset=NAME
out = ''                            # folder to write to; empty: data/NAME
tokenizer = 'bpe'                   # bytes, chars, bpe, gpt2, cl100k_base, ..., or the folder of a checkpoint
vocab_size = 2048                   # bpe: tokens in the vocabulary
column = 'text'                     # column of .jsonl and .parquet that holds the text
val_fraction = 0.1                  # share of the text for validation


def documents(root, column):
    """Yields (name, text), sorted by path; the name is the path below `root`, for a row with its number."""
    paths = [root]
    if root.is_dir():
        paths = [path for path in sorted(root.rglob('*')) if path.suffix in TEXTS + TABLES and path.is_file()
                 and not any(part.startswith('.') for part in path.relative_to(root).parts)]
    if not paths or not root.exists():
        raise ValueError(f'input={root} must be a file, or a folder that holds {" ".join(TEXTS + TABLES)}')
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.suffix not in TABLES:
            yield name, read_text(path)
            continue
        rows = jsonl_rows(path, column) if path.suffix == '.jsonl' else parquet_rows(path, column)
        for number, text in enumerate(rows, 1):
            if not isinstance(text, str):
                raise ValueError(f'row {number} of {path} has no text in column {column!r} but {text!r}: '
                                 'mend it, or choose another column with --column=')
            yield f'{name}:{number}', text


def jsonl_rows(path, column):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f'line {number} of {path} is not JSON: mend it or leave it out') from None
            check_column(column, row if isinstance(row, dict) else {}, f'line {number} of {path}')
            yield row[column]


def parquet_rows(path, column):
    with need('pyarrow.parquet', f'input={path}').ParquetFile(path) as file:
        check_column(column, file.schema_arrow.names, path)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def check_column(column, columns, where):
    if column not in columns:
        raise ValueError(f'{where} has no column {column!r}: choose one of {", ".join(columns) or "none"} '
                         'with --column=')


def splits(root, column, val_fraction):
    """Yields (split, text)."""
    # with this many documents, the chance that none is for validation is e**-10
    many = int(10 / val_fraction)
    few = sum(1 for _ in islice(documents(root, column), many)) < many
    for name, text in documents(root, column):
        if few:
            cut = int(len(text) * (1 - val_fraction))
            yield 'train', text[:cut]
            yield 'val', text[cut:]
        else:
            yield split_of(name, val_fraction), text


def main():
    if not input:
        raise ValueError('input must be set to a file or a folder: --input=PATH')
    check_val_fraction(val_fraction)
    taken = name != 'text' and (DATA / name / 'prepare.py').exists()
    if taken or not re.fullmatch(r'\w[\w.-]*', name):
        raise ValueError(f'name={name} must be a plain name that no other dataset has')
    root, folder = Path(input).expanduser(), Path(out or DATA / name)
    # a character vocabulary must know all characters; merges are learned from the training split alone
    texts = (text for split, text in splits(root, column, val_fraction)
             if split == 'train' or tokenizer == 'chars')
    source = f'{root.resolve().name}, {val_fraction} for validation'
    meta = write_dataset(folder, splits(root, column, val_fraction),
                         make_tokenizer(tokenizer, texts, vocab_size), source)
    print_summary(folder, meta)


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        main()
