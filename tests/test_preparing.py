"""Preparing data: validation texts of one's own, several processes, and going on after a kill."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, assert_refused, metrics, pair, python, real_python, toy, train
from test_data import (  # noqa: F401  some are fixtures
    Killed,
    contents,
    gpt2,
    prepare,
    random_texts,
    stream,
    texts_of,
    web,
    write,
)
from test_pairs import pairs_in

from data.common import Again
from data.encoding import CUT, END, MORE, encoded_parts
from data.hub import Stream
from data.loader import open_dataset, read_meta
from data.tokenizer import ByteTokenizer, CharTokenizer

SHORT = dict(max_iters=4, eval_interval=2, log_interval=1, block_size=16, eval_tokens=64)

# ----------------------------------------------------------------------------------------------------------
# Validation texts of one's own


def lines(path, texts, column='text'):
    path.write_text(''.join(json.dumps({column: text}) + '\n' for text in texts))
    return path


@pytest.mark.parametrize('n', [3, 300])
def test_a_text_of_ones_own_is_the_validation_split(n, tmp_path, monkeypatch, capsys):
    texts = [f'text {i} to train on, ' * 3 for i in range(n)]
    lines(tmp_path / 'a.jsonl', texts)
    (tmp_path / 'held').mkdir()
    for i in range(4):
        (tmp_path / 'held' / f'{i}.txt').write_text(f'§ {i} is held out, ' * 9)
    flags = f'--input={tmp_path / "a.jsonl"}', f'--val_input={tmp_path / "held"}'
    for coder in 'bytes', 'chars', 'bpe':
        out = tmp_path / coder
        assert prepare(monkeypatch, 'text', *flags, f'--out={out}', f'--tokenizer={coder}',
                       '--vocab_size=300') is None
        # no token ends a document of characters
        together = coder == 'chars'
        assert texts_of(out, 'train') == ([''.join(texts)] if together else texts)
        held = [f'§ {i} is held out, ' * 9 for i in range(4)]
        assert texts_of(out, 'val') == ([''.join(held)] if together else held)
        meta = read_meta(out)
        assert (meta['train_documents'], meta['val_documents']) == (n, 4)
        assert meta['source'] == 'a.jsonl, and held for validation'
    assert 'reading 4 files: 4 .txt' in capsys.readouterr().out
    # merges are learned from the text to train on alone
    assert not any('\xa7' in token or 'held' in token for token in read_meta(out)['tokenizer']['tokens'])
    train(tmp_path / 'run', dataset=tmp_path / 'bytes', **SHORT)
    flags = SHORT | {'gradient_accumulation_steps': 2}
    two = pair(*toy(tmp_path / 'two', dataset=tmp_path / 'bytes', **flags))
    assert [done.code for done in two] == [0, 0], two


def test_validation_texts_of_ones_own_are_judged_in_one_command(tmp_path, monkeypatch):
    """Files to token files to bits per byte, with a vocabulary that is learned from the first."""
    files = {'mine': 'a text to train on and more of it, ', 'wiki': 'a text of another kind: ',
             'code': 'x += 1\n'}
    for name, text in files.items():
        (tmp_path / f'{name}.txt').write_text(''.join(f'{text}{i * i}' for i in range(400)))
    shared = ['text', f'--input={tmp_path / "mine.txt"}']
    assert prepare(monkeypatch, *shared, f'--out={tmp_path / "mine"}', '--vocab_size=300') is None
    for name in 'wiki', 'code':
        assert prepare(monkeypatch, *shared, f'--val_input={tmp_path / name}.txt', f'--out={tmp_path / name}',
                       f'--tokenizer={tmp_path / "mine"}') is None
    sets = f'{tmp_path / "wiki"},{tmp_path / "code"}'
    run, printed = train(tmp_path / 'run', dataset=tmp_path / 'mine', eval_datasets=sets, **SHORT)
    last = [line for line in metrics(run) if 'val_loss' in line][-1]
    for name in files:
        text, size = (tmp_path / f'{name}.txt').read_bytes(), read_meta(tmp_path / name)['val_tokens']
        text = text[int(0.9 * len(text)):] if name == 'mine' else text
        loss, bits = (last[key][str(tmp_path / name)] for key in ('val_losses', 'val_bpbs'))
        assert bits == pytest.approx(loss / np.log(2) * size / len(text), rel=1e-6)
        assert f'  {tmp_path / name}: val loss {loss:.4f}, {bits:.4f} bits per byte' in printed
    assert len(set(last['val_bpbs'].values())) == 3


def test_pairs_of_ones_own_are_the_validation_split(tmp_path, monkeypatch):
    for name, n in ('train', 30), ('test', 5):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(
            json.dumps({'prompt': f'{name} {i}', 'answer': f'{i}'}) for i in range(n)))
    out = tmp_path / 'out'
    assert prepare(monkeypatch, 'pairs', f'--input={tmp_path / "train.jsonl"}', '--tokenizer=bytes',
                   f'--val_input={tmp_path / "test.jsonl"}', f'--out={out}', '--source=prompt',
                   '--target=answer') is None
    assert pairs_in(out, 'train') == [(f'train {i}', f'{i}') for i in range(30)]
    assert pairs_in(out, 'val') == [(f'test {i}', f'{i}') for i in range(5)]
    # a decoder is judged for the answers alone
    flags = dict(dataset=out, objective='prefix', **SHORT | {'block_size': sum(
        read_meta(out)['pairs'][name] for name in ('source', 'target'))})
    run, printed = train(tmp_path / 'run', **flags)
    assert ' of targets' in printed
    two = pair(*toy(tmp_path / 'two', **flags | {'gradient_accumulation_steps': 2}))
    assert [done.code for done in two] == [0, 0], two


@pytest.mark.parametrize('script', ['text', 'pairs'])
def test_validation_text_that_is_trained_on_or_not_read_is_refused(script, tmp_path, monkeypatch):
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a.jsonl').write_text('{"text": "a", "source": "b", "target": "c"}')
    (tmp_path / 'b.jsonl').write_text('{"text": "a", "source": "b", "target": "c"}')
    for val, more, words in ((folder / 'a.jsonl', (), f'must lie outside of input={folder}'),
                             (folder, (), 'must lie outside'), (tmp_path, (), 'must lie outside'),
                             (tmp_path / 'none', (), f'val_input={tmp_path / "none"} does not exist'),
                             ('http://x/y', (), 'val_input=http://x/y must be a file or a folder'),
                             (tmp_path / 'b.jsonl', ['--val_fraction=0.2'], '=0.2 must be left out')):
        stop = prepare(monkeypatch, script, f'--input={folder}', f'--val_input={val}', *more,
                       f'--out={tmp_path / "out"}')
        assert words in stop and '\n' not in stop, stop


def test_a_held_out_stream_survives_kills_and_comes_out_the_same(web, tmp_path, capsys):  # noqa: F811
    """The validation split comes last, and a kill may fall before, amid and at the seam."""
    def prepare_stream(name, kill=None):
        seen, held = [0], stream(web['jsonl']).rows.take(300)

        class Tokenizer(ByteTokenizer):
            def encode(self, text):
                seen[0] += 1
                if seen[0] == kill:
                    raise Killed
                return super().encode(text)

        rows = Stream(stream(web['parquet']).rows, max_documents=700, val_rows=held)
        write(tmp_path / name, rows, tokenizer=Tokenizer(), save_every=600)
        return seen[0]

    total = prepare_stream('whole')
    whole = contents(tmp_path / 'whole')
    texts = [text for part in range(3) for text in random_texts(500, seed=10 + part)]
    assert texts_of(tmp_path / 'whole', 'train') == [text for text in texts[:700] if text]
    assert texts_of(tmp_path / 'whole', 'val') == [text for text in texts[:300] if text]
    n_train = read_meta(tmp_path / 'whole')['train_documents']
    for kill in 100, n_train - 1, n_train, n_train + 1, n_train + 2, total - 5, total:
        with pytest.raises(Killed):
            prepare_stream(f'at{kill}', kill)
        assert prepare_stream(f'at{kill}') < total and 'resuming in' in capsys.readouterr().out
        assert contents(tmp_path / f'at{kill}') == whole, kill


def test_web_corpora_take_a_split_of_their_own(tmp_path, monkeypatch):
    lines(tmp_path / 'a.jsonl', ['one', 'two'])
    lines(tmp_path / 'b.jsonl', ['three'])
    flags = f'--input={tmp_path / "a.jsonl"}', f'--out={tmp_path / "out"}', '--tokenizer=bytes'
    assert prepare(monkeypatch, 'openwebtext', *flags, f'--val_input={tmp_path / "b.jsonl"}') is None
    assert texts_of(tmp_path / 'out', 'train') == ['one', 'two']
    assert texts_of(tmp_path / 'out', 'val') == ['three']
    for more, words in (([flags[0], '--val_split=test'], 'val_split=test must be left out beside input='),
                        (['--val_input=x'], 'val_input=x must stand beside input'),
                        (['--val_split=test', '--val_fraction=0.1'], '=0.1 must be left out beside test'),
                        ([flags[0], '--processes=0'], 'processes=0 must be at least 1')):
        stop = prepare(monkeypatch, 'fineweb_edu', *more)
        assert words in stop and '\n' not in stop, stop


@pytest.fixture(scope='module', params=['parquet', 'jsonl', 'named'])
def repository(request, tmp_path_factory):
    """
    (flags, {split: texts}) of a folder as the hub has datasets, which the package `datasets` opens by its
    path as it opens one of the hub by its name. named: with parts, of which a README says the files.
    """
    import pyarrow.parquet
    folder = tmp_path_factory.mktemp('hub')
    texts = {'train': random_texts(400, seed=3), 'validation': random_texts(90, seed=4)}
    part = 'small' if request.param == 'named' else 'data'
    (folder / part).mkdir()
    for split, found in texts.items():
        path = folder / part / f'{split}-00000-of-00001.parquet'
        if request.param == 'jsonl':
            lines(folder / f'{split}.jsonl', found)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pydict({'text': found}), path, row_group_size=50)
    if request.param == 'named':
        files = ''.join(f'  - split: {split}\n    path: small/{split}-*\n' for split in texts)
        pyarrow.parquet.write_table(pyarrow.Table.from_pydict({'text': ['other']}), folder / 'other.parquet')
        other = '- config_name: other\n  data_files: other.parquet\n'
        (folder / 'README.md').write_text(
            f'---\nconfigs:\n{other}- config_name: small\n  data_files:\n{files}---\n')
    return [f'--repo={folder}', *['--config=small'] * (request.param == 'named')], texts


def test_an_official_split_is_for_validation(repository, tmp_path):
    """As a user runs it, in one process and in two, with a kill in each split."""
    flags, texts = repository
    whole = None
    for processes in 1, 2:
        out = tmp_path / f'out{processes}'
        command = ['data/openwebtext/prepare.py', *flags, '--val_split=validation', '--tokenizer=bytes',
                   f'--out={out}', '--save_every=500', f'--processes={processes}']
        if processes == 1:
            for after in 150, 300:
                dying = python(command[0], *command[1:], before=DYING.format(after=after))
                assert dying.code == -9 and not (out / 'meta.json').exists(), dying
        done = real_python(*command)
        assert done.code == 0 and ('resuming in' in done.out) == (processes == 1), done
        meta = read_meta(out)
        assert (meta['train_documents'], meta['val_documents']) == tuple(
            sum(map(bool, found)) for found in texts.values())
        for split, found in zip(('train', 'val'), texts.values()):
            assert texts_of(out, split) == [text for text in found if text]
        assert whole in (None, contents(out))
        whole = contents(out)


# ends the process with SIGKILL while it writes the tokens of so many documents
DYING = '''
import os, data.writer
add, calls = data.writer.SplitWriter.add_part, []
def add_part(self, *args):
    calls.append(args)
    if len(calls) == {after}:
        os.kill(os.getpid(), 9)
    return add(self, *args)
data.writer.SplitWriter.add_part = add_part
'''


def test_a_split_that_cannot_be_held_out_is_refused(repository, tmp_path):
    flags, _ = repository
    for split, words in (('test', "['train', 'validation']"), ('train', 'another split than train'),
                         ('train[:10%]', 'must be a split of')):
        done = python('data/openwebtext/prepare.py', *flags, f'--val_split={split}', '--tokenizer=bytes',
                      f'--out={tmp_path / "out"}')
        assert_refused(done, f'val_split={split} must be', words)


# ----------------------------------------------------------------------------------------------------------
# Several processes, and kills


def some_texts(n, size, seed=0):
    """Texts of words, with long ones among them, empty ones and some without a blank."""
    rng, known = random.Random(seed), [text for text in random_texts(400) if text.strip()]
    for i in range(n):
        yield '' if i % 17 == 3 else ' '.join(rng.choices(known, k=rng.randrange(1, size)))


@pytest.mark.parametrize('kind', ['bytes', 'gpt2', 'published'])
def test_processes_give_the_bytes_that_one_gives(kind, tmp_path, monkeypatch, request):
    if kind == 'gpt2':
        request.getfixturevalue('gpt2')
    coder = published(tmp_path) if kind == 'published' else kind
    (tmp_path / 'in').mkdir()
    lines(tmp_path / 'in' / 'a.jsonl', some_texts(300, 60))
    # a document in several parts
    (tmp_path / 'in' / 'b.txt').write_text(' '.join(some_texts(100, 900, seed=1)))
    found = {}
    for processes in 1, 3:
        out = tmp_path / f'out{processes}'
        assert prepare(monkeypatch, 'text', f'--input={tmp_path / "in"}', f'--out={out}',
                       f'--tokenizer={coder}', f'--processes={processes}', '--save_every=1000') is None
        found[processes] = contents(out)
    assert found[1] == found[3] and sorted(found[1]) == ['meta.json', 'train.bin', 'val.bin']


def published(folder):
    """A checkpoint's tokenizer, which puts a blank before a text."""
    tokenizers = pytest.importorskip('tokenizers')
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    coder.decoder = tokenizers.decoders.ByteLevel()
    coder.train_from_iterator(some_texts(50, 50), tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    (folder / 'published').mkdir()
    coder.save(str(folder / 'published' / 'tokenizer.json'))
    return folder / 'published'


def test_a_text_that_one_process_cannot_spell_is_refused_in_a_sentence():
    documents = [('train', 'abc'), ('train', 'xyz')]
    with pytest.raises(ValueError, match="has no 'xyz'"):
        list(encoded_parts(documents, CharTokenizer('abc'), dict(train=False), 2))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_killed_preparation_goes_on_with_any_number_of_processes(processes, tmp_path, monkeypatch, capsys):
    lines(tmp_path / 'a.jsonl', some_texts(1500, 200))
    (tmp_path / 'b.txt').write_text('a line of text\n' * 300_000)
    (tmp_path / 'in').mkdir()
    for name in 'a.jsonl', 'b.txt':
        os.rename(tmp_path / name, tmp_path / 'in' / name)
    flags = [f'--input={tmp_path / "in"}', '--tokenizer=bpe', '--vocab_size=300', '--save_every=100000']
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert prepare(monkeypatch, 'text', f'--out={whole}', *flags) is None
    script = ROOT / 'data' / 'text' / 'prepare.py'
    for wanted in 1, 2:     # saves of the progress that a kill waits for
        command = [sys.executable, script, f'--out={killed}', f'--processes={processes}', *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                   env=os.environ | {'NAME_OF_TEST': str(tmp_path)})
        seen = set()
        while len(seen) < wanted and process.poll() is None:
            if (killed / 'progress.json').exists():
                seen.add((killed / 'progress.json').stat().st_mtime_ns)
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # the other processes end with the one that was killed
        deadline = time.monotonic() + 30
        while running(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(tmp_path)
    with pytest.raises(FileNotFoundError, match='has not been prepared'):
        open_dataset(killed, 8, 0)
    capsys.readouterr()
    assert prepare(monkeypatch, 'text', f'--out={killed}', f'--processes={3 - processes}', *flags) is None
    printed = capsys.readouterr().out
    assert 'resuming in' in printed and 'training the vocabulary' not in printed
    assert contents(killed) == contents(whole)


def running(folder):
    """The processes that carry this folder in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{name}/environ', 'rb') as file:
                if f'NAME_OF_TEST={folder}'.encode() in file.read().split(b'\0'):
                    found.append(name)
        except OSError:
            continue
    return found


def test_progress_of_other_texts_is_not_continued(tmp_path, monkeypatch, capsys):
    flags = [f'--input={tmp_path / "a.jsonl"}', f'--out={tmp_path / "out"}', '--tokenizer=bytes',
             '--save_every=100']
    wanted = [f'a text with number {i}' for i in range(200)]
    lines(tmp_path / 'a.jsonl', [*wanted[:-1], 'another'])
    encode, calls = ByteTokenizer.encode, []

    def dying(self, text):
        calls.append(text)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return encode(self, text)
    monkeypatch.setattr('data.tokenizer.ByteTokenizer.encode', dying)
    assert prepare(monkeypatch, 'text', *flags) == 130
    assert 'the same command resumes' in capsys.readouterr().out
    lines(tmp_path / 'a.jsonl', wanted)
    assert prepare(monkeypatch, 'text', *flags) is None
    assert 'cannot be resumed (another input): beginning anew' in capsys.readouterr().out
    assert sorted(texts_of(tmp_path / 'out', 'train') + texts_of(tmp_path / 'out', 'val')) == sorted(wanted)


@pytest.mark.parametrize('name', ['shakespeare', 'pysource', 'pairs', 'openwebtext', 'text'])
def test_every_dataset_is_prepared_with_a_runs_own_tokenizer(name, tmp_path, monkeypatch):
    run, _ = train(tmp_path / 'run', **SHORT)
    (tmp_path / 'a.txt').write_text('some words, and more of them, ' * 50)
    lines(tmp_path / 'a.jsonl', [f'text {i}' for i in range(60)])
    (tmp_path / 'pairs.jsonl').write_text('{"source": "a", "target": "b"}\n' * 5)
    file = {'shakespeare': 'a.txt', 'pairs': 'pairs.jsonl'}.get(name, 'a.jsonl')
    flags = [f'--input={tmp_path / file}'] if name != 'pysource' else []
    flags += ['--val_fraction=0.3'] if name == 'openwebtext' else []
    assert prepare(monkeypatch, name, *flags, f'--out={tmp_path / "out"}', f'--tokenizer={run}') is None
    assert read_meta(tmp_path / 'out')['tokenizer'] == {'kind': 'bytes'}


def test_a_kill_amid_a_document_loses_neither_its_end_nor_its_count(tmp_path):
    """A document may end with a part that has no text, and be the only one."""
    parts = [('train', 'ab', MORE), ('train', 'cd', MORE), ('train', '', END), ('val', 'ef', MORE),
             ('val', 'gh', CUT), ('train', '', END), ('train', 'ij', END)]

    def make(kill):
        for number, part in enumerate(parts):
            if number == kill:
                raise Killed
            yield part

    def written(name, kill=None):
        write(tmp_path / name, Again(lambda: make(kill), 'x'), tokenizer=ByteTokenizer(), save_every=1)

    written('whole')
    assert read_meta(tmp_path / 'whole')['train_documents'] == 2
    for kill in range(1, len(parts)):
        with pytest.raises(Killed):
            written(f'at{kill}', kill)
        written(f'at{kill}')
        assert contents(tmp_path / f'at{kill}') == contents(tmp_path / 'whole')
