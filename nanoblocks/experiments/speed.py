"""How long training takes: a step, attention in a window, optimizers, and every family trained and timed."""
import importlib.util
import os
import statistics
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch

import kernels as ops
from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks.experiments.arms import files_and_flags
from nanoblocks.experiments.runs import read_lines, run_script
from nanoblocks.experiments.timing import medians, print_table, times
from nanoblocks.experiments.topics import each, sizes, tell
from nanoblocks.files import ROOT
from nanoblocks.formats import counted
from nanoblocks.training import checkpoint, optim


def step(flags, nanogpt, batch_size, rounds, device):
    """An eager training step (forward, backward, clipping, AdamW) in float32 and bfloat16."""
    config = GPTConfig(**flags)
    models = {'ours': GPT(config)}
    if nanogpt:
        models['nanoGPT'] = nanogpt_model(nanogpt, config)
    found = times({f'{name} {dtype}': training_step(model.to(device), dtype, batch_size, device)
                   for name, model in models.items() for dtype in ('float32', 'bfloat16')}, rounds, device)
    base = statistics.median(found['ours float32'])
    print(f'{batch_size} x {config.block_size} tokens a step, {counted(rounds, "round")}')
    rows = [[name, f'{statistics.median(ms):.2f}', f'{min(ms):.2f}', f'x {statistics.median(ms) / base:.2f}']
            for name, ms in found.items()]
    print_table(['model', 'median ms', 'fastest ms', 'of ours float32'], rows)


def training_step(model, dtype, batch_size, device):
    """A function that trains `model`, ours or nanoGPT's, for one step: both return (logits, loss)."""
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


def nanogpt_model(folder, config):
    """nanoGPT's GPT of the same shape, from the model.py of its checkout."""
    path = os.path.join(folder, 'model.py')
    if not os.path.isfile(path):
        raise ValueError(f'nanogpt={folder} must be the folder of a nanoGPT checkout, which holds model.py')
    shared = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    flags = {name: value for name, value in asdict(config).items() if name in shared}
    if GPTConfig(**flags) != config:
        raise ValueError(f'nanogpt={folder} must be timed with flags that nanoGPT has: {", ".join(shared)}')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**flags))


def window(rounds, tokens, device):
    """Windows and other patterns against full attention, forward and backward, from 256 to 8K tokens."""
    n_head, head_dim, rows = 8, 64, []
    for T in each(sizes('tokens', tokens, 256, 512, 1024, 2048, 4096, 8192), '{} tokens'.format):
        q, k, v = (torch.randn(1, T, n_head, head_dim, device=device, requires_grad=True) for _ in range(3))
        pos, patterns = torch.arange(T, device=device), sparse(T)

        def run(pattern):
            y = ops.attention(q, k, v, pos, pos, head_dim ** -0.5, in_order=True, **pattern)
            y.square().mean().backward()
        found = medians({name: partial(run, pattern) for name, pattern in patterns.items()}, rounds, device)
        for name, ms in found.items():
            both = patterns[name].get('causal', True) is False
            seen, of_all = (ops.visible(pos, pos, **options).sum()
                            for options in (patterns[name], {'causal': not both}))
            times_full = found['full, both sides' if both else 'full'] / ms
            rows.append([f'{T} tokens, {name}', f'{seen / of_all:.1%}', f'{ms:.2f}', f'{times_full:.2f}x'])
    print_table(['', 'keys seen', 'ms', 'speedup'], rows)


def sparse(T):
    """{name: arguments of ops.attention}: patterns in which T tokens see about an eighth of the keys."""
    w, s, Pattern = max(8, T // 16), 16, ops.Pattern
    one_side = {
        'full': {},
        f'window {w}': {'window': w},
        f'window {w} of every 2nd token': {'window': 2 * w - 1, 'pattern': Pattern(dilation=2)},
        f'window {w - 4} and 4 global tokens': {'window': w - 4, 'pattern': Pattern(n_global=4)},
        f'window {w // 2} and every {s}th token': {'pattern': Pattern(near=w // 2, stride=s)},
    }
    both_sides = {f'{name}, both sides': {'causal': False} | options for name, options in one_side.items()}
    return one_side | {'window 1024': {'window': 1024}} | both_sides


def optimizers(flags, rounds, device):
    """A step of AdamW and of Muon, ours and PyTorch's, on the model of the flags."""
    model = GPT(GPTConfig(**flags)).to(device)
    print_table(['optimizer', 'median ms', 'fastest ms'],
                [[name, f'{statistics.median(ms):.2f}', f'{min(ms):.2f}']
                 for name, ms in times(optimizer_steps(model), rounds, device).items()])


def optimizer_steps(model):
    """{name: a step}: AdamW on all parameters, Muon on the matrices of the blocks, with random gradients."""
    kinds = model.param_kinds()
    params = dict(model.named_parameters())
    matrices = [p for name, p in params.items() if kinds[name] == 'matrix' and p.ndim == 2]
    for p in params.values():
        p.grad = torch.randn_like(p) * 1e-3
    adamw = {name: torch.optim.AdamW(params.values(), lr=1e-4, **flags) for name, flags in (
        ('AdamW foreach', {'foreach': True}), ('AdamW fused', {'fused': True}))}
    # a float learning rate would be compiled into the graph, and every change would compile it again
    compiled = torch.optim.AdamW(params.values(), lr=torch.tensor(1e-4))
    return {name: opt.step for name, opt in adamw.items()} | {
        'AdamW compiled': torch.compile(compiled.step),
        'Muon of PyTorch': torch.optim.Muon(matrices, lr=1e-4).step,
        'Muon': optim.Muon(matrices, 1e-4).step,
        'Muon compiled': optim.Muon(matrices, 1e-4, compiled=True).step}


def families(argv, reuse, dtype, batch_size, rounds, device):
    """Every config/*_small.py trained, sampled and timed; takes train.py's settings."""
    files, flags = files_and_flags(argv, without=('reuse', 'rounds'))
    models, rows = {}, {}
    paths = sorted((ROOT / 'config').glob('*_small.py'))
    configs = {path.stem.removesuffix('_small'): path for path in paths}
    for name in each(configs):
        out_dir = os.path.join('out', 'families', name)
        if not (reuse and os.path.exists(os.path.join(out_dir, 'ckpt.pt'))):
            run_script('train.py', configs[name], *files, *flags, f'--out_dir={out_dir}', '--overwrite=True',
                       tell=name)
            run_script('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=64')
        state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
        models[name] = model = checkpoint.build(state, out_dir)
        lines = read_lines(os.path.join(out_dir, 'metrics.jsonl'))
        loss = [line['val_loss'] for line in lines if 'val_loss' in line][-1]
        T = model.config.block_size
        rows[name] = (f'{model.num_params() / 1e6:.2f}M | {model.num_params(active=True) / 1e6:.2f}M | '
                      f'{loss:.3f}', f'{kv_cache_bytes(model.config, T, 1, 2) / T:,.0f}')
        tell(f'{name}: {rows[name][0]} after {counted(state["step"], "step")}')
    found = medians({name: training_step(model, dtype, batch_size, device) for name, model in models.items()},
                    rounds, device)
    print('| family | parameters | active | validation loss | tokens/s | cache bytes per token |')
    print('|---|---|---|---|---|---|')
    for name, (left, right) in rows.items():
        rate = batch_size * models[name].config.block_size / found[name] * 1e3
        print(f'| {name} | {left} | {rate:,.0f} | {right} |')
