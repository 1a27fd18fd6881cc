"""The newer blocks one by one, against their papers' formulas and their dense or plain special cases."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, build, scaled, tokens, toy
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, AlibiPositions, Context, Given, GPTConfig, MoE, kv_cache_bytes, ops
from nanoblocks.training import checkpoint

MOE = dict(ffn_pattern='e', n_expert=4)


def moe_of(flags):
    return next(m for m in build(flags).modules() if isinstance(m, MoE))


# ----------------------------------------------------------------------------------------------------------
# Experts


def moe_by_loops(moe, x):
    """Every token through its experts, one at a time. x (N,C); for swiglu without biases."""
    c, y = moe.c, torch.zeros_like(x, dtype=torch.float64)

    def ffn(token, fc, proj):
        gate, up = (fc.double() @ token).chunk(2)
        return proj.double() @ (F.silu(gate) * up)
    for n, token in enumerate(x.double()):
        logits = moe.router.weight.double() @ token
        if c.router_bias:
            logits = logits + moe.router.bias.double()
        scores = logits.sigmoid() if c.router == 'sigmoid' else logits.softmax(-1)
        wanted = [s + (moe.choice_bias[e].item() if moe.biased else 0) for e, s in enumerate(scores.tolist())]
        size = c.n_expert // c.n_group
        worth = [sum(sorted(wanted[g * size:(g + 1) * size])[-c.group_top:]) for g in range(c.n_group)]
        groups = sorted(range(c.n_group), key=worth.__getitem__)[-c.n_group_used:]
        allowed = [e for e in range(c.n_expert) if e // size in groups]
        best = sorted(allowed, key=wanted.__getitem__)[-c.n_expert_used:]
        total = sum(scores[e] for e in best) if c.router_norm else 1.0
        for e in best:
            share = scores[e] / total * c.router_scale
            expert = moe.c_fc.weight[e], moe.c_proj.weight[e]
            y[n] += ffn(share * token, *expert) if c.router_input else share * ffn(token, *expert)
        if moe.shared is not None:
            gate = torch.sigmoid(moe.shared_gate.weight.double() @ token) if c.shared_gate else 1.0
            y[n] += gate * ffn(token, moe.shared.c_fc.weight, moe.shared.c_proj.weight)
    return y


@pytest.mark.parametrize('flags', [
    {'n_expert_used': 1, 'router_norm': 'fixed'}, {}, {'n_expert_used': 4}, {'router': 'sigmoid'},
    {'router_norm': False}, {'router_scale': 2.5}, {'router_bias': True},
    {'router_input': True, 'router_norm': False},
    {'n_shared': 2}, {'n_shared': 1, 'shared_gate': True, 'shared_width': 11}, {'balance': 'bias'},
    {'n_expert': 12, 'n_group': 3, 'n_group_used': 2, 'router': 'sigmoid'},
    {'n_expert': 12, 'n_group': 3, 'n_group_used': 2, 'group_top': 1, 'balance': 'both'},
    {'n_expert': 12, 'n_group': 3, 'n_group_used': 1, 'n_expert_used': 3, 'group_top': 4},
], ids=str)
def test_experts_equal_their_definition(flags):
    moe = scaled(moe_of(toy(**(MOE | {'ffn': 'swiglu', 'bias': False} | flags))), 20)
    generator = torch.Generator().manual_seed(0)
    if moe.biased:
        moe.choice_bias.copy_(0.3 * torch.randn(moe.c.n_expert, generator=generator))
    if flags.get('router_bias'):
        moe.router.bias.data.normal_(generator=generator)
    x = torch.randn(2, 25, 32, generator=generator)
    assert_close(moe(x, None), moe_by_loops(moe, x.flatten(0, 1)).view(2, 25, 32), 1e-5, 'experts')


@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('tokens', [1, 90])
@pytest.mark.parametrize('flags', [{'n_expert_used': 3}, {'n_expert_used': 3, 'router_input': True},
                                   {'n_shared': 1, 'shared_gate': True}], ids=str)
def test_gradients_of_experts_equal_those_of_their_definition(flags, tokens, autocast):
    more = {'ffn': 'swiglu', 'bias': False, 'balance': 'bias', 'n_expert': 6} | flags
    moe = scaled(moe_of(toy(**(MOE | more))), 10)
    moe.choice_bias[[0, 4]] = -10.0     # never chosen
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (lambda x: moe(x, None), lambda x: moe_by_loops(moe, x[0])[None]):
        moe.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast and not found):
            y = function(given)
        y.backward(grad.to(y.dtype))
        found.append({'output': y, 'x': given.grad} | {name: p.grad for name, p in moe.named_parameters()})
    got, want = found
    for name in want:
        assert_close(got[name], want[name], 0.03 if autocast else 2e-5, name)
        if name in ('c_fc.weight', 'c_proj.weight'):
            assert not got[name][[0, 4]].any(), f'{name} of an idle expert'


class OnTheHost(TorchDispatchMode):
    """Collects the operations for which a GPU has to wait: their values or shapes are read by the host."""
    WAIT = {'_local_scalar_dense', 'nonzero', 'masked_select', 'repeat_interleave', '_unique2', 'bincount'}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAIT:
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('flags', [{}, {'n_group': 2, 'balance': 'bias'}, {'ffn': 'swiglu_clip'}], ids=str)
def test_a_gpu_waits_nowhere_in_experts(flags, monkeypatch):
    # nor could a CUDA graph hold them otherwise: the path of the kernels, with a definition for their launch
    module = importlib.import_module('kernels.grouped_linear')

    def launch(x, weight, counts):
        expert = torch.searchsorted(counts.cumsum(0), torch.arange(len(x)), right=True)
        return (weight[expert] @ x.unsqueeze(-1)).squeeze(-1)
    monkeypatch.setattr(module, '_fused', launch)
    monkeypatch.setattr(ops, 'grouped_linear', module.fused)
    moe = moe_of(toy(**(MOE | flags)))
    x = torch.randn(2, 5, 32, requires_grad=True)
    with OnTheHost() as host, torch.autocast('cpu', torch.bfloat16):
        moe(x, None).sum().backward()
    assert not host.found
    with OnTheHost() as host:   # they would be seen
        x.nonzero(), x.sum().item()
    assert len(host.found) == 2


@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_losses_of_the_router_equal_their_definitions(router):
    flags = toy(**MOE, router=router, aux_weight=0.7, z_weight=0.3, dropout=0.0, n_layer=1)
    model, idx = scaled(build(flags), 5), tokens(toy(), 2, 9)
    moe, seen = model.h[0].ffn, []
    moe.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    evaluated = model(idx[:, :-1], idx[:, 1:])[1]
    trained = model.train()(idx[:, :-1], idx[:, 1:])[1]
    logits = seen[1] @ moe.router.weight.double().T
    scores = logits.sigmoid() if router == 'sigmoid' else logits.softmax(-1)
    share = torch.zeros(4, dtype=torch.float64)
    for row in scores:
        for e in row.topk(2).indices:
            share[e] += 1 / (2 * len(scores))
    wish = (scores / scores.sum(-1, keepdim=True)).mean(0)
    aux = 4 * sum(share[e] * wish[e] for e in range(4))         # one where all are equally busy
    z = sum(torch.log(row.exp().sum()) ** 2 for row in logits) / len(logits)
    assert_close(trained - evaluated, 0.7 * aux + 0.3 * z, 1e-4, 'aux and z')
    assert torch.equal(moe.load, (share * 2 * len(scores)).round().float()), 'tokens of each expert'


@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('bias', [True, False])
def test_one_expert_is_the_dense_ffn_exactly(router, bias):
    moe = build(toy(ffn_pattern='e', n_expert=1, n_expert_used=1, router=router, bias=bias)).h[0].ffn
    dense = build(toy(bias=bias)).h[0].ffn
    for ours, theirs in ((moe.c_fc, dense.c_fc), (moe.c_proj, dense.c_proj)):
        ours.weight.data = theirs.weight.data.unsqueeze(0).clone()
        if bias:
            ours.bias.data = theirs.bias.data.unsqueeze(0).normal_()
            theirs.bias.data = ours.bias.data[0].clone()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moe(x, None), dense(x, None))


def test_no_token_is_dropped_when_all_want_the_same_expert():
    moe = scaled(moe_of(toy(**MOE, n_expert_used=1, router_norm=False, ffn='swiglu', bias=False)), 20)
    moe.router.weight.data.zero_()
    moe.router.weight.data[2, 0] = 100.0
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 1.0
    y = moe(x, None)
    assert (y.abs().sum(-1) > 0).all()
    assert_close(y, moe_by_loops(moe, x.flatten(0, 1)).view(3, 8, 32), 1e-5, 'one busy expert')


@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_a_router_that_picks_one_expert_learns_from_the_text(router):
    flags = toy(**MOE, n_expert_used=1, router=router, balance='none')
    with pytest.raises(ValueError, match='^router_norm=True must be False when n_expert_used=1'):
        GPTConfig(**flags)
    size = {}
    for norm in (False, 'fixed'):
        model, idx = build(flags, router_norm=norm).train(), tokens(flags, 8, 17)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        size[norm] = model.h[0].ffn.router.weight.grad.norm().item()
    assert size[False] > 1e-4 and size['fixed'] < 1e-6


def test_an_older_checkpoint_of_one_normalised_expert_is_read(tmp_path):
    flags = toy(**MOE, n_expert_used=1, router_norm='fixed')
    state = checkpoint.contents(build(flags))
    state['config']['router_norm'] = True
    model = checkpoint.build(state, 'best.pt')
    idx = tokens(flags, 2, 9)
    assert model.config.router_norm == 'fixed' and torch.equal(model.eval()(idx)[0], build(flags)(idx)[0])
    assert checkpoint.overrides(state['config'], model.config) == {}


def test_groups_limit_the_choice():
    moe = moe_of(toy(ffn_pattern='e', n_expert=8, n_group=4, n_group_used=1, n_expert_used=2))
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    chosen = moe.choose(scores)
    for row, experts in zip(scores, chosen):
        groups = row.view(4, 2).sum(-1)
        assert set((experts // 2).tolist()) == {groups.argmax().item()}


def test_bias_changes_the_choice_and_not_the_weights():
    moe = scaled(moe_of(toy(**MOE, n_expert_used=1, balance='bias', router='sigmoid', router_norm=False)), 5)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    moe.choice_bias[1] = 10.0
    scores = torch.sigmoid(x.flatten(0, 1) @ moe.router.weight.T)
    assert (moe.choose(scores) == 1).all()
    one = moe(x, None)
    moe.choice_bias[1] = 20.0
    assert torch.equal(one, moe(x, None))


def loads(balance, steps=200, **more):
    """Share of the busiest expert over the last steps of training, from a router that begins lopsided."""
    flags = toy(**MOE, n_expert_used=1, n_layer=1, balance=balance, router_norm=False, **more)
    model = GPT(GPTConfig(**flags))
    # everyone begins with expert 0 a little ahead, which then learns the most
    model.h[0].ln_2.bias.data.fill_(0.2)
    model.h[0].ffn.router.weight.data[0] += 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shares = []
    for step in range(steps):
        idx = tokens(flags, 8, 17, seed=step % 4)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(model.balance_experts()['expert_max'].item())
    return sum(shares[-10:]) / 10


def test_routers_collapse_without_balancing_and_not_with_it():
    assert loads('none') > 0.8, 'nothing is shown if the router stays balanced by itself'
    for balance, more in (('aux', {'aux_weight': 1.0}), ('bias', {'bias_rate': 0.02}),
                          ('both', {'aux_weight': 1.0, 'bias_rate': 0.02})):
        assert loads(balance, **more) < 0.5, balance


def test_bias_moves_once_per_optimizer_step_whatever_the_micro_batches():
    flags = toy(**MOE, balance='bias', n_layer=1)
    idx = tokens(flags, 4, 17)
    whole, parts = GPT(GPTConfig(**flags)), GPT(GPTConfig(**flags))
    whole(idx[:, :-1], idx[:, 1:])
    for rows in idx.split(1):
        parts(rows[:, :-1], rows[:, 1:])
        assert not parts.h[0].ffn.choice_bias.any(), 'not before the optimizer steps'
    whole.balance_experts(), parts.balance_experts()
    bias = whole.h[0].ffn.choice_bias
    assert bias.any() and torch.equal(bias, parts.h[0].ffn.choice_bias)
    assert all(abs(b) < 1e-9 or abs(b - 0.001) < 1e-9 for b in bias.abs().tolist())
    assert not whole.h[0].ffn.load.any()


def test_evaluation_counts_nothing():
    model, flags = build(toy(**MOE)), toy(**MOE)
    idx = tokens(flags, 2, 9)
    plain = model(idx[:, :-1], idx[:, 1:])[1]
    assert not model.h[0].ffn.load.any()
    want = F.cross_entropy(model(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())
    assert_close(plain, want, 1e-5, 'loss')


# ----------------------------------------------------------------------------------------------------------
# Rotary frequencies, worked out by hand


def freq(**flags):
    return build(toy(pos='rope', **flags)).wpe.freq.bits.view(torch.float32)


def test_linear_and_ntk_frequencies():
    plain = freq(head_dim=8)
    assert_close(freq(head_dim=8, rope_scaling='linear', rope_factor=4.0), plain / 4, 1e-6, 'linear')
    ntk = freq(head_dim=8, rope_scaling='ntk', rope_factor=4.0)
    assert ntk[0] == plain[0]
    # the slowest pair is stretched by the whole factor
    assert abs(ntk[-1] * 4 - plain[-1]) < 1e-6 * plain[-1]


def test_yarn_frequencies():
    # D = 128, theta = 10000, context 4096, factor 16: pair(r) = 128 ln(4096 / (2 pi r)) / (2 ln 10000)
    # pair(32) = 20.94 -> 20; pair(1) = 45.03 -> 46
    got = freq(head_dim=128, rope_scaling='yarn', rope_factor=16.0, rope_context=4096)
    plain = [10000 ** (-2 * j / 128) for j in range(64)]
    assert abs(got[0] - 1.0) < 1e-6
    assert abs(got[20] / plain[20] - 1) < 1e-6
    # pair 33 is halfway up the ramp: the mean of both frequencies
    assert abs(got[33] / (plain[33] * (0.5 + 0.5 / 16)) - 1) < 1e-5
    assert abs(got[46] * 16 / plain[46] - 1) < 1e-6 and abs(got[63] * 16 / plain[63] - 1) < 1e-6
    model = build(toy(pos='rope', head_dim=128, rope_scaling='yarn', rope_factor=16.0, rope_context=64))
    cos, _ = model.wpe.rope(torch.tensor([0]))[0]
    assert abs(cos[0, 0].item() - (0.1 * math.log(16) + 1)) < 1e-6


@pytest.mark.parametrize('length, times', [(4, 1.0), (8, 1.0), (12, 3 * 1.5 - 2), (16, 3 * 2 - 2)])
def test_dynamic_frequencies(length, times):
    # theta (factor length / context - (factor - 1))^(D / (D - 2)) beyond the context, and theta up to it
    model = build(toy(pos='rope', rope_scaling='dynamic', rope_factor=3.0, rope_context=8))
    theta = 10000 * times ** (8 / 6)
    (cos, sin), _ = model.wpe.rope(torch.tensor([1]), length)
    want = torch.tensor([[theta ** (-2 * j / 8) for j in range(4)]])
    assert_close(torch.atan2(sin, cos), want, 1e-5, 'angles of position 1')


def test_longrope_frequencies():
    divisors = {'rope_short': (1.0, 1.5, 2.0, 3.0), 'rope_long': (2.0, 3.0, 5.0, 9.0)}
    model = build(toy(pos='rope', rope_scaling='longrope', rope_factor=4.0, rope_context=8, **divisors))
    magnitude = math.sqrt(1 + math.log(4) / math.log(8))
    for length, name in ((8, 'rope_short'), (9, 'rope_long')):
        (cos, sin), _ = model.wpe.rope(torch.tensor([1]), length)
        want = torch.tensor([[10000 ** (-j / 4) / divisors[name][j] for j in range(4)]])
        assert_close(torch.atan2(sin, cos), want, 1e-5, name)
        assert_close(cos ** 2 + sin ** 2, torch.full((1, 4), magnitude ** 2), 1e-5, 'magnitude')


def test_llama3_frequencies():
    got = freq(head_dim=128, rope_theta=500000.0, rope_scaling='llama3', rope_factor=8.0, rope_context=8192)
    for j, f in enumerate(500000 ** (-2 * j / 128) for j in range(64)):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            want = f
        elif wavelength > 8192:
            want = f / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * f / 8 + smooth * f
        assert abs(got[j].item() / want - 1) < 1e-5, j


@pytest.mark.parametrize('scaling', ['none', 'linear', 'ntk', 'dynamic', 'yarn', 'llama3'])
def test_scores_depend_on_the_distance_alone(scaling):
    more = {} if scaling == 'none' else {'rope_scaling': scaling, 'rope_factor': 4.0}
    model = build(toy(pos='rope', **more))
    from kernels import rope
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(m, n):
        turned = [rope(x, *model.wpe.rope(torch.tensor([p]), 100)[0]) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()
    for m, n in ((3, 1), (20, 5), (7, 7)):
        for shift in (1, 13, 60):
            assert abs(score(m, n) - score(m + shift, n + shift)) < 1e-4


# ----------------------------------------------------------------------------------------------------------
# Latent and differential attention


def test_absorbed_attention_equals_the_expanded():
    flags = toy(pos='rope', norm='rmsnorm', attn='mla')
    mixer = scaled(build(flags), 5).h[0].mixer
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    rope = build(flags).wpe.rope(torch.arange(6))
    want = mixer(x, Context(torch.arange(6), True, rope))
    cache = mixer.new_cache(2, 6, torch.float32, 'cpu')
    got = mixer(x, Context(torch.arange(6), False, rope), cache)   # by positions, from what the cache holds
    assert_close(got, want, 1e-5, 'absorbed')


def test_latent_cache_holds_no_heads():
    config = GPTConfig(**toy(pos='rope', attn='mla', kv_rank=12, rope_head_dim=6, head_dim=64))
    per_token = kv_cache_bytes(config, 100, 1, 4) / 100 / config.n_layer
    assert per_token == 4 * (12 + 6) + 4   # latent, rotated key, and the position in int32


def test_differential_attention_equals_its_definition():
    flags = toy(attn='diff', pos='none', norm='rmsnorm', bias=False)
    model = scaled(build(flags), 10)
    for layer, block in enumerate(model.h):
        mixer = block.mixer
        x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(layer))
        q, k, v = (x @ mixer.c_attn.weight.T).view(1, 5, 12, 8).split(4, dim=2)
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        q1, k1, q2, k2 = mixer.lambdas
        weight = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + start
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        heads = []
        for pair in range(2):
            raw = [q[0, :, 2 * pair + i] @ k[0, :, 2 * pair + i].T / 8 ** 0.5 for i in (0, 1)]
            a, b = (scores.masked_fill(~mask, -math.inf).softmax(-1) for scores in raw)
            y = (a - weight * b) @ v[0, :, 2 * pair:2 * pair + 2].flatten(1)
            heads.append(F.rms_norm(y, (16,), mixer.head_norm.weight, 1e-5) * (1 - start))
        want = torch.cat(heads, dim=-1) @ mixer.c_proj.weight.T
        assert_close(mixer(x, Context(torch.arange(5), True, None))[0], want, 1e-5, f'layer {layer}')


# ----------------------------------------------------------------------------------------------------------
# The residual stream


@pytest.mark.parametrize('residual, want', [
    ('serial', lambda x, mix, ffn, n1, n2, s: (y := x + s * mix(n1(x))) + s * ffn(n2(y))),
    ('parallel', lambda x, mix, ffn, n1, n2, s: x + s * mix(n1(x)) + s * ffn(n2(x))),
    ('shared', lambda x, mix, ffn, n1, n2, s: x + s * mix(n1(x)) + s * ffn(n1(x))),
    ('normed', lambda x, mix, ffn, n1, n2, s: (y := n2(n1(x) + s * mix(n1(x)))) + s * ffn(y)),
])
def test_residual_equals_its_definition(residual, want):
    model = scaled(build(toy(residual=residual, residual_scale=0.3, norm='rmsnorm')), 5)
    block, x = model.h[1], torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    ctx = Context(torch.arange(6), True, None)
    got = block(x, ctx)
    parts = (lambda y: block.mixer(y, ctx)), (lambda y: block.ffn(y, ctx)), block.ln_1, block.ln_2
    assert_close(got, want(x, *parts, 0.3), 1e-6, residual)


def attended(mixer, x, ctx):
    """The queries, keys and values with which a layer attends."""
    seen = []
    hook = mixer.scores.register_forward_pre_hook(lambda module, args: seen.extend(args[:3]))
    mixer(x, ctx)
    hook.remove()
    return seen


def test_embeddings_enter_where_their_flags_say():
    flags = toy(embed_scale=3.0, embed_norm=True, embed_skip=True, value_embed=True, pos='none', n_kv_head=2)
    model, idx = scaled(build(flags), 5), tokens(toy(), 1, 7)
    start = model.ln_e(3.0 * model.wte.weight[idx])
    values, x = model.vte.weight[idx].view(1, 7, 2, 8), start
    ctx = Context(torch.arange(7), True, None, given=Given(values=torch.zeros(())))
    for layer, block in enumerate(model.h):
        if layer:
            x = block.skip[0] * x + block.skip[1] * start
        mixer, y = block.mixer, block.ln_1(x)
        q, k, v = attended(mixer, y, ctx)   # with values of zero in ctx
        v = v + mixer.value_scale * values
        x = x + mixer.c_proj(mixer.scores(q, k, v, ctx, ctx.pos).flatten(2))
        x = x + block.ffn(block.ln_2(x), ctx)
    assert_close(model(idx)[0], model.ln_f(x) @ model.wte.weight.T, 1e-5, 'logits')


def test_queries_without_rope_grow_with_the_log_of_their_position():
    flags = toy(pos='rope', layer_pattern='an', temp_scale=0.5, temp_floor=4)
    mixer = scaled(build(flags), 5).h[1].mixer
    plain = scaled(build({k: v for k, v in flags.items() if 'temp' not in k}), 5).h[1].mixer
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    ctx = Context(torch.arange(12), True, None)
    growth = [1 + 0.5 * math.log(1 + math.floor((t + 1) / 4)) for t in range(12)]
    want = attended(plain, x, ctx)[0] * torch.tensor(growth).view(1, -1, 1, 1)
    assert_close(attended(mixer, x, ctx)[0], want, 1e-6, 'queries')


def test_chunks_see_themselves_alone():
    flags = toy(layer_pattern='c', window=5, pos='rope', block_size=24)
    model, whole = scaled(build(flags), 5), scaled(build(toy(pos='rope')), 5)
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(0))
    pos = torch.arange(13)
    got = model.h[0].mixer(x, Context(pos, True, model.wpe.rope(pos)))
    for start in (0, 5, 10):
        piece = slice(start, start + 5)
        ctx = Context(pos[piece], True, model.wpe.rope(pos[piece]))
        assert_close(got[:, piece], whole.h[0].mixer(x[:, piece], ctx), 1e-5, f'chunk from {start} on')


# ----------------------------------------------------------------------------------------------------------
# Counting


def test_further_predictions_cost_floating_point_operations_and_no_active_parameters():
    flags = toy(**MOE)
    one, three = build(flags), build(flags | {'n_predict': 3})
    assert three.num_params(active=True) == one.num_params(active=True) < three.num_params()
    head, block = 61 * 32, (three.num_params() - one.num_params()) / 2
    more = three.flops_per_token(8) - one.flops_per_token(8)
    assert 2 * 6 * head < more < 2 * (6 * (head + block) + 12 * 32 * 8)


def test_differential_attention_counts_values_of_twice_the_width():
    flags = toy(pos='none')
    plain, diff = (build(flags | more).h[0].mixer.flops(10) for more in ({}, {'attn': 'diff'}))
    # per query head and key: 2 D for the score, and 2 D or 4 D for the sum, and thrice for both passes
    assert (plain, diff) == (4 * 3 * (2 + 2) * 8 * 10, 4 * 3 * (2 + 4) * 8 * 10)


def test_further_predictions_may_reach_beyond_the_text():
    model, idx = build(toy(n_predict=4)), tokens(toy(), 1, 3)
    loss = model.train()(idx[:, :-1], idx[:, 1:])[1]
    assert loss.isfinite()


# ----------------------------------------------------------------------------------------------------------
# Several tokens ahead


def test_further_tokens_count_in_training_alone():
    flags = toy(n_predict=3)
    model = scaled(build(flags), 5)
    idx = tokens(flags, 2, 12)
    x, targets = idx[:, :-1], idx[:, 1:]
    evaluated = model(x, targets)[1]
    one = build(toy())
    one.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('further')})
    assert torch.equal(evaluated, one(x, targets)[1])
    ctx = model.context(x, None, None)
    h = model.wpe(model.wte(x), ctx.pos)
    for block in model.h:
        h = block(h, ctx)
    extra = 0.0
    for k, block in enumerate(model.further, start=1):
        logits = model.lm_head(model.ln_f(block(h, ctx)))[:, :-k]
        extra += F.cross_entropy(logits.flatten(0, 1), targets[:, k:].flatten()) * 0.3 / 2
    assert_close(model.train()(x, targets)[1], evaluated + extra, 1e-5, 'three tokens')


# ----------------------------------------------------------------------------------------------------------
# Beyond the context that was trained on


def test_a_run_can_be_evaluated_at_another_length_and_scaling(tmp_path):
    model = build(toy(pos='rope'))
    state = checkpoint.contents(model)
    flags = {'block_size': 96, 'rope_scaling': 'yarn', 'rope_factor': 4.0}
    longer = checkpoint.build(state, 'ckpt.pt', flags)
    changed = checkpoint.overrides(state['config'], longer.config)
    assert changed == {'block_size': (24, 96), 'rope_scaling': ('none', 'yarn'), 'rope_factor': (1.0, 4.0),
                       'rope_context': (None, 24)}
    assert longer(tokens(toy(), 1, 96))[0].shape == (1, 96, 61)
    with pytest.raises(ValueError, match='do not fit its config'):
        checkpoint.build(state, 'ckpt.pt', {'n_layer': 3})
    with pytest.raises(ValueError, match='do not fit its config'):
        checkpoint.build(checkpoint.contents(build(toy())), 'ckpt.pt', {'block_size': 96})


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('more', [{'pos': 'alibi', 'n_head': 6, 'n_embd': 48}, {'sinks': True},
                                  {'softcap': 2.0}], ids=str)
def test_padding_gives_finite_numbers_in_16_bit(dtype, more):
    flags = toy(**more)
    model = build(flags).to(dtype)
    pos = torch.arange(8) - torch.tensor([[3], [0]])
    logits = model(tokens(flags, 2, 8), cache=model.new_cache(2, 8), pos=pos)[0]
    assert logits.isfinite().all()
    if model.config.pos == 'alibi':
        slopes = model.h[0].mixer.scores.slopes.view(torch.float32).flatten()
        assert torch.equal(slopes, AlibiPositions.slopes(6)), 'a cast must leave the slopes alone'
