"""
Which experts take which tokens: `bench.py specialists`.

    lift    of the tokens that an expert takes, the share that is of a kind, over the share of all tokens: at
            2, it takes twice as many of them as an expert that looks at nothing
    bits    mutual information between the first of a token's experts and a label of the token: its kind, how
            common it is, or which token it is; above the same with the labels shuffled, as counts of a finite
            text never come out independent
    share   bits over the entropy of the first expert, both above the shuffled ones: 1 where the label decides
            it, 0 where it says nothing (Vinh et al. 2010, adjusted mutual information)

Mixtral's authors (Jiang et al. 2024, https://arxiv.org/abs/2401.04088, section 5) find that experts follow
syntax rather than topics, and OpenMoE's (Xue et al. 2024, https://arxiv.org/abs/2402.01739) that the token
alone decides most of the routing. DeepSeek's find more specialised experts where a bias balances them instead
of a loss (https://arxiv.org/abs/2412.19437, section 4.5.3).
"""
import csv
import keyword
import math
from pathlib import Path
from statistics import fmean

import torch

from model import GPT, MoE
from nanoblocks.experiments.figures import COLORS, panels, save_and_say, title
from nanoblocks.experiments.statistics import effect
from nanoblocks.experiments.timing import print_table
from nanoblocks.experiments.topics import each
from nanoblocks.experiments.trained import (
    interval,
    one_folder,
    read_trained,
    train_arms,
    verdict,
    write_page,
)
from nanoblocks.formats import counted

KINDS = ('keyword', 'word begins', 'word goes on', 'digits', 'punctuation', 'blanks', 'line end, indent',
         'other')
BANDS = ('commonest fourth', 'second fourth', 'third fourth', 'rarest fourth')
LABELS = {'kind': 'its kind', 'band': 'how common it is', 'token': 'which token it is'}
ROWS, TOKENS = 32, 65536    # rows of a forward pass; tokens of validation text
ARMS = {'mixtral_small': 'balanced by a loss', 'untrained': 'untrained', 'bias': 'balanced by a bias'}
TRAINED = ['config/mixtral_small.py', '--vary=bias: balance=bias+bias_rate=0.01', '--seeds=5',
           '--max_iters=1000']


def specialists(folders, argv, figures, device):
    """Which experts take which kinds of tokens, in a run (specialists out/run) or its own ten: 15 minutes."""
    if folders:
        folder = one_folder('specialists', folders, argv)
        run, labels = read_labels(folder, device)
        describe(run, labels, routes(run.model, run.idx), folder, figures)
    else:
        arms = train_arms('specialists', TRAINED, ('balance', 'bias_rate'), argv, device)
        compare(arms, figures, device)


def read_labels(folder, device):
    """A run -> (its `Trained`, {label: (N,) int64} of every token of its text, on the CPU)"""
    run = read_trained(folder, device, TOKENS)
    if not experts_of(run.model):
        raise ValueError(f'{folder} must hold a model with experts, and ffn_pattern='
                         f'{run.model.config.ffn_pattern} has none: choose another run')
    idx = run.idx.cpu()
    texts = {i: '' if i in run.tokenizer.ends else run.tokenizer.decode([i]) for i in idx.unique().tolist()}
    kinds = [kind for row in idx.tolist() for kind in kinds_of([texts[i] for i in row])]
    token = idx.flatten()
    return run, {'kind': torch.tensor(kinds), 'band': bands(token), 'token': token}


# ----------------------------------------------------------------------------------------------------------
# Kinds of tokens


def kinds_of(texts):
    """The texts of a row's tokens, '' for the end of a document -> the kind of each, a number in KINDS"""
    line, found = 'a line begun before the row. ', []
    for text, after in zip(texts, [*texts[1:], '']):
        found.append(KINDS.index(kind_of(text, line, after)))
        line = (line + text).rpartition('\n')[2] if text else ''
    return found


def kind_of(text, line, after):
    """line: what stands before the token on its line; after: the text of the next token"""
    body, before = text.strip(), line[-1:]
    if not body:
        indent = '\n' in text or not line.strip()
        return 'other' if not text else 'line end, indent' if indent else 'blanks'
    if body[0].isdigit():
        return 'digits'
    if not body[0].isalpha():
        return 'punctuation' if body[0].isascii() else 'other'
    if text[0] == body[0] and (before.isalnum() or before == '_'):
        return 'word goes on'
    whole = not (after[:1].isalnum() or after[:1] == '_')
    return 'keyword' if whole and keyword.iskeyword(body) else 'word begins'


