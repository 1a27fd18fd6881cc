"""
Every operation of kernels/ against its definition: values and all gradients, odd sizes, strides and dtypes.

A new operation needs a row in OPS and its inputs in CASES.
"""
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import types
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import float8
from kernels.attention import visible
from nanoblocks.experiments import gpu, gpu_models

BF16 = torch.bfloat16

# ----------------------------------------------------------------------------------------------------------
# Definitions, as in the papers: what float64 evaluates for the truth


def rms_norm(x, weight, eps):
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def rope(x, cos, sin):
    # pairs are complex numbers, which a complex number of length one turns
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.cat((turned.real, turned.imag), -1)


def swiglu(gate_up):
    gate, up = gate_up.split(gate_up.shape[-1] // 2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate_up):
    gate, up = gate_up.split(gate_up.shape[-1] // 2, -1)
    return gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate ** 3))) * up


def linear_cross_entropy(x, weight, targets, softcap=None):
    z = x @ weight.T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    counted = targets != -1
    nats = torch.log(torch.exp(z).sum(-1)) - z[torch.arange(len(z)), targets.clamp(min=0)]
    return (nats * counted).sum() / max(1, counted.sum())


# What PyTorch has to offer in the same dtype: the error that an operation is measured by
def plain_rms_norm(x, weight, eps):
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def plain_rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def plain_linear_cross_entropy(x, weight, targets, softcap=None):
    z = F.linear(x, weight).float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets, ignore_index=-1, reduction='sum') / max(1, (targets != -1).sum())


def grouped_linear(x, weight, bias, counts):
    rows, start = [], 0
    for e, n in enumerate(counts.tolist()):
        rows += [weight[e] @ row + (0 if bias is None else bias[e]) for row in x[start:start + n]]
        start += n
    return torch.stack(rows)


def spans(x, length, step):
    starts = range(0, x.shape[1] - length + 1, step)
    return torch.stack([torch.stack([row[t] for t in range(start, start + length)])
                        for row in x for start in starts])


def plain_grouped_linear(x, weight, bias, counts):
    rows = x.split(counts.tolist())
    return torch.cat([F.linear(r, w, None if bias is None else bias[e])
                      for e, (r, w) in enumerate(zip(rows, weight))])


def spread(x, token, place):
    return torch.stack([x[n] for n in token.tolist()])


def collect(rows, token, place):
    y = [0 * rows[0]] * len(place)
    for row, n in zip(rows, token.tolist()):
        y[n] = y[n] + row
    return torch.stack(y)


def exact_linear(x, weight, bias):
    return torch.stack([weight @ row + (0 if bias is None else bias) for row in x])


def plain_collect(rows, token, place):
    return rows.new_zeros(len(place), rows.shape[1]).index_add(0, token, rows)


def exact_linear_without_autocast(x, weight, bias):
    with torch.autocast('cpu', enabled=False):
        return F.linear(x, weight, bias)


