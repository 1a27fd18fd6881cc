"""
Kernels compiled for GPUs that this machine lacks: registers, shared memory and spills of every launch that an
operation makes, forward and backward, from the assembler that comes with Triton.

    python -m nanoblocks.experiments.aot [every]        without the word, one example for each operation
"""
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch

from kernels.common import kernel
from nanoblocks.experiments.examples import EXAMPLES, forward_and_backward

ARCHS = (80, 90, 100)
# bytes of shared memory that one program may have
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NAMES = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.int64: 'i64',
         torch.int32: 'i32', torch.float64: 'fp64'}


class Compiled(NamedTuple):
    """What one launch takes on one architecture."""
    name: str
    arch: int
    warps: int
    registers: int      # of a thread
    spilled: int        # bytes of a thread that did not fit in registers
    shared: int         # bytes of a program


def launches(run, arch):
    """The distinct launches of run() for an arch, recorded instead of executed."""
    kernel.record, kernel.target = [], arch
    try:
        run()
    finally:
        found, kernel.record, kernel.target = kernel.record, None, 90
    return list({describe(*launch)[0]: launch for launch in found}.values())


def describe(made, args, options):
    """By what Triton distinguishes launches: (a key, signature, constants, attributes, options)."""
    made = made.make()
    signature, constants, attributes = {}, {}, {}
    for n, (param, value) in enumerate(zip(made.params, args)):
        constant = param.is_constexpr or value is None or (type(value) is int and value == 1)
        if constant:
            signature[param.name], constants[n,] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = '*' + NAMES[value.dtype]
        else:
            signature[param.name] = 'fp32' if isinstance(value, float) else 'i32' if value < 2**31 else 'i64'
        aligned = value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else (
            type(value) is int and value % 16 == 0)
        if aligned and not constant:
            attributes[n,] = [['tt.divisibility', 16]]
    key = f'{made.__name__} {signature} {constants} {attributes} {options}'
    return key, signature, constants, attributes, options


def compile_for(arch, launch):
    """Compile a recorded launch for sm_<arch> -> Compiled. Triton's exceptions pass through."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    _, signature, constants, attributes, options = describe(*launch)
    made = launch[0].make()
    source = ASTSource(fn=made, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget('cuda', arch, 32), options=options)
    tools = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin')
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(result.asm['cubin'])
        f.flush()
        report = subprocess.run([os.path.join(tools, 'cuobjdump'), '-res-usage', f.name],
                                capture_output=True, text=True, check=True)
    # a kernel without arrays has on its stack only values that did not fit in registers
    registers, spilled = re.search(r'REG:(\d+) STACK:(\d+)', report.stdout + report.stderr).groups()
    name = f'{launch[0].function.__module__.removeprefix("kernels.")}{made.__name__}'.removesuffix('_kernel')
    return Compiled(name, arch, result.metadata.num_warps, int(registers), int(spilled),
                    result.metadata.shared)


def report(archs=ARCHS, every=True):
    """Yield (example, Compiled) of every distinct kernel; every=False: of one example for each operation."""
    for arch in archs:
        done = set()
        for example in EXAMPLES:
            if not every and not example.hard:
                continue
            # PyTorch computes the matrix products, and here on the CPU: few tokens where they are large
            n = 64 if example.op == 'linear_cross_entropy' else 4096
            args = example.make(n, 'cpu')
            for launch in launches(lambda: forward_and_backward(example.op, args), arch):
                compiled = compile_for(arch, launch)
                if compiled not in done:
                    yield f'{example.op}, {example.what}', compiled
                done.add(compiled)


def print_report(archs=ARCHS, every=True):
    """Print a table -> whether every kernel fits in registers and shared memory"""
    fine = True
    print(f'{"kernel":36} {"sm":>4} {"warps":>6} {"registers":>10} {"spilled":>8} {"shared":>8}')
    for what, c in report(archs, every):
        good = c.spilled == 0 and c.shared <= SHARED_LIMIT[c.arch]
        fine = fine and good
        print(f'{c.name:36} {c.arch:4} {c.warps:6} {c.registers:10} {c.spilled:8} {c.shared:8}'
              + ('' if good else f'  does not fit: {what}'), flush=True)
    return fine


if __name__ == '__main__':
    raise SystemExit(0 if print_report(every='every' in sys.argv[1:]) else 1)
