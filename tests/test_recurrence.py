"""
The recurrence of linear attention and the delta rule: in chunks against the definition by matrices, special
cases against the general one, sequences in pieces, padding, and transformers.
"""
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close

import kernels
from kernels.recurrence import recurrence, recurrence_reference
from kernels.ssd import ssd
from model import GPT, Context, GPTConfig

EXACT = 1e-12  # of the largest number, in fp64
# what depends on the token
OVER_TIME = ('q', 'k', 'v', 'g', 'erase', 'along')


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def definition(q, k, v, g, erase=None, along=None, state=None, before=False):
    """Each token multiplies its head's state by one matrix: S <- (1 - f e^T) diag(exp g) S + k v^T."""
    K, y = k.shape[-1], []
    s = v.new_zeros(*v.shape[::2], K, v.shape[-1]) if state is None else state
    for t in range(v.shape[1]):
        step = g[:, t].expand(k[:, t].shape).exp().diag_embed()                     # (B,H,K,K)
        if erase is not None:
            f = k if along is None else along
            step = (torch.eye(K, dtype=v.dtype) - torch.einsum('bhk,bhl->bhkl', f[:, t], erase[:, t])) @ step
        old, s = s, step @ s + torch.einsum('bhk,bhv->bhkv', k[:, t], v[:, t])
        y.append(torch.einsum('bhk,bhkv->bhv', q[:, t], old if before else s))
    return torch.stack(y, dim=1), s


# ----------------------------------------------------------------------------------------------------------
# The arguments of every family at T tokens, all with a state


def plain(T, B=2, H=3, K=6, V=5):
    return dict(q=rand(B, T, H, K), k=F.normalize(rand(B, T, H, K, seed=1), dim=-1), v=rand(B, T, H, V),
                g=torch.zeros(B, T, H, 1, dtype=torch.float64), state=rand(B, H, K, V))


def by_head(T, speed=0.1, **sizes):
    args = plain(T, **sizes)
    return args | dict(g=-speed * rand(*args['g'].shape, seed=2).exp())


def by_key(T, speed=0.1, **sizes):
    args = plain(T, **sizes)
    return args | dict(g=-speed * rand(*args['k'].shape, seed=2).exp())


def delta(args, largest=1):
    beta = largest * rand(*args['g'].shape[:3], 1, seed=3).sigmoid()
    return args | dict(erase=beta * args['k'], v=beta * args['v'])


def along(args):
    """As RWKV-7 has it: what is erased lies along another key than what is written."""
    e = F.normalize(rand(*args['k'].shape, seed=4), dim=-1)
    return args | dict(erase=e, along=e * rand(*e.shape, seed=5).sigmoid(), k=0.3 * args['k'])


FAMILIES = {
    'linear attention': plain,
    'decay per head': by_head,
    'decay per key': by_key,
    'strong decay per head': lambda T: by_head(T, speed=8),
    'strong decay per key': lambda T: by_key(T, speed=2),
    'delta rule': lambda T: delta(plain(T)),
    'delta rule, beta to 2': lambda T: delta(plain(T), largest=2),
    'gated delta rule': lambda T: delta(by_head(T)),
    'gated delta rule, beta to 2, strong decay': lambda T: delta(by_head(T, speed=8), largest=2),
    'Kimi delta attention': lambda T: delta(by_key(T)),
    'RWKV-7': lambda T: along(by_key(T)),
    'along, decay per head': lambda T: along(by_head(T)),
    'before': lambda T: by_head(T) | dict(before=True),
    'RWKV-6': lambda T: by_key(T) | dict(before=True),
    'delta rule, before': lambda T: delta(by_key(T)) | dict(before=True),
    'along, before': lambda T: along(by_key(T)) | dict(before=True),
}
every_family = pytest.mark.parametrize('family', FAMILIES)


def gradients(op, args, weights):
    """Results and {argument: gradient} of the results' products with weights; one may be None."""
    args = {k: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for k, v in args.items()}
    outputs, leaves = op(**args), {k: v for k, v in args.items() if torch.is_tensor(v)}
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights) if w is not None)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return outputs, {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), found)}


