"""The model: every family at toy size, and every part against its definition or an independent library."""
import copy
import inspect
import itertools
import json
import math
from dataclasses import asdict

import conftest
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_close, build, every_decoder, every_family, reading, scaled, tokens, toy

import kernels as ops
import model as model_file
from model import (
    FFN,
    GPT,
    NORM_AT,
    NORMS,
    POSITIONS,
    AlibiPositions,
    Context,
    GPTConfig,
    LayerSpan,
    SoftmaxAttention,
    dense,
)
from nanoblocks.decoding.decode import Sampling, key
from nanoblocks.training import checkpoint

LLAMA = toy(pos='rope', norm='rmsnorm', ffn='swiglu', bias=False, tie=False, n_kv_head=2)

# ----------------------------------------------------------------------------------------------------------
# Every family


@every_family
def test_loss_at_start_is_that_of_guessing(flags):
    # The final norm leaves x with mean square one and the head has std 0.02, so logits have std
    # s = 0.02 sqrt(C) = 0.11. That raises the mean loss above ln V by s^2 / 2 = 0.006, and the mean over 96
    # random targets scatters by s / sqrt(96) = 0.012: 0.1 is far outside both, and far below what another
    # init would give.
    idx = tokens(flags, 5, 24)
    loss = build(flags)(idx[:4], idx[1:])[1].item()
    assert abs(loss - math.log(flags['vocab_size'])) < 0.1, f'{loss} must be near ln V'


@every_decoder
def test_no_logit_depends_on_later_tokens(flags):
    model, T = scaled(build(flags), 5), flags['block_size']
    assert_causal(model, tokens(flags, 1, T))


@torch.no_grad()
def assert_causal(model, idx):
    # row t has another token at t: the same shapes in both passes, so what is equal is equal bit for bit. But
    # for recurrences: the decays of later tokens round the factors of earlier ones
    c = model.config
    exact = 'r' not in c.mixers()
    model = model if exact else copy.deepcopy(model).double()

    def same(a, b):
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=0, atol=1e-11)
    T, V = idx.shape[1], c.vocab_size
    idx = idx.repeat(T, 1)
    changed = torch.where(torch.eye(T, dtype=torch.bool), (idx + 1) % V, idx)
    before, after = model(idx)[0], model(changed)[0]
    for t in range(T):
        assert same(before[t, :t], after[t, :t]), f'a logit before {t} depends on token {t}'
        for later in range(t, min(t + 2, T)):
            # a token that begins a chunk sees no other, and a window with gaps not the token before
            alone = later > t and c.window and (set(c.mixers()) == {'c'} and later % c.window == 0
                                                or set(c.mixers()) <= {'w', 'v'} and c.window_dilation > 1)
            seen = not same(before[t, later], after[t, later])
            assert seen or alone, f'the logits of {later} do not depend on token {t}'


@every_family
def test_every_parameter_gets_a_gradient(flags):
    assert_gradients(build(flags))


