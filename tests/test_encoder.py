"""
Encoders: every token sees those before and after it. Attention and the loss against their definitions, what
objectives mask, training and resuming, filling in [MASK], and what is refused.
"""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import assert_close, build, scaled, tokens, toy
from runs import assert_refused, assert_same_run, dataset, losses, metrics, python, resume, train

from data.loader import open_dataset
from data.objectives import OBJECTIVES, Diffusion, Mask
from data.tokenizer import ByteTokenizer
from kernels.attention import attention, bucket
from kernels.linear_cross_entropy import linear_cross_entropy
from model import GPT, Block, GPTConfig, kv_cache_bytes
from nanoblocks.decoding.decode import Sampling
from nanoblocks.decoding.session import Session
from nanoblocks.decoding.unmask import pseudo_logprobs, unmask
from nanoblocks.training.parallel import blocks_of

BERT = toy(causal=False, norm_at='post', embed_norm=True, head_mlp=True, head_bias=True)
ENCODERS = {
    'BERT': BERT,
    'ELECTRA': BERT | dict(embed_width=20),
    'ModernBERT': toy(causal=False, pos='rope', embed_norm=True, first_norm=False, ffn='geglu_erf',
                      bias=False, layer_pattern='aw', window=4, head_mlp=True, rope_local_theta=50.0),
    'ALiBi': toy(causal=False, pos='alibi', layer_pattern='w', window=3),
    'latents': toy(causal=False, pos='rope', norm='rmsnorm', attn='mla'),
    'two maps': toy(causal=False, pos='rope', attn='diff', sinks=True),
    'experts': toy(causal=False, ffn_pattern='e', n_expert=4),
}
every_encoder = pytest.mark.parametrize('flags', ENCODERS.values(), ids=ENCODERS)

# ----------------------------------------------------------------------------------------------------------
# What a token sees


@pytest.mark.parametrize('T, window', [(9, None), (9, 2), (50, 7), (300, 20), (130, 128), (600, 65)])
@pytest.mark.parametrize('bias', [False, True])
def test_attention_to_both_sides_is_that_of_its_definition(T, window, bias):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    slopes, pos = torch.tensor([0.5, 0.25, 0.125, 0.0]) if bias else None, torch.arange(T)
    got = attention(q, k, v, pos, pos, 0.3, window=window, slopes=slopes, in_order=True, causal=False)
    distance = (pos[:, None] - pos).abs()
    scores = torch.einsum('bthd,bshd->bhts', q, k.repeat_interleave(2, 2)) * 0.3
    if bias:
        scores = scores - slopes.view(-1, 1, 1).double() * distance
    if window is not None:
        scores = scores.masked_fill(distance >= window, -torch.inf)
    want = torch.einsum('bhts,bshd->bthd', scores.softmax(-1), v.repeat_interleave(2, 2))
    assert_close(got, want, 1e-12, 'attention')
    grads = [torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (got, want)]
    for name, a, b in zip('qkv', *grads):
        assert_close(a, b, 1e-12, f'gradient of {name}')


@every_encoder
@torch.no_grad()
def test_every_token_sees_all_within_reach_and_no_padding(flags):
    model, idx = scaled(build(flags), 3).double(), tokens(flags, 1, 12)
    logits = model(idx)[0]
    changed = idx.clone()
    changed[0, 6] = (idx[0, 6] + 1) % flags['vocab_size']
    moved = (model(changed)[0] - logits).abs().amax(-1)[0] > 1e-9
    # two layers, and where all of them are windows, twice their reach
    reach = 2 * (flags['window'] - 1) if set(model.config.mixers()) == {'w'} else 12
    assert moved.tolist() == [abs(t - 6) <= reach for t in range(12)]
    # padding anywhere changes nothing: before, between and behind
    where = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14]
    padded, pos = torch.zeros(1, 16, dtype=torch.int64), torch.full((1, 16), -1)
    padded[0, where], pos[0, where] = idx[0], torch.arange(12)
    assert_close(model(padded, pos=pos)[0][:, where], logits, 1e-9, 'padded logits')


