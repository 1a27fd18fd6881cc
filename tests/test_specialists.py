"""Which experts take which tokens: measures of cases made by hand, and the routing is that of the model."""
import math

import pytest
import runs
import torch
from conftest import ROOT, build, flags_of, shrink, tokens

from nanoblocks.experiments import specialists, sweep


def kinds(*texts):
    return [specialists.KINDS[kind] for kind in specialists.kinds_of(texts)]


def test_tokens_of_code_have_the_kinds_that_they_have_on_the_page():
    begins, on, dot, end = 'word begins', 'word goes on', 'punctuation', 'line end, indent'
    assert kinds('\n', 'def', ' re', 'ad', '_', 'line', '(', 'x', '1', '):', '\n', '   ', ' return', ' ',
                 ' in', 'put', '', 'if', '\n') == [
        end, 'keyword', begins, on, dot, on, dot, begins, 'digits', dot, end, end, 'keyword', 'blanks',
        begins, on, 'other', 'keyword', end]
    assert kinds('\u4e2d', '\ufffd', ' (') == [begins, 'other', dot]
    # characters: the first of a line begins a word, all after it go on
    assert kinds(*'\nab c') == [end, begins, on, 'blanks', begins]


def test_bands_are_fourths_of_the_text_by_how_common_a_token_is():
    token = torch.tensor([7] * 50 + [3] * 20 + [1] * 20 + [0] * 5 + [9] * 5)
    band = specialists.bands(token[torch.randperm(100)])
    assert band.bincount(minlength=4).tolist() == [50, 0, 40, 10]
    assert specialists.bands(token).tolist() == [0] * 50 + [2] * 40 + [3] * 10


# ----------------------------------------------------------------------------------------------------------
# Mutual information and lift


def information(a, b):
    """The definition: the sum of p(x,y) log2 p(x,y) / p(x) p(y)"""
    pairs, n, total = list(zip(a, b)), len(a), 0.0
    for x, y in set(pairs):
        p = pairs.count((x, y)) / n
        total += p * math.log2(p / (a.count(x) / n) / (b.count(y) / n))
    return total


def test_information_equals_its_definition():
    a, b = torch.randint(5, (300,)), torch.randint(7, (300,))
    b = torch.where(torch.rand(300) < 0.4, a, b)
    assert specialists.information(a, b) == pytest.approx(information(a.tolist(), b.tolist()))
    assert specialists.information(a, b) == pytest.approx(specialists.information(b, a))
    assert specialists.information(a, a) == pytest.approx(specialists.entropy(a.bincount()))


def test_shuffled_labels_tell_nothing_but_what_counting_makes_up():
    expert, label = torch.arange(8).repeat(500), torch.arange(200).repeat_interleave(20)
    found, null = specialists.bits(expert, label)
    independent, same = specialists.bits(expert, torch.randint(200, (4000,)))
    assert null == pytest.approx(same, rel=0.1) and abs(independent - same) < 0.1 * same
    # the bias of counts: cells over 2 N ln 2 (Miller and Madow)
    assert null == pytest.approx(199 * 7 / (2 * 4000 * math.log(2)), rel=0.2) and found < null


def test_lift_is_a_share_over_the_share_of_all():
    experts, label = torch.tensor([[0, 1], [0, 1], [2, 0], [2, 1]]), torch.tensor([0, 0, 1, 1])
    want = torch.tensor([[4 / 3, 2 / 3], [4 / 3, 2 / 3], [0, 2]], dtype=torch.float64)
    torch.testing.assert_close(specialists.lifts(experts, label, 3, 2), want)


# ----------------------------------------------------------------------------------------------------------
# Routing


@pytest.mark.parametrize('name', ['mixtral_small', 'deepseek_small', 'jamba_small'])
def test_routes_are_those_by_which_the_output_comes_about(name, monkeypatch):
    flags = shrink(flags_of(ROOT / 'config' / f'{name}.py'))
    model, idx, used = build(flags), tokens(flags, 3, 20), []
    for moe in model.moes:
        experts = moe.experts
        monkeypatch.setattr(moe, 'experts', lambda x, weight, expert, counts, experts=experts: used.append(
            (weight, expert)) or experts(x, weight, expert, counts))
    found = specialists.routes(model, idx)
    assert list(found) == list(specialists.experts_of(model)) and len(found) == len(used) > 0
    for experts, (weight, expert) in zip(found.values(), used):
        assert experts.equal(expert) and experts.shape == (60, model.config.n_expert_used)
        assert model.config.balance != 'aux' or (weight.diff(dim=1) <= 0).all(), 'the best is the first'
    assert not any(moe._forward_hooks for moe in model.moes)


# ----------------------------------------------------------------------------------------------------------
# The command


def test_a_run_is_described(tmp_path, capsys):
    folder, _ = runs.train(ffn_pattern='fe', n_expert=4, n_layer=2)
    specialists.specialists([str(folder)], [], tmp_path, 'cpu')
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    experts = [line for line in lines if line[:1] == ['layer'] and line[2:3] == ['expert']]
    assert [line[1::2][:2] for line in experts] == [['1', str(e)] for e in range(4)]
    assert (tmp_path / 'lifts.png').exists()


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match='must hold a model with experts, and ffn_pattern=f has none'):
        specialists.specialists([str(runs.trained())], [], tmp_path, 'cpu')


def test_two_kinds_of_balancing_are_trained_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, 'measure_decoding', lambda *_: {})
    toy = [flag for flag in runs.toy(tmp_path, n_head=4, max_iters=10) if not flag.startswith('--device=')]
    words = [*toy, '--seeds=2', '--n_expert=4', f'--out_dir={tmp_path / "runs"}']
    specialists.specialists([], words, tmp_path, 'cpu')
    page = (tmp_path / 'specialists.md').read_text()
    for arm in specialists.ARMS.values():
        assert page.count(f'| {arm} |') == 2
    assert page.count('(95 % interval, 2 seeds, 2 layers of width 32, 2 of 4 experts)') == 5
    # arms, seeds, layers
    assert len((tmp_path / 'specialists.csv').read_text().splitlines()) == 1 + 3 * 2 * 2
    assert (tmp_path / 'lifts.png').exists() and (tmp_path / 'bits.png').exists()
