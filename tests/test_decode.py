"""
The fast paths of sampling against the plain ones: log-probabilities against the full forward pass,
speculative decoding against the exact distribution, 8-bit weights against the weights they round.
"""
import itertools
import math
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import assert_close, build, every_decoder, every_decoder_alone, scaled, tokens, toy

from data.tokenizer import ByteTokenizer, CharTokenizer
from model import GPT, GPTConfig, Linear, StateCache, TokenCache, ops
from nanoblocks.decoding.decode import (
    Decoder,
    Sampling,
    gumbel,
    key,
    left_padded,
    steps_on_host,
    trimmed,
    uniform,
)
from nanoblocks.decoding.quantize import (
    Experts,
    Int4Packed,
    Int8Linear,
    Int8Packed,
    PackedLinear,
    check_kind,
    quantize,
    rounded,
    rounded_int4,
)
from nanoblocks.decoding.scoring import token_logprobs
from nanoblocks.decoding.speculative import Speculative, acceptance
from nanoblocks.decoding.text import Text, special_token
from nanoblocks.hardware import bytes_per_step, read_bandwidth

GREEDY = Sampling(temperature=0)


def drawn(decoder):
    """New tokens (B,N) and their log-probabilities (B,N)."""
    steps = [(token, decoder.logprob.clone()) for token in decoder.stream()]
    return torch.cat([token for token, _ in steps], 1), torch.cat([logprob for _, logprob in steps], 1)


@torch.no_grad()
def want(model, texts, n):
    """The log-probabilities (B,n) of the last n tokens of texts (B,T), from one full forward."""
    logprobs = model(texts)[0][:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, texts[:, 1:].unsqueeze(-1)).squeeze(-1)[:, -n:]


# ----------------------------------------------------------------------------------------------------------
# The loop against the full forward


@every_decoder
def test_log_probabilities_are_those_of_the_full_forward(flags):
    """However the prompt is cut into pieces."""
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 9)
    texts = []
    for chunk in (9, 4, 1):
        new, logprobs = drawn(Decoder(model, idx, 8, Sampling(), seed=3, chunk=chunk, logprobs=True))
        assert_close(logprobs, want(model, torch.cat((idx, new), 1), 8), 1e-4, f'prompt in pieces of {chunk}')
        texts.append(new)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@every_decoder
def test_prompts_of_unequal_lengths_are_as_if_alone(flags):
    """In any order: the same text, and the log-probabilities of the full forward pass."""
    model, text = scaled(build(flags), 5), tokens(flags, 3, 9).tolist()
    prompts = [text[0][:3], text[1], text[2][:6]]
    alone = [drawn(Decoder(model, torch.tensor([p]), 7, Sampling(), seed=1, first_row=n, logprobs=True))
             for n, p in enumerate(prompts)]
    idx, lengths = left_padded(prompts)
    for chunk in (2048, 4):
        new, logprobs = drawn(Decoder(model, idx, 7, Sampling(), seed=1, lengths=lengths, chunk=chunk,
                                      logprobs=True))
        for n, (its_new, its_logprobs) in enumerate(alone):
            assert torch.equal(new[n:n + 1], its_new), f'row {n}, pieces of {chunk}'
            assert_close(logprobs[n:n + 1], its_logprobs, 1e-4, f'row {n}, pieces of {chunk}')
    idx, lengths = left_padded(prompts[::-1])
    new, logprobs = drawn(Decoder(model, idx, 7, GREEDY, lengths=lengths, logprobs=True))
    for n, prompt in enumerate(prompts[::-1]):
        text = torch.cat((torch.tensor([prompt]), new[n:n + 1]), 1)
        assert_close(logprobs[n:n + 1], want(model, text, 7), 1e-4, f'prompt {n} of the other order')


@every_decoder
def test_samples_of_one_prompt_are_rows_of_their_own(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 6)
    many, logprobs = drawn(Decoder(model, idx, 6, Sampling(), seed=2, num_samples=3, logprobs=True))
    repeated = idx.repeat_interleave(3, 0)
    assert torch.equal(many, drawn(Decoder(model, repeated, 6, Sampling(), seed=2, logprobs=True))[0])
    assert_close(logprobs, want(model, torch.cat((repeated, many), 1), 6), 1e-4, 'log-probabilities')
    assert len({tuple(row) for row in many.tolist()}) > 2, 'samples must differ'


def test_a_prompt_is_run_once_for_all_its_samples():
    model, sizes = build(toy()), []
    model.h[0].register_forward_pre_hook(lambda block, args: sizes.append(tuple(args[0].shape[:2])))
    list(Decoder(model, tokens(toy(), 1, 5), 3, Sampling(), num_samples=4).stream())
    assert sizes == [(1, 5), (4, 1), (4, 1)]


def test_a_prompt_is_run_in_pieces():
    model, sizes = build(toy()), []
    model.h[0].register_forward_pre_hook(lambda block, args: sizes.append(args[0].shape[1]))
    list(Decoder(model, tokens(toy(), 1, 10), 2, Sampling(), chunk=4).stream())
    assert sizes == [4, 4, 2, 1]


