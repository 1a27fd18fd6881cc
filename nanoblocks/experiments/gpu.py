"""
Everything that needs a GPU, in one process and one call: `python bench.py gpu --out=DIR`. Parts run in turn,
each item by itself: what fails is written down and the next one begins, and what there is no time for is
named. DIR/gpu.json is complete after every item, so a call that is cut short leaves what it had.

    checks      every kernel against float64 by the rule of the tests, in processes beside each other
    kernels     every kernel against eager PyTorch, torch.compile and the limit of bytes or operations
    train       tokens per second, MFU and peak memory of whole models
    curve       the loss of 200 steps with kernels, without, and without at another seed
    decode      tokens per second against the bandwidth of memory
    optimizer   the step of AdamW and of Muon, ours and PyTorch's
"""
import glob
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback

import torch
import torch.nn.functional as F

import kernels
from configurator import configure, settings_of
from model import GPT, GPTConfig
from nanoblocks.experiments.examples import EXAMPLES, leaves, outputs
from nanoblocks.files import ROOT
from nanoblocks.hardware import peak_flops
from nanoblocks.training import optim

PARTS = ('checks', 'kernels', 'train', 'curve', 'decode', 'optimizer')


class Measurement:
    """The state of one call: what was found, until when to go on, and how fast this card is."""

    def __init__(self, out, seconds, dry):
        self.out, self.dry, self.device = out, dry, 'cpu' if dry else 'cuda'
        self.began, self.end = time.time(), time.time() + seconds
        self.found = {'skipped': [], 'failed': {}}
        self.bandwidth, self.rate = 1e10, 1e10
        os.makedirs(out, exist_ok=True)

    def item(self, part, name, run, seconds=5):
        """Run one item and keep what it returns, unless it would take longer than is left."""
        if time.time() + seconds > self.end:
            self.found['skipped'].append(f'{part}: {name}')
            return
        try:
            self.found.setdefault(part, {})[name] = run()
        except Exception as error:
            self.found['failed'][f'{part}: {name}'] = traceback.format_exc()[-1500:]
            print(f'{part}: {name} failed: {type(error).__name__}: {str(error).splitlines()[:1]}', flush=True)
        if self.device == 'cuda':
            torch.cuda.empty_cache()
        self.write()

    def write(self):
        path = os.path.join(self.out, 'gpu.json')
        with open(f'{path}.part', 'w') as f:
            json.dump(self.found | {'seconds': time.time() - self.began}, f, indent=1)
        os.replace(f'{path}.part', path)

    def time(self, run, budget=0.15):
        """Median milliseconds of run(), with a cold cache; as often as the budget of seconds allows."""
        run()
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        once = time.perf_counter() - began
        if self.dry or once > budget:
            return once * 1e3
        # written between two runs, so that none finds its inputs in the cache
        flush = torch.empty(2**28, dtype=torch.int8, device=self.device)
        n = min(50, max(5, int(budget / once)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, stop in events:
            flush.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events)

    def wait(self):
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def compile(self, function):
        torch._dynamo.reset()
        return torch.compile(function, backend='eager' if self.dry else 'inductor', dynamic=False)


def too_long(m):
    m.end = 0
    raise TimeoutError('this took longer than all that was left')


def environment(m):
    found = {'torch': torch.__version__, 'python': sys.version.split()[0], 'dry': m.dry}
    try:
        import triton
        found['triton'] = triton.__version__
    except ImportError:
        found['triton'] = None
    if m.device == 'cuda':
        card = torch.cuda.get_device_properties(0)
        found |= {'card': card.name, 'multiprocessors': card.multi_processor_count,
                  'cuda': torch.version.cuda, 'memory': card.total_memory,
                  'capability': [card.major, card.minor]}
    return found


def ceilings(m):
    """Bytes a second of a copy (read and written), and operations a second of a bf16 product."""
    n, side = (2**20, 256) if m.dry else (2**31, 8192)
    a, b = torch.randn(2, side, side, device=m.device).bfloat16()
    x, y = torch.empty(2, n, dtype=torch.int8, device=m.device).random_(0, 100)
    m.bandwidth = 2 * n / (m.time(lambda: y.copy_(x)) / 1e3)
    m.rate = 2 * side**3 / (m.time(lambda: a @ b) / 1e3)
    return {'bytes_per_s': m.bandwidth, 'bf16_flops': m.rate}


# ----------------------------------------------------------------------------------------------------------
# What each item does

# products of fp32 are left to PyTorch
NARROW = ('attention', 'decode_attention', 'grouped_linear', 'ssd')


def checks(m, processes=8):
    """The checks of tests/fused.py on this GPU -> what is wrong with those that fail, and their number."""
    jobs = [['check', op, case, dtype] for op, row in kernels.OPS.items() for case in row.cases()
            for dtype in (('float32', 'bfloat16') if op not in NARROW else ('float16', 'bfloat16'))]
    jobs = [['check', 'rms_norm', 'odd width', 'bfloat16']] if m.dry else jobs
    # neighbours are slow together: deal them out
    command = [sys.executable, os.path.join(ROOT, 'tests', 'fused.py'), m.device]
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    running = [subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=env)
               for _ in range(min(processes, len(jobs)))]
    for n, process in enumerate(running):
        process.stdin.write(json.dumps(jobs[n::len(running)]))
        process.stdin.close()
        process.stdin = None
    answers, errors = {}, []
    for process in running:
        try:
            out, err = process.communicate(timeout=max(1, m.end - time.time() - 30))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        answers |= {' '.join(job[1:]): answer for job, answer in map(json.loads, out.splitlines())}
        errors += [err[-800:]] if process.returncode else []
    wrong = {job: answer for job, answer in answers.items() if answer}
    print(f'checks: {len(answers)} of {len(jobs)} answered, wrong: {list(wrong)[:8]}', flush=True)
    return {'jobs': len(jobs), 'answered': len(answers), 'wrong': wrong, 'errors': errors}


