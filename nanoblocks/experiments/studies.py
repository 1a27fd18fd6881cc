"""
Questions of the literature that need no sweep, each answered with a table and a figure: topics of bench.py.
Every number is measured here, by the code of this repository; where a study trains, train.py does it.
"""
import math
import os
import shlex
import statistics
from functools import partial
from pathlib import Path

import torch

from configurator import split_arguments
from model import GPT, NORMS, GPTConfig, dense
from nanoblocks.experiments import sweep
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.figures import COLORS, log2_axis, panels, save_and_say, title
from nanoblocks.experiments.memory import peak_bytes, saved_bytes
from nanoblocks.experiments.runs import read_lines, recorded, run_script
from nanoblocks.experiments.timing import medians, print_table, timed
from nanoblocks.experiments.topics import each, in_short, sizes, tell
from nanoblocks.formats import format_quantity

SIZE = ['config/llama_small.py', 'config/study.py']  # of every model that is trained here

# ----------------------------------------------------------------------------------------------------------
# The sweeps of results/

ALONE = 'pos=none+n_kv_head=None'
MAMBA2 = 'ssm_state=64'
RETNET = 'rnn_decay=retnet+rnn_erase=none+rnn_feature=none+rnn_unit=False+rnn_conv=0+rnn_rope=True'
KDA = 'rnn_decay=key+rnn_decay_rank=32+rnn_gate=sigmoid+rnn_gate_rank=32'

# each block from GPT-2 to Llama; other kinds of layers; states in the place of attention: the last two with
# as many active parameters
SWEEPS = {
    'ladder': ['--base=config/gpt2_small.py', '--arms=ladder'],
    'blocks': ['--vary=MHA: n_kv_head=4; MQA: n_kv_head=1; MLA: attn=mla+n_kv_head=None; '
               'MoE: ffn_pattern=e+n_expert=8; hybrid: layer_pattern=mmam+ssm_state=64; '
               f'Mamba-2: layer_pattern=m+{ALONE}+{MAMBA2}', '--match=active'],
    'mixers': ['--vary=window: layer_pattern=w+window=32; '
               f'Mamba-2: layer_pattern=m+{ALONE}+{MAMBA2}; RetNet: layer_pattern=r+{ALONE}+{RETNET}; '
               f'gated DeltaNet: layer_pattern=r+{ALONE}; KDA: layer_pattern=r+{ALONE}+{KDA}; '
               f'Mamba-2 3:1: layer_pattern=mmma+{MAMBA2}; '
               f'gated DeltaNet 3:1: layer_pattern=rrra; KDA 3:1: layer_pattern=rrra+{KDA}',
               '--match=active'],
}


def ablations(argv, device):
    """The sweeps whose reports are in results/ladder and results/blocks: 42 minutes on two cores."""
    run_sweeps(('ladder', 'blocks'), argv, device)


def mixers(argv, device):
    """States in the place of attention, or of most of it: a sweep into results/mixers, 70 minutes."""
    run_sweeps(('mixers',), argv, device)


def run_sweeps(names, argv, device):
    """Each on five seeds."""
    jobs = torch.cuda.device_count() if device.startswith('cuda') else min(2, os.cpu_count() or 1)
    files, flags = files_and_flags(argv, without=('device',))
    for name in names:
        words = [*SIZE, *files, *SWEEPS[name], '--seeds=5', '--evals=6', f'--jobs={jobs}',
                 f'--device={device}', f'--out_dir=out/ablate/{name}', f'--results=results/{name}', *flags]
        print(f'{name}: python ablate.py {shlex.join(words)}', flush=True)
        sweep.main(words)


# ----------------------------------------------------------------------------------------------------------
# Norms


