"""
Objectives against their definitions, written as plain loops; that rows depend on nothing but the seed and
their number; runs that are killed; compiled encoders; previews; sweeps.
"""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close, build, scaled, toy
from runs import assert_same_run, assert_survives_a_kill, dataset, python, train
from runs import toy as arguments

from data.loader import open_dataset
from data.objectives import OBJECTIVES, SPANS, Diffusion, Mask, Prefix, Span, objective_of
from nanoblocks.experiments import sweep
from nanoblocks.experiments.curves import read_curve
from nanoblocks.experiments.runs import read_run

BOTH = pytest.mark.parametrize('kind', ['decoder', 'both'])
ENCODER = dict(causal=False, norm_at='post', embed_norm=True, head_mlp=True, head_bias=True)
# every objective with the flags of a model that learns it
RUNS = {'mask': dict(objective='mask', **ENCODER), 'diffusion': dict(objective='diffusion', **ENCODER),
        'prefix': dict(objective='prefix'), 'prefix, encoder': dict(objective='prefix', n_encoder=1),
        'span': dict(objective='span', pos='rope'), 'span, encoder': dict(objective='span', n_encoder=1)}
every_run = pytest.mark.parametrize('flags', RUNS.values(), ids=RUNS)


def rows(n, T, seed=0, vocab=90):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (n, T + 1)), rng.integers(0, 2 ** 63, n, dtype=np.uint64)


# ----------------------------------------------------------------------------------------------------------
# Definitions


@pytest.mark.parametrize('T, rate', [(50, 0.15), (8, 0.05), (33, 1.0)])
def test_a_masked_row_names_so_many_tokens_and_is_itself_elsewhere(T, rate):
    text, keys = rows(300, T)
    kinds = {'mask': 0, 'kept': 0, 'other': 0}
    for row, x, y in zip(text, *(z.tolist() for z in Mask(90, rate)(text, keys))):
        assert sum(target >= 0 for target in y) == max(1, round(rate * T))
        for token, seen, target in zip(row[:-1], x, y):
            if target == -1:
                assert seen == token
            else:
                assert target == token
                kinds['mask' if seen == 90 else 'kept' if seen == token else 'other'] += 1
                assert seen <= 90
    n = sum(kinds.values())
    for kind, share in ('mask', 0.8), ('kept', 0.1 + 0.1 / 90), ('other', 0.1 - 0.1 / 90):
        assert abs(kinds[kind] / n - share) < 4 * math.sqrt(share * (1 - share) / n), kinds


def test_the_loss_of_diffusion_is_the_mean_of_its_bound_over_rows():
    """Of each row, T / m times the sum over the m masked tokens, per token; log V if all are alike."""
    flags = toy(causal=False, vocab_size=64, block_size=24)
    model, (text, keys) = scaled(build(flags), 3).double(), rows(40, 24, vocab=60)
    idx, targets, weights = Diffusion(60, 0.15)(text, keys)
    with torch.no_grad():
        got = model(idx, targets, weights=weights)[1].item()
        logprobs = model(idx)[0].log_softmax(-1)
    total = 0.0
    for n, row in enumerate(idx.tolist()):
        masked = [t for t, token in enumerate(row) if token == 60]
        assert [t for t in range(24) if row[t] != text[n, t]] == masked == [
            t for t in range(24) if targets[n, t] >= 0]
        bound = 24 / len(masked) * -sum(logprobs[n, t, text[n, t]].item() for t in masked)
        total += bound / 24 / len(text)
    assert abs(got - total) < 1e-6 * total
    model.lm_head.weight.data.zero_()
    assert abs(model(idx, targets, weights=weights)[1].item() - math.log(64)) < 1e-6


@BOTH
@pytest.mark.parametrize('T', [7, 8, 32])
def test_prefix_names_the_second_half(T, kind):
    text, keys = rows(5, T)
    half = (T + 1) // 2
    made = dict(zip(('idx', 'targets', 'source'), Prefix(90, None).read_by(kind)(text, keys)))
    for n, row in enumerate(text.tolist()):
        named = [token for token in made['targets'][n].tolist() if token >= 0]
        assert named == row[half:]
        if kind == 'both':
            assert made['source'][n].tolist() == row[:half] and made['idx'][n].tolist() == row[half - 1:-1]
        else:
            assert made['idx'][n].tolist() == row[:-1]
            assert made['targets'][n].tolist() == [-1] * (half - 1) + row[half:]


