"""
What memory a training step takes, found without the memory and without the time: the step runs on tensors
that have a shape and a dtype but no numbers (torch's FakeTensorMode), and a ledger counts the bytes that
would be in use after every operation. So each flag counts by what the code does, not by a formula.

It is the step of a CPU, in plain PyTorch and eager: what an operation uses inside itself is not seen, and
fused kernels and torch.compile keep less. Parameters, gradients, moments and averages are the same anywhere.
"""
import inspect
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, ops
from nanoblocks.training import optim, parallel

ASKED = torch.ops.aten._local_scalar_dense.default      # a number that the program reads from a tensor
CAST = torch.ops.aten._to_copy.default
# Parts of the logits whose gradient the head makes at once, at most: on a CPU they are as small as a cache,
# and every one would be dozens of operations here
HEAD_PARTS = 128


class Memory(NamedTuple):
    """Bytes of one process; activations and head are those of one micro-batch."""
    parameters: int         # and buffers
    gradients: int
    moments: dict           # {'AdamW': bytes, 'Muon': bytes}
    average: int            # the averaged weights of ema
    casts: int              # 16-bit copies of weights, which autocast keeps for the step
    embedding: int          # what is kept of it for the backward pass
    blocks: list            # of each block, what is kept for the backward pass
    head: int               # what the loss keeps: the gradients of its input and its weight
    head_peak: int          # the most that the head and the loss have beside what was there before
    forward_peak: int       # the most in a whole forward pass, in a backward pass and in an update
    backward_peak: int
    update_peak: int

    @property
    def activations(self):
        return self.embedding + sum(self.blocks) + self.head

    @property
    def peak(self):
        return max(self.forward_peak, self.backward_peak, self.update_peak)


class Step(NamedTuple):
    """What decides the memory of a step, beside the model's flags."""
    batch: dict             # {name: tensor of any number of rows} as the model is called with it
    dtype: str              # of products: float32, bfloat16, float16
    settings: dict          # of train.py
    micro_batches: int      # of one process in one step

    def autocast(self, enabled=True, device_type='cpu'):
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(device_type, getattr(torch, self.dtype), enabled=enabled)

    def optimizers(self, model, schedule=lambda step: 1.0):
        s = self.settings
        rates = optim.parse_rates(s['group_lr'])
        groups = optim.param_groups(model, s['optimizer'], s['learning_rate'], s['muon_lr'],
                                    s['weight_decay'], rates)
        return optim.Optimizers(model, groups, schedule, (s['beta1'], s['beta2']), s['grad_clip'], s['ema'],
                                s['cautious_decay'], self.dtype)


class Ledger(TorchDispatchMode):
    """
    Bytes of the storages that are alive, by the place in the program where they were made.

    largest     what stands for an integer that the program reads: the last position of a text
    """

    def __init__(self, largest):
        super().__init__()
        self.alive, self.made, self.total, self.peak = Counter(), {}, 0, 0
        self.place, self.weights, self.yes, self.largest = 'parameters', set(), False, largest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ASKED:
            dtype = args[0].dtype
            return self.yes if dtype == torch.bool else 0.0 if dtype.is_floating_point else self.largest
        out = func(*args, **kwargs or {})
        is_cast = func is CAST and args[0].untyped_storage()._cdata in self.weights
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor.untyped_storage(), 'casts' if is_cast else self.place)
        return out

    def enter(self, storage, place):
        key = storage._cdata
        if key not in self.made:
            self.made[key] = place, storage.nbytes()
            self.alive[place] += storage.nbytes()
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)
            weakref.finalize(storage, self.leave, key).atexit = False

    def leave(self, key):
        place, size = self.made.pop(key)
        self.alive[place] -= size
        self.total -= size


def simulated(config, rows, step):
    """The Memory of a training step with micro-batches of `rows` rows; nothing of it is allocated."""
    blocked = max(2**19, rows * config.block_size * config.vocab_size // HEAD_PARTS)
    head = inspect.unwrap(ops.linear_cross_entropy).__globals__
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(config.block_size - 1) as ledger, \
            mock.patch.dict(head, BLOCK_NUMEL=blocked):
        model = GPT(config, seed=None)
        parameters = ledger.total
        ledger.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        optimizers, updated = update(model, step, ledger)
        return Memory(parameters=parameters, **updated, **passes(model, optimizers, rows, step, ledger))


def update(model, step, ledger):
    """A first update, which makes the moments: (the optimizers, their part of Memory)."""
    ledger.place = 'average'
    optimizers = step.optimizers(model)
    ledger.place = 'gradients'
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    found = {'gradients': ledger.alive['gradients'], 'average': ledger.alive['average']}
    ledger.place, ledger.peak = 'moments', ledger.total
    optimizers.scaled(torch.zeros(()), 1.0)     # float16 scales gradients from the first loss on
    optimizers.step(0)
    found['moments'] = {type(opt).__name__: sum(x.nbytes for state in opt.state.values()
                                                for x in state.values()) for opt in optimizers.each}
    return optimizers, found | {'update_peak': ledger.peak}


def passes(model, optimizers, rows, step, ledger):
    """Two micro-batches, which stand for any number from two on, or one: their part of Memory."""
    blocks, found = parallel.blocks_of(model), {}
    if step.settings['activation_checkpointing']:
        parallel.recompute_blocks(model)
    if step.settings['stream_dtype'] != 'float32':
        model.stream_dtype = getattr(torch, step.settings['stream_dtype'])
    watch(model, blocks, ledger, found)
    with step.autocast(enabled=False):      # keeps the weights that autocast has cast
        for _ in range(min(2, step.micro_batches)):
            ledger.place, ledger.peak = 'embedding', ledger.total
            batch = {name: torch.zeros(rows, *x.shape[1:], dtype=x.dtype) for name, x in step.batch.items()}
            with step.autocast():
                # those before stay alive until then, and all that their graph keeps
                losses = model(**batch, z_loss=step.settings['z_loss'], parts=True)[1]
            found['head_peak'] = ledger.peak - found.pop('before_head')
            found['forward_peak'] = max(ledger.peak, found.pop('peak_before_head'))
            alive = ledger.alive.copy()
            ledger.place, ledger.peak = 'gradients', ledger.total
            # what the head asks about a factor of its gradients: whether it is one
            ledger.yes = step.micro_batches == 1 and step.dtype != 'float16'
            optimizers.scaled(losses['loss'], 1 / step.micro_batches).backward()
            ledger.yes = False
            found['backward_peak'] = ledger.peak
    return found | {'casts': alive['casts'], 'embedding': alive['embedding'], 'head': alive['head'],
                    'blocks': [alive[block] for block in blocks]}


def watch(model, blocks, ledger, found):
    """Tell the ledger where a forward pass is; note what there is before the head."""
    outside = ['embedding']

    def enter(block, args):
        if ledger.place != 'gradients':     # where a block is computed again
            ledger.place = block

    def leave(block, args, out):
        if ledger.place != 'gradients':
            ledger.place = outside[0]

    def begin_head(module, args):
        found['before_head'], found['peak_before_head'] = ledger.total, ledger.peak
        ledger.place = outside[0] = 'head'
        ledger.peak = ledger.total
    model.register_forward_pre_hook(lambda *_: outside.__setitem__(0, 'embedding'))
    model.ln_f.register_forward_pre_hook(begin_head)
    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