def norms(rounds, tokens, width, device, figures):
    """RMSNorm against LayerNorm: time forward and backward, and memory kept for the backward pass."""
    widths, (T,) = sizes('width', width, 256, 512, 1024, 2048, 4096), sizes('tokens', tokens, 2048)
    times, rows = {name: [] for name in NORMS}, []
    for width in each(widths, 'width {}'.format):
        x = torch.randn(T, width, device=device, requires_grad=True)
        built = {name: norm_of(cls, width).to(device) for name, cls in NORMS.items()}
        forward = medians({name: partial(run, norm, x) for name, norm in built.items()}, rounds, device)
        both = medians({name: lambda norm=norm: norm(x).sum().backward() for name, norm in built.items()},
                       rounds, device)
        for name, norm in built.items():
            saved = saved_bytes(lambda norm=norm: norm(x))
            times[name].append((forward[name], both[name]))
            rows.append([f'{width} {name}', f'{forward[name]:.3f}', f'{both[name]:.3f}',
                         f'{2 * x.nbytes / forward[name] / 1e6:.1f}', f'{saved / x.nbytes:.2f}',
                         sum(p.numel() for p in norm.parameters())])
    print_table(['width, norm', 'forward ms', 'with backward ms', 'forward GB/s', 'kept / input',
                 'parameters'], rows)
    draw_norms(widths, times, T, figures)


def draw_norms(widths, times, T, figures):
    """times {norm: [(ms forward, ms forward and backward) of each width]} -> left the times, right ratios"""
    fig, (left, right) = panels(10.5, 4, columns=2)
    for column, (name, style) in enumerate((('forward', 'o-'), ('forward and backward', 's--'))):
        for color, (norm, found) in zip(COLORS, times.items()):
            left.plot(widths, [row[column] for row in found], style, color=color, label=f'{norm}, {name}')
        ratios = [a[column] / b[column] for a, b in zip(times['layernorm'], times['rmsnorm'])]
        right.plot(widths, ratios, style, color=COLORS[2], label=name)
    right.axhline(1, color='black', linewidth=0.8)
    for ax in (left, right):
        log2_axis(ax, widths)
        ax.set_xlabel('width (numbers per token)')
        ax.set_ylim(0, 1.1 * max(1 if ax is right else 0, ax.dataLim.y1))
        ax.legend(frameon=False, fontsize=9)
    left.set_ylabel(f'time for {T} tokens (ms)')
    right.set_ylabel('time of LayerNorm / time of RMSNorm')
    title(left, f'{T} tokens in fp32')
    title(right, 'above 1, RMSNorm is faster')
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


def ffns(rounds, tokens, width, device, figures):
    """SwiGLU of 8/3 and 4 times the width against GELU of 4 times: parameters, time and memory."""
    (width,), (tokens,) = sizes('width', width, 512), sizes('tokens', tokens, 1024)
    choices = {'GELU 4x': ('gelu', 4 * width), 'SwiGLU 8/3x': ('swiglu', None),
               'SwiGLU 4x': ('swiglu', 4 * width)}
    x, built = torch.randn(1, tokens, width, device=device, requires_grad=True), {}
    for name, (ffn, hidden) in choices.items():
        config = GPTConfig(n_embd=width, n_head=1, n_layer=1, ffn=ffn, ffn_width=hidden, bias=False)
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
    fig, axes = panels(10.5, 3.8, columns=3)
    texts = {'size': 'parameters', 'time': 'forward and backward (ms)',
             'memory': 'bytes kept for backward / bytes of input'}
    for ax, values, (about, text) in zip(axes, (size, times, kept), texts.items()):
        ax.bar(list(values), list(values.values()), color=COLORS[:3])
        ax.yaxis.set_major_formatter(lambda value, _: format_quantity(value) if value else '0')
        title(ax, f'{about}, width {width}, {tokens} tokens' if about == 'time' else about)
        ax.set_ylabel(text)
        ax.grid(visible=False, axis='x')
        ax.tick_params(axis='x', labelsize=8)
    save_and_say(fig, figures, 'ffns')


# ----------------------------------------------------------------------------------------------------------
# Runs of train.py


