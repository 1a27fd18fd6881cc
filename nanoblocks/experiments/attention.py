"""
Questions about attention, each answered with a table and a figure: topics of bench.py. Each takes the model's
flags and config files, whose values replace the topic's own.
"""
import math
from dataclasses import asdict

import torch

from kernels import rope as rotate
from model import GPT, Given, GPTConfig, RotaryPositions, RouterLosses, kv_cache_bytes
from nanoblocks.experiments.figures import COLORS, panels, save_and_say, title
from nanoblocks.experiments.timing import print_table
from nanoblocks.experiments.topics import in_short, sizes, tell
from nanoblocks.formats import counted, format_quantity


def fitted(flags):
    """The flags without those that mean nothing beside the others."""
    while lost := [name for name in flags if GPTConfig.unchecked(**flags).missing(name)]:
        flags = {name: value for name, value in flags.items() if name not in lost}
    return flags


# ----------------------------------------------------------------------------------------------------------
# The cache

LLAMA_8B = dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=128256, block_size=131072, bias=False,
                norm='rmsnorm', ffn='swiglu')
# of a kind of attention, which the rows of the table replace
KIND = ('pos', 'attn', 'n_kv_head', 'kv_rank', 'rope_head_dim', 'layer_pattern', 'window')


def cache(flags, tokens, figures):
    """Bytes of the cache in 16 bit with one kind of layer or another, for Llama 3 8B or the flags' shape."""
    shape = flags or LLAMA_8B
    lengths = sizes('tokens', tokens, 8192, 131072)
    spans, rows = [(batch, T) for batch in (1, 16) for T in lengths], {}
    for name, kind in kinds(GPTConfig(**shape), bool(flags)).items():
        given = shape if kind is None else {key: value for key, value in shape.items() if key not in KIND}
        try:
            config = GPTConfig(**fitted(given | (kind or {})))
        except ValueError as error:
            tell(f'{name} is left out: {error}')
            continue
        rows[name] = [kv_cache_bytes(config, T, batch, 2) / 1e9 for batch, T in spans]
    of = 'the flags' if flags else 'Llama 3 8B'
    print(f'cache in 16 bit for the shape of {of}')
    print_table(['GB, batch x tokens', *(f'{batch} x {in_short(T)}' for batch, T in spans)],
                [[name, *(gigabytes(size) for size in row)] for name, row in rows.items()])
    draw_cache({name: row[:len(lengths)] for name, row in rows.items()}, lengths, of, figures)


def gigabytes(size):
    return f'{size:.3f}' if size >= 0.01 else f'{size:.3g}'


