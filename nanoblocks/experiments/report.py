"""
The report of a sweep: statistics, tables, verdicts and figures, from the files that it left.

Everything is paired: an effect is the mean, over seeds, of the difference between two runs that share the
seed, and so the weights that both have, the batches and the evaluation windows.
"""
import csv
import functools
import importlib.util
import json
import math
import os
import statistics
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks.formats import format_quantity

# ----------------------------------------------------------------------------------------------------------
# Statistics


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
    """The t below which Student's t with df degrees of freedom stays with probability p, above 0.5."""
    low, high = 0.0, 1.0
    while t_within(high, df) < 2 * p - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < 2 * p - 1 else (low, middle)
    return high


class Effect(NamedTuple):
    """A mean of paired differences, and how sure it is."""
    n: int              # pairs
    mean: float         # nan without pairs
    sd: float           # of the differences; nan below two
    half: float         # half of the 95 % interval; nan below two

    @property
    def resolved(self):
        return self.n > 1 and abs(self.mean) > self.half


def deviation(values):
    """The standard deviation of a sample; nan below two values, and where one is no number."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def effect(differences):
    """The paired t-interval: mean +- t(0.975, n - 1) sd / sqrt(n)."""
    n = len(differences)
    mean = statistics.fmean(differences) if n else math.nan
    sd = deviation(differences)
    return Effect(n, mean, sd, t_quantile(0.975, n - 1) * sd / math.sqrt(n) if n > 1 else math.nan)


def seeds_needed(mean, sd, most=1000):
    """
    How many pairs it takes to resolve a true difference of `mean` four times out of five, when single
    differences scatter by sd; None beyond `most`.
    """
    def enough(n):
        return (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * sd / math.sqrt(n) <= abs(mean)
    return bisect_left(range(most + 1), True, lo=2, key=enough) if enough(most) else None


# ----------------------------------------------------------------------------------------------------------
# Reading


def read_lines(path):
    """The lines of a metrics.jsonl; one that a kill cut short ends it."""
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_plan(folder):
    """What ablate.py was to do there. FileNotFoundError, one sentence, where nothing was."""
    path = Path(folder) / 'sweep.json'
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist: train a sweep into that folder, or name '
                                'another')
    return json.loads(path.read_text())


class Run(NamedTuple):
    """What one run of train.py left behind."""
    steps: int          # evaluated so far
    finished: bool
    curve: list         # (step, validation loss)
    bpb: float          # at the last evaluation
    rate: float         # median of its tokens per second
    memory: float       # most that the process held, or that it held on the GPU, in bytes
    seconds: float      # of all of it, evaluations too


def read_run(folder, max_iters):
    """The run in a folder; None when it has not begun."""
    if not (folder / 'metrics.jsonl').exists():
        return None
    lines = read_lines(folder / 'metrics.jsonl')
    evaluations = [line for line in lines if line.get('val_loss') is not None]
    rates = [line['tokens_per_s'] for line in lines if line.get('tokens_per_s')]
    memory = [1e9 * line['memory_gb'] for line in lines if line.get('memory_gb')]
    steps = evaluations[-1]['step'] if evaluations else 0
    return Run(steps, steps == max_iters, [(line['step'], line['val_loss']) for line in evaluations],
               evaluations[-1]['val_bpb'] if evaluations else math.nan,
               statistics.median(rates) if rates else math.nan, max(memory, default=math.nan),
               lines[-1]['seconds'] if lines else 0.0)


class Arm(NamedTuple):
    """One arm at its best learning rate."""
    rate: float         # the best factor on the learning rates
    by_rate: dict       # {factor: mean loss over the seeds that all factors have}
    runs: dict          # {seed: Run} that are finished
    config: GPTConfig | None
    words: dict

    def model(self):
        """The model without its numbers."""
        with torch.device('meta'):
            return GPT(self.config, seed=None)


def finite(loss):
    """A loss that can be sorted: a run that diverged comes last."""
    return math.inf if math.isnan(loss) else loss


def read_arm(plan, runs, folder, name):
    found = {(run['rate'], run['seed']): read_run(Path(folder) / run['path'], run['words']['max_iters'])
             for run in runs if run['arm'] == name}
    done = {key: run for key, run in found.items() if run and run.finished}
    shared = [seed for seed in plan['seeds'] if all((rate, seed) in done for rate in plan['rates'])]
    by_rate = {rate: statistics.fmean(done[rate, seed].curve[-1][1] for seed in shared)
               for rate in plan['rates'] if shared}
    best = min(by_rate, key=lambda rate: finite(by_rate[rate])) if by_rate else plan['rates'][0]
    config = None
    for run in runs:
        path = Path(folder) / run['path'] / 'config.json'
        if run['arm'] == name and path.exists():
            config = GPTConfig(**json.loads(path.read_text())['model'])
            break
    return Arm(best, by_rate, {seed: run for (rate, seed), run in done.items() if rate == best}, config,
               plan['arms'][name])


# ----------------------------------------------------------------------------------------------------------
# What follows from the runs


def final(run):
    return run.curve[-1][1]


def paired(arms, pair):
    """The differences, with less without, of the seeds that both arms have finished."""
    first, second = arms[pair['without']].runs, arms[pair['with']].runs
    return [final(second[seed]) - final(first[seed]) for seed in sorted(first.keys() & second.keys())]


def loss_at(curve, step):
    """The loss of a curve at a step, on the line between its evaluations; nan before the first."""
    if step >= curve[-1][0]:
        return curve[-1][1]
    for (before, loss), (after, next_loss) in zip(curve, curve[1:]):
        if before <= step <= after:
            return loss + (next_loss - loss) * (step - before) / (after - before)
    return math.nan


def mean_of(values):
    values = [value for value in values if not math.isnan(value)]
    return statistics.fmean(values) if values else math.nan


def measures(arms, measured):
    """{arm: {column: number}} of every arm that has a finished run, in their order."""
    rows = {}
    for name, arm in arms.items():
        if not arm.runs:
            continue
        model, T = arm.model(), arm.config.block_size
        steps, runs = arm.words['max_iters'], list(arm.runs.values())
        speed = statistics.median(run.rate for run in runs)
        losses = [final(run) for run in runs]
        tokens = steps * arm.words['batch_size'] * arm.words['gradient_accumulation_steps'] * T
        more = measured.get(name, {})
        rows[name] = {
            'seeds': len(runs), 'loss': statistics.fmean(losses),
            'sd': deviation(losses), 'bpb': statistics.fmean(run.bpb for run in runs),
            'steps': steps, 'tokens': tokens,
            'flops_per_token': model.flops_per_token(T), 'flops': tokens * model.flops_per_token(T),
            'tokens_per_s': speed, 'seconds': tokens / speed,
            'parameters': model.num_params(), 'active': model.num_params(active=True),
            'cache_bytes_per_token': kv_cache_bytes(arm.config, T, 1, 2) / T,
            'decode_tokens_per_s': more.get('decode') or math.nan,
            'peak_memory': max(run.memory for run in runs),
        }
    for kind in ('flops', 'seconds'):
        budget = min((row[kind] for row in rows.values()), default=math.nan)
        for name, row in rows.items():
            step = row['steps'] * budget / row[kind]
            row[f'{kind}_budget'] = budget
            row[f'loss_at_{kind}'] = mean_of(loss_at(run.curve, step) for run in arms[name].runs.values())
    return rows


# ----------------------------------------------------------------------------------------------------------
# Words

PLACES = {'all': 'from {without} to {with}', 'alone': 'alone on the base', 'varied': '',
          'removed': 'beside all the others', 'ladder': 'in its place of the ladder'}


def verdict(e):
    """What an effect shows, in words."""
    if e.n == 0:
        return 'no finished pair of runs'
    if e.n == 1:
        return f'one seed only ({e.mean:+.4f}): no interval'
    if math.isnan(e.mean):
        return 'a run diverged'
    if e.resolved:
        word = 'lowers' if e.mean < 0 else 'raises'
        return f'{word} the loss by {abs(e.mean):.4f} (95 % interval {interval(e)})'
    if e.sd == 0:
        return 'no difference at all'
    needed = seeds_needed(e.mean, e.sd)
    return (f'not resolved ({e.mean:+.4f}, 95 % interval {interval(e)}; '
            + (f'about {needed}' if needed else 'more than 1000') + ' seeds would be needed)')


def interval(e):
    return f'{e.mean - e.half:+.4f} to {e.mean + e.half:+.4f}'


def cost_words(rows, pair):
    """What the flag costs: the columns that change by more than 2 %, in words."""
    if pair['without'] not in rows or pair['with'] not in rows:
        return ''
    before, after = rows[pair['without']], rows[pair['with']]
    names = {'parameters': 'parameters', 'active': 'active parameters', 'flops': 'FLOPs',
             'tokens_per_s': 'training speed', 'decode_tokens_per_s': 'decoding speed',
             'cache_bytes_per_token': 'cache'}
    ratios = {text: after[name] / before[name] if before[name] else math.nan for name, text in names.items()}
    if ratios['active parameters'] == ratios['parameters']:
        del ratios['active parameters']
    changed = [f'{text} x {ratio:.2f}' for text, ratio in ratios.items() if abs(ratio - 1) > 0.02]
    return f'Costs: {", ".join(changed)}.' if changed else 'Costs the same within 2 %.'


def in_a_word(effects):
    """What all effects of one flag come to."""
    signs = {e.mean < 0 for e in effects if e.resolved}
    if not signs:
        return 'not resolved' if any(e.n > 1 for e in effects) else 'not tried on two seeds'
    return {(True,): 'helps', (False,): 'hurts'}.get(tuple(signs), 'depends on the others')


def verdicts(plan, effects, rows):
    """A paragraph per flag: what it does wherever it was tried, and what it costs."""
    flags = {}
    for pair, e in effects:
        flags.setdefault(pair['flag'], []).append((pair, e))
    lines = []
    for flag, found in flags.items():
        pair, several = found[0][0], len(found) > 1
        change = '' if pair['how'] == 'all' else f' ({pair["change"]})'
        word = f' **{in_a_word([e for _, e in found])}**;' if several else ''
        said = '; '.join(f'{PLACES[p["how"]].format(**p)} {verdict(e)}'.strip() for p, e in found)
        lines.append(f'- **{flag}**{change}:{word} {said}. {cost_words(rows, pair)}')
    return lines


def number(value, digits=4):
    return '-' if math.isnan(value) else f'{value:,.{digits}f}'


def table(heads, rows):
    return ['| ' + ' | '.join(heads) + ' |', '|' + '---|' * len(heads),
            *('| ' + ' | '.join(row) + ' |' for row in rows)]


def arms_table(plan, rows):
    budgets = next(iter(rows.values()))
    heads = ['arm', 'loss', 'sd', 'bits per byte', f'loss at {format_quantity(budgets["flops_budget"])} FLOPs',
             f'loss at {budgets["seconds_budget"]:.3g} s', 'parameters', 'active', 'FLOPs per token',
             'training tokens/s', 'decoding tokens/s', 'cache bytes per token', 'peak memory']
    body = [[name, number(row['loss']), number(row['sd']), number(row['bpb']), number(row['loss_at_flops']),
             number(row['loss_at_seconds']), format_quantity(row['parameters']), format_quantity(row['active']),
             format_quantity(row['flops_per_token']), format_quantity(row['tokens_per_s']),
             number(row['decode_tokens_per_s'], 0), number(row['cache_bytes_per_token'], 0),
             f'{format_quantity(row["peak_memory"])}B'] for name, row in rows.items()]
    return table(heads, body)


def effects_table(effects):
    body = [[pair['flag'], PLACES[pair['how']].format(**pair) or pair['change'],
             '-' if math.isnan(e.mean) else f'{e.mean:+.4f}', interval(e) if e.n > 1 else '-', str(e.n),
             'resolved' if e.resolved else 'not resolved'] for pair, e in effects]
    return table(['flag', 'where', 'difference in loss', '95 % interval', 'seeds', ''], body)


def rates_table(plan, arms):
    """What each learning rate gave, and a warning where the best one is at the edge."""
    heads = ['arm', *(f'rates x {rate:g}' for rate in plan['rates']), 'best']
    body, edge = [], []
    for name, arm in arms.items():
        if arm.by_rate:
            body.append([name, *(number(arm.by_rate[rate]) for rate in plan['rates']), f'x {arm.rate:g}'])
            if arm.rate in (plan['rates'][0], plan['rates'][-1]):
                edge.append(name)
    lines = ['', '## Learning rates', '', 'Mean loss over seeds; arms are compared at the best of each.', '',
             *table(heads, body)]
    if edge:
        lines += ['', f'At the edge of what was tried, so a wider sweep may favour them: {", ".join(edge)}.']
    return lines


def unfinished(plan, runs, folder):
    lines = []
    for run in runs:
        steps = run['words']['max_iters']
        found = read_run(Path(folder) / run['path'], steps)
        if not (found and found.finished):
            lines.append(f'- {run["path"]}: ' + (f'step {found.steps} of {steps}' if found else 'not begun'))
    return lines


ABOUT_ARMS = """
All arms take the same steps on the same tokens: `loss` is the comparison at equal steps and at equal
tokens. At equal FLOPs and at equal seconds, the cheapest arm is at its end, and the others are read off
their curves before theirs, where their learning rate has not come down yet: those two columns favour the
cheapest. A sweep with `--match=flops` has no such bias. Seconds are tokens over the median of tokens/s,
without evaluations. The cache is in 16 bit, for one sequence of the whole context. Peak memory is that of
the training process, libraries included, or on a GPU that of its tensors.
""".strip()


def about(plan, arms, config):
    """What was trained, on what, and how to do it again."""
    words = plan['arms'][plan['reference']]
    tokens = words['batch_size'] * words['gradient_accumulation_steps'] * config.block_size
    at_once = f'{plan["jobs"]} run{"s" * (plan["jobs"] > 1)} at once'
    seeds = ', '.join(map(str, plan['seeds']))
    minutes = sum(run.seconds for arm in arms.values() for run in arm.runs.values()) / 60
    return [f'{len(plan["arms"])} arms, seeds {seeds}; {words["max_iters"]:,} steps of {tokens:,} tokens of '
            f'{words["dataset"]}; {config.n_layer} layers, {config.n_embd} wide, context '
            f'{config.block_size}; {words["optimizer"]}, learning rate {words["learning_rate"]:g}. '
            f'Machine: {plan["machine"]}; {at_once}, whose times add up to {minutes:.0f} minutes. Made by',
            '', '```', plan['command'], '```']


def picture(name, title, figures):
    return ['', f'![{title}]({name}.png)'] if name in figures else []


def markdown(plan, arms, effects, rows, missing, figures):
    lines = [f'# Ablation: {plan["name"]}', '']
    if rows:
        lines += about(plan, arms, arms[next(iter(rows))].config)
    if missing:
        lines += ['', f'**{len(missing)} runs are not finished and do not count:**', '', *missing]
    if not rows:
        return '\n'.join([*lines, '', 'No run is finished yet.', ''])
    lines += ['', '## Verdicts', '',
              'Differences are in validation loss, in nats per token; negative is better.', '',
              *verdicts(plan, effects, rows), *picture('differences', 'paired differences', figures),
              '', '## Paired differences', '', *effects_table(effects)]
    by_chance = round(0.05 * len(effects))
    if by_chance:
        lines += ['', f'At 95 % each, about {by_chance} of {len(effects)} comparisons would look resolved by '
                  'chance. Intervals over few seeds are wide because they should be.']
    words = plan['arms'][plan['reference']]
    if words['eval_tokens']:
        lines += ['', f'All runs are evaluated on the same {words["eval_tokens"]:,} tokens. The intervals '
                  'are over seeds and do not cover the choice of that text.']
    lines += ['', '## Arms', '', *arms_table(plan, rows), '', ABOUT_ARMS,
              *picture('cost', 'loss against cost', figures), *picture('curves', 'loss curves', figures)]
    if plan['notes']:
        lines += ['', f'## Budgets: `--match={plan["match"]}`', '',
                  *(f'- {arm}: {note}' for arm, note in plan['notes'].items())]
    if len(plan['rates']) > 1:
        lines += rates_table(plan, arms)
    return '\n'.join([*lines, ''])


def write_csv(path, rows, key):
    """rows {name: {column: value}}"""
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        heads = list(next(iter(rows.values()), {}))
        writer.writerow([key, *heads])
        writer.writerows([name, *row.values()] for name, row in rows.items())


# ----------------------------------------------------------------------------------------------------------
# Figures

BLUE, RED, GREY = '#0072B2', '#D55E00', '#8c8c8c'
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#7f3c8d', '#5b5b5b']


def figure(width, height, panels=1):
    """A figure and its axes, with little ink around the data."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, axes = pyplot.subplots(1, panels, figsize=(width, height), dpi=130, squeeze=False,
                                layout='constrained')
    for ax in axes[0]:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=9)
    return fig, axes[0]


