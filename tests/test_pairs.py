"""Pairs of a source and a target: data/pairs, rows that are made of them, training, sampling, previews."""
import csv
import itertools
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, build, toy
from runs import (
    assert_refused,
    assert_survives_a_kill,
    losses,
    python,
    train,
)
from runs import toy as arguments
from test_objectives import SHOWN, shown

from data.loader import open_dataset, read_meta
from data.objectives import Pairs, Prefix, objective_of
from data.tokenizer import ByteTokenizer
from data.writer import write_pairs
from nanoblocks.decoding.decode import Sampling
from nanoblocks.decoding.session import Session

EOT, SIZES = 256, (9, 7)
BOTH = pytest.mark.parametrize('kind', ['decoder', 'both'])
MODELS = {'decoder': dict(pos='rope'), 'both': dict(n_encoder=1)}


def some_pairs(n=1000, seed=0):
    """Texts of up to 9 letters, and the same in capital letters, of up to 6."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        text = ''.join(rng.choice(list('abc'), rng.integers(1, SIZES[0] + 1)))
        yield text, text[:SIZES[1] - 1].upper()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path, coder = tmp_path_factory.mktemp('pairs'), ByteTokenizer()
    write_pairs(path, (('train' if i % 5 else 'val', coder.encode(a), [*coder.encode(b), EOT], len(a + b))
                       for i, (a, b) in enumerate(some_pairs())), coder, 'toy', SIZES)
    return path


def opened(folder, kind, seed=0):
    task = objective_of('prefix', read_meta(folder), 0.15).read_by(kind)
    return open_dataset(folder, sum(SIZES), seed, task)


# ----------------------------------------------------------------------------------------------------------
# Rows


@BOTH
def test_a_row_is_its_pair_whatever_the_lengths(kind):
    S, L = 4, 5
    task = Pairs(257, {'source': S, 'target': L, 'eot': EOT}).read_by(kind)
    pairs = [([11, 12, 13, 14][:s], [21, 22, 23, 24][:t])
             for s, t in itertools.product(range(1, 5), range(1, 5))]
    pairs.append(([11, EOT, 12], [21, EOT, 22]))     # amid a text, the token is one like others
    fill = [[*a, *[EOT] * (S - len(a)), *b, *[EOT] * (L - len(b))] for a, b in pairs]
    made = dict(zip(task.names, (x.tolist() for x in task(np.array(fill), None)), strict=True))
    for n, (a, b) in enumerate(pairs):
        named = [*b, EOT]
        if kind == 'both':
            assert made['source'][n] == a + [-1] * (S - len(a))
            assert made['idx'][n] == ([EOT] + b + [EOT] * L)[:L]
            assert made['targets'][n] == named + [-1] * (L - len(named))
        else:
            assert made['idx'][n] == (a + [EOT] + b + [EOT] * (S + L))[:S + L]
            assert made['targets'][n] == ([-1] * len(a) + named + [-1] * (S + L))[:S + L]
            assert 'source' not in made


def test_the_fill_of_a_source_is_not_seen_and_that_behind_a_target_is_not_named():
    model = build(toy(n_encoder=1, vocab_size=300))
    task = Pairs(257, {'source': 4, 'target': 5, 'eot': EOT}).read_by('both')
    a, b = [1, 2], [3, EOT]
    wide = dict(zip(task.names, task(np.array([[*a, EOT, EOT, *b, EOT, EOT, EOT]]), None)))
    task = Pairs(257, {'source': 2, 'target': 2, 'eot': EOT}).read_by('both')
    tight = dict(zip(task.names, task(np.array([[*a, *b]]), None)))
    assert torch.allclose(model(**wide)[1], model(**tight)[1], atol=1e-6)


@BOTH
def test_every_pair_comes_once_an_epoch_and_once_in_an_evaluation(folder, kind):
    data = opened(folder, kind)
    wanted = {split: sorted(b for i, (a, b) in enumerate(some_pairs()) if (i % 5 == 0) == (split == 'val'))
              for split in ('train', 'val')}

    def targets(batches):
        return [bytes(t for t in row if 0 <= t < EOT).decode()
                for batch in batches for row in batch[1].tolist()]
    assert data.n_windows == 800
    for epoch in range(3):
        got = targets(data.train_batch(800 * epoch + first, 100) for first in range(0, 800, 100))
        assert sorted(got) == wanted['train'] and got != wanted['train']
    assert sorted(targets(data.eval_batches(7, None))) == wanted['val']
    assert sorted(targets(data.eval_batches(7, None, full=True))) == [''] * (-200 % 7) + wanted['val']
    parts = [torch.cat(x) for x in zip(*(data.train_batch(3 + n, 1) for n in range(5)))]
    assert all(map(torch.equal, parts, data.train_batch(3, 5)))


def test_what_is_no_objective_and_no_length_of_pairs_is_refused(folder):
    for objective in None, Prefix(257, None):
        with pytest.raises(ValueError, match='objective must be prefix, as .* add --objective=prefix'):
            open_dataset(folder, 16, 0, objective)
    with pytest.raises(ValueError, match='block_size=32 must be 16, .* add --block_size=16'):
        open_dataset(folder, 32, 0, objective_of('prefix', read_meta(folder), 0.15))


@pytest.mark.parametrize('change, words', [
    (dict(source=0), 'give source and target a number of tokens above 0'),
    (dict(target='x'), 'give source and target a number'), (dict(eot=257), 'name an eot of the vocabulary'),
    (dict(every=0), 'give an every above 0'), (dict(every='x'), 'give an every above 0'),
    (dict(source=8), 'hold whole pairs, of 15 tokens'), (None, 'TypeError')])
def test_a_damaged_description_is_refused(folder, tmp_path, change, words):
    meta = json.loads((folder / 'meta.json').read_text())
    meta['pairs'] = change and meta['pairs'] | change
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(ValueError) as refusal:
        read_meta(tmp_path)
    for part in words, 'prepare it again, python data/pairs/prepare.py':
        assert part in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------
# prepare.py


def prepare(monkeypatch, out, *flags):
    """Run data/pairs/prepare.py; returns the sentence or status it exits with, or None."""
    script = ROOT / 'data' / 'pairs' / 'prepare.py'
    monkeypatch.setattr(sys, 'argv', [str(script), f'--out={out}', '--tokenizer=bytes', *map(str, flags)])
    try:
        runpy.run_path(str(script), run_name='__main__')
    except SystemExit as stop:
        return stop.code


def pairs_in(folder, split):
    """The pairs of a split: (source, target)."""
    meta, coder = read_meta(folder), ByteTokenizer()
    S, L = (meta['pairs'][name] for name in ('source', 'target'))
    rows = np.fromfile(folder / f'{split}.bin', '<u2').reshape(-1, S + L).tolist()
    assert all(row[-1] == EOT for row in rows)
    return [tuple(coder.decode([t for t in part if t != EOT]) for part in (row[:S], row[S:])) for row in rows]


def test_every_kind_of_table_gives_the_same_pairs(tmp_path, monkeypatch):
    pairs = list(some_pairs(150))
    dicts = [{'source': a, 'id': n, 'target': b} for n, (a, b) in enumerate(pairs)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, dicts)))
    (tmp_path / 'a.json').write_text(json.dumps({'version': 1, 'data': dicts}))
    for name, delimiter in ('a.csv', ','), ('a.tsv', '\t'):
        with open(tmp_path / name, 'w', newline='') as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(('id', 'target', 'source'))
            writer.writerows((d['id'], d['target'], d['source']) for d in dicts)
    kinds = ['a.jsonl', 'a.json', 'a.csv', 'a.tsv']
    try:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dicts), tmp_path / 'a.parquet')
        kinds.append('a.parquet')
    except ImportError:
        pass
    for kind in kinds:
        out = tmp_path / f'out_{kind}'
        assert prepare(monkeypatch, out, f'--input={tmp_path / kind}') is None
        both = pairs_in(out, 'train'), pairs_in(out, 'val')
        assert sorted(sum(both, [])) == sorted(pairs) and 3 < len(both[1]) < 40
        # a source is in one split, with all its targets
        assert not {a for a, _ in both[0]} & {a for a, _ in both[1]}
        meta = read_meta(out)
        assert meta['pairs'] == {'source': 9, 'target': 7, 'eot': EOT} and meta['prompt'] == both[1][0][0]
        letters = sum(len(a + b) for a, b in both[1])
        assert meta['val_bytes'] == letters and meta['val_documents'] == len(both[1])
        assert meta['val_bytes_per_token'] == letters / (letters + len(both[1]))


def test_few_pairs_have_their_last_ones_for_validation(tmp_path, monkeypatch):
    for n in 2, 5, 30:
        (tmp_path / f'{n}.jsonl').write_text('\n'.join(
            json.dumps({'source': f'{i}', 'target': 'x'}) for i in range(n)))
        assert prepare(monkeypatch, tmp_path / f'out{n}', f'--input={tmp_path / f"{n}.jsonl"}') is None
        held_out = max(1, n // 10)
        assert pairs_in(tmp_path / f'out{n}', 'val') == [(f'{i}', 'x') for i in range(n - held_out, n)]
        assert pairs_in(tmp_path / f'out{n}', 'train') == [(f'{i}', 'x') for i in range(n - held_out)]


def test_pairs_that_are_too_long_or_have_no_text_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    dicts = [{'source': f'{i:03}', 'target': 'yes'} for i in range(20)]
    dicts[3] |= {'source': 'x' * 600}
    dicts[4] |= {'target': 'y' * 600}
    dicts[5] |= {'target': ''}
    dicts[6] |= {'source': None}
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, dicts)))
    assert prepare(monkeypatch, tmp_path / 'out', f'--input={tmp_path / "a.jsonl"}') is None
    printed = capsys.readouterr().out
    assert 'passed over: 2 rows without a source or a target' in printed
    assert 'a row of 3 tokens of source and 4 of target; left out: 2 pairs' in printed
    assert '--objective=prefix --block_size=7 ' in printed
    assert len(pairs_in(tmp_path / 'out', 'train')) + len(pairs_in(tmp_path / 'out', 'val')) == 16
    assert prepare(monkeypatch, tmp_path / 'out', f'--input={tmp_path / "a.jsonl"}', '--overwrite=True',
                   '--source_tokens=700', '--target_tokens=601') is None
    assert len(pairs_in(tmp_path / 'out', 'train')) + len(pairs_in(tmp_path / 'out', 'val')) == 18


@pytest.mark.parametrize('flags, words', [
    (['--tokenizer=chars'], 'tokenizer=chars must have a token that ends a text'),
    (['--source=from'], "has no column 'from': choose one of source, target with --source="),
    (['--target=to'], "has no column 'to': choose one of source, target with --target="),
    (['--target_tokens=1'], 'target_tokens=1 must be at least 2'),
    (['--every=0'], 'every=0 must be at least 1'),
    (['--input=THIS/b.txt'], 'b.txt must hold rows with two columns'),
    (['--name=text'], 'name=text must be a plain name that no other dataset has'),
    (['--source_tokens=1'], 'the train split of')])
def test_what_gives_no_pairs_is_refused(flags, words, tmp_path, monkeypatch):
    (tmp_path / 'a.jsonl').write_text('\n'.join(['{"source": "aa", "target": "b"}'] * 5))
    (tmp_path / 'b.txt').write_text('text')
    flags = [flag.replace('THIS', str(tmp_path)) for flag in flags]
    stop = prepare(monkeypatch, tmp_path / 'out', f'--input={tmp_path / "a.jsonl"}', *flags)
    assert words in stop and '\n' not in stop, stop


# ----------------------------------------------------------------------------------------------------------
# Runs


def settings(folder, kind, **more):
    return (dict(dataset=folder, objective='prefix', block_size=sum(SIZES), batch_size=16)
            | MODELS[kind] | more)


@BOTH
def test_a_run_learns_its_pairs_is_killed_and_answers(folder, kind, tmp_path):
    flags = settings(folder, kind, max_iters=400, lr_decay_iters=400, eval_interval=100)
    whole, printed = train(tmp_path / 'whole', **flags)
    assert ' of targets' in printed and losses(whole, 'val_loss')[-1] < 0.5
    assert not any('val_bpb' in line for line in (whole / 'metrics.jsonl').read_text().splitlines())
    assert_survives_a_kill(whole, tmp_path / 'killed', 132, arguments(tmp_path / 'killed', **flags))

    session = Session.load(out_dir=str(whole), sampling=Sampling(temperature=0))
    asked = [f'{a}{b}{c}' for a, b, c in itertools.product('abc', repeat=3)]
    samples = session.sample(asked)
    right = sum(sample.text == text.upper() for text, sample in zip(asked, samples))
    assert right >= 20, [(sample.prompt, sample.text) for sample in samples]
    # each ends where the model ends it, and the same alone
    assert all(sample.tokens[-1] == EOT for sample in samples) and samples[4].prompt == 'abb\n'
    assert session.sample(asked[4])[0].text == samples[4].text
    assert session.sample()[0].prompt == read_meta(folder)['prompt'] + '\n'
    done = python('sample.py', f'--out_dir={whole}', '--start=abc', '--num_samples=1', '--temperature=0')
    assert done.code == 0 and f'abc\n{session.sample("abc")[0].text}\n' in done.out, done


@BOTH
def test_a_preview_answers_sources_of_the_validation_split(folder, kind, tmp_path):
    pytest.importorskip('wandb')
    flags = settings(folder, kind, max_iters=20, wandb_log=True)
    texts = shown(python('train.py', *arguments(tmp_path / 'run', **flags), before=SHOWN))
    sources = {a for i, (a, b) in enumerate(some_pairs()) if i % 5 == 0}
    assert len(texts) == 4 and all(text.split(' => ')[0] in sources for text in texts)


def test_the_length_of_a_row_is_taken_from_the_data_and_another_is_refused(folder, tmp_path):
    flags = [flag for flag in arguments(tmp_path / 'run', **settings(folder, 'both', max_iters=1))
             if not flag.startswith('--block_size')]
    done = python('train.py', *flags)
    assert done.code == 0 and 'of 16 x 16: 256 tokens' in done.out, done
    assert_refused(python('train.py', *flags, '--block_size=32', '--overwrite=True'),
                   'block_size=32 must be 16', '--block_size=16')
    assert_refused(python('train.py', *flags, '--objective=span', '--overwrite=True'),
                   'objective must be prefix', '--objective=prefix')


def test_a_draft_is_refused_beside_an_encoder():
    decoder, both, encoder = (build(toy(pos='rope', **flags))
                              for flags in ({}, dict(n_encoder=1), dict(causal=False)))
    for model, draft, which in ((both, decoder, 'the model'), (decoder, both, 'the draft'),
                                (decoder, encoder, 'the draft')):
        with pytest.raises(ValueError, match=f'draft must be left out where {which} is or has an encoder'):
            Session(model, ByteTokenizer(), draft=draft).speculative(SessionPrompt, 0)


class SessionPrompt:
    tokens, text = [1, 2, 3], 'abc'