def assert_gradients(model):
    c = model.config
    idx = tokens(asdict(c), 9, c.block_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    # with projections that start at zero, as some of RWKV's do, what lies on their other side has its first
    # gradient in the second step, or with both in the third; so has what multiplies a weight of streams that
    # is zero at first, and an encoder or a shared block behind such projections
    late = c.zero_init * (1 + (c.n_encoder > 0) + ('z' in c.mixers())) + (c.residual in ('hyper', 'mhc'))
    for _ in range(1 + late + ('r' in c.mixers())):
        optimizer.zero_grad(set_to_none=True)
        model(idx[:8], idx[1:])[1].backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, f'{name} gets no gradient'
            assert p.grad.isfinite().all(), f'{name}: its gradient must be finite'
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad.any(), f'{name}: its gradient is zero everywhere'


@every_family
def test_one_batch_can_be_learned_by_heart(flags):
    model, idx = build(flags).train(), tokens(flags, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        optimizer.zero_grad(set_to_none=True)
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2, f'after 80 steps on one batch the loss is {loss.item():.3f}'


@every_family
def test_config_survives_a_round_trip(flags):
    config = GPTConfig(**flags)
    assert GPTConfig(**asdict(config)) == config
    assert GPTConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize('path', conftest.config_files(), ids=lambda path: path.stem)
def test_config_file_makes_a_model_and_names_no_unknown_flag(path):
    GPTConfig(**conftest.flags_of(path))


def assert_compiled_equals_eager(flags, backend):
    idx = tokens(flags, 3, 17)
    eager = scaled(build(flags), 5).train()
    inner = scaled(build(flags), 5).train()
    compiled = torch.compile(inner, fullgraph=True, backend=backend)
    losses = []
    for m in (eager, compiled):
        torch.manual_seed(0)  # of dropout
        loss = m(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        losses.append(loss)
    assert_close(losses[1], losses[0], 1e-5, 'loss')
    largest = max(p.grad.abs().max() for p in eager.parameters())
    for (name, p), q in zip(eager.named_parameters(), inner.parameters()):
        # beside a gradient that all but cancels, what it is summed from is the measure of its rounding
        error, bound = (q.grad - p.grad).abs().max(), 1e-4 * p.grad.abs().max() + 1e-6 * largest
        assert error <= bound, f'gradient of {name}: error {error:.2e} must be at most {bound:.2e}'


@every_family
def test_checkpoint_gives_the_same_logits(flags, tmp_path):
    assert_checkpoint_is_exact(flags, tmp_path / 'ckpt.pt')


def assert_checkpoint_is_exact(flags, path):
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 16)
    checkpoint.save(path, checkpoint.contents(model, settings={}, meta={}, step=0))
    again = reading(checkpoint.build(checkpoint.load(path), path).eval())
    assert again.config == model.config
    assert torch.equal(again(idx)[0], model(idx)[0])


@every_family
def test_loss_is_the_cross_entropy_of_the_logits(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 3, 20)
    idx, targets = idx[:, :-1], idx[:, 1:].clone()
    logits, none = model(idx)
    assert none is None and logits.shape == (3, 19, flags['vocab_size'])
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(model(idx, targets)[1], want, 1e-5, 'loss')
    targets[0] = -1
    targets[2, ::3] = -1
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert_close(model(idx, targets)[1], want, 1e-5, 'loss with some targets ignored')


@every_family
def test_last_only_is_the_last_of_all(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 3, 20)
    last = model(idx, last_only=True)[0]
    assert_close(last, model(idx)[0][:, -1:], 1e-5, 'logits')


@every_family
def test_batch_rows_do_not_meet(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 3, 20)
    together = model(idx)[0]
    for row in range(3):
        assert_close(model(idx[row:row + 1])[0], together[row:row + 1], 1e-5, f'logits of row {row}')


@every_family
def test_every_parameter_has_one_kind(flags):
    model = build(flags)
    kinds = model.param_kinds()
    assert kinds.keys() == dict(model.named_parameters()).keys()
    assert set(kinds.values()) <= {'matrix', 'experts', 'embedding', 'vector'}
    assert kinds['wte.weight'] == 'embedding' and kinds.get('lm_head.weight', 'embedding') == 'embedding'
    for name, p in model.named_parameters():
        assert kinds[name] != 'matrix' or p.dim() == 2, f'{name}: Muon takes 2-D matrices only'


# rope and sinusoidal keep their frequencies in buffers, and sample.py casts the whole model
@every_family
def test_positions_stay_exact_in_a_model_cast_to_bfloat16(flags):
    pos = torch.arange(0, 5000, 7)
    x = torch.zeros(len(pos), flags['n_embd'])
    full, cast = build(flags), build(flags).to(torch.bfloat16)
    if full.wpe.max_tokens is not None:
        pos, x = pos[pos < full.wpe.max_tokens], x[pos < full.wpe.max_tokens]
    angles = (full.wpe.rope(pos) or [None])[0]
    if angles is not None:
        for got, want in zip(cast.wpe.rope(pos)[0], angles):
            assert_close(got, want, 1e-6, 'cos or sin of the angles')
    assert_close(cast.wpe(x.to(torch.bfloat16), pos), full.wpe(x, pos), 0.01, 'position embedding')


def test_sinusoids_stay_exact_in_a_model_cast_to_bfloat16():
    test_positions_stay_exact_in_a_model_cast_to_bfloat16(toy(pos='sinusoidal'))


# ----------------------------------------------------------------------------------------------------------
# Counting


@pytest.fixture
def on_meta(monkeypatch):
    """Models of any size, without weights."""
    monkeypatch.setattr(GPT, 'init_weights', lambda self, seed: None)
    with torch.device('meta'):
        yield


# as published: GPT-2's four sizes by OpenAI's checkpoints, TinyLlama's by its own
@pytest.mark.parametrize('name, count', [('gpt2_small', 124_439_808), ('gpt2_medium', 354_823_168),
                                         ('gpt2_xl', 1_557_611_200), ('llama_1b', 1_100_048_384)])
def test_parameters_are_as_many_as_published(name, count, on_meta):
    flags = conftest.flags_of(conftest.ROOT / 'config' / f'{name}.py')
    vocab = 32000 if name == 'llama_1b' else 50257
    assert GPT(GPTConfig(**({'vocab_size': vocab} | flags))).num_params() == count


def test_defaults_are_gpt2_124m(on_meta):
    gpt2 = GPT(GPTConfig())
    assert gpt2.num_params() == gpt2.num_params(active=True) == 124_439_808
    L, H, D, C, V, T = 12, 12, 64, 768, 50257, 1024
    assert gpt2.flops_per_token(T) == 6 * (L * 12 * C * C + C * V) + 12 * L * H * D * T


def test_flops_follow_the_matrices(on_meta):
    c = GPTConfig(**LLAMA | {'bias': True, 'head_dim': 12, 'ffn_width': 40, 'n_layer': 3})
    matmul = 3 * (32 * (4 + 2 + 2) * 12 + 4 * 12 * 32 + 32 * 2 * 40 + 40 * 32) + 32 * 61
    assert GPT(c).flops_per_token(100) == 6 * matmul + 12 * 3 * 4 * 12 * 100


@pytest.mark.parametrize('n_embd', [32, 48, 64, 128, 192, 256, 320, 384, 640, 768, 1024, 1600, 2048, 4096])
@pytest.mark.parametrize('ffn', ['swiglu', 'geglu'])
def test_gated_ffn_has_the_parameters_of_gelu(n_embd, ffn, on_meta):
    def count(word):
        c = GPTConfig(n_embd=n_embd, n_head=1, ffn=word, bias=False)
        return sum(p.numel() for p in dense(c, c.ffn_width).parameters())
    assert abs(count(ffn) / count('gelu') - 1) < 0.01


# ----------------------------------------------------------------------------------------------------------
# Parts against their definitions


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(definitions, table, what):
    """A new word of a table has to be defined here, too."""
    new = sorted(table.keys() - definitions.keys())
    assert not new, f'{what} has {new}, which the tests do not know: add the definition to {what.upper()}_IS'


def layer_norm(x, weight, bias, eps):
    mean = sum(x.tolist()) / len(x)
    variance = sum((v - mean) ** 2 for v in x.tolist()) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * weight + (0 if bias is None else bias)


def rms_norm(x, weight, bias, eps):
    return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps) * weight


NORMS_IS = {'layernorm': (layer_norm, lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps)),
            'rmsnorm': (rms_norm, lambda x, w, b, eps: F.rms_norm(x, w.shape, w, eps))}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('norm', NORMS)
