"""
A decoder, an encoder, and both, on the same two tasks at equal parameters: `bench.py architectures`.

    sort     16 random letters; the answer is the same letters in the order of the alphabet
    spans    code with spans cut out; the answer is what was cut out (objectives.Span)

A decoder reads the question and continues it. Beside an encoder, it attends to what that makes of the
question. An encoder alone names all tokens of an answer at once, each in its place.
"""
import json
import os
import random
import string
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from data.mixture import Sources
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.figures import COLORS, panels, save_and_say, title
from nanoblocks.experiments.runs import run_script
from nanoblocks.experiments.statistics import effect
from nanoblocks.experiments.studies import SIZE
from nanoblocks.experiments.sweep import make_plan, runs_of, sweep
from nanoblocks.experiments.timing import medians, print_table
from nanoblocks.experiments.topics import tell
from nanoblocks.formats import format_quantity
from nanoblocks.objectives import objective_of
from nanoblocks.training import checkpoint

LETTERS, ROWS = 16, 50000
# beside an encoder, half of the blocks are the decoder's
VARY = '--vary=encoder: causal=False; both: n_encoder=2+n_layer=2'
TASKS = {
    'sort': ['--objective=prefix', f'--block_size={2 * LETTERS + 1}', '--batch_size=32'],
    'spans': ['--objective=span', '--mask_rate=0.3', '--batch_size=16'],
}


def architectures(argv, figures, device):
    """A decoder, an encoder and both on two tasks, at equal parameters, three seeds."""
    files, flags = files_and_flags(argv, without=('device', 'figures'))
    found = {}
    for task, words in TASKS.items():
        folder = Path(figures) / 'architectures' / task
        words = [*SIZE, *files, VARY, '--match=active', '--seeds=3', '--evals=6',
                 f'--jobs={min(2, os.cpu_count() or 1)}', f'--device={device}', *words, *flags]
        if task == 'sort':
            words.append(f'--dataset={letters_to_sort(folder)}')
        words.append(f'--out_dir={folder}')
        sweep(words)
        found[task] = judged(make_plan(words), folder, device)
    print('\nReports above count the marks of spans, which an encoder does not name; these tables do not.')
    for task, arms in found.items():
        print(f'\n{task}: the mean of {len(next(iter(arms.values()))["loss"])} seeds; in brackets, the '
              'difference to the decoder and its 95 % interval')
        print_table(['model', 'parameters', 'loss (nats)', 'tokens right', 'answers right',
                     'first token ms', 'answer ms'], [row(name, arms) for name in arms])
    draw(found, figures)


def letters_to_sort(folder):
    """The dataset of letters and the same letters in order, made unless it is there -> its folder"""
    rows, out = folder / 'rows.jsonl', folder / 'data'
    if not (out / 'meta.json').exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        questions = (''.join(draw.choices(string.ascii_lowercase, k=LETTERS)) for _ in range(ROWS))
        rows.write_text(''.join(json.dumps({'source': letters, 'target': ''.join(sorted(letters))}) + '\n'
                                for letters in questions))
        run_script('data/pairs/prepare.py', f'--input={rows}', f'--out={out}', '--tokenizer=bytes')
    return out


# ----------------------------------------------------------------------------------------------------------
# Judging a run by the answers


def judged(plan, folder, device):
    """
    {arm: {'parameters', 'loss', 'accuracy', 'exact': [a number for each seed], 'first', 'answer': ms}}, the
    last two of the first seed's run, with one question at a time.
    """
    found, questions = {}, {}
    for run in runs_of(plan):
        tell(f'{folder.name}: answers of {run["path"]}')
        name, path = run['arm'].replace(plan['reference'], 'decoder'), folder / run['path'] / 'ckpt.pt'
        held = checkpoint.load(path)
        model = checkpoint.build(held, str(path)).to(device).eval()
        batches = validation(held, model, device)
        numbers = found.setdefault(name, {'parameters': model.num_params()})
        for key, value in answers(model, batches, held['meta']['vocab_size']).items():
            numbers.setdefault(key, []).append(value)
        questions.setdefault(name, (model, {key: x[:1] for key, x in batches[0].items()}))
    for key, most in (('first', 1), ('answer', None)):
        runs = {name: partial(written, *question, most) for name, question in questions.items()}
        for name, ms in medians(runs, 15, device).items():
            found[name][key] = ms
    return found


