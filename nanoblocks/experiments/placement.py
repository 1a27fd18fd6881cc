"""
Where norms stand: `bench.py placement`.

Four placements (norm_at), shallow and deep, with and without warmup of the learning rate. A norm on the sum
(post, Vaswani et al. 2017) scales every gradient that passes it, and deep models of that kind need warmup
(Xiong et al. 2020, https://arxiv.org/abs/2002.04745; Nguyen and Salazar 2019, https://arxiv.org/abs/1910.05895).

A run has failed where its loss is not finite, or hardly below that of a unigram model: it has learned which
tokens are frequent, and nothing of what stands before them.
"""
import math
from pathlib import Path
from statistics import fmean

import torch

from data.mixture import Sources
from model import GPT, NORM_AT, GPTConfig
from nanoblocks.experiments.arms import config_of
from nanoblocks.experiments.figures import COLORS, panels, save_and_say, title
from nanoblocks.experiments.pages import signed, size_of, tell
from nanoblocks.experiments.report import write_csv
from nanoblocks.experiments.runs import read_lines, read_run, recorded
from nanoblocks.experiments.statistics import effect, holm
from nanoblocks.experiments.studies import SIZE, trained_flags
from nanoblocks.experiments.sweep import make_plan, runs_of, runs_on, sweep
from nanoblocks.experiments.topics import each, sizes

SMALL = ['--n_embd=64', '--n_head=2', '--block_size=64', '--max_iters=600', '--warmup_iters=200',
         '--learning_rate=1e-3', '--log_interval=10', '--eval_tokens=65536']
PRE, *OTHERS = NORM_AT      # the reference, and what is compared with it
VARY = '--vary=' + '; '.join(f'{name}: norm_at={name}' for name in OTHERS)
FIXED = ('norm_at', 'n_layer', 'objective', 'bad_step_limit')
MARGIN = 0.1    # nats by which a run must be below a unigram model, or it has failed


def placement(argv, layers, device, figures):
    """Norms before, behind and around branches, at two depths, with and without warmup; 25 minutes."""
    folder = Path(figures) / 'placement'
    cells = {}
    for (depth, warmup), words in each(words_of(argv, layers, device, folder / 'runs').items(), name_of_item):
        sweep(words)
        cells[depth, warmup] = make_plan(words)
    found = {cell: read_cell(plan) for cell, plan in cells.items()}
    plan = next(plan for (_, warmup), plan in cells.items() if warmup)
    unigram = unigram_loss(plan['arms'][plan['reference']])
    slopes = {depth: gradients(plan) for (depth, warmup), plan in cells.items() if warmup}
    tables, verdict = tables_of(found, slopes, unigram), verdict_of(found, unigram, size_of(plan))
    tell(folder, 'Where norms stand', argv, [about(plan, unigram)], verdict, tables, LIMITS)
    write_csv(folder / 'placement.csv', numbers(found, unigram), 'run')
    draw(found, slopes, unigram, folder)


def words_of(argv, layers, device, folder):
    """{(depth, whether there is warmup): command line of a sweep}"""
    words, given = trained_flags('placement', argv, ('device', 'layers', 'figures'), FIXED)
    if given.get('warmup_iters') == '0':
        raise ValueError('warmup_iters=0 must be above 0: bench.py placement compares it with none')
    # a run whose gradients are not finite must come to its end, and be counted
    words = [*SIZE, *SMALL, VARY, '--seeds=3', '--evals=2', *runs_on(device),
             '--bad_step_limit=1000000000', *words]
    found = {}
    for depth in sizes('layers', layers, 4, 12):
        for warmup in (False, True):
            name = name_of(depth, warmup).replace(',', '').replace(' ', '_')
            found[depth, warmup] = [*words, f'--n_layer={depth}', *['--warmup_iters=0'] * (not warmup),
                                    f'--out_dir={Path(given.get("out_dir", folder), name)}']
    return found


def name_of(depth, warmup):
    return f'{depth} layers, {"with" if warmup else "without"} warmup'


def name_of_item(item):
    return name_of(*item[0])


# ----------------------------------------------------------------------------------------------------------
# Reading


