"""
How fast whole models are, and single layers, over the length of a text: bench.py `throughput`, `lengths`.

Every length is measured until a model has spent its --limit_s seconds; what would take longer is left out.
At each length the models run in turns, so that two of them can be compared round by round.
"""
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT, GPTConfig, TokenCache, kv_cache_bytes
from nanoblocks.experiments.arms import flags_of_config
from nanoblocks.experiments.figures import (
    COLORS,
    have_matplotlib,
    log2_axis,
    log_axis,
    panels,
    save_and_say,
    title,
)
from nanoblocks.experiments.limits import families, names_of, products_in
from nanoblocks.experiments.memory import free_bytes, peak_bytes
from nanoblocks.experiments.report import table
from nanoblocks.experiments.speed import training_step
from nanoblocks.experiments.sweep import machine
from nanoblocks.experiments.timing import print_table, ratio, timed
from nanoblocks.experiments.topics import each, in_short, sizes, tell
from nanoblocks.formats import counted, format_quantity
from nanoblocks.hardware import gpu_dtype

LENGTHS = tuple(1024 * 2 ** i for i in range(8))    # 1K to 128K
LEAST, MOST = 3, 5                                  # rounds at one length

# ----------------------------------------------------------------------------------------------------------
# Measuring until the time is up


class Cost(NamedTuple):
    """What one length cost."""
    seconds: list       # of each round
    peak: float         # bytes above what was in use before

    @property
    def median(self):
        return statistics.median(self.seconds)


def costs(works, wanted, limit_s, device, power=2.0):
    """
    works {name: function T -> what is timed} -> {name: {T: Cost}}, for as many of the wanted lengths as fit
    into limit_s seconds for each name, and into memory. power: how fast the seconds can grow with T.
    """
    found, spent, going = {name: {} for name in works}, dict.fromkeys(works, 0.0), list(works)
    for T in wanted:
        for name in list(going):
            if why := too_much(found[name], T, limit_s - spent[name], device, power):
                tell(f'{name}: {in_short(T)} tokens would take {why}')
                going.remove(name)
        if not going:
            break
        tell(f'{in_short(T)} tokens: {", ".join(going)}')
        if T == wanted[0]:
            for work in works.values():
                work(min(T, 64))()  # the first call loads libraries
        runs = {name: works[name](T) for name in going}
        if device.startswith('cuda'):
            for run in runs.values():
                run()  # kernels are compiled for each kind of length
        shares = {name: (limit_s - spent[name]) / 8 for name in going}
        for name, cost in in_turns(runs, shares, device).items():
            found[name][T] = cost
            spent[name] += sum(cost.seconds)
    return found


def in_turns(runs, shares, device):
    """{name: function} -> {name: Cost}: three rounds, and two more for those within their share of seconds"""
    seconds, peaks = {name: [] for name in runs}, {}
    for n in range(MOST):
        for name in (list(runs) if n % 2 else reversed(runs)):
            if n >= LEAST and sum(seconds[name]) > shares[name]:
                continue
            # the memory of the first round
            job = runs[name] if n else lambda run=runs[name], name=name: peaks.update(
                {name: peak_bytes(run, device)})
            seconds[name].append(timed(job, device)() / 1e3)
    return {name: Cost(seconds[name], peaks[name]) for name in runs}


def too_much(found, T, left, device, power=2.0):
    """Why a length is left out, in words; '' where it is not. found {shorter length: Cost}."""
    if not found:
        return ''
    last, peak = list(found.items())[-1][0], list(found.values())[-1].peak
    seconds = LEAST * expected({length: cost.median for length, cost in found.items()}, T, power)
    if seconds > left:
        return f'about {seconds:.0f} s, and {max(0, left):.0f} s are left (--limit_s)'
    if peak * T / last > 0.8 * free_bytes(device):
        return f'about {format_quantity(peak * T / last)}B of memory'
    return ''


def expected(seconds, T, most=2.0):
    """
    Seconds at T tokens, from the growth between the last two lengths of {length: seconds}: at least linear,
    at most T^most, which is also assumed after one length.
    """
    times = list(seconds.items())[-2:]
    (before, old), (last, new) = times[0], times[-1]
    power = most if len(times) < 2 else min(most, max(1.0, math.log(new / old, last / before)))
    return new * (T / last) ** power


# ----------------------------------------------------------------------------------------------------------
# Whole models

MODELS = 'llama,mistral,mamba2,gated_deltanet,rwkv7,retnet,samba,jamba'
WINDOW = 1024       # of the models that have one
NEW = 8             # tokens decoded in a round


