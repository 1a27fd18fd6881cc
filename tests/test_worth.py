"""
What a difference is worth in steps and seconds, p values and Holm's correction against worked numbers, arms
with different numbers of seeds, and a sweep at several sizes as a user runs it.
"""
import json
import math
import random
import statistics

import numpy as np
import pytest
from conftest import ROOT

from nanoblocks.experiments import report
from nanoblocks.experiments.runs import Run
from nanoblocks.experiments.statistics import effect, holm, slope
from nanoblocks.experiments.worth import Worth, below_since, worths

# ----------------------------------------------------------------------------------------------------------
# p values


def test_p_values_equal_those_of_scipy():
    for x, p in (([-0.01, -0.02, -0.03], 0.07417990022744854), ([1.0, 1.2], 0.057715876752608926),
                 ([0.3, -0.1, 0.2, 0.4, 0.05], 0.12835348651691136)):
        assert effect(x).p == pytest.approx(p, rel=1e-9)     # stats.ttest_1samp(x, 0) of scipy 1.17


@pytest.mark.parametrize('n', [2, 3, 4, 7])
def test_a_p_value_is_below_5_percent_where_the_interval_excludes_zero(n):
    draw = np.random.default_rng(n)
    for _ in range(200):
        e = effect(list(draw.normal(0.7, 1.0, n)))
        assert e.resolved == (e.p < 0.05)


def test_p_values_of_few_and_of_equal_differences():
    assert math.isnan(effect([]).p) and math.isnan(effect([0.1]).p) and math.isnan(effect([0.1, math.nan]).p)
    assert effect([0.0, 0.0]).p == 1 and effect([0.5, 0.5]).p == 0


def test_holm_equals_an_example_worked_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and the last not below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    # what was not tested does not count
    found = holm([0.01, math.nan, 0.03])
    assert found[::2] == pytest.approx([0.02, 0.03]) and math.isnan(found[1])


def test_holm_is_the_step_down_procedure():
    """Reject the smallest p while it is below 0.05 over the number of those left."""
    draw = random.Random(0)
    for _ in range(300):
        ps, rejected = [draw.random() ** 3 for _ in range(draw.randint(1, 8))], set()
        for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
            if ps[i] > 0.05 / (len(ps) - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(holm(ps)) if p <= 0.05} == rejected


def test_holm_keeps_its_promise():
    """Of families in which nothing differs, one in twenty has a row that looks resolved."""
    draw = np.random.default_rng(0)
    plain = corrected = 0
    for _ in range(600):
        ps = [effect(list(draw.normal(0, 1, 4))).p for _ in range(6)]
        plain, corrected = plain + (min(ps) < 0.05), corrected + (min(holm(ps)) < 0.05)
    assert corrected / 600 < 0.075 < 0.2 < plain / 600, (plain, corrected)


# ----------------------------------------------------------------------------------------------------------
# Worth


def run(curve, rate=1000.0):
    return Run(curve[-1][0], True, curve, 1.0, rate, 0.0, 0.0)


def line(final, slope=0.01, last=100, every=20):
    """A curve that falls by `slope` a step and ends at `final`."""
    return [(step, final + slope * (last - step)) for step in range(0, last + 1, every)]


def test_since_when_a_curve_is_below_a_loss():
    curve = [(0, 5.0), (10, 4.0), (20, 3.0), (40, 2.0)]
    assert [below_since(curve, loss) for loss in (2.0, 2.5, 3.0, 3.25, 4.5)] == [40, 30, 20, 17.5, 5]
    assert below_since(curve, 1.9) == 40 and below_since(curve, 5.1) == -math.inf
    # for good: a dip in between does not count
    assert below_since([(0, 5.0), (10, 2.0), (20, 4.0), (30, 3.0)], 3.5) == 25


def test_on_straight_lines_a_worth_is_the_difference_over_the_slope():
    a, b = {1: run(line(2.0)), 2: run(line(2.2))}, {1: run(line(1.8)), 2: run(line(2.1))}
    steps, seconds = worths(a, b, 500)
    # 0.15 below at 0.01 a step; a step takes half a second in both
    e = effect([-0.2, -0.1])
    assert steps.mean == pytest.approx(15) and seconds.mean == pytest.approx(7.5)
    assert (steps.of, seconds.of) == (100, 50)
    # 12.7 times 0.0707 / sqrt(2) to either side
    assert e.half == pytest.approx(0.6353, rel=1e-4) and str(steps) == '+15 (-49 to +79)'
    wide, _ = worths(a, {1: run(line(1.5)), 2: run(line(2.1))}, 500)
    assert wide.low == -math.inf and wide.high == math.inf
    assert str(wide) == '+30 (less than -100 to more than +100)'


