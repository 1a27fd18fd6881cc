"""What topics that look inside trained models share: a run and its text, arms to train, a page of results."""
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import torch

from data.mixture import Sources
from model import GPT
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.studies import SIZE, trained_flags
from nanoblocks.experiments.sweep import machine, make_plan, runs_of, sweep
from nanoblocks.experiments.timing import print_table
from nanoblocks.formats import counted
from nanoblocks.objectives import objective_of
from nanoblocks.tokenizer import from_meta
from nanoblocks.training import checkpoint

OWN = ('device', 'figures')     # settings of bench.py that these topics read


class Trained(NamedTuple):
    """A trained model and its validation text."""
    model: GPT          # in fp32, not training
    tokenizer: object
    idx: torch.Tensor   # (B,T) int64: rows of the run's evaluations
    targets: torch.Tensor
    seed: int           # from which its parameters were drawn


def read_trained(folder, device, tokens):
    """The run of train.py in a folder, with at most this many tokens of text, and at least a row."""
    path = os.path.join(folder, 'ckpt.pt')
    held = checkpoint.load(path)
    model, settings = checkpoint.build(held, path).to(device).eval(), held['settings']
    c = model.config
    if c.n_encoder:
        raise ValueError(f'{folder} must hold a decoder or an encoder, and n_encoder={c.n_encoder} is both: '
                         'choose another run')
    task = objective_of(settings['objective'], held['meta'], settings['mask_rate'])
    data = Sources(settings['dataset']).open(c.block_size, settings['seed'],
                                             task.read_by('decoder' if c.causal else 'encoder'))
    batch = next(iter(data.eval_batches(tokens, tokens)))
    idx, targets = (x.to(device) for x in batch[:2])
    return Trained(model, from_meta(held['meta']['tokenizer']), idx, targets, settings['seed'])


def one_folder(topic, folders, argv):
    """The run that a command line names; ValueError where it names more, or what only training reads."""
    files, flags = files_and_flags(argv, without=OWN)
    if more := [*folders[1:], *files, *flags]:
        raise ValueError(f'{more[0].removeprefix("--")} must be left out: bench.py {topic} {folders[0]} '
                         'reads that one run and trains none')
    return folders[0]


def train_arms(topic, words, varied, argv, device):
    """
    A sweep of a config at study size and what --vary makes of it, in out/ablate/<topic>, two runs at once
    -> {arm: {seed: folder}}, the config first. Flags in argv come last, and so win.
    varied: flags that the topic itself sets.
    """
    given, _ = trained_flags(topic, argv, OWN, varied)
    words = [words[0], *SIZE[1:], *words[1:], f'--jobs={min(2, os.cpu_count() or 1)}', '--evals=3',
             f'--device={device}', f'--out_dir=out/ablate/{topic}', *given]
    print(f'{topic}: python ablate.py {shlex.join(words)}', flush=True)
    sweep(words)
    plan, found = make_plan(words), {}
    for run in runs_of(plan):
        found.setdefault(run['arm'], {})[run['seed']] = Path(plan['folder'], run['path'])
    return found


# ----------------------------------------------------------------------------------------------------------
# Telling


def with_effect(values, e, digits=3):
    """A cell: the mean of an arm, and in brackets its paired difference to the first arm, if e is given."""
    mean = f'{sum(values) / len(values):.{digits}f}'
    return mean if e is None else f'{mean} ({e.mean:+.{digits}f}{interval(e, digits)})'


def interval(e, digits=3):
    """Half the interval of an Effect, behind its mean; nothing where one seed gives none"""
    return f' ± {e.half:.{digits}f}' if e.n > 1 else ''


def verdict(what, e, more, less, size, digits=3):
    """A sentence about an Effect: `more` where it is resolved and above zero, `less` where below."""
    seeds = f'{counted(e.n, "seed")}, {size}'
    if e.n < 2:
        return f'{what}: {e.mean:+.{digits}f}, without an interval ({seeds}): not resolved.'
    said = (more if e.mean > 0 else less) if e.resolved else 'not resolved, as the interval includes zero'
    return f'{what}: {e.mean:+.{digits}f} ± {e.half:.{digits}f} (95 % interval, {seeds}): {said}.'


def write_page(figures, topic, tables, verdicts):
    """
    Print tables [(sentence, heads, rows)] and sentences, and write both to <topic>.md, in Markdown.
    """
    lines = [f'Measured on {machine()}.', '']
    for about, heads, rows in tables:
        print(f'\n{about}')
        print_table(heads, rows)
        lines += [about, '', *('| ' + ' | '.join(map(str, row)) + ' |'
                               for row in (heads, ['---'] * len(heads), *rows)), '']
    print('\n' + '\n'.join(verdicts))
    path = Path(figures, f'{topic}.md')
    path.write_text('\n'.join(lines + [f'- {sentence}' for sentence in verdicts]) + '\n')
    print(f'written to {path}')
