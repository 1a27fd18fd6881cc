"""Corpora from the Hugging Face Hub, streamed to token files. An interrupted run resumes."""
from collections import Counter
from itertools import islice
from pathlib import Path

from .common import (
    check_processes,
    check_val_fraction,
    make_tokenizer,
    preparation,
    print_summary,
    split_of,
)
from .progress import say
from .reading import Corpus, count, kind_of
from .tokenizer import need
from .writer import write_dataset


class Stream:
    """
    The documents of a streaming dataset in its order, as (split, text), with the state that a resume needs.

    The hash of a document's number decides whether it is for validation, so the stream needs neither a
    second pass nor a shuffle. Or all of val_rows are, another streaming dataset, which comes last.
    """

    def __init__(self, rows, column='text', val_fraction=0.0005, max_documents=None, val_rows=None):
        self.rows, self.val_rows, self.column = rows, val_rows, column
        self.val_fraction, self.max_documents = val_fraction, max_documents
        self.number, self.nulls, self.split = 0, 0, 'train'

    def __iter__(self):
        from tqdm import tqdm
        for row in tqdm(self.all_rows(), initial=self.number, total=self.max_documents, unit=' documents'):
            if self.column not in row or not isinstance(row[self.column], str | None):
                raise ValueError(f'document {self.number:,} has no text in column {self.column!r}: choose '
                                 f'one of {", ".join(row)} with --column=')
            split = split_of(str(self.number), self.val_fraction) if self.val_rows is None else self.split
            # counted before the yield: the writer asks for the state after it has written this document
            self.number += 1
            if not row[self.column]:
                self.nulls += 1
            else:
                yield split, row[self.column]

    def all_rows(self):
        """The rows that are left, those of val_rows behind at most max_documents others."""
        if self.split == 'train':
            yield from islice(self.rows, self.max_documents and self.max_documents - self.number)
            self.split = 'val'
        if self.val_rows is not None:
            yield from self.val_rows

    def state_dict(self):
        state = {'number': self.number, 'nulls': self.nulls, 'split': self.split}
        rows = {'rows': self.rows, 'val_rows': self.val_rows}
        return state | {name: x.state_dict() for name, x in rows.items() if x is not None}

    def load_state_dict(self, state):
        self.number, self.nulls = state['number'], state.get('nulls', 0)
        self.split = state.get('split', 'train')
        self.rows.load_state_dict(state['rows'])
        if self.val_rows is not None:
            self.val_rows.load_state_dict(state['val_rows'])


def prepare(folder, train, *, repo, config, revision, column, input, max_documents, val_split, val_input, out,
            overwrite, tokenizer, val_fraction, shard_tokens, save_every, processes):
    """
    Write a dataset of the Hub to `out`, or to `folder` if `out` is empty. train: the script and flags that
    the summary advises. The rest are the settings.
    """
    check_val_fraction(val_fraction, 0.0005, val_input or val_split)
    if tokenizer in ('chars', 'bpe'):
        raise ValueError(f'tokenizer={tokenizer} needs a pass over all text first: take bytes or gpt2')
    check_processes(processes)
    input, val_input = (Path(path) if path else None for path in (input, val_input))
    if val_input and not input:
        raise ValueError(f'val_input={val_input} must stand beside input: to hold out a split of {repo}, '
                         'name it with --val_split=')
    if val_split and input:
        raise ValueError(f'val_split={val_split} must be left out beside input={input}: name other files '
                         'with --val_input=')
    if val_split == 'train':
        raise ValueError('val_split=train must be another split than train, which is trained on: name that '
                         'for validation, or leave it out')
    with preparation(out or folder, overwrite, resumes=True) as out:
        tokenizer = make_tokenizer(tokenizer, [], vocab_size=None)
        rows = open_files(input) if input else open_repo(repo, config, revision)
        val_rows = (open_files(val_input, 'val_input') if val_input
                    else open_repo(repo, config, revision, val_split) if val_split else None)
        documents = Stream(rows, column, val_fraction, max_documents, val_rows)
        # all that decides which documents come, so that a run with other settings does not resume this one
        origin = input or ' '.join(filter(None, [repo, config, revision]))
        of_val = f'val_fraction={val_fraction}' if val_rows is None else f'val={val_input or val_split}'
        source = f'{origin}, {column}, {of_val}, max_documents={max_documents}'
        meta = write_dataset(out, documents, tokenizer, source, shard_tokens=shard_tokens,
                             save_every=save_every, processes=processes)
    if documents.nulls:
        say(f'passed over: {count(documents.nulls, "row")} without text')
    print_summary(out, meta, train)


# the readers of the package datasets, which unpack .gz, .zst and others themselves
BUILDERS = {'.jsonl': 'json', '.ndjson': 'json', '.json': 'json', '.csv': 'csv', '.parquet': 'parquet'}


def open_files(path, setting='input'):
    """The rows of local files of one kind, a file or a folder of them, as a streaming dataset."""
    datasets = need('datasets', f'{setting}={path}')
    corpus = Corpus(path, setting=setting)
    files = {file: BUILDERS.get(kind_of(file)[0]) for file in corpus.paths}
    corpus.passed_over += Counter(kind_of(file)[0] for file, builder in files.items() if not builder)
    kinds = {builder for builder in files.values() if builder}
    if len(kinds) != 1:
        raise ValueError(f'{setting}={path} must be one or more files, all .jsonl or all .parquet, or '
                         '.json or .csv')
    corpus.paths = [file for file, builder in files.items() if builder]
    corpus.kinds = Counter(''.join(kind_of(file)) for file in corpus.paths)
    say(corpus.files_in_words())
    return datasets.load_dataset(kinds.pop(), data_files=list(map(str, corpus.paths)), split='train',
                                 streaming=True)


def open_repo(repo, config, revision, split='train'):
    """The rows of a split of a dataset on the Hub, as a streaming dataset."""
    datasets = need('datasets', f'repo={repo}')
    try:
        return datasets.load_dataset(repo, config or None, revision=revision or None, split=split,
                                     streaming=True)
    except ValueError as error:  # datasets names the splits that there are
        if split == 'train':
            raise
        raise ValueError(f'val_split={split} must be a split of {repo} ({str(error).splitlines()[0]}): '
                         'choose another') from None
    except (OSError, RuntimeError) as error:
        raise OSError(f'{repo} cannot be opened ({str(error).splitlines()[0]}): check the network, try '
                      '--revision=refs/convert/parquet, or pass local files with --input=PATH') from None
