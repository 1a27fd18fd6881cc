"""
State spaces: the ops against the recurrence they stand for, the mixers against themselves in pieces and
padded, and against transformers.
"""
import importlib
import inspect
import random
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.causal_conv import causal_conv, causal_conv_reference
from kernels.selective_scan import selective_scan, selective_scan_reference
from kernels.ssd import segment_decay, ssd, ssd_reference
from model import SSM, Context, GPTConfig, Linear, StateCache

# the package exports the function under the module's name
scan_file = importlib.import_module('kernels.selective_scan')
EXACT = 1e-12  # of the largest number, in fp64


def assert_close(got, want, bound, what):
    """As the others do; and the tail of a convolution with one tap is empty."""
    assert got.shape == want.shape, f'{what}: shape {tuple(got.shape)} must be {tuple(want.shape)}'
    if want.numel():
        conftest.assert_close(got, want, bound, what)


# ----------------------------------------------------------------------------------------------------------
# The ops, as one table: (op, its definition, its arguments at B, T)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def conv_args(B, T, I=5, W=4):
    return dict(x=rand(B, T, I), weight=rand(I, W), bias=rand(I, seed=1), tail=rand(B, W - 1, I))


def scan_args(B, T, I=6, N=4):
    return dict(x=rand(B, T, I), dt=rand(B, T, I, seed=1).exp(), A=-rand(I, N).exp(), B=rand(B, T, N),
                C=rand(B, T, N, seed=1), D=rand(I), state=rand(B, I, N))


def ssd_args(B, T, H=4, P=3, G=2, N=5):
    return dict(x=rand(B, T, H, P), dt=rand(B, T, H).exp(), A=-rand(H).exp(), B=rand(B, T, G, N),
                C=rand(B, T, G, N, seed=1), D=rand(H, seed=1), state=rand(B, H, P, N))


def ssd_in_chunks(chunk):
    def op(**args):
        return ssd(**args, chunk=chunk)
    return op


OPS = {
    'causal_conv': (causal_conv, causal_conv_reference, conv_args),
    'causal_conv_one_tap': (causal_conv, causal_conv_reference, lambda B, T: conv_args(B, T, W=1)),
    'selective_scan': (selective_scan, selective_scan_reference, scan_args),
    'ssd': (ssd, ssd_reference, ssd_args),
    'ssd_chunk_1': (ssd_in_chunks(1), ssd_reference, ssd_args),
    'ssd_chunk_7': (ssd_in_chunks(7), ssd_reference, ssd_args),
    'ssd_chunk_16': (ssd_in_chunks(16), ssd_reference, lambda B, T: ssd_args(B, T, G=1)),
}
# what depends on the token, and what carries a sequence over from one piece to the next
OVER_TIME, CARRIED = ('x', 'dt', 'B', 'C'), ('tail', 'state')
every_op = pytest.mark.parametrize('name', OPS)


def pieces(args, bounds):
    """The arguments of each piece of the sequence, without what is carried."""
    for start, end in zip(bounds, bounds[1:]):
        yield {k: v[:, start:end] if k in OVER_TIME else v for k, v in args.items() if k not in CARRIED}


def gradients(op, args, weights):
    args = {k: v.detach().clone().requires_grad_() for k, v in args.items()}
    outputs = op(**args)
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights) if w is not None)
    return outputs, dict(zip(args, torch.autograd.grad(loss, list(args.values()), allow_unused=True)))


