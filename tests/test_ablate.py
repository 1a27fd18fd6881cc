"""
Ablations: the arms between two configs and of a list of values, budgets, the guard, statistics against worked
numbers, a sweep of two arms as a user runs it, and its report.

A sweep of toys is trained once; the tests that plant a fault do so in a copy of it.
"""
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from data.tokenizer import ByteTokenizer
from data.writer import write_dataset
from model import GPTConfig
from nanoblocks.experiments import figures, report, sweep
from nanoblocks.experiments.arms import MODEL, arms_between, arms_of_vary, config_of, filled_in, read_flags
from nanoblocks.experiments.budget import WIDTHS, cost, match_budgets
from nanoblocks.experiments.runs import check_pair, progress, read_lines, recorded
from nanoblocks.experiments.statistics import effect, seeds_needed, t_quantile, t_within
from nanoblocks.training import checkpoint

SIZE = '''
n_layer = 2
n_head = 2
n_embd = 32
head_dim = None
block_size = 32
batch_size = 4
gradient_accumulation_steps = 1
max_iters = 20
warmup_iters = 2
learning_rate = 3e-3
log_interval = 5
eval_tokens = 512
device = 'cpu'
'''
SEEDS = (1337, 1338)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a size file and a dataset of made-up words."""
    folder = tmp_path_factory.mktemp('ablate')
    rng = np.random.default_rng(0)
    known = [''.join(rng.choice(list('abcdefghij'), size)) for size in rng.integers(2, 6, 30)]
    texts = [('val' if i % 10 == 0 else 'train', ' '.join(rng.choice(known, 60)) + '\n') for i in range(100)]
    write_dataset(folder / 'data', texts, ByteTokenizer(), 'toy')
    (folder / 'size.py').write_text(f'{SIZE}dataset = {str(folder / "data")!r}\n')
    return folder


def command(place, out, *more):
    """The arguments of a sweep of two arms, on two seeds."""
    return [str(ROOT / 'config/llama_small.py'), str(place / 'size.py'), '--n_kv_head=1',
            '--vary=norm=layernorm', '--seeds=2', '--evals=4', f'--out_dir={out}', *more]


def python(*args, **env):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'} | env, timeout=300)


@pytest.fixture(scope='module')
def swept(place):
    """A finished sweep, which no test changes; what it printed lies beside it."""
    out = place / 'sweep'
    done = python('ablate.py', *command(place, out))
    assert done.returncode == 0, done
    (out / 'printed.txt').write_text(done.stdout)
    return out


@pytest.fixture
def copy(swept, tmp_path):
    """A sweep of one's own, with the plan that knows where it lies."""
    shutil.copytree(swept, tmp_path / 'sweep')
    plan = report.read_plan(tmp_path / 'sweep')
    (tmp_path / 'sweep' / 'sweep.json').write_text(
        json.dumps(plan | {'folder': str(tmp_path / 'sweep'), 'results': str(tmp_path / 'sweep')}))
    return tmp_path / 'sweep'


def plan_of(copy):
    return report.read_plan(copy)


def change(path, **values):
    """Write other values into a run's config.json, wherever it has those names."""
    run = json.loads(path.read_text())
    for part in run.values():
        part.update({name: value for name, value in values.items() if name in part})
    path.write_text(json.dumps(run))


# ----------------------------------------------------------------------------------------------------------
# Arms


@functools.cache
def flags_of(*argv):
    return read_flags(list(argv))[0]


def between(base, target, places=('alone', 'removed', 'ladder')):
    start, end = (flags_of(f'config/{name}.py', 'config/tiny.py') for name in (base, target))
    return start, end, *arms_between(start, end, base, target, places)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def differing(first, second):
    first, second = (filled_in(flags) for flags in (first, second))
    return {name for a, b in zip(first, second) for name in a | b if a.get(name) != b.get(name)}


def test_the_step_from_gpt2_to_llama_is_its_five_flags_in_the_order_of_the_file():
    start, end, arms, pairs, ladder = between('gpt2_small', 'llama_small')
    flags = ['pos', 'norm', 'ffn', 'bias', 'n_kv_head']
    assert [pair['flag'] for pair in pairs if pair['how'] in ('alone', 'all')] == ['all of them', *flags]
    assert ladder[0] == 'gpt2_small' and ladder[-1] == 'llama_small' and len(ladder) == 6
    # two ends, five alone, five removed, four between of which one is alone and one removed
    assert len(arms) == 14


