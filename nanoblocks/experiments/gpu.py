"""
Everything that needs a GPU, in two calls of less than nine minutes:

    python bench.py gpu --out=DIR --parts=checks,curve,optimizer
    python bench.py gpu --out=DIR --parts=train,decode,kernels

Items are measured one after another, the most telling ones first. An item that fails is recorded and the next
begins; items with too little time left are skipped and named. DIR/gpu.json is complete after every item, so a
call that is cut short keeps its results, and it keeps what earlier calls on the same machine found in other
parts.

    checks      every kernel against float64 by the rule of the tests, in several processes
    curve       the loss over 200 steps with kernels, without, and without at another seed
    optimizer   a step of AdamW and of Muon, ours and PyTorch's
    train       tokens/s, MFU and peak memory of complete models, whose compiled gradients are right
    decode      tokens/s against the bandwidth of memory
    kernels     every kernel against eager PyTorch, torch.compile and the limit set by bytes or operations
"""
import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback

import torch

import kernels
from nanoblocks.experiments import gpu_kernels, gpu_models
from nanoblocks.experiments.examples import EXAMPLES
from nanoblocks.experiments.timing import cold_time
from nanoblocks.files import ROOT, write_json

PARTS = ('checks', 'curve', 'optimizer', 'train', 'decode', 'kernels')
# of these, the items come in two halves, generators: one compiles, the other measures
SIDE_BY_SIDE = ('train', 'decode', 'kernels')
# operations whose examples take Triton's interpreter seconds, others minutes: a dry run times these
QUICK = ('linear_cross_entropy', 'attention', 'decode_attention', 'swiglu')


def gpu(out, parts='', seconds=510, dry=False):
    """What needs a GPU: checks, decoding, training, kernels; some --parts, into --out, within --seconds."""
    wanted = [part for part in parts.split(',') if part] or PARTS
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise ValueError(f'parts={parts} must be some of {",".join(PARTS)}')
    prepare(dry)
    m = Measurement(out, seconds, dry, wanted)
    # an item that hangs must not prevent the table
    signal.signal(signal.SIGALRM, lambda *_: too_long(m))
    signal.alarm(int(seconds) + 30)
    torch.set_float32_matmul_precision('high')
    side = set(wanted) & set(SIDE_BY_SIDE)
    crew = Crew(m, side) if side and not dry else None
    for part, name, run, needed in items(m):
        if part in ('machine', *wanted) and (dry or part not in SIDE_BY_SIDE):
            m.item(part, name, (lambda: at_once(run())) if part in SIDE_BY_SIDE else run, needed)
    if crew:
        crew.measure()
    m.write()
    print_summary(m)


def kernel_table(aot, out, seconds, dry):
    """Every kernel's time against PyTorch; with --aot=True its registers and memory, without a GPU."""
    if not aot:
        return gpu(out, 'kernels', seconds, dry)
    if importlib.util.find_spec('triton') is None:
        raise ValueError('aot=True needs Triton: pip install triton')
    from nanoblocks.experiments.aot import print_report
    if not print_report():
        sys.exit('a kernel does not fit in the registers or the shared memory of a GPU')


def prepare(dry):
    """Refuse what this machine cannot do; for a dry run, switch Triton to its interpreter."""
    if not dry and not torch.cuda.is_available():
        raise ValueError('bench.py gpu and bench.py kernels need a GPU: to try them without one, --dry=True, '
                         'or for kernels --aot=True')
    if dry and importlib.util.find_spec('triton') is None:
        raise ValueError('dry=True runs the kernels in the interpreter of Triton: pip install triton')
    if dry:
        os.environ['TRITON_INTERPRET'] = '1'
        sys.path.insert(0, os.path.join(ROOT, 'tests'))
        from fused import repair_interpreter  # bf16 does not work in it otherwise
        repair_interpreter()