def test_norm_equals_its_definition(norm, bias):
    known(NORMS_IS, NORMS, 'norms')
    layer = NORMS[norm](7, GPTConfig(norm=norm, bias=bias, norm_eps=0.1))
    for p in layer.parameters():
        p.data = randn(*p.shape, seed=1)
    x = 3 + randn(5, 7)
    weight, bias = layer.weight.detach(), getattr(layer, 'bias', None)
    bias = None if bias is None else bias.detach()
    for definition in NORMS_IS[norm]:
        want = torch.stack([definition(row, weight, bias, 0.1) for row in x])
        assert_close(layer(x), want, 1e-6, norm)


# what one hidden unit does, from its pre-activation or its gate
ACTIVATION = {
    'relu': lambda a: max(a, 0.0),
    'relu2': lambda a: max(a, 0.0) ** 2,
    'gelu': lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2,
    'swiglu': lambda a: a / (1 + math.exp(-a)),
    'gelu_tanh': lambda a: a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3))),
}
# the gate's, and what it multiplies
GATE = {
    'swiglu': lambda a, up: a / (1 + math.exp(-a)) * up,
    'geglu': lambda a, up: ACTIVATION['gelu_tanh'](a) * up,
    'geglu_erf': lambda a, up: ACTIVATION['gelu'](a) * up,
    'reglu': lambda a, up: max(a, 0.0) * up,
    'glu': lambda a, up: up / (1 + math.exp(-a)),
    'bilinear': lambda a, up: a * up,
    'swiglu_clip': lambda a, up: (max(-2, min(up, 2)) + 1) * min(a, 2) / (1 + math.exp(-1.5 * min(a, 2))),
}
FFN_IS = ACTIVATION | GATE


@pytest.mark.parametrize('ffn', FFN)
def test_ffn_equals_its_definition(ffn):
    known(FFN_IS, FFN, 'ffn')
    flags = {'ffn_limit': 2.0, 'ffn_alpha': 1.5} if ffn == 'swiglu_clip' else {}
    layer = dense(GPTConfig(**toy(ffn=ffn, ffn_width=5, n_embd=6, n_head=1, **flags)), 5)
    for n, p in enumerate(layer.parameters()):
        p.data = randn(*p.shape, seed=n + 1)
    x, gated = randn(2, 3, 6), ffn in GATE
    want = torch.zeros(2, 3, 6)
    for b in range(2):
        for t in range(3):
            hidden = (layer.c_fc.weight @ x[b, t] + layer.c_fc.bias).tolist()
            assert len(hidden) == (10 if gated else 5)
            units = [GATE[ffn](a, up) for a, up in zip(hidden[:5], hidden[5:])] if gated else list(
                map(ACTIVATION[ffn], hidden))
            want[b, t] = layer.c_proj.weight @ torch.tensor(units) + layer.c_proj.bias
    assert_close(layer(x, None), want, 1e-5, ffn)


# the residual stream x, a branch f and norms before it (a), on its output (o) and on the sum (s)
NORM_AT_IS = {
    'pre': lambda x, f, a, o, s: x + f(a(x)),
    'post': lambda x, f, a, o, s: s(x + f(x)),
    'output': lambda x, f, a, o, s: x + o(f(x)),
    'sandwich': lambda x, f, a, o, s: x + o(f(a(x))),
}


@pytest.mark.parametrize('norm_at', NORM_AT)
def test_norms_stand_where_norm_at_says(norm_at):
    known(NORM_AT_IS, NORM_AT, 'norm_at')
    model = scaled(build(toy(norm_at=norm_at)), 5)
    block, x, ctx = model.h[0], randn(2, 5, 32), Context(torch.arange(5), True, None)

    def norm(name):
        # an identity has no weight: where a norm must stand, one has to
        return lambda y: F.layer_norm(y, (32,), getattr(block, name).weight, getattr(block, name).bias, 1e-5)
    branches = (('ln_1', lambda y: block.mixer(y, ctx)), ('ln_2', lambda y: block.ffn(y, ctx)))
    want = x
    for ln, branch in branches:
        want = NORM_AT_IS[norm_at](want, branch, norm(ln), norm(f'{ln}_out'), norm(f'{ln}_sum'))
    assert_close(block(x, ctx), want, 1e-5, f'block with norm_at={norm_at}')
    # the residual stream is normalised exactly once before the head
    assert isinstance(model.ln_f, nn.Identity) == (norm_at == 'post')


def attend_by_loops(q, k, v, sees):
    """q (B,T,H,D), k and v (B,S,K,D), sees(b, t, s) -> bool"""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    y = torch.zeros(B, T, H, v.shape[-1])
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv = h * K // H
                keys = [s for s in range(S) if sees(b, t, s)]
                scores = [math.exp(torch.dot(q[b, t, h], k[b, s, kv]).item() / math.sqrt(D)) for s in keys]
                for s, score in zip(keys, scores):
                    y[b, t, h] += score / sum(scores) * v[b, s, kv]
    return y