def test_every_arm_differs_in_its_flag_and_what_follows_from_it():
    _, _, arms, pairs, _ = between('gpt2_small', 'llama_small')
    for pair in pairs:
        if pair['how'] != 'all':
            found = differing(arms[pair['without']], arms[pair['with']])
            assert set(pair['names']) == {pair['flag']} <= found, pair
            # what is left open follows, as a gated ffn has a width of its own; all else stays
            follows = found - {pair['flag']}
            assert all(MODEL[name].default is None for name in follows), pair
            assert (pair['flag'] == 'ffn') == ('ffn_width' in follows), pair


@pytest.mark.parametrize('target, groups', [
    ('mistral_small', {'layer_pattern+window'}), ('mixtral_small', {'ffn_pattern+n_expert'}),
    ('gemma2_small', {'layer_pattern+window', 'softcap', 'logit_softcap', 'norm_at', 'embed_scale'}),
    ('deepseek_small', {'pos+attn', 'norm'}), ('jamba_small', {'pos', 'norm', 'ssm_norm+layer_pattern+ssm'}),
])
def test_flags_that_mean_nothing_alone_go_together(target, groups):
    _, _, arms, pairs, ladder = between('gpt2_small', target)
    found = {frozenset(pair['flag'].split('+')) for pair in pairs}
    for group in map(frozenset, (group.split('+') for group in groups)):
        # a family may add to a group of several flags, never to a flag that works alone
        assert any(group <= other if len(group) > 1 else group == other for other in found), found
    for arm in arms.values():
        config_of(arm)
    assert ladder[-1] == target


def test_a_ladder_alone_trains_its_rungs_only():
    _, _, arms, pairs, ladder = between('gpt2_small', 'llama_small', ('ladder',))
    assert list(arms) == ladder and ladder[-1] == 'llama_small'
    assert {pair['how'] for pair in pairs} == {'all', 'ladder'}


def test_configs_that_are_the_same_are_refused():
    with pytest.raises(ValueError, match='must differ'):
        between('llama_small', 'llama_small')


def test_values_are_arms_beside_the_files_as_they_are():
    reference = flags_of('config/llama_small.py', 'config/tiny.py')
    arms, pairs = arms_of_vary(
        reference, 'llama_small', 'norm=layernorm,rmsnorm; n_kv_head=1,2,4; weight_decay=1e-1; '
        'Mamba: layer_pattern=m+pos=none+n_kv_head=None; ffn_pattern=e+n_expert=8')
    assert list(arms) == ['llama_small', 'norm=layernorm', 'n_kv_head=1', 'n_kv_head=4', 'weight_decay=1e-1',
                          'Mamba', 'ffn_pattern=e+n_expert=8']
    assert [set(pair['names']) for pair in pairs] == [
        {'norm'}, {'n_kv_head'}, {'n_kv_head'}, {'weight_decay'}, {'layer_pattern', 'pos', 'n_kv_head'},
        {'ffn_pattern', 'n_expert'}]
    assert config_of(arms['Mamba']).layer_pattern == 'm'
    assert arms['weight_decay=1e-1']['weight_decay'] == 0.1


@pytest.mark.parametrize('text, sentence', [
    ('norm=layernorm,batchnorm', 'norm=batchnorm must be one of'), ('norm', 'must be flag=value'),
    ('norn=layernorm', 'norn is no setting .* did you mean norm?'), ('norm=rmsnorm', 'must hold a value'),
    ('seed=1,2', 'seed must not differ'), ('block_size=64', 'block_size must not differ'),
    ('batch_size=4', 'batch_size must not differ'), ('layer_pattern=m', 'joined by'),
    ('n_kv_head=two', 'must be an int'), ('A: norm=layernorm,rmsnorm', 'must be flag=value'),
])
def test_what_cannot_be_compared_is_refused_in_one_sentence(text, sentence):
    with pytest.raises((ValueError, SystemExit), match=sentence) as refusal:
        arms_of_vary(flags_of('config/llama_small.py', 'config/tiny.py'), 'llama_small', text)
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('more, sentence', [
    ((), 'either --base'), (('--vary=norm=layernorm', '--base=config/gpt2_small.py'), 'either --base'),
    (('--vary=norm=layernorm', '--match=size'), 'match=size must be one of'),
    (('--vary=norm=layernorm', '--seeds=0'), 'seeds=0 must be at least 1'),
    (('--base=config/gpt2_small.py', '--arms=all'), 'arms=all must be some of'),
    (('--vary=norm=layernorm', '--sedes=3'), 'did you mean --seeds'),
])
def test_wrong_settings_are_refused_before_anything_is_trained(more, sentence):
    with pytest.raises((ValueError, SystemExit), match=sentence):
        sweep.make_plan(['config/llama_small.py', 'config/tiny.py', *more])