@pytest.mark.parametrize('flags', [
    toy(), toy(pos='rope', layer_pattern='w', window=5), toy(pos='rope', attn='mla'),
    toy(pos='none', layer_pattern='m', ssm_head_dim=8), toy(pos='alibi', ffn_pattern='e', n_expert=4)],
    ids=['full', 'ring', 'latent', 'state', 'experts'])
@torch.no_grad()
def test_a_step_is_one_graph_for_all_positions(flags):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 5)
    sampling = Sampling(0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    new, logprobs = drawn(Decoder(model, idx, 8, sampling, stop=[200], seed=4, logprobs=True))
    decoder = Decoder(model, idx, 8, sampling, stop=[200], seed=4, logprobs=True)
    decoder.ready_step = lambda: torch.compile(decoder.step, backend=backend, fullgraph=True, dynamic=False)
    compiled = drawn(decoder)
    torch._dynamo.reset()
    assert len(graphs) == 1, f'{len(graphs)} graphs for seven steps'
    assert torch.equal(compiled[0], new)
    assert_close(compiled[1], logprobs, 1e-4, 'log-probabilities')


@pytest.mark.parametrize('flags', [
    toy(layer_pattern='w', window=5, pos='rope'),
    toy(layer_pattern='m', ffn_pattern='-', pos='none', ssm_head_dim=8),
    toy(layer_pattern='w', window=5, pos='alibi'),
    toy(layer_pattern='wm', window=5, pos='none', ssm_head_dim=8)],
    ids=['window', 'state', 'alibi', 'both'])
def test_windows_and_states_run_in_constant_memory(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 1, 4)
    short, long = (Decoder(model, idx, n, Sampling(), seed=0, logprobs=True) for n in (30, 150))
    assert sum(e.nbytes() for e in short.cache) == sum(e.nbytes() for e in long.cache)
    new, logprobs = drawn(long)     # six times block_size
    assert_close(logprobs[:, -20:], want(model, torch.cat((idx, new), 1), 20), 1e-3, 'late log-probabilities')


# ----------------------------------------------------------------------------------------------------------
# What is drawn


def test_noise_is_uniform_and_does_not_repeat():
    keys = key(torch.tensor(5), torch.arange(300)).view(-1, 1)
    u = uniform(keys + torch.arange(400) * 0x1E3779B97F4A7C15)
    assert 0 < u.min() and u.max() < 1 and len(u.unique()) > 0.99 * u.numel()
    counts = torch.histc(u, 50, 0, 1)
    chi2 = ((counts - u.numel() / 50) ** 2 / (u.numel() / 50)).sum().item()
    assert chi2 < 49 + 4 * math.sqrt(2 * 49), f'chi square of 49 degrees: {chi2:.0f}'
    # neighbours in both directions are uncorrelated
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        corr = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert abs(corr) < 4 / math.sqrt(a.numel()), f'correlation {corr:.4f}'


def test_noise_has_the_tail_that_unlikely_tokens_need():
    """Tokens of probability 2^-14 are drawn that often: 24 bits of noise near 1 would be too coarse."""
    g = gumbel(key(torch.arange(2 ** 13)).view(-1, 1), torch.arange(512))
    for size in (10, 12, 14):
        share, p = (g > math.log(2 ** size)).float().mean().item(), 1 - math.exp(-2.0 ** -size)
        assert abs(share - p) < 5 * math.sqrt(p / g.numel()), f'{share:.2e} must be near {p:.2e}'


PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize('arguments, kept', [
    ({'min_p': 0.6}, [0, 1]), ({'min_p': 0.5}, [0, 1, 2]), ({'min_p': 1.0}, [0]),
    ({'min_p': 1e-3}, [0, 1, 2, 3]),
    ({'min_p': 0.5, 'temperature': 2.0}, [0, 1, 2, 3]), ({'min_p': 0.4, 'top_k': 2}, [0, 1]),
    ({'min_p': 0.4, 'top_p': 0.6}, [0, 1])], ids=str)
def test_min_p_keeps_tokens_above_its_share_of_the_likeliest(arguments, kept):
    # no limit of these cases falls exactly on a probability
    probs = Sampling(**arguments).probabilities(PROBS.log() + torch.tensor([0, 0, 1e-4, 0]))
    assert probs.nonzero().flatten().tolist() == kept
    assert abs(probs.sum() - 1) < 1e-6


def test_repetition_penalty_is_for_tokens_of_the_text():
    """And not for padding, which is token 0."""
    V = 61
    model = build(toy())
    idx, lengths = left_padded([[3, 5, 3, 7], [9]])
    decoder = Decoder(model, idx, 3, Sampling(repetition_penalty=1.5), seed=0, lengths=lengths)
    assert [row.nonzero().flatten().tolist() for row in decoder.seen] == [[3, 5, 7], [9]]
    new = torch.cat(list(decoder.stream()), 1).tolist()
    assert [set(row.nonzero().flatten().tolist()) for row in decoder.seen] == [
        {3, 5, 7, *new[0]}, {9, *new[1]}]
    logits, seen = torch.randn(1, V), torch.arange(V).view(1, V) % 2 == 0
    scores, _ = Sampling(repetition_penalty=2.0).candidates(logits, seen)
    for v, (score, logit) in enumerate(zip(scores[0].tolist(), logits[0].tolist())):
        penalised = (logit / 2 if logit > 0 else logit * 2) if v % 2 == 0 else logit
        assert abs(score - penalised) < 1e-6, f'token {v}'


def test_repetition_penalty_ends_a_loop():
    model, idx = scaled(build(toy()), 10), tokens(toy(), 1, 2)
    loop = model.generate(idx, 20, temperature=0)
    free = model.generate(idx, 20, temperature=0, repetition_penalty=1e6)
    assert len(loop.unique()) < 15 and len(free.unique()) == 22


def test_a_seed_is_the_same_text_in_every_batch():
    model, idx = scaled(build(toy(pos='rope')), 5), tokens(toy(), 4, 6)
    together = model.generate(idx, 12, seed=11)
    for row in range(4):
        alone = model.generate(idx[row:row + 1], 12, seed=11, first_row=row)
        assert torch.equal(alone, together[row:row + 1]), f'row {row}'


@pytest.mark.parametrize('scaling', [
    dict(rope_scaling='dynamic', rope_factor=4.0),
    dict(rope_scaling='longrope', rope_factor=2.0, rope_short=[1.0, 1.5, 2.0, 3.0],
         rope_long=[2.0, 3.0, 5.0, 9.0])], ids=['dynamic', 'longrope'])
def test_rotations_by_length_are_those_of_the_full_forward(scaling):
    """Within the trained context, beyond it, and with the larger cache of a compiled step."""
    flags = toy(pos='rope', n_embd=32, n_head=4, rope_context=12, **scaling)
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 8)
    for n, compiled in ((4, False), (4, True), (9, False), (9, True)):
        decoder = Decoder(model, idx, n, Sampling(), seed=0, compiled=compiled, logprobs=True)
        decoder.ready_step = lambda: decoder.step
        new, logprobs = drawn(decoder)
        text = torch.cat((idx, new), 1)
        with torch.no_grad():  # one forward pass per token, over all tokens before it
            logits = torch.stack([model(text[:, :8 + k])[0][:, -1] for k in range(n)], 1)
        expected = logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
        assert_close(logprobs, expected, 1e-4, f'{n} new tokens, compiled={compiled}')
    with pytest.raises(ValueError, match='^prompts of unequal lengths must stay within rope_context=12'):
        Decoder(model, idx, 9, Sampling(), lengths=[3, 8])
    assert torch.cat(list(Decoder(model, idx, 4, Sampling(), lengths=[3, 8]).stream()), 1).shape == (2, 4)


