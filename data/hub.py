"""Corpora from the Hugging Face Hub, streamed: nothing is downloaded twice, and an interrupted run goes on where it was."""

from pathlib import Path

from data.common import Flags, make_tokenizer, split_of, summary
from data.writer import write_dataset

# 200 MB in uint16.
SHARD_TOKENS = 100_000_000


class Stream:
    """Documents of a streaming dataset as (split, text), in its order, with the state that a resume needs.

    A document is for validation by the hash of its number, so the split needs no second pass and no shuffle.
    """

    def __init__(self, rows, column='text', val_fraction=0.0005, max_documents=None):
        self.rows, self.column, self.val_fraction, self.max_documents = rows, column, val_fraction, max_documents
        self.number = 0

    def __iter__(self):
        from tqdm import tqdm
        for row in tqdm(self.rows, initial=self.number, total=self.max_documents, unit=' documents'):
            if self.number == self.max_documents:
                return
            if self.column not in row:
                raise ValueError(f'--column={self.column} is not in the data: it has {", ".join(row)}')
            split = split_of(str(self.number), self.val_fraction)
            # Before the yield, because the state is asked for while this document is being written.
            self.number += 1
            yield split, row[self.column]

    def state_dict(self):
        return {'number': self.number, 'rows': self.rows.state_dict()}

    def load_state_dict(self, state):
        self.number = state['number']
        self.rows.load_state_dict(state['rows'])


def prepare(description, folder, repo, config=None, val_fraction=0.0005):
    """What data/openwebtext/prepare.py and its like do; `folder` is where they lie."""
    flags = Flags(description, out=folder)
    flags.add_argument('--input', type=Path, metavar='PATH', help='local .jsonl or .parquet, a file or a folder, instead')
    flags.add_argument('--repo', default=repo, help='dataset on the Hub (default %(default)s)')
    flags.add_argument('--config', default=config, help='which part of it (default %(default)s)')
    flags.add_argument('--revision', help='branch or commit of the dataset')
    flags.add_argument('--column', default='text', help='column that holds the text (default %(default)s)')
    flags.add_argument('--tokenizer', default='gpt2', help="bytes or one of tiktoken's (default %(default)s)")
    flags.add_argument('--val_fraction', type=float, default=val_fraction, help='default %(default)s')
    flags.add_argument('--max_documents', type=int, help='stop after so many (default: all)')
    flags.add_argument('--shard_tokens', type=int, default=SHARD_TOKENS, help='tokens per file (default %(default)s)')
    flags.add_argument('--save_every', type=int, default=20_000_000, help='tokens between saves (default %(default)s)')
    args = flags.parse_args()
    if args.tokenizer in ('chars', 'bpe'):
        raise ValueError(f'--tokenizer={args.tokenizer} needs a pass of its own over the text: choose bytes or gpt2')
    tokenizer = make_tokenizer(args.tokenizer, [], vocab_size=None)
    origin = args.input.name if args.input else ' '.join(filter(None, (args.repo, args.config, args.revision)))
    source = f'{origin}, column {args.column}, {args.val_fraction} for validation, at most {args.max_documents} documents'
    documents = Stream(open_rows(args), args.column, args.val_fraction, args.max_documents)
    summary(args.out, write_dataset(args.out, documents, tokenizer, source, shard_tokens=args.shard_tokens,
                                    save_every=args.save_every))


def open_rows(args):
    """The rows as a streaming dataset, from local files with --input, else from the Hub."""
    from datasets import load_dataset
    if args.input:
        paths = sorted(args.input.rglob('*')) if args.input.is_dir() else [args.input]
        files = [str(path) for path in paths if path.suffix in ('.jsonl', '.parquet') and path.exists()]
        kinds = {Path(file).suffix for file in files}
        if len(kinds) != 1:
            raise ValueError(f'--input={args.input} must be, or hold, files that all end in .jsonl or all in .parquet')
        return load_dataset('json' if kinds == {'.jsonl'} else 'parquet', data_files=files, split='train', streaming=True)
    try:
        return load_dataset(args.repo, args.config, revision=args.revision, split='train', streaming=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f'{args.repo} cannot be opened ({reason}): check the network, try '
                      '--revision=refs/convert/parquet, or pass local files with --input=PATH') from None
