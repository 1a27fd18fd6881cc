"""
What a difference is worth in steps and seconds, p values and Holm's correction against worked numbers, arms
with different numbers of seeds, and a sweep at several sizes as a user runs it.
"""
import csv
import json
import math
import random

import numpy as np
import pytest
import runs
from conftest import ROOT

import bench
from model import GPT, GPTConfig
from nanoblocks.experiments import report, scaling, sweep
from nanoblocks.experiments.arms import config_of
from nanoblocks.experiments.runs import Run, with_defaults
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


# ----------------------------------------------------------------------------------------------------------
# Reports


def comparison(how='varied', flag='ffn=relu2', differences=(-0.02, -0.03, -0.04), p=None):
    e = effect(list(differences))
    steps, seconds = Worth(31.0, 12.0, 50.0, 480), Worth(3.1, 1.2, 5.0, 48.0)
    pair = {'flag': flag, 'how': how, 'without': 'llama', 'with': flag, 'change': 'ffn swiglu -> relu2'}
    return report.Comparison(pair, e, e.p if p is None else p, steps, seconds)


def test_a_verdict_says_what_a_resolved_difference_is_worth():
    said, = report.verdicts([comparison()], {})
    assert 'lowers the loss by 0.0300' in said
    assert 'worth +31 (+12 to +50) of 480 steps and +3.1 (+1.2 to +5.0) of 48 s. ' in said
    assert 'Holm' not in said
    said, = report.verdicts([comparison(p=0.08)], {})
    assert 'of 48 s; not resolved after Holm (p = 0.08).' in said
    said, = report.verdicts([comparison(differences=(-0.01, -0.02, -0.03))], {})
    assert 'not resolved' in said and 'worth' not in said


def test_a_table_tells_what_is_resolved_alone_from_what_is_after_holm():
    rows = report.differences_table([comparison(), comparison(p=0.08), comparison(differences=(0.1, -0.1))])
    verdicts = [row.split(' | ')[-1].strip(' |') for row in rows[2:]]
    assert verdicts == ['resolved', 'resolved, not after Holm', 'not resolved']
    assert '| ffn=relu2 | llama | -0.0300 | -0.0548 to -0.0052 | +31 (+12 to +50) |' in rows[2]


def test_a_run_of_an_earlier_version_has_the_defaults_of_later_flags(tmp_path):
    model = vars(GPTConfig(n_layer=1, n_head=2, n_embd=32)).copy()
    (tmp_path / 'config.json').write_text(json.dumps(
        {'model': {name: value for name, value in model.items() if name != 'tied_blocks'}, 'settings': {}}))
    flags, settings = with_defaults(tmp_path)
    assert flags['tied_blocks'] == 1 and settings['max_iters'] == 600000
    (tmp_path / 'config.json').write_text(json.dumps({'model': model | {'norm': 'rms'}, 'settings': {}}))
    assert with_defaults(tmp_path)[0]['norm'] == 'rms'


# ----------------------------------------------------------------------------------------------------------
# Sizes


def sizes_with(*rows, parameters=(100, 200, 400)):
    """A Size for each of {seed: difference}."""
    key = 'ffn=relu2', 'varied'
    return [scaling.Size(n, {key: comparison(differences=row.values())}, {key: row}, {}, 1000, 1.0)
            for n, row in zip(parameters, rows)]


