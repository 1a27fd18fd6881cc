"""What this machine has, and how fast it is: devices, number types, memory, peak rates, time."""
import math
import sys
import time

import torch

# dense bf16 FLOP/s of the cards that people train on, from their data sheets; first match wins
PEAK_FLOPS = {'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200': 989e12, 'GH200': 989e12,
              'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12,
              'A10': 125e12, 'V100': 125e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


# the versions of torch that pyproject.toml allows
TORCH_VERSIONS = (2, 11), (2, 15)


def warn_of_torch_version():
    """One line on stderr if this torch is not one of the versions that the code is tested with."""
    major, minor = map(int, torch.__version__.split('.')[:2])
    oldest, newest = TORCH_VERSIONS
    if not oldest <= (major, minor) <= newest:
        print(f'warning: torch {torch.__version__} is not one of {"{}.{}".format(*oldest)} to '
              f'{"{}.{}".format(*newest)}, with which this code is tested', file=sys.stderr)


def peak_flops(card):
    """Dense bf16 FLOP/s of a card by its name, None for one that is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def pick_device(device):
    """The device that 'auto' stands for: a GPU if there is one."""
    if device != 'auto':
        return device
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def check_device(device):
    """ValueError for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f'device={device} must be one that this machine has: try --device=auto') from None


def gpu_dtype():
    """The 16-bit number type of this GPU: bfloat16 where its hardware has it."""
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'


def memory_gb(device):
    """Peak memory of this process in GB: of the GPU if it has one, else resident."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def synchronized_time(device):
    """Seconds on a clock, once everything queued on the device is done."""
    if str(device).startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter()


def read_bandwidth(nbytes, device, rounds=5):
    """Bytes per second at which this machine reads `nbytes`: the best of sums and matrix-vector products."""
    width = 1024
    x = torch.ones(max(1, nbytes // (4 * width)), width, device=device)
    v, best = torch.ones(width, device=device), math.inf
    for read in (x.sum, lambda: torch.mv(x, v)):
        for _ in range(rounds):
            began = synchronized_time(device)
            read()
            best = min(best, synchronized_time(device) - began)
    return x.nbytes / best


def bytes_per_step(model, cache, rows=1):
    """
    Bytes that one decoding step of `rows` rows has to read: the cache, and the weights it uses (of an
    embedding table only a few rows; of experts at most as many as the rows can choose).
    """
    parts = [model.ln_e, model.h, model.ln_f, model.lm_head]
    total = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
    for moe in model.moes:
        experts = sum(t.nbytes for m in (moe.c_fc, moe.c_proj) for t in (*m.parameters(), *m.buffers()))
        total -= int(experts * (1 - min(1, rows * moe.c.n_expert_used / moe.c.n_expert)))
    return total + sum(entry.nbytes() for entry in cache or ())