class Crew:
    """
    Processes that prepare the items of some parts side by side, because compilers take most of their time and
    run on one core each; then the items are measured one after another, while all other processes wait.
    """

    def __init__(self, m, parts, processes=16):
        self.m, self.wanted = m, [(n, row) for n, row in enumerate(items(m)) if row[0] in parts]
        context, self.processes, self.pipes = multiprocessing.get_context('spawn'), [], []
        os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '2'  # of each process's own helpers
        for share in range(min(processes, len(self.wanted))):
            mine, theirs = context.Pipe()
            numbers = [n for n, _ in self.wanted][share::processes]
            self.processes.append(context.Process(target=member, args=(m.out, theirs, numbers), daemon=True))
            self.pipes.append(mine)
            self.processes[-1].start()
        del os.environ['TORCHINDUCTOR_COMPILE_THREADS']

    def measure(self):
        """Results of all items, in their order, into m; those that are not prepared in time are skipped."""
        m, end = self.m, self.m.began + 0.5 * (self.m.end - self.m.began)
        ready = [pipe.poll(max(0, end - time.time())) and pipe.recv() for pipe in self.pipes]
        for process, done in zip(self.processes, ready):
            if not done:  # it would disturb the others
                process.kill()
        print(f'{sum(map(bool, ready))} of {len(ready)} processes ready after {time.time() - m.began:.0f} s',
              flush=True)
        for place, (n, (part, name, _, needed)) in enumerate(self.wanted):
            if not ready[place % len(self.pipes)]:
                m.found['skipped'].append(f'{part}: {name}')
                continue
            m.item(part, name, lambda: self.answer(self.pipes[place % len(self.pipes)], n), needed)
        for process in self.processes:
            process.kill()

    def answer(self, pipe, n):
        pipe.send((n, self.m.bandwidth, self.m.rate))
        if not pipe.poll(max(1, self.m.end - time.time())):
            raise TimeoutError('the process of this item did not answer')
        found, error = pipe.recv()
        if error:
            raise RuntimeError(error)
        return found


def member(out, pipe, numbers):
    """What one process of a Crew does with the items of these numbers."""
    torch.set_float32_matmul_precision('high')
    m, steps, failed = Measurement(out, 3600, False, (), keeps=True), {}, {}
    for n, (*_, run, _) in enumerate(items(m)):
        if n in numbers:
            failed[n] = failure_of(lambda: prepared(steps, n, run))
            torch.cuda.empty_cache()
    pipe.send(len(numbers))
    with contextlib.suppress(EOFError):  # the main process is done
        while True:
            n, m.bandwidth, m.rate = pipe.recv()
            found = []
            error = failed[n] or failure_of(lambda: found.append(next(steps[n])))
            torch.cuda.empty_cache()
            pipe.send((found[0] if found else None, error))


def prepared(steps, n, run):
    """The first half of item n; without memory, again when other processes have given theirs back."""
    for _ in range(5):
        steps[n] = run()
        try:
            return next(steps[n])
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            time.sleep(5)
    steps[n] = run()
    return next(steps[n])


def failure_of(run):
    """The traceback of run(), or None."""
    try:
        run()
    except Exception:
        return traceback.format_exc()[-1500:]


def at_once(steps):
    """Both halves of an item: what it compiles, and what it measures, which is returned."""
    next(steps)
    return next(steps)


class Measurement:
    """
    The state of one call: the results, the deadline, and how fast this card is. keeps: what torch.compile
    made of an item is kept when the next one is compiled.
    """

    def __init__(self, out, seconds, dry, parts=PARTS, keeps=False):
        self.out, self.dry, self.device, self.keeps = out, dry, 'cpu' if dry else 'cuda', keeps
        self.began, self.end = time.time(), time.time() + seconds
        self.found = {'skipped': [], 'failed': {}} | self.earlier(parts)
        self.bandwidth, self.rate = 1e10, 1e10  # bytes and FLOPs per second, until `ceilings` has run
        os.makedirs(out, exist_ok=True)

    def item(self, part, name, run, needed):
        """Run one item and keep its result, unless fewer than `needed` seconds are left."""
        if time.time() + needed > self.end:
            self.found['skipped'].append(f'{part}: {name}')
            return
        try:
            self.found.setdefault(part, {})[name] = run()
        except Exception as error:
            self.found['failed'][f'{part}: {name}'] = traceback.format_exc()[-1500:]
            print(f'{part}: {name} failed: {type(error).__name__}: {str(error).splitlines()[-1:]}',
                  flush=True)
        if self.device == 'cuda':
            torch.cuda.empty_cache()
        self.write()

    def earlier(self, parts):
        """What earlier calls on this machine wrote about other parts than these."""
        try:
            with open(os.path.join(self.out, 'gpu.json')) as f:
                found = json.load(f)
        except (OSError, ValueError):
            return {}
        if found['machine']['environment'] != environment(self):
            return {}

        def other(item):
            return item.split(': ')[0] in set(PARTS) - set(parts)
        return {part: rows for part, rows in found.items() if other(part)} | {
            'skipped': [item for item in found['skipped'] if other(item)],
            'failed': {item: why for item, why in found['failed'].items() if other(item)}}

    def write(self):
        write_json(os.path.join(self.out, 'gpu.json'), self.found | {'seconds': time.time() - self.began})

    def time(self, run):
        """Median milliseconds of run() with a cold cache; in a dry run, of one call."""
        return cold_time(run, self.device)

    def wait(self):
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def compile(self, function, mode=None):
        if not self.keeps:
            torch._dynamo.reset()
        if self.dry:
            return torch.compile(function, backend='eager', dynamic=False)
        return torch.compile(function, mode=mode, dynamic=False)