def test_learning_rates_are_spread_around_the_given_one(place):
    plan = sweep.make_plan(command(place, 'out/x', '--lr_sweep=3', '--seeds=1', '--min_lr=1e-4'))
    runs = [run for run in sweep.runs_of(plan) if run['arm'] == 'llama_small']
    assert [run['flags']['learning_rate'] for run in runs] == pytest.approx([1.5e-3, 3e-3, 6e-3])
    assert [run['flags']['min_lr'] for run in runs] == pytest.approx([5e-5, 1e-4, 2e-4])
    assert len({run['path'] for run in runs}) == 3


# ----------------------------------------------------------------------------------------------------------
# Budgets


@pytest.mark.parametrize('kind', ['params', 'active', 'flops'])
@pytest.mark.parametrize('flags', [
    dict(ffn='gelu', n_kv_head=1), dict(ffn='swiglu', n_kv_head=1), dict(layer_pattern='ma'),
    dict(ffn_pattern='e', n_expert=8), dict(ffn_pattern='fe', n_expert=8, n_shared=1), dict(attn='mla'),
])
def test_a_matched_budget_is_within_one_percent(kind, flags, place):
    reference = flags_of('config/gpt2_small.py', 'config/tiny.py') | {
        'dataset': str(place / 'data'), 'n_embd': 128}
    arm = reference | {'pos': 'rope'} | flags
    held, notes = match_budgets({'reference': reference, 'arm': arm}, 'reference', kind)
    assert held['reference'] == reference
    budget = cost(reference, kind)
    assert abs(cost(held['arm'], kind) / budget - 1) <= 0.01
    # only widths moved, and only where the budget would have been missed
    assert {name for name in held['arm'] if held['arm'].get(name) != arm.get(name)} <= set(WIDTHS)
    missed = abs(cost(arm, kind) / budget - 1) > 0.01
    assert missed == (held['arm'] != arm) == ('arm' in notes)


def test_the_budget_counts_the_vocabulary_of_the_dataset(place):
    small = flags_of('config/gpt2_small.py', 'config/tiny.py') | {'dataset': str(place / 'data')}
    config = config_of(small)
    with_50k = cost(small | {'vocab_size': config.vocab_size}, 'params')
    assert with_50k - cost(small, 'params') == (config.vocab_size - 257) * config.n_embd


def test_a_budget_that_no_width_can_hold_is_refused(place):
    reference = flags_of('config/llama_small.py', 'config/tiny.py') | {'dataset': str(place / 'data')}
    arms = {'a': reference, 'b': reference | {'ffn_pattern': '-', 'ffn': 'gelu'}}
    with pytest.raises(ValueError, match='b: match=params must have an ffn to resize'):
        match_budgets(arms, 'a', 'params')


# ----------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize('p, df, t', [
    (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 4, 2.77645), (0.975, 9, 2.26216),
    (0.975, 30, 2.04227), (0.8, 5, 0.919544), (0.995, 2, 9.92484), (0.95, 120, 1.65765)])
def test_t_quantiles_equal_the_printed_tables(p, df, t):
    assert t_quantile(p, df) == pytest.approx(t, rel=1e-5)


def test_t_within_equals_a_sum_over_its_density():
    for df in (1, 2, 5, 8):
        x = np.linspace(0, 1.7, 200001)
        density = (1 + x * x / df) ** (-(df + 1) / 2)
        scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
        assert t_within(1.7, df) == pytest.approx(2 * scale * np.trapezoid(density, x), abs=1e-8)


