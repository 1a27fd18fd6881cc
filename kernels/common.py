"""
What the kernels share: Triton, imported at the first launch and not before; checks of arguments in one
sentence; and a few functions that Triton lacks.
"""
import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec('triton') is not None
# TRITON_INTERPRET=1 runs kernels on a CPU, some thousand times slower: for tests
INTERPRETED = HAS_TRITON and os.environ.get('TRITON_INTERPRET') == '1'
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Language:
    """Stands for triton.language until a launch: all that Python reads of it before are annotations."""
    constexpr = 'constexpr'


tl = _Language()


class jit:
    """A function that kernels call."""

    def __init__(self, function):
        self.function, self.made = function, None

    def make(self):
        """The function as Triton has it, and the module it stands in ready for Triton to read."""
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
    A Triton kernel: kernel[grid](*args, num_warps=.., num_stages=..). No autotuner: what it picks depends on
    the noise of a measurement, and a run that is resumed must compute what it computed before.
    """
    # a list while launches are written down in place of being made, to be compiled for a GPU that is not here
    record = None
    # what is launched for, where no GPU says so: sm_90
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
    ValueError, one sentence, unless all tensors are on one device and have the shapes that are written beside
    them: check('rms_norm', x=(x, '... C'), weight=(weight, 'C')). A word is one size wherever it stands, a
    number itself; 'int' in front asks for integers. None is passed over.
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
    """Whether all are in number types that the kernels take; None is passed over."""
    return all(t is None or t.dtype in DTYPES for t in tensors)


def cdiv(a, b):
    return -(-a // b)


def pow2(n):
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def clamp(n, low, high):
    return max(low, min(high, n))


def capability(x):
    """80, 90, 100: the GPU that x is on, or that kernels are compiled for."""
    if not x.is_cuda:
        return kernel.target
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def programs(x):
    """How many programs share a loop over all rows: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def rows(x):
    """x (..., C) as (M,C) with neighbouring columns, copied only where it must be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


# ----------------------------------------------------------------------------------------------------------
# What `cases` are made of: float64 tensors, which a test casts and differentiates, and fp32 ones, which stay
# what they are and are differentiated when they say so


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(*shape, seed=0):
    return randn(*shape, seed=seed).float().requires_grad_()


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------
# What kernels call


@jit
def tanh(x):
    """To a rounding in fp32, small x included, where 1 - 2 / (exp(2x) + 1) has lost most digits."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    grown = tl.exp(-2 * tl.abs(x))
    large = (1 - grown) / (1 + grown)
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))
