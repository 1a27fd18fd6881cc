"""
The Triton kernels against plain PyTorch: the part of test_kernels.py that needs a process of its own, because
TRITON_INTERPRET=1, with which kernels run on a CPU, is read when Triton is imported.

    echo '[["check", "rms_norm", "one row", "float32"]]' | TRITON_INTERPRET=1 python tests/fused.py

Triton's interpreter stores bf16 numbers as integers of the same bits and computes with those integers. Where
this goes wrong, in products of bf16 and in rounding to it, its functions are replaced here; kernels do all
other arithmetic in fp32. Races and the limits of registers and shared memory show only on a GPU.
"""
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DEVICE = sys.argv[1] if __name__ == '__main__' and len(sys.argv) > 1 else 'cpu'
if __name__ == '__main__' and DEVICE == 'cpu':
    os.environ['TRITON_INTERPRET'] = '1'

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import kernels  # noqa: E402


def repair_interpreter():
    """Correct numbers for bf16, and scans of rows instead of single numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as it

    np.seterr(all='ignore')  # numbers may overflow before a mask drops them

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float32)
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data):
        rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    cast = it.InterpreterBuilder.cast_impl

    def cast_impl(self, source, to):
        pair = source.dtype.scalar, to.scalar
        if pair == (tl.float32, tl.bfloat16):
            return it.TensorHandle(narrow(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return it.TensorHandle(wide(source), tl.float32)
        assert pair[0] == pair[1] or tl.bfloat16 not in pair, f'cast {pair} through fp32'
        return cast(self, source, to)

    def create_dot(self, a, b, total, *options):
        assert a.dtype.scalar == b.dtype.scalar, f'a product of {a.dtype} and {b.dtype}'
        return it.TensorHandle(np.matmul(wide(a), wide(b)) + total.data, tl.float32)

    binary = it.InterpreterBuilder.binary_op

    def binary_op(self, a, b, function):
        assert a.dtype.scalar != tl.bfloat16, 'arithmetic in bf16: cast to fp32 first'
        return binary(self, a, b, function)

    def generic_scan(self, inputs):
        columns = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        done = [[column[0]] for column in columns]
        for t in range(1, len(columns[0])):
            before = [self.to_tensor(column[-1], x.dtype) for column, x in zip(done, inputs)]
            now = [self.to_tensor(column[t], x.dtype) for column, x in zip(columns, inputs)]
            for column, x in zip(done, self.combine_fn.fn(*before, *now)):
                column.append(x.handle.data)
        return [self.to_tensor(np.stack(column, axis=self.axis), x.dtype) for column, x in zip(done, inputs)]

    it.InterpreterBuilder.cast_impl, it.InterpreterBuilder.create_dot = cast_impl, create_dot
    it.InterpreterBuilder.binary_op, it.ScanOps.generic_scan = binary_op, generic_scan


def arguments(op, case, dtype, device, double=False):
    """A case's arguments in a dtype, or the same numbers, rounded to it, in float64; strides are kept."""
    made, stores = [], {}
    for value in kernels.OPS[op].cases()[case]:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            kind = dtype if value.dtype == torch.float64 else value.dtype
            # a buffer that two arguments share stays shared
            key = value.untyped_storage().data_ptr()
            if key not in stores:
                store = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(kind)
                stores[key] = (store.double() if double else store).to(device)
            grad = kernels.OPS[op].backward and (value.requires_grad or value.dtype == torch.float64)
            value = stores[key].as_strided(value.shape, value.stride(), value.storage_offset())
            value = value.detach().requires_grad_(grad)
        elif isinstance(value, torch.Tensor):
            value = value.to(device)
        made.append(value)
    return made


def run(function, args, differentiate):
    """{name: tensor} of the outputs, and of the gradients for incoming gradients other than 1."""
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f'output {n}': out.detach() for n, out in enumerate(outputs)}
    if differentiate:
        seen = [out for out in outputs if out.requires_grad]
        generator = torch.Generator().manual_seed(9)
        drawn = [torch.randn(out.shape, generator=generator) for out in seen]
        incoming = [((8 * x).round() / 8 + 0.5).to(out) for x, out in zip(drawn, seen)]
        leaves = {n: a for n, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad}
        grads = torch.autograd.grad(seen, list(leaves.values()), incoming)
        found |= {f'gradient of argument {n}': g for n, g in zip(leaves, grads)}
    return found


