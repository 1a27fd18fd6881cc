"""Corpora from the Hugging Face Hub, streamed to disk; an interrupted run goes on where it was."""

from pathlib import Path

from data.common import Flags, fraction, make_tokenizer, split_of, summary
from data.writer import SAVE_EVERY, write_dataset


class Stream:
    """Documents of a streaming dataset as (split, text), in its order, with the state that a resume needs.

    A document is for validation by the hash of its number, which needs no second pass and no shuffling.
    """

    def __init__(self, rows, column='text', val_fraction=0.0005, max_documents=None):
        self.rows, self.column = rows, column
        self.val_fraction, self.max_documents = val_fraction, max_documents
        self.number = 0

    def __iter__(self):
        from tqdm import tqdm
        for row in tqdm(self.rows, initial=self.number, total=self.max_documents, unit=' documents'):
            if self.number == self.max_documents:
                return
            if not isinstance(row.get(self.column), str):
                raise ValueError(f'document {self.number:,} has no text in column {self.column!r}: choose '
                                 f'one of {", ".join(row)} with --column=')
            split = split_of(str(self.number), self.val_fraction)
            # Counted before the yield, because the state is asked for when this document has been written.
            self.number += 1
            yield split, row[self.column]

    def state_dict(self):
        return {'number': self.number, 'rows': self.rows.state_dict()}

    def load_state_dict(self, state):
        self.number = state['number']
        self.rows.load_state_dict(state['rows'])


def prepare(description, folder, repo, config=None):
    """The whole of data/openwebtext/prepare.py and its like; `folder` is where they write."""
    flags = Flags(description, out=folder)
    flags.add_argument('--input', type=Path, metavar='PATH', help='local .jsonl or .parquet instead')
    flags.add_argument('--repo', default=repo, help='dataset on the Hub')
    flags.add_argument('--config', default=config, help='part of the dataset')
    flags.add_argument('--revision', help='branch or commit of the dataset')
    flags.add_argument('--column', default='text', help='column that holds the text')
    flags.add_argument('--tokenizer', default='gpt2', help="bytes, or one of tiktoken's")
    flags.add_argument('--val_fraction', type=fraction, default=0.0005, help='share for validation')
    flags.add_argument('--max_documents', type=int, help='stop after so many')
    flags.add_argument('--shard_tokens', type=int, default=100_000_000, help='tokens per file')
    flags.add_argument('--save_every', type=int, default=SAVE_EVERY, help='tokens between saves of the state')
    args = flags.parse_args()
    if args.tokenizer in ('chars', 'bpe'):
        raise ValueError(f'--tokenizer={args.tokenizer} needs a pass over all text first: take bytes or gpt2')
    tokenizer = make_tokenizer(args.tokenizer, [], vocab_size=None)
    documents = Stream(open_rows(args), args.column, args.val_fraction, args.max_documents)
    # All that decides which documents come, so that a run with other flags is not taken for a continuation.
    origin = args.input or ' '.join(filter(None, [args.repo, args.config, args.revision]))
    source = f'{origin}, {args.column}, val_fraction={args.val_fraction}, max_documents={args.max_documents}'
    summary(args.out, write_dataset(args.out, documents, tokenizer, source, shard_tokens=args.shard_tokens,
                                    save_every=args.save_every))


def open_rows(args):
    """The rows as a streaming dataset: from local files where --input is given, else from the Hub."""
    from datasets import load_dataset
    if args.input:
        paths = sorted(args.input.rglob('*')) if args.input.is_dir() else [args.input]
        files = [str(path) for path in paths if path.suffix in ('.jsonl', '.parquet') and path.is_file()]
        kinds = {Path(file).suffix for file in files}
        if len(kinds) != 1:
            raise ValueError(f'--input={args.input} must be one or more files, all .jsonl or all .parquet')
        kind = {'.jsonl': 'json', '.parquet': 'parquet'}[kinds.pop()]
        return load_dataset(kind, data_files=files, split='train', streaming=True)
    try:
        return load_dataset(args.repo, args.config, revision=args.revision, split='train', streaming=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f'{args.repo} cannot be opened ({str(error).splitlines()[0]}): check the network, try '
                      '--revision=refs/convert/parquet, or pass local files with --input=PATH') from None