@every_op
@pytest.mark.parametrize('T', [1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize('fresh', [False, True], ids=['carried', 'fresh'])
def test_op_equals_its_recurrence(name, T, fresh):
    op, reference, make = OPS[name]
    args = {k: v for k, v in make(3, T).items() if not (fresh and k in CARRIED)}
    weights = [rand(*o.shape, seed=7) for o in reference(**args)]
    got, got_grads = gradients(op, args, weights)
    want, want_grads = gradients(reference, args, weights)
    for i, what in enumerate(('y', 'state')):
        assert_close(got[i], want[i], EXACT, what)
    for k in args:
        assert_close(got_grads[k], want_grads[k], EXACT, f'gradient of {k}')


@every_op
@pytest.mark.parametrize('only', [0, 1], ids=['y', 'state'])
def test_gradients_when_the_loss_sees_one_output(name, only):
    op, reference, make = OPS[name]
    args = make(2, 20)
    weights = [rand(*o.shape, seed=7) if i == only else None for i, o in enumerate(reference(**args))]
    got, want = gradients(op, args, weights)[1], gradients(reference, args, weights)[1]
    for k in args:
        g, w = (torch.zeros_like(args[k]) if grads[k] is None else grads[k] for grads in (got, want))
        assert_close(g, w, EXACT, f'gradient of {k}')


@every_op
@pytest.mark.parametrize('seed', range(4))
def test_pieces_equal_the_whole(name, seed):
    op, _, make = OPS[name]
    args, T = make(2, 70), 70
    cuts = sorted(random.Random(seed).sample(range(1, T), 5))
    want, want_state = op(**args)
    carried, = (k for k in CARRIED if k in args)
    state, got = args[carried], []
    for piece in pieces(args, [0, *cuts, T]):
        y, state = op(**piece, **{carried: state})
        got.append(y)
    assert_close(torch.cat(got, dim=1), want, EXACT, f'y in pieces at {cuts}')
    assert_close(state, want_state, EXACT, f'state in pieces at {cuts}')


@every_op
def test_op_is_causal(name):
    op, _, make = OPS[name]
    args, t = make(2, 40), 23
    before = op(**args)[0][:, :t]
    later = {k: v.clone() for k, v in args.items()}
    for k in OVER_TIME:
        if k in later:
            later[k][:, t:] = rand(*later[k][:, t:].shape, seed=9).abs()
    y = op(**later)[0]
    assert_close(y[:, :t], before, EXACT, 'y of tokens that come before the change')
    assert not torch.allclose(y[:, t], op(**args)[0][:, t]), 'the token that changed must change its y'


def test_causal_conv_is_conv1d():
    args = conv_args(2, 9)
    x = torch.cat((args['tail'], args['x']), dim=1).mT
    want = F.conv1d(x, args['weight'].unsqueeze(1), args['bias'], groups=x.shape[1]).mT
    assert_close(causal_conv(**args)[0], want, EXACT, 'y')
    assert_close(causal_conv(**(args | dict(bias=None)))[0], want - args['bias'], EXACT, 'y without bias')


@pytest.mark.parametrize('name', [name for name in OPS if not name.startswith('causal_conv')])
def test_a_step_of_size_zero_leaves_the_state(name):
    op, _, make = OPS[name]
    args = make(2, 30)
    args['dt'][:, 9:] = 0
    first, = pieces(args, [0, 9])
    assert_close(op(**args)[1], op(**first, state=args['state'])[1], EXACT, 'state')


@every_op
def test_op_reads_any_strides_and_writes_no_input(name):
    op, _, make = OPS[name]
    args = make(3, 20)
    want = op(**args)
    strided = {k: torch.stack((v, v + 1), dim=-1)[..., 0] for k, v in args.items()}
    kept = {k: v.clone() for k, v in strided.items()}
    weights = [rand(*o.shape, seed=7).mT.contiguous().mT for o in want]
    got, grads = gradients(op, strided, weights)
    for i, what in enumerate(('y', 'state')):
        assert_close(got[i], want[i], EXACT, what)
    for k, g in gradients(op, args, weights)[1].items():
        assert_close(grads[k], g, EXACT, f'gradient of {k}')
        assert torch.equal(strided[k], kept[k]), f'{k} must not be written into'


@every_op
def test_op_writes_all_of_what_it_allocates(name):
    """Fresh memory is filled with NaN, so that what is read before it is written shows."""
    op, _, make = OPS[name]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        args = make(2, 21)
        outputs, grads = gradients(op, args, [rand(*o.shape) for o in op(**args)])
    finally:
        torch.use_deterministic_algorithms(False)
    for what, tensor in ({'y': outputs[0], 'state': outputs[1]} | grads).items():
        assert tensor.isfinite().all(), f'{what} must be finite'


@every_op
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_sums_are_fp32(name, dtype):
    """Against the truth in fp64, from the same rounded inputs: rounded once, with fp32 on the way."""
    op, reference, make = OPS[name]
    # parameters and step sizes stay fp32, as autocast leaves them
    args = {k: v.to(dtype if k in OVER_TIME and k != 'dt' else torch.float32) for k, v in make(2, 50).items()}
    exact = {k: v.double() for k, v in args.items()}
    weights = [rand(*o.shape, seed=7) for o in reference(**exact)]
    got, got_grads = gradients(op, args, weights)
    want, want_grads = gradients(reference, exact, weights)
    rounding = torch.finfo(dtype).eps
    assert_close(got[0], want[0], 2 * rounding + 1e-5, 'y')
    assert got[0].dtype == dtype, 'y comes in the dtype of x'
    if 'state' in args:
        assert_close(got[1], want[1], 1e-5, 'state')
        assert got[1].dtype == torch.float32, 'the state is fp32'
    for k, v in args.items():
        # y is rounded before the loss, so its rounding does not come back; each gradient is rounded once
        assert_close(got_grads[k], want_grads[k], 2 * rounding + 1e-5, f'gradient of {k}')
        assert got_grads[k].dtype == v.dtype, f'the gradient of {k} comes in its dtype'


@every_op
@pytest.mark.parametrize('T', [1, 20])
def test_autocast_does_not_reach_inside(name, T):
    op, _, make = OPS[name]

    def autocast_op(**args):
        with torch.autocast('cpu', torch.bfloat16):
            return op(**args)

    args = {k: v.float() for k, v in make(2, T).items()}
    weights = [rand(*o.shape, seed=7) for o in op(**args)]
    want, want_grads = gradients(op, args, weights)
    got, got_grads = gradients(autocast_op, args, weights)
    for g, w in zip(got, want):
        assert torch.equal(g, w), 'outputs must not depend on autocast'
    for k in args:
        assert torch.equal(got_grads[k], want_grads[k]), f'the gradient of {k} must not depend on autocast'


def test_segment_decay_survives_a_token_that_forgets_all():
    """After a step of -2000 a running sum is rounded to 1e-4: those behind it must not notice."""
    log_decay = -0.01 * rand(1, 40).abs()
    log_decay[0, 5] = -2000.0
    L = log_decay.shape[-1]
    want = torch.zeros(1, L, L, dtype=torch.float64)
    for i in range(L):
        for j in range(i + 1):
            want[0, i, j] = log_decay[0, j + 1:i + 1].sum().exp()
    assert_close(segment_decay(log_decay.float()), want, 1e-6, 'decay')
    assert segment_decay(log_decay.float()).triu(1).eq(0).all(), 'nothing flows backward in time'


def test_gradients_of_ssd_survive_a_token_that_forgets_all():
    """Its own is zero. Differences of sums, which are not, would give it their rounding times its step."""
    args = {k: v.detach() for k, v in OPS['ssd'][2](2, 50).items()}
    args['dt'][0, 20] = 3000.0
    weights = [rand(*o.shape, seed=7) for o in ssd_reference(**args)]
    _, want = gradients(ssd_reference, args, weights)
    _, got = gradients(ssd, {k: v.float() for k, v in args.items()}, weights)
    for k in args:
        assert_close(got[k], want[k], 2e-6, f'gradient of {k}')


class Operations(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_compiler_sees_one_operation_however_long_the_scan():
    counts = []
    for T in (20, 200):
        args = scan_args(1, T)
        with Operations() as operations:
            selective_scan(**args)
        counts.append(operations.count)
    assert counts == [1, 1], f'operations of T=20 and T=200: {counts}'


def test_selective_scan_passes_opcheck():
    args = [v.requires_grad_() for v in scan_args(2, 20).values()]
    torch.library.opcheck(scan_file._scan, args)
    y, state, starts = scan_file._scan(*args)
    backward = [torch.ones_like(y), torch.ones_like(state), *args[:-1], starts]
    torch.library.opcheck(scan_file._scan_backward, [v.detach() for v in backward])


def peak_bytes(run):
    """By how much the memory of this process grows while run() runs."""
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts at what is used now

    def status(name):
        return int(re.search(rf'{name}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    before = status('VmRSS')
    run()
    return status('VmHWM') - before


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='measures memory as Linux reports it')
def test_selective_scan_never_holds_all_states():
    B, T, I, N = 1, 4096, 256, 16
    args = {k: v.float().requires_grad_() for k, v in scan_args(B, T, I, N).items()}
    all_states, inputs = 4 * B * T * I * N, sum(v.nbytes for v in args.values())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.nbytes) or v, lambda v: v):
        peak = peak_bytes(lambda: selective_scan(**args)[0].sum().backward())
    assert sum(saved) <= inputs + all_states / scan_file.CHUNK, 'saved are the inputs and one state per chunk'
    # output, gradients and states of chunks come to some times the inputs
    assert peak < all_states / 2, f'{peak} bytes at once, all states take {all_states}'


# ----------------------------------------------------------------------------------------------------------
# The mixers


def config(kind, **flags):
    """What a mixer reads of GPTConfig, at toy size."""
    defaults = dict(
        n_embd=16, n_layer=2, bias=False, norm_eps=1e-5, zero_init=False, ssm_state=6, ssm_expand=2,
        ssm_conv=4, ssm_head_dim=8, ssm_groups=1, ssm_dt_rank=3, ssm_norm=False,
        ssm_dt_min=0.0, ssm_dt_max=None, conv_bias=True, ssm_width=None, ssm_gate_norm=True, ssm_eps=1e-5)
    flags = defaults | flags
    return SimpleNamespace(**({'ssm_bias': flags['bias']} | flags))


def drawn(kind, seed=0, **flags):
    """A mixer as GPT.init_weights draws it."""
    mixer, generator = SSM[kind](config(kind, **flags)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(p.init(p.shape, generator))
    return mixer


def loud(kind, **flags):
    """A mixer in fp64 whose every weight matters: large and irregular, so that faults stand out."""
    mixer = drawn(kind, **flags).double()
    with torch.no_grad():
        for i, p in enumerate(mixer.parameters()):
            p.add_(0.3 * rand(*p.shape, seed=i))
    return mixer


def context(pos, causal=False):
    return Context(pos, causal, None)


def whole(T):
    return context(torch.arange(T), causal=True)


VARIANTS = {
    'mamba1': ('mamba1', {}),
    'jamba': ('mamba1', dict(ssm_norm=True, bias=True)),
    'mamba1_one_tap': ('mamba1', dict(ssm_conv=1)),
    'mamba2': ('mamba2', {}),
    'mamba2_groups': ('mamba2', dict(ssm_groups=2, bias=True, ssm_conv=2)),
}
every_mixer = pytest.mark.parametrize('kind, flags', VARIANTS.values(), ids=VARIANTS)


@every_mixer
def test_mixer_is_causal_and_trains_every_parameter(kind, flags):
    mixer, x, t = loud(kind, **flags), rand(2, 30, 16).requires_grad_(), 17
    y = mixer(x, whole(30))
    assert y.shape == x.shape
    reach, = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
    assert reach[:, t + 1:].eq(0).all(), 'no token sees a later one'
    assert reach[:, :t + 1].ne(0).all(), 'every token is seen by a later one'
    (y * rand(*y.shape)).sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.ne(0).any(), f'{name} must get a gradient'


@every_mixer
@pytest.mark.parametrize('cuts', [[], [1], [29], list(range(1, 30)), [7, 8, 20], [2, 4, 6]], ids=str)
def test_cached_pieces_equal_the_whole(kind, flags, cuts):
    mixer, x = loud(kind, **flags), rand(2, 30, 16)
    want = mixer(x, whole(30))
    cache, got = mixer.new_cache(2, 30, torch.float64, 'cpu'), []
    for start, end in zip([0, *cuts], [*cuts, 30]):
        # the caller says "causal" for the first piece only, and for that only when it is no single token
        ctx = context(torch.arange(start, end), causal=start == 0 and end > 1)
        got.append(mixer(x[:, start:end], ctx, cache))
    assert_close(torch.cat(got, dim=1), want, EXACT, 'y')


@every_mixer
def test_left_padding_is_as_if_it_were_not_there(kind, flags):
    """Rows of 9, 3 and 1 tokens, padded to 12; without a cache, and with one, left as by the row alone."""
    mixer, T, lengths = loud(kind, **flags), 12, (9, 3, 1)
    x = rand(3, T, 16)
    pos = torch.arange(T) - T + torch.tensor(lengths).unsqueeze(1)
    cache = mixer.new_cache(3, T, torch.float64, 'cpu')
    for y in (mixer(x, context(pos)), mixer(x, context(pos), cache)):
        for row, n in enumerate(lengths):
            alone = mixer.new_cache(1, T, torch.float64, 'cpu')
            want = mixer(x[row:row + 1, -n:], whole(n), alone)
            assert_close(y[row:row + 1, -n:], want, EXACT, f'y of row {row}')
    for row, n in enumerate(lengths):
        alone = mixer.new_cache(1, T, torch.float64, 'cpu')
        mixer(x[row:row + 1, -n:], whole(n), alone)
        assert_close(cache.tail[row:row + 1], alone.tail, EXACT, f'tail of row {row}')
        assert_close(cache.state[row:row + 1], alone.state, EXACT, f'state of row {row}')


@every_mixer
@pytest.mark.parametrize('T', [1, 2, 8])
def test_padding_between_pieces_is_as_if_it_were_not_there(kind, flags, T):
    """A second piece of which the rows hold T, 1 and 0 tokens, behind a cache that holds 5."""
    mixer, lengths = loud(kind, **flags), (T, 1, 0)
    first, x = rand(3, 5, 16), rand(3, T, 16, seed=1)
    pos = torch.arange(T) - T + torch.tensor(lengths).unsqueeze(1)
    pos = torch.where(pos < 0, pos, pos + 5)
    cache = mixer.new_cache(3, 0, torch.float64, 'cpu')
    mixer(first, whole(5), cache)
    y = mixer(x, context(pos), cache)
    for row, n in enumerate(lengths):
        alone = mixer.new_cache(1, 0, torch.float64, 'cpu')
        real = torch.cat((first[row:row + 1], x[row:row + 1, T - n:]), dim=1)
        want = mixer(real, whole(5 + n), alone)
        assert_close(y[row, T - n:], want[0, 5:], EXACT, f'y of row {row}') if n else None
        assert_close(cache.tail[row:row + 1], alone.tail, EXACT, f'tail of row {row}')
        assert_close(cache.state[row:row + 1], alone.state, EXACT, f'state of row {row}')


@every_mixer
def test_gradients_do_not_see_padding(kind, flags):
    mixer, x = loud(kind, **flags), rand(1, 9, 16)
    pos = torch.arange(12) - 3
    padded = torch.cat((rand(1, 3, 16, seed=3), x), dim=1)
    weights = rand(1, 9, 16, seed=4)
    want = torch.autograd.grad((mixer(x, whole(9)) * weights).sum(), list(mixer.parameters()))
    got = torch.autograd.grad((mixer(padded, context(pos))[:, 3:] * weights).sum(), list(mixer.parameters()))
    for (name, _), g, w in zip(mixer.named_parameters(), got, want):
        assert_close(g, w, EXACT, f'gradient of {name}')


@every_mixer
def test_prefill_is_the_training_path(kind, flags):
    """Bit for bit, and with gradients."""
    mixer, x = loud(kind, **flags), rand(2, 9, 16)
    y = mixer(x, whole(9), mixer.new_cache(2, 9, torch.float64, 'cpu'))
    assert torch.equal(y, mixer(x, whole(9)))
    y.sum().backward()


@every_mixer
def test_state_cache_is_what_it_says(kind, flags):
    mixer = drawn(kind, **flags)
    for dtype, state_size in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8), (torch.int8, 4)):
        caches = [mixer.new_cache(3, slots, dtype, place) for slots in (1, 1000) for place in ('cpu', 'meta')]
        W, tail, inner = flags.get('ssm_conv', 4), caches[0].tail, 32
        channels = inner if kind == 'mamba1' else inner + 2 * flags.get('ssm_groups', 1) * 6
        want = 3 * ((W - 1) * channels * tail.element_size() + inner * 6 * state_size)
        assert tail.dtype == dtype
        assert [cache.nbytes() for cache in caches] == [want] * 4, f'bytes in {dtype}'


@every_mixer
def test_state_cache_reset_and_expand(kind, flags):
    mixer, x = loud(kind, **flags), rand(2, 12, 16)
    cache = mixer.new_cache(2, 12, torch.float64, 'cpu')
    assert cache.empty
    want = mixer(x[:, :9], whole(9), cache)
    assert not cache.empty
    cache.reset()
    assert cache.empty and cache.tail.eq(0).all() and cache.state.eq(0).all()
    assert torch.equal(mixer(x[:, :9], whole(9), cache), want), 'a cache that was reset must be as new'
    one = cache.nbytes()
    cache.expand(3)
    assert cache.nbytes() == 3 * one
    rest = x[:, 9:].repeat_interleave(3, 0)
    got = mixer(rest, context(torch.arange(9, 12)), cache)
    want = mixer(x, whole(12))[:, 9:].repeat_interleave(3, 0)
    assert_close(got, want, EXACT, 'y of three continuations a row')


def test_state_cache_keeps_its_memory_and_no_graph():
    mixer, x = loud('mamba1'), rand(2, 5, 16)
    cache = mixer.new_cache(2, 0, torch.float64, 'cpu')
    places = cache.tail.data_ptr(), cache.state.data_ptr()
    for t in range(5):
        mixer(x[:, t:t + 1], context(torch.tensor([t])), cache)
    after = cache.tail.data_ptr(), cache.state.data_ptr()
    assert after == places, 'a captured graph relies on the addresses'
    assert not cache.state.requires_grad and not cache.tail.requires_grad


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@every_mixer
def test_mixer_in_low_precision(kind, flags, dtype):
    """Under autocast and with all weights in dtype: near the truth in fp64, with a state in fp32."""
    exact, x = loud(kind, **flags), rand(2, 40, 16)
    want = exact(x, whole(40))
    autocast, pure = loud(kind, **flags).float(), loud(kind, **flags).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.06
    for mixer, inputs in ((autocast, x.float()), (pure, x.to(dtype))):
        cache = mixer.new_cache(2, 0, dtype, 'cpu')
        with torch.autocast('cpu', dtype, enabled=mixer is autocast and dtype != torch.float32):
            y = mixer(inputs, whole(40), cache)
        assert_close(y, want, bound, f'y, {"autocast" if mixer is autocast else "weights"} {dtype}')
        assert cache.state.dtype == torch.float32


@every_mixer
def test_mixer_compiles_to_one_graph(kind, flags):
    mixer, x = loud(kind, **flags), rand(2, 20, 16).requires_grad_()
    for ctx in (whole(20), context(torch.arange(20) - torch.tensor([[0], [4]]))):
        torch._dynamo.reset()
        compiled = torch.compile(mixer, fullgraph=True, backend='aot_eager')
        want, got = mixer(x, ctx), compiled(x, ctx)
        assert_close(got, want, EXACT, 'y')
        weights = [x, *mixer.parameters()]
        for g, w in zip(torch.autograd.grad(got.sum(), weights), torch.autograd.grad(want.sum(), weights)):
            assert_close(g, w, EXACT, 'gradient')
    # a step with the cache
    with torch.no_grad():
        cache, other = (mixer.new_cache(2, 0, torch.float64, 'cpu') for _ in range(2))
        for entry in (cache, other):
            mixer(x, whole(20), entry)
        step = context(torch.tensor([20]))
        assert_close(compiled(x[:, :1], step, cache), mixer(x[:, :1], step, other), EXACT, 'y of a step')
        assert_close(cache.state, other.state, EXACT, 'state after a step')


def assert_uniform(p, bound):
    assert p.abs().max() <= bound and abs(p.std() * 3 ** 0.5 / bound - 1) < 0.05, f'must fill +-{bound}'


@every_mixer
def test_draw_is_deterministic_and_as_published(kind, flags):
    mixer, same, other = (drawn(kind, seed=seed, n_embd=256, ssm_dt_rank=16, **flags) for seed in (0, 0, 1))
    for (name, p), q, r in zip(mixer.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(p, q), f'{name} must follow from its generator'
        fixed = p.eq(1).all() or p.eq(0).all() or name == 'A_log' and kind == 'mamba1'
        assert fixed or not torch.equal(p, r), f'{name} must follow its generator'
    p = dict(mixer.named_parameters())
    dt = F.softplus(p['dt_proj.bias'] if kind == 'mamba1' else p['dt_bias'])
    assert 0.999e-3 <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 1.001e-1, 'step sizes from 0.001 to 0.1'
    assert abs(dt.log10().mean() + 2) < 0.2, 'spread evenly in log'
    A = p['A_log'].exp()
    if kind == 'mamba1':
        assert_close(A, torch.arange(1.0, 7.0).expand(512, 6), 1e-6, 'A')
        assert_uniform(p['dt_proj.weight'], 0.25)
    else:
        assert 1 <= A.min() < 2.5 and 14.5 < A.max() <= 16, 'A from 1 to 16'
        assert p['norm.weight'].eq(1).all()
    assert p['D'].eq(1).all()
    assert_uniform(p['conv1d.weight'], flags.get('ssm_conv', 4) ** -0.5)


@every_mixer
def test_only_projections_are_matrices(kind, flags):
    """Weight decay and Muon go by the module that owns a weight: not for A_log, D, dt_bias and the taps."""
    mixer = drawn(kind, **flags)
    matrices = {name for name, p in mixer.named_parameters()
                if isinstance(mixer.get_submodule(name.rpartition('.')[0]), Linear) and p.dim() == 2}
    assert matrices == {f'{name}.weight' for name in ('in_proj', 'c_proj')} | (
        {'x_proj.weight', 'dt_proj.weight'} if kind == 'mamba1' else set())


def test_flops_count_the_recurrence():
    assert drawn('mamba1').flops(10) == drawn('mamba1').flops(1000) == 3 * (6 * 32 * 6 + 2 * 32 * 4)
    assert drawn('mamba2').flops(10) == 3 * (5 * 4 * 8 * 6 + 2 * (32 + 2 * 6) * 4)


def test_signatures_are_those_of_a_mixer():
    for kind in SSM.values():
        forward, new_cache = (list(inspect.signature(f).parameters) for f in (kind.forward, kind.new_cache))
        assert forward == ['self', 'x', 'ctx', 'cache']
        assert new_cache == ['self', 'batch_size', 'max_tokens', 'dtype', 'device', 'spare']
    assert (SSM['mamba1'].default_state, SSM['mamba2'].default_state) == (16, 128)
    assert [GPTConfig(layer_pattern='m', pos='none', ssm='mamba1', n_embd=n, n_head=1).ssm_dt_rank
            for n in (768, 20)] == [48, 2]
    assert isinstance(drawn('mamba2').new_cache(1, 1, torch.float32, 'cpu'), StateCache)


# ----------------------------------------------------------------------------------------------------------
# Against transformers


def theirs_mamba1(bias):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    c = MambaConfig(
        hidden_size=16, state_size=6, num_hidden_layers=1, conv_kernel=4, expand=2, time_step_rank=3,
        use_bias=bias, use_conv_bias=True)
    return MambaMixer(c, 0)


def theirs_jamba(bias):
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    c = JambaConfig(
        hidden_size=16, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=2, mamba_d_state=6,
        mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=3, mamba_proj_bias=bias, mamba_conv_bias=True,
        rms_norm_eps=1e-5)
    return JambaMambaMixer(c, 0)


def theirs_mamba2(bias, groups, taps):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    c = Mamba2Config(
        hidden_size=16, state_size=6, num_hidden_layers=1, conv_kernel=taps, expand=2, num_heads=4,
        head_dim=8, n_groups=groups, chunk_size=8, use_bias=bias, use_conv_bias=True, layer_norm_epsilon=1e-5)
    return Mamba2Mixer(c, 0)


THEIRS = {
    'mamba1': theirs_mamba1,
    'jamba': theirs_jamba,
    'mamba2': partial(theirs_mamba2, groups=1, taps=4),
    'mamba2_groups': partial(theirs_mamba2, groups=2, taps=2),
}
PUBLISHED = {
    'c_proj': 'out_proj', 'dt_norm': 'dt_layernorm', 'b_norm': 'b_layernorm', 'c_norm': 'c_layernorm',
}


# with a bias, theirs lets padding into the convolution: it is zeroed in front of the projection only
@pytest.mark.parametrize('padded, bias', [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize('name', THEIRS)
def test_mixer_equals_transformers(name, padded, bias):
    kind, flags = VARIANTS[name]
    ours, theirs = loud(kind, **(flags | dict(bias=bias))).float(), THEIRS[name](bias).eval()
    published = dict(theirs.named_parameters())
    for leaf, p in ours.named_parameters():
        owner, dot, rest = leaf.partition('.')
        source = published.pop(PUBLISHED.get(owner, owner) + dot + rest)
        source.data = p.data.view(source.shape)
    assert not published, f'parameters that were not compared: {list(published)}'
    x, pad = rand(2, 21, 16).float(), torch.tensor([[0], [6 if padded else 0]])
    pos = torch.arange(21) - pad
    mask = (pos >= 0).long() if padded else None
    with torch.no_grad():
        want = theirs(x, attention_mask=mask)
        got = ours(x, context(pos, causal=not padded))
    real = (pos >= 0).unsqueeze(-1)
    assert_close(got * real, want * real, 1e-4, 'y')