def trained_flags(topic, argv, own, fixed):
    """
    ([config files and flags for train.py], {flag: text}) of a command line. own: settings of bench.py, which
    are left out; fixed: flags that the topic itself varies, which are refused.
    """
    files, flags = files_and_flags(argv, without=own)
    given = {name: text for name, text in split_arguments(flags) if name}
    for name in fixed:
        if name in given:
            raise ValueError(f'{name}={given[name]} must be left out: bench.py {topic} compares its values')
    return [*files, *flags], given


def train(out, name, *flags):
    """A run of train.py in out/name, trained if it is not there yet -> (folder, lines of its metrics)"""
    folder = os.path.join(out, name)
    done = Path(folder, 'done')
    if not done.exists():
        run_script('train.py', *SIZE, *flags, f'--out_dir={folder}', '--overwrite=True', tell=name)
        done.write_text(shlex.join(flags))
    elif done.read_text() != shlex.join(flags):
        raise ValueError(f'{folder} holds a run with other flags: remove it, or choose another --figures')
    return folder, read_lines(os.path.join(folder, 'metrics.jsonl'))


# ----------------------------------------------------------------------------------------------------------
# Long sequences

def lengths(tokens, width, limit_s, device, figures):
    """Time and memory of one layer: attention, window, Mamba, Mamba-2, gated DeltaNet; 1K to 128K tokens."""
    wanted, (width,) = sizes('tokens', tokens, *(1024 * 2 ** i for i in range(8))), sizes('width', width, 256)
    flags = dict(n_embd=width, n_head=heads(width), n_layer=1, bias=False, norm='rmsnorm', ffn_pattern='-',
                 block_size=wanted[-1], vocab_size=64)
    choices = {'attention': dict(pos='rope'), 'window 1024': dict(pos='rope', layer_pattern='w', window=1024),
               'Mamba': dict(pos='none', layer_pattern='m', ssm='mamba1'),
               'Mamba-2': dict(pos='none', layer_pattern='m', ssm='mamba2',
                               ssm_head_dim=64 if 2 * width % 64 == 0 else 2 * width),
               'gated DeltaNet': dict(pos='none', layer_pattern='r')}
    found = {name: layer_costs(name, GPT(GPTConfig(**flags, **choices[name])).to(device).eval(), wanted,
                               device, limit_s) for name in each(choices)}
    print(f'forward pass of one layer of width {width}, one sequence; -: beyond the {limit_s:g} s of a layer '
          '(--limit_s)')
    shown = {'seconds': lambda value: f'{value:.4f}', 'peak MB': lambda value: f'{value / 1e6:.0f}'}
    for i, (heading, text) in enumerate(shown.items()):
        print_table([heading, *map(in_short, wanted)],
                    [[name, *(text(costs[T][i]) if T in costs else '-' for T in wanted)]
                     for name, costs in found.items()])
    draw_lengths(wanted, found, width, figures)


def heads(width):
    """Heads of 64, or one where the width is no multiple of it."""
    return width // 64 if width % 64 == 0 else 1


def draw_lengths(wanted, found, width, figures):
    """found {layer: {tokens: (seconds, bytes)}}"""
    fig, axes = panels(10.5, 4.2, columns=2)
    for ax, i, scale, text in zip(axes, (0, 1), (1, 1e6), ('forward pass (s)', 'peak memory (MB)')):
        for color, (name, costs) in zip(COLORS, found.items()):
            points = [(T, cost[i] / scale) for T, cost in costs.items() if cost[i] > 0]
            if points:
                ax.plot(*zip(*points), 'o-', color=color, label=name)
        log2_axis(ax, wanted, [in_short(T) for T in wanted])
        ax.set_xlim(wanted[0] / 1.3, wanted[-1] * 1.3)
        ax.set_yscale('log')
        ax.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
        ax.set_xlabel('tokens')
        ax.set_ylabel(text)
        title(ax, f'one layer of width {width}, one sequence')
    axes[0].legend(frameon=False, fontsize=9)
    save_and_say(fig, figures, 'lengths')


