"""Your own text, a file or a folder: .txt .md .py (documents); .jsonl .json .csv .tsv .parquet (rows).

    python data/text/prepare.py --input=notes --name=notes
    python train.py --dataset=notes
    python data/text/prepare.py --input=rows.jsonl --column=body --name=rows --tokenizer=gpt2
    python data/text/prepare.py --input=train.parquet --val_input=test.parquet --name=split --processes=8

All but .parquet may be packed as .gz .bz2 .xz .zst. Of a folder, the files that are passed over are counted.
A line that holds <|endoftext|> alone ends a document. What --val_input names is for validation; without it,
about a tenth is. Where there are many documents, the hash of a document's name or number decides; where there
are few, the end of every document is. After an interruption, the same command resumes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages
from data.common import (
    Again,
    check_own,
    check_processes,
    halves_in_words,
    learned_before,
    make_tokenizer,
    origin_of,
    preparation,
    print_summary,
    split_of,
)
from data.encoding import CUT, END, MORE
from data.progress import Progress, say
from data.reading import Corpus
from data.writer import write_dataset

DATA = Path(__file__).resolve().parents[1]

input = ''                          # file or folder to read; it must be given
name = 'text'                       # write to data/NAME, for train.py --dataset=NAME
out = ''                            # folder to write to; empty: data/NAME
overwrite = False                   # replace the dataset that is there
tokenizer = 'bpe'                   # bytes, chars, bpe, gpt2, cl100k_base, a checkpoint's or run's folder
vocab_size = 2048                   # bpe: tokens in the vocabulary
column = 'text'                     # column of the rows that holds the text
val_input = ''                      # file or folder for validation, an official split; empty: val_fraction
val_fraction = 0.1                  # share of the text for validation, where val_input is empty
processes = 1                       # that make tokens
save_every = 20_000_000             # tokens between saves of the progress, from which a later run resumes


def few_lengths(corpus, many):
    """The lengths of all documents in characters, or None if there are `many` or more."""
    lengths, within = [], False
    for part in corpus:
        if not within:
            lengths.append(0)
        lengths[-1] += len(part.text)
        within = not part.last
        if len(lengths) == many:
            return None
    return lengths


def by_input(*corpora):
    """Yields (split, text, end): each split has a corpus of its own."""
    for split, corpus in zip(('train', 'val'), corpora):
        for part in corpus:
            yield split, part.text, END if part.last else MORE


def by_name(corpus):
    """Yields (split, text, end): the hash of a document's name decides."""
    split, within = None, False
    for part in corpus:
        split = split if within else split_of(part.name, val_fraction)
        within = not part.last
        yield split, part.text, MORE if within else END


def by_cut(corpus, lengths):
    """Yields (split, text, end): the end of every document is for validation."""
    left, lengths = None, iter(lengths)
    for part in corpus:
        if left is None:
            left = int(next(lengths) * (1 - val_fraction))
        if left >= 0:
            yield 'train', part.text[:left], MORE if len(part.text) < left else CUT
        if len(part.text) >= left:
            yield 'val', part.text[max(left, 0):], END if part.last else MORE
        # below zero: the cut is behind
        left = None if part.last else left - len(part.text) if len(part.text) < left else -1


def main():
    check_own(input, name, 'text', val_fraction, val_input)
    check_processes(processes)
    corpora = [Corpus(Path(path).expanduser(), column, setting=setting)
               for setting, path in (('input', input), ('val_input', val_input)) if path]
    with preparation(out or DATA / name, overwrite, resumes=True) as folder:
        for corpus in corpora:
            say(corpus.files_in_words())

        def with_progress(label):
            progress = Progress(label, sum(corpus.size for corpus in corpora))
            for corpus in corpora:
                corpus.on_bytes = progress.add
            return progress

        lengths = None
        if not val_input:
            with_progress('counting documents')
            # with this many documents, the chance that none is for validation is e**-10
            lengths = few_lengths(corpora[0], int(10 / val_fraction))

        def splits(label):
            """All parts, with progress under this label."""
            progress = with_progress(label)
            yield from (by_input(*corpora) if val_input else by_name(*corpora) if lengths is None
                        else by_cut(*corpora, lengths))
            progress.close()

        # a character vocabulary must know all characters; merges are learned from the training split alone
        texts = (text for split, text, _ in splits('reading for the vocabulary')
                 if split == 'train' or tokenizer == 'chars')
        origin = origin_of(corpora, column, tokenizer, vocab_size)
        coder = learned_before(folder, origin) if tokenizer in ('bpe', 'chars') else None
        meta = write_dataset(folder, Again(lambda: splits('writing tokens'), origin),
                             coder or make_tokenizer(tokenizer, texts, vocab_size),
                             halves_in_words(input, val_input, val_fraction), save_every=save_every,
                             processes=processes)
    for corpus in corpora:
        if corpus.rows_in_words():
            say(corpus.rows_in_words())
    print_summary(folder, meta)


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        main()