def read_cell(plan):
    """{placement: {seed: (final loss, [(step, mean training loss since the one before)])}} of a sweep"""
    found = {}
    for run in runs_of(plan):
        path = Path(plan['folder']) / run['path']
        curve = [(line['step'], line['train_loss']) for line in read_lines(path / 'metrics.jsonl')
                 if line.get('train_loss') is not None]
        arm = run['arm'].replace(plan['reference'], PRE)
        found.setdefault(arm, {})[run['seed']] = read_run(path, run['flags']['max_iters']).loss, curve
    return found


def unigram_loss(flags):
    """
    The validation loss of a unigram model: each token has the share that it has in the batches of a run, to
    which every token of the vocabulary is added once.
    """
    sources, T, rows = Sources(flags['dataset']), config_of(flags).block_size, flags['batch_size']
    data = sources.open(T, flags['seed'])
    counts = torch.ones(sources.read_meta()['vocab_size'], dtype=torch.float64)
    for number in range(flags['max_iters'] * flags['gradient_accumulation_steps']):
        counts += data.train_batch(number * rows, rows)[1].flatten().bincount(minlength=len(counts))
    losses, tokens = -(counts / counts.sum()).log(), flags['eval_tokens'] or flags['eval_iters'] * rows * T
    targets = [torch.cat([y for _, y in part.eval_batches(rows, tokens)]) for part in data.parts]
    return data.judged([losses[y].mean().item() for y in targets])[0]


def failed(loss, unigram):
    return not loss < unigram - MARGIN  # nan is not below


def gradients(plan):
    """{placement: [the norm of each block's gradient]} at the first step of the first seed."""
    found = {}
    for run in runs_of(plan)[:len(plan['arms'])]:
        config = GPTConfig(**recorded(Path(plan['folder']) / run['path'])[0])
        data = Sources(run['flags']['dataset']).open(config.block_size, run['seed'])
        model = GPT(config, seed=run['seed'])
        model(*data.train_batch(0, run['flags']['batch_size']))[1].backward()
        found[run['arm'].replace(plan['reference'], PRE)] = [norm_of(block) for block in model.h]
    return found


def norm_of(block):
    """The norm of the gradients of a module's parameters, all in one."""
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in block.parameters()))


# ----------------------------------------------------------------------------------------------------------
# Telling


def against(found, other):
    """The Effect of one {seed: (loss, curve)} against another."""
    return effect([found[seed][0] - other[seed][0] for seed in found.keys() & other.keys()])


def told(e, p=0.0):
    """An Effect in words. p: among all that are told, after Holm."""
    if math.isnan(e.mean):
        return 'not finite'
    return signed(e) + (', not resolved' if not e.resolved else ', not after Holm' * (not p < 0.05))


def failures(runs, unigram):
    """How many of the runs {seed: (loss, curve)} have failed, in words; nothing if none."""
    n = sum(failed(loss, unigram) for loss, _ in runs.values())
    return f'failed in {n} of {len(runs)} runs' if n else ''


def tables_of(found, slopes, unigram):
    """{caption: (heads, rows)}: losses, what warmup changes, and gradients at the start."""
    names, losses, warmups, norms = list(next(iter(found.values()))), [], [], []
    for cell, runs in found.items():
        losses.append([name_of(*cell), *(loss_cell(runs[name], runs[PRE], unigram) for name in names)])
    for depth, norm in slopes.items():
        without, with_ = found[depth, False], found[depth, True]
        warmups.append([f'{depth} layers', *(told(against(with_[name], without[name])) for name in names)])
        norms += [[f'{depth} layers, {text}', *(f'{norm[name][i]:.3g}' for name in names)]
                  for i, text in ((0, 'first'), (-1, 'last'))]
    heads = ['', *names]
    return {'Final validation loss (nats per token), in brackets its difference to pre': (heads, losses),
            'Loss with warmup minus loss without it': (heads, warmups),
            'Norm of the gradient of a block before the first step': (heads, norms)}


def loss_cell(runs, pre, unigram):
    mean, e = mean_loss(runs), against(runs, pre)
    words = [mean, f'({signed(e)})' * (runs is not pre and math.isfinite(e.mean)), failures(runs, unigram)]
    return ' '.join(filter(None, words))