def test_a_first_norm_less_and_an_embedding_of_another_width_are_what_they_say():
    model = build(ENCODERS['ModernBERT'])
    assert [isinstance(block.ln_1, torch.nn.Identity) for block in model.h] == [True, False]
    model = build(ENCODERS['ELECTRA'])
    assert model.wte.weight.shape == (61, 20) and model.lm_head.weight is model.wte.weight
    assert model.wpe.weight.shape == (24, 20) and model.embed_proj.weight.shape == (32, 20)
    x = torch.randn(1, 3, 32)
    dense, norm = model.head_mlp.c_fc, model.head_mlp.norm
    want = torch.nn.functional.layer_norm(torch.nn.functional.gelu(x @ dense.weight.T + dense.bias), (20,),
                                          norm.weight, norm.bias, norm.eps)
    assert_close(model.head_mlp(x), want, 1e-6, 'head')


@pytest.mark.parametrize('flags, words', [
    (dict(layer_pattern='am'), 'causal=False must be True when layer_pattern has one of m, r, k, c'),
    (dict(n_predict=2), 'n_predict=2 must be 1 when causal=False'),
    (dict(pos='alibi_bf16'), 'must not be alibi_bf16 when causal=False'),
    (dict(first_norm=False), 'first_norm=False must be left out unless embed_norm=True'),
    (dict(embed_width=16), 'embed_width=16 must be n_embd unless head_mlp=True'),
])
def test_flags_that_an_encoder_cannot_have_are_refused(flags, words):
    with pytest.raises(ValueError) as refusal:
        GPTConfig(**toy(causal=False) | flags)
    assert words in str(refusal.value)


def test_an_encoder_has_no_cache_and_generates_no_text():
    model = build(BERT)
    for call in (lambda: model.new_cache(1, 8), lambda: model.generate(tokens(BERT, 1, 3), 2)):
        with pytest.raises(ValueError, match='causal=False must do without a cache'):
            call()


# ----------------------------------------------------------------------------------------------------------
# The loss: a bias of the head, and weights of tokens


