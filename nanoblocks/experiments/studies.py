"""
Questions of the literature that need no sweep, each answered with a table and a figure: topics of bench.py.
Every number is measured here, by the code of this repository; where a study trains, train.py does it.
"""
import math
import os
import re
import shlex
import statistics
from functools import partial
from pathlib import Path

import torch

from kernels import rope as rotate
from model import GPT, NORMS, GPTConfig, RotaryPositions, dense, kv_cache_bytes
from nanoblocks.experiments import sweep
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.figures import COLORS, LOSS, log2_axis, panels, save_and_say, title
from nanoblocks.experiments.memory import peak_bytes, saved_bytes
from nanoblocks.experiments.runs import read_lines, run_script
from nanoblocks.experiments.timing import medians, print_table, timed
from nanoblocks.formats import format_quantity

SIZE = ['config/llama_small.py', 'config/study.py']  # of every model that is trained here

# ----------------------------------------------------------------------------------------------------------
# The sweeps of results/


# each block from GPT-2 to Llama; then other kinds of layers, with as many active parameters
SWEEPS = {
    'ladder': ['--base=config/gpt2_small.py', '--arms=ladder'],
    'blocks': ['--vary=MHA: n_kv_head=4; MQA: n_kv_head=1; MLA: attn=mla+n_kv_head=None; '
               'MoE: ffn_pattern=e+n_expert=8; hybrid: layer_pattern=mmam+ssm_state=64; '
               'Mamba-2: layer_pattern=m+pos=none+n_kv_head=None+ssm_state=64', '--match=active'],
}


def ablations(argv, device):
    """The sweeps whose reports are in results/, on five seeds: 42 minutes on two cores."""
    jobs = torch.cuda.device_count() if device.startswith('cuda') else min(2, os.cpu_count() or 1)
    files, flags = files_and_flags(argv, without=('device',))
    for name, arms in SWEEPS.items():
        words = [*SIZE, *files, *arms, '--seeds=5', '--evals=6', f'--jobs={jobs}', f'--device={device}',
                 f'--out_dir=out/ablate/{name}', f'--results=results/{name}', *flags]
        print(f'{name}: python ablate.py {shlex.join(words)}', flush=True)
        sweep.main(words)


# ----------------------------------------------------------------------------------------------------------
# Norms


def norms(rounds, device, figures):
    """RMSNorm against LayerNorm: time forward and backward, and memory kept for the backward pass."""
    widths, tokens, rows, ratios = (256, 512, 1024, 2048, 4096), 2048, [], []
    for width in widths:
        x = torch.randn(tokens, width, device=device, requires_grad=True)
        built = {name: norm_of(cls, width).to(device) for name, cls in NORMS.items()}
        forward = medians({name: partial(run, norm, x) for name, norm in built.items()}, rounds, device)
        both = medians({name: lambda norm=norm: norm(x).sum().backward() for name, norm in built.items()},
                       rounds, device)
        for name, norm in built.items():
            saved = saved_bytes(lambda norm=norm: norm(x))
            rows.append([f'{width} {name}', f'{forward[name]:.3f}', f'{both[name]:.3f}',
                         f'{2 * x.nbytes / forward[name] / 1e6:.1f}', f'{saved / x.nbytes:.2f}',
                         sum(p.numel() for p in norm.parameters())])
        ratios.append([ms['layernorm'] / ms['rmsnorm'] for ms in (forward, both)])
    print_table(['width, norm', 'forward ms', 'with backward ms', 'forward GB/s', 'kept / input',
                 'parameters'], rows)
    fig, (ax,) = panels(6.4, 3.8)
    for column, name in enumerate(('forward', 'forward and backward')):
        ax.plot(widths, [row[column] for row in ratios], 'o-', color=COLORS[column], label=name)
    ax.axhline(1, color='black', linewidth=0.8)
    log2_axis(ax, widths)
    ax.set_ylim(bottom=0)
    ax.set_xlabel('width')
    ax.set_ylabel('time of LayerNorm / time of RMSNorm')
    title(ax, f'{tokens} tokens in fp32; above 1, RMSNorm is faster')
    ax.legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'norms')


@torch.no_grad()
def run(module, x):
    return module(x)


def norm_of(cls, width):
    """A norm of this class and width, its weight one and its bias zero."""
    norm = cls(width, GPTConfig(n_embd=width, n_head=1))
    for name, p in norm.named_parameters():
        p.data.fill_(name == 'weight')
    return norm


# ----------------------------------------------------------------------------------------------------------
# Feed-forward