@pytest.mark.parametrize('overlap', [False, True])
def test_steps_reach_the_host_complete_and_in_order(overlap):
    def decoder(n):
        return Decoder(model, idx, n, Sampling(), seed=2, logprobs=True)
    model, idx = scaled(build(toy(pos='rope')), 5), tokens(toy(), 3, 4)
    for n in (1, 2, 7):
        new, logprobs = drawn(decoder(n))
        steps = [list(step) for step in zip(new.T.tolist(), logprobs.T.tolist())]
        assert list(steps_on_host(decoder(n), overlap)) == steps
    running = decoder(5)
    steps = steps_on_host(running, overlap)
    # the first at once, the others once the next step has run
    numbers = [(next(steps), running.number.item())[1] for _ in range(3)]
    assert numbers == ([1, 3, 4] if overlap else [1, 2, 3])


def test_trimmed_ends_with_the_last_row():
    new = torch.tensor([[1, 9, 9, 9, 9], [2, 3, 9, 9, 9]])
    assert trimmed(new, 9).tolist() == [[1, 9, 9], [2, 3, 9]]
    assert trimmed(new, [4]).tolist() == new.tolist() == trimmed(new, None).tolist()


# ----------------------------------------------------------------------------------------------------------
# Speculative decoding


class Branches:
    """Takes the place of Noise: walks through every outcome once, with its probability."""

    def __init__(self):
        self.path, self.at, self.weight = [], 0, 1.0

    def choose(self, weights):
        """The outcome on the current path, among those with a positive weight."""
        possible = [n for n, w in enumerate(weights) if w > 0]
        if self.at == len(self.path):
            self.path.append([0, len(possible)])
        n = possible[self.path[self.at][0]]
        self.at += 1
        self.weight *= weights[n]
        return n

    def coins(self, probs):
        return torch.tensor([bool(self.choose([1 - p, p])) for p in probs.double().tolist()])

    def pick(self, probs):
        return torch.tensor([self.choose(probs.double().tolist())])

    def next_path(self):
        """Start the next path; False when all were walked."""
        while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
            self.path.pop()
        if self.path:
            self.path[-1][0] += 1
        self.at, self.weight = 0, 1.0
        return bool(self.path)


TINY = {
    'full': dict(pos='rope'), 'learned': dict(), 'window': dict(pos='rope', layer_pattern='w', window=2),
    'latent': dict(pos='rope', attn='mla'), 'state': dict(pos='none', layer_pattern='m', ssm_head_dim=8),
    'both': dict(pos='rope', layer_pattern='wm', window=3, ssm='mamba1'),
}


def pair(**flags):
    """A model with a vocabulary of three tokens, and a smaller draft that disagrees with it."""
    flags = toy(vocab_size=3, tie=False) | flags
    return scaled(build(flags), 6), scaled(build(flags | dict(n_layer=2, n_embd=16), seed=7), 6)


