"""
The pages of trained comparisons, results/<topic>/README.md: command, table, verdict and figures, which a
topic makes from its runs. All numbers are in the report of the sweep, beside it.
"""
import math
import os
from pathlib import Path
from typing import NamedTuple

from nanoblocks.experiments import report, sweep
from nanoblocks.experiments.arms import config_of, read_flags
from nanoblocks.experiments.pages import command_of
from nanoblocks.experiments.statistics import effect
from nanoblocks.formats import counted, format_quantity


class Page(NamedTuple):
    """What a page says beside its numbers."""
    title: str
    about: str          # the question, and how the arms are made
    reference: str      # what the reference is called, instead of its config file
    pairs: list         # further pairs of arms to compare: (without, with)
    limits: str         # what it does not show


PAGES = {
    'ffns': Page(
        'Feed-forwards: GELU, ReLU^2 and SwiGLU', """
A gated feed-forward has three matrices where the others have two: at 8/3 of the width it has as many
parameters as they have at 4 times the width, and at 4 times as many as they have at 6 times. Both sizes are
trained, as the feed-forward of Llama. The reference is SwiGLU at 8/3.
""", 'SwiGLU 8/3x', [('GELU 4x', 'relu2 4x'), ('GELU 6x', 'SwiGLU 4x'), ('relu2 6x', 'SwiGLU 4x'),
                     ('GELU 6x', 'relu2 6x')], """
One learning rate for all arms, and half a million tokens. A larger feed-forward may gain more where there
are more tokens to learn from.
"""),
    'kvheads': Page(
        'MHA, GQA and MQA at equal parameters and at equal cache', """
All arms have as many parameters, to within 1 %: a wider feed-forward makes up for fewer heads. MHA and MQA
have the query heads of GQA, and a larger and a smaller cache. "Same cache" means as many numbers for each
token and layer as GQA keeps, n_kv_head x head_dim: MHA has as many heads as GQA has key/value heads, and MQA
has one head as wide as those together, with query heads of that width.
""", 'GQA', [('MHA same cache', 'MQA same cache')], """
Heads are 16 wide here and 64 to 128 in published models, and a text has 128 tokens. What a smaller cache
buys, longer texts and more of them at once, is not measured.
"""),
    'tricks': Page(
        "The speed-run's blocks, each taken out alone", """
The whole stack is [config/speedrun.py](../../config/speedrun.py). Each arm lacks one part of it: where the
loss is higher without a part, the part helps. A part with weights of its own takes them with it, see the
column of parameters. No learning rate was tuned for an arm again, but for AdamW's in the place of Muon.
""", 'the whole stack', [], """
The speed-run trains GPT-2 124M on half a billion tokens or more, with texts of thousands of tokens. Here are
half a million tokens in texts of 128: a window saves no time, and a part whose use is stability has little
to do. Parts that overlap look useless when one is taken out at a time.
"""),
}


def write(topic, argv, words):
    """
    Write the page of a topic, called with argv, from the sweep of these words of ablate.py, and print its
    verdict.
    """
    page, own = PAGES[topic], read_flags(words)[1]
    folder, out = own['out_dir'], own['results'] or own['out_dir']
    plan = report.read_plan(folder)
    arms = {name: report.read_arm(plan, sweep.runs_of(plan), folder, name) for name in plan['arms']}
    found = {c.pair['with']: c for c in report.compared(plan, arms)}
    further = [(*pair, effect_of(arms, *pair)) for pair in page.pairs if set(pair) <= arms.keys()]
    said = [verdict(page.reference, found), *(f'{second} against {first} {report.verdict(e)}.'
                                                for first, second, e in further)]
    rows = report.measures(arms, {})
    text = [f'# {page.title}', '', page.about.strip(), '', '```',
            command_of(topic, argv), '```', '', about(plan, arms), '',
            *table(page.reference, plan['reference'], rows, found), '', ABOUT_TABLE, '',
            *(f'- {line}' for line in said), '',
            *(f'![{name}]({name}.png)\n' for name in ('differences', 'curves', topic)
              if Path(out, f'{name}.png').exists()),
            f'In the figures, {plan["reference"]} is {page.reference}. [All numbers](report.md)', '',
            '## What this does not show', '', page.limits.strip(), '']
    Path(out, 'README.md').write_text('\n'.join(text))
    print('\n'.join([*said, f'the page is {os.path.join(out, "README.md")}']))