# recurrences, whose state is an input and a result as well: test_state_space.py and test_recurrence.py; and
# the convolution of packed documents: test_documents.py
WITH_STATE = {'causal_conv', 'conv_within', 'selective_scan', 'ssd', 'recurrence'}
# made of others, and tested by themselves below
COMPOSED = {'rope_qk', 'attention', 'decode_attention', 'Pattern', 'visible'}
OPS = {
    'rms_norm': (rms_norm, plain_rms_norm),
    'rope': (rope, plain_rope),
    'swiglu': (swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    'geglu': (geglu, lambda x: F.gelu(x.chunk(2, -1)[0], approximate='tanh') * x.chunk(2, -1)[1]),
    'linear_cross_entropy': (linear_cross_entropy, plain_linear_cross_entropy),
    'grouped_linear': (grouped_linear, plain_grouped_linear),
    'spans': (spans, spans),
    'spread': (spread, lambda x, token, place: x[token]),
    'collect': (collect, plain_collect),
    'exact_linear': (exact_linear, exact_linear_without_autocast),
}

# ----------------------------------------------------------------------------------------------------------
# Inputs: float64 tensors, which are differentiated, and whatever is no float tensor


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def strided(x):
    """The same numbers in a buffer of twice the width, the last dimension not the fastest."""
    wide = torch.zeros(x.shape[-1], *x.shape[:-1], 2, dtype=x.dtype)[..., 0]
    return wide.movedim(0, -1).copy_(x)


def turned(B, T, H, D, rows):
    """x and the angles of its tokens, shared by all rows or one set for each."""
    angle = 3 * randn(*((B, T) if rows else (T,)), D // 2, seed=1)
    return randn(B, T, H, D), Wide(angle.cos(), False), Wide(angle.sin(), False)


def head(N, C, V, ignored=(), softcap=None):
    targets = randint(V, N, seed=2)
    targets[list(ignored)] = -1
    return randn(N, C), randn(V, C, seed=1), targets, softcap


def choices(N, K, E):
    """K different experts of each token, sorted by expert: the token of each row, the rows of each token."""
    expert = torch.rand(N, E, generator=torch.Generator().manual_seed(0)).topk(K).indices
    order = expert.flatten().argsort(stable=True)
    return order // K, order.argsort().view(N, K)


class Wide(NamedTuple):
    """A tensor that stays fp32 where the others are narrower."""
    tensor: torch.Tensor
    has_grad: bool


CASES = {
    'rms_norm': {
        'odd width': (randn(2, 3, 7), randn(7, seed=1), 1e-5),
        'one row': (randn(1, 33), randn(33, seed=1), 1e-5),
        'width of one': (randn(5, 1), randn(1, seed=1), 1e-2),
        'four dimensions, large eps': (randn(2, 3, 4, 5), randn(5, seed=1), 0.5),
        'far from zero': (100 + 10 * randn(3, 64), randn(64, seed=1), 1e-5),
        'tiny numbers': (1e-4 * randn(3, 10), randn(10, seed=1), 1e-5),
        'no numbers at all': (torch.zeros(2, 6, dtype=torch.float64), randn(6, seed=1), 1e-2),
        'not contiguous': (strided(randn(3, 5, 6)), strided(randn(1, 6, seed=1))[0], 1e-5),
        'a slice': (randn(3, 5, 18)[..., 6:12], randn(6, seed=1), 1e-5),
        # under autocast the activations are narrow and the parameters are not
        'weights of fp32': (randn(4, 5, 9), Wide(randn(9, seed=1), True), 1e-5),
    },
    'rope': {
        'shared angles': turned(2, 5, 3, 6, rows=False),
        'angles of each row': turned(2, 5, 3, 6, rows=True),
        'one pair': turned(1, 1, 1, 2, rows=False),
        'not contiguous': (strided(turned(2, 5, 3, 10, rows=True)[0]), *turned(2, 5, 3, 10, rows=True)[1:]),
        'transposed': (turned(2, 3, 5, 6, rows=True)[0].transpose(1, 2), *turned(2, 5, 3, 6, rows=True)[1:]),
    },
    **{name: {
        'odd width': (3 * randn(2, 3, 14),),
        'width of one': (3 * randn(4, 2),),
        'large numbers': (30 * randn(3, 12),),
        'one dimension': (randn(10),),
        'not contiguous': (strided(3 * randn(2, 3, 10)),),
    } for name in ('swiglu', 'geglu')},
    'grouped_linear': {
        'odd sizes': (randn(10, 7), randn(3, 5, 7, seed=1), randn(3, 5, seed=2), torch.tensor([4, 1, 5])),
        'no bias': (randn(10, 7), randn(3, 5, 7, seed=1), None, torch.tensor([4, 1, 5])),
        'idle experts': (randn(6, 4), randn(4, 3, 4, seed=1), randn(4, 3, seed=2),
                         torch.tensor([0, 6, 0, 0])),
        'one expert': (randn(6, 4), randn(1, 3, 4, seed=1), randn(1, 3, seed=2), torch.tensor([6])),
        'not contiguous': (strided(randn(6, 4)), strided(randn(2, 3, 4, seed=1)), None, torch.tensor([2, 4])),
    },
    'spans': {
        'each block reads the next as well': (randn(2, 6, 3, 5), 4, 2),
        'blocks that share most': (randn(2, 11, 2, 3), 5, 2),
        'blocks of one token': (randn(1, 6, 2, 3), 3, 1),
        'nothing shared': (randn(2, 4, 1, 2), 2, 2),
        'not contiguous': (strided(randn(2, 6, 3, 4)), 4, 2),
    },
    **{name: {
        'odd sizes': (randn(11 * k, 7), *choices(11, 3, 5)),
        'one choice': (randn(9, 6), *choices(9, 1, 4)),
        'one token': (randn(k, 5), *choices(1, 3, 4)),
        'not contiguous': (strided(randn(4 * k, 6)), *choices(4, 3, 3)),
    } for name, k in (('spread', 1), ('collect', 3))},
    'exact_linear': {
        'odd sizes': (randn(11, 7), randn(5, 7, seed=1), randn(5, seed=2)),
        'no bias': (randn(6, 8), randn(4, 8, seed=1), None),
        'one row': (randn(1, 8), randn(4, 8, seed=1), None),
        'not contiguous': (strided(randn(6, 5)), strided(randn(4, 5, seed=1)), None),
    },
    'linear_cross_entropy': {
        'odd sizes': head(13, 7, 19),
        'some ignored': head(11, 6, 10, ignored=(0, 4, 5, 10)),
        'all ignored': head(5, 4, 6, ignored=range(5)),
        'a whole chunk ignored': head(16, 4, 6, ignored=range(4)),
        'one row': head(1, 5, 9),
        'one token': head(4, 3, 1),
        'soft-capped': head(13, 7, 19, softcap=2.0),
        'soft-capped, some ignored': head(9, 6, 10, ignored=(2, 8), softcap=0.5),
        'large numbers': (20 * randn(5, 4), randn(7, 4, seed=1), randint(7, 5), None),
        'not contiguous': (strided(randn(9, 6)), strided(randn(8, 6, seed=1)), randint(8, 9, 3)[:, 1], None),
        'rows of a larger head': (randn(9, 6), randn(30, 6, seed=1)[:11], randint(11, 9), None),
    },
}
IN_CHUNKS = pytest.mark.parametrize('chunks', ['one chunk', 'many chunks'], indirect=True)
EVERY_CASE = pytest.mark.parametrize('op, case, chunks', [
    (op, case, chunks) for op, cases in CASES.items() for case in cases
    for chunks in ['one chunk', 'many chunks'][:1 + (op == 'linear_cross_entropy')]], indirect=['chunks'])


def test_every_operation_has_a_definition_and_cases():
    new = sorted(set(kernels.__all__) - (OPS.keys() & CASES.keys()) - WITH_STATE - COMPOSED)
    assert not new, f'kernels has {new}, which is untested: add it to OPS and CASES of tests/test_kernels.py'


@pytest.fixture
def chunks(request, monkeypatch):
    """linear_cross_entropy goes chunk by chunk, and in blocks, only where they are worth it."""
    if request.param == 'many chunks':
        module = importlib.import_module('kernels.linear_cross_entropy')
        for name, value in (('CHUNK_BYTES', 1), ('BLOCK_NUMEL', 1), ('BLOCK_ROWS', 4)):
            monkeypatch.setattr(module, name, value)


def arguments(op, case, dtype, draw=0):
    """The inputs of a case in a dtype, ready to be differentiated, strides kept. Other draws are 10 % off."""
    made = []
    for n, value in enumerate(CASES[op][case]):
        wide = isinstance(value, Wide)
        tensor = value.tensor if wide else value
        if is_float(tensor):
            drawn = tensor * (1 + 0.1 * randn(*tensor.shape, seed=100 * draw + n)) if draw else tensor
            cast = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype if not wide else
                                       torch.promote_types(dtype, torch.float32)).copy_(drawn)
            value = cast.requires_grad_(not wide or value.has_grad)
        made.append(value)
    return made


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def as_float64(args):
    """The same numbers, rounding included, in float64."""
    return [a.detach().double().requires_grad_(a.requires_grad) if is_float(a) else a for a in args]


def incoming_gradient(out):
    """Not one, and exact in every dtype."""
    return ((8 * randn(*out.shape, seed=9)).round() / 8 + 2).to(out.dtype)


def run(function, args):
    """{name: tensor} of the output and the gradients."""
    out = function(*args)
    out.backward(incoming_gradient(out))
    grads = {f'gradient of argument {n}': a.grad for n, a in enumerate(args)
             if isinstance(a, torch.Tensor) and a.requires_grad}
    assert grads and all(g is not None for g in grads.values())
    return {'output': out.detach()} | grads


def assert_follows_the_rule(function, op, case, dtype, autocast=False):
    """An error of at most twice the error of plain PyTorch in the same dtype, plus one rounding."""
    # the largest error of one small tensor is a matter of luck on either side: mean squares of some draws
    totals, draws = {}, 6
    definition, plain = OPS[op]
    for draw in range(draws):
        args = arguments(op, case, dtype, draw)
        truth = run(definition, as_float64(args))
        with torch.autocast('cpu', BF16, enabled=autocast):
            got, baseline = (run(f, arguments(op, case, dtype, draw)) for f in (function, plain))
        for name, want in truth.items():
            # under autocast a linear layer answers in bf16; a loss is fp32 always
            output = {'linear_cross_entropy': torch.float32, 'grouped_linear': BF16 if autocast else dtype}
            kind = args[int(name.split()[-1])].dtype if name != 'output' else output.get(op, dtype)
            assert got[name].shape == want.shape, f'{name}: {got[name].shape} must be {want.shape}'
            assert got[name].dtype == kind, f'{name}: {got[name].dtype} must be {kind}'
            squares = [(x.double() - want).square().mean() for x in (got[name], baseline[name])]
            totals[name] = totals.get(name, 0) + torch.stack([*squares, want.square().mean()])
    for name, total in totals.items():
        error, plain_error, size = (total / draws).sqrt().tolist()
        bound = 2 * plain_error + torch.finfo(BF16 if autocast else got[name].dtype).eps * size
        assert error <= bound, f'{name}: error {error:.2e} above {bound:.2e} (plain {plain_error:.2e})'


@EVERY_CASE
def test_values_and_gradients_in_float64(op, case, chunks):
    # two orders of the same sums: 1e-11 of the largest is far above fp64's rounding and far below fp32's
    got, truth = (run(f, arguments(op, case, torch.float64)) for f in (getattr(kernels, op), OPS[op][0]))
    for name, want in truth.items():
        assert got[name].dtype == torch.float64, f'{name} must be float64 like the input'
        error, bound = (got[name] - want).abs().max().item(), 1e-11 * want.abs().max().item() + 1e-14
        assert error <= bound, f'{name}: error {error:.3e} must be at most {bound:.3e}'


@EVERY_CASE
def test_gradients_equal_finite_differences(op, case, chunks):
    args = arguments(op, case, torch.float64)
    assert torch.autograd.gradcheck(getattr(kernels, op), args, atol=1e-6, rtol=1e-4)


@EVERY_CASE
@pytest.mark.parametrize('autocast', [False, True], ids=['plainly', 'autocast'])
@pytest.mark.parametrize('dtype', [torch.float32, BF16], ids=['fp32', 'bf16'])
def test_error_is_at_most_twice_that_of_plain_pytorch(op, case, dtype, autocast, chunks):
    assert_follows_the_rule(getattr(kernels, op), op, case, dtype, autocast)


# the plain functions beside an operation in its file
FILES = [module for name, module in sys.modules.items() if name.startswith('kernels.')]
REFERENCES = {op: getattr(file, f'{op}_reference') for op in OPS for file in FILES
              if hasattr(file, f'{op}_reference')}


@pytest.mark.parametrize('op, case', [(op, case) for op in REFERENCES for case in CASES[op]])
def test_reference_equals_the_definition(op, case):
    assert_follows_the_rule(REFERENCES[op], op, case, torch.float32)


@EVERY_CASE
def test_inputs_stay_and_backward_can_run_twice(op, case, chunks):
    args = arguments(op, case, torch.float32)
    before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    out = getattr(kernels, op)(*args)
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    incoming = incoming_gradient(out)
    kept = incoming.clone()
    first = [g.clone() for g in torch.autograd.grad(out, leaves, incoming, retain_graph=True)]
    second = torch.autograd.grad(out, leaves, incoming)
    assert all(map(torch.equal, first, second)), 'what was saved for the backward pass has changed'
    assert torch.equal(incoming, kept), 'the incoming gradient must not be written to'
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(args, before))


