"""The placement of norms: what a failed run is, and that one is counted and does not end the topic."""
import json
import math

import numpy as np
import pytest
import runs
import torch

import bench
from data.mixture import Sources
from model import GPT, GPTConfig
from nanoblocks.experiments import placement
from nanoblocks.experiments.runs import progress, read_run


def test_a_unigram_model_is_that_of_the_batches_of_the_run():
    folder = str(runs.dataset())
    flags = dict(dataset=folder, block_size=16, seed=3, batch_size=4, max_iters=5, eval_tokens=320,
                 gradient_accumulation_steps=2)
    data = Sources(folder).open(16, 3)
    seen = np.ones(257)
    for row in range(40):
        for token in data.train_batch(row, 1)[1][0].tolist():
            seen[token] += 1
    losses = [-math.log(seen[token] / seen.sum()) for _, y in data.eval_batches(1, 320)
              for token in y[0].tolist()]
    assert placement.unigram_loss(flags) == pytest.approx(np.mean(losses)) and len(losses) == 320


def test_failed_is_no_better_than_frequencies_or_not_finite():
    assert placement.failed(math.nan, 6.0) and placement.failed(math.inf, 6.0) and placement.failed(6.5, 6.0)
    assert placement.failed(5.95, 6.0) and not placement.failed(5.85, 6.0)
    assert placement.failures({1: (5.0, []), 2: (math.nan, [])}, 6.0) == 'failed in 1 of 2 runs'
    assert placement.failures({1: (5.0, [])}, 6.0) == ''


def test_the_norm_of_a_gradient_is_that_of_all_its_numbers():
    block = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)).h[0]
    total = 0.0
    for p in block.parameters():
        p.grad = torch.randn_like(p)
        total += sum(float(x) ** 2 for x in p.grad.flatten())
    assert placement.norm_of(block) == pytest.approx(math.sqrt(total))


def test_a_loss_that_is_not_finite_is_read_as_one(tmp_path):
    lines = [{'step': 0, 'val_loss': 7.0, 'val_bpb': 3.0, 'seconds': 1.0},
             {'step': 9, 'val_loss': None, 'val_bpb': None, 'seconds': 2.0}]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    run = read_run(tmp_path, 9)
    assert run.finished and math.isnan(run.loss) and math.isnan(run.bpb)
    step, loss = progress(tmp_path)
    assert step == 9 and math.isnan(loss)


def test_a_verdict_counts_the_failed_and_compares_the_others():
    def of(*losses):
        return {seed: (loss, [(1, 7.0), (2, loss)]) for seed, loss in enumerate(losses)}
    cell = {'pre': of(5.0, 5.1, 5.2), 'post': of(6.2, math.nan, 5.1), 'output': of(4.9, 5.01, 5.1),
            'sandwich': of(5.1, 5.0, 5.2)}
    found = {(4, False): cell, (4, True): cell}
    line = placement.verdict_of(found, 6.2, 'size')[0]
    assert line.startswith('4 layers, without warmup, against pre (loss 5.100): post failed in 2 of 3 runs; ')
    assert 'output -0.097 ± ' in line and line.endswith(', not resolved.') and 'nan' not in line
    assert 'Holm' not in line
    # differences of 0.1, 0.13 and 0.1: p = 0.008, which is nothing special among eight
    cell = {'pre': of(5.0, 5.1, 5.2), **{name: of(5.1, 5.23, 5.3) if name == 'output' else of(5.1, 5.0, 5.2)
                                         for name in ('post', 'output', 'sandwich')}}
    line = placement.verdict_of({(depth, False): cell for depth in range(3)}, 6.2, 'size')[0]
    assert 'output +0.110 ± 0.043, not after Holm;' in line
    cell = found[4, False]
    tables = placement.tables_of(found, {4: dict.fromkeys(cell, [1.0, 2.0])}, 6.2)
    (_, losses), (_, warmups), (_, norms) = tables.values()
    assert losses[0][2].startswith('not finite') and losses[0][2].endswith('failed in 2 of 3 runs')
    assert warmups[0][2] == 'not finite' and norms[1][1:] == ['2'] * 4


@pytest.mark.parametrize('options, words', [
    (['--norm_at=post'], 'norm_at=post must be left out: bench.py placement sets it itself'),
    (['--n_layer=3'], 'n_layer=3 must be left out: bench.py placement sets it itself'),
    (['--warmup_iters=0'], 'warmup_iters=0 must be above 0: bench.py placement compares it with none'),
    (['--layers=x'], 'layers=x must be whole numbers above 0, separated by commas: --layers=4,12'),
])
def test_what_is_compared_is_not_given(options, words, monkeypatch):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # main changes them
    with pytest.raises(SystemExit) as refusal:
        bench.main('placement', options)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def test_placement_goes_on_when_runs_diverge(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    toy = [flag for flag in runs.toy(tmp_path, max_iters=6, warmup_iters=2, log_interval=2)
           if not flag.startswith(('--out_dir=', '--device='))]
    monkeypatch.setattr(placement, 'SMALL', toy)
    monkeypatch.setattr(placement, 'VARY', '--vary=post: norm_at=post')
    # without a norm behind it, a branch with such weights is infinite
    words = ['--seeds=1', '--learning_rate=1e30', '--grad_clip=0', f'--out_dir={tmp_path / "elsewhere"}']
    placement.placement(words, '1', 'cpu', tmp_path)
    assert (tmp_path / 'elsewhere' / '1_layers_with_warmup' / 'sweep.json').exists()
    page = (tmp_path / 'placement' / 'README.md').read_text()
    assert page.startswith('# Where norms stand') and 'nan' not in page
    line = '1 layers, without warmup, against pre (failed in 1 of 1 runs): post failed in 1 of 1 runs.'
    assert line in page
    assert (tmp_path / 'placement' / 'placement.png').exists()
    rows = (tmp_path / 'placement' / 'placement.csv').read_text().splitlines()
    assert len(rows) == 1 + 2 * 2
    assert rows[1].startswith('"1 layers, without warmup, pre, seed 1337",1,False,pre')
