"""Complete models on a GPU, for gpu.py: training, the loss with and without kernels, decoding, optimizers."""
import contextlib
import glob
import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
from model import GPT, GPTConfig
from nanoblocks.experiments.arms import flags_of_config
from nanoblocks.experiments.speed import optimizer_steps
from nanoblocks.hardware import peak_flops

NO_BIAS = {'bias': False}


class Row(NamedTuple):
    """A model to train, and how."""
    config: str
    batch: int                  # sequences
    kernels: str = 'auto'
    flags: dict = {}
    mode: str | None = None     # of torch.compile
    full_logits: bool = False   # as nanoGPT computes the loss, from all logits at once
    head_dtype: str = 'auto'    # float8: products of the head in 8 bits

    def name(self):
        if self.full_logits:
            return f'{self.config} as nanoGPT'
        flags = ''.join(f', {name}={value}' for name, value in self.flags.items())
        head = '' if self.head_dtype == 'auto' else f', head_dtype={self.head_dtype}'
        return f'{self.config}, kernels={self.kernels}, batch={self.batch}{flags}{head}' + (
            f', {self.mode}' if self.mode else '')


# the most telling ones first: nanoGPT's model beside ours, then what train.py makes of its tokenizer
TRAINED = [Row('gpt2_small', 32, 'torch', NO_BIAS, full_logits=True), Row('gpt2_small', 32, flags=NO_BIAS),
           Row('gpt2_small', 32, flags=NO_BIAS | {'vocab_size': 50257}), Row('llama_small', 32),
           Row('gpt2_small', 64, flags=NO_BIAS), Row('mamba2_small', 16), Row('mamba2_small', 16, 'triton'),
           Row('llama_1b', 8), Row('mixtral_small', 16), Row('gemma2_small', 16),
           Row('gated_deltanet_small', 16), Row('gpt2_small', 32, flags=NO_BIAS, head_dtype='float8'),
           Row('gpt2_small', 32, 'torch', NO_BIAS), Row('gemma2_small', 16, 'torch'),
           Row('mamba2_small', 16, 'torch'), Row('llama_small', 32, 'triton'), Row('jamba_small', 8),
           Row('gpt2_small', 32, flags=NO_BIAS, mode='max-autotune-no-cudagraphs')]
# (config, sequences)
DECODED = [('llama_1b', 1), ('llama_1b', 64), ('llama_small', 1), ('llama_small', 64), ('deepseek_small', 64),
           ('mamba2_small', 64), ('gemma2_small', 64), ('gated_deltanet_small', 64)]
TOY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)


def config_of(m, name, **more):
    """The GPTConfig of config/<name>.py with more flags; at toy size in a dry run."""
    flags = flags_of_config(name) | {'vocab_size': 50304} | more
    if m.dry:
        flags |= TOY | dict.fromkeys(('n_kv_head', 'head_dim', 'ffn_width'))
        flags |= {'window': 8} if 'window' in flags else {}
        flags |= {'ssm_head_dim': 8} if name.startswith('mamba2') else {}
        flags |= {'n_layer': 4} if name.startswith('gated_deltanet') else {}
    return GPTConfig(**{k: v for k, v in flags.items() if v is not None})


# ----------------------------------------------------------------------------------------------------------
# Training


