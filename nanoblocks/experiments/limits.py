"""
How near a training step is to the matrix products that it cannot do without, and where the rest goes.

The products are those that PyTorch really runs in a step, forward and backward, caught with their shapes,
layouts and number types; their time is that of the same calls alone, into tensors that are there already.
Attention is timed alone too, forward and backward, with the arguments that each layer gave it; the products
within it count as attention.

What the operators of a step take comes from PyTorch's profiler, which slows small operators more than large
ones. A step, its products, its attention and Llama's step run in turns, so compare the numbers of one row:
two rows may have met the machine under different loads.
"""
import statistics
from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels as ops
from configurator import nearest
from model import GPT, GPTConfig
from nanoblocks.experiments.arms import flags_of_config
from nanoblocks.experiments.timing import interleaved, print_markdown, timed
from nanoblocks.experiments.topics import each, sizes
from nanoblocks.files import ROOT
from nanoblocks.hardware import synchronized_time

DTYPES = ('float32', 'bfloat16')


def limits(flags, models, tokens, rounds, device):
    """A training step over its own matrix products, for every family, and where the rest of it goes."""
    shares = []

    def times():
        for case in each(cases(flags, models, tokens, large=('gpt2', 'llama')), Case.title):
            found = measure(case, rounds, device)
            shares.append([*case.label(), *shares_row(found)])
            yield [*case.label(), *times_row(found)]
    print_markdown([*LABEL, 'parameters', 'step ms', 'products ms', 'attention ms', 'step / products',
                    '(forward + backward) / (products + attention)', "step / Llama's"], times())
    print('\nwhere the time of a step goes, by operators; attention: its fused operators alone')
    print_markdown([*LABEL, *GROUPS, 'other', 'optimizer', 'largest of the rest'], shares)


# ----------------------------------------------------------------------------------------------------------
# What is measured

LABEL = ('model', 'tokens', 'products in')


class Case(NamedTuple):
    """A model, its batch and the number type of its products."""
    name: str               # of a family, or 'as given'
    base: dict              # the flags of its size
    config: GPTConfig
    sequences: int
    dtype: str

    def label(self):
        return self.name, f'{self.sequences} x {self.config.block_size}', self.dtype

    def title(self):
        return '{}, {} tokens of width {}, {}'.format(*self.label()[:2], self.config.n_embd, self.dtype)


def families():
    """The families of config/*_small.py: llama, ..."""
    return sorted(path.stem.removesuffix('_small') for path in (ROOT / 'config').glob('*_small.py'))


def names_of(models, known):
    """The families of a setting such as --models=gpt2,llama; all of them where it is empty."""
    names = models.split(',') if models else known
    for name in names:
        if name not in known:
            remedy = nearest(name, known, remedy=f'choose from {", ".join(known)}')
            raise ValueError(f'models={models} must be families, separated by commas: {remedy}')
    return names


def cases(flags, models, tokens, large, known=None, large_dtypes=DTYPES):
    """
    The cases of a topic. Without flags: the families at the size of config/tiny.py, and those of `large` at
    that of GPT-2 124M, in large_dtypes. With flags: the families with these flags over theirs, or without
    --models the one model that the flags describe. known: the families of a topic that has not all of them.
    """
    names = names_of(models, known or families())
    if flags:
        names = names if models or known else ['as given']
        return [case_of(name, flags, tokens, 2048, dtype) for name in names for dtype in DTYPES]
    tiny = flags_of_config('tiny') | {'vocab_size': 2048}  # as many as its dataset has
    return [case_of(name, tiny, tokens, 2048, dtype) for name in names for dtype in DTYPES] + [
        case_of(name, {'block_size': 512}, tokens, 1024, dtype)
        for name in names if name in large for dtype in large_dtypes]


