"""Topics of bench.py that can be checked in seconds: their claims hold exactly, and their figures exist."""
import sys

import numpy as np
import pytest
import runs
import torch

import bench
from model import GPT, GPTConfig
from nanoblocks.experiments import (
    architectures,
    attention,
    curves,
    figures,
    memory,
    studies,
    sweep,
    throughput,
    timing,
    topics,
)
from nanoblocks.hardware import can_compile
from nanoblocks.objectives import Pairs

pytest.importorskip('matplotlib')


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_without_matplotlib_a_table_stands_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    bench.run(attention.cache, {'flags': {}, 'tokens': '', 'figures': 'out/bench'})
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
    given = {'flags', 'argv', 'folders', 'command', *bench.plain_settings(vars(bench))}
    for name, topic in bench.TOPICS.items():
        needed = {p.name for p in bench.signature(topic).parameters.values() if p.default is p.empty}
        assert needed <= given, name


# ----------------------------------------------------------------------------------------------------------
# Flags are read or refused


@pytest.mark.parametrize('topic, options, words', [
    ('router', ['--reuse=True'], 'reuse=True must be left out: bench.py router does not read it'),
    ('ablations', ['--width=3'], 'width=3 must be left out: bench.py ablations does not read it'),
    ('norms', ['--n_layer=2'], 'n_layer=2 must be left out: bench.py norms reads --rounds'),
    ('norms', ['config/tiny.py'], 'config/tiny.py must be left out: bench.py norms takes no config file'),
    ('cache', ['--rounds=3'], 'rounds=3 must be left out: bench.py cache reads --tokens'),
    ('rope', ['--max_iters=3'], 'max_iters=3 must be left out'),
    ('plot', ['out', '--norm=rmsnorm'], 'norm=rmsnorm must be left out: bench.py plot reads --figure'),
    ('rope', ['--pos=learned'], 'pos=learned must be rope: --pos=rope'),
    ('reach', ['--layer_pattern=wa'], 'must be w, a window in every layer: --layer_pattern=w'),
    ('reach', ['--block_size=32'], 'block_size=32 must be above 90, layers x (window - 1): --block_size=91'),
    ('router', ['--balance=aux'], 'bench.py router sets it itself'),
    ('norms', ['--tokens=1,2'], 'tokens=1,2 must be one number here: --tokens=2048'),
    ('norms', ['--width=x'], 'must be whole numbers above 0, separated by commas: --width=256,512'),
    ('lengths', ['--limit_s=0'], 'limit_s=0.0 must be above 0'),
    ('window', ['--rounds=0'], 'rounds=0 must be at least 1'), ('step', ['--batch_size=0'], 'at least 1'),
    ('families', ['--dtype=float16'], 'dtype=float16 must be float32 or bfloat16'),
])
def test_a_flag_that_a_topic_cannot_use_is_refused(topic, options, words, monkeypatch):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # main changes them
    with pytest.raises(SystemExit) as refusal:
        bench.main(topic, options)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def test_a_folder_for_figures_that_cannot_be_made_is_refused_before_the_work(monkeypatch, tmp_path):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # main changes them
    monkeypatch.setitem(bench.TOPICS, 'reach', lambda figures: pytest.fail('measured first'))
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='cannot be read or written .Not a directory.: check the path'):
        bench.main('reach', [f'--figures={tmp_path / "file" / "x"}'])


def test_the_cache_is_that_of_the_flags(tmp_path, capsys):
    flags = dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, pos='rope', block_size=2048)
    attention.cache(flags, '1024', tmp_path)
    rows = {line[0]: float(line[-1]) for line in lines(capsys) if line[0] in ('as', 'MHA', 'GQA-8', 'MQA')}
    # 16 sequences of 1024 tokens; each has k and v of 4 heads of 64 in 16 bit and a position of 32 bits
    assert rows['as'] == round(16 * 1024 * 22 * (2 * 4 * 64 * 2 + 4) / 1e9, 3)
    assert 7.9 < rows['MHA'] / rows['as'] < 8.1 and 1.9 < rows['GQA-8'] / rows['as'] < 2.1
    for odd in (dict(), dict(attn='mla', kv_rank=64, pos='rope'), dict(layer_pattern='m', pos='none')):
        attention.cache(dict(n_layer=2, n_head=2, n_embd=64) | odd, '64,128,256', tmp_path)
        assert 'as given' in capsys.readouterr().out


