"""Wider residual streams and the gated attention unit, against definitions written as loops."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, build, scaled, tokens, toy

from model import GPTConfig, sinkhorn
from nanoblocks.training import parallel

PRE = dict(n_layer=3, pos='rope', norm='rmsnorm', norm_eps=1e-12)
FORMS = [{'residual': 'attnres'}, {'residual': 'attnres', 'attnres_size': 2},
         {'residual': 'attnres', 'attnres_size': 3}, {'residual': 'hyper'},
         {'residual': 'hyper', 'hyper_dynamic': False, 'n_stream': 3}, {'residual': 'mhc'},
         {'residual': 'mhc', 'n_stream': 2, 'sinkhorn_steps': 3}]
every_form = pytest.mark.parametrize('form', FORMS, ids=str)
BESIDE = [{}, {'ffn_pattern': '-'}, {'n_predict': 3}, {'norm_at': 'output', 'residual_scale': 0.5},
          {'norm_at': 'sandwich'}, {'causal': False}, {'ffn_pattern': 'fe', 'n_expert': 4}]


def run(model, idx):
    """[what a branch makes of what it reads, for each branch], the embedding, and what the head reads."""
    seen = {}
    first = model.h[0].register_forward_pre_hook(lambda block, args: seen.update(x=args[0], ctx=args[1]))
    last = model.h[-1].register_forward_hook(lambda block, args, out: seen.update(out=out))
    model(idx)
    first.remove(), last.remove()
    branches = []
    for block in model.h:
        branches.append(lambda h, b=block: b.scale * b.ln_1_out(b.mixer(b.ln_1(h), seen['ctx'])))
        if block.ffn is not None:
            branches.append(lambda h, b=block: b.scale * b.ln_2_out(b.ffn(b.ln_2(h), seen['ctx'])))
    return branches, seen['x'], seen['out']


# ----------------------------------------------------------------------------------------------------------
# Definitions, one token at a time


def depth_attention(query, sources):
    """query (C,), sources: a list of (B,T,C)"""
    y = torch.zeros_like(sources[0])
    for b in range(y.shape[0]):
        for t in range(y.shape[1]):
            keys = [x[b, t] / math.sqrt(x[b, t].square().mean().item() + 1e-12) for x in sources]
            scores = [math.exp((query @ key).item()) for key in keys]
            for x, score in zip(sources, scores):
                y[b, t] += score / sum(scores) * x[b, t]
    return y


def attnres_by_loops(model, branches, x):
    size, blocks = model.config.attnres_size, list(model.h)
    queries = [q for b in blocks for q in (b.query_1, b.query_2)][:2 * len(blocks)]
    queries[0] = torch.zeros_like(x[0, 0])      # one source alone
    done, outputs = [x], []     # sums of `size` outputs; the outputs since then
    for query, branch in zip([q for q in queries if q is not None], branches, strict=True):
        sources = done + ([sum(outputs)] if outputs else [])
        outputs.append(branch(depth_attention(query, sources)))
        if len(outputs) == size:
            done, outputs = [*done, sum(outputs)], []
    return depth_attention(blocks[-1].query_out, done + ([sum(outputs)] if outputs else []))


def connection_by_loops(connection, streams, form):
    """streams: n vectors (C,) -> read_i, write_j, mix[i][j] as numbers"""
    n = len(streams)
    if form['residual'] == 'hyper':
        read, write, mix = connection.read.tolist(), connection.write.tolist(), connection.mix.tolist()
        if connection.norm is not None:
            W, (a, b) = connection.dynamic.weight, connection.scale.tolist()
            for i, x in enumerate(streams):
                normed = x / math.sqrt(x.square().mean().item() + 1e-12) * connection.norm.weight
                own = [math.tanh((row @ normed).item()) for row in W]
                read[i] += a * own[0]
                write[i] += b * own[1]
                mix[i] = [m + a * w for m, w in zip(mix[i], own[2:])]
        return read, write, mix
    flat = torch.cat(streams)
    own = (connection.dynamic.weight @ (flat / math.sqrt(flat.square().mean().item() + 1e-12))).tolist()
    a, b, c = connection.scale.tolist()
    read = [1 / (1 + math.exp(-(a * own[i] + connection.read_bias[i].item()))) for i in range(n)]
    write = [2 / (1 + math.exp(-(b * own[n + i] + connection.write_bias[i].item()))) for i in range(n)]
    mix = [[math.exp(c * own[2 * n + n * i + j] + connection.mix_bias[i, j].item()) for j in range(n)]
           for i in range(n)]
    for _ in range(form.get('sinkhorn_steps', 20)):
        mix = [[m / sum(row) for m in row] for row in mix]
        sums = [sum(row[j] for row in mix) for j in range(n)]
        mix = [[m / total for m, total in zip(row, sums)] for row in mix]
    return read, write, mix


def hyper_by_loops(model, branches, x, form):
    n, (B, T, _) = model.config.n_stream, x.shape
    connections = [c for b in model.h for c in (b.hyper_1, b.hyper_2) if c is not None]
    streams = [[[x[b, t]] * n for t in range(T)] for b in range(B)]
    for connection, branch in zip(connections, branches, strict=True):
        h, weights = torch.zeros_like(x), {}
        for b in range(B):
            for t in range(T):
                weights[b, t] = read, _, _ = connection_by_loops(connection, streams[b][t], form)
                h[b, t] = sum(r * s for r, s in zip(read, streams[b][t]))
        y = branch(h)
        for (b, t), (_, write, mix) in weights.items():
            old = streams[b][t]
            streams[b][t] = [sum(mix[i][j] * old[i] for i in range(n)) + write[j] * y[b, t] for j in range(n)]
    return torch.stack([torch.stack([sum(token) / n for token in row]) for row in streams])


@torch.no_grad()
@pytest.mark.parametrize('beside', [{}, {'ffn_pattern': '-'}, {'norm_at': 'output', 'residual_scale': 0.5}],
                         ids=str)
@every_form
def test_a_wide_stream_equals_its_definition(form, beside):
    if 'ffn_pattern' in beside and form.get('attnres_size', 1) == 3:
        pytest.skip('sums of an odd number of branches are counted as if every layer had two')
    if beside.get('ffn_pattern') == '-' and form.get('attnres_size') == 2:
        beside, size = beside | {'attnres_size': 2}, 1      # two branches of which one is missing
    else:
        size = form.get('attnres_size', 1)
    model = scaled(build(toy(**PRE | form | beside)), 4).double()
    for name, p in model.named_parameters():
        if name.endswith('scale') and 'hyper' in name:
            p.fill_(0.7)    # so that what depends on the token weighs as much as what does not
    branches, x, got = run(model, tokens(toy(), 2, 5))
    if form['residual'] == 'attnres':
        model.config.attnres_size = size
        want = attnres_by_loops(model, branches, x)
    else:
        want = hyper_by_loops(model, branches, x, form)
    assert_close(got, want, 1e-6, str(form))


@torch.no_grad()
@every_form
def test_a_wide_stream_starts_as_the_plain_model(form):
    idx = tokens(toy(), 2, 9)
    # what multi-token prediction reads has another size behind attention residuals: a mean, not a sum
    further = {} if form['residual'] == 'attnres' else {'n_predict': 2}
    for beside in ({}, further, {'ffn_pattern': '-'}):
        wide, plain = (build(toy(**PRE | beside | more)).double() for more in (form, {}))
        assert_close(wide(idx)[0], plain(idx)[0], 1e-5, f'{form} beside {beside}')
        losses = [model.train()(idx[:, :-1], idx[:, 1:])[1] for model in (wide, plain)]
        assert_close(*losses, 1e-5, f'loss of {form} beside {beside}')


@torch.no_grad()
def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    logits = torch.randn(50, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mix = sinkhorn(logits, 20)
    assert (mix > 0).all()
    assert_close(mix.sum(-2), torch.ones(50, 4), 1e-12, 'columns')
    assert_close(mix.sum(-1), torch.ones(50, 4), 1e-4, 'rows')
    for row, column in ((0, 1), (1, 3), (2, 2)):    # whatever the size of the logits, and they may be large
        hard = sinkhorn(30 * torch.eye(4).roll((row, column), (0, 1)), 20)
        assert hard.isfinite().all()


@torch.no_grad()
def test_mixing_never_makes_streams_grow():
    model = scaled(build(toy(residual='mhc', **PRE)), 4)
    connection = model.h[1].hyper_1
    x = torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        x = connection(x, torch.zeros_like)
    assert x.abs().max() < 5 and x.isfinite().all()


@torch.no_grad()
def test_mhc_equals_the_connections_of_deepseek_v4():
    transformers = pytest.importorskip('transformers')
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs
    module = theirs.DeepseekV4HyperConnection(transformers.DeepseekV4Config(
        hidden_size=32, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=0.0, rms_norm_eps=1e-5))
    ours = scaled(build(toy(residual='mhc')), 4).h[1].hyper_2
    ours.scale.copy_(torch.tensor([0.7, 0.8, 0.9]))
    module.fn.copy_(ours.dynamic.weight)
    module.base.copy_(torch.cat((ours.read_bias, ours.write_bias, ours.mix_bias.flatten())))
    module.scale.copy_(ours.scale)
    x = torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(0))
    post, comb, collapsed = module(x)
    seen = []
    got = ours(x, lambda h: seen.append(h) or torch.tanh(h))
    assert_close(seen[0], collapsed, 1e-5, 'what the branch reads')
    want = comb.mT @ x + post.unsqueeze(-1) * torch.tanh(collapsed).unsqueeze(-2)
    assert_close(got, want, 1e-5, 'the streams behind it')


# ----------------------------------------------------------------------------------------------------------
# Training


def mixing(model):
    """{name: parameter} of all that weights sources and streams."""
    return {name: p for name, p in model.named_parameters() if 'hyper_' in name or '.query_' in name}


@pytest.mark.parametrize('form', [form for form in FORMS if 'sinkhorn_steps' not in form], ids=str)
def test_mixing_weights_leave_their_start(form):
    """With streams that stay alike, the matrix that mixes them would get no gradient, and never change."""
    model = build(toy(**form, n_layer=3)).train()
    start = {name: p.detach().clone() for name, p in mixing(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    idx = tokens(toy(), 16, 17)
    for _ in range(11):
        optimizer.zero_grad(set_to_none=True)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    for name, p in mixing(model).items():
        # the first matrix mixes streams that are alike, the last one streams of which the head takes the mean
        if name in ('h.0.hyper_1.mix_bias', 'h.2.hyper_2.mix_bias'):
            continue
        # rounding alone gives gradients of about 1e-11
        assert p.grad.abs().max() > 1e-8, f'{name}: its gradient after ten steps is {p.grad.abs().max():.1e}'
        assert (p - start[name]).abs().max() > 1e-3, f'{name} has not left its start'


@pytest.mark.parametrize('form', [FORMS[2], FORMS[3], FORMS[5]], ids=str)
def test_activation_checkpointing_changes_no_gradient(form):
    idx, found = tokens(toy(), 4, 17), []
    for recompute in (False, True):
        model = build(toy(**form, n_layer=3, n_predict=2)).train()
        fast, _ = parallel.wrap(model, 'float32', False, recompute, sharded=False)
        fast(idx[:, :-1], idx[:, 1:])[1].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@torch.no_grad()
@pytest.mark.parametrize('form', [FORMS[2], FORMS[3], FORMS[5]], ids=str)
@pytest.mark.parametrize('beside', BESIDE, ids=str)
def test_a_wide_stream_keeps_its_number_format(form, beside):
    model = build(toy(**form, pos='rope', **beside)).bfloat16()
    assert model(tokens(toy(), 2, 9))[0].dtype == torch.bfloat16
    widths = []
    for block in model.h:
        block.register_forward_pre_hook(lambda block, args: widths.append(args[0]))
    model(tokens(toy(), 2, 9))
    for x in widths:
        assert all(t.dtype == torch.bfloat16 for t in (x if isinstance(x, tuple) else (x,)))


def test_what_a_wide_stream_cannot_be_beside_is_refused():
    for form in FORMS:
        with pytest.raises(ValueError, match='embed_skip=True must be False when residual='):
            GPTConfig(**toy(**form, embed_skip=True))
        with pytest.raises(ValueError, match='must be serial when norm_at=post'):
            GPTConfig(**toy(**form, norm_at='post'))
        with pytest.raises(ValueError, match='must be serial when there is an encoder'):
            GPTConfig(**toy(**form, n_encoder=1))


# ----------------------------------------------------------------------------------------------------------
# Gated attention unit


def gau_by_loops(mixer, x, block_size, window=None):
    """x (T,C), for one text; rotated as pairs of coordinates that are half a head apart."""
    T, (I, _, D) = len(x), mixer.widths
    hidden = [F.silu(mixer.in_proj.weight @ token + mixer.in_proj.bias) for token in x]

    def turned(vector, t):
        y = vector.clone()
        for j in range(D // 2):
            angle = t * 10000.0 ** (-2 * j / D)
            y[j] = vector[j] * math.cos(angle) - vector[j + D // 2] * math.sin(angle)
            y[j + D // 2] = vector[j + D // 2] * math.cos(angle) + vector[j] * math.sin(angle)
        return y
    rows = []
    for t in range(T):
        gate, z = hidden[t][:I], hidden[t][2 * I:]
        total = torch.zeros(I, dtype=x.dtype)
        for s in range(t + 1):
            if window and t - s >= window:
                continue
            q = turned(z * mixer.gain[0] + mixer.offset[0], t)
            k = turned(hidden[s][2 * I:] * mixer.gain[1] + mixer.offset[1], s)
            bias = turned(mixer.distance[0], t) @ turned(mixer.distance[1], s)
            total += max(0.0, (q @ k / block_size + bias).item()) ** 2 * hidden[s][I:2 * I]
        rows.append(mixer.c_proj.weight @ (gate * total) + mixer.c_proj.bias)
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize('more', [{}, {'layer_pattern': 'w', 'window': 3}, {'gau_width': 10, 'head_dim': 6}],
                         ids=str)
def test_gau_equals_its_definition(more):
    model = scaled(build(toy(attn='gau', pos='rope', ffn_pattern='-', **more)), 10).double()
    seen = []
    hook = model.h[1].mixer.register_forward_hook(lambda mixer, args, y: seen.append((mixer, args[0], y)))
    model(tokens(toy(), 2, 7))
    hook.remove()
    mixer, x, y = seen[0]
    want = torch.stack([gau_by_loops(mixer, row, 24, more.get('window')) for row in x])
    assert_close(y, want, 1e-6, 'GAU')


def test_gau_learns_from_its_first_step():
    # drawn as in the paper, a small layer may begin with no weight at any distance
    for seed in range(5):
        model = build(toy(attn='gau', pos='rope', ffn_pattern='-', n_layer=3), seed=seed).train()
        idx = tokens(toy(), 4, 17)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        for name, p in model.named_parameters():
            assert p.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize('flags, words', [
    ({'pos': 'learned'}, 'pos=learned must be rope'),
    ({'layer_pattern': 'an'}, 'pos=rope must be rope, in every layer'),
    ({'n_kv_head': 2}, 'n_kv_head=2 must be 4'), ({'softcap': 3.0}, 'softcap=3.0 must be None'),
    ({'attn_gate': 'head'}, 'attn_gate=head must be none'),
    ({'qk_norm': True}, 'qk_norm=True must be False')])
def test_what_gau_does_not_have_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**toy(attn='gau', **{'pos': 'rope'} | flags))
