"""
Measurements. Each topic prints a table; numbers of one table were taken interleaved, in one process.

    python bench.py step config/llama_small.py config/tiny.py           # one training step, by number type
    python bench.py step --nanogpt=../nanoGPT --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
"""
import importlib.util
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext

import torch

from configurator import configure, one_sentence
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------
# Settings

batch_size = 12                     # sequences in a step
rounds = 30                         # how often each variant is timed, in turns
nanogpt = ''                        # folder of a nanoGPT checkout to time beside ours, with the same flags
device = 'cpu'                      # cpu, cuda
with_bfloat16 = True                # time bfloat16 products too


def step_of(model, dtype):
    """A closure that trains one step of `model`, nanoGPT's or ours: both return (logits, loss)."""
    T, V = model.config.block_size, model.config.vocab_size
    x, y = torch.randint(V, (2, batch_size, T), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)

    def step():
        with autocast:
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device != 'cpu':
            torch.cuda.synchronize()
    return step


def nanogpt_model(c):
    """nanoGPT's GPT of the same shape, from its own file."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(nanogpt, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer,
                                       n_head=c.n_head, n_embd=c.n_embd, dropout=c.dropout, bias=c.bias))


def step():
    """Forward, backward, clipping and AdamW, eager."""
    with one_sentence():
        config = GPTConfig(**model_args)
    dtypes = [torch.float32] + [torch.bfloat16] * with_bfloat16
    variants = {f'ours {str(d)[6:]}': step_of(GPT(config).to(device), d) for d in dtypes}
    if nanogpt:
        with one_sentence():
            if not os.path.isfile(os.path.join(nanogpt, 'model.py')):
                raise ValueError(f'nanogpt={nanogpt} must be the folder of a nanoGPT checkout, which holds model.py')
        variants |= {f'nanoGPT {str(d)[6:]}': step_of(nanogpt_model(config).to(device), d) for d in dtypes}
    times = {name: [] for name in variants}
    for n in range(rounds + 3):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if n >= 3:  # the first ones allocate
                times[name].append((time.perf_counter() - began) * 1e3)
    base = statistics.median(times['ours float32'])
    print(f'{batch_size} x {config.block_size} tokens a step, median and fastest of {rounds}; ratio to ours float32')
    for name, ms in sorted(times.items()):
        print(f'{name:18} {statistics.median(ms):9.2f} ms {min(ms):9.2f} ms   x {statistics.median(ms) / base:.2f}')


TOPICS = {'step': step}
topic = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith('-') else ''
model_args = configure(globals(), GPTConfig)
if topic not in TOPICS:
    sys.exit(f'bench.py {topic} is no topic: the first word must be one of {", ".join(TOPICS)}')
print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
      + (torch.cuda.get_device_name() if device == 'cuda' else 'CPU'))
TOPICS[topic]()