def ffns(rounds, device, figures):
    """SwiGLU of 8/3 and 4 times the width against GELU of 4 times: parameters, time and memory."""
    width, tokens = 512, 1024
    choices = {'GELU 4x': ('gelu', 4 * width), 'SwiGLU 8/3x': ('swiglu', None),
               'SwiGLU 4x': ('swiglu', 4 * width)}
    x, built = torch.randn(1, tokens, width, device=device, requires_grad=True), {}
    for name, (ffn, hidden) in choices.items():
        config = GPTConfig(n_embd=width, n_head=8, n_layer=1, ffn=ffn, ffn_width=hidden, bias=False)
        built[name] = dense(config, config.ffn_width).to(device)
        torch.nn.init.normal_(built[name].c_fc.weight, std=0.02)
        torch.nn.init.normal_(built[name].c_proj.weight, std=0.02)
    times = medians({name: lambda ffn=ffn: ffn(x, None).sum().backward() for name, ffn in built.items()},
                    rounds, device)
    size = {name: sum(p.numel() for p in ffn.parameters()) for name, ffn in built.items()}
    kept = {name: saved_bytes(lambda ffn=ffn: ffn(x, None)) / x.nbytes for name, ffn in built.items()}
    print(f'width {width}, {tokens} tokens, fp32, forward and backward')
    print_table(['ffn', 'hidden', 'parameters', 'of GELU', 'ms', 'of GELU', 'kept / input'],
                [[name, ffn.c_proj.in_features, f'{size[name]:,}', f'x {size[name] / size["GELU 4x"]:.2f}',
                  f'{times[name]:.2f}', f'x {times[name] / times["GELU 4x"]:.2f}', f'{kept[name]:.1f}']
                 for name, ffn in built.items()])
    print('their losses: python ablate.py config/llama_small.py config/study.py '
          '--vary="GELU 4x: ffn=gelu; SwiGLU 4x: ffn_width=512"')
    fig, axes = panels(9.5, 3.2, columns=3)
    texts = 'parameters', 'forward and backward (ms)', 'bytes kept for backward / bytes of input'
    for ax, values, text in zip(axes, (size, times, kept), texts):
        ax.bar(list(values), list(values.values()), color=COLORS[:3])
        ax.yaxis.set_major_formatter(lambda value, _: format_quantity(value) if value else '0')
        title(ax, text)
        ax.grid(visible=False, axis='x')
        ax.tick_params(axis='x', labelsize=8)
    save_and_say(fig, figures, 'ffns')


# ----------------------------------------------------------------------------------------------------------
# The cache


def cache(figures):
    """Bytes of the cache in 16 bit, for the shape of Llama 3 8B with one kind of layer or another."""
    shape = dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=128256, block_size=131072, bias=False,
                 norm='rmsnorm', ffn='swiglu')
    choices = {
        'MHA': dict(pos='rope'), 'GQA-8': dict(pos='rope', n_kv_head=8),
        'GQA-4': dict(pos='rope', n_kv_head=4), 'MQA': dict(pos='rope', n_kv_head=1),
        'MLA 512 + 64': dict(pos='rope', attn='mla', kv_rank=512, rope_head_dim=64),
        'GQA-8, window 4096': dict(pos='rope', n_kv_head=8, layer_pattern='w', window=4096),
        'Mamba-2': dict(pos='none', layer_pattern='m'),
    }
    spans = [(batch, tokens) for batch in (1, 16) for tokens in (8192, 131072)]
    sizes = {}
    for name, flags in choices.items():
        config = GPTConfig(**shape, **flags)
        sizes[name] = [kv_cache_bytes(config, tokens, batch, 2) / 1e9 for batch, tokens in spans]
    print_table(['GB, batch x tokens', *(f'{batch} x {tokens // 1024}K' for batch, tokens in spans)],
                [[name, *(f'{size:.3f}' for size in row)] for name, row in sizes.items()])
    draw_cache({name: row[:2] for name, row in sizes.items()}, figures)


def draw_cache(sizes, figures):
    """sizes {name: GB of one sequence of 8K and of 128K tokens}"""
    fig, (ax,) = panels(8, 4.2)
    for i, tokens in enumerate((8192, 131072)):
        places = [n + 0.38 * (i - 0.5) for n in range(len(sizes))]
        heights = [row[i] for row in sizes.values()]
        bars = ax.bar(places, heights, 0.36, color=COLORS[i], label=f'{tokens // 1024}K tokens')
        ax.bar_label(bars, [f'{row[i]:.2g}' for row in sizes.values()], fontsize=8)
    ax.set_yscale('log')
    ax.set_ylim(0.05, 200)
    ax.set_ylabel('cache of one sequence (GB)')
    ax.set_xticks(range(len(sizes)), list(sizes), fontsize=8, rotation=20)
    ax.grid(visible=False, axis='x')
    title(ax, 'cache in 16 bit for the shape of Llama 3 8B')
    ax.legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'cache')


