"""
What sampling costs. GPT-2 124M (or other flags) with random weights for one row, and on a CPU for eight,
against the bandwidth of this machine, against transformers and against no cache; the 10,000th token of long
texts against the 1,000th; what latents save; and on a GPU, Llama 1B for 1, 8 and 64 rows.

Variants that are compared run interleaved, in one process. The time of a token is the median over all tokens
but the first, sampling included.
"""
import copy
import tempfile
from statistics import median
from typing import NamedTuple

import torch

from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks.decoding import quantize as quant
from nanoblocks.decoding.decode import Decoder, Sampling
from nanoblocks.experiments.arms import flags_of_config
from nanoblocks.experiments.timing import interleaved, print_table, timed
from nanoblocks.experiments.topics import each
from nanoblocks.formats import counted, format_quantity
from nanoblocks.hardware import bytes_per_step, read_bandwidth, synchronized_time

PROMPT, NEW, TEXT = 128, 128, 512   # tokens of a prompt, generated after it, and of a text without a cache
SAMPLING = dict(temperature=0.8, top_k=200)
SMALL = dict(n_layer=4, n_head=8, n_embd=512, vocab_size=4096)


def decode(flags, rounds, device):
    """Sampling: tokens/s and bandwidth, against transformers and against no cache."""
    model = random_model(GPTConfig(**flags), device)
    for rows in (1, 8) if device == 'cpu' else (1,):
        few_rows(model, rows, max(1, rounds // 10), device)
        print()
    print('long texts, one row, 4 layers of width 512: the 10,000th token against the 1,000th')
    long_texts(device)
    print('\nafter 4096 tokens, one row, 4 layers of width 512')
    latents(device)
    print()
    if device.startswith('cuda'):
        many_rows(device)
    else:
        print('llama_1b for 1, 8 and 64 rows is left out, as it needs a GPU: --device=cuda')


def random_model(config, device, dtype=torch.float32):
    """A GPT with random weights, drawn faster than by name."""
    with torch.device(device):
        model = GPT(config, seed=None).eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    return model


class Timing(NamedTuple):
    """Seconds of one generated text."""
    first: float        # until its first token
    tokens: list        # of each further token

    def total(self):
        return self.first + sum(self.tokens)


def generation(model, idx, new, compiled=False):
    """A function that generates `new` tokens after idx (B,T) -> Timing"""
    def run():
        decoder = Decoder(model, idx, new, Sampling(**SAMPLING), seed=0, compiled=compiled)
        stamps = [synchronized_time(idx.device)] + [synchronized_time(idx.device) for _ in decoder.stream()]
        return Timing(stamps[1] - stamps[0], [b - a for a, b in zip(stamps[1:], stamps[2:])])
    return run


def transformers_generation(model, idx, new, dtype):
    """The same by transformers, with the same weights, in dtype, and its own cache; None where it cannot."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        print('transformers is left out: pip install transformers')
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            print(f'transformers is left out: {error}')
            return None
        logging.disable_progress_bar()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(idx.device)

    def run():
        began = synchronized_time(idx.device)
        theirs.generate(idx, attention_mask=torch.ones_like(idx), min_new_tokens=new, max_new_tokens=new,
                        do_sample=True, use_cache=True, pad_token_id=0, **SAMPLING)
        return Timing(synchronized_time(idx.device) - began, [])
    return run


def without_cache(model, device):
    """A function that samples one token after each of four lengths of a text -> Timing of the mean token"""
    texts = [torch.randint(model.config.vocab_size, (1, TEXT * part // 8), device=device)
             for part in (1, 3, 5, 7)]

    @torch.no_grad()
    def run():
        began = synchronized_time(device)
        for idx in texts:
            Sampling(**SAMPLING).draw(model(idx, last_only=True)[0][:, -1], torch.zeros_like(idx[:, :1]))
        return Timing(0.0, [(synchronized_time(device) - began) / len(texts)])
    return run


# ----------------------------------------------------------------------------------------------------------
# One row, or a few


def in_every_type(model, device):
    """{number type: the model in it, as sample.py runs it}"""
    narrow = copy.deepcopy(model).bfloat16()
    if device != 'cpu':
        return {'float32': model, 'bfloat16': narrow, 'int8': quant.quantize(copy.deepcopy(narrow))}
    kinds = {'float32': 'none', 'int8': 'int8', 'int4': 'int4'}
    wide = {name: quant.quantize(copy.deepcopy(model), kind) for name, kind in kinds.items()}
    return wide | {'bfloat16': quant.quantize(narrow, 'none')}


def few_rows(model, rows, rounds, device):
    """Texts in every number type, eager and for one row compiled, against transformers and no cache."""
    config, models = model.config, in_every_type(model, device)
    idx = torch.randint(config.vocab_size, (rows, PROMPT), device=device)
    print(f'{format_quantity(model.num_params())} parameters, {NEW} tokens after {PROMPT}, '
          f'{counted(rows, "row")}; cache {kv_cache_bytes(config, PROMPT + NEW, rows, 4) / 1e6:.1f} MB '
          'in float32')
    runs = {(name, mode): generation(m, idx, NEW, mode == 'compiled')
            for name, m in models.items() for mode in ('eager', 'compiled')[:1 if rows > 1 else 2]}
    if rows == 1 and (model.wpe.max_tokens is None or model.wpe.max_tokens >= TEXT):
        runs['cached', 'text'] = generation(model, idx[:, :1], TEXT - 1, True)
        runs['without a cache', 'text'] = without_cache(model, device)
    for dtype in ('float32', 'bfloat16'):
        theirs = transformers_generation(model, idx, NEW, getattr(torch, dtype))
        runs |= {('transformers', dtype): theirs} if theirs else {}
    drop_failures(runs)
    size = min(bytes_per_step(model, None), 2 ** 30)
    found = interleaved(runs | {'bandwidth': lambda: read_bandwidth(size, device)}, rounds, warmup=0)
    speeds = found.pop('bandwidth')
    print('in each round, the machine read at most '
          + ', '.join(f'{speed / 1e9:.1f}' for speed in speeds) + ' GB/s; shares are of the highest')
    print_table(['', 'first token ms', 'a step ms', 'tokens/s', 'MB a step', 'of bandwidth'],
                [[' '.join(key), *cells_of(models[key[0]], rows, timings, max(speeds))]
                 for key, timings in found.items() if key[0] in models])
    print_comparisons(found, rows)


def cells_of(model, rows, timings, bandwidth):
    """Cells of a line: first token, a step after it, tokens/s, MB per step, share of the bandwidth."""
    token = median(seconds for timing in timings for seconds in timing.tokens)
    read = bytes_per_step(model, model.new_cache(rows, PROMPT + NEW), rows)
    first = median(timing.first for timing in timings)
    return (f'{first * 1e3:.1f}', f'{token * 1e3:.2f}', f'{rows / token:.1f}', f'{read / 1e6:.1f}',
            f'{read / token / bandwidth:.0%}')


def drop_failures(runs):
    """Run each once, to compile and allocate; leave out those that torch.compile cannot do here."""
    for name in each(runs, lambda name: f'{" ".join(name)}: compiles and allocates'):
        try:
            runs[name]()
        except Exception as error:
            if 'compiled' not in name:
                raise
            print(f'{" ".join(name)} is left out: torch.compile fails ({type(error).__name__})')
            del runs[name]


def print_comparisons(found, rows):
    """The full text, prompt included, against transformers and against no cache."""
    total = {name: median(timing.total() for timing in timings) for name, timings in found.items()}
    for name in [name for name in total if ('transformers', name[0]) in total]:
        theirs, new = total['transformers', name[0]], NEW * rows
        print(f'{" ".join(name)} {new / total[name]:.1f} tokens/s with the prompt, transformers '
              f'{new / theirs:.1f}: {theirs / total[name]:.2f}x')
    if ('cached', 'text') in total:
        cached, uncached = total['cached', 'text'] / (TEXT - 1), total['without a cache', 'text']
        print(f'a text of {TEXT} tokens takes {cached * 1e3:.1f} ms a token, and {uncached * 1e3:.0f} ms '
              f'without a cache: {uncached / cached:.1f}x')


# ----------------------------------------------------------------------------------------------------------
# Long texts, latents, many rows


def token_times(decoders, count, device):
    """{name: Decoder} -> {name: median milliseconds of `count` tokens after the first}, interleaved"""
    streams = {name: decoder.stream() for name, decoder in decoders.items()}
    for stream in streams.values():
        next(stream)  # the prompt
    found = interleaved({name: timed(lambda stream=stream: next(stream), device)
                         for name, stream in streams.items()}, count, warmup=0)
    return {name: median(ms) for name, ms in found.items()}


def cache_mb(decoder):
    return sum(entry.nbytes() for entry in decoder.cache) / 1e6


def long_texts(device, count=240):
    """A token late in a long text against an early one: time and cache of five kinds of layers."""
    choices = {'window 256': dict(pos='rope', layer_pattern='w', window=256),
               'Mamba': dict(pos='none', layer_pattern='m', ffn_pattern='-', ssm='mamba1'),
               'Mamba-2': dict(pos='none', layer_pattern='m', ffn_pattern='-'),
               'gated DeltaNet': dict(pos='none', layer_pattern='r'),
               'all tokens': dict(pos='rope')}
    rows = []
    for name in each(choices):
        model, decoders = random_model(GPTConfig(**SMALL, **choices[name]), device), {}
        for at in (1000, 10000):  # in the middle of the tokens that are timed
            idx = torch.randint(SMALL['vocab_size'], (1, at - count // 2), device=device)
            decoders[at] = Decoder(model, idx, count + 1, Sampling(**SAMPLING), seed=0)
        early, late = token_times(decoders, count, device).values()
        rows.append([name, f'{early:.2f}', f'{late:.2f}', f'{late / early:.3f}x',
                     *(f'{cache_mb(decoder):.2f}' for decoder in decoders.values())])
    print_table(['layers', '1,000th token ms', '10,000th ms', 'ratio', 'cache MB', 'at the 10,000th'], rows)


def latents(device, length=4096, count=60):
    """A token after 4,096 others with MHA, GQA and MLA: its time, and the cache against kv_cache_bytes."""
    choices = {'MHA': {}, 'GQA-2': dict(n_kv_head=2),
               'MLA 128 + 32': dict(attn='mla', kv_rank=128, rope_head_dim=32)}
    decoders = {}
    for name in each(choices):
        model = random_model(GPTConfig(**SMALL, pos='rope', **choices[name]), device)
        idx = torch.randint(SMALL['vocab_size'], (1, length), device=device)
        decoders[name] = Decoder(model, idx, count + 1, Sampling(**SAMPLING), seed=0)
    found = token_times(decoders, count, device)
    print_table(['', 'a token ms', 'cache MB', 'kv_cache_bytes MB'], [
        [name, f'{found[name]:.2f}', f'{cache_mb(decoder):.3f}',
         f'{kv_cache_bytes(decoder.model.config, length + count + 1, 1, 4) / 1e6:.3f}']
        for name, decoder in decoders.items()])


def many_rows(device):
    """Llama 1B in bf16, compiled and captured as a CUDA graph."""
    config = GPTConfig(**flags_of_config('llama_1b'))
    model, table = random_model(config, device, torch.bfloat16), []
    for rows in each((1, 8, 64), 'llama_1b, {} rows'.format):
        run = generation(model, torch.randint(config.vocab_size, (rows, PROMPT), device=device), NEW, True)
        run()  # compiles
        first, tokens = run()
        token, cache = median(tokens), model.new_cache(rows, PROMPT + NEW)
        size = bytes_per_step(model, cache, rows)
        bandwidth = read_bandwidth(min(size, 2 ** 32), device)
        table.append([f'llama_1b, {rows} rows', f'{first * 1e3:.1f}', f'{rows / token:.1f}',
                      f'{size / 1e6:.1f}', f'{size / token / bandwidth:.0%} of {bandwidth / 1e9:.0f} GB/s'])
    print_table(['', 'first token ms', 'tokens/s', 'MB a step', 'of bandwidth'], table)
