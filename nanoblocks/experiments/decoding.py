"""
What sampling costs, as `python bench.py decode` prints it: GPT-2 124M with random weights (or other flags)
for one row, against what the machine reads a second, against transformers, and against no cache; the 10,000th
token of long texts against the 1,000th; what latents save; and on a GPU Llama 1B for 1, 8 and 64 rows.

What is compared runs in turns, in one process. A step is what follows the first new token, drawing included.
"""
import copy
import os
import statistics
import tempfile
from typing import NamedTuple

import torch

from configurator import configure, settings_of
from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks.decoding import quantize as quant
from nanoblocks.decoding.decode import Decoder, Sampling
from nanoblocks.files import ROOT
from nanoblocks.hardware import bytes_per_step, read_bandwidth, synchronized_time

PROMPT, NEW, TEXT = 128, 128, 512   # tokens of a prompt, after it, and of a text without a cache
SAMPLING = dict(temperature=0.8, top_k=200)
SMALL = dict(n_layer=4, n_head=8, n_embd=512, vocab_size=4096)


def measure(flags, rounds, device):
    """All of it, for a GPTConfig of these flags; whole texts are drawn rounds // 10 times."""
    one_row(random_model(GPTConfig(**flags), device), max(1, rounds // 10), device)
    print('\nlong texts, one row of 4 layers of 512: the same time and memory wherever the text is')
    long_texts(device)
    print('\nbehind 4096 tokens, one row of 4 layers of 512')
    latents(device)
    print()
    if device.startswith('cuda'):
        many_rows(device)
    else:
        print('llama_1b for 1, 8 and 64 rows is left out, as it needs a GPU: --device=cuda')


def random_model(config, device, dtype=torch.float32):
    """A GPT of random weights, drawn faster than by name."""
    with torch.device(device):
        model = GPT(config, seed=None).eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    return model


class Run(NamedTuple):
    """Seconds of one text."""
    first: float    # until its first token
    steps: list     # of each further one

    def total(self):
        return self.first + sum(self.steps)


def generation(model, idx, new, compiled=False):
    """A closure that draws `new` tokens after idx -> Run"""
    def run():
        decoder = Decoder(model, idx, new, Sampling(**SAMPLING), seed=0, compiled=compiled)
        stamps = [synchronized_time(idx.device)] + [synchronized_time(idx.device) for _ in decoder.stream()]
        return Run(stamps[1] - stamps[0], [b - a for a, b in zip(stamps[1:], stamps[2:])])
    return run


def transformers_generation(model, idx, new):
    """A closure that does the same by transformers, same weights and its cache, or None without it."""
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
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(idx.device)

    def run():
        began = synchronized_time(idx.device)
        theirs.generate(idx, attention_mask=torch.ones_like(idx), min_new_tokens=new, max_new_tokens=new,
                        do_sample=True, use_cache=True, pad_token_id=0, **SAMPLING)
        return Run(synchronized_time(idx.device) - began, [])
    return run


def without_cache(model, device):
    """A closure -> seconds a token when each runs all before it again, from four lengths of a text."""
    texts = [torch.randint(model.config.vocab_size, (1, TEXT * part // 8), device=device)
             for part in (1, 3, 5, 7)]

    @torch.no_grad()
    def run():
        began = synchronized_time(device)
        for idx in texts:
            Sampling(**SAMPLING).draw(model(idx, last_only=True)[0][:, -1], torch.zeros_like(idx[:, :1]))
        return Run(0.0, [(synchronized_time(device) - began) / len(texts)])
    return run


# ----------------------------------------------------------------------------------------------------------
# One row


def one_row(model, rounds, device):
    """A text of one row in every number type, eager and compiled, and what it is compared with."""
    config, size = model.config, bytes_per_step(model, None)
    idx = torch.randint(config.vocab_size, (1, PROMPT), device=device)
    narrow = copy.deepcopy(model).bfloat16()
    models = {'float32': model, 'bfloat16': narrow,
              'int8': quant.quantize(copy.deepcopy(model if device == 'cpu' else narrow))}
    print(f'{model.num_params() / 1e6:.0f}M parameters, {NEW} tokens after {PROMPT}, one row; cache '
          f'{kv_cache_bytes(config, PROMPT + NEW, 1, 4) / 1e6:.1f} MB in float32')
    runs = {(name, mode): generation(m, idx, NEW, mode == 'compiled')
            for name, m in models.items() for mode in ('eager', 'compiled')}
    if model.wpe.max_tokens is None or model.wpe.max_tokens >= TEXT:
        runs['cached', 'text'] = generation(model, idx[:, :1], TEXT - 1, True)
        runs['without a cache', 'text'] = without_cache(model, device)
    theirs = transformers_generation(model, idx, NEW)
    runs |= {('transformers', 'float32'): theirs} if theirs else {}
    times, bandwidth = in_turns(runs, rounds, size, device)
    print(f'{"":18} {"first":>10} {"a token":>10} {"tokens/s":>9} {"MB a token":>11} {"of bandwidth":>13}')
    for name, mode in [key for key in times if key[0] in models]:
        found, m = times[name, mode], models[name]
        step = statistics.median(seconds for run in found for seconds in run.steps)
        read = bytes_per_step(m, m.new_cache(1, PROMPT + NEW))
        print(f'{name:9} {mode:8} {statistics.median(run.first for run in found) * 1e3:7.1f} ms '
              f'{step * 1e3:7.2f} ms {1 / step:9.1f} {read / 1e6:11.1f} {read / step / bandwidth:13.0%}')
    compare(times)


def in_turns(runs, rounds, size, device):
    """({name: [Run of each round]}, the most bytes a second of reads of `size` bytes in any round)"""
    times, speeds = {name: [] for name in runs}, []
    for name in list(runs):  # compiles, allocates
        try:
            runs[name]()
        except Exception as error:
            if 'compiled' not in name:
                raise
            print(f'{" ".join(name)} is left out: torch.compile fails ({type(error).__name__})')
            del runs[name], times[name]
    for n in range(rounds):
        speeds.append(read_bandwidth(min(size, 2 ** 30), device))
        for name in (list(runs) if n % 2 else reversed(runs)):
            times[name].append(runs[name]())
    print(f'{rounds} rounds, in which the machine reads at most '
          + ', '.join(f'{speed / 1e9:.1f}' for speed in speeds) + ' GB/s: shares are of the most')
    return times, max(speeds)


def compare(times):
    """The whole text, prompt included, against transformers and against no cache."""
    total = {name: statistics.median(run.total() for run in found) for name, found in times.items()}
    if ('transformers', 'float32') in total:
        theirs = total.pop(('transformers', 'float32'))
        for name in [name for name in total if name[0] == 'float32']:
            print(f'{" ".join(name)} {NEW / total[name]:.1f} tokens/s with the prompt, transformers '
                  f'{NEW / theirs:.1f}: {theirs / total[name]:.2f}x')
    if ('cached', 'text') in total:
        cached, every = total['cached', 'text'] / (TEXT - 1), total['without a cache', 'text']
        print(f'a text of {TEXT} tokens takes {cached * 1e3:.1f} ms a token, and {every * 1e3:.0f} ms '
              f'without a cache: {every / cached:.1f}x')


# ----------------------------------------------------------------------------------------------------------
# Long texts, latents, many rows


def steps_in_turns(decoders, count, device):
    """{name: Decoder}, their prompts run first -> {name: median seconds of `count` steps}"""
    streams, times = {name: decoder.stream() for name, decoder in decoders.items()}, {}
    for name, stream in streams.items():
        next(stream)
        times[name] = []
    for n in range(count):
        for name in (list(streams) if n % 2 else reversed(streams)):
            began = synchronized_time(device)
            next(streams[name])
            times[name].append(synchronized_time(device) - began)
    return {name: statistics.median(found) for name, found in times.items()}


def held(decoder):
    """MB of its cache."""
    return sum(entry.nbytes() for entry in decoder.cache) / 1e6


def long_texts(device, count=240):
    kinds = {'window 256': dict(pos='rope', layer_pattern='w', window=256),
             'Mamba': dict(pos='none', layer_pattern='m', ffn_pattern='-', ssm='mamba1'),
             'Mamba-2': dict(pos='none', layer_pattern='m', ffn_pattern='-'),
             'all tokens': dict(pos='rope')}
    for name, flags in kinds.items():
        model, decoders = random_model(GPTConfig(**SMALL, **flags), device), {}
        for at in (1000, 10000):  # in the middle of the steps
            idx = torch.randint(SMALL['vocab_size'], (1, at - count // 2), device=device)
            decoders[at] = Decoder(model, idx, count + 1, Sampling(**SAMPLING), seed=0)
        early, late = steps_in_turns(decoders, count, device).values()
        sizes = [held(decoder) for decoder in decoders.values()]
        print(f'{name:11} 1,000th token {early * 1e3:6.2f} ms, 10,000th {late * 1e3:6.2f} ms: '
              f'{late / early:.3f}x; cache {sizes[0]:.2f} and {sizes[1]:.2f} MB')


def latents(device, length=4096, count=60):
    kinds = {'MHA': {}, 'GQA-2': dict(n_kv_head=2),
             'MLA 128 + 32': dict(attn='mla', kv_rank=128, rope_head_dim=32)}
    decoders = {}
    for name, flags in kinds.items():
        model = random_model(GPTConfig(**SMALL, pos='rope', **flags), device)
        idx = torch.randint(SMALL['vocab_size'], (1, length), device=device)
        decoders[name] = Decoder(model, idx, count + 1, Sampling(**SAMPLING), seed=0)
    times = steps_in_turns(decoders, count, device)
    for name, decoder in decoders.items():
        said = kv_cache_bytes(decoder.model.config, length + count + 1, 1, 4) / 1e6
        print(f'{name:12} {times[name] * 1e3:6.2f} ms a token, which reads {held(decoder):.3f} MB of cache '
              f'(kv_cache_bytes: {said:.3f} MB)')


def many_rows(device):
    """Llama 1B in bf16, compiled and captured."""
    path, settings = os.path.join(ROOT, 'config', 'llama_1b.py'), settings_of(os.path.join(ROOT, 'train.py'))
    config = GPTConfig(**configure({}, GPTConfig, [path], skip=settings))
    model = random_model(config, device, torch.bfloat16)
    for rows in (1, 8, 64):
        run = generation(model, torch.randint(config.vocab_size, (rows, PROMPT), device=device), NEW, True)
        run()  # compiles
        first, steps = run()
        step, cache = statistics.median(steps), model.new_cache(rows, PROMPT + NEW)
        size = bytes_per_step(model, cache, rows)
        bandwidth = read_bandwidth(min(size, 2 ** 32), device)
        print(f'llama_1b {rows:3} rows: first {first * 1e3:8.1f} ms, then {rows / step:9.1f} tokens/s, '
              f'{size / 1e6:8.1f} MB a step, {size / step / bandwidth:.0%} of {bandwidth / 1e9:.0f} GB/s')
