"""
Measurements. Each topic prints a table; the numbers of one table are taken in turns, in one process.

    python bench.py step config/llama_small.py config/tiny.py
    python bench.py cache
    python bench.py families config/tiny.py --max_iters=100
    python bench.py kernels --aot=True
    python bench.py gpu --out=bench/results
    python bench.py window
    python bench.py decode
    python bench.py lengths
    python bench.py optimizers config/gpt2_small.py
    python bench.py plot out/*
    python bench.py step --nanogpt=../nanoGPT --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
"""
import glob
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch

from configurator import configure, errors_as_messages, settings_of
from model import GPT, GPTConfig, kv_cache_bytes
from nanoblocks.experiments import studies
from nanoblocks.hardware import check_device
from nanoblocks.training import checkpoint

# ----------------------------------------------------------------------------------------------------------
# Settings

batch_size = 12                     # sequences in a step
rounds = 30                         # how often each variant is timed
nanogpt = ''                        # folder of a nanoGPT checkout to time beside ours, with the same flags
device = 'cpu'                      # cpu, cuda, mps
aot = False                         # kernels: compile them for GPUs that are not here; False: time them here
out = 'out/bench'                   # gpu: the folder for gpu.json
parts = ''                          # gpu: some of checks,kernels,train,curve,decode; empty: all
seconds = 510                       # gpu: stop when they are over
dry = False                         # gpu: everything at toy size, on a CPU
dtype = 'bfloat16'                  # families: of matrix products, float32 or bfloat16
figures = 'out/bench'               # folder of the figures of a topic, and of what it trains
reuse = False                       # families: keep the runs that out/families holds, train what is missing
figure = 'curves.png'               # where plot draws


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
    """{name: milliseconds of each of the rounds}"""
    return studies.turns(runs, device, rounds)


def cache():
    """Bytes that the cache takes in 16 bit, for the shape of Llama 3 8B with one kind of layer or another."""
    shape = dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=128256, block_size=131072, bias=False,
                 norm='rmsnorm', ffn='swiglu')
    kinds = {
        'MHA': dict(pos='rope'), 'GQA-8': dict(pos='rope', n_kv_head=8),
        'GQA-4': dict(pos='rope', n_kv_head=4), 'MQA': dict(pos='rope', n_kv_head=1),
        'MLA 512 + 64': dict(pos='rope', attn='mla', kv_rank=512, rope_head_dim=64),
        'GQA-8, window 4096': dict(pos='rope', n_kv_head=8, layer_pattern='w', window=4096),
        'Mamba-2': dict(pos='none', layer_pattern='m'),
    }
    spans = [(batch, tokens) for batch in (1, 16) for tokens in (8192, 131072)]
    heads = (f'{batch} x {tokens // 1024}K' for batch, tokens in spans)
    print(f'{"GB, batch x tokens":20}' + ''.join(f'{head:>12}' for head in heads))
    sizes = {}
    for name, flags in kinds.items():
        config = GPTConfig(**shape, **flags)
        sizes[name] = [kv_cache_bytes(config, tokens, batch, 2) / 1e9 for batch, tokens in spans]
        print(f'{name:20}' + ''.join(f'{size:12.3f}' for size in sizes[name]))
    studies.cache_figure(sizes, spans, figures)


def families():
    """
    Every config/*_small.py with the given files and flags behind it, trained and sampled, then timed in
    turns: a Markdown table. tokens/s is of whole training steps with AdamW.
    """
    flags = [flag for flag in sys.argv[2:] if not flag.startswith(('--reuse=', '--rounds='))]
    models, rows = {}, {}
    for path in sorted(glob.glob(os.path.join('config', '*_small.py'))):
        name = os.path.basename(path).removesuffix('_small.py')
        out_dir = os.path.join('out', 'families', name)
        if not (reuse and os.path.exists(os.path.join(out_dir, 'ckpt.pt'))):
            run_script('train.py', path, *flags, f'--out_dir={out_dir}', '--overwrite=True')
            run_script('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=64')
        state = checkpoint.load(os.path.join(out_dir, 'ckpt.pt'))
        models[name] = model = checkpoint.build(state, out_dir)
        T = model.config.block_size
        with open(os.path.join(out_dir, 'metrics.jsonl')) as f:
            loss = [line['val_loss'] for line in map(json.loads, f) if 'val_loss' in line][-1]
        rows[name] = (f'{model.num_params() / 1e6:.2f}M | {model.num_params(active=True) / 1e6:.2f}M | '
                      f'{loss:.3f}', f'{kv_cache_bytes(model.config, T, 1, 2) / T:,.0f}')
        print(f'{name}: {rows[name][0]} after {state["step"]} steps', file=sys.stderr, flush=True)
    times = in_turns({name: step_of(model, dtype) for name, model in models.items()})
    print('| family | parameters | active | validation loss | tokens/s | cache bytes per token |')
    print('|---|---|---|---|---|---|')
    for name, (left, right) in rows.items():
        rate = batch_size * models[name].config.block_size / statistics.median(times[name]) * 1e3
        print(f'| {name} | {left} | {rate:,.0f} | {right} |')


def kernel_table():
    """Registers, shared memory and spills of every kernel, or its times against PyTorch's."""
    if not aot:
        return gpu_all('kernels')
    if importlib.util.find_spec('triton') is None:
        raise ValueError('aot=True needs Triton: pip install triton')
    from nanoblocks.experiments.aot import print_report
    if not print_report():
        sys.exit('a kernel does not fit')


