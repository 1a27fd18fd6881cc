"""
From gradients to steps: which parameter is in which group, Muon beside PyTorch's AdamW, the schedule of the
learning rate, clipping, averaged weights. Everything takes whole tensors and the shards of FSDP alike.

A step is skipped without asking the device first: `found_inf`, a tensor that is 1 when a gradient was not
finite, is set on each optimizer, as torch.amp.GradScaler does, and its update then changes nothing.
"""
import math
from collections import defaultdict
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------
# Groups


def parse_rates(text):
    """'embedding=3e-3,*.router.weight=1e-4' -> {'embedding': 0.003, ...}. ValueError, one sentence."""
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
    """ValueError, one sentence, for a rate that fits no parameter's kind or name."""
    kinds = model.param_kinds()
    for pattern in rates:
        if not any(fits(pattern, name, kind) for name, kind in kinds.items()):
            raise ValueError(f'group_lr: {pattern} must be a kind of parameter '
                             f'({", ".join(sorted(set(kinds.values())))}) or a pattern that fits a name')


def fits(pattern, name, kind):
    return kind == pattern or fnmatchcase(name, pattern)


def param_groups(model, optimizer, learning_rate, muon_lr, weight_decay, rates):
    """
    {'muon': [...], 'adamw': [...]}: torch's parameter groups, each of one kind and one rate, with the names
    of its parameters. Muon takes matrices if optimizer says so; vectors do not decay; the last of the `rates`
    that fits a parameter's kind or name wins.
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


def state_of(optimizers, keep=True):
    """
    What is saved of optimizers: {'state': {parameter name: its moments, whole}, 'param_groups': their
    settings, to look at}. By name, so that another number of processes, or other groups, can go on. `keep`:
    see `whole`.
    """
    saved = []
    for opt in optimizers:
        state = {name: {key: whole(value, keep) for key, value in opt.state[p].items()}
                 for group in opt.param_groups for name, p in zip(group['names'], group['params'])
                 if p in opt.state}
        settings = [{key: value for key, value in group.items() if key != 'params'}
                    for group in opt.param_groups]
        saved.append({'state': state, 'param_groups': settings})
    return saved


def load_state(optimizers, saved):
    """Give the moments that `state_of` saved to the parameters of these names; settings stay as they are."""
    by_name = {name: state for opt in saved for name, state in opt['state'].items()}
    for opt in optimizers:
        own = opt.state_dict()
        names = [name for group in opt.param_groups for name in group['names']]
        params = [p for group in opt.param_groups for p in group['params']]
        own['state'] = {i: {key: like(value, p) for key, value in by_name[name].items()}
                        for i, (name, p) in enumerate(zip(names, params)) if name in by_name}
        opt.load_state_dict(own)


# ----------------------------------------------------------------------------------------------------------
# Shards


def is_shard(x):
    """Whether x is a DTensor, without the second and a half that importing DTensor takes."""
    return hasattr(x, 'full_tensor')


def local(x):
    """What this process holds of a tensor."""
    return x.to_local() if is_shard(x) else x.detach()


def whole(value, keep=True):
    """
    A shard's tensor in one piece, on the CPU; all else as it is. Every process must ask; those that need not
    `keep` it get None, for together they may not have the memory.
    """
    if is_shard(value):
        value = value.full_tensor()
        return value.detach().cpu() if keep else None
    return value.detach() if isinstance(value, torch.Tensor) else value


def like(value, p):
    """The shard of a whole tensor that this process holds of p; what has another shape is not of p."""
    if is_shard(p) and isinstance(value, torch.Tensor) and value.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor
        # every process has the whole: nothing is sent
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return value


# ----------------------------------------------------------------------------------------------------------
# Muon


def orthogonalize(x, steps=5):
    """
    x (K,m,n) -> about U V^T of each U S V^T, by the quintic Newton-Schulz iteration of Jordan et al. 2024
    (https://kellerjordan.github.io/posts/muon), which brings singular values to between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """
    Momentum whose matrices are made orthogonal (Jordan et al. 2024), with decoupled weight decay. The same
    update as torch.optim.Muon, but matrices of one shape share a batched product, and processes share the
    matrices: each makes some of them orthogonal and sends them to the others.

    cautious: a weight decays only where the update moves it towards zero as well (Chen et al. 2025,
    https://arxiv.org/abs/2510.12402).
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, cautious=False, compiled=False,
                 dtype=None):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay,
                                  'cautious': cautious})
        self.orthogonalize = torch.compile(orthogonalize) if compiled else orthogonalize
        # where 16 bit matrix products are several times as fast, they are exact enough
        device = self.param_groups[0]['params'][0].device.type
        short = device == 'cuda' or device == 'cpu' and torch.cpu._is_avx512_bf16_supported()
        self.dtype = dtype or (torch.bfloat16 if short else torch.float32)
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group['params']:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for same in shapes.values():
                self.update(same, group)

    def update(self, params, group):
        """One step of matrices (m,n) of one shape."""
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        momenta = [local(self.state[p]['momentum_buffer']) for p in params]
        rate = group['lr']
        if self.found_inf is not None:
            # a momentum that moves towards itself stays as it is
            grads = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, grads)]
            rate = rate * (1 - self.found_inf)
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        ahead = torch._foreach_lerp(grads, momenta, group['momentum'])
        whole = torch.stack([full_like(u, p) for u, p in zip(ahead, params)]).to(self.dtype)
        updates = self.share(whole).to(weights[0].dtype)
        updates = [local(like(u, p)) for u, p in zip(updates, params)]
        m, n = params[0].shape
        step, shrink = rate * math.sqrt(max(1, m / n)), rate * group['weight_decay']
        for w, u in zip(weights, updates):
            if group['weight_decay']:
                w.sub_(w * (u * w > 0) * shrink if group['cautious'] else w * shrink)
            w.sub_(u * step)

    def share(self, x):
        """Orthogonalize x (K,m,n), each process a part of the K."""
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