def bands(token):
    """token (N,) -> 0 where it is of the commonest tokens, which are a fourth of the text, to 3 (N,)"""
    counts = token.bincount()
    order = counts.argsort(descending=True, stable=True)
    before = torch.zeros_like(counts).scatter_(0, order, counts[order].cumsum(0) - counts[order])
    return (4 * before // len(token))[token]


# ----------------------------------------------------------------------------------------------------------
# Experts


def experts_of(model):
    """{layer: its MoE}"""
    return {layer: block.ffn for layer, block in enumerate(model.h) if isinstance(block.ffn, MoE)}


@torch.no_grad()
def routes(model, idx):
    """idx (B,T) -> {layer: (B T,K) int64}: every token's experts, the one with the highest score first"""
    found = {layer: [] for layer in experts_of(model)}

    def asks(layer):
        def hook(moe, args, _):
            x, ctx = args
            found[layer].append(moe.route(x.flatten(0, 1), ctx)[1].cpu())
        return hook

    handles = [moe.register_forward_hook(asks(layer)) for layer, moe in experts_of(model).items()]
    try:
        for rows in idx.split(ROWS):
            model(rows, rows)   # with targets, so that no logits are stored
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def entropy(counts):
    """Bits of a distribution, given by counts"""
    return torch.special.entr(counts.double() / counts.sum()).sum().item() / math.log(2)


def information(a, b):
    """Mutual information of two labels (N,) int64, in bits, from their joint counts"""
    joint = (a * (b.max() + 1) + b).bincount()
    return entropy(a.bincount()) + entropy(b.bincount()) - entropy(joint)


def bits(expert, label, times=5):
    """(mutual information, its mean with the labels shuffled), in bits"""
    generator = torch.Generator().manual_seed(0)
    null = [information(expert, label[torch.randperm(len(label), generator=generator)]) for _ in range(times)]
    return information(expert, label), fmean(null)


def lifts(experts, label, n_expert, n_label):
    """
    experts (N,K), label (N,) -> (n_expert,n_label): the share of a label among an expert's tokens over its
    share of all; nan where there is no token of either
    """
    pairs = (experts * n_label + label.unsqueeze(1)).flatten()
    joint = pairs.bincount(minlength=n_expert * n_label).view(n_expert, n_label).double()
    return joint / joint.sum(1, keepdim=True) / (joint.sum(0) / joint.sum())


def measure(labels, routed):
    """-> {layer: {'entropy': of the first expert, label: (bits, null)}}"""
    return {layer: {'entropy': entropy(experts[:, 0].bincount())}
            | {name: bits(experts[:, 0], label) for name, label in labels.items()}
            for layer, experts in routed.items()}


# ----------------------------------------------------------------------------------------------------------
# One run


def describe(run, labels, routed, folder, figures):
    """The tables of a run, and the lifts of every expert."""
    found = measure(labels, routed)
    print(f'{folder}: bits that a label tells about the first of the experts of a token, on '
          f'{len(labels["token"]):,} tokens (with shuffled labels)')
    print_table(['layer', 'its entropy', *LABELS.values()],
                [[layer, f'{row["entropy"]:.3f}', *('{:.3f} ({:.3f})'.format(*row[name]) for name in LABELS)]
                 for layer, row in found.items()])
    n, shown = run.model.config.n_expert, lifts_of(labels, routed, run.model.config.n_expert)
    print('\nlift: the share of a kind among the tokens of an expert, over its share of all tokens')
    names = [*KINDS, *BANDS]
    print_table(['expert', *names], [[f'layer {layer} expert {e}', *(f'{x:.2f}' for x in rows[e].tolist())]
                                     for layer, rows in shown.items() for e in range(n)])
    draw_lifts(shown, labels, figures)


def lifts_of(labels, routed, n_expert):
    """{layer: (E,kinds and bands)}"""
    return {layer: torch.cat((lifts(experts, labels['kind'], n_expert, len(KINDS)),
                              lifts(experts, labels['band'], n_expert, len(BANDS))), 1)
            for layer, experts in routed.items()}


def draw_lifts(shown, labels, figures):
    """A heat map for each layer, experts against kinds and bands, with their shares of all tokens."""
    most, columns = 8, min(3, math.ceil(math.sqrt(len(shown))))
    base = torch.cat([labels[name].bincount(minlength=len(words)) / len(labels[name])
                      for name, words in (('kind', KINDS), ('band', BANDS))])
    names = [f'{name} ({share:.0%})' for name, share in zip([*KINDS, *BANDS], base.tolist())]
    rows, E = -(-len(shown) // columns), len(next(iter(shown.values())))
    fig, axes = panels((1.2 + 0.32 * E) * columns + 2.6, 3.6 * rows + 0.4, rows=rows, columns=columns,
                       sharey=True)
    for ax, (layer, values) in zip(axes, shown.items()):
        image = ax.imshow(values.clamp(min=1 / most).log2().T.numpy(), vmin=-math.log2(most),
                          vmax=math.log2(most), cmap='RdBu_r', aspect='auto', interpolation='nearest')
        ax.axhline(len(KINDS) - 0.5, color='black', linewidth=0.8)
        ax.set_xticks(range(0, E, max(1, E // 8)))
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_xlabel('expert')
        ax.grid(visible=False)
        title(ax, f'layer {layer}')
    for ax in axes[len(shown):]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel('tokens (share of all)')
    bar = fig.colorbar(image, ax=axes, label='share among its tokens / share of all')
    bar.set_ticks(range(-3, 4), labels=['1/8 or less', '1/4', '1/2', '1', '2', '4', '8 or more'])
    save_and_say(fig, figures, 'lifts')


# ----------------------------------------------------------------------------------------------------------
# Its own runs


def compare(arms, figures, device):
    """arms {'mixtral_small', 'bias': {seed: folder}}: the page, the numbers and the figures."""
    found, first = {}, None
    for name, folder in each([(arm, f) for arm, runs in arms.items() for f in runs.values()],
                             lambda job: f'experts of {job[1]}'):
        run, labels = read_labels(folder, device)
        routed = routes(run.model, run.idx)
        found.setdefault(name, []).append(measure(labels, routed))
        first = first or (lifts_of(labels, routed, run.model.config.n_expert), labels)
        if name == next(iter(arms)):    # a router that has learned nothing follows the embedding
            start = GPT(run.model.config, seed=run.seed).to(device).eval()
            found.setdefault('untrained', []).append(measure(labels, routes(start, run.idx)))
    lines = [['arm', 'run', 'layer', 'entropy', *(name + end for name in LABELS for end in ('', '_null'))]]
    for arm, runs in found.items():
        lines += [[arm, i, layer, row['entropy'], *(x for name in LABELS for x in row[name])]
                  for i, layers in enumerate(runs) for layer, row in layers.items()]
    with open(Path(figures, 'specialists.csv'), 'w', newline='') as f:
        csv.writer(f).writerows(lines)
    page(found, run, len(labels['token']), figures)
    draw_lifts(*first, figures)
    draw_bits(found, figures)


def excess(found, layer, name):
    """Bits above those of shuffled labels, of every run of an arm"""
    return [layers[layer][name][0] - layers[layer][name][1] for layers in found]


def share(found, name):
    """Bits over the entropy, both above the null, the mean over layers, of every run of an arm"""
    def of(row):
        found, null = row[name]
        return (found - null) / (row['entropy'] - null) if row['entropy'] > null else 0.0
    return [fmean(map(of, layers.values())) for layers in found]


def page(found, run, tokens, figures):
    """A table of bits for each layer and arm, and the sentences of verdict."""
    rows = []
    for arm, runs in found.items():
        for layer in runs[0]:
            cells = []
            for name in LABELS:
                e, null = effect(excess(runs, layer, name)), fmean(row[layer][name][1] for row in runs)
                cells.append(f'{e.mean:.3f}{interval(e)} ({null:.3f})')
            rows.append([ARMS[arm], layer, f'{fmean(row[layer]["entropy"] for row in runs):.3f}', *cells])
    c = run.model.config
    about = (f'Bits that a label tells about the first of the experts of a token, above those of shuffled '
             f'labels, which are in brackets: means and 95 % intervals over '
             f'{counted(len(found["bias"]), "seed")}, {tokens:,} tokens of validation text.')
    size = f'{c.n_layer} layers of width {c.n_embd}, {c.n_expert_used} of {c.n_expert} experts'
    kind, token = ({arm: share(runs, name) for arm, runs in found.items()} for name in ('kind', 'token'))

    def minus(shares, arm, other):
        return effect([x - y for x, y in zip(shares[arm], shares[other])])
    write_page(figures, 'specialists', [(about, ['arm', 'layer', 'entropy of the expert', *LABELS.values()],
                                         rows)], [
        verdict('Share of the choice of the first expert that the kind of the token decides',
                effect(kind['mixtral_small']), 'experts follow kinds', 'experts avoid kinds', size),
        verdict('That share, trained minus untrained', minus(kind, 'mixtral_small', 'untrained'),
                'training ties experts to kinds', 'training frees experts from kinds', size),
        verdict('Share that the token alone decides', effect(token['mixtral_small']),
                'experts follow tokens', 'experts avoid tokens', size),
        verdict('That share, trained minus untrained', minus(token, 'mixtral_small', 'untrained'),
                'training ties experts to tokens', 'training frees experts from tokens', size),
        verdict('That share, balanced by a bias minus by a loss', minus(token, 'bias', 'mixtral_small'),
                'a bias leaves experts more specialised', 'a bias leaves experts less specialised', size)])


def draw_bits(found, figures):
    """A panel for each label: bits above the null in each layer, of the arms."""
    fig, axes = panels(11, 3.8, columns=len(LABELS))
    for ax, (name, text) in zip(axes, LABELS.items()):
        layers = list(next(iter(found.values()))[0])
        for i, (arm, runs) in enumerate(found.items()):
            effects = [effect(excess(runs, layer, name)) for layer in layers]
            x = [place + (i - 1) * 0.25 for place in range(len(layers))]
            ax.bar(x, [e.mean for e in effects], 0.25, color=COLORS[i], alpha=0.7, label=ARMS[arm])
            ax.errorbar(x, [e.mean for e in effects], [0 if math.isnan(e.half) else e.half for e in effects],
                        fmt='none', color='black', capsize=2, linewidth=0.8)
        ax.set_xticks(range(len(layers)), layers)
        ax.set_xlabel('layer')
        ax.set_ylabel(f'bits about {text}')
        ax.set_ylim(0, 1.35 * ax.dataLim.y1)
        ax.grid(visible=False, axis='x')
    title(axes[0], 'above shuffled labels; bars: 95 % intervals')
    axes[-1].legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'bits')