def too_long(m):
    m.end = 0
    raise TimeoutError('this item took longer than the time that was left')


def items(m):
    """(part, name, function, seconds it needs) of every item; a dry run takes one of each kind."""
    def some(rows, kind):
        kinds = list(map(kind, rows))
        return [row for n, row in enumerate(rows) if not m.dry or kinds.index(kinds[n]) == n]
    yield 'machine', 'environment', lambda: environment(m), 5
    yield 'machine', 'ceilings', lambda: ceilings(m), 5
    yield 'checks', 'all', lambda: gpu_kernels.checks(m), 60
    yield 'curve', 'gemma2_small', lambda: gpu_models.curve(m), 30
    yield 'optimizer', 'gpt2_small', lambda: gpu_models.optimizers(m), 30
    for row in some(gpu_models.TRAINED, lambda row: (row.config, row.full_logits)):
        yield 'train', row.name(), lambda: gpu_models.train(m, row), 10
    for name, batch in some(gpu_models.DECODED, lambda row: row[0]):
        yield 'decode', f'{name} x {batch}', lambda: gpu_models.decode(m, name, 2 if m.dry else batch), 5
    # operations that a compiled model leaves to torch.compile come last
    timed = [e for e in EXAMPLES if e.op in QUICK and e.hard] if m.dry else EXAMPLES
    for example in sorted(timed, key=lambda e: kernels.OPS[e.op].compiles):
        yield 'kernels', f'{example.op}, {example.what}', lambda: gpu_kernels.compare(m, example), 5


def environment(m):
    """Versions of the software, and the card."""
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
    """Bytes per second of a copy (read and written), and FLOPs per second of a bf16 matrix product."""
    n, side = (2**20, 256) if m.dry else (2**31, 8192)
    a, b = torch.randn(2, side, side, device=m.device).bfloat16()
    x, y = torch.empty(2, n, dtype=torch.int8, device=m.device).random_(0, 100)
    m.bandwidth = 2 * n / (m.time(lambda: y.copy_(x)) / 1e3)
    m.rate = 2 * side**3 / (m.time(lambda: a @ b) / 1e3)
    return {'bytes_per_s': m.bandwidth, 'bf16_flops': m.rate}


# ----------------------------------------------------------------------------------------------------------


def print_summary(m):
    """A few lines for each part, the results that a reader wants first."""
    found = m.found
    if m.dry:
        print('\nA dry run at toy size, kernels in the interpreter: its numbers mean nothing.')
    print(f'\n{json.dumps(found.get("machine", {}).get("environment", {}))}')
    print(f'copy {m.bandwidth / 1e12:.2f} TB/s, bf16 product {m.rate / 1e12:.0f} TFLOP/s')
    for name, times in found.get('kernels', {}).items():
        print_kernel(name, times)
    for name, v in found.get('train', {}).items():
        print(f'{name:52} {v["tokens_per_s"]:10,.0f} tokens/s  MFU {v["mfu"]:6.1%}  '
              f'{v["peak_bytes"] / 2**30:6.1f} GiB  batch {v["batch"]}')
    for name, v in found.get('decode', {}).items():
        print(f'decode {name:29} {v["tokens_per_s"]:10,.0f} tokens/s  {v["of_bandwidth"]:6.1%} of bandwidth')
    for name, v in found.get('optimizer', {}).items():
        print(f'optimizer {name}: ' + ', '.join(f'{k} {ms:.2f} ms' for k, ms in v.items()))
    for name, v in found.get('curve', {}).items():
        print(f'curve {name}: kernels differ by {v["kernels_differ"]:.4f}, seeds by {v["seeds_differ"]:.4f}')
    for v in found.get('checks', {}).values():
        print(f'checks: {v["answered"]} of {v["jobs"]} answered, wrong: {list(v["wrong"])}')
    print(f'failed: {list(found["failed"])}\nskipped: {found["skipped"]}')
    print(f'{time.time() - m.began:.0f} s, all numbers in {os.path.join(m.out, "gpu.json")}')


def print_kernel(name, times):
    """Whether the kernel beats every other variant, forward and backward together where it has both."""
    key = 'both' if 'both' in times['limit'] else 'forward'
    ms = {variant: found[key] for variant, found in times.items() if key in found}
    if 'fused' not in ms:
        return
    fused, limit = ms.pop('fused'), ms.pop('limit')
    verdict = 'wins' if ms and fused < min(ms.values()) else 'LOSES'
    others = ', '.join(f'{variant} {value:.3f}' for variant, value in ms.items())
    print(f'{name:52} {key:8} {fused:8.3f} ms  {limit / fused:5.0%} of limit  {verdict}  ({others})')
