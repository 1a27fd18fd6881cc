"""
The questions of the literature that need no sweep, each a table and a figure: topics of bench.py.

    python bench.py norms
    python bench.py context

Every number is measured here, by the code of this repository; what a topic trains, it trains by train.py.
"""
import ctypes
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import ablate
from kernels import rope as rotate
from model import GPT, NORMS, GPTConfig, RotaryPositions, dense
from nanoblocks.experiments.report import COLORS, figure, read_lines, save
from nanoblocks.files import ROOT
from nanoblocks.formats import format_quantity

SIZE = ['config/llama_small.py', 'config/study.py']  # of all that is trained here


def print_table(heads, rows):
    """Columns as wide as what is in them; numbers to the right."""
    rows = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(w) if i == 0 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(row, widths))), flush=True)


def finish(fig, out, name):
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, f'{name}.png')
    save(fig, path)
    print(f'the figure is {path}')


def turns(runs, device, rounds, warmup=3):
    """{name: milliseconds of each round}: every round runs all, every other one backwards, against drift."""
    times = {name: [] for name in runs}
    for n in range(rounds + warmup):
        for name in (list(runs) if n % 2 else list(reversed(runs))):
            began = time.perf_counter()
            runs[name]()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            if n >= warmup:  # the first ones allocate
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


def in_turns(runs, device, rounds):
    """{name: median milliseconds}"""
    return {name: statistics.median(ms) for name, ms in turns(runs, device, rounds).items()}


def saved_bytes(run):
    """Bytes of the tensors that a forward pass keeps for the backward pass, parameters aside."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()  # noqa: F841  a freed storage would lend its address to another
    return sum(kept.values())


def train(out, name, *flags):
    """A run of train.py in out/name, trained if it is not there yet; the lines of its metrics."""
    folder = os.path.join(out, name)
    if not os.path.exists(os.path.join(folder, 'done')):
        print(f'training {name} ...', flush=True)
        command = [sys.executable, str(ROOT / 'train.py'), *SIZE, *flags,
                   f'--out_dir={folder}', '--overwrite=True']
        call(command)
        Path(folder, 'done').write_text(' '.join(flags))
    elif Path(folder, 'done').read_text() != ' '.join(flags):
        raise ValueError(f'{folder} holds a run with other flags: remove it, or choose another --out_dir')
    return folder, read_lines(os.path.join(folder, 'metrics.jsonl'))


def call(command):
    """What a script prints; SystemExit with its last line when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{" ".join(command[1:])}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}')
    return done.stdout


# ----------------------------------------------------------------------------------------------------------

# each block from GPT-2 to Llama; then what else a layer can be, at equal active parameters
SWEEPS = {
    'ladder': ['--base=config/gpt2_small.py', '--arms=ladder'],
    'blocks': ['--vary=MHA: n_kv_head=4; MQA: n_kv_head=1; MLA: attn=mla+n_kv_head=None; '
               'MoE: ffn_pattern=e+n_expert=8; hybrid: layer_pattern=mmam+ssm_state=64; '
               'Mamba-2: layer_pattern=m+pos=none+n_kv_head=None+ssm_state=64', '--match=active'],
}


def ablations(device, flags):
    """The sweeps whose reports lie in results/: five seeds of every arm, under an hour on two cores."""
    jobs = torch.cuda.device_count() if device.startswith('cuda') else min(2, os.cpu_count() or 1)
    for name, arms in SWEEPS.items():
        words = [*SIZE, *arms, '--seeds=5', '--evals=6', f'--jobs={jobs}', f'--device={device}',
                 f'--out_dir=out/ablate/{name}', f'--results=results/{name}', *flags]
        print(f'{name}: python ablate.py {shlex.join(words)}', flush=True)
        ablate.main(words)


