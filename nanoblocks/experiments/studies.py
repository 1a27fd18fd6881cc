"""
Questions of the literature, each answered with a table and a figure: topics of bench.py.
Every number is measured here, by the code of this repository; where a study trains, train.py does it.
"""
import os
import re
import shlex
import statistics
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import split_arguments
from model import NORMS, GPTConfig, dense
from nanoblocks.experiments import comparisons, sweep
from nanoblocks.experiments.arms import files_and_flags, read_flags
from nanoblocks.experiments.figures import (
    COLORS,
    have_matplotlib,
    log2_axis,
    log_axis,
    panels,
    save_and_say,
    title,
)
from nanoblocks.experiments.memory import saved_bytes
from nanoblocks.experiments.runs import read_lines, recorded, run_script
from nanoblocks.experiments.timing import print_table, ratio, times
from nanoblocks.experiments.topics import each, sizes
from nanoblocks.formats import counted, format_quantity
from nanoblocks.hardware import can_compile

SIZE = ['config/llama_small.py', 'config/study.py']  # of every model that is trained here

# ----------------------------------------------------------------------------------------------------------
# The sweeps of results/

ALONE = 'pos=none+n_kv_head=None'
MAMBA2 = 'ssm_state=64'
RETNET = 'rnn_decay=retnet+rnn_erase=none+rnn_feature=none+rnn_unit=False+rnn_conv=0+rnn_rope=True'
KDA = 'rnn_decay=key+rnn_decay_rank=32+rnn_gate=sigmoid+rnn_gate_rank=32'


def ffn_arms(flags):
    """Beside SwiGLU of 8/3 the width: what has as many parameters, SwiGLU of 4 times, and as many as that."""
    four, six = 4 * flags['n_embd'], 6 * flags['n_embd']
    return [f'--vary=GELU 4x: ffn=gelu; relu2 4x: ffn=relu2; SwiGLU 4x: ffn_width={four}; '
            f'GELU 6x: ffn=gelu+ffn_width={six}; relu2 6x: ffn=relu2+ffn_width={six}']


def kv_arms(flags):
    """
    Beside GQA, MHA and MQA with the same query heads, and both with as large a cache: MHA of so few heads,
    MQA of one key/value head as wide as those of GQA together. All have as many parameters.
    """
    H, K = flags['n_head'], flags['n_kv_head']
    D = flags.get('head_dim') or flags['n_embd'] // H
    if not 1 < K < H or H % K:
        raise ValueError(f'n_kv_head={K} must be above 1 and divide n_head={H}, for GQA to stand between MHA '
                         'and MQA: --n_head=8 --n_kv_head=2')
    return [f'--vary=MHA: n_kv_head={H}; MQA: n_kv_head=1; MHA same cache: n_head={K}+head_dim={D}; '
            f'MQA same cache: n_head={H // K}+n_kv_head=1+head_dim={K * D}', '--match=params']


# each block from GPT-2 to Llama; other kinds of layers; states in the place of attention: the last two with
# as many active parameters; feed-forwards; key/value heads; the speed-run without one of its blocks.
# A function makes the words from the flags of the reference.
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
    'ffns': ffn_arms,
    'kvheads': kv_arms,
    'tricks': ['--vary=no QK-norm: qk_norm=False; GELU: ffn=gelu; no zero init: zero_init=False; '
               'no value embedding: value_embed=False; no embedding skip: embed_skip=False; '
               'tied head: tie=True; no soft-cap: logit_softcap=None; '
               'no windows: layer_pattern=a+window=None; '
               'AdamW: optimizer=adamw+group_lr=matrix=1.5e-3; short cooldown: wsd_decay=0.2', '--seeds=4'],
}
FILES = {'kvheads': ['--n_head=8', '--n_kv_head=2'], 'tricks': ['config/speedrun.py']}


def ablations(argv, device):
    """The sweeps whose reports are in results/ladder and results/blocks: 42 minutes on two cores."""
    run_sweeps(('ladder', 'blocks'), argv, device)


def mixers(argv, device):
    """States in the place of attention, or of most of it: a sweep into results/mixers, 70 minutes."""
    run_sweeps(('mixers',), argv, device)


def run_sweeps(names, argv, device, own=('device',)):
    """Each on five seeds, tricks on four -> the words of the last. own: settings of bench.py, left out."""
    files, flags = files_and_flags(argv, without=own)
    for name in names:
        start = [*([] if name == 'tricks' else SIZE), *FILES.get(name, []), *files]
        varied = SWEEPS[name](read_flags([*start, *flags])[0]) if callable(SWEEPS[name]) else SWEEPS[name]
        if name in ('ffns', 'tricks'):  # whose pages say what the reference is; that of kvheads is given
            refuse_varied(name, [*files, *flags], re.findall(r'[:+] ?(\w+)=', varied[0]))
        words = [*start, '--seeds=5', *varied, '--evals=6', *sweep.runs_on(device),
                 f'--out_dir=out/ablate/{name}', f'--results=results/{name}', *flags]
        print(f'{name}: python ablate.py {shlex.join(words)}', flush=True)
        sweep.main(words)
    return words