def about(plan, arms):
    """Size, seeds, machine and time of the runs, in a paragraph."""
    flags = plan['arms'][plan['reference']]
    config = config_of(flags)
    tokens = report.step_tokens(flags, config)
    seconds = sum(run.seconds for arm in arms.values() for run in arm.runs.values())
    return (f'{counted(len(arms), "arm")}, {counted(len(plan["seeds"]), "seed")}; '
            f'{counted(flags["max_iters"], "step")} of {counted(tokens, "token")} of {flags["dataset"]}; '
            f'{counted(config.n_layer, "layer")}, '
            f'{config.n_embd} wide, texts of {config.block_size} tokens. {plan["machine"]}; '
            f'{counted(plan["jobs"], "run")} at once, {seconds / 60:.0f} minutes of runs. Differences are in '
            'validation loss, in nats per token, between runs of one seed; negative is better.')


def effect_of(arms, without, other):
    """The Effect of one arm against another, over the seeds of both."""
    return effect(list(report.paired_differences(arms, {'without': without, 'with': other}).values()))


ABOUT_TABLE = """
Worth: how many steps earlier the better of the two reached the other's final loss; with a minus, the arm
costs them ([how it is read](../../docs/ablations.md#worth-in-steps-and-seconds)). A row that says "not after
Holm" is resolved by itself, but not among all rows of the table.
""".strip()


def table(called, reference, rows, found):
    """
    A row for the reference and one for each arm: loss, difference, its worth, costs over the reference's.
    found: {arm: Comparison with the reference}
    """
    base, lines = rows[reference], []
    for name, row in rows.items():
        loss = f'{row["loss"]:.4f}'
        difference = worth = ''
        if c := found.get(name):
            e, worth = c.effect, str(c.steps or '-')
            judged = report.judged(e, c.p)
            difference = (f'{e.mean:+.4f}' + (f', {report.interval(e)}' if e.n > 1 else '')
                          + (f': {judged}' if judged != 'resolved' else ''))
        costs = [f'x {row[key] / base[key]:.2f}' for key in ('tokens_per_s', 'cache_bytes_per_token')]
        lines.append([called if name == reference else name, loss, difference, worth,
                      format_quantity(row['parameters']), *costs])
    return report.table(['arm', 'loss', 'difference, 95 % interval', 'worth in steps', 'parameters',
                         'training speed', 'cache'], lines)


def verdict(reference, found):
    """
    A sentence that says which arms are resolved from the reference, by how much, and whether among all of
    them. found: {arm: Comparison}
    """
    kinds = {'lower': [], 'higher': [], 'not resolved': [], 'diverged': []}
    for name, c in found.items():
        e = c.effect
        kind = 'lower' if e.mean < 0 else 'higher'
        if not e.resolved:
            kind = 'diverged' if math.isnan(e.mean) else 'not resolved'
        interval = f' ({e.mean - e.half:+.3f} to {e.mean + e.half:+.3f})' if e.n > 1 else ' (one seed)'
        holm = ', not after Holm' * (e.resolved and not c.p < 0.05)
        kinds[kind].append(name if kind == 'diverged' else f'{name} {e.mean:+.3f}{interval}{holm}')
    seeds = max(c.effect.n for c in found.values())
    return (f'Against {reference}, over {counted(seeds, "seed")}: '
            + '; '.join(f'{kind}: {", ".join(names)}' for kind, names in kinds.items() if names) + '.')
