"""
What a training step will take, told before the first one (train.py --dry=True): memory by line with the flags
that change it, the cards it fits, floating-point operations, and time.

Memory comes from `ledger`, a step without numbers. Time on this machine comes from a few layers of the model
that are really run: the last of each kind, and the first. Time on a GPU is arithmetic: operations over the
rate of the data sheet, times a utilisation that is assumed. Nothing is measured on the run itself.
"""
import math
import sys
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from model import GPT
from nanoblocks import hardware
from nanoblocks.formats import counted, format_duration, format_quantity
from nanoblocks.training import optim, parallel
from nanoblocks.training import settings as rules
from nanoblocks.training.ledger import Step, simulated

CARDS = 16, 24, 40, 80, 141     # GB
PHASES = 'forward_peak', 'backward_peak', 'update_peak'
FREE = 0.08                     # of a card, for its driver and for holes between tensors: assumed
STREAMS = 'attnres', 'hyper', 'mhc'      # residuals whose first layer makes the streams
KEPT = 0.3                      # GB that glibc was seen to keep beside peaks of 0.2 to 0.6 GB, at most
MFU = 0.40                      # share of a data sheet's rate that a step reaches: assumed
GPUS = 'RTX 4090', 'A100', 'H100', 'B200'
MOST_FLOPS, MOST_TOKENS = 1e12, 2048    # of the layers that are timed, in one forward and backward pass