def assert_same(op, args, bound=EXACT, only=None, truth=definition):
    """Values and all gradients of op are those of the definition in float64, made from the same numbers."""
    exact = {k: v.double() if torch.is_tensor(v) else v for k, v in args.items()}
    weights = [rand(*o.shape, seed=7) if only in (None, i) else None for i, o in enumerate(truth(**exact))]
    got, got_grads = gradients(op, args, weights)
    want, want_grads = gradients(truth, exact, weights)
    for name, a, b in zip(('y', 'state'), got, want):
        assert_close(a, b, bound, name)
    for k in want_grads:
        assert_close(got_grads[k], want_grads[k], bound, f'gradient of {k}')
        assert got_grads[k].dtype == args[k].dtype, f'the gradient of {k} comes in its dtype'
    return got


# ----------------------------------------------------------------------------------------------------------
# In chunks


@every_family
@pytest.mark.parametrize('T', [1, 2, 16, 17, 50, 64, 65, 150])
def test_chunks_equal_the_definition(family, T):
    assert_same(recurrence, FAMILIES[family](T))


@every_family
@pytest.mark.parametrize('chunk', [1, 7, 16, 40])
def test_the_size_of_a_chunk_changes_nothing(family, chunk):
    assert_same(lambda **args: recurrence(**args, chunk=chunk), FAMILIES[family](50))


@every_family
def test_the_loop_is_the_definition(family):
    assert_same(recurrence_reference, FAMILIES[family](20))


@every_family
@pytest.mark.parametrize('only', [0, 1], ids=['y', 'state'])
def test_gradients_when_the_loss_sees_one_output(family, only):
    assert_same(recurrence, FAMILIES[family](40), only=only)


@every_family
@pytest.mark.parametrize('T', [1, 70])
def test_no_state_is_a_state_of_zeros(family, T):
    args = FAMILIES[family](T)
    fresh = {k: v for k, v in args.items() if k != 'state'}
    got, want = recurrence(**fresh), recurrence(**args | dict(state=torch.zeros_like(args['state'])))
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@every_family
def test_a_sequence_in_pieces_is_the_whole(family):
    args = FAMILIES[family](150)
    want, want_state = recurrence(**args)
    state, got = args['state'], []
    for start, end in ((0, 1), (1, 40), (40, 110), (110, 150)):
        piece = {k: v[:, start:end] if k in OVER_TIME else v for k, v in args.items()}
        y, state = recurrence(**piece | dict(state=state))
        got.append(y)
    assert_close(torch.cat(got, 1), want, EXACT, 'y')
    assert_close(state, want_state, EXACT, 'state')


@every_family
def test_tokens_without_key_decay_and_erasure_leave_the_state(family):
    args = FAMILIES[family](90)
    for k in OVER_TIME:
        if k in args and k not in ('q', 'v', 'along'):
            args[k][:, 70:] = 0
    args['q'][:, 70:] *= 100
    args['v'][:, 70:] *= 100
    first = {k: v[:, :70] if k in OVER_TIME else v for k, v in args.items()}
    assert_close(recurrence(**args)[1], recurrence(**first)[1], EXACT, 'state')


@every_family
def test_no_token_sees_a_later_one(family):
    args, t = FAMILIES[family](100), 66
    later = {k: v.clone() if torch.is_tensor(v) else v for k, v in args.items()}
    for k in OVER_TIME:
        if k in later:
            later[k][:, t:] = -rand(*later[k][:, t:].shape, seed=9).abs()
    got, want = recurrence(**later)[0], recurrence(**args)[0]
    assert_close(got[:, :t], want[:, :t], EXACT, 'y of tokens that come before the change')
    assert not torch.allclose(got[:, t], want[:, t])


