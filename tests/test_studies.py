"""The topics of bench.py that can be checked in seconds: what they claim holds exactly, and their figures exist."""
import sys

import pytest
import runs
import torch

import ablate
import bench
from nanoblocks.experiments import studies

pytest.importorskip('matplotlib')


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_without_matplotlib_a_table_stands_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    bench.run(bench.cache)
    printed = capsys.readouterr().out
    assert 'MLA 512 + 64' in printed and printed.splitlines()[-1].startswith('no figure without matplotlib')


def test_influence_reaches_as_far_as_layers_times_window(tmp_path, capsys):
    studies.reach('cpu', 1, tmp_path)
    rows = [row for row in lines(capsys) if row and row[0].isdigit() and len(row) == 5]
    assert [(int(row[1]), int(row[2])) for row in rows] == [(15 * n, 15 * n) for n in range(1, 7)]
    assert (tmp_path / 'reach.png').stat().st_size > 0


def test_rotated_scores_depend_on_the_offset_alone(tmp_path, capsys):
    studies.rope('cpu', 1, tmp_path)
    rows = [row for row in lines(capsys) if len(row) == 3 and row[0].isdigit()]
    assert len(rows) == 5
    scores = [float(row[1]) for row in rows]
    # the same for every start but for the rounding of fp32 angles, and not the same for every offset
    assert all(float(row[2]) < 2e-3 for row in rows) and max(scores) - min(scores) > 1
    assert (tmp_path / 'rope.png').exists()


def test_a_gated_ffn_at_four_times_the_width_has_half_as_many_parameters_more(tmp_path, capsys):
    studies.ffns('cpu', 1, tmp_path)
    wide = next(row for row in lines(capsys) if row[:2] == ['SwiGLU', '4x'])
    assert wide[2:6] == ['2048', '3,145,728', 'x', '1.50'] and (tmp_path / 'ffns.png').exists()


def test_norms_are_timed_and_counted(tmp_path, capsys):
    studies.norms('cpu', 1, tmp_path)
    rows = [row for row in lines(capsys) if len(row) == 7 and row[1].endswith('norm') and row[0].isdigit()]
    assert [(row[1], int(row[-1])) for row in rows[:2]] == [('layernorm', 512), ('rmsnorm', 256)]
    assert len(rows) == 10 and (tmp_path / 'norms.png').exists()


def test_lengths_stop_where_the_budget_of_seconds_does(tmp_path, capsys):
    studies.lengths('cpu', 1, tmp_path, budget=0.05)
    rows = [row for row in lines(capsys) if row and row[0] == 'attention']
    assert len(rows) == 2 and all(row[-1] == '-' and float(row[1]) > 0 for row in rows)
    assert (tmp_path / 'lengths.png').exists()


def test_router_trains_three_kinds_of_balancing(tmp_path, capsys, monkeypatch):
    toy = [flag for flag in runs.toy(tmp_path) if not flag.startswith(('--out_dir=', '--device='))]
    monkeypatch.setattr(studies, 'SIZE', ['config/llama_small.py', 'config/study.py', *toy])
    studies.router('cpu', 1, tmp_path)
    rows = [row for row in lines(capsys) if row and row[0] in ('none', 'loss', 'bias')]
    assert [row[0] for row in rows] == ['none', 'loss', 'bias']
    assert all(0.125 <= float(row[2]) <= 0.5 and 0 < float(row[3]) <= 1 for row in rows)
    assert (tmp_path / 'router.png').exists()


def test_saved_bytes_counts_each_tensor_once_and_no_parameters():
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(16, 16))
    assert studies.saved_bytes(lambda: x @ weight) == x.nbytes
    assert studies.saved_bytes(lambda: (x * x).sum()) == x.nbytes
    # exp keeps its result, which sin keeps as its input
    assert studies.saved_bytes(lambda: x.exp().sin()) == x.nbytes


def test_peak_bytes_sees_what_is_allocated_and_freed():
    if not studies.Path('/proc/self/clear_refs').exists():
        pytest.skip('needs /proc')
    size = 64 * 2**20
    peak = studies.peak_bytes(lambda: torch.ones(size // 4).sum(), 'cpu')
    assert 0.9 * size < peak < 1.5 * size


def test_the_sweeps_of_results_train_five_seeds_of_every_block_asked_about(monkeypatch):
    plans = {}

    def main(argv):
        plan = ablate.make_plan([*argv, '--match=none'])  # budgets would need the dataset
        plans[plan['results']] = plan
    monkeypatch.setattr(ablate, 'main', main)
    studies.ablations('cpu', ['--max_iters=6'])
    ladder, blocks = plans['results/ladder'], plans['results/blocks']
    assert [pair['flag'] for pair in ladder['comparisons']] == [
        'all of them', 'pos', 'norm', 'ffn', 'bias', 'n_kv_head']
    assert list(blocks['arms']) == ['llama_small', 'MHA', 'MQA', 'MLA', 'MoE', 'hybrid', 'Mamba-2']
    for plan in plans.values():
        assert len(plan['seeds']) == 5 and plan['reference'] in plan['arms']
        assert all(words['max_iters'] == 6 for words in plan['arms'].values())
