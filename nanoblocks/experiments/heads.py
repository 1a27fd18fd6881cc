"""
What attention heads look at: `bench.py heads`.

    previous, first, near   share of a query's attention that goes to the token before it, to the text's first
                            token, to itself and the 7 tokens before it; on validation text
    entropy                 of its attention, in bits; on the same text
    induction               share that goes to the token after the first occurrence of the query's own, on
                            rows of random tokens that are repeated once (Elhage et al. 2021,
                            https://transformer-circuits.pub/2021/framework; Olsson et al. 2022,
                            https://arxiv.org/abs/2209.11895)

On that row the token after the first occurrence is the only one that says what comes next, so the induction
score is the share on the relevant token, and the rest of the row is noise. Differential attention (Ye et al.
2024, https://arxiv.org/abs/2410.05258) claims to give less to noise.
"""
import csv
import math
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from model import DiffAttention, SoftmaxAttention
from nanoblocks.experiments.figures import COLORS, panels, save_and_say, title
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
TRAINED = ['config/llama_small.py', '--vary=DIFF: attn=diff', '--seeds=3', '--max_iters=1500']


def heads(folders, argv, figures, device):
    """What attention heads look at, in a run (heads out/run), or in plain and DIFF attention: 15 minutes."""
    if folders:
        folder = one_folder('heads', folders, argv)
        describe(*look(folder, device), folder, figures)
    else:
        compare(train_arms('heads', TRAINED, ('attn',), argv, device), figures, device)


def look(folder, device):
    """A run -> (its `Trained`, {measure: (layers,H)}, its layers with attention, {'copied', 'gain'})"""
    run = read_trained(folder, device, TOKENS)
    rows = repeated_rows(run).to(device)
    layers = attention_maps(run.model, run.idx, measured)
    if not layers:
        c = run.model.config
        raise ValueError(f'{folder} must hold a model with maps of attention, a softmax over keys, and with '
                         f'attn={c.attn} and layer_pattern={c.layer_pattern} it has none: choose another run')
    again = attention_maps(run.model, rows, induction)
    found = {name: torch.stack([values[name] for values in layers.values()]) for name in list(MEASURES)[:-1]}
    found['induction'] = torch.stack(list(again.values()))
    return run, {name: x.cpu() for name, x in found.items()}, list(layers), copying(run.model, rows)


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


def induction(p):
    """p (B,H,2n,2n) on rows that are repeated after n tokens -> (H,), the mean over the second copy"""
    n = p.shape[-1] // 2
    return back(shares(p), n - 1, n).mean((0, 2))


@torch.no_grad()
def copying(model, rows):
    """
    {'copied': share of the second copy that is the likeliest token, 'gain': nats per token by which its loss
    is below the first copy's}
    """
    n, logits = rows.shape[1] // 2, model(rows)[0][:, :-1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction='none')
    # the first token of the second copy follows nothing that would name it
    right = (logits.argmax(-1) == rows[:, 1:])[:, n:].float().mean().item()
    return {'copied': right, 'gain': (losses[:, :n - 1].mean() - losses[:, n:].mean()).item()}


# ----------------------------------------------------------------------------------------------------------
# One run