def full_like(x, p):
    """The whole tensor of which this process holds x, its shard of p's shape."""
    if not is_shard(p):
        return x
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(x, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                              stride=p.stride()).full_tensor()


# ----------------------------------------------------------------------------------------------------------
# Schedules and clipping

SCHEDULES = {
    # how much of the way down is left after a part of it
    'cosine': lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    'linear': lambda part: 1 - part,
    'wsd': lambda part: 1 - part,
    'constant': lambda part: 1.0,
}


def lr_share(step, schedule, warmup, last, end, wsd_decay):
    """
    The learning rate of a step, the first is 0, as a share of its peak: `warmup` steps up, then down to `end`
    at step `last`; with wsd only in the last `wsd_decay` (a share) of the steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, (1 - wsd_decay) * last) if schedule == 'wsd' else warmup
    part = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    return end + (1 - end) * SCHEDULES[schedule](part)


def micro_batches(step, total, warmup, world):
    """Micro-batches of a step: a straight line up to `total` in the first `warmup`, a multiple of `world`."""
    return total if step >= warmup else min(total, -(-total * (step + 1) // ((warmup + 1) * world)) * world)


def norm(tensors):
    """The norm of all of them together, a scalar tensor; every process must ask."""
    total = torch.nn.utils.get_total_norm(tensors)
    return total.full_tensor() if is_shard(total) else total


# ----------------------------------------------------------------------------------------------------------
# Averaged weights


class Average:
    """An exponential moving average of a model's weights, for evaluation and best.pt."""

    def __init__(self, model, decay):
        self.params, self.decay = dict(model.named_parameters()), decay
        self.weights = [local(p).clone() for p in self.params.values()]

    @torch.no_grad()
    def update(self, step):
        # the first steps average over few, or the initial weights would stay in for long
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.weights, [local(p) for p in self.params.values()], 1 - decay)

    @contextmanager
    def in_place(self):
        """Within it, the model has the averaged weights."""
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
        return {name: full_like(weight, p)
                for (name, p), weight in zip(self.params.items(), self.weights)}

    def load(self, state):
        for (name, p), weight in zip(self.params.items(), self.weights):
            weight.copy_(local(like(state[name], p)))
