"""bench.py recall: the rows, what is asked of them, how a run is judged, and the sentences."""
import csv
import json
import random

import pytest
import runs
import torch

import bench
from data.objectives import Pairs
from nanoblocks.experiments import recall

pytest.importorskip('matplotlib')


def batch_of(texts, slots):
    """(idx, targets) of texts (source, target), as a run is given them."""
    eot, L = 256, 2 * slots + 1
    rows = [[*a.encode(), *[eot] * (2 * slots - len(a)), *b.encode(), *[eot] * (L - len(b))]
            for a, b in texts]
    task = Pairs(257, {'source': 2 * slots, 'target': L, 'eot': eot, 'every': 2}).read_by('decoder')
    return task(torch.tensor(rows).numpy(), None)


def some_texts(slots=8, rows=20):
    draw = random.Random(1)
    return [recall.texts_of_row(draw, draw.choice((1, 2, 4, slots)), slots) for _ in range(rows)]


def test_a_row_shows_every_pair_once_and_asks_for_each_once():
    orders = set()
    for source, target in some_texts():
        pairs = [source[i:i + 2] for i in range(0, len(source), 2)]
        shown = [pair for pair in pairs if pair != '..']
        asked = [target[i:i + 2] for i in range(0, len(target), 2)]
        assert len(target) <= len(source) <= 16 and sorted(shown) == sorted(asked)
        assert len({key for key, _ in shown}) == len(shown), 'a key has one value'
        assert all(key in recall.KEYS and value in recall.VALUES for key, value in shown)
        orders.add(tuple(map(shown.index, asked)))
    assert len(orders) > 5
    assert not set(recall.KEYS) & set(recall.VALUES) and recall.BLANK not in recall.KEYS + recall.VALUES


