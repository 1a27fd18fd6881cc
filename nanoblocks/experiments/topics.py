"""What the topics of bench.py and the sweeps of ablate.py share: lists of sizes, and progress on stderr."""
import sys
import time


def sizes(name, text, *default):
    """
    The numbers of a setting such as --tokens=1024,4096, in ascending order; the default where it is empty.
    A topic with one number as its default takes one number.
    """
    if not text:
        return default
    words = text.split(',')
    example = ','.join(map(str, default))
    if len(default) == 1 and len(words) > 1:
        raise ValueError(f'{name}={text} must be one number here: --{name}={example}')
    if not all(word.strip().isdecimal() and 0 < int(word) < 2**40 for word in words):
        raise ValueError(f'{name}={text} must be whole numbers above 0, separated by commas: '
                         f'--{name}={example}')
    return tuple(sorted({int(word) for word in words}))


def in_short(tokens):
    """131072 -> 128K; 1000 -> 1000"""
    return f'{tokens // 1024}K' if tokens % 1024 == 0 else str(tokens)


# ----------------------------------------------------------------------------------------------------------
# Progress


def tell(line):
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def each(items, name=str):
    """Yields the items, and before each a line on stderr that says which of how many it is."""
    items = list(items)
    for n, item in enumerate(items, start=1):
        tell(f'[{n}/{len(items)}] {name(item)}')
        yield item


class Countdown:
    """Lines on stderr about `total` measurements, at most one every few seconds, with the time left."""

    def __init__(self, total, every=5.0):
        self.total, self.every, self.done = total, every, 0
        self.began = self.told = time.monotonic()

    def step(self, what):
        """`what` has been measured."""
        self.done += 1
        now = time.monotonic()
        if now - self.told < self.every:
            return
        self.told = now
        left = (now - self.began) / self.done * (self.total - self.done)
        tell(f'[{self.done}/{self.total}] {what}: {self.done / self.total:.0%}, about {left:.0f} s left')
