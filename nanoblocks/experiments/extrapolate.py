"""
Beyond the trained length: `bench.py extrapolate`.

Each kind of positions is trained at T tokens, then reads a text in windows of T, 2T, 4T and 8T tokens. The
text is the same each time, and each of its tokens is named once. So the mean losses of two lengths may be
compared: where it falls, the model uses the further tokens; where it rises, they confuse it. Scalings of RoPE
are ways to read with a model that was trained without them, and so is attention within a window of T.
"""
import csv
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from data.mixture import Sources
from model import ROPE_SCALING
from nanoblocks.experiments.arms import config_of
from nanoblocks.experiments.figures import COLORS, LOSS, log2_axis, panels, save_and_say, title
from nanoblocks.experiments.pages import signed, size_of, tell
from nanoblocks.experiments.statistics import effect, holm
from nanoblocks.experiments.studies import SIZE, trained_flags
from nanoblocks.experiments.sweep import make_plan, runs_of, runs_on, sweep
from nanoblocks.experiments.topics import each, sizes
from nanoblocks.training import checkpoint

ROPE = 'RoPE 10K'   # the reference: config/llama_small.py as it is
# sines have an amplitude of one, beside which the embedding would drown if it were not scaled
VARY = ('--vary=RoPE 100K: rope_theta=100000.0; ALiBi: pos=alibi; relative: pos=relative; '
        'NoPE: pos=none; sinusoidal: pos=sinusoidal+embed_scale=True; learned: pos=learned')
FIXED = ('pos', 'embed_scale', 'rope_theta', 'rope_scaling', 'rope_factor', 'objective')
# longrope needs divisors that are searched for one model
SCALINGS = [word for word in ROPE_SCALING if word not in ('none', 'longrope')]
ROWS = 8            # windows of the largest length that are read at once


def extrapolate(argv, tokens, device, figures):
    """Positions of every kind, trained at T and read up to 8 T: loss by position; 25 min. on two cores."""
    folder = Path(figures) / 'extrapolate'
    words, _ = trained_flags('extrapolate', argv, ('device', 'tokens', 'figures'), FIXED)
    words = [*SIZE, VARY, '--seeds=3', '--evals=6', *runs_on(device), f'--out_dir={folder / "runs"}', *words]
    plan = make_plan(words)
    reference = plan['arms'][plan['reference']]
    T = config_of(reference).block_size
    lengths = lengths_of(tokens, T)
    text = text_of(reference, lengths[-1])     # refused here, not after minutes of training
    sweep(words)
    found = read_all(plan, text, T, lengths, device)
    tables, verdict = tables_of(found, lengths), verdict_of(found, lengths, size_of(plan))
    tell(folder, 'Beyond the trained length', argv, [about(T, lengths, text)], verdict, tables, LIMITS)
    write_numbers(folder / 'extrapolate.csv', found, T, plan['seeds'])
    draw(found, lengths, folder)


def lengths_of(tokens, T):
    """The lengths to read at, T the first of them, each a divisor of the last."""
    lengths = sorted({T, *sizes('tokens', tokens, T, 2 * T, 4 * T, 8 * T)})
    if lengths[0] < T or len(lengths) < 2 or any(lengths[-1] % length for length in lengths):
        raise ValueError(f'tokens={tokens} must be above block_size={T} and divide the largest, which it '
                         f'divides too: --tokens={2 * T},{4 * T},{8 * T}')
    return lengths


def text_of(flags, longest):
    """The text of every reading: batches of tokens and their next ones, two (ROWS,longest) tensors each."""
    sources = Sources(flags['dataset'])
    sources.ensure_prepared()
    data = sources.open(longest, flags['seed'])
    return list(data.eval_batches(ROWS, flags['eval_tokens']))


# ----------------------------------------------------------------------------------------------------------
# Reading


@torch.no_grad()
def by_place(model, text, length, device='cpu'):
    """The mean loss at each place of the rows of `text`, which are cut into windows of `length` tokens."""
    total, rows = 0.0, 0
    for row in text:
        idx, targets = (x.reshape(-1, length).to(device) for x in row)
        losses = F.cross_entropy(model(idx)[0].float().transpose(1, 2), targets, reduction='none')
        total, rows = total + losses.double().view(row[0].shape).sum(0).cpu(), rows + len(row[0])
    return (total / rows).tolist()


