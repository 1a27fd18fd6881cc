"""Topics of bench.py that can be checked in seconds: their claims hold exactly, and their figures exist."""
import sys

import pytest
import runs
import torch

import bench
from nanoblocks.experiments import memory, studies, sweep, timing

pytest.importorskip('matplotlib')


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_without_matplotlib_a_table_stands_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    bench.run(studies.cache, {'figures': 'out/bench'})
    printed = capsys.readouterr().out
    assert 'MLA 512 + 64' in printed and printed.splitlines()[-1].startswith('no figure without matplotlib')


@pytest.mark.parametrize('name, words', [('stpe', 'stpe must be a topic: did you mean step?'),
                                         ('xyz', 'choose one of step, '), ('', 'the first argument must be')])
def test_a_topic_that_is_not_there_is_refused_with_the_nearest(name, words):
    with pytest.raises(SystemExit) as refusal:
        bench.main(name, [])
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def test_help_shows_every_topic_in_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit):
        bench.main('--help', [])
    shown = capsys.readouterr().out.splitlines()
    for name in bench.TOPICS:
        line = next(line for line in shown if line.startswith(f'    {name} '))
        assert 40 < len(line) <= 120, line
    assert '    python bench.py kernels --aot=True' in shown


def test_every_topic_takes_nothing_but_settings():
    given = {'flags', 'argv', 'folders', *bench.plain_settings(vars(bench))}
    for name, topic in bench.TOPICS.items():
        needed = {p.name for p in bench.signature(topic).parameters.values() if p.default is p.empty}
        assert needed <= given, name


def test_variants_run_interleaved_and_every_other_round_backwards():
    order = []
    found = timing.interleaved({name: lambda name=name: order.append(name) or len(order) for name in 'abc'},
                               rounds=3, warmup=1)
    assert ''.join(order) == 'abccbaabccba' and found == {'a': [6, 7, 12], 'b': [5, 8, 11], 'c': [4, 9, 10]}


def test_influence_reaches_as_far_as_layers_times_window(tmp_path, capsys):
    studies.reach('cpu', tmp_path)
    rows = [row for row in lines(capsys) if row and row[0].isdigit() and len(row) == 5]
    assert [(int(row[1]), int(row[2])) for row in rows] == [(15 * n, 15 * n) for n in range(1, 7)]
    assert (tmp_path / 'reach.png').stat().st_size > 0


def test_rotated_scores_depend_on_the_offset_alone(tmp_path, capsys):
    studies.rope(tmp_path)
    rows = [row for row in lines(capsys) if len(row) == 3 and row[0].isdigit()]
    assert len(rows) == 5
    scores = [float(row[1]) for row in rows]
    # the same for every start but for the rounding of fp32 angles, and not the same for every offset
    assert all(float(row[2]) < 2e-3 for row in rows) and max(scores) - min(scores) > 1
    assert (tmp_path / 'rope.png').exists()


def test_a_gated_ffn_at_four_times_the_width_has_half_as_many_parameters_more(tmp_path, capsys):
    studies.ffns(1, 'cpu', tmp_path)
    wide = next(row for row in lines(capsys) if row[:2] == ['SwiGLU', '4x'])
    assert wide[2:6] == ['2048', '3,145,728', 'x', '1.50'] and (tmp_path / 'ffns.png').exists()


def test_norms_are_timed_and_counted(tmp_path, capsys):
    studies.norms(1, 'cpu', tmp_path)
    rows = [row for row in lines(capsys) if len(row) == 7 and row[1].endswith('norm') and row[0].isdigit()]
    assert [(row[1], int(row[-1])) for row in rows[:2]] == [('layernorm', 512), ('rmsnorm', 256)]
    assert len(rows) == 10 and (tmp_path / 'norms.png').exists()


def test_lengths_stop_where_the_budget_of_seconds_does(tmp_path, capsys):
    studies.lengths('cpu', tmp_path, budget=0.05)
    rows = [row for row in lines(capsys) if row and row[0] == 'attention']
    assert len(rows) == 2 and all(row[-1] == '-' and float(row[1]) > 0 for row in rows)
    assert (tmp_path / 'lengths.png').exists()


def test_router_trains_three_kinds_of_balancing(tmp_path, capsys, monkeypatch):
    toy = [flag for flag in runs.toy(tmp_path) if not flag.startswith(('--out_dir=', '--device='))]
    monkeypatch.setattr(studies, 'SIZE', ['config/llama_small.py', 'config/study.py', *toy])
    studies.router('cpu', tmp_path)
    rows = [row for row in lines(capsys) if row and row[0] in ('none', 'loss', 'bias')]
    assert [row[0] for row in rows] == ['none', 'loss', 'bias']
    assert all(0.125 <= float(row[2]) <= 0.5 and 0 < float(row[3]) <= 1 for row in rows)
    assert (tmp_path / 'router.png').exists()


def test_saved_bytes_counts_each_tensor_once_and_no_parameters():
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(16, 16))
    assert memory.saved_bytes(lambda: x @ weight) == x.nbytes
    assert memory.saved_bytes(lambda: (x * x).sum()) == x.nbytes
    # exp keeps its result, which sin keeps as its input
    assert memory.saved_bytes(lambda: x.exp().sin()) == x.nbytes


def test_peak_bytes_sees_what_is_allocated_and_freed():
    if not memory.Path('/proc/self/clear_refs').exists():
        pytest.skip('needs /proc')
    size = 64 * 2**20
    peak = memory.peak_bytes(lambda: torch.ones(size // 4).sum(), 'cpu')
    assert 0.9 * size < peak < 1.5 * size


def test_the_sweeps_of_results_train_five_seeds_of_every_block_asked_about(monkeypatch):
    plans = {}

    def main(argv):
        plan = sweep.make_plan([*argv, '--match=none'])  # budgets would need the dataset
        plans[plan['results']] = plan
    monkeypatch.setattr(sweep, 'main', main)
    studies.ablations(['--max_iters=6'], 'cpu')
    ladder, blocks = plans['results/ladder'], plans['results/blocks']
    assert [pair['flag'] for pair in ladder['comparisons']] == [
        'all of them', 'pos', 'norm', 'ffn', 'bias', 'n_kv_head']
    assert list(blocks['arms']) == ['llama_small', 'MHA', 'MQA', 'MLA', 'MoE', 'hybrid', 'Mamba-2']
    for plan in plans.values():
        assert len(plan['seeds']) == 5 and plan['reference'] in plan['arms']
        assert all(words['max_iters'] == 6 for words in plan['arms'].values())