def train(m, row):
    """
    Compiled training steps in bf16 with fused AdamW, in two halves: what is compiled, with its gradients
    checked, and {measurement: number}. OutOfMemoryError where it does not fit, ArithmeticError where compiled
    gradients are wrong.
    """
    batch, steps = (2, 2) if m.dry else (row.batch, 8)
    config = config_of(m, row.config, **row.flags)
    model = GPT(config, seed=1).to(m.device)
    T, V = config.block_size, config.vocab_size
    x, y = torch.randint(V, (2, batch, T), device=m.device)

    def loss_of(x, y):
        if not row.full_logits:
            return model(x, y)[1]
        return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    loss_fn = m.compile(loss_of, row.mode)
    with choices(m, row):
        if wrong := wrong_gradients(m, model, loss_fn, loss_of, x, y):
            raise ArithmeticError(f'compiled gradients differ from eager ones: {"; ".join(wrong[:5])}')
    yield
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step():
        step_on(lambda: loss_fn(x, y), model, optimizer, m.device)
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x, y))
    others = torch.cuda.memory_allocated() - own if m.device == 'cuda' else 0  # items of the same process
    with choices(m, row):
        warm = seconds_of(m, step, 3)
        if m.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(seconds_of(m, step, steps) / steps for _ in range(3))
    rate, flops = batch * T / seconds, model.flops_per_token(T)
    card = torch.cuda.get_device_name() if m.device == 'cuda' else ''
    # MFU is relative to the data sheet; `of_measured_rate` is relative to what a product reached here
    sheet = peak_flops(card) or m.rate
    peak = torch.cuda.max_memory_allocated() - others if m.device == 'cuda' else 0
    found = {'tokens_per_s': rate, 'mfu': rate * flops / sheet, 'of_measured_rate': rate * flops / m.rate,
             'batch': batch, 'T': T, 'parameters': model.num_params(), 'peak_bytes': peak, 'warm_s': warm}
    print(f'train {row.name()}: ' + ', '.join(f'{k} {v:.4g}' for k, v in found.items()), flush=True)
    yield found


@contextlib.contextmanager
def choices(m, row):
    """The kernels and the head of a Row, within a block."""
    kernels.use_kernels('auto' if m.dry else row.kernels, m.device)
    kernels.use_head_dtype(row.head_dtype)
    try:
        yield
    finally:
        kernels.use_kernels('auto', m.device)
        kernels.use_head_dtype('auto')


def wrong_gradients(m, model, loss_fn, loss_of, x, y):
    """
    What is wrong with the gradients of the compiled loss_fn, in bf16: sentences. The truth is loss_of in
    fp32; an error may be four times the error of loss_of in bf16, plus a hundredth of the gradient.
    """
    # losses of experts depend on who else is in the batch; others are the means of their parts, which need
    # less memory
    part = len(x) if model.moes else -(-len(x) // 8)
    got = gradients(m, model, loss_fn, x, y, len(x), True)
    eager, truth = (gradients(m, model, loss_of, x, y, part, narrow) for narrow in (True, False))
    wrong = []
    for name, want in truth.items():
        error, rounding, size = (v.norm().item() for v in (got[name] - want, eager[name] - want, want))
        if not error <= 4 * rounding + 0.01 * size:
            wrong.append(f'{name}: error {error:.1e} of {size:.1e}, eagerly {rounding:.1e}')
    return wrong


def gradients(m, model, loss_of, x, y, rows, narrow):
    """{name: gradient} of the mean loss of x (B,T) and y (B,T), summed over parts of some rows."""
    for a, b in zip(x.split(rows), y.split(rows)):
        with torch.autocast(m.device, torch.bfloat16, enabled=narrow):
            loss = loss_of(a, b)
        (loss * (len(a) / len(x))).backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def step_on(loss_fn, model, optimizer, device):
    """One training step in bf16 -> its loss"""
    with torch.autocast(device, torch.bfloat16):
        loss = loss_fn()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def seconds_of(m, step, count):
    """Seconds of `count` steps together, until the device has finished them."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    m.wait()
    return time.perf_counter() - began


def curve(m, name='gemma2_small'):
    """
    The loss over 200 eager steps in bf16, on the bytes of Python's library. The largest difference between
    running means of 20 steps that kernels make, and that another seed makes.
    """
    data = library_bytes()
    flags = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=256, window=100)
    steps, means = 3 if m.dry else 200, {}
    for label, choice, seed in (('kernels', 'triton', 1), ('torch', 'torch', 1), ('seed', 'torch', 2)):
        kernels.use_kernels('torch' if m.dry else choice, m.device)
        model, losses = GPT(config_of(m, name, **flags), seed=seed).to(m.device), []
        V, T = model.config.vocab_size, model.config.block_size
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            at = torch.randint(len(data) - T - 1, (16, 1), generator=generator) + torch.arange(T + 1)
            rows = (data[at] % V).to(m.device)
            losses.append(step_on(lambda model=model, rows=rows: model(rows[:, :-1], rows[:, 1:])[1],
                                  model, optimizer, m.device))
        means[label] = torch.stack(losses).float().cpu().unfold(0, min(20, steps), 1).mean(-1)
    kernels.use_kernels('auto', m.device)
    found = {'last': {k: v[-1].item() for k, v in means.items()},
             'kernels_differ': (means['kernels'] - means['torch']).abs().max().item(),
             'seeds_differ': (means['seed'] - means['torch']).abs().max().item()}
    print(f'curve {name}: {found}', flush=True)
    return found


def library_bytes():
    """The source text of 60 modules of Python's standard library, as int64 bytes."""
    text = bytearray()
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), '*.py')))[:60]:
        with open(path, 'rb') as f:
            text += f.read()
    return torch.frombuffer(text, dtype=torch.uint8).long()


