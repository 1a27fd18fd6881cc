"""
From gradients to steps: groups of parameters, AdamW and Muon, clipping, the schedule of the learning rate and
averaged weights. Everything here accepts full tensors and the shards of FSDP.

A step is skipped without waiting for the device: each optimizer has `found_inf`, a tensor that is 1 if a
gradient was not finite, and its update then changes nothing. torch.amp.GradScaler works the same way.
"""
import math
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.distributed as dist

from nanoblocks.formats import format_quantity
from nanoblocks.training.parallel import as_shard, gather_like, is_sharded, local, shard_like


class Optimizers:
    """
    AdamW, and Muon if it has parameters, with the gradient scaler of float16 and the averaged weights.

    groups          of param_groups
    lr_fraction     a function: step -> learning rate as a fraction of its peak
    betas           of AdamW
    grad_clip       largest norm of the gradient; 0: no clipping
    ema             decay of the averaged weights; 0: none
    cautious        see Muon
    dtype           of matrix products, as in the settings of train.py
    compiled        whether to compile Muon's iteration
    """

    def __init__(self, model, groups, lr_fraction, betas, grad_clip=0.0, ema=0.0, cautious=False,
                 dtype='float32', compiled=False):
        self.params = list(model.parameters())
        self.lr_fraction, self.grad_clip = lr_fraction, grad_clip
        device_type = self.params[0].device.type
        # one pass over memory instead of a dozen, and faster than what torch.compile makes of the update
        self.fused = device_type in ('cuda', 'cpu')
        self.each = [torch.optim.AdamW(groups['adamw'], betas=betas, fused=self.fused)]
        if groups['muon']:
            # Newton-Schulz in the precision of the run
            muon_dtype = torch.bfloat16 if dtype == 'bfloat16' else torch.float32
            self.each.insert(0, Muon(groups['muon'], cautious=cautious, compiled=compiled, dtype=muon_dtype))
        self.scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
        self.average = Average(model, ema) if ema else None

    def scaled(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """The loss to call backward() on: `loss` times its weight in the step, and scaled in float16."""
        # 0 * loss makes every gradient NaN if the loss is, on every rank, so that all skip the step together
        return self.scaler.scale(loss * (weight + 0 * loss.detach()))

    @torch.no_grad()
    def step(self, step: int) -> torch.Tensor:
        """
        Update the weights, unless a gradient is not finite, and clear the gradients. Returns the norm of the
        gradient before clipping, a tensor: on CUDA nothing here waits for the device. `step` counts from 0.
        """
        for opt in self.each:
            self.scaler.unscale_(opt)
        grad_norm = total_norm([p.grad for p in self.params if p.grad is not None])
        finite = torch.isfinite(grad_norm)
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.grad_clip, grad_norm)
        self.set_rates(step)
        for opt in self.each:
            opt.found_inf = 1 - finite.float() if self.fused else None
            if self.fused or finite:
                opt.step()
            opt.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average:
            self.average.update(step)
        return grad_norm

    def set_rates(self, step: int) -> None:
        for opt in self.each:
            for group in opt.param_groups:
                group['lr'] = group['peak_lr'] * self.lr_fraction(step)

    def averaged(self):
        """A context in which the model has the averaged weights, if there are any."""
        return self.average.in_place() if self.average else nullcontext()

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {'optimizers': state_of(self.each), 'scaler': self.scaler.state_dict(),
                'ema': self.average.state() if self.average else None}

    def load(self, saved: dict) -> None:
        load_state(self.each, saved['optimizers'])
        # a run with no step left to do saves the rates of its last one
        self.set_rates(max(0, saved['step'] - 1))
        if saved['scaler']:
            self.scaler.load_state_dict(saved['scaler'])
        if self.average and saved['ema']:
            self.average.load(saved['ema'])

    def lines(self):
        """For each group a line about its optimizer, kind, size, learning rate and decay."""
        for opt in self.each:
            for group in opt.param_groups:
                size = format_quantity(sum(p.numel() for p in group['params']))
                yield (f'{type(opt).__name__} for {len(group["params"])} tensors of kind {group["kind"]}, '
                       f'{size} parameters: lr {group["peak_lr"]:g}, weight decay {group["weight_decay"]:g}')