@pytest.mark.parametrize('softcap, z_weight', [(None, 0.0), (2.0, 0.3)])
@pytest.mark.parametrize('bias, weighted', [(True, False), (False, True), (True, True)])
def test_the_loss_with_a_bias_and_weights_is_that_of_all_logits(softcap, z_weight, bias, weighted):
    torch.manual_seed(0)
    shapes = (30, 6), (19, 6), (19,)
    x, W, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    targets, weights = torch.randint(-1, 19, (30,)), torch.rand(30) if weighted else torch.ones(30)
    more = b if bias else None, weights if weighted else None
    got = linear_cross_entropy(x, W, targets, softcap, z_weight, *more)
    z = x @ W.T + (b if bias else 0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    norm, counts = z.logsumexp(-1), (targets >= 0) * weights.double()
    each = norm - z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) + z_weight * norm ** 2
    want = (each * counts).sum() / counts.sum()
    assert_close(got, want, 1e-12, 'loss')
    inputs = (x, W, b) if bias else (x, W)
    for name, a, c in zip('xWb', torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
        assert_close(a, c, 1e-12, f'gradient of {name}')


# ----------------------------------------------------------------------------------------------------------
# Objectives


def rows(n=400, T=50, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 90, (n, T + 1)), rng.integers(0, 2 ** 63, n, dtype=np.uint64)


def test_masks_are_those_of_bert():
    text, keys = rows()
    x, y = Mask(90, 0.2)(text, keys)
    chosen = y >= 0
    assert (chosen.sum(-1) == 10).all() and (y[chosen] == torch.from_numpy(text[:, :-1])[chosen]).all()
    assert (x[~chosen] == torch.from_numpy(text[:, :-1])[~chosen]).all()
    masked, kept = (x[chosen] == 90).double().mean(), (x[chosen] == y[chosen]).double().mean()
    # 4,000 draws: three standard deviations are 0.02; one in ninety of the others is the token itself
    assert abs(masked - 0.8) < 0.02 and abs(kept - 0.1 - 0.1 / 90) < 0.02
    assert x.max() == 90 and y.max() < 90
    # every place is chosen alike
    assert (chosen.double().mean(0) - 0.2).abs().max() < 0.09


def test_diffusion_masks_any_share_and_weighs_each_row_alike():
    text, keys = rows(2000)
    x, y, weights = Diffusion(90, 0.15)(text, keys)
    hidden = x == 90
    assert torch.equal(hidden, y >= 0)
    counts = hidden.sum(-1)
    assert counts.min() == 1 and counts.max() == 50 and abs(counts.double().mean() - 25.5) < 1
    assert torch.allclose((weights * hidden).sum(-1), torch.tensor(50.0))


@pytest.mark.parametrize('objective', ['mask', 'diffusion'])
def test_a_row_is_masked_alike_in_any_batch_and_otherwise_by_another_seed(objective):
    def data(seed):
        return open_dataset(dataset(), 32, seed, OBJECTIVES[objective](257, 0.15))
    whole = data(1).train_batch(8, 8)
    for number, tensors in enumerate(zip(*(data(1).train_batch(8 + 2 * i, 2) for i in range(4)))):
        assert torch.equal(torch.cat(tensors), whole[number])
    assert not torch.equal(data(2).train_batch(8, 8)[1] >= 0, whole[1] >= 0)
    few, many = ([torch.cat(z) for z in zip(*data(seed).eval_batches(size, 2048))]
                 for seed, size in ((1, 3), (2, 7)))
    assert all(map(torch.equal, few, many))


# ----------------------------------------------------------------------------------------------------------
# Training, and what is made of it

FLAGS = dict(causal=False, norm_at='post', embed_norm=True, head_mlp=True, head_bias=True)


@pytest.mark.parametrize('objective', ['mask', 'diffusion'])
def test_a_run_learns_and_resumes_exactly(objective):
    whole, printed = train(objective=objective, **FLAGS)
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    bound = objective == 'diffusion'
    assert ('at most' in printed and 'bits per byte' in printed) == bound
    assert ('of masked tokens' in printed) == (not bound) and 'no cache, as it is an encoder' in printed
    assert any('val_bpb' in line for line in metrics(whole)) == bound
    parts, _ = train(objective=objective, max_iters=20, **FLAGS)
    resume(parts, max_iters=60)
    assert_same_run(whole, parts)


@pytest.mark.parametrize('settings, words', [
    (dict(objective='mask'), 'objective=mask must be next, prefix or span when causal=True'),
    (dict(causal=False), 'objective=next must be mask, diffusion, prefix or span when causal=False'),
    (dict(objective='cloze'), 'objective=cloze must be one of next, mask, diffusion'),
    (dict(objective='mask', causal=False, mask_rate=0), 'mask_rate=0.0 must be above 0'),
    (dict(objective='span', n_encoder=1, mask_rate=1.0), 'mask_rate=1.0 must be below 1 when objective=span'),
    (dict(objective='span', block_size=2), 'block_size=2 must be at least 3 when objective=span'),
    (dict(objective='mask', causal=False, vocab_size=257), 'vocab_size=257 must be at least the 258 tokens'),
])
def test_an_objective_and_a_model_that_do_not_fit_are_refused(settings, words, tmp_path):
    from runs import toy as arguments
    assert_refused(python('train.py', *arguments(tmp_path / 'run', **settings)), words)


def test_sample_fills_in_what_is_missing_and_scores():
    out, _ = train(objective='diffusion', **FLAGS)
    done = python('sample.py', f'--out_dir={out}', '--start=abc[MASK][MASK]def', '--num_samples=2')
    assert done.code == 0 and 'objective=diffusion: it fills each [MASK]' in done.out, done
    texts = [line for line in done.out.splitlines() if line.startswith('abc')]
    assert len(texts) == 2 and all(len(text) == 8 and text.endswith('def') for text in texts)
    done = python('sample.py', f'--out_dir={out}', '--score=abcdef')
    assert done.code == 0 and 'pseudo-log-likelihood' in done.out, done


def test_unmasking_names_all_that_is_missing_in_so_many_steps():
    flags = BERT | {'vocab_size': 62}
    model, idx = build(flags), torch.randint(61, (3, 20))
    idx[:, [2, 3, 5, 7, 11, 13, 17]] = 61
    known, greedy = idx != 61, Sampling(temperature=0.0)
    for steps, left in ((1, [0]), (3, [4, 2, 0]), (None, [6, 5, 4, 3, 2, 1, 0])):
        model.lm_head.bias.data[61] = -torch.inf        # as sample.py cuts the mask off the head
        states = list(unmask(model, idx, 61, greedy, 1, steps))
        assert [(state == 61).sum().item() / 3 for state in states] == left
        assert all(torch.equal(state[known], idx[known]) for state in states)
    # the surest is named first
    with torch.no_grad():
        sure = model(idx)[0].log_softmax(-1).amax(-1).masked_fill(known, -torch.inf)
    first = next(unmask(model, idx, 61, greedy, 1))
    assert ((first != idx).nonzero()[:, 1] == sure.argmax(-1)).all()
    a, b = (list(unmask(model, idx[row:], 61, Sampling(), 5, first_row=row))[-1] for row in (0, 1))
    assert torch.equal(a[1:], b)


@torch.no_grad()
def test_pseudo_likelihood_masks_one_token_at_a_time():
    flags = BERT | {'vocab_size': 62}
    model, idx = build(flags), torch.randint(61, (30,))
    want = []
    for t, start in ((t, min(max(t - 12, 0), 6)) for t in range(30)):
        piece = idx[start:start + 24].clone()
        piece[t - start] = 61
        want.append(model(piece[None])[0][0, t - start].log_softmax(-1)[idx[t]].item())
    assert_close(pseudo_logprobs(model, idx, 61, 24), torch.tensor(want), 1e-5, 'log-probabilities')
    assert math.isfinite(sum(want))


def test_bytes_of_the_cache_count_what_a_source_adds():
    config = GPTConfig(n_encoder=2, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=11, block_size=16)
    model = GPT(config).eval()
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        model(torch.ones(2, 3, dtype=torch.int64), cache=cache, source=torch.ones(2, 9, dtype=torch.int64))
    assert sum(entry.nbytes() for entry in cache) == kv_cache_bytes(config, 9, 2, 4)
    assert kv_cache_bytes(GPTConfig(causal=False), 9, 2, 4) == 0


# ----------------------------------------------------------------------------------------------------------
# An encoder beside a decoder

BOTH = {
    'T5': toy(n_encoder=2, pos='relative', norm='rmsnorm', ffn='relu', bias=False),
    'umT5': toy(n_encoder=1, pos='relative', rel_shared=False, rel_buckets=8, rel_distance=9),
    'BART': toy(n_encoder=2, norm_at='post', embed_norm=True, head_bias=True, embed_scale=True),
    'rope': toy(n_encoder=2, n_layer=3, pos='rope', norm='rmsnorm', ffn='swiglu', n_kv_head=2, qk_norm=True,
                norm_at='sandwich', layer_pattern='aw', window=3, softcap=5.0),
    'latents': toy(n_encoder=1, pos='rope', attn='mla'),
    'experts': toy(n_encoder=2, ffn_pattern='e', n_expert=4, norm_at='output'),
}
every_both = pytest.mark.parametrize('flags', BOTH.values(), ids=BOTH)


def translation(flags):
    """A model, three texts, and three sources of 9, 4 and 1 tokens, padded."""
    model = scaled(build_plain(flags), 3).double().eval()
    source = tokens(flags, 3, 9).clone()
    source[1, 4:], source[2, 1:] = -1, -1
    return model, tokens(flags, 3, 12), source


def build_plain(flags):
    return GPT(GPTConfig(**flags), seed=3)


@every_both
@torch.no_grad()
def test_padding_of_a_source_changes_nothing_and_all_else_does(flags):
    model, idx, source = translation(flags)
    together = model(idx, source=source)[0]
    for row, length in enumerate((9, 4, 1)):
        alone = model(idx[row:row + 1], source=source[row:row + 1, :length])[0]
        assert_close(together[row:row + 1], alone, 1e-9, f'logits of row {row}')
    other = source.clone()
    other[:, 0] = (other[:, 0] + 1) % flags['vocab_size']
    assert ((model(idx, source=other)[0] - together).abs().amax((1, 2)) > 1e-9).all()
    # the text sees nothing behind itself
    later = idx.clone()
    later[:, 8] = (later[:, 8] + 1) % flags['vocab_size']
    moved = (model(later, source=source)[0] - together).abs().amax(-1) > 1e-9
    assert not moved[:, :8].any() and moved[:, 8].all()


@every_both
@torch.no_grad()
def test_a_cache_reads_a_source_once(flags, monkeypatch):
    model, idx, source = translation(flags)
    whole, cache = model(idx, source=source)[0], model.new_cache(3, 16)
    reads = []
    monkeypatch.setattr(model.encoder, 'forward', lambda *given, f=model.encoder.forward: (
        reads.append(1), f(*given))[1])
    pieces = [model(idx[:, :5], cache=cache, source=source)[0]]
    for t in range(5, 12):
        pieces.append(model(idx[:, t:t + 1], cache=cache, pos=torch.tensor([t]))[0])
    assert_close(torch.cat(pieces, 1), whole, 1e-9, 'cached logits')
    assert len(reads) == 1


@every_both
def test_generation_with_a_source_is_the_loop_without_a_cache(flags):
    model, idx, source = translation(flags)
    model, idx = model.float(), idx[:, :2]
    for _ in range(8):
        drawn = model(idx, source=source)[0][:, -1:].argmax(-1)
        idx = torch.cat((idx, drawn), 1)
    found = model.generate(idx[:, :2], 8, temperature=0, source=source)
    assert found.equal(idx)
    twice = model.generate(idx[:, :2], 8, temperature=0, source=source, num_samples=2)
    assert twice.equal(idx.repeat_interleave(2, 0))


@pytest.mark.parametrize('causal', [True, False])
def test_buckets_of_distances_are_those_of_t5(causal):
    t5 = pytest.importorskip('transformers').models.t5.modeling_t5.T5Attention
    distance = torch.arange(-400, 400)
    for n, farthest in (32, 128), (8, 9), (16, 300):
        want = t5._relative_position_bucket(distance, not causal, n, farthest)
        assert bucket(distance, n, farthest, causal).equal(want)


def test_what_an_encoder_beside_a_decoder_cannot_have_is_refused():
    model, idx, source = translation(BOTH['T5'])
    with pytest.raises(ValueError, match='source=None must be what the encoder reads'):
        model(idx)
    for flags, words in [(dict(causal=False), 'n_encoder=1 must be 0'),
                         (dict(residual='parallel'), 'be serial'),
                         (dict(layer_pattern='m'), "have no letters but 'a'"),
                         (dict(n_predict=2), 'be 1'), (dict(embed_skip=True), 'be False'),
                         (dict(embed_width=16, tie=False), 'embed_width=16 must be n_embd')]:
        with pytest.raises(ValueError, match=words):
            GPTConfig(**toy(n_encoder=1) | flags)
    with pytest.raises(ValueError, match='source must be left out where n_encoder=0'):
        build(toy())(idx, source=source)


def test_routers_of_an_encoder_count_in_the_loss(monkeypatch):
    flags, terms = BOTH['experts'] | dict(aux_weight=0.01, n_layer=1), []
    model, (_, idx, source) = build(flags).train(), translation(flags)
    monkeypatch.setattr(model, 'losses', lambda x, targets, ctx, *rest: (
        terms.extend(ctx.given.losses.terms), {'loss': 0})[1])
    model(idx, idx, source=source)
    assert len(terms) == len(model.moes) == 3


def test_what_is_done_to_blocks_is_done_to_those_of_an_encoder():
    model = build(toy(n_encoder=3, n_layer=2))
    assert {*blocks_of(model)} == {block for block in model.modules() if isinstance(block, Block)}


@pytest.mark.parametrize('flags, objective', [(dict(causal=False), 'mask'), (dict(n_encoder=1), 'prefix')])
def test_weights_are_rounded_where_a_text_measures_it(flags, objective):
    session = Session(build(toy(vocab_size=258, **flags)), ByteTokenizer(), objective=objective)
    with pytest.raises(ValueError, match='quant must be none where a model is or has an encoder'):
        session.quantize()


def test_an_encoder_that_learned_to_continue_says_that_it_cannot():
    session = Session(build(toy(vocab_size=257, causal=False)), ByteTokenizer(), objective='prefix')
    with pytest.raises(ValueError, match='objective=prefix must be mask, diffusion or span for an encoder'):
        session.sample('abc')