def norms(device, rounds, out):
    """RMSNorm against LayerNorm: forward, forward and backward, and what is kept for the backward pass."""
    widths, tokens = (256, 512, 1024, 2048, 4096), 2048
    rows, ratios = [], []
    for width in widths:
        x = torch.randn(tokens, width, device=device, requires_grad=True)
        config = GPTConfig(n_embd=width, n_head=1)
        built = {}
        for name, cls in NORMS.items():
            built[name] = cls(width, config).to(device)
            for leaf, p in built[name].named_parameters():
                p.data.copy_(built[name].draw(leaf, None))

        def forward(norm):
            with torch.no_grad():
                return norm(x)
        ahead = in_turns({name: partial(forward, norm) for name, norm in built.items()}, device, rounds)
        both = in_turns({name: lambda norm=norm: norm(x).sum().backward() for name, norm in built.items()},
                        device, rounds)
        for name, norm in built.items():
            kept = saved_bytes(lambda norm=norm: norm(x))
            rows.append([f'{width} {name}', f'{ahead[name]:.3f}', f'{both[name]:.3f}',
                         f'{2 * x.nbytes / ahead[name] / 1e6:.1f}', f'{kept / x.nbytes:.2f}',
                         sum(p.numel() for p in norm.parameters())])
        ratios.append((ahead['layernorm'] / ahead['rmsnorm'], both['layernorm'] / both['rmsnorm']))
    print_table(['width, norm', 'forward ms', 'with backward ms', 'forward GB/s', 'kept / input',
                 'parameters'], rows)
    fig, (ax,) = figure(6.4, 3.8)
    for column, label in enumerate(('forward', 'forward and backward')):
        ax.plot(widths, [row[column] for row in ratios], 'o-', color=COLORS[column], label=label)
    ax.axhline(1, color='black', linewidth=0.8)
    ax.set_xscale('log', base=2)
    ax.set_xticks(widths, widths)
    ax.set_ylim(bottom=0)
    ax.set_xlabel('width')
    ax.set_title(f'time of LayerNorm over time of RMSNorm, {tokens} tokens in fp32', fontsize=10, loc='left')
    ax.legend(frameon=False, fontsize=9)
    finish(fig, out, 'norms')


def ffns(device, rounds, out):
    """SwiGLU 8/3 and 4 times as wide as the stream, against GELU at 4 times: parameters and time."""
    width, tokens = 512, 1024
    kinds = {'GELU 4x': ('gelu', 4 * width), 'SwiGLU 8/3x': ('swiglu', None),
             'SwiGLU 4x': ('swiglu', 4 * width)}
    x, built = torch.randn(1, tokens, width, device=device), {}
    for name, (ffn, hidden) in kinds.items():
        config = GPTConfig(n_embd=width, n_head=8, n_layer=1, ffn=ffn, ffn_width=hidden, bias=False)
        built[name] = dense(config, config.ffn_width).to(device)
        torch.nn.init.normal_(built[name].c_fc.weight, std=0.02)
        torch.nn.init.normal_(built[name].c_proj.weight, std=0.02)
    x.requires_grad_()
    times = in_turns({name: lambda ffn=ffn: ffn(x, None).sum().backward() for name, ffn in built.items()},
                     device, rounds)
    size = {name: sum(p.numel() for p in ffn.parameters()) for name, ffn in built.items()}
    kept = {name: saved_bytes(lambda ffn=ffn: ffn(x, None)) / x.nbytes for name, ffn in built.items()}
    print(f'width {width}, {tokens} tokens, fp32, forward and backward')
    print_table(['ffn', 'hidden', 'parameters', 'of GELU', 'ms', 'of GELU', 'kept / input'],
                [[name, ffn.c_proj.in_features, f'{size[name]:,}', f'x {size[name] / size["GELU 4x"]:.2f}',
                  f'{times[name]:.2f}', f'x {times[name] / times["GELU 4x"]:.2f}', f'{kept[name]:.1f}']
                 for name, ffn in built.items()])
    print('their losses: python ablate.py config/llama_small.py config/study.py '
          '--vary="GELU 4x: ffn=gelu; SwiGLU 4x: ffn_width=512"')
    fig, axes = figure(9, 3.2, panels=3)
    titles = ('parameters', 'ms', 'kept for backward / input')
    for ax, values, title in zip(axes, (size, times, kept), titles):
        ax.bar(list(values), list(values.values()), color=COLORS[:3])
        ax.yaxis.set_major_formatter(lambda value, _: format_quantity(value) if value else '0')
        ax.set_title(title, fontsize=10, loc='left')
        ax.tick_params(axis='x', labelsize=8)
    finish(fig, out, 'ffns')


def cache_figure(sizes, spans, out):
    """sizes {kind: gigabytes at each span}, spans [(batch, tokens)]"""
    fig, (ax,) = figure(8, 4.2)
    single = [i for i, (batch, _) in enumerate(spans) if batch == 1]
    for k, i in enumerate(single):
        places = [n + 0.38 * (k - (len(single) - 1) / 2) for n in range(len(sizes))]
        bars = ax.bar(places, [size[i] for size in sizes.values()], 0.36, color=COLORS[k],
                      label=f'{spans[i][1] // 1024}K tokens')
        ax.bar_label(bars, [f'{size[i]:.2g}' for size in sizes.values()], fontsize=8)
    ax.set_yscale('log')
    ax.set_xticks(range(len(sizes)), list(sizes), fontsize=8, rotation=20)
    ax.set_title('GB of cache for one sequence in 16 bit, shape of Llama 3 8B', fontsize=10, loc='left')
    ax.legend(frameon=False, fontsize=9)
    finish(fig, out, 'cache')


