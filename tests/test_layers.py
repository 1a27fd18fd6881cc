"""Layers of several mixers, of none, and of a block that other layers use, against their definitions."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import build, toy

from model import GPTConfig, Linear, kv_cache_bytes

TIED = toy(layer_pattern='mz', ffn_pattern='-', pos='rope', n_layer=6, ssm_head_dim=8, head_dim=16,
           tied_rank=3, tied_width=20, norm='rmsnorm', bias=False)
KINDS = {
    'short convolution': toy(layer_pattern='sa', pos='rope', short_conv=4),
    'in parallel': toy(layer_pattern='h', pos='rope', ssm_head_dim=8, window=None),
    'no mixer': toy(layer_pattern='-am-', ffn_pattern='f--f', n_layer=4, ssm_head_dim=8, pos='none'),
    'shared': TIED, 'two shared': TIED | dict(tied_blocks=2, tied_rank=None)}
every_kind = pytest.mark.parametrize('flags', KINDS.values(), ids=KINDS)


def redrawn(flags):
    """A model with every parameter away from its start, in float64."""
    model, generator = build(flags).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def tokens(T=17):
    return torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------
# All of them: with a cache, behind padding, rolled back, counted


@every_kind
@torch.no_grad()
def test_a_cache_gives_what_the_whole_text_gives(flags):
    model, idx, cut = redrawn(flags), tokens(), (0, 6, 7, 8, 12, 17)
    want, cache = model(idx)[0], model.new_cache(2, 17)
    for start, end in zip(cut, cut[1:]):
        kept = [entry.snapshot() for entry in cache]
        for again in range(2):      # the second time after a roll-back, which begins with other tokens
            chunk = idx[:, start:end] if again else (idx[:, start:end] + 1) % 61
            got = model(chunk, cache=cache, pos=torch.arange(start, end))[0]
            if start and not again:
                for entry, state in zip(cache, kept):
                    entry.restore(state)
            elif not start and not again:
                for entry in cache:
                    entry.reset()
        torch.testing.assert_close(got, want[:, start:end], rtol=1e-6, atol=1e-6)
    assert sum(entry.nbytes() for entry in cache) == kv_cache_bytes(model.config, 17, 2, 8)


@every_kind
@torch.no_grad()
def test_padding_before_a_row_changes_nothing(flags):
    model, idx, pad = redrawn(flags), tokens(), 5
    alone = model(idx[:1, pad:])[0]
    pos = torch.arange(17) - torch.tensor([[pad], [0]])
    torch.testing.assert_close(model(idx, pos=pos)[0][:1, pad:], alone, rtol=1e-6, atol=1e-6)
    cache = model.new_cache(2, 17)
    got = [model(idx[:, :9], pos=pos[:, :9], cache=cache)[0]]
    got += [model(idx[:, t:t + 1], pos=pos[:, t:t + 1], cache=cache)[0] for t in range(9, 17)]
    torch.testing.assert_close(torch.cat(got, 1)[:1, pad:], alone, rtol=1e-6, atol=1e-6)


@every_kind
@torch.no_grad()
def test_one_prompt_has_several_continuations(flags):
    model, idx = redrawn(flags), tokens()
    cache = model.new_cache(1, 17)
    model(idx[:1, :9], cache=cache)
    for entry in cache:
        entry.expand(2)
    both = torch.stack((idx[0, 9:], idx[1, 9:]))
    got = model(both, cache=cache, pos=torch.arange(9, 17))[0]
    want = model(torch.cat((idx[:1, :9].expand(2, -1), both), 1))[0][:, 9:]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# Each against its definition


@torch.no_grad()
def test_a_short_convolution_is_its_loop():
    layer = redrawn(KINDS['short convolution']).h[0].mixer
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    B, C, inner = layer.in_proj(x).split(32, -1)
    z, rows = B * inner, []
    for t in range(9):
        y = layer.conv1d.bias.clone().expand(2, -1)
        for back in range(min(4, t + 1)):   # the last tap is the token itself
            y = y + layer.conv1d.weight[:, 3 - back] * z[:, t - back]
        rows.append(layer.c_proj(C[:, t] * y))
    ctx = build(toy()).context(torch.zeros(2, 9, dtype=torch.long), None, None)
    torch.testing.assert_close(layer(x, ctx), torch.stack(rows, 1))


@torch.no_grad()
def test_mixers_in_parallel_are_the_sum_of_both():
    """The same weights in a block of attention and one of a state space, that read the same norm."""
    model, idx = redrawn(KINDS['in parallel'] | dict(n_layer=1)), tokens()
    block, ctx = model.h[0], model.context(idx, None, None)
    x = model.wte(idx)
    n = block.ln_1(x)
    attention, state = (redrawn(toy(layer_pattern=letter, pos=pos, n_layer=1, **more)).h[0].mixer
                        for letter, pos, more in (('a', 'rope', {}), ('m', 'none', dict(ssm_head_dim=8))))
    attention.load_state_dict(block.mixer.attn.state_dict())
    state.load_state_dict(block.mixer.ssm.state_dict())
    want = x + attention(n, ctx) + state(n, ctx)
    torch.testing.assert_close(block(x, ctx), want + block.ffn(block.ln_2(want), ctx))


@pytest.mark.parametrize('norm_at', ['pre', 'post', 'sandwich'])
@torch.no_grad()
def test_layers_without_a_mixer_are_halves_of_blocks(norm_at):
    """A layer of attention alone and one of a feed-forward alone: together an ordinary block."""
    whole = redrawn(toy(n_layer=2, norm_at=norm_at))
    halves = redrawn(toy(n_layer=4, norm_at=norm_at, layer_pattern='a-', ffn_pattern='-f'))
    names = halves.state_dict().keys()
    for name, value in whole.state_dict().items():
        _, _, rest = name.split('.', 2) if name.startswith('h.') else ('', '', '')
        if rest:
            layer = 2 * int(name.split('.')[1]) + (rest[:3] in ('ffn', 'ln_') and rest[:4] not in ('ln_1',))
            name = f'h.{layer}.{rest}'
        assert name in names
        halves.state_dict()[name].copy_(value)
    assert halves.num_params() == whole.num_params()
    assert halves.flops_per_token(9) == whole.flops_per_token(9)
    torch.testing.assert_close(halves(tokens())[0], whole(tokens())[0])


@torch.no_grad()
def test_a_shared_block_is_its_definition():
    model, idx = redrawn(TIED | dict(pos='none')), tokens(9)
    x = embedding = model.wte(idx)

    def rms(y, norm):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    ctx = model.context(idx, None, None)
    for number, block in enumerate(model.h):
        if number % 2 == 0:
            x = x + block.mixer(rms(x, block.ln_1), ctx)
            continue
        tied, own = model.tied[0], block.mixer
        q, k, v = F.linear(rms(torch.cat((x, embedding), -1), tied.ln_1),
                           tied.attn.c_attn.weight).view(2, 9, 12, 16).split(4, 2)
        scores = torch.einsum('bthd,bshd->bhts', q, k) / math.sqrt(16)
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        y = torch.einsum('bhts,bshd->bthd', scores.softmax(-1), v).flatten(2)
        y = rms(F.linear(y, tied.attn.c_proj.weight), tied.ln_2)
        first, second = own.more
        gate, up = (F.linear(y, tied.ffn.c_fc.weight) + second(first(y))).chunk(2, -1)
        t = own.c_proj(F.linear(F.gelu(gate) * up, tied.ffn.c_proj.weight))
        x = x + own.ssm(rms(x + t, own.norm), ctx)
    want = F.linear(rms(x, model.ln_f), model.wte.weight)
    torch.testing.assert_close(model(idx)[0], want, rtol=1e-6, atol=1e-6)


def test_a_shared_block_is_one_block():
    """Its weights exist once, whatever the number of layers that use it; its gradient is the sum of all."""
    short, long = (build(TIED | dict(n_layer=n, tied_rank=None)) for n in (2, 6))
    own = sum(p.numel() for p in [*short.h[0].parameters(), *short.h[1].parameters()])
    assert long.num_params() - short.num_params() == 2 * own
    names = [name for name, _ in long.named_parameters() if 'ffn' in name or 'attn' in name]
    assert names and all(name.startswith('tied.0.') for name in names)
    # what three layers, each alone, leave in the one gradient
    weight, idx, parts = long.tied[0].ffn.c_fc.weight, tokens(), []
    long.double()(idx, idx)[1].backward()
    whole, forward = weight.grad.clone(), long.tied[0].forward
    for chosen in range(3):
        weight.grad, calls = None, []

        def only_chosen(*args, chosen=chosen, calls=calls):
            calls.append(args)
            weight.requires_grad_(len(calls) - 1 == chosen)
            y = forward(*args)
            weight.requires_grad_(True)
            return y

        long.tied[0].forward = only_chosen
        long(idx, idx)[1].backward()
        parts.append(weight.grad)
    torch.testing.assert_close(sum(parts), whole)
    assert all(part.abs().max() > 0 for part in parts)


def test_every_use_of_a_shared_block_is_computed():
    """Operations: those of all layers, as if each had a block of its own."""
    flags = TIED | dict(tied_blocks=3)
    shared, own = build(flags | dict(tied_blocks=1)), build(flags)
    assert shared.num_params() < own.num_params()
    assert shared.flops_per_token(17) == own.flops_per_token(17)
    block = sum(m.weight.numel() for m in own.tied[0].modules() if isinstance(m, Linear))
    assert own.h[1].mixer.weights == block


@pytest.mark.parametrize('flags, word', [
    (dict(layer_pattern='-'), "layer_pattern=- must have a letter beside '-'"),
    (dict(layer_pattern='a-', ffn_pattern='f-'), "ffn_pattern=f- must have no '-' in a layer"),
    (dict(layer_pattern='a-', residual='parallel'), 'residual=parallel must be serial'),
    (dict(layer_pattern='-a', embed_norm=True, first_norm=False), 'first_norm=False must be True'),
    (dict(layer_pattern='a-', n_encoder=1), "layer_pattern=a- must have no letters but 'a'"),
    (dict(layer_pattern='s', pos='rope'), 'pos=rope must be learned, sinusoidal or none'),
    (dict(layer_pattern='sa', causal=False), 'causal=False must be True when layer_pattern has one of'),
    (dict(layer_pattern='a', tied_blocks=2), "tied_blocks=2 must be left out unless layer_pattern has a 'z'"),
    (dict(layer_pattern='mz', ssm_head_dim=8, tied_blocks=2), 'tied_blocks=2 must be at most the number'),
    (dict(layer_pattern='z', ssm_head_dim=8, attn='diff'), 'attn=diff must be standard'),
    (dict(layer_pattern='m', ssm_width=40, ssm_expand=3),
     'ssm_expand=3 must be left out unless ssm_width=None'),
    (dict(layer_pattern='m', ssm_width=44, ssm_head_dim=8), 'ssm_head_dim=8 must divide the inner width 44'),
])
def test_what_does_not_fit_is_refused(flags, word):
    with pytest.raises(ValueError, match=word.replace('(', r'\(')):
        GPTConfig(**toy(**flags))


@pytest.mark.parametrize('letter', 'hz')
@torch.no_grad()
def test_their_attention_rotates_at_the_other_base_of_windows(letter):
    """Beside windows at rope_local_theta, h and z rotate at rope_theta, as a does."""
    flags = toy(layer_pattern='w' + letter, pos='rope', window=4, rope_local_theta=50.0, ssm_head_dim=8)
    first, second = (redrawn(flags | dict(rope_theta=theta)) for theta in (1e4, 1e2))
    assert (first(tokens())[0] - second(tokens())[0]).abs().max() > 1e-3