def gpu_all(some=None):
    """Whatever needs a GPU, in one call (nanoblocks/experiments/gpu.py)."""
    from nanoblocks.experiments.gpu import gpu
    gpu(out, some or parts, seconds, dry)


def optimizers():
    """The step of AdamW and of Muon on the model of the flags, ours and PyTorch's, in turns."""
    from nanoblocks.experiments.gpu import optimizer_steps
    model = GPT(GPTConfig(**model_args)).to(device)
    times = in_turns(optimizer_steps(model))
    for name, ms in times.items():
        print(f'{name:18} {statistics.median(ms):9.2f} ms {min(ms):9.2f} ms')


def run_script(*words):
    """Run one of our scripts; when it fails, leave with the last line that it said."""
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f'{" ".join(words)}: {run.stderr.strip().splitlines()[-1]}')


def window():
    """Forward and backward of attention within a window, against all of it, as the text grows."""
    c = dict(n_layer=1, n_head=8, n_embd=512, vocab_size=64, pos='rope', block_size=16384)
    for T in (1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(1, T, 8, 64, device=device, requires_grad=True) for _ in range(3))
        pos = torch.arange(T, device=device)

        def run(scores):
            scores(q, k, v, pos, pos, True).square().mean().backward()
        models = {w: GPT(GPTConfig(**c, layer_pattern='w' if w else 'a', window=w))
                  for w in (None, 256, 1024)}
        kinds = {w: model.to(device).h[0].mixer.scores for w, model in models.items()}
        times = in_turns({w: partial(run, scores) for w, scores in kinds.items()})
        full = statistics.median(times[None])
        print(f'T={T:6}  full {full:9.2f} ms' + ''.join(
            f'   window {w} {statistics.median(times[w]):9.2f} ms, {full / statistics.median(times[w]):.2f}x'
            for w in (256, 1024)))


def decode():
    """Sampling: tokens a second, bytes and bandwidth, against transformers and no cache (nanoblocks/experiments/decoding.py)."""
    from nanoblocks.experiments.decoding import measure
    measure(model_args, rounds, device)


def plot():
    """Loss curves of the runs in these folders, in one figure: over steps, tokens, seconds and FLOPs."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    scales, runs = ('step', 'tokens', 'seconds', 'FLOPs'), []
    for folder in folders:
        path = os.path.join(folder, 'metrics.jsonl')
        if not os.path.isfile(path):
            print(f'{folder} holds no metrics.jsonl and is left out')
            continue
        with open(path) as f, open(os.path.join(folder, 'config.json')) as g:
            lines, config = [json.loads(line) for line in f], GPTConfig(**json.load(g)['model'])
        with torch.device('meta'):
            flops = GPT(config, seed=None).flops_per_token(config.block_size)
        runs.append((os.path.basename(os.path.normpath(folder)),
                     [line | {'FLOPs': line['tokens'] * flops} for line in lines]))
    if not runs:
        raise ValueError('plot needs folders of runs: python bench.py plot out/*')
    _, panels = plt.subplots(2, 2, figsize=(14, 10), sharey=True)
    for panel, scale in zip(panels.flat, scales):
        for color, (name, lines) in enumerate(runs):
            for loss, style in (('train_loss', dict(alpha=0.4, linewidth=0.8)),
                                ('val_loss', dict(marker='o', label=name))):
                points = [(line[scale], line[loss]) for line in lines if line.get(loss) is not None]
                if points:
                    panel.plot(*zip(*points), color=f'C{color}', **style)
        panel.set(xlabel=scale, ylabel='loss: validation (dots), training (thin)')
        panel.grid(alpha=0.3)
    panels.flat[0].legend()
    plt.tight_layout()
    plt.savefig(figure, dpi=120)
    for name, lines in runs:
        losses = [line['val_loss'] for line in lines if line.get('val_loss') is not None]
        if losses:
            print(f'{name:30} best validation loss {min(losses):.4f}, last {losses[-1]:.4f}')
    print(f'drawn in {figure}')


def study(topic):
    """A topic of nanoblocks/experiments/studies.py, with these settings."""
    return lambda: topic(device, rounds, figures)


def ablations():
    """The sweeps in results/; flags of train.py and of the model hold for all of their runs."""
    studies.ablations(device, [flag for flag in sys.argv[2:] if not flag.startswith('--device=')])


TOPICS = {'step': step, 'cache': cache, 'families': families, 'window': window, 'decode': decode,
          'plot': plot, 'kernels': kernel_table, 'gpu': gpu_all, 'optimizers': optimizers,
          'norms': study(studies.norms), 'ffns': study(studies.ffns), 'rope': study(studies.rope),
          'context': study(studies.context), 'lengths': study(studies.lengths),
          'router': study(studies.router), 'reach': study(studies.reach),
          'ablations': ablations}


def run(topic):
    """A topic; a table alone where there is nothing to draw with."""
    try:
        topic()
    except ModuleNotFoundError as error:
        if error.name != 'matplotlib':
            raise
        print('no figure without matplotlib: pip install -r requirements-dev.txt')


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in (*TOPICS, '--help', '-h'):
        sys.exit(f'the first word must be a topic, one of {", ".join(TOPICS)}: python bench.py step')
    chosen = TOPICS.get(sys.argv[1])
    argv = sys.argv[2:] if chosen else ['--help']
    folders = [arg for arg in argv if chosen is plot and not arg.startswith('-')]
    argv = [arg for arg in argv if arg not in folders]
    model_args = configure(globals(), GPTConfig, argv, skip=settings_of('train.py'))
    with errors_as_messages():
        check_device(device)
        print(f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
              + (torch.cuda.get_device_name() if device.startswith('cuda') else device))
        run(chosen)
