"""Complete models on a GPU, for gpu.py: training, the loss with and without kernels, decoding, optimizers."""
import glob
import os
import statistics
import time

import torch
import torch.nn.functional as F

import kernels
from model import GPT, GPTConfig
from nanoblocks.experiments.arms import flags_of_config
from nanoblocks.experiments.speed import optimizer_steps
from nanoblocks.hardware import peak_flops

# (config, --kernels, sequences in a batch), the most telling ones first
TRAINED = [('gpt2_small', 'auto', 32), ('llama_small', 'auto', 32), ('gpt2_small', 'torch', 32),
           ('llama_1b', 'auto', 8), ('mamba2_small', 'auto', 16), ('mixtral_small', 'auto', 16),
           ('llama_small', 'triton', 32), ('jamba_small', 'auto', 8), ('gemma2_small', 'auto', 16),
           ('mamba2_small', 'torch', 16), ('gemma2_small', 'torch', 16)]
# (config, sequences)
DECODED = [('llama_1b', 1), ('llama_1b', 64), ('llama_small', 1), ('llama_small', 64), ('deepseek_small', 64),
           ('mamba2_small', 64), ('gemma2_small', 64)]
TOY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)


def config_of(m, name, **more):
    """The GPTConfig of config/<name>.py with more flags; at toy size in a dry run."""
    flags = flags_of_config(name) | {'vocab_size': 50304} | more
    if m.dry:
        flags |= TOY | dict.fromkeys(('n_kv_head', 'head_dim', 'ffn_width'))
        flags |= {'window': 8} if 'window' in flags else {}
        flags |= {'ssm_head_dim': 8} if name.startswith('mamba2') else {}
    return GPTConfig(**{k: v for k, v in flags.items() if v is not None})


# ----------------------------------------------------------------------------------------------------------
# Training


def train(m, name, choice, batch, full_logits=False):
    """
    Compiled training steps in bf16 with fused AdamW, the batch halved until it fits. choice: --kernels.
    full_logits: compute the loss as nanoGPT does, from all logits at once.
    """
    batch, steps = (2, 2) if m.dry else (batch, 8)
    kernels.use_kernels('auto' if m.dry else choice, m.device)
    while True:
        try:
            found = train_once(m, name, batch, steps, full_logits)
            break
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            batch //= 2
            if not batch:
                raise
    kernels.use_kernels('auto', m.device)
    print(f'train {name}, kernels={choice}' + ', full logits' * full_logits + ': ' + ', '.join(
        f'{k} {v:.4g}' for k, v in found.items()), flush=True)
    return found


def train_once(m, name, batch, steps, full_logits):
    """The measurements of `train` at one batch size; OutOfMemoryError where it does not fit."""
    config = config_of(m, name, **({'bias': False} if full_logits else {}))
    model = GPT(config, seed=1).to(m.device)
    T, V = config.block_size, config.vocab_size
    x, y = torch.randint(V, (2, batch, T), device=m.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def loss_of(x, y):
        if not full_logits:
            return model(x, y)[1]
        return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    loss_fn = m.compile(loss_of)

    def step():
        step_on(lambda: loss_fn(x, y), model, optimizer, m.device)
    warm = seconds_of(m, step, 3)
    if m.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(seconds_of(m, step, steps) / steps for _ in range(3))
    rate, flops = batch * T / seconds, model.flops_per_token(T)
    card = torch.cuda.get_device_name() if m.device == 'cuda' else ''
    # MFU is relative to the data sheet; `of_measured_rate` is relative to what a product reached here
    sheet = peak_flops(card) or m.rate
    peak = torch.cuda.max_memory_allocated() if m.device == 'cuda' else 0
    return {'tokens_per_s': rate, 'mfu': rate * flops / sheet, 'of_measured_rate': rate * flops / m.rate,
            'batch': batch, 'T': T, 'parameters': model.num_params(), 'peak_bytes': peak, 'warm_s': warm}


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
    """Tokens/s after a prompt, by kernel launches and by a CUDA graph, and the share of the bandwidth."""
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
    found = {'launches': m.time(step)}
    if m.device == 'cuda':
        found['graph'] = m.time(captured(step).replay)
    best = min(found.values())
    # a step reads only a few rows of the embedding table, unless the table is the head as well
    weights = sum(p.nbytes for p in model.parameters())
    weights -= 0 if config.tie else model.wte.weight.nbytes
    kept = sum(entry.nbytes() for entry in cache)
    kept = kept // 2 if 'm' not in config.mixers() else kept  # half of the slots are empty
    found |= {'tokens_per_s': 1e3 * batch / best, 'bytes': weights + kept,
              'of_bandwidth': (weights + kept) / (best / 1e3) / m.bandwidth}
    print(f'decode {name} x {batch}: ' + ', '.join(f'{k} {v:.4g}' for k, v in found.items()), flush=True)
    return found


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
    found = {name: m.time(step) for name, step in steps.items()}
    print('optimizer gpt2_small: ' + ', '.join(f'{name} {ms:.2f} ms' for name, ms in found.items()),
          flush=True)
    return found