def throughput(flags, models, tokens, limit_s, device, figures, command):
    """Whole models at 1K to 128K tokens: prefill, decoding, training, memory; at most 30 minutes."""
    wanted = sizes('tokens', tokens, *LENGTHS)
    configs = {name: config_of(name, flags) for name in names_of(models or MODELS, families())}
    built = {name: GPT(config).to(device) for name, config in configs.items()}
    dtype = gpu_dtype() if device.startswith('cuda') else 'float32'
    works = {'prefill': prefill, 'decoding': decoding, 'training': training}
    found = {measure: costs({name: partial(works[measure], model, dtype, device)
                             for name, model in built.items()}, wanted, limit_s, device,
                            1.0 if measure == 'decoding' else 2.0)
             for measure in each(works, 'measuring {}'.format)}
    number = 4 if dtype == 'float32' else 2
    caches = {name: {T: kv_cache_bytes(config, T, 1, number) for T in wanted}
              for name, config in configs.items()}
    report = Report(wanted, built, found, caches, f'{dtype}, {limit_s:g} s for each model and measure')
    print('\n'.join([*report.tables(), *report.comparisons(), '', *report.verdicts()]))
    folder = Path(figures, 'throughput')
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder, command)
    draw(report, folder)


def config_of(name, flags):
    """
    A family at the size of config/tiny.py, where a mixer and a feed-forward that are layers of their own are
    two layers for one, and a window is of 1024 tokens. `flags` come last.
    """
    own, tiny = flags_of_config(f'{name}_small'), flags_of_config('tiny') | {'vocab_size': 2048}
    tiny['n_layer'] = tiny['n_layer'] * own.get('n_layer', 12) // 12
    if own.get('window'):
        tiny['window'] = WINDOW
    config = GPTConfig(**(own | tiny | flags))
    if not config.causal or config.n_encoder:
        raise ValueError(f'models={name} must decode a text of its own, and an encoder reads another: leave '
                         'it out')
    if config.pos == 'learned':
        raise ValueError(f'models={name} must have no learned positions, which end at block_size: leave it '
                         'out, or give --pos=none')
    return config


def prefill(model, dtype, device, T):
    """A function that reads T tokens into a new cache."""
    idx = text_of(model, T, device)

    @torch.no_grad()
    def run():
        with products_in(dtype, device):
            model(idx, cache=model.new_cache(1, T), last_only=True)
    model.eval()
    return run


def decoding(model, dtype, device, T):
    """A function that reads 8 tokens behind T others, one by one in the same place: the work of any there."""
    cache, idx, pos = filled_cache(model, T, dtype, device), text_of(model, 1, device), torch.tensor([T])

    @torch.no_grad()
    def run():
        with products_in(dtype, device):
            for _ in range(NEW):
                model(idx, cache=cache, pos=pos.to(device), last_only=True)
    model.eval()
    return run


@torch.no_grad()
def filled_cache(model, T, dtype, device, short=64):
    """
    A cache as after T tokens, with room for one more. Where a layer keeps tokens it holds random keys and
    values, as reading T tokens may take far longer than what is measured. A state is that of a short text.
    """
    with products_in(dtype, device):
        cache = model.new_cache(1, T + 1)
        model(text_of(model, min(T, short), device), cache=cache)
    parts = [part for entry in cache for part in getattr(entry, 'parts', [entry])]
    for part in parts:
        if isinstance(part, TokenCache):
            part.reset()
            part.update(torch.arange(T, device=device), *(
                torch.randn(1, T, *rows.shape[2:], device=device).to(rows.dtype) for rows in part.rows))
    return cache


def training(model, dtype, device, T):
    """A function that trains for a step of one text of T tokens."""
    model.train()
    model.config.block_size = T
    return training_step(model, dtype, 1, device)


def text_of(model, T, device):
    return torch.randint(model.config.vocab_size, (1, T), device=device)


# ----------------------------------------------------------------------------------------------------------
# Telling


ABOUT = """
Models with random weights at the size of config/tiny.py, where a mixer and a feed-forward that are layers of
their own are two layers for one, and a window is of 1024 tokens. Prefill reads a text into an empty cache,
decoding reads one token behind it, training is a step on it. At each length the models run in turns; ratios
to {first} are of the same rounds, with 95 % intervals over rounds.
""".strip()
LIMITS = """
Nothing about quality, and one text at a time: a batch shares the reading of weights, and its caches add up.
Small models on this machine: on a GPU, and where weights are large, one overtakes another at other lengths.
Decoding runs operation by operation, without torch.compile.
""".strip()


