"""
Several processes: how they meet, how a model is replicated (DDP) or sharded (FSDP2), and tensors of which a
process holds a shard. The sharding helpers accept ordinary tensors too, and return them unchanged.
"""
import inspect
import os
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from nanoblocks.training.stopping import FailureWatch


def ranks() -> tuple[int, int, int]:
    """
    (rank, number of processes, rank on this machine) from the environment that torchrun sets; (0, 1, 0) for a
    single process.
    """
    return environment('RANK', 0), environment('WORLD_SIZE', 1), environment('LOCAL_RANK', 0)


def environment(name, default):
    """A number that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise SystemExit(f'{name}={text} must be a whole number in the environment, as torchrun sets it: '
                         'unset it')
    return int(text)


def check_meeting(world: int) -> None:
    """ValueError if one of `world` processes is not told where to meet the others."""
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if world > 1 and missing:
        raise ValueError(f'WORLD_SIZE={world} must have {" and ".join(missing)} beside it, as torchrun sets '
                         'them: start it with torchrun, or unset WORLD_SIZE; a forecast needs no other, with '
                         '--dry=True')


def start(device_type: str, backend: str) -> FailureWatch:
    """Meet the processes that torchrun has started. Returns the FailureWatch over them."""
    store, rank, world = next(dist.rendezvous('env://'))
    # torchrun --max-restarts starts the processes again on the same store, where addresses and notes of the
    # attempt before still stand
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    failure_watch = FailureWatch(store, rank, world)
    dist.init_process_group('gloo' if device_type == 'cpu' else backend, store=store, rank=rank,
                            world_size=world)
    failure_watch.catch_exceptions()
    return failure_watch


def end(failure_watch: FailureWatch | None) -> None:
    """Part from the other processes, if there are any."""
    if failure_watch:
        failure_watch.close()
        dist.destroy_process_group()


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def from_main(value):
    """The main process's `value`, any object, in every process. Every process must call it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def summed(values: list[float], device_type: str) -> list[float]:
    """The sums of `values` over all processes, in float64. Every process must call it."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device_type)
    dist.all_reduce(total)
    return total.tolist()


def refuse_differences(found: dict) -> None:
    """
    ValueError in every process unless all have found the same: {name: a plain value}. Every process must call
    it.
    """
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise ValueError(f'{name}={value} must be the same in all processes, but rank {rank} has '
                                 f'{other[name]}: give all of them the same command line and files, and '
                                 'an out_dir on a file system that all nodes share')


class MicroBatches:
    """
    Which micro-batches belong to a step, and which of them to this process. One sequence of numbers, from 0,
    runs through all steps of all processes; a process takes every world-th number.

    total       micro-batches per step
    warmup      steps in which their number grows in a straight line to `total`
    """

    def __init__(self, total, warmup, rank, world):
        self.total, self.warmup, self.rank, self.world = total, warmup, rank, world

    def count(self, step: int) -> int:
        """Micro-batches in a step, a multiple of `world`."""
        if step >= self.warmup:
            return self.total
        per_process = -(-self.total * (step + 1) // ((self.warmup + 1) * self.world))  # rounded up
        return min(self.total, per_process * self.world)

    def mine(self, step: int, done: int) -> range:
        """Numbers of this process's micro-batches in a step; `done` micro-batches were made before it."""
        return range(done + self.rank, done + self.count(step), self.world)

    def mine_until(self, last_step, step, done):
        """Yields mine() of the steps from `step` on, up to but not including `last_step`."""
        for later in range(step, last_step):
            yield from self.mine(later, done)
            done += self.count(later)


# ----------------------------------------------------------------------------------------------------------
# Models


def wrap(model, dtype, compile_mode, recompute, sharded):
    """
    (fast_model, model): the compiled model, and the DDP or FSDP wrapper, which exchanges gradients between
    processes; each is the model itself if not asked for. compile_mode: torch.compile's, False: leave it out.
    `recompute` is activation checkpointing.
    """
    fast_model = model
    if compile_mode and not (sharded or recompute):
        fast_model = torch.compile(model, mode=compile_mode)
    elif compile_mode:
        # the blocks alone, because what FSDP and checkpointing do between them cannot be compiled; each depth
        # may be a case of its own, as the number of sources of attention residuals is
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 1 + len(blocks_of(model)))
        for block in blocks_of(model):
            block.forward = torch.compile(block.forward, mode=compile_mode)
    if recompute:
        recompute_blocks(model)
    if sharded:
        return fast_model, shard(model, dtype)
    return fast_model, replicate(fast_model) if dist.is_initialized() else fast_model


def blocks_of(model):
    """The blocks of a model, those of an encoder beside it and of multi-token prediction included."""
    return (*(model.encoder.h if model.encoder is not None else ()), *model.h, *model.further)


def recompute_blocks(model):
    """
    Activation checkpointing: keep only the input of each block, and compute the rest again in the backward
    pass. Parameters keep their names.
    """
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                context_fn=partial(contexts_of_passes, block))


def contexts_of_passes(block):
    """Contexts of the first pass and of the recomputation, in which experts must not count tokens again."""
    return nullcontext(), loads_restored(block)


@contextmanager
def loads_restored(block):
    loads = [buffer for name, buffer in block.named_buffers() if name.rpartition('.')[2] == 'load']
    before = [load.clone() for load in loads]
    try:
        yield
    finally:
        for load, kept in zip(loads, before):
            load.copy_(kept)


def replicate(model):
    """A replica of the model in every process; the processes average their gradients (DDP)."""
    ddp = torch.nn.parallel.DistributedDataParallel
    # no process overwrites the buffers of another, in which experts count their tokens
    renamed = 'forward_sync_buffers' in inspect.signature(ddp).parameters
    # gradients are views of what is sent, which need not be copied back
    return ddp(model, gradient_as_bucket_view=True,
               **{'forward_sync_buffers' if renamed else 'broadcast_buffers': False})


def shard(model, dtype):
    """
    Shard parameters, gradients and moments over the processes (FSDP2); each block is gathered just before it
    runs. With dtype bfloat16 it is gathered in 16 bits, and gradients are still summed in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy() if dtype == 'float32' else MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def exchange_gradients(model, now):
    """Whether the following forward and backward passes exchange gradients between processes."""
    if hasattr(model, 'set_requires_gradient_sync'):    # FSDP
        model.set_requires_gradient_sync(now)
    elif hasattr(model, 'require_backward_grad_sync'):  # DDP; its no_sync() toggles this variable
        model.require_backward_grad_sync = now


# ----------------------------------------------------------------------------------------------------------
# Sharded tensors


def is_sharded(x):
    """Whether x is a DTensor; importing DTensor to ask isinstance would take 1.5 seconds."""
    return hasattr(x, 'full_tensor')


def local(x):
    """The shard that this process holds of a tensor."""
    return x.to_local() if is_sharded(x) else x.detach()


def as_shard(x, p):
    """x, this process's shard of a tensor cut as p is, as a part of that tensor; or x, if p is not cut."""
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                              stride=p.stride())


def gather_like(x, p):
    """The full tensor of x, this process's shard of a tensor cut as p is. Every process must call it."""
    return as_shard(x, p).full_tensor() if is_sharded(p) else x


def shard_like(value, p):
    """
    Cut a full tensor of p's shape as p is cut; of one that is still on the disk, read no more than that. Any
    other value is returned as it is.
    """
    if hasattr(value, 'read'):
        return value.read(like=p)
    if is_sharded(p) and isinstance(value, torch.Tensor) and value.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor
        # every process has the full tensor, so nothing is sent
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return value