@BOTH
@pytest.mark.parametrize('rate', [0.15, 0.5])
def test_spans_put_back_where_their_marks_are_give_the_row(rate, kind):
    for T in (*range(8, 40), 127, 128, 511, 512):
        text, keys = rows(3, T)
        made = dict(zip(('idx', 'targets', 'source'), Span(90, rate).read_by(kind)(text, keys)))
        for n, row in enumerate(text.tolist()):
            idx, targets = made['idx'][n].tolist(), made['targets'][n].tolist()
            if kind == 'both':
                source, first = made['source'][n].tolist(), 0
            else:
                first = next(t for t, target in enumerate(targets) if target >= 0)
                source = idx[:first]
                assert targets[:first] == [-1] * first and len(idx) <= T
            assert idx[first + 1:] == targets[first:-1] and min(targets[first:]) >= 0
            spans, at = {}, None
            for token in (idx[first], *targets[first:]):
                if token >= 90:
                    at = token
                    assert at == 90 + len(spans)
                    spans[at] = []
                else:
                    spans[at].append(token)
            assert all(spans.values()), 'an empty span'
            back = [x for token in source for x in (spans.pop(token) if token >= 90 else [token])]
            assert back == row[:len(back)] and not spans
            cut = len(back) - sum(token < 90 for token in source)
            assert cut == max(1, round(rate * len(back)))
            # as much of the row as a decoder of T tokens has room for
            assert len(source) + len(idx) - first <= T and len(back) >= T * (0.85 if rate < 0.2 else 0.6) - 2


@pytest.mark.parametrize('T, rate', [(4096, 0.15), (1024, 0.5), (3, 0.15), (3, 0.99), (20, 0.99)])
def test_spans_of_any_row_have_marks_enough(T, rate):
    for kind in 'decoder', 'both', 'encoder':
        made = Span(90, rate).read_by(kind)(*rows(2, T))
        assert max(x.max().item() for x in made) < 90 + SPANS
        assert (made[1] >= 0).any(-1).all() and all(x.shape[1] <= T for x in made)


@pytest.mark.parametrize('name', ['mask', 'diffusion'])
def test_the_mask_of_a_published_vocabulary_is_its_own(name):
    words = json.dumps({'added_tokens': [{'id': 4, 'content': '[MASK]'}, {'id': 2, 'content': '[CLS]'}]})
    for meta, mask, more in (({'kind': 'tokenizers', 'json': words}, 4, 0), ({'kind': 'bytes'}, 90, 1),
                             ({'kind': 'tokenizers', 'json': '{}'}, 90, 1)):
        task = objective_of(name, {'vocab_size': 90, 'tokenizer': meta}, 0.5)
        x, y, *_ = task(*rows(50, 32))
        replaced = x[(y >= 0) & (x != y)]
        assert task.more == more and (replaced == mask).double().mean() > 0.8


def test_an_encoder_of_spans_reads_the_mask_of_a_published_vocabulary():
    meta = {'kind': 'tokenizers', 'json': json.dumps({'added_tokens': [{'content': '[MASK]', 'id': 7}]})}
    task = objective_of('span', {'vocab_size': 90, 'tokenizer': meta}, 0.5)
    x, y = task.read_by('encoder')(*rows(50, 32))
    assert task.more == SPANS and (x[y >= 0] == 7).all()
    idx, targets = task.read_by('decoder')(*rows(50, 32))
    assert idx.max() >= 90    # marks of their own


# ----------------------------------------------------------------------------------------------------------
# What rows depend on


@pytest.mark.parametrize('name, kind', [('mask', 'encoder'), ('diffusion', 'encoder'), ('prefix', 'both'),
                                        ('span', 'decoder'), ('span', 'both'), ('next', 'decoder')])
def test_a_row_is_the_same_in_batches_of_any_size(name, kind):
    def data(seed=1):
        return open_dataset(dataset(), 32, seed, OBJECTIVES[name](257, 0.15).read_by(kind))
    whole = data().train_batch(5, 12)
    for sizes in ((3, 9), (1,) * 12, (7, 4, 1)):
        starts = 5 + np.cumsum((0, *sizes[:-1]))
        parts = [data().train_batch(int(start), size) for start, size in zip(starts, sizes)]
        assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*parts), whole, strict=True)), sizes
    assert not torch.equal(data(2).train_batch(5, 12)[0], whole[0])
    # rows that hold the same text, in another epoch, are masked anew
    if name in ('mask', 'diffusion'):
        text = np.repeat(rows(1, 32)[0], 4, 0)
        y = OBJECTIVES[name](257, 0.5)(text, np.arange(4, dtype=np.uint64))[1]
        assert len({tuple(row) for row in y.tolist()}) == 4


@every_run
def test_a_run_that_is_killed_goes_on_to_the_same_losses(flags, tmp_path):
    whole, _ = train(tmp_path / 'whole', max_iters=45, **flags)
    killed = tmp_path / 'killed'
    assert_survives_a_kill(whole, killed, 32, arguments(killed, max_iters=45, **flags))


# ----------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize('flags', [dict(causal=False, pos='rope', layer_pattern='aw', window=4),
                                   dict(n_encoder=2, pos='relative')], ids=['encoder', 'beside a decoder'])
def test_a_compiled_encoder_gives_the_eager_loss_and_gradients(flags):
    torch._dynamo.reset()
    model = scaled(build(toy(**flags)), 2).train()
    idx, targets, source = torch.randint(61, (3, 2, 16)).unbind()
    targets, source = targets.where(torch.arange(16) % 3 > 0, -1), source.where(torch.arange(16) < 13, -1)
    given = {'source': source} if 'n_encoder' in flags else {'weights': torch.rand(2, 16)}
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend='aot_eager')):
        model.zero_grad()
        loss = run(idx, targets, **given)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*found, strict=True):
        assert_close(compiled, eager, 1e-5, 'loss or gradient')