def test_paired_interval_equals_worked_numbers():
    # mean -0.02, sd 0.01, n 3: 4.30265 * 0.01 / sqrt(3) = 0.024841
    e = effect([-0.01, -0.02, -0.03])
    assert (e.n, e.mean, e.sd, e.half) == pytest.approx((3, -0.02, 0.01, 0.024841), rel=1e-4)
    assert not e.resolved
    # the same scatter around -0.03 excludes zero
    assert effect([-0.02, -0.03, -0.04]).resolved
    assert not effect([-0.02]).resolved and math.isnan(effect([-0.02]).half)


def test_pairing_removes_what_the_seeds_have_in_common():
    noise = [0.5, -0.3, 0.1, 0.9]
    e = effect([(2 + n - 0.01) - (2 + n) for n in noise])
    assert e.resolved and e.mean == pytest.approx(-0.01)


def test_seeds_needed_resolve_four_times_out_of_five():
    # sd over difference 2: a t-test for d = 0.5 needs 34 pairs at 80 % power (Cohen 1988)
    assert seeds_needed(0.5, 1.0) == 34
    assert seeds_needed(1e-6, 1.0) is None
    rng = np.random.default_rng(0)
    hits = sum(effect(list(rng.normal(0.5, 1.0, 34))).resolved for _ in range(1000))
    assert 760 <= hits <= 850, hits


def test_what_is_not_resolved_is_said_to_be_and_how_many_seeds_it_takes():
    assert 'not resolved (-0.0200' in report.verdict(effect([-0.01, -0.02, -0.03]))
    assert 'about 5 seeds would be needed' in report.verdict(effect([-0.01, -0.02, -0.03]))
    assert report.verdict(effect([-0.02, -0.03, -0.04])).startswith('lowers the loss by 0.0300')
    assert report.verdict(effect([0.02, 0.03, 0.04])).startswith('raises the loss by 0.0300')
    assert 'no interval' in report.verdict(effect([0.1]))
    assert report.verdict(effect([0.0, 0.0])) == 'no difference at all'
    assert report.verdict(effect([0.1, math.nan])) == 'a run diverged'


def test_loss_at_a_step_lies_on_the_line_between_evaluations():
    curve = [(10, 4.0), (20, 3.0), (40, 2.0)]
    assert [report.loss_at(curve, step) for step in (10, 15, 30, 40, 99)] == [4.0, 3.5, 2.5, 2.0, 2.0]
    assert math.isnan(report.loss_at(curve, 5))


# ----------------------------------------------------------------------------------------------------------
# A sweep


def test_a_sweep_trains_every_arm_on_every_seed_and_reports(swept):
    printed = (swept / 'printed.txt').read_text()
    assert '2 arms, 2 seeds, 1 learning rate: 4 runs, 0 of them finished' in printed
    for name in ('report.md', 'report.csv', 'differences.csv', 'differences.png', 'curves.png', 'sweep.json'):
        assert (swept / name).exists(), name
    for arm in ('llama_small', 'norm=layernorm'):
        for seed in SEEDS:
            model, settings = recorded(swept / arm / f'seed{seed}')
            assert settings['seed'] == seed and settings['eval_interval'] == 5
            assert model['norm'] == ('layernorm' if '=' in arm else 'rmsnorm')


def test_the_report_says_what_the_runs_measured(swept):
    finals = {}
    for arm in ('llama_small', 'norm=layernorm'):
        for seed in SEEDS:
            lines = read_lines(swept / arm / f'seed{seed}' / 'metrics.jsonl')
            finals[arm, seed] = [line['val_loss'] for line in lines if 'val_loss' in line][-1]
    text = (swept / 'report.md').read_text()
    e = effect([finals['norm=layernorm', seed] - finals['llama_small', seed] for seed in SEEDS])
    assert f'{e.mean:+.4f} | {report.interval(e)} | ' in text and f' | 2 | {e.p:.4f} | ' in text
    mean = (finals['llama_small', 1337] + finals['llama_small', 1338]) / 2
    assert f'| llama_small | {mean:.4f} |' in text
    # llama with 1 of 2 heads of 16 caches 2 layers x (1 + 1) x 16 numbers of 2 bytes, and int32 positions
    assert f' | {2 * (2 * 16 * 2 + 4)} | ' in text
    assert 'nan' not in text


