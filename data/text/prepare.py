"""Your own text, from a file or a folder: .txt .md .py (a document each), .jsonl .parquet (a document per row).

    python data/text/prepare.py --input=~/notes --name=notes
    python train.py --dataset=notes

A tenth is for validation: of the documents, chosen by the hash of their name or number, where there are many,
else the end of each document.
"""

import json
import re
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.common import Flags, make_tokenizer, read_text, run, split_of, summary
from data.writer import write_dataset

TEXTS, TABLES = ('.txt', '.md', '.py'), ('.jsonl', '.parquet')
DATA = Path(__file__).resolve().parents[1]


def documents(root, column):
    """Yields (name, text), sorted by path; the name is the path below `root`, and the row where a file has rows."""
    if not root.exists():
        raise ValueError(f'--input={root} does not exist')
    paths = [root]
    if root.is_dir():
        paths = [path for path in sorted(root.rglob('*')) if path.suffix in TEXTS + TABLES and path.is_file()
                 and not any(part.startswith('.') for part in path.relative_to(root).parts)]
    if not paths:
        raise ValueError(f'--input={root} holds no file that ends in {", ".join(TEXTS + TABLES)}')
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.suffix in TABLES:
            rows = jsonl_rows(path, column) if path.suffix == '.jsonl' else parquet_rows(path, column)
            for number, text in enumerate(rows):
                if not isinstance(text, str):
                    raise ValueError(f'{path} has {type(text).__name__} in row {number + 1} of column {column!r}, '
                                     'not text: choose another column with --column=')
                yield f'{name}:{number}', text
        else:
            yield name, read_text(path)


def jsonl_rows(path, column):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f'{path} line {number} is not JSON: mend it, or leave the file out') from None
            if not isinstance(row, dict) or column not in row:
                has = ', '.join(row) if isinstance(row, dict) else 'no columns'
                raise ValueError(f'{path} line {number} has no column {column!r} but {has}: choose one with --column=')
            yield row[column]


def parquet_rows(path, column):
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            has = ', '.join(file.schema_arrow.names)
            raise ValueError(f'{path} has no column {column!r} but {has}: choose one with --column=')
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def splits(root, column, val_fraction):
    """Yields (split, text)."""
    # With so many documents it is next to impossible that chance puts none into validation (e^-10).
    many = 10 / val_fraction
    few = sum(1 for _ in islice(documents(root, column), int(many))) < int(many)
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
    flags.add_argument('--name', default='text', help='write to data/NAME, for --dataset=NAME (default %(default)s)')
    flags.add_argument('--tokenizer', default='bpe',
                       help='bytes, chars, bpe (trained on the text), gpt2, cl100k_base, ... (default %(default)s)')
    flags.add_argument('--vocab_size', type=int, default=4096, help='size of the bpe vocabulary (default %(default)s)')
    flags.add_argument('--column', default='text', help='column of .jsonl and .parquet files (default %(default)s)')
    flags.add_argument('--val_fraction', type=float, default=0.1, help='default %(default)s')
    args = flags.parse_args()
    if not 0 < args.val_fraction < 1:
        raise ValueError(f'--val_fraction={args.val_fraction} must be between 0 and 1')
    if not re.fullmatch(r'\w[\w.-]*', args.name) or args.name != 'text' and (DATA / args.name / 'prepare.py').exists():
        raise ValueError(f'--name={args.name} must be a plain name that no other dataset here has')
    out, root = args.out or DATA / args.name, args.input.expanduser()

    def texts():
        # All characters must be known; the merges are learned from the training split alone.
        return (text for split, text in splits(root, args.column, args.val_fraction)
                if split == 'train' or args.tokenizer == 'chars')

    tokenizer = make_tokenizer(args.tokenizer, texts(), args.vocab_size)
    source = f'{root.resolve().name}, {args.val_fraction} for validation'
    summary(out, write_dataset(out, splits(root, args.column, args.val_fraction), tokenizer, source))


if __name__ == '__main__':
    run(main)
