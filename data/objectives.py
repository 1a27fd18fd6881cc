"""
What a model learns to say about a row of text: which tokens it reads, and which it must name.

    next        each token's next one                       a decoder
    mask        the tokens that were masked (BERT)          an encoder: causal=False
    diffusion   the same, of any share of them (LLaDA)      an encoder: causal=False
    prefix      the second half of a row, after the first   a decoder, or one with an encoder: n_encoder
                the target of a pair, after its source      the same, where the dataset holds pairs
    span        spans that were cut out (T5)                a decoder, or one with an encoder: n_encoder

An encoder alone can learn the last two as well: it names all tokens at once, each in its own place.

An objective is called with rows (n,T+1) and a key for each row, from which all its draws are hashed: a row is
masked alike in every run that has the seed, whatever its other flags, and in a run that is resumed.
"""

import numpy as np
import torch

from .loader import Tokens, inputs_and_targets, mix, read_meta
from .tokenizer import from_meta, mask_of
from .writer import DTYPES

SPANS = 100     # marks of spans that a vocabulary has, and so the most spans of a row
SEARCHED = 2**22    # first tokens of a dataset, among which a document must end if it has several


def noise(keys, columns, purpose):
    """Pseudo-random 64-bit integers, uint64 (n,columns), of keys (n,) and a number for what they decide."""
    return mix(mix(keys + np.uint64(purpose))[:, None] + np.arange(columns, dtype=np.uint64))


def uniform(keys, columns, purpose):
    """The same as numbers in [0, 1)."""
    return (noise(keys, columns, purpose) >> 11) * 2.0 ** -53


class Next:
    names = 'idx', 'targets'    # of the tensors that a batch has, as the model calls them
    more = 0                    # tokens beside those of the dataset
    models = 'decoder',         # that can learn it: decoder, encoder, both
    whole = True                # the loss is of every token, so that it is bits per byte as well
    told = ', {bits:.4f} bits per byte'     # behind a validation loss

    def __init__(self, vocab_size, mask_rate):
        self.vocab_size, self.mask_rate = vocab_size, mask_rate
        self.mask = vocab_size  # what stands for a missing token, or of spans, for the first

    def read_by(self, model):
        """The objective for one of `models`."""
        return self

    def __call__(self, rows, keys):
        return inputs_and_targets(rows)


class Mask(Next):
    """
    A share mask_rate of each row's tokens is to be named: 80 % of them are replaced by the mask, 10 % by any
    token, and 10 % stay (Devlin et al. 2018, https://arxiv.org/abs/1810.04805). The mask is that of the
    vocabulary of a checkpoint, if it has one, or the token after the dataset's last.
    """
    more, models, whole, told = 1, ('encoder',), False, ' of masked tokens'

    def __call__(self, rows, keys):
        x = rows[:, :-1]
        n, T = x.shape
        chosen = self.ranks(keys, T) < max(1, round(self.mask_rate * T))
        kind = uniform(keys, T, 2)
        other = np.where(kind < 0.8, self.mask, noise(keys, T, 3) % self.vocab_size)
        seen = np.where(chosen & (kind < 0.9), other.astype(np.int64), x)
        return torch.from_numpy(seen), torch.from_numpy(np.where(chosen, x, -1))

    def ranks(self, keys, T):
        """A random order of each row's tokens, (n,T): those below m are m tokens at random."""
        return noise(keys, T, 1).argsort(-1).argsort(-1)


class Diffusion(Mask):
    """
    Any number m of a row's T tokens, 1 to T alike, is masked, and each of them weighs T / m: a bound on the
    loss of the whole row (LLaDA: Nie et al. 2025, https://arxiv.org/abs/2502.09992).
    """
    names = 'idx', 'targets', 'weights'
    whole, told = True, ', at most {bits:.4f} bits per byte'

    def __call__(self, rows, keys):
        x = rows[:, :-1]
        n, T = x.shape
        m = 1 + (noise(keys, 1, 2) % np.uint64(T)).astype(np.int64)                 # (n,1)
        chosen = self.ranks(keys, T) < m
        weights = np.broadcast_to(T / m, x.shape).astype(np.float32)
        return (torch.from_numpy(np.where(chosen, self.mask, x)),
                torch.from_numpy(np.where(chosen, x, -1)), torch.from_numpy(weights))