def mean_loss(runs):
    mean = fmean(loss for loss, _ in runs.values())
    return f'{mean:.3f}' if math.isfinite(mean) else 'not finite'


def verdict_of(found, unigram, size):
    """A sentence for each depth and warmup."""
    effects = {(cell, name): against(runs[name], runs[PRE]) for cell, runs in found.items()
               for name in runs if name != PRE and not failures(runs[name], unigram)}
    p, lines = dict(zip(effects, holm([e.p for e in effects.values()]))), []
    for cell, runs in found.items():
        said = [f'{name} ' + (failures(runs[name], unigram) or told(effects[cell, name], p[cell, name]))
                for name in runs if name != PRE]
        pre = failures(runs[PRE], unigram) or f'loss {mean_loss(runs[PRE])}'
        lines.append(f'{name_of(*cell)}, against pre ({pre}): {"; ".join(said)}.')
    return [*lines, f'({size}; intervals of 95 % over seeds; "not after Holm": resolved by itself, but not '
            'among all of these.)']


def about(plan, unigram):
    flags = plan['arms'][plan['reference']]
    return (f'Learning rate {flags["learning_rate"]:g}; the warmup takes {flags["warmup_iters"]} of the '
            f'{flags["max_iters"]} steps. A unigram model has a loss of {unigram:.3f}: a run has failed that '
            f'ends above {unigram - MARGIN:.3f}, or with no finite loss.')


LIMITS = [
    'All placements have one learning rate; at another, others may fail.',
    'Weights are drawn as in GPT-2, with a standard deviation of 0.02 and smaller branches in deeper models. '
    'The papers draw larger ones.',
    'Gradients are clipped to a norm of 1.',
    'The ranks of those that learn are ranks after minutes of training, of narrow models.',
]


def numbers(found, unigram):
    """{run: {column: value}} of every run."""
    rows = {}
    for (depth, warmup), runs in found.items():
        for name, by_seed in runs.items():
            for seed, (loss, _) in by_seed.items():
                rows[f'{name_of(depth, warmup)}, {name}, seed {seed}'] = {
                    'layers': depth, 'warmup': warmup, 'norm_at': name, 'seed': seed, 'loss': loss,
                    'unigram': unigram, 'failed': failed(loss, unigram)}
    return rows


def draw(found, slopes, unigram, folder):
    """A row for each depth: loss curves without and with warmup, and gradients at the start."""
    fig, axes = panels(13.5, 3.8 * len(slopes), rows=len(slopes), columns=3)
    curves = [curve for runs in found.values() for by_seed in runs.values() for _, curve in by_seed.values()]
    # without the first steps, and without what lies far above a unigram model
    shown = [min(loss, unigram + 1) for curve in curves for _, loss in curve[1:]] or [unigram]
    steep = [x for norms in slopes.values() for of in norms.values() for x in of if x > 0] or [1.0]
    for (depth, norms), row in zip(slopes.items(), zip(*[iter(axes)] * 3)):
        for ax, warmup in zip(row, (False, True)):
            for name, color in zip(norms, COLORS):
                for n, (_, curve) in enumerate(found[depth, warmup][name].values()):
                    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
                    ax.plot(steps, losses, color=color, linewidth=1, label='' if n else name)
            ax.axhline(unigram, color='black', linewidth=0.8, linestyle='--')
            ax.set_ylim(min(shown) - 0.1, max(*shown, unigram) + 0.1)
            ax.set_xlabel('training step (dashed: a unigram model)')
            ax.set_ylabel('training loss (nats per token)')
            title(ax, f'{name_of(depth, warmup)}: a line is a seed')
        for name, color in zip(norms, COLORS):
            row[2].plot(range(1, depth + 1), norms[name], 'o-', color=color, markersize=3)
        row[2].set_yscale('log')
        row[2].set_ylim(min(steep) / 1.3, max(steep) * 1.3)
        row[2].xaxis.get_major_locator().set_params(integer=True)
        row[2].set_xlabel('block')
        row[2].set_ylabel('norm of its gradient')
        title(row[2], f'{depth} layers, before the first step')
    axes[0].legend(frameon=False, fontsize=9, title='norm_at', title_fontsize=9)
    save_and_say(fig, folder, 'placement')