class Report(NamedTuple):
    """All that was measured, and the words for it."""
    wanted: tuple       # lengths
    models: dict        # {name: GPT}
    found: dict         # {measure: {name: {T: Cost}}}
    caches: dict        # {name: {T: bytes}}
    about: str          # number type and time limit

    def rates(self, measure):
        """{name: {T: tokens per second}}"""
        return {name: {T: (NEW if measure == 'decoding' else T) / cost.median for T, cost in row.items()}
                for name, row in self.found[measure].items()}

    def tables(self):
        """Lines of Markdown: the models, tokens per second of each measure, and bytes."""
        lines = [f'one text at a time, {self.about}; -: beyond the limit', '',
                 *table(['model', 'layers', 'parameters', 'active'],
                        [[name, ''.join(letter for letter, _ in model.config.plan()),
                          *map(format_quantity, (model.num_params(), model.num_params(active=True)))]
                         for name, model in self.models.items()])]
        shown = {f'{measure}, tokens/s': self.rates(measure) for measure in self.found}
        shown['cache, bytes'] = self.caches
        shown |= {f'peak of {measure}, bytes': {name: {T: cost.peak for T, cost in row.items()}
                                                for name, row in self.found[measure].items()}
                  for measure in ('prefill', 'training')}
        for heading, rows in shown.items():
            lines += ['', *table([heading, *map(in_short, self.wanted)],
                                 [[name, *(format_quantity(row[T]) if T in row else '-' for T in self.wanted)]
                                  for name, row in rows.items()])]
        return lines

    def compared(self, measure):
        """{model: Compared} with the first model, round by round"""
        first, *others = self.models
        rows = self.found[measure]
        return {name: compared(rows[name], rows[first]) for name in others}

    def comparisons(self):
        """Lines of Markdown: the tokens per second of each model over those of the first."""
        lines, first = [], next(iter(self.models))
        for measure in self.found if len(self.models) > 1 else ():
            heads = [f"{measure}: tokens/s over {first}'s", f'at {in_short(self.wanted[0])}',
                     'at the longest text of both', 'length', 'rounds', 'faster from']
            lines += ['', *table(heads, [
                [name, str(c.ratios[c.shortest]), str(c.ratios[c.longest]), in_short(c.longest),
                 str(c.ratios[c.longest].n), in_short(c.ahead) if c.ahead else '-']
                for name, c in self.compared(measure).items()])]
        return lines

    def verdicts(self):
        """A sentence for each measure."""
        return [verdict(measure, next(iter(self.models)), self.compared(measure))
                for measure in self.found if len(self.models) > 1]

    def write(self, folder, command):
        """throughput.json, and a page as README.md, which names the command"""
        numbers = {'about': self.about, 'cache_bytes': self.caches, 'seconds': {
            measure: {name: {T: cost._asdict() for T, cost in row.items()} for name, row in rows.items()}
            for measure, rows in self.found.items()}}
        Path(folder, 'throughput.json').write_text(json.dumps(numbers, indent=1))
        first = next(iter(self.models))
        Path(folder, 'README.md').write_text('\n'.join([
            '# Whole models over the length of a text', '', ABOUT.format(first=first), '', '```',
            command, '```', '',
            f'{machine()}, {counted(torch.get_num_threads(), "thread")}; {self.tables()[0]}',
            *self.tables()[1:], *self.comparisons(), '', *(f'- {line}' for line in self.verdicts()), '',
            *['![tokens per second and cache over the length](throughput.png)', ''] * have_matplotlib(),
            '## What this does not show', '', LIMITS, '']))


class Compared(NamedTuple):
    """A model's tokens per second over another's."""
    ratios: dict        # {T: Ratio} of the lengths that both reached
    ahead: int | None   # the length from which on the interval is above 1 at every longer one

    @property
    def shortest(self):
        return min(self.ratios)

    @property
    def longest(self):
        return max(self.ratios)


def compared(row, base):
    """Two rows {T: Cost} -> Compared"""
    ratios = {T: ratio(base[T].seconds, cost.seconds) for T, cost in row.items() if T in base}
    ahead = None
    for T in sorted(ratios, reverse=True):
        if not ratios[T].low > 1:
            break
        ahead = T
    return Compared(ratios, ahead)


