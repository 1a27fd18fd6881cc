"""Corpora from the Hugging Face Hub, streamed to token files. An interrupted run resumes."""
from pathlib import Path

from .common import check_val_fraction, make_tokenizer, print_summary, split_of
from .tokenizer import need
from .writer import write_dataset


class Stream:
    """
    The documents of a streaming dataset in its order, as (split, text), with the state that a resume needs.

    The hash of a document's number decides whether it is for validation, so the stream needs neither a
    second pass nor a shuffle.
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
            # counted before the yield: the writer asks for the state after it has written this document
            self.number += 1
            yield split, row[self.column]

    def state_dict(self):
        return {'number': self.number, 'rows': self.rows.state_dict()}

    def load_state_dict(self, state):
        self.number = state['number']
        self.rows.load_state_dict(state['rows'])


def prepare(folder, *, repo, config, revision, column, input, max_documents, out, tokenizer, val_fraction,
            shard_tokens, save_every):
    """Write a dataset of the Hub to `out`, or to `folder` if `out` is empty. The rest are the settings."""
    check_val_fraction(val_fraction)
    if tokenizer in ('chars', 'bpe'):
        raise ValueError(f'tokenizer={tokenizer} needs a pass over all text first: take bytes or gpt2')
    out, input = Path(out or folder), Path(input) if input else None
    tokenizer = make_tokenizer(tokenizer, [], vocab_size=None)
    rows = open_files(input) if input else open_repo(repo, config, revision)
    documents = Stream(rows, column, val_fraction, max_documents)
    # all that decides which documents come, so that a run with other settings does not resume this one
    origin = input or ' '.join(filter(None, [repo, config, revision]))
    source = f'{origin}, {column}, val_fraction={val_fraction}, max_documents={max_documents}'
    print_summary(out, write_dataset(out, documents, tokenizer, source, shard_tokens=shard_tokens,
                                     save_every=save_every))


def open_files(path):
    """The rows of local .jsonl or .parquet files, a file or a folder of them, as a streaming dataset."""
    datasets = need('datasets', f'input={path}')
    paths = sorted(path.rglob('*')) if path.is_dir() else [path]
    files = [str(path) for path in paths if path.suffix in ('.jsonl', '.parquet') and path.is_file()]
    formats = {Path(file).suffix for file in files}
    if len(formats) != 1:
        raise ValueError(f'input={path} must be one or more files, all .jsonl or all .parquet')
    builder = {'.jsonl': 'json', '.parquet': 'parquet'}[formats.pop()]
    return datasets.load_dataset(builder, data_files=files, split='train', streaming=True)


def open_repo(repo, config, revision):
    """The rows of a dataset on the Hub, as a streaming dataset."""
    datasets = need('datasets', f'repo={repo}')
    try:
        return datasets.load_dataset(repo, config or None, revision=revision or None, split='train',
                                     streaming=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f'{repo} cannot be opened ({str(error).splitlines()[0]}): check the network, try '
                      '--revision=refs/convert/parquet, or pass local files with --input=PATH') from None