def case_of(name, base, tokens, default, dtype):
    """A family at a size, and the sequences that make a step of `tokens` tokens."""
    own = {} if name == 'as given' else flags_of_config(f'{name}_small')
    config = GPTConfig(**(own | base))
    count, = sizes('tokens', tokens, max(default, config.block_size))
    if count < config.block_size:
        raise ValueError(f'tokens={tokens} must be at least block_size={config.block_size}, the tokens of '
                         f'one sequence: --tokens={config.block_size}')
    return Case(name, base, config, count // config.block_size, dtype)


class Step:
    """A training step: forward, backward, clipping and AdamW."""

    def __init__(self, case, device):
        self.model, self.dtype, self.device = GPT(case.config).to(device), case.dtype, device
        shape = (2, case.sequences, case.config.block_size)
        self.x, self.y = torch.randint(case.config.vocab_size, shape, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device != 'mps')

    def passes(self):
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        with products_in(self.dtype, self.device):
            loss = self.model(self.x, self.y)[1]
        loss.backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def __call__(self):
        """-> milliseconds of forward and backward, and of the whole step"""
        began = synchronized_time(self.device)
        self.passes()
        passed = synchronized_time(self.device)
        self.update()
        return (passed - began) * 1e3, (synchronized_time(self.device) - began) * 1e3


def products_in(dtype, device):
    """The context in which matrix products are of this number type."""
    kind = device.split(':')[0]
    return nullcontext() if dtype == 'float32' else torch.autocast(kind, getattr(torch, dtype))


class Found(NamedTuple):
    """The measurements of a case, in milliseconds."""
    parameters: int
    step: float
    passes: float               # of the step, forward and backward
    products: float             # the step's matrix products alone, without those of attention
    attention: float            # forward and backward of attention alone
    llama: float                # a step of Llama's blocks at this size; nan where the model is as given
    operators: Counter          # of each operator in forward and backward


def measure(case, rounds, device):
    """All measurements of a case -> Found"""
    step = Step(case, device)
    attention = attention_runs(step)
    runs = {'step': step, 'products': timed(replay(products_of(step, attention), device), device),
            'attention': timed(lambda: [run() for run in attention], device)}
    if case.name != 'as given':
        tokens = case.sequences * case.config.block_size
        runs['llama'] = Step(case_of('llama', case.base, '', tokens, case.dtype), device)
    found = interleaved(runs, rounds, warmup=1)
    both = {name: [statistics.median(ms) for ms in zip(*found[name])] for name in ('step', 'llama')
            if name in found}
    products, attention = (statistics.median(found[name]) for name in ('products', 'attention'))
    return Found(step.model.num_params(), both['step'][1], both['step'][0], products, attention,
                 both.get('llama', [torch.nan])[-1], operators_of(step.passes, device))


# ----------------------------------------------------------------------------------------------------------
# Matrix products

aten = torch.ops.aten
PRODUCTS = {getattr(aten, name) for name in ('mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', 'baddbmm_',
                                             '_grouped_mm', 'mv', 'addmv')}


class Layout(NamedTuple):
    """A tensor without its numbers."""
    shape: tuple
    stride: tuple
    dtype: torch.dtype


class Product(NamedTuple):
    """A call of a matrix product; whole numbers, such as the rows of each expert, are kept as they are."""
    function: torch._ops.OpOverload
    args: tuple             # Layouts, and what is no tensor of floating-point numbers
    options: dict
    out: Layout

    def key(self):
        """What makes two products equal work, in whatever layout."""
        shapes = tuple((tuple(a.shape), a.dtype) for a in self.args if isinstance(a, (Layout, torch.Tensor)))
        return self.function.overloadpacket, shapes

    def flops(self):
        """Multiplications and additions, for a product of two matrices or of two batches of them."""
        *_, a, b = (a.shape for a in self.args if isinstance(a, Layout))
        return 2 * torch.Size(a).numel() * b[-1]


class Products(TorchDispatchMode):
    """Within it, all matrix products that run are kept in the list `found`."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        with self:
            # what is made of other operations, such as linear, arrives whole from within one of ours
            out = function.decompose(*args, **options)
            if out is not NotImplemented:
                return out
            if function.namespace == 'nanoblocks':
                # the products are within it, and only its kernel runs them one by one
                tensor = next(a for a in args if isinstance(a, torch.Tensor))
                device = getattr(torch._C.DispatchKey, tensor.device.type.upper())
                return function.redispatch(torch._C.DispatchKeySet(device), *args, **options)
        out = function(*args, **options)
        if function.overloadpacket in PRODUCTS:
            self.found.append(Product(function, tuple(map(layout, args)),
                                      {name: layout(a) for name, a in options.items()}, layout(out)))
        return out


def layout(a):
    """A tensor of floating-point numbers -> its Layout; anything else as it is"""
    if not isinstance(a, torch.Tensor):
        return a
    return Layout(tuple(a.shape), a.stride(), a.dtype) if a.is_floating_point() else a.clone()


def products_of(step, attention):
    """The matrix products of forward and backward, without those that attention runs by itself."""
    with Products() as all_of_them:
        step.passes()
    with Products() as within:
        for run in attention:
            run()
    counts, rest = Counter(product.key() for product in within.found), []
    for product in all_of_them.found:
        if counts[product.key()] > 0:
            counts[product.key()] -= 1
        else:
            rest.append(product)
    return rest


def replay(products, device):
    """A function that runs the same products on random matrices. Equal layouts share their memory."""
    pool, calls = {}, []

    def tensor(place, a):
        if not isinstance(a, Layout):
            return a
        if (place, a) not in pool:
            # a stride of 0 repeats a row: there are fewer numbers in memory than in the matrix
            numbers = 1 + sum((n - 1) * stride for n, stride in zip(a.shape, a.stride))
            memory = torch.randn(numbers, device=device).to(a.dtype)
            pool[place, a] = memory.as_strided(a.shape, a.stride)
        return pool[place, a]
    for function, args, options, out in products:
        args = [tensor(place, a) for place, a in enumerate(args)]
        options = {name: tensor(name, a) for name, a in options.items()}
        packet = function.overloadpacket
        if function._overloadname == 'default' and 'out' in packet.overloads():
            function, options = packet.out, options | {'out': tensor('out', out)}
        calls.append((function, args, options))

    @torch.no_grad()
    def run():
        for function, args, options in calls:
            function(*args, **options)
    return run


# ----------------------------------------------------------------------------------------------------------
# Attention


def attention_runs(step):
    """For each layer with attention, a function that runs it forward and backward, as a step would."""
    calls, attend = [], ops.attention

    def spy(q, k, v, *args, **options):
        y = attend(q, k, v, *args, **options)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        options = {name: a.detach() if isinstance(a, torch.Tensor) else a for name, a in options.items()}
        calls.append((inputs, args, options, torch.randn_like(y)))
        return y
    with mock.patch.object(ops, 'attention', spy):
        step.passes()

    def run_of(inputs, args, options, grad):
        def run():
            with products_in(step.dtype, step.device):
                y = attend(*inputs, *args, **options)
            torch.autograd.grad(y, inputs, grad)
        return run
    return [run_of(*call) for call in calls]


# ----------------------------------------------------------------------------------------------------------
# Operators

ATTENTION = [f'_scaled_dot_product_{kind}' for kind in (
    'flash_attention_for_cpu', 'flash_attention', 'efficient_attention', 'cudnn_attention')] + [
    f'_{kind}_attention' for kind in ('flash', 'efficient', 'cudnn')]
GROUPS = {
    'products': 'mm addmm addmm_ bmm baddbmm baddbmm_ _grouped_mm mv addmv'.split(),
    'attention': [name + end for name in ATTENTION for end in ('', '_forward', '_backward')],
    'casts and copies': """copy_ clone cat fill_ zero_ index index_put_ _index_put_impl_ index_select
        index_add_ index_copy_ gather scatter scatter_ scatter_add_ embedding_dense_backward constant_pad_nd
        repeat_interleave""".split(),
    'elementwise': """
        add add_ sub sub_ rsub mul mul_ div div_ neg neg_ exp exp_ log log1p sqrt rsqrt pow square
        reciprocal sin cos tanh tanh_ tanh_backward sigmoid sigmoid_ sigmoid_backward silu silu_backward
        gelu gelu_backward relu relu_ threshold_backward softplus softplus_backward addcmul addcmul_
        addcdiv lerp where masked_fill masked_fill_ clamp clamp_ clamp_min maximum minimum le lt ge gt
        eq ne bitwise_and logical_and bernoulli_ native_dropout native_dropout_backward triu tril""".split(),
    'norms and reductions': """native_layer_norm native_layer_norm_backward _fused_rms_norm
        _fused_rms_norm_backward sum mean amax max logsumexp cumsum cumprod _softmax _softmax_backward_data
        _log_softmax _log_softmax_backward_data linalg_vector_norm norm topk sort""".split(),
}


def operators_of(run, device, times=2):
    """Counter of the milliseconds that each operator takes in run(), others that it calls left out."""
    from torch.profiler import ProfilerActivity, profile
    on_gpu = device.startswith('cuda')
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        for _ in range(times):
            run()
    took = 'self_device_time_total' if on_gpu else 'self_cpu_time_total'
    return Counter({event.key.removeprefix('aten::'): getattr(event, took) / 1e3 / times
                    for event in profiler.key_averages()})


def group_of(operator):
    """The group of an operator; other for one that is in none."""
    return next((group for group, names in GROUPS.items() if operator in names), 'other')


# ----------------------------------------------------------------------------------------------------------
# Tables


def times_row(found):
    cells = [f'{found.parameters / 1e6:.2f}M', f'{found.step:.1f}', f'{found.products:.1f}',
             f'{found.attention:.1f}',
             f'{found.step / found.products:.2f}',
             f'{found.passes / (found.products + found.attention):.2f}']
    return [*cells, '-' if found.llama != found.llama else f'{found.step / found.llama:.2f}']


def shares_row(found):
    """Shares of the step. Operators share the time of forward and backward, as the profiler divides it."""
    total, passes = sum(found.operators.values()), found.passes / found.step
    share = {name: ms / total * passes for name, ms in found.operators.items()}
    groups = Counter()
    for name, part in share.items():
        groups[group_of(name)] += part
    rest = [name for name in sorted(share, key=share.get, reverse=True)
            if group_of(name) not in ('products', 'attention')]
    return [*(f'{groups[group]:.0%}' for group in (*GROUPS, 'other')), f'{1 - passes:.0%}',
            ', '.join(f'{name} {share[name]:.0%}' for name in rest[:3])]