def check(op, case, dtype, device='cpu'):
    """
    What is wrong with a kernel, a list of sentences. The rule: its error against float64 is at most
    twice the error of plain PyTorch in the same dtype, plus one rounding.
    """
    row, dtype = kernels.OPS[op], getattr(torch, dtype)
    args = arguments(op, case, dtype, device)
    if not row.ok(*args):
        return [f'ok() refuses {case}']
    kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    truth = run(row.plain, arguments(op, case, dtype, device, double=True), row.backward)
    baseline = run(row.plain, arguments(op, case, dtype, device), row.backward)
    # in this mode torch.empty is full of NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = run(row.fused, args, row.backward)
    finally:
        torch.use_deterministic_algorithms(False)
    wrong = [f'argument {n} was written to' for n, (a, b) in enumerate(zip(args, kept))
             if isinstance(a, torch.Tensor) and not torch.equal(a, b)]
    for name, want in truth.items():
        same = got[name].shape == want.shape and got[name].dtype == baseline[name].dtype
        if not same:
            wrong.append(f'{name}: {tuple(got[name].shape)} of {got[name].dtype} must be '
                         f'{tuple(want.shape)} of {baseline[name].dtype}')
            continue
        if not want.numel():
            continue
        error, plain, size = (v.double().square().mean().sqrt().item()
                              for v in (got[name].double() - want, baseline[name].double() - want, want))
        # states and gradients of parameters in fp32 are made from activations in the narrower dtype
        rounding = max(torch.finfo(kind).eps for kind in (got[name].dtype, dtype))
        bound = 2 * plain + rounding * size
        if not error <= bound:
            wrong.append(f'{name}: error {error:.2e} above {bound:.2e} (plain {plain:.2e}, size {size:.2e})')
    return wrong