@EVERY_CASE
def test_no_memory_is_read_before_it_is_written(op, case, chunks):
    args = partial(arguments, op, case, torch.float32)
    want = run(getattr(kernels, op), args())
    # in this mode torch.empty is full of NaN
    torch.use_deterministic_algorithms(True)
    try:
        got = run(getattr(kernels, op), args())
    finally:
        torch.use_deterministic_algorithms(False)
    for name in want:
        assert got[name].isfinite().all(), f'{name} has numbers that nobody wrote'
        torch.testing.assert_close(got[name], want[name])


@EVERY_CASE
def test_forward_without_gradients_is_the_same(op, case, chunks):
    args = arguments(op, case, torch.float32)
    want = getattr(kernels, op)(*args)
    with torch.no_grad():
        got = getattr(kernels, op)(*args)
    assert not got.requires_grad and torch.equal(got, want)


@EVERY_CASE
def test_every_argument_may_be_the_only_one_with_a_gradient(op, case, chunks):
    want = run(getattr(kernels, op), arguments(op, case, torch.float32))
    for name in want.keys() - {'output'}:
        args, n = arguments(op, case, torch.float32), int(name.split()[-1])
        for i, a in enumerate(args):
            if is_float(a):
                a.requires_grad_(i == n)
        got = run(getattr(kernels, op), args)
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize('op, case', [(op, case) for op in CASES for case in list(CASES[op])[:2]])
def test_operation_is_part_of_one_graph(op, case):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, op), fullgraph=True, backend='eager', dynamic=False)
    want = run(getattr(kernels, op), arguments(op, case, torch.float32))
    got = run(compiled, arguments(op, case, torch.float32))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


# ----------------------------------------------------------------------------------------------------------
# What only one of them promises


def test_rope_keeps_lengths_and_undoes_itself():
    x, cos, sin = arguments('rope', 'angles of each row', torch.float32)
    y = kernels.rope(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(kernels.rope(y, cos, -sin), x)


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_loss_of_many_chunks_is_that_of_one(softcap, monkeypatch):
    x, weight, targets, _ = head(37, 8, 50, range(3, 9), softcap)

    def loss_and_gradients():
        inputs = x.float().requires_grad_(), weight.float().requires_grad_(), targets, softcap
        return run(kernels.linear_cross_entropy, inputs)
    module, calls = importlib.import_module('kernels.linear_cross_entropy'), []
    chunk, want = module._chunk, loss_and_gradients()
    monkeypatch.setattr(module, '_chunk', lambda x, *rest: calls.append(len(x)) or chunk(x, *rest))
    for size, rows in ((7400, [37]), (7399, [19, 18]), (2000, [10, 10, 10, 7]), (1, [5] * 7 + [2])):
        monkeypatch.setattr(module, 'CHUNK_BYTES', size)
        got = loss_and_gradients()
        assert calls == rows, f'CHUNK_BYTES={size}'
        calls.clear()
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@IN_CHUNKS
def test_loss_is_fp32_for_every_narrower_dtype(chunks):
    for dtype in (torch.float32, BF16, torch.float16):
        args = arguments('linear_cross_entropy', 'odd sizes', dtype)
        assert kernels.linear_cross_entropy(*args).dtype == torch.float32


@IN_CHUNKS
def test_loss_of_ignored_targets_is_zero_and_so_are_its_gradients(chunks):
    got = run(kernels.linear_cross_entropy, arguments('linear_cross_entropy', 'all ignored', torch.float32))
    assert all(not tensor.any() for tensor in got.values())


@IN_CHUNKS
def test_ignored_rows_get_no_gradient(chunks):
    got = run(kernels.linear_cross_entropy, arguments('linear_cross_entropy', 'some ignored', torch.float32))
    rows = got['gradient of argument 0'].any(-1)
    assert (~rows).nonzero().flatten().tolist() == [0, 4, 5, 10]


@IN_CHUNKS
def test_gradients_of_fp16_keep_what_is_small(chunks):
    # as in training with a scaled loss: a gradient of 1e-8 for each of many tokens is below what fp16 can say
    x, weight, targets = randn(4096, 8), randn(500, 8, seed=1), randint(500, 4096, seed=2)
    args = [x.float().requires_grad_(), weight.float().requires_grad_(), targets]
    with torch.autocast('cpu', torch.float16):
        loss = kernels.linear_cross_entropy(*args)
    (loss * 2**16).backward()
    exact = as_float64(args)
    (linear_cross_entropy(*exact) * 2**16).backward()
    for got, want in zip(args[:2], exact):
        error = (got.grad - want.grad).norm() / want.grad.norm()
        assert error < 4 * torch.finfo(torch.float16).eps, f'error {error:.2e} of the gradient'


@IN_CHUNKS
def test_gradients_of_fp16_inputs_are_divided_after_they_are_scaled(chunks):
    # weights as small as a model's: divided first, gradients would be below fp16's normal numbers
    x, weight = randn(4096, 8).half(), (0.02 * randn(500, 8, seed=1)).half()
    targets = randint(500, 4096, seed=2)
    args = [x.requires_grad_(), weight.requires_grad_(), targets]
    (kernels.linear_cross_entropy(*args) * 2**16).backward()
    exact = as_float64(args)
    (linear_cross_entropy(*exact) * 2**16).backward()
    for got, want in zip(args[:2], exact):
        error = (got.grad - want.grad).norm() / want.grad.norm()
        assert error < 4 * torch.finfo(torch.float16).eps, f'error {error:.2e} of the gradient'


@IN_CHUNKS
def test_gradients_of_the_loss_itself_add_up_over_backward_passes(chunks):
    # a gradient of one is handed on without a copy, which must not make .grad and what is kept one tensor
    args = arguments('linear_cross_entropy', 'some ignored', torch.float32)
    loss = kernels.linear_cross_entropy(*args)
    loss.backward(retain_graph=True)
    first = [a.grad.clone() for a in args[:2]]
    loss.backward(retain_graph=True)
    loss.backward()
    for a, grad in zip(args[:2], first):
        torch.testing.assert_close(a.grad, 3 * grad)


def test_logits_of_bf16_are_never_all_in_fp32(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.numel = max(self.numel, tensor.numel())
            return out
    monkeypatch.setattr(importlib.import_module('kernels.linear_cross_entropy'), 'BLOCK_NUMEL', 3 * 1000)
    args = [randn(64, 8).float().requires_grad_(), randn(1000, 8).float().requires_grad_(), randint(1000, 64)]
    with torch.autocast('cpu', BF16), Largest() as largest:
        kernels.linear_cross_entropy(*args).backward()
    assert largest.numel == 8 * 1000, 'a block of 3 rows of logits is smaller than the weights'


def test_gradient_sums_of_bf16_do_not_lose_late_chunks(monkeypatch):
    # 512 chunks of one row with nearly the same gradient: a running sum in bf16 would stop growing at 256
    module = importlib.import_module('kernels.linear_cross_entropy')
    monkeypatch.setattr(module, 'CHUNK_BYTES', 1)
    monkeypatch.setattr(module, 'MAX_CHUNKS', 512)
    x, weight = (1 + 0.1 * randn(512, 8)).to(BF16), randn(16, 8, seed=1).to(BF16).requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64)
    kernels.linear_cross_entropy(x, weight, targets).backward()
    truth = weight.detach().double().requires_grad_()
    linear_cross_entropy(x.double(), truth, targets).backward()
    error = (weight.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()
    assert error < 3 * torch.finfo(BF16).eps, f'error {error:.2e} of the largest gradient'


@pytest.mark.parametrize('dtype', [BF16, torch.float16], ids=['bf16', 'fp16'])
def test_experts_have_products_of_few_sizes(dtype, monkeypatch):
    # oneDNN builds a program for every new number of rows, in more time than the product takes
    seen, generator = set(), torch.Generator().manual_seed(0)

    def spy(name, function):
        def product(*args, **options):
            *_, a, b = args
            seen.add((name, *a.shape, *b.shape))
            return function(*args, **options)
        return product
    for name in ('mm', 'addmm'):
        monkeypatch.setattr(torch, name, spy(name, getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, '__matmul__', spy('@', torch.Tensor.__matmul__))
    weight, bias = randn(8, 5, 6).to(dtype).requires_grad_(), randn(8, 5, seed=1).to(dtype).requires_grad_()
    for step in range(40):
        expert = torch.multinomial(torch.rand(8, generator=generator) ** 3, 700, True, generator=generator)
        counts = expert.bincount(minlength=8)
        x = randn(700, 6, seed=step).to(dtype).requires_grad_()
        kernels.grouped_linear(x, weight, bias, counts).sum().backward()
    # 1, 2, 4, ..., 32 and 64, 128, ..., 704 rows, forward and in two products backward
    assert 3 < len(seen) <= 3 * (6 + 11), f'{len(seen)} different products: {sorted(seen)}'


def test_rows_of_other_experts_reach_no_result():
    # products take rows of the next experts along: theirs are large here, and would show in any number
    x, dy, counts = randn(200, 6).to(BF16), randn(200, 5, seed=2).to(BF16), torch.tensor([70, 0, 3, 127])
    x[70:], dy[70:] = 1e6 * x[70:], 1e6 * dy[70:]
    x, weight = x.requires_grad_(), randn(4, 5, 6, seed=1).to(BF16).requires_grad_()
    y = kernels.grouped_linear(x, weight, None, counts)
    y.backward(dy)
    with torch.no_grad():
        rows, w, d = x[:70].double(), weight[0].double(), dy[:70].double()
        for got, want in ((y[:70], rows @ w.T), (x.grad[:70], d @ w), (weight.grad[0], d.T @ rows)):
            conftest.assert_close(got, want, 2 * torch.finfo(BF16).eps, 'the first expert')


def in_compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend='aot_eager', dynamic=False)


@pytest.mark.parametrize('wrap', [lambda function: function, in_compiled], ids=['eager', 'compiled'])
def test_an_exact_product_is_made_in_fp32_whatever_is_set(wrap, monkeypatch):
    module, seen = importlib.import_module('kernels.exact_linear'), []
    x, weight = randn(64, 256).float().requires_grad_(), randn(256, 256, seed=1).float().requires_grad_()
    linear, function = F.linear, wrap(kernels.exact_linear)

    def spy(*args):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled('cpu')))
        return linear(*args)
    monkeypatch.setattr(module.F, 'linear', spy)
    torch.set_float32_matmul_precision('medium')    # bf16 or TF32, where a device has it
    try:
        with torch.autocast('cpu', BF16):
            y = function(x, weight)
        y.backward(incoming_gradient(y))
        assert torch.get_float32_matmul_precision() == 'medium', 'what the caller set must stay'
    finally:
        torch.set_float32_matmul_precision('highest')
    assert ('highest', False) in seen and len(set(seen)) == 1
    exact = as_float64([x, weight])
    want = run(lambda x, weight: x @ weight.T, exact)
    for got, name in zip((y, x.grad, weight.grad), want):
        conftest.assert_close(got, want[name], 2e-6, name)