def ways(arm, flags, T, length):
    """{name: the model flags that it changes} of the ways in which a run can read windows of `length`."""
    config = config_of(flags)
    found = {arm: {}}
    if config.pos == 'rope' and length > T:
        for word in SCALINGS:
            # dynamic derives its factor from the length; with 1 it would be ntk
            factor = 2.0 if word == 'dynamic' else length / T
            found[f'{arm}, {word}'] = {'rope_scaling': word, 'rope_factor': factor}
        if config.layer_pattern == 'a':
            found[f'{arm}, window'] = {'layer_pattern': 'w', 'window': T}
    return found


def read_all(plan, text, T, lengths, device):
    """
    {name: {length: [the losses by place of each seed's run]}}; at T, a scaled run is the run as it is.
    They are kept beside each run.
    """
    found = {}
    for run in each(runs_of(plan), lambda run: f'reading with {run["path"]}'):
        arm, path = run['arm'].replace(plan['reference'], ROPE), Path(plan['folder'], run['path'], 'ckpt.pt')
        kept = path.with_name('by_place.json')
        known = json.loads(kept.read_text()) if kept.exists() else {}
        held = checkpoint.load(path)
        for length in lengths:
            for name, flags in ways(arm, run['flags'], T, length).items():
                key = f'{name}, {length} of {text[0][0].shape[1]}, {sum(len(x) for x, _ in text)} rows'
                if key not in known:
                    model = checkpoint.build(held, str(path), flags).to(device).eval()
                    known[key] = can(model, length) and by_place(model, text, length, device)
                if known[key]:
                    found.setdefault(name, {}).setdefault(length, []).append(known[key])
        kept.write_text(json.dumps(known))
    for name in found:  # what scales RoPE changes nothing at T
        found[name].setdefault(T, found.get(name.rpartition(', ')[0], {}).get(T))
    return found


def can(model, length):
    """Whether the model can read so many tokens: learned positions end at block_size."""
    return length <= (model.wpe.max_tokens or math.inf)


# ----------------------------------------------------------------------------------------------------------
# Telling


def by_position(losses, length):
    """Losses by place, read in windows of `length` -> the mean at each position of a window"""
    return [fmean(losses[i::length]) for i in range(length)]