class Calls(TorchDispatchMode):
    """Records the calls of the kernels' operators."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == 'nanoblocks':
            self.found.setdefault(function, args)
        return function(*args, **(kwargs or {}))


def check_operators(op):
    """torch.library.opcheck on the operators of an operation, and the operation inside one compiled graph."""
    row, calls = kernels.OPS[op], Calls()
    case = next(iter(row.cases()))
    dtype = torch.float16 if op in ('ssd', 'recurrence') else torch.float32
    with calls:
        want = run(row.fused, arguments(op, case, dtype, 'cpu'), row.backward)
    for function, args in calls.found.items():
        args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        if not function.name().endswith('backward') and row.backward:
            args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                    for a in args]
        torch.library.opcheck(function, args, test_utils=('test_schema', 'test_autograd_registration',
                                                          'test_faketensor'))
    kernels.use_kernels('triton', 'cpu')
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, op), fullgraph=True, backend='aot_eager', dynamic=False)
    got = run(compiled, arguments(op, case, dtype, 'cpu'), row.backward)
    same = [name for name in want if torch.allclose(got[name].float(), want[name].float(), 1e-3, 1e-4)]
    return [f'{name} differs in a graph' for name in want if name not in same] + [
        'no operator was called'] * (not calls.found)


def check_loss_scale(dtype):
    """Gradients of the loss whose sums over tokens, or whose means without a loss scale, are beyond fp16."""
    generator = torch.Generator().manual_seed(0)
    x = (400 + torch.randn(300, 3, generator=generator)).to(getattr(torch, dtype)).requires_grad_()
    weight = (1e-3 * torch.randn(7, 3, generator=generator)).to(x).requires_grad_()
    row, targets = kernels.OPS['linear_cross_entropy'], torch.zeros(300, dtype=torch.int64)
    wrong = []
    for name, scale in (('x', 2.0**16), ('weight', 1.0)):
        inputs = dict(x=x, weight=weight, targets=targets)
        got = torch.autograd.grad(row.fused(**inputs), inputs[name], torch.tensor(scale))[0].double()
        inputs = {key: v.double() if key != 'targets' else v for key, v in inputs.items()}
        want = torch.autograd.grad(row.plain(**inputs), inputs[name], torch.tensor(scale).double())[0]
        error = ((got - want).norm() / want.norm()).item()
        wrong += [f'gradient of {name}: error {error:.1e}'] * (not error < 2e-3)
    return wrong


def check_eight_bits(dtype):
    """Loss and gradients of the head with products of 8 bits, by the kernel and by plain PyTorch."""
    generator, row, found = torch.Generator().manual_seed(0), kernels.OPS['linear_cross_entropy'], []
    x = torch.randn(300, 32, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(70, 32, generator=generator).to(x).requires_grad_()
    targets = torch.randint(70, (300,), generator=generator)
    targets[256:] = -1  # the kernel divides by the count later: with a power of 2, both round the same digits
    for choice in ('float8', 'auto'):
        kernels.use_head_dtype(choice)
        for function in (row.plain, row.fused):
            loss = function(x, weight, targets)
            found.append([v.double() for v in (loss, *torch.autograd.grad(loss, (x, weight)))])
    plain, fused, wide, _ = found
    near, far = ([((a - b).norm() / b.norm()).item() for a, b in zip(fused, other)]
                 for other in (plain, wide))
    return [f'errors {near}'] * (max(near) > 1e-2) + [f'not rounded: {far}'] * (far[1] < 2e-2)


def check_wide_keys(op):
    """Queries, keys and what is erased in fp32 beside values in bf16: the kernel rounds them, bit by bit."""
    row, found = kernels.OPS[op], []
    for wide in (False, True):
        args = arguments(op, 'erased, a state, odd sizes', torch.bfloat16, 'cpu')
        args = [a.detach().float().requires_grad_() if wide and n in (0, 1, 4) else a
                for n, a in enumerate(args)]
        if not row.ok(*args):
            return ['ok() refuses them']
        found.append(run(row.fused, args, True))
    return [f'{name} differs' for name, want in found[0].items()
            if not torch.equal(want, found[1][name].to(want.dtype))]


def check_far_apart(op):
    """Tokens so far apart in memory that 32 bits do not hold the distance: the same results, bit by bit."""
    (T, H, D), found = (3, 2, 8), []
    generator, row = torch.Generator().manual_seed(0), kernels.OPS[op]
    drawn = torch.randn(3, 1, T, H, D, generator=generator).bfloat16()
    for stride in (3 * H * D, 2**30 + 8):
        # of this memory, only the pages that are written to exist
        qkv = torch.empty(T * stride, dtype=drawn.dtype).as_strided(drawn.shape, (H * D, 0, stride, D, 1))
        args = [x.requires_grad_(row.backward) for x in qkv.copy_(drawn).unbind()]
        args += [torch.arange(T), torch.arange(T), 0.3, *[None] * 4, *[True] * row.backward]
        found.append(run(row.fused, args, row.backward))
    return [f'{name} differs' for name in found[0] if not torch.equal(found[0][name], found[1][name])]


def check_model(name):
    """Loss, gradients, and the logits of a prefill and two steps must be equal with and without kernels."""
    import conftest
    flags = next(flags for names, flags in conftest.families().items() if name in names.split('+'))
    model, seen = conftest.scaled(conftest.build(flags), 3), {}
    idx = conftest.tokens(flags, 2, 20)
    for choice in ('torch', 'triton'):
        kernels.use_kernels(choice, 'cpu')
        with Calls() as calls:
            loss = model(idx, idx.roll(-1, 1))[1]
            grads = torch.autograd.grad(loss, list(model.parameters()))
            cache, logits = model.new_cache(2, 20), []
            with torch.no_grad():
                for pos in (torch.arange(18), torch.tensor([18]), torch.tensor([19])):
                    logits.append(model(idx[:, pos], cache=cache, pos=pos)[0])
        seen[choice] = [loss, *grads, *logits], {f.name().split('::')[1].split('.')[0] for f in calls.found}
    (want, before), (got, after) = seen.values()
    errors = [(a - b).norm() / (b.norm() + 1e-3) for a, b in zip(got, want)]
    return [f'error {max(errors):.1e}'] * (max(errors) > 1e-3), sorted(after - before)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if DEVICE == 'cpu':
        repair_interpreter()
        # chunks of as few rows as there can be, so that small cases have some
        sys.modules['kernels.linear_cross_entropy'].FUSED_NUMEL = 1
    for job in json.load(sys.stdin):
        try:
            answer = globals()[job[0]](*job[1:], *[DEVICE] * (job[0] == 'check'))
        except Exception:
            answer = [traceback.format_exc()]
        print(json.dumps([job, answer]), flush=True)
