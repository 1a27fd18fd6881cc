"""Reading beyond the trained length: each loss stands at its position, and all lengths read one text."""
import math
import sys

import numpy as np
import pytest
import runs
import torch

import bench
from model import GPT, GPTConfig
from nanoblocks.experiments import extrapolate

TOY = dict(block_size=8, vocab_size=23, n_layer=2, n_head=2, n_embd=16)


def text_of(rows=5, length=32):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 23, (rows, length + 1)))
    return [(x[:3, :-1], x[:3, 1:]), (x[3:, :-1], x[3:, 1:])]


def test_a_loss_stands_at_its_place():
    model, text = GPT(GPTConfig(**TOY, pos='alibi')).eval(), text_of()
    found = extrapolate.by_place(model, text, 16)
    wanted = np.zeros(32)
    for idx, targets in text:
        for row, following in zip(idx, targets):
            for start in (0, 16):
                logits = model(row[None, start:start + 16])[0][0].double()
                for i in range(16):
                    wanted[start + i] -= logits[i].log_softmax(-1)[following[start + i]].item() / 5
    assert found == pytest.approx(list(wanted), rel=1e-5)
    assert extrapolate.by_position(found, 16) == pytest.approx(list((wanted[:16] + wanted[16:]) / 2))
    assert extrapolate.quarter(found, 16) == pytest.approx(np.mean([wanted[12:16], wanted[28:]]))
    # and their mean is the loss of train.py's evaluations
    whole = [torch.cat(x) for x in zip(*text)]
    mean = np.mean(extrapolate.by_place(model, text, 32))
    assert mean == pytest.approx(model(*whole)[1].item(), rel=1e-5)


