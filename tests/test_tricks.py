"""The trained comparisons ffns, kvheads and tricks: what their arms are, and the pages that tell of them."""
import math
import re

import pytest
import runs
import torch

from model import GPTConfig, kv_cache_bytes
from nanoblocks.experiments import budget, comparisons, report, statistics, studies, sweep
from nanoblocks.experiments.arms import config_of

DATA = {'vocab_size': 256}


def plan_of(name, monkeypatch, *flags):
    """The plan of a topic's sweep, and its words, without training."""
    plans = []
    monkeypatch.setattr(sweep, 'main', lambda words: plans.append(sweep.make_plan(words)))
    monkeypatch.setattr(budget, 'vocabulary', lambda dataset: 256)
    studies.run_sweeps((name,), flags, 'cpu')
    return plans[0]


def ffn_parameters(flags):
    config = config_of(flags)
    return (3 if config.ffn == 'swiglu' else 2) * config.n_embd * config.ffn_width


@pytest.mark.parametrize('width', [128, 192])
def test_ffns_have_equal_parameters_at_both_sizes(width, monkeypatch):
    plan = plan_of('ffns', monkeypatch, f'--n_embd={width}')
    size = {name: ffn_parameters(flags) for name, flags in plan['arms'].items()}
    assert list(size) == ['llama_small', 'GELU 4x', 'relu2 4x', 'SwiGLU 4x', 'GELU 6x', 'relu2 6x']
    assert size['GELU 4x'] == size['relu2 4x'] == pytest.approx(size['llama_small'], rel=0.01)
    assert size['GELU 6x'] == size['relu2 6x'] == size['SwiGLU 4x'] == 12 * width ** 2
    assert {config_of(flags).ffn for flags in plan['arms'].values()} == {'swiglu', 'gelu', 'relu2'}


@pytest.mark.parametrize('flags', [(), ('--n_head=16', '--n_kv_head=4', '--n_embd=64')])
def test_heads_are_compared_at_equal_parameters_and_two_at_an_equal_cache(flags, monkeypatch):
    arms = plan_of('kvheads', monkeypatch, *flags)['arms']
    configs = {name: config_of(DATA | arm) for name, arm in arms.items()}
    T = configs['MHA'].block_size
    cache = {name: kv_cache_bytes(c, T, 1, 2) for name, c in configs.items()}
    same = cache['llama_small']
    assert cache['MHA same cache'] == cache['MQA same cache'] == same
    assert cache['MHA'] > 1.9 * same and cache['MQA'] < 0.6 * same
    sizes = [budget.cost(arm, 'params') for arm in arms.values()]
    assert max(sizes) < 1.021 * min(sizes)
    for name, c in configs.items():
        groups = {'MHA': c.n_head, 'MHA same cache': c.n_head, 'MQA': 1, 'MQA same cache': 1}
        assert c.n_kv_head == groups.get(name, c.n_kv_head)
    assert 1 < configs['llama_small'].n_kv_head < configs['llama_small'].n_head
    # MHA of few heads has narrow attention; the others are as wide as the model
    assert [name for name, c in configs.items() if c.n_head * c.head_dim < c.n_embd] == ['MHA same cache']


@pytest.mark.parametrize('flag', ['--n_kv_head=1', '--n_kv_head=8', '--n_kv_head=3'])
def test_heads_without_groups_are_refused(flag, monkeypatch):
    with pytest.raises(ValueError, match='n_kv_head=. must be above 1 and divide n_head=8'):
        plan_of('kvheads', monkeypatch, flag)


@pytest.mark.parametrize('topic, flag', [
    ('tricks', 'ffn=gelu'), ('tricks', 'group_lr=matrix=1e-3'), ('tricks', 'window=8'), ('ffns', 'ffn=gelu'),
    ('ffns', 'ffn_width=64')])
def test_a_reference_is_what_its_page_says(topic, flag, monkeypatch):
    with pytest.raises(ValueError, match=f'{flag} must be left out: bench.py {topic} sets it itself'):
        plan_of(topic, monkeypatch, f'--{flag}')


