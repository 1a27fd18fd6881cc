"""
A comparison at several sizes: ablate.py --sizes, and the ladder of bench.py scaling. Each size is a sweep of
its own, in a folder of its own. The report has the differences at each size and the trend of each: its slope
over the logarithm of the parameters, for every seed by itself, and the interval of these slopes.
"""
import json
import math
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from nanoblocks.experiments import figures, report, sweep
from nanoblocks.experiments.arms import NOT_IDENTIFYING, files_and_flags, read_flags, variants
from nanoblocks.experiments.figures import BLUE, GREY, RED, panels, save
from nanoblocks.experiments.statistics import Effect, effect, holm, slope
from nanoblocks.experiments.studies import SIZE, SWEEPS, refuse_varied
from nanoblocks.experiments.topics import each
from nanoblocks.formats import counted, format_quantity

# of the ladder: heads of 16, 32 and 48 numbers, and rates in proportion to 1 / width
SIZES = ('2x64: n_layer=2+n_embd=64+learning_rate=8e-3, 4x128: n_layer=4+n_embd=128+learning_rate=4e-3, '
         '6x192: n_layer=6+n_embd=192+learning_rate=2.67e-3')


def scaling(argv, device):
    """Does a block matter more in a larger model? GPT-2 to Llama at three sizes: about 50 minutes."""
    files, flags = files_and_flags(argv, without=('device',))
    refuse_varied('scaling', [*files, *flags], ('n_layer', 'n_embd', 'learning_rate'))  # as SIZES
    # one number type, which train.py would choose by the width
    words = [*SIZE, *files, *SWEEPS['ladder'], f'--sizes={SIZES}', '--seeds=3', '--evals=6',
             '--eval_tokens=32768', '--dtype=float32', *sweep.runs_on(device),
             '--out_dir=out/ablate/scaling', '--results=results/scaling', *flags]
    print(f'python ablate.py {shlex.join(words)}', flush=True)
    main(words)


def main(argv):
    """A command line of ablate.py, with --sizes or without."""
    own = read_flags(argv)[1]
    if own['report'] and (Path(own['report']) / 'sizes.json').exists():
        print(write(own['report'], own['results']))
    elif own['sizes'] and not own['report']:
        train(argv, own['sizes'])
    else:
        sweep.main(argv)


def train(argv, text):
    """Train what is missing at each size, and write the report."""
    whole, commands = sweep.make_plan(argv), commands_of(argv, text)
    for words in commands.values():
        sweep.make_plan(words)  # whatever is refused at some size is refused before any is trained
    folder = Path(whole['folder'])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'sizes.json').write_text(json.dumps(
        {'name': whole['name'], 'command': whole['command'], 'results': whole['results'],
         'sizes': list(commands)}, indent=1))
    for name in each(commands, 'size {}'.format):
        sweep.sweep(commands[name])
    print(write(folder, whole['results']))


def commands_of(argv, text):
    """{size: the command line of its sweep}"""
    folder = sweep.make_plan(argv)['folder']
    files, flags = files_and_flags(argv, without=('sizes', 'out_dir', 'results'))
    sizes = {}
    for part in filter(None, (part.strip() for part in text.split(','))):
        for name, chosen in variants(part, 'sizes'):
            if refused := chosen.keys() & {'seed', *NOT_IDENTIFYING}:
                raise ValueError(f'sizes={part} must not set {min(refused)}: all sizes are trained on the '
                                 'same seeds, each in a folder of its own')
            if name in sizes:
                raise ValueError(f'sizes={part} must have a name of its own, and {name} is another size')
            # as written: --n_embd=64
            written = [f'--{piece}' for piece in part.rpartition(':')[2].strip().split('+')]
            sizes[name] = [*files, *flags, *written, f'--out_dir={os.path.join(folder, name)}']
    if len(sizes) < 2:
        raise ValueError(f'sizes={text} must be two sizes or more, such as n_layer=2+n_embd=64, '
                         'n_layer=4+n_embd=128')
    return sizes


# ----------------------------------------------------------------------------------------------------------
# Reading


class Size(NamedTuple):
    """The sweep at one size."""
    parameters: int     # of the reference, without embeddings and the head
    comparisons: dict   # {(flag, how): report.Comparison}
    differences: dict   # {(flag, how): {seed: difference in loss}}
    plan: dict
    tokens: int         # of each run
    minutes: float      # of all runs


class Trend(NamedTuple):
    """One comparison at all sizes."""
    found: list         # a report.Comparison for each size
    mean: Effect        # of the mean over sizes
    slope: Effect       # of the change of the difference with each doubling of the parameters
    p: float            # of the slope, after Holm's correction for all comparisons


