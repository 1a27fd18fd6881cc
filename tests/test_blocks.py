"""The newer blocks one by one, against their papers' formulas and their dense or plain special cases."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, build, scaled, tokens, toy

import checkpoint
from model import GPT, Context, GPTConfig, MoE, alibi_slopes, kv_cache_bytes

MOE = dict(ffn_pattern='e', n_expert=4)


def moe_of(flags):
    return next(m for m in build(flags).modules() if isinstance(m, MoE))


# ----------------------------------------------------------------------------------------------------------
# Experts


def moe_by_loops(moe, x):
    """Every token through its experts, one at a time. x (N,C); for swiglu without biases."""
    scores = (x.double() @ moe.router.weight.double().T).softmax(-1)
    y = torch.zeros_like(x, dtype=torch.float64)
    for n, token in enumerate(x.double()):
        best = scores[n].topk(moe.c.n_expert_used).indices
        for e in best:
            gate, up = (moe.c_fc.weight[e].double() @ token).chunk(2)
            share = scores[n, e] / scores[n, best].sum()
            y[n] += share * (moe.c_proj.weight[e].double() @ (F.silu(gate) * up))
    return y


@pytest.mark.parametrize('used', [1, 2, 4])
def test_experts_equal_their_definition(used):
    moe = scaled(moe_of(toy(**MOE, n_expert_used=used, ffn='swiglu', bias=False)), 20)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    assert_close(moe(x, None), moe_by_loops(moe, x.flatten(0, 1)).view(2, 7, 32), 1e-5, 'experts')


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
    moe = scaled(moe_of(toy(**MOE, n_expert_used=1, ffn='swiglu', bias=False)), 20)
    moe.router.weight.data.zero_()
    moe.router.weight.data[2, 0] = 100.0
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 1.0
    y = moe(x, None)
    assert (y.abs().sum(-1) > 0).all()
    assert_close(y, moe_by_loops(moe, x.flatten(0, 1)).view(3, 8, 32), 1e-5, 'one busy expert')


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
    assert changed == {'block_size': 96, 'rope_scaling': 'yarn', 'rope_factor': 4.0, 'rope_context': 24}
    assert longer(tokens(toy(), 1, 96))[0].shape == (1, 96, 61)
    with pytest.raises(ValueError, match='another model'):
        checkpoint.build(state, 'ckpt.pt', {'n_layer': 3})
    with pytest.raises(ValueError, match='another model'):
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
        assert torch.equal(slopes, alibi_slopes(6)), 'a cast must leave the slopes alone'