def attention_by_loops(q, k, v, pos, key_pos, window=None, slopes=None, softcap=None, sinks=None):
    """
    Attention from its definition, one number at a time.
    q (B,T,H,D), k and v (B,S,K,D), pos and key_pos (B,T|S)
    """
    B, T, H, D = q.shape
    y = torch.zeros(B, T, H, v.shape[-1])
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        kh, weights = h * k.shape[2] // H, {}
        for s in range(k.shape[1]):
            distance = (pos[b][t] - key_pos[b][s]).item()
            if key_pos[b][s] < 0 or distance < 0 or window is not None and distance >= window:
                continue
            score = (q[b, t, h] @ k[b, s, kh]).item() / D ** 0.5
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            weights[s] = math.exp(score - (0 if slopes is None else slopes[h] * distance))
        total = sum(weights.values()) + (0 if sinks is None else math.exp(sinks[h]))
        for s, weight in weights.items():
            y[b, t, h] += weight / total * v[b, s, kh]
    return y


ALIBI_4 = [0.25, 0.0625, 0.015625, 0.00390625]  # of four heads, from the paper's rule
SINKS_4 = [0.5, -1.0, 2.0, 0.0]


@pytest.mark.parametrize('K', [1, 2, 4])
@pytest.mark.parametrize('window', [None, 1, 2, 3])
@pytest.mark.parametrize('more', [{}, {'slopes': ALIBI_4}, {'softcap': 0.7}, {'sinks': SINKS_4},
                                  {'slopes': ALIBI_4, 'softcap': 0.7, 'sinks': SINKS_4}], ids=str)
def test_attention_equals_its_definition_number_by_number(K, window, more):
    B, T, H, D = 2, 9, 4, 6

    def attend(q, pos, key_pos, in_order):
        tensors = {name: torch.tensor(value) for name, value in more.items() if name != 'softcap'}
        return ops.attention(q, k, v, pos, key_pos, D ** -0.5, window, in_order=in_order, **more | tensors)
    q, k, v = randn(B, T, H, D, seed=1), randn(B, T, K, D, seed=2), randn(B, T, K, D, seed=3)
    # tokens 0..T-1: the triangle, and blocks where the window is short
    pos = torch.arange(T)
    want = attention_by_loops(q, k, v, pos.expand(B, T), pos.expand(B, T), window, **more)
    assert_close(attend(q, pos, pos, True), want, 1e-5, 'in order')
    assert_close(attend(q, pos, pos, False), want, 1e-5, 'by positions')
    # slots in any order, empty ones, another row at another place
    key_pos = torch.tensor([[4, 5, -1, 3, 0, 1, 2, -1, 6], [-1, -1, 0, 1, 2, 3, 4, 5, 6]])
    pos = torch.tensor([[5, 6], [2, 3]])
    want = attention_by_loops(q[:, :2], k, v, pos, key_pos, window, **more)
    assert_close(attend(q[:, :2], pos, key_pos, False), want, 1e-5, 'slots')


@pytest.mark.parametrize('flags, want', [
    ({'layer_pattern': 'w', 'window': 3}, {'window': 3}),
    ({'layer_pattern': 'c', 'window': 3}, {'window': 3, 'chunked': True}),
    ({'layer_pattern': 'w', 'window': 3, 'window_dilation': 2, 'global_tokens': 1},
     {'window': 5, 'pattern': ops.Pattern(dilation=2, n_global=1)}),
    ({'layer_pattern': 'w', 'window': 3, 'window_stride': 4}, {'pattern': ops.Pattern(near=3, stride=4)}),
    ({'softcap': 0.7}, {'softcap': 0.7}),
    ({'attn_scale': 0.3}, {'scale': 0.3}),
    ({'pos': 'alibi'}, {'slopes': ALIBI_4}),
    ({'pos': 'alibi_bf16'}, {'slopes': ALIBI_4, 'alibi_bf16': True}),
    ({'sinks': True}, {'sinks': SINKS_4}),
    ({'dropout': 0.5}, {'dropout': 0.5}),
    ({'causal': False}, {'causal': False}),
    ({'attn': 'mla', 'kv_rank': 12, 'rope_head_dim': 6, 'pos': 'rope'}, {'scale': 14 ** -0.5}),
], ids=str)
def test_flags_reach_attention_and_nothing_else_does(flags, want, monkeypatch):
    model, called, attention = build(toy(n_layer=1, **flags)), [], ops.attention
    if 'sinks' in flags:
        dict(model.named_parameters())['h.0.mixer.scores.sinks'].data = torch.tensor(SINKS_4)

    def recorded(*args, **options):
        bound = inspect.signature(attention).bind(*args, **options)
        bound.apply_defaults()
        called.append(bound.arguments)
        return attention(*args, **options)
    monkeypatch.setattr(ops, 'attention', recorded)
    for training in (True, False):
        model.train(training)(tokens(toy(), 1, 7))
        got = {name: value.tolist() if isinstance(value, torch.Tensor) else value
               for name, value in called.pop().items() if name not in ('q', 'k', 'v', 'pos', 'key_pos')}
        plain = dict(scale=8 ** -0.5, window=None, chunked=False, softcap=None, slopes=None, alibi_bf16=False,
                     sinks=None, in_order=True, dropout=0.0, causal=True, relative=None, pattern=None)
        assert got == plain | want | ({} if training else {'dropout': 0.0}), f'training={training}'
    # whoever names positions may have padding among them
    model(tokens(toy(), 1, 7), pos=torch.arange(7))
    assert not called.pop()['in_order'] and not called