def test_an_interval_in_steps_is_that_of_the_loss():
    a = {seed: run(line(2.0)) for seed in range(3)}
    b = {seed: run(line(2.0 + d)) for seed, d in enumerate((-0.10, -0.12, -0.14))}
    steps, seconds = worths(a, b, 1000)
    e = effect([-0.10, -0.12, -0.14])
    assert [steps.low, steps.mean, steps.high] == pytest.approx(
        [-100 * (e.mean + e.half), 12, -100 * (e.mean - e.half)])
    # a second a step, in every run alike
    assert [*seconds] == pytest.approx([*steps])
    assert str(steps) == '+12 (+7 to +17)'


def test_two_arms_that_change_places_change_the_sign():
    draw = random.Random(0)
    for _ in range(50):
        arms = [{seed: run([(step, 2 + draw.random() + (100 - step) / 50) for step in range(0, 101, 10)],
                           draw.uniform(900, 1100)) for seed in range(3)} for _ in range(2)]
        there, back = worths(*arms, 100), worths(*reversed(arms), 100)
        for one, other in zip(there, back):
            assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))


def test_the_interval_in_steps_excludes_zero_where_that_of_the_loss_does():
    draw, resolved = random.Random(1), 0
    for _ in range(200):
        a = {seed: run(line(2 + draw.gauss(0, 0.1), 0.02)) for seed in range(3)}
        b = {seed: run(line(a[seed].loss + draw.gauss(0.1, 0.1), 0.03)) for seed in range(3)}
        e = effect([b[seed].loss - a[seed].loss for seed in a])
        steps, _ = worths(a, b, 1000)
        assert steps.low <= steps.mean <= steps.high
        assert e.resolved == (steps.low > 0 or steps.high < 0)
        resolved += e.resolved
    assert 20 < resolved < 180


def test_an_arm_that_is_better_and_slower_may_lose_seconds():
    a = {seed: run(line(2.0), 1000) for seed in range(3)}
    b = {seed: run(line(1.9 + 0.001 * seed), 800) for seed in range(3)}
    steps, seconds = worths(a, b, 1000)
    # 90.1 steps of 1.25 s against 100 of 1 s
    assert steps.mean == pytest.approx(9.9) and seconds.mean == pytest.approx(100 - 90.1 * 1.25)
    # without any difference in loss, the whole run of the slower arm is longer
    same = {seed: run(line(2.0), 800) for seed in range(3)}
    steps, seconds = worths(a, same, 1000)
    assert steps == (0, 0, 0, 100) and [*seconds] == pytest.approx([-25, -25, -25, 100])


def test_the_interval_in_seconds_holds_the_scatter_of_speed():
    a = {seed: run(line(2.0), 1000) for seed in range(3)}
    paces = [0.9, 1.0, 1.1]
    b = {seed: run(line(2.0), 1000 / pace) for seed, pace in enumerate(paces)}
    _, seconds = worths(a, b, 1000)
    half = effect([100 - 100 * pace for pace in paces]).half
    assert [*seconds][:3] == pytest.approx([0, -half, half], abs=1e-9)


def test_arms_with_other_seeds_are_compared_on_those_that_both_have():
    a = {seed: run(line(2.0 + seed)) for seed in (1, 2, 3, 4)}
    b = {seed: run(line(1.9 + seed)) for seed in (2, 3, 7)}
    steps, _ = worths(a, b, 1000)
    assert (steps.mean, steps.low) == (pytest.approx(10), pytest.approx(10))
    one, _ = worths(a, {4: run(line(5.9))}, 1000)
    assert one.mean == pytest.approx(10) and math.isnan(one.low) and str(one) == '+10'
    assert worths(a, {9: run(line(1.0))}, 1000) is None
    assert worths(a, {1: run([(0, 3.0), (100, math.nan)])}, 1000) is None


def test_an_arm_that_was_ahead_from_the_first_evaluation_on_is_worth_more_than_the_run():
    a, b = ({seed: run(line(final)) for seed in range(2)} for final in (9.0, 2.0))
    steps, seconds = worths(a, b, 2000)
    assert str(steps) == 'more than +100'
    assert str(seconds) == 'more than +200'


def test_worth_is_written_with_its_sign():
    assert str(Worth(-31.4, -50.2, 0.3, 480)) == '-31 (-50 to +0)'
    assert str(Worth(1.26, math.nan, math.nan, 44.0)) == '+1.3'
    assert str(Worth(math.nan, math.nan, math.nan, 44.0)) == '-'