def quarter(losses, length):
    """The mean of the last quarter of the positions."""
    return fmean(by_position(losses, length)[-max(1, length // 4):])


def curve(losses, short, T, length):
    """
    [(first position, last one, mean loss)] from losses by place: `losses` in windows of `length`, `short` of
    the same run in windows of T; one bin up to each power of 2, beyond T one for each T.

    Every text is harder in some places than in others, and few tokens stand at each. So the mean is that of
    all windows of T, and added to it is what the longer windows change for the very tokens of the bin.
    """
    near = by_position(short, T)
    ends = {0, T} | {2 ** n for n in range(T.bit_length())}
    bins = [*pairwise(sorted(n for n in ends if n <= T)), *pairwise(range(T, length + 1, T))]
    return [(a + 1, b, fmean(near[a:b] or near) + fmean(losses[a:b]) - fmean(short[a:b])) for a, b in bins]


def tables_of(found, lengths):
    """{caption: (heads, rows)}: the mean at each length, and how the largest differs from the trained one."""
    longest = lengths[-1]
    heads = ['positions', *(f'{length} tokens' for length in lengths), 'last quarter',
             f'{longest} against {lengths[0]}']
    rows = []
    for name, runs in found.items():
        row = [name, *(f'{fmean(map(fmean, runs[n])):.4f}' if n in runs else 'cannot' for n in lengths)]
        last = (quarter(losses, longest) for losses in runs.get(longest, ()))
        beyond = [f'{fmean(last):.4f}', signed(change(runs, lengths, longest))] if longest in runs else '--'
        rows.append([*row, *beyond])
    return {'Mean loss (nats per token) of the same text in windows of each length; of the last quarter of '
            f'{longest} positions; and the difference, with half of its 95 % interval': (heads, rows)}


def change(curves, lengths, length):
    """The Effect of reading at `length` instead of the trained one, paired by seed."""
    return effect([fmean(b) - fmean(a) for a, b in zip(curves[lengths[0]], curves[length])])


def verdict_of(found, lengths, size):
    """Sentences: for whom more text helps or harms, who cannot, and who is best at the largest length."""
    T, longest = lengths[0], lengths[-1]
    able = {name: curves for name, curves in found.items() if longest in curves}
    changes = {name: change(curves, lengths, longest) for name, curves in able.items()}
    p, lines = dict(zip(changes, holm([e.p for e in changes.values()]))), []
    for what, names in ('As trained', [name for name in able if ', ' not in name]), (
            'With the frequencies or the mask changed', [name for name in able if ', ' in name]):
        groups = {'lowers the loss of': [], 'raises the loss of': [], 'is not resolved for': []}
        for name in names:
            e = changes[name]
            words = f'{name} ({signed(e)}{", not after Holm" * (e.resolved and not p[name] < 0.05)})'
            groups[list(groups)[(e.mean > 0) if e.resolved else 2]].append(words)
        said = [f'{word} {", ".join(of)}' for word, of in groups.items() if of]
        lines += [f'{what}, reading {longest} instead of {T} tokens {"; ".join(said)}.'] if said else []
    lines += [f'{name} cannot read more than {max(curves)} tokens.' for name, curves in found.items()
              if name not in able]
    best, second, *_ = sorted(able, key=lambda name: fmean(map(fmean, able[name][longest])))
    e = effect([fmean(a) - fmean(b) for a, b in zip(able[best][longest], able[second][longest])])
    lines.append(f'The lowest loss at {longest} tokens is that of {best}; its difference to the next, '
                 f'{second}, is {signed(e)}{", not resolved" * (not e.resolved)}. No interval holds that '
                 'both were chosen by these very losses.')
    return [*lines, f'({size}; intervals of 95 % over seeds; "not after Holm": resolved by itself, but not '
            'among all that read on.)']


def about(T, lengths, text):
    rows, longest = sum(len(x) for x, _ in text), text[0][0].shape[1]
    return (f'Trained at {T} tokens; {rows * longest:,} tokens of validation text, read in windows of '
            f'{", ".join(map(str, lengths))}. linear, ntk, yarn and llama3 have the factor length / {T}, '
            f'dynamic 2; window attends to all tokens in training, and to {T} in reading. In the figure, '
            f'a loss beyond {T} is the mean at {T} and what the longer window changes for the same tokens.')


LIMITS = [
    'Models this small, trained for minutes, use little of a long context: where a loss does not rise, '
    'nothing breaks, and that is all it says.',
    'Scalings are tried without the fine-tuning that their papers give them; longrope, whose divisors are '
    'searched for one model, is left out.',
    'relative has T5\'s 32 buckets up to 128 tokens: all distances from there on share one.',
    'The intervals are over seeds, and do not cover the choice of the text.',
]


def write_numbers(path, found, T, seeds):
    """A row for each way, length and seed, and for each of its bins of positions at the largest length."""
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['positions', 'length', 'seed', 'from', 'to', 'loss'])
        for name, by_length in found.items():
            for length, runs in by_length.items():
                for seed, losses, short in zip(seeds, runs, by_length[T]):
                    bins = [(1, length, fmean(losses))]
                    bins += curve(losses, short, T, length) if length == max(by_length) else []
                    writer.writerows([name, length, seed, a, b, f'{loss:.4f}'] for a, b, loss in bins)


def draw(found, lengths, folder):
    """Loss by position: as trained, then RoPE read in every way; and the means at the largest length."""
    T, longest = lengths[0], lengths[-1]
    plain = [name for name in found if ', ' not in name]
    scaled = [name for name in found if name.startswith(ROPE)]
    fig, (left, middle, right) = panels(15, 5, columns=3)
    for ax, names, text in ((left, plain, 'as trained'), (middle, scaled, f'{ROPE}: ways to read on')):
        for name, color in zip(names, COLORS):
            length = max(found[name])
            curves = [curve(*both, T, length) for both in zip(found[name][length], found[name][T])]
            places = [math.sqrt(a * b) for a, b, _ in curves[0]]
            ax.plot(places, [fmean(x[2] for x in column) for column in zip(*curves)], color=color, label=name,
                    linewidth=1.5)
        ax.axvline(T, color='black', linewidth=0.8, linestyle='--')
        log2_axis(ax, [n for n in (1, 4, 16, *lengths) if n <= longest])
        ax.set_xlabel(f'position in a window of {longest} tokens (dashed: trained length)')
        ax.set_ylabel(LOSS)
        title(ax, text)
        ax.legend(frameon=False, fontsize=8)
    able = [name for name in found if longest in found[name]]
    for y, name in enumerate(reversed(able)):
        values = [fmean(curve) for curve in found[name][longest]]
        right.plot(values, [y] * len(values), 'o', color=COLORS[0], markersize=4)
        right.plot(fmean(map(fmean, found[name][T])), y, '|', color='black', markersize=12)
    right.set_yticks(range(len(able)), reversed(able))
    right.set_xlabel(f'mean {LOSS}')
    right.set_ylabel('')
    title(right, f'{longest} tokens: a dot is a seed; bar: mean at {T}')
    save_and_say(fig, folder, 'extrapolate')