@pytest.mark.parametrize('rows, slopes, word', [
    ([{1: -0.1, 2: -0.2}, {1: -0.2, 2: -0.3}, {1: -0.3, 2: -0.4}], [-0.1, -0.1], 'grows'),
    ([{1: -0.3, 2: -0.4}, {1: -0.2, 2: -0.3}, {1: -0.1, 2: -0.2}], [0.1, 0.1], 'shrinks'),
    ([{1: 0.1, 2: 0.11}, {1: 0.2, 2: 0.21}, {1: 0.3, 2: 0.31}], [0.1, 0.1], 'grows'),
    ([{1: 0.1, 2: 0.0}, {1: 0.0, 2: -0.1}, {1: -0.1, 2: -0.2}], [-0.1, -0.1], 'turns towards better'),
    ([{1: -0.1, 2: -0.3}, {1: -0.2, 2: -0.2}, {1: -0.3, 2: -0.1}], [-0.1, 0.1], 'not resolved'),
    # what not every size has does not count
    ([{1: -0.1, 2: -0.1, 3: 9.0}, {1: -0.2, 2: -0.2}, {1: -0.3, 2: -0.3, 4: 9.0}], [-0.1, -0.1], 'grows'),
])
def test_a_trend_is_the_mean_of_the_slopes_of_the_seeds(rows, slopes, word):
    sizes = sizes_with(*rows)
    trend, = scaling.trends(sizes)
    e = effect(slopes)
    assert trend.slope[:2] == pytest.approx(e[:2]) and trend.slope.half == pytest.approx(e.half, abs=1e-9)
    if word in ('grows', 'shrinks') and not trend.mean.resolved:
        word = 'turns towards ' + ('better' if e.mean < 0 else 'worse')
    assert scaling.direction(trend) == word
    said = scaling.verdict(trend, sizes)
    assert 'with each doubling' in said and '2 seeds' in said


def test_a_slope_is_that_of_least_squares():
    draw = np.random.default_rng(0)
    for n in (2, 3, 7):
        x, y = draw.normal(size=(2, n))
        assert slope(list(x), list(y)) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_without_embeddings_are_the_parameters_of_the_blocks_and_the_last_norm():
    for flags in ({}, {'pos': 'rope', 'norm': 'rmsnorm', 'bias': False}, {'tie': False}):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=16, **flags))
        assert scaling.without_embeddings(model) == sum(
            p.numel() for module in (model.h, model.ln_f) for p in module.parameters())


def command(place, *more):
    toy = [flag for flag in runs.toy(place, max_iters=10) if not flag.startswith(('--out_dir=', '--n_embd='))]
    return ['config/llama_small.py', 'config/study.py', *toy, '--n_kv_head=1', '--vary=norm=layernorm',
            '--evals=2', f'--out_dir={place}', '--sizes=n_embd=32, wide: n_embd=48+n_layer=3', *more]