def save(fig, path):
    from matplotlib import pyplot
    fig.savefig(path)
    pyplot.close(fig)


def label(pair, kinds):
    """A comparison in a figure that shows these kinds of them."""
    if pair['how'] == 'all':
        return f'all of them: {pair["without"]} to {pair["with"]}'
    if pair['how'] == 'varied':
        return pair['flag']
    # what it changes, where that is one flag
    name = pair['flag']
    if len(pair['names']) == 1:
        name = pair['change'].replace(f'{name} ', f'{name}: ', 1).replace('->', '\u2192')
    if kinds == {'ladder'}:
        return f'+ {name}'
    return name + {'alone': ', alone on the base', 'removed': ', beside the others',
                   'ladder': ', ladder'}[pair['how']]


def plot_differences(plan, effects, path):
    """A row per comparison: the mean and its interval; in colour where zero is outside."""
    shown = [(pair, e) for pair, e in effects if e.n > 0 and not math.isnan(e.mean)]
    fig, (ax,) = figure(8.6, 1.3 + 0.3 * len(shown) + 0.12 * len({pair['flag'] for pair, _ in shown}))
    y, previous, labels = 0.0, None, []
    kinds = {pair['how'] for pair, _ in shown} - {'all'}
    for pair, e in shown:
        y -= 1.0 if pair['flag'] == previous or previous is None else 1.5
        previous = pair['flag']
        color = GREY if not e.resolved else BLUE if e.mean < 0 else RED
        ax.errorbar(e.mean, y, xerr=None if e.n < 2 else e.half, fmt='o', color=color, capsize=3,
                    markersize=5, linewidth=1.6)
        labels.append((y, label(pair, kinds)))
        ax.annotate(f'{e.mean:+.3f}', (1.01, y), xycoords=('axes fraction', 'data'), va='center', fontsize=9,
                    color=color)
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set_yticks([y for y, _ in labels], [text for _, text in labels])
    ax.set_ylim(y - 0.8, -0.2)
    ax.grid(axis='x', alpha=0.3)
    seeds = max((e.n for _, e in shown), default=0)
    reference = f', against {plan["reference"]}' if shown and shown[0][0]['how'] == 'varied' else ''
    ax.set_xlabel(f'difference in validation loss{reference} (nats per token)\n'
                  'better  \u2190      \u2192  worse')
    ax.set_title(f'Paired differences and 95 % intervals over {seeds} seed{"s" * (seeds > 1)}; grey: not '
                 'resolved', fontsize=10, loc='left')
    save(fig, path)