def describe(run, found, layers, copied, folder, figures):
    """The table of a run, every head's scores, and maps of some heads."""
    even = torch.ones(1, 1, *[run.idx.shape[1]] * 2).tril()
    plain = measured(even / even.sum(-1, keepdim=True))
    print(f'{folder}: each head on {len(run.idx)} rows of {run.idx.shape[1]} tokens; even: a head that gives '
          f'every key the same; {copied["copied"]:.1%} of a repeated row is copied right')
    rows = [[f'layer {layer} head {head}', *(f'{x[i, head]:.3f}' for x in found.values())]
            for i, layer in enumerate(layers) for head in range(found['first'].shape[1])]
    print_table(['head', *found], [*rows, ['even', *(f'{x.item():.3f}' for x in plain.values()), '-']])
    draw_scores(found, layers, figures)
    draw_maps(run, found, layers, figures)


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
    names = [name for name in found if name != 'entropy']
    best = {at for name in names for at in found[name].flatten().topk(most // len(names)).indices.tolist()}
    return [divmod(at, H) for at in sorted(best)]


def draw_maps(run, found, layers, figures):
    """Maps of the first tokens of the validation text, and of 12 random tokens that are repeated."""
    draw_grid(run, run.idx[:1, :24], found, layers, figures, 'maps')
    draw_grid(run, repeated_rows(run, 12)[:1].to(run.idx.device), found, layers, figures, 'repeated')


def draw_grid(run, idx, found, layers, figures, name):
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
    text = tokenizer.decode([token])[:most].replace(' ', '\u2423').replace('\t', '\u21e5')
    return text.replace('\r', '\u21b5').replace('\n', '\u21b5').replace('$', r'\$')


# ----------------------------------------------------------------------------------------------------------
# Plain against differential attention

COLUMNS = {'relevant': 'share on the relevant token', 'best': 'of the best head', 'noise': 'on all others',
           'first': 'on the first token', 'copied': 'copied right', 'gain': 'gain of the second copy (nats)'}


def compare(arms, figures, device):
    """arms {'llama_small', 'DIFF': {seed: folder}}: the page, the numbers of every head, and the figures."""
    numbers, lines, shown = {}, [], None
    for name, folder, seed in each([(arm, f, s) for arm, runs in arms.items() for s, f in runs.items()],
                                   lambda job: f'maps of {job[0]}, seed {job[2]}'):
        run, found, layers, copied = look(folder, device)
        numbers.setdefault(name, []).append(summary(found, copied))
        lines += [[name, seed, layer, head, *(f'{x[i, head].item():.4f}' for x in found.values())]
                  for i, layer in enumerate(layers) for head in range(found['first'].shape[1])]
        shown = shown or (run, found, layers, figures)
    with open(Path(figures, 'heads.csv'), 'w', newline='') as f:
        csv.writer(f).writerows([['arm', 'seed', 'layer', 'head', *found], *lines])
    page(numbers, run, figures)
    draw_scores(*shown[1:])
    draw_maps(*shown)
    draw_noise(numbers, figures)


def summary(found, copied):
    """What is compared, a number for each of COLUMNS: means over all heads, but for the best one"""
    relevant = found['induction'].mean().item()
    return {'relevant': relevant, 'best': found['induction'].max().item(), 'noise': 1 - relevant,
            'first': found['first'].mean().item(), **copied}


def page(numbers, run, figures):
    """The table of means and paired differences, and two sentences of verdict."""
    (plain, base), (_, diff) = numbers.items()
    effects = {key: effect([b[key] - a[key] for a, b in zip(base, diff)]) for key in COLUMNS}
    rows = [[name, *(with_effect([x[key] for x in values], None if name == plain else effects[key])
                     for key in COLUMNS)] for name, values in numbers.items()]
    c = run.model.config
    size = f'{c.n_layer} layers of width {c.n_embd}, {c.n_head} maps a layer'
    about = ('Attention of the second copy of rows of random tokens that are repeated once: means over heads '
             f'and {counted(len(base), "seed")}; in brackets, the difference to {plain}, 95 % intervals.')
    write_page(figures, 'heads', [(about, ['arm', *COLUMNS.values()], rows)], [
        verdict('DIFF minus plain attention, share of attention on irrelevant tokens', effects['noise'],
                'DIFF gives more to noise', 'DIFF gives less to noise', size),
        verdict('The same difference, share on the relevant token of the head that gives most to it',
                effects['best'], 'DIFF has the sharper head', 'plain attention has the sharper head', size)])


def draw_noise(numbers, figures):
    """Bars for the arms, a dot for each seed."""
    fig, axes = panels(10.5, 3.8, columns=3)
    texts = {'noise': 'share of attention on irrelevant tokens', 'best': 'share of the best head\non the '
             'relevant token', 'copied': 'share of the second copy named right'}
    for ax, (key, text) in zip(axes, texts.items()):
        for x, (values, color) in enumerate(zip(numbers.values(), COLORS)):
            ax.bar(x, fmean(value[key] for value in values), color=color, alpha=0.6)
            ax.plot([x] * len(values), [value[key] for value in values], 'o', color='black', markersize=3)
        ax.set_xticks(range(len(numbers)), ['plain', *list(numbers)[1:]])
        ax.set_ylim(0, 1)
        ax.set_ylabel(text)
        ax.grid(visible=False, axis='x')
    title(axes[0], 'mean over heads; a dot is a seed')
    save_and_say(fig, figures, 'noise')