def flex(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, *flags):
    """The same attention by FlexAttention, for a triangle."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return (j <= i) & (i - j < (window or q.shape[1]))

    def score(s, b, h, i, j):
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return s if slopes is None else s - slopes[h] * (i - j)
    mask = create_block_mask(seen, None, None, q.shape[1], k.shape[1], device=q.device)
    bare = softcap is None and slopes is None

    def run(q, k, v, *rest):
        return flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), None if bare else score, mask,
                              scale=scale, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)
    return run


def sdpa(q, k, v, pos, key_pos, scale, *flags):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale,
                                          enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def kernel(m, example):
    """{variant: {'forward': ms, 'both': ms, 'bytes': peak}}, and the limit."""
    row = kernels.OPS[example.op]
    args = example.make(16 if m.dry else example.n, m.device)
    args = [a.detach() if isinstance(a, torch.Tensor) and not row.backward else a for a in args]
    variants = {'fused': row.fused, 'eager': row.plain}
    if example.op != 'selective_scan':  # its plain form is one operator to a compiler, too
        variants['compiled'] = m.compile(row.plain)
    if example.op == 'attention' and len(args) > 10 and not m.dry:  # a triangle
        variants['flex'] = m.compile(flex(*args))
        if not any(x is not None for x in args[6:10]):
            variants['sdpa'] = sdpa
    found, inputs = {}, leaves(args)
    for name, function in variants.items():
        def forward():
            return outputs(function, args)

        def both():
            seen = [y for y in forward() if y.requires_grad]
            torch.autograd.grad(seen, inputs, [torch.ones_like(y) for y in seen], allow_unused=True)
        try:
            if m.device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            found[name] = {'forward': m.time(forward)}
            if row.backward:
                found[name]['both'] = m.time(both)
            if m.device == 'cuda':
                found[name]['bytes'] = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            found[name] = {'error': f'{type(error).__name__}: {str(error)[:300]}'}
    tensors = {a.data_ptr(): a.nbytes for a in args if isinstance(a, torch.Tensor)}
    read, written = sum(tensors.values()), sum(y.nbytes for y in outputs(row.fused, args))
    flops = example.flops(*args) if example.flops else (0, 0)
    # backward reads the inputs and the incoming gradients, and writes the gradients
    found['limit'] = {'forward': 1e3 * max((read + written) / m.bandwidth, flops[0] / m.rate)}
    if row.backward:
        moved = read + written + sum(x.nbytes for x in inputs)
        backward = 1e3 * max(moved / m.bandwidth, flops[1] / m.rate)
        found['limit']['both'] = found['limit']['forward'] + backward
    for name, times in found.items():
        numbers = {k: v if isinstance(v, str) else round(v, 4) for k, v in times.items() if k != 'bytes'}
        print(f'{example.op}, {example.what}: {name} {numbers}', flush=True)
    return found


# (config, --kernels, sequences in a batch), the most telling ones first
MODELS = [('gpt2_small', 'auto', 32), ('llama_small', 'auto', 32), ('gpt2_small', 'torch', 32),
          ('llama_1b', 'auto', 8), ('mamba2_small', 'auto', 16), ('mixtral_small', 'auto', 16),
          ('llama_small', 'triton', 32), ('jamba_small', 'auto', 8), ('gemma2_small', 'auto', 16),
          ('mamba2_small', 'torch', 16), ('gemma2_small', 'torch', 16)]
TOY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=64)


def config_of(m, name, **more):
    path, settings = os.path.join(ROOT, 'config', f'{name}.py'), settings_of(os.path.join(ROOT, 'train.py'))
    flags = configure({}, GPTConfig, [path], skip=settings)
    flags |= {'vocab_size': 50304} | more
    if m.dry:
        flags |= TOY | dict.fromkeys(('n_kv_head', 'head_dim', 'ffn_width'))
        flags |= {'window': 8} if 'window' in flags else {}
        flags |= {'ssm_head_dim': 8} if name.startswith('mamba2') else {}
    return GPTConfig(**{k: v for k, v in flags.items() if v is not None})


def train(m, name, choice, batch, full_logits=False):
    """Compiled steps in bf16 with fused AdamW. full_logits: the loss as nanoGPT computes it."""
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
        with torch.autocast(m.device, torch.bfloat16):
            loss = loss_fn(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    began = time.perf_counter()
    for _ in range(3):
        step()
    m.wait()
    warm = time.perf_counter() - began
    if m.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        m.wait()
        times.append((time.perf_counter() - began) / steps)
    rate, flops = batch * T / statistics.median(times), model.flops_per_token(T)
    card = torch.cuda.get_device_name() if m.device == 'cuda' else ''
    # MFU is of the data sheet; the share of what was measured stands beside it
    sheet = peak_flops(card) or m.rate
    peak = torch.cuda.max_memory_allocated() if m.device == 'cuda' else 0
    return {'tokens_per_s': rate, 'mfu': rate * flops / sheet, 'of_measured_rate': rate * flops / m.rate,
            'batch': batch, 'T': T, 'parameters': model.num_params(), 'peak_bytes': peak, 'warm_s': warm}


def curve(m, name='gemma2_small'):
    """
    The loss of 200 eager steps in bf16 on the text of Python's library as bytes: the largest difference of
    running means (20 steps) that kernels make, and that another seed makes.
    """
    text = bytearray()
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), '*.py')))[:60]:
        with open(path, 'rb') as f:
            text += f.read()
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    flags = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=256, window=100)
    steps, means = 3 if m.dry else 200, {}
    for label, choice, seed in (('kernels', 'triton', 1), ('torch', 'torch', 1), ('seed', 'torch', 2)):
        kernels.use_kernels('torch' if m.dry else choice, m.device)
        model = GPT(config_of(m, name, **flags), seed=seed)
        V, T = model.config.vocab_size, model.config.block_size
        model, losses = model.to(m.device), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            at = torch.randint(len(data) - T - 1, (16, 1), generator=generator) + torch.arange(T + 1)
            rows = (data[at] % V).to(m.device)
            with torch.autocast(m.device, torch.bfloat16):
                loss = model(rows[:, :-1], rows[:, 1:])[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        losses = torch.stack(losses).float().cpu()
        means[label] = losses.unfold(0, min(20, steps), 1).mean(-1)
    kernels.use_kernels('auto', m.device)
    found = {'last': {k: v[-1].item() for k, v in means.items()},
             'kernels_differ': (means['kernels'] - means['torch']).abs().max().item(),
             'seeds_differ': (means['seed'] - means['torch']).abs().max().item()}
    print(f'curve {name}: {found}', flush=True)
    return found


def decode(m, name, batch, context=1024):
    """Tokens a second behind a prompt, by launches and by a CUDA graph, and the share of the bandwidth."""
    context = 32 if m.dry else context
    config = config_of(m, name, block_size=max(context, 32))
    model = GPT(config, seed=1).eval().to(m.device, torch.bfloat16)
    cache = model.new_cache(batch, context)
    idx = torch.randint(config.vocab_size, (batch, context // 2), device=m.device)
    with torch.no_grad():
        logits, _ = model(idx, cache=cache, last_only=True)
        token, pos = logits[:, -1:].argmax(-1), torch.full((1,), context // 2, device=m.device)

        def step():
            logits, _ = model(token, cache=cache, pos=pos, last_only=True)
            token.copy_(logits[:, -1:].argmax(-1))
        # a step again and again at one place: as much work, and no end of the cache
        found = {'launches': m.time(step)}
        if m.device == 'cuda':
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            found['graph'] = m.time(graph.replay)
    best = min(found.values())
    # the table of embeddings is read by its rows, unless it is the head as well
    weights = sum(p.nbytes for p in model.parameters())
    weights -= 0 if config.tie else model.wte.weight.nbytes
    kept = sum(entry.nbytes() for entry in cache)
    kept = kept // 2 if 'm' not in config.mixers() else kept  # half of the slots are empty
    found |= {'tokens_per_s': 1e3 * batch / best, 'bytes': weights + kept,
              'of_bandwidth': (weights + kept) / (best / 1e3) / m.bandwidth}
    print(f'decode {name} x {batch}: ' + ', '.join(f'{k} {v:.4g}' for k, v in found.items()), flush=True)
    return found


# (config, sequences)
DECODES = [('llama_1b', 1), ('llama_1b', 64), ('llama_small', 1), ('llama_small', 64), ('deepseek_small', 64),
           ('mamba2_small', 64), ('gemma2_small', 64)]


def optimizer_steps(model):
    """{name: a step}: AdamW on all parameters, Muon on the matrices of the blocks, with random gradients."""
    kinds = model.param_kinds()
    params = dict(model.named_parameters())
    matrices = [p for name, p in params.items() if kinds[name] == 'matrix' and p.ndim == 2]
    for p in params.values():
        p.grad = torch.randn_like(p) * 1e-3
    adamw = {name: torch.optim.AdamW(params.values(), lr=1e-4, **flags) for name, flags in (
        ('AdamW foreach', {'foreach': True}), ('AdamW fused', {'fused': True}))}
    # a rate that changes must be a tensor, or every change is compiled anew
    compiled = torch.optim.AdamW(params.values(), lr=torch.tensor(1e-4))
    return {name: opt.step for name, opt in adamw.items()} | {
        'AdamW compiled': torch.compile(compiled.step),
        'Muon of PyTorch': torch.optim.Muon(matrices, lr=1e-4).step,
        'Muon': optim.Muon(matrices, 1e-4).step,
        'Muon compiled': optim.Muon(matrices, 1e-4, compiled=True).step}


def optimizers(m):
    steps = optimizer_steps(GPT(config_of(m, 'gpt2_small'), seed=1).to(m.device))
    found = {name: m.time(step) for name, step in steps.items()}
    print('optimizer gpt2_small: ' + ', '.join(f'{name} {ms:.2f} ms' for name, ms in found.items()),
          flush=True)
    return found


def gpu(out, parts='', seconds=510, dry=False):
    """All of it, or the parts that are named, comma between them. The table last."""
    wanted = [part for part in parts.split(',') if part] or PARTS
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise ValueError(f'parts={parts} must be some of {",".join(PARTS)}')
    if not dry and not torch.cuda.is_available():
        raise ValueError('bench.py gpu needs a GPU: try it without one by --dry=True')
    if dry and importlib.util.find_spec('triton') is None:
        raise ValueError('dry=True runs the kernels in the interpreter of Triton: pip install triton')
    if dry:  # kernels run in the interpreter, which bf16 needs repaired
        os.environ['TRITON_INTERPRET'] = '1'
        sys.path.insert(0, os.path.join(ROOT, 'tests'))
        from fused import repair_interpreter
        repair_interpreter()
    m = Measurement(out, seconds, dry)
    # what takes far too long must not take the table with it
    signal.signal(signal.SIGALRM, lambda *_: too_long(m))
    signal.alarm(int(seconds) + 30)
    torch.set_float32_matmul_precision('high')
    m.item('machine', 'environment', lambda: environment(m))
    m.item('machine', 'ceilings', lambda: ceilings(m))
    if 'checks' in wanted:
        m.item('checks', 'all', lambda: checks(m), 60)
    if 'kernels' in wanted:
        hard_first = sorted(EXAMPLES, key=lambda e: not e.hard)
        for example in hard_first[:5] if dry else hard_first:
            m.item('kernels', f'{example.op}, {example.what}', lambda: kernel(m, example), 15)
    if 'train' in wanted:
        m.item('train', 'gpt2_small as nanoGPT', lambda: train(m, 'gpt2_small', 'torch', 32, True), 45)
        for name, choice, batch in MODELS[:5] if dry else MODELS:
            m.item('train', f'{name}, kernels={choice}', lambda: train(m, name, choice, batch), 45)
    if 'curve' in wanted:
        m.item('curve', 'gemma2_small', lambda: curve(m), 30)
    if 'decode' in wanted:
        for name, batch in DECODES[:3] if dry else DECODES:
            m.item('decode', f'{name} x {batch}', lambda: decode(m, name, 2 if dry else batch), 15)
    if 'optimizer' in wanted:
        m.item('optimizer', 'gpt2_small', lambda: optimizers(m), 40)
    m.write()
    table(m)


def table(m):
    """What a reader wants first: a few lines for each part."""
    found, rate = m.found, m.bandwidth
    if m.dry:
        print('\nA dry run at toy size, kernels in the interpreter: its numbers mean nothing.')
    print(f'\n{json.dumps(found.get("machine", {}).get("environment", {}))}')
    print(f'copy {rate / 1e12:.2f} TB/s, bf16 product {m.rate / 1e12:.0f} TFLOP/s')
    for name, times in found.get('kernels', {}).items():
        key = 'both' if 'both' in times['limit'] else 'forward'
        got = {k: v[key] for k, v in times.items() if key in v}
        if 'fused' in got:
            rest = ', '.join(f'{k} {v:.3f}' for k, v in got.items() if k not in ('fused', 'limit'))
            others = [v for k, v in got.items() if k not in ('fused', 'limit')]
            verdict = 'wins' if others and got['fused'] < min(others) else 'LOSES'
            print(f'{name:52} {key:8} {got["fused"]:8.3f} ms  {got["limit"] / got["fused"]:5.0%} of limit  '
                  f'{verdict}  ({rest})')
    for name, v in found.get('train', {}).items():
        print(f'{name:36} {v["tokens_per_s"]:10,.0f} tokens/s  MFU {v["mfu"]:6.1%}  '
              f'{v["peak_bytes"] / 2**30:6.1f} GiB  batch {v["batch"]}')
    for name, v in found.get('decode', {}).items():
        print(f'decode {name:29} {v["tokens_per_s"]:10,.0f} tokens/s  {v["of_bandwidth"]:6.1%} of bandwidth')
    for name, v in found.get('optimizer', {}).items():
        print(f'optimizer {name}: ' + ', '.join(f'{k} {ms:.2f} ms' for k, ms in v.items()))
    for name, v in found.get('curve', {}).items():
        print(f'curve {name}: kernels differ by {v["kernels_differ"]:.4f}, seeds by {v["seeds_differ"]:.4f}')
    for name, v in found.get('checks', {}).items():
        print(f'checks: {v["answered"]} of {v["jobs"]} answered, wrong: {list(v["wrong"])}')
    print(f'failed: {list(found["failed"])}\nskipped: {found["skipped"]}')
    print(f'{time.time() - m.began:.0f} s, all numbers in {os.path.join(m.out, "gpu.json")}')
