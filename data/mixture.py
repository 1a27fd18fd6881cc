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
    """
    The folders of a run, each named by its name in data/ or by its path: those of the setting `dataset`, one
    or several with weights, and those of eval_datasets, NAME,NAME, of which only the validation splits count.
    """

    def __init__(self, dataset, eval_datasets=''):
        self.dataset, self.weights, self.eval_datasets = dataset, weights_of(dataset), eval_datasets
        self.folders = {name: folder_of(name) for name in self.weights}
        others = [name.strip() for name in eval_datasets.split(',') if eval_datasets]
        self.others = {name: folder_of(name) for name in others}
        if len({folder.resolve() for folder in self.folders.values()}) < len(self.folders):
            raise ValueError(f'dataset={dataset} must name each dataset once: add up its weights')
        if '' in others or len({folder.resolve() for folder in self.all()}) < len(self.folders) + len(others):
            raise ValueError(f'eval_datasets={eval_datasets} must be names with commas between them, each of '
                             f'another dataset than dataset={dataset}, which is evaluated anyway: leave out '
                             'what is there twice')

    def all(self):
        return [*self.folders.values(), *self.others.values()]

    def ensure_prepared(self):
        for folder in self.all():
            ensure_prepared(folder)

    def check_hashes(self, most_bytes=None):
        for folder in self.all():
            check_hashes(folder, most_bytes)

    def read_meta(self):
        """What meta.json holds; of several, what they share, sums of their sizes, and the rest of each."""
        metas = {name: read_meta(folder) for name, folder in self.folders.items()}
        meta = metas[next(iter(metas))]
        for name, other in metas.items():
            self.check_same('dataset', meta, name, other)
        for name, folder in self.others.items():
            self.check_same('eval_datasets', meta, name, read_meta(folder))
        if len(metas) == 1:
            return meta
        shared = {key: meta[key] for key in ('tokenizer', 'vocab_size', 'pairs', 'prompt') if key in meta}
        sums = {key: sum(x[key] for x in metas.values()) for key in ('train_tokens', 'val_tokens')}
        parts = [{key: x[key] for key in x if key != 'tokenizer'} for x in metas.values()]
        return shared | sums | {'weights': list(self.weights.values()), 'parts': parts}

    def check_same(self, setting, meta, name, other):
        """ValueError unless the dataset `name` of a setting is read as the first one is, which has `meta`."""
        first = next(iter(self.folders))
        if any(other[key] != meta[key] for key in ('tokenizer', 'vocab_size')):
            raise ValueError(f'{setting}={getattr(self, setting)} must have one tokenizer, and {first} and '
                             f'{name} have two: prepare {name} again with --tokenizer={self.folders[first]}')
        if other.get('pairs') != meta.get('pairs'):
            raise ValueError(f'{setting}={getattr(self, setting)} must be texts alone, or pairs of the same '
                             f'lengths, unlike {first} and {name}: prepare pairs with the same '
                             '--source_tokens= and --target_tokens=, and the same --every=')

    def open(self, block_size, seed, objective=None):
        """The `Dataset` of these, for rows of `block_size` tokens; see open_dataset."""
        trained, others = ({name: open_dataset(folder, block_size, seed, objective)
                            for name, folder in folders.items()} for folders in (self.folders, self.others))
        if len(trained) == 1 and not others:
            return next(iter(trained.values()))
        return Mixture(self.read_meta(), list(self.weights.values()), trained, others)


def folder_of(name):
    return Path(name) if os.path.dirname(name) else HERE / name


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
    """
    Several datasets as one: those to train on, {name: Dataset}, with their weights, and others, which are
    only evaluated.
    """

    def __init__(self, meta, weights, trained, others):
        self.meta, self.weights, self.trained = meta, weights, list(trained.values())
        self.names, self.parts = [*trained, *others], [*self.trained, *others.values()]
        self.objective = self.parts[0].objective
        self.shares = shares_of(weights)

    def train_rows(self, numbers):
        which, own = deal(numbers, self.shares)
        found = [(which == i, *part.train_rows(own[which == i])) for i, part in enumerate(self.trained)]
        rows = np.empty((len(numbers), found[0][1].shape[1]), np.int64)
        keys = np.empty(len(numbers), np.uint64)
        for at, *of_part in found:
            rows[at], keys[at] = of_part
        return rows, keys

    def eval_batches(self, *args, **kwargs):
        """Those of the first dataset; evaluations ask each of `parts`."""
        return self.parts[0].eval_batches(*args, **kwargs)

    def judged(self, losses):
        """
        The means by weight of the losses of what is trained on and of their bits per byte, and both of each
        of `parts`, by name.
        """
        each = [(loss, part.judged([loss])[1]) for part, loss in zip(self.parts, losses)]
        means = (math.fsum(w * x for w, x in zip(self.weights, xs)) for xs in zip(*each[:len(self.weights)]))
        return *means, dict(zip(self.names, each))


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
