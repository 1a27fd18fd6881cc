"""
The report of a sweep, from the files that its runs left: what each flag does and costs, tables and figures.
"""
import csv
import json
import math
import os
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch

from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks.experiments import figures
from nanoblocks.experiments.runs import read_run
from nanoblocks.experiments.statistics import Effect, deviation, effect, holm, seeds_needed
from nanoblocks.experiments.worth import Worth, worths
from nanoblocks.formats import counted, format_quantity

# ----------------------------------------------------------------------------------------------------------
# Reading


def read_plan(folder):
    """The plan of the sweep in a folder. FileNotFoundError where there is none."""
    path = Path(folder) / 'sweep.json'
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist: train a sweep into that folder, or name '
                                'another')
    return json.loads(path.read_text())


class Arm(NamedTuple):
    """One arm at its best learning rate."""
    rate: float         # the factor on the learning rates that gave the lowest loss
    by_rate: dict       # {factor: mean loss over the seeds that are finished at every factor}
    runs: dict          # {seed: Run} of finished runs at the best rate
    config: GPTConfig | None
    flags: dict

    def model(self):
        """The model, without memory for its parameters."""
        with torch.device('meta'):
            return GPT(self.config, seed=None)


def read_arm(plan, runs, folder, name):
    """The Arm of this name, from the folders of its runs."""
    runs = [run for run in runs if run['arm'] == name]
    found = {(run['rate'], run['seed']): read_run(Path(folder) / run['path'], run['flags']['max_iters'])
             for run in runs}
    done = {key: run for key, run in found.items() if run and run.finished}
    shared = [seed for seed in plan['seeds'] if all((rate, seed) in done for rate in plan['rates'])]
    by_rate = {rate: fmean(done[rate, seed].loss for seed in shared) for rate in plan['rates'] if shared}
    best = min(by_rate, key=lambda rate: diverged_last(by_rate[rate])) if by_rate else plan['rates'][0]
    paths = (Path(folder) / run['path'] / 'config.json' for run in runs)
    path = next((path for path in paths if path.exists()), None)
    config = GPTConfig(**json.loads(path.read_text())['model']) if path else None
    return Arm(best, by_rate, {seed: run for (rate, seed), run in done.items() if rate == best}, config,
               plan['arms'][name])


def diverged_last(loss):
    """A loss to sort by: nan, the loss of a run that diverged, comes last."""
    return math.inf if math.isnan(loss) else loss


def unfinished(runs, folder):
    """A line for each run that is not finished."""
    lines = []
    for run in runs:
        steps = run['flags']['max_iters']
        found = read_run(Path(folder) / run['path'], steps)
        if not (found and found.finished):
            lines.append(f'- {run["path"]}: ' + (f'step {found.steps} of {steps}' if found else 'not begun'))
    return lines


# ----------------------------------------------------------------------------------------------------------
# Numbers


class Comparison(NamedTuple):
    """Two arms, over the seeds that both have finished."""
    pair: dict
    effect: Effect      # of the loss of `with` minus the loss of `without`
    p: float            # after Holm's correction for all comparisons of the sweep
    steps: Worth | None
    seconds: Worth | None


def paired_differences(arms, pair):
    """{seed: loss of `with` minus loss of `without`} for every seed that both arms have finished."""
    first, second = arms[pair['without']].runs, arms[pair['with']].runs
    return {seed: second[seed].loss - first[seed].loss for seed in sorted(first.keys() & second.keys())}


def compared(plan, arms):
    """[Comparison] of a sweep."""
    effects = [effect(list(paired_differences(arms, pair).values())) for pair in plan['comparisons']]
    found = []
    for pair, e, p in zip(plan['comparisons'], effects, holm([e.p for e in effects])):
        first, second = arms[pair['without']], arms[pair['with']]
        saved = worths(first.runs, second.runs, step_tokens(first.flags, first.config)) if e.n else None
        found.append(Comparison(pair, e, p, *(saved or (None, None))))
    return found