@pytest.mark.parametrize('kind', TINY)
@torch.no_grad()
def test_speculative_decoding_keeps_the_distribution(kind):
    """Exactly: the sum over every outcome of every draw, for three tokens from drafts of two."""
    model, draft = pair(**TINY[kind])
    idx, sampling, shares, agreed = torch.tensor([[0, 2, 1, 1]]), Sampling(temperature=1.3), {}, 0.0
    noise, more = Branches(), True
    while more:
        decoder = Speculative(model, draft, idx, 3, sampling, draft_length=2)
        decoder.noise = noise
        text = tuple(token.item() for token in decoder.stream())
        shares[text] = shares.get(text, 0.0) + noise.weight
        agreed += noise.weight * decoder.accepted
        more = noise.next_path()
    assert abs(sum(shares.values()) - 1) < 1e-5 and 0.2 < agreed < 1.9, f'{agreed} tokens accepted'
    for text in itertools.product(range(3), repeat=3):
        whole = torch.cat((idx, torch.tensor([text])), 1)
        probs = sampling.probabilities(model(whole)[0][0, 3:6])
        p = math.prod(probs[n, token].item() for n, token in enumerate(text))
        assert abs(shares.get(text, 0.0) - p) < 1e-4, f'{text}: {shares.get(text)} must be {p}'


def test_acceptance_is_the_rule_of_the_paper():
    p, q = torch.rand(4, 5).softmax(-1), torch.rand(3, 5).softmax(-1)
    total = torch.zeros(5, dtype=torch.float64)
    for x in range(5):
        accept, following = acceptance(p, q, torch.full((3,), x))
        for n in range(3):
            assert abs(accept[n] - min(1, p[n, x] / q[n, x])) < 1e-6
        total += q[0, x].double() * ((1 - accept[0]) * following[0]).double()
        total[x] += (q[0, x] * accept[0]).double()
        assert torch.equal(following[3], p[3])
    assert_close(total, p[0].double(), 1e-6, 'distribution of the first token')


@every_decoder_alone
def test_greedy_speculation_is_the_greedy_text(flags):
    """Also with states rolled back, ring buffers overwritten, and drafts that are always accepted."""
    model, idx = scaled(build(flags), 10), tokens(flags, 1, 6)
    other = scaled(build(flags, seed=5), 10)
    text = torch.cat(list(Decoder(model, idx, 14, GREEDY).stream()), 1)
    for draft, length in ((other, 3), (model, 4), (other, 1)):
        decoder = Speculative(model, draft, idx, 14, GREEDY, draft_length=length)
        logprobs, new = [], []
        for token in decoder.stream():
            new.append(token)
            logprobs.append(decoder.logprob)
        assert torch.equal(torch.cat(new, 1), text), f'drafts of {length}'
        whole = torch.cat((idx, text), 1)
        assert_close(torch.cat(logprobs, 1), want(model, whole, 14), 1e-4, 'log-probabilities')
        if draft is model:
            assert decoder.accepted == decoder.proposed and decoder.rounds == 3, 'it must agree with itself'


def test_speculation_stops_where_the_text_does():
    model, idx = scaled(build(toy(pos='rope')), 10), tokens(toy(), 1, 6)
    whole = Speculative(model, model, idx, 14, Sampling(), seed=1, draft_length=4)
    text = [token.item() for token in whole.stream()]
    stop = text[6]
    again = Speculative(model, model, idx, 14, Sampling(), stop=[stop], seed=1, draft_length=4)
    assert [t.item() for t in again.stream()] == text[:text.index(stop) + 1]


def test_speculation_compiles_two_passes_for_texts_of_any_length(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, dynamic: real(f, backend=backend, dynamic=dynamic))
    torch._dynamo.reset()
    model, draft = (scaled(build(toy(pos='rope', n_layer=n)), 10) for n in (2, 1))
    for T, new in ((6, 14), (9, 21)):
        idx = tokens(toy(), 1, T)
        plain, fast = (Speculative(model, draft, idx, new, Sampling(), seed=1, compiled=compiled)
                       for compiled in (False, True))
        assert [t.item() for t in plain.stream()] == [t.item() for t in fast.stream()]
    torch._dynamo.reset()
    assert len(graphs) == 2, f'{len(graphs)} graphs for two texts'


def test_speculation_penalises_repetition_as_the_plain_loop():
    model, idx = scaled(build(toy(pos='rope')), 10), tokens(toy(), 1, 3)
    sampling = Sampling(temperature=0, repetition_penalty=1e6)
    text = torch.cat(list(Decoder(model, idx, 15, sampling).stream()), 1)
    for draft in (model, scaled(build(toy(pos='rope'), seed=3), 10)):
        assert torch.equal(torch.cat(list(Speculative(model, draft, idx, 15, sampling).stream()), 1), text)


@pytest.mark.parametrize('wrong, sentence', [
    ({'draft': toy(vocab_size=97)}, '^draft has a vocabulary of 97 tokens and must'),
    ({'idx': torch.zeros(2, 4, dtype=torch.int64)}, '^idx of shape'),
    ({'idx': torch.zeros(1, 0, dtype=torch.int64)}, '^idx of shape'),
    ({'draft_length': 0}, '^draft_length=0 must be'),
    ({'max_new_tokens': 21}, 'must stay within block_size=24 of draft')])