@pytest.mark.parametrize('n_head, slopes', [
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
    (4, ALIBI_4),
    # 2^-2, 2^-4, 2^-6, 2^-8 of four heads, then every other one of eight
    (6, [*ALIBI_4, 2 ** -1, 2 ** -3]),
])
def test_alibi_slopes(n_head, slopes):
    assert AlibiPositions.slopes(n_head).tolist() == slopes


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('qk_norm', [False, True])
@pytest.mark.parametrize('pos', ['none', 'rope'])
def test_attention_equals_its_definition(n_kv_head, qk_norm, bias, pos):
    model = scaled(build(toy(n_kv_head=n_kv_head, qk_norm=qk_norm, head_dim=6, bias=bias, pos=pos)), 5)
    mixer, x = model.h[0].mixer, randn(2, 5, 32)
    rows = (mixer.c_attn.weight @ x.mT).mT + (mixer.c_attn.bias if bias else 0)    # (B,T,(H+2K)D)
    q, k, v = [r.reshape(2, 5, -1, 6) for r in rows.split([4 * 6, n_kv_head * 6, n_kv_head * 6], dim=-1)]
    if qk_norm:
        q, k = [torch.stack([rms_norm(head, norm.weight, None, 1e-5) for head in r.reshape(-1, 6)]).view_as(r)
                for r, norm in ((q, mixer.q_norm), (k, mixer.k_norm))]
    if pos == 'rope':
        q, k = turned(q), turned(k)
    y = attend_by_loops(q, k, v, lambda b, t, s: s <= t).flatten(2)
    want = (mixer.c_proj.weight @ y.mT).mT + (mixer.c_proj.bias if bias else 0)
    ctx = Context(torch.arange(5), True, model.wpe.rope(torch.arange(5)))
    assert_close(mixer(x, ctx), want, 1e-5, 'attention')


def test_queries_and_keys_are_normed_after_they_rotate():
    model = scaled(build(toy(qk_norm='after', n_kv_head=2, head_dim=6, bias=False, pos='rope')), 5)
    mixer, x = model.h[0].mixer, randn(2, 5, 32)
    norms = mixer.q_norm_after, mixer.k_norm_after
    for norm in norms:
        norm.weight.data = 1 + 0.5 * randn(6)   # other weights at the two coordinates of a pair
    q, k, v = [r.reshape(2, 5, -1, 6) for r in (mixer.c_attn.weight @ x.mT).mT.split([24, 12, 12], dim=-1)]
    q, k = [torch.stack([rms_norm(head, norm.weight, None, 1e-5) for head in x.reshape(-1, 6)]).view_as(x)
            for x, norm in zip((turned(q), turned(k)), norms, strict=True)]
    y = attend_by_loops(q, k, v, lambda b, t, s: s <= t).flatten(2)
    ctx = Context(torch.arange(5), True, model.wpe.rope(torch.arange(5)))
    assert_close(mixer(x, ctx), (mixer.c_proj.weight @ y.mT).mT, 1e-5, 'attention')