# ----------------------------------------------------------------------------------------------------------
# Operations made of others


def test_rope_qk_norms_each_head_and_then_turns_it():
    (q, cos, sin), k = turned(2, 5, 4, 6, rows=True), randn(2, 5, 2, 6, seed=3)
    cos, sin, weights = cos.tensor, sin.tensor, (randn(6, seed=4), randn(6, seed=5))
    for got, x, weight in zip(kernels.rope_qk(q, k, cos, sin, *weights, 0.1), (q, k), weights):
        torch.testing.assert_close(got, rope(rms_norm(x, weight, 0.1), cos, sin))
    for got, x in zip(kernels.rope_qk(q, k, cos, sin), (q, k)):
        torch.testing.assert_close(got, rope(x, cos, sin))


def look(q, k, v, pos, key_pos, scale, window, softcap, slope, sink, chunked, alibi_bf16):
    """One query (D,) of one head on keys (S,D) and values (S,Dv), key by key."""
    weights, total = [], 0.0 if sink is None else math.exp(sink)
    for k_j, at in zip(k, key_pos):
        seen = 0 <= at <= pos
        if chunked:
            seen = seen and at // window == pos // window
        elif window is not None:
            seen = seen and at > pos - window
        s = scale * (q @ k_j).item()
        s = s if softcap is None else softcap * math.tanh(s / softcap)
        if alibi_bf16:
            s += scale * in_bf16(in_bf16(slope) * at)
        elif slope is not None:
            s -= slope * (pos - at)
        weights.append(math.exp(s) if seen else 0.0)
        total += weights[-1]
    return torch.tensor(weights, dtype=torch.float64) @ v / total


def in_bf16(number):
    return torch.tensor(number).bfloat16().item()