def read_size(folder):
    plan = report.read_plan(folder)
    sweep.guard(plan, folder)
    arms = {name: report.read_arm(plan, sweep.runs_of(plan), folder, name) for name in plan['arms']}
    reference = arms[plan['reference']]
    if not reference.runs:
        raise ValueError(f'{folder} must have a finished run of {plan["reference"]}: give the command of the '
                         'sweep again')
    compared = {(c.pair['flag'], c.pair['how']): c for c in report.compared(plan, arms)}
    seconds = sum(run.seconds for arm in arms.values() for run in arm.runs.values())
    steps, tokens = reference.flags['max_iters'], report.step_tokens(reference.flags, reference.config)
    return Size(without_embeddings(reference.model()), compared,
                {key: report.paired_differences(arms, c.pair) for key, c in compared.items()}, plan,
                steps * tokens, seconds / 60)


def without_embeddings(model):
    """Parameters outside the tables of tokens and of positions and the head, a tied one counted once."""
    tables = {p for module in (model.wte, model.wpe, model.lm_head) for p in module.parameters()}
    return model.num_params() - sum(p.numel() for p in tables)


def trends(sizes):
    """[Size] in ascending order -> [Trend] of the comparisons that all of them have"""
    keys = [key for key in sizes[0].comparisons if all(key in size.comparisons for size in sizes)]
    doublings = [math.log2(size.parameters) for size in sizes]
    slopes, means = [], []
    for key in keys:
        by_size = [size.differences[key] for size in sizes]
        seeds = sorted(set.intersection(*map(set, by_size)))
        rows = [[differences[seed] for differences in by_size] for seed in seeds]
        slopes.append(effect([slope(doublings, row) for row in rows]))
        means.append(effect([sum(row) / len(row) for row in rows]))
    return [Trend([size.comparisons[key] for size in sizes], *rest) for key, *rest in
            zip(keys, means, slopes, holm([e.p for e in slopes]))]


# ----------------------------------------------------------------------------------------------------------
# Telling


def direction(trend):
    """What an advantage or a cost does as models grow, in a word or two."""
    if not trend.slope.resolved:
        return 'not resolved'
    among_all = ', not after Holm' * (not trend.p < 0.05)
    if not trend.mean.resolved:  # it may be on either side of zero
        return ('turns towards better' if trend.slope.mean < 0 else 'turns towards worse') + among_all
    return ('grows' if trend.slope.mean * trend.mean.mean > 0 else 'shrinks') + among_all


def verdict(trend, sizes):
    """A sentence: the trend of a comparison, with its interval, sizes and seeds."""
    first, last = trend.found[0].effect, trend.found[-1].effect
    pair, e = trend.found[0].pair, trend.slope
    ends = (f'{first.mean:+.4f} at {format_quantity(sizes[0].parameters)} parameters, {last.mean:+.4f} at '
            f'{format_quantity(sizes[-1].parameters)}')
    said = f'{"all of them" if pair["how"] == "all" else pair["flag"]}: {ends}; '
    if e.n < 2 or math.isnan(e.mean):
        return said + f'the trend has no interval over {counted(e.n, "seed")}'
    what = 'the advantage' if trend.mean.mean < 0 else 'the cost'
    word = direction(trend)
    if word == 'not resolved':
        what = 'a trend is'
    elif word.startswith('turns'):
        what = 'it'
    return said + (f'{what} {word}: {e.mean:+.4f} with each doubling (95 % interval {report.interval(e)}, '
                   f'{counted(e.n, "seed")}, p after Holm {report.p_text(trend.p)})')


def markdown(about, sizes, found, drawn):
    """The text of report.md."""
    flags = sizes[0].plan['arms'][sizes[0].plan['reference']]
    heads = ['change', 'compared with', *(f'at {format_quantity(size.parameters)}' for size in sizes),
             'with each doubling', '95 % interval', 'seeds', 'p after Holm', 'trend']
    rows = []
    for trend in found:
        pair, e = trend.found[0].pair, trend.slope
        cells = [f'{c.effect.mean:+.4f}' + f' ± {c.effect.half:.4f}' * (c.effect.n > 1) for c in trend.found]
        rows.append([report.named(pair), pair['without'], *cells, f'{e.mean:+.4f}',
                     report.interval(e) if e.n > 1 else '-', str(e.n), report.p_text(trend.p),
                     direction(trend)])
    worth = [[report.named(t.found[0].pair), *(str(c.steps or '-') for c in t.found)] for t in found]
    return '\n'.join([
        f'# Ablation at {len(sizes)} sizes: {about["name"]}', '',
        f'{", ".join(about["sizes"])}: {listed(size.parameters for size in sizes)} parameters without '
        f'embeddings, {listed({size.tokens: 0 for size in sizes})} tokens of {flags["dataset"]}. Machine: '
        f'{sizes[0].plan["machine"]}; {counted(sizes[0].plan["jobs"], "run")} at once, '
        f'{sum(size.minutes for size in sizes):.0f} minutes of runs in total. Command:', '', '```',
        about['command'], '```', '', '## Verdicts', '', *report.compared_with(sizes[0].plan), '',
        *(f'- {verdict(trend, sizes)}.' for trend in found), *report.picture('scaling', 'trends', drawn), '',
        '## Differences in loss', '', *report.table(heads, rows), '', ABOUT, '', '## Worth in steps', '',
        *report.table(['change', *(f'at {format_quantity(size.parameters)}' for size in sizes)], worth), ''])