def test_grouped_queries_reduce_to_multi_head_and_multi_query(tmp_path, capsys):
    attention.gqa(dict(n_head=6, n_embd=96, n_layer=3), tmp_path)
    rows = [line for line in lines(capsys) if line[0].isdigit() and len(line) == 7]
    assert [' '.join(row[:3]) for row in rows] == ['6 1 MHA', '3 2 GQA', '2 3 GQA', '1 6 MQA']
    assert all(float(row[5]) < 1e-14 for row in rows), 'each is MHA with repeated keys and values'
    assert float(rows[-1][6]) < 1e-14 and all(float(row[6]) > 0.1 for row in rows[:-1])
    assert [int(row[4].replace(',', '')) for row in rows] == [3 * 2 * n * 16 * 2 for n in (6, 3, 2, 1)]
    assert (tmp_path / 'gqa.png').exists()


def test_rotary_angles_are_those_of_the_flags(tmp_path, capsys):
    attention.rope(dict(rope_theta=5e5), '', tmp_path)
    plain = capsys.readouterr().out
    assert '500K: wave' in plain and '100K' not in plain
    # the last of 32 pairs: 2 pi 500000^(31/32)
    assert next(row for row in plain.splitlines() if row.startswith('31 ')).split()[3] == '2.08M'
    attention.rope(dict(rope_theta=10000.0, rope_scaling='linear', rope_factor=4.0), '512', tmp_path)
    scaled = capsys.readouterr().out
    assert '10K, linear: wave' in scaled and 'turns in 512 tokens' in scaled
    assert next(row for row in scaled.splitlines() if row.startswith('0 ')).split()[3] == '25.1'


def test_lengths_and_windows_have_the_sizes_that_are_given(tmp_path, capsys):
    throughput.lengths('64,192', '32', 60.0, 'cpu', tmp_path)
    rows = [row for row in lines(capsys) if row and row[0] == 'attention']
    assert len(rows) == 2 and all(len(row) == 3 and '-' not in row for row in rows)
    attention.reach(dict(window=4, n_layer=2, block_size=24), 'cpu', tmp_path)
    assert [row[:3] for row in lines(capsys) if len(row) == 5 and row[0].isdigit()] == [
        ['1', '3', '3'], ['2', '6', '6']]


def test_a_layer_that_grows_linearly_is_not_expected_to_grow_quadratically():
    assert throughput.expected({1: 1.0}, 2) == 4.0 and throughput.expected({1: 1.0}, 2, most=1.0) == 2.0
    assert throughput.expected({1: 1.0, 2: 2.0}, 4) == pytest.approx(4.0)
    assert throughput.expected({1: 1.0, 2: 4.0}, 4) == pytest.approx(16.0)


# ----------------------------------------------------------------------------------------------------------
# Progress


def test_progress_is_a_line_for_each_item(monkeypatch, capsys):
    assert list(topics.each('ab', 'arm {}'.format)) == ['a', 'b']
    assert capsys.readouterr().err.splitlines() == ['[1/2] arm a', '[2/2] arm b']
    times = iter(range(0, 100, 3))
    monkeypatch.setattr(topics.time, 'monotonic', lambda: next(times))
    timing.interleaved({'a': int, ('b', 'c'): int}, rounds=2, warmup=1)
    assert capsys.readouterr().err.splitlines() == [
        '[2/6] b c: 33%, about 12 s left', '[4/6] a: 67%, about 6 s left', '[6/6] b c: 100%, about 0 s left']


@pytest.mark.parametrize('call', [
    lambda out: studies.norms(1, '8', '8,16', 'cpu', out),
    lambda out: bench.TOPICS['window'](1, '16,32', 'cpu'),
    lambda out: throughput.throughput({'n_embd': 16, 'n_head': 2}, 'llama', '8', 9.0, 'cpu', out, ''),
])
def test_topics_say_which_of_how_many_they_are_at(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, 'can_compile', lambda device: False)
    call(tmp_path)
    assert '[2/' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def figures_drawn(monkeypatch):
    """The figures that are saved, which stay open."""
    drawn = []
    for module in (figures, curves):
        monkeypatch.setattr(module, 'save', lambda fig, path: drawn.append(fig))
    yield drawn
    from matplotlib import pyplot
    pyplot.close('all')


