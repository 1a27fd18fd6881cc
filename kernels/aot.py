"""
Kernels compiled for GPUs that are not here: registers, shared memory and spills of every launch that an
operation makes, forward and backward, from the assembler that comes with Triton.
"""
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch

from kernels.common import kernel

ARCHS = (80, 90, 100)
# bytes of shared memory that one program may have
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NAMES = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.int64: 'i64',
         torch.int32: 'i32', torch.float64: 'fp64'}


class Compiled(NamedTuple):
    name: str
    arch: int
    warps: int
    registers: int      # of a thread
    spilled: int        # bytes of a thread that did not fit in registers
    shared: int         # bytes of a program


def launches(run, arch):
    """The launches that run() makes for an arch, each once: none is made, and memory stays as it was."""
    kernel.record, kernel.target = [], arch
    try:
        run()
    finally:
        found, kernel.record, kernel.target = kernel.record, None, 90
    return list({describe(*launch)[0]: launch for launch in found}.values())


def describe(made, args, options):
    """What Triton tells apart: (a string, signature, constants, attributes, options) of a launch."""
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
    """A recorded launch compiled for sm_<arch> -> Compiled. Raises what Triton raises where it cannot be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    _, signature, constants, attributes, options = describe(*launch)
    made = launch[0].make()
    source = ASTSource(fn=made, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget('cuda', arch, 32), options=options)
    tools = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin')
    with tempfile.TemporaryDirectory() as folder:
        ptx = os.path.join(folder, 'kernel.ptx')
        with open(ptx, 'w') as f:
            f.write(result.asm['ptx'])
        assembler = os.path.join(tools, 'ptxas-blackwell' if arch >= 100 else 'ptxas')
        target = re.search(r'^\.target (\w+)', result.asm['ptx'], re.M)[1]
        report = subprocess.run([assembler, '-v', f'--gpu-name={target}', ptx, '-o', os.path.join(folder, 'o')],
                                capture_output=True, text=True, check=True).stderr
    spilled = [int(n) for n in re.findall(r'(\d+) bytes spill stores', report)]
    registers = [int(n) for n in re.findall(r'Used (\d+) registers', report)]
    name = f'{launch[0].function.__module__.removeprefix("kernels.")}{made.__name__}'.removesuffix('_kernel')
    return Compiled(name, arch, result.metadata.num_warps, max(registers), max(spilled),
                    result.metadata.shared)