def turned(x, theta=10000.0):
    """x (B,T,H,D) with coordinates j and j + D/2 of token t turned by the angle t theta^(-2j/D)."""
    y, half = x.clone(), x.shape[-1] // 2
    for t in range(x.shape[1]):
        for j in range(half):
            angle = t * theta ** (-j / half)
            a, b = x[:, t, :, j], x[:, t, :, j + half]
            y[:, t, :, j] = a * math.cos(angle) - b * math.sin(angle)
            y[:, t, :, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return y


def test_gqa_with_all_heads_is_mha():
    idx = tokens(LLAMA, 2, 16)
    assert torch.equal(build(LLAMA, n_kv_head=4)(idx)[0], build(LLAMA, n_kv_head=None)(idx)[0])


@pytest.mark.parametrize('n_kv_head', [1, 2])
def test_gqa_is_mha_with_repeated_keys_and_values(n_kv_head):
    flags = toy(pos='rope', n_kv_head=n_kv_head)
    gqa, D, repeats = scaled(build(flags), 5), 8, 4 // n_kv_head
    state = gqa.state_dict()
    for name in [name for name in state if '.c_attn.' in name]:
        rows = state[name].unflatten(0, (-1, D))
        q, k, v = rows.split([4, n_kv_head, n_kv_head])
        repeated = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        state[name] = torch.cat([q, *repeated]).flatten(0, 1)
    mha = build(flags, n_kv_head=4)
    mha.load_state_dict(state)
    idx = tokens(flags, 2, 16)
    assert_close(gqa(idx)[0], mha(idx)[0], 1e-5, 'logits')


def test_rmsnorm_has_no_bias_and_bias_false_leaves_none():
    def biases(**flags):
        return [name for name, _ in build(toy(**flags)).named_parameters() if name.endswith('bias')]
    assert any('ln_' in name for name in biases()) and any('c_' in name for name in biases())
    assert biases(norm='rmsnorm') and not any('ln_' in name for name in biases(norm='rmsnorm'))
    assert not biases(bias=False)


def test_tied_head_is_the_embedding():
    tied, untied = build(toy()), build(toy(tie=False))
    assert tied.lm_head.weight is tied.wte.weight and untied.lm_head.weight is not untied.wte.weight
    assert untied.num_params() - tied.num_params() == 61 * 32


def test_logit_softcap_is_smooth_and_holds():
    model, idx = scaled(build(toy(logit_softcap=2.0)), 20), tokens(toy(), 2, 16)
    capped = model(idx)[0]
    model.config.logit_softcap = None
    logits = model(idx)[0]
    assert logits.abs().max() > 2 > capped.abs().max()
    want = torch.tensor([2 * math.tanh(z / 2) for z in logits.flatten().tolist()]).view_as(logits)
    assert_close(capped, want, 1e-5, 'capped logits')


def test_zero_init_starts_as_the_identity():
    idx = tokens(toy(), 2, 16)
    model = build(toy(zero_init=True))
    x = model.wpe(model.wte(idx), torch.arange(16))
    assert torch.equal(model(idx)[0], model.lm_head(model.ln_f(x)))


# ----------------------------------------------------------------------------------------------------------
# Initial weights


def test_initial_weights_have_the_deviations_of_gpt2():
    model = build(toy(n_layer=3, n_embd=192, vocab_size=997))
    for name, p in model.named_parameters():
        p = p.detach()
        if name.endswith('bias'):
            assert not p.any(), f'{name} must start at zero'
        elif p.dim() < 2:
            assert (p == 1).all(), f'{name} must start at one'
        else:
            std = 0.02 / math.sqrt(2 * 3) if 'c_proj' in name else 0.02
            error = 4 / math.sqrt(p.numel())  # four deviations of the estimates
            assert abs(p.std() / std - 1) < error, f'{name} must have deviation {std}'
            assert abs(p.mean() / std) < error, f'{name} must have mean zero'


# ----------------------------------------------------------------------------------------------------------
# Positions


def test_sinusoidal_positions_equal_their_definition():
    model, pos = build(toy(pos='sinusoidal', n_embd=12, n_head=1)), torch.tensor([[0, 1, 7], [3, 1000, 2]])
    x = randn(2, 3, 12)
    want = torch.empty(2, 3, 12)
    for b in range(2):
        for t in range(3):
            for i in range(12):
                angle = pos[b, t].item() / 10000 ** ((i - i % 2) / 12)
                want[b, t, i] = x[b, t, i] + (math.cos(angle) if i % 2 else math.sin(angle))
    assert_close(model.wpe(x, pos), want, 1e-5, 'embedding with positions')


def test_learned_positions_equal_their_definition():
    model, pos = build(toy()), torch.tensor([[-2, -1, 0, 1], [5, 6, 7, 8]])
    x = randn(2, 4, 32)
    got = model.wpe(x, pos)
    for b in range(2):
        for t in range(4):
            if pos[b, t] >= 0:
                assert torch.equal(got[b, t], x[b, t] + model.wpe.weight[pos[b, t]])


@pytest.mark.parametrize('theta', [10000.0, 100.0])
def test_rope_angles_equal_their_definition(theta):
    model = build(toy(pos='rope', head_dim=6, rope_theta=theta))
    cos, sin = model.wpe.rope(torch.tensor([[0, 3], [-1, 50]]))[0]
    for b, t, p in ((0, 0, 0), (0, 1, 3), (1, 0, -1), (1, 1, 50)):
        for j in range(3):
            angle = p * theta ** (-2 * j / 6)
            assert abs(cos[b, t, j] - math.cos(angle)) < 1e-5 and abs(sin[b, t, j] - math.sin(angle)) < 1e-5


def test_rope_sees_only_distances():
    model = build(toy(pos='rope', head_dim=16))
    q, k = randn(1, 1, 1, 16, seed=1), randn(1, 1, 1, 16, seed=2)

    def score(m, n):
        rotated = [model_file.ops.rope(x, *model.wpe.rope(torch.tensor([p]))[0]) for x, p in ((q, m), (k, n))]
        return (rotated[0] * rotated[1]).sum().item()
    scores = {}
    for m, n in ((0, 0), (5, 2), (9, 0), (2, 5)):
        scores[m, n] = score(m, n)
        for shift in (1, 7, 100):
            assert abs(score(m + shift, n + shift) - scores[m, n]) < 1e-4, f'q.k at {m, n} shifted by {shift}'
    assert len({round(s, 3) for s in scores.values()}) == 4, 'q.k must depend on the distance'


@pytest.mark.parametrize('pos', POSITIONS)
def test_only_learned_positions_end(pos):
    flags = toy(pos=pos)
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 3 * 24)
    if pos == 'learned':
        assert model(idx[:, :24])[0].shape == (2, 24, 61)
        with pytest.raises(ValueError, match='^25 tokens must be at most block_size=24'):
            model(idx[:, :25])
        with pytest.raises(ValueError, match='block_size=24'):
            model.generate(idx[:, :20], 5)
        assert model.generate(idx[:, :20], 4).shape == (2, 24)
    else:
        assert_close(model(idx)[0][:, :10], model(idx[:, :10])[0], 1e-5, 'logits')
        assert model.generate(idx, 2, seed=0).shape == (2, 74)