def test_what_is_asked_are_the_values_and_how_far_back_they_are():
    texts = some_texts()
    idx, targets = batch_of(texts, 8)
    pairs, distance, named = [], [], []
    for n, (source, target) in enumerate(texts):    # as one would do it by hand
        text = source + '|' + target
        for at in range(len(source) + 1, len(text), 2):
            assert idx[n, at] == ord(text[at])
            named.append((n, at, ord(text[at + 1])))
            pairs.append(len(target) // 2)
            distance.append(at - text.index(text[at]))
    assert [(n, at, targets[n, at].item()) for n, at in (targets >= 0).nonzero().tolist()] == named
    found = recall.questions(idx, targets)
    assert found[0].tolist() == pairs and found[1].tolist() == distance


def test_a_run_is_judged_by_the_values_alone(monkeypatch):
    monkeypatch.setattr(recall, 'PAIRS', {1: 1, 2: 1, 4: 1, 8: 1})
    texts = some_texts()
    idx, targets = batch_of(texts, 8)

    def model(x):
        """Right about the rows with fewer than 8 pairs, and of those with 8, if the pair is 8 tokens back."""
        right = targets.clone()
        for n, at in (targets >= 0).nonzero().tolist():
            far = at - idx[n].tolist().index(idx[n, at].item()) > 8
            right[n, at] += far and (targets[n] >= 0).sum() == 8
        return torch.nn.functional.one_hot(right.clamp(min=0), 257).float(), None
    found = recall.counts(model, [{'idx': idx, 'targets': targets}])
    for n in (1, 2, 4):
        asked = n * sum(len(target) == 2 * n for _, target in texts)
        assert found['pairs', n] == (asked, asked) and asked
    near = found['distance', 4], found['distance', 8]
    assert all(asked == right for asked, right in near) and near[1][0]
    assert all(found['distance', d][1] == 0 < found['distance', d][0] for d in (16, 32))
    assert found['pairs', 8][0] == sum(found['distance', d][0] for d in recall.DISTANCES)
    assert found['pairs', 8][1] == near[0][1] + near[1][1]


def arm(size, *accuracies):
    return {'bytes': size, 'parameters': 10, 'seeds': [
        {('pairs', max(recall.PAIRS)): (1000, round(1000 * x))} for x in accuracies]}


def test_a_verdict_has_its_interval_and_says_what_is_not_resolved():
    found = {'a': arm(100, 0.5, 0.52, 0.54), 'b': arm(2000, 0.9, 0.93, 0.93), 'c': arm(8, 0.4, 0.9, 0.3)}
    # differences 0.40, 0.41, 0.39: mean 0.40, sd 0.01, half 4.303 * 0.01 / sqrt(3)
    def verdict(found, *names, p=0.0):
        return recall.verdict(found, *names, recall.against(found, *names), p)
    assert verdict(found, 'b', 'a') == (
        'b against a, 2,000 bytes against 100, share of the values of 16 pairs: +0.400, 95 % interval +0.375 '
        'to +0.425 over 3 seeds: resolved')
    assert verdict(found, 'b', 'a', p=0.06).endswith(' over 3 seeds: resolved, not after Holm')
    assert verdict(found, 'c', 'a').endswith(' over 3 seeds: not resolved')
    one = {'a': arm(1, 0.5), 'b': arm(1, 0.75)}
    assert verdict(one, 'a', 'b').endswith('-0.250, one seed, no interval')


def test_recall_trains_judges_and_writes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, 'PAIRS', {1: 1, 4: 1})
    monkeypatch.setattr(recall, 'ROWS', 400)
    monkeypatch.setattr(recall, 'DISTANCES', (8, 16))
    monkeypatch.setattr(recall, 'FAMILIES', {
        'attention': {'attention': ''}, 'Mamba-2': {f'Mamba-2, N of {n}': 'layer_pattern=sm+pos=none+'
                                                    f'ssm_state={n}' for n in (4, 8)},
        'Mamba-2 + attention': {'Mamba-2 + attention': 'layer_pattern=ma+ssm_state=4'}})
    monkeypatch.setattr(recall, 'HYBRIDS', {'Mamba-2 + attention': 'Mamba-2'})
    words = [f'--out_dir={tmp_path / "runs"}', '--max_iters=4', '--batch_size=4', '--eval_tokens=100',
             '--n_embd=32', '--seeds=1']
    recall.recall(words, 'cpu', tmp_path)
    printed = capsys.readouterr().out
    page = (tmp_path / 'recall' / 'README.md').read_text()
    assert f'\npython bench.py recall --out_dir={tmp_path / "runs"} --max_iters=4 ' in page
    for text in printed, page:
        for start in 'Mamba-2, N of 8 against attention', 'Mamba-2 + attention against Mamba-2, N of 4':
            assert any(line.lstrip('- ').startswith(start) for line in text.splitlines())
    with open(tmp_path / 'recall' / 'recall.csv', newline='') as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 4 and {line['layers'] for line in lines} >= {'attention', 'Mamba-2, N of 8'}
    assert all(0 <= int(line['right']) <= int(line['asked']) for line in lines)
    size = {line['layers']: int(line['bytes']) for line in lines}
    # 4 numbers more of each of 64 channels, in 32 bit, and 8 more in each of 3 steps of the convolution
    assert size['Mamba-2, N of 8'] == size['Mamba-2, N of 4'] + 64 * 4 * 4 + 3 * 8 * 2
    assert (tmp_path / 'recall' / 'recall.png').exists()
    meta = json.loads((tmp_path / 'runs' / 'data' / 'meta.json').read_text())
    assert meta['pairs'] == {'source': 8, 'target': 9, 'eot': 256, 'every': 2}


def test_sentences_are_corrected_for_how_many_they_are():
    arms = [arm for family in recall.FAMILIES.values() for arm in family]
    found = {name: arm(8, 0.5, 0.5, 0.5) for name in arms} | {'attention': arm(8, 0.56, 0.58, 0.61)}
    alone = recall.against(found, 'window of 32', 'attention')
    assert alone.resolved and 0.01 < alone.p < 0.05
    said = recall.verdicts(found)[0]
    assert said.startswith('window of 32 against attention') and said.endswith(': resolved, not after Holm')


@pytest.mark.parametrize('flag', ['layer_pattern=sm', 'dataset=pysource', 'block_size=9'])
def test_what_recall_itself_sets_is_refused(flag):
    with pytest.raises(ValueError, match=f'{flag} must be left out: bench.py recall sets it itself'):
        recall.recall([f'--{flag}'], 'cpu', 'out')


def test_recall_is_a_topic_that_refuses_what_it_does_not_read(monkeypatch):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # main changes them
    with pytest.raises(SystemExit) as refusal:
        bench.main('recall', ['--rounds=3'])
    assert str(refusal.value) == 'rounds=3 must be left out: bench.py recall does not read it'