def validation(held, model, device):
    """The batches of a run's evaluations, as the model calls their tensors."""
    settings = held['settings']
    task = objective_of(settings['objective'], held['meta'], settings['mask_rate']).read_by(kind_of(model))
    data = Sources(settings['dataset']).open(model.config.block_size, settings['seed'], task)
    return [{key: x.to(device) for key, x in zip(task.names, batch)}
            for batch in data.eval_batches(settings['batch_size'], settings['eval_tokens'])]


def kind_of(model):
    return 'both' if model.encoder is not None else 'decoder' if model.config.causal else 'encoder'


@torch.no_grad()
def answers(model, batches, vocab_size):
    """
    {'loss': nats per token of the answers, 'accuracy': share of them that are the likeliest, both given the
    right tokens before them; 'exact': share of the answers that are right where the model writes them alone}
    """
    loss, right, count, exact, rows = 0.0, 0, 0, 0, 0
    for batch in batches:
        targets = batch['targets']
        asked = (targets >= 0) & (targets < vocab_size)     # without the marks of spans
        logits = model(**{key: x for key, x in batch.items() if key != 'targets'})[0].float()
        losses = F.cross_entropy(logits[asked], targets[asked], reduction='none')
        loss, count = loss + losses.double().sum().item(), count + len(losses)
        right += (logits.argmax(-1) == targets)[asked].sum().item()
        found, named = written(model, batch), targets >= 0
        # of a decoder, the new tokens; else a token at each place
        wanted = targets[named].view(len(targets), -1)
        found = found if found.shape == wanted.shape else found[named].view_as(wanted)
        exact, rows = exact + (found == wanted).all(-1).sum().item(), rows + len(targets)
    return {'loss': loss / count, 'accuracy': right / count, 'exact': exact / rows}


@torch.no_grad()
def written(model, batch, most=None):
    """
    What the model writes, the likeliest token each time: an encoder a token at each place (B,T), a decoder
    (B,n) as many as were asked for, at most `most`. Of each row, as many tokens must be asked for.
    """
    idx, targets = batch['idx'], batch['targets']
    if not model.config.causal:
        return model(idx)[0].argmax(-1)
    named = targets[0] >= 0
    begin = named.int().argmax().item() + 1
    source = {'source': batch['source']} if 'source' in batch else {}
    new = min(named.sum().item(), most or len(named))
    return model.generate(idx[:, :begin], new, temperature=0, **source)[:, begin:]


# ----------------------------------------------------------------------------------------------------------
# Telling


def row(name, arms):
    """A line of the table."""
    arm, decoder = arms[name], arms['decoder']
    cells = [name, format_quantity(arm['parameters'])]
    for key, digits in (('loss', 4), ('accuracy', 4), ('exact', 4)):
        cell = f'{fmean(arm[key]):.{digits}f}'
        if name != 'decoder':
            e = effect([a - b for a, b in zip(arm[key], decoder[key])])
            cell += f' ({e.mean:+.{digits}f} ± {e.half:.{digits}f})'
        cells.append(cell)
    return [*cells, f'{arm["first"]:.1f}', f'{arm["answer"]:.1f}']


def draw(found, figures):
    """A row of panels for each task: the loss, the share of right tokens, and the time of an answer."""
    fig, axes = panels(10.5, 6.4, rows=len(found), columns=3)
    for (task, arms), row in zip(found.items(), zip(*[iter(axes)] * 3)):
        names = list(arms)
        for ax, key, text in zip(row, ('loss', 'accuracy'), ('loss (nats per token of the answer)',
                                                             'share of right tokens')):
            for x, (name, color) in enumerate(zip(names, COLORS)):
                ax.bar(x, fmean(arms[name][key]), color=color, alpha=0.6)
                ax.plot([x] * len(arms[name][key]), arms[name][key], 'o', color='black', markersize=3)
            ax.set_ylabel(text)
        first = [arms[name]['first'] for name in names]
        rest = [max(0.0, arms[name]['answer'] - arms[name]['first']) for name in names]
        row[2].bar(range(len(names)), first, color=COLORS[:3], label='first token')
        row[2].bar(range(len(names)), rest, bottom=first, color=COLORS[:3], alpha=0.4, label='all others')
        row[2].set_ylabel('one answer (ms)')
        for ax in row:
            ax.set_xticks(range(len(names)), names)
            ax.grid(visible=False, axis='x')
        title(row[0], f'{task}: a dot is a seed')
        title(row[1], f'{task}: given the tokens before')
        title(row[2], f'{task}: dark, until the first token')
    save_and_say(fig, figures, 'architectures')