def test_without_positions_order_is_lost():
    # one layer: with more, each token knows how many precede it from what those saw
    flags = toy(pos='none', n_layer=1)
    model, idx = scaled(build(flags), 5), tokens(flags, 1, 10)
    shuffled = torch.cat([idx[:, :9].flip(1), idx[:, 9:]], dim=1)
    assert_close(model(shuffled)[0][:, -1], model(idx)[0][:, -1], 1e-5, 'last logits')
    for pos in sorted(POSITIONS.keys() - {'none'}):
        model = scaled(build(flags | {'pos': pos}), 5)
        apart = (model(shuffled)[0][:, -1] - model(idx)[0][:, -1]).abs().max()
        assert apart > 1e-2, f'pos={pos} must tell orders apart'


# ----------------------------------------------------------------------------------------------------------
# Whole models against transformers


def test_gpt2_equals_transformers():
    hf = pytest.importorskip('transformers', reason='compares with transformers, which is not installed')
    model = scaled(build(toy()), 5)
    config = hf.GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4,
                           activation_function='gelu', bos_token_id=0, eos_token_id=0)
    theirs, state = hf.GPT2LMHeadModel(config).eval(), {}
    for name, p in model.state_dict().items():
        if name != 'lm_head.weight':
            name = name.replace('.mixer.', '.attn.').replace('.ffn.', '.mlp.')
            state[f'transformer.{name}'] = p.T if '.c_' in name and p.dim() == 2 else p
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ['lm_head.weight'] and not unexpected
    theirs.tie_weights()
    assert_same_logits(model, theirs)


def test_llama_equals_transformers():
    hf = pytest.importorskip('transformers', reason='compares with transformers, which is not installed')
    model = scaled(build(LLAMA, ffn_width=40, head_dim=12), 5)
    config = hf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5,
                            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    theirs, ours = hf.LlamaForCausalLM(config).eval(), model.state_dict()
    state = {'lm_head.weight': ours.pop('lm_head.weight'), 'model.norm.weight': ours.pop('ln_f.weight'),
             'model.embed_tokens.weight': ours.pop('wte.weight')}
    for i in range(2):
        qkv, gate_up = ours.pop(f'h.{i}.mixer.c_attn.weight'), ours.pop(f'h.{i}.ffn.c_fc.weight')
        parts = dict(zip(('q', 'k', 'v', 'gate', 'up'), (*qkv.split([48, 24, 24]), *gate_up.chunk(2))))
        for theirs_is, ours_is in {
                'input_layernorm': 'ln_1', 'post_attention_layernorm': 'ln_2',
                'self_attn.q_proj': 'q', 'self_attn.k_proj': 'k', 'self_attn.v_proj': 'v',
                'self_attn.o_proj': 'mixer.c_proj',
                'mlp.gate_proj': 'gate', 'mlp.up_proj': 'up', 'mlp.down_proj': 'ffn.c_proj'}.items():
            p = parts[ours_is] if ours_is in parts else ours.pop(f'h.{i}.{ours_is}.weight')
            state[f'model.layers.{i}.{theirs_is}.weight'] = p
    assert not ours, f'not compared: {list(ours)}'
    theirs.load_state_dict(state)
    assert_same_logits(model, theirs)


@torch.no_grad()
def assert_same_logits(model, theirs):
    idx = tokens(toy(), 3, 24)
    assert_close(model(idx)[0], theirs(idx).logits, 1e-5, 'logits')


# ----------------------------------------------------------------------------------------------------------
# Generation


@every_decoder
def test_greedy_text_is_the_argmax_of_the_full_forward(flags):
    # with small weights a tied head says the same token again and again
    model, idx = scaled(build(flags), 10), tokens(flags, 3, 4)
    text = model.generate(idx, 15, temperature=0)
    assert text.shape == (3, 19) and text.dtype == torch.int64 and torch.equal(text[:, :4], idx)
    for t in range(4, 19):
        assert torch.equal(text[:, t], model(text[:, :t])[0][:, -1].argmax(-1)), f'token {t}'
    # with one candidate left there is nothing to draw
    assert torch.equal(model.generate(idx, 15, top_k=1), text)
    assert torch.equal(model.generate(idx, 15, top_p=1e-9), text)
    assert len(text[:, 4:].unique()) > 1, 'a text of one token would compare nothing'


@every_decoder
def test_generation_follows_its_seed_and_leaves_the_mode(flags):
    model, idx = build(flags, dropout=0.5), tokens(flags, 2, 4)
    text = model.generate(idx, 10, seed=7)
    assert not model.training
    assert torch.equal(model.generate(idx, 10, seed=7), text)
    assert not torch.equal(model.generate(idx, 10, seed=8), text)
    before = torch.get_rng_state()
    # dropout would give another text
    assert torch.equal(model.train().generate(idx, 10, seed=7), text)
    assert torch.equal(torch.get_rng_state(), before), 'with a seed the global generator must stay as it is'
    assert all(module.training for module in model.modules())
    torch.manual_seed(0)
    first = model.generate(idx, 10)
    assert not torch.equal(model.generate(idx, 10), first)
    torch.manual_seed(0)
    assert torch.equal(model.generate(idx, 10), first)


def test_generation_stops():
    model, idx = build(toy()), tokens(toy(), 3, 4)
    free = model.generate(idx, 20, seed=3)
    # the fourth new token of row 0 ends that row; the others go on as if nothing had happened
    stop = free[0, 7].item()
    ends = [next((t for t in range(4, 24) if row[t] == stop), 24) for row in free.tolist()]
    text = model.generate(idx, 20, seed=3, stop=stop)
    assert text.shape == (3, min(24, max(ends) + 1))
    for row, end in enumerate(ends):
        assert torch.equal(text[row, :end + 1], free[row, :end + 1]), f'row {row} before its end'
        assert (text[row, end + 1:] == stop).all(), f'row {row} after its end'
    # several stops, and a stream that ends when all rows have
    text = model.generate(idx, 20, seed=3, stop=free[:, 5].tolist())
    assert text.shape[1] <= 6 and torch.equal(text, free[:, :text.shape[1]])
    # a stop in the prompt is no end
    assert model.generate(idx, 5, seed=3, stop=idx[0, -1].item()).shape[1] > 5


