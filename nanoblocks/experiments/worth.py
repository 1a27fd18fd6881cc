r"""
What a difference in loss is worth: how many steps and seconds earlier the better of two arms reached the loss
at which the other ends.

    loss
     |  \  \
     |   \   `.
     |    \     `-._
     |     o - - - -`--.o    the worse arm's final loss
     |      `-._        .
     |          `--..___.    the better arm
     |     |<---------->|    worth
     +--------------------- step

The better arm's own curve is read, whichever of the two it is: the other one ends at its final loss, and what
further steps would have made of it was not measured. So two arms that change places change the sign alone.
"""
import math
from statistics import fmean
from typing import NamedTuple

from nanoblocks.experiments.statistics import effect


class Worth(NamedTuple):
    """
    What an arm saves against another, below zero where it costs more, and its 95 % interval. `of`: the whole
    run of the other. A number is infinite where the better arm was ahead from its first evaluation on; the
    ends are nan where there is no interval.
    """
    mean: float
    low: float
    high: float
    of: float

    def __str__(self):
        if math.isnan(self.mean):
            return '-'
        if math.isinf(self.mean) or math.isnan(self.low):
            return self.said(self.mean)
        return f'{self.said(self.mean)} ({self.said(self.low)} to {self.said(self.high)})'

    def said(self, value):
        """A number with its sign, without decimals where they would say nothing."""
        if math.isinf(value):
            return f'{"more" if value > 0 else "less"} than {self.said(math.copysign(self.of, value))}'
        return f'{round(value):+,}' if self.of >= 100 else f'{value:+.1f}'


def mean_curve(runs):
    """[(step, mean loss)] of runs that were evaluated at the same steps, as those of a sweep are."""
    curves = [dict(run.curve) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, fmean(curve[step] for curve in curves)) for step in steps]


def below_since(curve, loss):
    """
    The step since when a curve [(step, loss)] is below a loss, on straight lines between evaluations; -inf
    where it always was, its last step where it does not end below.
    """
    (after, lower), before = curve[-1], curve[:-1]
    if lower >= loss:
        return after
    for step, higher in reversed(before):
        if higher >= loss:
            return step + (after - step) * (higher - loss) / (higher - lower)
        after, lower = step, higher
    return -math.inf


def worths(first, second, step_tokens):
    """
    (Worth in steps, Worth in seconds) of the second arm against the first, over the seeds that both have;
    None without such a seed and where a run diverged. first, second: {seed: Run}; step_tokens: tokens per
    step.

    The interval in steps is that of the difference in loss, read off the same curves, so it excludes zero
    where that does. The interval in seconds holds the scatter of the runs' speed as well.
    """
    seeds = sorted(first.keys() & second.keys())
    e = effect([second[seed].loss - first[seed].loss for seed in seeds])
    if math.isnan(e.mean):
        return None
    curves = [mean_curve([runs[seed] for seed in seeds]) for runs in (first, second)]
    paces = [[step_tokens / runs[seed].rate for seed in seeds] for runs in (first, second)]  # seconds a step
    last = curves[0][-1][0]

    def steps_at(difference):
        """The steps after which the two arms would have the same loss, if they ended this far apart."""
        better = curves[difference < 0]
        at = below_since(better, better[-1][1] + abs(difference))
        return (last, at) if difference < 0 else (at, last)

    def saved(difference, pace=(1, 1)):
        return sum(sign * n * each for sign, n, each in zip((1, -1), steps_at(difference), pace))

    ends = () if math.isnan(e.half) else (e.mean + e.half, e.mean - e.half)
    pace = [fmean(found) for found in paces]
    in_steps = Worth(saved(e.mean), *[saved(d) for d in ends] or [math.nan] * 2, last)
    middle, whole = saved(e.mean, pace), last * pace[0]
    if math.isinf(middle) or not ends:
        return in_steps, Worth(middle, math.nan, math.nan, whole)
    # at the same steps, what the speeds of the seeds alone would make of it
    speed = effect([saved(e.mean, both) for both in zip(*paces)]).half
    low, high = (math.hypot(middle - saved(d, pace), speed) for d in ends)
    return in_steps, Worth(middle, middle - low, middle + high, whole)