# ----------------------------------------------------------------------------------------------------------
# Rotary positions

ROPE_WIDTH, BASES = 64, {'10K': 10000.0, '100K': 100000.0}


def rope(figures):
    """RoPE's wavelengths, and a check that q.k depends on the offset of the two tokens alone."""
    built = {name: RotaryPositions(GPTConfig(n_embd=ROPE_WIDTH, n_head=1, pos='rope', rope_theta=theta))
             for name, theta in BASES.items()}
    T, rows = 4096, []
    for pair in (0, 8, 16, 24, 31):
        waves = [wavelength(pair, theta) for theta in BASES.values()]
        rows.append([pair, *(cell for wave in waves for cell in (format_quantity(wave), f'{T / wave:.3g}'))])
    print(f'head of {ROPE_WIDTH}: wavelength in tokens, and turns in {T} tokens')
    print_table(['pair', '10K: wave', 'turns', '100K: wave', 'turns'], rows)
    print_offsets(built['10K'].freq.angles)
    draw_rope(built, T, figures)


def wavelength(pair, theta):
    return 2 * math.pi * theta ** (2 * pair / ROPE_WIDTH)


def print_offsets(angles):
    """q.k at several offsets, and how far it varies with the place of the key."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, ROPE_WIDTH, dtype=torch.float64, generator=generator)
    starts, rows = torch.tensor([[0], [1], [100], [1000], [3000]]), []
    for offset in (0, 1, 16, 256, 1024):
        scores = []
        for start in starts:
            placed = (q, angles(start + offset)), (k, angles(start))
            rotated = (rotate(x, angle.cos(), angle.sin()) for x, angle in placed)
            scores.append(math.prod(rotated).sum().item())
        rows.append([offset, f'{scores[0]:+.5f}', f'{max(scores) - min(scores):.1e}'])
    places = ', '.join(map(str, starts.flatten().tolist()))
    print(f'q.k of one q and k, in fp64 with angles in fp32, the key at {places}')
    print_table(['offset', 'q.k', 'spread over places'], rows)


def draw_rope(built, T, figures):
    """
    built {base: RotaryPositions} -> left the cosines of base 10K, right q.k over the offset of two tokens.
    """
    fig, (left, right) = panels(11.5, 4.2, columns=2)
    pos = torch.arange(0, 256)
    for i, pair in enumerate((0, 4, 8, 12, 16, 24)):
        left.plot(pos, built['10K'].freq.angles(pos)[:, pair].cos() - 2.5 * i, color=COLORS[i])
        text = f'pair {pair}: {format_quantity(wavelength(pair, BASES["10K"]))} tokens'
        left.annotate(text, (259, -2.5 * i), fontsize=8, va='center', annotation_clip=False, color=COLORS[i])
    left.set_yticks([])
    left.set_ylim(-2.5 * 5 - 1.2, 1.2)
    left.set_xlabel('position (tokens)')
    title(left, 'cosine of the angle, base 10K, with wavelengths: fast pairs tell\nneighbours apart, slow '
                'pairs tell far from near')
    ones, offsets = torch.ones(1, 1, 1, ROPE_WIDTH), torch.arange(0, T)
    for i, (name, module) in enumerate(built.items()):
        angle = module.freq.angles(offsets)
        rotated = rotate(ones.expand(1, T, 1, ROPE_WIDTH), angle.cos(), angle.sin())[0, :, 0]
        right.plot(offsets, rotated.mean(-1), color=COLORS[i], label=f'base {name}', linewidth=1)
    right.axhline(0, color='black', linewidth=0.8)
    right.set_xscale('symlog', linthresh=1)
    right.set_xlim(0, T)
    right.set_xlabel('offset of the two tokens')
    right.set_ylabel('q.k / q.k at offset 0')
    title(right, 'q and k are vectors of ones')
    right.legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'rope')


# ----------------------------------------------------------------------------------------------------------
# Beyond the trained context

LENGTHS, SCALINGS = (128, 256, 512), ('none', 'linear', 'ntk', 'yarn')


def context(device, figures):
    """RoPE with base 10K and 100K, trained at 128 tokens and evaluated at up to 512, scaled or not."""
    losses = {}
    for base in BASES.values():
        folder, _ = train(figures, f'base{base:.0f}', f'--rope_theta={base}', f'--device={device}')
        trained = evaluate(folder, 128, 'none')
        losses |= {(base, scaling, T): trained if T == 128 else evaluate(folder, T, scaling)
                   for scaling in SCALINGS for T in LENGTHS}
    print_table(['base, scaling', *(f'{T} tokens' for T in LENGTHS)],
                [[f'{name}, {scaling}', *(f'{losses[base, scaling, T]:.4f}' for T in LENGTHS)]
                 for name, base in BASES.items() for scaling in SCALINGS])
    fig, axes = panels(10, 4, columns=2, sharey=True)
    for ax, (name, base) in zip(axes, BASES.items()):
        for i, scaling in enumerate(SCALINGS):
            values = [losses[base, scaling, T] for T in LENGTHS]
            ax.plot(LENGTHS, values, 'o-', color=COLORS[i], label=scaling)
        log2_axis(ax, LENGTHS)
        ax.set_xlabel('context in evaluation (tokens)')
        title(ax, f'base {name}, trained at 128 tokens')
    axes[0].set_ylabel(LOSS)
    axes[0].legend(frameon=False, fontsize=9, title='rope_scaling', title_fontsize=9)
    save_and_say(fig, figures, 'context')


def train(out, name, *flags):
    """A run of train.py in out/name, trained if it is not there yet -> (folder, lines of its metrics)"""
    folder = os.path.join(out, name)
    done = Path(folder, 'done')
    if not done.exists():
        print(f'training {name} ...', flush=True)
        run_script('train.py', *SIZE, *flags, f'--out_dir={folder}', '--overwrite=True')
        done.write_text(' '.join(flags))
    elif done.read_text() != ' '.join(flags):
        raise ValueError(f'{folder} holds a run with other flags: remove it, or choose another --figures')
    return folder, read_lines(os.path.join(folder, 'metrics.jsonl'))


def evaluate(folder, T, scaling):
    """The validation loss of a run at a context of T tokens."""
    factor = [] if scaling == 'none' else [f'--rope_scaling={scaling}', f'--rope_factor={T / 128}']
    printed = run_script('train.py', '--init_from=resume', '--eval_only=True', f'--out_dir={folder}',
                         f'--block_size={T}', *factor)
    return float(re.search(r'val loss ([\d.]+)', printed).group(1))


# ----------------------------------------------------------------------------------------------------------
# Long sequences

ALL_LENGTHS = [1024 * 2 ** i for i in range(8)]


def lengths(device, figures, budget=60.0):
    """Time and memory of one layer of attention, window, Mamba and Mamba-2 over 1K to 128K tokens."""
    flags = dict(n_embd=256, n_head=4, n_layer=1, bias=False, norm='rmsnorm', ffn_pattern='-',
                 block_size=ALL_LENGTHS[-1], vocab_size=64)
    choices = {'attention': dict(pos='rope'), 'window 1024': dict(pos='rope', layer_pattern='w', window=1024),
               'Mamba': dict(pos='none', layer_pattern='m', ssm='mamba1'),
               'Mamba-2': dict(pos='none', layer_pattern='m', ssm='mamba2')}
    found = {name: layer_costs(GPT(GPTConfig(**flags, **more)).to(device).eval(), device, budget)
             for name, more in choices.items()}
    print(f'forward pass of one layer of width {flags["n_embd"]}, one sequence; -: beyond {budget:.0f} s for '
          'the layer')
    shown = {'seconds': lambda value: f'{value:.4f}', 'peak MB': lambda value: f'{value / 1e6:.0f}'}
    for i, (heading, text) in enumerate(shown.items()):
        print_table([heading, *(f'{T // 1024}K' for T in ALL_LENGTHS)],
                    [[name, *(text(costs[T][i]) if T in costs else '-' for T in ALL_LENGTHS)]
                     for name, costs in found.items()])
    fig, axes = panels(10.5, 4.2, columns=2)
    for i, (ax, text) in enumerate(zip(axes, ('time of a forward pass (s)', 'peak memory (bytes)'))):
        for color, (name, costs) in zip(COLORS, found.items()):
            points = [(T, cost[i]) for T, cost in costs.items() if cost[i] > 0]
            ax.plot(*zip(*points), 'o-', color=color, label=name)
        log2_axis(ax, ALL_LENGTHS, [f'{T // 1024}K' for T in ALL_LENGTHS])
        ax.set_xlim(ALL_LENGTHS[0] / 1.3, ALL_LENGTHS[-1] * 1.3)
        ax.set_yscale('log')
        ax.yaxis.set_major_formatter(lambda value, _: format_quantity(value))
        ax.set_xlabel('tokens')
        ax.set_ylabel(text)
    title(axes[0], f'one layer of width {flags["n_embd"]}, one sequence')
    axes[0].legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'lengths')


@torch.no_grad()
def layer_costs(model, device, left):
    """{tokens: (median seconds, peak bytes)} of the model's first mixer, as long as `left` seconds last."""
    mixer, costs = model.h[0].mixer, {}
    for T in ALL_LENGTHS:
        # a quadratic layer takes four times as long for twice the tokens
        if 4 * costs.get(T // 2, (0.0,))[0] > left:
            break
        x = torch.randn(1, T, model.config.n_embd, device=device)
        ctx = model.context(torch.zeros(1, T, dtype=torch.int64, device=device), None, None)
        run = partial(mixer, x, ctx)
        if T == ALL_LENGTHS[0]:
            run()  # the first call loads libraries
        peak = []
        seconds = [timed(lambda run=run, peak=peak: peak.append(peak_bytes(run, device)), device)() / 1e3]
        while len(seconds) < 6 and sum(seconds) < left / 8:
            seconds.append(timed(run, device)() / 1e3)
        costs[T], left = (statistics.median(seconds[1:] or seconds), peak[0]), left - sum(seconds)
    return costs


# ----------------------------------------------------------------------------------------------------------
# Routing


def router(device, figures):
    """How evenly eight experts are used in training: without balancing, with a loss, with a bias."""
    choices = {'none': ['--balance=none'], 'loss': ['--balance=aux'],
               'bias': ['--balance=bias', '--router=sigmoid', '--bias_rate=0.01']}
    moe = ['--ffn_pattern=e', '--n_expert=8', '--n_expert_used=2', '--log_interval=5', f'--device={device}']
    runs = {name: train(figures, f'router_{name}', *moe, *flags)[1] for name, flags in choices.items()}
    rows = []
    for name, lines in runs.items():
        load = [line for line in lines if 'expert_max' in line]
        loss = [line['val_loss'] for line in lines if 'val_loss' in line][-1]
        tail = load[-len(load) // 4:]
        rows.append([name, f'{load[0]["expert_max"]:.3f}',
                     f'{statistics.fmean(line["expert_max"] for line in tail):.3f}',
                     f'{statistics.fmean(line["expert_entropy"] for line in tail):.4f}', f'{loss:.4f}'])
    print("the busiest expert's share of the tokens (even: 0.125), and the entropy of the shares (even: 1)")
    print_table(['balancing', 'at the start', 'last quarter', 'entropy', 'val loss'], rows)
    fig, axes = panels(10.5, 4, columns=2)
    texts = "the busiest expert's share, of at most 1/2", 'entropy of the shares, mean over layers'
    for ax, key, even, text in zip(axes, ('expert_max', 'expert_entropy'), (0.125, 1.0), texts):
        for i, (name, lines) in enumerate(runs.items()):
            points = [(line['step'], line[key]) for line in lines if key in line]
            ax.plot(*zip(*points), color=COLORS[i], label=f'balancing: {name}')
        ax.axhline(even, color='black', linewidth=0.8, linestyle='--')
        ax.set_xlabel('training step')
        title(ax, f'{text}; dashed: even')
    axes[1].legend(frameon=False, fontsize=9, loc='lower right')
    save_and_say(fig, figures, 'router')


# ----------------------------------------------------------------------------------------------------------
# The reach of windows


def reach(device, figures):
    """How far a token's influence reaches through windowed layers, by the gradient."""
    window, depth, T = 16, 6, 128
    config = GPTConfig(n_layer=depth, n_head=4, n_embd=64, vocab_size=64, block_size=T, pos='rope',
                       norm='rmsnorm', ffn='swiglu', bias=False, layer_pattern='w', window=window)
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
    idx = torch.randint(64, (8, T), generator=torch.Generator().manual_seed(0)).to(device)
    start = model.wte(idx).detach().requires_grad_()
    ctx = model.context(idx, None, None)._replace(losses=[])
    x, influence = start, []
    for layer, block in enumerate(model.h, start=1):
        x = block(x, ctx)
        probe = torch.randn(x[:, -1].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(layer))
        grad, = torch.autograd.grad((x[:, -1] * probe.to(device)).sum(), start, retain_graph=True)
        strength = grad.norm(dim=-1).mean(0).flip(0)
        influence.append(strength / strength[0])
    return influence