def test_speculation_refuses_with_one_sentence(wrong, sentence):
    arguments = dict(idx=tokens(toy(), 1, 4), max_new_tokens=3) | wrong
    draft = build(arguments.pop('draft', toy()))
    with pytest.raises(ValueError, match=sentence) as error:
        Speculative(build(toy(pos='rope')), draft, sampling=GREEDY, **arguments)
    assert '\n' not in str(error.value)


# ----------------------------------------------------------------------------------------------------------
# Rounded and packed weights


def test_rounding_is_to_the_nearest_of_255_steps():
    weight = torch.randn(7, 50) * torch.logspace(-3, 3, 7).view(-1, 1)
    got, scale = rounded(weight)
    assert got.dtype == torch.int8 and got.abs().amax(-1).tolist() == [127] * 7
    error = (got * scale.unsqueeze(-1) - weight).abs().amax(-1)
    assert (error <= scale * 0.5001).all()
    assert rounded(torch.zeros(2, 3))[0].tolist() == [[0] * 3] * 2


@every_decoder
@torch.no_grad()
def test_int8_is_near_the_model_and_reads_fewer_bytes(flags):
    model, idx = scaled(build(flags), 2), tokens(flags, 2, 12)
    logits, size = model(idx)[0], bytes_per_step(model, None)
    assert quantize(model) is model
    got = model(idx)[0]
    error = (got - logits).square().mean().sqrt() / logits.std()
    assert 0 < error < 0.1, f'relative error {error:.3f}'
    kinds = [type(m) for m in model.modules()]
    assert {Int8Packed, Int8Linear} & set(kinds) and bytes_per_step(model, None) < size
    assert (Experts in kinds) == bool(model.moes)
    # one row runs the CPU's int8 kernel
    new = torch.cat(list(Decoder(model, idx[:1], 6, GREEDY).stream()), 1)
    assert new.shape == (1, 6)


def test_int8_rows_few_and_many_are_the_same_product():
    torch.manual_seed(0)
    # the CPU's kernel reads vectors of 64: other widths must not reach it
    for width, out in itertools.product((64, 128, 7, 12, 48, 100), (1, 7, 64)):
        linear = Linear(width, out, bias=True)
        torch.nn.init.normal_(linear.weight), torch.nn.init.normal_(linear.bias)
        x, layer = torch.randn(40, width), Int8Linear(linear.weight, linear.bias)
        want = x @ (layer.weight.float() * layer.scale.view(torch.float32)[:, None]).T + linear.bias
        assert_close(layer(x[None])[0], want, 1e-5, f'many rows of {width}')
        for rows in (1, 3, 16):
            # activations are rounded to 16 bit
            assert_close(layer(x[None, :rows])[0], want[:rows], 2e-2, f'{rows} rows of {width}')


def test_int4_has_sixteen_steps_in_every_group():
    weight = torch.randn(16, 192, dtype=torch.float64).float()
    n, scale, offset = rounded_int4(weight)
    assert n.shape == weight.shape and scale.shape == (16, 3) and scale.dtype == torch.bfloat16
    assert (n.min(), n.max()) == (0, 15)
    held = scale.float().unsqueeze(-1) * (n.view(16, 3, 64) - 8) + offset.float().unsqueeze(-1)
    # the ends of a group may lie a little outside, as its scale and offset are of 16 bits
    assert ((held.flatten(1) - weight).abs().view(16, 3, 64) <= 0.6 * scale.float().unsqueeze(-1)).all()
    assert rounded_int4(torch.zeros(16, 64))[0].float().std() == 0


PACKED = [cls for cls in (PackedLinear, Int8Packed, Int4Packed) if cls.fits(torch.zeros(16, 64))]