# ----------------------------------------------------------------------------------------------------------
# Groups


def parse_rates(text):
    """'embedding=3e-3,*.router.weight=1e-4' -> {'embedding': 0.003, ...}. ValueError for anything else."""
    rates = {}
    for rule in filter(None, (part.strip() for part in text.split(','))):
        pattern, equals, rate = rule.partition('=')
        try:
            rates[pattern] = float(rate)
        except ValueError:
            equals = ''
        if not equals or not 0 <= rates[pattern] < math.inf:
            raise ValueError(f'group_lr={text} must be rules like embedding=3e-3,*.router.weight=1e-4: a '
                             'kind of parameter or a pattern of names, and its peak rate')
    return rates


def refuse_unused(rates, model):
    """ValueError for a rate that fits no parameter's kind or name."""
    kinds = model.param_kinds()
    for pattern in rates:
        if not any(fits(pattern, name, kind) for name, kind in kinds.items()):
            raise ValueError(f'group_lr: {pattern} must be a kind of parameter '
                             f'({", ".join(sorted(set(kinds.values())))}) or a pattern that fits a name')


def fits(pattern, name, kind):
    return kind == pattern or fnmatchcase(name, pattern)


def param_groups(model, optimizer, learning_rate, muon_lr, weight_decay, rates):
    """
    {'muon': [...], 'adamw': [...]}: parameter groups for torch's optimizers, each of one kind and one peak
    rate, with the names of its parameters. With optimizer='muon' Muon takes the matrices; vectors do not
    decay. `rates` overrides the peak rate by kind or name; the last entry that fits wins.
    """
    groups, found = {}, {'muon': [], 'adamw': []}
    kinds = model.param_kinds()
    for name, p in model.named_parameters():
        kind = kinds[name]
        algorithm = 'muon' if optimizer == 'muon' and kind == 'matrix' else 'adamw'
        rate = muon_lr if algorithm == 'muon' else learning_rate
        for pattern, wanted in rates.items():
            rate = wanted if fits(pattern, name, kind) else rate
        if (kind, rate) not in groups:
            groups[kind, rate] = {'params': [], 'names': [], 'kind': kind, 'lr': rate, 'peak_lr': rate,
                                  'weight_decay': 0.0 if kind == 'vector' else weight_decay}
            found[algorithm].append(groups[kind, rate])
        groups[kind, rate]['params'].append(p)
        groups[kind, rate]['names'].append(name)
    return found


def state_of(optimizers):
    """
    What a checkpoint keeps of optimizers: {'state': {parameter name: its moments}, 'param_groups': settings,
    for information}. By name, so that a run can continue with other groups or another number of processes.
    """
    saved = []
    for opt in optimizers:
        state = {name: dict(opt.state[p])
                 for group in opt.param_groups for name, p in zip(group['names'], group['params'])
                 if p in opt.state}
        settings = [{key: value for key, value in group.items() if key != 'params'}
                    for group in opt.param_groups]
        saved.append({'state': state, 'param_groups': settings})
    return saved


def load_state(optimizers, saved):
    """Give the moments that `state_of` saved to the parameters of the same names; keep the new settings."""
    by_name = {name: state for opt in saved for name, state in opt['state'].items()}
    for opt in optimizers:
        own = opt.state_dict()
        names = [name for group in opt.param_groups for name in group['names']]
        params = [p for group in opt.param_groups for p in group['params']]
        own['state'] = {i: {key: shard_like(value, p) for key, value in by_name[name].items()}
                        for i, (name, p) in enumerate(zip(names, params)) if name in by_name}
        opt.load_state_dict(own)


