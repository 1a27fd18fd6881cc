"""Loss curves of any runs in one figure."""
import json
import os

import torch

from model import GPT, GPTConfig
from nanoblocks.experiments.figures import COLORS, LOSS, panels, save, title
from nanoblocks.experiments.runs import read_lines
from nanoblocks.formats import format_quantity

SCALES = {'step': 'training step', 'tokens': 'training tokens', 'seconds': 'training time (s)',
          'FLOPs': 'training compute (FLOPs)'}


def plot(folders, figure):
    """Loss curves of the runs in these folders, over steps, tokens, seconds and FLOPs."""
    runs = []
    for folder in folders:
        if os.path.isfile(os.path.join(folder, 'metrics.jsonl')):
            runs.append((os.path.basename(os.path.normpath(folder)), lines_with_flops(folder)))
        else:
            print(f'{folder} holds no metrics.jsonl and is left out')
    if not runs:
        raise ValueError('plot needs folders of runs: python bench.py plot out/*')
    draw(runs, figure)
    for name, lines in runs:
        losses = [line['val_loss'] for line in lines if line.get('val_loss') is not None]
        if losses:
            print(f'{name:30} best validation loss {min(losses):.4f}, last {losses[-1]:.4f}')
    print(f'drawn in {figure}')


def lines_with_flops(folder):
    """The lines of a run's metrics, and in each the FLOPs spent so far."""
    with open(os.path.join(folder, 'config.json')) as f:
        config = GPTConfig(**json.load(f)['model'])
    with torch.device('meta'):
        flops = GPT(config, seed=None).flops_per_token(config.block_size)
    lines = read_lines(os.path.join(folder, 'metrics.jsonl'))
    return [line | {'FLOPs': line['tokens'] * flops} for line in lines]


def draw(runs, path):
    """runs [(name, lines)] -> a panel for each scale, in the figure at path."""
    fig, axes = panels(12, 8.5, rows=2, columns=2, sharey=True)
    for ax, (scale, label) in zip(axes, SCALES.items()):
        for color, (name, lines) in enumerate(runs):
            for loss, style in (('train_loss', dict(alpha=0.4, linewidth=0.8)),
                                ('val_loss', dict(marker='o', markersize=4, label=name))):
                points = [(line[scale], line[loss]) for line in lines if line.get(loss) is not None]
                if points:
                    ax.plot(*zip(*points), color=COLORS[color % len(COLORS)], **style)
        ax.set_xlabel(label, fontsize=9)
        if scale in ('tokens', 'FLOPs'):
            ax.xaxis.set_major_formatter(lambda value, _: format_quantity(value))
    for ax in axes[::2]:
        ax.set_ylabel(LOSS.replace('validation ', ''), fontsize=9)
    title(axes[0], 'dots: validation loss; thin lines: training loss')
    axes[0].legend(fontsize=8, frameon=False)
    save(fig, path)