@pytest.mark.parametrize('cls', PACKED)
@torch.no_grad()
def test_packed_weights_give_the_product_in_float64(cls):
    """Of the weights that they hold: few rows and many, odd widths, one activation larger than all others."""
    torch.manual_seed(0)
    for N, I in itertools.product((1, 17, 64), (64, 192) if cls is Int4Packed else (7, 64, 100)):
        weight, bias = torch.randn(N, I), torch.randn(N)
        layer, held = cls(weight, bias), weight.double()
        if cls is Int8Packed:
            whole, scale = rounded(weight)
            held = whole.double() * scale.double().unsqueeze(-1)
        elif cls is Int4Packed:
            n, scale, offset = (x.double().unsqueeze(-1) for x in rounded_int4(weight))
            held = (scale * (n.view(N, -1, 64) - 8) + offset).flatten(1)
        assert layer.weight.shape[0] == N and layer.weight.nbytes < 8 * weight.numel()
        # int4 rounds activations and results to bfloat16
        bound = {PackedLinear: 1e-6, Int8Packed: 5e-4, Int4Packed: 1e-2}[cls]
        for rows in (1, 3, 40):
            x = torch.randn(2, rows, I)
            x[..., I // 2] *= 20
            want = x.double() @ held.T + bias.double()
            assert_close(layer(x).double(), want, bound, f'{rows} rows, {I} to {N}')
            no_bias = cls(weight, None)(x).double()
            assert_close(no_bias, want - bias.double(), bound, 'without a bias')


@torch.no_grad()
def test_each_thread_has_its_columns_of_a_packed_weight(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    for N, blocks in ((200, 1), (512, 2), (1000, 3)):
        weight, bias, x = torch.randn(N, 20), torch.randn(N), torch.randn(2, 5, 20)
        layer = PackedLinear(weight, bias)
        assert len(layer.packed) == blocks
        assert_close(layer(x).double(), x.double() @ weight.double().T + bias.double(), 1e-6, f'{N}')


@pytest.mark.parametrize('kind', ['none', 'int8', 'int4'])
@torch.no_grad()
def test_a_packed_step_is_one_graph_and_draws_the_same(kind):
    flags = toy(n_embd=64, ffn_width=128)
    model, idx = quantize(scaled(build(flags), 5), kind), tokens(flags, 2, 5)
    want, decoder = drawn(Decoder(model, idx, 6, GREEDY, logprobs=True)), None
    torch._dynamo.reset()
    decoder = Decoder(model, idx, 6, GREEDY, logprobs=True)
    how = dict(backend='aot_eager', fullgraph=True, dynamic=False)
    decoder.ready_step = lambda: torch.compile(decoder.step, **how)
    got = drawn(decoder)
    torch._dynamo.reset()
    assert torch.equal(got[0], want[0])
    assert_close(got[1], want[1], 1e-5, 'log-probabilities')


def test_int4_is_smaller_than_int8_and_needs_a_cpu():
    size = {}
    for kind in ('none', 'int8', 'int4'):
        model = quantize(build(toy(n_embd=64)), kind)
        size[kind] = bytes_per_step(model, None)
        assert kind == 'none' or model.wte.weight.dtype == torch.float32
    assert size['none'] == bytes_per_step(build(toy(n_embd=64)), None)
    assert size['int4'] < 0.7 * size['int8'] < 0.3 * size['none']
    for kind, device, sentence in (('int4', 'cuda:1', 'quant=int4 must run on a CPU'),
                                   ('int2', 'cpu', 'quant=int2 must be one of none, int8, int4')):
        with pytest.raises(ValueError, match=sentence):
            check_kind(kind, device)


def test_int8_keeps_the_embedding_of_a_tied_head():
    model = build(toy())
    quantize(model)
    assert model.wte.weight.dtype == torch.float32 and model.lm_head.weight.dtype == torch.int8


# ----------------------------------------------------------------------------------------------------------
# Scores, bytes, text


@every_decoder
@torch.no_grad()
def test_token_logprobs_are_those_of_the_full_forward_pass(flags):
    model, idx = scaled(build(flags), 5), tokens(flags, 1, 20)
    assert_close(token_logprobs(model, idx[0], 20), want(model, idx, 19)[0], 1e-4, 'one window')
    # windows of 8 that start at 0, 4, 8, 12: every token is predicted from at least 4
    got = token_logprobs(model, idx[0], 8)
    assert got.shape == (19,)
    for first, since in ((0, 1), (4, 8), (8, 12), (12, 16)):
        piece = idx[:, first:first + 8]
        part = want(model, piece, first + 8 - since)[0]
        assert_close(got[since - 1:since - 1 + len(part)], part, 1e-4, f'window at {first}')
    assert token_logprobs(model, idx[0, :1], 8).shape == (0,)


def test_bytes_of_a_step():
    config = GPTConfig(**toy(n_embd=32, n_layer=1))
    model = GPT(config)
    # 12 C^2 weights of a block and their biases, two norms and the last, the head
    block = 12 * 32 ** 2 + (3 + 1 + 4 + 1) * 32 + 2 * 2 * 32
    assert bytes_per_step(model, None) == 4 * (block + 2 * 32 + 61 * 32)
    cache = model.new_cache(1, 10)
    assert bytes_per_step(model, cache) == 4 * (block + 2 * 32 + 61 * 32) + 10 * (2 * 32 * 4 + 4)
    moe = build(toy(ffn_pattern='e', n_expert=4, n_expert_used=1, router_norm=False))
    per_expert = sum(t.nbytes for m in (moe.h[0].ffn.c_fc, moe.h[0].ffn.c_proj) for t in m.parameters()) / 4
    assert bytes_per_step(moe, None, 3) - bytes_per_step(moe, None, 1) == 2 * len(moe.moes) * per_expert
    assert bytes_per_step(moe, None, 9) == bytes_per_step(moe, None, 4)


def test_latents_are_what_a_step_of_mla_reads():
    model = build(toy(pos='rope', attn='mla', kv_rank=12, rope_head_dim=6))
    cache, read = model.new_cache(1, 16), []
    model.h[0].mixer.scores.register_forward_pre_hook(lambda m, args: read.append(args[1]))
    with torch.no_grad():
        model(tokens(toy(), 1, 5), cache=cache)
        model(tokens(toy(), 1, 1), cache=cache, pos=torch.tensor([5]))
    # the keys of the step are a view of the cache: nothing was expanded or copied
    assert read[1].untyped_storage().data_ptr() == cache[0].rows[0].untyped_storage().data_ptr()
    assert read[1].shape == (1, 6, 1, 18)
    assert cache[0].nbytes() == 16 * (18 * 4 + 4)


def test_read_bandwidth_is_a_speed():
    assert 1e7 < read_bandwidth(2 ** 22, 'cpu') < 1e13


def said(text, data):
    """The characters returned for each token."""
    return [text.add(token) for token in data]


def test_text_arrives_in_complete_characters():
    text = Text(ByteTokenizer())
    assert said(text, 'aé😀'.encode()) == ['a', '', 'é', '', '', '', '😀'] and text.finish() == ''
    text = Text(ByteTokenizer())
    assert said(text, b'a\xf0\x9f') == ['a', '', ''] and text.finish() == '\ufffd'
    text = Text(ByteTokenizer())
    assert said(text, b'\xc3a') == ['', '\ufffda']


def test_text_ends_before_a_stop_string():
    text = Text(ByteTokenizer(), stop_strings=['END', 'NO'])
    assert said(text, b'aENxENDb') == ['a', '', '', 'ENx', '', '', '', '']
    assert text.done and text.text == 'aENx'
    assert text.tokens == [*b'aENxEND'], 'the tokens of the stop are counted, later ones are not'
    text = Text(ByteTokenizer(), stop_strings=['END'])
    said(text, b'aEN')
    assert text.finish() == 'EN', 'the beginning of a stop string alone is text'
    text = Text(ByteTokenizer(), stop_strings=['b', 'ab'])
    assert said(text, b'xab') == ['x', '', ''] and text.text == 'x'


def test_text_ends_with_a_token():
    text = Text(ByteTokenizer(), stop_tokens=[256])
    assert said(text, [97, 256, 98]) == ['a', '', ''] and text.text == 'a' and text.tokens == [97, 256]


def test_special_tokens():
    assert special_token(ByteTokenizer(), '<|endoftext|>') == 256
    assert special_token(ByteTokenizer(), 'END') is None
    for tokenizer, name in ((ByteTokenizer(), '<|im_end|>'), (CharTokenizer('ab'), '<|endoftext|>')):
        with pytest.raises(ValueError, match='must be a text or a special token'):
            special_token(tokenizer, name)


@pytest.mark.parametrize('flags', [
    toy(layer_pattern='w', window=5, pos='rope'), toy(layer_pattern='ma', pos='none', ssm_head_dim=8),
    toy(pos='learned', block_size=11)], ids=['window', 'states', 'learned positions to their end'])
def test_warming_up_a_cuda_graph_changes_no_token(flags, monkeypatch):
    """On a CPU, whose graph runs the step again; a capture records the step and does not run it."""
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 9)

    def new_decoder():
        return Decoder(model, idx, 2, Sampling(repetition_penalty=1.2), seed=3, logprobs=True)
    want, captured = drawn(new_decoder()), new_decoder()
    recording, ran = [], []

    def step():
        if not recording:
            ran.append(1)
            captured.step()

    @contextmanager
    def record(graph):
        recording.append(1)
        yield
        recording.clear()
    monkeypatch.setattr(torch, 'cuda', MagicMock(
        stream=lambda stream: nullcontext(), graph=record, CUDAGraph=lambda: SimpleNamespace(replay=step)))
    monkeypatch.setattr(captured, 'ready_step', lambda: captured.captured(step))
    got = drawn(captured)
    assert len(ran) == 3 + 1, 'three steps to warm up, and one after the first token'
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def ready(model, new=20, captured=lambda step: 'replayed'):
    """What Decoder.ready_step chooses on a GPU."""
    decoder = SimpleNamespace(model=model, cache=[], compiled=False, step='eager', max_new_tokens=new,
                              idx=SimpleNamespace(device=torch.device('cuda')), captured=captured)
    return Decoder.ready_step(decoder)


def test_a_gpu_replays_a_graph_unless_rows_are_counted_on_the_host(monkeypatch):
    experts = build(toy(ffn_pattern='e', n_expert=4))
    assert ready(build(toy())) == 'replayed' and ready(build(toy()), new=5) == 'eager'
    assert ready(experts) == 'eager', 'plain PyTorch splits the rows of experts by numbers on the host'
    monkeypatch.setattr(ops, 'runs_triton', lambda x: True)
    assert ready(experts) == 'eager', 'products in fp32 are left to PyTorch'
    assert ready(experts.bfloat16()) == 'replayed'
    assert ready(quantize(experts)) == 'eager'

    def fails(step):
        raise RuntimeError('operation not permitted when stream is capturing')
    with pytest.warns(UserWarning, match='without a CUDA graph, which failed: operation not permitted'):
        assert ready(build(toy()), captured=fails) == 'eager'


@pytest.mark.parametrize('draft', [False, True])
def test_a_stream_may_be_dropped(draft, tmp_path):
    """Before its end, in training, and while Python exits: nothing is left to undo, and nothing printed."""
    model = scaled(build(toy(pos='rope', dropout=0.5)), 5).train()
    idx = tokens(toy(), 1, 3)
    decoder = Speculative(model, model, idx, 9, GREEDY) if draft else Decoder(model, idx, 9, GREEDY)
    stream = decoder.stream()
    next(stream)
    assert model.training and torch.is_grad_enabled()
    end = subprocess.run([sys.executable, '-c', DROPPED % ('Speculative(model, model' if draft else
                                                           'Decoder(model')],
                         cwd=ROOT, capture_output=True, text=True)
    assert (end.returncode, end.stdout, end.stderr) == (0, '', '')


ROOT = Path(__file__).resolve().parents[1]
DROPPED = """
import torch
from model import GPT, GPTConfig
from nanoblocks.decoding.decode import Decoder, Sampling
from nanoblocks.decoding.speculative import Speculative
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16))
stream = %s, torch.zeros(1, 1, dtype=torch.int64), 5, Sampling()).stream()
next(stream)
"""


# ----------------------------------------------------------------------------------------------------------
# Rollback of caches


@pytest.mark.parametrize('spare', [1, 3])
@torch.no_grad()
def test_a_ring_buffer_with_spare_slots_rolls_back(spare):
    flags = toy(layer_pattern='w', window=5, pos='rope')
    model, idx = scaled(build(flags), 5), tokens(flags, 1, 20)
    logits = model(idx)[0]
    cache = model.new_cache(1, 20, spare=spare)
    assert cache[0].pos.shape[1] == 5 + spare
    model(idx[:, :8], cache=cache)
    for start in range(8, 20 - spare):
        wrong = (idx[:, start:start + 1 + spare] + 1) % flags['vocab_size']
        wrong[:, 0] = idx[:, start]
        pos = torch.arange(start, start + 1 + spare)
        got = model(wrong, cache=cache, pos=pos)[0][:, 0]
        assert_close(got, logits[:, start], 1e-4, f'logits at {start} after rolling back {spare}')


@torch.no_grad()
def test_states_are_rolled_back_from_a_snapshot():
    flags = toy(layer_pattern='ma', pos='none', ssm_head_dim=8)
    model, idx = scaled(build(flags), 5), tokens(flags, 2, 12)
    cache = model.new_cache(2, 12)
    model(idx[:, :5], cache=cache)
    before = [entry.snapshot() for entry in cache]
    assert [type(e) for e, b in zip(cache, before) if b is not None] == [StateCache]
    assert [type(e) for e, b in zip(cache, before) if b is None] == [TokenCache]
    model((idx[:, 5:9] + 1) % 61, cache=cache, pos=torch.arange(5, 9))
    for entry, state in zip(cache, before):
        entry.restore(state)
    got = model(idx[:, 5:], cache=cache, pos=torch.arange(5, 12))[0]
    assert_close(got, model(idx)[0][:, 5:], 1e-4, 'logits after the rollback')


# ----------------------------------------------------------------------------------------------------------
# What cannot be drawn


@pytest.mark.parametrize('temperature', [1e-42, 1e-30, 1e-12])
def test_a_tiny_temperature_draws_the_likeliest_token(temperature):
    model, idx = scaled(build(toy()), 5), tokens(toy(), 2, 5)
    greedy = model.generate(idx, 8, temperature=0.0)
    for more in ({}, {'top_k': 4}, {'top_p': 0.9}, {'min_p': 0.1}):
        assert torch.equal(model.generate(idx, 8, temperature=temperature, seed=1, **more), greedy)


ROWS = torch.tensor([[5, 6, 7, 8, 9]] * 2)


@pytest.mark.parametrize('options, sentence', [
    ({'max_new_tokens': -1}, 'max_new_tokens=-1 must be at least 0'),
    ({'max_new_tokens': 2.5}, 'max_new_tokens=2.5 must be a whole number'),
    ({'num_samples': 0}, 'num_samples=0 must be at least 1'),
    ({'num_samples': 1.5}, 'num_samples=1.5 must be a whole number'),
    ({'top_k': 2.5}, 'top_k=2.5 must be a whole number'),
    ({'top_k': -2}, 'top_k=-2 must be at least 1'),
    ({'chunk': 2.5}, 'chunk=2.5 must be a whole number'),
    ({'chunk': -1}, 'chunk=-1 must be at least 1'),
    ({'seed': 0.5}, 'seed=0.5 must be a whole number, or None for another text every time'),
    ({'temperature': float('inf')}, 'temperature=inf must be at least 0'),
    ({'lengths': [9, 9]}, r'lengths=\[9, 9\] must be 2 whole numbers from 1 to 5'),
    ({'lengths': [3]}, r'lengths=\[3\] must be 2 whole numbers from 1 to 5'),
    ({'lengths': [0, 5]}, r'lengths=\[0, 5\] must be 2 whole numbers from 1 to 5'),
    ({'lengths': [2.5, 5.0]}, 'lengths=.* must be 2 whole numbers from 1 to 5'),
    ({'idx': ROWS[:0]}, 'idx must hold at least one token to continue, in at least one row'),
    ({'idx': ROWS[:, :0]}, 'idx must hold at least one token to continue'),
    ({'idx': ROWS[0]}, r'idx of shape \(5,\) .* must be \(B,T\) in int64'),
    ({'idx': ROWS.float()}, r'idx of .* torch.float32 must be \(B,T\) in int64'),
    ({'idx': ROWS + 60}, 'token 69 must be one of the 61 tokens that the model knows'),
    ({'idx': ROWS - 60}, 'token -55 must be one of the 61 tokens')], ids=str)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(options, sentence):
    model = build(toy(pos='rope'))
    with pytest.raises(ValueError, match=f'^{sentence}') as error:
        model.generate(**{'idx': ROWS, 'max_new_tokens': 3} | options)
    assert '\n' not in str(error.value)