def rope(device, rounds, out):
    """RoPE's angles by frequency, and that q.k depends on the offset alone."""
    width, T = 64, 4096
    bases = {'10K': 10000.0, '100K': 100000.0}
    built = {name: RotaryPositions(GPTConfig(n_embd=width, n_head=1, pos='rope', rope_theta=theta))
             for name, theta in bases.items()}
    rows = []
    for pair in (0, 8, 16, 24, 31):
        cells = [f'{pair}']
        for name, theta in bases.items():
            wave = 2 * math.pi * theta ** (2 * pair / width)
            cells += [format_quantity(wave), f'{T / wave:.3g}']
        rows.append(cells)
    print(f'head of {width}, wavelength in tokens, and turns in {T} tokens')
    print_table(['pair', '10K: wave', 'turns', '100K: wave', 'turns'], rows)

    q, k = torch.randn(2, 1, 1, 1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[0], [1], [100], [1000], [3000]])
    rows = []
    for offset in (0, 1, 16, 256, 1024):
        scores = []
        for start in at:
            turned = (rotate(x, angle.cos(), angle.sin()) for x, angle in (
                (q, built['10K'].freq.angles(start + offset)), (k, built['10K'].freq.angles(start))))
            scores.append(math.prod(turned).sum().item())
        rows.append([offset, f'{scores[0]:+.5f}', f'{max(scores) - min(scores):.1e}'])
    places = ', '.join(map(str, at.flatten().tolist()))
    print(f'q.k of one q and k, in fp64 with angles in fp32, the key at {places}')
    print_table(['offset', 'q.k', 'spread over starts'], rows)

    fig, (left, right) = figure(11, 4.2, panels=2)
    pos = torch.arange(0, 256)
    for i, pair in enumerate((0, 4, 8, 12, 16, 24)):
        angle = built['10K'].freq.angles(pos)[:, pair]
        left.plot(pos, angle.cos() - 2.5 * i, color=COLORS[i])
        wave = 2 * math.pi * bases['10K'] ** (2 * pair / width)
        left.annotate(f'pair {pair}, wavelength {format_quantity(wave)}', (259, -2.5 * i), fontsize=8, va='center',
                      annotation_clip=False, color=COLORS[i])
    left.set_yticks([])
    left.set_xlabel('position')
    left.set_title('cos of the angle, base 10K: fast pairs tell neighbours\napart, slow ones far from near',
                   fontsize=10, loc='left')
    ones = torch.ones(1, 1, 1, width)
    offsets = torch.arange(0, T)
    for i, (name, module) in enumerate(built.items()):
        angle = module.freq.angles(offsets)
        turned = rotate(ones.expand(1, T, 1, width), angle.cos(), angle.sin())[0, :, 0]
        right.plot(offsets, turned.mean(-1), color=COLORS[i], label=f'base {name}', linewidth=1)
    right.axhline(0, color='black', linewidth=0.8)
    right.set_xscale('symlog', linthresh=1)
    right.set_xlim(0, T)
    right.set_xlabel('offset of the two tokens')
    right.set_title('q.k of two equal vectors of ones, over its value at offset 0', fontsize=10, loc='left')
    right.legend(frameon=False, fontsize=9)
    finish(fig, out, 'rope')


def context(device, rounds, out):
    """RoPE with base 10K and 100K, trained at 128 tokens and evaluated at four times that, scaled or not."""
    longer, scalings, losses, rows = (128, 256, 512), ('none', 'linear', 'ntk', 'yarn'), {}, []

    def evaluate(folder, T, scaling):
        factor = [] if scaling == 'none' else [f'--rope_scaling={scaling}', f'--rope_factor={T / 128}']
        printed = call([sys.executable, str(ROOT / 'train.py'), '--init_from=resume', '--eval_only=True',
                        f'--out_dir={folder}', f'--block_size={T}', *factor])
        return float(re.search(r'val loss ([\d.]+)', printed).group(1))
    for base in (10000.0, 100000.0):
        folder, _ = train(out, f'base{base:.0f}', f'--rope_theta={base}', f'--device={device}')
        trained = evaluate(folder, 128, 'none')
        for scaling in scalings:
            for T in longer:
                losses[base, scaling, T] = trained if T == 128 else evaluate(folder, T, scaling)
            cells = [f'{losses[base, scaling, T]:.4f}' for T in longer]
            rows.append([f'{format_quantity(base)}, {scaling}', *cells])
    print_table(['base, scaling', *(f'{T} tokens' for T in longer)], rows)
    fig, axes = figure(10, 4, panels=2)
    for ax, base in zip(axes, (10000.0, 100000.0)):
        for i, scaling in enumerate(scalings):
            ax.plot(longer, [losses[base, scaling, T] for T in longer], 'o-', color=COLORS[i], label=scaling)
        ax.set_xscale('log', base=2)
        ax.set_xticks(longer, longer)
        ax.set_xlabel('tokens of context in evaluation')
        ax.set_title(f'validation loss, base {format_quantity(base)}, trained at 128', fontsize=10, loc='left')
        ax.grid(alpha=0.3)
    low, high = (f(ax.get_ylim()[i] for ax in axes) for i, f in enumerate((min, max)))
    for ax in axes:
        ax.set_ylim(low, high)
    axes[0].legend(frameon=False, fontsize=9)
    finish(fig, out, 'context')