@pytest.mark.parametrize('make', [by_head, by_key], ids=['per head', 'per key'])
@pytest.mark.parametrize('decay', [-5.0, -30.0])
@pytest.mark.parametrize('erased', [False, True], ids=['kept', 'erased'])
def test_strong_decay_at_every_token_overflows_nothing(make, decay, erased):
    args = {k: v.float() for k, v in make(150).items()}
    args['g'] = torch.full_like(args['g'], decay)
    args = delta(args) if erased else args
    args = {k: v.float() for k, v in args.items()}
    # the gradient of g is as small as the decay: compared with nothing smaller than the loss's rounding
    exact = {k: v.double() for k, v in args.items()}
    weights = [rand(*o.shape, seed=7) for o in definition(**exact)]
    (got, got_grads), (want, want_grads) = (gradients(f, a, weights) for f, a in (
        (recurrence, args), (definition, exact)))
    for name, a, b in (*zip(('y', 'state'), got, want), *((k, got_grads[k], want_grads[k]) for k in args)):
        assert a.isfinite().all(), f'{name} must be finite'
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), name


@pytest.mark.parametrize('make', [by_head, by_key], ids=['per head', 'per key'])
@pytest.mark.parametrize('erased', [False, True], ids=['kept', 'erased'])
def test_a_token_that_forgets_all_leaves_little_rounding_to_the_others(make, erased):
    args = delta(make(100)) if erased else make(100)
    args = {k: v.float() for k, v in args.items()}
    args['g'][:, 20] = -2000
    assert_same(recurrence, args, bound=5e-6)
    _, grads = gradients(recurrence, args, [rand(*o.shape, seed=7) for o in definition(**args)])
    assert grads['g'][:, 20].eq(0).all(), 'how much more it forgets changes nothing'


# ----------------------------------------------------------------------------------------------------------
# Special cases


@pytest.mark.parametrize('make', [by_head, by_key], ids=['per head', 'per key'])
def test_erasing_along_zeros_is_decay_alone(make):
    args = make(150)
    got = recurrence(**args | dict(erase=torch.zeros_like(args['k'])))
    for name, a, b in zip(('y', 'state'), got, recurrence(**args)):
        assert_close(a, b, EXACT, name)


@pytest.mark.parametrize('make', [by_head, by_key], ids=['per head', 'per key'])
@pytest.mark.parametrize('erased', [False, True], ids=['kept', 'erased'])
def test_one_decay_for_all_keys_is_a_decay_per_head(make, erased):
    args = delta(by_head(150)) if erased else by_head(150)
    got = recurrence(**args | dict(g=args['g'].expand(args['k'].shape)))
    for name, a, b in zip(('y', 'state'), got, recurrence(**args)):
        assert_close(a, b, EXACT, name)


def test_erasing_along_the_key_is_the_delta_rule():
    args = delta(by_key(100))
    got = recurrence(**args | dict(along=args['k']))
    for name, a, b in zip(('y', 'state'), got, recurrence(**args)):
        assert_close(a, b, EXACT, name)


def test_the_delta_rule_replaces_what_a_key_holds_by_a_part_beta_of_v():
    B, T, H, K, V = 2, 100, 2, 5, 4
    q, k, v = rand(B, T, H, K), F.normalize(rand(B, T, H, K, seed=1), dim=-1), rand(B, T, H, V)
    beta, y = 2 * rand(B, T, H, 1, seed=2).sigmoid(), []
    state = s = rand(B, H, V, K)
    for t in range(T):
        old = (s @ k[:, t].unsqueeze(-1)).squeeze(-1)
        new = beta[:, t] * v[:, t] + (1 - beta[:, t]) * old
        s = s + (new - old).unsqueeze(-1) * k[:, t].unsqueeze(-2)
        y.append((s @ q[:, t].unsqueeze(-1)).squeeze(-1))
    got = recurrence(q, k, beta * v, torch.zeros(B, T, H, 1).double(), beta * k, state=state.mT)
    assert_close(got[0], torch.stack(y, 1), EXACT, 'y')
    assert_close(got[1], s.mT, EXACT, 'state')