def tell(config, settings, batch, device, world):
    """
    Print the forecast of a run.

    config      of the model
    settings    of train.py
    batch       {name: tensor (rows,T)}, a micro-batch of any number of rows as the model is called with it
    device      where the run would train
    world       processes
    """
    dtype = settings['dtype']
    dtype = hardware.training_dtype(device, config.n_embd) if dtype == 'auto' else dtype
    refuse(config, settings, dtype)
    step = Step(batch, dtype, settings, settings['gradient_accumulation_steps'] // world)
    counts = counted_in(config)
    rest = config, step, counts, world, device
    for lines in (model_lines(counts, settings, config), memory_lines(*rest), time_lines(*rest)):
        for line in lines:
            print(line, flush=True)


def refuse(config, settings, dtype):
    """ValueError for settings that the run would be refused for, once it has its model and its dtype."""
    rules.check_machine(settings, dtype, settings['compile'] is not False)
    with FakeTensorMode():
        optim.refuse_unused(optim.parse_rates(settings['group_lr']), GPT(config, seed=None))


class Counts(NamedTuple):
    parameters: int
    active: int             # that one token passes through
    flops: int              # per token, forward and backward
    kinds: list             # of each block: what it is
    largest: int            # parameters of the largest block
    outside: int            # parameters outside of the blocks


def counted_in(config):
    with FakeTensorMode():
        model = GPT(config, seed=None)
    sizes = [sum(p.numel() for p in block.parameters()) for block in parallel.blocks_of(model)]
    total = model.num_params()
    return Counts(total, model.num_params(active=True), model.flops_per_token(config.block_size),
                  kinds_of(model), max(sizes), total - sum(sizes))


def kinds_of(model):
    """What each of parallel.blocks_of(model) is: 'encoder a f', 'a f', 'further a f'."""
    encoder = model.encoder.h if model.encoder is not None else ()
    plan = [' '.join(letters) for letters in model.config.plan()]
    return [*(f'encoder {(plan * len(encoder))[layer]}' for layer in range(len(encoder))), *plan,
            *(f'further {plan[-1]}' for _ in model.further)]


def model_lines(counts, s, config):
    tokens = s['gradient_accumulation_steps'] * s['batch_size'] * config.block_size
    quantity = format_quantity
    yield 'forecast  of a run that has not begun: no line is a measurement of it'
    yield (f'model     {quantity(counts.parameters)} parameters, {quantity(counts.active)} active; '
           f'{quantity(counts.flops)} FLOPs per token, forward and backward')
    yield (f'step      {counted(s["gradient_accumulation_steps"], "micro-batch")} of {s["batch_size"]} x '
           f'{config.block_size}: {tokens:,} tokens, {quantity(tokens * counts.flops)} FLOPs')


# ----------------------------------------------------------------------------------------------------------
# Memory


def memory_lines(config, step, counts, world, device):
    s, rows = step.settings, step.settings['batch_size']
    found = {n: simulated(config, n, step) for n in (rows, 1 if rows > 1 else 2)}
    memory, cut = found[rows], world if s['shard'] else 1
    yield (f'memory    GB of a process of {world}, batch_size={rows}, {step.dtype} products, plain PyTorch; '
           'what changes it')
    for name, size, flags in rows_of(memory, counts, step, cut):
        yield f'  {name:<34} {size / 1e9:8.3f}   {flags}'.rstrip()
    if device == 'cpu':
        yield from cpu_lines(peak_by(memory, counts, step, cut), hardware.memory_gb(device))
    if s['compile'] or s['compile'] is None and device != 'cpu':
        yield '  torch.compile and fused kernels keep less than this'
    yield from card_lines(config, step, counts, cut, found)


def rows_of(memory, counts, step, cut):
    """Yields (what, bytes, flags) of the memory of one of `cut` processes that share weights."""
    sizes, shard = 'n_layer n_embd vocab_size tie', ' shard' if cut > 1 else ''
    batch = 'batch_size block_size activation_checkpointing dtype stream_dtype'
    yield 'parameters', memory.parameters / cut, sizes + shard
    yield 'gradients', memory.gradients / cut, sizes + shard
    for name, size in memory.moments.items():
        yield f'moments of {name}', size / cut, 'optimizer' + shard
    yield 'averaged weights', memory.average / cut, 'ema' + shard
    if cut > 1:
        yield 'weights gathered (formula)', gathered(counts, step), 'dtype'
    else:
        yield '16-bit copies of weights', memory.casts, 'dtype'
    yield 'activations: embedding', memory.embedding, 'batch_size block_size'
    for kind in dict.fromkeys(counts.kinds):
        each = [size for other, size in zip(counts.kinds, memory.blocks) if other == kind]
        yield f'activations: {counted(len(each), "layer")} {kind}', sum(each), batch
    yield 'activations: head, its gradients', memory.head, 'batch_size vocab_size'
    yield 'activations in all', memory.activations, ''
    yield 'head at work, logits in chunks', memory.head_peak, 'batch_size vocab_size'
    yield 'most in the forward pass', peak_by(memory, counts, step, cut, 'forward_peak'), ''
    yield 'most in the backward pass', peak_by(memory, counts, step, cut, 'backward_peak'), ''
    yield 'most in the update', peak_by(memory, counts, step, cut, 'update_peak'), 'optimizer'
    yield 'peak', peak_by(memory, counts, step, cut), ''


def gathered(counts, step):
    """Bytes of weights that FSDP has in full: those outside of blocks, and two blocks, one on its way."""
    itemsize = 4 if step.dtype == 'float32' else 2
    return (counts.outside + 2 * counts.largest) * itemsize


def peak_by(memory, counts, step, cut, phase='peak'):
    """The largest number of bytes in a phase, in one of `cut` processes that share weights."""
    peak = getattr(memory, phase)
    if cut == 1:
        return peak
    whole = memory.parameters + memory.gradients + memory.average + sum(memory.moments.values())
    return peak - whole * (1 - 1 / cut) - memory.casts + gathered(counts, step)


def cpu_lines(peak, resident):
    if resident is not None:
        yield (f'  {"Python and PyTorch, until here":<34} {resident:8.3f}   measured; with the peak '
               f'{resident + peak / 1e9:.3f}')
    if sys.platform == 'linux':
        yield (f'  glibc keeps freed blocks below 32 MB: up to {KEPT} GB more was measured for small models; '
               'not with MALLOC_MMAP_THRESHOLD_=131072')


def card_lines(config, step, counts, cut, found):
    """found: {rows: Memory} of two numbers of rows, the smaller of which is 1"""
    many = rows_that_fill(max(CARDS), {n: memory.activations for n, memory in found.items()})
    found = found | {many: simulated(config, many, step)}
    phases = [[(n, peak_by(found[n], counts, step, cut, phase)) for n in sorted(found)] for phase in PHASES]
    per_row = max((after - before) / (high - low) for *_, (low, before), (high, after) in phases)
    yield (f'cards     largest batch_size, by {per_row / 1e9:.3f} GB a row, and {FREE:.0%} of the card left '
           'free (assumed):')
    fits = {card: min(largest_batch(card, peaks) for peaks in phases) for card in CARDS}
    yield '  ' + ', '.join(f'{card} GB: {most or "none"}' for card, most in fits.items())


def room_of(card):
    """Bytes of a card of so many GB that a run may take."""
    return card * 1e9 * (1 - FREE)


def rows_that_fill(card, sizes):
    """How many rows fill a card, of which two numbers take `sizes`, {rows: bytes}, on a straight line."""
    (few, less), (more, most) = sorted(sizes.items())
    return math.ceil(more + max(0, room_of(card) - most) * (more - few) / (most - less))


def largest_batch(card, peaks):
    """
    The largest batch_size of which a phase of a step fits a card of so many GB; 0: none. peaks: of that
    phase, (rows, bytes), from one row on. It is the largest of several lines, one for each moment, so between
    two points it lies below their chord: no more rows are told than fit.
    """
    room, most = room_of(card), 0
    for (low, before), (high, after) in pairwise(peaks):
        if after <= room:
            most = high
        elif before <= room:
            most = low + math.floor((high - low) * (room - before) / (after - before))
    return most


# ----------------------------------------------------------------------------------------------------------
# Time


def time_lines(config, step, counts, world, device):
    s, tokens = step.settings, step.settings['batch_size'] * config.block_size
    flops = counts.flops * tokens * step.micro_batches
    times = timed_layers(config, step, device)
    of_layers = sum(times.layers[kind] for kind in counts.kinds)
    seconds = step.micro_batches * tokens * (of_layers + times.rest) + times.update * counts.parameters
    yield (f'time      of a step on this machine ({hardware.card_name(device)}, eager), from {times.told}:')
    for kind in dict.fromkeys(counts.kinds):
        yield f'  a layer {kind}: {times.layers[kind] * 1e6:.3g} us per token (measured)'
    yield (f'  embedding, head and loss: {times.rest * 1e6:.3g} us per token (measured); '
           f'update: {times.update * counts.parameters:.3g} s')
    yield (f'  {seconds:.3g} s a step, {step.micro_batches * tokens * world / seconds:,.0f} tokens/s; '
           f'{counted(s["max_iters"], "step")}: {format_duration(seconds * s["max_iters"])}, '
           'without evaluations')
    yield (f'time      of a step on {counted(world, "GPU")}, from {format_quantity(flops)} FLOPs each at '
           f'{MFU:.0%} of the dense bf16 rate of the data sheet (assumed), without messages between them:')
    for name in GPUS:
        seconds = flops / (MFU * hardware.PEAK_FLOPS[name])
        yield (f'  {name}: {seconds:.3g} s a step, '
               f'{step.micro_batches * tokens * world / seconds:,.0f} tokens/s; '
               f'{counted(s["max_iters"], "step")}: {format_duration(seconds * s["max_iters"])}')


class Times(NamedTuple):
    layers: dict            # {kind of layer: seconds per token, forward and backward}
    rest: float             # seconds per token of all that is not in a layer
    update: float           # seconds per parameter
    told: str               # what was run


def timed_layers(config, step, device):
    """The Times of a model cut to a few layers, the better of two passes after one that warms up."""
    model = GPT(config, seed=None)
    every = kinds_of(model)
    whole = dict(zip(parallel.blocks_of(model), every))
    cut(model, every)
    model.init_weights(0)   # of the others no memory is ever touched
    model, length = model.to(device), config.block_size
    tokens = min(MOST_TOKENS, max(128, MOST_FLOPS // model.flops_per_token(length)))
    while length > tokens:
        length //= 2
    rows = max(1, min(step.settings['batch_size'], tokens // length))
    batch = {name: x[:1, :length].to(device).expand(rows, -1).contiguous() for name, x in step.batch.items()}
    if step.settings['activation_checkpointing']:
        parallel.recompute_blocks(model)
    clock, optimizers = Clock(parallel.blocks_of(model), device), step.optimizers(model)
    passes = [one_pass(model, batch, optimizers, step, clock, device) for _ in range(3)]
    in_blocks, total, update = min(passes[1:], key=lambda found: found[1])
    by_kind = defaultdict(list)
    for block, seconds in in_blocks.items():
        by_kind[whole[block]].append(seconds / (rows * length))
    layers = {kind: sum(found) / len(found) for kind, found in by_kind.items()}
    rest = max(0.0, total - sum(in_blocks.values())) / (rows * length)
    return Times(layers, rest, update / model.num_params(),
                 f'{counted(len(in_blocks), "layer")} run alone on {rows} x {length} tokens')


def cut(model, kinds):
    """Keep of the layers the last of each kind, and the first where others read what it makes."""
    encoder = model.encoder.h if model.encoder is not None else ()
    for part, before in ((encoder, 0), (model.h, len(encoder))):
        last = {kinds[before + layer]: layer for layer in range(len(part))}
        opens = model.config.residual in STREAMS or 'r' in model.config.mixers()
        first = {0} if part is model.h and opens else set()
        kept = [block for layer, block in enumerate(part) if layer in {*first, *last.values()}]
        if part is model.h:
            model.h = nn.ModuleList(kept)
        elif kept:
            model.encoder.h = nn.ModuleList(kept)
    inside = set(model.modules())
    model.moes = tuple(moe for moe in model.moes if moe in inside)


class Clock:
    """Seconds that blocks take, forward and backward, by hooks on what goes in and comes out."""

    def __init__(self, blocks, device):
        self.spent, self.began, self.device = defaultdict(float), {}, device
        for block in blocks:
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(self.leave)

    def start(self, block):
        self.began[block] = hardware.synchronized_time(self.device)

    def stop(self, block):
        self.spent[block] += hardware.synchronized_time(self.device) - self.began[block]

    def enter(self, block, args):
        self.start(block)

    def leave(self, block, args, out):
        self.stop(block)
        # of several streams the newest
        tree_leaves(out)[-1].register_hook(lambda grad: self.start(block))
        tree_leaves(args[0])[-1].register_hook(lambda grad: self.stop(block))


def one_pass(model, batch, optimizers, step, clock, device):
    """({block: seconds}, seconds of the forward and backward pass, seconds of the update)"""
    clock.spent.clear()
    began = hardware.synchronized_time(device)
    with step.autocast(device_type=device.split(':')[0]):
        loss = model(**batch, z_loss=step.settings['z_loss'], parts=True)[1]['loss']
    optimizers.scaled(loss, 1.0).backward()
    middle = hardware.synchronized_time(device)
    optimizers.step(0)
    return dict(clock.spent), middle - began, hardware.synchronized_time(device) - middle
