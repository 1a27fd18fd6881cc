"""
Interleaved timing: variants that are compared run in one process, in rounds, and medians are reported.

The clock rate of a machine and the load on it drift. Each round runs every variant once, and every other
round runs them in reverse order, so drift reaches all variants about equally.
"""
import math
import statistics
from itertools import chain
from typing import NamedTuple

import torch

from nanoblocks.experiments.statistics import effect
from nanoblocks.experiments.topics import Countdown
from nanoblocks.hardware import synchronized_time


def interleaved(runs, rounds, warmup=3):
    """
    runs {name: function without arguments} -> {name: [what it returned in each round]}.
    The first `warmup` rounds compile and allocate, and are not kept. What takes long says so on stderr.
    """
    results, countdown = {name: [] for name in runs}, Countdown((warmup + rounds) * len(runs))
    for n in range(-warmup, rounds):
        for name in (list(runs) if n % 2 else reversed(runs)):
            result = runs[name]()
            countdown.step(' '.join(map(str, name)) if type(name) is tuple else name)
            if n >= 0:
                results[name].append(result)
    return results


def timed(run, device):
    """A function that runs `run`, waits for the device, and returns the milliseconds that took."""
    def milliseconds():
        began = synchronized_time(device)
        run()
        return (synchronized_time(device) - began) * 1e3
    return milliseconds


def times(runs, rounds, device, warmup=3):
    """{name: function} -> {name: [milliseconds of each round]}, interleaved."""
    return interleaved({name: timed(run, device) for name, run in runs.items()}, rounds, warmup)


def medians(runs, rounds, device, warmup=3):
    """{name: function} -> {name: median milliseconds}, interleaved."""
    return {name: statistics.median(ms) for name, ms in times(runs, rounds, device, warmup).items()}


class Ratio(NamedTuple):
    """A ratio of times and its 95 % interval, whose ends are nan for a single round."""
    n: int              # rounds
    mean: float
    low: float
    high: float

    def __str__(self):
        return f'x {self.mean:.2f} ({self.low:.2f} to {self.high:.2f})'


def ratio(first, second):
    """
    first / second, times of the same rounds, in the middle of the rounds. From six rounds on it is the median
    and the interval of a median, which no single slow round moves; below, a geometric mean and its
    t-interval. It covers the noise of these rounds, not another day or machine.
    """
    logs = sorted(math.log(a / b) for a, b in zip(first, second))
    n = len(logs)
    # so many rounds are below the interval, and as many above: Binomial(n, 1/2) is as low in 2.5 % of cases
    below = max((k for k in range(n // 2) if sum(math.comb(n, i) for i in range(k + 1)) <= 0.025 * 2 ** n),
                default=None)
    if below is not None:
        found = statistics.median(logs), logs[below], logs[-1 - below]
    else:
        e = effect(logs)
        found = e.mean, e.mean - e.half, e.mean + e.half
    return Ratio(n, *map(math.exp, found))


def cold_time(run, device, budget=0.15):
    """
    Median milliseconds of run() on a GPU, whose L2 cache is overwritten before every call; repeated 5 to 50
    times, as the budget in seconds allows. On a CPU, and beyond the budget, the time of one call.
    """
    run()
    once = timed(run, device)()
    if device == 'cpu' or once > budget * 1e3:
        return once
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    n = min(50, max(5, int(budget * 1e3 / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def print_table(heads, rows):
    """Print columns as wide as their widest cell; the first to the left, all others to the right."""
    rows = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        print('  '.join(cells).rstrip(), flush=True)


def print_markdown(heads, rows):
    """Print a table for a page in Markdown, each row as soon as `rows` has it."""
    for cells in chain((heads, ['---'] * len(heads)), rows):
        print(f'| {" | ".join(map(str, cells))} |', flush=True)
