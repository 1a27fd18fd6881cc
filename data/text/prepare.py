"""Your own text, a file or a folder: .txt .md .py (each a document), .jsonl .parquet (each row a document).

    python data/text/prepare.py --input=~/notes --name=notes
    python train.py --dataset=notes

A tenth is for validation: of the documents, chosen by the hash of their name or number, where there are many;
of each document, its end, where there are few.
"""

import json
import re
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import Flags, fraction, make_tokenizer, read_text, run, split_of, summary
from data.writer import write_dataset

DATA = Path(__file__).resolve().parents[1]
TEXTS, TABLES = ('.txt', '.md', '.py'), ('.jsonl', '.parquet')


def documents(root, column):
    """Yields (name, text), sorted by path; the name is the path below `root`, and the row if it has rows."""
    paths = [root]
    if root.is_dir():
        paths = [path for path in sorted(root.rglob('*')) if path.suffix in TEXTS + TABLES and path.is_file()
                 and not any(part.startswith('.') for part in path.relative_to(root).parts)]
    if not paths or not root.exists():
        raise ValueError(f'--input={root} must be a file, or a folder that holds {" ".join(TEXTS + TABLES)}')
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
    from pyarrow.parquet import ParquetFile
    with ParquetFile(path) as file:
        check_column(column, file.schema_arrow.names, path)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def check_column(column, columns, where):
    if column not in columns:
        raise ValueError(f'{where} has no column {column!r}: choose one of {", ".join(columns) or "none"} '
                         'with --column=')


def splits(root, column, val_fraction):
    """Yields (split, text)."""
    # So many that chance leaves validation without any once in e^10 times.
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
    flags = Flags(__doc__, out=None)
    flags.add_argument('--input', type=Path, required=True, metavar='PATH', help='file or folder')
    flags.add_argument('--name', default='text', help='write to data/NAME, for --dataset=NAME')
    flags.add_argument('--tokenizer', default='bpe', help='bytes, chars, bpe, gpt2, cl100k_base, ...')
    flags.add_argument('--vocab_size', type=int, default=2048, help='of the bpe vocabulary')
    flags.add_argument('--column', default='text', help='of .jsonl and .parquet files')
    flags.add_argument('--val_fraction', type=fraction, default=0.1, help='share for validation')
    args = flags.parse_args()
    own = args.name == 'text' or not (DATA / args.name / 'prepare.py').exists()
    if not own or not re.fullmatch(r'\w[\w.-]*', args.name):
        raise ValueError(f'--name={args.name} must be a plain name that no other dataset has')
    out, root = args.out or DATA / args.name, args.input.expanduser()
    # A character vocabulary must know all characters; merges are learned from the training split alone.
    texts = (text for split, text in splits(root, args.column, args.val_fraction)
             if split == 'train' or args.tokenizer == 'chars')
    tokenizer = make_tokenizer(args.tokenizer, texts, args.vocab_size)
    source = f'{root.resolve().name}, {args.val_fraction} for validation'
    summary(out, write_dataset(out, splits(root, args.column, args.val_fraction), tokenizer, source))


if __name__ == '__main__':
    run(main)