def kinds(c, as_given):
    """{name: flags} of the kinds of layers to compare in the shape of a config; None: the config as it is."""
    found = {'as given': None} if as_given else {}
    found['MHA'] = dict(pos='rope')
    grouped = [n for n in (c.n_head // 4, c.n_head // 8) if n > 1 and c.n_head % n == 0]
    found |= {f'GQA-{n}': dict(pos='rope', n_kv_head=n) for n in grouped}
    found['MQA'] = dict(pos='rope', n_kv_head=1)
    head_dim, window = c.head_dim or c.n_embd // c.n_head, c.window or 4096
    rank, rotary = 4 * head_dim, head_dim // 2  # as in DeepSeek, whose heads have 128
    found[f'MLA {rank} + {rotary}'] = dict(pos='rope', attn='mla', kv_rank=rank, rope_head_dim=rotary)
    heads = grouped[0] if grouped else c.n_head
    found[f'{f"GQA-{heads}" if grouped else "MHA"}, window {window}'] = dict(
        pos='rope', n_kv_head=heads, layer_pattern='w', window=window)
    found['Mamba-2'] = dict(pos='none', layer_pattern='m')
    found['gated DeltaNet'] = dict(pos='none', layer_pattern='r')
    return found


def draw_cache(rows, lengths, of, figures):
    """rows {name: GB of one sequence of each length}"""
    fig, (ax,) = panels(8, 4.4)
    width = 0.8 / len(lengths)
    for i, T in enumerate(lengths):
        places = [n + width * (i - (len(lengths) - 1) / 2) for n in range(len(rows))]
        bars = ax.bar(places, [row[i] for row in rows.values()], 0.95 * width, color=COLORS[i % len(COLORS)],
                      label=f'{in_short(T)} tokens')
        ax.bar_label(bars, [f'{row[i]:.2g}' for row in rows.values()], fontsize=8 if len(lengths) < 4 else 6)
    ax.set_yscale('log')
    every = [size for row in rows.values() for size in row]
    ax.set_ylim(min(every) / 3, max(every) * 3)
    ax.set_ylabel('cache of one sequence (GB)')
    ax.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    ax.set_xticks(range(len(rows)), list(rows), fontsize=8, rotation=20)
    ax.grid(visible=False, axis='x')
    title(ax, f'cache in 16 bit for the shape of {of}')
    ax.legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'cache')


# ----------------------------------------------------------------------------------------------------------
# Grouped queries

HEADS = dict(n_layer=1, n_head=8, n_embd=256)


def gqa(flags, figures):
    """GQA is MHA with n_kv_head=n_head, MQA with n_kv_head=1, and MHA with shared heads in between."""
    config = GPTConfig(**HEADS | flags)
    counts = [n for n in range(config.n_head, 0, -1) if config.n_head % n == 0]
    # the claim is about the heads alone: all else, rotation included, is left out of layer and formulas
    shape = dict(n_layer=1, n_embd=config.n_embd, n_head=config.n_head, head_dim=config.head_dim, pos='none',
                 vocab_size=64, block_size=32, bias=False)
    rows, bytes_per_token = [], []
    for n in counts:
        c = GPTConfig(**shape, n_kv_head=n)
        bytes_per_token.append(config.n_layer * 2 * n * c.head_dim * 2)
        mha, mqa = differences(c)
        rows.append([n, c.n_head // n, 'MHA' if n == c.n_head else 'MQA' if n == 1 else 'GQA',
                     f'{config.n_layer * 2 * n * c.head_dim * c.n_embd:,}', f'{bytes_per_token[-1]:,}',
                     f'{mha:.0e}', f'{mqa:.0e}'])
    print(f'{config.n_head} query heads of {c.head_dim}, {counted(config.n_layer, "layer")}; on the '
          'right, how far the output is from\ntwo formulas, in fp64')
    print_table(['kv heads', 'queries each', 'is', 'k and v weights', 'cache bytes/token, 16 bit',
                 'to MHA with k, v repeated', 'to MQA with the first k, v'], rows)
    draw_gqa(counts, bytes_per_token, figures)


@torch.no_grad()
def differences(c):
    """
    The output of a layer of attention against two formulas with the same weights: MHA (Vaswani et al. 2017)
    whose heads read copies of the shared k and v, and MQA (Shazeer 2019) with the first k and v alone.
    """
    T, generator = c.block_size, torch.Generator().manual_seed(0)
    model = GPT(c).double().eval()
    mixer, x = model.h[0].mixer, torch.randn(1, T, c.n_embd, dtype=torch.float64, generator=generator)
    for p in mixer.parameters():
        p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) / p.shape[-1] ** 0.5)
    found = mixer(x, model.context(torch.zeros(1, T, dtype=torch.int64), None, None))
    q, k, v = mixer.c_attn(x).unflatten(-1, (-1, c.head_dim)).split(mixer.heads, dim=2)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    repeats, scale = c.n_head // c.n_kv_head, c.head_dim ** -0.5

    def weights(scores):
        return (scale * scores).masked_fill(hidden, -math.inf).softmax(-1)
    each_k, each_v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    mha = weights(torch.einsum('bthd,bshd->bhts', q, each_k))
    mha = torch.einsum('bhts,bshd->bthd', mha, each_v)
    mqa = weights(torch.einsum('bthd,bsd->bhts', q, k[:, :, 0]))
    mqa = torch.einsum('bhts,bsd->bthd', mqa, v[:, :, 0])
    return [((mixer.c_proj(y.flatten(2)) - found).abs().max() / found.abs().max()).item() for y in (mha, mqa)]


def draw_gqa(counts, bytes_per_token, figures):
    """Left, which query heads read which key/value head; right, the cache per token."""
    fig, (left, right) = panels(11, 4.2, columns=2)
    n_head = counts[0]
    for row, n in enumerate(counts):
        for head in range(n_head):
            group = head // (n_head // n)
            left.plot([head, (group + 0.5) * n_head / n - 0.5], [-row, -row + 0.45], linewidth=1,
                      color=COLORS[group % len(COLORS)])
            left.plot(head, -row, 'o', color=COLORS[group % len(COLORS)], markersize=5)
        for group in range(n):
            left.plot((group + 0.5) * n_head / n - 0.5, -row + 0.45, 's', markersize=7,
                      color=COLORS[group % len(COLORS)])
    left.set_yticks([-row + 0.2 for row in range(len(counts))], [named(n, n_head) for n in counts])
    left.set_ylabel('key/value heads of a layer')
    left.set_xlabel('query head')
    left.grid(visible=False)
    title(left, 'circles: query heads; squares: the key/value head that they read')
    bars = right.bar(range(len(counts)), bytes_per_token, color=COLORS[0])
    right.bar_label(bars, [f'{size:,}' for size in bytes_per_token], fontsize=8)
    right.set_xticks(range(len(counts)), [named(n, n_head) for n in counts])
    right.set_xlabel('key/value heads of a layer')
    right.set_ylabel('cache (bytes per token, 16 bit)')
    right.grid(visible=False, axis='x')
    title(right, 'the cache shrinks with the key/value heads')
    save_and_say(fig, figures, 'gqa')


