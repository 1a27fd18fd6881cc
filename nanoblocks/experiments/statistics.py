"""
Paired statistics. An effect is the mean, over seeds, of the difference between two runs with the same seed:
they share initial weights, batches and evaluation windows, so most of the noise of a seed cancels.
"""
import functools
import math
from bisect import bisect_left
from statistics import fmean
from typing import NamedTuple


def t_within(t, df):
    """P(|T| < t) of Student's t with df degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(angle), math.cos(angle)
    term = total = cos if df % 2 else 1.0
    for k in range(2 + df % 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if df % 2:
        return (angle + (sin * total if df > 1 else 0.0)) * 2 / math.pi
    return sin * total


@functools.cache
def t_quantile(p, df):
    """The t with P(T < t) = p, for p above 0.5, of Student's t with df degrees of freedom."""
    low, high = 0.0, 1.0
    while t_within(high, df) < 2 * p - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < 2 * p - 1 else (low, middle)
    return high


class Effect(NamedTuple):
    """A mean of paired differences and its 95 % interval, mean - half to mean + half."""
    n: int              # pairs
    mean: float         # nan without pairs
    sd: float           # standard deviation of the differences; nan for fewer than two
    half: float         # half the width of the interval; nan for fewer than two

    @property
    def resolved(self):
        """Whether the interval excludes zero."""
        return self.n > 1 and abs(self.mean) > self.half

    @property
    def p(self):
        """How often seeds alone would give such a mean or one further from zero; nan for fewer than two."""
        if math.isnan(self.half):
            return math.nan
        if self.sd == 0:
            return float(self.mean == 0)
        return 1 - t_within(abs(self.mean) * math.sqrt(self.n) / self.sd, self.n - 1)


def deviation(values):
    """The standard deviation of a sample; nan for fewer than two values, and where a value is nan."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def effect(differences):
    """The paired t-interval: mean +- t(0.975, n - 1) sd / sqrt(n)."""
    n = len(differences)
    mean = fmean(differences) if n else math.nan
    sd = deviation(differences)
    return Effect(n, mean, sd, t_quantile(0.975, n - 1) * sd / math.sqrt(n) if n > 1 else math.nan)


def seeds_needed(mean, sd, most=1000):
    """
    How many pairs resolve a true difference of `mean` with a probability of 80 %, when single differences
    have standard deviation sd; None beyond `most`.
    """
    def enough(n):
        return (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * sd / math.sqrt(n) <= abs(mean)
    return bisect_left(range(most + 1), True, lo=2, key=enough) if enough(most) else None


def holm(values):
    """
    p values of a family of tests -> the values after Holm's correction (1979), in their order: with a
    probability of 95 %, none of those below 0.05 is there by chance alone. A nan is no test, and stays nan.
    """
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=values.__getitem__)
    corrected, least = list(values), 0.0
    for rank, i in enumerate(order):
        # the smallest of m stands for m tests, the next for m - 1; and none falls below the one before it
        least = corrected[i] = max(least, min(1.0, (len(order) - rank) * values[i]))
    return corrected


def slope(x, y):
    """The slope of the line of least squares."""
    middle = fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)
