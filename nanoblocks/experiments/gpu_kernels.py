"""Kernels on a GPU, for gpu.py: whether they are right, and how fast compared with PyTorch's own."""
import contextlib
import json
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import kernels
from nanoblocks.experiments.examples import leaves, outputs
from nanoblocks.files import ROOT

# their fp32 products are left to PyTorch
NARROW = ('attention', 'decode_attention', 'grouped_linear', 'ssd', 'recurrence')


def checks(m, processes=16):
    """The checks of tests/fused.py on this GPU -> their number, {failed check: what is wrong}, and errors"""
    jobs = [['check', op, case, dtype] for op, row in kernels.OPS.items() for case in row.cases()
            for dtype in (('float32', 'bfloat16') if op not in NARROW else ('float16', 'bfloat16'))]
    jobs = [['check', 'rms_norm', 'odd width', 'bfloat16']] if m.dry else jobs
    command = [sys.executable, os.path.join(ROOT, 'tests', 'fused.py'), m.device]
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    running = [subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=env)
               for _ in range(min(processes, len(jobs)))]
    for n, process in enumerate(running):
        # the slow jobs are neighbours in the list, so every process takes each n-th
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


# ----------------------------------------------------------------------------------------------------------
# Times


def compare(m, example):
    """
    {variant: {'forward': ms, 'both': ms, 'bytes': peak}} of an Example, and the limit of this card; in two
    halves, of which the first compiles.
    """
    row = kernels.OPS[example.op]
    args = example.make(16 if m.dry else example.n, m.device)
    args = [a.detach() if isinstance(a, torch.Tensor) and not row.backward else a for a in args]
    functions, found = variants(m, example, row, args), {}
    for function in functions.values():
        with contextlib.suppress(Exception):  # the second half meets it again
            both_ways(function, args, row.backward)
    yield
    for name, function in functions.items():
        try:
            found[name] = times_of(m, function, args, row.backward)
        except Exception as error:
            found[name] = {'error': f'{type(error).__name__}: {str(error)[:300]}'}
    found['limit'] = limit(m, example, row, args)
    for name, times in found.items():
        numbers = {k: v if isinstance(v, str) else round(v, 4) for k, v in times.items() if k != 'bytes'}
        print(f'{example.op}, {example.what}: {name} {numbers}', flush=True)
    yield found


def variants(m, example, row, args):
    """{name: function} of everything that computes the same as a kernel."""
    found = {'fused': row.fused, 'eager': row.plain}
    if example.op != 'selective_scan':  # its plain form is one operator to a compiler as well
        found['compiled'] = m.compile(row.plain)
    if example.op == 'attention' and len(args) > 10 and not m.dry:  # causal
        found['flex'] = m.compile(flex(*args))
        if not any(x is not None for x in args[6:10]):
            found['sdpa'] = sdpa
    return found


def times_of(m, function, args, has_backward):
    """{'forward': ms, 'both': ms, 'bytes': peak memory} of one function."""
    found = {'forward': m.time(lambda: outputs(function, args))}
    if has_backward:
        found['both'] = m.time(lambda: both_ways(function, args))
    if m.device == 'cuda':
        # of a call by itself: timing takes a buffer of its own
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ways(function, args, has_backward)
        found['bytes'] = torch.cuda.max_memory_allocated() - before
    return found


def both_ways(function, args, has_backward=True):
    """Run a function forward, and backward where it can."""
    seen = [y for y in outputs(function, args) if y.requires_grad]
    if has_backward:
        torch.autograd.grad(seen, leaves(args), [torch.ones_like(y) for y in seen], allow_unused=True)


def limit(m, example, row, args):
    """Milliseconds below which this card cannot be: the bytes to move, or the FLOPs of the products."""
    tensors = {a.data_ptr(): a.nbytes for a in args if isinstance(a, torch.Tensor)}
    moved = sum(tensors.values()) + sum(y.nbytes for y in outputs(row.fused, args))
    flops = example.flops(*args) if example.flops else (0, 0)
    found = {'forward': 1e3 * max(moved / m.bandwidth, flops[0] / m.rate)}
    if row.backward:
        # backward reads the inputs and the incoming gradients, and writes the gradients
        moved += sum(x.nbytes for x in leaves(args))
        found['both'] = found['forward'] + 1e3 * max(moved / m.bandwidth, flops[1] / m.rate)
    return found


def flex(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, *flags):
    """Causal attention with these arguments by FlexAttention, as a function of them."""
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