def test_generation_of_nothing_is_the_prompt():
    idx = tokens(toy(), 2, 4)
    assert torch.equal(build(toy()).generate(idx, 0), idx)


def test_generation_keeps_no_gradient():
    assert not any(token.requires_grad for token in build(toy()).stream(tokens(toy(), 2, 4), 2))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('wrong, sentence', [
    ({'temperature': -1.0}, '^temperature=-1.0 must be'), ({'top_k': 0}, '^top_k=0 must be at least 1'),
    ({'top_p': 0.0}, '^top_p=0.0 must be above 0'), ({'top_p': 1.5}, '^top_p=1.5 must be'),
    ({'idx': torch.zeros(1, 0, dtype=torch.int64)}, '^idx must hold at least one token'),
    ({'max_new_tokens': 21}, 'max_new_tokens=21.* must stay within block_size=24')])
def test_generation_refuses_in_one_sentence(wrong, sentence):
    arguments = {'idx': tokens(toy(), 1, 4), 'max_new_tokens': 3} | wrong
    with pytest.raises(ValueError, match=sentence) as error:
        build(toy()).generate(**arguments)
    assert '\n' not in str(error.value)


PROBS = torch.tensor([0.35, 0.05, 0.25, 0.2, 0.1, 0.05])


def renormed(keep, probs=PROBS):
    kept = torch.zeros_like(probs)
    kept[keep] = probs[keep]
    return kept / kept.sum()


@pytest.mark.parametrize('arguments, want', [
    ({}, PROBS),
    ({'temperature': 0.5}, PROBS ** 2 / (PROBS ** 2).sum()),
    ({'temperature': 3.0}, PROBS ** (1 / 3) / (PROBS ** (1 / 3)).sum()),
    ({'top_k': 3}, renormed([0, 2, 3])),
    ({'top_k': 100}, PROBS),
    ({'top_p': 0.5}, renormed([0, 2])),                 # 0.35 < 0.5, so the next one is needed
    ({'top_p': 0.7}, renormed([0, 2, 3])),
    ({'top_p': 1.0}, PROBS),
    ({'top_p': 0.3}, renormed([0])),                    # the first alone holds more, and stays
    ({'top_k': 4, 'top_p': 0.9}, renormed([0, 2, 3, 4])),
    # shares of those that top_k left: 0.4375, 0.3125, 0.25
    ({'top_k': 3, 'top_p': 0.7}, renormed([0, 2])),
    # temperature comes before the cut: of the sum of the squares the first holds 0.51, the next 0.26
    ({'temperature': 0.5, 'top_p': 0.6}, renormed([0, 2], PROBS ** 2))], ids=str)
def test_sample_draws_the_distribution_it_says(arguments, want):
    N = 20000
    logits = (PROBS.log() + 1.7).expand(N, 6)
    drawn = Sampling(**arguments).draw(logits, key(torch.arange(N)).view(-1, 1))
    assert drawn.shape == (N, 1) and drawn.dtype == torch.int64
    share = torch.bincount(drawn.flatten(), minlength=6) / N
    assert not share[want == 0].any(), f'{share.tolist()} must be zero where {want.tolist()} is'
    bound = 4 * (want * (1 - want) / N).sqrt()
    assert ((share - want).abs() <= bound).all(), f'{share.tolist()} must be near {want.tolist()}'


# ----------------------------------------------------------------------------------------------------------
# Dropout


@every_family
def test_dropout_changes_training_alone(flags):
    idx = tokens(flags, 2, 16)
    plain, model = scaled(build(flags), 5), scaled(build(flags, dropout=0.3), 5)
    assert torch.equal(model(idx)[0], plain(idx)[0]), 'dropout must do nothing in eval mode'
    model.train()
    torch.manual_seed(1)
    first = model(idx)[0]
    assert not torch.allclose(first, plain(idx)[0])
    assert not torch.equal(model(idx)[0], first)
    torch.manual_seed(1)
    assert torch.equal(model(idx)[0], first), 'dropout must follow the global generator'


def test_dropout_is_on_the_embedding_the_weights_and_every_branch():
    model, idx = scaled(build(toy(dropout=0.5, n_layer=1)), 5).train(), tokens(toy(), 8, 24)
    seen = {}
    model.h[0].register_forward_hook(lambda block, args, out: seen.update(before=args[0], after=out))
    model(idx)
    dropped = (seen['before'] == 0).float().mean().item()
    assert abs(dropped - 0.5) < 0.05, f'{dropped:.2f} of the embedding is dropped'
    # an entry that both branches drop passes through the block unchanged
    passed = (seen['before'] == seen['after']).float().mean().item()
    assert abs(passed - 0.25) < 0.05, f'{passed:.2f} of the entries get nothing from either branch'
    mixer, x, ctx = model.h[0].mixer, randn(2, 5, 32), Context(torch.arange(5), True, None)
    assert not torch.allclose(mixer(x, ctx), mixer(x, ctx)), 'attention weights must be dropped'