def step_tokens(flags, config):
    """The tokens of a training step."""
    return flags['batch_size'] * flags['gradient_accumulation_steps'] * config.block_size


def loss_at(curve, step):
    """The loss at a step, interpolated between evaluations; nan before the first."""
    if step >= curve[-1][0]:
        return curve[-1][1]
    for (before, loss), (after, next_loss) in zip(curve, curve[1:]):
        if before <= step <= after:
            return loss + (next_loss - loss) * (step - before) / (after - before)
    return math.nan


def mean_of(values):
    values = [value for value in values if not math.isnan(value)]
    return fmean(values) if values else math.nan


def measures(arms, measured):
    """{arm: {column: number}} of every arm that has a finished run, in their order."""
    rows = {name: measures_of(arm, measured.get(name, {})) for name, arm in arms.items() if arm.runs}
    for budget in ('flops', 'seconds'):
        least = min((row[budget] for row in rows.values()), default=math.nan)
        for name, row in rows.items():
            step = row['steps'] * least / row[budget]
            row[f'{budget}_budget'] = least
            row[f'loss_at_{budget}'] = mean_of(loss_at(run.curve, step) for run in arms[name].runs.values())
    return rows


def measures_of(arm, measured):
    """The numbers of one arm: losses, sizes, FLOPs, seconds, tokens per second, bytes."""
    model, T, runs = arm.model(), arm.config.block_size, list(arm.runs.values())
    speed, losses = median(run.rate for run in runs), [run.loss for run in runs]
    steps = arm.flags['max_iters']
    tokens = steps * step_tokens(arm.flags, arm.config)
    return {'seeds': len(runs), 'loss': fmean(losses), 'sd': deviation(losses),
            'bpb': fmean(run.bpb for run in runs), 'steps': steps, 'tokens': tokens,
            'flops_per_token': model.flops_per_token(T), 'flops': tokens * model.flops_per_token(T),
            'tokens_per_s': speed, 'seconds': tokens / speed,
            'parameters': model.num_params(), 'active': model.num_params(active=True),
            'cache_bytes_per_token': kv_cache_bytes(arm.config, T, 1, 2) / T,
            'decode_tokens_per_s': measured.get('decode') or math.nan,
            'peak_memory': max(run.memory for run in runs)}


# ----------------------------------------------------------------------------------------------------------
# Sentences

# where a flag was tried, and against which arm
PLACES = {'all': '{with} compared with {without}', 'alone': 'alone, compared with {without},',
          'removed': 'beside all the others, compared with {without},',
          'ladder': 'on the ladder, compared with {without},', 'varied': ''}


def interval(e):
    return f'{e.mean - e.half:+.4f} to {e.mean + e.half:+.4f}'


def verdict(e):
    """What an effect shows, in words."""
    if e.n == 0:
        return 'no finished pair of runs'
    if e.n == 1:
        return f'one seed only ({e.mean:+.4f}): no interval'
    if math.isnan(e.mean):
        return 'a run diverged'
    if e.resolved:
        verb = 'lowers' if e.mean < 0 else 'raises'
        return f'{verb} the loss by {abs(e.mean):.4f} (95 % interval {interval(e)})'
    if e.sd == 0:
        return 'no difference at all'
    needed = seeds_needed(e.mean, e.sd)
    return (f'not resolved ({e.mean:+.4f}, 95 % interval {interval(e)}; '
            + (f'about {needed}' if needed else 'more than 1000') + ' seeds would be needed)')


def worth_sentence(c):
    """What a resolved difference is worth, and whether it is resolved among all: ', worth 31 of 480 steps'"""
    if not c.effect.resolved:
        return ''
    said = f', worth {c.steps} of {c.steps.of:,} steps and {c.seconds} of {c.seconds.of:.3g} s'
    return said + f'; not resolved after Holm (p = {c.p:.2f})' * (c.p >= 0.05)


def summary(effects):
    """All effects of one flag in a word or two."""
    signs = {e.mean < 0 for e in effects if e.resolved}
    if not signs:
        return 'not resolved' if any(e.n > 1 for e in effects) else 'not tried on two seeds'
    return {(True,): 'helps', (False,): 'hurts'}.get(tuple(signs), 'depends on the others')