def by_definition(q, k, v, pos, key_pos, scale, window=None, softcap=None, slopes=None, sinks=None,
                  in_order=False, chunked=False, alibi_bf16=False):
    (B, T, H, _), group = q.shape, q.shape[2] // k.shape[2]
    pos, key_pos = pos.expand(B, T).tolist(), key_pos.expand(B, k.shape[1]).tolist()
    slopes, sinks = ([None] * H if x is None else x.tolist() for x in (slopes, sinks))
    return torch.stack([torch.stack([torch.stack([
        look(q[b, t, h], k[b, :, h // group], v[b, :, h // group], pos[b][t], key_pos[b], scale, window,
             softcap, slopes[h], sinks[h], chunked, alibi_bf16) for h in range(H)])
        for t in range(T)]) for b in range(B)])


def patterns():
    """More cases of attention; most are options that no kernel has."""
    q, pos, slopes = randn(2, 13, 4, 6), torch.arange(13), torch.tensor([0.3, 0.11, 0.7, 0.05])
    k, v, sinks = randn(2, 13, 2, 6, seed=1), randn(2, 13, 2, 6, seed=2), randn(4, seed=3)
    slots = torch.stack(((pos + 3) % 13 + 100, torch.where(pos < 4, -1, pos + 96)))
    late = q[:, :3], k, v, torch.tensor([[110, 111, 112], [106, 107, 108]]), slots, 0.5
    return {
        'window, one short of the text': (q, k, v, pos, pos, 0.5, 12, None, None, None, True),
        'window, half of the text': (q, k, v, pos, pos, 0.5, 6, None, None, None, True),
        'window, many of a text': (q, k, v, pos, pos, 0.5, 2, None, None, None, True),
        'window, all options': (q, k, v, pos, pos, 0.5, 4, 2.0, slopes, sinks, True),
        'chunks': (q, k, v, pos, pos, 0.5, 4, None, None, None, True, True),
        'chunks, two to a text': (q, k, v, pos, pos, 0.5, 8, None, None, None, True, True),
        'one chunk': (q, k, v, pos, pos, 0.5, 20, None, None, None, True, True),
        'chunks, soft-cap, sinks': (q, k, v, pos, pos, 0.5, 3, 2.0, None, sinks, True, True),
        'chunks by position': (*late, 5, None, None, None, False, True),
        'ALiBi in bf16': (q, k, v, pos, pos, 0.5, None, None, slopes, None, True, False, True),
        'ALiBi in bf16, window': (q, k, v, pos, pos, 0.5, 5, None, slopes, None, True, False, True),
        'ALiBi in bf16, all of it by position': (*late, 6, 2.0, slopes, sinks, False, False, True),
    }


ATTENTION = {name: kernels.OPS[name].cases() for name in ('attention', 'decode_attention')}
ATTENTION['patterns'] = patterns()


@pytest.mark.parametrize('kind, case', [(kind, case) for kind in ATTENTION for case in ATTENTION[kind]])
def test_attention_equals_the_sum_over_keys(kind, case):
    args = [a.detach().double() if is_float(a) else a for a in ATTENTION[kind][case]]
    want = by_definition(*args)
    for function in (kernels.attention, kernels.OPS['attention'].plain):
        torch.testing.assert_close(function(*args), want)
        # in_order promises only what the positions say already
        more = dict(zip(('chunked', 'alibi_bf16'), args[11:]))
        torch.testing.assert_close(function(*args[:10], in_order=False, **more), want)


@pytest.mark.parametrize('case', ['window, one short of the text', 'window, half of the text',
                                  'window, many of a text', 'window, all options', 'chunks',
                                  'chunks, soft-cap, sinks', 'chunks by position', 'ALiBi in bf16',
                                  'ALiBi in bf16, window'])
def test_gradients_of_attention_equal_those_of_the_definition(case):
    found = []
    for function in (kernels.attention, kernels.OPS['attention'].plain):
        args = [a.detach().clone().requires_grad_() if is_float(a) and a.dtype == torch.float64 else a
                for a in ATTENTION['patterns'][case]]
        found.append(run(function, args))
    got, want = found
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize('chunked', [False, True])
@pytest.mark.parametrize('T, window', [(257, 256), (320, 256), (512, 256), (600, 100), (2048, 256), (70, 8)])
def test_a_window_makes_fewer_scores_than_full_attention(T, window, chunked, monkeypatch):
    made = []

    def counted(q, k, v, attn_mask=None, is_causal=False, **options):
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        # PyTorch skips what lies beyond the diagonal, but for blocks of 64 queries on it
        made.append(batch * queries * (min(keys, keys / 2 + 32) if is_causal else keys))
        return q
    monkeypatch.setattr(F, 'scaled_dot_product_attention', counted)
    x, pos = torch.zeros(1, T, 1, 1), torch.arange(T)
    kernels.attention(x, x, x, pos, pos, 1.0, in_order=True)
    full = made.pop()
    kernels.attention(x, x, x, pos, pos, 1.0, window, in_order=True, chunked=chunked)
    assert sum(made) <= full
    if window >= 256 or chunked:
        # nor many more than are seen
        assert sum(made) <= 1.3 * T * window


@torch.no_grad()
@pytest.mark.parametrize('window', [None, 100])
def test_a_long_piece_behind_a_cache_skips_what_no_query_sees(window, monkeypatch):
    made, compute = [], F.scaled_dot_product_attention

    def counted(q, k, *args, **options):
        made.append(q.shape[2] * k.shape[2])
        return compute(q, k, *args, **options)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', counted)
    q, k, v = randn(2, 600, 2, 4), randn(2, 1000, 2, 4, seed=1), randn(2, 1000, 2, 4, seed=2)
    pos, key_pos = torch.arange(300, 900), torch.arange(1000)
    # one row begins with padding; and slots of any order, some empty
    padded = torch.stack((pos, torch.arange(600) - 40))
    shuffled = torch.where(key_pos < 250, -1, (key_pos + 700) % 1000)
    for at, held, share in ((pos, key_pos, 0.75), (padded, key_pos, 1), (pos, shuffled, 1)):
        made.clear()
        got = kernels.attention(q, k, v, at, held, 0.5, window)
        want = kernels.OPS['attention'].plain(q, k, v, at, held, 0.5, window)
        sees = visible(at, held, window)[:, 0].any(-1).expand(2, -1)
        torch.testing.assert_close(got[sees], want[sees])
        assert got.isfinite().all()
        assert sum(made) <= share * (600 * 1000 if window is None or share == 1 else 600 * 450)


@torch.no_grad()
def test_a_few_queries_in_16_bits_are_computed_in_32_bits_on_a_cpu():
    q, k, v = (randn(2, n, 2, 8, seed=n).bfloat16() for n in (1, 40, 41))
    v, pos = v[:, 1:], torch.tensor([39])
    got = kernels.attention(q, k, v, pos, torch.arange(40), 0.5)
    want = kernels.attention(q.float(), k.float(), v.float(), pos, torch.arange(40), 0.5)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


def test_a_newer_flash_attention_is_activated_or_refused_in_a_sentence(monkeypatch):
    for choice, device, sentence in (
            ('fa2', 'cuda', 'attention=fa2 must be one of auto, fa3, fa4'),
            ('fa3', 'cpu', 'attention=fa3 must run on a GPU and device=cpu: choose attention=auto'),
            ('fa4', 'cuda:1', 'attention=fa4 needs the package flash_attn.cute .*install it, or choose')):
        with pytest.raises(ValueError, match=sentence):
            kernels.use_attention(choice, device)
    kernels.use_attention('auto', 'cpu')
    active, registry = [], importlib.import_module('torch.nn.attention._registry')
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, 'FA3', lambda: active.append('FA3'))
    monkeypatch.setattr(torch.backends.cuda, 'enable_cudnn_sdp', lambda on: active.append(on))
    kernels.use_attention('fa3', 'cuda')
    assert active == ['FA3', False], 'the package runs only where cuDNN does not come before it'
    monkeypatch.delattr(torch.nn.attention, 'activate_flash_attention_impl')
    with pytest.raises(ValueError, match='attention=fa3 needs PyTorch 2.11 or newer'):
        kernels.use_attention('fa3', 'cuda')


# ----------------------------------------------------------------------------------------------------------
# The packages of state spaces: here modules with their functions, in their layouts and with their demands


def channels_first_scan(u, delta, A, B, C, D, return_last_state):
    """Where mamba_ssm documents selective_scan_fn: u and delta (B,I,T), B and C (B,N,T), one dtype."""
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == D.dtype == torch.float32
    assert all(v.is_contiguous() for v in (u, delta, B, C)) and return_last_state
    s, y = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[..., t, None]
        s = (step * A).exp() * s + step * u[..., t, None] * B[:, None, :, t]
        y.append((s * C[:, None, :, t]).sum(-1) + D * u[..., t])
    return torch.stack(y, -1), s


def chunked_scan(x, dt, A, B, C, chunk_size, D, initial_states, return_final_states):
    assert x.dtype == B.dtype == C.dtype and dt.dtype == A.dtype == D.dtype == torch.float32
    return kernels.OPS['ssd'].plain(x, dt, A, B, C, D, initial_states, chunk=chunk_size)


def channels_first_conv(x, weight, bias, initial_states):
    """x (B,I,T) with channels innermost, initial_states (B,I,W-1) likewise."""
    assert x.stride(1) == initial_states.stride(1) == 1 and bias.dtype == weight.dtype
    assert all(n % 8 == 0 for n in (x.shape[1], x.stride(0), x.stride(2)))
    x = torch.cat((initial_states, x), 2)
    return F.conv1d(x, weight.unsqueeze(1).to(x.dtype), bias.to(x.dtype), groups=x.shape[1])


@pytest.fixture
def packages(monkeypatch):
    calls = []

    def package(name, **functions):
        module = types.ModuleType(name)
        for key, function in functions.items():
            setattr(module, key, lambda *args, f=function, **options: calls.append(f) or f(*args, **options))
        monkeypatch.setitem(sys.modules, name, module)
    for name in ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.triton'):
        package(name)
    package('mamba_ssm.ops.selective_scan_interface', selective_scan_fn=channels_first_scan)
    package('mamba_ssm.ops.triton.ssd_combined', mamba_chunk_scan_combined=chunked_scan)
    package('causal_conv1d', causal_conv1d_fn=channels_first_conv)
    kernels.use_kernels('mamba_ssm', 'cuda')
    yield calls
    kernels.use_kernels('auto')


def packaged_cases():
    for name in ('ssd', 'selective_scan'):
        yield from ((name, case) for case in kernels.OPS[name].cases().values())
    for T, tail in ((9, None), (2, randn(2, 3, 16, seed=2)), (9, randn(2, 3, 16, seed=3))):
        yield 'causal_conv', (randn(2, T, 16), randn(16, 4, seed=1), randn(16, seed=4), tail)


