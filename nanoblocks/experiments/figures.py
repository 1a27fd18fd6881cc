"""
Figures: what all of them share, and the three of a sweep's report. matplotlib is imported only to draw.
"""
import csv
import importlib.util
import math
import os
from statistics import fmean

from nanoblocks.experiments.statistics import Effect, effect

BLUE, RED, GREY = '#0072B2', '#D55E00', '#8c8c8c'
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#7f3c8d', '#5b5b5b', '#8c510a',
          '#9acd32']
LOSS = 'validation loss (nats per token)'


def panels(width, height, rows=1, columns=1, **options):
    """A figure of this size in inches, and a list of its axes."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    fig, axes = pyplot.subplots(rows, columns, figsize=(width, height), dpi=130, squeeze=False,
                                layout='constrained', **options)
    for ax in axes.flat:
        ax.spines[['top', 'right']].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return fig, list(axes.flat)


def title(ax, text):
    ax.set_title(text, fontsize=10, loc='left')


def log2_axis(ax, ticks, labels=None):
    """An x axis of powers of two, with these ticks and no others."""
    ax.set_xscale('log', base=2)
    ax.set_xticks(ticks, labels or ticks)


def log_axis(ax, text='{:g}'.format):
    """A logarithmic y axis that names 1, 2 and 5 of every decade, and so has names within a decade too."""
    ax.set_yscale('log')
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter(lambda value, _: text(value) if f'{value:e}'[0] in '125' else '')


def even_ticks(ax, most=5):
    """An x axis with evenly spaced ticks, each with as many digits as tell it from the next: 3.30T, 3.35T."""
    from matplotlib.ticker import MaxNLocator
    ax.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(lambda value, _: tick_text(value, ax.get_xticks()))


def tick_text(value, ticks):
    """A tick in the unit of the largest, with the decimals that all of them need."""
    largest = max(map(abs, ticks), default=0)
    unit, size = next(((unit, size) for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3))
                       if largest >= size), ('', 1.0))
    decimals = next(n for n in range(7) if n == 6 or all(
        abs(round(tick / size, n) - tick / size) < 1e-9 * max(1, largest / size) for tick in ticks))
    return f'{value / size:.{decimals}f}{unit}' if value else '0'


def save(fig, path):
    from matplotlib import pyplot
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    fig.savefig(path)
    pyplot.close(fig)


def save_and_say(fig, folder, name):
    """Save a figure of a topic of bench.py as folder/name.png."""
    path = os.path.join(folder, f'{name}.png')
    save(fig, path)
    print(f'drawn in {path}')


# ----------------------------------------------------------------------------------------------------------
# The differences of a sweep


def plot_differences(comparisons, path):
    """comparisons [(pair, Effect)]: a row for each, its mean and interval, grey where that contains zero."""
    shown = [(pair, e) for pair, e in comparisons if e.n > 0 and not math.isnan(e.mean)]
    rows, heading = layout(shown)
    fig, (ax,) = panels(8.8, 1.5 + 0.33 * -rows[-1][0])
    for y, _, e in rows:
        if e is None:
            continue
        color = GREY if not e.resolved else BLUE if e.mean < 0 else RED
        ax.errorbar(e.mean, y, xerr=None if e.n < 2 else e.half, fmt='o', color=color, capsize=3,
                    markersize=5, linewidth=1.6)
        ax.annotate(f'{e.mean:+.3f}', (1.01, y), xycoords=('axes fraction', 'data'), va='center', fontsize=9,
                    color=color)
    ax.axvline(0, color='black', linewidth=0.8)
    ax.set_yticks([y for y, _, _ in rows], [text for _, text, _ in rows])
    ax.set_ylim(rows[-1][0] - 0.7, rows[0][0] + 0.7)
    ax.grid(visible=False, axis='y')
    ax.set_xlabel('difference in validation loss (nats per token)\nbetter  \u2190      \u2192  worse')
    seeds = max(e.n for _, e in shown)
    most = 'up to ' * (min(e.n for _, e in shown) < seeds)
    fig.suptitle(f'{heading}; bars: 95 % intervals over {most}{seeds} seed{"s" * (seeds > 1)}; grey: not '
                 'resolved', fontsize=10, x=0.01, ha='left')
    save(fig, path)


def layout(shown):
    """([(height, label, Effect or None for a row without one)] from top to bottom, heading)"""
    hows = {pair['how'] for pair, _ in shown} - {'all'}
    if hows == {'ladder'}:
        return ladder_layout(shown), 'Each row is compared with the row above it'
    rows, y, previous = [], 0.0, None
    for pair, e in shown:
        # the rows of one flag are close together
        y -= 0.0 if previous is None else 1.0 if pair['flag'] == previous else 1.5
        previous = pair['flag']
        rows.append((y, label(pair), e))
    if hows == {'varied'}:
        return rows, f'Each row is compared with {shown[0][0]["without"]}'
    return rows, 'Loss with each change minus loss without it'


def ladder_layout(shown):
    """The start, a row for each rung, and apart from them the end against the start."""
    rungs = [(pair, e) for pair, e in shown if pair['how'] == 'ladder']
    rows = [(0.0, f'the start: {rungs[0][0]["without"]}', None)]
    rows += [(-1.0 * i, f'+ {change(pair)}', e) for i, (pair, e) in enumerate(rungs, start=1)]
    for pair, e in shown:
        if pair['how'] == 'all':
            rows.append((rows[-1][0] - 1.6, f'all together, compared with {pair["without"]}', e))
    return rows


def label(pair):
    """A row that says what it is compared with, or where the flag was tried."""
    return {'all': 'all of them: {without} \u2192 {with}', 'varied': '{flag}', 'alone': '{is_}, alone',
            'removed': '{is_}, beside all the others', 'ladder': '{is_}, on the ladder'}[pair['how']].format(
                **pair, is_=change(pair))


def change(pair):
    """pos: learned -> rope; only the flags where several change together."""
    if ', ' in pair['change']:
        return pair['flag']
    return pair['change'].replace(' ', ': ', 1).replace('->', '\u2192')


# ----------------------------------------------------------------------------------------------------------
# Curves and costs of a sweep


def arm_labels(names, pairs, ladder):
    """{arm: label}: an arm on the ladder is called by what it adds to the one before."""
    labels = {name: name for name in names}
    for before, name in zip(ladder, ladder[1:]):
        if name not in labels:
            continue
        flag = next(pair['flag'] for pair in pairs if (pair['without'], pair['with']) == (before, name))
        labels[name] = f'+ {flag}' + f' = {name}' * (name == ladder[-1])
    return labels


def said_of_ladder(labels):
    """What + means in the list of arms."""
    return '; each + adds to the arm above it' * any(text.startswith('+ ') for text in labels.values())


def plot_curves(curves, reference, labels, path, left_out=0):
    """
    curves {arm: {seed: [(step, loss)]}} -> left the losses, right their paired differences to the reference,
    where the noise that the seeds share has cancelled. left_out: arms that are not drawn.
    """
    every = [curve for runs in curves.values() for curve in runs.values()]
    steps = sorted(set.intersection(*({step for step, _ in curve} for curve in every)))
    fig, (left, right) = panels(11, 4.6, columns=2)
    base = {seed: dict(curve) for seed, curve in curves[reference].items()}
    # the reference is drawn last and dashed, so that no arm like it hides it
    for name, color in sorted(zip(labels, COLORS), key=lambda pair: pair[0] == reference):
        runs = {seed: dict(curve) for seed, curve in curves[name].items()}
        losses = [[run[step] for run in runs.values()] for step in steps]
        left.plot(steps, [fmean(column) for column in losses], color=color, label=labels[name],
                  linestyle='--' if name == reference else '-')
        left.fill_between(steps, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.2,
                          linewidth=0)
        shared = sorted(runs.keys() & base.keys())
        if name != reference and shared:
            found = [effect([runs[seed][step] - base[seed][step] for seed in shared]) for step in steps]
            right.plot(steps, [e.mean for e in found], color=color)
            right.fill_between(steps, [e.mean - e.half for e in found], [e.mean + e.half for e in found],
                               color=color, alpha=0.15, linewidth=0)
    zoom(left, every)
    more = f'; {left_out} more in the table' if left_out else ''
    title(left, 'bands: lowest to highest seed' + more + said_of_ladder(labels))
    title(right, 'bands: 95 % intervals of the mean')
    right.axhline(0, color='black', linewidth=0.8)
    left.set_ylabel(LOSS, fontsize=9)
    right.set_ylabel(f'difference to {reference}, same seed (nats per token)', fontsize=9)
    shown = dict(zip(*reversed(left.get_legend_handles_labels())))
    left.legend([shown[text] for text in labels.values()], list(labels.values()), fontsize=8, frameon=False)
    for ax in (left, right):
        ax.set_xlabel('training step', fontsize=9)
    save(fig, path)


def zoom(ax, curves):
    """Leave out the steep beginning, in which all curves look the same."""
    last = [curve[-1][1] for curve in curves]
    early = max(curve[len(curve) // 4][1] for curve in curves)
    spread = early - min(last)
    if spread > 0 and math.isfinite(spread):
        ax.set_ylim(min(last) - 0.05 * spread, early + 0.1 * spread)


COSTS = {'seconds': 'training time (s)', 'parameters': 'parameters', 'flops': 'training compute (FLOPs)',
         'cache_bytes_per_token': 'cache (bytes per token)'}


def plot_cost(rows, labels, path):
    """rows {arm: {column: number}} -> whether there was a cost in which the arms differ, and so a figure."""
    columns = [name for name in COSTS if max(row[name] for row in rows.values())
               > 1.05 * min(row[name] for row in rows.values())]
    if not columns:
        return False
    fig, axes = panels(3.3 * len(columns) + 2.4, 4.2, columns=len(columns), sharey=True)
    for ax, column in zip(axes, columns):
        for i, (name, row) in enumerate(rows.items()):
            # hollow markers of several shapes, so that equal arms do not hide each other
            ax.errorbar(row[column], row['loss'], yerr=None if math.isnan(row['sd']) else row['sd'],
                        fmt='os^Dv<>P'[i % 8], color=COLORS[i % len(COLORS)], markerfacecolor='none',
                        markersize=5 + 1.5 * (i % 3), markeredgewidth=1.4, capsize=2 + i % 3, elinewidth=0.8,
                        label=labels[name])
        ax.set_xlabel(COSTS[column], fontsize=9)
        ax.set_ylabel(LOSS, fontsize=9)
        ax.tick_params(labelleft=True)
        even_ticks(ax, 4)
    fig.suptitle('lower left is better; bars: standard deviation over seeds' + said_of_ladder(labels),
                 fontsize=10, x=0.01, ha='left')
    axes[-1].legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))
    save(fig, path)
    return True


# ----------------------------------------------------------------------------------------------------------


def have_matplotlib():
    return importlib.util.find_spec('matplotlib') is not None


def draw_tables(comparisons, rows, ladder, folder):
    """Draw differences.png and cost.png, for which a report's tables suffice -> the names of those drawn"""
    drawn = []
    if any(e.n and not math.isnan(e.mean) for _, e in comparisons):
        plot_differences(comparisons, os.path.join(folder, 'differences.png'))
        drawn.append('differences')
    labels = arm_labels(rows, [pair for pair, _ in comparisons], ladder)
    if plot_cost(rows, labels, os.path.join(folder, 'cost.png')):
        drawn.append('cost')
    return drawn


def redraw(folder):
    """Draw differences.png and cost.png again from the CSV files of a report; curves.png needs the runs."""
    def read(name):
        with open(os.path.join(folder, name), newline='') as f:
            return list(csv.DictReader(f))
    rows = {row['arm']: {key: float(value) for key, value in row.items() if key != 'arm'}
            for row in read('report.csv')}
    comparisons = [(pair, Effect(int(pair['n']), *(float(pair[key]) for key in ('mean', 'sd', 'half'))))
                   for pair in read('differences.csv')]
    rungs = [pair for pair, _ in comparisons if pair['how'] == 'ladder']
    ladder = [rungs[0]['without'], *(pair['with'] for pair in rungs)] if rungs else []
    return draw_tables(comparisons, rows, ladder, folder)