COSTS = {'parameters': 'parameters', 'active': 'active parameters', 'flops': 'FLOPs',
         'tokens_per_s': 'training speed', 'decode_tokens_per_s': 'decoding speed',
         'cache_bytes_per_token': 'cache'}


def cost_sentence(rows, pair):
    """The costs that change by more than 2 %, as factors."""
    if pair['without'] not in rows or pair['with'] not in rows:
        return ''
    before, after = rows[pair['without']], rows[pair['with']]
    ratios = {text: after[name] / before[name] if before[name] else math.nan for name, text in COSTS.items()}
    if ratios['active parameters'] == ratios['parameters']:
        del ratios['active parameters']
    changed = [f'{text} x {ratio:.2f}' for text, ratio in ratios.items() if abs(ratio - 1) > 0.02]
    return f'Costs: {", ".join(changed)}.' if changed else 'Costs the same within 2 %.'


def verdicts(comparisons, rows):
    """A paragraph per flag: its effect in every place it was tried, and what it costs."""
    flags = {}
    for c in comparisons:
        flags.setdefault(c.pair['flag'], []).append(c)
    lines = []
    for flag, found in flags.items():
        pair, several = found[0].pair, len(found) > 1
        change = '' if pair['how'] == 'all' else f' ({pair["change"]})'
        word = f' **{summary([c.effect for c in found])}**;' if several else ''
        places = (PLACES[c.pair['how']].format(**c.pair) for c in found)
        said = '; '.join(f'{place} {verdict(c.effect)}{worth_sentence(c)}'.strip()
                         for place, c in zip(places, found))
        lines.append(f'- **{flag}**{change}:{word} {said}. {cost_sentence(rows, pair)}')
    return lines


# ----------------------------------------------------------------------------------------------------------
# Tables


def number(value, digits=4):
    return '-' if math.isnan(value) else f'{value:,.{digits}f}'


def p_text(p):
    return '< 0.0001' if p < 0.0001 else number(p)


def table(heads, rows):
    return ['| ' + ' | '.join(heads) + ' |', '|' + '---|' * len(heads),
            *('| ' + ' | '.join(row) + ' |' for row in rows)]


def arms_table(rows):
    """rows {arm: {column: number}} -> lines of Markdown, a row per arm."""
    short = format_quantity
    heads = ['arm', 'loss', 'sd', 'bits per byte', 'parameters', 'active', 'FLOPs per token',
             'training tokens/s', 'decoding tokens/s', 'cache bytes per token', 'peak memory']
    body = [[name, *(number(row[key]) for key in ('loss', 'sd', 'bpb')),
             *(short(row[key]) for key in ('parameters', 'active', 'flops_per_token', 'tokens_per_s')),
             number(row['decode_tokens_per_s'], 0), number(row['cache_bytes_per_token'], 0),
             f'{short(row["peak_memory"])}B'] for name, row in rows.items()]
    return table(heads, body)


def differences_table(comparisons):
    """[Comparison] -> lines of Markdown, a row per comparison."""
    body = [[named(c.pair), c.pair['without'], '-' if math.isnan(c.effect.mean) else f'{c.effect.mean:+.4f}',
             interval(c.effect) if c.effect.n > 1 else '-', str(c.steps or '-'), str(c.seconds or '-'),
             str(c.effect.n), p_text(c.p), judged(c.effect, c.p)] for c in comparisons]
    return table(['change', 'compared with', 'difference in loss', '95 % interval', 'worth in steps',
                  'worth in seconds', 'pairs', 'p after Holm', ''], body)


def named(pair):
    """What a row compares: the arm where it has a name of its own, else the flag and its values."""
    return pair['change'] if pair['how'] in ('alone', 'removed', 'ladder') else pair['flag']


def judged(e, p):
    """A few words: whether a difference is resolved, by itself and among all of its table."""
    return 'resolved' + ', not after Holm' * (not p < 0.05) if e.resolved else 'not resolved'


