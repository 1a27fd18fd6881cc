"""
The vocabulary that byte-pair encoding (Sennrich et al. 2016) learns: in each round the most frequent pair of
neighbouring tokens becomes a token; of equally frequent pairs the smaller wins.
"""
import heapq
from collections import defaultdict

import numpy as np


def learned(words, counts, n_merges):
    """
    Yields the first `n_merges` tokens, bytes, in the order in which they are learned from words (bytes, each
    given once), of which words[i] occurs counts[i] times; fewer where no pair occurs twice.
    """
    pairs, tokens = Pairs(words, counts), set()
    while len(tokens) < n_merges and (pair := pairs.most_frequent()):
        token = pairs.merge(*pair)
        # two pairs can spell the same token, which then counts once
        if token not in tokens:
            tokens.add(token)
            yield token


class Pairs:
    """
    The pairs of neighbours in words (bytes), of which words[i] occurs counts[i] times, in arrays:

    token       number of the token at each place; -1 where none is, between words and within a merged token
    before      place of the token before, after: of the one behind, in the same word; a place without token
    weight      how often the word occurs

    counts      {pair: how often it occurs}, with the pair of tokens a and b as the number a << 32 | b
    where       {pair: arrays of the places at which it began}; some may have changed since
    heap        (-count, spelling of a, of b, pair), the most frequent first; the count may have fallen since
    """

    def __init__(self, words, counts):
        self.spelt = [bytes([byte]) for byte in range(256)]
        self.number = {token: i for i, token in enumerate(self.spelt)}
        # a place without token stands behind each word, and before the first
        self.token = np.frombuffer(b'\0'.join([b'', *words, b'']), np.uint8).astype(np.int64)
        sizes = np.array([1, *(len(word) + 1 for word in words)])
        self.token[np.cumsum(sizes) - 1] = -1
        places = np.arange(len(self.token))
        self.before, self.after = places - 1, np.append(places[1:], 0)
        self.weight = np.repeat([0, *counts], sizes)
        self.marked = np.zeros(len(places), bool)
        self.counts, self.where, self.heap = defaultdict(int), defaultdict(list), []
        self.add(places[self.token >= 0])

    def keys(self, places):
        """The pairs that begin at places, and the places, without those at which no pair begins."""
        a, b = self.token[places], self.token[self.after[places]]
        there = (a >= 0) & (b >= 0)
        return (a << 32 | b)[there], places[there]

    def add(self, places):
        """Count the pairs that begin at these places, and note them."""
        keys, places = self.keys(places)
        if not len(keys):
            return
        order = np.argsort(keys, kind='stable')
        keys, places = keys[order], places[order]
        begin = np.append(0, np.flatnonzero(keys[1:] != keys[:-1]) + 1)
        sums, begins = np.add.reduceat(self.weight[places], begin), begin.tolist()
        for key, n, start, end in zip(keys[begin].tolist(), sums.tolist(), begins, [*begins[1:], len(keys)]):
            self.counts[key] += n
            self.where[key].append(places[start:end])
            a, b = self.spelt[key >> 32], self.spelt[key & 0xffffffff]
            heapq.heappush(self.heap, (-self.counts[key], a, b, key))

    def remove(self, places):
        """Count the pairs that begin at these places no longer."""
        keys, places = self.keys(places)
        for key, n in zip(keys.tolist(), self.weight[places].tolist()):
            self.counts[key] -= n

    def most_frequent(self):
        """The tokens (a, b) of the most frequent pair, the smaller of equals; None if none occurs twice."""
        while self.heap:
            count, a, b, key = heapq.heappop(self.heap)
            now = self.counts[key]
            if -count == now:
                return (key >> 32, key & 0xffffffff) if now > 1 else None
            # the count has fallen since, and another pair may be more frequent now
            heapq.heappush(self.heap, (-now, a, b, key))

    def merge(self, a, b):
        """Join each occurrence of the tokens a and b, from the left, into one. Returns its spelling."""
        token = self.spelt[a] + self.spelt[b]
        if token not in self.number:
            self.number[token] = len(self.spelt)
            self.spelt.append(token)
        places = np.concatenate(self.where.pop(a << 32 | b))
        second = self.after[places]
        places = places[(self.token[places] == a) & (self.token[second] == b)]
        if a == b:
            places = every_other(np.sort(places), self.after)
        second = self.after[places]
        # pairs in front, except those that begin with the second half of another occurrence
        front = self.before[places]
        self.marked[second] = True
        front = front[~self.marked[front] & (self.token[front] >= 0)]
        self.marked[second] = False
        self.remove(np.concatenate([front, places, second]))
        last = self.after[second]
        self.token[places], self.token[second] = self.number[token], -1
        self.after[places], self.before[last] = last, places
        self.add(np.concatenate([front, places]))
        return token


def every_other(places, after):
    """Sorted places of equal pairs without those that overlap the one before: a a a has one pair a a."""
    n = np.arange(len(places))
    begins = np.ones(len(places), bool)
    begins[1:] = after[places[:-1]] != places[1:]
    return places[(n - np.maximum.accumulate(np.where(begins, n, 0))) % 2 == 0]