# ----------------------------------------------------------------------------------------------------------
# Previews

SHOWN = '''
from nanoblocks.training import logbook
logbook.Logbook.start_wandb = lambda self, *args: None
logbook.Logbook.samples = lambda self, step, texts: [self.print('shown ' + repr(text)) for text in texts]
'''


def shown(done):
    assert done.code == 0 and 'Traceback' not in done.err, done
    return [eval(line[6:]) for line in done.out.splitlines() if line.startswith('shown ')]


@every_run
def test_a_preview_shows_what_validation_asks_and_what_the_model_says(flags, tmp_path):
    pytest.importorskip('wandb')
    settings = dict(wandb_log=True, max_iters=20, eval_interval=20) | flags
    texts = shown(python('train.py', *arguments(tmp_path / 'run', **settings), before=SHOWN))
    assert len(texts) == 4  # two, before the first step and behind the last
    for text in texts:
        asked, said = text.split(' => ')
        assert said and asked
        if flags['objective'] in ('mask', 'diffusion'):
            assert '[MASK]' in asked and '[MASK]' not in said
        if flags['objective'] == 'span':
            assert '<0>' in asked
    assert texts[0].split(' => ')[0] == texts[2].split(' => ')[0]
    # and the run is the one without them
    plain, _ = train(tmp_path / 'plain', **settings | dict(wandb_log=False))
    assert_same_run(tmp_path / 'run', plain)


# ----------------------------------------------------------------------------------------------------------
# Sweeps and figures


def arms(tmp_path, *more, **settings):
    (tmp_path / 'size.py').write_text('\n'.join(
        f'{name} = {value if isinstance(value, (int, float)) else str(value)!r}' for name, value in dict(
            n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4, gradient_accumulation_steps=1,
            max_iters=4, learning_rate=3e-3, eval_tokens=512, device='cpu', dataset=dataset()).items()))
    return [str(tmp_path / 'size.py'), *more, '--seeds=1', '--evals=2', f'--out_dir={tmp_path / "sweep"}',
            *(f'--{name}={value}' for name, value in settings.items())]


@pytest.mark.parametrize('vary, settings, words', [
    ('causal=False', {}, 'causal=False: objective=next must be mask, diffusion, prefix or span when'),
    ('causal=False+objective=mask', {}, 'objective must not differ between the arms'),
    ('objective=prefix,span', {}, 'objective must not differ between the arms'),
    ('mask_rate=0.3', dict(objective='mask', causal=False), 'mask_rate must not differ between the arms'),
    ('n_encoder=1', {}, 'n_encoder=1: objective=next must be prefix or span when n_encoder=1; all arms'),
])
def test_arms_with_other_objectives_are_not_compared(vary, settings, words, tmp_path):
    with pytest.raises(ValueError) as refusal:
        sweep.make_plan(arms(tmp_path, f'--vary={vary}', **settings))
    assert words in str(refusal.value)


@pytest.mark.parametrize('vary, settings', [
    ('n_encoder=1', dict(objective='prefix')), ('pos=rope', dict(objective='mask', causal=False))])
def test_a_sweep_without_bits_per_byte_is_reported(vary, settings, tmp_path):
    done = python('ablate.py', *arms(tmp_path, f'--vary={vary}', **settings))
    assert done.code == 0, done
    report = (tmp_path / 'sweep' / 'report.md').read_text()
    table = [line.split(' | ') for line in report.splitlines() if line.startswith(('| size', f'| {vary}'))]
    assert len(table) >= 2 and all(line[3] == '-' for line in table if len(line) > 9), report
    measured = json.loads((tmp_path / 'sweep' / 'measured.json').read_text())
    assert measured.keys() == ({'size', vary} if 'n_encoder' in vary else set())
    folder = tmp_path / 'sweep' / vary / 'seed1337'
    assert math.isnan(read_run(folder, 4).bpb) and read_run(folder, 4).finished
    run = read_curve(folder, 'arm', 'run')
    assert math.isnan(run.nats_per_bit) and run.points('step', 'val_loss', False)


def test_a_figure_in_bits_per_byte_names_the_runs_that_have_none(tmp_path, monkeypatch, capsys):
    from nanoblocks.experiments import curves
    kept = [curves.Curve('a', name, [{'step': 1, 'val_loss': 2.0}], unit)
            for name, unit in (('a', 1.0), ('b', 2.0), ('c', math.nan))]
    drawn = SimpleNamespace(runs=None)
    monkeypatch.setattr(curves, 'runs_in', lambda folder: [folder])
    monkeypatch.setattr(curves, 'read_curve', lambda path, label, name: kept['abc'.index(path)])
    monkeypatch.setattr(curves, 'draw', lambda runs, *args: setattr(drawn, 'runs', runs))
    curves.plot(['a', 'b', 'c'], tmp_path / 'figure.png')
    assert [run.name for run in drawn.runs] == ['a', 'b']
    assert 'c has no bits per byte and is left out' in capsys.readouterr().out
