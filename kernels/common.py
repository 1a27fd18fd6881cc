"""
What the kernels share: which backend runs; Triton, imported at the first launch and not before; checks of
arguments; and a few functions that Triton lacks.
"""
import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec('triton') is not None
# TRITON_INTERPRET=1 runs kernels on a CPU, some thousand times slower: for tests
INTERPRETED = HAS_TRITON and os.environ.get('TRITON_INTERPRET') == '1'
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 'auto', 'torch', 'triton' or 'mamba_ssm': kernels.use_kernels sets it
backend = 'auto'
# 'auto' or 'float8', of the products of the output head in training: kernels.use_head_dtype sets it
head_dtype = 'auto'


def runs_triton(x, compiles=False):
    """
    Whether operations on x run Triton, if their kernels take the arguments. compiles: what torch.compile
    makes of the plain operation is at least as fast, and is fused with its neighbours.
    """
    here = HAS_TRITON and (x.is_cuda or (INTERPRETED and backend == 'triton'))
    left = backend == 'torch' or (backend != 'triton' and compiles and torch.compiler.is_compiling())
    return here and not left


class _Language:
    """Takes the place of triton.language until a launch: before that, Python reads only its annotations."""
    constexpr = 'constexpr'


tl = _Language()


class jit:
    """A function that kernels call."""

    def __init__(self, function):
        self.function, self.made = function, None

    def make(self):
        """
        The function in Triton's form. In its module, `tl` becomes triton.language, and every jit function
        takes the form of Triton as well.
        """
        if self.made is None:
            import triton
            import triton.language
            self.made = triton.jit(self.function)
            space = self.function.__globals__
            space['tl'] = triton.language
            for name, value in list(space.items()):
                if type(value) is jit:
                    space[name] = value.make()
        return self.made


class kernel(jit):
    """
    A Triton kernel: kernel[grid](*args, num_warps=.., num_stages=..). No autotuner: its choice depends on the
    noise of a measurement, and a resumed run must compute the same as before.
    """
    # a list: launches are recorded in it instead of executed, to compile them for a GPU that is not here
    record = None
    # the architecture to compile for where there is no GPU: sm_90
    target = 90

    def __getitem__(self, grid):
        made = self.make()

        def launch(*args, **options):
            if kernel.record is not None:
                kernel.record.append((self, args, options))
                return
            # Triton launches on the current device, wherever its arguments are
            with torch.cuda.device_of(args[0]):
                made[grid](*args, **options)
        return launch


def check(op, **arguments):
    """
    Raises ValueError unless all tensors are on one device and have the shapes written beside them:
    check('rms_norm', x=(x, '... C'), weight=(weight, 'C')). A letter or word is one size in all shapes, a
    number is that size, '...' any leading dimensions; 'int' in front asks for integers, otherwise the dtype
    must be floating-point. A tensor may be None, which always passes.
    """
    sizes, first = {}, None
    for name, (tensor, words) in arguments.items():
        if tensor is None:
            continue
        words = words.split()
        integers = words[:1] == ['int']
        words = words[integers:]
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(f'{op}: {name} on {tensor.device} must be on {first[1].device}, where '
                             f'{first[0]} is')
        if integers == tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f'{op}: {name} of {tensor.dtype} must be of '
                             + ('integers' if integers else 'floating-point numbers'))
        shape = list(tensor.shape)
        if words[0] == '...':
            words = words[1:]
            shape = shape[max(0, len(shape) - len(words)):]
        known = [sizes.get(word, int(word) if word.isdigit() else size) for word, size in zip(words, shape)]
        if len(words) != len(shape) or known != shape:
            wanted = ', '.join(f'{word}={sizes[word]}' if word in sizes else word for word in words)
            raise ValueError(f'{op}: {name} of shape {tuple(tensor.shape)} must be ({wanted})')
        sizes |= zip(words, shape)


def fits(*tensors):
    """Whether the kernels take the dtypes of all tensors; a tensor may be None."""
    return all(t is None or t.dtype in DTYPES for t in tensors)


def at_least_fp32(x):
    """bf16 and fp16 promoted to fp32; fp64 stays. For values that rounding would ruin."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_products(x):
    """x as F.linear takes it: in autocast's dtype where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def pow2(n):
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def clamp(n, low, high):
    return max(low, min(high, n))


def capability(x):
    """The architecture of x's GPU, or the one that kernels are compiled for: 80, 90, 100..."""
    if not x.is_cuda:
        return kernel.target
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def programs(x):
    """How many programs share a loop over all rows: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def rows(x):
    """x (..., C) as (M,C) with columns next to each other in memory, copied only where necessary."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


# ----------------------------------------------------------------------------------------------------------
# Tensors for `cases`. Tests cast float64 ones to the dtype under test and differentiate them; fp32 ones keep
# their dtype, and are differentiated where they require gradients.


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(*shape, seed=0):
    return randn(*shape, seed=seed).float().requires_grad_()


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------
# Functions that kernels call


@jit
def tanh(x):
    """Exact to a rounding in fp32, for small x too, where 1 - 2 / (exp(2x) + 1) loses most digits."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    grown = tl.exp(-2 * tl.abs(x))
    large = (1 - grown) / (1 + grown)
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))