def test_loss_by_position_does_not_depend_on_where_the_text_is_hard():
    # a loss that falls with the position up to 8, and then rises by a tenth for each window of 8
    positions = np.arange(1, 33)
    near = 5 - 0.1 * np.tile(np.arange(1, 9), 4)
    far = np.where(positions <= 8, 5 - 0.1 * positions, np.mean(near) + 0.1 * ((positions - 1) // 8))
    for hard in (np.zeros(32), np.random.default_rng(0).normal(size=32)):
        found = extrapolate.curve(list(far + hard), list(near + hard), 8, 32)
        assert [(a, b) for a, b, _ in found] == [
            (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 24), (25, 32)]
        losses = [loss - np.mean(hard) for _, _, loss in found]
        assert losses[4:] == pytest.approx([np.mean(near) + x for x in (0.1, 0.2, 0.3)])
        easy = extrapolate.by_position(list(hard), 8)
        assert losses[3] == pytest.approx(5 - 0.65 + np.mean(easy[4:8]) - np.mean(hard))
    assert [x[:2] for x in extrapolate.curve([1.0] * 12, [1.0] * 12, 6, 12)][-3:] == [(3, 4), (5, 6), (7, 12)]


def test_ways_to_read_are_those_of_the_flags():
    rope = extrapolate.ways('x', {'pos': 'rope', 'block_size': 8}, 8, 32)
    assert rope['x, yarn'] == {'rope_scaling': 'yarn', 'rope_factor': 4.0}
    assert rope['x, window'] == {'layer_pattern': 'w', 'window': 8}
    assert set(rope) == {'x', *(f'x, {word}' for word in (*extrapolate.SCALINGS, 'window'))}
    assert list(extrapolate.ways('x', {'pos': 'rope', 'block_size': 8}, 8, 8)) == ['x']
    assert list(extrapolate.ways('x', {'pos': 'none', 'block_size': 8}, 8, 32)) == ['x']
    hybrid = extrapolate.ways('x', {'pos': 'rope', 'block_size': 8, 'layer_pattern': 'am'}, 8, 32)
    assert 'x, linear' in hybrid and 'x, window' not in hybrid


def test_a_window_of_the_trained_length_sees_no_distance_that_is_new():
    # one layer: the last token of a window of 32 sees the last 8 tokens alone, as at the trained length
    flags = TOY | dict(n_layer=1, pos='rope', norm='rmsnorm')
    text = text_of()
    wide = GPT(GPTConfig(**flags, layer_pattern='w', window=8)).eval()
    short = GPT(GPTConfig(**flags)).eval()
    idx = text[0][0]
    torch.testing.assert_close(wide(idx)[0][:, -1], short(idx[:, -8:])[0][:, -1])
    assert not extrapolate.can(GPT(GPTConfig(**TOY)), 9) and extrapolate.can(wide, 32)


@pytest.mark.parametrize('text', ['4', '8', '12,32', '20'])
def test_lengths_that_do_not_cut_one_text_are_refused(text):
    with pytest.raises(ValueError, match=f'tokens={text} must be above block_size=8 and divide the largest'):
        extrapolate.lengths_of(text, 8)


def test_lengths_begin_with_the_trained_one():
    assert extrapolate.lengths_of('', 128) == [128, 256, 512, 1024]
    assert extrapolate.lengths_of('16,32', 8) == [8, 16, 32]


def curves(*means):
    return {n: [[mean] * 8 for mean in by_seed] for n, by_seed in zip((4, 8), means)}


def test_a_verdict_names_who_gains_who_loses_and_who_cannot():
    found = {'a': curves((3.0, 3.1, 3.2), (2.5, 2.61, 2.7)), 'b': curves((3.0, 3.1, 3.2), (4.0, 4.11, 4.2)),
             'c': curves((3.0, 3.1, 3.2), (2.9, 3.3, 3.2)), 'd': {4: curves((3.0, 3.1, 3.2))[4]}}
    lines = extrapolate.verdict_of(found, [4, 8], 'size')
    assert 'lowers the loss of a (-0.497' in lines[0] and 'raises the loss of b (+1.003' in lines[0]
    assert 'is not resolved for c (' in lines[0] and lines[1] == 'd cannot read more than 4 tokens.'
    assert 'is that of a;' in lines[2] and 'the next, c, is -0.530 ±' in lines[2]
    assert 'Holm' not in lines[0] and ', not resolved' not in lines[2]
    # nine more that say nothing
    many = found | {f'c{n}': found['c'] for n in range(9)}
    many['a'] = curves((3.0, 3.1, 3.2), (2.5, 2.7, 2.7))
    assert 'a (-0.467 ± 0.143, not after Holm)' in extrapolate.verdict_of(many, [4, 8], 'size')[0]
    (_, rows), = extrapolate.tables_of(found, [4, 8]).values()
    assert rows[3] == ['d', '3.1000', 'cannot', '-', '-']
    assert rows[0][:4] == ['a', '3.1000', '2.6033', '2.6033'] and rows[0][4].startswith('-0.497 ± ')


@pytest.mark.parametrize('flag', ['pos=alibi', 'rope_scaling=yarn', 'rope_theta=500'])
def test_what_is_compared_is_not_given(flag, monkeypatch):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # main changes them
    with pytest.raises(SystemExit, match='must be left out: bench.py extrapolate sets it itself'):
        bench.main('extrapolate', [f'--{flag}'])


def test_extrapolate_reads_what_it_trained_and_reads_it_once(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    toy = [flag for flag in runs.toy(tmp_path, max_iters=4, block_size=16) if not flag.startswith(
        ('--out_dir=', '--device='))]
    monkeypatch.setattr(extrapolate, 'SIZE', ['config/llama_small.py', 'config/study.py', *toy])
    monkeypatch.setattr(extrapolate, 'VARY', '--vary=learned: pos=learned')
    words = ['--seeds=1', f'--out_dir={tmp_path / "elsewhere"}']
    extrapolate.extrapolate(words, '', 'cpu', tmp_path)
    assert (tmp_path / 'elsewhere' / 'sweep.json').exists()
    assert not (tmp_path / 'extrapolate' / 'runs').exists()
    page = (tmp_path / 'extrapolate' / 'README.md').read_text()
    assert page.startswith('# Beyond the trained length') and '| learned |' in page and '| cannot |' in page
    assert 'learned cannot read more than 16 tokens.' in page and '1 seed, 4 steps of 128 tokens' in page
    assert (tmp_path / 'extrapolate' / 'extrapolate.png').exists()
    rows = (tmp_path / 'extrapolate' / 'extrapolate.csv').read_text().splitlines()
    assert rows[0] == 'positions,length,seed,from,to,loss'
    assert any(row.startswith('"RoPE 10K, yarn",128,1337,') for row in rows)
    assert all(0 < float(row.rpartition(',')[2]) < math.log(257) + 1 for row in rows[1:])
    # the same command reads nothing again
    monkeypatch.setattr(extrapolate, 'by_place', lambda *args: pytest.fail('read again'))
    monkeypatch.setattr(extrapolate, 'sweep', lambda words: None)   # one process locks a folder once
    extrapolate.extrapolate(words, '', 'cpu', tmp_path)
    assert (tmp_path / 'extrapolate' / 'README.md').read_text() == page
    # without matplotlib there is the page, which names no figure
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ModuleNotFoundError):
        extrapolate.extrapolate(words, '', 'cpu', tmp_path)
    figure = '\n![Beyond the trained length](extrapolate.png)\n'
    assert figure in page and (tmp_path / 'extrapolate' / 'README.md').read_text() == page.replace(figure, '')