class Prefix(Next):
    """
    The second half of each row, given the first: an encoder reads it, or a decoder before it begins to be
    judged. Both name the same tokens, and begin with the last of the first half. An encoder alone reads that
    token in every place that it names.
    """
    models, whole, told = ('decoder', 'encoder', 'both'), False, ' of second halves'
    blind = False       # to the tokens that it names

    def read_by(self, model):
        self.names = ('idx', 'targets', 'source') if model == 'both' else ('idx', 'targets')
        self.blind = model == 'encoder'
        return self

    def __call__(self, rows, keys):
        half = rows.shape[1] // 2
        return self.given(rows[:, :half], rows[:, half - 1:])

    def given(self, source, text):
        """source (n,S), and text (n,L) whose first token is given, not named -> the tensors"""
        text, source = torch.from_numpy(text), torch.from_numpy(source)
        idx, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        if 'source' in self.names:
            return idx, targets, source.contiguous()
        idx = text[:, :1].expand_as(idx) if self.blind else idx
        before = self.before(source)
        return torch.cat((before, idx), 1), torch.cat((torch.full_like(before, -1), targets), 1)

    def before(self, source):
        """What a decoder reads in front of idx."""
        return source[:, :-1]


class Span(Prefix):
    """
    Spans of 3 tokens on average, mask_rate of a row in all, are cut out, and each leaves a mark of its own;
    what was cut out follows, each span behind its mark (Raffel et al. 2019, https://arxiv.org/abs/1910.10683).
    The marks are the tokens after the dataset's last; where a row would need more of them than SPANS, spans
    are longer. An encoder alone names the same tokens where they were, in the place of the first mark. Rows
    have at least 3 tokens, and mask_rate is below 1.
    """
    more, told = SPANS, ' of spans'

    def __call__(self, rows, keys):
        T = rows.shape[1] - 1
        length, spans, cut = self.sizes(T)
        lengths = self.parts(keys, length - cut, spans, 1), self.parts(keys, cut, spans, 2)
        # kept and cut pieces in turns, kept first
        ends = np.stack(lengths, -1).reshape(len(rows), -1).cumsum(-1)              # (n,2 spans)
        piece = (np.arange(length) >= ends[:, :, None]).sum(1)                      # (n,length)
        if self.blind:
            x, cut = rows[:, :length], piece % 2 == 1
            return torch.from_numpy(np.where(cut, self.mask, x)), torch.from_numpy(np.where(cut, x, -1))
        source, text = (self.marked(rows[:, :length], piece, spans, which) for which in (0, 1))
        return self.given(source, text)

    def sizes(self, T):
        """(tokens of a row that are used, spans, tokens in them), so that a decoder reads at most T tokens"""
        length = T
        while True:
            cut = min(length - 1, max(1, round(self.mask_rate * length)))
            spans = min(SPANS, max(1, round(cut / 3)))
            if length + 2 * spans <= T + 1:
                return length, min(spans, length - cut), cut
            length -= 1

    def parts(self, keys, total, count, purpose):
        """Lengths, at least 1, of `count` parts of `total`, any with the same chance: (n,count)."""
        borders = noise(keys, total - 1, purpose).argsort(-1)[:, :count - 1] + 1
        whole = np.zeros((len(keys), 1), np.int64)
        return np.diff(np.concatenate((whole, np.sort(borders), whole + total), 1))

    def marked(self, rows, piece, spans, which):
        """The kept pieces (0), each with a mark behind it, or the cut ones (1), each behind its mark."""
        at = piece % 2 == which
        marks = np.broadcast_to(self.vocab_size + np.arange(spans), (len(rows), spans))
        # a mark lies between the pieces 2i and 2i + 1
        where = np.concatenate((piece, np.broadcast_to(2 * np.arange(spans) + 0.5, marks.shape)), 1)
        tokens, wanted = np.concatenate((rows, marks), 1), np.concatenate((at, np.ones_like(marks, bool)), 1)
        order = where.argsort(-1, kind='stable')
        tokens, wanted = (np.take_along_axis(x, order, -1) for x in (tokens, wanted))
        return tokens[wanted].reshape(len(rows), -1)

    def before(self, source):
        return source


