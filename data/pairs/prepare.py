"""Pairs of your own, a source and its target, as in translation: .jsonl .json .csv .tsv .parquet (rows).

    python data/pairs/prepare.py --input=pairs.jsonl --name=mine
    python data/pairs/prepare.py --input=rows.csv --source=article --target=summary --source_tokens=400

A model learns the target and the token that ends it, given the source: train.py --objective=prefix. Each
pair is a row of its own, of source_tokens + target_tokens tokens, filled up where it has fewer. What
--val_input names is for validation; without it, about a tenth is: the hash of the source decides, or where
there are few pairs, the last ones are.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: F401  first, for it answers Ctrl-C during the other imports
from configurator import configure, errors_as_messages
from data.common import (
    check_own,
    halves_in_words,
    make_tokenizer,
    preparation,
    print_summary,
    split_of,
)
from data.progress import Progress, say
from data.reading import Corpus
from data.reading import count as in_words
from data.tokenizer import utf8
from data.writer import write_pairs

DATA = Path(__file__).resolve().parents[1]

input = ''                          # file or folder to read; it must be given
name = 'pairs'                      # write to data/NAME, for train.py --dataset=NAME
out = ''                            # folder to write to; empty: data/NAME
overwrite = False                   # replace the dataset that is there
tokenizer = 'bpe'                   # bytes, bpe, gpt2, cl100k_base, a checkpoint's or run's folder
vocab_size = 2048                   # bpe: tokens in the vocabulary
source = 'source'                   # column that holds what the model is given
target = 'target'                   # column that holds what it must say
source_tokens: int | None = None    # longest source; None: the longest there is, but at most 512
target_tokens: int | None = None    # longest target, with the token that ends it; None: the same
every = 1                           # the loss is of every so many-th token of a target, the others are given
val_input = ''                      # file or folder for validation, an official split; empty: val_fraction
val_fraction = 0.1                  # share of the pairs for validation, where val_input is empty

MOST = 512


def splits_of(pairs, few):
    """Yields (split, source, target). few: how many pairs there are, where they are too few for a hash."""
    first_of_val = few and few - max(1, round(few * val_fraction))
    for number, (given, wanted, held_out) in enumerate(pairs):
        if val_input:
            split = 'val' if held_out else 'train'
        elif few is None:     # a source may have several targets: all of them are in one split
            split = split_of(given, val_fraction)
        else:
            split = 'train' if number < first_of_val else 'val'
        yield split, given, wanted


def in_tokens(pairs, coder):
    """Yields (split, tokens of the source, tokens of the target with its end, bytes of both)."""
    for split, given, wanted in pairs:
        yield (split, coder.encode(given), [*coder.encode(wanted), coder.eot],
               len(utf8(given)) + len(utf8(wanted)))


def sizes_of(pairs):
    """(source_tokens, target_tokens): as set, or the longest of those pairs (of in_tokens) that fit."""
    wanted, found = (source_tokens, target_tokens), [1, 2]
    for _, *both, _ in fitting(pairs, [size or MOST for size in wanted], [0]) if None in wanted else ():
        found = [max(most, len(tokens)) for most, tokens in zip(found, both)]
    return [size or most for size, most in zip(wanted, found)]


def fitting(pairs, sizes, left_out):
    """Those of the pairs that have tokens, and no more than these; left_out[0] counts the others."""
    least = max(2, every)
    for pair in pairs:
        if pair[1] and least <= len(pair[2]) <= sizes[1] and len(pair[1]) <= sizes[0]:
            yield pair
        else:
            left_out[0] += 1


def main():
    check_own(input, name, 'pairs', val_fraction, val_input)
    for key, size, least in (('source_tokens', source_tokens, 1), ('target_tokens', target_tokens, 2),
                             ('every', every, 1)):
        if size is not None and size < least:
            raise ValueError(f'{key}={size} must be at least {least}')
    left_out, columns = [0], ((source, None, 'source'), (target, None, 'target'))
    tables = [[Corpus(Path(path).expanduser(), *column, setting) for column in columns]
              for setting, path in (('input', input), ('val_input', val_input)) if path]

    def pairs(label):
        """All pairs of texts and whether they are of val_input, with progress under this label."""
        progress = Progress(label, sum(sources.size for sources, _ in tables))
        for held_out, (sources, targets) in enumerate(tables):
            sources.on_bytes = progress.add
            for given, wanted in sources.pairs(targets):
                yield given, wanted, held_out
        progress.close()

    with preparation(out or DATA / name, overwrite) as folder:
        for sources, _ in tables:
            say(sources.files_in_words())
        count = sum(1 for _ in pairs('counting pairs'))
        # with so many, the chance that none is for validation is e**-10
        few = count if count < int(10 / val_fraction) else None
        texts = (text for split, *both in splits_of(pairs('reading for the vocabulary'), few)
                 if split == 'train' for text in both)
        coder = make_tokenizer(tokenizer, texts, vocab_size)
        if coder.eot is None:
            raise ValueError(f'tokenizer={tokenizer} must have a token that ends a text, as bytes, bpe and '
                             'gpt2 do: choose another')
        sizes = sizes_of(in_tokens(splits_of(pairs('measuring pairs'), few), coder))
        rows = in_tokens(splits_of(pairs('writing tokens'), few), coder)
        meta = write_pairs(folder, fitting(rows, sizes, left_out), coder,
                           halves_in_words(input, val_input, val_fraction), sizes, every)
    nulls = sum(sources.nulls for sources, _ in tables)
    if nulls:
        say(f'passed over: {in_words(nulls, "row")} without a source or a target')
    say(f'each pair is a row of {sizes[0]} tokens of source and {sizes[1]} of target'
        + (f'; left out: {in_words(left_out[0], "pair")} with more, or with none: raise --source_tokens '
           'and --target_tokens to keep the longer ones' if left_out[0] else ''))
    train = f'train.py config/t5_small.py config/tiny.py --objective=prefix --block_size={sum(sizes)}'
    print_summary(folder, meta, train)


if __name__ == '__main__':
    configure(globals())
    with errors_as_messages():
        main()
