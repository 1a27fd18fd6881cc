"""
Kernels compiled for GPUs that this machine lacks, by the assembler that comes with Triton: registers, shared
memory and spills of every launch that an operation makes, forward and backward; how many programs of it fit
on a multiprocessor; and how its instructions load numbers and multiply matrices.

    python -m nanoblocks.experiments.aot [every]        without the word, one example for each operation
"""
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import NamedTuple

import torch

from kernels.common import cdiv, kernel
from nanoblocks.experiments.examples import EXAMPLES, forward_and_backward

ARCHS = (80, 90, 100)
# bytes of shared memory that one program may have
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# registers and warps of a multiprocessor, which has as many on each of them; and the bytes of its shared
# memory, 1 KiB more than the limit, that a program costs beside its own
REGISTERS, WARPS, RESERVED = 65536, 64, 1024
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
    programs: int       # that fit on a multiprocessor at once
    narrow: int         # instructions that load or store fewer than 4 bytes of global memory
    hgmma: int          # products by the tensor cores of Hopper, of 64 rows and by a whole warp group
    hmma: int           # products by those of Ampere, which reach about half of Hopper's rate
    copies: int         # loads into shared memory that a loop makes ahead of their use


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
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(result.asm['cubin'])
        f.flush()
        usage, code = (disassembled(what, f.name) for what in ('-res-usage', '-sass'))
    # a kernel without arrays has on its stack only values that did not fit in registers
    registers, spilled = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    warps, shared = result.metadata.num_warps, result.metadata.shared
    name = f'{launch[0].function.__module__.removeprefix("kernels.")}{made.__name__}'.removesuffix('_kernel')
    return Compiled(name, arch, warps, registers, spilled, shared,
                    programs_that_fit(arch, warps, registers, shared), *instructions(code))


def disassembled(what, path):
    """What Triton's cuobjdump prints of a binary."""
    import triton
    tool = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
    run = subprocess.run([tool, what, path], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def programs_that_fit(arch, warps, registers, shared):
    """How many programs run on a multiprocessor at once. Registers are given to a warp by 256."""
    by_registers = REGISTERS // (warps * cdiv(32 * registers, 256) * 256)
    by_shared = (SHARED_LIMIT[arch] + RESERVED) // (shared + RESERVED)
    return min(32, WARPS // warps, by_registers, by_shared)


def instructions(code):
    """Disassembled code -> (narrow, hgmma, hmma, copies) of Compiled"""
    found = Counter(re.findall(r'^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)', code, re.M))

    def count(pattern):
        return sum(n for name, n in found.items() if re.match(pattern, name))
    return (count(r'(LDG|STG)\.(.*\.)?[US](8|16)\b'), count('HGMMA'), count('HMMA'),
            count('LDGSTS|UTMALDG'))


def compiled(example, arch):
    """Compiled of every distinct launch of an Example."""
    # PyTorch computes the matrix products, and here on the CPU: few tokens where they are large
    args = example.make(64 if example.op == 'linear_cross_entropy' else min(example.n, 16384), 'cpu')
    return [compile_for(arch, launch)
            for launch in launches(lambda: forward_and_backward(example.op, args), arch)]


def report(archs=ARCHS, every=True):
    """Yield (example, Compiled) of every distinct kernel; every=False: of one example for each operation."""
    for arch in archs:
        done = set()
        for example in EXAMPLES:
            if every or example.hard:
                for found in compiled(example, arch):
                    if found not in done:
                        yield f'{example.op}, {example.what}', found
                    done.add(found)


def print_report(archs=ARCHS, every=True):
    """Print a table -> whether every kernel fits in registers and shared memory"""
    fine = True
    print(f'{"kernel":32}' + ''.join(f' {column:>9}' for column in Compiled._fields[1:]))
    for what, c in report(archs, every):
        good = c.spilled == 0 and c.shared <= SHARED_LIMIT[c.arch]
        fine = fine and good
        print(f'{c.name:32}' + ''.join(f' {number:9}' for number in c[1:])
              + ('' if good else f'  does not fit: {what}'), flush=True)
    return fine


if __name__ == '__main__':
    raise SystemExit(0 if print_report(every='every' in sys.argv[1:]) else 1)