class Pairs(Prefix):
    """
    The target of a pair and the token that ends it, given the source; a decoder begins with that token too,
    and an encoder alone reads it in every place that it names. Rows (n,S+L) hold a source and a target, each
    filled up with the token (data/pairs/prepare.py). Where pairs['every'] is n, the loss is of every n-th
    token of a target alone, and those between are given; an encoder alone does not see them either.
    """
    told = ' of targets'

    def __init__(self, vocab_size, pairs):
        super().__init__(vocab_size, None)
        self.size, self.eot, self.every = pairs['source'], pairs['eot'], pairs.get('every', 1)

    def __call__(self, rows, keys):
        source, target = rows[:, :self.size], rows[:, self.size:]
        s, t = self.lengths(source), self.lengths(target)                           # (n,1) each
        end = np.full((len(rows), 1), self.eot)
        if 'source' in self.names:
            source = np.where(np.arange(self.size) < s, source, -1)
            text, s = np.concatenate((end, target), 1), 0
        else:
            # without the fill between them
            at = np.broadcast_to(np.arange(rows.shape[1] + 1), (len(rows), rows.shape[1] + 1))
            where = np.select([at < s, (at > s) & (at <= s + t)], [at, at - s - 1 + self.size], -1)
            text = np.take_along_axis(np.concatenate((rows, end), 1), where, 1)
        at = np.arange(1, text.shape[1])
        named = (at > s) & (at <= s + t + 1) & ((at - s) % self.every == 0)
        targets = np.where(named, text[:, 1:], -1)
        text = np.where(np.arange(text.shape[1]) > s, self.eot, text) if self.blind else text
        tensors = text[:, :-1], targets, source
        return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x, _ in zip(tensors, self.names))

    def lengths(self, x):
        """How many tokens there are before the fill: (n,1)."""
        return ((x != self.eot) * np.arange(1, x.shape[1] + 1)).max(-1, keepdims=True)


class Packed:
    """
    An objective whose batches say as well where documents begin: at each end-of-text token, which ends one
    text and begins the next. So a text begins in training as in sampling, the first token of each is learned
    too, and no target lies in another document than the token that names it.
    """

    def __init__(self, task, end):
        self.task, self.end, self.names = task, end, (*task.names, 'starts')
        self.more, self.whole, self.told = task.more, task.whole, task.told

    def __call__(self, rows, keys):
        return *self.task(rows, keys), torch.from_numpy(rows[:, :-1] == self.end)


OBJECTIVES = {'next': Next, 'mask': Mask, 'diffusion': Diffusion, 'prefix': Prefix, 'span': Span}


def objective_of(name, meta, mask_rate):
    """The objective of this name for the dataset that `meta` describes."""
    if name == 'prefix' and 'pairs' in meta:
        return Pairs(meta['vocab_size'], meta['pairs'])
    task = OBJECTIVES[name](meta['vocab_size'], mask_rate)
    own = mask_of(meta['tokenizer']) if isinstance(task, (Mask, Span)) else None
    if own is not None:     # sample.py reads the same; marks of spans are needed beside it
        task.mask, task.more = own, 0 if isinstance(task, Mask) else task.more
    return task


def packed(task, folders):
    """The objective with where documents begin. ValueError if nothing parts those in any of the folders."""
    metas = {folder: read_meta(folder) for folder in folders}
    end = from_meta(next(iter(metas.values()))['tokenizer']).eot

    def parted(folder, meta):
        tokens = Tokens(folder, meta['files']['train'], DTYPES[meta['dtype']], meta.get('header', 0))
        return (tokens.rows(np.zeros(1, np.int64), min(len(tokens), SEARCHED)) == end).any()
    if end is None or not any(parted(*item) for item in metas.items()):
        names = ', '.join(map(str, folders))
        raise ValueError(f'doc_mask=True must be False for {names}, where no end-of-text token parts '
                         'documents: leave it out, or prepare by data/text/prepare.py, with a --tokenizer '
                         'other than chars, documents that are not cut: with --val_input=, or 10 / '
                         'val_fraction of them or more, 100 by default')
    return Packed(task, end)