def kvheads(argv, device):
    """MHA, GQA and MQA at equal parameters, and at equal parameters and cache: trained, about 20 minutes."""
    comparisons.write('kvheads', argv, run_sweeps(('kvheads',), argv, device))


def tricks(argv, device):
    """The speed-run's blocks, each taken out alone of the whole stack: trained, about 40 minutes."""
    comparisons.write('tricks', argv, run_sweeps(('tricks',), argv, device))


# ----------------------------------------------------------------------------------------------------------
# Norms


def norms(rounds, tokens, width, device, figures):
    """RMSNorm against LayerNorm as plain operations, PyTorch's, the model's and compiled; two minutes."""
    widths, (T,) = sizes('width', width, 256, 512, 1024, 2048, 4096), sizes('tokens', tokens, 2048)
    codes = ['plain', 'PyTorch', 'model'] + ['compiled'] * can_compile(device)
    found, kept = {}, {}
    for width in each(widths, 'width {}'.format):
        x = torch.randn(T, width, device=device, requires_grad=True)
        built = {(code, name): norm_of(code, name, width, device) for code in codes for name in NORMS}
        forward = times({key: partial(run, norm, x) for key, norm in built.items()}, rounds, device)
        both = times({key: partial(run_both, norm, x) for key, norm in built.items()}, rounds, device)
        for key, norm in built.items():
            found[width, *key] = forward[key], both[key]
            kept[width, *key] = saved_bytes(partial(norm, x)) / x.nbytes
    heads = [f'{column}{text}' for column in ('', 'both: ')
             for text in ('LayerNorm ms', 'RMSNorm ms', 'RMSNorm / LayerNorm')]
    print(f'{T} tokens in fp32: the forward pass, both passes, and what is kept between them over the input')
    print_table(['width, code', *heads, 'kept: LayerNorm', 'RMSNorm'],
                [[f'{width} {code}', *norms_cells(found, width, code),
                  *(f'{kept[width, code, name]:.2f}' for name in NORMS)]
                 for width in widths for code in codes])
    for code in codes:
        for column, text in enumerate(('forward', 'forward and backward')):
            e = over_widths(found, widths, code, column)
            word = 'less time than' if e.high < 1 else 'more time than' if e.low > 1 else 'not resolved from'
            print(f'{code}, {text}: RMSNorm takes {e} of the time of LayerNorm, {word} it; {T} tokens, '
                  f'{counted(len(widths), "width")}, {counted(e.n, "round")}')
    draw_norms(widths, codes, found, T, figures)


def norms_cells(found, width, code):
    """Cells of the table: for forward and both passes the two medians and their ratio with its interval."""
    cells = []
    for column in (0, 1):
        ms = [found[width, code, name][column] for name in ('layernorm', 'rmsnorm')]
        cells += [*(f'{statistics.median(times):.3f}' for times in ms), str(ratio(ms[1], ms[0]))]
    return cells


def over_widths(found, widths, code, column):
    """RMSNorm's times over LayerNorm's, as a geometric mean over the widths of each round -> Ratio"""
    means = [[statistics.geometric_mean(ms) for ms in zip(*(found[width, code, name][column]
                                                            for width in widths))]
             for name in ('rmsnorm', 'layernorm')]
    return ratio(*means)


def draw_norms(widths, codes, found, T, figures):
    """found {(width, code, norm): (forward ms of each round, both passes)}: left the times, right ratios"""
    fig, (left, right) = panels(11, 4.2, columns=2)
    highest = 1.0
    for color, code in zip(COLORS, codes):
        for norm, style in (('layernorm', 's--'), ('rmsnorm', 'o-')):
            ms = [statistics.median(found[width, code, norm][1]) for width in widths]
            left.plot(widths, ms, style, color=color, label=f'{norm}, {code}', markersize=4)
        ratios = [ratio(*(found[width, code, norm][1] for norm in ('layernorm', 'rmsnorm')))
                  for width in widths]
        middle, low, high = ([getattr(e, name) for e in ratios] for name in ('mean', 'low', 'high'))
        highest = max(highest, *middle)
        bars = [[m - end for m, end in zip(middle, low)], [end - m for m, end in zip(middle, high)]]
        right.errorbar(widths, middle, yerr=bars, fmt='o-', color=color, label=code, capsize=2, markersize=4)
    right.axhline(1, color='black', linewidth=0.8)
    for ax in (left, right):
        log2_axis(ax, widths)
        ax.set_xlabel('width (numbers per token)')
    left.legend(frameon=False, fontsize=8, ncols=2, loc='upper left')
    right.legend(frameon=False, fontsize=8, loc='upper left')
    log_axis(left)
    left.set_ylim(top=6 * left.dataLim.y1)  # room for the legend
    right.set_ylim(0, 1.3 * highest)  # an interval of few rounds may end far above
    left.set_ylabel(f'forward and backward, {T} tokens (ms)')
    right.set_ylabel('time of LayerNorm / time of RMSNorm')
    title(left, f'{T} tokens in fp32')
    title(right, 'above 1, RMSNorm is faster; bars: 95 % intervals over rounds')
    save_and_say(fig, figures, 'norms')