def test_a_command_with_sizes_is_one_sweep_for_each(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = scaling.commands_of(command('out/x'), 'n_embd=32, wide: n_embd=48+learning_rate=1e-3')
    plans = {name: sweep.make_plan(words) for name, words in found.items()}
    assert list(plans) == ['n_embd=32', 'wide']
    for plan, width, rate in zip(plans.values(), (32, 48), (None, 1e-3)):
        assert all(flags['n_embd'] == width for flags in plan['arms'].values())
        assert rate is None or plan['arms']['llama_small']['learning_rate'] == rate
    assert [plan['folder'] for plan in plans.values()] == ['out/x/n_embd=32', 'out/x/wide']


@pytest.mark.parametrize('text, sentence', [
    ('n_embd=64', 'sizes=n_embd=64 must be two sizes or more'),
    ('n_embd=64, n_embed=32', 'sizes=n_embed is no setting .* did you mean n_embd'),
    ('n_embd=64, 128', 'sizes=128 must be flag=value or name: flag=value.flag=value$'),
    ('n_embd=64, seed=3', 'must not set seed'),
    ('a: n_embd=64, a: n_embd=32, n_embd=96', 'a: n_embd=32 must have a name of its own'),
    ('n_embd=64, n_embd=65', 'must be divisible|must be a multiple|n_head'),
])
def test_sizes_that_cannot_be_compared_are_refused(text, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    argv = [word for word in command(tmp_path) if not word.startswith('--sizes')]
    with pytest.raises((ValueError, SystemExit), match=sentence) as refusal:
        scaling.main([*argv, f'--sizes={text}'])
    assert '\n' not in str(refusal.value) and not list(tmp_path.iterdir())


def test_the_ladder_is_the_same_at_all_sizes(monkeypatch):
    monkeypatch.chdir(ROOT)
    plans = []
    monkeypatch.setattr(scaling, 'main', lambda words: plans.extend(
        map(sweep.make_plan, scaling.commands_of(words, scaling.SIZES).values())))
    bench.TOPICS['scaling'](['--max_iters=6'], 'cpu')
    llamas = [plan['arms']['llama_small'] for plan in plans]
    assert [(llama['n_layer'], llama['n_embd']) for llama in llamas] == [(2, 64), (4, 128), (6, 192)]
    for plan in plans:
        assert plan['comparisons'] == plans[0]['comparisons'] and len(plan['comparisons']) == 6
        assert plan['seeds'] == [1337, 1338, 1339] and plan['arms']['llama_small']['max_iters'] == 6
        # a rate in proportion to 1 / width
        llama = plan['arms']['llama_small']
        assert llama['learning_rate'] * llama['n_embd'] == pytest.approx(0.512, rel=0.01)
        assert llama['dtype'] == 'float32'


@pytest.mark.parametrize('flag', ['n_layer=3', 'n_embd=64', 'learning_rate=1e-3'])
def test_what_the_sizes_set_is_not_given_beside_them(flag, monkeypatch):
    monkeypatch.setattr(scaling, 'main', lambda words: pytest.fail('trained'))
    with pytest.raises(ValueError, match=f'{flag} must be left out: bench.py scaling sets it itself'):
        scaling.scaling([f'--{flag}'], 'cpu')


def trained(plan, lock=None):
    """In the place of training: curves whose difference grows by 0.1 with each layer."""
    for run in sweep.runs_of(plan):
        folder = scaling.Path(plan['folder']) / run['path']
        if not (folder / 'metrics.jsonl').exists():
            folder.mkdir(parents=True)
            gap = 0.1 * run['flags']['n_layer'] * (run['arm'] != 'llama_small')
            lines = [{'step': step, 'seconds': 1.0, 'val_loss': 3.0 - 0.1 * step + run['seed'] % 10 + gap,
                      'val_bpb': 1.0, 'tokens_per_s': 100.0} for step in (0, 5, 10)]
            (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
            (folder / 'config.json').write_text(json.dumps(
                {'model': vars(config_of(run['flags'])), 'settings': run['flags']}))
    return []


def test_the_report_of_several_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, 'train_all', trained)
    words = command(tmp_path, '--seeds=3', '--n_embd=32', '--n_layer=1')
    words = [word for word in words if not word.startswith('--sizes')]
    words.append('--sizes=1: n_layer=1, 4: n_layer=4, 2: n_layer=2')
    scaling.main(words)
    text = (tmp_path / 'report.md').read_text()
    with open(tmp_path / 'scaling.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    # from the smallest to the largest, whatever the order in which they were given
    assert [float(row['mean']) for row in rows] == pytest.approx([0.1, 0.2, 0.4])
    assert int(rows[2]['parameters']) - int(rows[1]['parameters']) == 2 * (
        int(rows[1]['parameters']) - int(rows[0]['parameters']))
    doublings = np.log2([float(row['parameters']) for row in rows])
    e = np.polyfit(doublings, [0.1, 0.2, 0.4], 1)[0]
    assert f'the cost grows: {e:+.4f} with each doubling' in text and f'| {e:+.4f} |' in text
    # 0.1 nats a step: a step for 0.1
    assert ('| norm=layernorm | -1.0 (-1.0 to -1.0) | -2.0 (-2.0 to -2.0) | -4.0 (-4.0 to -4.0) |') in text
    assert (tmp_path / 'scaling.png').exists()
    # from the files alone, and with a run less
    capsys.readouterr()
    (tmp_path / '2' / 'norm=layernorm' / 'seed1338' / 'metrics.jsonl').unlink()
    scaling.main([f'--report={tmp_path}'])
    assert '2 seeds' in capsys.readouterr().out and '| 2 |' in (tmp_path / 'report.md').read_text()


def test_a_sweep_at_two_sizes_trains_and_goes_on(tmp_path):
    out = tmp_path / 'sizes'
    done = runs.python('ablate.py', *command(out, '--seeds=1'))
    assert done.code == 0, done
    assert '[2/2] size wide' in done.err and 'no interval over 1 seed' in done.out, done
    assert 'nan' not in (out / 'report.md').read_text()
    with open(out / 'scaling.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert int(rows[0]['parameters']) < int(rows[1]['parameters'])
    for row, size in zip(rows, ('n_embd=32', 'wide')):
        with open(out / size / 'differences.csv', newline='') as f:
            assert next(csv.DictReader(f))['mean'] == row['mean']
    again = runs.python('ablate.py', *command(out, '--seeds=1'))
    assert again.code == 0 and again.out.count('2 runs, 2 of them finished') == 2, again
