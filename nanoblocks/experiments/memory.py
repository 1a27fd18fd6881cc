"""How much memory a computation keeps for its backward pass, and how much it takes at its peak."""
import ctypes
import math
import re
from pathlib import Path

import torch


def saved_bytes(run):
    """Bytes of the tensors that a forward pass saves for the backward pass, parameters excluded."""
    saved = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()  # noqa: F841  a freed storage would lend its address to another
    return sum(saved.values())


def peak_bytes(run, device):
    """Peak memory of run(), in bytes above what was in use before; nan where the system cannot tell."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path('/proc/self/status'), Path('/proc/self/clear_refs')
    if not reset.exists():
        return math.nan

    def read(name):
        return int(re.search(rf'{name}:\s+(\d+)', status.read_text()).group(1)) * 1024
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory first, or its reuse would not be seen
    reset.write_text('5')  # Linux resets the peak
    before = read('VmRSS')
    run()
    return read('VmHWM') - before


def free_bytes(device):
    """Bytes of memory that may still be taken; infinite where the system cannot tell."""
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info()[0]
    told = Path('/proc/meminfo')
    found = re.search(r'MemAvailable:\s+(\d+)', told.read_text()) if told.exists() else None
    return int(found.group(1)) * 1024 if found else math.inf