def shown_in_curves(plan, arms):
    """The ladder where there is one, else every arm: lines that a reader can tell apart."""
    return [name for name in plan['ladder'] or arms if arms[name].runs][:len(COLORS)]


def plot_curves(plan, arms, path):
    """Left the loss, right its paired difference to the reference, which is what a sweep can see."""
    names, reference = shown_in_curves(plan, arms), plan['reference']
    curves = [run.curve for name in {*names, reference} for run in arms[name].runs.values()]
    steps = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    fig, (left, right) = figure(11, 4.4, panels=2)
    for name, color in zip(names, COLORS):
        runs = arms[name].runs
        losses = [[dict(run.curve)[step] for run in runs.values()] for step in steps]
        left.plot(steps, [statistics.fmean(column) for column in losses], color=color, label=rung(plan, name))
        left.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.2,
                          linewidth=0)
        base = arms[reference].runs
        shared = sorted(runs.keys() & base.keys())
        if name != reference and shared:
            found = [effect([dict(runs[seed].curve)[step] - dict(base[seed].curve)[step] for seed in shared])
                     for step in steps]
            right.plot(steps, [e.mean for e in found], color=color)
            if len(shared) > 1:
                right.fill_between(steps, [e.mean - e.half for e in found], [e.mean + e.half for e in found],
                                   color=color, alpha=0.15, linewidth=0)
    zoom(left, curves)
    left.set_title('validation loss; bands: all seeds', fontsize=10, loc='left')
    right.set_title(f'paired difference to {reference}; bands: 95 % intervals', fontsize=10, loc='left')
    right.axhline(0, color='black', linewidth=0.8)
    left.legend(fontsize=8, frameon=False)
    for ax in (left, right):
        ax.set_xlabel('step', fontsize=9)
        ax.grid(alpha=0.3)
    save(fig, path)