def test_every_axis_of_every_figure_has_a_label(figures_drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, 'can_compile', lambda device: False)  # which takes seconds
    attention.cache({}, '', tmp_path)
    attention.gqa({}, tmp_path)
    attention.rope({}, '', tmp_path)
    attention.reach({}, 'cpu', tmp_path)
    studies.norms(1, '8', '8,16', 'cpu', tmp_path)
    studies.ffn_costs(1, '8', '8', 'cpu', tmp_path)
    throughput.lengths('16,32', '16', 9.0, 'cpu', tmp_path)
    rows = {name: {column: float(i + n) for n, column in enumerate((*figures.COSTS, 'loss', 'sd'))}
            for i, name in enumerate('ab')}
    figures.plot_cost(rows, {'a': 'a', 'b': '+ b'}, tmp_path / 'cost.png')
    curve = {1: [(10, 2.0), (20, 1.5)]}
    figures.plot_curves({'a': curve, 'b': curve}, 'a', {'a': 'a', 'b': 'b'}, tmp_path / 'curves.png')
    small = {'n_embd': 16, 'n_head': 2, 'n_layer': 1}
    throughput.throughput(small, 'llama,mistral', '8', 9.0, 'cpu', tmp_path, '')
    assert len(figures_drawn) == 10
    for fig in figures_drawn:
        for ax in (ax for ax in fig.axes if ax.get_label() != '<colorbar>'):
            named = [tick.get_text() for tick in ax.get_xticklabels()]
            words = ax.get_xlabel() or any(word.strip('-.0123456789') for word in named)
            assert ax.get_ylabel() and words, ax.get_title(loc='left')


def test_ticks_are_even_and_differ():
    ticks = [3.3e12, 3.35e12, 3.4e12]
    assert [figures.tick_text(tick, ticks) for tick in ticks] == ['3.30T', '3.35T', '3.40T']
    assert [figures.tick_text(tick, [0, 500, 1000]) for tick in (0, 500, 1000)] == ['0', '0.5k', '1.0k']
    assert figures.tick_text(44.0, [44.0, 46.0]) == '44'


def test_curves_of_a_sweep_are_named_after_their_arms(tmp_path):
    paths = ['out/s/MHA/seed1', 'out/s/MQA/seed1']
    assert curves.short_names(paths) == [('MHA', 'MHA'), ('MQA', 'MQA')]
    assert curves.short_names([*paths, 'out/s/MQA/seed2'])[1:] == [('MQA', 'MQA seed1'), ('MQA', 'MQA seed2')]
    assert curves.short_names(['out/a/x', 'out/b/x']) == [('a/x', 'a/x'), ('b/x', 'b/x')]
    assert curves.short_names(['out/a/', 'out/b']) == [('a', 'a'), ('b', 'b')]


def test_runs_with_different_tokens_are_drawn_in_bits_per_byte(figures_drawn, tmp_path, capsys):
    runs_drawn = [runs.trained(), runs.trained(dataset=runs.dataset('chars'))]
    curves.plot(runs_drawn, tmp_path / 'curves.png')
    printed = capsys.readouterr().out
    assert 'different tokens' in printed and figures_drawn[0].axes[0].get_ylabel() == 'loss (bits per byte)'
    for run in runs_drawn:
        assert f'last {runs.losses(run, "val_bpb")[-1]:.4f}' in printed
    curves.plot(runs_drawn[:1], tmp_path / 'curves.png')
    assert figures_drawn[1].axes[3].get_ylabel() == 'loss (nats per token)'
    assert f'last {runs.losses(runs_drawn[0], "val_loss")[-1]:.4f}' in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Claims


def test_variants_run_interleaved_and_every_other_round_backwards():
    order = []
    found = timing.interleaved({name: lambda name=name: order.append(name) or len(order) for name in 'abc'},
                               rounds=3, warmup=1)
    assert ''.join(order) == 'abccbaabccba' and found == {'a': [6, 7, 12], 'b': [5, 8, 11], 'c': [4, 9, 10]}


