"""
What attention heads look at: `bench.py heads`.

    previous, first, near   share of a query's attention that goes to the token before it, to the text's first
                            token, to itself and the 7 tokens before it; on validation text
    entropy                 of its attention, in bits; on the same text
    induction               share that goes to the token after the first occurrence of the query's own, on
                            rows of random tokens that are repeated once (Elhage et al. 2021,
                            https://transformer-circuits.pub/2021/framework; Olsson et al. 2022,
                            https://arxiv.org/abs/2209.11895)

On such a row the token after the first occurrence is the only one that says what comes next, so the induction
score is the share on the relevant token, and the rest of the row is noise. Differential attention (Ye et al.
2024, https://arxiv.org/abs/2410.05258) claims to give less to noise. It is compared with plain attention in
models that learn to copy: 16 random letters, then the same letters from one of them on, around the end. Where
they begin is drawn for each row, so that a letter is found by what it is and not by how far back it is.
"""
import csv
import json
import math
import random
import string
from pathlib import Path
from statistics import fmean

import torch

from model import DiffAttention, SoftmaxAttention
from nanoblocks.experiments.figures import COLORS, panels, save_and_say, title
from nanoblocks.experiments.runs import run_script
from nanoblocks.experiments.statistics import effect
from nanoblocks.experiments.timing import print_table
from nanoblocks.experiments.topics import each
from nanoblocks.experiments.trained import (
    one_folder,
    read_trained,
    train_arms,
    verdict,
    with_effect,
    write_page,
)
from nanoblocks.formats import counted

START = 16      # queries before this one are left out: their keys are all near, and one of few is the first
NEAR = 8
TOKENS = 2048   # of validation text
ROWS = 16       # of random tokens
LONGEST = 64    # random tokens before they are repeated
MEASURES = {'previous': 'share on the\nprevious token', 'first': 'share on the\nfirst token',
            'near': f'share on the\nnearest {NEAR} tokens', 'entropy': 'entropy\n(bits)',
            'induction': 'induction: share on the token\nafter the first occurrence'}
DATA, LETTERS, COPIES = Path('out/heads'), 16, 50000    # of the task: its folder, letters of a row, rows
FIXED = ('attn', 'dataset', 'objective', 'block_size')     # attn is compared, the others are of the task
# Muon copies after some 300 steps, AdamW not within 1000
TRAINED = ['config/llama_small.py', '--vary=DIFF: attn=diff', '--seeds=5', '--objective=prefix',
           f'--block_size={2 * LETTERS + 1}', '--batch_size=32', '--optimizer=muon', '--muon_lr=0.01',
           '--learning_rate=3e-3', '--warmup_iters=20', '--max_iters=600']


def heads(folders, argv, figures, device):
    """What attention heads look at, in a run (heads out/run), or in plain and DIFF attention: 10 minutes."""
    if folders:
        folder = one_folder('heads', folders, argv)
        run, *found = look(folder, device, repeated_rows)
        describe(run, *found, folder, figures)
    else:
        words = [*TRAINED, f'--dataset={letters_to_copy(DATA)}']
        compare(train_arms('heads', words, FIXED, argv, device), figures, device)


def letters_to_copy(folder):
    """The dataset of letters and the same from one of them on, made unless it is there -> its folder"""
    rows, out = folder / 'rows.jsonl', folder / 'data'
    if not (out / 'meta.json').exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw, pairs = random.Random(0), []
        for _ in range(COPIES):
            letters = ''.join(draw.sample(string.ascii_letters + string.digits, LETTERS))
            first = draw.randrange(LETTERS)
            pairs.append({'source': letters, 'target': letters[first:] + letters[:first]})
        rows.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
        run_script('data/pairs/prepare.py', f'--input={rows}', f'--out={out}', '--tokenizer=bytes')
    return out


def look(folder, device, rows_of):
    """
    A run, and a function of it that gives rows with repeated tokens -> (its `Trained`, {measure: (layers,H)},
    its layers with attention, the share of repeated tokens that it names right)
    """
    run = read_trained(folder, device, TOKENS)
    rows = rows_of(run).to(device)
    key = relevant(rows)
    layers = attention_maps(run.model, run.idx, measured)
    if not layers:
        c = run.model.config
        raise ValueError(f'{folder} must hold a model with maps of attention, a softmax over keys, and with '
                         f'attn={c.attn} and layer_pattern={c.layer_pattern} it has none: choose another run')
    again = attention_maps(run.model, rows, lambda p: (induction(p, key), induction(squares(p), key)))
    found = {name: torch.stack([values[name] for values in layers.values()]) for name in list(MEASURES)[:-1]}
    found['induction'], found['squared'] = map(torch.stack, zip(*again.values()))
    return run, {name: x.cpu() for name, x in found.items()}, list(layers), copied(run.model, rows)