def test_state_spaces_by_their_packages_are_ours(packages):
    taken = Counter()
    for name, args in packaged_cases():
        args = [v if v is None else v.detach().float().requires_grad_() for v in args]
        inputs, results, before = [v for v in args if v is not None], [], len(packages)
        for function in (getattr(kernels, name), kernels.OPS[name].plain):
            y, state = function(*args)
            loss = (y * randn(*y.shape, seed=8)).sum()
            if name != 'selective_scan':
                loss = loss + (state * randn(*state.shape, seed=9)).sum()
            results.append([y, state, *torch.autograd.grad(loss, inputs, allow_unused=True)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
        taken[name] += len(packages) > before
    assert taken['ssd'] > 3 and taken['selective_scan'] == 1 and taken['causal_conv'] == 3, taken


def test_no_gradient_of_a_state_is_lost(packages):
    case = kernels.OPS['selective_scan'].cases()['no state'][:-1]
    args = [v.detach().float().requires_grad_() for v in case]
    y, state = kernels.selective_scan(*args)
    assert packages
    with pytest.raises(RuntimeError, match='kernels=mamba_ssm has no gradient of the state'):
        (y.sum() + state.sum()).backward()


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mamba_ssm', None)
    monkeypatch.setitem(sys.modules, 'causal_conv1d', types.ModuleType('causal_conv1d'))
    with pytest.raises(ValueError, match=r'do not load: mamba_ssm \(.*\): run pip install'):
        kernels.use_kernels('mamba_ssm', 'cuda')
    with pytest.raises(ValueError, match='kernels=mamba_ssm must run on a GPU and device=cpu'):
        kernels.use_kernels('mamba_ssm', 'cpu')


# ----------------------------------------------------------------------------------------------------------
# The head in 8 bits


@pytest.fixture
def eight_bits():
    kernels.use_head_dtype('float8')
    yield
    kernels.use_head_dtype('auto')


@pytest.mark.parametrize('kind, digits, smallest', [(float8.NUMBERS, 3, -6), (float8.GRADIENTS, 2, -14)])
@pytest.mark.parametrize('size', [1e-9, 1.0, 1e9])
def test_eight_bits_keep_the_digits_of_their_format(kind, digits, smallest, size):
    v = size * randn(200, 40).exp()
    got = float8.emulated(v, kind)
    largest = torch.finfo(kind).max
    assert got.max() >= v.max() * (1 - 2.0**-digits) and (got.max() / v.max() - 1).abs() <= 2.0**-(digits + 1)
    normal = v > 4 * v.max() * 2.0**smallest / largest
    assert ((got - v).abs() / v)[normal].max() <= 2.0**-(digits + 1) and normal.sum() > 1000
    assert torch.equal(float8.emulated(torch.zeros(3), kind), torch.zeros(3))


def rounded_head(x, weight, targets):
    """Loss and gradients of x and W by their definitions; z and dx are products of rounded factors."""
    x8, weight8 = (float8.emulated(v, float8.NUMBERS) for v in (x, weight))
    z = (x8 @ weight8.T).double()
    dz = (z.softmax(-1) - F.one_hot(targets.clamp(min=0), len(weight))) * (targets >= 0).unsqueeze(1)
    dz = dz / (targets >= 0).sum()
    dx = float8.emulated(dz.float(), float8.GRADIENTS) @ weight8
    return F.cross_entropy(z, targets, ignore_index=-1), dx, dz.float().T @ x


def test_the_head_in_eight_bits_is_its_definition(eight_bits):
    x, weight = randn(70, 24).float(), randn(300, 24, seed=1).float()
    targets = torch.randint(-1, 300, (70,), generator=torch.Generator().manual_seed(2))
    x.requires_grad_(), weight.requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, targets)
    got = loss, *torch.autograd.grad(loss, (x, weight))
    want = rounded_head(x.detach(), weight.detach(), targets)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)
    exact = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    assert 1e-4 < (loss - exact).abs() < 0.1
    with torch.no_grad():  # an evaluation is not rounded
        torch.testing.assert_close(kernels.linear_cross_entropy(x, weight, targets), exact)


# ----------------------------------------------------------------------------------------------------------
# What a model gives to its kernels


def by_design(op, args):
    """Whether plain PyTorch is meant to run: a decay for each key, or a bias of the logits."""
    if op == 'recurrence':
        return args[3].shape[-1] > 1 or len(args) > 5 and args[5] is not None
    return op == 'linear_cross_entropy' and args[5] is not None


@conftest.every_family
def test_in_16_bits_a_model_leaves_no_kernel_out(flags, monkeypatch):
    """A kernel that refuses what the model gives it leaves the work to plain PyTorch, in silence."""
    refused = []

    def asked(op, ok, run):
        def call(*args, **options):
            if not ok(*args, **options) and not by_design(op, args):
                kinds = [(tuple(a.shape), a.dtype) for a in args if isinstance(a, torch.Tensor)]
                refused.append(f'{op} refuses {kinds}')
            return run(*args, **options)
        return call
    for name in set(kernels.OPS) & set(kernels.__all__) - {'attention', 'decode_attention'}:
        row = kernels.OPS[name]
        monkeypatch.setattr(kernels, name, asked(name, row.ok, row.plain))
    attention, flash = (sys.modules[f'kernels.{name}'] for name in ('attention', 'flash_attention'))
    monkeypatch.setattr(attention, 'runs_triton', lambda *_: True)
    monkeypatch.setattr(flash, 'ok', asked('attention', flash.ok, lambda *_, **__: False))
    monkeypatch.setattr(sys.modules['kernels.decode_attention'], 'ok', lambda *_, **__: False)
    model, idx = conftest.build(flags).train(), conftest.tokens(flags, 2, flags['block_size'])
    with torch.autocast('cpu', torch.bfloat16):
        model(idx, idx)
    model.to(torch.bfloat16)(idx)   # as sample.py reads a prompt
    assert not refused, '\n'.join(refused)


# ----------------------------------------------------------------------------------------------------------
# Triton: on a CPU by its interpreter, in a process of its own (tests/fused.py), and on a GPU

ROOT = Path(__file__).resolve().parents[1]
JOBS = [['check', op, case, dtype] for op, row in kernels.OPS.items() for case in row.cases()
        # products of fp32 are left to PyTorch; in the interpreter, attention and experts run them too
        for dtype in ('float16' if op in ('ssd', 'recurrence') else 'float32', 'bfloat16')]
MODELS = {
    'gemma2_small': {'attention_backward', 'gated_backward', 'rope_backward', 'decode_attention'},
    'gpt_oss_small': {'attention_backward', 'grouped_linear_fused_backward', 'linear_cross_entropy'},
    'jamba_small': {'causal_conv_backward', 'selective_scan_fused_backward', 'rms_norm_backward'},
    'deepseek_small': {'attention', 'decode_attention', 'rope_backward'},
}
OPERATORS = [['check_operators', op] for op in kernels.OPS]
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason='Triton is not installed')
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.fixture(scope='session')
def interpreted(request):
    """{job as a string: its answer} of all the jobs that this run of pytest asks for, made in one process."""
    jobs = [item.callspec.params['job'] for item in request.session.items
            if 'interpreted' in getattr(item, 'fixturenames', ())]
    run = subprocess.run([sys.executable, str(ROOT / 'tests' / 'fused.py')], input=json.dumps(jobs), cwd=ROOT,
                         capture_output=True, text=True, env=os.environ | {'TRITON_INTERPRET': '1'})
    answers = {json.dumps(job): answer for job, answer in map(json.loads, run.stdout.splitlines())}
    missing = len(jobs) - len(answers)
    assert run.returncode == 0 and not missing, f'{missing} jobs without an answer: {run.stderr[-2000:]}'
    return answers


def every_job(jobs):
    return pytest.mark.parametrize('job', jobs, ids=['-'.join(job[1:]) for job in jobs])


