"""bench.py throughput: whole models over the length of a text, and how their times are compared."""
import json
import math
import random

import pytest
import torch

import bench
from model import GPT, TokenCache
from nanoblocks.experiments import throughput, timing
from nanoblocks.experiments.throughput import Cost

TINY = {'n_embd': 32, 'n_head': 2, 'vocab_size': 64, 'window': 8}
NAMES = throughput.MODELS.split(',')


def built(name):
    own = {key: value for key, value in TINY.items() if key != 'window' or name in ('mistral', 'samba')}
    if name == 'jamba':
        own['n_layer'] = 4  # of which the last attends
    return GPT(throughput.config_of(name, own)).eval()


def token_caches(cache):
    parts = [part for entry in cache for part in getattr(entry, 'parts', [entry])]
    return [part for part in parts if isinstance(part, TokenCache)]


@pytest.mark.parametrize('name', NAMES)
def test_a_cache_that_is_filled_holds_the_places_of_one_that_was_read(name):
    model, T = built(name), 20
    filled, read = throughput.filled_cache(model, T, 'float32', 'cpu', short=5), model.new_cache(1, T + 1)
    with torch.no_grad():
        model(torch.randint(64, (1, T)), cache=read)
    assert [entry.nbytes() for entry in filled] == [entry.nbytes() for entry in read]
    for a, b in zip(token_caches(filled), token_caches(read), strict=True):
        assert a.pos.equal(b.pos) and not a.empty
        assert [rows.shape for rows in a.rows] == [rows.shape for rows in b.rows]
        held = a.pos >= 0
        assert all((rows[held] != 0).any(-1).all() for rows in a.rows)
    assert sum(map(bool, token_caches(read))) == len(token_caches(read))
    throughput.decoding(model, 'float32', 'cpu', T)()


def test_a_token_is_decoded_behind_all_others_every_time(monkeypatch):
    model, seen = built('llama'), []
    run = throughput.decoding(model, 'float32', 'cpu', 20)
    forward = model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **more: seen.append((idx.shape, int(more['pos'][0])))
                        or forward(idx, **more))
    run()
    assert seen == [((1, 1), 20)] * throughput.NEW


def test_the_sizes_are_those_of_a_small_model_and_a_mixer_alone_is_half_a_layer():
    layers = {name: throughput.config_of(name, {}).n_layer for name in NAMES}
    assert layers == dict.fromkeys(NAMES, 6) | {'mamba2': 12, 'rwkv7': 12}
    assert throughput.config_of('samba', {}).window == 1024
    assert throughput.config_of('samba', {'window': 64, 'n_layer': 2}).n_layer == 2


# ----------------------------------------------------------------------------------------------------------
# Until the time is up


def test_a_model_goes_on_until_its_time_is_up_and_no_further(monkeypatch):
    clock, tried = [0.0], []
    power = {'linear': 1.0, 'square': 2.0}

    def work(name, T):
        def run():
            tried.append((name, T))
            clock[0] += T ** power[name] / 1000
        return run
    monkeypatch.setattr(timing, 'synchronized_time', lambda device: clock[0])
    monkeypatch.setattr(throughput, 'peak_bytes', lambda run, device: run() or 10.0)
    works = {name: lambda T, name=name: work(name, T) for name in power}
    found = throughput.costs(works, (1, 2, 4, 8, 16, 32, 64), 1.0, 'cpu')
    # three rounds of 64 take 0.19 s; of 16^2 0.77 s, with 0.5 left, and 32^2 would be 3 s
    assert list(found['linear']) == [1, 2, 4, 8, 16, 32, 64] and list(found['square']) == [1, 2, 4, 8]
    assert all(cost.median == pytest.approx(T / 1000) for T, cost in found['linear'].items())
    assert {T for name, T in tried if name == 'square'} == {1, 2, 4, 8}
    assert all(3 <= len(cost.seconds) <= 5 for row in found.values() for cost in row.values())
    # within a length they take turns, every other round backwards
    assert [name for name, T in tried if T == 8][:6] == ['square', 'linear', 'linear', 'square', 'square',
                                                         'linear']


def test_a_length_that_does_not_fit_into_memory_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(throughput, 'free_bytes', lambda device: 100.0)
    found = {4: Cost([1e-6], 30.0)}
    assert throughput.too_much(found, 8, 1.0, 'cpu') == ''
    assert throughput.too_much(found, 16, 1.0, 'cpu') == 'about 120B of memory'
    assert throughput.too_much({}, 16, 0.0, 'cpu') == ''
    assert 'about 48 s, and 5 s are left' in throughput.too_much({4: Cost([1.0], 1.0)}, 16, 5.0, 'cpu')


