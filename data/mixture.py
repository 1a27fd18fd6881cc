"""
The datasets of a run: one, or several with a weight each, --dataset="a:0.7,b:0.3".

Of any rows in order, each dataset has its share, to within a row or so. Row n of the run is a row of one of
them, and which row of which follows from n and the weights alone: a dataset takes row n where the rounded
n * share grows by one with n, and that number is the one of its own row. The others are dealt what it leaves
in the same way. So a resumed run needs no cursor here either, and a dataset gives the rows that it gives
alone, in the same order.
"""
import math
import os
from pathlib import Path

import numpy as np

from .loader import HERE, Dataset, check_hashes, ensure_prepared, open_dataset, read_meta

BITS = 30       # of a share, so that products with the numbers of rows are exact in 64 bits


class Sources:
    """The folders that the setting `dataset` names: a name in data/ or a path, or several with weights."""

    def __init__(self, dataset):
        self.dataset, self.weights = dataset, weights_of(dataset)
        self.folders = {name: Path(name) if os.path.dirname(name) else HERE / name for name in self.weights}
        if len({folder.resolve() for folder in self.folders.values()}) < len(self.folders):
            raise ValueError(f'dataset={dataset} must name each dataset once: add up its weights')

    def ensure_prepared(self):
        for folder in self.folders.values():
            ensure_prepared(folder)

    def check_hashes(self, most_bytes=None):
        for folder in self.folders.values():
            check_hashes(folder, most_bytes)

    def read_meta(self):
        """What meta.json holds; of several, what they share, sums of their sizes, and the rest of each."""
        metas = {name: read_meta(folder) for name, folder in self.folders.items()}
        (first, meta), *others = metas.items()
        if not others:
            return meta
        for name, other in others:
            if any(other[key] != meta[key] for key in ('tokenizer', 'vocab_size')):
                raise ValueError(f'dataset={self.dataset} must have one tokenizer, and {first} and {name} '
                                 f'have two: prepare {name} again with --tokenizer={self.folders[first]}')
            if other.get('pairs') != meta.get('pairs'):
                raise ValueError(f'dataset={self.dataset} must be texts alone, or pairs of the same lengths, '
                                 f'unlike {first} and {name}: prepare pairs with the same --source_tokens= '
                                 'and --target_tokens=, and the same --every=')
        shared = {key: meta[key] for key in ('tokenizer', 'vocab_size', 'pairs', 'prompt') if key in meta}
        sums = {key: sum(x[key] for x in metas.values()) for key in ('train_tokens', 'val_tokens')}
        parts = [{key: x[key] for key in x if key != 'tokenizer'} for x in metas.values()]
        return shared | sums | {'weights': list(self.weights.values()), 'parts': parts}

    def open(self, block_size, seed, objective=None):
        """The `Dataset` of these, for rows of `block_size` tokens; see open_dataset."""
        parts = [open_dataset(folder, block_size, seed, objective) for folder in self.folders.values()]
        return Mixture(self.read_meta(), dict(zip(self.weights, parts))) if parts[1:] else parts[0]


def weights_of(dataset):
    """{name: weight} of a setting such as 'a:7,b:3', the weights summing to 1."""
    if ',' not in dataset:
        return {dataset: 1.0}
    weights = {}
    for part in dataset.split(','):
        name, _, text = part.strip().rpartition(':')
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ValueError(f'dataset={dataset} must give each dataset a weight above 0: '
                             f'--dataset="{name or text or "a"}:0.7,b:0.3"')
        if name in weights:
            raise ValueError(f'dataset={dataset} must name each dataset once: add up its weights')
        weights[name] = weight
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class Mixture(Dataset):
    """Several datasets as one. `named` are the Datasets, {name: Dataset}, and meta has their weights."""

    def __init__(self, meta, named):
        self.meta, self.named, self.parts = meta, named, list(named.values())
        self.objective = self.parts[0].objective
        self.shares = shares_of(meta['weights'])

    def train_rows(self, numbers):
        which, own = deal(numbers, self.shares)
        found = [(which == i, *part.train_rows(own[which == i])) for i, part in enumerate(self.parts)]
        rows = np.empty((len(numbers), found[0][1].shape[1]), np.int64)
        keys = np.empty(len(numbers), np.uint64)
        for at, *of_part in found:
            rows[at], keys[at] = of_part
        return rows, keys

    def eval_batches(self, *args, **kwargs):
        """Those of the first dataset; evaluations ask each of `parts`."""
        return self.parts[0].eval_batches(*args, **kwargs)

    def judged(self, losses):
        """The means by weight of the losses of `parts` and of their bits per byte, and those of each part."""
        each = {name: (loss, part.judged([loss])[1])
                for (name, part), loss in zip(self.named.items(), losses)}
        means = (math.fsum(w * x for w, x in zip(self.meta['weights'], xs)) for xs in zip(*each.values()))
        return *means, each


def shares_of(weights):
    """The share of each dataset but the last in what those before it leave, in units of 2**-BITS."""
    left = [math.fsum(weights[i:]) for i in range(len(weights))]
    shares = (round(weight / rest * 2**BITS) for weight, rest in zip(weights[:-1], left))
    return [min(max(1, share), 2**BITS - 1) for share in shares]


def deal(numbers, shares):
    """Of rows, a uint64 array: the dataset that each is of, and its number there."""
    which, own = np.full(len(numbers), len(shares)), numbers.copy()
    left = np.arange(len(numbers))
    for i, share in enumerate(shares):
        n = own[left]
        before = taken(n, share)
        takes = taken(n + np.uint64(1), share) > before
        which[left[takes]] = i
        own[left] = np.where(takes, before, n - before)
        left = left[~takes]
    return which, own


def taken(n, share):
    """n * share / 2**BITS, rounded, without an overflow: how many of the first n rows a share is."""
    whole, rest = np.divmod(n, np.uint64(2**BITS))
    return whole * np.uint64(share) + (rest * np.uint64(share) + np.uint64(2**(BITS - 1)) >> np.uint64(BITS))
