"""
One long text on several processes (context parallelism): of every row, each process holds the next part. What
lies on other processes is given to a layer in the place of its cache: to attention the keys and values of
all, which go round a ring (kernels/ring.py), to a state space or recurrence the state that the process before
ends with. The rest of a model looks at single tokens, and knows nothing of this.
"""
import math

import torch
import torch.distributed as dist

from model import JointCache, StateCache, TokenCache
from model import ops as kernels


class Sequence:
    """The parts of the rows of a batch, and what a model's layers need to know of the others."""

    def __init__(self, model, block_size):
        self.model = model
        # messages must not get among those of DDP and FSDP
        self.group = dist.new_group()
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.own = slice(self.rank * block_size // world, (self.rank + 1) * block_size // world)
        self.block_size, self.passed = block_size, []

    def part(self, batch):
        """{name: (B,T)} -> this process's part, {name: (B,T / world)}, its `pos`, and a `cache`"""
        batch = {name: x[:, self.own] for name, x in batch.items()}
        idx = batch['idx']
        pos = torch.arange(self.own.start, self.own.stop, device=idx.device)
        dtype, self.passed = self.model.wte.weight.dtype, []
        with torch.device('meta'):
            shapes = [block.new_cache(len(idx), 1, dtype, 'meta', 0) for block in self.model.h]
        return batch | {'pos': pos, 'cache': [self.entry(shape, pos) for shape in shapes]}

    def entry(self, cache, pos):
        if isinstance(cache, JointCache):
            return JointCache(*(self.entry(part, pos) for part in cache.parts))
        if isinstance(cache, TokenCache):
            return Tokens(kernels.Ring(pos, self.group), self.block_size)
        assert isinstance(cache, StateCache), type(cache).__name__
        self.passed.append(PassedState(cache.tail, cache.state, pos.device, self.group))
        return self.passed[-1]

    def closed(self, losses):
        """
        The losses of `part`, with a zero that belongs to them: the gradients of states that this process has
        passed on come back to it from the next one, through what was sent.
        """
        return losses | {'loss': losses['loss'] + sum(entry.sent for entry in self.passed)}


class Tokens:
    """In the place of a TokenCache: keys and values of all processes."""
    empty = True

    def __init__(self, ring, max_tokens):
        self.ring, self.max_tokens = ring, max_tokens

    def update(self, pos, *new, beyond=False):
        return self.ring, new


class PassedState:
    """In the place of a StateCache: what the process before has at its end, and the next one needs."""
    empty, max_tokens = True, math.inf

    def __init__(self, tail, state, device, group):
        """tail, state: of the shapes and types of what is passed, without memory"""
        self.like, self.device, self.group = (tail, state), device, group
        self.rank, self.last = dist.get_rank(group), dist.get_world_size(group) - 1
        self.sent = 0.0

    def read(self):
        if self.rank == 0:
            return None, None
        # an input with a gradient, or nothing would be sent back
        start = torch.zeros((), device=self.device, requires_grad=torch.is_grad_enabled())
        tail, state = Receive.apply(start, self.like, self.group)
        kind = tail.device.type
        return (tail.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tail), state

    def write(self, tail, state):
        if self.rank < self.last:
            tail, state = (x.to(like.dtype) for x, like in zip((tail, state), self.like))
            self.sent = Send.apply(tail, state, self.group)


class Send(torch.autograd.Function):
    """Tensors to the next process -> zero. Their gradients come back from there."""

    @staticmethod
    def forward(ctx, tail, state, group):
        ctx.like, ctx.group = (tail, state), group
        exchange(dist.send, (tail, state), 1, group)
        return tail.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return *exchange(dist.recv, map(torch.empty_like, ctx.like), 1, ctx.group), None


class Receive(torch.autograd.Function):
    """Tensors like these from the process before. Their gradients go back there."""

    @staticmethod
    def forward(ctx, start, like, group):
        ctx.group = group
        return exchange(dist.recv, (torch.empty_like(x, device=start.device) for x in like), -1, group)

    @staticmethod
    def backward(ctx, *grads):
        exchange(dist.send, grads, -1, ctx.group)
        return None, None, None


def exchange(send_or_recv, tensors, step, group):
    """Send tensors to the process `step` places further, or fill them with what comes from there."""
    tensors = tuple(x.contiguous() for x in tensors)
    for x in tensors:
        if x.numel():
            send_or_recv(x, dist.get_global_rank(group, dist.get_rank(group) + step), group)
    return tensors