@torch.no_grad()
def run(norm, x):
    return norm(x)


def run_both(norm, x):
    norm(x).sum().backward()


def layer_norm_by_steps(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


def rms_norm_by_steps(norm, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


# plain operations, which torch.compile fuses; a function of PyTorch; and what the model runs, which on a GPU
# is our kernel where it is RMSNorm
CODES = {
    'plain': {'layernorm': layer_norm_by_steps, 'rmsnorm': rms_norm_by_steps},
    'PyTorch': {'layernorm': lambda norm, x: F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps),
                'rmsnorm': lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)},
    'model': dict.fromkeys(NORMS, lambda norm, x: norm(x)),
}


def norm_of(code, name, width, device):
    """A function that applies a norm of this width, whose weight is one and its bias zero, by this code."""
    norm = NORMS[name](width, GPTConfig(n_embd=width, n_head=1)).to(device)
    for key, p in norm.named_parameters():
        p.data.fill_(key == 'weight')
    by = CODES['plain'][name] if code == 'compiled' else CODES[code][name]
    return partial(torch.compile(by) if code == 'compiled' else by, norm)


# ----------------------------------------------------------------------------------------------------------
# Feed-forward


def ffns(argv, rounds, tokens, width, device, figures):
    """GELU, ReLU^2 and SwiGLU at equal and at larger widths: their costs, then a sweep of about 20 min."""
    ffn_costs(rounds, tokens, width, device, figures)
    own = ('device', 'rounds', 'tokens', 'width', 'figures')
    comparisons.write('ffns', argv, run_sweeps(('ffns',), argv, device, own))


def ffn_costs(rounds, tokens, width, device, figures):
    """Parameters, time and memory of one feed-forward of each kind."""
    (width,), (tokens,) = sizes('width', width, 512), sizes('tokens', tokens, 1024)
    choices = {'GELU 4x': ('gelu', 4 * width), 'relu2 4x': ('relu2', 4 * width),
               'SwiGLU 8/3x': ('swiglu', None), 'relu2 6x': ('relu2', 6 * width),
               'SwiGLU 4x': ('swiglu', 4 * width)}
    x, built = torch.randn(1, tokens, width, device=device, requires_grad=True), {}
    for name, (ffn, hidden) in choices.items():
        config = GPTConfig(n_embd=width, n_head=1, n_layer=1, ffn=ffn, ffn_width=hidden, bias=False)
        built[name] = dense(config, config.ffn_width).to(device)
        torch.nn.init.normal_(built[name].c_fc.weight, std=0.02)
        torch.nn.init.normal_(built[name].c_proj.weight, std=0.02)
    found = times({name: lambda ffn=ffn: ffn(x, None).sum().backward() for name, ffn in built.items()},
                  rounds, device)
    size = {name: sum(p.numel() for p in ffn.parameters()) for name, ffn in built.items()}
    kept = {name: saved_bytes(lambda ffn=ffn: ffn(x, None)) / x.nbytes for name, ffn in built.items()}
    median = {name: statistics.median(ms) for name, ms in found.items()}
    print(f'width {width}, {tokens} tokens, fp32, forward and backward, {counted(rounds, "round")}')
    print_table(['ffn', 'hidden', 'parameters', 'of GELU', 'ms', 'of GELU, 95 % interval', 'kept / input'],
                [[name, ffn.c_proj.in_features, f'{size[name]:,}', f'x {size[name] / size["GELU 4x"]:.2f}',
                  f'{median[name]:.2f}', str(ratio(found[name], found['GELU 4x'])), f'{kept[name]:.1f}']
                 for name, ffn in built.items()])
    if have_matplotlib():   # a sweep follows, which needs none
        draw_ffn_costs(size, median, kept, width, tokens, figures)


def draw_ffn_costs(size, median, kept, width, tokens, figures):
    """Bars for each kind: parameters, milliseconds and bytes that are kept."""
    fig, axes = panels(13, 3.8, columns=3)
    texts = {'size': 'parameters', 'time': 'forward and backward (ms)',
             'memory': 'bytes kept for backward / bytes of input'}
    for ax, values, (about, text) in zip(axes, (size, median, kept), texts.items()):
        ax.bar(list(values), list(values.values()), color=COLORS[:len(values)])
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
    return [*files, *flags], refuse_varied(topic, [*files, *flags], fixed)


def refuse_varied(topic, words, names):
    """
    [config file or --key=value] -> {key: text} of the flags; ValueError for one of the names, which the topic
    itself varies.
    """
    given, source = {key: text for key, text in split_arguments(words) if key}, read_flags(words)[2]
    for name in names:
        if name in source and name not in given:
            raise ValueError(f'{name} must be left out of {source[name]}: bench.py {topic} sets it itself')
        if name in given:
            raise ValueError(f'{name}={given[name]} must be left out: bench.py {topic} sets it itself')
    return given


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
