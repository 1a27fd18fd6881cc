"""
What can a layer find again in what it has read, and how many bytes does it remember that in? Associative
recall with several questions (MQAR, of Zoology: Arora et al. 2023, https://arxiv.org/abs/2312.04927).

    ..k7....Q!a3..  ->  a3k7Q!      a letter is a key, the sign behind it its value, a dot is blank

A row holds some pairs at random places, and then each key again, in another order. The loss is of the values
alone, each given all that is before it. The first of two layers is a short convolution, which puts a key
beside its value, so that all families begin alike; in a hybrid it is a layer of states. The second layer must
find the pair again, and what it remembers is its state or its cache.
"""
import csv
import json
import random
import string
from pathlib import Path

import torch

from model import kv_cache_bytes
from nanoblocks.experiments import report
from nanoblocks.experiments.architectures import validation
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.figures import COLORS, log2_axis, panels, save_and_say, title
from nanoblocks.experiments.pages import command_of
from nanoblocks.experiments.runs import run_script
from nanoblocks.experiments.statistics import effect, holm
from nanoblocks.experiments.studies import RETNET, refuse_varied
from nanoblocks.experiments.sweep import make_plan, runs_of, runs_on, sweep
from nanoblocks.experiments.timing import print_table
from nanoblocks.experiments.topics import each, in_short
from nanoblocks.formats import counted, format_quantity
from nanoblocks.training import checkpoint

SIZE = ['config/study.py', '--n_layer=2', '--n_embd=64', '--n_head=2', '--norm=rmsnorm', '--ffn_pattern=-',
        '--bias=False', '--layer_pattern=sa', '--pos=rope', '--batch_size=64', '--max_iters=1000',
        '--optimizer=muon', '--muon_lr=0.005', '--learning_rate=2e-3', '--weight_decay=0.0',
        '--warmup_iters=20', '--eval_tokens=16384']
# one run of gated DeltaNet each: 0.38 nats after 300 steps; at twice these rates 2.6, and 1.22 after 1000
ALONE = 'pos=none'
KEYS_OF = 'rnn_value_dim=32+rnn_key_dim='
# {family: {arm: the flags in which it differs from attention}}, from the smallest state on
FAMILIES = {
    'attention': {'attention': ''},
    'window': {f'window of {n}': f'layer_pattern=sw+window={n}' for n in (8, 32)},
    'RetNet': {f'RetNet, keys of {n}': f'layer_pattern=sr+{ALONE}+{RETNET}+{KEYS_OF}{n}' for n in (4, 8, 32)},
    'Mamba-2': {f'Mamba-2, N of {n}': f'layer_pattern=sm+{ALONE}+ssm_state={n}' for n in (4, 8, 32)},
    'gated DeltaNet': {f'gated DeltaNet, keys of {n}': f'layer_pattern=sr+{ALONE}+{KEYS_OF}{n}'
                       for n in (4, 8, 32)},
    'Mamba-2 + attention': {'Mamba-2 + attention': 'layer_pattern=ma+ssm_state=4'},
    'gated DeltaNet + attention': {'gated DeltaNet + attention': f'layer_pattern=ra+{KEYS_OF}4'},
}
FIXED = ('layer_pattern', 'pos', 'window', 'ssm_state', 'rnn_key_dim', 'rnn_value_dim', 'dataset',
         'objective', 'block_size')
HYBRIDS = {'Mamba-2 + attention': 'Mamba-2', 'gated DeltaNet + attention': 'gated DeltaNet'}

PAIRS = {1: 4, 2: 3, 4: 2, 8: 2, 16: 2}     # how many rows have so many pairs; without the easy ones, states
ROWS = 65000                                # learn nothing for hundreds of steps
KEYS, BLANK = string.ascii_letters, '.'
VALUES = (string.digits + string.punctuation).replace(BLANK, '')
DISTANCES = 4, 8, 16, 32, 64                # tokens from a question back to its pair, at most
JUDGED = 2**18                              # tokens of validation by which a run is judged


