"""Attention maps are those of the model, and what is said of them holds for maps made by hand."""
import math

import pytest
import runs
import torch
from conftest import ROOT, build, every_decoder_alone, flags_of, scaled, shrink, tokens

import bench
from model import DiffAttention, SoftmaxAttention
from nanoblocks.experiments import heads, sweep, trained
from nanoblocks.experiments.statistics import effect

T = 20


def family(name, **more):
    flags = shrink(flags_of(ROOT / 'config' / f'{name}.py'))
    return scaled(build(flags | more), 3), flags


def calls_of(model, idx):
    """What every layer gave to its attention: [(q, k, v, ctx, key_pos, output)]"""
    calls = []
    handles = [m.register_forward_hook(lambda m, args, y: calls.append((*args, y)))
               for m in model.modules() if isinstance(m, SoftmaxAttention)]
    with torch.no_grad():
        model(idx)
    for handle in handles:
        handle.remove()
    return calls


def weighted(p, v):
    """The definition: p (B,H,T,S), v (B,S,K,D) -> (B,T,H,D), query head h reading h // (H / K)"""
    v = v.repeat_interleave(p.shape[1] // v.shape[2], dim=2)
    return torch.einsum('bhts,bshd->bthd', p, v)


@every_decoder_alone
def test_maps_times_values_are_what_attention_returns(flags):
    model, idx = scaled(build(flags), 3), tokens(flags, 2, T)
    maps, calls = heads.attention_maps(model, idx), calls_of(model, idx)
    diff = {layer: m for layer, block in enumerate(model.h) for m in block.modules()
            if isinstance(m, DiffAttention)}
    assert len(calls) == len(maps) + len(diff)
    for layer, p in maps.items():
        y = calls.pop(0)
        v, y = y[2], y[-1]
        rows = torch.ones(())
        if layer in diff:
            lambda_ = diff[layer].lambda_()
            y, rows = y - lambda_ * calls.pop(0)[-1], 1 - lambda_
        torch.testing.assert_close(weighted(p, v), y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
        assert not p.triu(1).any(), 'a query sees no key after it'
        if model.config.sinks:
            assert (p.sum(-1) < 0.9999).all()
        else:
            torch.testing.assert_close(p.sum(-1), rows.expand(p.shape[:-1]), rtol=1e-4, atol=1e-5)


def test_maps_are_found_by_a_pass_that_leaves_the_model_as_it_was():
    model, flags = family('llama_small')
    idx = tokens(flags, 1, T)
    before = model(idx)[0]
    heads.attention_maps(model, idx)
    assert model(idx)[0].equal(before)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize('name', ['gpt2_small', 'llama_small', 'mistral_small', 'gemma2_small',
                                  'bloom_small'])
def test_maps_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    model, flags = family(name)
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager')
    idx = tokens(flags, 2, T)
    with torch.no_grad():
        want = other.eval()(idx, output_attentions=True).attentions
    for layer, p in heads.attention_maps(model, idx).items():
        torch.testing.assert_close(p, want[layer], rtol=1e-3, atol=1e-4)
    assert len(want) == len(model.h)


# ----------------------------------------------------------------------------------------------------------
# Measures of maps made by hand


def at_distance(distance, T):
    """Maps (1,1,T,T) in which every query gives all to the key that far before it, or to the first."""
    p = torch.zeros(1, 1, T, T)
    for t in range(T):
        p[0, 0, t, max(0, t - distance)] = 1
    return p


def test_hand_made_maps_have_the_scores_of_their_kind():
    n = 20
    key = heads.relevant(torch.randperm(50)[:n].repeat(1, 2))
    for distance, want in ((n - 1, 1), (n, 0), (n - 2, 0)):
        assert heads.induction(at_distance(distance, 2 * n), key).item() == want
    for distance, want in ((0, (0, 0, 1)), (1, (1, 0, 1)), (7, (0, 0, 1)), (8, (0, 0, 0)), (99, (0, 1, 0))):
        found = heads.measured(at_distance(distance, 40))
        assert tuple(found[name].item() for name in ('previous', 'first', 'near')) == want, distance
        assert found['entropy'].item() == 0


def test_measures_equal_their_definition():
    T = 40
    p = torch.rand(3, 2, T, T, dtype=torch.float64).tril()
    p /= p.sum(-1, keepdim=True)
    wanted = dict.fromkeys(('previous', 'first', 'near', 'entropy', 'induction'), 0.0)
    queries = range(heads.START, T)
    for b in range(3):
        for t in queries:
            row = p[b, 1, t].tolist()
            wanted['previous'] += row[t - 1] / len(queries) / 3
            wanted['first'] += row[0] / len(queries) / 3
            wanted['near'] += sum(row[t - d] for d in range(8)) / len(queries) / 3
            wanted['entropy'] -= sum(x * math.log2(x) for x in row if x) / len(queries) / 3
        for t in range(T // 2, T - 1):
            wanted['induction'] += p[b, 1, t, t - T // 2 + 1].item() / (T // 2 - 1) / 3
    key = heads.relevant(torch.arange(T // 2).repeat(3, 2))
    found = heads.measured(p) | {'induction': heads.induction(p, key)}
    assert {name: x[1].item() for name, x in found.items()} == pytest.approx(wanted)


def test_the_relevant_key_follows_the_first_occurrence_and_says_what_comes_next():
    #                                     a b c d eot c d a b  where d was followed by eot, and is by a
    assert heads.relevant(torch.tensor([[1, 2, 3, 4, 9, 3, 4, 1, 2]])).tolist() == [
        [-1, -1, -1, -1, -1, 3, -1, 1, -1]]
    for row in torch.randint(6, (20, 1, 30)):
        tokens, want = row[0].tolist(), []
        for t, token in enumerate(tokens):
            key = tokens.index(token) + 1
            want.append(key if key <= t and tokens[t + 1:t + 2] == [tokens[key]] else -1)
        assert heads.relevant(row)[0].tolist() == want


def test_shares_of_negative_weights_count_their_sizes():
    p = torch.tensor([[0.6, -0.2], [0.5, 0.0]])
    torch.testing.assert_close(heads.shares(p), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    assert heads.shares(p.abs()).equal(p.abs())     # beside a sink, rows of a plain map sum to less than 1


def test_squares_are_shares_of_what_unrelated_values_add_up_to():
    p, v = torch.randn(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    read = (p.unsqueeze(1) * v).sum(0).norm() ** 2
    torch.testing.assert_close(heads.squares(p), (p.unsqueeze(1) * v).norm(dim=1) ** 2 / read)


def test_a_model_that_copies_is_seen_to_copy():
    idx = torch.stack([torch.randperm(50)[:10] for _ in range(4)]).repeat(1, 2)

    def model(rows, shift=0):   # names the token after the first occurrence; nothing is said before that
        return torch.nn.functional.one_hot(rows.roll(9 + shift, 1), 50), None
    assert heads.copied(model, idx) == 1
    assert heads.copied(lambda rows: model(rows, 1), idx) == 0


# ----------------------------------------------------------------------------------------------------------
# The command


def command(topic, *words):
    return runs.real_python('bench.py', topic, *words)


def test_a_run_is_described(tmp_path, capsys):
    heads.heads([str(runs.trained())], [], tmp_path, 'cpu')
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    of_heads = [line for line in lines if line[:1] == ['layer']]
    assert [line[1::2][:2] for line in of_heads] == [['0', '0'], ['0', '1'], ['1', '0'], ['1', '1']]
    assert all(0 <= float(x) <= 5 for line in of_heads for x in line[4:])
    for name in ('heads', 'maps', 'repeated'):
        assert (tmp_path / f'{name}.png').exists()


def test_a_model_without_maps_is_refused(tmp_path):
    folder, _ = runs.train(layer_pattern='m', pos='none', ssm_state=4)
    with pytest.raises(ValueError, match=f'{folder} must hold a model with maps of attention.* has none'):
        heads.heads([str(folder)], [], tmp_path, 'cpu')


def test_a_folder_stands_alone(tmp_path):
    with pytest.raises(ValueError, match='max_iters=3 must be left out: bench.py heads out/run reads that'):
        heads.heads(['out/run'], ['--max_iters=3', '--device=cpu'], tmp_path, 'cpu')
    with pytest.raises(ValueError, match='out/b must be left out'):
        heads.heads(['out/run', 'out/b'], [], tmp_path, 'cpu')


@pytest.mark.parametrize('topic, words, reason', [
    ('heads', ['out/nothing'], 'out/nothing/ckpt.pt does not exist: train a model into that out_dir first'),
    ('heads', ['--attn=mla'], 'attn=mla must be left out: bench.py heads sets it itself'),
    ('heads', ['--dataset=pysource'], 'dataset=pysource must be left out: bench.py heads sets it itself'),
    ('heads', ['config/bert_small.py'], 'objective must be left out of config/bert_small.py: bench.py heads'),
    ('specialists', ['--rounds=2'], 'rounds=2 must be left out: bench.py specialists does not read it'),
    ('norms', ['out/run'], 'out/run')])
def test_words_of_the_command_are_refused_in_a_sentence(topic, words, reason, monkeypatch):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))
    with pytest.raises(SystemExit) as refusal:
        bench.main(topic, words)
    assert reason in str(refusal.value) and '\n' not in str(refusal.value)


def test_plain_and_differential_attention_are_trained_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, 'measure_decoding', lambda *_: {})
    monkeypatch.setattr(heads, 'DATA', tmp_path / 'letters')
    monkeypatch.setattr(heads, 'COPIES', 300)
    own = ('--device=', '--dataset=', '--block_size=')
    toy = [flag for flag in runs.toy(tmp_path, n_head=4, max_iters=10) if not flag.startswith(own)]
    heads.heads([], [*toy, '--seeds=2', f'--out_dir={tmp_path / "runs"}'], tmp_path, 'cpu')
    page = (tmp_path / 'heads.md').read_text()
    assert page.count('± ') >= 8 and page.count('(95 % interval, 2 seeds, 2 layers of width 32') == 3
    assert '| llama_small |' in page and '| DIFF |' in page
    lines = (tmp_path / 'heads.csv').read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 4 + 2 * 2 * 2      # seeds, layers, heads
    for name in ('heads', 'copying_llama_small', 'copying_DIFF', 'noise'):
        assert (tmp_path / f'{name}.png').exists()


def test_a_verdict_says_what_its_interval_allows():
    def said(*values):
        return trained.verdict('A minus B', effect(values), 'more', 'less', 'toy')
    assert said(0.1, 0.11, 0.12) == 'A minus B: +0.110 ± 0.025 (95 % interval, 3 seeds, toy): more.'
    assert said(-0.1, -0.11, -0.12).endswith(': less.')
    assert said(0.1, -0.11).endswith(': not resolved, as the interval includes zero.')
    assert said(0.1) == 'A minus B: +0.100, without an interval (1 seed, toy): not resolved.'