@needs_triton
@every_job(JOBS)
def test_kernel_errs_at_most_twice_as_much_as_plain_pytorch(job, interpreted):
    wrong = interpreted[json.dumps(job)]
    assert not wrong, '\n'.join(wrong)


@needs_triton
@every_job(OPERATORS)
def test_kernel_is_a_proper_operator_and_part_of_one_graph(job, interpreted):
    wrong = interpreted[json.dumps(job)]
    assert not wrong, '\n'.join(wrong)


@needs_triton
@every_job([['check_far_apart', op] for op in ('attention', 'decode_attention')])
def test_tokens_may_be_further_apart_than_32_bits_count(job, interpreted):
    wrong = interpreted[json.dumps(job)]
    assert not wrong, '\n'.join(wrong)


@needs_triton
@every_job([['check_wide_keys', 'recurrence']])
def test_the_kernel_takes_keys_of_unit_length_in_fp32_beside_values_of_bf16(job, interpreted):
    wrong = interpreted[json.dumps(job)]
    assert not wrong, '\n'.join(wrong)


@needs_triton
@every_job([['check_eight_bits', 'bfloat16']])
def test_the_kernel_rounds_to_eight_bits_as_plain_pytorch_does(job, interpreted):
    wrong = interpreted[json.dumps(job)]
    assert not wrong, '\n'.join(wrong)


@needs_triton
@every_job([['check_loss_scale', 'float16']])
def test_gradients_of_the_loss_kernel_keep_their_digits_under_a_loss_scale(job, interpreted):
    wrong = interpreted[json.dumps(job)]
    assert not wrong, '\n'.join(wrong)


@needs_triton
@every_job([['check_model', name] for name in MODELS])
def test_model_is_the_same_with_kernels(job, interpreted):
    wrong, called = interpreted[json.dumps(job)]
    assert not wrong, wrong
    idle = MODELS[job[1]] - set(called)
    assert not idle, f'{sorted(idle)} must run, and did not'