def test_influence_reaches_as_far_as_layers_times_window(tmp_path, capsys):
    attention.reach({}, 'cpu', tmp_path)
    rows = [row for row in lines(capsys) if row and row[0].isdigit() and len(row) == 5]
    assert [(int(row[1]), int(row[2])) for row in rows] == [(15 * n, 15 * n) for n in range(1, 7)]
    assert (tmp_path / 'reach.png').stat().st_size > 0


def test_rotated_scores_depend_on_the_offset_alone(tmp_path, capsys):
    attention.rope({}, '', tmp_path)
    rows = [row for row in lines(capsys) if len(row) == 3 and row[0].isdigit()]
    assert len(rows) == 5
    scores = [float(row[1]) for row in rows]
    # the same for every start but for the rounding of fp32 angles, and not the same for every offset
    assert all(float(row[2]) < 2e-3 for row in rows) and max(scores) - min(scores) > 1
    assert (tmp_path / 'rope.png').exists()


def test_a_gated_ffn_at_four_times_the_width_has_half_as_many_parameters_more(tmp_path, capsys):
    studies.ffn_costs(1, '', '', 'cpu', tmp_path)
    rows = {' '.join(row[:2]): row[2:6] for row in lines(capsys) if len(row) > 6}
    assert rows['SwiGLU 4x'] == ['2048', '3,145,728', 'x', '1.50'] and (tmp_path / 'ffns.png').exists()
    assert rows['relu2 6x'] == ['3072', '3,145,728', 'x', '1.50'] and rows['relu2 4x'] == rows['GELU 4x']


def test_norms_are_timed_in_every_way(tmp_path, capsys, monkeypatch):
    works = []
    monkeypatch.setattr(studies, 'can_compile', lambda device: works.append(can_compile(device)) or works[0])
    studies.norms(3, '8', '16,32', 'cpu', tmp_path)
    printed = capsys.readouterr().out.splitlines()
    codes = ['plain', 'PyTorch', 'model'] + ['compiled'] * works[0]
    rows = [line.split() for line in printed if line[:2].isdigit() and line.split()[1] in codes]
    assert [row[:2] for row in rows] == [[width, code] for width in ('16', '32') for code in codes], printed
    # PyTorch keeps more of its RMSNorm than ours of it: x and what x was divided by
    kept = {tuple(row[:2]): (float(row[-2]), float(row[-1])) for row in rows}
    assert kept['32', 'PyTorch'][1] > 1.9 > 1.2 > kept['32', 'model'][1]
    said = [line for line in printed if 'RMSNorm takes' in line]
    assert len(said) == 2 * len(codes) and all('2 widths, 3 rounds' in line for line in said)
    assert (tmp_path / 'norms.png').exists()


def test_lengths_stop_where_the_budget_of_seconds_does(tmp_path, capsys):
    throughput.lengths('', '', 0.05, 'cpu', tmp_path)
    rows = [row for row in lines(capsys) if row and row[0] == 'attention']
    assert len(rows) == 2 and all(row[-1] == '-' and float(row[1]) > 0 for row in rows)
    assert (tmp_path / 'lengths.png').exists()


def test_router_trains_three_kinds_of_balancing(tmp_path, capsys, monkeypatch):
    toy = [flag for flag in runs.toy(tmp_path) if not flag.startswith(('--out_dir=', '--device='))]
    monkeypatch.setattr(studies, 'SIZE', ['config/llama_small.py', 'config/study.py', *toy])
    studies.router([], 'cpu', tmp_path)
    rows = [row for row in lines(capsys) if row and row[0] in ('none', 'loss', 'bias')]
    assert [row[0] for row in rows] == ['none', 'loss', 'bias']
    assert all(0.125 <= float(row[2]) <= 0.5 and 0 < float(row[3]) <= 1 for row in rows)
    assert (tmp_path / 'router.png').exists()


