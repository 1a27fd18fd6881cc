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
from nanoblocks.experiments.statistics import deviation, effect, seeds_needed
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


def paired_differences(arms, pair):
    """Loss of `with` minus loss of `without`, for every seed that both arms have finished."""
    first, second = arms[pair['without']].runs, arms[pair['with']].runs
    return [second[seed].loss - first[seed].loss for seed in sorted(first.keys() & second.keys())]


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
    tokens = steps * arm.flags['batch_size'] * arm.flags['gradient_accumulation_steps'] * T
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
    for pair, e in comparisons:
        flags.setdefault(pair['flag'], []).append((pair, e))
    lines = []
    for flag, found in flags.items():
        pair, several = found[0][0], len(found) > 1
        change = '' if pair['how'] == 'all' else f' ({pair["change"]})'
        word = f' **{summary([e for _, e in found])}**;' if several else ''
        said = '; '.join(f'{PLACES[p["how"]].format(**p)} {verdict(e)}'.strip() for p, e in found)
        lines.append(f'- **{flag}**{change}:{word} {said}. {cost_sentence(rows, pair)}')
    return lines


# ----------------------------------------------------------------------------------------------------------
# Tables


def number(value, digits=4):
    return '-' if math.isnan(value) else f'{value:,.{digits}f}'


def table(heads, rows):
    return ['| ' + ' | '.join(heads) + ' |', '|' + '---|' * len(heads),
            *('| ' + ' | '.join(row) + ' |' for row in rows)]


def arms_table(rows):
    """rows {arm: {column: number}} -> lines of Markdown, a row per arm."""
    budgets, short = next(iter(rows.values())), format_quantity
    heads = ['arm', 'loss', 'sd', 'bits per byte', f'loss at {short(budgets["flops_budget"])} FLOPs',
             f'loss at {budgets["seconds_budget"]:.3g} s', 'parameters', 'active', 'FLOPs per token',
             'training tokens/s', 'decoding tokens/s', 'cache bytes per token', 'peak memory']
    body = [[name, *(number(row[key]) for key in ('loss', 'sd', 'bpb', 'loss_at_flops', 'loss_at_seconds')),
             *(short(row[key]) for key in ('parameters', 'active', 'flops_per_token', 'tokens_per_s')),
             number(row['decode_tokens_per_s'], 0), number(row['cache_bytes_per_token'], 0),
             f'{short(row["peak_memory"])}B'] for name, row in rows.items()]
    return table(heads, body)


def differences_table(comparisons):
    """comparisons [(pair, Effect)] -> lines of Markdown, a row per comparison."""
    body = [[pair['flag'] if pair['how'] == 'all' else pair['change'], pair['with'], pair['without'],
             '-' if math.isnan(e.mean) else f'{e.mean:+.4f}', interval(e) if e.n > 1 else '-', str(e.n),
             'resolved' if e.resolved else 'not resolved'] for pair, e in comparisons]
    return table(['change', 'arm', 'compared with', 'difference in loss', '95 % interval', 'seeds', ''], body)


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
All arms take the same number of steps on the same tokens, and `loss` compares them at the end. The columns
`loss at` compare them at the FLOPs and at the seconds of the cheapest arm: the others are read off their
curves earlier, before their learning rate has decayed, so these two columns favour the cheapest arm. A sweep
with `--match=flops` does not have this bias. Seconds are tokens divided by the median tokens/s, without
evaluations. The cache is in 16 bit, for one sequence of the full context. Peak memory is the resident memory
of the training process; on a GPU, the memory of its tensors.
""".strip()


def about(plan, arms, config):
    """What was trained on which data and machine, and the command."""
    flags = plan['arms'][plan['reference']]
    tokens = flags['batch_size'] * flags['gradient_accumulation_steps'] * config.block_size
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
              '', '## Paired differences', '', *differences_table(comparisons), *caveats(plan, comparisons),
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
    lines, by_chance = [], round(0.05 * len(comparisons))
    if by_chance:
        lines += ['', f'At 95 % each, about {by_chance} of {len(comparisons)} comparisons would look '
                  'resolved by chance. Intervals over few seeds are wide because they should be.']
    flags = plan['arms'][plan['reference']]
    if flags['eval_tokens']:
        lines += ['', f'All runs are evaluated on the same {flags["eval_tokens"]:,} tokens. The intervals '
                  'are over seeds; they do not cover the choice of that text.']
    return lines


def draw(plan, arms, comparisons, rows, out):
    """The names of the figures drawn; none without matplotlib."""
    if not figures.have_matplotlib() or not rows:
        return []
    drawn = figures.draw_tables(comparisons, rows, plan['ladder'], out)
    every = [name for name in plan['ladder'] or arms if arms[name].runs]
    if names := every[:len(figures.COLORS)]:
        curves = {name: {seed: run.curve for seed, run in arms[name].runs.items()}
                  for name in {*names, plan['reference']}}
        labels = figures.arm_labels(names, plan['comparisons'], plan['ladder'])
        figures.plot_curves(curves, plan['reference'], labels, os.path.join(out, 'curves.png'),
                            len(every) - len(names))
        drawn.append('curves')
    return drawn


def write(plan, runs, folder, out):
    """
    Write report.md, report.csv (a row per arm), differences.csv (a row per comparison) and the figures of the
    sweep in `folder` into `out` -> the text to print.
    """
    os.makedirs(out, exist_ok=True)
    arms = {name: read_arm(plan, runs, folder, name) for name in plan['arms']}
    measured = Path(folder) / 'measured.json'
    rows = measures(arms, json.loads(measured.read_text()) if measured.exists() else {})
    comparisons = [(pair, effect(paired_differences(arms, pair))) for pair in plan['comparisons']]
    missing, drawn = unfinished(runs, folder), draw(plan, arms, comparisons, rows, out)
    Path(out, 'report.md').write_text(markdown(plan, arms, comparisons, rows, missing, drawn))
    write_csv(os.path.join(out, 'report.csv'), rows, 'arm')
    write_csv(os.path.join(out, 'differences.csv'), {
        f'{i}': {key: pair[key] for key in ('flag', 'how', 'without', 'with', 'change')} | e._asdict()
        for i, (pair, e) in enumerate(comparisons, start=1)}, 'number')
    said = [line.replace('**', '') for line in verdicts(comparisons, rows)] if rows else []
    return '\n'.join([*said, *(line + ', NOT FINISHED' for line in missing),
                      f'the report is {os.path.join(out, "report.md")}'])