# ----------------------------------------------------------------------------------------------------------


def peak_bytes(run, device):
    """Bytes that a call takes at most beyond what was taken before; nan where that cannot be known."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path('/proc/self/status'), Path('/proc/self/clear_refs')
    if not reset.exists():
        return math.nan

    def read(name):
        return int(re.search(rf'{name}:\s+(\d+)', status.read_text()).group(1)) * 1024
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, or it would be taken unseen
    reset.write_text('5')  # Linux begins to look for the peak anew
    before = read('VmRSS')
    run()
    return read('VmHWM') - before


def lengths(device, rounds, out, budget=60.0):
    """One layer of attention, windowed attention, Mamba and Mamba-2 over 1K to 128K tokens, one sequence."""
    width, all_lengths = 256, [1024 * 2 ** i for i in range(8)]
    flags = dict(n_embd=width, n_head=4, n_layer=1, bias=False, norm='rmsnorm', ffn_pattern='-',
                 block_size=all_lengths[-1])
    kinds = {'attention': dict(pos='rope'), 'window 1024': dict(pos='rope', layer_pattern='w', window=1024),
             'Mamba': dict(pos='none', layer_pattern='m', ssm='mamba1'),
             'Mamba-2': dict(pos='none', layer_pattern='m', ssm='mamba2')}
    seconds, memory = {}, {}
    for name, more in kinds.items():
        model = GPT(GPTConfig(**flags, **more, vocab_size=64)).to(device).eval()
        mixer, left = model.h[0].mixer, budget
        for T in all_lengths:
            # a layer that is quadratic takes four times as long for twice the tokens
            last = seconds.get((name, T // 2), 0.0)
            if 4 * last > left:
                break
            x = torch.randn(1, T, width, device=device)
            ctx = model.context(torch.zeros(1, T, dtype=torch.int64, device=device), None, None)
            with torch.no_grad():
                if T == all_lengths[0]:
                    mixer(x, ctx)  # the first call loads what it needs
                began = time.perf_counter()
                memory[name, T] = peak_bytes(lambda: mixer(x, ctx), device)
                times = [time.perf_counter() - began]
                while len(times) < 6 and sum(times) < left / 8:
                    began = time.perf_counter()
                    mixer(x, ctx)
                    if device.startswith('cuda'):
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - began)
            seconds[name, T], left = statistics.median(times[1:] or times), left - sum(times)
    print(f'forward pass of one layer of width {width}, one sequence; -: beyond {budget:.0f} s for the layer')
    for title, found, shown in (('seconds', seconds, lambda v: f'{v:.4f}'),
                                ('peak MB', memory, lambda v: f'{v / 1e6:.0f}')):
        print_table([title, *(f'{T // 1024}K' for T in all_lengths)],
                    [[name, *(shown(found[name, T]) if (name, T) in found else '-' for T in all_lengths)]
                     for name in kinds])
    fig, axes = figure(10.5, 4.2, panels=2)
    for ax, found, title in zip(axes, (seconds, memory), ('seconds', 'peak memory, bytes')):
        for i, name in enumerate(kinds):
            points = [(T, found[name, T]) for T in all_lengths if found.get((name, T), 0) > 0]
            ax.plot(*zip(*points), 'o-', color=COLORS[i], label=name)
        ax.set_xscale('log', base=2)
        ax.set_yscale('log')
        ax.set_xticks(all_lengths, [f'{T // 1024}K' for T in all_lengths])
        ax.set_xlabel('tokens')
        ax.set_title(f'{title}, forward pass of one layer', fontsize=10, loc='left')
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=9)
    finish(fig, out, 'lengths')


def router(device, rounds, out):
    """How evenly eight experts are used over training, without balancing, with a loss, with a bias."""
    kinds = {'none': ['--balance=none'], 'loss': ['--balance=aux'],
             'bias': ['--balance=bias', '--router=sigmoid', '--bias_rate=0.01']}
    moe = ['--ffn_pattern=e', '--n_expert=8', '--n_expert_used=2', '--log_interval=5', f'--device={device}']
    runs = {name: train(out, f'router_{name}', *moe, *flags)[1] for name, flags in kinds.items()}
    rows = []
    for name, lines in runs.items():
        load = [line for line in lines if 'expert_max' in line]
        loss = [line['val_loss'] for line in lines if 'val_loss' in line][-1]
        tail = load[-len(load) // 4:]
        rows.append([name, f'{load[0]["expert_max"]:.3f}',
                     f'{statistics.fmean(line["expert_max"] for line in tail):.3f}',
                     f'{statistics.fmean(line["expert_entropy"] for line in tail):.4f}', f'{loss:.4f}'])
    print('the busiest expert\'s share (an even one is 0.125), and the entropy of the shares (even: 1)')
    print_table(['balancing', 'at the start', 'last quarter', 'entropy', 'val loss'], rows)
    fig, axes = figure(10.5, 4, panels=2)
    for ax, key, even in zip(axes, ('expert_max', 'expert_entropy'), (0.125, 1.0)):
        for i, (name, lines) in enumerate(runs.items()):
            points = [(line['step'], line[key]) for line in lines if key in line]
            ax.plot(*zip(*points), color=COLORS[i], label=f'balancing: {name}')
        ax.axhline(even, color='black', linewidth=0.8, linestyle='--')
        ax.set_xlabel('step; dashed: perfectly even')
    axes[0].set_title('share of the busiest of 8 experts in any layer, at most 1/2', fontsize=10, loc='left')
    axes[1].set_title('entropy of the shares, mean over layers', fontsize=10, loc='left')
    axes[1].legend(frameon=False, fontsize=9, loc='lower right')
    finish(fig, out, 'router')


def reach(device, rounds, out):
    """How far a token's influence reaches through windowed layers: the gradient, by distance and depth."""
    window, depth, T = 16, 6, 128
    config = GPTConfig(n_layer=depth, n_head=4, n_embd=64, vocab_size=64, block_size=T, pos='rope',
                       norm='rmsnorm', ffn='swiglu', bias=False, layer_pattern='w', window=window)
    model = GPT(config).to(device).double().eval()
    idx = torch.randint(64, (8, T), generator=torch.Generator().manual_seed(0)).to(device)
    start = model.wte(idx).detach().requires_grad_()
    ctx = model.context(idx, None, None)._replace(losses=[])
    x, influence, rows = start, [], []
    for layer, block in enumerate(model.h, start=1):
        x = block(x, ctx)
        probe = torch.randn(x[:, -1].shape, dtype=x.dtype, generator=torch.Generator().manual_seed(layer))
        grad, = torch.autograd.grad((x[:, -1] * probe.to(device)).sum(), start, retain_graph=True)
        strength = grad.norm(dim=-1).mean(0).flip(0)  # by distance from the last token
        influence.append(strength / strength[0])
        rows.append([layer, int(strength.nonzero().max()), layer * (window - 1),
                     f'{influence[-1][1]:.1e}', f'{influence[-1][layer * (window - 1)]:.1e}'])
    print(f'{depth} layers, each sees {window} tokens, its own included')
    print_table(['layers', 'farthest token felt', 'layers x (window - 1)', 'influence at 1',
                 'at the farthest'], rows)
    from matplotlib.colors import LogNorm
    fig, (ax,) = figure(8.4, 3.6)
    image = torch.stack(influence).cpu().clamp(min=1e-12).numpy()
    shown = ax.imshow(image, aspect='auto', norm=LogNorm(1e-8, 1), cmap='viridis', origin='lower',
                      extent=(-0.5, T - 0.5, 0.5, depth + 0.5))
    corners = [(layer * (window - 1) + 0.5, layer + y) for layer in range(1, depth + 1) for y in (-0.5, 0.5)]
    ax.plot(*zip(*corners), color='white', linewidth=1.2)
    ax.set_xlabel('distance of the token (white: layers x (window - 1))')
    ax.set_ylabel('layers')
    ax.set_title(f'influence on the last token over its own on itself; window {window}', fontsize=10,
                 loc='left')
    fig.colorbar(shown, ax=ax)
    finish(fig, out, 'reach')