def test_state_space_duality_is_a_decay_per_head():
    B, T, H, G, P, N = 2, 90, 4, 2, 3, 5
    x, dt, A = rand(B, T, H, P), rand(B, T, H, seed=1).exp(), -rand(H).exp()
    b, c, state = rand(B, T, G, N, seed=2), rand(B, T, G, N, seed=3), rand(B, H, P, N)
    want, want_state = ssd(x, dt, A, b, c, torch.zeros(H).double(), state)
    k, q = (v.repeat_interleave(H // G, dim=2) for v in (b, c))
    got, got_state = recurrence(q, k, dt.unsqueeze(-1) * x, (dt * A).unsqueeze(-1), state=state.mT)
    assert_close(got, want, EXACT, 'y')
    assert_close(got_state, want_state.mT, EXACT, 'state')


@pytest.mark.parametrize('T', [1, 30, 64, 150])
@pytest.mark.parametrize('family', ['qwen3_next', 'kimi_linear'])
def test_transformers_compute_the_same(family, T):
    pytest.importorskip('transformers')
    name = {'qwen3_next': 'torch_chunk_gated_delta_rule', 'kimi_linear': 'chunk_kimi_delta_attention'}[family]
    try:
        module = importlib.import_module(f'transformers.models.{family}.modeling_{family}')
    except ImportError:
        pytest.skip(f'this transformers has no {family}')
    args = (by_head if family == 'qwen3_next' else by_key)(T, K=16, V=8)
    args = {k: v.float() for k, v in args.items()}
    beta = rand(*args['v'].shape[:3], seed=3).sigmoid().float()
    g = args['g'].squeeze(-1) if family == 'qwen3_next' else args['g']
    want, want_state = getattr(module, name)(args['q'], args['k'], args['v'], g, beta,
                                             initial_state=args['state'], output_final_state=True)
    beta = beta.unsqueeze(-1)
    got, state = recurrence(**args | dict(q=args['q'] * 16**-0.5, v=beta * args['v'], erase=beta * args['k']))
    assert_close(got, want.double(), 1e-5, 'y')
    assert_close(state, want_state.double(), 1e-5, 'state')


# ----------------------------------------------------------------------------------------------------------
# Layers, as their papers have them: a layer and x (T,C) -> y (T,C)


def mixer(**flags):
    """The second of three layers in fp64, with every weight large and irregular, so that faults stand out."""
    none = dict(rnn_decay='none', rnn_erase='none', rnn_feature='none', rnn_unit=False, rnn_conv=0,
                rnn_gate='none', rnn_norm='none')
    model = GPT(GPTConfig(block_size=64, vocab_size=7, n_layer=3, n_head=2, n_embd=16, pos='none',
                          layer_pattern='r', **none | flags))
    with torch.no_grad():
        for i, p in enumerate(model.double().parameters()):
            p.add_(0.3 * rand(*p.shape, seed=i))
    return model.eval().h[1].mixer


def projected(m, x):
    """q, k and v (H,T,K) of two heads"""
    return (x @ m.c_attn.weight.T + m.c_attn.bias).view(len(x), 3, 2, -1).permute(1, 2, 0, 3)


def read_out(m, y, x):
    """y (H,T,V), an RMS norm of each head, a gate with SiLU -> (T,C)"""
    y = y / (y.square().mean(-1, keepdim=True) + m.norm.eps).sqrt() * m.norm.weight
    gate = F.silu(x @ m.gate.weight.T + m.gate.bias)
    return (y.transpose(0, 1).flatten(1) * gate) @ m.c_proj.weight.T + m.c_proj.bias


def linear_attention(m, x):
    """Katharopoulos et al. 2020, equations 3 and 7: every pair of tokens, with weights that sum to 1."""
    q, k, v = projected(m, x)
    weight = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    y = weight / weight.sum(-1, keepdim=True) @ v
    return y.transpose(0, 1).flatten(1) @ m.c_proj.weight.T + m.c_proj.bias


def retnet(m, x):
    """Sun et al. 2023, equation 5: every pair of tokens n >= m, gamma^(n-m) and a turn by theta (n-m)."""
    q, k, v = projected(m, x)
    ago = torch.arange(len(x)).unsqueeze(1) - torch.arange(len(x))
    gamma = (1 - 2.0 ** (-5 - torch.arange(2.0).double())).view(2, 1, 1)
    theta = 10000 ** (-torch.arange(4).double() / 4)
    q, k = (torch.complex(*z.chunk(2, -1)) for z in (q, k))
    turned = torch.einsum('hnd,hmd,nmd->hnm', q, k.conj(), torch.exp(1j * ago.unsqueeze(-1) * theta)).real
    return read_out(m, (turned / 8 ** 0.5 * gamma ** ago.clamp(min=0)).tril() @ v, x)


def gla(m, x):
    """Yang et al. 2023, section 4.4: alpha = sigmoid(W2 W1 x + b)^(1/16) for each key, token by token."""
    q, k, v = projected(m, x)
    alpha = torch.sigmoid(x @ m.decay.f[0].weight.T @ m.decay.f[1].weight.T + m.decay.f[1].bias) ** (1 / 16)
    S, y, alpha = x.new_zeros(2, 8, 8), [], alpha.view(len(x), 2, 8, 1)
    for t in range(len(x)):
        S = alpha[t] * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        y.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2) / 8 ** 0.5)
    return read_out(m, torch.stack(y, 1), x)