def test_finished_runs_are_skipped_and_an_arm_without_effect_has_no_difference_at_all(copy, place):
    """What wsd would do is nothing to a cosine: whatever else differed between two paired runs would show."""
    before = {path: path.stat().st_mtime_ns for path in copy.glob('*/*/metrics.jsonl')}
    done = python('ablate.py', *command(place, copy, '--vary=norm=layernorm; wsd_decay=0.5', '--jobs=2'))
    assert done.returncode == 0, done
    assert '6 runs, 4 of them finished' in done.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert 'wsd_decay=0.5 (wsd_decay 0.6 -> 0.5): no difference at all.' in done.stdout


def cut(run, step):
    """Leave of a run what a kill at `step` leaves: its metrics up to there, and no checkpoint."""
    lines = [line for line in read_lines(run / 'metrics.jsonl') if line['step'] <= step]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 1')
    for path in run.glob('ckpt*.pt'):
        path.unlink()


def test_a_killed_run_is_trained_again_to_the_same_end(copy, place):
    run = copy / 'norm=layernorm' / 'seed1338'
    want = progress(run)
    cut(run, 10)
    assert progress(run)[0] == 10
    done = python('ablate.py', *command(place, copy))
    assert done.returncode == 0 and '4 runs, 3 of them finished' in done.stdout, done
    assert progress(run) == want


def test_an_unfinished_run_with_a_checkpoint_goes_on_from_it(swept):
    plan = plan_of(swept)
    run = sweep.runs_of(plan)[0]
    assert '--init_from=resume' in sweep.command_of(run, swept)
    assert '--init_from=resume' not in sweep.command_of(run, swept / 'elsewhere')


def test_report_from_files_equals_the_one_of_the_sweep(copy):
    want = (copy / 'report.md').read_text()
    for name in ('report.md', 'report.csv', 'differences.png'):
        (copy / name).unlink()
    done = python('ablate.py', '--report', copy)
    assert done.returncode == 0, done
    assert (copy / 'report.md').read_text() == want and (copy / 'differences.png').exists()


def test_figures_are_drawn_again_from_the_tables_alone(copy, tmp_path):
    for name in ('report.csv', 'differences.csv'):
        shutil.copy(copy / name, tmp_path)
    sweep.report_again(tmp_path, '')
    assert (tmp_path / 'differences.png').exists() and not (tmp_path / 'curves.png').exists()


def test_a_figure_of_a_ladder_says_that_each_row_is_compared_with_the_row_above():
    _, _, _, pairs, ladder = between('gpt2_small', 'llama_small', ('ladder',))
    rows, heading = figures.layout([(pair, effect([-0.1, -0.2])) for pair in pairs])
    assert heading == 'Each row is compared with the row above it'
    assert [text for _, text, _ in rows] == [
        'the start: gpt2_small', '+ pos: learned \u2192 rope', '+ norm: layernorm \u2192 rmsnorm',
        '+ ffn: gelu \u2192 swiglu', '+ bias: True \u2192 False', '+ n_kv_head: 4 \u2192 2',
        'all together, compared with gpt2_small']
    assert figures.arm_labels(ladder, pairs, ladder)['llama_small'] == '+ n_kv_head = llama_small'


def test_a_row_of_the_report_names_the_arm_it_is_compared_with():
    _, _, _, pairs, _ = between('gpt2_small', 'llama_small', ('ladder',))
    e = effect([-0.1, -0.2])
    table = report.differences_table([report.Comparison(pair, e, e.p, None, None) for pair in pairs])
    assert '| norm layernorm -> rmsnorm | ladder1+pos | -0.1500 |' in table[4]


def test_without_matplotlib_the_tables_stand_alone(copy, monkeypatch):
    monkeypatch.setattr(figures, 'have_matplotlib', lambda: False)
    for path in copy.glob('*.png'):
        path.unlink()
    plan = plan_of(copy)
    report.write(plan, sweep.runs_of(plan), copy, copy)
    assert '.png' not in (copy / 'report.md').read_text() and not list(copy.glob('*.png'))
    assert '## Paired differences' in (copy / 'report.md').read_text()