def rates_section(plan, arms):
    """The loss at each learning rate, and a warning where the best is the lowest or highest tried."""
    heads = ['arm', *(f'rates x {rate:g}' for rate in plan['rates']), 'best']
    swept = {name: arm for name, arm in arms.items() if arm.by_rate}
    body = [[name, *(number(arm.by_rate[rate]) for rate in plan['rates']), f'x {arm.rate:g}']
            for name, arm in swept.items()]
    lines = ['', '## Learning rates', '', 'Mean loss over seeds. Each arm is compared at its best rate.', '',
             *table(heads, body)]
    edge = [name for name, arm in swept.items() if arm.rate in (plan['rates'][0], plan['rates'][-1])]
    if edge:
        lines += ['', 'Best at the lowest or highest rate tried, so a wider sweep may favour them: '
                  f'{", ".join(edge)}.']
    return lines


def write_csv(path, rows, key):
    """rows {name: {column: value}}; key: the name of the first column."""
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        heads = list(next(iter(rows.values()), {}))
        writer.writerow([key, *heads])
        writer.writerows([name, *row.values()] for name, row in rows.items())


# ----------------------------------------------------------------------------------------------------------
# The page

ABOUT_ARMS = """
All arms take the same number of steps on the same tokens. Tokens/s are the median over a run, without
evaluations. The cache is in 16 bit, for one sequence of the full context. Peak memory is the resident memory
of the training process; on a GPU, the memory of its tensors.
""".strip()

ABOUT_WORTH = """
Worth: how much earlier the better of two arms reached the other's final loss, read off its own curve. With a
plus, the change saves steps or seconds; with a minus, it costs them. In the middle of a run the learning rate
is still high, so a shorter run with a schedule of its own would save more. The interval in seconds is that of
the loss and of the runs' speed on this machine.
""".strip()


def about(plan, arms, config):
    """What was trained on which data and machine, and the command."""
    flags = plan['arms'][plan['reference']]
    tokens = step_tokens(flags, config)
    at_once = f'{counted(plan["jobs"], "run")} at once'
    seeds = ', '.join(map(str, plan['seeds']))
    minutes = sum(run.seconds for arm in arms.values() for run in arm.runs.values()) / 60
    return [f'{counted(len(plan["arms"]), "arm")}, seeds {seeds}; {counted(flags["max_iters"], "step")} of '
            f'{counted(tokens, "token")} of {flags["dataset"]}; {counted(config.n_layer, "layer")}, '
            f'{config.n_embd} wide, context {config.block_size}; {flags["optimizer"]}, learning rate '
            f'{flags["learning_rate"]:g}. '
            f'Machine: {plan["machine"]}; {at_once}, {minutes:.0f} minutes of runs in total. Command:',
            '', '```', plan['command'], '```']


def picture(name, text, drawn):
    return ['', f'![{text}]({name}.png)'] if name in drawn else []


def markdown(plan, arms, comparisons, rows, missing, drawn):
    """The text of report.md. missing: lines about unfinished runs; drawn: names of the figures."""
    lines = [f'# Ablation: {plan["name"]}', '']
    if rows:
        lines += about(plan, arms, arms[next(iter(rows))].config)
    if missing:
        lines += ['', f'**Not finished, so not counted: {counted(len(missing), "run")}**', '', *missing]
    if not rows:
        return '\n'.join([*lines, '', 'No run is finished yet.', ''])
    lines += ['', '## Verdicts', '', *compared_with(plan), '', *verdicts(comparisons, rows),
              *picture('differences', 'paired differences', drawn),
              '', '## Paired differences', '', *differences_table(comparisons), '', ABOUT_WORTH,
              *caveats(plan, comparisons),
              '', '## Arms', '', *arms_table(rows), '', ABOUT_ARMS,
              *picture('cost', 'loss against cost', drawn), *picture('curves', 'loss curves', drawn)]
    if plan['notes']:
        lines += ['', f'## Budgets: `--match={plan["match"]}`', '',
                  *(f'- {arm}: {note}' for arm, note in plan['notes'].items())]
    if len(plan['rates']) > 1:
        lines += rates_section(plan, arms)
    return '\n'.join([*lines, ''])