@needs_triton
def test_every_kernel_fits_in_registers_and_shared_memory():
    # compiled for sm_80, sm_90 and sm_100 by the assembler that comes with Triton
    run = subprocess.run([sys.executable, '-m', 'nanoblocks.experiments.aot'], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0, f'{run.stdout}\n{run.stderr[-2000:]}'
    table = run.stdout.splitlines()[1:]
    source = '\n'.join(path.read_text() for path in (ROOT / 'kernels').glob('*.py'))
    assert len({line.split()[0] for line in table}) > source.count('\n@kernel\n') / 2
    assert {line.split()[1] for line in table} == {'80', '90', '100'}


class Wanted(NamedTuple):
    """What the code of a kernel must be, compiled for sm_90."""
    programs: int = 1       # at least so many on a multiprocessor at once
    hgmma: bool = False     # products by Hopper's tensor cores, none by Ampere's
    copies: bool = False    # loads that a loop makes ahead of their use
    narrow: int = 0         # at most so many loads and stores of fewer than 4 bytes


PIPELINED = Wanted(hgmma=True, copies=True)
# at sizes of GPT-2 and of a model 4096 wide: {example: {kernel: what it must be}}
WANTED = {
    'rms_norm, 768 wide': {'forward': Wanted(12), 'backward': Wanted(4, copies=True)},
    # rows of 50257 numbers; the one narrow load is the target's logit
    'linear_cross_entropy, GPT-2 small': {'loss': Wanted(4, narrow=1)},
    'linear_cross_entropy, soft-capped': {'loss': Wanted(3, narrow=1)},
    'causal_conv, 1536 wide, 4 taps': {'forward': Wanted(4), 'backward': Wanted(4)},
    'selective_scan, 1536 channels, N = 16': {'fused': Wanted(5, copies=True),
                                              'fused_backward': Wanted(copies=True, narrow=8)},
    'ssd, 24 heads of 64, N = 128': {
        'states': Wanted(2, hgmma=True), 'state_grads': Wanted(2, hgmma=True), 'output': Wanted(hgmma=True),
        'head_grads': Wanted(hgmma=True), 'group_grads': PIPELINED},
    'recurrence, delta rule, 16 heads of 128': {
        'inverse': Wanted(2, hgmma=True), 'states': Wanted(2, hgmma=True, copies=True),
        'output': Wanted(2, hgmma=True), 'direct': Wanted(4, hgmma=True),
        'state_grads': Wanted(2, hgmma=True, copies=True), 'grads': PIPELINED},
    # two programs: one's softmax runs beside the other's products
    'attention, 32 heads of 128, 4096 tokens': {
        'forward': PIPELINED._replace(programs=2), 'key': PIPELINED, 'query': PIPELINED},
    'attention, window of 1024': {'forward': PIPELINED, 'key': PIPELINED, 'query': PIPELINED},
    'attention, soft-capped': {'forward': PIPELINED, 'key': PIPELINED, 'query': PIPELINED},
    'attention, by position, after a cache': {'forward': PIPELINED, 'key': PIPELINED, 'query': PIPELINED},
    'attention, ALiBi, 12 heads of 64': {
        'forward': PIPELINED._replace(programs=3), 'key': PIPELINED._replace(programs=2),
        'query': PIPELINED._replace(programs=3)},
    # its key kernel spills in the tiles that Hopper's products need
    'attention, window of 512, heads of 256': {'forward': PIPELINED, 'key': Wanted(copies=True),
                                               'query': PIPELINED},
    # a tile of queries has too few rows for Hopper's products
    'decode_attention, 64 x 4K tokens': {'part': Wanted(4, copies=True)},
    'decode_attention, MLA, 16 x 8K tokens': {'part': Wanted(2, copies=True)},
    'grouped_linear, 8 experts, 768 to 4096': {'rows': PIPELINED._replace(programs=2),
                                               'weight': PIPELINED._replace(programs=2)},
}


# another assembler gives other numbers of registers
needs_this_triton = pytest.mark.skipif(not kernels.HAS_TRITON or not version('triton').startswith('3.7'),
                                       reason='the table is of Triton 3.7')


@needs_this_triton
@pytest.mark.parametrize('what', WANTED)
def test_code_of_a_kernel_loads_and_multiplies_as_a_hopper_gpu_wants_it(what):
    from nanoblocks.experiments import aot, examples
    example = next(e for e in examples.EXAMPLES if f'{e.op}, {e.what}' == what)
    wrong, seen = [], set()
    for found in aot.compiled(example, 90):
        name = next((n for n in WANTED[what] if found.name.endswith(f'_{n}')), None)
        wanted = WANTED[what].get(name, Wanted())
        seen.add(name)
        wrong += [f'{found.name}: {problem}' for problem, is_so in (
            (f'{found.spilled} bytes of a thread spilled', found.spilled),
            (f'{found.programs} at once must be {wanted.programs}', found.programs < wanted.programs),
            (f'{found.narrow} narrow accesses must be {wanted.narrow}', found.narrow > wanted.narrow),
            (f'{found.hmma} HMMA and {found.hgmma} HGMMA', wanted.hgmma and (found.hmma or not found.hgmma)),
            ('no copies ahead', wanted.copies and not found.copies)) if is_so]
    assert seen >= WANTED[what].keys(), f'{WANTED[what].keys() - seen} must be launched'
    assert not wrong, '\n'.join(wrong)


# the calls that docs/kernels.md names
CALLS = ('checks,curve,optimizer', 'train,decode,kernels')


@needs_triton
@pytest.mark.parametrize('arch', [80, 90])
def test_the_widest_state_spaces_that_kernels_take_fit_in_shared_memory(arch):
    # a launch beyond it is an error on a GPU, and nothing else finds it
    from nanoblocks.experiments import aot, examples
    widest = {'ssd': examples._ssd(256, 'cpu', 1, 2, 128, 1, 256),
              'recurrence': examples._recurrence(256, 'cpu', 1, 2, 256, 256),
              'selective_scan': examples._scan(256, 'cpu', 64, 64)}
    assert not [op for op, args in widest.items() if not kernels.OPS[op].ok(*args)]
    for op, args in widest.items():
        for launch in aot.launches(lambda: examples.forward_and_backward(op, args), arch):
            made = aot.compile_for(arch, launch)
            assert made.shared <= aot.SHARED_LIMIT[arch], f'{made.name} takes {made.shared} bytes'


@needs_triton
def test_everything_that_needs_a_gpu_runs_through_at_toy_size_without_one(tmp_path):
    for parts in CALLS:
        run = subprocess.run([sys.executable, 'bench.py', 'gpu', f'--out={tmp_path}', f'--parts={parts}',
                              '--dry=True'], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        found = json.loads((tmp_path / 'gpu.json').read_text())
        assert not found['failed'] and not found['skipped']
        assert set(parts.split(',')) <= set(found)
    assert set(gpu.PARTS) <= set(found), 'a call must keep what earlier ones found'
    assert found['checks']['all']['answered'] == 1 and not found['checks']['all']['wrong']
    assert not [row for rows in found['kernels'].values() for row in rows.values() if 'error' in row]


def test_both_calls_take_what_is_telling_first(tmp_path):
    rows = list(gpu.items(gpu.Measurement(tmp_path, 510, dry=False)))
    assert sorted(','.join(CALLS).split(',')) == sorted(gpu.PARTS)
    first = [f'{part}: {name}' for part, name, *_ in rows[:14]]
    for words in (['as nanoGPT'], ['gpt2_small', 'batch=32, bias=False'], ['vocab_size=50257'], ['batch=64'],
                  ['mamba2_small', 'kernels=triton'], ['mixtral_small']):
        assert any(all(word in name for word in words) for name in first), words


def test_processes_of_a_crew_prepare_and_one_after_another_measures(tmp_path, monkeypatch):
    # on a GPU the halves of an item run in other processes; here in threads, with a pipe each as well
    import threading
    order = []

    def halves(name):
        order.append(f'{name} prepared')
        if name == 'wrong':
            raise ArithmeticError('the reason')
        yield
        order.append(f'{name} measured')
        yield {'ms': len(order)}
    monkeypatch.setattr(gpu, 'items', lambda m: (('train', name, lambda: halves(name), 0)
                                                 for name in ('a', 'wrong', 'b')))

    class Thread(threading.Thread):
        def kill(self):
            pass
    monkeypatch.setattr(gpu.multiprocessing, 'get_context', lambda how: types.SimpleNamespace(
        Pipe=multiprocessing.Pipe, Process=Thread))
    m = gpu.Measurement(tmp_path, 60, True, ['train'])
    gpu.Crew(m, ['train'], processes=2).measure()
    assert m.found['train'] == {'a': {'ms': 4}, 'b': {'ms': 5}} and not m.found['skipped']
    assert list(m.found['failed']) == ['train: wrong'] and 'the reason' in m.found['failed']['train: wrong']
    assert sorted(order[:3]) == ['a prepared', 'b prepared', 'wrong prepared']


def test_results_of_an_earlier_call_stay_unless_measured_again_or_elsewhere(tmp_path, monkeypatch):
    first = gpu.Measurement(tmp_path, 60, True, ['train', 'curve'])
    first.item('machine', 'environment', lambda: gpu.environment(first), 0)
    first.item('train', 'old', lambda: 1, 0)
    first.item('curve', 'old', lambda: 1, 0)
    first.item('train', 'broken', lambda: 1 / 0, 0)
    first.item('curve', 'long', lambda: 1, 100)
    first.write()
    second = gpu.Measurement(tmp_path, 60, True, ['train'])
    assert second.found == {'curve': {'old': 1}, 'skipped': ['curve: long'], 'failed': {}}
    monkeypatch.setattr(gpu, 'environment', lambda m: {'torch': 'another'})
    elsewhere = gpu.Measurement(tmp_path, 60, True, ['train'])
    assert elsewhere.found == {'skipped': [], 'failed': {}}


def test_a_model_whose_compiled_gradients_are_wrong_is_not_timed(tmp_path, monkeypatch):
    row = gpu_models.Row('llama_small', 2)
    m = gpu.Measurement(tmp_path, 60, True)
    monkeypatch.setattr(m, 'time', lambda run: pytest.fail('timed'))

    def detached(x, weight, eps):
        # what torch 2.11 made of a forward pass that returned what it was given
        y = rms_norm(x, weight, eps)
        return y.detach().requires_grad_() if torch.compiler.is_compiling() else y
    m.item('train', row.name(), lambda: gpu.at_once(gpu_models.train(m, row)), 0)
    assert m.found['train'][row.name()]['tokens_per_s'] > 0 and not m.found['failed']
    monkeypatch.setattr(kernels, 'rms_norm', detached)
    m.item('train', 'wrong', lambda: gpu.at_once(gpu_models.train(m, row)), 0)
    assert 'wrong' not in m.found['train']
    assert 'compiled gradients differ from eager ones: wte.weight: error' in m.found['failed']['train: wrong']


def test_grouped_products_of_pytorch_serve_hopper_alone(monkeypatch):
    # on Blackwell they leave gradients of idle experts unwritten
    from torch._subclasses import FakeTensorMode
    module = importlib.import_module('kernels.grouped_linear')
    chosen = {}
    with FakeTensorMode():
        x, weight = (torch.empty(*shape, device='cuda', dtype=BF16) for shape in ((8, 24), (2, 16, 24)))
        for arch in (80, 90, 100, 120):
            monkeypatch.setattr(module, 'capability', lambda x, arch=arch: arch)
            chosen[arch] = module._library(x, weight)
    assert chosen == {80: False, 90: True, 100: False, 120: False}
    widths = [case[1].shape[1:] for case in module.cases().values() if 0 in case[3]]
    assert any(n_out % 8 == n_in % 8 == 0 for n_out, n_in in widths), 'idle experts of aligned widths'


@pytest.mark.gpu
@on_gpu
@every_job(JOBS)
def test_kernel_on_a_gpu_errs_at_most_twice_as_much_as_plain_pytorch(job):
    import fused
    _, op, case, dtype = job
    if dtype == 'float32' and op in ('attention', 'decode_attention', 'grouped_linear'):
        dtype = 'float16'
    wrong = fused.check(op, case, dtype, 'cuda')
    assert not wrong, '\n'.join(wrong)


# ----------------------------------------------------------------------------------------------------------
# Which of the two runs


def test_choices_that_cannot_be_are_refused():
    for choice, device, words in (('fast', 'cuda', 'must be one of'), ('triton', 'cpu', 'Triton|GPU')):
        with pytest.raises(ValueError, match=words):
            kernels.use_kernels(choice, device)
    assert kernels.common.backend == 'auto', 'what is refused must change nothing'


def test_importing_the_operations_does_not_import_triton():
    code = 'import sys, kernels; sys.exit("triton" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize('op, change, words', [
    ('rms_norm', lambda x, w, eps: (x, w[:-1], eps), r'weight of shape \(6,\) must be \(C=7\)'),
    ('linear_cross_entropy', lambda x, w, t, cap: (x, w, t[:-1], cap), 'targets of shape .* must be'),
    ('linear_cross_entropy', lambda x, w, t, cap: (x, w, t.double(), cap), 'must be of integers'),
    ('causal_conv', lambda x, w, b, tail: (x, w, b, tail[:, 1:]), 'tail of shape'),
    ('attention', lambda q, k, *rest: (q[:, :, :3], k, *rest), '3 query heads must be a multiple of the 2'),
    ('selective_scan', lambda x, dt, *rest: (x, dt[:, :-1], *rest), 'dt of shape'),
    ('ssd', lambda x, dt, A, *rest: (x, dt, A[:-1], *rest), 'A of shape'),
    ('recurrence', lambda q, k, v, g, *rest: (q, k, v, g[:, 1:], *rest), 'g of shape'),
])
def test_arguments_that_do_not_fit_are_refused_before_any_launch(op, change, words):
    args = next(iter(kernels.OPS[op].cases().values()))
    args = [a.float() if is_float(a) else a for a in args]
    with pytest.raises(ValueError, match=words):
        kernels.OPS[op].fused(*change(*args))