def listed(numbers):
    return ', '.join(f'{number:,}' for number in numbers)


ABOUT = """
Each ± is a 95 % interval over seeds. *With each doubling* is the slope of the differences over the logarithm
of the parameters: one for each seed, then their mean and its interval. *Grows* and *shrinks* are said of the
advantage or the cost that a change has in the mean of all sizes, *not after Holm* of slopes that are resolved
by themselves alone. A few sizes show a direction, not a law; at equal tokens, a larger model is further from
trained.
""".strip()


def write(folder, results):
    """Write report.md, scaling.csv and scaling.png of the sweeps in `folder` -> the text to print"""
    about = json.loads((Path(folder) / 'sizes.json').read_text())
    out = results or about['results']
    sizes = sorted((read_size(Path(folder) / name) for name in about['sizes']), key=lambda s: s.parameters)
    if sizes[0].parameters == sizes[-1].parameters:
        raise ValueError(f'{folder} must hold models of several sizes, and all have {sizes[0].parameters:,} '
                         'parameters without embeddings: change n_layer or n_embd in --sizes')
    found = trends(sizes)
    os.makedirs(out, exist_ok=True)
    drawn = []
    if figures.have_matplotlib() and draw(found, sizes, os.path.join(out, 'scaling.png')):
        drawn.append('scaling')
    Path(out, 'report.md').write_text(markdown(about, sizes, found, drawn))
    report.write_csv(os.path.join(out, 'scaling.csv'), {
        f'{i}.{n}': {'parameters': size.parameters} | report.columns(c)
        | {'per_doubling': trend.slope.mean, 'per_doubling_half': trend.slope.half}
        for i, trend in enumerate(found, start=1)
        for n, (size, c) in enumerate(zip(sizes, trend.found), start=1)}, 'number')
    return '\n'.join([*(verdict(trend, sizes) for trend in found), f'the report is {Path(out, "report.md")}'])


# ----------------------------------------------------------------------------------------------------------
# The figure


def draw(found, sizes, path):
    """A panel for each comparison: its differences over the parameters, and their line -> whether drawn"""
    shown = [trend for trend in found if all(not math.isnan(c.effect.mean) for c in trend.found)]
    if not shown:
        return False
    columns, rows = min(3, len(shown)), -(-len(shown) // 3)
    # on one scale: what matters little must not look as if it did
    fig, axes = panels(3.5 * columns, 3.1 * rows + 0.3, rows, columns, sharey=True)
    for ax, trend in zip(axes, shown):
        panel(ax, trend, sizes)
    for ax in axes[len(shown):]:
        ax.remove()
    for ax in axes[::columns]:
        ax.set_ylabel('difference in loss (nats)', fontsize=9)
    for ax in axes[max(0, len(shown) - columns):len(shown)]:
        ax.set_xlabel('parameters without embeddings', fontsize=9)
    hows = {trend.found[0].pair['how'] for trend in shown}
    against = 'the step before it' if 'ladder' in hows else shown[0].found[0].pair['without']
    seeds = counted(max(trend.slope.n for trend in shown), 'seed')
    fig.suptitle(f'Each change against {against}, at {len(sizes)} sizes. Below zero is better; bars: 95 % '
                 f'intervals over {seeds}; grey: not resolved', fontsize=10, x=0.01, ha='left')
    save(fig, path)
    return True


def panel(ax, trend, sizes):
    """One comparison: dots with intervals, a line of its mean slope, and the trend in words."""
    x = [size.parameters for size in sizes]
    doublings = [math.log2(value) for value in x]
    middle = sum(doublings) / len(doublings)
    line = [trend.mean.mean + trend.slope.mean * (value - middle) for value in doublings]
    ax.plot(x, line, color='black' if trend.slope.resolved else GREY, linewidth=1,
            linestyle='-' if trend.slope.resolved else ':')
    for value, c in zip(x, trend.found):
        e = c.effect
        color = GREY if not e.resolved else BLUE if e.mean < 0 else RED
        ax.errorbar(value, e.mean, yerr=None if e.n < 2 else e.half, fmt='o', color=color, capsize=3,
                    markersize=5, linewidth=1.6)
    ax.axhline(0, color='black', linewidth=0.8)
    ax.set_xscale('log')
    ax.set_xticks(x, [format_quantity(value) for value in x])
    ax.set_xticks([], minor=True)
    ax.set_xlim(x[0] / 1.6, x[-1] * 1.6)
    pair, e = trend.found[0].pair, trend.slope
    name = f'all together, against {pair["without"]}' if pair['how'] == 'all' else figures.change(pair)
    said = f'{e.mean:+.3f}' + (f' ± {e.half:.3f}' if e.n > 1 else '') + ' with each doubling'
    ax.set_title(f'{said}\ntrend: {direction(trend)}', fontsize=9, loc='left', color='#444444')
    ax.annotate(name, (0, 1), xytext=(0, 30), xycoords='axes fraction', textcoords='offset points',
                fontsize=10, fontweight='bold')