def total_norm(tensors):
    """The norm of all tensors together, a scalar tensor. Every process must call it."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if is_sharded(norm) else norm


# ----------------------------------------------------------------------------------------------------------
# Muon


# Five odd polynomials s (c0 + c1 s^2 + c2 s^4), to be applied to singular values s one after the other. Each
# is the quintic that comes nearest to 1 (Amsel et al. 2025, https://arxiv.org/abs/2505.16932) on what those
# before make of [0.0015, 1], with 5 % on either side for the rounding of bfloat16: beyond its interval a
# quintic grows fast. All together bring [0.0015, 1] to within 0.12 of 1.
QUINTICS = ((8.4485, -25.0219, 18.5607), (3.9615, -2.6748, 0.4547), (3.7246, -2.5325, 0.4423),
            (3.0887, -2.135, 0.4091), (2.2243, -1.5305, 0.3672))


def orthogonalize(x):
    """
    x (K,m,n), each U S V^T -> about U V^T: nearer to it than after as many steps of Jordan et al. 2024
    (https://kellerjordan.github.io/posts/muon), and for a wide matrix with fewer products.

    An odd polynomial makes q x of x, where q is a polynomial of the Gram matrix x x^T on the smaller side. Of
    a wide matrix two or three are worked out there before x takes part again. Not more: rounding makes small
    eigenvalues of a Gram matrix negative, where polynomials grow, and that x mends.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    m, n = x.shape[-2:]
    first, *rest = (QUINTICS[:2], QUINTICS[2:]) if n > 1.5 * m else zip(QUINTICS)
    gram = x @ x.mT
    # divide the singular values by (their sum of 4th powers)^(1/4), at least the largest: by the root of the
    # norm of the Gram matrix, with 2 % for rounding. It is divided by its trace first, to stay in range
    trace = gram.diagonal(dim1=-2, dim2=-1).float().sum(-1)[..., None, None].clamp(min=1e-14)
    size = 1.02 * trace * (gram / trace).norm(dim=(-2, -1), keepdim=True).clamp(min=1e-14)
    x = (composed((gram / size).to(x.dtype), first) * size.rsqrt()).to(x.dtype) @ x
    for quintics in rest:
        x = composed(x @ x.mT, quintics) @ x
    return x.mT if tall else x


def composed(gram, quintics):
    """The matrices q (K,m,m) for which q x is what the quintics make of x one by one, where gram is x x^T."""
    q = p = quintic(gram, *quintics[0])
    for following in quintics[1:]:
        gram = p @ gram @ p
        p = quintic(gram, *following)
        q = p @ q
    return q


def quintic(gram, c0, c1, c2):
    """c0 + c1 G + c2 G^2 of the Gram matrices G (K,m,m)."""
    p = torch.baddbmm(gram, gram, gram, beta=c1, alpha=c2)
    p.diagonal(dim1=-2, dim2=-1).add_(c0)
    return p


class Muon(torch.optim.Optimizer):
    """
    Momentum with orthogonalised updates (Jordan et al. 2024) and decoupled weight decay. The update is the
    one of torch.optim.Muon, but matrices of the same shape share a batched product, and processes share the
    work: each orthogonalises some of the matrices and sends them to the others.

    cautious: decay a weight only where the update moves it towards zero too (Chen et al. 2025,
    https://arxiv.org/abs/2510.12402).
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, cautious=False, compiled=False,
                 dtype=None):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay,
                                  'cautious': cautious})
        self.orthogonalize = torch.compile(orthogonalize) if compiled else orthogonalize
        # the iteration tolerates bfloat16, which is several times as fast where the hardware has it
        device = self.param_groups[0]['params'][0].device.type
        has_bf16 = device == 'cuda' or device == 'cpu' and torch.cpu._is_avx512_bf16_supported()
        self.dtype = dtype or (torch.bfloat16 if has_bf16 else torch.float32)
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        if self.found_inf is not None and self.found_inf.is_cpu:
            if self.found_inf > 0:
                return
            self.found_inf = None  # on a CPU nobody waits, and one pass over the gradients is saved
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group['params']:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for same_shape in shapes.values():
                self.update(same_shape, group)

    def update(self, params, group):
        """One step of matrices (m,n) of one shape."""
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        momenta = [local(self.state[p]['momentum_buffer']) for p in params]
        rate, momentum = group['lr'], group['momentum']
        if self.found_inf is not None:
            # a skipped step: a momentum that moves towards itself stays as it is
            grads = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, grads)]
            rate = rate * (1 - self.found_inf)
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        # Nesterov's look ahead, of one matrix after the other, so that no full set of them is kept in float32
        full = torch.stack([gather_like(g.lerp(m, momentum), p).to(self.dtype)
                            for g, m, p in zip(grads, momenta, params)])
        updates = self.orthogonalize_together(full)
        m, n = params[0].shape
        step, decay = rate * math.sqrt(max(1, m / n)), rate * group['weight_decay']
        for w, u, p in zip(weights, updates, params):
            u = local(shard_like(u.to(w.dtype), p))
            if group['weight_decay']:
                w.sub_(w * (u * w > 0) * decay if group['cautious'] else w * decay)
            w.sub_(u * step)

    def orthogonalize_together(self, x):
        """Orthogonalise x (K,m,n), each process its part of the K."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return self.orthogonalize(x)
        count = -(-len(x) // world)
        begin = count * dist.get_rank()
        mine = x.new_zeros(count, *x.shape[1:])
        mine[:len(x[begin:begin + count])] = x[begin:begin + count]
        parts = x.new_empty(world, count, *x.shape[1:])
        dist.all_gather(list(parts), self.orthogonalize(mine))
        return parts.flatten(0, 1)[:len(x)]


# ----------------------------------------------------------------------------------------------------------
# Schedules

SCHEDULES = {
    # progress of the decay, 0 to 1 -> how much of the way down is left
    'cosine': lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    'linear': lambda progress: 1 - progress,
    'wsd': lambda progress: 1 - progress,
    'constant': lambda progress: 1.0,
}


def schedule_of(s: dict):
    """The function lr_fraction of a step alone, by the settings s of train.py."""
    end = 0.1 if s['min_lr'] is None else s['min_lr'] / s['learning_rate']
    schedule, warmup = (s['schedule'], s['warmup_iters']) if s['decay_lr'] else ('constant', 0)
    return partial(lr_fraction, schedule=schedule, warmup=warmup, last=s['lr_decay_iters'] or s['max_iters'],
                   end=end, wsd_decay=s['wsd_decay'])


def lr_fraction(step, schedule, warmup, last, end, wsd_decay):
    """
    The learning rate of a step (the first is 0) as a fraction of its peak: it rises for `warmup` steps, then
    falls to `end` at step `last`. With wsd it stays at the peak in between, and falls only in the last
    `wsd_decay * last` steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, (1 - wsd_decay) * last) if schedule == 'wsd' else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    return end + (1 - end) * SCHEDULES[schedule](progress)


# ----------------------------------------------------------------------------------------------------------
# Averaged weights


class Average:
    """An exponential moving average of a model's weights, for evaluation and best.pt."""

    def __init__(self, model, decay):
        self.params, self.decay = dict(model.named_parameters()), decay
        self.weights = [local(p).clone() for p in self.params.values()]

    @torch.no_grad()
    def update(self, step):
        # a shorter average at first, or the initial weights would stay in it for long
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.weights, [local(p) for p in self.params.values()], 1 - decay)

    @contextmanager
    def in_place(self):
        """A context in which the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for p, weight in zip(self.params.values(), self.weights):
            mine, other = local(p), weight.clone()
            weight.copy_(mine)
            mine.copy_(other)

    def state(self):
        return {name: as_shard(weight, p)
                for (name, p), weight in zip(self.params.items(), self.weights)}

    def load(self, state):
        for (name, p), weight in zip(self.params.items(), self.weights):
            weight.copy_(local(shard_like(state[name], p)))