def rung(plan, name):
    """How an arm is called in a figure: on the ladder by what it adds."""
    if name not in plan['ladder'][1:]:
        return name
    before = plan['ladder'][plan['ladder'].index(name) - 1]
    flag = next(pair['flag'] for pair in plan['comparisons']
                if (pair['without'], pair['with']) == (before, name))
    return f'+ {flag}' + f' = {name}' * (name == plan['ladder'][-1])


def zoom(ax, curves):
    """Leave out the steep beginning, in which all curves look the same."""
    last = [curve[-1][1] for curve in curves]
    early = max(curve[len(curve) // 4][1] for curve in curves)
    spread = early - min(last)
    if spread > 0 and math.isfinite(spread):
        ax.set_ylim(min(last) - 0.05 * spread, early + 0.1 * spread)


def plot_cost(plan, arms, rows, path):
    """Final loss against what it took: low and to the left is better."""
    axes_of = {'seconds': 'seconds of training', 'parameters': 'parameters', 'flops': 'FLOPs of training',
               'cache_bytes_per_token': 'cache bytes per token'}
    # a cost that all arms share would be a column of points
    columns = [name for name in axes_of if len({round(row[name], 6) for row in rows.values()}) > 1
               and max(row[name] for row in rows.values()) > 1.05 * min(row[name] for row in rows.values())]
    if not columns:
        return False
    fig, axes = figure(4.2 * len(columns) + 1.6, 4.6, panels=len(columns))
    marks = {name: (COLORS[i % len(COLORS)], 'os^Dv<>P'[i // len(COLORS) % 8]) for i, name in enumerate(rows)}
    for ax, column in zip(axes, columns):
        for name, row in rows.items():
            color, mark = marks[name]
            ax.errorbar(row[column], row['loss'], fmt=mark, color=color, markersize=6, capsize=2,
                        yerr=None if math.isnan(row['sd']) else row['sd'], label=rung(plan, name),
                        elinewidth=0.8)
        ax.set_xlabel(axes_of[column], fontsize=9)
        ax.xaxis.set_major_formatter(lambda value, _: format_quantity(value))
        ax.grid(alpha=0.3)
    axes[0].set_title('validation loss; bars: standard deviation over seeds', fontsize=10, loc='left')
    axes[-1].legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))
    save(fig, path)
    return True


def draw(plan, arms, effects, rows, out):
    """The names of the figures drawn, none without matplotlib."""
    if importlib.util.find_spec('matplotlib') is None or not rows:
        return []
    drawn = []
    if any(e.n and not math.isnan(e.mean) for _, e in effects):
        plot_differences(plan, effects, os.path.join(out, 'differences.png'))
        drawn.append('differences')
    if shown_in_curves(plan, arms):
        plot_curves(plan, arms, os.path.join(out, 'curves.png'))
        drawn.append('curves')
    if plot_cost(plan, arms, rows, os.path.join(out, 'cost.png')):
        drawn.append('cost')
    return drawn


# ----------------------------------------------------------------------------------------------------------


def write(plan, runs, folder, out):
    """
    Write report.md, report.csv (a row per arm), differences.csv and the figures of a sweep in `folder` into
    `out`; what to print.
    """
    os.makedirs(out, exist_ok=True)
    arms = {name: read_arm(plan, runs, folder, name) for name in plan['arms']}
    measured = Path(folder) / 'measured.json'
    rows = measures(arms, json.loads(measured.read_text()) if measured.exists() else {})
    effects = [(pair, effect(paired(arms, pair))) for pair in plan['comparisons']]
    missing, figures = unfinished(plan, runs, folder), draw(plan, arms, effects, rows, out)
    Path(out, 'report.md').write_text(markdown(plan, arms, effects, rows, missing, figures))
    write_csv(os.path.join(out, 'report.csv'), rows, 'arm')
    write_csv(os.path.join(out, 'differences.csv'), {
        f'{i}': {key: pair[key] for key in ('flag', 'how', 'without', 'with')} | e._asdict()
        for i, (pair, e) in enumerate(effects, start=1)}, 'number')
    said = [line.replace('**', '') for line in verdicts(plan, effects, rows)] if rows else []
    return '\n'.join([*said, *(line + ', NOT FINISHED' for line in missing),
                      f'the report is {os.path.join(out, "report.md")}'])