def sorting(kind):
    """A batch of the task for a small model of this kind, and the model."""
    flags = {'decoder': {}, 'encoder': {'causal': False}, 'both': {'n_encoder': 1}}[kind]
    model = GPT(GPTConfig(block_size=10, vocab_size=27, n_layer=1, n_head=2, n_embd=16, **flags)).eval()
    source = np.random.default_rng(0).integers(0, 26, (6, 4))
    rows = np.concatenate((source, np.sort(source), np.full((6, 1), 26)), 1)
    task = Pairs(27, {'source': 4, 'target': 5, 'eot': 26}).read_by(kind)
    return dict(zip(task.names, task(rows, None))), model


@pytest.mark.parametrize('kind', ['decoder', 'encoder', 'both'])
def test_architectures_are_judged_by_the_answers(kind, monkeypatch):
    batch, model = sorting(kind)
    assert (batch['targets'] >= 0).sum() == 6 * 5
    found = architectures.answers(model, [batch, batch], 27)
    assert found['loss'] == pytest.approx(model(**batch)[1].item(), rel=1e-5)
    # tokens above 4 are not asked for: as if marks
    few = architectures.answers(model, [batch], 5)
    named = batch | {'targets': batch['targets'].masked_fill(batch['targets'] >= 5, -1)}
    assert few['loss'] == pytest.approx(model(**named)[1].item(), rel=1e-5)

    right = batch['targets'][batch['targets'] >= 0].view(6, 5).clone()
    monkeypatch.setattr(architectures, 'written', lambda model, batch: right)
    assert architectures.answers(model, [batch], 27)['exact'] == 1
    right[0, 3] += 1
    assert architectures.answers(model, [batch], 27)['exact'] == pytest.approx(5 / 6)


@pytest.mark.parametrize('kind', ['decoder', 'encoder', 'both'])
def test_architectures_write_the_likeliest_tokens(kind):
    batch, model = sorting(kind)
    found, idx, targets = architectures.written(model, batch), batch['idx'].clone(), batch['targets']
    others = {key: x for key, x in batch.items() if key == 'source'}
    if kind == 'encoder':
        assert found.equal(model(idx)[0].argmax(-1))
        return
    assert found.shape == (6, 5) and architectures.written(model, batch, 1).equal(found[:, :1])
    first = (targets[0] >= 0).int().argmax()
    for n in range(5):  # without a cache
        drawn = model(idx, **others)[0][:, first + n].argmax(-1)
        assert drawn.equal(found[:, n])
        if n < 4:
            idx[:, first + n + 1] = drawn


def test_architectures_trains_three_models(tmp_path, capsys, monkeypatch):
    ours = tuple(f'--{name}=' for name in ('out_dir', 'device', 'block_size', 'batch_size', 'dataset'))
    toy = [flag for flag in runs.toy(tmp_path, n_embd=64) if not flag.startswith(ours)]
    monkeypatch.setattr(architectures, 'SIZE', ['config/llama_small.py', 'config/study.py', *toy])
    monkeypatch.setattr(architectures, 'ROWS', 2000)
    monkeypatch.setattr(architectures, 'TASKS', {'sort': architectures.TASKS['sort']})
    architectures.architectures(['--seeds=1'], tmp_path, 'cpu')
    printed = lines(capsys)
    at = next(n for n, line in enumerate(printed) if line[:1] == ['sort:'])
    assert [line[0] for line in printed[at + 2:at + 5]] == ['decoder', 'encoder', 'both']
    assert 0 < float(printed[at + 2][2]) < 7
    assert (tmp_path / 'architectures.png').exists()


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
    studies.mixers(['--max_iters=6'], 'cpu')
    ladder, blocks, mixers = (plans[f'results/{name}'] for name in ('ladder', 'blocks', 'mixers'))
    assert [pair['flag'] for pair in ladder['comparisons']] == [
        'all of them', 'pos', 'norm', 'ffn', 'bias', 'n_kv_head']
    assert list(blocks['arms']) == ['llama_small', 'MHA', 'MQA', 'MLA', 'MoE', 'hybrid', 'Mamba-2']
    assert list(mixers['arms']) == ['llama_small', 'window', 'Mamba-2', 'RetNet', 'gated DeltaNet', 'KDA',
                                    'Mamba-2 3:1', 'gated DeltaNet 3:1', 'KDA 3:1']
    for plan in plans.values():
        assert len(plan['seeds']) == 5 and plan['reference'] in plan['arms']
        assert all(words['max_iters'] == 6 for words in plan['arms'].values())