# ----------------------------------------------------------------------------------------------------------
# Decoding and optimizers


@torch.no_grad()
def decode(m, name, batch, context=1024):
    """
    Tokens/s after a prompt, by kernel launches, by a CUDA graph of them, and by one of the compiled step, and
    the share of the bandwidth; in two halves, of which the first compiles.
    """
    context = 32 if m.dry else context
    config = config_of(m, name, block_size=max(context, 32))
    model = GPT(config, seed=1).eval().to(m.device, torch.bfloat16)
    cache = model.new_cache(batch, context)
    idx = torch.randint(config.vocab_size, (batch, context // 2), device=m.device)
    logits, _ = model(idx, cache=cache, last_only=True)
    token, pos = logits[:, -1:].argmax(-1), torch.full((1,), context // 2, device=m.device)

    def step():
        # always at the same position: the work of any step, and the cache never fills up
        logits, _ = model(token, cache=cache, pos=pos, last_only=True)
        token.copy_(logits[:, -1:].argmax(-1))
    runs = {'launches': step}
    if m.device == 'cuda':
        runs |= {'graph': captured(step).replay, 'compiled graph': captured(m.compile(step)).replay}
    yield
    found = {name: m.time(run) for name, run in runs.items()}
    best = min(found.values())
    # a step reads only a few rows of the embedding table, unless the table is the head as well
    weights = sum(p.nbytes for p in model.parameters())
    weights -= 0 if config.tie else model.wte.weight.nbytes
    kept = sum(entry.nbytes() for entry in cache)
    kept = kept // 2 if 'm' not in config.mixers() else kept  # half of the slots are empty
    found |= {'tokens_per_s': 1e3 * batch / best, 'bytes': weights + kept,
              'of_bandwidth': (weights + kept) / (best / 1e3) / m.bandwidth}
    print(f'decode {name} x {batch}: ' + ', '.join(f'{k} {v:.4g}' for k, v in found.items()), flush=True)
    yield found


def captured(step):
    """A CUDA graph of step(), which runs on a side stream first, as capture requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def optimizers(m):
    """{optimizer: milliseconds of a step} on GPT-2."""
    steps = optimizer_steps(GPT(config_of(m, 'gpt2_small'), seed=1).to(m.device))
    with torch.compiler.set_stance('force_eager' if m.dry else 'default'):
        found = {name: m.time(step) for name, step in steps.items()}
    print('optimizer gpt2_small: ' + ', '.join(f'{name} {ms:.2f} ms' for name, ms in found.items()),
          flush=True)
    return found