def test_learning_rates_are_compared_at_the_best_of_each_arm(tmp_path, place):
    plan = sweep.make_plan(command(place, tmp_path, '--lr_sweep=3'))
    best = {'llama_small': 1.0, 'norm=layernorm': 2.0}
    for run in sweep.runs_of(plan):
        folder = tmp_path / run['path']
        folder.mkdir(parents=True)
        loss = 2.0 + 0.1 * abs(math.log2(run['rate'] / best[run['arm']])) + 0.01 * (run['seed'] - 1337)
        lines = [{'step': step, 'seconds': 1.0, 'val_loss': loss + 20 - step, 'val_bpb': 1.0}
                 for step in (5, 10, 15, 20)]
        (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        (folder / 'config.json').write_text(json.dumps(
            {'model': vars(config_of(run['flags'])), 'settings': run['flags']}))
    sweep.guard(plan, tmp_path)
    report.write(plan, sweep.runs_of(plan), tmp_path, tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '| norm=layernorm | 2.2050 | 2.1050 | 2.0050 | x 2 |' in text
    assert 'wider sweep may favour them: norm=layernorm.' in text
    assert '(norm rmsnorm -> layernorm): no difference at all' in text


# ----------------------------------------------------------------------------------------------------------
# Planted faults


def refusal(copy):
    with pytest.raises((ValueError, OSError)) as error:
        sweep.report_again(copy, '')
    assert '\n' not in str(error.value)
    return str(error.value)


def test_an_arm_whose_flag_was_not_applied_is_caught(copy):
    change(copy / 'norm=layernorm' / 'seed1337' / 'config.json', norm='rmsnorm')
    assert 'must hold a run with norm=layernorm, and its config.json says rmsnorm' in refusal(copy)
    # and by the recorded configs alone, whatever the plan says
    with pytest.raises(ValueError, match='norm must differ between .* the flag was not applied'):
        check_pair(copy / 'llama_small' / 'seed1337', copy / 'norm=layernorm' / 'seed1337', ['norm'])


def test_an_arm_with_another_seed_is_caught(copy):
    change(copy / 'norm=layernorm' / 'seed1337' / 'config.json', seed=7)
    assert 'must hold a run with seed=1337, and its config.json says 7' in refusal(copy)
    with pytest.raises(ValueError, match=r'differ in seed too \(1337, 7\)'):
        check_pair(copy / 'llama_small' / 'seed1337', copy / 'norm=layernorm' / 'seed1337', ['norm'])


@pytest.mark.parametrize('name, value', [('learning_rate', 1e-3), ('softcap', 30.0), ('ffn_width', 80),
                                         ('max_iters', 30), ('n_kv_head', 2), ('dropout', 0.1)])
def test_an_arm_that_differs_in_something_else_is_caught(copy, name, value):
    runs = copy / 'llama_small' / 'seed1337', copy / 'norm=layernorm' / 'seed1337'
    check_pair(*runs, ['norm'])
    change(runs[1] / 'config.json', **{name: value})
    with pytest.raises(ValueError, match=name):
        check_pair(*runs, ['norm'])
    assert name in refusal(copy)


def test_what_follows_from_a_flag_may_differ_and_what_does_not_may_not(tmp_path):
    runs = []
    for ffn in ('gelu', 'swiglu'):
        (tmp_path / ffn).mkdir()
        runs.append(tmp_path / ffn)
        model = vars(GPTConfig(n_layer=1, n_head=2, n_embd=32, ffn=ffn))
        (tmp_path / ffn / 'config.json').write_text(json.dumps({'model': model, 'settings': {'seed': 1}}))
    check_pair(*runs, ['ffn'])
    change(runs[1] / 'config.json', ffn_width=96)
    with pytest.raises(ValueError, match='ffn_width=96 in .* does not follow'):
        check_pair(*runs, ['ffn'])
    check_pair(*runs, ['ffn'], free=WIDTHS)


def test_an_arm_that_crashed_half_way_is_named_and_does_not_count(copy, capsys):
    cut(copy / 'norm=layernorm' / 'seed1338', 10)
    sweep.report_again(copy, '')
    assert 'norm=layernorm/seed1338: step 10 of 20, NOT FINISHED' in capsys.readouterr().out
    text = (copy / 'report.md').read_text()
    assert 'Not finished, so not counted: 1 run**' in text and 'one seed only' in text


def test_a_run_that_fails_is_reported_and_the_others_go_on(copy, place):
    run = copy / 'llama_small' / 'seed1338'
    cut(run, 10)
    (run / 'ckpt.pt').write_bytes(b'damaged')
    shutil.rmtree(copy / 'norm=layernorm' / 'seed1338')
    done = python('ablate.py', *command(place, copy))
    assert done.returncode == 1 and 'llama_small/seed1338 ended at step 10 of 20' in done.stderr, done
    assert 'damaged' in done.stderr and progress(copy / 'norm=layernorm' / 'seed1338')[0] == 20
    assert 'llama_small/seed1338: step 10 of 20' in (copy / 'report.md').read_text()


def test_a_failed_run_has_no_time_left(copy, place):
    cut(copy / 'llama_small' / 'seed1338', 10)
    (copy / 'llama_small' / 'seed1338' / 'ckpt.pt').write_bytes(b'damaged')
    done = python('ablate.py', *command(place, copy))
    line, = [line for line in done.stdout.splitlines() if line.startswith('[1/1]')]
    assert 'with exit code 1: ' in line and 'left' not in line, line


@pytest.mark.parametrize('vary, begins', [
    ('norm=batchnorm', 'norm=batchnorm must be one of '), ('n_head=3', 'n_head=3: n_embd=256 must be '),
    ('Mamba: layer_pattern=m', 'Mamba: n_kv_head=2 must be left out ')])
def test_what_an_arm_is_refused_for_is_labelled_once(vary, begins):
    flags = flags_of('config/llama_small.py', 'config/tiny.py')
    with pytest.raises(ValueError) as refused:
        arms_of_vary(flags, 'llama_small', vary)
    assert str(refused.value).startswith(begins)


@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('how', ['ctrl-c', 'one signal', 'hangup'])
def test_a_sweep_that_is_stopped_loses_no_step(place, tmp_path, how):
    """A terminal sends Ctrl-C to all its processes; a scheduler or kill, to one of them."""
    out = tmp_path / 'sweep'
    argv = [*command(place, out, '--evals=1', '--max_iters=100000', '--log_interval=1')]
    process = subprocess.Popen([sys.executable, 'ablate.py', *argv], cwd=ROOT, stderr=subprocess.PIPE,
                               env=os.environ | {'OMP_NUM_THREADS': '1'}, start_new_session=True, text=True,
                               stdout=subprocess.DEVNULL, preexec_fn=hear_ctrl_c)
    run = out / 'llama_small' / 'seed1337'
    while not (run / 'metrics.jsonl').exists() or len(read_lines(run / 'metrics.jsonl')) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    if how == 'ctrl-c':
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT if how == 'one signal' else signal.SIGHUP)
    err = process.communicate(timeout=60)[1]
    assert 'Traceback' not in err and ('the same command continues' in err) == (how != 'hangup'), err
    saved = checkpoint.step_of(str(run / 'ckpt.pt'))
    assert saved and saved >= read_lines(run / 'metrics.jsonl')[-1]['step'] >= 3
    assert not (run / '.lock').exists()


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_sweep_in_the_same_folder_is_refused(copy, place):
    done = python('ablate.py', *command(place, copy, '--learning_rate=1e-3'))
    assert done.returncode == 1 and 'other values of learning_rate' in done.stderr, done


def test_two_sweeps_at_once_in_one_folder_are_refused(copy):
    pytest.importorskip('fcntl')
    lock = sweep.lock_folder(copy)
    with pytest.raises(ValueError, match='must not be used by two sweeps'):
        sweep.lock_folder(copy)
    os.close(lock)
    os.close(sweep.lock_folder(copy))


def test_report_of_a_folder_without_a_sweep_is_refused_in_one_sentence(tmp_path):
    done = python('ablate.py', '--report', tmp_path)
    assert done.returncode == 1 and 'does not exist: train a sweep' in done.stderr, done
    assert 'Traceback' not in done.stderr