def compared_with(plan):
    """How to read a difference, and which two arms it is between."""
    lines = ['Differences are in validation loss, in nats per token, between runs with the same seed; '
             'negative is better.']
    hows = {pair['how'] for pair in plan['comparisons']}
    if hows == {'varied'}:
        lines.append(f'Every arm is compared with {plan["reference"]}.')
    if 'ladder' in hows:
        lines.append(f'The ladder starts at {plan["reference"]} and makes one change at a time; each rung is '
                     'compared with the rung before it.')
    return lines


def caveats(plan, comparisons):
    """What the intervals do not cover."""
    lines, effects = [], [c.effect for c in comparisons]
    if len(effects) > 1:
        lines += ['', 'After Holm: with a probability of 95 %, no row with a p below 0.05 is resolved by '
                  'chance alone. Before it, one row in twenty would be where nothing differs.']
    if len({e.n for e in effects}) > 1:
        lines += ['', 'The arms have not finished the same seeds: each row is over those that both of its '
                  'arms have, as many as it has pairs.']
    flags = plan['arms'][plan['reference']]
    if flags['eval_tokens']:
        lines += ['', f'All runs are evaluated on the same {flags["eval_tokens"]:,} tokens. The intervals '
                  'are over seeds; they do not cover the choice of that text.']
    return lines


def draw(plan, arms, comparisons, rows, out):
    """The names of the figures drawn; none without matplotlib."""
    if not figures.have_matplotlib() or not rows:
        return []
    drawn = figures.draw_tables([(c.pair, c.effect) for c in comparisons], rows, plan['ladder'], out)
    every = [name for name in plan['ladder'] or arms if arms[name].runs]
    if names := every[:len(figures.COLORS)]:
        curves = {name: {seed: run.curve for seed, run in arms[name].runs.items()}
                  for name in {*names, plan['reference']}}
        labels = figures.arm_labels(names, plan['comparisons'], plan['ladder'])
        figures.plot_curves(curves, plan['reference'], labels, os.path.join(out, 'curves.png'),
                            len(every) - len(names))
        drawn.append('curves')
    return drawn


def columns(c):
    """{column: value} of a Comparison, for differences.csv."""
    worth = {f'{unit}{end}': getattr(found, key) if found else math.nan
             for unit, found in (('steps', c.steps), ('seconds', c.seconds))
             for end, key in (('', 'mean'), ('_low', 'low'), ('_high', 'high'))}
    return ({key: c.pair[key] for key in ('flag', 'how', 'without', 'with', 'change')} | c.effect._asdict()
            | {'p': c.effect.p, 'p_holm': c.p} | worth)


def write(plan, runs, folder, out):
    """
    Write report.md, report.csv (a row per arm), differences.csv (a row per comparison) and the figures of the
    sweep in `folder` into `out` -> the text to print.
    """
    os.makedirs(out, exist_ok=True)
    arms = {name: read_arm(plan, runs, folder, name) for name in plan['arms']}
    measured = Path(folder) / 'measured.json'
    rows = measures(arms, json.loads(measured.read_text()) if measured.exists() else {})
    comparisons = compared(plan, arms)
    missing, drawn = unfinished(runs, folder), draw(plan, arms, comparisons, rows, out)
    Path(out, 'report.md').write_text(markdown(plan, arms, comparisons, rows, missing, drawn))
    write_csv(os.path.join(out, 'report.csv'), rows, 'arm')
    write_csv(os.path.join(out, 'differences.csv'), {
        f'{i}': columns(c) for i, c in enumerate(comparisons, start=1)}, 'number')
    said = [line.replace('**', '') for line in verdicts(comparisons, rows)] if rows else []
    return '\n'.join([*said, *(line + ', NOT FINISHED' for line in missing),
                      f'the report is {os.path.join(out, "report.md")}'])
