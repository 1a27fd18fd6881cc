"""Several processes: how they find each other, and how a model is copied to them (DDP) or cut up (FSDP2)."""
import inspect
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from nanoblocks.training.stopping import Watch


def start(device_type, backend):
    """Meet the other processes, by the environment that torchrun makes. Returns the Watch over them."""
    store, rank, world = next(dist.rendezvous('env://'))
    watch = Watch(store, rank, world)
    dist.init_process_group('gloo' if device_type == 'cpu' else backend, store=store, rank=rank,
                            world_size=world)
    watch.catch()
    return watch


def end(watch):
    watch.close()
    dist.destroy_process_group()


def recompute_blocks(model):
    """
    Activation checkpointing: keep what goes into a block, and compute the rest again in the backward pass.
    In place, and without new names.
    """
    for block in (*model.h, *model.further):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                context_fn=partial(without_counting, block))


def without_counting(block):
    """The contexts of the first pass and of the repeated one, in which experts must not count again."""
    return nullcontext(), loads_kept(block)


@contextmanager
def loads_kept(block):
    loads = [buffer for name, buffer in block.named_buffers() if name.rpartition('.')[2] == 'load']
    before = [load.clone() for load in loads]
    try:
        yield
    finally:
        for load, kept in zip(loads, before):
            load.copy_(kept)


def copies(model):
    """A copy of the model in every process, which average their gradients (DDP)."""
    ddp = torch.nn.parallel.DistributedDataParallel
    # experts count their tokens in buffers, each process its own
    renamed = 'forward_sync_buffers' in inspect.signature(ddp).parameters
    return ddp(model, **{'forward_sync_buffers' if renamed else 'broadcast_buffers': False})


def shard(model, device_type, dtype):
    """
    Cut parameters, gradients and moments among the processes (FSDP2); each block is gathered when its turn
    comes. With dtype bfloat16 it is gathered in 16 bit, and gradients are still summed in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy() if dtype == 'float32' else MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for block in (*model.h, *model.further):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@contextmanager
def gradients_exchanged(model, now):
    """Whether the backward passes within it exchange gradients, or leave that to a later one."""
    if hasattr(model, 'set_requires_gradient_sync'):
        model.set_requires_gradient_sync(now)
        yield
    elif now or not hasattr(model, 'no_sync'):
        yield
    else:
        with model.no_sync():
            yield
