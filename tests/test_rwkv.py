"""
RWKV and S4D: each class against a loop over tokens, written from its paper, in pieces and padded, and as a
model that trains and continues its own text.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close

from model import GPT, Context, Given, GPTConfig, Shelf, s4d_convolve, s4d_step, wkv
from nanoblocks.pretrained.families import FAMILIES

EXACT = 1e-10   # of the largest number, in fp64
T = 30


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def config(**flags):
    return GPTConfig(**dict(block_size=24, vocab_size=61, n_layer=2, n_head=2, n_embd=16, pos='none',
                            layer_pattern='r') | flags)


def loud(model):
    """In fp64, with every weight large and irregular, so that faults stand out."""
    with torch.no_grad():
        for i, p in enumerate(model.double().parameters()):
            p.add_(0.3 * rand(*p.shape, seed=i))
    return model.eval()


def mixer(kind):
    return loud(GPT(config(**KINDS[kind][0]))).h[0].mixer


def context(pos, causal=False):
    return Context(pos, causal, None, given=Given(first=Shelf()))


def whole(n):
    return context(torch.arange(n), causal=True)


def before(x, mu):
    """x + mu (x' - x), x' the token before, and zeros before the first: x (T,C)"""
    return torch.stack([x_t + mu * ((x[t - 1] if t else 0 * x_t) - x_t) for t, x_t in enumerate(x)])


def head_norm(y, norm, heads):
    """Layer norm of each head of y (C,), with weights and biases (C,)."""
    y = y.view(heads, -1)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    return y.flatten() * norm.weight + norm.bias


# ----------------------------------------------------------------------------------------------------------
# Each class, as its paper has it: a layer, and x (T,C) -> y (T,C)


def rwkv7(m, x, v_first=None):
    """Peng et al. 2025, section 4.2, with the state S (V,K) as there: S (diag(w) - kk^T (a kk)) + v^T k."""
    def low_rank(f, x):
        y = f.act(x @ f.down.weight.T) @ f.up.weight.T
        return y if f.bias is None else y + f.bias
    H, K = m.heads
    xr, xw, xk, xv, xa, xg = (before(x, mu) for mu in m.shift.mu)
    S, y = x.new_zeros(H, K, K), []
    for t in range(len(x)):
        r, k, v = m.r.weight @ xr[t], m.k.weight @ xk[t], m.v.weight @ xv[t]
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_rank(m.decay, xw[t])))
        a = torch.sigmoid(low_rank(m.rate, xa[t]))
        if v_first is not None:
            v = torch.lerp(v, v_first[t], torch.sigmoid(low_rank(m.mix, xv[t])))
        kk, k = (k * m.erased).view(H, K), k * torch.lerp(torch.ones_like(a), a, m.kept)
        kk = kk / kk.norm(dim=1, keepdim=True)
        r, w, k, v, a = (z.view(H, K) for z in (r, w, k, v, a))
        out = []
        for h in range(H):
            S[h] = S[h] @ (w[h].diag() - kk[h].outer(a[h] * kk[h])) + v[h].outer(k[h])
            out.append(S[h] @ r[h])
        bonus = (r * k * m.bonus.view(H, K)).sum(1, keepdim=True) * v
        y.append(m.c_proj.weight @ ((head_norm(torch.cat(out), m.norm, H) + bonus.flatten())
                                    * low_rank(m.gate, xg[t])))
    return torch.stack(y)


def s4d(m, x):
    """Gu et al. 2022, section 3: zero-order hold, and the recurrence token by token."""
    dt, A = m.log_dt.exp(), torch.complex(-m.A_log.exp(), m.A_imag)
    C, h, y = torch.view_as_complex(m.C), 0, []
    for u in x:
        step = torch.exp(dt[:, None] * A)
        h = step * h + (step - 1) / A * u[:, None]
        out = F.gelu(2 * (C * h).sum(1).real + m.D * u)
        value, gate = (m.c_proj.weight @ out + m.c_proj.bias).chunk(2)
        y.append(value * torch.sigmoid(gate))
    return torch.stack(y)


def rwkv6(m, x):
    """Peng et al. 2024, section 4: Finch."""
    def low_rank(f, x):
        return f.bias + f.up.weight @ torch.tanh(f.down.weight @ x)
    H, K = m.heads
    S, y, last = x.new_zeros(H, K, K), [], 0 * x[0]
    for x_t in x:
        xx = x_t + m.shift.mu[-1] * (last - x_t)
        few = torch.tanh(m.shift.down.weight @ xx).view(5, -1)
        xw, xk, xv, xr, xg = (x_t + (mu + few[i] @ m.shift.up[i]) * (last - x_t)
                              for i, mu in enumerate(m.shift.mu[:-1]))
        r, k, v, u = (z.view(H, K) for z in (m.r.weight @ xr, m.k.weight @ xk, m.v.weight @ xv, m.bonus))
        w = torch.exp(-torch.exp(low_rank(m.decay, xw))).view(H, K)
        out = []
        for h in range(H):
            kv = k[h].outer(v[h])
            out.append(r[h] @ (S[h] + u[h].diag() @ kv))
            S[h] = w[h].diag() @ S[h] + kv
        y.append(m.c_proj.weight @ (head_norm(torch.cat(out), m.norm, H) * F.silu(m.g.weight @ xg)))
        last = x_t
    return torch.stack(y)


def rwkv4(m, x):
    """Peng et al. 2023, equations 11 to 17: the sum over all tokens before, as it stands there."""
    xk, xv, xr = (before(x, mu) for mu in m.shift.mu)
    k, v, r, w = xk @ m.k.weight.T, xv @ m.v.weight.T, xr @ m.r.weight.T, torch.exp(m.decay)
    y = []
    for t in range(len(x)):
        weight = torch.exp(torch.stack([k[i] - (t - 1 - i) * w for i in range(t)] + [m.bonus + k[t]]))
        y.append((weight * v[:t + 1]).sum(0) / weight.sum(0))
    return (torch.sigmoid(r) * torch.stack(y)) @ m.c_proj.weight.T


def channel_mix(m, x):
    """Peng et al. 2023, equations 18 to 20."""
    k, *r = (before(x, mu) for mu in m.shift.mu)
    y = F.relu(k @ m.c_fc.weight.T) ** 2 @ m.c_proj.weight.T
    return torch.sigmoid(r[0] @ m.gate.weight.T) * y if r else y


def shifted_delta_rule(m, x):
    """Yang et al. 2024, equation 3, behind a token shift that all projections read."""
    x = before(x, m.shift.mu[0])
    q, k, v = (x @ m.c_attn.weight.T + m.c_attn.bias).view(len(x), 3, 2, 8).unbind(1)   # (T,H,K)
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    beta, S, y = torch.sigmoid(x @ m.erase.beta.weight.T), x.new_zeros(2, 8, 8), []
    for t in range(len(x)):
        for h in range(2):
            old = S[h].T @ k[t, h]
            S[h] += k[t, h].outer(beta[t, h] * (v[t, h] - old))
        y.append(torch.stack([S[h].T @ q[t, h] for h in range(2)]).flatten() / 8 ** 0.5)
    return torch.stack(y) @ m.c_proj.weight.T + m.c_proj.bias


DELTA = dict(rnn_decay='none', rnn_feature='none', rnn_gate='none', rnn_norm='none', rnn_conv=0)
KINDS = {       # flags of a model, and the paper
    'rwkv7': (dict(rnn='rwkv7'), rwkv7),
    'rwkv6': (dict(rnn='rwkv6'), rwkv6),
    'rwkv4': (dict(rnn='rwkv4'), rwkv4),
    's4d': (dict(rnn='s4d'), s4d),
    'channel_mix': (dict(layer_pattern='k', ffn_pattern='-'), channel_mix),
    'channel_mix_gate': (dict(layer_pattern='k', ffn_pattern='-', rnn_mix_gate=True), channel_mix),
    'shift': (DELTA | dict(rnn_shift=True), shifted_delta_rule),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


@every_kind
@torch.no_grad()
def test_layer_equals_its_paper(kind):
    m, x = mixer(kind), rand(2, T, 16)
    got = m(x, whole(T))
    for row in range(2):
        assert_close(got[row], KINDS[kind][1](m, x[row]), EXACT, 'y')


@torch.no_grad()
def test_values_of_the_first_rwkv7_layer_reach_the_later_ones():
    model = loud(GPT(config(rnn='rwkv7', layer_pattern='ar', n_layer=6, dropout=0.0)))
    first, *later = (model.h[i].mixer for i in (1, 3, 5))
    assert first.mix is None and all(m.mix is not None for m in later)
    x, other, ctx = rand(1, T, 16), rand(1, T, 16, seed=1), whole(T)
    first(x, ctx)
    values = before(x[0], first.shift.mu[3]) @ first.v.weight.T
    for m in later:
        assert_close(m(other, ctx)[0], rwkv7(m, other[0], values), EXACT, 'y')


@pytest.mark.parametrize('kind', ['rwkv7', 'rwkv6', 'rwkv4', 'channel_mix_gate'])
def test_further_predictions_begin_as_the_last_layer(kind):
    model = GPT(config(**KINDS[kind][0], n_predict=3))
    first, last, *further = (block.mixer for block in (*model.h, *model.further))
    for mixer in further:
        assert torch.equal(mixer.shift.mu, last.shift.mu)
    assert not torch.equal(first.shift.mu, last.shift.mu)


@pytest.mark.parametrize('fresh', [True, False], ids=['fresh', 'carried'])
@torch.no_grad()
def test_convolution_of_s4d_equals_its_recurrence(fresh):
    n, c = 3, 5
    A, B, C = (torch.complex(rand(c, n, seed=i), rand(c, n, seed=i + 9)) for i in range(3))
    A, u = A - A.real - 0.1, rand(2, T, c)
    h = None if fresh else torch.complex(rand(2, c, n), rand(2, c, n, seed=1))
    y, end = s4d_convolve(u, A, B, C, h, torch.zeros(1, dtype=torch.long))
    h = torch.zeros_like(end) if fresh else h
    for t in range(T):
        want, h = s4d_step(u[:, t:t + 1], A, B, C, h, torch.ones(1))
        assert_close(y[:, t:t + 1], want, 1e-12, f'y of token {t}')
    assert_close(torch.view_as_real(end), torch.view_as_real(h), 1e-12, 'state')


@every_kind
def test_layer_is_causal_and_trains_every_parameter(kind):
    m, x, t = mixer(kind), rand(2, T, 16).requires_grad_(), 17
    y = m(x, whole(T))
    reach, = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
    assert reach[:, t + 1:].abs().max() <= 1e-12 * reach.abs().max(), 'no token sees a later one'
    seen = reach[:, t - 1:t + 1] if 'mix' in kind else reach[:, :t + 1]
    assert seen.ne(0).all(), 'every token is seen by a later one'
    (y * rand(*y.shape)).sum().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.ne(0).any(), f'{name} must get a gradient'


@every_kind
@pytest.mark.parametrize('cuts', [[], [1], [29], list(range(1, 30)), [7, 8, 20]], ids=str)
@torch.no_grad()
def test_cached_pieces_equal_the_whole(kind, cuts):
    m, x = mixer(kind), rand(2, T, 16)
    cache, got = m.new_cache(2, T, torch.float64, 'cpu'), []
    for start, end in zip([0, *cuts], [*cuts, T]):
        ctx = context(torch.arange(start, end), causal=start == 0 and end > 1)
        got.append(m(x[:, start:end], ctx, cache))
    assert_close(torch.cat(got, dim=1), m(x, whole(T)), EXACT, 'y')


@every_kind
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(kind):
    """Rows of 9, 3, 1 and no tokens, padded to 12: as the first call, and as one that goes on."""
    m, lengths = mixer(kind), (9, 3, 1, 0)
    first, x = rand(4, 5, 16), rand(4, 12, 16, seed=2)
    pos = torch.arange(12) - 12 + torch.tensor(lengths).unsqueeze(1)
    for begun in (0, 5):
        cache = m.new_cache(4, 0, torch.float64, 'cpu')
        if begun:
            m(first, whole(5), cache)
        y = m(x, context(torch.where(pos < 0, pos, pos + begun)), cache)
        for row, n in enumerate(lengths):
            real = torch.cat((first[row, :begun], x[row, 12 - n:])).unsqueeze(0)
            if not real.numel():
                continue
            alone = m.new_cache(1, 0, torch.float64, 'cpu')
            want = m(real, whole(begun + n), alone)
            if n:
                assert_close(y[row, 12 - n:], want[0, begun:], EXACT, f'y of row {row}')
            for name in ('tail', 'state'):
                got, kept = getattr(cache, name)[row:row + 1], getattr(alone, name)
                assert got.shape == kept.shape
                if kept.numel():
                    assert_close(got, kept, EXACT, f'{name} of row {row}')


@every_kind
@torch.no_grad()
def test_a_single_token_of_padding_is_as_if_it_were_not_there(kind):
    """Row 1 begins with a step of padding, and has another one between its tokens 4 and 5."""
    m, x = mixer(kind), rand(2, 7, 16)
    cache, got = m.new_cache(2, 0, torch.float64, 'cpu'), []
    pos = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [-1, 0, 1, 2, 3, -1, 4]])
    for piece in map(slice, (0, 1, 5, 6), (1, 5, 6, 7)):
        got.append(m(x[:, piece], context(pos[:, piece]), cache))
    got, real = torch.cat(got, 1), pos[1] >= 0
    assert_close(got[:1], m(x[:1], whole(7)), EXACT, 'y of the row without padding')
    assert_close(got[1:, real], m(x[1:, real], whole(5)), EXACT, 'y of the row with padding')


@every_kind
@torch.no_grad()
def test_layer_in_low_precision(kind):
    """Under autocast, and with all weights in bf16: near the truth, with a state in fp32."""
    x = rand(2, T, 16)
    want = mixer(kind)(x, whole(T))
    for autocast in (True, False):
        m = mixer(kind).float() if autocast else mixer(kind).bfloat16()
        cache = m.new_cache(2, 0, torch.bfloat16, 'cpu')
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = m(x.float() if autocast else x.bfloat16(), whole(T), cache)
            step = m(y[:, :1], context(torch.tensor([T])), cache)
        assert_close(y, want, 0.1, 'y')
        assert step.dtype == y.dtype and cache.state.dtype == torch.float32


@every_kind
def test_layer_compiles_to_one_graph(kind):
    m, x = mixer(kind), rand(2, 20, 16)
    for pos in (None, torch.arange(20) - torch.tensor([[0], [4]])):
        torch._dynamo.reset()
        ctx = whole(20) if pos is None else context(pos)
        got = torch.compile(m, fullgraph=True, backend='aot_eager')(x, ctx)
        assert_close(got, m(x, whole(20) if pos is None else context(pos)), EXACT, 'y')


@every_kind
def test_model_trains_and_continues_from_its_cache(kind):
    model = GPT(config(**KINDS[kind][0], n_predict=2))
    idx = torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    model.eval()
    got = model.generate(idx[:, :5], 12, temperature=0)
    for t in range(5, 17):
        greedy = model(got[:, :t])[0][:, -1].argmax(-1)
        assert torch.equal(got[:, t], greedy)


@pytest.mark.parametrize('kind', ['rwkv7', 'rwkv6', 'rwkv4', 's4d'])
def test_flags_of_other_classes_are_refused_beside_it(kind):
    for name, value in (('rnn_erase', 'none'), ('rnn_conv', 2), ('rnn_beta', 2.0)):
        with pytest.raises(ValueError, match=f'{name}={value} must be left out unless rnn=linear'):
            config(rnn=kind, **{name: value})
    with pytest.raises(ValueError, match='rnn=.* must be left out unless layer_pattern has an? .r'):
        config(rnn=kind, layer_pattern='a')
    heads = kind in ('rwkv7', 'rwkv6')
    remedy = 'divide n_embd=16' if heads else 'left out unless rnn is linear or rwkv7 or rwkv6'
    with pytest.raises(ValueError, match=f'rnn_heads=3 must .*{remedy}'):
        config(rnn=kind, rnn_heads=3)


def test_flags_of_single_classes_are_refused_elsewhere():
    for flags, remedy in ((dict(rnn_state=8), 'rnn_state=8 must be left out unless rnn=s4d'),
                          (dict(rnn_shift=True), 'rnn_shift=True must be left out unless rnn_conv=0'),
                          (dict(rnn_mix_gate=True), 'rnn_mix_gate=True must .* layer_pattern has an? .k'),
                          (dict(rnn_mix_width=8), 'rnn_mix_width=8 must .* layer_pattern has an? .k'),
                          (dict(rnn='s4d', rnn_state=7), 'rnn_state=7 must be even')):
        with pytest.raises(ValueError, match=remedy):
            config(**flags)


def test_wkv_keeps_its_sums_in_range():
    """With weights from exp(-200) to exp(200), in fp32 as in fp64, and in pieces; so do its gradients."""
    k, v, u = 60 * rand(2, T, 4), rand(2, T, 4, seed=1), 10 * rand(4)
    decay = -torch.tensor([1e-4, 0.1, 5.0, 200.0], dtype=torch.float64)
    real = torch.ones(T, 1, dtype=torch.float64)
    k[:, 10], k[:, 20] = -200.0, 200.0
    given = [x.requires_grad_() for x in (k, v, decay, u)]
    weight = torch.stack([torch.stack([k[:, i] + (t - 1 - i) * decay if i < t else
                                       u + k[:, t] if i == t else torch.full_like(k[:, 0], -torch.inf)
                                       for i in range(T)], 1) for t in range(T)], 1)     # (B,T,T,C)
    want = (torch.softmax(weight, dim=2) * v.unsqueeze(1)).sum(2)
    got = wkv(k, v, decay, u, real, None)[0]
    assert_close(got, want, EXACT, 'fp64')
    grads = [torch.autograd.grad(y.sin().sum(), given, retain_graph=True) for y in (got, want)]
    for name, a, b in zip(('k', 'v', 'decay', 'u'), *grads):
        assert_close(a, b, 1e-9, f'gradient of {name}')
    y, _ = wkv(*(z.float() for z in (k, v, decay, u, real)), None)
    assert_close(y, want, 2e-4, 'fp32')
    state, got = None, []
    for piece in (slice(0, 1), slice(1, 12), slice(12, T)):
        y, state = wkv(k[:, piece], v[:, piece], decay, u, real[piece], state)
        got.append(y)
    assert_close(torch.cat(got, 1), want, EXACT, 'pieces')


def test_channel_mixing_is_the_feed_forward_of_a_published_model():
    """Two blocks, each with a norm: r and k in turns. The cache of k is its last input alone."""
    model = GPT(config(rnn='rwkv4', layer_pattern='rk', ffn_pattern='-', n_layer=4, rnn_mix_width=40))
    assert [type(block.mixer).__name__ for block in model.h] == ['RWKV4', 'ChannelMix'] * 2
    assert model.h[1].mixer.c_fc.weight.shape == (40, 16)
    mixed = model.new_cache(3, 100)[1]
    assert mixed.nbytes() == 3 * 16 * 4


def test_another_width_of_the_published_rwkv4_is_refused():
    family = FAMILIES['rwkv']
    with pytest.raises(ValueError, match='attention_hidden_size=32 in config.json must be hidden_size=16'):
        family.read(dict(hidden_size=16, attention_hidden_size=32))
    with pytest.raises(ValueError, match='to export as '):
        GPT(config(rnn='rwkv7', layer_pattern='rk', ffn_pattern='-')).save_pretrained('unused')