def named(n, n_head):
    return f'{n}: MHA' if n == n_head else f'{n}: MQA' if n == 1 else f'{n}: GQA'


# ----------------------------------------------------------------------------------------------------------
# Rotary positions

ROPE = dict(n_embd=64, n_head=1, pos='rope', rope_theta=100000.0)


def rope(flags, tokens, figures):
    """RoPE's wavelengths at base 10K and at the flags', and a check that q.k depends on the offset alone."""
    T, = sizes('tokens', tokens, 4096)
    if flags.get('pos', 'rope') != 'rope':
        raise ValueError(f'pos={flags["pos"]} must be rope: --pos=rope')
    config = GPTConfig(**ROPE | flags)
    built = {name: RotaryPositions(c) for name, c in two_bases(config).items()}
    width = 2 * len(built['10K'].frequencies(0))
    rows = []
    for pair in sorted({round(i * (width // 2 - 1) / 4) for i in range(5)} if flags else {0, 8, 16, 24, 31}):
        waves = [wavelength(module, pair) for module in built.values()]
        rows.append([pair, *(cell for wave in waves for cell in (format_quantity(wave), f'{T / wave:.3g}'))])
    print(f'head of {width} rotating coordinates: wavelength in tokens, and turns in {T} tokens')
    print_table(['pair', *(cell for name in built for cell in (f'{name}: wave', 'turns'))], rows)
    print_offsets(list(built.values())[-1 if flags else 0], T)
    draw_rope(built, T, figures)


def two_bases(config):
    """{name: config}: the plain base 10K, and the config as it is unless that is the same."""
    plain = fitted(asdict(config) | dict(rope_theta=10000.0, rope_scaling='none'))
    name = format_quantity(config.rope_theta).replace('k', 'K')
    name += f', {config.rope_scaling}' * (config.rope_scaling != 'none')
    return {'10K': GPTConfig(**plain)} | ({} if name == '10K' else {name: config})


def wavelength(module, pair):
    """Tokens in which this pair of coordinates turns once."""
    return 2 * math.pi / module.frequencies(0)[pair].item()


def print_offsets(module, T):
    """q.k at several offsets, and how far it varies with the place of the key."""
    generator, width = torch.Generator().manual_seed(0), 2 * len(module.frequencies(0))
    q, k = torch.randn(2, 1, 1, 1, width, dtype=torch.float64, generator=generator)
    starts, rows = torch.tensor([[0], [1], [100], [1000], [3000]]), []
    for offset in (offset for offset in (0, 1, 16, 256, 1024) if offset < T):
        scores = []
        for start in starts:
            placed = (q, module.freq.angles(start + offset)), (k, module.freq.angles(start))
            rotated = (rotate(x, angle.cos(), angle.sin()) for x, angle in placed)
            scores.append(math.prod(rotated).sum().item())
        rows.append([offset, f'{scores[0]:+.5f}', f'{max(scores) - min(scores):.1e}'])
    places = ', '.join(map(str, starts.flatten().tolist()))
    print(f'q.k of one q and k, in fp64 with angles in fp32, the key at {places}')
    print_table(['offset', 'q.k', 'spread over places'], rows)


def draw_rope(built, T, figures):
    """built {base: RotaryPositions} -> left the cosines of one base, right q.k over the offset."""
    fig, (left, right) = panels(12, 4.4, columns=2)
    base, module = list(built.items())[-1]
    pos, n = torch.arange(256), len(module.frequencies(0))
    pairs = sorted({round(i * 0.78 * (n - 1) / 5) for i in range(6)})
    for i, pair in enumerate(pairs):
        left.plot(pos, module.freq.angles(pos)[:, pair].cos() - 2.5 * i, color=COLORS[i])
        text = f'pair {pair}: {format_quantity(wavelength(module, pair))} tokens'
        left.annotate(text, (259, -2.5 * i), fontsize=8, va='center', annotation_clip=False, color=COLORS[i])
    left.set_yticks([])
    left.set_ylabel('cosine of the angle, from -1 to 1 in each row')
    left.set_ylim(-2.5 * (len(pairs) - 1) - 1.2, 1.2)
    left.set_xlabel('position (tokens)')
    title(left, f'base {base}, with wavelengths: fast pairs tell\nneighbours apart, slow pairs far from near')
    draw_decay(right, built, T)
    right.legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'rope')


def draw_decay(ax, built, T):
    """
    q.k of vectors of ones over the offset. It oscillates faster than a figure can show, so beyond the first
    offsets a line is the mean over offsets within 30 % of each other, and its band their range.
    """
    edges = sorted({0, 1, 2, 3, 4, *(round(1.3 ** i) for i in range(6, 120) if 1.3 ** i < T), T})
    bins = list(zip(edges, edges[1:]))
    middle = [(low + high - 1) / 2 for low, high in bins]
    for i, (name, module) in enumerate(built.items()):
        score = module.freq.angles(torch.arange(T)).cos().mean(-1)
        parts = [score[low:high] for low, high in bins]
        ax.plot(middle, [part.mean().item() for part in parts], color=COLORS[i], label=f'base {name}')
        ax.fill_between(middle, [part.min().item() for part in parts], [part.max().item() for part in parts],
                        color=COLORS[i], alpha=0.2, linewidth=0)
    ax.axhline(0, color='black', linewidth=0.8)
    ax.set_xscale('symlog', linthresh=1)
    ax.set_xlim(0, T)
    ax.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
    ax.set_xlabel('offset of the two tokens (tokens)')
    ax.set_ylabel('q.k / q.k at offset 0')
    title(ax, 'q and k are vectors of ones; lines: mean over\nsimilar offsets, bands: lowest to highest')


# ----------------------------------------------------------------------------------------------------------
# The reach of windows


WINDOWED = dict(n_layer=6, n_head=4, n_embd=64, vocab_size=64, block_size=128, pos='rope', norm='rmsnorm',
                ffn='swiglu', bias=False, layer_pattern='w', window=16)


def reach(flags, device, figures):
    """How far a token's influence reaches through windowed layers, by the gradient."""
    config = GPTConfig(**WINDOWED | flags)
    window, depth, T = config.window, config.n_layer, config.block_size
    if config.mixers() != {'w'}:
        raise ValueError(f'layer_pattern={config.layer_pattern} must be w, a window in every layer: '
                         '--layer_pattern=w')
    if T <= depth * (window - 1):
        raise ValueError(f'block_size={T} must be above {depth * (window - 1)}, layers x (window - 1): '
                         f'--block_size={depth * (window - 1) + 1}')
    influence, rows = influences(GPT(config).to(device).double().eval(), device), []
    for layer, strength in enumerate(influence, start=1):
        far = layer * (window - 1)
        rows.append([layer, int(strength.nonzero().max()), far, f'{strength[1]:.1e}', f'{strength[far]:.1e}'])
    print(f'{depth} layers, each sees {window} tokens, its own included')
    print_table(['layers', 'farthest token felt', 'layers x (window - 1)', 'influence at 1',
                 'at the farthest'], rows)
    from matplotlib.colors import LogNorm
    fig, (ax,) = panels(8.4, 3.6)
    image = torch.stack(influence).cpu().clamp(min=1e-12).numpy()
    shown = ax.imshow(image, aspect='auto', norm=LogNorm(1e-8, 1), cmap='viridis', origin='lower',
                      extent=(-0.5, T - 0.5, 0.5, depth + 0.5))
    corners = [(layer * (window - 1) + 0.5, layer + y) for layer in range(1, depth + 1) for y in (-0.5, 0.5)]
    ax.plot(*zip(*corners), color='white', linewidth=1.2)
    ax.grid(visible=False)
    ax.set_xlabel('distance from the last token (white: layers x (window - 1))')
    ax.set_ylabel('layers')
    title(ax, f"influence on the last token, as a share of the token's own; window of {window} tokens")
    fig.colorbar(shown, ax=ax, label='influence')
    save_and_say(fig, figures, 'reach')


def influences(model, device):
    """[(T,) after each layer]: the gradient of the last token at each distance, over that at distance 0."""
    T = model.config.block_size
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(min(64, model.config.vocab_size), (8, T), generator=generator).to(device)
    start = model.wte(idx).detach().requires_grad_()
    ctx = model.context(idx, None, None)._replace(given=Given(losses=RouterLosses()))
    x, influence = start, []
    for layer, block in enumerate(model.h, start=1):
        x = block(x, ctx)
        probe = torch.randn(x[:, -1].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(layer))
        grad, = torch.autograd.grad((x[:, -1] * probe.to(device)).sum(), start, retain_graph=True)
        strength = grad.norm(dim=-1).mean(0).flip(0)
        influence.append(strength / strength[0])
    return influence