# ----------------------------------------------------------------------------------------------------------
# Comparing


def test_a_ratio_is_within_its_interval_in_95_of_100_cases():
    draw, inside = random.Random(0), {4: 0, 12: 0}
    for n in inside:
        for _ in range(600):
            first, second = ([math.exp(draw.gauss(mean, 0.3)) for _ in range(n)] for mean in (0.5, 0.2))
            e = timing.ratio(first, second)
            inside[n] += e.low <= math.exp(0.3) <= e.high
    # three standard deviations of such a count are 16; the interval of a median covers a little more
    assert 554 <= inside[4] <= 586 and 554 <= inside[12] <= 598, inside
    slow = timing.ratio([1.0] * 11 + [100.0], [2.0] * 12)
    assert slow.mean == slow.low == 0.5 and slow.high == 0.5, 'no single round moves it'
    assert math.isnan(timing.ratio([2.0], [1.0]).low)


def test_a_model_is_faster_from_where_it_stays_faster():
    base = {T: Cost([1.0, 1.01, 0.99], 0.0) for T in (1, 2, 4, 8)}
    def row(*times):
        return {T: Cost([t, t * 1.01, t * 0.99], 0.0) for T, t in zip((1, 2, 4, 8), times)}
    assert throughput.compared(row(2.0, 0.5, 0.4, 0.3), base).ahead == 2
    assert throughput.compared(row(0.5, 2.0, 0.4, 0.3), base).ahead == 4, 'slower in between'
    assert throughput.compared(row(2.0, 2.0, 2.0, 1.0), base).ahead is None
    short = throughput.compared(row(0.5, 0.5), base)
    assert (short.ahead, short.shortest, short.longest) == (1, 1, 2)
    found = {'fast': short, 'slow': throughput.compared(row(4.0), base),
             'same': throughput.compared(row(1.0), base)}
    assert throughput.verdict('decoding', 'llama', found) == (
        'decoding: more tokens/s than llama: fast (x 2.00, 95 % interval 2.00 to 2.00, at 2); '
        'fewer tokens/s than llama: slow (x 0.25, 95 % interval 0.25 to 0.25, at 1); '
        'as many, within the interval, as llama: same (x 1.00, 95 % interval 1.00 to 1.00, at 1)')


# ----------------------------------------------------------------------------------------------------------
# The command


def test_whole_models_are_measured_and_told(tmp_path, capsys):
    throughput.throughput({'n_embd': 16, 'n_head': 2, 'n_layer': 2, 'vocab_size': 32}, 'llama,retnet', '8,16',
                          9.0, 'cpu', tmp_path, 'python bench.py throughput --models=llama,retnet')
    tmp_path = tmp_path / 'throughput'
    printed = capsys.readouterr().out
    for heading in ('prefill, tokens/s | 8 | 16', 'decoding, tokens/s | 8', 'training, tokens/s | 8',
                    'cache, bytes', 'peak of prefill, bytes', "decoding: tokens/s over llama's"):
        assert heading in printed
    assert '| llama | aa | ' in printed and '| retnet | rr | ' in printed
    # two layers, each with keys and values of 16 numbers in 32 bits, and positions
    assert '| llama | 2.11k | 4.22k |' in printed and 2 * 16 * (2 * 16 * 4 + 4) == 4224
    numbers = json.loads((tmp_path / 'throughput.json').read_text())
    assert numbers['seconds'].keys() == {'prefill', 'decoding', 'training'}
    assert all(t > 0 for t in numbers['seconds']['training']['retnet']['16']['seconds'])
    page = (tmp_path / 'README.md').read_text()
    assert 'one text at a time, float32' in page and '- decoding: ' in page and '(throughput.png)' in page
    assert '\npython bench.py throughput --models=llama,retnet\n' in page
    assert (tmp_path / 'throughput.png').exists()


@pytest.mark.parametrize('options, words', [
    (['--models=lama'], 'models=lama must be families, separated by commas: did you mean llama?'),
    (['--models=bert'], 'models=bert must decode a text of its own'),
    (['--models=gpt2'], 'models=gpt2 must have no learned positions, which end at block_size'),
    (['--limit_s=0'], 'limit_s=0.0 must be above 0'), (['--rounds=3'], 'rounds=3 must be left out'),
])
def test_what_cannot_be_measured_is_refused(options, words, monkeypatch, tmp_path):
    for name in bench.plain_settings(vars(bench)):
        monkeypatch.setattr(bench, name, getattr(bench, name))  # main changes them
    with pytest.raises(SystemExit) as refusal:
        bench.main('throughput', [*options, f'--figures={tmp_path}'])
    assert words in str(refusal.value) and '\n' not in str(refusal.value)
