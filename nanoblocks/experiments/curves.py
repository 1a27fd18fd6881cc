"""Loss curves of any runs in one figure."""
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from nanoblocks.experiments.figures import COLORS, LOSS, even_ticks, panels, save, title
from nanoblocks.experiments.runs import read_lines

SCALES = {'step': 'training step', 'tokens': 'training tokens', 'seconds': 'training time (s)',
          'FLOPs': 'training compute (FLOPs)'}
STYLES = '-', '--', ':', '-.'


class Curve(NamedTuple):
    """The measurements of one run."""
    arm: str            # its label: the runs of one arm share it
    name: str
    lines: list         # of its metrics, each with the FLOPs spent so far
    nats_per_bit: float     # nats per token over bits per byte; nan without an evaluation

    def points(self, scale, loss, per_byte):
        unit = self.nats_per_bit if per_byte else 1.0
        return [(line[scale], line[loss] / unit) for line in self.lines if line.get(loss) is not None]


def plot(folders, figure):
    """Loss curves of the runs in these folders, over steps, tokens, seconds and FLOPs."""
    found = []
    for folder in folders:
        paths = runs_in(folder)
        if not paths:
            print(f'{folder} holds no metrics.jsonl and is left out')
        found += paths
    if not found:
        raise ValueError('plot needs folders of runs: python bench.py plot out/*')
    runs = [read_curve(path, *names) for path, names in zip(found, short_names(found))]
    units = [run.nats_per_bit for run in runs if not math.isnan(run.nats_per_bit)]
    # the ratio is the bytes of a token, times ln 2: where it differs, so do the tokens
    per_byte = bool(units) and max(units) > 1.001 * min(units)
    if per_byte:
        print('these runs have different tokens, so the losses are in bits per byte')
        for run in runs:
            if math.isnan(run.nats_per_bit):
                print(f'{run.name} has no bits per byte and is left out')
        runs = [run for run in runs if not math.isnan(run.nats_per_bit)]
    draw(runs, figure, per_byte)
    for run in runs:
        losses = [loss for _, loss in run.points('step', 'val_loss', per_byte)]
        if losses:
            print(f'{run.name:30} best validation loss {min(losses):.4f}, last {losses[-1]:.4f}')
    print(f'drawn in {figure}')


def runs_in(folder):
    """The folder if it is that of a run; those of all runs if it is that of a sweep."""
    if os.path.isfile(os.path.join(folder, 'metrics.jsonl')):
        return [folder]
    if os.path.isfile(os.path.join(folder, 'sweep.json')):
        return sorted(str(path.parent) for path in Path(folder).glob('*/seed*/metrics.jsonl'))
    return []


def short_names(folders):
    """
    [(label, name)]: as few of the last parts of each path as tell the runs apart. The label of a run of a
    sweep is its arm; its name has the seed too, where the arm has several.
    """
    parts = [Path(folder).absolute().parts for folder in folders]
    seeds = [path[-1] if re.fullmatch(r'seed\d+(_lr.*)?', path[-1]) else '' for path in parts]
    parts = [path[:-1] if seed else path for path, seed in zip(parts, seeds)]
    for n in range(1, max(map(len, parts)) + 1):
        labels = ['/'.join(path[-n:]) for path in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return [(label, f'{label} {seed}' if labels.count(label) > 1 else label)
            for label, seed in zip(labels, seeds)]


def read_curve(folder, arm, name):
    """The Curve of a run."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        config = GPTConfig(**json.load(f)['model'])
    with torch.device('meta'):
        flops = GPT(config, seed=None).flops_per_token(config.block_size)
    lines = [line | {'FLOPs': line['tokens'] * flops}
             for line in read_lines(os.path.join(folder, 'metrics.jsonl')) if 'tokens' in line]
    ratios = [line['val_loss'] / line['val_bpb'] for line in lines
              if line.get('val_loss') and line.get('val_bpb')]
    return Curve(arm, name, lines, ratios[-1] if ratios else math.nan)


def draw(runs, path, per_byte=False):
    """A panel for each scale, in the figure at path. The runs of one arm share a color."""
    fig, axes = panels(12, 8.5, rows=2, columns=2, sharey=True)
    arms = list(dict.fromkeys(run.arm for run in runs))
    looks = {arm: dict(color=COLORS[n % len(COLORS)], linestyle=STYLES[n // len(COLORS) % len(STYLES)])
             for n, arm in enumerate(arms)}
    for ax, (scale, label) in zip(axes, SCALES.items()):
        for run in runs:
            train, val = (run.points(scale, loss, per_byte) for loss in ('train_loss', 'val_loss'))
            if train:
                ax.plot(*zip(*train), **looks[run.arm], alpha=0.4, linewidth=0.8)
            if val:
                ax.plot(*zip(*val), **looks[run.arm], marker='o', markersize=4, label=run.arm)
        ax.set_xlabel(label, fontsize=9)
        ax.set_ylabel('loss (bits per byte)' if per_byte else LOSS.replace('validation ', ''), fontsize=9)
        ax.tick_params(labelleft=True)
        even_ticks(ax)
    title(axes[0], 'dots: validation loss; thin lines: training loss')
    shown = dict(zip(*reversed(axes[0].get_legend_handles_labels())))  # one line for the seeds of an arm
    axes[0].legend(shown.values(), shown.keys(), fontsize=8, frameon=False)
    save(fig, path)