def repeated_rows(run, longest=LONGEST):
    """(ROWS,2n): n distinct random tokens of those in the run's text, and the same n again."""
    known = torch.tensor(sorted(set(run.idx.unique().tolist()) - set(run.tokenizer.ends)))
    n = min(longest, run.model.config.block_size // 2, len(known) // 2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([known[torch.randperm(len(known), generator=generator)[:n]] for _ in range(ROWS)])
    return rows.repeat(1, 2)


# ----------------------------------------------------------------------------------------------------------
# Maps


@torch.no_grad()
def attention_maps(model, idx, read=lambda p: p):
    """
    idx (B,T) -> {layer: read(p)} of each layer's p (B,H,T,T), the weight of each key in a query's sum of
    values, exactly as the model has it. Attention is linear in the values: with the identity in their place,
    it returns its weights, whatever rotated, masked, biased or capped the scores. Layers without a softmax
    over keys are left out. Rows sum to 1, or less beside sinks; differential attention's, which may be
    negative, to 1 - lambda.
    """
    found, maps, handles = {}, [], []
    owners = {m.scores: m for m in model.modules()
              if isinstance(getattr(m, 'scores', None), SoftmaxAttention)}

    def weigh(scores, args, _):
        q, k, v, ctx, key_pos = args
        eye = torch.eye(k.shape[1], dtype=v.dtype, device=v.device).unsqueeze(1)        # (S,1,S)
        weights = scores.forward(q, k, eye.expand(*k.shape[:3], -1), ctx, key_pos)      # (B,T,H,S)
        maps.append((owners[scores], weights.transpose(1, 2)))

    def collect(layer):
        def hook(*_):
            if maps:
                (owner, p), *second = maps
                if isinstance(owner, DiffAttention):
                    p = p - owner.lambda_() * second[0][1]
                found[layer] = read(p)
                maps.clear()
        return hook

    try:
        handles += [scores.register_forward_hook(weigh) for scores in owners]
        handles += [block.register_forward_hook(collect(layer)) for layer, block in enumerate(model.h)]
        model(idx)
    finally:
        for handle in handles:
            handle.remove()
    return found


def shares(p):
    """Weights as shares of attention: of negative ones the size counts, in units of all sizes of a query."""
    return p.abs() / p.abs().sum(-1, keepdim=True) if (p < 0).any() else p


def squares(p):
    """
    Squared weights in units of all of a query's: shares of what it reads, if values were unrelated vectors of
    one length. Many small weights count for less than in `shares`, whatever their signs.
    """
    return p.square() / p.square().sum(-1, keepdim=True)


def back(p, distance, start):
    """The shares p (...,T,T) of keys at a distance, of queries from `start` on: (...,T - start)"""
    return p.diagonal(-distance, dim1=-2, dim2=-1)[..., max(0, start - distance):]


def measured(p):
    """p (B,H,T,T) of a text -> {measure: (H,)}, all of MEASURES but induction"""
    p, start = shares(p), min(START, p.shape[-1] // 2)
    near = sum(back(p, distance, start) for distance in range(min(NEAR, start + 1)))
    values = {'previous': back(p, 1, start), 'first': p[..., start:, 0], 'near': near,
              'entropy': torch.special.entr(p[..., start:, :]).sum(-1) / math.log(2)}
    return {name: x.mean((0, 2)) for name, x in values.items()}


def relevant(idx):
    """
    idx (B,T) -> (B,T): where the token stands that follows the first occurrence of each token; -1 where that
    is its own, and where another token follows now than then, or none
    """
    earlier = (idx.unsqueeze(2) == idx.unsqueeze(1)).tril(-1)                       # (B,T,T)
    key = earlier.int().argmax(-1) + 1
    follows = torch.cat((idx[:, 1:] == idx.gather(1, key)[:, :-1], torch.zeros_like(idx[:, :1]).bool()), 1)
    return torch.where(earlier.any(-1) & follows, key, -1)


def induction(p, key):
    """p (B,H,T,T) and the relevant keys (B,T) of its rows -> (H,), the mean over queries that have one"""
    at = key.clamp(min=0)[:, None, :, None].expand(-1, p.shape[1], -1, -1)
    share = shares(p).gather(-1, at).squeeze(-1) * (key >= 0).unsqueeze(1)           # (B,H,T)
    return share.sum((0, 2)) / (key >= 0).sum()


@torch.no_grad()
def copied(model, rows):
    """The share of tokens behind those with a relevant key that the model names as the likeliest"""
    right = model(rows)[0][:, :-1].argmax(-1) == rows[:, 1:]
    return right[relevant(rows)[:, :-1] >= 0].float().mean().item()


# ----------------------------------------------------------------------------------------------------------
# One run


def describe(run, found, layers, right, folder, figures):
    """The table of a run, every head's scores, and maps of some heads."""
    even = torch.ones(1, 1, *[run.idx.shape[1]] * 2).tril()
    plain = measured(even / even.sum(-1, keepdim=True))
    print(f'{folder}: each head on {len(run.idx)} rows of {run.idx.shape[1]} tokens; even: a head that gives '
          f'every key the same; of repeated random tokens, {right:.1%} are named right')
    rows = [[f'layer {layer} head {head}', *(f'{found[name][i, head]:.3f}' for name in MEASURES)]
            for i, layer in enumerate(layers) for head in range(found['first'].shape[1])]
    print_table(['head', *MEASURES], [*rows, ['even', *(f'{x.item():.3f}' for x in plain.values()), '-']])
    draw_scores(found, layers, figures)
    draw_maps(run, run.idx[:1, :24], found, layers, figures, 'maps')
    draw_maps(run, repeated_rows(run, 12)[:1].to(run.idx.device), found, layers, figures, 'repeated')


def draw_scores(found, layers, figures):
    """A heat map of layers and heads for each measure."""
    H = found['first'].shape[1]
    fig, axes = panels(max(13, 5 + 0.9 * H), 2.2 + 0.28 * len(layers), columns=len(MEASURES))
    for ax, (name, text) in zip(axes, MEASURES.items()):
        values = found[name]
        top = None if name == 'entropy' else 1
        image = ax.imshow(values.numpy(), aspect='auto', vmin=0, vmax=top)
        if values.numel() <= 64:
            dark = (top or values.max().item()) * 0.6
            for i, row in enumerate(values.tolist()):
                for head, value in enumerate(row):
                    ax.text(head, i, f'{value:.2f}', ha='center', va='center', fontsize=7,
                            color='black' if value > dark else 'white')
        ax.set_xticks(range(0, H, max(1, H // 8)))
        ax.set_yticks(range(len(layers))[::max(1, len(layers) // 12)],
                      layers[::max(1, len(layers) // 12)])
        ax.set_xlabel('head')
        ax.set_ylabel('layer')
        ax.grid(visible=False)
        title(ax, text)
        fig.colorbar(image, ax=ax)
    save_and_say(fig, figures, 'heads')


def chosen(found, most=16):
    """[(row of a layer, head)]: all heads, or where they are many, the strongest in each share"""
    n, H = found['first'].shape
    if n * H <= most:
        return [(i, head) for i in range(n) for head in range(H)]
    names = [name for name in MEASURES if name != 'entropy']
    best = {at for name in names for at in found[name].flatten().topk(most // len(names)).indices.tolist()}
    return [divmod(at, H) for at in sorted(best)]


def draw_maps(run, idx, found, layers, figures, name):
    """Maps of one text, idx (1,T), queries from top to bottom."""
    maps, places = attention_maps(run.model, idx, shares), chosen(found)
    words = [label(run.tokenizer, token) for token in idx[0].tolist()]
    columns = min(4, len(places))
    rows = -(-len(places) // columns)
    fig, axes = panels(3.1 * columns + 1.4, 2.9 * rows + 0.9, rows=rows, columns=columns, sharex=True,
                       sharey=True)
    for ax, (i, head) in zip(axes, places):
        image = ax.imshow(maps[layers[i]][0, head].cpu().numpy(), vmin=0, vmax=1, cmap='Blues')
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=6, family='monospace')
        ax.set_yticks(range(len(words)), words, fontsize=6, family='monospace')
        ax.grid(visible=False)
        title(ax, f'layer {layers[i]} head {head}')
    for ax in axes[len(places):]:
        ax.set_visible(False)
    fig.supxlabel('key', fontsize=10)
    fig.supylabel('query', fontsize=10)
    fig.colorbar(image, ax=axes, label='share of attention', shrink=0.6)
    save_and_say(fig, figures, name)


def label(tokenizer, token, most=10):
    """A token as a tick: blanks and ends of lines visible."""
    if token in tokenizer.ends:
        return 'END'
    text = tokenizer.decode([token])[:most].replace(' ', '\u2423').replace('\t', '\u21e5')
    return text.replace('\r', '\u21b5').replace('\n', '\u21b5').replace('$', r'\$')


# ----------------------------------------------------------------------------------------------------------
# Plain against differential attention

COLUMNS = {'noise': 'share on irrelevant tokens', 'squared': 'of squared weights', 'best': 'least of a head',
           'best_squared': 'of its squared weights', 'first': 'on the first token', 'copied': 'copied right'}


def compare(arms, figures, device):
    """arms {'llama_small', 'DIFF': {seed: folder}}: the page, the numbers of every head, and the figures."""
    numbers, lines, shown = {}, [], {}
    for name, folder, seed in each([(arm, f, s) for arm, runs in arms.items() for s, f in runs.items()],
                                   lambda job: f'maps of {job[0]}, seed {job[2]}'):
        run, found, layers, right = look(folder, device, lambda run: run.idx)
        numbers.setdefault(name, []).append(summary(found, right))
        lines += [[name, seed, layer, head, *(f'{x[i, head].item():.4f}' for x in found.values())]
                  for i, layer in enumerate(layers) for head in range(found['first'].shape[1])]
        if seed == min(arms[name]):
            shown[name] = run, found, layers
    with open(Path(figures, 'heads.csv'), 'w', newline='') as f:
        csv.writer(f).writerows([['arm', 'seed', 'layer', 'head', *found], *lines])
    page(numbers, run, figures)
    draw_noise(numbers, figures)
    for name, (run, found, layers) in shown.items():
        draw_maps(run, run.idx[:1], found, layers, figures, f'copying_{name}')
    draw_scores(*next(iter(shown.values()))[1:], figures)


def summary(found, right):
    """A number for each of COLUMNS: of all heads, their mean"""
    noise, squared = (1 - found[name].flatten() for name in ('induction', 'squared'))
    best = noise.argmin()
    return {'noise': noise.mean().item(), 'squared': squared.mean().item(), 'best': noise[best].item(),
            'best_squared': squared[best].item(), 'first': found['first'].mean().item(), 'copied': right}


def page(numbers, run, figures):
    """The table of means and paired differences, and the sentences of verdict."""
    (plain, base), (_, diff) = numbers.items()
    effects = {key: effect([b[key] - a[key] for a, b in zip(base, diff)]) for key in COLUMNS}
    rows = [[name, *(with_effect([x[key] for x in values], None if name == plain else effects[key])
                     for key in COLUMNS)] for name, values in numbers.items()]
    c = run.model.config
    size = f'{c.n_layer} layers of width {c.n_embd}, {c.n_head} maps a layer'
    about = (f'Attention of copied letters, on {len(run.idx)} rows: means over heads and '
             f'{counted(len(base), "seed")}; in brackets, the difference to {plain} and its 95 % interval.')
    what = {'noise': 'share of attention on irrelevant tokens, mean over heads',
            'best': 'the same of the head that gives them least',
            'best_squared': 'the same of that head, of squared weights'}
    write_page(figures, 'heads', [(about, ['arm', *COLUMNS.values()], rows)], [
        verdict(f'DIFF minus plain attention, {text}', effects[key], 'DIFF gives more to noise',
                'DIFF gives less to noise', size) for key, text in what.items()])


def draw_noise(numbers, figures):
    """Bars for the arms, a dot for each seed."""
    fig, axes = panels(12, 3.8, columns=4, sharey=True)
    texts = {'noise': 'irrelevant tokens, all heads', 'best': 'the head with the least',
             'best_squared': 'the same, squared weights', 'copied': 'letters copied right'}
    for ax, (key, text) in zip(axes, texts.items()):
        for x, (values, color) in enumerate(zip(numbers.values(), COLORS)):
            ax.bar(x, fmean(value[key] for value in values), color=color, alpha=0.6)
            ax.plot([x] * len(values), [value[key] for value in values], 'o', color='black', markersize=3)
        ax.set_xticks(range(len(numbers)), ['plain', *list(numbers)[1:]])
        ax.set_ylim(0, 1.05)
        ax.tick_params(labelleft=True)
        ax.set_ylabel('share of letters' if key == 'copied' else 'share of attention')
        ax.grid(visible=False, axis='x')
        title(ax, text)
    fig.suptitle('a dot is a seed', fontsize=10, x=0.01, ha='left')
    save_and_say(fig, figures, 'noise')