@torch.no_grad()
def layer_costs(name, model, wanted, device, left):
    """{tokens: (median seconds, peak bytes)} of the model's first mixer, as long as `left` seconds last."""
    mixer, costs = model.h[0].mixer, {}
    for T in wanted:
        if costs and expected(costs, T) > left:
            tell(f'{name}: {in_short(T)} tokens would take about {expected(costs, T):.0f} s')
            break
        tell(f'{name}: {in_short(T)} tokens')
        x = torch.randn(1, T, model.config.n_embd, device=device)
        ctx = model.context(torch.zeros(1, T, dtype=torch.int64, device=device), None, None)
        run = partial(mixer, x, ctx)
        if not costs:
            run()  # the first call loads libraries
        peak = []
        seconds = [timed(lambda run=run, peak=peak: peak.append(peak_bytes(run, device)), device)() / 1e3]
        while len(seconds) < 6 and sum(seconds) < left / 8:
            seconds.append(timed(run, device)() / 1e3)
        costs[T], left = (statistics.median(seconds[1:] or seconds), peak[0]), left - sum(seconds)
    return costs


def expected(costs, T):
    """Seconds at T tokens, from the growth between the last two lengths, at least linear; first quadratic."""
    times = [(length, seconds) for length, (seconds, _) in costs.items()][-2:]
    (before, old), (last, new) = times[0], times[-1]
    power = 2.0 if len(times) < 2 else min(2.0, max(1.0, math.log(new / old, last / before)))
    return new * (T / last) ** power


# ----------------------------------------------------------------------------------------------------------
# Routing


def router(argv, device, figures):
    """How evenly experts are used: without balancing, with a loss, with a bias; takes train.py's settings."""
    choices = {'none': ['--balance=none'], 'loss': ['--balance=aux'],
               'bias': ['--balance=bias', '--router=sigmoid', '--bias_rate=0.01']}
    moe = ['--ffn_pattern=e', '--n_expert=8', '--n_expert_used=2', '--log_interval=5', f'--device={device}']
    words, _ = trained_flags('router', argv, ('device', 'figures'), ('balance', 'router', 'bias_rate'))
    runs = {name: train(figures, f'router_{name}', *moe, *words, *choices[name])[1]
            for name in each(choices, 'balancing: {}'.format)}
    model = recorded(os.path.join(figures, 'router_none'))[0]
    even, most, rows = 1 / model['n_expert'], 1 / model['n_expert_used'], []
    for name, lines in runs.items():
        load = [line for line in lines if 'expert_max' in line]
        loss = [line['val_loss'] for line in lines if 'val_loss' in line][-1]
        tail = load[-len(load) // 4:]
        rows.append([name, f'{load[0]["expert_max"]:.3f}',
                     f'{statistics.fmean(line["expert_max"] for line in tail):.3f}',
                     f'{statistics.fmean(line["expert_entropy"] for line in tail):.4f}', f'{loss:.4f}'])
    print(f"the busiest expert's share of the tokens (even: {even:.3g}), and the shares' entropy (even: 1)")
    print_table(['balancing', 'at the start', 'last quarter', 'entropy', 'val loss'], rows)
    fig, axes = panels(10.5, 4, columns=2)
    shown = [('expert_max', even, "the busiest expert's share of the tokens", f'at most {most:.3g}'),
             ('expert_entropy', 1.0, 'entropy of the shares / of even shares', 'mean over layers')]
    for ax, (key, dashed, label, text) in zip(axes, shown):
        for i, (name, lines) in enumerate(runs.items()):
            points = [(line['step'], line[key]) for line in lines if key in line]
            ax.plot(*zip(*points), color=COLORS[i], label=f'balancing: {name}')
        ax.axhline(dashed, color='black', linewidth=0.8, linestyle='--')
        ax.set_xlabel('training step')
        ax.set_ylabel(label)
        title(ax, f'{text}; dashed: even')
    axes[1].legend(frameon=False, fontsize=9, loc='lower right')
    save_and_say(fig, figures, 'router')