def recall(argv, device, figures):
    """Values found again, by pairs, distance and bytes of state, of seven families: 45 minutes."""
    plan = trained(argv, device)
    found = judged(plan, device)
    folder = Path(figures) / 'recall'
    folder.mkdir(parents=True, exist_ok=True)
    heads, rows = table(found)
    said = verdicts(found)
    print(f'\nshare of the values named, mean of {counted(len(plan["seeds"]), "seed")} and its 95 % interval')
    print_table(heads, rows)
    print('\n'.join(['', *said]))
    with open(folder / 'recall.csv', 'w', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows(lines_of_csv(found, plan['seeds']))
    (folder / 'README.md').write_text(page(plan, argv, heads, rows, said))
    draw(found, folder)


def trained(argv, device):
    """The plan of the sweep, of which every run is finished."""
    files, flags = files_and_flags(argv, without=('device', 'figures'))
    refuse_varied('recall', [*files, *flags], FIXED)
    vary = '; '.join(f'{arm}: {words}' for arms in FAMILIES.values() for arm, words in arms.items() if words)
    words = [*SIZE, *files, f'--vary={vary}', '--seeds=3', '--evals=4', '--objective=prefix',
             f'--block_size={4 * max(PAIRS) + 1}', *runs_on(device), '--out_dir=out/ablate/recall', *flags]
    words.append(f'--dataset={dataset(Path(make_plan(words)["folder"]))}')
    sweep(words)
    return make_plan(words)


# ----------------------------------------------------------------------------------------------------------
# The rows


def texts_of_row(draw, n, most):
    """(a source with n pairs at random places among n to `most`, the same pairs in another order)"""
    slots = draw.randint(n, most)
    pairs = [key + draw.choice(VALUES) for key in draw.sample(KEYS, n)]
    at = dict(zip(draw.sample(range(slots), n), pairs))
    return ''.join(at.get(slot, 2 * BLANK) for slot in range(slots)), ''.join(draw.sample(pairs, n))


def dataset(folder):
    """The dataset of such rows, made unless it is there -> its folder"""
    rows, out = folder / 'rows.jsonl', folder / 'data'
    if not (out / 'meta.json').exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw, turns = random.Random(0), [n for n, times in PAIRS.items() for _ in range(times)]
        texts = (texts_of_row(draw, turns[i % len(turns)], max(PAIRS)) for i in range(ROWS))
        rows.write_text(''.join(json.dumps({'source': a, 'target': b}) + '\n' for a, b in texts))
        run_script('data/pairs/prepare.py', f'--input={rows}', f'--out={out}', '--tokenizer=bytes',
                   '--every=2')  # of a pair that is asked for, the key is given
    return out


# ----------------------------------------------------------------------------------------------------------
# Judging a run by the values


def judged(plan, device):
    """{arm: {'bytes': of its states and caches in 16 bit, 'parameters', 'seeds': [counts of each seed]}}"""
    found = {}
    for run in each(runs_of(plan), lambda run: f'answers of {run["path"]}'):
        path = Path(plan['folder']) / run['path'] / 'ckpt.pt'
        held = checkpoint.load(path)
        held['settings']['eval_tokens'] = JUDGED
        model = checkpoint.build(held, str(path)).to(device).eval()
        arm = found.setdefault(run['arm'].replace(plan['reference'], 'attention'), {
            'bytes': kv_cache_bytes(model.config, model.config.block_size, 1, 2),
            'parameters': model.num_params(), 'seeds': []})
        arm['seeds'].append(counts(model, validation(held, model, device)))
    return found


@torch.no_grad()
def counts(model, batches):
    """
    {('pairs', n): (values asked for in rows of n pairs, those of them named), ('distance', d): the same in
    the rows with the most pairs, where the pair is at most d tokens back, and more than the bound before}
    """
    pairs, distance, right = [], [], []
    for batch in batches:
        idx, targets = batch['idx'], batch['targets']
        for known, x in zip((pairs, distance), questions(idx, targets)):
            known.append(x)
        right.append((model(idx)[0].argmax(-1) == targets)[targets >= 0])
    pairs, distance, right = map(torch.cat, (pairs, distance, right))
    chosen = {('pairs', n): pairs == n for n in PAIRS}
    for low, high in zip((0, *DISTANCES), DISTANCES):
        chosen['distance', high] = (pairs == max(PAIRS)) & (distance > low) & (distance <= high)
    return {key: (at.sum().item(), right[at].sum().item()) for key, at in chosen.items()}


def questions(idx, targets):
    """(pairs in the row, tokens from the key back to its pair) of every value asked for, row by row"""
    asked = targets >= 0
    row, at = asked.nonzero(as_tuple=True)
    first = (idx[row] == idx[row, at][:, None]).int().argmax(-1)
    return asked.sum(1)[row], at - first


# ----------------------------------------------------------------------------------------------------------
# Telling


def shares(arm, key):
    """The share of the values that each seed named."""
    return [right / max(1, asked) for asked, right in (seed[key] for seed in arm['seeds'])]


def table(found):
    """(heads, rows)"""
    def cell(arm, n):
        e = effect(shares(arm, ('pairs', n)))
        return f'{e.mean:.3f} ± {e.half:.3f}' if e.n > 1 else f'{e.mean:.3f}'
    return (['layers', 'bytes of state', 'parameters', *(f'{n} pairs' if n > 1 else '1 pair' for n in PAIRS)],
            [[name, f'{arm["bytes"]:,}', format_quantity(arm['parameters']), *(cell(arm, n) for n in PAIRS)]
             for name, arm in found.items()])


def verdicts(found):
    """Sentences on the rows with the most pairs: against attention, with attention, and with more state."""
    last = {family: list(arms)[-1] for family, arms in FAMILIES.items()}
    pairs = [(name, 'attention') for family, name in last.items() if family != 'attention']
    pairs += [(hybrid, next(iter(FAMILIES[state]))) for hybrid, state in HYBRIDS.items()]
    pairs += [(last[family], next(iter(arms))) for family, arms in FAMILIES.items() if len(arms) > 1]
    effects = [against(found, *names) for names in pairs]
    return [verdict(found, *names, e, p) for names, e, p in zip(pairs, effects, holm([e.p for e in effects]))]


def against(found, name, other):
    """The Effect of one arm against another: the share of the values in the rows with the most pairs."""
    one, two = (shares(found[arm], ('pairs', max(PAIRS))) for arm in (name, other))
    return effect([a - b for a, b in zip(one, two)])


def verdict(found, name, other, e, p):
    """The paired difference of two arms as a sentence. p: of all sentences, after Holm."""
    said = 'one seed, no interval' if e.n < 2 else (
        f'95 % interval {e.mean - e.half:+.3f} to {e.mean + e.half:+.3f} over {e.n} seeds: '
        + report.judged(e, p))
    size = f'{found[name]["bytes"]:,} bytes against {found[other]["bytes"]:,}'
    return f'{name} against {other}, {size}, share of the values of {max(PAIRS)} pairs: {e.mean:+.3f}, {said}'


def lines_of_csv(found, seeds):
    """The counts of every run, below a line of heads."""
    yield ['layers', 'bytes', 'seed', 'by', 'at_most', 'asked', 'right']
    for name, arm in found.items():
        for seed, found_by in zip(seeds, arm['seeds']):
            for (by, bound), numbers in found_by.items():
                yield [name, arm['bytes'], seed, by, bound, *numbers]


PAGE = """# Recall

{about}

{seeds} of {arms} models, width {flags[n_embd]}, {flags[max_iters]} steps of {flags[batch_size]} rows of
{flags[block_size]} tokens; {machine}.

```
{command}
```

![values named by pairs, by distance and by bytes](recall.png)

The share of the values named, mean and 95 % interval over seeds. Bytes are of what one row leaves behind:
states in 32 bit, caches in 16. [All counts](recall.csv)

{table}

## Verdicts, paired by seed

{said}

"Not after Holm" is what is resolved by itself, but not among all of these sentences.

## What this does not show

All models have one width, as many steps and one learning rate: what a family does not learn here, it may
learn with more of them. Parameters are not matched; within a family, arms differ by the projections of keys
alone. The rows are random, and no text.
"""


def page(plan, argv, heads, rows, said):
    """A page in Markdown of what was found."""
    return PAGE.format(about=__doc__.strip(), arms=len(plan['arms']),
                       seeds=counted(len(plan['seeds']), 'seed'),
                       flags=plan['arms'][plan['reference']], machine=plan['machine'],
                       command=command_of('recall', argv),
                       table='\n'.join(report.table(heads, rows)),
                       said='\n'.join(f'- {sentence}' for sentence in said))


def draw(found, folder):
    """The share of the values named by pairs, by distance, and with the most pairs by bytes of state."""
    fig, (left, middle, right) = panels(13.5, 4.8, columns=3)
    for color, (family, arms) in zip(COLORS, FAMILIES.items()):
        name = list(arms)[-1]
        for ax, by, bounds in (left, 'pairs', PAIRS), (middle, 'distance', DISTANCES):
            interval(ax, list(bounds), [shares(found[name], (by, bound)) for bound in bounds], color, name)
        interval(right, [found[arm]['bytes'] for arm in arms],
                 [shares(found[arm], ('pairs', max(PAIRS))) for arm in arms], color, family)
    left.plot(list(PAIRS), [1 / n for n in PAIRS], '--', color='black', linewidth=0.8)
    log2_axis(left, list(PAIRS))
    log2_axis(middle, DISTANCES)
    powers = [2**i for i in range(9, 20)]
    log2_axis(right, powers, list(map(in_short, powers)))
    sizes = [arm['bytes'] for arm in found.values()]
    right.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
    for ax, text, about in ((left, 'pairs in the row', 'dashed: a guess among the values that were read'),
                            (middle, 'tokens back to the pair, at most', f'rows of {max(PAIRS)} pairs'),
                            (right, 'state and cache of a row (bytes)',
                             f'rows of {max(PAIRS)} pairs, smaller and larger states')):
        ax.set_xlabel(text)
        ax.set_ylim(-0.03, 1.06)
        title(ax, about)
    left.set_ylabel('share of the values named')
    fig.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False,
               fontsize=9)
    save_and_say(fig, folder, 'recall')


def interval(ax, x, samples, color, label):
    """Means of samples, joined, with their 95 % intervals."""
    found = [effect(sample) for sample in samples]
    halves = None if found[0].n < 2 else [e.half for e in found]
    ax.errorbar(x, [e.mean for e in found], halves, fmt='o-', color=color, markersize=4, linewidth=1.4,
                capsize=3, elinewidth=0.8, label=label)