def verdict(measure, first, found):
    """Which models of {name: Compared} are faster than the first at the longest text that both reached."""
    kinds = {'more tokens/s than': [], 'fewer tokens/s than': [], 'as many, within the interval, as': []}
    for name, c in found.items():
        e = c.ratios[c.longest]
        kind = list(kinds)[0 if e.low > 1 else 1 if e.high < 1 else 2]
        kinds[kind].append(f'{name} (x {e.mean:.2f}, 95 % interval {e.low:.2f} to {e.high:.2f}, at '
                           f'{in_short(c.longest)})')
    return f'{measure}: ' + '; '.join(f'{kind} {first}: {", ".join(names)}' for kind, names in kinds.items()
                                      if names)


def draw(report, figures):
    """Tokens per second of prefill, decoding and training, and the cache, over the length of the text."""
    fig, axes = panels(11, 7.6, rows=2, columns=2)
    shown = [(report.rates(measure), f'{measure} (tokens per second)') for measure in report.found]
    shown.append(({name: {T: size / 1e6 for T, size in row.items()} for name, row in report.caches.items()},
                  'cache (MB)'))
    for ax, (rows, text) in zip(axes, shown):
        for i, (name, row) in enumerate(rows.items()):
            ax.plot(list(row), list(row.values()), 'os^Dv<>P'[i % 8] + '-', color=COLORS[i % len(COLORS)],
                    markersize=5, markerfacecolor='none', label=name)
        log2_axis(ax, report.wanted, [in_short(T) for T in report.wanted])
        ax.set_xlim(report.wanted[0] / 1.3, report.wanted[-1] * 1.3)
        log_axis(ax, format_quantity)
        ax.set_xlabel('tokens of the text')
        ax.set_ylabel(text)
        title(ax, f'{text.split(" (")[0]}, one text')
    fig.legend(*axes[-1].get_legend_handles_labels(), loc='outside lower center', ncols=len(report.models),
               frameon=False, fontsize=9)
    save_and_say(fig, figures, 'throughput')


# ----------------------------------------------------------------------------------------------------------
# Single layers


def lengths(tokens, width, limit_s, device, figures):
    """Time and memory of one layer: attention, window, Mamba, Mamba-2, gated DeltaNet; 1K to 128K tokens."""
    wanted, (width,) = sizes('tokens', tokens, *LENGTHS), sizes('width', width, 256)
    flags = dict(n_embd=width, n_head=heads(width), n_layer=1, bias=False, norm='rmsnorm', ffn_pattern='-',
                 block_size=wanted[-1], vocab_size=64)
    choices = {'attention': dict(pos='rope'), 'window 1024': dict(pos='rope', layer_pattern='w', window=1024),
               'Mamba': dict(pos='none', layer_pattern='m', ssm='mamba1'),
               'Mamba-2': dict(pos='none', layer_pattern='m', ssm='mamba2',
                               ssm_head_dim=64 if 2 * width % 64 == 0 else 2 * width),
               'gated DeltaNet': dict(pos='none', layer_pattern='r')}
    found = costs({name: partial(layer, GPT(GPTConfig(**flags, **own)).to(device).eval(), device)
                   for name, own in choices.items()}, wanted, limit_s, device)
    print(f'forward pass of one layer of width {width}, one sequence; -: beyond the {limit_s:g} s of a layer '
          '(--limit_s)')
    shown = {'seconds': lambda cost: f'{cost.median:.4f}', 'peak MB': lambda cost: f'{cost.peak / 1e6:.0f}'}
    for heading, text in shown.items():
        print_table([heading, *map(in_short, wanted)],
                    [[name, *(text(row[T]) if T in row else '-' for T in wanted)]
                     for name, row in found.items()])
    draw_lengths(wanted, found, width, figures)


def heads(width):
    """Heads of 64, or one where the width is no multiple of it."""
    return width // 64 if width % 64 == 0 else 1


def layer(model, device, T):
    """A function that runs the model's first mixer on T tokens."""
    x = torch.randn(1, T, model.config.n_embd, device=device)
    ctx = model.context(torch.zeros(1, T, dtype=torch.int64, device=device), None, None)

    @torch.no_grad()
    def run():
        return model.h[0].mixer(x, ctx)
    return run


def draw_lengths(wanted, found, width, figures):
    """found {layer: {tokens: Cost}}"""
    fig, axes = panels(10.5, 4.2, columns=2)
    shown = {'forward pass (s)': lambda cost: cost.median, 'peak memory (MB)': lambda cost: cost.peak / 1e6}
    for ax, (text, of) in zip(axes, shown.items()):
        for color, (name, row) in zip(COLORS, found.items()):
            points = [(T, of(cost)) for T, cost in row.items() if of(cost) > 0]
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