def channel_gated_delta_rule(m, x):
    """S <- (1 - k (beta b k)^T) S + k (w v)^T, with a gate b for each key and w for each value, beta 2."""
    q, k, v = projected(m, x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    b, w = torch.sigmoid(x @ m.erase.gates.weight.T).view(len(x), 2, 2, 8).unbind(1)
    S, y = x.new_zeros(2, 8, 8), []
    for t in range(len(x)):
        for h in range(2):
            S[h] += k[h, t].outer(w[t, h] * v[h, t] - 2 * S[h].T @ (b[t, h] * k[h, t]))
        y.append((q[:, t].unsqueeze(-2) @ S).flatten() / 8 ** 0.5)
    return torch.stack(y) @ m.c_proj.weight.T + m.c_proj.bias


LAYERS = {
    'linear attention': (dict(rnn_feature='elu1', rnn_input='sum'), linear_attention),
    'RetNet': (dict(rnn_decay='retnet', rnn_rope=True, rnn_gate='silu', rnn_norm='head'), retnet),
    'GLA': (dict(rnn_decay='slow', rnn_decay_rank=6, rnn_gate='silu', rnn_norm='head'), gla),
    'gates per channel': (dict(rnn_erase='gated', rnn_beta=2.0, rnn_unit=True), channel_gated_delta_rule),
}


@pytest.mark.parametrize('name', LAYERS)
@torch.no_grad()
def test_layer_equals_its_paper(name):
    flags, paper = LAYERS[name]
    m, x = mixer(**flags), rand(2, 40, 16)
    got = m(x, Context(torch.arange(40), True, None))
    # angles, fixed rates and what keeps a norm from dividing by 0 have the precision of fp32
    for row in range(2):
        assert_close(got[row], paper(m, x[row]), 1e-5, 'y')


def test_further_predictions_forget_as_the_last_layer():
    model = GPT(GPTConfig(block_size=64, vocab_size=7, n_layer=3, n_head=2, n_embd=16, pos='none',
                          layer_pattern='r', rnn_decay='lightning', n_predict=3))
    first, *rest = (block.mixer.decay(rand(1, 1, 16))[0, 0, :, 0] for block in (*model.h, *model.further))
    slopes = -2.0 ** torch.tensor([-4.0, -8.0])
    for i, decay in enumerate((first, *rest)):
        assert_close(decay, slopes * (1 - min(i, 2) / (2 + 1e-5) + 1e-5), 1e-6, f'layer {i}')
    assert len(rest) == 4 and rest[-1].lt(0).all()


MORE = {
    'gated delta rule': dict(rnn_decay='head', rnn_erase='delta', rnn_conv=3, rnn_unit=True, rnn_key_heads=1),
    'Kimi delta attention': dict(rnn_decay='key', rnn_erase='delta', rnn_conv=4, rnn_unit=True),
    'mLSTM': dict(rnn_decay='sigmoid', rnn_input='exp', rnn_gate='sigmoid', rnn_norm='layer'),
}


@pytest.mark.parametrize('name', [*LAYERS, *MORE])
@torch.no_grad()
def test_layer_in_pieces_and_behind_padding_is_as_if_alone(name):
    """Row 1 has padding in front of its text, in front of what goes on, and as the one token of a step."""
    m, x = mixer(**(MORE[name] if name in MORE else LAYERS[name][0])), rand(2, 30, 16)

    def alone(x):
        return m(x, Context(torch.arange(x.shape[1]), True, None))
    padded = torch.arange(30) - torch.tensor([[0], [4]])
    got = m(x, Context(padded, False, None))
    assert_close(got[:1], alone(x[:1]), EXACT, 'y without padding')
    assert_close(got[1:, 4:], alone(x[1:, 4:]), EXACT, 'y behind padding')
    cache, got = m.new_cache(2, 30, torch.float64, 'cpu'), []
    real = torch.ones(30, dtype=torch.bool)
    real[[0, 1, 8, 9, 10, 25]] = False      # in row 1
    pos = torch.stack((torch.arange(30), torch.where(real, real.cumsum(0) - 1, -1)))
    for piece in map(slice, (0, 8, 24, 25, 26, 27), (8, 24, 25, 26, 27, 30)):
        got.append(m(x[:, piece], Context(pos[:, piece], False, None), cache))
    got = torch.cat(got, 1)
    assert_close(got[:1], alone(x[:1]), EXACT, 'y of the row without padding, in pieces')
    assert_close(got[1:, real], alone(x[1:, real]), EXACT, 'y of the row with padding, in pieces')


# ----------------------------------------------------------------------------------------------------------
# Numbers


@every_family
@pytest.mark.parametrize('T', [1, 100])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_sums_are_fp32(family, T, dtype):
    """Against the truth in fp64 from the same rounded inputs: rounded once, with fp32 on the way."""
    args = {k: v.to(torch.float32 if k in ('g', 'state') else dtype) if torch.is_tensor(v) else v
            for k, v in FAMILIES[family](T).items()}
    # differences of a running sum, here of hundreds, have its rounding
    sums = 2e-5 if family == 'strong decay per key' else 1e-5
    y, state = assert_same(recurrence, args, bound=2 * torch.finfo(dtype).eps + sums)
    assert y.dtype == dtype and state.dtype == torch.float32
    exact = {k: v.double() if torch.is_tensor(v) else v for k, v in args.items()}
    assert_close(state, definition(**exact)[1], sums, 'state')


@every_family
def test_autocast_does_not_reach_inside(family):
    args = {k: v.float() if torch.is_tensor(v) else v for k, v in FAMILIES[family](20).items()}
    want = recurrence(**args)
    with torch.autocast('cpu', torch.bfloat16):
        got = recurrence(**args)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@every_family
def test_any_strides_are_read_and_no_input_is_written_to(family):
    args = FAMILIES[family](70)
    strided = {k: torch.stack((v, v + 1), -1)[..., 0] if torch.is_tensor(v) else v for k, v in args.items()}
    kept = {k: v.clone() for k, v in strided.items() if torch.is_tensor(v)}
    weights = [rand(*o.shape, seed=7).mT.contiguous().mT for o in definition(**args)]
    leaves = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in strided.items()}
    got = recurrence(**leaves)
    sum((o * w).sum() for o, w in zip(got, weights)).backward()
    _, want = gradients(definition, args, weights)
    for k, v in kept.items():
        assert torch.equal(strided[k], v), f'{k} must not be written to'
        assert_close(leaves[k].grad, want[k], EXACT, f'gradient of {k}')


def test_kernels_take_what_they_can_compute_and_no_more():
    ok = kernels.OPS['recurrence'].ok
    args = {k: v.bfloat16() for k, v in delta(by_head(20)).items()}
    assert ok(**args) and ok(**{k: v for k, v in args.items() if k not in ('erase', 'state')})
    assert ok(**args | dict(g=args['g'].float(), state=args['state'].float()))
    wide = {k: v.float() for k, v in args.items()}
    one_token = {k: args[k][:, :1] for k in args if k in OVER_TIME}
    assert ok(**args | {k: wide[k] for k in ('q', 'k', 'erase')})    # rounded to the type of the values
    for change in (wide, dict(along=args['k']), dict(before=True),
                   dict(g=args['g'].expand(args['k'].shape)), {k: v.double() for k, v in args.items()},
                   dict(v=args['v'].repeat(1, 1, 1, 60)), one_token):
        assert not ok(**args | change)
