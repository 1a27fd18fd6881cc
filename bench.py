"""
Measurements. Each topic prints a table; the numbers of one table are taken in turns, in one process.

    python bench.py step config/llama_small.py config/tiny.py
    python bench.py step --nanogpt=../nanoGPT --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
"""
import importlib.util
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch

import checkpoint
from configurator import configure, names_in, one_sentence
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------
# Settings

batch_size = 12                     # sequences in a step
rounds = 30                         # how often each variant is timed
nanogpt = ''                        # folder of a nanoGPT checkout to time beside ours, with the same flags
device = 'cpu'                      # cpu, cuda, mps


def step():
    """One eager training step: forward, backward, clipping and AdamW, in both number types."""
    config = GPTConfig(**model_args)
    models = {'ours': GPT(config)}
    if nanogpt:
        models['nanoGPT'] = nanogpt_model(config)
    runs = {(name, dtype): step_of(model.to(device), dtype)
            for name, model in models.items() for dtype in ('float32', 'bfloat16')}
    times = in_turns(runs)
    base = statistics.median(times['ours', 'float32'])
    print(f'{batch_size} x {config.block_size} tokens a step, {rounds} rounds')
    print(f'{"":18} {"median":>12} {"fastest":>12}   of ours float32')
    for (name, dtype), ms in times.items():
        median = statistics.median(ms)
        print(f'{name:8} {dtype:9} {median:9.2f} ms {min(ms):9.2f} ms   x {median / base:.2f}')


def step_of(model, dtype):
    """A closure that trains `model`, ours or nanoGPT's, for one step: both return (logits, loss)."""
    T, V = model.config.block_size, model.config.vocab_size
    x, y = torch.randint(V, (2, batch_size, T), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=device != 'mps')
    autocast = nullcontext() if dtype == 'float32' else torch.autocast(device, getattr(torch, dtype))

    def run():
        with autocast:
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device
    return run


def nanogpt_model(config):
    """nanoGPT's GPT of the same shape, from its own file."""
    path = os.path.join(nanogpt, 'model.py')
    if not os.path.isfile(path):
        raise ValueError(f'nanogpt={nanogpt} must be the folder of a nanoGPT checkout, which holds model.py')
    shared = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    flags = {name: value for name, value in asdict(config).items() if name in shared}
    if GPTConfig(**flags) != config:
        raise ValueError(f'nanogpt={nanogpt} must be timed with flags that it has: {", ".join(shared)}')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**flags))


def in_turns(runs):
    """{name: milliseconds of each round}: one round runs all, every other one backwards, so that drift hits all."""
    times = {name: [] for name in runs}
    for n in range(rounds + 3):
        for name in (list(runs) if n % 2 else list(reversed(runs))):
            began = time.perf_counter()
            runs[name]()
            if n >= 3:  # the first ones allocate
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


TOPICS = {'step': step}

if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in (*TOPICS, '--help', '-h'):
        sys.exit(f'the first word must be a topic, one of {", ".join(TOPICS)}: python bench.py step')
    chosen = TOPICS.get(sys.argv[1])
    model_args = configure(globals(), GPTConfig, sys.argv[2:] if chosen else ['--help'], skip=names_in('train.py'))
    with one_sentence():
        checkpoint.check_device(device)
        print(f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
              + (torch.cuda.get_device_name() if device.startswith('cuda') else device))
        chosen()