def test_each_trick_is_taken_out_alone(monkeypatch):
    plan = plan_of('tricks', monkeypatch)
    whole = plan['arms']['speedrun']
    taken = {pair['with']: pair['names'] for pair in plan['comparisons']}
    assert list(plan['arms']) == ['speedrun', *taken] and len(plan['seeds']) == 4
    assert sorted(sum(taken.values(), [])) == sorted([
        'qk_norm', 'ffn', 'zero_init', 'value_embed', 'embed_skip', 'tie', 'logit_softcap', 'layer_pattern',
        'window', *taken['AdamW'], 'wsd_decay'])
    for name, arm in plan['arms'].items():
        differ = {key for key in arm if arm[key] != whole[key]}
        assert differ == set(taken.get(name, ())), name
    # out of the stack, it is what GPT-2 has there
    default = GPTConfig()
    for name in ('no QK-norm', 'GELU', 'no zero init', 'no value embedding', 'no embedding skip', 'tied head',
                 'no soft-cap', 'no windows'):
        for flag in taken[name]:
            assert plan['arms'][name][flag] == getattr(default, flag), flag


def test_the_verdict_of_a_page_says_what_is_resolved():
    found = {name: report.Comparison({}, statistics.effect(values), p, None, None) for name, p, values in (
        ('worse', 0.06, [0.1, 0.11, 0.12]), ('better', 0.01, [-0.2, -0.21, -0.2]),
        ('noise', 1.0, [-0.1, 0.1, 0.02]), ('hot', math.nan, [0.1, math.nan, 0.2]))}
    said = comparisons.verdict('the stack', found)
    assert re.fullmatch(r'Against the stack, over 3 seeds: lower: better -0\.203 \(-0\.218 to -0\.189\); '
                        r'higher: worse \+0\.110 \(\+0\.085 to \+0\.135\), not after Holm; '
                        r'not resolved: noise \+0\.007 \(-0\.243 to \+0\.257\); diverged: hot\.', said), said


def toy(tmp_path, seeds):
    """Flags that make a topic's sweep a toy in tmp_path."""
    small = runs.toy(tmp_path / 'runs', max_iters=4, warmup_iters=1, eval_tokens=512, lr_decay_iters=4)
    return [*(flag for flag in small if not flag.startswith('--device=')),
            f'--results={tmp_path / "results"}', f'--seeds={seeds}', '--evals=2']


def test_a_topic_trains_its_arms_and_writes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.SWEEPS, 'tricks', ['--vary=AdamW: optimizer=adamw'])
    studies.tricks(toy(tmp_path, 2), 'cpu')
    page, said = (tmp_path / 'results' / 'README.md').read_text(), 'Against the whole stack, over 2 seeds: '
    assert said in page and said in capsys.readouterr().out
    assert '2 arms, 2 seeds; 4 steps of 256 tokens' in page and 'What this does not show' in page
    figures = re.findall(r'!\[\w+\]\((\w+\.png)\)', page)
    assert figures and all((tmp_path / 'results' / name).exists() for name in figures)
    # losses and differences are those of the runs
    ends = {arm: [runs.losses(tmp_path / 'runs' / arm / f'seed{seed}', 'val_loss')[-1]
                  for seed in (1337, 1338)] for arm in ('speedrun', 'AdamW')}
    assert f'| the whole stack | {sum(ends["speedrun"]) / 2:.4f} |  | ' in page
    mean = sum(b - a for a, b in zip(*ends.values())) / 2
    assert f'| AdamW | {sum(ends["AdamW"]) / 2:.4f} | {mean:+.4f}, ' in page


def test_pairs_of_a_page_are_compared_with_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.SWEEPS, 'ffns', ['--vary=GELU 4x: ffn=gelu; relu2 4x: ffn=relu2'])
    studies.ffns(toy(tmp_path, 1), 1, '8', '8', 'cpu', tmp_path / 'results')
    page = (tmp_path / 'results' / 'README.md').read_text()
    a, b = (runs.losses(tmp_path / 'runs' / arm / 'seed1337', 'val_loss')[-1]
            for arm in ('GELU 4x', 'relu2 4x'))
    assert f'- relu2 4x against GELU 4x one seed only ({b - a:+.4f}): no interval' in page
    assert '| SwiGLU 8/3x | ' in page and '(ffns.png)' in page
    assert 'GELU 6x' not in page, 'arms that were not trained are left out'
    assert 'relu2 6x' in capsys.readouterr().out, 'but timed'


# ----------------------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize('name', ['layernorm', 'rmsnorm'])
def test_norms_written_in_several_ways_are_the_same(name):
    x = torch.randn(3, 5, 16)
    wide, eps = x.double(), 1e-5
    centred = wide - wide.mean(-1, keepdim=True) if name == 'layernorm' else wide
    wanted = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    for code in studies.CODES:
        assert torch.allclose(studies.norm_of(code, name, 16, 'cpu')(x).double(), wanted, atol=1e-5), code
