"""The machine: devices, number types, compiler, determinism, memory, peak rates, clocks."""
import math
import os
import sys
import time

import torch

from nanoblocks.formats import first_line

# dense bf16 FLOP/s from the data sheets of GPUs used for training; the first name that fits wins
PEAK_FLOPS = {'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200': 989e12, 'GH200': 989e12,
              'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12,
              'A10': 125e12, 'V100': 125e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}
# the versions of torch that pyproject.toml allows
TORCH_VERSIONS = (2, 11), (2, 15)


def warn_of_torch_version():
    """One line on stderr, of the first process, for a torch that the code is not tested with."""
    major, minor = map(int, torch.__version__.split('.')[:2])
    oldest, newest = TORCH_VERSIONS
    if not oldest <= (major, minor) <= newest and os.environ.get('RANK', '0') == '0':
        print(f'warning: torch {torch.__version__} is not one of {"{}.{}".format(*oldest)} to '
              f'{"{}.{}".format(*newest)}, with which this code is tested', file=sys.stderr)


def peak_flops(card):
    """Dense bf16 FLOP/s of a GPU, by name; None for one that the table lacks."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def pick_device(device):
    """The device that 'auto' stands for: a GPU if there is one, else the CPU."""
    if device != 'auto':
        return device
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def device_of_process(device, world, local_rank):
    """
    Where one process of several trains: each has a GPU of its own. A GPU always has its number, without which
    torch.cuda.set_device refuses it.
    """
    own = device == 'cuda' or device.startswith('cuda') and world > 1
    return f'cuda:{local_rank}' if own else device


def check_device(device):
    """ValueError for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f'device={device} must be one that this machine has: try --device=auto') from None


def gpu_dtype():
    """The 16-bit number type of this GPU: bfloat16 if its hardware has it, else float16."""
    return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'


def training_dtype(device, width):
    """The number type for the matrix products of a model of this width, where dtype=auto."""
    if device.startswith('cuda'):
        return gpu_dtype()
    # below width 256, converting to bfloat16 costs a CPU more than its bfloat16 instructions save
    bf16 = device.startswith('cpu') and width >= 256 and torch.cpu._is_avx512_bf16_supported()
    return 'bfloat16' if bf16 else 'float32'


def can_compile(device):
    """Whether torch.compile works here; prints the reason if it does not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        print(f'torch.compile does not work here ({type(error).__name__}: {first_line(error)}): '
              'training eagerly, which is slower')
        return False
    return True


def use_deterministic_algorithms():
    """Make results the same bits in every run; call it before the first matrix product."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def card_name(device):
    """The name of a GPU, such as 'NVIDIA H100 80GB HBM3'; for another device, the device: 'cpu', 'mps'."""
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


def memory_gb(device):
    """Peak memory of this process in GB: on the GPU if it uses one, else resident."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def synchronize(device):
    """Wait until the device has finished everything queued on it."""
    if str(device).startswith('cuda'):
        torch.cuda.synchronize()
    elif str(device).startswith('mps'):
        torch.mps.synchronize()


def synchronized_time(device):
    """Seconds on the finest clock, read when the device has finished everything queued on it."""
    synchronize(device)
    return time.perf_counter()


def read_bandwidth(nbytes, device, rounds=5):
    """Bytes per second at which this machine reads `nbytes`, by its fastest sum or matrix-vector product."""
    width = 1024
    x = torch.ones(max(1, nbytes // (4 * width)), width, device=device)
    v, best = torch.ones(width, device=device), math.inf
    for read in (x.sum, lambda: torch.mv(x, v)):
        for _ in range(rounds):
            began = synchronized_time(device)
            read()
            best = min(best, synchronized_time(device) - began)
    return x.nbytes / max(best, 1e-9)  # a coarse clock may stand still


def bytes_per_step(model, cache, rows=1):
    """
    Bytes that one decoding step of `rows` rows reads: the cache and the weights it uses. Embedding tables do
    not count, because a step reads only a few of their rows; of the experts, those that the rows can choose.
    """
    parts = [model.ln_e, model.h, model.ln_f, model.lm_head]
    total = sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))
    for moe in model.moes:
        experts = sum(t.nbytes for m in (moe.c_fc, moe.c_proj) for t in (*m.parameters(), *m.buffers()))
        total -= int(experts * (1 - min(1, rows * moe.c.n_expert_used / moe.c.n_expert)))
    return total + sum(entry.nbytes() for entry in cache or ())
